"""What the Python blocks of README.md and docs/ may use without making it (tests/test_docs.py).

A page's blocks run one after the other in one namespace, which begins with what ``names()`` gives:
a small model whose layers are called as LLaMA's, some data, and a checkpoint of apollo_torch.
"""

import sys
import types

import torch
from torch import nn

VOCABULARY, HIDDEN, MLP = 64, 32, 48


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.v_proj, self.o_proj = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, MLP), nn.Linear(HIDDEN, MLP)
        self.down_proj = nn.Linear(MLP, HIDDEN)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class SmallModel(nn.Module):
    """Next-token prediction; gives the loss, as models of transformers do with labels."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def names():
    """The namespace that a page starts with, in a folder of its own."""
    torch.manual_seed(0)
    model = SmallModel()
    batches = [torch.randint(0, VOCABULARY, (2, 9)) for _ in range(4)]
    layer = model.layers[0]
    matrices, dense = (
        [layer.mlp.up_proj.weight, layer.mlp.down_proj.weight],
        [layer.mlp.up_proj.bias],
    )
    write_old_checkpoint("old_optimizer.pt", dense, matrices)
    return {
        "model": model,
        "batches": batches,
        "micro_batches": batches,
        "loss_of": model,
        "matrices": matrices,
        "dense": dense,
    }


def write_old_checkpoint(path, dense, matrices):
    """As apollo_torch writes it at rank 256: projector objects, moments [m, r] or [r, n]."""
    projector_class = type("GradientProjector", (), {"__module__": "apollo_torch.projector"})
    state = {}
    for i, p in enumerate([*dense, *matrices]):
        side, shape = min(p.shape), p.shape
        if p.dim() == 2:
            shape = (p.shape[0], side) if p.shape[0] >= p.shape[1] else (side, p.shape[1])
        state[i] = {"step": 30, "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.ones(shape)}
        if p.dim() == 2:
            projector = projector_class()
            projector.rank, projector.ortho_matrix = side, torch.randn(side, side)
            state[i].update(seed=i, projector=projector, scaled_grad=torch.tensor(1.0))
    low = {"rank": 256, "proj": "random", "scale_type": "channel", "scale": 1.0}
    low |= {"proj_type": "std", "update_proj_gap": 200}
    groups = [
        {"params": list(range(len(dense))), "lr": 1e-2},
        {"params": list(range(len(dense), len(state))), "lr": 1e-2, **low},
    ]
    module = types.ModuleType("apollo_torch.projector")
    module.GradientProjector = projector_class
    before = {name: sys.modules.get(name) for name in ("apollo_torch", "apollo_torch.projector")}
    sys.modules.update({"apollo_torch": types.ModuleType("apollo_torch"), module.__name__: module})
    try:
        torch.save({"state": state, "param_groups": groups}, path)
    finally:
        for name, old in before.items():
            sys.modules.pop(name)
            if old is not None:
                sys.modules[name] = old
