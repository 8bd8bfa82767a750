"""Refuses pieces of parameters: the buffers that FSDP1, DeepSpeed and Megatron cut from them.

A low-rank step needs the matrix. A piece of one has one dimension, as a bias has, and would take
AdamW's step at APOLLO's learning rate. What tells them apart is what those libraries leave on a
parameter, or else that it stands in a low-rank group where matrices stood.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
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
        self._looks = 3  # steps without gradients whose reason is still looked for

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

    def refuse_orphans(
        self, groups: Sequence[Mapping[str, Any]], name_of: Callable[[int, int], str]
    ) -> None:
        """Raises ValueError if FSDP1 has taken the parameters out of their model since they were
        added (use_orig_params=False): no step would do anything.

        It leaves no mark on them. But none of them has a gradient or stands in a module, while a
        flat buffer has one that was made of parameters of this shape and name. Only an optimizer
        that has not yet seen a gradient looks, and no more than three times: a step before the
        first backward is no mistake, and a look goes through all objects of the process.
        """
        if not self._looks:
            return
        if any(p.grad is not None for group in groups for p in group["params"]):
            self._looks = 0
            return
        self._looks -= 1
        for shape, fqn in _taken_by_fsdp1():
            for index, group in enumerate(groups):
                called = group.get("param_names", [fqn] * len(group["params"]))
                for place, (p, name) in enumerate(zip(group["params"], called, strict=True)):
                    alike = p.shape == shape and f".{name}".endswith(f".{fqn}")
                    if alike and not _stands_in_a_dict(p):
                        raise ValueError(
                            f"{name_of(index, place)}, of shape {tuple(shape)}, is in its model no "
                            "more, and no parameter of this optimizer has a gradient: FSDP1 has "
                            "put a flat buffer in its place since the optimizer was made, whose "
                            f"steps would do nothing{_INSTEAD}"
                        )


def _stands_in_a_dict(p: Tensor) -> bool:
    """Whether a dict has it as a value, as a module has its parameters."""
    dicts = (found for found in gc.get_referrers(p) if type(found) is dict)
    return any(value is p for found in dicts for value in found.values())


def _taken_by_fsdp1() -> Iterator[tuple[torch.Size, str]]:
    """Shape and name, in the module that was wrapped, of what went into flat buffers that have a
    gradient."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gc.collect()  # a model that is used no more may live on in a cycle
    for found in gc.get_objects():
        if not issubclass(type(found), Tensor) or not getattr(found, "_is_flat_param", False):
            continue
        if found.grad is not None:
            yield from zip(found._shapes, found._fqns, strict=True)


def _has_matrices(group: Mapping[str, Any]) -> bool:
    return group["rank"] is not None and any(p.dim() >= 2 for p in group["params"])
