"""Launches: blocks one after the other, their threads from basic block to basic block."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .arithmetic import i8, u1, u4
from .counters import Counters
from .detectors import Clocks, GlobalWatch, SharedWatch
from .instructions import Translator
from .memory import Memory, Region
from .parser import SHARED_BEGIN, Kernel, PtxError

POISON = {1: 0xFF, 2: 0xFFFF, 4: 0xFFC0DEAD, 8: 0xFFF8DEADDEADDEAD}  # NaN, and nobody's address


class Finding(NamedTuple):
    what: str
    kernel: str
    line: int
    text: str


class Device:
    """Runs kernels and keeps what it saw.

    watch: look for races and for reads of what nobody wrote.
    count: count sectors and wavefronts.
    ahead: 0 runs the warps of a block in step; 1 lets the first ones run ahead up to the next
        barrier, -1 the last ones.
    blocks: the order of a grid's blocks.
    """

    def __init__(
        self, *, watch=True, count=False, ahead=0, blocks: Callable[[int], Iterable[int]] = range
    ):
        self.watch, self.ahead, self.blocks = watch, ahead, blocks
        self.counters = Counters() if count else None
        self.findings: Counter[Finding] = Counter()
        self.launches: Counter[str] = Counter()
        self.barriers: dict[str, set[int]] = defaultdict(set)  # lines that a kernel has reached

    def launch(
        self, kernel: Kernel, grid: int, threads: int, dynamic_shared: int,
        params: Sequence[bytes], memory: Iterable[Region],
    ) -> None:  # fmt: skip
        if threads > kernel.max_threads or threads % 32:
            raise PtxError(f"{kernel.name}: {threads} threads, of {kernel.max_threads} at most")
        buffer = np.zeros(kernel.param_bytes, u1)
        for given, (at, size) in zip(params, kernel.params.values(), strict=True):
            if len(given) != size:
                raise PtxError(f"{kernel.name}: {len(given)} bytes for a parameter of {size}")
            buffer[at : at + size] = np.frombuffer(given, u1)
        self.launches[kernel.name] += 1
        machine = Machine(self, kernel, grid, threads, dynamic_shared, buffer, sorted(memory))
        with np.errstate(all="ignore"):
            for block in self.blocks(grid):
                machine.run(block)
            if self.watch:
                machine.global_watch.end_launch()


class Machine(Memory):
    """One block of threads at a time."""

    def __init__(self, device, kernel, grid, threads, dynamic_shared, params, regions):
        self.device, self.k, self.n, self.grid, self.params = device, kernel, threads, grid, params
        self.watch, self.counters = device.watch, device.counters
        self.regions: list[Region] = regions
        self.begins = [r.begin for r in regions]
        self.warps = threads // 32
        self.lanes = np.arange(threads)
        self.warp = self.lanes // 32
        self.shared_end = SHARED_BEGIN + -(-kernel.static_shared // 128) * 128 + dynamic_shared
        self.shared = np.zeros(-(-self.shared_end // 16) * 16, u1)
        self.shared_as = {w: self.shared.view(f"u{w}") for w in (1, 2, 4, 8)}
        if threads not in kernel.translated:
            kernel.translated[threads] = Translator(kernel, threads)
        self.code = kernel.translated[threads]
        self.blank = [
            np.full(threads, POISON[w], f"u{w}") if w else np.zeros(threads, bool)
            for w in kernel.widths
        ]
        self.global_watch = GlobalWatch(kernel.global_granule, Clocks(self.warps), self.find)

    def find(self, what: str, line: int) -> None:
        self.device.findings[Finding(what, self.k.name, line, self.k.text.get(line, ""))] += 1

    def where(self, line: int, thread: int) -> str:
        return f"{self.k.where(line)} block {self.block} thread {thread}"

    # Control flow. Threads that have parted are masks under (rank, order of their next basic
    # block); the lowest runs first, so that they meet again as early as they can.

    def run(self, block: int) -> None:
        self._begin(block)
        registers, n = list(self.blank), self.n
        turn, first = self.device.ahead, self.k.blocks[0].order
        self.ready = {}
        for w in range(self.warps) if turn else [None]:
            mask = np.ones(n, bool) if w is None else self.warp == w
            self.ready[turn * (w or 0), first] = mask
        while self.ready:
            at = min(self.ready)
            m, code = self.ready.pop(at), self.k.by_order[at[1]]
            alone = not self.ready and not self.waiting
            count = int(np.count_nonzero(m))
            variant = "all" if count == n else "live" if alone else "some"
            taken = self.code.function(code, variant)(registers, m, self)
            self._go_on(at[0], code, m, taken, count)
        if any(map(len, self.groups)) or any(map(len, self.pending)):
            self.find("cp.async that nobody waited for", 0)
        if self.watch:
            self.global_watch.end_block()

    def _begin(self, block: int) -> None:
        self.block = block
        self.shared[:] = 0xFF
        self.live = np.ones(self.n, bool)
        self.waiting: list[tuple] = []  # at a barrier: rank, order of the next block, mask, line
        self.together = np.zeros(self.warps, np.int32)  # what the warps that wait know
        self.pending, self.groups = ([[] for _ in range(self.warps)] for _ in range(2))
        self.clocks = self.global_watch.clocks = Clocks(self.warps)
        if self.watch:
            size, granule = self.shared.size, self.k.granule
            self.shared_watch = SharedWatch(size, granule, self.warps, self.clocks, self.find)

    def _go_on(self, rank, code, m, taken, count) -> None:
        kind, *rest = code.end
        if kind == "branch":
            _, negated, target = rest
            taken = m & (~taken if negated else taken)
            hits = int(np.count_nonzero(taken))
            if hits:
                self._add(rank, self.k.labels[target].order, taken)
            if hits < count:
                self._add(rank, self.k.blocks[code.place + 1].order, m & ~taken if hits else m)
        elif kind == "bra":
            self._add(rank, self.k.labels[rest[0]].order, m)
        elif kind == "next":
            self._add(rank, self.k.blocks[code.place + 1].order, m)
        elif kind == "bar":
            self._arrive(rank, self.k.blocks[code.place + 1].order, m, *rest)
        else:
            self.live = self.live & ~m
            self._release()

    def _add(self, rank: int, order: int, m: np.ndarray) -> None:
        at = rank, order
        self.ready[at] = self.ready[at] | m if at in self.ready else m

    def _arrive(self, rank, order, m, line) -> None:
        self.device.barriers[self.k.name].add(line)
        known = self.clocks.arrive(np.unique(self.warp[m]))
        self.together = np.maximum(self.together, known)
        self.waiting.append((rank, order, m, line))
        self._release()

    def _release(self) -> None:
        """Who waits goes on when all that live have come."""
        here = np.logical_or.reduce([~self.live, *(m for _, _, m, _ in self.waiting)])
        if not self.waiting or not here.all():
            return
        waiting, self.waiting = self.waiting, []
        if len({line for *_, line in waiting}) > 1:
            self.find("threads of a block wait at different barriers", waiting[0][3])
        for rank, order, m, line in waiting:
            warps = m.reshape(-1, 32).any(1)
            if not (m | ~self.live).reshape(-1, 32)[warps].all():
                self.find("part of a warp at a barrier", line)
            self.clocks.leave(np.flatnonzero(warps), self.together)
            self._add(rank, order, m)
        self.together = np.zeros_like(self.together)

    # Warps.

    def whole_warps(self, *, m, line) -> None:
        if m is not None:
            warps = m.reshape(-1, 32)
            if not (warps.all(1) | ~warps.any(1)).all():
                self.find("warp-wide instruction with lanes missing", line)

    def shuffle(self, how, a, b, c, members, *, m, line):
        lane = (self.lanes % 32).astype(i8)
        b, clamp, segment = (b & 31).astype(i8), (c & 31).astype(i8), ((c >> 8) & 31).astype(i8)
        top, bottom = (lane & segment) | (clamp & ~segment), lane & segment
        source = {
            "up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment)
        }[how]  # fmt: skip
        valid = source >= top if how == "up" else source <= top
        source = self.warp * 32 + np.where(valid, source, lane)
        if m is not None:
            self._members(members, m, line)
            if not m[source[m]].all():
                self.find("shfl.sync reads a lane that is not there", line)
        return a[source], valid

    def _members(self, members, m, line) -> None:
        """All lanes that an instruction names are here, or have returned."""
        warps = m.reshape(-1, 32)
        named = (members.reshape(-1, 32)[..., None] >> np.arange(32, dtype=u4) & 1).astype(bool)
        named = (named & warps[..., None]).any(1)  # by some lane that is here
        missing = named & ~warps & self.live.reshape(-1, 32)
        if missing.any() or (warps & ~named).any():
            self.find("a .sync instruction without all its members", line)

    def reduce(self, how, x, members, *, m, line):
        self.whole_warps(m=m, line=line)
        if not (members[slice(None) if m is None else m] == 0xFFFFFFFF).all():
            raise PtxError(f"unknown: redux of a part: {self.where(line, 0)}")
        name = {"max": "max", "min": "min", "add": "sum"}[how]
        return np.repeat(getattr(np, name)(x.reshape(-1, 32), axis=1).astype(x.dtype), 32)

    def vote(self, how, x, members, *, m, line):
        here = np.ones(self.n, bool) if m is None else m
        self._members(members, here, line)
        x, here = (x & here).reshape(-1, 32), here.reshape(-1, 32)
        if how == "ballot":
            result = (x.astype(u4) << np.arange(32, dtype=u4)).sum(1).astype(u4)
        else:
            result = {"any": x.any(1), "all": (x | ~here).all(1)}[how]
        return np.repeat(result, 32)

    def active_mask(self, *, m, line):
        here = (np.ones(self.n, bool) if m is None else m).reshape(-1, 32)
        return np.repeat((here.astype(u4) << np.arange(32, dtype=u4)).sum(1).astype(u4), 32)

    def special(self, name: str) -> np.ndarray:
        if name == "%laneid":
            return (self.lanes % 32).astype(u4)
        what, axis = name[1:].split(".")
        along = {"tid": self.lanes, "ntid": self.n, "ctaid": self.block, "nctaid": self.grid}[what]
        other = int(what.startswith("n"))
        value = np.asarray(along if axis == "x" else other, u4)
        return np.broadcast_to(value, (self.n,)).copy()
