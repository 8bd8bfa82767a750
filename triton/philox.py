"""Tiles of z(j, k), drawn in registers: the contract of DESIGN.md, "Random numbers".

Philox4x32-7 through tl.philox, all four words of each call used: 14 issue slots per normal, 1.3 per
sign. Counters must be uint32 tensors: with int64 ones tl.philox silently becomes philox4x64.
"""

import torch
import triton
import triton.language as tl

from apollo_kernels import philox as contract
from apollo_kernels.triton_kernels.element import INTERPRET

ROUNDS = tl.constexpr(contract.ROUNDS)
GAUSSIAN = tl.constexpr(contract.GAUSSIAN)
RADEMACHER = tl.constexpr(contract.RADEMACHER)
ROUNDING = tl.constexpr(contract.ROUNDING)
ROUNDING_INT8 = tl.constexpr(contract.ROUNDING_INT8)
SPARSE = tl.constexpr(contract.SPARSE)
MOMENTS = tl.constexpr(contract.MOMENTS)
FAST = torch.version.cuda is not None and not INTERPRET.value  # PTX instead of Triton's functions


@triton.jit
def _ptx(name: tl.constexpr, x):
    """One of the special function unit's instructions; Triton's own forms take three times more."""
    return tl.inline_asm_elementwise(name, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exact_box_muller(w0, w1):
    """The same in float64, so that every card, and the CPU, rounds to the same bf16."""
    u = ((w0 >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07
    angle = (w1 >> 9).to(tl.float64) * (1.1920928955078125e-07 * 6.283185307179586)
    rho = tl.sqrt(-2.0 * tl.log(u))
    return (rho * tl.cos(angle)).to(tl.float32), (rho * tl.sin(angle)).to(tl.float32)


@triton.jit
def box_muller(w0, w1, FAST: tl.constexpr):
    """Two normals from two words. Both uniforms are exact in float32: no integer is converted."""
    u = ((w0 >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.99999994039535522461
    x = ((w1 >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    x *= 6.283185307179586  # the angle less pi, hence the signs below
    if FAST:
        square = -1.3862943611198906 * _ptx("lg2.approx.ftz.f32 $0, $1;", u)  # -2 ln 2
        rho = _ptx("sqrt.approx.ftz.f32 $0, $1;", square)
        cos, sin = _ptx("cos.approx.ftz.f32 $0, $1;", x), _ptx("sin.approx.ftz.f32 $0, $1;", x)
        return -rho * cos, -rho * sin
    else:
        rho = tl.sqrt(-2.0 * tl.log(u))
        return -rho * tl.cos(x), -rho * tl.sin(x)


@triton.jit
def words(key, c0, j, epoch, KIND: tl.constexpr):
    """Philox of the counters (c0, j, epoch, KIND), uint32 tensors that broadcast."""
    c0, j = tl.broadcast(c0, j)
    zero = c0 * 0
    return tl.philox(key, c0, j, zero + epoch.to(tl.uint32), zero + KIND, ROUNDS)


@triton.jit
def pick(w0, w1, w2, w3, v):
    """Word v of four."""
    return tl.where(v < 2, tl.where(v == 0, w0, w1), tl.where(v == 2, w2, w3))


@triton.jit
def normals(
    key, epoch, j0, k0, R: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr
):
    """z [R, BK] float32, not yet rounded; k0 and BK are multiples of 16."""
    BLOCKS: tl.constexpr = BK // 16
    c0 = 4 * (k0 // 16 + tl.arange(0, BLOCKS))[:, None] + tl.arange(0, 4)[None, :]
    j = (j0 + tl.arange(0, R)).to(tl.uint32)[:, None, None]
    w0, w1, w2, w3 = words(key, c0.to(tl.uint32)[None, :, :], j, epoch, GAUSSIAN)
    if EXACT:
        z0, z1 = exact_box_muller(w0, w1)
        z2, z3 = exact_box_muller(w2, w3)
    else:
        z0, z1 = box_muller(w0, w1, FAST)
        z2, z3 = box_muller(w2, w3, FAST)
    z = tl.join(tl.join(z0, z1), tl.join(z2, z3))  # [R, block, t, e, h]
    return tl.reshape(tl.permute(z, (0, 1, 4, 2, 3)), (R, BK))  # k = 16 block + 8h + 2t + e


@triton.jit
def signs(key, epoch, j0, k0, R: tl.constexpr, BK: tl.constexpr):
    """z [R, BK] float32; BK divides 128 and k0 is a multiple of it, so one word per call serves."""
    t = tl.arange(0, 4)
    c0 = (4 * (k0 // 512) + t).to(tl.uint32)[None, :]
    j = (j0 + tl.arange(0, R)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = words(key, c0, j, epoch, RADEMACHER)
    w = pick(w0, w1, w2, w3, k0 % 512 // 128)  # [R, t]
    RUNS: tl.constexpr = BK // 8  # a power of two
    w = (w >> (k0 % 128 // 8))[:, :, None]
    # Joined, not broadcast: for a broadcast Triton would draw each word anew in five layouts.
    for turn in tl.static_range(RUNS.bit_length() - 1):
        w = tl.permute(tl.join(w, w >> (1 << turn)), (0, 1, 3, 2))
        w = tl.reshape(w, (R, 4, 2 << turn))  # [R, t, run]: run i of 8 is bit i of the word
    bits = tl.permute(tl.join(w, w >> 16), (0, 2, 1, 3)) << 31  # [R, run, t, e]
    z = (bits | 0x3F800000).to(tl.float32, bitcast=True)
    return tl.reshape(z, (R, BK))  # k = 8 run + 2t + e


@triton.jit
def draw(
    key, epoch, j0, k0, R: tl.constexpr, BK: tl.constexpr,
    SIGNS: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z(j, k) [R, BK] float32 for j >= j0, k >= k0, before the contract's rounding to bf16."""
    if SIGNS:
        return signs(key, epoch, j0, k0, R, BK)
    else:
        return normals(key, epoch, j0, k0, R, BK, EXACT, FAST)


@triton.jit
def sparse_signs(key, epoch, b16, j):
    """The signs of row j of R in the 16 blocks from 16 b16 on: one per bit, the lowest first."""
    w0, w1, w2, w3 = words(key, b16.to(tl.uint32), (j // 8).to(tl.uint32), epoch, SPARSE)
    return pick(w0, w1, w2, w3, j % 8 // 2) >> (j % 2 * 16).to(tl.uint32)


@triton.jit
def sparse_places(key, epoch, b8):
    """Four words that say how the 8 blocks from 8 b8 on are placed."""
    no_row = tl.full((), 0xFFFFFFFF, tl.uint32)
    return words(key, b8.to(tl.uint32), no_row, epoch, SPARSE)


@triton.jit
def sparse_place(places, b, size):
    """(turn, rotation) of block b: a number below 8, and one below ``size``."""
    word = pick(places[0], places[1], places[2], places[3], b % 8 // 2)
    place = (word >> (b % 2 * 16).to(tl.uint32) & 0xFFFF).to(tl.int32)
    return place % 8, ((place // 8).to(tl.int64) * size >> 13).to(tl.int32)


@triton.jit
def rounding(key, step, i0, l0, M: tl.constexpr, N: tl.constexpr, KIND: tl.constexpr = ROUNDING):
    """16 random bits [M, N] uint32 for weights (i, l) from (i0, l0) on; l0 and N divide by 8."""
    c0 = (l0 // 8 + tl.arange(0, N // 8)).to(tl.uint32)[None, :]
    i = (i0 + tl.arange(0, M)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = words(key, c0, i, step, KIND)
    return tl.reshape(_halves(w0, w1, w2, w3), (M, N))


@triton.jit
def rounding_anywhere(key, step, i0, l0, M: tl.constexpr, N: tl.constexpr):
    """``rounding`` for any l0: a call per weight instead of one for eight."""
    place = (l0 + tl.arange(0, N))[None, :]
    i = (i0 + tl.arange(0, M)).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = words(key, (place // 8).to(tl.uint32), i, step, ROUNDING)
    return pick(w0, w1, w2, w3, place % 8 // 2) >> (place % 2 * 16).to(tl.uint32) & 0xFFFF


@triton.jit
def _halves(w0, w1, w2, w3):
    """[rows, calls] -> [rows, calls, 2, 2, 2]: the eight 16-bit halves of each call, in order."""
    w = tl.permute(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (0, 1, 3, 2))
    return tl.join(w & 0xFFFF, w >> 16)


@triton.jit
def rounding_of_groups(key, step, first, columns, M: tl.constexpr, N: tl.constexpr):
    """16 random bits [M, N] uint32 to round M N neighbours in memory to int8, from weight number
    ``first`` on. The rows of the parameter have ``columns`` weights; first, N and columns divide
    by 8."""
    call = first // 8 + (N // 8) * tl.arange(0, M)[:, None] + tl.arange(0, N // 8)[None, :]
    per_row = columns // 8
    c0, i = (call % per_row).to(tl.uint32), (call // per_row).to(tl.uint32)
    w0, w1, w2, w3 = words(key, c0, i, step, ROUNDING_INT8)
    return tl.reshape(_halves(w0, w1, w2, w3), (M, N))


@triton.jit
def moment_bits(key, step, first, N: tl.constexpr):
    """16 random bits [N] uint32 each for M and V of the elements from number ``first`` on; first
    and N divide by 4."""
    call = first // 4 + tl.arange(0, N // 4)
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = words(key, low, high, step, MOMENTS)
    w = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (N,))  # in order
    return w & 0xFFFF, w >> 16
