"""What a user of torch.optim expects of any optimizer."""

import warnings

import pytest
import torch
from helpers import randn
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput

from apollo_kernels import APOLLO, APOLLOAdamW

SHAPES = {
    "matrix": (6, 4),
    "vector": (5,),
    "scalar": (),
    "convolution": (4, 3, 2, 2),
    "empty": (0, 8),
    "empty columns": (8, 0),
    "row": (1, 8),
}


def fill(params, seed=0):
    for i, p in enumerate(params):
        p.grad = torch.empty_like(p, memory_format=torch.contiguous_format)
        p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 100 + i)))


def steps(optimizer, params, count=3, start=0):
    for i in range(start, start + count):
        fill(params, i)
        optimizer.step()


@pytest.fixture
def parameter(backend):
    """Makes parameters on the back end's device; all of one shape are equal."""

    def make(shape=(6, 4), dtype=torch.float32):
        return torch.nn.Parameter(randn(shape, backend, dtype))

    return make


@pytest.fixture
def pair(parameter):
    """Makes two equal parameters under two equal optimizers."""

    def make(**options):
        params = parameter(), parameter()
        return params, [APOLLO([p], **{"lr": 0.1, "rank": 4, **options}) for p in params]

    return make


# ---- torch's own table of optimizer inputs -----------------------------------------------------


def inputs(device=None):
    return [
        OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs))
        for kwargs in (
            {},
            {"lr": 0.01},
            {"lr": torch.tensor(0.001)},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "maximize": True},
            {"rank": 4, "scale": 2.0},
            {"rank": 1, "scale_type": "tensor", "scale": 128.0},
            {"rank": 4, "disable_nl": True, "correct_bias": False},
            {"rank": 4, "proj": "rademacher", "scale_front": True, "update_proj_gap": 2},
        )
    ]


INFO = OptimizerInfo(
    APOLLO, optim_inputs_func=inputs, supported_impls=(), only_supports_sparse_grads=False
)
EACH_INPUT = pytest.mark.parametrize("given", INFO.optim_inputs_func(device="cpu"), ids=str)


@EACH_INPUT
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduler", [False, True])
def test_the_loss_goes_down(backend, given, contiguous, scheduler):
    """torch's test_forloop_goes_right_direction."""
    weight = randn((10, 5, 2), backend)
    weight = torch.nn.Parameter(weight[..., 0] if not contiguous else weight[..., 0].contiguous())
    bias = torch.nn.Parameter(randn((10,), backend, seed=1))
    x = randn((5,), backend, seed=2)
    optimizer = INFO.optim_cls([weight, bias], **given.kwargs)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99) if scheduler else None

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        return loss

    sign = -1 if given.kwargs.get("maximize") else 1
    first = closure().item()
    for _ in range(6 if backend.interpreted else 20):
        optimizer.step(closure)
        if plan:
            plan.step()
    assert sign * closure().item() < sign * first


@EACH_INPUT
def test_state_dict_round_trip_in_mid_run(parameter, given):
    """torch's test_state_dict_deterministic, with weights_only."""
    (p, q) = params = parameter(), parameter()
    optimizer, other = (APOLLO([x], **given.kwargs) for x in params)
    steps(optimizer, [p], 3)
    q.data.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    steps(optimizer, [p], 3, 3)
    steps(other, [q], 3, 3)
    assert torch.equal(p, q)


@EACH_INPUT
def test_a_step_without_gradients_changes_nothing(parameter, given):
    p = parameter()
    optimizer = APOLLO([p], **given.kwargs)
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


@EACH_INPUT
def test_zero_gradients_without_decay_change_no_weight(parameter, given):
    p = parameter()
    optimizer = APOLLO([p], **{**given.kwargs, "weight_decay": 0.0})
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


