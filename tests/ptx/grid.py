"""`make test-ptx`: the whole grid, sm_90, and other orders of warps and blocks.

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
from ptx.cases import BF16, F32, Case, Host, bits, take
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


def body(compiled):
    """PTX without its header: what differs between architectures that take the same branches."""
    return re.sub(r"^\.(version|target) .*$", "", compiled.ptx.text, flags=re.MULTILINE)


def test_sm_90_takes_the_same_steps():
    hopper = cuda_host.kernels(90)
    if body(hopper) == body(cuda_host.kernels()):
        return
    running = functools.partial(cuda_host.running, hopper)
    for case in selection.selection():
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
