"""Peak bytes of whole training steps of 7B, 8B and 13B models, counted without a GPU.

    python bench/memory_claims.py [CLAIM ...] [--again]

The real step runs: transformers' LLaMA, forward, checkpointed backward, our hooks, our optimizer.
Tensors are fake (torch's FakeTensorMode), so they have sizes and no numbers, and torch's own
MemTracker counts them. Weights, gradients and state are what they are on a GPU, and so are
activations up to the choice of an attention kernel. What it does not see: the CUDA context (about
0.5 GB), fragmentation, the workspaces of cuBLAS. A card of "80 GB" holds 80 GiB = 85.9 GB; claims
are judged against 80 GB, so 5.9 GB remain for those.

Each claim's figures are kept in bench/results/memory/claims.json as soon as they are counted, and
are not counted again; claims.md is the table.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import apollo_kernels
from apollo_kernels import estimate, quantized

Counted = Callable[["Run"], dict[str, int]]
RESULTS = Path(__file__).parent / "results" / "memory"
GB = 1e9


@dataclass(frozen=True)
class Run:
    """One training step to be counted."""

    model: str = "llama-7b"
    optimizer: str = "mini"  # adamw (fused, moments as the weights), apollo, mini
    rank: int = 256  # of apollo
    batch: int = 1
    sequence: int = 256
    checkpointing: bool = True
    release: bool = False
    int8: bool = False
    embeddings: bool = False  # in the low-rank group, and int8
    ddp: str = ""  # "", "buckets", "views" (gradient_as_bucket_view)
    dtype: str = "bfloat16"
    dense_state: str = "float32"
    layers: int | None = None  # of the model, to try things out


class Tracker(MemTracker):
    """Torch's own, without the peaks of each module, which cost it a look at all modules per
    operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)


def count(run: Run, *, real: bool = False) -> dict[str, int]:
    """Bytes at the moment of the peak, by kind, and the peak itself; ``real``: of real tensors."""
    mode = contextlib.nullcontext() if real else FakeTensorMode()
    with mode, _process_group(run.ddp):
        model = _model(run)
        if run.int8:
            apollo_kernels.quantize_(model, embeddings=run.embeddings)
        trained: nn.Module = model
        if run.ddp:
            trained = _replicated(model, views=run.ddp == "views")
        optimizers = _optimizers(run, model)
        _warm_up(model, optimizers)
        if run.release:
            _release(model, optimizers)
        ids = torch.zeros((run.batch, run.sequence), dtype=torch.long)
        tracker = Tracker()
        tracker.track_external(trained, ids, *_stored(optimizers))
        with tracker:
            for _ in range(2 if run.ddp else 1):  # the tracker meets buckets in the first
                tracker.reset_mod_stats()
                trained(input_ids=ids, labels=ids).loss.backward()
                if not (run.release and run.optimizer == "adamw"):
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
        return _peak(tracker, model, optimizers)


def _as_on_a_card() -> None:
    """int8 weights are widened 2^24 at a time there, 2^20 on the CPU that fake tensors are on."""
    quantized._PART["cpu"] = quantized._PART_ELSEWHERE


