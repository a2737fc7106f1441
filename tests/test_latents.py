"""Posteriors and priors of VAEs: densities, divergences, gradients, and models with each."""

import numpy as np
import pytest
import torch
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from musigma import build, load, save
from musigma.audit import audit_model, audit_step
from musigma.cli import main
from musigma.coding import compress, decompress
from musigma.distributions import (
    POSTERIORS,
    PRIORS,
    FullGaussian,
    GaussianMixture,
    LowRankGaussian,
    Mixture,
)
from musigma.evaluation import slow_directions
from musigma.gaussian import DiagonalGaussian, Format
from musigma.nets import MLP
from musigma.testing import check_head, check_model, randomized
from musigma.zoo.parts import FLOWS
from tests.families import nats_after, training_step

PAIRS = [  # posterior, prior, whether the gradient is the derivative of the draws
    ("full", "auto", True),
    ("low-rank rank=2", "normal", True),
    ("mixture components=2", "auto", False),
    ("mixture gradient=score", "auto", False),
    ("maf depth=2 hidden=8", "auto", True),
    ("nsf depth=2 hidden=8", "auto", True),
    ("von-mises-fisher", "auto", False),
    ("hyperbolic", "auto", True),
    ("gamma", "auto", False),
    ("beta", "auto", False),
    ("categorical classes=3", "auto", False),
    ("categorical classes=3 gradient=score", "auto", False),
    ("joint classes=3", "auto", False),
    ("joint classes=3 gradient=relaxed", "auto", True),
    ("von-mises-fisher", "vamp components=4", False),
    ("hyperbolic", "vamp components=4", True),
    ("gamma", "vamp components=4", False),
    ("diagonal", "mixture components=4", True),
    ("diagonal", "vamp components=5", True),
    ("full", "vamp components=5", True),
    ("nsf depth=1 hidden=8", "vamp components=5", True),
    ("diagonal", "maf depth=2 hidden=8", True),
    ("diagonal", "nsf depth=1 hidden=8", True),
]


def small(posterior, prior, **options):
    torch.manual_seed(0)
    options = {"bits": None, "latents": 3, "width": 8, **options}
    model = build("vae", (5,), posterior=posterior, prior=prior, **options)
    model.calibrate(torch.randn(20, 5), *([torch.randn(20, 2)] if "context" in options else []))
    return model


# --- Gaussians with correlations ----------------------------------------------------------------


def gaussians(n=4, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    tril = normal(n, d, d).tril(-1) + normal(n, d).exp().diag_embed()
    mean, low, log_std = normal(n, d), normal(n, d, 2), 0.5 * normal(n, d)
    return [
        (DiagonalGaussian(mean, log_std, 1), Independent(Normal(mean, log_std.exp()), 1)),
        (FullGaussian(mean, tril), MultivariateNormal(mean, scale_tril=tril)),
        (
            LowRankGaussian(mean, low, log_std),
            LowRankMultivariateNormal(mean, low, (2 * log_std).exp()),
        ),
    ]


@pytest.mark.parametrize("which", [1, 2])
def test_correlated_gaussians_agree_with_torch(which):
    ours, theirs = gaussians()[which]
    x = torch.randn(4, 3, dtype=torch.float64)
    for a, b in [
        (ours.log_prob(x), theirs.log_prob(x)),
        (ours.entropy(), theirs.entropy()),
        (ours.variance, theirs.variance),
        (ours.covariance_matrix, theirs.covariance_matrix),
        (ours.unwhiten(ours.whiten(x)), x),
    ]:
        assert torch.allclose(a, b, atol=1e-10)
    draws = ours.sample((40_000,))
    error = torch.stack([row.T.cov() for row in draws.unbind(1)]) - ours.covariance_matrix
    size = ours.variance.sqrt()
    assert (error / (size[:, None] * size[..., None])).abs().max() < 0.05


@pytest.mark.parametrize("q", range(3))
@pytest.mark.parametrize("p", range(3))
def test_divergences_of_gaussians_agree_with_torch(q, p):
    (ours_q, theirs_q), (ours_p, theirs_p) = gaussians(seed=1)[q], gaussians(seed=2)[p]
    full = [
        MultivariateNormal(d.mean, getattr(d, "covariance_matrix", d.variance.diag_embed()))
        for d in (theirs_q, theirs_p)
    ]
    assert torch.allclose(kl_divergence(ours_q, ours_p), kl_divergence(*full), atol=1e-9)


# --- mixtures -----------------------------------------------------------------------------------


def mixture(parameters, gradient=None):
    logits, means, log_std = parameters
    return Mixture(logits, DiagonalGaussian(means, log_std, 1), gradient=gradient)


def parameters(n=(), k=3, d=2):
    g = torch.Generator().manual_seed(3)
    shapes = [(*n, k), (*n, k, d), (*n, k, d)]
    return [torch.randn(s, generator=g, dtype=torch.float64) * 0.7 for s in shapes]


def test_a_mixture_agrees_with_torch():
    logits, means, log_std = parameters((4,))
    theirs = MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        Independent(Normal(means, log_std.exp()), 1),
    )
    ours, x = mixture((logits, means, log_std)), torch.randn(4, 2, dtype=torch.float64)
    assert torch.allclose(ours.log_prob(x), theirs.log_prob(x))
    assert torch.allclose(ours.mean, theirs.mean)
    best = logits.argmax(-1)
    assert torch.equal(ours.center, means[torch.arange(4), best])
    draws = ours.sample((50_000,))
    assert torch.allclose(draws.mean(0), theirs.mean, atol=0.05)
    assert torch.allclose(draws.var(0), theirs.variance, rtol=0.05)


