"""``stats(detail=True)``: what it tells of each parameter is what the step has done, everywhere."""

import types

import pytest
import torch
from helpers import changed, fill, parameter, parameters, snapshot

import apollo_kernels
from apollo_kernels import APOLLO

KEYS = {"min": 0.0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "max": 1.0}
MINI = {"scale_type": "tensor", "scale": 128.0}


def recording(groups, **options):
    optimizer = APOLLO(groups, lr=1e-2, **options)
    optimizer.record_detail = True
    return optimizer


def scales_of(optimizer, p, grad, scale_type, proj="random"):
    """s of the first step, in float64 by the formula."""
    x = grad.double().cpu()
    x = x if x.shape[0] >= x.shape[1] else x.t()
    own = optimizer.state[p]
    rank = own["exp_avg"].shape[1]
    distribution = "gaussian" if proj == "random" else proj
    z = apollo_kernels.projection_matrix(own["seed"], 0, rank, x.shape[1], distribution)
    r = x @ z.double().t()
    n = 0.1 * r / ((0.001 * r * r).sqrt() + 1e-6)
    dims = (1,) if scale_type == "channel" else (0, 1)
    return (n.square().sum(dims).sqrt() / (r.square().sum(dims).sqrt() + 1e-8)).reshape(-1)


@pytest.mark.parametrize("proj", ["random", "sparse"])
@pytest.mark.parametrize("options", [{"rank": 8}, {"rank": 1, **MINI}], ids=["channel", "tensor"])
def test_quantiles_are_those_of_the_formulas_scales(backend, options, proj):
    params = {"tall": parameter((48, 16), backend), "wide": parameter((16, 40), backend, seed=1)}
    optimizer = recording([{"params": list(params.items()), "proj": proj, **options}])
    fill(params.values(), backend)
    optimizer.step()
    detail = optimizer.stats(detail=True)["detail"]
    assert list(detail) == ["tall", "wide"]
    for name, p in params.items():
        kind = options.get("scale_type", "channel")
        s = scales_of(optimizer, p, p.grad, kind, proj)
        for key, level in KEYS.items():
            wanted = float(torch.quantile(s, level))
            assert detail[name]["scales"][key] == pytest.approx(wanted, rel=1e-3)


def test_a_sparse_projection_in_several_tiles_has_its_own_scales(backend):
    """Of rank 260 a dense and a sparse projection lie at different places of Triton's workspace."""
    p = parameter((300, 300), backend)
    optimizer = recording([{"params": [("p", p)], "rank": 260, "proj": "sparse"}])
    fill([p], backend)
    optimizer.step()
    told = optimizer.stats(detail=True)["detail"]["p"]["scales"]
    s = scales_of(optimizer, p, p.grad, "channel", "sparse")
    assert told["min"] == pytest.approx(float(s.min()), rel=1e-3)
    assert told["max"] == pytest.approx(float(s.max()), rel=1e-3)


def test_the_limiters_share_and_the_norm_are_the_steps_own(backend):
    """Gradients that grow from step to step by different factors: each is held or not by itself."""
    calm, wild = parameter((24, 16), backend), parameter((16, 24), backend, seed=1)
    group = {"params": [("calm", calm), ("wild", wild)], "rank": 4, "scale": 4.0}
    optimizer = recording([group])
    growth = [1, 1, 9, 1, 9, 1]
    for step, factor in enumerate(growth):
        fill([calm], backend, step, 0.9**step)
        fill([wild], backend, step, float(factor))
        optimizer.step()
    stats = optimizer.stats(detail=True)
    detail = stats["detail"]
    held = {name: detail[name]["limited"] * (len(growth) - 1) for name in detail}
    assert sum(held.values()) == pytest.approx(stats["limited"])
    assert 0 < held["wild"] < len(growth) - 1 and held["calm"] < held["wild"]
    for name, p in (("calm", calm), ("wild", wild)):
        norm = 2 * float(optimizer.state[p]["update_norm"])  # alpha is the root of 4
        assert detail[name]["update_norm"] == pytest.approx(norm)


