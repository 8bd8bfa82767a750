"""The output head stays out of the low-rank group, whatever is wrapped around it."""

import pytest
import torch
from torch import nn

from apollo_kernels import apollo, param_groups
from apollo_kernels.groups import choose_parameters


def heads_of(model, **options):
    found = choose_parameters(model, **options)
    assert all(not c.low_rank for c in found if c.reason == "output head")
    return [c.name for c in found if c.reason == "output head"]


class Net(nn.Module):
    """A model that says nothing of its head; the body is linear, too."""

    def __init__(self, **heads):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
        for name, head in heads.items():
            self.add_module(name, head)


class Config:
    hidden_size = 32


class Telling(Net):
    """As of Hugging Face: it has a config and tells its head, or that it has none."""

    config = Config()

    def get_output_embeddings(self):
        return getattr(self, "decoder", None)


class Wrapper(nn.Module):
    """As DistributedDataParallel, OptimizedModule, PeftModel and LoraModel hold a model."""

    def __init__(self, name, model):
        super().__init__()
        self.add_module(name, model)
        self.loss = nn.CrossEntropyLoss()  # without parameters


class LightningModule(nn.Module):
    """Known by its name, so that nothing has to import Lightning."""


class Pair(LightningModule):
    def __init__(self, *models):
        super().__init__()
        self.first, self.second = models


class ModulesToSaveWrapper(nn.Module):
    """PEFT's: the frozen head and the trained copy of it."""

    def __init__(self, head):
        super().__init__()
        self.original_module = head
        self.modules_to_save = nn.ModuleDict({n: nn.Linear(8, 10) for n in ("default", "other")})
        head.requires_grad_(False)


@pytest.mark.parametrize("name", ["lm_head", "head", "classifier", "score", "qa_outputs"])
def test_a_layer_of_a_usual_name_is_the_head(name):
    assert heads_of(Net(**{name: nn.Linear(8, 10)})) == [f"{name}.weight"]


def test_what_a_model_tells_counts_before_names():
    model = Telling(decoder=nn.Linear(8, 10), output=nn.Linear(8, 8))
    assert heads_of(model) == ["decoder.weight"]


@pytest.mark.parametrize("make", [
    lambda: Net(score=nn.Linear(8, 10)),
    lambda: Telling(score=nn.Linear(8, 10)),  # classification: the getter returns None
], ids=["plain", "getter returns None"])  # fmt: skip
def test_it_is_found_through_wrappers_of_the_model(make):
    for path in ("", "module", "_orig_mod.module", "model", "base_model.model", "model.model"):
        model = make()
        for name in reversed(path.split(".") if path else []):
            model = Wrapper(name, model)
        assert heads_of(model) == [".".join(filter(None, [path, "score.weight"]))]


def test_it_is_found_at_any_depth_where_a_model_tells_it():
    model = Pair(nn.ModuleList([nn.Linear(4, 4), Telling(decoder=nn.Linear(8, 10))]), Net())
    assert heads_of(model) == ["first.1.decoder.weight"]


def test_a_lightning_module_has_a_head_in_each_of_its_models_or_itself():
    pair = Pair(Net(head=nn.Linear(8, 10)), Net(head=nn.Linear(8, 3)))
    assert heads_of(pair) == ["first.head.weight", "second.head.weight"]
    own = Pair(Net(), nn.LayerNorm(8))
    own.head = nn.Linear(8, 3)
    assert heads_of(own) == ["head.weight"]


def test_layers_in_the_middle_are_no_heads():
    """An attention's "output" lies under a module with others beside it."""
    block = nn.Module()
    block.attention, block.output = nn.Linear(8, 8), nn.Linear(8, 8)
    model = Net(block=block, lm_head=nn.Linear(8, 10))
    assert heads_of(model) == ["lm_head.weight"]


@pytest.mark.parametrize("make", [
    lambda: Net(lm_head=ModulesToSaveWrapper(nn.Linear(8, 10))),
    lambda: Telling(decoder=ModulesToSaveWrapper(nn.Linear(8, 10))),
], ids=["by name", "told"])  # fmt: skip
def test_trained_copies_of_a_head_are_heads(make):
    found = [name.split(".", 1)[1] for name in heads_of(make())]
    assert found == ["modules_to_save.default.weight", "modules_to_save.other.weight"]
    low = {n for g in param_groups(make(), rank=2) if "rank" in g for n in g["param_names"]}
    assert low == {"body.0.weight", "body.1.weight"}


def test_of_a_head_of_several_layers_the_last_is_it():
    head = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    assert heads_of(Net(classifier=head)) == ["classifier.2.weight"]


def test_a_wrapped_model_s_hidden_size_decides_the_rank():
    model = Telling(decoder=nn.Linear(8, 10))
    assert apollo(model)[0]["rank"] == 8  # a quarter of the config's 32
    assert apollo(Wrapper("module", Wrapper("_orig_mod", model)))[0]["rank"] == 8


def test_distributed_data_parallel_and_compiled_models_have_their_head(tmp_path):
    model = Net(head=nn.Linear(8, 10))
    assert heads_of(torch.compile(model, backend="eager")) == ["_orig_mod.head.weight"]
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        assert heads_of(nn.parallel.DistributedDataParallel(model)) == ["module.head.weight"]
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind, name", [
    ("LlamaForCausalLM", "lm_head"),
    ("LlamaForSequenceClassification", "score"),
    ("BertForQuestionAnswering", "qa_outputs"),
    ("RobertaForSequenceClassification", "classifier.out_proj"),
])  # fmt: skip
def test_models_of_transformers_have_theirs(kind, name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind.split("For")[0] + "Config")(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    assert heads_of(model) == [f"{name}.weight"]
    assert heads_of(Wrapper("module", model)) == [f"module.{name}.weight"]


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_models_of_peft_have_theirs(task):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    kinds = {"CAUSAL_LM": "LlamaForCausalLM", "SEQ_CLS": "LlamaForSequenceClassification"}
    options = {"modules_to_save": ["lm_head"]} if task == "CAUSAL_LM" else {}
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type=task, **options)
    model = peft.get_peft_model(getattr(transformers, kinds[task])(config), lora)
    (found,) = heads_of(model)
    assert found.endswith(".modules_to_save.default.weight")
