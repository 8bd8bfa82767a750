"""Which back end runs on a device, and why another one does not.

A back end is a module with

    takes(item)                 whether its kernels take an item; reference.py steps the others
    family(item)                items of one family may share a Batch (their dtypes, say)
    build(items, separate=...)  a Batch, and build_dense(items) a DenseBatch (batch.py)
    BY_ADDRESS                  its batches walk addresses; else plan.py lends them the gradients
    SAME_ORDER                  a gradient must lie in memory in the order of its weight

They are tried in the order of BACKENDS, fastest first; a new one joins in ``_unavailable`` and
``load``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from types import ModuleType

import torch

from apollo_kernels import cuda, reference

BACKENDS = ("cuda", "triton", "torch")
ENVIRONMENT = "APOLLO_KERNELS_BACKEND"
OLDEST_TRITON = (3, 6)


def _unavailable(name: str, device: torch.device) -> str | None:
    """Why back end ``name`` cannot run on ``device``; None if it can."""
    if name == "torch":
        return None
    if name == "cuda":
        return cuda.unavailable(device)
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type!r}"
    return _no_triton() or _too_old(device)


@functools.cache  # asked at each step
def _no_triton() -> str | None:
    """Why no Triton kernel can be compiled here."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TRITON:
            return f"needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer, found {version}"
    return None


def _too_old(device: torch.device) -> str | None:
    if torch.version.cuda is not None and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs compute capability 8.0 (bf16 dots), the device has {major}.{minor}"
    return None


def _interpreted(name: str, device: torch.device) -> bool:
    """Whether Triton's interpreter was asked for: slow, on CPU tensors, for tests alone."""
    asked = os.environ.get("TRITON_INTERPRET") == "1" and device.type == "cpu"
    return name == "triton" and asked and _no_triton() is None


def backends(device: torch.device | str = "cpu") -> list[tuple[str, str | None]]:
    """Every back end, fastest first, with the reason why it cannot run on ``device`` or None."""
    return [(name, _unavailable(name, torch.device(device))) for name in BACKENDS]


def check_name(name: str, source: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of {('auto', *BACKENDS)}, got {name!r}")


def choose(backend: str = "auto", device: torch.device | str = "cpu") -> str:
    """The name of the back end to run on ``device``.

    Args
        backend: "auto" takes APOLLO_KERNELS_BACKEND from the environment, and without it the first
            back end that can run; a name demands that one.
    Raises
        ValueError: for an unknown name.
        RuntimeError: if the demanded back end cannot run; the message says why.
    """
    check_name(backend, "backend")
    source = "backend"
    if backend == "auto":
        source, backend = ENVIRONMENT, os.environ.get(ENVIRONMENT, "auto")
        check_name(backend, source)
    reasons = dict(backends(device))
    if backend == "auto":
        return next(name for name, reason in reasons.items() if reason is None)
    if reasons[backend] is not None and not _interpreted(backend, torch.device(device)):
        raise RuntimeError(f"{source}={backend!r} cannot run: {reasons[backend]}")
    return backend


def load(name: str) -> ModuleType:
    """The module of back end ``name``, as answered by ``choose``."""
    if name == "triton":  # only where it runs: the import takes a second
        return importlib.import_module("apollo_kernels.triton_kernels.step")
    return {"cuda": cuda, "torch": reference}[name]


def check_capturable(name: str, device: torch.device, capturable: bool) -> None:
    """Raises where a step would have to ask the host inside of a CUDA graph."""
    if name == "torch" and capturable and device.type == "cuda":
        raise RuntimeError("capturable=True needs a kernel back end; 'torch' reads the host")
