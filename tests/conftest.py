# isort: off
import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

# isort: on
import os

import pytest
import torch

if not torch.cuda.is_available():  # decided when Triton is imported: its kernels run interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
