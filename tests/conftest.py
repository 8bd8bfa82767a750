import apollo_kernels  # noqa: F401  (before torch: guards against the folder triton/)
import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
