"""What a parameter group may ask for: its keys, what their values may be, and its Hyper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from apollo_kernels.batch import Hyper
from apollo_kernels.moments import DENSE_STATES

# What `proj` may be, and the distribution (philox.DISTRIBUTIONS) that it asks for.
PROJECTIONS = {"random": "gaussian", "gaussian": "gaussian"}
PROJECTIONS |= {"rademacher": "rademacher", "sparse": "sparse"}
SCALE_TYPES = ("channel", "tensor")
PROJ_TYPES = ("std", "reverse_std", "left", "right")

# Keys that torch, its schedulers and trainers put into groups: no typing errors.
FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"}
FOREIGN_KEYS |= {"base_momentum", "max_momentum"}
HYPER_KEYS = tuple(f.name for f in dataclasses.fields(Hyper) if f.name != "distribution")
SWITCHES: tuple[str, ...] = ("correct_bias", "maximize", "scale_front", "disable_nl")
SWITCHES += ("stochastic_rounding", "exact_projection")
INTEGERS = ("rank", "update_proj_gap", "batch_dims")


def check_group(group: Mapping[str, Any], where: str = "") -> None:
    """Raises ValueError for the first value of a complete group that cannot be meant.

    ``where`` ends the message, and says which group it is.
    """

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{key} must be {expected}, got {group[key]!r}{where}")

    check_lr(group["lr"], where)
    betas = group["betas"]
    pair = isinstance(betas, (tuple, list)) and len(betas) == 2
    check("betas", pair and all(_number(b) and 0 <= b < 1 for b in betas), "two numbers in [0, 1)")
    for key in ("eps", "weight_decay"):
        check(key, _number(group[key]) and group[key] >= 0, "a number >= 0")
    for key, least in (("rank", 1), ("update_proj_gap", 1), ("batch_dims", 0)):
        value = group[key]
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        good = (whole and int(value) >= least) or (key == "rank" and value is None)
        check(key, good, f"an integer >= {least}")
    check("scale", _number(group["scale"]) and group["scale"] > 0, "a number > 0")
    check("scale_type", group["scale_type"] in SCALE_TYPES, f"one of {SCALE_TYPES}")
    check("proj_type", group["proj_type"] in PROJ_TYPES, f"one of {PROJ_TYPES}")
    check("dense_state", group["dense_state"] in DENSE_STATES, f"one of {DENSE_STATES}")
    known = tuple(PROJECTIONS)
    check("proj", group["proj"] in known, f"one of {known} (an SVD is not offered)")
    check("differentiable", not group["differentiable"], "False: the step has no derivative")
    for key in SWITCHES:
        check(key, isinstance(group[key], (bool, Integral)), "True or False")
    both = bool(group["foreach"] and group["fused"])
    check("fused", not both, "False or None together with foreach=True")


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_lr(lr: Any, where: str = "") -> None:
    """A tensor on a GPU is not read: that would wait for the device."""
    if isinstance(lr, Tensor):
        ok = lr.numel() == 1 and lr.device.type != "meta"
        expected = "a number or a tensor of one element, with memory"
        if ok and lr.device.type == "cpu" and not torch.compiler.is_compiling():
            ok, expected = 0 <= lr.item() < math.inf, "a tensor of one number >= 0"
    else:
        ok, expected = _number(lr) and lr >= 0, "a number >= 0"
    if not ok:
        raise ValueError(f"lr must be {expected}, got {lr!r}{where}")


def check_max_grad_norm(value: Any, gradient_release: bool) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):  # infinity only measures
        raise ValueError(f"max_grad_norm must be None or a number > 0, got {value!r}")
    if value is not None and gradient_release:
        raise ValueError(
            f"max_grad_norm must be None with gradient release, got {value!r}: the norm of all "
            "gradients is known only after the last of them, when the others have been stepped. "
            "Leave it out (the norm-growth limiter already bounds every low-rank step), or train "
            "without gradient release"
        )


def hyper_of(group: Mapping[str, Any]) -> Hyper:
    values = {key: group[key] for key in HYPER_KEYS}
    values["betas"] = tuple(group["betas"])  # a list may change later
    return Hyper(**values, distribution=PROJECTIONS[group["proj"]])
