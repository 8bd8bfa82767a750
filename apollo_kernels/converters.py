"""Reads optimizer state written by apollo_torch (the published package) into ours."""

from __future__ import annotations

import os
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import torch

from apollo_kernels.optimizer import APOLLO, channels_are_rows, matrix_shape


def load_apollo_torch(
    optimizer: APOLLO,
    source: str | os.PathLike[str] | dict[str, Any],
    *,
    allow_unsafe_pickle: bool = False,
) -> None:
    """Loads the state of an ``apollo_torch.APOLLOAdamW`` into ``optimizer``.

    Moments and step counts are taken over; so is the limiter's norm. The projections are not: they
    were tensors drawn by another generator, so the run goes on as after a redraw, which keeps the
    moments too (every ``update_proj_gap`` steps in either package).

    Args
        optimizer: with the same groups of parameters, in the same order.
        source: a state_dict, or a file that torch.save wrote of one.
        allow_unsafe_pickle: a file of apollo_torch holds Python objects, which only an unrestricted
            unpickler reads; such a file can run any code. Say True for a file that you trust.
    Raises
        ValueError: for a file without ``allow_unsafe_pickle``, or a state that does not fit.
    """
    if isinstance(source, dict):
        state_dict = source
    elif not allow_unsafe_pickle:
        raise ValueError(
            f"{os.fspath(source)!r} holds Python objects of apollo_torch, which "
            "torch.load(weights_only=True) refuses; if you trust the file, pass "
            "allow_unsafe_pickle=True (unpickling can run any code)"
        )
    else:
        warnings.warn(f"unpickling {os.fspath(source)!r} can run any code in it", stacklevel=2)
        state_dict = torch.load(
            source, map_location="cpu", weights_only=False, pickle_module=_Pickle
        )
    optimizer.load_state_dict(_convert(optimizer, state_dict))


def _convert(optimizer: APOLLO, state_dict: dict[str, Any]) -> dict[str, Any]:
    ours = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    theirs_groups, our_groups = state_dict["param_groups"], ours["param_groups"]
    theirs_ids = [i for group in theirs_groups for i in group["params"]]
    if [len(g["params"]) for g in theirs_groups] != [len(g["params"]) for g in our_groups]:
        raise ValueError("the parameter groups of the apollo_torch state have other sizes")
    keys = set(optimizer.defaults)
    groups = [
        {**mine, **{k: v for k, v in theirs.items() if k in keys}, "params": mine["params"]}
        for mine, theirs in zip(our_groups, theirs_groups, strict=True)
    ]
    group_of = {i: group for group in groups for i in group["params"]}
    state = {}
    for index, (p, theirs_id) in enumerate(zip(params, theirs_ids, strict=True)):
        saved = state_dict["state"].get(theirs_id)
        if saved and "exp_avg" in saved:  # apollo_torch writes a seed before the first step
            state[index] = _convert_parameter(optimizer, p, group_of[index], saved)
    return {"state": state, "param_groups": groups}


def _convert_parameter(
    optimizer: APOLLO, p: torch.Tensor, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    names = ("exp_avg", "exp_avg_sq")
    state = {name: saved[name].float() for name in names}
    state["step"] = torch.tensor(float(saved["step"]))
    if "projector" not in saved:
        return state
    if not channels_are_rows(matrix_shape(p.shape), group["proj_type"]):
        state.update({name: state[name].t().contiguous() for name in names})  # theirs: [r, C]
    norm = saved.get("scaled_grad")
    state["update_norm"] = torch.zeros(()) if norm is None else norm.detach().float().reshape(())
    state["seed"] = optimizer.key_of(p)
    return state


class _Unpickler(pickle.Unpickler):
    """Reads apollo_torch's objects as bare namespaces, so that the package need not be there."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "apollo_torch":
            return SimpleNamespace
        return super().find_class(module, name)


class _Pickle:
    """What torch.load asks of a ``pickle_module``."""

    __name__ = "apollo_kernels.converters._Pickle"
    Unpickler = _Unpickler
    load = staticmethod(lambda file, **options: _Unpickler(file, **options).load())
