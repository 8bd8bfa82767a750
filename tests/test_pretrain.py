"""The example is a real script: a killed run continues to the bit, and mistakes are named."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
MICRO = [
    "--preset",
    "micro",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--eval-every",
    "4",
    "--eval-batches",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 200)
    return path


def start(*arguments):
    command = [sys.executable, str(ROOT / "examples/pretrain.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments, code=0):
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out + err


def losses(path):
    """(step, loss, validation, lr) as written: text, so that equal means equal to the last bit."""
    with open(path, newline="") as file:
        return [(r["step"], r["loss"], r["validation"], r["lr"]) for r in csv.DictReader(file)]


@pytest.mark.parametrize(
    "optimizer, dtype",
    [
        ("adamw", "float32"),
        ("apollo", "float32"),
        ("apollo", "bfloat16"),
        ("apollo-mini", "float32"),
    ],
)
def test_a_killed_and_resumed_run_has_the_same_losses_to_the_bit(optimizer, dtype, text, tmp_path):
    common = ["--optimizer", optimizer, *MICRO, "--data", text, "--dtype", dtype]
    whole, log, saved = tmp_path / "whole.csv", tmp_path / "log.csv", tmp_path / "run.pt"
    run(*common, "--steps", "100", "--log", whole)
    process = start(*common, "--steps", "100", "--save", saved, "--save-every", "5", "--log", log)
    while not saved.exists():
        time.sleep(0.002)
        assert process.poll() is None or saved.exists(), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(saved, weights_only=True)["step"]
    assert step % 5 == 0 and step < 100, "killed too late to prove anything"
    run("--resume", saved, "--save", saved, "--log", log)
    assert losses(log) == losses(whole)
    assert [int(row[0]) for row in losses(log)] == list(range(1, 101))


def test_sigterm_saves_and_says_so(text, tmp_path):
    saved = tmp_path / "run.pt"
    process = start(*MICRO, "--data", text, "--steps", "100000", "--save", saved, "--save-every", 3)
    while not saved.exists():
        time.sleep(0.01)
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by SIGTERM after step" in err
    step = int(err.rsplit("after step ", 1)[1])
    assert torch.load(saved, weights_only=True)["step"] == step


def test_the_optimizer_s_choice_matters_and_sgd_runs(text, tmp_path):
    seen = set()
    for optimizer in ("adamw", "apollo", "apollo-mini", "sgd"):
        log = tmp_path / f"{optimizer}.csv"
        run("--optimizer", optimizer, *MICRO, "--data", text, "--steps", 4, "--log", log)
        seen.add(losses(log)[-1][1])
    assert len(seen) == 4


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--data", "/no/such/file"], 1, "--data: no such file: '/no/such/file'"),
        (["--resume", "/no/such/run.pt"], 1, "--resume: no such file: '/no/such/run.pt'"),
        (["--resume", __file__], 1, "is no checkpoint of this script"),
        (["--steps", "0"], 2, "--steps must be positive, got 0"),
        (["--optimizer", "adam"], 2, "invalid choice: 'adam'"),
    ],
)
def test_a_mistake_is_named(arguments, code, message):
    text = run(*MICRO, *arguments, code=code)
    assert message in text and "Traceback" not in text


def test_a_file_too_short_and_a_changed_setting_are_named(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "9 bytes are too few for --seq-len 32" in run(*MICRO, "--data", short, code=1)
    saved = tmp_path / "run.pt"
    run(*MICRO, "--data", text, "--steps", "2", "--save", saved)
    said = run("--resume", saved, "--batch-size", "4", code=1)
    assert "--batch-size 4 contradicts the checkpoint, which was made with 2" in said


def test_the_demo_prints_a_table_and_draws_a_picture(text, tmp_path):
    pytest.importorskip("matplotlib")
    said = run("--demo", *MICRO, "--data", text, "--steps", 8, "--out", tmp_path)
    for piece in ("AdamW", "APOLLO-Mini", "perplexity", "of its optimizer state"):
        assert piece in said
    picture = (tmp_path / "pretrain.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    for name in ("adamw", "apollo", "apollo-mini"):
        assert len(losses(tmp_path / f"{name}.csv")) == 8
