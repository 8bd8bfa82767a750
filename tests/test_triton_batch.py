"""The Triton back end at its border (batch.py), interpreted, against a float64 restatement."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)

from apollo_kernels import philox
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals
from apollo_kernels.triton_kernels import step

# NumPy's warnings, of overflows on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


# ---- the restatement -----------------------------------------------------------------------------


def hyper(**options):
    defaults = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, correct_bias=True)
    return Hyper(**{**defaults, "maximize": False, "distribution": "rademacher", **options})


def adam(state, r, h):
    """M, V and N after R, in float64. An entry keeps M and V where R^2 overflows float32."""
    m, v = state.exp_avg.double(), state.exp_avg_sq.double()
    good = (r**2).float().isfinite()
    m = torch.where(good, h.betas[0] * m + (1 - h.betas[0]) * r, m)
    v = torch.where(good, h.betas[1] * v + (1 - h.betas[1]) * r**2, v)
    denominator = v.sqrt() + h.eps
    n = torch.where(denominator == 0, 0.0, m / denominator)
    return m, v, n, good


def rate(h, t):
    c1, c2 = 1 - h.betas[0] ** t, 1 - h.betas[1] ** t
    return float(h.lr) * (math.sqrt(c2) / c1 if h.correct_bias else 1.0)


def restated(item, h, factor=1.0):
    """What a step makes of a low-rank item: weight, exp_avg, exp_avg_sq, update_norm in float64,
    and t. ``factor``: clip / grad_scale."""
    t = int(item.step) + 1
    g = (-1.0 if h.maximize else 1.0) * factor * item.grad.double()
    x = g if item.rows else g.t()
    rank = item.exp_avg.shape[1]
    epoch = (t - 1) // h.update_proj_gap % 2**32
    z = philox.draw(item.key, epoch, rank, x.shape[1], h.distribution).double()
    r = x @ z.t() / math.sqrt(max(rank, 1))
    m, v, n, _ = adam(item, r, h)
    dim = (1,) if h.scale_type == "channel" else (0, 1)
    s = n.pow(2).sum(dim, keepdim=True).sqrt() / (r.pow(2).sum(dim, keepdim=True).sqrt() + 1e-8)
    update = s * x
    alpha = math.sqrt(h.scale)
    u = float(update.norm()) * (alpha if h.scale_front else 1.0)
    previous = float(item.update_norm)
    shrink = 1.0 if previous < 1e-8 else 1 / max(u / (previous + 1e-8) / 1.01, 1.0)
    if h.disable_nl:
        shrink, norm = 1.0, previous
    else:
        norm = u * shrink
    update = rate(h, t) * alpha * shrink * (update if item.rows else update.t())
    w = (1 - float(h.lr) * h.weight_decay) * item.weight.double() - update
    return dict(weight=w, exp_avg=m, exp_avg_sq=v, update_norm=torch.tensor(norm).double()), t


def restated_dense(item, h, factor=1.0):
    t = int(item.step) + 1
    g = (-1.0 if h.maximize else 1.0) * factor * item.grad.double()
    m, v, n, good = adam(item, g, h)
    w = item.weight.double()
    new = (1 - float(h.lr) * h.weight_decay) * w - rate(h, t) * n
    return dict(weight=torch.where(good, new, w), exp_avg=m, exp_avg_sq=v), t


def low_rank(w, g, rows, rank, key=12345, t=3, **state):
    """A parameter in mid-run: moments, a limiter's norm and a step count."""
    channels, k = w.shape if rows else w.shape[::-1]
    m = torch.randn(channels, min(rank, k))
    v = 0.5 + torch.rand(m.shape)
    norm = torch.tensor(0.9 * float(g.double().norm()), dtype=torch.float32)
    values = dict(exp_avg=m, exp_avg_sq=v, update_norm=norm, step=torch.tensor(t))
    return LowRank(weight=w, grad=g, key=key, rows=rows, **{**values, **state})


def dense(w, g, t=3, **state):
    m, v = torch.randn(w.shape), torch.rand(w.shape) + 0.5
    values = dict(exp_avg=m, exp_avg_sq=v, step=torch.tensor(t))
    return Dense(weight=w, grad=g, **{**values, **state})


def data(shape, dtype=torch.float32, g_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(g_dtype or dtype)


def signals(**given):
    given = {k: torch.tensor(v, dtype=torch.float32) for k, v in given.items()}
    return Signals(torch.zeros(3, dtype=torch.int64), **given)


def take(batch, h, s):
    """One step of a batch of either sort."""
    if isinstance(batch, step.DenseBatch):
        return batch.adamw(h, s)
    batch.project(h, s)
    batch.scale(h, s)
    return batch.apply(h, s)


def check(item, expected, rtol=1e-4):
    """Every tensor of ``item``: to rtol of its largest change, and to a rounding of its own."""
    values, t = expected
    assert int(item.step) == t
    for name, right in values.items():
        mine = getattr(item, name)
        eps = torch.finfo(mine.dtype).eps
        if right.numel():
            size = right.abs().max()
            error = (mine.double() - right).abs().max()
            allowed = (eps if mine.dtype != torch.float32 else 0) * size + rtol * size
            assert error <= allowed, (name, float(error), float(allowed))


def snapshot(items):
    return [t.clone() for i in items for t in vars(i).values() if isinstance(t, torch.Tensor)]


# ---- low-rank matrices ---------------------------------------------------------------------------


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_step_of_every_rank_and_orientation(scale_type, dtype, separate):
    """One batch holds them all; the last matrix is cut along its contracted side."""
    h = hyper(scale_type=scale_type, scale=2.0, maximize=separate)
    shapes = {1: (9, 40), 3: (40, 9), 8: (16, 48), 130: (5, 150), 2: (2, 2100)}
    items = [
        low_rank(*data(shape if rows else shape[::-1], dtype), rows, rank, key=rank + 7)
        for rank, shape in shapes.items()
        for rows in (True, False)
    ]
    expected = [restated(item, h) for item in items]
    s = signals()
    take(step.build(items, separate=separate), h, s)
    for item, right in zip(items, expected, strict=True):
        check(item, right)
    assert s.counters.tolist()[0::2] == [len(items), 0]


def test_normals_agree_but_for_roundings_of_z():
    items = [low_rank(*data((9, 40)), True, rank) for rank in (8, 130)]
    h = hyper(distribution="gaussian", scale_type="tensor")
    expected = [restated(item, h) for item in items]
    take(step.build(items, separate=False), h, signals())
    for item, right in zip(items, expected, strict=True):
        check(item, right, rtol=4e-3)
