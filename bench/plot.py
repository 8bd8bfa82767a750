"""Pictures of what the benchmarks measured."""

from __future__ import annotations

import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
OURS, PUBLISHED, OTHER = "#C8553D", "#2A7F9E", "#A3ABB8"


def step(rows: list[dict[str, Any]], card: str, path: Path) -> None:
    """One panel per model and dtype: ms per step of each optimizer, fastest on top."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            panels.setdefault((row["model"], row["dtype"]), []).append(row)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    tallest = max(len(panel) for panel in panels.values())
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(5.2 * columns, lines * (0.9 + 0.3 * tallest)),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((model, dtype), panel) in zip(grid.flat, panels.items(), strict=False):
        panel = sorted(panel, key=lambda row: -row["ms"])
        names = [row["optimizer"] for row in panel]
        bars = axes.barh(names, [row["ms"] for row in panel], color=[_color(n) for n in names])
        axes.bar_label(bars, [f"{row['ms']:.3g}" for row in panel], padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.set(title=f"LLaMA-{model}, {dtype}", xlabel="ms per optimizer step")
    figure.suptitle(f"{card}: one step over all matrices, medians", fontweight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _color(name: str) -> str:
    return OURS if name.startswith("ours") else PUBLISHED if "apollo_torch" in name else OTHER


def roofline(folder: Path) -> None:
    """roofline.png from the folder's roofline.json and, once it is there, ops.json: the measured
    ceilings, hollow marks where the model of roofline.py puts each verb, filled ones for what
    bench_ops.py measured of it in bf16, one per shape and back end."""
    source = folder / "roofline.json"
    if not source.exists():
        return
    content = json.loads(source.read_text())
    rate, bandwidth = content["ceilings"]["matmul bf16"], content["ceilings"]["copy"]
    figure, axes = plt.subplots(figsize=(7.8, 4.8), layout="constrained")
    intensity = [2 ** (i / 4) for i in range(-12, 52)]
    roof = [min(rate, x * bandwidth) / 1e9 for x in intensity]
    axes.loglog(intensity, roof, color="#4C566A", lw=2, label="ceilings measured here")
    colors = {1: PUBLISHED, 64: "#7A9E3F", 128: "#8A6BBE", 256: OURS}
    for verb in content["verbs"]:
        x, rank = verb["flops/byte"], verb["rank"]
        y = min(rate, x * bandwidth) / 1e9
        axes.plot(x, y, "o", mfc="none", mec=colors[rank], ms=10, mew=1.6)
        label = verb["verb"] if verb["verb"] == "apply" else f"project, rank {rank}"
        beyond = x * bandwidth > rate  # the ridge: below the roof there is room to the right
        place = {"xytext": (6, -14) if beyond else (-6, 10), "ha": "left" if beyond else "right"}
        place["textcoords"] = "offset points"
        axes.annotate(label, (x, y), **place)
    for row in _measured(folder / "ops.json", colors):
        y = row["GB/s"] * row["flops/byte"]
        axes.plot(row["flops/byte"], y, MARKS[row["backend"]], color=colors[row["rank"]], ms=5)
    for mark, label in (("o", "the model: on the roof"), *_legend(folder / "ops.json")):
        hollow = {"mfc": "none"} if "model" in label else {}
        axes.plot([], [], mark, color=OTHER, ls="", label=label, **hollow)
    axes.set(
        xlabel="flops per byte that must move",
        ylabel="Gflop/s",
        title=f"{content['environment']['card']}: verbs in bf16, gaussian projection",
    )
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    axes.grid(alpha=0.25, which="both")
    figure.savefig(folder / "roofline.png", dpi=130)
    plt.close(figure)


MARKS = {"torch": ".", "cuda": "D", "triton": "^"}


def _measured(path: Path, ranks: Container[int]) -> list[dict[str, Any]]:
    """The rows of ops.json that have a place on the roof: they compute."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [
        row
        for row in rows
        if row.get("flops/byte")
        and row["dtype"] == "bfloat16"
        and row["proj"] == "gaussian"
        and (row["rank"] in ranks if row["verb"] == "project" else row["rank"] == 1)
    ]


def _legend(path: Path) -> list[tuple[str, str]]:
    found = sorted({row["backend"] for row in _measured(path, range(10**6))})
    return [(MARKS[backend], f"measured, {backend} back end") for backend in found]


