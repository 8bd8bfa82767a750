"""exact_projection=True: every back end draws the CPU's normals, to the bit."""

import pytest
import torch

from apollo_kernels import APOLLO, philox


def drawn(backend, rank, proj_type, **options):
    """Z [r, K] as a step used it: the gradient is the identity, so that R is Z itself."""
    k = 258  # 16 blocks of 16, and 2
    p = torch.nn.Parameter(torch.zeros(k, k, device=backend.device))
    p.grad = torch.eye(k, device=backend.device)
    optimizer = APOLLO([p], rank=rank, proj_type=proj_type, **options)
    optimizer.step()
    beta1 = optimizer.param_groups[0]["betas"][0]
    return (optimizer.state[p]["exp_avg"].t() / (1 - beta1) * rank**0.5).bfloat16().cpu()


@pytest.mark.parametrize("rank, proj_type", [(1, "right"), (5, "left"), (65, "right")])
def test_z_is_the_host_s_to_the_bit(backend, rank, proj_type):
    z = drawn(backend, rank, proj_type, exact_projection=True)
    assert torch.equal(z, philox.draw(philox.parameter_key(0, 0), 0, rank, 258))


@pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
def test_without_it_a_card_s_fast_functions_may_round_to_the_other_neighbour(backend):
    """Else the test above could not tell the two apart."""
    z = drawn(backend, 65, "left")
    apart = (z != philox.draw(philox.parameter_key(0, 0), 0, 65, 258)).double().mean()
    assert 0 < apart < 1e-3


def test_signs_and_sparse_projections_do_not_change(backend):
    for proj in ("rademacher", "sparse"):
        found = []
        for exact in (False, True):
            torch.manual_seed(1)
            p = torch.nn.Parameter(torch.ones(40, 24, device=backend.device))
            p.grad = torch.randn(40, 24).to(backend.device)
            APOLLO([p], rank=8, proj=proj, exact_projection=exact).step()
            found.append(p.detach())
        assert torch.equal(*found)


def test_a_value_that_is_no_switch_is_refused():
    p = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match="exact_projection must be True or False, got 'yes'"):
        APOLLO([p], rank=2, exact_projection="yes")
