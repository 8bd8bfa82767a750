"""``convert``: other optimizers' files become ours, by name, and nothing is lost or overwritten."""

import os
import pickle
import sys
import types

import pytest
import torch

from apollo_kernels import APOLLO, apollo, projection_matrix
from apollo_kernels.__main__ import main

RANK = 4


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 16)
        self.up = torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 16)
        self.lm_head = torch.nn.Linear(16, 20, bias=False)


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(16, 24, bias=False)


class SVD:
    """What GaLore's projector is, to pickle and to the converter; a random basis will do."""

    def __init__(self, matrix):
        self.ortho_matrix, self.rank, self.proj_type = matrix, RANK, "std"


@pytest.fixture
def net(monkeypatch, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "mine.py").write_text(
        "from test_convert import Net, Plain\n"
        "def groups(model):\n"
        "    named = dict(model.named_parameters())\n"
        "    first = [named.pop('down.bias'), named.pop('up.weight')]\n"
        "    return [{'params': first}, {'params': list(named.values())}]\n"
    )
    monkeypatch.chdir(tmp_path)
    yield Net()
    sys.modules.pop("mine", None)


@pytest.fixture
def galore(monkeypatch):
    """A stand-in for the published module: only its name matters to pickle."""
    package, module = types.ModuleType("galore_torch"), types.ModuleType("galore_torch.projector")
    module.SVD = type("SVD", (SVD,), {"__module__": "galore_torch.projector"})
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    monkeypatch.setitem(sys.modules, "galore_torch.projector", module)
    return module


def train(params, optimizer, steps=3):
    for step in range(steps):
        for i, p in enumerate(params):
            torch.manual_seed(100 * step + i)
            p.grad = torch.randn_like(p)
        optimizer.step()


def convert(*words, code=0, model="mine:Net"):
    assert main(["convert", model, *map(str, words)]) == code


def split(net):
    """The two kinds, each in the model's order."""
    low = [net.up.weight, net.down.weight]
    return low, [p for p in net.parameters() if all(p is not q for q in low)]


def test_adamw_s_moments_go_through_the_projection(net, capsys):
    params = list(net.parameters())
    adamw = torch.optim.AdamW(params, lr=1e-3, betas=(0.8, 0.9), weight_decay=0.05)
    train(params, adamw)
    torch.save({"epoch": 7, "optimizer": adamw.state_dict()}, "adamw.pt")
    convert("adamw.pt", "ours.pt", "--rank", RANK, "--lr", 0.02)
    assert "AdamW's state (model.parameters()): 2 low-rank and 4 dense" in capsys.readouterr().out
    whole = torch.load("ours.pt", weights_only=True)
    assert whole["epoch"] == 7
    ours = APOLLO(apollo(net, rank=RANK), lr=5.0)
    ours.load_state_dict(whole["optimizer"])
    for group in ours.param_groups:
        assert group["lr"] == 0.02 and group["betas"] == (0.8, 0.9)
        assert group["weight_decay"] == 0.05
    for p, name in ((net.up.weight, "up.weight"), (net.down.weight, "down.weight")):
        theirs, own = adamw.state[p], ours.state[p]
        fresh = Net()
        assert own["seed"] == APOLLO(apollo(fresh)).key_of(dict(fresh.named_parameters())[name])
        projection = projection_matrix(own["seed"], 0, RANK, 16)
        rows = p.shape[0] > p.shape[1]
        m, v = (theirs[k] if rows else theirs[k].t() for k in ("exp_avg", "exp_avg_sq"))
        assert torch.allclose(own["exp_avg"], m @ projection.t(), atol=1e-6)
        assert torch.allclose(own["exp_avg_sq"], v @ projection.square().t(), atol=1e-6)
        assert own["step"] == 3 and own["update_norm"] == 0
    for p in (net.embed.weight, net.down.bias):
        assert torch.equal(ours.state[p]["exp_avg"], adamw.state[p]["exp_avg"])
    train(params, ours)


def test_moments_are_in_the_projection_of_the_next_step(net):
    """The first moment of a run of AdamW, projected after two redraws, is that of the gradients
    that the next step's projection would have seen."""
    params = list(net.parameters())
    adamw = torch.optim.AdamW(params, lr=1e-3)
    train(params, adamw, steps=400)
    torch.save(adamw.state_dict(), "adamw.pt")
    convert("adamw.pt", "ours.pt", "--rank", RANK, "--lr", 0.02)
    own = torch.load("ours.pt", weights_only=True)["state"][0]
    assert own["step"] == 400
    p = projection_matrix(own["seed"], 2, RANK, 16)
    assert torch.allclose(own["exp_avg"], adamw.state[net.up.weight]["exp_avg"] @ p.t(), atol=1e-6)


