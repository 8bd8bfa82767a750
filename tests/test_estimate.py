"""``python -m apollo_kernels estimate``: bytes as they will be, and one line for wrong input."""

import json
import os

import pytest
import torch

from apollo_kernels import APOLLO, apollo, apollo_mini, estimate
from apollo_kernels.__main__ import main

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("8B", 8_030_261_248)],
)
def test_presets_have_the_published_number_of_parameters(name, parameters):
    module = estimate.on_meta(estimate.architecture(name))
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_state_is_what_the_optimizer_will_make():
    module = estimate.on_meta(estimate.architecture("60m"))
    rows = {e.mode: e for e in estimate.estimate("60m", checkpointing=[True])}
    for mode, made in (
        ("APOLLO", apollo(module, rank=128)),
        ("APOLLO-Mini", apollo_mini(module)),
        ("APOLLO-Mini, int8 dense moments", apollo_mini(module, dense_state="int8")),
        ("APOLLO-Mini, gradient release, embeddings", apollo_mini(module, embeddings=True)),
    ):
        report = APOLLO(made, lr=1e-3).memory_report()
        assert (rows[mode].state, rows[mode].weights) == (report.state_bytes, report.weight_bytes)


def test_states_of_the_others_follow_their_formulas():
    n = sum(p.numel() for p in estimate.on_meta(estimate.architecture("60m")).parameters())
    rows = {e.mode: e.state for e in estimate.estimate("60m", checkpointing=[True])}
    assert rows["AdamW, float32 moments"] == 8 * n
    assert rows["AdamW, bf16 moments"] == 4 * n
    assert rows["8-bit Adam"] == pytest.approx(2 * n * (1 + 4 / 256), rel=1e-3)
    h, f, r = 512, 1376, 128  # paper, Table 1: 2nr + mr for a matrix [m, n], m <= n; in bf16
    galore = 8 * (4 * 3 * h * r + 3 * (2 * f * r + h * r)) * 2 + 4 * (2 * 32000 * h + 17 * h)
    assert rows["GaLore"] == galore


def test_a_config_file_and_a_module_on_the_meta_device_say_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    by_file = estimate.estimate(tmp_path / "config.json", batch=2, sequence=32)
    assert by_file == estimate.estimate(module, batch=2, sequence=32)
    assert by_file == estimate.estimate(tmp_path, batch=2, sequence=32)


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 32,
    "vocab_size": 128,
}  # fmt: skip
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
MIXTURE |= {"shared_expert_intermediate_size": 16}
BIASES = ("attention_bias", "qkv_bias", "mlp_bias")
CHANGES = {
    "as few keys as can be": {},
    "few heads of a size": {"num_key_value_heads": 2, "head_dim": 4},
    "biases": dict.fromkeys(BIASES, True),
    "no biases": dict.fromkeys(BIASES, False),
    "tied": {"tie_word_embeddings": True},
    "not tied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", estimate._KINDS)
def test_every_kind_has_the_parameters_that_transformers_gives_it(kind, change):
    transformers = pytest.importorskip("transformers", minversion="5.10")
    config = {**SIZES, **CHANGES[change], "model_type": kind, "pad_token_id": 0}
    if kind in estimate._MIXTURES:
        number = "num_local_experts" if kind == "mixtral" else "num_experts"
        config |= {number: 4, **MIXTURE}
    theirs = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {n.removeprefix("model."): p.shape for n, p in model.named_parameters()}
    for asked in (config, theirs, json.loads(theirs.to_json_string())):  # the last: what is saved
        ours = estimate.on_meta(estimate.of_config(asked))
        assert {n: p.shape for n, p in ours.named_parameters()} == expected


@pytest.mark.parametrize("kind", ["bert", "gpt_neox", "gemma", "gemma2", "phi3", None])
def test_a_config_of_a_kind_that_is_not_known_is_refused(kind):
    config = {**SIZES, "model_type": kind}
    with pytest.raises(ValueError, match=f"model_type={kind!r} is not known .* supported are llam"):
        estimate.of_config(config)
    with pytest.raises(ValueError, match="model_type='mixtral' without a number of experts"):
        estimate.of_config({**config, "model_type": "mixtral"})


def test_more_tokens_cost_activations_and_checkpointing_saves_them():
    def activations(batch, checkpointed):
        found = estimate.estimate("7b", batch=batch, checkpointing=[checkpointed])
        return next(e.activations for e in found if e.mode == "APOLLO-Mini")

    assert activations(8, True) < activations(8, False)
    # Without checkpointing all of it is proportional to the tokens.
    assert activations(16, False) == 2 * activations(8, False)


