"""The main loops of the kernels, cut out of their SASS, and what one turn of them executes.

A main loop is found by what it does, not by where it stands: it is an innermost loop that moves
vectors, 16 bytes per lane or 8, between global memory and the SM. Of such loops those count that

  * multiply on tensor cores, and that write nothing: others are guards' or an epilogue's,
  * have no element by element accesses, where others are for the edges of a matrix,
  * sum squares on their way, where both orientations have a loop that does not, too.

Of all ways through a loop the main one

  * moves and multiplies most: vectors of global memory and tensor-core instructions,
  * moves either before it multiplies or after: where half of the warps make the next stages first
    and half of them last, there are two such ways,
  * avoids guards' element by element accesses, and calls of subroutines,
  * computes most: what it moved is not skipped for being zero or not finite (MUFU),
  * and is otherwise the shortest: numbers that serve many turns are not drawn in this one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from sass import Function, Instruction, Loop, global_bytes, is_scalar, is_vector, products

_Weight = tuple[int, int, int, int]


@dataclass(frozen=True)
class MainLoop:
    """``ways``: the instructions of one turn, in order; warps in fours take them in turns."""

    orientation: str  # row: channels are rows in memory; column; or any
    ways: tuple[tuple[Instruction, ...], ...]
    loop: Loop | None  # none: the whole kernel

    @property
    def trace(self) -> tuple[Instruction, ...]:
        return max(self.ways, key=len)

    def count(self, *names: str) -> int:
        return sum(x.name in names for x in self.trace)

    def accesses(self, *sizes: int) -> int:
        """To global memory, of so many bytes per lane."""
        return sum(global_bytes(x.op) in sizes for x in self.trace)

    @cached_property
    def loaded(self) -> int:
        """Bytes per lane that come in vectors: what is streamed, and not a scalar beside it."""
        return sum(global_bytes(x.op) for x in self.trace if is_vector(x) and not _stores(x))

    @cached_property
    def stored(self) -> int:
        return sum(global_bytes(x.op) for x in self.trace if _stores(x))


def _stores(x: Instruction) -> bool:
    return x.name in ("STG", "ST") and is_vector(x)


def main_loops(function: Function) -> list[MainLoop]:
    """In the order of their addresses; the whole kernel, if it has none."""
    moving = [loop for loop in function.loops if _number(function, loop, is_vector)]
    moving = [loop for loop in moving if _number(function, loop, _multiplies)] or moving
    moving = [loop for loop in moving if not _number(function, loop, _stores)] or moving
    inner = [a for a in moving if not any(b.blocks < a.blocks for b in moving)]
    lean = [loop for loop in inner if not _guarded(function, loop)] or _leanest(function, inner)
    if not lean:
        ends = {b for b in function.order if not function.successors[b]}
        return [MainLoop("any", (path(function, 0, ends, set(function.order), True),), None)]
    if len(lean) == 4 and _number(function, lean[0], _multiplies):
        without = sorted(lean, key=lambda loop: _number(function, loop, _sums))[:2]
        lean = [loop for loop in lean if loop not in without]
    found = [(_turns(function, loop), loop) for loop in lean]
    orientations = _orientations([ways[0] for ways, _ in found])
    return [MainLoop(o, *f) for o, f in zip(orientations, found, strict=True)]


def way_to(function: Function, main: MainLoop) -> tuple[Instruction, ...]:
    """The shortest way from the kernel's first instruction to its main loop: neither through other
    loops, nor through what one thread of a block computes for all."""
    if main.loop is None:
        return ()
    before = {b for b in function.order if b not in main.loop.blocks}
    ends = {b for b in before if main.loop.head in function.successors[b]}
    return path(function, 0, ends, before, guarded=True, shortest=True)


def _orientations(traces: list[tuple[Instruction, ...]]) -> list[str]:
    """Which of two loops has channels by row: a row of X in memory is one channel's.

    X is then multiplied as it lies, where ldmatrix or wgmma transposes it by column; dots read 16
    bytes of z at a time, for the k of a load, where by column its elements meet one k; `apply`
    reads a coefficient per row, where columns keep theirs; and the sparse projection turns places
    within a load.
    """
    if len(traces) != 2:
        return ["any"] * len(traces)

    def signs(trace: tuple[Instruction, ...]) -> tuple[int, ...]:
        transposed = sum(".MT88" in x.op or ".tnspA" in x.operands for x in trace)
        z_wide = sum((1 if ".128" in x.op else -1) for x in trace if x.name == "LDS")
        coefficients, turns = sum(map(is_scalar, trace)), sum(x.name == "SEL" for x in trace)
        return -transposed, z_wide, coefficients, turns

    return ["row", "column"] if signs(traces[0]) > signs(traces[1]) else ["column", "row"]


def _multiplies(x: Instruction) -> bool:
    return products(x.op) > 0


def _sums(x: Instruction) -> bool:
    return x.name == "FFMA"


def _number(function: Function, loop: Loop, of_kind: Callable[[Instruction], bool]) -> int:
    return sum(of_kind(x) for b in loop.blocks for x in function.blocks[b])


def _guarded(function: Function, loop: Loop) -> bool:
    """It reads or writes element by element somewhere: a guard's loop has 8 scalars of bf16 and one
    vector, beside at least 4 vectors of the way around it."""
    return _scalars(function, loop) >= 1.5


def _scalars(function: Function, loop: Loop) -> float:
    """For each vector."""
    return _number(function, loop, is_scalar) / _number(function, loop, is_vector)


def _leanest(function: Function, loops: list[Loop]) -> list[Loop]:
    """Those near the one with the fewest scalars: four codes of a byte are one, too."""
    least = min((_scalars(function, loop) for loop in loops), default=0.0)
    return [loop for loop in loops if _scalars(function, loop) <= 1.5 * least]


def _turns(function: Function, loop: Loop) -> tuple[tuple[Instruction, ...], ...]:
    """The main way, or both of them if the loop moves before and after it multiplies."""
    inside = [b for b in function.order if b in loop.blocks]
    multiply = [i for i, b in enumerate(inside) if any(map(_multiplies, function.blocks[b]))]
    move = [i for i, b in enumerate(inside) if any(global_bytes(x.op) for x in function.blocks[b])]
    sides = [{inside[i] for i in move if multiply and i < multiply[0]},
             {inside[i] for i in move if multiply and i > multiply[-1]}]  # fmt: skip
    return tuple(
        path(function, loop.head, set(loop.ends), loop.blocks - other, _guarded(function, loop))
        for other in (sides if all(sides) else [set()])
    )


def path(
    function: Function,
    start: int,
    ends: set[int],
    blocks: AbstractSet[int],
    guarded: bool,
    shortest: bool = False,
) -> tuple[Instruction, ...]:
    """The main way, or the shortest, from ``start`` to one of ``ends`` within ``blocks``."""

    def weight(b: int, s: int | None) -> _Weight:
        moved = avoided = computed = length = 0
        for x in executed(function, b, s):
            length += 1
            scalar = is_scalar(x)
            moved += is_vector(x) or _multiplies(x) or (scalar and not guarded)
            avoided += (scalar and guarded) or (x.name == "CALL" and not x.conditional)
            computed += x.name == "MUFU"
        return (0, 0, 0, -length) if shortest else (moved, -avoided, computed, -length)

    best: dict[int, tuple[_Weight, int | None]] = {}
    for b in reversed([b for b in function.order if b in blocks]):
        ways: list[tuple[_Weight, int | None]] = [(weight(b, None), None)] if b in ends else []
        for s in function.successors[b]:
            if s in best and s != start:
                total = tuple(x + y for x, y in zip(weight(b, s), best[s][0], strict=True))
                ways.append((total, s))  # type: ignore[arg-type]
        if ways:
            best[b] = max(ways, key=lambda way: way[0])
    trace: list[Instruction] = []
    block: int | None = start
    while block is not None:
        following = best[block][1]
        trace += executed(function, block, following)
        block = following
    return tuple(trace)


def executed(function: Function, block: int, following: int | None) -> list[Instruction]:
    """Of a block that goes on to ``following``: its branch then tells whether a guard held."""
    code = function.blocks[block]
    last = code[-1]
    guard = re.match(r"@(!?)(P\d)$", last.guard or "")
    if following is None or guard is None or not re.match("BRA 0x", f"{last.op} {last.operands}"):
        return code
    held = function.blocks[following][0].address == last.target
    predicate, off = guard[2], f"@{'!' * (bool(guard[1]) != held)}{guard[2]}"
    found = [last]
    for i, x in reversed(list(enumerate(code[:-1]))):
        if predicate in x.operands.split(", ")[:2]:  # written here
            return [*code[: i + 1], *found[::-1]]
        if x.guard != off:
            found.append(x)
    return found[::-1]
