"""The plan of a step: what its launches rest on, for as long as that is true.

A back end walks addresses, so a plan *owns* the weights and the state that it was built for and is
asked before each step whether they are still the same: by identity, address, shape, strides and
dtype. Gradients it never keeps; one that has only moved costs a new table. All that is no kernel's
business is handled here, once: float64, strides that no kernel walks, grouping, graph capture.

    GroupPlan   one parameter group: its parameters, its state, and whether they are unchanged
    Work        the items of it that one Batch steps together, with the copies around them
    run         the three verbs over all groups of an optimizer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import reference
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals
from apollo_kernels.philox import parameter_key
from apollo_kernels.native import tensor_facts
from apollo_kernels.state import Layout, layout_of

_address, _grad = torch.Tensor.data_ptr, attrgetter("grad")


# ---- one Batch, and the copies around it ---------------------------------------------------------


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


# What a CUDA graph reads must outlive it, and no one tells when it goes.
_captured: list[Any] = []


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

    def begin(self, gradients: Sequence[Tensor]) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured.append(self)
        for stand_in in self.loaded:
            stand_in.load(gradients)
        if not self.by_address:
            self.batch.lend([place.gradient(gradients) for place in self.places])

    def end(self) -> None:
        for stand_in in self.stored:
            stand_in.store()
        self.release()

    def release(self) -> None:
        if not self.by_address:
            self.batch.lend(None)

    def moved(self, addresses: Sequence[int]) -> bool:
        """Tells the batch where the gradients are now; False if it has to be built anew."""
        if not self.by_address:
            return True
        found = [place.address(addresses) for place in self.places]
        return self.batch.set_gradients(found) is not False


# ---- a parameter group ---------------------------------------------------------------------------


@dataclass
class GroupPlan:
    """The launches of one parameter group and what they rest on."""

    params: list[Tensor]  # all of the group's
    live: list[bool]  # which of them have a gradient
    options: tuple[Any, ...]  # what else decides the launches
    states: list[dict[str, Any]]  # of the live ones
    works: list[Work]
    gradient_facts: tuple[Any, Any]  # tensor_facts of the live gradients: addresses, and the rest

    def __post_init__(self) -> None:
        self.owned = [p for p, live in zip(self.params, self.live, strict=True) if live]
        self.values = _values(self.states)
        self.tensors = [v for v in self.values if isinstance(v, Tensor)]
        self.owned_facts = tensor_facts([*self.owned, *self.tensors])

    def gradients(
        self, params: Sequence[Tensor], options: tuple[Any, ...], state: Mapping[Tensor, Any]
    ) -> list[Tensor] | None:
        """The gradients to step with; None if anything but their addresses is not as it was."""
        if options != self.options or len(params) != len(self.params):
            return None
        if not all(map(is_, params, self.params)):
            return None
        gradients = list(map(_grad, params))
        if [g is not None for g in gradients] != self.live:
            return None
        if not all(self.live):
            gradients = [g for g in gradients if g is not None]
        if not all(map(is_, map(state.get, self.owned), self.states)):
            return None
        values = _values(self.states)
        if len(values) != len(self.values) or not all(map(is_, values, self.values)):
            return None
        return gradients if self._unchanged(self.owned, gradients, self.tensors) else None

    def holds(
        self,
        options: tuple[Any, ...],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
    ) -> bool:
        """The same for tensors that may be other objects over the same memory (an operator's)."""
        values = _values(states)
        if options != self.options or len(values) != len(self.values):
            return False
        if not all(isinstance(v, Tensor) or v == w for v, w in zip(values, self.values, strict=True)):
            return False
        return self._unchanged(weights, gradients, [v for v in values if isinstance(v, Tensor)])

    def _unchanged(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], tensors: Sequence[Tensor]
    ) -> bool:
        try:
            if tensor_facts([*weights, *tensors]) != self.owned_facts:
                return False
            addresses, rest = tensor_facts(gradients)
        except RuntimeError:  # a sparse gradient has neither strides nor an address
            return False
        if rest != self.gradient_facts[1]:
            return False
        if addresses != self.gradient_facts[0]:
            return self._follow(gradients, addresses)
        return True

    def _follow(self, gradients: Sequence[Tensor], addresses: Any) -> bool:
        """Whether every Work can follow gradients that have only moved."""
        if any(type(g) is not Tensor for g in gradients):
            return False  # a subclass is looked at again, by the checks before a build
        # Until all have followed, none may believe that nothing has moved.
        self.gradient_facts = None, self.gradient_facts[1]
        found = list(map(_address, gradients))
        if not all(work.moved(found) for work in self.works):
            return False
        self.gradient_facts = addresses, self.gradient_facts[1]
        return True


def _values(states: Sequence[Mapping[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, states)))


