"""The Philox key of a parameter, which is made once, at its first step, and kept in its state.

By name where there is one, or else by the position over all groups. Two parameters with one key
share projections: in one optimizer that cannot be; of two in one process a warning tells.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor

from apollo_kernels import names
from apollo_kernels.philox import parameter_key

Claim = tuple[int, tuple[int, ...]]  # a key, and the shape of the parameter that has it

# By what an optimizer keeps beside its state, which lives as long as it does.
_claims: weakref.WeakKeyDictionary[Any, set[Claim]] = weakref.WeakKeyDictionary()
told = False  # whether the warning has been given


def new_key(seed: int, name: str, position: int, parameters: int, taken: Collection[int]) -> int:
    """The key of a parameter by its ``name``, or if that is "" as ``position`` of ``parameters``.

    One that another parameter's state has is passed over: groups that were removed and added shift
    positions, and two models of one optimizer may have equal names.
    """
    number, stride = (names.number(name), 1) if name else (position, parameters)
    while (key := parameter_key(seed, number)) in taken:
        number += stride
    return key


def claim(owner: Any, key: int, p: Tensor) -> bool:
    """Notes that a parameter of ``owner`` has ``key``; whether one of another owner had it before,
    with the same shape."""
    made = key, tuple(p.shape)
    if shared := _held_by_another(owner, made):
        gc.collect()  # an optimizer that has a scheduler goes no earlier
        shared = _held_by_another(owner, made)
    _claims.setdefault(owner, set()).add(made)
    return shared


def _held_by_another(owner: Any, made: Claim) -> bool:
    return any(made in held for other, held in list(_claims.items()) if other is not owner)
