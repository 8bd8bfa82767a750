"""The model of an SM against loops whose bounds are known; and how main loops are found in SASS."""

import json
import re
import sys
from pathlib import Path

import pytest
from assembler import assemble

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import loop_figures  # noqa: E402
import main_loops  # noqa: E402
import sass  # noqa: E402
from sm_model import cards, predict  # noqa: E402
from sm_model.cards import CARDS  # noqa: E402
from sm_model.simulate import simulate  # noqa: E402

A100, RTX_4090, H100, H200 = CARDS.values()
ALL = pytest.mark.parametrize("card", CARDS.values(), ids=list(CARDS))


HMMA, MUFU = "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.LG2 R1, R2"


def function(*lines, **options):
    return sass.Function(assemble(lines, **options))


def clocks(card, lines, warps=16, **options):
    """Of a turn in which each of the warps executes the lines once."""
    return simulate(card, function(*lines).instructions, warps, **options).clocks


def test_sass_is_read_with_its_control_codes():
    wide, branch = function(
        "@!P1 LDG.E.128 R4, [R2] stall=5 sets=3 frees=2 waits=4", "top: @P0 BRA {top}"
    ).instructions
    assert (wide.guard, wide.op, wide.operands) == ("@!P1", "LDG.E.128", "R4, [R2]")
    assert (wide.stall, wide.sets, wide.frees, wide.waits) == (5, 3, 2, 16)
    assert not wide.yields and wide.target is None
    assert (branch.sets, branch.frees, branch.waits, branch.target) == (None, None, 0, 16)


