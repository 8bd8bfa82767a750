"""What the compiler must have made of the CUDA kernels, read from the built module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apollo_kernels import philox

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import kernel_report  # noqa: E402

pytestmark = pytest.mark.skipif(
    philox._C is None or not philox._C.build_info()["cuda"] or kernel_report.cuobjdump() is None,
    reason="needs a module with CUDA kernels (nvcc at build time), and cuobjdump",
)
ARCHITECTURES = ("sm_80", "sm_90")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def rows(request):
    path = kernel_report.native_module()
    if request.param.removeprefix("sm_") not in philox._C.build_info()["cuda_architectures"]:
        pytest.skip(f"built without {request.param}")
    found = kernel_report.kernels(path, request.param)
    assert len(found) >= 50
    return found


def of(rows, name):
    chosen = [row for row in rows if row["kernel"].startswith(name)]
    assert chosen, name
    return chosen


def test_no_kernel_spills_a_register(rows):
    assert [row["kernel"] for row in rows if row["spills"]] == []


def test_project_and_apply_move_16_bytes_at_a_time(rows):
    streams = ("project_tiles", "project_dots", "project_sparse", "apply_update", "adamw_update")
    for name in streams:
        assert all(row["load 16"] for row in of(rows, name)), name
    for name in ("apply_update", "adamw_update"):
        # Weights of two bytes beside float32 gradients come by 8, and a warp's in whole sectors.
        halves = ("apply_update<bfloat16, float,", "apply_update<float16, float,")
        chosen = [row for row in of(rows, name) if not row["kernel"].startswith(halves)]
        assert all(row["store 16"] for row in chosen), name


def test_project_multiplies_on_tensor_cores(rows):
    for row in of(rows, "project_tiles"):
        assert row["tensor"] >= 16, row["kernel"]


def test_a_block_fits_an_sm(rows):
    """16 warps of project_tiles with 128 registers fill the register file once."""
    for row in rows:
        assert row["registers"] * row["threads"] <= 65536, row["kernel"]
    assert all(row["occupancy"] >= 0.25 for row in of(rows, "apply_update"))


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
    for arch in (80, 86, 89, 90, 100, 120):
        assert f"{arch}" in wanted
        assert f"sm_{arch}." in images
    ptx = subprocess.run([tool, "--list-ptx", path], capture_output=True, text=True).stdout
    assert "sm_120" in ptx
