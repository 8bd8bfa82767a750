"""What ``stats(detail=True)`` tells of each low-rank parameter: scales, update norm, limiter.

    recording   around a step: what it leaves on the device is copied there; nobody waits
    read        one transfer, then quantiles on the host

The scales lie in a back end's workspace until the next step. Whether the limiter held a matrix
follows from its ``update_norm`` before and after a step, which every back end stores: what is held
ends at 1.01 times the norm before. So no kernel counts anything for this.

With ``disable_nl`` kernels store no norm. While a record is kept they take the limiter, with norms
that are unset before each step: it stores the new ones and multiplies by 1, so no bit changes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from apollo_kernels.batch import NORM_GROWTH, TINY, Hyper
from apollo_kernels.distributed import local
from apollo_kernels.plan import GroupPlan, Part

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
# float32 rounds a held norm by a few 2^-24; a free one would have to come this near to pass for it.
_HELD = NORM_GROWTH * (1 - 2**-20)


@dataclass
class _Seen:
    """One parameter: tensors on its device, one number per matrix but for ``scales``."""

    scales: list[Tensor]  # s of each matrix, copies
    norms: Tensor  # of its last update: ``own``, or without a limiter those of _Unlimited
    own: Tensor  # the state's own update_norm
    step: Tensor  # the state's own
    before: Tensor  # the norms after the last step that was looked at
    held: Tensor  # int64: how many steps were limited
    begun: Tensor  # [] the step after which they are counted
    alpha: float  # what update_norm lacks of the update's norm


States = Mapping[Tensor, Mapping[str, Any]]  # of low-rank parameters of one device


class _Norms:
    """The norms of parameters that are stepped together."""

    def __init__(self, states: States):
        self.norms = {p: local(state["update_norm"]) for p, state in states.items()}
        self.sizes = [norm.numel() for norm in self.norms.values()]

    def now(self) -> Tensor:
        return torch.cat([norm.reshape(-1) for norm in self.norms.values()])

    def holds(self, states: States) -> bool:
        """Whether these are its parameters, with the tensors that it knows."""
        pairs = zip(self.norms.items(), states.items(), strict=False)
        same = all(p is q and norm is local(s["update_norm"]) for (p, norm), (q, s) in pairs)
        return same and len(states) == len(self.norms)


class _Unlimited(_Norms):
    """Norms that no limiter compares: for the length of a step the state's are unset."""

    def __init__(self, states: States, known: Mapping[Tensor, _Seen]):
        super().__init__(states)
        self.kept = self.now()  # the state's own
        self.unset = torch.full_like(self.kept, -1.0)  # below any norm, so a new one shows
        self.last = torch.zeros_like(self.kept)
        self.of = dict(zip(states, self.last.split(self.sizes), strict=True))
        for p, own in self.of.items():
            if p in known:
                own.copy_(known[p].norms.reshape(-1))

    def begin(self) -> None:
        self.kept.copy_(self.now())
        self._store(self.unset)

    def keep(self) -> None:
        now = self.now()
        self.last.copy_(torch.where(now < 0, self.last, now))  # a step that was skipped stores none

    def end(self) -> None:
        self._store(self.kept)

    def _store(self, norms: Tensor) -> None:
        own = list(self.norms.values())
        pieces = zip(norms.split(self.sizes), own, strict=True)
        torch._foreach_copy_(own, [piece.view(norm.shape) for piece, norm in pieces])


class _Pack(_Norms):
    """Parameters of one device that are stepped together; what is counted lies side by side."""

    def __init__(self, states: States, known: Mapping[Tensor, _Seen]):
        super().__init__(states)
        self.before = self.now()
        self.held = torch.zeros_like(self.before, dtype=torch.int64)
        self.begun = torch.stack([local(state["step"]) for state in states.values()])
        counts = self.before.split(self.sizes), self.held.split(self.sizes), self.begun
        self.of = dict(zip(states, zip(*counts, strict=True), strict=True))
        for p, own in self.of.items():
            old = known.get(p)
            if old is not None and old.own is self.norms[p]:  # stepped with others until now
                for t, last in zip(own, (old.before, old.held, old.begun), strict=True):
                    t.copy_(last)

    def count(self) -> None:
        now = self.now()
        self.held += (now >= _HELD * (self.before + TINY)) & (self.before >= TINY)
        self.before.copy_(now)  # the same memory, since a CUDA graph reads it at each replay


