"""What makes the PyTorch back end fast on a CPU: compiled passes, and kept projections.

PyTorch reads a matrix several times where one pass would do, has no bf16 matmul with a float32
result on a CPU, and widens before it computes. Where the processor has AVX512 and the native module
was built, ``project``, ``scale`` and ``apply`` of every dtype but float64 run there instead.
reference.py specifies them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from apollo_kernels.batch import Hyper
from apollo_kernels.native import _C
from apollo_kernels.philox import scaled

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/cpu_element.h
THIN_RANK = 7  # up to this rank reading X costs more than the products (csrc/cpu_stream.h)
WIDENED = 2**20  # elements at a time: bounds the temporaries and keeps them in cache
NATIVE = _C is not None and _C.cpu_supported()
TILES = NATIVE and _C.cpu_tiles_supported()
PAIRS = NATIVE and _C.cpu_bf16_supported()


def supported(*tensors: Tensor) -> bool:
    """Whether all are CPU matrices of one dtype known there, with one contiguous side.

    A subclass that wraps other tensors has no address, and is left to PyTorch.
    """
    dtype = tensors[0].dtype
    return (
        NATIVE
        and dtype in ELEMENTS
        and all(t.dtype == dtype and t.device.type == "cpu" for t in tensors)
        and all(1 in t.stride() and t.numel() > 0 and t.data_ptr() != 0 for t in tensors)
    )


def layout(x: Tensor, rank: int) -> str:
    """How ``project`` wants z for this X [C, K]: see ``arrange``."""
    if rank <= THIN_RANK:
        return "rows"
    if TILES:
        return "tiles of pairs" if x.stride(1) == 1 else "tiles of rows"
    return "pairs" if PAIRS and x.dtype == torch.bfloat16 else "scaled"


def arrange(z: Tensor, wanted: str) -> Tensor:
    """z [r, K] bf16 in another order, with zeros up to whole tiles or pairs.

    Args
        wanted: "rows", as it is; "scaled", P itself in float32; "pairs" of k,
            [ceil(K/2), r', 2]; "tiles of pairs", [K', r', 16 pairs, 16 rows, 2]; or "tiles of
            rows", [K', r', 16 rows, 32]: 16 rows of z and 32 k (csrc/cpu_tiles.h).
    """
    if wanted == "rows":
        return z
    if wanted == "scaled":
        return scaled(z, torch.float32)
    rank, k = z.shape
    if wanted == "pairs":
        padded = torch.nn.functional.pad(z, (0, k % 2, 0, -rank % 16))
        return padded.view(padded.shape[0], -1, 2).transpose(0, 1).contiguous()
    tiles = torch.nn.functional.pad(z, (0, -k % 32, 0, -rank % 32))
    if wanted == "tiles of rows":
        return tiles.view(-(-rank // 32) * 2, 16, -1, 32).permute(2, 0, 1, 3).contiguous()
    return tiles.view(-(-rank // 32) * 2, 16, -1, 16, 2).permute(2, 0, 3, 1, 4).contiguous()


def walk(x: Tensor) -> tuple[int, int, int, bool]:
    """X [C, K] as passes walk it: C, K, how far apart its rows or columns are, and which."""
    by_row = x.stride(1) == 1
    return *x.shape, x.stride(0) if by_row else x.stride(1), by_row


def _sums(channels: int, rank: int) -> tuple[Tensor, Tensor]:
    r = torch.empty((channels, rank), dtype=torch.float32, device="cpu")
    return r, torch.empty((channels,), dtype=torch.float32, device="cpu")


def padded(z: Tensor, form: str) -> int:
    """How many rows z has as ``arrange`` made it, with the zeros."""
    if form.startswith("tiles"):
        return 16 * z.shape[1]
    return z.shape[1] if form == "pairs" else 0


def project(x: Tensor, z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As reference.project, from X [C, K] and z arranged for it: R [C, r], q [C] float32."""
    form, sides, threads = layout(x, rank), walk(x), torch.get_num_threads()
    r, q = _sums(len(x), rank)
    scale, out = rank**-0.5, (r.data_ptr(), q.data_ptr(), threads)
    element = ELEMENTS[x.dtype]
    if form == "rows":
        _C.cpu_project_thin(x.data_ptr(), element, *sides, z.data_ptr(), rank, scale, *out)
    elif form == "pairs":
        _C.cpu_project_bf16(x.data_ptr(), *sides, z.data_ptr(), rank, padded(z, form), scale, *out)
    elif form == "scaled":  # the BLAS multiplies, and q is all that is left to do
        _C.cpu_project_thin(x.data_ptr(), element, *sides, 0, 0, 1.0, *out)
        few = max(1, WIDENED // x.shape[1]) if x.dtype != torch.float32 else len(x)
        for part, out in zip(x.split(few), r.split(few), strict=True):
            torch.mm(part.float(), z.t(), out=out)
    else:
        _C.cpu_project_tiles(
            x.data_ptr(), element, *sides, z.data_ptr(), rank, padded(z, form), scale, *out
        )  # fmt: skip
    return r, q


def places(row: Tensor, sign: Tensor) -> Tensor:
    """The sparse projection as ``project_sparse`` reads it: int32 [K], the sign in the top bit."""
    return torch.where(sign < 0, row - 2**31, row).int()


def project_sparse(x: Tensor, places: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As reference.project_sparse, with float32 sums: R [C, r], q [C] float32."""
    r, q = _sums(len(x), rank)
    _C.cpu_project_sparse(
        x.data_ptr(), ELEMENTS[x.dtype], *walk(x), places.data_ptr(), rank, r.data_ptr(),
        q.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return r, q


def scale(
    r: Tensor, q: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, hyper: Hyper, factor: float
) -> tuple[Tensor, float]:
    """As reference.scale, of ``factor`` times the gradient: s [C] or [1], and u2.

    All float32, on the CPU and contiguous.
    """
    per_channel = hyper.scale_type == "channel"
    s = torch.empty((len(r) if per_channel else 1,), dtype=torch.float32, device="cpu")
    u2 = _C.cpu_scale(
        r.data_ptr(), q.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), *r.shape,
        *hyper.betas, hyper.eps, factor, per_channel, s.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return s, u2


def apply(w: Tensor, x: Tensor, coefficient: Tensor, decay: float) -> None:
    """As reference.apply, in place on W [C, K] with X of its dtype in the same memory order."""
    by_row = w.stride(1) == 1
    if not by_row:
        w, x = w.t(), x.t()
    alike = coefficient.numel() == 1  # for all channels
    _C.cpu_apply(
        w.data_ptr(), x.data_ptr(), ELEMENTS[w.dtype], *w.shape, w.stride(0), x.stride(0),
        coefficient.data_ptr(), 0 if alike else 1, by_row or alike, decay,
        torch.get_num_threads(),
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

    def get(
        self, owner: object, key: int, wanted: Hashable, make: Callable[[], Tensor]
    ) -> tuple[Tensor, bool]:
        """``make()``, or what it made before for this owner and key if that was ``wanted``; and
        whether it is held."""
        place = id(owner), key
        with self._lock:
            have = self._entries.get(place)
            if have is not None and have[0] == wanted:
                return have[1], True
            self._drop(place)
        p = make()
        size = p.numel() * p.element_size()
        with self._lock:
            holds = place not in self._entries and self.nbytes + size <= self.limit
            if holds:
                self._entries[place] = (wanted, p)
                self.nbytes += size
                self._keys_of(owner).add(key)
        return p, holds

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
