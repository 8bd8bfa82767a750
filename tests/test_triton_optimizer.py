"""The whole optimizer on the Triton back end, interpreted: the promises that PyTorch's keeps.

Everything in test_nonfinite.py runs here once more, and what of test_checkpoint.py takes steps.
"""

import pytest
import torch

triton = pytest.importorskip("triton")

if not triton.knobs.runtime.interpret:
    pytest.skip("with a GPU, tests/test_gpu.py runs the kernels", allow_module_level=True)

from test_checkpoint import (  # noqa: F401
    test_a_resumed_run_continues_bit_for_bit,
    test_deepcopy_and_pickle_continue_bit_for_bit,
    test_loaded_state_keeps_its_dtypes_and_values,
    through_file,
)
from test_nonfinite import *  # noqa: F403
from test_operators import run
from test_rule import (  # noqa: F401
    check_run,
    test_a_tiny_weight_decay_is_not_lost,
    test_a_zero_first_gradient_does_not_freeze_the_parameter,
    test_limiter_flags_are_honoured_as_group_keys,
    test_scale_front_puts_alpha_into_the_stored_norm,
)

from apollo_kernels import APOLLO, ops
from apollo_kernels.triton_kernels import step

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # NumPy's, of overflows on purpose


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Every step goes to the Triton back end; a test that made none of them has tested nothing."""
    taken = []
    for name in ("step_low_rank", "step_dense"):
        original = getattr(step, name)
        monkeypatch.setattr(step, name, lambda *a, f=original: taken.append(f) or f(*a))
    monkeypatch.setenv(ops.ENVIRONMENT, "triton")
    yield taken
    assert taken


CONFIGURATIONS = {
    "channel": dict(rank=4, proj_type="std", scale_type="channel", distribution="rademacher"),
    "Mini": dict(rank=1, proj_type="std", scale_type="tensor", distribution="gaussian"),
    "left": dict(rank=6, proj_type="left", scale_type="tensor", distribution="rademacher"),
    "reverse": dict(rank=5, proj_type="reverse_std", scale_type="channel", distribution="gaussian"),
}


@pytest.mark.filterwarnings("ignore:rank .* is clamped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_rule_over_redraws(config, dtype):
    """Against the independent restatement, with its own z: test_rule.py has the tolerances."""
    common = dict(scale=2.0, weight_decay=0.1, scale_front=False, disable_nl=False)
    check_run({**config, **common, "correct_bias": True, "update_proj_gap": 5}, dtype, steps=12)


SHAPES = [(24, 16), (16, 24), (9, 130), (7,), (3, 2, 4)]
GROUPS = {
    "channel": dict(rank=8, weight_decay=0.01),
    "signs": dict(rank=4, proj="rademacher", scale_front=True),
    "Mini": dict(rank=1, scale_type="tensor", scale=128.0),
}


def model(dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def train(params, optimizer, steps):
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        optimizer.step()


def make(params, backend, keys):
    return APOLLO(params, lr=0.01, update_proj_gap=8, backend=backend, **keys)


def errors(params, exact):
    return [float((p.detach().double() - e.detach()).abs().max()) for p, e in zip(params, exact)]  # noqa: B905


@pytest.mark.filterwarnings("ignore:rank .* is clamped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", GROUPS.values(), ids=GROUPS)
def test_a_run_that_moves_between_back_ends_errs_no_more_than_one_that_stays(keys, dtype):
    """PyTorch, Triton, PyTorch, Triton, across redraws: as near to float64 as PyTorch alone."""
    exact, plain, moving = model(torch.float64), model(dtype), model(dtype)
    with torch.no_grad():
        for e, p in zip(exact, plain, strict=True):
            e.copy_(p)
    train(exact, make(exact, "torch", keys), range(24))
    train(plain, make(plain, "torch", keys), range(24))
    saved = None
    for begin, backend in ((0, "torch"), (5, "triton"), (11, "torch"), (17, "triton")):
        optimizer = make(moving, backend, keys)
        if saved is not None:
            optimizer.load_state_dict(through_file(saved))
        train(moving, optimizer, range(begin, {0: 5, 5: 11, 11: 17, 17: 24}[begin]))
        saved = optimizer.state_dict()
    for mine, theirs, e in zip(errors(moving, exact), errors(plain, exact), exact, strict=True):
        # the floor: one rounding of the largest weight, which the plain run may have escaped
        assert mine <= 2 * theirs + 4 * torch.finfo(dtype).eps * float(e.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_launches_repeat_while_nothing_moves(dtype, steps):
    """With another lr, across a redraw; float64 goes around the kernels and is never repeated."""
    results, calls = [], []
    for moved in (False, True):
        del steps[:]
        torch.manual_seed(1)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in [(16, 8), (8, 20), (9,)]]
        optimizer = APOLLO(params, rank=4, update_proj_gap=3)
        for number in range(7):
            optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
            for p in params:
                g = torch.randn_like(p)
                p.grad = g if moved or p.grad is None else p.grad.copy_(g)
            optimizer.step()
        results.append([p.detach() for p in params])
        calls.append(len(steps))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert calls == [2 if dtype == torch.float32 else 14, 14]  # a low-rank and a dense batch


@pytest.mark.filterwarnings("ignore:rank .* is clamped")
def test_a_compiled_step_is_exact():
    (compiled, a), (eager, b) = (run("triton", flag) for flag in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))
    assert a.stats() == b.stats()


def test_a_converted_layout_is_written_back():
    """A channels_last weight is no matrix in memory; its gradient and weight go through copies."""
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout))
        optimizer = make([p], "triton", dict(rank=4))
        for _ in range(3):
            p.grad = torch.randn(6, 4, 3, 3).to(memory_format=layout)
            optimizer.step()
        weights.append(p.detach())
    assert torch.equal(*weights)