class Detail:
    """The record of one optimizer, from ``record_detail = True`` on."""

    def __init__(self) -> None:
        self._seen: dict[Tensor, _Seen] = {}
        self._packs: dict[Tensor, _Pack] = {}  # by the first parameter of each
        self._unlimited: dict[Tensor, _Unlimited] = {}

    def forget(self) -> None:
        """The state has been replaced."""
        self._seen.clear()
        self._packs.clear()
        self._unlimited.clear()

    @contextlib.contextmanager
    def recording(self, parts: Sequence[Part]) -> Iterator[list[Part]]:
        """What to run for ``parts``, whose checks lie behind; then copies what it has left."""
        free = [
            self._unlimited_of(states)
            for plan, _, hyper in parts
            if hyper.disable_nl
            for states in _by_device(plan)
        ]
        for norms in free:
            norms.begin()
        try:
            yield [(plan, grads, _limited(hyper)) for plan, grads, hyper in parts]
            for norms in free:
                norms.keep()
        finally:
            for norms in free:
                norms.end()
        for plan, _, hyper in parts:
            self._keep(plan, hyper)

    def _unlimited_of(self, states: States) -> _Unlimited:
        first = next(iter(states))
        norms = self._unlimited.get(first)
        if norms is None or not norms.holds(states):
            norms = self._unlimited[first] = _Unlimited(states, self._seen)
        return norms

    def _keep(self, plan: GroupPlan, hyper: Hyper) -> None:
        scales: dict[Tensor, list[Tensor]] = {}  # of each parameter
        for work in plan.works:
            if work.low_rank:
                for place, s in zip(work.places, work.batch.scales(hyper), strict=True):
                    scales.setdefault(plan.owned[place.index], []).append(s)
        for states in _by_device(plan):
            self._count(states, hyper)
            self._copy({p: scales[p] for p in states})

    def _count(self, states: States, hyper: Hyper) -> None:
        first = next(iter(states))
        pack = self._packs.get(first)
        if pack is None or not pack.holds(states):
            pack = self._packs[first] = _Pack(states, self._seen)
        pack.count()
        last = self._unlimited_of(states).of if hyper.disable_nl else pack.norms
        alpha = 1.0 if hyper.scale_front else math.sqrt(hyper.scale)
        for p, state in states.items():
            old = self._seen.get(p)
            self._seen[p] = _Seen(
                old.scales if old else [], last[p], pack.norms[p], local(state["step"]),
                *pack.of[p], alpha,
            )  # fmt: skip

    def _copy(self, scales: Mapping[Tensor, Sequence[Tensor]]) -> None:
        """In one launch, or a few."""
        sources = [s for several in scales.values() for s in several]
        for p, several in scales.items():
            own = self._seen[p].scales
            if [s.shape for s in own] != [s.shape for s in several]:
                own[:] = map(torch.empty_like, several)
        torch._foreach_copy_([s for p in scales for s in self._seen[p].scales], sources)

    def read(self, names: Mapping[Tensor, Callable[[], str]]) -> dict[str, dict[str, Any]]:
        """By name, in the order of ``names``, what is known; waits for the device."""
        known = {p: self._seen[p] for p in names if p in self._seen}
        host = _on_host([t for seen in known.values() for t in _tensors(seen)])
        found: dict[str, dict[str, Any]] = {}
        for p, seen in known.items():
            norms, step, held, begun, *scales = (next(host) for _ in _tensors(seen))
            name = names[p]()
            steps = float(step - begun) * norms.numel()
            found[name] = {
                "scales": _quantiles(torch.cat(scales)),
                "update_norm": seen.alpha * float(torch.linalg.vector_norm(norms)),
                "limited": float(held.sum()) / steps if steps else 0.0,
            }
        return found


def _limited(hyper: Hyper) -> Hyper:
    return replace(hyper, disable_nl=False) if hyper.disable_nl else hyper


def _by_device(plan: GroupPlan) -> list[States]:
    """The states of the low-rank parameters, in order."""
    low_rank = {place.index for work in plan.works if work.low_rank for place in work.places}
    parts: dict[torch.device, dict[Tensor, Mapping[str, Any]]] = {}
    for index in sorted(low_rank):
        p, state = plan.owned[index], plan.states[index]
        parts.setdefault(local(state["exp_avg"]).device, {})[p] = state
    return list(parts.values())


def _tensors(seen: _Seen) -> list[Tensor]:
    return [seen.norms, seen.step, seen.held, seen.begun, *seen.scales]


def _on_host(tensors: Sequence[Tensor]) -> Any:
    """All of them as float64 vectors, with one transfer per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        by_device.setdefault(t.device, []).append(t.reshape(-1).double())
    parts = {
        device: iter(torch.cat(several).cpu().split([t.numel() for t in several]))
        for device, several in by_device.items()
    }
    return (next(parts[t.device]) for t in tensors)


def _quantiles(s: Tensor) -> dict[str, float]:
    """NaN where a scale is, and where there is none."""
    if not s.numel():
        return dict.fromkeys(QUANTILES, math.nan)
    levels = torch.tensor(list(QUANTILES.values()), dtype=s.dtype)
    return dict(zip(QUANTILES, torch.quantile(s, levels).tolist(), strict=True))
