"""How everything under bench/ is timed, and what is written beside each figure."""

from __future__ import annotations

import csv
import datetime
import itertools
import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import apollo_kernels
from apollo_kernels.commands.output import Progress, cell, table
from apollo_kernels.commands.timing import (
    Timing,
    card_name,
    default_device,
    keep_freed_memory,
    once,
    synchronize,
)

__all__ = ["Progress", "Timing", "card_name", "default_device", "keep_freed_memory", "once"]
__all__ += ["synchronize", "table"]

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


def cold(
    make: Callable[[int], T],
    call: Callable[[T], object],
    nbytes: int,
    device: torch.device,
    budget_s: float = 0.3,
) -> Timing:
    """Times ``call`` over inputs that rotate through more memory than any cache holds.

    ``make(i)`` builds input i, ``nbytes`` is about its size. At least 5 and at most 200 samples.
    """
    cache = 256e6 if device.type == "cuda" else 64e6
    count = max(2, min(64, int(cache / max(nbytes, 1)) + 1))
    inputs = itertools.cycle([make(i) for i in range(count)])
    warm = min(once(lambda: call(next(inputs)), device) for _ in range(3))
    repeats = int(max(5, min(200, 1e3 * budget_s / max(warm, 1e-3))))
    return Timing.of(once(lambda: call(next(inputs)), device) for _ in range(repeats))


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on: card, driver, versions, commit, date."""
    query = ("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
    return {
        "card": card_name(device),
        "driver_and_power": _command(*query) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "apollo_kernels": apollo_kernels.__version__,
        "commit": _command("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def copy_bandwidth(device: torch.device, nbytes: int | None = None) -> float:
    """Bytes per second of a device-to-device copy, reads and writes both counted."""
    size = nbytes or (2**30 if device.type == "cuda" else 2**27)
    make = lambda _: (torch.empty(size, dtype=torch.uint8, device=device).fill_(1) for _ in "ab")  # noqa: E731
    timing = cold(lambda i: tuple(make(i)), lambda ab: ab[1].copy_(ab[0]), 2 * size, device)
    return 2 * size / (timing.median * 1e-3)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a streaming read: the sum of a float32 tensor."""
    count = 2**28 if device.type == "cuda" else 2**25
    make = lambda _: torch.ones(count, device=device)  # noqa: E731
    timing = cold(make, lambda x: x.sum(), 4 * count, device)
    return 4 * count / (timing.median * 1e-3)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square matmul."""
    n = 8192 if device.type == "cuda" else 1024
    make = lambda _: tuple(torch.randn(n, n, device=device).to(dtype) for _ in "ab")  # noqa: E731
    timing = cold(make, lambda ab: ab[0] @ ab[1], 4 * n * n, device)
    return 2 * n**3 / (timing.median * 1e-3)


def write(
    folder: Path, stem: str, rows: list[dict[str, Any]], device: torch.device, **more: Any
) -> None:
    """The rows as ``stem``.csv, and with the environment as ``stem``.json."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    content = {"environment": environment(device), **more, "rows": rows}
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")


def markdown(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([cell(row.get(k)) for k in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
