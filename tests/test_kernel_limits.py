"""What the compiler must have made of the CUDA kernels, read from the built module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_kernels import philox

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import budgets  # noqa: E402
import kernel_report  # noqa: E402

pytestmark = pytest.mark.skipif(
    philox._C is None or not philox._C.build_info()["cuda"] or kernel_report.cuobjdump() is None,
    reason="needs a module with CUDA kernels (nvcc at build time), and cuobjdump",
)


@pytest.mark.parametrize("architecture", budgets.ARCHITECTURES)
def test_kernels_keep_to_their_budgets(architecture):
    """One test per architecture, since its SASS takes seconds to read: instructions per element of
    the main loops, 16-byte accesses, registers, occupancy; no spills; tensor cores."""
    if architecture.removeprefix("sm_") not in philox._C.build_info()["cuda_architectures"]:
        pytest.skip(f"built without {architecture}")
    binary = kernel_report.Binary(kernel_report.native_module(), architecture)
    rows = binary.rows
    assert len(rows) >= 50
    said = budgets.complaints(architecture, rows) + budgets.beyond_targets(architecture, rows)
    of = f"budgets of CUDA {budgets.toolkit()}, kernels of CUDA {binary.toolkit}:"
    assert not said, "\n".join([of, *said])
    tiles = [row for row in rows if row["kernel"].startswith("project_tiles")]
    assert tiles and all(loop.tensor >= 16 for row in tiles for loop in row["loops"])


def test_no_kernel_of_any_architecture_needs_local_memory():
    """Where registers are spilled, or arrays lie that are indexed."""
    usage = kernel_report.resources(kernel_report.native_module())
    assert len(usage) >= 50
    assert {key for key, used in usage.items() if used["STACK"] or used["LOCAL"]} == set()


def test_the_module_needs_neither_torch_nor_cuda_libraries():
    path = kernel_report.native_module()
    text = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    needed = [line for line in text.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "torch" in line or "cuda" in line or "c10" in line]


def test_the_module_holds_every_architecture_and_ptx():
    wanted = philox._C.build_info()["cuda_architectures"]
    if os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        pytest.skip("built for chosen architectures")
    tool, path = kernel_report.cuobjdump(), str(kernel_report.native_module())
    images = subprocess.run([tool, "--list-elf", path], capture_output=True, text=True).stdout
    for arch in ("80", "86", "89", "90a", "100", "120"):
        assert arch in wanted
        assert f"sm_{arch}." in images
    ptx = subprocess.run([tool, "--list-ptx", path], capture_output=True, text=True).stdout
    assert "sm_120" in ptx
