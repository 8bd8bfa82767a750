"""Each Triton kernel against the float64 specification, in Triton's interpreter: no GPU needed."""

import importlib.metadata
import sys
from functools import cache

import golden
import pytest
import torch

pytest.importorskip("triton")

import restatement
import triton
import triton.language as tl

from apollo_kernels import ops, philox, reference
from apollo_kernels.reference import Dense, Hyper, LowRank

if not triton.knobs.runtime.interpret:
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)

from apollo_kernels.triton_kernels import philox as drawn
from apollo_kernels.triton_kernels import project, step, table
from apollo_kernels.triton_kernels.element import element, finite, narrow, widen

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, of overflows on purpose

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- random numbers ------------------------------------------------------------------------------


@triton.jit
def store_words(out, key, c0, j0, epoch_at, KIND: tl.constexpr, N: tl.constexpr):
    c = (tl.load(c0) + tl.arange(0, N)).to(tl.uint32)[None, :]
    j = (tl.load(j0) + tl.arange(0, N)).to(tl.uint32)[:, None]
    words = drawn.words(tl.load(key), c, j, tl.load(epoch_at), KIND)
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    for i in tl.static_range(4):
        tl.store(out + i * N * N + at, words[i])


@triton.jit
def store_z(out, key, epoch_at, j0, k0, SIGNS: tl.constexpr, R: tl.constexpr, BK: tl.constexpr):
    z = drawn.draw(tl.load(key), tl.load(epoch_at), j0, k0, R, BK, SIGNS, False)
    at = tl.arange(0, R)[:, None] * BK + tl.arange(0, BK)[None, :]
    tl.store(out + at, narrow(z, tl.uint16))


@cache
def z_tile(key, epoch, j0, k0, rows, size, distribution):
    """z of one tile as the kernels draw it, [rows, size] bf16."""
    out = torch.empty(rows, size, dtype=torch.uint16)
    store_z[(1,)](
        out, torch.tensor(key), torch.tensor(epoch), j0, k0, distribution == "rademacher",
        rows, size,
    )  # fmt: skip
    return out.view(torch.bfloat16)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "key, c0, j0, epoch",
    [(0, 0, 0, 0), (golden.KEY, 5, 3, 7), (2**63 - 1, 2**31 - 2, 2**20, 2**31 - 1)],
)
def test_words_are_the_contract_s(key, c0, j0, epoch, kind):
    out = torch.empty(4, 4, 4, dtype=torch.int32)
    numbers = (torch.tensor(x) for x in (key, c0, j0))
    store_words[(1,)](out, *numbers, torch.tensor(epoch, dtype=torch.int32), kind, 4)
    for j in range(4):
        for c in range(4):
            expected = restatement.philox((c0 + c, j0 + j, epoch, kind), key)
            assert tuple(x & 0xFFFFFFFF for x in out[:, j, c].tolist()) == expected