def test_a_parameter_of_several_matrices_is_told_of_as_one(backend):
    experts = parameter((3, 24, 16), backend)
    alone = parameter((24, 16), backend)
    alone.data.copy_(experts.data[1])
    optimizer = recording([{"params": [("experts", experts)], "rank": 4, "batch_dims": 1}])
    fill([experts], backend)
    optimizer.step()
    (told,) = optimizer.stats(detail=True)["detail"].values()
    norms = optimizer.state[experts]["update_norm"]
    assert told["update_norm"] == pytest.approx(float(norms.norm()))
    batches = [work.batch for unit in optimizer._runtime.units for work in unit.plan.works]
    (hyper,) = [hyper for _, hyper in optimizer._runtime.hypers.values()]
    s = torch.cat([s for batch in batches for s in batch.scales(hyper)])
    assert len(s) == 3 * 24
    assert told["scales"]["max"] == pytest.approx(float(s.max()))


def test_a_record_changes_no_bit(backend):
    def train(record):
        params = parameters([(24, 16), (16, 40), (8,)], backend)
        optimizer = APOLLO([{"params": params, "rank": 4}], lr=1e-2, max_grad_norm=1.0)
        optimizer.record_detail = record
        for step in range(4):
            fill(params, backend, step, 3.0**step)
            optimizer.step()
        return optimizer

    assert changed(snapshot(train(True)), snapshot(train(False))) == set()


def test_gradient_release_and_the_normal_mode_tell_the_same(backend):
    def train(release):
        params = parameters([(24, 16), (16, 40)], backend)
        optimizer = recording([{"params": params, "rank": 4}], gradient_release=release)
        for step in range(3):
            loss = sum((p * g).sum() for p, g in zip(params, gradients(params, step), strict=True))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(optimizer.stats(detail=True)["detail"].values())

    def gradients(params, step):
        stand_ins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        fill(stand_ins, backend, step, 4.0**step)
        return [p.grad for p in stand_ins]

    assert train(True) == train(False)


def test_counts_go_on_when_the_plan_is_built_anew(backend):
    """Another parameter gets no gradients any more: the count does not care."""

    def train(stop):
        params = parameters([(24, 16), (16, 24)], backend)
        optimizer = recording([{"params": params, "rank": 4}])
        for step in range(5):
            fill(params, backend, step, 4.0**step)
            if step >= stop:
                params[0].grad = None
            optimizer.step()
        return list(optimizer.stats(detail=True)["detail"].values())[1]

    told = train(2)
    assert told["limited"] > 0.25
    assert told == train(5)


def plain(**group):
    p = torch.nn.Parameter(torch.randn(24, 16))
    p.grad = torch.randn(24, 16)
    return p, recording([{"params": [p], "rank": 4, **group}])


def test_without_a_record_it_says_what_to_set():
    _, optimizer = plain()
    optimizer.record_detail = False
    optimizer.step()
    assert "detail" not in optimizer.stats()
    with pytest.raises(RuntimeError, match="record_detail = True"):
        optimizer.stats(detail=True)
    with pytest.raises(ValueError, match="record_detail must be True or False, got 1"):
        optimizer.record_detail = 1


def test_a_parameter_without_a_name_goes_by_shape_and_key():
    p, optimizer = plain()
    assert optimizer.stats(detail=True)["detail"] == {}
    optimizer.step()
    (name,) = optimizer.stats(detail=True)["detail"]
    assert name == f"24x16 key {optimizer.state[p]['seed']:016x}"


FREE = {"disable_nl": True, "scale": 4.0}


@pytest.mark.parametrize("front", [False, True], ids=["alpha last", "alpha first"])
@pytest.mark.parametrize("proj", ["random", "sparse"])
def test_without_a_limiter_the_norm_is_that_of_the_update(backend, front, proj):
    """Measured on the weights; the matrices are of both orientations, and one is float64."""
    tall, wide = parameter((24, 16), backend), parameter((3, 16, 40), backend, seed=1)
    params = {"tall": tall, "wide": wide}
    if not backend.interpreted:
        params["exact"] = torch.nn.Parameter(parameter((16, 24), backend).detach().double())
    groups = [{"params": [(name, p)], "rank": 4, "batch_dims": p.dim() - 2, "proj": proj}
              for name, p in params.items()]  # fmt: skip
    optimizer = APOLLO(groups, lr=1.0, correct_bias=False, scale_front=front, **FREE)
    optimizer.record_detail = True
    for step, factor in enumerate((1.0, 5.0, 0.1)):
        before = {name: p.detach().clone() for name, p in params.items()}
        fill(params.values(), backend, step, factor)
        optimizer.step()
        told = optimizer.stats(detail=True)["detail"]
        for name, p in params.items():
            moved = float((p.detach() - before[name]).double().norm())
            assert told[name]["update_norm"] == pytest.approx(moved, rel=1e-4)
            assert told[name]["limited"] == 0.0
            assert not optimizer.state[p]["update_norm"].any()


