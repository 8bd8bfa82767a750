"""The CUDA back end: plans over csrc's kernels, behind the border of batch.py.

    LowRankBatch  project, scale, apply: three launches, whatever the number of items
    PartBatch     the same for parts of matrices, with other ranks' sums in between
    DenseBatch    adamw (two launches)

C++ (csrc/plan.h) works out rows, maps and workspace from named fields; here they get their memory.
A step allocates nothing and never waits for the device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import moments
from apollo_kernels.batch import Dense, Hyper, LowRank, Part, Signals
from apollo_kernels.native import _C as _native

# What the kernels read and write; csrc/apollo.h says what else a new dtype needs.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}  # codes
GROUP = 128  # int8 weights that share a grid
# As csrc/philox.cuh numbers them; the last has the gaussian's numbers by exact functions.
DISTRIBUTIONS = {"gaussian": 0, "rademacher": 1, "sparse": 4, "exact gaussian": 16}

BY_ADDRESS = True  # plan.py lends no gradients
SAME_ORDER = True  # the kernels walk weight and gradient together

# The module that holds the kernels; tests put an emulated device's here.
kernels: Any = _native
kernel_device = "cuda"


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None if they can."""
    if device.type != kernel_device:
        return f"needs a {kernel_device.upper()} device, the tensors are on {device.type!r}"
    if kernels is None:
        return "the native module is not built"
    if not hasattr(kernels, "LowRankPlan"):
        return f"the native module has no kernels: {kernels.build_info()['cuda_missing']}"
    return _no_image(device) if device.type == "cuda" else None


@functools.cache
def _no_image(device: torch.device) -> str | None:
    """Asks the driver once, by a kernel's attributes."""
    problem = kernels.probe(device.index or 0)
    if not problem:
        return None
    warnings.warn(f"the CUDA kernels cannot run on {device}: {problem}", stacklevel=2)
    return f"the driver refuses the kernels: {problem}"


def takes(item: LowRank | Dense) -> bool:
    """Whether the kernels know these dtypes and sizes."""
    weight, grad = item.weight, item.grad
    known = weight.dtype in DTYPES and grad.dtype in DTYPES
    if isinstance(item, LowRank) and item.part is not None:
        return known and (item.grid is None or _takes_int8(item))
    if item.grid is not None and not _takes_int8(item):
        return False
    if isinstance(item, Dense):
        narrow = item.exp_avg.dtype in DTYPES and moments.lie_as_counted(item)
        return known and (item.exp_avg.dtype == torch.float32 or (narrow and item.first % 4 == 0))
    return known and max(weight.shape) < 2**31


