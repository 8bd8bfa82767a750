"""A step is a function of what the optimizer holds now, and of nothing that it held before.

An old tensor is kept alive here and looked at after the step: what a test must not do is to free it
and to wait for the crash.
"""

import gc
import importlib
import weakref

import pytest
import torch
from helpers import (
    all_of,
    changed,
    fill,
    parameter,
    parameters,
    randn,
    same,
    snapshot,
    step_as_a_new_optimizer,
    train,
)

from apollo_kernels import APOLLO

SHAPES = [(24, 16), (16, 24), (9,)]
KERNELS = {"cuda": "apollo_kernels.cuda", "triton": "apollo_kernels.triton_kernels.step"}


def trained(backend, shapes=SHAPES, steps=3, **options):
    """Parameters, and an optimizer that has settled on them: so it has something to remember."""
    params = parameters(shapes, backend)
    optimizer = APOLLO(params, **{"lr": 0.1, "rank": 8, "update_proj_gap": 2, **options})
    train(params, optimizer, backend, range(steps))
    fill(params, backend, steps)
    return params, optimizer


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "update_norm"])
def test_a_replaced_state_tensor_is_stepped_and_the_old_one_left_alone(backend, name):
    params, optimizer = trained(backend)
    old = {p: optimizer.state[p][name] for p in params if name in optimizer.state[p]}
    copies = {p: value.clone() for p, value in old.items()}
    for p, value in old.items():
        optimizer.state[p][name] = value.clone() + 1
    step_as_a_new_optimizer(optimizer)
    assert all(same(old[p], copies[p]) for p in old)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "update_norm"])
def test_a_state_tensor_whose_data_moved_is_stepped_where_it_is_now(backend, name):
    """Offloaders and device moves assign to ``.data``: the same tensor then has other memory."""
    params, optimizer = trained(backend)
    kept = []
    for p in params:
        if name in optimizer.state[p]:
            value = optimizer.state[p][name]
            kept.append((value.data, value.clone()))
            value.data = value.data.clone()
    step_as_a_new_optimizer(optimizer)
    assert all(same(old, copy) for old, copy in kept)


def test_a_replaced_seed_draws_another_projection(backend):
    params, optimizer = trained(backend)
    optimizer.state[params[0]]["seed"] = 12345
    step_as_a_new_optimizer(optimizer)


@pytest.mark.parametrize("how", ["emptied", "removed", "cleared in place", "all cleared"])
def test_state_that_was_taken_away_is_made_anew(backend, how):
    params, optimizer = trained(backend)
    kept = [dict(state) for state in optimizer.state.values()]
    if how == "emptied":
        optimizer.state[params[0]] = {}
    elif how == "removed":
        del optimizer.state[params[0]]
    elif how == "cleared in place":
        optimizer.state[params[0]].clear()
    else:
        optimizer.state.clear()
    step_as_a_new_optimizer(optimizer)
    assert int(optimizer.state[params[0]]["step"]) == 1
    assert all(int(state["step"]) in (3, 4) for state in kept)


def test_a_replaced_state_dictionary_is_the_one_that_is_stepped(backend):
    params, optimizer = trained(backend)
    old = optimizer.state[params[0]]
    before = {name: torch.as_tensor(value).clone() for name, value in old.items()}
    optimizer.state[params[0]] = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in old.items()
    }
    step_as_a_new_optimizer(optimizer)
    assert all(same(torch.as_tensor(old[name]), value) for name, value in before.items())


@pytest.mark.parametrize(
    "name, wrong",
    [
        *((name, "shape") for name in ("exp_avg", "exp_avg_sq", "step", "update_norm")),
        *((name, torch.bfloat16) for name in ("exp_avg", "exp_avg_sq", "update_norm")),
        ("exp_avg", torch.float64),
        ("step", torch.float32),  # as earlier versions kept it: only a load makes it an int64
        ("step", torch.int32),
    ],
    ids=str,
)
def test_a_state_tensor_that_does_not_fit_raises_and_nothing_moves(backend, name, wrong):
    params, optimizer = trained(backend)
    value = optimizer.state[params[1]][name]
    if wrong == "shape":
        replaced = torch.zeros((*value.shape, 2), dtype=value.dtype, device=value.device)
    else:
        replaced = value.to(wrong)
    optimizer.state[params[1]][name] = replaced
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


