"""apollo_kernels in the place of the package apollo_torch (see apollo_kernels/standin.py).

This module is imported at the start of every process that ``python -m apollo_kernels run`` starts,
so it imports nothing heavy by itself: neither torch nor apollo_kernels nor transformers.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "1.0.3"
__all__ = ["APOLLOAdamW"]  # noqa: F822  (see __getattr__)

_TRAINER = "transformers.trainer"
_OPTIMS = ("apollo_adamw", "apollo_adamw_layerwise")
_undo: list[Callable[[], None]] = []


def __getattr__(name: str) -> Any:
    if name == "APOLLOAdamW":
        from apollo_kernels.standin import APOLLOAdamW

        return APOLLOAdamW
    raise AttributeError(f"apollo_kernels, which stands in for apollo_torch, has no {name!r}")


class _Watch(MetaPathFinder):
    """Finds nothing itself; but once transformers.trainer has been executed it takes it over."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _TRAINER:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        loader: Any = spec and spec.loader
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                _take_over(module.Trainer)

        loader.exec_module = exec_module
        return spec


_watch = _Watch()


def _take_over(trainer: Any) -> None:
    """Trainer asks this method which optimizer to make."""
    theirs = trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(theirs)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if getattr(args.optim, "value", args.optim) not in _OPTIMS:
            return theirs(args, model)
        from apollo_kernels.integrations.transformers import optimizer_of

        return optimizer_of(args, model)

    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    _undo.append(lambda: setattr(trainer, theirs.__name__, staticmethod(theirs)))


def install() -> None:
    """Trainer builds our optimizers, be it imported already or later."""
    if _watch in sys.meta_path:
        return
    sys.meta_path.insert(0, _watch)
    if (module := sys.modules.get(_TRAINER)) is not None:
        _take_over(module.Trainer)


def uninstall() -> None:
    if _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
    while _undo:
        _undo.pop()()


install()
