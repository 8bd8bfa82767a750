"""What a parameter is called: it decides its key, so that no order and no process does.

A group brings names as ``param_names``, as PyTorch keeps them. They count as long as there are not
more of them than parameters: ZeroRedundancyOptimizer hands each process some parameters of a group
with the names of all. Then the models that param_groups() has named are asked.
"""

from __future__ import annotations

import hashlib
import re
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# What DistributedDataParallel, torch.compile, FSDP and checkpoint_wrapper put into a name.
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

_models: list[weakref.ref[nn.Module]] = []  # that param_groups() has named
_numbers: dict[str, int] = {}  # so that torch.compile need not trace a hash


def unwrapped(name: str) -> str:
    """``name`` without what wrappers of a module put into it."""
    return _WRAPPER.sub("", name)


def number(name: str) -> int:
    """A name as 64 bits: the first 8 bytes of its SHA-256, little-endian, without wrappers."""
    if name not in _numbers:
        digest = hashlib.sha256(unwrapped(name).encode()).digest()
        _numbers[name] = int.from_bytes(digest[:8], "little")
    return _numbers[name]


def remember(model: nn.Module) -> None:
    """From now on ``model`` may be asked, as long as it lives."""
    _models[:] = [k for k in _models if k() is not None and k() is not model]
    _models.append(weakref.ref(model))


def of(group: Mapping[str, Any], place: int) -> str:
    """The name of the parameter at ``place`` of ``group``; "" if it has none."""
    return all_of(group)[place]


def all_of(group: Mapping[str, Any]) -> list[str]:
    """The names of all parameters of ``group``, "" for each that has none."""
    names, params = list(group.get("param_names") or ()), group["params"]
    if len(names) > len(params):
        return _in_models(params)
    return names + [""] * (len(params) - len(names))  # those that were appended by hand


def _in_models(params: list[Tensor]) -> list[str]:
    """What ``params`` are called in the models that were named, the last of them first."""
    found: dict[Tensor, str] = {}
    for model in [known() for known in _models]:
        if model is not None:
            found.update((p, name) for name, p in model.named_parameters())
    return [found.get(p, "") for p in params]


def complete(group: dict[str, Any], others: list[dict[str, Any]]) -> None:
    """Gives a group that is to be added, or the ``others``, names if only one side has them, since
    torch wants all or none. "" stands for a name that nobody knows."""
    params = group.get("params")
    pairs = isinstance(params, list) and len(params) > 0 and isinstance(params[0], tuple)
    unnamed = [other for other in others if "param_names" not in other]
    if pairs or "param_names" in group:
        for other in unnamed:
            other["param_names"] = _in_models(other["params"])
    elif isinstance(params, (list, Tensor)) and len(unnamed) < len(others):
        group["params"] = [params] if isinstance(params, Tensor) else params
        group["param_names"] = _in_models(group["params"])


def check(group: Mapping[str, Any], where: str) -> None:
    """Looks at the names of a group that has been added.

    Raises
        ValueError: for names that do not say which parameter is called what.
    """
    given, params = group.get("param_names"), group["params"]
    if given is None:
        return
    strings = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
    if not strings or len(given) < len(params):
        raise ValueError(
            f"param_names must be {len(params)} strings, one for each parameter, got "
            f"{given!r}{where}"
        )
    if len(given) > len(params) and not all(all_of(group)):
        raise ValueError(
            f"param_names has {len(given)} names for {len(params)} parameters{where}, and nothing "
            "tells which is whose. If ZeroRedundancyOptimizer has cut the group, make it with "
            "apollo_kernels.param_groups(model), and keep the model"
        )


def number_all(group: Mapping[str, Any]) -> None:
    """Works out every name's number, so that a compiled step need not."""
    for name in all_of(group):
        number(name)
