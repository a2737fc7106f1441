"""Detectors agree with closed forms, refuse what they cannot serve, and keep the promise."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

import musigma
from musigma import anomaly, build, detectors, evaluation
from musigma.data import Dataset
from musigma.detectors import DETECTORS, Reference
from musigma.distributions import StandardNormal, StandardUniform, likelihood
from musigma.ensemble import Ensemble
from musigma.gaussian import DiagonalGaussian, GaussianHead
from musigma.model import VAE, Prior
from musigma.testing import randomized
from musigma.trace import Trace


class Normal(nn.Module):
    """N(mean, std²) of each element."""

    def __init__(self, shape, mean=0.0, std=1.0):
        super().__init__()
        self.register_buffer("mean", torch.full(shape, mean))
        self.log_std = math.log(std)

    def forward(self, context=None):
        return DiagonalGaussian(self.mean, torch.tensor(self.log_std), self.mean.ndim)


def rows(n, width=3, scale=1.0, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, width)) * scale
    return Dataset(x.astype(np.float32))


def of_normal(data, mean=0.0, std=1.0):
    """-log p of rows under independent normals, nats (N,)."""
    return -stats.norm(mean, std).logpdf(data.x.astype(np.float64)).sum(1)


@pytest.fixture(scope="module")
def digits():
    return musigma.data.load("digits")


@pytest.fixture(scope="module")
def of_digits(digits):
    """Small VAEs of digits, hardly trained, with all that a detector may ask for."""
    torch.manual_seed(0)
    train = digits.split("train")
    models = [build("vae", digits.spec(), net="mlp", latents=4, width=16) for _ in range(3)]
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(8):
            x, _ = evaluation.batch(train, np.arange(100 * step, 100 * step + 100), model)
            optimizer.zero_grad()
            (-model(x).elbo.mean()).backward()
            optimizer.step()
    return Reference(
        models[0],
        train=train.subset(range(200)),
        background=models[1],
        members=models[1:],
        batch_size=400,
    )


# -- log p alone


def test_nats_and_typicality_of_a_gaussian():
    train, data = rows(500), rows(60, scale=2.0, seed=1)
    reference = Reference(Prior(StandardNormal((3,))), train=train)
    np.testing.assert_allclose(detectors.nats(reference, data), of_normal(data), rtol=1e-6)
    expected = np.abs(of_normal(data) - of_normal(train).mean())
    np.testing.assert_allclose(detectors.typicality(reference, data), expected, rtol=1e-5)
    center = Dataset(np.zeros((1, 3), np.float32))  # the most probable row is not typical
    entropy = 1.5 * math.log(2 * math.pi * math.e)
    (found,) = detectors.typicality(reference, center)
    assert found == pytest.approx(entropy - 1.5 * math.log(2 * math.pi), abs=0.2)


def test_a_batch_is_atypical_if_it_is_too_ordinary_or_too_strange():
    reference = Reference(Prior(StandardNormal((3,))), train=rows(2000))
    calibration = rows(500, seed=1)
    for scale, usual in ((1.0, True), (0.7, False), (1.4, False)):
        found = detectors.batch_typicality(reference, rows(60, scale=scale, seed=2), calibration)
        assert (found["p_value"] > 0.01) == usual, scale
    assert detectors.typicality.drift is detectors.batch_typicality


def test_the_test_of_a_mean_keeps_its_level():
    random, p = np.random.default_rng(0), []
    for seed in range(300):
        scores = random.exponential(size=60)
        p.append(anomaly.mean_drift(scores[:20], scores[20:], 1.0, seed)["p_value"])
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    with pytest.raises(ValueError, match="1 of 2 scores are infinite"):
        anomaly.mean_drift([math.inf], [0.0], 0.0)


def test_the_ratio_of_two_gaussians():
    data, background = rows(40), Prior(Normal((3,), mean=1.0, std=3.0))
    reference = Reference(Prior(StandardNormal((3,))), background=background)
    expected = of_normal(data) - of_normal(data, 1.0, 3.0)
    found = detectors.likelihood_ratio(reference, data)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_ensembles_by_hand():
    data, stds = rows(40), (1.0, 2.0, 3.0)
    models = [Prior(Normal((3,), std=std)) for std in stds]
    each = np.stack([of_normal(data, std=std) for std in stds])
    mean = each.sum(0) / 3
    variance = ((each - mean) ** 2).sum(0) / 3
    for reference in (Reference(models[0], members=models[1:]), Reference(Ensemble(models))):
        np.testing.assert_allclose(detectors.ensemble(reference, data), mean, rtol=1e-5)
        np.testing.assert_allclose(detectors.waic(reference, data), mean + variance, rtol=1e-4)


# -- complexity


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return 8 * len(file.getvalue())


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_complexity_ratio_by_hand(channels):
    x = np.random.default_rng(0).integers(0, 256, (5, channels, 8, 8), np.uint8)
    x[0] = 7
    reference = Reference(Prior(Normal((channels, 8, 8), 100.0, 50.0)), batch_size=2)
    pixels = [
        image.transpose(1, 2, 0) if channels == 3 else np.concatenate(list(image)) for image in x
    ]
    sizes = np.array([png(p) for p in pixels])
    found = detectors.complexity(reference, Dataset(x), codecs="png")
    nats = -stats.norm(100, 50).logpdf(x.astype(np.float64)).sum((1, 2, 3))
    np.testing.assert_allclose(found, nats / math.log(2) - sizes, rtol=1e-5)
    least = detectors.complexity(reference, Dataset(x))
    each = [detectors.complexity(reference, Dataset(x), codecs=c) for c in detectors.CODECS]
    np.testing.assert_allclose(least, np.max(each, 0), rtol=1e-9)
    assert sizes[0] < sizes[1:].min(), "the constant image has the smallest file"


def test_codecs_may_be_added_and_are_refused_where_pillow_cannot_write_them(monkeypatch):
    x = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    reference = Reference(Prior(Normal((1, 8, 8), 100.0, 50.0)))
    monkeypatch.setitem(detectors.CODECS, "raw", {"format": "BMP"})
    found = detectors.complexity(reference, Dataset(x), codecs="raw")
    assert found[0] < detectors.complexity(reference, Dataset(x), codecs="png")[0]
    monkeypatch.setitem(detectors.CODECS, "none", {"format": "NO SUCH"})
    with pytest.raises(ValueError, match=r"codecs: this Pillow cannot write none .*codecs=png"):
        detectors.complexity(reference, Dataset(x), codecs="png+none")


# -- terms of the trace


@pytest.mark.parametrize("layers", [False, True])
def test_terms_add_up_and_their_distances_are_those_of_their_moments(layers):
    torch.manual_seed(0)
    model = randomized(build("realnvp", (4,), bits=None, depth=2, hidden=8)).float()
    train, data = rows(300, 4), rows(50, 4, scale=1.5, seed=1)
    reference = Reference(model, train=train)
    found = detectors.terms(reference, data, layers=layers)
    np.testing.assert_allclose(found.sum(1), reference.nats(data), rtol=1e-5, atol=1e-4)
    known = detectors.terms(reference, train, layers=layers)
    vary = known.std(0) > 1e-6
    known, found = known[:, vary], found[:, vary]
    assert known.shape[1] > 1
    far = found - known.mean(0)
    inverse = np.linalg.inv(np.cov(known.T))
    np.testing.assert_allclose(
        detectors.mahalanobis(reference, data, layers=layers),
        np.einsum("ni,ij,nj->n", far, inverse, far),
        rtol=1e-4,
    )
    kernels = [stats.gaussian_kde(column) for column in known.T]
    log_p = sum(k.logpdf(column) for k, column in zip(kernels, found.T, strict=True))
    np.testing.assert_allclose(detectors.dose(reference, data, layers=layers), -log_p, rtol=1e-6)


def test_terms_that_do_not_vary_say_nothing():
    train = Dataset(np.zeros((9, 1, 2, 2), np.uint8))
    reference = Reference(Prior(StandardUniform((1, 2, 2))), train=train)
    data = Dataset(np.ones((3, 1, 2, 2), np.uint8))
    assert detectors.mahalanobis(reference, data).tolist() == [0, 0, 0]
    assert detectors.dose(reference, data).tolist() == [0, 0, 0]


# -- regret


def linear_vae(weight, std, encoder_weight, encoder_log_std):
    """z ~ N(0, I), x ~ N(W z, std²), and a linear encoder."""
    features, latents = weight.shape
    encode, decode = nn.Linear(features, latents), nn.Linear(latents, features)
    with torch.no_grad():
        decode.weight.copy_(weight)
        encode.weight.copy_(encoder_weight)
        for layer in (encode, decode):
            layer.bias.zero_()
    return VAE(
        GaussianHead(encode, event_ndims=1, log_std=encoder_log_std),
        GaussianHead(decode, event_ndims=1, log_std=math.log(std)),
        Prior(StandardNormal((latents,))),
    )


def test_the_regret_of_a_linear_vae_is_known():
    torch.manual_seed(0)
    weight, encoder_weight, std = torch.randn(5, 2), 0.3 * torch.randn(2, 5), 0.7
    model = linear_vae(weight, std, encoder_weight, -0.5)
    data = rows(30, 5)
    reference = Reference(model, batch_size=30)
    found = detectors.likelihood_regret(reference, data, steps=150, draws=1000)
    x = torch.from_numpy(data.x)
    precision = torch.eye(2) + weight.T @ weight / std**2  # of the posterior
    mean = torch.linalg.solve(precision, weight.T @ x.T / std**2).T
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)

    def divergence(mean, stds):
        q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(stds.square()))
        return torch.distributions.kl_divergence(q, posterior)

    stds = precision.diagonal().rsqrt().expand(30, 2)  # of the best diagonal posterior
    encoded = divergence(x @ encoder_weight.T, torch.full((30, 2), math.exp(-0.5)))
    expected = (encoded - divergence(mean, stds)).numpy()
    assert expected.min() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.4)
    assert abs((found - expected).mean()) < 0.1
    few = detectors.likelihood_regret(reference, data, steps=3, draws=16)
    assert (few < found).all(), "more steps find a better posterior"


def test_the_regret_of_the_best_encoder_is_zero():
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    precision = 1 + weight.square().sum(0)
    model = linear_vae(weight, 1.0, weight.T / precision[:, None], -0.5 * precision.log())
    model.encoder.log_std.requires_grad_(False)
    found = detectors.likelihood_regret(Reference(model), rows(20), draws=100)
    assert found.min() >= 0
    assert found.max() < 0.05


@pytest.mark.parametrize("options", [{"likelihood": "gaussian"}, {"prior": "flow"}])
def test_the_regret_of_vaes_with_noise_or_another_prior(digits, options):
    torch.manual_seed(0)
    model = build("vae", digits.spec(), net="mlp", latents=3, width=8, **options)
    data, reference = digits.subset(range(6)), Reference(model)
    found = detectors.likelihood_regret(reference, data, steps=5)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    np.testing.assert_array_equal(found, detectors.likelihood_regret(reference, data, steps=5))


# -- the promise


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector_keeps_the_promise(digits, of_digits, name):
    order = np.random.default_rng(1).permutation(len(digits))
    calibration, data = (digits.subset(order[at : at + 400]) for at in (0, 400))
    options = {"steps": 10, "draws": 4} if name == "likelihood_regret" else {}
    known, scores = (DETECTORS[name](of_digits, d, **options) for d in (calibration, data))
    assert scores.shape == (400,)
    assert scores.dtype == np.float64
    flagged = (anomaly.p_values(scores, known) <= 0.1).mean()
    low, high = anomaly.rate_interval(400, 0.1, 400, confidence=0.9999)
    assert low <= flagged <= high
    inverted = Dataset(255 - data.subset(range(100)).x)
    assert DETECTORS[name](of_digits, inverted, **options).mean() > scores.mean()


def test_an_own_detector_is_one_function():
    @DETECTORS.register
    def first_column(reference, data, *, sign=1.0):
        return sign * data.x[:, 0].astype(np.float64)

    try:
        choice = DETECTORS.choice("first-column sign=-1.0")
        data = rows(4)
        assert choice(None, data).tolist() == (-data.x[:, 0].astype(np.float64)).tolist()
    finally:
        del DETECTORS["first_column"]


# -- maps


@pytest.mark.parametrize(
    ("name", "levels", "options"),
    [
        ("bernoulli", 2, {}),
        ("categorical", 8, {}),
        ("beta-binomial", 8, {}),
        ("logistic", 8, {}),
        ("logistic-mixture", 8, {"components": 2}),
        ("gaussian", 8, {}),
        ("continuous-bernoulli", 8, {}),
    ],
)
def test_the_terms_of_elements_add_up(name, levels, options):
    torch.manual_seed(0)
    head = likelihood(name, (3, 4, 5), lambda c: nn.Conv2d(2, c, 1), levels=levels, **options)
    dist = head(torch.randn(2, 2, 4, 5))
    x = torch.randint(0, levels, (2, 3, 4, 5)).float()
    if name in ("gaussian", "continuous-bernoulli"):
        x = x / levels
    each = dist.log_prob_of_elements(x)
    assert each.shape[-2:] == (4, 5)
    torch.testing.assert_close(each.flatten(1).sum(1), dist.log_prob(x))


def test_the_map_of_a_likelihood_adds_up_to_it(digits, of_digits):
    data = digits.subset(range(5))
    found = detectors.maps(Reference(of_digits.model, seed=3), data, draws=2)
    assert "-log p(pixel | latents)" in found.what
    x, _ = evaluation.batch(data, np.arange(5), of_digits.model)
    total = np.zeros(5)
    with torch.no_grad():
        for draw in range(2):
            evaluation.noise(3, draw)
            total -= of_digits.model(x, trace=Trace()).log_px.numpy() / 2
    np.testing.assert_allclose(found.nats.sum((1, 2)), total, rtol=1e-5)
    beyond = detectors.maps(Reference(of_digits.model, background=of_digits.background), data)
    assert beyond.what.endswith("minus the same of the background model")
    alone = [
        detectors.maps(Reference(model), data).nats
        for model in (of_digits.model, of_digits.background)
    ]
    np.testing.assert_allclose(beyond.nats, alone[0] - alone[1], rtol=1e-6, atol=1e-6)


def test_the_map_of_a_flow_is_the_change_by_replacement(digits):
    torch.manual_seed(0)
    model = build("glow", digits.spec(), levels=1, depth=1, hidden=8)
    data = digits.subset(range(2))
    found = detectors.maps(Reference(model.eval()), data, patch=4, draws=1)
    assert "4 x 4 patch replaced by the mean around it" in found.what
    x, _ = evaluation.batch(data, np.arange(2), model)
    replaced, ring = x.clone(), x[:, :, 0:6, 2:8].clone()
    ring[:, :, 0:4, 2:6] = 0
    replaced[:, :, 0:4, 4:8] = (ring.sum((2, 3)) / (36 - 16)).round()[..., None, None]
    nats = []
    with torch.no_grad():
        for images in (x, replaced):
            evaluation.noise(0, 0)
            nats.append(-model(images).elbo.numpy())
    corner = found.nats[:, 0:4, 4:8]
    expected = np.broadcast_to((nats[0] - nats[1])[:, None, None], corner.shape)
    np.testing.assert_allclose(corner, expected, rtol=1e-5)


def test_colors_of_maps():
    nats = np.zeros((1, 2, 2))
    assert (detectors.colored(nats) == 255).all()
    nats[0, 0] = 5.0, -2.5
    red, green, blue = detectors.colored(nats)[0].astype(int)
    assert (red[0, 0], green[0, 0], blue[0, 0]) == (255, 0, 0) != (red[0, 1], 0, 0)
    assert blue[0, 1] == 255 > red[0, 1] == green[0, 1] > 0


# -- what is refused


NORMAL = Prior(StandardNormal((3,)))


@pytest.mark.parametrize(
    ("name", "reference", "message"),
    [
        ("typicality", Reference(NORMAL), "typicality: it is fitted on training data"),
        ("typicality", Reference(NORMAL, train=rows(0)), "typicality: expected training data"),
        ("likelihood-ratio", Reference(NORMAL), "likelihood_ratio: .* second model.*--background"),
        ("ensemble", Reference(NORMAL), "ensemble: it compares several models.*--members"),
        ("waic", Reference(NORMAL), "waic: it compares several models"),
        ("complexity", Reference(NORMAL), r"complexity: expected images .* rows of shape \(3,\)"),
        ("mahalanobis", Reference(NORMAL), "mahalanobis: it is fitted on training data"),
        ("mahalanobis", Reference(NORMAL, train=rows(3)), "3 training examples are too few .* 4 "),
        ("dose", Reference(NORMAL, train=rows(3)), "dose: 3 training examples are too few"),
        (
            "likelihood-regret",
            Reference(NORMAL),
            "one latent .* this one are: none",
        ),
        ("likelihood-regret draws=0", Reference(NORMAL), "draws of 1 or more|takes steps=100"),
        ("likelihood-regret lr=-1.0", Reference(NORMAL), "a positive lr; got 100, 16 and -1.0"),
        ("complexity codecs=flac", Reference(NORMAL), "expected images"),
        ("strangeness", Reference(NORMAL), "by: .*known are .*typicality"),
    ],
)
def test_what_cannot_be_served_is_refused(name, reference, message):
    with pytest.raises(ValueError, match=message):
        DETECTORS.choice(name)(reference, rows(5))


def test_other_posteriors_codecs_and_models_of_other_data_are_refused(digits):
    images = digits.subset(range(3))
    several = Reference(build("ladder", digits.spec(), width=8, blocks=1))
    with pytest.raises(ValueError, match="likelihood_regret: expected a model with one latent"):
        detectors.likelihood_regret(several, images)
    categorical = build("vae", digits.spec(), net="mlp", width=8, posterior="categorical")
    with pytest.raises(ValueError, match="the posteriors of this one are: OneHot"):
        detectors.likelihood_regret(Reference(categorical), images)
    uniform = Reference(Prior(Normal((1, 8, 8))))
    with pytest.raises(ValueError, match="codecs: expected some of png, webp, jpeg2000"):
        detectors.complexity(uniform, images, codecs="flac")
    other = build("vae", (1, 4, 4), net="mlp", width=8)
    with pytest.raises(ValueError, match="background: data: the model takes examples of shape"):
        detectors.likelihood_ratio(Reference(uniform.model, background=other), images)
    with pytest.raises(ValueError, match="member 1: data: the model takes"):
        detectors.waic(Reference(uniform.model, members=[other]), images)
    with pytest.raises(ValueError, match="maps: expected images"):
        detectors.maps(Reference(NORMAL), rows(3))
    with pytest.raises(ValueError, match="maps: expected 1 or more draws, and patches smaller"):
        detectors.maps(uniform, images, patch=8)
    with pytest.raises(ValueError, match=r"maps: .* hold no examples"):
        detectors.maps(uniform, images.subset([]))


def test_training_rows_without_a_score_are_refused():
    train = rows(30)
    train.array[3] = np.inf
    with pytest.raises(ValueError, match="1 of 30 training examples have no finite -log p"):
        detectors.typicality(Reference(NORMAL, train=train), rows(2))
    with pytest.raises(ValueError, match="1 of 30 training examples have terms that are not"):
        detectors.mahalanobis(Reference(NORMAL, train=train), rows(2))


def test_nan_is_counted_and_the_strangest():
    scores, note = anomaly.nan_as_strangest([0.0, math.nan, 5.0], "dose")
    assert scores.tolist() == [0, math.inf, 5]
    assert note == "1 of 3 scores (dose) are NaN; they count as the strangest"
    assert anomaly.nan_as_strangest([0.0, math.inf])[1] == ""
    assert anomaly.p_values(scores, range(9)).tolist() == [1.0, 0.1, 0.5]
