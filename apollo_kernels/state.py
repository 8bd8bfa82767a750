"""The state of a parameter: its tensors before the first step, and what fits.

Low-rank: exp_avg, exp_avg_sq [*batch, C, r], update_norm [*batch], step [], seed (int).
Dense:    exp_avg, exp_avg_sq [p.shape], step []; and seed for an int8 weight or narrow moments.

step is int64, the others are float32 (float64 for float64 parameters), or what ``dense_state`` asks
for: bfloat16, or uint8 codes with exp_avg_unit, exp_avg_sq_unit. DESIGN.md, "State".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from apollo_kernels import distributed, moments
from apollo_kernels.batch import compute_dtype
from apollo_kernels.distributed import is_sharded, local
from apollo_kernels.philox import KEY_BITS
from apollo_kernels.quantized import is_int8


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


def dense_state(p: Tensor, group: Mapping[str, Any]) -> str | None:
    """How the moments of a dense parameter are stored; None for a low-rank one.

    Of float64 parameters they are float64, whatever the group asks for, and of sharded vectors not
    in int8: blocks of neighbours would lie on two ranks.
    """
    if layout_of(p, group) is not None:
        return None
    kind = group.get("dense_state", "float32")
    torn = kind == "int8" and p.dim() < 2 and is_sharded(p)
    return "float32" if torn or p.dtype == torch.float64 else kind


def expected(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of the state's tensors but step."""
    layout, dtype = layout_of(p, group), compute_dtype(p.dtype)
    if layout is not None:
        both = dict.fromkeys(moments.MOMENTS, (layout.moments, dtype))
        return {**both, "update_norm": (layout.batch, dtype)}
    shape, kind = tuple(p.shape), dense_state(p, group)
    if kind == "int8":
        units = (moments.blocks(shape), torch.float32)
        names = [f"{key}_unit" for key in moments.MOMENTS]
        return dict.fromkeys(moments.MOMENTS, (shape, torch.uint8)) | dict.fromkeys(names, units)
    return dict.fromkeys(moments.MOMENTS, (shape, torch.bfloat16 if kind == "bfloat16" else dtype))


def zeros(p: Tensor, group: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state's tensors before the first step; the key (``seed``) is not among them.

    Of a sharded parameter they are DTensors; on the meta device this rank's part of them.
    """
    state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
    in_order, layout = dense_state(p, group) in ("float32", "bfloat16"), layout_of(p, group)
    for key, (shape, dtype) in expected(p, group).items():
        place = distributed.place_of(p, layout, key)
        own = shape if place is None else distributed.local_shape(shape, place)[1]
        if in_order:  # in the weight's own memory order, and a plain tensor whatever the weight is
            like = torch.empty_strided(own, local(p).stride(), dtype=dtype, device="meta")
            made = torch.zeros_like(like, device=device)
        else:
            made = torch.zeros(own, dtype=dtype, device=device)
        meta = made.device.type == "meta"
        state[key] = made if meta else distributed.wrap(made, shape, place)
    return state


def needs_key(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether random numbers are drawn for a parameter: for a projection, or to round by chance."""
    return dense_state(p, group) != "float32" or is_int8(p)


def check(
    p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], name: Callable[[], str]
) -> None:
    """Raises ValueError, with the parameter's name, for a state that a step must not rest on."""
    tensors = expected(p, group)
    if missing := {"step", *tensors} - set(state):
        raise ValueError(
            f"the state of {name()} does not fit: it lacks {', '.join(sorted(missing))}"
        )
    low_rank = "update_norm" in tensors
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
    layout = layout_of(p, group)
    for key, (shape, dtype) in tensors.items():
        found = state[key]
        place = distributed.place_of(p, layout, key)
        if place is not None:
            distributed.check_state(found, shape, place, f"{key} of {name()}")
        _check_tensor(key, found, shape, dtype, p, group, name, place is not None)
    if low_rank or (needs_key(p, group) and "seed" in state):  # a dense one may have been wider
        seed = state.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**KEY_BITS:
            raise ValueError(
                f"the state of {name()} needs an integer seed in [0, 2**{KEY_BITS}), got {seed!r}"
            )


