"""Dense parameters follow the low-rank rule without its projection (restatement.py, in float64)."""

import copy

import numpy as np
import pytest
import torch
from helpers import fill, parameter, randn, snapshot
from restatement import Dense

from apollo_kernels import APOLLO

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "as published": {},
    "decay": {"weight_decay": 0.1},
    "no bias correction": {"correct_bias": False, "weight_decay": 0.01},
    "a large eps": {"eps": 1e-2},
    "no first moment": {"betas": (0.0, 0.9)},
}


def numbers(t):
    return t.detach().cpu().double().numpy()


@pytest.mark.parametrize("shape", [(40,), (6, 5), ()])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dense_parameters_follow_the_rule(backend, options, dtype, shape):
    p = parameter(shape, backend, dtype)
    named = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, **options}
    optimizer, oracle = APOLLO([p], **named), Dense(**named)
    for step in range(20):
        before = numbers(p)
        fill([p], backend, step, factor=(0.1, 1.0, 3.0)[step % 3])
        exact = oracle.step(before, numbers(p.grad))
        optimizer.step()
        # half a unit in the last place for the store, or two for float32 sums; the update itself is
        # a quotient and a root of numbers that err by a few units
        eps = torch.finfo(dtype).eps
        store = eps * (0.5 if dtype.itemsize == 2 else 2) * np.maximum(abs(before), abs(exact))
        slack = (1e-13 if dtype == torch.float64 else 3e-6) * abs(oracle.update).max()
        # what lies between 0 and the smallest float16
        slack += torch.finfo(dtype).smallest_normal * eps
        assert (abs(numbers(p) - exact) <= store + slack).all(), step
        for name, wanted in (("exp_avg", oracle.m), ("exp_avg_sq", oracle.v)):
            found = numbers(optimizer.state[p][name])
            bound = (1e-13 if dtype == torch.float64 else 3e-6) * max(abs(wanted).max(), 1e-30)
            assert abs(found - wanted).max() <= bound, (name, step)
    assert int(optimizer.state[p]["step"]) == 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dense_parameter_of_many_tiles_follows_the_rule(backend, dtype):
    """More elements than a block of any kernel takes, and the last tile is not full."""
    p = parameter((40_003,), backend, dtype)
    named = {"lr": 0.01, "weight_decay": 0.1}
    optimizer, oracle = APOLLO([p], **named), Dense(**named)
    for step in range(2):
        fill([p], backend, step)
        before = numbers(p)
        exact = oracle.step(before, numbers(p.grad))
        optimizer.step()
        # as above
        eps = torch.finfo(dtype).eps * (0.5 if dtype.itemsize == 2 else 2)
        store = eps * np.maximum(abs(before), abs(exact))
        assert (abs(numbers(p) - exact) <= store + 3e-6 * abs(oracle.update).max()).all()


def test_eps_is_as_strong_at_the_first_step_as_later(backend):
    """N = M / (sqrt(V) + eps) before the bias correction. torch.optim.AdamW divides sqrt(V) by
    sqrt(1 - b2^t) first, and its eps is a thirtieth as strong at step 1."""
    p = torch.nn.Parameter(torch.zeros(4, device=backend.device))
    p.grad = torch.full_like(p, 1e-5)
    APOLLO([p], lr=1.0, eps=1e-6, betas=(0.9, 0.999)).step()
    root = 1e-5 * 0.001**0.5
    wanted = -(1e-5 * 0.1) / (root + 1e-6) * 0.001**0.5 / 0.1
    assert p.tolist() == pytest.approx([wanted] * 4, rel=1e-5)
    assert abs(wanted) < 0.3  # AdamW would take 0.9


def test_a_matrix_whose_projection_is_a_rotation_takes_the_same_step_size(backend):
    """[1, 1]: the projection is one sign, so low-rank and dense are the same rule but for it."""
    weights = []
    for rank in (None, 1):
        p = torch.nn.Parameter(torch.ones(1, 1, device=backend.device))
        options = {"proj": "rademacher", "scale_type": "tensor", "disable_nl": True, "eps": 1e-2}
        optimizer = APOLLO([p], lr=0.1, rank=rank, weight_decay=0.1, **options)
        for step in range(4):
            p.grad = 1 + randn((1, 1), backend, seed=step).abs()
            optimizer.step()
        weights.append(p.item())
    # s X = |N| / (|R| + 1e-8) X, which is N but for 1e-8
    assert weights[0] == pytest.approx(weights[1], abs=1e-6)


def test_a_state_of_earlier_versions_loads_as_it_is(backend):
    """The moments are the same; only what is made of them has changed."""
    p, q = parameter((7,), backend), parameter((7,), backend)
    optimizer = APOLLO([p], lr=0.1)
    fill([p], backend)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = saved["state"][0]["step"].float()  # as it was kept then
    other = APOLLO([q], lr=0.1)
    other.load_state_dict(saved)
    q.data.copy_(p)
    for x, y in ((p, optimizer), (q, other)):
        fill([x], backend, 1)
        y.step()
    assert torch.equal(p, q)
    assert snapshot(other)[0, "step"].dtype == torch.int64
