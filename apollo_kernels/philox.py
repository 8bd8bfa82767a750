"""The random projection as a pure function of (key, epoch, rank row j, contracted index k).

Philox4x32 with 7 rounds (Salmon et al., SC 2011) turns a counter into four 32-bit words; the words
become normals (Box-Muller) or signs in the order in which one lane holds the 16-deep A operand of
mma.m16n8k16. DESIGN.md, "Random numbers", is the contract; every back end draws the same words, and
nothing drawn here is ever part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apollo_kernels.native import _C

DISTRIBUTIONS = ("gaussian", "rademacher", "sparse")

ROUNDS = 7
# The counter's last word: no two uses of the generator share a counter.
GAUSSIAN, RADEMACHER, ROUNDING, ROUNDING_INT8, SPARSE, MOMENTS = range(6)
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_BLOCK = {"gaussian": 16, "rademacher": 512}  # contracted indices that four calls cover


def _splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


KEY_BITS = 63  # operator schemas refuse integers from 2**63 on


def parameter_key(seed: int, position: int) -> int:
    """The 63-bit Philox key of the parameter at ``position`` (over all groups), given the seed.

    It is equal on every rank of a data-parallel group. The same function of a parameter's key
    gives those of its expert matrices, where ``position`` counts the matrices.
    """
    return _splitmix64((_splitmix64(seed & _MASK64) + position) & _MASK64) & (2**KEY_BITS - 1)


def words(
    key: int,
    c0: Tensor | int,
    c1: Tensor | int,
    c2: Tensor | int,
    c3: Tensor | int,
    rounds: int = ROUNDS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of the counters (c0, c1, c2, c3), which broadcast: four int64 tensors of uint32s.

    An int64 product of two uint32 values wraps exactly as uint64 does, so its halves are a shift
    and a mask away.
    """
    given = (c0, c1, c2, c3)
    device = next((x.device for x in given if isinstance(x, Tensor)), torch.device("cpu"))
    c = [torch.as_tensor(x, dtype=torch.int64, device=device) for x in given]
    k = [key & _MASK32, (key >> 32) & _MASK32]
    for _ in range(rounds):
        p0, p1 = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [
            ((p1 >> 32) & _MASK32) ^ c[1] ^ k[0],
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c[3] ^ k[1],
            p0 & _MASK32,
        ]
        k = [(x + w) & _MASK32 for x, w in zip(k, _WEYL, strict=True)]
    w0, w1, w2, w3 = torch.broadcast_tensors(*c)
    return w0, w1, w2, w3


def _box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words, in float64: rounded to bf16, no libm's last bit shows."""
    u1 = ((w0 >> 9).double() + 0.5) * 2.0**-23
    angle = (w1 >> 9).double() * 2.0**-23 * (2.0 * math.pi)
    rho = torch.sqrt(-2.0 * torch.log(u1))
    return rho * torch.cos(angle), rho * torch.sin(angle)


