"""The PTX interpreter itself: numbers against Python's, and faults that its detectors must find."""

import itertools
import math
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import arithmetic
from ptx.machine import Device
from ptx.memory import Region
from ptx.parser import Module, PtxError

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 128 .b8 dyn[];\n"
BEGIN = """
.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<60>;
.reg .f32 %f<60>;
.reg .b64 %rd<60>;
ld.param.u64 %rd1, [k_param_0];
mov.u32 %r1, %tid.x;
mov.u32 %r2, dyn;
"""


def run(body, data, threads=32, shared=0, grid=1, **options):
    """Runs a kernel whose parameter is the address of the array ``data``."""
    text = f"{HEAD}.visible .entry k(\n.param .u64 k_param_0\n)\n{{\n{BEGIN}{body}\nret;\n}}\n"
    device = Device(**options)
    memory = [Region(data.ctypes.data, data.nbytes, True, "data")]
    given = [struct.pack("<Q", data.ctypes.data)]
    device.launch(Module(text).kernel("k"), grid, threads, shared, given, memory)
    return device


def found(device):
    return sorted({f.what for f in device.findings})


def store_all(names, words=16):
    """Stores registers to data[i, thread]."""
    lines = ["mul.wide.u32 %rd50, %r1, 4;", "add.s64 %rd51, %rd1, %rd50;"]
    lines += [f"st.global.u32 [%rd51+{128 * i}], {name};" for i, name in enumerate(names)]
    return "\n".join(lines)


RANDOM = np.random.default_rng(1)


@pytest.mark.parametrize("name", ["fma32", "fma64"])
def test_fma_rounds_once(name):
    """Against fractions: cancellation, results among the subnormals, and ties of the product that a
    tiny addend breaks."""
    function = getattr(arithmetic, name)
    t, bits, low = (np.float32, 24, -149) if name == "fma32" else (np.float64, 53, -1074)
    a, b = RANDOM.standard_normal((2, 500)).astype(t)
    stretch = RANDOM.choice([1, 1 + 2**-20, 2.0**25, 2.0**-25, 0.5], 500)
    c = -(a.astype(np.float64) * b * stretch).astype(t)
    a = np.r_[a, RANDOM.integers(1, 2**12, 500) * 2.0**-80, [1 + 2.0**-12] * 4].astype(t)
    b = np.r_[b, RANDOM.integers(1, 2**12, 500) * 2.0**-72, [1 + 2.0**-12 + 2.0**-13] * 4].astype(t)
    tiny = [2.0**-80, -(2.0**-80), 2.0**-60, -(2.0**-60)]
    c = np.r_[c, RANDOM.integers(-(2**20), 2**20, 500) * 2.0**-149, tiny].astype(t)
    for x, y, z, got in zip(*(v.tolist() for v in (a, b, c, function(a, b, c))), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        top = math.frexp(float(exact))[1] if abs(exact) > Fraction(2) ** -1000 else -1074
        unit = Fraction(2) ** max(top - bits, low)
        assert Fraction(got) in {round(exact / u) * u for u in (unit, 2 * unit, unit / 2)}
        assert abs(Fraction(got) - exact) <= unit / 2


def test_bf16_is_rounded_as_torch_does():
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-40, 3.4e38, 2.0**-133, 1.5 * 2.0**-134]
    x = np.r_[RANDOM.standard_normal(5000), RANDOM.standard_normal(500) * 6e4, special]
    x = x.astype(np.float32)
    got = arithmetic.from_bf16(arithmetic.to_bf16(x))
    assert np.array_equal(got, torch.tensor(x).bfloat16().float().numpy(), equal_nan=True)