def test_normals_and_signs_are_golden():
    for (j, k), bits in golden.NORMALS.items():
        z = z_tile(golden.KEY, 5, j, k // 16 * 16, 1, 16, "gaussian")[0, k % 16]
        assert z.view(torch.int16).item() & 0xFFFF == bits, (j, k)
    z = torch.cat([z_tile(golden.KEY, 5, 2, k, 1, 128, "rademacher") for k in (384, 512)], dim=1)
    negative = [384 + i for i, x in enumerate(z[0].tolist()) if x < 0]
    assert [k for k in negative if 500 <= k < 540] == golden.NEGATIVE_SIGNS


@pytest.mark.parametrize("rows, size", [(1, 16), (1, 128), (16, 32), (64, 64)])
def test_a_tile_of_signs_is_the_contract_s_to_the_bit(rows, size):
    for k0 in (0, size, 512 - size, 512, 5 * 512 + 128):
        z = philox.draw(99, 4, 3 + rows, size, "rademacher", start=k0)[3:]
        assert torch.equal(z_tile(99, 4, 3, k0, rows, size, "rademacher"), z)


def test_normals_round_as_the_contract_allows():
    """Fewer than 1 of 1000 to the other neighbour, none further than its bound."""
    z = z_tile(2**62 + 5, 3, 0, 4096, 512, 128, "gaussian")
    exact = philox.draw(2**62 + 5, 3, 512, 128, start=4096)
    assert (z != exact).double().mean() < 1e-3
    torch.testing.assert_close(z.double(), exact.double(), rtol=2**-8 + 2**-9, atol=2**-10)


@triton.jit
def convert(x, out, T: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, narrow(widen(tl.load(x + i)), T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_round_to_nearest_even_and_widen_exactly(dtype):
    bits = torch.randint(-(2**31), 2**31, (4096,)).int()
    x = torch.cat([bits.view(torch.float32), torch.randn(3000), torch.tensor([0.0, -0.0, 65519.0])])
    ties = torch.arange(997).float() * 2**-9 + 1  # halfway between two bf16
    x = torch.cat([x, ties])[:8192]
    x = torch.nn.functional.pad(x, (0, 8192 - len(x)))
    out = torch.empty(8192, dtype=dtype)
    types = {torch.bfloat16: torch.uint16}
    convert[(1,)](x, out.view(types.get(dtype, dtype)), element(dtype), 8192)
    assert torch.equal(out.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
    wide = torch.empty(8192)
    convert[(1,)](out.view(types.get(dtype, dtype)), wide, tl.float32, 8192)
    assert torch.equal(wide.nan_to_num(7.0), out.float().nan_to_num(7.0))


@triton.jit
def is_finite(x, out):
    i = tl.arange(0, 4)
    tl.store(out + i, finite(tl.load(x + i)).to(tl.int32))


def test_finite():
    out = torch.empty(4, dtype=torch.int32)
    is_finite[(1,)](torch.tensor([float("nan"), float("inf"), -3.4e38, -float("inf")]), out)
    assert out.tolist() == [0, 0, 1, 0]


# ---- one step of the low-rank kernels ------------------------------------------------------------


class Drawn(philox.ProjectionCache):
    """Hands the specification the z that the kernels draw: what is left is their arithmetic."""

    def get(self, key, epoch, rank, dim, distribution, device, form, prepare):
        rows = triton.next_power_of_2(max(rank, 1))
        tiles = [
            z_tile(key, epoch, 0, k, rows, 128, distribution) for k in range(0, max(dim, 1), 128)
        ]
        return prepare(torch.cat(tiles, dim=1)[:rank, :dim])


def hyper(**options):
    defaults = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, correct_bias=True)
    return Hyper(**{**defaults, "maximize": False, **options})


def low_rank(w, g, rows, rank, moments=True):
    """A parameter in mid-run: moments, a limiter's norm and a step count of three."""
    channels, k = w.shape if rows else w.shape[::-1]
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(channels, min(rank, k), generator=generator) * moments
    v = (0.5 + torch.rand(m.shape, generator=generator)) * moments
    norm = torch.tensor(0.9 * float(g.double().norm()) * moments)
    return LowRank(w, g, m, v, norm, torch.tensor(3.0), 12345, rows)


def as_dtype(item, dtype):
    """A copy in another precision; float64 is the oracle."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    low = dtype == torch.float64
    return LowRank(
        item.weight.detach().to(dtype if low else item.weight.dtype, copy=True),
        item.grad.to(dtype if low else item.grad.dtype, copy=True),
        *(t.to(wide, copy=True) for t in (item.exp_avg, item.exp_avg_sq, item.update_norm)),
        item.step.clone(), item.key, item.rows,
    )  # fmt: skip


def check_step(items, options):
    """The kernels' errors against float64 are at most twice those of PyTorch's own arithmetic.

    Returns what the kernels counted: updates, limited, not finite.
    """
    exact, plain = ([as_dtype(i, d) for i in items] for d in (torch.float64, torch.float32))
    counters = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    reference.step_low_rank(exact, options, counters[0], Drawn())
    reference.step_low_rank(plain, options, counters[1], Drawn())
    before = [i.weight.double() for i in items]
    step.step_low_rank(items, options, counters[2], philox.ProjectionCache())
    assert counters[2].tolist() == counters[0].tolist()
    for item, e, p, w in zip(items, exact, plain, before, strict=True):
        assert float(item.step) == float(e.step)
        for name in ("exp_avg", "exp_avg_sq", "update_norm", "weight"):
            mine, right, theirs = (getattr(x, name).double() for x in (item, e, p))
            if right.numel() == 0:
                continue
            # Roundings that PyTorch's run may escape by luck where few elements are compared: of
            # the store, and of a sum's last terms, twice that in a square (measured: up to 3.2).
            size = max(right.abs().max(), w.abs().max() if name == "weight" else 0)
            eps = torch.finfo(item.weight.dtype if name == "weight" else torch.float32).eps
            error, allowed = (mine - right).abs().max(), 2 * (theirs - right).abs().max()
            assert error <= allowed + 4 * eps * size, (name, tuple(item.weight.shape), error)
    return counters[2].tolist()


def data(shape, dtype, g_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(g_dtype or dtype)


SIZES = [(1, 7), (7, 1), (129, 33), (1, 1134)]


@pytest.mark.parametrize("rank", [1, 3, 8, 64, 200])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_step_of_odd_sizes(dtype, scale_type, rank):
    """Both orientations in one batch; the ranks are clamped as the optimizer does it."""
    shapes = {1: SIZES, 8: SIZES}.get(rank, [(7, 129), (5, 230)])
    items = [
        low_rank(*data(shape, dtype), rows, rank) for shape in shapes for rows in (True, False)
    ]
    # below rank 4 a channel's |N_c| / |R_c| is ill-conditioned: compare the moments elsewhere
    if scale_type == "channel":
        items = [i for i in items if i.exp_avg.shape[1] >= 4]
    distribution = "rademacher" if rank in (3, 8) else "gaussian"
    if items:
        check_step(items, hyper(scale_type=scale_type, scale=2.0, distribution=distribution))


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_gradients_of_different_dtypes(dtype, g_dtype):
    check_step([low_rank(*data((40, 20), dtype, g_dtype), True, 8)], hyper())


@pytest.mark.parametrize(
    "options",
    [
        dict(scale_front=True, scale=4.0, update_proj_gap=2),
        dict(disable_nl=True, weight_decay=0.0),
        dict(correct_bias=False, maximize=True),
        dict(betas=(0.0, 0.0), distribution="rademacher", update_proj_gap=1),
    ],
    ids=str,
)
def test_every_switch(options):
    items = [low_rank(*data((40, 20), torch.float32), rows, 8) for rows in (True, False)]
    check_step(items, hyper(**options))


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("stride", [(131, 1), (1, 70)], ids=["row-major", "column-major"])
def test_stochastic_rounding_takes_the_contract_s_bits(stride, rows):
    """As PyTorch but where its float32 sum, rounded otherwise in its last bit, crosses a border."""
    w, _ = guarded((70, 131), stride, torch.bfloat16)
    w[3, 5] = torch.finfo(torch.bfloat16).max  # next to infinity: to the nearest
    item = low_rank(w, 3 * torch.randn(70, 131).bfloat16(), rows, 8)
    twin = as_dtype(item, torch.bfloat16)
    twin.weight = item.weight.contiguous().clone()
    options = hyper(stochastic_rounding=True)
    for back_end, one in ((step, item), (reference, twin)):
        counters = torch.zeros(3, dtype=torch.int64)
        back_end.step_low_rank([one], options, counters, Drawn())
    different = (item.weight != twin.weight).double().mean()
    assert different < 1e-3 and torch.isfinite(item.weight).all()
    torch.testing.assert_close(item.weight, twin.weight, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("previous", [0.0, 1e-3, 1e6])
def test_the_limiter_acts_where_the_norm_grew(previous):
    """0: a first step, whose norm is unset and whose moments are zero."""
    item = low_rank(*data((40, 20), torch.float32), True, 8, moments=previous > 0)
    item.update_norm.fill_(previous)
    assert check_step([item], hyper())[1] == (previous == 1e-3)


@pytest.mark.parametrize(
    "rank, distribution", [(1, "gaussian"), (8, "gaussian"), (8, "rademacher")]
)
@pytest.mark.parametrize("rows", [True, False])
def test_a_long_contracted_side_is_cut_into_chunks(rows, rank, distribution):
    shape = (3, 4100) if rows else (4100, 3)
    item = low_rank(*data(shape, torch.float32), rows, rank)
    lies = table.matrix(item.grad if rows else item.grad.t())
    layout = table.Layout(3, 4100, rank, rows, False, lies, lies)
    assert project.split(layout, project.choose(layout, False)) == (1536, 3)
    check_step([item], hyper(scale_type="tensor", distribution=distribution))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_tiles_of_wide_ranks(asynchronous, monkeypatch):
    """Two rank tiles, and both card classes' shapes of them."""
    monkeypatch.setattr(step, "_asynchronous_dots", lambda device: asynchronous)
    step._plan.cache_clear()
    check_step([low_rank(*data((5, 230), torch.bfloat16), True, 200)], hyper())
    step._plan.cache_clear()


# ---- how tensors lie in memory -------------------------------------------------------------------


def guarded(shape, stride, dtype, offset=3):
    """A tensor of these strides in storage whose other elements are NaN, and the storage."""
    size = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 5
    storage = torch.full((size,), float("nan"), dtype=dtype)
    view = storage.as_strided(shape, stride, offset)
    view.copy_(torch.randn(shape))
    return view, storage


STRIDES = {
    "contiguous": (20, 1),
    "rows of a wider matrix": (48, 1),
    "transposed": (1, 40),
    "columns of a taller matrix": (1, 64),
    "neither side contiguous": (64, 2),
}


@pytest.mark.parametrize("g_stride", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("w_stride", STRIDES.values(), ids=STRIDES)
def test_strides_and_offsets(w_stride, g_stride):
    for dtype, rows in ((torch.float32, True), (torch.bfloat16, False)):
        w, w_storage = guarded((40, 20), w_stride, dtype)
        g, _ = guarded((40, 20), g_stride, dtype)
        holes = int(w_storage.isnan().sum())
        check_step([low_rank(w, g, rows, 4)], hyper())
        assert int(w_storage.isnan().sum()) == holes and not w.isnan().any()


def test_aligned_matrices_take_the_vector_path():
    w, g = data((48, 32), torch.bfloat16)
    assert table.matrix(w).aligned and not table.matrix(w[:, 1:17]).aligned
    items = [low_rank(w, g, True, 16), low_rank(w.clone(), g, False, 16)]
    check_step(items, hyper())


def test_offsets_beyond_two_to_the_31():
    """Two rows 2^31 elements apart; the pages in between are never touched."""
    ld = 2**31 + 32
    w, g = (torch.empty(ld + 24, dtype=torch.bfloat16).as_strided((2, 24), (ld, 1))
            for _ in range(2))  # fmt: skip
    w.copy_(torch.randn(2, 24))
    g.copy_(torch.randn(2, 24))
    for rows in (True, False):
        near = low_rank(w.clone(), g.clone(), rows, 4)
        far = low_rank(w, g, rows, 4)
        for item in (near, far):
            step.step_low_rank([item], hyper(), torch.zeros(3, dtype=torch.int64), None)
        assert torch.equal(near.weight, far.weight) and torch.equal(near.exp_avg, far.exp_avg)


def test_empty_matrices_step_without_a_launch_of_tiles():
    items = [low_rank(torch.ones(s), torch.ones(s), True, 4) for s in ((0, 5), (5, 0), (0, 0))]
    check_step(items, hyper(scale_type="tensor"))


def test_float64_goes_to_pytorch():
    w, g = data((9, 6), torch.float64)
    item = low_rank(w, g, True, 4)
    twin = as_dtype(item, torch.float64)
    item.exp_avg, item.exp_avg_sq = twin.exp_avg.clone(), twin.exp_avg_sq.clone()
    item.update_norm = twin.update_norm.clone()
    counters = torch.zeros(3, dtype=torch.int64)
    step.step_low_rank([item], hyper(), counters, philox.ProjectionCache())
    reference.step_low_rank([twin], hyper(), counters, philox.ProjectionCache())
    assert torch.equal(item.weight, twin.weight)


# ---- batches -------------------------------------------------------------------------------------


def batch(dtype=torch.bfloat16):
    torch.manual_seed(3)
    shapes = [(40, 20), (20, 40), (3, 2100), (17, 9)]
    return [low_rank(*data(s, dtype), s[0] >= s[1], 4) for s in shapes]


def bits(items):
    return [t for i in items for t in (i.weight, i.exp_avg, i.exp_avg_sq, i.update_norm)]


def run(items):
    step.step_low_rank(items, hyper(), torch.zeros(3, dtype=torch.int64), None)
    return bits(items)


def test_the_same_bits_every_time_and_in_any_company():
    together, again = run(batch()), run(batch())
    alone = [t for item in batch() for t in run([item])]
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.fixture
def launches(monkeypatch):
    """The kernels launched, by name."""
    from triton.runtime import interpreter

    names, call = [], interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


def test_the_number_of_launches_does_not_grow_with_the_parameters(launches):
    counts = []
    for copies in (1, 3):
        del launches[:]
        run([item for _ in range(copies) for item in batch()[:2]])
        items = [dense(data((9,), torch.float32)) for _ in range(copies)]
        step.step_dense(items, hyper(), torch.zeros(3, dtype=torch.int64), None)
        counts.append(sorted(launches))
    assert counts[0] == counts[1]
    assert counts[0] == ["_adamw", "_apply", "_apply", "_begin", "_limit", "_project", "_project"]


def test_tables_are_kept_while_nothing_moves():
    items = batch()
    table.table.cache_clear()
    for expected in (0, 1, 2):
        run(items)
        assert table.table.cache_info().hits == expected
    items[0].grad = items[0].grad.clone()  # a moved gradient: a new table, and the right result
    check_step(items, hyper())


# ---- AdamW ---------------------------------------------------------------------------------------


def dense(tensors):
    w, g = tensors
    m = torch.randn_like(w, dtype=torch.float32)
    v = torch.rand_like(w, dtype=torch.float32) + 0.5
    return Dense(w, g, m, v, torch.tensor(3.0))


def check_dense(items, options):
    def copies(dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [
            Dense(
                i.weight.to(dtype or i.weight.dtype, copy=True),
                i.grad.to(dtype or i.grad.dtype, copy=True),
                i.exp_avg.to(wide, copy=True), i.exp_avg_sq.to(wide, copy=True), i.step.clone(),
            )
            for i in items
        ]  # fmt: skip

    exact, plain = copies(torch.float64), copies(None)
    counters = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    for batch, count in ((exact, counters[0]), (plain, counters[1])):
        reference.step_dense(batch, options, count, None)
    step.step_dense(items, options, counters[2], None)
    assert counters[0].tolist() == counters[2].tolist()
    for item, e, p in zip(items, exact, plain, strict=True):
        assert float(item.step) == float(e.step)
        for name in ("exp_avg", "exp_avg_sq", "weight"):
            mine, right, theirs = (getattr(x, name).double() for x in (item, e, p))
            if right.numel() == 0:
                continue
            eps = torch.finfo(getattr(item, name).dtype).eps
            allowed = 2 * (theirs - right).abs().max() + 2 * eps * right.abs().max()
            assert (mine - right).abs().max() <= allowed, name


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adamw_of_odd_sizes_and_dtypes(dtype, g_dtype):
    shapes = [(), (1,), (7,), (4100,), (16, 3), (0,), (4096,)]
    check_dense([dense(data(s, dtype, g_dtype)) for s in shapes], hyper())


@pytest.mark.parametrize(
    "options", [dict(correct_bias=False), dict(maximize=True), dict(betas=(0.0, 0.0))], ids=str
)
def test_adamw_s_switches(options):
    check_dense([dense(data((50,), torch.float32))], hyper(**options))


@pytest.mark.parametrize("g_stride", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("w_stride", STRIDES.values(), ids=STRIDES)
def test_adamw_s_strides(w_stride, g_stride):
    w, storage = guarded((40, 20), w_stride, torch.float32)
    g, _ = guarded((40, 20), g_stride, torch.float32)
    holes = int(storage.isnan().sum())
    check_dense([dense((w, g))], hyper())
    assert int(storage.isnan().sum()) == holes


def test_a_rate_in_a_tensor_is_read_on_the_device():
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        torch.manual_seed(4)
        item, other = (
            low_rank(*data((9, 6), torch.float32), True, 4),
            dense(data((9,), torch.float32)),
        )
        counters = torch.zeros(3, dtype=torch.int64)
        step.step_low_rank([item], hyper(lr=lr), counters, None)
        step.step_dense([other], hyper(lr=lr), counters, None)
        results.append((item.weight, other.weight))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


# ---- the choice of the back end ------------------------------------------------------------------


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    assert ops.choose("auto", "cpu") == "torch" and ops.choose("triton", "cpu") == "triton"
    assert ops.load("triton") is step
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="'triton' cannot run: needs a CUDA device"):
        ops.choose("triton", "cpu")


def test_what_is_missing_is_said(monkeypatch):
    def reason():
        ops._no_triton.cache_clear()
        return dict(ops.backends("cuda"))["triton"]

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "3.2.0+git1")
        assert reason() == "needs Triton 3.6 or newer, found 3.2.0+git1"
        patch.setitem(sys.modules, "triton", None)
        assert reason() == "Triton is not installed (pip install triton)"
    assert reason() is None
