"""Pre-trains a LLaMA on bytes of text with AdamW, APOLLO or APOLLO-Mini.

    python examples/pretrain.py --demo                     all three, a table and a picture
    python examples/pretrain.py --optimizer apollo-mini --preset 60m --save runs/mini.pt
    python examples/pretrain.py --resume runs/mini.pt --save runs/mini.pt
    torchrun --nproc-per-node 2 examples/pretrain.py --parallel fsdp2 --save runs/cut

A run that was killed and is resumed continues to the bit on one machine: batches are a function of
(seed, step), and the checkpoint holds the rest. With ``torchrun --max-restarts N`` a run whose
process has died goes on by itself from its last checkpoint in --save.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
from parallel import MODES, Processes, has_checkpoint
from training import (
    DENSE_LEARNING_RATE,
    LEARNING_RATES,
    OPTIMIZERS,
    PRESETS,
    PROJECTIONS,
    STATES,
    Run,
    Settings,
    Stop,
    load_data,
    pretrain,
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, defaults = parser.add_argument, Settings()
    add("--demo", action="store_true", help="AdamW, APOLLO and Mini in turn; a table and a PNG")
    add("--sweep", action="store_true", help="repeat the search for the learning rates")
    add("--optimizer", choices=OPTIMIZERS, help=f"default {defaults.optimizer}")
    add("--preset", "--config", choices=PRESETS, help=f"default {defaults.preset}")
    add("--data", nargs="+", metavar="FILE", help="text files (default: Python's standard library)")
    add("--steps", type=int, help=f"default {defaults.steps}")
    add("--batch-size", type=int, help=f"default {defaults.batch_size}")
    add("--seq-len", type=int, help=f"default {defaults.seq_len}")
    add("--lr", type=float, help=f"of the matrices; default by optimizer: {LEARNING_RATES}")
    add("--dense-lr", type=float, help=f"of all else; default {DENSE_LEARNING_RATE}")
    add("--rank", type=int, help="default: a quarter of the hidden size; 1 for Mini")
    add("--proj", choices=PROJECTIONS, help="the projection's distribution; default random")
    add("--warmup", type=float, help="share of the steps; default 0.1")
    add("--seed", type=int)
    add("--dtype", choices=("float32", "bfloat16"))
    add("--int8", action="store_const", const=True, help="attention and MLP weights in int8")
    add("--dense-state", choices=STATES, help="moments of embedding, head and norms")
    add("--embeddings", action="store_const", const=True, help="low-rank embedding and head")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--eval-every", type=int)
    add("--eval-batches", type=int)
    add("--save", type=Path, metavar="FILE", help="write checkpoints here")
    add("--save-every", type=int, default=100, metavar="STEPS")
    add("--resume", type=Path, metavar="FILE", help="go on from a checkpoint")
    add(
        "--log",
        "--csv",
        type=Path,
        metavar="FILE",
        help="CSV, or JSON lines if it ends in .jsonl; torchrun lets only --csv through",
    )
    add("--detail", action="store_true", help="log scales, update norms and the limiter too, for "
        "python -m apollo_kernels plot")  # fmt: skip
    add("--gradient-release", action="store_true", help="step in backward, and hold few gradients")
    add("--parallel", choices=MODES, help="under torchrun; checkpoints are folders then, which "
        "any number of processes resumes from")  # fmt: skip
    add("--out", type=Path, default=Path("runs/demo"), help="of the demo; default runs/demo")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "seq_len", "rank", "save_every", "eval_every", "lr"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.gradient_release and (options.demo or options.sweep):
        parser.error("--gradient-release is for a run of one optimizer")
    if options.detail and (options.demo or options.sweep):
        parser.error("--detail is for a run of one optimizer")
    if options.parallel and (options.demo or options.sweep):
        parser.error("--parallel is for a run of one optimizer")
    return options


def settings_of(options: argparse.Namespace, **defaults: object) -> Settings:
    given = {f.name: getattr(options, f.name) for f in fields(Settings)}
    given = {k: v for k, v in given.items() if v is not None}
    given.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(**{**defaults, **given})
    settings.data = tuple(str(Path(p).resolve()) for p in settings.data)
    return settings


def resumed_settings(options: argparse.Namespace, content: dict) -> Settings:
    """The checkpoint's settings; raises Stop for an argument that contradicts them."""
    saved = json.loads(content["settings"])
    for name, value in saved.items():
        given = getattr(options, name)
        if name == "data" and given is not None:
            given = [str(Path(p).resolve()) for p in given]
        if given is not None and given != value:
            flag = name.replace("_", "-")
            raise Stop(f"--{flag} {given} contradicts the checkpoint, which was made with {value}")
    return Settings(**{**saved, "data": tuple(saved["data"])})


def was_restarted(options: argparse.Namespace) -> bool:
    """Whether torchrun has started these processes again, after one of them died, and there is a
    checkpoint to go on from; with none the run begins anew."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and options.save is not None and has_checkpoint(options.save)


def load_checkpoint(path: Path) -> dict:
    if not path.is_file():
        raise Stop(f"--resume: no such file: {str(path)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Stop(f"--resume: {str(path)!r} is no checkpoint of this script: {error}") from error


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.demo or options.sweep:
            import demo

            (demo.sweep if options.sweep else demo.demo)(options)
            return 0
        processes = Processes(options.parallel, options.device or settings_of(options).device)
        content = None
        if options.parallel and was_restarted(options):
            options.resume = options.save
        if options.resume:
            read = processes.read_rest if options.parallel else load_checkpoint
            content = read(options.resume)
        settings = resumed_settings(options, content) if content else settings_of(options)
        run = Run(settings, *load_data(settings.data, settings.seq_len), processes=processes)
        if options.gradient_release:  # no setting, since it changes no number of the run
            run.release_gradients()
        if content and options.parallel:
            run.restore_parts(options.resume)
        elif content:
            run.restore(content)
        if options.detail:  # no setting either
            run.record_detail()
        pretrain(run, options.save, options.save_every, options.log)
        last = run.log[-1]
        if processes.first:
            print(f"step {run.step}: loss {last['loss']:.4f}, validation {last['validation']:.4f}")
        processes.end()
        return 0
    except Stop as stop:
        print(f"pretrain.py: error: {stop}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
