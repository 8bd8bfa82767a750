"""int8 weights and torch.distributed: checkpoints of it, and weights that fully_shard has cut."""

import copy
import functools

import processes
import pytest
import torch
from torch import nn

from apollo_kernels import APOLLO, quantize_

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without distributed"
)


def net(seed=0):
    """Matrices of both orientations, rows that no 128 divides, and some that stay plain."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(12, 20), nn.Linear(20, 150), nn.GELU(), nn.Linear(150, 20)]
    model = nn.Sequential(*layers, nn.Linear(20, 12, bias=False))
    quantize_(model, targets=["0", "1", "3"])
    return model


def optimizer_of(model):
    low = [(n, p) for n, p in model.named_parameters() if n.endswith(("1.weight", "3.weight"))]
    taken = [n for n, _ in low]
    rest = [(n, p) for n, p in model.named_parameters() if n not in taken]
    low = {"params": low, "rank": 4, "update_proj_gap": 2}
    return APOLLO([low, {"params": rest}], lr=0.02, weight_decay=0.1)


def fit(model, optimizer, steps):
    for step in steps:
        ids = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(step))
        model(ids).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def contents(model, optimizer):
    """All there is to save, in copies, by names that DDP does not change."""
    found = {name: t for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found.update({(name, key): value for key, value in optimizer.state[p].items()})
    return {str(key).replace("module.", ""): copy.deepcopy(value) for key, value in found.items()}


def equal(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if torch.is_tensor(value) else found[key] == value
        assert same, key


# ---- checkpoints ---------------------------------------------------------------------------------


def whole(model, optimizer):
    from torch.distributed.checkpoint import state_dict as of

    return {
        "model": of.get_model_state_dict(model),
        "optimizer": of.get_optimizer_state_dict(model, optimizer),
    }


def saved(folder, wrap):
    """Of a model that has trained; and then a step further."""
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_torch_distributed_holds_codes_and_state_to_the_bit(tmp_path):
    """Of one process and of plain DDP, and from each to the other; and training goes on alike."""
    alone, parallel = str(tmp_path / "alone"), str(tmp_path / "parallel")
    first = saved(alone, lambda model: model)
    assert first[0]["1.weight_codes"].dtype == torch.uint8 and "1.weight" not in first[0]
    (_, second), (third, _) = processes.run(both_ways, alone, parallel)
    fourth = loaded(parallel, lambda model: model)
    for found in (loaded(alone, lambda model: model), second, third, fourth):
        for own, expected in zip(found, first, strict=True):
            equal(own, expected)


def both_ways(rank, alone, parallel):
    ddp = functools.partial(nn.parallel.DistributedDataParallel, init_sync=False)
    return loaded(alone, ddp), saved(parallel, ddp)
