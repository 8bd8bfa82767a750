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
from dataclasses import dataclass, fields
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
    """A decoder as LLaMA has it: attention with rotary positions, gated MLP, RMS norms.

    With ``experts``, each MLP is that many gated ones of size ``expert_mlp``, of which a token
    takes ``routed``, and a shared one of size ``shared_mlp`` if that is not 0.
    """

    hidden: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int = 32000
    kv_heads: int = 0  # 0: as many as heads
    head_size: int = 0  # 0: hidden / heads
    tied: bool = False
    attention_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    experts: int = 0
    routed: int = 0
    expert_mlp: int = 0  # 0: mlp
    shared_mlp: int = 0
    head_norms: bool = False  # of queries and keys, as Qwen3 has them

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "head_size", self.head_size or self.hidden // self.heads)
        object.__setattr__(self, "expert_mlp", self.expert_mlp or self.mlp)

    @property
    def width(self) -> int:
        """Of the MLPs that one token goes through, together."""
        return self.routed * self.expert_mlp + self.shared_mlp if self.experts else self.mlp


PRESETS = {  # the paper's Table 11, and published models of the same kind
    "llama-60m": Architecture(512, 1376, 8, 8),
    "llama-130m": Architecture(768, 2048, 12, 12),
    "llama-350m": Architecture(1024, 2736, 24, 16),
    "llama-1b": Architecture(2048, 5461, 24, 32),
    "llama-7b": Architecture(4096, 11008, 32, 32),
    "llama-13b": Architecture(5120, 13824, 40, 40),
    "llama-3-8b": Architecture(4096, 14336, 32, 32, 128256, 8),
    "mixtral-8x7b": Architecture(4096, 14336, 32, 32, 32000, 8, experts=8, routed=2),
}
SHORT = {name.rsplit("-", 1)[1]: name for name in PRESETS}  # 7b, 8b, ...


def architecture(model: str | Path) -> Architecture:
    """The architecture of a preset ("llama-7b", "7b", ...) or of a config.json.

    Raises
        ValueError: in one line, for a name that is neither, and for a config whose model_type is
            not among those that are known to be built as LLaMA is.
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
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, dict):
        raise ValueError(f"{where}: config.json holds no dict but a {type(config).__name__}")
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise ValueError(
            f"{where}: model_type={kind!r} is not known to be built as LLaMA is; supported are "
            f"{', '.join(_KINDS)}"
        )
    biases, meant = _KINDS[kind]
    unread = set(_BIASES) - set(biases)
    config = {**meant, **{key: value for key, value in config.items() if key not in unread}}
    names = {
        "hidden": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "vocabulary": "vocab_size",
    }  # fmt: skip
    found: dict[str, Any] = {}
    for key, name in names.items():
        found[key] = _size(config, name, where)
    found.update(_experts_of(config, where))
    for key, name in (("kv_heads", "num_key_value_heads"), ("head_size", "head_dim")):
        found[key] = 0 if config.get(name) is None else _size(config, name, where)
    if found["heads"] % (found["kv_heads"] or 1):
        raise ValueError(
            f"{where}: num_key_value_heads={found['kv_heads']} does not divide "
            f"num_attention_heads={found['heads']}"
        )
    if not found["head_size"] and found["hidden"] % found["heads"]:
        raise ValueError(
            f"{where}: num_attention_heads={found['heads']} does not divide "
            f"hidden_size={found['hidden']}"
        )
    found["tied"] = _switch(config, "tie_word_embeddings", where)
    found["output_bias"] = _switch(config, "attention_bias", where)
    found["attention_bias"] = _switch(config, "qkv_bias", where) or found["output_bias"]
    found["mlp_bias"] = _switch(config, "mlp_bias", where)
    found["head_norms"] = kind in ("qwen3", "qwen3_moe")
    return Architecture(**found)


# model_type: which biases its config decides on, and what it has where the config leaves a key out
# and that is not what LLaMA has then. tests/test_estimate.py holds each to transformers.
_BIASES = ("attention_bias", "qkv_bias", "mlp_bias")
_BOTH = ("attention_bias", "mlp_bias")
_KINDS: dict[str, tuple[Sequence[str], dict[str, Any]]] = {
    "llama": (_BOTH, {}),
    "granite": (_BOTH, {}),
    "smollm3": (_BOTH, {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ((), {"num_key_value_heads": 8}),
    "qwen2": ((), {"num_key_value_heads": 32, "qkv_bias": True}),
    "qwen3": (("attention_bias",), {"num_key_value_heads": 32, "head_dim": 128}),
    "mixtral": ((), {"num_key_value_heads": 8}),
    "qwen2_moe": (("qkv_bias",), {"num_key_value_heads": 16, "qkv_bias": True}),
    "qwen3_moe": (("attention_bias",), {"num_key_value_heads": 4}),
}

# model_type: what calls the size of an expert. How many there are has several names.
_MIXTURES = {
    "mixtral": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
_NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts")


def _experts_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The experts of a config, if it has any."""
    number = next((name for name in _NUMBERS if config.get(name)), None)
    kind = config["model_type"]
    if number is None:
        if kind in _MIXTURES:
            raise ValueError(f"{where}: model_type={kind!r} without a number of experts")
        return {}
    if kind not in _MIXTURES:
        raise ValueError(
            f"{where}: {number}={config[number]}: experts are not supported for "
            f"model_type={kind!r}, but for {', '.join(_MIXTURES)}"
        )
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError(f"{where}: layers with and without experts in turn are not supported")
    names = {"experts": number, "routed": "num_experts_per_tok", "expert_mlp": _MIXTURES[kind]}
    if kind == "qwen2_moe":
        names["shared_mlp"] = "shared_expert_intermediate_size"
    return {key: _size(config, name, where) for key, name in names.items()}


