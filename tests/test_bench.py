"""The benchmarks' own arithmetic, and that each of them runs on a CPU."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def run(script, *arguments):
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bytes_per_weight_are_the_designs():
    """bf16 8 and float32 16 with two reads, 6 with one, int8 6.06; 9.0 at rank 256 of LLaMA-7B."""
    from roofline import Configuration, step_bytes
    from shapes import LLAMA

    square = [(4096, 4096)]

    def of(**changes):
        moments = 16 / 4096 + 8 / 4096  # of rank 1, and the norms
        return step_bytes(square, Configuration("", 1, **changes)) - moments

    assert of() == pytest.approx(8, abs=0.01)
    assert of(reads=1) == pytest.approx(6, abs=0.01)
    assert of(weight=4.0, grad=4.0) == pytest.approx(16, abs=0.01)
    assert of(weight=1 + 4 / 128) == pytest.approx(6.06, abs=0.01)
    assert step_bytes(LLAMA["7b"].matrices(), Configuration("", 256)) == pytest.approx(9.0, abs=0.1)


def test_the_model_predicts_the_designs_milliseconds():
    """LLaMA-7B in bf16 on an H200: AdamW 21.1, Mini two reads 12.0 (design section 8)."""
    from roofline import CARDS, predictions
    from shapes import LLAMA

    here = {"copy": 1e12, "matmul bf16": 1e14}
    rows = {r["configuration"]: r for r in predictions(LLAMA["7b"].matrices(), 256, here, "here")}
    assert rows["AdamW, fused, bf16"]["H200"] == pytest.approx(21.1, abs=0.1)
    assert rows["bf16, Mini"]["H200"] == pytest.approx(12.05, abs=0.1)
    assert set(CARDS) <= set(rows["bf16, Mini"])


def test_matrices_are_the_papers():
    from shapes import LLAMA

    weights = sum(m * n for m, n in LLAMA["7b"].matrices())
    assert len(LLAMA["7b"].matrices()) == 224
    assert weights == pytest.approx(6.476e9, rel=1e-3)


def test_state_bytes_counts_tensors_inside_of_objects():
    from apollo_kernels.commands.contest import state_bytes

    class Projector:
        def __init__(self):
            self.matrix = torch.zeros(10)

    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=0.1)
    optimizer.state[p] = {"a": torch.zeros(3, dtype=torch.bfloat16), "projector": Projector()}
    assert state_bytes(optimizer) == 46


def test_a_peer_that_breaks_says_so_and_ours_raises():
    from apollo_kernels.commands.contest import Contest

    def broken(ps):
        raise ValueError("no such thing")

    p = torch.nn.Parameter(torch.zeros(4))
    contest = Contest({"peer": broken}, [p])
    assert contest.details["peer"] == {"note": "ValueError: no such thing"}
    with pytest.raises(ValueError, match="no such thing"):
        Contest({"ours torch": broken}, [p])


def test_a_wrong_result_is_not_timed():
    from bench_ops import agree

    agree(torch.ones(3), torch.ones(3, dtype=torch.float64), 1e-6, "x")
    with pytest.raises(AssertionError, match="x: relative error"):
        agree(torch.full((3,), 1.01), torch.ones(3, dtype=torch.float64), 1e-6, "x")
    with pytest.raises(AssertionError):
        agree(torch.full((3,), float("nan")), torch.ones(3, dtype=torch.float64), 1e-6, "x")


def test_each_benchmark_runs_here_and_writes_its_files(tmp_path, monkeypatch):
    """One as a command, the others in this process, which has imported torch."""
    import bench_ops
    import bench_step
    import measure

    def main(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        module.main()

    monkeypatch.setattr(measure, "keep_freed_memory", lambda: None)  # it would stay so
    monkeypatch.setattr(bench_ops, "DTYPES", {"bfloat16": torch.bfloat16})
    run("roofline.py", "--model", "60m", "--rank", 8, "--out", tmp_path)
    main(bench_ops, "--model", "60m", "--quick", "--out", tmp_path)
    command = ("--models", "60m", "--rounds", 1, "--rank", 4, "--dtype", "bfloat16")
    main(bench_step, *command, "--out", tmp_path)
    for stem, kinds in {"roofline": "png", "ops": "", "step": "png"}.items():
        content = json.loads((tmp_path / f"{stem}.json").read_text())
        assert content["environment"]["torch"] == torch.__version__
        assert content["rows"]
        assert (tmp_path / f"{stem}.csv").read_text().count("\n") == len(content["rows"]) + 1
        if kinds:
            assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    names = {row["optimizer"] for row in json.loads((tmp_path / "step.json").read_text())["rows"]}
    assert {"ours torch, rank 4", "ours torch, Mini", "AdamW fused"} <= names


def test_convergence_keeps_finished_runs_and_repeats_changed_ones(tmp_path, monkeypatch):
    """Two ranks of the micro LLaMA; the second call trains only what is missing or differs."""
    pytest.importorskip("transformers")
    import convergence

    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)
    trained, original = [], convergence.train
    monkeypatch.setattr(
        convergence, "train", lambda e, *rest: (trained.append(e.label), original(e, *rest))[1]
    )

    def compare(steps, *ranks):
        trained.clear()
        words = ["--preset", "micro", "--steps", steps, "--seeds", 0, "--data", text, "--jobs", 1]
        words += ["--only", "sparse", "--out", tmp_path, "--ranks", *ranks]
        monkeypatch.setattr(sys, "argv", ["convergence.py", *map(str, words)])
        convergence.main()
        return list(trained)

    assert compare(2, 4) == ["AdamW", "APOLLO, sparse, rank 4"]
    first = json.loads((tmp_path / "convergence/AdamW-seed-0.json").read_text())
    assert compare(2, 4, 8) == ["APOLLO, sparse, rank 8"]
    (tmp_path / "convergence/AdamW-seed-0.json").write_text("half a fi")
    assert compare(2, 4, 8) == ["AdamW"]
    again = json.loads((tmp_path / "convergence/AdamW-seed-0.json").read_text())
    assert again["curve"] == first["curve"]
    assert compare(3, 4) == ["AdamW", "APOLLO, sparse, rank 4"]
    table = (tmp_path / "convergence.md").read_text()
    assert "| AdamW |" in table
    assert "| APOLLO, sparse, rank 4 |" in table
    assert (tmp_path / "convergence.png").read_bytes().startswith(b"\x89PNG")


def test_scale_ratio_follows_the_optimizers_own_scales_and_writes_its_files(tmp_path, monkeypatch):
    """At the optimizer's own rank, n / 4, the shadow has the optimizer's scale factors."""
    pytest.importorskip("transformers")
    import scale_ratio

    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(32, 127)) * 200)
    told = []

    def report(points, *rest):
        told.extend(points)
        return original(points, *rest)

    original, original_run = scale_ratio.report, scale_ratio.training.Run
    runs = []

    def recorded(*arguments):
        runs.append(original_run(*arguments))
        runs[0].optimizer.record_detail = True
        return runs[0]

    monkeypatch.setattr(scale_ratio, "report", report)
    monkeypatch.setattr(scale_ratio.training, "Run", recorded)
    words = ["--preset", "micro", "--steps", 8, "--data", text, "--ranks", 2, 8, "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["scale_ratio.py", *map(str, words)])
    scale_ratio.main()
    detail = runs[0].optimizer.stats(detail=True)["detail"]
    last = {p.matrix: p.scale for p in told if p.rank == 8 and p.step == 8}
    assert len(last) == len(detail) == 7
    for name, scale in last.items():
        assert scale == pytest.approx(detail[name]["scales"]["p50"], rel=1e-4)
    table = (tmp_path / "scale_ratio.md").read_text()
    assert "| 8 | 4 | 2 |" in table
    assert (tmp_path / "scale_ratio.csv").read_text().count("\n") == 3
    assert (tmp_path / "scale_ratio.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_goes_on_until_losses_rise_on_both_sides(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    import convergence
    import training

    tried = []

    def train(entry, settings, data):
        tried.append(settings.lr)
        loss = (settings.lr - 0.016) ** 2 if settings.lr < 0.02 else float("nan")
        curve = [(2, loss)] if loss == loss else []  # as a run that ended in NaN leaves it
        return {"settings": convergence.as_json(settings), "curve": curve}

    monkeypatch.setattr(convergence, "train", train)
    monkeypatch.setitem(convergence.rivals.RIVALS, "Muon", (2e-3, None, "torch"))
    entry = convergence.Entry("Muon", "apollo", 4, rival="Muon")
    trainer = convergence.Trainer(training.Settings(steps=2), None, tmp_path, 1, None)
    assert trainer.sweep([entry], 0) == {entry: 8}
    assert tried == [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
    assert trainer.sweep([entry], 0) == {entry: 8} and len(tried) == 6  # they were kept


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_a_rival_steps_the_matrices_and_adamw_all_else(name):
    pytest.importorskip("transformers")
    import rivals
    import training

    if not rivals.installed(name):
        pytest.skip("this PyTorch has none")
    settings = training.Settings(preset="micro", lr=1e-3, dense_lr=2e-3)
    model = training.build_model(settings)
    optimizer = rivals.build(name)(settings, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 1e-3]
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert set(optimizer.state) == set(model.parameters())
    theirs = {len(state) for p, state in optimizer.state.items() if p.dim() == 1}
    assert theirs == {3}  # AdamW's for norms: step and two moments


def test_kernel_report_reads_registers_spills_and_instructions(tmp_path):
    import kernel_report

    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None or kernel_report.cuobjdump() is None:
        pytest.skip("needs nvcc and cuobjdump")
    source = tmp_path / "k.cu"
    source.write_text(
        "__global__ void __launch_bounds__(256) copy(float4* a, const float4* b) {"
        "  a[threadIdx.x] = b[threadIdx.x]; }"
        "__global__ void __launch_bounds__(1024) spills(float* a, int n) { float x[400];"
        "  for (int i = 0; i < 400; ++i) x[i] = a[i * n]; "
        "  for (int i = 0; i < n; ++i) a[i] = x[(i * 7) % 400]; }"
    )
    cubin = tmp_path / "k.fatbin"
    subprocess.run(
        [nvcc, "-fatbin", "-gencode", "arch=compute_80,code=sm_80", "-gencode",
         "arch=compute_90a,code=sm_90a", "-o", cubin, source], check=True,
    )  # fmt: skip
    rows = {(row["kernel"], row["arch"]): row for row in kernel_report.kernels(cubin)}
    assert set(rows) == {(k, a) for k in ("copy", "spills") for a in ("sm_80", "sm_90a")}
    clean, spilled = rows["copy", "sm_90a"], rows["spills", "sm_90a"]
    assert clean["load 16"] == clean["store 16"] == 1
    assert clean["spills"] == 0
    assert clean["threads"] == 256
    assert clean["occupancy"] == 1
    assert spilled["spills"] > 0


def test_occupancy_follows_registers_and_shared_memory():
    from kernel_report import occupancy

    assert occupancy("sm_90a", 32, 0, 256) == 1
    assert occupancy("sm_90a", 255, 0, 256) == pytest.approx(8 / 64)
    assert occupancy("sm_90a", 32, 100 * 1024, 256) == pytest.approx(16 / 64)
    assert occupancy("sm_42", 32, 0, 256) is None


@pytest.fixture
def row():
    """Of a kernel as kernel_report has it, as far as budgets look at it."""
    from loop_figures import LoopFigures

    loop = LoopFigures("row", 232, 32, {16: 12, 4: 4}, 0, 0)
    return {"kernel": "k<float>", "registers": 40, "occupancy": 0.5, "spills": 0, "stack": 0,
            "loops": [loop]}  # fmt: skip


def test_a_regression_is_told_with_kernel_figure_and_budget(row, tmp_path):
    import budgets

    path = tmp_path / "budgets.csv"
    with path.open("w") as file:
        budgets.write({"sm_90a": [row]}, "13.0", file)
    assert budgets.toolkit(path) == "13.0"
    assert budgets.complaints("sm_90a", [row], path) == []

    def said(**changes):
        loops = [dataclasses.replace(row["loops"][0], **changes.pop("loop", {}))]
        return budgets.complaints("sm_90a", [row | {"loops": loops} | changes], path)

    assert said(loop={"instructions": 236}) == []  # 2 % of slack
    assert said(loop={"instructions": 240}) == [
        "sm_90a: k<float>, row loop: instructions per element 7.5, budget 7.4"
    ]
    (more,) = said(loop={"accesses": {16: 12, 4: 5}})
    assert more == "sm_90a: k<float>, row loop: scalar accesses 5, budget 4"
    (halves,) = said(loop={"accesses": {16: 10, 8: 4, 4: 4}})
    assert halves == "sm_90a: k<float>, row loop: 8-byte accesses 4, budget 0"
    assert said(registers=41) == ["sm_90a: k<float>: registers 41, budget 40"]
    assert said(occupancy=0.25) == ["sm_90a: k<float>: occupancy 0.25, budget 0.5"]
    assert said(spills=2, stack=8) == [
        "sm_90a: k<float>: spills 2, budget 0",
        "sm_90a: k<float>: stack 8, budget 0",
    ]
    assert any("no budget" in line for line in said(kernel="other"))
    assert any("k<float>, row, scalar accesses: is gone" in line for line in said(kernel="other"))


def test_targets_hold_whatever_the_budgets_say(row):
    import budgets

    name = "apply_update<bfloat16, bfloat16, ToNearest>"
    assert budgets.beyond_targets("sm_90a", [row | {"kernel": name}]) == []
    slow = [dataclasses.replace(row["loops"][0], instructions=400)]
    assert budgets.beyond_targets("sm_90a", [row | {"kernel": name, "loops": slow}]) == [
        f"sm_90a: {name}, row loop: 12.5 instructions per element, target 12"
    ]


@pytest.fixture
def check(tmp_path, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "WORK", tmp_path / "work")
    (tmp_path / "work").mkdir()
    return gpu_check


def test_gpu_check_tells_pass_fail_and_limit_apart(check, tmp_path):
    log = tmp_path / "log"

    def outcome(code, limit=30):
        part = check.Part("part", [sys.executable, "-c", code], limit)
        return check.run(part, limit, log)

    good = outcome("print('fine')")
    assert good.result == "pass"
    bad = outcome("print('why'); raise SystemExit(3)")
    assert (bad.result, bad.detail) == ("FAIL", "why")
    late = outcome("import time; time.sleep(60)", limit=1)
    assert (late.result, late.detail) == ("FAIL", "stopped at its limit of 1 s")
    assert late.seconds < 20


def test_gpu_check_skips_only_what_needs_a_gpu_and_says_why(check, tmp_path):
    found = {p.name: check.not_run(p, "no GPU") for p in check.parts(tmp_path, False)}
    assert (found["test"].result, found["test"].detail) == ("skipped", "no GPU")
    assert found["memcheck"].detail == "no GPU"
    assert [name for name, outcome in found.items() if outcome is None] == [
        "build", "environment", "roofline", "step", "ops", "kernels",
    ]  # fmt: skip
    assert check.status([o for o in found.values() if o]) == 0


def test_gpu_check_tells_of_a_missing_tool_in_its_exit_status(check):
    missing = check.not_run(check.Part("x", [], 1, needs="no-such-program"), None)
    assert missing.result == "no tool"
    assert missing.detail.startswith("no-such-program is neither on PATH")
    passed, failed = check.Outcome("a", "pass"), check.Outcome("b", "FAIL")
    assert check.status([passed, missing]) == 3
    assert check.status([passed, missing, failed]) == 1
    assert check.status([passed]) == 0


def test_a_cuda_tool_is_found_in_cuda_home_too(tmp_path, monkeypatch):
    from card_facts import cuda_tool

    tool = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_tool("compute-sanitizer") == str(tool)
    assert cuda_tool("no-such-program") is None


def test_gpu_check_fits_its_deadline_and_every_part_has_a_target(check, tmp_path):
    assert check.DEADLINE < 9 * 60
    assert "gpu-%:" in (ROOT / "Makefile").read_text()
    page = (BENCH / "README.md").read_text()
    for part in check.parts(tmp_path, True):
        assert f"gpu-{part.name}" in page


def test_gpu_check_summary_has_versions_parts_and_headlines(check, tmp_path):
    rows = [
        {"model": "7b", "optimizer": "ours cuda, Mini", "ms": 13.0, "x AdamW": 1.6},
        {"model": "7b", "optimizer": "AdamW fused", "ms": 21.0},
    ]
    (tmp_path / "step.json").write_text(json.dumps({"rows": rows}))
    outcomes = [check.Outcome("build", "pass", 3.0, "ok"), check.Outcome("test", "FAIL", 1.0, "x")]
    text = check.write_summary(tmp_path, {"card": "some-card", "torch": "2.13.0"}, outcomes)
    text = text.read_text()
    for expected in ("# some-card", "2.13.0", "| build | pass |", "| test | FAIL |", "13 | 1.6"):
        assert expected in text
    assert "AdamW fused" not in text


def test_memory_runs_that_were_not_made_again_are_kept(tmp_path):
    import memory_run

    first, second, *_ = memory_run.TRIALS
    path = tmp_path / "memory.json"
    assert memory_run.kept(path, [{"run": second}]) == [{"run": second}]
    path.write_text(json.dumps({"rows": [{"run": second, "batch": "old"}]}))
    rows = memory_run.kept(path, [{"run": first}])
    assert rows == [{"run": first}, {"run": second, "batch": "old"}]
    assert memory_run.kept(path, [{"run": second}]) == [{"run": second}]


def test_the_traffic_of_many_ranks_is_counted_from_the_shapes():
    """down_proj [8, 24] alone is cut along its contracted side: C 24, rank 4, over 4 ranks."""
    import communication

    model = communication.Model(hidden=8, mlp=24, layers=1, keys=8, vocabulary=16, shards=4)
    found = {name: (*rest, report) for name, *rest, report in communication.count(model, 8, 4)}
    shards, replicas, report = found["HSDP"]
    assert (shards, replicas) == (4, 2)
    assert report.traffic.reduce_scatter == 24 * (4 + 1) * 4
    assert report.traffic.all_gather == 24 * 4
    flags, norms = 2 * 4 * 8, 7 * 8  # by dimension of the mesh, and for each matrix
    assert report.traffic.all_reduce == flags + norms
    assert report.shard_traffic == 3 * 2 * model.weights()
    assert found["FSDP2"][:2] == (8, 1)
