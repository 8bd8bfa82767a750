"""The Triton back end at its border (batch.py), interpreted, against a float64 restatement."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)

import restatement

from apollo_kernels import philox
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals
from apollo_kernels.triton_kernels import sparse, step, table

# NumPy's warnings, of overflows on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


# ---- the restatement -----------------------------------------------------------------------------


def hyper(**options):
    defaults = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.1, correct_bias=True)
    return Hyper(**{**defaults, "maximize": False, "distribution": "rademacher", **options})


def adam(state, r, h):
    """M, V and N after R, in float64. An entry keeps M and V where R^2 overflows float32."""
    m, v = state.exp_avg.double(), state.exp_avg_sq.double()
    good = (r**2).float().isfinite()
    m = torch.where(good, h.betas[0] * m + (1 - h.betas[0]) * r, m)
    v = torch.where(good, h.betas[1] * v + (1 - h.betas[1]) * r**2, v)
    denominator = v.sqrt() + h.eps
    n = torch.where(denominator == 0, 0.0, m / denominator)
    return m, v, n, good


def rate(h, t):
    c1, c2 = 1 - h.betas[0] ** t, 1 - h.betas[1] ** t
    return float(h.lr) * (math.sqrt(c2) / c1 if h.correct_bias else 1.0)


def restated(item, h, factor=1.0):
    """What a step makes of a low-rank item: weight, exp_avg, exp_avg_sq, update_norm in float64,
    and t. ``factor``: clip / grad_scale."""
    t = int(item.step) + 1
    g = (-1.0 if h.maximize else 1.0) * factor * item.grad.double()
    x = g if item.rows else g.t()
    rank = item.exp_avg.shape[1]
    epoch = (t - 1) // h.update_proj_gap % 2**32
    z = philox.draw(item.key, epoch, rank, x.shape[1], h.distribution).double()
    r = x @ z.t() / (1 if h.distribution == "sparse" else math.sqrt(max(rank, 1)))
    m, v, n, _ = adam(item, r, h)
    dim = (1,) if h.scale_type == "channel" else (0, 1)
    s = n.pow(2).sum(dim, keepdim=True).sqrt() / (r.pow(2).sum(dim, keepdim=True).sqrt() + 1e-8)
    update = s * x
    alpha = math.sqrt(h.scale)
    u = float(update.norm()) * (alpha if h.scale_front else 1.0)
    previous = float(item.update_norm)
    shrink = 1.0 if previous < 1e-8 else 1 / max(u / (previous + 1e-8) / 1.01, 1.0)
    if h.disable_nl:
        shrink, norm = 1.0, previous
    else:
        norm = u * shrink
    update = rate(h, t) * alpha * shrink * (update if item.rows else update.t())
    w = (1 - float(h.lr) * h.weight_decay) * item.weight.double() - update
    return dict(weight=w, exp_avg=m, exp_avg_sq=v, update_norm=torch.tensor(norm).double()), t


def restated_dense(item, h, factor=1.0):
    t = int(item.step) + 1
    g = (-1.0 if h.maximize else 1.0) * factor * item.grad.double()
    m, v, n, good = adam(item, g, h)
    w = item.weight.double()
    new = (1 - float(h.lr) * h.weight_decay) * w - rate(h, t) * n
    return dict(weight=torch.where(good, new, w), exp_avg=m, exp_avg_sq=v), t


def low_rank(w, g, rows, rank, key=12345, t=3, **state):
    """A parameter in mid-run: moments, a limiter's norm and a step count."""
    channels, k = w.shape if rows else w.shape[::-1]
    m = torch.randn(channels, min(rank, k))
    v = 0.5 + torch.rand(m.shape)
    norm = torch.tensor(0.9 * float(g.double().norm()), dtype=torch.float32)
    values = dict(exp_avg=m, exp_avg_sq=v, update_norm=norm, step=torch.tensor(t))
    return LowRank(weight=w, grad=g, key=key, rows=rows, **{**values, **state})


