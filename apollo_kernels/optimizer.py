"""APOLLO as a torch.optim.Optimizer: parameter groups, state, and a step handed to a plan.

The way of a gradient: ``step`` checks every group, plan.py groups what has a gradient into batches
of a back end (backends.py chooses it), and the batches do the arithmetic; reference.py says what
it is. All checks of a step come before its first write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from numbers import Integral
from operator import is_, is_not, itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apollo_kernels import (
    backends,
    checks,
    clipping,
    detail,
    distributed,
    flat,
    keys,
    library,
    names,
    options,
    plan,
    remarks,
    state,
)
from apollo_kernels.batch import Hyper, Signals
from apollo_kernels.distributed import is_sharded
from apollo_kernels.memory import MemoryReport, measure
from apollo_kernels.quantized import Int8Weight
from apollo_kernels.release import Release, once_per_step, refuse_model
from apollo_kernels.state import as_step

# What of a group decides its plan, and what of it decides its Hyper; lr is looked at by itself.
_structure = itemgetter("rank", "proj_type", "batch_dims", "capturable", "dense_state")
_CHECKED = {*options.HYPER_KEYS, "proj", "rank", "proj_type", "batch_dims", "differentiable"}
_CHECKED |= {"dense_state"}
_settings = itemgetter(*sorted(_CHECKED - {"lr"}))


class _Runtime:
    """What an optimizer keeps beside its state; no copy and no checkpoint ever sees it."""

    def __init__(self) -> None:
        self.units: list[plan.Unit] = []  # the groups, with their plans
        self.release: Release | None = None
        self.states: tuple[list[Tensor], list[Any]] = [], []  # the state as the last step saw it
        self.hypers: dict[int, tuple[Any, Hyper]] = {}
        self.counters: dict[torch.device, Tensor] = {}
        self.compiled = library.Store()
        self.grad_norm: Tensor | None = None
        self.warned: set[str] = set()
        self.given: list[set[str]] | None = None  # the keys of groups, while the optimizer is made
        self.flat = flat.Memory()
        self.detail: detail.Detail | None = None

    def forget(self) -> None:
        """Plans, and with them the state that they own."""
        self.units.clear()
        if self.release is not None:
            self.release.forget_plans()
        self.states = [], []
        self.compiled.plans.clear()
        if self.detail is not None:
            self.detail.forget()


class _Seen(NamedTuple):
    """What the checks of a step have found; everything is by unit."""

    hypers: list[Hyper]
    keys: list[tuple[Any, ...]]  # of plans
    gradients: list[list[Tensor] | None]  # None where the plan is not true any more
    places: Mapping[Tensor, checks.Place]
    stale: list[tuple[int, dict[torch.device, ModuleType]]]  # with the back ends for a new plan


class APOLLO(torch.optim.Optimizer):
    """Approximated gradient scaling for memory-efficient LLM optimization (arXiv 2412.05270).

    Parameters with two or more dimensions in a group with ``rank`` take APOLLO's step; all others
    take decoupled AdamW. ``apollo_kernels.param_groups`` makes the groups of a model. Keys of a
    group that belong to somebody else (``lr_scale``, ``wd_mult``) stay in it and are not read.

    Args
        params: parameters, with names or without, or groups; a group may override every argument
            but ``seed``, ``backend``, ``fused``, ``max_grad_norm`` and ``gradient_release``. A name
            decides a parameter's projections, or else its position.
        lr: learning rate, a float or a 1-element tensor.
        betas, eps: of Adam, on the projected gradient.
        weight_decay: decoupled, as in AdamW.
        rank: rows of the random projection; clamped to the contracted side. None: dense AdamW,
            with a warning if no group has a rank, and none has "rank": None of its own.
        proj: "random" (the same as "gaussian"), "rademacher" (signs), or "sparse": one sign per
            contracted index, for a cost that does not grow with the rank (take it from rank 16 on).
        scale_type: "channel", or "tensor" for APOLLO-Mini.
        scale: the square of the paper's alpha; 128 for Mini with rank 1.
        update_proj_gap: steps between two draws of the projection (T).
        proj_type: "std" contracts the smaller side, "reverse_std" the larger, "right" the columns,
            "left" the rows.
        correct_bias: Adam's bias correction, in the step size.
        scale_front: alpha before the norm-growth limiter instead of after it.
        disable_nl: no norm-growth limiter.
        seed: of all projections; equal on every rank of a data-parallel group.
        backend: "auto", "cuda", "triton" or "torch"; ``python -m apollo_kernels info`` explains.
        maximize: ascend.
        foreach: accepted for compatibility; every back end batches as it can.
        fused: with True torch.amp.GradScaler leaves it to the step to divide by its scale and to
            skip what is infinite, as with torch's fused optimizers: no gradient is read for it, and
            nobody waits for the device. Otherwise it unscales ``p.grad`` before the step, which
            clipping by another hand (Lightning's, say) needs. Nothing else depends on it.
        capturable: keep lr and step on the device (CUDA graphs); needs a kernel back end there.
        differentiable: refused.
        stochastic_rounding: bf16 matrices in low-rank groups are rounded up or down by chance, so
            that updates far below a weight's precision add up; no master copy is needed.
        exact_projection: normals come from correctly rounded functions on a GPU too, so that every
            card, and the CPU, draws the same bits. For replicas on unlike cards; slower where
            float64 is (consumer cards). Signs and "sparse" are exact anyway.
        dense_state: how the moments of dense parameters are kept: "float32", "bfloat16" (half the
            bytes) or "int8" (a quarter), both rounded by chance. It is this optimizer's and no
            checkpoint's: loaded moments are converted.
        batch_dims: that many leading dimensions count matrices: an expert weight [E, m, n] with
            batch_dims 1 is E matrices, each with its own projection, scales and limiter.
        max_grad_norm: clips the norm of all gradients together to this, as
            ``torch.nn.utils.clip_grad_norm_`` before the step, without another read of the
            low-rank ones; ``p.grad`` stays as it is. ``grad_norm`` tells the norm.
        gradient_release: each parameter is stepped inside of backward as soon as its gradient is
            complete, and the gradient is freed; ``step()`` ends the step (see ``attach``).
    Errors
        ValueError: names the argument, or the key of the group, and its value. A key that nearly is
            one of ours raises, too.
    Warnings
        UserWarning, once and with names, for what is hardly meant so: no rank at all, a rank where
        there is no matrix or where it saves nothing, three dimensions without ``batch_dims``.
    """

    _runtime: _Runtime

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        proj: str = "random",
        scale_type: str = "channel",
        scale: float = 1.0,
        update_proj_gap: int = 200,
        proj_type: str = "std",
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        seed: int = 0,
        backend: str = "auto",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        stochastic_rounding: bool = False,
        exact_projection: bool = False,
        dense_state: str = "float32",
        batch_dims: int = 0,
        max_grad_norm: float | None = None,
        gradient_release: bool = False,
    ):
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        backends.check_name(backend, "backend")
        options.check_max_grad_norm(max_grad_norm, gradient_release)
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        options.make_plain(defaults)
        if isinstance(params, torch.nn.Module):
            raise ValueError(
                f"params must be parameters or groups, got the module {type(params).__name__}: "
                "take apollo_kernels.apollo(model), or model.named_parameters()"
            )
        self._runtime = _Runtime()
        self._runtime.given = given = []
        super().__init__(params, defaults)
        self._runtime.given = None
        for remark in remarks.of_all(self.param_groups, given, self._name_of):
            self._warn_once(remark)
        if gradient_release:
            self._release()

    @property
    def max_grad_norm(self) -> float | None:
        """What the norm of all gradients is clipped to; it may be set between two steps."""
        return self.defaults["max_grad_norm"]

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        options.check_max_grad_norm(value, self.defaults["gradient_release"])
        self.defaults["max_grad_norm"] = value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler hands over grad_scale and found_inf instead of unscaling ``p.grad``.
        With gradient release there is none to unscale, and ``step`` refuses what is handed over."""
        return bool(self.defaults["fused"]) or self.gradient_release

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, before it was clipped: float32 [] on the
        device, so that nobody waits for it; None without ``max_grad_norm``."""
        return self._runtime.grad_norm

    # ---- parameter groups ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; keys that are missing take the optimizer's defaults.

        Unknown keys stay where they are, for whoever put them there, unless they are close to one
        of ours: then they raise, since nobody would read them.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group)}")
        group = dict(param_group)
        if "projection_type" in group:
            warnings.warn("group key 'projection_type' is read as 'proj_type'", stacklevel=2)
            group.setdefault("proj_type", group.pop("projection_type"))
            group.pop("projection_type", None)
        _refuse_duplicates_in(group)
        options.check_names(group, f" in parameter group {len(self.param_groups)}")
        options.make_plain(group)
        options.check_group({**self.defaults, **group})
        given = set(group)
        names.complete(group, self.param_groups)
        super().add_param_group(group)
        added = self.param_groups[-1]
        for key in options.OPTIMIZER_KEYS:
            added.pop(key, None)
        try:
            self._check_added(len(self.param_groups) - 1)
            if self._runtime.release is not None:
                self._runtime.release.follow()
        except (ValueError, NotImplementedError):
            self.param_groups.pop()
            raise
        self._runtime.flat.add(added)
        if self._runtime.given is not None:  # what there is to say comes for all groups together
            self._runtime.given.append(given)
            return
        index = len(self.param_groups) - 1
        for remark in remarks.of_added(added, given, index, self._name_of):
            self._warn_once(remark)

    def _check_added(self, index: int) -> None:
        group = self.param_groups[index]
        names.check(group, f" (parameter group {index})")
        names.number_all(group)
        for place, p in enumerate(group["params"]):
            checks.check_placement(p, group, partial(self._name_of, index, place))
        flat.refuse(group["params"], group, lambda place: self._name_of(index, place))
        for p in group["params"]:
            if p.is_complex():
                raise ValueError(
                    f"APOLLO does not support complex parameters; one of shape {tuple(p.shape)} in "
                    f"group {index} is {p.dtype}"
                )

    def _warn_once(self, text: str) -> None:
        if text not in self._runtime.warned:
            self._runtime.warned.add(text)
            warnings.warn(text, stacklevel=_levels_to_the_caller())

    def _name_of(self, index: int, place: int) -> str:
        """How an error calls the parameter at ``place`` of group ``index``: by name, or else by its
        position over all groups."""
        if name := names.of(self.param_groups[index], place):
            return f"parameter {name!r} ({place} of group {index})"
        position = place + sum(len(group["params"]) for group in self.param_groups[:index])
        return f"parameter {position} ({place} of group {index})"

    # ---- the step --------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` reevaluates the model with gradients enabled and returns the loss.

        Non-finite gradients never reach a weight, a moment or the limiter; see ``stats()``.
        """
        loss, release = None, self._runtime.release
        if release is not None:
            release.begin_at_step()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if release is not None:
                release.end()
            elif torch.compiler.is_compiling() and not self._breaks_graph():
                self._compiled_step()  # a trace cannot look into the choice of a back end
            else:
                self._eager_step()
        return loss

    def _breaks_graph(self) -> bool:
        """The operator of a compiled step knows neither int8 weights nor narrow moments nor
        DTensors, and keeps no record: that step breaks the graph."""
        groups = self.param_groups
        if self.record_detail:
            return True
        params = [p for group in groups for p in group["params"]]
        narrow = any(group["dense_state"] != "float32" for group in groups)
        return narrow or any(isinstance(p, Int8Weight) or is_sharded(p) for p in params)

    @torch._disable_dynamo  # where a trace breaks, what follows is not to be traced piece by piece
    def _eager_step(self) -> None:
        self._runtime.flat.refuse_orphans(self.param_groups, self._name_of)
        units, known = self._whole_groups(), self._state_is_known()
        plans = [unit.plan for unit in units]
        self._step_units(units, known)
        if not known or any(map(is_not, plans, [unit.plan for unit in units])):
            self._runtime.states = list(self.state), list(self.state.values())

    def _whole_groups(self) -> list[plan.Unit]:
        units, groups = self._runtime.units, self.param_groups
        del units[len(groups) :]
        units += [plan.Unit(index, 0, []) for index in range(len(units), len(groups))]
        for unit, group in zip(units, groups, strict=True):
            unit.params = group["params"]
        return units

    def _step_units(self, units: list[plan.Unit], known: bool = False) -> None:
        """Steps what has a gradient; ``known``: the state holds the dicts that it held before."""
        if any(distributed.any_sharded(unit.params) for unit in units):
            seen, infinite = self._agreed(units, known)
        else:
            seen, infinite = self._looked_at(units, known), False
        hypers, gradients = seen.hypers, self._gradients(units, seen)
        made = [unit.plan for unit in units if unit.plan is not None]
        parts = list(zip(made, gradients, hypers, strict=True))
        signals = {w.device: self._signals(w.device, infinite) for p in made for w in p.works}

        def signals_of(device: torch.device) -> Signals:
            return signals.get(device) or self._signals(device, infinite)

        record = self._runtime.detail
        with (
            plan.without_autocast(signals),
            contextlib.nullcontext(parts) if record is None else record.recording(parts) as run,
        ):
            norm = plan.run(run, signals_of, self.max_grad_norm)
        self._runtime.grad_norm = norm

    def _hyper(self, index: int, group: dict[str, Any]) -> Hyper:
        """The group's Hyper, checked: its values may have been changed by hand since last time."""
        where, known = f" (parameter group {index})", self._runtime.hypers
        try:
            values, lr = _settings(group), group["lr"]
        except KeyError as error:
            raise ValueError(f"key {error} is missing{where}") from None
        values = tuple(tuple(v) if isinstance(v, list) else v for v in values)  # lists may change
        if index in known and _equal(known[index][0], values):
            options.check_lr(lr, where)
            if known[index][1].lr is lr:
                return known[index][1]
        else:
            options.check_group(group, where)
        options.make_plain(group)
        known[index] = values, options.hyper_of(group)
        return known[index][1]

    def _agreed(self, units: list[plan.Unit], known: bool) -> tuple[_Seen, bool]:
        """The checks, together with the other ranks; and whether one of them has found an Inf."""
        axes = distributed.axes_of(p for unit in units for p in unit.params)
        odd = distributed.misplaced(p for unit in units for p in unit.params)
        if odd:
            alike = [(p.shape, p.grad.placements) for p in odd]
            distributed.agreed(axes, lambda: None, lambda: alike, None)
            distributed.place_gradients(odd)
        look, asked = partial(self._looked_at, units, known), partial(self._asked, units)
        return distributed.agreed(axes, look, asked, getattr(self, "found_inf", None))

    def _looked_at(self, units: list[plan.Unit], known: bool) -> _Seen:
        """All checks of a step, in all units; nothing is made or written yet."""
        hypers = [self._hyper(unit.index, self.param_groups[unit.index]) for unit in units]
        groups, clip = self.param_groups, self.max_grad_norm is not None
        asked = self.defaults["backend"], os.environ.get(backends.ENVIRONMENT), clip
        keys = [(*asked, *_structure(groups[unit.index])) for unit in units]
        state = None if known else self.state
        gradients = [
            None if unit.plan is None else unit.plan.gradients(unit.params, key, state)
            for unit, key in zip(units, keys, strict=True)
        ]
        stale = [i for i, found in enumerate(gradients) if found is None]
        places: Mapping[Tensor, checks.Place] = {}
        chosen = []
        if stale:
            changed, places = [units[i] for i in stale], self._places()
            self._runtime.flat.refuse_swapped(groups, self._name_of)
            checks.check_units(changed, groups, self.state, self._name_of)
            chosen = [self._choose_backends(unit) for unit in changed]
        return _Seen(hypers, keys, gradients, places, list(zip(stale, chosen, strict=True)))

    def _asked(self, units: list[plan.Unit]) -> Any:
        """What all ranks that share sharded parameters must want alike."""
        hypers = [self._runtime.hypers[unit.index][1] for unit in units]
        rates = [hyper.lr if isinstance(hyper.lr, float) else None for hyper in hypers]
        rest = [dataclasses.replace(hyper, lr=0.0) for hyper in hypers]
        structures = [_structure(self.param_groups[unit.index]) for unit in units]
        live = [[p.grad is not None for p in unit.params] for unit in units]
        devices = dict.fromkeys(p.device for unit in units for p in unit.params)
        chosen = [backends.choose(self.defaults["backend"], device) for device in devices]
        rest_of_all = self.defaults["seed"], self.max_grad_norm, chosen
        return rates, rest, structures, live, *rest_of_all

    def _gradients(self, units: list[plan.Unit], seen: _Seen) -> list[list[Tensor]]:
        """The gradients of every unit, with a plan for each that is true now."""
        gradients = seen.gradients
        self._make_states((units[i] for i, _ in seen.stale), seen.places)
        for i, modules in seen.stale:
            units[i].plan = None  # the old one goes before the new one takes its memory
            units[i].plan = self._build(units[i], seen.keys[i], modules)
            gradients[i] = units[i].gradients()
        return gradients  # type: ignore[return-value]

    def _state_is_known(self) -> bool:
        """Whether every parameter has the very dict that the last step found or gave it."""
        keys, values = self._runtime.states
        if len(keys) != len(self.state):
            return False
        return all(map(is_, self.state, keys)) and all(map(is_, self.state.values(), values))

    def _choose_backends(self, unit: plan.Unit) -> dict[torch.device, ModuleType]:
        chosen: dict[torch.device, ModuleType] = {}
        for device in dict.fromkeys(p.device for p in unit.params if p.grad is not None):
            backend = backends.choose(self.defaults["backend"], device)
            capturable = self.param_groups[unit.index]["capturable"]
            backends.check_capturable(backend, device, capturable)
            chosen[device] = backends.load(backend)
        return chosen

    def _build(
        self, unit: plan.Unit, key: tuple[Any, ...], modules: Mapping[torch.device, ModuleType]
    ) -> plan.GroupPlan:
        params, group = unit.params, self.param_groups[unit.index]
        states = [self.state[p] for p in params if p.grad is not None]
        gradients = [p.grad for p in params]
        separate = self.max_grad_norm is not None
        return plan.build(params, gradients, states, group, key, modules, separate=separate)

    def _compiled_step(self) -> None:
        """The step as torch.compile traces it: one operator per group and device."""
        groups = self.param_groups
        for index, group in enumerate(groups):
            options.check_group(group, f" (parameter group {index})")
        units = [plan.Unit(index, 0, group["params"]) for index, group in enumerate(groups)]
        places = self._places()
        self._runtime.flat.refuse_swapped(groups, self._name_of)
        checks.check_units(units, groups, self.state, self._name_of)
        self._make_states(units, places)
        calls: list[tuple[int, torch.device, list[Tensor]]] = []
        for index, group in enumerate(groups):
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_device.setdefault(p.device, []).append(p)
            calls += [(index, device, params) for device, params in by_device.items()]
        signals = {device: self._signals(device) for _, device, _ in calls}
        self._runtime.grad_norm = None
        if self.max_grad_norm is not None:
            # Here the gradients are read once more: an operator steps one group by itself.
            squares: dict[torch.device, list[Tensor]] = {}
            for _, device, params in calls:
                read = [p.grad for p in params if p.grad is not None]
                squares.setdefault(device, []).append(clipping.square_norm(read))
            norm, clip = clipping.norm_and_factor(squares, self._signals, self.max_grad_norm)
            self._runtime.grad_norm = norm
            signals = {d: dataclasses.replace(s, clip=clip.to(d)) for d, s in signals.items()}
        for index, device, params in calls:
            store, backend = self._runtime.compiled.name, self.defaults["backend"]
            library.call(params, groups[index], self.state, signals[device], backend, store, index)

    def _signals(self, device: torch.device, infinite: bool = False) -> Signals:
        """The device's counters, and what torch.amp.GradScaler left on the optimizer.

        ``infinite``: another rank's has found an Inf, so that none may step.
        """
        counters = self._runtime.counters
        if device not in counters:
            counters[device] = torch.zeros((3,), dtype=torch.int64, device=device)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale, found = (None if t is None else t.to(device, torch.float32) for t in (scale, found))
        if infinite:
            found = torch.ones((), dtype=torch.float32, device=device)
        return Signals(counters[device], scale, found)

    # ---- gradient release ------------------------------------------------------------------------

    @property
    def gradient_release(self) -> bool:
        """Whether parameters are stepped inside of backward."""
        return self._runtime.release is not None

    def attach(self, model: torch.nn.Module) -> Release:
        """Gradient release for ``model``: from now on each parameter is stepped inside of backward.

        As soon as a gradient is complete its parameter is stepped and the gradient is freed, so
        that a few gradients live at a time. The loop stays as it is: forward, backward,
        ``step()``, scheduler, ``zero_grad()``. ``step()`` steps what still holds a gradient and
        ends the step; every bit is as without release. Micro-batches, and a backward whose
        gradients are not meant for these parameters, belong into ``accumulate()``.

        Returns
            a context manager that detaches at its end; without ``with`` until ``detach()``.
        Raises
            ValueError: if the trainable parameters of ``model`` are not the optimizer's, with
                names; for DistributedDataParallel, and with ``max_grad_norm``.
        """
        options.check_max_grad_norm(self.max_grad_norm, True)
        if self._runtime.release is not None:
            raise RuntimeError("gradients are released already: call detach() first")
        refuse_model(model, checks.places_of(self.param_groups, self._name_of), self._name_of)
        return self._release()

    def _release(self) -> Release:
        release = Release(self)
        release.follow()
        self._runtime.release, self.defaults["gradient_release"] = release, True
        self._runtime.units.clear()  # their plans
        return release

    def detach(self) -> None:
        """The normal mode from now on: backward leaves gradients, and ``step()`` steps them."""
        if self._runtime.release is not None:
            self._runtime.release.remove_hooks()
        self._runtime.release, self.defaults["gradient_release"] = None, False

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Within it gradients add up and nothing is stepped inside of backward: for all
        micro-batches but the last. Without gradient release it does nothing."""
        release = self._runtime.release
        return contextlib.nullcontext() if release is None else release.paused()

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of ``step``; but a release may have run the pre hooks in backward."""
        return once_per_step(func)

    # ---- state -----------------------------------------------------------------------------------

    def _make_states(
        self, units: Iterable[plan.Unit], places: Mapping[Tensor, checks.Place]
    ) -> None:
        """State for the parameters that have a gradient and no state yet."""
        new = [
            (p, self.param_groups[unit.index])
            for unit in units
            for p in unit.params
            if p.grad is not None and not self._state_is_whole(p, self.param_groups[unit.index])
        ]
        if not new:
            return
        seed, taken = self.defaults["seed"], self._taken_keys()
        called: dict[int, list[str]] = {}  # of groups
        for p, group in new:
            if self.state[p] is None:
                self.state[p] = {}
            own = self.state[p]  # the user's own dict, if he has put an empty one there
            if not own:
                own.update(state.zeros(p, group, p.device))
            if state.needs_key(p, group):
                where = places[p]
                if where.group not in called:
                    called[where.group] = names.all_of(group)
                name = called[where.group][where.place]
                key = keys.new_key(seed, name, where.position, len(places), taken)
                own["seed"] = key
                taken.add(key)
                self._warn_of_sharing(p, key, where)

    def _warn_of_sharing(self, p: Tensor, key: int, where: checks.Place) -> None:
        """Once per process, and not from within a trace."""
        if keys.told or torch.compiler.is_compiling() or not keys.claim(self._runtime, key, p):
            return
        keys.told = True
        warnings.warn(
            f"two optimizers of this process have parameters of shape {tuple(p.shape)} with one "
            f"key, and so with the same projections: {self._name_of(*where[:2])} is one. If both "
            "are of one model, make the groups with apollo_kernels.param_groups(model), or give "
            "parameters with their names in the whole model, as model.named_parameters() does; or "
            "else set another seed",
            stacklevel=_levels_to_the_caller(),
        )

    def _state_is_whole(self, p: Tensor, group: dict[str, Any]) -> bool:
        """A dense parameter whose weight or moments were narrowed in mid-run lacks a key alone."""
        own = self.state.get(p) or {}
        return len(own) > 0 and ("seed" in own or not state.needs_key(p, group))

    def _places(self) -> Mapping[Tensor, checks.Place]:
        """Where every parameter stands; ValueError for one that stands twice."""
        release = self._runtime.release
        if release is not None:  # it looks in every step, and not for every parameter
            return release.places
        return checks.places_of(self.param_groups, self._name_of)

    def _taken_keys(self) -> set[int]:
        return {own["seed"] for own in self.state.values() if own and "seed" in own}

    def key_of(self, p: Tensor) -> int:
        """The Philox key of a parameter: its state's, or the one that its first step gives it."""
        own = self.state.get(p) or {}
        if "seed" in own:
            return own["seed"]
        places = checks.places_of(self.param_groups, self._name_of)
        index, place, position = places[p]
        name, seed = names.of(self.param_groups[index], place), self.defaults["seed"]
        return keys.new_key(seed, name, position, len(places), self._taken_keys())

    def state_dict(self) -> dict[str, Any]:
        """As torch's; numbers of NumPy's in the groups become Python's, which any load reads."""
        for group in self.param_groups:
            options.make_plain(group)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict(); what does not fit raises ValueError before any change.

        torch casts loaded state to the parameter's dtype; the moments here stay float32, or take
        the group's own ``dense_state``, whatever was saved. The tensors are copies, so that two
        optimizers never share them.
        """
        loaded: list[tuple[Tensor, dict[str, Any]]] = []

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            given = self._in_own_dense_state(given)
            loaded[:] = self._checked(given)
            return given

        def restore(_: torch.optim.Optimizer) -> None:
            for p, own in loaded:
                self.state[p] = own

        # Hooks, since torch may swap the dict in the user's pre-hooks and calls their post-hooks
        # last; of this call only, since hooks made in __init__ are lost by deepcopy and pickle.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._runtime.forget()  # plans and what they own: the state before

    def _in_own_dense_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same with the groups' ``dense_state`` as it is here: how this optimizer stores
        moments is no part of a run."""
        groups, _ = parts_of(state_dict)
        pairs = zip(groups, self.param_groups, strict=False)
        own = [{**saved, "dense_state": group["dense_state"]} for saved, group in pairs]
        return {**state_dict, "param_groups": own + groups[len(own) :]}

    def _checked(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """The states of ``state_dict`` as ours, with the parameters that they belong to."""
        groups, states = parts_of(state_dict)
        self._runtime.flat.refuse_swapped(self.param_groups, self._name_of)
        made: list[tuple[Tensor, dict[str, Any]]] = []
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in self.param_groups]:
            return made  # torch's own check says so
        for index, saved_group in enumerate(groups):
            group = {**self.defaults, **saved_group}
            options.make_plain(group)
            self._check_saved_rank(index, saved_group)
            options.check_group(group, f" (group {index} of the loaded state)")
            params = self.param_groups[index]["params"]
            for place, (p, i) in enumerate(zip(params, saved_group["params"], strict=True)):
                saved, name = states.get(i), self._name_of(index, place)
                if not saved:
                    continue
                if not isinstance(saved, Mapping):
                    raise ValueError(f"the state of {name} must be a dict, got {saved!r}")
                if "projector" in saved:
                    raise ValueError(
                        f"the state of {name} was written by apollo_torch: use "
                        "apollo_kernels.load_apollo_torch"
                    )
                own = state.converted(p, group, saved, name)
                state.check(p, group, own, lambda name=name: name)  # type: ignore[misc]
                made.append((p, own))
        self._warn_of_equal_keys(made)
        return made

    def _check_saved_rank(self, index: int, saved: Mapping[str, Any]) -> None:
        """A loaded group brings its options, and with them low-rank steps may end."""
        group = self.param_groups[index]
        places = [i for i, p in enumerate(group["params"]) if state.layout_of(p, group)]
        if saved.get("rank") is not None or not places:
            return
        where, what = f"group {index} of the loaded state", self._name_of(index, places[0])
        if "rank" not in saved:
            raise ValueError(
                f"{where} has no 'rank', so that another optimizer wrote it, AdamW perhaps, while "
                f"{what} has rank {group['rank']} here. Its moments are no projected ones: begin "
                "with a fresh state, or load it into groups without a rank to go on with AdamW"
            )
        self._warn_once(
            f"{where} has rank None, which is loaded with it: {what} had rank {group['rank']} and "
            "takes AdamW's step from now on, as all of its group"
        )

    def _warn_of_equal_keys(self, loaded: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """They come from states that separate optimizers gave to parameters without names."""
        places, first = self._places(), dict[Any, Tensor]()
        for p, own in loaded:
            made = own.get("seed"), p.shape
            if made[0] is not None and first.setdefault(made, p) is not p:
                one, other = (self._name_of(*places[q][:2]) for q in (first[made], p))
                self._warn_once(
                    f"{other} has the key of {one} in the loaded state, and so its projections"
                )
                return

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_runtime", _Runtime())
        older: dict[str, Any] = {"max_grad_norm": None, "batch_dims": 0, "gradient_release": False}
        older["dense_state"] = "float32"
        self.defaults.update({**older, **self.defaults})
        for group in self.param_groups:  # of an older version: fill what it did not know
            for key, value in self.defaults.items():
                if key in options.OPTIMIZER_KEYS:  # `fused` was a group's
                    group.pop(key, None)
                else:
                    group.setdefault(key, value)
            names.number_all(group)
        for p, own in self.state.items():
            if isinstance(p, Tensor) and own and "step" in own:
                own["step"] = as_step(own["step"], p.device)
        if self.defaults["gradient_release"] and self._runtime.release is None:
            self._release()

    # ---- reports ---------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Bytes of weights and optimizer state per group, next to AdamW's; print it for a table.

        Of sharded parameters it counts what this rank holds, and ``traffic`` what a step sends.
        """
        for index, group in enumerate(self.param_groups):
            options.check_group(group, f" (parameter group {index})")

        def state_of(p: Tensor, group: dict[str, Any]) -> Mapping[str, Any]:
            return self.state.get(p) or state.zeros(p, group, "meta")

        return measure(self.param_groups, state_of, clips=self.max_grad_norm is not None)

    @property
    def record_detail(self) -> bool:
        """Whether steps leave a record for ``stats(detail=True)``; it may be set at any time.

        A step then copies the scales of all low-rank matrices, 4 bytes per channel, which stay on
        the device, and compares the limiter's norms: a few launches more per group, and no wait.
        """
        return self._runtime.detail is not None

    @record_detail.setter
    def record_detail(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"record_detail must be True or False, got {value!r}")
        if value != self.record_detail:
            self._runtime.detail = detail.Detail() if value else None

    def stats(self, detail: bool = False) -> dict[str, Any]:
        """What has happened since construction, counted per matrix and step; waits for the GPU.

        A rank counts every matrix that it holds a part of, even an empty one.

        Args
            detail: also tell of each low-rank parameter; ``record_detail`` must have been set.
        Returns
            parameters: that have state;  updates: applied;  limited: held by the norm-growth
            limiter;  nonfinite: skipped, or for dense parameters partly skipped, for NaN or Inf.
            With ``detail`` also detail, by the parameter's name (its shape and key if it has none).
            scales: quantiles of the last step's scale factors s over all channels on this rank, by
            the keys min, p10, p50, p90 and max; NaN after a gradient with NaN.
            update_norm: the norm of the last update that was applied, before the learning rate and
            Adam's bias correction, with alpha and the limiter in it.
            limited: the share of the steps since the first recorded one that the limiter held.
        Raises
            RuntimeError: for ``detail`` without a record.
        """
        total = [0, 0, 0]
        for counters in self._runtime.counters.values():
            total = [a + b for a, b in zip(total, counters.tolist(), strict=True)]
        kinds = ("updates", "limited", "nonfinite")
        found = {"parameters": len(self.state), **dict(zip(kinds, total, strict=True))}
        return {**found, "detail": self._detail()} if detail else found

    def _detail(self) -> dict[str, dict[str, Any]]:
        if self._runtime.detail is None:
            raise RuntimeError(
                "stats(detail=True) needs a record: set optimizer.record_detail = True before the "
                "steps that it is to tell of"
            )
        called: dict[Tensor, Callable[[], str]] = {}
        for group in self.param_groups:
            for p, name in zip(group["params"], names.all_of(group), strict=True):
                called[p] = partial(self._title_of, p, name)
        return self._runtime.detail.read(called)

    def _title_of(self, p: Tensor, name: str) -> str:
        return name or f"{'x'.join(map(str, p.shape))} key {self.state[p]['seed']:016x}"


class APOLLOAdamW(APOLLO):
    """APOLLO behind the constructor of apollo_torch's class of this name, argument for argument.

    ``no_deprecation_warning`` is accepted and has no effect. Keyword-only arguments: see APOLLO.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        scale_front: bool = False,
        disable_nl: bool = False,
        no_deprecation_warning: bool = True,
        **options: Any,
    ):
        options.update(correct_bias=correct_bias, scale_front=scale_front, disable_nl=disable_nl)
        super().__init__(params, lr, betas, eps, weight_decay, **options)


def _refuse_duplicates_in(group: dict[str, Any]) -> None:
    """torch only warns; the launches of one step would then write one weight at the same time."""
    params = group.get("params")
    if isinstance(params, Iterable) and not isinstance(params, (Tensor, set)):
        group["params"] = params = list(params)  # it may be an iterator
        tensors = [p[1] if isinstance(p, tuple) else p for p in params]
        places = {id(p): place for place, p in reversed(list(enumerate(tensors)))}
        for place, p in enumerate(tensors):
            if places[id(p)] != place:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} stands twice in a parameter group, at "
                    f"{places[id(p)]} and at {place}"
                )


def _equal(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether two tuples of settings are; not where one cannot be a setting, as an array."""
    try:
        return bool(values == others)
    except (RuntimeError, ValueError):
        return False


def _levels_to_the_caller() -> int:
    """How many frames lie between a warning and the line of the user's that it is about."""
    inside = (str(Path(__file__).parent), str(Path(torch.__file__).parent))
    frame, level = sys._getframe(1), 0
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    return level + 1


def parts_of(
    state_dict: Any, argument: str = "state_dict"
) -> tuple[list[dict[str, Any]], Mapping[Any, Any]]:
    """The groups and the states of a state_dict; ValueError if it is none."""
    whole = state_dict if isinstance(state_dict, dict) else {}
    groups, states = whole.get("param_groups"), whole.get("state")
    good = isinstance(groups, list) and all(isinstance(g, dict) and "params" in g for g in groups)
    if not good or not isinstance(states, Mapping):
        raise ValueError(
            f"{argument} must be or hold an optimizer's state_dict, with 'param_groups' (a list of "
            f"dicts with 'params') and 'state' (a dict), got {type(state_dict).__name__}"
        )
    return groups, states  # type: ignore[return-value]
