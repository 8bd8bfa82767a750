"""The CPU's compiled passes give what reference.py specifies, in every dtype and memory order."""

import math

import pytest
import torch

from apollo_kernels import APOLLO, cpu, philox, reference
from apollo_kernels.batch import Hyper

pytestmark = pytest.mark.skipif(
    not cpu.NATIVE, reason="no AVX512, or no native module; PyTorch runs instead"
)

# Ragged in vectors, tiles, panels of 64 channels, spans of 1024 and runs of 512 k.
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 31), (33, 32), (64, 129), (130, 66), (257, 33), (70, 1100)]
SHAPES += [(3, 513), (1030, 9)]
RANKS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 33, 64, 129]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDERS = ("rows", "columns", "sliced rows", "sliced columns")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_order = pytest.mark.parametrize("order", ORDERS)


def matrix(channels, k, order, dtype):
    """X [C, K]: C or K contiguous, whole or cut out of a larger matrix of NaN."""
    x = torch.full((channels + 3, k + 5), math.nan)
    x[1 : channels + 1, 2 : k + 2] = torch.randn(channels, k)
    if "columns" in order:
        x = x.t().contiguous().t()
    x = x.to(dtype)[1 : channels + 1, 2 : k + 2]
    if "sliced" in order:
        return x
    return x.t().contiguous().t() if order == "columns" else x.contiguous()


@pytest.fixture(params=["tiles", "pairs", "scaled"])
def way(request, monkeypatch):
    """How a dense product of higher rank is made; this processor may not know all of them."""
    has = {"tiles": cpu.TILES, "pairs": cpu.PAIRS, "scaled": True}
    if not has[request.param]:
        pytest.skip(f"this processor cannot multiply {request.param}")
    monkeypatch.setattr(cpu, "TILES", request.param == "tiles")
    monkeypatch.setattr(cpu, "PAIRS", request.param == "pairs")
    return request.param


def projected(x, rank):
    z = philox.draw(7, 1, rank, x.shape[1])
    return z, *cpu.project(x, cpu.arrange(z, cpu.layout(x, rank)), rank)