@pytest.mark.parametrize("gradient", ["implicit", "score"])
def test_the_gradient_of_an_expectation_under_a_mixture_is_unbiased(gradient):
    """The mean of f = sin(z_1) z_2 + z_2² has a known derivative in every parameter."""

    def expectation(logits, means, log_std):
        m1, m2 = means.unbind(-1)
        v1, v2 = (2 * log_std).exp().unbind(-1)
        each = m1.sin() * (-v1 / 2).exp() * m2 + m2**2 + v2
        return (logits.softmax(-1) * each).sum(-1)

    truth = torch.autograd.functional.jacobian(expectation, tuple(parameters()))
    torch.manual_seed(0)
    n, batches = 20_000, []
    for _ in range(20):
        leaves = [t.requires_grad_() for t in parameters()]
        q = mixture(leaves, gradient)
        if gradient == "implicit":
            z = q.rsample((n,))
            value = (z[:, 0].sin() * z[:, 1] + z[:, 1] ** 2).mean()
        else:
            z = q.sample((n,))
            f = z[:, 0].sin() * z[:, 1] + z[:, 1] ** 2
            value = ((f - f.mean()) * q.log_prob(z)).mean()
        batches.append(torch.autograd.grad(value, leaves))
    for i, t in enumerate(truth):
        draws = torch.stack([b[i] for b in batches])
        error = draws.std(0) / np.sqrt(len(draws))
        assert ((draws.mean(0) - t).abs() < 5 * error + 1e-12).all()
        assert error.max() < 0.05
        assert t.abs().max() > 0.2


# --- the VampPrior ------------------------------------------------------------------------------


def test_a_vamp_prior_is_the_mean_of_the_posteriors_of_its_inputs():
    model = randomized(small("diagonal", "vamp components=4"))
    p, z = model.prior.head(), torch.randn(6, 3, dtype=torch.float64)
    q = model.encoder(model.prior.head.inputs)
    assert torch.allclose(
        p.log_prob(z), q.log_prob(z[:, None]).logsumexp(1) - np.log(4), atol=1e-12
    )
    assert not any("prior" in name and "net" in name for name in model.state_dict())
    model(torch.randn(4, 5, dtype=torch.float64)).elbo.sum().backward()
    assert model.prior.head.inputs.grad.abs().min() > 0


def test_the_inputs_of_a_vamp_prior_begin_at_data(tmp_path):
    model, x = (
        build("vae", (5,), bits=None, latents=3, width=8, prior="vamp components=7"),
        torch.randn(9, 5),
    )
    model.calibrate(x)
    inputs = model.prior.head.inputs
    assert all((x == row).all(1).any() for row in inputs)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert torch.equal(again.prior.head.inputs, inputs)
    z = torch.randn(4, 3)
    assert torch.equal(again.prior.head().log_prob(z), model.prior.head().log_prob(z))


def test_a_vamp_prior_takes_no_context():
    with pytest.raises(ValueError, match="prior: 'vamp' takes no context"):
        build("vae", (5,), bits=None, prior="vamp", context=2)


