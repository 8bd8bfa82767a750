"""The optimizer against an independent restatement of Algorithm 1 in float64 (restatement.py).

Gradients come from outside, so moments and norms can be compared over a whole run. Weights are
compared step by step, each from the optimizer's own previous weight: a rounding counts once.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import running
from helpers import randn
from restatement import Apollo, key_of

from apollo_kernels import APOLLO

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

SHAPES = [(9, 6), (6, 9), (7, 7)]
SCALE_TYPES = ("channel", "tensor")
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


def check_run(backend, config, dtype, steps, seed=3, shapes=SHAPES):
    rng = np.random.default_rng(0)
    named = {**config, "lr": 0.02, "eps": 1e-6, "betas": (0.9, 0.99)}
    distribution = named.pop("distribution")
    named["proj"] = "random" if distribution == "gaussian" else distribution
    params = [
        torch.nn.Parameter(torch.from_numpy(rng.normal(size=s)).to(backend.device, dtype))
        for s in shapes
    ]
    optimizer = APOLLO(params, seed=seed, **named)
    named.pop("proj")
    oracles = [
        Apollo(s, key=key_of(seed, i), distribution=distribution, **named)
        for i, s in enumerate(shapes)
    ]
    rtol, info = tolerance(dtype, config), torch.finfo(dtype)
    for step in range(steps):
        before = [p.detach().cpu().double().numpy().copy() for p in params]
        for p in params:
            g = rng.normal(size=p.shape) * rng.choice([0.1, 1, 3])
            p.grad = torch.from_numpy(g).to(backend.device, dtype)
        optimizer.step()
        for p, w, oracle in zip(params, before, oracles, strict=True):
            where = f"step {step + 1}, shape {tuple(p.shape)}, {name(config)}"
            exact = oracle.step(w, p.grad.cpu().double().numpy())
            got, state = p.detach().cpu().double().numpy(), optimizer.state[p]
            # half a unit in the last place for the store, a float32 sum before it, and the update
            store = info.eps * (0.5 if dtype.itemsize == 2 else 2) * np.maximum(abs(exact), abs(w))
            slack = rtol * abs(oracle.update).max() + info.smallest_normal * info.eps
            error = abs(got - exact)
            assert (error <= store + slack).all(), f"{where}: {(error / (store + slack)).max()}"
            for key, expected in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
                moment = state[key].cpu().double().numpy()
                bound = (1e-12 if dtype == torch.float64 else 3e-6) * abs(expected).max()
                assert abs(moment - expected).max() <= bound, f"{where}: {key}"
            if not config["disable_nl"]:
                assert float(state["update_norm"]) == pytest.approx(
                    oracle.norm, rel=max(rtol, 1e-9)
                )


def every_config(scale_type, proj_type):
    """All combinations of flags; ranks and distributions in rotation."""
    ranks = itertools.cycle(itertools.product(RANKS, ("gaussian", "rademacher")))
    first = 16 * (SCALE_TYPES.index(scale_type) * len(PROJ_TYPES) + PROJ_TYPES.index(proj_type))
    ranks = itertools.islice(ranks, first, None)
    for flags in itertools.product((False, True), repeat=4):
        rank, distribution = next(ranks)
        config = dict(zip(FLAGS, flags, strict=True))
        config["weight_decay"] = 0.1 * config["weight_decay"]
        config.update(scale_type=scale_type, proj_type=proj_type, rank=rank, scale=2.0)
        yield {**config, "distribution": distribution}


def name(config):
    return "-".join(str(v) for v in config.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_every_configuration_follows_algorithm_1(backend, scale_type, proj_type, dtype):
    """PyTorch in all of them, kernels in each third, the interpreter in each seventh: which ones,
    differs from dtype to dtype."""
    configs, first = list(every_config(scale_type, proj_type)), DTYPES.index(dtype)
    steps, gap = 16, 7
    if backend.name != "torch":
        configs, steps, gap = configs[first % 3 :: 3], 4, 3
    if backend.interpreted:
        configs, steps, gap = configs[first // 3 :: 2], 3, 2
    for config in configs:
        check_run(backend, {**config, "update_proj_gap": gap}, dtype, steps)


LONG = [
    ("channel", 4, "gaussian"),
    ("channel", 6, "rademacher"),
    ("tensor", 1, "gaussian"),
    ("tensor", 1, "rademacher"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_type, rank, distribution", LONG)
def test_many_steps_across_redraws(backend, scale_type, rank, distribution, dtype):
    steps, gap = (320, 50) if backend.name == "torch" else (40, 12)
    if backend.interpreted:
        steps, gap = 9, 4
    config = dict.fromkeys(("scale_front", "disable_nl"), False)
    config.update(correct_bias=True, weight_decay=0.01, scale_type=scale_type, proj_type="std")
    config.update(rank=rank, scale=1.0, distribution=distribution, update_proj_gap=gap)
    check_run(backend, config, dtype, steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(backend, dtype):
    config = dict.fromkeys(("scale_front", "disable_nl"), False)
    config.update(correct_bias=True, weight_decay=0.01, scale_type="channel", proj_type="std")
    config.update(rank=8, scale=1.0, distribution="gaussian", update_proj_gap=2)
    check_run(backend, config, dtype, steps=3, shapes=[(33, 129), (129, 33)])
    mini = {**config, "rank": 1, "scale_type": "tensor"}
    check_run(backend, mini, dtype, steps=3, shapes=[(3, 1134)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_do_not_depend_on_how_much_is_widened_at_a_time(dtype, monkeypatch):
    """PyTorch's back end, with chunks far smaller than the matrix."""
    monkeypatch.setattr("apollo_kernels.reference._CHUNK", 500)
    with running("torch") as backend:
        test_odd_sizes(backend, dtype)


