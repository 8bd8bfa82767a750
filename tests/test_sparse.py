"""The sparse projection: one signed nonzero per column, none of whose promises depend on the rank.

That its positions and signs are the contract's is held by test_philox.py; here is what follows of
them, and that every back end computes with them.
"""

import math

import numpy as np
import pytest
import torch
from helpers import changed, parameter, randn, snapshot
from test_rule import check_run

import apollo_kernels
from apollo_kernels import APOLLO, cpu, philox, projection_matrix, reference

# ---- what follows of positions and signs ---------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 8, 20, 64, 130])
def test_columns_meet_never_inside_a_block_and_else_with_probability_one_in_rank(rank):
    blocks = 4000
    row = philox.sparse(5, 0, rank, blocks * rank)[0].view(blocks, rank)
    assert torch.equal(row.sort(1).values, torch.arange(rank).expand(blocks, rank))
    # Six standard errors for each pair of columns (i of a block, l of its neighbour), of which
    # there are up to 5200; a rotation of 13 bits is uniform to rank / 2^13, far below them.
    a, b = row[:-1, : min(rank, 40)], row[1:]
    met = torch.stack([(a[:, i, None] == b).double().mean(0) for i in range(a.shape[1])])
    error = math.sqrt((1 - 1 / rank) / rank / blocks)
    assert (met - 1 / rank).abs().max() <= 6 * error + 1e-12


def test_signs_are_fair_and_differ_from_row_to_row_and_from_block_to_block():
    row, sign = philox.sparse(5, 0, 64, 4000 * 64)
    table = torch.zeros(4000, 64, dtype=torch.double)
    table.scatter_(1, row.view(4000, 64), sign.view(4000, 64).double())
    n = table.numel()
    for product in (table, table * table.roll(1, 0), table * table.roll(16, 0), table.roll(1, 1)):
        assert abs(product.mean()) < 5 / math.sqrt(n)
    gram = table.t() @ table / 4000
    assert (gram - torch.eye(64)).abs().max() < 6 / math.sqrt(4000)


def ratios(x, rank, count, distribution="sparse"):
    """|P x|^2 / |x|^2 for ``count`` keys."""
    if distribution != "sparse":
        p = (projection_matrix(k, 0, rank, len(x), distribution) for k in range(count))
        return torch.stack([(m.double() @ x).square().sum() for m in p]) / x.square().sum()
    row, sign = map(
        torch.stack, zip(*(philox.sparse(k, 0, rank, len(x)) for k in range(count)), strict=True)
    )
    y = torch.zeros(count, rank, dtype=torch.double).scatter_add_(1, row, sign * x)
    return y.square().sum(1) / x.square().sum()


@pytest.mark.parametrize("kind", ["normal", "every 64th", "heavy block"])
@pytest.mark.parametrize("rank", [1, 8, 20, 64, 130])
def test_norms_are_preserved_with_at_most_the_gaussian_s_variance(rank, kind):
    """Two columns of different blocks meet with probability 1/r and independent signs, and two of
    one block never do. So |P x|^2 is unbiased, and its variance is 2/r (|x|^4 - sum of |x_b|^4 over
    blocks b): the gaussian's 2/r |x|^4, less something."""
    x = randn((700,), Cpu, torch.double, seed=1)
    if kind == "every 64th":
        x = torch.where(torch.arange(700) % 64 == 0, x, 0.0)
    if kind == "heavy block":
        x[: min(rank, 20)] *= 10
    found, count = ratios(x, rank, 4000), 4000
    energy = torch.stack([part.square().sum() for part in x.split(rank)]) / x.square().sum()
    exact = 2 / rank * (1 - energy.square().sum())
    assert exact <= 2 / rank
    assert abs(found.mean() - 1) <= 5 * math.sqrt(exact / count)
    squares = (found - 1).square()
    assert abs(squares.mean() - exact) <= 5 * squares.std() / math.sqrt(count)


class Cpu:
    device = torch.device("cpu")