def _model(run: Run) -> nn.Module:
    """transformers' LLaMA in bf16, in training mode."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    # transformers takes fake tensors for a trace and would make a mask for each layer, and copies
    # of shared keys, which it does not do in a run.
    AttentionInterface.register("causal", _attention)
    shape = estimate.architecture(run.model)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=run.layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        use_cache=False,
        attn_implementation="causal",
        tie_word_embeddings=shape.tied,
    )
    torch.set_default_dtype(getattr(torch, run.dtype))
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if run.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.24
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    return model.train()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    shared = key.shape[1] < query.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=shared
    )
    return out.transpose(1, 2).contiguous(), None


def _optimizers(run: Run, model: nn.Module) -> list[torch.optim.Optimizer]:
    if run.optimizer == "adamw":  # fused: without the temporaries of the other forms
        params = list(model.parameters())
        several = [[p] for p in params] if run.release else [params]
        return [torch.optim.AdamW(some, fused=True) for some in several]
    options = {"embeddings": run.embeddings, "dense_state": run.dense_state}
    if run.optimizer == "apollo":
        groups = apollo_kernels.apollo(model, rank=run.rank, **options)
    else:
        groups = apollo_kernels.apollo_mini(model, **options)
    return [apollo_kernels.APOLLO(groups, lr=1e-2)]


def _warm_up(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """The state is there in every step but the first."""
    for p in model.parameters():
        p.grad = torch.empty(p.shape, dtype=p.dtype)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _release(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    first = optimizers[0]
    if isinstance(first, apollo_kernels.APOLLO):
        first.attach(model)
        return
    for optimizer in optimizers:  # AdamW's usual recipe: an optimizer per parameter

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        optimizer.param_groups[0]["params"][0].register_post_accumulate_grad_hook(step)


def _stored(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    return [t for state in states for t in state.values() if isinstance(t, Tensor)]


def _peak(
    tracker: MemTracker, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> dict[str, int]:
    found: dict[str, int] = {}
    for device in tracker.get_tracker_snapshot("peak").values():
        for kind, size in device.items():
            name = getattr(kind, "value", kind)
            found[name] = found.get(name, 0) + size
    weights = sum(t.nbytes for p in model.parameters() for t in quantized.stored(p))
    state = sum(t.nbytes for t in _stored(optimizers))
    peak, gradients = found["Total"], found["Gradient"]
    rest = peak - weights - state - gradients
    return {
        "peak": peak, "weights": weights, "state": state, "gradients": gradients, "rest": rest,
    }  # fmt: skip


def _replicated(model: nn.Module, *, views: bool) -> nn.Module:
    """DistributedDataParallel with its own buckets; only the numbers do not travel."""
    replica = nn.parallel.DistributedDataParallel(
        model, gradient_as_bucket_view=views, init_sync=False
    )

    def reduced(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations, not strings
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())  # in place, as NCCL does it
        return future

    replica.register_comm_hook(None, reduced)
    replica.reducer = _Reducer(replica.reducer)  # type: ignore[assignment]
    return replica


class _Reducer:
    """DDP's, but for the new order of buckets after the first step, which would read numbers; the
    bytes are the same."""

    def __init__(self, own: Any):
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def _rebuild_buckets(self) -> bool:
        return False


@contextlib.contextmanager
def _process_group(wanted: str) -> Iterator[None]:
    """A group of 8 that talks to nobody."""
    if not wanted:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# ---- the claims ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """Runs whose peaks must stay below ``limit`` GB, one figure each."""

    text: str
    limit: float
    runs: dict[str, Run]


CLAIMS = {
    "7b-int8": Claim(
        "LLaMA-7B trains below 8 GB: Q-APOLLO-Mini, gradient release, batch 1 x 256",
        8,
        {
            "all weights int8": Run(int8=True, release=True, embeddings=True),
            "embedding and head bf16, their moments float32": Run(int8=True, release=True),
        },
    ),
    "13b-ddp": Claim(
        "LLaMA-13B trains under plain DistributedDataParallel on 80 GB cards, batch 1 x 256 each",
        80,
        {
            "Mini, gradient_as_bucket_view": Run("llama-13b", ddp="views"),
            "APOLLO rank 256, gradient_as_bucket_view": Run("llama-13b", "apollo", ddp="views"),
            "Mini, gradients beside their buckets": Run("llama-13b", ddp="buckets"),
            "the same, embeddings in the low-rank group": Run(
                "llama-13b", ddp="buckets", embeddings=True
            ),
            "APOLLO rank 256, gradients beside their buckets": Run(
                "llama-13b", "apollo", ddp="buckets"
            ),
        },
    ),
    "8b-24gb": Claim(
        "Llama-3-8B trains on a 24 GB card in bf16, not quantized: gradient release, embeddings in "
        "the low-rank group",
        24,
        {
            "Mini, 1 x 256": Run("llama-3-8b", release=True, embeddings=True),
            "Mini, 1 x 2048": Run("llama-3-8b", release=True, embeddings=True, sequence=2048),
            "APOLLO rank 256, 1 x 256": Run("llama-3-8b", "apollo", release=True, embeddings=True),
        },
    ),
}

MICRO_BATCH = "7b-micro-batch"
CARD = 80.0
PAPER = 4.0  # AdamW 4, APOLLO and Mini 16 (section 5.3)


WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", gradient release": {"release": True},
    ", DDP": {"ddp": "buckets"},
}


def micro_batch_runs() -> dict[str, Run]:
    """Every way to train 7B of the claim about micro-batches; their batch is what is looked for."""
    return {
        f"{name}{way}{', checkpointed' * checkpointed}": Run(
            optimizer=optimizer, checkpointing=checkpointed, **options
        )
        for checkpointed in (False, True)
        for way, options in WAYS.items()
        for optimizer, name in (("adamw", "AdamW"), ("apollo", "APOLLO"), ("mini", "Mini"))
    }


@functools.cache
def estimated(run: Run) -> estimate.Estimate:
    """What `python -m apollo_kernels estimate` says of a run."""
    shape = estimate.architecture(run.model)
    if run.layers is not None:
        shape = dataclasses.replace(shape, layers=run.layers)
    rule = "adam" if run.optimizer == "adamw" else run.optimizer
    moments = getattr(torch, run.dtype).itemsize  # of AdamW: as the weights
    mode = estimate.Mode(
        run.optimizer, rule, moments, int8=run.int8, embeddings=run.embeddings,
        release=run.release, dense_state=run.dense_state,
    )  # fmt: skip
    (found,) = estimate.estimate(
        shape,
        batch=run.batch,
        sequence=run.sequence,
        rank=run.rank,
        dtype=getattr(torch, run.dtype),
        ddp=run.ddp,
        modes=[mode],
        checkpointing=[run.checkpointing],
    )
    return found


def largest_batch(run: Run, limit: float, counted: Counted) -> int:
    """The largest batch whose peak is within ``limit`` GB; it and the next one are counted.

    The search starts at the estimate's answer, so mostly these two are all that is counted.
    """

    def fits(batch: int) -> bool:
        return counted(dataclasses.replace(run, batch=batch))["peak"] <= limit * GB

    def peak(batch: int) -> int:
        return estimated(dataclasses.replace(run, batch=batch)).peak

    batch = bisect.bisect_right(range(1, 4096), limit * GB, key=peak)
    while batch and not fits(batch):
        batch -= 1
    while fits(batch + 1):
        batch += 1
    return batch


# ---- results -------------------------------------------------------------------------------------


class Results:
    """What has been counted, kept on disk after each run."""

    def __init__(self, path: Path, again: bool):
        self.path = path
        self.rows: dict[str, dict[str, int]] = {}
        if path.exists() and not again:
            self.rows = json.loads(path.read_text())["runs"]

    def __call__(self, run: Run) -> dict[str, int]:
        key = told(run)
        if key not in self.rows:
            start = time.process_time()
            self.rows[key] = count(run)
            seconds = time.process_time() - start
            print(f"{self.rows[key]['peak'] / GB:8.3f} GB  {key}  ({seconds:.0f} s)", flush=True)
            self.save()
        return self.rows[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"torch": torch.__version__, "runs": self.rows}
        self.path.write_text(json.dumps(found, indent=1) + "\n")


def told(run: Run) -> str:
    """A run in words: what differs from the defaults."""
    values = dataclasses.asdict(run)
    words = [values.pop("model"), values.pop("optimizer")]
    words.append(f"{values.pop('batch')}x{values.pop('sequence')}")
    if values.pop("rank") != Run.rank:
        words.append(f"rank={run.rank}")
    if values.pop("dtype") != Run.dtype:
        words.append(run.dtype)
    if values.pop("dense_state") != Run.dense_state:
        words.append(f"dense_state={run.dense_state}")
    if values.pop("layers") is not None:
        words.append(f"layers={run.layers}")
    if ddp := values.pop("ddp"):
        words.append(f"ddp={ddp}")
    return " ".join([*words, *(key for key, on in values.items() if on)])


def table(counted: Counted, names: list[str]) -> str:
    """claims.md."""
    lines = [
        "# Memory claims",
        "",
        "Peak bytes of one whole training step (forward, backward, optimizer), counted on fake",
        "tensors by `bench/memory_claims.py`. GB are 1e9 bytes. The last column is how far off",
        "`python -m apollo_kernels estimate` is. bf16 weights unless they are int8, activations",
        "checkpointed per layer unless it says otherwise.",
    ]
    for name in names:
        lines += [""] + (_micro_batches(counted) if name == MICRO_BATCH else _claim(counted, name))
    return "\n".join(lines) + "\n"


def _claim(counted: Counted, name: str) -> list[str]:
    claim = CLAIMS[name]
    lines = [
        f"## {claim.text}",
        "",
        f"| | peak GB | below {claim.limit:g} | weights | state | gradients, buckets, activations "
        "| estimate |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, run in claim.runs.items():
        found = counted(run)
        peak, weights, state = (found[key] / GB for key in ("peak", "weights", "state"))
        verdict = "yes" if peak < claim.limit else "**no**"
        off = estimated(run).peak / found["peak"] - 1
        lines.append(
            f"| {label} | {peak:.2f} | {verdict} | {weights:.2f} | {state:.3f} "
            f"| {peak - weights - state:.2f} | {100 * off:+.2f} % |"
        )
    return lines


def _micro_batches(counted: Counted) -> list[str]:
    runs = micro_batch_runs()
    best = {label: largest_batch(run, CARD, counted) for label, run in runs.items()}
    lines = [
        f"## The largest micro-batch of LLaMA-7B in {CARD:g} GB, and how many times AdamW's "
        f"(paper: {PAPER:g})",
        "",
        "AdamW is torch's fused one with bf16 moments; the other forms hold temporaries as large",
        "as the weights. Both the batch and the next one were counted. DDP: its default, with",
        "gradients beside their buckets. Bytes depend on batch x sequence alone, so the column of",
        "length 1024 follows from the first; one point of it was counted.",
        "",
        "| | batch at 256 | peak GB | next one | times AdamW, same mode | times plain AdamW "
        "| batch at 1024 |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, run in runs.items():
        batch = best[label]
        same = _adamw(best, label)
        plain = best["AdamW" + ", checkpointed" * run.checkpointing]
        peaks = [
            counted(dataclasses.replace(run, batch=b))["peak"] / GB for b in (batch, batch + 1)
        ]
        lines.append(
            f"| {label} | {batch} | {peaks[0]:.2f} | {peaks[1]:.2f} | {batch / same:.2f} "
            f"| {batch / plain:.2f} | {batch // 4} |"
        )
    ours = {label: best[label] for label in runs if "AdamW" not in label}
    reached = [label for label, batch in ours.items() if batch >= PAPER * _adamw(best, label)]
    beyond = [label for label, batch in ours.items() if batch >= PAPER * best["AdamW"]]
    lines += [
        "",
        f"{PAPER:g} times AdamW in the same mode: {'; '.join(reached) or 'none'}. "
        f"{PAPER:g} times AdamW without checkpointing: {'; '.join(beyond) or 'none'}.",
    ]
    last = dataclasses.replace(runs["Mini"], batch=best["Mini"] // 4, sequence=1024)
    found = counted(last)["peak"] / GB
    lines += ["", f"Counted: Mini, {last.batch} x 1024, {found:.2f} GB."]
    return lines


def _adamw(best: dict[str, int], label: str) -> int:
    """AdamW's batch in the same mode."""
    return best[label.replace("APOLLO", "AdamW").replace("Mini", "AdamW")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = [*CLAIMS, MICRO_BATCH]
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(known))
    parser.add_argument("--again", action="store_true", help="count everything anew")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    if unknown := [name for name in options.claims if name not in known]:
        parser.error(f"unknown claim {unknown[0]!r}: choose from {', '.join(known)}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    _as_on_a_card()
    counted = Results(options.out / "claims.json", options.again)
    text = table(counted, options.claims or known)
    print(text)
    if not options.claims:
        (options.out / "claims.md").write_text(text)


if __name__ == "__main__":
    main()
