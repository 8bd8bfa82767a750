"""int8 weights in numbers: uint8 codes, and a grid for each group of neighbours in a row.

    w = (code - zero) scale        scale 16 significant bits, zero in [0, 255]: exact in float32

A grid is one int32: the bits of scale, a float32 whose lowest 8 are 0, and zero in their place.
Nothing but IEEE operations in this order, so that every back end finds the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_GROUP = 8  # neighbours that share one call of the generator
MARGIN = 8  # codes that a new grid leaves free on either side, so that a group may grow
STEPS = 254 - 2 * MARGIN  # what remains: 255, and one because zero is a whole number
LARGEST = 2.0**126  # updated weights saturate here: differences and codes beyond stay finite
SMALLEST_SCALE = 0x00800000  # the bits of 2^-126, the smallest normal float32
NEAREST = 0x8000  # random bits that are none: rounds to the nearest code


def group_size(columns: int, groups: int) -> int:
    """The number of neighbours that share a grid: of powers of two only one fits both."""
    size = SMALLEST_GROUP
    while -(-columns // size) > groups:
        size *= 2
    if -(-columns // size) != groups:
        raise ValueError(f"no power of two cuts rows of {columns} weights into {groups} groups")
    return size


def scale_and_zero(grid: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32, of the grid's shape."""
    return (grid & -256).view(torch.float32), (grid & 255).to(torch.float32)


def _grouped(t: Tensor, size: int) -> Tensor:
    """[m, n] -> [m, groups, size]; the last group is filled up with 0, which every range has."""
    m, n = t.shape
    short = -n % size
    return (pad(t, (0, short)) if short else t).reshape(m, (n + short) // size, size)


def _flat(t: Tensor, columns: int) -> Tensor:
    return t.flatten(1)[:, :columns]


def dequantize(codes: Tensor, grid: Tensor) -> Tensor:
    """codes [m, n] uint8 and grid [m, groups] int32 -> w [m, n] float32, exactly."""
    (m, n), groups = codes.shape, grid.shape[1]
    size = group_size(n, groups)
    if n % size and groups > 1:  # the last group by itself, since no view cuts the rows
        whole = n - n % size
        parts = (codes[:, :whole], grid[:, :-1]), (codes[:, whole:], grid[:, -1:])
        return torch.cat([dequantize(*part) for part in parts], dim=1)
    scale, zero = (t.unsqueeze(-1) for t in scale_and_zero(grid))
    steps = codes.reshape(m, groups, n // max(groups, 1)).to(torch.float32)
    return steps.sub_(zero).mul_(scale).view(m, n)


def fit(low: Tensor, high: Tensor) -> Tensor:
    """The grid of groups that reach from ``low`` <= 0 to ``high`` >= 0, both float32.

    Zero is a code of every grid: so a weight of 0 stays exactly 0.
    """
    step = (high - low) * (1 / STEPS)
    bits = ((step.view(torch.int32) + 255) & -256).clamp(min=SMALLEST_SCALE)
    zero = torch.ceil(-low / bits.view(torch.float32)).to(torch.int32) + MARGIN
    return bits | zero


def renewed(grid: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``grid`` where it still suits groups that reach from ``low`` to ``high``, else a new one.

    A new grid rounds all weights of its group anew. So it comes only where a weight has left the
    old one, or where the old one is more than twice as coarse as it need be.
    """
    scale, zero = scale_and_zero(grid)
    fresh = fit(low, high)
    inside = (low / scale + zero >= 0) & (high / scale + zero <= 255)
    fine = 2 * scale_and_zero(fresh)[0] >= scale
    return torch.where(inside & fine, grid, fresh)


def encode(w: Tensor, grid: Tensor, bits: Tensor | int) -> Tensor:
    """Codes of w [m, groups, size] on a grid that covers it: floor(x + bits / 65536).

    x = w / scale + zero is rounded to a multiple of 1/65536 first, to nearest, so that tiny updates
    up and down are cut off alike. A w that is (code - zero) scale gives this code, whatever the
    bits: quotient and sum are then exact.
    """
    scale, zero = scale_and_zero(grid)
    x = (w / scale.unsqueeze(-1)).add_(zero.unsqueeze(-1))
    fixed = x.mul_(65536).round_().clamp_(0, 255 * 65536).to(torch.int32)
    return (fixed.add_(bits) >> 16).to(torch.uint8)


def _range(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of w [m, groups, size]: [m, groups] each, with 0 in between."""
    return w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)


def quantize(w: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """w [m, n] float32, finite -> codes [m, n] and grid [m, groups], to the nearest."""
    groups = _grouped(w.clamp(-LARGEST, LARGEST), size)
    grid = fit(*_range(groups))
    return _flat(encode(groups, grid, NEAREST), w.shape[1]).contiguous(), grid


def requantize(codes: Tensor, grid: Tensor, old: Tensor, new: Tensor, bits: Tensor) -> None:
    """Stores updated weights in ``codes`` [m, n] and ``grid``, rounded by chance.

    Args
        old, new: float32 [m, n], what the codes stand for and what it has become. A NaN changes
            nothing, and beyond LARGEST a weight saturates.
        bits: int32 [m, n] in [0, 65536), uniform.
    """
    size = group_size(codes.shape[1], grid.shape[1])
    new = torch.where(new == new, new, old).clamp_(-LARGEST, LARGEST)
    groups = _grouped(new, size)
    grid.copy_(renewed(grid, *_range(groups)))
    codes.copy_(_flat(encode(groups, grid, _grouped(bits, size)), codes.shape[1]))