def test_galore_s_moments_change_their_basis(net, galore, capsys):
    low, dense = split(net)
    state, bases = {}, {}
    for i, p in enumerate([*dense, *low]):
        shape = p.shape
        state[i] = {"step": 30}
        if i >= len(dense):
            tall = p.shape[0] >= p.shape[1]
            basis = torch.linalg.qr(torch.randn(16, RANK))[0]  # [K, r]
            state[i]["projector"] = galore.SVD(basis.t() if tall else basis)
            shape = (24, RANK) if tall else (RANK, 24)
            bases[p] = basis
        state[i].update(exp_avg=torch.randn(shape), exp_avg_sq=torch.rand(shape))
    keys = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}
    groups = [{"params": [0, 1, 2, 3], **keys}]
    groups += [{"params": [4, 5], "rank": RANK, "update_proj_gap": 50, "scale": 0.25,
                "proj_type": "std", **keys}]  # fmt: skip
    torch.save({"state": state, "param_groups": groups}, "galore.pt")
    convert("galore.pt", "ours.pt", code=2)
    assert "--allow-unsafe-pickle" in capsys.readouterr().err
    convert("galore.pt", "ours.pt", "--allow-unsafe-pickle")
    ours = APOLLO([{"params": dense}, {"params": low, "rank": RANK}])
    ours.load_state_dict(torch.load("ours.pt", weights_only=True))
    assert ours.param_groups[1]["scale"] == 1.0  # not GaLore's
    for i, p in enumerate(low, len(dense)):
        own, tall = ours.state[p], p.shape[0] >= p.shape[1]
        through = (projection_matrix(own["seed"], 0, RANK, 16) @ bases[p]).t()
        m, v = (state[i][k] if tall else state[i][k].t() for k in ("exp_avg", "exp_avg_sq"))
        assert torch.allclose(own["exp_avg"], m @ through, atol=1e-5)
        assert torch.allclose(own["exp_avg_sq"], v @ through.square(), atol=1e-5)


def test_keys_by_position_become_keys_by_name(net, capsys):
    low, dense = split(net)
    old = APOLLO([{"params": low, "rank": RANK}, {"params": dense}], lr=1e-2, seed=3)
    train([*low, *dense], old)
    torch.save(old.state_dict(), "old.pt")
    convert("old.pt", "new.pt", "--seed", 3)
    out = capsys.readouterr().out
    assert "apollo_kernels's state (low-rank and the rest): 2 low-rank" in out
    assert "2 keys replaced" in out
    named = APOLLO(apollo(net, rank=RANK), seed=3)
    new = torch.load("new.pt", weights_only=True)
    for i, p in enumerate(low):
        before = old.state[p]
        assert new["state"][i]["seed"] == named.key_of(p) != before["seed"]
        assert torch.equal(new["state"][i]["exp_avg"], before["exp_avg"])
        assert new["state"][i]["update_norm"] == before["update_norm"]
    convert("new.pt", "again.pt", "--seed", 3)
    assert "(names in the file)" in (out := capsys.readouterr().out) and "0 keys replaced" in out


def test_groups_that_no_usual_way_makes_are_asked_for(net, capsys):
    named = dict(net.named_parameters())
    first = [named.pop("down.bias"), named.pop("up.weight")]
    params = [*first, *named.values()]
    adamw = torch.optim.AdamW([{"params": first}, {"params": list(named.values())}], lr=1e-3)
    train(params, adamw)
    torch.save(adamw.state_dict(), "adamw.pt")
    convert("adamw.pt", "ours.pt", "--lr", 0.01, code=2)
    error = capsys.readouterr().err
    assert "groups of [2, 4] parameters without names" in error and "--groups" in error
    convert("adamw.pt", "ours.pt", "--lr", 0.01, "--groups", "mine:groups")
    ours = APOLLO(apollo(net, rank=RANK), lr=0.01)
    ours.load_state_dict(torch.load("ours.pt", weights_only=True))
    theirs = adamw.state[net.down.bias]["exp_avg"]
    assert torch.equal(ours.state[net.down.bias]["exp_avg"], theirs)


