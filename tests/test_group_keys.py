"""Keys and values of a group: misspelled, somebody else's, of NumPy, wrong, or wrong later."""

import copy
import io

import numpy as np
import pytest
import torch
from helpers import fill, parameter, refuses, train
from torch import nn

from apollo_kernels import APOLLO, APOLLOAdamW, apollo, apollo_mini, options, param_groups


def bare(*shape):
    return nn.Parameter(torch.zeros(shape or (16, 8)))


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, meant", [
    ("rnk", "rank"), ("Rank", "rank"), ("update_proj_gp", "update_proj_gap"),
    ("update-proj-gap", "update_proj_gap"), ("proj_gap", "update_proj_gap"),
    ("scale_typ", "scale_type"), ("beta", "betas"), ("wd", "weight_decay"),
    ("learning_rate", "lr"), ("weightdecay", "weight_decay"), ("batch_dim", "batch_dims"),
    ("maximise", "maximize"), ("dense_states", "dense_state"),
])  # fmt: skip
def test_a_misspelled_key_raises_and_says_what_was_meant(key, meant):
    for call in (
        lambda: APOLLO([{"params": [bare()], "rank": 4, key: 1}]),
        lambda: APOLLO([bare()], rank=4).add_param_group({"params": [bare()], key: 1}),
        lambda: param_groups(nn.Linear(8, 8), rank=4, **{key: 1}),
    ):
        with pytest.raises(ValueError, match=f"unknown key {key!r}.*did you mean {meant!r}"):
            call()


FOREIGN = {
    "lr_scale": 0.5, "lr_mult": 2.0, "wd_mult": 0.0, "is_expert_parallel": False, "name": "body",
    "initial_lr": 0.1, "max_lr": 1.0, "min_lr": 0.0, "swa_lr": 0.1, "max_momentum": 0.9,
    "base_momentum": 0.8, "decoupled_weight_decay": True, "amsgrad": False, "layer_id": 3,
    "default_config": None, "group_name": "g", "momentum": 0.9, "use_muon": False, "lr_decay": 0.1,
}  # fmt: skip


