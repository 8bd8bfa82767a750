"""Every back end that can run on a CUDA device, against the float64 oracle (`make gpu-test`)."""

import sys
from pathlib import Path

import parts
import pytest
import torch
from gpu_runs import CONFIGURATIONS, SHAPES, compare, train

from apollo_kernels import APOLLO, backends
from apollo_kernels.philox import draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=backends.BACKENDS)
def backend(request):
    reasons = dict(backends.backends("cuda")) if torch.cuda.is_available() else {}
    if reason := reasons.get(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_run_errs_no_more_than_twice_what_plain_pytorch_does(backend, dtype, name):
    keys = CONFIGURATIONS[name]
    found, optimizer = train(dtype, "cuda", backend, keys)
    compare(found, dtype, keys, flips=backend != "torch")
    assert optimizer.stats()["nonfinite"] == 0


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("shape", [(512, 2048), (2048, 512), (1000, 700)], ids=str)
@pytest.mark.parametrize("rank", [64, 128, 256])
def test_full_tiles_over_many_turns_are_right(backend, rank, shape, distribution):
    """Products go on while the next operands are made: what comes too early shows in R alone."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    import bench_ops

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = bench_ops.Case(shape, rank, dtype, torch.device("cuda"), distribution)
        bench_ops.check(backend, case)


def test_projections_drawn_on_the_gpu_are_the_cpus():
    for distribution, most in (("gaussian", 1e-3), ("rademacher", 0.0)):
        here = draw(3, 2, 65, 1000, distribution)
        there = draw(3, 2, 65, 1000, distribution, device="cuda").cpu()
        assert (here != there).float().mean() <= most
        assert torch.allclose(here.float(), there.float(), rtol=2**-8, atol=2**-10)


def test_a_hundred_runs_give_the_same_bits(backend):
    first, _ = train(torch.bfloat16, "cuda", backend, CONFIGURATIONS["channel"], steps=6)
    for _ in range(99):
        again, _ = train(torch.bfloat16, "cuda", backend, CONFIGURATIONS["channel"], steps=6)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.fixture
def kernels(backend):
    if backend == "torch":
        pytest.skip("plain PyTorch reads the host")
    return backend


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "sparse"])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_of_a_matrix_take_the_step_of_the_whole(kernels, distribution, dim):
    """As ranks that cut it step them, with what crosses ranks added up by hand. Tensor cores cut
    sums off, at other places in a part. Rank 1 has a scale per tensor, as Mini has: of 1100 scales
    per channel some would stand on one entry of R that is nearly zero."""
    module = backends.load(kernels)
    for rank, dtype in ((1, torch.float32), (8, torch.bfloat16), (128, torch.bfloat16)):
        for rows in (True, False):
            item = parts.matrix((1100, 1100), rank, rows, dtype, device="cuda")
            scale_type = "tensor" if rank == 1 else "channel"
            h = parts.hyper(distribution=distribution, scale_type=scale_type)
            parts.agree(module, [item], dim, [300, 300, 777, 1100], h, tolerance=2**-11)


def test_the_fast_logarithm_keeps_its_promise_for_every_u1():
    """All 2^23 of them: a positive logarithm would have been a NaN in Z (csrc/philox.cuh).

    PTX promises 2^-22, of the logarithm where that is beyond 1, to which comes u1's own rounding.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
    import card_facts

    major, minor = torch.cuda.get_device_capability()
    facts = card_facts.collect(f"sm_{major}{minor}")
    if not facts:
        pytest.skip("needs nvcc")
    assert facts["bad_normals"] == 0
    assert facts["worst_logarithm_error"] <= 2**-21
    assert facts["flipped_normals_share"] <= 1e-3
    # Two of bf16's steps: by sin and cos, which err by 2^-20 of the radius, below 1.5e-3; by the
    # logarithm of a u1 near 1 below 7e-3.
    assert facts["normals_beyond_tolerance"] == 0
    assert facts["largest_normal_two_steps_off"] <= 7e-3


# For compute-sanitizer: our own kernels only, each class of them, small. Plain PyTorch's kernels
# would take most of the time and say nothing about ours.
@pytest.mark.sanitize
def test_a_bad_gradient_changes_nothing_but_the_counter(kernels):
    p = torch.nn.Parameter(torch.ones(40, 24, device="cuda"))
    optimizer = APOLLO([p], rank=8, backend=kernels)
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = p.detach().clone()
    p.grad[3, 3] = float("nan")
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.stats()["nonfinite"] == 1


SANITIZED = {
    **{name: CONFIGURATIONS[name] for name in ("channel", "sparse", "Mini", "AdamW")},
    "dots": {"rank": 5, "stochastic_rounding": True},
    "rank tiles": {"rank": 300, "proj_type": "left"},
    "all of K": {"rank": 40, "proj": "rademacher", "proj_type": "reverse_std"},
    "clipped": {"rank": 8, "max_grad_norm": 0.5},
}


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SANITIZED)
def test_a_short_run_for_the_sanitizers(kernels, name, dtype):
    found, optimizer = train(dtype, "cuda", kernels, SANITIZED[name], steps=2)
    assert all(torch.isfinite(w).all() for w in found)
    assert optimizer.stats()["nonfinite"] == 0


