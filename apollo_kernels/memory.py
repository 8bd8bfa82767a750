"""How many bytes weights and optimizer state take, per group, next to AdamW's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from apollo_kernels.quantized import stored


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
class MemoryReport:
    """Rows by group; str() is a table. State that the first step has yet to make counts as made."""

    groups: list[GroupMemory] = field(default_factory=list)

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
        lines = [
            f"{'group':<22}{'tensors':>8}{'weights':>17}"
            f"{'weight MB':>13}{'state MB':>13}{'AdamW MB':>13}"
        ]
        for g in [*self.groups, total]:
            sizes = (g.weight_bytes, g.state_bytes, g.adamw_bytes)
            line = f"{g.name:<22}{g.parameters:>8}{g.elements:>17,}"
            lines.append(line + "".join(f"{size / 1e6:>13,.3f}" for size in sizes))
        return "\n".join(lines)


def tensor_bytes(values: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in values if isinstance(t, Tensor))


def measure(
    param_groups: list[dict[str, Any]],
    state_of: Callable[[Tensor, dict[str, Any]], Mapping[str, Any]],
) -> MemoryReport:
    """The report over ``param_groups``; ``state_of(p, group)`` may answer with meta tensors."""
    report = MemoryReport()
    for index, group in enumerate(param_groups):
        rows: dict[str, GroupMemory] = {}
        for p in group["params"]:
            state = state_of(p, group)
            low_rank = "update_norm" in state
            kind = f"rank {group['rank']} {group['scale_type']}" if low_rank else "dense AdamW"
            row = rows.setdefault(kind, GroupMemory(f"{index}: {kind}", 0, 0, 0, 0, 0))
            row.parameters += 1
            row.elements += p.numel()
            row.weight_bytes += tensor_bytes(stored(p))
            row.state_bytes += tensor_bytes(state.values())
            row.adamw_bytes += 2 * tensor_bytes([p])
        report.groups.extend(rows.values())
    return report
