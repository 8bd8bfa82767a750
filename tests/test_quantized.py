"""int8 weights: the numbers, layers and models that hold them, and APOLLO's step over them."""

import copy
import io
import math
import pickle

import pytest
import torch
from conftest import running
from helpers import changed, fill, randn, refuses, same, snapshot, train
from restatement import Int8Group, half_of, philox
from torch import nn
from torch.nn import functional

import apollo_kernels
from apollo_kernels import APOLLO, Int8Weight, backends, dequantize_, int8, quantize_, reference
from apollo_kernels.batch import Dense, Hyper, Signals
from apollo_kernels.philox import ROUNDING_INT8, rounding_bits
from apollo_kernels.quantized import quantized

# ---- the numbers ---------------------------------------------------------------------------------

WILD = [
    [0.0] * 8,
    [0.3] * 8,  # all equal
    [-0.3] * 8,
    [1e-3],  # a group of one
    [0.0, 0.0, 5.0, 0.0],
    [1e30, -3e30, 0.0, 2.0],
    [3e38, -3e38, 1.0, 0.0],
    [1e-38, -1e-40, 0.0],
    [1e-45, 0.0],
    [1.0, 1e-30, -1e-30, 0.0],
]


def numbers_of(t):
    scale, zero = int8.scale_and_zero(t)
    return scale.flatten().tolist(), zero.flatten().tolist()


@pytest.mark.parametrize("seed", range(3))
def test_codes_and_grids_are_the_contracts(seed):
    """Quantized, then updated by chance a few times, up and down, far and near."""
    generator = torch.Generator().manual_seed(seed)
    for values in [*WILD, torch.randn(8, generator=generator).tolist()]:
        w = torch.tensor([values])
        codes, grid = int8.quantize(w, 8)
        group = Int8Group(w[0].tolist())
        for growth in (0.0, 1e-3, 0.5, 30.0, -1.01, 0.2, 1e-6):
            assert numbers_of(grid) == ([float(group.scale)], [group.zero])
            assert codes[0].tolist() == group.codes
            old = int8.dequantize(codes, grid)
            assert old[0].tolist() == group.values()  # exact in float32
            factor = 1 + growth * torch.rand(w.shape, generator=generator)
            new = old * factor
            bits = torch.randint(0, 65536, w.shape, generator=generator, dtype=torch.int32)
            int8.requantize(codes, grid, old, new, bits)
            group.store(new[0].tolist(), bits[0].tolist())


@pytest.mark.parametrize("shape", [(5, 300), (1, 128), (7, 1), (3, 129), (0, 128), (4, 0)])
def test_quantizing_goes_to_the_nearest_and_keeps_zeros(shape):
    w = torch.randn(shape)
    w[:, ::5] = 0
    codes, grid = int8.quantize(w, 128)
    assert grid.shape == (shape[0], math.ceil(shape[1] / 128))
    found = int8.dequantize(codes, grid)
    scale = int8.scale_and_zero(grid)[0].repeat_interleave(128, 1)[:, : shape[1]]
    # half a code, and float32's error of the quotient, below 256 half steps of 2^-16
    assert ((found - w).abs() <= scale * (0.5 + 2**-8)).all()
    assert (found[w == 0] == 0).all()


def test_a_group_size_is_told_by_its_shapes():
    for size in (8, 16, 32, 64, 128, 256, 1024):
        for columns in (1, 7, 8, 127, 128, 129, 1000, 4096):
            groups = math.ceil(columns / size)
            found = int8.group_size(columns, groups)
            assert found == size or (groups == 1 and found <= size)
    with pytest.raises(ValueError, match="100 weights into 50"):
        int8.group_size(100, 50)


def test_rounding_is_unbiased():
    """Over all 65536 draws the mean code is x, to the half of 1/65536 that x is rounded by."""
    grid = int8.fit(torch.tensor([-1.0]), torch.tensor([1.3]))
    scale, zero = int8.scale_and_zero(grid)
    bits = torch.arange(65536, dtype=torch.int32).view(-1, 1, 1)
    for value in (0.0, 0.7, -0.999, 1.2999, 3e-5, -1e-9):
        w = torch.full((65536, 1, 1), value)
        codes = int8.encode(w, grid.expand(65536, 1), bits)
        mean = codes.double().mean()
        x = value / scale.double() + zero.double()
        # 2^-17 of the cut, and 2^-17 of the float32 sum near 128
        assert abs(float(mean - x)) <= 2**-16, value
        assert codes.max() - codes.min() <= 1
    # And on average over many x with more bits than that, far more exactly: nothing is cut off.
    w = torch.linspace(-0.9, -0.6, 64).view(64, 1, 1)
    x = w.double().view(-1) / scale.double() + zero.double()
    every = bits.view(-1, 1).expand(-1, 64).reshape(-1, 1, 1)
    codes = int8.encode(w.repeat(65536, 1, 1), grid.expand(64 * 65536, 1), every)
    means = codes.view(65536, 64).double().mean(0)
    assert abs(float((means - x).mean())) < 2**-19


