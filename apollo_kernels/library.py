"""A group's step as a torch.library operator: how torch.compile sees it, without a graph break.

    apollo_kernels::step

Lists run over the parameters of a group that have a gradient, the low-rank ones first: there are as
many keys and update_norms as those. ``numbers``, ``switches`` and ``names`` are Hyper's and the
group's. Eager steps do not come through here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from apollo_kernels import backends, options, plan
from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.state import layout_of

_library = torch.library.Library("apollo_kernels", "DEF")
_library.define(
    "step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] update_norms, int[] keys, Tensor(z!) counters, Tensor? lr, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? clip, float[] numbers, int[] switches, "
    "str[] names) -> ()"
)


class Store:
    """The plans of one optimizer's compiled steps. An operator takes no objects, so it finds them
    by a number, and they end with the optimizer."""

    _numbers = count()
    _alive: WeakValueDictionary[str, Store] = WeakValueDictionary()

    def __init__(self) -> None:
        self.name = str(next(self._numbers))
        self.plans: dict[tuple[str, torch.device], plan.GroupPlan] = {}
        self._alive[self.name] = self

    @classmethod
    def find(cls, name: str) -> Store:
        return cls._alive.get(name) or Store()


def packed(
    hyper: Hyper, group: dict[str, Any], backend: str, store: str, slot: int
) -> tuple[list[float], list[int], list[str]]:
    """Hyper, and what decides a group's plan, as the operator takes them; lr goes beside them."""
    lr = 0.0 if isinstance(hyper.lr, Tensor) else hyper.lr
    numbers = [lr, *hyper.betas, hyper.eps, hyper.weight_decay, hyper.scale]
    switches: list[Any] = [hyper.correct_bias, hyper.maximize, hyper.scale_front, hyper.disable_nl]
    switches += [hyper.stochastic_rounding, hyper.exact_projection, hyper.update_proj_gap]
    switches += [group["rank"] or 0, group["batch_dims"], group["capturable"]]
    names = [backend, hyper.scale_type, hyper.distribution, group["proj_type"], store, str(slot)]
    return numbers, [int(s) for s in switches], names


def _unpacked(
    lr: Tensor | None, numbers: Sequence[float], switches: Sequence[int], names: Sequence[str]
) -> tuple[Hyper, dict[str, Any]]:
    rate, beta1, beta2, eps, weight_decay, scale = numbers
    correct_bias, maximize, scale_front, disable_nl, stochastic, exact = map(bool, switches[:6])
    hyper = Hyper(
        lr=rate if lr is None else lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
        correct_bias=correct_bias, maximize=maximize, scale_type=names[1], scale=scale,
        scale_front=scale_front, disable_nl=disable_nl, update_proj_gap=switches[6],
        distribution=names[2], stochastic_rounding=stochastic, exact_projection=exact,
    )  # fmt: skip
    group = {"rank": switches[7] or None, "batch_dims": switches[8], "proj_type": names[3]}
    return hyper, group


def _states(
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    update_norms: Sequence[Tensor],
    keys: Sequence[int],
) -> list[dict[str, Any]]:
    states: list[dict[str, Any]] = [
        {"step": t, "exp_avg": m, "exp_avg_sq": v}
        for t, m, v in zip(steps, exp_avgs, exp_avg_sqs, strict=True)
    ]
    for state, norm, key in zip(states, update_norms, keys, strict=False):
        state.update(update_norm=norm, seed=key)
    return states


@torch._disable_dynamo  # an operator's body is not to be traced
def _step(
    weights: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], update_norms: list[Tensor], keys: list[int], counters: Tensor,
    lr: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None,
    numbers: list[float], switches: list[int], names: list[str],
) -> None:  # fmt: skip
    hyper, group = _unpacked(lr, numbers, switches, names)
    options.check_lr(hyper.lr)
    states = _states(exp_avgs, exp_avg_sqs, steps, update_norms, keys)
    device = counters.device
    chosen = backends.choose(names[0], device)
    backends.check_capturable(chosen, device, bool(switches[9]))
    backend = backends.load(chosen)
    key = backend, clip is not None, *group.values()
    store, place = Store.find(names[4]), (names[5], device)
    made = store.plans.get(place)
    if made is None or not made.holds(key, weights, grads, states):
        made = store.plans[place] = plan.build(
            weights, grads, states, group, key, {device: backend}, separate=clip is not None
        )
    plan.run_one(made, grads, hyper, Signals(counters, grad_scale, found_inf, clip))


def call(
    params: Sequence[Tensor],
    group: dict[str, Any],
    states: Mapping[Tensor, Any],
    signals: Signals,
    backend: str,
    store: str,
    slot: int,
) -> None:
    """The operator over the parameters of a group that live on one device."""
    hyper = options.hyper_of(group)
    params = sorted(params, key=lambda p: layout_of(p, group) is None)
    own = [states[p] for p in params]
    low_rank = [s for s in own if "update_norm" in s]
    lr = hyper.lr if isinstance(hyper.lr, Tensor) else None
    torch.ops.apollo_kernels.step(
        params, [p.grad for p in params], [s["exp_avg"] for s in own],
        [s["exp_avg_sq"] for s in own], [s["step"] for s in own],
        [s["update_norm"] for s in low_rank], [s["seed"] for s in low_rank],
        signals.counters, lr, signals.grad_scale, signals.found_inf, signals.clip,
        *packed(hyper, group, backend, store, slot),
    )  # fmt: skip


_library.impl("step", _step, "CompositeExplicitAutograd")


@torch.library.register_fake("apollo_kernels::step", lib=_library)
def _fake_step(*_: Any) -> None:
    return None
