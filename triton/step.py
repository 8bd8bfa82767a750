"""The Triton back end: a batch of parameters takes its step in a few launches (batch.py says how).

project (one launch per kind of gradient) -> combine (where project wrote R) -> limit -> apply (one
per kind of weight); begin -> adamw for dense parameters. The host waits for nothing: step, epoch,
limiter and counters are the device's. One batch takes every dtype, rank and orientation.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from apollo_kernels import moments
from apollo_kernels.batch import Dense, Hyper, LowRank, Part, Signals
from apollo_kernels.triton_kernels import adamw, apply, project, scale, sparse
from apollo_kernels.triton_kernels import table as tables
from apollo_kernels.triton_kernels.element import element

BY_ADDRESS = True  # plan.py lends no gradients
SAME_ORDER = False  # a weight and its gradient may lie in different memory orders

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_RECORD = 4  # floats per row at the begin of a workspace, in both kinds of batches


def takes(item: LowRank | Dense) -> bool:
    """Whether the kernels take it; float64 and sides beyond int32 they do not, nor int8 groups
    that no tile holds whole."""
    sides = max(item.weight.shape, default=0) < 2**31
    known = item.weight.dtype in _DTYPES if item.grid is None else _takes_int8(item)
    stored = isinstance(item, LowRank) or item.exp_avg.dtype == torch.float32
    stored = stored or (moments.lie_as_counted(item) and item.first % 4 == 0)
    return known and stored and item.grad.dtype in _DTYPES and sides


def _takes_int8(item: LowRank | Dense) -> bool:
    group = tables.group_of(item)
    assert item.grid is not None
    whole = isinstance(item, LowRank) or item.weight.shape[1] % group == 0
    return whole and group <= 4096 and item.weight.is_contiguous() and item.grid.is_contiguous()


def family(item: LowRank | Dense) -> Hashable:
    """Everything shares a batch: the batch itself groups its launches."""
    return ()


def build(items: Sequence[LowRank], *, separate: bool) -> LowRankBatch:
    """The low-rank ``items``, all on one device. ``separate``: something comes between the
    projection and the moments, such as the factor of max_grad_norm."""
    return (LowRankBatch if items[0].part is None else PartBatch)(items, separate)


def build_dense(items: Sequence[Dense]) -> DenseBatch:
    """The dense ``items``, all on one device."""
    return DenseBatch(items)


class _Group(NamedTuple):
    """The tiles that one kernel serves."""

    kernel: Any
    items: tables.Upload


def _grouped(tiles: Sequence[tuple[Any, int]], device: torch.device) -> list[_Group]:
    """(kernel, how many tiles) of each row -> the kernels; rows without tiles drop out."""
    groups = defaultdict(list)
    for row, (kernel, count) in enumerate(tiles):
        if count:
            groups[kernel].append((row, count))
    return [_Group(kernel, tables.work_items(rows, device)) for kernel, rows in groups.items()]


def _asynchronous_dots(device: torch.device) -> bool:
    """Whether the dots of ``device`` are Hopper's wgmma or data-centre Blackwell's tcgen05."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device)[0] in (9, 10)


class _Cut(NamedTuple):
    """How ``project`` cuts a matrix into tiles."""

    tiling: project.Tiling | sparse.Tiling
    chunk: int
    chunks: int
    r_tiles: int
    q_parts: int
    stored: bool  # R goes through the workspace
    k_begin: int = 0  # of a part: where the block of numbers begins that holds its first k