def one(backend, shape=(6, 4), **options):
    p = torch.nn.Parameter(torch.ones(shape, device=backend.device))
    return p, APOLLO([p], lr=0.1, **{"rank": 4, **options})


def randoms(backend, count, shape=(6, 4)):
    return [randn(shape, backend, seed=seed + 1) for seed in range(count)]


def updates(p, optimizer, gradients):
    """The norms of the steps that ``gradients`` cause."""
    for g in gradients:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        yield float((p.detach() - before).norm())


def test_a_zero_first_gradient_does_not_freeze_the_parameter(backend):
    p, optimizer = one(backend, correct_bias=False)
    gradients = [torch.zeros_like(p), *randoms(backend, 3)]
    sizes = list(updates(p, optimizer, gradients))
    assert sizes[0] == 0
    assert sizes[1] > 0.05  # the first real step is held by nothing


def test_the_norm_of_the_update_grows_by_at_most_one_percent(backend):
    p, optimizer = one(backend, correct_bias=False)
    sizes = list(updates(p, optimizer, randoms(backend, 25 if backend.interpreted else 100)))
    growth = [b / a for a, b in itertools.pairwise(sizes)]
    assert max(growth) < 1.01 * (1 + 1e-5)
    assert max(growth) > 1.0099  # and the limiter did act
    assert optimizer.stats()["limited"] > 0


def test_disable_nl_lets_the_norm_grow_and_leaves_it_unset(backend):
    p, optimizer = one(backend, correct_bias=False, disable_nl=True)
    sizes = list(updates(p, optimizer, randoms(backend, 15 if backend.interpreted else 50)))
    assert max(b / a for a, b in itertools.pairwise(sizes)) > 1.02
    assert float(optimizer.state[p]["update_norm"]) == 0


@pytest.mark.parametrize("key", ["scale_front", "disable_nl"])
def test_limiter_flags_are_honoured_as_group_keys(backend, key):
    def run(per_group):
        p = torch.nn.Parameter(torch.ones(6, 4, device=backend.device))
        group = {"params": [p], "rank": 4, "scale": 9.0}
        optimizer = APOLLO([{**group, key: True}]) if per_group else APOLLO([group], **{key: True})
        list(updates(p, optimizer, randoms(backend, 8)))
        return p.detach(), optimizer.state[p]["update_norm"]

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_scale_front_puts_alpha_into_the_stored_norm(backend):
    norms = []
    for front in (False, True):
        p, optimizer = one(backend, scale=9.0, scale_front=front)
        p.grad = torch.arange(24.0, device=backend.device).view(6, 4)
        optimizer.step()
        norms.append(float(optimizer.state[p]["update_norm"]))
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-6)


def test_a_tiny_weight_decay_is_not_lost(backend):
    """1 - lr * wd in float32 is 1 at lr * wd = 2e-8, yet float64 weights and sums must feel it."""
    p = torch.nn.Parameter(torch.full((4, 4), 1e-3, device=backend.device))
    optimizer = APOLLO([p], lr=1e-4, weight_decay=3e-4, rank=4)
    p.grad = torch.zeros_like(p)
    before = p.detach().double().clone()
    optimizer.step()
    expected = before * (1 - 3e-8)
    ulp = 2.0**-33  # of float32 numbers near 1e-3
    assert ((p.detach().double() - expected).abs() <= ulp / 2).all()


def test_the_mini_preset_s_scale_is_squared(backend):
    p, optimizer = one(backend, scale=1.0, rank=1, scale_type="tensor", correct_bias=False)
    q, other = one(backend, scale=128.0, rank=1, scale_type="tensor", correct_bias=False)
    (g,) = randoms(backend, 1)
    (a,), (b,) = updates(p, optimizer, [g]), updates(q, other, [g])
    assert b / a == pytest.approx(128**0.5, rel=1e-4)


@pytest.mark.parametrize("rank", [None, 4])
def test_bf16_second_moments_do_not_stall(backend, rank):
    """At beta2 = 0.999 a bf16 moment rounds back to itself; zero gradients must shrink it."""
    steps = 30 if backend.interpreted else 300
    p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16, device=backend.device))
    optimizer = APOLLO([p], lr=0.0, rank=rank)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].clone()
    p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    shrunk = optimizer.state[p]["exp_avg_sq"] / first
    # a rounding of 2^-24 in each of the steps
    torch.testing.assert_close(shrunk, torch.full_like(shrunk, 0.999**steps), rtol=1e-4, atol=0)


def test_the_same_run_gives_the_same_bits(backend):
    results = []
    for _ in range(2):
        p, optimizer = one(backend, (40, 30))
        list(updates(p, optimizer, randoms(backend, 6, (40, 30))))
        results.append(p.detach())
    assert torch.equal(*results)


def test_another_seed_draws_another_projection(backend):
    weights = []
    for seed in (0, 1):
        p, optimizer = one(backend, seed=seed)
        p.grad = torch.arange(24.0, device=backend.device).view(6, 4)
        optimizer.step()
        p.grad = torch.arange(24.0, device=backend.device).view(6, 4).flip(0)
        optimizer.step()
        weights.append(p.detach())
    assert not torch.equal(*weights)
