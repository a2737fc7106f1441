"""Models inside sbi: its protocol, NPE and NLE, and out again."""

import importlib
import sys

import pytest
import torch
from torch import nn

import musigma
from musigma import Spec, Variable, testing

pytest.importorskip("sbi", reason="sbi is not installed: pip install 'musigma[sbi]'")

from sbi.inference import NLE, NPE, DirectPosterior
from sbi.neural_nets import posterior_nn
from sbi.utils import BoxUniform

from musigma.sbi import Estimator, estimator

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
    testing.randomized(net.model)
    return net.eval()


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
    assert ours.embedding_net(x).shape == (20, 3)
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
    embedded = net.embedding_net(x * 1e-3 + 7)
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
    _, x = simulations(5, seed=1)
    assert net.embedding_net(x).shape == (5, 4)
    with pytest.raises(ValueError, match="composed by hand"):
        musigma.save(net.model, "nowhere.safetensors")


def test_conditions_of_any_shape_pass_a_network_of_the_user():
    theta, _ = simulations(50)
    x = torch.randn(50, 4, 6) * 100
    net = estimator("nsf", embedding_net=nn.Flatten(), **SMALL)(theta, x)
    assert net.condition_shape == (4, 6)
    assert net.log_prob(theta.reshape(10, 5, 2), x[:5]).shape == (10, 5)
    assert abs(net.embedding_net(x).std() - 1) < 0.01
    with pytest.raises(ValueError, match=r"expected features \(B, F\)"):
        estimator("nsf", embedding_net=nn.Identity())(theta, x)


# --- into sbi, and out of it ---------------------------------------------------------------------


def test_what_sbi_trained_is_saved_loaded_and_used_again(tmp_path):
    torch.manual_seed(0)
    make = estimator("nsf", **SMALL)
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
    theta, x = torch.randn(6, 2), torch.randn(6, 3)
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
