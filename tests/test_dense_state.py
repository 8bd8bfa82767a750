"""Moments of dense parameters in two bytes or one: the contract's bits, no bias, no stall."""

import copy
import io

import pytest
import torch
from conftest import running
from helpers import changed, fill, parameter, parameters, randn, refuses, snapshot, train
from restatement import MomentBlock, moment_bits

from apollo_kernels import APOLLO, dequantize_, moments, philox, quantize_, reference

NARROW = ["bfloat16", "int8"]
STATES = ["float32", *NARROW]
SHAPES = [(3, 300), (700,), (2, 128), (), (4, 3, 2, 2), (5, 0)]
KEY = 0x123456789ABCDEF
CODES = moments.CODES


def wide(optimizer, p, key):
    """A moment as float32, however it is stored."""
    own = optimizer.state[p]
    found = own[key]
    return moments.from_codes(found, own[f"{key}_unit"], key) if f"{key}_unit" in own else found


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 7, 2**34 - 3])
def test_bits_are_the_contracts(first):
    for_m, for_v = philox.moment_bits(KEY, 5, first, 11)
    assert list(zip(for_m.tolist(), for_v.tolist(), strict=True)) == [
        moment_bits(KEY, 5, e) for e in range(first, first + 11)
    ]


@pytest.mark.parametrize("key", CODES)
@pytest.mark.parametrize("bits", [0, 1, 0x8000, 65535])
def test_every_code_stands_for_itself(key, bits):
    code, block = CODES[key], MomentBlock(CODES[key].signed, 256)
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    unit = torch.full((2, 1), 2.0**-60)
    values = moments.decode(codes, unit, code)
    block.codes, block.unit = list(range(256)), 2.0**-60
    assert values.view(-1).tolist() == block.values()
    again = moments.encode(values, unit, bits, code)
    zero = values == 0  # of which there are two with a sign
    assert torch.equal(again[~zero], codes[~zero]) and not (again[zero] & 127).any()


@pytest.mark.parametrize("key", CODES)
def test_rounding_to_codes_is_unbiased(key):
    """Over all bits the mean is the value, rounded to 2^-16 of a step."""
    code = CODES[key]
    sizes = torch.tensor([0.3, 5.7, 8.01, 15.99, 16.03, 1001.5, 15.99 * 2**code.doublings / 2])
    x = sizes * (1 - 2 * (torch.arange(7) % 2)) if code.signed else sizes
    every = torch.arange(65536, dtype=torch.int32).view(-1, 1).expand(-1, 7)
    one = torch.ones(65536, 1)
    found = moments.decode(moments.encode(x.expand(65536, 7), one, every, code), one, code)
    steps = 2.0 ** ((sizes.log2().floor() - 3).clamp(min=0))
    error = (found.double().mean(0) - x.double()).abs()
    least = slice(0 if code.signed else 1, None)
    assert (error <= steps * 2.0**-17)[least].all()
    if not code.signed:
        assert (found[:, 0] == 1).all()  # a V above 0 never becomes 0


@pytest.mark.parametrize("key", CODES)
@pytest.mark.parametrize("count", [1, 100, 128])
def test_blocks_are_stored_as_the_contract_has_it(key, count):
    code, block = CODES[key], MomentBlock(CODES[key].signed, count)
    codes, unit = torch.zeros(1, count, dtype=torch.uint8), torch.zeros(1, 1)
    generator = torch.Generator().manual_seed(1)
    sizes = [0.0, 1e-30, 1e-6, 1.05e-6, 1e-6, 4e-7, 3e-7, 1e-8, 1.0, 1e30, 3e38, 1e-44]
    for size in sizes:
        spread = torch.exp2(-30 * torch.rand(count, generator=generator))
        x = spread * torch.randn(count, generator=generator).clamp(-1, 1) * size
        x = x if code.signed else x.abs()
        bits = torch.randint(65536, (count,), generator=generator, dtype=torch.int32)
        moments.store(x.view(1, -1), codes, unit, bits.view(1, -1), code)
        block.store(x.clamp(-moments.LARGEST, moments.LARGEST).tolist(), bits.tolist())
        assert unit.item() == block.unit, size
        assert codes[0].tolist() == block.codes, size
        assert torch.isfinite(moments.decode(codes, unit, code)).all()


