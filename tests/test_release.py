"""Gradient release: a step inside of backward gives the bits of the normal mode, and holds few
gradients at a time; what cannot work that way is refused before anything is written."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import all_of, changed, parameters, randn, refuses, same, snapshot
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.checkpoint import checkpoint

from apollo_kernels import APOLLO, plan

# Shapes of both orientations, experts, and dense ones; each weighs in the loss by itself.
SHAPES = {"up": (24, 16), "down": (16, 24), "experts": (2, 8, 16), "bias": (9,), "scalar": ()}


class Net(torch.nn.Module):
    def __init__(self, backend, dtype=torch.float32):
        super().__init__()
        for seed, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, torch.nn.Parameter(randn(shape, backend, dtype, seed)))

    def loss(self, step, micro=0):
        """Its gradients depend on the weights, the step and the micro-batch."""
        total = 0.0
        for seed, p in enumerate(self.parameters()):
            if p.requires_grad:
                target = randn(p.shape, Place(p.device), p.dtype, 100 * step + 10 * micro + seed)
                total = total + (p.float() - target.float()).square().sum()
        return total


class Place:
    def __init__(self, device):
        self.device = device


def optimizer_of(net, **options):
    named = dict(net.named_parameters())
    group = {"rank": 4, "update_proj_gap": 2, "weight_decay": 0.1}
    group["stochastic_rounding"] = net.up.dtype == torch.bfloat16
    lists = [["up", "bias"], ["down", "scalar"], ["experts"]]
    groups = [{"params": [(name, named[name]) for name in names], **group} for names in lists]
    groups[1] |= {"scale_type": "tensor", "rank": 1, "proj": "rademacher", "lr": 0.02}
    groups[2] |= {"batch_dims": 1}
    return APOLLO(groups, lr=0.05, **options)


def train(net, optimizer, steps, micro=1, scheduler=None):
    for step in steps:
        with optimizer.accumulate():
            for i in range(micro - 1):
                net.loss(step, i).backward()
        net.loss(step, micro - 1).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()


def released(backend, dtype=torch.float32, **options):
    net = Net(backend, dtype)
    return net, optimizer_of(net, gradient_release=True, **options)


def normal(backend, steps, dtype=torch.float32, **options):
    """What the normal mode arrives at after ``steps``."""
    net = Net(backend, dtype)
    optimizer = optimizer_of(net)
    train(net, optimizer, steps, **options)
    return snapshot(optimizer), optimizer


def has_the_bits(optimizer, expected):
    before, other = expected
    assert changed(before, snapshot(optimizer)) == set()
    assert optimizer.stats() == other.stats()


# ---- the bits of the normal mode -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_the_normal_mode(backend, dtype):
    """Over two redraws, with stochastic rounding where it applies; all in backward."""
    net, optimizer = released(backend, dtype)
    for step in range(5):
        net.loss(step).backward()
        assert all(p.grad is None for p in net.parameters())
        inside = snapshot(optimizer)
        optimizer.step()
        assert changed(inside, snapshot(optimizer)) == set()
    has_the_bits(optimizer, normal(backend, range(5), dtype))


def test_the_state_dict_is_that_of_the_normal_mode(backend):
    net, optimizer = released(backend)
    train(net, optimizer, range(2))
    found, expected = optimizer.state_dict(), normal(backend, range(2))[1].state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for place, state in expected["state"].items():
        assert found["state"][place].keys() == state.keys()
        assert all(same(found["state"][place][key], value) for key, value in state.items())
    assert str(optimizer.memory_report()) == str(normal(backend, range(2))[1].memory_report())


def test_accumulated_micro_batches_are_stepped_with_their_sum(backend):
    net, optimizer = released(backend)
    start = snapshot(optimizer)
    with optimizer.accumulate():
        net.loss(0, 0).backward()
        net.loss(0, 1).backward()
    assert changed(start, snapshot(optimizer)) == set()
    assert all(p.grad is not None for p in net.parameters())
    net.loss(0, 2).backward()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    train(net, optimizer, range(1, 3), micro=3)
    has_the_bits(optimizer, normal(backend, range(3), micro=3))


def test_gradients_that_only_accumulate_are_stepped_at_step(backend):
    net, optimizer = released(backend)
    for step in range(2):
        with optimizer.accumulate():
            net.loss(step).backward()
        optimizer.step()
        assert all(p.grad is None for p in net.parameters())
    has_the_bits(optimizer, normal(backend, range(2)))


def test_accumulate_does_nothing_in_the_normal_mode(backend):
    net = Net(backend)
    optimizer = optimizer_of(net)
    with optimizer.accumulate():
        net.loss(0).backward()
    optimizer.step()
    assert optimizer.stats()["updates"] == len(SHAPES) + 1  # two experts


@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumes_from_and_into_the_normal_mode(backend, first):
    net = Net(backend)
    optimizer = optimizer_of(net, gradient_release=first)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    net = Net(backend)
    net.load_state_dict(weights)
    optimizer = optimizer_of(net, gradient_release=not first)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(3, 5))
    assert changed(normal(backend, range(5))[0], snapshot(optimizer)) == set()


def test_a_state_that_is_loaded_in_mid_run_is_the_one_that_is_stepped(backend):
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    weights, state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(1, 3))
    net.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(net, optimizer, range(1, 3))
    assert changed(normal(backend, range(3))[0], snapshot(optimizer)) == set()


def test_a_state_that_is_put_in_place_of_another_is_the_one_that_is_stepped(backend):
    def run(gradient_release):
        net = Net(backend)
        optimizer = optimizer_of(net, gradient_release=gradient_release)
        train(net, optimizer, range(2))
        old = optimizer.state[net.up]
        optimizer.state[net.up] = copy.deepcopy(old)
        optimizer.state[net.bias] = {}
        train(net, optimizer, range(2, 3))
        assert int(old["step"]) == 2 and int(optimizer.state[net.bias]["step"]) == 1
        return snapshot(optimizer)

    assert changed(run(False), run(True)) == set()


def test_parameters_are_frozen_and_thawed(backend):
    """``up`` is frozen when it is given away, ``bias`` in between."""

    def run(gradient_release):
        net = Net(backend)
        net.up.requires_grad_(False)
        optimizer = optimizer_of(net, gradient_release=gradient_release)
        assert not net.up.requires_grad
        train(net, optimizer, range(2))
        net.up.requires_grad_(True)
        net.bias.requires_grad_(False)
        net.loss(2).backward()
        assert not gradient_release or net.up.grad is None
        optimizer.step()
        optimizer.zero_grad()
        net.bias.requires_grad_(True)
        train(net, optimizer, range(3, 4))
        return snapshot(optimizer)

    assert changed(run(False), run(True)) == set()


def test_a_scheduler_decides_the_rate_of_the_next_backward(backend):
    def run(gradient_release):
        net = Net(backend)
        optimizer = optimizer_of(net, gradient_release=gradient_release)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        train(net, optimizer, range(3), scheduler=scheduler)
        return snapshot(optimizer)

    assert changed(run(False), run(True)) == set()


def test_a_gradient_set_by_hand_is_stepped_at_step_and_freed(backend):
    net, optimizer = released(backend)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(optimizer)
    optimizer.step()
    assert all(p.grad is None for p in net.parameters())
    assert len({i for i, key in changed(before, snapshot(optimizer)) if key == "weight"}) == 5


def test_release_begins_and_ends_in_mid_run(backend):
    net = Net(backend)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(1))
    attached = optimizer.attach(net)  # kept: what is detached does nothing all the same
    with attached:
        assert optimizer.gradient_release
        train(net, optimizer, range(1, 3))
    assert not optimizer.gradient_release
    net.loss(3).backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    has_the_bits(optimizer, normal(backend, range(4)))


# ---- groups that change --------------------------------------------------------------------------


def test_a_group_that_is_added_is_released_too(backend):
    def run(gradient_release):
        net = Net(backend)
        optimizer = optimizer_of(net, gradient_release=gradient_release)
        net.late = torch.nn.Parameter(randn((8, 8), backend, seed=9))
        train(net, optimizer, range(1))
        optimizer.add_param_group({"params": [("late", net.late)], "rank": 2})
        net.late.grad = None
        net.loss(1).backward()
        assert not gradient_release or net.late.grad is None
        optimizer.step()
        return snapshot(optimizer)

    assert changed(run(False), run(True)) == set()


def test_lists_that_are_changed_by_hand_are_followed(backend):
    """One that is appended is released from the next step on; one that is gone is left alone."""

    def run(gradient_release):
        net = Net(backend)
        optimizer = optimizer_of(net, gradient_release=gradient_release)
        train(net, optimizer, range(1))
        net.late = torch.nn.Parameter(randn((8, 8), backend, seed=9))
        optimizer.param_groups[0]["params"].append(net.late)
        train(net, optimizer, range(1, 2))
        net.loss(2).backward()
        assert not gradient_release or net.late.grad is None
        optimizer.step()
        optimizer.zero_grad()
        gone = optimizer.param_groups[1]["params"].pop(0)
        kept = gone.detach().clone()
        net.loss(3).backward()
        optimizer.step()
        assert torch.equal(gone, kept) and gone.grad is not None
        return snapshot(optimizer)

    assert changed(run(False), run(True)) == set()


# ---- the step ------------------------------------------------------------------------------------


def test_step_hooks_run_once_around_all_updates(backend):
    net, optimizer = released(backend)
    seen, start = [], snapshot(optimizer)

    def watch(what):
        def hook(*_):
            seen.append((what, bool(changed(start, snapshot(optimizer)))))

        return hook

    own = [
        optimizer.register_step_pre_hook(watch("pre")),
        optimizer.register_step_post_hook(watch("post")),
        register_optimizer_step_pre_hook(watch("global pre")),
        register_optimizer_step_post_hook(watch("global post")),
    ]
    try:
        net.loss(0).backward()
        assert seen == [("global pre", False), ("pre", False)]
        optimizer.step()
        assert seen[2:] == [("post", True), ("global post", True)]
        seen.clear()
        optimizer.step()  # without a backward
        assert [what for what, _ in seen] == ["global pre", "pre", "post", "global post"]
        seen.clear()
        optimizer.step(lambda: net.loss(1).backward())
        assert [what for what, _ in seen] == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in own:
            handle.remove()


def test_a_pre_hook_that_asks_for_other_arguments_is_refused(backend):
    net, optimizer = released(backend)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((*args, lambda: 1.0), kwargs))
    refuses(optimizer, net.loss(0).backward, RuntimeError, "step pre hook returned other arguments")


def test_a_closure_is_evaluated_and_its_backward_released(backend):
    net, optimizer = released(backend)

    def closure(step):
        optimizer.zero_grad()
        loss = net.loss(step)
        loss.backward()
        assert all(p.grad is None for p in net.parameters())
        return loss

    expected = net.loss(0).item()
    assert optimizer.step(lambda: closure(0)).item() == expected
    optimizer.step(lambda: closure(1))
    has_the_bits(optimizer, normal(backend, range(2)))


def test_a_second_backward_before_step_is_refused_and_steps_nothing(backend):
    net, optimizer = released(backend)
    net.loss(0).backward()
    match = r"parameter '\w+' .*second gradient.*optimizer.accumulate\(\).*use_reentrant=False"
    refuses(optimizer, net.loss(1).backward, RuntimeError, match)
    refuses(optimizer, optimizer.step, RuntimeError, match)  # it still holds that gradient
    optimizer.zero_grad()
    optimizer.step()
    train(net, optimizer, range(1, 2))
    has_the_bits(optimizer, normal(backend, range(2)))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_segments_that_share_a_parameter(backend, use_reentrant):
    """Reentrant segments end in a gradient each, so that the first would be stepped too early."""

    def run(gradient_release):
        w = parameters([(8, 8)], backend)[0]
        optimizer = APOLLO([("shared", w)], rank=2, gradient_release=gradient_release)
        x = randn((3, 8), backend, seed=5).requires_grad_()
        for _ in range(2):
            h = checkpoint(lambda h: torch.tanh(h @ w), x, use_reentrant=use_reentrant)
            h = checkpoint(lambda h: torch.tanh(h @ w), h, use_reentrant=use_reentrant)
            h.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(optimizer)

    if use_reentrant:
        with pytest.raises(RuntimeError, match=r"'shared'.*use_reentrant=False"):
            run(True)
    else:
        assert changed(run(False), run(True)) == set()


def test_a_graph_that_still_needs_a_released_weight_is_told(backend):
    """It would go on with the new weight: kernels write by address, unseen by autograd."""
    w = parameters([(8, 8)], backend)[0]
    optimizer = APOLLO([w], rank=2, gradient_release=True)
    x = randn((3, 8), backend, seed=5).requires_grad_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((x @ w.detach()) @ w).sum().backward()
    assert optimizer.stats()["updates"] == 1


def test_what_is_refused_is_not_stepped_and_named(backend):
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    state = optimizer.state[net.experts]
    kept = state["exp_avg"]
    state["exp_avg"] = torch.zeros(3, device=backend.device)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 'experts' \(0 of group 2\)"):
        net.loss(1).backward()
    assert not [key for place, key in changed(before, snapshot(optimizer)) if place == 4]
    state["exp_avg"] = kept
    with optimizer.accumulate():  # what did not get that far
        rest = {p: optimizer.state[p]["step"] for p in net.parameters()}
        again = [p for p, step in rest.items() if int(step) == 1 and p.grad is None]
        if again:
            torch.autograd.backward(net.loss(1), inputs=again)
    optimizer.step()
    has_the_bits(optimizer, normal(backend, range(2)))


def test_an_error_from_below_names_the_parameter(backend, monkeypatch):
    net, optimizer = released(backend)
    assert optimizer.gradient_release

    def fails(*_, **__):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(plan, "build", fails)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"no memory left \(at the step of parameter '"
    ):
        net.loss(0).backward()


def test_a_wrong_group_value_surfaces_from_backward(backend):
    net, optimizer = released(backend)
    for group in optimizer.param_groups:
        group["lr"] = -1.0
    refuses(optimizer, net.loss(0).backward, ValueError, r"lr must be .*at the step of parameter '")


# ---- what cannot work ----------------------------------------------------------------------------


def test_clipping_by_the_norm_of_all_gradients_is_refused(backend):
    net = Net(backend)
    match = "max_grad_norm must be None with gradient release, got 1.0.*Leave it out"
    with pytest.raises(ValueError, match=match):
        optimizer_of(net, gradient_release=True, max_grad_norm=1.0)
    optimizer = optimizer_of(net, max_grad_norm=1.0)
    refuses(optimizer, lambda: optimizer.attach(net), match=match)
    optimizer = optimizer_of(net, gradient_release=True)
    refuses(optimizer, lambda: setattr(optimizer, "max_grad_norm", 1.0), match=match)
    assert optimizer.max_grad_norm is None


def test_a_scaler_in_use_is_refused_before_anything_is_written(backend):
    net, optimizer = released(backend)
    scaler = torch.amp.GradScaler(backend.device.type)
    loss = scaler.scale(net.loss(0))
    refuses(
        optimizer, loss.backward, RuntimeError, "GradScaler.*bfloat16.*without gradient release"
    )


def test_a_scaler_that_comes_later_is_refused_at_step(backend):
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    optimizer.grad_scale = torch.ones((), device=backend.device)
    optimizer.found_inf = torch.zeros((), device=backend.device)
    refuses(optimizer, optimizer.step, RuntimeError, "GradScaler")


def test_a_scaler_that_comes_later_asks_the_step_and_not_for_gradients(backend):
    """They are gone when it would unscale them, with and without ``fused``."""
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    scaler = torch.amp.GradScaler(backend.device.type)
    scaler.scale(net.loss(1)).backward()
    refuses(optimizer, lambda: scaler.step(optimizer), RuntimeError, "GradScaler")


@pytest.mark.parametrize("used", [False, True])
def test_a_scaler_that_does_nothing_is_no_obstacle(backend, used):
    net, optimizer = released(backend)
    scaler = torch.amp.GradScaler(backend.device.type, enabled=not used)
    (scaler.scale(net.loss(0)) if used else net.loss(0)).backward()
    (scaler.step(optimizer) if used else optimizer.step())
    has_the_bits(optimizer, normal(backend, range(1)))


def test_a_scaler_that_is_garbage_is_no_obstacle(backend):
    net, optimizer = released(backend)
    scaler = torch.amp.GradScaler(backend.device.type)
    scaler.scale(torch.ones((), device=backend.device))
    scaler.itself = scaler
    gone = weakref.ref(scaler)
    gc.disable()
    try:
        del scaler
        assert gone() is not None
        train(net, optimizer, range(1))
    finally:
        gc.enable()
    has_the_bits(optimizer, normal(backend, range(1)))


@pytest.fixture
def one_process(tmp_path):
    from torch import distributed

    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_data_parallel_replicas_are_refused(one_process):
    """On one rank too: after the hook it hands out its own copy of the gradient."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    replica = torch.nn.parallel.DistributedDataParallel(net)
    match = "DistributedDataParallel.*averaged over the ranks.*without gradient release"
    optimizer = APOLLO(net.named_parameters(), rank=2)
    refuses(optimizer, lambda: optimizer.attach(replica), ValueError, match)
    optimizer.attach(net)
    loss = replica(torch.ones(2, 4)).sum()
    refuses(optimizer, loss.backward, RuntimeError, match)


