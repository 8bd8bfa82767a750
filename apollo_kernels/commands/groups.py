"""``groups``: which parameter of a model takes the low-rank step, which AdamW's, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from apollo_kernels import groups as choosing
from apollo_kernels import memory, state
from apollo_kernels.commands import models
from apollo_kernels.commands.output import paint, table
from apollo_kernels.optimizer import APOLLO
from apollo_kernels.options import PROJECTIONS


def add_arguments(parser: Any) -> None:
    parser.description = (
        "Which parameter of a model takes the low-rank step, which AdamW's, and why, as "
        "apollo_kernels.apollo(model) or apollo_mini(model) would have it; and the bytes of "
        "optimizer state. The model is built on the meta device: nothing is downloaded, and a 70B "
        "model takes no memory."
    )
    parser.epilog = """examples:
  python -m apollo_kernels groups 7b
  python -m apollo_kernels groups ./my-model --mini --embeddings
  python -m apollo_kernels groups train:make_model --targets q_proj v_proj --all"""
    parser.add_argument("model", help=models.MODEL_HELP)
    add_choices(parser)
    parser.add_argument("--all", action="store_true", help="a line per parameter, not per kind")
    parser.add_argument("--json", action="store_true", help="machine-readable, all parameters")


def add_choices(parser: Any) -> None:
    """The arguments that decide the groups; ``convert`` has them too."""
    parser.add_argument("--mini", action="store_true", help="APOLLO-Mini: rank 1, tensor scaling")
    parser.add_argument("--rank", type=int, help="default: hidden size / 4, at most 256")
    parser.add_argument(
        "--targets", nargs="+", metavar="WORD",
        help='"linear" (the default), "all", a regular expression, or several pieces of names',
    )  # fmt: skip
    parser.add_argument("--embeddings", action="store_true", help="embedding and head too")
    parser.add_argument("--proj", choices=tuple(PROJECTIONS), default="random")
    parser.add_argument("--dense-state", choices=("float32", "bfloat16", "int8"), default="float32")


def chosen(model: nn.Module, options: Any) -> list[dict[str, Any]]:
    """The parameter groups that the arguments ask for."""
    targets = options.targets or ["linear"]
    asked: dict[str, Any] = {
        "targets": targets[0] if len(targets) == 1 else targets,
        "embeddings": options.embeddings, "proj": options.proj,
        "dense_state": options.dense_state,
    }  # fmt: skip
    if options.mini and options.rank is not None:
        raise ValueError("--mini has rank 1: leave --rank out")
    if options.mini:
        return choosing.apollo_mini(model, **asked)
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"--rank must be at least 1, got {options.rank}")
    return choosing.apollo(model, rank=options.rank, **asked)


def rows(model: nn.Module, optimizer: APOLLO, options: Any) -> list[dict[str, Any]]:
    """One per parameter, in the model's order."""
    targets = options.targets or ["linear"]
    judged = choosing.choose_parameters(
        model, targets[0] if len(targets) == 1 else targets, options.embeddings
    )
    placed = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for choice in judged:
        p, group = choice.parameter, placed[choice.parameter]
        layout = state.layout_of(p, group)
        step = "AdamW" if layout is None else f"rank {layout.rank}"
        found.append({
            "parameter": choice.name, "shape": "x".join(map(str, p.shape)), "step": step,
            "decay": "yes" if choice.decay else "no",
            "state MB": memory.tensor_bytes(state.zeros(p, group, "meta").values()) / 1e6,
            "why": choice.reason,
        })  # fmt: skip
    return found


def folded(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameters that differ by the numbers in their names alone, as one row: layers.{0-31}.x."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        pattern = re.sub(r"\d+", "#", row["parameter"])
        kinds.setdefault((pattern, row["shape"], row["step"], row["why"]), []).append(row)
    return [_as_one(several) for several in kinds.values()]


def _as_one(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = zip(*(re.findall(r"\d+", row["parameter"]) for row in several), strict=True)
    spans = []
    for column in numbers:
        values = sorted({int(number) for number in column})
        whole = len(values) > 1 and values == list(range(values[0], values[-1] + 1))
        listed = f"{values[0]}-{values[-1]}" if whole else ",".join(map(str, values))
        spans.append(f"{{{listed}}}" if len(values) > 1 else listed)
    parts = iter(spans)
    name = re.sub(r"\d+", lambda _: next(parts), several[0]["parameter"])
    one = {"parameter": name, "number": len(several), **several[0]}
    return {**one, "parameter": name, "state MB": sum(row["state MB"] for row in several)}


def command(options: Any) -> str:
    model = models.build(options.model)
    optimizer = APOLLO(chosen(model, options))
    found, report = rows(model, optimizer, options), optimizer.memory_report()
    if options.json:
        return json.dumps(found, indent=2)
    lines = table(found if options.all else folded(found)).splitlines()
    lines[0] = paint(lines[0], "bold")
    return "\n".join([*lines, "", str(report)])
