"""A model that a command line names, on the meta device: its shapes, and none of its memory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apollo_kernels import estimate

MODEL_HELP = (
    f"{', '.join(estimate.SHORT)}; the path of a Hugging Face config.json or of its folder; or "
    "module:factory, a function of yours without arguments that returns the model"
)


def build(name: str) -> nn.Module:
    """The model, on the meta device.

    Raises
        ValueError: in one line, for what is no model.
    """
    if name.lower() in estimate.PRESETS or name.lower() in estimate.SHORT:
        a = estimate.architecture(name)
        return _of_config(_config(a), name) if _transformers() else estimate.on_meta(a)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _of_file(path)
    if ":" in name:
        return call(name, nn.Module, "a torch.nn.Module")
    raise ValueError(f"model {name!r} is none of: {MODEL_HELP}")


def call(name: str, kind: type, what: str, *arguments: Any) -> Any:
    """What ``module:function`` returns, called on the meta device; the working folder is looked in,
    as Python does for a script."""
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}") from None
    try:
        with torch.device("meta"):
            made = found(*arguments)
    except (Exception, SystemExit) as error:  # the user's own code
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise ValueError(f"{name} must return {what}, got {type(made).__name__}")
    return made


def _transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def _config(a: estimate.Architecture) -> dict[str, Any]:
    experts = {"num_local_experts": a.experts, "num_experts_per_tok": a.routed}
    return {
        "model_type": "mixtral" if a.experts else "llama", **(experts if a.experts else {}),
        "hidden_size": a.hidden, "intermediate_size": a.mlp,
        "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "vocab_size": a.vocabulary,
        "num_key_value_heads": a.kv_heads, "head_dim": a.head_size, "tie_word_embeddings": a.tied,
    }  # fmt: skip


def _of_file(path: Path) -> nn.Module:
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path} is no config of a Hugging Face model: it has no model_type")
    if not _transformers():
        raise ValueError(f"{path}: a config needs transformers (pip install transformers)")
    return _of_config(config, str(path))


def _of_config(config: dict[str, Any], where: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    try:
        made = AutoConfig.for_model(**config)
        causal = type(made) in AutoModelForCausalLM._model_mapping
        with torch.device("meta"):
            return (AutoModelForCausalLM if causal else AutoModel).from_config(
                made, dtype=torch.bfloat16
            )
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"{where}: transformers cannot build it: {error}") from None
