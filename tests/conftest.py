# isort: off
import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

# isort: on
import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
