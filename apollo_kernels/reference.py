"""APOLLO in plain PyTorch: the specification, the CPU path, and in float64 the oracle of the tests.

    project  R = X P^T, q_c = |X_c|^2       (paper: Algorithm 1, step 1)
    scale    M, V <- Adam(R); s; limiter    (steps 2 and 3)
    apply    W <- W - step * s_c * X_c      (step 4)

Arithmetic runs in float64 for float64 weights and in float32 for all others, with one rounding at
the store. The functions say what every back end computes; the two batches at the end of the file
are the back end itself, one matrix or one dense parameter each. cpu_batch.py puts matrices together
that a compiled call can step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import cpu, cpu_batch, int8, moments
from apollo_kernels.batch import NORM_GROWTH, TINY, Dense, Hyper, LowRank, Signals
from apollo_kernels.cpu_batch import CpuBatch
from apollo_kernels.philox import ROUNDING_INT8, draw, moment_bits, rounding_bits, scaled, sparse

_CHUNK = 2**20  # elements widened at a time: bounds the temporaries and keeps them in cache


def _parts(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors, cut alike along dimension 0 where the first has more than _CHUNK elements."""
    first = tensors[0]
    if first.numel() <= _CHUNK:
        return (tensors,)
    size = max(1, _CHUNK * len(first) // first.numel())
    return zip(*(t.split(size) for t in tensors), strict=True)


def _widen(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` [a, b] as ``dtype`` in the same memory order (``.to`` reorders a sliced matrix)."""
    if x.dtype == dtype:
        return x
    return x.to(dtype) if x.stride(-1) == 1 else x.t().to(dtype).t()


def project(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """R = X P^T and the squared channel norms, in one pass over X.

    Args
        x: gradient [C, K], any float dtype and strides.
        p: projection [r, K], float32 or float64: the dtype of the result.
    Returns
        R [C, r] and q [C].
    """
    r, q = [], []
    for (part,) in _parts(x):
        wide = _widen(part, p.dtype)
        thin = p.shape[0] == 1  # the BLAS is slow there
        r.append(torch.sum(wide * p, dim=1, keepdim=True) if thin else torch.mm(wide, p.t()))
        q.append(torch.sum(wide * wide, dim=1))
    return (r[0], q[0]) if len(r) == 1 else (torch.cat(r), torch.cat(q))


def project_sparse(
    x: Tensor, row: Tensor, sign: Tensor, rank: int, dtype: torch.dtype, start: int = 0
) -> tuple[Tensor, Tensor]:
    """``project`` where P has one nonzero per column: each k is added to its row of R, by its sign.

    Whole blocks of ``rank`` columns are permutations of the rows of R: they are put into that
    order and added up. So the cost does not depend on the rank, and a NaN reaches no other entry
    of R than its own.

    Args
        x: gradient [C, K], any float dtype and strides.
        row, sign: [K], integers, of philox.sparse.
        dtype: of the result and of its sums.
        start: the number of the first k among all, of which X may be a part.
    Returns
        R [C, r] and q [C].
    """
    channels, k = x.shape
    head = min(-start % rank, k)  # the rest of a block that began before
    blocks_here = (k - head) // rank
    whole = blocks_here * rank
    column = torch.arange(whole, device=x.device)
    ends = [slice(0, head), slice(head + whole, k)]
    inner = slice(head, head + whole)
    place = column - column % rank + row[inner]
    order = torch.empty_like(column).scatter_(0, place, column)  # k by (block, row of R)
    sign = sign.to(dtype)
    r = torch.empty((channels, rank), dtype=dtype, device=x.device)
    q = torch.empty((channels,), dtype=dtype, device=x.device)
    order = order + head
    for part, sums, squares in _parts(x, r, q):
        wide = _widen(part, dtype)
        if wide.stride(1) == 1:
            blocks = wide.index_select(1, order).mul_(sign[order])
            sums.copy_(blocks.view(len(part), blocks_here, rank).sum(1))
        else:
            blocks = wide.t().index_select(0, order).mul_(sign[order, None])
            sums.copy_(blocks.view(blocks_here, rank, len(part)).sum(0).t())
        for end in ends:
            sums.index_add_(1, row[end], wide[:, end] * sign[end])
        torch.sum(wide * wide, dim=1, out=squares)
    return r, q


def scale(
    r: Tensor, q: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper
) -> tuple[Tensor, Tensor]:
    """Adam's moments of R, updated in place, and how large each channel's step should be.

    Args
        r: projected gradient [C, r];  q: squared channel norms of the gradient [C].
        exp_avg, exp_avg_sq: moments M and V [C, r]; an entry whose R^2 is not finite keeps them.
    Returns
        s: [C] for "channel", [1] for "tensor" (APOLLO-Mini).
        u2: [] squared norm of the scaled gradient diag(s) G, free of another pass over G.
    """
    norm = _channel_norms if hyper.scale_type == "channel" else _norm
    r_norm = norm(r)
    _moments(r, r_norm, exp_avg, exp_avg_sq, hyper.betas)
    n = _ratio(exp_avg, exp_avg_sq.sqrt().add_(hyper.eps), hyper.eps)
    s = (norm(n) / (r_norm + TINY)).view(-1)
    return s, (s * s * q).sum()


def _channel_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


def _norm(x: Tensor) -> Tensor:
    """[]: the squares of all channels together may pass float32's range, where x does not."""
    norm = torch.linalg.vector_norm(x)
    if not math.isfinite(norm):
        norm = torch.linalg.vector_norm(x, dtype=torch.float64).to(x.dtype)
    return norm


def _moments(
    g: Tensor, norms: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]
) -> Tensor | None:
    """Adam's moments in place. An entry whose g^2 is not finite keeps them.

    ``norms``: of g or of its parts; where their squares are finite, so is every g^2, and no mask is
    needed. Their own finiteness says too little: the norm of one element never overflows.
    Returns
        None, or the mask of the entries with a finite square.
    """
    ok = None
    largest = float(norms if norms.dim() == 0 else norms.max()) if norms.numel() else 0.0
    if not largest**2 <= torch.finfo(g.dtype).max:
        ok = torch.isfinite(g * g)
        old = exp_avg.clone(), exp_avg_sq.clone()
    # b1 M + (1 - b1) g in one pass. PyTorch takes M + w (g - M) for w below a half and else
    # g - (1 - w) (g - M), so that neither of the two is lost, however far apart they are.
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    if ok is not None:
        exp_avg.copy_(torch.where(ok, exp_avg, old[0]))
        exp_avg_sq.copy_(torch.where(ok, exp_avg_sq, old[1]))
    return ok


def _ratio(exp_avg: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """N = M / (sqrt(V) + eps), in the memory of the denominator; 0 where that is 0."""
    if eps > 0:
        return torch.div(exp_avg, denominator, out=denominator)
    return torch.where(denominator == 0, 0.0, exp_avg / denominator)


def limit(u: float, previous: float) -> tuple[float, float]:
    """The norm-growth limiter: the factor on an update of norm ``u``, and the norm to store."""
    factor = 1.0 if previous < TINY else 1.0 / max(u / (previous + TINY) / NORM_GROWTH, 1.0)
    return factor, u * factor


def _decay(wide: Tensor, decay: float) -> Tensor:
    """W <- W - decay W in place; an infinite weight stays what it is.

    1 - decay is never formed, since float32 would lose a decay of 1e-7.
    """
    if decay:
        largest = torch.finfo(wide.dtype).max
        wide.sub_(wide.clamp(-largest, largest), alpha=decay)
    return wide


def apply(w: Tensor, x: Tensor, coefficient: Tensor, decay: float) -> None:
    """W <- W - decay W - coefficient_c X_c in place, rounded once.

    Args
        w, x: weight and gradient [C, K], any float dtypes and strides.
        coefficient: [C] or [1], in the dtype of the arithmetic.
        decay: lr * weight_decay.
    """
    dtype = coefficient.dtype
    column = -coefficient.expand(w.shape[0]).unsqueeze(1)
    for part, gradient, c in _parts(w, x, column):
        wide = _decay(_widen(part, dtype), decay)
        wide.addcmul_(_widen(gradient, dtype), c)
        if wide is not part:
            part.copy_(wide)


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 ``x`` to bf16, upward with the probability of what is cut off: unbiased.

    Args
        bits: int32 in [0, 65536), uniform. What is not finite, or nearly, is rounded to nearest.
    """
    raw = x.view(torch.int32)
    cut = ((raw + bits) & -65536).view(torch.float32).bfloat16()
    return torch.where((raw & 0x7FFFFFFF) < 0x7F7F0000, cut, x.bfloat16())


def apply_stochastic(
    item: LowRank, x: Tensor, coefficient: Tensor, decay: float, step: int
) -> None:
    """``apply`` to a bf16 weight [m, n], with stochastic instead of nearest rounding.

    Args
        x: the gradient [m, n], as the weight lies. Other arguments as in ``apply``.
        step: its low 32 bits, which decide the random ones.
    """
    rows, columns = item.weight.shape
    coefficient = -coefficient.expand(rows if item.rows else columns)
    size = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, size):
        part, gradient = item.weight[first : first + size], x[first : first + size].float()
        c = coefficient[first : first + size, None] if item.rows else coefficient
        wide = _decay(part.float(), decay)
        wide.addcmul_(gradient, c)
        row, column = (item.part.row, item.part.column) if item.part else (0, 0)
        bits = rounding_bits(
            item.key, step, row + first, len(part), columns, part.device, column=column
        )
        part.copy_(round_stochastically(wide, bits))


def update_int8(
    codes: Tensor,
    grid: Tensor,
    key: int,
    step: int,
    update: Callable[[slice, Tensor], None],
    row: int = 0,
) -> None:
    """An update of an int8 weight: dequantize, update in float32, requantize by chance.

    A part of the rows at a time, so that the float32 weight never stands as a whole.

    Args
        codes, grid: uint8 [m, n] and int32 [m, groups], of int8.py; written.
        step: its low 32 bits; with ``key`` they decide the random ones.
        update: is handed some rows and their float32 weights, which it changes in place.
        row: where the first row stands in the whole weight, if these are a part of it.
    """
    rows, columns = codes.shape
    size = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, size):
        some = slice(first, first + size)
        old = int8.dequantize(codes[some], grid[some])
        new = old.clone()
        update(some, new)
        place = row + first, len(old), columns
        bits = rounding_bits(key, step, *place, codes.device, ROUNDING_INT8)
        int8.requantize(codes[some], grid[some], old, new, bits)


def apply_int8(item: LowRank, x: Tensor, coefficient: Tensor, decay: float, step: int) -> None:
    """``apply_stochastic`` to an int8 weight."""
    assert item.grid is not None
    rows, columns = item.weight.shape
    coefficient = -coefficient.expand(rows if item.rows else columns)

    def update(some: slice, wide: Tensor) -> None:
        c = coefficient[some, None] if item.rows else coefficient
        _decay(wide, decay).addcmul_(x[some].float(), c)

    row = item.part.row if item.part else 0
    update_int8(item.weight, item.grid, item.key, step, update, row)


def adamw(
    w: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    step: int,
    factor: float,
) -> bool:
    """The low-rank rule without a projection, in place: decoupled AdamW as apollo_torch has it.

    N = M / (sqrt(V) + eps), and the bias correction is part of the step size. So eps weighs the
    same at every step (in torch.optim.AdamW it weighs sqrt(1 - b2^t) times as much).

    Args
        w, g, exp_avg, exp_avg_sq: the same shape. ``factor`` multiplies the gradient. An element
        whose squared gradient is not finite keeps its weight and its moments.
    Returns
        whether every element was finite.
    """
    g = g.to(exp_avg.dtype)
    if factor != 1:
        g = g * factor
    ok = _moments(g, torch.linalg.vector_norm(g), exp_avg, exp_avg_sq, hyper.betas)
    wide = w.to(exp_avg.dtype)
    n = _ratio(exp_avg, exp_avg_sq.sqrt().add_(hyper.eps), hyper.eps)
    new = _decay(wide.clone(), float(hyper.lr) * hyper.weight_decay)
    new.sub_(n, alpha=hyper.step_size(step))
    w.copy_(new if ok is None else torch.where(ok, new, wide))
    return ok is None or bool(ok.all())


# ---- the back end --------------------------------------------------------------------------------

BY_ADDRESS = False  # a batch is lent the gradients for each step
SAME_ORDER = False  # a gradient may lie in another memory order than its weight
UPDATED, LIMITED, NOT_FINITE = range(3)  # places in the counters
_LENT = torch.empty((0,), dtype=torch.float32, device="cpu")  # where an item would keep a gradient


def takes(item: LowRank | Dense) -> bool:
    return True


def family(item: LowRank | Dense) -> Hashable:
    """Matrices that one compiled call steps; or else each is a batch of its own, so that its
    gradient is still in the caches for ``apply``."""
    compiled = isinstance(item, LowRank) and cpu_batch.takes(item)
    return CpuBatch if compiled else id(item)


def build(items: Sequence[LowRank], *, separate: bool) -> LowRankBatch | CpuBatch:
    if cpu_batch.takes(items[0]):
        return CpuBatch(items, list(map(LowRankBatch, items)), separate)
    (item,) = items
    return LowRankBatch(item) if item.part is None else PartBatch(item)


def build_dense(items: Sequence[Dense]) -> DenseBatch:
    (item,) = items
    return DenseBatch(item)


def _times(factor: float, r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """R and q of ``factor`` times the gradient, in place; a float32 factor^2 may be 0."""
    return (r, q) if factor == 1 else (r.mul_(factor), q.mul_(factor).mul_(factor))


@functools.cache
def _outcome(places: tuple[int, ...], device: torch.device) -> Tensor:
    counts = [int(place in places) for place in range(3)]
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _count(signals: Signals, *places: int) -> None:
    signals.counters.add_(_outcome(places, signals.counters.device))


def _is_sparse(distribution: str, rank: int) -> bool:
    return distribution == "sparse" and rank > 1  # at rank 1 it is a dense row of signs


class LowRankBatch:
    """One matrix. ``lend`` gives it the gradient, which it keeps for one step only."""

    def __init__(self, item: LowRank):
        self.item = replace(item, grad=_LENT)
        self.w = item.weight if item.rows else item.weight.t()
        # What compiled passes can walk stays so for as long as the batch is used (plan.py).
        x = item.grad if item.rows else item.grad.t()
        self.native_project = cpu.supported(x)
        self.form = cpu.layout(x, item.exp_avg.shape[1])  # of z, for a compiled pass
        self.native_scale = cpu.supported(item.exp_avg, item.exp_avg_sq)
        same_order = (self.w.stride(1) == 1) == (x.stride(1) == 1)
        self.native_apply = same_order and cpu.supported(self.w, x)
        part = item.part
        self.start = 0 if part is None else part.column if item.rows else part.row  # the first k
        self.skipped = False
        self.t = 0  # the step, from 1
        self.x: Tensor | None = None  # the gradient as [C, K]
        self.r: Tensor | None = None
        self.q: Tensor | None = None
        self.coefficient: Tensor | None = None  # what each channel of X is multiplied with
        self.used: Tensor | None = None  # s of the last step; kept for ``scales``

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        self.x = self.r = self.q = self.coefficient = None
        if gradients is not None:
            (grad,) = gradients
            self.x = grad if self.item.rows else grad.t()

    def project(self, hyper: Hyper, signals: Signals) -> None:
        self.skipped = signals.skips()
        item, x = self.item, self.x
        assert x is not None
        if self.skipped:
            return
        if item.leads:
            item.step.add_(1)
        self.t = int(item.step)
        epoch = (self.t - 1) // hyper.update_proj_gap % 2**32
        self.r, self.q = self._projected(x, epoch, hyper.distribution)

    def _projected(self, x: Tensor, epoch: int, distribution: str) -> tuple[Tensor, Tensor]:
        """R and q, by the pass that suits x, with whatever of the projection is kept."""
        item = self.item
        rank, dtype, start = item.exp_avg.shape[1], item.exp_avg.dtype, self.start
        is_sparse = _is_sparse(distribution, rank)
        if self.native_project and not (is_sparse and start % rank):  # they begin with a block
            _, p, _ = self.native_projection(epoch, distribution)
            return (cpu.project_sparse if is_sparse else cpu.project)(x, p, rank)
        device = x.device
        drawn = (item.key, epoch, rank, x.shape[1])
        if is_sparse:
            pair, _ = self._kept(
                "pair",
                (epoch, distribution, device),
                lambda: torch.stack(sparse(*drawn, start=start, device=device)),
            )
            row, sign = pair
            return project_sparse(x, row, sign, rank, dtype, start)
        p, _ = self._kept(
            "scaled",
            (epoch, distribution, device),
            lambda: scaled(draw(*drawn, distribution, start=start, device=device), dtype),
        )
        return project(x, p)

    def native_projection(self, epoch: int, distribution: str) -> tuple[str, Tensor, bool]:
        """P as a compiled pass reads it, how it is laid out, and whether it is kept for later."""
        item, start = self.item, self.start
        rank, k = item.exp_avg.shape[1], self.w.shape[1]
        drawn = (item.key, epoch, rank, k)

        def make() -> Tensor:
            if form == "places":
                return cpu.places(*sparse(*drawn, start=start))
            return cpu.arrange(draw(*drawn, distribution, start=start), form)

        form = "places" if _is_sparse(distribution, rank) else self.form
        return form, *self._kept(form, (epoch, distribution), make)

    def _kept(
        self, form: str, of: tuple[Any, ...], make: Callable[[], Tensor]
    ) -> tuple[Tensor, bool]:
        wanted = (form, self.item.exp_avg.shape[1], self.w.shape[1], self.start, *of)
        return cpu.projections.get(self.item.step, self.item.key, wanted, make)

    def square_norm(self) -> Tensor:
        if self.q is None:
            return torch.zeros((), dtype=torch.float64, device=self.item.weight.device)
        return self.q.sum(dtype=torch.float64)

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        if self.skipped:
            return
        factor = signals.factor(hyper.maximize)
        s, u2 = self._scaled(hyper, factor)
        self._limit(s, u2, factor, hyper, signals)

    def _scaled(self, hyper: Hyper, factor: float) -> tuple[Tensor, float]:
        """Moments, s and u2 of ``factor`` times the gradient."""
        item, r, q = self.item, self.r, self.q
        assert r is not None and q is not None
        if self.native_scale and type(r) is Tensor:
            return cpu.scale(r, q, item.exp_avg, item.exp_avg_sq, hyper, factor)
        r, q = _times(factor, r, q)
        s, square = scale(r, q, item.exp_avg, item.exp_avg_sq, hyper)
        return s, float(square)

    def _limit(self, s: Tensor, u2: float, factor: float, hyper: Hyper, signals: Signals) -> None:
        """The norm-growth limiter: what each channel is multiplied with; None for NaN or Inf."""
        item = self.item
        self.used = s
        alpha = math.sqrt(hyper.scale)
        u = math.sqrt(u2) * (alpha if hyper.scale_front else 1.0)
        if not math.isfinite(u):
            _count(signals, NOT_FINITE)
            return
        growth = 1.0
        if not hyper.disable_nl:
            growth, norm = limit(u, float(item.update_norm))
            item.update_norm.fill_(norm)
        self.coefficient = s * (hyper.step_size(self.t) * alpha * growth * factor)
        _count(signals, UPDATED, *([LIMITED] if growth < 1 else []))

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        coefficient, x = self.coefficient, self.x
        if coefficient is None or x is None:  # skipped, or not finite
            return
        item, w, decay = self.item, self.w, float(hyper.lr) * hyper.weight_decay
        grad = x if item.rows else x.t()
        if item.grid is not None:
            apply_int8(item, grad, coefficient, decay, self.t % 2**32)
        elif hyper.stochastic_rounding and w.dtype == torch.bfloat16:
            apply_stochastic(item, grad, coefficient, decay, self.t % 2**32)
        elif self.native_apply:
            cpu.apply(w, x, coefficient, decay)
        else:
            apply(w, x, coefficient, decay)

    def scales(self, hyper: Hyper) -> list[Tensor]:
        if self.used is None:  # as it is in a kernel's workspace
            count = 1 if hyper.scale_type == "tensor" else len(self.w)
            self.used = torch.zeros(count, dtype=self.item.exp_avg.dtype, device=self.w.device)
        return [self.used]


class PartBatch(LowRankBatch):
    """The part of a matrix that is on this rank (batch.PartBatch says what happens between verbs).

    It sends rows [R | q] of ``share`` channels to each owner.
    """

    def __init__(self, item: LowRank):
        super().__init__(item)
        assert item.part is not None
        self.owners, self.share = item.part.owners, item.part.share(len(self.w))
        self.sums: Tensor | None = None
        self.norms: Tensor | None = None
        self.s: Tensor | None = None
        self.s_here: Tensor | None = None  # of all channels here

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        super().lend(gradients)
        self.sums = self.norms = self.s = self.s_here = None

    def project(self, hyper: Hyper, signals: Signals) -> None:
        super().project(hyper, signals)
        if self.owners > 1 and not self.skipped:
            assert self.r is not None and self.q is not None
            rows = torch.cat([self.r, self.q.unsqueeze(1)], dim=1)
            self.sums = _filled(rows, self.owners * self.share).view(self.owners, -1)

    def receive_sums(self, sums: Tensor) -> None:
        own = sums.view(self.share, -1)[: len(self.item.exp_avg)]
        self.r, self.q = own[:, :-1].contiguous(), own[:, -1].contiguous()
        self.sums = None  # they are large, and have arrived

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        if self.skipped:
            return
        factor = signals.factor(hyper.maximize)
        if hyper.scale_type == "channel":
            self.s_here, u2 = self._scaled(hyper, factor)
            if self.owners > 1:
                self.s = _filled(self.s_here, self.share)
            sums = [u2]
        else:
            sums = self._squares(hyper, factor)
        device = self.item.exp_avg.device
        self.norms = torch.tensor(sums, dtype=torch.float64, device=device)

    def _squares(self, hyper: Hyper, factor: float) -> list[float]:
        """|R|^2, |N|^2 and |X|^2 of the own channels, after the moments' update."""
        item, r, q = self.item, self.r, self.q
        assert r is not None and q is not None
        r, q = _times(factor, r, q)
        _moments(r, _norm(r), item.exp_avg, item.exp_avg_sq, hyper.betas)
        n = _ratio(item.exp_avg, item.exp_avg_sq.sqrt().add_(hyper.eps), hyper.eps)
        norms = (torch.linalg.vector_norm(x, dtype=torch.float64) for x in (r, n))
        return [*(float(norm.square()) for norm in norms), float(q.sum(dtype=torch.float64))]

    def receive_scales(self, s: Tensor) -> None:
        self.s_here = s.reshape(-1)[: len(self.w)]

    def limit(self, hyper: Hyper, signals: Signals) -> None:
        if self.skipped:
            return
        assert self.norms is not None
        dtype, sums = self.item.exp_avg.dtype, self.norms.tolist()
        if hyper.scale_type != "channel":
            r2, n2, q = sums
            ratio = math.sqrt(n2) / (math.sqrt(r2) + TINY)
            self.s_here = torch.tensor([ratio], dtype=dtype, device=self.norms.device)
            sums = [ratio * ratio * q]
        assert self.s_here is not None
        self._limit(self.s_here, sums[0], signals.factor(hyper.maximize), hyper, signals)


def _filled(t: Tensor, size: int) -> Tensor:
    """[n, ...] with zeros up to ``size``."""
    if len(t) == size:
        return t.contiguous()
    whole = t.new_zeros((size, *t.shape[1:]))
    whole[: len(t)] = t
    return whole


class DenseBatch:
    """One dense parameter, lent its gradient as a LowRankBatch is."""

    def __init__(self, item: Dense):
        self.item = replace(item, grad=_LENT)
        self.grad: Tensor | None = None

    def lend(self, gradients: Sequence[Tensor] | None) -> None:
        self.grad = None if gradients is None else gradients[0]

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        item, grad = self.item, self.grad
        assert grad is not None
        if signals.skips():
            return
        item.step.add_(1)
        factor = signals.factor(hyper.maximize)
        step, finite = int(item.step), True
        moments_of = _Moments(item, step % 2**32)

        def update(some: slice, w: Tensor) -> None:
            nonlocal finite
            m, v = moments_of.load(some)
            finite &= adamw(w, _vector(grad)[some], m, v, hyper, step, factor)
            moments_of.store(some, m, v)

        if item.grid is not None:
            row = item.first // max(item.weight.shape[1], 1)
            update_int8(item.weight, item.grid, item.key, step % 2**32, update, row)
        else:
            weight = _vector(item.weight)
            size = max(1, _CHUNK * len(weight) // max(weight.numel(), 1))
            for first in range(0, len(weight), size):
                some = slice(first, min(first + size, len(weight)))
                update(some, weight[some])
        _count(signals, UPDATED if finite else NOT_FINITE)


def _vector(t: Tensor) -> Tensor:
    """``t`` with at least one dimension."""
    return t.view(1) if t.dim() == 0 else t


class _Moments:
    """M and V of a dense parameter, however they are stored: parts along dimension 0 as floats.

    ``step``: its low 32 bits, which decide the random ones.
    """

    def __init__(self, item: Dense, step: int):
        self.stored = _vector(item.exp_avg), _vector(item.exp_avg_sq)
        self.units, self.key, self.step, self.first = item.units, item.key, step, item.first
        self.dtype = item.exp_avg.dtype

    def load(self, some: slice) -> tuple[Tensor, Tensor]:
        """float32 and float64 ones in place, so that there is nothing to store."""
        m, v = (t[some] for t in self.stored)
        if self.dtype == torch.bfloat16:
            return m.float(), v.float()
        if self.units is None:
            return m, v
        m, v = (
            moments.decode(*moments.rows_of(t, unit, some), code).view(t[some].shape)
            for t, unit, code in zip(self.stored, self.units, moments.CODES.values(), strict=True)
        )
        return m, v

    def store(self, some: slice, m: Tensor, v: Tensor) -> None:
        """Rounds them by chance."""
        if self.dtype not in (torch.bfloat16, torch.uint8):
            return
        first = self.first + some.start * math.prod(m.shape[1:])
        drawn = moment_bits(self.key, self.step, first, m.numel(), m.device)
        codes = moments.CODES.values()
        for i, (x, bits, code) in enumerate(zip((m, v), drawn, codes, strict=True)):
            if self.units is None:
                x = x.clamp(-moments.LARGEST, moments.LARGEST)
                self.stored[i][some].copy_(round_stochastically(x, bits.view(x.shape)))
            else:
                to, unit = moments.rows_of(self.stored[i], self.units[i], some)
                moments.store(x.reshape(to.shape), to, unit, bits.view(to.shape), code)
