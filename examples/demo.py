"""`pretrain.py --demo`: AdamW, APOLLO, Mini, and Mini over int8 weights on the same batches; a
table and a picture. And the sweep that its learning rates come from."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from training import (
    DENSE_LEARNING_RATE,
    LEARNING_RATES,
    PRESETS,
    Run,
    Settings,
    load_data,
    pretrain,
)

LABELS = {"adamw": "AdamW", "apollo": "APOLLO", "apollo-mini": "APOLLO-Mini"}
LABELS |= {"q-apollo-mini": "Q-APOLLO-Mini"}
COLORS = {"adamw": "#4C566A", "apollo": "#C8553D", "apollo-mini": "#2A7F9E"}
COLORS |= {"q-apollo-mini": "#7A9E3F"}
SWEEP = {
    "adamw": (2.5e-4, 5e-4, 1e-3),
    "apollo": (2.5e-3, 5e-3, 1e-2),
    "apollo-mini": (2.5e-3, 5e-3, 1e-2),
}


def demo_settings(options: argparse.Namespace, optimizer: str, **changes: object) -> Settings:
    """Tiny in float32 on a CPU; the paper's 60M in bf16 where there is a GPU."""
    gpu = torch.cuda.is_available() and options.device in (None, "cuda")
    settings = Settings(optimizer=optimizer, steps=700)
    if gpu:
        settings = Settings(optimizer, "60m", steps=2000, batch_size=64, seq_len=256)
        settings.dtype, settings.device = "bfloat16", "cuda"
    for name in ("preset", "steps", "batch_size", "seq_len", "seed", "dtype", "dense_lr"):
        if getattr(options, name) is not None:
            setattr(settings, name, getattr(options, name))
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def demo(options: argparse.Namespace) -> None:
    """Trains the four in turn; prints the table, and writes it, the PNG and the CSV logs."""
    begin, out = time.perf_counter(), options.out
    data = load_data(tuple(options.data or ()), options.seq_len or 256)
    runs: dict[str, Run] = {}
    rows = []
    for name in LABELS:
        quantized = name.startswith("q-")
        settings = demo_settings(options, name.removeprefix("q-"), int8=quantized)
        if not runs:
            announce(settings, data)
        runs[name] = Run(settings, *data)
        pretrain(runs[name], None, settings.steps, out / f"{name}.csv")
        rows.append(summary(LABELS[name], runs[name]))
        runs[name].forget()
    print_table(rows)
    print(verdict(rows))
    (out / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture = out / "pretrain.png"
    draw(runs, rows, picture)
    print(f"\n{picture}, {out}/*.csv; {time.perf_counter() - begin:.0f} s in all")


def announce(settings: Settings, data: tuple[torch.Tensor, torch.Tensor]) -> None:
    hidden, mlp, heads, layers = PRESETS[settings.preset]
    print(f"LLaMA {settings.preset}: hidden {hidden}, MLP {mlp}, {heads} heads, {layers} layers,")
    print(f"  {settings.dtype} on {settings.device}, {torch.get_num_threads()} threads")
    print(
        f"Text: {len(data[0]) / 1e6:.1f} MB, {len(data[1]) / 1e6:.1f} MB held out; a token per byte"
    )
    rates = ", ".join(f"{LABELS[n]} {LEARNING_RATES[n]:g}" for n in SWEEP)
    print(f"{settings.steps} steps of {settings.batch_size} x {settings.seq_len} bytes")
    print(f"Learning rates of the matrices, from a sweep (--sweep repeats it): {rates}.")
    print(f"Embedding, head and norms take AdamW at {settings.dense_lr:g} under all of them: at")
    print("  this size their rate decides more than the optimizer of the matrices.\n", flush=True)


def summary(label: str, run: Run) -> dict[str, object]:
    timed = run.log[len(run.log) // 10 :]  # after warm-up
    middle = len(timed) // 2
    return {
        "optimizer": label,
        "loss": run.log[-1]["validation"],
        "weights_mb": run.weight_bytes() / 1e6,
        "state_mb": run.state_bytes() / 1e6,
        "step_ms": sorted(r["step_ms"] for r in timed)[middle],
        "tokens_per_s": sorted(r["tokens_per_s"] for r in timed)[middle],
    }


def print_table(rows: list[dict[str, object]]) -> None:
    print(f"\n{'':<14}{'validation':>11}{'':>12}{'weights':>9}{'state':>8}{'ms per':>11}")
    head = f"{'':<14}{'loss':>11}{'perplexity':>12}{'MB':>9}{'MB':>8}{'opt. step':>11}"
    print(f"{head}{'tokens/s':>10}")
    for r in rows:
        print(
            f"{r['optimizer']:<14}{r['loss']:>11.3f}{math.exp(r['loss']):>12.2f}"
            f"{r['weights_mb']:>9.2f}{r['state_mb']:>8.2f}{r['step_ms']:>11.2f}"
            f"{r['tokens_per_s']:>10.0f}"
        )
    print("(loss in nats per byte, perplexity per byte)")


def verdict(rows: list[dict[str, object]]) -> str:
    """What this run shows, from its own figures."""
    base = rows[0]
    lines = []
    for r in rows[1:]:
        gap, share = r["loss"] - base["loss"], r["state_mb"] / base["state_mb"]
        weights = r["weights_mb"] / base["weights_mb"]
        lighter = f" and {weights:.0%} of its weights' bytes" if weights < 0.99 else ""
        lines.append(
            f"{r['optimizer']}: {abs(gap):.3f} {'above' if gap > 0 else 'below'} AdamW's loss, "
            f"with {share:.0%} of its optimizer state{lighter}"
        )
    return "\n" + "\n".join(lines)


def computed_gb(preset: str, name: str, vocabulary: int = 32000) -> tuple[float, float]:
    """Weights and optimizer state of a paper preset, from its shapes: bf16 weights, and for Q- int8
    ones but for embedding and head; bf16 moments for AdamW, float32 ones for the others."""
    hidden, mlp, _, layers = PRESETS[preset]
    matrices = [(hidden, hidden)] * 4 + [(mlp, hidden)] * 3
    dense = 2 * vocabulary * hidden + (2 * layers + 1) * hidden
    count = layers * sum(m * n for m, n in matrices)
    weights = 2 * dense + (1 + 4 / 128 if name.startswith("q-") else 2) * count
    if name == "adamw":
        return weights / 1e9, 2 * 2 * (count + dense) / 1e9
    rank = min(256, hidden // 4) if name == "apollo" else 1
    low = layers * sum(2 * max(shape) * rank for shape in matrices)
    return weights / 1e9, 4 * (low + 2 * dense) / 1e9


def draw(runs: dict[str, Run], rows: list[dict[str, object]], path: Path) -> None:
    """Loss curves; bytes of weights and optimizer state, of this run and, computed, of LLaMA-7B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12.5, 4.6), width_ratios=[2.3, 1, 1], layout="constrained"
    )
    for name, run in runs.items():
        points = [
            (r["step"], r["validation"]) for r in run.log if r["validation"] == r["validation"]
        ]
        steps, losses = zip(*points, strict=True)
        label = f"{LABELS[name]}  {losses[-1]:.3f}"
        left.plot(steps, losses, color=COLORS[name], lw=2, marker="o", ms=3, label=label)
    settings = next(iter(runs.values())).settings
    left.set(xlabel="step", ylabel="validation loss, nats per byte", title="Same batches")
    left.legend(frameon=False, title="final loss")
    left.grid(alpha=0.25)
    sevens = [computed_gb("7b", name) for name in runs]
    this = [(r["weights_mb"], r["state_mb"]) for r in rows]
    names, colors = [LABELS[n] for n in runs], [COLORS[n] for n in runs]
    for axes, values, title, unit in (
        (middle, this, "This model", "MB"),
        (right, sevens, "LLaMA-7B, computed", "GB"),
    ):
        weights, state = zip(*values, strict=True)
        axes.bar(names, weights, color="#D5D9E0", label="weights")
        bars = axes.bar(names, state, bottom=weights, color=colors, label="optimizer state")
        axes.bar_label(bars, [f"{w:.2g} + {s:.2g}" for w, s in values], padding=2, fontsize=8)
        axes.set(title=title, ylabel=f"{unit}: weights (grey) + optimizer state")
        axes.margins(y=0.12)
        axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    figure.suptitle(
        f"Pre-training a {settings.preset} LLaMA on bytes of Python's standard library"
        if not settings.data
        else f"Pre-training a {settings.preset} LLaMA",
        fontweight="bold",
    )
    figure.supxlabel(
        f"Matrices: learning rates {', '.join(f'{LEARNING_RATES[n]:g}' for n in SWEEP)} (in "
        f"order, swept). All else: AdamW at {DENSE_LEARNING_RATE:g}.  7B: bf16 weights (Q-: int8 "
        "matrices) and AdamW moments, float32 moments for APOLLO,\nrank 256, vocabulary 32 000; of "
        "Mini's state nearly all belongs to embedding and head, which stay with AdamW.",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def sweep(options: argparse.Namespace) -> None:
    """Final validation loss of each optimizer at three learning rates, at the same dense rate."""
    data = load_data(tuple(options.data or ()), options.seq_len or 256)
    for name, rates in SWEEP.items():
        for lr in rates:
            settings = demo_settings(options, name, lr=lr)
            run = Run(settings, *data)
            pretrain(run, None, settings.steps, None)
            chosen = "  <- chosen" if lr == LEARNING_RATES[name] else ""
            print(
                f"{LABELS[name]:<12} lr {lr:<8g} validation {run.log[-1]['validation']:.4f}{chosen}"
            )
