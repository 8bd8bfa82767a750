"""What nvcc and Triton compile, run by an interpreter of PTX (tests/ptx says how).

Where the emulated device takes inline PTX for plain C++, here it is the PTX itself that runs, with
the arguments, grids and shared memory of the real launch code. `make test-ptx` runs the whole grid.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ptx import cuda_host, mutants, selection
from ptx.cases import Host, launched, take
from ptx.machine import Device

from apollo_kernels import cuda

pytestmark = pytest.mark.timeout(900)  # nvcc takes many times its half a minute on busy machines
REASON = cuda_host.why_not()
needs_nvcc = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TESTS = Path(__file__).parent


def host():
    running = functools.partial(cuda_host.running, cuda_host.kernels())
    return Host(cuda, running, cuda_host.batch_memory)


# Wavefronts of shared memory per ideal one, of the kernels that are above 1.1.
CONFLICTS = {"project_dots": 3.1, "project_sparse": 3.5}


@needs_nvcc
@pytest.mark.parametrize("case", selection.selection(), ids=str)
def test_the_compiled_kernels_take_the_steps_of_the_restatement(case):
    device = Device()
    assert take(host(), device, case) == []
    assert set(device.findings) == set()


@needs_nvcc
def test_the_selection_launches_every_kernel():
    names = set().union(*(launched(host(), case) for case in selection.selection()))
    assert names == set(cuda_host.kernels().ptx.names)


@needs_nvcc
@pytest.mark.parametrize("case", selection.sectors(), ids=str)
def test_no_main_loop_asks_for_more_sectors_than_it_needs(case):
    """Of gradients and weights, and of dense moments: whatever a step streams."""
    device = Device(watch=False, count=True)
    assert take(host(), device, case) == []
    streams = {"gradient": case.grad.itemsize, "weight": case.weight.itemsize}
    if not case.rank:
        streams |= dict.fromkeys(("exp_avg", "exp_avg_sq"), case.moments.itemsize)
    excess = device.counters.excess()
    seen = {touched for _, _, touched in excess}
    assert seen >= set(streams)
    for (kernel, verb, touched), ratio in excess.items():
        if touched == "shared":
            most = next((c for name, c in CONFLICTS.items() if name in kernel), 1.1)
            assert ratio <= most, (kernel, verb, ratio)
        elif touched in streams:
            assert ratio <= 1.1, (kernel, verb, touched, ratio)


@needs_nvcc
@pytest.mark.parametrize("mutant", mutants.FEW, ids=lambda m: m.name)
def test_a_fault_in_inline_ptx_is_seen(mutant):
    assert mutants.seen(mutant)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_what_triton_compiles_takes_the_steps_of_the_restatement():
    """In a process of its own: here Triton's functions are the interpreter's."""
    pytest.importorskip("triton")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command += [str(TESTS / "ptx" / "triton_checks.py"), "-k", "not grid"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout, done.stdout[-2000:]
