"""A VAE of rows with missing values, and what it fills in."""

import numpy as np
import pytest
import torch

from musigma import TrainConfig, build, cli, fit
from musigma.audit import audit_model
from musigma.data import load
from musigma.imputation import draw_missing, impute, takes_missing
from musigma.testing import check_model, randomized
from musigma.trace import Trace

SMALL = {"latents": 2, "width": 16, "blocks": 1}


def line(n, seed=0, missing=0.3):
    """Four numbers near a line, in other units, of which some are missing; and the truth."""
    random = np.random.default_rng(seed)
    t = random.normal(size=(n, 1))
    x = t * [1.0, -2.0, 3.0, 0.5] + 0.2 * random.normal(size=(n, 4)) + [0, 5, 0, -1]
    seen = random.uniform(size=(n, 4)) >= missing
    seen[:, 0] |= ~seen.any(1)
    return np.where(seen, x, np.nan), x


@pytest.mark.parametrize("context", [0, 2])
def test_laws_on_whole_rows(context):
    torch.manual_seed(0)
    model = build("miwae", (4,), context=context, **SMALL)
    check_model(model, (4,), context=context)
    if not context:
        report = audit_model(model)
        assert report.verdict == "correct", report


def test_a_missing_value_costs_nothing_and_changes_nothing():
    torch.manual_seed(0)
    model = build("miwae", (4,), **SMALL)
    model.calibrate(torch.from_numpy(line(500)[0]).float())
    model = randomized(model)
    x = torch.from_numpy(line(6)[1])
    x[:, 1] = torch.nan
    z = model.encode(x, mode=True)
    p = model.prior.decoder(z[0])
    seen = [0, 2, 3]
    units = model.layers[0].std.log()[seen].sum()
    y = (x - model.layers[0].mean) / model.layers[0].std
    alone = p.base_dist.log_prob(y)[:, seen].sum(1) - units
    trace = Trace(temperature=0.0)
    model.infer(x, trace)
    torch.testing.assert_close(trace.evidence(model.latents()).log_px, alone)


def test_the_units_are_those_of_observed_values():
    model = build("miwae", (4,), **SMALL)
    some, _ = line(400)
    model.calibrate(torch.from_numpy(some))
    layer = model.layers[0]
    np.testing.assert_allclose(layer.mean, np.nanmean(some, 0), rtol=1e-5)
    np.testing.assert_allclose(layer.std, np.nanstd(some, 0), rtol=1e-5)


@pytest.mark.slow
def test_training_fills_better_than_the_mean(tmp_path, capsys):
    some, truth = line(1500)
    cells = [["" if np.isnan(v) else repr(float(v)) for v in row] for row in some]
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(["a,b,c,d", *(",".join(row) for row in cells)]))
    data = load(path, schema="infer", missing="ignore")
    np.testing.assert_allclose(data.x, some)
    torch.manual_seed(0)
    model = build("miwae", data.spec(), latents=1, width=32, blocks=1)
    config = TrainConfig(steps=500, batch_size=64, lr=5e-3, ema=0.98, evaluations=1, k=5)
    run = fit(model, data, data.subset(range(100)), config, tmp_path / "run")
    filled = impute(run.model, torch.from_numpy(some[:300]), k=200).numpy()
    gaps = np.isnan(some[:300])
    error = (filled - truth[:300])[gaps] / truth.std(0)[np.where(gaps)[1]]
    mean = (np.nanmean(some, 0) - truth[:300])[gaps] / truth.std(0)[np.where(gaps)[1]]
    assert np.sqrt((error**2).mean()) < 0.5 * np.sqrt((mean**2).mean())
    np.testing.assert_array_equal(filled[~gaps], some[:300][~gaps])
    words = ["train", "miwae", str(path), "--missing", "ignore", "--steps", "3", "--width", "8"]
    cli.main([*words, "--device", "cpu", "--out", str(tmp_path / "command")])
    with pytest.raises(SystemExit):
        cli.main([*words[:3], *words[5:], "--out", str(tmp_path / "other")])
    assert "--missing ignore" in "".join(capsys.readouterr())


