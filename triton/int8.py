"""int8 weights in registers: the arithmetic of apollo_kernels/int8.py, operation for operation.

Tiles are [rows, columns] of the parameter's matrix, and one column of grids stands for GROUP of
codes. div_rn, since Triton's / is approximate; no product is followed by a sum that it could be
fused with, unless it is exact.
"""

import triton
import triton.language as tl

from apollo_kernels import int8 as contract

MARGIN = tl.constexpr(contract.MARGIN)
ONE_STEP = tl.constexpr(1 / contract.STEPS)
LARGEST = tl.constexpr(contract.LARGEST)
SMALLEST_SCALE = tl.constexpr(contract.SMALLEST_SCALE)
TO_NEAREST = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to whole numbers


@triton.jit
def scale_and_zero(grid):
    """Both as float32."""
    return (grid & -256).to(tl.float32, bitcast=True), (grid & 255).to(tl.float32)


@triton.jit
def spread(x, GROUP: tl.constexpr):
    """[rows, groups] -> [rows, columns]: to each weight what its group has."""
    ROWS: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], (ROWS, GROUPS, GROUP)), (ROWS, GROUPS * GROUP))


@triton.jit
def dequantize(codes, grid, GROUP: tl.constexpr):
    """uint8 codes and int32 grids to float32, exactly."""
    scale, zero = scale_and_zero(grid)
    return (codes.to(tl.float32) - spread(zero, GROUP)) * spread(scale, GROUP)


@triton.jit
def fit(low, high):
    """The grid of groups that reach from low <= 0 to high >= 0."""
    step = (high - low) * ONE_STEP
    bits = tl.maximum((step.to(tl.int32, bitcast=True) + 255) & -256, SMALLEST_SCALE)
    zero = tl.ceil(tl.div_rn(-low, bits.to(tl.float32, bitcast=True))).to(tl.int32) + MARGIN
    return bits | zero


@triton.jit
def renewed(grid, low, high):
    """The grid where it still suits groups that reach from low to high, else a new one."""
    scale, zero = scale_and_zero(grid)
    fresh = fit(low, high)
    fresh_scale, _ = scale_and_zero(fresh)
    inside = (tl.div_rn(low, scale) + zero >= 0.0) & (tl.div_rn(high, scale) + zero <= 255.0)
    return tl.where(inside & (2 * fresh_scale >= scale), grid, fresh)


@triton.jit
def encode(w, grid, bits, GROUP: tl.constexpr):
    """Codes on a grid that covers w: floor(x + bits / 65536), x rounded to 16 bits of fraction."""
    scale, zero = scale_and_zero(grid)
    x = tl.div_rn(w, spread(scale, GROUP)) + spread(zero, GROUP)
    whole = tl.floor(x)
    fraction = ((x - whole) * 65536.0 + TO_NEAREST) - TO_NEAREST
    fixed = (whole.to(tl.int32) << 16) + fraction.to(tl.int32)
    fixed = tl.minimum(tl.maximum(fixed, 0), 255 << 16)
    return ((fixed + bits.to(tl.int32)) >> 16).to(tl.uint8)


@triton.jit
def requantize(old, new, inside, grid, bits, GROUP: tl.constexpr):
    """Codes and grids of updated weights. A NaN changes nothing; what lies outside counts as 0."""
    ROWS: tl.constexpr = old.shape[0]
    GROUPS: tl.constexpr = old.shape[1] // GROUP
    new = tl.where(new == new, new, old)
    new = tl.where(inside, tl.minimum(tl.maximum(new, -LARGEST), LARGEST), 0.0)
    groups = tl.reshape(new, (ROWS, GROUPS, GROUP))
    low, high = tl.minimum(tl.min(groups, 2), 0.0), tl.maximum(tl.max(groups, 2), 0.0)
    grid = renewed(grid, low, high)
    return encode(new, grid, bits, GROUP), grid
