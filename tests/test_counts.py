"""Likelihoods of counts, the family scvi, and .h5ad files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import NegativeBinomial, Poisson

from musigma import Dataset, TrainConfig, build, cli, fit
from musigma.audit import audit_model
from musigma.data import DataError, load
from musigma.distributions import (
    FactorizedNegativeBinomial,
    FactorizedPoisson,
    PointMass,
    ZeroInflated,
    likelihood,
)
from musigma.testing import check_head, check_model

numbers = st.floats(-4, 8)


def counts_of(n, genes=6, seed=0):
    """Two kinds of cells with unequal totals, overdispersed."""
    random = np.random.default_rng(seed)
    kind = random.integers(0, 2, n)
    shares = np.where(kind[:, None], np.arange(1, genes + 1), np.arange(genes, 0, -1)) ** 2
    total = random.lognormal(4.5, 0.6, n)[:, None]
    rate = random.gamma(3.0, total * shares / shares.sum(1, keepdims=True) / 3.0)
    return random.poisson(rate).astype(np.float32), kind


@given(st.integers(0, 10_000), numbers, st.floats(-6, 12), st.floats(-6, 6))
@settings(max_examples=50, deadline=None)
def test_log_masses_are_those_of_scipy(x, log_mean, log_theta, logit):
    given = (
        torch.tensor([[float(v)]], dtype=torch.float64) for v in (x, log_mean, log_theta, logit)
    )
    value, m, t, zero = given
    mean, theta = np.exp(log_mean), np.exp(log_theta)
    negative_binomial = stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    poisson = stats.poisson.logpmf(x, mean)
    share = 1 / (1 + np.exp(-logit))
    inflated = np.logaddexp(
        np.log(share) if x == 0 else -np.inf, np.log1p(-share) + negative_binomial
    )
    got = [
        float(dist.log_prob(value))
        for dist in (
            FactorizedPoisson(m),
            FactorizedNegativeBinomial(m, t),
            ZeroInflated(FactorizedNegativeBinomial(m, t), zero),
        )
    ]
    np.testing.assert_allclose(got, [poisson, negative_binomial, inflated], rtol=1e-6, atol=1e-7)


def test_log_masses_are_those_of_torch():
    m, t, x = torch.randn(7, 5).double(), torch.randn(7, 5).double(), torch.arange(5.0).double()
    x = x.expand(7, 5)
    torch.testing.assert_close(
        FactorizedPoisson(m).log_prob(x), Poisson(m.exp()).log_prob(x).sum(1)
    )
    theirs = NegativeBinomial(t.exp(), logits=m - t)
    torch.testing.assert_close(
        FactorizedNegativeBinomial(m, t).log_prob(x), theirs.log_prob(x).sum(1)
    )


@pytest.mark.parametrize("inflated", [False, True])
def test_masses_sum_to_one_and_draws_follow_them(inflated):
    torch.manual_seed(0)
    dist = FactorizedNegativeBinomial(torch.tensor([[1.0]]), torch.tensor([[0.5]]))
    dist = ZeroInflated(dist, torch.tensor([[-0.3]])) if inflated else dist
    levels = torch.arange(400.0)[:, None]
    masses = dist.log_prob(levels).exp()
    assert abs(float(masses.sum()) - 1) < 1e-5
    mean = float((masses * levels[:, 0]).sum())
    assert abs(mean - float(dist.mean)) < 1e-4
    drawn = dist.sample((20_000,)).flatten()
    assert abs(float(drawn.mean()) - mean) < 5 * float(drawn.std()) / 20_000**0.5
    counted = torch.bincount(drawn.long(), minlength=8)[:8] / 20_000
    assert (counted - masses[:8]).abs().max() < 0.015
    assert float(dist.mode) == float(masses.argmax())


def test_values_that_are_no_counts_have_no_mass():
    dist = FactorizedPoisson(torch.zeros(1, 1))
    assert dist.log_prob(torch.tensor([[0.5]])) == -torch.inf
    assert dist.log_prob(torch.tensor([[-1.0]])) == -torch.inf


@pytest.mark.parametrize("name", ["poisson", "nb", "zinb"])
@pytest.mark.parametrize("dispersion", ["feature", "emitted"])
def test_heads_obey_the_laws(name, dispersion):
    head = likelihood(name, (5,), lambda c: torch.nn.Linear(3, c), dispersion=dispersion)
    check_head(head, torch.randn(4, 3), (5,))


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("name", ["vae", "scvi"])
def test_models_of_counts_obey_the_laws(name, context):
    torch.manual_seed(0)
    x = torch.from_numpy(counts_of(4)[0])
    options = {"width": 8} if name == "vae" else {"hidden": 8}
    model = build(name, (6,), bits=None, likelihood="zinb", latents=3, context=context, **options)
    check_model(model, (6,), context=context, x=x)
    if not context:
        report = audit_model(model, x)
        assert report.verdict == "correct", report


def test_the_total_count_is_a_latent_with_a_point_mass_as_posterior():
    model = build("scvi", (6,), latents=2, hidden=8)
    x = torch.from_numpy(counts_of(16)[0])
    model.calibrate(x)
    total, z = model.encode(x)
    assert torch.equal(total[:, 0], x.sum(1))
    assert z.shape == (16, 2)
    means = model.decoder(z, None, total).counts.mean.sum(1)
    torch.testing.assert_close(means, x.sum(1))
    assert float(PointMass(total).log_prob(total + 1)[0]) == -torch.inf
    assert abs(model.total.head().mean.item() / float(x.sum(1).mean()) - 1) < 1e-5


def test_training_beats_independent_genes(tmp_path):
    x, _ = counts_of(2048, genes=30)
    data = Dataset(x)
    torch.manual_seed(0)
    model = build("scvi", (30,), latents=2, hidden=32, likelihood="nb")
    config = TrainConfig(steps=500, lr=5e-3, evaluations=1, ema=0.98)
    run = fit(model, data, data.subset(range(256)), config, tmp_path)
    new = torch.from_numpy(counts_of(1000, genes=30, seed=1)[0])
    with torch.no_grad():
        nats = float(-run.model.elbo(new).mean())
    mean, var = x.mean(0), x.var(0)  # independent negative binomials by their moments
    theta = mean**2 / (var - mean)
    alone = -stats.nbinom.logpmf(new.numpy(), theta, theta / (theta + mean)).sum(1).mean()
    assert nats < alone - 1.0
    samples = run.model.sample(2000)
    assert torch.equal(samples, samples.floor())
    assert abs(float(samples.sum(1).mean()) / x.sum(1).mean() - 1) < 0.15


def test_training_refuses_what_is_no_count(tmp_path):
    x, _ = counts_of(64)
    x[5, 2] = 0.25
    model = build("vae", (6,), bits=None, likelihood="nb", latents=2, width=8)
    with pytest.raises(ValueError, match=r"row 5 \(from 0\), column 2 .* is 0.25"):
        fit(model, Dataset(x), Dataset(x), TrainConfig(steps=1), tmp_path)
    with pytest.raises(ValueError, match="counts are modeled as they are"):
        build("vae", (6,), bits=None, likelihood="nb", standardize=True)


# --- .h5ad ---------------------------------------------------------------------------------------


@pytest.fixture
def cells(tmp_path):
    anndata = pytest.importorskip("anndata")
    import pandas as pd
    from scipy import sparse

    x, kind = counts_of(200)
    x = np.concatenate([x, np.zeros((200, 1), np.float32)], 1)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(np.where(kind, "b", "a")),
            "depth": np.linspace(0, 1, 200),
        },
        index=pd.Index([f"cell{i}" for i in range(200)], dtype=object),
    )
    obs["batch"] = obs["batch"].cat.set_categories(pd.Index(["a", "b"], dtype=object))
    var = pd.DataFrame(index=pd.Index([f"gene{j}" for j in range(7)], dtype=object))
    content = anndata.AnnData(sparse.csr_matrix(np.log1p(x)), obs=obs, var=var)
    content.layers["counts"] = sparse.csr_matrix(x)
    content.write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad", x, kind


def test_h5ad_files_are_read(cells):
    path, x, kind = cells
    data = load(path, given=["batch", "depth"])
    np.testing.assert_array_equal(data.x, x[:, :6])
    assert data.columns == tuple(f"gene{j}" for j in range(6))
    assert data.given["batch"].names == ("a", "b")
    np.testing.assert_array_equal(data.given["batch"].values, kind)
    assert data.given["depth"].values[-1] == 1
    said = "\n".join(data.notes)
    assert "layers/counts: 200 cells x 7 genes, sparse float32, counts" in said
    assert "genes that are zero in all cells are left out: 1" in said
    logs = load(path.parent / "cells.h5ad/X")
    np.testing.assert_allclose(logs.x, np.log1p(x[:, :6]), rtol=1e-6)
    assert any("not counts" in note for note in logs.notes)
    with pytest.raises(DataError, match=r"has no layers/raw: it has X, layers/counts"):
        load(path.parent / "cells.h5ad/layers/raw")


def test_one_command_trains_on_an_h5ad_file(cells, capsys):
    path, _, _ = cells
    out = path.parent / "run"
    small = ["--steps", "3", "--hidden", "8", "--given", "batch", "--device", "cpu"]
    cli.main(["train", "scvi", str(path), "--out", str(out), *small])
    said = "".join(capsys.readouterr())
    assert said.count("200 cells x 7 genes") == 1
    assert "warning" not in said
    assert "not examined" not in said
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["options"]["likelihood"] == "zinb"
    cli.main(["evaluate", str(out), str(path), "--json"])
    figure = json.loads(capsys.readouterr().out)
    assert figure["bound"] == "elbo"
    assert np.isfinite(figure["nats"])
    out = path.parent / "vae"
    words = ["train", "vae", str(path), "--likelihood", "zinb", "--width", "8", "--steps", "3"]
    cli.main([*words, "--out", str(out), "--device", "cpu"])
    options = json.loads((out / "config.json").read_text())["model"]["options"]
    assert options["likelihood"] == "zinb"
    cli.main(["sample", str(out), "--n", "5", "--out", str(path.parent / "samples.csv")])
    rows = np.loadtxt(path.parent / "samples.csv", delimiter=",", skiprows=1)
    assert rows.shape == (5, 6)
    np.testing.assert_array_equal(rows, np.floor(rows))
    assert (path.parent / "samples.csv").read_text().startswith("gene0,gene1")
