"""The compiled part of the package, imported once, and what Python does where it is missing."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch  # first: the module shares PyTorch's OpenMP threads where they are
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_C: Any = None  # where it is missing PyTorch computes the same
with contextlib.suppress(ModuleNotFoundError):
    _C = importlib.import_module("apollo_kernels._C")

_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
_exchange_api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
if _C is None or _exchange_api is None or not _C.exchange_api_usable(_exchange_api):
    _exchange_api = None


def address(t: Tensor) -> int:
    """Where a tensor lies; 0 for one without memory (fake.py)."""
    return 0 if isinstance(t, FakeTensor) else t.data_ptr()


def tensor_facts(tensors: Sequence[Tensor]) -> tuple[Any, Any]:
    """What kernels take from tensors, to be compared with ==: addresses, and everything else.

    Raises
        RuntimeError: for a tensor without address or strides (a sparse one).
    """
    if _exchange_api is not None and not (tensors and isinstance(tensors[0], FakeTensor)):
        try:
            return _C.tensor_facts(_exchange_api, tensors)
        except BufferError:  # a dtype or a layout that DLPack does not know
            pass
    columns = (_shape, torch.Tensor.stride, _dtype, _device)
    rest = tuple(list(map(column, tensors)) for column in columns)
    return list(map(address, tensors)), rest


def same_entries(dicts: list[dict[str, Any]], entries: list[Any]) -> bool:
    """Whether keys and values of the dicts, one after the other, are these very objects."""
    if _C is not None:
        return _C.same_entries(dicts, entries)
    found = list(chain.from_iterable(chain.from_iterable(map(dict.items, dicts))))
    return len(found) == len(entries) and all(map(is_, found, entries))
