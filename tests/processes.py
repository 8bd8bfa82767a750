"""Runs a function on several processes that talk by gloo, and brings back what it returned.

The function stands at the top of a module and takes a rank and then plain values. A forkserver has
imported torch once, so that further processes start in a moment.
"""

import multiprocessing
import pickle
import tempfile
import traceback
from pathlib import Path

import pytest
from torch import distributed

TIMEOUT = 120  # seconds, of a busy machine


def why_not():
    gloo = distributed.is_available() and distributed.is_gloo_available()
    return None if gloo else "torch has no gloo here"


def run(function, *arguments, world=2):
    """What ``function(rank, *arguments)`` returned on each rank; its traceback fails the test."""
    if reason := why_not():
        pytest.skip(reason)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apollo_kernels", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            values = (theirs, folder, rank, world, function, arguments)
            process = context.Process(target=_child, args=values, daemon=True)
            process.start()
            theirs.close()
            processes.append((process, ours))
        try:
            found = [_answer(rank, *both) for rank, both in enumerate(processes)]
        finally:
            for process, _ in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(found) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in found]


def _answer(rank, process, pipe):
    if not pipe.poll(TIMEOUT):
        return False, f"no answer in {TIMEOUT} s"
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        return False, f"ended with {process.exitcode}"


def _child(pipe, folder, rank, world, function, arguments):
    try:
        import torch

        torch.set_num_threads(1)
        store = distributed.FileStore(str(Path(folder) / "store"), world)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        _send(pipe, (True, function(rank, *arguments)))
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        _send(pipe, (False, traceback.format_exc()))


def _send(pipe, value):
    """By value: torch's own way for tensors, in shared memory, ends with the process."""
    pipe.send_bytes(pickle.dumps(value))