def convergence(runs: list[tuple[str, str, int, str, bool, list[Any]]], path: Path) -> None:
    """Final losses over the rank, as differences to AdamW's at the same seed: one dot per seed, a
    line through the means; Mini, which has no rank to choose, as a line across. Each of ``runs``:
    label, optimizer, rank, proj, whether it is the published package, and its results."""
    colors = {"random": OURS, "rademacher": "#7A9E3F", "sparse": "#8A6BBE"}
    names = {
        "random": "APOLLO, gaussian",
        "rademacher": "APOLLO, signs",
        "sparse": "APOLLO, sparse",
    }
    adamw = [run for run in runs if run[1] == "adamw"]
    base = {result["settings"]["seed"]: result["curve"][-1][1] for result in adamw[0][-1]}
    series: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    figure, axes = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
    mean = sum(base.values()) / len(base)
    axes.axhline(0.0, color="#4C566A", ls="--", lw=1.6, label=f"AdamW (mean {mean:.3f})")
    for label, optimizer, rank, proj, published, results in runs:
        gaps = [r["curve"][-1][1] - base[r["settings"]["seed"]] for r in results]
        if optimizer == "apollo" and gaps:
            name = "apollo_torch, gaussian" if published else names[proj]
            color = PUBLISHED if published else colors[proj]
            series.setdefault((name, color), []).append((rank, gaps))
        elif optimizer != "adamw" and gaps:
            gap = sum(gaps) / len(gaps)
            axes.axhline(gap, color=OTHER, ls=":", lw=1.6, label=label.split(",")[0])
    for number, ((name, color), points) in enumerate(series.items()):
        shift = 2 ** (
            0.06 * (number - (len(series) - 1) / 2)
        )  # so that dots do not hide each other
        points = sorted(points)
        means = [sum(gaps) / len(gaps) for _, gaps in points]
        axes.plot([rank * shift for rank, _ in points], means, color=color, lw=1.6, label=name)
        for rank, gaps in points:
            axes.plot([rank * shift] * len(gaps), gaps, "o", color=color, ms=4.5, alpha=0.75)
    ranks = sorted({rank for points in series.values() for rank, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set(
        xlabel="rank",
        ylabel="validation loss, to AdamW's at the same seed (nats)",
        title="Same batches, one dot per seed",
    )
    axes.grid(alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def scale_ratio(
    series: dict[int, list[tuple[list[int], list[float]]]],
    matrices: dict[int, list[float]],
    side: int,
    redraws: list[int],
    path: Path,
) -> None:
    """Scale factors by rank over the steps; the full-rank ones as multiples of them; and a dot per
    matrix beside sqrt(n / r). ``series``: of each rank (0: full) steps and values of the scale and
    of the ratio's p10, median and p90; ``matrices``: each matrix's ratio; ``redraws``: steps that
    begin with new projections."""
    ranks = [rank for rank in series if rank]
    shades = plt.get_cmap("viridis")
    colors = {rank: shades(0.85 * i / max(1, len(ranks) - 1)) for i, rank in enumerate(ranks)}
    colors[0] = "#4C566A"
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    for rank, (scale, low, center, high) in series.items():
        share = f"n/{side // rank}" if rank and side % rank == 0 else str(rank)
        label = f"r = {share}" if rank else "full rank"
        left.plot(*scale, color=colors[rank], lw=1.6, label=label)
        if rank:
            middle.fill_between(low[0], low[1], high[1], color=colors[rank], alpha=0.13, lw=0)
            middle.plot(*center, color=colors[rank], lw=1.6)
            predicted = math.sqrt(side / rank)
            middle.axhline(predicted, color=colors[rank], lw=1.1, ls="--")
            spots = matrices[rank]
            places = [predicted * 1.01 ** (i - len(spots) / 2 + 0.5) for i in range(len(spots))]
            right.plot(places, spots, "o", color=colors[rank], ms=4, alpha=0.75)
    left.set_yscale("log")
    left.set(xlabel="step", ylabel="scale factor, median over channels", title="s by rank")
    left.legend(frameon=False, fontsize=9)
    middle.set(xlabel="step", title="full rank over rank r; dashed: sqrt(n / r)")
    ends = [0.85 * math.sqrt(side / max(ranks)), 1.18 * math.sqrt(side / min(ranks))]
    right.plot(ends, ends, color=OTHER, lw=1.2, ls="--", label="equal", zorder=0)
    right.set(xlabel="sqrt(n / r)", ylabel="measured", title="one dot per matrix")
    right.legend(frameon=False, fontsize=9)
    values = [math.sqrt(side / rank) for rank in ranks]
    for axes in (middle, right):
        axes.set_yscale("log")
        axes.set_yticks(values, [f"{value:.3g}" for value in values])
        axes.minorticks_off()
    right.set_xscale("log")
    right.set_xticks(values, [f"{value:.3g}" for value in values])
    right.minorticks_off()
    for step in redraws:
        for axes in (left, middle):
            axes.axvline(step, color=OTHER, lw=1, ls=":", zorder=0)
        middle.annotate("new projections", (step, middle.get_ylim()[0]), xytext=(-4, 4),
                        textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
    figure.suptitle(f"Theorem A.4 on a small run, n = {side}", fontweight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)