def test_a_replica_of_another_model_is_no_obstacle(one_process):
    other = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    net = torch.nn.Linear(4, 4)
    optimizer = APOLLO(net.parameters(), rank=2, gradient_release=True)
    net(torch.ones(2, 4)).sum().backward()
    assert optimizer.stats()["updates"] == 2 and other is not None


def test_attach_asks_for_the_model_of_the_optimizer(backend):
    net = Net(backend)
    optimizer = optimizer_of(net)
    whole = torch.nn.ModuleList([net, torch.nn.Linear(2, 2)])
    match = r"does not step: '1.weight', '1.bias'"
    refuses(optimizer, lambda: optimizer.attach(whole), match=match)
    refuses(optimizer, lambda: optimizer.attach(copy.deepcopy(net)), match="does not step: 'up'")
    part = torch.nn.ParameterList([net.up, net.down, net.experts, net.scalar])
    refuses(
        optimizer, lambda: optimizer.attach(part), match=r"not in model: parameter 'bias' \(1 of"
    )
    refuses(optimizer, lambda: optimizer.attach(net.parameters()), TypeError, "torch.nn.Module")
    whole[1].requires_grad_(False)
    net.bias.requires_grad_(False)
    optimizer.attach(torch.nn.ModuleList([part, whole[1]]))
    refuses(optimizer, lambda: optimizer.attach(net), RuntimeError, "detach")
    optimizer.detach()
    optimizer.detach()
    optimizer.attach(net).__exit__()


