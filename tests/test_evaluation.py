"""Evaluation: figures with their bound, ledgers that add up to them, and diagnostics."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Laplace, Normal, StudentT

from musigma import data
from musigma.data import Dataset, Preprocess
from musigma.distributions import StandardNormal, StandardUniform, likelihood
from musigma.evaluation import (
    batch,
    batches,
    bits_per_dim,
    check,
    conditioning,
    evaluate,
    inspect,
    ledger,
    saturation,
    score,
)
from musigma.gaussian import DiagonalGaussian
from musigma.layers import ActNorm, Classifier, Dequantize, InvertibleConv, Rescale
from musigma.model import VAE, Bijection, Chain, Layer, Prior
from musigma.trace import Trace
from musigma.zoo import architecture, build

MODELS = {
    "vae": {"net": "mlp", "width": 16, "latents": 4},
    "vae gaussian": {"net": "mlp", "width": 8, "likelihood": "gaussian"},
    "vae flow prior": {"net": "mlp", "width": 16, "latents": 4, "prior": "flow"},
    "ladder": {"levels": 3, "latents": 2, "width": 4},
    "realnvp": {"levels": 1, "depth": 1, "hidden": 4},
    "glow learned": {"levels": 2, "depth": 1, "hidden": 8, "dequantize": "learned"},
    "glow conditional": {"levels": 2, "depth": 1, "hidden": 8},
}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").subset(range(40))


@pytest.fixture(scope="module")
def models(digits):
    """Small models by name, calibrated and perturbed so that no term is zero, in float64."""

    def make(name: str, dtype=torch.float32):
        torch.manual_seed(0)
        spec = digits.spec(["label"] if "conditional" in name else [])
        model = build(name.split()[0], spec, **MODELS[name])
        x, context = next(batches(model, digits, batch_size=64))
        model.calibrate(x, context)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="module")
def moons():
    torch.manual_seed(0)
    points = data.load("two-moons").subset(range(300))
    model = build("realnvp", (2,), bits=None, hidden=8)
    model.calibrate(torch.from_numpy(points.x))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval(), points


# -- scores


def test_scores_of_an_exact_model_are_its_log_densities_in_data_order(moons):
    model, points = moons
    table = score(model, points, batch_size=64)
    with torch.no_grad():
        exact = -model.log_prob(torch.from_numpy(points.x)).numpy()
    np.testing.assert_allclose(table["nats"], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table["bits_per_dim"], table["nats"] / (2 * math.log(2)))
    np.testing.assert_allclose(table["rate"] - table["log_px"], table["nats"], atol=1e-5)


def test_an_exact_score_does_not_depend_on_the_batch(moons):
    model, points = moons
    plain = score(model, points)["nats"]
    order = np.random.default_rng(0).permutation(len(points))
    mixed = score(model, points.subset(order), batch_size=7, seed=3)["nats"]
    np.testing.assert_allclose(mixed, plain[order], rtol=1e-5, atol=1e-5)
    assert score(model, points, k=8)["nats"] == pytest.approx(plain)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_depends_on_its_seed_and_not_on_the_random_state(digits, models, name):
    model = models(name)
    state = torch.get_rng_state()
    first = score(model, digits, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    again, other = (score(model, digits, seed=s) for s in (1, 2))
    for column, values in first.items():
        assert values.shape == (40,)
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, again[column])
    assert not np.array_equal(first["nats"], other["nats"])
    kl = [v for column, v in first.items() if column.startswith("kl_")]
    assert len(kl) == len(list(model.latents()))


def test_bits_per_dim_of_numbers_arrays_and_tensors():
    assert bits_per_dim(6 * math.log(2), 3) == pytest.approx(2)
    for nats in (np.array([0.0, -3.0]), torch.tensor([0.0, -3.0])):
        assert bits_per_dim(nats * math.log(2), 3).tolist() == pytest.approx([0, -1])


def test_progress_is_reported(digits, models):
    seen = []
    score(models("vae"), digits, batch_size=16, progress=lambda *args: seen.append(args))
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_more_draws_give_a_tighter_bound(digits, models):
    model = models("vae")
    one, many = (evaluate(model, digits, k=k)["nats"] for k in (1, 32))
    assert many < one - 0.1


# -- figures


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("name", ["vae", "glow learned"])
def test_the_parts_of_a_figure_are_consistent(digits, models, name, k):
    model = models(name)
    table, figure = score(model, digits, k=k, seed=5), evaluate(model, digits, k=k, seed=5)
    assert list(figure) == [
        "bits_per_dim",
        "standard_error",
        "nats",
        "standard_error_nats",
        "bound",
        "n",
        "log_px",
        "rate",
        "kl",
        "non_finite",
        *(["ess", "ess_lowest"] if k > 1 else []),
    ]
    bits = table["bits_per_dim"]
    assert figure["bits_per_dim"] == pytest.approx(bits.mean(), rel=1e-12)
    spread = math.sqrt(((bits - bits.mean()) ** 2).sum() / (40 - 1))
    assert figure["standard_error"] == pytest.approx(spread / math.sqrt(40), rel=1e-12)
    assert figure["nats"] == pytest.approx(figure["bits_per_dim"] * 64 * math.log(2))
    assert figure["standard_error_nats"] == pytest.approx(
        figure["standard_error"] * 64 * math.log(2)
    )
    assert figure["bound"] == ("elbo" if k == 1 else "iwae-3")
    assert (figure["n"], figure["non_finite"]) == (40, 0)
    assert len(figure["kl"]) == len(list(model.latents()))
    if k == 1:
        assert figure["nats"] == pytest.approx(figure["rate"] - figure["log_px"])


@pytest.mark.parametrize("k", [1, 5])
def test_an_exact_figure_is_called_exact_for_any_k(moons, k):
    figure = evaluate(*moons, k=k)
    assert figure["bound"] == "exact"
    assert figure["bits_per_dim"] == evaluate(*moons)["bits_per_dim"]


def test_one_example_has_no_standard_error(digits, models):
    figure = evaluate(models("vae"), digits.subset([3]))
    assert (figure["standard_error"], figure["standard_error_nats"]) == (None, None)


def test_no_examples_and_no_draws_are_refused(digits, models):
    model = models("vae")
    with pytest.raises(ValueError, match="holds no examples"):
        evaluate(model, digits.subset([]))
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k: expected 1 or more draws; got {k}"):
            score(model, digits, k=k)


def test_examples_without_a_finite_figure_are_counted(moons):
    model, points = moons
    x = points.x.copy()
    x[7] = 1e30
    figure = evaluate(model, Dataset(x))
    assert figure["non_finite"] == 1
    assert not math.isfinite(figure["bits_per_dim"])


# -- the ledger


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_of_the_ledger_add_up_to_the_figure(digits, models, name):
    for dtype in (torch.float64, torch.float32):
        model = models(name, dtype)
        rows = ledger(model, digits, seed=4)
        total = sum(row["bits_per_dim"] for row in rows)
        figure = evaluate(model, digits, seed=4)
        assert total == pytest.approx(figure["bits_per_dim"], rel=1e-12)
        modules = dict(model.named_modules(remove_duplicate=False))
        for row in rows:
            site = model if row["site"] == "model" else modules[row["site"]]
            assert type(site).__name__ == row["kind"]
            assert row["term"] in ("log_det", "log_q", "log_p", "kl")


@pytest.mark.parametrize("name", MODELS)
def test_the_ledger_and_the_evidence_group_the_same_terms(digits, models, name):
    model = models(name, torch.float64)
    x, context = next(batches(model, digits, batch_size=64))
    trace = Trace(closed_form=True)
    with torch.no_grad():
        evidence = model(x, context, trace=trace)
    groups = {"log_px": 0.0, "log_q": 0.0, "log_det": 0.0, "kl": [0.0] * evidence.kl.shape[1]}
    latents, total = list(model.latents()), 0.0
    for site, term, nats in trace.entries():
        total = total + nats
        if site in latents and term in ("kl", "log_p"):
            groups["kl"][latents.index(site)] += nats
        elif term == "log_p" or site in trace.below:
            groups["log_px"] = groups["log_px"] - nats
        else:
            groups[term] = groups[term] + (nats if term == "log_q" else -nats)
    torch.testing.assert_close(total, -evidence.elbo, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(torch.stack(groups.pop("kl"), 1), evidence.kl)
    for group, nats in groups.items():
        expected = getattr(evidence, group)
        torch.testing.assert_close(torch.zeros_like(expected) + nats, expected)


def test_the_ledger_of_exact_vectors_adds_up(moons):
    model, points = moons
    total = sum(row["bits_per_dim"] for row in ledger(model.double(), points))
    assert total == pytest.approx(evaluate(model, points)["bits_per_dim"], rel=1e-9)
    model.float()


def test_the_ledger_names_layers_and_terms(digits, models):
    by = {
        (r["kind"], r["term"]): r["bits_per_dim"] for r in ledger(models("vae gaussian"), digits)
    }
    assert by["Rescale", "log_det"] == pytest.approx(8.0)  # 256 levels brought to [0, 1]
    assert by["Dequantize", "log_q"] == 0
    assert ("Prior", "kl") in by
    assert ("VAE", "log_p") in by


@architecture
def uniform_for_test(shape, *, bits: int | None = 8):
    """A model of uniform noise."""
    levels = 2**bits
    noise = Dequantize(StandardUniform(shape), levels)
    return Chain([noise, Rescale(1 / levels)], Prior(StandardUniform(shape)))


@pytest.mark.parametrize("bits", [8, 5, 1])
def test_uniform_noise_under_the_uniform_model_costs_its_bits_exactly(bits):
    noise = np.random.default_rng(0).integers(0, 256, (40, 3, 6, 6), dtype=np.uint8)
    found = Dataset(noise, preprocess=Preprocess(bits=bits))
    model = uniform_for_test(found.shape, bits=bits)
    assert evaluate(model, found)["bits_per_dim"] == pytest.approx(bits, abs=1e-5)
    rows = {(row["kind"], row["term"]): row["bits_per_dim"] for row in ledger(model, found)}
    assert f"{rows.pop(('Rescale', 'log_det')):.3f}" == f"{bits}.000"
    assert set(rows) == {("Dequantize", "log_q"), ("Prior", "log_p")}
    assert set(rows.values()) == {0.0}


# -- one example


def test_inspection_of_a_vae_shows_its_posterior(digits, models):
    model = models("vae")
    x = torch.from_numpy(digits.take([5]))
    report = inspect(model, x)
    (row,) = report["latents"]
    assert (row["site"], row["shape"]) == ("prior", [4])
    with torch.no_grad():
        q = model.encoder(x.float())
        evidence = model(x)
    mean, std, variance, log_std, kl = (
        torch.tensor(row[n]) for n in ("mean", "std", "variance", "log_std", "kl")
    )
    assert torch.equal(mean, q.mean[0])
    torch.testing.assert_close(std, q.stddev[0])
    torch.testing.assert_close(variance, std**2)
    torch.testing.assert_close(log_std, std.log())
    torch.testing.assert_close(kl, 0.5 * (mean**2 + variance - 1) - log_std)
    assert row["kl_total"] == pytest.approx(float(kl.sum()))
    assert row["kl_total"] == pytest.approx(float(evidence.kl))
    assert row["active"] == [v > 0.01 for v in row["kl"]]
    assert report["bound"] == "elbo"
    assert report["bits_per_dim"] == pytest.approx(report["nats"] / (64 * math.log(2)))


def test_a_latent_that_the_encoder_ignores_is_inactive(digits, models):
    model = models("vae")
    last = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 0, 0, 0, 0, 0, -1, 0]))  # four means, four log_std
    (row,) = inspect(model, torch.from_numpy(digits.take([0])))["latents"]
    assert row["active"] == [True, False, True, False]
    assert (row["mean"][1], row["std"][1], row["kl"][1]) == (0.0, 1.0, 0.0)


def test_inspection_of_a_vae_with_a_flow_prior_shows_both_sides(digits, models):
    model = models("vae flow prior")
    x = torch.from_numpy(digits.take([5]))
    posterior, noise = inspect(model, x)["latents"]
    with torch.no_grad():
        q = model.encoder(x.float())
    assert posterior["mean"] == q.mean[0].tolist()
    assert posterior["variance"] == pytest.approx((q.stddev[0] ** 2).tolist())
    assert "kl" not in posterior
    assert set(noise["noise"]) == {"mean", "std", "min", "max"}


def test_inspection_of_a_ladder_has_every_latent_from_the_top(digits, models):
    model = models("ladder")
    torch.manual_seed(0)
    report = inspect(model, torch.from_numpy(digits.take([5])))
    torch.manual_seed(0)
    with torch.no_grad():
        evidence = model(torch.from_numpy(digits.take([5])))
    assert [row["site"] for row in report["latents"]] == ["blocks.0", "blocks.1", "blocks.2"]
    totals = [row["kl_total"] for row in report["latents"]]
    assert totals == pytest.approx(evidence.kl[0].tolist(), rel=1e-4)
    assert report["nats"] == pytest.approx(-float(evidence.elbo), rel=1e-5)
    for row in report["latents"]:
        assert np.shape(row["mean"]) == np.shape(row["kl"]) == tuple(row["shape"])
        assert np.sum(row["kl"]) == pytest.approx(row["kl_total"], rel=1e-4)
        np.testing.assert_allclose(np.square(row["std"]), row["variance"], rtol=1e-4)


def test_inspection_of_a_flow_shows_the_priors_of_its_splits(digits, models):
    model = models("glow learned")
    x = torch.from_numpy(digits.take([5]))
    torch.manual_seed(0)
    report = inspect(model, x)
    torch.manual_seed(0)
    with torch.no_grad():
        evidence = model(x)
        torch.manual_seed(0)
        white = model.encode(x, whiten=True)
        torch.manual_seed(0)
        plain = model.encode(x)
    rows = {row["site"]: row for row in report["latents"]}
    names = {module: name for name, module in model.named_modules()}
    assert set(rows) == {names[site] for site in model.latents()}
    for i, site in enumerate(model.latents()):
        row = rows[names[site]]
        assert row["nats"] == pytest.approx(float(evidence.kl[0, i]), rel=1e-4)
        assert row["shape"] == list(plain[i].shape[1:])
        for name, z in (("value", plain[i]), ("noise", white[i])):
            assert row[name]["mean"] == pytest.approx(float(z.mean()), abs=1e-4)
            assert row[name]["std"] == pytest.approx(float(z.std(correction=0)), rel=1e-4)
            assert row[name]["min"] == pytest.approx(float(z.min()), abs=1e-4)
            assert row[name]["max"] == pytest.approx(float(z.max()), abs=1e-4)
    assert sum(row["nats"] for row in rows.values()) == pytest.approx(
        float(evidence.kl.sum()), rel=1e-4
    )


def test_inspection_accepts_only_one_example(digits, models):
    with pytest.raises(ValueError, match="expected one example"):
        inspect(models("vae"), torch.from_numpy(digits.take([1, 2])))


def test_inspection_works_for_any_distribution(digits):
    """Posteriors and priors of torch's own types, with and without a closed form of the KL."""

    class Head(nn.Module):
        def __init__(self, kind, scale):
            super().__init__()
            self.kind, self.scale = kind, scale

        def forward(self, given=None, context=None):
            loc = torch.zeros(1, 3) if given is None else given.flatten(1)[:, :3] / 256
            return Independent(self.kind(loc, torch.full_like(loc, self.scale)), 1)

    decoder = likelihood("logistic", (1, 8, 8), lambda c: Decoder(c))
    x = torch.from_numpy(digits.take([5])).float()
    for q, p, closed in (
        (Normal, Normal, True),
        (partial(StudentT, 4.0), Normal, False),
        (Laplace, Laplace, True),
    ):
        model = VAE(Head(q, 0.5), decoder, Prior(Head(p, 2.0))).eval()
        torch.manual_seed(0)
        report = inspect(model, x)
        (row,) = report["latents"]
        torch.manual_seed(0)
        with torch.no_grad():
            evidence = model(x)
        posterior = model.encoder(x).base_dist
        assert row["mean"] == posterior.mean[0].tolist()
        assert row["log_std"] == pytest.approx(posterior.stddev.log()[0].tolist())
        assert row["kl_total"] == pytest.approx(float(evidence.kl), rel=1e-5)
        assert ("kl" in row) is closed
        if closed:
            prior = p(torch.zeros(1, 3), 2.0)
            expected = torch.distributions.kl_divergence(posterior, prior)[0].tolist()
            assert row["kl"] == pytest.approx(expected)


