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


# ---- modes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """A way to train. ``moments``: of "adam" and "galore", bytes per number of the two moments."""

    name: str
    rule: str  # adam, galore, apollo, mini
    moments: float = 4
    int8: bool = False
    embeddings: bool = False  # in the low-rank group
    release: bool = False

    @property
    def ours(self) -> bool:
        return self.rule in ("apollo", "mini")


# bitsandbytes: a byte per number, and a float32 scale per 256. GaLore: moments as the weights.
EIGHT_BIT = 1 + 4 / 256
MODES = (
    Mode("AdamW, float32 moments", "adam", 4),
    Mode("AdamW, bf16 moments", "adam", 2),
    Mode("8-bit Adam", "adam", EIGHT_BIT),
    Mode("GaLore", "galore", 2),
    Mode("APOLLO", "apollo"),
    Mode("APOLLO-Mini", "mini"),
    Mode("APOLLO-Mini, gradient release, embeddings", "mini", release=True, embeddings=True),
    Mode("Q-APOLLO-Mini, gradient release", "mini", int8=True, release=True, embeddings=True),
)
INT8_GROUP = 128  # of quantize_: neighbours that share a grid of 4 bytes


@dataclass(frozen=True)
class _Weight:
    """What one parameter costs in a mode, in bytes."""

    name: str
    weight: int
    gradient: int
    state: int
    workspace: int  # of its step
    dequantized: int  # while its layer runs


def _weights(module: nn.Module, mode: Mode, rank: int | None) -> list[_Weight]:
    rule = groups.apollo_mini if mode.rule == "mini" else groups.apollo
    options: dict[str, Any] = {"embeddings": mode.embeddings}
    if mode.rule != "mini":
        options["rank"] = rank if mode.rule == "apollo" else _galore_rank(module, rank)
    names = {p: name for name, p in module.named_parameters()}
    return [
        _weight(names[p], p, {"batch_dims": 0, "rank": None, "proj_type": "std", **group}, mode)
        for group in rule(module, **options)
        for p in group["params"]
    ]


