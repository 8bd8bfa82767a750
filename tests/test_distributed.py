"""Sharded parameters: a step over several ranks is the step of one process over whole tensors."""

import itertools
import math
import re

import conftest
import helpers
import mixture
import pytest
import sharded
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


def compare(found, expected, tolerance):
    """The largest difference of weights and moments, beside the largest number of each."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert key == "stats" or found[key] == value, key
            continue
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        difference = (found[key].double() - value.double()).abs().max() if value.numel() else 0
        assert difference <= tolerance * max(float(value.double().abs().max()), 1e-300), key


TALL, WIDE, TINY, SQUARE, CONV = (12, 5), (5, 13), (1, 3), (7, 7), (6, 2, 2, 2)
SHAPES = [TALL, WIDE, TINY, SQUARE, CONV]  # on two ranks a (1, 3) leaves one of them nothing
VECTORS = [(5,), (1,), (4, 3)]


def agree(group, world, mesh, groups, dtype="float64", steps=25, tolerance=1e-11, **options):
    """All ranks end where one process over whole tensors ends."""
    options = {"weight_decay": 0.1, "lr": 0.01, **options}
    factor = options.pop("factor", 1.0)
    expected = sharded.run(groups, dtype, None, range(steps), factor, options)
    found = group.run(world, sharded.run, groups, dtype, mesh, range(steps), factor, options)
    for own in found:
        compare(own, expected, tolerance)
        if not any("batch_dims" in own for own, *_ in groups):  # a rank counts what it holds
            assert own["stats"] == expected["stats"]
    return found, expected


def low_rank(**options):
    return {"rank": 4, "update_proj_gap": 20, "scale": 2.0, **options}


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("proj", ["random", "rademacher", "sparse"])
def test_fsdp_shards_step_as_one_process(group, world, scale_type, proj):
    """In float64, over a redraw. Sums over ranks differ by a few of its roundings, 1e-16 each;
    quotients of norms and 25 steps make 1e-13 of it."""
    low = low_rank(scale_type=scale_type, proj=proj)
    agree(group, world, (world,), [(low, SHAPES, "0"), ({"rank": None}, VECTORS, "0")])


@pytest.mark.parametrize("options", [
    {"proj_type": "reverse_std"},
    {"proj_type": "left", "scale_front": True},
    {"proj_type": "right", "disable_nl": True},
    {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    {"rank": 3, "proj": "sparse", "correct_bias": False},
    {"rank": 100, "maximize": True},
], ids=str)  # fmt: skip
def test_every_orientation_and_option_is_that_of_one_process(group, options):
    """Gradients grow by half at each step for a while, so that the limiter holds some of them."""
    agree(group, 2, (2,), [(low_rank(**options), SHAPES, "0")], steps=6)


@pytest.mark.parametrize("mesh, placements", [
    ((2, 2), "r0"), ((2, 2), "01"), ((2, 2), "10"), ((2, 2), "r1"), ((3,), "1"), ((2,), "r"),
    ((1, 2), "01"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_hsdp_and_tensor_parallel_placements_step_as_one_process(
    group, mesh, placements, scale_type
):
    world = math.prod(mesh)
    shapes = SHAPES if mesh != (3,) else SHAPES[:4]  # the last one's channels do not come out even
    groups = [(low_rank(scale_type=scale_type), shapes, placements)]
    groups += [({"rank": None}, [(4, 3), (3, 6)], placements)]
    found, _ = agree(group, world, mesh, groups)
    for own in found:  # replicas stay equal to the bit
        compare(own, found[0], 0)


@pytest.mark.parametrize("placement", "012")
def test_experts_keep_their_numbers_wherever_they_lie(group, placement):
    """Cut by experts, three over two ranks, or inside of each of them."""
    experts = low_rank(batch_dims=1), [(3, 6, 4), (3, 4, 6), (1, 5, 5)], placement
    agree(group, 2, (2,), [experts])


@pytest.mark.parametrize("placements", ["01", "02", "20"])
def test_the_norms_of_an_experts_parts_are_no_other_experts(group, placements):
    """Two dimensions of the mesh cut experts, three over two ranks, and their matrices."""
    experts = low_rank(batch_dims=1), [(3, 6, 4), (3, 4, 6)], placements
    agree(group, 4, (2, 2), [experts], steps=6)


@pytest.mark.parametrize("placements", ["0", "1"])
def test_clipping_takes_the_norm_of_all_shards(group, placements):
    groups = [(low_rank(), SHAPES, placements), ({"rank": None}, [(4, 3), (2, 5)], placements)]
    groups += [(low_rank(batch_dims=1), [(3, 6, 4)], "0"), ({"rank": None}, [(5,)], "r")]
    found, expected = agree(group, 2, (2,), groups, steps=3, max_grad_norm=0.5)
    assert all(torch.equal(found[0]["norm"], own["norm"]) for own in found)
    assert float(expected["norm"]) > 0.5


def test_a_gradient_that_lies_elsewhere_is_brought_to_its_parameter(group):
    """0.25 g + 0.75 g differs from g by a rounding or two of float64."""
    groups = [({"rank": 2}, [(6, 4)], "r"), ({"rank": None}, [(5,)], "r")]
    expected = sharded.run(
        [*groups, ({"rank": 2}, [(4, 6)], "0")], "float64", None, range(3), 1, {}
    )
    for found, alike in group.run(2, sharded.gradients_elsewhere, range(3)):
        compare(found, expected, 1e-12)
        assert alike


OWN = {"torch": "reference", "cuda": "cuda", "triton": "triton_kernels"}


@pytest.fixture
def place(request):
    if reason := conftest.why_not(*conftest.PLACES[request.param]):
        pytest.skip(reason)
    return request.param


def on_places(names, *values, triton):
    """All combinations for the CUDA kernels, emulated; in Triton's interpreter some."""
    found = [("cuda", *of) for of in itertools.product(*values)]
    found += [("triton", *of) for of in triton]
    return pytest.mark.parametrize(f"place, {names}", found, indirect=["place"], ids=str)