def test_the_unit_stays_while_it_suits():
    """Then a value keeps its code whatever the bits; it goes where a value needs it, or where all
    have become less than half as large as it was made for."""
    code = CODES["exp_avg_sq"]
    codes, unit = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 1)

    def stored(*values):
        moments.store(torch.tensor([values]), codes, unit, 0, code)
        return unit.item()

    first = stored(14.9, 1e-9)
    assert stored(15.0, 1e-9) == first  # the last code: no rounding up
    assert stored(15.1, 1e-9) == 2 * first
    assert stored(8.0, 1e-9) == 2 * first
    assert stored(7.4, 1e-9) == first / 2


# ---- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_state", NARROW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_back_end_stores_what_the_specification_does(backend, dense_state, dtype):
    def run(place, seed=0):
        params = parameters([(33, 384), (3000,), (20, 50)], place, dtype)
        options = {"lr": 1e-2, "weight_decay": 0.1, "seed": seed}
        optimizer = APOLLO(params, dense_state=dense_state, **options)
        train(params, optimizer, place, range(3))
        return {key: value for key, value in snapshot(optimizer).items() if key[1] != "seed"}

    found = run(backend)
    with running("torch") as plain:
        wanted, other = run(plain), run(plain, 1)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        value = value.cpu()
        assert value.dtype == wanted[key].dtype
        if key[1].endswith(("_unit", "step")):
            assert torch.equal(value, wanted[key]), key
        elif key[1] != "weight":
            # A last bit of float32 moves a few values in 2^16 over the edge, at each step.
            assert (value != wanted[key]).float().mean() < 2e-3, key
            assert (other[key] != wanted[key]).float().mean() > 0.1, key
        else:
            close = torch.isclose(value.float(), wanted[key].float(), rtol=1e-2, atol=1e-5)
            assert close.float().mean() > 0.997, key


def rounded(row, bits, name, dense_state):
    """A new moment's row as the restatement stores it."""
    if dense_state == "bfloat16":
        raw = row.float().view(torch.int32) + torch.tensor(bits, dtype=torch.int32)
        return (raw & -65536).view(torch.float32).tolist()
    values = []
    for first in range(0, len(row), 128):
        part = slice(first, first + 128)
        block = MomentBlock(name == "exp_avg", len(bits[part]))
        block.store(row[part].tolist(), bits[part])
        values += block.values()
    return values


@pytest.mark.parametrize("dense_state", NARROW)
def test_one_step_from_nothing_is_the_contract_s(backend, dense_state):
    """M = (1 - b1) G and V = (1 - b2) G^2, with betas that make both exact."""
    for columns in (130, 256):  # rows of whole blocks, and others
        p = parameter((3, columns), backend)
        p.grad = randn((3, columns), backend, torch.bfloat16, seed=1).float()
        optimizer = APOLLO([p], betas=(0.5, 0.75), dense_state=dense_state)
        optimizer.step()
        key, g = optimizer.state[p]["seed"], p.grad.double().cpu()
        for which, (name, x) in enumerate((("exp_avg", g / 2), ("exp_avg_sq", g * g / 4))):
            found = wide(optimizer, p, name).cpu()
            for i in range(3):
                first = columns * i
                bits = [moment_bits(key, 1, first + j)[which] for j in range(columns)]
                assert found[i].tolist() == rounded(x[i], bits, name, dense_state), (name, i)


@pytest.mark.parametrize("dense_state", NARROW)
def test_a_second_moment_does_not_stall(backend, dense_state):
    """V half way to the square of a constant tiny gradient, at beta2 0.999: each step moves it by
    2^-10 of itself, a quarter of bf16's step and a 60th of a code's. Rounded to nearest it would
    stay for ever.

    Of 2^14 elements, each does a random walk of steps sqrt(2^-11 s), s the step of what is stored:
    2^-9 or 2^-4 of g^2. So the mean errs by 2e-5 or 3e-4 of g^2 after 40 steps, in which it moves
    by 0.02."""
    steps, tiny = 40, 2.0**-20
    found = {}
    for stored in ("float32", dense_state):
        p = parameter((2**14,), backend)
        p.grad = torch.full_like(p, tiny)
        optimizer = APOLLO([p], lr=0.0)
        optimizer.step()
        optimizer.state[p]["exp_avg_sq"].fill_(tiny**2 / 2)
        optimizer.state[p]["exp_avg"].fill_(tiny)
        narrow = APOLLO([p], lr=0.0, dense_state=stored)
        narrow.load_state_dict(optimizer.state_dict())
        for _ in range(steps):
            narrow.step()
        found[stored] = float(wide(narrow, p, "exp_avg_sq").double().mean()) / tiny**2
    assert found["float32"] == pytest.approx(1 - 0.5 * 0.999**steps, rel=1e-3)
    assert found[dense_state] - 0.5 == pytest.approx(found["float32"] - 0.5, rel=0.08)


