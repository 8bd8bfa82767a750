"""``check``: does every back end that this machine has compute what the paper says?

The formula is written down here once more, in float64 and without the back ends' code; a step of
each back end is held against it, weight by weight. Then a state goes through a file, and where
there is a GPU a step is captured in a CUDA graph.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apollo_kernels import backends, projection_matrix
from apollo_kernels.commands.output import paint
from apollo_kernels.optimizer import APOLLO

LR, BETAS, EPS, DECAY, GAP = 1e-2, (0.9, 0.999), 1e-6, 0.1, 2
GROWTH = (1.0, 8.0, 1.0, 30.0)  # of the gradients from step to step: the limiter has work to do


@dataclass(frozen=True)
class Case:
    """A weight, and how it is stepped."""

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {kind}, {self.shape[0]} x {self.shape[1]}"


MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
CASES = (
    Case("APOLLO, rank 8", (96, 64), torch.float32, {"rank": 8}),
    Case("APOLLO, rank 8", (64, 96), torch.bfloat16, {"rank": 8}),
    Case("APOLLO, rank 128", (256, 192), torch.bfloat16, {"rank": 128}),
    Case("APOLLO, rank 8, signs", (96, 64), torch.bfloat16, {"rank": 8, "proj": "rademacher"}),
    Case("APOLLO, rank 16, sparse", (64, 96), torch.bfloat16, {"rank": 16, "proj": "sparse"}),
    Case("APOLLO-Mini", (96, 64), torch.float32, MINI),
    Case("APOLLO-Mini", (64, 96), torch.bfloat16, MINI),
    Case("AdamW", (96, 64), torch.float32),
    Case("AdamW", (96, 64), torch.bfloat16),
)
# Of an update, beside the rounding of the weight: float32 sums, a GPU's fast functions, and normals
# that are rounded to the other neighbour in bf16.
ALLOWED = 2e-3


@dataclass
class Result:
    device: str
    backend: str
    check: str
    ok: bool
    detail: str


def _gradient(shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1000 + step)
    return GROWTH[step] * torch.randn(shape, generator=generator)


class Formula:
    """Algorithm 1 of the paper for one weight; everything in float64 on the CPU."""

    def __init__(self, options: dict[str, Any], key: int, shape: tuple[int, int]):
        self.options, self.key, self.rows = options, key, shape[0] >= shape[1]
        self.rank = options.get("rank")
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.norm = 0.0

    def update(self, grad: Tensor, step: int) -> Tensor:
        """What weight decay leaves of a weight is changed by this, at ``step`` from 1."""
        x = grad.double().cpu()
        rate = LR * math.sqrt(1 - BETAS[1] ** step) / (1 - BETAS[0] ** step)
        if self.rank is None:
            return -rate * self._normalized(x)
        x = x if self.rows else x.t()
        kind = self.options.get("proj", "gaussian")
        p = projection_matrix(self.key, (step - 1) // GAP, self.rank, x.shape[1], kind)
        r = x @ p.double().t()
        n = self._normalized(r)
        if self.options.get("scale_type") == "tensor":
            s = n.norm() / (r.norm() + 1e-8)
        else:
            s = (n.norm(dim=1) / (r.norm(dim=1) + 1e-8)).unsqueeze(1)
        scaled = s * x
        norm = float(scaled.norm())
        held = min(norm, 1.01 * (self.norm + 1e-8)) if self.norm >= 1e-8 else norm
        self.norm = held
        alpha = math.sqrt(self.options.get("scale", 1.0))
        update = -rate * alpha * held / norm * scaled
        return update if self.rows else update.t()

    def _normalized(self, x: Tensor) -> Tensor:
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * x
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * x * x
        return self.m / (self.v.sqrt() + EPS)


def _optimizer(p: torch.nn.Parameter, backend: str, **options: Any) -> APOLLO:
    keys = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "update_proj_gap": GAP}
    group = {"params": [("weight", p)], "rank": options.pop("rank", None)}
    return APOLLO([group], backend=backend, **{**keys, **options})


def _parameter(case: Case, device: torch.device) -> torch.nn.Parameter:
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(case.shape, generator=generator)
    return torch.nn.Parameter(weight.to(device, case.dtype))


def follows_the_formula(case: Case, backend: str, device: torch.device) -> str:
    """A few steps; each is compared from the weight before it, so that a rounding counts once."""
    p = _parameter(case, device)
    optimizer = _optimizer(p, backend, **case.options)
    formula: Formula | None = None
    worst = 0.0
    for step in range(len(GROWTH)):
        before = p.detach().double().cpu()
        p.grad = _gradient(case.shape, step).to(device, case.dtype)
        optimizer.step()
        key = optimizer.state[p].get("seed", 0)
        formula = formula or Formula(case.options, key, case.shape)
        update = formula.update(p.grad, step + 1)
        wanted = (1 - LR * DECAY) * before + update
        unit = torch.finfo(case.dtype).eps
        allowed = unit * wanted.abs() + ALLOWED * update.abs().max()
        error = (p.detach().double().cpu() - wanted).abs() / allowed
        worst = max(worst, float(error.max()) if bool(error.isfinite().all()) else math.inf)
    if not worst <= 1:
        raise AssertionError(f"error {worst:.2g} of what is allowed")
    return f"{len(GROWTH)} steps, error {worst:.2f} of what is allowed"


def goes_through_a_file(backend: str, device: torch.device) -> str:
    """A run that is saved and loaded goes on with the same bits."""
    options = {"rank": 8, "stochastic_rounding": True}
    case = Case("", (96, 64), torch.bfloat16)

    def step(p: torch.nn.Parameter, optimizer: APOLLO, number: int) -> None:
        p.grad = _gradient(case.shape, number).to(device, case.dtype)
        optimizer.step()

    p = _parameter(case, device)
    optimizer = _optimizer(p, backend, **options)
    for number in range(2):
        step(p, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    other = _optimizer(q, backend, **options)
    other.load_state_dict(torch.load(file, map_location=device, weights_only=True))
    for number in range(2, 4):
        step(p, optimizer, number)
        step(q, other, number)
    if not torch.equal(p, q):
        raise AssertionError("the run that was loaded ends with other weights")
    return "saved, loaded with weights_only=True, the same bits after 2 more steps"


def is_captured(backend: str, device: torch.device) -> str:
    """A captured step, replayed across a redraw of the projection, does what eager steps do."""
    case = Case("", (96, 64), torch.bfloat16)
    p, q = (_parameter(case, device) for _ in range(2))
    optimizer = _optimizer(p, backend, rank=8, capturable=True)
    twin = _optimizer(q, backend, rank=8)
    for w in (p, q):
        w.grad = _gradient(case.shape, 0).to(device, case.dtype)
    optimizer.step()
    twin.step()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()  # captured, not run
    for number in range(1, len(GROWTH)):
        for w in (p, q):
            w.grad.copy_(_gradient(case.shape, number))  # type: ignore[union-attr]
        graph.replay()
        twin.step()
    torch.cuda.synchronize(device)
    if not torch.equal(p, q):
        raise AssertionError("replayed steps end with other weights than eager ones")
    return f"{len(GROWTH) - 1} replays, the same bits as eager steps"


def _run(device: torch.device, backend: str, name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(str(device), backend, name, True, check())
    except Exception as error:  # of a driver or a compiler, too: it is the check's finding
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return Result(str(device), backend, name, False, text)


def results(devices: list[torch.device]) -> Iterator[Result]:
    """One after the other, of every back end that a device has."""
    for device in devices:
        for backend, reason in backends.backends(device):
            if reason is not None:
                continue
            here = partial(_run, device, backend)
            for case in CASES:
                yield here(str(case), partial(follows_the_formula, case, backend, device))
            yield here("state", partial(goes_through_a_file, backend, device))
            if device.type == "cuda" and backend != "torch":  # which reads the host
                yield here("CUDA graph", partial(is_captured, backend, device))


def add_arguments(parser: Any) -> None:
    parser.description = (
        "A few steps of every back end that this machine has, held against the paper's formula in "
        "float64, weight by weight; a state that goes through a file; on a GPU a step that is "
        "captured in a CUDA graph. One line each; seconds on a CPU, and on a GPU as long as Triton "
        "compiles."
    )
    parser.epilog = """examples:
  python -m apollo_kernels check
  python -m apollo_kernels check --device cuda:0 --json

