"""The argument table: one int64 row per parameter, so that one launch serves them all.

A program finds its work in two steps: items[program] = (row number, tile), and the row holds
addresses, sizes and strides. Strides and places count elements; their products are int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from apollo_kernels import int8
from apollo_kernels.batch import Dense, LowRank


class LowRankRow(NamedTuple):
    """The columns of a low-rank matrix. G and W are seen as [C, K], and each has one side of
    stride 1; the stride of the other side is called ld. Places count floats of the workspace."""

    grad: Any  # an address, as are the next five
    weight: Any
    exp_avg: Any
    exp_avg_sq: Any
    update_norm: Any
    step: Any
    leads: Any  # whether this row advances the step, which other rows may share
    key: Any
    channels: Any
    k: Any
    rank: Any
    grid: Any  # an address, of an int8 weight's
    grad_ld: Any
    weight_ld: Any
    chunk: Any  # contracted indices per program of project
    chunks: Any
    r_tiles: Any  # tiles of rank rows
    q: Any  # the place of |X_c|^2 [q_parts, C]
    q_parts: Any  # sums that make up q: of each chunk, or of each tile of a sparse projection
    scales: Any  # the place of s [C]
    r_squares: Any  # the place of |R_c|^2 [r_tiles, C]
    n_squares: Any  # the place of |N_c|^2 [r_tiles, C]
    partial: Any  # the place of R's partial sums [chunks, C, rank], if they are written
    # Of a part of a matrix: its first k in the whole, and the one where the block of numbers begins
    # that holds it; where its first weight stands; channels per owner, and the places of their R
    # and q in what an owner is sent.
    k_first: Any = 0
    k_begin: Any = 0
    row: Any = 0
    column: Any = 0
    share: Any = 0
    sent_r: Any = 0
    sent_q: Any = 0


class DenseRow(NamedTuple):
    """The columns of a dense parameter, whose tensors all lie alike in memory, without gaps."""

    grad: Any  # an address, as are the next four
    weight: Any
    exp_avg: Any
    exp_avg_sq: Any
    step: Any
    size: Any
    key: Any = 0  # of what is rounded by chance
    grid: Any = 0  # an address, and the next one: of an int8 weight alone
    columns: Any = 0
    exp_avg_unit: Any = 0  # an address, and the next one: of int8 moments alone
    exp_avg_sq_unit: Any = 0
    first: Any = 0  # the number of its first element in the whole parameter, of which it is a part


LOW_RANK = LowRankRow(*map(tl.constexpr, range(len(LowRankRow._fields))))
DENSE = DenseRow(*map(tl.constexpr, range(len(DenseRow._fields))))
# Triton finds a compiled kernel on disk by its text and by the constants that it names itself, not
# by those that it reaches through a module. Every kernel names this one (in row_address), or a
# package with other columns would launch the kernels of the package before it.
COLUMNS = tl.constexpr(f"{LowRankRow._fields} {DenseRow._fields}")
LOW_RANK_WIDTH = tl.constexpr(len(LOW_RANK))
DENSE_WIDTH = tl.constexpr(len(DENSE))


@triton.jit
def row_address(table, number, WIDTH: tl.constexpr):
    """Where row ``number`` of a table begins."""
    tl.static_assert(COLUMNS != "")
    return table + number.to(tl.int64) * WIDTH


@triton.jit
def find_work(table, items, WIDTH: tl.constexpr):
    """This program's row of the table, that row's number, and the tile within the parameter."""
    item = items + 2 * tl.program_id(0).to(tl.int64)
    number = tl.load(item)
    return row_address(table, number, WIDTH), number, tl.load(item + 1)


@triton.jit
def load_pointer(row, COLUMN: tl.constexpr, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column as a pointer to elements of type T; ALIGNED: of whole 16 bytes."""
    address = tl.load(row + COLUMN).to(tl.pointer_type(T))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def load_number(row, COLUMN: tl.constexpr, ALIGNED: tl.constexpr):
    """A size, stride or place; ALIGNED: a multiple of 16, so that vectors never straddle.

    It is int64, and so is every product with it: offsets pass 2^31.
    """
    x = tl.load(row + COLUMN)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
    return x


@triton.jit
def is_skipped(found_inf):
    """Whether GradScaler forbids every write of this step; found_inf may be None."""
    if found_inf is None:
        return False
    else:
        return tl.load(found_inf) != 0


class Matrix(NamedTuple):
    """How G or W lies in memory: what decides the kernels' accesses."""

    dtype: torch.dtype
    k_unit: bool  # the contracted side has stride 1; else the channels have
    ld: int  # the other side's stride
    vectors: bool  # sizes and stride allow 16-byte vectors
    aligned: bool  # and so does the address