class Decoder(nn.Module):
    """Three latents to an image, with `channels` channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(3, channels * 64)

    def forward(self, z):
        return self.linear(z).reshape(len(z), -1, 8, 8)


def test_inspection_of_a_flow_over_another_distribution_shows_its_cost():
    flow = Chain([Rescale(2.0)], Prior(StandardUniform((3,))))
    (row,) = inspect(flow, torch.full((1, 3), 0.25))["latents"]
    assert (row["nats"], row["value"]["mean"]) == (0.0, 0.5)
    assert "noise" not in row


# -- scales at their limit


@pytest.mark.parametrize("name", ["vae", "glow learned", "ladder"])
def test_saturation_is_the_share_of_scales_at_their_limit(digits, models, name):
    model = models(name)
    x = torch.from_numpy(digits.take(range(20)))
    before = [len(m._forward_hooks) for m in model.modules()]
    shares = saturation(model, x)
    assert shares
    assert all(0 <= share <= 1 for share in shares.values())
    assert [len(m._forward_hooks) for m in model.modules()] == before
    assert set(shares) <= {n for n, _ in model.named_modules()}


def test_saturation_finds_a_scale_at_its_limit(digits, models):
    model = models("vae")
    x = torch.from_numpy(digits.take(range(20)))
    assert saturation(model, x)["encoder"] == 0
    last = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[4] = 1e4  # log_std of the first of four latents
    assert saturation(model, x)["encoder"] == pytest.approx(0.25)


ZOO = {
    "vae": {"width": 4, "latents": 2},
    "vae optimal": {"width": 4, "latents": 2, "likelihood": "gaussian", "std": "optimal"},
    "vae flow": {"width": 4, "latents": 2, "prior": "flow", "prior_depth": 1},
    "mlp_vae": {"latents": 2, "hidden": 8},
    "ladder": {"levels": 2, "latents": 2, "width": 4},
    "realnvp": {"levels": 1, "depth": 1, "hidden": 4},
    "maf": {"depth": 1, "hidden": 4},
    "nsf": {"depth": 1, "hidden": 4},
    "glow": {"levels": 2, "depth": 1, "hidden": 4},
    "glow conditional": {"levels": 2, "depth": 1, "hidden": 4},
}


@pytest.mark.parametrize("name", ZOO)
def test_saturation_examines_every_part_of_the_zoo(digits, name):
    table = name in ("maf", "nsf")
    points = Dataset(np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32))
    data = points if table else digits
    spec = data.spec(["label"]) if "conditional" in name else data.spec([])
    model = build(name.split()[0], spec, **ZOO[name])
    x, context = batch(data, np.arange(8), model)
    shares = saturation(model.eval(), x, context)
    assert [name for name, share in shares.items() if share is None] == []
    assert shares or name in ("nsf", "vae optimal")


class Halving(Bijection):
    """A layer that holds a network and has no `emitters`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, x, context=None):
        shift, log_scale = self.net(x[:, :1]).chunk(2, 1)
        y = torch.cat([x[:, :1], (x[:, 1:] + shift) * log_scale.exp()], 1)
        return y, log_scale.sum(1)

    def inverse(self, y, context=None):
        shift, log_scale = self.net(y[:, :1]).chunk(2, 1)
        x = torch.cat([y[:, :1], y[:, 1:] * (-log_scale).exp() - shift], 1)
        return x, -log_scale.sum(1)


