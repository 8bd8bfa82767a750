"""``max_grad_norm`` does what clip_grad_norm_ over all parameters and a plain step would do."""

import emulated
import pytest
import torch
from conftest import emulated_module, running
from helpers import (
    all_of,
    changed,
    fill,
    in_place,
    parameter,
    parameters,
    randn,
    snapshot,
    train,
)

from apollo_kernels import APOLLO

SHAPES = [(24, 16), (16, 24), (9,), (6, 4, 3), ()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "APOLLO": {"rank": 8},
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "signs": {"rank": 4, "proj": "rademacher", "proj_type": "reverse_std"},
    "dense": {"rank": None},
    "every switch": {
        "rank": 8, "maximize": True, "scale_front": True, "scale": 4.0, "correct_bias": False,
        "weight_decay": 0.1,
    },
}  # fmt: skip


def pair(backend, dtype=torch.float32, shapes=SHAPES, max_norm=1.0, **options):
    """The same parameters under an optimizer that clips, and under one that does not."""
    named = {"lr": 0.1, "update_proj_gap": 2, **options}
    ours, theirs = parameters(shapes, backend, dtype), parameters(shapes, backend, dtype)
    return APOLLO(ours, max_grad_norm=max_norm, **named), APOLLO(theirs, **named)


def clipped_step(optimizer, max_norm):
    """The two steps that ``max_grad_norm`` stands for. Gradients are clipped in float64, so that
    nothing is rounded before the step: the one that is tested does not touch them either."""
    params = [p for p in all_of(optimizer) if p.grad is not None]
    copies = [torch.nn.Parameter(torch.zeros_like(p, dtype=torch.float64)) for p in params]
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.double()
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
    for p, q in zip(params, copies, strict=True):
        p.grad = q.grad.to(p.dtype)
    optimizer.step()
    return norm


def close(a, b, dtype, steps):
    """Weights and state of two optimizers. One rounds the clipped gradient to its dtype, the other
    multiplies sums by the factor: that is one unit of the dtype in each gradient, and one of the
    stored weight, in every step. Float32 sums err by 1e-6, and s by as much again;
    in float64 the factor remains a float32 number, and q is multiplied by its square."""
    eps = torch.finfo(dtype).eps
    rtol = 3e-7 if dtype == torch.float64 else max(2e-5, 2 * eps)
    for (key, x), (other, y) in zip(snapshot(a).items(), snapshot(b).items(), strict=True):
        assert key == other
        if key[1] in ("seed", "step"):
            assert x == y, key
            continue
        largest = float(y.abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(
            x.double(), y.double(), rtol=0, atol=steps * rtol * max(largest, 1e-30), msg=str(key)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_clip_grad_norm_and_a_plain_step(backend, options, dtype):
    ours, theirs = pair(backend, dtype, **options)
    for step, factor in enumerate((1.0, 1e-3, 30.0)):  # clipped, not clipped, clipped much
        for optimizer in (ours, theirs):
            fill(all_of(optimizer), backend, step, factor)
        before = [p.grad.clone() for p in all_of(ours)]
        norm = clipped_step(theirs, 1.0)
        ours.step()
        # the norm is a sum of float32 squares, and float16 and bf16 are summed as they are
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
        assert all(torch.equal(p.grad, g) for p, g in zip(all_of(ours), before, strict=True))
    close(ours, theirs, dtype, steps=3)
    assert ours.stats() == theirs.stats()


def test_a_norm_below_the_limit_changes_no_bit(backend):
    """Then the factor is 1."""
    ours, theirs = pair(backend, max_norm=1e6, rank=8)
    for step in range(3):
        for optimizer in (ours, theirs):
            fill(all_of(optimizer), backend, step)
            optimizer.step()
    for (key, x), (_, y) in zip(snapshot(ours).items(), snapshot(theirs).items(), strict=True):
        # moments may be formed by another kernel, which reads R from memory
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-8, msg=str(key))


def test_one_norm_is_taken_over_all_groups(backend):
    """Low-rank, dense, of several dtypes; a parameter without a gradient has no share."""

    def make(**options):
        params = parameters(SHAPES, backend)
        params[1].data = params[1].data.bfloat16()
        params.append(parameter((12, 4), backend, torch.float64))
        groups = [
            {"params": params[:1], "rank": 8},
            {"params": params[1:3], "rank": 1, "scale_type": "tensor", "scale": 16.0},
            {"params": params[3:], "rank": None, "lr": 0.01},
        ]
        fill(params, backend)
        params[4].grad = None
        return APOLLO(groups, lr=0.1, **options)

    ours, theirs = make(max_grad_norm=0.5), make()
    ours.step()
    norm = clipped_step(theirs, 0.5)
    close(ours, theirs, torch.bfloat16, steps=1)
    assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    assert all_of(ours)[4] not in ours.state


@pytest.mark.parametrize("shape", [(24, 16), (9,)])
def test_grad_norm_is_a_number_on_the_device_and_nobody_waits_for_it(backend, shape):
    p = parameter(shape, backend)
    optimizer = APOLLO([p], rank=8, max_grad_norm=1.0)
    fill([p], backend)
    optimizer.step()
    norm = optimizer.grad_norm
    assert isinstance(norm, torch.Tensor)
    assert norm.shape == () and norm.device.type == backend.device.type
    assert norm.is_floating_point()
    assert float(norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-5)


def test_no_operation_of_pytorch_reads_a_low_rank_gradient(backend):
    """Their squares come from ``project``, which reads them anyway; a dense one is read once."""
    if backend.name == "torch" or backend.interpreted:
        pytest.skip("PyTorch computes the step here")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            flat, _ = torch.utils._pytree.tree_flatten(args)
            seen.extend(t.data_ptr() for t in flat if isinstance(t, torch.Tensor))
            return function(*args, **(kwargs or {}))

    seen = []
    params = parameters([(24, 16), (3, 8, 6), (9,)], backend)
    groups = [{"params": params[:1]}, {"params": params[1:2], "batch_dims": 1}]
    optimizer = APOLLO([*groups, {"params": params[2:]}], rank=8, max_grad_norm=1.0)
    fill(params, backend)
    optimizer.step()
    with Reads():
        optimizer.step()
    assert [seen.count(p.grad.data_ptr()) for p in params[:2]] == [0, 0]
    assert seen.count(params[2].grad.data_ptr()) <= 1


def test_the_norm_that_is_reported_is_the_last_steps(backend):
    p = parameter((24, 16), backend)
    optimizer = APOLLO([p], rank=8, max_grad_norm=1.0)
    for step in range(3):
        fill([p], backend, step, factor=step + 1.0)
        optimizer.step()
        assert float(optimizer.grad_norm) == pytest.approx(float(p.grad.double().norm()), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 2])