def dense(w, g, t=3, **state):
    m, v = torch.randn(w.shape), torch.rand(w.shape) + 0.5
    values = dict(exp_avg=m, exp_avg_sq=v, step=torch.tensor(t))
    return Dense(weight=w, grad=g, **{**values, **state})


def data(shape, dtype=torch.float32, g_dtype=None):
    return torch.randn(shape).to(dtype), torch.randn(shape).to(g_dtype or dtype)


def signals(**given):
    given = {k: torch.tensor(v, dtype=torch.float32) for k, v in given.items()}
    return Signals(torch.zeros(3, dtype=torch.int64), **given)


def take(batch, h, s):
    """One step of a batch of either sort."""
    if isinstance(batch, step.DenseBatch):
        return batch.adamw(h, s)
    batch.project(h, s)
    batch.scale(h, s)
    return batch.apply(h, s)


def check(item, expected, rtol=1e-5):
    """Every tensor of ``item``: to rtol of its largest change, and to a rounding of its own."""
    values, t = expected
    assert int(item.step) == t
    for name, right in values.items():
        mine = getattr(item, name)
        eps = torch.finfo(mine.dtype).eps
        if right.numel():
            size = right.abs().max()
            error = (mine.double() - right).abs().max()
            allowed = (eps if mine.dtype != torch.float32 else 0) * size + rtol * size
            assert error <= allowed, (name, float(error), float(allowed))


def tensors(items):
    return [t for i in items for t in vars(i).values() if isinstance(t, torch.Tensor)]


def snapshot(items):
    return [t.clone() for t in tensors(items)]


# ---- low-rank matrices ---------------------------------------------------------------------------


KINDS = [
    (torch.float32, "channel", False),
    (torch.float32, "tensor", True),
    (torch.bfloat16, "tensor", False),
    (torch.bfloat16, "channel", True),
    (torch.float16, "channel", False),
    (torch.float16, "tensor", True),
]


@pytest.mark.parametrize("dtype, scale_type, separate", KINDS, ids=str)
def test_a_step_of_every_rank_and_orientation(dtype, scale_type, separate):
    """One batch holds them all. The last matrix is cut along its contracted side."""
    h = hyper(scale_type=scale_type, scale=2.0, maximize=separate, scale_front=separate)
    shapes = [(1, 9, 40), (3, 40, 9), (8, 16, 48), (130, 5, 135), (1, 2, 2100)]
    items = [
        low_rank(*data((channels, k) if rows else (k, channels), dtype), rows, rank, key=rank + 7)
        for rank, channels, k in shapes
        for rows in ((True, False) if k < 100 else (separate,))
    ]
    expected = [restated(item, h) for item in items]
    s = signals()
    take(step.build(items, separate=separate), h, s)
    for item, right in zip(items, expected, strict=True):
        check(item, right, rtol=3e-5)
    assert s.counters.tolist()[0::2] == [len(items), 0]


def test_normals_agree_but_for_roundings_of_z():
    items = [low_rank(*data((9, 140)), True, rank) for rank in (8, 130)]
    h = hyper(distribution="gaussian", scale_type="tensor")
    expected = [restated(item, h) for item in items]
    take(step.build(items, separate=False), h, signals())
    for item, right in zip(items, expected, strict=True):
        check(item, right, rtol=4e-3)


def test_the_limiter_s_counter_and_switches():
    for h in (hyper(disable_nl=True), hyper(correct_bias=False), hyper(weight_decay=0.0)):
        items = [low_rank(*data((12, 6)), True, 4, update_norm=torch.tensor(n)) for n in (0.0, 0.1)]
        expected = [restated(item, h) for item in items]
        s = signals()
        take(step.build(items, separate=False), h, s)
        for item, right in zip(items, expected, strict=True):
            check(item, right)
        assert s.counters.tolist() == [2, 0 if h.disable_nl else 1, 0]


