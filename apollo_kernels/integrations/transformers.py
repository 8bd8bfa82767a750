"""Hugging Face's Trainer.

trainer_optimizer   for Trainer(optimizer_cls_and_kwargs=...)
OptimizerStats      a callback that logs what the optimizer counts
optimizer_of        what optim="apollo_adamw" becomes after install_as_apollo_torch()
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from apollo_kernels.groups import apollo, choose_parameters, param_groups
from apollo_kernels.optimizer import APOLLO, APOLLOAdamW

try:
    from transformers.trainer import Trainer
    from transformers.trainer_callback import TrainerCallback
    from transformers.trainer_utils import check_target_module_exists
except ImportError as error:
    raise ImportError(
        "apollo_kernels.integrations.transformers needs transformers and accelerate "
        f"(pip install transformers accelerate): {error}"
    ) from None

# What optim_args may name; the first six are those that transformers knows of apollo_torch.
OPTIM_ARGS: dict[str, type] = {
    "rank": int, "proj": str, "scale_type": str, "update_proj_gap": int, "scale": float,
    "proj_type": str, "scale_front": bool, "disable_nl": bool, "correct_bias": bool,
    "stochastic_rounding": bool, "exact_projection": bool, "dense_state": str,
    "embeddings": bool, "seed": int, "backend": str, "fused": bool,
}  # fmt: skip
_OF_THE_OPTIMIZER = ("seed", "backend", "fused", "max_grad_norm", "gradient_release")


def trainer_optimizer(
    model: nn.Module,
    args: Any,
    *,
    groups: Callable[..., list[dict[str, Any]]] = apollo,
    **options: Any,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What Trainer takes as ``optimizer_cls_and_kwargs``, with the groups of this package.

    A class and keywords there get Trainer's own two groups, of parameters with and without weight
    decay: with a rank among the keywords, embedding and output head would be low-rank too. Here
    ``groups`` decides, when Trainer makes its optimizer::

        Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(model, args), ...)

    Args
        model: the one that is trained; its groups are made once at once, so that errors come early.
        args: TrainingArguments, for learning_rate, adam_beta1, adam_beta2, adam_epsilon and
            weight_decay, which falls on what Trainer has decay. optim and optim_args are not read.
        groups: apollo_kernels.apollo, apollo_mini, or another function of a model and ``options``
            that returns groups.
        options: of ``groups`` (rank, proj, embeddings, dense_state, ...), or the optimizer's seed,
            backend, fused, max_grad_norm and gradient_release. max_grad_norm clips in the step: set
            that of ``args`` to 0 then.
    Raises
        ValueError: as ``groups`` and APOLLO do, and for gradient_release together with
            gradient_accumulation_steps or several processes.
    """
    own = {key: options.pop(key) for key in _OF_THE_OPTIMIZER if key in options}
    decay = options.pop("weight_decay", args.weight_decay)

    def groups_of(trained: nn.Module) -> list[dict[str, Any]]:
        return _with_decay_of_trainer(groups(trained, **options), trained, decay)

    def make(trained: nn.Module, **keywords: Any) -> APOLLOAdamW:
        return APOLLOAdamW(groups_of(trained), **_arguments(args), **own, **keywords)

    def made(theirs: Any = None, **keywords: Any) -> Any:
        """Trainer calls this, and then ``make``. Before transformers 5.6 it called a class, with
        its own groups, which ours replace."""
        return make if theirs is None else make(model, **keywords)

    if own.get("gradient_release"):
        check_release(args, "gradient_release")
    groups_of(model)
    return made, {}


def optimizer_of(args: Any, model: nn.Module | None) -> tuple[type, dict[str, Any]]:
    """What ``optim="apollo_adamw"`` or ``"apollo_adamw_layerwise"`` stands for in ``args``.

    One optimizer over groups with names. Layer-wise mode is its gradient release, so that
    schedulers, ``optimizer.state_dict()`` and checkpoints are those of any optimizer.

    Args
        args: TrainingArguments. optim_target_modules is read as Trainer reads it, for linear layers
            and experts; None and "all-linear" mean all but the output head, as in the paper.
            optim_args may name any of OPTIM_ARGS, as "rank=64,scale_front=true"; without a rank
            it is 128, as in transformers. learning_rate, adam_beta1, adam_beta2, adam_epsilon and
            weight_decay go to all groups (transformers leaves the last out, and gives its default
            betas to all but the target modules).
        model: the one that is trained.
    Returns
        the class, and its keyword arguments with the groups as ``params``.
    Raises
        ValueError: for a key or value of optim_args that is unknown, for targets that match
            nothing, and for layer-wise mode together with gradient accumulation or several
            processes.
    """
    if model is None:
        raise ValueError(f"optim={_name(args.optim)!r} needs the model, got None")
    given = read_optim_args(args.optim_args)
    own = {key: given.pop(key) for key in _OF_THE_OPTIMIZER if key in given}
    if _name(args.optim).endswith("layerwise"):
        check_release(args, f"optim={_name(args.optim)!r}")
        own["gradient_release"] = True
    names = _low_rank_names(model, args.optim_target_modules, given.pop("embeddings", False))
    exactly = f"^(?:{'|'.join(map(re.escape, names))})$"
    made = param_groups(model, **{"rank": 128, "targets": exactly, **given})
    made = _with_decay_of_trainer(made, model, args.weight_decay)
    return APOLLOAdamW, {"params": made, **_arguments(args), **own}


