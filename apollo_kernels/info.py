"""What ``python -m apollo_kernels info`` tells: versions, back ends, and why each does not run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from apollo_kernels import _version, backends, native


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    if native._C is not None:
        why = _reason("_cuda_why.txt")
        return {"present": True, **native._C.build_info(), "cuda_why": why}
    reason = _reason("_no_native.txt") or "not built: run pip install . or -e ."
    return {"present": False, "reason": reason}


def _reason(name: str) -> str | None:
    """What setup.py has noted at the build."""
    note = Path(__file__).with_name(name)
    return note.read_text().strip() if note.exists() else None


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def collect() -> dict[str, Any]:
    """Everything as plain Python values, ready for JSON."""
    devices = {}
    for device in _devices():
        entry: dict[str, Any] = {"rejected": {k: v for k, v in backends.backends(device) if v}}
        try:
            entry["runs"] = backends.choose("auto", device)
        except (RuntimeError, ValueError) as error:
            entry["runs"], entry["error"] = None, str(error)
        if device != "cpu":
            entry["name"] = torch.cuda.get_device_name(device)
            entry["capability"] = list(torch.cuda.get_device_capability(device))
        devices[device] = entry
    return {
        "apollo_kernels": _version.__version__,
        "location": str(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "apollo_torch": _installed("apollo-torch"),
        "transformers": _installed("transformers"),
        "native_module": _native(),
        "environment": {backends.ENVIRONMENT: os.environ.get(backends.ENVIRONMENT)},
        "devices": devices,
    }


def as_text(info: dict[str, Any]) -> str:
    """The same as paste-ready lines."""
    lines = []
    for key, value in info.items():
        if not isinstance(value, dict):
            lines.append(f"{key:<16}{'none' if value is None else value}")
    native = info["native_module"]
    if native["present"]:
        lines.append(f"{'native module':<16}{native['compiler']}, {native['build_type']}")
        built = f"CUDA {native['cuda_toolkit']}, for {native['cuda_architectures']}"
        kernels = built if native["cuda"] else f"no: {native['cuda_missing']}"
        why = native["cuda_why"]
        more = f" ({why})" if why and why not in kernels else ""
        lines.append(f"{'CUDA kernels':<16}{kernels}{more}")
    else:
        lines.append(f"{'native module':<16}no: {native['reason']}; PyTorch draws the projections")
    for name, value in info["environment"].items():
        lines.append(f"{name} {'is not set' if value is None else f'= {value}'}")
    for device, entry in info["devices"].items():
        title = f"{device} ({entry['name']})" if "name" in entry else device
        lines.append(f"\n{title}: back end {entry['runs'] or 'NONE'}")
        if "error" in entry:
            lines.append(f"  {entry['error']}")
        lines += [f"  not {name}: {reason}" for name, reason in entry["rejected"].items()]
    return "\n".join(lines)


def add_arguments(parser: Any) -> None:
    parser.description = (
        "Versions, devices, and for each device the back end that runs and why no other does: what "
        "a report of a problem should begin with."
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")


def command(options: Any) -> str:
    collected = collect()
    return json.dumps(collected, indent=2) if options.json else as_text(collected)
