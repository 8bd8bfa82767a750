"""How many bytes weights and optimizer state take, per group, next to AdamW's, and what to change
where dense moments are much of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apollo_kernels import distributed, experts, names
from apollo_kernels import state as states
from apollo_kernels.batch import compute_dtype
from apollo_kernels.distributed import local
from apollo_kernels.moments import DENSE_STATES, MOMENTS
from apollo_kernels.quantized import Int8Weight, stored

_MUCH = 1 / 3  # of the state, from where on dense moments are worth a word
_NAMED = 4  # parameters that the advice names


@dataclass
class GroupMemory:
    """One kind of parameter of one group; all sizes in bytes."""

    name: str
    parameters: int
    elements: int
    weight_bytes: int
    state_bytes: int
    adamw_bytes: int


@dataclass
class Saving:
    """A change of the options, the bytes of state it would save, and the parameters it is about."""

    option: str
    bytes: int
    names: list[str]


@dataclass
class MemoryReport:
    """Rows by group; str() is a table. State that the first step has yet to make counts as made.

    Of sharded parameters it counts what this rank holds. ``traffic``: what a step sends to other
    ranks, None if nothing is sharded. ``shard_traffic``: bytes beside it that gathering these
    weights for forward and for backward and reducing their gradients takes.
    ``savings``: empty unless dense moments are more than a third of the state.
    """

    groups: list[GroupMemory] = field(default_factory=list)
    traffic: distributed.Traffic | None = None
    shard_traffic: int = 0
    dense_moment_bytes: int = 0
    savings: list[Saving] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        return sum(g.weight_bytes for g in self.groups)

    @property
    def state_bytes(self) -> int:
        return sum(g.state_bytes for g in self.groups)

    @property
    def adamw_bytes(self) -> int:
        """Of two moments in each weight's dtype, as torch.optim.AdamW keeps them."""
        return sum(g.adamw_bytes for g in self.groups)

    def __str__(self) -> str:
        total = GroupMemory("total", 0, 0, self.weight_bytes, self.state_bytes, self.adamw_bytes)
        total.parameters = sum(g.parameters for g in self.groups)
        total.elements = sum(g.elements for g in self.groups)
        rows = [*self.groups, total]
        width = max(22, *(len(g.name) + 1 for g in rows))
        lines = [
            f"{'group':<{width}}{'tensors':>8}{'weights':>17}"
            f"{'weight MB':>13}{'state MB':>13}{'AdamW MB':>13}"
        ]
        for g in rows:
            sizes = (g.weight_bytes, g.state_bytes, g.adamw_bytes)
            line = f"{g.name:<{width}}{g.parameters:>8}{g.elements:>17,}"
            lines.append(line + "".join(f"{size / 1e6:>13,.3f}" for size in sizes))
        if self.traffic is not None:
            lines.append(
                f"a step sends {self.traffic.total / 1e6:,.3f} MB per rank, beside "
                f"{self.shard_traffic / 1e6:,.3f} MB of gathered weights and reduced gradients"
            )
        return "\n".join([*lines, *self.advice()])

    def advice(self) -> list[str]:
        """``savings`` as lines to print."""
        if not self.savings:
            return []
        share = self.dense_moment_bytes / self.state_bytes
        lines = [f"{share:.0%} of the state are moments of dense parameters:"]
        for saving in self.savings:
            names = ", ".join(saving.names[:_NAMED]) + (", ..." if saving.names[_NAMED:] else "")
            about = f" ({names})" if names else ""
            lines.append(f"  {saving.option} would save {saving.bytes / 1e6:,.3f} MB{about}")
        return lines


def tensor_bytes(values: Iterable[Any]) -> int:
    """On this rank."""
    own = [local(t) for t in values if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in own)


