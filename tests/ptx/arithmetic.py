"""What PTX's instructions make of numbers: functions over numpy arrays, one element per thread.

Integers wrap. Float sums, products and fma round once; .rn divisions, roots and conversions are
IEEE's. An .approx function is the float64 result rounded to float32, and ``Model.noise`` (0 to 1)
disturbs it by that share of the error that NVIDIA documents. mma sums in float64 and rounds once;
with ``Model.cut_sums`` it cuts terms off as tensor cores do.
"""

from __future__ import annotations

import ctypes

import numpy as np

u1, u2, u4, u8 = (np.dtype(f"u{n}") for n in (1, 2, 4, 8))
i1, i2, i4, i8 = (np.dtype(f"i{n}") for n in (1, 2, 4, 8))
f2, f4, f8 = (np.dtype(f"f{n}") for n in (2, 4, 8))
where = np.where


class Model:
    noise = 0.0
    cut_sums = False
    random = np.random.default_rng(0)


def distinct(x):
    """Sorted, each once; np.unique hashes integers, which is slower here."""
    x = np.sort(x, axis=None)
    return x[np.r_[True, x[1:] != x[:-1]]] if x.size else x


# Floats.


def fma32(a, b, c):
    """The product is exact in float64. A sum that rounding twice could spoil is made odd first."""
    p, c = a.astype(f8) * b.astype(f8), c.astype(f8)
    s = p + c
    bits = s.view(u8)
    risky = ((bits & 0x1FFFFFFF) == 0x10000000) | ((np.abs(s) < 2.0**-125) & (s != 0))
    if risky.any():
        back = s - p
        lost = (p - (s - back)) + (c - back)
        odd = (lost != 0) & np.isfinite(lost) & ((bits & 1) == 0)
        away = (lost > 0) == (s > 0)
        s = where(odd, where(away, bits + 1, bits - 1), bits).view(f8)
    return s.astype(f4)


_libm_fma = ctypes.CDLL("libm.so.6").fma
_libm_fma.restype, _libm_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def fma64(a, b, c):
    if a.size > 1 and (a[0] == a).all() and (b[0] == b).all() and (c[0] == c).all():
        return np.full(a.size, _libm_fma(a[0], b[0], c[0]))
    return np.array(
        [_libm_fma(*x) for x in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], f8
    )


def ftz(x):
    """Subnormal numbers become zeros."""
    return where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def _disturbed(y, absolute, relative):
    if not Model.noise:
        return y
    r = Model.random.uniform(-1, 1, y.shape) * Model.noise
    return y + r * np.fmax(absolute, relative * np.abs(y))


# The function, and its documented absolute and relative errors (PTX ISA).
_APPROXIMATE = {
    "ex2": (np.exp2, 0, 2.0**-22),
    "sin": (np.sin, 2.0**-20.5, 0),
    "cos": (np.cos, 2.0**-20.5, 0),
    "tanh": (np.tanh, 0, 2.0**-11),
    "sqrt": (np.sqrt, 0, 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 0, 2.0**-22.9),
    "rcp": (lambda x: 1 / x, 0, 2.0**-23),
}


def approx(name, x, flush):
    x = (ftz(x) if flush else x).astype(f8)
    if name == "lg2":  # an absolute error near 1, where the result is small
        y = np.log2(x)
        near = (x > 0.5) & (x < 2)
        y = where(near, _disturbed(y, 2.0**-22, 0), _disturbed(y, 0, 2.0**-22))
    else:
        function, absolute, relative = _APPROXIMATE[name]
        y = _disturbed(function(x), absolute, relative)
    y = y.astype(f4)
    return ftz(y) if flush else y


def div_approx(a, b, flush):
    y = _disturbed(a.astype(f8) / b.astype(f8), 0, 2.0**-22).astype(f4)
    return ftz(y) if flush else y


def rcp_gross(x):
    """rcp.approx.ftz.f64: 20 bits of mantissa in and out, the low word is zero."""
    x = (ftz(x).view(u8) & 0xFFFFFFFF00000000).view(f8)
    return ((1 / x).view(u8) & 0xFFFFFFFF00000000).view(f8)


def to_bf16(x):
    bits = x.view(u4)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return where(np.isnan(x), u2.type(0x7FFF), rounded.astype(u2))


def from_bf16(x):
    return (x.astype(u4) << 16).view(f4)


def float_to_int(x, to, how):
    """Saturates. NaN becomes 0, or the top bit alone where 64 bits are on either side."""
    info, nan = np.iinfo(to), np.isnan(x)
    y = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[how](x.astype(f8))
    low, high = y < float(info.min), y >= float(info.max) + (1 if to.itemsize < 8 else 0)
    r = where(low | high | nan, 0, y).astype(to)
    r = where(high, to.type(info.max), where(low, to.type(info.min), r))
    wide = x.dtype == f8 or to.itemsize == 8
    top = np.array(1 << (8 * to.itemsize - 1), f"u{to.itemsize}").astype(to)
    return where(nan, top if wide else to.type(0), r)


def min_max(how, a, b, nan):
    """A number wins over NaN, but under .NaN."""
    return getattr(np, f"{how}imum" if nan else f"f{how}")(a, b)