class StatedHalving(Halving):
    """The same, with its scales, of which one outside [-1, 1] counts as saturated."""

    def emitters(self):
        yield self.net, lambda h: (h[:, 1:].abs() > 1).float().mean()


class UnusedNetwork(StatedHalving):
    """Its network is not run by `forward`."""

    def forward(self, x, context=None):
        return x, x.new_zeros(len(x))


class Block(Layer):
    """A layer made of layers."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.ModuleList(layers)

    def infer(self, x, trace, context=None):
        for layer in self.inner:
            x = layer.infer(x, trace, context)
        return x

    def generate(self, z, trace, context=None):
        for layer in reversed(self.inner):
            z = layer.generate(z, trace, context)
        return z


class Head(nn.Module):
    """A prior that holds a network and has no `emitters`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, context=None):
        mean, log_std = self.net(torch.ones(1, 1))[0].expand(2, 2)
        return DiagonalGaussian(mean, log_std, 1)


def test_parts_without_emitters_are_listed_as_not_examined():
    torch.manual_seed(0)
    x = torch.randn(6, 2)
    model = Chain([Halving(), StatedHalving()], Prior(Head()))
    with torch.no_grad():
        model.layers[1].net.bias[1] = 9.0
    expected = {"layers.0": None, "layers.1": 1.0, "prior.head": None}
    assert saturation(model, x) == expected
    nested = Chain([Block(Halving(), StatedHalving())], Prior(StandardNormal((2,))))
    shares = saturation(nested, x)
    assert shares["layers.0.inner.0"] is None  # and not the block that contains it
    assert set(shares) == {"layers.0.inner.0", "layers.0.inner.1"}
    unused = Chain([UnusedNetwork()], Prior(StandardNormal((2,))))
    assert saturation(unused, x) == {"layers.0": None}
    layers = [ActNorm(2), InvertibleConv(2), Rescale(2.0), Classifier(2, 3)]
    plain = Chain(layers, Prior(StandardNormal((2,))))
    assert saturation(plain, x) == {}  # no network emits a scale


