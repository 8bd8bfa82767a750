"""The optimizer against an independent restatement of Algorithm 1 in float64 (restatement.py).

Gradients come from outside, so moments and norms can be compared over a whole run. Weights are
compared step by step, each from the optimizer's own previous weight: a rounding counts once.
"""

import itertools

import numpy as np
import pytest
import torch
from restatement import Apollo, key_of

from apollo_kernels import APOLLO

SHAPES = [(9, 6), (6, 9), (7, 7)]
PROJ_TYPES = ("std", "reverse_std", "left", "right")
RANKS = (1, 2, 4, 6, 50)
FLAGS = ("scale_front", "disable_nl", "correct_bias", "weight_decay")


def tolerance(dtype, config):
    """Relative error of a channel's update that float32 arithmetic is allowed.

    Sums of at most 9 products err by 1e-6. Below rank 4 with channel scaling, R_c of few entries
    can cancel, and the ratio |N_c| / |R_c| amplifies that (measured: up to 2e-2).
    """
    if dtype == torch.float64:
        return 1e-10 if config["rank"] >= 4 else 1e-8
    return 2e-2 if config["scale_type"] == "channel" and config["rank"] < 4 else 1e-4


def check_run(config, dtype, steps, seed=3, shapes=SHAPES):
    rng = np.random.default_rng(0)
    named = {**config, "lr": 0.02, "eps": 1e-6, "betas": (0.9, 0.99)}
    distribution = named.pop("distribution")
    named["proj"] = "rademacher" if distribution == "rademacher" else "random"
    params = [torch.nn.Parameter(torch.from_numpy(rng.normal(size=s)).to(dtype)) for s in shapes]
    optimizer = APOLLO(params, seed=seed, **named)
    named.pop("proj")
    oracles = [
        Apollo(s, key=key_of(seed, i), distribution=distribution, **named)
        for i, s in enumerate(shapes)
    ]
    rtol, info = tolerance(dtype, config), torch.finfo(dtype)
    for step in range(steps):
        before = [p.detach().double().numpy().copy() for p in params]
        for p in params:
            g = rng.normal(size=p.shape) * rng.choice([0.1, 1, 3])
            p.grad = torch.from_numpy(g).to(dtype)
        optimizer.step()
        for p, w, oracle in zip(params, before, oracles, strict=True):
            where = f"step {step + 1}, shape {tuple(p.shape)}"
            exact = oracle.step(w, p.grad.double().numpy())
            got, state = p.detach().double().numpy(), optimizer.state[p]
            # half a unit in the last place for the store, a float32 sum before it, and the update
            store = info.eps * (0.5 if dtype.itemsize == 2 else 2) * np.maximum(abs(exact), abs(w))
            slack = rtol * abs(oracle.update).max() + info.smallest_normal * info.eps
            error = abs(got - exact)
            assert (error <= store + slack).all(), f"{where}: {(error / (store + slack)).max()}"
            for name, expected in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
                moment = state[name].double().numpy()
                bound = (1e-12 if dtype == torch.float64 else 3e-6) * abs(expected).max()
                assert abs(moment - expected).max() <= bound, f"{where}: {name}"
            if not config["disable_nl"]:
                assert float(state["update_norm"]) == pytest.approx(
                    oracle.norm, rel=max(rtol, 1e-9)
                )


def every_config():
    """All combinations of flags, proj_type and scale_type; ranks and distributions in rotation."""
    ranks = itertools.cycle(itertools.product(RANKS, ("gaussian", "rademacher")))
    for scale_type, proj_type in itertools.product(("channel", "tensor"), PROJ_TYPES):
        for flags in itertools.product((False, True), repeat=4):
            rank, distribution = next(ranks)
            config = dict(zip(FLAGS, flags, strict=True))
            config["weight_decay"] = 0.1 * config["weight_decay"]
            config.update(scale_type=scale_type, proj_type=proj_type, rank=rank, scale=2.0)
            yield {**config, "distribution": distribution, "update_proj_gap": 7}


def name(config):
    return "-".join(str(v) for v in config.values())


@pytest.mark.filterwarnings("ignore:rank .* is clamped")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", list(every_config()), ids=name)
def test_every_configuration_follows_algorithm_1(config, dtype):
    check_run(config, dtype, steps=16)


