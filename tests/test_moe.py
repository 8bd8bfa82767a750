"""Mixtures of experts as people train them: transformers' models, and a module on grouped_mm.

Under fully_shard: test_distributed.py.
"""

import argparse
import copy
import io

import mixture
import pytest
import torch
from helpers import same, snapshot
from restatement import key_of_matrix, key_of_name
from torch import nn

from apollo_kernels import APOLLO, apollo, apollo_mini, estimate, param_groups, state
from apollo_kernels.__main__ import main
from apollo_kernels.commands import bench
from apollo_kernels.groups import choose_parameters

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture(params=[*mixture.KINDS, "grouped_mm"])
def made(request):
    """A model, its loss, and the names of what holds experts."""
    if request.param == "grouped_mm":
        return (
            mixture.grouped(dtype=torch.bfloat16, size=16),
            mixture.grouped_loss,
            ["mlp.w1", "mlp.w2"],
        )
    pytest.importorskip("transformers", minversion="5.0")
    model = mixture.of_transformers(request.param)
    names = [n for n, _ in model.named_parameters() if n.endswith(EXPERTS) and "shared" not in n]
    assert len(names) == 2
    return model, mixture.language_loss, names


def learn(model, loss, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("make", [apollo, apollo_mini])
def test_the_makers_give_each_expert_its_matrix(made, make, recwarn):
    model, _, names = made
    groups = make(model, weight_decay=0.1)
    APOLLO(groups)
    assert not [w for w in recwarn if "no effect" in str(w.message) or "three" in str(w.message)]
    by_name = {n: g for g in groups for n in g["param_names"]}
    assert sorted(by_name) == sorted(n for n, _ in model.named_parameters())
    assert [n for n, g in by_name.items() if g.get("batch_dims")] == names
    assert all(by_name[n]["rank"] and by_name[n]["weight_decay"] == 0.1 for n in names)
    for name in by_name:  # routers, norms, biases and the gate of a shared expert
        if any(part in name for part in (".gate.weight", "shared_expert_gate", "norm", "bias")):
            assert "rank" not in by_name[name], name
        if name.endswith("bias"):
            assert by_name[name]["weight_decay"] == 0, name


def test_a_model_trains_with_a_state_per_expert(made, backend):
    """[E, C, r] and [E]; each matrix steps as a parameter of its own with its key, to the bit."""
    model, loss, names = made
    if backend.interpreted and type(model).__name__ not in ("Model", "MixtralForCausalLM"):
        pytest.skip("seconds in Triton's interpreter, for the same two shapes")
    model.to(backend.device)
    optimizer = APOLLO(apollo(model, rank=2, update_proj_gap=2), lr=0.01, seed=3)
    experts = {n: p for n, p in model.named_parameters() if n in names}
    twins = {n: [nn.Parameter(m.clone()) for m in p.detach()] for n, p in experts.items()}
    apart = APOLLO([t for ts in twins.values() for t in ts], rank=2, lr=0.01, update_proj_gap=2)
    for name, ts in twins.items():
        for e, t in enumerate(ts):
            key = key_of_matrix(key_of_name(3, name), e)
            made_state = state.zeros(t, apart.param_groups[0], t.device)
            apart.state[t] = {**made_state, "seed": key}
    for step in range(3):
        optimizer.zero_grad()
        loss(model, step).backward()
        for name, p in experts.items():
            for t, g in zip(twins[name], p.grad, strict=True):
                t.grad = g.clone()
        optimizer.step()
        apart.step()
    for name, p in experts.items():
        own = optimizer.state[p]
        e, m, n = p.shape
        assert own["exp_avg"].shape == own["exp_avg_sq"].shape == (e, max(m, n), 2)
        assert own["update_norm"].shape == (e,) and own["step"] == 3
        assert own["seed"] == key_of_name(3, name)
        assert len(set(own["update_norm"].tolist())) > 1  # each has its limiter
        for i, t in enumerate(twins[name]):
            assert torch.equal(t, p[i]), (name, i)
            for key in ("exp_avg", "exp_avg_sq", "update_norm"):
                assert torch.equal(own[key][i], apart.state[t][key]), (name, i, key)


def test_a_resumed_mixture_continues_bit_for_bit(made):
    model, loss, _ = made
    optimizer = APOLLO(apollo(model, rank=2, update_proj_gap=2), lr=0.01)
    learn(model, loss, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    learn(model, loss, optimizer, range(3, 6))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = copy.deepcopy(model)
    other.load_state_dict(saved["model"])
    resumed = APOLLO(apollo(other, rank=2), lr=0.5)
    resumed.load_state_dict(saved["optimizer"])
    learn(other, loss, resumed, range(3, 6))
    expected = snapshot(optimizer)
    assert all(same(value, expected[key]) for key, value in snapshot(resumed).items())


# ---- what counts as experts ----------------------------------------------------------------------


class Filter(nn.Conv1d):
    """A convolution under another name."""


class Shapes(nn.Module):
    """What has three dimensions in models of transformers, beside a linear layer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv, self.filter = nn.Conv1d(8, 4, 3), Filter(8, 4, 3)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 4, 3))
        self.weights = nn.Parameter(torch.zeros(4, 8, 6))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position_embeddings = nn.Parameter(torch.zeros(4, 9, 8))
        self.queries = nn.Parameter(torch.zeros(1, 9, 8))
        self.heads = nn.Parameter(torch.zeros(16, 2, 8))  # [d, heads, size], as XLNet's
        self.scales = nn.Parameter(torch.zeros(4, 1, 8))
        self.experts = nn.Module()
        self.experts.w = nn.Parameter(torch.zeros(16, 4, 6))  # more of them than rows


def test_linear_takes_stacks_of_matrices_and_nothing_else_of_three_dimensions():
    chosen = {c.name: c for c in choose_parameters(Shapes(), "linear")}
    low = {name: c.batch_dims for name, c in chosen.items() if c.low_rank}
    assert low == {"linear.weight": 0, "weights": 1, "experts.w": 1}
    assert chosen["weights"].reason == "4 matrices; Shapes"
    assert chosen["conv.weight"].reason == "in Conv1d, not a linear layer"


@pytest.mark.parametrize("targets", ["all", ".", ["e", "o", "w"]])
def test_filters_and_cut_sides_stay_one_matrix_wherever_they_are_asked_for(targets):
    chosen = {c.name: c for c in choose_parameters(Shapes(), targets) if c.low_rank}
    counted = {name for name, c in chosen.items() if c.batch_dims}
    assert counted == {
        "weights", "cls_token", "position_embeddings", "queries", "scales", "experts.w",
    }  # fmt: skip
    groups = param_groups(Shapes(), rank=2, targets=targets)
    assert [g["batch_dims"] for g in groups if "rank" in g] == [0, 1]
    whole = {
        n for n in groups[0]["param_names"] if n.startswith(("conv", "filter", "normed", "heads"))
    }
    assert {
        "conv.weight",
        "filter.weight",
        "heads",
        "normed.parametrizations.weight.original1",
    } <= whole


def test_batch_dims_is_set_by_param_groups_and_not_for_all():
    with pytest.raises(ValueError, match="batch_dims=1 is not for all parameters"):
        param_groups(Shapes(), rank=2, batch_dims=1)


# ---- what is said of it --------------------------------------------------------------------------


def test_table_report_and_advice_speak_of_the_matrices(capsys):
    model = mixture.grouped()
    groups = param_groups(model, rank=2, verbose=True)
    table = capsys.readouterr().out
    for piece in ("3x10x18", "3 matrices; Grouped", "low-rank: 4 parameters (8 matrices)"):
        assert piece in table, piece
    report = APOLLO(groups).memory_report()
    assert [g.name for g in report.groups][:2] == [
        "0: rank 2 channel",
        "1: rank 2 channel, stacks of 3",
    ]
    assert report.groups[1].state_bytes == 2 * (8 + 3 * (8 + 2 * 8 * 18 * 2))  # float64
    columns = {len(line) for line in str(report).splitlines()[: len(report.groups) + 2]}
    assert len(columns) == 1  # the long name moves all of them


def test_a_report_recommends_batch_dims_for_experts_that_are_dense():
    model = mixture.grouped(dtype=torch.float32)
    experts = [p for n, p in model.named_parameters() if n.startswith("mlp.w")]
    low = {"params": [model.mix.weight], "rank": 2}
    before = APOLLO([low, {"params": experts}]).memory_report()
    after = APOLLO([low, {"params": experts, "rank": 2, "batch_dims": 1}]).memory_report()
    savings = {s.option: s.bytes for s in before.savings}
    assert savings["a group with rank 2 and batch_dims=1"] == before.state_bytes - after.state_bytes
    assert "embeddings=True" not in savings


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_the_estimate_counts_experts_as_the_optimizer_does(kind, tmp_path):
    pytest.importorskip("transformers", minversion="5.0")
    model = mixture.of_transformers(kind).to(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    rows = {e.mode: e for e in estimate.estimate(tmp_path, sequence=32, checkpointing=[True])}
    for mode, groups in (("APOLLO-Mini", apollo_mini(model)), ("APOLLO", apollo(model))):
        report = APOLLO(groups).memory_report()
        assert (rows[mode].weights, rows[mode].state) == (report.weight_bytes, report.state_bytes)


def kept_for_backward(model, tokens):
    """Bytes that autograd keeps of the layers, without the weights."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
    sizes = {a: t.untyped_storage().nbytes() for a, t in kept.items() if a not in own}
    return sum(sizes.values()), out


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_the_estimate_counts_what_a_mixture_keeps_for_backward(kind):
    """Per layer; transformers 5 with grouped_mm. The rest are the few numbers of the routers."""
    pytest.importorskip("transformers", minversion="5.10")
    wide = {"hidden_size": 128, "intermediate_size": 160}
    if kind != "Mixtral":
        wide["moe_intermediate_size"] = 96
    found, said = [], []
    for layers in (1, 3):
        model = mixture.of_transformers(kind, num_hidden_layers=layers, **wide).to(torch.bfloat16)
        found.append(kept_for_backward(model, 256)[0])
        a, (mode, *_) = estimate.of_config(model.config), estimate.MODES
        weights = estimate._weights(estimate.on_meta(a), mode, None, a.hidden)
        (moment, *_) = estimate._moments(a, weights, mode, 256, torch.bfloat16, False, "")
        assert moment[0] == "loss"
        said.append(moment[2])
    assert said[1] - said[0] == pytest.approx(found[1] - found[0], rel=0.05)


def test_mixtral_8x7b_takes_two_gigabytes_of_state_under_mini():
    """As AdamW's moments in float32 its experts took 361 GB."""
    module = estimate.on_meta(estimate.architecture("8x7b"))
    assert sum(p.numel() for p in module.parameters()) == 46_702_792_704
    rows = {e.mode: e for e in estimate.estimate("8x7b", checkpointing=[True])}
    h, f, v, layers = 4096, 14336, 32000, 32
    dense = 2 * v * h + layers * (8 * h + 2 * h) + h
    experts = layers * 8 * (2 * 2 * f + 2 * f + 2)  # C = 28672 and 14336 of M and V; a norm
    attention = layers * (2 * (2 * h + 1) + 2 * (2 * h + 1))
    assert rows["AdamW, bf16 moments"].state == 4 * 46_702_792_704
    expected = 8 * dense + 4 * (experts + attention)
    assert rows["APOLLO-Mini"].state == pytest.approx(expected, rel=1e-5)
    assert rows["Q-APOLLO-Mini, gradient release"].weights > 2 * layers * 8 * 3 * h * f
    for name, row in rows.items():  # quantize_ leaves experts, so it is no advice
        assert not ("release" in name and "quantize_" in estimate.advice(row)), name


def test_the_command_line_knows_mixtures(capsys):
    pytest.importorskip("transformers", minversion="5.0")
    assert main(["groups", "8x7b", "--mini"]) == 0
    table = capsys.readouterr().out
    assert "8x28672x4096" in table and "8 matrices; MixtralExperts" in table
    assert "1: rank 1 tensor, stacks of 8" in table
    asked = argparse.Namespace(model="8x7b", layers=2, rank=None, rounds=None)
    layer = bench._model(asked).layer
    assert layer.count((28672, 4096)) == layer.count((4096, 14336)) == 8
    assert layer.count((4096, 4096)) == layer.count((1024, 4096)) == 2


@pytest.mark.parametrize("change, piece", [
    ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3' is not known"),
    ({"model_type": "llama"}, "experts are not supported for model_type='llama'"),
    ({"decoder_sparse_step": 2}, "with and without experts in turn"),
    ({"num_experts_per_tok": None}, "num_experts_per_tok must be a whole number above 0, got None"),
])  # fmt: skip
def test_a_mixture_that_the_estimate_does_not_know_is_named(change, piece):
    config = {
        "model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    }  # fmt: skip
    assert estimate.of_config(config).experts == 4
    with pytest.raises(ValueError, match=piece):
        estimate.of_config({**config, **change})
