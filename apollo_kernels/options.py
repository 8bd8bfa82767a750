"""What a parameter group may ask for: its keys, what their values may be, and its Hyper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import spelling
from apollo_kernels.batch import Hyper
from apollo_kernels.moments import DENSE_STATES

# What `proj` may be, and the distribution (philox.DISTRIBUTIONS) that it asks for.
PROJECTIONS = {"random": "gaussian", "gaussian": "gaussian"}
PROJECTIONS |= {"rademacher": "rademacher", "sparse": "sparse"}
SCALE_TYPES = ("channel", "tensor")
PROJ_TYPES = ("std", "reverse_std", "left", "right")

HYPER_KEYS = tuple(f.name for f in dataclasses.fields(Hyper) if f.name != "distribution")
SWITCHES: tuple[str, ...] = ("correct_bias", "maximize", "scale_front", "disable_nl")
SWITCHES += ("stochastic_rounding", "exact_projection")
INTEGERS = {"rank": 1, "update_proj_gap": 1, "batch_dims": 0}  # and their least values

# What a group may set, and what is the whole optimizer's.
GROUP_KEYS = frozenset({*HYPER_KEYS, *INTEGERS, "proj", "proj_type", "dense_state", "foreach"})
GROUP_KEYS |= {"capturable", "differentiable"}
OPTIMIZER_KEYS = ("seed", "backend", "fused", "max_grad_norm", "gradient_release")


def check_names(keys: Iterable[str], where: str = "") -> None:
    """Raises ValueError for a key that is none of a group's but was meant as one; others pass."""
    for key in keys:
        if key in GROUP_KEYS:
            continue
        if key in OPTIMIZER_KEYS:
            raise ValueError(f"unknown key {key!r}{where}: it is an argument of the optimizer")
        if (name := spelling.meant(key, GROUP_KEYS)) is not None:
            raise ValueError(f"unknown key {key!r}{where}: did you mean {name!r}?")


def is_numpy_scalar(value: Any) -> bool:
    """Whether it is one number of NumPy's, asked without importing that."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def plain(value: Any) -> Any:
    """A number of NumPy's as Python's: torch.load(weights_only=True) refuses the former."""
    if isinstance(value, (tuple, list)) and any(map(is_numpy_scalar, value)):
        return tuple(map(plain, value))
    return value.item() if is_numpy_scalar(value) else value


def make_plain(group: dict[str, Any]) -> None:
    """Puts Python's numbers in the place of NumPy's, which are equal."""
    for key, value in group.items():
        if key not in ("params", "param_names"):
            group[key] = plain(value)


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
    for key, least in INTEGERS.items():
        value = group[key]
        good = _whole(value, least) or (key == "rank" and value is None)
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
    both = bool(group["foreach"] and group.get("fused"))  # the latter is the whole optimizer's
    check("fused", not both, "False or None together with foreach=True")


def check_rank(rank: Any) -> None:
    """The same for a rank alone, which must be given."""
    if not _whole(plain(rank), 1):
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")


def _whole(value: Any, least: int) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and int(value) >= least


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_lr(lr: Any, where: str = "") -> None:
    """A tensor on a GPU is not read: that would wait for the device."""
    if isinstance(lr, Tensor):
        one = lr.numel() == 1 and lr.device.type != "meta" and lr.layout == torch.strided
        ok = one and lr.is_floating_point()  # a scheduler would cut what it puts into integers
        expected = "a number or a tensor of one element, a float with memory"
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
