"""apollo_kernels in the place of apollo_torch, for programs that import that package by name.

Hugging Face's Trainer (``optim="apollo_adamw"``) and LLaMA-Factory do. The folder as_apollo_torch/
holds a module and the metadata of that name. In this process it goes on sys.path; for others it
goes on PYTHONPATH (run.py), where the sitecustomize.py in it does the same at their start.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from apollo_kernels import optimizer

FOLDER = Path(__file__).parent / "as_apollo_torch"

_numbers = itertools.count(1)


class APOLLOAdamW(optimizer.APOLLOAdamW):
    """APOLLOAdamW as ``apollo_torch`` has it.

    Programs that train layer by layer make an optimizer for each parameter, without its name. Each
    such optimizer gets a seed of its own here: with one seed all matrices of one shape would share
    their projections. Where its group has no rank, that is meant, as for a norm. Keyword-only
    arguments, ``seed`` too: see APOLLO.
    """

    def __init__(self, params: Any, *arguments: Any, **options: Any):
        if "rank" not in options and _is_one_nameless(params):
            params = [{"rank": None, **params[0]}]
        super().__init__(params, *arguments, **options)
        groups = self.param_groups
        alone = len(groups) == 1 and len(groups[0]["params"]) == 1
        if alone and "param_names" not in groups[0] and "seed" not in options:
            self.defaults["seed"] = next(_numbers)


def _is_one_nameless(params: Any) -> bool:
    """Whether it is one group with one parameter, which has no name."""
    if not isinstance(params, (list, tuple)) or len(params) != 1 or not isinstance(params[0], dict):
        return False
    own = params[0].get("params")
    if isinstance(own, (list, tuple)) and len(own) == 1:
        (own,) = own
    return isinstance(own, Tensor) and "param_names" not in params[0]


def install_as_apollo_torch() -> Callable[[], None]:
    """From now on ``import apollo_torch`` gives apollo_kernels, in this process.

    Call it before anything that imports ``apollo_torch``; a package of that name that is installed
    is passed over. ``apollo_torch.APOLLOAdamW`` is then the one of this package, and
    ``optim="apollo_adamw"`` and ``"apollo_adamw_layerwise"`` of Hugging Face's Trainer, imported
    before or after, build it: apollo_kernels.integrations.transformers.optimizer_of says
    how. A second call changes nothing. For programs whose source is not yours, and for those that
    start others: ``python -m apollo_kernels run``.

    Returns
        a function that undoes it; optimizers that were made stay as they are.
    Raises
        RuntimeError: if the published package has been imported already, since what took its
            classes would keep them.
    """
    present = sys.modules.get("apollo_torch")
    if present is not None and not _is_ours(present):
        raise RuntimeError(
            f"apollo_torch has been imported already, from {getattr(present, '__file__', None)}: "
            "call apollo_kernels.install_as_apollo_torch() before whatever imports it"
        )
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
        importlib.invalidate_caches()
    module: Any = importlib.import_module("apollo_torch")
    module.install()
    return uninstall


def uninstall() -> None:
    module: Any = sys.modules.get("apollo_torch")
    if module is not None and _is_ours(module):
        module.uninstall()
        del sys.modules["apollo_torch"]
    while str(FOLDER) in sys.path:
        sys.path.remove(str(FOLDER))


def _is_ours(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == FOLDER
