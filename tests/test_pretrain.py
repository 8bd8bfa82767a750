"""The example is a real script: a killed run continues to the bit, and mistakes are named.

It runs in this process, where its imports cost nothing, but for one run that is really killed.
"""

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from torch import distributed

from apollo_kernels import APOLLO, apollo
from apollo_kernels.release import Release

pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent
MICRO = ["--preset", "micro", "--batch-size", 2, "--seq-len", 32, "--eval-every", 4]
MICRO += ["--eval-batches", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 200)
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script's ``main``; gives what it said, after a look at the exit status."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import pretrain

    def main(*arguments, code=0):
        try:
            status = pretrain.main(list(map(str, arguments)))
        except SystemExit as stop:  # the parser's
            status = stop.code
        said = capsys.readouterr()
        assert status == code, said
        return said.out + said.err

    return main


@pytest.fixture
def interrupted(run, monkeypatch):
    """What a run does besides, by the number of the step at whose end it does so."""
    from training import Run

    actions, original = {}, Run.train_step

    def train_step(self):
        original(self)
        actions.get(self.step, lambda: None)()

    monkeypatch.setattr(Run, "train_step", train_step)
    return actions


def losses(path):
    """(step, loss, validation, lr) as written: text, so that equal means equal to the last bit."""
    with open(path, newline="") as file:
        return [(r["step"], r["loss"], r["validation"], r["lr"]) for r in csv.DictReader(file)]


DTYPES = ("float32", "bfloat16")


class Broken(Exception):
    pass


RUNS = [[o, "--dtype", d] for o in ("adamw", "apollo", "apollo-mini") for d in DTYPES]
RUNS += [["apollo", "--dtype", "bfloat16", "--int8"], ["apollo-mini", "--int8"]]
RUNS += [
    ["apollo", "--dense-state", "int8"],
    ["apollo", "--dense-state", "bfloat16", "--embeddings"],
]


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_a_run_that_breaks_off_and_is_resumed_has_the_same_losses_to_the_bit(
    run, interrupted, options, text, tmp_path
):
    common = ["--optimizer", *options, *MICRO, "--data", text, "--steps", 14]
    whole, log, saved = tmp_path / "whole.csv", tmp_path / "log.csv", tmp_path / "run.pt"
    run(*common, "--log", whole)

    def break_off():
        raise Broken

    interrupted[8] = break_off
    with pytest.raises(Broken):
        run(*common, "--save", saved, "--save-every", 5, "--log", log)
    assert torch.load(saved, weights_only=True)["step"] == 5
    interrupted.clear()
    run("--resume", saved, "--save", saved, "--log", log)
    assert losses(log) == losses(whole)
    assert [int(row[0]) for row in losses(log)] == list(range(1, 15))


@pytest.mark.parametrize("optimizer", ["apollo", "apollo-mini"])
def test_detail_logs_what_apollo_does_inside_and_changes_no_loss(run, optimizer, text, tmp_path):
    common = ["--optimizer", optimizer, *MICRO, "--data", text, "--steps", 10]
    plain, table, lines = (tmp_path / name for name in ("plain.csv", "log.csv", "log.jsonl"))
    run(*common, "--log", plain)
    run(*common, "--log", table, "--detail")
    run(*common, "--log", lines, "--detail")
    assert losses(plain) == losses(table)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["step"] for row in rows if "detail" in row] == [4, 8, 10]
    last = rows[-1]
    assert len(last["detail"]) == 7
    each = list(last["detail"].values())
    assert last["update_norm"] == pytest.approx(math.hypot(*(e["update_norm"] for e in each)))
    assert last["scale_p50"] == statistics.median(e["scales"]["p50"] for e in each)
    # Of 10 steps the first cannot be held: what was held, told twice, by interval and over all.
    held = sum(row["limited"] * (b - a) for row, a, b in
               zip((rows[3], rows[7], rows[9]), (0, 4, 8), (4, 8, 10), strict=True))  # fmt: skip
    assert 7 * held == pytest.approx(9 * sum(e["limited"] for e in each)) and held > 0
    with open(table, newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["step"] == "10"]
    assert float(row["update_norm"]) == last["update_norm"]
    assert float(row["limited"]) == last["limited"]
    assert "update_norm" not in plain.read_text()


