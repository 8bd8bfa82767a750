"""The argument table: one int64 row per parameter, so that one launch serves them all.

A program finds its work in two steps: items[program] = (row, tile), and the row holds addresses,
sizes and strides. Strides and offsets count elements; what they are multiplied with is int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Low-rank rows. G and W are seen as [C, K]; one of the two strides is 1, *_LD is the other one.
G, W, M, V, NORM, STEP, KEY, C, K, RANK, G_LD, W_LD = map(tl.constexpr, range(12))
CHUNK, CHUNKS = map(tl.constexpr, (12, 13))  # contracted indices per program of project
R_TILES = tl.constexpr(14)  # tiles of rank rows
SUMS = tl.constexpr(15)  # where in the workspace the channels' sums stand (scale.py)
PARTIAL = tl.constexpr(16)  # where R's partial sums [CHUNKS, C, RANK] do
LOW_RANK = tl.constexpr(17)  # columns of a row

# Dense rows share G, W, M, V; all four lie alike in memory, without gaps.
D_STEP, D_SIZE = map(tl.constexpr, (4, 5))
DENSE = tl.constexpr(6)


@triton.jit
def work(table, items, COLUMNS: tl.constexpr):
    """This program's row of the table, that row's number, and the tile within the parameter."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    number = tl.load(item)
    return table + number.to(tl.int64) * COLUMNS, number, tl.load(item + 1)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column as a pointer to elements of type T; ALIGNED: of whole 16 bytes."""
    p = tl.load(row + COLUMN).to(tl.pointer_type(T))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def number(row, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """A size or a stride; ALIGNED: a multiple of 16, so that vectors never straddle.

    It is int64, and so is every product with it: offsets pass 2^31.
    """
    x = tl.load(row + COLUMN)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    return x


@triton.jit
def skipped(found_inf):
    """Whether GradScaler forbids every write of this step; found_inf may be None."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


class Matrix(NamedTuple):
    """How G or W lies in memory: what decides the kernels' accesses."""

    dtype: torch.dtype
    k_unit: bool  # the contracted side has stride 1; else the channels have
    ld: int  # the other stride
    aligned: bool  # 16-byte vectors are possible


class Layout(NamedTuple):
    """Everything about a low-rank parameter but its addresses: what decides its kernels."""

    channels: int
    k: int
    rank: int
    rows: bool  # the channels are the rows of the parameter's matrix
    r_aligned: bool  # so are the moments' [C, rank]
    g: Matrix
    w: Matrix


def matrix(t: Tensor) -> Matrix | None:
    """How ``t`` [C, K] lies in memory; None if neither side is contiguous."""
    (channels, k), (by_channel, by_k) = t.shape, t.stride()
    k_unit = by_k == 1 or k == 1
    if not k_unit and by_channel != 1 and channels != 1:
        return None
    ld, unit = (by_channel, k) if k_unit else (by_k, channels)
    aligned = t.data_ptr() % 16 == 0 and ld % 16 == 0 and unit % 16 == 0
    return Matrix(t.dtype, k_unit, ld, aligned)


def items(tiles: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(row, how many tiles) of each parameter -> [sum of tiles, 2] int32: row and tile of each."""
    rows, counts = (torch.tensor(column, dtype=torch.int64) for column in zip(*tiles, strict=True))
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    tile = torch.arange(int(counts.sum())) - first
    return upload(torch.stack([rows.repeat_interleave(counts), tile], dim=1).int(), device)


# What a CUDA graph reads must outlive it, and no one tells when it goes.
_captured: list[Any] = []


def keep_if_capturing(*what: Any) -> None:
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _captured.extend(what)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device`` that the host does not wait for."""
    if device.type != "cuda":
        return host.to(device)
    host = host.pin_memory()
    keep_if_capturing(host)
    return host.to(device, non_blocking=True)


@lru_cache(maxsize=64)
def table(device: torch.device, rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """The rows on ``device``, [parameters, columns] int64; kept while no tensor moves."""
    return upload(torch.tensor(rows, dtype=torch.int64), device)
