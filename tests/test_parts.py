"""Parts of matrices in the kernels, on the emulated device and in Triton's interpreter: together
they take the step of the whole. What crosses ranks is added up by hand (parts.py)."""

import itertools
import math
from dataclasses import replace

import conftest
import parts
import pytest
import torch

from apollo_kernels import backends, philox
from apollo_kernels.batch import Dense, Signals

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def module(request):
    if reason := conftest.why_not(*conftest.PLACES[request.param]):
        pytest.skip(reason)
    with conftest.running(request.param):
        yield backends.load(request.param)


def cases(names, *values, triton):
    """All combinations for the CUDA kernels; in the interpreter, which is slow, some."""
    found = [("cuda", *of) for of in itertools.product(*values)]
    found += [("triton", *of) for of in triton]
    return pytest.mark.parametrize(f"module, {names}", found, indirect=["module"])


on_both = pytest.mark.parametrize("module", ["cuda", "triton"], indirect=True)
DISTRIBUTIONS = ["gaussian", "rademacher", "sparse"]


@cases(
    "distribution, rank, dim", DISTRIBUTIONS, [1, 3, 8, 20, 72], [0, 1],
    triton=[("gaussian", 20, 0), ("rademacher", 72, 1), ("sparse", 8, 1), ("sparse", 3, 0)],
)  # fmt: skip
def test_parts_of_the_contracted_side_take_the_step_of_the_whole(module, distribution, rank, dim):
    """Ends within a block; a part of nothing, and one that ends where its first block does not."""
    shape = (90, 21) if dim == 0 else (21, 90)
    items = [parts.matrix(shape, rank, dim == 1, key=i, columns_first=i == 1) for i in range(2)]
    parts.agree(module, items, dim, [33, 33, 40, 90], parts.hyper(distribution=distribution))


@cases(
    "scale_type, clip, contracted", ["channel", "tensor"], [None, 0.5], [False, True],
    triton=[("channel", None, False), ("tensor", 0.5, False), ("tensor", None, True)],
)  # fmt: skip
def test_parts_take_every_kind_of_step(module, scale_type, clip, contracted):
    """Several matrices of other ranks and shapes in one batch: whose channels are cut, or whose
    contracted side is, in an odd number of shares, of which two channels leave one empty."""
    h = parts.hyper(scale_type=scale_type, scale=4.0, maximize=True, scale_front=True)
    shapes = [((70, 33), 9), ((70, 40), 16), ((70, 2), 8)]
    items = [
        parts.matrix(shape, rank, not contracted, key=i) for i, (shape, rank) in enumerate(shapes)
    ]
    families = {}
    for item in items:
        families.setdefault(module.family(item), []).append(item)
    for family in families.values():
        parts.agree(module, family, 0, [24, 48, 70], h, clip=clip)


@cases("weight, grad", [F32, BF16, F16], [F32, BF16, F16], triton=[(BF16, BF16), (F32, F16)])
def test_parts_of_every_dtype_take_the_step_of_the_whole(module, weight, grad):
    """Parts whose rows allow 16 bytes at a time, and parts whose rows do not."""
    for dim, ends in ((0, [32, 80]), (1, [32, 80]), (1, [37, 80])):
        item = parts.matrix((80, 80), 8, dim == 1)
        item = replace(item, weight=item.weight.to(weight), grad=item.grad.to(grad))
        parts.agree(module, [item], dim, ends, parts.hyper(), steps=1)


@cases(
    "distribution, rank, dim", DISTRIBUTIONS, [1, 4, 8, 12], [0, 1],
    triton=[("gaussian", 8, 0), ("rademacher", 12, 1), ("sparse", 1, 0), ("sparse", 8, 1)],
)  # fmt: skip
def test_parts_draw_the_numbers_of_the_whole_bit_for_bit(module, distribution, rank, dim):
    """A channel with a single 1 at k has P's column k as its R, and with b1 = 0 as its M. The parts
    begin before and after the bounds of blocks of 16, 128 and 512, and of the rank."""
    ends = [3, 16, 17, 130, 511, 512, 517, 540]
    ks = sorted({k + d for k in [0, *ends] for d in (-2, -1, 0, 1, 2) if 0 <= k + d < ends[-1]})
    gradient = torch.zeros(len(ks), ends[-1])
    gradient[range(len(ks)), ks] = 1.0
    item = parts.matrix((len(ks), ends[-1]), rank, True)
    item = replace(item, grad=gradient)
    if dim == 0:
        item = replace(item, weight=item.weight.t(), grad=item.grad.t(), rows=False)
    h = parts.hyper(distribution=distribution, betas=(0.0, 0.9))
    ranks, whole = parts.by_rank([item], dim, ends), parts.copy(item)
    parts.whole_step(module, [whole], h)
    parts.step(module, ranks, h)
    found = torch.cat([own[0].exp_avg for own in ranks])
    assert torch.equal(found, whole.exp_avg)
    z = philox.draw(item.key, 0, rank, ends[-1], distribution).float()[:, ks].t()
    parts.near(found, z if distribution == "sparse" else z / math.sqrt(rank), 2**-6)


