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
import contextlib
import dataclasses
import json
import os
import socket
import sys
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
from apollo_kernels import estimate

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
    layers: int | None = None  # of the model, to try things out


def count(run: Run) -> dict[str, int]:
    """Bytes at the moment of the peak, by kind, and the peak itself."""
    with FakeTensorMode(), _process_group(run.ddp):
        model = _model(run)
        if run.int8:
            apollo_kernels.quantize_(model, embeddings=run.embeddings)  # type: ignore[attr-defined]
        trained: nn.Module = model
        if run.ddp:
            views = run.ddp == "views"
            trained = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
        optimizers = _optimizers(run, model)
        _warm_up(model, optimizers)
        if run.release:
            _release(model, optimizers)
        ids = torch.zeros((run.batch, run.sequence), dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(trained, ids, *_stored(optimizers))
        with tracker:
            loss = trained(input_ids=ids, labels=ids).loss
            loss.backward()
            if not (run.release and run.optimizer == "adamw"):
                for optimizer in optimizers:
                    optimizer.step()
        return _peak(tracker, model, optimizers)


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
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
    if run.optimizer == "apollo":
        groups = apollo_kernels.apollo(model, rank=run.rank, embeddings=run.embeddings)
    else:
        groups = apollo_kernels.apollo_mini(model, embeddings=run.embeddings)
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
    stored = getattr(apollo_kernels, "quantized", None)
    parts = stored.stored if stored is not None else lambda p: (p,)
    weights = sum(t.nbytes for p in model.parameters() for t in parts(p))
    state = sum(t.nbytes for t in _stored(optimizers))
    peak, gradients = found["Total"], found["Gradient"]
    rest = peak - weights - state - gradients
    return {
        "peak": peak, "weights": weights, "state": state, "gradients": gradients, "rest": rest,
    }  # fmt: skip


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