def _weight(name: str, p: Tensor, group: dict[str, Any], mode: Mode) -> _Weight:
    layout = state.layout_of(p, group)
    weight = gradient = p.numel() * p.element_size()
    int8 = mode.int8 and p.dim() == 2
    if int8:
        weight = p.numel() + 4 * p.shape[0] * -(-p.shape[1] // INT8_GROUP)
    workspace, rounding = 0, fake.INT8 if int8 else 0
    if mode.ours and layout is not None:
        channels, k = (layout.m, layout.n) if layout.rows else (layout.n, layout.m)
        held, *verbs = fake.low_rank_bytes(channels, k, layout.rank, p.dtype, rounding)
        workspace = held + max(verbs)
    elif mode.ours:
        decays = bool(group.get("weight_decay"))
        workspace = fake.dense_bytes(p.shape, p.dtype, decays, rounding)
    return _Weight(name, weight, gradient, _state(p, group, mode), workspace, gradient * int8)


def _state(p: Tensor, group: dict[str, Any], mode: Mode) -> int:
    """Bytes of optimizer state of one parameter."""
    if mode.ours:
        return tensor_bytes(state.zeros(p, group, "meta").values())
    layout = state.layout_of(p, group)
    if mode.rule == "galore" and layout is not None:  # two moments of R, and the stored projector
        short, long = sorted((layout.m, layout.n))
        return int(mode.moments * 2 * long * layout.rank) + p.element_size() * layout.rank * short
    small = p.numel() < 4096  # which 8-bit Adam keeps in float32
    return int(2 * p.numel() * (4 if small and mode.moments < 2 else mode.moments))


def _galore_rank(module: nn.Module, rank: int | None) -> int | None:
    """A quarter of the hidden size, as in the paper's comparison, unless a rank is asked for."""
    size = getattr(getattr(module, "architecture", None), "hidden", None)
    return rank if rank is not None or size is None else max(1, size // 4)


# ---- the peak ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """One mode: bytes at the moment of the peak, and the peak."""

    mode: str
    checkpointing: bool
    weights: int
    gradients: int
    state: int
    activations: int
    workspace: int
    moment: str

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.state + self.activations + self.workspace


Moment = tuple[str, int, int, int]  # when; gradients, activations, workspace


def _moments(
    a: Architecture, weights: list[_Weight], mode: Mode, tokens: int, checkpointing: bool
) -> list[Moment]:
    """What lives beside weights and state at the moments of a step that can be its peak.

    Backward goes from the head down to the embedding: saved activations fall while gradients grow,
    both linearly, so that the peak is at either end. With gradient release none grow.
    """
    h, f, v = a.hidden, a.mlp, a.vocabulary
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size
    norm = (8 * h + 4) * tokens  # in float32; in bf16 before and after the weight; the variance
    attention = (4 * q + 4 * kv + 4 * a.heads) * tokens  # q, k, v, output; log-sum-exp
    mlp = 8 * f * tokens  # gate, its SiLU, up, their product
    layer = 2 * norm + attention + mlp
    kept = 2 * h * tokens if checkpointing else layer  # per layer, from forward to backward
    stream = 2 * h * tokens  # the gradient that travels down

    def part(prefix: str) -> list[_Weight]:
        return [w for w in weights if prefix in w.name]

    def gradient(some: list[_Weight]) -> int:
        return sum(w.gradient for w in some)

    head, embedding = part("lm_head"), part("embed_tokens")
    head = head or embedding  # tied
    one = [w for w in weights if ".0." in w.name]
    final = [w for w in weights if w.name.endswith("norm.weight") and ".0." not in w.name][-1:]
    own, all_of_it = gradient(one), gradient(weights)
    after = gradient(head) + gradient(final)

    def stepped(some: list[_Weight], now: int, sofar: int) -> tuple[int, int]:
        """Gradients and workspace while the gradients of ``some`` come."""
        if mode.release:
            return max((w.gradient for w in some), default=0), max(w.workspace for w in some)
        return now + sofar, 0

    found: list[Moment] = []
    top = a.layers * kept + norm
    found.append(("loss", 0, top + 12 * v * tokens, 0))
    found.append(("head", *_pair(stepped(head, gradient(head), 0), top + stream)))
    used = max(w.dequantized for w in head)
    found.append(("head", 0 if used else gradient(head), top + stream + 2 * v * tokens + used, 0))
    for i in sorted({0, a.layers - 1}):
        below = i * kept + (stream if checkpointing else 0)
        later = after + own * (a.layers - 1 - i)
        down = [w for w in one if "down_proj" in w.name]
        working = below + layer + 4 * f * tokens + stream
        name = f"backward of layer {i}"
        found.append((name, *_pair(stepped(down, gradient(down), later), working)))
        used = max(w.dequantized for w in one)
        if used:
            found.append((name, 0 if mode.release else later, working + used, 0))
        ending = below + norm + attention + 2 * stream
        found.append((name, *_pair(stepped(one, own, later), ending)))
    rest = all_of_it - gradient(embedding)
    found.append(("embedding", *_pair(stepped(embedding, gradient(embedding), rest), stream)))
    if not mode.release:
        found.append(("step", all_of_it, 0, max(w.workspace for w in weights)))
    return found


def _pair(stepped: tuple[int, int], activations: int) -> tuple[int, int, int]:
    return stepped[0], activations, stepped[1]


def estimate(
    model: str | Path | Architecture | nn.Module,
    *,
    batch: int = 1,
    sequence: int = 2048,
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    modes: Sequence[Mode] = MODES,
    checkpointing: Iterable[bool] = (True, False),
) -> list[Estimate]:
    """What a step takes per mode, with and without checkpointing, at its peak.

    Args
        model: as ``architecture`` takes it; or a module, on the meta device too, of a LLaMA kind
            with a Hugging Face ``config``.
        rank: of APOLLO and GaLore; by default a quarter of the hidden size (APOLLO: at most 256).
    Raises
        ValueError: names what is wrong, in one line.
    """
    for name, value in (("batch", batch), ("sequence", sequence), ("rank", rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if isinstance(model, nn.Module):
        module, a = model, _architecture_of(model)
    else:
        a = model if isinstance(model, Architecture) else architecture(model)
        module = on_meta(a, dtype)
    if rank is None:
        rank = max(1, min(256, a.hidden // 4))
    found = []
    for mode in modes:
        weights = _weights(module, mode, rank if mode.ours else None)
        fixed = sum(w.weight for w in weights), sum(w.state for w in weights)
        for checkpointed in checkpointing:
            moments = _moments(a, weights, mode, batch * sequence, checkpointed)
            when, gradients, activations, workspace = max(moments, key=lambda m: sum(m[1:]))
            found.append(
                Estimate(
                    mode.name, checkpointed, fixed[0], gradients, fixed[1], activations, workspace,
                    when,
                )
            )  # fmt: skip
    return found


def _architecture_of(module: nn.Module) -> Architecture:
    own = getattr(module, "architecture", None)
    if isinstance(own, Architecture):
        return own
    config = getattr(module, "config", None)
    if config is None:
        raise ValueError(f"{type(module).__name__} has no config to take its architecture from")
    return of_config(config, f"the config of {type(module).__name__}")
