"""Hugging Face's Trainer and accelerate, on a model of a few thousand weights."""

import importlib
import importlib.machinery
import re
import sys
import types
import warnings

import pytest
import torch
from helpers import changed, snapshot

import apollo_kernels

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from apollo_kernels.integrations.transformers import (  # noqa: E402
    OPTIM_ARGS,
    OptimizerStats,
    optimizer_of,
    read_optim_args,
    trainer_optimizer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument"),
    pytest.mark.filterwarnings("ignore:max_grad_norm=1.0 has no effect"),
]
STEPS = 6


@pytest.fixture
def installed():
    undo = apollo_kernels.install_as_apollo_torch()
    yield
    undo()


def model_of():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, attention_bias=True, **sizes))


def data():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (64, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **options):
    given = {
        "optim": "apollo_adamw",
        "optim_args": "rank=4,update_proj_gap=2",
        "optim_target_modules": "all-linear",
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 2,
        **options,
    }
    return TrainingArguments(str(folder), **given)


def trained(args, resume=None, optimizer=None, callback=None):
    """A Trainer that has run, and its optimizer without accelerate's wrapper."""
    model = model_of()
    trainer = Trainer(
        model,
        args,
        train_dataset=data(),
        optimizer_cls_and_kwargs=optimizer and optimizer(model, args),
    )
    if callback is not None:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, trainer.optimizer.optimizer


# ---- train, save, resume -------------------------------------------------------------------------

WAYS = {
    "apollo_adamw": {},
    "Mini, accumulating": {
        "optim_args": "rank=1,scale_type=tensor,scale=128", "gradient_accumulation_steps": 2,
    },
    "bf16": {"bf16": True, "optim_args": "rank=4,dense_state=int8"},
    "layer-wise": {"optim": "apollo_adamw_layerwise"},
    "optimizer_cls_and_kwargs": {"optim": "adamw_torch", "optim_args": None},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, installed, way):
    ours = None
    if way == "optimizer_cls_and_kwargs":

        def ours(model, args):
            return trainer_optimizer(model, args, rank=4, proj="sparse", seed=7)

    first, whole = trained(arguments(tmp_path, save_strategy="steps", **WAYS[way]), optimizer=ours)
    assert type(whole) is apollo_kernels.APOLLOAdamW
    middle = tmp_path / f"checkpoint-{STEPS // 2}"
    second, resumed = trained(arguments(tmp_path, **WAYS[way]), str(middle), ours)
    assert second.state.global_step == STEPS
    assert changed(snapshot(whole), snapshot(resumed)) == set()
    assert first.lr_scheduler.state_dict() == second.lr_scheduler.state_dict()
    assert all(int(own["step"]) == STEPS for own in resumed.state.values())


def test_layer_wise_mode_gives_the_bits_of_the_usual_one(tmp_path, installed):
    """So its scheduler and its weight decay are right too."""
    _, usual = trained(arguments(tmp_path, max_grad_norm=0))
    trainer, layerwise = trained(
        arguments(tmp_path, max_grad_norm=0, optim="apollo_adamw_layerwise")
    )
    assert layerwise.gradient_release and not usual.gradient_release
    assert all(p.grad is None for p in trainer.model.parameters())
    assert changed(snapshot(usual), snapshot(layerwise)) == set()


# ---- what optim="apollo_adamw" builds ------------------------------------------------------------


def built(model, args):
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = keywords.pop("params")
    return kind(groups, **keywords)


def names_where(optimizer, condition):
    return {n for g in optimizer.param_groups if condition(g) for n in g["param_names"]}