def test_a_step_made_by_a_checkpoint_loader_is_harmless(parameter):
    """torch.distributed.checkpoint makes state by a step with lr 0 and zero gradients."""
    p = parameter()
    optimizer = APOLLO([p], lr=0.0, rank=4, weight_decay=0.1)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    assert torch.equal(p, before) and float(state["step"]) == 1
    assert not any(state[k].any() for k in ("exp_avg", "exp_avg_sq", "update_norm"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("proj_type", ["std", "left"])
def test_a_derived_run_of_torch_s_own_suite(parameter, dtype, proj_type):
    """torch's _test_derived_optimizers: gradients that go missing, layers that freeze, an empty
    tensor last; memory order must not matter, so the twin holds everything transposed."""
    params = [parameter(s, dtype) for s in ((8, 6), (6, 8), (3,), (0, 8))]
    twins = [
        torch.nn.Parameter(p.detach().t().contiguous().t() if p.dim() == 2 else p.detach().clone())
        for p in params
    ]
    runs = [APOLLO(x, lr=0.01, rank=4, proj_type=proj_type) for x in (params, twins)]
    # a sum in another order may round a weight to the other neighbour, once a step
    close = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 1e-6}
    for i in range(7):
        for run, group in zip(runs, (params, twins), strict=True):
            fill(group, i)
            if group is twins:
                for p in group[:2]:
                    p.grad = p.grad.t().contiguous().t()
            if i == 2:
                group[0].grad = None
            if 3 <= i < 5:
                group[1].grad = None
            run.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, **close)
            states = runs[0].state[p], runs[1].state[q]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                torch.testing.assert_close(value, states[1][key], rtol=1e-5, atol=1e-6)
    assert float(runs[0].state[params[0]]["step"]) == 6
    assert float(runs[0].state[params[1]]["step"]) == 5
    assert float(runs[0].state[params[3]]["step"]) == 7


# ---- step --------------------------------------------------------------------------------------


def test_closure_runs_with_gradients_and_its_loss_is_returned(parameter):
    p = parameter()
    optimizer = APOLLO([p], rank=4)

    def closure():
        assert torch.is_grad_enabled()
        loss = (p**2).sum()
        loss.backward()
        return loss

    expected = (p.detach() ** 2).sum()
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected.item()


def test_maximize_is_minimizing_the_negative(pair):
    (p, q), _ = pair()
    up, down = APOLLO([p], rank=4, maximize=True), APOLLO([q], rank=4)
    for i in range(5):
        fill([p], i)
        q.grad = -p.grad
        up.step()
        down.step()
    assert torch.equal(p, q)
    assert torch.equal(up.state[p]["exp_avg"], down.state[q]["exp_avg"])


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": None}])
def test_a_tensor_lr_equals_a_float_lr(pair, options):
    (p, q), _ = pair()
    a = APOLLO([p], lr=0.25, **options)
    b = APOLLO([q], lr=torch.tensor(0.25), **options)
    steps(a, [p])
    steps(b, [q])
    assert torch.equal(p, q)
    b.param_groups[0]["lr"].fill_(0.0)
    steps(b, [q], 1)
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.5**i),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    ],
)
def test_schedulers_drive_the_step_and_their_keys_survive_a_reload(parameter, scheduler):
    p = parameter()
    optimizer = APOLLO([p], lr=0.1, rank=4)
    plan = scheduler(optimizer)
    for i in range(5):
        fill([p], i)
        optimizer.step()
        plan.step()
    again = APOLLO([parameter()], lr=0.1, rank=4)
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.1
    # a group with a scheduler's keys is also accepted by a constructor
    APOLLO([{**optimizer.param_groups[0], "params": [parameter()]}])


def test_lr_scales_the_step(parameter):
    sizes = []
    for lr in (0.1, 0.2):
        p = parameter()
        before = p.detach().clone()
        steps(APOLLO([p], lr=lr, rank=4), [p], 1)
        sizes.append((p.detach() - before).norm())
    assert float(sizes[1] / sizes[0]) == pytest.approx(2, rel=1e-5)


def test_hooks_run_before_and_after_the_step(pair):
    (p, _), (optimizer, _) = pair()
    order = []
    optimizer.register_step_pre_hook(lambda *_: order.append("before"))
    optimizer.register_step_post_hook(lambda *_: order.append("after"))
    steps(optimizer, [p], 1)
    assert order == ["before", "after"]