def model(backend, **options):
    """A few parameters with gradients, past the first step, which makes state and tables."""
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(s, device="cuda").bfloat16()) for s in SHAPES]
    ps.append(torch.nn.Parameter(torch.randn(33, device="cuda").bfloat16()))
    options = {"rank": 8, "lr": 1e-2, "update_proj_gap": 3, **options}
    optimizer = APOLLO(ps, backend=backend, **options)
    for p in ps:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return ps, optimizer


def test_a_step_waits_for_nothing_and_allocates_nothing(kernels):
    _, optimizer = model(kernels)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() == before


def test_a_graph_replays_across_a_redraw_with_another_lr(kernels):
    lr = torch.tensor(1e-2, device="cuda")
    ps, optimizer = model(kernels, lr=lr, capturable=True)
    twins, twin = model(kernels, lr=float(lr))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()  # captured, not run
    for i in range(7):
        rate = 1e-2 / (i + 1)
        lr.fill_(rate)
        twin.param_groups[0]["lr"] = float(lr)
        for p, q in zip(ps, twins, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        graph.replay()
        twin.step()
    torch.cuda.synchronize()
    for p, q in zip(ps, twins, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p]["step"] == twin.state[q]["step"] == 8


def test_a_record_waits_for_nothing_and_is_kept_by_a_graph(kernels):
    ps, optimizer = model(kernels, capturable=True)
    twins, twin = model(kernels)
    for own in (optimizer, twin):
        own.record_detail = True
        own.step()  # makes what the record is kept in
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    twin.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for factor in (9.0, 0.1, 30.0):
        for p, q in zip(ps, twins, strict=True):
            p.grad.mul_(factor)
            q.grad.mul_(factor)
        graph.replay()
        twin.step()
    told, expected = (list(own.stats(detail=True)["detail"].values()) for own in (optimizer, twin))
    assert told == expected
    assert any(0 < own["limited"] < 1 for own in told)


def test_a_side_stream_orders_the_step(kernels):
    ps, optimizer = model(kernels)
    twins, twin = model(kernels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**7)  # the gradients come late, on this stream
            for p in ps:
                p.grad.mul_(1.5)
            optimizer.step()
        for q in twins:
            q.grad.mul_(1.5)
        twin.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(ps, twins, strict=True))


def test_a_second_thread_steps_too(kernels):
    import threading

    ps, optimizer = model(kernels)
    twins, twin = model(kernels)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    thread.join()
    twin.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(ps, twins, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current(kernels):
    p = torch.nn.Parameter(torch.ones(40, 24, device="cuda:1"))
    optimizer = APOLLO([p], rank=8, backend=kernels)
    p.grad = torch.ones_like(p)
    with torch.cuda.device(0):
        optimizer.step()
        assert torch.cuda.current_device() == 0
    assert (p != 1).any()


def test_more_than_two_to_the_31_elements(kernels):
    """[2^16 + 8, 2^15] bf16: 4 GB of weights and of gradients; the last rows lie beyond 2^31."""
    shape = (2**16 + 8, 2**15)
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs 12 GB")
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-4:].normal_()
    tail = torch.nn.Parameter(torch.zeros(4, 2**15, dtype=torch.bfloat16, device="cuda"))
    tail.grad = p.grad[-4:].clone()
    keys = {"rank": 1, "proj_type": "right", "scale_type": "tensor", "backend": kernels}
    for x in (p, tail):
        APOLLO([x], **keys).step()
    assert not p[:-4].any()
    # The same channels under the same projection; sums over channels differ in their order.
    torch.testing.assert_close(p[-4:], tail, rtol=2**-7, atol=0)


def test_a_checkpoint_moves_to_the_cpu_and_back(backend):
    _, optimizer = train(torch.float32, "cuda", backend, CONFIGURATIONS["channel"])
    saved = optimizer.state_dict()
    ps = [torch.nn.Parameter(torch.zeros(s)) for s in SHAPES]
    other = APOLLO(ps, lr=1e-2, update_proj_gap=5, rank=8)
    other.load_state_dict(saved)
    for p, index in zip(ps, saved["state"], strict=True):
        assert torch.equal(other.state[p]["exp_avg"], saved["state"][index]["exp_avg"].cpu())
