"""What is looked at before a step writes anything: parameters, gradients and states of all groups.

Only where something has changed, so that it may take its time. Names are made when they are needed:
a ``name`` here is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apollo_kernels import distributed, flat, int8_shards, native, state
from apollo_kernels.distributed import is_sharded, local
from apollo_kernels.plan import Unit
from apollo_kernels.quantized import is_int8, stored

NameOf = Callable[[int, int], str]  # of the parameter at a place of a group


class Place(NamedTuple):
    """Where a parameter stands: ``place`` in group ``group``, and ``position`` over all groups."""

    group: int
    place: int
    position: int


def places_of(groups: Sequence[Mapping[str, Any]], name_of: NameOf) -> dict[Tensor, Place]:
    """Where every parameter stands.

    Raises
        ValueError: for one that stands twice.
    """
    found: dict[Tensor, Place] = {}
    for index, group in enumerate(groups):
        for place, p in enumerate(group["params"]):
            if p in found:
                raise ValueError(
                    f"{name_of(index, place)} is {name_of(*found[p][:2])}: it would be stepped "
                    "twice"
                )
            found[p] = Place(index, place, len(found))
    return found


def check_units(
    units: Iterable[Unit],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Any],
    name_of: NameOf,
) -> None:
    """Raises for what no step may rest on.

    Raises
        ValueError, RuntimeError, NotImplementedError: with the name of the parameter.
    """
    for unit in units:
        where: dict[int, str] = {}
        group = groups[unit.index]
        flat.refuse(unit.params, group, lambda i, u=unit: name_of(u.index, u.first + i))  # type: ignore
        for place, p in enumerate(unit.params, unit.first):
            if p.grad is not None:
                name = partial(name_of, unit.index, place)
                _check_one(p, group, states.get(p), name, where)


def _check_one(
    p: Tensor,
    group: Mapping[str, Any],
    own: Any,
    name: Callable[[], str],
    where: dict[int, str],
) -> None:
    check_placement(p, group, name)
    _check_gradient(p, name)
    tensors = dict(zip(("weight", "grid"), stored(local(p)), strict=False))  # a grid if it is int8
    if own:
        if not isinstance(own, dict):
            raise ValueError(f"the state of {name()} must be a dict, got {type(own).__name__}")
        state.check(p, group, own, name)
        tensors.update((key, local(v)) for key, v in own.items() if isinstance(v, Tensor))
    for key, t in tensors.items():
        if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"the {key} of {name()} overlaps itself: strides {t.stride()}")
        address = _address(t, key, name)
        if address and t.numel() and not torch.compiler.is_compiling():
            if address in where:
                raise ValueError(f"the {key} of {name()} lies in the memory of {where[address]}")
            where[address] = f"the {key} of this group's parameter of shape {tuple(p.shape)}"


def check_placement(p: Tensor, group: Mapping[str, Any], name: Callable[[], str]) -> None:
    """Raises NotImplementedError for a DTensor that no step knows."""
    if is_sharded(p):
        if is_int8(p):
            int8_shards.check(p, name)
        distributed.check(p, state.layout_of(p, group), state.dense_state(p, group), name)


def _check_sharded_gradient(p: Any, grad: Any, name: Callable[[], str]) -> None:
    if not (is_sharded(p) and is_sharded(grad)):
        raise RuntimeError(
            f"{name()} is a {type(p).__name__} and its gradient a {type(grad).__name__}: either "
            "both or none of them must be a DTensor"
        )
    if grad.device_mesh != p.device_mesh or tuple(grad.placements) != tuple(p.placements):
        raise RuntimeError(
            f"the gradient of {name()} is placed as {grad.placements!r} on {grad.device_mesh}, the "
            f"parameter as {p.placements!r} on {p.device_mesh}: redistribute it before the step"
        )
    if grad.shape == p.shape and local(grad).shape != local(p).shape:
        raise RuntimeError(
            f"the local gradient of {name()} has shape {tuple(local(grad).shape)}, the local "
            f"parameter {tuple(local(p).shape)}"
        )


def _check_gradient(p: Tensor, name: Callable[[], str]) -> None:
    grad = p.grad
    assert grad is not None
    if is_sharded(p) or is_sharded(grad):
        _check_sharded_gradient(p, grad, name)
        p, grad = local(p), local(grad)
    if p.is_complex():
        raise ValueError(f"APOLLO does not support complex parameters; {name()} is {p.dtype}")
    if grad.layout != torch.strided:
        raise RuntimeError(f"APOLLO does not support sparse gradients; that of {name()} is one")
    if not torch.compiler.is_compiling() and (grad.is_neg() or p.is_neg()):
        raise RuntimeError(f"{name()} or its gradient is a negative view: call resolve_neg() on it")
    if grad.device != p.device or grad.shape != p.shape:
        raise RuntimeError(
            f"the gradient of {name()} has shape {tuple(grad.shape)} on {grad.device}, the "
            f"parameter {tuple(p.shape)} on {p.device}"
        )
    _address(grad, "gradient", name)


def _address(t: Tensor, what: str, name: Callable[[], str]) -> int:
    """Where a tensor lies; 0 for a subclass that wraps others, which PyTorch steps."""
    if torch.compiler.is_compiling():
        return 0
    if t.device.type == "meta":
        raise RuntimeError(f"the {what} of {name()} is on the meta device, without memory")
    try:
        address = native.address(t)
    except RuntimeError as error:
        raise RuntimeError(f"the {what} of {name()} has no memory: {error}") from error
    plain = type(t) in (Tensor, torch.nn.Parameter)
    if plain and t.numel() and not address:
        raise RuntimeError(f"the {what} of {name()} has no memory: its storage was resized to 0")
    return address
