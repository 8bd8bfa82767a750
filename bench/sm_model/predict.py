"""From main loops to the share of the floor of a kernel, and to the milliseconds of a step.

A block lives for its prologue, the turns of its main loop and an epilogue; blocks fill a card in
waves. The floor is the bytes that must move over the card's copy bandwidth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

import loop_figures
from loop_figures import gradient_bytes, moved_bytes, weight_bytes
from main_loops import MainLoop, way_to
from sass import Function, Instruction
from shapes import LLAMA

from sm_model.cards import Card
from sm_model.simulate import Result, simulate

# Of a block: what csrc/apollo.h and sparse_share.h say; tests/test_sm_model.py compares.
STREAM_VECTORS = 8  # of a thread of `apply` and `adamw`
MMA_CHANNELS = {"bfloat16": 256, "float16": 128, "float": 128}
DOT_CHANNELS = {"row": 64, "column": 256}
SPARSE_CHANNELS = {8: 32, 4: 64}  # of a block by row, by elements in 16 bytes
SPARSE_HOLDERS = {"row": 32, "column": 8}

MOMENT_BYTES = 16  # per entry of R: M and V, read and written, in float32
EPILOGUE = 1.05  # times the floor of the moments' bytes [guess]
STREAM = 0.95  # of the copy bandwidth at most, for kernels with more than a copy's streams [guess]
LAYERS = LLAMA["7b"].layers
TURNS = 8  # that are simulated
SMALL_LAUNCHES = 0.03  # ms of `scale` and `limit` over a whole model [guess]


@dataclass(frozen=True)
class Kernel:
    """As compiled for one architecture; ``blocks``: how many an SM holds."""

    name: str
    function: Function
    threads: int
    blocks: int

    @cached_property
    def loops(self) -> dict[str, MainLoop]:
        found = loop_figures.main_loops_of(self.name, self.function)
        return {loop.orientation: loop for loop in found}

    @property
    def warps(self) -> int:
        return self.threads // 32

    def loop(self, orientation: str) -> MainLoop:
        return self.loops.get(orientation) or self.loops["any"]


@dataclass(frozen=True)
class Work:
    """Of a block of `project`: elements of X that it reads, entries of R that it updates, and how
    many blocks read the same X, all but one of them from L2."""

    elements: int
    entries: int
    readers: int = 1


@dataclass(frozen=True)
class Prediction:
    simulated: float  # clocks of a block, where an SM is full of them
    floor: float  # of its bytes, in clocks of the SM's share of the bandwidth

    @property
    def clocks(self) -> float:
        return max(self.simulated, self.floor / STREAM)

    @property
    def share(self) -> float:
        return self.floor / self.clocks


def work(kernel: str, orientation: str, k: int, rank: int) -> Work:
    """Of one block of `project` over a matrix with ``k`` contracted and many channels."""
    dtype = gradient_bytes(kernel)
    if kernel.startswith("project_dots"):
        return Work(DOT_CHANNELS[orientation] * k, 0)
    if kernel.startswith("project_tiles"):
        element, rows_held = loop_figures.arguments(kernel)[:2]
        channels, rows = MMA_CHANNELS[element], int(rows_held)
        tiles = math.ceil(rank / rows)
        return Work(channels * k, channels * min(rows, rank), tiles)
    load = 16 // dtype
    if orientation == "row":
        channels, unit = SPARSE_CHANNELS[load], load
    else:
        channels, unit = 32 * load, 32 // load
    tiles = math.ceil(rank / unit / SPARSE_HOLDERS[orientation])
    return Work(channels * k // tiles, channels * math.ceil(rank / tiles))


def project(kernel: Kernel, orientation: str, card: Card, k: int, rank: int) -> Prediction:
    what = work(kernel.name, orientation, k, rank)
    loop = kernel.loop(orientation)
    per_turn = loop_figures.elements(kernel.name, loop) * kernel.threads
    turn = _turn(
        card, loop.ways[0], kernel.warps, kernel.blocks, float(what.readers), other=loop.ways[-1]
    )
    main = what.elements / per_turn * turn.clocks / kernel.blocks
    prologue = _prologue(card, kernel, loop) / kernel.blocks
    moments = what.entries * MOMENT_BYTES / card.share
    read = what.elements * moved_bytes(kernel.name) / what.readers / card.share
    return Prediction(prologue + main + EPILOGUE * moments, read + moments)


def stream_vector(kernel: str) -> int:
    """Elements of a vector: 16 bytes of the widest of what is streamed."""
    moments = kernel.startswith("adamw")
    wide = moments or weight_bytes(kernel) == 4 or gradient_bytes(kernel) == 4
    return 4 if wide else 8


def named(kernels: Iterable[str], beginning: str) -> str | None:
    """The kernel whose name begins so; of `apply` that which rounds to nearest."""
    ends = (f"{beginning}>", f"{beginning}, ToNearest>")
    found = (name for name in kernels if name in ends)
    return next(found, None)


def stream(kernel: Kernel, orientation: str, card: Card) -> Prediction:
    """Of `apply` or `adamw`: blocks are short, so that a turn of the model is a block's life."""
    loop = kernel.loop(orientation)
    own = STREAM_VECTORS * stream_vector(kernel.name)
    turns = max(1, own // loop_figures.elements(kernel.name, loop))
    elements = turns * loop_figures.elements(kernel.name, loop) * kernel.threads
    before = way_to(kernel.function, loop)
    life = _turn(
        card, before + loop.trace * turns, kernel.warps, kernel.blocks, beginning=len(before)
    )
    clocks = life.clocks / kernel.blocks
    return Prediction(clocks, elements * moved_bytes(kernel.name) / card.share)


def predict(kernel: Kernel, orientation: str, card: Card, k: int, rank: int) -> Prediction:
    if kernel.name.startswith("project"):
        return project(kernel, orientation, card, k, rank)
    return stream(kernel, orientation, card)


@cache
def _turn(
    card: Card,
    trace: tuple[Instruction, ...],
    warps: int,
    blocks: int,
    bandwidth: float = 1.0,
    beginning: int = 0,
    other: tuple[Instruction, ...] = (),
) -> Result:
    return simulate(card, trace, warps, blocks, TURNS, bandwidth, beginning, other)


def _prologue(card: Card, kernel: Kernel, loop: MainLoop) -> float:
    before = way_to(kernel.function, loop)
    if not before:
        return 0.0
    return _turn(card, before, kernel.warps, 1, beginning=len(before)).clocks


def matrices(layers: int = LAYERS) -> Counter[tuple[str, int, int]]:
    """How many of LLaMA-7B's matrices have an orientation, channels and K, if "std" projects."""
    shapes = LLAMA["7b"].matrices(layers)
    return Counter(("row", m, n) if m >= n else ("column", n, m) for m, n in shapes)


def weights(layers: int = LAYERS) -> int:
    return sum(count * c * k for (_, c, k), count in matrices(layers).items())


@dataclass(frozen=True)
class StepModel:
    """Predicted milliseconds of a step over the matrices of LLaMA-7B, or of some of its layers,
    with bf16 weights and gradients."""

    card: Card
    kernels: dict[str, Kernel]  # by name
    layers: int = LAYERS

    def project_ms(self, name: str, rank: int) -> float:
        """All matrices are one launch: blocks of either orientation fill the SMs in waves."""
        kernel, clocks, blocks = self.kernels[name], 0.0, 0
        for (orientation, channels, k), count in matrices(self.layers).items():
            what = work(name, orientation, k, rank)
            own = count * channels * k / what.elements * what.readers
            clocks += own * project(kernel, orientation, self.card, k, rank).clocks
            blocks += math.ceil(own)
        slots = self.card.sms * kernel.blocks
        waves = math.ceil(blocks / slots) * slots / blocks
        return 1e3 * clocks * waves / self.card.sms / self.card.clock

    def apply_ms(self) -> float:
        name = named(self.kernels, "apply_update<bfloat16, bfloat16")
        assert name is not None
        kernel, total = self.kernels[name], 0.0
        for (orientation, channels, k), count in matrices(self.layers).items():
            share = stream(kernel, orientation, self.card).share
            total += count * channels * k * moved_bytes(kernel.name) / share
        return 1e3 * total / self.card.bandwidth

    def step_ms(self, name: str, rank: int) -> float:
        return self.project_ms(name, rank) + self.apply_ms() + SMALL_LAUNCHES

    def floor_ms(self, rank: int) -> float:
        """Two reads of G, W in and out, and the moments."""
        moments = sum(n * c * min(rank, k) for (_, c, k), n in matrices(self.layers).items())
        return 1e3 * (8 * weights(self.layers) + MOMENT_BYTES * moments) / self.card.bandwidth

    def adamw_ms(self) -> float:
        """PyTorch's fused AdamW with bf16 moments: 14 bytes per weight, at copy bandwidth."""
        return 1e3 * 14 * weights(self.layers) / self.card.bandwidth


STEPS = {  # what the table says -> kernel of `project`, rank
    "gaussian, rank 128": ("project_tiles<bfloat16, 128, Gaussian>", 128),
    "gaussian, rank 256": ("project_tiles<bfloat16, 128, Gaussian>", 256),
    "sparse, rank 128": ("project_sparse<bfloat16>", 128),
    "sparse, rank 256": ("project_sparse<bfloat16>", 256),
    "Mini": ("project_dots<bfloat16, 1, Gaussian>", 1),
}
