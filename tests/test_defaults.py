"""The defaults that a program sets for new tensors, and autocast, do not reach into a step."""

import contextlib

import pytest
import torch
from helpers import all_of, changed, fill, parameters, snapshot

from apollo_kernels import APOLLO, load_apollo_torch, projection_matrix

SHAPES = [(24, 16), (16, 24), (9,), ()]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "dtype float16": lambda: default_dtype(torch.float16),
    "dtype float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: default_device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
if torch.cuda.is_available():
    SETTINGS["device cuda"] = lambda: default_device("cuda")
    SETTINGS["autocast cuda"] = lambda: torch.autocast("cuda", torch.bfloat16)


def run(setting, backend, dtype, **options):
    """Everything that an optimizer does, within ``setting``; the tensors of the model are given."""
    params = parameters(SHAPES, backend, dtype)
    twins = parameters(SHAPES, backend, dtype)
    for p in (*params, *twins):
        p.grad = torch.zeros_like(p)
    options = {"rank": 8, "lr": 0.1, "update_proj_gap": 2, "weight_decay": 0.1, **options}
    with setting():
        optimizer = APOLLO(params, **options)
    for step in range(3):
        fill(params, backend, step)
        with setting():
            optimizer.step()
    with setting():
        loaded = APOLLO(twins, **options)
        loaded.load_state_dict(optimizer.state_dict())
        stats = optimizer.stats()
        optimizer.memory_report()
    fill(twins, backend, 3)
    with setting():
        loaded.step()
    found = {("first", *key): value for key, value in snapshot(optimizer).items()}
    found |= {("loaded", *key): value for key, value in snapshot(loaded).items()}
    return found, stats


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "scale_type": "tensor", "stochastic_rounding": True}], ids=str
)
def test_a_setting_for_new_tensors_changes_nothing(backend, setting, dtype, options):
    if backend.interpreted and bool(options) != (dtype == torch.bfloat16):
        pytest.skip("seconds in Triton's interpreter: each dtype and each option once")
    plain, stats = run(contextlib.nullcontext, backend, dtype, **options)
    found, its_stats = run(setting, backend, dtype, **options)
    assert changed(plain, found) == set()
    assert stats == its_stats


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_clipping_within_a_setting_changes_nothing(backend, setting):
    options = {"max_grad_norm": 0.5}
    plain, stats = run(contextlib.nullcontext, backend, torch.float32, **options)
    found, its_stats = run(setting, backend, torch.float32, **options)
    assert changed(plain, found) == set()
    assert stats == its_stats


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_large_bf16_matrix_of_rank_one_is_projected_right(setting):
    """[300, 200] in bf16: the compiled passes of the processor, where it has them."""
    from conftest import Backend

    cpu = Backend("torch", torch.device("cpu"))
    results = []
    for within in (contextlib.nullcontext, setting):
        params = parameters([(300, 200)], cpu, torch.bfloat16)
        optimizer = APOLLO(params, rank=1, scale_type="tensor", lr=0.1, backend="torch")
        for step in range(2):
            fill(params, cpu, step)
            with within():
                optimizer.step()
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_published_checkpoint_within_a_setting_loads_as_it_is(backend, setting):
    """A count of 1001 steps is no bf16 number."""
    params = parameters([(12, 8), (5,)], backend)
    moments = {name: torch.ones(12, 4) for name in ("exp_avg", "exp_avg_sq")}
    state = {0: {"step": 1001, "projector": object(), "scaled_grad": torch.ones(()), **moments}}
    state[1] = {"step": 1001, **{name: torch.ones(5) for name in moments}}
    low = {"rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0, "proj_type": "std"}
    groups = [{"params": [0], "lr": 0.02, **low}, {"params": [1], "lr": 0.02}]
    with setting():
        optimizer = APOLLO([{"params": params[:1], "rank": 4}, {"params": params[1:]}])
        load_apollo_torch(optimizer, {"state": state, "param_groups": groups})
    for p in all_of(optimizer):
        assert int(optimizer.state[p]["step"]) == 1001
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        assert optimizer.state[p]["exp_avg"].device == p.device


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_projection_drawn_within_a_setting_is_the_same(setting):
    plain = projection_matrix(7, 1, 3, 40)
    with setting():
        found = projection_matrix(7, 1, 3, 40)
    assert found.device == plain.device and torch.equal(found, plain)
