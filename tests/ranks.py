"""Processes that act as the ranks of a gloo group: started once, then given functions to run.

They are forked from a server that has imported, once for all of them, what takes seconds.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

PATIENCE = 120  # seconds that a job may take, on a busy machine, before its processes are given up
PRELOADED = [
    "apollo_kernels", "torch._dynamo", "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.tensor.parallel",
]  # fmt: skip


class RankError(AssertionError):
    """What a rank raised, with its traceback as text."""


def _packed(value):
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(data):
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(pipe):
    import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

    import torch  # isort: skip
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.pop("APOLLO_KERNELS_BACKEND", None)  # of the test that happened to start this
    while True:
        job = pipe.recv()
        if job is None:
            return
        function, rank, world, store, arguments = job
        try:
            distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
                timeout=timedelta(seconds=PATIENCE),
            )  # fmt: skip
            torch.manual_seed(0)
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        try:
            distributed.barrier()
            distributed.destroy_process_group()
        except Exception:
            pass
        pipe.send_bytes(_packed(answer))


class Ranks:
    """Workers, as many as the largest world that was asked for."""

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.workers = []

    def run(self, world, function, *arguments):
        """``function(*arguments)`` on ranks 0 to world - 1 of one group: what each returned.

        The function is found by its name, in a module that the workers can import.
        """
        self._start(world)
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for rank, (_, pipe) in enumerate(self.workers[:world]):
                pipe.send((function, rank, world, store, arguments))
            answers = [self._answer(*worker) for worker in self.workers[:world]]
        wrong = [f"rank {rank}:\n{what}" for rank, (good, what) in enumerate(answers) if not good]
        if wrong:
            self.stop()
            raise RankError("\n".join(wrong))
        return [what for _, what in answers]

    def _start(self, world):
        while len(self.workers) < world:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()  # or the end of the process would not be seen
            self.workers.append((process, here))

    def _answer(self, process, pipe):
        if not pipe.poll(PATIENCE):
            return False, "no answer: it waits for another rank, or it has ended"
        try:
            return _unpacked(pipe.recv_bytes())
        except EOFError:
            process.join()
            return False, f"ended with {process.exitcode}"

    def stop(self):
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.workers = []
