"""cuda.py's batches, driven verb by verb on the emulated device, against a float64 restatement.

Signs are drawn (rademacher) wherever numbers are compared: the device's fast normals may be bf16's
other neighbour in one entry of 1000.
"""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import emulated
import pytest
import torch

from apollo_kernels import cuda, int8, moments, philox, reference
from apollo_kernels.batch import Dense, Hyper, LowRank, Signals

REASON = emulated.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8 = torch.uint8  # codes


@pytest.fixture(scope="module")
def module():
    return emulated.load(emulated.build())


@pytest.fixture(autouse=True)
def _device(module):
    torch.manual_seed(0)
    with emulated.device(module):
        yield


def hyper(**changes):
    options = dict(
        lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, correct_bias=True, maximize=False,
        distribution="rademacher", update_proj_gap=2,
    )  # fmt: skip
    return Hyper(**{**options, **changes})


def signals(**changes):
    values = {k: v if v is None else torch.tensor(v, dtype=F32) for k, v in changes.items()}
    return Signals(torch.zeros(3, dtype=torch.int64), **values)


def low_rank(shape, rank, rows=None, weight=F32, grad=F32, key=7, order="rows", step=None, **more):
    """A matrix with random weight and gradient; the gradient may be given."""
    rows = shape[0] >= shape[1] if rows is None else rows
    channels, k = shape if rows else shape[::-1]
    rank = min(rank, k)
    gradient = more.pop("gradient", None)
    if gradient is None:
        gradient = torch.randn(shape).to(grad)
    w = torch.randn(shape).to(weight)
    if order == "columns":
        w, gradient = w.t().contiguous().t(), gradient.t().contiguous().t()
    if order == "sliced":
        whole = [torch.full((shape[0] + 2, shape[1] + 9), math.nan).to(t.dtype) for t in (w, w)]
        w = whole[0][1:-1, 3:-6].copy_(w)
        whole[1] = whole[1].to(gradient.dtype)
        gradient = whole[1][1:-1, 4:-5].copy_(gradient)
    step = torch.zeros((), dtype=torch.int64) if step is None else step
    moments = torch.zeros(channels, rank), torch.zeros(channels, rank)
    return LowRank(w, gradient, *moments, torch.zeros(()), step, key, rows, **more)


def clone(item):
    """Copies of all tensors, in the same strides."""
    tensors = {
        f.name: getattr(item, f.name).clone(memory_format=torch.preserve_format)
        for f in dataclasses.fields(item)
        if isinstance(getattr(item, f.name), torch.Tensor) and f.name != "grad"
    }
    if getattr(item, "units", None) is not None:
        tensors["units"] = tuple(unit.clone() for unit in item.units)
    return dataclasses.replace(item, **tensors)


def batches(items, separate):
    families = {}
    for item in items:
        assert cuda.takes(item)
        families.setdefault(cuda.family(item), []).append(item)
    return [cuda.build(group, separate=separate) for group in families.values()]


def step(items, h=None, s=None, separate=False):
    """One step as plan.py takes it; ``s`` without clip until ``project`` is through."""
    h, s = h or hyper(), s or signals()
    made = batches(items, separate)
    for batch in made:
        batch.project(h, dataclasses.replace(s, clip=None))
    for batch in made:
        batch.scale(h, s)
    for batch in made:
        batch.apply(h, s)
    return s.counters.tolist()


