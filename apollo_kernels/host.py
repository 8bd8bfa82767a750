"""The CPU's compiled passes over bf16 weights and gradients; reference.py specifies them.

PyTorch has no bf16 matmul with a float32 result on a CPU, and widens before it computes. Where the
processor has AVX512-BF16 and the native module was built, these two verbs run there instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apollo_kernels import philox

DOT_RANK = 4  # up to this rank a contiguous channel meets z as plain rows (csrc/host_bf16.h)


def supported(*tensors: Tensor) -> bool:
    """Whether all are bf16 CPU matrices with one contiguous side, on a processor that can."""
    native = philox._C is not None and philox._C.host_bf16_supported()
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
    rows = x.stride(1) == 1
    r, q = torch.empty(channels, rank), torch.empty(channels)
    philox._C.host_project(
        x.data_ptr(), channels, k, x.stride(0) if rows else x.stride(1), rows,
        z.data_ptr(), rank, z.shape[1], rank**-0.5, r.data_ptr(), q.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return r, q


def apply(w: Tensor, x: Tensor, coefficient: Tensor, decay: float) -> None:
    """As reference.apply, in place on bf16 W [C, K] with bf16 X in the same memory order."""
    by_row = w.stride(1) == 1
    if not by_row:
        w, x = w.t(), x.t()
    coefficient = coefficient.expand(w.shape[0 if by_row else 1]).contiguous()
    philox._C.host_apply(
        w.data_ptr(), x.data_ptr(), *w.shape, w.stride(0), x.stride(0),
        coefficient.data_ptr(), by_row, decay, torch.get_num_threads(),
    )  # fmt: skip