def compare(how, a, b):
    signs = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # of unsigned integers
    how = signs.get(how, how)
    return {
        "eq": lambda: a == b, "lt": lambda: a < b, "le": lambda: a <= b, "gt": lambda: a > b,
        "ge": lambda: a >= b, "ne": lambda: (a < b) | (a > b), "equ": lambda: ~((a < b) | (a > b)),
        "neu": lambda: a != b, "ltu": lambda: ~(a >= b), "leu": lambda: ~(a > b),
        "gtu": lambda: ~(a <= b), "geu": lambda: ~(a < b), "num": lambda: (a == a) & (b == b),
        "nan": lambda: (a != a) | (b != b),
    }[how]()  # fmt: skip


# Integers.


def divide(a, b):
    """Towards zero; a division by zero gives all ones, as hardware does."""
    safe = where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return where(b == 0, ~b.dtype.type(0), a // safe)
    q = a // safe
    q = q + ((a - q * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return where(b == 0, b.dtype.type(-1), q)


def remainder(a, b):
    return where(b == 0, a, a - divide(a, b) * b)


def shift_left(a, n):
    bits = 8 * a.itemsize
    return where(n < bits, a << (n & (bits - 1)).astype(a.dtype), a.dtype.type(0))


def shift_right(a, n):
    bits = 8 * a.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(n, bits - 1).astype(a.dtype)
    return where(n < bits, a >> (n & (bits - 1)).astype(a.dtype), a.dtype.type(0))


def funnel(a, b, n, left, wrap):
    """shf: the high (left) or low word of b:a shifted."""
    n = (n & 31 if wrap else np.minimum(n, 32)).astype(u8)
    both = (b.astype(u8) << np.uint64(32)) | a
    return ((both << n) >> np.uint64(32) if left else both >> n).astype(u4)


def mul_high(a, b):
    if a.itemsize == 4:
        wide = u8 if a.dtype.kind == "u" else i8
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)
    bits = [(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([x & (2**64 - 1) for x in bits], u8).view(a.dtype)


def bfi(a, b, at, size):
    at, size = np.minimum(at & 255, 32).astype(u8), np.minimum(size & 255, 32).astype(u8)
    mask = ((np.uint64(1) << size) - np.uint64(1)) << at
    return (((a.astype(u8) << at) & mask) | (b.astype(u8) & ~mask)).astype(u4)


def bfe(a, at, size):
    """Signed: filled with the field's top bit, or beyond the word with the word's."""
    at, size = np.minimum(at & 255, 32).astype(i8), np.minimum(size & 255, 32).astype(i8)
    if a.dtype.kind == "u":
        return ((a.astype(u8) >> at.astype(u8)) & ((1 << size) - 1).astype(u8)).astype(u4)
    wide = a.astype(i8) >> at
    left = np.minimum(64 - size, 63)
    return where(size == 0, 0, (wide << left) >> left).astype(i4)


def prmt(a, b, selector):
    both = (b.astype(u8) << np.uint64(32)) | a
    out = np.zeros(a.size, u8)
    for i in range(4):
        pick = (selector >> (4 * i)).astype(u8) & 15
        byte = (both >> (8 * (pick & 7))) & 0xFF
        sign = where(byte & 0x80, 0xFF, 0).astype(u8)
        out |= where(pick & 8, sign, byte) << np.uint64(8 * i)
    return out.astype(u4)


def lop3(a, b, c, table):
    """Any function of three bits, by its table."""
    out = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            x, y, z = (v if i & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1)))
            out |= x & y & z
    return out


def popc(x):
    bits = np.unpackbits(np.ascontiguousarray(x).view(u1).reshape(x.size, -1), axis=1)
    return bits.sum(1).astype(u4)


def clz(x):
    return np.array([8 * x.itemsize - int(v).bit_length() for v in x], u4)


def brev(x):
    return np.array([int(f"{int(v):032b}"[::-1], 2) for v in x], u4)


# Matrices.


def _halves(registers, kind):
    """Registers of two 16-bit numbers -> float64 [warps, 8, 4, registers, 2]; lane = 4 g + t."""
    pairs = np.stack(registers, 1).view(u2)
    values = from_bf16(pairs) if kind == "bf16" else pairs.view(f2)
    return values.reshape(-1, 8, 4, len(registers), 2).astype(f8)


def _cut_sum(products, c):
    """Terms lose what lies below the largest one's 24 bits and 2 more (Fasi et al. 2021)."""
    terms = np.concatenate([products, c[..., None]], -1)
    if not np.isfinite(terms).all():
        return terms.sum(-1).astype(f4).astype(f8)
    top = np.frexp(np.abs(terms).max(-1))[1]
    unit = np.ldexp(1.0, top - 26)
    total = np.trunc(terms / unit[..., None]).sum(-1) * unit
    step = np.ldexp(1.0, np.frexp(total)[1] - 24)
    return np.trunc(total / step) * step


def mma(a, b, c, kind):
    """mma.m16n8k16.row.col with float32 sums. With lane = 4 g + t, by the ISA's fragment tables:
    A[g + 8 (i & 1), 2 t + h + 8 (i >> 1)] is half h of register i; B[2 t + h + 8 i, g] likewise;
    C and D [g + 8 (i >> 1), 2 t + (i & 1)] is register i."""
    lanes = c[0].size
    am = _halves(a, kind).reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
    bm = _halves(b, kind).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
    cm = np.stack(c, 1).view(f4).astype(f8).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)
    d = cm.reshape(-1, 16, 8)
    if not Model.cut_sums:
        d = am @ bm + d
    else:
        for k in (0, 8):
            d = _cut_sum(am[:, :, None, k : k + 8] * bm[:, None, k : k + 8].swapaxes(2, 3), d)
    d = d.astype(f4).reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return list(np.ascontiguousarray(d).reshape(4, lanes).view(u4))