def test_what_has_not_changed_keeps_its_code_whatever_the_bits():
    grid = int8.fit(-torch.rand(500), torch.rand(500)).view(-1, 1)
    codes = torch.arange(256, dtype=torch.uint8).expand(500, -1).contiguous()
    w = int8.dequantize(codes, grid)
    for bits in (0, 1, 0x8000, 65535):
        assert torch.equal(int8.encode(w.unsqueeze(1), grid, bits).squeeze(1), codes)


def test_a_grid_changes_only_when_it_must():
    w = torch.linspace(-1, 1, 128).view(1, -1)
    codes, grid = int8.quantize(w, 128)
    old, bits = int8.dequantize(codes, grid), torch.zeros(1, 128, dtype=torch.int32)

    def after(new):
        c, g = codes.clone(), grid.clone()
        int8.requantize(c, g, old, new, bits)
        return int8.dequantize(c, g), g

    for factor in (1.0, 0.51, 1.05):  # MARGIN leaves 1/16 free
        assert torch.equal(after(old * factor)[1], grid)
    for factor in (0.4, 1.2, 100.0):
        found, g = after(old * factor)
        assert not torch.equal(g, grid)
        scale = int8.scale_and_zero(g)[0]
        assert ((found - old * factor).abs() <= scale * 1.001).all()
        fitting = 2 * factor / int8.STEPS
        assert 0.98 * fitting <= float(scale) <= 1.02 * fitting


def test_nan_keeps_a_weight_and_infinity_saturates():
    codes, grid = int8.quantize(torch.tensor([[1.0, 2.0, -1.0, 0.5]]), 8)
    old = int8.dequantize(codes, grid)
    before, nan = codes.clone(), torch.full_like(old, math.nan)
    bits = torch.full((1, 4), 7, dtype=torch.int32)
    int8.requantize(codes, grid, old, nan, bits)
    assert torch.equal(codes, before)
    new = torch.tensor([[math.inf, math.nan, -math.inf, 0.0]])
    int8.requantize(codes, grid, old, new, bits)
    found = int8.dequantize(codes, grid)
    assert torch.isfinite(found.bfloat16()).all()
    assert (found[0, [0, 2]].abs() / 2.0**126 - 1).abs().max() < 0.01
    assert found[0, 3] == 0


