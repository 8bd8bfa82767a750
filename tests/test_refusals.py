"""What no step may rest on is refused before anything is written, compiled steps included."""

import copy
import threading

import pytest
import torch
from helpers import changed, fill, parameter, parameters, refuses, snapshot, train

from apollo_kernels import APOLLO, reference


def pair(backend, **options):
    """Two parameters in two groups that have taken a step."""
    params = parameters([(16, 8), (16, 8)], backend)
    optimizer = APOLLO([{"params": [p]} for p in params], rank=4, **options)
    train(params, optimizer, backend, range(1))
    fill(params, backend, 1)
    return params, optimizer


def half(state):
    state["exp_avg_sq"] = state["exp_avg_sq"].half()


def negative_key(state):
    state["seed"] = -3


def float_step(state):
    state["step"] = torch.ones((), device=state["step"].device)


def negative_step(state):
    state["step"].fill_(-5)


def overlapping(state):
    state["exp_avg"] = torch.zeros((), device=state["step"].device).expand(16, 4)


@pytest.mark.parametrize(
    "damage, match, compiled",
    [
        (half, "exp_avg_sq", False), (negative_key, "seed", False), (float_step, "step", False),
        (overlapping, "overlaps", False), (half, "exp_avg_sq", True),  # whose checks are the same
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_moves_nothing(backend, damage, match, compiled):
    params, optimizer = pair(backend)
    damage(optimizer.state[params[1]])
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    refuses(optimizer, step, match=f"{match}.*parameter 1|parameter 1.*{match}")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_parameter_that_stands_in_two_groups_moves_nothing(backend, compiled):
    params, optimizer = pair(backend)
    optimizer.param_groups[1]["params"].append(params[0])
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    refuses(optimizer, step, match="twice")


def test_a_negative_step_on_the_host_is_refused(backend):
    params, optimizer = pair(backend)
    if backend.device.type != "cpu":
        pytest.skip("reading a step would wait for the device")
    optimizer.state[params[1]]["step"] = torch.tensor(-5)
    refuses(optimizer, optimizer.step, match="step of parameter 1.*-5")


def test_a_weight_that_overlaps_itself_is_refused(backend):
    params, optimizer = pair(backend)
    params[1].data = torch.ones(8, device=backend.device).expand(16, 8)
    refuses(optimizer, optimizer.step, match="weight of parameter 1.*overlaps itself")


def test_two_states_in_one_memory_are_refused(backend):
    p, q = parameters([(16, 8), (16, 8)], backend)
    optimizer = APOLLO([p, q], rank=4)
    train([p, q], optimizer, backend, range(1))
    optimizer.state[q]["step"] = optimizer.state[p]["step"]
    refuses(optimizer, optimizer.step, match="step of parameter 1.*memory")


def test_a_gradient_whose_storage_was_freed_is_refused(backend):
    params, optimizer = pair(backend)
    params[1].grad.untyped_storage().resize_(0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="gradient of parameter 1.*no memory"):
        optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


def test_a_parameter_without_memory_is_refused(backend):
    params, optimizer = pair(backend)
    nothing = torch.nn.Parameter(torch.empty(4, 4, device="meta"))
    nothing.grad = torch.empty_like(nothing)
    optimizer.add_param_group({"params": [nothing]})
    weights = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="parameter 2.*without memory"):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert nothing not in optimizer.state


def test_a_negative_view_as_gradient_is_refused(backend):
    """Kernels walk its memory, where the sign is the other one."""
    params, optimizer = pair(backend)
    params[1].grad = torch._neg_view(-params[1].grad)
    refuses(optimizer, optimizer.step, match="parameter 1.*negative view", error=RuntimeError)


def test_a_list_of_betas_is_checked_again_when_it_has_changed(backend):
    _, optimizer = pair(backend)
    optimizer.param_groups[1]["betas"] = [0.9, 0.99]
    optimizer.step()
    optimizer.param_groups[1]["betas"][1] = 7.0
    refuses(optimizer, optimizer.step, match="betas must be .*group 1")


def test_a_group_that_lost_a_key_is_named(backend):
    _, optimizer = pair(backend)
    del optimizer.param_groups[1]["rank"]
    refuses(optimizer, optimizer.step, match="'rank' is missing.*group 1")


@pytest.mark.parametrize(
    "wrong",
    [{}, {"state": {}}, {"state": 3, "param_groups": []}, {"state": {}, "param_groups": [{}]}],
)
def test_what_is_no_state_dict_is_refused(wrong):
    optimizer = APOLLO([torch.nn.Parameter(torch.ones(4, 4))])
    with pytest.raises(ValueError, match="state_dict must be"):
        optimizer.load_state_dict(wrong)


@pytest.mark.parametrize(
    "key, value", [("update_norm", float("nan")), ("update_norm", -1.0), ("exp_avg", float("inf"))]
)
def test_numbers_that_cannot_be_right_are_not_loaded(backend, key, value):
    _, optimizer = pair(backend)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][key].fill_(value)
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), match=f"{key} of parameter 1")


# ---- what was refused, or failed, and must not be ------------------------------------------------


def test_entries_of_the_state_that_are_no_parameters_are_left_alone(backend):
    _, optimizer = pair(backend)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][9] = {"step": torch.tensor(3)}
    optimizer.load_state_dict(saved)
    optimizer.state["mine"] = {"step": 3}
    copy.deepcopy(optimizer)
    optimizer.step()


def test_swap_tensors_works_after_a_step(backend):
    (p, _), optimizer = pair(backend)
    p.grad = None
    torch.utils.swap_tensors(p, torch.nn.Parameter(torch.ones(16, 8, device=backend.device)))
    fill([p], backend, 1)
    optimizer.step()
    assert not torch.equal(p, torch.ones_like(p))


def test_an_infinite_limit_only_measures(backend):
    p, q = parameter((16, 8), backend), parameter((16, 8), backend)
    a, b = APOLLO([p], rank=4, max_grad_norm=float("inf")), APOLLO([q], rank=4)
    train([p], a, backend, range(1))
    train([q], b, backend, range(1))
    # separate sums of |R| and |N|: units of float32 in s
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(a.grad_norm, p.grad.norm(), rtol=1e-5, atol=0)
    a.max_grad_norm = None
    a.step()
    assert a.grad_norm is None


def test_a_gradient_that_comes_and_goes_draws_no_projection_anew(monkeypatch):
    """A plan that is built anew finds the P of its parameters, whose state still is the same."""
    drawn = []
    draw = reference.draw
    monkeypatch.setattr(reference, "draw", lambda *a, **k: (drawn.append(a), draw(*a, **k))[1])
    p, q = (torch.nn.Parameter(torch.randn(8, 8)) for _ in "pq")
    optimizer = APOLLO([p, q], rank=4, backend="torch")
    for step in range(4):
        p.grad = torch.randn(8, 8)
        q.grad = torch.randn(8, 8) if step % 2 == 0 else None
        optimizer.step()
    assert len(drawn) == 2


def test_optimizers_of_several_threads_share_the_cache_of_projections():
    failures = []

    def work():
        try:
            params = [torch.nn.Parameter(torch.ones(8, 8)) for _ in range(40)]
            optimizer = APOLLO(params, rank=4, update_proj_gap=1, backend="torch")
            for _ in range(3):
                for p in params:
                    p.grad = torch.ones(8, 8)
                optimizer.step()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
