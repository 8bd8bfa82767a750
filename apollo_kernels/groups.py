"""Which parameters of a model take APOLLO's step, which AdamW's, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from apollo_kernels import flat, names

_EMBEDDINGS = "embedding", "output head"  # reasons of what ``embeddings`` is about


@dataclass
class Choice:
    """Where one parameter went."""

    name: str
    parameter: Tensor
    low_rank: bool
    reason: str
    decay: bool


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
    **options: Any,
) -> list[dict[str, Any]]:
    """Groups of ``model``'s trainable parameters for ``APOLLO`` or ``APOLLOAdamW``.

    Args
        rank, scale_type, scale, proj, proj_type, update_proj_gap: of the low-rank group, as in
            APOLLO; proj="sparse" projects at a cost that does not grow with the rank.
        targets: what takes the low-rank step:
            "linear": weights of nn.Linear and Hugging Face Conv1D, but not the output head (as in
                the paper: attention and MLP matrices);
            "all": every parameter of two or more dimensions, embeddings and head included;
            any other string: a regular expression, searched in parameter names;
            a list of strings: parameters whose name has one of them as a substring.
        embeddings: with "linear", also embeddings and the output head. Their dense moments are most
            of the state of a model with a large vocabulary.
        weight_decay: of matrices; biases, norms and other vectors get 0.
        verbose: print a table of what went where and why, and what would save much of the state.
        options: further keys (lr, betas, dense_state, ...), put into every group.
    Returns
        up to three groups: low-rank, dense with decay, dense without. ``param_names`` of each says
        what its parameters are called, as in PyTorch; a name decides the parameter's projections.
    Raises
        ValueError: if ``targets`` matches no parameter, and for a model under FSDP1 or DeepSpeed
            ZeRO-3, which cut parameters into pieces.
    """
    choices = choose_parameters(model, targets, embeddings)
    _refuse_pieces(choices)
    if not any(c.low_rank for c in choices):
        raise ValueError(f"targets={targets!r} matches no parameter of {type(model).__name__}")
    low_rank: dict[str, Any] = {
        "rank": rank,
        "scale_type": scale_type,
        "scale": scale,
        "proj": proj,
    }
    low_rank.update(proj_type=proj_type, update_proj_gap=update_proj_gap)
    groups: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([c.parameter for c in choices if c.low_rank], {**low_rank, "weight_decay": weight_decay}),
        (
            [c.parameter for c in choices if not c.low_rank and c.decay],
            {"weight_decay": weight_decay},
        ),
        ([c.parameter for c in choices if not c.low_rank and not c.decay], {"weight_decay": 0.0}),
    ]
    names.remember(model)
    called = {c.parameter: c.name for c in choices}
    made = [
        {"params": params, "param_names": [called[p] for p in params], **keys, **options}
        for params, keys in groups
        if params
    ]
    if verbose:
        print(describe(choices), *_advice(choices, made, targets), sep="\n")
    return made


def apollo(model: nn.Module, rank: int | None = None, **options: Any) -> list[dict[str, Any]]:
    """The paper's APOLLO: channel scaling, scale 1, rank a quarter of the hidden size, at most 256.

    The hidden size is ``model.config.hidden_size`` (Hugging Face), or else the median smaller side
    of the low-rank matrices. ``options`` go to ``param_groups``: ``proj="sparse"``, say.
    """
    if rank is None:
        rank = max(1, min(256, _hidden_size(model, options) // 4))
    return param_groups(model, **{"rank": rank, "scale_type": "channel", "scale": 1.0, **options})


def apollo_mini(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """The paper's APOLLO-Mini: rank 1, tensor scaling, scale 128. ``options`` as in apollo()."""
    return param_groups(model, **{"rank": 1, "scale_type": "tensor", "scale": 128.0, **options})


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
    if not isinstance(targets, str):
        targets = list(targets)
    head = _output_head(model)
    owners: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            owners.setdefault(p, []).append((module, name))
    return [
        Choice(name, p, *_judge(name, p, owners[p], targets, embeddings, head), p.dim() >= 2)
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
        sizes = [c.parameter.numel() for c in choices if c.low_rank == (kind == "low-rank")]
        lines.append(f"{kind}: {len(sizes)} parameters, {sum(sizes):,} weights")
    return "\n".join(lines)


def _advice(
    choices: Sequence[Choice], groups: Sequence[dict[str, Any]], targets: str | Iterable[str]
) -> list[str]:
    """What memory_report() would say of the groups, by the names of the parameters."""
    from apollo_kernels import memory, state  # not above: they know int8 weights, which know us

    movable = {c.parameter for c in choices if c.reason in _EMBEDDINGS and targets == "linear"}
    rest = {"rank": None, "batch_dims": 0, "proj_type": "std", "dense_state": "float32"}
    rest["scale_type"] = "channel"
    whole = [{**rest, **group} for group in groups]
    report = memory.measure(whole, lambda p, group: state.zeros(p, group, "meta"), movable)
    return report.advice()


def _judge(
    name: str,
    p: Tensor,
    owners: list[tuple[nn.Module, str]],
    targets: str | list[str],
    embeddings: bool,
    head: nn.Module | None,
) -> tuple[bool, str]:
    """Whether a parameter takes the low-rank step, and the reason in a few words."""
    if p.dim() < 2:
        return False, "fewer than two dimensions"
    if isinstance(targets, list):
        target = next((t for t in targets if t in name), None)
        return target is not None, f"name has {target!r}" if target else "no target in its name"
    if targets == "all":
        return True, "targets='all'"
    if targets != "linear":
        found = re.search(targets, name) is not None
        return found, f"name {'matches' if found else 'does not match'} {targets!r}"
    modules = [module for module, _ in owners]
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in modules):
        return embeddings, _EMBEDDINGS[0]
    if any(m is head for m in modules):
        return embeddings, _EMBEDDINGS[1]
    if any(_is_linear(m) and key == "weight" for m, key in owners):
        return True, type(modules[0]).__name__
    return False, f"in {type(modules[0]).__name__}, not a linear layer"


def _is_linear(module: nn.Module) -> bool:
    # Conv1D by name: importing transformers to ask would cost seconds.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _output_head(model: nn.Module) -> nn.Module | None:
    """Hugging Face's output embedding, or else a layer that bears one of the usual names."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    if callable(getter):
        return getter()
    usual = ("lm_head", "embed_out", "output", "head", "classifier", "score")
    named = (m for name, m in model.named_children() if name in usual and _is_linear(m))
    return next(named, None)


def _refuse_pieces(choices: list[Choice]) -> None:
    params = [c.parameter for c in choices]
    flat.refuse(params, {"rank": 1}, lambda place: f"parameter {choices[place].name!r}")


def _hidden_size(model: nn.Module, options: dict[str, Any]) -> int:
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(size, int):
        return size
    keys = ("targets", "embeddings")
    choices = choose_parameters(model, **{k: options[k] for k in keys if k in options})
    _refuse_pieces(choices)
    sides = sorted(min(c.parameter.shape) for c in choices if c.low_rank)
    if not sides:
        raise ValueError(f"no low-rank parameter in {type(model).__name__} to take the rank from")
    return sides[len(sides) // 2]
