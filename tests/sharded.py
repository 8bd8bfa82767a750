"""What the ranks of a group run in tests of sharded parameters, and one process beside them."""

import apollo_kernels  # noqa: F401  (first: it guards torch against the folder triton/)

import torch  # isort: skip
from torch import distributed

from apollo_kernels import APOLLO

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def numbers(shape, seed, dtype=torch.float64):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def mesh_of(shape):
    from torch.distributed.device_mesh import init_device_mesh

    names = ("outer", "inner")[-len(shape) :]
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)


def placed(whole, mesh, placements):
    """The DTensor of ``whole``, which every rank has; placements as text: "0", "1" or "r"."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    kinds = [Replicate() if p == "r" else Shard(int(p)) for p in placements]
    return distribute_tensor(whole, mesh, kinds, src_data_rank=None)


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone()


class Case:
    """A run: groups of parameters by shape, and gradients by step. The same numbers everywhere.

    groups: (options, shapes, placements) each; placements are those of ``placed``.
    """

    def __init__(self, groups, dtype="float32", mesh=None, **options):
        self.dtype, self.groups, self.options = DTYPES[dtype], groups, options
        self.mesh = None if mesh is None else mesh_of(mesh)
        self.places, self.params, made = [], [], []
        for own, shapes, placements in groups:
            params = []
            for shape in shapes:
                whole = numbers(shape, len(self.params), self.dtype)
                self.params.append(torch.nn.Parameter(self.laid(whole, placements)))
                self.places.append(placements)
                params.append((f"p{len(self.params) - 1}", self.params[-1]))
            made.append({**own, "params": params})
        self.optimizer = APOLLO(made, **options)

    def laid(self, whole, placements):
        return whole if self.mesh is None else placed(whole, self.mesh, placements)

    def step(self, step, factor=1.0):
        for i, p in enumerate(self.params):
            whole = factor * numbers(p.shape, 1000 * step + i, self.dtype)
            p.grad = self.laid(whole, self.places[i])
        self.optimizer.step()

    def train(self, steps, factor=1.0):
        for step in steps:
            self.step(step, factor)
        return self

    def result(self):
        """Weights and state as one process would have them, and what the reports say."""
        own = self.optimizer
        found = {"stats": own.stats(), "norm": own.grad_norm}
        for i, p in enumerate(self.params):
            found[i, "weight"] = full(p.detach())
            for key, value in own.state[p].items():
                found[i, key] = full(value) if isinstance(value, torch.Tensor) else value
        return found


def run(groups, dtype, mesh, steps, factor, options):
    """Of a whole case; also on one process without a mesh."""
    with torch.no_grad():
        return Case(groups, dtype, mesh, **options).train(steps, factor).result()


def identity(shapes, mesh, placements, proj):
    """M of a step whose gradient is the identity, with b1 = 0: the projection itself."""
    low = {"rank": 8, "betas": (0.0, 0.9), "proj": proj}
    case = Case([(low, shapes, placements)], "float32", mesh)
    with torch.no_grad():
        for p in case.params:
            p.grad = case.laid(torch.eye(len(p), dtype=torch.float32, device="cpu"), placements)
        case.optimizer.step()
        return [full(case.optimizer.state[p]["exp_avg"]) for p in case.params]
