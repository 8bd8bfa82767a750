"""Which parameters of a model take APOLLO's step, which AdamW's, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apollo_kernels import experts, flat, heads, names, options

_EMBEDDINGS = "embedding", "output head"  # reasons of what ``embeddings`` is about
LINEAR = ("linear", "all-linear", "all_linear")  # the same, as PEFT and transformers call it


@dataclass
class Choice:
    """Where one parameter went."""

    name: str
    parameter: Tensor
    low_rank: bool
    reason: str
    decay: bool
    batch_dims: int = 0  # leading dimensions that count matrices, as of experts

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape of each of its matrices; of a vector its own."""
        return tuple(self.parameter.shape[self.batch_dims :])


def param_groups(
    model: nn.Module,
    *,
    rank: int,
    scale_type: str = "channel",
    scale: float = 1.0,
    proj: str = "random",
    proj_type: str = "std",
    update_proj_gap: int = 200,
    targets: str | Iterable[str] = "linear",
    embeddings: bool = False,
    weight_decay: float = 0.0,
    verbose: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """Groups of ``model``'s trainable parameters for ``APOLLO`` or ``APOLLOAdamW``.

    A parameter of three dimensions [E, m, n] that holds the weights of E experts, and is no filter
    of a convolution, is E matrices (``batch_dims`` 1 in its group). The output head is found
    through DistributedDataParallel, torch.compile, PEFT and LightningModules.

    Args
        model: the module, wrapped or not.
        rank, scale_type, scale, proj, proj_type, update_proj_gap: of the low-rank group, as in
            APOLLO; proj="sparse" projects at a cost that does not grow with the rank.
        targets: what takes the low-rank step:
            "linear", or "all-linear": weights of nn.Linear and Hugging Face Conv1D, and experts,
                but not the output head (as in the paper: attention and MLP matrices), nor layers
                with a single input or output, which are vectors;
            "all": every parameter of two or more dimensions, embeddings and head included;
            any other string: a regular expression, searched in parameter names;
            a list of strings: parameters whose name has one of them as a substring.
        embeddings: with "linear", also embeddings and the output head. Their dense moments are most
            of the state of a model with a large vocabulary.
        weight_decay: of matrices; biases, norms and other vectors get 0.
        verbose: print a table of what went where and why, and what would save much of the state.
        more: further keys (lr, betas, dense_state, ...), put into every group.
    Returns
        up to four groups: low-rank, low-rank experts, dense with decay, dense without (biases of
        experts, too). ``param_names`` of each says what its parameters are called, as in PyTorch; a
        name decides the parameter's projections.
    Raises
        ValueError: for an argument that cannot be meant, if ``targets`` matches no parameter, and
            for a model under FSDP1 or DeepSpeed ZeRO-3, which cut parameters into pieces, or with
            int8 weights under FSDP2.
    """
    _check_arguments({"rank": rank, **more})
    choices = choose_parameters(model, targets, embeddings)
    _refuse_pieces(choices)
    _refuse_lost_int8(model)
    if not any(c.low_rank for c in choices):
        raise ValueError(f"targets={targets!r} matches no parameter of {type(model).__name__}")
    low_rank: dict[str, Any] = {
        "rank": rank,
        "scale_type": scale_type,
        "scale": scale,
        "proj": proj,
        "proj_type": proj_type,
        "update_proj_gap": update_proj_gap,
        "weight_decay": weight_decay,
    }
    kinds: list[tuple[Callable[[Choice], bool], dict[str, Any]]] = [
        (lambda c: c.low_rank and not c.batch_dims, {**low_rank, "batch_dims": 0}),
        (lambda c: c.low_rank and c.batch_dims > 0, {**low_rank, "batch_dims": 1}),
        (lambda c: not c.low_rank and c.decay, {"weight_decay": weight_decay}),
        (lambda c: not c.low_rank and not c.decay, {"weight_decay": 0.0}),
    ]
    names.remember(model)
    made = []
    for belongs, keys in kinds:
        own = [c for c in choices if belongs(c)]
        if own:
            params, called = [c.parameter for c in own], [c.name for c in own]
            made.append({"params": params, "param_names": called, **keys, **more})
    if verbose:
        print(describe(choices), *_advice(choices, made, targets), sep="\n")
    return made


def apollo(model: nn.Module, rank: int | None = None, **more: Any) -> list[dict[str, Any]]:
    """The paper's APOLLO: channel scaling, scale 1, rank a quarter of the hidden size, at most 256.

    The hidden size is ``model.config.hidden_size`` (Hugging Face), or else the median smaller side
    of the low-rank matrices. ``more`` goes to ``param_groups``: ``proj="sparse"``, say.
    """
    _check_model(model)
    if rank is None:
        rank = max(1, min(256, _hidden_size(model, more) // 4))
    return param_groups(model, **{"rank": rank, "scale_type": "channel", "scale": 1.0, **more})


def apollo_mini(model: nn.Module, **more: Any) -> list[dict[str, Any]]:
    """The paper's APOLLO-Mini: rank 1, tensor scaling, scale 128. ``more`` as in apollo()."""
    return param_groups(model, **{"rank": 1, "scale_type": "tensor", "scale": 128.0, **more})


def choose_parameters(
    model: nn.Module,
    targets: str | Iterable[str] = "linear",
    embeddings: bool = False,
    *,
    frozen: bool = False,
) -> list[Choice]:
    """One Choice per trainable parameter; a tied weight stands once, under its first name.

    ``frozen``: of parameters that are not trained, too.
    """
    _check_model(model)
    targets = _checked_targets(targets)
    head = heads.find(model)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    filters: set[Tensor] = set()
    for path, module in modules.items():
        # A parametrized weight belongs to the layer whose weight it makes.
        layer = modules[path.split(".parametrizations.")[0]]
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append((module, name))
            if experts.is_convolution(layer):
                filters.add(p)
    return [
        _choose(name, p, owners[p], p in filters, targets, embeddings, head)
        for name, p in model.named_parameters()
        if p.requires_grad or frozen
    ]


def describe(choices: list[Choice]) -> str:
    """The table that ``verbose`` prints."""
    width = max(len(c.name) for c in choices)
    lines = [f"{'parameter':<{width}}  {'shape':<16}{'step':<10}{'decay':<7}why"]
    for c in choices:
        shape, step = "x".join(map(str, c.parameter.shape)), "low-rank" if c.low_rank else "dense"
        decay = "yes" if c.decay else "no"
        lines.append(f"{c.name:<{width}}  {shape:<16}{step:<10}{decay:<7}{c.reason}")
    for kind in ("low-rank", "dense"):
        some = [c for c in choices if c.low_rank == (kind == "low-rank")]
        matrices = sum(math.prod(c.parameter.shape[: c.batch_dims]) for c in some)
        number = f"{len(some)} parameters" + (f" ({matrices} matrices)" * (matrices > len(some)))
        lines.append(f"{kind}: {number}, {sum(c.parameter.numel() for c in some):,} weights")
    return "\n".join(lines)


def _advice(
    choices: Sequence[Choice], groups: Sequence[dict[str, Any]], targets: str | Iterable[str]
) -> list[str]:
    """What memory_report() would say of the groups, by the names of the parameters."""
    from apollo_kernels import memory, state  # not above: they know int8 weights, which know us

    movable = {c.parameter for c in choices if c.reason in _EMBEDDINGS and targets in LINEAR}
    rest = {"rank": None, "batch_dims": 0, "proj_type": "std", "dense_state": "float32"}
    rest["scale_type"] = "channel"
    whole = [{**rest, **group} for group in groups]
    report = memory.measure(whole, lambda p, group: state.zeros(p, group, "meta"), movable)
    return report.advice()


def _choose(
    name: str,
    p: Tensor,
    owners: list[tuple[nn.Module, str]],
    is_filter: bool,
    targets: str | list[str],
    embeddings: bool,
    head: set[nn.Module],
) -> Choice:
    if p.dim() == 2 and name.endswith("bias") and any(map(_holds_experts, owners)):
        return Choice(name, p, False, "a bias of each expert", False)
    described = " ".join([name, *(type(module).__name__ for module, _ in owners)])
    batch_dims = int(not is_filter and experts.count_matrices(p.shape, described))
    low_rank, reason = _judge(name, p, owners, targets, embeddings, head)
    stacked = batch_dims and targets in LINEAR and reason not in _EMBEDDINGS
    if stacked and experts.are_weights(p.shape, described):
        low_rank, reason = True, type(owners[0][0]).__name__
    if low_rank and batch_dims:
        reason = f"{p.shape[0]} matrices; {reason}"
    return Choice(name, p, low_rank, reason, p.dim() >= 2, batch_dims * low_rank)


def _holds_experts(owner: tuple[nn.Module, str]) -> bool:
    return any(p.dim() == 3 for p in owner[0].parameters(recurse=False))


def _judge(
    name: str,
    p: Tensor,
    owners: list[tuple[nn.Module, str]],
    targets: str | list[str],
    embeddings: bool,
    head: set[nn.Module],
) -> tuple[bool, str]:
    """Whether a parameter takes the low-rank step, and the reason in a few words."""
    if p.dim() < 2:
        return False, "fewer than two dimensions"
    if isinstance(targets, list):
        target = next((t for t in targets if t in name), None)
        return target is not None, f"name has {target!r}" if target else "no target in its name"
    if targets == "all":
        return True, "targets='all'"
    if targets not in LINEAR:
        found = re.search(targets, name) is not None
        return found, f"name {'matches' if found else 'does not match'} {targets!r}"
    modules = [module for module, _ in owners]
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in modules):
        return embeddings, _EMBEDDINGS[0]
    if any(m in head for m in modules):
        return embeddings, _EMBEDDINGS[1]
    if any(heads.is_linear(m) and key == "weight" for m, key in owners):
        if min(p.shape) == 1:
            return False, "a vector: one side is 1"
        return True, type(modules[0]).__name__
    return False, f"in {type(modules[0]).__name__}, not a linear layer"


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: give the model itself, "
            "not its parameters"
        )


def _checked_targets(targets: Any) -> str | list[str]:
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets={targets!r} is no regular expression: {error}") from None
        return targets
    found: list[Any] = list(targets) if isinstance(targets, Iterable) else [None]
    if not all(isinstance(target, str) for target in found):
        raise ValueError(f"targets must be a string or a list of strings, got {targets!r}")
    return found


def _check_arguments(keys: dict[str, Any]) -> None:
    """Those that param_groups would hand on unread."""
    if "batch_dims" in keys:
        raise ValueError(
            f"batch_dims={keys['batch_dims']!r} is not for all parameters: param_groups sets it "
            "for those that hold experts. Make the groups by hand to set it otherwise"
        )
    options.check_names(keys)
    options.check_rank(keys["rank"])


def _refuse_pieces(choices: list[Choice]) -> None:
    params = [c.parameter for c in choices]
    flat.refuse(params, {"rank": 1}, lambda place: f"parameter {choices[place].name!r}")


def _refuse_lost_int8(model: nn.Module) -> None:
    from apollo_kernels import quantized  # which chooses its weights with this file

    quantized.refuse_lost(model)


def _hidden_size(model: nn.Module, more: dict[str, Any]) -> int:
    for module in heads.unwrapped(model):
        size = getattr(getattr(module, "config", None), "hidden_size", None)
        if isinstance(size, int):
            return size
    keys = ("targets", "embeddings")
    choices = choose_parameters(model, **{k: more[k] for k in keys if k in more})
    _refuse_pieces(choices)
    sides = sorted(min(c.matrix) for c in choices if c.low_rank)
    if not sides:
        raise ValueError(f"no low-rank parameter in {type(model).__name__} to take the rank from")
    return sides[len(sides) // 2]
