"""What a back end is handed, and what it answers with: the border between plan.py and kernels.

    project   R = P X, q_c = |X_c|^2        (paper: Algorithm 1, step 1)
    scale     M, V <- Adam(R); s; limiter    (steps 2 and 3)
    apply     W <- W - step * s_c * X_c      (step 4)

A gradient G [m, n] is seen as X [C, K]: C channels, each K long along the contracted side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NORM_GROWTH = 1.01  # gamma of the norm-growth limiter (paper, section 4.1, after Fira)
TINY = 1e-8  # keeps quotients of norms finite; a stored norm below it counts as unset


@dataclass(frozen=True)
class Hyper:
    """What one parameter group asks for. ``lr`` may be a tensor; the rest is plain numbers."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    correct_bias: bool
    maximize: bool
    scale_type: str = "channel"
    scale: float = 1.0
    scale_front: bool = False
    disable_nl: bool = False
    update_proj_gap: int = 200
    distribution: str = "gaussian"
    stochastic_rounding: bool = False
    exact_projection: bool = False

    def step_size(self, step: int) -> float:
        """lr times Adam's bias correction, kept outside of the limiter (as published)."""
        if not self.correct_bias:
            return float(self.lr)
        c1, c2 = (_one_minus_power(beta, step) for beta in self.betas)
        return float(self.lr) * math.sqrt(c2) / c1


@functools.lru_cache(maxsize=64)  # all parameters of a group ask the same
def _one_minus_power(beta: float, step: int) -> float:
    return -math.expm1(step * math.log(beta)) if beta > 0 else 1.0


@dataclass(frozen=True)
class Signals:
    """What reaches a step on one device from outside of its group.

    counters: int64 [3] (updates, limited, not finite), added to.
    grad_scale, found_inf: float32 [] of torch.amp.GradScaler; a set found_inf skips every write.
    clip: float32 [] for kernels, float64 [] for PyTorch: the factor of max_grad_norm, on top of
    1 / grad_scale. It is made between ``project`` and ``scale``, and NaN where the norm of all
    gradients is not finite.
    """

    counters: Tensor
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    clip: Tensor | None = None

    def skips(self) -> bool:
        """Whether every write is skipped. The host waits for found_inf, as in ``factor``."""
        return self.found_inf is not None and bool(self.found_inf)

    def factor(self, maximize: bool) -> float:
        """What the gradient is multiplied with."""
        sign = -1.0 if maximize else 1.0
        unscaled = sign if self.grad_scale is None else sign / float(self.grad_scale)
        return unscaled * (1.0 if self.clip is None else float(self.clip))


@dataclass(frozen=True)
class Part:
    """Where the part of a matrix [m, n] begins that this rank holds.

    row, column: of its first element, for random numbers go by a number's place in the whole.
    owners: how many ranks hold a part of the contracted side of the same channels, C of them. If
        there are several, R and q are sums over these ranks, and each of them has the moments of
        up to ``share`` channels, in the order of the ranks.
    """

    row: int
    column: int
    owners: int = 1

    def share(self, channels: int) -> int:
        """How many of ``channels`` an owner has; the last ones may have fewer, or none."""
        return -(-channels // self.owners)


@dataclass(frozen=True)
class LowRank:
    """One low-rank matrix: weight and grad [m, n], moments [C, r], update_norm [], step int64 [].

    ``rows``: channels are the rows, so the columns are contracted; else the reverse.
    ``leads``: advances ``step``, which the expert matrices of one parameter share.
    ``grid``: of an int8 weight, whose codes are ``weight``, uint8 with rows in memory (int8.py).
    ``part``: of a matrix that is spread over ranks, which part this one is; moments [C', r], of
    this rank's own channels. Its batch is a PartBatch.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    update_norm: Tensor
    step: Tensor
    key: int
    rows: bool
    leads: bool = True
    grid: Tensor | None = None
    part: Part | None = None


@dataclass(frozen=True)
class Dense:
    """One parameter under AdamW: all tensors of the parameter's shape but step, int64 [].

    An int8 weight has its codes as ``weight``, its ``grid``, and the ``key`` of its rounding.
    Narrow moments are bfloat16, or codes in uint8 with ``units``, of both (moments.py); they are
    rounded with ``key`` too. ``first``: the number of the first element in the whole parameter, of
    which this is a part.
    """

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    grid: Tensor | None = None
    key: int = 0
    units: tuple[Tensor, Tensor] | None = None
    first: int = 0


class Batch(Protocol):
    """Low-rank matrices of one device that take their step together: three calls, in this order."""

    def project(self, hyper: Hyper, signals: Signals) -> None:
        """R and q of every matrix. Unless built ``separate``, a batch may do what is due as early
        or as late as suits it: the moments here already, or all three in ``apply``."""

    def square_norm(self) -> Tensor:
        """float64 []: the sum of all q, as the gradients are. After ``project``, if separate."""

    def scale(self, hyper: Hyper, signals: Signals) -> None:
        """Moments, s_c, the limiter and the step counters."""

    def apply(self, hyper: Hyper, signals: Signals) -> None:
        """The weights."""

    def scales(self, hyper: Hyper) -> list[Tensor]:
        """s of each item at the last step that was not skipped, [C] or [1], or zeros if all were.
        The next step may write into these tensors. Nobody waits for the device."""

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        """The gradients have moved and nothing else has changed: a new table, and the same maps.

        False if another batch has to be built: a CUDA graph reads this one's table, say.
        """


class PartBatch(Batch, Protocol):
    """Parts of matrices, all of them cut by the same ranks. distributed.py stands between the
    verbs, which are four here: ``scale`` neither limits nor counts, ``limit`` does.

    Widths are equal on all owners, and how a batch uses them is its own affair.

    sums: [owners, width], after ``project``: this part's share of R and q, for each owner those of
        its channels. None where there is one owner, or a host knows that the step is skipped.
    norms: float64, 1D, after ``scale``: sums over this rank's own channels, matrix by matrix.
        Before ``limit`` they become sums over all ranks. None as ``sums`` where it is skipped.
    s: [width], after ``scale``: the scales of this owner's channels. None as ``sums``, and where
        there is one scale for all channels.
    """

    sums: Tensor | None
    norms: Tensor | None
    s: Tensor | None

    def receive_sums(self, sums: Tensor) -> None:
        """[width], what this owner was sent, added up over ranks: before ``scale``."""

    def receive_scales(self, s: Tensor) -> None:
        """[owners, width], s of all owners: before ``limit``."""

    def limit(self, hyper: Hyper, signals: Signals) -> None:
        """The limiter and the step counters, by ``norms``."""


class DenseBatch(Protocol):
    """Dense parameters of one device that take their step together."""

    def adamw(self, hyper: Hyper, signals: Signals) -> None:
        """Moments, weights and step counters."""

    def set_gradients(self, addresses: Sequence[int]) -> bool:
        """The gradients have moved and nothing else has changed: a new table, and the same maps.

        False if another batch has to be built: a CUDA graph reads this one's table, say.
        """


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the moments beside a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