def test_clip_and_grad_scale_act_on_r_and_q_and_the_step():
    h = hyper(scale_type="channel")
    items = [low_rank(*data((12, 20)), rows, 4) for rows in (True, False)]
    for item in items:
        item.grad.mul_(1024)
    batch, s = step.build(items, separate=True), signals(grad_scale=1024.0, clip=0.3)
    expected = [restated(item, h, 0.3 / 1024) for item in items]
    batch.project(h, s)
    norm = sum(item.grad.double().pow(2).sum() for item in items)
    assert batch.square_norm().dtype == torch.float64
    torch.testing.assert_close(batch.square_norm(), norm, rtol=1e-6, atol=0)
    batch.scale(h, s)
    batch.apply(h, s)
    for item, right in zip(items, expected, strict=True):
        check(item, right)


def test_a_small_clip_does_not_underflow():
    """clip^2 would be 0 in float32, q clip^2 is not."""
    h = hyper(scale_type="tensor", weight_decay=0.0)
    item = low_rank(torch.randn(6, 20), torch.randn(6, 20) * 2e17, True, 4)
    expected = restated(item, h, 1e-23)
    take(step.build([item], separate=True), h, signals(clip=1e-23))
    check(item, expected)


def test_clip_after_a_fused_projection_is_refused():
    item = low_rank(*data((4, 6)), True, 2)
    batch = step.build([item], separate=False)
    batch.project(hyper(), signals())
    with pytest.raises(AssertionError, match="without clip"):
        batch.scale(hyper(), signals(clip=0.5))


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_found_inf_writes_nothing(separate):
    items = [low_rank(*data(shape), True, 1) for shape in ((4, 6), (3, 2100), (0, 5))]
    before, s = snapshot(items), signals(grad_scale=2.0, found_inf=1.0)
    batch = step.build(items, separate=separate)
    take(batch, hyper(), s)
    take(batch, hyper(stochastic_rounding=True), s)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(items), before, strict=True))
    assert s.counters.tolist() == [0, 0, 0]
    if separate:  # the norm of the gradients is true all the same
        norm = sum(item.grad.double().pow(2).sum() for item in items)
        torch.testing.assert_close(batch.square_norm(), norm, rtol=1e-6, atol=0)
    take(batch, hyper(), signals(found_inf=0.0))
    assert [int(item.step) for item in items] == [4, 4, 4]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_clip_or_gradient_that_is_not_finite_changes_the_step_alone(bad):
    items = [low_rank(*data((4, 6)), True, 2), low_rank(*data((6, 4)), False, 2)]
    given = dict(clip=bad) if bad != bad else {}
    if not given:
        for item in items:
            item.grad.fill_(bad)
    before, s = snapshot(items), signals(**given)
    take(step.build(items, separate=True), hyper(), s)
    for item in items:
        assert int(item.step) == 4
        item.step.fill_(3)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(items), before, strict=True))
    assert s.counters.tolist() == [0, 0, 2]


@pytest.mark.parametrize("leader", [0, 2])
@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_expert_matrices_share_a_step_that_one_of_them_advances(separate, leader):
    h = hyper(update_proj_gap=1, stochastic_rounding=True)
    weight, grad = data((3, 8, 12), torch.bfloat16)
    first = low_rank(weight[0], grad[0], True, 4)
    items = [
        low_rank(weight[e], grad[e], True, 4, key=90 + e, step=first.step, leads=e == leader)
        for e in range(3)
    ]
    items.append(
        low_rank(torch.ones(0, 5), torch.ones(0, 5), True, 2, step=first.step, leads=False)
    )
    twins = [low_rank(i.weight.clone(), i.grad, True, 4, key=i.key) for i in items[:3]]
    for i, twin in zip(items, twins, strict=False):
        for name in ("exp_avg", "exp_avg_sq", "update_norm"):
            getattr(twin, name).copy_(getattr(i, name))
    batch = step.build(items, separate=separate)
    for t in (4, 5):
        s = signals()
        take(batch, h, s)
        assert int(first.step) == t and s.counters.tolist()[0] == 4
    followers = [LowRank(**{**vars(i), "leads": False}) for i in items]
    saved = snapshot(items)
    take(step.build(followers, separate=separate), h, signals())
    assert int(first.step) == 5  # nobody led
    for t, before in zip(tensors(items), saved, strict=True):
        t.copy_(before)
    for twin in twins:  # each alone, with a step of its own: the same bits
        alone = step.build([twin], separate=separate)
        take(alone, h, signals())
        take(alone, h, signals())
    for i, twin in zip(items, twins, strict=False):
        for name in ("weight", "exp_avg", "exp_avg_sq", "update_norm"):
            assert torch.equal(getattr(i, name), getattr(twin, name)), name