def agree_on(group, place, groups, steps, tolerance, takers, **options):
    """Two ranks end where one ends whose back end is the same; each kind of work was done by it."""
    run, more = (groups, "float32"), (range(steps), {"lr": 0.01, "weight_decay": 0.1, **options})
    expected, _ = sharded.on(place, sharded.with_takers, *run, None, *more)
    for found, took in group.run(2, sharded.on, place, sharded.with_takers, *run, (2,), *more):
        compare(found, expected, tolerance)
        assert found["stats"] == expected["stats"]
        assert took == takers


@on_places("proj, scale_type, placements", ["random", "rademacher", "sparse"],
           ["channel", "tensor"], ["0", "1"], triton=[
    ("random", "channel", "0"), ("sparse", "tensor", "0"), ("rademacher", "channel", "1"),
])  # fmt: skip
def test_kernels_step_shards_as_one_process(group, place, proj, scale_type, placements):
    """Both orientations, uneven and empty shards, and parts that begin within a block of random
    numbers: k 35 and 20. float32 sums in another order, over a few steps of small matrices: 1e-4 of
    the largest number."""
    shapes = [(70, 41), (41, 70), TALL, WIDE, TINY]
    low = low_rank(rank=8, proj=proj, scale_type=scale_type, update_proj_gap=2)
    steps = 3 if place == "cuda" else 2
    agree_on(group, place, [(low, shapes, placements)], steps, 1e-4, {(True, True, OWN[place])})


@on_places("placements", ["0", "1"], triton=[("0",)])
def test_kernels_step_shards_of_mini(group, place, placements):
    low = low_rank(rank=1, scale_type="tensor", scale=128.0)
    agree_on(group, place, [(low, [(70, 41), (41, 70)], placements)], 2, 1e-4,
             {(True, True, OWN[place])}, max_grad_norm=0.5)  # fmt: skip


@pytest.mark.parametrize("place", ["torch", "cuda", "triton"], indirect=True)
def test_every_back_end_steps_all_kinds_of_shards(group, place):
    """Parts of matrices, replicated matrices, whole experts and parts of them, and dense shards.

    Two steps move the largest weight by some hundredths of itself: 1e-5 is a thousandth of that.
    """
    groups = [(low_rank(), [TALL, WIDE, SQUARE], "0"), (low_rank(), [(9, 6)], "r")]
    groups += [(low_rank(batch_dims=1), [(3, 6, 4)], at) for at in "02"]
    groups += [({"rank": None, "dense_state": "bfloat16"}, [(4, 6), (5,)], "0")]
    own = OWN[place]
    run, more = (groups, "float32"), (range(2), {"lr": 0.01})
    expected, _ = sharded.on(place, sharded.with_takers, *run, None, *more)
    ranks = group.run(2, sharded.on, place, sharded.with_takers, *run, (2,), *more)
    for rank, (found, took) in enumerate(ranks):
        compare(found, expected, 1e-5)
        by_kernels = {(True, True, own), (True, False, own), (False, False, own)}
        # Its part of the vector begins at element 3, where no four of random words begin.
        left = {(False, False, "reference")} if rank == 1 else set()
        assert took == by_kernels | left


