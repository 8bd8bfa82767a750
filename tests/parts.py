"""Parts of matrices on the ranks of one process: what distributed.py does between the verbs, done
by hand, so that a back end's PartBatch can be looked at alone."""

from dataclasses import replace

import torch

from apollo_kernels import cuda
from apollo_kernels.batch import Hyper, LowRank, Part, Signals


def matrix(shape, rank, rows, dtype=torch.float32, key=7, columns_first=False, device="cpu"):
    """A whole matrix with random weight and gradient; ``columns_first``: as it lies in memory."""
    generator = torch.Generator().manual_seed(key)
    both = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]
    if columns_first:
        both = [t.t().contiguous().t() for t in both]
    channels, k = shape if rows else shape[::-1]
    moments = [torch.zeros(channels, min(rank, k), device=device) for _ in range(2)]
    norm, step = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    return LowRank(*both, *moments, norm, step, key, rows)


def copy(item, **changes):
    """Of everything that a step writes, in the same order in memory."""
    names = ("weight", "exp_avg", "exp_avg_sq", "update_norm", "step")
    own = {n: getattr(item, n).clone(memory_format=torch.preserve_format) for n in names}
    return replace(item, **{**own, **changes})


def _laid_as(t, like):
    """A copy in the memory order of ``like``."""
    if like.stride(0) == 1 and like.stride(1) != 1:
        return t.t().clone(memory_format=torch.contiguous_format).t()
    return t.clone(memory_format=torch.contiguous_format)


def cut(item, dim, ends):
    """The parts of a matrix that ranks hold where dimension ``dim`` ends at each of ``ends``."""
    contracted = dim == (1 if item.rows else 0)
    channels = item.weight.shape[0 if item.rows else 1]
    owners = len(ends) if contracted else 1
    share, parts = -(-channels // owners), []
    for i, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        some = slice(i * share, (i + 1) * share) if contracted else slice(first, end)
        own = {n: getattr(item, n)[some].clone() for n in ("exp_avg", "exp_avg_sq")}
        for n in ("weight", "grad"):
            whole = getattr(item, n)
            own[n] = _laid_as(whole.narrow(dim, first, end - first), whole)
        part = Part(*((first, 0) if dim == 0 else (0, first)), owners)
        parts.append(copy(item, **own, part=part))
    return parts


def together(parts, dim):
    """Weight and moments of the whole, from those of all ranks."""
    weight = torch.cat([item.weight for item in parts], dim)
    return weight, *(
        torch.cat([getattr(item, n) for item in parts]) for n in ("exp_avg", "exp_avg_sq")
    )


def signals_for(item, **given):
    """Those of a step, where the tensors of ``item`` are."""
    device = item.weight.device
    numbers = {key: torch.tensor(v, device=device) for key, v in given.items() if v is not None}
    return Signals(torch.zeros(3, dtype=torch.int64, device=device), **numbers)


def sums_of(batches, h, item):
    """What all ranks together send, after ``project``."""
    signals = signals_for(item)
    for batch in batches:
        batch.project(h, signals)
    return torch.stack([batch.sums for batch in batches]).sum(0)


def step(module, ranks, h, separate=False, clip=None, found_inf=None):
    """One step of ``ranks``, the items of each; returns the counters of each."""
    signals = [signals_for(items[0], found_inf=found_inf) for items in ranks]
    batches = [module.build(items, separate=separate or clip is not None) for items in ranks]
    verbs(batches, signals, h, clip)
    return [s.counters.tolist() for s in signals]


def verbs(batches, signals, h, clip=None):
    """A step of every rank's batch, with what distributed.py does in between."""
    for batch, s in zip(batches, signals, strict=True):
        batch.project(h, s)
    if batches[0].sums is not None:
        whole = torch.stack([batch.sums for batch in batches]).sum(0)
        for batch, own in zip(batches, whole, strict=True):
            batch.receive_sums(own)
    if clip is not None:
        signals = [
            replace(s, clip=s.counters.new_tensor(clip, dtype=torch.float32)) for s in signals
        ]
    both = list(zip(batches, signals, strict=True))
    for batch, s in both:
        batch.scale(h, s)
    norms = torch.stack([batch.norms for batch in batches]).sum(0)
    for batch in batches:
        batch.norms.copy_(norms)
    if batches[0].s is not None:
        scales = torch.stack([batch.s for batch in batches])
        for batch in batches:
            batch.receive_scales(scales)
    for batch, s in both:
        batch.limit(h, s)
    for batch, s in both:
        batch.apply(h, s)


def whole_step(module, items, h, separate=False, clip=None):
    """The same of whole matrices."""
    signals = signals_for(items[0])
    batch = module.build(items, separate=separate or clip is not None)
    batch.project(h, signals)
    if clip is not None:
        signals = replace(signals, clip=signals.counters.new_tensor(clip, dtype=torch.float32))
    batch.scale(h, signals)
    batch.apply(h, signals)
    return signals.counters.tolist()


def hyper(**changes):
    options = dict(
        lr=0.1, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, correct_bias=True, maximize=False,
        distribution="rademacher", update_proj_gap=1,
    )  # fmt: skip
    return Hyper(**{**options, **changes})


def near(found, exact, tolerance):
    """``tolerance``: of the largest number. A NaN is near to nothing."""
    assert found.shape == exact.shape and found.dtype == exact.dtype
    largest = max(float(exact.double().abs().max()), 1e-30) if exact.numel() else 1.0
    assert ((found.double() - exact.double()).abs() <= tolerance * largest).all()


def by_rank(items, dim, ends):
    return [list(own) for own in zip(*(cut(i, dim, ends) for i in items), strict=True)]


def agree(module, items, dim, ends, h, steps=None, tolerance=2**-17, **options):
    """Cut at ``ends``, the matrices step as they do whole: only sums are in another order. Moments
    say so to ``tolerance``; a scale |N| / |R| may stand on few and small entries of R, so that
    weights, of bf16 too, differ by more, and update_norm, the norm of scaled channels, as much."""
    ranks, whole = by_rank(items, dim, ends), [copy(item) for item in items]
    steps = steps or (2 if module is cuda else 1)
    assert all(module.takes(item) for own in ranks for item in own)
    for _ in range(steps):
        expected = whole_step(module, whole, h, **options)
        for counters in step(module, ranks, h, **options):
            assert counters == expected
    for item, *own in zip(whole, *ranks, strict=True):
        weight, exp_avg, exp_avg_sq = together(own, dim)
        near(exp_avg, item.exp_avg, tolerance)
        near(exp_avg_sq, item.exp_avg_sq, 2 * tolerance)
        near(weight, item.weight, max(1e-3, torch.finfo(weight.dtype).eps))
        for part in own:
            assert int(part.step) == int(item.step) == steps
            near(part.update_norm, item.update_norm, 1e-3)
