"""The PyTorch back end keeps projections, since on a CPU drawing one costs more than reading it."""

import gc

import torch

from apollo_kernels import cpu, philox


class Owner:
    """A matrix's place in a plan."""


def test_kept_projections_are_bounded_never_stale_and_end_with_their_owner():
    cache, owners = cpu.ProjectionCache(limit=3 * 2 * 8 * 100), [Owner() for _ in range(5)]
    for key, owner in enumerate(owners):
        for epoch in (0, 1):
            args = (key, epoch, 8, 100, "gaussian")
            expected = philox.draw(*args) * 2
            for _ in range(2):
                found, held = cache.get(owner, key, args, lambda args=args: philox.draw(*args) * 2)
                assert torch.equal(found, expected) and held == (key < 3)
            assert cache.nbytes <= cache.limit
    assert cache.nbytes == cache.limit
    del owner, owners
    gc.collect()
    assert cache.nbytes == 0
