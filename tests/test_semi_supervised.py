"""The semi-supervised VAE, with labels of which some are missing."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from musigma import Dataset, TrainConfig, build, cli, fit
from musigma.audit import audit_model
from musigma.data import load
from musigma.testing import check_model, randomized

SMALL = {"latents": 2, "width": 8, "context": 3}


def given(n=4):
    """One-hot rows of three classes, every other row unknown."""
    y = F.one_hot(torch.arange(n) % 3, 3).double()
    y[1::2] = 0
    return y


def blobs(n, seed=0):
    """Three clusters, and their numbers."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, n)
    centers = np.array([[2.0, 0.0, 1.0], [-2.0, 1.0, 0.0], [0.0, -2.0, -1.0]])
    return (centers[y] + 0.7 * random.normal(size=(n, 3))).astype(np.float32), y


def test_laws_and_audit():
    torch.manual_seed(0)
    model = build("m2", (5,), bits=None, **SMALL)
    check_model(model, (5,), context=given())
    report = audit_model(model)
    assert report.verdict == "correct", report
    check_model(build("m2", (1, 8, 8), bits=1, **SMALL), (1, 8, 8), bits=1, context=given())


def test_the_bound_is_the_sum_over_classes():
    torch.manual_seed(0)
    model = randomized(build("m2", (5,), bits=None, **SMALL))
    x, unknown = torch.randn(1, 5).double(), torch.zeros(1, 3).double()
    with torch.no_grad():
        model.encoder.format = model.encoder.format.parse("halves log_std bounds=-30,-29")
        classes = F.one_hot(torch.arange(3)).double()
        each = torch.cat([model(x, row[None]).elbo for row in classes])
        q = model.predict(x)[0]
        expected = (q * (each - q.log() - np.log(3))).sum()
        # q(z | x, y) is so narrow that its draws are its mean
        torch.testing.assert_close(model(x, unknown).elbo[0], expected, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_labels_are_learned_from_a_few(tmp_path):
    x, y = blobs(1024)
    some = np.where(np.arange(1024) < 30, y, -1)
    data = Dataset(x, labels=some, label_names=("a", "b", "c"))
    torch.manual_seed(0)
    model = build("m2", data.spec(["label"]), latents=2, width=32)
    config = TrainConfig(steps=500, batch_size=64, lr=3e-3, ema=0.98, evaluations=1)
    new, truth = blobs(500, seed=1)
    held = Dataset(new, labels=truth, label_names=("a", "b", "c"))
    run = fit(model, data, held, config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    accuracy = next(row["figures"]["accuracy"] for row in rows if row["kind"] == "evaluation")
    assert accuracy > 0.93
    predicted = run.model.predict(torch.from_numpy(new)).argmax(1).numpy()
    assert abs((predicted == truth).mean() - accuracy) < 1e-6
    unknown = torch.zeros(500, 3)
    with torch.no_grad():
        nats = float(-run.model.elbo(torch.from_numpy(new), unknown).mean())
    assert nats < 5.6
    drawn = run.model.sample(500, unknown)
    assert abs(float(drawn.mean()) - float(x.mean())) < 0.4
    other = build("vae", data.spec(["label"]), latents=2, width=8)
    with pytest.raises(ValueError, match=r"994 of 1,024 examples .* have no label"):
        fit(other, data, held, config, tmp_path / "other")


def test_missing_labels_are_read(tmp_path, capsys):
    x, y = blobs(120)
    known = [str(v) if i % 4 == 0 else "" for i, v in enumerate(y)]
    lines = [",".join([*map(str, row), label]) for row, label in zip(x, known, strict=True)]
    path = tmp_path / "some.csv"
    path.write_text("\n".join(["a,b,c,label", *lines]))
    data = load(path, unlabeled=True)
    assert data.labels.tolist() == [int(v) if v else -1 for v in known]
    np.savez(tmp_path / "some.npz", x=x, y=np.where(np.arange(120) % 4, -1, y))
    assert load(tmp_path / "some.npz", unlabeled=True).labels.tolist() == data.labels.tolist()
    words = ["train", "m2", str(path), "--given", "label", "--steps", "3", "--width", "8"]
    cli.main([*words, "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert "90 without a label" in "".join(capsys.readouterr())
    cli.main(["evaluate", str(tmp_path / "run"), str(path), "--json"])
    assert 0 <= json.loads(capsys.readouterr().out)["figures"]["accuracy"] <= 1
    cli.main(["train", "--resume", str(tmp_path / "run")])
