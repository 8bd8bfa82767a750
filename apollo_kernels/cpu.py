"""What makes the PyTorch back end fast on a CPU: compiled passes, and kept projections.

PyTorch has no bf16 matmul with a float32 result on a CPU, and widens before it computes. Where the
processor has AVX512-BF16 and the native module was built, ``project`` and ``apply`` of bf16
matrices run there instead; with AVX512 alone the sparse projection of every dtype but float64 does.
reference.py specifies them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from apollo_kernels.native import _C

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu_sparse.h
DOT_RANK = 4  # up to this rank a contiguous channel meets z as plain rows (csrc/cpu_bf16.h)


def supported(*tensors: Tensor) -> bool:
    """Whether all are bf16 CPU matrices with one contiguous side, on a processor that can."""
    native = _C is not None and _C.cpu_bf16_supported()
    return native and all(
        t.dtype == torch.bfloat16 and t.device.type == "cpu" and t.numel() and 1 in t.stride()
        for t in tensors
    )


def layout(x: Tensor, rank: int) -> str:
    """How ``project`` wants z for this X [C, K]: see ``arrange``."""
    return "rows" if rank <= DOT_RANK and x.stride(1) == 1 else "pairs"


def arrange(z: Tensor, wanted: str) -> Tensor:
    """z [r, K] bf16 as it is ("rows"), or as pairs of k, rank padded to 16: [ceil(K/2), r', 2]."""
    if wanted == "rows":
        return z
    rank, k = z.shape
    padded = torch.nn.functional.pad(z, (0, k % 2, 0, -rank % 16))
    return padded.view(padded.shape[0], -1, 2).transpose(0, 1).contiguous()


def project(x: Tensor, z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As reference.project, from bf16 X [C, K] and z arranged for it: R [C, r], q [C] float32."""
    channels, k = x.shape
    by_row = x.stride(1) == 1
    r = torch.empty((channels, rank), dtype=torch.float32, device="cpu")
    q = torch.empty((channels,), dtype=torch.float32, device="cpu")
    _C.cpu_project(
        x.data_ptr(), channels, k, x.stride(0) if by_row else x.stride(1), by_row,
        z.data_ptr(), rank, z.shape[1], rank**-0.5, r.data_ptr(), q.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return r, q


def sparse_supported(x: Tensor) -> bool:
    """Whether X [C, K] is on a CPU with AVX512, has one contiguous side and a dtype known there."""
    native = _C is not None and _C.cpu_sparse_supported()
    on_cpu = x.device.type == "cpu" and x.numel() > 0
    return native and on_cpu and x.dtype in ELEMENTS and 1 in x.stride()


def places(row: Tensor, sign: Tensor) -> Tensor:
    """The sparse projection as ``project_sparse`` reads it: int32 [K], the sign in the top bit."""
    return torch.where(sign < 0, row - 2**31, row).int()


def project_sparse(x: Tensor, places: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As reference.project_sparse, with float32 sums: R [C, r], q [C] float32."""
    channels, k = x.shape
    by_row = x.stride(1) == 1
    r = torch.empty((channels, rank), dtype=torch.float32, device="cpu")
    q = torch.empty((channels,), dtype=torch.float32, device="cpu")
    _C.cpu_project_sparse(
        x.data_ptr(), ELEMENTS[x.dtype], channels, k, x.stride(0) if by_row else x.stride(1),
        by_row, places.data_ptr(), rank, r.data_ptr(), q.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return r, q


def apply(w: Tensor, x: Tensor, coefficient: Tensor, decay: float) -> None:
    """As reference.apply, in place on bf16 W [C, K] with bf16 X in the same memory order."""
    by_row = w.stride(1) == 1
    if not by_row:
        w, x = w.t(), x.t()
    coefficient = coefficient.expand(w.shape[0 if by_row else 1]).contiguous()
    _C.cpu_apply(
        w.data_ptr(), x.data_ptr(), *w.shape, w.stride(0), x.stride(0),
        coefficient.data_ptr(), by_row, decay, torch.get_num_threads(),
    )  # fmt: skip


class ProjectionCache:
    """The current P of each matrix, since on a CPU drawing P costs more than reading it.

    It holds at most ``limit`` bytes in the whole process: a float32 P takes 4 * rank * K, a sparse
    one 4 * K. Beyond the limit P is drawn anew at each step, so a large model costs time, not
    memory. An entry lives as long as its owner, a tensor of the parameter's state, whatever becomes
    of plans; checkpoints and pickles never see it. Optimizers of several threads share it.
    """

    def __init__(self, limit: int = 256 * 2**20):
        self.limit = limit
        self.nbytes = 0
        self._entries: dict[tuple[int, int], tuple[Hashable, Tensor]] = {}  # by owner and key
        self._owners: dict[int, tuple[weakref.ref, set[int]]] = {}
        self._lock = threading.RLock()  # an owner may end while this thread is in here

    def get(self, owner: object, key: int, wanted: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """``make()``, or what it made before for this owner and key if that was ``wanted``."""
        place = id(owner), key
        with self._lock:
            have = self._entries.get(place)
            if have is not None and have[0] == wanted:
                return have[1]
            self._drop(place)
        p = make()
        size = p.numel() * p.element_size()
        with self._lock:
            if place not in self._entries and self.nbytes + size <= self.limit:
                self._entries[place] = (wanted, p)
                self.nbytes += size
                self._keys_of(owner).add(key)
        return p

    def _drop(self, place: tuple[int, int]) -> None:
        entry = self._entries.pop(place, None)
        if entry is not None:
            self.nbytes -= entry[1].numel() * entry[1].element_size()

    def _keys_of(self, owner: object) -> set[int]:
        number = id(owner)
        if number not in self._owners:
            end = weakref.ref(owner, lambda _: self._end(number))
            self._owners[number] = end, set()
        return self._owners[number][1]

    def _end(self, number: int) -> None:
        with self._lock:
            _, keys = self._owners.pop(number)
            for key in keys:
                self._drop((number, key))


projections = ProjectionCache()