class _Places:
    """Hands out places of a workspace, one after the other."""

    def __init__(self, floats: int):
        self.floats = floats

    def take(self, floats: int, multiple: int = 1) -> int:
        place = -(-self.floats // multiple) * multiple
        self.floats = place + floats
        return place


class _Launcher:
    """What both kinds of batches own on the device, and how they launch kernels over it."""

    def __init__(self, device: torch.device, table: tables.Table, owned: Sequence[Tensor]):
        self._device, self._table, self._owned = device, table, list(owned)
        self._captured, self._streams = False, set[int]()

    @contextlib.contextmanager
    def _launches(self) -> Iterator[Tensor]:
        """The table, while launches go to the device's current stream.

        Memory that is freed may be given away as soon as its own stream has passed that point. So
        another stream that reads it is recorded, once.
        """
        table = self._table.tensor
        if self._device.type != "cuda":
            yield table
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream()
            if torch.cuda.is_current_stream_capturing():
                self._captured = True
            elif stream.cuda_stream not in self._streams:
                self._streams.add(stream.cuda_stream)
                for t in (table, *self._owned):
                    t.record_stream(stream)
            yield table

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        """The gradients have moved and nothing else has changed: a new table, the same tiles.

        Returns
            whether it was done. False, with nothing changed, asks for a new batch: where an address
            allows 16-byte accesses and the old one did not, or the reverse, and where a CUDA graph
            has captured a launch, since it reads the old table.
        """
        if self._captured or not self._table.set_gradients(addresses):
            return False
        self._streams.clear()
        return True


class _Own:
    """What this rank owns of matrices whose contracted side several ranks share: the moments of
    some channels. Every owner is sent R [share, rank] of all matrices, then q [share] of all;
    ``combine`` goes on from there, as from a single chunk of K."""

    def __init__(self, items: Sequence[LowRank], layouts: Sequence[tables.Layout]):
        both = list(zip(items, layouts, strict=True))
        self.owners = max(item.part.owners for item in items if item.part)
        self.shares = [item.part.share(layout.channels) for item, layout in both if item.part]
        sent = _Places(0)
        r = [sent.take(n * layout.rank) for n, layout in zip(self.shares, layouts, strict=True)]
        q = [sent.take(n) for n in self.shares]
        self.places, self.sent_floats = list(zip(r, q, strict=True)), sent.floats

    def build(
        self, items: Sequence[LowRank], projected: Sequence[tables.LowRankRow],
        layouts: Sequence[tables.Layout], places: _Places,
    ) -> list[tables.LowRankRow]:  # fmt: skip
        """The rows of the owned channels, made of those of ``projected``."""
        begin = places.take(self.sent_floats, multiple=16)
        self.received = slice(begin, places.floats)
        self.q = slice(places.floats - sum(self.shares), places.floats)
        scales = [places.take(share) for share in self.shares]
        self.scales = slice(places.floats - sum(self.shares), places.floats)
        rows, tiles = [], []
        every = zip(items, projected, layouts, self.places, scales, strict=True)
        for item, row, layout, (r, q), s in every:
            channels = len(item.exp_avg)
            tile = max(16, min(128, triton.next_power_of_2(layout.rank)))
            r_tiles = max(1, triton.cdiv(layout.rank, tile))
            rows.append(row._replace(
                channels=channels, chunks=1, q_parts=1, r_tiles=r_tiles, partial=begin + r,
                q=begin + q, scales=s, r_squares=places.take(r_tiles * channels),
                n_squares=places.take(r_tiles * channels),
            ))  # fmt: skip
            aligned = layout.r_aligned and r % 16 == 0
            tiles.append(((aligned, tile), triton.cdiv(channels, scale.COMBINE) * r_tiles))
        self.combines = _grouped(tiles, items[0].weight.device)
        return rows

    def order(self, layouts: Sequence[tables.Layout]) -> Tensor:
        """For every channel here, where its scale stands in those of all owners."""
        found, before = [torch.empty(0, dtype=torch.int64, device="cpu")], 0
        for share, layout in zip(self.shares, layouts, strict=True):
            c = torch.arange(layout.channels, dtype=torch.int64, device="cpu")
            owner, own = c // max(share, 1), c % max(share, 1)
            found.append(owner * sum(self.shares) + before + own)
            before += share
        return torch.cat(found)


class _Projection:
    """How one kind of projection runs over a batch: rows of the table, launches, places.

    The distribution is Hyper's, so a batch has rows and maps for both kinds. The workspace serves
    one step, so both have the same one.
    """

    def __init__(
        self, kernels: Any, items: Sequence[LowRank], layouts: Sequence[tables.Layout],
        separate: bool, own: _Own | None,
    ):  # fmt: skip
        """``kernels``: the module project, or sparse. ``own``: where several ranks own channels."""
        device = items[0].weight.device
        asynchronous = _asynchronous_dots(device)
        stores = separate or own is not None
        cuts = [self._cut(kernels, layout, asynchronous, stores) for layout in layouts]
        both = list(zip(layouts, cuts, strict=True))
        places = _Places(_RECORD * len(items))
        # What goes to other ranks lies in memory of its own, for as long as it takes.
        sums = places if own is None else _Places(0)
        # The squared norms of all matrices stand together, so that one sum adds them; and scales.
        q = [sums.take(cut.q_parts * layout.channels) for layout, cut in both]
        self.q = slice(_RECORD * len(items), places.floats)
        scales = [places.take(layout.channels) for layout in layouts]
        self.scales = slice(
            places.floats - sum(layout.channels for layout in layouts), places.floats
        )
        self.rows = []
        for item, q_place, s_place, (layout, cut) in zip(items, q, scales, both, strict=True):
            channels, part = layout.channels, item.part or Part(0, 0)
            squares = cut.r_tiles * channels if own is None else 0
            stored = cut.chunks * channels * layout.rank if cut.stored else 0
            self.rows.append(tables.LowRankRow(
                grad=item.grad.data_ptr(), weight=item.weight.data_ptr(),
                exp_avg=item.exp_avg.data_ptr(), exp_avg_sq=item.exp_avg_sq.data_ptr(),
                update_norm=item.update_norm.data_ptr(), step=item.step.data_ptr(),
                leads=int(item.leads), key=item.key, channels=channels, k=layout.k,
                rank=layout.rank, grid=0 if item.grid is None else item.grid.data_ptr(),
                grad_ld=layout.g.ld, weight_ld=layout.w.ld, chunk=cut.chunk,
                chunks=cut.chunks, r_tiles=cut.r_tiles, q=q_place, q_parts=cut.q_parts,
                scales=s_place, r_squares=places.take(squares), n_squares=places.take(squares),
                partial=sums.take(stored, multiple=16), k_first=layout.k_first or 0,
                k_begin=cut.k_begin, row=part.row, column=part.column,
            ))  # fmt: skip
        self.floats, self.scratch = places.floats, sums.floats
        self.sends: list[_Group] = []
        if own is not None:
            rows = zip(self.rows, own.shares, own.places, strict=True)
            self.rows = [row._replace(share=n, sent_r=r, sent_q=q) for row, n, (r, q) in rows]
            pairs = zip(own.shares, cuts, strict=True)
            self.sends = _grouped(
                [self._send_tiles(own.owners * n, cut) for n, cut in pairs], device
            )
        self.project = kernels.project
        self.projects = _grouped([self._project_tiles(*pair) for pair in both], device)
        self.combines = _grouped([self._combine_tiles(*pair) for pair in both], device)

    @staticmethod
    def _cut(kernels: Any, layout: tables.Layout, asynchronous: bool, separate: bool) -> _Cut:
        tiling = kernels.choose(layout, asynchronous)
        first, block = layout.k_first or 0, kernels.block(layout, tiling)
        begin = first // block * block
        chunk, chunks = kernels.split(layout, tiling, first + layout.k - begin)
        r_tiles = max(1, triton.cdiv(layout.rank, tiling.BR))
        q_parts = chunks * r_tiles if kernels is sparse else chunks
        return _Cut(tiling, chunk, chunks, r_tiles, q_parts, separate or chunks > 1, begin)

    @staticmethod
    def _project_tiles(layout: tables.Layout, cut: _Cut) -> tuple[Any, int]:
        """At least one tile, which writes the row's t, also of a matrix without elements."""
        tiles = max(1, triton.cdiv(layout.channels, cut.tiling.BC)) * cut.r_tiles * cut.chunks
        return (cut.tiling, cut.stored), tiles

    @staticmethod
    def _combine_tiles(layout: tables.Layout, cut: _Cut) -> tuple[Any, int]:
        tiles = triton.cdiv(layout.channels, scale.COMBINE) * cut.r_tiles if cut.stored else 0
        return (cut.tiling.R_ALIGNED, cut.tiling.BR), tiles

    @staticmethod
    def _send_tiles(channels: int, cut: _Cut) -> tuple[Any, int]:
        tiles = triton.cdiv(channels, scale.COMBINE) * cut.r_tiles
        return (cut.tiling.R_ALIGNED, cut.tiling.BR), tiles


class LowRankBatch(_Launcher):
    """Low-rank matrices that take their step together: batch.Batch on Triton's kernels."""

    def __init__(self, items: Sequence[LowRank], separate: bool):
        device = items[0].weight.device
        layouts = [tables.layout(item) for item in items]
        shared = items[0].part is not None and items[0].part.owners > 1
        own = self._own = _Own(items, layouts) if shared else None
        self._dense, self._sparse = (
            _Projection(kernels, items, layouts, separate, own) for kernels in (project, sparse)
        )
        self._separate, self._count = separate or shared, len(items)
        rows = self._dense.rows + self._sparse.rows
        vectors = 2 * [layout.g.vectors for layout in layouts]
        places = _Places(max(self._dense.floats, self._sparse.floats))
        if own is not None:
            rows += own.build(items, self._dense.rows, layouts, places)
            vectors += len(items) * [False]  # their gradients are not read
        self._space = torch.zeros(places.floats, dtype=torch.float32, device=device)
        self._q = self._space[:0]
        self._clock = torch.zeros(len(items), dtype=torch.int64, device=device)  # t of each row
        self._applies = _grouped([self._apply_tiles(layout) for layout in layouts], device)
        groups = [*self._applies]
        for projection in (self._dense, self._sparse):
            groups += projection.projects + projection.combines + projection.sends
        owned = [self._space, self._clock]
        if own is not None:
            groups += own.combines
            self._order = tables.upload(own.order(layouts), device)
            owned.append(self._order.tensor)
        owned += [group.items.tensor for group in groups]
        super().__init__(device, tables.Table(rows, vectors, device), owned)

    @staticmethod
    def _apply_tiles(layout: tables.Layout) -> tuple[Any, int]:
        update = apply.choose(layout)
        tiles = triton.cdiv(layout.channels, update.BC) * triton.cdiv(layout.k, update.BK)
        return update, tiles

    def _projection(self, hyper: Hyper, table: Tensor) -> tuple[_Projection, Tensor]:
        """The projection that ``hyper`` asks for, and its rows of the table."""
        if hyper.distribution == "sparse":
            return self._sparse, table[self._count : 2 * self._count]
        return self._dense, table[: self._count]

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        return super().set_gradients([*addresses] * (2 if self._own is None else 3))

    def project(self, hyper: Hyper, signals: Signals) -> None:
        """R and q, and the moments too where R is not stored. A separate batch finds R and q under
        found_inf as well, since they are its own, and the norm of the gradients is asked for."""
        with self._launches() as table:
            projection, rows = self._projection(hyper, table)
            self._q = self._space[projection.q]
            self._project(projection, rows, self._space, hyper, signals)

    def _project(
        self, projection: _Projection, rows: Tensor, space: Tensor, hyper: Hyper, signals: Signals
    ) -> None:
        for (tiling, stored), items in projection.projects:
            projection.project(
                tiling, stored, rows, items.tensor, space, self._clock, signals, hyper
            )

    def square_norm(self) -> Tensor:
        """float64 []: the sum of all q, as the gradients are."""
        return self._q.sum(dtype=torch.float64)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        """The moments of stored R, s_c, the limiter and the step counters."""
        with self._launches() as table:
            projection, rows = self._projection(hyper, table)
            self._combine(projection.combines, rows, hyper, signals)
            scale.limit(rows, self._space, self._clock, signals, hyper)

    def _combine(
        self, combines: Sequence[_Group], rows: Tensor, hyper: Hyper, signals: Signals
    ) -> None:
        assert self._separate or signals.clip is None, "moments may have been made without clip"
        for kernel, items in combines:
            scale.combine(*kernel, rows, items.tensor, self._space, signals, hyper)

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        """The weights, by what ``scale`` found; the signals are in that already."""
        with self._launches() as table:
            _, rows = self._projection(hyper, table)
            for tiling, items in self._applies:
                apply.apply(tiling, rows, items.tensor, self._space, self._clock, hyper)

    def scales(self, hyper: Hyper) -> list[Tensor]:
        rows = (self._sparse if hyper.distribution == "sparse" else self._dense).rows
        sizes = [min(row.channels, 1 if hyper.scale_type == "tensor" else row.channels)
                 for row in rows]  # fmt: skip
        pairs = zip(rows, sizes, strict=True)
        return [self._space[row.scales : row.scales + size] for row, size in pairs]


class PartBatch(LowRankBatch):
    """Parts of matrices that take their step together: batch.PartBatch on Triton's kernels.

    What goes to other owners has memory from PyTorch's allocator for as long as it is on its way.
    """

    def __init__(self, items: Sequence[LowRank], separate: bool):
        super().__init__(items, separate)
        self.sums: Tensor | None = None
        self.norms: Tensor | None = None
        self.s: Tensor | None = None
        self._norms = torch.zeros(3 * len(items), dtype=torch.float64, device=self._device)
        self._scales = self._space[:0]
        self._owned.append(self._norms)

    def project(self, hyper: Hyper, signals: Signals) -> None:
        own = self._own
        if own is None:
            super().project(hyper, signals)
            return
        of: dict[str, Any] = {"dtype": torch.float32, "device": self._device}
        with self._launches() as table:
            projection, rows = self._projection(hyper, table)
            scratch = torch.empty(projection.scratch, **of)
            self.sums = torch.empty((own.owners, own.sent_floats), **of)
            self._project(projection, rows, scratch, hyper, signals)
            for kernel, items in projection.sends:
                scale.send(*kernel, rows, items.tensor, scratch, self.sums)

    def receive_sums(self, sums: Tensor) -> None:
        assert self._own is not None
        self.sums = None
        self._space[self._own.received].copy_(sums)
        self._q = self._space[self._own.q]

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        own, per_channel = self._own, hyper.scale_type == "channel"
        self.norms = self._norms[: self._count] if per_channel else self._norms
        with self._launches() as table:
            projection, rows = self._projection(hyper, table)
            self._scales = self._space[projection.scales]
            if own is not None:
                rows = table[2 * self._count :]
            combines = projection.combines if own is None else own.combines
            self._combine(combines, rows, hyper, signals)
            scale.norms(rows, self._space, self.norms, signals, hyper)
        self.s = self._space[own.scales] if own is not None and per_channel else None

    def receive_scales(self, s: Tensor) -> None:
        torch.index_select(s.reshape(-1), 0, self._order.tensor, out=self._scales)

    def limit(self, hyper: Hyper, signals: Signals) -> None:
        assert self.norms is not None
        with self._launches() as table:
            _, rows = self._projection(hyper, table)
            scale.limit_parts(rows, self._space, self.norms, self._clock, signals, hyper)


class DenseBatch(_Launcher):
    """Dense parameters that take their step together: batch.DenseBatch on Triton's kernels."""

    def __init__(self, items: Sequence[Dense]):
        device = items[0].weight.device
        rows, tiles, vectors = [], [], []
        for item in items:
            row = tables.DenseRow(
                *(t.data_ptr() for t in (item.grad, item.weight, item.exp_avg, item.exp_avg_sq)),
                step=item.step.data_ptr(), size=item.weight.numel(), key=item.key,
                first=item.first,
            )  # fmt: skip
            group = tables.group_of(item)
            if item.grid is not None:
                at, columns = item.grid.data_ptr(), item.weight.shape[1]
                row = row._replace(grid=at, columns=columns)
            if item.units is not None:
                m, v = (unit.data_ptr() for unit in item.units)
                row = row._replace(exp_avg_unit=m, exp_avg_sq_unit=v)
            rows.append(row)
            others = (row.weight, row.exp_avg, row.exp_avg_sq, row.size)
            vectors.append(all(number % 16 == 0 for number in others))
            aligned = vectors[-1] and row.grad % 16 == 0
            tiling = adamw.Tiling.of(
                *(element(t.dtype) for t in (item.weight, item.grad, item.exp_avg)), aligned,
                group=group,
            )  # fmt: skip
            tiles.append((tiling, triton.cdiv(row.size, tiling.BLOCK)))
        self._space = torch.zeros(_RECORD * len(items), dtype=torch.float32, device=device)
        self._bad = torch.zeros(len(items), dtype=torch.int32, device=device)
        self._groups = _grouped(tiles, device)
        owned = (self._space, self._bad, *(group.items.tensor for group in self._groups))
        super().__init__(device, tables.Table(rows, vectors, device), owned)

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        """Moments, weights and step counters."""
        with self._launches() as table:
            adamw.begin(table, self._space, self._bad, signals, hyper)
            for tiling, items in self._groups:
                adamw.adamw(tiling, table, items.tensor, self._space, self._bad, signals, hyper)
