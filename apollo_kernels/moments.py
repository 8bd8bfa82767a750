"""Moments of a dense parameter in a byte each: codes, and a unit for each block of neighbours.

    value = m 2^k unit      code = 8 k + m, where m < 16, and m >= 8 unless k = 0

So a code is a float of its own: 3 bits behind the leading one, and equal steps below 8 units. M has
a sign and k up to 14, V has none and k up to 30: V is a square, and reaches down twice as far. The
unit is a power of two, so that all products are exact and another unit moves no value that it can
hold. A block is BLOCK neighbours in a row of the parameter's matrix, shape[0] x the rest; a vector
is one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from apollo_kernels.batch import Dense

DENSE_STATES = ("float32", "bfloat16", "int8")
MOMENTS = ("exp_avg", "exp_avg_sq")

BLOCK = 128
LARGEST = 15 * 2.0**124  # narrow moments saturate here, so that none is rounded up to infinity
SMALLEST_UNIT = 2.0**-126  # the smallest normal float32
NEAREST = 0x8000  # random bits that are none: rounds to the nearest code


class Code(NamedTuple):
    """One of the two kinds of codes."""

    signed: bool
    doublings: int  # the largest k

    @property
    def last(self) -> int:
        """The largest code, but for the sign."""
        return 8 * self.doublings + 15


CODES = {"exp_avg": Code(True, 14), "exp_avg_sq": Code(False, 30)}


def blocks(shape: Sequence[int]) -> tuple[int, int]:
    """How many blocks a parameter has: [rows, blocks in each row]."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, -(-math.prod(shape[1:] if len(shape) > 1 else shape) // BLOCK)


def lie_as_counted(item: Dense) -> bool:
    """Whether a kernel that walks memory meets elements in the order in which the contract counts
    them, and whole blocks: rows, of whole blocks or only one."""
    tensors = [item.weight, item.exp_avg, item.exp_avg_sq, *(item.units or ())]
    rows, in_row = blocks(item.weight.shape)
    whole = rows <= 1 or rows * in_row * BLOCK == item.weight.numel()
    return all(t.is_contiguous() for t in tensors) and (item.units is None or whole)


def _power(k: Tensor) -> Tensor:
    """2^k in float32, for -126 <= k <= 127."""
    return (k + 127 << 23).view(torch.float32)


def _spread(unit: Tensor, columns: int) -> Tensor:
    """[rows, blocks] -> [rows, columns]: to each value its block's."""
    return unit.repeat_interleave(BLOCK, dim=1)[:, :columns]


def decode(codes: Tensor, unit: Tensor, code: Code) -> Tensor:
    """codes uint8 [rows, columns] and units float32 [rows, blocks] -> float32, exactly."""
    q = codes.to(torch.int32)
    size = q & 127 if code.signed else q
    k = ((size >> 3) - 1).clamp_(min=0)
    value = (size - 8 * k).to(torch.float32) * _power(k) * _spread(unit, codes.shape[1])
    return torch.where(q > 127, -value, value) if code.signed else value


def fit(highest: Tensor, code: Code) -> Tensor:
    """The smallest unit whose codes reach ``highest`` >= 0, rounded up too."""
    exponent = highest.view(torch.int32) + (1 << 20) >> 23  # of the next code
    return (exponent - 3 - code.doublings).clamp_(min=1).bitwise_left_shift_(23).view(torch.float32)


def renewed(unit: Tensor, highest: Tensor, code: Code) -> Tensor:
    """``unit`` where it still suits blocks that reach to ``highest``, else a new one.

    So a block whose values stay as they are keeps all of its bits.
    """
    fresh, unit = fit(highest, code), unit.clamp(min=SMALLEST_UNIT)
    largest = 15 * 2.0**code.doublings
    return torch.where((highest <= largest * unit) & (2 * fresh >= unit), unit, fresh)


def encode(x: Tensor, unit: Tensor, bits: Tensor | int, code: Code) -> Tensor:
    """Codes of x float32 [rows, columns] in units that reach it, rounded up or down by chance.

    A value that has a code gets it, whatever the bits. A V above 0 never becomes 0, which would
    make N infinite: the smallest code is rounded up to.

    Args
        bits: int32 [rows, columns] in [0, 65536), uniform.
    """
    y = x.abs() / _spread(unit, x.shape[1])
    k = ((y.view(torch.int32) >> 23) - 130).clamp_(0, code.doublings)
    fixed = (y * _power(-k) * 65536).round_().to(torch.int32)
    q = ((fixed + bits >> 16) + 8 * k).clamp_(max=code.last)
    if code.signed:
        return torch.where(x < 0, q + 128, q).to(torch.uint8)
    return torch.where(x > 0, q.clamp_(min=1), 0).to(torch.uint8)


def highest_of(x: Tensor) -> Tensor:
    """The largest magnitude of each block: [rows, columns] -> [rows, blocks]."""
    rows, columns = x.shape
    short = -columns % BLOCK
    filled = pad(x.abs(), (0, short)) if short else x.abs()
    return filled.view(rows, (columns + short) // BLOCK, BLOCK).amax(-1)


def rows_of(codes: Tensor, unit: Tensor, some: slice) -> tuple[Tensor, Tensor]:
    """A part of a parameter's codes and units as matrices: views.

    ``some``: of dimension 0; of a vector, from the beginning of a block on.
    """
    if codes.dim() > 1:
        return codes[some].flatten(1), unit[some]
    return codes[some].view(1, -1), unit[:, some.start // BLOCK : -(-some.stop // BLOCK)]


def store(x: Tensor, codes: Tensor, unit: Tensor, bits: Tensor | int, code: Code) -> None:
    """Writes x [rows, columns] over codes and units of that many blocks."""
    x = x.clamp(-LARGEST, LARGEST)
    unit.copy_(renewed(unit, highest_of(x), code))
    codes.copy_(encode(x, unit, bits, code))


def to_codes(x: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """A whole moment, of any shape and order in memory, to the nearest codes; and its units."""
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    unit = torch.zeros(blocks(x.shape), dtype=torch.float32, device=x.device)
    rows, columns = unit.shape[0], math.prod(x.shape) // max(unit.shape[0], 1)
    store(x.reshape(rows, columns).float(), codes.view(rows, columns), unit, NEAREST, CODES[key])
    return codes, unit


def from_codes(codes: Tensor, unit: Tensor, key: str) -> Tensor:
    """The other way: float32 of the codes' shape."""
    rows = unit.shape[0]
    matrix = codes.reshape(rows, codes.numel() // max(rows, 1))
    return decode(matrix, unit, CODES[key]).view(codes.shape)