exit codes: 0 everything is right; 1 something is not; 2 wrong input."""
    parser.add_argument("--device", help="cpu, cuda:0, ...; default: the CPU and every GPU")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _devices(asked: str | None) -> list[torch.device]:
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if asked is None:
        return [torch.device(name) for name in present]
    name = "cuda:0" if asked == "cuda" else asked
    if name not in present:
        raise ValueError(f"--device {asked!r}: this machine has {', '.join(present)}")
    return [torch.device(name)]


def command(options: Any) -> int:
    devices = _devices(options.device)
    found = []
    for result in results(devices):
        found.append(result)
        if not options.json:
            word = paint("ok  ", "green") if result.ok else paint("FAIL", "red")
            where = f"{result.device} {result.backend}"
            print(f"{word}  {where:<14}{result.check:<44}{result.detail}", flush=True)
    failed = sum(not result.ok for result in found)
    if options.json:
        print(json.dumps([asdict(result) for result in found], indent=2))
    else:
        for device in devices:
            for backend, reason in backends.backends(device):
                if reason is not None:
                    print(paint(f"not run: {backend} on {device}: {reason}", "dim"))
        print(
            f"{len(found)} checks, {failed} failed" if failed else f"{len(found)} checks, all right"
        )
    return 1 if failed else 0
