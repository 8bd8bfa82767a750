"""Fake tensors take the bytes that real ones do, and the committed claims are what they say."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from apollo_kernels import APOLLO, apollo_mini, cpu, fake, quantize_, reference

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import memory_claims
from memory_claims import Run

SMALL = {
    "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 3, "vocab_size": 1000,
    "num_attention_heads": 4, "num_key_value_heads": 2, "model_type": "llama",
}  # fmt: skip


@pytest.fixture
def plain_pytorch(monkeypatch):
    """The CPU's compiled passes and kept projections are not what a card has."""
    monkeypatch.setattr(cpu, "NATIVE", False)
    monkeypatch.setattr(cpu, "projections", cpu.ProjectionCache(limit=0))


def temporaries(shape, dtype, rank, int8=False, **options):
    """The peak of one step beyond weight, gradient and state."""
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    if int8:
        quantize_(linear, targets="all")
    p = linear.weight
    optimizer = APOLLO([p], lr=1e-3, rank=rank, backend="torch", **options)
    for step in range(3):
        p.grad = torch.ones(shape, dtype=dtype)
        if step == 2:  # the state is there, and so is the plan
            tracker = MemTracker()
            tracker.track_external(linear, p.grad, optimizer)
            before = sum(d["Total"] for d in tracker.get_tracker_snapshot("current").values())
            with tracker:
                optimizer.step()
            peak = sum(d["Total"] for d in tracker.get_tracker_snapshot("peak").values())
            return peak - before
        optimizer.step()