def test_a_norm_that_is_not_finite_leaves_everything_but_the_step(backend, bad, where):
    optimizer, _ = pair(backend, rank=8)
    params = all_of(optimizer)
    fill(params, backend)
    optimizer.step()
    fill(params, backend, 1)
    params[where].grad.view(-1)[3] = bad
    before, stats = snapshot(optimizer), optimizer.stats()
    optimizer.step()
    assert changed(before, snapshot(optimizer)) == {(i, "step") for i in range(len(params))}
    assert all(int(optimizer.state[p]["step"]) == 2 for p in params)
    assert not torch.isfinite(optimizer.grad_norm)
    after = optimizer.stats()
    assert after["nonfinite"] == stats["nonfinite"] + len(params)
    assert after["updates"] == stats["updates"]
    fill(params, backend, 2)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert optimizer.stats()["updates"] == stats["updates"] + len(params)


@pytest.mark.parametrize("rank", [1, 8])
def test_gradients_whose_norm_float32_cannot_hold_are_clipped_all_the_same(backend, rank):
    """Each channel's squared norm fits into float32, and they are added up in float64."""
    shape = (600, 16)
    p, q = parameter(shape, backend), parameter(shape, backend)
    options = {"lr": 0.1, "rank": rank, "scale_type": "tensor"}
    ours, theirs = APOLLO([p], max_grad_norm=1.0, **options), APOLLO([q], **options)
    size = 5e17  # 16 squares are 4e36, and 600 times that overflows; no R^2 does
    p.grad = size * randn(shape, backend).sign()
    q.grad = in_place(p.grad)
    norm = clipped_step(theirs, 1.0)
    ours.step()
    assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-4)
    close(ours, theirs, torch.float32, steps=5)
    assert ours.stats()["nonfinite"] == 0


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("rank", [4, 8])
def test_a_clip_whose_square_vanishes_in_float32_is_no_zero(backend, rank, scale_type):
    """q is near the largest float32 and clip is 1e-27: s^2 clip^2 q is far from 0, though float32
    holds neither clip^2 nor s^2 clip^2."""
    named = {"shapes": [(24, 16)], "rank": rank, "scale_type": scale_type, "max_norm": 4e-8}
    ours, theirs = pair(backend, **named)
    for step in range(2):
        for optimizer in (ours, theirs):
            fill(all_of(optimizer), backend, step, factor=2e18)
        clipped_step(theirs, 4e-8)
        ours.step()
    close(ours, theirs, torch.float32, steps=2)
    assert float(ours.state[all_of(ours)[0]]["update_norm"]) > 1e-5


