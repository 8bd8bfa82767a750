"""A low-rank group takes whole parameters: pieces of FSDP1, DeepSpeed and Megatron are refused."""

import copy
import re

import pytest
import torch
from helpers import changed, refuses, snapshot
from torch import nn

from apollo_kernels import APOLLO, apollo, apollo_mini, flat, param_groups

INSTEAD = "FSDP2.*fully_shard.*DistributedDataParallel.*ZeroRedundancyOptimizer"


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


# ---- FSDP1 ---------------------------------------------------------------------------------------


def under_fsdp1(sharding, use_orig_params):
    """What each way to an optimizer of a model under FSDP1 says."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = net()
    early = APOLLO(apollo(model, rank=4))
    late_groups = apollo(model, rank=4)
    model = FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[sharding],
        device_id=torch.device("cpu"),
    )
    said = {
        "param_groups": message_of(lambda: param_groups(model, rank=4)),
        "apollo": message_of(lambda: apollo(model)),
        "apollo_mini": message_of(lambda: apollo_mini(model)),
        "unnamed": message_of(lambda: APOLLO(model.parameters(), rank=4)),
        "named": message_of(lambda: APOLLO(model.named_parameters(), rank=4)),
        "dense": message_of(lambda: APOLLO(model.parameters())),
    }
    said["before any gradient"] = message_of(early.step)
    model(torch.ones(2, 8)).sum().backward()
    if not use_orig_params:  # the optimizer's are in the model no more
        nameless = APOLLO(list(net().parameters()), rank=4)
        bystander = APOLLO([("other.weight", nn.Parameter(torch.ones(16, 8)))], rank=4)
        another = net()  # of the same names and shapes
        said["bystander"] = message_of(bystander.step) + message_of(APOLLO(apollo(another)).step)
        for which, made in (("named", early), ("nameless", nameless)):
            said[f"{which}, made before"] = message_of(made.step)
    if use_orig_params:  # the same objects, which have become pieces
        said["groups made before"] = message_of(lambda: APOLLO(late_groups))
        before = snapshot(early)
        said["optimizer made before"] = message_of(early.step)
        said["wrote"] = changed(before, snapshot(early))
    model.zero_grad()  # other tests of this process go on beside what is left of it
    return said


@pytest.mark.parametrize("sharding", ["FULL_SHARD", "SHARD_GRAD_OP"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_pieces_of_fsdp1_are_refused_on_every_rank(group, sharding, use_orig_params):
    found = group.run(2, under_fsdp1, sharding, use_orig_params)
    assert len(found[0]) == 10
    for said in found:
        assert said.pop("dense") == ""  # AdamW is the same on a piece
        assert use_orig_params or said.pop("before any gradient") == ""
        assert use_orig_params or said.pop("bystander") == ""
        assert said.pop("wrote", set()) == set()
        for how, text in said.items():
            called = "0" if how == "unnamed" else r"'\S*(0\.weight|_flat_param)'"
            cut = "FSDP1 has cut" if use_orig_params else "buffer of FSDP1 for 0.weight, 0.bias, 2"
            if "made before" in how and not use_orig_params:
                called = "0" if how.startswith("nameless") else "'0.weight'"
                cut = r"of shape \(16, 8\), is in its model no more.*FSDP1 has put a flat buffer"
            assert re.match(f"parameter {called}.*{cut}.*{INSTEAD}", text), (how, text)


def test_what_fsdp1_leaves_whole_is_taken(group):
    found = group.run(2, under_fsdp1, "NO_SHARD", True)
    for said in found:
        assert set(said.pop("wrote")) != set()
        assert not any(said.values())


# ---- DeepSpeed ZeRO-3, by what it leaves on a parameter ------------------------------------------


def partitioned(p):
    """As deepspeed.zero.Init leaves a parameter between two uses."""
    p.ds_id, p.ds_shape = 0, p.shape
    p.data = torch.empty(0)


@pytest.mark.parametrize("make", [lambda m: apollo(m, rank=4), lambda m: m.named_parameters()])
def test_partitioned_parameters_are_refused(make):
    model = net()
    for p in model.parameters():
        partitioned(p)
    match = rf"parameter '0.weight'.*shape \(0,\).*ZeRO-3.*\(16, 8\).*{INSTEAD}"
    with pytest.raises(ValueError, match=match):
        APOLLO(make(model), rank=4)
    APOLLO(model.parameters())


def test_gathered_parameters_are_taken():
    model = net()
    for p in model.parameters():
        p.ds_id, p.ds_shape = 0, p.shape
    APOLLO(apollo(model, rank=4))


# ---- DeepSpeed and Megatron, which swap a group's parameters after construction ------------------


def flattened(optimizer):
    """Each group holds one flat copy of half of its parameters, as on one of two ranks."""
    for group in optimizer.param_groups:
        whole = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        piece = whole[: whole.numel() // 2].clone().requires_grad_(True)
        piece.grad = torch.ones_like(piece)
        group["params"] = [piece]


@pytest.mark.parametrize("groups", [apollo, apollo_mini, lambda m: m.parameters()])
def test_flat_buffers_in_the_place_of_matrices_are_refused(groups):
    """The first step of DeepSpeed's ZeRO-1 and 2 comes with them."""
    optimizer = APOLLO(groups(net()), rank=4)
    flattened(optimizer)
    match = f"parameter 0 .*stands where the optimizer had matrices: DeepSpeed.*Megatron.*{INSTEAD}"
    refuses(optimizer, optimizer.step, match=match)
    assert not optimizer.state


