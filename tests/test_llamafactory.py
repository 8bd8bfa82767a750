"""LLaMA-Factory's use_apollo, on a stand-in of its function that makes the optimizer.

docs/trainer.md says which versions the real one was run with.
"""

import importlib
import sys
import types
import warnings

import pytest
import torch
from helpers import changed, snapshot

import apollo_kernels

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import MixtralConfig, MixtralForCausalLM

NAME = "llamafactory.train.trainer_utils"
SOURCE = """
import torch
from apollo_torch import APOLLOAdamW

def _create_apollo_optimizer(model, training_args, finetuning_args):
    assert not finetuning_args.apollo_layerwise
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    others = [p for p in model.parameters() if all(p is not q for q in linear)]
    groups = [{"params": []}, {"params": others}, {"params": linear, "rank": 2, "scale": 0.5}]
    return APOLLOAdamW(groups, lr=training_args.learning_rate)

def create_custom_optimizer(*given):
    return _create_apollo_optimizer(*given)
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A folder with the stand-in on sys.path; the modules are forgotten at the end."""
    package = tmp_path / "llamafactory" / "train"
    package.mkdir(parents=True)
    (package / "trainer_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package / "trainer_utils.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "llamafactory"]:
        del sys.modules[name]


@pytest.fixture
def installed():
    undo = apollo_kernels.install_as_apollo_torch()
    yield undo
    undo()


def arguments(layerwise, target="q_proj", **training):
    trainer = {"learning_rate": 0.1, "gradient_accumulation_steps": 1, "world_size": 1}
    return (
        types.SimpleNamespace(max_grad_norm=0, **{**trainer, **training}),
        types.SimpleNamespace(apollo_layerwise=layerwise, apollo_target=[target]),
    )


def trained(utils, layerwise, steps=3, state=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 4))
    optimizer = utils.create_custom_optimizer(model, *arguments(layerwise))
    for _ in range(steps):
        model(torch.ones(2, 6)).square().sum().backward()
        left = [p.grad is not None for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    assert not any(left) if layerwise else all(left)
    return optimizer


@pytest.mark.parametrize("imported", ["before", "after"])
def test_layerwise_mode_is_gradient_release_of_one_optimizer_with_names(
    factory, installed, imported
):
    if imported == "before":
        installed()
        sys.modules["apollo_torch"] = types.SimpleNamespace(APOLLOAdamW=apollo_kernels.APOLLOAdamW)
        utils = importlib.import_module(NAME)
        del sys.modules["apollo_torch"]
        apollo_kernels.install_as_apollo_torch()
    utils = importlib.import_module(NAME)
    joint, layerwise = (trained(utils, mode) for mode in (False, True))
    assert layerwise.gradient_release and not joint.gradient_release
    assert isinstance(layerwise, apollo_kernels.APOLLOAdamW)
    assert changed(snapshot(joint), snapshot(layerwise)) == set()
    called = [group["param_names"] for group in layerwise.param_groups]
    assert called == [[], ["0.bias", "1.weight", "1.bias", "2.bias"], ["0.weight", "2.weight"]]
    assert len(layerwise.state_dict()["state"]) == 6
    assert layerwise.param_groups[2]["scale"] == 0.5


@pytest.mark.parametrize("setting", [{"gradient_accumulation_steps": 2}, {"world_size": 2}])
def test_layerwise_mode_refuses_what_it_cannot_do(factory, installed, setting):
    utils = importlib.import_module(NAME)
    model = torch.nn.Linear(6, 8)
    with pytest.raises(ValueError, match="apollo_layerwise.*2"):
        utils.create_custom_optimizer(model, *arguments(True, **setting))
    assert utils.create_custom_optimizer(model, *arguments(False, **setting))


@pytest.mark.parametrize("target", ["all", "q_proj"])
def test_experts_that_it_overlooks_are_told(factory, installed, target):
    utils = importlib.import_module(NAME)
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    model = MixtralForCausalLM(
        MixtralConfig(num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, **sizes)
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        utils.create_custom_optimizer(model, *arguments(False, target))
    about = [str(w.message) for w in told if "experts" in str(w.message)]
    assert len(about) == (target == "all")
    assert all("2 parameters" in text and "mlp.experts.gate_up_proj" in text for text in about)


def test_undo_and_other_versions_leave_its_function(factory, installed):
    utils = importlib.import_module(NAME)
    ours = utils._create_apollo_optimizer
    installed()
    assert utils._create_apollo_optimizer is ours.__wrapped__
    del sys.modules[NAME]
    factory.write_text("def create(): pass\n")
    apollo_kernels.install_as_apollo_torch()
    assert not hasattr(importlib.import_module(NAME), "_create_apollo_optimizer")