# One pipe alone: 16 warps, four per scheduler, keep it busy, and nothing else binds.
@ALL
@pytest.mark.parametrize(
    "code,per_warp",
    [
        ("FFMA R1, R2, R3, R4", lambda card: {1: 2, 2: 1}[card.fma_pipes]),
        ("LOP3.LUT R1, R2, R3, R4", lambda card: 2),
        ("IMAD R1, R2, R3, R4", lambda card: 2),
        ("IMAD.WIDE.U32 R2, R4, R5, R6", lambda card: 6),
        (MUFU, lambda card: 8),
        (HMMA, lambda card: card.mma),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_pipe_binds_a_loop_that_needs_nothing_else(card, code, per_warp):
    turn = 32 * per_warp(card) * 4  # 32 instructions of 4 warps per scheduler
    assert clocks(card, [code] * 32) == pytest.approx(turn, rel=0.02)


def test_two_pipes_take_turns_and_the_scheduler_binds():
    """On sm_90 FMA takes one instruction per clock, and ALU every second: together, one a clock."""
    lines = ["FFMA R1, R2, R3, R4", "LOP3.LUT R5, R6, R7, R8"] * 16
    assert clocks(H100, lines) == pytest.approx(32 * 4, rel=0.02)
    assert clocks(A100, lines) == pytest.approx(32 * 4, rel=0.02)  # each 2 clocks, side by side


@ALL
def test_memory_binds_a_loop_of_loads(card):
    """At the SM's share of the copy bandwidth, if enough is under way to hide the latency."""
    lines = ["LDG.E.128 R4, [R2] sets=0"] * 4 + ["FADD R1, R4, R5 waits=0"]
    moved = 4 * 512 * 64
    assert clocks(card, lines, warps=64) == pytest.approx(moved / card.share, rel=0.02)
    assert clocks(card, lines, warps=64, bandwidth=2.0) < 0.75 * moved / card.share


@ALL
def test_stores_take_bandwidth_too(card):
    lines = ["STG.E.128 [R2], R4"] * 4
    moved = 4 * 512 * 16
    assert clocks(card, lines) == pytest.approx(moved / card.share, rel=0.02)


@ALL
def test_latency_binds_a_lone_warp_that_waits(card):
    lines = ["LDG.E.128 R4, [R2] sets=0", "FADD R1, R4, R5 waits=0"]
    assert clocks(card, lines, warps=1) == pytest.approx(card.latency_clocks, rel=0.02)
    lines = ["LDG.E R4, [R2] sets=0", "FADD R1, R4, R5 waits=0"]
    near = cards.LSU_LATENCY + 1 + cards.L1_LATENCY
    assert clocks(card, lines, warps=1) == pytest.approx(near, abs=3)
    far = clocks(card, lines, warps=1, beginning=1)  # where a block looks itself up
    assert far == pytest.approx(near + cards.L2_LATENCY - cards.L1_LATENCY, abs=3)


@ALL
def test_shared_memory_gives_128_bytes_a_clock(card):
    assert clocks(card, ["LDS.128 R4, [R2]"] * 16) == pytest.approx(16 * 16 * 4, rel=0.02)
    fragments = ["LDSM.16.M88.4 R4, [R2]"] * 16
    assert clocks(card, fragments) == pytest.approx(16 * 16 * 4, rel=0.02)


def test_a_stall_is_waited_for_by_its_warp_alone():
    lines = ["FFMA R1, R2, R3, R4 stall=8"] * 32
    assert clocks(H100, lines, warps=4) == pytest.approx(32 * 8, rel=0.02)
    assert clocks(H100, lines, warps=16) == pytest.approx(32 * 8, rel=0.02)  # 4 fill 8 clocks half
    assert clocks(H100, lines, warps=64) == pytest.approx(32 * 16, rel=0.02)


def test_a_barrier_keeps_phases_apart():
    """Without one, warps draw (MUFU) while others multiply; with one per phase they cannot."""
    draw, multiply = [MUFU] * 16, [HMMA] * 16
    alone = 16 * 8 * 4
    assert clocks(A100, draw + multiply) < 1.25 * alone
    barrier = ["BAR.SYNC.DEFER_BLOCKING 0x0"]
    assert clocks(A100, draw + barrier + multiply + barrier) > 1.9 * alone


def test_asynchronous_copies_hide_the_latency_that_a_wait_for_all_shows():
    copy = ["LDGSTS.E.BYPASS.128 [R1], [R2]", "LDGDEPBAR"]
    work = [HMMA] * 32

    def with_waits_for_all_but(groups):
        return clocks(H100, [*copy, f"DEPBAR.LE SB0, 0x{groups}", *work], warps=4)

    exposed, hidden = with_waits_for_all_but(0), with_waits_for_all_but(6)
    assert exposed == pytest.approx(32 * H100.mma + H100.latency_clocks, rel=0.05)
    assert hidden == pytest.approx(32 * H100.mma, rel=0.05)


def test_a_warpgroup_multiplies_while_its_warps_go_on():
    ops = ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x64x16.F32.BF16", "HMMA.16816.F32.BF16", "HFMA2")
    assert [sass.products(op) for op in ops] == [16, 8, 1, 0]
    multiply = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"] * 4
    wait, draw = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"], [MUFU] * 24
    products, drawn = 4 * 16 * cards.WGMMA, 24 * cards.MUFU
    beside = clocks(H200, multiply + draw + wait, warps=4)
    after = clocks(H200, multiply + wait + draw, warps=4)
    assert beside == pytest.approx(products + cards.WGMMA_LATENCY, rel=0.05)
    assert after == pytest.approx(products + cards.WGMMA_LATENCY + drawn, rel=0.1)
    narrow = [line.replace("128", "64") for line in multiply]
    assert clocks(H200, narrow + wait) == pytest.approx(4 * products / 2, rel=0.1)


def test_every_second_four_warps_may_go_another_way():
    """Two warps of a scheduler both draw, or one of them multiplies meanwhile."""
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    draw, multiply = (function(*[line] * 32, barrier).instructions for line in (MUFU, HMMA))
    assert simulate(A100, draw, 8).clocks == pytest.approx(2 * 32 * cards.MUFU, rel=0.1)
    apart = simulate(A100, draw, 8, other=multiply).clocks
    assert apart == pytest.approx(32 * cards.MUFU, rel=0.1)


def test_a_burst_comes_as_fast_as_l2_sends_it():
    """16 KB of an SM that computes in between, so that it keeps to its share on the whole."""
    load, work = ["LDG.E.128 R4, [R2] sets=0"] * 8, [MUFU] * 200
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    turn = clocks(H200, [*load, "FADD R1, R4, R5 waits=0", *work, barrier], warps=4)
    came = H200.latency_clocks + 8 * 512 * 4 / cards.L2_BYTES
    assert turn == pytest.approx(200 * cards.MUFU + came, rel=0.05)
    assert turn < 0.9 * (200 * cards.MUFU + H200.latency_clocks + 8 * 512 * 4 / H200.share)


def test_an_unknown_instruction_is_named():
    with pytest.raises(ValueError, match="QMMA"):
        clocks(H100, ["QMMA.16832 R4, R8, R12, R4"])


def test_a_barrier_that_some_warps_never_reach_is_told():
    lines = function("BAR.SYNC 0x0", "BAR.SYNC 0x0").instructions
    assert simulate(H100, lines, 3).clocks > 0  # all reach it, however many they are


# What a kernel with guards looks like: 16 bytes at once, or element by element at the edge.
GUARDED = [
    "S2R R0, SR_CTAID.X",
    "top: @P0 BRA {edge}",
    "LDG.E.128 R4, [R2] sets=0",
    "BRA {compute}",
    *["edge: LDG.E.U16 R4, [R2] sets=0", *["LDG.E.U16 R5, [R2] sets=0"] * 7],
    "compute: HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P1 BRA {next}",
    "MUFU.SQRT R1, R2",
    "CALL.REL.NOINC {far}",
    "next: @P2 BRA {top}",
    "EXIT",
    "far: RET",
]


def names(loop):
    return [x.name for x in loop.trace]


def test_the_main_way_through_a_loop_takes_16_bytes_at_a_time_and_calls_nothing():
    (loop,) = main_loops.main_loops(function(*GUARDED))
    assert names(loop) == ["BRA", "LDG", "BRA", "HMMA", "BRA", "BRA"]
    assert (loop.accesses(16), loop.accesses(1, 2, 4), loop.count("HMMA")) == (1, 0, 1)
    assert [x.name for x in main_loops.way_to(function(*GUARDED), loop)] == ["S2R"]


def test_the_way_to_a_main_loop_leads_through_no_other():
    lines = ["S2R R0, SR_TID.X", "@P0 BRA {lean}", "edge: LDG.E.128 R4, [R2]"]
    lines += ["LDG.E R4, [R2]"] * 8 + [HMMA, "@P1 BRA {edge}"]
    code = function(*lines, "lean: LDG.E.128 R4, [R2]", "@P2 BRA {lean}", "EXIT")
    (loop,) = main_loops.main_loops(code)
    assert [x.name for x in main_loops.way_to(code, loop)] == ["S2R", "BRA"]


def test_what_was_moved_is_computed_with_and_not_skipped():
    lines = ["top: LDG.E.128 R4, [R2]", "@P1 BRA {next}", "MUFU.SQRT R1, R2", "next: @P2 BRA {top}"]
    (loop,) = main_loops.main_loops(function(*lines, "EXIT"))
    assert names(loop) == ["LDG", "BRA", "MUFU", "BRA"]


def test_numbers_that_serve_many_turns_are_not_counted_in_one():
    draw = ["IMAD.WIDE.U32 R2, R4, R5, R6"] * 8
    lines = ["top: LDG.E.128 R4, [R2]", "@P1 BRA {next}", *draw, "next: @P2 BRA {top}", "EXIT"]
    (loop,) = main_loops.main_loops(function(*lines))
    assert names(loop) == ["LDG", "BRA", "BRA"]


def test_of_a_lean_and_a_guarded_loop_the_lean_one_is_the_main_one():
    lean = ["lean: LDG.E.128 R4, [R2]", "LDG.E R5, [R2]", HMMA, "@P0 BRA {lean}"]
    edge = [line.replace("top", "rest").replace("far", "away") for line in GUARDED[1:]]
    edge = [re.sub(r"\b(edge|compute|next)\b", r"\1_rest", line) for line in edge]
    (loop,) = main_loops.main_loops(function(*lean, *edge))
    assert names(loop) == ["LDG", "LDG", "HMMA", "BRA"]
    assert loop.accesses(4) == 1  # without guards every access counts


def test_a_loop_that_multiplies_is_the_main_one_and_not_its_guards():
    lines = ["top: @P0 BRA {guard}", *["LDGSTS.E.BYPASS.128 [R1], [R2]"] * 2, "BRA {multiply}"]
    lines += ["guard: LDG.E.128 R4, [R2]", "STS.128 [R1], R4", "@P1 BRA {guard}"]
    code = function(*lines, f"multiply: {HMMA}", "@P2 BRA {top}", "EXIT")
    (loop,) = main_loops.main_loops(code)
    assert names(loop) == ["BRA", "LDGSTS", "LDGSTS", "BRA", "HMMA", "BRA"]
    assert (loop.loaded, loop.accesses(16)) == (32, 2)


def test_a_loop_that_only_reads_is_the_main_one_and_not_an_epilogue():
    lines = ["top: LDG.E.128 R4, [R2]", "@P0 BRA {top}", "end: LDG.E.128 R4, [R2]"]
    (loop,) = main_loops.main_loops(function(*lines, "STG.E.128 [R2], R4", "@P1 BRA {end}", "EXIT"))
    assert names(loop) == ["LDG", "BRA"]


def test_warps_move_before_they_multiply_or_after_and_never_twice():
    lines = ["top: @P0 BRA {multiply}", "LDGSTS.E.BYPASS.128 [R1], [R2]", "LDGDEPBAR"]
    lines += [f"multiply: {HMMA}", "@P1 BRA {next}", "LDGSTS.E.BYPASS.128 [R1], [R2]", "LDGDEPBAR"]
    (loop,) = main_loops.main_loops(function(*lines, "next: @P2 BRA {top}", "EXIT"))
    before = ["BRA", "LDGSTS", "LDGDEPBAR", "HMMA", "BRA", "BRA"]
    after = ["BRA", "HMMA", "BRA", "LDGSTS", "LDGDEPBAR", "BRA"]
    assert sorted([x.name for x in way] for way in loop.ways) == sorted([before, after])


def test_a_guard_that_a_branch_decides_is_decided():
    """A load of whole tiles under the guard whose branch skips the edge's: one of them happens."""
    lines = ["top: @!P1 LDG.E.128 R4, [R2]", "@!P1 BRA {next}", "LDG.E.128 R4, [R2]"]
    (loop,) = main_loops.main_loops(function(*lines, "next: @P0 BRA {top}", "EXIT"))
    assert loop.accesses(16) == 1
    set_between = [lines[0], "ISETP.GE.AND P1, PT, R1, R2, PT", *lines[1:]]
    (loop,) = main_loops.main_loops(function(*set_between, "next: @P0 BRA {top}", "EXIT"))
    assert loop.accesses(16) == 2


def test_of_loops_with_and_without_squares_those_with_them_count():
    def loop(i, transposed, *more):
        multiply = f"HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]{transposed}, R24, gsb0"
        return [f"a{i}: LDGSTS.E.BYPASS.128 [R1], [R2]", multiply, *more, f"@P0 BRA {{a{i}}}"]

    squares = ["FFMA R1, R2, R2, R1"] * 8
    lines = loop(0, "") + loop(1, "", *squares) + loop(2, ".tnspA") + loop(3, ".tnspA", *squares)
    found = main_loops.main_loops(function(*lines, "EXIT"))
    assert [(x.orientation, x.count("FFMA")) for x in found] == [("row", 8), ("column", 8)]
    (row, _) = loop_figures.figures("project_tiles<bfloat16, 128, Gaussian>", function(*lines))
    assert (row.elements, row.tensor, row.accesses) == (32, 16, {16: 1})


def test_the_innermost_loop_is_the_main_one():
    lines = ["top: MUFU.LG2 R1, R2", "in: LDG.E.128 R4, [R2]", "@P0 BRA {in}", "@P1 BRA {top}"]
    (loop,) = main_loops.main_loops(function(*lines, "EXIT"))
    assert names(loop) == ["LDG", "BRA"]


def test_a_loop_that_far_code_belongs_to_is_found_whole():
    """ptxas moves rare blocks behind the kernel's end: an edge back from there is no loop."""
    lines = [
        "top: LDG.E.128 R4, [R2]",
        "@P0 BRA {rare}",
        "back: @P1 BRA {top}",
        "EXIT",
        "rare: FADD R1, R2, R3",
        "BRA {back}",
    ]
    code = function(*lines)
    assert [len(loop.blocks) for loop in code.loops] == [3]
    (loop,) = main_loops.main_loops(code)
    assert names(loop) == ["LDG", "BRA", "BRA"]


@pytest.mark.parametrize("first", [0, 1])
def test_fragments_that_come_as_they_lie_mean_channels_by_row(first):
    loops = [
        [f"a{i}: LDG.E.128 R4, [R2]", f"LDSM.16.{kind}.4 R4, [R2]", f"@P0 BRA {{a{i}}}"]
        for i, kind in enumerate(("M88", "MT88"))
    ]
    if first:
        loops.reverse()
    found = main_loops.main_loops(function(*loops[0], *loops[1], "EXIT"))
    assert [loop.orientation for loop in found] == (
        ["column", "row"] if first else ["row", "column"]
    )
    for loop in found:
        transposed = any("MT88" in x.op for x in loop.trace)
        assert loop.orientation == ("column" if transposed else "row")


def test_a_kernel_without_a_loop_is_its_own_main_loop():
    lines = ["@P0 BRA {end}", "LDG.E.128 R4, [R2]", "STG.E.128 [R2], R4", "end: EXIT"]
    (loop,) = main_loops.main_loops(function(*lines))
    assert names(loop) == ["BRA", "LDG", "STG", "EXIT"]


def test_elements_follow_the_bytes_of_a_turn():
    """apply<bfloat16, float> stores 2 bytes per weight; scales may come by 16 bytes as well."""
    lines = ["top: LDG.E.128 R4, [R2]"] + ["LDG.E.128 R4, [R2]"] * 6 + ["STG.E.128 [R2], R4"] * 2
    code = function(*lines, "@P0 BRA {top}", "EXIT")
    (figures,) = loop_figures.figures("apply_update<bfloat16, float>", code)
    assert (figures.elements, figures.instructions, figures.accesses) == (16, 10, {16: 9})
    (figures,) = loop_figures.figures("project_dots<float, 1, Gaussian>", code)
    assert figures.elements == 28
    assert loop_figures.figures("scale_channels", code) == []


def test_a_block_reads_what_the_sources_say():
    """The tiles that predict.py knows are those of apollo.h and sparse_share.h."""
    header = (ROOT / "csrc" / "apollo.h").read_text()
    share = (ROOT / "csrc" / "sparse_share.h").read_text()
    assert "kDotChannels = 64, kDotColumns = 256" in header
    assert "return pieces(dtype) == 1 ? 256 : 128;" in header
    assert "return !by_row ? 32 / sparse_load(dtype)" in share
    assert "return unit == 8 ? 4 : 8;" in share  # channels of each of 8 warps
    draw, source = ((ROOT / "csrc" / f).read_text() for f in ("draw.cuh", "project_source.cuh"))
    assert "kStep = 32;" in header
    assert f"kTileThreads = {loop_figures.TILE_THREADS};" in draw
    assert "kSteps = kPieces<T> == 1 ? 2 : 1;" in source
    channels = predict.MMA_CHANNELS
    turns = {dtype: n // channels[dtype] // 32 for dtype, n in loop_figures.TILES.items()}
    assert turns == {"bfloat16": 2, "float16": 1, "float": 1}
    vectors = predict.STREAM_VECTORS
    assert re.search(rf"kApplyVectors = {vectors} \* 256|kStreamVectors = {vectors};", header)


def test_the_floors_are_the_designs():
    """LLaMA-7B, two reads of G (rank 128, 256), and fused AdamW, in ms: design's table."""
    floors = {
        "A100": (32.4, 34.3),
        "RTX 4090": (59.8, 63.4),
        "H100": (19, 20.1),
        "H200": (12.8, 13.6),
    }
    adamw = {"A100": 53.3, "RTX 4090": 98.5, "H100": 31.3, "H200": 21.1}
    for card in CARDS.values():
        model = predict.StepModel(card, {})
        assert model.adamw_ms() == pytest.approx(adamw[card.name], abs=0.1)
        for rank, ms in zip((128, 256), floors[card.name], strict=True):
            assert model.floor_ms(rank) == pytest.approx(ms, abs=0.1)


def test_a_kernel_bound_by_memory_is_predicted_near_its_floor_and_another_is_not():
    def share(*work):
        lines = ["S2R R0, SR_CTAID.X", "top: LDG.E.128 R4, [R2] sets=0"]
        lines += ["LDG.E.128 R4, [R2] sets=0"] * 7 + ["FADD R1, R4, R5 waits=0", *work]
        code = function(*lines, "@P0 BRA {top}", "EXIT")
        kernel = predict.Kernel("project_dots<bfloat16, 1, Gaussian>", code, 256, 3)
        return predict.predict(kernel, "row", H200, 4096, 1).share

    assert share() == pytest.approx(predict.STREAM)
    # 200 MUFU for 64 elements of a lane: 24 warps, 4 schedulers, 8 clocks each.
    bound = 8 * 512 * 24 / H200.share / (200 * 8 * 24 / 4)
    assert share(*[MUFU] * 200) == pytest.approx(bound, rel=0.05)


def test_a_cards_own_steps_stand_beside_the_predicted_ones(tmp_path, monkeypatch):
    import predictions

    from apollo_kernels.commands import peers

    def row(optimizer, ms=None, **changes):
        found = {"model": "7b", "dtype": "bfloat16", "optimizer": optimizer, "layers": "32/32"}
        return found | ({} if ms is None else {"ms": ms}) | changes

    rows = [row("ours cuda, rank 256", 30.0), row("ours cuda, Mini", 8.0, layers="2/32, scaled"),
            row(f"ours cuda, rank 128{peers.SPARSE}", 10.0), row("AdamW fused", 9.0),
            row("ours triton, Mini", 9.0), row("ours cuda, rank 128"),
            row("ours cuda, Mini", 9.0, model="1b")]  # fmt: skip
    for folder in ("nvidia-h200", "nvidia-h20", "cpu-x86_64"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "step.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(predict.StepModel, "step_ms", lambda self, *_: 0.25 * (self.layers + 8))
    found = predictions.beside_measured({A100: {}, H200: {}}, tmp_path)
    assert [tuple(row.values()) for row in found] == [
        ("nvidia-h200", "gaussian, rank 256", 10.0, 30.0, 3.0),
        ("nvidia-h200", "Mini", 40.0, 8.0, 0.2),
        ("nvidia-h200", "sparse, rank 128", 10.0, 10.0, 1.0),
    ]


def test_every_constant_says_where_it_is_from():
    """A line of cards.py that sets a number names a source."""
    text = Path(cards.__file__).read_text()
    sources = set(re.findall(r"^\[(\w+)\]", text, re.MULTILINE))
    assert sources == {"guide", "sheet", "luo", "copy", "fit", "guess"}
    for line in re.findall(r"^[A-Z][A-Z0-9_]+ = \d.*$", text, re.MULTILINE):
        assert re.search(rf"\[({'|'.join(sources)})\]", line), line
