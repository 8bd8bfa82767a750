"""The CUDA kernels, run by an emulated device (cuda_on_cpu), against the float64 oracle."""

import emulated
import pytest
import torch

from apollo_kernels import APOLLO, batch, philox

REASON = emulated.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(129, 64), (64, 129), (40, 40), (1, 7), (7, 1), (300, 17), (0, 4), (4, 0)]
BETAS = (0.9, 0.999)


@pytest.fixture(scope="session")
def module():
    return emulated.load(emulated.build())


@pytest.fixture(autouse=True)
def _device(module):
    with emulated.device(module):
        yield


def gradient(shape, dtype, order="rows"):
    """A random gradient that lies in memory as told, NaN around it."""
    m, n = shape
    if order in ("rows", "columns"):
        g = torch.randn(shape).to(dtype)
        return g if order == "rows" else g.t().contiguous().t()
    whole = torch.full((m + 3, n + 9), float("nan")).to(dtype)
    if order == "sliced columns":
        whole = torch.full((n + 9, m + 3), float("nan")).to(dtype).t()
    if order == "every second":
        whole = torch.full((2 * m, 2 * n), float("nan")).to(dtype)
        return whole[::2, ::2].copy_(torch.randn(shape))
    return whole[2 : m + 2, 3 : n + 3].copy_(torch.randn(shape))


def one_step(backend, weight, grad, dtypes, **options):
    p = torch.nn.Parameter(weight.to(dtypes[0], copy=True))  # each back end steps its own
    if dtypes[0] != dtypes[1]:
        p.grad_dtype = dtypes[1]  # else PyTorch refuses the assignment
    p.grad = grad if grad.dtype == dtypes[1] else grad.to(dtypes[1])
    optimizer = APOLLO([p], backend=backend, lr=0.1, betas=BETAS, **options)
    optimizer.step()
    return p.detach(), optimizer.state[p]


def compare_step(shape, dtypes, order="rows", **options):
    """Moments, norm, weights of one step: at most twice plain PyTorch's error against float64."""
    weight = torch.randn(shape).to(dtypes[0])
    grad = gradient(shape, dtypes[1], order)
    double = (torch.float64, torch.float64)
    exact, exact_state = one_step("torch", weight, grad, double, **options)
    plain, plain_state = one_step("torch", weight, grad, dtypes, **options)
    found, state = one_step("cuda", weight, grad, dtypes, **options)
    # Beside twice plain's error: float32 gradients go through 3 exact bf16 pieces, so that a run of
    # 64 k is a sum of 192 terms; its random errors of 2^-24 grow by sqrt(192) / 2, to 2^-21 of the
    # largest R. Squares double that, and so does s = |N| / |R|.
    for name, units in (("exp_avg", 2**-21), ("exp_avg_sq", 2**-20), ("update_norm", 2**-20)):
        a, b, e = (s[name].double() for s in (state, plain_state, exact_state))
        slack = units * e.abs().max() if e.numel() else 0.0
        worst = ((a - e).abs() - 2 * (b - e).abs().max() - slack).max() if e.numel() else -1
        assert worst <= 0, f"{name} of {shape}"
    if exact.numel():
        slack = torch.finfo(dtypes[0]).eps * exact.abs()  # a rounding that falls to the other side
        worst = (found.double() - exact).abs() - 2 * (plain.double() - exact).abs().max() - slack
        assert worst.max() <= 0
    assert state["step"] == 1


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rank", [1, 3, 7, 8, 65])
@pytest.mark.parametrize("proj_type", ["right", "left"])
def test_the_kernels_draw_the_contracts_numbers(distribution, rank, proj_type):
    """The gradient is the identity, so that R is Z itself."""
    k = 530  # more than a run of signs; 33 blocks and 2
    grad = torch.eye(k)
    options = {"rank": rank, "proj": distribution, "proj_type": proj_type}
    _, state = one_step("cuda", torch.zeros(k, k), grad, (torch.float32,) * 2, **options)
    z = (state["exp_avg"].t() / (1 - BETAS[0]) * rank**0.5).bfloat16()
    wanted = philox.draw(state["seed"], 0, rank, k, distribution)
    assert (z != wanted).double().mean() <= (1e-3 if distribution == "gaussian" else 0)
    error = (z.double() - wanted.double()).abs()  # two neighbours in bf16, at most
    assert (error <= 2**-7 * wanted.double().abs() + 2**-10).all()


