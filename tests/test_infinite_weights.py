"""An infinite weight stays so on every back end: without decay, no 0 * Inf may arise."""

import contextlib
import os

import emulated
import pytest
import torch

from apollo_kernels import APOLLO


@pytest.mark.parametrize("backend", ["torch", "cuda", "triton"])
@pytest.mark.parametrize("rank", [None, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_weight_stays_infinite(backend, rank, dtype):
    device = contextlib.nullcontext()
    if backend == "cuda":
        if reason := emulated.why_not():
            pytest.skip(reason)
        device = emulated.device(emulated.load(emulated.build()))
    elif backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter runs on machines without a GPU")
    p = torch.nn.Parameter(torch.ones(24, 16).to(dtype))
    p.data[3, 5], p.data[4, 6] = float("inf"), -float("inf")
    p.grad = torch.randn(24, 16).to(dtype)
    with device:
        APOLLO([p], rank=rank, scale_type="tensor", backend=backend).step()
    assert p[3, 5] == float("inf")
    assert p[4, 6] == -float("inf")
    assert torch.isfinite(p).sum() == 24 * 16 - 2
