"""What the main loops of a kernel cost per element, read from its SASS."""

from __future__ import annotations

import re
from dataclasses import dataclass

from main_loops import MainLoop, main_loops
from sass import Function, products

_BYTES = {"float": 4, "bfloat16": 2, "float16": 2, "int8_code": 1}
# Of X in a turn of `project_tiles`, of 512 threads: channels times kStep times kSteps.
TILE_THREADS = 512
TILES = {"bfloat16": 256 * 32 * 2, "float16": 128 * 32, "float": 128 * 32}
STREAMS = ("project_tiles", "project_dots", "project_sparse", "apply_update", "adamw_update")


@dataclass(frozen=True)
class LoopFigures:
    """``elements``: of the gradient, per lane and turn, so that instructions per element are those
    of a warp for 32 of them."""

    orientation: str
    instructions: int
    elements: int
    accesses: dict[int, int]  # to global memory, by bytes per lane
    tensor: int  # products of 16 x 8 x 16 by a warp
    mufu: int

    @property
    def scalar(self) -> int:
        return sum(count for size, count in self.accesses.items() if size < 8)

    @property
    def per_element(self) -> float:
        return self.instructions / self.elements


def arguments(kernel: str) -> list[str]:
    """bfloat16, 128 and Gaussian of project_tiles<bfloat16, 128, Gaussian>."""
    found = re.search(r"<(.*)>", kernel)
    return found[1].split(", ") if found else []


def weight_bytes(kernel: str) -> int:
    return _BYTES[arguments(kernel)[0]]


def gradient_bytes(kernel: str) -> int:
    """`apply` and `adamw` have the weight's dtype first, then the gradient's."""
    own = arguments(kernel)
    return _BYTES[own[1] if kernel.startswith(("apply", "adamw")) else own[0]]


def moment_bytes(kernel: str) -> int:
    """Of one of the two moments that `adamw` walks."""
    return _BYTES[arguments(kernel)[2]]


def moved_bytes(kernel: str) -> int:
    """Per element of a stream, without what other parts of a step move."""
    if not kernel.startswith(("apply", "adamw")):
        return gradient_bytes(kernel)
    moments = 4 * moment_bytes(kernel) if kernel.startswith("adamw") else 0
    return 2 * weight_bytes(kernel) + gradient_bytes(kernel) + moments


def elements(kernel: str, loop: MainLoop) -> int:
    """From what a turn stores, where it stores, since scales may be loaded as vectors too."""
    if kernel.startswith("project_tiles"):
        return TILES[arguments(kernel)[0]] // TILE_THREADS
    if kernel.startswith("adamw"):  # four codes are no vector, and grids and units none
        weight, moments = (x if x > 1 else 0 for x in (weight_bytes(kernel), moment_bytes(kernel)))
        vectors = gradient_bytes(kernel) + 2 * weight + 4 * moments
        return (loop.loaded + loop.stored) // vectors
    if kernel.startswith("apply"):
        if weight_bytes(kernel) == 1:  # codes are no vector beside wide gradients, and grids none
            return loop.accesses(16) * 16 // gradient_bytes(kernel)
        return loop.stored // weight_bytes(kernel)
    return loop.loaded // gradient_bytes(kernel)


def main_loops_of(kernel: str, function: Function) -> list[MainLoop]:
    return main_loops(function) if kernel.startswith(STREAMS) else []


def figures(kernel: str, function: Function) -> list[LoopFigures]:
    """Empty for kernels that stream nothing."""
    return [
        LoopFigures(
            loop.orientation,
            len(loop.trace),
            elements(kernel, loop),
            {size: n for size in (16, 8, 4, 2, 1) if (n := loop.accesses(size))},
            sum(products(x.op) for x in loop.trace),
            loop.count("MUFU"),
        )
        for loop in main_loops_of(kernel, function)
    ]
