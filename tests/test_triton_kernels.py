"""Parts of the Triton kernels, and how they walk memory, in Triton's interpreter: no GPU needed.

test_triton_batch.py has the rule itself, and the restatement that is used here too.
"""

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

from apollo_kernels import backends, philox, reference

if not triton.knobs.runtime.interpret:
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)

from test_triton_batch import (
    check,
    data,
    dense,
    hyper,
    low_rank,
    restated,
    restated_dense,
    signals,
    take,
)

from apollo_kernels.triton_kernels import adamw, project, step, table
from apollo_kernels.triton_kernels import philox as drawn
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
def store_z(
    out, key, epoch_at, j0, k0, SIGNS: tl.constexpr, EXACT: tl.constexpr, R: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    z = drawn.draw(tl.load(key), tl.load(epoch_at), j0, k0, R, BK, SIGNS, EXACT, False)
    at = tl.arange(0, R)[:, None] * BK + tl.arange(0, BK)[None, :]
    tl.store(out + at, narrow(z, tl.uint16))


@cache
def z_tile(key, epoch, j0, k0, rows, size, distribution):
    """z of one tile as the kernels draw it, [rows, size] bf16."""
    out = torch.empty(rows, size, dtype=torch.uint16)
    store_z[(1,)](
        out, torch.tensor(key), torch.tensor(epoch), j0, k0, distribution == "rademacher",
        distribution == "exact", rows, size,
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


def test_exact_normals_are_the_host_s_to_the_bit():
    z = z_tile(2**62 + 5, 3, 0, 4096, 512, 128, "exact")
    assert torch.equal(z, philox.draw(2**62 + 5, 3, 512, 128, start=4096))


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


# ---- numbers that a step needs once --------------------------------------------------------------


@triton.jit
def store_shares(out, rate, weight_decay):
    high, low = adamw.kept_share(adamw.load_rate(rate, None), weight_decay)
    tl.store(out, high)
    tl.store(out + 1, low)


@pytest.mark.parametrize("decay", [0.0, 1e-7, 1e-12, 0.25, 0.3, 1 - 2**-20, 1.0, 1.5, 1e6])
def test_what_a_decay_leaves_is_a_sum_of_one_sign(decay):
    out = torch.zeros(2, dtype=torch.float32)
    store_shares[(1,)](out, decay, 1.0)
    high, low = out.double().tolist()
    assert high + low == pytest.approx(1 - decay, rel=2**-47, abs=0) and (low > 0) == (decay < 1)
    assert abs(low) <= 2**-23 * abs(high) or high == 0


# ---- one step of one batch -----------------------------------------------------------------------


def check_step(items, h, rtol=1e-5, **options):
    """A step of low-rank or dense items against the restatement."""
    dense_items = isinstance(items[0], step.Dense)
    expected = [(restated_dense if dense_items else restated)(item, h) for item in items]
    make = step.build_dense if dense_items else step.build
    take(make(items, **({} if dense_items else {"separate": False})), h, signals())
    for item, right in zip(items, expected, strict=True):
        check(item, right, rtol)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (129, 33), (1, 1134)])
def test_sizes_beside_those_of_the_tiles(shape):
    """Both orientations in one batch, of rank 1 and of a rank that is clamped at the short side."""
    h = hyper(scale_type="tensor")
    ranks = (1, 8) if max(shape) < 1000 else (1,)
    check_step([low_rank(*data(shape), rows, r) for r in ranks for rows in (True, False)], h)


