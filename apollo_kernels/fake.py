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
from dataclasses import replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apollo_kernels.batch import Dense, Hyper, LowRank, Signals, compute_dtype
from apollo_kernels.reference import _CHUNK

BY_ADDRESS = False
SAME_ORDER = False

# Temporaries of the rounding by chance, in bytes per weight of a chunk: mostly the random words,
# which PyTorch computes as int64.
STOCHASTIC, INT8 = 28, 40


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


def low_rank_bytes(
    channels: int, k: int, rank: int, dtype: torch.dtype, rounding: int = 0
) -> tuple[int, int, int, int]:
    """What a low-rank step takes beside weight, gradient and state.

    Args
        dtype: of weight and gradient; ``rounding``: STOCHASTIC, INT8 or 0.
    Returns
        bytes of R and q, held from ``project`` to the end of ``apply``; then what is added to them
        while ``project``, ``scale`` and ``apply`` run.
    """
    wide = compute_dtype(dtype).itemsize
    chunk, copied = _chunk((channels, k)), wide if dtype.itemsize < wide else 0
    r = wide * channels * rank
    parts = r if chunk < channels * k else 0  # the rows of R stand apart before they are joined
    project = wide * rank * k + parts + chunk * (copied + wide)
    apply = chunk * (2 * copied + rounding)
    return r + wide * channels, project, r, apply


def dense_bytes(
    shape: Sequence[int], dtype: torch.dtype, decays: bool = False, rounding: int = 0
) -> int:
    """The same for a dense step, which has one verb."""
    wide = compute_dtype(dtype).itemsize
    copies = 2 + decays + (2 if dtype.itemsize < wide else 0)  # N and W; g and W where they widen
    return _chunk(shape) * (copies * wide + rounding)


# ---- the back end --------------------------------------------------------------------------------


def _rounding(item: LowRank | Dense, hyper: Hyper) -> int:
    if getattr(item, "grid", None) is not None:
        return INT8
    chance = hyper.stochastic_rounding and isinstance(item, LowRank)
    return STOCHASTIC if chance and item.weight.dtype == torch.bfloat16 else 0


class LowRankBatch:
    """One matrix."""

    def __init__(self, item: LowRank):
        self.shape = item.weight.shape if item.rows else item.weight.shape[::-1]
        self.item, self.dtype = replace(item, grad=item.weight), item.grad.dtype  # it keeps none
        self.device = item.weight.device
        self.held: Tensor | None = None

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        self.held = None

    def _bytes(self, hyper: Hyper) -> tuple[int, int, int, int]:
        rank, rounding = self.item.exp_avg.shape[1], _rounding(self.item, hyper)
        return low_rank_bytes(*self.shape, rank, self.dtype, rounding)

    def project(self, hyper: Hyper, signals: Signals) -> None:
        held, project, _, _ = self._bytes(hyper)
        self.held = _memory(held, self.device)
        _memory(project, self.device)

    def square_norm(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        _memory(self._bytes(hyper)[2], self.device)

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        _memory(self._bytes(hyper)[3], self.device)


class DenseBatch:
    """One dense parameter."""

    def __init__(self, item: Dense):
        self.item, self.dtype = replace(item, grad=item.weight), item.grad.dtype  # it keeps none

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        pass

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        item, decays = self.item, bool(hyper.weight_decay)
        shape = item.weight.shape or (1,)
        size = dense_bytes(shape, self.dtype, decays, _rounding(item, hyper))
        _memory(size, item.weight.device)


def _memory(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)
