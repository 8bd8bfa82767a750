"""Sharded parameters: which part of a matrix a rank holds, and what crosses ranks between verbs.

A DTensor's local part of X [C, K] is some of the channels, some of the contracted side, or both:

    channels     each rank projects its own; what crosses are the sums behind norms, once per step
    contracted   each rank projects with its slice of P; the partial [R | q] are reduce-scattered
                 over channels, each rank keeps the moments of its own, and scales are gathered

This file knows DTensor and nothing of kernels; plan.py calls it between the verbs. Placement on a
mesh and groups of ranks are torch's. It imports torch.distributed.tensor only where a DTensor is.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor

from apollo_kernels.batch import Part, PartBatch

Found = TypeVar("Found")
AtPlace = tuple[Any, tuple[Any, ...]]  # a mesh, and how a DTensor is placed on it

MATRICES, ROWS, COLUMNS = "matrices", "rows", "columns"  # what a dimension of a mesh may cut
BUCKET = 64 * 2**20  # bytes of partial sums that wait for one reduce-scatter
_FLAGS = 4  # what ranks tell each other before a step


def is_sharded(t: Any) -> bool:
    """Whether ``t`` is a DTensor, asked without importing what defines it."""
    return type(t).__name__ == "DTensor"


def local(t: Tensor) -> Tensor:
    """This rank's part of a DTensor, in memory; any other tensor as it is.

    It is the tensor itself, not a view that is made anew at each call, so that a plan can tell
    whether it is still the same.
    """
    own: Any = getattr(t, "_local_tensor", t)
    return own.wait() if type(own).__name__ == "AsyncCollectiveTensor" else own


def span(size: int, parts: int, index: int) -> tuple[int, int]:
    """The first element and the number of elements of part ``index``, as torch.chunk cuts."""
    each = -(-size // parts)
    first = min(index * each, size)
    return first, min(each, size - first)


# ---- placements ----------------------------------------------------------------------------------


def _cuts(p: Any) -> list[int | None]:
    """The dimension of ``p`` that each dimension of its mesh cuts; None where it is replicated."""
    return [
        placement.dim % p.dim() if type(placement).__name__ == "Shard" else None
        for placement in p.placements
    ]


def check(p: Any, layout: Any, dense_state: str | None, name: Callable[[], str]) -> None:
    """Raises for a placement that no step of ``p`` knows.

    Args
        layout: state.layout_of(p, group), None for a dense parameter.
        dense_state: how the moments of a dense parameter are stored.
    Raises
        NotImplementedError: with the placement and the parameter's name.
    """

    def refuse(placement: Any, why: str) -> None:
        raise NotImplementedError(
            f"{name()}, of shape {tuple(p.shape)}, is placed as {placement!r}: {why}"
        )

    if p.device_mesh.get_coordinate() is None:
        refuse(p.placements, "this rank is not in its mesh, and holds no part of it")
    for placement in p.placements:
        if type(placement).__name__ not in ("Shard", "Replicate"):
            known = "Replicate and Shard are supported"
            refuse(placement, f"{known}, not {type(placement).__name__}")
    cuts = [d for d in _cuts(p) if d is not None]
    lead = 0 if layout is None else len(layout.batch)
    for i, (placement, d) in enumerate(zip(p.placements, _cuts(p), strict=True)):
        if d is None:
            continue
        if layout is None:
            if d and dense_state not in (None, "float32"):
                refuse(placement, f"dense_state {dense_state!r} needs Shard(dim=0) or 'float32'")
        elif d > lead + 1 or 0 < d < lead:
            sides = [0] if lead else []
            refuse(placement, f"only dimensions {[*sides, lead, lead + 1]} of it can be cut")
        elif d == lead + 1 and not layout.rows and layout.n != p.shape[d]:
            ranks = p.device_mesh.size(i)  # the moments [C, r] are cut in as many equal parts
            if p.shape[d] % ranks:
                refuse(placement, f"its {p.shape[d]} do not come out even on {ranks} ranks")
    narrow = layout is None and dense_state not in (None, "float32")
    if (layout is not None or narrow) and len(cuts) > len(set(cuts)):
        refuse(p.placements, "one dimension of it is cut by two dimensions of its mesh")


def _role(d: int | None, lead: int) -> str | None:
    if d is None:
        return None
    return MATRICES if d < lead else ROWS if d == lead else COLUMNS


@dataclass(frozen=True)
class Spread:
    """Over which ranks a parameter is spread.

    axes: one process group per dimension of the mesh that cuts it.
    inner: those among them that cut matrices, so that something crosses ranks between the verbs.
        (Whole experts may be spread, too.)
    contracted: the one that cuts the contracted side of a low-rank matrix.
    along: the dimensions of the mesh that ``inner`` stands for, that of ``contracted`` first.
    """

    axes: tuple[Any, ...] = ()
    inner: tuple[Any, ...] = ()
    contracted: Any = None
    along: tuple[int, ...] = ()

    @property
    def crosses(self) -> bool:
        return bool(self.inner)


@dataclass(frozen=True)
class View:
    """This rank's part of a parameter.

    layout: of the local tensor: its matrices [m, n]; rank and orientation are the whole's.
    matrix: the number of its first matrix among all of the parameter.
    element: the number of its first element, counted over rows, if dimension 0 alone is cut.
    sums: how many numbers of [R | q] the largest part of a matrix has, the same on all ranks; 0
        where its contracted side is whole.
    """

    layout: Any
    matrix: int = 0
    element: int = 0
    part: Part | None = None
    spread: Spread = Spread()
    sums: int = 0


def view_of(p: Any, layout: Any) -> View:
    """What this rank holds of ``p``, whose placements have been checked; of a plain tensor all."""
    if not is_sharded(p):
        return View(layout)
    mesh = p.device_mesh
    axes = {i: d for i, d in enumerate(_cuts(p)) if d is not None and mesh.size(i) > 1}
    groups = tuple(mesh.get_group(i) for i in axes)
    if layout is None:
        first = next((span(p.shape[0], *_place(mesh, i))[0] for i, d in axes.items() if d == 0), 0)
        element = first * math.prod(p.shape[1:]) if p.dim() else 0
        return View(None, element=element, spread=Spread(groups))
    lead = len(layout.batch)
    spans = {d: (0, n) for d, n in enumerate(p.shape[: lead + 2])}
    for i, d in axes.items():
        spans[d] = span(p.shape[d], *_place(mesh, i))
    rest = math.prod(p.shape[lead + 2 :])
    (row, m), (column, n) = spans[lead], spans[lead + 1]
    batch = tuple(spans[d][1] for d in range(lead))
    matrix = spans[0][0] * math.prod(layout.batch[1:]) if lead else 0
    roles = {_role(d, lead): mesh.get_group(i) for i, d in axes.items()}
    summed = COLUMNS if layout.rows else ROWS
    contracted = roles.get(summed)
    inner = tuple(roles[role] for role in roles if role != MATRICES)
    cuts = [(i, _role(d, lead)) for i, d in axes.items()]
    along = sorted(
        (i for i, role in cuts if role != MATRICES), key=lambda i: (i, summed) not in cuts
    )
    own = replace(layout, batch=batch, m=m, n=n * rest)
    spread = Spread(groups, inner, contracted, tuple(along))
    if contracted is None:
        part = Part(row, column * rest) if inner else None
        return View(own, matrix, 0, part, spread)
    others = roles.get(ROWS if layout.rows else COLUMNS)  # they cut the channels
    channels = layout.m if layout.rows else layout.n
    most = -(-channels // (1 if others is None else others.size()))
    part = Part(row, column * rest, contracted.size())
    return View(own, matrix, 0, part, spread, most * (layout.rank + 1))


def _place(mesh: Any, dimension: int) -> tuple[int, int]:
    """How many ranks a dimension of a mesh has, and which of them this one is."""
    return mesh.size(dimension), mesh.get_local_rank(dimension)


# ---- state ---------------------------------------------------------------------------------------


def place_of(p: Any, layout: Any, key: str) -> AtPlace | None:
    """Mesh and placements of one of the state's tensors; None for a plain one.

    Moments of a low-rank parameter are cut along channels, by the ranks that cut its channels and
    then by those that cut its contracted side: these share the work on what they hold together.
    """
    if not is_sharded(p) or key == "step":
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh, cuts = p.device_mesh, _cuts(p)
    if layout is None:  # a unit stands for some neighbours in a row, so it goes with its row
        return mesh, tuple(p.placements)
    lead = len(layout.batch)
    roles = [_role(d, lead) for d in cuts]
    if key == "update_norm":
        if MATRICES not in roles:
            return None
        return mesh, tuple(Shard(0) if role == MATRICES else Replicate() for role in roles)
    placements = [
        Replicate() if role is None else Shard(0 if role == MATRICES else lead) for role in roles
    ]
    order = list(range(len(roles)))
    contracted = COLUMNS if layout.rows else ROWS
    if ROWS in roles and COLUMNS in roles:  # the first dimension of a mesh cuts first
        order.sort(key=lambda i: roles[i] == contracted)
    return _reordered(mesh, tuple(order)), tuple(placements[i] for i in order)


# A mesh, by its identity since equal ones may have ended, and an order: the mesh in that order.
_meshes: dict[tuple[int, tuple[int, ...]], tuple[weakref.ref[Any], Any]] = {}


def _reordered(mesh: Any, order: tuple[int, ...]) -> Any:
    """The same mesh with its dimensions in another order, over the same process groups: made once
    for each mesh and order."""
    if order == tuple(range(len(order))):
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    key = id(mesh), order
    known = _meshes.get(key)
    if known is not None and known[0]() is mesh:
        return known[1]
    names = mesh.mesh_dim_names
    other = DeviceMesh.from_group(
        [mesh.get_group(i) for i in order],
        mesh.device_type,
        mesh=mesh.mesh.permute(order).contiguous(),
        mesh_dim_names=names and tuple(names[i] for i in order),
    )
    _meshes[key] = weakref.ref(mesh, lambda _: _meshes.pop(key, None)), other
    return other


def local_shape(shape: Sequence[int], place: AtPlace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a DTensor's local part: where it begins, and its shape."""
    mesh, placements = place
    first, sizes = [0] * len(shape), list(shape)
    for i, placement in enumerate(placements):
        if type(placement).__name__ == "Shard":
            begin, sizes[placement.dim] = span(sizes[placement.dim], *_place(mesh, i))
            first[placement.dim] += begin
    return tuple(first), tuple(sizes)