@pytest.mark.parametrize("dense_state, error", [("bfloat16", 0.004), ("int8", 0.017)])
def test_a_thousand_steps_of_a_tiny_gradient_add_up_as_in_float32(dense_state, error):
    """From nothing, on PyTorch. An element of V ends within sqrt(s / 2) of its mean (a walk that
    each step pulls back by a thousandth), s the step of what is stored: 2^-7.5 or 2^-3.5 of V, and
    so 5 % or 21 %; the mean of 4096 elements within a 64th of that, and five times as much is
    allowed. Nearest would stop at a third of g^2 (bf16), where this reaches 0.63."""
    with running("torch") as backend:
        means = []
        for stored in ("float32", dense_state):
            p = parameter((4096,), backend)
            p.grad = torch.full_like(p, 1e-6)
            optimizer = APOLLO([p], lr=1e-3, dense_state=stored)
            for _ in range(1000):
                optimizer.step()
            means.append([float(wide(optimizer, p, k).double().mean()) for k in CODES])
    (m, v), (m_found, v_found) = means
    assert v == pytest.approx(1e-12 * (1 - 0.999**1000), rel=1e-3)
    assert v_found == pytest.approx(v, rel=error)
    assert m_found == pytest.approx(m, rel=error)


def test_a_small_second_moment_never_becomes_zero(backend):
    """2^-50 of the block's largest, far below one unit: N of an M by chance would be M / eps."""
    p = parameter((128,), backend)
    p.grad = torch.full_like(p, 2.0**-25)
    p.grad[7] = 1.0
    optimizer = APOLLO([p], dense_state="int8")
    for _ in range(2):
        optimizer.step()
        assert (wide(optimizer, p, "exp_avg_sq") > 0).all()


@pytest.mark.parametrize("dense_state", NARROW)
def test_parts_of_a_parameter_are_rounded_as_the_whole(monkeypatch, dense_state):
    """As a parameter is cut so that temporaries stay small; a shard draws by the same numbers."""
    results = []
    with running("torch") as backend:
        for chunk in (2**20, 256):
            monkeypatch.setattr(reference, "_CHUNK", chunk)
            params = parameters([(7, 130), (999,), (6, 5, 4)], backend)
            optimizer = APOLLO(params, dense_state=dense_state)
            train(params, optimizer, backend, range(2))
            results.append(snapshot(optimizer))
    assert changed(*results) == set()


@pytest.mark.parametrize("dense_state", NARROW)
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), 1e30])
def test_gradients_that_are_not_finite_keep_all_bits(backend, dense_state, damage):
    params = parameters([(3, 300), (256,)], backend)
    optimizer = APOLLO(params, lr=0.1, dense_state=dense_state)
    train(params, optimizer, backend, range(2))
    before = snapshot(optimizer)
    for p in params:
        p.grad.fill_(damage)
    optimizer.step()
    assert changed(before, snapshot(optimizer)) == {(0, "step"), (1, "step")}
    # a single one keeps its own; the block's unit stays here, so it keeps its code
    fill(params, backend, 1)
    params[1].grad.mul_(0.1)[5] = damage
    optimizer.step()
    after = snapshot(optimizer)
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert after[1, name][5] == before[1, name][5]
        assert (after[1, name] != before[1, name]).sum() > 5
    assert optimizer.stats()["nonfinite"] == 3


@pytest.mark.parametrize("dense_state", NARROW)
def test_found_inf_keeps_all_bits(backend, dense_state):
    params = parameters(SHAPES[:3], backend)
    optimizer = APOLLO(params, lr=0.1, dense_state=dense_state)
    train(params, optimizer, backend, range(2))
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones((), device=backend.device)
    optimizer.step()
    assert changed(before, snapshot(optimizer)) == set()