def test_two_optimizers_do_not_release_one_parameter(backend):
    net, first = released(backend)
    with pytest.raises(ValueError, match=r"parameter 'up' .* is released by another optimizer"):
        optimizer_of(net, gradient_release=True)
    late = APOLLO(parameters([(4, 4)], backend), gradient_release=True)
    refuses(late, lambda: late.add_param_group({"params": [net.up]}), match="released by another")
    first.detach()
    optimizer_of(net, gradient_release=True)


# ---- copies, and the end -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_releases_the_copied_parameters(backend, how):
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    if how == "deepcopy":
        twin, copied = copy.deepcopy((net, optimizer))
    else:
        twin, copied = pickle.loads(pickle.dumps((net, optimizer)))
    assert copied.gradient_release and all_of(copied)[0] is twin.up
    before = snapshot(optimizer)
    train(twin, copied, range(1, 3))
    assert changed(before, snapshot(optimizer)) == set()
    assert changed(normal(backend, range(3))[0], snapshot(copied)) == set()


def test_hooks_end_with_the_optimizer_and_keep_nothing_alive(backend):
    net, optimizer = released(backend)
    train(net, optimizer, range(1))
    gone = weakref.ref(optimizer)
    moment = weakref.ref(optimizer.state[net.up]["exp_avg"])
    gc.disable()
    try:
        del optimizer  # at once: moments are large
        assert gone() is None and moment() is None
    finally:
        gc.enable()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    before = net.up.detach().clone()
    net.loss(1).backward()
    assert torch.equal(before, net.up) and net.up.grad is not None