@on_places("proj", ["random", "rademacher", "sparse"], triton=[("random",), ("rademacher",)])
def test_kernels_draw_a_ranks_part_of_the_projection_bit_for_bit(group, place, proj):
    """The second rank begins at k 35 or, for signs, at 300, before a block's bound at 512."""
    shapes = [(70, 70), (600, 600)] if place == "cuda" else [(70, 70)]
    expected = sharded.on(place, sharded.identity, shapes, None, "", proj)
    for own in group.run(2, sharded.on, place, sharded.identity, shapes, (2,), "1", proj):
        for p, q in zip(own, expected, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("place", ["torch", "cuda"], indirect=True)
def test_what_goes_to_other_ranks_goes_in_buckets(group, place):
    """Two matrices whose contracted side is cut, [41, 9] and [33, 9] sums: in one bucket or in two,
    for the same bits. Ranks of a mesh that cut channels too hold unequal parts of them."""
    for world, placements in ((2, "0"), (4, "01")):
        mesh = (2,) if world == 2 else (2, 2)
        groups = [(low_rank(rank=8), [(20, 41), (33, 20), (20, 33)], placements)]
        run = groups, "float32", mesh, range(1), 1.0, {"lr": 0.01}
        in_one, in_two = (
            group.run(world, sharded.on, place, sharded.in_buckets, size, *run)
            for size in (2**20, 500)
        )
        for (one, few), (two, many) in zip(in_one, in_two, strict=True):
            compare(two, one, 0)
            assert few["reduce_scatter"] == (1 if world == 2 else 2) < many["reduce_scatter"]


@pytest.mark.parametrize("size", [216, 150, 72])
def test_buckets_belong_to_the_ranks_that_fill_them(group, size):
    """Three experts over two ranks fill another bucket unevenly, along another dimension."""
    other, experts = (low_rank(rank=2), [(4, 6)], "0r"), low_rank(rank=2, batch_dims=1)
    groups = [other, (experts, [(3, 6, 4)], "02"), other]
    run = groups, "float32", (2, 2), range(1), 1.0, {"lr": 0.01}
    expected, _ = group.run(4, sharded.in_buckets, 2**20, *run)[0]
    for found, calls in group.run(4, sharded.in_buckets, size, *run):
        compare(found, expected, 0)
        assert calls["reduce_scatter"] > 1


def test_ranks_go_through_their_groups_in_one_order():
    """Also one that meets them the other way round, having no part of what comes first."""
    from apollo_kernels.distributed import Spread, _by

    first, second = Spread(contracted="a", along=(0,)), Spread(contracted="b", along=(1, 0))
    for met in ([first, second], [second, first]):
        entries = [(spread, object()) for spread in met]
        assert [place for place, _ in _by(entries, lambda s, _: s.contracted)] == ["a", "b"]


@pytest.mark.parametrize("place", ["cuda", "triton"], indirect=True)
def test_kernels_give_the_same_bits_in_the_same_world(group, place):
    groups = [(low_rank(rank=8), [(70, 41), (41, 70)], "0")]
    run = sharded.on, place, sharded.run, groups, "float32", (2,), range(2), 1.0, {"lr": 0.01}
    first, second = group.run(2, *run), group.run(2, *run)
    for own in [*first, *second]:
        compare(own, first[0], 0)


LARGE = [(96, 64), (64, 96), (40, 100), (101, 37)]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_float32_weights_differ_by_the_order_of_sums_alone(group, world, scale_type):
    """50 steps over two redraws, in ulps of the largest weight, 2^-24 of it or more.

    The two runs add the same products in another order, so R differs by about an ulp of its
    channel's norm, and a scale s by a few ulps. An update is at most a hundredth of a weight here,
    so of that a weight sees less than a tenth of an ulp per step; but where the exact sum lies near
    the middle of two floats, they round to different ones: one ulp, in few of the steps.
    """
    groups = [(low_rank(rank=8, scale_type=scale_type), LARGE, "0")]
    found, expected = agree(
        group, world, (world,), groups, dtype="float32", steps=50, tolerance=1e-4
    )
    for own in found:
        for i in range(len(LARGE)):
            after = expected[i, "weight"]
            ulp = 2.0**-24 * float(after.abs().max())
            assert (own[i, "weight"] - after).abs().max() <= 8 * ulp


def test_the_same_world_twice_gives_the_same_bits(group):
    groups = [(low_rank(rank=8), LARGE, "0"), ({"rank": None}, VECTORS, "0")]
    run = sharded.run, groups, "float32", (3,), range(5), 1.0, {"lr": 0.01}
    first, second = group.run(3, *run), group.run(3, *run)
    for own in [*first, *second]:
        compare(own, first[0], 0)


@pytest.mark.parametrize("proj", ["random", "rademacher", "sparse"])
@pytest.mark.parametrize("world, mesh, placements", [
    (2, (2,), "0"), (3, (3,), "0"), (3, (3,), "1"), (4, (2, 2), "01"),
], ids=str)  # fmt: skip
def test_every_rank_draws_its_part_of_the_projection_bit_for_bit(
    group, world, mesh, placements, proj
):
    """With b1 = 0, M is R, and R of the identity is P: one product per entry, and sums with 0."""
    shapes = [(24, 24), (1100, 1100)]
    (expected, *_), found = (
        group.run(w, sharded.identity, shapes, m, at, proj)
        for w, m, at in ((1, None, ""), (world, mesh, placements))
    )
    for own in found:
        for p, q in zip(own, expected, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_of_a_rank_have_the_rows_of_R_bit_for_bit(group, dtype):
    """Where the contracted side is whole: a row of R is a sum over one channel (no BLAS: its blocks
    depend on the number of rows)."""
    groups = [(low_rank(betas=(0.0, 0.9), rank=3), [(96, 64), (33, 7)], "0")]
    groups += [(low_rank(betas=(0.0, 0.9), rank=8, proj="sparse"), [(96, 64), (33, 17)], "0")]
    run = groups, dtype
    expected = sharded.run(*run, None, range(1), 1.0, {})
    for own in group.run(3, sharded.run, *run, (3,), range(1), 1.0, {}):
        for i in range(4):
            assert torch.equal(own[i, "exp_avg"], expected[i, "exp_avg"])


@pytest.mark.parametrize("mesh, placements", [((3,), "0"), ((3,), "1"), ((2, 2), "10")], ids=str)
def test_stochastic_rounding_goes_by_the_place_in_the_whole_weight(group, mesh, placements):
    """The bits are those of one process. Scales may differ by an ulp, which carries one weight in
    2^15 or so over a border; bits of another place would move half of all."""
    groups = [(low_rank(stochastic_rounding=True), [(96, 40), (40, 96)], placements)]
    run = groups, "bfloat16"
    world = math.prod(mesh)
    expected = sharded.run(*run, None, range(4), 1.0, {"lr": 1e-4})
    for own in group.run(world, sharded.run, *run, mesh, range(4), 1.0, {"lr": 1e-4}):
        for i in range(2):
            moved = (own[i, "weight"] != expected[i, "weight"]).float().mean()
            assert moved < 0.002


@pytest.mark.parametrize("dense_state", ["float32", "bfloat16", "int8"])
def test_dense_shards_are_bit_for_bit_those_of_one_process(group, dense_state):
    """A step looks at one element and draws by its number, or at a block in a row. Sharded vectors
    keep float32 moments in place of int8 ones."""
    shapes = [(7, 5), (3, 300), (1, 4)] + ([(9,)] if dense_state != "int8" else [])
    groups = [({"rank": None, "dense_state": dense_state}, shapes, "0")]
    expected = sharded.run(groups, "float32", None, range(4), 1.0, {})
    for own in group.run(2, sharded.run, groups, "float32", (2,), range(4), 1.0, {}):
        compare(own, expected, 0)
    groups = [({"rank": None, "dense_state": "int8"}, [(9,)], "0")]
    for own in group.run(2, sharded.run, groups, "float32", (2,), range(1), 1.0, {}):
        assert own[0, "exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("place", ["torch", "cuda", "triton"], indirect=True)
def test_each_rank_tells_of_its_channels_and_of_the_whole_update(group, place, scale_type):
    """p0's contracted side is cut, p1's channels are: there a rank knows the scales of its own.
    p2 has no limiter."""
    own = {"rank": 4, "scale_type": scale_type}
    free = {**own, "disable_nl": True}
    groups = [(own, [(8, 6)], ["1"]), (own, [(9, 5)], ["0"]), (free, [(8, 6)], ["1"])]
    dtype, close = ("float64", 1e-9) if place == "torch" else ("float32", 1e-4)
    run = sharded.on, place, sharded.recorded, groups
    whole = run[0](*run[1:], None, dtype)
    assert 0 < whole["p0"]["limited"] < 1
    ranks = group.run(2, *run, (2,), dtype)
    assert whole["p2"]["update_norm"] > 0
    for name in ("p0", "p1", "p2"):
        for found in ranks:
            for key in ("update_norm", "limited"):
                assert found[name][key] == pytest.approx(whole[name][key], rel=close)
        least, most = (
            extreme(found[name]["scales"][key] for found in ranks)
            for extreme, key in ((min, "min"), (max, "max"))
        )
        assert least == pytest.approx(whole[name]["scales"]["min"], rel=close)
        assert most == pytest.approx(whole[name]["scales"]["max"], rel=close)
    for found in ranks:
        assert found["p0"]["scales"] == pytest.approx(whole["p0"]["scales"], rel=close)


def test_a_compiled_step_breaks_its_graph_at_shards(group):
    groups = [(low_rank(), [TALL, WIDE], "0")]
    expected = sharded.run(groups, "float64", None, range(2), 1.0, {})
    for found in group.run(2, sharded.compiled, groups, (2,)):
        compare(found, expected, 1e-12)


# ---- what is refused, and by all ----------------------------------------------------------------

LOW, CONVOLUTION = {"rank": 2}, (6, 4, 2)


@pytest.mark.parametrize("placements, own, shape, words", [
    ("p", LOW, (6, 4), "Partial"),
    ("s", LOW, (6, 4), "_StridedShard"),
    ("s", {}, (6, 4), "_StridedShard"),
    ("2", LOW, CONVOLUTION, r"Shard\(dim=2\).*only dimensions \[0, 1\]"),
    ("00", LOW, (6, 4), "two dimensions of its mesh"),
    ("1", {"dense_state": "bfloat16"}, (6, 4), r"Shard\(dim=1\).*dense_state 'bfloat16'"),
    ("1", {**LOW, "proj_type": "left"}, (6, 3, 2), "its 3 do not come out even on 2"),
], ids=str)  # fmt: skip
def test_a_placement_that_no_step_knows_is_refused_at_construction(
    group, placements, own, shape, words
):
    for message, groups in group.run(2, sharded.refused, placements, own, shape):
        assert re.search(words, message) and "'odd.weight'" in message
        assert groups == 1


@pytest.mark.parametrize("kind, words", [
    ("state", "p1.*negative"), ("gradient", "ranks differ"), ("option", "ranks differ"),
    ("backend", "ranks differ"),
])  # fmt: skip
def test_no_rank_steps_or_waits_where_one_refuses(group, kind, words):
    """And the next step is as if nothing had been."""
    if kind == "backend" and (reason := conftest.why_not("triton", "cpu")):
        pytest.skip(reason)
    answers = group.run(2, sharded.one_rank_refuses, kind)
    (first, _, _), (second, _, _) = answers
    assert re.search(words, second)
    assert re.search("another rank" if kind == "state" else words, first)
    assert all(same for _, same, _ in answers)
    low = {"rank": 4, "betas": (0.5, 0.9)}
    groups = [(low, [(6, 4), (4, 6)], "0"), ({"rank": None}, [(5,)], "0")]
    expected = sharded.run(groups, "float64", None, range(2), 1.0, {})
    for _, _, result in answers:
        compare(result, expected, 1e-12)


def test_an_inf_that_one_rank_has_found_skips_the_step_on_all(group):
    for before, skipped, after in group.run(2, sharded.inf_on_one_rank):
        compare(skipped, before, 0)
        assert int(after[0, "step"]) == 2 and int(before[0, "step"]) == 1


@pytest.mark.parametrize("placements", ["0", "1"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_nan_on_one_rank_keeps_the_weights_of_all(group, placements, scale_type):
    """The parameter's weights and update_norm stay; the step counts, and so does the NaN."""
    for before, after in group.run(2, sharded.nonfinite, placements, scale_type):
        for i in range(2):
            assert torch.equal(after[i, "weight"], before[i, "weight"])
            assert torch.equal(after[i, "update_norm"], before[i, "update_norm"])
            assert torch.isfinite(after[i, "exp_avg"]).all()
            assert int(after[i, "step"]) == 2
        assert after["stats"]["nonfinite"] == 2


# ---- models under fully_shard --------------------------------------------------------------------


def close(found, expected, tolerance=1e-9):
    """Losses and contents: the gradients themselves are sums over ranks in another order."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    compare(found[1], expected[1], tolerance)


@pytest.mark.parametrize("world, mesh", [(1, (1,)), (2, (2,)), (3, (3,)), (4, (2, 2))], ids=str)
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_a_model_under_fully_shard_trains_as_on_one_process(group, world, mesh, options):
    """Each rank has its share of the batch."""
    expected = sharded.one_process(range(8), options)
    for found in group.run(world, sharded.fsdp, mesh, range(8), options):
        close(found, expected)


def test_kernels_train_a_model_under_fully_shard(group):
    """As PyTorch does in float32; with gradient release, bit for bit as without."""
    runs = [("torch", False, {}), ("cuda", False, {}), ("cuda", True, {})]
    if reason := conftest.why_not(*conftest.PLACES["cuda"]):
        pytest.skip(reason)
    found = [
        group.run(2, sharded.on, place, sharded.narrow_fsdp, range(5), *own) for place, *own in runs
    ]
    for pytorch, kernels, released in zip(*found, strict=True):
        assert kernels[2] == {"cuda"} and pytorch[2] == {"reference"}
        close(kernels, pytorch, 1e-4)
        close(released, kernels, 0)


@pytest.mark.parametrize("number", [4, 3])
def test_experts_under_fully_shard_lie_on_ranks_and_train_as_on_one_process(group, number):
    """Groups of param_groups; cut along the experts, also where one rank has one more."""
    expected, _ = mixture.fsdp(number, None, range(6))
    for found, cut in group.run(2, mixture.fsdp, number, (2,), range(6)):
        assert cut == ["S(0)"] * 4  # a weight, both of its moments, the norms of its limiters
        compare(found, expected, 1e-9)


def test_gradient_release_under_fully_shard_gives_the_bits_of_the_normal_mode(group):
    """Its hooks run when gradients have been reduced, in the same order on all ranks."""
    normal = group.run(2, sharded.fsdp, (2,), range(5), {})
    for found, expected in zip(
        group.run(2, sharded.fsdp, (2,), range(5), {}, True), normal, strict=True
    ):
        close(found, expected, 0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_skips_the_step_of_all_ranks_together(group, fused):
    answers = group.run(2, sharded.scaled, (2,), 3, 1, fused)
    for seen, scale in answers:
        assert scale == 512.0
        compare(seen[1], seen[0], 0)
        assert not torch.equal(seen[2]["1.weight", "weight"], seen[1]["1.weight", "weight"])
        compare(seen[2], answers[0][0][2], 0)


def test_a_mixed_precision_policy_leaves_float_shards_to_step(group):
    """Compute in bfloat16, shards and reduction as they are: near the losses of full precision."""
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    losses, expected = (
        group.run(2, sharded.fsdp, (2,), range(8), {}, False, own)[0][0] for own in (policy, None)
    )
    assert losses == pytest.approx(expected, rel=0.05)
    assert losses != expected


def test_a_policy_that_offloads_to_the_cpu_leaves_the_steps_as_they_are(group):
    for found, expected in zip(
        *(group.run(2, sharded.fsdp, (2,), range(5), {}, False, p) for p in ("offload", None)),
        strict=True,
    ):
        close(found, expected, 0)


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["save", "async", "flat"])
def test_a_checkpoint_goes_from_two_ranks_to_three_and_to_one(group, tmp_path, how):
    """Through torch.distributed.checkpoint: moments, counters and keys to the bit, and the losses
    that the run would have had."""
    folder = str(tmp_path)
    (losses, saved), _ = group.run(2, sharded.save, folder, (2,), 4, how)
    for world, mesh in ((3, (3,)), (1, (1,)), (4, (2, 2)), (1, None)):
        for found_losses, found in group.run(world, sharded.load, folder, mesh, 4, how):
            compare(found, saved, 0)
            assert found_losses == pytest.approx(losses, rel=1e-9)


def test_a_checkpoint_goes_from_every_placement_to_every_other(group, tmp_path):
    """Cut by columns and rows at once, in both orders of the mesh, to rows alone, to columns alone;
    experts by number and from inside."""

    def groups(placements, experts):
        return [(low_rank(), SHAPES, placements), (low_rank(batch_dims=1), [(3, 6, 4)], experts)]

    folder, columns = str(tmp_path / "columns"), groups("1", "1")
    (saved, after), _ = group.run(2, sharded.layouts, folder, columns, (2,), True)
    for mesh, placements, experts in (
        ((2, 2), "10", "r2"), ((2, 2), "01", "0r"), ((3,), "0", "0"),
    ):  # fmt: skip
        own, world = groups(placements, experts), math.prod(mesh)
        for found, then in group.run(world, sharded.layouts, folder, own, mesh, False):
            compare(found, saved, 0)
            compare(then, after, 1e-12)
        other = str(tmp_path / placements)
        (first, _), *_ = group.run(world, sharded.layouts, other, own, mesh, True)
        for found, _ in group.run(2, sharded.layouts, other, columns, (2,), False):
            compare(found, first, 0)


def test_full_state_dicts_go_to_one_process_and_back(group):
    from torch.distributed.checkpoint import state_dict as of

    _, model_state, optimizer_state = group.run(2, sharded.whole_states, (2,), 4)[0]
    net = sharded.model()
    optimizer = sharded.optimizer_of(net, seed=5)
    of.set_model_state_dict(net, model_state)
    of.set_optimizer_state_dict(net, optimizer, optimizer_state)
    _, expected = sharded.one_process(range(4), {})
    found = sharded.contents(net, optimizer)
    compare(found, expected, 1e-9)
    losses = sharded.fit(net, optimizer, range(4, 7))
    back = group.run(3, sharded.whole_states, (3,), 4, (model_state, optimizer_state))
    for found_losses, own in back:
        compare(own, found, 0)
        assert found_losses == pytest.approx(losses, rel=1e-9)


def test_a_plain_state_dict_of_whole_tensors_is_cut_where_it_is_loaded(group):
    for found, expected in group.run(2, sharded.own_state_dict, (2,), 3):
        for key, value in expected.items():
            if key[1] != "weight":
                assert helpers.same(found[key], value), key


@pytest.mark.parametrize("backends, place", [
    ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", "cuda"), ("cpu:gloo", "cpu"),
])  # fmt: skip
def test_flags_cross_from_the_cpu_where_a_group_can(monkeypatch, backends, place):
    """So that the host does not wait for the device before each step."""
    from apollo_kernels import distributed

    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backends)
    assert distributed._flags_on(object(), "cuda") == place


# ---- what a step sends ---------------------------------------------------------------------------


@pytest.mark.parametrize("world, mesh, placements", [
    (2, (2,), "0"), (3, (3,), "0"), (4, (2, 2), "r0"), (4, (2, 2), "10"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("options, place", [
    ({}, "torch"), ({"max_grad_norm": 1.0}, "torch"), ({}, "cuda"),
], ids=str, indirect=["place"])  # fmt: skip
def test_the_report_says_what_a_rank_holds_and_what_a_step_sends(
    group, place, world, mesh, placements, scale_type, options
):
    """Bytes as counted in the collectives of a step, and as few of them as the design has: per
    dimension of the mesh one all-reduce of flags before it and one of norms, and for all matrices
    whose contracted side is cut one reduce-scatter and one all-gather."""
    groups = [(low_rank(scale_type=scale_type), SHAPES, placements)]
    groups += [({"rank": None}, [(4, 3)], placements)]
    run = sharded.on, place, sharded.sent
    for counted, calls, report, state in group.run(world, *run, groups, mesh, options):
        traffic = report.traffic
        assert counted == {kind: getattr(traffic, kind) for kind in counted}
        assert report.state_bytes == state and "a step sends" in str(report)
        cut, groups_that_cut = len(placements.replace("r", "")), 1 if "1" not in placements else 2
        expected = {"all_reduce": len(mesh) + cut * (1 + len(options))}
        expected["reduce_scatter"] = groups_that_cut
        if scale_type == "channel":
            expected["all_gather"] = groups_that_cut
        assert calls == expected
