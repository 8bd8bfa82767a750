"""Does a projection cost loss? One small LLaMA under each optimizer, on the same batches.

    python bench/convergence.py [--ranks 16 64 128] [--seeds 0 1 2] [--threads 1] [--out DIR]

AdamW, APOLLO with each distribution and rank, APOLLO-Mini, and apollo_torch where it is installed.
Each finished run is kept in DIR/convergence/, so that a comparison that was stopped goes on where
it was; a run whose settings have changed is repeated. Every table and picture is written from the
runs that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import measure
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import training

from apollo_kernels.commands import contest, peers

Build = Callable[[training.Settings, torch.nn.Module], torch.optim.Optimizer]
NOISE = 0.005  # nats between two draws of the projection at one seed (DESIGN.md, sparse projection)


@dataclass(frozen=True)
class Entry:
    """One line of the table: an optimizer as ``training`` names it, its rank and distribution."""

    label: str
    optimizer: str
    rank: int = 0
    proj: str = "random"
    build: Build | None = None

    def settings(self, base: training.Settings, seed: int) -> training.Settings:
        changes = {"optimizer": self.optimizer, "rank": self.rank, "proj": self.proj, "seed": seed}
        return replace(base, **changes)

    @property
    def stem(self) -> str:
        return "-".join(self.label.replace(",", "").split())


def published(settings: training.Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """apollo_torch over the same groups and learning rates as ours."""
    ours = training.build_optimizer(settings, model)
    matrices, dense = ours.param_groups
    keys = {**peers.CHANNEL, "rank": matrices["rank"]}
    groups = [
        {"params": matrices["params"], "lr": matrices["lr"], **keys},
        {"params": dense["params"], "lr": dense["lr"]},
    ]
    made = peers.apollo_torch()
    assert made is not None
    return made(groups, lr=settings.dense_lr)


def entries(ranks: list[int]) -> list[Entry]:
    found = [Entry("AdamW", "adamw"), Entry("APOLLO-Mini, gaussian, rank 1", "apollo-mini", 1)]
    for rank in ranks:
        for proj, name in (("random", "gaussian"), ("rademacher",) * 2, ("sparse",) * 2):
            found.append(Entry(f"APOLLO, {name}, rank {rank}", "apollo", rank, proj))
    if peers.apollo_torch() is not None:
        found += [
            Entry(f"apollo_torch, gaussian, rank {rank}", "apollo", rank, build=published)
            for rank in ranks
        ]
    return found


def base_settings(device: torch.device) -> training.Settings:
    """The demo's: 1.7 M weights on a CPU; the paper's 60M at a tenth of its tokens on a GPU."""
    if device.type == "cpu":
        return training.Settings(steps=700)
    return training.Settings(
        preset="60m", steps=1000, batch_size=512, seq_len=256, dtype="bfloat16", device="cuda"
    )


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The run in the file, or None if there is none with these settings. Settings that came later
    than the run were at their defaults."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        run: dict[str, Any] = json.loads(path.read_text())
        if {**as_json(training.Settings()), **run["settings"]} == settings:
            return run
    return None


def train(entry: Entry, settings: training.Settings, data: tuple[Any, Any]) -> dict[str, Any]:
    run = training.Run(settings, *data, build=entry.build)
    training.pretrain(run, None, settings.steps, None)
    curve = [(r["step"], r["validation"]) for r in run.log if r["validation"] == r["validation"]]
    return {
        "label": entry.label,
        "settings": as_json(settings),
        "environment": measure.environment(torch.device(settings.device)),
        "state_mb": contest.state_bytes(run.optimizer) / 1e6,
        "curve": curve,
    }


def as_json(settings: training.Settings) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return found


def write_whole(path: Path, text: str) -> None:
    """A kill leaves the former file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def summary(runs: dict[Entry, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Final validation losses, their mean, their spread, and the difference to AdamW per seed."""
    adamw = next((runs[entry] for entry in runs if entry.optimizer == "adamw"), [])
    base = {run["settings"]["seed"]: run["curve"][-1][1] for run in adamw}
    for entry, found in runs.items():
        if not found:
            continue
        losses = {run["settings"]["seed"]: run["curve"][-1][1] for run in found}
        row: dict[str, Any] = {"optimizer": entry.label}
        row.update({f"seed {seed}": f"{loss:.4f}" for seed, loss in losses.items()})
        row["mean"] = f"{statistics.mean(losses.values()):.4f}"
        row["spread"] = f"{max(losses.values()) - min(losses.values()):.4f}"
        paired = [loss - base[seed] for seed, loss in losses.items() if seed in base]
        row["to AdamW"] = f"{statistics.mean(paired):+.4f}" if paired else None
        row["state MB"] = f"{found[0]['state_mb']:.2f}"
        yield row


def report(runs: dict[Entry, list[dict[str, Any]]], out: Path, base: training.Settings) -> str:
    import plot

    rows = list(summary(runs))
    hidden, mlp, heads, layers = training.PRESETS[base.preset]
    text = [
        "# Losses",
        f"""Written by `bench/convergence.py`: final validation loss, in nats per byte, of a LLaMA
(hidden {hidden}, MLP {mlp}, {heads} heads, {layers} layers) after {base.steps} steps of
{base.batch_size} x {base.seq_len} bytes. All optimizers see the same batches and start from the
same weights. "to AdamW" is the mean difference at the same seed. Two draws of the projection at
one seed differ by about {NOISE}.""",
        measure.markdown(rows),
    ]
    write_whole(out / "convergence.md", "\n\n".join(text) + "\n")
    plot.convergence(
        [(e.label, e.optimizer, e.rank, e.proj, e.build is not None, r) for e, r in runs.items()],
        out / "convergence.png",
    )
    return measure.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", choices=training.PRESETS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--only", metavar="WORD", help="AdamW, and what has this in its name")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    parser.add_argument("--out", type=Path, help="default bench/results/<card>")
    args = parser.parse_args()
    for name in ("ranks", "seeds", "steps", "threads"):
        values = getattr(args, name)
        least = 0 if name == "seeds" else 1
        if any(v < least for v in (values if isinstance(values, list) else [values or least])):
            parser.error(f"--{name} must be at least {least}, got {values}")
    device = measure.default_device()
    out = args.out or measure.ROOT / "bench/results" / measure.card_name(device)
    if args.threads:
        torch.set_num_threads(args.threads)
    base = base_settings(device)
    base = replace(base, preset=args.preset or base.preset, steps=args.steps or base.steps)
    base.data = tuple(str(Path(name).resolve()) for name in args.data)
    try:
        data = training.load_data(base.data, base.seq_len)
    except training.Stop as stop:
        parser.error(str(stop))
    everything = entries(args.ranks)
    chosen = [e for e in everything if e.optimizer == "adamw" or (args.only or "") in e.label]
    if len(chosen) == 1:
        parser.error(f"--only {args.only!r}: there are {[e.label for e in everything]}")
    runs: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in chosen}
    for seed in args.seeds:
        for entry in chosen:
            settings = entry.settings(base, seed)
            path = out / "convergence" / f"{entry.stem}-seed-{seed}.json"
            run = kept(path, as_json(settings))
            if run is None:
                print(f"{entry.label}, seed {seed}", file=sys.stderr, flush=True)
                run = train(entry, settings, data)
                write_whole(path, json.dumps(run) + "\n")
            runs[entry].append(run)
        table = report(runs, out, base)
    print(table)


if __name__ == "__main__":
    main()