# ---- the sparse projection -----------------------------------------------------------------------


def identity(k, dtype, vectors):
    """An identity as a gradient, so that R^T is P; ``vectors``: in a layout of 16-byte loads."""
    return torch.zeros(k, k if vectors else k + 1, dtype=dtype)[:, :k].fill_diagonal_(1)


# (rank, K): several blocks per turn of a loop and one, both forms of h, more than 16 blocks, tails
# of blocks and of K, two tiles of rank rows, and ranks of K.
PLACES = [(1, 48), (3, 40), (8, 144), (20, 90), (64, 144), (130, 140), (264, 272), (48, 48), (9, 9)]


@pytest.mark.parametrize(
    "dtype, k_unit",
    [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=["float32 rows", "bfloat16 rows", "float16 columns"],
)
def test_an_identity_shows_every_place_and_sign(dtype, k_unit):
    """With beta1 = 0, M is R, bit for bit."""
    h = hyper(distribution="sparse", betas=(0.0, 0.999), update_proj_gap=2)
    items = []
    for rank, k in PLACES:
        g = identity(k, dtype, vectors=k % 16 == 0 and rank != 48)
        moments = {name: torch.zeros(k, min(rank, k)) for name in ("exp_avg", "exp_avg_sq")}
        w = torch.zeros(k, k)
        items.append(low_rank(w, g if k_unit else g.t(), True, rank, 2**62 + rank, t=7, **moments))
    take(step.build(items, separate=k_unit), h, signals())
    for item in items:
        k, rank = item.exp_avg.shape
        p = restatement.projection(item.key, 3, rank, k, "sparse")
        assert torch.equal(item.exp_avg.double(), torch.from_numpy(p).t()), (rank, k)


# The K of each rank.
SPARSE = {1: 40, 3: 40, 8: 48, 20: 105, 130: 279, 9: 7, 64: 2067, 16: 144, 256: 272}


@pytest.mark.parametrize(
    "dtype, separate",
    [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)],
    ids=["float32 fused", "bfloat16 separate", "float16 separate"],
)
def test_a_sparse_step_of_every_rank_and_orientation(dtype, separate):
    """Ranks beside those of the tiles, a ragged and a clamped K, tails of channels, and a K that is
    cut. Where K is a multiple of 16, gradients are read in vectors."""
    h = hyper(
        distribution="sparse", scale_type="tensor" if separate else "channel", maximize=separate
    )
    items = []
    for rank, k in SPARSE.items():
        channels = 16 if k % 16 == 0 else 3 if k > 1000 else 21
        for shape in ((channels, k), (k, channels)):
            items.append(low_rank(*data(shape, dtype), shape[1] == k, rank, key=rank + 7))
    given = dict(clip=0.3, grad_scale=4.0) if separate else dict(grad_scale=4.0)
    expected = [restated(item, h, given.get("clip", 1.0) / 4) for item in items]
    batch, s = step.build(items, separate=separate), signals(**given)
    batch.project(h, s)
    if separate:
        norm = sum(item.grad.double().pow(2).sum() for item in items)
        torch.testing.assert_close(batch.square_norm(), norm, rtol=1e-6, atol=0)
    batch.scale(h, s)
    batch.apply(h, s)
    for item, right in zip(items, expected, strict=True):
        check(item, right)
    assert s.counters.tolist()[0::2] == [len(items), 0]


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("rank", [1, 20, 64])
def test_neither_dtype_nor_address_decides_where_a_sparse_projection_cuts_k(rank, rows):
    def cut(dtype, offset):
        g = torch.zeros(512 * 8192 + 64, dtype=dtype)[offset : offset + 512 * 8192]
        g = g.view(512, 8192) if rows else g.view(8192, 512)
        layout = table.layout(low_rank(g, g, rows, rank))
        return sparse.split(layout, sparse.choose(layout, False), layout.k)

    cuts = {cut(dtype, offset) for dtype in DTYPES for offset in (0, 1)}
    assert len(cuts) == 1 and cuts.pop()[1] > 1