class Restated:
    """One low-rank matrix in float64, from the formulas of DESIGN.md."""

    def __init__(self, item):
        self.item = item
        self.w, self.m, self.v = (t.double() for t in (item.weight, item.exp_avg, item.exp_avg_sq))
        self.norm, self.t = float(item.update_norm), int(item.step)
        self.slack, self.norm_slack = torch.zeros(()), 0.0

    def step(self, h, s):
        item, (b1, b2) = self.item, h.betas
        g = item.grad.double()
        x = g if item.rows else g.t()
        factor = (-1 if h.maximize else 1) * (1 if s.clip is None else float(s.clip))
        factor /= 1 if s.grad_scale is None else float(s.grad_scale)
        rank = self.m.shape[1]
        z = philox.draw(item.key, self.t // h.update_proj_gap, rank, x.shape[1], h.distribution)
        self.t += 1
        norm = 1 if h.distribution == "sparse" else math.sqrt(max(rank, 1))
        r, q = x @ z.double().t() / norm * factor, x.square().sum(1) * factor**2
        ok = torch.isfinite((r * r).float())
        self.m = torch.where(ok, b1 * self.m + (1 - b1) * r, self.m)
        self.v = torch.where(ok, b2 * self.v + (1 - b2) * r * r, self.v)
        below = self.v.sqrt() + h.eps
        n = torch.where(below == 0, 0.0, self.m / below)
        dim = None if h.scale_type == "tensor" else 1
        norms = [t.square().sum() if dim is None else t.square().sum(1) for t in (n, r)]
        scale = norms[0].sqrt() / (norms[1].sqrt() + 1e-8)
        u2 = (scale**2 * q).sum()
        if not torch.isfinite(u2.float()):
            return
        alpha = math.sqrt(h.scale)
        u = math.sqrt(u2) * (alpha if h.scale_front else 1)
        limit = 1.0
        if not h.disable_nl:
            if self.norm >= 1e-8:
                limit = 1 / max(u / (self.norm + 1e-8) / 1.01, 1)
            self.norm = u * limit
        size = float(h.lr)
        if h.correct_bias:
            size *= math.sqrt(1 - b2**self.t) / (1 - b1**self.t)
        # A float32 R errs by 2^-21 of its largest entry, so s = |N| / |R| by that over |R|; and by
        # what N makes of it, which is more where R is about eps. 2^-17: moments err, too.
        largest = r.abs().max() if r.numel() else 0
        slope = (1 - b1 + n.abs() * (1 - b2) * r.abs() / self.v.sqrt().clamp(min=1e-30)) / below
        slope = torch.where(below == 0, 0.0, n * slope).abs()
        tilt = (slope.sum() if dim is None else slope.sum(1)) / norms[0].clamp(min=1e-30)
        condition = largest * (2**-17 / norms[1].sqrt().clamp(min=1e-30) + 2**-21 * tilt)
        self.norm_slack += 2 * alpha * float((scale**2 * q * condition**2).sum().sqrt())
        change = size * alpha * limit * factor * (scale if dim is None else scale[:, None]) * x
        keep = 1 - float(h.lr) * h.weight_decay
        self.w = self.w * keep - (change if item.rows else change.t())
        slack = change.abs() * (condition if dim is None else condition[:, None])
        self.slack = self.slack + (slack if item.rows else slack.t())

    def check(self):
        """Moments err by 2^-20 of their largest entry, weights by their own roundings and s."""
        item = self.item
        assert int(item.step) == self.t
        for found, exact in ((item.exp_avg, self.m), (item.exp_avg_sq, self.v)):
            if exact.numel():
                assert (found.double() - exact).abs().max() <= 2**-19 * exact.abs().max()
        assert abs(float(item.update_norm) - self.norm) <= self.norm_slack + 2**-20 * self.norm
        if self.w.numel():
            eps = torch.finfo(item.weight.dtype).eps
            error = (item.weight.double() - self.w).abs()
            assert (error <= 4 * eps * self.w.abs() + 2**-22 + eps * 0.1 + self.slack).all()


def compare(items, h=None, s=None, separate=False, steps=1):
    h, s = h or hyper(), s or signals()
    restated = [Restated(item) for item in items]
    for _ in range(steps):
        for spec in restated:
            spec.step(h, s)
        step(items, h, s, separate)
    for spec in restated:
        spec.check()
    return s.counters.tolist()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("rows", [True, False])
def test_every_rank_class_and_orientation_takes_the_steps_of_the_restatement(separate, rows):
    items = [
        low_rank((70, 70) if rank > 40 else (70, 40), rank, rows, key=i, order=order)
        for i, (rank, order) in enumerate(itertools.product([1, 3, 6, 8, 65], ["rows", "columns"]))
    ]
    items.append(low_rank((40, 2100) if rows else (2100, 40), 9, rows))  # K is cut
    items.append(low_rank((2, 40), 8, rows))
    assert len({cuda.family(item) for item in items}) == 5
    assert compare(items, separate=separate, steps=2)[::2] == [24, 0]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_every_pair_of_dtypes_takes_the_steps_of_the_restatement(separate, scale_type):
    items = [
        low_rank((33, 24), rank, weight=w, grad=g, order="sliced" if rank == 2 else "rows")
        for w, g in itertools.product([F32, BF16, F16], repeat=2)
        for rank in (2, 8)
    ]
    compare(items, hyper(scale_type=scale_type), separate=separate)


def test_every_switch_takes_the_steps_of_the_restatement():
    h = hyper(
        maximize=True, correct_bias=False, scale=4.0, scale_front=True, disable_nl=True,
        scale_type="tensor", betas=(0.0, 0.9),
    )  # fmt: skip
    compare([low_rank((40, 24), rank) for rank in (1, 8)], h, signals(grad_scale=1024.0), steps=3)


def test_the_limiter_holds_a_sudden_growth():
    item = low_rank((40, 24), 8)
    spec, h, s = Restated(item), hyper(), signals()
    for size in (1.0, 3.0):
        item.exp_avg_sq.mul_(0.01)  # so that the second update is far larger
        spec.v = item.exp_avg_sq.double()
        item.grad.mul_(size)
        spec.step(h, s)
        step([item], h, s)
    spec.check()
    assert s.counters.tolist() == [2, 1, 0]


def test_separate_moments_are_the_fused_ones_bit_for_bit():
    items = [low_rank((70, 40), rank, key=rank) for rank in (8, 65)]
    others = [clone(item) for item in items]
    for _ in range(2):
        step(items, separate=False)
        step(others, separate=True)
    for a, b in zip(items, others, strict=True):
        assert torch.equal(a.exp_avg, b.exp_avg)
        assert torch.equal(a.exp_avg_sq, b.exp_avg_sq)
        torch.testing.assert_close(a.weight, b.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 8])
def test_clip_multiplies_r_and_q_and_the_step(rank):
    items = [low_rank((70, 40), rank), low_rank((40, 90), rank)]
    s = signals(clip=0.25, grad_scale=8.0)
    compare(items, s=s, separate=True, steps=2)


def test_a_clip_that_is_no_number_leaves_everything_but_the_step():
    item, dense = low_rank((40, 24), 8), dense_item(50)
    before, dense_before = clone(item), clone(dense)
    s = signals(clip=math.nan)
    step([item], hyper(), s, separate=True)
    cuda.build_dense([dense]).adamw(hyper(), s)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(item, name), getattr(before, name))
        assert torch.equal(getattr(dense, name), getattr(dense_before, name))
    assert torch.equal(item.update_norm, before.update_norm)
    assert int(item.step) == int(dense.step) == 1
    assert s.counters.tolist() == [0, 0, 2]


def test_clip_is_refused_where_the_moments_are_updated_before_it_is_known():
    with pytest.raises(ValueError, match="clip comes too late"):
        step([low_rank((40, 24), 8)], s=signals(clip=0.5), separate=False)


