"""Elements in memory and in registers: arithmetic is float32, with one rounding at the store.

Triton's interpreter computes wrongly with bf16. There ``element`` names uint16 as the type of bf16
elements, and the integer forms below stand in for the GPU's conversions, bit for bit.
"""

import torch
import triton
import triton.language as tl

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


def element(dtype: torch.dtype) -> tl.dtype:
    """Triton's type for elements of a tensor of ``dtype``."""
    bf16 = tl.uint16 if INTERPRET.value else tl.bfloat16
    known = {torch.bfloat16: bf16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {**known, torch.uint8: tl.uint8}[dtype]  # the codes of an int8 weight


@triton.jit
def round_bf16(x):
    """float32 to the nearest bf16, ties to even, still as float32. NaN stays NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def to_bf16(x):
    """float32 to the nearest bf16: as bf16, or as float32 in the interpreter."""
    if INTERPRET:
        return round_bf16(x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def widen(x):
    """Elements as loaded to float32, exactly."""
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, T: tl.constexpr):
    """float32 to elements of type T, to the nearest."""
    if T == tl.uint16:
        return (round_bf16(x).to(tl.uint32, bitcast=True) >> 16).to(tl.uint16)
    else:
        return x.to(T)


@triton.jit
def finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def round_stochastically(x, bits):
    """float32 cut to bf16's bits after 16 random bits were added; nearly infinite ones stay."""
    raw = x.to(tl.uint32, bitcast=True)
    cut = ((raw + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((raw & 0x7FFFFFFF) < 0x7F7F0000, cut, x)