# ---- groups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_another_orientation_of_a_square_matrix_is_seen(backend, scale_type):
    """The moments' shape stays, so it is a change that may be meant."""
    (_,), optimizer = trained(backend, [(16, 16)], scale_type=scale_type)
    optimizer.param_groups[0]["proj_type"] = "reverse_std"
    step_as_a_new_optimizer(optimizer)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.2},
        {"weight_decay": 0.1},
        {"betas": (0.5, 0.9)},
        {"eps": 1e-3},
        {"scale": 4.0},
        {"scale_type": "tensor"},
        {"proj": "rademacher"},
        {"update_proj_gap": 1},
        {"correct_bias": False},
        {"maximize": True},
        {"disable_nl": True},
        {"scale_front": True, "scale": 4.0},
    ],
    ids=str,
)
def test_a_changed_group_value_counts_from_the_next_step_on(backend, change):
    _, optimizer = trained(backend, SHAPES[:1] + SHAPES[2:])
    optimizer.param_groups[0].update(change)
    step_as_a_new_optimizer(optimizer)


def test_another_rank_with_its_moments_is_seen(backend):
    """Whoever changes the rank must bring moments that fit; addresses alone do not tell."""
    (p,), optimizer = trained(backend, [(24, 16)])
    room = torch.zeros(24 * 16, device=backend.device)
    state = optimizer.state[p]
    for rank in (8, 4):
        for i, name in enumerate(("exp_avg", "exp_avg_sq")):
            state[name] = room[192 * i :][: 24 * rank].view(24, rank)
        optimizer.param_groups[0]["rank"] = rank
        step_as_a_new_optimizer(optimizer)


def test_a_parameter_that_is_listed_later_is_stepped(backend):
    _, optimizer = trained(backend)
    late = parameter((16, 8), backend)
    fill([late], backend)
    optimizer.param_groups[0]["params"].append(late)
    step_as_a_new_optimizer(optimizer)
    assert int(optimizer.state[late]["step"]) == 1


def test_a_parameter_that_is_no_longer_listed_is_left_alone(backend):
    _, optimizer = trained(backend)
    gone = optimizer.param_groups[0]["params"].pop(0)
    before = gone.detach().clone()
    optimizer.step()
    assert torch.equal(gone, before)


def test_a_back_end_that_is_asked_for_in_mid_run_is_taken(backend, monkeypatch):
    _, optimizer = trained(backend)
    monkeypatch.setenv("APOLLO_KERNELS_BACKEND", "hip")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="APOLLO_KERNELS_BACKEND must be one of"):
        optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


# ---- gradients ---------------------------------------------------------------------------------


def test_a_gradient_that_was_transposed_where_it_lies_is_read_as_it_lies(backend):
    (p,), optimizer = trained(backend, [(16, 16)])
    p.grad = p.grad.t()
    step_as_a_new_optimizer(optimizer)


def test_a_dense_gradient_that_was_transposed_where_it_lies_is_read_as_it_lies(backend):
    (p,), optimizer = trained(backend, [(16, 16)], rank=None)
    p.grad = p.grad.t()
    step_as_a_new_optimizer(optimizer)


def test_gradients_that_move_are_found(backend):
    params, optimizer = trained(backend)
    kept = []
    for step in range(3):
        kept += [p.grad for p in params]
        for i, p in enumerate(params):
            p.grad = randn(p.shape, backend, seed=100 * step + i)
        step_as_a_new_optimizer(optimizer)


def test_gradients_that_come_and_go_are_seen(backend):
    params, optimizer = trained(backend)
    for absent in (0, 1, 2, 0):
        fill(params, backend, 7 + absent)
        params[absent].grad = None
        step_as_a_new_optimizer(optimizer)


def test_a_gradient_of_another_dtype_at_the_same_address_is_seen(backend):
    p = parameter((24, 16), backend)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties the gradient's dtype to the parameter's")
    p.grad_dtype = None  # any
    optimizer = APOLLO([p], lr=0.1, rank=8)
    train([p], optimizer, backend, range(2))
    room = p.grad
    p.grad = room.view(torch.bfloat16)[:, :16].copy_(randn(p.shape, backend, seed=5))
    assert p.grad.data_ptr() == room.data_ptr()
    weight = torch.nn.Parameter(p.detach().clone())
    weight.grad = p.grad.float()
    other = APOLLO([weight], lr=0.1, rank=8)
    other.load_state_dict(optimizer.state_dict())
    optimizer.step()
    other.step()
    # bf16 numbers are float32 numbers; the kernels may add them up in another order
    torch.testing.assert_close(p.detach(), weight.detach(), rtol=1e-5, atol=1e-6)