def test_conversions_saturate():
    values = [1.5, -1.5, 2.5, 3e9, -3e9, math.nan, math.inf, -math.inf, 1e20, -1e20, 0.99, -0.99]
    data = np.zeros((5, 32), np.uint32)
    data[0] = np.resize(np.array(values, np.float32), 32).view(np.uint32)
    body = """mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2; ld.global.f32 %f1, [%rd2];
    cvt.rzi.u32.f32 %r3, %f1; cvt.rzi.s32.f32 %r4, %f1; cvt.rzi.s64.f32 %rd4, %f1;
    mov.b64 {%r5, %r6}, %rd4;"""
    run(body + store_all(["%r1", "%r3", "%r4", "%r5", "%r6"]), data)

    def cut(x, low, high, nan):
        return nan if math.isnan(x) else max(low, min(high, math.trunc(max(-1e30, min(1e30, x)))))

    for lane, x in enumerate(np.resize(np.array(values, np.float32), 32).tolist()):
        wide = int(data[3, lane]) | int(data[4, lane]) << 32
        assert data[1, lane] == cut(x, 0, 2**32 - 1, 0)
        assert data[2, lane] == cut(x, -(2**31), 2**31 - 1, 0) % 2**32
        assert wide == cut(x, -(2**63), 2**63 - 1, 2**63) % 2**64


def test_integers():
    p, q = (RANDOM.integers(0, 2**32, 32, dtype=np.uint32) for _ in range(2))
    q[::4] = RANDOM.integers(0, 40, 8)
    q[q == 0] = 1
    data = np.zeros((18, 32), np.uint32)
    data[0], data[1] = p, q
    ops = ["add.s32", "sub.s32", "mul.lo.s32", "mul.hi.u32", "mul.hi.s32", "div.s32", "div.u32",
           "rem.s32", "shl.b32", "shr.u32", "shr.s32", "min.s32", "max.u32", "xor.b32"]  # fmt: skip
    body = ["mul.wide.u32 %rd2, %r1, 4; add.s64 %rd2, %rd1, %rd2;",
            "ld.global.u32 %r3, [%rd2]; ld.global.u32 %r4, [%rd2+128];"]  # fmt: skip
    body += [f"{op} %r{10 + i}, %r3, %r4;" for i, op in enumerate(ops)]
    body += ["shf.l.wrap.b32 %r24, %r3, %r4, %r4; lop3.b32 %r25, %r3, %r4, %r1, 0xCA;"]
    run("\n".join(body) + store_all([f"%r{10 + i}" for i in range(16)]), out := data.copy())

    def s(x):
        return x - 2**32 if x >= 2**31 else x

    for lane, (a, b) in enumerate(zip(p.tolist(), q.tolist(), strict=True)):
        sa, sb = s(a), s(b)
        quotient = abs(sa) // abs(sb) * (1 if (sa < 0) == (sb < 0) else -1)
        want = [a + b, a - b, a * b, a * b >> 32, sa * sb >> 32, quotient, a // b,
                sa - quotient * sb, a << b if b < 32 else 0, a >> b if b < 32 else 0,
                sa >> min(b, 31), min(sa, sb), max(a, b), a ^ b,
                ((b << 32 | a) << (b & 31)) >> 32, (a & b) | (~a & lane)]  # fmt: skip
        assert [int(x) for x in out[:16, lane]] == [w % 2**32 for w in want]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cut", [False, True])
