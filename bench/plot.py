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


def convergence(
    runs: list[tuple[str, str, int, str, str | None, bool, list[Any]]], path: Path
) -> None:
    """Final losses as differences to AdamW's at the same seed, one dot per seed. On the left over
    the rank, a line through the means; on the right all optimizers, best mean on top. Each of
    ``runs``: label, optimizer, rank, proj, rival, whether weights are int8, and its results."""
    adamw = next(run for run in runs if run[1] == "adamw")
    base = {result["settings"]["seed"]: result["curve"][-1][1] for result in adamw[-1]}
    gaps = {
        label: [r["curve"][-1][1] - base[r["settings"]["seed"]] for r in results if r["curve"]]
        for label, *_, results in runs
    }
    mean = sum(base.values()) / len(base)
    tall = max(4.6, 0.28 * len(runs) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13.0, tall), layout="constrained")
    left.axhline(0.0, color="#4C566A", ls="--", lw=1.6, label=f"AdamW (mean {mean:.3f})")
    _over_ranks(left, runs, gaps)
    _all_of_them(right, runs, gaps)
    figure.suptitle("Same batches, one dot per seed", fontweight="bold")
    figure.savefig(path, dpi=130)
    plt.close(figure)


PROJECTIONS = {
    "random": ("APOLLO, gaussian", OURS),
    "rademacher": ("APOLLO, signs", "#7A9E3F"),
    "sparse": ("APOLLO, sparse", "#8A6BBE"),
}


def _over_ranks(axes: Any, runs: list[Any], gaps: dict[str, list[float]]) -> None:
    series: dict[tuple[str, str], list[tuple[int, list[float]]]] = {}
    for label, optimizer, rank, proj, rival, int8, _ in runs:
        if optimizer == "apollo" and not int8 and rival in (None, "apollo_torch"):
            line = PROJECTIONS[proj] if rival is None else ("apollo_torch, gaussian", PUBLISHED)
            series.setdefault(line, []).append((rank, gaps[label]))
    for number, ((name, color), points) in enumerate(series.items()):
        # so that dots do not hide each other
        shift = 2 ** (0.06 * (number - (len(series) - 1) / 2))
        points = sorted(points)
        means = [sum(found) / len(found) for _, found in points]
        axes.plot([rank * shift for rank, _ in points], means, color=color, lw=1.6, label=name)
        for rank, found in points:
            axes.plot([rank * shift] * len(found), found, "o", color=color, ms=4.5, alpha=0.75)
    ranks = sorted({rank for points in series.values() for rank, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set(xlabel="rank", ylabel="validation loss, to AdamW's at the same seed (nats)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def _all_of_them(axes: Any, runs: list[Any], gaps: dict[str, list[float]]) -> None:
    rivals = {label: rival for label, _, _, _, rival, *_ in runs}
    means = {label: sum(found) / len(found) for label, found in gaps.items() if found}
    names = sorted(means, key=means.__getitem__, reverse=True)
    axes.axvline(0.0, color="#4C566A", ls="--", lw=1.6)
    for place, name in enumerate(names):
        known = rivals[name]
        color = OURS if known is None else PUBLISHED if known == "apollo_torch" else OTHER
        color = "#4C566A" if name == "AdamW" else color
        axes.plot(gaps[name], [place] * len(gaps[name]), "o", color=color, ms=4.5, alpha=0.75)
        axes.plot([means[name]], [place], "|", color=color, ms=13, mew=2)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xlabel="validation loss, to AdamW's at the same seed (nats)")
    axes.grid(alpha=0.25)


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
