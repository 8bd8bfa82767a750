"""APOLLO (arXiv 2412.05270): SGD-like optimizer memory, AdamW-level results."""

import importlib.util as _util
import sys as _sys

# The repository's folder triton/ poses as the package Triton where that is not installed and the
# root is on sys.path; torch then fails inside of its optimizers. A real package has an origin.
if "triton" not in _sys.modules:
    _spec = _util.find_spec("triton")
    if _spec is not None and _spec.origin is None:
        _sys.modules["triton"] = None  # type: ignore[assignment]

from apollo_kernels._version import __version__
from apollo_kernels.converters import load_apollo_torch
from apollo_kernels.groups import apollo, apollo_mini, param_groups
from apollo_kernels.optimizer import APOLLO, APOLLOAdamW
from apollo_kernels.philox import projection_matrix
from apollo_kernels.quantized import Int8Weight, dequantize_, quantize_
from apollo_kernels.standin import install_as_apollo_torch

__all__ = [
    "APOLLO",
    "APOLLOAdamW",
    "Int8Weight",
    "__version__",
    "apollo",
    "apollo_mini",
    "dequantize_",
    "install_as_apollo_torch",
    "load_apollo_torch",
    "param_groups",
    "projection_matrix",
    "quantize_",
]
