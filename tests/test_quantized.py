"""VQ-VAE, residual quantization and finite scalars, with an autoregressive prior of the codes."""

import json
import math

import numpy as np
import pytest
import torch

from musigma import Dataset, Preprocess, TrainConfig, build, fit
from musigma.audit import audit_model
from musigma.coding.codec import Codec
from musigma.nets import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer
from musigma.testing import check_model, randomized
from musigma.trace import Trace
from tests.families import ring

QUANTIZERS = ["vq classes=8", "residual classes=4 depth=2", "fsq levels=3,4"]
SMALL = {"latents": 3, "width": 8, "blocks": 1, "prior_width": 8, "prior_heads": 2}
SMALL |= {"prior_blocks": 1}


def bars(n, seed=0):
    """Binary images 8x8 of two bars."""
    random = np.random.default_rng(seed)
    x = np.zeros((n, 1, 8, 8), np.uint8)
    x[np.arange(n), 0, random.integers(0, 8, n)] = 255
    x[np.arange(n), 0, :, random.integers(0, 8, n)] = 255
    return x


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_vectors_obey_the_laws(quantizer, context):
    torch.manual_seed(0)
    options = {"bits": None, "quantizer": quantizer, "positions": 3, "context": context}
    check_model(build("vqvae", (5,), **options, **SMALL), (5,), context=context)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_images_obey_the_laws_and_pass_the_audit(quantizer):
    torch.manual_seed(0)
    model = build("vqvae", (1, 6, 5), bits=2, quantizer=quantizer, halvings=1, **SMALL)
    check_model(model, (1, 6, 5), bits=2)
    report = audit_model(model)
    assert report.verdict == "correct", report


def test_the_bound_is_below_the_sum_over_all_codes():
    torch.manual_seed(0)
    model = build("vqvae", (2,), bits=None, quantizer="vq classes=3", positions=2, **SMALL)
    model, x = randomized(model), torch.randn(4, 2).double()
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    prior = model._codes(None)
    with torch.no_grad():
        assert abs(float(prior.log_prob(codes).logsumexp(0))) < 1e-9
        each = torch.stack(
            [
                model._decoded(c.expand(4, 2), None).log_prob(x) + prior.log_prob(c[None])
                for c in codes
            ]
        )
        bound, chosen = model.elbo(x), model.encode(x)[0]
        assert (bound < each.logsumexp(0)).all()
        index = (chosen * torch.tensor([3.0, 1.0])).sum(1).long()
        torch.testing.assert_close(bound, each[index, torch.arange(4)])


def test_draws_follow_the_prior():
    torch.manual_seed(0)
    model = build("vqvae", (2,), bits=None, quantizer="vq classes=3", positions=2, **SMALL)
    prior = randomized(model)._codes(None)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(3)).double()
    drawn = prior.sample((20_000,))
    share = torch.bincount((drawn @ torch.tensor([3.0, 1.0]).double()).long(), minlength=9) / 2e4
    expected = prior.log_prob(codes).detach().exp()
    assert (share - expected).abs().max() < 5 * math.sqrt(0.25 / 2e4)
    greedy = prior.mode
    first = prior.log_prob(codes).detach().exp().reshape(3, 3).sum(1).argmax()
    assert greedy[0] == first


def test_running_means_are_those_of_the_paper():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(2, 3, decay=0.9).double().train()
    counts, sums = quantizer.counts.clone(), quantizer.sums.clone()
    e = torch.randn(4, 2, 6).double()
    codes = quantizer(e).codes.long()
    quantizer.after_step()
    for k in range(3):
        mine = e.mT[codes == k]
        counts[k] = 0.9 * counts[k] + 0.1 * len(mine)
        sums[k] = 0.9 * sums[k] + 0.1 * mine.sum(0)
    torch.testing.assert_close(quantizer.counts, counts)
    torch.testing.assert_close(quantizer.book, sums / counts[:, None])
    found = quantizer(e)
    distances = (e.mT[:, :, None] - quantizer.book).square().sum(-1)
    assert torch.equal(found.codes.long(), distances.argmin(-1))
    torch.testing.assert_close(found.cost, 0.25 * distances.min(-1).values.sum(1))


def test_the_commitment_of_an_example_does_not_depend_on_the_batch():
    quantizer, e = ResidualQuantizer(2, 4, depth=2), torch.randn(6, 2, 5)
    whole = quantizer(e)
    torch.testing.assert_close(whole.cost[:2], quantizer(e[:2]).cost)
    first = quantizer.stages[0].vectors(whole.codes[:, :5])
    rest = [(e - v).square().sum((1, 2)) for v in (first, quantizer.vectors(whole.codes))]
    torch.testing.assert_close(whole.cost, 0.25 * sum(rest))


def test_dead_codes_are_replaced():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(2, 8).train()
    quantizer.sums[4:] += 100.0  # far from everything
    before = quantizer.figures()["perplexity"]
    for _ in range(300):
        quantizer(torch.randn(16, 2, 4))
        quantizer.after_step()
    figures = quantizer.figures()
    assert figures["replaced"] >= 4
    assert quantizer.book.abs().max() < 10
    assert figures["perplexity"] > 6
    assert before == pytest.approx(8)


