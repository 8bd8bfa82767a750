"""Reads optimizer state that others wrote, the published package apollo_torch before all, as ours.

AdamW and GaLore keep moments in another space than ours: of the gradient X [C, K] itself, or of its
projection on singular vectors. Both are M and V of Y with X = Y U^T, where U is the identity or the
singular vectors, and ours are those of R = X P^T = Y (P U)^T. So M goes through (P U)^T, which is
exact as long as P has not changed, and V through its square, which is V's expectation if entries of
Y are uncorrelated. It is a start that knows how large gradients are, and not the same run.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from apollo_kernels import options
from apollo_kernels.optimizer import APOLLO, parts_of
from apollo_kernels.philox import parameter_key, projection_matrix
from apollo_kernels.state import check_step, layout_of


def load_apollo_torch(
    optimizer: APOLLO,
    source: str | os.PathLike[str] | IO[bytes] | dict[str, Any],
    *,
    allow_unsafe_pickle: bool = False,
) -> None:
    """Loads the state of an ``apollo_torch.APOLLOAdamW`` into ``optimizer``.

    Moments and step counts are taken over; so is the limiter's norm. The projections are not: they
    were tensors drawn by another generator, so the run goes on as after a redraw, which keeps the
    moments too (every ``update_proj_gap`` steps in either package).

    Args
        optimizer: with the same groups of parameters, in the same order.
        source: a state_dict, or a file that torch.save wrote of one: its path, or open to read.
        allow_unsafe_pickle: a file of apollo_torch holds Python objects, which only an unrestricted
            unpickler reads; such a file can run any code. Say True for a file that you trust.
    Raises
        ValueError: before any change, for a file that needs ``allow_unsafe_pickle``, for what is no
            such state, and for a state that does not fit or holds numbers that cannot be right.
    """
    state_dict = source if isinstance(source, dict) else _read(source, allow_unsafe_pickle)
    optimizer.load_state_dict(_convert(optimizer, *parts_of(state_dict, "source")))


def _read(source: str | os.PathLike[str] | IO[bytes], allow_unsafe_pickle: bool) -> Any:
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise ValueError(f"source must be a state_dict or a file, got {type(source).__name__}")
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the file"
    if allow_unsafe_pickle:
        warnings.warn(f"unpickling {name!r} can run any code in it", stacklevel=3)
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=_Pickle)
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name!r} holds Python objects, as states of apollo_torch do, which "
            "torch.load(weights_only=True) refuses; if you trust the file, pass "
            "allow_unsafe_pickle=True (unpickling can run any code)"
        ) from None


def _convert(
    optimizer: APOLLO, theirs_groups: list[dict[str, Any]], theirs_states: Mapping[Any, Any]
) -> dict[str, Any]:
    our_groups = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in theirs_groups] != [len(g["params"]) for g in our_groups]:
        raise ValueError("the parameter groups of the apollo_torch state have other sizes")
    keys = set(optimizer.defaults)
    state: dict[int, dict[str, Any]] = {}
    groups = []
    for index, (mine, theirs) in enumerate(zip(our_groups, theirs_groups, strict=True)):
        group = {**mine, **{k: v for k, v in theirs.items() if k in keys}, "params": mine["params"]}
        options.check_group(group, f" (group {index} of the apollo_torch state)")
        groups.append(group)
        params = optimizer.param_groups[index]["params"]
        for place, (p, i) in enumerate(zip(params, theirs["params"], strict=True)):
            saved = theirs_states.get(i)
            if (
                isinstance(saved, Mapping) and "exp_avg" in saved
            ):  # apollo_torch writes a seed before the first step
                name = optimizer._name_of(index, place)
                state[mine["params"][place]] = _convert_parameter(optimizer, p, group, saved, name)
    return {"state": state, "param_groups": groups}


def _convert_parameter(
    optimizer: APOLLO, p: Tensor, group: dict[str, Any], saved: Mapping[str, Any], name: str
) -> dict[str, Any]:
    moments = {key: _moment(key, saved.get(key), name) for key in ("exp_avg", "exp_avg_sq")}
    if bool((moments["exp_avg_sq"] < 0).any()):
        raise ValueError(f"exp_avg_sq of {name} holds negative numbers")
    state: dict[str, Any] = {**moments, "step": check_step(saved.get("step"), name)}
    if "projector" not in saved:
        return state
    if "svd" in type(saved["projector"]).__module__ or group.get("proj") == "svd":
        raise ValueError(
            f"the state of {name} rests on an SVD, which is not offered here: its moments belong "
            "to directions that a random projection does not have"
        )
    layout = layout_of(p, group)
    if layout is not None and not layout.rows:
        state.update({key: m.t().contiguous() for key, m in moments.items()})  # theirs: [r, C]
    norm = saved.get("scaled_grad")
    if norm is None:
        norm = torch.zeros((), dtype=torch.float32, device="cpu")
    norm = _moment("scaled_grad", norm, name)
    if norm.numel() != 1:
        raise ValueError(f"scaled_grad of {name} must be one number, got shape {tuple(norm.shape)}")
    state["update_norm"] = norm.reshape(())
    state["seed"] = optimizer.key_of(p)
    return state


def _moment(key: str, value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise ValueError(f"{key} of {name} must be a tensor of floats, got {type(value).__name__}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{key} of {name} holds NaN or Inf")
    return value.detach().float()


# ---- states that are not of a random projection --------------------------------------------------

_PUBLISHED = ("apollo_torch", "galore_torch")


def kind_of(states: Mapping[Any, Any]) -> str:
    """Who wrote these states: "apollo_torch", "galore_torch", "apollo_kernels" or "AdamW".

    Raises
        ValueError: if it was none of them, or nobody yet.
    """
    own = [state for state in states.values() if isinstance(state, Mapping)]
    for state in own:
        if "projector" in state:
            package = type(state["projector"]).__module__.split(".")[0]
            if package in _PUBLISHED:
                return package
            raise ValueError(f"a projector of {package!r} is not known, only {_PUBLISHED}")
    if any("update_norm" in state or "exp_avg_unit" in state for state in own):
        return "apollo_kernels"
    if any("exp_avg" in state and "exp_avg_sq" in state for state in own):
        return "AdamW"
    keys = sorted({str(key) for state in own for key in state})
    raise ValueError(f"no state of AdamW, GaLore or APOLLO: it holds {keys or 'nothing'}")


def from_another_space(
    optimizer: APOLLO, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The state of ``p`` from AdamW's or GaLore's; in the projection of the step that comes next.

    Raises
        ValueError: for moments of another shape, and numbers that cannot be right.
    """
    moments = {key: _moment(key, saved.get(key), name) for key in ("exp_avg", "exp_avg_sq")}
    if bool((moments["exp_avg_sq"] < 0).any()):
        raise ValueError(f"exp_avg_sq of {name} holds negative numbers")
    step = check_step(saved.get("step"), name)
    layout = layout_of(p, group)
    basis = saved.get("projector")
    if layout is None and basis is not None:
        raise ValueError(f"{name} was projected by GaLore, and its group has no rank here")
    if layout is None:
        return {**moments, "step": step, "seed": optimizer.key_of(p)}
    k = layout.n if layout.rows else layout.m
    u = None if basis is None else _basis(basis, layout.rows, k, name)
    width = k if u is None else u.shape[1]
    shape = (layout.m, width) if layout.rows else (width, layout.n)
    expected = tuple(p.shape) if u is None else (*layout.batch, *shape)
    if any(tuple(m.shape) != expected for m in moments.values()):
        raise ValueError(
            f"the moments of {name} have shape {tuple(moments['exp_avg'].shape)}, which does not "
            f"fit a parameter of shape {tuple(p.shape)}"
        )
    key = optimizer.key_of(p)
    made: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": []}
    epoch = step // group["update_proj_gap"]
    distribution = options.PROJECTIONS[group["proj"]]
    for i in range(layout.matrices):
        own = parameter_key(key, i) if layout.batch else key
        a = projection_matrix(own, epoch, layout.rank, k, distribution).float()
        a = (a if u is None else a @ u).t()
        for kind, through in (("exp_avg", a), ("exp_avg_sq", a.square())):
            y = moments[kind].reshape(layout.matrices, *shape)[i]
            made[kind].append((y if layout.rows else y.t()) @ through)
    state: dict[str, Any] = {
        kind: torch.stack(m).reshape(layout.moments) for kind, m in made.items()
    }
    norm = torch.zeros(layout.batch, dtype=torch.float32, device="cpu")  # unset
    return {**state, "step": step, "update_norm": norm, "seed": key}


def _basis(projector: Any, rows: bool, k: int, name: str) -> Tensor:
    """U [K, r] of GaLore's projector: it keeps U^T where it contracts columns."""
    ortho = getattr(projector, "ortho_matrix", None)
    if not isinstance(ortho, Tensor) or ortho.dim() != 2:
        raise ValueError(f"the projector of {name} holds no matrix (proj_type 'full' is not known)")
    u = _moment("ortho_matrix", ortho, name)
    u = u.t() if rows else u
    if u.shape[0] != k:
        raise ValueError(
            f"the projector of {name} has shape {tuple(ortho.shape)}, which does not fit a "
            f"contracted side of {k}"
        )
    return u


class _Unpickler(pickle.Unpickler):
    """Reads the published packages' objects as bare namespaces, so that they need not be there."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in _PUBLISHED:  # the module tells an SVD
            return type(name, (SimpleNamespace,), {"__module__": module})
        return super().find_class(module, name)


class _Pickle:
    """What torch.load asks of a ``pickle_module``."""

    __name__ = "apollo_kernels.converters._Pickle"
    Unpickler = _Unpickler
    load = staticmethod(lambda file, **options: _Unpickler(file, **options).load())
