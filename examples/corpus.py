"""Text as bytes: the Python standard library, which every machine has, or given files."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256  # a token is a byte
_LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__")


def standard_library() -> list[Path]:
    """Sources and docs of this Python, without its tests; the same list on each call."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for pattern in ("*.py", "*.txt", "*.rst") for p in root.rglob(pattern)]
    return sorted(p for p in files if not set(p.relative_to(root).parts) & set(_LEFT_OUT))


def load(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Training and validation bytes (uint8). One file in ten is held out, by a hash of its name.

    A single file is split at nine tenths.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        digest = hashlib.sha256(path.name.encode()).digest()
        parts[digest[0] % 10 == 0].append(path.read_bytes())
    train, held_out = b"\n".join(parts[0]), b"\n".join(parts[1])
    if len(paths) < 20 or not train or not held_out:  # too few names to hash
        both = train + held_out
        cut = len(both) * 9 // 10
        train, held_out = both[:cut], both[cut:]
    return tuple(torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in (train, held_out))


def batch(data: Tensor, size: int, length: int, seed: int, index: int) -> Tensor:
    """Batch ``index`` [size, length] int64: a pure function of its arguments, so a run resumes."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    starts = torch.randint(len(data) - length, (size,), generator=generator)
    return torch.stack([data[s : s + length] for s in starts]).long()