def test_condition_numbers_come_from_the_layers():
    torch.manual_seed(0)
    mixing = InvertibleConv(3, lu=False)
    with torch.no_grad():
        mixing.weight.copy_(torch.diag(torch.tensor([1e3, 1.0, 1e-2])))

    class Stretch(Rescale):
        def condition_number(self):
            return 7.0

    model = Chain([mixing, ActNorm(3), Stretch(2.0)], Prior(StandardNormal((3,))))
    numbers = conditioning(model)
    assert numbers == {"layers.0": pytest.approx(1e5), "layers.2": 7.0}


# -- data that do not fit


GRAY = np.zeros((4, 1, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("array", "bits", "message"),
    [
        (np.zeros((4, 3, 8, 8), np.uint8), 8, "for gray images, and these are color"),
        (np.zeros((4, 2, 8, 8), np.uint8), 8, "for gray images, and these are 2-channel"),
        (np.zeros((4, 1, 16, 16), np.uint8), 8, "--size 8 resizes the images"),
        (np.zeros((4, 64), np.float32), None, r"shape \(1, 8, 8\), and these data have \(64,\)"),
        (GRAY, 5, "takes 8-bit levels, and these data hold 5-bit levels"),
    ],
)
def test_data_of_another_kind_are_refused(models, array, bits, message):
    preprocess = Preprocess() if bits is None else Preprocess(bits=bits)
    found = Dataset(array, preprocess=preprocess)
    for use in (check, evaluate, score, ledger):
        with pytest.raises(ValueError, match=rf"\Adata: [^\n]*{message}[^\n]*\Z"):
            use(models("vae"), found)


def test_continuous_models_refuse_levels_and_discrete_models_continuous_values():
    table = Dataset(np.zeros((4, 3), np.float32), name="points")
    with pytest.raises(ValueError, match="takes 8-bit levels, and points hold continuous values"):
        check(build("vae", (3,), width=4), table)
    flow = build("realnvp", (1, 8, 8), bits=None, levels=1, depth=1, hidden=4)
    with pytest.raises(ValueError, match="takes continuous values, and these data hold 8-bit"):
        check(flow, Dataset(GRAY))


@pytest.mark.parametrize("labels", [None, 3])
def test_a_conditional_model_requires_its_classes(models, labels):
    has = {"labels": np.arange(4) % 3, "label_names": ("a", "b", "c")} if labels else {}
    message = (
        "these data have classes unknown to the model: a, b, c"
        if labels
        else "conditioned on 10 classes of 'label', and these data come with nothing"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check(models("glow conditional"), Dataset(GRAY, **has))


def test_a_model_without_a_spec_accepts_any_data():
    model = Chain([Rescale(2.0)], Prior(StandardNormal((3,))))
    points = Dataset(np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32))
    p = DiagonalGaussian(torch.zeros(3), torch.full((3,), -math.log(2)), 1)
    expected = -p.log_prob(torch.from_numpy(points.x)).mean()
    assert evaluate(model, points)["nats"] == pytest.approx(float(expected), rel=1e-5)
