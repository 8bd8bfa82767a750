"""Triton's kernels under the interpreter: compiled for an sm_80 that is not there, launched on CPU
tensors. It needs TRITON_INTERPRET=0 before Triton is imported, so a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import triton  # noqa: TID253
from triton.backends.compiler import GPUTarget  # noqa: TID253
from triton.compiler.compiler import CompiledKernel  # noqa: TID253

from .cuda_host import region
from .machine import Device
from .memory import Region
from .parser import Kernel, Module

PACKED = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u8": "<B", "u32": "<I",
          "u64": "<Q", "fp32": "<f", "fp64": "<d"}  # fmt: skip


class Driver:
    """As much of Triton's driver as compiling and launching ask for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cpu"


@functools.cache
def parsed(text: str, name: str) -> Kernel:
    """Variants of one kernel have one name in PTX; their text tells them apart."""
    kernel = Module(text).kernel(name)
    kernel.name = f"{name} {zlib.crc32(text.encode()):08x}"
    return kernel


def changed(compiled: CompiledKernel) -> str:
    """The PTX of a kernel; mutants change it here."""
    return compiled.asm["ptx"]


def _launch(device, memory, compiled, x, y, z, stream, function, packed, meta, enter, leave, *args):
    assert (y, z) == (1, 1)
    m = compiled.metadata
    assert m.global_scratch_size == 0 and m.profile_scratch_size == 0
    kernel = parsed(changed(compiled), m.name)
    given, regions = [], list(memory)
    for (name, kind), value in zip(compiled.src.signature.items(), args, strict=True):
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            given.append(struct.pack("<Q", value.data_ptr()))
            regions.append(region(value, name))
        else:
            given.append(struct.pack(PACKED[kind], value))
    given += [struct.pack("<Q", 0)] * (len(kernel.params) - len(given))  # scratch: none
    device.launch(kernel, x, m.num_warps * 32, m.shared, given, regions)


@contextlib.contextmanager
def running(device: Device, memory: list[Region]) -> Iterator[None]:
    """Within it, the batches of triton/step.py run on CPU tensors: a launch may touch its arguments
    and ``memory``."""
    from apollo_kernels.triton_kernels import project

    def handles(self: Any) -> None:
        self._run = functools.partial(_launch, device, memory, self)
        self.module, self.function = "interpreted", None

    before = CompiledKernel._init_handles, project.FAST
    CompiledKernel._init_handles, project.FAST = handles, True
    triton.runtime.driver.set_active(Driver())
    try:
        yield
    finally:
        CompiledKernel._init_handles, project.FAST = before


def batch_memory(batch: Any) -> list[Region]:
    """What a batch owns comes as arguments of its launches."""
    return []
