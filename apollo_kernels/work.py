"""From parameters to batches: what one Batch steps together, and the copies around it.

What is no kernel's business is handled here, once: dtypes that only PyTorch takes, strides that no
kernel walks, the matrices of an expert weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import fake, reference
from apollo_kernels.batch import Dense, LowRank
from apollo_kernels.distributed import BUCKET, Spread, View
from apollo_kernels.native import address
from apollo_kernels.philox import parameter_key
from apollo_kernels.quantized import stored
from apollo_kernels.state import Layout


@dataclass(frozen=True)
class Place:
    """Which matrix of which gradient an item reads: ``offset`` bytes after the gradient's start.

    ``copied``: the address of the stand-in that is read instead, which does not move.
    """

    index: int
    layout: Layout | None = None
    matrix: int = 0
    offset: int = 0
    copied: int | None = None

    def address(self, addresses: Sequence[int]) -> int:
        return addresses[self.index] + self.offset if self.copied is None else self.copied

    def gradient(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradient as the item sees it: [m, n], or as it is for a dense parameter."""
        grad = gradients[self.index]
        if self.layout is None or (not self.layout.batch and grad.dim() == 2):
            return grad
        return _matrices(grad, self.layout)[self.matrix]


@dataclass(frozen=True)
class StandIn:
    """A copy in an order that a kernel can walk: made before a step, written back after it."""

    copy: Tensor
    original: Tensor | int  # a weight or a state tensor; or which gradient, only read

    def load(self, gradients: Sequence[Tensor]) -> None:
        source = gradients[self.original] if isinstance(self.original, int) else self.original
        self.copy.copy_(source.reshape(self.copy.shape))

    def store(self) -> None:
        if isinstance(self.original, Tensor):
            self.original.copy_(self.copy.view(self.original.shape))


@dataclass
class Work:
    """Items of one device that one Batch steps together."""

    batch: Any
    low_rank: bool
    device: torch.device
    by_address: bool  # else the batch is lent its gradients
    places: list[Place]
    loaded: list[StandIn]  # before the step
    stored: list[StandIn]  # after it
    spread: Spread  # of all items
    sums: int  # bytes of R and q that other ranks are sent, at most: the same on all of them

    @property
    def crosses(self) -> bool:
        """Whether something crosses ranks between the verbs: the batch is a PartBatch then."""
        return self.spread.crosses and self.low_rank and hasattr(self.batch, "limit")

    def begin(self, gradients: Sequence[Tensor]) -> None:
        for stand_in in self.loaded:
            stand_in.load(gradients)
        if not self.by_address:
            self.batch.lend([place.gradient(gradients) for place in self.places])

    def end(self) -> None:
        for stand_in in self.stored:
            stand_in.store()

    def release(self) -> None:
        if not self.by_address:
            self.batch.lend(None)

    def moved(self, addresses: Sequence[int]) -> bool:
        """Tells the batch where the gradients are now; False if it has to be built anew."""
        if not self.by_address:
            return True
        found = [place.address(addresses) for place in self.places]
        return self.batch.set_gradients(found)


def _matrices(t: Tensor, layout: Layout) -> Tensor:
    """[matrices, m, n]: a view wherever the strides allow."""
    return t.reshape(layout.matrices, layout.m, layout.n)


def _walks(x: Tensor) -> tuple[bool, bool]:
    """Whether a matrix [m, n] can be walked along its rows, and along its columns."""
    m, n = x.shape
    return n == 1 or x.stride(1) == 1, m == 1 or x.stride(0) == 1


