"""APOLLO once more, from the paper and the contract, in NumPy float64 and plain integers.

It shares no code with the package: a second reading of the same text.
"""

import bisect
import hashlib
import math

import numpy as np

MASK = 0xFFFFFFFF


def philox(counter, key, rounds=7):
    """Philox4x32 (Salmon et al. 2011) on Python integers; key is one 64-bit integer."""
    x0, x1, x2, x3 = counter
    k0, k1 = key & MASK, key >> 32
    for _ in range(rounds):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b & MASK, (a >> 32) ^ x3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return x0, x1, x2, x3


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def key_of(seed, position):
    return splitmix64((splitmix64(seed % 2**64) + position) % 2**64) % 2**63


def key_of_name(seed, name):
    """``name`` as it is without wrappers; the parameter's place has no say."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return key_of(seed, sum(int(digest[2 * i : 2 * i + 2], 16) << 8 * i for i in range(8)))


def key_of_matrix(key, index):
    """The key of matrix ``index`` of an expert weight whose parameter has ``key``."""
    return splitmix64((splitmix64(key) + index) % 2**64) % 2**63


def normal(key, epoch, j, k):
    """z(j, k) before its rounding to bf16."""
    t = k % 8 // 2
    w = philox((4 * (k // 16) + t, j, epoch, 0), key)
    a, b = (w[2], w[3]) if k % 16 >= 8 else (w[0], w[1])
    u1, u2 = ((a >> 9) + 0.5) / 2**23, (b >> 9) / 2**23
    trig = math.sin if k % 2 else math.cos
    return math.sqrt(-2 * math.log(u1)) * trig(2 * math.pi * u2)


def sign(key, epoch, j, k):
    w = philox((4 * (k // 512) + k % 8 // 2, j, epoch, 1), key)
    p = 2 * (k % 512 // 16) + k % 16 // 8
    return -1.0 if w[p // 16] >> (p % 16 + 16 * (k % 2)) & 1 else 1.0


def half_of(words, n):
    """The n-th of the eight 16-bit halves of four words, low half first."""
    return words[n // 2] >> 16 * (n % 2) & 0xFFFF


def nonzero(key, epoch, rank, k):
    """The row and the sign of column k's one nonzero in the sparse projection."""
    b, i = divmod(k, rank)
    place = half_of(philox((b // 8, MASK, epoch, 4), key), b % 8)
    if rank % 8:
        row = (i + (place // 8 * rank >> 13)) % rank
    else:
        groups = rank // 8
        group = (i // 8 + (place // 8 * groups >> 13)) % groups
        row = 8 * group + (i % 8 ^ place % 8)
    signs = philox((b // 16, row // 8, epoch, 4), key)
    bit = b % 16 + 16 * (row % 2)
    return row, -1.0 if signs[row % 8 // 2] >> bit & 1 else 1.0


def to_bfloat16(x):
    """The nearest bf16, ties to even (normal range)."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


def projection(key, epoch, rank, dim, distribution):
    if distribution == "sparse":
        p = np.zeros((rank, dim))
        for k in range(dim):
            row, p_k = nonzero(key, epoch, rank, k)
            p[row, k] = p_k
        return p  # not divided by sqrt(rank)
    if distribution == "rademacher":
        z = [[sign(key, epoch, j, k) for k in range(dim)] for j in range(rank)]
    else:
        z = [[to_bfloat16(normal(key, epoch, j, k)) for k in range(dim)] for j in range(rank)]
    return np.array(z, dtype=np.float64).reshape(rank, dim) / math.sqrt(rank)


def clip_factor(gradients, max_norm):
    """What clipping all ``gradients`` together to a norm of ``max_norm`` multiplies them by."""
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients))
    return min(1.0, max_norm / (norm + 1e-6)), norm


def normalized(m, v, eps):
    """N = M / (sqrt(V) + eps), and 0 where nothing has ever come."""
    denominator = np.sqrt(v) + eps
    return np.where(denominator > 0, m / np.where(denominator > 0, denominator, 1.0), 0.0)


def decayed(w, decay):
    """(1 - decay) w; an infinite weight stays as it is."""
    return np.where(np.isinf(w), w, w - decay * np.where(np.isinf(w), 0.0, w))


def step_size(lr, b1, b2, t, correct_bias):
    return lr * math.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else lr


class Dense:
    """One dense parameter: the rule of a low-rank one, without its projection."""

    def __init__(
        self, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True, start=0
    ):
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, lr * weight_decay
        self.correct_bias, self.t = correct_bias, start
        self.m = self.v = 0.0

    def step(self, w, g):
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        size = step_size(self.lr, b1, b2, self.t, self.correct_bias)
        self.update = size * normalized(self.m, self.v, self.eps)
        return decayed(w, self.decay) - self.update


class Apollo:
    """One parameter under Algorithm 1. ``step(w, g)`` gives the new weight."""

    def __init__(
        self,
        shape,
        *,
        key,
        rank,
        proj_type="std",
        scale_type="channel",
        scale=1.0,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.0,
        update_proj_gap=200,
        correct_bias=True,
        scale_front=False,
        disable_nl=False,
        distribution="gaussian",
        start=0,
    ):
        m, n = shape
        contract_columns = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}
        self.rows = contract_columns[proj_type]
        self.k = n if self.rows else m
        self.rank = min(rank, self.k)
        self.hyper = dict(lr=lr, b1=betas[0], b2=betas[1], eps=eps, wd=weight_decay)
        self.alpha, self.gap = math.sqrt(scale), update_proj_gap
        self.scale_type, self.distribution, self.key = scale_type, distribution, key
        self.correct_bias, self.front, self.no_limiter = correct_bias, scale_front, disable_nl
        self.t = start
        self.m = self.v = 0.0
        self.norm = None  # unset
        self.p = None

    def step(self, w, g):
        h = self.hyper
        x = g if self.rows else g.T
        if self.t % self.gap == 0 or self.p is None:
            epoch = self.t // self.gap & MASK
            self.p = projection(self.key, epoch, self.rank, self.k, self.distribution)
        self.t += 1
        r = x @ self.p.T
        self.m = h["b1"] * self.m + (1 - h["b1"]) * r
        self.v = h["b2"] * self.v + (1 - h["b2"]) * r**2
        adam = normalized(self.m, self.v, h["eps"])
        if self.scale_type == "channel":
            s = np.linalg.norm(adam, axis=1) / (np.linalg.norm(r, axis=1) + 1e-8)
        else:
            s = np.full(len(x), np.linalg.norm(adam) / (np.linalg.norm(r) + 1e-8))
        update = s[:, None] * x
        if self.front:
            update = update * self.alpha
        if not self.no_limiter:
            size = np.linalg.norm(update)
            if self.norm is not None:
                update = update / max(size / (self.norm + 1e-8) / 1.01, 1.0)
            size = np.linalg.norm(update)
            self.norm = size if size >= 1e-8 else None
        if not self.front:
            update = update * self.alpha
        size = step_size(h["lr"], h["b1"], h["b2"], self.t, self.correct_bias)
        self.update = size * (update if self.rows else update.T)
        return decayed(w, h["lr"] * h["wd"]) - self.update


class Experts:
    """An expert weight [E, m, n]: E matrices that have nothing in common but their step."""

    def __init__(self, shape, *, key, **options):
        count, *matrix = shape
        self.matrices = [
            Apollo(tuple(matrix), key=key_of_matrix(key, e), **options) for e in range(count)
        ]

    def step(self, w, g):
        pairs = zip(self.matrices, w, g, strict=True)
        return np.stack([matrix.step(*pair) for matrix, *pair in pairs])


class Int8Group:
    """One group of an int8 weight: up to ``size`` neighbours of a row, one value after the other.

    float32 by NumPy's scalars, which round each operation as IEEE has it.
    """

    MARGIN, STEPS, LARGEST = 8, 238, 2.0**126

    def __init__(self, values):
        values = [self._limited(v) for v in values]
        self.scale, self.zero = self._grid(values)
        self.codes = [self._code(v, 0x8000) for v in values]

    def values(self):
        return [(code - self.zero) * float(self.scale) for code in self.codes]

    def store(self, values, bits):
        """The codes of updated values, with 16 random bits each."""
        values = [self._limited(v) for v in values]
        scale, zero = self._grid(values)
        ends = [self._place(v) for v in (min(0, *values), max(0, *values))]
        if ends[0] < 0 or ends[1] > 255 or 2 * float(scale) < float(self.scale):
            self.scale, self.zero = scale, zero
        self.codes = [self._code(v, b) for v, b in zip(values, bits, strict=True)]

    def _limited(self, value):
        return np.float32(min(max(value, -self.LARGEST), self.LARGEST))

    def _grid(self, values):
        low, high = np.float32(min(0, *values)), np.float32(max(0, *values))
        step = (high - low) * np.float32(1 / self.STEPS)
        mantissa, exponent = math.frexp(float(step))  # 16 significant bits, rounded up
        step = math.ldexp(math.ceil(mantissa * 2**16), exponent - 16)
        scale = np.float32(max(step, 2.0**-126))
        return scale, math.ceil(-low / scale) + self.MARGIN

    def _place(self, value):
        with np.errstate(over="ignore"):
            return np.float32(value) / self.scale + np.float32(self.zero)

    def _code(self, value, bits):
        fixed = round(float(self._place(value)) * 65536)  # to even
        return (min(max(fixed, 0), 255 * 65536) + bits) // 65536


def moment_bits(key, step, e):
    """The 16 random bits of M and those of V, for element e of a dense parameter."""
    call = e // 4
    word = philox((call & MASK, call >> 32, step & MASK, 5), key)[e % 4]
    return word & 0xFFFF, word >> 16


class MomentBlock:
    """Up to 128 neighbours of a moment in a byte each: a table of values, and a unit."""

    def __init__(self, signed, count):
        self.signed, self.last = signed, 127 if signed else 255
        self.table = [
            float(q) if q < 16 else (8 + q % 8) * 2.0 ** (q // 8 - 1) for q in range(self.last + 1)
        ]
        self.unit, self.codes = 0.0, [0] * count

    def values(self):
        signs = [-1 if self.signed and c > 127 else 1 for c in self.codes]
        sizes = [self.table[c % 128 if self.signed else c] for c in self.codes]
        return [s * t * self.unit for s, t in zip(signs, sizes, strict=True)]

    def store(self, values, bits):
        """Values that float32 has, with 16 random bits each."""
        top, highest = self.table[-1], max(map(abs, values))
        fresh = 2.0**-126
        while 2.0**-126 * top < highest and top * fresh <= highest:
            fresh *= 2  # until what is rounded up has a code
        old = max(self.unit, 2.0**-126)
        self.unit = old if highest <= top * old and 2 * fresh >= old else fresh
        self.codes = [self._code(v, b) for v, b in zip(values, bits, strict=True)]

    def _code(self, value, bits):
        y = abs(value) / self.unit
        q = bisect.bisect_right(self.table, y) - 1
        if y > self.table[q]:
            share = (y - self.table[q]) / (self.table[q + 1] - self.table[q])
            q += round(share * 65536) + bits >= 65536  # to even
        if not self.signed:
            return max(q, 1) if value > 0 else q
        return q + 128 * (value < 0)