def test_parameters_may_be_added_frozen_and_thawed(parameter):
    p, q = parameter(), parameter((4, 6))
    q.requires_grad_(False)
    optimizer = APOLLO([p, q], lr=0.1, rank=4)
    steps(optimizer, [p], 2)
    assert q not in optimizer.state
    q.requires_grad_(True)
    steps(optimizer, [p, q], 2, 2)
    assert float(optimizer.state[q]["step"]) == 2
    late = parameter((5, 5))
    optimizer.add_param_group({"params": [late], "rank": 2, "scale_type": "tensor"})
    steps(optimizer, [p, q, late], 2, 4)
    keys = {optimizer.state[x]["seed"] for x in (p, q, late)}
    assert len(keys) == 3 and float(optimizer.state[late]["step"]) == 2


# ---- shapes, strides, dtypes -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.filterwarnings("ignore:rank .* is clamped")
def test_every_shape_takes_a_step(parameter, shape, dtype, scale_type):
    p = parameter(shape, dtype)
    optimizer = APOLLO([p], lr=0.1, rank=4, scale_type=scale_type)
    before = p.detach().clone()
    steps(optimizer, [p])
    assert torch.isfinite(p).all()
    assert p.numel() == 0 or not torch.equal(p, before)
    assert ("update_norm" in optimizer.state[p]) == (p.dim() >= 2)
    assert float(optimizer.state[p]["step"]) == 3


def test_an_empty_last_parameter_does_not_hide_the_others(parameter):
    p, empty = parameter(), parameter((0, 4))
    before = p.detach().clone()
    steps(APOLLO([p, empty], rank=4), [p, empty], 1)
    assert not torch.equal(p, before)


def test_a_convolution_is_the_matrix_of_its_flattened_filters(parameter):
    p = parameter((8, 3, 2, 2))
    q = torch.nn.Parameter(p.detach().reshape(8, 12).clone())
    a, b = APOLLO([p], rank=4), APOLLO([q], rank=4)
    for i in range(3):
        fill([p], i)
        q.grad = p.grad.reshape(8, 12).clone()
        a.step()
        b.step()
    assert torch.equal(p.reshape(8, 12), q)


def test_a_channels_last_convolution_equals_a_contiguous_one(parameter):
    p = parameter((8, 3, 2, 2))
    q = torch.nn.Parameter(p.detach().clone().to(memory_format=torch.channels_last))
    assert not q.is_contiguous()
    a, b = APOLLO([p], rank=4), APOLLO([q], rank=4)
    for i in range(3):
        fill([p], i)
        q.grad = p.grad.clone().to(memory_format=torch.channels_last)
        a.step()
        b.step()
    assert torch.equal(p, q) and not q.is_contiguous()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_strides_do_not_matter(backend, parameter, layout, shape, rank, dtype):
    p, q = parameter(shape, dtype), parameter(shape, dtype)
    a, b = APOLLO([p], lr=0.1, rank=rank), APOLLO([q], lr=0.1, rank=rank)
    for i in range(3):
        m, n = shape
        g = {
            "transposed": randn((n, m), backend, dtype, seed=i).t(),
            "sliced": randn((2 * m, 3 * n), backend, dtype, seed=i)[::2, ::3],
            "expanded": randn((1, n), backend, dtype, seed=i).expand(shape),
        }[layout]
        p.grad, q.grad = g, g.contiguous().clone()
        assert not p.grad.is_contiguous()
        a.step()
        b.step()
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_sliced_parameter_leaves_its_neighbours_alone(backend):
    whole = torch.zeros(12, 12, device=backend.device)
    p = torch.nn.Parameter(whole[::2, 1::3])
    steps(APOLLO([p], rank=4), [p], 2)
    mask = torch.zeros_like(whole, dtype=torch.bool)
    mask[::2, 1::3] = True
    assert (whole[mask] != 0).all() and not whole[~mask].any()


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_beyond_the_end_of_a_row_is_neither_read_nor_written(
    backend, transposed, rank, dtype
):
    """Rows begin at whole 16 bytes, where kernels may take 8 elements at once, and end within."""

    def padded(x):
        rows = x.t() if transposed else x
        m, n = rows.shape
        room = torch.full((m, n + 12), float("nan"), dtype=dtype, device=backend.device)
        view = room[:, :n].copy_(rows)
        return room, view.t() if transposed else view

    shape = (20, 12) if transposed else (12, 20)
    q = torch.nn.Parameter(randn(shape, backend, dtype))
    room, view = padded(q.detach())
    p = torch.nn.Parameter(view)
    for proj_type in ("std", "reverse_std"):
        named = {"lr": 0.1, "rank": rank, "scale_type": "tensor", "proj_type": proj_type}
        a, b = APOLLO([p], **named), APOLLO([q], **named)
        q.grad = randn(shape, backend, dtype, seed=1)
        _, p.grad = padded(q.grad)
        a.step()
        b.step()
        # sums over K may be taken in another order
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    assert int(room.isnan().sum()) == room.numel() - p.numel()


