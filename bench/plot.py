"""Pictures of what the benchmarks measured."""

from __future__ import annotations

import math
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


def roofline(
    ceilings: dict[str, float], card: str, verbs: list[tuple[str, int, Any]], path: Path
) -> None:
    """Attainable rate over flops per byte, and where each verb (label, rank, cost) stands."""
    rate, bandwidth = ceilings["matmul bf16"], ceilings["copy"]
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    intensity = [2 ** (i / 4) for i in range(-12, 52)]
    roof = [min(rate, x * bandwidth) / 1e9 for x in intensity]
    axes.loglog(intensity, roof, color="#4C566A", lw=2)
    colors = {1: PUBLISHED, 64: "#7A9E3F", 256: OURS}
    for label, rank, cost in verbs:
        x = cost.flops / cost.nbytes
        y = min(rate, x * bandwidth) / 1e9
        axes.plot(x, y, "o", color=colors[rank], ms=8)
        axes.annotate(
            label, (x, y), xytext=(4, -6), textcoords="offset points", rotation=-30, va="top"
        )
    axes.set(
        xlabel="flops per byte", ylabel="attainable Gflop/s", title=f"Roofline of {card}, bf16"
    )
    axes.grid(alpha=0.25, which="both")
    figure.savefig(path, dpi=130)
    plt.close(figure)