def _size(config: dict[str, Any], name: str, where: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{where}: {name} must be a whole number above 0, got {value!r}")
    if value >= 2**31:
        raise ValueError(f"{where}: {name} must be below 2^31, got {value}")
    return value


def _switch(config: dict[str, Any], name: str, where: str) -> bool:
    value = config.get(name)
    if value not in (None, False, True):
        raise ValueError(f"{where}: {name} must be true or false, got {value!r}")
    return bool(value)


class _Attention(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        inner, shared = a.heads * a.head_size, a.kv_heads * a.head_size
        self.q_proj = nn.Linear(a.hidden, inner, a.attention_bias)
        self.k_proj = nn.Linear(a.hidden, shared, a.attention_bias)
        self.v_proj = nn.Linear(a.hidden, shared, a.attention_bias)
        self.o_proj = nn.Linear(inner, a.hidden, a.output_bias)
        if a.head_norms:
            self.q_norm, self.k_norm = _Norm(a.head_size), _Norm(a.head_size)


class _Mlp(nn.Module):
    def __init__(self, hidden: int, size: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias)
        self.up_proj = nn.Linear(hidden, size, bias)
        self.down_proj = nn.Linear(size, hidden, bias)


class _Router(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(a.experts, a.hidden))


class _Experts(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(a.experts, 2 * a.expert_mlp, a.hidden))
        self.down_proj = nn.Parameter(torch.empty(a.experts, a.hidden, a.expert_mlp))


class _Mixture(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.gate, self.experts = _Router(a), _Experts(a)
        if a.shared_mlp:
            self.shared_expert = _Mlp(a.hidden, a.shared_mlp)
            self.shared_expert_gate = nn.Linear(a.hidden, 1, False)


class _Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class _Layer(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.self_attn = _Attention(a)
        self.mlp = _Mixture(a) if a.experts else _Mlp(a.hidden, a.mlp, a.mlp_bias)
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
    dense_state: str = "float32"  # of what is not in the low-rank group

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
    Mode("APOLLO-Mini, int8 dense moments", "mini", dense_state="int8"),
    Mode("APOLLO-Mini, gradient release, embeddings", "mini", release=True, embeddings=True),
    Mode("Q-APOLLO-Mini, gradient release", "mini", int8=True, release=True, embeddings=True),
)
INT8_GROUP = 128  # of quantize_: neighbours that share a grid of 4 bytes
WIDENED = 2**24  # int8 weights that a layer dequantizes at a time, as float32, on a card


@dataclass(frozen=True)
class _Weight:
    """What one parameter costs in a mode, in bytes."""

    name: str
    weight: int
    gradient: int
    state: int
    workspace: int  # of its step
    dequantized: int  # while its layer runs


def _weights(module: nn.Module, mode: Mode, rank: int | None, hidden: int) -> list[_Weight]:
    options = {"embeddings": mode.embeddings, "dense_state": mode.dense_state}
    if mode.rule == "mini":
        made = groups.apollo_mini(module, **options)
    else:  # GaLore's rank is the paper's: a quarter of the hidden size
        quarter = max(1, hidden // 4)
        rank = rank or (quarter if mode.rule == "galore" else min(256, quarter))
        made = groups.apollo(module, rank=rank, **options)
    names = {p: name for name, p in module.named_parameters()}
    return [
        _weight(names[p], p, {"batch_dims": 0, "rank": None, "proj_type": "std", **group}, mode)
        for group in made
        for p in group["params"]
    ]


def _weight(name: str, p: Tensor, group: dict[str, Any], mode: Mode) -> _Weight:
    layout = state.layout_of(p, group)
    weight = gradient = p.numel() * p.element_size()
    # quantize_ and the low-rank group choose alike, but for experts, which it leaves.
    int8 = mode.int8 and layout is not None and not layout.batch
    if int8:
        weight = p.numel() + 4 * p.shape[0] * -(-p.shape[1] // INT8_GROUP)
    rounded = fake.int8_format(p.shape[1], INT8_GROUP) if int8 else ""
    workspace = 0  # of one matrix: experts are stepped one after the other
    if mode.ours and layout is not None:
        channels, k = (layout.m, layout.n) if layout.rows else (layout.n, layout.m)
        workspace = fake.low_rank_bytes(channels, k, layout.rank, p.dtype, rounded=rounded).most
    elif mode.ours:
        _, moments = state.expected(p, group)["exp_avg"]
        workspace = fake.dense_bytes(p.shape, p.dtype, rounded=rounded, moments=moments)
    widened = 4 * min(p.numel(), WIDENED)
    dequantized = (gradient + widened) * int8
    return _Weight(name, weight, gradient, _state(p, group, mode), workspace, dequantized)


def _state(p: Tensor, group: dict[str, Any], mode: Mode) -> int:
    """Bytes of optimizer state of one parameter."""
    if mode.ours:
        return tensor_bytes(state.zeros(p, group, "meta").values())
    layout = state.layout_of(p, group)
    if mode.rule == "galore" and layout is not None:  # two moments of R, and the stored projector
        short, long = sorted((layout.m, layout.n))
        projector = p.element_size() * layout.rank * short
        return layout.matrices * (int(mode.moments * 2 * long * layout.rank) + projector)
    small = p.numel() < 4096  # which 8-bit Adam keeps in float32
    return int(2 * p.numel() * (4 if small and mode.moments < 2 else mode.moments))


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
    experts: int = 0  # per layer

    @property
    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in PARTS}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> list[str]:
        return [name for name, size in CARDS.items() if self.peak <= size]

    @property
    def dominant(self) -> str:
        return max(self.parts, key=self.parts.__getitem__)

    def as_dict(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own.update(peak=self.peak, fits=self.fits, dominant=self.dominant, advice=advice(self))
        return own


PARTS = ("weights", "gradients", "state", "activations", "workspace")


def advice(e: Estimate) -> str:
    """What makes the largest part smaller."""
    low_rank = "embeddings" in e.mode
    ours = "APOLLO" in e.mode
    if ours and e.gradients == e.weights == max(e.parts.values()):
        return "gradient_release=True: a few gradients live at a time"
    if e.dominant == "weights":
        if e.mode.startswith("Q-") or (e.experts and "release" in e.mode):
            return "nothing smaller is left: a smaller model, or sharding"
        if not ours:
            return "APOLLO, whose weights can be int8 (quantize_) and whose gradients are released"
        return "quantize_(model): a byte per weight instead of two"
    if e.dominant == "gradients":
        return "APOLLO with gradient_release=True: a few gradients live at a time"
    if e.dominant == "state":
        if e.mode.startswith("APOLLO") and not low_rank:
            smaller = "" if "dense moments" in e.mode else ', or dense_state="int8"'
            return f"embeddings=True: embedding and head join the low-rank group{smaller}"
        return "apollo_mini(model): almost no state; apollo(model): a fraction"
    if e.dominant == "workspace":
        return "the model is small: PyTorch's temporaries outweigh it, the kernels have none"
    if not e.checkpointing:
        return "gradient checkpointing"
    if e.moment == "loss":
        return "a smaller micro-batch, or a loss that never holds all logits (chunked or fused)"
    return "a smaller micro-batch with accumulation"


Moment = tuple[str, int, int, int]  # when; gradients, activations, workspace


def _moments(
    a: Architecture,
    weights: list[_Weight],
    mode: Mode,
    tokens: int,
    dtype: torch.dtype,
    checkpointing: bool,
    ddp: str,
) -> list[Moment]:
    """What lives beside weights and state at the moments of a step that can be its peak.

    Backward goes from the head down to the embedding: saved activations fall while gradients grow,
    both linearly, so that the peak is at either end. With gradient release none grow.
    """
    h, f, v, size = a.hidden, a.width, a.vocabulary, dtype.itemsize
    q, kv = a.heads * a.head_size, a.kv_heads * a.head_size
    # A norm keeps x in float32, x in the weight's dtype before it is multiplied (in float32 that is
    # one more tensor), its result, and the variance.
    norm = ((4 + 2 * size) * h + 4) * tokens
    attention = (2 * size * (q + kv) + 4 * a.heads) * tokens  # q, k, v, output; log-sum-exp
    mlp = 4 * size * f * tokens  # gate, its SiLU, up, their product
    if a.experts:  # each one's tokens, gathered, and what it answers, before they are weighed
        mlp += size * h * (2 * a.routed + bool(a.shared_mlp)) * tokens
    if a.head_norms:
        attention += ((4 + size) * (q + kv) + 4 * (a.heads + a.kv_heads)) * tokens
    layer = 2 * norm + attention + mlp
    kept = size * h * tokens if checkpointing else layer  # per layer, from forward to backward
    stream = size * h * tokens  # the gradient that travels down
    logits = size * v * tokens

    def part(prefix: str) -> list[_Weight]:
        return [w for w in weights if prefix in w.name]

    def gradient(some: list[_Weight]) -> int:
        return sum(w.gradient for w in some)

    one, embedding = part(".0."), part("embed_tokens")
    down = [w for w in part(".0.mlp.") if "down_proj" in w.name]
    if not one or not down or not embedding:
        raise ValueError("the module has no parameters named as LLaMA's: embed_tokens, down_proj")
    head = part("lm_head") or embedding  # tied
    final = [w for w in weights if w.name.endswith("norm.weight") and ".0." not in w.name][-1:]
    own, all_of_it = gradient(one), gradient(weights)
    after = gradient(head) + gradient(final)

    def stepped(some: list[_Weight], now: int, sofar: int) -> tuple[int, int]:
        """Gradients and workspace while the gradients of ``some`` come."""
        if mode.release:
            return max(w.gradient for w in some), max(w.workspace for w in some)
        if ddp == "views":  # gradients come one at a time and are copied into the buckets
            return max(w.gradient for w in some), 0
        return now + sofar, 0

    found: list[Moment] = []
    top = a.layers * kept + norm
    found.append(("loss", 0, top + 12 * v * tokens, 0))  # three of the logits, in float32
    found.append(("head", *_pair(stepped(head, gradient(head), 0), top + stream)))
    used = max(w.dequantized for w in head)
    found.append(("head", 0 if used else gradient(head), top + stream + logits + used, 0))
    dequantized = max(w.dequantized for w in one)
    for i in sorted({0, a.layers - 1}):
        below = i * kept + (stream if checkpointing else 0)
        later = after + own * (a.layers - 1 - i)
        name, width = f"backward of layer {i}", size * f * tokens
        product = below + layer + width + stream  # the last matrix: its gradient, and its input's
        found.append((name, *_pair(stepped(down, gradient(down), later), product)))
        sofar = 0 if mode.release or ddp == "views" else later + gradient(down)
        found.append((name, sofar, product + width, 0))  # through the product and the SiLU
        found.append((name, sofar - gradient(down) * (sofar > 0), product + dequantized, 0))
        ending = below + norm + attention + 2 * stream
        found.append((name, *_pair(stepped(one, own, later), ending)))
    rest = all_of_it - gradient(embedding)
    found.append(("embedding", *_pair(stepped(embedding, gradient(embedding), rest), stream)))
    if not mode.release:
        whole = 0 if ddp == "views" else all_of_it
        found.append(("step", whole, 0, max(w.workspace for w in weights)))
    buckets = all_of_it if ddp else 0
    return [(name, now + buckets, kept, used) for name, now, kept, used in found]


def _pair(stepped: tuple[int, int], activations: int) -> tuple[int, int, int]:
    return stepped[0], activations, stepped[1]


def estimate(
    model: str | Path | Architecture | nn.Module,
    *,
    batch: int = 1,
    sequence: int = 2048,
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ddp: str = "",
    modes: Sequence[Mode] = MODES,
    checkpointing: Iterable[bool] = (True, False),
) -> list[Estimate]:
    """What a step takes per mode, with and without checkpointing, at its peak.

    Args
        model: as ``architecture`` takes it; or a module, on the meta device too, of a LLaMA kind
            with a Hugging Face ``config``: llama, mistral, qwen2, qwen3, granite, smollm3, mixtral,
            qwen2_moe, qwen3_moe. Experts are matrices of the low-rank group, and activations those
            of transformers' grouped_mm.
        ddp: "buckets" or "views", under DistributedDataParallel without or with
            gradient_as_bucket_view; modes with gradient release do not run there.
        rank: of APOLLO and GaLore; by default a quarter of the hidden size (APOLLO: at most 256).
    Raises
        ValueError: names what is wrong, in one line.
    """
    for name, value in (("batch", batch), ("sequence", sequence), ("rank", rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if ddp not in ("", "buckets", "views"):
        raise ValueError(f"ddp must be '', 'buckets' or 'views', got {ddp!r}")
    if ddp:
        modes = [mode for mode in modes if not mode.release]
    if isinstance(model, nn.Module):
        module, a = model, _architecture_of(model)
        dtype = next(model.parameters()).dtype
    else:
        a = model if isinstance(model, Architecture) else architecture(model)
        module = on_meta(a, dtype)
    found = []
    for mode in modes:
        weights = _weights(module, mode, rank, a.hidden)
        fixed = sum(w.weight for w in weights), sum(w.state for w in weights)
        for checkpointed in checkpointing:
            moments = _moments(a, weights, mode, batch * sequence, dtype, checkpointed, ddp)
            when, gradients, activations, workspace = max(moments, key=lambda m: sum(m[1:]))
            found.append(
                Estimate(
                    mode.name, checkpointed, fixed[0], gradients, fixed[1], activations, workspace,
                    when, a.experts,
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


# ---- what is shown -------------------------------------------------------------------------------


def as_text(found: Sequence[Estimate], title: str) -> str:
    """A table per kind of checkpointing; GB are 1e9 bytes."""
    lines = [
        title,
        "GB (1e9 bytes) at the moment of a step's peak; a card keeps the rest of its GiB",
    ]
    width = max(len(e.mode) for e in found)
    short = [name.split(" (")[0] for name in CARDS]
    for checkpointed in dict.fromkeys(e.checkpointing for e in found):
        lines += ["", "with checkpointing" if checkpointed else "without checkpointing"]
        header = "".join(f"{name:>12}" for name in (*PARTS, "peak"))
        lines.append(f"{'':<{width}}{header}  fits on")
        for e in (e for e in found if e.checkpointing == checkpointed):
            sizes = "".join(f"{size / 1e9:>12.2f}" for size in (*e.parts.values(), e.peak))
            smallest = next((c for c, n in zip(short, CARDS, strict=True) if n in e.fits), None)
            fits = f"{smallest} and larger" if smallest else "none of them"
            lines.append(f"{e.mode:<{width}}{sizes}  {fits}")
        for e in (e for e in found if e.checkpointing == checkpointed):
            share = e.parts[e.dominant] / max(e.peak, 1)
            lines.append(f"  {e.mode}: {share:.0%} {e.dominant} -> {advice(e)}")
    lines += ["", "cards: " + "; ".join(CARDS)]
    return "\n".join(lines)


COLORS = ("#37474F", "#A3ABB8", "#C8553D", "#2A7F9E", "#E0B04B")  # of PARTS


def chart(found: Sequence[Estimate], title: str, path: str | Path) -> None:
    """Stacked bars of all modes, beside the cards, as a PNG.

    Raises
        ValueError: if matplotlib is not installed, or the file cannot be written.
    """
    from apollo_kernels.commands.output import matplotlib_figure, save_figure

    kinds = list(dict.fromkeys(e.checkpointing for e in found))
    rows = max(sum(e.checkpointing == kind for e in found) for kind in kinds)
    figure = matplotlib_figure("--png", figsize=(9, (1.1 + 0.42 * rows) * len(kinds) + 0.6))
    widest = max(e.peak for e in found) / 1e9
    panels = figure.subplots(len(kinds), 1, squeeze=False, sharex=True)[:, 0]
    for axes, checkpointed in zip(panels, kinds, strict=True):
        bars = [e for e in reversed(found) if e.checkpointing == checkpointed]
        names, left = [e.mode for e in bars], [0.0] * len(bars)
        for part, color in zip(PARTS, COLORS, strict=True):
            sizes = [e.parts[part] / 1e9 for e in bars]
            axes.barh(names, sizes, left=left, color=color, label=part, height=0.66)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        for place, total in enumerate(left):
            axes.text(total + widest * 0.01, place, f"{total:.1f}", va="center", fontsize=9)
        for name, size in CARDS.items():
            if size / 1e9 <= widest * 1.08:
                axes.axvline(size / 1e9, color="#777777", linewidth=0.8, linestyle=":", zorder=0)
                axes.text(size / 1e9, len(bars) - 0.45, name.split(" (")[0], fontsize=8,
                          color="#555555", ha="center", va="bottom")  # fmt: skip
        axes.set_title("with checkpointing" if checkpointed else "without checkpointing",
                       loc="left", fontsize=10, pad=16)  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, widest * 1.1)
    panels[-1].set_xlabel("GB at the peak of a step")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), frameon=False)
    figure.suptitle(title, fontweight="bold")
    save_figure(figure, path)


def command(options: Any) -> str:
    """What ``python -m apollo_kernels estimate`` prints; ValueError in one line for wrong input."""
    from apollo_kernels.commands.output import check_target, matplotlib_figure

    if options.png is not None:
        matplotlib_figure("--png")
    check_target(options.png, options.force)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[options.dtype]
    kinds = {"both": (True, False), "on": (True,), "off": (False,)}[options.checkpointing]
    found = estimate(
        options.model, batch=options.batch, sequence=options.sequence, rank=options.rank,
        dtype=dtype, ddp=options.ddp, checkpointing=kinds,
    )  # fmt: skip
    title = f"{options.model}, batch {options.batch} x {options.sequence}, {options.dtype}"
    if (a := architecture(options.model)).experts:
        title += f"\n{a.experts} experts per layer, {a.routed} per token: each a low-rank matrix"
    if options.png is not None:
        chart(found, title, options.png)
    if options.json:
        return json.dumps([e.as_dict() for e in found], indent=2)
    return as_text(found, title)


def add_arguments(parser: Any) -> None:
    parser.description = (
        "What one training step takes at its peak, before anything runs: weights, gradients, "
        "optimizer state and activations, for AdamW, 8-bit Adam, GaLore and the modes of this "
        "package; what dominates, what would make it smaller, and which cards it fits on. Nothing "
        f"is downloaded, and no GPU is needed. A config.json is one of {', '.join(_KINDS)}."
    )
    parser.epilog = """examples:
  python -m apollo_kernels estimate 7b
  python -m apollo_kernels estimate ./my-model/config.json --batch 4 --sequence 4096
  python -m apollo_kernels estimate 8b --checkpointing on --png 8b.png"""
    parser.add_argument("model", help=f"{', '.join([*SHORT])}, or the path of a config.json")
    add = parser.add_argument
    add("--batch", type=int, default=1, help="sequences per micro-batch; default 1")
    add("--sequence", type=int, default=2048, help="tokens per sequence; default 2048")
    parser.add_argument("--rank", type=int, help="of APOLLO; default: hidden size / 4, at most 256")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16"
    )
    parser.add_argument(
        "--checkpointing",
        choices=("both", "on", "off"),
        default="both",
        help="recomputing activations in backward; default both",
    )
    parser.add_argument(
        "--ddp",
        choices=("buckets", "views"),
        default="",
        help="under DistributedDataParallel: gradients beside its buckets, or views into them",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--png", metavar="FILE", help="stacked bars (needs matplotlib)")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
