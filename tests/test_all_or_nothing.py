"""A step, or a load, that raises has changed nothing, and its error names what does not fit."""

import copy
import io

import pytest
import torch
from helpers import all_of, changed, fill, parameter, parameters, randn, refuses, snapshot, train

from apollo_kernels import APOLLO, load_apollo_torch

SHAPES = [(12, 8), (8, 12), (5,)]
NAMES = ["up", "down", "bias"]


def groups(params, **options):
    """Two groups of named parameters: what is wrong in the second must not move the first."""
    named = list(zip(NAMES, params, strict=True))
    common = {"rank": 4, "update_proj_gap": 2, **options}
    return [{"params": named[:1], **common}, {"params": named[1:], **common}]


def trained(backend, steps=2, **options):
    params = parameters(SHAPES, backend)
    optimizer = APOLLO(groups(params), lr=0.1, **options)
    train(params, optimizer, backend, range(steps))
    fill(params, backend, steps)
    return params, optimizer


# ---- a step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("last", [1, 2])
def test_a_sparse_gradient_in_a_later_group_moves_nothing(backend, steps, last):
    params, optimizer = trained(backend, steps)
    params[last].grad = params[last].grad.to_sparse()
    name = NAMES[last]
    refuses(optimizer, optimizer.step, RuntimeError, f"sparse.*{name}|{name}.*sparse")
    assert steps or not any(optimizer.state.values())


def test_a_sharded_gradient_in_a_later_group_that_does_not_fit_moves_nothing(backend):
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if backend.device.type != "cpu":
        pytest.skip("one mesh of a CPU is enough")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

        mesh = DeviceMesh("cpu", torch.arange(2, device="cpu"))
        _, optimizer = trained(backend)
        whole = randn((6, 4), backend)
        sharded = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        turned = DeviceMesh("cpu", torch.tensor([1, 0], device="cpu"))
        sharded.grad = distribute_tensor(whole, turned, [Shard(0)])
        optimizer.add_param_group({"params": [("sharded", sharded)], "rank": 4})
        before = {i: value for i, value in snapshot(optimizer).items() if i[0] < 3}
        with pytest.raises(RuntimeError, match="gradient of.*'sharded'.*redistribute"):
            optimizer.step()
        after = {i: value for i, value in snapshot(optimizer).items() if i[0] < 3}
        assert changed(before, after) == set()
    finally:
        distributed.destroy_process_group()


def test_a_state_that_does_not_fit_in_a_later_group_moves_nothing(backend):
    _, optimizer = trained(backend)
    optimizer.param_groups[1]["rank"] = 5
    refuses(optimizer, optimizer.step, match="down.*does not fit|does not fit.*down")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step", "update_norm", "seed"])
def test_a_missing_piece_of_state_in_a_later_group_moves_nothing(backend, name):
    params, optimizer = trained(backend)
    del optimizer.state[params[1]][name]
    refuses(optimizer, optimizer.step, match="down")


@pytest.mark.parametrize("seed", [None, -1, 2**63, 1.5, "7", True])
def test_a_seed_that_is_no_key_moves_nothing(backend, seed):
    params, optimizer = trained(backend)
    optimizer.state[params[1]]["seed"] = seed
    refuses(optimizer, optimizer.step, match="down.*seed|seed.*down")


WRONG_VALUES = [
    ("lr", -1.0),
    ("lr", float("nan")),
    ("lr", "0.1"),
    ("betas", (0.9, 2.0)),
    ("betas", 0.9),
    ("eps", -1e-8),
    ("weight_decay", float("inf")),
    ("rank", 0),
    ("rank", 2.5),
    ("proj", "svd"),
    ("proj_type", "full"),
    ("scale_type", "row"),
    ("scale", 0.0),
    ("update_proj_gap", 0),
    ("update_proj_gap", 1.5),
    ("batch_dims", -1),
    ("batch_dims", 1.5),
]


@pytest.mark.parametrize("key, value", WRONG_VALUES, ids=str)
def test_a_group_value_set_by_hand_is_checked_where_it_is_read(backend, key, value):
    """In a warm run too, where nothing else has changed."""
    _, optimizer = trained(backend)
    optimizer.step()
    optimizer.param_groups[1][key] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"^{key}\b.* must be"):
        optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


def test_an_error_names_a_parameter_without_a_name_by_its_place(backend):
    params = parameters(SHAPES, backend)
    optimizer = APOLLO([{"params": params[:1]}, {"params": params[1:]}], rank=4)
    train(params, optimizer, backend, range(1))
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(3, device=backend.device)
    refuses(optimizer, optimizer.step, match=r"parameter 2 \(1 of group 1\).*shape \(5,\)")


# ---- a load ------------------------------------------------------------------------------------

