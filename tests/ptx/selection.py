"""The cases: a few that launch every kernel, and the grid."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from .cases import BF16, F16, F32, INT8, Case

DTYPES = (BF16, F32, F16)
TENSOR = {"scale_type": "tensor"}
# Where channels are few entries long, s = |N| / |R| of one channel is ill-conditioned.
MINI = {"scale_type": "tensor", "scale": 128.0}


def selection() -> list[Case]:
    """Every kernel of csrc/ once, in both orientations and all orders over the whole, and then what
    needs a shape of its own."""
    found = []
    dots = itertools.product((1, 3, 5), ("gaussian", "rademacher"))
    tiles = itertools.product((20, 65), ("gaussian", "rademacher"))
    kinds = [*dots, *tiles, (1, "sparse"), (24, "sparse")]
    for number, ((rank, proj), grad) in enumerate(itertools.product(kinds, DTYPES)):
        weight = DTYPES[(number + number // 3) % 3]
        order = ("rows", "columns", "odd")[number // 3 % 3]
        rows = number % 2 == 0
        hyper = TENSOR if rank < 8 else {}
        shape = (70, 72) if rank < 65 else (72, 70)
        found.append(Case((shape,), rank, proj, weight, grad, order, rows, hyper=hyper))
    for weight, grad, stored in itertools.product(DTYPES, DTYPES, (F32, BF16, INT8)):
        found.append(Case(((501,), (8,)), weight=weight, grad=grad, moments=stored))
    exact = {"exact_projection": True}
    for rank, grad in itertools.product((1, 3, 5, 20, 65), DTYPES):
        hyper = {**exact, **(TENSOR if rank < 8 else {})}
        found.append(Case(((66, 68),), rank, "gaussian", grad=grad, steps=1, hyper=hyper))
    found += [
        # Full tiles of channels beside a ragged one, and matrices that share their launches.
        Case(((300, 64), (33, 40)), 20, weight=BF16, grad=BF16),
        Case(((64, 300),), 20, "gaussian", BF16, BF16, rows=False),
        # A long K: cut, summed by `scale`.
        Case(((24, 2150),), 16, weight=BF16, grad=BF16, order="columns"),
        Case(((24, 2150),), 1, "sparse", F32, BF16, hyper=MINI),
        Case(((2150, 24),), 12, "sparse", BF16, BF16, rows=False),
        # R waits in the workspace for the clip factor.
        Case(((40, 70),), 8, weight=BF16, grad=BF16, separate=True, signals={"clip": 0.25}),
        Case(((40, 70),), 1, separate=True, signals={"clip": 0.25, "grad_scale": 4.0}, hyper=MINI),
        # Ranks whose last rows nobody asks for.
        Case(((40, 70),), 2, hyper=TENSOR), Case(((40, 70),), 6, hyper=TENSOR, order="columns"),
        Case(((40, 70),), 7, hyper=TENSOR), Case(((40, 70),), 4, hyper=TENSOR),
        # Rounding by chance, by rows and by columns of the matrix.
        Case(((70, 72),), 16, weight=BF16, hyper={"stochastic_rounding": True}),
        Case(((72, 70),), 16, weight=BF16, grad=BF16, rows=False,
             hyper={"stochastic_rounding": True}),
        Case(((72, 70),), 16, weight=BF16, grad=F16, order="columns",
             hyper={"stochastic_rounding": True}),
        # int8: rows of whole groups, with a short one and of less than one, in whole tiles too.
        Case(((70, 384), (9, 133)), 16, weight=INT8, grad=BF16),
        Case(((70, 256), (5, 20)), 16, weight=INT8, grad=F32, rows=False),
        Case(((20, 200),), 16, weight=INT8, grad=F16, order="odd"),
        *(Case(((33, 256), (3, 128)), weight=INT8, grad=grad, moments=stored)
          for grad in DTYPES for stored in (F32, BF16, INT8)),
        Case(((8500,),), weight=BF16, grad=BF16, moments=INT8),
        Case(((40, 70),), 8, hyper={"scale_front": True, "maximize": True, "correct_bias": False}),
        # Parts: of nothing, of less than a block, from within one; scales of channels and of all.
        Case(((40, 70), (3, 70)), 8, grad=BF16, ends=(33, 33, 40, 70)),
        Case(((70, 40),), 3, "gaussian", rows=False, ends=(33, 70), hyper=TENSOR),
        Case(((40, 70),), 20, "sparse", grad=F16, order="columns", ends=(33, 70)),
        Case(((40, 70),), 1, "sparse", ends=(21, 70), hyper=MINI),
        Case(((40, 70),), 8, "gaussian", ends=(21, 70), hyper={"exact_projection": True}),
        Case(((70, 72),), 16, weight=BF16, ends=(21, 72), hyper={"stochastic_rounding": True}),
        Case(((40, 70),), 8, hyper={"disable_nl": True, "weight_decay": 0.0}, steps=3),
    ]  # fmt: skip
    return found


RANKS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 20, 64, 65, 130, 256)
SHAPES = (
    ((140, 150),), ((256, 64),), ((33, 600), (5, 64), (300, 33)), ((24, 2150),), ((129, 257),)
)  # fmt: skip


def grid() -> Iterator[Case]:
    """Every rank, distribution, gradient dtype, order and orientation, with shapes, weight dtypes
    and the rest in turn."""
    axes = (RANKS, ("gaussian", "rademacher", "sparse"), DTYPES, ("rows", "columns", "odd"), (1, 0))
    for number, (rank, proj, grad, order, rows) in enumerate(itertools.product(*axes)):
        weight, shapes = DTYPES[number // 2 % 3], SHAPES[number % len(SHAPES)]
        hyper = dict(TENSOR if rank < 8 or number % 4 == 0 else {})
        if weight == BF16 and number % 3 == 0:
            hyper["stochastic_rounding"] = True
        separate = number % 7 == 0
        signals = {"clip": 0.25} if separate else {}
        yield Case(shapes, rank, proj, weight, grad, order, bool(rows), 2, separate, signals, hyper)
    for weight, grad, sizes in itertools.product(DTYPES, DTYPES, ((1,), (8, 7, 16400), (5001,))):
        yield Case(tuple((n,) for n in sizes), weight=weight, grad=grad)


def sectors() -> list[Case]:
    """Full, aligned tiles in every kernel that walks a gradient."""
    kinds = ((1, "rademacher"), (128, "gaussian"), (64, "sparse"), (5, "rademacher"))
    axes = itertools.product(((BF16, 4), (F32, 3)), (True, False))
    found = [
        Case(((256, 256),), rank, proj, dtype, dtype, rows=rows, steps=1, hyper=TENSOR)
        for (dtype, count), rows in axes for rank, proj in kinds[:count]
    ]  # fmt: skip
    dense = ((BF16, F32), (F32, F32), (BF16, BF16), (BF16, INT8))
    found += [
        Case(((32768,),), weight=dtype, grad=dtype, steps=1, moments=stored)
        for dtype, stored in dense
    ]
    codes = [(grad, rank) for grad in (BF16, F32) for rank in (1, 0)]
    return found + [Case(((128, 256),), rank, weight=INT8, grad=grad, steps=1, hyper=TENSOR)
                    for grad, rank in codes]  # fmt: skip


def triton_selection() -> list[Case]:
    return [
        Case(((70, 72),), 1, "gaussian", BF16, BF16, hyper=MINI),
        Case(((70, 72),), 5, weight=F32, grad=BF16, order="columns", rows=False, hyper=TENSOR),
        Case(((140, 150),), 20, "gaussian", BF16, BF16),
        Case(((72, 70),), 40, "rademacher", F32, F32, order="odd", rows=False),
        Case(((70, 72),), 24, "sparse", BF16, BF16, order="columns"),
        # K is cut: combine, at rank 1 and beyond.
        Case(((24, 2150),), 1, "gaussian", BF16, BF16, hyper=MINI),
        Case(((24, 2150),), 16, weight=BF16, grad=BF16),
        Case(((40, 70),), 1, separate=True, signals={"clip": 0.25}, hyper=TENSOR),
        Case(((70, 72),), 16, weight=BF16, hyper={"stochastic_rounding": True}),
        Case(((501,), (8,)), weight=BF16, grad=F32),
    ]  # fmt: skip


def triton_grid() -> Iterator[Case]:
    axes = (RANKS, ("gaussian", "rademacher", "sparse"), DTYPES)
    for number, (rank, proj, grad) in enumerate(itertools.product(*axes)):
        weight, shapes = DTYPES[number // 2 % 3], SHAPES[number % len(SHAPES)]
        order, rows = ("rows", "columns", "odd")[number // 3 % 3], number % 2 == 0
        hyper = dict(TENSOR if rank < 8 or number % 4 == 0 else {})
        separate = number % 5 == 0
        signals = {"clip": 0.25} if separate else {}
        yield Case(shapes, rank, proj, weight, grad, order, rows, 2, separate, signals, hyper)
    for weight, grad in itertools.product(DTYPES, DTYPES):
        yield Case(((8,), (7,), (5001,)), weight=weight, grad=grad)