def test_a_float32_gradient_of_a_bf16_weight_is_used_in_full(backend, parameter):
    p, q = parameter(dtype=torch.bfloat16), parameter(dtype=torch.bfloat16)
    q.data = q.data.float()
    g = randn((6, 4), backend, seed=1)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch ties the gradient's dtype to the parameter's")
    p.grad_dtype = torch.float32
    p.grad, q.grad = g.clone(), g.clone()
    a, b = APOLLO([p], lr=0.1, rank=4), APOLLO([q], lr=0.1, rank=4)
    a.step()
    b.step()
    assert torch.equal(a.state[p]["exp_avg"], b.state[q]["exp_avg"])
    assert torch.equal(p, q.bfloat16())


def test_tied_weights_are_stepped_once():
    embedding = torch.nn.Embedding(10, 8)
    head = torch.nn.Linear(8, 10, bias=False)
    head.weight = embedding.weight
    module = torch.nn.ModuleList([embedding, head])
    optimizer = APOLLO(module.parameters(), rank=4)
    fill([head.weight])
    optimizer.step()
    assert len(optimizer.state) == 1 and float(optimizer.state[head.weight]["step"]) == 1


def test_named_parameters_are_accepted():
    module = torch.nn.Linear(8, 4)
    optimizer = APOLLO(module.named_parameters(), rank=4)
    steps(optimizer, list(module.parameters()), 1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


# ---- arguments ---------------------------------------------------------------------------------


def bare():
    """A parameter for what is refused before any back end is asked."""
    return torch.nn.Parameter(torch.ones(6, 4))


BAD = [
    ("lr", -1.0, "lr must be a number >= 0, got -1.0"),
    ("lr", float("nan"), "lr must be"),
    ("lr", torch.ones(2), "lr must be a number or a tensor of one element"),
    ("betas", (1.0, 0.9), r"betas must be two numbers in \[0, 1\), got \(1.0, 0.9\)"),
    ("betas", (0.9,), "betas must be"),
    ("eps", -1e-8, "eps must be a number >= 0, got -1e-08"),
    ("weight_decay", -0.1, "weight_decay must be a number >= 0, got -0.1"),
    ("rank", 0, "rank must be an integer >= 1, got 0"),
    ("rank", 2.5, "rank must be an integer >= 1, got 2.5"),
    ("update_proj_gap", 0, "update_proj_gap must be an integer >= 1, got 0"),
    ("scale", 0.0, "scale must be a number > 0, got 0.0"),
    ("scale_type", "row", "scale_type must be one of .* got 'row'"),
    ("proj_type", "full", "proj_type must be one of .* got 'full'"),
    ("proj", "svd", "proj must be one of .*SVD.* got 'svd'"),
    ("differentiable", True, "differentiable must be False"),
    ("seed", 1.5, "seed must be an integer, got 1.5"),
    ("backend", "hip", "backend must be one of .* got 'hip'"),
]


@pytest.mark.parametrize("name, value, message", BAD)
def test_a_bad_argument_is_named_with_its_value(name, value, message):
    with pytest.raises(ValueError, match=message):
        APOLLO([bare()], **{name: value})


def test_a_bad_group_is_named_and_not_added():
    optimizer = APOLLO([bare()])
    with pytest.raises(ValueError, match="'rnk' in parameter group 1: did you mean 'rank'"):
        optimizer.add_param_group({"params": [bare()], "rnk": 4})
    with pytest.raises(ValueError, match="complex"):
        optimizer.add_param_group({"params": [torch.zeros(2, 2, dtype=torch.complex64)]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="unknown key 'seed'"):
        APOLLO([{"params": [bare()], "seed": 3}])
    with pytest.raises(TypeError):
        optimizer.add_param_group([bare()])


def test_a_parameter_in_two_groups_is_refused():
    p = bare()
    with pytest.raises(ValueError, match="more than one parameter group"):
        APOLLO([{"params": [p]}, {"params": [p], "rank": 4}])


def test_foreach_and_fused_are_accepted_but_not_both(parameter):
    for options in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        p = parameter()
        steps(APOLLO([p], rank=4, **options), [p], 1)
    with pytest.raises(ValueError, match="fused"):
        APOLLO([parameter()], foreach=True, fused=True)


def test_projection_type_is_read_with_a_warning():
    p = bare()
    with pytest.warns(UserWarning, match="'projection_type' is read as 'proj_type'"):
        optimizer = APOLLO([{"params": [p], "rank": 4, "projection_type": "left"}])
    assert optimizer.param_groups[0]["proj_type"] == "left"


def test_a_rank_beyond_the_contracted_side_is_clamped_with_one_warning(parameter):
    params = [parameter((6, 4)), parameter((4, 6))]
    with pytest.warns(UserWarning, match="rank 50 is clamped") as caught:
        optimizer = APOLLO(params, rank=50)
    steps(optimizer, params)
    assert caught[0].filename == __file__  # at the line that asks for it, not inside of torch
    assert len([w for w in caught if "clamped" in str(w.message)]) == 1
    assert optimizer.state[params[0]]["exp_avg"].shape == (6, 4)


def test_channel_scaling_with_a_tiny_rank_warns_and_mini_does_not(parameter):
    p = parameter()
    with pytest.warns(UserWarning, match="rank 1 trains badly"):
        steps(APOLLO([p], rank=1), [p], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(APOLLO([p], rank=1, scale_type="tensor"), [p], 1)


def test_the_drop_in_takes_the_published_arguments_by_position(parameter):
    p, q = parameter(), parameter()
    published = {"rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0}
    published.update(update_proj_gap=200, proj_type="std")
    a = APOLLOAdamW(
        [{"params": [p], **published}], 0.01, (0.9, 0.99), 1e-7, 0.1, False, True, True, False
    )
    b = APOLLO(
        [q],
        lr=0.01,
        betas=(0.9, 0.99),
        eps=1e-7,
        weight_decay=0.1,
        correct_bias=False,
        scale_front=True,
        disable_nl=True,
        rank=4,
    )
    steps(a, [p])
    steps(b, [q])
    assert torch.equal(p, q)


def test_backends_are_chosen_in_one_place(monkeypatch):
    p = bare()
    fill([p])
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: needs a CUDA device"):
        APOLLO([p], rank=4, backend="cuda").step()
    monkeypatch.setenv("APOLLO_KERNELS_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # without its interpreter
    with pytest.raises(RuntimeError, match="APOLLO_KERNELS_BACKEND='triton' cannot run"):
        APOLLO([p], rank=4).step()
    APOLLO([p], rank=4, backend="torch").step()  # an argument beats the environment
    monkeypatch.setenv("APOLLO_KERNELS_BACKEND", "hip")
    with pytest.raises(ValueError, match="APOLLO_KERNELS_BACKEND must be one of"):
        APOLLO([p], rank=4).step()


# ---- reports -----------------------------------------------------------------------------------


def test_memory_report_counts_state_before_and_after_the_first_step(parameter):
    p, q = parameter((16, 8), torch.bfloat16), parameter((10,), torch.bfloat16)
    optimizer = APOLLO([{"params": [p], "rank": 4}, {"params": [q]}])
    expected = (2 * 16 * 4 + 1) * 4 + 8 + (2 * 10) * 4 + 8  # a step has 8 bytes
    report = optimizer.memory_report()
    assert (report.state_bytes, report.weight_bytes) == (expected, 2 * 138)
    assert report.adamw_bytes == 2 * 2 * 138
    steps(optimizer, [p, q], 1)
    assert str(optimizer.memory_report()) == str(report)
    assert "rank 4 channel" in str(report) and "dense AdamW" in str(report)


def test_printing_an_optimizer_works():
    assert "rank: 4" in repr(APOLLO([bare()], rank=4))