# What is put into the state of "down", a low-rank parameter.
DAMAGES = {
    "exp_avg of another shape": {"exp_avg": torch.zeros(7, 7)},
    "exp_avg_sq of another shape": {"exp_avg_sq": torch.zeros(7, 7)},
    "exp_avg_sq that is too short": {"exp_avg_sq": torch.zeros(11, 4)},
    "exp_avg_sq with another order of sides": {"exp_avg_sq": torch.zeros(4, 12)},
    "exp_avg of integers": {"exp_avg": torch.zeros(12, 4, dtype=torch.int64)},
    "exp_avg_sq of complex numbers": {"exp_avg_sq": torch.zeros(12, 4, dtype=torch.complex64)},
    "exp_avg that is None": {"exp_avg": None},
    "exp_avg_sq that is a list": {"exp_avg_sq": [0.0]},
    "update_norm of another shape": {"update_norm": torch.zeros(3)},
    "update_norm that is None": {"update_norm": None},
    "step that is None": {"step": None},
    "step of another shape": {"step": torch.zeros(2)},
    "step that is negative": {"step": torch.tensor(-1.0)},
    "step that is NaN": {"step": torch.tensor(float("nan"))},
    "step that is no integer": {"step": torch.tensor(1.5)},
    "seed that is negative": {"seed": -1},
    "seed that is too large": {"seed": 2**63},
    "seed that is None": {"seed": None},
    "seed that is a float": {"seed": 1.0},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_state_dict_that_does_not_fit_is_refused_with_the_parameters_name(backend, damage):
    _, optimizer = trained(backend, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] += 1  # the first parameter's fits, and must not be taken either
    saved["state"][1].update(damage)
    (name,) = damage
    call = lambda: optimizer.load_state_dict(saved)  # noqa: E731
    refuses(optimizer, call, match=f"down.*{name}|{name}.*down")


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq", "update_norm", "seed"])
def test_a_state_dict_that_lacks_something_is_refused_with_the_parameters_name(backend, name):
    _, optimizer = trained(backend, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1][name]
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), match="down")


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_a_dense_state_that_does_not_fit_is_refused_with_the_parameters_name(backend, name):
    _, optimizer = trained(backend, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2][name] = torch.zeros(3)
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), match="bias")


@pytest.mark.parametrize("key, value", WRONG_VALUES, ids=str)
def test_a_state_dict_with_a_group_that_no_constructor_takes_is_refused(backend, key, value):
    _, optimizer = trained(backend, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1][key] = value
    saved["state"][0]["exp_avg"] += 1
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), match=rf"^{key}\b.* must be")


def test_steps_of_other_forms_are_taken(backend):
    """Integers, floats and the float32 tensors of earlier versions: all are int64 tensors here."""
    params, optimizer = trained(backend)
    for step in (2, 2.0, torch.tensor(2.0), torch.tensor(2), torch.tensor(2, dtype=torch.int32)):
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = step
        optimizer.load_state_dict(saved)
        for p in params:
            found = optimizer.state[p]["step"]
            assert found.dtype == torch.int64 and found.shape == () and found == 2
            assert found.device.type == backend.device.type


# ---- what is no error ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape, stride", [((0, 4), (1, 7)), ((4, 0), (3, 2)), ((0, 0), (5, 5))])
@pytest.mark.parametrize("rank", [4, None])
def test_an_empty_parameter_of_any_strides_takes_its_step(backend, shape, stride, rank):
    p = parameter((12, 8), backend)
    empty = torch.nn.Parameter(torch.empty_strided(shape, stride, device=backend.device))
    empty.grad = torch.empty_strided(shape, stride[::-1], device=backend.device)
    optimizer = APOLLO([empty, p], rank=rank, lr=0.1)
    before = p.detach().clone()
    fill([p], backend)
    optimizer.step()
    assert int(optimizer.state[empty]["step"]) == int(optimizer.state[p]["step"]) == 1
    assert not torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_grad_scale_and_found_inf_may_have_any_dtype(backend, dtype):
    results = []
    for dtypes in ((torch.float32, torch.float32), (dtype, dtype)):
        params, optimizer = trained(backend)
        scale, found = (torch.tensor(x, device=backend.device) for x in (8.0, 0.0))
        optimizer.grad_scale, optimizer.found_inf = scale.to(dtypes[0]), found.to(dtypes[1])
        optimizer.step()
        optimizer.found_inf = torch.tensor(1.0, device=backend.device).to(dtypes[1])
        optimizer.step()
        assert all(int(optimizer.state[p]["step"]) == 3 for p in params)
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


# ---- parameters and keys -------------------------------------------------------------------------


