"""Turns this machine into evidence: builds the package here, tests it, sanitizes it, measures it.

    python bench/gpu_check.py [PART ...] [--skip PART ...] [--out bench/results]

(make gpu-check; make gpu-PART).

Needs no network: it uses the PyTorch, CUDA toolkit and tools that are installed. Each part has its
own time limit and log, and one that fails hides no other. Results go to OUT/<card>/, with
summary.md; parts that need a GPU are skipped, with the reason, where there is none. The exit status
is 1 if a part failed, and 3 if one could not run for want of a tool.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from card_facts import cuda_tool

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-check"
DEADLINE = 530  # seconds for everything: later parts get what is left
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    limit: int  # seconds
    gpu: bool = True
    needs: str | None = None  # a program of the CUDA toolkit
    environment: tuple[tuple[str, str], ...] = ()


@dataclass
class Outcome:
    part: str
    result: str  # pass, FAIL, skipped (no GPU), no tool
    seconds: float = 0.0
    detail: str = ""


def parts(out: Path, gpu: bool) -> list[Part]:
    """In the order in which they run: what the others rest on first, the slow sanitizers last."""
    python, bench = sys.executable, str(ROOT / "bench")
    quick = [] if gpu else ["--quick"]
    sizes = ["--models", "60m", "130m", "1b", "7b", "13b", "--rounds", "15"] if gpu else quick
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(ROOT / "tests/test_gpu.py"),
    ]
    # Kernels that Triton compiles take seconds each: several processes where pytest-xdist is there.
    # (On an H200 12 of them took 98 s; one alone was not through after 200.)
    processes = str(min(12, os.cpu_count() or 1))
    workers = ["-n", processes] if gpu and importlib.util.find_spec("xdist") else []
    sanitizer = [cuda_tool("compute-sanitizer") or "compute-sanitizer", "--error-exitcode", "9"]
    # Bounds and first reads show only where each tensor has an allocation of its own.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 150, gpu=False),
        Part("environment", [python, "-m", "apollo_kernels", "info"], 30, gpu=False),
        Part("test", [*pytest, *workers, "-m", "gpu"], 180),
        Part("roofline", [python, f"{bench}/roofline.py", "--out", str(out)], 60, gpu=False),
        Part("step", [python, f"{bench}/bench_step.py", *sizes, "--out", str(out)], 180, gpu=False),
        Part("ops", [python, f"{bench}/bench_ops.py", *quick, "--out", str(out)], 75, gpu=False),
        Part("memory", [python, f"{bench}/memory_run.py", "--out", str(out)], 150),
        Part("kernels", [python, f"{bench}/kernel_report.py", "--out", str(out)], 60, gpu=False),
        *(
            Part(
                tool,
                [*sanitizer, "--tool", tool, *pytest, "-m", "sanitize"],
                75,
                needs="compute-sanitizer",
                environment=apart if tool in ("memcheck", "initcheck") else (),
            )
            for tool in TOOLS
        ),
    ]


def site() -> Path:
    """A folder that holds the package alone: on a path, the root would expose its triton/ too."""
    folder = WORK / "site"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "apollo_kernels"
    if not link.is_symlink():
        link.symlink_to(ROOT / "apollo_kernels")
    return folder


def surroundings() -> dict[str, str]:
    path = [str(site()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "APOLLO_KERNELS_NATIVE": "on",
    }


def run(part: Part, limit: float, log: Path) -> Outcome:
    """Runs a part in a process group of its own, so that a limit stops all of it."""
    folder = ROOT if part.name == "build" else WORK  # -m would put the root on Python's path
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=folder, env={**surroundings(), **dict(part.environment)},
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    seconds = time.monotonic() - begin
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if code is None:
        return Outcome(part.name, "FAIL", seconds, f"stopped at its limit of {limit:.0f} s")
    if code == 5 and "pytest" in part.command:
        return Outcome(part.name, "FAIL", seconds, "no test was selected")
    if code == 0 and "pytest" not in part.command:
        last = ""
    return Outcome(part.name, "FAIL" if code else "pass", seconds, last[-100:])


def not_run(part: Part, no_gpu: str | None) -> Outcome | None:
    """Why a part cannot run here: without a GPU that is no fault, without its tool it is."""
    if part.gpu and no_gpu is not None:
        return Outcome(part.name, "skipped", 0.0, no_gpu)
    if part.needs is not None and cuda_tool(part.needs) is None:
        return Outcome(
            part.name, "no tool", 0.0, f"{part.needs} is neither on PATH nor in CUDA_HOME"
        )
    return None


def status(outcomes: list[Outcome]) -> int:
    """Of the process: 1 if a part failed, 3 if one was left out for want of a tool, else 0."""
    results = {outcome.result for outcome in outcomes}
    return 1 if "FAIL" in results else 3 if "no tool" in results else 0


def headlines(folder: Path) -> list[dict[str, Any]]:
    """Our rows of step.json: speed-ups, launches, syncs, and the share of the copy bandwidth."""
    path = folder / "step.json"
    if not path.exists():
        return []
    wanted = ("model", "dtype", "optimizer", "layers", "ms", "x AdamW", "x apollo_torch")
    wanted += ("of copy", "launches", "host ms", "syncs", "extra MB", "state MB", "note")
    rows = json.loads(path.read_text())["rows"]
    return [
        {key: row[key] for key in wanted if key in row}
        for row in rows
        if row["optimizer"].startswith("ours")
    ]


def write_summary(folder: Path, environment: dict[str, Any], outcomes: list[Outcome]) -> Path:
    import measure

    results = [
        {"part": o.part, "result": o.result, "seconds": round(o.seconds, 1), "": o.detail}
        for o in outcomes
    ]
    text = [f"# {environment['card']}", "Written by `make gpu-check`."]
    text.append(measure.markdown([{"": k, "value": str(v)} for k, v in environment.items()]))
    text += ["## Parts", measure.markdown(results)]
    if rows := headlines(folder):
        text += ["## One optimizer step (all peers: step.csv)", measure.markdown(rows)]
    if (path := folder / "memory.json").exists():
        rows = json.loads(path.read_text())["rows"]
        text += ["## Whole training steps under a cap on the allocator", measure.markdown(rows)]
    path = folder / "summary.md"
    path.write_text("\n\n".join(text) + "\n")
    return path


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: make gpu-check GPU_PYTHON=<python with torch>")
    sys.path.insert(0, str(site()))
    import measure
    import torch

    device = measure.default_device()
    no_gpu = None if device.type == "cuda" else "no CUDA device"
    names = [part.name for part in parts(Path(), True)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="all but these")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    if unknown := {*args.parts, *args.skip} - set(names):
        parser.error(f"unknown part {sorted(unknown)}; there are {names}")
    folder = args.out.resolve() / measure.card_name(device)
    logs = WORK / "logs"
    for path in (folder, logs):
        path.mkdir(parents=True, exist_ok=True)
    begin, outcomes = time.monotonic(), []
    for part in parts(folder, device.type == "cuda"):
        if (args.parts and part.name not in args.parts) or part.name in args.skip:
            continue
        left = DEADLINE - (time.monotonic() - begin)
        if outcome := not_run(part, no_gpu):
            pass
        elif left < 5:
            outcome = Outcome(part.name, "FAIL", 0.0, f"the {DEADLINE} s for everything were over")
        else:
            print(f"{part.name}: at most {min(part.limit, left):.0f} s ...", flush=True)
            outcome = run(part, min(part.limit, left), logs / f"{part.name}.log")
        outcomes.append(outcome)
    environment = measure.environment(device)
    if not args.parts:
        print(f"\nwrote {write_summary(folder, environment, outcomes)}")
    print(f"\n{environment['card']}, torch {torch.__version__}, commit {environment['commit']}")
    if rows := headlines(folder):
        print("\n" + measure.table(rows))
    print(f"\n{'part':<13}{'result':<9}{'seconds':>8}  the last word, or why it was skipped")
    for o in outcomes:
        print(f"{o.part:<13}{o.result:<9}{o.seconds:>8.1f}  {o.detail}")
    print(f"logs: {logs}/PART.log")
    sys.exit(status(outcomes))


if __name__ == "__main__":
    main()
