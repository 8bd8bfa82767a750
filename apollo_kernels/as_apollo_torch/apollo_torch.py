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

_OPTIMS = ("apollo_adamw", "apollo_adamw_layerwise")
_undo: list[Callable[[], None]] = []


def __getattr__(name: str) -> Any:
    if name == "APOLLOAdamW":
        from apollo_kernels.standin import APOLLOAdamW

        return APOLLOAdamW
    raise AttributeError(f"apollo_kernels, which stands in for apollo_torch, has no {name!r}")


class _Watch(MetaPathFinder):
    """Finds nothing itself; but once a module of _TAKEN_OVER has been executed it takes it over."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        take_over = _TAKEN_OVER.get(name)
        if take_over is None:
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
                take_over(module)

        loader.exec_module = exec_module
        return spec


_watch = _Watch()


def _transformers(module: Any) -> None:
    """Trainer asks this method which optimizer to make."""
    trainer = module.Trainer
    theirs = trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(theirs)
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        if getattr(args.optim, "value", args.optim) not in _OPTIMS:
            return theirs(args, model)
        from apollo_kernels.integrations.transformers import optimizer_of

        return optimizer_of(args, model)

    trainer.get_optimizer_cls_and_kwargs = staticmethod(get_optimizer_cls_and_kwargs)
    _undo.append(lambda: setattr(trainer, theirs.__name__, staticmethod(theirs)))


def _llamafactory(module: Any) -> None:
    """LLaMA-Factory's use_apollo calls this function; where a version has none, it stays as it is
    and makes its optimizers of APOLLOAdamW itself."""
    theirs = getattr(module, "_create_apollo_optimizer", None)
    if theirs is None:
        return

    @functools.wraps(theirs)
    def create(model: Any, training_args: Any, finetuning_args: Any) -> Any:
        from apollo_kernels.integrations.llamafactory import optimizer_of

        return optimizer_of(theirs, model, training_args, finetuning_args)

    module._create_apollo_optimizer = create
    _undo.append(lambda: setattr(module, "_create_apollo_optimizer", theirs))


_TAKEN_OVER: dict[str, Callable[[Any], None]] = {
    "transformers.trainer": _transformers,
    "llamafactory.train.trainer_utils": _llamafactory,
}


def install() -> None:
    """Trainer and LLaMA-Factory build our optimizers, be they imported already or later."""
    if _watch in sys.meta_path:
        return
    sys.meta_path.insert(0, _watch)
    for name, take_over in _TAKEN_OVER.items():
        if (module := sys.modules.get(name)) is not None:
            take_over(module)


def uninstall() -> None:
    if _watch in sys.meta_path:
        sys.meta_path.remove(_watch)
    while _undo:
        _undo.pop()()


install()
