"""Clipping by the norm of all gradients, as torch.nn.utils.clip_grad_norm_ does it before a step.

The low-rank gradients' part of the norm comes from ``project`` (Batch.square_norm); only the dense
ones are read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from apollo_kernels.batch import Signals


def square_norm(gradients: list[Tensor]) -> Tensor:
    """float64 []: one read of every gradient. float32 sums would overflow at 1.8e19."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in gradients:
        by_dtype.setdefault(g.dtype, []).append(g)
    norms: list[Tensor] = []
    for group in by_dtype.values():
        norms += torch._foreach_norm(group, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def norm_and_factor(
    squares: Mapping[torch.device, list[Tensor]],
    signals: Callable[[torch.device], Signals],
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """The norm of all gradients, float32 [], and what each is multiplied with, float64 []."""
    norm = total_norm(squares, signals)
    return norm.float(), clip_factor(norm, max_grad_norm)


def total_norm(
    squares: Mapping[torch.device, list[Tensor]], signals: Callable[[torch.device], Signals]
) -> Tensor:
    """float64 []: the norm of all gradients, without GradScaler's factor."""
    first = next(iter(squares), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=first)
    for several in squares.values():
        total = total + torch.stack(several).sum().to(first)
    norm = total.sqrt()
    own = signals(first)
    if own.grad_scale is not None:
        norm = norm / own.grad_scale.reshape(())
    if own.found_inf is not None:  # nothing was projected then
        norm = torch.where(own.found_inf.reshape(()) != 0, torch.inf, norm)
    return norm


def clip_factor(norm: Tensor, max_grad_norm: float) -> Tensor:
    """c = min(1, max_grad_norm / (norm + 1e-6)); NaN for a norm that is not finite.

    Multiplied into every gradient, NaN leaves it to the rules of non-finite gradients to keep every
    weight and every moment as they are.
    """
    factor = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), factor, torch.nan)
