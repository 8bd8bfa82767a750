"""Narrow moments in registers: the arithmetic of apollo_kernels/moments.py, step for step.

Tiles are [blocks, BLOCK] of neighbours in memory, and one column of units stands for a block. All
products are by powers of two, and so exact: fused or not, they give the same codes.
"""

import triton
import triton.language as tl

from apollo_kernels import moments as contract

BLOCK = tl.constexpr(contract.BLOCK)
LARGEST = tl.constexpr(contract.LARGEST)
SMALLEST_UNIT = tl.constexpr(contract.SMALLEST_UNIT)
M_DOUBLINGS = tl.constexpr(contract.CODES["exp_avg"].doublings)
V_DOUBLINGS = tl.constexpr(contract.CODES["exp_avg_sq"].doublings)
TO_NEAREST = tl.constexpr(1.5 * 2**23)  # added and taken away, it rounds to whole numbers


@triton.jit
def saturated(x):
    """What rounding up leaves finite."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def _power(k):
    """2^k, for -126 <= k <= 127."""
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode(codes, unit, SIGNED: tl.constexpr):
    """uint8 codes [blocks, BLOCK] and units [blocks, 1] to float32, exactly."""
    q = codes.to(tl.int32)
    size = q & 127 if SIGNED else q
    k = tl.maximum((size >> 3) - 1, 0)
    value = (size - 8 * k).to(tl.float32) * _power(k) * unit
    return tl.where(q > 127, -value, value) if SIGNED else value


@triton.jit
def _renewed(unit, highest, DOUBLINGS: tl.constexpr):
    """The unit where it still suits blocks that reach to ``highest``, else a new one."""
    exponent = ((highest.to(tl.int32, bitcast=True) + (1 << 20)) >> 23) - 3 - DOUBLINGS
    fresh = (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)
    unit = tl.maximum(unit, SMALLEST_UNIT)
    top: tl.constexpr = 15 * 2.0**DOUBLINGS
    return tl.where((highest <= top * unit) & (2 * fresh >= unit), unit, fresh)


@triton.jit
def encode(x, unit, bits, SIGNED: tl.constexpr):
    """x [blocks, BLOCK], the old units and random bits -> codes and units."""
    DOUBLINGS: tl.constexpr = M_DOUBLINGS if SIGNED else V_DOUBLINGS
    x = saturated(x)
    unit = _renewed(unit, tl.max(tl.abs(x), 1, keep_dims=True), DOUBLINGS)
    inverse = ((254 << 23) - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    y = tl.abs(x) * inverse
    k = tl.minimum(tl.maximum((y.to(tl.int32, bitcast=True) >> 23) - 130, 0), DOUBLINGS)
    fixed = ((y * _power(-k) * 65536.0 + TO_NEAREST) - TO_NEAREST).to(tl.int32)
    q = tl.minimum(((fixed + bits.to(tl.int32)) >> 16) + 8 * k, 8 * DOUBLINGS + 15)
    signed = tl.where(x < 0.0, q + 128, q)
    q = signed if SIGNED else tl.where(x > 0.0, tl.maximum(q, 1), 0)
    return q.to(tl.uint8), unit
