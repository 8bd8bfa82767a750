"""The plan of a step: what its launches rest on, for as long as that is true.

A back end walks addresses, so a plan *owns* the weights and the state that it was built for and is
asked before each step whether they are still the same: by identity, address, shape, strides and
dtype. Gradients it never keeps; one that has only moved costs a new table, and no new maps.

    Unit        what has a plan: a whole group, or with gradient release one parameter of it
    GroupPlan   a unit's parameters, their state, and whether they are unchanged
    run         the three verbs over all units of a step
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import clipping, distributed
from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.distributed import is_sharded, local
from apollo_kernels.native import same_entries, tensor_facts
from apollo_kernels.quantized import Int8Weight, stored
from apollo_kernels.state import layout_of
from apollo_kernels.work import Builder, Work

_address, _grad = torch.Tensor.data_ptr, attrgetter("grad")
_captured: list[GroupPlan] = []  # for good, since no one tells when a graph goes


@dataclass
class Unit:
    """What is stepped together: a whole parameter group, or one parameter of it."""

    index: int  # of the group
    first: int  # the place of ``params[0]`` in the group
    params: list[Tensor]
    plan: GroupPlan | None = None

    def gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.params if p.grad is not None]


@dataclass
class GroupPlan:
    """The launches of one unit and what they rest on."""

    params: list[Tensor]  # all of the unit's
    live: list[bool]  # which of them have a gradient
    key: tuple[Any, ...]  # what else decides the launches
    states: list[dict[str, Any]]  # of the live ones
    works: list[Work]
    gradient_facts: tuple[Any, Any]  # tensor_facts of the live gradients: addresses, and the rest

    def __post_init__(self) -> None:
        self.owned = [p for p, live in zip(self.params, self.live, strict=True) if live]
        self.entries = _entries(self.states)
        self.tensors = [v for v in self.entries if isinstance(v, Tensor)]
        self.sharded = any(map(is_sharded, self.owned))
        self.wrapping = self.sharded or any(isinstance(p, Int8Weight) for p in self.owned)
        self.watched = self._watched()
        self.watched_facts = tensor_facts(self.watched)

    def _watched(self) -> list[Tensor]:
        """The tensors in memory: of an int8 weight and a DTensor those that they hold now."""
        parts = (part for p in self.owned for part in stored(local(p)))
        return [*parts, *(map(local, self.tensors) if self.sharded else self.tensors)]

    def gradients(
        self, params: Sequence[Tensor], key: tuple[Any, ...], state: Mapping[Tensor, Any] | None
    ) -> list[Tensor] | None:
        """The gradients to step with; None if anything but their addresses is not as it was.

        Args
            state: the optimizer's, or None if it is known to hold the same dicts as before.
        """
        if key != self.key or len(params) != len(self.params):
            return None
        if not all(map(is_, params, self.params)):
            return None
        gradients = list(map(_grad, params))
        if [g is not None for g in gradients] != self.live:
            return None
        if not all(self.live):
            gradients = [g for g in gradients if g is not None]
        if self.sharded:
            if not all(map(is_sharded, self.owned)):
                return None  # checks look at what else is sharded
            gradients = list(map(local, gradients))
        if state is not None and not all(map(is_, map(state.get, self.owned), self.states)):
            return None
        if not same_entries(self.states, self.entries):
            return None
        if self.wrapping and not all(map(is_, self._watched(), self.watched)):
            return None
        return gradients if self._unchanged(self.watched, gradients) else None

    def holds(
        self,
        key: tuple[Any, ...],
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
    ) -> bool:
        """The same for tensors that may be other objects over the same memory (an operator's)."""
        entries = _entries(states)
        if key != self.key or len(entries) != len(self.entries):
            return False
        pairs = zip(entries, self.entries, strict=True)
        if not all(isinstance(v, Tensor) or v == w for v, w in pairs):
            return False
        tensors = (v for v in entries if isinstance(v, Tensor))
        return self._unchanged([*weights, *tensors], gradients)

    def keep_if_captured(self) -> None:
        """A CUDA graph reads tables and writes weights and state long after the step."""
        devices = {work.device for work in self.works if work.device.type == "cuda"}
        if devices and torch.cuda.is_current_stream_capturing():
            _captured.append(self)

    def _unchanged(self, watched: list[Tensor], gradients: Sequence[Tensor]) -> bool:
        try:
            if tensor_facts(watched) != self.watched_facts:
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
        if any(type(g) is not Tensor or g.is_neg() for g in gradients):
            return False  # the checks before a build look at them
        # Until all have followed, none may believe that nothing has moved.
        self.gradient_facts = None, self.gradient_facts[1]
        found = list(map(_address, gradients))
        if any(not address and g.numel() for address, g in zip(found, gradients, strict=True)):
            return False  # a storage that was resized to nothing
        if not all(work.moved(found) for work in self.works):
            return False
        self.gradient_facts = addresses, self.gradient_facts[1]
        return True


def _entries(states: Sequence[dict[str, Any]]) -> list[Any]:
    """Keys and values of all states, one after the other."""
    return list(chain.from_iterable(chain.from_iterable(map(dict.items, states))))


def build(
    params: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    states: list[dict[str, Any]],
    group: Mapping[str, Any],
    key: tuple[Any, ...],
    backends: Mapping[torch.device, ModuleType],
    separate: bool,
) -> GroupPlan:
    """The plan of a unit whose parameters, gradients and states have been checked.

    Args
        gradients: of ``params``, None where there is none.
        states: of the parameters that have a gradient, in order.
        key: what ``backends``, ``group`` and ``separate`` were made from; compared later.
        backends: the back end's module of each device.
        separate: whether something comes between ``project`` and ``scale`` (see Batch).
    """
    live = [g is not None for g in gradients]
    owned = [p for p, g in zip(params, gradients, strict=True) if g is not None]
    present = [local(g) for g in gradients if g is not None]
    works: list[Work] = []
    for device in dict.fromkeys(p.device for p in owned):
        builder = Builder(backends[device], device, separate)
        for index, (p, grad, state) in enumerate(zip(owned, present, states, strict=True)):
            if p.device == device:
                view = distributed.view_of(p, layout_of(p, group))
                builder.add(index, local(p), grad, _local(state), view)
        works += builder.works()
    return GroupPlan(list(params), live, key, states, works, tensor_facts(present))


def _local(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as this rank holds it."""
    return {key: local(v) if isinstance(v, Tensor) else v for key, v in state.items()}


Part = tuple[GroupPlan, list[Tensor], Hyper]  # of one unit, with its gradients


def run(
    parts: Sequence[Part],
    signals: Callable[[torch.device], Signals],
    max_grad_norm: float | None = None,
) -> Tensor | None:
    """The step of every unit; all checks lie behind.

    Returns
        the norm of all gradients, float32 [], if ``max_grad_norm`` asks for it.
    """
    crosses = any(work.crosses for plan, _, _ in parts for work in plan.works)
    if crosses or max_grad_norm is not None:
        return _in_phases(parts, signals, max_grad_norm)
    for plan, gradients, hyper in parts:
        plan.keep_if_captured()
        for work in plan.works:
            _step(work, gradients, hyper, signals(work.device))
    return None


def run_one(plan: GroupPlan, gradients: list[Tensor], hyper: Hyper, signals: Signals) -> None:
    """The step of one group on one device; ``signals`` may bring a float64 clip."""
    with without_autocast([signals.counters.device]):
        for work in plan.works:
            _step(work, gradients, hyper, _for_kernels(work, signals))


def without_autocast(devices: Iterable[torch.device]) -> contextlib.ExitStack:
    """The step's arithmetic is float32 by contract, also inside of an autocast region."""
    off = contextlib.ExitStack()
    for kind in {device.type for device in devices}:
        if torch.is_autocast_enabled(kind):
            off.enter_context(torch.autocast(kind, enabled=False))
    return off


def _for_kernels(work: Work, signals: Signals) -> Signals:
    """Kernels read clip as float32."""
    if signals.clip is None or not work.by_address:
        return signals
    return replace(signals, clip=signals.clip.float())


def _step(work: Work, gradients: Sequence[Tensor], hyper: Hyper, signals: Signals) -> None:
    work.begin(gradients)
    try:
        if work.low_rank:
            work.batch.project(hyper, signals)
            work.batch.scale(hyper, signals)
        _finish(work, hyper, signals)
    finally:
        work.release()


def _finish(work: Work, hyper: Hyper, signals: Signals) -> None:
    """What writes weights; for a dense parameter all."""
    if work.low_rank:
        work.batch.apply(hyper, signals)
    else:
        work.batch.adamw(hyper, signals)
    work.end()


def _in_phases(
    parts: Sequence[Part],
    signals: Callable[[torch.device], Signals],
    max_grad_norm: float | None,
) -> Tensor | None:
    """Each verb for all units before the next one, so that something can come between: the norm of
    all gradients, which the q of all projections give, and the sums of other ranks."""
    for plan, _, _ in parts:
        plan.keep_if_captured()
    works = [(work, gradients, hyper) for plan, gradients, hyper in parts for work in plan.works]
    norm: Tensor | None = None
    try:
        _project(works, signals)
        if max_grad_norm is not None:
            norm, clip = _norm_and_factor(works, signals, max_grad_norm)
            signals = _with_clip(signals, clip)
        low_rank = [(work, hyper) for work, _, hyper in works if work.low_rank]
        for work, hyper in low_rank:
            work.batch.scale(hyper, _for_kernels(work, signals(work.device)))
        across = [(work.spread, work.batch) for work, _ in low_rank if work.crosses]
        distributed.add_norms(across)
        distributed.gather_scales(across)
        for work, hyper in low_rank:  # before any weight is written, and with it a step
            if work.crosses:
                work.batch.limit(hyper, _for_kernels(work, signals(work.device)))
        for work, _, hyper in works:
            _finish(work, hyper, _for_kernels(work, signals(work.device)))
    finally:
        for work, _, _ in works:
            work.release()
    return norm


def _with_clip(
    signals: Callable[[torch.device], Signals], clip: Tensor
) -> Callable[[torch.device], Signals]:
    return lambda device: replace(signals(device), clip=clip.to(device))


def _project(
    works: Sequence[tuple[Work, list[Tensor], Hyper]], signals: Callable[[torch.device], Signals]
) -> None:
    """R and q of every matrix, over all ranks that cut its contracted side."""
    buckets = distributed.Buckets()
    for work, gradients, hyper in works:
        work.begin(gradients)
        if not work.low_rank:
            continue
        work.batch.project(hyper, signals(work.device))
        if work.crosses and work.batch.sums is not None:
            buckets.add(work.spread, work.batch, work.sums)
    buckets.flush()


def _norm_and_factor(
    works: Sequence[tuple[Work, list[Tensor], Hyper]],
    signals: Callable[[torch.device], Signals],
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients and the factor of clipping; only dense gradients are read."""
    # Places in an order that is the same on all ranks, whatever they hold of a parameter.
    squares: dict[tuple[torch.device, tuple[Any, ...]], list[Tensor]] = {
        (work.device, work.spread.axes): [] for work, _, _ in works
    }
    dense: dict[tuple[torch.device, tuple[Any, ...]], list[Tensor]] = {}
    for work, gradients, _ in works:
        place = work.device, work.spread.axes
        if work.low_rank:
            squares[place].append(work.batch.square_norm())
        else:
            read = [at.gradient(gradients) for at in work.places]
            dense.setdefault(place, []).extend(read)
    for place, read in dense.items():
        squares[place].append(clipping.square_norm(read))
    whole: dict[torch.device, list[Tensor]] = {}
    for (device, axes), several in squares.items():
        total = distributed.add_over(axes, torch.stack(several).sum())
        whole.setdefault(device, []).append(total)
    return clipping.norm_and_factor(whole, signals, max_grad_norm)