@pytest.mark.parametrize("dtypes", [(w, g) for w in DTYPES for g in DTYPES], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 100])
def test_every_pair_of_dtypes(dtypes, rank):
    for shape in [(131, 110), (110, 131)] if rank == 100 else SHAPES[:3]:
        options = {"scale_type": "tensor", "weight_decay": 0.01}
        compare_step(shape, dtypes, rank=rank, proj="rademacher", **options)


@pytest.mark.parametrize("rank", [1, 3, 5, 8, 64, 100, 200, 300])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_every_rank_and_orientation(rank, proj_type):
    """From the dot products over one rank tile to three; scale_type tensor where s of a channel is
    ill-conditioned."""
    kind = "tensor" if rank < 8 else "channel"
    for shape in [(310, 301), (17, 400), (129, 5)]:
        options = {"rank": rank, "scale_type": kind, "proj": "rademacher", "proj_type": proj_type}
        compare_step(shape, (torch.float32, torch.bfloat16), **options)


@pytest.mark.parametrize("order", ["rows", "columns", "sliced", "sliced columns", "every second"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [2, 16])
def test_gradients_lie_in_memory_in_any_order(order, dtype, rank):
    for shape in [(130, 70), (33, 129)]:
        compare_step(
            shape, (dtype, dtype), order, rank=rank, proj="rademacher", scale_type="tensor"
        )


@pytest.mark.parametrize("rank", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_contracted_side_is_split_and_summed(rank, dtype, module):
    shape = (24, 5000)
    tiles = module.tiling(channels=24, k=5000, rank=rank, grad_dtype=0, by_row=True)
    assert tiles[2] == (5 if rank == 2 else 4)  # chunks
    options = {"rank": rank, "proj": "rademacher", "scale_type": "tensor"}
    compare_step(shape, (dtype, dtype), proj_type="right", **options)
    compare_step(shape[::-1], (dtype, dtype), proj_type="left", **options)


def test_the_limiters_constants_are_those_of_the_specification(module):
    assert (module.NORM_GROWTH, module.TINY) == (batch.NORM_GROWTH, batch.TINY)


CONFIGURATIONS = {
    "channel": {"rank": 8},
    "signs": {"rank": 16, "proj": "rademacher"},
    "reverse": {"rank": 8, "proj_type": "reverse_std"},
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "front": {"rank": 8, "scale_front": True, "scale": 4.0},
    "no limiter": {"rank": 8, "disable_nl": True},
    "all switches": {
        "rank": 8, "weight_decay": 0.01, "scale_front": True, "maximize": True,
        "correct_bias": False, "scale": 4.0,
    },
    "AdamW": {"weight_decay": 0.01},
}  # fmt: skip


def train(backend, dtype, keys, steps=(0, 12), load=None):
    """A run over redraws; gradients are the same for every dtype and back end."""
    generator = torch.Generator().manual_seed(0)
    ps = [
        torch.nn.Parameter(torch.randn(s, generator=generator).bfloat16().to(dtype)) for s in SHAPES
    ]
    optimizer = APOLLO(ps, lr=1e-2, update_proj_gap=5, backend=backend, **keys)
    if load is not None:
        weights, state = load
        for p, w in zip(ps, weights, strict=True):
            p.data.copy_(w)
        optimizer.load_state_dict(state)
    for i in range(steps[1]):
        for p in ps:
            p.grad = (
                (torch.randn(p.shape, generator=generator) * (2 if i == 4 else 1))
                .bfloat16()
                .to(dtype)
            )
        if i >= steps[0]:
            optimizer.step()
    return [p.detach() for p in ps], optimizer


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_run_errs_no_more_than_twice_what_plain_pytorch_does(name, dtype):
    keys = CONFIGURATIONS[name]
    exact, _ = train("torch", torch.float64, keys)
    plain, by_torch = train("torch", dtype, keys)
    found, optimizer = train("cuda", dtype, keys)
    for f, p, e in zip(found, plain, exact, strict=True):
        if e.numel():
            # The floor: roundings of the largest weight that the plain run may happen to escape.
            # Normals may differ by an ulp of bf16 in one entry of 1000: less than that floor.
            slack = 4 * torch.finfo(dtype).eps * e.abs().max()
            assert (f.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + slack
    assert optimizer.stats() == by_torch.stats()
    for p, q in zip(optimizer.state.values(), by_torch.state.values(), strict=True):
        assert p["step"] == q["step"] == 12


@pytest.mark.parametrize("name", ["channel", "Mini", "AdamW"])
@pytest.mark.parametrize("order, workers", [("1", "1"), ("7", "1"), ("0", "2")])
def test_no_schedule_changes_a_bit(name, order, workers, monkeypatch):
    keys = CONFIGURATIONS[name]
    first, a = train("cuda", torch.bfloat16, keys, (0, 6))
    monkeypatch.setenv("EMULATED_ORDER", order)
    monkeypatch.setenv("EMULATED_WORKERS", workers)
    again, b = train("cuda", torch.bfloat16, keys, (0, 6))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for x, y in zip(a.state.values(), b.state.values(), strict=True):
        assert torch.equal(x["exp_avg"], y["exp_avg"])


def test_the_number_of_calls_does_not_grow_with_the_parameters(module):
    """Four calls into C++: project, scale and apply; adamw (two launches)."""
    for count in (1, 9):
        ps = [torch.nn.Parameter(torch.randn(9, 5)) for _ in range(count)]
        vectors = [torch.nn.Parameter(torch.randn(5)) for _ in range(count)]
        optimizer = APOLLO(ps + vectors, rank=4, backend="cuda")
        for p in ps + vectors:
            p.grad = torch.randn_like(p)
        launches = module.launches()
        optimizer.step()
        assert module.launches() - launches == 5


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_offsets_beyond_two_to_the_31(rank, rows, proj_type):
    """16 rows of 64 elements, 2^28 + 8 apart: of 8 GB of addresses, a few pages are touched. With
    16 rows the rank is not clamped below that of the tiles."""
    apart = 2**28 + 8
    base = torch.empty(15 * apart + 64, dtype=torch.bfloat16)

    def far():
        return base.as_strided((16, 64) if rows else (64, 16), (apart, 1) if rows else (1, apart))

    weight = torch.randn(far().shape).bfloat16()
    grad = torch.randn(far().shape).bfloat16()
    far().copy_(weight)
    p = torch.nn.Parameter(far())
    far_grad = torch.empty_like(base).as_strided(p.shape, p.stride()).copy_(grad)
    q = torch.nn.Parameter(weight.clone())
    states = []
    for x, g in ((p, far_grad), (q, grad)):
        x.grad = g
        options = {"rank": rank, "scale_type": "tensor", "proj_type": proj_type}
        optimizer = APOLLO([x], lr=100.0, backend="cuda", **options)  # so that bf16 moves
        optimizer.step()
        states.append(optimizer.state[x])
    assert p.stride() == ((apart, 1) if rows else (1, apart))
    assert torch.equal(p.detach(), q.detach())
    assert (q.detach() != weight).float().mean() > 0.5
    for name in ("exp_avg", "exp_avg_sq", "update_norm"):
        # q lies as rows, and its sums over K may be taken in another order
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"maximize": True},
        {"scale_front": True, "scale": 4.0},
        {"disable_nl": True},
        {"correct_bias": False, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_every_switch_reaches_moments_norm_and_weights(options, rank):
    for shape in [(40, 24), (24, 40)]:
        named = {"rank": rank, "scale_type": "tensor", "proj": "rademacher", **options}
        compare_step(shape, (torch.float32, torch.bfloat16), **named)


def test_rank_1024():
    """Eight rank tiles over one of channels."""
    options = {"rank": 1024, "proj": "rademacher", "proj_type": "right"}
    compare_step((40, 1027), (torch.bfloat16, torch.bfloat16), **options)


@pytest.mark.parametrize("rank", [1, 8])
def test_the_benchmark_of_the_verbs_checks_this_back_end(rank, monkeypatch):
    """bench_ops.py times each launch alone, after it has compared a whole step with float64."""
    monkeypatch.syspath_prepend(str(emulated.ROOT / "bench"))
    import bench_ops

    for shape in [(40, 24), (24, 40)]:
        case = bench_ops.Case(shape, rank, torch.bfloat16, torch.device("cpu"))
        rows = list(bench_ops.measure_case(case, 1e9, 1e-3))
        assert [r["verb"] for r in rows if r["backend"] == "cuda"] == ["project", "scale", "apply"]
