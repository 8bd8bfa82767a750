"""How everything under bench/ is timed, and what is written beside each figure."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import apollo_kernels

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile, and the samples themselves."""

    median: float
    p20: float
    p80: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Iterable[float]) -> Timing:
        kept = tuple(samples)
        if len(kept) == 1:
            return cls(kept[0], kept[0], kept[0], kept)
        p20, *_, p80 = statistics.quantiles(kept, n=5)
        return cls(statistics.median(kept), p20, p80, kept)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: else page faults of temporaries are what a CPU times, and
    the more so for the peers, which make more of them."""
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: on a GPU between two events, on a CPU by the clock."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


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


def card_name(device: torch.device) -> str:
    """A name that can be a folder's: nvidia-h200, cpu-x86_64."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    )
    return "-".join(name.lower().replace("_", " ").split()).replace("cpu-x86-64", "cpu-x86_64")


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


class Progress:
    """A bar on stderr, where tqdm is installed; else a line that counts."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            self.bar = None
        else:
            self.bar = tqdm(desc=what, total=total, mininterval=1.0, leave=False)

    def update(self, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif sys.stderr.isatty():
            print(f"\r{self.what}: {self.done}/{self.total}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


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


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; text to the left, numbers to the right."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(key)) for key in keys] for row in rows]
    numeric = [any(isinstance(row.get(key), (int, float)) for row in rows) for key in keys]
    widths = [max(len(key), *(len(c[i]) for c in cells)) for i, key in enumerate(keys)]
    lines = []
    for line in [keys, *cells]:
        aligned = zip(line, widths, numeric, strict=True)
        lines.append("  ".join(t.rjust(w) if right else t.ljust(w) for t, w, right in aligned))
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([_cell(row.get(k)) for k in keys] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
