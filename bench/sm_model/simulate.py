"""Runs warps through an SM, clock by clock: all by one trace, or every second four by another.

Each of four schedulers issues at most one instruction per clock: of the warp that issued last for
as long as it can, then of the youngest that can. A warp can if the stall that ptxas wrote is over,
the scoreboards that it waits for are released, and the instruction's pipe takes it. Memory gives an
SM its share of the card's bandwidth, after a latency; a burst comes as fast as L2 can send it,
since other SMs compute meanwhile.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from sass import Instruction, global_bytes

from sm_model import cards
from sm_model.cards import SCHEDULERS, Card
from sm_model.pipes import DRAM, L1, L2, NOWHERE, SHARED, use

_FOREVER = float("inf")
_LENGTH = 16  # bytes of an instruction


@dataclass(frozen=True)
class Result:
    """``clocks`` of one turn of all warps, in the steady state; ``busy``: the shares of time in
    which schedulers issue and pipes work."""

    clocks: float
    busy: dict[str, float]


class _Warp:
    def __init__(self, block: int, steps: list[_Step]):
        self.block = block
        self.steps = steps
        self.at = 0  # in them
        self.ready = 0.0  # may issue then
        self.boards = [0.0] * 6  # released then
        self.copies = 0.0  # cp.async that no group holds yet: there then
        self.groups: list[float] = []
        self.products = 0.0  # wgmma that is under way: done then
        self.turns = 0  # that are over


@dataclass(frozen=True, slots=True)
class _Step:
    pipe: str
    busy: int
    data: int
    place: int
    moved: int
    stall: int
    boards: tuple[int, ...]  # that it waits for
    sets: int | None
    frees: int | None
    yields: bool
    jumps: bool
    special: str  # BAR, LDGSTS, LDGDEPBAR, DEPBAR, HGMMA, WARPGROUP or nothing
    groups: int  # DEPBAR: how many may be under way


def _steps(trace: Sequence[Instruction], card: Card, beginning: int) -> list[_Step]:
    found = []
    tables = [i for i, x in enumerate(trace[:beginning]) if 0 < global_bytes(x.op) < 16]
    for i, x in enumerate(trace):
        following = trace[(i + 1) % len(trace)]
        what = use(x, card)
        groups = re.match(r"SB0, 0x([0-9a-f]+)", x.operands) if x.name == "DEPBAR" else None
        special = x.name if x.name in ("LDGSTS", "LDGDEPBAR", "HGMMA") or groups else ""
        if x.op.startswith("WARPGROUP.DEPBAR"):
            special = "WARPGROUP"
        if x.op.startswith("BAR.SYNC") or x.op.startswith("BAR.RED"):
            special = "BAR"
        found.append(
            _Step(
                pipe=what.pipe,
                busy=what.busy,
                data=what.data,
                place=what.place if i not in tables else L2 if i == tables[0] else L1,
                moved=what.moved if i not in tables else 0,
                stall=max(1, x.stall),
                boards=tuple(b for b in range(6) if x.waits >> b & 1),
                sets=x.sets,
                frees=x.frees,
                yields=x.yields,
                jumps=x.target is not None and following.address != x.address + _LENGTH,
                special=special,
                groups=int(groups[1], 16) if groups else 0,
            )
        )
    return found


def simulate(
    card: Card,
    trace: Sequence[Instruction],
    warps: int,
    blocks: int = 1,
    turns: int = 24,
    bandwidth: float = 1.0,
    beginning: int = 0,
    other: Sequence[Instruction] = (),
) -> Result:
    """``trace``, over and over, by ``blocks`` blocks of ``warps`` warps on one SM.

    Args
        bandwidth: times the SM's share of the memory's (what neighbours leave in L2 is not read).
        beginning: so many instructions of ``trace`` are a block's first. What they load by less
            than 16 bytes are tables: the block's place in the map from L2, and what L1 has kept.
        other: what every second four warps of a block execute instead, if any.
    """
    ways = [_steps(way, card, beginning) for way in (trace, other or trace)]
    return _Sm(card, ways, warps, blocks, turns, card.share * bandwidth).run()


class _Sm:
    def __init__(
        self, card: Card, ways: list[list[_Step]], warps: int, blocks: int, turns: int, share: float
    ):
        self.card, self.block_warps, self.turns = card, warps, turns
        self.share = share
        self.warps = [_Warp(b, ways[w // 4 % 2]) for b in range(blocks) for w in range(warps)]
        of = range(SCHEDULERS)
        self.queues: list[list[_Warp]] = [self.warps[s::SCHEDULERS] for s in of]
        self.last: list[_Warp | None] = [None for _ in of]
        self.wake = [0.0 for _ in of]  # no warp of a scheduler can issue before
        self.free = [Counter[str]() for _ in of]  # when a scheduler's pipes take the next
        self.memory: list[deque[float]] = [deque() for _ in of]  # instructions in the LSU's queue
        self.data_free = self.dram_free = self.l2_free = 0.0
        self.waiting: list[list[_Warp]] = [[] for _ in range(blocks)]  # at a barrier
        self.busy: Counter[str] = Counter()
        self.ends: list[tuple[float, float]] = []  # of turns: when, and what was issued by then

    def run(self) -> Result:
        clock, left = 0.0, len(self.warps)
        while left:
            for s in range(SCHEDULERS):
                if self.wake[s] <= clock:
                    left -= self._issue(s, clock)
            if left and min(self.wake) == _FOREVER:
                raise RuntimeError("every warp waits: a barrier in the trace is not reached by all")
            clock = max(clock + 1, float(math.ceil(min(self.wake)))) if left else clock + 1
        count = len(self.warps)  # a quarter of the turns to fill, and a quarter to run dry
        (begin, before), (end, after) = (self.ends[n * self.turns // 4 * count] for n in (1, 3))
        per_turn = (end - begin) / (after - before) * sum(len(w.steps) for w in self.warps)
        whole = {k: v / clock / (1 if k == "data" else SCHEDULERS) for k, v in self.busy.items()}
        return Result(per_turn, {k: v for k, v in whole.items() if v})

    def _issue(self, s: int, clock: float) -> bool:
        """Whether a warp of scheduler ``s`` has ended."""
        soonest = _FOREVER
        last = self.last[s]
        order = self.queues[s] if last is None else [last, *self.queues[s]]
        for warp in order:
            when = self._possible(s, warp, clock)
            if when <= clock:
                self.wake[s] = clock + 1
                return self._execute(s, warp, clock)
            soonest = min(soonest, when)
        self.wake[s] = soonest
        return False

    def _possible(self, s: int, warp: _Warp, clock: float) -> float:
        """When ``warp`` can issue, as far as it is known by now."""
        if warp.ready > clock:
            return warp.ready
        step = warp.steps[warp.at]
        when = clock
        for b in step.boards:
            when = max(when, warp.boards[b])
        if step.special == "DEPBAR" and len(warp.groups) > step.groups:
            when = max(when, warp.groups[-1 - step.groups])
        if step.special == "WARPGROUP":
            when = max(when, warp.products)
        if when > clock:
            return when
        free, pipe = self.free[s], step.pipe
        if pipe == "fma" and self.card.fma_pipes == 2:
            return min(free["multiply"], free["light"])
        if pipe == "fma":
            return free["multiply"]
        if pipe == "mufu":
            return free["mufu"] - cards.MUFU_QUEUE
        if pipe == "lsu":
            queue = self.memory[s]
            while queue and queue[0] <= clock:
                queue.popleft()
            if len(queue) >= cards.LSU_QUEUE:
                return queue[0]
            if step.moved and step.place == NOWHERE:
                return self.dram_free - cards.STORES_IN_L2 / self.share
            return clock
        return clock if step.special == "HGMMA" else free[pipe]

    def _execute(self, s: int, warp: _Warp, clock: float) -> bool:
        step, free = warp.steps[warp.at], self.free[s]
        self.busy["issue"] += 1
        read = written = clock  # when the operands are read, and the result is there
        if step.pipe == "fma" and self.card.fma_pipes == 2 and free["light"] <= clock:
            free["light"] = clock + step.busy
        elif step.pipe in ("fma", "multiply"):
            free["multiply"] = clock + step.busy
        elif step.pipe == "mufu":
            read = free["mufu"] = max(free["mufu"], clock) + step.busy
            written = read + cards.MUFU_LATENCY
        elif step.pipe == "lsu":
            read, written = self._move(s, step, clock)
        elif step.special == "HGMMA":
            self.data_free = max(self.data_free, clock) + step.data
            self.busy["data"] += step.data
            free["tensor"] = max(free["tensor"] + step.busy, clock + step.busy, self.data_free)
            warp.products = free["tensor"] + cards.WGMMA_LATENCY
        elif step.pipe != "control":
            free[step.pipe] = clock + step.busy
            if step.pipe == "uniform":
                written = clock + cards.UNIFORM_LATENCY
        if step.pipe in ("fma", "multiply"):
            self.busy["fma"] += step.busy / self.card.fma_pipes
        else:
            self.busy[step.pipe] += step.busy
        self._note(step, warp, written)
        if step.sets is not None:
            warp.boards[step.sets] = max(warp.boards[step.sets], written)
        if step.frees is not None:
            warp.boards[step.frees] = max(warp.boards[step.frees], read)
        warp.ready = clock + step.stall + (cards.TAKEN_BRANCH if step.jumps else 0)
        self.last[s] = None if step.yields else warp
        if step.special == "BAR":
            self._arrive(warp, clock)
        return self._advance(s, warp, clock)

    def _move(self, s: int, step: _Step, clock: float) -> tuple[float, float]:
        served = max(self.data_free, clock + cards.LSU_LATENCY)
        self.data_free = served + step.data
        self.busy["data"] += step.data
        self.memory[s].append(served)
        if step.moved:
            begun = served if step.place == NOWHERE else served - cards.BURST / self.share
            self.dram_free = max(self.dram_free, begun) + step.moved / self.share
        written = served + step.data
        if step.place == DRAM:
            self.l2_free = max(self.l2_free, served) + step.moved / cards.L2_BYTES
            # A request's own bytes are part of the latency.
            came = max(self.dram_free - step.moved / self.share, self.l2_free)
            written = came + self.card.latency_clocks
        else:
            latency = {SHARED: cards.SHARED_LATENCY, L1: cards.L1_LATENCY, L2: cards.L2_LATENCY}
            written += latency.get(step.place, cards.SHARED_LATENCY)
        return served + cards.OPERANDS_READ, written

    def _note(self, step: _Step, warp: _Warp, written: float) -> None:
        if step.special == "LDGSTS":
            warp.copies = max(warp.copies, written)
        elif step.special == "LDGDEPBAR":
            warp.groups.append(max([warp.copies, *warp.groups[-1:]]))
            del warp.groups[:-8]

    def _arrive(self, warp: _Warp, clock: float) -> None:
        others = self.waiting[warp.block]
        others.append(warp)
        warp.ready = _FOREVER
        if len(others) == self.block_warps:
            for other in others:
                other.ready = clock + cards.BARRIER
            others.clear()
            self.wake = [min(w, clock + 1) for w in self.wake]

    def _advance(self, s: int, warp: _Warp, clock: float) -> bool:
        warp.at += 1
        if warp.at < len(warp.steps):
            return False
        warp.at = 0
        warp.turns += 1
        self.ends.append((clock, self.busy["issue"]))
        if warp.turns < self.turns:
            return False
        self.queues[s].remove(warp)
        self.last[s] = None
        return True
