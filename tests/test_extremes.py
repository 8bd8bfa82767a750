"""Numbers at the ends of their ranges: what float32 can hold is computed, and nothing is spoilt."""

import numpy as np
import pytest
import torch
from helpers import fill, parameter, randn, train
from restatement import Apollo, Dense, key_of

from apollo_kernels import APOLLO

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def numbers(t):
    return t.detach().cpu().double().numpy()


# ---- infinite weights, and small decay -----------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("rank", [None, 1, 8])
@pytest.mark.parametrize(
    "dtype, stochastic", [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)], ids=str
)
def test_an_infinite_weight_stays_infinite(backend, rank, dtype, weight_decay, stochastic):
    """Decay is no 0 * Inf, nor Inf - Inf."""
    p = torch.nn.Parameter(torch.ones(24, 16, dtype=dtype, device=backend.device))
    p.data[3, 5], p.data[4, 6] = float("inf"), -float("inf")
    options = {"rank": rank, "scale_type": "tensor", "weight_decay": weight_decay, "lr": 0.1}
    optimizer = APOLLO([p], stochastic_rounding=stochastic, **options)
    train([p], optimizer, backend, range(2))
    assert p[3, 5] == float("inf")
    assert p[4, 6] == -float("inf")
    assert torch.isfinite(p).sum() == 24 * 16 - 2


@pytest.mark.parametrize("decay", [1e-7, 1e-4, 0.1, 0.75])
@pytest.mark.parametrize("rank", [None, 8])
def test_decay_is_exact_to_one_unit_in_the_last_place(backend, decay, rank):
    """1 - 1e-7 is no float32 number: half a unit is the store's, the rest the product's."""
    p = parameter((24, 16), backend)
    before = p.detach().double()
    p.grad = torch.zeros_like(p)
    APOLLO([p], lr=1.0, weight_decay=decay, rank=rank).step()
    wanted = before * (1 - decay)
    unit = 2.0 ** (torch.frexp(before)[1].double() - 24)
    assert ((p.detach().double() - wanted).abs() <= unit).all()
    # over all weights the decay is felt: an error of its own would be as large as it is
    lost = float(((p.detach().double() - before) / before).mean())
    assert lost == pytest.approx(-decay, rel=0.2 if decay < 1e-6 else 1e-3)


# ---- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("rank", [None, 1, 8])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_a_huge_gradient_does_not_outlive_its_moment(backend, beta, rank, shape):
    """M = b1 M + (1 - b1) R, not M + (1 - b1) (R - M): there, 1e18 leaves 1e11 behind."""
    p = parameter(shape, backend)
    options = {"lr": 0.1, "betas": (beta, 0.9)}
    optimizer = APOLLO([p], rank=rank, scale_type="tensor", **options)
    if rank is None:
        oracle = Dense(**options)
    else:
        oracle = Apollo(shape, key=key_of(0, 0), rank=rank, scale_type="tensor", **options)
    for step in range(4):
        fill([p], backend, step, factor=1e18 if step == 0 else 1.0)
        oracle.step(numbers(p), numbers(p.grad))
        optimizer.step()
        for name, wanted in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
            found = numbers(optimizer.state[p][name])
            # R is a sum of at most 24 products in float32, and so is as wrong as its largest one:
            # of this step's gradient, or of what the huge one has left of itself.
            scale = max(abs(wanted).max(), 1.0)
            assert abs(found - wanted).max() <= 3e-6 * scale, (name, step)


HUGE = 3e19  # float32 holds it, and not its square


@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_a_dense_entry_whose_square_overflows_keeps_its_moments(backend, shape):
    """Also where it is the only one: the norm of a single number is finite, though its square is
    not."""
    p = parameter(shape, backend)
    optimizer = APOLLO([p], lr=0.1)
    train([p], optimizer, backend, range(2))
    before = {k: v.clone() for k, v in optimizer.state[p].items()}, p.detach().clone()
    p.grad = torch.full_like(p, HUGE)
    optimizer.step()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[p][name], before[0][name])
    assert torch.equal(p, before[1])
    assert optimizer.stats()["nonfinite"] == 1
    train([p], optimizer, backend, range(3, 5))
    assert torch.isfinite(p).all() and (p != before[1]).all()