def read_optim_args(text: str | None) -> dict[str, Any]:
    """ "rank=64,scale_front=true" as values; ValueError for what is not in OPTIM_ARGS."""
    values: dict[str, Any] = {}
    for piece in filter(None, (text or "").replace(" ", "").split(",")):
        key, _, value = piece.partition("=")
        if key not in OPTIM_ARGS:
            raise ValueError(
                f"optim_args has an unknown key {key!r}; known keys are {sorted(OPTIM_ARGS)} "
                "(learning rate, betas, epsilon and weight decay are TrainingArguments)"
            )
        kind = OPTIM_ARGS[key]
        try:
            values[key] = _SWITCH[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
            raise ValueError(f"optim_args: {key} must be {expected}, got {value!r}") from None
    return values


_SWITCH = {"true": True, "1": True, "false": False, "0": False}


class OptimizerStats(TrainerCallback):
    """Logs what APOLLO counts, wherever Trainer logs its loss, as a record of its own::

        trainer.add_callback(OptimizerStats(trainer))

    Its keys, over the steps since the record before:

        apollo_limited      of low-rank matrices and steps, the share that the norm-growth limiter
                            held back, 0 to 1
        apollo_update_norm  at the last step: the norm of all low-rank updates together, after the
                            limiter and before the learning rate (0 with disable_nl, which keeps
                            none; of sharded experts, of this rank's)
        apollo_nonfinite    matrices and dense parameters that a NaN or Inf has kept from a step

    Only logging waits for the device. It takes ``trainer``, since a callback cannot add to a record
    that the reporting callbacks before it have sent.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._seen = 0, 0, 0  # steps, limited, nonfinite

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stats = self._optimizer().stats()
        self._seen = state.global_step, stats["limited"], stats["nonfinite"]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if "loss" not in (logs or {}) or state.global_step == self._seen[0]:
            return
        optimizer = self._optimizer()
        stats, before = optimizer.stats(), self._seen
        self._seen = state.global_step, stats["limited"], stats["nonfinite"]
        steps, limited, nonfinite = (a - b for a, b in zip(self._seen, before, strict=True))
        norms = _update_norms(optimizer)
        matrices = max(1, sum(n.numel() for n in norms))
        squares = sum(float(n.double().square().sum()) for n in norms)
        record = {
            "apollo_limited": limited / (steps * matrices),
            "apollo_update_norm": squares**0.5,
            "apollo_nonfinite": nonfinite,
        }
        self._trainer.log(record)

    def _optimizer(self) -> APOLLO:
        found: Any = self._trainer.optimizer
        found = getattr(found, "optimizer", found)  # out of accelerate's
        if not isinstance(found, APOLLO):
            raise TypeError(
                f"OptimizerStats needs an optimizer of apollo_kernels, and this Trainer has "
                f"{type(found).__name__}"
            )
        return found


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))


def _arguments(args: Any) -> dict[str, Any]:
    betas = args.adam_beta1, args.adam_beta2
    return {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


def check_release(args: Any, what: str) -> None:
    """Gradient release in Trainer's loop; warns that there is nothing to clip."""
    if args.gradient_accumulation_steps != 1:
        raise ValueError(
            f"{what} steps inside of backward: gradient_accumulation_steps must be 1, got "
            f"{args.gradient_accumulation_steps}"
        )
    if args.world_size > 1:
        raise ValueError(
            f"{what} works in one process, and there are {args.world_size}: their gradients are "
            "averaged only after a parameter would have been stepped"
        )
    if args.max_grad_norm and args.max_grad_norm > 0:
        warnings.warn(
            f"max_grad_norm={args.max_grad_norm} has no effect with {what}, and Trainer logs a "
            "grad_norm of 0: gradients are stepped and freed inside of backward, before their norm "
            "is known. The norm-growth limiter bounds every low-rank step; say max_grad_norm=0",
            stacklevel=2,
        )


def _with_decay_of_trainer(
    made: Iterable[dict[str, Any]], model: nn.Module, weight_decay: float
) -> list[dict[str, Any]]:
    """The same groups, each cut in two where only some of its parameters have weight decay."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = {p: name for name, p in model.named_parameters()}
    cut = []
    for group in made:
        for decays in (True, False):
            params = [p for p in group["params"] if (names[p] in decayed) == decays]
            if params:
                called = [names[p] for p in params]
                decay = weight_decay if decays else 0.0
                keys = {"params": params, "param_names": called, "weight_decay": decay}
                cut.append({**group, **keys})
    return cut


def _low_rank_names(
    model: nn.Module, targets: str | list[str] | None, embeddings: bool
) -> list[str]:
    """The parameters that take the low-rank step; ValueError if there are none."""
    linear, all_matrices = (
        [c.name for c in choose_parameters(model, "linear", both) if c.low_rank]
        for both in (False, True)
    )
    if targets is None or _is_all_linear(targets):
        return all_matrices if embeddings else linear
    if not isinstance(targets, (str, list)):
        raise ValueError(
            "optim_target_modules must be a list of strings, a regular expression or "
            f"'all-linear', got {targets!r}"
        )
    modules = dict(model.named_modules())

    def is_named(name: str) -> bool:
        owner = name.rpartition(".")[0]
        table = isinstance(modules[owner], (nn.Embedding, nn.EmbeddingBag))
        return not table and bool(check_target_module_exists(targets, owner))

    names = [name for name in all_matrices if is_named(name)]
    if not names:
        raise ValueError(
            f"optim_target_modules={targets!r} matches no linear layer of {type(model).__name__}"
        )
    return names + [n for n in all_matrices if embeddings and n not in {*names, *linear}]


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.replace("_", "-") == "all-linear"


def _update_norms(optimizer: APOLLO) -> list[Tensor]:
    found = (own["update_norm"] for own in optimizer.state.values() if own and "update_norm" in own)
    return [norm.to_local() if hasattr(norm, "to_local") else norm for norm in found]