def test_matrices_go_through_shared_memory_into_a_product(transposed, cut, monkeypatch):
    """A [16, 16], which may be stored transposed, and B [16, 8] by ldmatrix; D = A B + C by mma."""
    monkeypatch.setattr(arithmetic.Model, "cut_sums", cut)
    a, b = RANDOM.integers(-8, 9, (16, 16)), RANDOM.integers(-8, 9, (16, 8))
    c = RANDOM.integers(-99, 99, (16, 8)).astype(np.float32)
    data = np.zeros(512 + 256 + 512 + 512, np.uint8)

    def bits(x):
        return arithmetic.to_bf16(x.astype(np.float32)).ravel().view(np.uint8)

    data[:512], data[512:768] = bits(a.T if transposed else a), bits(b.T)
    data[768:1280] = c.ravel().view(np.uint8)
    row, column = ("%r13", "%r12") if transposed else ("%r12", "%r13")
    trans = ".trans" if transposed else ""
    body = f"""
    mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3;
    ld.global.v4.u32 {{%r20,%r21,%r22,%r23}}, [%rd3];
    st.shared.v4.u32 [%r4], {{%r20,%r21,%r22,%r23}};
    setp.lt.u32 %p1, %r1, 16;
    @%p1 ld.global.v4.u32 {{%r20,%r21,%r22,%r23}}, [%rd3+512];
    @%p1 st.shared.v4.u32 [%r4+512], {{%r20,%r21,%r22,%r23}};
    bar.warp.sync -1;
    and.b32 %r10, %r1, 7; shr.u32 %r11, %r1, 3; and.b32 %r12, %r11, 1; shr.u32 %r13, %r11, 1;
    shl.b32 %r14, {row}, 3; add.s32 %r14, %r14, %r10; shl.b32 %r14, %r14, 5;
    shl.b32 %r15, {column}, 4;
    add.s32 %r16, %r14, %r15; add.s32 %r16, %r16, %r2;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r30,%r31,%r32,%r33}}, [%r16];
    shl.b32 %r17, %r10, 5; shl.b32 %r18, %r12, 4; add.s32 %r17, %r17, %r18; add.s32 %r17, %r17, %r2;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r34,%r35}}, [%r17+512];
    shr.u32 %r5, %r1, 2; and.b32 %r6, %r1, 3; shl.b32 %r7, %r5, 5; shl.b32 %r8, %r6, 3;
    add.s32 %r9, %r7, %r8; cvt.u64.u32 %rd4, %r9; add.s64 %rd5, %rd1, %rd4;
    ld.global.v2.f32 {{%f1,%f2}}, [%rd5+768]; ld.global.v2.f32 {{%f3,%f4}}, [%rd5+1024];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
        {{%f1,%f2,%f3,%f4}}, {{%r30,%r31,%r32,%r33}}, {{%r34,%r35}}, {{%f1,%f2,%f3,%f4}};
    st.global.v2.f32 [%rd5+1280], {{%f1,%f2}}; st.global.v2.f32 [%rd5+1536], {{%f3,%f4}};"""
    device = run(body, data, shared=1024)
    assert np.array_equal(data[1280:].view(np.float32).reshape(16, 8), a @ b + c)
    assert found(device) == []


@pytest.mark.parametrize("ahead", [0, 1, -1])
def test_threads_part_and_meet_again(ahead):
    """Collatz lengths: loops of different length, a branch inside, and a shuffle after it."""
    data = np.zeros(64, np.uint32)
    body = """add.s32 %r3, %r1, 1; mov.u32 %r4, 0; bra.uni $L2;
$L3: shr.u32 %r3, %r3, 1; bra.uni $L4;
$L2: setp.eq.s32 %p1, %r3, 1; @%p1 bra $L9;
 and.b32 %r5, %r3, 1; setp.eq.s32 %p2, %r5, 0; @%p2 bra $L3;
 mul.lo.s32 %r3, %r3, 3; add.s32 %r3, %r3, 1;
$L4: add.s32 %r4, %r4, 1; bra.uni $L2;
$L9: shfl.sync.bfly.b32 %r6|%p3, %r4, 5, 31, -1; shfl.sync.down.b32 %r7, %r4, 8, 31, -1;
 add.s32 %r6, %r6, %r7; mul.wide.u32 %rd2, %r1, 8; add.s64 %rd2, %rd1, %rd2;
 st.global.v2.u32 [%rd2], {%r4, %r6};"""
    device = run(body, data, ahead=ahead)

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    want = [collatz(i + 1) for i in range(32)]
    assert data[::2].tolist() == want
    across = [want[i ^ 5] + want[i + 8 if i < 24 else i] for i in range(32)]
    assert data[1::2].tolist() == across
    assert found(device) == []


