"""Reads SASS: the functions of a binary as instructions with their control codes, and their blocks.

cuobjdump prints each instruction as text and as two words of 64 bits; bits 105 to 125 of the pair
are the control code that ptxas wrote: how long to wait before the warp's next instruction, and
which of six scoreboards it sets and waits for. The layout is that of sm_80 to sm_90.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
    r"\s*/\* 0x([0-9a-f]{16}) \*/"
)
_NO_SCOREBOARD = 7


@dataclass(slots=True, eq=False)  # two of one text are two
class Instruction:
    address: int
    guard: str | None  # @P0, @!UP3; None: always
    name: str  # LDG
    op: str  # with its modifiers: LDG.E.128
    operands: str
    control: int

    @property
    def stall(self) -> int:
        """Clocks until the warp may issue again."""
        return self.control & 15

    @property
    def yields(self) -> bool:
        return not self.control >> 4 & 1

    @property
    def sets(self) -> int | None:
        """The scoreboard that is released when the result is written."""
        board = self.control >> 5 & 7
        return None if board == _NO_SCOREBOARD else board

    @property
    def frees(self) -> int | None:
        """The scoreboard that is released when the operands were read."""
        board = self.control >> 8 & 7
        return None if board == _NO_SCOREBOARD else board

    @property
    def waits(self) -> int:
        """A bit for each scoreboard that must be released first."""
        return self.control >> 11 & 63

    @property
    def target(self) -> int | None:
        """The address that a branch or call goes to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name in _JUMPS else None
        return int(found[1], 16) if found else None

    @property
    def conditional(self) -> bool:
        """By its guard, or by a predicate among the operands: BRA.U UP0, 0x80; BRA.DIV goes where a
        warp has parted."""
        if self.guard is not None and self.guard != "@PT":
            return True
        parted = self.op.startswith("BRA.DIV")
        return self.name == "BRA" and (parted or re.match(r"!?U?P\d", self.operands) is not None)


_JUMPS = ("BRA", "CALL", "JMP")
_ENDS = ("EXIT", "RET", "KILL", "BPT", "BRX")


@cache
def global_bytes(op: str) -> int:
    """How many bytes per lane an instruction moves between global memory and the SM."""
    name = op.split(".", 1)[0]
    if name not in ("LDG", "STG", "LD", "ST", "LDGSTS"):
        return 0
    if re.search(r"\.[US]8\b", op):
        return 1
    if re.search(r"\.[US]16\b", op):
        return 2
    bits = re.search(r"\.(64|128|256)\b", op)
    return int(bits[1]) // 8 if bits else 4


def is_vector(x: Instruction) -> bool:
    """Several neighbours at once: 8 bytes per lane or more."""
    return global_bytes(x.op) >= 8


def is_scalar(x: Instruction) -> bool:
    return 0 < global_bytes(x.op) < 8


@cache
def products(op: str) -> int:
    """How many of 16 x 8 x 16 numbers a warp multiplies on the tensor cores. HGMMA.64x128x16 is
    shared by the four warps of a warpgroup, with 16 rows for each."""
    if op.startswith("HGMMA."):
        return int(op.removeprefix("HGMMA.64x").split("x", 1)[0]) // 8
    return int(op.startswith("HMMA."))


@dataclass(frozen=True)
class Loop:
    """``head`` and the blocks that lead back to it; ``ends`` are those that jump there."""

    head: int
    ends: tuple[int, ...]
    blocks: frozenset[int]


class Function:
    """The code of one kernel; blocks are numbered in the order of their addresses."""

    def __init__(self, text: str):
        self.instructions = [
            Instruction(
                int(address, 16),
                guard or None,
                op.split(".", 1)[0],
                op,
                operands,
                int(word, 16) >> 41,
            )
            for address, guard, op, operands, word in _LINE.findall(text)
        ]

    @cached_property
    def blocks(self) -> list[list[Instruction]]:
        starts = {0}
        at = {x.address: i for i, x in enumerate(self.instructions)}
        for i, x in enumerate(self.instructions):
            if x.target in at:
                starts.add(at[x.target])
            if x.target is not None or x.name in _ENDS:
                starts.add(i + 1)
        edges = sorted(starts | {len(self.instructions)})
        cut = [self.instructions[a:b] for a, b in pairwise(edges)]
        return [block for block in cut if block]

    @cached_property
    def successors(self) -> list[tuple[int, ...]]:
        at = {block[0].address: b for b, block in enumerate(self.blocks)}
        found = []
        for b, block in enumerate(self.blocks):
            last, after = block[-1], []
            if last.name != "CALL" and last.target in at:
                after.append(at[last.target])
            leaves = last.name in _ENDS or last.name in ("BRA", "JMP")
            if (not leaves or last.conditional) and b + 1 < len(self.blocks):
                after.append(b + 1)
            # A guarded call that does not come back is how ptxas leaves a loop for far code.
            if last.name == "CALL" and last.conditional and last.target in at:
                after.append(at[last.target])
            found.append(tuple(dict.fromkeys(after)))
        return found

    @cached_property
    def order(self) -> list[int]:
        """Blocks that are reached, each before those that only it leads to (reverse postorder)."""
        done, stack, seen = [], [(0, iter(self.successors[0]))], {0}
        while stack:
            block, rest = stack[-1]
            following = next((s for s in rest if s not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return done[::-1]

    @cached_property
    def predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {b: [] for b in self.order}
        for b in self.order:
            for s in self.successors[b]:
                found[s].append(b)
        return found

    @cached_property
    def dominators(self) -> dict[int, int]:
        """Of each block the last one that every way to it goes through."""
        place = {b: i for i, b in enumerate(self.order)}
        found = {0: 0}
        changed = True
        while changed:
            changed = False
            for b in self.order[1:]:
                ways = [p for p in self.predecessors[b] if p in found]
                best = ways[0]
                for way in ways[1:]:
                    while best != way:
                        if place[best] > place[way]:
                            best = found[best]
                        else:
                            way = found[way]
                if found.get(b) != best:
                    found[b], changed = best, True
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """In the order of their heads' addresses."""
        ends: dict[int, list[int]] = {}
        for b in self.order:
            for s in self.successors[b]:
                trap = s == b and len(self.blocks[b]) == 1  # a branch to itself ends the code
                if not trap and self._dominates(s, b):
                    ends.setdefault(s, []).append(b)
        return [Loop(head, tuple(e), self._body(head, e)) for head, e in sorted(ends.items())]

    def _dominates(self, a: int, b: int) -> bool:
        while b != a and b != 0:
            b = self.dominators[b]
        return a == b

    def _body(self, head: int, ends: list[int]) -> frozenset[int]:
        body, todo = {head}, list(ends)
        while todo:
            b = todo.pop()
            if b not in body:
                body.add(b)
                todo += self.predecessors[b]
        return frozenset(body)


def functions(text: str) -> Iterator[tuple[str, Function]]:
    """(mangled name, code) of what ``cuobjdump -sass`` printed of one architecture."""
    for piece in text.split("Function : ")[1:]:
        name, code = piece.split("\n", 1)
        yield name.strip(), Function(code)