def wrap(own: Tensor, shape: Sequence[int], place: AtPlace | None) -> Tensor:
    """The DTensor of ``shape`` whose local part is ``own``; ``own`` itself without a place."""
    if place is None:
        return own
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(own, *place, run_check=False, shape=torch.Size(shape), stride=stride)


def unwrap(value: Any, shape: Sequence[int], place: AtPlace, what: str) -> Tensor:
    """This rank's part of loaded state: of a DTensor, or of a plain tensor of the whole.

    Raises
        ValueError: for a DTensor that is cut in another way.
    """
    if tuple(value.shape) != tuple(shape):
        return value  # the check of the state says so
    if is_sharded(value):
        if not _lies_at(value, place):
            raise ValueError(
                f"{what} is placed as {value.placements!r} on {value.device_mesh}, and must be "
                f"{place[1]!r} on {place[0]}"
            )
        return local(value)
    for d, (first, size) in enumerate(zip(*local_shape(shape, place), strict=True)):
        value = value.narrow(d, first, size)
    return value


def _lies_at(t: Any, place: AtPlace) -> bool:
    return t.device_mesh == place[0] and tuple(t.placements) == tuple(place[1])


def check_state(t: Any, shape: Sequence[int], place: AtPlace, what: str) -> None:
    """Raises ValueError unless a tensor of the state is placed as it must be."""
    if not is_sharded(t) or not _lies_at(t, place):
        raise ValueError(f"{what} must be a DTensor at {place[1]!r} on {place[0]}, got {t!r}")
    expected = local_shape(shape, place)[1]
    if tuple(t.shape) == tuple(shape) and tuple(local(t).shape) != expected:
        raise ValueError(
            f"the local part of {what} has shape {tuple(local(t).shape)} and must have {expected}"
        )