@pytest.mark.parametrize("rank", [1, 8])
def test_square_norm_is_that_of_the_gradients_as_they_are(rank):
    items = [low_rank((70, 40), rank), low_rank((40, 2100), rank, rows=True), low_rank((3, 0), 1)]
    total = 0.0
    for batch in batches(items, True):
        batch.project(hyper(maximize=True), signals(grad_scale=16.0))
        norm = batch.square_norm()
        assert norm.dtype == torch.float64
        assert norm.shape == ()
        total += float(norm)
    exact = sum(float(item.grad.double().square().sum()) for item in items)
    assert total == pytest.approx(exact, rel=2**-20)


@pytest.mark.parametrize("separate", [False, True])
def test_found_inf_skips_every_write(separate):
    item, dense = low_rank((40, 24), 8), dense_item(50)
    s = signals(found_inf=0.0)
    step([item], hyper(), s, separate)
    before, dense_before = clone(item), clone(dense)
    s.found_inf.fill_(1.0)
    step([item], hyper(), s, separate)
    cuda.build_dense([dense]).adamw(hyper(), s)
    for a, b in ((item, before), (dense, dense_before)):
        for field in dataclasses.fields(a):
            value = getattr(a, field.name)
            assert not isinstance(value, torch.Tensor) or torch.equal(value, getattr(b, field.name))
    assert s.counters.tolist() == [1, 0, 0]


@pytest.mark.parametrize("separate", [False, True])
def test_expert_matrices_share_a_step_that_one_of_them_advances(separate):
    """In any place among them; all are drawn for the same epoch and rounded for the same step."""
    for leader in range(3):
        shared = torch.tensor(3)
        items = [
            low_rank((300, 24), 8, key=i, step=shared, leads=i == leader, weight=BF16)
            for i in range(3)
        ]
        alone = [
            dataclasses.replace(clone(item), step=torch.tensor(3), leads=True) for item in items
        ]
        h = hyper(stochastic_rounding=True)
        counters = step(items, h, separate=separate)
        for item in alone:
            step([item], h, separate=separate)
        assert int(shared) == 4
        assert counters == [3, 0, 0]
        for a, b in zip(items, alone, strict=True):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.exp_avg, b.exp_avg)
    step([item for item in items if not item.leads], h, separate=separate)
    assert int(shared) == 4


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("stride", [0, 1, 2])
@pytest.mark.parametrize("tall", [False, True])
def test_a_vector_shaped_matrix_is_walked_by_the_stride_of_its_long_side(rank, stride, tall):
    """NaN lies wherever the gradient is not; the stride of the side of size 1 means nothing."""
    n = 33
    for odd in (0, 1, 5):
        memory = torch.full((max(stride, 1) * (n - 1) + 1,), math.nan)
        strides = (stride, odd) if tall else (odd, stride)
        shape = (n, 1) if tall else (1, n)
        memory[:: max(stride, 1)] = torch.randn(n) if stride else 0.5
        grad = memory.as_strided(shape, strides)
        for rows in (True, False):
            compare([low_rank(shape, rank, rows, gradient=grad)])


@pytest.mark.parametrize("separate", [False, True])
def test_gradients_that_move_are_followed(separate):
    items = [low_rank((40, 24), 8, key=i) for i in range(2)]
    others = [clone(item) for item in items]
    (batch,) = batches(items, separate)
    moved = [item.grad.clone() for item in items]
    for item in items:
        item.grad.fill_(math.nan)
    workspace, maps = batch.workspace.data_ptr(), batch.maps.data_ptr()
    batch.set_gradients([grad.data_ptr() for grad in moved])
    assert (workspace, maps) == (batch.workspace.data_ptr(), batch.maps.data_ptr())
    h, s = hyper(), signals()
    for verb in (batch.project, batch.scale, batch.apply):
        verb(h, s)
    others = [dataclasses.replace(o, grad=g) for o, g in zip(others, moved, strict=True)]
    step(others, separate=separate)
    for a, b in zip(items, others, strict=True):
        assert torch.equal(a.weight, b.weight)
    with pytest.raises(ValueError, match="got 1 addresses for 2 parameters"):
        batch.set_gradients([0])


@pytest.mark.parametrize("separate", [False, True])
def test_empty_matrices_count_their_steps(separate):
    items = [low_rank(shape, 8) for shape in [(0, 4), (4, 0), (0, 0), (40, 24)]]
    assert compare(items, separate=separate, steps=2)[::2] == [8, 0]


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("separate", [False, True])
def test_without_eps_what_never_had_a_gradient_stays(rank, separate):
    item = low_rank((40, 24), rank)
    item.grad[3:7] = 0
    before = item.weight.clone()
    h = hyper(eps=0.0, weight_decay=0.0)
    compare([item], h, separate=separate)
    assert torch.equal(item.weight[3:7], before[3:7])
    dense = dense_item(50)
    dense.grad[:9] = 0
    kept = dense.weight.clone()
    cuda.build_dense([dense]).adamw(h, signals())
    assert torch.equal(dense.weight[:9], kept[:9])
    assert torch.isfinite(dense.weight).all()


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_infinite_weight_stays_so(dtype, weight_decay):
    h = hyper(weight_decay=weight_decay)
    for order in ("rows", "columns"):
        item, dense = low_rank((40, 24), 8, weight=dtype, order=order), dense_item(50, dtype)
        item.weight[3, 5], item.weight[4, 6], dense.weight[7] = math.inf, -math.inf, math.inf
        step([item], h)
        cuda.build_dense([dense]).adamw(h, signals())
        assert item.weight[3, 5] == math.inf
        assert item.weight[4, 6] == -math.inf
        assert dense.weight[7] == math.inf
        assert int(torch.isfinite(item.weight).sum()) == 40 * 24 - 2
        assert int(torch.isfinite(dense.weight).sum()) == 49


