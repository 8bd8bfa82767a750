"""`make test-ptx`: the whole grid, sm_90a, and other orders of warps and blocks.

No test_ in its name, so that `make test` passes it by.
"""

import functools
import itertools
import os
import re

import pytest
from test_ptx import host, needs_nvcc

from apollo_kernels import cuda
from ptx import arithmetic, cuda_host, mutants, selection
from ptx.cases import BF16, F32, Case, Host, bits, launched, take
from ptx.machine import Device

pytestmark = [needs_nvcc, pytest.mark.timeout(1800)]
EVERY = int(os.environ.get("EVERY", "1"))  # EVERY=10 takes a tenth of the grid


def backwards(blocks):
    return range(blocks - 1, -1, -1)


@pytest.mark.parametrize("case", list(selection.grid())[::EVERY], ids=str)
def test_grid(case):
    device = Device()
    assert take(host(), device, case) == []
    assert set(device.findings) == set()


@pytest.mark.parametrize("case", selection.selection(), ids=str)
def test_no_order_of_warps_and_blocks_changes_a_bit(case):
    expected = bits(host(), Device(), case)
    for ahead, blocks in itertools.product((0, 1, -1), (range, backwards)):
        device = Device(ahead=ahead, blocks=blocks)
        assert bits(host(), device, case) == expected
        assert set(device.findings) == set()


@pytest.mark.parametrize(
    "case", [c for c in selection.selection() if c.proj == "gaussian"], ids=str
)
def test_the_documented_errors_of_approximations_and_sums_are_tolerated(case, monkeypatch):
    monkeypatch.setattr(arithmetic.Model, "noise", 1.0)
    monkeypatch.setattr(arithmetic.Model, "cut_sums", True)
    assert take(host(), Device(), case) == []


def bodies(compiled):
    """The PTX of each kernel by its name."""
    parts = re.split(r"^(?:\.visible )?\.entry (\w+)", compiled.ptx.text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_sm_90a_takes_the_same_steps_where_it_does_not_multiply_by_warpgroups():
    """wgmma, of bf16 tiles, is not interpreted: what runs them is a card (tests/test_gpu.py)."""
    hopper, ampere = cuda_host.kernels("90a"), cuda_host.kernels()
    own, common = bodies(hopper), bodies(ampere)
    by_warpgroups = {name for name, text in own.items() if "wgmma" in text}
    assert by_warpgroups == {name for name in own if re.search("project_tilesI.*8bfloat16", name)}
    other = {name for name in own.keys() - by_warpgroups if own[name] != common.get(name)}
    running = functools.partial(cuda_host.running, hopper)
    for case in selection.selection():
        names = launched(host(), case)
        if names & by_warpgroups or not names & other:
            continue
        device = Device()
        assert take(Host(cuda, running, cuda_host.batch_memory), device, case) == []
        assert set(device.findings) == set()


@pytest.mark.parametrize("mutant", mutants.INLINE, ids=lambda m: m.name)
def test_a_fault_in_inline_ptx_is_seen(mutant):
    assert mutants.seen(mutant)


@pytest.mark.parametrize("rank", [8, 64, 128])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_large_matrices(rank, dtype):
    """Several blocks of every launch, full tiles among them."""
    shapes = ((520, 300), (300, 520))
    device = Device()
    assert take(host(), device, Case(shapes, rank, "sparse", dtype, dtype)) == []
    assert take(host(), device, Case(shapes, rank, "gaussian", dtype, dtype)) == []
    assert not device.findings
