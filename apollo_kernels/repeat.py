"""Repeats a group's step while nothing has moved: looking again at each tensor is most of the time
that a step takes on the host, and between steps of training only gradients could move."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Repeats a launch on the same tensors: (hyper, counters, grad_scale, found_inf).
Launch = Callable[[Any, Tensor, Tensor | None, Tensor | None], None]

_STRUCTURE = ("rank", "proj_type", "scale_type", "capturable")


@dataclass
class Repeat:
    """The launches of a group's last step, and what they rest on."""

    group: dict[str, Any]
    state: MutableMapping[Any, Any]
    size: int  # of the state: a cleared one is another
    structure: tuple[Any, ...]
    launches: list[tuple[torch.device, Launch]]
    # Per parameter: its address, its gradient's address and dtype, its state and the first moment.
    seen: list[tuple[Tensor, int, int, torch.dtype | None, dict[str, Any], Tensor | None]]

    @classmethod
    def of(
        cls,
        group: dict[str, Any],
        state: MutableMapping[Any, Any],
        launches: list[tuple[torch.device, Launch | None]],
    ) -> Repeat | None:
        """None if a launch cannot be repeated, or a gradient's strides could change unseen."""
        kept = [(device, launch) for device, launch in launches if launch is not None]
        if len(kept) < len(launches):
            return None
        seen: list[Any] = []
        for p in group["params"]:
            if p.grad is None:
                seen.append((p, 0, 0, None, {}, None))
                continue
            if not p.grad.is_contiguous():
                return None
            own = state[p]
            seen.append((p, p.data_ptr(), p.grad.data_ptr(), p.grad.dtype, own, own["exp_avg"]))
        return cls(group, state, len(state), tuple(group[k] for k in _STRUCTURE), kept, seen)

    def holds(self, group: dict[str, Any], state: MutableMapping[Any, Any]) -> bool:
        """Whether the same launches would step the same tensors."""
        if (
            self.group is not group
            or self.state is not state
            or self.size != len(state)
            or len(group["params"]) != len(self.seen)
            or tuple([group[k] for k in _STRUCTURE]) != self.structure
        ):
            return False
        try:
            for p, (own, weight, gradient, dtype, values, moment) in zip(
                group["params"], self.seen, strict=True
            ):
                grad = p.grad
                if grad is None:
                    if dtype is not None or p is not own:
                        return False
                elif (
                    p is not own
                    or grad.data_ptr() != gradient
                    or p.data_ptr() != weight
                    or grad.dtype is not dtype
                    or not grad.is_contiguous()
                    or values.get("exp_avg") is not moment
                ):
                    return False
        except RuntimeError:  # a sparse gradient has no address
            return False
        return True
