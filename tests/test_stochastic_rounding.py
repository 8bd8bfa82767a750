"""bf16 weights rounded by chance: the contract's bits, no bias, and what it is for."""

import pytest
import torch
from conftest import running
from helpers import randn
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


def run(backend, shape, order="rows", steps=2, **options):
    def lay(x):
        return x if order == "rows" else x.t().contiguous().t()

    p = torch.nn.Parameter(lay(randn(shape, backend, torch.bfloat16)))
    optimizer = APOLLO([p], rank=8, lr=1e-2, stochastic_rounding=True, **options)
    for step in range(steps):
        p.grad = lay(randn(shape, backend, torch.bfloat16, seed=step + 1))
        optimizer.step()
    return p.detach().cpu()


@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(130, 70), (70, 133)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_every_back_end_rounds_as_the_specification_does(backend, shape, order, proj_type):
    options = {"proj_type": proj_type, "weight_decay": 0.1, "proj": "rademacher"}
    found = run(backend, shape, order, **options)
    with running("torch") as plain:
        wanted = run(plain, shape, order, **options)
        other = run(plain, shape, order, **options, seed=1)
    # A last bit of float32 moves one value in 2^16 over the edge, at each step.
    assert (found != wanted).float().mean() < 1e-3
    assert (other != wanted).float().mean() > 0.2


@pytest.mark.parametrize("stochastic", [True, False])
def test_small_updates_add_up(backend, stochastic):
    """Updates of 2^-12 of a weight of 1, whose bf16 neighbours are 2^-7 and 2^-8 away."""
    steps = 10 if backend.interpreted else 100
    p = torch.nn.Parameter(torch.ones(128, 64, dtype=torch.bfloat16, device=backend.device))
    options = {"lr": 2**-12, "correct_bias": False, "disable_nl": True, "rank": 64}
    optimizer = APOLLO([p], stochastic_rounding=stochastic, betas=(0.0, 0.0), **options)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    moved = float(1 - p.detach().double().mean())
    s = 1.0  # |N| / |R| of ones, whose R has norm about 8: N = sign(R), so s ~ 8 / 8
    if stochastic:
        # Of 8192 weights a sixteenth moves in each step, which is known to 5 %.
        assert moved == pytest.approx(steps * 2**-12 * s, rel=0.3)
    else:
        assert moved == 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_numbers_are_not_rounded_up_to_infinity(backend, sign):
    """From 0x7f7f0000 on, a float32 is rounded to the nearest bf16, and below it by chance. Both
    are pushed outward by three tenths of the distance of their neighbours, 2^120."""
    options = {"correct_bias": False, "disable_nl": True, "betas": (0.0, 0.0), "rank": 8}
    options |= {"scale_type": "tensor"}  # one s for all

    def stepped(weight, lr):
        p = torch.nn.Parameter(weight)
        p.grad = torch.full_like(p, -sign)
        APOLLO([p], lr=lr, stochastic_rounding=True, **options).step()
        return p.detach()

    size = float(stepped(torch.zeros(64, 40, device=backend.device), 1.0).abs().mean())
    bits = torch.full((64, 40), 0x7F7F, dtype=torch.int16, device=backend.device)
    largest = stepped(bits.view(torch.bfloat16) * sign, 0.3 * 2.0**120 / size)
    assert torch.equal(largest, bits.view(torch.bfloat16) * sign)
    next_one = stepped((bits - 1).view(torch.bfloat16) * sign, 0.3 * 2.0**120 / size)
    up = (next_one == bits.view(torch.bfloat16) * sign).float().mean()
    # 2560 weights, each with three tenths: within five standard deviations
    assert float(up) == pytest.approx(0.3, abs=0.05)
    assert torch.isfinite(next_one).all()


@pytest.mark.parametrize("dtype, shape", [(torch.float32, (16, 8)), (torch.bfloat16, (16,))])
def test_only_bf16_matrices_take_it(backend, dtype, shape):
    results = []
    for stochastic in (True, False):
        p = torch.nn.Parameter(torch.ones(shape, dtype=dtype, device=backend.device))
        p.grad = torch.full_like(p, 0.3)
        APOLLO([p], rank=8, stochastic_rounding=stochastic).step()
        results.append(p.detach())
    assert torch.equal(*results)
