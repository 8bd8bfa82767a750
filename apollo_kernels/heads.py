"""Which layer of a model is its output head, through whatever wraps the model or the head.

Hugging Face's models tell it. Those that do not (for classification, say), and models of other
makes, have a layer of a usual name right below the root, which DistributedDataParallel,
torch.compile, PEFT or a LightningModule may have put one or more levels down.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_USUAL: tuple[str, ...] = ("lm_head", "embed_out", "output", "head", "classifier", "score")
_USUAL += ("qa_outputs", "classification_head", "output_layer", "output_projection")


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear or Hugging Face's Conv1D, which is a transposed one."""
    # Conv1D by name: importing transformers to ask would cost seconds.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def find(model: nn.Module) -> set[nn.Module]:
    """The layers of ``model`` that are an output head; empty if nothing looks like one."""
    roots, found = list(unwrapped(model)), set[nn.Module]()
    for module in dict.fromkeys([*model.modules(), *roots]):
        told = _told(module)
        if told is not None:
            found |= _layers(told)
        elif module in roots or hasattr(module, "get_output_embeddings"):
            usual = (child for name, child in module.named_children() if name in _USUAL)
            for head in usual:
                found |= _layers(head)
    return found


def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """``model``, and level by level what it wraps: its only child that has parameters, or all of a
    LightningModule's."""
    yield model
    if next(model.parameters(recurse=False), None) is not None:
        return
    inner = [m for m in model.children() if next(m.parameters(), None) is not None]
    if len(inner) == 1 or any(c.__name__ == "LightningModule" for c in type(model).__mro__):
        for module in inner:
            yield from unwrapped(module)


def _told(module: nn.Module) -> nn.Module | None:
    """What a Hugging Face model says is its head."""
    getter: Any = getattr(module, "get_output_embeddings", None)
    if not callable(getter):
        return None
    try:
        head = getter()
    except (AttributeError, NotImplementedError):  # of a model that has none
        return None
    return head if isinstance(head, nn.Module) else None


def _layers(head: nn.Module) -> set[nn.Module]:
    """The layers that hold a head's weights: itself, or the last linear layer inside of it; and
    PEFT's trained copies of it."""
    copies, base = getattr(head, "modules_to_save", None), getattr(head, "base_layer", None)
    if isinstance(copies, nn.ModuleDict):
        inner = [*copies.values(), getattr(head, "original_module", None)]
    else:
        inner = [base]
    wrapped = [_layers(module) for module in inner if isinstance(module, nn.Module)]
    if wrapped:
        return set().union(*wrapped)
    return {head, *[module for module in head.modules() if is_linear(module)][-1:]}