@pytest.mark.parametrize("dense_state", NARROW)
@pytest.mark.parametrize("betas, eps", [((0.9, 0.999), 1e-6), ((0.0, 0.0), 0.0)], ids=str)
def test_the_largest_gradients_leave_finite_numbers(backend, dense_state, betas, eps):
    p = parameter((300,), backend)
    optimizer = APOLLO([p], lr=0.1, betas=betas, eps=eps, dense_state=dense_state)
    for sign in (1, -1, 0):
        p.grad = torch.full_like(p, sign * 1.8446e19)  # whose square is just below float32's end
        optimizer.step()
        for value in (p, wide(optimizer, p, "exp_avg"), wide(optimizer, p, "exp_avg_sq")):
            assert torch.isfinite(value).all()


@pytest.mark.parametrize("dense_state", NARROW)
def test_any_memory_order_gives_the_same_bits(backend, dense_state):
    """Elements are counted over rows, however the weight lies."""
    results = []
    for transposed in (False, True):
        w = randn((24, 256), backend)
        p = torch.nn.Parameter(w.t().contiguous().t() if transposed else w)
        optimizer = APOLLO([p], dense_state=dense_state)
        for step in range(2):
            p.grad = randn((24, 256), backend, seed=step + 1)
            optimizer.step()
        results.append([wide(optimizer, p, "exp_avg"), wide(optimizer, p, "exp_avg_sq")])
    for a, b in zip(*results, strict=True):
        assert (a != b).float().mean() < 2e-3  # PyTorch steps one of them


def test_gradient_release_gives_the_same_bits(backend):
    results = []
    for released in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.Linear(128, 4))
        net.to(backend.device)
        options = {"dense_state": "int8", "gradient_release": released}
        optimizer = APOLLO(net.parameters(), lr=0.01, **options)
        for step in range(2):
            optimizer.zero_grad()
            net(randn((8, 16), backend, seed=step)).square().mean().backward()
            optimizer.step()
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


def test_a_compiled_step_gives_the_same_bits(backend):
    """It breaks the graph and runs as it is: a compiled step's operator takes float32 alone."""
    results = []
    for compiles in (False, True):
        params = parameters([(4, 256), (9,)], backend)
        optimizer = APOLLO(params, lr=0.01, dense_state="int8")
        step = torch.compile(optimizer.step, backend="eager") if compiles else optimizer.step
        for number in range(2):
            fill(params, backend, number)
            step()
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


# ---- state -------------------------------------------------------------------------------------


def test_state_bytes(backend):
    """4, 2 or 1 bytes for each moment, and in int8 4 for each block of a row."""
    shapes = [(3, 300), (700,), ()]
    elements, blocks = 1601, 3 * 3 + 6 + 1
    expected = {"float32": 8 * elements, "bfloat16": 4 * elements}
    expected["int8"] = 2 * elements + 8 * blocks
    for dense_state in STATES:
        params = parameters(shapes, backend)
        optimizer = APOLLO(params, dense_state=dense_state)
        before = optimizer.memory_report()
        train(params, optimizer, backend, range(1))
        for report in (before, optimizer.memory_report()):
            assert report.state_bytes == expected[dense_state] + 8 * 3


def test_float64_parameters_and_low_rank_ones_keep_what_they_had(backend):
    results = []
    for dense_state in ("float32", "int8"):
        params = [parameter((40,), backend, torch.float64), parameter((16, 8), backend)]
        optimizer = APOLLO(params, rank=4, dense_state=dense_state)
        train(params, optimizer, backend, range(2))
        results.append(snapshot(optimizer))
    assert changed(*results) == set()


