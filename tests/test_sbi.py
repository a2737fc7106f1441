"""Models inside sbi: its protocol, NPE and NLE, and out again."""

import importlib
import math
import sys

import pytest
import torch
import torch.distributions as td
from torch import nn

import musigma
from musigma import Spec, Variable, testing
from musigma.support import Support

pytest.importorskip("sbi", reason="sbi is not installed: pip install 'musigma[sbi]'")

from sbi.inference import NLE, NPE, DirectPosterior
from sbi.neural_nets import posterior_nn
from sbi.utils import (
    BoxUniform,
    MultipleIndependent,
    RestrictedPrior,
    get_density_thresholder,
    process_prior,
)

from musigma.sbi import Estimator, estimator, support_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Maximum number of epochs"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SMALL = {"depth": 2, "hidden": 16}


@pytest.fixture(autouse=True)
def _logs(tmp_path, monkeypatch):
    """A folder for the logs that sbi writes into the working directory."""
    monkeypatch.chdir(tmp_path)


def simulations(n=300, seed=0):
    """theta in a box, and x = theta A + noise, of three elements."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([-1.0, 10.0]), torch.tensor([1.0, 30.0])
    theta = low + (high - low) * torch.rand(n, 2, generator=generator)
    mixing = torch.tensor([[1.0, 0.3, -0.5], [0.05, -0.1, 0.1]])
    return theta, theta @ mixing + 0.1 * torch.randn(n, 3, generator=generator)


PRIOR = BoxUniform(torch.tensor([-1.0, 10.0]), torch.tensor([1.0, 30.0]))


def trained(trainer, **how):
    theta, x = simulations()
    trainer.append_simulations(theta, x)
    return trainer.train(max_num_epochs=4, training_batch_size=30, **how)


@pytest.fixture
def ours():
    torch.manual_seed(0)
    net = estimator("nsf", **SMALL)(*simulations())
    return Estimator(testing.randomized(net.model).float())


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    return posterior_nn("zuko_nsf", hidden_features=8, num_transforms=1)(*simulations()).eval()


# --- the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("input", "condition"),
    [
        ((5, 2), (5, 3)),
        ((1, 2), (5, 3)),
        ((5, 2), (1, 3)),
        ((7, 5, 2), (5, 3)),
        ((7, 1, 2), (5, 3)),
        ((7, 5, 2), (1, 3)),
        ((7, 5, 2), (7, 5, 3)),
        ((7, 1, 2), (7, 5, 3)),
    ],
)
def test_shapes_of_log_prob_are_those_of_sbi(ours, theirs, input, condition):
    theta, x = torch.randn(input), torch.randn(condition)
    got = ours.log_prob(theta, x)
    assert got.shape == theirs.log_prob(theta, x).shape
    # every entry is the density of its pair
    batch = torch.broadcast_shapes(theta.shape[:-1], x.shape[:-1])
    flat = theta.expand(*batch, 2).reshape(-1, 2), x.expand(*batch, 3).reshape(-1, 3)
    expected = ours.model.log_prob(*flat).reshape(got.shape)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (7,), (3, 2)])
def test_shapes_of_samples_are_those_of_sbi(ours, theirs, shape):
    x = torch.randn(5, 3)
    assert ours.sample(shape, x).shape == theirs.sample(shape, x).shape
    (draws, density), (_, like) = (net.sample_and_log_prob(shape, x) for net in (ours, theirs))
    assert density.shape == like.shape
    wanted = ours.log_prob(draws.reshape(-1, 5, 2), x).reshape(density.shape)
    torch.testing.assert_close(density, wanted, rtol=1e-4, atol=1e-4)


def test_loss_and_properties_are_those_of_sbi(ours, theirs):
    theta, x = simulations(20, seed=1)
    assert ours.loss(theta, x).shape == theirs.loss(theta, x).shape == (20,)
    torch.testing.assert_close(ours.loss(theta, x), -ours.log_prob(theta, x)[0])
    assert (ours.input_shape, ours.condition_shape) == (theirs.input_shape, theirs.condition_shape)
    assert ours.embedding_net(x).shape == (20, ours.embedding_net.features)
    z = ours.inverse_transform(theta[:7, None], x[:5])
    assert z.shape == theirs.inverse_transform(theta[:7, None], x[:5]).shape == (7, 5, 2)
    torch.testing.assert_close(z[2, 3], ours.model.encode(theta[2:3], x[3:4])[0][0])


def test_shapes_that_do_not_fit_are_refused(ours):
    with pytest.raises(ValueError, match="Shape of condition"):
        ours.log_prob(torch.randn(5, 2), torch.randn(5, 4))
    with pytest.raises(ValueError, match="expected input dimensionality"):
        ours.loss(torch.randn(5, 3), torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="broadcast"):
        ours.log_prob(torch.randn(7, 5, 2), torch.randn(4, 3))


def test_both_sides_are_standardized_by_the_simulations():
    theta, x = simulations()
    net = estimator("nsf", norm=False, **SMALL)(theta * 1e4, x * 1e-3 + 7)
    first = net.model.model.layers[0]
    torch.testing.assert_close(first.mean, 1e4 * theta.mean(0))
    embedded = net.embedding_net(x * 1e-3 + 7)[:, :3]  # then ranks, and features of both
    torch.testing.assert_close(embedded.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(embedded.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


# --- inside the trainers of sbi ------------------------------------------------------------------


def test_a_posterior_by_npe():
    torch.manual_seed(0)
    make = estimator("nsf", **SMALL)
    trainer = NPE(PRIOR, density_estimator=make, show_progress_bars=False)
    net = trained(trainer)
    assert isinstance(net, Estimator)
    losses = trainer.summary["training_loss"]
    assert losses[-1] < losses[0] - 0.2
    _, x = simulations(1, seed=1)
    posterior = trainer.build_posterior(net).set_default_x(x)
    draws = posterior.sample((500,), show_progress_bars=False)
    assert draws.shape == (500, 2)
    assert PRIOR.support.check(draws).all()
    assert posterior.log_prob(draws, norm_posterior=False).isfinite().all()
    assert posterior.sample_batched((9,), x.expand(4, 3), show_progress_bars=False).shape == (
        9,
        4,
        2,
    )


def test_a_likelihood_by_nle():
    torch.manual_seed(0)
    make = estimator("maf", of="x", **SMALL)
    trainer = NLE(PRIOR, density_estimator=make, show_progress_bars=False)
    net = trained(trainer)
    assert (net.input_shape, net.condition_shape) == ((3,), (2,))
    theta, x = simulations(4, seed=1)
    posterior = trainer.build_posterior(net)
    potential = posterior.potential_fn
    potential.set_x(x)  # four independent observations
    expected = net.log_prob(x[:, None], theta).sum(0) + PRIOR.log_prob(theta)
    torch.testing.assert_close(potential(theta), expected)


def test_a_network_of_the_user():
    torch.manual_seed(0)
    embedding = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    before = embedding[0].weight.clone()
    make = estimator("nsf", embedding_net=embedding, **SMALL)
    trainer = NPE(PRIOR, density_estimator=make, show_progress_bars=False)
    net = trained(trainer)
    assert not torch.equal(before, embedding[0].weight)
    assert net.condition_shape == (3,)
    assert net.model.model.config["options"]["kind"] == "autoregressive"  # as without a network
    _, x = simulations(5, seed=1)
    assert net.embedding_net(x).shape == (5, 4)
    with pytest.raises(ValueError, match="composed by hand"):
        musigma.save(net.model, "nowhere.safetensors")


@pytest.mark.parametrize("embed", ["mlp", "set"])
def test_an_embedding_is_trained_and_saved_with_the_model(embed, tmp_path):
    torch.manual_seed(0)
    theta, x = simulations(120)
    if embed == "set":  # 10 exchangeable observations of 3 elements
        x = x[:, None] + torch.randn(120, 10, 3)
    options = {**SMALL, "support": "prior", "prior": PRIOR, "embed": embed}
    trainer = NPE(PRIOR, density_estimator=estimator("nsf", **options), show_progress_bars=False)
    net = trainer.append_simulations(theta, x).train(max_num_epochs=2, training_batch_size=40)
    assert net.condition_shape == x.shape[1:]
    draws = net.sample((50,), x[:4])
    assert PRIOR.support.check(draws).all()
    musigma.save(net.model, tmp_path / "model.safetensors")
    again = Estimator(musigma.load(tmp_path / "model.safetensors"))
    assert torch.equal(again.log_prob(draws, x[:4]), net.log_prob(draws, x[:4]))
    if embed == "set":
        torch.testing.assert_close(
            net.log_prob(draws, x[:4].flip(1)), net.log_prob(draws, x[:4]), rtol=1e-4, atol=1e-4
        )


def test_an_ensemble_trains_its_members_and_answers_as_their_mixture(tmp_path):
    torch.manual_seed(0)
    options = {**SMALL, "support": "prior", "prior": PRIOR, "ensemble": 3}
    trainer = NPE(PRIOR, density_estimator=estimator("nsf", **options), show_progress_bars=False)
    net = trained(trainer)
    theta, x = simulations(20, seed=1)
    each = torch.stack([m.log_prob(theta, x) for m in net.model.members], 1)
    mixture = each.logsumexp(1) - math.log(3)
    torch.testing.assert_close(net.eval().log_prob(theta, x)[0], mixture)
    torch.testing.assert_close(net.train().loss(theta, x), -each.mean(1))
    posterior = trainer.build_posterior(net).set_default_x(x[:1])
    assert posterior.leakage_correction(x[:1], show_progress_bars=False) == 1
    musigma.save(net.model, tmp_path / "model.safetensors")
    again = Estimator(musigma.load(tmp_path / "model.safetensors"))
    torch.testing.assert_close(again.log_prob(theta, x)[0], mixture)


def test_conditions_of_any_shape_pass_a_network_of_the_user():
    theta, _ = simulations(50)
    x = torch.randn(50, 4, 6) * 100
    net = estimator("nsf", embedding_net=nn.Flatten(), **SMALL)(theta, x)
    assert net.condition_shape == (4, 6)
    assert net.log_prob(theta.reshape(10, 5, 2), x[:5]).shape == (10, 5)
    assert abs(net.embedding_net(x).std() - 1) < 0.01
    with pytest.raises(ValueError, match=r"expected features \(B, F\)"):
        estimator("nsf", embedding_net=nn.Identity())(theta, x)


# --- the support of the prior --------------------------------------------------------------------

ONE, INF = torch.ones(1), math.inf
SMALLEST = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("prior", "expected"),
    [
        (PRIOR, Support((-1, 10), (1, 30))),
        (td.Independent(td.Uniform(torch.zeros(3), 2.0), 1), Support((0,) * 3, (2,) * 3)),
        (td.Independent(td.Beta(torch.ones(2), ONE), 1), Support((0, 0), (1, 1))),
        (td.Gamma(ONE, ONE), Support((0,), (INF,))),
        (td.LogNormal(ONE, ONE), Support((SMALLEST,), (INF,))),
        (td.Dirichlet(torch.ones(3)), Support((0,) * 3, (1,) * 3, simplex=((0, 1, 2),))),
        (td.MultivariateNormal(torch.zeros(2), torch.eye(2)), None),
        (td.Normal(torch.zeros(2), ONE), None),
        (
            td.MixtureSameFamily(
                td.Categorical(torch.ones(2)), td.Independent(td.Gamma(torch.ones(2, 3), 1.0), 1)
            ),
            Support((0,) * 3, (INF,) * 3),
        ),
        (
            MultipleIndependent(
                [td.Gamma(ONE, ONE), PRIOR, td.MultivariateNormal(torch.zeros(2), torch.eye(2))]
            ),
            Support((0, -1, 10, -INF, -INF), (INF, 1, 30, INF, INF)),
        ),
        (
            [td.Uniform(ONE, 2 * ONE), td.Dirichlet(torch.ones(2))],
            Support((1, 0, 0), (2, 1, 1), simplex=((1, 2),)),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_support_of_priors(prior, expected):
    assert support_of(prior) == expected


@pytest.mark.filterwarnings("ignore:Prior is lacking")
def test_bounds_of_any_prior_with_log_prob_and_sample():
    class Halves:
        def sample(self, shape=()):
            return torch.rand(*shape, 2) / 2

        def log_prob(self, theta):
            inside = ((theta >= 0) & (theta <= 0.5)).all(-1)
            return torch.where(inside, 2 * math.log(2), -INF)

    bounds = {"lower_bound": torch.zeros(2), "upper_bound": torch.ones(2) / 2}
    prior, _, _ = process_prior(Halves(), custom_prior_wrapper_kwargs=bounds)
    assert support_of(prior) == Support((0, 0), (0.5, 0.5))
    with pytest.raises(ValueError, match="Halves states none"):
        support_of(Halves())


def test_supports_without_a_bijection_are_refused():
    with pytest.raises(ValueError, match="no bijection is known"):
        support_of(td.Poisson(ONE))


@pytest.mark.parametrize("how", [{}, {"embedding_net": nn.Linear(3, 4)}], ids=["plain", "net"])
def test_no_posterior_leaks_out_of_its_prior(how):
    torch.manual_seed(0)
    prior = MultipleIndependent([td.Gamma(2 * ONE, ONE), td.Uniform(10 * ONE, 30 * ONE)])
    prior, *_ = process_prior(prior)
    make = estimator("nsf", support="prior", prior=prior, **SMALL, **how)
    theta = prior.sample((300,))
    x = torch.cat([theta, theta[:, :1]], 1) + torch.randn(300, 3)
    trainer = NPE(prior, density_estimator=make, show_progress_bars=False)
    net = trainer.append_simulations(theta, x).train(max_num_epochs=3)
    posterior = trainer.build_posterior(net).set_default_x(torch.tensor([[0.0, 30.0, 0.0]]))
    assert posterior.leakage_correction(posterior.default_x, show_progress_bars=False) == 1
    # the network itself, far from what it has seen: no draw is outside
    draws = net.sample((2000,), torch.tensor([[-50.0, 100.0, 9.0], [50.0, -60.0, 0.0]]))
    assert prior.support.check(draws.flatten(0, 1)).all()
    inside = posterior.log_prob(draws[:50, 0])
    assert inside.isfinite().all()
    assert torch.equal(inside, net.log_prob(draws[:50, :1], posterior.default_x)[:, 0])
    outside = net.log_prob(torch.tensor([[[1.0, 31.0]], [[-1.0, 20.0]]]), posterior.default_x)
    assert (outside == -INF).all()


def test_the_density_integrates_to_one_on_the_box():
    torch.manual_seed(0)
    make = estimator("nsf", support=Support((-1, 10), (1, 30)), **SMALL)
    net = make(*simulations())
    net = Estimator(testing.randomized(net.model))
    y = torch.linspace(-6, 6, 400).double()  # shares of each side are Phi(y): points near borders
    step, normal = y[1] - y[0], td.Normal(y.new_zeros(()), y.new_ones(()))
    sides = [low + (high - low) * normal.cdf(y) for low, high in ((-1.0, 1.0), (10.0, 30.0))]
    weight = 40 * torch.outer(*[normal.log_prob(y).exp() * step] * 2).flatten()
    with torch.no_grad():
        log_prob = net.log_prob(torch.cartesian_prod(*sides)[:, None], simulations(1)[1].double())
    assert log_prob[:, 0].exp() @ weight == pytest.approx(1, abs=1e-3)


def test_simulations_outside_the_support_are_refused():
    theta, x = simulations()
    theta[[4, 7], 1] = torch.tensor([31.0, 9.0])
    make = estimator("nsf", support="prior", prior=PRIOR)
    with pytest.raises(ValueError, match=r"2 of 300 .* element 1 is 31, expected in \[10, 30\]"):
        make(theta, x)
    with pytest.raises(ValueError, match=r"theta has shape \(1,\), and the support 2"):
        make(theta[:, :1], x)


def test_rounds_of_truncated_proposals():
    """A second round, from the part of the prior where the posterior has its mass."""
    torch.manual_seed(0)
    make = estimator("nsf", support="prior", prior=PRIOR, **SMALL)
    trainer = NPE(PRIOR, density_estimator=make, show_progress_bars=False)
    net = trained(trainer)
    _, x = simulations(1, seed=1)
    posterior = trainer.build_posterior(net).set_default_x(x)
    accept = get_density_thresholder(posterior, quantile=1e-2, num_samples_to_estimate_support=500)
    proposal = RestrictedPrior(PRIOR, accept, sample_with="rejection")
    theta = proposal.sample((100,), show_progress_bars=False)
    assert accept(theta).all()
    trainer.append_simulations(theta, theta @ torch.ones(2, 3), proposal=proposal)
    again = trainer.train(max_num_epochs=1, force_first_round_loss=True)
    assert PRIOR.support.check(again.sample((500,), x)[:, 0]).all()


# --- into sbi, and out of it ---------------------------------------------------------------------


def test_what_sbi_trained_is_saved_loaded_and_used_again(tmp_path):
    torch.manual_seed(0)
    make = estimator("nsf", support="prior", prior=PRIOR, **SMALL)
    net = trained(NPE(PRIOR, density_estimator=make, show_progress_bars=False))
    musigma.save(net.model, tmp_path / "nsf.safetensors")
    model = musigma.load(tmp_path / "nsf.safetensors")
    theta, x = simulations(9, seed=1)
    assert torch.equal(model.log_prob(theta, {"x": x}), net.log_prob(theta, x)[0])
    again = DirectPosterior(Estimator(model), PRIOR)
    before = DirectPosterior(net, PRIOR)
    how = {"x": x[:1], "norm_posterior": False}
    assert torch.equal(again.log_prob(theta, **how), before.log_prob(theta, **how))


def test_a_context_of_several_columns_is_one_condition():
    spec = Spec((2,), context=(Variable("a"), Variable("b", (2,))))
    model = testing.randomized(musigma.build("nsf", spec, depth=1))
    net = Estimator(model)
    theta, x = torch.randn(6, 2).double(), torch.randn(6, 3).double()
    assert net.condition_shape == (3,)
    expected = model.log_prob(theta, {"a": x[:, :1], "b": x[:, 1:]})
    torch.testing.assert_close(net.log_prob(theta, x)[0], expected)


def test_one_parameter():
    theta, x = simulations(60)
    net = estimator("nsf", **SMALL)(theta[:, :1], x)
    assert net.sample((8,), x[:3]).shape == (8, 3, 1)


# --- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nsff"}, "did you mean 'nsf'"),
        ({"name": "nsf", "of": "y"}, "of: expected 'theta'"),
        ({"name": "nsf", "support": "prior"}, "needs the prior"),
        ({"name": "nsf", "support": "box"}, "support: expected"),
        ({"name": "nsf", "prior": PRIOR}, 'set support="prior"'),
        ({"name": "nsf", "of": "x", "support": "prior", "prior": PRIOR}, "the density is that"),
        ({"name": "nsf", "embed": "mlp", "embedding_net": nn.Identity()}, "embedding_net: it"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimator(**arguments)


def test_models_that_sbi_cannot_use_are_refused():
    with pytest.raises(TypeError, match="no exact log p"):
        Estimator(musigma.build("vae", (2,), bits=None, context=3))
    with pytest.raises(ValueError, match="a spec that has a context"):
        Estimator(musigma.build("nsf", (2,)))


def test_without_sbi_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sbi", None)
    for name in [name for name in sys.modules if name.startswith(("sbi.", "musigma.sbi"))]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"needs sbi .*pip install 'musigma\[sbi\]'"):
        importlib.import_module("musigma.sbi")
