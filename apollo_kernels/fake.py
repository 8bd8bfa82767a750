"""The step of fake tensors: its memory, and no numbers.

Under torch's FakeTensorMode a tensor has shape and dtype but no contents, so a whole training step
of a 7B model runs on any machine, and a tracker sees what it allocates. Everything but the numbers
is the optimizer's own code. The verbs here hold as many bytes as those of reference.py do, for as
long; tests/test_memory_claims.py compares the two. That is an upper bound for the kernels, whose
workspace is a few floats per channel. Not counted: the temporaries of drawing a projection (kernels
and the compiled generator have none), and the projections that a CPU keeps (cpu.ProjectionCache).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apollo_kernels import int8
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals, compute_dtype
from apollo_kernels.reference import _CHUNK

BY_ADDRESS = False
SAME_ORDER = False

# Bytes per weight of a chunk while an update is rounded by chance: the float32 weights, and mostly
# the random words, which PyTorch computes as int64. From the second chunk on the bits of the one
# before are still there. Ragged: the last group of a row is short, so that rows are padded.
ROUNDED = {"chance": (28, 32), "int8": (29, 32), "ragged int8": (38, 38)}
# The same of an element whose narrow moments are rounded: both in float32, and the random words.
# Then an int8 weight adds its float32 weights, old and new, and the bits of the chunk before.
NARROW = {torch.bfloat16: 42, torch.uint8: 45}
NARROW_INT8 = (8, 12)


def takes(item: LowRank | Dense) -> bool:
    return isinstance(item.weight, FakeTensor)


def family(item: LowRank | Dense) -> Hashable:
    return id(item)


def build(items: Sequence[LowRank], *, separate: bool) -> LowRankBatch:
    (item,) = items
    return LowRankBatch(item)


def build_dense(items: Sequence[Dense]) -> DenseBatch:
    (item,) = items
    return DenseBatch(item)


# ---- bytes ---------------------------------------------------------------------------------------


def _chunk(shape: Sequence[int]) -> int:
    """The elements that reference.py widens at a time."""
    size = math.prod(shape)
    return size if size <= _CHUNK else max(1, _CHUNK * shape[0] // size) * (size // shape[0])


@dataclass(frozen=True)
class Bytes:
    """What a low-rank step takes beside weight, gradient and state.

    held: R and q, from ``project`` to the end of ``apply``. The others are added while they run.
    """

    held: int
    project: int
    scale: int
    apply: int

    @property
    def most(self) -> int:
        return self.held + max(self.project, self.scale, self.apply)


def low_rank_bytes(
    channels: int,
    k: int,
    rank: int,
    dtype: torch.dtype,
    *,
    decays: bool = False,
    rounded: str = "",
    sparse: bool = False,
) -> Bytes:
    """Of X [channels, k]; ``dtype``: of weight and gradient; ``rounded``: a key of ROUNDED."""
    wide = compute_dtype(dtype).itemsize
    chunk, copy = _chunk((channels, k)), wide if dtype.itemsize < wide else 0
    r, several = wide * channels * rank, chunk < channels * k
    if sparse and rank > 1:  # integers per k, and the chunk in the order of R's rows
        project = 64 * k + chunk * (copy + 2 * wide)
    else:  # P; then X and X^2, or R whose parts are joined
        project = wide * rank * k + max(r * several, chunk * (copy + wide))
    if rounded:
        update = ROUNDED[rounded][several]
    else:  # W widened and G, or what W decays by; a former W goes when the next one is there
        update = max(2 * copy, copy * (1 + several) + wide * decays)
    return Bytes(r + wide * channels, project, r, chunk * update)


def dense_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    decays: bool = False,
    rounded: str = "",
    moments: torch.dtype = torch.float32,
) -> int:
    """The same for a dense step, which has one verb; ``moments``: the dtype that they have."""
    wide = compute_dtype(dtype).itemsize
    chunk, copies = _chunk(shape), 2 if dtype.itemsize < wide else 0
    several = chunk < math.prod(shape)
    if moments in NARROW:
        return chunk * (NARROW[moments] + (NARROW_INT8[several] if rounded else 0))
    if rounded:
        return chunk * ROUNDED[rounded][several]
    return chunk * wide * (copies + 2 + decays)  # gradient and weight; N, W and its decay


# ---- the back end --------------------------------------------------------------------------------


def _rounded(item: LowRank | Dense, hyper: Hyper) -> str:
    if item.grid is not None:
        columns = item.weight.shape[1]
        return int8_format(columns, int8.group_size(columns, item.grid.shape[1]))
    chance = hyper.stochastic_rounding and isinstance(item, LowRank)
    return "chance" if chance and item.weight.dtype == torch.bfloat16 else ""


def int8_format(columns: int, group: int) -> str:
    return "ragged int8" if columns % group else "int8"


class LowRankBatch:
    """One matrix; it keeps no gradient."""

    def __init__(self, item: LowRank):
        m, n = item.weight.shape
        self.channels, self.k = (m, n) if item.rows else (n, m)
        self.item, self.dtype = replace(item, grad=item.weight), item.grad.dtype
        self.device = item.weight.device
        self.held: Tensor | None = None

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        self.held = None

    def _bytes(self, hyper: Hyper) -> Bytes:
        return low_rank_bytes(
            self.channels,
            self.k,
            self.item.exp_avg.shape[1],
            self.dtype,
            decays=bool(hyper.weight_decay),
            rounded=_rounded(self.item, hyper),
            sparse=hyper.distribution == "sparse",
        )

    def project(self, hyper: Hyper, signals: Signals) -> None:
        self.held = _memory(self._bytes(hyper).held, self.device)
        _memory(self._bytes(hyper).project, self.device)

    def square_norm(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        _memory(self._bytes(hyper).scale, self.device)

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        _memory(self._bytes(hyper).apply, self.device)

    def scales(self, hyper: Hyper) -> list[Tensor]:
        return [torch.empty((0,), device=self.device)]


class DenseBatch:
    """One dense parameter; it keeps no gradient."""

    def __init__(self, item: Dense):
        self.item, self.dtype = replace(item, grad=item.weight), item.grad.dtype

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        pass

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        item, decays = self.item, bool(hyper.weight_decay)
        rounded, shape = _rounded(item, hyper), item.weight.shape or (1,)
        moments = item.exp_avg.dtype
        size = dense_bytes(shape, self.dtype, decays=decays, rounded=rounded, moments=moments)
        _memory(size, item.weight.device)


def _memory(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
