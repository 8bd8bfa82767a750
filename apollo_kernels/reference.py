"""APOLLO in plain PyTorch: the specification, the CPU path, and in float64 the oracle of the tests.

    project  R = P G, q_c = |G_c|^2         (paper: Algorithm 1, step 1)
    scale    M, V <- Adam(R); s; limiter    (steps 2 and 3)
    apply    W <- W - step * s_c * G_c      (step 4)

G is seen as X [C, K]: C channels, each K long along the contracted side. Arithmetic runs in float64
for float64 weights and in float32 for all others, with one rounding at the store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_kernels import host
from apollo_kernels.philox import ProjectionCache, rounding_bits, scaled

NORM_GROWTH = 1.01  # gamma of the norm-growth limiter (paper, section 4.1, after Fira)
TINY = 1e-8  # keeps quotients of norms finite; a stored norm below it counts as unset
_CHUNK = 2**20  # elements widened at a time: bounds the temporaries and keeps them in cache


@dataclass(frozen=True)
class Hyper:
    """What one parameter group asks for. ``lr`` may be a tensor; the rest is plain numbers."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    correct_bias: bool
    maximize: bool
    scale_type: str = "channel"
    scale: float = 1.0
    scale_front: bool = False
    disable_nl: bool = False
    update_proj_gap: int = 200
    distribution: str = "gaussian"
    stochastic_rounding: bool = False

    def step_size(self, step: float) -> float:
        """lr times Adam's bias correction, kept outside of the limiter (as published)."""
        if not self.correct_bias:
            return float(self.lr)
        c1, c2 = (_one_minus_power(beta, step) for beta in self.betas)
        return float(self.lr) * math.sqrt(c2) / c1


@dataclass
class LowRank:
    """One low-rank parameter: weight and grad [m, n], moments [C, r], update_norm and step [].

    ``rows``: channels are the rows, so the columns are contracted; else the reverse.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    update_norm: Tensor
    step: Tensor
    key: int
    rows: bool


@dataclass
class Dense:
    """One parameter under AdamW: all tensors of the parameter's shape but step []."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _one_minus_power(beta: float, step: float) -> float:
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the moments beside a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    norm = torch.linalg.vector_norm
    dim = 1 if hyper.scale_type == "channel" else None
    r_norm = norm(r, dim=dim)
    _moments(r, r_norm, exp_avg, exp_avg_sq, hyper.betas)
    n = exp_avg / exp_avg_sq.sqrt().add_(hyper.eps)
    s = (norm(n, dim=dim) / (r_norm + TINY)).view(-1)
    return s, (s * s * q).sum()