def test_without_a_limiter_a_record_changes_no_bit(backend):
    """Neither do norms that are there from a time with the limiter, nor does one that begins."""

    def train(record):
        params = parameters([(24, 16), (16, 40)], backend)
        optimizer = APOLLO([{"params": params, "rank": 4}], lr=1e-2)
        optimizer.record_detail = record
        for step in range(6):
            optimizer.param_groups[0]["disable_nl"] = step in (2, 4)
            fill(params, backend, step, 3.0 ** min(step, 3))
            optimizer.step()
        return optimizer

    assert changed(snapshot(train(True)), snapshot(train(False))) == set()


def test_without_a_limiter_a_step_that_is_not_taken_leaves_the_norm():
    p, optimizer = plain(**FREE)
    optimizer.step()
    (told,) = optimizer.stats(detail=True)["detail"].values()
    p.grad.fill_(torch.nan)
    optimizer.step()
    optimizer.found_inf, p.grad = torch.ones(()), torch.randn(24, 16)
    optimizer.step()
    (later,) = optimizer.stats(detail=True)["detail"].values()
    assert later["update_norm"] == told["update_norm"] > 0
    optimizer.found_inf = None
    p.grad = torch.zeros(24, 16)
    optimizer.state[p]["exp_avg"].zero_()
    optimizer.step()
    (zero,) = optimizer.stats(detail=True)["detail"].values()
    assert zero["update_norm"] == 0.0


def test_without_a_limiter_the_norm_outlives_a_plan():
    params = parameters([(24, 16), (16, 24)], types.SimpleNamespace(device="cpu"))
    optimizer = recording([{"params": params, "rank": 4, **FREE}])
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = list(optimizer.stats(detail=True)["detail"].values())
    params[0].grad = None
    params[1].grad.fill_(torch.nan)
    optimizer.step()
    after = list(optimizer.stats(detail=True)["detail"].values())
    assert [told["update_norm"] for told in after] == [told["update_norm"] for told in before]


def test_without_a_limiter_an_error_inside_of_the_step_leaves_the_state(monkeypatch):
    from apollo_kernels import plan

    def stop(*_):
        raise KeyboardInterrupt

    p, optimizer = plain(**FREE)
    optimizer.step()
    monkeypatch.setattr(plan, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert float(optimizer.state[p]["update_norm"]) == 0.0


@pytest.mark.parametrize("options", [{}, MINI], ids=["channel", "tensor"])
def test_a_first_step_that_is_skipped_has_no_scales(backend, options):
    p = parameter((24, 16), backend)
    optimizer = recording([{"params": [p], "rank": 4, **options}])
    fill([p], backend)
    optimizer.found_inf = torch.ones((), device=backend.device)
    optimizer.step()
    (told,) = optimizer.stats(detail=True)["detail"].values()
    zeros = dict.fromkeys(KEYS, 0.0)
    assert told == {"scales": zeros, "update_norm": 0.0, "limited": 0.0}
    optimizer.found_inf = None
    optimizer.step()
    (told,) = optimizer.stats(detail=True)["detail"].values()
    assert told["scales"]["min"] > 0 and told["update_norm"] > 0 and told["limited"] == 0.0


def test_a_skipped_step_leaves_the_record_of_the_one_before():
    p, optimizer = plain()
    optimizer.step()
    before = optimizer.stats(detail=True)["detail"]
    p.grad = torch.randn(24, 16)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.stats(detail=True)["detail"] == before


def test_a_loaded_state_begins_a_new_record():
    p, optimizer = plain()
    for factor in (1e-4, 1.0):  # the first step's s is 1 over its gradient, the second's is not
        p.grad = factor * torch.randn(24, 16)
        optimizer.step()
    assert next(iter(optimizer.stats(detail=True)["detail"].values()))["limited"] == 1.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.stats(detail=True)["detail"] == {}
    optimizer.step()
    assert next(iter(optimizer.stats(detail=True)["detail"].values()))["limited"] == 0.0


def test_a_first_norm_is_no_held_one():
    p, optimizer = plain()
    p.grad.zero_()
    optimizer.step()
    p.grad.fill_(1.0)
    optimizer.step()
    assert optimizer.stats()["limited"] == 0
    assert next(iter(optimizer.stats(detail=True)["detail"].values()))["limited"] == 0.0


def test_a_compiled_step_is_recorded_too():
    _, optimizer = plain()
    torch.compile(optimizer.step, backend="eager")()
    assert len(optimizer.stats(detail=True)["detail"]) == 1
