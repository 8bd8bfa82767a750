"""One run over several processes, which torchrun starts: how model, batches and checkpoints split.

ddp     every process has the whole model; gradients are averaged
fsdp2   weights, gradients and state are cut over all processes (fully_shard)
hsdp    the same inside of halves of the processes, which are replicas of each other
tp      attention and MLP are cut over all processes, which see the same batch
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

MODES = ("ddp", "fsdp2", "hsdp", "tp")


class Stop(Exception):
    """A wrong argument or file: printed as one line."""


class Processes:
    """Those of this run. Without a mode it is this one alone."""

    def __init__(self, mode: str | None, device: str):
        self.mode, self.device = mode, device
        self.rank, self.world, self.started = 0, 1, False
        if mode is None:
            return
        if not distributed.is_initialized():
            if "RANK" not in os.environ:
                raise Stop(f"--parallel {mode}: start it with torchrun --nproc-per-node N")
            cuda = device.startswith("cuda")
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            _start("cpu:gloo,cuda:nccl" if cuda else "gloo")
            self.started = True
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        if mode == "hsdp" and self.world % 2:
            raise Stop(f"--parallel hsdp: needs an even number of processes, got {self.world}")

    def end(self) -> None:
        if self.started:
            distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def split(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as this mode trains it."""
        if self.mode is None:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        kind = self.device.partition(":")[0]
        if self.mode == "ddp":
            return torch.nn.parallel.DistributedDataParallel(model)
        shape = (2, self.world // 2) if self.mode == "hsdp" else (self.world,)
        names = ("replicas", "shards")[-len(shape) :]
        mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
        if self.mode == "tp":
            return _cut_layers(model, mesh)
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def share(self, tokens: Tensor) -> Tensor:
        """This process's part of a batch."""
        if self.mode in (None, "tp"):
            return tokens
        if len(tokens) % self.world:
            raise Stop(
                f"--batch-size {len(tokens)} does not come out even on {self.world} processes"
            )
        return tokens.chunk(self.world)[self.rank]

    def mean(self, loss: Tensor) -> float:
        """Over all processes, of their parts' losses."""
        if self.world > 1:
            loss = loss.detach() / self.world
            distributed.all_reduce(loss)
        return loss.item()

    def any(self, here: bool) -> bool:
        """Whether it is so in one of them."""
        if self.world == 1:
            return here
        found = torch.tensor(float(here), device=self.device)
        distributed.all_reduce(found)
        return bool(found)

    # ---- checkpoints: a folder for each, of which the newest complete one counts -----------------

    def save(
        self, path: Path, model: torch.nn.Module, optimizer: Any, rest: dict[str, Any]
    ) -> None:
        """Every process writes what it holds. The metadata come last: a kill leaves the checkpoint
        before this one whole, which goes only now."""
        from torch.distributed import checkpoint

        folder = path / f"step-{rest['step']}"
        content = {**_states(model, optimizer), "rest": json.dumps(rest)}
        checkpoint.save(content, checkpoint_id=str(folder))
        if self.first:
            for old in path.glob("step-*"):
                if old != folder:
                    shutil.rmtree(old)
        distributed.barrier()

    def restore(self, path: Path, model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
        """Reads what any number of processes has written; what else was saved."""
        from torch.distributed import checkpoint
        from torch.distributed.checkpoint import state_dict as of

        content = {**_states(model, optimizer), "rest": ""}
        checkpoint.load(content, checkpoint_id=str(newest(path)))
        # Of DDP its module: torch asks DDP for keys "weight", and int8 weights have two others.
        of.set_model_state_dict(getattr(model, "module", model), content["model"])
        of.set_optimizer_state_dict(model, optimizer, content["optimizer"])
        return json.loads(content["rest"])

    def read_rest(self, path: Path) -> dict[str, Any]:
        """What ``save`` was given besides model and optimizer."""
        from torch.distributed import checkpoint

        content = {"rest": ""}
        checkpoint.load(content, checkpoint_id=str(newest(path)))
        return json.loads(content["rest"])


def _start(backend: str) -> None:
    """The process group, with a part of torchrun's store for each start of the processes: after one
    was killed the others would still find its address there."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, world = next(distributed.rendezvous("env://"))
    store = distributed.PrefixStore(f"start {attempt}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)


def _complete(path: Path) -> list[Path]:
    return [folder for folder in path.glob("step-*") if (folder / ".metadata").is_file()]


def has_checkpoint(path: Path) -> bool:
    return bool(_complete(path))


def newest(path: Path) -> Path:
    """The last checkpoint that was written to its end."""
    if not (whole := _complete(path)):
        raise Stop(f"--resume: no complete checkpoint in {str(path)!r}")
    return max(whole, key=lambda folder: int(folder.name.removeprefix("step-")))


def _states(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    from torch.distributed.checkpoint import state_dict as of

    return {
        "model": of.get_model_state_dict(model),
        "optimizer": of.get_optimizer_state_dict(model, optimizer),
    }


def _cut_layers(model: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    layers = model.model.layers  # type: ignore[union-attr]
    heads = model.config.num_attention_heads  # type: ignore[union-attr]
    if heads % mesh.size():
        raise Stop(f"--parallel tp: {heads} heads do not come out even on {mesh.size()} processes")
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(layers)):  # type: ignore[arg-type]
        at = f"model.layers.{i}"
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            plan[f"{at}.{name}"] = ColwiseParallel()
        plan |= {f"{at}.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")}
        plan |= {f"{at}.{n}": RowwiseParallel() for n in ("self_attn.o_proj", "mlp.down_proj")}
    return parallelize_module(model, mesh, plan)
