"""``batch_dims``: a weight [E, m, n] is E matrices that share nothing but their step."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import (
    changed,
    fill,
    parameter,
    parameters,
    randn,
    snapshot,
    step_as_a_new_optimizer,
    train,
)
from restatement import Experts, key_of, key_of_matrix

from apollo_kernels import APOLLO

DTYPES = [torch.float32, torch.bfloat16]


def numbers(t):
    return t.detach().cpu().double().numpy()


CONFIGURATIONS = {
    "APOLLO": {"rank": 4},
    "rank 8": {"rank": 8, "proj": "rademacher", "weight_decay": 0.1},
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 16.0},
    "reverse": {"rank": 4, "proj_type": "reverse_std"},
    "no bias correction": {"rank": 4, "correct_bias": False, "scale_front": True},
}


@pytest.mark.parametrize("shape", [(3, 12, 9), (2, 9, 12), (1, 10, 10)], ids=str)
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_matrix_follows_algorithm_1_with_its_own_key(backend, config, shape, dtype):
    p = parameter(shape, backend, dtype)
    named = {"lr": 0.02, "update_proj_gap": 2, **config}
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], seed=3, **named)
    named["distribution"] = "rademacher" if named.pop("proj", None) else "gaussian"
    oracle = Experts(shape, key=key_of(3, 0), **named)
    for step in range(4):
        fill([p], backend, step)
        if step == 2:
            p.grad[0].mul_(10)  # only the first matrix is held by its limiter
        before = numbers(p)
        exact = oracle.step(before, numbers(p.grad))
        optimizer.step()
        state = optimizer.state[p]
        for e, matrix in enumerate(oracle.matrices):
            # as in test_rule.py: half a unit for the store, 1e-4 of the update for float32 sums
            eps = torch.finfo(dtype).eps * (0.5 if dtype.itemsize == 2 else 2)
            store = eps * np.maximum(abs(exact[e]), abs(before[e]))
            slack = 1e-4 * abs(matrix.update).max()
            assert (abs(numbers(p)[e] - exact[e]) <= store + slack).all(), (step, e)
            for name, wanted in (("exp_avg", matrix.m), ("exp_avg_sq", matrix.v)):
                found = numbers(state[name][e])
                assert abs(found - wanted).max() <= 3e-6 * abs(wanted).max(), (step, e, name)
            assert float(state["update_norm"][e]) == pytest.approx(matrix.norm, rel=1e-4)
    assert int(optimizer.state[p]["step"]) == 4


def test_state_has_one_row_of_matrices_and_one_step(backend):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], rank=4)
    train([p], optimizer, backend, range(2))
    state = optimizer.state[p]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq", "update_norm", "seed"}
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (3, 12, 4)
    assert state["update_norm"].shape == (3,)
    assert state["step"].shape == () and state["step"].dtype == torch.int64 and state["step"] == 2
    assert state["seed"] == key_of(0, 0)
    stats = optimizer.stats()
    assert (stats["parameters"], stats["updates"], stats["nonfinite"]) == (1, 6, 0)


@pytest.mark.parametrize("rank", [1, 8])
def test_it_equals_that_many_parameters_with_those_keys_bit_for_bit(backend, rank):
    shape, options = (3, 20, 12), {"rank": rank, "lr": 0.1, "scale_type": "tensor"}
    p = parameter(shape, backend)
    twins = [torch.nn.Parameter(matrix.clone()) for matrix in p.detach()]
    together = APOLLO([{"params": [p], "batch_dims": 1}], **options)
    apart = APOLLO(twins, **options)
    for step in range(3):
        fill([p], backend, step)
        for q, g in zip(twins, p.grad, strict=True):
            q.grad = g.clone()
        if step == 0:  # the keys of the matrices are not those of three parameters
            apart.step()
            for e, q in enumerate(twins):
                q.data.copy_(p[e])
                apart.state[q]["seed"] = key_of_matrix(key_of(0, 0), e)
                for name in ("exp_avg", "exp_avg_sq", "update_norm", "step"):
                    apart.state[q][name].zero_()
        together.step()
        apart.step()
    for e, q in enumerate(twins):
        assert torch.equal(p[e], q)
        for name in ("exp_avg", "exp_avg_sq", "update_norm"):
            assert torch.equal(together.state[p][name][e], apart.state[q][name])


def test_two_leading_dimensions_are_counted_through(backend):
    """[2, 3, m, n] with batch_dims 2 is [6, m, n] with batch_dims 1."""
    p = parameter((2, 3, 8, 6), backend)
    q = torch.nn.Parameter(p.detach().reshape(6, 8, 6).clone())
    a = APOLLO([{"params": [p], "batch_dims": 2}], rank=4, lr=0.1)
    b = APOLLO([{"params": [q], "batch_dims": 1}], rank=4, lr=0.1)
    for step in range(2):
        fill([p], backend, step)
        q.grad = p.grad.reshape(6, 8, 6).clone()
        a.step()
        b.step()
    assert torch.equal(p.reshape(6, 8, 6), q)
    assert a.state[p]["exp_avg"].numel() == b.state[q]["exp_avg"].numel()


def test_without_it_three_dimensions_are_one_matrix(backend):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([p], rank=4)
    train([p], optimizer, backend, range(1))
    assert optimizer.state[p]["exp_avg"].shape == (
        108,
        3,
    )  # of [3, 108], whose columns are channels
    assert optimizer.param_groups[0]["batch_dims"] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_of_one_expert_holds_back_that_one_alone(backend, bad):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], rank=4, lr=0.1)
    train([p], optimizer, backend, range(1))
    before = p.detach().clone()
    fill([p], backend, 1)
    p.grad[1, 2, 3] = bad
    optimizer.step()
    moved = [not torch.equal(p[e], before[e]) for e in range(3)]
    assert moved == [True, False, True]
    assert torch.isfinite(p).all()
    assert int(optimizer.state[p]["step"]) == 2
    stats = optimizer.stats()
    assert (stats["updates"], stats["nonfinite"]) == (5, 1)


def test_a_zero_gradient_leaves_an_unrouted_expert_as_it_is(backend):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], rank=4, lr=0.1)
    before = p.detach().clone()
    fill([p], backend)
    p.grad[2] = 0
    optimizer.step()
    assert torch.equal(p[2], before[2]) and not torch.equal(p[0], before[0])
    assert optimizer.state[p]["update_norm"][2] == 0  # unset: its first real step is free


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_resumed_run_continues_bit_for_bit(backend, dtype):
    def make(params, **options):
        groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
        return APOLLO(groups, rank=4, lr=0.1, update_proj_gap=2, **options)

    shapes = [(3, 12, 9), (12, 8), (5,)]
    params = parameters(shapes, backend, dtype)
    optimizer = make(params)
    train(params, optimizer, backend, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = make(copies, seed=99)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(params, optimizer, backend, range(2, 4))
    train(copies, resumed, backend, range(2, 4))
    assert changed(snapshot(optimizer), snapshot(resumed)) == set()


@pytest.mark.parametrize(
    "damage",
    [
        {"exp_avg": torch.zeros(36, 4)},
        {"exp_avg_sq": torch.zeros(2, 12, 4)},
        {"update_norm": torch.zeros(())},
        {"update_norm": torch.zeros(2)},
        {"step": torch.zeros(3)},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(backend, damage):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([{"params": [("experts", p)], "batch_dims": 1}], rank=4)
    train([p], optimizer, backend, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(damage)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="experts"):
        optimizer.load_state_dict(saved)
    assert changed(before, snapshot(optimizer)) == set()


def test_experts_step_beside_all_other_kinds(backend):
    """The same bits alone and in company, for an expert weight too."""
    lonely, beside = (parameter((3, 12, 9), backend, seed=9) for _ in "ab")
    others = parameters([(40, 20), (7,), (4, 6, 2)], backend)
    alone = APOLLO([{"params": [lonely], "batch_dims": 1}], rank=10, lr=0.1)
    groups = [{"params": [beside], "batch_dims": 1}, {"params": others[:2]}]
    groups.append({"params": others[2:], "batch_dims": 1})
    together = APOLLO(groups, rank=10, lr=0.1)
    for step in range(2):
        fill([lonely], backend, step)
        fill([beside, *others], backend, step)
        beside.grad.copy_(lonely.grad)
        alone.step()
        together.step()
    assert torch.equal(lonely, beside)
    assert torch.equal(alone.state[lonely]["exp_avg"], together.state[beside]["exp_avg"])
    assert all(int(together.state[p]["step"]) == 2 for p in others)


@pytest.mark.parametrize("shape", [(0, 6, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_expert_weights_take_their_step(backend, shape):
    p, other = parameter(shape, backend), parameter((12, 8), backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}, {"params": [other]}], rank=4)
    train([p, other], optimizer, backend, range(2))
    assert int(optimizer.state[p]["step"]) == int(optimizer.state[other]["step"]) == 2


@pytest.mark.parametrize("layout", ["transposed", "sliced", "experts last"])
def test_experts_lie_in_memory_in_any_order(backend, layout):
    """Hugging Face keeps them as [E, in, out] and reads them transposed."""

    def lay(t):
        if layout == "transposed":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "experts last":
            return t.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        room = torch.zeros(6, 20, 30, device=t.device)
        return room[::2, 1:13, 2:20:2].copy_(t)

    x = randn((3, 12, 9), backend)
    p, q = torch.nn.Parameter(lay(x)), torch.nn.Parameter(x.clone())
    assert not p.is_contiguous()
    for i, w in enumerate((p, q)):
        optimizer = APOLLO([{"params": [w], "batch_dims": 1}], rank=4, lr=0.1)
        for step in range(2):
            g = randn(w.shape, backend, seed=step)
            w.grad = g if i else lay(g)
            optimizer.step()
    # sums over K may be taken in another order
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_gradients_that_move_and_state_that_is_replaced_are_seen(backend):
    p = parameter((3, 12, 9), backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], rank=4, lr=0.1)
    train([p], optimizer, backend, range(2))
    gradient, state = p.grad, optimizer.state[p]
    p.grad = randn(p.shape, backend, seed=77)
    step_as_a_new_optimizer(optimizer)
    assert gradient.data_ptr() != p.grad.data_ptr()
    old = state["exp_avg"], state["update_norm"]
    copies = [t.clone() for t in old]
    state["exp_avg"], state["update_norm"] = old[0].clone(), old[1].clone() * 2
    step_as_a_new_optimizer(optimizer)
    assert all(map(torch.equal, old, copies))


def test_stochastic_rounding_of_an_expert_takes_its_own_bits(backend):
    """Equal matrices with equal gradients are rounded by different bits."""
    p = torch.nn.Parameter(torch.ones(2, 40, 16, dtype=torch.bfloat16, device=backend.device))
    p.grad = torch.ones_like(p)
    options = {"lr": 2**-9, "correct_bias": False, "disable_nl": True, "betas": (0.0, 0.0)}
    groups = [{"params": [p], "batch_dims": 1}]
    APOLLO(groups, rank=8, stochastic_rounding=True, **options).step()
    assert (p[0] != p[1]).float().mean() > 0.1


@pytest.mark.parametrize("value", [-1, 1.5, "1", True, None])
def test_a_value_that_cannot_be_meant_is_refused(value):
    with pytest.raises(ValueError, match="batch_dims must be"):
        APOLLO([torch.nn.Parameter(torch.zeros(2, 3, 4))], rank=2, batch_dims=value)


def test_a_weight_that_leaves_no_matrix_is_dense(backend):
    """[m, n] with batch_dims 1 is m vectors."""
    p = parameter((6, 4), backend)
    fill([p], backend)
    optimizer = APOLLO([{"params": [p], "batch_dims": 1}], rank=2)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