def test_two_ways_to_make_the_same_groups_are_one(net):
    plain = Plain()
    adamw = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    train(list(plain.parameters()), adamw)
    torch.save(adamw.state_dict(), "adamw.pt")
    convert("adamw.pt", "ours.pt", "--lr", 0.01, model="mine:Plain")
    assert len(torch.load("ours.pt", weights_only=True)["state"]) == 1


def test_what_exists_is_replaced_by_force_alone(net, capsys, tmp_path):
    params = list(net.parameters())
    adamw = torch.optim.AdamW(params, lr=1e-3)
    train(params, adamw)
    torch.save(adamw.state_dict(), "run.pt")
    before = (tmp_path / "run.pt").read_bytes()
    convert("run.pt", "run.pt", "--lr", 0.01, code=2)
    assert "'run.pt' exists: add --force" in capsys.readouterr().err
    assert (tmp_path / "run.pt").read_bytes() == before
    convert("run.pt", "run.pt", "--lr", 0.01, "--force")
    assert "update_norm" in torch.load("run.pt", weights_only=True)["state"][0]
    assert sorted(p.name for p in tmp_path.glob("*.pt*")) == ["run.pt"]


class Foreign:
    """What runs code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def mistake(name, net):
    """A file that is none, by what is wrong with it."""
    params = list(net.parameters())
    adamw = torch.optim.AdamW(params, lr=1e-3)
    train(params, adamw, 1)
    good = adamw.state_dict()
    if name == "text":
        return b"no file of torch"
    if name == "empty":
        return b""
    if name == "pickle":
        return pickle.dumps(Foreign())
    if name == "objects":
        return {**good, "more": Foreign()}
    if name == "fresh":
        return {**good, "state": {}}
    if name == "list":
        return [1, 2]
    if name == "sgd":
        sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        train(params, sgd, 1)
        return sgd.state_dict()
    if name == "nan":
        good["state"][0]["exp_avg"] = torch.full_like(params[0], torch.nan)
    if name == "shape":
        good["state"][1]["exp_avg_sq"] = torch.zeros(3)
    return good


@pytest.mark.parametrize(
    ("name", "words", "piece"),
    [
        ("text", [], "is no file of torch.save"),
        ("empty", [], "is no file of torch.save"),
        ("pickle", [], "is no file of torch.save"),
        ("objects", [], "in.pt holds Python objects"),
        ("fresh", ["--lr", 1], "no state of AdamW, GaLore or APOLLO: it holds nothing"),
        ("good", ["--lr", "nan"], "lr must be a number >= 0, got nan"),
        ("good", ["--lr", 1, "--rank", 0], "--rank must be at least 1, got 0"),
        ("good", ["--lr", 1, "--groups", "mine"], "'mine' cannot be imported"),
        ("list", [], "holds no optimizer's state_dict"),
        ("sgd", ["--lr", 1], "no state of AdamW, GaLore or APOLLO: it holds ['momentum_buffer']"),
        ("nan", ["--lr", 1], "exp_avg of parameter 'embed.weight' (0 of group 1) holds NaN"),
        ("shape", ["--lr", 1], "the moments of parameter 'up.weight'"),
        ("good", [], "say --lr"),
        ("good", ["--lr", -1], "lr must be"),
        ("good", ["--lr", 1, "--groups", "mine:Net"], "mine:Net raised TypeError"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(name, words, piece, net, tmp_path, capsys):
    content = mistake(name, net)
    if isinstance(content, bytes):
        (tmp_path / "in.pt").write_bytes(content)
    else:
        torch.save(content, "in.pt")
    convert("in.pt", "out.pt", *words, code=2)
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
    assert not (tmp_path / "out.pt").exists() and not (tmp_path / "ran").exists()
    convert("nowhere.pt", "out.pt", code=2)
    assert "no such file: 'nowhere.pt'" in capsys.readouterr().err
    for target in ("nowhere/out.pt", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        convert("in.pt", target, "--force", code=2)
        assert "a folder that exists" in capsys.readouterr().err
    if sys.platform == "linux":  # where nobody can write, told before anything is read
        convert("nowhere.pt", "/proc/out.pt", code=2)
        assert "/proc/out.pt: No such file or directory" in capsys.readouterr().err
