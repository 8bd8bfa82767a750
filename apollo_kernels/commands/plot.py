"""``plot``: what a training run has logged, as a picture."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apollo_kernels.commands.output import check_target, matplotlib_figure, save_figure

COLOURS = ("#C8553D", "#2A7F9E", "#7A9E3F", "#8A6BBE", "#4C566A", "#E0B04B", "#B5838D", "#5F9EA0")
# What other logs call a column: those of Hugging Face's Trainer, and of our callback in it.
ALIASES = {"eval_loss": "validation", "learning_rate": "lr", "train_loss": "loss"}
# Trainer's last record tells of the whole run: its train_loss is the mean over all steps.
OF_THE_RUN = "train_runtime"
ALIASES |= {"apollo_limited": "limited", "apollo_update_norm": "update_norm"}
Row = dict[str, Any]

_EPILOG = """\
A log is a CSV file with a column "step"; or JSON lines, an object with "step" per line; or the
trainer_state.json of Hugging Face's Trainer. Other columns, each of which may be missing or empty:

  loss, validation        nats
  lr                      the learning rate
  update_norm             of all low-rank updates together, before the learning rate
  limited                 the share of matrices that the limiter held since the row before
  scale_p10, _p50, _p90   quantiles of the scale factors, medians over the parameters
  detail                  (JSON lines) what optimizer.stats(detail=True)["detail"] gave: kinds of
                          parameters are drawn apart

examples/pretrain.py --detail --log run.jsonl writes all of them.

examples:
  python -m apollo_kernels plot run.jsonl
  python -m apollo_kernels plot adamw.csv apollo.csv apollo-mini.csv --png runs.png

