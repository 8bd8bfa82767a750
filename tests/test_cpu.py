"""The CPU's compiled bf16 passes give what reference.py specifies."""

import pytest
import torch

from apollo_kernels import cpu, philox, reference
from apollo_kernels.native import _C

pytestmark = pytest.mark.skipif(
    _C is None or not _C.cpu_bf16_supported(),
    reason="this processor has no AVX512-BF16; PyTorch runs instead",
)

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 31), (33, 32), (64, 129), (130, 66), (257, 33)]
RANKS = [1, 2, 3, 4, 5, 12, 13, 16, 17, 64, 70, 129]


def matrix(channels, k, order):
    """X [C, K] bf16: C or K contiguous, whole or cut out of a larger matrix."""
    x = torch.randn(channels + 3, k + 5).bfloat16()
    return {
        "rows": x[:channels, :k].contiguous(),
        "columns": x[:channels, :k].t().contiguous().t(),
        "sliced rows": x[1 : channels + 1, 2 : k + 2],
        "sliced columns": torch.randn(k + 5, channels + 3)
        .bfloat16()[2 : k + 2, 1 : channels + 1]
        .t(),
    }[order]


ORDERS = ("rows", "columns", "sliced rows", "sliced columns")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("channels, k", SHAPES)
def test_project_errs_no_more_than_twice_what_torch_does(channels, k, order):
    x = matrix(channels, k, order)
    assert cpu.supported(x)
    for rank in RANKS:
        z = philox.draw(7, 1, rank, k)
        r, q = cpu.project(x, cpu.arrange(z, cpu.layout(x, rank)), rank)
        exact, squares = reference.project(x.double(), philox.scaled(z, torch.float64))
        plain, plain_squares = reference.project(x, philox.scaled(z, torch.float32))
        # the unit covers results that torch happens to round exactly: products are exact, and a sum
        # of k terms in float32 errs by at most k/2 eps of the sum of their absolute values
        bound = (x.double().abs() @ z.double().abs().t()) * rank**-0.5 * 2**-23
        assert ((r - exact).abs() <= 2 * (plain - exact).abs().max() + bound * max(1, k / 16)).all()
        slack = squares * 2**-23 * max(1, k / 16)
        assert ((q - squares).abs() <= 2 * (plain_squares - squares).abs().max() + slack).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("channels, k", SHAPES)
def test_apply_rounds_the_exact_update_once(channels, k, decay, per_channel, order):
    w, x = matrix(channels, k, order), matrix(channels, k, order)
    before = w.clone()
    coefficient = torch.randn(channels if per_channel else 1)
    exact = w.double() * (1 - decay) - coefficient.double().expand(channels)[:, None] * x.double()
    cpu.apply(w, x, coefficient, decay)
    half_ulp = exact.abs() * 2**-8
    float32 = (before.double().abs() + exact.abs()) * 2**-22
    assert ((w.double() - exact).abs() <= half_ulp + float32).all()
    twin = before.clone()
    reference.apply(twin, x, coefficient, decay)
    assert (twin != w).float().mean() < 0.01 or w.numel() < 200  # fma moves a tie now and then


def test_apply_leaves_the_rest_of_a_larger_matrix_alone():
    whole = torch.zeros(9, 12, dtype=torch.bfloat16)
    w = whole[2:7, 3:9]
    cpu.apply(w, torch.ones(5, 6, dtype=torch.bfloat16), torch.ones(5), 0.0)
    assert (w == -1).all() and whole.sum() == -30


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_bad_entry_reaches_its_own_channel_only(bad, order, rank):
    x = matrix(40, 33, order)
    x[17, 32] = bad
    z = philox.draw(7, 1, rank, 33)
    r, q = cpu.project(x, cpu.arrange(z, cpu.layout(x, rank)), rank)
    assert (~torch.isfinite(r * r).all(1)).nonzero().flatten().tolist() == [17]
    assert (~torch.isfinite(q)).nonzero().flatten().tolist() == [17]


def test_a_nan_or_inf_weight_stays_one():
    w = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1.0]]).bfloat16()
    w.view(torch.int16)[0, 3] = 0x7FFF  # the NaN that a carry of rounding would turn into -0
    cpu.apply(w, torch.ones_like(w), torch.ones(1), 0.0)
    assert w[0, 0].isnan() and w[0, 1] == float("inf") and w[0, 2] == -float("inf")
    assert w[0, 3].isnan()


def test_apply_rounds_a_tie_to_even():
    w = torch.tensor([[1.0, 1.0 + 2.0**-7]]).bfloat16()
    cpu.apply(w, torch.full((1, 2), -(2.0**-8)).bfloat16(), torch.ones(1), 0.0)
    assert w.tolist() == [[1.0, 1.0 + 2.0**-6]]


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_project_reads_nothing_beyond_the_matrix(order, rank):
    whole = torch.full((64, 64), float("nan")).bfloat16()
    x = whole[3:40, 5:36] if order == "rows" else whole[5:36, 3:40].t()  # odd K
    x.fill_(1.0)
    z = philox.draw(7, 1, rank, 31)
    r, q = cpu.project(x, cpu.arrange(z, cpu.layout(x, rank)), rank)
    assert torch.isfinite(r).all() and (q == 31).all()


def test_threads_do_not_change_a_bit():
    x = torch.randn(1000, 300).bfloat16()
    for rank in (1, 64):
        z = cpu.arrange(philox.draw(1, 0, rank, 300), cpu.layout(x, rank))
        results = []
        before = torch.get_num_threads()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu.project(x, z, rank)[0])
        torch.set_num_threads(before)
        assert all(torch.equal(results[0], r) for r in results)


@pytest.mark.parametrize(
    "x", [torch.randn(4, 4), torch.randn(8, 8).bfloat16()[::2, ::2], torch.zeros(0, 4).bfloat16()]
)
def test_what_it_cannot_do_is_left_to_torch(x):
    assert not cpu.supported(x)