EXCHANGE = """shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3; st.shared.u32 [%r4], %r1; {between}
xor.b32 %r5, %r3, {distance}; add.s32 %r5, %r5, %r2; ld.shared.u32 %r6, [%r5];"""
WHERE = "mul.wide.u32 %rd2, {}, 4; add.s64 %rd2, %rd1, %rd2;"
COPY = """shl.b32 %r3, %r1, 4; add.s32 %r4, %r2, %r3; shr.u32 %r7, %r1, 1;
mul.wide.u32 %rd2, %r7, 16; add.s64 %rd2, %rd1, %rd2;
cp.async.cg.shared.global [%r4], [%rd2], 16{}; cp.async.commit_group; {}
ld.shared.u32 %r5, [%r4];"""
SEEN = {
    "race": (EXCHANGE.format(between="", distance=128), ["race in shared memory: read"]),
    "barrier": (EXCHANGE.format(between="bar.sync 0;", distance=128), []),
    "predicated barrier": (
        EXCHANGE.format(between="setp.ge.u32 %p1, %r1, 0; @%p1 bar.sync 0;", distance=128), []),
    "within a warp": (EXCHANGE.format(between="bar.warp.sync -1;", distance=64), []),
    "unwritten": (EXCHANGE.format(between="bar.sync 0;", distance=256),
                  ["read of shared memory that nobody wrote"]),
    "half a warp at a barrier": (
        "and.b32 %r3, %r1, 16; setp.eq.u32 %p1, %r3, 0; @%p1 bra $L1; bar.sync 0; bra $L2;\n"
        "$L1: bar.sync 0;\n$L2:",
        ["part of a warp at a barrier", "threads of a block wait at different barriers"]),
    "a lane that is not there": (
        "setp.lt.u32 %p1, %r1, 16; @%p1 bra $L1; shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;\n$L1:",
        ["a .sync instruction without all its members",
         "shfl.sync reads a lane that is not there"]),
    "warps at one place of global memory": (
        "shr.u32 %r3, %r1, 6;" + WHERE.format("%r3") + "st.global.u32 [%rd2], %r1;",
        ["an instruction stores different values to one place in global memory",
         "race in global memory between warps of a block"]),
    "read by a warp, then written by another": (
        "ld.global.u32 %r4, [%rd1]; add.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r1, 0;"
        "@%p1 bra $L1; st.global.u32 [%rd1], %r4;\n$L1:",
        ["race in global memory between warps of a block"]),
    "read by a warp, then written after a barrier": (
        "ld.global.u32 %r4, [%rd1]; add.u32 %r4, %r4, 1; setp.ne.u32 %p1, %r1, 0; bar.sync 0;"
        "@%p1 bra $L1; st.global.u32 [%rd1], %r4;\n$L1:", []),
    "copy that nobody waited for": (
        COPY.format("", ""), ["cp.async that nobody waited for",
                              "read of shared memory that nobody wrote"]),
    "copy that has not landed": (
        COPY.format("", "cp.async.wait_group 1;"),
        ["cp.async that nobody waited for", "read of shared memory that nobody wrote"]),
    "copy that has landed": (COPY.format("", "cp.async.wait_group 0;"), []),
    "copy with zeros": (COPY.format(", 8", "cp.async.wait_all;"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_has_to_be_found_is_found_and_nothing_else(name):
    body, expected = SEEN[name]
    threads = 32 if re.search("copy|half a warp|not there", name) else 64
    assert found(run(body, np.arange(1024, dtype=np.uint32), threads, 2048)) == expected


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.u32 %r3, [%rd1+256];",
        "ld.global.u32 %r3, [%rd1+-4];",
        "ld.global.v4.u32 {%r3,%r4,%r5,%r6}, [%rd1+4];",
        "ld.global.v4.u32 {%r3,%r4,%r5,%r6}, [%rd1+256];",
        "ld.shared.u32 %r3, [%r2+256];",
        "st.shared.u32 [%r2+-4], %r1;",
        "bar.sync 1, 64;",
        "bar.arrive 0, 64;",
        "frobnicate.u32 %r3, %r1;",
        "add.sat.s32 %r3, %r1, %r1;",
    ],
)
def test_what_no_card_would_do_is_refused(body):
    with pytest.raises(PtxError):
        run(body, np.zeros(64, np.uint32), 64, 256)


# The last block to come adds up what all have written. In turn: all is well; no fence before the
# counter; no fence after it.
LAST = """setp.ne.u32 %p1, %r1, 0; mov.u32 %r3, %ctaid.x; mov.u32 %r9, %nctaid.x;
add.u32 %r9, %r9, -1; add.u32 %r4, %r3, 1; mul.wide.u32 %rd2, %r4, 4; add.s64 %rd2, %rd1, %rd2;
@%p1 bra $L1; st.global.u32 [%rd2], %r4;
$L1: bar.sync 0; @%p1 bra $L9;
{} atom.global.inc.u32 %r5, [%rd1], %r9; {}
setp.ne.u32 %p2, %r5, %r9; @%p2 bra $L9;
ld.volatile.global.u32 %r6, [%rd1+4]; ld.volatile.global.u32 %r7, [%rd1+8];
add.u32 %r6, %r6, %r7; st.global.u32 [%rd1+16], %r6;
$L9:"""


def test_the_last_block_may_read_what_the_others_have_released():
    data = np.zeros(8, np.uint32)
    fence = "membar.gl;"
    assert found(run(LAST.format(fence, fence), data, 64, 0, 2)) == []
    assert data[:5].tolist() == [0, 1, 2, 0, 3]  # the counter is zero again
    wrong = ["a block reads what another writes"]
    for before, after in (("", fence), (fence, "")):
        data[:] = 0
        assert found(run(LAST.format(before, after), data, 64, 0, 2)) == wrong


def test_blocks_must_not_meet_in_memory():
    data = np.zeros(8, np.uint32)
    body = "mov.u32 %r3, %ctaid.x; st.global.u32 [%rd1], %r3;"
    assert found(run(body, data, 32, 0, 3)) == ["two blocks write one place"]
    body = "mov.u32 %r3, %ctaid.x; add.u32 %r3, %r3, 1;" + WHERE.format("%r3")
    body += "ld.global.u32 %r4, [%rd2]; st.global.u32 [%rd2+-4], %r3;"
    assert found(run(body, data, 32, 0, 3)) == ["a block reads what another writes"]


@pytest.mark.parametrize(
    ("shift", "kind", "ideal", "used"),
    [
        (2, "u32", 1, 1),
        (3, "u32", 1, 2),
        (7, "u32", 1, 32),
        (4, "v4.u32", 4, 4),
        (5, "v4.u32", 4, 8),
    ],
)
def test_bank_conflicts_are_counted(shift, kind, ideal, used):
    values = "{%r20,%r21,%r22,%r23}" if "v4" in kind else "%r20"
    body = f"shl.b32 %r3, %r1, {shift}; add.s32 %r4, %r2, %r3; st.shared.{kind} [%r4], {values};"
    device = run(body, np.zeros(4, np.uint32), 32, 4096, count=True)
    (((_, _, verb, touched), access),) = device.counters.items()
    assert (verb, touched) == ("store", "shared")
    assert (access.requests, access.ideal, access.used) == (1, ideal, used)


@pytest.mark.parametrize(("stride", "used"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_are_counted(stride, used):
    data = np.zeros(1024 + 8, np.uint32)
    data = data[-data.ctypes.data % 32 // 4 :][:1024]
    body = f"mul.wide.u32 %rd2, %r1, {stride}; add.s64 %rd2, %rd1, %rd2; ld.global.u32 %r3, [%rd2];"
    (access,) = run(body, data, count=True).counters.values()
    assert (access.requests, access.used, access.ideal) == (1, used, 1 if stride == 0 else 4)


def test_every_order_of_warps_gives_one_result():
    body = EXCHANGE.format(between="bar.sync 0;", distance=128) + store_all(["%r6"])
    results = set()
    for ahead, blocks in itertools.product((0, 1, -1), (range, lambda n: range(n - 1, -1, -1))):
        data = np.zeros(64, np.uint32)
        run(body, data, 64, 256, ahead=ahead, blocks=blocks)
        results.add(data.tobytes())
    assert len(results) == 1
