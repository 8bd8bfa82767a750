"""The bits of a parameter never depend on what else is in the optimizer, or in its group."""

import pytest
import torch
from helpers import changed, parameter, snapshot, train

from apollo_kernels import APOLLO

# The shape of the parameter that is watched; its rank is clamped to its contracted side.
WATCHED = [(24, 4), (4, 24), (24, 7), (1, 9), (24, 16)]
NEIGHBOURS = {
    "of rank 8 and more": [(40, 20)],
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
    options = {"rank": 12, "scale_type": "tensor"}
    lonely = alone_or_not(backend, shape, [], dtype, False, **options)
    beside = alone_or_not(backend, shape, neighbours, dtype, False, **options)
    assert changed(lonely, beside) == set()


@pytest.mark.parametrize(
    "shape, rank, neighbour",
    [((8, 2100), 12, (40, 20)), ((24, 4), 300, (310, 301)), ((24, 16), 300, (310, 301))],
    ids=str,
)
def test_a_parameter_has_the_same_bits_beside_one_of_another_size(backend, shape, rank, neighbour):
    """The contracted side of the first is cut; the others' neighbours have many rank tiles."""
    if backend.interpreted and rank == 300:
        pytest.skip("ten seconds in Triton's interpreter, and test_triton_kernels.py has its like")
    options = {"rank": rank, "scale_type": "tensor", "proj_type": "right"}
    lonely = alone_or_not(backend, shape, [], torch.float32, False, **options)
    beside = alone_or_not(backend, shape, [neighbour], torch.float32, False, **options)
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
