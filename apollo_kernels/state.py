"""The state of a parameter: its tensors before the first step, what fits, and the Philox key.

Low-rank: exp_avg, exp_avg_sq [*batch, C, r], update_norm [*batch], step [], seed (int).
Dense:    exp_avg, exp_avg_sq [p.shape], step []; and seed for an int8 weight.

step is int64, the others are float32 (float64 for float64 parameters). DESIGN.md, "State".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apollo_kernels.batch import compute_dtype
from apollo_kernels.philox import KEY_BITS, parameter_key
from apollo_kernels.quantized import Int8Weight


@dataclass(frozen=True)
class Layout:
    """How a low-rank parameter is seen: ``batch`` matrices [m, n] of C channels, rank r."""

    batch: tuple[int, ...]
    m: int
    n: int
    rank: int
    rows: bool  # channels are the rows, so the columns are contracted

    @property
    def matrices(self) -> int:
        return math.prod(self.batch)

    @property
    def moments(self) -> tuple[int, ...]:
        return (*self.batch, self.m if self.rows else self.n, self.rank)


def channels_are_rows(shape: tuple[int, int], proj_type: str) -> bool:
    """Whether the columns are contracted, for a matrix [m, n] (DESIGN.md: the contract's table)."""
    tall = shape[0] >= shape[1]
    return {"std": tall, "reverse_std": not tall, "right": True, "left": False}[proj_type]


def layout_of(p: Tensor, group: Mapping[str, Any]) -> Layout | None:
    """A parameter as its group asks for it to be seen; None if it takes the dense step.

    ``batch_dims`` leading dimensions count matrices; each is the next dimension x the rest.
    """
    lead = group["batch_dims"]
    if group["rank"] is None or p.dim() < lead + 2:
        return None
    m, n = p.shape[lead], math.prod(p.shape[lead + 1 :])
    rows = channels_are_rows((m, n), group["proj_type"])
    return Layout(tuple(p.shape[:lead]), m, n, min(group["rank"], n if rows else m), rows)


def shapes(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the state's float tensors."""
    layout = layout_of(p, group)
    if layout is None:
        return {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
    moments = layout.moments
    return {"exp_avg": moments, "exp_avg_sq": moments, "update_norm": layout.batch}


def zeros(p: Tensor, group: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state's tensors before the first step; the key (``seed``) is not among them."""
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    dtype, dense = compute_dtype(p.dtype), layout_of(p, group) is None
    for key, shape in shapes(p, group).items():
        if dense:  # in the weight's own memory order, and a plain tensor whatever the weight is
            like = torch.empty_strided(p.shape, p.stride(), dtype=dtype, device="meta")
            state[key] = torch.zeros_like(like, device=device)
        else:
            state[key] = torch.zeros(shape, dtype=dtype, device=device)
    return state


def needs_key(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether random numbers are drawn for a parameter: a projection, or the rounding to int8."""
    return layout_of(p, group) is not None or isinstance(p, Int8Weight)


def new_key(seed: int, position: int, parameters: int, taken: Collection[int]) -> int:
    """The Philox key of the parameter at ``position`` of ``parameters``.

    Groups that were removed and added shift positions: a key that another parameter's state has is
    passed over for the next position beyond the last one.
    """
    while (key := parameter_key(seed, position)) in taken:
        position += parameters
    return key


def check(
    p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], name: Callable[[], str]
) -> None:
    """Raises ValueError, with the parameter's name, for a state that a step must not rest on."""
    expected = shapes(p, group)
    if missing := {"step", *expected} - set(state):
        raise ValueError(
            f"the state of {name()} does not fit: it lacks {', '.join(sorted(missing))}"
        )
    low_rank = "update_norm" in expected
    if not low_rank and "update_norm" in state:
        raise ValueError(
            f"the state of {name()} does not fit: it is that of a low-rank step, while shape "
            f"{tuple(p.shape)}, rank {group['rank']} and batch_dims {group['batch_dims']} ask for "
            "the dense one"
        )
    step = state["step"]
    if not isinstance(step, Tensor) or step.dim() or step.dtype != torch.int64:
        raise ValueError(
            f"step of {name()} must be an int64 tensor without dimensions, got {step!r}"
        )
    if step.device != p.device:
        raise ValueError(f"step of {name()} must be on {p.device}, got {step.device}")
    numbers = step.device.type == "cpu" and not isinstance(step, FakeTensor)
    if numbers and not torch.compiler.is_compiling() and step < 0:
        raise ValueError(f"step of {name()} must not be negative, got {int(step)}")
    for key, shape in expected.items():
        _check_tensor(key, state[key], shape, p, group, name)
    if low_rank or (needs_key(p, group) and "seed" in state):  # a dense one may have been bf16
        seed = state.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**KEY_BITS:
            raise ValueError(
                f"the state of {name()} needs an integer seed in [0, 2**{KEY_BITS}), got {seed!r}"
            )


def _check_tensor(
    key: str,
    found: Any,
    shape: tuple[int, ...],
    p: Tensor,
    group: Mapping[str, Any],
    name: Callable[[], str],
) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{key} of {name()} must be a tensor, got {found!r}")
    if type(found).__name__ == "DTensor" or found.layout != torch.strided:
        raise ValueError(f"{key} of {name()} must be a plain dense tensor, got {type(found)}")
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{key} of {name()} does not fit its group: it has shape {tuple(found.shape)}, while "
            f"rank {group['rank']}, proj_type {group['proj_type']!r} and batch_dims "
            f"{group['batch_dims']} need {shape} for a parameter of shape "
            f"{tuple(p.shape)}; none of them changes after step 1"
        )
    dtype = compute_dtype(p.dtype)
    if found.dtype != dtype or found.device != p.device:
        raise ValueError(
            f"{key} of {name()} must be {dtype} on {p.device}, got {found.dtype} on {found.device}"
        )


def check_step(step: Any, name: str) -> int:
    """The number of steps that a saved state has taken; raises ValueError for what can be none."""
    if isinstance(step, Tensor) and step.numel() == 1 and step.device.type != "meta":
        step = step.item()
    number = isinstance(step, (int, float)) and not isinstance(step, bool)
    if not number or not math.isfinite(step) or not 0 <= step < 2**63 or step != int(step):
        raise ValueError(f"step of {name} must be a whole number of steps >= 0, got {step!r}")
    return int(step)


def as_step(step: Any, device: torch.device) -> Tensor:
    """The contract's int64 [] on ``device``; the same tensor where it is one."""
    if isinstance(step, Tensor) and step.dim() == 0:
        return step.to(device, torch.int64)
    return torch.tensor(int(step), dtype=torch.int64, device=device)


def converted(p: Tensor, saved: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A copy of saved state on p's device in the contract's dtypes; other values stay as they are.

    Raises
        ValueError: for a value that no conversion makes right; the rest is for ``check``.
    """
    state = {}
    for key, value in saved.items():
        if key == "step":
            value = as_step(check_step(value, name), p.device)
        elif key in ("exp_avg", "exp_avg_sq", "update_norm") and isinstance(value, Tensor):
            value = _converted_floats(key, value, p, name)
        elif isinstance(value, Tensor):
            value = value.detach().clone()
        state[key] = value
    return state


def _converted_floats(key: str, value: Tensor, p: Tensor, name: str) -> Tensor:
    if not value.is_floating_point() or value.device.type == "meta":
        raise ValueError(f"{key} of {name} must hold floats, got {value.dtype} on {value.device}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{key} of {name} holds NaN or Inf")
    if key != "exp_avg" and bool((value < 0).any()):
        raise ValueError(f"{key} of {name} holds negative numbers")
    return value.detach().to(p.device, compute_dtype(p.dtype), copy=True)