def test_the_groups_are_trainer_s_with_apollo_s_keys(tmp_path, installed):
    text = "rank=8, proj=sparse, scale_type=tensor, update_proj_gap=50, scale=4, proj_type=right"
    args = arguments(
        tmp_path, optim_args=f"{text},scale_front=true,disable_nl=1,seed=5,dense_state=bfloat16",
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
    )  # fmt: skip
    model = model_of()
    optimizer = built(model, args)
    matrices = {n for n, p in model.named_parameters() if p.dim() == 2}
    dense = {"lm_head.weight", "model.embed_tokens.weight"}
    assert names_where(optimizer, lambda g: g["rank"] == 8) == matrices - dense
    assert names_where(optimizer, lambda g: g["weight_decay"] == 0.1) == matrices
    assert names_where(optimizer, lambda g: True) == {n for n, _ in model.named_parameters()}
    low_rank = next(g for g in optimizer.param_groups if g["rank"])
    expected = {"proj": "sparse", "scale_type": "tensor", "update_proj_gap": 50, "scale": 4.0,
                "proj_type": "right", "scale_front": True, "disable_nl": True}  # fmt: skip
    assert {key: low_rank[key] for key in expected} == expected
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-7)
        assert group["dense_state"] == "bfloat16"
    assert optimizer.defaults["seed"] == 5


def test_weight_decay_falls_on_what_trainer_has_decay(tmp_path, installed):
    """Not by the number of dimensions: this one knows neither bias nor norm in a name."""
    model = model_of()
    model.gain = torch.nn.Parameter(torch.ones(3))
    optimizer = built(model, arguments(tmp_path))
    trainer = Trainer(model, arguments(tmp_path))
    decayed = names_where(optimizer, lambda g: g["weight_decay"] == 0.1)
    assert decayed == set(trainer.get_decay_parameter_names(model)) and "gain" in decayed


@pytest.mark.parametrize(
    "targets, part",
    [
        (["q_proj", "mlp"], r"q_proj|mlp"),
        (r".*\.(k|v)_proj", r"[kv]_proj"),
        (["lm_head", "embed_tokens"], "lm_head"),
        (None, r"_proj"),
        ("all_linear", r"_proj"),
    ],
    ids=str,
)
def test_target_modules_are_read_as_trainer_reads_them(tmp_path, installed, targets, part):
    """An embedding is none, however it is named, and the head only if it is."""
    model = model_of()
    optimizer = built(model, arguments(tmp_path, optim_target_modules=targets))
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2 and re.search(part, n)]
    assert names_where(optimizer, lambda g: g["rank"]) == set(matrices)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_embeddings_are_low_rank_where_optim_args_say_so(tmp_path, installed, targets):
    args = arguments(tmp_path, optim_args="embeddings=true", optim_target_modules=targets)
    low_rank = names_where(built(model_of(), args), lambda g: g["rank"] == 128)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < low_rank
    assert len(low_rank) == (16 if targets == "all-linear" else 4)


