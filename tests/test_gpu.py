"""Every back end that can run on a CUDA device, against the float64 oracle (`make gpu-test`)."""

import pytest
import torch

from apollo_kernels import APOLLO, ops
from apollo_kernels.philox import draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(129, 64), (64, 129), (40, 40), (1, 7), (300, 17)]
CONFIGURATIONS = {
    "channel": {"rank": 8},
    "signs": {"rank": 16, "proj": "rademacher"},
    "reverse": {"rank": 8, "proj_type": "reverse_std"},
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "all switches": {
        "rank": 8, "weight_decay": 0.01, "scale_front": True, "maximize": True,
        "correct_bias": False, "scale": 4.0,
    },
    "AdamW": {"weight_decay": 0.01},
}  # fmt: skip


@pytest.fixture(params=ops.BACKENDS)
def backend(request):
    reason = dict(ops.backends("cuda")).get(request.param) if torch.cuda.is_available() else None
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def train(dtype, device, backend, keys, steps=12):
    """Weights after some steps over a redraw, with gradients that are the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).bfloat16() for s in SHAPES]
    ps = [torch.nn.Parameter(w.to(device, dtype)) for w in start]
    optimizer = APOLLO(ps, lr=1e-2, update_proj_gap=5, backend=backend, **keys)
    for _ in range(steps):
        for p in ps:
            g = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = g.to(device, dtype)
        optimizer.step()
    return [p.detach().cpu().double() for p in ps], optimizer


@pytest.mark.sanitize
@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_run_errs_no_more_than_twice_what_plain_pytorch_does(backend, dtype, name):
    keys = CONFIGURATIONS[name]
    exact, _ = train(torch.float64, "cpu", "torch", keys)
    plain, _ = train(dtype, "cpu", "torch", keys)
    found, optimizer = train(dtype, "cuda", backend, keys)
    for f, p, e in zip(found, plain, exact, strict=True):
        # the floor: one rounding of the largest weight, which the plain run may happen to escape
        slack = 4 * torch.finfo(dtype).eps * e.abs().max()
        assert (f - e).abs().max() <= 2 * (p - e).abs().max() + slack
    assert optimizer.stats()["nonfinite"] == 0


def test_projections_drawn_on_the_gpu_are_the_cpus():
    for distribution, most in (("gaussian", 1e-3), ("rademacher", 0.0)):
        here = draw(3, 2, 65, 1000, distribution)
        there = draw(3, 2, 65, 1000, distribution, device="cuda").cpu()
        assert (here != there).float().mean() <= most
        assert torch.allclose(here.float(), there.float(), rtol=2**-8, atol=2**-10)


@pytest.mark.sanitize
def test_a_bad_gradient_changes_nothing_but_the_counter(backend):
    p = torch.nn.Parameter(torch.ones(40, 24, device="cuda"))
    optimizer = APOLLO([p], rank=8, backend=backend)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    p.grad[3, 3] = float("nan")
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.stats()["nonfinite"] == 1


def test_the_same_run_gives_the_same_bits(backend):
    first, _ = train(torch.bfloat16, "cuda", backend, CONFIGURATIONS["channel"])
    again, _ = train(torch.bfloat16, "cuda", backend, CONFIGURATIONS["channel"])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_checkpoint_moves_to_the_cpu_and_back(backend):
    _, optimizer = train(torch.float32, "cuda", backend, CONFIGURATIONS["channel"])
    saved = optimizer.state_dict()
    ps = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    other = APOLLO(ps, lr=1e-2, update_proj_gap=5, rank=8)
    other.load_state_dict(saved)
    for p, index in zip(ps, saved["state"], strict=True):
        assert torch.equal(other.state[p]["exp_avg"], saved["state"][index]["exp_avg"].cpu())


def stepped(backend, steps, **options):
    """A low-rank and a dense parameter with gradients that stay where they are, after some steps."""
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s, device="cuda")) for s in ((64, 48), (48, 64), (48,))]
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = APOLLO(ps, lr=lr, rank=8, update_proj_gap=3, backend=backend, **options)
    for p in ps:
        p.grad = torch.randn_like(p)
    for _ in range(steps):
        optimizer.step()
    return ps, optimizer


def test_a_step_never_waits_for_the_device(backend):
    if backend == "torch":
        pytest.skip("it reads step and norm on the host")
    _, optimizer = stepped(backend, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_replays_across_redraws(backend):
    if backend == "torch":
        pytest.skip("it reads step and norm on the host")
    eager, _ = stepped(backend, 8)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ps, optimizer = stepped(backend, 2, capturable=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captured, not run
        optimizer.step()
    for _ in range(6):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, ps, strict=True))
