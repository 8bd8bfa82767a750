# isort: off
import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

# isort: on
import contextlib
import functools
import importlib.util
import os
from dataclasses import dataclass

import emulated
import interpreter
import pytest
import ranks
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # decided when Triton is imported: its kernels run interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")
interpreter.quicken()

# Warnings that tests cause on purpose, all over: they clamp ranks, step twins that share keys, give
# no rank, or one to vectors, take three dimensions as a matrix, and overflow where a kernel must
# keep what it has (NumPy tells of that inside of Triton's interpreter, as a card does not).
EXPECTED = [
    "ignore:two optimizers of this process:UserWarning",
    "ignore:rank .* is clamped:UserWarning",
    "ignore:rank .* has no effect on:UserWarning",
    "ignore:no group has a rank:UserWarning",
    "ignore:.* three dimensions, stepped as one matrix:UserWarning",
    "ignore:(overflow|invalid value|divide by zero):RuntimeWarning:triton",
]


def pytest_configure(config):
    for line in EXPECTED:
        config.addinivalue_line("filterwarnings", line)


@dataclass(frozen=True)
class Backend:
    """A back end as a test sees it: what it is called, and where its tensors live."""

    name: str
    device: torch.device

    @property
    def interpreted(self):
        """Whether a step takes a tenth of a second, so that a test should take few."""
        return self.name == "triton" and self.device.type == "cpu"


# The three back ends that need no card, and with a card the same ones on it.
PLACES = {"torch": ("torch", "cpu"), "cuda": ("cuda", "cpu"), "triton": ("triton", "cpu")}
if HAS_GPU:
    PLACES |= {f"{name} on the GPU": (name, "cuda") for name in ("torch", "cuda", "triton")}


def why_not(name, device):
    """Why a back end cannot run here, or None."""
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device == "cuda":
        from apollo_kernels import info

        rejected = info.collect()["devices"]["cuda:0"]["rejected"]
        return rejected.get(name)
    if name == "cuda":
        return emulated.why_not()
    if name == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on the GPU here, not in its interpreter"
    return None


@functools.cache
def emulated_module():
    """The CUDA kernels, compiled for the emulated device: the one place where tests load them."""
    return emulated.load(emulated.build())


@contextlib.contextmanager
def running(place):
    """Within it, APOLLO_KERNELS_BACKEND asks for the back end at ``place``, which can run."""
    name, device = PLACES[place]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("APOLLO_KERNELS_BACKEND", name)
        if (name, device) == ("cuda", "cpu"):
            stack.enter_context(emulated.device(emulated_module()))
        yield Backend(name, torch.device(device))


def _marked(place):
    return pytest.param(place, marks=pytest.mark.gpu) if PLACES[place][1] == "cuda" else place


@pytest.fixture(params=map(_marked, PLACES))
def backend(request):
    """Every back end in turn: PyTorch, the CUDA kernels on the emulated device, the Triton kernels
    in the interpreter, and all three on a card where there is one."""
    if reason := why_not(*PLACES[request.param]):
        pytest.skip(f"{request.param}: {reason}")
    with running(request.param) as found:
        yield found


@pytest.fixture(scope="session")
def group():
    """Processes that run a function as the ranks of a gloo group."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("torch has no gloo here")
    found = ranks.Ranks()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