def test_text_names_the_cards_the_largest_part_and_what_to_change(capsys):
    assert main(["estimate", "8b", "--checkpointing", "on"]) == 0
    text = capsys.readouterr().out
    line = next(row for row in text.splitlines() if row.startswith("APOLLO-Mini, gradient release"))
    assert line.endswith("24 GB and larger")
    assert "AdamW, float32 moments: 67% state -> apollo_mini" in text
    assert "APOLLO-Mini: 40% weights -> gradient_release=True" in text


def test_json_is_machine_readable_and_adds_up(capsys):
    assert main(["estimate", "7b", "--json", "--batch", "4", "--sequence", "256"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * len(estimate.MODES)
    for row in rows:
        assert row["peak"] == sum(row[part] for part in estimate.PARTS)
        assert row["dominant"] == max(estimate.PARTS, key=row.get) and row["advice"]


def test_distributed_modes_count_the_buckets():
    def peak(ddp):
        found = estimate.estimate("13b", ddp=ddp, sequence=256, checkpointing=[True])
        return {e.mode: e.peak for e in found}["APOLLO-Mini"]

    plain, buckets, views = map(peak, ("", "buckets", "views"))
    gradients = 2 * 13_015_864_320
    assert buckets == plain + gradients
    assert plain <= views < plain + 1e9  # one gradient more at a time, and activations
    released = [m.name for m in estimate.MODES if m.release]
    assert not {e.mode for e in estimate.estimate("7b", ddp="views")} & set(released)


def test_png_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bars.png"
    assert main(["estimate", "7b", "--png", str(path)]) == 0
    assert main(["estimate", "7b", "--png", str(path)]) == 2
    assert "bars.png' exists: add --force to replace it" in capsys.readouterr().err
    assert main(["estimate", "7b", "--png", str(path), "--force"]) == 0
    assert path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "piece"),
    [
        (["70x"], "'70x' is neither a file nor one of"),
        (["broken.json"], "is no JSON file"),
        (["list.json"], "config.json holds no dict"),
        (["lacks.json"], "vocab_size must be a whole number above 0, got None"),
        (["experts.json"], "experts are not supported"),
        (["gemma.json"], "model_type='gemma' is not known to be built as LLaMA is"),
        (["."], "model '.' is neither a file nor one of"),
        (["bytes.json"], "bytes.json is no JSON file: 'utf-8' codec"),
        (["head_dim=-2"], "head_dim must be a whole number above 0, got -2"),
        (["num_key_value_heads=0"], "num_key_value_heads must be a whole number above 0, got 0"),
        (["num_key_value_heads=3"], "num_key_value_heads=3 does not divide num_attention_heads=4"),
        (['tie_word_embeddings="no"'], "tie_word_embeddings must be true or false, got 'no'"),
        (["mlp_bias=2"], "mlp_bias must be true or false, got 2"),
        (["vocab_size=2147483648"], "vocab_size must be below 2^31, got 2147483648"),
        (["hidden_size=true"], "hidden_size must be a whole number above 0, got True"),
        (["num_hidden_layers=-1"], "num_hidden_layers must be a whole number above 0, got -1"),
        (["heads.json"], "num_attention_heads=3 does not divide hidden_size=64"),
        (["7b", "--batch", "0"], "batch must be at least 1, got 0"),
        (["7b", "--sequence", "-1"], "sequence must be at least 1"),
        (["7b", "--rank", "0"], "rank must be at least 1"),
        (["7b", "--png", "nowhere/bars.png"], "nowhere/bars.png: No such file or directory"),
        (["7b", "--png", "folder"], "folder: Is a directory"),
        (["7b", "--png", ""], ".: Is a directory"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(arguments, piece, tmp_path, monkeypatch, capsys):
    if "--png" in arguments:
        pytest.importorskip("matplotlib")
    good = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    good |= {"num_attention_heads": 4, "vocab_size": 100, "model_type": "llama"}
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "lacks.json").write_text(json.dumps({**good, "vocab_size": None}))
    (tmp_path / "experts.json").write_text(json.dumps({**good, "num_local_experts": 8}))
    (tmp_path / "gemma.json").write_text(json.dumps({**good, "model_type": "gemma"}))
    (tmp_path / "heads.json").write_text(json.dumps({**good, "num_attention_heads": 3}))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    name, changed, value = arguments[0].partition("=")
    if changed:
        (tmp_path / arguments[0]).write_text(json.dumps({**good, name: json.loads(value)}))
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    assert main(["estimate", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and piece in error
    assert sorted(os.listdir()) == before


def test_a_module_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="Linear has no config"):
        estimate.estimate(torch.nn.Linear(4, 4))
