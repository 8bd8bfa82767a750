"""Gradient release: each parameter is stepped inside of backward, and its gradient is freed.

    on_gradient   a gradient is complete: its parameter takes its step, and the gradient goes
    end           optimizer.step(): what still holds a gradient, and the end of the step

The optimizer steps one parameter as it steps a group, so that keys, state and every bit are those
of the normal mode. Here it is decided what is stepped when, and what cannot work that way.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from apollo_kernels import checks, plan

_SECOND = (
    "{name} got a second gradient before optimizer.step(), and the first one has been stepped and "
    "freed. For micro-batches put all but the last into `with optimizer.accumulate():`. Where "
    "checkpointed segments share a parameter, call torch.utils.checkpoint with use_reentrant=False"
)
_SCALER = (
    "gradient release steps {name} with a gradient that a GradScaler has scaled: it looks for inf "
    "in all gradients before any is stepped, which cannot be. Train in bfloat16, which needs no "
    "scaler (GradScaler(enabled=False) keeps the loop), or without gradient release"
)
_DISTRIBUTED = (
    "gradient release does not work under DistributedDataParallel: {name} would be stepped before "
    "its gradient is averaged over the ranks. It would save no memory there either: buckets hold "
    "all gradients at once. Train without gradient release, or on one process"
)


class Release:
    """The mode of one optimizer, from ``attach`` to ``detach``; a context manager that detaches."""

    def __init__(self, optimizer: Any):
        self._reference = weakref.ref(optimizer)
        self.places: Mapping[Tensor, checks.Place] = {}
        self.begun = False  # whether the step hooks of this step have run
        self._units: dict[Tensor, plan.Unit] = {}  # one parameter each
        self._listed: list[list[int]] = []  # the ids that groups held when ``places`` was made
        self._stepped: set[Tensor] = set()  # since the last ``end``
        self._paused = 0
        self._has_looked = False
        self._hooks: dict[Tensor, Any] = {}
        self._lock = threading.RLock()  # backward has one thread per device
        weakref.finalize(self, _remove, self._hooks)

    def __enter__(self) -> Any:
        return self._optimizer

    def __exit__(self, *_: Any) -> None:
        if self._optimizer is not None:
            self._optimizer.detach()

    @property
    def _optimizer(self) -> Any:
        """It owns this mode, and not the reverse, so it lives as long as it is asked for."""
        return self._reference()

    def remove_hooks(self) -> None:
        _remove(self._hooks)

    def forget_plans(self) -> None:
        for unit in self._units.values():
            unit.plan = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients add up as usual."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    # ---- which parameters ------------------------------------------------------------------------

    def follow(self) -> None:
        """Takes on what the groups hold now; groups and their lists may be changed by hand.

        Raises
            ValueError: for a parameter that stands twice or that another optimizer releases.
        """
        optimizer = self._optimizer
        listed = [list(map(id, group["params"])) for group in optimizer.param_groups]
        if listed == self._listed:
            return
        places = checks.places_of(optimizer.param_groups, optimizer._name_of)
        new = [p for p in places if p not in self._hooks]
        for p in new:
            if any(isinstance(h, _Hook) and h.release() for h in _hooks_of(p)):
                name = optimizer._name_of(*places[p][:2])
                raise ValueError(f"{name} is released by another optimizer: detach that one first")
        for p in [p for p in self._hooks if p not in places]:
            _remove({p: self._hooks.pop(p)})
        for p in new:
            self._hooks[p] = _hooked(p, _Hook(weakref.ref(self)))
        plans = {p: unit.plan for p, unit in self._units.items()}
        self._units = {
            p: plan.Unit(where.group, where.place, [p], plans.get(p)) for p, where in places.items()
        }
        self.places, self._listed = places, listed

    def _unit_of(self, p: Tensor) -> plan.Unit | None:
        """None for a parameter that stands in no group any more."""
        unit, groups = self._units.get(p), self._optimizer.param_groups
        with contextlib.suppress(IndexError):
            if unit is not None and groups[unit.index]["params"][unit.first] is p:
                return unit
        self.follow()
        return self._units.get(p)

    # ---- the step --------------------------------------------------------------------------------

    def on_gradient(self, p: Tensor) -> None:
        """Steps ``p``, whose gradient is complete, and frees the gradient; or raises, and ``p`` and
        its state are as before."""
        with self._lock:
            unit = None if self._paused or p.grad is None else self._unit_of(p)
            if unit is None:
                return
            self._refuse_second(p, unit)
            name = functools.partial(self._optimizer._name_of, unit.index, unit.first)
            try:
                if not self._has_looked:
                    _refuse_surroundings(p, name)
                    self._has_looked = True
                self._begin()
                self._step([unit])
            except Exception as error:
                _add_name(error, name())
                raise

    def _begin(self) -> None:
        """What runs before the first update of a step: its pre hooks."""
        if self.begun:
            return
        optimizer = self._optimizer
        arguments: tuple[Any, ...] = (optimizer,), {}
        own = optimizer._optimizer_step_pre_hooks
        for hook in chain(_global_optimizer_pre_hooks.values(), own.values()):
            if hook(optimizer, *arguments) not in (None, arguments):
                raise RuntimeError(
                    "a step pre hook returned other arguments for step(): with gradient release it "
                    "runs inside of backward, where step() has none yet"
                )
        self.begun = True

    def begin_at_step(self) -> None:
        """The pre hooks have run, now or in backward."""
        self.begun = True

    @torch._disable_dynamo
    def end(self) -> None:
        """Steps what still holds a gradient, all or nothing, and ends the step."""
        optimizer = self._optimizer
        scaled = (getattr(optimizer, key, None) for key in ("grad_scale", "found_inf"))
        if any(value is not None for value in scaled):
            raise RuntimeError(_SCALER.format(name="every parameter"))
        with self._lock:
            self.follow()
            left = [unit for p, unit in self._units.items() if p.grad is not None]
            for unit in left:
                self._refuse_second(unit.params[0], unit)
            self._step(left)
            self._stepped.clear()
            self.begun = False

    def _step(self, units: list[plan.Unit]) -> None:
        with torch.no_grad():
            self._optimizer._step_units(units)
        for unit in units:
            (p,) = unit.params
            self._stepped.add(p)
            # Kernels write by address: a graph that saved the weight and is still to be walked must
            # see, as after any write of PyTorch's, that it is another one now.
            torch.autograd.graph.increment_version(p)
            if p.grad is not None and p.grad.device.type == "cuda":  # other streams' memory
                p.grad.record_stream(torch.cuda.current_stream(p.grad.device))
            p.grad = None

    def _refuse_second(self, p: Tensor, unit: plan.Unit) -> None:
        if p in self._stepped:
            name = self._optimizer._name_of(unit.index, unit.first)
            raise RuntimeError(_SECOND.format(name=name))


class _Hook:
    """What a parameter calls; it keeps neither the optimizer nor its state alive."""

    def __init__(self, release: weakref.ref[Release]):
        self.release = release

    @torch._disable_dynamo
    def __call__(self, p: Tensor) -> None:
        release = self.release()
        if release is not None:
            release.on_gradient(p)


def _hooks_of(p: Tensor) -> list[Any]:
    return list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())


def _hooked(p: Tensor, hook: _Hook) -> Any:
    """The hook's handle; None for what never gets a gradient by backward.

    torch takes no hook for a frozen parameter, but keeps one while it is frozen.
    """
    if not p.is_leaf or not p.is_floating_point() or p.is_inference():
        return None
    frozen = not p.requires_grad
    p.requires_grad_(True)
    try:
        return p.register_post_accumulate_grad_hook(hook)
    finally:
        p.requires_grad_(not frozen)


def _remove(hooks: dict[Tensor, Any]) -> None:
    for handle in hooks.values():
        if handle is not None:
            handle.remove()
    hooks.clear()


def _add_name(error: Exception, name: str) -> None:
    """Whatever stopped backward says at which parameter it was."""
    text = str(error)
    if name not in text:
        error.args = (f"{text} (at the step of {name} inside of backward)", *error.args[1:])


def once_per_step(func: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` in torch's wrapper, which runs hooks; without its pre hooks if they have run."""
    whole = torch.optim.Optimizer.profile_hook_step(func)

    @functools.wraps(func)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        release = self._runtime.release
        if release is None or not release.begun:
            return whole(self, *args, **kwargs)
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            out = func(self, *args, **kwargs)
            self._optimizer_step_code()
            own = self._optimizer_step_post_hooks
            for hook in chain(own.values(), _global_optimizer_post_hooks.values()):
                hook(self, (self, *args), kwargs)
        return out

    return step