def test_a_parameter_that_is_listed_twice_in_a_group_is_refused(backend):
    """torch itself only warns of it, and then steps it twice."""
    p, q = parameters(SHAPES[:2], backend)
    with pytest.raises(ValueError, match="twice"):
        APOLLO([p, q, p], rank=4)
    with pytest.raises(ValueError, match="twice"):
        APOLLO([("p", p), ("q", p)], rank=4)
    optimizer = APOLLO([q], rank=4)
    with pytest.raises(ValueError, match="twice"):
        optimizer.add_param_group({"params": [p, p]})
    assert all_of(optimizer) == [q]


def test_a_parameter_that_is_listed_again_by_hand_is_refused(backend):
    params, optimizer = trained(backend)
    optimizer.param_groups[1]["params"].append(params[0])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="up.*twice|twice.*up"):
        optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


def test_no_two_parameters_share_a_key_when_groups_come_and_go(backend):
    a, b, c, d = parameters([(12, 8)] * 4, backend)
    optimizer = APOLLO([{"params": [a]}, {"params": [b]}], rank=4)
    train([a, b], optimizer, backend, range(1))
    optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": [c]})
    train([b, c], optimizer, backend, range(1, 2))
    optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": [d]})
    train([c, d], optimizer, backend, range(2, 3))
    keys = [optimizer.state[p]["seed"] for p in (a, b, c, d) if p in optimizer.state]
    assert len(keys) >= 3 and len(set(keys)) == len(keys)


# ---- the published package's state ---------------------------------------------------------------


def published(**changes):
    """A state_dict as apollo_torch writes it, of the matrix [12, 8] and a vector."""
    low = {"rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
    low |= {"update_proj_gap": 10, "lr": 0.02}
    matrix = {"step": 30, "seed": 1, "projector": object(), "scaled_grad": torch.tensor(0.25)}
    matrix |= {name: torch.ones(12, 4) for name in ("exp_avg", "exp_avg_sq")}
    vector = {"step": 30, **{name: torch.ones(5) for name in ("exp_avg", "exp_avg_sq")}}
    for key, value in changes.items():
        (low if key in low else matrix)[key] = value
    groups = [{"params": [0], **low}, {"params": [1], "lr": 0.02}]
    return {"state": {0: matrix, 1: vector}, "param_groups": groups}


def receiving(backend):
    matrix, vector = parameters([(12, 8), (5,)], backend)
    return APOLLO([{"params": [("up", matrix)], "rank": 4}, {"params": [("bias", vector)]}])


NAN = torch.full((12, 4), float("nan"))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"proj": "svd"}, "proj.* must be .*svd"),
        ({"update_proj_gap": 0}, "update_proj_gap.* must be"),
        ({"scale_type": "row"}, "scale_type.* must be"),
        ({"step": -1}, "step"),
        ({"step": float("nan")}, "step"),
        ({"exp_avg": NAN}, "exp_avg"),
        ({"exp_avg_sq": NAN}, "exp_avg_sq"),
        ({"exp_avg_sq": torch.full((12, 4), -1.0)}, "exp_avg_sq"),
        ({"exp_avg_sq": torch.ones(4, 12)}, "exp_avg_sq"),
        ({"exp_avg_sq": torch.ones(12, 5)}, "exp_avg_sq"),
        ({"exp_avg": None}, "exp_avg"),
        ({"scaled_grad": torch.tensor(float("nan"))}, "scaled_grad|update_norm"),
        ({"scaled_grad": torch.ones(3)}, "scaled_grad|update_norm"),
    ],
    ids=str,
)
def test_a_published_state_that_cannot_be_meant_is_refused(backend, change, match):
    optimizer = receiving(backend)
    refuses(optimizer, lambda: load_apollo_torch(optimizer, published(**change)), match=match)
    assert not optimizer.state


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, torch.zeros(3), None], ids=str)
def test_a_published_file_of_something_else_says_so(backend, content, tmp_path):
    optimizer = receiving(backend)
    path = tmp_path / "optimizer.pt"
    torch.save(content, path)
    with (
        pytest.warns(UserWarning, match="can run any code"),
        pytest.raises(ValueError, match="state_dict"),
    ):
        load_apollo_torch(optimizer, path, allow_unsafe_pickle=True)
    assert not optimizer.state
    with pytest.raises((TypeError, ValueError), match="state_dict"):
        load_apollo_torch(optimizer, [1, 2])


def test_a_published_state_may_come_as_an_open_file(backend):
    """Of plain tensors here, which need no trust; test_converter.py has one that does."""
    optimizer = receiving(backend)
    saved, file = published(), io.BytesIO()
    saved["state"].pop(0)
    torch.save(saved, file)
    file.seek(0)
    load_apollo_torch(optimizer, file)
    bias = all_of(optimizer)[1]
    assert int(optimizer.state[bias]["step"]) == 30
