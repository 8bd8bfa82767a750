"""How do scale factors depend on the rank? The paper's Figure 4, from a small run of one's own.

    python bench/scale_ratio.py [--steps 240] [--ranks 8 16 32 64 128] [--threads 1] [--out DIR]

Theorem A.4 says that the scale factor of a channel at rank r, |N_c| / |R_c|, is about sqrt(r / n)
of the full-rank one, n the contracted side. A LLaMA is trained by APOLLO at a quarter of n. At each
step the gradients that it has stepped with are also projected to every rank and, for the full rank,
not at all; each has its own moments. So all see the same gradients. Writes scale_ratio.md, .csv and
.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import training

from apollo_kernels import options, projection_matrix, reference
from apollo_kernels.commands.output import Progress, write_whole
from apollo_kernels.state import layout_of

RANKS = (8, 16, 32, 64, 128)
FULL = 0  # in place of a rank


@dataclass
class Shadow:
    """The moments that one matrix would have at one rank."""

    rank: int
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @classmethod
    def of(cls, rank: int, x: Tensor) -> Shadow:
        shape = (x.shape[0], rank or x.shape[1])
        return cls(rank, torch.zeros(shape), torch.zeros(shape))

    def scale(self, x: Tensor, key: int, epoch: int, hyper: Any) -> Tensor:
        """s [C] of the gradient x [C, K], after the moments' update."""
        r = x
        if self.rank != FULL:
            r = x @ projection_matrix(key, epoch, self.rank, x.shape[1], hyper.distribution).t()
        q = x.square().sum(1)
        return reference.scale(r, q, self.exp_avg, self.exp_avg_sq, hyper)[0]


@dataclass(frozen=True)
class Point:
    """Quantiles over the channels of one matrix at one step and rank: of s, and of s_full / s."""

    step: int
    matrix: str
    side: int  # n
    rank: int
    scale: float
    low: float
    middle: float
    high: float


def follow(run: training.Run, steps: int, ranks: Sequence[int]) -> Iterator[Point]:
    """Trains, and tells of every matrix and rank at every step."""
    group = run.optimizer.param_groups[0]
    hyper = options.hyper_of(group)
    named = {p: name for name, p in run.model.named_parameters()}
    shadows: dict[Tensor, list[Shadow]] = {}
    levels = torch.tensor([0.1, 0.5, 0.9])
    with Progress("scale_ratio", steps) as bar:
        while run.step < steps:
            run.train_step()
            bar.update()
            epoch = (run.step - 1) // hyper.update_proj_gap
            for p in group["params"]:
                layout = layout_of(p, group)
                x = (p.grad if layout.rows else p.grad.t()).float()
                own = shadows.setdefault(p, [Shadow.of(rank, x) for rank in (FULL, *ranks)])
                key = run.optimizer.state[p]["seed"]
                full, *others = (shadow.scale(x, key, epoch, hyper) for shadow in own)
                for rank, s in zip((FULL, *ranks), (full, *others), strict=True):
                    ratio = torch.quantile(full / s, levels).tolist()
                    yield Point(
                        run.step, named[p], x.shape[1], rank, float(torch.quantile(s, 0.5)), *ratio
                    )


def summary(points: Sequence[Point], warm: int) -> list[dict[str, Any]]:
    """One row per rank: medians over matrices and steps after ``warm``, and how far matrices lie
    apart."""
    rows = []
    for rank in sorted({p.rank for p in points} - {FULL}):
        own = [p for p in points if p.rank == rank and p.step > warm]
        by_matrix = per_matrix(own)
        predicted = math.sqrt(own[0].side / rank)
        measured = statistics.median(by_matrix.values())
        rows.append({
            "rank": rank, "n / r": f"{own[0].side / rank:g}", "sqrt(n / r)": round(predicted, 3),
            "measured": round(measured, 3), "of predicted": round(measured / predicted, 3),
            "lowest matrix": round(min(by_matrix.values()), 3),
            "highest matrix": round(max(by_matrix.values()), 3),
            "channels p10": round(statistics.median(p.low for p in own), 3),
            "channels p90": round(statistics.median(p.high for p in own), 3),
        })  # fmt: skip
    return rows


