"""Matrices on a CPU whose whole step is compiled: one call for all of them, one after the other.

Nothing comes between the passes of one matrix then, and its gradient is still in the caches when
the weights are updated. What the call does not do is left to each matrix's own batch, of
reference.py: stochastic rounding, and a step in which something comes between the verbs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from apollo_kernels import cpu
from apollo_kernels.batch import Hyper, LowRank, Signals
from apollo_kernels.native import _C

if TYPE_CHECKING:
    from apollo_kernels.reference import LowRankBatch

FORMS = {"rows": 0, "tiles of pairs": 1, "tiles of rows": 1, "pairs": 2, "places": 3}
# A CpuMatrix of csrc/cpu_step.h, all of whose members take 8 bytes.
FIELDS = (
    "w", "x", "element", "channels", "k", "w_ld", "x_ld", "rows", "m", "v", "rank", "update_norm",
    "step", "leads", "form", "z", "padded", "s",
)  # fmt: skip
_X, _FORM, _Z, _PADDED, _S = map(FIELDS.index, ("x", "form", "z", "padded", "s"))


def takes(item: LowRank) -> bool:
    """Whether the passes can walk all of it."""
    if item.part is not None or item.grid is not None:
        return False
    if not cpu.supported(item.exp_avg, item.exp_avg_sq):
        return False
    if not cpu.supported(item.weight, item.grad):
        return False
    w, x = _matrices(item)
    same_order = (w.stride(1) == 1) == (x.stride(1) == 1)
    return same_order and cpu.layout(x, item.exp_avg.shape[1]) in FORMS


def _matrices(item: LowRank) -> tuple[Tensor, Tensor]:
    """W and X, [C, K]."""
    return (item.weight, item.grad) if item.rows else (item.weight.t(), item.grad.t())


def _row(item: LowRank) -> list[int]:
    """The item's CpuMatrix; what changes from step to step is 0."""
    w, x = _matrices(item)
    channels, k, w_ld, rows = cpu.walk(w)
    found = {
        "w": w.data_ptr(), "element": cpu.ELEMENTS[w.dtype], "channels": channels, "k": k,
        "w_ld": w_ld, "x_ld": cpu.walk(x)[2], "rows": int(rows), "m": item.exp_avg.data_ptr(),
        "v": item.exp_avg_sq.data_ptr(), "rank": item.exp_avg.shape[1],
        "update_norm": item.update_norm.data_ptr(), "step": item.step.data_ptr(),
        "leads": int(item.leads),
    }  # fmt: skip
    return [found.get(field, 0) for field in FIELDS]


class CpuBatch:
    """As batch.Batch. ``parts`` are the batches of the single matrices, in the items' order."""

    def __init__(self, items: Sequence[LowRank], parts: Sequence[LowRankBatch], separate: bool):
        self.parts, self.separate = parts, separate
        self.rounds = any(item.weight.dtype == torch.bfloat16 for item in items)  # if it is asked
        self.gradients: Sequence[Tensor] | None = None
        self.s: list[Tensor] = []  # of each matrix
        self._table = array("q", [value for item in items for value in _row(item)])
        self._kept: list[object] = [None] * len(items)  # of which epoch and distribution z is
        self._z: list[Tensor | None] = [None] * len(items)

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        self.gradients = gradients
        if gradients is None:
            for part in self.parts:
                part.lend(None)

    def project(self, hyper: Hyper, signals: Signals) -> None:
        if self.separate:
            for part in self._lent():
                part.project(hyper, signals)

    def square_norm(self) -> Tensor:
        return torch.stack([part.square_norm() for part in self.parts]).sum()

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        if self.separate:
            for part in self.parts:
                part.scale(hyper, signals)

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        if self.separate:
            for part in self.parts:
                part.apply(hyper, signals)
        elif self.rounds and hyper.stochastic_rounding:
            for part in self._lent():
                part.project(hyper, signals)
                part.scale(hyper, signals)
                part.apply(hyper, signals)
        elif not signals.skips():
            self._step(hyper, signals)

    def scales(self, hyper: Hyper) -> list[Tensor]:
        return [s for part in self.parts for s in part.scales(hyper)]

    def _lent(self) -> Sequence[LowRankBatch]:
        assert self.gradients is not None
        for part, gradient in zip(self.parts, self.gradients, strict=True):
            part.lend([gradient])
        return self.parts

    def _step(self, hyper: Hyper, signals: Signals) -> None:
        table, width = self._table, len(FIELDS)
        assert self.gradients is not None
        table[_X::width] = array("q", map(torch.Tensor.data_ptr, self.gradients))
        self._place_scales(hyper)
        options = (
            float(hyper.lr), *hyper.betas, hyper.eps, hyper.weight_decay, hyper.scale,
            hyper.correct_bias, hyper.scale_type == "channel", hyper.scale_front, hyper.disable_nl,
        )  # fmt: skip
        factor, counters = signals.factor(hyper.maximize), signals.counters.data_ptr()
        start, threads = table.buffer_info()[0], torch.get_num_threads()

        def step(first: int, last: int) -> None:
            address = start + first * width * table.itemsize
            _C.cpu_step(address, last - first, *options, factor, counters, threads)

        first, epochs = 0, _C.cpu_epochs(start, len(self.parts), hyper.update_proj_gap)
        for i, epoch in enumerate(epochs):
            wanted = epoch, hyper.distribution
            if self._kept[i] != wanted and not self._draw(i, *wanted):
                step(first, i + 1)  # and then this z may go
                self._z[i] = None
                first = i + 1
        step(first, len(self.parts))

    def _draw(self, i: int, epoch: int, distribution: str) -> bool:
        """Puts z of this matrix into the table. Whether it stays for the next steps."""
        part, at = self.parts[i], i * len(FIELDS)
        form, z, stays = part.native_projection(epoch, distribution)
        self._z[i], self._kept[i] = z, (epoch, distribution) if stays else None
        self._table[at + _FORM], self._table[at + _Z] = FORMS[form], z.data_ptr()
        self._table[at + _PADDED] = cpu.padded(z, form)
        return stays

    def _place_scales(self, hyper: Hyper) -> None:
        """Where s of each matrix is written: the memory is the batch's own."""
        channel = hyper.scale_type == "channel"
        sizes = [len(part.w) if channel else 1 for part in self.parts]
        if [len(s) for s in self.s] != sizes:
            self.s = list(torch.zeros(sum(sizes), dtype=torch.float32, device="cpu").split(sizes))
            self._table[_S :: len(FIELDS)] = array("q", map(torch.Tensor.data_ptr, self.s))
        for part, s in zip(self.parts, self.s, strict=True):
            part.used = s