class Layout(NamedTuple):
    """Everything about a low-rank matrix but its addresses: what decides its kernels."""

    channels: int
    k: int
    rank: int
    rows: bool  # the channels are the rows of the parameter's matrix
    r_aligned: bool  # 16-byte vectors are possible in the moments [C, rank]
    g: Matrix
    w: Matrix
    group: int = 0  # neighbours of an int8 weight that share a grid; 0 for all others
    k_first: int | None = None  # of a part: where it begins in the whole
    by_eights: bool = True  # its rows begin at a multiple of 8 of the whole's


def matrix(t: Tensor) -> Matrix:
    """How ``t`` [C, K] lies in memory. The stride of a side of size 0 or 1 means nothing.

    Raises
        ValueError: if neither side is contiguous; plan.py hands over a copy of such a tensor.
    """
    channels, k = t.shape
    sides = zip(t.shape, t.stride(), strict=True)
    by_channel, by_k = (stride if n > 1 else 0 for n, stride in sides)
    if 1 not in (by_channel, by_k) and min(channels, k) > 1:
        raise ValueError(f"neither side of a matrix {list(t.shape)} has stride 1: {t.stride()}")
    k_unit = by_k == 1 or (by_channel != 1 and channels > 1)
    ld, unit = (by_channel, k) if k_unit else (by_k, channels)
    vectors = ld % 16 == 0 and unit % 16 == 0
    return Matrix(t.dtype, k_unit, ld, vectors, vectors and t.data_ptr() % 16 == 0)


def layout(item: LowRank) -> Layout:
    """How the matrix, gradient and moments of ``item`` lie in memory."""
    w, g = (item.weight, item.grad) if item.rows else (item.weight.t(), item.grad.t())
    (channels, k), rank = w.shape, item.exp_avg.shape[1]
    moments = (item.exp_avg.data_ptr(), item.exp_avg_sq.data_ptr(), rank)
    r_aligned = all(number % 16 == 0 for number in moments)
    group = group_of(item)
    known = channels, k, rank, item.rows, r_aligned, matrix(g), matrix(w), group
    if item.part is None:
        return Layout(*known)
    part, whole = item.part, Layout(*known)
    k_first = part.column if item.rows else part.row
    if whole.g.k_unit and k_first % 16:  # X is walked from a block's begin on
        whole = whole._replace(g=whole.g._replace(vectors=False, aligned=False))
    return whole._replace(k_first=k_first, by_eights=part.column % 8 == 0)


def group_of(item: LowRank | Dense) -> int:
    """How many neighbours of an int8 weight share a grid; 0 for all others."""
    if item.grid is None:
        return 0
    return int8.group_size(item.weight.shape[1], item.grid.shape[1])


class Upload(NamedTuple):
    """A tensor on the device, and the pinned one it is copied from, for which nobody waits: a graph
    that captures the copy reads the pinned tensor again at each replay."""

    tensor: Tensor
    source: Tensor


def upload(host: Tensor, device: torch.device) -> Upload:
    """A copy of ``host`` on ``device`` that the host does not wait for."""
    if device.type == "cuda":
        host = host.pin_memory()
    return Upload(host.to(device, non_blocking=True), host)


def work_items(tiles: Sequence[tuple[int, int]], device: torch.device) -> Upload:
    """(row, how many tiles) of each parameter -> [sum of tiles, 2] int32: row and tile of each."""
    rows, counts = torch.tensor(tiles, dtype=torch.int64, device="cpu").unbind(1)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)
    tile = torch.arange(len(first), dtype=torch.int64, device="cpu") - first
    pairs = torch.stack([rows.repeat_interleave(counts), tile], dim=1)
    return upload(pairs.to(torch.int32), device)


class Table:
    """The table of one batch, on the device; gradients may move."""

    def __init__(
        self,
        rows: Sequence[LowRankRow] | Sequence[DenseRow],
        vectors: Sequence[bool],
        device: torch.device,
    ):
        """``vectors``: where a gradient is read in 16-byte vectors if its address allows it."""
        self._host = torch.tensor(rows, dtype=torch.int64, device="cpu")
        self._column = rows[0]._fields.index("grad")
        self._device, self._vectors = device, list(vectors)
        self._aligned = self._alignment([row.grad for row in rows])
        self._upload = upload(self._host, device)

    @property
    def tensor(self) -> Tensor:
        """[rows, columns] int64."""
        return self._upload.tensor

    def _alignment(self, addresses: Sequence[int]) -> list[bool]:
        return [
            vectors and address % 16 == 0
            for vectors, address in zip(self._vectors, addresses, strict=True)
        ]

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        """Uploads the rows with other gradients. The device's old table stays as it is.

        Returns
            False, with nothing done, where an address is aligned otherwise than the one that the
            kernels were chosen for.
        """
        if self._alignment(addresses) != self._aligned:
            return False
        moved = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        self._host[:, self._column] = moved
        self._upload = upload(self._host, self._device)
        return True