def test_one_batch_takes_every_distribution_in_turn():
    """Hyper decides at each step; maps and workspace are there for both kinds, which cut the first
    matrix otherwise."""
    items = [low_rank(*data((140, 12)), False, 130), low_rank(*data((3, 2100)), True, 1)]
    batch = step.build(items, separate=True)
    norm = sum(item.grad.double().pow(2).sum() for item in items)
    for distribution in ("sparse", "rademacher", "sparse"):
        h = hyper(distribution=distribution)
        expected = [restated(item, h) for item in items]
        take(batch, h, signals())
        for item, right in zip(items, expected, strict=True):
            check(item, right)
        torch.testing.assert_close(batch.square_norm(), norm, rtol=1e-6, atol=0)


STRIDES = {  # of a gradient [1, n]; the first one belongs to a side of size 1 and means nothing
    "0": (0, 1),
    "2": (2, 1),
    "n": (40, 1),
    "every second": (7, 2),
    "one for all": (5, 0),
}


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
def test_the_stride_of_a_side_of_size_one_means_nothing(strides, rows):
    n, h = 48, hyper()
    size = (n - 1) * strides[1] + 1
    storage = torch.full((128,), NAN)
    storage[3 : 3 + size] = torch.randn(size)
    if strides[1] == 2:
        storage[4 : 3 + size : 2] = NAN
    for transposed in (False, True):
        g = storage.as_strided((1, n), strides, 3)
        g = g.t() if transposed else g
        items = [low_rank(torch.randn(g.shape), g, rows, 4)]
        expected = [restated(item, h) for item in items]
        take(step.build(items, separate=False), h, signals())
        check(items[0], expected[0])


@pytest.mark.parametrize("strides", [(0, 3), (3, 0), (7, 2), (1, 1)])
def test_empty_matrices_step_whatever_their_strides(strides):
    shapes = [(0, 5), (5, 0), (0, 0), (0, 1), (1, 0)]
    empty = [torch.ones(4).as_strided(shape, strides) for shape in shapes]
    items = [low_rank(t, t.clone().as_strided(t.shape, strides), True, 4) for t in empty]
    items += [low_rank(t, t, False, 4) for t in empty]
    for separate in (False, True):
        batch, s = step.build(items, separate=separate), signals()
        take(batch, hyper(scale_type="tensor"), s)
        assert s.counters.tolist() == [10, 0, 0]
    assert batch.square_norm() == 0 and {int(item.step) for item in items} == {5}


def test_a_matrix_without_a_contiguous_side_is_refused():
    w, g = data((6, 8))
    with pytest.raises(ValueError, match=r"neither side of a matrix \[3, 4\] has stride 1"):
        step.build([low_rank(w[:3, :4], g[::2, ::2], True, 2)], separate=False)


