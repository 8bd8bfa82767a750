"""Python runs this at its start where ``python -m apollo_kernels run`` has put this folder on
PYTHONPATH: then apollo_kernels stands in for apollo_torch in this process too."""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def _run_the_one_that_this_hides() -> None:
    here = Path(__file__).parent
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if Path(p) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_run_the_one_that_this_hides()
import apollo_torch  # noqa: E402, F401  (it is light, and waits for transformers' Trainer)
