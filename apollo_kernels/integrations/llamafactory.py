"""LLaMA-Factory's ``use_apollo``, after install_as_apollo_torch()."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from apollo_kernels.groups import choose_parameters
from apollo_kernels.integrations.transformers import check_release
from apollo_kernels.optimizer import APOLLO


def optimizer_of(
    theirs: Callable[..., APOLLO], model: nn.Module, training_args: Any, finetuning_args: Any
) -> APOLLO:
    """What LLaMA-Factory's own function makes, as one optimizer over parameters with names.

    Its layer-wise mode is an optimizer and a scheduler for each parameter, behind an optimizer that
    steps nothing: no checkpoint holds their state. Here it is gradient release, so that schedulers,
    ``optimizer.state_dict()`` and checkpoints are those of any optimizer.

    Args
        theirs: ``_create_apollo_optimizer`` of llamafactory.train.trainer_utils.
        model: the one that is trained.
        training_args: TrainingArguments.
        finetuning_args: LLaMA-Factory's; its apollo_target, apollo_rank and so on are read by
            ``theirs``.
    Raises
        ValueError: as ``theirs`` and APOLLO do, and for layer-wise mode together with gradient
            accumulation or several processes.
    """
    layerwise = finetuning_args.apollo_layerwise
    if layerwise:
        check_release(training_args, "apollo_layerwise")
    joint = copy.copy(finetuning_args)
    joint.apollo_layerwise = False
    optimizer = theirs(model, training_args, joint)
    names = {p: name for name, p in model.named_parameters()}
    groups = [
        {**group, "param_names": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    if finetuning_args.apollo_target == ["all"]:
        _tell_of_experts(model, groups)
    return type(optimizer)(groups, gradient_release=layerwise)


def _tell_of_experts(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """LLaMA-Factory looks for nn.Linear, and experts are parameters of three dimensions."""
    low_rank = {p for group in groups if group["rank"] is not None for p in group["params"]}
    dense = [
        choice.name
        for choice in choose_parameters(model, "linear", False)
        if choice.low_rank and choice.batch_dims and choice.parameter not in low_rank
    ]
    if dense:
        warnings.warn(
            f"apollo_target=all leaves {len(dense)} parameters of experts to AdamW, such as "
            f"{dense[0]}: LLaMA-Factory looks for nn.Linear. With optim: apollo_adamw and "
            "optim_target_modules: all-linear in the place of use_apollo they are low-rank",
            stacklevel=2,
        )
