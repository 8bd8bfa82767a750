"""What test_gpu.py allows a card is what the contract allows: tried with entries of Z flipped."""

import pytest
import torch
from gpu_runs import CONFIGURATIONS, compare, gaussian, train

from apollo_kernels import reference


def flipping(seed, share):
    """``draw`` with that share of Z's entries moved to a neighbour in bf16."""
    generator, draw = torch.Generator().manual_seed(seed), reference.draw

    def flipped(*arguments, **keys):
        z = draw(*arguments, **keys)
        bits = z.bfloat16().view(torch.int16)
        moved = torch.where(torch.rand(z.shape, generator=generator) < 0.5, bits + 1, bits - 1)
        hit = torch.rand(z.shape, generator=generator) < share
        return torch.where(hit, moved, bits).view(torch.bfloat16).to(z.dtype)

    return flipped


@pytest.mark.parametrize("name", [n for n, keys in CONFIGURATIONS.items() if gaussian(keys)])
def test_a_run_with_the_flips_that_the_contract_allows_passes(monkeypatch, name):
    keys = CONFIGURATIONS[name]
    refused = 0
    for seed in range(10):
        monkeypatch.setattr(reference, "draw", flipping(seed, 1e-3))
        found, _ = train(torch.float32, "cpu", "torch", keys)
        monkeypatch.undo()
        compare(found, torch.float32, keys, flips=True)
        try:
            compare(found, torch.float32, keys, flips=False)
        except AssertionError:
            refused += 1
    assert refused, "the runs are too short to show a flip"


def test_a_run_with_a_wrong_projection_fails(monkeypatch):
    """A row of Z that is another row's: what the allowance must not hide."""
    draw = reference.draw

    def shifted(*arguments, **keys):
        z = draw(*arguments, **keys)
        return torch.cat([z[:1], z[:-1]]) if z.shape[0] > 1 else z

    monkeypatch.setattr(reference, "draw", shifted)
    found, _ = train(torch.float32, "cpu", "torch", CONFIGURATIONS["channel"])
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        compare(found, torch.float32, CONFIGURATIONS["channel"], flips=True)