LONG = [
    ("channel", 4, "gaussian"),
    ("channel", 6, "rademacher"),
    ("tensor", 1, "gaussian"),
    ("tensor", 1, "rademacher"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_type, rank, distribution", LONG)
def test_hundreds_of_steps_across_redraws(scale_type, rank, distribution, dtype):
    config = dict.fromkeys(("scale_front", "disable_nl"), False)
    config.update(correct_bias=True, weight_decay=0.01, scale_type=scale_type, proj_type="std")
    config.update(rank=rank, scale=1.0, distribution=distribution, update_proj_gap=50)
    check_run(config, dtype, steps=320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_sizes_and_chunks(dtype, monkeypatch):
    """1134 columns, and a chunk far smaller than the matrix: the sums must not depend on it."""
    monkeypatch.setattr("apollo_kernels.reference._CHUNK", 500)
    config = dict.fromkeys(("scale_front", "disable_nl"), False)
    config.update(correct_bias=True, weight_decay=0.01, scale_type="channel", proj_type="std")
    config.update(rank=8, scale=1.0, distribution="gaussian", update_proj_gap=2)
    check_run(config, dtype, steps=4, shapes=[(33, 129), (129, 33)])
    check_run({**config, "rank": 1, "scale_type": "tensor"}, dtype, steps=4, shapes=[(3, 1134)])


def one(shape=(6, 4), **options):
    p = torch.nn.Parameter(torch.ones(shape))
    return p, APOLLO([p], lr=0.1, **{"rank": 4, **options})


def updates(p, optimizer, gradients):
    """The norms of the steps that ``gradients`` cause."""
    for g in gradients:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        yield float((p.detach() - before).norm())


def test_a_zero_first_gradient_does_not_freeze_the_parameter():
    p, optimizer = one(correct_bias=False)
    gradients = [torch.zeros(6, 4), *(torch.randn(6, 4) for _ in range(3))]
    sizes = list(updates(p, optimizer, gradients))
    assert sizes[0] == 0
    assert sizes[1] > 0.05  # the first real step is held by nothing


def test_the_norm_of_the_update_grows_by_at_most_one_percent():
    p, optimizer = one(correct_bias=False)
    sizes = list(updates(p, optimizer, [torch.randn(6, 4) for _ in range(100)]))
    growth = [b / a for a, b in itertools.pairwise(sizes)]
    assert max(growth) < 1.01 * (1 + 1e-5)
    assert max(growth) > 1.0099  # and the limiter did act
    assert optimizer.stats()["limited"] > 0


def test_disable_nl_lets_the_norm_grow_and_leaves_it_unset():
    p, optimizer = one(correct_bias=False, disable_nl=True)
    sizes = list(updates(p, optimizer, [torch.randn(6, 4) for _ in range(50)]))
    assert max(b / a for a, b in itertools.pairwise(sizes)) > 1.02
    assert float(optimizer.state[p]["update_norm"]) == 0


@pytest.mark.parametrize("key", ["scale_front", "disable_nl"])
def test_limiter_flags_are_honoured_as_group_keys(key):
    def run(per_group):
        p = torch.nn.Parameter(torch.ones(6, 4))
        group = {"params": [p], "rank": 4, "scale": 9.0}
        optimizer = APOLLO([{**group, key: True}]) if per_group else APOLLO([group], **{key: True})
        torch.manual_seed(1)
        list(updates(p, optimizer, [torch.randn(6, 4) for _ in range(20)]))
        return p.detach(), optimizer.state[p]["update_norm"]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_scale_front_puts_alpha_into_the_stored_norm():
    norms = []
    for front in (False, True):
        p, optimizer = one(scale=9.0, scale_front=front)
        p.grad = torch.arange(24.0).view(6, 4)
        optimizer.step()
        norms.append(float(optimizer.state[p]["update_norm"]))
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-6)


def test_a_tiny_weight_decay_is_not_lost():
    """1 - lr * wd in float32 is 1 at lr * wd = 2e-8, yet float64 weights and sums must feel it."""
    p = torch.nn.Parameter(torch.full((4, 4), 1e-3))
    optimizer = APOLLO([p], lr=1e-4, weight_decay=3e-4, rank=4)
    p.grad = torch.zeros(4, 4)
    before = p.detach().double().clone()
    optimizer.step()
    expected = before * (1 - 3e-8)
    ulp = 2.0**-33  # of float32 numbers near 1e-3
    assert ((p.detach().double() - expected).abs() <= ulp / 2).all()


def test_the_mini_preset_s_scale_is_squared():
    p, optimizer = one(scale=1.0, rank=1, scale_type="tensor", correct_bias=False)
    q, other = one(scale=128.0, rank=1, scale_type="tensor", correct_bias=False)
    g = torch.randn(6, 4)
    (a,), (b,) = updates(p, optimizer, [g]), updates(q, other, [g])
    assert b / a == pytest.approx(128**0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dense_parameters_take_adamw(dtype):
    """Against torch's for-loop AdamW in float64, one step at a time from the same weight."""
    p = torch.nn.Parameter(torch.randn(40).to(dtype))
    twin = torch.nn.Parameter(p.detach().double())
    options = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    optimizer = APOLLO([p], **options)
    oracle = torch.optim.AdamW([twin], foreach=False, **options)
    for _ in range(200):
        p.grad = torch.randn(40).to(dtype)
        twin.data.copy_(p.detach())
        twin.grad = p.grad.double()
        optimizer.step()
        oracle.step()
        eps = torch.finfo(dtype).eps
        bound = (0.5 if dtype.itemsize == 2 else 2) * eps * twin.abs() + 0.01 * max(3e-6, eps**2)
        if dtype == torch.float64:
            bound = 1e-14 + 0 * bound
        assert ((p.double() - twin).abs() <= bound).all()
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                optimizer.state[p][key].double(), oracle.state[twin][key], rtol=3e-6, atol=1e-7
            )


def test_bf16_second_moments_do_not_stall():
    """At beta2 = 0.999 a bf16 moment rounds back to itself; 3000 zero gradients must shrink it."""
    for rank in (None, 4):
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16))
        optimizer = APOLLO([p], lr=0.0, rank=rank)
        p.grad = torch.ones_like(p)
        optimizer.step()
        first = optimizer.state[p]["exp_avg_sq"].clone()
        p.grad = torch.zeros_like(p)
        for _ in range(300):
            optimizer.step()
        shrunk = optimizer.state[p]["exp_avg_sq"] / first
        torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.999**300), rtol=1e-4, atol=0)


def test_the_same_run_gives_the_same_bits():
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        p, optimizer = one((40, 30))
        list(updates(p, optimizer, [torch.randn(40, 30) for _ in range(20)]))
        results.append(p.detach())
    assert torch.equal(*results)


def test_another_seed_draws_another_projection():
    weights = []
    for seed in (0, 1):
        p, optimizer = one(seed=seed)
        p.grad = torch.arange(24.0).view(6, 4)
        optimizer.step()
        p.grad = torch.arange(24.0).view(6, 4).flip(0)
        optimizer.step()
        weights.append(p.detach())
    assert not torch.equal(*weights)