def test_a_small_decay_is_not_lost_and_none_keeps_every_bit():
    """Without a gradient; 1 - 1e-7 is no float32. Every exponent of a weight is tried."""
    for decay, item in itertools.product((0.0, 1e-7), (low_rank((40, 24), 8), dense_item(960))):
        item.grad.zero_()
        weights = torch.randn(960) * 2.0 ** (torch.arange(960) % 250 - 125)
        item.weight.copy_(weights.view_as(item.weight))
        before = item.weight.clone()
        h = hyper(lr=1.0, weight_decay=decay)
        if isinstance(item, LowRank):
            step([item], h)
        else:
            cuda.build_dense([item]).adamw(h, signals())
        exact = before.double() * (1 - decay)
        if decay == 0.0:
            assert torch.equal(item.weight, before)
        else:
            large = before.abs() > 1e-30  # below, the low product is denormal
            error = (item.weight.double() - exact).abs() / before.double().abs()
            assert (error[large] <= 2**-24).all()
            assert (item.weight != before).double().mean() > 0.5


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("separate", [False, True])
def test_a_first_moment_without_memory_forgets_what_was_huge(rank, separate):
    h = hyper(betas=(0.0, 0.999))
    item, dense = low_rank((40, 24), rank), dense_item(50)
    item.exp_avg.fill_(1e18)
    dense.exp_avg.fill_(1e18)
    compare([item], h, separate=separate)
    cuda.build_dense([dense]).adamw(h, signals())
    assert torch.equal(dense.exp_avg, dense.grad)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("rank", [1, 8])
def test_tensor_scaling_adds_squares_beyond_float32(separate, rank):
    """Each |R_c|^2 and q_c fits float32, their sums do not."""
    item = low_rank((300, 16), rank)
    item.grad.clamp_(-1.0, 1.0).mul_(2e18)
    assert item.grad.square().sum() == math.inf
    counters = compare([item], hyper(scale_type="tensor", weight_decay=0.0), separate=separate)
    assert counters == [1, 0, 0]


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_more_channels_than_blocks_that_limit_adds_at_once(scale_type):
    """`scale` leaves one part of u^2 per 256 channels, and `limit` has 256 threads."""
    h = hyper(scale_type=scale_type, update_proj_gap=200)
    compare([low_rank((257 * 256, 4), 4, rows=True, weight=BF16, grad=BF16)], h, steps=1)


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_any_block_of_a_matrix_may_come_last_to_the_limiter(scale_type, monkeypatch):
    """Blocks run downward under order 1. Two steps: the count of blocks turns over by itself."""
    h = hyper(scale_type=scale_type)
    items = [low_rank((300, 24), rank, key=rank) for rank in (4, 8)]
    specs, backwards = [Restated(item) for item in items], [clone(item) for item in items]
    made = [(order, batches(own, True)) for order, own in (("0", items), ("1", backwards))]
    for _ in range(2):
        for spec in specs:
            spec.step(h, signals())
        for order, both in made:
            monkeypatch.setenv("EMULATED_ORDER", order)
            for batch, verb in itertools.product(both, ("project", "scale", "apply")):
                getattr(batch, verb)(h, signals())
    for spec, item, other in zip(specs, items, backwards, strict=True):
        spec.check()
        assert torch.equal(item.weight, other.weight)
        assert torch.equal(item.update_norm, other.update_norm)