def _check_tensor(
    key: str,
    found: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    p: Tensor,
    group: Mapping[str, Any],
    name: Callable[[], str],
    sharded: bool = False,
) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{key} of {name()} must be a tensor, got {found!r}")
    if is_sharded(found) != sharded or found.layout != torch.strided:
        raise ValueError(f"{key} of {name()} must be a plain dense tensor, got {type(found)}")
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{key} of {name()} does not fit its group: it has shape {tuple(found.shape)}, while "
            f"rank {group['rank']}, proj_type {group['proj_type']!r} and batch_dims "
            f"{group['batch_dims']} need {shape} for a parameter of shape "
            f"{tuple(p.shape)}; none of them changes after step 1"
        )
    if found.dtype != dtype or found.device != p.device:
        asked = dense_state(p, group)
        why = f" (dense_state {asked!r}; load_state_dict converts)" if asked else ""
        raise ValueError(
            f"{key} of {name()} must be {dtype} on {p.device}, got {found.dtype} on "
            f"{found.device}{why}"
        )
    if dtype == torch.uint8 and not local(found).is_contiguous():
        raise ValueError(f"{key} of {name()} must be contiguous, got strides {found.stride()}")


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


def converted(
    p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """A copy of saved state on p's device in the contract's dtypes; other values stay as they are.

    Moments of a dense parameter come in the group's ``dense_state``, from whichever they were in;
    those of a sharded one as DTensors, from such or from whole tensors.

    Raises
        ValueError: for a value that no conversion makes right; the rest is for ``check``.
    """
    if not is_sharded(p):
        return _converted(p, group, saved, name)
    layout, expects = layout_of(p, group), expected(p, group)

    def own(key: str, value: Any) -> Any:
        place = distributed.place_of(p, layout, key)
        if place is None or not isinstance(value, Tensor):
            return value
        shape = moments.blocks(tuple(p.shape)) if key.endswith("_unit") else expects[key][0]
        return distributed.unwrap(value, shape, place, f"{key} of {name}")

    parts = {key: own(key, value) for key, value in saved.items()}
    state = _converted(local(p), group, parts, name, dense_state(p, group))
    for key, value in state.items():
        place = distributed.place_of(p, layout, key)
        if place is not None and key in expects:
            shape = expects[key][0]
            if tuple(value.shape) == distributed.local_shape(shape, place)[1]:
                state[key] = distributed.wrap(value, shape, place)
    return state


def _converted(
    p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], name: str, asked: str | None = ""
) -> dict[str, Any]:
    """The same for tensors that are on this rank as a whole; ``asked``: the dense state."""
    asked = dense_state(p, group) if asked == "" else asked
    state = {}
    for key, value in saved.items():
        if key == "step":
            value = as_step(check_step(value, name), p.device)
        elif key in moments.MOMENTS and isinstance(value, Tensor):
            state.update(_converted_moment(key, saved, p, asked, name))
            continue
        elif key == "update_norm" and isinstance(value, Tensor):
            value = _floats(key, value, p, name).to(compute_dtype(p.dtype), copy=True)
        elif key.removesuffix("_unit") in moments.MOMENTS:
            continue  # it came with its moment
        elif isinstance(value, Tensor):
            value = value.detach().clone()
        state[key] = value
    return state


def _converted_moment(
    key: str, saved: Mapping[str, Any], p: Tensor, asked: str | None, name: str
) -> dict[str, Tensor]:
    """A moment under its key and, in int8, its units."""
    value, unit = saved[key], saved.get(f"{key}_unit")
    shape = tuple(value.shape)
    if value.dtype == torch.uint8 and asked is not None:
        if not isinstance(unit, Tensor) or tuple(unit.shape) != moments.blocks(shape):
            got = tuple(unit.shape) if isinstance(unit, Tensor) else unit
            raise ValueError(
                f"{key}_unit of {name} does not fit: codes of shape {shape} need one unit for each "
                f"of {moments.blocks(shape)} blocks, got {got!r}"
            )
        value = value.detach().to(p.device)
        unit = _floats(f"{key}_unit", unit, p, name).float()
        if asked == "int8":
            codes = value.clone(memory_format=torch.contiguous_format)
            return {key: codes, f"{key}_unit": unit.clone()}
        value = moments.from_codes(value, unit, key)
    value = _floats(key, value, p, name)
    if asked == "int8" and shape == tuple(p.shape):
        codes, unit = moments.to_codes(value, key)
        return {key: codes, f"{key}_unit": unit}
    dtype = torch.bfloat16 if asked == "bfloat16" else compute_dtype(p.dtype)
    return {key: value.to(dtype, copy=True)}


def _floats(key: str, value: Tensor, p: Tensor, name: str) -> Tensor:
    """Saved numbers on p's device, which can be right."""
    if not value.is_floating_point() or value.device.type == "meta":
        raise ValueError(f"{key} of {name} must hold floats, got {value.dtype} on {value.device}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{key} of {name} holds NaN or Inf")
    if key != "exp_avg" and bool((value < 0).any()):
        raise ValueError(f"{key} of {name} holds negative numbers")
    return value.detach().to(p.device)
