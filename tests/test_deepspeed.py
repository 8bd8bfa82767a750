"""DeepSpeed over our optimizer, on the CPU: what steps whole parameters, and what cuts them.

In a process of its own: DeepSpeed starts a process group, and changes torch as it is imported.
"""

import json
import os
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


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed") / "found.json"
    alone = {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], env={**os.environ, **alone},
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def test_an_engine_without_zero_steps_as_the_optimizer_alone(found):
    assert found["0"] == found["alone"]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_zero_which_makes_one_flat_buffer_of_matrices_is_refused_before_a_step(found, stage):
    assert "stands where the optimizer had matrices: DeepSpeed (ZeRO-1, 2 and 3)" in found[stage]
