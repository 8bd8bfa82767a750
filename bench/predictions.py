"""The model's tables: per kernel and card the share of the floor, and the steps of LLaMA-7B, beside
those that a card has run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sm_model.cards import CARDS, Card
from sm_model.predict import LAYERS, STEPS, Kernel, StepModel, named, predict

if TYPE_CHECKING:
    from kernel_report import Binary

# Kernel, as its name begins -> the ranks that it is looked at with, none if it has none.
SHARES = {
    "project_tiles<bfloat16, 128, Gaussian": (128, 256),
    "project_tiles<bfloat16, 64, Gaussian": (64,),
    "project_tiles<float, 128, Gaussian": (128, 256),
    "project_dots<bfloat16, 1, Gaussian": (1,),
    "project_dots<float, 1, Gaussian": (1,),
    "project_sparse<bfloat16": (128, 256),
    "project_sparse<float": (128, 256),
    "apply_update<bfloat16, bfloat16": (0,),
    "apply_update<float, float": (0,),
    "adamw_update<bfloat16, bfloat16, float": (0,),
    "adamw_update<bfloat16, bfloat16, bfloat16": (0,),
    "adamw_update<bfloat16, bfloat16, int8_code": (0,),
    "adamw_update<float, float, float": (0,),
}
CONTRACTED = 4096
RESULTS = Path(__file__).parent / "results"


def compiled(binaries: Iterable[Binary], card: Card) -> dict[str, Kernel]:
    """The kernels of a card's architecture, by name."""
    from kernel_report import resident

    found = {}
    for binary in binaries:
        for row, function in zip(binary.rows, binary.functions, strict=True):
            if row["arch"] == card.architecture and row["loops"]:
                blocks = max(1, resident(row["arch"], row))
                found[row["kernel"]] = Kernel(row["kernel"], function, row["threads"], blocks)
    return found


def tables(binaries: list[Binary]) -> dict[str, list[dict[str, Any]]]:
    cards = {card: compiled(binaries, card) for card in CARDS.values()}
    cards = {card: kernels for card, kernels in cards.items() if kernels}
    if not cards:
        return {}
    found = {
        "Predicted share of the floor, by the model of an SM (bench/sm_model)": shares(cards),
        "Predicted milliseconds of a LLaMA-7B step, bf16 weights and gradients": steps(cards),
    }
    if rows := beside_measured(cards):
        found["Steps that a card has run, in milliseconds"] = rows
    return found


def shares(cards: dict[Card, dict[str, Kernel]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for beginning, ranks in SHARES.items():
        found = {c: k[n] for c, k in cards.items() if (n := named(k, beginning)) is not None}
        orientations = sorted({o for k in found.values() for o in k.loops}, reverse=True)
        for rank in ranks:
            for orientation in orientations:
                row: dict[str, Any] = {
                    "kernel": next(iter(found.values())).name,
                    "rank": rank or None,
                    "loop": orientation,
                }
                for card, kernel in found.items():
                    share = predict(kernel, orientation, card, CONTRACTED, rank).share
                    row[card.name] = round(share, 2)
                rows.append(row)
    return rows


def steps(cards: dict[Card, dict[str, Kernel]]) -> list[dict[str, Any]]:
    models = [StepModel(card, kernels) for card, kernels in cards.items()]
    rows: list[dict[str, Any]] = [{"step": "fused AdamW, at the copy bandwidth"}]
    rows[0].update({m.card.name: round(m.adamw_ms(), 1) for m in models})
    for rank in (1, 128, 256):
        floor: dict[str, Any] = {"step": f"floor, rank {rank}"}
        floor.update({m.card.name: round(m.floor_ms(rank), 1) for m in models})
        rows.append(floor)
        for title, (name, its_rank) in STEPS.items():
            if its_rank != rank:
                continue
            row: dict[str, Any] = {"step": title}
            row.update({m.card.name: round(m.step_ms(name, rank), 1) for m in models})
            rows.append(row)
    return rows


def beside_measured(
    cards: dict[Card, dict[str, Kernel]], results: Path = RESULTS
) -> list[dict[str, Any]]:
    """The steps in step.json of cards that the model knows. Where few of the layers fit a card, the
    model steps as few, and both are scaled to all."""
    steps, rows = {_optimizer(step): step for step in STEPS}, []
    for card, kernels in cards.items():
        for path in sorted(results.glob(f"*{card.name.lower().replace(' ', '-')}*/step.json")):
            for row in json.loads(path.read_text())["rows"]:
                step, measured = steps.get(row["optimizer"]), row.get("ms")
                if (row["model"], row["dtype"]) != ("7b", "bfloat16") or not (step and measured):
                    continue
                layers = int(row["layers"].split("/")[0])
                ms = StepModel(card, kernels, layers).step_ms(*STEPS[step]) * LAYERS / layers
                found = {"card": path.parent.name, "step": step, "predicted": round(ms, 1)}
                ratio = {"measured / predicted": round(measured / ms, 2)}
                rows.append({**found, "measured": round(measured, 1), **ratio})
    return rows


def _optimizer(step: str) -> str:
    """What bench_step.py calls a step of STEPS."""
    kind, _, rank = step.partition(", ")
    named = {"gaussian": rank, "sparse": f"{rank}, sparse"}
    return f"ours cuda, {named.get(kind, kind)}"
