"""Memory modes in one run, all at a time: a checkpoint resumes to the bit, and a kill while it is
written leaves the former one."""

import csv
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import all_of, changed, randn, snapshot

import apollo_kernels
from apollo_kernels import APOLLO, quantize_

EXAMPLES = Path(__file__).parent.parent / "examples"
DENSE_STATES = ("float32", "bfloat16", "int8")
# Clipping needs all gradients before the first update, so that one of the two is off.
RELEASED, CLIPPED = {"gradient_release": True}, {"max_grad_norm": 0.01}


def net(backend, seed):
    """Low-rank and dense, int8 and bf16 weights in every pairing, and vectors."""
    torch.manual_seed(seed)
    layers = [
        torch.nn.Embedding(10, 128), torch.nn.Linear(128, 48), torch.nn.Linear(48, 128),
        torch.nn.LayerNorm(128), torch.nn.Linear(128, 5),
    ]  # fmt: skip
    model = torch.nn.Sequential(*layers).bfloat16().to(backend.device)
    for layer in (model[0], model[1]):
        quantize_(layer, targets="all", embeddings=True)
    return model


def optimizer_of(model, dense_state, seed, options):
    matrices = [model[1].weight, model[2].weight]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    low_rank = {"rank": 4, "update_proj_gap": 1, "stochastic_rounding": True, "proj": "rademacher"}
    groups = [{"params": matrices, **low_rank}, {"params": rest, "dense_state": dense_state}]
    return APOLLO(groups, lr=0.01, weight_decay=0.1, seed=seed, **options)


def train(model, optimizer, backend, steps):
    for step in steps:
        ids = torch.arange(10, device=backend.device)
        target = randn((10, 5), backend, torch.bfloat16, seed=step)
        (model(ids) - target).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("dense_state", DENSE_STATES)
@pytest.mark.parametrize("options", [RELEASED, CLIPPED], ids=["released", "clipped"])
def test_a_resumed_run_continues_bit_for_bit(backend, dense_state, options):
    """In another process it would be: other weights, another seed, nothing but the file."""
    model = net(backend, 0)
    optimizer = optimizer_of(model, dense_state, 7, options)
    assert [hasattr(p, "codes") for p in all_of(optimizer)[:3]] == [True, False, True]
    train(model, optimizer, backend, range(2))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin = net(backend, 1)
    resumed = optimizer_of(twin, dense_state, 99, options)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert changed(plain(optimizer), plain(resumed)) == set()
    before = plain(optimizer)
    for run in ((model, optimizer), (twin, resumed)):
        train(*run, backend, range(2, 3))
    assert changed(plain(optimizer), plain(resumed)) == set()
    moved = {i for i, name in changed(before, plain(optimizer)) if name != "step"}
    assert moved == set(range(len(all_of(optimizer))))


def plain(optimizer):
    """A snapshot with the codes and grids of int8 weights, instead of what they stand for."""
    found = snapshot(optimizer)
    for i, p in enumerate(all_of(optimizer)):
        if hasattr(p, "codes"):
            del found[i, "weight"]
            found[i, "codes"], found[i, "grid"] = p.codes.clone(), p.grid.clone()
    return found


# ---- a kill ------------------------------------------------------------------------------------

# The script, whose second checkpoint ends half way, as if the machine had gone down.
KILLED = """
import io, os, signal, sys
import torch
sys.path.insert(0, sys.argv.pop(1))
import apollo_kernels, pretrain

options, written, save = eval(sys.argv.pop(1)), [], torch.save

class WithOptions(apollo_kernels.APOLLO):
    def __init__(self, params, **keys):
        super().__init__(params, **options, **keys)

apollo_kernels.APOLLO = WithOptions

def half(content, file):
    written.append(None)
    if len(written) < 2:
        return save(content, file)
    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = half
pretrain.main(sys.argv[1:])
"""
CASES = [
    ("float32", ["--int8"], {"max_grad_norm": 0.5}),
    ("bfloat16", ["--embeddings", "--gradient-release"], {"stochastic_rounding": True}),
    ("int8", ["--int8", "--gradient-release"], {"stochastic_rounding": True}),
]


def rows(path):
    with open(path, newline="") as file:
        return [(r["step"], r["loss"], r["validation"], r["lr"]) for r in csv.DictReader(file)]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("dense_state, switches, options", CASES, ids=lambda x: str(x))
def test_a_kill_while_a_checkpoint_is_written_leaves_the_former_one(
    dense_state, switches, options, tmp_path, monkeypatch
):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import pretrain

    class WithOptions(APOLLO):
        def __init__(self, params, **keys):
            super().__init__(params, **options, **keys)

    monkeypatch.setattr(apollo_kernels, "APOLLO", WithOptions)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 100)
    common = ["--preset", "micro", "--batch-size", 2, "--seq-len", 32, "--eval-every", 9]
    common += ["--eval-batches", 1, "--device", "cpu", "--dtype", "bfloat16", "--data", text]
    common += ["--steps", 7, "--optimizer", "apollo", "--dense-state", dense_state]
    common += [s for s in switches if s != "--gradient-release"]
    release = [s for s in switches if s == "--gradient-release"]
    whole, saved = tmp_path / "whole.pt", tmp_path / "run.pt"
    logs = ["--log", tmp_path / "whole.csv"], ["--log", tmp_path / "run.csv"]
    assert pretrain.main(list(map(str, [*common, *release, "--save", whole, *logs[0]]))) == 0

    command = [sys.executable, "-P", "-c", KILLED, EXAMPLES, repr(options), *common, *release]
    done = subprocess.run(
        list(map(str, [*command, "--save", saved, "--save-every", 2])),
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    (half,) = set(tmp_path.iterdir()) - {text, whole, saved, tmp_path / "whole.csv"}
    with pytest.raises((OSError, RuntimeError)):
        torch.load(half, weights_only=True)
    assert torch.load(saved, weights_only=True)["step"] == 2
    assert (
        pretrain.main(list(map(str, ["--resume", saved, "--save", saved, *release, *logs[1]]))) == 0
    )
    assert rows(tmp_path / "run.csv") == rows(tmp_path / "whole.csv")
    a, b = (torch.load(path, weights_only=True) for path in (whole, saved))
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