def test_detail_is_for_apollo(run, text):
    said = run("--optimizer", "adamw", *MICRO, "--data", text, "--detail", code=1)
    assert "--detail: adamw has none" in said


@pytest.mark.parametrize("optimizer", ["apollo", "apollo-mini"])
def test_gradient_release_has_the_same_losses_to_the_bit(
    run, monkeypatch, optimizer, text, tmp_path
):
    common = ["--optimizer", optimizer, *MICRO, "--data", text, "--steps", 8]
    whole, log = tmp_path / "whole.csv", tmp_path / "log.csv"
    run(*common, "--log", whole)
    seen, end = [], Release.end
    monkeypatch.setattr(Release, "end", lambda self: seen.append(len(self._stepped)) or end(self))
    run(*common, "--log", log, "--gradient-release")
    assert losses(log) == losses(whole)
    assert seen == [12] * 8  # all in backward


@pytest.mark.parametrize("first", [True, False])
def test_a_run_is_resumed_with_gradient_release_or_without(run, interrupted, first, text, tmp_path):
    common = [*MICRO, "--data", text, "--steps", 8]
    whole, log, saved = tmp_path / "whole.csv", tmp_path / "log.csv", tmp_path / "run.pt"
    run(*common, "--log", whole)
    interrupted[4] = lambda: signal.raise_signal(signal.SIGTERM)
    switch = ["--gradient-release"]
    run(*common, "--save", saved, *(switch if first else []), code=1)
    interrupted.clear()
    run("--resume", saved, "--save", saved, "--log", log, *([] if first else switch))
    assert losses(log) == losses(whole)


def test_a_killed_and_resumed_run_has_the_same_losses_to_the_bit(run, text, tmp_path):
    """As a user starts it, and as a machine that goes down ends it."""
    common = ["--optimizer", "apollo", *MICRO, "--data", text, "--dtype", "bfloat16"]
    common += ["--steps", 100]
    whole, log, saved = tmp_path / "whole.csv", tmp_path / "log.csv", tmp_path / "run.pt"
    run(*common, "--log", whole)
    command = [sys.executable, ROOT / "examples/pretrain.py", *common, "--save", saved]
    command += ["--save-every", 5, "--log", log]
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not saved.exists():
        time.sleep(0.002)
        assert process.poll() is None or saved.exists(), process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = torch.load(saved, weights_only=True)["step"]
    assert step % 5 == 0 and step < 100, "killed too late to prove anything"
    run("--resume", saved, "--save", saved, "--log", log)
    assert losses(log) == losses(whole)
    assert [int(row[0]) for row in losses(log)] == list(range(1, 101))


def test_sigterm_saves_and_says_so(run, interrupted, text, tmp_path):
    saved = tmp_path / "run.pt"
    interrupted[7] = lambda: signal.raise_signal(signal.SIGTERM)
    common = [*MICRO, "--data", text, "--steps", 100, "--save", saved, "--save-every", 3]
    assert "stopped by SIGTERM after step 7" in run(*common, code=1)
    assert torch.load(saved, weights_only=True)["step"] == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # and it is the caller's again


