"""Short runs that test_gpu.py repeats on a card, and how far such a run may err."""

import torch

from apollo_kernels import APOLLO

SHAPES = [(129, 64), (64, 129), (40, 40), (1, 7), (300, 17)]
LR = 1e-2
CONFIGURATIONS = {
    "channel": {"rank": 8},
    "signs": {"rank": 16, "proj": "rademacher"},
    "sparse": {"rank": 16, "proj": "sparse"},
    "reverse": {"rank": 8, "proj_type": "reverse_std"},
    "Mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "all switches": {
        "rank": 8, "weight_decay": 0.01, "scale_front": True, "maximize": True,
        "correct_bias": False, "scale": 4.0,
    },
    "AdamW": {"weight_decay": 0.01},
}  # fmt: skip


def train(dtype, device, backend, keys, steps=12):
    """Weights after some steps over a redraw, with gradients that are the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).bfloat16() for s in SHAPES]
    ps = [torch.nn.Parameter(w.to(device, dtype)) for w in start]
    optimizer = APOLLO(ps, lr=LR, update_proj_gap=5, backend=backend, **keys)
    for _ in range(steps):
        for p in ps:
            g = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = g.to(device, dtype)
        optimizer.step()
    return [p.detach().cpu().double() for p in ps], optimizer


def gaussian(keys):
    return "rank" in keys and keys.get("proj", "random") == "random"


def compare(found, dtype, keys, flips):
    """Each weight errs by at most twice what plain PyTorch's does in this dtype.

    ``flips``: the back end draws normals by a GPU's fast functions, so that 1 entry of Z in 1000
    may be bf16's other neighbour, 2^-8 away (DESIGN.md, "Random numbers"). Where it meets a large
    entry of a channel, R_c and with it s_c move by as much at most: 2^-8 of what the run moved the
    weight.
    """
    exact, _ = train(torch.float64, "cpu", "torch", keys)
    plain, _ = train(dtype, "cpu", "torch", keys)
    start, _ = train(torch.float64, "cpu", "torch", keys, steps=0)
    for f, p, e, s in zip(found, plain, exact, start, strict=True):
        # the floor: one rounding of the largest weight, which the plain run may happen to escape
        slack = 4 * torch.finfo(dtype).eps * e.abs().max()
        if flips and gaussian(keys):
            slack += 2**-8 * (e - s).abs().max()
        assert (f - e).abs().max() <= 2 * (p - e).abs().max() + slack