# Rows of 1, 3, 32, 34, 160, 256 and 289 vectors of four, and rows that end within one; of each
# whole tiles and tiles of the last rows.
WIDTHS = [
    (600, 4),
    (1100, 12),
    (150, 128),
    (150, 136),
    (70, 640),
    (20, 1024),
    (40, 1156),
    (40, 1153),
]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_tiles_of_every_width_meet_their_ends(order, dtype):
    """Rows begin aligned, and nothing beyond a row's end changes."""
    h = hyper(distribution="sparse")
    for (outer, inner), rows in itertools.product(WIDTHS, (True, False)):
        inner *= 1 if dtype is F32 else 2
        apart = -(-inner // 8) * 8
        shape = (outer, inner) if order == "rows" else (inner, outer)
        item = low_rank(shape, 1, rows, weight=dtype, grad=dtype, order=order)
        memory = [torch.full((outer * apart + 64,), 7.0, dtype=dtype) for _ in range(2)]
        inside = [m[32:-32].view(outer, apart)[:, :inner] for m in memory]
        weight, grad = (t if order == "rows" else t.t() for t in inside)
        weight.copy_(item.weight)
        grad.copy_(item.grad)
        compare([dataclasses.replace(item, weight=weight, grad=grad)], h)
        weight.fill_(7)
        assert (memory[0] == 7).all()


def test_k_is_cut_where_that_costs_few_bytes(module):
    """A matrix alone fills a device where R is thin; a model's large ranks keep R in registers."""

    def cut(channels, k, rank, sparse=False, by_row=True):
        tiles = module.tiling(
            channels=channels, k=k, rank=rank, grad_dtype=1, by_row=by_row, sparse=sparse
        )
        return tiles[0] * tiles[1] * tiles[2], tiles[2]

    for by_row, rank in itertools.product((True, False), (1, 4, 7, 8)):
        blocks, chunks = cut(4096, 4096, rank, by_row=by_row)
        assert blocks >= 128
        assert chunks * rank <= 4096 // 64
    for channels, k in ((4096, 4096), (11008, 4096)):
        for rank, sparse, by_row in itertools.product((128, 256), (False, True), (True, False)):
            assert cut(channels, k, rank, sparse, by_row)[1] == 1
    assert cut(24, 200000, 256)[1] >= 4  # float32 sums take 65536 at most


def test_the_bits_of_a_matrix_do_not_depend_on_its_neighbours():
    """Ranks that K holds below 8, or on one tile, beside others that it does not."""
    shapes = [(40, 5), (40, 24), (90, 80), (64, 200)]
    items = [low_rank(shape, 70, key=i) for i, shape in enumerate(shapes)]
    assert [item.exp_avg.shape[1] for item in items] == [5, 24, 70, 64]
    alone = [clone(item) for item in items]
    step(items)
    for item, other in zip(items, alone, strict=True):
        step([other])
        assert torch.equal(item.weight, other.weight)
        assert torch.equal(item.exp_avg, other.exp_avg)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("separate", [False, True])
def test_a_bad_gradient_keeps_weight_and_norm_but_counts_the_step(bad, rank, separate):
    item = low_rank((40, 24), rank)
    step([item], separate=separate)
    before = clone(item)
    item.grad[3, 5] = bad
    s = signals()
    step([item], s=s, separate=separate)
    assert torch.equal(item.weight, before.weight)
    assert torch.equal(item.update_norm, before.update_norm)
    assert torch.isfinite(item.exp_avg).all()
    assert torch.isfinite(item.exp_avg_sq).all()
    assert not torch.equal(item.exp_avg[4:], before.exp_avg[4:])
    assert int(item.step) == 2
    assert s.counters.tolist() == [0, 0, 1]


def test_steps_beyond_two_to_the_24_are_counted():
    for start in (2**24, 2**32 + 5):
        item, dense = low_rank((40, 24), 8, step=torch.tensor(start)), dense_item(50)
        dense.step.fill_(start)
        compare([item], hyper(update_proj_gap=200))
        cuda.build_dense([dense]).adamw(hyper(), signals())
        assert int(item.step) == int(dense.step) == start + 1


@pytest.mark.parametrize("order", ["rows", "columns"])
def test_weights_are_rounded_by_the_contracts_bits(order):
    """Half of the contract's words added to float32 bits, the low half cut off."""
    start = 2**32 + 8
    item = low_rank((40, 24), 8, weight=BF16, order=order, step=torch.tensor(start))
    plain = dataclasses.replace(clone(item), weight=item.weight.float(), step=torch.tensor(start))
    step([plain])
    step([item], hyper(stochastic_rounding=True))
    i, col = torch.arange(40)[:, None], torch.arange(24)[None, :]
    words = philox.words(item.key, col // 8, i, (start + 1) % 2**32, philox.ROUNDING)
    word = torch.stack([w.expand(40, 24) for w in words]).gather(
        0, (col % 8 // 2).expand(1, 40, 24)
    )
    half = (word[0] >> (16 * (col % 2))) & 0xFFFF
    bits = (plain.weight.contiguous().view(torch.int32).long() & 0xFFFFFFFF) + half
    rounded = (bits >> 16).to(torch.int32).to(torch.int16).view(BF16)
    assert torch.equal(item.weight, rounded)


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_lr_may_be_a_tensor_that_changes(dtype):
    """Also under the very same Hyper and Signals."""
    item = low_rank((40, 24), 8)
    (batch,) = batches([item], False)
    spec, s, lr = Restated(item), signals(), torch.tensor(0.5, dtype=dtype)
    h = hyper(lr=lr)
    for rate in (0.5, 0.25):
        lr.fill_(rate)
        spec.step(h, s)
        for verb in (batch.project, batch.scale, batch.apply):
            verb(h, s)
    spec.check()


def test_the_plan_refuses_what_no_kernel_could_run(module):
    plan = module.LowRankPlan(weight_dtype=0, grad_dtype=0, separate=False)
    row = dict.fromkeys(
        ("weight", "grad", "exp_avg", "exp_avg_sq", "update_norm", "step", "key", "weight_ld",
         "grad_ld"), 0,
    )  # fmt: skip
    flags = dict(by_row=True, row_major=True, leads=True)
    plan.add(channels=4, k=9, rank=8, **row, **flags)
    for sizes in ((4, 5, 8), (4, 9, 1), (2**31, 9, 8), (-1, 9, 8)):
        with pytest.raises(ValueError, match="rank"):
            plan.add(**dict(zip(("channels", "k", "rank"), sizes, strict=True)), **row, **flags)
    assert plan.size == 1
    with pytest.raises(ValueError, match="lie apart"):
        cuda.build([low_rank((8, 8), 2, gradient=torch.zeros(8, 8).t())])


# The sparse projection


def sparse_law(key, epoch, rank, k):
    """Row and sign of each k < ``k`` by DESIGN.md's contract, one index after the other."""
    drawn, signs = {}, []

    def half(c0, c1, i):
        if (c0, c1) not in drawn:
            drawn[c0, c1] = [int(w) for w in philox.words(key, c0, c1, epoch, 4)]
        return drawn[c0, c1][i % 8 // 2] >> 16 * (i % 2) & 0xFFFF

    rows = []
    for b, i in (divmod(index, rank) for index in range(k)):
        place = half(b // 8, 2**32 - 1, b)
        if rank % 8 == 0:
            groups = rank // 8
            group = (i // 8 + ((place // 8) * groups >> 13)) % groups
            row = 8 * group + (i % 8 ^ place % 8)
        else:
            row = (i + ((place // 8) * rank >> 13)) % rank
        rows.append(row)
        signs.append(-1 if half(b // 16, row // 8, row) >> b % 16 & 1 else 1)
    return rows, signs


@pytest.mark.parametrize("k", [568, 563])  # rows that 16-byte loads meet, and rows askew
@pytest.mark.parametrize("rank", [1, 3, 8, 20, 64, 130, 256, 320])
def test_the_identity_shows_every_position_and_sign_of_the_sparse_projection(rank, k):
    """R of the identity is P transposed, and b1 = 0 makes the first moment R itself."""
    start = 2**33 + 5
    rows, signs = sparse_law(7, start % 2**32, rank, k)
    exact = torch.zeros(k, rank)
    exact[torch.arange(k), torch.tensor(rows)] = torch.tensor(signs).float()
    h = hyper(distribution="sparse", betas=(0.0, 0.9), update_proj_gap=1)
    for order, dtype in (("rows", BF16), ("rows", F32), ("columns", F16), ("columns", F32)):
        gradient = torch.eye(k).to(dtype)
        item = low_rank((k, k), rank, True, order=order, gradient=gradient)
        item.step.fill_(start)
        for batch in batches([item], False):
            batch.project(h, signals())
            batch.scale(h, signals())
        assert torch.equal(item.exp_avg, exact), (order, dtype)


SPARSE_RANKS = [1, 3, 8, 20, 64, 130, 256, 304]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("rows", [True, False])
def test_sparse_steps_are_those_of_the_restatement(separate, rows):
    """Every rank, dtype of a gradient and order in memory; K ends within a block of most ranks."""
    orders, dtypes = itertools.cycle(["rows", "columns", "sliced"]), [F32, BF16, F16]
    items = []
    for i, (rank, dtype, side) in enumerate(itertools.product(SPARSE_RANKS, dtypes, (304, 301))):
        shape = (70, side) if rows else (side, 70)
        items.append(low_rank(shape, rank, rows, grad=dtype, key=i, order=next(orders)))
    for rank, dtype in itertools.product((3, 20, 64), dtypes):  # K is cut
        shape = (9, 4100) if rows else (4100, 9)
        items.append(low_rank(shape, rank, rows, grad=dtype, order=next(orders)))
    counters = compare(items, hyper(distribution="sparse"), separate=separate, steps=1)
    assert counters[::2] == [len(items), 0]


def test_full_tiles_of_the_sparse_projection_meet_their_tails():
    """Channels beyond one tile, the last one not full; every slot of a tile has a part of K."""
    items = [
        low_rank((channels, 1040) if order == "rows" else (channels, 1000), rank, True, grad=dtype,
                 order=order)
        for order, channels in (("rows", 70), ("columns", 264))
        for rank in (8, 24, 64, 256, 384)
        for dtype in (F32, BF16, F16)
    ]  # fmt: skip
    compare(items, hyper(distribution="sparse"), steps=2)


@pytest.mark.parametrize("rank", [8, 64, 256, 512])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_the_sparse_projection_reads_each_element_once_in_16_bytes(module, rank, order):
    for dtype in (F32, BF16, F16):
        item = low_rank((72, 1040), rank, True, grad=dtype, order=order)
        (batch,) = batches([item], False)
        size = item.grad.numel() * item.grad.element_size()
        module.watch(item.grad.data_ptr(), size)
        batch.project(hyper(distribution="sparse"), signals())
        assert module.watched_bytes() == size


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("channels", [512, 360])
def test_tiles_read_each_element_once_in_16_bytes_and_nothing_beyond(module, channels, rows):
    """Whole tiles take the loop without guards up to the last stage, 360 channels the other one."""
    for dtype in (F32, BF16, F16):
        order = "rows" if rows else "columns"
        item = low_rank((channels, 1000), 16, True, grad=dtype, order=order)
        buffer = torch.full((2 * item.grad.numel(),), math.nan).to(dtype)
        front = buffer[: item.grad.numel()].view(item.grad.shape if rows else (1000, channels))
        front.copy_(item.grad if rows else item.grad.t())
        item = dataclasses.replace(item, grad=front if rows else front.t())
        (batch,) = batches([item], False)
        module.watch(buffer.data_ptr(), buffer.numel() * buffer.element_size())
        batch.project(hyper(), signals())
        assert module.watched_bytes() == front.numel() * front.element_size()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("order", ["rows", "columns"])
def test_full_tiles_and_their_tails_take_the_steps_of_the_restatement(order, separate):
    """Two whole tiles of channels and a part of one; of K several turns, the last one not full.
    Beyond rank 128 the second block of a channel tile leaves the squares to the first."""
    items = [
        low_rank((520, 168), rank, True, grad=dtype, order=order, key=rank)
        for rank in (16, 64, 128, 200)
        for dtype in (F32, BF16, F16)
    ]
    compare(items, separate=separate)


def test_every_switch_takes_sparse_steps_too():
    h = hyper(
        distribution="sparse", maximize=True, correct_bias=False, scale=4.0, scale_front=True,
        disable_nl=True, scale_type="tensor", betas=(0.0, 0.9),
    )  # fmt: skip
    items = [low_rank((40, 90), rank, rows) for rank in (1, 8, 20) for rows in (True, False)]
    compare(items, h, signals(grad_scale=1024.0), steps=3)


@pytest.mark.parametrize("rank", [1, 8, 20])
def test_clip_multiplies_sparse_sums_and_squares(rank):
    items = [low_rank((70, 40), rank), low_rank((40, 90), rank)]
    s = signals(clip=0.25, grad_scale=8.0)
    compare(items, hyper(distribution="sparse"), s, separate=True, steps=2)


def test_separate_moments_of_sparse_sums_are_the_fused_ones_bit_for_bit():
    items = [
        low_rank((70, 300), rank, rows, key=rank) for rank in (8, 20, 256) for rows in (True, False)
    ]
    others = [clone(item) for item in items]
    h = hyper(distribution="sparse")
    for _ in range(2):
        step(items, h, separate=False)
        step(others, h, separate=True)
    for a, b in zip(items, others, strict=True):
        assert torch.equal(a.exp_avg, b.exp_avg)
        assert torch.equal(a.exp_avg_sq, b.exp_avg_sq)


@pytest.mark.parametrize("separate", [False, True])
def test_expert_matrices_share_a_step_under_the_sparse_projection(separate):
    shared = torch.tensor(3)
    items = [low_rank((300, 24), 8, key=i, step=shared, leads=i == 1) for i in range(3)]
    alone = [dataclasses.replace(clone(i), step=torch.tensor(3), leads=True) for i in items]
    h = hyper(distribution="sparse")
    assert step(items, h, separate=separate) == [3, 0, 0]
    for a, b in zip(items, alone, strict=True):
        step([b], h, separate=separate)
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.exp_avg, b.exp_avg)
    assert int(shared) == 4


def test_a_plan_follows_its_group_to_another_distribution_and_back():
    """The squared norms of one layout are no part of the other's sum."""
    item = low_rank((9, 300), 264, True)
    spec, s = Restated(item), signals()
    (batch,) = batches([item], True)
    exact = float(item.grad.double().square().sum())
    for distribution in ("rademacher", "sparse", "rademacher", "sparse"):
        h = hyper(distribution=distribution)
        spec.step(h, s)
        batch.project(h, s)
        assert float(batch.square_norm()) == pytest.approx(exact, rel=2**-20)
        batch.scale(h, s)
        batch.apply(h, s)
    spec.check()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_bad_gradient_spoils_one_sparse_sum_alone(bad, rank):
    h = hyper(distribution="sparse")
    for order in ("rows", "columns"):
        item = low_rank((40, 64), rank, True, order=order)
        step([item], h)
        before = clone(item)
        item.grad[3, 5] = bad
        assert step([item], h) == [0, 0, 1]
        assert torch.equal(item.weight, before.weight)
        kept = (item.exp_avg == before.exp_avg).nonzero()
        assert kept.shape == (1, 2)
        assert kept[0, 0] == 3
        assert torch.isfinite(item.exp_avg_sq).all()


# Dense parameters


def dense_item(count, weight=F32, grad=F32):
    w, g = torch.randn(count).to(weight), torch.randn(count).to(grad)
    return Dense(w, g, torch.zeros(count), torch.zeros(count), torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("clip", [None, 0.25])
def test_dense_parameters_follow_the_low_rank_rule_without_a_projection(clip):
    pairs = itertools.product([F32, BF16, F16], repeat=2)
    items = [dense_item(count, w, g) for w, g in pairs for count in (0, 1, 1003)]
    h = hyper(maximize=True, eps=1e-3, weight_decay=0.1)
    s = signals(grad_scale=8.0, clip=clip)
    exact = []
    for item in items:
        w, m, v = item.weight.double(), 0.0, 0.0
        g = -item.grad.double() / 8 * (clip or 1.0)
        for t in (1, 2):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            size = 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            w = w * (1 - 0.1 * 0.1) - size * m / (v.sqrt() + 1e-3)
            w = w.to(item.weight.dtype).double() if t == 1 else w
        exact.append((w, m, v))
    families = {}
    for item in items:
        assert cuda.takes(item)
        families.setdefault(cuda.family(item), []).append(item)
    made = [cuda.build_dense(group) for group in families.values()]
    for _ in range(2):
        for batch in made:
            batch.adamw(h, s)
    for item, (w, m, v) in zip(items, exact, strict=True):
        eps = torch.finfo(item.weight.dtype).eps
        torch.testing.assert_close(item.exp_avg.double(), m, rtol=2**-20, atol=1e-12)
        torch.testing.assert_close(item.exp_avg_sq.double(), v, rtol=2**-20, atol=1e-12)
        torch.testing.assert_close(item.weight.double(), w, rtol=2 * eps, atol=2**-20 + eps)
        assert int(item.step) == 2
    assert s.counters.tolist() == [2 * len(items), 0, 0]


@pytest.mark.parametrize("count", [50, 20000])  # of a part of a block, and of whole ones
def test_a_dense_element_whose_square_is_not_finite_keeps_weight_and_moments(count):
    item, other = dense_item(count), dense_item(50)
    item.grad[3], item.grad[4], item.grad[5] = math.nan, math.inf, 2e19
    before = item.weight.clone()
    s = signals()
    batch = cuda.build_dense([item, other])
    for _ in range(2):
        batch.adamw(hyper(), s)
    kept = (item.weight == before).nonzero().flatten().tolist()
    assert kept == [3, 4, 5]
    assert item.exp_avg[3:6].eq(0).all() and item.exp_avg_sq[3:6].eq(0).all()
    assert s.counters.tolist() == [2, 0, 2]


def narrow_item(shape, stored, weight=F32, grad=F32, key=0x123456789ABCDEF):
    """A dense parameter whose moments are bf16 or codes; step 2^32 is the one after the next."""
    w, rest = torch.randn(shape), {"key": key}
    if weight == INT8:
        w, rest["grid"] = int8.quantize(w, 128)
    if stored == INT8:
        rest["units"] = tuple(torch.zeros(moments.blocks(shape)) for _ in range(2))
    made = [torch.zeros(shape, dtype=stored) for _ in range(2)]
    step = torch.tensor(2**32 - 2)
    return Dense(w.to(weight), torch.zeros(shape, dtype=grad), *made, step, **rest)


def widened(item):
    """The same with float32 moments."""
    found = [item.exp_avg.float(), item.exp_avg_sq.float()]
    if item.units is not None:
        pairs = zip((item.exp_avg, item.exp_avg_sq), item.units, moments.MOMENTS, strict=True)
        found = [moments.from_codes(codes, unit, key) for codes, unit, key in pairs]
    return dataclasses.replace(clone(item), exp_avg=found[0], exp_avg_sq=found[1], units=None)


def stored_as(item, wide):
    """What the specification makes of ``wide``'s moments, where those of ``item`` were: four
    tensors, or two."""
    item = clone(item)
    keeper = reference._Moments(item, int(wide.step) % 2**32)
    some = slice(0, item.weight.shape[0] if item.weight.dim() else 1)
    keeper.store(some, *(reference._vector(t) for t in (wide.exp_avg, wide.exp_avg_sq)))
    return [item.exp_avg, item.exp_avg_sq, *(item.units or ())]


@pytest.mark.parametrize("weight", [F32, BF16, F16, INT8], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("stored", [BF16, INT8], ids=["bfloat16", "int8"])
def test_narrow_moments_are_float32_ones_rounded_as_the_specification_has_it(stored, weight, grad):
    """To the last bit, in blocks that grow, shrink, keep their bits and end early. Weights are as
    beside float32 moments: the step is made before they are rounded."""
    whole = [(40, 256), (3, 128)]
    shapes = whole if weight == INT8 else [*whole, (), (1,), (1003,), (8500,), (1, 2, 70)]
    items = [narrow_item(shape, stored, weight, grad) for shape in shapes]
    h = hyper(betas=(0.5, 0.75))
    batch = cuda.build_dense(items)
    for size in (0.01, 100.0, 2.0**-14, 0.0):
        for item in items:
            assert cuda.takes(item)
            spread = torch.exp2(-20 * torch.rand(item.weight.shape))
            item.grad.copy_(size * spread * torch.randn(item.weight.shape))
            item.grad.view(-1)[5:7] = math.nan
        twins = [widened(item) for item in items]
        before = [clone(item) for item in items]
        batch.adamw(h, signals())
        cuda.build_dense(twins).adamw(h, signals())
        for item, twin, old in zip(items, twins, before, strict=True):
            found = [item.exp_avg, item.exp_avg_sq, *(item.units or ())]
            assert all(map(torch.equal, found, stored_as(old, twin))), (size, item.weight.shape)
            assert torch.equal(item.weight, twin.weight)
            assert int(item.step) == int(twin.step)


def test_narrow_moments_are_taken_where_they_lie_as_they_are_counted():
    for stored in (BF16, INT8):
        assert cuda.takes(narrow_item((3, 256), stored))
        assert cuda.takes(narrow_item((700,), stored))
        assert cuda.takes(narrow_item((3, 130), stored)) == (stored == BF16)  # blocks end in rows
        turned = torch.randn(256, 3).t()
        assert not cuda.takes(dataclasses.replace(narrow_item((3, 256), stored), weight=turned))
        assert cuda.family(narrow_item((9,), stored)) != cuda.family(dense_item(9))


def test_dense_gradients_that_move_are_followed():
    item = dense_item(50)
    other, grad = clone(item), item.grad.clone()
    batch = cuda.build_dense([item])
    item.grad.fill_(math.nan)
    batch.set_gradients([grad.data_ptr()])
    batch.adamw(hyper(), signals())
    cuda.build_dense([dataclasses.replace(other, grad=grad)]).adamw(hyper(), signals())
    assert torch.equal(item.weight, other.weight)
    assert torch.isfinite(item.weight).all()


# The border itself


def test_builds_do_not_rest_on_defaults_of_torch():
    items, h, s = [low_rank((40, 24), 8), low_rank((40, 24), 1)], hyper(), signals()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            made = batches(items, False)
            for batch in made:
                assert batch.table.device.type == batch.workspace.device.type == "cpu"
                assert batch.workspace.dtype == F32
                for verb in (batch.project, batch.scale, batch.apply):
                    verb(h, s)
    finally:
        torch.set_default_dtype(default)


def test_what_the_kernels_do_not_know_is_not_taken():
    assert not cuda.takes(low_rank((9, 12), 4, weight=torch.float64))
    assert not cuda.takes(dense_item(9, grad=torch.float64))
    huge = torch.empty(1, dtype=BF16).expand(2**31, 1)
    assert not cuda.takes(dataclasses.replace(low_rank((9, 12), 4), weight=huge))


def test_every_stream_is_known_to_the_memory_that_it_reads(monkeypatch):
    """And a batch that a captured graph reads follows no gradients: its table would be freed."""
    recorded, current, capturing = [], SimpleNamespace(cuda_stream=5), [False]
    item = low_rank((40, 24), 8)  # kept, since a batch holds addresses only
    (batch,) = batches([item], False)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, s: recorded.append(s.cuda_stream))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    batch.device = torch.device("cuda")
    for stream in (5, 5, 6):
        current.cuda_stream = stream
        batch.project(hyper(), signals())
    assert recorded == [5] * 3 + [6] * 3
    batch.device = torch.device("cpu")
    assert batch.set_gradients([0]) is True
    batch.device = torch.device("cuda")
    capturing[0] = True
    batch.scale(hyper(), signals())
    assert recorded == [5] * 3 + [6] * 6
    table = batch.table
    assert batch.set_gradients([0]) is False
    assert batch.table is table
