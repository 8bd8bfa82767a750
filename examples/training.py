"""One pre-training run: model, optimizer, batches, checkpoints and log (script: pretrain.py)."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import corpus
import torch
from parallel import Processes, Stop
from tqdm import tqdm

import apollo_kernels

# hidden, MLP, heads, layers: the paper's Table 11 (1b with the 32 heads and 24 layers of its
# scripts; 13b as published) and small ones for a CPU. The vocabulary is bytes in all of them.
PRESETS = {
    "micro": (32, 88, 2, 1),
    "tiny": (256, 688, 4, 2),
    "small": (384, 1032, 6, 4),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}
OPTIMIZERS = ("adamw", "apollo", "apollo-mini", "sgd")
STATES = ("float32", "bfloat16", "int8")
PROJECTIONS = ("random", "rademacher", "sparse")
# Learning rates of the low-rank (for AdamW: all) matrices; --sweep repeats the search.
LEARNING_RATES = {"adamw": 5e-4, "apollo": 5e-3, "apollo-mini": 5e-3, "sgd": 0.1}
# Embeddings, head and norms take AdamW under every optimizer, at one rate, so that what differs
# between the curves is the matrices' optimizer alone.
DENSE_LEARNING_RATE = 1e-2
LOG_FIELDS = ("step", "loss", "validation", "lr", "step_ms", "tokens_per_s")
# With --detail also, in the rows that have a validation loss; what they mean tells Run.seen_inside.
DETAIL_FIELDS = ("update_norm", "limited", "scale_p10", "scale_p50", "scale_p90")


@dataclass
class Settings:
    """All that makes a run what it is: kept in checkpoints, and no resumed run may change it."""

    optimizer: str = "apollo"
    preset: str = "tiny"
    data: tuple[str, ...] = ()
    steps: int = 500
    batch_size: int = 8
    seq_len: int = 128
    lr: float = 0.0
    dense_lr: float = DENSE_LEARNING_RATE
    rank: int = 0
    proj: str = "random"
    warmup: float = 0.1
    seed: int = 0
    dtype: str = "float32"
    int8: bool = False
    dense_state: str = "float32"
    embeddings: bool = False
    device: str = "cpu"
    eval_every: int = 50
    eval_batches: int = 8


class Run:
    """One model under one optimizer."""

    def __init__(
        self,
        settings: Settings,
        train: torch.Tensor,
        held_out: torch.Tensor,
        build: Callable[[Settings, torch.nn.Module], torch.optim.Optimizer] | None = None,
        processes: Processes | None = None,
    ):
        self.settings = settings
        self.processes = processes or Processes(None, settings.device)
        self.train_data, self.held_out = train, held_out
        torch.manual_seed(settings.seed)
        model = build_model(settings)
        self.model = self.processes.split(model)
        self.optimizer = (build or build_optimizer)(settings, model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.told = (0, 0)  # the step, and what the limiter had held, at the last look inside

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then a cosine to a tenth (paper, Appendix A.4)."""
        warm = max(1, int(self.settings.warmup * self.settings.steps))
        if step < warm:
            return (step + 1) / warm
        progress = (step - warm) / max(1, self.settings.steps - warm)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1)))

    def batch(self, data: torch.Tensor, index: int, seed: int) -> torch.Tensor:
        s = self.settings
        return corpus.batch(data, s.batch_size, s.seq_len, seed, index).to(s.device)

    def release_gradients(self) -> None:
        """From now on backward steps, and ``step_ms`` is what is left of the step after it."""
        if not isinstance(self.optimizer, apollo_kernels.APOLLO):
            raise Stop(f"--gradient-release: {self.settings.optimizer} has none; take apollo")
        self.optimizer.attach(self.model)

    def record_detail(self) -> None:
        """From now on rows with a validation loss also tell what APOLLO has done inside."""
        if not isinstance(self.optimizer, apollo_kernels.APOLLO):
            raise Stop(f"--detail: {self.settings.optimizer} has none; take apollo")
        self.optimizer.record_detail = True
        self.told = self.step, self.optimizer.stats()["limited"]

    def seen_inside(self) -> dict[str, Any]:
        """Of all low-rank matrices: the norm of their updates together, the share that the limiter
        held since the last look, medians of the quantiles of s; and ``detail``, each for itself."""
        stats = self.optimizer.stats(detail=True)
        each = stats["detail"].values()
        norms = [told["update_norm"] or 0.0 for told in each]
        row = {"update_norm": math.hypot(*norms)}
        steps, held = self.step - self.told[0], stats["limited"] - self.told[1]
        self.told = self.step, stats["limited"]
        row["limited"] = held / max(1, steps * len(norms))
        for level in ("p10", "p50", "p90"):
            row[f"scale_{level}"] = statistics.median(told["scales"][level] for told in each)
        return {**row, "detail": stats["detail"]}

    def train_step(self) -> None:
        s, begin = self.settings, time.perf_counter()
        tokens = self.batch(self.train_data, self.step, s.seed)
        own = self.processes.share(tokens)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=own, labels=own, use_cache=False).loss
        loss.backward()
        synchronize(s.device)
        before = time.perf_counter()
        self.optimizer.step()
        synchronize(s.device)
        end = time.perf_counter()
        lr = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.step += 1
        mean = self.processes.mean(loss)
        row = {"step": self.step, "loss": mean, "validation": math.nan, "lr": lr}
        row.update(step_ms=1e3 * (end - before), tokens_per_s=tokens.numel() / (end - begin))
        if self.step % s.eval_every == 0 or self.step == s.steps:
            row["validation"] = self.validate()
            if getattr(self.optimizer, "record_detail", False):
                row.update(self.seen_inside())
        self.log.append(row)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss in nats per byte over fixed batches, the same for every optimizer."""
        self.model.eval()
        total = 0.0
        for i in range(self.settings.eval_batches):
            tokens = self.batch(self.held_out, i, seed=12345)
            total += self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
        self.model.train()
        return total / self.settings.eval_batches

    def forget(self) -> None:
        """Frees model and optimizer once they are of no use; settings and log stay."""
        del self.model, self.optimizer, self.schedule

    def state_bytes(self) -> int:
        """Of the optimizer's tensors, by one rule for all optimizers."""
        values = (v for state in self.optimizer.state.values() for v in state.values())
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))

    def weight_bytes(self) -> int:
        """Of the model's parameters; of an int8 weight its codes and grids."""

        def parts(p: torch.Tensor) -> list[torch.Tensor]:
            names = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else []
            return [part for name in names for part in parts(getattr(p, name))] or [p]

        return sum(t.numel() * t.element_size() for p in self.model.parameters() for t in parts(p))

    def save(self, path: Path) -> None:
        """Writes to a temporary file first: a kill leaves the old checkpoint whole. Of several
        processes each writes its part, into a folder."""
        if self.processes.mode:
            rest = {"settings": json.dumps(asdict(self.settings)), "step": self.step}
            rest |= {"last_epoch": self.schedule.last_epoch, "log": self.log}
            return self.processes.save(path, self.model, self.optimizer, rest)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        content = {
            "settings": json.dumps(asdict(self.settings)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "step": self.step,
            "log": self.log,
        }
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def restore(self, content: dict) -> None:
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self._go_on(content["schedule"]["last_epoch"], content["step"], content["log"])

    def restore_parts(self, path: Path) -> None:
        """The same from a folder that several processes have written, however many they were."""
        rest = self.processes.restore(path, self.model, self.optimizer)
        self._go_on(rest["last_epoch"], rest["step"], rest["log"])

    def _go_on(self, last_epoch: int, step: int, log: list[dict[str, float]]) -> None:
        self.schedule.last_epoch = last_epoch
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule._last_lr = lrs
        self.step, self.log = step, log


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def build_model(settings: Settings) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, mlp, heads, layers = PRESETS[settings.preset]
    config = LlamaConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=max(1024, settings.seq_len),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(settings.device, getattr(torch, settings.dtype))
    if settings.int8:
        if not settings.optimizer.startswith("apollo"):
            raise Stop(f"--int8: {settings.optimizer} cannot step int8 weights, the APOLLOs can")
        apollo_kernels.quantize_(model)
    return model.train()


def build_optimizer(settings: Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Matrices of attention and MLP at ``lr``, the rest under AdamW at ``dense_lr``."""
    options = {"proj": settings.proj, **({"rank": settings.rank} if settings.rank else {})}
    if settings.embeddings or settings.dense_state != "float32":
        if not settings.optimizer.startswith("apollo"):
            raise Stop(f"--embeddings and --dense-state: {settings.optimizer} has neither")
        options["embeddings"] = settings.embeddings
    mini = settings.optimizer == "apollo-mini"
    groups = (apollo_kernels.apollo_mini if mini else apollo_kernels.apollo)(model, **options)
    matrices, dense = groups[0], [p for group in groups[1:] for p in group["params"]]
    lr = settings.lr or LEARNING_RATES[settings.optimizer]
    if settings.optimizer.startswith("apollo"):
        rest = {"params": dense, "lr": settings.dense_lr, "dense_state": settings.dense_state}
        return apollo_kernels.APOLLO([{**matrices, "lr": lr}, rest])
    groups = [{"params": matrices["params"], "lr": lr}, {"params": dense, "lr": settings.dense_lr}]
    if settings.optimizer == "sgd":
        groups[1]["lr"] = lr
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)
    return torch.optim.AdamW(groups, weight_decay=0.0)


def write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines if the file is called so, else CSV, which has no place for ``detail``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    known = [{k: v for k, v in row.items() if v == v} for row in rows]  # no NaN
    with temporary.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in known)
        else:
            detailed = DETAIL_FIELDS if any("limited" in row for row in rows) else ()
            writer = csv.DictWriter(file, LOG_FIELDS + detailed, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(known)
    temporary.replace(path)


def load_data(names: tuple[str, ...], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    paths = [Path(name) for name in names] or corpus.standard_library()
    for path in paths:
        if not path.is_file():
            raise Stop(f"--data: no such file: {str(path)!r}")
    train, held_out = corpus.load(paths)
    if min(len(train), len(held_out)) <= seq_len + 1:
        raise Stop(
            f"--data: {len(train) + len(held_out)} bytes are too few for --seq-len {seq_len}"
        )
    return train, held_out


def pretrain(run: Run, save: Path | None, save_every: int, log: Path | None) -> None:
    """Trains to the end; a checkpoint every ``save_every`` steps, at the end and on SIGTERM."""
    asked: list[bool] = []
    stop = False
    previous = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    total, name, processes = run.settings.steps, run.settings.optimizer, run.processes
    log = log if processes.first else None
    bar = tqdm(
        total=total, initial=run.step, desc=f"{name:<12}", unit="step", leave=True,
        disable=not processes.first,
    )  # fmt: skip
    try:
        while run.step < total and not stop:
            run.train_step()
            stop = processes.any(bool(asked))
            last = run.log[-1]
            bar.update()
            bar.set_postfix(loss=f"{last['loss']:.3f}", refresh=False)
            if save and (stop or run.step % save_every == 0 or run.step == total):
                run.save(save)
                if log:
                    write_log(log, run.log)
    finally:
        bar.close()
        signal.signal(signal.SIGTERM, previous)
    if log:
        write_log(log, run.log)
    if stop:
        raise Stop(f"stopped by SIGTERM after step {run.step}")
