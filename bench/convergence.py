"""What does it cost in loss? One small LLaMA under each optimizer, on the same batches.

    python bench/convergence.py [--ranks 32 64] [--seeds 0 1 2] [--jobs 2] [--out DIR]

AdamW; APOLLO with each distribution and rank, and with int8 weights; APOLLO-Mini; and the rivals of
rivals.py that are installed. --sweep also looks for the learning rate of each: at the first seed it
is doubled and halved until losses rise on both sides, and the best one is taken for all seeds.
Without it ours keep their rates, which `examples/pretrain.py --sweep` found, and rivals are swept.
Each finished run is kept in DIR/convergence/, so that a comparison that was stopped goes on where
it was; a run whose settings have changed is repeated. Every table and picture is written from the
runs that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure
import rivals
import torch
import training  # of examples/, which rivals has put on the path

from apollo_kernels.commands import contest

Losses = dict[float, float]  # of a sweep: factor of the learning rate -> final loss
FARTHEST = 32  # times the rate that a sweep begins at
NOISE = 0.005  # nats between two draws of the projection at one seed (DESIGN.md, sparse projection)


@dataclass(frozen=True)
class Entry:
    """One line of the table: an optimizer as ``training`` names it, its rank and distribution."""

    label: str
    optimizer: str
    rank: int = 0
    proj: str = "random"
    int8: bool = False
    rival: str | None = None

    def settings(self, base: training.Settings, seed: int, factor: float) -> training.Settings:
        """``factor``: of the learning rate that its sweep begins at."""
        rate = training.LEARNING_RATES[self.optimizer]
        if self.swept:
            assert self.rival is not None
            rate = rivals.RIVALS[self.rival][0]
        lr = 0.0 if factor == 1 and not self.swept else factor * rate
        return replace(
            base, optimizer=self.optimizer, rank=self.rank, proj=self.proj, int8=self.int8,
            seed=seed, lr=lr,
        )  # fmt: skip

    @property
    def swept(self) -> bool:
        """Whether nobody has looked for its learning rate yet."""
        return self.rival not in (None, "apollo_torch")

    def path(self, settings: training.Settings) -> str:
        stem = "-".join(self.label.replace(",", "").split())
        return f"{stem}{f'-lr-{settings.lr:g}' * bool(settings.lr)}-seed-{settings.seed}.json"


def entries(ranks: list[int]) -> list[Entry]:
    found = [Entry("AdamW", "adamw"), Entry("APOLLO-Mini, gaussian, rank 1", "apollo-mini", 1)]
    for rank in ranks:
        for proj, name in (("random", "gaussian"), ("rademacher",) * 2, ("sparse",) * 2):
            found.append(Entry(f"APOLLO, {name}, rank {rank}", "apollo", rank, proj))
    middle = sorted(ranks)[len(ranks) // 2]
    found.append(Entry(f"APOLLO, int8 weights, rank {middle}", "apollo", middle, int8=True))
    found.append(Entry("APOLLO-Mini, int8 weights, rank 1", "apollo-mini", 1, int8=True))
    for name in filter(rivals.installed, rivals.RIVALS):
        for rank in ranks if name == "apollo_torch" else [middle]:
            label = f"{name}, gaussian, rank {rank}" if name == "apollo_torch" else name
            label += f", rank {rank}" if name == "GaLore" else ""
            found.append(Entry(label, "apollo", rank, rival=name))
    return found


def base_settings(device: torch.device, size: str) -> training.Settings:
    """demo: 1.7 M weights. paper: its 60M model at a tenth of its tokens, for a GPU."""
    where = device.type
    if size == "demo":
        return training.Settings(steps=700, device=where)
    return training.Settings(
        preset="60m", steps=1000, batch_size=512, seq_len=256, dtype="bfloat16", device=where
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
    run = training.Run(settings, *data, build=entry.rival and rivals.build(entry.rival))
    training.pretrain(run, None, settings.steps, None)
    curve = [(r["step"], r["validation"]) for r in run.log if r["validation"] == r["validation"]]
    return {
        "label": entry.label,
        "settings": as_json(settings),
        "environment": measure.environment(torch.device(settings.device)),
        "state_mb": contest.state_bytes(run.optimizer) / 1e6,
        "curve": curve,
    }


class Trainer:
    """Trains what has not been trained yet, several runs at a time where there are ``jobs``."""

    def __init__(
        self, base: training.Settings, data: Any, out: Path, jobs: int, threads: int | None
    ):
        self.base, self.data, self.folder = base, data, out / "convergence"
        threads = threads or (1 if jobs > 1 else None)
        self.pool = None
        if jobs > 1:
            self.pool = ProcessPoolExecutor(jobs, get_context("spawn"), _use_threads, (threads,))
        else:
            _use_threads(threads)

    def run(self, wanted: list[tuple[Entry, training.Settings]]) -> list[dict[str, Any]]:
        paths = [self.folder / entry.path(settings) for entry, settings in wanted]
        missing = [
            (path, entry, settings)
            for path, (entry, settings) in zip(paths, wanted, strict=True)
            if kept(path, as_json(settings)) is None
        ]
        if self.pool is None:
            for path, entry, settings in missing:
                self._keep(path, entry, settings, train(entry, settings, self.data))
        else:
            work = {self.pool.submit(train, *one[1:], self.data): one for one in missing}
            for done in as_completed(work):
                self._keep(*work[done], done.result())
        return [json.loads(path.read_text()) for path in paths]

    def _keep(
        self, path: Path, entry: Entry, settings: training.Settings, run: dict[str, Any]
    ) -> None:
        write_whole(path, json.dumps(run) + "\n")
        rate = f", learning rate {settings.lr:g}" if settings.lr else ""
        print(
            f"{entry.label}, seed {settings.seed}{rate}: {final(run):.4f}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def sweep(self, entries: list[Entry], seed: int) -> dict[Entry, float]:
        """The factor of each one's learning rate with the lowest loss, with a higher one on both
        sides, or as far as a sweep goes."""
        losses: dict[Entry, Losses] = {entry: {} for entry in entries}
        wanted = [(entry, factor) for entry in entries for factor in (0.5, 1.0, 2.0)]
        while wanted:
            found = self.run([(e, e.settings(self.base, seed, factor)) for e, factor in wanted])
            for (entry, factor), run in zip(wanted, found, strict=True):
                losses[entry][factor] = final(run)
            wanted = []
            for entry, known in losses.items():
                best = min(known, key=known.__getitem__)
                wanted += [
                    (entry, f)
                    for f in (best / 2, best * 2)
                    if f not in known and 1 / FARTHEST <= f <= FARTHEST
                ]
        return {entry: min(known, key=known.__getitem__) for entry, known in losses.items()}


def final(run: dict[str, Any]) -> float:
    """The last validation loss; a run that has ended in NaN is worse than all others."""
    loss = float(run["curve"][-1][1]) if run["curve"] else math.nan
    return math.inf if math.isnan(loss) else loss


def _use_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


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
        losses = {run["settings"]["seed"]: final(run) for run in found}
        lr = found[0]["settings"]["lr"] or training.LEARNING_RATES[entry.optimizer]
        row: dict[str, Any] = {"optimizer": entry.label, "lr": f"{lr:g}"}
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
        [(e.label, e.optimizer, e.rank, e.proj, e.rival, e.int8, r) for e, r in runs.items()],
        out / "convergence.png",
    )
    return measure.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="default: an eighth and a quarter")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=("demo", "paper"), help="default: paper on a GPU")
    parser.add_argument("--preset", choices=training.PRESETS)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--only", metavar="WORD", help="AdamW, and what has this in its name")
    parser.add_argument("--sweep", action="store_true", help="also the learning rates of ours")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time; default: the cores, up to 8; on a GPU 1"
    )
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    parser.add_argument("--out", type=Path, help="default bench/results/<card>")
    args = parser.parse_args()
    for name in ("ranks", "seeds", "steps", "threads", "jobs"):
        values = getattr(args, name)
        least = 0 if name == "seeds" else 1
        values = values if isinstance(values, list) else [least if values is None else values]
        if any(v < least for v in values):
            parser.error(f"--{name} must be at least {least}, got {values}")
    device = measure.default_device()
    out = args.out or measure.ROOT / "bench/results" / measure.card_name(device)
    base = base_settings(device, args.size or ("paper" if device.type == "cuda" else "demo"))
    base = replace(base, preset=args.preset or base.preset, steps=args.steps or base.steps)
    base.data = tuple(str(Path(name).resolve()) for name in args.data)
    try:
        data = training.load_data(base.data, base.seq_len)
    except training.Stop as stop:
        parser.error(str(stop))
    hidden = training.PRESETS[base.preset][0]
    everything = entries(args.ranks or [max(1, hidden // 8), max(1, hidden // 4)])
    chosen = [e for e in everything if e.optimizer == "adamw" or (args.only or "") in e.label]
    if len(chosen) == 1:
        parser.error(f"--only {args.only!r}: there are {[e.label for e in everything]}")
    jobs = args.jobs or (1 if device.type == "cuda" else min(8, os.cpu_count() or 1))
    trainer = Trainer(base, data, out, jobs, args.threads)
    factors = dict.fromkeys(chosen, 1.0)
    swept = [entry for entry in chosen if args.sweep or entry.swept]
    factors |= trainer.sweep(swept, args.seeds[0])
    runs: dict[Entry, list[dict[str, Any]]] = {entry: [] for entry in chosen}
    for seed in args.seeds:
        found = trainer.run([(e, e.settings(base, seed, factors[e])) for e in chosen])
        for entry, run in zip(chosen, found, strict=True):
            runs[entry].append(run)
        table = report(runs, out, base)
    print(table)


if __name__ == "__main__":
    main()