# ---- agreement -----------------------------------------------------------------------------------


def any_sharded(params: Iterable[Tensor]) -> bool:
    """Whether there is a DTensor among them; asked at each step, so mostly of one dict."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and getattr(module, "DTensor", None) in set(map(type, params))


def axes_of(params: Iterable[Tensor]) -> list[tuple[Any, str]]:
    """All process groups that parameters are placed on, in the order of the parameters, and the
    kind of device that flags should lie on to cross each: see ``_flags_on``."""
    meshes = dict.fromkeys(p.device_mesh for p in params if is_sharded(p))  # type: ignore[attr-defined]
    return list(
        dict.fromkeys(
            (mesh.get_group(i), _flags_on(mesh.get_group(i), mesh.device_type))
            for mesh in meshes
            for i in range(mesh.ndim)
            if mesh.size(i) > 1
        )
    )


def _flags_on(group: Any, device: str) -> str:
    """The CPU if a group can send from there: then hosts wait for each other, and not for their
    devices, which may still be busy with backward."""
    backends = torch.distributed.get_backend_config(group).split(",")
    return "cpu" if any(b.startswith("cpu:") for b in backends) else device


def agreed(
    axes: Sequence[tuple[Any, str]],
    look: Callable[[], Found],
    asked: Callable[[], Any],
    found_inf: Tensor | None,
) -> tuple[Found, bool]:
    """What ``look`` returns, once it has returned on every rank; or every rank raises.

    So no rank writes, or waits in a collective, where another one has refused the step. One small
    all-reduce per dimension of the mesh, which the host waits for.

    Args
        look: the checks of a step; it raises for what no step may rest on.
        asked: what all ranks must want alike, as something whose repr is the same.
        found_inf: of a GradScaler, which looks at local gradients.
    Returns
        what ``look`` returned, and whether a rank has found an Inf.
    Raises
        what ``look`` raises; RuntimeError if only other ranks have refused, or if they differ.
    """
    error: Exception | None = None
    found: Any = None
    digest = 0
    try:
        found = look()
        digest = crc32(repr(asked()).encode())
    except Exception as raised:
        error = raised
    infinite = found_inf is not None and bool(found_inf)
    seen = [int(error is not None), int(infinite), digest, -digest]
    for group, device in axes:
        flags = torch.tensor(seen, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group)
        seen = flags.tolist()
    if error is not None:
        raise error
    if seen[0]:
        raise RuntimeError(
            "another rank has refused this step, and says why; nothing was written on any rank"
        )
    if seen[2] != -seen[3]:
        raise RuntimeError(
            "ranks differ in what they want to step: parameters with a gradient, options of the "
            "groups, seed and back end must be the same on all of them; nothing was written on any "
            "rank"
        )
    return found, bool(seen[1])


def misplaced(params: Iterable[Any]) -> list[Any]:
    """The parameters whose gradients lie otherwise than they do: sums that are still to be added up
    (of norms under sequence parallelism), or whole gradients of shards (of embeddings)."""
    return [
        p
        for p in params
        if is_sharded(p)
        and is_sharded(p.grad)
        and p.grad.placements != p.placements
        and p.grad.device_mesh == p.device_mesh
    ]


def place_gradients(params: Iterable[Any]) -> None:
    """Brings gradients to where their parameters are, ``p.grad`` itself: collectives of torch's."""
    for p in params:
        p.grad = p.grad.redistribute(placements=p.placements)


