"""int8 weights that are cut along their rows: what fully_shard and DTensor ask of a tensor.

Groups lie within rows. So some rows of an int8 weight are one too, and it may be cut between any
two of them, evenly or not. What travels between ranks is a byte per weight and 4 per group.

quantized.py has the class; functions here are handed a weight of it and make others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from apollo_kernels import distributed

_aten = torch.ops.aten


class Flat(Tensor):
    """The numbers of an int8 weight in one row, made anew for each operation that reads them.

    fully_shard keeps one of each shard and reads none, so none of them takes memory.
    """

    @staticmethod
    def __new__(cls, weight: Any) -> Flat:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, (weight.numel(),), dtype=weight.dtype, device=weight.device, requires_grad=False
        )

    def __init__(self, weight: Any):
        self.weight = weight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would write into a view of an int8 weight")
        args, kwargs = tree_map_only(
            cls, lambda flat: flat.weight.dequantize().view(-1), (args, kwargs or {})
        )
        return func(*args, **kwargs)


# ---- operations ----------------------------------------------------------------------------------


def each(w: Any, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Any:
    """The weight whose codes and grids are ``function`` of this one's, with its padding."""
    codes, grid = w.padded or (w.codes, w.grid)
    found = type(w)(function(codes), function(grid), dtype or w.dtype)
    return found if w.padded is None else rows(found, 0, len(w))


def rows(w: Any, start: int, end: int) -> Any:
    """Rows [start, end) of a weight, in its memory. If they are the first ones, they remember all:
    fully_shard pads shards with rows at their end, so that all ranks send as many."""
    found = type(w)(w.codes[start:end], w.grid[start:end], w.dtype)
    if start == 0 and len(found) < len(w):
        found.padded = w.codes, w.grid
    return found


def _new_zeros(
    w: Any, size: Sequence[int], *, dtype: torch.dtype | None = None, **where: Any
) -> Tensor:
    """An int8 weight if it is to have this one's columns and dtype, and else a plain tensor."""
    where = {"device": w.device, **{k: v for k, v in where.items() if v is not None}}
    if len(size) != 2 or size[1] != w.shape[1] or dtype not in (None, w.dtype):
        return torch.zeros(size, dtype=dtype or w.dtype, **where)
    codes = torch.zeros(size, dtype=torch.uint8, **where)
    grid = torch.zeros((size[0], w.grid.shape[1]), dtype=torch.int32, **where)
    return type(w)(codes, grid, w.dtype)


def _slice(
    w: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    if dim not in (0, -2) or step != 1:
        return _aten.slice.Tensor(w.dequantize(), dim, start, end, step)
    first, last, _ = slice(start, end).indices(len(w))
    return rows(w, first, max(first, last))


def _split(w: Any, size: int, dim: int = 0) -> Sequence[Tensor]:
    if dim not in (0, -2):
        return _aten.split.Tensor(w.dequantize(), size, dim)
    cut = [rows(w, i, min(i + size, len(w))) for i in range(0, max(len(w), 1), max(size, 1))]
    for some in cut:
        some.piece = True
    return cut


def _empty_like(w: Any, **options: Any) -> Tensor:
    """A plain tensor. But distribute_tensor asks for one beside the first of its pieces, and then
    sends pieces as memory that they do not have; here all ranks can still say so."""
    if w.piece:
        raise NotImplementedError(
            f"a piece of an int8 weight, {tuple(w.shape)}, cannot be scattered: int8 weights go "
            "with fully_shard, and not with tensor parallelism"
        )
    return _aten.empty_like.default(w.dequantize(), **options)


def _view(w: Any, size: Sequence[int]) -> Tensor:
    if tuple(size) == tuple(w.shape):
        return each(w, lambda t: t)
    if len(size) == 1 and size[0] in (-1, w.numel()):
        return Flat(w)
    return w.dequantize().view(size)


def _as_strided(
    w: Any, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    """Of the first rows; fully_shard leaves its padding out with it."""
    some = len(size) == 2 and size[1] == w.shape[1] and size[0] <= len(w) and not offset
    if some and tuple(stride) == w.stride():
        return rows(w, 0, size[0])
    return w.dequantize().as_strided(size, stride, offset)


OPERATIONS: dict[Any, Callable[..., Any]] = {
    _aten.new_zeros.default: _new_zeros,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.empty_like.default: _empty_like,
    _aten.view.default: _view,
    _aten.as_strided.default: _as_strided,
    _aten._pin_memory.default: lambda w, device=None: each(w, Tensor.pin_memory),
    _aten.is_pinned.default: lambda w, device=None: w.codes.is_pinned(),
}


# ---- DTensors ------------------------------------------------------------------------------------


def check(p: Any, name: Callable[[], str]) -> None:
    """Raises NotImplementedError for a DTensor of int8 weights that is not cut by rows, once."""
    kinds = [type(placement).__name__ for placement in p.placements]
    cuts = [placement.dim % 2 for placement in p.placements if hasattr(placement, "dim")]
    if set(kinds) - {"Shard", "Replicate"} or cuts not in ([], [0]):
        raise NotImplementedError(
            f"{name()}, of shape {tuple(p.shape)}, is int8 and placed as {p.placements!r}: int8 "
            "weights are cut along their rows, Shard(dim=0), by one dimension of a mesh"
        )


def _place(p: Any) -> tuple[Any, tuple[Any, ...]]:
    return p.device_mesh, tuple(p.placements)


def parts(p: Any) -> tuple[Tensor, Tensor]:
    """Codes and grids of a weight, of a sharded one as DTensors."""
    own: Any = distributed.local(p)
    if own is p:
        return p.codes, p.grid
    shapes = (tuple(p.shape), (p.shape[0], own.grid.shape[1]))
    codes, grid = (
        distributed.wrap(t, shape, _place(p))
        for t, shape in zip((own.codes, own.grid), shapes, strict=True)
    )
    return codes, grid


def local_part(value: Tensor, p: Any, what: str) -> Tensor:
    """This rank's rows of a loaded tensor that has a row for each of ``p``: a whole one, or one
    that is placed as ``p`` is.

    Raises
        ValueError: for a DTensor that is placed in another way, or where ``p`` is none.
    """
    if distributed.local(p) is p:
        if distributed.is_sharded(value):
            raise ValueError(f"{what} is a DTensor in the state_dict, and a plain tensor here")
        return value
    return distributed.unwrap(value, tuple(value.shape), _place(p), what)


def like(value: Tensor, p: Any) -> Tensor:
    """An int8 weight of this rank's rows as ``p`` is: a DTensor if that is one."""
    if distributed.local(p) is p:
        return value
    return distributed.wrap(value, tuple(p.shape), _place(p))
