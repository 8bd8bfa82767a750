"""The optimizers that are timed: ours on every back end, and each peer that is installed.

A back end joins by its name in apollo_kernels.backends.BACKENDS; a peer by an entry in ``peers``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apollo_kernels
from apollo_kernels import backends

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

APOLLO_KEYS = {"proj": "random", "update_proj_gap": 200, "proj_type": "std"}
CHANNEL = {"scale_type": "channel", "scale": 1.0, **APOLLO_KEYS}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0, **APOLLO_KEYS}
BASELINE = "AdamW fused"
SPARSE = ", sparse"


def _published(package: str, module: str) -> Any:
    """A module of a published package without the package's __init__, which imports bitsandbytes
    and transformers; None where the package is not installed."""
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return None
        stand_in = types.ModuleType(package)
        stand_in.__path__ = [str(Path(spec.origin).parent)]
        sys.modules[package] = stand_in
    if importlib.util.find_spec("transformers") is None:  # they only check torch's version there
        for name in ("transformers", "transformers.utils", "transformers.utils.versions"):
            sys.modules.setdefault(name, types.ModuleType(name))
        checks: Any = sys.modules["transformers.utils.versions"]
        checks.require_version = lambda *_: None
    return importlib.import_module(f"{package}.{module}")


def apollo_torch() -> type[torch.optim.Optimizer] | None:
    module = _published("apollo_torch", "apollo")
    return None if module is None else module.AdamW


def published_name(ours: str) -> str:
    """The peer that does what one of ours does: "ours torch, Mini" -> "apollo_torch, Mini".

    It knows no sparse projection; beside ours stands its gaussian one of the same rank.
    """
    return "apollo_torch, " + ours.split(", ", 1)[-1].removesuffix(SPARSE)


def ours(rank: int, device: torch.device) -> dict[str, Build]:
    """APOLLO, with either projection, and Mini on every back end that can run on ``device``."""
    found: dict[str, Build] = {}
    for backend, reason in backends.backends(device):
        if reason is None:
            build = functools.partial(apollo_kernels.APOLLOAdamW, backend=backend)
            channel = {"rank": rank, **CHANNEL}
            found[f"ours {backend}, rank {rank}"] = _with_keys(build, channel)
            sparse = {**channel, "proj": "sparse"}
            found[f"ours {backend}, rank {rank}{SPARSE}"] = _with_keys(build, sparse)
            found[f"ours {backend}, Mini"] = _with_keys(build, MINI)
    return found


def _with_keys(build: Callable[..., torch.optim.Optimizer], keys: dict[str, Any]) -> Build:
    return lambda ps: build([{"params": ps, **keys}])


def peers(rank: int, device: torch.device, compiled: bool = False) -> dict[str, Build | str]:
    """Name -> how to build it over matrices that all take its low-rank step, or why it is absent.

    ``compiled``: also the published package under torch.compile, which takes minutes to compile.
    """
    adamw, absent = torch.optim.AdamW, "not installed"
    found: dict[str, Build | str] = {
        "AdamW for-loop": lambda ps: adamw(ps, foreach=False),
        "AdamW foreach": lambda ps: adamw(ps, foreach=True),
        BASELINE: lambda ps: adamw(ps, fused=True),
        "Adafactor": lambda ps: torch.optim.Adafactor(ps),
    }
    published = apollo_torch()
    for label, keys in ((f"rank {rank}", {"rank": rank, **CHANNEL}), ("Mini", MINI)):
        name = f"apollo_torch, {label}"
        found[name] = absent if published is None else _with_keys(published, keys)
        if compiled:
            found[f"{name}, torch.compile"] = (
                absent if published is None else _compiled(_with_keys(published, keys))
            )
    galore = _published("galore_torch", "adamw")
    keys = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    found[f"GaLore, rank {rank}"] = absent if galore is None else _with_keys(galore.AdamW, keys)
    for package, place in (("torchao", "torchao.optim"), ("bitsandbytes", "bitsandbytes.optim")):
        name = f"{package} AdamW8bit"
        if importlib.util.find_spec(package) is None:
            found[name] = absent
        elif device.type != "cuda":
            found[name] = "needs a GPU"
        else:
            found[name] = functools.partial(_eight_bit, place)
    return found


def _eight_bit(module: str, ps: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = importlib.import_module(module).AdamW8bit(ps)
    return made


def _compiled(build: Build) -> Build:
    def make(ps: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        optimizer: Any = build(ps)
        optimizer.step = torch.compile(optimizer.step)
        return optimizer  # type: ignore[no-any-return]

    return make