def _moments(
    g: Tensor, norms: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float]
) -> Tensor | None:
    """Adam's moments in place. An entry whose g^2 is not finite keeps them.

    ``norms``: of g or of its parts; where they are finite, so is every g^2, and no mask is needed.
    Returns
        None, or the mask of the entries with a finite square.
    """
    ok = None
    if not math.isfinite(norms.sum()):
        ok = torch.isfinite(g * g)
        old = exp_avg.clone(), exp_avg_sq.clone()
    exp_avg.lerp_(g, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    if ok is not None:
        exp_avg.copy_(torch.where(ok, exp_avg, old[0]))
        exp_avg_sq.copy_(torch.where(ok, exp_avg_sq, old[1]))
    return ok


def limit(u: float, previous: float) -> tuple[float, float]:
    """The norm-growth limiter: the factor on an update of norm ``u``, and the norm to store."""
    factor = 1.0 if previous < TINY else 1.0 / max(u / (previous + TINY) / NORM_GROWTH, 1.0)
    return factor, u * factor


def apply(w: Tensor, x: Tensor, coefficient: Tensor, decay: float) -> None:
    """W <- W - decay W - coefficient_c X_c in place, rounded once.

    Args
        w, x: weight and gradient [C, K], any float dtypes and strides.
        coefficient: [C] or [1], in the dtype of the arithmetic.
        decay: lr * weight_decay; 1 - decay is never formed, since float32 would lose 1e-7.
    """
    dtype = coefficient.dtype
    column = -coefficient.expand(w.shape[0]).unsqueeze(1)
    for part, gradient, c in _parts(w, x, column):
        wide = _widen(part, dtype)
        if decay:
            wide.add_(wide, alpha=-decay)
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


def apply_stochastic(item: LowRank, coefficient: Tensor, decay: float, step: int) -> None:
    """``apply`` to a bf16 weight [m, n], with stochastic instead of nearest rounding."""
    rows, columns = item.weight.shape
    coefficient = -coefficient.expand(item.exp_avg.shape[0])
    size = max(1, _CHUNK // max(columns, 1))
    for first in range(0, rows, size):
        part, x = item.weight[first : first + size], item.grad[first : first + size].float()
        own = coefficient[first : first + size, None] if item.rows else coefficient
        wide = part.float()
        if decay:
            wide.add_(wide, alpha=-decay)
        wide.addcmul_(x, own)
        bits = rounding_bits(item.key, step, first, len(part), columns, part.device)
        part.copy_(round_stochastically(wide, bits))


def adamw(
    w: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: Hyper,
    step: float,
    sign: float,
) -> bool:
    """Decoupled AdamW in place, bias correction and eps as in torch.optim.AdamW.

    Args
        w, g, exp_avg, exp_avg_sq: the same shape. ``sign`` multiplies the gradient. An element
        whose squared gradient is not finite keeps its weight and its moments.
    Returns
        whether every element was finite.
    """
    c1, c2 = (_one_minus_power(b, step) if hyper.correct_bias else 1.0 for b in hyper.betas)
    lr = float(hyper.lr)
    g = g.to(exp_avg.dtype) * sign
    ok = _moments(g, torch.linalg.vector_norm(g), exp_avg, exp_avg_sq, hyper.betas)
    wide = w.to(exp_avg.dtype)
    decay = lr * hyper.weight_decay
    new = wide.add(wide, alpha=-decay) if decay else wide.clone()  # 0 * Inf is NaN
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(c2)).add_(hyper.eps)
    new.addcdiv_(exp_avg, denominator, value=-lr / c1)
    w.copy_(new if ok is None else torch.where(ok, new, wide))
    return ok is None or bool(ok.all())


def _gradient_sign(hyper: Hyper, grad_scale: Tensor | None) -> float:
    sign = -1.0 if hyper.maximize else 1.0
    return sign if grad_scale is None else sign / float(grad_scale)


def _drawn_and_projected(
    x: Tensor, item: LowRank, epoch: int, hyper: Hyper, cache: ProjectionCache
) -> tuple[Tensor, Tensor]:
    """``project`` with the P of this epoch, on the CPU's bf16 units where there are any."""
    rank, dtype = item.exp_avg.shape[1], item.exp_avg.dtype
    drawn = (item.key, epoch, rank, x.shape[1], hyper.distribution, x.device)
    if host.supported(x):
        form = host.layout(x, rank)
        return host.project(x, cache.get(*drawn, form, lambda z: host.arrange(z, form)), rank)
    return project(x, cache.get(*drawn, str(dtype), lambda z: scaled(z, dtype)))


def step_low_rank(
    batch: Sequence[LowRank],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One APOLLO step of every parameter of ``batch``, in place.

    Args
        counters: int64 [3] (updates, limited, not finite), added to.
        cache: where the current projections are kept.
        grad_scale, found_inf: of torch.amp.GradScaler; a set found_inf skips every write.
    """
    if found_inf is not None and bool(found_inf):
        return
    sign = _gradient_sign(hyper, grad_scale)
    alpha = math.sqrt(hyper.scale)
    decay = float(hyper.lr) * hyper.weight_decay
    updates = limited = 0
    for item in batch:
        item.step.add_(1)
        step = float(item.step)
        x, w = (item.grad, item.weight) if item.rows else (item.grad.t(), item.weight.t())
        r, q = _drawn_and_projected(x, item, (int(step) - 1) // hyper.update_proj_gap, hyper, cache)
        if sign != 1:
            r, q = r.mul_(sign), q.mul_(sign**2)
        s, u2 = scale(r, q, item.exp_avg, item.exp_avg_sq, hyper)
        u = math.sqrt(u2) * (alpha if hyper.scale_front else 1.0)
        if not math.isfinite(u):
            continue
        factor = 1.0
        if not hyper.disable_nl:
            factor, norm = limit(u, float(item.update_norm))
            item.update_norm.fill_(norm)
        coefficient = s * (hyper.step_size(step) * alpha * factor * sign)
        same_order = (w.stride(1) == 1) == (x.stride(1) == 1)
        if hyper.stochastic_rounding and w.dtype == torch.bfloat16:
            apply_stochastic(item, coefficient, decay, int(step))
        elif host.supported(w, x) and same_order:
            host.apply(w, x, coefficient, decay)
        else:
            apply(w, x, coefficient, decay)
        updates += 1
        limited += factor < 1
    counters += torch.tensor([updates, limited, len(batch) - updates], device=counters.device)


def step_dense(
    batch: Sequence[Dense],
    hyper: Hyper,
    counters: Tensor,
    cache: ProjectionCache,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step of every parameter of ``batch``, in place; arguments as in step_low_rank."""
    if found_inf is not None and bool(found_inf):
        return
    sign = _gradient_sign(hyper, grad_scale)
    updates = 0
    for item in batch:
        item.step.add_(1)
        tensors = (item.weight, item.grad, item.exp_avg, item.exp_avg_sq)
        finite = True
        for w, g, m, v in _parts(*(t.view(1) if t.dim() == 0 else t for t in tensors)):
            finite &= adamw(w, g, m, v, hyper, float(item.step), sign)
        updates += finite
    counters += torch.tensor([updates, 0, len(batch) - updates], device=counters.device)
