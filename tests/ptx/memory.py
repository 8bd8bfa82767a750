"""Global and shared memory, with every address checked: bounds, alignment, who may write.

Global memory is this process's own: a kernel works on the very tensors that a test holds.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import numpy as np

from .arithmetic import i8, u1, u4
from .counters import sectors, wavefronts
from .detectors import ATOMIC, CONSTANT, READ, SAME, WRITE
from .instructions import PARAM_WINDOW, SHARED_WINDOW
from .parser import SHARED_BEGIN, PtxError

LOWEST = 0x10000  # of the addresses that the view of this process's memory can reach


def _host_memory(width: int) -> np.ndarray:
    class Everything:
        __array_interface__ = {
            "shape": ((1 << 47) // width,), "typestr": f"<u{width}", "data": (LOWEST, False),
            "version": 3,
        }  # fmt: skip

    return np.asarray(Everything())


HOST = {width: _host_memory(width) for width in (1, 2, 4, 8)}


class Region(NamedTuple):
    """What a launch may touch."""

    begin: int
    size: int
    writable: bool
    name: str


class Memory:
    """What a block of threads sees. machine.Machine adds threads to it."""

    def _use_global(self, at, lanes, size, kind, line, data=None):
        """Checks and counts an access; the addresses as places in HOST."""
        region = self._bounds(at, lanes, size, kind in (WRITE, ATOMIC), line)
        at = at.astype(i8)
        if self.watch:
            kinds = np.full(at.size, kind)
            if kind == WRITE:
                old = HOST[1][(at - LOWEST)[:, None] + np.arange(size)]
                kinds[(old == data).all(1)] = SAME
            self.global_watch.access(at, self.warp[lanes], size, kinds, line)
        if self.counters is not None and kind != ATOMIC:
            found = sectors(at, self.warp[lanes], size)
            verb = "store" if kind == WRITE else "load"
            self.counters.add(self.k.name, line, verb, region.name, *found, size * at.size)
        return at - LOWEST

    def _bounds(self, at, lanes, size, writes, line) -> Region:
        """Raises unless all may be touched; the region of the lowest address."""
        if size > 1 and (wrong := at & at.dtype.type(size - 1)).any():
            bad = np.flatnonzero(wrong)[0]
            raise PtxError(f"misaligned {hex(at[bad])}: {self.where(line, lanes[bad])}")
        low, high = int(at.min()), int(at.max())
        i = bisect.bisect_right(self.begins, low) - 1
        found = self.regions[max(i, 0)]
        whole = i >= 0 and high + size <= found.begin + found.size
        if whole and (found.writable or not writes):
            return found
        for x, lane in zip(at.tolist(), lanes.tolist(), strict=True):
            i = bisect.bisect_right(self.begins, x) - 1
            region = self.regions[i] if i >= 0 else Region(0, 0, False, "nothing")
            if i < 0 or x + size > region.begin + region.size:
                where = f"{x - region.begin} bytes into {region.name} of {region.size}"
                verb = "write" if writes else "read"
                raise PtxError(f"{verb} of {size} bytes, {where}: {self.where(line, lane)}")
            if writes and not region.writable:
                raise PtxError(f"write to read-only {region.name}: {self.where(line, lane)}")
        return found

    def _use_shared(self, at, lanes, size, kind, line, data=None, moves=True):
        """The same for shared memory. ``moves``: the bytes travel now, so that they count."""
        at = at.astype(i8)
        if (at & (size - 1)).any():
            raise PtxError(f"misaligned in shared memory: {self.where(line, lanes[0])}")
        if at.min() < SHARED_BEGIN or at.max() + size > self.shared_end:
            bad = np.flatnonzero((at < SHARED_BEGIN) | (at + size > self.shared_end))[0]
            place = f"{at[bad] - SHARED_BEGIN} of {self.shared_end - SHARED_BEGIN}"
            raise PtxError(f"shared address {place}: {self.where(line, lanes[bad])}")
        if self.watch:
            if kind == WRITE:
                changes = np.ones(at.size, bool)
                if data is not None:
                    changes = (self.shared[at[:, None] + np.arange(size)] != data).any(1)
                self.shared_watch.write(at, self.warp[lanes], size, line, changes)
            else:
                self.shared_watch.read(at, self.warp[lanes], size, line)
        if self.counters is not None and moves:
            found = wavefronts(at, lanes, self.warp[lanes], size, self.warps)
            verb = "store" if kind == WRITE else "load"
            self.counters.add(self.k.name, line, verb, "shared", *found, size * at.size)
        return at

    def _spaces(self, space, at, m):
        """(space, addresses, lanes) of an access: generic addresses are parted by their window."""
        lanes = self.lanes if m is None else np.flatnonzero(m)
        at = at if m is None else at[lanes]
        if not lanes.size:
            return
        if space != "generic":
            yield space, at, lanes
            return
        in_shared = at >= SHARED_WINDOW
        for name, part in (("global", ~in_shared), ("shared", in_shared)):
            if part.any():
                yield (
                    name,
                    at[part] - at.dtype.type(SHARED_WINDOW * (name == "shared")),
                    lanes[part],
                )

    def load(self, space, at, size, n, *, m, line):
        out = np.zeros((n, self.n), f"u{size}")
        shift = size.bit_length() - 1
        for kind, a, lanes in self._spaces(space, at, m):
            if kind == "param":
                out[:, lanes] = self._parameters(a, lanes, size, n, line)
                continue
            if kind == "shared":
                place = self._use_shared(a, lanes, size * n, READ, line) >> shift
                memory = self.shared_as[size]
            else:
                how = CONSTANT if kind == "constant" else READ
                place = self._use_global(a, lanes, size * n, how, line) >> shift
                memory = HOST[size]
            whole = lanes.size == self.n
            for i in range(n):
                if whole:
                    out[i] = memory[place + i]
                else:
                    out[i, lanes] = memory[place + i]
        return list(out)

    def _parameters(self, at, lanes, size, n, line):
        at = at.astype(i8) - (PARAM_WINDOW if at[0] >= PARAM_WINDOW else 0)
        if at.min() < 0 or at.max() + size * n > self.params.size or (at % size).any():
            raise PtxError(f"parameter address {at[0]}: {self.where(line, lanes[0])}")
        at = at[:1] if (at == at[0]).all() else at
        return np.stack([self.params[x : x + size * n].view(f"u{size}") for x in at], 1)

    def store(self, space, at, size, values, *, m, line):
        shift, n = size.bit_length() - 1, len(values)
        for kind, a, lanes in self._spaces(space, at, m):
            data = np.ascontiguousarray(np.stack(values, 1)[lanes])
            if kind == "param":
                raise PtxError(f"store to parameters: {self.where(line, lanes[0])}")
            if kind == "shared":
                place = self._use_shared(a, lanes, size * n, WRITE, line, data.view(u1)) >> shift
                memory = self.shared_as[size]
            else:
                place = self._use_global(a, lanes, size * n, WRITE, line, data.view(u1)) >> shift
                memory = HOST[size]
            place = place[:, None] + np.arange(n)
            memory[place] = data
            if self.watch and (memory[place] != data).any():
                self.find(
                    f"an instruction stores different values to one place in {kind} memory", line
                )

    def atomic(self, how, at, values, *, fenced, m, line):
        lanes = self.lanes if m is None else np.flatnonzero(m)
        b = values[0]
        out = np.zeros(self.n, b.dtype)
        if not lanes.size:
            return out
        warps = np.unique(self.warp[lanes]).tolist()
        if fenced:
            self.fence(m=m, line=line)
        for kind, a, part in self._spaces("generic", at, m):
            if kind == "shared":
                raise PtxError(f"unknown: atomics in shared memory: {self.where(line, part[0])}")
            place = self._use_global(a, part, b.itemsize, ATOMIC, line) // b.itemsize
            memory = HOST[b.itemsize]
            for lane, x in zip(part.tolist(), place.tolist(), strict=True):
                old = memory[x : x + 1].view(b.dtype)[0]
                out[lane] = old
                new = _updated(how, old, *(v[lane] for v in values))
                memory[x : x + 1].view(b.dtype)[0] = new
        if self.watch:
            self.global_watch.atomic(warps)
        if fenced:
            self.fence(m=m, line=line)
        return out

    def fence(self, *, m, line):
        if self.watch:
            warps = range(self.warps) if m is None else np.unique(self.warp[m]).tolist()
            self.global_watch.fence(list(warps))

    # cp.async: each warp has a queue of groups; what is in one lands when somebody waits for it.

    def copy_async(self, to, at, size, have, *, m, line):
        lanes = self.lanes if m is None else np.flatnonzero(m)
        if not lanes.size:
            return
        data = np.zeros((lanes.size, size), u1)
        have, at, to = have[lanes].astype(i8), at[lanes], to[lanes]
        if (have > size).any():
            raise PtxError(f"cp.async of more than its size: {self.where(line, lanes[0])}")
        for n in np.unique(have):
            part = have == n
            if n:
                step = int(n & -n)  # what n bytes are a multiple of
                for offset in range(0, int(n), step):
                    a = at[part] + at.dtype.type(offset)
                    place = self._use_global(a, lanes[part], step, READ, line)
                    places = place[:, None] + np.arange(step)
                    data[part, offset : offset + step] = HOST[1][places]
        self._use_shared(to, lanes, size, WRITE, line, moves=False)
        if self.watch:
            self.shared_watch.forget(to.astype(i8), size)
        for w in np.unique(self.warp[lanes]):
            own = self.warp[lanes] == w
            self.pending[w].append((to[own], lanes[own], size, data[own], line))

    def commit(self, *, m, line):
        for w in range(self.warps) if m is None else np.unique(self.warp[m]).tolist():
            self.groups[w].append(self.pending[w])
            self.pending[w] = []

    def wait(self, n, *, m, line):
        self.whole_warps(m=m, line=line)
        if n < 0:
            self.commit(m=m, line=line)
        for w in range(self.warps) if m is None else np.unique(self.warp[m]).tolist():
            queue = self.groups[w]
            while len(queue) > max(n, 0):
                for to, lanes, size, data, at in queue.pop(0):
                    place = self._use_shared(to, lanes, size, WRITE, at, data)
                    self.shared[place[:, None] + np.arange(size)] = data

    def load_matrices(self, at, count, trans, *, m, line):
        """ldmatrix: lanes 8 i .. 8 i + 7 give the rows of matrix i; lane 4 g + t gets elements 2 t
        and 2 t + 1 of its row g, or of its column g."""
        self.whole_warps(m=m, line=line)
        take = (self.lanes % 32 < 8 * count) & (True if m is None else m)
        lanes = np.flatnonzero(take)
        out = [np.zeros(self.n, u4) for _ in range(count)]
        if not lanes.size:
            return out
        rows = self._use_shared(at[lanes], lanes, 16, READ, line) >> 1
        matrices = self.shared_as[2][rows[:, None] + np.arange(8)].reshape(-1, count, 8, 8)
        if trans:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.ascontiguousarray(matrices).view(u4).reshape(-1, count, 32)
        warps = np.unique(self.warp[lanes])
        for i in range(count):
            out[i].reshape(-1, 32)[warps] = pairs[:, i]
        return out


def _updated(how, old, b, c=None):
    """What an atomic leaves."""
    return {
        "add": lambda: old + b, "exch": lambda: b, "max": lambda: max(old, b),
        "min": lambda: min(old, b), "or": lambda: old | b, "and": lambda: old & b,
        "inc": lambda: 0 if old >= b else old + 1,
        "dec": lambda: b if old == 0 or old > b else old - 1,
        "cas": lambda: c if old == b else old,
    }[how]()  # fmt: skip