def _normals(w: Sequence[Tensor], rank: int) -> Tensor:
    """Words [rank, 4 blocks] -> [rank, 16 blocks]: call t gives k = 2t, 2t+1, 2t+8, 2t+9."""
    z = torch.stack([*_box_muller(w[0], w[1]), *_box_muller(w[2], w[3])], dim=-1)
    z = z.view(rank, w[0].shape[1] // 4, 4, 2, 2)  # [rank, block, t, h, e]
    return z.transpose(2, 3).flatten(1)  # k = 16 block + 8h + 2t + e


def _signs(w: Sequence[Tensor], rank: int) -> Tensor:
    """Words [rank, 4 blocks] -> [rank, 512 blocks]: bit i + 16e of word v of call t is the sign of
    k = 8p + 2t + e in its block, where p = 16v + i counts the runs of 8."""
    shift = torch.arange(32, device=w[0].device).view(2, 16).t()  # [i, e] -> i + 16e
    packed = torch.stack(list(w), dim=-1).view(rank, w[0].shape[1] // 4, 4, 4, 1, 1)
    bits = (packed >> shift) & 1  # [rank, block, t, v, i, e]
    return (1 - 2 * bits).permute(0, 1, 3, 4, 2, 5).flatten(1)


def draw(
    key: int,
    epoch: int,
    rank: int,
    dim: int,
    distribution: str = "gaussian",
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """z(j, k) for j < ``rank`` and ``start`` <= k < ``start + dim``.

    Returns
        z [rank, dim] bfloat16, not yet divided by sqrt(rank): standard normals, signs (-1, +1), or
        for "sparse", which is never divided, one sign per column and zeros.
    Raises
        ValueError: for an unknown distribution or a negative size.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    _check_sizes(epoch=epoch, rank=rank, dim=dim, start=start)
    device = torch.device(device)
    if distribution == "sparse":
        z = torch.zeros((rank, dim), dtype=torch.bfloat16, device=device)
        if rank == 0:
            return z
        row, sign = sparse(key, epoch, rank, dim, start=start, device=device)
        return z.scatter_(0, row.view(1, -1), sign.to(z.dtype).view(1, -1))
    code = DISTRIBUTIONS.index(distribution)
    if _C is not None and device.type == "cpu":
        z = torch.empty((rank, dim), dtype=torch.bfloat16, device="cpu")
        _C.draw(z.data_ptr(), key, epoch, rank, dim, start, code)
        return z
    block = _BLOCK[distribution]
    first, last = start // block, -(-(start + dim) // block)
    c0 = torch.arange(4 * first, 4 * last, device=device)
    c1 = torch.arange(rank, device=device).view(-1, 1)
    w = words(key, c0, c1, epoch, code)
    z = _normals(w, rank) if distribution == "gaussian" else _signs(w, rank)
    return z[:, start - block * first :][:, :dim].float().bfloat16()


def sparse(
    key: int,
    epoch: int,
    rank: int,
    dim: int,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The one nonzero of each column k of the sparse projection, ``start`` <= k < ``start + dim``.

    Returns
        row [dim] int64: h(k) in [0, rank), which never meets itself inside a block of ``rank``.
        sign [dim] int8: sigma(k), -1 or +1.
    Raises
        ValueError: for a negative size, or for rank 0 with columns to place.
    """
    _check_sizes(epoch=epoch, rank=rank, dim=dim, start=start)
    device = torch.device(device)
    if rank == 0 and dim:
        raise ValueError(f"rank must be at least 1 to place {dim} columns, got 0")
    if _C is not None and device.type == "cpu":
        row = torch.empty((dim,), dtype=torch.int64, device="cpu")
        sign = torch.empty((dim,), dtype=torch.int8, device="cpu")
        _C.sparse(row.data_ptr(), sign.data_ptr(), key, epoch, rank, dim, start)
        return row, sign
    k = torch.arange(start, start + dim, device=device)
    if dim == 0:
        return k, k.to(torch.int8)
    block, i = k // rank, k % rank
    place = _word_half(words(key, block // 8, _MASK32, epoch, SPARSE), block % 8)
    turn, turns = place % 8, place // 8
    if rank % 8 == 0:  # whole groups of 8 rotate, and inside of a group places are swapped
        groups = rank // 8
        row = 8 * ((i // 8 + (turns * groups >> 13)) % groups) + (i % 8 ^ turn)
    else:
        row = (i + (turns * rank >> 13)) % rank
    half = _word_half(words(key, block // 16, row // 8, epoch, SPARSE), row % 8)
    return row, (1 - 2 * (half >> block % 16 & 1)).to(torch.int8)


def _word_half(w: Sequence[Tensor], index: Tensor) -> Tensor:
    """Of the words of each call, the 16 bits number ``index`` (0 to 7), low halves first."""
    word = torch.stack(list(w)).gather(0, (index // 2).view(1, -1)).view(-1)
    return word >> 16 * (index % 2) & 0xFFFF


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def rounding_bits(
    key: int,
    step: int,
    first: int,
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
    use: int = ROUNDING,
    column: int = 0,
) -> Tensor:
    """16 random bits for each weight (i, l) of ``rows`` rows from ``first`` on, for one step.

    Weight l takes half l mod 2 of word (l mod 8) div 2 of the call (l div 8, i, step, use), where
    ``use`` is ROUNDING or ROUNDING_INT8. ``column``: the first l.

    Returns
        int32 [rows, columns] in [0, 65536).
    """
    before = column % 8
    c0 = torch.arange(column // 8, -(-(column + columns) // 8), device=device)
    c1 = torch.arange(first, first + rows, device=device).view(-1, 1)
    w = torch.stack(words(key, c0, c1, step, use), dim=-1)  # [rows, calls, 4]
    halves = torch.stack([w & 0xFFFF, w >> 16], dim=-1).flatten(1)
    return halves[:, before : before + columns].int()


def moment_bits(
    key: int, step: int, first: int, count: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """16 random bits each for M and V of ``count`` elements from number ``first`` on, for one step.

    Element e, counted over rows, takes word e mod 4 of the call (e div 4, its low and its high
    half, step, 5): the low half for M and the high one for V.

    Returns
        int32 [count] in [0, 65536), twice.
    """
    before = first % 4
    call = torch.arange(first // 4, -(-(first + count) // 4), device=device)
    drawn = words(key, call & _MASK32, call >> 32, step, MOMENTS)
    w = torch.stack(drawn, dim=-1).view(-1)[before : before + count]
    return (w & 0xFFFF).int(), (w >> 16).int()


def projection_matrix(
    seed: int,
    epoch: int,
    rank: int,
    dim: int,
    distribution: str = "gaussian",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """P of the parameter whose key is ``seed``: z / sqrt(rank) (paper, section 4.1, Theorem A.1).

    For tests and for reading: the kernels draw it on the fly and never store it.

    Args
        seed: the parameter's 64-bit key, ``optimizer.state[p]["seed"]``.
        epoch: how many times P has been redrawn, ``(step - 1) // update_proj_gap``.
        rank, dim: the projected and the contracted size.
        distribution: "gaussian" (N(0, 1/rank)), "rademacher" (+-1/sqrt(rank)), or "sparse" (one
            +1 or -1 per column, and zeros).
    Returns
        P [rank, dim] ``dtype``. z is rounded to bf16 first, whatever the dtype: all back ends do.
    """
    z = draw(seed, epoch, rank, dim, distribution, device=device)
    return z.to(dtype) if distribution == "sparse" else scaled(z, dtype)


def scaled(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z [rank, dim] / sqrt(rank) in ``dtype``."""
    rank = max(z.shape[0], 1)
    return z.to(torch.promote_types(dtype, torch.float32)).div_(math.sqrt(rank)).to(dtype)
