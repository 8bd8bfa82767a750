"""A run may change its back end at any step; none is further from float64 than PyTorch."""

import io

import pytest
import torch
from conftest import PLACES, running, why_not
from helpers import parameters, randn, train

from apollo_kernels import APOLLO, info

SHAPES = [(24, 16), (16, 24), (9, 130), (7,), (3, 2, 4)]
GROUPS = {
    "channel": dict(rank=8, weight_decay=0.01),
    "signs": dict(rank=4, proj="rademacher", scale_front=True),
    "Mini": dict(rank=1, scale_type="tensor", scale=128.0),
    "dense": dict(rank=None, weight_decay=0.01),
}


def test_the_fixture_asks_for_the_back_end_that_it_names(backend):
    found = info.collect()["devices"]
    place = "cpu" if backend.device.type == "cpu" else "cuda:0"
    assert found[place]["runs"] == backend.name


def make(params, keys):
    return APOLLO(params, lr=0.01, update_proj_gap=4, **keys)


def moved(params, place):
    device = PLACES[place][1]
    return [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", GROUPS.values(), ids=GROUPS)
def test_a_run_that_moves_between_back_ends_errs_no_more_than_one_that_stays(keys, dtype):
    """Through all that can run, PyTorch in between, across redraws and through files."""
    places = [place for place in PLACES if why_not(*PLACES[place]) is None and place != "torch"]
    if not places:
        pytest.skip("only PyTorch runs here")
    with running("torch") as backend:
        plain = parameters(SHAPES, backend, dtype)
        exact = [torch.nn.Parameter(p.detach().double()) for p in plain]
        moving = moved(plain, "torch")
        steps = range(4 * len(places) + 2)
        train(plain, make(plain, keys), backend, steps)
        optimizer = make(exact, keys)
        for step in steps:
            for i, p in enumerate(exact):  # the gradients of ``train``, as its dtype rounds them
                p.grad = randn(p.shape, backend, dtype, seed=1000 * step + i).double()
            optimizer.step()
    saved, step = None, 0
    for place in [*(x for other in places for x in ("torch", other)), "torch"]:
        with running(place) as backend:
            moving = moved(moving, place)
            optimizer = make(moving, keys)
            if saved is not None:
                optimizer.load_state_dict(torch.load(saved, weights_only=True))
            train(moving, optimizer, backend, range(step, step + 2))
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            step += 2
    assert step == len(steps)
    for m, p, e in zip(moving, plain, exact, strict=True):
        mine, theirs = ((x.detach().cpu().double() - e.detach()).abs().max() for x in (m, p))
        # the floor: roundings of the largest weight, which the plain run may have escaped
        assert mine <= 2 * theirs + 4 * torch.finfo(dtype).eps * e.detach().abs().max()