@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 1, "scale_type": "tensor"}], ids=str)
def test_it_clips_what_grad_scaler_would_have_unscaled(backend, options):
    """The norm is that of the gradient divided by the scale, and so is the factor."""
    ours, theirs = pair(backend, **options)
    for step in range(3):
        for optimizer in (ours, theirs):
            fill(all_of(optimizer), backend, step)
        norm = clipped_step(theirs, 1.0)
        for p in all_of(ours):
            p.grad.mul_(1024.0)
        ours.grad_scale = torch.tensor(1024.0, device=backend.device)
        ours.found_inf = torch.tensor(0.0, device=backend.device)
        ours.step()
        assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    close(ours, theirs, torch.float32, steps=3)


def test_a_found_inf_skips_every_write_of_a_clipped_step(backend):
    optimizer, _ = pair(backend, rank=8)
    params = all_of(optimizer)
    fill(params, backend)
    optimizer.step()
    before, stats = snapshot(optimizer), optimizer.stats()
    optimizer.grad_scale = torch.tensor(2.0, device=backend.device)
    optimizer.found_inf = torch.tensor(1.0, device=backend.device)
    optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()
    assert optimizer.stats() == stats


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_end_to_end(backend, unscale, fused):
    """As in torch's own recipe, with and without ``unscale_`` before the step."""
    if backend.device.type != "cpu":
        pytest.skip("the scaler's part is the same on every device")
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    twin.load_state_dict(model.state_dict())
    options = {"lr": 0.01, "rank": 4}
    optimizer = APOLLO(model.parameters(), max_grad_norm=0.1, fused=fused, **options)
    plain = APOLLO(twin.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(5):
        x = torch.randn(16, 8)
        if step == 3:
            x[0, 0] = float("inf")
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            continue  # the scaler has skipped it
        plain.zero_grad()
        twin(x).square().mean().backward()
        clipped_step(plain, 0.1)
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert int(optimizer.state[model.weight]["step"]) == 4


def test_a_step_without_a_limit_has_no_norm(backend):
    p = parameter((24, 16), backend)
    optimizer = APOLLO([p], rank=8)
    fill([p], backend)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_expert_matrices_and_copies_count_in_the_norm(backend):
    """An expert weight, a gradient of odd strides, an empty one: all have their share, once."""

    def make(**options):
        params = parameters([(3, 8, 6), (12, 10), (0, 4), (5,)], backend)
        groups = [{"params": params[:1], "batch_dims": 1}, {"params": params[1:]}]
        fill(params, backend)
        params[1].grad = randn((24, 20), backend, seed=5)[::2, ::2]
        return APOLLO(groups, rank=4, lr=0.1, **options)

    ours, theirs = make(max_grad_norm=0.5), make()
    ours.step()
    norm = clipped_step(theirs, 0.5)
    assert float(ours.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    close(ours, theirs, torch.float32, steps=1)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "1"])
def test_a_limit_that_cannot_be_meant_is_refused(value):
    with pytest.raises(ValueError, match="max_grad_norm must be"):
        APOLLO([torch.nn.Parameter(torch.zeros(2))], max_grad_norm=value)


def test_a_limit_belongs_to_the_optimizer_and_not_to_a_group():
    with pytest.raises(ValueError, match="unknown key 'max_grad_norm'"):
        APOLLO([{"params": [torch.nn.Parameter(torch.zeros(2))], "max_grad_norm": 1.0}])


@pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))
@pytest.mark.parametrize("shape", [(256, 64), (64, 256)])
@pytest.mark.parametrize("rank", [1, 8])
def test_the_norm_costs_no_read_and_no_launch_more(shape, rank):
    """The emulated device counts: a low-rank gradient is read by project and by apply, no more."""
    counted = {}
    with running("cuda") as backend:
        module = emulated_module()
        for limit in (None, 1.0):
            p = parameter(shape, backend)
            optimizer = APOLLO([p], rank=rank, scale_type="tensor", max_grad_norm=limit)
            train([p], optimizer, backend, range(1))
            fill([p], backend, 1)
            module.watch(p.grad.data_ptr(), p.grad.numel() * p.grad.element_size())
            before = module.launches()
            optimizer.step()
            counted[limit] = module.launches() - before, module.watched_bytes()
    assert counted[None] == counted[1.0] == (3, 2 * 4 * 256 * 64)
