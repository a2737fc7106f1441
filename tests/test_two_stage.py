"""Two-stage VAEs, and regularized autoencoders."""

import json

import numpy as np
import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized

from musigma import Dataset, TrainConfig, build, cli, fit
from musigma.audit import audit_model
from musigma.testing import check_model, jacobian
from musigma.zoo.vaes.rae import PENALTIES
from tests.families import ring

FAMILIES = {
    "two_stage": {"second_width": 16, "second_blocks": 1},
    "rae": {"prior": "mixture components=3"},
}


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_obey_the_laws_and_pass_the_audit(name, context):
    torch.manual_seed(0)
    options = {"bits": None, "latents": 3, "width": 8, "context": context, **FAMILIES[name]}
    model = build(name, (5,), **options)
    check_model(model, (5,), context=context)
    if not context:
        report = audit_model(model)
        assert report.verdict == "correct", report
        check_model(build(name, (1, 8, 9), **(options | {"bits": 2})), (1, 8, 9), bits=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_second_stage_does_not_train_the_first(name):
    torch.manual_seed(0)
    model = build(name, (5,), bits=None, latents=3, width=8, **FAMILIES[name]).train()
    model.penalty = None
    evidence = model(torch.randn(6, 5))
    first = [*model.encoder.parameters(), *model.decoder.parameters()]
    second = list(model.prior.parameters())

    def used(term, parameters):
        grads = torch.autograd.grad(term.sum(), parameters, retain_graph=True, allow_unused=True)
        return [g is not None for g in grads]

    assert not any(used(evidence.auxiliary, first))
    assert all(used(evidence.auxiliary, second))
    assert not any(used(evidence.elbo, second))
    assert all(used(evidence.elbo, first))


def test_regularized_training_is_the_loss_of_the_paper():
    torch.manual_seed(0)
    model = build("rae", (5,), bits=None, latents=3, width=8, std=1.0, penalty="none").train()
    x = torch.randn(6, 5)
    evidence = model(x)
    z = model.encoder.net(x)
    error = 0.5 * (x - model.decoder(z).mean).square().sum(1)
    constant = 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(-evidence.log_px, error + 5 * constant)
    torch.testing.assert_close(evidence.kl[:, 0], 0.5 * z.square().sum(1) + 3 * constant)


def test_penalties_are_what_they_say():
    torch.manual_seed(0)
    model = build("rae", (5,), bits=None, latents=3, width=8, std=1.0)
    decoder, z = model.decoder, torch.randn(4, 3, requires_grad=True)
    p = decoder(z)
    total = sum(t.square().sum() for t in decoder.parameters())
    weighed = PENALTIES.choice("l2 weight=0.5")(decoder)(z, p)
    torch.testing.assert_close(weighed, 0.5 * total.expand(4))
    norm = jacobian(lambda z: decoder(z).mean, z).square().sum((1, 2))
    penalty = PENALTIES.choice("gradient weight=2.0")(decoder)
    draws = torch.stack([penalty(z, decoder(z)).detach() for _ in range(4000)])
    error = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - 2 * norm).abs() < 5 * error).all()
    PENALTIES.choice("spectral")(decoder)
    layers = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
    assert all(is_parametrized(layer) for layer in layers)
    for _ in range(50):
        decoder.train()(z)
    norms = [torch.linalg.matrix_norm(layer.weight.detach(), 2) for layer in layers]
    torch.testing.assert_close(torch.stack(norms), torch.ones(len(norms)), atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "below"),
    [
        ("two_stage", {}, 3.4),
        ("rae", {"noise": 0.1}, 7.0),  # its decoder has not been trained for noise
        ("rae", {"penalty": "gradient", "noise": 0.1}, 3.7),
    ],
)
@pytest.mark.slow
def test_training_on_a_ring(name, options, below, tmp_path):
    torch.manual_seed(0)
    how = {"latents": 2, "width": 64, "blocks": 2, **FAMILIES[name], **options}
    if name == "rae":
        how["prior"] = "mixture components=10"
    model = build(name, (2,), bits=None, **how)
    config = TrainConfig(steps=500, batch_size=128, lr=5e-3, ema=0.98, evaluations=1)
    run = fit(model, Dataset(ring(4096)), Dataset(ring(512, seed=1)), config, tmp_path)
    with torch.no_grad():
        nats = float(-run.model.elbo(torch.from_numpy(ring(1000, seed=2))).mean())
    assert nats < below  # a Gaussian has 3.54
    if below < 7.0:  # otherwise z is so small that the mixture has not reached it yet
        radius = run.model.sample(2000, mode=True).norm(dim=1)
        assert 1.5 < float(radius.mean()) < 2.6
    if name == "rae":
        x = torch.from_numpy(ring(1000, seed=2))
        assert float((run.model.reconstruct(x) - x).square().mean().sqrt()) < 0.05


def test_a_plain_autoencoder_by_one_command(tmp_path, capsys):
    np.savetxt(tmp_path / "ring.csv", ring(256), delimiter=",", header="a,b", comments="")
    words = ["train", "rae", str(tmp_path / "ring.csv"), "--penalty", "none", "--beta", "0"]
    words += ["--steps", "4", "--width", "8", "--latents", "1", "--device", "cpu"]
    cli.main([*words, "--out", str(tmp_path / "run")])
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["options"]["penalty"] == "none"
    cli.main(["train", "--resume", str(tmp_path / "run")])
    cli.main(["sample", str(tmp_path / "run"), "--n", "3", "--out", str(tmp_path / "s.csv")])
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 4