@pytest.mark.parametrize("g_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_gradients_of_different_dtypes(dtype, g_dtype):
    check_step([low_rank(*data((40, 20), dtype, g_dtype), True, 8)], hyper())
    check_step([dense(*data((50,), dtype, g_dtype))], hyper())


@pytest.mark.parametrize("gap", [1, 2, 4])
def test_the_projection_is_drawn_anew_when_its_time_has_come(gap):
    check_step(
        [low_rank(*data((9, 20)), True, 4, t=t) for t in (0, 1, 3, 4)], hyper(update_proj_gap=gap)
    )


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("stride", [(131, 1), (1, 70)], ids=["row-major", "column-major"])
def test_stochastic_rounding_takes_the_contract_s_bits(stride, rows):
    """But where the float32 sum, rounded otherwise in its last bit, crosses a border."""
    w, _ = guarded((70, 131), stride, torch.bfloat16)
    w[3, 5] = torch.finfo(torch.bfloat16).max  # next to infinity: to the nearest
    h = hyper(stochastic_rounding=True)
    item = low_rank(w, 3 * torch.randn(70, 131).bfloat16(), rows, 8)
    exact, t = restated(item, h)
    bits = philox.rounding_bits(item.key, t, 0, 70, 131)
    right = reference.round_stochastically(exact["weight"].float(), bits)
    take(step.build([item], separate=False), h, signals())
    assert (item.weight != right).double().mean() < 1e-3 and torch.isfinite(item.weight).all()
    torch.testing.assert_close(item.weight, right, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("rank, distribution", [(1, "gaussian"), (8, "rademacher")])
@pytest.mark.parametrize("rows", [True, False])
def test_a_long_contracted_side_is_cut_into_chunks(rows, rank, distribution):
    item = low_rank(*data((3, 4100) if rows else (4100, 3)), rows, rank)
    layout = table.layout(item)
    assert project.split(layout, project.choose(layout, False), layout.k) == (1536, 3)
    h = hyper(scale_type="tensor", distribution=distribution)
    check_step([item], h, rtol=2e-3 if distribution == "gaussian" else 1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_tiles_of_wide_ranks(asynchronous, monkeypatch):
    """Two rank tiles, and both card classes' shapes of them."""
    monkeypatch.setattr(step, "_asynchronous_dots", lambda device: asynchronous)
    check_step([low_rank(*data((5, 230), torch.bfloat16), True, 200)], hyper())


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


def test_dense_tensors_of_one_order_are_walked_as_they_lie():
    tensors = [torch.randn(6, 5, 4).permute(2, 0, 1) for _ in range(2)]
    moments = [torch.rand(6, 5, 4).permute(2, 0, 1) for _ in range(2)]
    item = dense(*tensors, exp_avg=moments[0], exp_avg_sq=moments[1])
    check_step([item], hyper())


def test_aligned_matrices_take_the_vector_path():
    w, g = data((48, 32), torch.bfloat16)
    assert table.matrix(w).aligned and not table.matrix(w[:, 1:17]).aligned
    assert not table.matrix(torch.ones(48, 40)[:, :32]).vectors
    assert not table.matrix(w[:, :17]).vectors and table.matrix(w[:, 16:]).vectors
    items = [low_rank(w, g, True, 16), low_rank(w.clone(), g, False, 16)]
    check_step(items, hyper())


def test_the_stride_of_a_side_of_size_one_decides_nothing():
    row = torch.ones(1, 48)
    for stride in (0, 1, 7, 48):
        assert table.matrix(row.as_strided((1, 48), (stride, 1))) == table.matrix(row)
        assert table.matrix(row.as_strided((48, 1), (1, stride))) == table.matrix(row.t())


def test_offsets_beyond_two_to_the_31():
    """Two rows 2^31 elements apart; the pages in between are never touched."""
    ld = 2**31 + 32
    w, g = (torch.empty(ld + 24, dtype=torch.bfloat16).as_strided((2, 24), (ld, 1))
            for _ in range(2))  # fmt: skip
    w.copy_(torch.randn(2, 24))
    g.copy_(torch.randn(2, 24))
    for rows in (True, False):
        far = low_rank(w, g, rows, 4)
        near = low_rank(w.clone(), g.clone(), rows, 4)
        for name in ("exp_avg", "exp_avg_sq"):
            getattr(near, name).copy_(getattr(far, name))
        for item in (near, far):
            take(step.build([item], separate=False), hyper(), signals())
        assert torch.equal(near.weight, far.weight) and torch.equal(near.exp_avg, far.exp_avg)


# ---- batches -------------------------------------------------------------------------------------


def batch(dtype=torch.bfloat16):
    """Ranks 1, 4 and, clamped at the short side, 3; another would be 8 in the same group."""
    torch.manual_seed(3)
    kinds = [((40, 20), 4), ((20, 40), 4), ((3, 2100), 1), ((17, 3), 8), ((16, 24), 8)]
    return [low_rank(*data(s, dtype), s[0] >= s[1], rank) for s, rank in kinds]


def bits(items):
    return [t for i in items for t in (i.weight, i.exp_avg, i.exp_avg_sq, i.update_norm)]


def run(items, separate=False):
    take(step.build(items, separate=separate), hyper(), signals())
    return bits(items)


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_the_same_bits_every_time_and_in_any_company(separate):
    together, again = run(batch(), separate), run(batch(), separate)
    alone = [t for item in batch() for t in run([item], separate)]
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


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_the_number_of_launches_does_not_grow_with_the_parameters(launches, separate):
    expected = ["_adamw", "_apply", "_apply", "_begin", "_limit", "_project", "_project"]
    for copies in (1, 3):
        del launches[:]
        run([item for _ in range(copies) for item in batch()[:2]], separate)
        items = [dense(*data((9,))) for _ in range(copies)]
        take(step.build_dense(items), hyper(), signals())
        assert sorted(launches) == sorted(expected + ["_combine"] * separate)


def test_a_rate_in_a_tensor_is_read_on_the_device():
    results = []
    for lr in (0.25, torch.tensor(0.25), torch.tensor([0.25], dtype=torch.float64)):
        torch.manual_seed(4)
        item, other = low_rank(*data((9, 6)), True, 4), dense(*data((9,)))
        take(step.build([item], separate=False), hyper(lr=lr), signals())
        take(step.build_dense([other]), hyper(lr=lr), signals())
        results.append((item.weight, other.weight))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


# ---- the choice of the back end ------------------------------------------------------------------


def test_the_interpreter_runs_only_where_it_is_asked_for(monkeypatch):
    assert (
        backends.choose("auto", "cpu") == "torch" and backends.choose("triton", "cpu") == "triton"
    )
    assert backends.load("triton") is step
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="'triton' cannot run: needs a CUDA device"):
        backends.choose("triton", "cpu")


@pytest.mark.filterwarnings("ignore:the CUDA kernels cannot run")  # without a driver they say so
def test_what_is_missing_is_said(monkeypatch):
    def reason():
        backends._no_triton.cache_clear()
        return dict(backends.backends("cuda"))["triton"]

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "3.2.0+git1")
        assert reason() == "needs Triton 3.6 or newer, found 3.2.0+git1"
        patch.setitem(sys.modules, "triton", None)
        assert reason() == "Triton is not installed (pip install triton)"
    assert reason() is None
