"""Replicas stay equal bit for bit under DistributedDataParallel, and ZeroRedundancyOptimizer is the
whole optimizer in parts."""

import hashlib

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from apollo_kernels import APOLLO, apollo, apollo_mini, quantize_

STEPS = 200


class Net(nn.Module):
    """Layers of one shape, a branch that may be left out, and vectors."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x, branch=True):
        x = self.norm(x + self.down(torch.tanh(self.up(x))))
        x = x + self.first(x)
        return x + self.second(x) if branch else x


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(rank, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(4, 8, generator=generator).to(dtype)


def backward(model, x, **how):
    model(x, **how).float().square().mean().backward()


def digest(optimizer):
    """Of all weights and of all state."""
    found = hashlib.sha256()
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        parts = [1.0 * p.detach(), *optimizer.state.get(p, {}).values()]
        for value in parts:
            value = value.double().numpy().tobytes() if isinstance(value, torch.Tensor) else value
            found.update(repr(value).encode())
    return found.hexdigest()


def equal(found):
    """The digests of every rank, which are equal and not all of one state."""
    assert all(digests == found[0] for digests in found)
    assert len(set(found[0])) == len(found[0]) > 1


# ---- DistributedDataParallel ---------------------------------------------------------------------

OPTIMIZERS = {
    "channel": dict(rank=4),
    "unnamed": dict(rank=4),
    "tensor": dict(rank=1, scale_type="tensor", scale=128.0, proj="rademacher"),
    "sparse": dict(rank=4, proj="sparse"),
    "int8 moments": dict(rank=4, dense_state="int8"),
    "stochastic rounding": dict(rank=4, stochastic_rounding=True),
    "int8 weights": dict(rank=4),
    "clipped": dict(rank=4),
}
DDP = {
    "plain": {},
    "views": dict(gradient_as_bucket_view=True, bucket_cap_mb=0.001),
    "static": dict(static_graph=True, gradient_as_bucket_view=True),
    "unused": dict(find_unused_parameters=True),
    "unused, views": dict(find_unused_parameters=True, gradient_as_bucket_view=True),
}


def replicas(kind, how, steps):
    rank = distributed.get_rank()
    dtype = torch.bfloat16 if kind in ("stochastic rounding", "int8 weights") else torch.float32
    model = net(dtype)
    if kind == "int8 weights":
        quantize_(model)
    options = dict(lr=1e-2, update_proj_gap=60)
    if kind == "clipped":
        options["max_grad_norm"] = 0.05
    replica = DistributedDataParallel(model, **DDP[how])
    if kind == "unnamed":
        optimizer = APOLLO(replica.parameters(), **OPTIMIZERS[kind], **options)
    else:
        optimizer = APOLLO(apollo(replica, weight_decay=0.1, **OPTIMIZERS[kind]), **options)
    digests = []
    for step in range(steps):
        # Unused on all ranks at first, so that its state comes late; then on one rank, or on none.
        branch = not how.startswith("unused") or (step >= 7 and (step + rank) % 3 > 0)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        backward(replica, batch(rank, step, dtype), branch=branch)
        optimizer.step()
        digests.append(digest(optimizer))
    assert optimizer.stats()["updates"] > 8 * steps  # of 10 parameters, each
    return digests


@pytest.mark.parametrize("how", DDP)
def test_replicas_are_equal_however_gradients_are_reduced(group, how):
    equal(group.run(2, replicas, "channel", how, STEPS))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_replicas_are_equal_whatever_is_drawn(group, kind):
    equal(group.run(2, replicas, kind, "views", 100))


def joined():
    """Rank 0 has more batches. Afterwards weights are equal; the state is that of the last to end,
    as with every optimizer, and goes to the others by a state_dict."""
    rank, model = distributed.get_rank(), net()
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = APOLLO(apollo(replica, rank=4), lr=1e-2, update_proj_gap=20)
    digests = []

    def train(steps):
        for step in steps:
            backward(replica, batch(rank, step))
            optimizer.step()
            optimizer.zero_grad()
            digests.append(digest(optimizer))

    with replica.join():
        train(range(25 if rank else 40))
    common = digests[:25]
    weights = [p.detach().clone() for p in model.parameters()]
    behind = digest(optimizer)
    states = [optimizer.state_dict()]
    distributed.broadcast_object_list(states, src=0)
    optimizer.load_state_dict(states[0])
    digests.clear()
    train(range(40, 60))
    return common, weights, behind, digests


def test_replicas_are_equal_after_join(group):
    common, weights, behind, after = zip(*group.run(2, joined), strict=True)
    equal(common)
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
    assert behind[0] != behind[1]
    equal(after)


# ---- gradient release ----------------------------------------------------------------------------


def released(how):
    """What is said, and whether anything was written."""
    model = net()
    optimizer = APOLLO(apollo(model, rank=4), gradient_release=how != "attached")
    if how == "composable":
        from torch.distributed._composable.replicate import replicate

        replica = replicate(model)
    else:
        replica = DistributedDataParallel(model)
    before = digest(optimizer)
    try:
        if how == "attached":
            optimizer.attach(replica)
        backward(replica, batch(distributed.get_rank(), 0))
    except (RuntimeError, ValueError) as error:
        return str(error), digest(optimizer) == before
    return "", False


@pytest.mark.parametrize("how", ["attached", "made with it", "composable"])
def test_gradient_release_is_refused_on_every_rank(group, how):
    for text, untouched in group.run(2, released, how):
        assert "averaged over the ranks" in text and "buckets" in text
        assert untouched


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------


def redundancy_free(maker, views):
    """ZeroRedundancyOptimizer beside the whole optimizer; saved, and gone on with by a new one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, options = distributed.get_rank(), dict(lr=1e-2, update_proj_gap=20)
    models = [DistributedDataParallel(net(), gradient_as_bucket_view=views) for _ in range(2)]

    def parted():
        return ZeroRedundancyOptimizer(
            maker(models[0], weight_decay=0.1),
            optimizer_class=APOLLO,
            parameters_as_bucket_view=views,
            **options,
        )

    whole, parts = APOLLO(maker(models[1], weight_decay=0.1), **options), parted()

    def train(steps):
        for step in steps:
            for model, optimizer in zip(models, (parts, whole), strict=True):
                optimizer.zero_grad()
                backward(model, batch(rank, step))
                optimizer.step()
            for p, q in zip(*(model.parameters() for model in models), strict=True):
                assert torch.equal(p, q), step

    train(range(50))
    called = {p: name for name, p in models[0].module.named_parameters()}
    own = {called[p]: state.get("seed") for p, state in parts.optim.state.items()}
    parts.consolidate_state_dict(to=0)
    saved = [parts.state_dict() if rank == 0 else None]
    distributed.broadcast_object_list(saved, src=0)
    parts = parted()
    parts.load_state_dict(saved[0])
    train(range(50, 75))
    called = models[1].module.named_parameters()
    return own, {name: whole.state[p]["seed"] for name, p in called if p.dim() > 1}


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("maker", [apollo, apollo_mini])
def test_zero_redundancy_is_the_whole_optimizer_in_parts(group, maker, views):
    (mine, keys), (others, _) = group.run(2, redundancy_free, maker, views)
    assert len(mine) > 0 and len(others) > 0 and set(mine) & set(others) == set()
    found = {name: key for name, key in {**mine, **others}.items() if key is not None}
    assert found == keys and len(set(keys.values())) == 4


