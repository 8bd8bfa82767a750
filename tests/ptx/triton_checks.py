"""Triton's kernels under the interpreter. tests/test_ptx.py starts this in a process of its own,

    TRITON_INTERPRET=0 pytest tests/ptx/triton_checks.py

since Triton decides when it is imported whether its functions are the interpreter's.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "0":
    pytest.skip("needs TRITON_INTERPRET=0", allow_module_level=True)

from apollo_kernels.triton_kernels import scale, step
from ptx import triton_host
from ptx.cases import BF16, Case, Host, take
from ptx.machine import Device
from ptx.selection import triton_grid, triton_selection

EVERY = int(os.environ.get("EVERY", "1"))
HOST = Host(step, triton_host.running, triton_host.batch_memory)


@pytest.mark.parametrize("case", triton_selection(), ids=str)
def test_the_compiled_kernels_take_the_steps_of_the_restatement(case):
    device = Device()
    assert take(HOST, device, case) == []
    assert not device.findings


# What a change of scale.py must be seen by, and as what. Each was so once.
RANK_ONE = Case(((24, 2150),), 1, weight=BF16, grad=BF16, hyper={"scale_type": "tensor"})
RANK_20 = Case(((24, 70),), 20, weight=BF16, grad=BF16, separate=True)
CHANGES = {
    "lanes that hold one sum are fused differently": (
        "tl.where(inside & some, n * n, 0.0)", "n * n", RANK_20,
        "an instruction stores different values to one place",
    ),
    "moments of rank 1 without a barrier": (
        r"tl.debug_barrier\(\)  # a tile", "pass  # a tile", RANK_ONE, "race in global memory",
    ),
    "limit without a barrier": (
        r"tl.debug_barrier\(\)  # every warp", "pass  # every warp", RANK_ONE,
        "race in global memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_mended_is_seen_where_it_is_undone(name, tmp_path, monkeypatch):
    old, new, case, expected = CHANGES[name]
    source = Path(scale.__file__).read_text()
    old = old if "\\" in old else re.escape(old)
    changed, count = re.subn(old, new, source)
    assert count == 1
    (tmp_path / "scale_changed.py").write_text(changed)
    spec = importlib.util.spec_from_file_location("scale_changed", tmp_path / "scale_changed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(step, "scale", module)
    device = Device()
    take(HOST, device, case)
    assert [f for f in device.findings if expected in f.what], device.findings


@pytest.mark.parametrize("case", list(triton_grid())[::EVERY], ids=str)
def test_grid(case):
    device = Device()
    assert take(HOST, device, case) == []
    assert not device.findings