def test_finite_scalars_reach_every_level_and_invert():
    quantizer = FiniteScalarQuantizer([2, 3, 8, 5])
    assert quantizer.classes == 240
    codes = torch.arange(240.0)[None]
    vectors = quantizer.vectors(codes)
    assert torch.equal(quantizer.nearest(vectors).float(), codes)
    e = torch.linspace(-9, 9, 4001).expand(1, 4, -1)
    found = quantizer(e)
    levels = quantizer.vectors(found.codes)
    assert [len(levels[0, d].unique()) for d in range(4)] == [2, 3, 8, 5]
    assert (levels - found.features).abs().max() <= 0.5 / 1 + 1e-3
    assert (levels[..., 1:] >= levels[..., :-1]).all()


def test_gradients_pass_straight_through():
    torch.manual_seed(0)
    model = build("vqvae", (3,), bits=None, quantizer="vq classes=4", positions=2, **SMALL)
    x = torch.randn(5, 3)
    evidence = model(x)
    trained = dict(model.encoder.named_parameters())
    grads = torch.autograd.grad(evidence.log_px.sum(), trained.values(), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in grads)
    none = torch.autograd.grad(evidence.kl.sum(), trained.values(), allow_unused=True)
    assert all(g is None for g in none)  # the prior has no influence on the encoder


@pytest.mark.parametrize(
    ("quantizer", "below"),
    [
        ("vq classes=32 decay=0.9", 3.45),
        ("residual classes=8 depth=2 decay=0.9", 3.8),
        ("fsq levels=8,8", 3.45),
    ],
)
@pytest.mark.slow
def test_training_on_a_ring(quantizer, below, tmp_path):
    torch.manual_seed(0)
    options = {"latents": 4, "width": 64, "blocks": 2, "positions": 1}
    options |= {"prior_width": 32, "prior_heads": 2, "prior_blocks": 1}
    model = build("vqvae", (2,), bits=None, quantizer=quantizer, **options)
    data = Dataset(ring(4096))
    config = TrainConfig(steps=500, batch_size=128, lr=5e-3, ema=0.98, evaluations=1)
    run = fit(model, data, Dataset(ring(512, seed=1)), config, tmp_path)
    with torch.no_grad():
        nats = float(-run.model.elbo(torch.from_numpy(ring(1000, seed=2))).mean())
    assert nats < below  # a Gaussian has 3.54; residual codes are random at first, and cost more
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    figures = next(row.get("figures", {}) for row in rows if row["kind"] == "evaluation")
    perplexities = [value for name, value in figures.items() if name.endswith("perplexity")]
    assert len(perplexities) == {"vq": 1, "residual": 2, "fsq": 0}[quantizer.split()[0]]
    assert all(value > 5 for value in perplexities)


def test_a_run_resumes_in_the_same_bytes(tmp_path):
    def run(folder, stops):
        torch.manual_seed(0)
        model = build("vqvae", (2,), bits=None, quantizer="vq classes=8", positions=2, **SMALL)
        data, config = Dataset(ring(256)), TrainConfig(steps=12, batch_size=32)
        for stop in stops:
            fit(model, data, data, config, folder, resume=stop[0], stop=stop[1])
        return (folder / "last.safetensors").read_bytes()

    whole = run(tmp_path / "a", [(False, None)])
    halves = run(tmp_path / "b", [(False, lambda step: step == 5), (True, None)])
    assert whole == halves


@pytest.mark.slow
def test_training_on_images(tmp_path):
    torch.manual_seed(0)
    options = {"latents": 8, "width": 24, "prior_width": 32, "prior_blocks": 1, "blocks": 1}
    model = build("vqvae", (1, 8, 8), bits=1, quantizer="fsq", halvings=1, **options)
    data = Dataset(bars(1024), preprocess=Preprocess(binarize="threshold"))
    config = TrainConfig(steps=500, batch_size=32, lr=3e-3, ema=0.98, evaluations=1)
    run = fit(model, data, data.subset(range(128)), config, tmp_path)
    new = Dataset(bars(512, seed=1), preprocess=Preprocess(binarize="threshold"))
    with torch.no_grad():
        nats = float(-run.model.elbo(torch.from_numpy(new.x).float()).mean())
    assert nats < 25.0  # the truth is 2 log 8 = 4.2; independent pixels have 34.9


def test_interpolation_ends_at_the_codes():
    torch.manual_seed(0)
    model = build("vqvae", (1, 6, 6), bits=2, quantizer=QUANTIZERS[1], halvings=1, **SMALL)
    x = torch.randint(0, 4, (3, 1, 6, 6)).float()
    path = model.interpolate(x, x.flip(0), 5)
    torch.testing.assert_close(path[:, 0], model.reconstruct(x))
    trace = Trace()
    model.infer(x, trace)
    assert trace.values[model.prior].shape == (3, 2 * 9)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("context", [0, 2])
def test_codes_are_coded_at_their_own_rate(quantizer, context):
    pytest.importorskip("constriction")
    torch.manual_seed(0)
    options = {"bits": 2, "quantizer": quantizer, "halvings": 1, "context": context}
    model = randomized(build("vqvae", (1, 6, 5), **options, **SMALL)).float()
    x = np.random.default_rng(0).integers(0, 4, (48, 1, 6, 5)).astype(np.uint8)
    given = torch.randn(48, 2) if context else None
    for arithmetic in ("exact", "pinned"):
        codec = Codec(model, numerics=arithmetic, latents=[])
        coded = codec.pack(x, given, b"")
        assert (codec.unpack(coded, (1, 6, 5), given, b"") == x).all()
        with torch.no_grad():
            nats = -float(model.elbo(torch.from_numpy(x).float(), given).sum())
        assert coded.bits == pytest.approx(nats / math.log(2), rel=0.01)