@cases(
    "ends, dim, columns_first", [[16, 48, 64], [5, 26, 64]], [0, 1], [False, True],
    triton=[([16, 48, 64], 1, False), ([5, 26, 64], 1, True), ([5, 26, 64], 0, False)],
)  # fmt: skip
def test_parts_are_rounded_by_their_place_in_the_whole(module, ends, dim, columns_first):
    """Channels are cut, and no limiter brings in the norm: scales are those of the whole, and so is
    every bit. Elsewhere half of the weights would be rounded the other way."""
    item = parts.matrix((64, 64), 8, dim == 0, BF16, columns_first=columns_first)
    h = parts.hyper(stochastic_rounding=True, disable_nl=True, lr=1e-3)
    ranks, whole = parts.by_rank([item], dim, ends), parts.copy(item)
    parts.whole_step(module, [whole], h)
    parts.step(module, ranks, h)
    weight, *_ = parts.together([own[0] for own in ranks], dim)
    assert (weight != item.weight).any()
    assert torch.equal(weight, whole.weight)


@on_both
def test_the_same_parts_twice_give_the_same_bits(module):
    item = parts.matrix((40, 300), 8, True)
    runs = [parts.by_rank([item], 1, [70, 190, 300]) for _ in range(2)]
    for ranks in runs:
        parts.step(module, ranks, parts.hyper(distribution="gaussian"))
    first, second = ([own[0] for own in ranks] for ranks in runs)
    for a, b in zip(parts.together(first, 1), parts.together(second, 1), strict=True):
        assert torch.equal(a, b)


@on_both
def test_a_skipped_step_writes_nothing_of_a_part(module):
    """Whatever ranks send each other then."""
    item = parts.matrix((24, 70), 8, True)
    ranks = parts.by_rank([item], 1, [33, 70])
    before = [parts.copy(own[0]) for own in ranks]
    counters = parts.step(module, ranks, parts.hyper(), found_inf=1.0)
    assert counters == [[0, 0, 0]] * 2
    for (own,), old in zip(ranks, before, strict=True):
        for name in ("weight", "exp_avg", "exp_avg_sq", "update_norm", "step"):
            assert torch.equal(getattr(own, name), getattr(old, name))


@on_both
def test_a_nan_reaches_all_parts_of_its_matrix_and_no_other(module):
    items = [parts.matrix((24, 70), 8, True, key=i) for i in range(2)]
    items[0].grad[5, 60] = math.nan
    ranks = parts.by_rank(items, 1, [33, 70])
    counters = parts.step(module, ranks, parts.hyper(weight_decay=0.0))
    assert counters == [[1, 0, 1]] * 2
    for bad, good in ranks:
        for own, item, same in ((bad, items[0], True), (good, items[1], False)):
            first = own.part.column
            whole = item.weight[:, first : first + own.weight.shape[1]]
            assert torch.equal(own.weight, whole) == same
            assert torch.isfinite(own.exp_avg).all() and int(own.step) == 1


@cases("distribution", ["rademacher", "sparse"], triton=[("sparse",)])
def test_a_part_whose_gradient_has_moved_is_read_where_it_is(module, distribution):
    item = parts.matrix((24, 70), 8, True)
    ranks, h = parts.by_rank([item], 1, [33, 70]), parts.hyper(distribution=distribution)
    batches = [module.build(own, separate=False) for own in ranks]
    expected = parts.sums_of(batches, h, item)
    moved = [own[0].grad.clone() for own in ranks]
    for (own,), batch, grad in zip(ranks, batches, moved, strict=True):
        own.grad.fill_(math.nan)
        assert batch.set_gradients([grad.data_ptr()])
    assert torch.equal(parts.sums_of(batches, h, item), expected)


@cases("dtype", [BF16, torch.uint8], triton=[(BF16,), (torch.uint8,)])
def test_a_dense_part_rounds_its_moments_by_their_number_in_the_whole(module, dtype):
    """Or it is not taken, where it begins within a call."""
    gradient = torch.randn(12, 128)
    h, signals = parts.hyper(), Signals(torch.zeros(3, dtype=torch.int64))

    def stepped(first, rows):
        shape = (rows, 128)
        units = (torch.zeros(rows, 1), torch.zeros(rows, 1)) if dtype == torch.uint8 else None
        pair = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
        grad = gradient[first : first + rows].clone()
        step = torch.zeros((), dtype=torch.int64)
        own = Dense(torch.ones(shape), grad, *pair, step, None, 3, units, 128 * first)
        assert module.takes(own) and not module.takes(replace(own, first=1))
        module.build_dense([own]).adamw(h, signals)
        return own.exp_avg, own.exp_avg_sq

    for whole, *both in zip(stepped(0, 12), stepped(0, 5), stepped(5, 7), strict=True):
        assert torch.equal(torch.cat(both), whole)