def test_a_new_posterior_with_correlations_is_near_a_diagonal_one():
    """Off-diagonals that do not shrink with D make the first KL of 32 latents seven times it."""
    x, first = torch.randn(64, 5), {}
    for name in ("diagonal", "full", "low-rank"):
        torch.manual_seed(0)
        model = build("vae", (5,), bits=None, latents=32, width=64, posterior=name)
        first[name] = float(model(x).kl.detach().sum(1).mean())
    assert first["diagonal"] < first["full"] < 2 * first["diagonal"]
    assert first["low-rank"] < 2 * first["diagonal"]


@pytest.mark.parametrize("prior", ["auto", "autoregressive hidden=8"])
def test_one_hot_latents_of_images(prior):
    """The convolutional decoder takes rows of classes as well as vectors."""
    how = {"latents": 3, "width": 4, "posterior": "categorical classes=5", "prior": prior}
    model = build("vae", (1, 8, 8), bits=4, **how)
    assert any(type(part).__name__ == "ConvDecoder" for part in model.modules())
    check_model(model, (1, 8, 8), bits=4, pathwise=False)


def test_what_is_slow_is_that_of_priors_not_of_the_flows_of_posteriors():
    how = {"bits": None, "latents": 3, "width": 4}
    assert slow_directions(build("vae", (4,), **how, posterior="iaf depth=2")) == {}
    slow = slow_directions(build("vae", (4,), **how, posterior="iaf depth=2", prior="maf depth=2"))
    assert slow == {"sampling": ["Autoregressive takes one step per feature"]}
    how |= {"posterior": "categorical classes=3", "prior": "autoregressive"}
    slow = slow_directions(build("vae", (4,), **how))
    assert slow == {"sampling": ["AutoregressivePrior takes one step per variable"]}
    codes = build("vqvae", (1, 8, 8), bits=4, latents=2, width=8, prior_width=8)
    assert slow_directions(codes) == {"sampling": ["QuantizedVAE takes one step per code"]}


# --- flows --------------------------------------------------------------------------------------


def test_a_flow_remembers_the_density_of_its_last_draw():
    model = randomized(small("iaf depth=2 hidden=8", "auto"))
    x = torch.randn(4, 5, dtype=torch.float64)
    inverses = []
    for layer in model.encoder.flow.layers:
        layer.register_forward_hook(lambda *_: inverses.append(1))
    q = model.encoder(x)
    z = q.rsample()
    remembered = q.log_prob(z)
    assert not inverses
    assert torch.allclose(q.log_prob(z.clone()), remembered, atol=1e-10)
    assert inverses
    z = q.sample()
    assert not z.requires_grad
    assert q.log_prob(z).requires_grad  # as wake-sleep needs
    with torch.no_grad():
        assert q.log_prob(z) is q._last[1]


# --- heads --------------------------------------------------------------------------------------

HEADS = [
    *("full", "low-rank rank=2", "mixture", "mixture gradient=score", "von-mises-fisher"),
    *("hyperbolic", "gamma", "beta", "categorical classes=3", "joint classes=3"),
    "joint classes=3 gradient=score",
]


@pytest.mark.parametrize("text", HEADS)
@pytest.mark.parametrize("context", [0, 2])
def test_heads_of_posteriors(text, context):
    torch.manual_seed(0)

    def net(outputs):
        return MLP(5, outputs, hidden=[8], context=context)

    head = POSTERIORS.choice(text)(3, net, Format())
    check_head(head, torch.randn(4, 5), head.event, context=context)
    if head.prior is not None:
        check_head(head.prior(), None, head.event)
        p = head.prior()()
        assert p.batch_shape == ()
        assert (p.sample((5,)).shape[1:]) == head.event


def test_the_head_of_a_mixture():
    check_head(GaussianMixture(3, 4), None, (3,))


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("posterior", "prior", "pathwise"), PAIRS)
def test_models_obey_the_laws(posterior, prior, pathwise):
    model = small(posterior, prior)
    check_model(model, (5,), pathwise=pathwise)
    x = torch.randn(6, 5)
    assert model.interpolate(x[:2], x[2:4], 3).shape == (2, 3, 5)
    assert model.reconstruct(x).isfinite().all()
    with torch.no_grad():
        few = model.elbo(x.repeat_interleave(200, 0)).reshape(6, 200).mean(1)
        many = model.iwae(x, 200)
    assert (many > few - 0.05).all()
    if "vamp" not in prior:
        check_model(small(posterior, prior, context=2), (5,), context=2, pathwise=pathwise)
    assert audit_model(model).verdict == "correct"