# ---- what cannot work ----------------------------------------------------------------------------


def refuse_model(
    model: torch.nn.Module,
    places: Mapping[Tensor, checks.Place],
    name_of: checks.NameOf,
) -> None:
    """Raises ValueError unless the trainable parameters of ``model`` are those of the groups."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(_DISTRIBUTED.format(name="every parameter"))
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    strange = [repr(name) for p, name in names.items() if p not in places]
    if strange:
        raise ValueError(
            f"model has trainable parameters that the optimizer does not step: {_some(strange)}. "
            "Their gradients would stay: give them to the optimizer, or freeze them"
        )
    missing = [
        name_of(where.group, where.place)
        for p, where in places.items()
        if p.requires_grad and p not in names
    ]
    if missing:
        raise ValueError(
            f"the optimizer steps what is not in model: {_some(missing)}. Attach the very module "
            "that is trained; for several one torch.nn.ModuleList of them"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _refuse_surroundings(p: Tensor, name: Callable[[], str]) -> None:
    """Looks for what will want ``p``'s gradient after the step: DistributedDataParallel, and a
    GradScaler in use (one that has scaled a loss). Once, before the first update: both exist by
    then, and nothing tells of them in a hook."""
    if _in_the_way(p) is not None:
        gc.collect()  # it may be garbage
        if (text := _in_the_way(p)) is not None:
            raise RuntimeError(text.format(name=name()))


def _in_the_way(p: Tensor) -> str | None:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for found in gc.get_objects():
        kind = type(found)
        if issubclass(kind, torch.amp.GradScaler):
            if getattr(found, "_enabled", False) and getattr(found, "_scale", None) is not None:
                return _SCALER
        elif distributed and issubclass(kind, DistributedDataParallel):
            module = getattr(found, "module", None)
            if module is not None and any(q is p for q in module.parameters()):
                return _DISTRIBUTED
    return None
