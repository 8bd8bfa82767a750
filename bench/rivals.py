"""The optimizers that convergence.py trains beside ours: each steps the matrices of attention and
MLP, and all else takes AdamW at the same rate as under ours.

A rival joins by an entry in RIVALS: its name, the learning rate its sweep begins at, and how its
optimizer for matrices is made; ``installed`` leaves out what is not there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apollo_kernels.commands import peers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import training

GALORE = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}  # of its paper


class Together(torch.optim.Optimizer):
    """Several optimizers as one: a schedule reaches the groups of all."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        groups = [group for one in optimizers for group in one.param_groups]
        self.optimizers = optimizers
        super().__init__([p for group in groups for p in group["params"]], {})
        self.param_groups = groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.optimizers:
            one.step()

    @property  # type: ignore[override]
    def state(self) -> dict[Any, Any]:
        return {p: state for one in self.optimizers for p, state in one.state.items()}

    @state.setter
    def state(self, value: Any) -> None:
        """The optimizers have their own."""


def _adafactor(matrices: list[Any], lr: float, rank: int) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(matrices, lr=lr)


def _muon(matrices: list[Any], lr: float, rank: int) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _came(matrices: list[Any], lr: float, rank: int) -> torch.optim.Optimizer:
    return importlib.import_module("came_pytorch").CAME(matrices, lr=lr)


def _galore(matrices: list[Any], lr: float, rank: int) -> torch.optim.Optimizer:
    module = peers._published("galore_torch", "adamw")
    return module.AdamW([{"params": matrices, "rank": rank, **GALORE}], lr=lr)


def _apollo_torch(matrices: list[Any], lr: float, rank: int) -> torch.optim.Optimizer:
    made = peers.apollo_torch()
    assert made is not None
    return made([{"params": matrices, "rank": rank, **peers.CHANNEL}], lr=lr)


RIVALS = {
    "Adafactor": (4e-2, _adafactor, "torch"),
    "Muon": (4e-3, _muon, "torch"),
    "CAME": (1e-3 / 32, _came, "came_pytorch"),
    "GaLore": (5e-3, _galore, "galore_torch"),
    "apollo_torch": (training.LEARNING_RATES["apollo"], _apollo_torch, "apollo_torch"),
}
RANKED = ("GaLore", "apollo_torch")


def installed(name: str) -> bool:
    if name == "Muon":
        return hasattr(torch.optim, "Muon")  # from PyTorch 2.9 on
    return importlib.util.find_spec(RIVALS[name][2]) is not None


def _build(name: str, settings: training.Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    ours = training.build_optimizer(settings, model)
    matrices, dense = ours.param_groups
    made = RIVALS[name][1](matrices["params"], matrices["lr"], matrices["rank"])
    return Together(made, torch.optim.AdamW(dense["params"], lr=dense["lr"], weight_decay=0.0))


def build(name: str) -> Any:
    """(settings, model) -> the optimizer, as training.Run takes it; it can be sent to a process."""
    return partial(_build, name)