# A side of size 1 may have any stride, and whoever takes it for a distance reads beyond the end.
ROWS = [(12, 1), (1, 1), (1, 2), (7, 2), (2, 3), (0, 0), (12, 0), (5, 0)]


@pytest.mark.parametrize("stride", ROWS, ids=str)
@pytest.mark.parametrize("rank", [None, 1, 4, 8])
@pytest.mark.parametrize("column", [False, True])
def test_a_gradient_of_one_row_has_any_stride(backend, stride, rank, column):
    shape = (1, 12)
    options = {"rank": rank, "scale_type": "tensor", "proj_type": "right", "lr": 0.1}
    results = []
    for plain in (True, False):
        room = torch.full((64,), float("nan"), device=backend.device)
        g = room.as_strided(shape, stride, 9)
        if stride[1]:
            g.copy_(randn(shape, backend))
        else:
            room[9] = 0.7  # all of its elements are this one
        g = g.clone(memory_format=torch.contiguous_format) if plain else g
        p = parameter((12, 1) if column else shape, backend)
        p.grad = g.t() if column else g
        optimizer = APOLLO([p], **options)
        optimizer.step()
        results.append((p.detach(), optimizer.state[p]["exp_avg_sq"]))
    for a, b in zip(*results, strict=True):
        # the same sums, which the kernels may add up in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", ROWS[:5], ids=str)
@pytest.mark.parametrize("rank", [None, 1, 8])
def test_a_weight_of_one_row_has_any_stride(backend, stride, rank):
    room = torch.full((64,), 7.0, device=backend.device)
    view = room.as_strided((1, 12), stride, 9)
    view.copy_(randn((1, 12), backend))
    p, q = torch.nn.Parameter(view), torch.nn.Parameter(view.detach().clone())
    for x in (p, q):
        optimizer = APOLLO([x], rank=rank, scale_type="tensor", proj_type="right", lr=0.1)
        train([x], optimizer, backend, range(2))
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    view.fill_(7.0)
    assert (room == 7.0).all()  # and what lies between its elements is as it was


# ---- weights that lie elsewhere, or otherwise --------------------------------------------------


def test_weights_that_move_are_found(backend):
    params, optimizer = trained(backend)
    kept = [(p.data, p.data.clone()) for p in params]
    for p in params:
        p.data = p.data.clone()
    step_as_a_new_optimizer(optimizer)
    assert all(same(*pair) for pair in kept)


@pytest.mark.parametrize("rank", [8, None])
def test_a_weight_transposed_where_it_lies_is_stepped_as_it_lies(backend, rank):
    (p,), optimizer = trained(backend, [(16, 16)], rank=rank)
    p.data = p.data.t()
    step_as_a_new_optimizer(optimizer)


@pytest.mark.parametrize("rank", [8, None])
def test_another_slice_at_the_same_address_is_stepped_alone(backend, rank):
    """[16, 16] of a wide matrix, then of a narrow one: the rest of the memory is not written."""
    whole = randn((16, 32), backend)
    p = torch.nn.Parameter(whole[:, :16])
    optimizer = APOLLO([p], lr=0.1, rank=rank)
    train([p], optimizer, backend, range(3))
    p.data = whole.view(-1)[:256].view(16, 16)
    rest = whole.view(-1)[256:].clone()
    fill([p], backend, 3)
    step_as_a_new_optimizer(optimizer)
    assert torch.equal(whole.view(-1)[256:], rest)


@pytest.mark.parametrize("rank", [8, None])
def test_another_dtype_at_the_same_address_is_stepped_as_what_it_is(backend, rank):
    whole = randn((24, 16), backend)
    p = torch.nn.Parameter(whole)
    optimizer = APOLLO([p], lr=0.1, rank=rank)
    train([p], optimizer, backend, range(3))
    values = p.detach().bfloat16()
    p.grad = None
    p.data = whole.view(torch.bfloat16).view(-1)[: 24 * 16].view(24, 16).copy_(values)
    rest = whole.view(-1)[12 * 16 :].clone()
    fill([p], backend, 3)
    step_as_a_new_optimizer(optimizer)
    assert torch.equal(whole.view(-1)[12 * 16 :], rest)


