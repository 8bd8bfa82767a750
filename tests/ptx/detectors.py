"""Who may see whose writes: races between the warps of a block, and between the blocks of a launch.

Each warp has a clock, which a barrier advances, and knows up to which clock it comes after each
other warp (a vector clock). An access races with an earlier one of another warp that it does not
come after, if one of them writes. A write that changes nothing races with nobody: layouts that hold
a value in several warps store it several times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .arithmetic import distinct

READ, WRITE, SAME, ATOMIC, CONSTANT = range(5)  # SAME changes nothing; CONSTANT is ld.global.nc
Find = Callable[[str, int], None]  # what, and the line of PTX


class Clocks:
    """known[w, v]: warp w comes after all that warp v did up to this clock. Never written in
    place, so that a log may keep it."""

    def __init__(self, warps: int):
        self.known = np.eye(warps, dtype=np.int32)

    def arrive(self, warps: np.ndarray) -> np.ndarray:
        """The warps reach a barrier: what they know together."""
        known = self.known.copy()
        together = known[warps].max(0)
        known[warps, warps] += 1
        self.known = known
        return together

    def leave(self, warps: np.ndarray, together: np.ndarray) -> None:
        known = self.known.copy()
        known[warps] = np.maximum(known[warps], together)
        self.known = known


class SharedWatch:
    """Shared memory, ``granule`` bytes at a time: what was written, and when by whom."""

    def __init__(self, size: int, granule: int, warps: int, clocks: Clocks, find: Find):
        self.granule, self.clocks, self.find = granule, clocks, find
        self.valid = np.zeros(-(-size // granule), bool)
        self.wrote = np.zeros((self.valid.size, warps), np.int32)
        self.touched = np.zeros_like(self.wrote)

    def _places(self, at: np.ndarray, size: int) -> np.ndarray:
        return (at // self.granule)[:, None] + np.arange(max(1, size // self.granule))

    def read(self, at: np.ndarray, warp: np.ndarray, size: int, line: int) -> None:
        places = self._places(at, size)
        known = self.clocks.known[warp]
        if not self.valid[places].all():
            self.find("read of shared memory that nobody wrote", line)
        if (self.wrote[places] > known[:, None]).any():
            self.find("race in shared memory: read", line)
        self.touched[places, warp[:, None]] = known[np.arange(warp.size), warp][:, None]

    def write(self, at, warp, size, line, changes) -> None:
        """``changes``: which of the accesses alter memory."""
        places = self._places(at, size)
        known = self.clocks.known[warp]
        changes = changes | ~self.valid[places].all(1)
        if (self.touched[places] > known[:, None])[changes].any():
            self.find("race in shared memory: write", line)
        clock = known[np.arange(warp.size), warp][:, None]
        self.touched[places, warp[:, None]] = self.wrote[places, warp[:, None]] = clock
        self.valid[places] = True

    def forget(self, at: np.ndarray, size: int) -> None:
        """cp.async is on its way there: nobody may read until it lands."""
        self.valid[self._places(at, size)] = False


class Uses(NamedTuple):
    """What blocks did to places of global memory: a place stands once per block."""

    place: np.ndarray
    wrote: np.ndarray
    touched: np.ndarray  # other than by atomics
    constant: np.ndarray  # read by ld.global.nc
    released: np.ndarray  # all of it comes before the block's counter is advanced
    acquired: np.ndarray  # all of it comes after that


class GlobalWatch:
    """Every access of a launch to global memory, two bytes at a time."""

    def __init__(self, clocks: Clocks, find: Find):
        self.clocks, self.find = clocks, find
        self.launch: list[Uses] = []
        self._begin()

    def _begin(self) -> None:
        self.log: list[tuple] = []  # addresses, warps, bytes, kinds, what was known, line
        self.atomic_since: dict[int, int] = {}  # warp -> how long the log was at its atomic
        self.fences: dict[int, tuple] = {}  # warp -> its last fence
        self.released: list[tuple] = []  # fences that an atomic of the same warp has followed
        self.acquired: list[tuple] = []  # fences that have followed one

    def access(self, at, warp, size, kind, line) -> None:
        self.log.append((at, warp, size, kind, self.clocks.known, line))

    def fence(self, warps: list[int]) -> None:
        here = (len(self.log), self.clocks.known)
        for w in warps:
            self.fences[w] = here
            if w in self.atomic_since:
                self.acquired.append((w, *here))

    def atomic(self, warps: list[int]) -> None:
        for w in warps:
            self.atomic_since[w] = len(self.log)
            if w in self.fences:
                self.released.append((w, *self.fences[w]))

    def end_block(self) -> None:
        if self.log and any((kind == WRITE).any() or (kind == ATOMIC).any()
                            for *_, kind, _, _ in self.log):  # fmt: skip
            self._races()
        elif self.log:
            self._keep(*self._flat())
        self._begin()

    def _flat(self) -> tuple[np.ndarray, ...]:
        """Place, entry of the log, warp and kind of every two bytes."""
        places, entries, warps, kinds = [], [], [], []
        for number, (at, warp, size, kind, _, _) in enumerate(self.log):
            parts = max(1, size // 2)
            places.append(((at >> 1)[:, None] + np.arange(parts)).ravel())
            entries.append(np.full(parts * at.size, number))
            warps.append(np.repeat(warp, parts))
            kinds.append(np.repeat(kind, parts))
        return tuple(map(np.concatenate, (places, entries, warps, kinds)))

    def _races(self) -> None:
        place, entry, warp, kind = self._flat()
        self._keep(place, entry, warp, kind)
        at = np.flatnonzero(_near(place, place[kind == WRITE]) & (kind != SAME))
        at = at[np.lexsort((entry[at], place[at]))]
        if not at.size:
            return
        place, entry, warp, kind = place[at], entry[at], warp[at], kind[at]
        known = [e[4] for e in self.log]
        snapshots = {id(k): k for k in known}
        version = np.array([list(snapshots).index(id(k)) for k in known])[entry]
        table = np.stack(list(snapshots.values()))
        clock = table[version, warp, warp].astype(np.int64)
        first = np.r_[True, place[1:] != place[:-1]]
        group = np.cumsum(first) << 32
        racing = np.zeros(at.size, bool)
        for v in distinct(warp):
            own = warp == v
            for kinds, checked in (
                (kind == WRITE, kind != ATOMIC),
                (kind != ATOMIC, kind == WRITE),
            ):
                latest = np.maximum.accumulate(group + np.where(own & kinds, clock, 0)) - group
                before = np.where(first, 0, np.r_[0, latest[:-1]])
                racing |= ~own & checked & (before > table[version, warp, v])
        for line in distinct(np.array([self.log[e][5] for e in entry[racing]], int)):
            self.find("race in global memory between warps of a block", int(line))

    def _keep(self, place, entry, warp, kind) -> None:
        """Adds the block's uses to those of the launch."""
        released, acquired = (np.zeros(place.size, bool) for _ in range(2))
        for w, length, known in self.released:
            clock = np.array([e[4][range(len(known)), range(len(known))] for e in self.log])
            mine = (entry < length) & ((warp == w) | (clock[entry, warp] <= known[w, warp]))
            released |= mine
        for w, length, known in self.acquired:
            now = np.stack([e[4][:, w] for e in self.log])  # what each warp knew of w
            later = (entry >= length) & ((warp == w) | (now[entry, warp] >= known[w, w]))
            acquired |= later
        order = np.argsort(place, kind="stable")
        place = place[order]
        start = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
        kind = kind[order]
        every, some = np.logical_and.reduceat, np.logical_or.reduceat
        uses = Uses(
            place[start],
            some(kind == WRITE, start),
            some((kind != ATOMIC) & (kind != SAME), start),
            some(kind == CONSTANT, start),
            every(released[order], start),
            every(acquired[order], start),
        )
        self.launch.append(uses)

    def end_launch(self) -> None:
        if not self.launch:
            return
        uses = Uses(*map(np.concatenate, zip(*self.launch, strict=True)))
        near = _near(uses.place, uses.place[uses.wrote]) & uses.touched
        order = np.flatnonzero(near)
        if not order.size:
            return
        order = order[np.argsort(uses.place[order], kind="stable")]  # blocks as they ran
        place, wrote, _, constant, released, acquired = (c[order] for c in uses)
        first = np.r_[True, place[1:] != place[:-1]]
        last = np.r_[first[1:], True]
        start = np.flatnonzero(first)
        any_of, all_of = np.logical_or.reduceat, np.logical_and.reduceat
        if (any_of(wrote, start) & any_of(constant, start)).any():
            self.find("ld.global.nc of what the launch writes", 0)
        ordered = all_of(released | last, start) & all_of(acquired | first, start)
        shared = np.diff(np.r_[start, place.size]) > 1
        bad = shared & any_of(wrote, start) & ~ordered
        if bad.any():
            several = np.add.reduceat(wrote.astype(int), start) > 1
            for both in distinct(several[bad]):
                what = "two blocks write one place" if both else "a block reads what another writes"
                self.find(what, 0)


def _near(place: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which places may be among the wanted ones: no others need to be sorted."""
    marks = np.zeros(1 << 20, bool)
    marks[wanted & 0xFFFFF] = True
    return marks[place & 0xFFFFF]
