"""bf16 weights rounded by chance: the contract's bits, no bias, and what it is for."""

import contextlib
import os

import emulated
import pytest
import torch
from restatement import philox

from apollo_kernels import APOLLO
from apollo_kernels.philox import rounding_bits
from apollo_kernels.reference import round_stochastically


def test_bits_are_the_contracts():
    key, step = 0x123456789ABCDEF, 5
    bits = rounding_bits(key, step, 3, 2, 21)
    assert bits.shape == (2, 21)
    for i in (3, 4):
        for column in range(21):
            e = column % 8
            w = philox((column // 8, i, step, 2), key)
            assert bits[i - 3, column] == (w[e // 2] >> (16 * (e % 2))) & 0xFFFF


def test_rounding_is_unbiased_and_goes_to_a_neighbour():
    x = torch.tensor([1.0 + 2**-9, -3.3, 1e-30, 1.0, 0.0, 3.0e38])
    every = torch.arange(65536, dtype=torch.int32).view(-1, 1)
    rounded = round_stochastically(x.expand(65536, -1).contiguous(), every)
    assert torch.equal(rounded.double().mean(0)[:5], x.double()[:5])  # over all bits: exactly
    assert (rounded.double() - x.double()).abs().le(x.double().abs() * 2**-7).all()
    assert (rounded[:, 3] == 1).all()
    assert rounded[:, 0].unique().tolist() == [1.0, 1.0 + 2**-7]


def test_what_is_not_finite_stays_so():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.3955e38])
    for bits in (0, 65535):
        rounded = round_stochastically(x, torch.full((4,), bits, dtype=torch.int32))
        assert torch.equal(rounded.isnan(), x.isnan())
        assert torch.equal(rounded[1:], x[1:].bfloat16())


def run(backend, shape, order="rows", steps=4, **options):
    torch.manual_seed(0)
    w = torch.randn(shape).bfloat16()
    p = torch.nn.Parameter(w if order == "rows" else w.t().contiguous().t())
    optimizer = APOLLO([p], rank=8, lr=1e-2, backend=backend, stochastic_rounding=True, **options)
    for _ in range(steps):
        g = torch.randn(shape).bfloat16()
        p.grad = g if order == "rows" else g.t().contiguous().t()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(130, 70), (70, 133)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_the_kernels_round_as_the_specification_does(shape, order, proj_type, backend):
    options = {"proj_type": proj_type, "weight_decay": 0.1, "proj": "rademacher", "steps": 2}
    wanted = run("torch", shape, order, **options)
    device = contextlib.nullcontext()
    if backend == "cuda":
        if reason := emulated.why_not():
            pytest.skip(reason)
        device = emulated.device(emulated.load(emulated.build()))
    elif os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter runs on machines without a GPU")
    with device:
        found = run(backend, shape, order, **options)
    # A last bit of float32 moves one value in 2^16 over the edge, at each step.
    assert (found != wanted).float().mean() < 1e-3
    assert (run("torch", shape, order, **options, seed=1) != wanted).float().mean() > 0.2


@pytest.mark.parametrize("stochastic", [True, False])
def test_small_updates_add_up(stochastic):
    """100 updates of 2^-12 of a weight of 1, whose bf16 neighbours are 2^-7 and 2^-8 away."""
    p = torch.nn.Parameter(torch.ones(128, 64).bfloat16())
    options = {"lr": 2**-12, "correct_bias": False, "disable_nl": True, "rank": 64}
    optimizer = APOLLO([p], stochastic_rounding=stochastic, betas=(0.0, 0.0), **options)
    for _ in range(100):
        p.grad = torch.ones(128, 64).bfloat16()
        optimizer.step()
    moved = float(1 - p.detach().double().mean())
    s = 1.0  # |N| / |R| of ones, whose R has norm about 8: N = sign(R), so s ~ 8 / 8
    if stochastic:
        assert moved == pytest.approx(100 * 2**-12 * s, rel=0.3)
    else:
        assert moved == 0


def test_only_bf16_matrices_take_it():
    for dtype, shape in ((torch.float32, (16, 8)), (torch.bfloat16, (16,))):
        results = []
        for stochastic in (True, False):
            p = torch.nn.Parameter(torch.ones(shape).to(dtype))
            p.grad = torch.full(shape, 0.3).to(dtype)
            APOLLO([p], rank=8, stochastic_rounding=stochastic).step()
            results.append(p.detach())
        assert torch.equal(*results)