def per_matrix(points: Sequence[Point]) -> dict[str, float]:
    """The median over steps of each matrix's ratio."""
    found: dict[str, list[float]] = {}
    for point in points:
        found.setdefault(point.matrix, []).append(point.middle)
    return {name: statistics.median(values) for name, values in found.items()}


def by_step(points: Sequence[Point], rank: int, field: str) -> tuple[list[int], list[float]]:
    """Medians over the matrices at each step."""
    found: dict[int, list[float]] = {}
    for point in points:
        if point.rank == rank:
            found.setdefault(point.step, []).append(getattr(point, field))
    return list(found), [statistics.median(values) for values in found.values()]


def report(
    points: Sequence[Point], settings: training.Settings, gap: int, warm: int, out: Path
) -> str:
    import plot

    rows = summary(points, warm)
    hidden, mlp, heads, layers = training.PRESETS[settings.preset]
    text = f"""# Scale factors over the rank

Written by `bench/scale_ratio.py`: a LLaMA (hidden {hidden}, MLP {mlp}, {heads} heads, {layers}
layers) trained for {settings.steps} steps of {settings.batch_size} x {settings.seq_len} bytes by
APOLLO at rank {settings.rank} (T = {gap}, seed {settings.seed}); the same gradients at every rank.
"measured" is the scale factor at full rank over the one at rank r: the median over channels, then
over the steps after {warm}, then over the {len(per_matrix(points))} matrices. Theorem A.4 of the
paper puts it at sqrt(n / r). p10 and p90 are over the channels of a matrix.
[Picture](scale_ratio.png).

{measure.markdown(rows)}
"""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "scale_ratio.md", lambda file: file.write(text.encode()))
    write_whole(out / "scale_ratio.csv", lambda file: file.write(table.getvalue().encode()))
    plot.scale_ratio(
        {rank: [by_step(points, rank, f) for f in ("scale", "low", "middle", "high")]
         for rank in sorted({p.rank for p in points})},
        {row["rank"]: list(per_matrix([p for p in points if p.rank == row["rank"]
                                       and p.step > warm]).values()) for row in rows},
        points[0].side, list(range(gap + 1, settings.steps + 1, gap)), out / "scale_ratio.png",
    )  # fmt: skip
    return measure.table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--preset", choices=training.PRESETS, default="tiny")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch; default: as many as it takes")
    parser.add_argument("--out", type=Path, help="default bench/results/<card>")
    args = parser.parse_args()
    hidden = training.PRESETS[args.preset][0]
    if args.steps < 8 or args.batch_size < 1:
        parser.error("--steps must be at least 8 and --batch-size at least 1")
    if any(not 1 <= rank <= hidden for rank in args.ranks):
        parser.error(f"--ranks must lie between 1 and the hidden size {hidden}, got {args.ranks}")
    if args.threads:
        torch.set_num_threads(args.threads)
    out = args.out or measure.ROOT / "bench/results" / measure.card_name(torch.device("cpu"))
    settings = training.Settings(
        preset=args.preset, steps=args.steps, batch_size=args.batch_size, rank=hidden // 4,
        data=tuple(str(Path(name).resolve()) for name in args.data), seed=args.seed,
        eval_every=args.steps, eval_batches=1,
    )  # fmt: skip
    try:
        data = training.load_data(settings.data, settings.seq_len)
    except training.Stop as stop:
        parser.error(str(stop))
    run = training.Run(settings, *data)
    points = list(follow(run, args.steps, sorted(set(args.ranks))))
    # Moments need some steps before they are more than the first gradient.
    gap = run.optimizer.param_groups[0]["update_proj_gap"]
    print(report(points, settings, gap, args.steps // 4, out))


if __name__ == "__main__":
    main()