def aligned(numbers, offset):
    """A tensor of these numbers, ``offset`` elements after a multiple of 64 bytes."""
    storage = torch.zeros(numbers.numel() + 64)
    begin = (-storage.data_ptr() // 4) % 16 + offset
    return storage[begin : begin + numbers.numel()].view(numbers.shape).copy_(numbers)


@pytest.mark.parametrize("sort", ["low-rank", "dense"])
def test_gradients_move(sort):
    """A new table for an address that is aligned as before; False, and nothing done, for others."""
    h = hyper()
    g = [torch.randn(16, 32) for _ in range(3)]
    w = aligned(torch.randn(16, 32), 0)
    moments = {name: aligned(torch.rand(16, 32), 0) for name in ("exp_avg", "exp_avg_sq")}
    if sort == "dense":
        item, restate = dense(w, aligned(g[0], 0), **moments), restated_dense
        batch = step.build_dense([item])
    else:
        item, restate = low_rank(w, aligned(g[0], 0), True, 4), restated
        batch = step.build([item], separate=False)
    old_table = batch._table.tensor.clone()
    moved = type(item)(**{**vars(item), "grad": aligned(g[1], 4)})
    assert batch.set_gradients([moved.grad.data_ptr()]) is True
    # A low-rank matrix has a row for a dense projection and one for a sparse one.
    assert int((batch._table.tensor != old_table).sum()) == (1 if sort == "dense" else 2)
    expected = restate(moved, h)
    take(batch, h, signals())
    check(item, expected)
    away = aligned(g[2], 1)
    assert batch.set_gradients([away.data_ptr()]) is False
    expected = restate(moved, h)
    take(batch, h, signals())
    check(item, expected)


def test_a_gradient_that_is_read_by_elements_may_move_anywhere():
    item = low_rank(*data((5, 7)), True, 4)
    batch, h = step.build([item], separate=False), hyper()
    moved = LowRank(**{**vars(item), "grad": aligned(torch.randn(5, 7), 3)})
    assert batch.set_gradients([moved.grad.data_ptr()]) is True
    expected = restated(moved, h)
    take(batch, h, signals())
    check(item, expected)


def test_a_captured_table_stays_as_it_is():
    """A CUDA graph would read it; here the mark alone is set, which a capture leaves."""
    item, other = low_rank(*data((5, 7)), True, 4), dense(*data((5,)))
    for batch, grad in (
        (step.build([item], separate=False), item.grad),
        (step.build_dense([other]), other.grad),
    ):
        assert batch.set_gradients([grad.data_ptr()]) is True
        batch._captured = True
        assert batch.set_gradients([grad.data_ptr()]) is False


# ---- numbers at the border -----------------------------------------------------------------------


def test_without_eps_n_is_zero_where_nothing_was_ever_seen():
    zero = dict(exp_avg=torch.zeros(6, 2), exp_avg_sq=torch.zeros(6, 2))
    w = torch.randn(6, 8)
    item = low_rank(w.clone(), torch.zeros(6, 8), True, 2, **zero, update_norm=torch.tensor(0.0))
    flat = dense(
        w.clone(), torch.zeros(6, 8), exp_avg=torch.zeros(6, 8), exp_avg_sq=torch.zeros(6, 8)
    )
    h = hyper(eps=0.0)
    take(step.build([item], separate=False), h, signals())
    take(step.build_dense([flat]), h, signals())
    for one in (item, flat):
        torch.testing.assert_close(one.weight, w * (1 - 1e-3))
        assert not one.exp_avg.any() and not one.exp_avg_sq.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_chance", [False, True])
def test_an_infinite_weight_stays_infinite(dtype, by_chance):
    h = hyper(weight_decay=0.5, stochastic_rounding=by_chance)
    for make in (dense, lambda w, g: low_rank(w, g, True, 2)):
        w, g = data((5, 8), dtype)
        w[1, 2], w[3, 4] = INF, -INF
        item = make(w, g)
        batch = step.build_dense if isinstance(item, Dense) else step.build
        options = {} if isinstance(item, Dense) else dict(separate=False)
        take(batch([item], **options), h, signals())
        assert w[1, 2] == INF and w[3, 4] == -INF and int(w.isfinite().sum()) == 38


@pytest.mark.parametrize(
    "lr, decay", [(1e-3, 1e-4), (0.0, 0.1), (1e-3, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)]
)
def test_decay_is_one_rounding_away_from_exact(lr, decay):
    """A decay of 1e-7 is not lost, none leaves every bit, and more than 1 turns the sign."""
    w = torch.randn(40, 50)
    items = [
        low_rank(w.clone(), torch.zeros(40, 50), True, 2),
        dense(w.clone(), torch.zeros(40, 50)),
    ]
    for item in items:
        item.exp_avg.zero_()
    h = hyper(lr=lr, weight_decay=decay)
    take(step.build(items[:1], separate=False), h, signals())
    take(step.build_dense(items[1:]), h, signals())
    right = (1 - lr * decay) * w.double()
    near = right.float().abs()
    ulp = torch.nextafter(near, torch.tensor(INF)) - near
    for item in items:
        assert ((item.weight.double() - right).abs() <= 0.5001 * ulp).all()
        assert lr * decay or torch.equal(item.weight, w)


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_moments_forget_at_once_with_beta_zero(separate):
    h = hyper(betas=(0.0, 0.0))
    huge = dict(exp_avg=torch.full((6, 4), 1e18), exp_avg_sq=torch.full((6, 4), 1e36))
    item = low_rank(*data((6, 8)), True, 4, **huge)
    flat = dense(*data((24,)), exp_avg=torch.full((24,), 1e18), exp_avg_sq=torch.full((24,), 1e36))
    expected = restated(item, h), restated_dense(flat, h)
    take(step.build([item], separate=separate), h, signals())
    take(step.build_dense([flat]), h, signals())
    check(item, expected[0])
    check(flat, expected[1], rtol=1e-6)


@pytest.mark.parametrize("separate", [False, True], ids=["fused", "separate"])
def test_tensor_scaling_takes_gradients_of_2e18(separate):
    """|R|^2 and |G|^2 of the whole matrix overflow float32, their products with s^2 do not."""
    h = hyper(scale_type="tensor", weight_decay=0.0)
    for rank in (1, 8):
        g = 2e18 * (2.0 * (torch.rand(64, 7) < 0.5) - 1)  # |R| is 2e18 to 7 * 2e18: its square fits
        item = low_rank(torch.randn(64, 7), g, True, rank)
        expected, s = restated(item, h), signals()
        take(step.build([item], separate=separate), h, s)
        check(item, expected)
        assert s.counters.tolist()[0] == 1


def test_squares_of_a_channel_beyond_float32_leave_the_weights():
    """R is small, since the gradient is nearly orthogonal to z: q alone says it."""
    h = hyper(scale_type="tensor")
    z = philox.draw(12345, 0, 1, 25, h.distribution).float()
    g = 5e18 * (z * (1 - 2 * (torch.arange(25) % 2))).expand(3, 25).contiguous()
    item = low_rank(torch.randn(3, 25), g, True, 1)
    before, s = item.weight.clone(), signals()
    take(step.build([item], separate=False), h, s)
    assert torch.equal(item.weight, before) and s.counters.tolist() == [0, 0, 1]
    torch.testing.assert_close(item.exp_avg_sq, torch.full((3, 1), 2.5e34), rtol=1e-2, atol=0)


def test_an_entry_whose_square_overflows_keeps_its_moments():
    h = hyper()
    item = low_rank(torch.randn(5, 1), torch.randn(5, 1), True, 1)
    item.grad[2] = 1e20
    flat, scalar = dense(*data((9,))), dense(*data(()))
    flat.grad[4], scalar.grad[()] = -1e20, 1e20
    expected = restated(item, h)[0], restated_dense(flat, h), restated_dense(scalar, h)
    w, s = item.weight.clone(), signals()
    take(step.build([item], separate=False), h, s)
    assert torch.equal(item.weight, w)  # one bad channel: the whole matrix waits
    for name in ("exp_avg", "exp_avg_sq"):
        right = expected[0][name].float()
        torch.testing.assert_close(getattr(item, name), right, rtol=1e-6, atol=0)
    take(step.build_dense([flat, scalar]), h, s)
    check(flat, expected[1], rtol=1e-6)
    check(scalar, expected[2], rtol=1e-6)
    assert s.counters.tolist() == [0, 0, 3]


@pytest.mark.parametrize("t", [2**24 + 5, 2**33 + 5])
def test_steps_beyond_two_to_the_24_count_on(t):
    """The random words take the step's low 32 bits."""
    h = hyper(update_proj_gap=1, correct_bias=False, stochastic_rounding=True)
    items = [low_rank(*data((6, 8), torch.bfloat16), True, 4, t=t)]
    low = {**vars(items[0]), "weight": items[0].weight.clone(), "step": torch.tensor(t % 2**32)}
    for name in ("exp_avg", "exp_avg_sq", "update_norm"):
        low[name] = low[name].clone()
    twin = LowRank(**low)
    take(step.build(items, separate=False), h, signals())
    take(step.build([twin], separate=False), h, signals())
    assert int(items[0].step) == t + 1 and torch.equal(items[0].weight, twin.weight)
    flat = dense(*data((5,)), t=t)
    expected = restated_dense(flat, h)
    take(step.build_dense([flat]), h, signals())
    check(flat, expected, rtol=1e-6)


# ---- dense parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dense_rule_is_the_low_rank_one_without_a_projection(dtype, correct_bias):
    h = hyper(eps=1e-2, correct_bias=correct_bias, maximize=correct_bias)
    shapes = [(), (1,), (7,), (16, 3), (0,), (4100,)]
    items = [dense(*data(shape, dtype, torch.float32), t=0) for shape in shapes]
    for item in items:
        item.grad.mul_(8)
    expected, s = (
        [restated_dense(item, h, 0.25 / 8) for item in items],
        signals(clip=0.25, grad_scale=8.0),
    )
    take(step.build_dense(items), h, s)
    for item, right in zip(items, expected, strict=True):
        check(item, right, rtol=2e-6)
    assert s.counters.tolist() == [6, 0, 0]


def test_dense_parameters_heed_found_inf_and_a_bad_clip():
    items = [dense(*data((9,))), dense(*data((4,)))]
    batch, before = step.build_dense(items), snapshot(items)
    take(batch, hyper(), signals(found_inf=1.0))
    assert all(torch.equal(a, b) for a, b in zip(snapshot(items), before, strict=True))
    s = signals(clip=NAN)
    take(batch, hyper(), s)
    assert [int(item.step) for item in items] == [4, 4] and s.counters.tolist() == [0, 0, 2]
    for item in items:
        item.step.fill_(3)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(items), before, strict=True))


# ---- the module ----------------------------------------------------------------------------------


def test_what_the_kernels_take():
    matrix = low_rank(*data((4, 6)), True, 2)
    assert step.SAME_ORDER is False and step.takes(matrix) and step.takes(dense(*data(())))
    mixed = low_rank(*data((4, 6), torch.bfloat16, torch.float16), False, 2)
    assert step.takes(mixed) and step.family(mixed) == step.family(matrix)
    double = torch.float64
    assert not step.takes(low_rank(*data((4, 6), double, torch.float32), True, 2))
    assert not step.takes(dense(*data((4, 6), torch.float32, double)))
    long = torch.zeros(1).expand(2**31)
    assert not step.takes(Dense(long, long, long, long, torch.tensor(0)))


def test_defaults_of_dtype_and_device_do_not_matter():
    h, results = hyper(), []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "meta")):
        torch.manual_seed(0)
        items, flat = [low_rank(*data((6, 2100)), True, 1)], dense(*data((9,)))
        s = signals()
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            take(step.build(items, separate=False), h, s)
            batch = step.build_dense([flat])
            batch.set_gradients([flat.grad.data_ptr()])
            take(batch, h, s)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        results.append([items[0].weight, flat.weight])
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))