def test_keys_of_others_pass_and_survive_a_state_dict():
    """timm's, Megatron's, and those of torch's optimizers and schedulers."""
    p = bare()
    optimizer = APOLLO([{"params": [p], "rank": 4, **FOREIGN}])
    p.grad = torch.ones_like(p)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other = APOLLO([bare()], rank=4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for found in (optimizer, other, copy.deepcopy(other)):
        assert {k: found.param_groups[0][k] for k in FOREIGN} == FOREIGN
    assert param_groups(nn.Linear(8, 8), rank=4, lr_scale=2.0)[0]["lr_scale"] == 2.0


def test_all_arguments_are_known_as_a_group_s_or_the_optimizer_s():
    known = set(APOLLO([bare()], rank=4).defaults)
    assert known == options.GROUP_KEYS | set(options.OPTIMIZER_KEYS)
    for key in (*FOREIGN, *known):
        options.check_names([key] if key not in options.OPTIMIZER_KEYS else [])


@pytest.mark.parametrize("key", ["seed", "backend", "fused", "max_grad_norm", "gradient_release"])
def test_arguments_of_the_whole_optimizer_are_no_keys(key):
    with pytest.raises(ValueError, match=f"unknown key '{key}' in parameter group 0.*argument of"):
        APOLLO([{"params": [bare()], "rank": 4, key: 1}])
    with pytest.raises(ValueError, match=f"unknown key '{key}': it is an argument of the optim"):
        apollo(nn.Linear(8, 8), **{key: 1})


def test_groups_of_an_optimizer_make_another_one_also_after_an_old_state():
    """Groups have had a key `fused`, which nobody read."""
    p = bare()
    optimizer = APOLLO([p], rank=4, fused=True)
    older = optimizer.state_dict()
    older["param_groups"][0]["fused"] = True
    optimizer.load_state_dict(older)
    again = APOLLO(optimizer.param_groups, foreach=False)
    assert "fused" not in again.param_groups[0] and again.param_groups[0]["rank"] == 4
    assert optimizer._step_supports_amp_scaling and not again._step_supports_amp_scaling
    with pytest.raises(ValueError, match="fused must be False or None together with foreach=True"):
        APOLLO([{"params": [p], "foreach": True}], rank=4, fused=True)


# ---- numbers of NumPy --------------------------------------------------------------------------


def test_scalars_of_numpy_are_numbers_and_end_as_python_s(backend):
    """So that torch.load(weights_only=True) reads the checkpoint; the steps are those of Python's
    numbers bit for bit."""
    plain = {
        "lr": 0.0625, "betas": (0.75, 0.5), "eps": 0.125, "weight_decay": 0.5, "rank": 4,
        "scale": 2.0, "update_proj_gap": 2, "batch_dims": 0, "correct_bias": False,
    }  # fmt: skip
    kinds = {float: np.float32, int: np.int64, bool: np.bool_}
    given = {k: kinds[type(v)](v) for k, v in plain.items() if k != "betas"}
    given["betas"] = (np.float64(0.75), np.float32(0.5))
    for group, whole in ((given, {}), ({}, given)):
        p, q = parameter((16, 8), backend), parameter((16, 8), backend)
        optimizer = APOLLO(
            [{"params": [p], **group}], seed=np.int64(3), max_grad_norm=np.float32(2), **whole
        )
        twin = APOLLO([q], seed=3, max_grad_norm=2.0, **plain)
        for steps in (range(2), range(2, 3)):
            train([p], optimizer, backend, steps)
            train([q], twin, backend, steps)
            assert torch.equal(p, q)
            own = optimizer.param_groups[0]
            assert {k: type(own[k]) for k in plain} == {k: type(v) for k, v in plain.items()}
            assert {k: own[k] for k in plain} == plain and type(own["betas"][0]) is float
            assert type(optimizer.defaults["max_grad_norm"]) is float
            own.update(lr=np.float32(0.25), eps=np.float64(0.25))  # a scheduler, say
            twin.param_groups[0].update(lr=0.25, eps=0.25)
            plain = {**plain, "lr": 0.25, "eps": 0.25}
        own["weight_decay"] = np.float32(0.25)  # after the last step
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        assert type(saved["param_groups"][0]["weight_decay"]) is float
        plain = {**plain, "lr": 0.0625, "eps": 0.125}


def test_the_makers_take_a_rank_of_numpy():
    groups = apollo(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), rank=np.int64(4))
    assert APOLLO(groups).param_groups[0]["rank"] == 4


# ---- wrong values ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [APOLLO, APOLLOAdamW])
@pytest.mark.parametrize("betas", [0.9, None, (0.9,), "ab", torch.tensor([0.9, 0.99]), (0.9, 1.0)])
def test_betas_that_are_no_two_numbers_are_named(kind, betas):
    with pytest.raises(ValueError, match="betas must be two numbers"):
        kind([bare()], rank=4, betas=betas)
    with pytest.raises(ValueError, match="betas must be two numbers"):
        kind([{"params": [bare()], "betas": betas}], rank=4)


@pytest.mark.parametrize("lr", [
    torch.tensor(-1.0), torch.tensor(float("nan")), torch.tensor(float("inf")),
    torch.tensor([0.1, 0.2]), torch.tensor(1), torch.tensor(True), torch.tensor(1j),
    torch.tensor([0.1]).to_sparse(), torch.empty((), device="meta"), None, "0.1", -1.0, True,
], ids=str)  # fmt: skip
def test_a_learning_rate_that_is_none_is_named(lr):
    with pytest.raises(ValueError, match="lr must be a"):
        APOLLO([bare()], rank=4, lr=lr)
    p = bare()
    p.grad = torch.ones_like(p)
    optimizer = APOLLO([p], rank=4)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lr
    refuses(optimizer, optimizer.step, match="(?s)lr must be a .*group 0")


def test_a_tensor_that_turns_negative_is_seen():
    p, lr = bare(), torch.tensor(0.1)
    p.grad = torch.ones_like(p)
    optimizer = APOLLO([p], rank=4, lr=lr)
    optimizer.step()
    lr.fill_(-1)
    refuses(optimizer, optimizer.step, match="lr must be a tensor of one number >= 0.*group 0")