@pytest.mark.parametrize("shape", [(16, 24), (48, 8), (12, 16), (384,), (24, 4, 4)])
@pytest.mark.parametrize("rank", [8, None])
def test_another_shape_at_the_same_address_raises_unless_the_state_fits(backend, shape, rank):
    (p,), optimizer = trained(backend, [(24, 16)], rank=rank)
    whole = p.data
    p.grad = None
    p.data = whole.view(-1)[: torch.Size(shape).numel()].view(shape)
    fill([p], backend, 3)
    before = snapshot(optimizer), whole.clone()
    if rank and shape in [(24, 4, 4), (16, 24)]:  # as a matrix it has the same moments
        step_as_a_new_optimizer(optimizer)
        return
    with pytest.raises(ValueError, match="does not fit|takes the dense one"):
        optimizer.step()
    assert changed(before[0], snapshot(optimizer)) == set()
    assert torch.equal(whole, before[1])


# ---- what is kept, and what is not ---------------------------------------------------------------


def test_a_step_keeps_no_gradient_alive(backend):
    params, optimizer = trained(backend)
    gradients = [weakref.ref(p.grad) for p in params]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    assert all(gradient() is None for gradient in gradients)


def test_a_loaded_state_lets_go_of_the_one_before(backend):
    params, optimizer = trained(backend)
    saved = optimizer.state_dict()["state"]
    saved = {i: {k: torch.as_tensor(v).clone() for k, v in s.items()} for i, s in saved.items()}
    for state in saved.values():
        if "seed" in state:
            state["seed"] = int(state["seed"])
    old = []
    for _ in range(3):
        old += [weakref.ref(optimizer.state[p]["exp_avg"]) for p in params]
        whole = {"state": saved, "param_groups": optimizer.state_dict()["param_groups"]}
        optimizer.load_state_dict(whole)
        optimizer.step()
    gc.collect()
    assert [ref() is None for ref in old] == [True] * len(old)


def test_a_deleted_optimizer_lets_go_of_its_parameters(backend):
    params, optimizer = trained(backend)
    refs = [weakref.ref(p) for p in params] + [weakref.ref(optimizer)]
    del params, optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


# ---- what a step costs the host ------------------------------------------------------------------


@pytest.fixture
def builds(backend, monkeypatch):
    """How often the back end was asked for new launches: its ``build`` and ``build_dense``.

    The border of batch.py, and the one place where this file looks behind the optimizer.
    """
    if backend.name not in KERNELS:
        pytest.skip("PyTorch builds nothing that would be worth keeping")
    module, calls = importlib.import_module(KERNELS[backend.name]), []
    for name in ("build", "build_dense"):
        original = getattr(module, name)

        def counted(*args, original=original, **kwargs):
            calls.append(len(args[0]))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return calls


def groups_of(backend, count):
    params = parameters([(8, 6), (5,)] * count, backend)
    pairs = [params[i : i + 2] for i in range(0, 2 * count, 2)]
    return params, APOLLO([{"params": pair, "lr": 0.1} for pair in pairs], rank=4)


@pytest.mark.parametrize("count", [2, 70])
def test_gradients_that_move_build_nothing_anew(backend, builds, count):
    """Also of more groups than a cache of some fixed size would hold."""
    count = min(count, 3) if backend.interpreted else count
    params, optimizer = groups_of(backend, count)
    train(params, optimizer, backend, range(2))
    made = list(builds)
    assert sum(made) == len(params)  # each was built once
    kept = []
    for step in range(2, 4):
        kept += [p.grad for p in params]
        for i, p in enumerate(params):
            p.grad = randn(p.shape, backend, seed=1000 * step + i)
        optimizer.step()
        assert builds == made


def test_a_warm_step_makes_no_tensor(backend):
    """Nothing is allocated, copied or asked: the kernels alone run."""
    if backend.name != "cuda":
        pytest.skip("PyTorch computes, and Triton's interpreter computes with PyTorch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not str(function).startswith("profiler."):  # torch's own, around every step
                names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    _, optimizer = trained(backend)
    optimizer.step()
    with Seen():
        optimizer.step()
    assert names == []


def test_what_changes_is_built_again_for_its_own_group_alone(backend, builds):
    params, optimizer = groups_of(backend, 3)
    train(params, optimizer, backend, range(2))
    del builds[:]
    state = optimizer.state[params[2]]
    state["exp_avg"] = state["exp_avg"].clone()
    optimizer.step()
    assert 1 <= sum(builds) <= 2
    assert all_of(optimizer) == params