# ---- what it costs -------------------------------------------------------------------------------


def test_no_plan_is_built_while_only_gradients_move(backend, monkeypatch):
    """With 400 parameters: neither at 64 nor at 300 does a memory end."""
    if backend.interpreted:
        pytest.skip("400 parameters are too many for the interpreter")
    builds, build = [], plan.build
    monkeypatch.setattr(plan, "build", lambda *a, **k: builds.append(1) or build(*a, **k))
    params = parameters([(8, 4), (4,)] * 200, backend)
    optimizer = APOLLO(params, rank=2, gradient_release=True)
    held, addresses = [], set()
    for step in range(5):
        for p in params:
            p.register_hook(lambda g: held.append(g.clone()) or held[-1])  # so that all move
        sum((p * (step + 1)).sum() for p in params).backward()
        addresses.add(held[-1].data_ptr())
        optimizer.step()
    assert len(builds) == 400
    assert len(addresses) == 5
    assert optimizer.stats()["updates"] == 5 * 400


def test_few_gradients_live_at_a_time(backend):
    """A chain of equal layers: of 12 gradients no more than two live at once."""
    layers, size = 12, 16
    params = parameters([(size, size)] * layers, backend)
    optimizer = APOLLO(params, rank=2, gradient_release=True)
    alive, most = [], []

    def count(grad):
        alive.append(weakref.ref(grad.untyped_storage()))
        most.append(sum(ref() is not None for ref in alive))

    def forward():
        h = randn((3, size), backend, seed=1)
        for p in params:
            h = torch.tanh(h @ p)
        return h.sum()

    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: None)
    handles = [p.register_hook(count) for p in params]
    forward().backward()
    optimizer.step()
    assert len(most) == layers and max(most) <= 2
    for handle in handles:
        handle.remove()


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "forward and backward", "step"])
def test_compiled_code_around_it(how):
    """With ``step`` there is nothing left to trace; a compiled backward breaks at each hook."""
    compiled = torch._dynamo.utils.counters["compiled_autograd"]

    def run(gradient_release):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
        optimizer = APOLLO(net.parameters(), rank=2, gradient_release=gradient_release)

        def backward():
            loss = net(torch.ones(2, 8)).square().sum()
            loss.backward()

        step = optimizer.step
        if how == "step":
            step = torch.compile(step, backend="eager")
        else:
            backward = torch.compile(backward, backend="aot_eager")
        for _ in range(3):
            before = compiled["captures"]
            backward()
            if gradient_release:
                assert all(p.grad is None for p in net.parameters())
            step()
            optimizer.zero_grad()
        assert how != "forward and backward" or before > 0
        return snapshot(optimizer), optimizer.stats()

    with torch._dynamo.config.patch(compiled_autograd=how == "forward and backward"):
        (expected, stats), (found, found_stats) = run(False), run(True)
    assert changed(expected, found) == set()
    assert found_stats == stats
