"""The optimizers that bench_step.py times: ours and their peers, each where it is installed.

A new one joins by an entry in ``optimizers``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

import apollo_kernels

Build = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

APOLLO_KEYS = {"proj": "random", "update_proj_gap": 200, "proj_type": "std"}
CHANNEL = {"scale_type": "channel", "scale": 1.0, **APOLLO_KEYS}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0, **APOLLO_KEYS}


def apollo_torch() -> type[torch.optim.Optimizer] | None:
    """The published APOLLOAdamW, without the rest of its package (and bitsandbytes)."""
    if "apollo_torch.apollo" not in sys.modules:
        spec = importlib.util.find_spec("apollo_torch")
        if spec is None or spec.origin is None:
            return None
        package = types.ModuleType("apollo_torch")  # stands in for an __init__ that imports it all
        package.__path__ = [str(Path(spec.origin).parent)]
        sys.modules["apollo_torch"] = package
        if importlib.util.find_spec("transformers") is None:  # it only checks torch's version there
            for name in ("transformers", "transformers.utils", "transformers.utils.versions"):
                sys.modules[name] = types.ModuleType(name)
            sys.modules["transformers.utils.versions"].require_version = lambda *_: None
    return importlib.import_module("apollo_torch.apollo").AdamW


def optimizers(rank: int) -> dict[str, Build]:
    """Name -> how to build it over a list of matrices, all of which take the low-rank step."""
    ours = apollo_kernels.APOLLOAdamW
    found: dict[str, Build] = {
        "AdamW for-loop": lambda ps: torch.optim.AdamW(ps, foreach=False),
        "AdamW foreach": lambda ps: torch.optim.AdamW(ps, foreach=True),
        "AdamW fused": lambda ps: torch.optim.AdamW(ps, fused=True),
        f"ours rank {rank}": lambda ps: ours([{"params": ps, "rank": rank, **CHANNEL}]),
        "ours Mini": lambda ps: ours([{"params": ps, **MINI}]),
    }
    published = apollo_torch()
    if published is not None:
        found[f"apollo_torch rank {rank}"] = lambda ps: published(
            [{"params": ps, "rank": rank, **CHANNEL}]
        )
        found["apollo_torch Mini"] = lambda ps: published([{"params": ps, **MINI}])
    return found