LATER = {
    "scale_type": "chanel", "update_proj_gap": 0, "proj": "svd", "proj_type": "down", "rank": 0,
    "betas": 0.9, "eps": -1.0, "weight_decay": torch.tensor([0.1, 0.2]), "scale": 0,
    "batch_dims": -1, "dense_state": "int4", "correct_bias": "yes", "differentiable": True,
    "disable_nl": None, "maximize": 0.5, "exact_projection": "no",
}  # fmt: skip


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("key", LATER)
def test_a_value_that_is_wrong_later_is_refused_before_any_write(backend, key, release):
    if backend.interpreted and release:
        pytest.skip("the same checks, seconds each")
    params = [parameter((16, 8), backend), parameter((8, 16), backend)]
    optimizer = APOLLO([{"params": [p]} for p in params], rank=4, gradient_release=release)
    train(params, optimizer, backend, range(1))
    fill(params, backend, 1)
    optimizer.param_groups[1][key] = LATER[key]
    refuses(optimizer, optimizer.step, match=f"{key} must be .*group 1")
    with pytest.raises(ValueError, match=f"{key} must be .*group 1"):
        optimizer.memory_report()


@pytest.mark.parametrize("key", ["scale_type", "update_proj_gap", "batch_dims"])
def test_a_compiled_step_refuses_it_too(backend, key):
    p = parameter((16, 8), backend)
    optimizer = APOLLO([p], rank=4)
    train([p], optimizer, backend, range(1))
    fill([p], backend, 1)
    optimizer.param_groups[0][key] = LATER[key]
    torch._dynamo.reset()
    refuses(optimizer, torch.compile(optimizer.step, backend="eager"), match=f"{key} must be")


# ---- what the makers are given -----------------------------------------------------------------


@pytest.mark.parametrize("make", [
    apollo, apollo_mini, lambda m: apollo(m, rank=4), lambda m: param_groups(m, rank=4),
])  # fmt: skip
@pytest.mark.parametrize("given", [
    lambda m: m.parameters(), lambda m: list(m.named_parameters()), lambda m: m.state_dict(),
])  # fmt: skip
def test_parameters_in_place_of_a_model_are_named(make, given):
    with pytest.raises(ValueError, match="model must be a torch.nn.Module, got (gen|list|Ordered)"):
        make(given(nn.Linear(8, 8)))


def test_a_model_in_place_of_parameters_is_named():
    with pytest.raises(ValueError, match=r"got the module Linear: take apollo_kernels.apollo"):
        APOLLO(nn.Linear(8, 8), rank=4)


@pytest.mark.parametrize("make", [apollo, apollo_mini])
def test_a_bad_regular_expression_is_named(make):
    with pytest.raises(ValueError, match=r"targets='\(' is no regular expression: missing \)"):
        make(nn.Linear(8, 8), targets="(")


@pytest.mark.parametrize("targets", [None, 5, [5], ["a", None]])
def test_targets_that_are_no_strings_are_named(targets):
    with pytest.raises(ValueError, match="targets must be a string or a list of strings"):
        apollo_mini(nn.Linear(8, 8), targets=targets)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", True, None])
def test_a_rank_that_is_none_is_named_where_groups_are_made(rank):
    with pytest.raises(ValueError, match="rank must be an integer >= 1"):
        param_groups(nn.Linear(8, 8), rank=rank)


@pytest.mark.parametrize("targets", ["all-linear", "all_linear"])
def test_all_linear_means_linear_layers_without_the_head(targets):
    net = nn.Module()
    net.embed, net.body, net.head = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    net.gate = nn.Linear(8, 1)  # a vector
    for embeddings in (False, True):
        options = {"rank": 2, "embeddings": embeddings}
        expected = param_groups(net, **options)
        found = param_groups(net, targets=targets, **options)
        assert [g["param_names"] for g in found] == [g["param_names"] for g in expected]
        low = {"body.weight", "embed.weight", "head.weight"} if embeddings else {"body.weight"}
        assert set(found[0]["param_names"]) == low
