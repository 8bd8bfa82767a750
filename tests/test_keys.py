"""A parameter's key follows from its name: no order, no process and no wrapper changes it."""

import copy
import io
import pickle
import warnings

import golden
import pytest
import torch
from helpers import all_of, changed, fill, randn, same, snapshot, train
from restatement import key_of, key_of_matrix, key_of_name
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

from apollo_kernels import APOLLO, apollo, apollo_mini, keys, names, param_groups, quantize_


def net(backend=None, dtype=torch.float32):
    """Two layers of one shape, so that a shared key would be a shared projection, and a tail."""
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    for i, p in enumerate(model.parameters()):
        p.data = randn(p.shape, backend, dtype, seed=i) if backend else p.data
    return model


def bare(shape=(6, 4)):
    return nn.Parameter(torch.ones(shape))


def keys_of(optimizer):
    """The key that each parameter has or will have, in the order of the groups."""
    return [optimizer.key_of(p) for p in all_of(optimizer)]


def step(optimizer):
    for i, p in enumerate(all_of(optimizer)):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p.dtype)
    optimizer.step()


# ---- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "name"), golden.NAMED_KEYS)
def test_a_key_is_a_function_of_seed_and_name(seed, name):
    p = bare()
    optimizer = APOLLO([("other", bare()), (name, p)], rank=2, seed=seed)
    expected = golden.NAMED_KEYS[seed, name]
    assert optimizer.key_of(p) == key_of_name(seed, name) == expected
    step(optimizer)
    assert optimizer.state[p]["seed"] == expected


def test_without_a_name_it_is_the_position(backend):
    params = [nn.Parameter(randn((6, 4), backend)) for _ in range(3)]
    optimizer = APOLLO(params, rank=2, seed=3)
    fill(params, backend)
    optimizer.step()
    assert [optimizer.state[p]["seed"] for p in params] == [key_of(3, i) for i in range(3)]


@pytest.mark.parametrize(
    "name",
    [
        "module.a.weight",
        "_orig_mod.a.weight",
        "a._fsdp_wrapped_module.weight",
        "a._checkpoint_wrapped_module.weight",
        "module._orig_mod.a._fsdp_wrapped_module._checkpoint_wrapped_module.module.weight",
    ],
)
def test_what_wrappers_put_into_a_name_does_not_count(name):
    assert keys_of(APOLLO([(name, bare())], rank=2)) == [key_of_name(0, "a.weight")]


@pytest.mark.parametrize(
    "name", ["module", "a.module", "modules.0.w", "a.submodule.w", "_orig_mod"]
)
def test_what_only_looks_like_a_wrapper_counts(name):
    assert keys_of(APOLLO([(name, bare())], rank=2)) == [key_of_name(0, name)]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: torch.compile(m, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        lambda m: nn.Sequential(*map(checkpoint_wrapper.checkpoint_wrapper, m)),
        nn.DataParallel,
    ],
)
def test_a_wrapped_model_has_the_keys_of_the_bare_one(wrap):
    model = net()
    wrapped = wrap(model)
    assert "0.weight" not in dict(wrapped.named_parameters())
    assert keys_of(APOLLO(apollo(wrapped, rank=2))) == keys_of(APOLLO(apollo(model, rank=2)))


@pytest.mark.parametrize("maker", [apollo, apollo_mini])
def test_the_groups_of_a_model_bring_its_names(maker):
    model = net()
    groups = maker(model)
    called = {p: name for name, p in model.named_parameters()}
    assert [g["param_names"] for g in groups] == [[called[p] for p in g["params"]] for g in groups]
    optimizer = APOLLO(groups)
    assert keys_of(optimizer) == [key_of_name(0, called[p]) for p in all_of(optimizer)]


def test_expert_matrices_take_theirs_from_the_name(backend):
    p = nn.Parameter(randn((3, 6, 4), backend))
    optimizer = APOLLO([("experts", p)], rank=2, batch_dims=1)
    twins = [nn.Parameter(p[e].detach().clone()) for e in range(3)]
    key = key_of_name(0, "experts")
    apart = APOLLO(twins, rank=2)
    apart.load_state_dict({**apart.state_dict(), "state": {e: expert(key, e) for e in range(3)}})
    fill([p], backend)
    for e, q in enumerate(twins):
        q.grad = p.grad[e].clone()
    optimizer.step()
    apart.step()
    assert optimizer.state[p]["seed"] == key
    assert all(torch.equal(p[e], q) for e, q in enumerate(twins))


def expert(key, e):
    """The state of matrix ``e`` [6, 4] before its first step."""
    state = {name: torch.zeros(6, 2) for name in ("exp_avg", "exp_avg_sq")}
    state.update(step=torch.tensor(0), update_norm=torch.zeros(()), seed=key_of_matrix(key, e))
    return state


# ---- no order and no company changes it ----------------------------------------------------------

KINDS = ["projection", "stochastic rounding", "int8 weights", "int8 moments"]