@pytest.mark.parametrize("shape", [(24, 16), (1, 16), (1, 1)], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_channel_of_rank_one_whose_square_overflows_keeps_its_moments(backend, shape, scale_type):
    p = parameter(shape, backend)
    options = {"rank": 1, "scale_type": scale_type, "proj_type": "right", "proj": "rademacher"}
    optimizer = APOLLO([p], lr=0.1, **options)
    train([p], optimizer, backend, range(2))
    before = {name: optimizer.state[p][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    weight = p.detach().clone()
    p.grad = torch.zeros_like(p)
    p.grad[0, 0] = HUGE
    optimizer.step()
    for name, old in before.items():
        assert torch.equal(optimizer.state[p][name][0], old[0])
        assert torch.isfinite(optimizer.state[p][name]).all()
    assert torch.equal(p, weight)  # u^2 is not finite
    train([p], optimizer, backend, range(3, 5))
    assert torch.isfinite(p).all() and not torch.equal(p, weight)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_a_gradient_reaches_the_moments(backend, dtype, shape, rank):
    """One entry per channel, so that R is that entry times a sign and r^-1/2: nothing is summed,
    and whatever a kernel splits a gradient into must hold all of its bits."""
    p = parameter(shape, backend, dtype)
    optimizer = APOLLO([p], rank=rank, proj="rademacher", scale_type="tensor", betas=(0.0, 0.9))
    p.grad = torch.zeros_like(p)
    channels = p.grad if shape[0] > shape[1] else p.grad.t()  # contracts the shorter side
    channels[:, 3] = randn((24,), backend, dtype, seed=5)
    optimizer.step()
    wanted = abs(numbers(channels[:, 3:4])) / rank**0.5
    found = abs(numbers(optimizer.state[p]["exp_avg"]))
    # the root, its product, and a sum of at most three parts
    np.testing.assert_allclose(found, np.repeat(wanted, rank, axis=1), rtol=2**-22)


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale_type, rank",
    [("channel", 4), ("channel", 8), ("tensor", 1), ("tensor", 4), ("tensor", 8)],
)
@pytest.mark.parametrize("shape", [(600, 16), (16, 600)])
def test_gradients_whose_sum_of_squares_overflows_are_still_taken(backend, scale_type, rank, shape):
    """Each channel's q is finite, s is tiny, and so is sum_c s_c^2 q_c, though sum_c q_c is not."""
    p = parameter(shape, backend)
    options = {"lr": 0.1, "rank": rank, "scale_type": scale_type}
    optimizer = APOLLO([p], **options)
    oracle = Apollo(shape, key=key_of(0, 0), **options)
    for step in range(2):
        # 16 squares of 5e17 are 4e36, and 600 times that is more than float32 holds, while no R^2
        # is. All have one size, so that |R| of a channel stays far from cancelling.
        p.grad = 5e17 * randn(shape, backend, seed=step).sign()
        before = numbers(p)
        wanted = oracle.step(before, numbers(p.grad))
        optimizer.step()
        update = abs(oracle.update).max()
        assert update > 1e-3
        # sums of 16 products and of 600 channels in float32; s of rank 4 amplifies the first
        assert abs(numbers(p) - wanted).max() <= 1e-3 * update + 2**-23 * abs(before).max()
    stats = optimizer.stats()
    assert (stats["updates"], stats["nonfinite"]) == (2, 0)
    norm = float(optimizer.state[p]["update_norm"])
    assert norm == pytest.approx(oracle.norm, rel=1e-3)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("size", [1e-19, 1e-12, 1e12, 1e17])
def test_gradients_of_any_size_give_the_rules_update(backend, scale_type, size):
    """Below 1e-19 squares vanish in float32, above 1e19 they overflow; in between all is right."""
    p = parameter((24, 16), backend)
    options = {"lr": 0.1, "rank": 8, "scale_type": scale_type, "eps": 1e-20}
    optimizer = APOLLO([p], **options)
    oracle = Apollo((24, 16), key=key_of(0, 0), **options)
    for step in range(2):
        fill([p], backend, step, factor=size)
        before = numbers(p)
        wanted = oracle.step(before, numbers(p.grad))
        optimizer.step()
        # squares near the smallest float32 number have few bits: 1e-38 has 2^-149 = 1e-45 as unit
        rtol = 1e-4 if size > 1e-19 else 1e-2
        slack = 2**-23 * abs(before).max()
        assert abs(numbers(p) - wanted).max() <= rtol * abs(oracle.update).max() + slack


# ---- eps 0 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, rank, scale_type",
    [
        ((24, 16), None, "tensor"),
        ((9,), None, "tensor"),
        ((), None, "tensor"),
        ((24, 16), 1, "tensor"),
        ((24, 16), 8, "tensor"),
        ((24, 16), 8, "channel"),
        ((16, 24), 8, "tensor"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_may_be_zero_where_gradients_are(backend, shape, rank, dtype, scale_type):
    """0 / 0 is no update: entries that have never had a gradient stay as they are."""
    p = parameter(shape, backend, dtype)
    before = p.detach().clone()
    optimizer = APOLLO([p], lr=0.1, eps=0.0, rank=rank, scale_type=scale_type)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    if shape:
        p.grad[: shape[0] // 2] = randn(p.grad[: shape[0] // 2].shape, backend, dtype)
        optimizer.step()
        assert torch.equal(p[shape[0] // 2 :], before[shape[0] // 2 :])
        assert (p[: shape[0] // 2] != before[: shape[0] // 2]).any()
    assert torch.isfinite(p).all()
    assert optimizer.stats()["nonfinite"] == 0


# ---- many steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start, gap", [(2**24 - 2, 1), (2**31 - 2, 1), (2**32 + 5, 1), (2**32 + 5, 3)]
)
@pytest.mark.parametrize("rank", [1, 8])
def test_steps_are_counted_beyond_what_float32_holds(backend, start, gap, rank):
    """Projections are drawn from the low 32 bits of the epoch, which is not that of the low 32 bits
    of the step."""
    p, dense = parameter((24, 16), backend), parameter((9,), backend)
    options = {"lr": 0.1, "scale_type": "tensor"}
    optimizer = APOLLO([p, dense], rank=rank, update_proj_gap=gap, proj="rademacher", **options)
    fill([p, dense], backend)
    optimizer.step()
    for x in (p, dense):
        state = optimizer.state[x]
        assert state["step"].dtype == torch.int64
        state["step"].fill_(start)
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
    optimizer.state[p]["update_norm"].zero_()
    oracle = Apollo(
        (24, 16), key=key_of(0, 0), rank=rank, update_proj_gap=gap, start=start,
        distribution="rademacher", **options,
    )  # fmt: skip
    for step in range(1, 5):
        fill([p, dense], backend, step)
        wanted = oracle.step(numbers(p), numbers(p.grad))
        optimizer.step()
        np.testing.assert_allclose(numbers(p), wanted, rtol=1e-5, atol=1e-5)
        # 3e-6: as in test_rule.py, sums of 16 products in float32
        bound = 3e-6 * abs(oracle.m).max()
        assert abs(numbers(optimizer.state[p]["exp_avg"]) - oracle.m).max() <= bound
        for x in (p, dense):
            assert int(optimizer.state[x]["step"]) == start + step


def test_rounding_by_chance_goes_on_beyond_what_float32_counts(backend):
    """Steps 2^24 + 1 and 2^24 + 2 must not share their bits: the same update, rounded twice."""
    results = []
    for start in (2**24, 2**24 + 1):
        p = torch.nn.Parameter(torch.ones(40, 16, dtype=torch.bfloat16, device=backend.device))
        options = {"correct_bias": False, "disable_nl": True, "betas": (0.0, 0.0)}
        optimizer = APOLLO([p], rank=8, lr=2**-9, stochastic_rounding=True, **options)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.state[p]["step"].fill_(start)
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.detach().clone())
    assert (results[0] != results[1]).float().mean() > 0.1


@pytest.mark.parametrize("rank", [None, 1, 8])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.9, 0.999999)], ids=str)
def test_bias_corrections_are_right_to_the_last_bits(backend, rank, start, betas):
    """The update itself, of weights that are zero: 1 - b^t cancels where t is small or b near 1."""
    p = torch.nn.Parameter(torch.zeros(24, 16, device=backend.device))
    options = {"lr": 1.0, "betas": betas}
    low_rank = {"scale_type": "tensor", "disable_nl": True}
    optimizer = APOLLO([p], rank=rank, **options, **low_rank, proj="rademacher")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(start)
    p.detach().zero_()
    if rank is None:
        oracle = Dense(**options, start=start)
    else:
        options |= {"key": key_of(0, 0), "distribution": "rademacher", **low_rank}
        oracle = Apollo((24, 16), rank=rank, start=start, **options)
    fill([p], backend, 1)
    exact = oracle.step(numbers(p), numbers(p.grad))
    optimizer.step()
    # sums of 16 products in float32 err by 1e-6; nothing else may be worse
    assert abs(numbers(p) - exact).max() <= 3e-6 * abs(exact).max()
