"""A group's step as a torch.library operator, and torch.compile of a whole optimizer step."""

import pytest
import torch
from helpers import changed, fill, parameters, randn, snapshot

from apollo_kernels import APOLLO

SHAPES = [(16, 8), (8, 20), (5,), (3, 4, 2)]
OPTIONS = {
    "plain": {},
    "decay, ascending": {"weight_decay": 0.1, "maximize": True},
    "Mini": {"rank": 1, "scale_type": "tensor", "proj": "rademacher"},
    "clipped": {"max_grad_norm": 0.5},
}


def make(backend, **options):
    params = parameters(SHAPES[1:3] if backend.interpreted else SHAPES, backend)
    experts = randn((2, 8, 6), backend, seed=9)
    params.append(torch.nn.Parameter(experts))
    groups = [{"params": params[:-1]}, {"params": params[-1:], "batch_dims": 1}]
    named = {"rank": 4, "update_proj_gap": 2, "lr": 0.01, **options}
    return params, APOLLO(groups, **named)


def run(backend, compiled_from, steps=3, **options):
    """Some steps, from number ``compiled_from`` on under torch.compile."""
    torch._dynamo.reset()
    params, optimizer = make(backend, **options)
    step = optimizer.step
    for i in range(steps):
        fill(params, backend, i)
        if i == compiled_from:
            step = torch.compile(optimizer.step, fullgraph=i > 0, backend="aot_eager")
        step()
    return params, optimizer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_step_has_no_graph_break_and_is_exact(backend, options):
    """After the first step, which makes state."""
    _, compiled = run(backend, 1, **options)
    _, eager = run(backend, None, **options)
    assert compiled.stats() == eager.stats()
    if "max_grad_norm" not in options:
        assert changed(snapshot(eager), snapshot(compiled)) == set()
        return
    # An operator steps one group, so that here the norm is taken by PyTorch: in another order.
    torch.testing.assert_close(compiled.grad_norm, eager.grad_norm, rtol=1e-6, atol=0)
    for (key, a), (_, b) in zip(snapshot(compiled).items(), snapshot(eager).items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=str(key))


def test_a_tensor_lr_is_read_at_each_compiled_step(backend):
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        lr = torch.tensor(0.01, device=backend.device)
        params, optimizer = make(backend, lr=lr)
        step = optimizer.step
        for i in range(4):
            lr.fill_(0.01 * (i + 1))
            fill(params, backend, i)
            step()
            if i == 0 and compiled:
                step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_s_compiled_steps_skip_and_unscale_as_its_eager_ones(backend, fused):
    """The scale grows at every step, and one of them has an Inf."""
    results = []
    for compiled in (True, False):
        torch._dynamo.reset()
        params, optimizer = make(backend, fused=fused)
        scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0**10, growth_interval=1)
        for i in range(4):
            fill(params, backend, i)
            scale = scaler.scale(torch.ones((), device=backend.device))
            for p in params:
                p.grad.mul_(scale)
            if i == 2:
                params[0].grad[0, 0] = float("inf")
            if i == 1 and compiled:
                optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
            scaler.step(optimizer)
            scaler.update()
        results.append((snapshot(optimizer), optimizer.stats(), scaler.get_scale()))
    assert changed(results[0][0], results[1][0]) == set()
    assert results[0][1:] == results[1][1:]
    assert results[0][1]["nonfinite"] == 0 and results[0][2] == 2.0**12
    assert all(int(own["step"]) == 3 for own in optimizer.state.values())


def test_the_first_step_may_be_a_compiled_one(backend):
    """It makes the state and the counters too, and ``stats()`` counts from it on."""
    _, compiled = run(backend, 0)
    _, eager = run(backend, None)
    assert changed(snapshot(eager), snapshot(compiled)) == set()
    assert compiled.stats() == eager.stats()
    assert compiled.stats()["updates"] == 3 * (len(compiled.state) + 1)  # one is two matrices


def test_another_key_and_rank_at_the_same_addresses_are_seen_by_an_operator(backend, monkeypatch):
    """Operators have no optimizer: what they keep must not outlive it, nor be another's. They are
    called as a compiled step calls them; torch.compile itself may hand over copies."""
    room, places = torch.zeros(4, 24 * 16, device=backend.device), {}
    found = []
    for compiled in (True, False):
        results = []
        for rank, seed in ((8, 0), (4, 1), (8, 2)):
            room.zero_()
            p = torch.nn.Parameter(room[0].view(24, 16).copy_(randn((24, 16), backend)))
            p.grad = room[1].view(24, 16)
            optimizer = APOLLO([p], rank=rank, seed=seed, lr=0.1)
            for step in range(3):
                p.grad.copy_(randn((24, 16), backend, seed=step))
                answer = compiled and step > 0  # the first step makes state, which then moves
                monkeypatch.setattr(torch.compiler, "is_compiling", lambda answer=answer: answer)
                optimizer.step()
                state = optimizer.state[p]
                for i, name in ((2, "exp_avg"), (3, "exp_avg_sq")):
                    state[name] = room[i][: 24 * rank].view(24, rank).copy_(state[name])
                for name in ("step", "update_norm"):
                    place = places.setdefault(name, state[name].clone())
                    state[name] = place.copy_(state[name])
            results.append(snapshot(optimizer))
        found.append(results)
    for a, b in zip(*found, strict=True):
        assert changed(a, b) == set()


def test_the_operators_keep_torch_s_rules(backend, monkeypatch):
    """Schema, fake tensors and dispatch, on the arguments that a compiled step hands over."""
    calls = {}
    params, optimizer = make(backend)
    fill(params, backend)
    optimizer.step()

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "apollo_kernels":
                calls.setdefault(function, (args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Seen():
        optimizer.step()
    monkeypatch.undo()
    assert calls
    for function, (args, kwargs) in calls.items():
        # as the optimizer sees them, under no_grad: weights that want no gradient
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(function, args, kwargs)