@pytest.mark.slow
@pytest.mark.parametrize(("posterior", "prior", "_"), PAIRS)
def test_the_audit_of_a_step_finds_nothing(posterior, prior, _):
    report = audit_step(training_step(small(posterior, prior)))
    assert not report.findings, report
    assert report.verdict in ("correct", "incomplete")


def circle(n, seed=0):
    """Points near a circle in a plane of five dimensions."""
    generator = np.random.default_rng(seed)
    angle = generator.uniform(0, 2 * np.pi, n)
    plane = np.linalg.qr(np.random.default_rng(9).normal(size=(5, 5)))[0][:2]
    x = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) @ plane
    return (x + 0.1 * generator.normal(size=(n, 5))).astype(np.float32)


TRAINED = [  # nats after 500 steps; before training they are above 150
    ("diagonal", "normal", 2.0),
    ("full", "normal", 2.5),
    ("low-rank rank=1", "normal", 2.0),
    ("mixture", "normal", 2.0),
    ("mixture gradient=score", "normal", 2.5),
    ("iaf depth=2 hidden=32", "normal", 1.8),
    ("nsf depth=2 hidden=32", "normal", 1.8),
    ("von-mises-fisher", "auto", 2.0),
    ("hyperbolic", "auto", 5.0),
    ("gamma", "auto", 2.0),
    ("beta", "auto", 2.0),
    ("categorical classes=8", "auto", 12.0),
    ("joint classes=4", "auto", 2.0),
    ("diagonal", "mixture", 1.5),
    ("diagonal", "vamp components=50", 0.5),
    ("diagonal", "maf depth=3 hidden=32", 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("posterior", "prior", "bound"), TRAINED)
def test_training_reaches_a_bound(posterior, prior, bound):
    torch.manual_seed(0)
    options = {"posterior": posterior, "prior": prior, "std": 0.1}
    model = build("vae", (5,), bits=None, latents=2, width=64, **options)
    with torch.no_grad():
        assert -model.elbo(torch.from_numpy(circle(100))).mean() > 150
    assert nats_after(model, data=circle) < bound


@pytest.mark.slow
def test_data_on_a_circle_fit_latents_on_a_circle():
    """Of entropy -1.0 nats; the posteriors above, in the plane, reach 0.9 to 1.5."""
    torch.manual_seed(0)
    options = {"posterior": "von-mises-fisher", "std": 0.1}
    model = build("vae", (5,), bits=None, latents=1, width=64, **options)
    assert nats_after(model, data=circle) < -0.9


@pytest.mark.slow
@pytest.mark.parametrize("role", ["posterior", "prior"])
@pytest.mark.parametrize("name", sorted(FLOWS))
def test_every_flow_of_vectors_is_a_posterior_and_a_prior(name, role):
    sizes = {"depth": 1, "hidden": 8, "hidden_layers": 1, "width": 8}
    words = [f"{k}={v}" for k, v in sizes.items() if k in FLOWS.defaults(name)]
    options = {"bits": None, "latents": 3, "width": 8, role: " ".join([name, *words])}
    if name == "vflow":
        with pytest.raises(ValueError, match=f"{role}: 'vflow' draws"):
            build("vae", (5,), **options)
        return
    model = build("vae", (5,), **options)
    model.calibrate(torch.randn(20, 5))
    check_model(model, (5,))


# --- by name ------------------------------------------------------------------------------------


def test_the_old_priors_keep_their_weights_and_configuration():
    config = build("vae", (5,), bits=None, prior="flow").config["options"]
    assert config["prior"] == "flow"
    assert "posterior" not in config
    names = build("vae", (5,), bits=None, latents=2, prior="flow", prior_depth=1).state_dict()
    assert "prior.layers.2.net.layers.0.weight" in names
    assert "encoder.net.layers.0.weight" in names


def test_posteriors_and_priors_of_your_own():
    @POSTERIORS.register
    def wide(size, net, format, *, scale=2.0):
        head = POSTERIORS["diagonal"](size, net, format)
        head.register_forward_hook(
            lambda module, args, q: DiagonalGaussian(q.mean, q.log_std + np.log(scale), 1)
        )
        return head

    @PRIORS.register
    def shifted(latents, *, by=1.0):
        return Shifted(latents.vector("shifted"), by)

    class Shifted(torch.nn.Module):
        def __init__(self, size, by):
            super().__init__()
            self.mean = torch.nn.Parameter(torch.full((size,), float(by)))

        def forward(self, given=None, context=None):
            return DiagonalGaussian(self.mean, torch.zeros_like(self.mean), 1)

    try:
        model = build("vae", (5,), bits=None, latents=2, posterior="wide", prior="shifted by=3")
        assert model.prior.head.mean.tolist() == [3.0, 3.0]
        check_model(model, (5,))
    finally:
        del POSTERIORS["wide"], PRIORS["shifted"]


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("posterior", "diagonl", "posterior: there is no .*; did you mean 'diagonal'"),
        ("prior", "vamb", "prior: there is no .*; did you mean 'vamp'"),
        ("prior", "vamp width=3", "prior: vamp takes components=500; got 'width=3'"),
        ("posterior", "mixture gradient=none", "gradient: expected 'implicit' or 'score'"),
        ("prior", "conditional", "prior: 'conditional' needs a context"),
    ],
)
def test_what_is_unknown_is_refused(option, text, message):
    with pytest.raises(ValueError, match=message):
        build("vae", (5,), bits=None, **{option: text})