def measure(
    param_groups: list[dict[str, Any]],
    state_of: Callable[[Tensor, dict[str, Any]], Mapping[str, Any]],
    movable: Collection[Tensor] | None = None,
    clips: bool = False,
) -> MemoryReport:
    """The report over ``param_groups``; ``state_of(p, group)`` may answer with meta tensors.

    ``clips``: whether the step takes the norm of all gradients.
    ``movable``: the dense parameters that ``embeddings=True`` would put into the low-rank group; by
    default all matrices among them, since a group does not say what its parameters belong to.
    """
    report = MemoryReport()
    for index, group in enumerate(param_groups):
        rows: dict[str, GroupMemory] = {}
        for p in group["params"]:
            state = state_of(p, group)
            kind = _kind(p, group)
            row = rows.setdefault(kind, GroupMemory(f"{index}: {kind}", 0, 0, 0, 0, 0))
            row.parameters += 1
            row.elements += local(p).numel()
            row.weight_bytes += tensor_bytes(stored(local(p)))
            row.state_bytes += tensor_bytes(state.values())
            row.adamw_bytes += 2 * tensor_bytes([p])
        report.groups.extend(rows.values())
    _advise(report, param_groups, state_of, movable)
    _count_traffic(report, param_groups, clips)
    return report


def _count_traffic(
    report: MemoryReport, param_groups: Sequence[dict[str, Any]], clips: bool
) -> None:
    placed = [
        (p, states.layout_of(p, group), group["scale_type"], compute_dtype(p.dtype))
        for group in param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    if any(distributed.is_sharded(p) for p, *_ in placed):
        report.traffic = distributed.traffic_of(placed, clips)
        cut = (p for p, *_ in placed if distributed.view_of(p, None).spread.axes)
        report.shard_traffic = sum(2 * _whole_bytes(p) + p.numel() * p.element_size() for p in cut)


def _whole_bytes(p: Tensor) -> int:
    """Of a whole DTensor as it is gathered; int8 weights are cut along rows, and travel so."""
    own = local(p)
    if isinstance(own, Int8Weight):
        return p.shape[0] * (own.codes.shape[1] + 4 * own.grid.shape[1])
    return p.numel() * p.element_size()


def _kind(p: Tensor, group: Mapping[str, Any]) -> str:
    stored_as = states.dense_state(p, group)
    if stored_as is None:
        stacks = f", stacks of {local(p).shape[0]}" if group["batch_dims"] else ""
        return f"rank {group['rank']} {group['scale_type']}{stacks}"
    return "dense AdamW" if stored_as == "float32" else f"dense AdamW {stored_as}"


def _moment_bytes(state: Mapping[str, Any]) -> int:
    return tensor_bytes(v for k, v in state.items() if k.removesuffix("_unit") in MOMENTS)


def _advise(
    report: MemoryReport,
    param_groups: Sequence[dict[str, Any]],
    state_of: Callable[[Tensor, dict[str, Any]], Mapping[str, Any]],
    movable: Collection[Tensor] | None,
) -> None:
    """What a report says of dense moments."""
    dense: list[tuple[str, Tensor, dict[str, Any], int]] = []
    for group in param_groups:
        for place, p in enumerate(group["params"]):
            if states.dense_state(p, group) is not None:
                name = names.of(group, place) or "x".join(map(str, p.shape))
                dense.append((name, p, group, _moment_bytes(state_of(p, group))))
    report.dense_moment_bytes = sum(size for *_, size in dense)
    if report.dense_moment_bytes <= _MUCH * report.state_bytes:
        return
    low_rank = next((g for g in param_groups if g["rank"] is not None), None)

    def weigh(option: str, change: Mapping[str, Any], of: Collection[Tensor] | None = None) -> None:
        saved, named = 0, []
        for name, p, group, size in sorted(dense, key=lambda entry: -entry[3]):
            if of is None or p in of:
                less = size - tensor_bytes(_after(p, {**group, **change}))
                saved += less
                named += [name] if less > 0 else []
        if saved > 0:
            report.savings.append(Saving(option, saved, named))

    if low_rank is not None:
        matrices = {p: name for name, p, g, _ in dense if g["rank"] is None and p.dim() > 1}
        stacks = {p for p, name in matrices.items() if experts.look_like(p.shape, name)}
        moved = matrices.keys() - stacks
        moved = moved if movable is None else moved & set(movable)
        weigh("embeddings=True", {**low_rank, "batch_dims": 0}, moved)
        option = f"a group with rank {low_rank['rank']} and batch_dims=1"
        weigh(option, {**low_rank, "batch_dims": 1}, stacks)
    for stored_as in DENSE_STATES[1:]:
        weigh(f'dense_state="{stored_as}"', {"dense_state": stored_as})


def _after(p: Tensor, group: Mapping[str, Any]) -> list[Tensor]:
    """The state of ``p`` in ``group``, without its step."""
    return [v for key, v in states.zeros(p, group, "meta").items() if key != "step"]
