"""Small mixtures of experts: transformers' own, and one on torch's grouped_mm."""

import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

import torch  # isort: skip
from sharded import contents, mesh_of
from torch import distributed, nn

from apollo_kernels import APOLLO, apollo

SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS = {  # the config's class, and what it adds
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20,
    },
    "Qwen3Moe": {"num_experts": 5, "moe_intermediate_size": 12, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}  # fmt: skip


def of_transformers(kind, **sizes):
    """A causal language model of transformers of this kind, the same at each call."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS[kind], **sizes})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def language_loss(model, step):
    generator = torch.Generator(device="cpu").manual_seed(step)
    ids = torch.randint(SIZES["vocab_size"], (4, 8), generator=generator, device="cpu")
    ids = ids.to(next(model.parameters()).device)
    return model(input_ids=ids, labels=ids).loss


class Grouped(nn.Module):
    """Tokens go to the expert that their router likes best; weights [E, in, out] as grouped_mm has
    them. It is called, and holds, nothing that speaks of experts."""

    def __init__(self, number, size, inner):
        super().__init__()
        self.router = nn.Linear(size, number, bias=False)
        self.w1 = nn.Parameter(torch.randn(number, size, inner) / size**0.5)
        self.w2 = nn.Parameter(torch.randn(number, inner, size) / inner**0.5)

    def forward(self, x):
        likes = self.router(x).softmax(-1)
        best, which = likes.max(-1)
        order = which.argsort(stable=True)
        ends = torch.bincount(which, minlength=len(self.w1)).cumsum(0).to(torch.int32)
        inner = _multiplied(x[order], self.w1, ends).relu()
        answers = _multiplied(inner, self.w2, ends) * best[order, None]
        return torch.zeros_like(x).index_add(0, order, answers.to(x.dtype))


def _multiplied(x, weights, ends):
    if hasattr(torch, "_grouped_mm") and x.dtype == torch.bfloat16:  # it wants multiples of 8
        return torch._grouped_mm(x, weights, offs=ends)
    starts = [0, *ends.tolist()]
    parts = [x[a:b] @ w for a, b, w in zip(starts[:-1], starts[1:], weights, strict=True)]
    return torch.cat(parts)


class Model(nn.Module):
    def __init__(self, number, size):
        super().__init__()
        self.embed = nn.Embedding(11, size)
        self.mlp = Grouped(number, size, size + 8)
        self.mix = nn.Linear(size, size)
        self.head = nn.Linear(size, 11)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.mix(x + self.mlp(x)))


def grouped(number=3, dtype=torch.float64, size=10):
    torch.manual_seed(1)
    return Model(number, size).to(dtype)


def grouped_loss(model, step, rank=0, world=1):
    """Of this rank's share of 24 tokens."""
    generator = torch.Generator(device="cpu").manual_seed(step)
    ids = torch.randint(11, (24,), generator=generator, device="cpu")
    ids = ids.to(next(model.parameters()).device)[rank * 24 // world : (rank + 1) * 24 // world]
    return nn.functional.cross_entropy(model(ids), (ids * 7 + 3) % 11)


def fsdp(number, mesh, steps):
    """Weights and state of ``grouped`` after some steps; cut by fully_shard, if there is a mesh.

    And where the weights of experts and their moments lie.
    """
    model = grouped(number)
    rank, world = 0, 1
    if mesh is not None:
        from torch.distributed.fsdp import fully_shard

        rank, world = distributed.get_rank(), distributed.get_world_size()
        fully_shard(model.mlp, mesh=mesh_of(mesh))
        fully_shard(model, mesh=mesh_of(mesh))
    optimizer = APOLLO(apollo(model, rank=4, weight_decay=0.1, update_proj_gap=3), lr=0.01)
    for step in steps:
        optimizer.zero_grad()
        grouped_loss(model, step, rank, world).backward()
        optimizer.step()
    state = optimizer.state[model.mlp.w1]
    cut = [getattr(t, "placements", None) for t in (model.mlp.w1, *map(state.get, STATE))]
    return contents(model, optimizer), [str(c[0]) if c else None for c in cut]


STATE = ("exp_avg", "exp_avg_sq", "update_norm")
