"""csrc/ as nvcc compiles it, with the interpreter in the place of a card.

nvcc compiles launch.cu once: its PTX is what the interpreter runs, and its host part, with plan.cpp
and the bindings, becomes the Python module that cuda.py drives. Between them stands cudart.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import torch

from .machine import Device
from .memory import Region
from .parser import Module

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(__file__).parent


def nvcc() -> str | None:
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(home / "bin"))


def why_not() -> str | None:
    """Why nothing can be compiled here, or None."""
    if nvcc() is None:
        return "no nvcc"
    return None if shutil.which("g++") else "no g++"


def build(architecture: str = "80") -> Path:
    """The folder with launch.ptx and apollo_ptx.so, under build/ by what they were made of."""
    import pybind11

    compiler, csrc = nvcc(), ROOT / "csrc"
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    made_of = hashlib.sha256(version)
    sources = [*csrc.iterdir(), FOLDER / "cudart.cpp", FOLDER / "module.cpp", Path(__file__)]
    for path in sorted(sources):
        made_of.update(path.name.encode() + path.read_bytes())
    out = ROOT / "build" / "ptx" / f"sm_{architecture}-{made_of.hexdigest()[:16]}"
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:  # two pytest workers may ask at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (out / "apollo_ptx.so").exists():
            return out
        sources = [FOLDER / "cudart.cpp", FOLDER / "module.cpp"]
        sources += [csrc / name for name in ("launch.cu", "plan.cpp", "kernel_bindings.cpp")]
        code = f"arch=compute_{architecture},code=compute_{architecture}"
        compiled = [  # CMake's Release flags
            compiler, "-c", "-std=c++17", "-O3", "-DNDEBUG", "-gencode", code,
            "-Xcompiler=-fPIC,-fvisibility=hidden", "--keep", "--keep-dir", str(out),
            f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}",
            *map(str, sources), "--output-directory", str(out),
        ]  # fmt: skip
        subprocess.run(compiled, check=True)
        objects = [str(out / f"{source.stem}.o") for source in sources]
        linked = out / "linked.so"
        subprocess.run(["g++", "-shared", *objects, "-o", str(linked)], check=True)
        for left in out.iterdir():  # what --keep has kept beside the PTX
            if left.suffix in (".ii", ".cpp", ".c", ".gpu", ".fatbin", ".o"):
                left.unlink()
        linked.rename(out / "apollo_ptx.so")
    return out


class Kernels(NamedTuple):
    """The compiled kernels: their PTX, and the module that launches them."""

    ptx: Module
    native: Any


@functools.cache
def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("apollo_ptx", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels(architecture: str = "80") -> Kernels:
    folder = build(architecture)
    return Kernels(Module((folder / "launch.ptx").read_text()), _load(folder / "apollo_ptx.so"))


def region(t: torch.Tensor, name: str, writable: bool = True) -> Region:
    """From a tensor's first element to its last: gaps between rows are inside of it."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    size = (last + 1) * t.element_size() if t.numel() else 0
    return Region(t.data_ptr(), size, writable, name)


@contextlib.contextmanager
def running(compiled: Kernels, device: Device, memory: list[Region]) -> Iterator[None]:
    """Within it, backend="cuda" runs on CPU tensors: every launch is interpreted, and may touch
    ``memory`` only, to which regions may be added."""
    failed: list[BaseException] = []

    def launch(name: bytes, grid: int, block: int, shared: int, args: Any) -> int:
        try:
            kernel = compiled.ptx.kernel(name.decode())
            sizes = [size for _, size in kernel.params.values()]
            given = [ctypes.string_at(args[i], size) for i, size in enumerate(sizes)]
            device.launch(kernel, grid, block, shared, given, memory)
        except BaseException as error:
            failed.append(error)
            return 1
        return 0

    pointers = ctypes.POINTER(ctypes.c_void_p)
    form = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, pointers
    )
    callback = form(launch)
    ctypes.CDLL(compiled.native.__file__).set_launch(callback)
    try:
        with emulated.device(compiled.native):
            yield
    except RuntimeError:
        if failed:
            raise failed[0] from None
        raise
    finally:
        ctypes.CDLL(compiled.native.__file__).set_launch(None)


def batch_memory(batch: Any) -> Sequence[Region]:
    """What a batch of cuda.py owns."""
    found = [
        region(batch.table, "table", False), region(batch.maps, "maps", False),
        region(batch.workspace, "workspace"),
    ]  # fmt: skip
    norms = getattr(batch, "_norms", None)
    return found if norms is None else [*found, region(norms, "norms")]
