"""The core of compression: the stack, laws, tables, rounding, and bijections of integers."""

import decimal
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import nn

from musigma.coding import densities, laws, numerics
from musigma.coding.coder import find_grids, layer_rule
from musigma.coding.densities import Quantizer, law_of
from musigma.coding.errors import CodingError, NumericsDiffer
from musigma.coding.laws import SHARPNESS, Bits, Mixture, Normal, Weights
from musigma.coding.numerics import Rounding
from musigma.coding.rules import _RULES, ratio, triangles
from musigma.coding.stack import ONE, Exhausted, Stack
from musigma.distributions import OneHotLatents
from musigma.gaussian import DiagonalGaussian, Format
from musigma.layers import (
    MADE,
    UMNN,
    ActNorm,
    Additive,
    Affine,
    Autoregressive,
    AutoregressiveConv,
    Bernstein,
    Checkerboard,
    CircularSpline,
    Composed,
    Coupling,
    Elementwise,
    Flip,
    HaarSqueeze,
    IntegerShift,
    InvertibleConv,
    LinearSpline,
    Logit,
    Monotone,
    Permutation,
    QuadraticSpline,
    Rescale,
    Rotation,
    Spline,
    Squeeze,
    Standardize,
)
from musigma.model import Bijection, Inverse

quick = settings(max_examples=40, deadline=None)


def stack(words=4096, seed=0):
    made = np.random.default_rng(seed).integers(1, 1 << 32, words, dtype=np.uint32)
    return Stack(made, foreign=True)


def content(of: Stack):
    return of.words(foreign=True).tolist()


# -- the stack

