"""DeepSpeed over our optimizer, on the CPU: what steps whole parameters, and what cuts them.

In a process of its own: DeepSpeed starts a process group, and changes torch as it is imported.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

PROGRAM = """
import json, sys
import torch, deepspeed
from apollo_kernels import APOLLO, apollo

torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))

def made():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    return net, APOLLO(apollo(net, rank=4), lr=1e-2)

def weights(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist()

net, optimizer = made()
for some in x:
    optimizer.zero_grad()
    (net(some) - some).square().mean().backward()
    optimizer.step()
found = {"alone": weights(net)}
for stage in (0, 1, 2):
    net, optimizer = made()
    before = weights(net)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config={
        "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
    })
    try:
        for some in x:
            engine.backward((engine(some) - some).square().mean())
            engine.step()
        found[stage] = weights(net)
    except ValueError as error:
        assert weights(net) == before
        found[stage] = str(error)
json.dump(found, open(sys.argv[1], "w"))
"""


# ZeRO's first stage over whole parameters: an engine without ZeRO, and torch's own optimizer.
TWO_RANKS = """
import json, sys
import torch, deepspeed
from torch.distributed.optim import ZeroRedundancyOptimizer
from apollo_kernels import APOLLO, apollo

torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
rank = torch.distributed.get_rank()
x = torch.randn(6, 2, 4, 32, generator=torch.Generator().manual_seed(1))

def made():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))

def loss(net, some):
    return (net(some) - some).square().mean()

def weights(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()]).tolist()

net = made()
optimizer = APOLLO(apollo(net, rank=4, update_proj_gap=3), lr=1e-2)
for halves in x:
    optimizer.zero_grad()
    for some in halves:  # of the two ranks; a division by 2 is exact
        (loss(net, some) / 2).backward()
    optimizer.step()
found = {"alone": weights(net)}
net = made()
groups = apollo(net, rank=4, update_proj_gap=3)
optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=APOLLO, lr=1e-2)
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config={
    "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 0},
})
for halves in x:
    engine.backward(loss(engine, halves[rank]))
    engine.step()
found["engine"] = weights(net)
found["states"] = len(optimizer.optim.state)
json.dump(found, open(f"{sys.argv[1]}.{rank}", "w"))
"""


def run(program, path, ranks):
    """What each of ``ranks`` processes has written, path.json, or path.json.0 and so on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": str(ranks), "PYTHONSAFEPATH": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        log = Path(f"{path}.{rank}.log").open("w+")  # noqa: SIM115
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started = subprocess.Popen(
            [sys.executable, "-c", program, path], env={**os.environ, **alone, **own},
            cwd=Path(__file__).parent, stdout=log, stderr=log,
        )  # fmt: skip
        processes.append((started, log))
    try:
        codes = [process.wait(240) for process, _ in processes]
    finally:
        for process, _ in processes:
            process.kill()
    for code, (_, log) in zip(codes, processes, strict=True):
        log.seek(0)
        said = log.read()
        log.close()
        assert code == 0, said[-3000:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "found.json"
    run(PROGRAM, path, 1)
    return json.loads(path.read_text())


def test_an_engine_without_zero_steps_as_the_optimizer_alone(found):
    assert found["0"] == found["alone"]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_zero_which_makes_one_flat_buffer_of_matrices_is_refused_before_a_step(found, stage):
    assert "stands where the optimizer had matrices: DeepSpeed (ZeRO-1, 2 and 3)" in found[stage]


def test_torchs_zero_redundancy_optimizer_shards_the_state_of_an_engine(tmp_path):
    path = tmp_path / "found.json"
    run(TWO_RANKS, path, 2)
    first, second = (json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(2))
    assert first["engine"] == second["engine"] == first["alone"]
    assert first["states"] + second["states"] == 4 and first["states"] in (1, 2, 3)
