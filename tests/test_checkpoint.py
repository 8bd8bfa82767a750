"""Nothing is lost on save, load, pickle and deepcopy; nothing is half loaded."""

import copy
import io
import pickle

import pytest
import torch
from helpers import changed, parameters, randn, snapshot

from apollo_kernels import APOLLO

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(12, 8), (8, 12), (5,), (4, 3, 2, 2), ()]


def model(backend, dtype=torch.float32):
    return parameters(SHAPES, backend, dtype)


def make(params, **options):
    groups = [
        {"params": params[:2], "rank": 4, "update_proj_gap": 3},
        {"params": params[2:], "rank": 1, "scale_type": "tensor", "scale": 128.0},
    ]
    return APOLLO(groups, lr=0.01, weight_decay=0.01, **options)


def train(params, optimizer, backend, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = randn(p.shape, backend, p.dtype, seed=100 * step + i)
        optimizer.step()


def through_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_resumed_run_continues_bit_for_bit(backend, dtype):
    whole = model(backend, dtype)
    train(whole, make(whole), backend, range(8))
    first = model(backend, dtype)
    optimizer = make(first)
    train(first, optimizer, backend, range(5))
    saved = through_file({"model": first, "optimizer": optimizer.state_dict()})
    second = [torch.nn.Parameter(p.detach()) for p in saved["model"]]
    resumed = make(second, seed=99)  # the state's seeds hold, not the new optimizer's
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, backend, range(5, 8))
    assert equal_bits(whole, second)


@pytest.mark.parametrize("dtype", DTYPES)
def test_loaded_state_keeps_its_dtypes_and_values(backend, dtype):
    params = model(backend, dtype)
    optimizer = make(params)
    train(params, optimizer, backend, range(4))
    other = make(model(backend, dtype))
    other.load_state_dict(through_file(optimizer.state_dict()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, q in zip(params, (p for g in other.param_groups for p in g["params"]), strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            if key == "seed":
                assert type(theirs[key]) is int and theirs[key] == value
                continue
            assert theirs[key].dtype == (torch.int64 if key == "step" else wide), key
            assert torch.equal(theirs[key], value), key


def test_state_is_empty_before_the_first_step_and_holds_only_tensors_and_ints(backend):
    params = model(backend)
    optimizer = make(params)
    assert not optimizer.state
    train(params, optimizer, backend, range(1))
    low_rank, dense = optimizer.state[params[0]], optimizer.state[params[2]]
    assert set(low_rank) == {"step", "exp_avg", "exp_avg_sq", "update_norm", "seed"}
    assert set(dense) == {"step", "exp_avg", "exp_avg_sq"}
    assert low_rank["exp_avg"].shape == (12, 4) and low_rank["update_norm"].shape == ()
    assert optimizer.state[params[3]]["exp_avg"].shape == (12, 1)  # [4, 12]: columns are channels
    for state in optimizer.state.values():
        assert all(type(v) in (torch.Tensor, int) for v in state.values())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle_continue_bit_for_bit(backend, clone):
    params = model(backend, torch.bfloat16)
    optimizer = make(params, seed=7)
    train(params, optimizer, backend, range(3))
    copied = clone(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    assert equal_bits(params, copies)
    assert copied.defaults["seed"] == 7
    train(params, optimizer, backend, range(3, 8))
    train(copies, copied, backend, range(3, 8))
    assert equal_bits(params, copies)
    # what deepcopy drops must not be missed when the copy loads in turn
    copied.load_state_dict(optimizer.state_dict())
    assert copied.state[copies[0]]["exp_avg"].dtype == torch.float32


def test_two_optimizers_never_share_loaded_tensors(backend):
    params, twins = model(backend), model(backend)
    optimizer, other = make(params), make(twins)
    train(params, optimizer, backend, range(2))
    other.load_state_dict(optimizer.state_dict())
    before = optimizer.state[params[0]]["exp_avg"].clone()
    train(twins, other, backend, range(2, 4))
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], before)


def test_users_hooks_see_and_may_replace_the_state(backend):
    params = model(backend, torch.bfloat16)
    optimizer = make(params)
    train(params, optimizer, backend, range(2))
    saved = optimizer.state_dict()
    other, seen = make(model(backend, torch.bfloat16)), []

    def replace(_, state_dict):
        state = {k: dict(v) for k, v in state_dict["state"].items()}
        state[0]["update_norm"] = torch.tensor(0.125)
        return {**state_dict, "state": state}

    def look(loaded):
        state = loaded.state[loaded.param_groups[0]["params"][0]]
        seen.append((float(state["update_norm"]), state["exp_avg"].dtype))

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(saved)
    assert seen == [(0.125, torch.float32)]


@pytest.mark.parametrize("damage", ["kind", "projector"])
def test_a_state_of_another_kind_changes_nothing(backend, damage):
    """Of a dense parameter, or of the published package; test_all_or_nothing.py has the rest."""
    params = model(backend)
    optimizer = make(params)
    train(params, optimizer, backend, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    if damage == "kind":
        del saved["state"][1]["update_norm"]
    else:
        saved["state"][1]["projector"] = object()
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="load_apollo_torch" if damage == "projector" else None):
        optimizer.load_state_dict(saved)
    assert changed(before, snapshot(optimizer)) == set()


def test_a_changed_rank_is_named(backend):
    params = model(backend)
    optimizer = make(params)
    train(params, optimizer, backend, range(1))
    optimizer.param_groups[0]["rank"] = 5
    with pytest.raises(ValueError, match="rank 5"):
        train(params, optimizer, backend, range(1))


def test_torch_distributed_checkpoint_s_state_dict_functions_round_trip():
    from torch.distributed.checkpoint import state_dict as dcp

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 4))

    def steps(module, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            module(torch.randn(16, 8)).square().mean().backward()
            optimizer.step()

    first, second = net().bfloat16().float(), net()
    optimizer, fresh = (APOLLO(m.parameters(), lr=0.01, rank=4) for m in (first, second))
    steps(first, optimizer, 3)
    saved = dcp.get_optimizer_state_dict(first, optimizer)
    second.load_state_dict(first.state_dict())
    # on a fresh optimizer this makes state by a step with lr 0 and zero gradients
    dcp.set_optimizer_state_dict(second, fresh, saved)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(fresh.state[q][key]), torch.as_tensor(value)), key
    torch.manual_seed(1)
    steps(first, optimizer, 3)
    torch.manual_seed(1)
    steps(second, fresh, 3)
    assert equal_bits(first.parameters(), second.parameters())


def test_an_older_group_without_some_keys_still_loads(backend):
    params = model(backend)
    optimizer = make(params)
    train(params, optimizer, backend, range(1))
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["disable_nl"]
    other = make(model(backend))
    other.load_state_dict(saved)
    assert other.param_groups[0]["disable_nl"] is False