def joined_without_redundancy():
    """A rank that has ended steps its part on, so that no state is left behind; what the others
    reduce reaches it in the buckets, of which its gradients are views."""
    from torch.distributed.algorithms.join import Join
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank = distributed.get_rank()
    replica = DistributedDataParallel(net(), gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(apollo(replica, rank=4), optimizer_class=APOLLO, lr=1e-2)

    def train(steps):
        for step in steps:
            backward(replica, batch(rank, step))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    with Join([replica, optimizer]):
        train(range(10 if rank else 25))
    counts = {int(state["step"]) for state in optimizer.optim.state.values()}
    train(range(25, 35))
    return counts, [p.detach().clone() for p in replica.parameters()]


def test_zero_redundancy_leaves_no_state_behind_in_join(group):
    (counts, weights), (counts_1, weights_1) = group.run(2, joined_without_redundancy)
    assert counts == counts_1 == {25}
    assert all(torch.equal(p, q) for p, q in zip(weights, weights_1, strict=True))


def names_by_hand():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    pairs = list(net().named_parameters())
    group = {"params": [p for _, p in pairs], "param_names": [name for name, _ in pairs], "rank": 4}
    try:
        ZeroRedundancyOptimizer([group], optimizer_class=APOLLO, lr=1e-2)
    except ValueError as error:
        return str(error)


def test_names_that_zero_redundancy_cannot_match_are_refused(group):
    for text in group.run(2, names_by_hand):
        assert "10 names for" in text and "param_groups(model)" in text