def _takes_int8(item: LowRank | Dense) -> bool:
    """Codes lie as rows, and each row of a dense parameter as whole groups."""
    weight, grid = item.weight, item.grid
    assert grid is not None
    m, n = weight.shape
    grouped = grid.shape[1] == -(-n // GROUP) and max(m, n) < 2**31
    if isinstance(item, Dense):
        grouped = grouped and n % GROUP == 0
    elif m == 1:  # a gradient that can be walked at all could be so across its only row
        grouped = grouped and (n == 1 or item.grad.stride(1) == 1)
    return grouped and weight.is_contiguous() and grid.is_contiguous()


def family(item: LowRank | Dense) -> Hashable:
    """Items of one family share launches: equal dtypes and, by their own ranks, equal kernels."""
    dtypes = item.weight.dtype, item.grad.dtype, item.exp_avg.dtype
    return dtypes, kernels.rank_class(item.exp_avg.shape[1]) if isinstance(item, LowRank) else None


def build(items: Sequence[LowRank], *, separate: bool = False) -> LowRankBatch:
    """``separate``: R stays in the workspace between ``project`` and ``scale``."""
    return (LowRankBatch if items[0].part is None else PartBatch)(items, separate)


def build_dense(items: Sequence[Dense]) -> DenseBatch:
    return DenseBatch(items)


def _row_major(*matrices: Tensor) -> bool:
    """Whether all [m, n] lie in memory as rows, or all as columns. Where a side has size 1 and both
    are true, the longer side is the inner one; its own stride means nothing."""
    m, n = matrices[0].shape
    by_rows = all(n == 1 or x.stride(1) == 1 for x in matrices)
    by_columns = all(m == 1 or x.stride(0) == 1 for x in matrices)
    if not (by_rows or by_columns):
        raise ValueError(f"weight and gradient lie apart: {[x.stride() for x in matrices]}")
    return by_rows and not (by_columns and n == 1)


class _Placed:
    """A plan of C++ with its table, maps and workspace on the device of the items."""

    def __init__(self, plan: Any, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.index = device.index or 0
        self._made: tuple[Any, ...] = (None, None)
        self._captured, self._streams = False, set[int]()
        self.workspace = torch.zeros(plan.workspace_floats, dtype=torch.float32, device=device)
        self.maps, self._host_maps = self._upload(plan.map_size, torch.int32, plan.write_maps)
        self._owned = [self.maps, self.workspace]
        self._write_table()

    def _upload(self, size: int, dtype: torch.dtype, write: Callable[[int], None]) -> Any:
        """A tensor on the device, and its pinned source, which the copy may read later."""
        pinned = self.device.type == "cuda"
        host = torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)
        write(host.data_ptr())
        return host.to(self.device, non_blocking=True), host

    def _write_table(self) -> None:
        plan = self.plan
        self.table, self._host_table = self._upload(plan.table_words, torch.int64, plan.write_table)
        self._streams.clear()
        plan.place(
            table=self.table.data_ptr(), maps=self.maps.data_ptr(),
            workspace=self.workspace.data_ptr(), device=self.index,
        )  # fmt: skip

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        """A new table, which nobody waits for; maps and workspace stay. False, and nothing done, if
        a captured graph reads the old table: then another batch has to be built."""
        if self._captured:
            return False
        self.plan.set_gradients(addresses)
        self._write_table()
        return True

    def _stream(self) -> int:
        """The current stream, on which a launch is about to read what this batch owns."""
        if self.device.type != "cuda":
            return 0
        self._captured |= torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(self.device)
        if stream.cuda_stream not in self._streams:  # freed memory waits for each that used it
            self._streams.add(stream.cuda_stream)
            for t in (self.table, *self._owned):
                t.record_stream(stream)
        return stream.cuda_stream

    def _hyper(self, h: Hyper, signals: Signals) -> Any:
        """The kernels' Hyper; the verbs of one step share it."""
        made = self._made
        if made[0] is h and made[1] is signals:
            return made[2]
        lr: Any = h.lr
        on_device = isinstance(lr, Tensor) and lr.device == self.device
        lr = lr.to(torch.float32) if on_device else float(lr)
        native = kernels.Hyper(
            counters=signals.counters.data_ptr(),
            lr=0.0 if on_device else lr,
            lr_tensor=lr.data_ptr() if on_device else 0,
            beta1=h.betas[0],
            beta2=h.betas[1],
            eps=h.eps,
            weight_decay=h.weight_decay,
            correct_bias=h.correct_bias,
            maximize=h.maximize,
            scale=h.scale,
            update_proj_gap=h.update_proj_gap,
            distribution=_distribution(h),
            tensor_scale=h.scale_type == "tensor",
            scale_front=h.scale_front,
            disable_nl=h.disable_nl,
            stochastic_rounding=h.stochastic_rounding,
            grad_scale=_address(signals.grad_scale),
            found_inf=_address(signals.found_inf),
            clip=_address(signals.clip),
        )
        changes = isinstance(h.lr, Tensor) and lr is not h.lr  # a copy, of what may change unseen
        self._made = None if changes else h, signals, native, lr
        return native


def _distribution(hyper: Hyper) -> int:
    exact = hyper.exact_projection and hyper.distribution == "gaussian"
    return DISTRIBUTIONS["exact gaussian" if exact else hyper.distribution]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _grid_of_the_whole(grid: Tensor | None, row: int) -> int:
    """Where the first row of the whole would be, of a grid whose own first row is ``row`` of it."""
    if grid is None or not grid.numel():
        return 0
    return grid.data_ptr() - row * grid.shape[1] * grid.element_size()


class LowRankBatch(_Placed):
    """batch.Batch over the kernels: items of one device and family, in one memory order each."""

    def __init__(self, items: Sequence[LowRank], separate: bool) -> None:
        first = items[0]
        plan = kernels.LowRankPlan(
            weight_dtype=DTYPES[first.weight.dtype],
            grad_dtype=DTYPES[first.grad.dtype],
            separate=separate,
            owners=first.part.owners if first.part else 1,
        )
        for item in items:
            weight, grad, part = item.weight, item.grad, item.part or Part(0, 0)
            row_major = item.grid is not None or _row_major(weight, grad)
            outer = 0 if row_major else 1  # the dimension of what lies in memory as rows
            plan.add(
                weight=weight.data_ptr(),
                grad=grad.data_ptr(),
                exp_avg=item.exp_avg.data_ptr(),
                exp_avg_sq=item.exp_avg_sq.data_ptr(),
                update_norm=item.update_norm.data_ptr(),
                step=item.step.data_ptr(),
                key=item.key,
                channels=weight.shape[0 if item.rows else 1],
                k=weight.shape[1 if item.rows else 0],
                rank=item.exp_avg.shape[1],
                weight_ld=weight.stride(outer),
                grad_ld=grad.stride(outer),
                by_row=item.rows == row_major,
                row_major=row_major,
                leads=item.leads,
                grid=_grid_of_the_whole(item.grid, part.row),
                k_first=part.column if item.rows else part.row,
                row=part.row,
                column=part.column,
                own_channels=len(item.exp_avg),
            )
        super().__init__(plan, first.weight.device)
        self._q = {code: self.workspace[slice(*plan.q(code))] for code in DISTRIBUTIONS.values()}
        self._s = [self.workspace[slice(*plan.s(i))] for i in range(len(items))]
        self._drawn = 0  # the distribution of the last projection

    def project(self, hyper: Hyper, signals: Signals) -> None:
        self._drawn = _distribution(hyper)
        self.plan.project(self._hyper(hyper, signals), self._stream(), 0)

    def square_norm(self) -> Tensor:
        return self._q[self._drawn].sum(dtype=torch.float64)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        self.plan.scale(self._hyper(hyper, signals), self._stream())

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        self.plan.apply(self._hyper(hyper, signals), self._stream())

    def scales(self, hyper: Hyper) -> list[Tensor]:
        return [s[:1] if hyper.scale_type == "tensor" else s for s in self._s]


class PartBatch(LowRankBatch):
    """batch.PartBatch over the kernels, which leave and take the sums where collectives want them.

    What goes to other owners has memory from PyTorch's allocator for as long as it is on its way.
    """

    def __init__(self, items: Sequence[LowRank], separate: bool) -> None:
        super().__init__(items, separate)
        assert items[0].part is not None
        self.owners, self.count = items[0].part.owners, len(items)
        self.sums: Tensor | None = None
        self.norms: Tensor | None = None
        self.s: Tensor | None = None
        self._norms = torch.zeros(3 * self.count, dtype=torch.float64, device=self.device)
        self._own_r, self._own_q, self._own_s = (
            self.workspace[slice(*ends)] for ends in self.plan.own()
        )
        self._scales = self.workspace[slice(*self.plan.scales())]
        self._owned.append(self._norms)
        if self.owners > 1:
            self._order, self._host_order = self._upload(
                len(self._scales), torch.int64, self.plan.write_scale_order
            )
            self._owned.append(self._order)

    def project(self, hyper: Hyper, signals: Signals) -> None:
        if self.owners == 1:
            super().project(hyper, signals)
            return
        plan, native, stream = self.plan, self._hyper(hyper, signals), self._stream()
        scratch = self._passing(plan.scratch_floats)
        self.sums = self._passing(self.owners, plan.sent_floats)
        plan.project(native, stream, scratch.data_ptr())
        plan.send(native, stream, scratch.data_ptr(), self.sums.data_ptr())

    def _passing(self, *shape: int) -> Tensor:
        """Memory for what is on its way to other owners."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def receive_sums(self, sums: Tensor) -> None:
        self.sums = None
        r, q = sums.split([len(self._own_r), len(self._own_q)])
        self._own_r.copy_(r)
        self._own_q.copy_(q)

    def square_norm(self) -> Tensor:
        return super().square_norm() if self.owners == 1 else self._own_q.sum(dtype=torch.float64)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        native, stream = self._hyper(hyper, signals), self._stream()
        self.plan.scale_parts(native, stream, self._norms.data_ptr())
        per_channel = hyper.scale_type == "channel"
        self.norms = self._norms[: self.count] if per_channel else self._norms
        self.s = self._own_s if per_channel and self.owners > 1 else None

    def receive_scales(self, s: Tensor) -> None:
        torch.index_select(s.reshape(-1), 0, self._order, out=self._scales)

    def limit(self, hyper: Hyper, signals: Signals) -> None:
        assert self.norms is not None
        self.plan.limit(self._hyper(hyper, signals), self._stream(), self.norms.data_ptr())


class DenseBatch(_Placed):
    """batch.DenseBatch over the kernels: items of one device and family."""

    def __init__(self, items: Sequence[Dense]) -> None:
        first = items[0]
        plan = kernels.DensePlan(
            weight_dtype=DTYPES[first.weight.dtype],
            grad_dtype=DTYPES[first.grad.dtype],
            moments_dtype=DTYPES[first.exp_avg.dtype],
        )
        for item in items:
            units = item.units or (None, None)
            columns = item.weight.shape[-1] if item.weight.dim() else 1
            plan.add(
                weight=item.weight.data_ptr(),
                grad=item.grad.data_ptr(),
                exp_avg=item.exp_avg.data_ptr(),
                exp_avg_sq=item.exp_avg_sq.data_ptr(),
                step=item.step.data_ptr(),
                count=item.weight.numel(),
                grid=_grid_of_the_whole(item.grid, item.first // max(columns, 1)),
                key=item.key,
                columns=columns,
                exp_avg_unit=_address(units[0]),
                exp_avg_sq_unit=_address(units[1]),
                first=item.first,
            )
        super().__init__(plan, first.weight.device)

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        self.plan.adamw(self._hyper(hyper, signals), self._stream())
