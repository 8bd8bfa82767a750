"""APOLLO as a torch.optim.Optimizer: parameter groups, state, and a step handed to a back end.

The way of a gradient: ``step`` sorts each group's parameters into low-rank and dense ones
(``_collect``), and a back end chosen in ops.py does the arithmetic; reference.py says what it is.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import operators, ops
from apollo_kernels.memory import MemoryReport, measure
from apollo_kernels.philox import ProjectionCache, parameter_key
from apollo_kernels.reference import Dense, Hyper, LowRank, compute_dtype
from apollo_kernels.repeat import Launch, Repeat

PROJECTIONS = {"random": "gaussian", "gaussian": "gaussian", "rademacher": "rademacher"}
SCALE_TYPES = ("channel", "tensor")
PROJ_TYPES = ("std", "reverse_std", "left", "right")

# Keys that torch, its schedulers and trainers put into groups: no typing errors.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum"}
_HYPER_KEYS = tuple(f.name for f in dataclasses.fields(Hyper) if f.name != "distribution")
_OWN_DEFAULTS = ("seed", "backend")  # of the optimizer, not of its groups


def matrix_shape(shape: Iterable[int]) -> tuple[int, int]:
    """How a parameter is seen: shape[0] x the rest."""
    first, *rest = shape
    return first, math.prod(rest)


def channels_are_rows(shape: tuple[int, int], proj_type: str) -> bool:
    """Whether the columns are contracted, for a matrix [m, n] (design: the contract's table)."""
    tall = shape[0] >= shape[1]
    return {"std": tall, "reverse_std": not tall, "right": True, "left": False}[proj_type]


class APOLLO(torch.optim.Optimizer):
    """Approximated gradient scaling for memory-efficient LLM optimization (arXiv 2412.05270).

    Parameters with two or more dimensions in a group with ``rank`` take APOLLO's step; all others
    take decoupled AdamW. ``apollo_kernels.param_groups`` makes the groups of a model.

    Args
        params: parameters or groups; a group may override every argument up to ``capturable``.
        lr: learning rate, a float or a 1-element tensor.
        betas, eps: of Adam, on the projected gradient.
        weight_decay: decoupled, as in AdamW.
        rank: rows of the random projection; clamped to the contracted side. None: dense AdamW.
        proj: "random" (the same as "gaussian") or "rademacher".
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
        foreach, fused: accepted for compatibility; every back end batches as it can.
        capturable: keep lr and step on the device (CUDA graphs); needs a kernel back end there.
        differentiable: refused.
        stochastic_rounding: bf16 matrices in low-rank groups are rounded up or down by chance, so
            that updates far below a weight's precision add up; no master copy is needed.
    Errors
        ValueError: names the argument, or the key of the group, and its value.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf

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
    ):
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        ops.check_name(backend, "backend")
        defaults = {k: v for k, v in locals().items() if k not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    # ---- parameter groups ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; keys that are missing take the optimizer's defaults, unknown ones raise."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group)}")
        group = dict(param_group)
        if "projection_type" in group:
            warnings.warn("group key 'projection_type' is read as 'proj_type'", stacklevel=2)
            group.setdefault("proj_type", group.pop("projection_type"))
            group.pop("projection_type", None)
        known = set(self.defaults) - set(_OWN_DEFAULTS)
        if unknown := set(group) - known - _FOREIGN_KEYS:
            raise ValueError(
                f"unknown key {', '.join(map(repr, sorted(unknown)))} in parameter group "
                f"{len(self.param_groups)}; known keys are {sorted(known)}"
            )
        _check_group({**self.defaults, **group})
        super().add_param_group(group)
        added = self.param_groups[-1]
        for key in _OWN_DEFAULTS:
            added.pop(key, None)
        for p in added["params"]:
            if p.is_complex():
                self.param_groups.pop()
                raise ValueError(f"APOLLO does not support complex parameters, got {p.dtype}")

    # ---- the step --------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` reevaluates the model with gradients enabled and returns the loss.

        Non-finite gradients never reach a weight, a moment or the limiter; see ``stats()``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        hyper = _hyper(group)
        compiling = torch.compiler.is_compiling()
        repeats: dict[int, Repeat] = self.__dict__.setdefault("_repeats", {})
        last = None if compiling else repeats.get(id(group))
        if last is not None:
            if last.holds(group, self.state):
                for device, launch in last.launches:
                    launch(hyper, self._counters(device), *self._amp(device))
                return
            del repeats[id(group)]
        launches: list[tuple[torch.device, Launch | None]] = []
        low_rank: dict[torch.device, list[Any]] = {}
        dense: dict[torch.device, list[Any]] = {}
        copies: list[tuple[Tensor, Tensor]] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            _check_gradient(p)
            state = self.state[p]
            if not state:
                state.update(self._new_state(p, group))
            self._check_state(p, group, state)
            if "update_norm" in state:
                item = _low_rank_item(p, group, state)
                low_rank.setdefault(p.device, []).append(item)
                # Of a matrix, and of whatever is contiguous, reshape makes a view.
                if not p.is_contiguous() and item.weight.data_ptr() != p.data_ptr():
                    copies.append((p, item.weight))
            else:
                names = ("exp_avg", "exp_avg_sq", "step")
                dense.setdefault(p.device, []).append(Dense(p, p.grad, *(state[n] for n in names)))
        for kind, batches in (("step_low_rank", low_rank), ("step_dense", dense)):
            for device, batch in batches.items():
                launches.append((device, self._run(kind, device, batch, group, hyper)))
        for p, weight in copies:
            p.copy_(weight.view(p.shape))
        repeat = Repeat.of(group, self.state, launches) if launches and not copies else None
        if repeat is not None:
            repeats[id(group)] = repeat

    def _run(
        self, kind: str, device: torch.device, batch: list[Any], group: dict[str, Any], hyper: Hyper
    ) -> Launch | None:
        """Hands a batch to its back end; under torch.compile as one operator."""
        counters, amp = self._counters(device), self._amp(device)
        if torch.compiler.is_compiling():  # which cannot look into the choice of a back end
            operators.call(kind, self.defaults["backend"], batch, hyper, counters, *amp)
            return None
        name = ops.choose(self.defaults["backend"], device)
        if name == "torch" and group["capturable"] and device.type == "cuda":
            raise RuntimeError("capturable=True needs a kernel back end; 'torch' reads the host")
        return getattr(ops.load(name), kind)(batch, hyper, counters, self._cache(), *amp)

    def _amp(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What torch.amp.GradScaler left on the optimizer for this step."""
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return tuple(None if t is None else t.to(device) for t in (scale, found))  # type: ignore

    def _cache(self) -> ProjectionCache:
        # An attribute, made when first needed: deepcopy and pickle keep only state and groups.
        return self.__dict__.setdefault("_projections", ProjectionCache())

    def _counters(self, device: torch.device) -> Tensor:
        counters = self.__dict__.setdefault("_device_counters", {})
        if device not in counters:
            counters[device] = torch.zeros(3, dtype=torch.int64, device=device)
        return counters[device]

    # ---- state -----------------------------------------------------------------------------------

    def _new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = _zeros(p, group, p.device)
        if "update_norm" in state:
            state["seed"] = self.key_of(p)
            if state["exp_avg"].shape[1] < group["rank"] and p.numel():
                self._warn_once(f"rank {group['rank']} is clamped to the contracted side")
            if group["scale_type"] == "channel" and group["rank"] < 4:
                self._warn_once(
                    f"scale_type='channel' with rank {group['rank']} trains badly: the ratio of "
                    "two norms over so few entries is ill-conditioned; take rank 4 or more, or "
                    "scale_type='tensor'"
                )
        return state

    def key_of(self, p: Tensor) -> int:
        """The Philox key of a parameter that has no state yet; later its state's seed holds."""
        everything = (q for group in self.param_groups for q in group["params"])
        position = next(i for i, q in enumerate(everything) if q is p)
        return parameter_key(self.defaults["seed"], position)

    def _warn_once(self, text: str) -> None:
        told = self.__dict__.setdefault("_warned", set())
        if text not in told:
            told.add(text)
            warnings.warn(text, stacklevel=6)

    def _check_state(self, p: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Raises if the state does not fit the parameter and its group (say, a changed rank)."""
        plan = _plan(p, group)
        expected = tuple(p.shape) if plan is None else plan[0]
        if ("update_norm" in state) != (plan is not None) or state["exp_avg"].shape != expected:
            raise ValueError(
                f"the state of a parameter of shape {tuple(p.shape)} does not fit its group: "
                f"exp_avg has shape {tuple(state['exp_avg'].shape)}, rank {group['rank']} and "
                f"proj_type {group['proj_type']!r} need {expected}; neither changes after step 1"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict(); a state that does not fit raises ValueError before any change.

        torch casts loaded state to the parameter's dtype; the moments here stay float32 and the
        tensors are copies, so that two optimizers never share them.
        """
        source: dict[str, Any] = {}

        def check(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
            source.update(given)
            self._check_loadable(given)

        def restore(_: torch.optim.Optimizer) -> None:
            for p, saved in self._match(source):
                self.state[p] = _own_state(p, saved)

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

    def _match(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        pairs = zip(params, ids, strict=False)  # torch itself checks the lengths
        return [(p, state_dict["state"][i]) for p, i in pairs if state_dict["state"].get(i)]

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        groups = {i: g for g in state_dict["param_groups"] for i in g["params"]}
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for p, i in zip(params, ids, strict=False):
            saved = state_dict["state"].get(i)
            if not saved:
                continue
            if "projector" in saved:
                raise ValueError(
                    "this state was written by apollo_torch: use apollo_kernels.load_apollo_torch"
                )
            if missing := {"step", "exp_avg", "exp_avg_sq"} - set(saved):
                raise ValueError(f"state of parameter {i} lacks {sorted(missing)}")
            self._check_state(p, {**self.defaults, **groups[i]}, saved)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of an older version: fill what it did not know
            for key, value in self.defaults.items():
                if key not in _OWN_DEFAULTS:
                    group.setdefault(key, value)

    # ---- reports ---------------------------------------------------------------------------------

    def memory_report(self) -> MemoryReport:
        """Bytes of weights and optimizer state per group, next to AdamW's; print it for a table."""
        return measure(self.param_groups, lambda p, g: self.state.get(p) or _zeros(p, g, "meta"))

    def stats(self) -> dict[str, int]:
        """What has happened since construction, counted per parameter and step; waits for the GPU.

        Returns
            parameters: that have state;  updates: applied;  limited: held by the norm-growth
            limiter;  nonfinite: skipped, or for dense parameters partly skipped, for NaN or Inf.
        """
        total = [0, 0, 0]
        for counters in self.__dict__.get("_device_counters", {}).values():
            total = [a + b for a, b in zip(total, counters.tolist(), strict=True)]
        names = ("updates", "limited", "nonfinite")
        return {"parameters": len(self.state), **dict(zip(names, total, strict=True))}


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


def _check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for the first value of a complete group that cannot be meant."""

    def check(key: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"{key} must be {expected}, got {group[key]!r}")

    def number(key: str) -> bool:
        return isinstance(group[key], (int, float)) and math.isfinite(group[key])

    lr = group["lr"]
    if isinstance(lr, Tensor):
        check("lr", lr.numel() == 1, "a number or a tensor of one element")
    else:
        check("lr", number("lr") and lr >= 0, "a number >= 0")
    betas = group["betas"]
    check("betas", len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
    for key in ("eps", "weight_decay"):
        check(key, number(key) and group[key] >= 0, "a number >= 0")
    for key in ("rank", "update_proj_gap"):
        value = group[key]
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        check(key, good or (key == "rank" and value is None), "an integer >= 1")
    check("scale", number("scale") and group["scale"] > 0, "a number > 0")
    check("scale_type", group["scale_type"] in SCALE_TYPES, f"one of {SCALE_TYPES}")
    check("proj_type", group["proj_type"] in PROJ_TYPES, f"one of {PROJ_TYPES}")
    known = tuple(PROJECTIONS)
    check("proj", group["proj"] in known, f"one of {known} (an SVD is not offered)")
    check("differentiable", not group["differentiable"], "False: the step has no derivative")
    both = bool(group["foreach"] and group["fused"])
    check("fused", not both, "False or None together with foreach=True")


def _hyper(group: dict[str, Any]) -> Hyper:
    return Hyper(
        **{key: group[key] for key in _HYPER_KEYS}, distribution=PROJECTIONS[group["proj"]]
    )


def _plan(p: Tensor, group: dict[str, Any]) -> tuple[tuple[int, int], bool] | None:
    """The moments' shape [C, r] and whether channels are rows; None for a dense parameter."""
    if group["rank"] is None or p.dim() < 2:
        return None
    shape = matrix_shape(p.shape)
    rows = channels_are_rows(shape, group["proj_type"])
    channels, contracted = shape if rows else shape[::-1]
    return (channels, min(group["rank"], contracted)), rows


def _zeros(p: Tensor, group: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The state's tensors before the first step."""
    dtype, plan = compute_dtype(p.dtype), _plan(p, group)
    step = torch.zeros((), dtype=torch.float32, device=device)
    if plan is None:
        m, v = (torch.zeros_like(p, dtype=dtype, device=device) for _ in range(2))
        return {"step": step, "exp_avg": m, "exp_avg_sq": v}
    m, v = (torch.zeros(plan[0], dtype=dtype, device=device) for _ in range(2))
    norm = torch.zeros((), dtype=dtype, device=device)
    return {"step": step, "exp_avg": m, "exp_avg_sq": v, "update_norm": norm}


def _low_rank_item(p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> LowRank:
    plan = _plan(p, group)
    assert plan is not None and p.grad is not None
    shape = matrix_shape(p.shape)
    return LowRank(
        # A view wherever the strides allow; else (channels_last convolutions) a copy, written back.
        weight=p.reshape(shape),
        grad=p.grad.reshape(shape),
        exp_avg=state["exp_avg"],
        exp_avg_sq=state["exp_avg_sq"],
        update_norm=state["update_norm"],
        step=state["step"],
        key=state["seed"],
        rows=plan[1],
    )


def _check_gradient(p: Tensor) -> None:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise RuntimeError("APOLLO does not support sparse gradients")
    if type(p).__name__ == "DTensor":
        raise NotImplementedError(
            f"a sharded parameter (DTensor of shape {tuple(p.shape)}) is not supported yet"
        )


def _own_state(p: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """A copy of loaded state on p's device, in the contract's dtypes; ints stay ints."""
    state = {}
    for key, value in saved.items():
        if key == "step" or isinstance(value, Tensor):
            dtype = torch.float32 if key == "step" else compute_dtype(p.dtype)
            value = torch.as_tensor(value).to(p.device, dtype, copy=True)
        state[key] = value
    return state