def test_the_optimizer_s_choice_matters_and_sgd_runs(run, text, tmp_path):
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
        (["--optimizer", "adamw", "--int8", *MICRO], 1, "--int8: adamw cannot step int8 weights"),
        (["--optimizer", "adamw", "--embeddings", *MICRO], 1, "--dense-state: adamw has neither"),
        (["--resume", "/no/such/run.pt"], 1, "--resume: no such file: '/no/such/run.pt'"),
        (["--resume", __file__], 1, "is no checkpoint of this script"),
        (["--steps", "0"], 2, "--steps must be positive, got 0"),
        (["--optimizer", "adam"], 2, "invalid choice: 'adam'"),
        (["--optimizer", "sgd", "--gradient-release"], 1, "--gradient-release: sgd has none"),
        (["--demo", "--gradient-release"], 2, "--gradient-release is for a run of one optimizer"),
    ],
)
def test_a_mistake_is_named(run, arguments, code, message):
    text = run(*MICRO, *arguments, code=code)
    assert message in text and "Traceback" not in text


def test_a_file_too_short_and_a_changed_setting_are_named(run, text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "9 bytes are too few for --seq-len 32" in run(*MICRO, "--data", short, code=1)
    saved = tmp_path / "run.pt"
    run(*MICRO, "--data", text, "--steps", "2", "--save", saved)
    said = run("--resume", saved, "--batch-size", "4", code=1)
    assert "--batch-size 4 contradicts the checkpoint, which was made with 2" in said


@pytest.mark.filterwarnings("error:two optimizers")
def test_the_demo_prints_a_table_and_draws_a_picture(run, text, tmp_path):
    pytest.importorskip("matplotlib")
    said = run("--demo", *MICRO, "--data", text, "--steps", 8, "--out", tmp_path)
    for piece in ("AdamW", "APOLLO-Mini", "perplexity", "of its optimizer state"):
        assert piece in said
    picture = (tmp_path / "pretrain.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    for name in ("adamw", "apollo", "apollo-mini"):
        assert len(losses(tmp_path / f"{name}.csv")) == 8


# ---- several processes ---------------------------------------------------------------------------

TOGETHER = [str(x) for x in [*MICRO, "--batch-size", 6, "--steps", 6]]


def losses_in(path):
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The losses of one process, for each optimizer (and switch) that is asked for."""
    sys.path.insert(0, str(ROOT / "examples"))
    import pretrain

    known = {}

    def of(optimizer):
        if optimizer not in known:
            log = tmp_path_factory.mktemp("alone") / "log.csv"
            more = ["--optimizer", *optimizer.split(), "--data", str(text), "--log", str(log)]
            assert pretrain.main([*TOGETHER, *more]) == 0
            known[optimizer] = losses_in(log)
        return known[optimizer]

    yield of
    sys.path.remove(str(ROOT / "examples"))


@pytest.mark.parametrize("mode, world, optimizer", [
    ("ddp", 2, "apollo"), ("fsdp2", 3, "apollo"), ("fsdp2", 2, "apollo-mini"),
    ("hsdp", 2, "apollo"), ("tp", 2, "apollo"), ("fsdp2", 2, "apollo --int8"),
])  # fmt: skip
def test_several_processes_log_the_losses_of_one(
    group, alone, text, tmp_path, mode, world, optimizer
):
    """With the same global batch; float32 sums in another order, over 6 steps."""
    import sharded

    log = tmp_path / "log.csv"
    more = ["--parallel", mode, "--optimizer", *optimizer.split()]
    more += ["--data", str(text), "--log", str(log)]
    arguments = str(ROOT / "examples"), [*TOGETHER, *more]
    assert group.run(world, sharded.pretrain, *arguments) == [0] * world
    assert losses_in(log) == pytest.approx(alone(optimizer), rel=1e-4)


@pytest.mark.parametrize("mode, optimizer", [("fsdp2", "apollo"), ("ddp", "apollo --int8")])
def test_a_run_goes_on_on_another_number_of_processes(
    group, alone, text, tmp_path, mode, optimizer
):
    """Three steps on two, the rest on three, which cut everything anew."""
    import sharded

    log, folder = tmp_path / "log.csv", str(tmp_path / "run")
    more = ["--parallel", mode, "--data", str(text), "--log", str(log), "--save", folder]
    first = [*TOGETHER, "--optimizer", *optimizer.split(), *more, "--save-every", "3"]
    examples = str(ROOT / "examples")
    assert group.run(2, sharded.interrupted, examples, first, 3) == [1, 1]
    assert losses_in(log) == pytest.approx(alone(optimizer)[:3], rel=1e-4)
    unfinished = Path(folder) / "step-5"  # as a kill in the middle of a save leaves it
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half")
    second = ["--parallel", mode, "--resume", folder, "--log", str(log)]
    assert group.run(3, sharded.pretrain, examples, second) == [0] * 3
    assert losses_in(log) == pytest.approx(alone(optimizer), rel=1e-4)


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
def test_torchrun_goes_on_after_a_worker_was_killed(group, text, tmp_path):
    """The command of the script's own text, on two processes: losses to the bit, as if nothing
    had happened."""
    import sharded

    common = [*TOGETHER, "--parallel", "fsdp2", "--steps", "30", "--data", str(text)]
    whole = [*common, "--csv", str(tmp_path / "whole.csv")]
    assert group.run(2, sharded.pretrain, str(ROOT / "examples"), whole) == [0, 0]

    log, folder = tmp_path / "log.csv", tmp_path / "run"
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    command += ["--max-restarts", "1", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "pretrain.py"), *common, "--csv", str(log)]
    command += ["--save", str(folder), "--save-every", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        deadline = time.monotonic() + 60
        while not any(folder.glob("step-*/.metadata")):
            assert it.poll() is None and time.monotonic() < deadline, it.communicate()[1]
            time.sleep(0.002)
        os.kill(int(children(it.pid)[-1]), signal.SIGKILL)
        said, errors = it.communicate(timeout=120)
    assert it.returncode == 0, errors
    assert said.count("step 30: loss") == 1
    begun = [int(step) for step in re.findall(r"(\d+)/30 \[00:00<\?", errors)]  # of the bars
    assert begun[0] == 0 and len(begun) == 2 and begun[1] > 0, errors
    assert losses(log) == losses(tmp_path / "whole.csv")


def killed_in_its_second_save(path, moment):
    """Trains two steps and saves after each; rank 1, or the one that writes the metadata, is killed
    with the data of the second checkpoint on the disk. Returns nothing: no rank gets so far."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.fsdp import fully_shard

    sys.path.insert(0, str(ROOT / "examples"))
    import parallel

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    optimizer = APOLLO(apollo(fully_shard(model), rank=4), lr=1e-2)
    processes = parallel.Processes("fsdp2", "cpu")
    original = getattr(FileSystemWriter, moment)

    def die(*arguments, **more):
        if moment == "write_data":
            original(*arguments, **more).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    for step in (1, 2):
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()
        if step == 2 and distributed.get_rank() == (moment == "write_data"):
            setattr(FileSystemWriter, moment, die)
        processes.save(path, model, optimizer, {"step": step})
        if step == 1 and distributed.get_rank() == 0:
            (path / "first").write_bytes((path / "step-1" / "__0_0.distcp").read_bytes())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("moment", ["write_data", "finish"])
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before_it(run, group, tmp_path, moment):
    import parallel

    with pytest.raises(ranks.RankError, match=r"ended with -9"):
        group.run(2, killed_in_its_second_save, tmp_path, moment)
    assert (tmp_path / "step-2").is_dir()  # it had begun
    assert parallel.newest(tmp_path) == tmp_path / "step-1"
    assert (tmp_path / "step-1" / "__0_0.distcp").read_bytes() == (tmp_path / "first").read_bytes()

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
    optimizer = APOLLO(apollo(model, rank=4), lr=1e-2)
    assert parallel.Processes(None, "cpu").restore(tmp_path, model, optimizer) == {"step": 1}
    assert all(int(state["step"]) == 1 for state in optimizer.state.values())


def test_parallel_needs_torchrun(run, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun" in run(*MICRO, "--parallel", "fsdp2", code=1)
