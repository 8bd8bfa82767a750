"""What goes low-rank, what goes dense, and that the user is told why."""

import pytest
import torch
from torch import nn

import apollo_kernels
from apollo_kernels import apollo, apollo_mini, param_groups


class Conv1D(nn.Module):
    """Hugging Face's transposed linear layer, known by its name."""

    def __init__(self, n_out, n_in):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))


class Model(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 32)
        self.down = Conv1D(16, 32)
        self.filter = nn.Conv2d(4, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight


def names(model, groups):
    """The names in each group: low-rank, dense with decay, dense without."""
    known = {p: name for name, p in model.named_parameters()}
    found = {"low": [], "decay": [], "plain": []}
    for group in groups:
        kind = "low" if group.get("rank") else "decay" if group["weight_decay"] else "plain"
        found[kind] += [known[p] for p in group["params"]]
    return {kind: set(value) for kind, value in found.items()}


def groups_of(model, **options):
    return names(model, param_groups(model, rank=4, weight_decay=0.1, **options))


VECTORS = {"up.bias", "down.bias", "filter.bias", "norm.weight", "norm.bias"}


def test_linear_layers_but_not_head_and_embedding_go_low_rank():
    assert groups_of(Model()) == {
        "low": {"up.weight", "down.weight"},
        "decay": {"embed.weight", "filter.weight", "lm_head.weight"},
        "plain": VECTORS,
    }


def test_embeddings_and_head_join_when_asked():
    found = groups_of(Model(), embeddings=True)
    assert found["low"] == {"up.weight", "down.weight", "embed.weight", "lm_head.weight"}


def test_all_takes_every_matrix():
    found = groups_of(Model(), targets="all")
    assert found["low"] | VECTORS == {name for name, _ in Model().named_parameters()}


@pytest.mark.parametrize("targets", [r"^(up|embed)\.", ["up", "embed"], ("up", "embed")])
def test_targets_may_be_a_regex_or_a_list(targets):
    assert groups_of(Model(), targets=targets)["low"] == {"up.weight", "embed.weight"}


def test_a_tied_weight_stands_once_and_stays_dense():
    model = Model(tied=True)
    groups = param_groups(model, rank=4)
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    assert "embed.weight" not in names(model, groups)["low"]
    assert "embed.weight" in names(model, param_groups(model, rank=4, targets="all"))["low"]


def test_frozen_parameters_stay_out():
    model = Model()
    model.up.weight.requires_grad_(False)
    assert groups_of(model)["low"] == {"down.weight"}


@pytest.mark.parametrize("targets", ["no_such_layer", [], ["nothing"]])
def test_targets_that_match_nothing_are_named(targets):
    with pytest.raises(ValueError, match="matches no parameter of Model"):
        param_groups(Model(), rank=4, targets=targets)


def test_the_table_tells_where_and_why(capsys):
    param_groups(Model(), rank=4, verbose=True)
    text = capsys.readouterr().out
    for piece in ("up.weight", "32x16", "Linear", "Conv1D", "embedding", "output head", "2 params"):
        assert piece.replace("params", "parameters") in text


def test_presets_are_the_paper_s():
    low = apollo_mini(Model())[0]
    assert (low["rank"], low["scale_type"], low["scale"]) == (1, "tensor", 128.0)
    low = apollo(Model())[0]
    assert (low["rank"], low["scale_type"], low["scale"]) == (4, "channel", 1.0)  # a quarter of 16
    assert apollo(Model(), rank=7)[0]["rank"] == 7


def test_hugging_face_llama_goes_as_in_the_paper():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    groups = apollo(model, lr=0.5)
    assert groups[0]["rank"] == 8 and all(g["lr"] == 0.5 for g in groups)
    assert len(groups[0]["params"]) == 14
    found = names(model, groups)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= found["plain"]


def test_the_optimizer_takes_what_the_makers_return():
    for maker in (apollo, apollo_mini):
        model = Model()
        optimizer = apollo_kernels.APOLLOAdamW(maker(model, weight_decay=0.1), lr=0.01)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert len(optimizer.state) == len(list(model.parameters()))


# ---- what is said of dense moments -------------------------------------------------------------


def test_a_table_and_a_report_recommend_what_saves_dense_moments(capsys):
    """[20, 16] twice, 1.3 of 3 weights: 5120 bytes of moments, of 9452 in all."""
    model = Model()
    groups = param_groups(model, rank=4, verbose=True)
    table = capsys.readouterr().out
    report = apollo_kernels.APOLLO(groups).memory_report()
    matrices, vectors = [320, 320, 144], [32, 16, 4, 16, 16]
    dense = sum(matrices) + sum(vectors)
    blocks = [20, 20, 4, 1, 1, 1, 1, 1]
    assert report.dense_moment_bytes == 8 * dense
    savings = {s.option: s.bytes for s in report.savings}
    # the report cannot tell a filter from an embedding: [4, 36], whose channels are its columns
    low_rank = 3 * 4 + 8 * 4 * (20 + 20 + 36)
    assert savings == {
        "embeddings=True": 8 * sum(matrices) - low_rank,
        'dense_state="bfloat16"': 4 * dense,
        'dense_state="int8"': 6 * dense - 8 * sum(blocks),
    }
    for saving in report.savings:
        assert f"{saving.option} would save {saving.bytes / 1e6:,.3f} MB" in str(report)
    moved = 8 * 640 - 2 * 4 - 8 * 4 * 40
    line = f"embeddings=True would save {moved / 1e6:,.3f} MB (embed.weight, lm_head.weight)"
    assert line in table
    assert 'dense_state="bfloat16" would save' in table


def test_what_was_saved_is_what_the_report_said():
    model = Model()
    options = {"rank": 4, "scale_type": "tensor"}

    def report(**more):
        return apollo_kernels.APOLLO(param_groups(model, **options, **more)).memory_report()

    before = report()
    savings = {s.option: s.bytes for s in before.savings}
    for dense_state in ("bfloat16", "int8"):
        less = before.state_bytes - report(dense_state=dense_state).state_bytes
        assert less == savings[f'dense_state="{dense_state}"']
    moved = before.state_bytes - report(targets="all").state_bytes
    assert moved == savings["embeddings=True"]


def test_nothing_is_recommended_where_dense_moments_are_few(capsys):
    """A third of the state is the limit, on either side of it."""
    p, q = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(253))
    groups = [{"params": [p], "rank": 8}, {"params": [q]}]  # 4100 + 16 bytes beside them
    few = apollo_kernels.APOLLO(groups).memory_report()
    assert few.dense_moment_bytes == 2024 and not few.savings and "would" not in str(few)
    groups[1]["params"] = [nn.Parameter(torch.zeros(260))]
    much = apollo_kernels.APOLLO(groups).memory_report()
    assert [s.option for s in much.savings] == ['dense_state="bfloat16"', 'dense_state="int8"']
    param_groups(Model(), rank=4, targets="all", verbose=True)
    assert "would" not in capsys.readouterr().out


def test_a_report_names_parameters_where_it_knows_them():
    optimizer = apollo_kernels.APOLLO([("wte", nn.Parameter(torch.zeros(50, 8)))])
    assert "(wte)" in str(optimizer.memory_report())