def model_of(kind, backend):
    dtype = torch.float32 if kind in ("projection", "int8 moments") else torch.bfloat16
    model = net(backend, dtype)
    if kind == "int8 weights":
        quantize_(model)
    options = {"stochastic_rounding": kind == "stochastic rounding"}
    options["dense_state"] = "int8" if kind == "int8 moments" else "float32"
    return model, options


def trained(model, optimizers, backend, steps=3):
    """Weights and keys by name, after steps with gradients that follow from the name."""
    for i in range(steps):
        for j, p in enumerate(model.parameters()):
            p.grad = 0.1 * randn(p.shape, backend, p.dtype, seed=100 * i + j)
        for optimizer in optimizers:
            optimizer.step()
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    found = {n: states[p].get("seed") for n, p in model.named_parameters()}
    return found, {n: torch.as_tensor(1.0 * p.detach()) for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["reversed", "layer by layer"])
def test_bits_depend_neither_on_the_order_nor_on_the_company(backend, how, kind):
    model, options = model_of(kind, backend)
    whole = APOLLO(apollo(model, rank=2, **options), lr=1e-2, update_proj_gap=2)
    expected = trained(model, [whole], backend)
    other, options = model_of(kind, backend)
    groups = apollo(other, rank=2, **options)
    if how == "reversed":
        for group in groups:
            group["params"].reverse()
            group["param_names"].reverse()
        optimizers = [APOLLO(groups[::-1], lr=1e-2, update_proj_gap=2)]
    else:
        optimizers = []
        for group in groups:
            for p, name in zip(group["params"], group["param_names"], strict=True):
                one = {**group, "params": [p], "param_names": [name]}
                optimizers.append(APOLLO([one], lr=1e-2, update_proj_gap=2))
    found = trained(other, optimizers, backend)
    assert found[0] == expected[0]
    assert found[0]["0.weight"] != found[0]["2.weight"]
    assert all(same(found[1][name], expected[1][name]) for name in expected[1])


def test_a_group_that_was_removed_and_added_again_keeps_its_keys():
    model = net()
    optimizer = APOLLO(apollo(model, rank=2, targets=["0.weight"]))
    low_rank = optimizer.param_groups.pop(0)
    optimizer.add_param_group({"params": [("late", bare((8, 12)))], "rank": 2})
    step(optimizer)
    optimizer.add_param_group(low_rank)
    step(optimizer)
    found = {name: optimizer.key_of(p) for name, p in model.named_parameters() if p.dim() > 1}
    assert found == {name: key_of_name(0, name) for name in found}
    given = [state["seed"] for state in optimizer.state.values() if "seed" in state]
    assert len(given) == len(set(given)) == 2


def test_equal_names_in_one_optimizer_share_no_key():
    """Two models; and a name that is another one's but for a wrapper."""
    one, other = net(), net()
    pairs = [*one.named_parameters(), *other.named_parameters(), ("module.0.weight", bare((8, 12)))]
    optimizer = APOLLO(pairs, rank=2)
    step(optimizer)
    found = [state["seed"] for state in optimizer.state.values() if "seed" in state]
    assert len(found) == len(set(found)) == 7


# ---- checkpoints and copies ----------------------------------------------------------------------


def test_an_older_checkpoint_keeps_its_keys(backend):
    """Saved by position and loaded under names: the run goes on bit for bit."""
    model = net(backend)
    params = list(model.parameters())
    unnamed = APOLLO(params, rank=2, update_proj_gap=2)
    train(params[1:], unnamed, backend, range(3))  # the first one is frozen, say
    params[0].grad = None
    saved = copy.deepcopy(unnamed.state_dict())
    twin = copy.deepcopy(model)
    named = APOLLO(twin.named_parameters(), rank=2, update_proj_gap=2)
    named.load_state_dict(saved)
    train(params[1:], unnamed, backend, range(3, 6))
    train(list(twin.parameters())[1:], named, backend, range(3, 6))
    assert changed(snapshot(unnamed), snapshot(named)) == set()
    assert named.state[twin[1].weight]["seed"] == key_of(0, 2)
    assert named.key_of(twin[0].weight) == key_of_name(0, "0.weight")


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_names_survive_a_copy(how):
    model = net()
    optimizer = APOLLO(apollo(model, rank=2))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        copied = APOLLO(apollo(copy.deepcopy(model), rank=2))
        copied.load_state_dict(torch.load(file, weights_only=True))
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(optimizer))
    else:
        copied = copy.deepcopy(optimizer)
    step(copied)
    low_rank = copied.param_groups[0]["params"]
    wanted = [key_of_name(0, f"{i}.weight") for i in range(3)]
    assert [copied.state[p]["seed"] for p in low_rank] == wanted


@pytest.mark.parametrize("copied", [False, True])
def test_a_compiled_first_step_gives_the_same_keys(backend, copied):
    """Nothing is hashed in a trace, not even where another process has made the optimizer."""
    model = net(backend)
    optimizer = APOLLO(apollo(model, rank=2))
    if copied:
        names._numbers.clear()
        model, optimizer = copy.deepcopy((model, optimizer))
    fill(list(model.parameters()), backend)
    torch._dynamo.reset()
    torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    found = [optimizer.state[p]["seed"] for p in optimizer.param_groups[0]["params"]]
    assert found == [key_of_name(0, f"{i}.weight") for i in range(3)]