def test_filling_is_the_conditional_mean_of_a_linear_model():
    """With a linear decoder, E[x_m | x_o] has a closed form; a bad posterior costs only draws."""
    torch.manual_seed(0)
    model = build("miwae", (3,), latents=1, width=4, blocks=0).double()
    decoder = model.prior.decoder.net.layers[0]
    loadings, s = torch.tensor([1.0, 2.0, -1.0]).double(), 0.5
    with torch.no_grad():
        decoder.weight.copy_(torch.cat([loadings, torch.zeros(3)])[:, None])
        decoder.bias.copy_(torch.cat([torch.zeros(3), torch.full((3,), np.log(s) + 1.0)]))
    x = torch.tensor([[0.7, torch.nan, -0.2]]).double()
    seen = torch.tensor([0, 2])
    precision = 1 + (loadings[seen] ** 2).sum() / s**2
    z = (loadings[seen] * x[0, seen]).sum() / s**2 / precision
    filled = impute(model, x, k=200_000, at_once=200_000)
    assert abs(float(filled[0, 1] - 2 * z)) < 0.02


def test_draws_have_the_moments_of_the_exact_conditional():
    """A model of one latent with linear means is a Gaussian whose conditionals are known."""
    torch.manual_seed(0)
    model = build("miwae", (3,), latents=1, width=4, blocks=0)
    model = randomized(model)
    with torch.no_grad():  # the decoder: means w z + b, scales of their own
        head = model.prior.decoder.net.layers[0]
        head.weight[3:] = 0
    z = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
    at_zero, at_one = (model.decode([v], mode=True)[0].double() for v in z)
    w, b = (at_one - at_zero).detach(), at_zero.detach()
    p = model.prior.decoder(z[0]).base_dist
    units = model.layers[0].std.double()
    noise = (p.log_std[0].exp() * units).square().detach()
    covariance = w[:, None] * w + noise.diag()
    x = torch.tensor([[0.7, -1.1, torch.nan]])
    seen = covariance[:2, :2].inverse() @ (x[0, :2].double() - b[:2])
    mean = b[2] + covariance[2, :2] @ seen
    known = covariance[2, :2] @ covariance[:2, :2].inverse() @ covariance[2, :2]
    variance = covariance[2, 2] - known
    assert known > 0.1 * variance  # the observed values matter
    drawn = draw_missing(model, x, 20_000, k=20_000)[0, :, 2].double()
    assert abs(drawn.mean() - mean) < 5 * (variance / 1000).sqrt()
    assert abs(drawn.var() / variance - 1) < 0.15
    filled = impute(model, x, k=20_000)[0, 2].double()
    assert abs(filled - mean) < 5 * (variance / 1000).sqrt()


def test_only_models_that_skip_missing_values_fill_them():
    torch.manual_seed(0)
    assert takes_missing(build("miwae", (3,), **SMALL), 3)
    assert not takes_missing(build("vae", (3,), bits=None, latents=2, width=8), 3)


def test_the_command_fills_a_table(tmp_path, capsys):
    some, _ = line(300)
    cells = [["" if np.isnan(v) else f"{v:.3f}" for v in row] for row in some]
    (tmp_path / "rows.csv").write_text("\n".join(["a,b,c,d", *(",".join(row) for row in cells)]))
    rows, run, out = (str(tmp_path / name) for name in ("rows.csv", "run", "filled.csv"))
    train = ["train", "miwae", rows, "--missing", "ignore", "--width", "8", "--steps", "20"]
    cli.main([*train, "--out", run])
    words = ["--n", "5", "--out", out, "--summary", str(tmp_path / "cells.csv")]
    cli.main(["impute", run, rows, *words])
    capsys.readouterr()
    filled = np.genfromtxt(out, delimiter=",", names=True)
    assert len(filled) == 1500
    values = np.stack([filled[name] for name in "abcd"], 1).reshape(5, 300, 4)
    assert np.isfinite(values).all()
    seen = ~np.isnan(some)
    np.testing.assert_allclose(values[:, seen], np.tile(some[seen].round(3), (5, 1)), atol=1e-6)
    assert (values.std(0)[~seen] > 0).all()
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 1 + (~seen).sum()
