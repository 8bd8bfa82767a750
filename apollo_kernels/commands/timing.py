"""How a step is timed: for ``bench``, and for everything in the repository's folder bench/."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


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
        p20, *_, p80 = statistics.quantiles(kept, n=5, method="inclusive")
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


def card_name(device: torch.device) -> str:
    """A name that can be a folder's: nvidia-h200, cpu-x86_64."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"
    )
    return "-".join(name.lower().replace("_", " ").split()).replace("cpu-x86-64", "cpu-x86_64")