def build(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: list[dict[str, Any]],
    group: Mapping[str, Any],
    options: tuple[Any, ...],
    backends: Mapping[torch.device, ModuleType],
    separate: bool,
) -> GroupPlan:
    """The plan of a group whose parameters, gradients and states have been checked.

    Args
        gradients: of ``params``, None where there is none.
        states: of the parameters that have a gradient, in order.
        options: what ``backends``, ``group`` and ``separate`` were made from; compared later.
        backends: the back end's module of each device.
        separate: whether something comes between ``project`` and ``scale`` (see Batch).
    """
    live = [g is not None for g in gradients]
    owned = [p for p, g in zip(params, gradients, strict=True) if g is not None]
    present = [g for g in gradients if g is not None]
    works: list[Work] = []
    for device in dict.fromkeys(p.device for p in owned):
        builder = _Builder(backends[device], device, separate)
        for index, (p, grad, state) in enumerate(zip(owned, present, states, strict=True)):
            if p.device == device:
                builder.add(index, p, grad, state, layout_of(p, group))
        works += builder.works()
    return GroupPlan(list(params), live, options, states, works, tensor_facts(present))


# ---- from parameters to batches ------------------------------------------------------------------


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


class _Builder:
    """Sorts items by what takes them and by family, and makes the copies that they need."""

    def __init__(self, backend: ModuleType, device: torch.device, separate: bool):
        self.backend, self.device, self.separate = backend, device, separate
        self.families: dict[tuple[Any, ...], list[_Entry]] = {}

    def add(
        self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any], layout: Layout | None
    ) -> None:
        if layout is None:
            self._add_dense(index, p, grad, state)
        else:
            self._add_low_rank(index, p, grad, state, layout)

    def _join(
        self, taker: ModuleType, item: Any, place: Place, loaded: list[StandIn],
        stored: list[StandIn],
    ) -> None:  # fmt: skip
        kind = type(item), taker, taker.family(item)
        self.families.setdefault(kind, []).append(_Entry(item, place, loaded, stored))

    def _taker(self, item: LowRank | Dense) -> ModuleType:
        return self.backend if self.backend.takes(item) else reference

    def _add_low_rank(
        self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any], layout: Layout
    ) -> None:
        shape = (layout.matrices, *layout.moments[-2:])
        stand_ins: list[StandIn] = []
        weights, grads = _matrices(p, layout), _matrices(grad, layout)
        moments = [state[key].reshape(shape) for key in ("exp_avg", "exp_avg_sq")]
        norms, key = state["update_norm"].reshape(-1), state["seed"]

        def item(i: int) -> LowRank:
            return LowRank(
                weights[i], grads[i], moments[0][i], moments[1][i], norms[i], state["step"],
                parameter_key(key, i) if layout.batch else key, layout.rows, leads=i == 0,
            )  # fmt: skip

        if layout.matrices == 0:
            return
        taker = self._taker(item(0))
        if weights.data_ptr() != p.data_ptr() or (taker.BY_ADDRESS and not any(_walks(weights[0]))):
            copy = torch.empty(weights.shape, dtype=p.dtype, device=p.device)
            stand_ins.append(StandIn(copy, p))
            weights = copy
        if taker.BY_ADDRESS and (other := self._other_gradient(taker, grad, grads, weights)):
            stand_ins.append(StandIn(other[0], index))
            grads = other[0]
        for j, name in enumerate(("exp_avg", "exp_avg_sq")):
            own = moments[j].data_ptr() == state[name].data_ptr() and moments[j].is_contiguous()
            if not own:
                moments[j] = torch.empty(shape, dtype=moments[j].dtype, device=p.device)
                stand_ins.append(StandIn(moments[j], state[name]))
        if norms.data_ptr() != state["update_norm"].data_ptr():
            norms = torch.empty(norms.shape, dtype=norms.dtype, device=p.device)
            stand_ins.append(StandIn(norms, state["update_norm"]))
        apart, copied = grads.stride(0) * grads.element_size(), None
        for i in range(layout.matrices):
            if any(s.original == index for s in stand_ins if isinstance(s.original, int)):
                copied = grads[i].data_ptr()
            place = Place(index, layout, i, i * apart, copied)
            # The matrices may be stepped one after the other: all are stored after the last one.
            first, last = i == 0, i == layout.matrices - 1
            self._join(
                taker, item(i), place, stand_ins if first else [], stand_ins if last else []
            )

    def _other_gradient(
        self, taker: ModuleType, grad: Tensor, grads: Tensor, weights: Tensor
    ) -> tuple[Tensor] | None:
        """A stand-in for a gradient that a kernel cannot walk, or not beside its weight."""
        rows, columns = _walks(weights[0])
        by_row, by_column = _walks(grads[0])
        alike = (rows and by_row) or (columns and by_column)
        ok = alike if taker.SAME_ORDER else by_row or by_column
        if ok and grads.data_ptr() == grad.data_ptr():
            return None
        b, m, n = grads.shape
        if rows:
            return (torch.empty((b, m, n), dtype=grad.dtype, device=grad.device),)
        return (torch.empty((b, n, m), dtype=grad.dtype, device=grad.device).transpose(1, 2),)

    def _add_dense(self, index: int, p: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        tensors = {"weight": p.detach(), "grad": grad}
        tensors.update(exp_avg=state["exp_avg"], exp_avg_sq=state["exp_avg_sq"])
        taker = self._taker(Dense(**tensors, step=state["step"]))
        stand_ins: list[StandIn] = []
        if taker.BY_ADDRESS:
            like = p if _fills_memory(p) else torch.empty(p.shape, dtype=p.dtype, device=p.device)
            for name, t in tensors.items():
                if not _lies_like(t, like):
                    copy = torch.empty_strided(
                        like.shape, like.stride(), dtype=t.dtype, device=t.device
                    )
                    original = index if name == "grad" else t
                    stand_ins.append(StandIn(copy, original))
                    tensors[name] = copy
        copied = None if tensors["grad"] is grad else tensors["grad"].data_ptr()
        item = Dense(**tensors, step=state["step"])
        self._join(taker, item, Place(index, copied=copied), stand_ins, stand_ins)

    def works(self) -> list[Work]:
        made = []
        for (cls, taker, _), entries in self.families.items():
            items, low_rank = [e.item for e in entries], cls is LowRank
            batch = (
                taker.build(items, separate=self.separate) if low_rank else taker.build_dense(items)
            )
            loaded = [s for e in entries for s in e.loaded]
            stored = [s for e in entries for s in e.stored]
            places = [e.place for e in entries]
            by_address = taker.BY_ADDRESS
            made.append(Work(batch, low_rank, self.device, by_address, places, loaded, stored))
        return made


# ---- a whole step --------------------------------------------------------------------------------

Part = tuple[GroupPlan, list[Tensor], Hyper]  # of one group, with its gradients


def run(
    parts: Sequence[Part],
    signals: Callable[[torch.device], Signals],
    max_grad_norm: float | None = None,
) -> Tensor | None:
    """The step of every group; all checks lie behind.

    Returns
        the norm of all gradients, float32 [], if ``max_grad_norm`` asks for it.
    """
    if max_grad_norm is None:
        for plan, gradients, hyper in parts:
            for work in plan.works:
                _step(work, gradients, hyper, signals(work.device))
        return None
    return _clipped(parts, signals, max_grad_norm)


def _step(work: Work, gradients: Sequence[Tensor], hyper: Hyper, signals: Signals) -> None:
    work.begin(gradients)
    try:
        if work.low_rank:
            work.batch.project(hyper, signals)
        _finish(work, hyper, signals)
    finally:
        work.release()


def _finish(work: Work, hyper: Hyper, signals: Signals) -> None:
    """What follows once R and q are there; for a dense parameter all of it."""
    if work.low_rank:
        work.batch.scale(hyper, signals)
        work.batch.apply(hyper, signals)
    else:
        work.batch.adamw(hyper, signals)
    work.end()


def _clipped(
    parts: Sequence[Part], signals: Callable[[torch.device], Signals], max_grad_norm: float
) -> Tensor:
    """All projections first, since their q give the norm without another read of a gradient."""
    works = [(work, gradients, hyper) for plan, gradients, hyper in parts for work in plan.works]
    squares: dict[torch.device, list[Tensor]] = {}
    dense: dict[torch.device, list[Tensor]] = {}
    try:
        for work, gradients, hyper in works:
            work.begin(gradients)
            if work.low_rank:
                work.batch.project(hyper, signals(work.device))
                squares.setdefault(work.device, []).append(work.batch.square_norm())
            else:
                read = [place.gradient(gradients) for place in work.places]
                dense.setdefault(work.device, []).extend(read)
        for device, read in dense.items():
            squares.setdefault(device, []).append(square_norm(read))
        norm = total_norm(squares, signals)
        clip = clip_factor(norm, max_grad_norm)
        for work, _, hyper in works:
            own = replace(signals(work.device), clip=clip.to(work.device))
            _finish(work, hyper, own)
    finally:
        for work, _, _ in works:
            work.release()
    return norm


def square_norm(gradients: list[Tensor]) -> Tensor:
    """float64 []: one read of every gradient, with float32 sums as clip_grad_norm_ has them."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(g)
    norms: list[Tensor] = []
    for dtype, group in by_dtype.items():
        wide = torch.promote_types(dtype, torch.float32)
        norms += (n.double() for n in torch._foreach_norm(group, 2, dtype=wide))
    return torch.stack(norms).square().sum()


def total_norm(
    squares: Mapping[torch.device, list[Tensor]], signals: Callable[[torch.device], Signals]
) -> Tensor:
    """float32 []: the norm of all gradients, without GradScaler's factor."""
    first = next(iter(squares), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=first)
    for device, several in squares.items():
        total = total + torch.stack(several).sum().to(first)
    norm = total.sqrt()
    own = signals(first)
    if own.grad_scale is not None:
        norm = norm / own.grad_scale
    if own.found_inf is not None:  # nothing was projected then
        norm = torch.where(own.found_inf != 0, torch.inf, norm)
    return norm.float()


def clip_factor(norm: Tensor, max_grad_norm: float) -> Tensor:
    """c = min(1, max_grad_norm / (norm + 1e-6)); NaN for a norm that is not finite.

    Multiplied into every gradient, NaN leaves it to the rules of non-finite gradients to keep every
    weight and every moment as they are.
    """
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), factor, torch.nan)
