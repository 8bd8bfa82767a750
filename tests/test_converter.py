"""A run of the published package goes on here."""

import sys
import types

import pytest
import torch

from apollo_kernels import APOLLO, load_apollo_torch

SHAPES = [(12, 8), (8, 12), (5,)]


def published_state(module):
    """What apollo_torch writes: moments beside a projector object, laid out [m, r] or [r, n]."""
    torch.manual_seed(0)
    state = {}
    for i, shape in enumerate(SHAPES):
        moments = {2: (12, 4) if shape == (12, 8) else (4, 12), 1: shape}[len(shape)]
        state[i] = {"step": 30, "seed": i + 1}
        state[i]["exp_avg"] = torch.randn(moments).bfloat16()
        state[i]["exp_avg_sq"] = torch.rand(moments).bfloat16()
        if len(shape) == 2:
            projector = module.GradientProjector()
            projector.rank, projector.ortho_matrix = 4, torch.randn(4, 8)
            state[i].update(projector=projector, scaled_grad=torch.tensor(0.25).bfloat16())
    state[2].pop("seed")
    low = {"rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
    groups = [
        {"params": [0, 1], "lr": 0.02, "update_proj_gap": 10, **low},
        {"params": [2], "lr": 0.02},
    ]
    return {"state": state, "param_groups": groups}


@pytest.fixture
def module(monkeypatch):
    """A stand-in for the published module: only its name and the class's matter to pickle."""
    package, module = types.ModuleType("apollo_torch"), types.ModuleType("apollo_torch.projector")
    projector = type("GradientProjector", (), {"__module__": "apollo_torch.projector"})
    module.GradientProjector = projector
    monkeypatch.setitem(sys.modules, "apollo_torch", package)
    monkeypatch.setitem(sys.modules, "apollo_torch.projector", module)
    return module


@pytest.fixture
def optimizer():
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s).bfloat16()) for s in SHAPES]
    return APOLLO([{"params": params[:2], "rank": 4}, {"params": params[2:]}])


def check(optimizer, saved):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    for i, p in enumerate(params):
        state, theirs = optimizer.state[p], saved["state"][i]
        moment = theirs["exp_avg"].float()
        expected = moment.t() if p.shape == (8, 12) else moment
        assert torch.equal(state["exp_avg"], expected)
        assert state["exp_avg_sq"].dtype == torch.float32 and float(state["step"]) == 30
        if p.dim() == 2:
            assert float(state["update_norm"]) == 0.25 and type(state["seed"]) is int
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert optimizer.param_groups[0]["update_proj_gap"] == 10
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert all(float(s["step"]) == 31 for s in optimizer.state.values())


def test_a_published_state_dict_is_taken_over(module, optimizer):
    saved = published_state(module)
    load_apollo_torch(optimizer, saved)
    check(optimizer, saved)


def test_a_published_file_needs_an_opt_in_and_not_the_package(
    module, optimizer, tmp_path, monkeypatch
):
    saved = published_state(module)
    path = tmp_path / "optimizer.pt"
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"optimizer\.pt.*allow_unsafe_pickle=True"):
        load_apollo_torch(optimizer, path)
    assert not optimizer.state
    monkeypatch.delitem(sys.modules, "apollo_torch.projector")
    monkeypatch.delitem(sys.modules, "apollo_torch")
    with path.open("rb") as file, pytest.raises(ValueError, match="allow_unsafe_pickle=True"):
        load_apollo_torch(optimizer, file)
    with pytest.warns(UserWarning, match="can run any code"):
        load_apollo_torch(optimizer, path, allow_unsafe_pickle=True)
    check(optimizer, saved)


def test_a_state_from_before_the_first_step_stays_empty(module, optimizer):
    saved = published_state(module)
    saved["state"] = {i: {"seed": i + 1} for i in range(3)}
    load_apollo_torch(optimizer, saved)
    assert not optimizer.state


def test_other_groups_and_other_ranks_are_refused(module, optimizer):
    saved = published_state(module)
    saved["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="parameter groups"):
        load_apollo_torch(optimizer, saved)
    saved = published_state(module)
    saved["param_groups"][0]["rank"] = 3
    with pytest.raises(ValueError, match="does not fit"):
        load_apollo_torch(optimizer, saved)
    assert not optimizer.state