def test_bits_are_the_contracts():
    bits = rounding_bits(77, 5, 3, 1, 21, use=ROUNDING_INT8)
    for column in range(21):
        assert bits[0, column] == half_of(philox((column // 8, 3, 5, 3), 77), column % 8)


# ---- layers and models ---------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, two layers and a head, all bf16, with rows that no 128 divides."""

    def __init__(self, tied=False, dtype=torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(30, 160, padding_idx=2)
        self.up = nn.Linear(160, 200)
        self.down = nn.Linear(200, 160, bias=False)
        self.lm_head = nn.Linear(160, 30, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        return self.lm_head(self.down(functional.silu(self.up(self.embed(ids)))))


IDS = torch.arange(24).view(2, 12)


def loss_of(model, ids=IDS):
    return functional.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(1, 1).flatten())


def plain(model):
    other = copy.deepcopy(model)
    dequantize_(other)
    return other


def int8_weights(model):
    return {n: p for n, p in model.named_parameters() if isinstance(p, Int8Weight)}


def test_by_default_the_linear_layers_but_the_head():
    assert quantize_(Net()) == ["up.weight", "down.weight"]
    everything = ["embed.weight", "up.weight", "down.weight", "lm_head.weight"]
    assert quantize_(Net(), embeddings=True) == everything
    assert quantize_(Net(), targets="all") == everything
    assert quantize_(Net(), targets=["down", "head"]) == ["down.weight", "lm_head.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outwardly_it_is_the_dequantized_weight(dtype):
    """Bit for bit: outputs, and gradients, which are plain tensors of the weight's dtype."""
    model = Net(dtype=dtype)
    quantize_(model, targets="all")
    other = plain(model)
    assert not int8_weights(other) and len(int8_weights(model)) == 4
    for m in (model, other):
        loss_of(m).backward()
    assert torch.equal(model(IDS), other(IDS))
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert isinstance(p, nn.Parameter) and p.is_leaf and p.dtype == dtype, name
        assert type(p.grad) is torch.Tensor and p.grad.dtype == dtype, name
        assert torch.equal(p.grad, q.grad), name
        assert torch.equal(p + 0, q + 0), name  # what knows nothing of it reads its values
    assert torch.equal(model.embed.weight.grad[2], torch.zeros(160, dtype=dtype))  # padding


def test_autocast_computes_in_its_dtype():
    model = Net(dtype=torch.float32)
    quantize_(model)
    other = plain(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = model(IDS), other(IDS)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    for out in (found, wanted):
        out.float().square().sum().backward()
    assert torch.equal(model.up.weight.grad, other.up.weight.grad)
    assert model.up.weight.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch's own
@pytest.mark.parametrize("compiled", [False, True])
def test_no_layer_keeps_its_dequantized_weight(compiled):
    model, kept = Net(), []
    quantize_(model, targets="all")
    shapes = {tuple(p.shape) for p in int8_weights(model).values()}
    if compiled:  # by the compiler's own choice of what backward computes again
        model = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss_of(model).backward()
    shapes |= {shape[::-1] for shape in shapes}
    floats = [t for t in kept if type(t) is torch.Tensor and t.is_floating_point()]
    assert kept and not [t for t in floats if tuple(t.shape) in shapes]


def test_a_long_weight_is_dequantized_in_parts(monkeypatch):
    w = quantized(torch.randn(40, 300))
    whole = w.dequantize()
    monkeypatch.setitem(apollo_kernels.quantized._PART, "cpu", 700)
    assert torch.equal(w.dequantize(), whole)
    assert torch.equal(quantized(whole).codes, quantized(whole.clone()).codes)


def test_tied_weights_stay_tied():
    model = Net(tied=True)
    assert quantize_(model, embeddings=True) == ["embed.weight", "up.weight", "down.weight"]
    assert model.lm_head.weight is model.embed.weight
    assert isinstance(model.lm_head.weight, Int8Weight)
    other = plain(model)
    assert other.lm_head.weight is other.embed.weight
    for m in (model, other):
        loss_of(m).backward()
    assert torch.equal(model.embed.weight.grad, other.embed.weight.grad)


def test_parameters_stay_the_same_objects_and_keep_their_gradients():
    model = Net()
    loss_of(model).backward()
    before = dict(model.named_parameters())
    gradient = model.up.weight.grad
    quantize_(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.up.weight.grad is gradient
    assert quantize_(model) == []  # once is enough
    assert dequantize_(model) == ["up.weight", "down.weight"]
    assert model.up.weight is before["up.weight"] and type(model.up.weight) is nn.Parameter


def equal_models(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(same(x, y) for x, y in pairs)


def test_a_model_is_copied_pickled_and_moved():
    model = Net()
    quantize_(model, targets="all")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert equal_models(model, other)
        assert isinstance(other.up.weight, nn.Parameter) and other.up.weight.requires_grad
        other.up.weight.codes.zero_()
        assert not equal_models(model, other)
    model.up.weight.detach().clone().codes.zero_()
    assert model.up.weight.codes.any()
    other = copy.deepcopy(model).to(torch.float32)
    assert other.up.weight.dtype == torch.float32 and other(IDS).dtype == torch.float32
    assert equal_models(model.float(), other)
    empty = model.to("meta")
    assert isinstance(empty.up.weight, Int8Weight) and empty.up.weight.codes.device.type == "meta"


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_dict_is_plain_tensors():
    model, other = Net(tied=True), Net(tied=True)
    for m in (model, other):
        quantize_(m, embeddings=True)
    state = model.state_dict()
    assert all(type(t) is torch.Tensor for t in state.values())
    assert "up.weight" not in state
    assert state["up.weight_codes"].dtype == torch.uint8
    assert state["up.weight_grid"].shape == (200, 2)
    other.load_state_dict(saved_and_loaded(state))
    assert equal_models(model, other)
    other.load_state_dict({k: t.clone() for k, t in state.items()}, assign=True)
    assert equal_models(model, other) and isinstance(other.up.weight, Int8Weight)


def test_safetensors_reads_it(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = Net(), Net()
    for m in (model, other):
        quantize_(m, targets="all")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert equal_models(model, other)


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_is_quantized_as_it_is_loaded(assign):
    source, model = Net(), Net()
    quantize_(model)
    model.load_state_dict(source.state_dict(), assign=assign)
    quantize_(source)
    assert equal_models(source, model) and isinstance(model.up.weight, Int8Weight)


def test_after_dequantize_the_state_dict_is_the_usual_one():
    model = Net()
    names = list(model.state_dict())
    quantize_(model)
    dequantize_(model)
    assert list(model.state_dict()) == names
    model.load_state_dict(Net().state_dict())
    assert quantize_(model) == ["up.weight", "down.weight"]
    assert len([n for n in model.state_dict() if n.startswith("up.weight")]) == 2


def test_a_state_dict_that_does_not_fit_is_refused():
    model, other = Net(), Net()
    quantize_(model)
    quantize_(other, group_size=64)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"up.weight: .*groups of 128.*\(200, 3\)"):
        model.load_state_dict(other.state_dict())
    state = model.state_dict()
    del state["up.weight_grid"]
    with pytest.raises(ValueError, match="up.weight: .*None"):
        model.load_state_dict(state)
    assert equal_models(model.up, before.up)
    with pytest.raises(RuntimeError, match="Missing key.*up.weight"):
        model.load_state_dict({k: v for k, v in state.items() if "up.weight" not in k})


def test_the_forward_compiles_without_a_break():
    model = Net()
    quantize_(model, targets="all")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for m in (compiled, other := plain(model)):
        loss_of(m).backward()
    assert torch.equal(compiled(IDS), other(IDS))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    model.up.weight.codes.fill_(200)  # as a step does
    assert torch.equal(compiled(IDS), model(IDS))


def test_frozen_weights_are_quantized_and_stay_frozen():
    model = Net()
    model.up.weight.requires_grad_(False)
    assert "up.weight" in quantize_(model)
    assert not model.up.weight.requires_grad and model.down.weight.requires_grad
    loss_of(model).backward()
    assert model.up.weight.grad is None and model.embed.weight.grad is not None


def test_in_fake_mode_too():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(nn.Embedding(30, 160), nn.Linear(160, 200))
        assert quantize_(model, targets="all") == ["0.weight", "1.weight"]
        loss_of(model, torch.zeros(2, 3, dtype=torch.int64)).backward()
        assert model[1].weight.grad.shape == (200, 160)
        assert isinstance(model[1].weight, Int8Weight)
        assert dequantize_(model) == ["0.weight", "1.weight"]


def test_what_cannot_be_int8_is_refused_and_nothing_changes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(16, 16)
            self.experts = nn.Parameter(torch.zeros(2, 16, 16))
            self.conv = nn.Conv2d(3, 4, 3)
            self.sparse = nn.Embedding(10, 16, sparse=True)

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            quantize_(model, **options)
        assert not int8_weights(model)

    model = Experts()
    refused("experts cannot be int8: it has 3 dimensions", targets=["experts", "up"])
    refused("conv.weight cannot be int8: it has 4 dim", targets="conv")
    refused("sparse.weight cannot be int8: its embedding has sparse", targets="sparse")
    refused("targets='nothing' matches no weight", targets="nothing")
    for size in (0, 4, 100, 128.0, True, "128"):
        refused(f"group_size must be a power of two from 8 on, got {size!r}", group_size=size)
    with torch.no_grad():
        model.up.weight[3, 3] = math.nan
    refused("up.weight cannot be int8: it holds NaN or Inf")
    model.double()
    refused("matches no weight of nn.Linear")
    refused("up.weight cannot be int8: it is torch.float64", targets="up.weight")


def test_experts_that_stay_as_they_are_are_told():
    model = nn.Module()
    model.up, model.experts = nn.Linear(16, 16), nn.Module()
    model.experts.w = nn.Parameter(torch.zeros(2, 16, 16))
    with pytest.warns(UserWarning, match="experts stay as they are, not int8: experts.w") as caught:
        assert quantize_(model) == ["up.weight"]
    assert caught[0].filename == __file__
    assert apollo_kernels.apollo(model, rank=4)[1]["param_names"] == ["experts.w"]


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_an_embedding_that_would_need_more_is_refused(options):
    with pytest.raises(NotImplementedError, match=r"neither max_norm \(.*\) nor sparse"):
        functional.embedding(IDS, quantized(torch.ones(30, 8)), **options)


def test_what_would_write_is_refused():
    model = Net()
    quantize_(model)
    before = model.up.weight.codes.clone()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="dequantize_"):
        model.up.weight.add_(1)
    with pytest.raises(NotImplementedError, match="would write into an int8 weight"):
        torch.optim.SGD([model.up.weight], lr=1).step(lambda: loss_of(model).backward())
    assert torch.equal(model.up.weight.codes, before)
    with torch.no_grad():
        model.up.weight.copy_(torch.ones(200, 160))
    assert model.up.weight.dequantize().float().sub(1).abs().max() < 0.01


# ---- the step ------------------------------------------------------------------------------------


def weight(shape, backend, seed=0, dtype=torch.bfloat16):
    return nn.Parameter(quantized(randn(shape, backend, seed=seed).to(dtype)))


def values(p):
    return p.detach().dequantize(torch.float32)


def stored_state(optimizer):
    """As snapshot, which knows the dequantized weight only."""
    found = {k: v for k, v in snapshot(optimizer).items() if k[1] != "weight"}
    for i, p in enumerate(q for g in optimizer.param_groups for q in g["params"]):
        found[i, "codes"], found[i, "grid"] = p.codes.clone(), p.grid.clone()
    return found


OPTIONS = {"rank": 4, "lr": 1e-2, "proj": "rademacher"}
SHAPES = [(131, 70), (70, 133), (1, 200), (200, 1), (40, 256), (80, 136)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("rank", [4, None])
def test_the_step_is_the_contracts(backend, shape, proj_type, rank):
    """The codes are those that the restatement makes of the update of a float32 weight."""
    p = weight(shape, backend)
    options = {**OPTIONS, "rank": rank, "proj_type": proj_type, "weight_decay": 0.1}
    optimizer = APOLLO([p], **options)
    groups = {}
    for i, row in enumerate(values(p).cpu().tolist()):
        for first in range(0, shape[1], 128):
            groups[i, first] = Int8Group(row[first : first + 128])
    twin = nn.Parameter(values(p).clone())
    other = APOLLO([twin], **options)
    wrong = wrong_grids = 0
    for step in (1, 2):
        # From the same weights: a restatement that strayed would not come back.
        for (i, first), group in groups.items():
            group.codes = p.codes[i, first : first + 128].cpu().tolist()
            place = first // 128
            s, z = int8.scale_and_zero(p.grid.cpu())
            group.scale, group.zero = s[i, place].numpy(), int(z[i, place])
        with torch.no_grad():
            twin.copy_(values(p))
        fill([p], backend, step)
        twin.grad = p.grad.float()
        optimizer.step()
        other.step()
        new, key = twin.detach().cpu(), optimizer.state[p]["seed"]
        for (i, first), group in groups.items():
            row = new[i, first : first + 128].tolist()
            columns = range(first, first + len(row))
            calls = [philox((column // 8, i, step, 3), key) for column in columns]
            bits = [half_of(w, j % 8) for w, j in zip(calls, columns, strict=True)]
            group.store(row, bits)
            codes = p.codes[i, first : first + 128].cpu().tolist()
            wrong += sum(a != b for a, b in zip(codes, group.codes, strict=True))
            grid = numbers_of(p.grid[i, first // 128].cpu())
            wrong_grids += grid != ([float(group.scale)], [group.zero])
    assert wrong_grids <= max(1, 0.05 * len(groups))  # the same last bit moves one scale in 256
    # A last bit of float32 moves one value in some thousands over the edge, at each step.
    assert wrong <= max(1, 2e-3 * p.numel())
    for name, wanted in other.state[twin].items():  # the state is the one of a float32 weight
        found = optimizer.state[p][name]
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
        else:
            assert found == wanted
    assert set(optimizer.state[p]) == set(other.state[twin]) | {"seed"}


@pytest.mark.parametrize("order", ["rows", "columns", "every other"])
def test_every_back_end_finds_the_same_codes(backend, order):
    def run(backend, seed=0):
        p = weight((70, 256), backend)
        optimizer = APOLLO([p], **OPTIONS, seed=seed, weight_decay=0.1)
        for step in range(2):
            g = randn((70, 256), backend, torch.bfloat16, seed=step)
            if order == "columns":
                g = g.t().contiguous().t()
            elif order == "every other":
                g = torch.stack([g, g], dim=-1)[..., 0]
            p.grad = g
            optimizer.step()
        return p.codes.cpu(), p.grid.cpu()

    codes, grid = run(backend)
    with running("torch") as other:
        wanted, wanted_grid = run(other)
        with_other_bits, _ = run(other, seed=1)
    assert (codes != wanted).float().mean() < 1e-3
    assert (grid != wanted_grid).float().mean() < 0.02
    assert (with_other_bits != wanted).float().mean() > 0.02


@pytest.mark.parametrize("size", [1.0, 1e-24, 1e-35, 3e37])
def test_equal_updates_give_equal_codes_to_the_last_bit(backend, size):
    """Updates by -lr, 0 or lr are equal floats everywhere: some leave the grid, some saturate."""
    # Many weights, since a last bit moves few codes.
    steps, m, n = (2, 24, 256) if backend.interpreted else (3, 300, 1024)

    def run(backend):
        w = size * randn((m, n), backend).clamp(-2, 2)
        p = nn.Parameter(quantized(w))
        options = {"rank": None, "betas": (0.0, 0.0), "eps": 0.0, "correct_bias": False}
        optimizer = APOLLO([p], lr=0.3 * size, **options)
        for step in range(steps):
            g = randn((m, n), backend, seed=step).mul(0.8).round().clamp(-1, 1)
            g[:, 130:200] = -1
            g[m // 2 :, :128] = 0
            g[step] = math.nan
            p.grad = g
            optimizer.step()
        return p.codes.cpu(), p.grid.cpu(), quantized(w).grid.cpu()

    codes, grid, first = run(backend)
    with running("torch") as other:
        wanted = run(other)
    assert torch.equal(codes, wanted[0])
    assert torch.equal(grid, wanted[1])
    assert 0 < int((grid != first).sum()) < grid.numel()


@pytest.mark.parametrize("rank", [4, None])
def test_small_updates_add_up(backend, rank):
    """Updates of an eighth of a code step, or less: the mean moves by what they sum up to."""
    steps = 5 if backend.interpreted else 50
    w = randn((128, 256), backend).clamp(-2, 2)
    w[:, ::128], w[:, 1::128] = 2.0, -2.0  # every group has the same grid
    p = nn.Parameter(quantized(w))
    scale = float(p.scale[0, 0])
    options = {"rank": rank, "scale_type": "tensor", "betas": (0.0, 0.0), "disable_nl": True}
    optimizer = APOLLO([p], lr=scale / 8, correct_bias=False, **options)
    p.grad = torch.ones_like(p.dequantize())
    before = values(p).double().mean()
    # What a float32 weight does under the same gradients.
    twin = nn.Parameter(values(p).clone())
    other = APOLLO([twin], lr=scale / 8, correct_bias=False, **options)
    twin.grad = p.grad.clone()
    for _ in range(steps):
        optimizer.step()
        other.step()
    wanted = float((twin.detach().double() - values(p).double()).mean())
    moved, should = float(before - values(p).double().mean()), float(before - twin.detach().mean())
    assert 0 < should / steps < scale / 2  # each below half a step
    # Each update of x < 1 adds a variance of x (1 - x) < 1/4 of a step: five deviations of the mean
    # of 32768 weights.
    assert abs(wanted) < 5 * scale * math.sqrt(steps / 4 / p.numel())
    assert moved == pytest.approx(should, rel=0.1)


def test_an_update_that_is_nan_keeps_its_weight(backend):
    """Of a learning rate on a device, which only the kernel sees: the optimizer refuses others."""
    p = weight((40, 256), backend)
    before = p.codes.clone(), p.grid.clone()
    grad, *moments = (torch.ones(40, 256, device=backend.device) for _ in range(3))
    step = torch.zeros((), dtype=torch.int64, device=backend.device)
    module = backends.load(backend.name)
    batch = module.build_dense([Dense(p.codes, grad, *moments, step, p.grid, key=5)])
    if not module.BY_ADDRESS:
        batch.lend([grad])
    counters = torch.zeros(3, dtype=torch.int64, device=backend.device)
    hyper = Hyper(math.nan, (0.9, 0.999), 1e-6, 0.0, correct_bias=True, maximize=False)
    batch.adamw(hyper, Signals(counters))
    assert int(step) == 1
    assert torch.equal(p.codes, before[0]) and torch.equal(p.grid, before[1])


def test_a_weight_without_an_update_keeps_its_code(backend):
    p = weight((64, 256), backend)
    optimizer = APOLLO([p], **OPTIONS)
    before = p.codes.clone(), p.grid.clone()
    for step in range(3):
        fill([p], backend, step)
        p.grad[10:20] = 0
        p.grad[:, 128:] = 0
        optimizer.step()
    assert torch.equal(p.codes[10:20], before[0][10:20])
    assert torch.equal(p.codes[:, 128:], before[0][:, 128:])
    assert torch.equal(p.grid[:, 1], before[1][:, 1])
    assert not torch.equal(p.codes[:10, :128], before[0][:10, :128])


def test_a_group_goes_far_beyond_its_old_range_and_comes_back(backend):
    p = weight((32, 128), backend)
    twin = nn.Parameter(values(p).clone())
    options = {"rank": None, "lr": 3.0, "betas": (0.0, 0.0)}
    optimizers = APOLLO([p], **options), APOLLO([twin], **options)
    for sign in (1.0, 1.0, -1.0, -1.0):
        for q, optimizer in zip((p, twin), optimizers, strict=True):
            q.grad = torch.zeros(32, 128, dtype=q.dtype, device=backend.device)
            q.grad[:, :64] = sign
            optimizer.step()
        scale = p.scale.clone()
        reach = values(p).amax(1) - values(p).amin(1)
        # the grid is neither too small nor more than twice too coarse (and its margin)
        assert (scale[:, 0] * 255 >= reach).all()
        assert (scale[:, 0] * int8.STEPS <= 2.1 * reach).all()
        # some steps of one code each, of the coarsest grid: a range of about 10
        assert (values(p) - twin.detach()).abs().max() < 5 * 10 / int8.STEPS


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rank", [4, None])
def test_a_gradient_that_is_not_finite_changes_no_weight(backend, bad, rank):
    p = weight((40, 256), backend)
    optimizer = APOLLO([p], **{**OPTIONS, "rank": rank})
    train([p], optimizer, backend, range(1))
    before = p.codes.clone(), p.grid.clone()
    fill([p], backend, 1)
    p.grad[3, 5] = bad
    if rank is None:
        p.grad[:] = bad
    optimizer.step()
    assert torch.equal(p.codes, before[0]) and torch.equal(p.grid, before[1])
    assert optimizer.stats()["nonfinite"] == 1


@pytest.mark.parametrize("rank", [4, None])
def test_gradscaler_maximize_and_clipping(backend, rank):
    """Each equals a step with the gradient that it stands for."""

    def run(gradient=1.0, scale=None, found=0.0, **options):
        p = weight((40, 256), backend)
        optimizer = APOLLO([p], **{**OPTIONS, "rank": rank}, **options)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=backend.device)
            optimizer.found_inf = torch.tensor(found, device=backend.device)
        p.grad = gradient * randn((40, 256), backend, torch.bfloat16, seed=9)
        optimizer.step()
        return p.codes

    wanted, before = run(), weight((40, 256), backend).codes
    assert torch.equal(run(1024.0, scale=1024.0), wanted)
    assert torch.equal(run(1024.0, scale=1024.0, found=1.0), before)
    assert torch.equal(run(-1.0, maximize=True), wanted)
    norm = float(randn((40, 256), backend, torch.bfloat16, seed=9).float().norm())
    assert torch.equal(run(max_grad_norm=1e9), wanted)
    clipped, halved = run(max_grad_norm=norm / 2), run(0.5)
    assert (clipped != halved).float().mean() < 1e-3  # a last bit of the factor
    assert not torch.equal(wanted, before)


def test_the_bits_do_not_depend_on_how_rows_are_cut(monkeypatch):
    def run():
        with running("torch") as place:
            params = [weight((40, 300), place), weight((40, 300), place, seed=1)]
            groups = [{"params": params[:1], "rank": 4}, {"params": params[1:], "rank": None}]
            train(params, APOLLO(groups, lr=1e-2), place, range(2))
        return [p.codes for p in params]

    whole = run()
    sizes, dequantize = [], int8.dequantize

    def watched(codes, grid):
        sizes.append(codes.numel())
        return dequantize(codes, grid)

    monkeypatch.setattr(int8, "dequantize", watched)
    monkeypatch.setattr(reference, "_CHUNK", 1000)
    assert all(map(torch.equal, run(), whole))
    assert max(sizes) <= 1000  # so float32 weights never stand as a whole


def make(backend, model=None):
    model = model or Net().to(backend.device)
    if not int8_weights(model):
        quantize_(model, embeddings=True)
    groups = apollo_kernels.apollo(model, rank=4, weight_decay=0.1)
    return model, APOLLO(groups, lr=1e-2)


def steps_of(model, optimizer, backend, count):
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model, IDS.to(backend.device))
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_resumed_run_goes_on_bit_for_bit(backend):
    count = 2 if backend.interpreted else 4
    model, optimizer = make(backend)
    steps_of(model, optimizer, backend, count)
    saved = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    steps_of(model, optimizer, backend, count)
    other, again = make(backend)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    steps_of(other, again, backend, count)
    assert equal_models(model, other)
    assert not equal_models(model, make(backend)[0])


def test_gradient_release_gives_the_same_bits(backend):
    model, optimizer = make(backend)
    other = copy.deepcopy(model)
    _, released = make(backend, other)
    steps_of(model, optimizer, backend, 2)
    with released.attach(other):
        steps_of(other, released, backend, 2)
        assert all(p.grad is None for p in other.parameters())
    assert equal_models(model, other)


def test_a_bf16_run_goes_on_in_int8_and_back(backend):
    """State has the same shapes and keys; a dense weight gets a key for its rounding."""
    model = Net().to(backend.device)
    optimizer = APOLLO(apollo_kernels.apollo(model, rank=4), lr=1e-2)
    first = steps_of(model, optimizer, backend, 2)
    keys = {id(p): own.get("seed") for p, own in optimizer.state.items()}
    quantize_(model, embeddings=True)
    steps_of(model, optimizer, backend, 2)
    for p, own in optimizer.state.items():
        assert own["step"] == 4
        assert keys[id(p)] in (None, own.get("seed"))
        assert ("seed" in own) == (p.dim() == 2)
    dequantize_(model)
    assert steps_of(model, optimizer, backend, 2) < first
    assert len({own["seed"] for own in optimizer.state.values() if "seed" in own}) == 4


def test_new_codes_between_two_steps_are_stepped(backend):
    """By load_state_dict(assign=True) and by .to: the plan sees other tensors."""
    model, optimizer = make(backend)
    steps_of(model, optimizer, backend, 1)
    copies = {k: t.clone() for k, t in model.state_dict().items()}
    model.load_state_dict(copies)
    w = model.up.weight
    w.codes = w.codes.clone()
    before = w.codes.clone()
    steps_of(model, optimizer, backend, 1)
    assert not torch.equal(w.codes, before)


def test_the_kernels_step_what_their_tiles_hold(backend):
    """Or every other test would look at PyTorch. A row of whole groups, and for matrices any."""
    if backend.name == "torch":
        pytest.skip("PyTorch steps all of them")
    params = [weight(shape, backend) for shape in ((40, 256), (40, 200), (40, 256), (40, 200))]
    groups = [{"params": params[:2], "rank": 4}, {"params": params[2:], "rank": None}]
    train(params, optimizer := APOLLO(groups), backend, range(1))
    works = [work for unit in optimizer._runtime.units for work in unit.plan.works]
    found = {place.index: type(w.batch).__module__ for w in works[:-2] for place in w.places}
    kernels = {"cuda": "cuda", "triton": "triton_kernels.step"}[backend.name]
    assert set(found.values()) == {f"apollo_kernels.{kernels}"} and len(found) == 2
    modules = {type(w.batch).__module__ for w in works[-2:]}
    assert modules == {"apollo_kernels.reference", f"apollo_kernels.{kernels}"}


def test_the_report_counts_what_is_stored():
    model, optimizer = make(type("Cpu", (), {"device": "cpu"}))
    plain_rest = 2 * model.up.bias.numel()
    stored = sum(p.codes.numel() + 4 * p.grid.numel() for p in int8_weights(model).values())
    assert optimizer.memory_report().weight_bytes == stored + plain_rest


def test_two_weights_in_one_memory_are_refused():
    with running("torch") as place:
        p = weight((16, 128), place)
        q = nn.Parameter(Int8Weight(p.codes, p.grid, p.dtype))
        optimizer = APOLLO([p, q], rank=4)
        fill([p, q], place)
        refuses(optimizer, optimizer.step, match="lies in the memory of the weight")


def test_a_compiled_step_breaks_the_graph_and_steps(backend):
    if backend.interpreted:
        pytest.skip("the same path as PyTorch's")
    p, q = weight((40, 256), backend), weight((40, 256), backend)
    eager, traced = APOLLO([p], **OPTIONS), APOLLO([q], **OPTIONS)
    fill([p, q], backend)
    q.grad.copy_(p.grad)
    eager.step()
    torch.compile(traced.step, backend="eager")()
    assert torch.equal(p.codes, q.codes)
    assert changed(stored_state(eager), stored_state(traced)) == set()