def _fills_memory(t: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of dimensions."""
    sides = sorted((s, n) for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)
    span = 1
    for stride, size in sides:
        if stride != span:
            return False
        span *= size
    return True


def _lies_like(t: Tensor, like: Tensor) -> bool:
    """Whether two tensors of one shape have the same order in memory; sides of size 1 have none."""
    pairs = zip(t.shape, t.stride(), like.stride(), strict=True)
    return all(a == b for n, a, b in pairs if n > 1)


@dataclass(frozen=True)
class _Entry:
    """An item on its way into a Work."""

    item: LowRank | Dense
    place: Place
    loaded: list[StandIn]
    stored: list[StandIn]
    sums: int = 0  # bytes of R and q that go to other ranks


class Builder:
    """Sorts items by what takes them and by family, and makes the copies that they need."""

    def __init__(self, backend: ModuleType, device: torch.device, separate: bool):
        self.backend, self.device, self.separate = backend, device, separate
        self.families: dict[tuple[Any, ...], list[_Entry]] = {}

    def add(self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any], view: View) -> None:
        """All tensors are this rank's own: of a DTensor the local part."""
        if view.layout is None:
            self._add_dense(index, p, grad, state, view)
        else:
            self._add_low_rank(index, p, grad, state, view)

    def _join(
        self, taker: ModuleType, item: Any, place: Place, loaded: list[StandIn],
        stored: list[StandIn], view: View,
    ) -> None:  # fmt: skip
        kind = type(item), taker, taker.family(item), view.spread
        sums = view.sums * item.exp_avg.element_size()
        self.families.setdefault(kind, []).append(_Entry(item, place, loaded, stored, sums))

    def _taker(self, item: LowRank | Dense) -> ModuleType:
        """reference.py also steps subclasses that wrap tensors, and so have no address; fake.py
        steps those that have no numbers. Ranks that share a matrix must all choose alike."""
        if fake.takes(item):
            return fake
        tensors = item.weight, item.grad, item.exp_avg, item.exp_avg_sq
        placed = all(address(t) or not t.numel() for t in tensors)
        return self.backend if placed and self.backend.takes(item) else reference

    def _add_low_rank(
        self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any], view: View
    ) -> None:
        layout = view.layout
        shape = (layout.matrices, *state["exp_avg"].shape[-2:])
        stand_ins: list[StandIn] = []
        own, *grid = (t.detach() for t in stored(p))
        weights, grads = _matrices(own, layout), _matrices(grad, layout)
        moments = [state[key].reshape(shape) for key in ("exp_avg", "exp_avg_sq")]
        norms, key = state["update_norm"].reshape(-1), state["seed"]

        def item(i: int) -> LowRank:
            return LowRank(
                weights[i], grads[i], moments[0][i], moments[1][i], norms[i], state["step"],
                parameter_key(key, view.matrix + i) if layout.batch else key, layout.rows, i == 0,
                grid[0] if grid else None, view.part,
            )  # fmt: skip

        if layout.matrices == 0:  # no matrix could count the step
            nothing = torch.zeros_like(p, dtype=state["exp_avg"].dtype)
            empty = {**state, "exp_avg": nothing, "exp_avg_sq": nothing}
            self._add_dense(index, p, grad, empty, view)
            return
        taker = self._taker(item(0))
        walks = not taker.BY_ADDRESS or any(_walks(weights[0]))
        if address(weights) != address(own) or not walks:
            copy = torch.empty(weights.shape, dtype=own.dtype, device=p.device)
            stand_ins.append(StandIn(copy, own))
            weights = copy
        other = self._other_gradient(taker, grad, grads, weights) if taker.BY_ADDRESS else None
        if other is not None:
            stand_ins.append(StandIn(other, index))
            grads = other
        for j, name in enumerate(("exp_avg", "exp_avg_sq")):
            same = address(moments[j]) == address(state[name])
            if not (same and moments[j].is_contiguous()):
                moments[j] = torch.empty(shape, dtype=moments[j].dtype, device=p.device)
                stand_ins.append(StandIn(moments[j], state[name]))
        if address(norms) != address(state["update_norm"]):
            norms = torch.empty(norms.shape, dtype=norms.dtype, device=p.device)
            stand_ins.append(StandIn(norms, state["update_norm"]))
        apart = grads.stride(0) * grads.element_size()
        for i in range(layout.matrices):
            copied = None if other is None else address(other[i])
            place = Place(index, layout, i, i * apart, copied)
            # The matrices may be stepped one after the other: all are stored after the last one.
            first, last = i == 0, i == layout.matrices - 1
            copies = stand_ins if first else [], stand_ins if last else []
            self._join(taker, item(i), place, *copies, view)

    def _other_gradient(
        self, taker: ModuleType, grad: Tensor, grads: Tensor, weights: Tensor
    ) -> Tensor | None:
        """A stand-in for a gradient that a kernel cannot walk, or not beside its weight."""
        rows, columns = _walks(weights[0])
        by_row, by_column = _walks(grads[0])
        alike = (rows and by_row) or (columns and by_column)
        ok = alike if taker.SAME_ORDER else by_row or by_column
        if ok and address(grads) == address(grad):
            return None
        b, m, n = grads.shape
        if rows:
            return torch.empty((b, m, n), dtype=grad.dtype, device=grad.device)
        return torch.empty((b, n, m), dtype=grad.dtype, device=grad.device).transpose(1, 2)

    def _add_dense(
        self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any], view: View
    ) -> None:
        own, *grid = (t.detach() for t in stored(p))
        rest: dict[str, Any] = {"step": state["step"], "first": view.element}
        if grid:
            rest.update(grid=grid[0], key=state["seed"])
        if state["exp_avg"].dtype in (torch.bfloat16, torch.uint8):
            rest.update(key=state["seed"])
        if state["exp_avg"].dtype == torch.uint8:
            rest.update(units=(state["exp_avg_unit"], state["exp_avg_sq_unit"]))
        tensors: dict[str, Any] = {"weight": own, "grad": grad}
        tensors.update(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"])
        taker = self._taker(Dense(**tensors, **rest))
        stand_ins: list[StandIn] = []
        if taker.BY_ADDRESS:
            like = own if _fills_memory(own) else torch.empty_like(own).contiguous()
            for name, t in tensors.items():
                if not _lies_like(t, like):
                    copy = torch.empty_strided(
                        like.shape, like.stride(), dtype=t.dtype, device=t.device
                    )
                    original = index if name == "grad" else t
                    stand_ins.append(StandIn(copy, original))
                    tensors[name] = copy
        copied = None if tensors["grad"] is grad else address(tensors["grad"])
        item = Dense(**tensors, **rest)
        self._join(taker, item, Place(index, copied=copied), stand_ins, stand_ins, view)

    def works(self) -> list[Work]:
        return [
            self._work(entries, taker, cls is LowRank, spread)
            for (cls, taker, _, spread), family in self.families.items()
            for entries in _buckets(family)
        ]

    def _work(
        self, entries: list[_Entry], taker: ModuleType, low_rank: bool, spread: Spread
    ) -> Work:
        items = [e.item for e in entries]
        batch = taker.build(items, separate=self.separate) if low_rank else taker.build_dense(items)
        loaded = [s for e in entries for s in e.loaded]
        stored = [s for e in entries for s in e.stored]
        places, sums = [e.place for e in entries], sum(e.sums for e in entries)
        by_address = taker.BY_ADDRESS
        return Work(batch, low_rank, self.device, by_address, places, loaded, stored, spread, sums)


def _buckets(entries: list[_Entry]) -> list[list[_Entry]]:
    """Entries in a row whose sums for other ranks stay below BUCKET together."""
    buckets: list[list[_Entry]] = []
    held = 0
    for entry in entries:
        held += entry.sums
        if not buckets or held > BUCKET:
            buckets.append([])
            held = entry.sums
        buckets[-1].append(entry)
    return buckets
