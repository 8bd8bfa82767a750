"""int8 weights and torch.distributed: checkpoints of it, and weights that fully_shard has cut."""

import copy
import functools
import math

import pytest
import sharded
import torch
from torch import distributed, nn

import apollo_kernels
from apollo_kernels import APOLLO, Int8Weight, dequantize_, quantize_

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
# A layer of two dimensions returns a view of its product, as any nn.Linear of three does.
pytestmark = [pytestmark, pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")]


INT8 = ["0", "1", "3", "5"]


def plain_net(seed=0):
    """Matrices of both orientations; on two ranks all are uneven, and one leaves a rank nothing."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(13, 20), nn.Linear(20, 151), nn.GELU(), nn.Linear(151, 21)]
    return nn.Sequential(*layers, nn.LayerNorm(21), nn.Linear(21, 1, bias=False))


def net(seed=0):
    model = plain_net(seed)
    quantize_(model, targets=INT8)
    return model


def optimizer_of(model, **options):
    low = [(n, p) for n, p in model.named_parameters() if n.endswith(("1.weight", "3.weight"))]
    taken = [n for n, _ in low]
    rest = [(n, p) for n, p in model.named_parameters() if n not in taken]
    # No sums over ranks, which may be another last bit: no rank has a part of the columns, which
    # are contracted, and no norm limits updates.
    low = {"params": low, "rank": 4, "update_proj_gap": 2, "proj_type": "right"}
    low["disable_nl"] = True
    return APOLLO([low, {"params": rest}], lr=0.05, weight_decay=0.1, **options)


def fit(model, optimizer, steps):
    """All ranks have the same batch, so that means over two or four are its gradient to the bit."""
    losses = []
    for step in steps:
        ids = torch.randint(13, (3, 5), generator=torch.Generator().manual_seed(step))
        loss = (model(ids).float() - 0.1 * ids.unsqueeze(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def contents(model, optimizer):
    """All there is to save, in copies, of whole tensors, by names that DDP does not change."""
    found = dict(model.state_dict())
    for name, p in model.named_parameters():
        found.update({(name, key): value for key, value in optimizer.state[p].items()})
    return {
        str(key).replace("module.", ""): (
            sharded.full(value) if torch.is_tensor(value) else copy.deepcopy(value)
        )
        for key, value in found.items()
    }


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert same, key


def alone(steps, **options):
    model = net()
    optimizer = optimizer_of(model, **options)
    return fit(model, optimizer, steps), contents(model, optimizer)


# ---- under fully_shard ---------------------------------------------------------------------------


def cut(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = sharded.mesh_of(mesh)
    for layer in (model[1], model[3]):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def trained(mesh, steps, release=False, reshard=True, **options):
    model = cut(net(), mesh, reshard_after_forward=reshard)
    optimizer = optimizer_of(model, **options)
    if release:
        optimizer.attach(model)
    losses = fit(model, optimizer, steps)
    kinds = {type(p.to_local()) for n, p in model.named_parameters() if n[0] in INT8 and "w" in n}
    assert kinds == {Int8Weight} and all(p.grad is None for p in model.parameters())
    return losses, contents(model, optimizer)


@pytest.mark.parametrize("mesh", [(1,), (2,), (2, 2)], ids=str)
@pytest.mark.parametrize("reshard", [True, False])
def test_a_model_under_fully_shard_has_the_codes_of_one_process(group, mesh, reshard):
    """And moments, losses and all else, to the bit: random bits go by places in the whole."""
    losses, expected = alone(range(5))
    grids = [key for key in expected if key.endswith("grid")]
    assert all((expected[key] != net().state_dict()[key]).any() for key in grids)  # they change
    world = 4 if len(mesh) == 2 else mesh[0]
    for found_losses, found in group.run(world, trained, mesh, range(5), False, reshard):
        assert found_losses == losses
        equal(found, expected)


def test_three_ranks_draw_as_one(group):
    """A mean over three is another last bit of a gradient, and moves few codes."""
    _, expected = alone(range(3))
    for _, found in group.run(3, trained, (3,), range(3)):
        for key in (key for key in expected if key.endswith("codes")):
            assert (found[key] != expected[key]).float().mean() < 5e-3, key


@pytest.mark.parametrize("options", [
    {"max_grad_norm": 0.1}, {"dense_state": "bfloat16"},
], ids=str)  # fmt: skip
def test_options_go_with_shards(group, options):
    losses, expected = alone(range(3), **options)
    call = functools.partial(trained, **options)
    for found_losses, found in group.run(2, call, (2,), range(3)):
        assert found_losses == pytest.approx(losses, rel=1e-5)
        for key in (key for key in expected if key.endswith("codes")):
            assert (found[key] != expected[key]).float().mean() < 5e-3, key


def test_gradient_release_gives_the_same_bits(group):
    _, expected = alone(range(4))
    for _, found in group.run(2, trained, (2,), range(4), True):
        equal(found, expected)


def narrowed(steps):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, seen = cut(net(), (2,), mp_policy=policy), []
    model[1].register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    model[1].register_forward_hook(lambda module, _, out: seen.append(out.dtype))
    optimizer = optimizer_of(model)
    losses = fit(model, optimizer, steps)
    return losses, set(seen), {p.dtype for p in model.parameters()}


def test_a_mixed_precision_policy_decides_what_layers_see(group):
    """Codes are the same in each dtype; the shards, and their gradients, keep theirs."""
    losses, _ = alone(range(6))
    for found, seen, dtypes in group.run(2, narrowed, range(6)):
        assert seen == {torch.bfloat16}
        assert dtypes == {torch.float32}
        assert found == pytest.approx(losses, rel=0.1) and found != losses


def gathered(mesh):
    """Bytes of all-gathers in a forward pass, and what the report says of weights and traffic."""
    model = cut(net(), mesh)
    report = optimizer_of(model).memory_report()
    with torch.no_grad(), sharded.Counted() as counted:
        model(torch.zeros(1, 2, dtype=torch.int64))
    return counted.bytes["all_gather"], report.weight_bytes, report.shard_traffic


def test_a_byte_per_weight_travels(group):
    sizes = [(13, 20, 1), (151, 20, 1), (21, 151, 2), (1, 21, 1)]  # the last: groups in a row
    rest = [(151, 4), (21, 4), (21, 4), (21, 4)]  # in float32
    rows = [*((m, n + 4 * groups) for m, n, groups in sizes), *rest]
    padded = sum(2 * -(-m // 2) * size for m, size in rows)
    held = [sum(-(-m // 2) * size for m, size in rows), sum(m // 2 * size for m, size in rows)]
    whole = sum(m * size for m, size in rows)
    weights = sum(m * n for m, n, _ in sizes) + sum(m for m, _ in rest)
    for (found, weight_bytes, traffic), own in zip(group.run(2, gathered, (2,)), held, strict=True):
        assert found == padded and weight_bytes == own
        assert traffic == 2 * whole + 4 * weights


# ---- the step of a shard -------------------------------------------------------------------------

SHAPES = [(40, 256), (6, 300), (1, 128)]  # of whole groups, or not


def stepped(mesh, group, shapes, steps):
    """Codes and grids of weights after steps with gradients that are given, without a model."""
    from torch.distributed.fsdp import fully_shard

    params = []
    for i, (m, n) in enumerate(shapes):
        layer = nn.Linear(n, m, bias=False)
        with torch.no_grad():
            layer.weight.copy_(sharded.numbers((m, n), i, torch.float32))
        quantize_(layer, targets="all")
        if mesh is not None:
            mesh = sharded.mesh_of(mesh) if isinstance(mesh, tuple) else mesh
            fully_shard(layer, mesh=mesh)
        params.append(layer)
    named = [(f"p{i}", layer.weight) for i, layer in enumerate(params)]
    optimizer = APOLLO([{"params": named, **group}], lr=0.01, weight_decay=0.1)
    for step in range(steps):
        for i, (_, p) in enumerate(named):
            whole = sharded.numbers(p.shape, 1000 * step + i, torch.float32)
            p.grad = whole if mesh is None else sharded.placed(whole, mesh, "0")
        optimizer.step()
    took = {
        (type(work.batch).__module__.split(".")[1])
        for unit in optimizer._runtime.units
        for work in unit.plan.works
    }
    return [(key, sharded.full(t)) for p in params for key, t in p.state_dict().items()], took


GROUPS = [
    {"rank": None},
    {"rank": 4},
    {"rank": 1, "scale_type": "tensor", "scale": 128.0, "proj_type": "reverse_std"},
]


@pytest.mark.parametrize("own", GROUPS, ids=str)
def test_shards_step_as_one_process(group, backend, own):
    """AdamW gives the same codes. Beside APOLLO's projections stand sums over ranks: another last
    bit of a scale factor moves a code in some thousands over the edge, and others' random bits
    would move a third of them."""
    if backend.device.type != "cpu":
        pytest.skip("the ranks are on the CPU")
    place, arguments = backend.name, (own, SHAPES, 2)
    expected, _ = sharded.on(place, stepped, None, *arguments)
    for found, took in group.run(3, sharded.on, place, stepped, (3,), *arguments):
        assert took == TAKERS[backend.name] | ({"reference"} if own["rank"] is None else set())
        for (key, value), (_, wanted) in zip(found, expected, strict=True):
            wrong = (value != wanted).float().mean()
            assert wrong <= (0 if own["rank"] is None else 2e-3), key


# Rows of 300 are no whole groups, which kernels take under APOLLO and PyTorch under AdamW.
TAKERS = {"torch": {"reference"}, "cuda": {"cuda"}, "triton": {"triton_kernels"}}


# ---- checkpoints ---------------------------------------------------------------------------------


def whole(model, optimizer):
    from torch.distributed.checkpoint import state_dict as of

    return {
        "model": of.get_model_state_dict(model),
        "optimizer": of.get_optimizer_state_dict(model, optimizer),
    }


def saved(folder, wrap):
    """Of a model that has trained; and then some steps further."""
    from torch.distributed import checkpoint

    model = wrap(net())
    optimizer = optimizer_of(model)
    fit(model, optimizer, range(3))
    checkpoint.save(whole(model, optimizer), checkpoint_id=folder)
    then = contents(model, optimizer)
    fit(model, optimizer, range(3, 5))
    return then, contents(model, optimizer)


def loaded(folder, wrap):
    """Into another model, by the functions of torch that set each state."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as of

    model = wrap(net(seed=1))
    optimizer = optimizer_of(model)
    state = whole(model, optimizer)
    checkpoint.load(state, checkpoint_id=folder)
    of.set_model_state_dict(getattr(model, "module", model), state["model"])
    of.set_optimizer_state_dict(model, optimizer, state["optimizer"])
    then = contents(model, optimizer)
    fit(model, optimizer, range(3, 5))
    return then, contents(model, optimizer)


def both_ways(alone, parallel):
    ddp = functools.partial(nn.parallel.DistributedDataParallel, init_sync=False)
    return loaded(alone, ddp), saved(parallel, ddp)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_torch_distributed_holds_codes_and_state_to_the_bit(group, tmp_path):
    """Of one process and of plain DDP, and from each to the other; and training goes on alike."""
    alone, parallel = str(tmp_path / "alone"), str(tmp_path / "parallel")
    first = saved(alone, lambda model: model)
    assert first[0]["1.weight_codes"].dtype == torch.uint8 and "1.weight" not in first[0]
    (_, second), (third, _) = group.run(2, both_ways, alone, parallel)
    fourth = loaded(parallel, lambda model: model)
    for found in (loaded(alone, lambda model: model), second, third, fourth):
        for own, expected in zip(found, first, strict=True):
            equal(own, expected)


def saved_shards(folder, mesh):
    return saved(folder, lambda model: cut(model, mesh))


def loaded_shards(folder, mesh):
    return loaded(folder, lambda model: cut(model, mesh))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_goes_from_any_number_of_ranks_to_any_other(group, tmp_path):
    """To the bit; what is trained on from there, too, where means of gradients are exact."""
    one, two, three = (str(tmp_path / name) for name in ("one", "two", "three"))
    first = saved(one, lambda model: model)
    equal(group.run(2, saved_shards, two, (2,))[0][0], first[0])
    (from_three, _), *_ = group.run(3, saved_shards, three, (3,))
    equal(loaded(two, lambda model: model)[0], first[0])
    equal(loaded(three, lambda model: model)[0], from_three)
    for folder, mesh in ((one, (2,)), (two, (2, 2)), (two, (3,))):
        for then, after in group.run(math.prod(mesh), loaded_shards, folder, mesh):
            equal(then, first[0])
            if mesh != (3,):
                equal(after, first[1])


def full_states(mesh, steps, given=None):
    """The full state dicts of a run; or the contents of a model that has been given some."""
    from torch.distributed.checkpoint import state_dict as of

    model = cut(net(seed=0 if given is None else 1), mesh)
    optimizer = optimizer_of(model)
    options = of.StateDictOptions(full_state_dict=True)
    if given is None:
        fit(model, optimizer, range(steps))
        states = of.get_model_state_dict(model, options=options)
        return states, of.get_optimizer_state_dict(model, optimizer, options=options)
    of.set_model_state_dict(model, given[0], options=options)
    if len(given) > 1:
        of.set_optimizer_state_dict(model, optimizer, given[1], options=options)
    return contents(model, optimizer)


def test_full_state_dicts_go_to_one_process_and_back(group):
    _, expected = alone(range(3))
    (states, of_optimizer), *_ = group.run(2, full_states, (2,), 3)
    assert {key: type(t) for key, t in states.items()} == dict.fromkeys(states, torch.Tensor)
    model = net(seed=1)
    model.load_state_dict(states)
    equal(dict(model.state_dict()), {k: v for k, v in expected.items() if k in states})
    for found in group.run(3, full_states, (3,), 3, (states, of_optimizer)):
        equal(found, expected)


def test_a_plain_checkpoint_is_quantized_by_the_ranks_that_load_it(group):
    expected = dict(net(seed=5).state_dict())
    given = dict(plain_net(seed=5).state_dict())
    for found in group.run(2, full_states, (2,), 0, (given,)):
        equal({key: found[key] for key in expected}, expected)


# ---- what cannot be ------------------------------------------------------------------------------


def said(error, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    return str(caught.value)


def refusals():
    """What is said where something else meets int8 shards; and whether it was before any change."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    found, mesh = {}, sharded.mesh_of((2,))
    model = cut(net(), (2,))
    found["back"] = said(ValueError, dequantize_, model)
    assert isinstance(model[1].weight.to_local(), Int8Weight)
    found["late"] = said(ValueError, quantize_, cut(plain_net(), (2,)), targets=INT8)
    layer = nn.Linear(16, 32)
    quantize_(layer)
    fully_shard(layer, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    found["columns"] = said(ValueError, apollo_kernels.apollo, layer, rank=4)
    layer = nn.Linear(16, 32)
    quantize_(layer)
    call = parallelize_module, layer, mesh
    found["columnwise"] = said(NotImplementedError, *call, ColwiseParallel())
    layer = nn.Linear(16, 32)
    quantize_(layer)
    parallelize_module(layer, mesh, RowwiseParallel())
    found["rowwise"] = said(ValueError, apollo_kernels.apollo, layer, rank=4)
    own = apollo_kernels.quantized.quantized(torch.randn(16, 32))
    by_hand = nn.Parameter(DTensor.from_local(own, mesh, [Shard(1)], run_check=False))
    found["by hand"] = said(NotImplementedError, APOLLO, [("w", by_hand)], rank=4)
    state, other = model.state_dict(), net(seed=1)
    found["shards"] = said(ValueError, other.load_state_dict, state)
    state["1.weight_codes"] = torch.zeros(3, 20, dtype=torch.uint8)
    found["shape"] = said(ValueError, model.load_state_dict, state)
    dequantize_(other)
    apollo_kernels.apollo(cut(other, (2,)), rank=4)  # after dequantize_ nothing was int8
    return found


def test_what_does_not_go_with_shards_is_refused_by_name(group):
    for found in group.run(2, refusals):
        assert "'0.weight' is cut into shards" in found["back"]
        assert "'0.weight' is a DTensor" in found["late"] and "before fully_shard" in found["late"]
        assert "not with tensor parallelism" in found["columnwise"]
        for key in ("columns", "rowwise"):
            assert "'weight' was int8, and is now cut" in found[key], key
        assert "'w'" in found["by hand"] and "Shard(dim=1)" in found["by hand"]
        assert "1.weight: codes must be torch.uint8 (151, 20)" in found["shape"]
        assert "is a DTensor in the state_dict" in found["shards"]


def test_outwardly_some_rows_are_rows():
    """What fully_shard needs of a tensor, and what looks like it but is not."""
    w = apollo_kernels.quantized.quantized(torch.randn(6, 40), 16)
    values = w.dequantize()
    for rows in (w[1:4], w.split(4)[1], w[5:2], w.as_strided((3, 40), (40, 1)), w.view(6, 40)):
        assert isinstance(rows, Int8Weight)
    assert torch.equal(w[1:4].dequantize(), values[1:4])
    assert torch.equal(w.split(4)[1].dequantize(), values[4:])
    assert torch.equal(w.as_strided((3, 40), (40, 1)).dequantize(), values[:3])
    assert not w.new_zeros(2, 40).dequantize().any() and type(w.new_zeros(40)) is torch.Tensor
    others = [(w[:, 1:3], values[:, 1:3]), (w[::2], values[::2]), (w.t(), values.t())]
    others += [(w.view(12, 20), values.view(12, 20)), (w.split(30, 1)[1], values[:, 30:])]
    others += [(w.as_strided((2, 3), (3, 1)), values.as_strided((2, 3), (3, 1)))]
    for found, expected in others:
        assert type(found) is torch.Tensor and torch.equal(found, expected)
    flat = w.view(-1)
    assert flat.shape == (240,) and torch.equal(flat + 0, values.view(-1))
    with pytest.raises(NotImplementedError, match="would write into a view of an int8 weight"):
        flat.zero_()
    moved = w[:4].to("meta")
    assert moved.shape == (4, 40) and moved.padded[0].shape == (6, 40)