def test_they_are_refused_when_a_state_is_loaded():
    """As Megatron's distributed optimizer does at once."""
    optimizer = APOLLO(apollo(net(), rank=4))
    flattened(optimizer)
    refuses(optimizer, lambda: optimizer.load_state_dict(optimizer.state_dict()), match="Megatron")


def test_a_compiled_step_refuses_them_too():
    optimizer = APOLLO(apollo(net(), rank=4))
    flattened(optimizer)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    refuses(optimizer, step, match="stands where the optimizer had matrices")


def test_pieces_of_each_parameter_are_refused():
    """Megatron cuts one piece of each, in the memory of a flat buffer."""
    optimizer = APOLLO(apollo(net(), rank=4))
    for group in optimizer.param_groups:
        pieces = [p.detach().view(-1)[3:7].clone() for p in group["params"]]
        for piece in pieces:
            piece.grad = torch.ones_like(piece)
        group["params"] = pieces
    refuses(optimizer, optimizer.step, match="parameter '0.weight' .*Megatron")


def test_whole_copies_in_the_place_of_parameters_are_taken():
    """Master weights, say, whose gradients lie in one flat buffer."""
    model = net()
    optimizer, twin = APOLLO(apollo(model, rank=4)), APOLLO(apollo(copy.deepcopy(model), rank=4))
    buffer = torch.randn(sum(p.numel() for p in model.parameters()))
    rest = buffer
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        group["params"] = [p.detach().clone() for p in group["params"]]
        for p, q in zip(group["params"], other["params"], strict=True):
            p.grad, rest = rest[: p.numel()].view(p.shape), rest[p.numel() :]
            q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert changed(snapshot(optimizer), snapshot(twin)) == set()


def test_vectors_that_belong_there_are_taken():
    """Biases in a low-rank group, after its matrices have been taken out."""
    model = net()
    biases = [p for p in model.parameters() if p.dim() < 2]
    optimizer = APOLLO([{"params": [model[0].weight]}, {"params": biases}], rank=4)
    del optimizer.param_groups[0]
    for p in biases:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    optimizer.step()


@pytest.mark.parametrize(("gradient_from", "looks"), [(0, 0), (1, 1), (9, 3)])
def test_only_the_first_steps_without_gradients_look_for_flat_buffers(
    gradient_from, looks, monkeypatch
):
    """What they look for lies among all objects of the process."""
    seen = []
    monkeypatch.setattr(flat, "_taken_by_fsdp1", lambda: seen.append(1) or [])
    model = net()
    optimizer = APOLLO(apollo(model, rank=4))
    for step in range(6):
        if step == gradient_from:
            model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == looks
