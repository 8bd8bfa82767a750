"""No NaN or Inf ever enters a weight, a moment or the limiter; GradScaler's contract."""

import pytest
import torch

from apollo_kernels import APOLLO

BAD = [float("nan"), float("inf"), float("-inf"), 3e38]  # the last: finite, but its square is not


def make(shape=(6, 4), dtype=torch.float32, steps=2, **options):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    optimizer = APOLLO([p], **{"lr": 0.1, "rank": 4, "weight_decay": 0.1, **options})
    for _ in range(steps):
        p.grad = torch.randn(shape).to(dtype)
        optimizer.step()
    return p, optimizer


def snapshot(p, optimizer):
    state = optimizer.state[p].items()
    return {"weight": p.detach().clone(), **{k: torch.as_tensor(v).clone() for k, v in state}}


def changed(before, after):
    return {k for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize("disable_nl", [False, True])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_entry_keeps_weights_norm_and_its_channel_s_moments(bad, scale_type, disable_nl):
    p, optimizer = make(scale_type=scale_type, disable_nl=disable_nl)
    p.grad = torch.randn(6, 4)
    p.grad[2, 1] = bad
    before = snapshot(p, optimizer)
    optimizer.step()
    after = snapshot(p, optimizer)
    assert changed(before, after) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(after["step"]) == 3
    for name in ("exp_avg", "exp_avg_sq"):
        rows = (before[name] != after[name]).all(1)  # channels are rows here
        assert torch.isfinite(after[name]).all()
        assert rows.tolist() == [i != 2 for i in range(6)]
    assert optimizer.stats()["nonfinite"] == 1


@pytest.mark.parametrize("bad", BAD)
def test_the_run_goes_on_after_a_bad_step(bad):
    p, optimizer = make()
    p.grad = torch.full((6, 4), bad)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.randn(6, 4)
    optimizer.step()
    assert torch.isfinite(p).all() and not torch.equal(p, before)
    stats = optimizer.stats()
    assert (stats["parameters"], stats["updates"], stats["nonfinite"]) == (1, 3, 1)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_first_step_leaves_the_limiter_unset(bad):
    p, optimizer = make(steps=0)
    p.grad = torch.full((6, 4), bad)
    optimizer.step()
    state = optimizer.state[p]
    assert float(state["update_norm"]) == 0 and float(state["step"]) == 1
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_dense_element_keeps_its_weight_and_moments(bad):
    p, optimizer = make((5,))
    p.grad = torch.randn(5)
    p.grad[3] = bad
    before = snapshot(p, optimizer)
    optimizer.step()
    after = snapshot(p, optimizer)
    assert float(after["step"]) == 3
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert (before[name] == after[name]).tolist() == [False, False, False, True, False]
    assert optimizer.stats()["nonfinite"] == 1


def test_a_large_but_harmless_dense_gradient_counts_as_finite():
    """Each square is finite though their sum is not: the fast test must not decide alone."""
    p, optimizer = make((8,), steps=0)
    p.grad = torch.full((8,), 1.5e19)
    before = p.detach().clone()
    optimizer.step()
    assert (p != before).all() and torch.isfinite(p).all()
    assert optimizer.stats()["nonfinite"] == 0


def test_fp16_zero_rows_and_columns_are_no_nan():
    p, optimizer = make(dtype=torch.float16)
    p.grad = torch.randn(6, 4).half()
    p.grad[1], p.grad[:, 2] = 0, 0
    optimizer.step()
    assert torch.isfinite(p).all() and optimizer.stats()["nonfinite"] == 0


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_found_inf_skips_every_write(shape, scale):
    p, optimizer = make(shape)
    before = snapshot(p, optimizer)
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.found_inf = torch.tensor(1.0)
    p.grad = torch.full(shape, float("inf"))
    optimizer.step()
    assert changed(before, snapshot(p, optimizer)) == set()
    optimizer.found_inf = torch.tensor(0.0)
    p.grad = torch.ones(shape)
    optimizer.step()
    assert "weight" in changed(before, snapshot(p, optimizer))


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5,)])
def test_grad_scale_equals_the_unscaled_gradient(shape, maximize):
    """A power of two divides exactly, so the bits are equal; p.grad itself stays as it is."""
    p, optimizer = make(shape, maximize=maximize)
    q, other = make(shape, maximize=maximize)
    for _ in range(5):
        g = torch.randn(shape)
        p.grad, q.grad = g * 1024, g.clone()
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        optimizer.step()
        other.step()
        assert torch.equal(p.grad, g * 1024)
        left, right = snapshot(p, optimizer), snapshot(q, other)
        # s is the same bit for bit; its product with the scaled gradient may round differently
        assert changed(left, right) <= {"weight"}
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_end_to_end(unscale):
    model = torch.nn.Linear(8, 4)
    twin = torch.nn.Linear(8, 4)
    twin.load_state_dict(model.state_dict())
    options = {"lr": 0.01, "rank": 4}
    optimizer, plain = APOLLO(model.parameters(), **options), APOLLO(twin.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for step in range(8):
        x = torch.randn(16, 8)
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
    assert float(optimizer.state[model.weight]["step"]) == 7
    assert optimizer.stats()["nonfinite"] == 0
