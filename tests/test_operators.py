"""The steps as torch.library operators, and torch.compile of a whole optimizer step."""

import contextlib

import emulated
import pytest
import torch

from apollo_kernels import APOLLO, operators
from apollo_kernels.reference import Dense, Hyper, LowRank

HYPER = Hyper(0.1, (0.9, 0.999), 1e-6, 0.01, True, False)


def low_rank(m, n):
    channels, rank = max(m, n), 4
    return LowRank(
        torch.randn(m, n), torch.randn(m, n), torch.zeros(channels, rank),
        torch.zeros(channels, rank), torch.zeros(()), torch.zeros(()), 7, m >= n,
    )  # fmt: skip


def arguments(kind, hyper=HYPER):
    if kind == "step_low_rank":
        batch, names = [low_rank(9, 6), low_rank(5, 8)], operators.LOW_RANK_FIELDS
    else:
        batch = [Dense(*(torch.rand(5) for _ in range(4)), torch.zeros(()))]
        names = operators.DENSE_FIELDS
    columns = [[getattr(item, name) for item in batch] for name in names]
    if kind == "step_low_rank":
        columns.append([int(item.rows) for item in batch])
    lr, *settings = operators.packed(hyper, "torch")
    return (*columns, torch.zeros(3, dtype=torch.int64), lr, None, None, *settings)


@pytest.mark.parametrize("kind", ["step_low_rank", "step_dense"])
def test_opcheck(kind):
    operator = getattr(torch.ops.apollo_kernels, kind).default
    torch.library.opcheck(operator, arguments(kind))
    with_tensor = Hyper(torch.tensor(0.1), (0.9, 0.999), 1e-6, 0.01, True, False)
    torch.library.opcheck(operator, arguments(kind, with_tensor))


def run(backend, compiled, **options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s)) for s in [(16, 8), (8, 20), (5,), (3, 4, 2)]]
    optimizer = APOLLO(ps, rank=4, backend=backend, update_proj_gap=3, **options)
    step = optimizer.step
    for i in range(7):
        for p in ps:
            p.grad = torch.randn_like(p)
        step()
        if i == 0 and compiled:  # the first step makes state
            step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    return ps, optimizer


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1, "maximize": True}, {"lr": torch.tensor(0.01)}], ids=str
)
def test_a_compiled_step_has_no_graph_break_and_is_exact(backend, options):
    device = contextlib.nullcontext()
    if backend == "cuda":
        if reason := emulated.why_not():
            pytest.skip(reason)
        device = emulated.device(emulated.load(emulated.build()))
    with device:
        compiled, a = run(backend, True, **options)
        eager, b = run(backend, False, **options)
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))
    assert a.stats() == b.stats()
    for x, y in zip(compiled, eager, strict=True):
        assert torch.equal(a.state[x]["exp_avg"], b.state[y]["exp_avg"])
