"""Every Triton kernel compiles for GPUs that are not here, and spills no register.

What an interpreter cannot show is read from the compiled code: barriers, and sums that are fused.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parent.parent / "bench"


# The others (bench/triton_aot.py --arch): a minute each, and no other code than these two's.
@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_kernel_compiles_without_spills(architecture, tmp_path):
    """In a process of its own: here Triton's functions are the interpreter's."""
    arguments = ["--few", "--arch", architecture, "--out", tmp_path]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, BENCH / "triton_aot.py", *arguments]
    subprocess.run(command, env=environment, check=True, timeout=280)
    rows = json.loads((tmp_path / "triton.json").read_text())
    kernels = {row["kernel"].split()[0].rstrip(",") for row in rows}
    assert kernels == {
        "project", "project_sparse", "combine", "limit", "apply", "begin", "adamw", "send", "norms",
        "limit_parts",
    }  # fmt: skip
    for row in rows:
        # Spills are instructions; ptxas sometimes keeps a frame of a register or two for none.
        assert row["spills"] == 0 and row["stack"] <= 8 and row["fused"] == 0, row
        # Registers that a product still reads would be overwritten: its operand z is drawn anew.
        assert row["early"] == 0, row
        uses_dots = re.match(r"project .* rank (?!1\b)", row["kernel"]) is not None
        assert (row["tensor"] > 0) == uses_dots, row
        # Where K is contiguous and the rank no multiple of 8, h leaves no runs to be read at once.
        gathers = re.match(r"project_sparse .*(rows rank 20\b|unaligned)", row["kernel"])
        if row["kernel"].startswith(("apply", "adamw", "project")) and not gathers:
            assert row["load 16"] > 0, row  # 16-byte accesses wherever the layout allows them
        if row["kernel"].startswith("combine rank 1,"):
            assert row["barriers"] > 0, row  # several warps read what one of them stores