# ---- what a step sends ---------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes per step in the buffers that this rank hands to collectives: the whole side of each,
    of which about (ranks - 1) / ranks cross its link (twice that for an all-reduce)."""

    all_reduce: int = 0
    reduce_scatter: int = 0
    all_gather: int = 0

    @property
    def total(self) -> int:
        return self.all_reduce + self.reduce_scatter + self.all_gather

    def add(self, view: View, channels: int, per_channel: bool, dtype: torch.dtype) -> None:
        """Those of a low-rank parameter."""
        if not view.spread.crosses:
            return
        matrices, rank = view.layout.matrices, view.layout.rank
        self.all_reduce += matrices * 8 * (1 if per_channel else 3) * len(view.spread.inner)
        if view.spread.contracted is not None:
            ranks = view.spread.contracted.size()
            rows = matrices * -(-channels // ranks) * ranks
            self.reduce_scatter += rows * (rank + 1) * dtype.itemsize
            self.all_gather += rows * per_channel * dtype.itemsize


def traffic_of(
    params: Sequence[tuple[Tensor, Any, str, torch.dtype]], clips: bool
) -> Traffic | None:
    """What a step of all of them sends; None if none is sharded.

    Args
        params: each with its layout, scale_type, and the dtype of its moments.
    """
    axes = axes_of(p for p, *_ in params)
    if not axes:
        return None
    traffic, spreads = Traffic(len(axes) * 8 * _FLAGS), set[tuple[Any, ...]]()
    for p, layout, scale_type, dtype in params:
        view = view_of(p, layout)
        spreads.add(view.spread.axes)
        if layout is not None:
            channels = view.layout.m if layout.rows else view.layout.n
            traffic.add(view, channels, scale_type == "channel", dtype)
    if clips:
        traffic.all_reduce += sum(8 * len(own) for own in spreads)
    return traffic


# ---- between the verbs ---------------------------------------------------------------------------


def _by(
    batches: Iterable[tuple[Spread, PartBatch]], key: Callable[[Spread, PartBatch], Hashable]
) -> Iterable[tuple[Any, list[PartBatch]]]:
    """Batches that share a collective, by the dimension of the mesh that it goes along: an order
    that is the same on every rank, also where some have no part of what comes first."""
    found: dict[Any, list[PartBatch]] = {}
    along: dict[Any, tuple[int, ...]] = {}
    for spread, batch in batches:
        if (place := key(spread, batch)) is not None:
            found.setdefault(place, []).append(batch)
            along[place] = spread.along
    return sorted(found.items(), key=lambda entry: along[entry[0]])


class Buckets:
    """Sums on their way, so that few of them have memory at a time.

    A bucket belongs to one group of ranks. These hold the same matrices, so all of them fill it and
    send it at the same ones; other groups may hold others, as of experts that come out unevenly.
    """

    def __init__(self) -> None:
        self._waiting: dict[Any, list[tuple[Spread, PartBatch]]] = {}
        self._held: dict[Any, int] = {}

    def add(self, spread: Spread, batch: PartBatch, size: int) -> None:
        """``size``: in bytes, the same on all ranks of the group."""
        group = spread.contracted
        self._waiting.setdefault(group, []).append((spread, batch))
        self._held[group] = self._held.get(group, 0) + size
        if self._held[group] >= BUCKET:
            reduce_sums(self._waiting.pop(group))
            self._held[group] = 0

    def flush(self) -> None:
        reduce_sums([entry for several in self._waiting.values() for entry in several])


def reduce_sums(batches: Sequence[tuple[Spread, PartBatch]]) -> None:
    """After ``project``: every rank gets the whole sums of R and q of its own channels.

    One reduce-scatter for all matrices that one group of ranks cuts along their contracted side.
    """

    def key(spread: Spread, batch: PartBatch) -> Hashable:
        sums = batch.sums
        return None if sums is None else (spread.contracted, sums.device, sums.dtype)

    for (group, *_), several in _by(batches, key):
        sums: list[Tensor] = [batch.sums for batch in several]  # type: ignore[misc]
        whole = torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]
        own = whole.new_empty(whole.shape[1])
        _reduce_scatter(own, whole.view(-1), group)
        for batch, piece in zip(several, own.split([t.shape[1] for t in sums]), strict=True):
            batch.receive_sums(piece)


def add_norms(batches: Sequence[tuple[Spread, PartBatch]]) -> None:
    """After ``scale``: the sums behind every matrix's norms, over all ranks that hold it.

    One all-reduce for all matrices that are spread alike.
    """

    def key(spread: Spread, batch: PartBatch) -> Hashable:
        return None if batch.norms is None else (spread.inner, batch.norms.device)

    for (axes, _), several in _by(batches, key):
        norms = torch.cat([batch.norms for batch in several])  # type: ignore[misc]
        norms = add_over(axes, norms)
        sizes = [len(batch.norms) for batch in several]  # type: ignore[arg-type]
        for batch, own in zip(several, norms.split(sizes), strict=True):
            batch.norms = own


def gather_scales(batches: Sequence[tuple[Spread, PartBatch]]) -> None:
    """After ``scale``: s of all channels of a matrix whose contracted side is cut.

    One all-gather for all matrices that one group of ranks cuts along their contracted side.
    """

    def key(spread: Spread, batch: PartBatch) -> Hashable:
        s = batch.s
        return None if s is None else (spread.contracted, s.device, s.dtype)

    for (group, *_), several in _by(batches, key):
        scales: list[Tensor] = [batch.s for batch in several]  # type: ignore[misc]
        own = torch.cat(scales)
        whole = own.new_empty(group.size() * len(own))
        _all_gather(whole, own, group)
        pieces = whole.view(group.size(), -1).split([len(s) for s in scales], dim=1)
        for batch, piece in zip(several, pieces, strict=True):
            batch.receive_scales(piece)


def add_over(axes: Iterable[Any], values: Tensor) -> Tensor:
    """``values``, added up over all ranks of one process group after the other."""
    for group in axes:
        torch.distributed.all_reduce(values, group=group)
    return values


def _reduce_scatter(own: Tensor, whole: Tensor, group: Any) -> None:
    of = torch.distributed
    call = getattr(of, "reduce_scatter_single", None) or of.reduce_scatter_tensor
    call(own, whole, group=group)


def _all_gather(whole: Tensor, own: Tensor, group: Any) -> None:
    of = torch.distributed
    call = getattr(of, "all_gather_single", None) or of.all_gather_into_tensor
    call(whole, own, group=group)
