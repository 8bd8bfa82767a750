"""The two steps as torch.library operators: how torch.compile sees them, one for a whole group.

    apollo_kernels::step_low_rank, apollo_kernels::step_dense

Lists run over the parameters of a group. ``numbers``, ``switches`` and ``kinds`` are Hyper's, and
the name of the back end that is asked for. Eager steps call a back end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from apollo_kernels.philox import ProjectionCache
from apollo_kernels.reference import Dense, Hyper, LowRank

_COMMON = (
    "Tensor(z!) counters, Tensor? lr, Tensor? grad_scale, Tensor? found_inf, "
    "float[] numbers, int[] switches, str[] kinds) -> ()"
)
_library = torch.library.Library("apollo_kernels", "DEF")
_library.define(
    "step_low_rank(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] update_norms, Tensor(e!)[] steps, int[] keys, "
    "int[] rows, " + _COMMON
)
_library.define(
    "step_dense(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(e!)[] steps, " + _COMMON
)
DENSE_FIELDS = ("weight", "grad", "exp_avg", "exp_avg_sq", "step")
LOW_RANK_FIELDS = ("weight", "grad", "exp_avg", "exp_avg_sq", "update_norm", "step", "key")
_cache = ProjectionCache()  # of compiled steps: an operator has no optimizer to keep it


def packed(hyper: Hyper, backend: str) -> tuple[Tensor | None, list[float], list[int], list[str]]:
    """Hyper as an operator takes it: lr if it is a tensor, numbers, switches, and names."""
    tensor = hyper.lr if isinstance(hyper.lr, Tensor) else None
    lr = 0.0 if isinstance(hyper.lr, Tensor) else hyper.lr
    numbers = [lr, *hyper.betas, hyper.eps, hyper.weight_decay, hyper.scale]
    switches = [hyper.correct_bias, hyper.maximize, hyper.scale_front, hyper.disable_nl]
    switches.append(hyper.stochastic_rounding)
    kinds = [backend, hyper.scale_type, hyper.distribution]
    return tensor, numbers, [*map(int, switches), hyper.update_proj_gap], kinds


def _unpacked(
    lr: Tensor | None, numbers: Sequence[float], switches: Sequence[int], kinds: Sequence[str]
) -> Hyper:
    rate, beta1, beta2, eps, weight_decay, scale = numbers
    correct_bias, maximize, scale_front, disable_nl, stochastic = map(bool, switches[:5])
    return Hyper(
        rate if lr is None else lr, (beta1, beta2), eps, weight_decay, correct_bias, maximize,
        kinds[1], scale, scale_front, disable_nl, switches[5], kinds[2], stochastic,
    )  # fmt: skip


def _run(kind: str, item: type[LowRank] | type[Dense], arguments: Sequence[Any]) -> None:
    """An operator's arguments as a batch, for the back end that is asked for."""
    from apollo_kernels import ops

    *columns, counters, lr, grad_scale, found_inf, numbers, switches, kinds = arguments
    batch = [item(*row) for row in zip(*columns, strict=True)]
    hyper = _unpacked(lr, numbers, switches, kinds)
    backend = ops.load(ops.choose(kinds[0], counters.device))
    getattr(backend, kind)(batch, hyper, counters, _cache, grad_scale, found_inf)


def _step_low_rank(*arguments: Any) -> None:
    *columns, rows = arguments[:8]
    booleans = [bool(row) for row in rows]  # schemas have no list of them beside tensors
    _run("step_low_rank", LowRank, (*columns, booleans, *arguments[8:]))


def _step_dense(*arguments: Any) -> None:
    _run("step_dense", Dense, arguments)


_library.impl("step_low_rank", _step_low_rank, "CompositeExplicitAutograd")
_library.impl("step_dense", _step_dense, "CompositeExplicitAutograd")


def call(
    kind: str,
    backend: str,
    batch: Sequence[Any],
    hyper: Hyper,
    counters: Tensor,
    *amp: Tensor | None,
) -> None:
    """A back end's ``step_low_rank`` or ``step_dense`` as one operator; the step's own order."""
    lr, *settings = packed(hyper, backend)
    low_rank = kind == "step_low_rank"
    names = LOW_RANK_FIELDS if low_rank else DENSE_FIELDS
    columns: list[list[Any]] = [[getattr(item, name) for item in batch] for name in names]
    if low_rank:
        columns.append([int(item.rows) for item in batch])
    operator = getattr(torch.ops.apollo_kernels, kind)
    operator(*columns, counters, lr, *amp, *settings)


@torch.library.register_fake("apollo_kernels::step_low_rank", lib=_library)
def _fake_low_rank(*_: Any) -> None:
    return None


@torch.library.register_fake("apollo_kernels::step_dense", lib=_library)
def _fake_dense(*_: Any) -> None:
    return None