def test_few_dominant_entries_are_told_of_honestly():
    """One spike keeps its norm exactly. Two equal ones cancel with probability 1/(2r), and double
    as often, where a gaussian's ratio stays within a few sqrt(2/r): the same variance, in a heavier
    tail."""
    rank, count = 16, 4000
    x = torch.zeros(64, dtype=torch.double)
    x[3] = 5
    assert (ratios(x, rank, 50) == 1).all()
    x[40] = 5
    found = ratios(x, rank, count)
    assert set(found.tolist()) == {0.0, 1.0, 2.0}
    half = 1 / (2 * rank)
    for value in (0.0, 2.0):
        rate = (found == value).double().mean()
        assert abs(rate - half) <= 5 * math.sqrt(half * (1 - half) / count)
    assert (ratios(x, rank, count // 4, "gaussian") > 0.05).all()


# ---- R = X P^T on every path of the PyTorch back end ---------------------------------------------

ORDERS = ("rows", "columns", "sliced rows", "sliced columns", "every second")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (5, 31), (33, 64), (70, 129), (9, 1100)]


def matrix(channels, k, order, dtype):
    whole = torch.randn(2 * channels + 3, 2 * k + 5).to(dtype)
    turned = torch.randn(2 * k + 5, 2 * channels + 3).to(dtype)
    return {
        "rows": whole[:channels, :k].contiguous(),
        "columns": turned[:k, :channels].contiguous().t(),
        "sliced rows": whole[1 : channels + 1, 2 : k + 2],
        "sliced columns": turned[2 : k + 2, 1 : channels + 1].t(),
        "every second": whole[: 2 * channels : 2, : 2 * k : 2],
    }[order]


def passes(x, rank, key=7):
    """R and q by everything that can compute them here."""
    row, sign = philox.sparse(key, 1, rank, x.shape[1])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    yield reference.project_sparse(x, row, sign, rank, dtype)
    if cpu.supported(x):
        yield cpu.project_sparse(x, cpu.places(row, sign), rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels, k", SIZES)
def test_project_is_x_times_p_in_every_order(channels, k, order, dtype, monkeypatch):
    monkeypatch.setattr("apollo_kernels.reference._CHUNK", 600)  # parts, as large matrices have
    x = matrix(channels, k, order, dtype)
    for rank in (1, 2, 7, 8, 20, 24, 64, 130, 1000):
        rank = min(rank, k)
        p = projection_matrix(7, 1, rank, k, "sparse", dtype=torch.float64)
        exact, bound = x.double() @ p.t(), x.double().abs() @ p.t().abs()
        squares = x.double().square().sum(1)
        for r, q in passes(x, rank):
            # A sum of n terms errs by at most n/2 eps of the sum of their absolute values.
            eps = torch.finfo(r.dtype).eps
            assert ((r - exact).abs() <= bound * eps * (k // rank + 1)).all(), rank
            assert ((q - squares).abs() <= squares * eps * max(4, k / 16)).all(), rank


@pytest.mark.parametrize("order", ["sliced rows", "sliced columns"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_project_reads_nothing_beyond_the_matrix(order, dtype):
    for rank in (2, 8, 20):
        whole = torch.full((64, 64), float("nan")).to(dtype)
        x = whole[3:40, 5:36] if order == "sliced rows" else whole[5:36, 3:40].t()
        x.fill_(1.0)
        for r, q in passes(x, rank):
            assert torch.isfinite(r).all() and (q == 31).all()


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("rank", [3, 8, 20])
def test_a_bad_entry_reaches_its_own_entry_of_r_only(rank, order):
    x = matrix(40, 33, order, torch.float32)
    x[17, 29] = float("nan")
    row = int(philox.sparse(7, 1, rank, 33)[0][29])
    for r, q in passes(x, rank):
        assert r.isnan().nonzero().tolist() == [[17, row]]
        assert q.isnan().nonzero().flatten().tolist() == [17]


@pytest.mark.skipif(not cpu.supported(torch.ones(2, 2)), reason="no AVX512 here")
def test_neither_threads_nor_the_memory_order_change_a_bit_of_r():
    x = torch.randn(1500, 300)
    places = cpu.places(*philox.sparse(1, 0, 64, 300))
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for ordered in (x, x.t().contiguous().t()):
            found.append(cpu.project_sparse(ordered, places, 64)[0])
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], r) for r in found)


# ---- whole steps on every back end ---------------------------------------------------------------

# K is 141 (channels are rows) or 136 (columns): ragged blocks, ranks with and without groups of 8,
# and 1000 is clamped to K.
RANKS = (1, 3, 8, 20, 64, 130, 1000)


@pytest.mark.parametrize("rank", RANKS)
def test_many_steps_across_redraws(backend, rank):
    """Against float64. PyTorch takes every dtype, kernels one per rank in turn."""
    dtypes, steps, gap = DTYPES, 40, 7
    if backend.name != "torch":
        dtypes, steps, gap = DTYPES[1 + RANKS.index(rank) % 3 :][:1], 7, 3
    if backend.interpreted:
        steps, gap = 2, 1
    config = dict(scale_front=False, disable_nl=False, correct_bias=True, weight_decay=0.01)
    config.update(scale_type="channel" if rank > 1 else "tensor", proj_type="reverse_std")
    config.update(rank=rank, scale=1.0, distribution="sparse", update_proj_gap=gap)
    for dtype in dtypes:
        check_run(backend, config, dtype, steps, shapes=[(21, 141), (136, 24)])


@pytest.mark.parametrize("proj_type", ["std", "left", "right"])
def test_the_other_sides_are_contracted_too(backend, proj_type):
    config = dict(scale_front=True, disable_nl=False, correct_bias=False, weight_decay=0.0)
    config.update(scale_type="tensor", proj_type=proj_type, scale=4.0, rank=16)
    config.update(distribution="sparse", update_proj_gap=2)
    check_run(backend, config, torch.float32, 3, shapes=[(20, 43)])


def test_an_infinite_gradient_keeps_its_own_moment_and_all_weights(backend):
    p = parameter((12, 40), backend)
    optimizer = APOLLO([p], rank=8, proj="sparse", proj_type="right", seed=3)
    p.grad = randn(p.shape, backend, seed=5)
    optimizer.step()
    before, state = snapshot(optimizer), optimizer.state[p]
    p.grad = randn(p.shape, backend, seed=6)
    p.grad[2, 37] = float("inf")
    optimizer.step()
    assert changed(before, snapshot(optimizer)) == {
        (0, k) for k in ("step", "exp_avg", "exp_avg_sq")
    }
    kept = (state["exp_avg"] == before[0, "exp_avg"]).nonzero().tolist()
    assert kept == [[2, int(philox.sparse(state["seed"], 0, 8, 40)[0][37])]]
    assert optimizer.stats()["nonfinite"] == 1


def test_experts_draw_their_own_nonzeros_and_clipping_scales_them(backend):
    """Every matrix of an expert weight steps as a weight of its own does, with its key."""
    p = parameter((3, 24, 20), backend)
    optimizer = APOLLO([p], rank=8, proj="sparse", batch_dims=1, max_grad_norm=0.5)
    p.grad = randn(p.shape, backend, seed=9)
    optimizer.step()
    clip = 0.5 / (float(p.grad.double().norm()) + 1e-6)
    for e in range(3):
        key = philox.parameter_key(optimizer.state[p]["seed"], e)
        x, projection = p.grad[e].cpu().double(), projection_matrix(key, 0, 8, 20, "sparse")
        exact = clip * 0.1 * x @ projection.double().t()
        moment = optimizer.state[p]["exp_avg"][e].cpu().double()
        torch.testing.assert_close(moment, exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


def test_the_presets_take_it():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 16))
    low_rank, *_ = groups = apollo_kernels.apollo(model, proj="sparse", targets="all")
    assert low_rank["proj"] == "sparse"
    optimizer = APOLLO(groups, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    assert all(np.any((a != b).numpy()) for a, b in zip(before, model.parameters(), strict=True))