SIZES = st.one_of(st.sampled_from([1, 2, 3, 1 << 23, (1 << 24) - 1, 1 << 24]), st.integers(1, 999))
ONES = st.one_of(st.sampled_from([1, 2, ONE // 2, ONE - 2, ONE - 1]), st.integers(1, ONE - 1))


@quick
@given(st.lists(SIZES, max_size=30), st.lists(ONES, max_size=30), st.integers(0, 99))
def test_pop_and_push_undo_each_other(sizes, ones, seed):
    sizes, ones = np.array(sizes, np.int64), np.array(ones, np.int64)
    s = stack(64, seed)
    before = content(s)
    drawn, bits = s.pop(sizes), s.pop_bits(ones)
    assert ((drawn >= 0) & (drawn < sizes)).all()
    s.push_bits(bits, ones)
    s.push(drawn, sizes)
    assert content(s) == before
    rng = np.random.default_rng(seed)
    values, answers = rng.integers(0, sizes), rng.integers(0, 2, ones.shape)
    s.push(values, sizes)
    s.push_bits(answers, ones)
    assert (s.pop_bits(ones) == answers).all()
    assert (s.pop(sizes) == values).all()
    assert content(s) == before


@pytest.mark.parametrize("p", [1, 1000, ONE // 3, ONE // 2, ONE - 1000])
def test_the_cost_of_a_bit_is_its_information(p):
    n, rng = 100_000, np.random.default_rng(0)
    bits = rng.random(n) < max(p / ONE, 1e-3)
    s = stack(8)
    before = s.bits
    s.push_bits(bits, np.full(n, p))
    ideal = -(bits.sum() * math.log2(p / ONE) + (~bits).sum() * math.log2(1 - p / ONE))
    assert s.bits - before == pytest.approx(ideal, rel=1e-4, abs=33)


@pytest.mark.parametrize("size", [3, 7, 1000, 1 << 10, 1 << 24, 999 << 10, 5 << 12])
def test_the_cost_of_an_integer_is_the_logarithm_of_its_bound(size):
    n = 100_000
    s = stack(8)
    before = s.bits
    s.push(np.random.default_rng(0).integers(0, size, n), np.full(n, size))
    assert s.bits - before == pytest.approx(n * math.log2(size), rel=1e-4, abs=33)


@quick
@given(st.integers(1, 20), st.sampled_from([3 << 10, 1 << 24, 7, 1 << 20, 1023 << 14]))
def test_a_stack_with_too_few_bits_is_unchanged(words, size):
    s = stack(words)
    before = content(s)
    for pop in (s.pop, s.pop_bits):
        with pytest.raises(Exhausted):
            pop(np.full(32 * 20 + 64, size if pop == s.pop else ONE // 2))
        assert content(s) == before
    free = s.bits
    fits = max(0, int((free - 64) // math.log2(size)) + 2)  # the last ones do not, or halves of it
    for n in range(max(0, fits - 6), fits + 3):
        try:
            drawn = s.pop(np.full(n, size))
        except Exhausted:
            assert content(s) == before
        else:
            s.push(drawn, np.full(n, size))
            assert content(s) == before


BAD = {
    "NaN": lambda s: s.push(np.array([math.nan]), np.array([4])),
    "a fraction": lambda s: s.push(np.array([1.5]), np.array([4])),
    "too large": lambda s: s.push(np.array([1, 4]), np.array([4, 4])),
    "negative": lambda s: s.push(np.array([1, -1]), np.array([4, 4])),
    "wrapped": lambda s: s.push(np.array([1 << 32]), np.array([4])),
    "wrapped size": lambda s: s.push(np.array([1]), np.array([(1 << 32) + 4])),
    "another number": lambda s: s.push(np.array([1, 1]), np.array([4])),
    "size 0": lambda s: s.pop(np.array([4, 0])),
    "size below": lambda s: s.pop(np.array([-4])),
    "size above": lambda s: s.pop(np.array([(1 << 24) + 1])),
    "size NaN": lambda s: s.pop(np.array([math.nan])),
    "a wrapped size": lambda s: s.pop(np.array([(1 << 32) + 4])),
    "no bit": lambda s: s.push_bits(np.array([1, 2]), np.array([9, 9])),
    "more bits": lambda s: s.push_bits(np.array([1, 1]), np.array([9])),
    "no bit NaN": lambda s: s.push_bits(np.array([math.nan]), np.array([9])),
    "never": lambda s: s.push_bits(np.array([1]), np.array([0])),
    "always": lambda s: s.pop_bits(np.array([ONE])),
    "p NaN": lambda s: s.pop_bits(np.array([math.nan])),
    "p inf": lambda s: s.push_bits(np.array([1]), np.array([math.inf])),
}


@pytest.mark.parametrize("what", BAD)
def test_invalid_values_are_refused_and_the_stack_is_unchanged(what):
    s = stack(9)
    before = content(s)
    with pytest.raises(ValueError, match=r"(values|sizes|bits|ones): expected"):
        BAD[what](s)
    assert content(s) == before


def test_words_that_are_not_a_stack_are_refused():
    with pytest.raises(ValueError, match="words: these are not a stack"):
        Stack(np.array([1, 0], np.uint32))
    s = stack(9)
    s.push(np.array([1]), np.array([3]))
    with pytest.raises(ValueError, match="what it began with"):
        s.words(foreign=True)


def test_a_copy_is_independent_and_lowest_is_tracked():
    s = stack(99)
    before, twin = content(s), s.copy()
    s.pop(np.full(20, 1 << 10))
    assert content(twin) == before
    twin.mark()
    drawn = twin.pop(np.full(20, 1 << 10))
    low = twin.bits
    twin.push(drawn, np.full(20, 1 << 10))
    assert twin.lowest == low < twin.bits


# -- laws, compared with masses by scipy


def normal(mean, log_std, wide=False):
    return Normal(np.array(mean), np.array(log_std), wide=wide)


def normal_masses(mean, log_std, k):
    std = math.exp(log_std / SHARPNESS)
    edges = (np.append(k, k[-1] + 1) - 0.5 - mean) / std
    upper = stats.norm.sf(edges)
    return np.where(edges[:-1] < 0, np.diff(stats.norm.cdf(edges)), -np.diff(upper))


def costs(law_of, values, per=200):
    """Bits for each value, from many copies in one push."""
    found = []
    for v in values:
        s = stack(8)
        before = s.bits
        law_of(per).push(s, np.full(per, v))
        found.append((s.bits - before) / per)
    return np.array(found)


class Probabilities:
    """A stack that multiplies the probabilities of what is pushed."""

    def __init__(self, shape):
        self.mass = np.ones(shape)

    def push_bits(self, bits, ones):
        share = np.where(np.asarray(bits).astype(bool), ones, ONE - ones) / ONE
        same = share.size == self.mass.size
        self.mass = self.mass * (share.reshape(self.mass.shape) if same else share.prod())

    def push(self, values, sizes):
        assert ((values >= 0) & (values < sizes)).all()
        self.mass = self.mass / sizes


def exact(law, values):
    """The mass of each value, from the probabilities of the decisions."""
    record = Probabilities(law.shape)
    law.push(record, values)
    return record.mass


def normal_law_masses(mean, log_std, k):
    found = []
    for value in k:
        try:
            found.append(exact(normal([mean], [log_std]), np.array([value]))[0])
        except ValueError:
            found.append(0)
    return np.array(found)


@pytest.mark.parametrize("log_std", [-256, -90, 0, 130, 256, 443, 512, 700])
def test_a_normal_law_is_a_gaussian(log_std):
    cells = 1 << (Normal.HALVINGS + laws._cell(log_std))
    k = np.arange(-cells // 2, cells // 2) + 17
    mass = normal_law_masses(17, log_std, k)
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    true = normal_masses(17, log_std, k)
    there = mass > 0
    divergence = mass[there] @ np.log2(mass[there] / np.maximum(true[there], 1e-300))
    assert -1e-9 < divergence < 3e-5
    assert np.abs(np.cumsum(mass) - np.cumsum(true)).max() < 3e-5
    centre = np.abs(k - 17) <= 3 * math.exp(log_std / SHARPNESS)
    np.testing.assert_allclose(np.log2(mass[centre]), np.log2(true[centre]), atol=0.04)


def test_costs_are_logarithms_of_masses():
    log_std = 300
    k = np.arange(-30, 31, 7)
    paid = costs(lambda n: normal(np.full(n, 0), np.full(n, log_std)), k)
    mass = normal_law_masses(0, log_std, k)
    np.testing.assert_allclose(paid, -np.log2(mass), atol=0.2)
    near, far = costs(
        lambda n: normal(np.full(n, 0), np.full(n, log_std), wide=True), [5, 1 << 20]
    )
    assert near == pytest.approx(paid[5], abs=0.2)
    assert far == pytest.approx(44, abs=1)


def test_a_wide_law_codes_outliers():
    law = normal(np.zeros(4, int), np.zeros(4, int), wide=True)
    values = np.array([0, -(1 << 22), 1 << 22, 511])
    s = stack()
    before = content(s)
    law.push(s, values)
    assert (law.pop(s) == values).all()
    assert content(s) == before
    with pytest.raises(OverflowError):
        law.push(s, np.array([0, 0, 0, 1 << 24]))
    with pytest.raises(ValueError, match="8 standard deviations"):
        normal([0], [0]).push(s, np.array([513]))


@quick
@given(
    st.lists(st.integers(-(1 << 40), 1 << 40), min_size=1, max_size=8),
    st.integers(-2560, 2560),
    st.booleans(),
    st.integers(0, 9),
)
def test_normal_laws_are_invertible(means, log_std, wide, seed):
    rng = np.random.default_rng(seed)
    mean = np.array(means)
    log_std = log_std + rng.integers(-50, 50, mean.shape)
    law = Normal(mean, log_std, wide=wide)
    undone(law, seed)
    far = np.floor(7 * np.exp(log_std.clip(-2560, 2560) / SHARPNESS)).astype(int)
    put(law, mean + rng.integers(-far, far + 1))


def undone(law, seed=0):
    """Popping values and pushing them again leaves the stack unchanged."""
    s = stack(2048, seed)
    before = content(s)
    drawn = law.pop(s)
    assert drawn.shape == law.shape
    law.push(s, drawn)
    assert content(s) == before


def put(law, values):
    """Popping returns what was pushed, and the stack is unchanged."""
    s = stack()
    before = content(s)
    law.push(s, values)
    assert (law.pop(s) == values).all()
    assert content(s) == before


@quick
@given(st.integers(2, 40), st.integers(1, 4), st.integers(0, 999), st.floats(0, 40))
def test_weights_are_invertible_and_sum_to_one(levels, shape, seed, spread):
    rng = np.random.default_rng(seed)
    logits = np.rint(rng.normal(0, spread, (1, levels, shape)) * SHARPNESS).astype(int)
    undone(Weights(logits), seed)
    put(Weights(logits), rng.integers(0, levels, (1, shape)))
    masses = [exact(Weights(logits), np.full((1, shape), k)) for k in range(levels)]
    whole = np.sum(masses, 0)
    assert (whole <= 1 + 1e-12).all()
    assert (whole > 1 - 1e-5).all()
    true = special.softmax(logits / SHARPNESS, 1)
    np.testing.assert_allclose(np.moveaxis(masses, 0, 1), true, atol=3e-6)


@quick
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 999))
def test_one_hot_rows_are_invertible_and_cost_their_log_mass(classes, variables, seed):
    torch.manual_seed(seed)
    dist = OneHotLatents(2 * torch.randn(3, variables, classes, dtype=torch.float64))
    law = law_of(dist, Quantizer(Rounding(), 0, 3, True))
    undone(law, seed)
    x = dist.sample()
    put(law, x.long().numpy())
    assert law.pop(stack()).sum(-1).tolist() == [[1] * variables] * 3
    record = Probabilities(())
    law.push(record, x.long().numpy())
    error = 3 * variables * (0.5 / SHARPNESS + 1e-5)
    assert math.log(record.mass) == pytest.approx(dist.log_prob(x).sum().item(), abs=2 * error)


def test_draws_are_existing_levels():
    """With five levels, no bits lead to a sixth one."""
    for seed in range(20):
        words = np.full(4096, (1 << 32) - 1 - seed, np.uint32)
        for law in (Weights(np.zeros((1, 5, 2000), int)), mixture(seed, 5, shape=(2000,))[0]):
            s = Stack(words, foreign=True)
            drawn = law.pop(s)
            assert drawn.max() <= 4
            law.push(s, drawn)
            assert s.words(foreign=True).tolist() == words.tolist()


@quick
@given(st.integers(-4000, 4000), st.integers(0, 99))
def test_bits_have_the_given_logit(logit, seed):
    law = Bits(np.full((3, 2), logit))
    undone(law, seed)
    put(law, np.random.default_rng(seed).integers(0, 2, (3, 2)))
    one, zero = (exact(law, np.full((3, 2), k))[0, 0] for k in (1, 0))
    assert one + zero == pytest.approx(1, abs=1e-12)
    assert one == pytest.approx(special.expit(logit / SHARPNESS), abs=4e-5)
    if abs(logit) % 2 == 0 and abs(logit) < 30 * SHARPNESS:  # on the table's points
        assert one == pytest.approx(special.expit(logit / SHARPNESS), abs=3e-7)


def mixture(seed, levels, k=3, shape=(4,)):
    rng = np.random.default_rng(seed)
    weights = rng.random((k, *shape)) + 0.01
    mean = rng.integers(-20 * 256, (levels + 20) * 256, (k, *shape))
    scale = np.exp(rng.normal(0, 1.5, (k, *shape)))
    return Mixture(weights, mean, 1 / scale, levels), weights, mean, scale


@quick
@given(st.integers(0, 9999), st.sampled_from([2, 8, 256, 5]))
def test_mixtures_are_invertible_and_have_the_right_masses(seed, levels):
    law, weights, mean, scale = mixture(seed, levels)
    undone(law, seed)
    put(law, np.random.default_rng(seed).integers(0, levels, 4))
    masses = np.stack([exact(law, np.full(4, k)) for k in range(levels)])
    assert (np.abs(masses.sum(0) - 1) < 1e-3).all()
    edges = np.arange(levels + 1)[:, None, None] - 0.5
    cdf = special.expit((edges - mean / 256) / scale)
    cdf[0], cdf[-1] = 0, 1
    true = (np.diff(cdf, axis=0) * weights).sum(1) / weights.sum(0)
    np.testing.assert_allclose(masses, true, atol=1e-4)
    inner = law.masses(np.full(4, levels - 1))
    np.testing.assert_allclose(inner, np.diff(cdf, axis=0)[-1], atol=1e-4)


@quick
@given(st.integers(-4096 * 6, 4096 * 6), st.integers(-300, 300), st.integers(0, 99))
def test_the_noise_law(mean, log_std, seed):
    law = densities.Noise(np.full((5,), mean), np.full((5,), log_std), 12)
    undone(law, seed)
    put(law, np.random.default_rng(seed).integers(0, 4096, 5))
    k = np.arange(4096)
    many = densities.Noise(np.full(k.shape, mean), np.full(k.shape, log_std), 12)
    mass = exact(many, k)
    assert mass.sum() == pytest.approx(1, abs=1e-9)
    ends = special.logit(np.arange(1025) / 1024)
    true = np.diff(stats.norm.cdf((ends - mean / 4096) / math.exp(log_std / SHARPNESS)))
    np.testing.assert_allclose(mass.reshape(-1, 4).sum(1), true, atol=3e-5)


def test_draws_have_their_moments():
    s, n = stack(200_000), 20_000
    for log_std in (0, 200, 600):
        std = math.exp(log_std / SHARPNESS)
        drawn = normal(np.full(n, 5), np.full(n, log_std)).pop(s)
        assert drawn.mean() == pytest.approx(5, abs=5 * std / math.sqrt(n))
        assert drawn.var() == pytest.approx(std**2 + 1 / 12, rel=0.06)
    logits = np.array([0, 128, -200, 64])[None, :, None].repeat(n, 2)
    drawn = Weights(logits).pop(s)
    shares = np.bincount(drawn.ravel(), minlength=4) / n
    np.testing.assert_allclose(shares, special.softmax(logits[0, :, 0] / SHARPNESS), atol=0.02)
    assert Bits(np.full(n, 128)).pop(s).mean() == pytest.approx(special.expit(1), abs=0.02)
    law, weights, mean, scale = mixture(1, 256, shape=(1,))
    law = Mixture(weights.repeat(n, 1), mean.repeat(n, 1), 1 / scale.repeat(n, 1), 256)
    k = np.arange(256)
    mass = np.array([exact(mixture(1, 256, shape=(1,))[0], np.array([v]))[0] for v in k])
    spread = math.sqrt(mass @ k**2 - (mass @ k) ** 2)
    assert law.pop(s).mean() == pytest.approx(mass @ k, abs=5 * spread / math.sqrt(n))


def test_a_narrow_law_draws_no_outliers_and_a_wide_one_may():
    """The cost of cutting the tails, a thousandth of a bit, and the cost of an outlier."""
    for log_std in (-300, 0, 100, 300, 600):
        cells = 1 << (Normal.HALVINGS + laws._cell(log_std))
        k = np.arange(-cells // 2, cells // 2)
        mass = normal_law_masses(0, log_std, k)
        std = math.exp(log_std / SHARPNESS)
        model = 0.5 * (k / std) ** 2 / math.log(2)  # the cost by a Gaussian, up to a constant
        ideal = (normal_masses(0, log_std, k) * model).sum()
        assert (mass * model).sum() - ideal < 1e-3
        far = np.arange(1 << 24, dtype=float) - (1 << 23)  # where a wide law draws, too
        wild = laws.FAR / ONE * 0.5 * np.mean((far * 2.0 ** laws._cell(log_std) / std) ** 2)
        assert wild > 1000
    s = stack(200_000)
    drawn = normal(np.zeros(100_000, int), np.full(100_000, 300)).pop(s)
    assert np.abs(drawn).max() < 8.1 * math.exp(300 / SHARPNESS)
    dist = DiagonalGaussian(torch.zeros(2, 3), torch.zeros(2, 3), 1)
    for drawn in (True, False):
        assert law_of(dist, Quantizer(Rounding(), 4, 2, drawn)).wide is not drawn


# -- tables


def test_tables_agree_with_scipy():
    t = np.arange(-8 * 64, 8 * 64 + 1) / 64
    np.testing.assert_allclose(laws._normal(), stats.norm.cdf(t), rtol=1e-12)
    t = np.arange(-32 * 64, 32 * 64 + 1) / 64
    np.testing.assert_allclose(laws._logistic(), special.expit(t), rtol=1e-13)
    for parts in (SHARPNESS, 4096):
        t = np.arange(-20 * parts, 20 * parts + 1) / parts
        np.testing.assert_allclose(laws._exponentials(parts), np.exp(t), rtol=1e-13)
    for table in (laws._normal(), laws._logistic(), laws._exponentials(SHARPNESS)):
        assert (np.diff(table) > 0).sum() > len(table) * 0.8
        assert (np.diff(table) >= 0).all()


def test_interpolation_between_the_entries_of_a_table():
    t = np.linspace(-9, 9, 10_001)
    np.testing.assert_allclose(laws.gaussian(t), stats.norm.cdf(t), atol=1e-5)
    np.testing.assert_allclose(laws.logistic(4 * t), special.expit(4 * t), atol=1e-5)
    assert laws.gaussian(np.array([-1e9, 1e9])).tolist() == laws._normal()[[0, -1]].tolist()
    whole = np.array([-(10**9), 0, 10**9])
    got = laws.exponential(whole, SHARPNESS)
    np.testing.assert_allclose(got, [math.exp(-20), 1, math.exp(20)], rtol=1e-13)


def test_logits_are_correctly_rounded():
    k, found = np.arange(1, 1024), densities._logits()
    np.testing.assert_allclose(found[1:-1], special.logit(k / 1024), rtol=1e-13, atol=1e-15)
    assert found[[0, 512, -1]].tolist() == [-16, 0, 16]
    with decimal.localcontext(decimal.Context(prec=60)):
        for i in k.tolist():
            assert found[i] == float((decimal.Decimal(i) / (1024 - i)).ln()), i


# -- rounding


def test_rounding_lists_values_near_the_middle_and_looks_them_up():
    values = torch.tensor([1.25, 2.5, 2.5 + 1e-9, 3.5, -0.5 - 1e-9], dtype=torch.float64)
    there = Rounding()
    whole = there(values, 1.0, 7)
    assert set(there.listed) == {(7, 1), (7, 2), (7, 3), (7, 4)}
    for noise in (0, 1e-9, -2e-9, 4e-8):
        here = Rounding(there.listed)
        assert (here(values + noise, 1.0, 7) == whole).all()
    with pytest.raises(NumericsDiffer):
        Rounding({})(values, 1.0, 7)
    with pytest.raises(NumericsDiffer):
        Rounding(there.listed)(values, 1.0, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**53])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(CodingError, match="not finite"):
        Rounding()(torch.tensor([1.0, bad]), 1.0, 0)


# -- rules of bijections


class Net(nn.Module):
    """A small network over any axis 1."""

    def __init__(self, given, out, seed=0, gain=1.0):
        super().__init__()
        weight = torch.randn(out, given, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(gain * weight)

    def forward(self, x, context=None):
        return torch.einsum("oc,bc...->bo...", self.weight.to(x), torch.tanh(x))


def _norm(c, seed, gain):
    layer, g = ActNorm(c), torch.Generator().manual_seed(seed)
    layer.bias.data = torch.randn(c, generator=g)
    layer.log_scale.data = gain * torch.randn(c, generator=g).clamp(-2, 2)
    return layer


def _standardize(c, seed, gain):
    layer, g = Standardize(c), torch.Generator().manual_seed(seed)
    layer.set(torch.randn(c, generator=g), (gain * torch.randn(c, generator=g)).exp())
    return layer


def _conv(c, seed, gain, lu):
    torch.manual_seed(seed)
    layer = InvertibleConv(c, lu=lu)
    for p in layer.parameters():
        p.data += 0.2 * gain * torch.randn(p.shape)
    return layer


def _rotation(c, seed):
    torch.manual_seed(seed)
    return Rotation(c)


def _maf(c, seed, gain, kind):
    torch.manual_seed(seed)
    bend = Affine(Format(scale="softclip")) if kind == "affine" else Spline()
    return Autoregressive(MADE(bend.owners(c), hidden=[8]), map=bend)


INTERVALS = {
    "bernstein": Bernstein(degree=6),
    "circular": CircularSpline(period=4.0),
    "composed": Composed(LinearSpline(), Affine()),
    "linear": LinearSpline(),
    "quadratic": QuadraticSpline(),
    "umnn": UMNN(signal=3, hidden=[8]),
}


def _couple(c, seed, gain, kind):
    affine = Affine(Format(scale="log_std", bounds=(-6, 6)))
    maps = {"affine": affine, "additive": Additive(), "spline": Spline(), **INTERVALS}
    bend = (maps | {"integers": IntegerShift(9.0)})[kind]
    return Coupling(Net(c // 2, bend.outputs * (c - c // 2), seed, gain), map=bend)


def _elementwise(shape, seed, gain):
    layer, g = Elementwise(shape, map=Spline()), torch.Generator().manual_seed(seed)
    layer.h.data = 0.5 * gain * torch.randn(layer.h.shape, generator=g)
    return layer


def _raster(c, seed, gain):
    layer = AutoregressiveConv(c, reverse=bool(seed % 2))
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = 0.2 * gain * torch.randn(layer.weight.shape, generator=generator) / c
    return layer


LAYERS = {  # builder, dimensions, whether values are in [0, 1), tolerance to the real numbers
    "actnorm": (_norm, (2, 4), False, 2e-2),
    "standardize": (_standardize, (2,), False, 2e-2),
    "lu": (lambda c, s, g: _conv(c, s, g, True), (2, 4), False, 2e-2),
    "conv": (lambda c, s, g: _conv(c, s, g, False), (2, 4), False, 2e-2),
    "rotation": (lambda c, s, g: _rotation(c, s), (2, 4), False, 2e-2),
    "affine": (lambda c, s, g: _couple(c, s, g, "affine"), (2, 4), False, 2e-2),
    "additive": (lambda c, s, g: _couple(c, s, g, "additive"), (2, 4), False, 2e-3),
    "spline": (lambda c, s, g: _couple(c, s, g, "spline"), (2, 4), False, 2e-2),
    "maf": (lambda c, s, g: _maf(c, s, g, "affine"), (2,), False, 2e-2),
    "nsf": (lambda c, s, g: _maf(c, s, g, "spline"), (2,), False, 2e-2),
    "permutation": (lambda c, s, g: Permutation.reverse(c), (2, 4), False, 0),
    "shuffle": (lambda c, s, g: Permutation.shuffle(c), (2, 4), False, 0),
    "flip": (lambda c, s, g: Flip(), (2, 4), False, 0),
    "squeeze": (lambda c, s, g: Squeeze(), (4,), False, 0),
    "haar": (lambda c, s, g: HaarSqueeze(), (4,), False, 2e-2),
    "raster": (lambda c, s, g: _raster(c, s, g), (4,), False, 2e-3),
    "integers": (lambda c, s, g: _couple(c, s, g, "integers"), (2, 4), False, 0),
    "black": (lambda c, s, g: Checkerboard(), (4,), False, 0),
    "white": (lambda c, s, g: Checkerboard(white=True), (4,), False, 0),
    "units": (lambda c, s, g: Rescale(-(2.0 ** (s % 9 - 4)), 0.5), (2, 4), False, 0),
    "elementwise": (_elementwise, (2,), False, 2e-2),
    "per channel": (lambda c, s, g: _elementwise((c, 1, 1), s, g), (4,), False, 2e-2),
    **{
        name: (lambda c, s, g, name=name: _couple(c, s, g, name), (2,), False, 2e-2)
        for name in INTERVALS
    },
    "logit": (lambda c, s, g: Logit(10.0 ** -(1 + s % 5)), (2, 4), True, 2e-2),
}
FINE = 14


def at_work(layer, s, rounding, grid):
    rule, inner, inverted = layer_rule(layer)
    above = rule.grid_above(inner, grid)

    def given(whole, g):
        return torch.from_numpy(np.ldexp(whole.astype(float), -g))

    working = rule(inner, s, lambda v, scale, w: rounding(v, scale, w), (grid, above), given, None)
    steps = (working.down, working.up) if inverted else (working.up, working.down)
    return steps, above


def test_every_rule_is_tested():
    layers = [make(4, 0, 1.0) for make, *_ in LAYERS.values()]
    tried = {type(layer) for layer in layers} | {
        type(getattr(layer, "map", None)) for layer in layers
    }
    ours = {kind for kind in _RULES if kind.__module__.startswith("musigma.layers")}
    # maps that are inverted by root finding differ only in `forward`, and one of them is tried
    assert {kind for kind in ours if not issubclass(kind, Monotone)} <= tried
    assert any(issubclass(kind, Monotone) for kind in tried)


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_layers_are_invertible_and_close_to_the_real_ones(name, data):
    make, dims, unit, bound = LAYERS[name]
    c, n = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    shape = (n, c) if data.draw(st.sampled_from(dims)) == 2 else (n, c, 2, 4)
    seed, gain = data.draw(st.integers(0, 999)), data.draw(st.sampled_from([0.1, 1.0]))
    layer = make(c, seed, gain).double()
    if not unit and data.draw(st.booleans()):
        layer = Inverse(layer)
        if name == "units" and abs(layer.bijection.scale) != 1:
            with pytest.raises(ValueError, match="has no coding rule"):
                refused(layer)
            return
    rng = np.random.default_rng(seed)
    x = rng.random(shape) if unit else rng.normal(0, 1, shape)
    whole = np.floor(x * 2**FINE).astype(np.int64)
    if isinstance(layer, Inverse) and name in ("squeeze", "black", "white", "haar"):
        real = torch.from_numpy(whole)
        shaped = Squeeze() if name == "haar" else layer.bijection
        whole = shaped(real)[0].numpy()
    s, listing = stack(20_000, seed), Rounding()
    before, bits = content(s), s.bits
    with torch.no_grad():
        (up, down), above = at_work(layer, s, listing, FINE)
        y = up(whole)
        if not bound:
            assert s.bits == bits
        (_, down), _ = at_work(layer, s, Rounding(listing.listed), FINE)
        floats, _ = layer(torch.from_numpy(whole * 2.0**-FINE))
        off = np.abs(y * 2.0**-above - floats.numpy())
        splines = ("spline", "nsf", "elementwise", "per channel", *INTERVALS)
        if isinstance(layer, Inverse) and name in splines:
            # lines between intervals of 1/32 are as close as that on the side of the intervals
            there, _ = layer.inverse(torch.from_numpy(y * 2.0**-above))
            assert (np.abs(there.numpy() - whole * 2.0**-FINE) <= 2**-5 + 1e-3).all()
        else:
            close = off <= bound * (1 + np.abs(floats.numpy()))
            if name == "logit" and not isinstance(layer, Inverse):  # its slope is up to 1e5
                there, _ = layer.inverse(torch.from_numpy(y * 2.0**-above))
                close |= np.abs(there.numpy() - whole * 2.0**-FINE) <= 1e-3
            assert close.all()
        assert (down(y) == whole).all()
    assert content(s) == before


def refused(layer):
    from musigma.distributions import StandardNormal
    from musigma.model import Chain, Prior

    x = torch.zeros(1, 2, dtype=torch.float64)
    find_grids(Chain([layer], Prior(StandardNormal((2,)))).double(), x, None, [])


@pytest.mark.parametrize("name", [n for n in LAYERS if LAYERS[n][3] and n != "bernstein"])
def test_the_cost_of_a_layer_is_its_log_determinant(name):
    make, dims, unit, _ = LAYERS[name]
    rng = np.random.default_rng(3)
    shape = (3000, 4) if dims == (2,) else (200, 4, 4, 4)
    layer = make(4, 5, 0.3).double()
    x = rng.random(shape) if unit else rng.normal(0, 1, shape)
    whole = np.floor(x * 2**FINE).astype(np.int64)
    s = stack(60_000)
    bits = s.bits
    with torch.no_grad():
        (up, _), above = at_work(layer, s, Rounding(), FINE)
        up(whole)
        log_det = layer(torch.from_numpy(whole * 2.0**-FINE))[1].sum().item()
    grids = whole.size * (above - FINE) * math.log(2)  # a change of grid is a change of units
    ideal = -(log_det + grids) / math.log(2)
    assert (s.bits - bits - ideal) / whole.size == pytest.approx(0, abs=4e-3)


@pytest.mark.parametrize("log_scale", [-30, -9, -6, -3, -1e-3, 0, 1e-3, 3, 6, 9, 30])
def test_ratios(log_scale):
    by, into = ratio(np.array([round(log_scale * 4096)]))
    assert 1 <= by <= 1 << 24
    assert 1 <= into <= 1 << 24
    if -8 < log_scale < 15:
        assert math.log(by[0] / into[0]) == pytest.approx(log_scale, abs=1e-3)


@pytest.mark.parametrize("log_scale", [-30.0, -6.0, 6.0, 30.0])
@pytest.mark.parametrize("lu", [None, True, False])
def test_extreme_layers_are_lossless_or_overflow(log_scale, lu):
    if lu is None:
        layer = ActNorm(3)
        layer.log_scale.data[:] = torch.tensor([log_scale, -log_scale, 0])
    else:
        layer = InvertibleConv(3, lu=lu)
        if lu:
            layer.log_scale.data[:] = torch.tensor([log_scale, -log_scale, 0])
        else:
            layer.weight.data[:, 1] = layer.weight[:, 0] + 1e-2 * torch.randn(3)
    whole = np.random.default_rng(0).integers(-(1 << 14), 1 << 14, (2, 3, 2, 2))
    s = stack()
    before = content(s)
    (up, down), _ = at_work(layer, s, Rounding(), FINE)
    try:
        y = up(whole)
    except OverflowError:
        assert abs(log_scale) > 6
        return
    assert (down(y) == whole).all()
    assert content(s) == before


def test_a_layer_that_is_not_finite_or_singular_is_refused():
    layer = ActNorm(2)
    layer.bias.data[0] = math.nan
    singular = InvertibleConv(2, lu=False)
    singular.weight.data[:] = 1.0
    for bad in (layer, singular):
        (up, _), _ = at_work(bad, stack(), Rounding(), FINE)
        with pytest.raises(CodingError, match="not finite, or a singular matrix"):
            up(np.ones((1, 2), np.int64))
    far = ActNorm(2)
    far.bias.data[0] = 1e30
    (up, _), _ = at_work(far, stack(), Rounding(), FINE)
    with pytest.raises(OverflowError):
        up(np.ones((1, 2), np.int64))


@quick
@given(st.integers(1, 9), st.integers(0, 999))
def test_triangles(n, seed):
    matrix = np.random.default_rng(seed).normal(size=(n, n))
    order, lower, upper = triangles(matrix)
    lower, upper = lower.numpy() + np.eye(n), upper.numpy()
    np.testing.assert_allclose((lower @ upper)[order], matrix, atol=1e-9)
    assert np.abs(lower).max() <= 1


class Strange(Bijection):
    def forward(self, x, context=None):
        return x, x.new_zeros(len(x))

    inverse = forward


def test_a_layer_without_a_rule_is_refused_by_name():
    for layer in (Strange(), Inverse(Strange())):
        with pytest.raises(ValueError, match="Strange has no coding rule"):
            refused(layer)
    with pytest.raises(ValueError, match="must be a power of two"):
        refused(Rescale(0.3))
    with pytest.raises(ValueError, match=r"Inverse\(Logit\) has no coding rule"):
        refused(Inverse(Logit()))


# -- kernels


@quick
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 4),
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 2),
)  # fmt: skip
def test_convolutions_equal_those_of_torch(channels, out, size, padding, stride, dilation, groups):
    torch.manual_seed(0)
    channels, out = channels * groups, out * groups
    x = torch.randn(2, channels, 7, 6, dtype=torch.float64)
    weight = torch.randn(out, channels // groups, size, size, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    settings_ = (bias, stride, padding, dilation, groups)
    true = torch.conv2d(x, weight, *settings_)
    with numerics.Kernels():
        made = torch.nn.functional.conv2d(x, weight, *settings_)
        if size % 2:
            same = torch.nn.functional.conv2d(x, weight, bias, padding="same", groups=groups)
            assert same.shape == (2, out, 7, 6)
    torch.testing.assert_close(made, true)