@pytest.mark.parametrize("dense_state", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_continues_bit_for_bit(backend, dense_state, dtype):
    def made(params, seed=7):
        return APOLLO(params, lr=0.01, dense_state=dense_state, seed=seed)

    params = parameters(SHAPES, backend, dtype)
    optimizer = made(params)
    train(params, optimizer, backend, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = made(twins, seed=99)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert changed(snapshot(optimizer), snapshot(other)) == set()
    copied = copy.deepcopy(optimizer)
    for run in (optimizer, other, copied):
        train([p for g in run.param_groups for p in g["params"]], run, backend, range(2, 4))
        assert changed(snapshot(optimizer), snapshot(run)) == set()


@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("loaded", STATES)
def test_a_checkpoint_is_converted_to_the_group_s_own_state(backend, saved, loaded):
    params = parameters(SHAPES, backend)
    optimizer = APOLLO(params, lr=0.01, dense_state=saved)
    train(params, optimizer, backend, range(2))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = APOLLO(twins, lr=0.5, dense_state=loaded)
    given = optimizer.state_dict()
    other.load_state_dict(given)
    group = other.param_groups[0]
    assert group["dense_state"] == loaded and group["lr"] == 0.01
    assert given["param_groups"][0]["dense_state"] == saved
    # nearest: half of bf16's step, or of a code's; and of what a unit holds, the smallest half
    relative = {"float32": 0.0, "bfloat16": 2.0**-8, "int8": 1 / 16}[loaded] * (saved != loaded)
    for p, q in zip(params, twins, strict=True):
        for key in CODES:
            was, now = wide(optimizer, p, key).float(), wide(other, q, key).float()
            least = float(was.abs().max()) * 2.0**-16 * bool(relative) if was.numel() else 0.0
            assert ((now - was).abs() <= relative * was.abs() + least).all(), key
    train(twins, other, backend, range(2, 4))  # and it goes on
    for q in twins:
        assert ("seed" in other.state[q]) == (loaded != "float32" or saved != "float32")
        assert ("exp_avg_unit" in other.state[q]) == (loaded == "int8")


def test_a_checkpoint_of_before_loads_into_narrow_groups(backend):
    params = parameters(SHAPES, backend)
    optimizer = APOLLO(params)
    train(params, optimizer, backend, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["dense_state"]
    other = APOLLO(parameters(SHAPES, backend), dense_state="bfloat16")
    other.load_state_dict(saved)
    assert other.param_groups[0]["dense_state"] == "bfloat16"
    assert other.state[other.param_groups[0]["params"][0]]["exp_avg"].dtype == torch.bfloat16


def test_int8_weights_and_narrow_moments_go_together(backend):
    for dense_state in STATES:
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(30, 256), torch.nn.Linear(256, 128)).bfloat16()
        net.to(backend.device)
        quantize_(net, embeddings=True, targets="all")
        optimizer = APOLLO(net.parameters(), lr=1e-2, dense_state=dense_state)
        for step in range(2):
            ids = torch.arange(8, device=backend.device) + step
            net(ids).float().square().mean().backward()
            before = net[1].weight.detach().dequantize()
            optimizer.step()
            assert not torch.equal(net[1].weight.detach().dequantize(), before)
        assert len(dequantize_(net)) == 2


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["float16", None, 8, True])
def test_unknown_states_are_refused(backend, value):
    with pytest.raises(ValueError, match=f"dense_state must be one of .*{value!r}"):
        APOLLO(parameters([(3,)], backend), dense_state=value)


def test_a_state_that_was_changed_by_hand_is_refused(backend):
    named = [("first", parameter((4, 130), backend)), ("second", parameter((9,), backend))]
    params = [p for _, p in named]
    optimizer = APOLLO(named, dense_state="int8")
    train(params, optimizer, backend, range(1))
    optimizer.param_groups[0]["dense_state"] = "bfloat16"
    refuses(optimizer, optimizer.step, match="'first'.*bfloat16.*load_state_dict converts")
    optimizer.param_groups[0]["dense_state"] = "int8"
    own = optimizer.state[params[1]]
    unit = own["exp_avg_unit"]
    own["exp_avg_unit"] = unit[:, :0]
    refuses(optimizer, optimizer.step, match="exp_avg_unit of .*second.* does not fit")
    del own["exp_avg_unit"]
    refuses(optimizer, optimizer.step, match="second.*lacks exp_avg_unit")
    own["exp_avg_unit"] = unit
    optimizer.step()


@pytest.mark.parametrize("damage", ["missing", "shape", "nan", "negative"])
def test_a_checkpoint_with_broken_units_changes_nothing(backend, damage):
    params = parameters([(4, 130), (9,)], backend)
    optimizer = APOLLO(params, dense_state="int8")
    train(params, optimizer, backend, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    own = saved["state"][1]
    if damage == "missing":
        del own["exp_avg_sq_unit"]
    elif damage == "shape":
        own["exp_avg_sq_unit"] = own["exp_avg_sq_unit"][:, :0]
    else:
        own["exp_avg_sq_unit"].fill_(float("nan") if damage == "nan" else -1.0)
    refuses(optimizer, lambda: optimizer.load_state_dict(saved), match="exp_avg_sq_unit of .*1")