def test_frozen_parameters_stay_out(tmp_path, installed):
    model = model_of()
    model.model.layers[0].requires_grad_(False)
    optimizer = built(model, arguments(tmp_path))
    names = names_where(optimizer, lambda g: True)
    assert names == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options, match",
    [
        ({"optim_args": "rnk=4"}, r"unknown key 'rnk'.*'rank'"),
        ({"optim_args": "lr=4"}, r"unknown key 'lr'.*TrainingArguments"),
        ({"optim_args": "rank=x"}, r"rank must be a value of type int, got 'x'"),
        ({"optim_args": "rank"}, r"rank must be a value of type int, got ''"),
        ({"optim_args": "scale_front=maybe"}, r"scale_front must be true or false, got 'maybe'"),
        ({"optim_target_modules": ["absent"]}, r"\['absent'\] matches no linear layer of Llama"),
        ({"optim": "apollo_adamw_layerwise", "gradient_accumulation_steps": 2}, "must be 1, got 2"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_raises_before_training(tmp_path, installed, options, match):
    with pytest.raises(ValueError, match=match):
        built(model_of(), arguments(tmp_path, **options))


def test_layer_wise_mode_is_refused_in_several_processes(tmp_path):
    args = arguments(tmp_path, optim="apollo_adamw_layerwise")
    seen = types.SimpleNamespace(**{**vars(args), "world_size": 2})
    with pytest.raises(ValueError, match="one process, and there are 2"):
        optimizer_of(seen, model_of())


def test_a_limit_of_the_norm_that_layer_wise_mode_cannot_keep_is_told(tmp_path, recwarn):
    warnings.simplefilter("always")
    optimizer_of(arguments(tmp_path, optim="apollo_adamw_layerwise", max_grad_norm=0), model_of())
    assert not [w for w in recwarn if "max_grad_norm" in str(w.message)]
    optimizer_of(arguments(tmp_path, optim="apollo_adamw_layerwise"), model_of())
    assert [w for w in recwarn if "max_grad_norm=1.0 has no effect" in str(w.message)]


def test_every_key_of_optim_args_reaches_the_optimizer(tmp_path):
    """With its type: a typing error in the table would be found by nobody else."""
    values = {int: "3", float: "2.0", bool: "true"}
    words = {"proj": "sparse", "scale_type": "tensor", "proj_type": "left", "backend": "torch",
             "dense_state": "int8"}  # fmt: skip
    for key, kind in OPTIM_ARGS.items():
        args = arguments(tmp_path, optim_args=f"{key}={words.get(key) or values[kind]}")
        optimizer = apollo_kernels.APOLLOAdamW(**optimizer_of(args, model_of())[1])
        if key == "embeddings":
            continue  # it says what is low-rank, and stands in no group
        low_rank = next(g for g in optimizer.param_groups if g["rank"])
        found = low_rank[key] if key in low_rank and key != "fused" else optimizer.defaults[key]
        assert found == read_optim_args(args.optim_args)[key] and type(found) is kind


def test_other_optimizers_stay_trainer_s_and_undo_gives_all_back(tmp_path):
    before = Trainer.get_optimizer_cls_and_kwargs
    undo = apollo_kernels.install_as_apollo_torch()
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    assert Trainer.get_optimizer_cls_and_kwargs(args)[0] is torch.optim.AdamW
    assert Trainer.get_optimizer_cls_and_kwargs is not before
    undo()
    assert Trainer.get_optimizer_cls_and_kwargs is before


def test_trainer_may_be_imported_after_installing(installed, monkeypatch):
    """Whoever imports it: transformers does when its name is asked for."""
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", package := types.ModuleType("transformers"))
    package.__path__ = []
    source = (
        "class Trainer:\n    get_optimizer_cls_and_kwargs = staticmethod(lambda a, m=None: 1)\n"
    )
    loader = types.SimpleNamespace(
        create_module=lambda spec: None, exec_module=lambda module: exec(source, vars(module))
    )

    class Finder:
        @staticmethod
        def find_spec(name, path, target=None):
            if name == "transformers.trainer":
                return importlib.machinery.ModuleSpec(name, loader)
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    module = importlib.import_module("transformers.trainer")
    assert module.Trainer.get_optimizer_cls_and_kwargs(types.SimpleNamespace(optim="sgd")) == 1
    assert hasattr(module.Trainer.get_optimizer_cls_and_kwargs, "__wrapped__")


# ---- trainer_optimizer ---------------------------------------------------------------------------


def made_by_trainer(tmp_path, model, *given, **options):
    args = arguments(tmp_path, optim="adamw_torch", optim_args=None)
    pair = trainer_optimizer(model, args, *given, **options)
    trainer = Trainer(model, args, optimizer_cls_and_kwargs=pair)
    return trainer, pair


def test_embedding_and_head_are_never_low_rank_by_accident(tmp_path):
    model = model_of()
    trainer, _ = made_by_trainer(tmp_path, model, rank=4)
    for _ in range(2):  # a Trainer that makes another one, as a search of hyperparameters does
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        low_rank = names_where(optimizer, lambda g: g["rank"] == 4)
        assert len(low_rank) == 14 and all("_proj" in name for name in low_rank)
        decayed = names_where(optimizer, lambda g: g["weight_decay"] == 0.1)
        assert decayed == set(trainer.get_decay_parameter_names(model))
        assert optimizer.param_groups[0]["lr"] == 1e-2


def test_its_options_reach_groups_and_optimizer(tmp_path):
    trainer, _ = made_by_trainer(
        tmp_path, model_of(), groups=apollo_kernels.apollo_mini, dense_state="int8", seed=3,
        max_grad_norm=0.5, weight_decay=0.2,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    low_rank = next(g for g in optimizer.param_groups if g["rank"])
    assert (low_rank["rank"], low_rank["scale"], low_rank["dense_state"]) == (1, 128.0, "int8")
    assert low_rank["weight_decay"] == 0.2
    assert (optimizer.defaults["seed"], optimizer.max_grad_norm) == (3, 0.5)


def test_an_older_trainer_that_hands_over_its_groups_gets_ours(tmp_path):
    model = model_of()
    _, (make, keywords) = made_by_trainer(tmp_path, model, rank=4)
    theirs = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = make(theirs, **keywords)
    assert len(names_where(optimizer, lambda g: g["rank"] == 4)) == 14


def test_mistakes_are_told_before_trainer_is_made(tmp_path):
    with pytest.raises(ValueError, match="'absent' matches no parameter"):
        trainer_optimizer(model_of(), arguments(tmp_path), targets="absent")
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps must be 1, got 2"):
        trainer_optimizer(model_of(), args, gradient_release=True)


# ---- the callback --------------------------------------------------------------------------------


def test_the_callback_logs_what_the_optimizer_counts(tmp_path, installed):
    trainer, optimizer = trained(arguments(tmp_path), callback=OptimizerStats)
    history = trainer.state.log_history
    records = [r for r in history if "apollo_limited" in r]
    assert [r["step"] for r in records] == [r["step"] for r in history if "loss" in r] == [2, 4, 6]
    matrices, stats = 14, optimizer.stats()
    limited = sum(r["apollo_limited"] * 2 * matrices for r in records)
    assert 0 < limited == pytest.approx(stats["limited"])
    assert [r["apollo_nonfinite"] for r in records] == [0, 0, 0]
    norms = [float(s["update_norm"]) for s in optimizer.state.values() if "update_norm" in s]
    assert records[-1]["apollo_update_norm"] == pytest.approx(sum(n * n for n in norms) ** 0.5)


def test_the_callback_counts_from_where_the_run_starts(tmp_path, installed):
    """NaN in one parameter's gradient: it is counted once, in the record of its steps."""

    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("nan")

    args = arguments(tmp_path, max_grad_norm=0)
    model = model_of()
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[Spoil()])
    trainer.add_callback(OptimizerStats(trainer))
    trainer.train()
    records = [r["apollo_nonfinite"] for r in trainer.state.log_history if "apollo_limited" in r]
    assert records == [0, 1, 0]


def test_the_callback_refuses_another_optimizer(tmp_path):
    with pytest.raises(TypeError, match="OptimizerStats needs.*AdamW"):
        trained(arguments(tmp_path, optim="adamw_torch", optim_args=None), callback=OptimizerStats)


# ---- accelerate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerated_run_resumes_bit_for_bit(tmp_path, precision):
    """With micro-batches, a scheduler and clipping."""

    def prepared():
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        model = model_of()
        groups = apollo_kernels.apollo(model, rank=4, update_proj_gap=2, weight_decay=0.1)
        optimizer = apollo_kernels.APOLLOAdamW(groups, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    def train(run, steps):
        accelerator, model, optimizer, scheduler = run
        for step in steps:
            for half in range(2):
                batch = torch.stack([d["input_ids"] for d in data()[8 * step + 4 * half :][:4]])
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=batch, labels=batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        return optimizer.optimizer

    whole = prepared()
    train(whole, range(STEPS // 2))
    whole[0].save_state(tmp_path)
    expected = snapshot(train(whole, range(STEPS // 2, STEPS)))
    resumed = prepared()
    resumed[0].load_state(tmp_path)
    assert changed(expected, snapshot(train(resumed, range(STEPS // 2, STEPS)))) == set()


@pytest.mark.parametrize("fused", [False, True])
def test_accelerate_s_scaler_clips_and_skips(fused, monkeypatch):
    """float16 is not offered on a CPU, so the scaler is put in by hand, as accelerate makes it."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.state._mixed_precision = "fp16"
    model = torch.nn.Linear(8, 4)
    optimizer = apollo_kernels.APOLLOAdamW(model.parameters(), lr=1e-2, rank=4, fused=fused)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
    accelerator._optimizers.append(wrapped)
    for step in range(3):
        loss = model(torch.ones(2, 8)).square().sum() * (float("inf") if step == 1 else 1.0)
        accelerator.scaler.scale(loss).backward()
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        if step != 1:
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert float(norm) == pytest.approx(0.1, rel=1e-4)
        wrapped.step()
        wrapped.zero_grad()
    assert all(int(own["step"]) == 2 for own in optimizer.state.values())
    assert optimizer.stats()["nonfinite"] == 0
