"""The bits of a parameter never depend on what else is in the optimizer, or in its group."""

import pytest
import torch
from helpers import changed, parameter, snapshot, train

from apollo_kernels import APOLLO

# The shape of the parameter that is watched; its rank is clamped to its contracted side. The last
# is long enough for its contracted side to be cut.
WATCHED = [(24, 4), (4, 24), (24, 7), (1, 9), (24, 16), (8, 5000)]
NEIGHBOURS = {
    "of rank 8 and more": [(40, 20)],
    "of rank 300": [(310, 301)],
    "of a small rank": [(24, 2), (3, 24)],
    "of other kinds": [(7,), (), (0, 8), (4, 3, 2, 2)],
}


def alone_or_not(backend, shape, neighbours, dtype, own_group, **options):
    """The watched parameter's state and weight after some steps beside ``neighbours``."""
    watched = parameter(shape, backend, dtype, seed=99)
    others = [parameter(s, backend, dtype, seed=i) for i, s in enumerate(neighbours)]
    params = [watched, *others]
    groups = [[watched], others] if own_group and others else [params]
    groups = [{"params": group, **options} for group in groups]
    optimizer = APOLLO(groups, lr=0.1, update_proj_gap=2)
    train(params, optimizer, backend, range(2))
    return {key: value for key, value in snapshot(optimizer).items() if key[0] == 0}


@pytest.mark.parametrize("neighbours", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("shape", WATCHED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_parameter_has_the_same_bits_in_any_company(backend, shape, neighbours, dtype):
    rank = 300 if neighbours[0] == (310, 301) else 12
    if rank == 300 and (dtype == torch.bfloat16 or shape == (8, 5000)) and backend.name == "triton":
        pytest.skip("seconds in Triton's interpreter, whose tiles do not depend on the dtype")
    options = {"rank": rank, "scale_type": "tensor"}
    lonely = alone_or_not(backend, shape, [], dtype, False, **options)
    beside = alone_or_not(backend, shape, neighbours, dtype, False, **options)
    assert changed(lonely, beside) == set()


@pytest.mark.parametrize("shape", [(24, 4), (24, 16)], ids=str)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_parameter_has_the_same_bits_beside_another_group(backend, shape, scale_type):
    options = {"rank": 12, "scale_type": scale_type}
    lonely = alone_or_not(backend, shape, [], torch.float32, False, **options)
    beside = alone_or_not(backend, shape, [(40, 20), (5,)], torch.float32, True, **options)
    assert changed(lonely, beside) == set()


def test_dtypes_beside_each_other_change_no_bit(backend):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

    def run(chosen):
        params = [parameter((12, 6), backend, dtype) for dtype in dtypes]
        optimizer = APOLLO(params, lr=0.1, rank=4)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = None
                if i in chosen:
                    p.grad = parameter((12, 6), backend, p.dtype, seed=10 * step + i).detach()
            optimizer.step()
        return snapshot(optimizer)

    together = run(range(4))
    for i in range(4):
        own = {key: value for key, value in together.items() if key[0] == i}
        lonely = {key: value for key, value in run([i]).items() if key[0] == i}
        assert changed(own, lonely) == set(), dtypes[i]
