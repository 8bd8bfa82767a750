"""Which back end runs, and the two calls that every back end answers.

A back end is a module with ``step_low_rank`` and ``step_dense`` (signatures: reference.py). They
are tried in the order of BACKENDS, fastest first; a new one joins in ``_unavailable`` and ``load``.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch

from apollo_kernels import cuda, reference

BACKENDS = ("cuda", "triton", "torch")
ENVIRONMENT = "APOLLO_KERNELS_BACKEND"


def _unavailable(name: str, device: torch.device) -> str | None:
    """Why back end ``name`` cannot run on ``device``; None if it can."""
    if name == "torch":
        return None
    if name == "cuda":
        return cuda.unavailable(device)
    if device.type != "cuda":
        return f"needs a CUDA device, the tensors are on {device.type!r}"
    return "this version of apollo_kernels has no Triton kernels"


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
    if reasons[backend] is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run: {reasons[backend]}")
    return backend


def load(name: str) -> ModuleType:
    """The module of back end ``name``, as answered by ``choose``."""
    return {"cuda": cuda, "torch": reference}[name]
