"""Layers, maps, distributions and models that only these tests define are coded by their rules."""

import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Distribution, Independent, Laplace, constraints

from musigma import checkpoint, coding, zoo
from musigma.coding import rules as coding_rules
from musigma.coding.coder import find_grids
from musigma.coding.laws import SHARPNESS, Bisected, Mixture, Weights, exponential
from musigma.distributions import OneHotHead, StandardNormal, StandardUniform, UniformOneHot
from musigma.gaussian import DiagonalGaussian, GaussianHead
from musigma.layers import Additive, Affine, Coupling, Dequantize, Permutation, Rescale, Split
from musigma.layers.maps import Map
from musigma.model import VAE, Bijection, Chain, Inverse, Layer, Model, Prior
from musigma.zoo import architecture

LEVELS = 8


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Rules and architectures are unknown to other tests."""
    monkeypatch.setattr(coding_rules, "_RULES", dict(coding_rules._RULES))
    architectures = dict(zoo.ARCHITECTURES)
    for module in (zoo, checkpoint):
        monkeypatch.setattr(module, "ARCHITECTURES", architectures)


# -- parts of models


class Wave(Bijection):
    """Every feature but the first is shifted by a sine of the first, times its weight."""

    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features - 1))

    def shift(self, first):
        return self.weight * torch.sin(first)

    def forward(self, x, context=None):
        return torch.cat([x[:, :1], x[:, 1:] + self.shift(x[:, :1])], 1), x.new_zeros(len(x))

    def inverse(self, y, context=None):
        return torch.cat([y[:, :1], y[:, 1:] - self.shift(y[:, :1])], 1), y.new_zeros(len(y))


class WaveRule(coding.Rule):
    def shift(self, x):
        first = self.tensor(x[:, :1], self.below)
        return self.integers(self.layer.shift(first), 2.0**self.below, 0)

    def up(self, x):
        return np.concatenate([x[:, :1], x[:, 1:] + self.shift(x)], 1)

    def down(self, y):
        return np.concatenate([y[:, :1], y[:, 1:] - self.shift(y)], 1)


class Bend(Bijection):
    """y = sinh(asinh(x) + a) for every feature."""

    def __init__(self, features):
        super().__init__()
        self.a = nn.Parameter(0.3 * torch.randn(features))

    def _map(self, x, a):
        y = torch.sinh(torch.asinh(x) + a)
        return y, 0.5 * torch.log((1 + y**2) / (1 + x**2)).sum(1)

    def forward(self, x, context=None):
        return self._map(x, self.a)

    def inverse(self, y, context=None):
        return self._map(y, -self.a)


class BendMap(Map):
    """The same, with a from a network."""

    outputs = 1

    def forward(self, x, h):
        y = torch.sinh(torch.asinh(x) + torch.tanh(h))
        return y, 0.5 * torch.log((1 + y**2) / (1 + x**2))

    def inverse(self, y, h):
        return self.forward(y, -torch.tanh(h).atanh())


class Augment(Layer):
    """Appends noise that is drawn given x; not a bijection."""

    exact = False

    def __init__(self, features, noise):
        super().__init__()
        self.features, self.head = features, Gaussian(features, noise)

    def infer(self, x, trace, context=None):
        return torch.cat([x, trace.q(self, self.head(x))], 1)

    def generate(self, z, trace, context=None):
        x, noise = z[:, : self.features], z[:, self.features :]
        if trace.scoring:
            trace.q(self, self.head(x), noise)
        return x


class Gaussian(nn.Module):
    """A head: the distribution of `features` numbers given others."""

    def __init__(self, given, features):
        super().__init__()
        self.net = nn.Linear(given, 2 * features)

    def forward(self, x, context=None):
        mean, log_std = (0.2 * self.net(x)).chunk(2, 1)
        return DiagonalGaussian(mean, log_std - 1, 1)


class Slope(Distribution):
    """Levels 0 .. 7 whose log mass is linear in the level."""

    def __init__(self, slope):
        self.slope = slope
        levels = torch.arange(LEVELS, dtype=slope.dtype)
        self.log_mass = (slope.unsqueeze(1) * levels.view(1, -1, 1)).log_softmax(1)
        super().__init__(slope.shape[:1], slope.shape[1:], validate_args=False)

    @property
    def support(self):
        return constraints.independent(constraints.nonnegative_integer, 1)

    def log_prob(self, value):
        return self.log_mass.gather(1, value.long().unsqueeze(1)).sum((1, 2))

    def sample(self, sample_shape=()):
        masses = self.log_mass.exp().movedim(1, -1).reshape(-1, LEVELS)
        return torch.multinomial(masses, 1).view_as(self.slope).to(self.slope)


def slope_rule(dist, quantizer):
    return Weights(quantizer.integers(dist.log_mass.clamp(min=-60), SHARPNESS, 0))


class SlopeHead(nn.Module):
    def __init__(self, given, features):
        super().__init__()
        self.net = nn.Linear(given, features)

    def forward(self, z, context=None):
        return Slope(self.net(z))


class Logistic(Distribution):
    """A logistic distribution of real numbers, by the logarithm of its scale."""

    def __init__(self, log_scale):
        self.log_scale = log_scale
        super().__init__((), log_scale.shape, validate_args=False)

    @property
    def support(self):
        return constraints.independent(constraints.real, 1)

    def log_prob(self, value):
        t = value / self.log_scale.exp()
        terms = -t - 2 * nn.functional.softplus(-t) - self.log_scale
        return terms.sum(-1)

    def sample(self, sample_shape=()):
        shape = (*sample_shape, *self.log_scale.shape)
        return torch.rand(shape, dtype=self.log_scale.dtype).logit() * self.log_scale.exp()


class LogisticLaw(Bisected):
    """Its integers on a grid, around the middle of 2^20 levels."""

    levels = 1 << 20

    def __init__(self, log_scale, quantizer):
        inverse = exponential(-log_scale, SHARPNESS) / 2.0**quantizer.grid
        self.shape = (quantizer.n, *log_scale.shape)
        ones = np.ones((1, *self.shape))
        middle = self.levels // 2 * Mixture.PARTS
        mean = np.full(ones.shape, middle)
        self.mixture = Mixture(ones, mean, inverse * ones, self.levels)

    def below(self, k):
        return self.mixture.below(k)

    def push(self, stack, values):
        super().push(stack, values + self.levels // 2)

    def pop(self, stack):
        return super().pop(stack) - self.levels // 2


def logistic_rule(dist, quantizer):
    return LogisticLaw(quantizer.integers(dist.log_scale, SHARPNESS, 0), quantizer)


class LogisticHead(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(features))

    def forward(self, context=None):
        return Logistic(self.log_scale)


class LaplaceHead(nn.Module):
    """The distribution of torch itself."""

    def __init__(self, features):
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(features))

    def forward(self, context=None):
        return Independent(Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp()), 1)


class LaplaceLaw(Bisected):
    """A table of masses on 2^14 integers around zero."""

    levels = 1 << 14

    def __init__(self, log_scale, quantizer):
        self.shape = log_scale.shape
        self.scale = exponential(log_scale, SHARPNESS) * 2.0**quantizer.grid / 64

    def below(self, k):
        t = (k - self.levels / 2) / self.scale
        tail = 0.5 * exponential(-np.rint(np.abs(t) * 4096).astype(np.int64), 4096)
        return np.where(t < 0, tail, 1 - tail)

    def push(self, stack, values):
        stack.push(values % 64, np.full(self.shape, 64))
        super().push(stack, values // 64 + self.levels // 2)

    def pop(self, stack):
        upper = super().pop(stack) - self.levels // 2
        return upper * 64 + stack.pop(np.full(self.shape, 64))


def laplace_rule(dist, quantizer):
    log_scale = quantizer.integers(dist.scale.log(), SHARPNESS, 0)
    return LaplaceLaw(log_scale, quantizer)


class Halves(Model):
    """Generates z, then the left half given z, then the right half given both."""

    def __init__(self, features, latents=2):
        super().__init__()
        half = features // 2
        self.z, self.left, self.right = (Prior(StandardNormal((latents,))) for _ in range(3))
        self.posterior = Gaussian(features, latents)
        self.left.head = SlopeHead(latents, half)
        self.right.head = SlopeHead(latents + half, features - half)

    def infer(self, x, trace, context=None):
        z = trace.latent(self.z, self.posterior(x), self.z.head())
        left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        trace.p(self.right, self.right.head(torch.cat([z, left], 1)), right)
        trace.p(self.left, self.left.head(z), left)

    def generate(self, trace, context=None):
        z = trace.p(self.z, self.z.head())
        left = trace.p(self.left, self.left.head(z))
        x = torch.cat([left, trace.p(self.right, self.right.head(torch.cat([z, left], 1)))], 1)
        if trace.scoring:
            trace.q(self.z, self.posterior(x), z)
        return x

    def variables(self):
        yield from (self.z, self.left, self.right)

    def latents(self):
        yield self.z


def flow(layers, features, prior=None):
    """Levels to the unit interval, these layers, and a prior."""
    noise = StandardUniform((features,))
    first = [Dequantize(noise, levels=LEVELS), Rescale(1 / LEVELS, -0.5)]
    return Chain([*first, *layers], prior or Prior(StandardNormal((features,))))


class Net(nn.Module):
    def __init__(self, given, out):
        super().__init__()
        self.linear = nn.Linear(given, out)

    def forward(self, x, context=None):
        return self.linear(x)


BUILDERS = {
    "layer": lambda d: flow([Permutation.reverse(d), Wave(d)], d),
    "inverted layer": lambda d: flow([Inverse(Wave(d))], d),
    "increasing layer": lambda d: flow([Bend(d)], d),
    "map": lambda d: flow([Coupling(Net(d // 2, d - d // 2), map=BendMap())], d),
    "stochastic layer": lambda d: flow(
        [Augment(d, 3), Wave(d + 3)], d, Prior(StandardNormal((d + 3,)))
    ),
    "likelihood": lambda d: VAE(Gaussian(d, 2), SlopeHead(2, d), Prior(StandardNormal((2,)))),
    "prior": lambda d: flow([], d, Prior(LogisticHead(d))),
    "prior of torch": lambda d: flow([], d, Prior(LaplaceHead(d))),
    "prior of a VAE": lambda d: VAE(Gaussian(d, 2), SlopeHead(2, d), Prior(LogisticHead(2))),
    "model": Halves,
    "model under layers": lambda d: Chain([Permutation.reverse(d)], Halves(d)),
    "VAE over a model": lambda d: VAE(Gaussian(d, 4), SlopeHead(4, d), flow_of_latents(4)),
}
RULES = {
    Wave: WaveRule,
    Bend: coding.Increasing,
    BendMap: coding.Intervals,
    Slope: slope_rule,
    Logistic: logistic_rule,
    Laplace: laplace_rule,
}
NEEDED = {
    "layer": Wave,
    "inverted layer": Wave,
    "increasing layer": Bend,
    "map": BendMap,
    "stochastic layer": Wave,
    "likelihood": Slope,
    "prior": Logistic,
    "prior of torch": Laplace,
    "prior of a VAE": Logistic,
    "model": Slope,
    "model under layers": Slope,
    "VAE over a model": Wave,
}


def flow_of_latents(features):
    layers = [Wave(features), Split(Gaussian(features // 2, features // 2))]
    return Chain(layers, Prior(StandardNormal((features // 2,))))


def built(name, features=4, seed=0):
    """The model, built by an architecture, with its rules registered."""

    def homemade(shape, *, bits=3):
        return BUILDERS[name](*shape)

    torch.manual_seed(seed)
    return architecture(homemade)((features,)).eval()


def registered(without=None):
    for kind, rule in RULES.items():
        if kind is not without:
            coding.register(kind)(rule)


def data(n=48, features=4, seed=0):
    return np.random.default_rng(seed).integers(0, LEVELS, (n, features))


# -- they are coded


@pytest.mark.parametrize("numerics", ["exact", "pinned"])
@pytest.mark.parametrize("name", BUILDERS)
def test_it_is_coded_by_its_rule_at_the_cost_of_the_model(name, numerics):
    registered()
    model, x, file = built(name), data(), io.BytesIO()
    coding.check(model)
    report = coding.compress(model, x, file, numerics=numerics, workers=1)
    batch = coding.decompress(file, model, workers=1)
    assert (batch.levels == x).all()
    codec = coding.Archive(file, model, workers=1).codec
    coded = codec.pack(x, None, b"")
    assert (codec.unpack(coded, x.shape[1:], None, b"") == x).all()
    with torch.no_grad():
        given = torch.from_numpy(x)
        draws = torch.stack([-model(given, closed_form=False).elbo for _ in range(200)]).double()
    draws /= math.log(2)
    error = 5 * draws.var(0).sum().sqrt().item() * math.sqrt(1 + 1 / 200) + 64
    assert abs(coded.bits - draws.mean(0).sum().item()) < error + 2e-3 * x.size
    assert report.images == len(x)


@pytest.mark.parametrize("name", BUILDERS)
def test_without_its_rule_it_is_refused_by_name(name, tmp_path):
    kind = NEEDED[name]
    registered(without=kind)
    message = rf"{kind.__name__} has no coding rule; register one with @musigma.coding.register"
    model = built(name)
    with pytest.raises(ValueError, match=message):
        coding.check(model)
    with pytest.raises(ValueError, match=message):
        coding.compress(model, data(), tmp_path / "x.mus")
    assert not list(tmp_path.iterdir())


def test_a_file_holds_the_model(tmp_path):
    registered()
    model, x = built("model"), data()
    coding.compress(model, x, tmp_path / "x.mus", embed=True)
    assert (coding.decompress(tmp_path / "x.mus", trust=True).levels == x).all()


# -- subclasses


def test_a_subclass_that_only_adds_shares_the_rule_of_its_base():
    class Small(Coupling):
        def __init__(self, d):
            super().__init__(Net(d // 2, d - d // 2), map=Additive())

        def size(self):
            return 1

    find_grids(flow([Small(4)], 4).double(), torch.zeros(1, 4).double(), None, [])


@pytest.mark.parametrize("method", ["forward", "inverse", "_halves", "__call__"])
def test_a_subclass_that_redefines_anything_does_not(method):
    class Other(Coupling):
        pass

    setattr(Other, method, getattr(Coupling, method))
    layer = Other(Net(2, 2), map=Additive())
    with pytest.raises(ValueError, match=rf"Other has no coding rule: it redefines {method} of"):
        find_grids(flow([layer], 4).double(), torch.zeros(1, 4).double(), None, [])


def test_this_holds_for_maps_and_distributions():
    class Half(Affine):
        def forward(self, x, h):
            return super().forward(x, h / 2)

    class Wide(DiagonalGaussian):
        def log_prob(self, value):
            return super().log_prob(value / 2)

    class Head(nn.Module):
        def forward(self, context=None):
            return Wide(torch.zeros(4).double(), torch.zeros(4).double(), 1)

    x = torch.zeros(1, 4).double()
    with pytest.raises(
        ValueError, match="Half has no coding rule: it redefines forward of Affine"
    ):
        find_grids(flow([Coupling(Net(2, 4), map=Half())], 4).double(), x, None, [])
    with pytest.raises(ValueError, match="Wide has no coding rule: it redefines log_prob of"):
        find_grids(flow([], 4, Prior(Head())).double(), x, None, [])


# -- models that cannot be coded though every part has a rule


class Tripled(Layer):
    """Computes with a value outside of a bijection."""

    def infer(self, x, trace, context=None):
        return x / 3

    def generate(self, z, trace, context=None):
        return 3 * z


def test_arithmetic_that_leaves_the_grid_is_refused_by_name():
    model = built_of(lambda d: flow([Tripled(), Rescale(2.0)], d))
    with pytest.raises(ValueError, match=r"Rescale cannot be coded: .* not multiples of 2\^-15"):
        coding.check(model)


def built_of(make, features=4):
    def homemade(shape, *, bits=3):
        return make(*shape)

    torch.manual_seed(0)
    return architecture(homemade)((features,)).eval()


class Disordered(Halves):
    """Scores the left half first, so `generate` does not undo it."""

    def infer(self, x, trace, context=None):
        z = trace.latent(self.z, self.posterior(x), self.z.head())
        left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        trace.p(self.left, self.left.head(z), left)
        trace.p(self.right, self.right.head(torch.cat([z, left], 1)), right)


class Forgetful(Halves):
    """Does not score its posterior while generating."""

    def generate(self, trace, context=None):
        trace.scoring = False
        return super().generate(trace, context)


class Stranger(Halves):
    """A site that is not part of the model."""

    def infer(self, x, trace, context=None):
        trace.p(nn.Identity(), Slope(torch.zeros_like(x)), x)


class Constant(Halves):
    """Scores a value that is neither data nor drawn."""

    def infer(self, x, trace, context=None):
        trace.p(self.z, self.z.head(), torch.zeros(len(x), 2, dtype=x.dtype))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Disordered, "Disordered cannot be coded: in `generate`, the term p of Prior is out of"),
        (Forgetful, "Forgetful cannot be coded: in `generate`, the term q of Prior is missing"),
        (Stranger, "Identity cannot be coded: it is not a submodule of the model"),
        (Constant, "Prior cannot be coded: it is given a value that was computed neither"),
    ],
)
def test_models_whose_directions_do_not_mirror_each_other_are_refused(kind, message):
    registered()
    with pytest.raises(ValueError, match=message):
        coding.check(built_of(kind))


def test_planning_leaves_the_random_state_alone():
    registered()
    model = built("model")
    before = torch.random.get_rng_state()
    coding.check(model)
    assert (torch.random.get_rng_state() == before).all()


def test_values_assigned_in_place_keep_their_grid():
    class Assigned(Layer):
        def infer(self, x, trace, context=None):
            y = torch.empty_like(x)
            y[:, :2] = x[:, 2:]
            y[:, 2:] = x[:, :2]
            return y

        generate = infer

    registered()
    model, file = built_of(lambda d: flow([Assigned(), Wave(d)], d)), io.BytesIO()
    coding.compress(model, data(), file, workers=1)
    assert (coding.decompress(file, model, workers=1).levels == data()).all()


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_discrete_latents_are_coded(classes):
    registered()

    class Decoder(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.head = SlopeHead(2 * classes, d)

        def forward(self, z, context=None):
            return self.head(z.flatten(1))

    encoder = OneHotHead(nn.Linear(4, 2 * classes), 2, classes, gradient="score")
    prior = Prior(UniformOneHot(2, classes))
    model, file = built_of(lambda d: VAE(encoder, Decoder(d), prior)), io.BytesIO()
    coding.compress(model, data(), file, workers=1)
    archive = coding.Archive(file, model, workers=1)
    assert archive.codec.latents == []
    assert (archive.chunk(0).levels == data()).all()
    x = data(400)
    coded = archive.codec.pack(x, None, b"")
    assert (archive.codec.unpack(coded, (4,), None, b"") == x).all()
    with torch.no_grad():
        ideal = -model(torch.from_numpy(x)).elbo.double().sum().item() / math.log(2)
    assert coded.bits == pytest.approx(ideal, rel=0.03)


def test_gaussian_heads_of_the_library_work_in_other_models():
    registered()
    encoder = GaussianHead(nn.Linear(4, 4), event_ndims=1)
    model = built_of(lambda d: VAE(encoder, SlopeHead(2, d), Prior(StandardNormal((2,)))))
    file = io.BytesIO()
    coding.compress(model, data(), file, workers=1)
    assert (coding.decompress(file, model, workers=1).levels == data()).all()
