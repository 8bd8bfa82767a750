"""The random numbers are the contract's on every path, and as random as the paper needs."""

import math

import golden
import pytest
import restatement
import torch

from apollo_kernels import philox, projection_matrix


@pytest.fixture(params=["native", "torch"])
def generator(request, monkeypatch):
    """Both ways to draw on a CPU; the native one must be there, since the tests build it."""
    if request.param == "torch":
        monkeypatch.setattr(philox, "_C", None)
    else:
        assert philox._C is not None, "the native module was not built"
    return request.param


@pytest.mark.parametrize("rounds, counter, key, expected", golden.KNOWN_ANSWERS)
def test_words_are_the_published_known_answers(rounds, counter, key, expected):
    words = philox.words(key[0] | key[1] << 32, *counter, rounds=rounds)
    assert tuple(int(w) for w in words) == expected
    assert tuple(philox._C.philox4x32(counter, key, rounds)) == expected
    assert restatement.philox(counter, key[0] | key[1] << 32, rounds) == expected


def test_keys_are_golden():
    for (seed, position), key in golden.KEYS.items():
        assert philox.parameter_key(seed, position) == key == restatement.key_of(seed, position)


def test_normals_are_golden(generator):
    for (j, k), bits in golden.NORMALS.items():
        z = philox.draw(golden.KEY, 5, j + 1, 1, start=k)[j]
        assert z.view(torch.int16).item() & 0xFFFF == bits, (j, k)


def test_signs_are_golden(generator):
    z = philox.draw(golden.KEY, 5, 3, 40, "rademacher", start=500)[2]
    assert [500 + i for i, x in enumerate(z.tolist()) if x < 0] == golden.NEGATIVE_SIGNS


def test_nonzeros_are_golden(generator):
    for (rank, k), (row, sign) in golden.NONZEROS.items():
        found = philox.sparse(golden.KEY, 5, rank, 1, start=k)
        assert tuple(int(x) for x in found) == (row, sign), (rank, k)


@pytest.mark.parametrize("rank", [1, 3, 8, 20, 64, 130, 1000])
@pytest.mark.parametrize("start, dim", [(0, 700), (5, 999), (33 * 64, 70)])
def test_every_path_places_the_same_nonzeros(rank, start, dim, monkeypatch):
    """Keys and epochs up to their last bit, past the 16 blocks of a call, from the middle on."""
    drawn = (2**63 - 25, 2**32 - 1, rank, dim)
    native = philox.sparse(*drawn, start=start)
    monkeypatch.setattr(philox, "_C", None)
    for one, other in zip(native, philox.sparse(*drawn, start=start), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    plain = [restatement.nonzero(*drawn[:3], start + k) for k in range(dim)]
    assert list(zip(*(x.tolist() for x in native), strict=True)) == plain


@pytest.mark.parametrize(
    "distribution, dim", [("gaussian", 70), ("rademacher", 1100), ("sparse", 70)]
)
def test_layout_is_the_contract_s(generator, distribution, dim):
    p = projection_matrix(77, 3, 4, dim, distribution, dtype=torch.float64)
    expected = torch.from_numpy(restatement.projection(77, 3, 4, dim, distribution))
    assert torch.equal(p, expected)


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
@pytest.mark.parametrize("start", [0, 1, 15, 16, 37, 511, 512, 1000])
@pytest.mark.parametrize("dim", [0, 1, 7, 129, 1134])
def test_a_slice_of_z_is_z_of_the_slice(generator, distribution, start, dim):
    whole = philox.draw(5, 1, 3, start + dim, distribution)
    assert torch.equal(philox.draw(5, 1, 3, dim, distribution, start=start), whole[:, start:])


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_native_and_torch_draw_the_same_bits(distribution, monkeypatch):
    native = philox.draw(2**62 + 12345, 9, 64, 2048, distribution)
    monkeypatch.setattr(philox, "_C", None)
    assert torch.equal(philox.draw(2**62 + 12345, 9, 64, 2048, distribution), native)


def test_rank_zero_is_empty(generator):
    for distribution in philox.DISTRIBUTIONS:
        assert philox.draw(1, 0, 0, 5, distribution).shape == (0, 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="distribution must be one of .* got 'uniform'"):
        philox.draw(1, 0, 2, 2, "uniform")
    with pytest.raises(ValueError, match="dim must not be negative, got -1"):
        philox.draw(1, 0, 2, -1)
    with pytest.raises(ValueError, match="rank must be at least 1 to place 3 columns, got 0"):
        philox.sparse(1, 0, 0, 3)


def test_normals_have_the_moments_of_a_normal():
    z = philox.draw(11, 0, 256, 4096).double().flatten()
    n = z.numel()  # five standard errors of each moment of a normal
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert 4.4 < z.abs().max() <= 5.78  # a million draws; the generator's end


def test_signs_are_fair():
    z = philox.draw(11, 0, 256, 4096, "rademacher").double()
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_rows_epochs_keys_and_neighbours_are_uncorrelated(distribution):
    def z(key, epoch):
        return philox.draw(key, epoch, 64, 4096, distribution).double()

    one = z(1, 0)
    gram = one @ one.t() / 4096
    assert (gram - torch.diag(gram.diag())).abs().max() < 6 / math.sqrt(4096)  # 2016 pairs
    for other in (z(1, 1), z(2, 0), z(1 | 1 << 32, 0), one.roll(1, 1), one.roll(8, 1)):
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())
    assert abs((one**2 * one.roll(1, 1) ** 2).mean() - 1) < 5 * math.sqrt(8 / one.numel())


@pytest.mark.parametrize("distribution", philox.DISTRIBUTIONS)
def test_norms_are_preserved_as_in_theorem_a1(distribution):
    rank, eps, n = 256, 0.35, 500
    x = torch.randn(1024, n, dtype=torch.float64)
    p = projection_matrix(3, 0, rank, 1024, distribution, dtype=torch.float64)
    ratio = (p @ x).square().sum(0) / x.square().sum(0)
    # P(one outside) <= 2 exp(-rank eps^2 / 8) = 0.04, so more than 60 of 500 is beyond 9 sigma;
    # a ratio's standard deviation is sqrt(2 / rank) = 0.088, so its mean over 500 is 0.004.
    assert ((ratio - 1).abs() > eps).sum() < 60
    assert abs(ratio.mean() - 1) < 5 * math.sqrt(2 / rank / n)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_z_is_the_same_in_every_dtype(dtype):
    z = philox.draw(1, 0, 8, 100)
    expected = (z.double() / math.sqrt(8)).to(dtype)
    p = projection_matrix(1, 0, 8, 100, dtype=dtype)
    assert p.dtype == dtype
    torch.testing.assert_close(p, expected)
