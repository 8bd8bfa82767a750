"""What ``stats(detail=True)`` tells of each low-rank parameter: scales, update norm, limiter.

    keep   after a step: what it has left on the device is copied there; nobody waits
    read   one transfer, then quantiles on the host

The scales lie in a back end's workspace until the next step. Whether the limiter held a matrix
follows from its ``update_norm`` before and after a step, which every back end stores: what is held
ends at 1.01 times the norm before. So no kernel counts anything for this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apollo_kernels.batch import NORM_GROWTH, TINY, Hyper
from apollo_kernels.distributed import local
from apollo_kernels.plan import GroupPlan

QUANTILES = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
# float32 rounds a held norm by a few 2^-24; a free one would have to come this near to pass for it.
_HELD = NORM_GROWTH * (1 - 2**-20)


@dataclass
class _Seen:
    """One parameter: tensors on its device, one number per matrix but for ``scales``."""

    scales: list[Tensor]  # s of each matrix, copies
    norms: Tensor  # the state's own update_norm
    step: Tensor  # the state's own
    before: Tensor  # the norms after the last step that was looked at
    held: Tensor  # int64: how many steps were limited
    begun: Tensor  # [] the step after which they are counted
    alpha: float  # what update_norm lacks of the update's norm
    limits: bool


class _Pack:
    """Parameters of one device that are stepped together; what is counted lies side by side."""

    def __init__(self, states: Mapping[Tensor, Mapping[str, Any]], known: Mapping[Tensor, _Seen]):
        self.norms = {p: local(state["update_norm"]) for p, state in states.items()}
        self.before = self._now()
        self.held = torch.zeros_like(self.before, dtype=torch.int64)
        self.begun = torch.stack([local(state["step"]) for state in states.values()])
        sizes = [norm.numel() for norm in self.norms.values()]
        counted = zip(self.before.split(sizes), self.held.split(sizes), self.begun, strict=True)
        self.of = dict(zip(states, counted, strict=True))
        for p, own in self.of.items():
            old = known.get(p)
            if old is not None and old.norms is self.norms[p]:  # stepped with others until now
                for t, last in zip(own, (old.before, old.held, old.begun), strict=True):
                    t.copy_(last)

    def _now(self) -> Tensor:
        return torch.cat([norm.reshape(-1) for norm in self.norms.values()])

    def holds(self, states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
        """Whether these are its parameters, with the tensors that it knows."""
        pairs = zip(self.norms.items(), states.items(), strict=False)
        same = all(p is q and norm is local(s["update_norm"]) for (p, norm), (q, s) in pairs)
        return same and len(states) == len(self.norms)

    def count(self) -> None:
        now = self._now()
        self.held += (now >= _HELD * (self.before + TINY)) & (self.before >= TINY)
        self.before.copy_(now)  # the same memory, since a CUDA graph reads it at each replay


class Detail:
    """The record of one optimizer, from ``record_detail = True`` on."""

    def __init__(self) -> None:
        self._seen: dict[Tensor, _Seen] = {}
        self._packs: dict[Tensor, _Pack] = {}  # by the first parameter of each

    def forget(self) -> None:
        """The state has been replaced."""
        self._seen.clear()
        self._packs.clear()

    def keep(self, plan: GroupPlan, hyper: Hyper) -> None:
        """Copies what the step of a unit has left on its device."""
        scales: dict[int, list[Tensor]] = {}  # of each parameter
        for work in plan.works:
            if work.low_rank:
                for place, s in zip(work.places, work.batch.scales(hyper), strict=True):
                    scales.setdefault(place.index, []).append(s)
        parts: dict[torch.device, dict[Tensor, int]] = {}
        for index in sorted(scales):
            parts.setdefault(scales[index][0].device, {})[plan.owned[index]] = index
        for part in parts.values():
            states = {p: plan.states[index] for p, index in part.items()}
            self._count(states, hyper)
            self._copy({p: scales[index] for p, index in part.items()})

    def _count(self, states: Mapping[Tensor, Mapping[str, Any]], hyper: Hyper) -> None:
        first = next(iter(states))
        pack = self._packs.get(first)
        if pack is None or not pack.holds(states):
            pack = self._packs[first] = _Pack(states, self._seen)
        pack.count()
        alpha = 1.0 if hyper.scale_front else math.sqrt(hyper.scale)
        for p, state in states.items():
            old = self._seen.get(p)
            self._seen[p] = _Seen(
                old.scales if old else [], pack.norms[p], local(state["step"]), *pack.of[p], alpha,
                not hyper.disable_nl,
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
            found[name] = {"scales": _quantiles(torch.cat(scales)), "update_norm": None}
            if seen.limits:
                found[name]["update_norm"] = seen.alpha * float(torch.linalg.vector_norm(norms))
            steps = float(step - begun) * norms.numel()
            found[name]["limited"] = float(held.sum()) / steps if steps else 0.0
        return found


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
