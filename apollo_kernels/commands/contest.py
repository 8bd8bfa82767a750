"""A step of several optimizers over the same matrices, in one run: for ``bench`` and bench_step.py.

On a CPU the optimizers take turns, so that a machine whose speed drifts is unfair to none; on a GPU
each has the memory for itself.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from apollo_kernels.commands import timing
from apollo_kernels.commands.output import Progress
from apollo_kernels.commands.peers import BASELINE, Build, ours, peers, published_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP = 3  # builds of state, compiled kernels and the allocator's blocks


@dataclass(frozen=True)
class Model:
    """The matrices that take the low-rank step: those of one layer, [out, in], and how many."""

    name: str
    layer: list[tuple[int, int]]
    layers: int
    hidden: int


def parameters(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> list[torch.nn.Parameter]:
    """Matrices with synthetic gradients, shared by all optimizers."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        w, g = (torch.empty(shape, dtype=dtype, device=device) for _ in "wg")
        p = torch.nn.Parameter(w.normal_(std=0.02, generator=generator))
        p.grad = g.normal_(std=1e-3, generator=generator)
        made.append(p)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all tensors in the state, also those inside of objects (apollo_torch's projector)."""
    total = 0
    for state in optimizer.state.values():
        values = list(state.values())
        values += [v for x in state.values() for v in getattr(x, "__dict__", {}).values()]
        total += sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))
    return total


def fitting_layers(model: Model, width: int, device: torch.device, together: int) -> int:
    """As many layers as fit with weights, gradients and the Adam states of ``together`` peers.

    All of them where the system does not tell how much memory is free (macOS, Windows).
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return model.layers
    layer = sum(m * n for m, n in model.layer) * width * (2 + 2 * together)
    return max(1, min(model.layers, int(0.85 * free / layer)))


def gpu_details(optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, Any]:
    """Of one step: kernel launches, the host's time, host syncs, and memory beyond what stays."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    optimizer.step()
    host_ms = 1e3 * (time.perf_counter() - begin)
    torch.cuda.synchronize(device)

    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(w.message) for w in caught)
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return {"launches": len(kernels), "host ms": host_ms, "syncs": syncs, "extra MB": extra / 1e6}


class Contest:
    """The steps of several optimizers over the same parameters."""

    def __init__(self, builds: dict[str, Build], ps: list[torch.nn.Parameter]):
        self.device = ps[0].device
        self.samples: dict[str, list[float]] = {name: [] for name in builds}
        self.details: dict[str, dict[str, Any]] = {name: {} for name in builds}
        self.alive: dict[str, torch.optim.Optimizer] = {}
        for name, build in builds.items():
            try:
                self.alive[name] = build(ps)
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        """A peer that breaks says so in its row; ours may not break."""
        if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
            raise error
        first = (str(error).splitlines() or [""])[0][:80]
        self.details[name] = {"note": f"{type(error).__name__}: {first}"}
        self.samples[name] = []
        self.alive.pop(name, None)

    def round(self, keep: bool) -> None:
        for name, optimizer in list(self.alive.items()):
            try:
                ms = timing.once(optimizer.step, self.device)
            except Exception as error:
                self._drop(name, error)
            else:
                if keep:
                    self.samples[name].append(ms)

    def finish(self) -> None:
        for name, optimizer in self.alive.items():
            self.details[name]["state MB"] = state_bytes(optimizer) / 1e6
            if self.device.type == "cuda":
                self.details[name].update(gpu_details(optimizer, self.device))


def contests(
    builds: dict[str, Build], model: Model, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, Contest]]:
    """All optimizers at once on a CPU; one after the other on a GPU. With the layers that fit."""
    together = len(builds) if device.type == "cpu" else 1
    layers = fitting_layers(model, dtype.itemsize, device, together)
    ps = parameters(model.layer * layers, dtype, device)
    names = list(builds)
    for i in range(0, len(names), together):
        yield layers, Contest({n: builds[n] for n in names[i : i + together]}, ps)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def entrants(
    model: Model, rank: int, device: torch.device, compiled: bool = False
) -> dict[str, Build | str]:
    """All of peers.py, ours on every back end, and for those that take minutes a word why not."""
    every: dict[str, Build | str] = {**peers(rank, device, compiled), **ours(rank, device)}
    if device.type == "cuda" and model.hidden > 1024:
        # It would draw every P anew, with a host sync.
        slow = "plain PyTorch on a GPU: see the small models"
        every.update({name: slow for name in every if name.startswith("ours torch")})
        slow = "its singular values take minutes: see the small models"
        every.update({n: slow for n, b in every.items() if n.startswith("GaLore") and callable(b)})
    return every


def race(
    model: Model,
    every: dict[str, Build | str],
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
) -> list[dict[str, Any]]:
    """One row per optimizer; times are scaled to all layers where not all fit."""
    builds = {name: build for name, build in every.items() if not isinstance(build, str)}
    samples: dict[str, list[float]] = {}
    details: dict[str, dict[str, Any]] = {}
    layers = model.layers
    label = f"{model.name} {str(dtype).removeprefix('torch.')}"
    with Progress(label, len(builds) * (WARM_UP + rounds)) as bar:
        for fit, contest in contests(builds, model, dtype, device):
            layers = fit
            for turn in range(WARM_UP + rounds):
                contest.round(keep=turn >= WARM_UP)
                bar.update(len(contest.samples))
            contest.finish()
            samples.update(contest.samples)
            details.update(contest.details)
            contest.alive.clear()
    scale = model.layers / layers
    rows = []
    for name, build in every.items():
        row: dict[str, Any] = {"optimizer": name}
        row["layers"] = f"{layers}/{model.layers}" + ("" if scale == 1 else ", scaled")
        if isinstance(build, str):
            row["note"] = build
        elif samples[name]:
            found = timing.Timing.of(scale * x for x in samples[name])
            row.update(ms=found.median, p20=found.p20, p80=found.p80)
            for column, peer in (("x AdamW", BASELINE), ("x apollo_torch", published_name(name))):
                if samples.get(peer):
                    row[column] = timing.Timing.of(samples[peer]).median * scale / found.median
        for key, value in details.get(name, {}).items():
            row[key] = value * scale if key in ("state MB", "launches") else value
        rows.append(row)
    return rows
