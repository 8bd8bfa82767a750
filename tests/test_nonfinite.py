"""No NaN or Inf ever enters a weight, a moment or the limiter; GradScaler's contract."""

import pickle

import pytest
import torch
from helpers import changed, parameter, randn, snapshot

from apollo_kernels import APOLLO

BAD = [float("nan"), float("inf"), float("-inf"), 3e38]  # the last: finite, but its square is not


def make(backend, shape=(6, 4), dtype=torch.float32, steps=2, **options):
    p = parameter(shape, backend, dtype)
    optimizer = APOLLO([p], **{"lr": 0.1, "rank": 4, "weight_decay": 0.1, **options})
    for step in range(steps):
        p.grad = randn(shape, backend, dtype, seed=step + 1)
        optimizer.step()
    return p, optimizer


def of(optimizer):
    """The state and the weight of its one parameter, by name."""
    return {name: torch.as_tensor(value) for (_, name), value in snapshot(optimizer).items()}


def flagged(value, backend):
    return torch.tensor(value, device=backend.device)


@pytest.mark.parametrize("disable_nl", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_entry_keeps_weights_norm_and_its_channel_s_moments(
    backend, bad, scale_type, disable_nl
):
    p, optimizer = make(backend, scale_type=scale_type, disable_nl=disable_nl)
    p.grad = randn((6, 4), backend, seed=9)
    p.grad[2, 1] = bad
    before = of(optimizer)
    optimizer.step()
    after = of(optimizer)
    assert changed(before, after) == {"step", "exp_avg", "exp_avg_sq"}
    assert int(after["step"]) == 3
    for name in ("exp_avg", "exp_avg_sq"):
        rows = (before[name] != after[name]).all(1)  # channels are rows here
        assert torch.isfinite(after[name]).all()
        assert rows.tolist() == [i != 2 for i in range(6)]
    assert optimizer.stats()["nonfinite"] == 1


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_entry_of_a_wide_matrix_reaches_its_own_channel_alone(backend, bad, rank):
    """[24, 40]: channels are columns, and more than one tile of some kernels."""
    p, optimizer = make(backend, (24, 40), rank=rank, scale_type="tensor")
    p.grad = randn((24, 40), backend, seed=9)
    p.grad[3, 17] = bad
    before = of(optimizer)
    optimizer.step()
    after = of(optimizer)
    assert changed(before, after) == {"step", "exp_avg", "exp_avg_sq"}
    kept = (before["exp_avg_sq"] == after["exp_avg_sq"]).all(1).nonzero().flatten().tolist()
    assert kept == [17]


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
@pytest.mark.parametrize("bad", BAD)
def test_the_run_goes_on_after_a_bad_step(backend, bad, shape):
    p, optimizer = make(backend, shape)
    p.grad = torch.full_like(p, bad)
    optimizer.step()
    before = p.detach().clone()
    p.grad = randn(shape, backend, seed=9)
    optimizer.step()
    assert torch.isfinite(p).all() and not torch.equal(p, before)
    stats = optimizer.stats()
    assert (stats["parameters"], stats["updates"], stats["nonfinite"]) == (1, 3, 1)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_first_step_leaves_the_limiter_unset(backend, bad):
    p, optimizer = make(backend, steps=0)
    p.grad = torch.full_like(p, bad)
    optimizer.step()
    state = optimizer.state[p]
    assert float(state["update_norm"]) == 0 and int(state["step"]) == 1
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_dense_element_keeps_its_weight_and_moments(backend, bad):
    p, optimizer = make(backend, (5,))
    p.grad = randn((5,), backend, seed=9)
    p.grad[3] = bad
    before = of(optimizer)
    optimizer.step()
    after = of(optimizer)
    assert int(after["step"]) == 3
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert (before[name] == after[name]).tolist() == [False, False, False, True, False]
    assert optimizer.stats()["nonfinite"] == 1


def test_a_dense_parameter_counts_once_however_many_of_its_elements_are_bad(backend):
    """They lie in several tiles of the kernels, and in several passes of a tile; in each step."""
    p, optimizer = make(backend, (40_000,), steps=1)
    before = p.detach().clone()
    p.grad = torch.full_like(p, float("nan"))
    for step in (1, 2):
        optimizer.step()
        stats = optimizer.stats()
        assert (stats["updates"], stats["nonfinite"]) == (1, step)
    assert torch.equal(p, before)


def test_a_large_but_harmless_dense_gradient_counts_as_finite(backend):
    """Each square is finite though their sum is not: the fast test must not decide alone."""
    p, optimizer = make(backend, (8,), steps=0)
    p.grad = torch.full_like(p, 1.5e19)
    before = p.detach().clone()
    optimizer.step()
    assert (p != before).all() and torch.isfinite(p).all()
    assert optimizer.stats()["nonfinite"] == 0


def test_fp16_zero_rows_and_columns_are_no_nan(backend):
    p, optimizer = make(backend, dtype=torch.float16)
    p.grad = randn((6, 4), backend, torch.float16, seed=9)
    p.grad[1], p.grad[:, 2] = 0, 0
    optimizer.step()
    assert torch.isfinite(p).all() and optimizer.stats()["nonfinite"] == 0


# ---- GradScaler ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, options",
    [
        ((6, 4), {}),
        ((6, 4), {"rank": 1, "scale_type": "tensor"}),
        ((24, 16), {"rank": 8}),
        ((5,), {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("value", [float("inf"), 1.0])
def test_found_inf_skips_every_write(backend, shape, options, scale, value):
    """With a finite gradient too: it was another parameter's that was not."""
    p, optimizer = make(backend, shape, **options)
    before, counts = of(optimizer), optimizer.stats()
    optimizer.grad_scale = None if scale is None else flagged(scale, backend)
    optimizer.found_inf = flagged(1.0, backend)
    p.grad = torch.full_like(p, value)
    optimizer.step()
    assert changed(before, of(optimizer)) == set()
    assert optimizer.stats() == counts
    optimizer.found_inf = flagged(0.0, backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert "weight" in changed(before, of(optimizer))


def test_found_inf_skips_every_write_where_the_contracted_side_is_cut(backend):
    """There the moments are another kernel's."""
    options = {"proj_type": "right", "scale_type": "tensor"}
    _, optimizer = make(backend, (3, 4100), steps=1, **options)
    before, counts = of(optimizer), optimizer.stats()
    optimizer.grad_scale = flagged(1024.0, backend)
    optimizer.found_inf = flagged(1.0, backend)
    optimizer.step()
    assert changed(before, of(optimizer)) == set()
    assert optimizer.stats() == counts


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
def test_found_inf_at_the_first_step_leaves_the_state_as_before_any(backend, shape):
    p, optimizer = make(backend, shape, steps=0)
    before = p.detach().clone()
    optimizer.found_inf = flagged(1.0, backend)
    p.grad = randn(shape, backend)
    optimizer.step()
    assert torch.equal(p, before)
    assert all(not torch.as_tensor(v).any() for k, v in optimizer.state[p].items() if k != "seed")


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape, rank", [((6, 4), 4), ((4, 6), 4), ((24, 16), 8), ((5,), 4)])
def test_grad_scale_equals_the_unscaled_gradient(backend, shape, rank, maximize):
    """A power of two divides exactly, so the bits are equal; p.grad itself stays as it is."""
    p, optimizer = make(backend, shape, rank=rank, maximize=maximize)
    q, other = make(backend, shape, rank=rank, maximize=maximize)
    for step in range(3):
        g = randn(shape, backend, seed=step + 9)
        p.grad, q.grad = g * 1024, g.clone()
        optimizer.grad_scale, optimizer.found_inf = flagged(1024.0, backend), flagged(0.0, backend)
        optimizer.step()
        other.step()
        assert torch.equal(p.grad, g * 1024)
        # s is the same bit for bit; its product with the scaled gradient may round differently
        assert changed(of(optimizer), of(other)) <= {"weight"}
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [None, False, True])
def test_a_grad_scaler_leaves_its_scale_to_the_step_if_fused(backend, fused):
    """As with torch's own optimizers; else p.grad is unscaled for whoever clips it before the step
    (Lightning's mixed precision refuses to clip what the step unscales)."""
    p, optimizer = make(backend, (6, 4), fused=fused)
    model = torch.nn.Parameter(torch.zeros(5, device=backend.device))
    theirs = torch.optim.AdamW([model], fused=fused)
    ours = getattr(optimizer, "_step_supports_amp_scaling", False)
    assert ours == getattr(theirs, "_step_supports_amp_scaling", False) == bool(fused)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0**10)
    optimizer.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert float(p.grad[0, 0]) == (1024.0 if fused else 1.0)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    copied = pickle.loads(pickle.dumps(optimizer))
    assert copied._step_supports_amp_scaling == bool(fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_end_to_end(backend, unscale, fused):
    model = torch.nn.Linear(8, 4, device=backend.device)
    twin = torch.nn.Linear(8, 4, device=backend.device)
    twin.load_state_dict(model.state_dict())
    options = {"lr": 0.01, "rank": 4}
    optimizer = APOLLO(model.parameters(), fused=fused, **options)
    plain = APOLLO(twin.parameters(), **options)
    scaler = torch.amp.GradScaler(backend.device.type, init_scale=2.0**10, growth_interval=3)
    for step in range(8):
        x = randn((16, 8), backend, seed=step)
        if step == 4:
            x[0, 0] = float("inf")
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            continue  # the scaler must have skipped it
        plain.zero_grad()
        twin(x).square().mean().backward()
        plain.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)
    assert int(optimizer.state[model.weight]["step"]) == 7
    assert optimizer.stats()["nonfinite"] == 0