exit codes: 0 drawn; 2 wrong input."""


def add_arguments(parser: Any) -> None:
    parser.description = (
        "Draws training logs: loss, learning rate, and of runs under APOLLO that were recorded the "
        "norms of updates, how often the norm-growth limiter held one, and quantiles of the scale "
        "factors. Several logs lie over one another. A panel without numbers is left out."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="CSV, JSON lines, trainer_state.json"
    )
    parser.add_argument("--png", metavar="FILE", help="default: the first log's name with .png")
    parser.add_argument("--title", help="default: none")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")


# ---- logs ----------------------------------------------------------------------------------------


@dataclass
class Log:
    name: str
    rows: list[Row]

    def points(self, column: str) -> tuple[list[float], list[float]]:
        """Steps and values of a column, where it has a finite number."""
        pairs = [(row["step"], row[column]) for row in self.rows if _is_number(row.get(column))]
        return [step for step, _ in pairs], [value for _, value in pairs]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read(path: Path) -> Log:
    """Raises ValueError in one line for what is no log."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if text.lstrip().startswith("{"):
        rows = _json_rows(text, path)
    else:
        rows = [
            {key: _number(value) for key, value in row.items() if key is not None}
            for row in csv.DictReader(text.splitlines())
        ]
    rows = [
        {ALIASES.get(key, key): value for key, value in row.items()}
        for row in rows
        if OF_THE_RUN not in row
    ]
    rows = [row for row in rows if _is_number(row.get("step"))]
    if not rows:
        raise ValueError(f"{path} is no training log: it has no rows with a number under 'step'")
    for row in rows:
        _check_detail(row, path)
    return Log(path.stem, sorted(rows, key=lambda row: row["step"]))


def _json_rows(text: str, path: Path) -> list[Row]:
    rows: Any
    try:
        whole = json.loads(text)
        rows = whole.get("log_history", [whole])
    except json.JSONDecodeError:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: log_history must be a list, got {json.dumps(rows)[:40]}")
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds rows that are no JSON objects")
    return rows


def _check_detail(row: Row, path: Path) -> None:
    """Raises ValueError for a detail that is not what stats(detail=True) gives."""
    detail = row.get("detail") or {}
    where = f"{path}, step {row.get('step')}: detail"
    if not isinstance(detail, dict):
        raise ValueError(f"{where} must be an object by parameter, got {json.dumps(detail)[:40]}")
    for name, told in detail.items():
        scales = told.get("scales") if isinstance(told, dict) else None
        if not isinstance(scales, dict) or "p50" not in scales:
            raise ValueError(f"{where} of {name!r} has no scales with p50: {json.dumps(told)[:40]}")


def _number(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


# ---- the picture ---------------------------------------------------------------------------------


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean over a fiftieth of the run that ends at each place."""
    width = max(1, len(values) // 50)
    found, total = [], 0.0
    for place, value in enumerate(values):
        total += value - (values[place - width] if place >= width else 0.0)
        found.append(total / min(place + 1, width))
    return found


def _draw_loss(axes: Any, logs: Sequence[Log]) -> None:
    for log, colour in zip(logs, _colours(logs), strict=True):
        steps, losses = log.points("loss")
        held_out, validation = log.points("validation")
        last = f"  {validation[-1]:.3f}" if validation else ""
        if losses:
            alpha = 0.35 if validation else 1.0
            label = None if validation else log.name
            axes.plot(steps, smoothed(losses), color=colour, lw=1, alpha=alpha, label=label)
        if validation:
            axes.plot(held_out, validation, color=colour, lw=1.8, marker="o", ms=3,
                      label=f"{log.name}{last}")  # fmt: skip
    every = sorted(value for log in logs for value in log.points("loss")[1])
    if len(every) > 20:  # the first steps would flatten the rest
        low = min([every[0], *(v for log in logs for v in log.points("validation")[1])])
        axes.set_ylim(low - 0.05 * abs(low), every[int(0.97 * (len(every) - 1))])
    axes.set_title("loss: training (faint) and validation", loc="left")
    axes.legend(frameon=False, fontsize=9)


def _draw_column(column: str, title: str, log_scale: bool) -> Callable[[Any, Sequence[Log]], None]:
    def draw(axes: Any, logs: Sequence[Log]) -> None:
        for log, colour in zip(logs, _colours(logs), strict=True):
            steps, values = log.points(column)
            if steps:
                axes.plot(steps, values, color=colour, lw=1.5, label=log.name)
        if log_scale:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, None)
        axes.set_title(title, loc="left")

    return draw


def _draw_scales(axes: Any, logs: Sequence[Log]) -> None:
    kinds = kinds_of(logs[0]) if len(logs) == 1 else {}
    for log, colour in zip(logs, _colours(logs), strict=True):
        steps, low = log.points("scale_p10")
        _, high = log.points("scale_p90")
        middle_steps, middle = log.points("scale_p50")
        if len(low) == len(high) and low:
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
        if not kinds:
            axes.plot(middle_steps, middle, color=colour, lw=1.8, label=log.name)
    for (kind, points), colour in zip(kinds.items(), COLOURS * len(kinds), strict=False):
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, label=kind)
    axes.set_yscale("log")
    axes.set_title("scale factors: medians, and p10 to p90 (band)", loc="left")
    if kinds:
        axes.legend(frameon=False, fontsize=8, ncols=2)


def kinds_of(log: Log) -> dict[str, list[tuple[float, float]]]:
    """(step, median of the p50) of the parameters that differ by numbers in their names alone."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in log.rows:
        several: dict[str, list[float]] = {}
        for name, told in (row.get("detail") or {}).items():
            middle = told["scales"]["p50"]
            if _is_number(middle):
                several.setdefault(_kind(name), []).append(middle)
        for kind, values in several.items():
            found.setdefault(kind, []).append((row["step"], statistics.median(values)))
    return found


def _kind(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> q_proj; what has no such name stays as it is."""
    parts = [part for part in re.split(r"[.]", name) if part != "weight" and not part.isdigit()]
    return parts[-1] if parts else name


PANELS: Mapping[tuple[str, ...], Callable[[Any, Sequence[Log]], None]] = {
    ("loss", "validation"): _draw_loss,
    ("update_norm",): _draw_column("update_norm", "norm of low-rank updates, before lr", True),
    ("limited",): _draw_column("limited", "share of matrices held by the limiter", False),
    ("scale_p50", "detail"): _draw_scales,
    ("lr",): _draw_column("lr", "learning rate", False),
}


def _colours(logs: Sequence[Log]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(logs))]


def _has_points(log: Log, column: str, alone: bool) -> bool:
    """A detail is drawn of a single log."""
    return alone and bool(kinds_of(log)) if column == "detail" else bool(log.points(column)[0])


def draw(logs: Sequence[Log], title: str | None, path: Path) -> None:
    wanted = [
        panel for columns, panel in PANELS.items()
        if any(_has_points(log, column, len(logs) == 1) for log in logs for column in columns)
    ]  # fmt: skip
    if not wanted:
        raise ValueError(
            f"{logs[0].name}: no column to draw among {[c for k in PANELS for c in k]}"
        )
    across = min(2, len(wanted))
    down = math.ceil(len(wanted) / across)
    figure = matplotlib_figure("plot", figsize=(5.6 * across, 3.4 * down))
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(wanted) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, wanted, strict=False):
        panel(axes, logs)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    if title:
        figure.suptitle(title, fontweight="bold")
    save_figure(figure, path)


def command(options: Any) -> str:
    logs = [read(Path(name)) for name in options.logs]
    path = Path(options.logs[0]).with_suffix(".png")
    if options.png is not None:
        path = Path(options.png)
    if any(path.exists() and path.samefile(name) for name in options.logs):
        raise ValueError(f"--png {str(path)!r} is a log that is drawn")
    check_target(path, options.force)
    draw(logs, options.title, path)
    return str(path)
