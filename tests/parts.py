"""Parts of matrices on the ranks of one process: what distributed.py does between the verbs, done
by hand, so that a back end's PartBatch can be looked at alone."""

from dataclasses import replace

import torch

from apollo_kernels.batch import LowRank, Part, Signals


def matrix(shape, rank, rows, dtype=torch.float32, key=7, columns_first=False):
    """A whole matrix with random weight and gradient; ``columns_first``: as it lies in memory."""
    generator = torch.Generator().manual_seed(key)
    both = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    if columns_first:
        both = [t.t().contiguous().t() for t in both]
    channels, k = shape if rows else shape[::-1]
    moments = [torch.zeros(channels, min(rank, k)) for _ in range(2)]
    step = torch.zeros((), dtype=torch.int64)
    return LowRank(*both, *moments, torch.zeros(()), step, key, rows)


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


def sums_of(batches, h):
    """What all ranks together send, after ``project``."""
    signals = Signals(torch.zeros(3, dtype=torch.int64))
    for batch in batches:
        batch.project(h, signals)
    return torch.stack([batch.sums for batch in batches]).sum(0)


def step(module, ranks, h, separate=False, clip=None, found_inf=None):
    """One step of ``ranks``, the items of each; returns the counters of each."""
    found_inf = None if found_inf is None else torch.tensor(found_inf)
    signals = [Signals(torch.zeros(3, dtype=torch.int64), found_inf=found_inf) for _ in ranks]
    batches = [module.build(items, separate=separate or clip is not None) for items in ranks]
    for batch, s in zip(batches, signals, strict=True):
        batch.project(h, s)
    if batches[0].sums is not None:
        whole = torch.stack([batch.sums for batch in batches]).sum(0)
        for batch, own in zip(batches, whole, strict=True):
            batch.receive_sums(own)
    if clip is not None:
        signals = [replace(s, clip=torch.tensor(clip)) for s in signals]
    both = list(zip(batches, signals, strict=True))
    for batch, s in both:
        batch.scale(h, s)
    norms = torch.stack([batch.norms for batch in batches]).sum(0)
    for batch in batches:
        batch.norms = norms.clone()
    if batches[0].s is not None:
        scales = torch.stack([batch.s for batch in batches])
        for batch in batches:
            batch.receive_scales(scales)
    for batch, s in both:
        batch.limit(h, s)
    for batch, s in both:
        batch.apply(h, s)
    return [s.counters.tolist() for s in signals]


def whole_step(module, items, h, separate=False, clip=None):
    """The same of whole matrices."""
    signals = Signals(torch.zeros(3, dtype=torch.int64))
    batch = module.build(items, separate=separate or clip is not None)
    batch.project(h, signals)
    if clip is not None:
        signals = replace(signals, clip=torch.tensor(clip))
    batch.scale(h, signals)
    batch.apply(h, signals)
    return signals.counters.tolist()