STEPS = {  # shapes above and below a chunk of reference.py
    "rows": ((4096, 512), torch.bfloat16, 16, {}),
    "columns, decay": ((512, 4096), torch.bfloat16, 16, {"weight_decay": 0.1}),
    "one chunk, decay": ((512, 512), torch.bfloat16, 16, {"weight_decay": 0.1}),
    "float32": ((4096, 512), torch.float32, 16, {"weight_decay": 0.1}),
    "sparse": ((4096, 512), torch.bfloat16, 16, {"proj": "sparse"}),
    "by chance": ((4096, 512), torch.bfloat16, 1, {"stochastic_rounding": True}),
    "by chance, one chunk": ((512, 512), torch.bfloat16, 1, {"stochastic_rounding": True}),
    "dense": ((4096, 512), torch.bfloat16, None, {"weight_decay": 0.1}),
    "dense float32": ((512, 512), torch.float32, None, {}),
    "int8": ((4096, 512), torch.bfloat16, 1, {"int8": True}),
    "int8, one chunk": ((512, 512), torch.bfloat16, 1, {"int8": True}),
    "ragged int8": ((500, 1000), torch.bfloat16, 1, {"int8": True}),
    "dense int8": ((4096, 512), torch.bfloat16, None, {"int8": True}),
    "bf16 moments": ((4096, 512), torch.bfloat16, None, {"dense_state": "bfloat16"}),
    "int8 moments": ((512, 512), torch.float32, None, {"dense_state": "int8"}),
    "int8 moments, int8": ((512, 512), torch.bfloat16, None, {"dense_state": "int8", "int8": True}),
    "bf16 moments, several chunks of int8": (
        (4000, 1000), torch.bfloat16, None, {"dense_state": "bfloat16", "int8": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_fake_step_holds_as_many_bytes_as_plain_pytorch(name, plain_pytorch):
    shape, dtype, rank, options = STEPS[name]
    real = temporaries(shape, dtype, rank, **options)
    with FakeTensorMode():
        counted = temporaries(shape, dtype, rank, **options)
    # 2 %: scalars, scales per channel, and the padding of ragged groups are not followed exactly.
    assert counted == pytest.approx(real, rel=0.02)


RUNS = {
    "Mini": Run(),
    "Mini, release": Run(release=True),
    "APOLLO": Run(optimizer="apollo", rank=64, checkpointing=False),
    "AdamW": Run(optimizer="adamw"),
    "Q-APOLLO-Mini": Run(int8=True, release=True, embeddings=True, batch=1),
    "float32": Run(dtype="float32", release=True, checkpointing=False),
    "Mini, bf16 dense moments": Run(dense_state="bfloat16"),
    "APOLLO, int8 dense moments": Run(optimizer="apollo", rank=64, dense_state="int8"),
    "int8 weights and dense moments": Run(int8=True, release=True, batch=1, dense_state="int8"),
}


@pytest.mark.parametrize("name", RUNS)
def test_estimate_and_fake_run_agree_with_real_tensors(name, tmp_path, plain_pytorch):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    run = dataclasses.replace(RUNS[name], model=str(tmp_path), sequence=64)
    run = dataclasses.replace(run, batch=run.batch * 4 if not run.int8 else 1)
    real = memory_claims.count(run, real=True)
    counted = memory_claims.count(run)
    assert counted["peak"] == pytest.approx(real["peak"], rel=0.005)
    assert memory_claims.estimated(run).peak == pytest.approx(real["peak"], rel=0.01)
    assert counted["weights"] == real["weights"] and counted["state"] == real["state"]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("release", [False, True])
def test_fake_steps_go_on_and_leave_nothing_behind(clip, release):
    def train(mode):
        with mode:
            model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 48))
            groups = apollo_mini(model, targets="all", stochastic_rounding=True)
            optimizer = APOLLO(groups, lr=1e-3, max_grad_norm=clip)
            if release:
                optimizer.attach(model)
            for _ in range(3):
                model(torch.randn(4, 32)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            return model, optimizer

    if clip and release:
        pytest.skip("refused: the norm of all gradients is not known in backward")
    _, optimizer = train(FakeTensorMode())
    assert all(isinstance(s["exp_avg"], FakeTensor) for s in optimizer.state.values())
    model, optimizer = train(contextlib.nullcontext())  # no fake tensor is left in a cache
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.stats()["updates"] > 0


def test_a_fake_batch_keeps_no_gradient():
    with FakeTensorMode():
        p = nn.Parameter(torch.empty(64, 32))
        optimizer = APOLLO([p], lr=1e-3, rank=4)
        p.grad = torch.empty(64, 32)
        optimizer.step()
        (unit,) = optimizer._runtime.units
        (work,) = unit.plan.works
        assert isinstance(work.batch, fake.LowRankBatch) and work.batch.held is None
        assert work.batch.item.grad is not p.grad


def test_what_has_been_counted_is_not_counted_again(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(memory_claims, "count", lambda run: counts.append(run) or {"peak": 1})
    for _ in range(2):
        counted = memory_claims.Results(tmp_path / "claims.json", again=False)
        assert counted(Run()) == {"peak": 1}
    assert counts == [Run()]


def test_the_committed_claims_hold_and_the_estimate_is_within_5_percent():
    rows = json.loads((memory_claims.RESULTS / "claims.json").read_text())["runs"]

    def counted(run):
        return rows[memory_claims.told(run)]  # KeyError: a claim that was never counted

    text = memory_claims.table(counted, [*memory_claims.CLAIMS, memory_claims.MICRO_BATCH])
    assert text == (memory_claims.RESULTS / "claims.md").read_text()
    runs = [run for claim in memory_claims.CLAIMS.values() for run in claim.runs.values()]
    for label, run in memory_claims.micro_batch_runs().items():
        batch = memory_claims.largest_batch(run, memory_claims.CARD, counted)
        assert batch, label
        runs.append(dataclasses.replace(run, batch=batch))
    for run in runs:
        peak = memory_claims.estimated(run).peak
        assert peak == pytest.approx(counted(run)["peak"], rel=0.05), run
    first = {name: next(iter(claim.runs.values())) for name, claim in memory_claims.CLAIMS.items()}
    for name, run in first.items():  # each claim's own setting; the others say where it ends
        assert counted(run)["peak"] < memory_claims.CLAIMS[name].limit * 1e9


def test_the_chunk_is_that_of_the_specification():
    assert fake._chunk((4096, 1024)) == reference._CHUNK
