"""Refuses pieces of parameters: the buffers that FSDP1, DeepSpeed and Megatron cut from them.

A low-rank step needs the matrix. A piece of one has one dimension, as a bias has, and would take
AdamW's step at APOLLO's learning rate. What tells them apart is what those libraries leave on a
parameter, or else that it stands in a low-rank group where matrices stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

_INSTEAD = (
    ". Use FSDP2 (torch.distributed.fsdp.fully_shard), which keeps parameters whole, "
    "DistributedDataParallel, or torch.distributed.optim.ZeroRedundancyOptimizer"
)
_NO_MATRIX = "; a low-rank step needs the whole matrix"


def refuse(
    params: Sequence[Tensor], group: Mapping[str, Any], name_of: Callable[[int], str]
) -> None:
    """Raises ValueError if ``group`` asks for low-rank steps and some of ``params`` are pieces."""
    if group["rank"] is None:
        return
    # Without sharding FSDP1 leaves parameters whole, vectors too.
    whole = any(getattr(p, "_fsdp_flattened", False) and p.dim() >= 2 for p in params)
    for place, p in enumerate(params):
        if (how := _cut_by(p, whole)) is not None:
            raise ValueError(
                f"{name_of(place)}, of shape {tuple(p.shape)}, is no whole parameter: "
                f"{how}{_NO_MATRIX}{_INSTEAD}"
            )


def _cut_by(p: Tensor, whole: bool) -> str | None:
    """Which library has cut ``p`` from whole parameters, and how; None if nothing says so."""
    shape = tuple(getattr(p, "ds_shape", p.shape))
    if hasattr(p, "ds_id") and shape != tuple(p.shape):
        return f"DeepSpeed ZeRO-3 has partitioned it, whose shape is {shape}"
    if getattr(p, "_is_flat_param", False):
        return f"it is a flat buffer of FSDP1 for {', '.join(getattr(p, '_fqns', ())[:3])}, ..."
    if getattr(p, "_fsdp_flattened", False) and p.dim() < 2 and not whole:
        return "FSDP1 has cut it out of a flat buffer"
    return None


class Memory:
    """What stood in an optimizer's groups when they were added: libraries swap it afterwards."""

    def __init__(self) -> None:
        self._added: set[int] = set()
        self._had_matrices = False

    def add(self, group: Mapping[str, Any]) -> None:
        self._added.update(map(id, group["params"]))
        self._had_matrices |= _has_matrices(group)

    def refuse_swapped(
        self, groups: Sequence[Mapping[str, Any]], name_of: Callable[[int, int], str]
    ) -> None:
        """Raises ValueError if all matrices have gone and vectors stand in their place, as when
        DeepSpeed or Megatron have put flat buffers into the groups."""
        if not self._had_matrices or any(map(_has_matrices, groups)):
            return
        for index, group in enumerate(groups):
            for place, p in enumerate(group["params"]):
                if group["rank"] is not None and id(p) not in self._added:
                    raise ValueError(
                        f"{name_of(index, place)}, of shape {tuple(p.shape)}, stands where the "
                        "optimizer had matrices: DeepSpeed (ZeRO-1, 2 and 3) and Megatron's "
                        "distributed optimizer flatten parameters into such buffers"
                        f"{_NO_MATRIX}{_INSTEAD}"
                    )


def _has_matrices(group: Mapping[str, Any]) -> bool:
    return group["rank"] is not None and any(p.dim() >= 2 for p in group["params"])