# ---- groups with names, without, and with too many -----------------------------------------------


def test_a_group_without_names_joins_one_that_has_them():
    """It takes those of the model that was named, or else positions."""
    model = net()
    head, stranger = model[2].weight, bare((8, 12))
    optimizer = APOLLO(param_groups(model, rank=2, targets=["0.weight"])[:1])
    optimizer.add_param_group({"params": [head], "rank": 2})
    optimizer.add_param_group({"params": stranger, "rank": 2})
    step(optimizer)
    found = [optimizer.state[p]["seed"] for p in (model[0].weight, head, stranger)]
    assert found == [key_of_name(0, "0.weight"), key_of_name(0, "2.weight"), key_of(0, 2)]


def test_a_group_with_names_joins_one_that_has_none():
    p, q = bare(), bare()
    optimizer = APOLLO([p], rank=2)
    optimizer.add_param_group({"params": [("q", q)]})
    assert keys_of(optimizer) == [key_of(0, 0), key_of_name(0, "q")]
    assert "parameter 'q' (0 of group 1)" in optimizer._name_of(1, 0)
    assert optimizer._name_of(0, 0) == "parameter 0 (0 of group 0)"


def test_a_parameter_that_was_appended_by_hand_goes_by_position():
    p, q, r = bare(), bare(), bare()
    optimizer = APOLLO([("p", p), ("q", q)], rank=2)
    optimizer.param_groups[0]["params"].append(r)
    assert keys_of(optimizer) == [key_of_name(0, "p"), key_of_name(0, "q"), key_of(0, 2)]


@pytest.mark.parametrize("given", [["one"], "ab", ["one", 2], ["one", "two", "three"]])
def test_names_that_do_not_tell_parameters_apart_are_refused(given):
    optimizer = APOLLO([("p", bare())], rank=2)
    with pytest.raises(ValueError, match="param_names .*2 (strings|parameters).*group 1"):
        optimizer.add_param_group({"params": [bare(), bare()], "param_names": given})
    assert len(optimizer.param_groups) == 1


def cut(groups, rank, world=2):
    """The groups as ZeroRedundancyOptimizer hands them to a process: names are left as they are."""
    return [{**g, "params": g["params"][rank::world]} for g in groups]


def test_a_group_that_was_cut_takes_its_names_from_the_model():
    model = net()
    groups = apollo(model, rank=2)
    called = {p: name for name, p in model.named_parameters()}
    for rank in range(2):
        optimizer = APOLLO(cut(groups, rank))
        step(optimizer)
        for place, p in enumerate(optimizer.param_groups[0]["params"]):
            assert optimizer.state[p]["seed"] == key_of_name(0, called[p])
            assert f"parameter '{called[p]}'" in optimizer._name_of(0, place)


def test_a_group_that_was_cut_without_a_model_is_refused():
    pairs = {"params": [bare(), bare()], "param_names": ["a", "b"], "rank": 2}
    with pytest.raises(ValueError, match="2 names for 1 parameters.*ZeroRedundancyOptimizer"):
        APOLLO(cut([pairs], 1))


def test_a_model_is_not_kept_alive():
    model = net()
    groups = apollo(model, rank=2)
    assert names._models[-1]() is model
    del model, groups
    assert names._models[-1]() is None


# ---- sharing is told -----------------------------------------------------------------------------


@pytest.fixture
def afresh(monkeypatch):
    """As in a process that has not warned yet, and knows no optimizer."""
    monkeypatch.setattr(keys, "told", False)
    keys._claims.clear()


def step_quietly(optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer)


def test_two_optimizers_that_share_a_key_are_told_once(afresh):
    optimizers = [APOLLO([bare((24, 12))], rank=2) for _ in range(4)]
    step_quietly(optimizers[0])
    with pytest.warns(UserWarning, match=r"shape \(24, 12\) with one key") as caught:
        list(map(step, optimizers))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_short_names_of_layers_are_told(afresh):
    layers = [nn.Linear(12, 24) for _ in range(2)]
    optimizers = [APOLLO(layer.named_parameters(), rank=2) for layer in layers]
    step_quietly(optimizers[0])
    with pytest.warns(UserWarning, match="parameter 'weight' .*model.named_parameters"):
        step(optimizers[1])


@pytest.mark.parametrize("how", ["names", "another shape", "another seed", "one that has gone"])
def test_nothing_is_told_where_nothing_is_shared(afresh, how):
    first = APOLLO([("a", bare((24, 12)))] if how == "names" else [bare((24, 12))], rank=2)
    step_quietly(first)
    if how == "one that has gone":
        first.cycle = first
        del first
    other = bare((24, 13) if how == "another shape" else (24, 12))
    second = [("b", other)] if how == "names" else [other]
    step_quietly(APOLLO(second, rank=2, seed=1 if how == "another seed" else 0))