def test_vamp_with_a_posterior_that_scores_slowly_is_refused():
    with pytest.raises(ValueError, match="scores z under the posterior of every learned input"):
        build("vae", (5,), bits=None, posterior="maf depth=1", prior="vamp")


@pytest.mark.parametrize(
    ("posterior", "prior", "kind"),
    [
        ("full", "auto", "FullGaussian"),
        ("mixture", "auto", "Mixture"),
        ("nsf depth=1", "auto", "Flowed"),
        ("von-mises-fisher", "auto", "VonMisesFisher"),
        ("hyperbolic", "auto", "HyperbolicNormal"),
        ("gamma", "auto", "FactorizedGamma"),
        ("joint", "auto", "Product"),
        ("diagonal", "mixture", "Mixture"),
        ("hamiltonian", "auto", "Leapfrog"),
    ],
)
def test_a_latent_without_a_coding_rule_is_refused_by_name(tmp_path, posterior, prior, kind):
    options = {"latents": 2, "width": 8, "posterior": posterior, "prior": prior}
    model = build("vae", (1, 4, 4), bits=1, net="mlp", **options)
    images = np.random.default_rng(0).integers(0, 2, (8, 1, 4, 4)).astype(np.uint8)
    with pytest.raises(ValueError, match=f"{kind} has no coding rule"):
        compress(model, images, tmp_path / "x.mus")


def test_categorical_latents_are_coded(tmp_path):
    model = build("vae", (1, 4, 4), bits=1, net="mlp", width=8, latents=2, posterior="categorical")
    images = np.random.default_rng(0).integers(0, 2, (8, 1, 4, 4)).astype(np.uint8)
    compress(model, images, tmp_path / "x.mus")
    assert np.array_equal(decompress(tmp_path / "x.mus", model).levels, images)


def test_a_posterior_of_a_file(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from musigma.distributions import POSTERIORS\n"
        "@POSTERIORS.register\n"
        "def narrow(size, net, format, *, by=1.0):\n"
        "    return POSTERIORS['diagonal'](size, net, format)\n"
    )
    np.savetxt(tmp_path / "x.csv", circle(100), delimiter=",", header="a,b,c,d,e", comments="")
    mine, run = f"{tmp_path / 'mine.py'}:narrow", str(tmp_path / "run")
    small = ["--steps", "2", "--width", "8", "--schema", "none", "--out", run]
    try:
        main(["train", "vae", str(tmp_path / "x.csv"), "--posterior", f"{mine} by=2", *small])
        del POSTERIORS["narrow"]
        capsys.readouterr()
        main(["info", run, "--plugin", mine, "--json"])
        assert "narrow by=2" in capsys.readouterr().out
    finally:
        POSTERIORS.pop("narrow", None)


@pytest.mark.parametrize("prior", ["normal", "auto", "maf", "mixture"])
def test_the_depth_of_the_flow_prior_is_refused_with_other_priors(prior):
    with pytest.raises(ValueError, match=f"prior_depth: .* 7 with the prior '{prior}'"):
        build("vae", (5,), bits=None, latents=2, prior=prior, prior_depth=7)
