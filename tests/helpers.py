"""What many tests do: make parameters and gradients, look at what a step has changed."""

import pytest
import torch

from apollo_kernels import APOLLO


def randn(shape, backend, dtype=torch.float32, seed=0):
    """Normal numbers, the same on every device and in every dtype but for the rounding."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return x.to(backend.device, dtype)


def parameter(shape, backend, dtype=torch.float32, seed=0):
    return torch.nn.Parameter(randn(shape, backend, dtype, seed))


def parameters(shapes, backend, dtype=torch.float32):
    return [parameter(shape, backend, dtype, seed) for seed, shape in enumerate(shapes)]


def all_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def fill(params, backend, step=0, factor=1.0):
    """New gradients of step ``step``. Old ones are written over: an address that stays is what lets
    an optimizer believe that nothing has changed."""
    for i, p in enumerate(params):
        g = factor * randn(p.shape, backend, p.dtype, seed=1000 * step + i)
        if p.grad is None or p.grad.shape != p.shape or p.grad.dtype != p.dtype:
            p.grad = g
        else:
            p.grad.copy_(g)


def train(params, optimizer, backend, steps):
    """Steps with the numbers in ``steps``, which decide the gradients."""
    for step in steps:
        fill(params, backend, step)
        optimizer.step()


def snapshot(optimizer):
    """Copies of all weights and of all state, by (parameter's place, name)."""
    found = {}
    for i, p in enumerate(all_of(optimizer)):
        found[i, "weight"] = p.detach().clone()
        for name, value in optimizer.state.get(p, {}).items():
            found[i, name] = value.clone() if isinstance(value, torch.Tensor) else value
    return found


def same(a, b):
    """Equal dtypes, shapes and values; NaN is itself."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def changed(before, after):
    """The names that a step has changed, added or removed."""
    return {key for key in before.keys() | after.keys() if not _same_at(before, after, key)}


def _same_at(before, after, key):
    return key in before and key in after and same(before[key], after[key])


def refuses(optimizer, call, error=ValueError, match=""):
    """``call`` raises ``error``; weights, state and reports are as they were."""
    before, stats = snapshot(optimizer), optimizer.stats()
    settings = repr([{**g, "params": None} for g in optimizer.param_groups])  # tensors, too
    with pytest.raises(error, match=match):
        call()
    assert changed(before, snapshot(optimizer)) == set()
    assert optimizer.stats() == stats
    assert repr([{**g, "params": None} for g in optimizer.param_groups]) == settings


def in_place(t):
    """A copy of a tensor that lies in memory as it does: strides, offset and surroundings too."""
    storage = t.detach().untyped_storage().clone()
    empty = torch.empty(0, dtype=t.dtype, device=t.device)
    return empty.set_(storage, t.storage_offset(), t.shape, t.stride())


def new_twin(optimizer):
    """A new optimizer over copies of the weights and gradients, into which the state was loaded: it
    can remember nothing of earlier steps."""
    copies = {p: torch.nn.Parameter(in_place(p)) for p in all_of(optimizer)}
    for p, q in copies.items():
        q.grad = None if p.grad is None else in_place(p.grad)
    groups = [{**g, "params": [copies[p] for p in g["params"]]} for g in optimizer.param_groups]
    twin = APOLLO(groups, seed=optimizer.defaults["seed"])
    twin.load_state_dict(optimizer.state_dict())
    return twin


def step_as_a_new_optimizer(optimizer):
    """Takes a step, which must give the bits that an optimizer without a past gives."""
    twin = new_twin(optimizer)
    optimizer.step()
    twin.step()
    assert changed(snapshot(twin), snapshot(optimizer)) == set()
