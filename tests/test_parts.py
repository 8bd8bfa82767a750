"""Parts of matrices in the kernels, on the emulated device and in Triton's interpreter: together they
take the step of the whole. What crosses ranks is added up by hand (parts.py)."""

import conftest
import parts
import pytest
import torch

from apollo_kernels import backends
from apollo_kernels.batch import Hyper

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=["cuda", "triton"])
def module(request):
    if reason := conftest.why_not(*conftest.PLACES[request.param]):
        pytest.skip(reason)
    with conftest.running(request.param):
        yield backends.load(request.param)


def hyper(**changes):
    options = dict(
        lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, correct_bias=True, maximize=False,
        distribution="rademacher", update_proj_gap=2,
    )  # fmt: skip
    return Hyper(**{**options, **changes})


def near(found, exact, tolerance):
    assert found.shape == exact.shape
    difference = (found.double() - exact.double()).abs().max() if exact.numel() else 0
    assert difference <= tolerance * max(float(exact.double().abs().max()), 1e-30)


def agree(module, items, dim, ends, h, steps=2, tolerance=1e-5, **options):
    """Cut at ``ends``, the matrices step as they do whole: sums are in another order, no more."""
    ranks = list(zip(*(parts.cut(item, dim, ends) for item in items), strict=True))
    ranks, whole = [list(own) for own in ranks], [parts.copy(item) for item in items]
    assert all(module.takes(item) for own in ranks for item in own)
    for _ in range(steps):
        expected = parts.whole_step(module, whole, h, **options)
        for counters in parts.step(module, ranks, h, **options):
            assert counters == expected
    for i, item in enumerate(whole):
        own = [items[i] for items in ranks]
        weight, exp_avg, exp_avg_sq = parts.together(own, dim)
        near(exp_avg, item.exp_avg, tolerance)
        near(exp_avg_sq, item.exp_avg_sq, 2 * tolerance)
        near(weight, item.weight, tolerance)
        for part in own:
            assert int(part.step) == int(item.step)
            near(part.update_norm, item.update_norm, tolerance)
    return ranks, whole


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("rank", [1, 3, 8, 20, 72])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_the_contracted_side_take_the_step_of_the_whole(module, distribution, rank, dim):
    """Ends that are no multiple of a block, a part without anything, and one of less than a block."""
    shape = (90, 21) if dim == 0 else (21, 90)
    items = [parts.matrix(shape, rank, dim == 1, key=i, columns_first=i == 1) for i in range(2)]
    agree(module, items, dim, [33, 33, 40, 90], hyper(distribution=distribution))
