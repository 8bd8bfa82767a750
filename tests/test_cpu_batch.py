"""The CPU's compiled step gives the bits of its passes called one by one, and forgets no case."""

import math
from dataclasses import replace

import pytest
import torch

from apollo_kernels import APOLLO, cpu, cpu_batch, native, reference
from apollo_kernels.batch import Hyper, LowRank, Signals

pytestmark = pytest.mark.skipif(
    not cpu.NATIVE, reason="no AVX512, or no native module; PyTorch runs instead"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHANNEL = Hyper(0.01, (0.9, 0.999), 1e-6, 0.1, True, False, update_proj_gap=2)
TENSOR = replace(CHANNEL, scale_type="tensor", scale=128.0)


def items(dtype, rank):
    """Both orientations and both memory orders; the last two are experts that share a step."""
    torch.manual_seed(0)
    found, shared = [], torch.zeros((), dtype=torch.int64)
    shapes = [(70, 40, True), (33, 600, False), (600, 64, True), (200, 90, True), (200, 90, False)]
    for i, (m, n, rows) in enumerate(shapes):
        weight, grad = (torch.randn(m, n).to(dtype) for _ in range(2))
        if i % 2:
            weight, grad = (t.t().contiguous().t() for t in (weight, grad))
        channels, k = (m, n) if rows else (n, m)
        moments = [torch.zeros(channels, min(rank, k)) for _ in range(2)]
        step = shared if i > 2 else torch.zeros((), dtype=torch.int64)
        norm = torch.zeros(())
        found.append(LowRank(weight, grad, *moments, norm, step, 7 + i, rows, leads=i != 4))
    return found


def signals(**more):
    return Signals(torch.zeros(3, dtype=torch.int64), **more)


def trained(dtype, rank, hyper, separate, steps=5, bad=None, **more):
    """Weights, state and counters after some steps over a redraw; one gradient may be bad."""
    batch_items, found = items(dtype, rank), signals(**more)
    batch = reference.build(batch_items, separate=separate)
    assert isinstance(batch, cpu_batch.CpuBatch)
    for step in range(steps):
        torch.manual_seed(step)
        gradients = [torch.randn_like(item.grad) * (step + 1) for item in batch_items]
        if step == 2 and bad is not None:
            gradients[2][3, 5] = bad
        batch.lend(gradients)
        batch.project(hyper, found)
        batch.scale(hyper, found)
        batch.apply(hyper, found)
        scales = [s.clone() for s in batch.scales(hyper)]
        batch.lend(None)
    state = [
        t
        for item in batch_items
        for t in (item.weight, item.exp_avg, item.exp_avg_sq, item.update_norm, item.step)
    ]
    return [*state, *scales, found.counters]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("hyper, rank", [(CHANNEL, 20), (CHANNEL, 3), (TENSOR, 1), (TENSOR, 24)])
def test_one_call_gives_the_bits_of_the_verbs(hyper, rank, distribution, dtype):
    hyper = replace(hyper, distribution=distribution)
    if not (cpu.TILES or (cpu.PAIRS and dtype == torch.bfloat16)) and rank > 7:
        pytest.skip("this processor leaves the product to the BLAS")
    assert same(trained(dtype, rank, hyper, False), trained(dtype, rank, hyper, True))


SWITCHES = [
    {"maximize": True}, {"correct_bias": False}, {"scale_front": True, "scale": 4.0},
    {"disable_nl": True}, {"weight_decay": 0.0}, {"eps": 0.0}, {"betas": (0.0, 0.9)},
    {"lr": torch.tensor(0.02)}, {"stochastic_rounding": True}, {"update_proj_gap": 1},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: next(iter(s)))
def test_every_switch_reaches_the_call(switch):
    hyper, dtype = replace(CHANNEL, **switch), torch.bfloat16
    found = trained(dtype, 4, hyper, False)
    assert same(found, trained(dtype, 4, hyper, True))
    assert not same(found, trained(dtype, 4, CHANNEL, False))


def test_a_gradient_scaler_is_heard():
    scaled = {"grad_scale": torch.tensor(8.0), "found_inf": torch.tensor(0.0)}
    one, other = (trained(torch.float32, 4, CHANNEL, separate, **scaled) for separate in (0, 1))
    assert same(one, other)
    assert not same(one, trained(torch.float32, 4, CHANNEL, False))


def test_a_step_that_the_scaler_skips_writes_nothing():
    found = trained(torch.float32, 4, CHANNEL, False, found_inf=torch.tensor(1.0))
    fresh = items(torch.float32, 4)
    for item, weight in zip(fresh, found[::5], strict=False):
        assert torch.equal(item.weight, weight)
    assert not any(s.any() for s in found[25:])  # scales and counters


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_costs_its_own_matrix_one_step(bad):
    found = trained(torch.float32, 4, CHANNEL, False, bad=bad)
    assert same(found, trained(torch.float32, 4, CHANNEL, True, bad=bad))
    assert found[-1][[0, 2]].tolist() == [24, 1]
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("hyper, rank", [(CHANNEL, 20), (TENSOR, 1), (TENSOR, 24)])
def test_threads_do_not_change_a_bit(hyper, rank):
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(600, 300))
        keys = {"scale": hyper.scale, "scale_type": hyper.scale_type, "proj": "sparse"}
        optimizer = APOLLO([p], lr=0.01, rank=rank, **keys)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            optimizer.step()
        found.append([p.detach(), *(optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq"))])
    torch.set_num_threads(before)
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_projections_beyond_the_limit_are_drawn_and_let_go(monkeypatch):
    """So a large model costs time, not memory: at most one of them is alive."""
    expected = trained(torch.float32, 20, CHANNEL, False)
    monkeypatch.setattr(cpu, "projections", cpu.ProjectionCache(limit=0))
    assert same(trained(torch.float32, 20, CHANNEL, False), expected)
    batch = reference.build(batch_items := items(torch.float32, 20), separate=False)
    batch.lend([item.grad for item in batch_items])
    batch.apply(CHANNEL, signals())
    assert batch._z == [None] * len(batch_items)


def test_a_matrix_that_cannot_be_walked_is_a_batch_of_its_own():
    item = items(torch.float32, 4)[0]
    assert reference.family(item) is reference.family(replace(item, key=1))
    others = [
        replace(item, weight=item.weight.double(), grad=item.grad.double()),
        replace(item, grad=item.grad.t().contiguous().t()),  # in another order than its weight
        replace(item, grid=torch.zeros(70, 1, dtype=torch.int32)),
        replace(item, exp_avg=item.exp_avg.double()),
    ]
    for other in others:
        assert reference.family(other) == id(other)
    assert isinstance(reference.build(others[1:2], separate=False), reference.LowRankBatch)


def test_the_table_is_what_the_call_reads():
    assert 8 * len(cpu_batch.FIELDS) == native._C.CPU_MATRIX_BYTES
