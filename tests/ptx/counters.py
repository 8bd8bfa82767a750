"""What accesses cost: 32-byte sectors of global memory, and wavefronts of shared memory's banks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .arithmetic import distinct


@dataclass
class Access:
    """What warps asked for, what they took, and the least that it could have been."""

    requests: int = 0
    used: int = 0  # sectors or wavefronts
    ideal: int = 0
    bytes: int = 0


class Counters(dict[tuple[str, int, str, str], Access]):
    """By kernel, line of PTX, "load" or "store", and what is touched: "shared" or a region."""

    def add(self, kernel, line, verb, touched, requests, used, ideal, size) -> None:
        access = self.setdefault((kernel, line, verb, touched), Access())
        access.requests += int(requests)
        access.used += int(used)
        access.ideal += int(ideal)
        access.bytes += int(size)

    def excess(self) -> dict[tuple[str, str, str], float]:
        """(kernel, verb, touched) -> used / ideal."""
        used, ideal = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
        for (kernel, _, verb, touched), access in self.items():
            used[kernel, verb, touched] += access.used
            ideal[kernel, verb, touched] += access.ideal
        return {key: used[key] / ideal[key] for key in used}


def sectors(at: np.ndarray, warp: np.ndarray, size: int) -> tuple[int, int, int]:
    """(requests, sectors, sectors at best) of one instruction; lanes that ask for the same address
    are served together."""
    warp = warp.astype(np.int64)
    used = distinct((warp << 43) | (at >> 5)).size
    owner = distinct((warp << 47) | at) >> 47
    _, counts = np.unique(owner, return_counts=True)
    return counts.size, used, int((-(-counts * size // 32)).sum())


def wavefronts(at, lane, warp, size, warps) -> tuple[int, int, int]:
    """(requests, wavefronts, wavefronts at best): one is 128 bytes of distinct banks. Accesses of 8
    and 16 bytes go by half and quarter warps; a broadcast of few words goes in one."""
    words = max(1, size // 4)
    word = ((at // 4)[:, None] + np.arange(words)).ravel()

    def busiest(group):
        """Per group: distinct words in its busiest bank, and how many wavefronts they fill."""
        key = distinct((np.repeat(group, words) << 32) | word)
        ids, place = np.unique(key >> 32, return_inverse=True)
        banks = np.bincount(32 * place + (key & 31), minlength=32 * ids.size).reshape(-1, 32)
        return ids, banks.max(1), -(-banks.sum(1) // 32)

    parts, most, least = busiest(warp * words + lane % 32 * words // 32)
    used, ideal = (np.bincount(parts // words, weights=x, minlength=warps) for x in (most, least))
    ids, most, _ = busiest(warp)
    used[ids[most == 1]] = ideal[ids[most == 1]] = 1
    return ids.size, int(used.sum()), int(ideal.sum())
