"""Priors that are fitted after training."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture as Reference

from musigma import Dataset, Preprocess, TrainConfig, build, fit, load, save
from musigma.cli import main
from musigma.coding import compress, decompress
from musigma.distributions import GaussianMixture
from musigma.model import VAE
from musigma.training import fit_prior
from tests.test_latents import circle


def clusters(n=600, seed=0):
    generator = np.random.default_rng(seed)
    centers = np.array([[-3.0, 0.0], [0.0, 2.0], [3.0, -1.0]])
    which = generator.choice(3, n, p=[0.5, 0.3, 0.2])
    return torch.from_numpy(centers[which] + 0.4 * generator.normal(size=(n, 2)))


def test_expectation_maximization_agrees_with_scikit_learn():
    z = clusters()
    torch.manual_seed(0)
    ours = GaussianMixture(2, 3).double()
    ours.fit(z, steps=1000, tolerance=1e-12)
    torch.manual_seed(0)
    start = GaussianMixture(2, 3).double()
    start.calibrate(z)
    theirs = Reference(
        3, covariance_type="diag", tol=1e-12, max_iter=1000, reg_covar=0.0,
        weights_init=np.full(3, 1 / 3), means_init=start.means.detach().numpy(),
        precisions_init=(1 / z.var(0)).expand(3, 2).numpy(),
    ).fit(z.numpy())  # fmt: skip
    assert abs(float(ours().log_prob(z).mean().detach()) - theirs.score(z.numpy())) < 1e-6
    assert np.allclose(ours.means.detach().numpy(), theirs.means_, atol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    data = Dataset(circle(1000))
    model = build("vae", (5,), bits=None, latents=2, width=32, std=0.1)
    config = TrainConfig(steps=300, batch_size=64, lr=5e-3, ema=0.98, evaluations=1)
    folder = tmp_path_factory.mktemp("run")
    return fit(model, data, Dataset(circle(200, seed=1)), config, folder).model, data


@pytest.mark.parametrize(
    "prior", ["mixture components=8", "nsf depth=2 hidden=16", "vamp components=20"]
)
def test_a_fitted_prior_raises_the_elbo_and_changes_nothing_else(trained, prior):
    model, data = trained
    new = fit_prior(model, data, prior, steps=200, lr=1e-2)
    x = torch.from_numpy(circle(500, seed=2))
    with torch.no_grad():
        torch.manual_seed(0)
        before = model.elbo(x).mean()
        torch.manual_seed(0)
        after = new.elbo(x).mean()
    assert after > before + 0.3
    assert torch.allclose(new.reconstruct(x), model.reconstruct(x), atol=1e-3)
    assert new.config["options"]["prior"] == prior
    assert model.config["options"]["prior"] == "auto"
    assert all(p.requires_grad for p in new.parameters())
    radius = new.sample(300, mode=True).norm(dim=1)
    assert (radius - 2).abs().mean() < (model.sample(300, mode=True).norm(dim=1) - 2).abs().mean()


def test_below_layers_and_with_a_context():
    rows = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    data = Dataset(rows)
    model = build("vae", (3,), bits=None, latents=2, width=8, standardize=True)
    new = fit_prior(model, data, "maf depth=1 hidden=8", steps=2)
    vae = next(m for m in new.modules() if isinstance(m, VAE))
    assert len(vae.prior.layers) == 3


def test_a_model_with_a_fitted_prior_compresses(tmp_path):
    images = np.random.default_rng(0).integers(0, 2, (12, 1, 4, 4)).astype(np.uint8)
    data = Dataset(255 * images, preprocess=Preprocess(bits=1))
    model = build("vae", (1, 4, 4), bits=1, net="mlp", latents=2, width=8)
    new = fit_prior(model, data, "maf depth=1 hidden=8", steps=3)
    save(new, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    compress(again, images, tmp_path / "x.mus")
    assert np.array_equal(decompress(tmp_path / "x.mus", again).levels, images)


def test_a_model_without_an_option_prior_is_refused():
    with pytest.raises(ValueError, match="maf has no option `prior`"):
        fit_prior(build("maf", (3,), depth=1), Dataset(np.zeros((4, 3), np.float32)), "mixture")


def test_the_command(tmp_path, capsys):
    np.savetxt(tmp_path / "x.csv", circle(300), delimiter=",", header="a,b,c,d,e", comments="")
    source, run = str(tmp_path / "x.csv"), str(tmp_path / "run")
    main(
        [
            "train",
            "vae",
            source,
            "--out",
            run,
            "--steps",
            "20",
            "--latents",
            "2",
            "--width",
            "8",
            "--schema",
            "none",
        ]
    )
    capsys.readouterr()
    out = str(tmp_path / "new.safetensors")
    main(["fit-prior", run, "--prior", "mixture components=3", "--out", out, "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert math.isfinite(answer["after"])
    assert answer["n"] < 300  # the training part
    model = load(out)
    assert model.config["options"]["prior"] == "mixture components=3"
    main(["sample", out, "--n", "3", "--out", str(tmp_path / "s.csv")])
