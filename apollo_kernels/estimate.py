"""Plan before you buy: what a model's training takes in memory, mode by mode, before anything runs.

    architecture(name)     a preset, or a Hugging Face config.json; nothing is downloaded
    estimate(model, ...)   bytes of weights, gradients, state, activations, workspace per mode

Weights and state are counted on tensors of the meta device, by the code that makes them in a run.
Activations are those of transformers' LLaMA in eager mode with an attention kernel that keeps no
scores; bench/memory_claims.py counts the real thing, and both agree within 5 %.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_kernels import fake, groups, state
from apollo_kernels.memory import tensor_bytes

CARDS = {  # GB that a run may use: what is left of the card's GiB is for the context and fragments
    "24 GB (RTX 3090, RTX 4090, L4)": 24e9,
    "40 GB (A100)": 40e9,
    "80 GB (A100, H100)": 80e9,
    "141 GB (H200)": 141e9,
}


# ---- models --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A decoder as LLaMA has it: attention with rotary positions, gated MLP, RMS norms."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int = 32000
    kv_heads: int = 0  # 0: as many as heads
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False
    attention_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_size", self.head_size or self.hidden // self.heads)


PRESETS = {  # the paper's Table 11, and published models of the same kind
    "llama-60m": Architecture(512, 1376, 8, 8),
    "llama-130m": Architecture(768, 2048, 12, 12),
    "llama-350m": Architecture(1024, 2736, 24, 16),
    "llama-1b": Architecture(2048, 5461, 24, 32),
    "llama-7b": Architecture(4096, 11008, 32, 32),
    "llama-13b": Architecture(5120, 13824, 40, 40),
    "llama-3-8b": Architecture(4096, 14336, 32, 32, 128256, 8),
}
SHORT = {name.rsplit("-", 1)[1]: name for name in PRESETS}  # 7b, 8b, ...


def architecture(model: str | Path) -> Architecture:
    """The architecture of a preset ("llama-7b", "7b", ...) or of a config.json.

    Raises
        ValueError: in one line, for a name that is neither, and for a config of another kind.
    """
    name = str(model)
    if name.lower() in PRESETS or name.lower() in SHORT:
        return PRESETS[SHORT.get(name.lower(), name.lower())]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise ValueError(
            f"model {name!r} is neither a file nor one of {', '.join([*PRESETS, *SHORT])}"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    return of_config(config, str(path))


def of_config(config: Any, where: str = "config") -> Architecture:
    """The architecture that a Hugging Face config (its dict, or the object) describes."""
    if not isinstance(config, dict):
        config = config.to_dict() if hasattr(config, "to_dict") else vars(config)
    names = {
        "hidden": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "vocabulary": "vocab_size",
    }  # fmt: skip
    found: dict[str, Any] = {key: config.get(name) for key, name in names.items()}
    for key, name in names.items():
        value = found[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be a whole number above 0, got {value!r}")
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if config.get(name):
            raise ValueError(f"{where}: {name}={config[name]}: experts are not supported")
    for key, name in (("kv_heads", "num_key_value_heads"), ("head_size", "head_dim")):
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{where}: {name} must be a whole number, got {value!r}")
        found[key] = value or 0
    found["tied"] = bool(config.get("tie_word_embeddings", False))
    kind = config.get("model_type", "llama")
    found["attention_bias"] = bool(config.get("attention_bias", kind == "qwen2"))
    return Architecture(**found)


class _Attention(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        inner, shared = a.heads * a.head_size, a.kv_heads * a.head_size
        self.q_proj = nn.Linear(a.hidden, inner, a.attention_bias)
        self.k_proj = nn.Linear(a.hidden, shared, a.attention_bias)
        self.v_proj = nn.Linear(a.hidden, shared, a.attention_bias)
        self.o_proj = nn.Linear(inner, a.hidden, False)


class _Mlp(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.gate_proj = nn.Linear(a.hidden, a.mlp, False)
        self.up_proj = nn.Linear(a.hidden, a.mlp, False)
        self.down_proj = nn.Linear(a.mlp, a.hidden, False)


class _Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class _Layer(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.self_attn, self.mlp = _Attention(a), _Mlp(a)
        self.input_layernorm = _Norm(a.hidden)
        self.post_attention_layernorm = _Norm(a.hidden)


class Decoder(nn.Module):
    """The parameters of an architecture, under transformers' names; there is no forward."""

    def __init__(self, a: Architecture):
        super().__init__()
        self.architecture = a
        self.embed_tokens = nn.Embedding(a.vocabulary, a.hidden)
        self.layers = nn.ModuleList(_Layer(a) for _ in range(a.layers))
        self.norm = _Norm(a.hidden)
        self.lm_head = nn.Linear(a.hidden, a.vocabulary, False)
        if a.tied:
            self.lm_head.weight = self.embed_tokens.weight


def on_meta(a: Architecture, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    with torch.device("meta"):
        return Decoder(a).to(dtype)
