"""``bench``: a step of this package next to AdamW's and apollo_torch's, in one run."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from apollo_kernels import backends, estimate, groups
from apollo_kernels.commands import contest, timing
from apollo_kernels.commands.output import (
    check_target,
    matplotlib_figure,
    paint,
    save_figure,
    table,
    write_whole,
)

USUAL = ("ours", "AdamW foreach", "AdamW fused", "apollo_torch")  # how the names begin
COLUMNS = [
    "optimizer", "ms", "p20", "p80", "x AdamW", "x apollo_torch", "layers", "state MB", "launches",
    "host ms", "syncs", "extra MB", "note",
]  # fmt: skip
OURS, PUBLISHED, OTHER = "#C8553D", "#2A7F9E", "#A3ABB8"


def add_arguments(parser: Any) -> None:
    parser.description = (
        "Times one optimizer step over the attention and MLP matrices of a LLaMA: APOLLO, APOLLO "
        "with sparse projections and APOLLO-Mini on every back end here, torch's AdamW, and "
        "apollo_torch where it is installed. Gradients are random and the same for all. ms is a "
        "median, p20 and p80 stand beside it: what differs by less than that is equal, and only "
        "figures of one run compare."
    )
    parser.epilog = """examples:
  python -m apollo_kernels bench
  python -m apollo_kernels bench 1b --layers 4 --dtype bfloat16 --csv step.csv --png step.png
  python -m apollo_kernels bench 60m --all --json > step.json"""
    add = parser.add_argument
    names = ", ".join(estimate.SHORT)
    add("model", nargs="?", default="60m", help=f"{names}, or a config.json; default 60m")
    add("--layers", type=int, help="default: all, or as many as fit, scaled")
    add("--rank", type=int, help="default: hidden size / 4, at most 256")
    add("--dtype", choices=tuple(contest.DTYPES), help="default bfloat16, on a CPU float32")
    add("--rounds", type=int, default=21, help="timed steps of each; default 21")
    add("--device", help="cpu, cuda:0, ...; default: a GPU if there is one")
    add("--all", action="store_true", help="every peer here: Adafactor, GaLore, 8-bit AdamW")
    add("--json", action="store_true", help="rows as JSON instead of the table")
    add("--csv", metavar="FILE", help="also write the rows there")
    add("--png", metavar="FILE", help="also a picture (needs matplotlib)")
    add("--force", action="store_true", help="replace files that exist")


def _device(asked: str | None) -> torch.device:
    if asked is None:
        return timing.default_device()
    try:
        device = torch.device(asked)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {asked!r}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {asked!r}: a step is timed on a CPU or on a CUDA device")
    return device


def _model(options: Any) -> contest.Model:
    a = estimate.architecture(options.model)
    module = estimate.on_meta(a)
    chosen = [c for c in groups.choose_parameters(module) if c.low_rank]
    shapes: list[tuple[int, int]] = []  # of experts each
    for c in chosen:
        m, n = c.matrix
        shapes += [(m, n)] * math.prod(c.parameter.shape[: c.batch_dims])
    for name in ("layers", "rank", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if options.layers is not None and options.layers > a.layers:
        raise ValueError(f"--layers {options.layers}: {options.model} has {a.layers}")
    layer = shapes[: len(shapes) // a.layers]
    return contest.Model(options.model, layer, options.layers or a.layers, a.hidden)


def command(options: Any) -> str:
    model, device = _model(options), _device(options.device)
    dtype_name = options.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    dtype = contest.DTYPES[dtype_name]
    if options.png is not None:
        matplotlib_figure("--png")
    for path in (options.csv, options.png):  # whether they can be written, before a minute passes
        check_target(path, options.force)
    timing.keep_freed_memory()
    every = contest.entrants(model, options.rank or min(256, max(1, model.hidden // 4)), device)
    if not options.all:
        every = {name: build for name, build in every.items() if name.startswith(USUAL)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "two optimizers of this process")  # they share weights
        raced = contest.race(model, every, dtype, device, options.rounds)
    rows = [{"model": model.name, "dtype": dtype_name, **row} for row in raced]
    card = timing.card_name(device)
    name = estimate.SHORT.get(model.name, model.name)
    title = f"{card}: {name}, {model.layers} layers, {dtype_name}"
    if options.csv is not None:
        write_csv(rows, options.csv)
    if options.png is not None:
        draw(raced, title, options.png)
    if options.json:
        about = {"card": card, "torch": torch.__version__, "threads": torch.get_num_threads()}
        return json.dumps({"environment": about, "rows": rows}, indent=2)
    heading = f"{title}; torch {torch.__version__}, {torch.get_num_threads()} threads"
    columns = [key for key in COLUMNS if any(key in row for row in raced)]
    ordered = sorted(raced, key=lambda row: row.get("ms", math.inf))
    shown = [{key: row.get(key) for key in columns} for row in ordered]
    lines = [paint(heading, "bold"), table(shown)]
    if device.type == "cuda":
        absent = [(name, reason) for name, reason in backends.backends(device) if reason]
        lines += [paint(f"not run: ours {name}: {reason}", "dim") for name, reason in absent]
    return "\n".join(lines)


def write_csv(rows: Sequence[dict[str, Any]], path: str) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def draw(rows: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Milliseconds of each optimizer, the fastest on top."""
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: -row["ms"])
    figure = matplotlib_figure("--png", figsize=(7, 0.9 + 0.34 * len(timed)))
    axes = figure.subplots()
    colours = [
        OURS if row["optimizer"].startswith("ours")
        else PUBLISHED if row["optimizer"].startswith("apollo_torch") else OTHER
        for row in timed
    ]  # fmt: skip
    bars = axes.barh([row["optimizer"] for row in timed], [r["ms"] for r in timed], color=colours)
    axes.bar_label(bars, [f"{row['ms']:.3g}" for row in timed], padding=3, fontsize=9)
    axes.margins(x=0.12)
    axes.set_xlabel("ms per optimizer step, medians")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
