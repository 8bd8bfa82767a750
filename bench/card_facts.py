"""Runs card_facts.cu on the GPU here: what a card does that no CPU can tell.

python bench/card_facts.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    """The path of nvcc, compute-sanitizer and the like: on PATH, in $CUDA_HOME, in /usr/local."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / folder / name for home in homes if home for folder in ("bin", name)]
    return shutil.which(name) or next(filter(None, (shutil.which(str(p)) for p in places)), None)


def compile_for(arch: str, nvcc: str, program: Path) -> None:
    source = Path(__file__).with_name("card_facts.cu")
    flags = ["-O3", "-std=c++17", "--extended-lambda", f"-arch={arch}", "-o", str(program)]
    subprocess.run([nvcc, *flags, str(source)], check=True, capture_output=True, text=True)


def collect(arch: str) -> dict[str, float]:
    """Name -> value, as card_facts.cu prints them; empty without nvcc.

    Raises
        subprocess.CalledProcessError: if it does not compile or run.
    """
    nvcc = cuda_tool("nvcc")
    if nvcc is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "card_facts"
        compile_for(arch, nvcc, program)
        done = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}


def main() -> None:
    import torch

    major, minor = torch.cuda.get_device_capability()
    for name, value in collect(f"sm_{major}{minor}").items():
        print(f"{name:<32}{value:.6g}")


if __name__ == "__main__":
    main()