def in_threads(call):
    """What ``call`` gives on 1, 2 and 3 threads."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(call())
    torch.set_num_threads(before)
    return found


# ---- project -------------------------------------------------------------------------------------


@each_dtype
@each_order
@pytest.mark.parametrize("channels, k", SHAPES)
def test_project_errs_no_more_than_twice_what_torch_does(channels, k, order, dtype, way):
    x = matrix(channels, k, order, dtype)
    assert cpu.supported(x)
    for rank in RANKS:
        z, r, q = projected(x, rank)
        exact, squares = reference.project(x.double(), philox.scaled(z, torch.float64))
        plain, plain_squares = reference.project(x, philox.scaled(z, torch.float32))
        # the unit covers results that torch happens to round exactly: a sum of k terms in float32
        # errs by at most k/2 eps of the sum of their absolute values
        bound = (x.double().abs() @ z.double().abs().t()) * rank**-0.5 * 2**-23
        error = (r - exact).abs()
        assert (error <= 2 * (plain - exact).abs().max() + bound * max(1, k / 16)).all(), rank
        slack = squares * 2**-23 * max(1, k / 16)
        assert ((q - squares).abs() <= 2 * (plain_squares - squares).abs().max() + slack).all()


def test_a_float32_gradient_keeps_all_its_bits(way):
    """A piece that was lost or cut twice would show here: R of one k is x z, rounded once."""
    x = torch.randn(300, 1) * torch.logspace(-20, 20, 300)[:, None]
    z, r, _ = projected(x, 64)
    exact = x.double() * z.double().t() / 8
    assert ((r - exact).abs() <= exact.abs() * 2**-23).all()


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_a_bad_entry_reaches_its_own_channel_only(bad, order, dtype, way):
    for rank in (1, 7, 8):
        for place in ((17, 32), (0, 0), (70, 5)):
            x = matrix(71, 33, order, dtype)
            x[place] = bad
            _, r, q = projected(x, rank)
            assert (~torch.isfinite(r * r).all(1)).nonzero().flatten().tolist() == [place[0]]
            assert (~torch.isfinite(q)).nonzero().flatten().tolist() == [place[0]]


def test_what_a_matrix_left_behind_reaches_no_other(way):
    """K is no multiple of what is packed together, and buffers are used again."""
    for order in ("rows", "columns"):
        projected(torch.full_like(matrix(64, 512, order, torch.float32), math.nan), 64)
        assert torch.isfinite(projected(matrix(40, 485, order, torch.float32), 64)[1]).all()


@each_dtype
def test_threads_do_not_change_a_bit_of_a_projection(dtype, way):
    for order in ("rows", "columns"):
        x = matrix(1100, 300, order, dtype)
        for rank in (1, 6, 64) if way != "scaled" else (1, 6):
            first, *others = in_threads(lambda x=x, rank=rank: projected(x, rank)[1:])
            for other in others:
                assert all(map(torch.equal, first, other))


@pytest.mark.parametrize(
    "x", [torch.randn(4, 4).double(), torch.randn(8, 8)[::2, ::2], torch.zeros(0, 4).bfloat16()]
)
def test_what_it_cannot_do_is_left_to_torch(x):
    assert not cpu.supported(x)
    assert not cpu.supported(torch.ones(4, 4), torch.ones(4, 4).bfloat16())


# ---- scale ---------------------------------------------------------------------------------------


def hyper(scale_type, eps=1e-6, betas=(0.9, 0.999)):
    return Hyper(0.01, betas, eps, 0.0, True, False, scale_type)


def both(r, q, m, v, options, factor=1.0):
    """s, u2, M and V of the compiled pass, and of the specification in float64."""
    found = [x.clone() for x in (m, v)]
    exact = [x.double() for x in (m, v)]
    s, u2 = cpu.scale(r, q, *found, options, factor)
    wide_s, wide_u2 = reference.scale(r.double() * factor, q.double() * factor**2, *exact, options)
    return (s, torch.tensor(u2), *found), (wide_s, wide_u2, *exact)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("channels, rank", [(1, 1), (1000, 1), (9000, 1), (5, 31), (70, 130)])
def test_scale_is_the_specifications(channels, rank, eps, scale_type):
    r, m = torch.rand(channels, rank), torch.rand(channels, rank) * 0.1
    v, q = torch.rand(channels, rank) * 0.01, torch.rand(channels) + 1
    m[0], v[0], r[0] = 0, 0, 0  # N is 0 where sqrt(V) + eps is
    for factor in (1.0, -1.0, 2**-16, 3.0):
        old = m * math.copysign(1, factor)  # nothing cancels, so that all of M can be exact
        found, exact = both(r, q, old, v, hyper(scale_type, eps), factor)
        for one, other in zip(found, exact, strict=True):
            assert torch.allclose(one.double(), other.double(), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e19])
def test_an_entry_without_a_finite_square_keeps_its_moments(bad, scale_type):
    r, m, v = torch.randn(6, 37), torch.randn(6, 37), torch.rand(6, 37)
    q = torch.ones(6)
    r[3, 36] = bad
    new_m, new_v = m.clone(), v.clone()
    s, u2 = cpu.scale(r, q, new_m, new_v, hyper(scale_type), 1.0)
    kept = (new_m == m) & (new_v == v)
    assert kept.nonzero().tolist() == [[3, 36]]
    assert math.isnan(u2) == math.isnan(bad)
    if math.isfinite(bad):  # its square overflows, but no norm does
        _, exact = both(r, q, m, v, hyper(scale_type), 1.0)
        assert torch.allclose(s.double()[:3], exact[0][:3], rtol=1e-6)


def test_norms_of_a_tensor_pass_the_range_of_float32():
    r, q = torch.full((3000, 4), 1e18), torch.full((3000,), 1e36)
    zeros = torch.zeros(3000, 4)
    (s, u2, *_), (exact, *_) = both(r, q, zeros, zeros, hyper("tensor"))
    assert torch.allclose(s.double(), exact, rtol=1e-5, atol=0) and math.isfinite(u2)
    (_, u2, *_), _ = both(torch.ones(3, 4), torch.full((3,), 3e38), zeros[:3], zeros[:3],
                          hyper("tensor", betas=(0.0, 0.0)))  # fmt: skip
    assert u2 == math.inf  # u^2 is a float32, as on every back end


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("channels, rank", [(40000, 1), (1000, 70)])
def test_threads_do_not_change_a_bit_of_the_scales(channels, rank, scale_type):
    r, q = torch.randn(channels, rank), torch.rand(channels)
    start = torch.zeros(channels, rank)

    def call():
        m, v = start.clone(), start.clone()
        s, u2 = cpu.scale(r, q, m, v, hyper(scale_type), 0.7)
        return s, torch.tensor(u2), m, v

    first, *others = in_threads(call)
    for other in others:
        assert all(map(torch.equal, first, other))


# ---- apply ---------------------------------------------------------------------------------------


@each_dtype
@each_order
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.01, 1e-7])
@pytest.mark.parametrize("channels, k", SHAPES)
def test_apply_rounds_the_exact_update_once(channels, k, decay, per_channel, order, dtype):
    w, x = matrix(channels, k, order, dtype), matrix(channels, k, order, dtype)
    before = w.clone()
    coefficient = torch.randn(channels if per_channel else 1)
    exact = w.double() * (1 - decay) - coefficient.double().expand(channels)[:, None] * x.double()
    cpu.apply(w, x, coefficient, decay)
    half_ulp = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
    float32 = (before.double().abs() + exact.abs()) * 2**-22
    assert ((w.double() - exact).abs() <= half_ulp + float32).all()
    twin = before.clone()
    reference.apply(twin, x, coefficient, decay)
    if dtype != torch.float32:  # fma moves a tie now and then
        assert (twin != w).float().mean() < 0.01 or w.numel() < 200


def test_a_decay_that_float32_would_lose_is_kept():
    w = torch.rand(20, 37) + 1
    exact = (w.double() * (1 - 4e-8)).float()
    cpu.apply(w, torch.zeros(20, 37), torch.ones(20), 4e-8)
    assert torch.equal(w, exact)


@each_dtype
def test_apply_leaves_the_rest_of_a_larger_matrix_alone(dtype):
    whole = torch.zeros(9, 42, dtype=dtype)
    w = whole[2:7, 3:39]
    cpu.apply(w, torch.ones(5, 36, dtype=dtype), torch.ones(5), 0.0)
    assert (w == -1).all() and whole.float().sum() == -180


@each_dtype
def test_a_nan_or_inf_weight_stays_one(dtype):
    for decay in (0.0, 0.1):
        w = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]).to(dtype)
        if dtype == torch.bfloat16:  # the NaN that a carry of rounding would turn into -0
            w.view(torch.int16)[0, 3] = 0x7FFF
        cpu.apply(w, torch.ones_like(w), torch.ones(1), decay)
        assert w[0, 0].isnan() and w[0, 1] == math.inf and w[0, 2] == -math.inf
        assert w[0, 3].isnan() == (dtype == torch.bfloat16)


def test_apply_rounds_a_tie_to_even():
    w = torch.tensor([[1.0, 1.0 + 2.0**-7]]).bfloat16()
    cpu.apply(w, torch.full((1, 2), -(2.0**-8)).bfloat16(), torch.ones(1), 0.0)
    assert w.tolist() == [[1.0, 1.0 + 2.0**-6]]


@each_dtype
def test_threads_do_not_change_a_bit_of_the_weights(dtype):
    for order in ("rows", "columns"):
        w, x = matrix(1100, 301, order, dtype), matrix(1100, 301, order, dtype)
        coefficient = torch.randn(1100)

        def call(w=w, x=x, coefficient=coefficient):
            new = w.clone()
            cpu.apply(new, x, coefficient, 0.01)
            return new

        first, *others = in_threads(call)
        assert all(torch.equal(first, other) for other in others)


# ---- without them --------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("proj", ["random", "rademacher", "sparse"])
@pytest.mark.parametrize("keys", [{"rank": 1, "scale_type": "tensor"}, {"rank": 20}], ids=str)
def test_plain_pytorch_steps_as_the_passes_do(keys, proj, dtype, monkeypatch):
    """The back end of processors that cannot run them, which nothing else here would run."""

    def trained(native):
        monkeypatch.setattr(cpu, "NATIVE", native)
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((70, 40), (33, 64))]
        optimizer = APOLLO(ps, lr=0.01, proj=proj, weight_decay=0.1, max_grad_norm=20.0, **keys)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return ps, [optimizer.state[p] for p in ps]

    fast, plain = trained(True), trained(False)
    for p, other in zip(*(found[0] for found in (fast, plain)), strict=True):
        store = 3 * torch.finfo(dtype).eps * other.abs().double()  # one for each step
        assert ((p.double() - other.double()).abs() <= store + 1e-6).all()
    for state, other in zip(*(found[1] for found in (fast, plain)), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            error = (state[name] - other[name]).abs().max() / other[name].abs().max()
            assert error <= 1e-5
