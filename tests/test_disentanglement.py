"""Metrics of disentanglement where the answer is known, and the data with known factors."""

import math

import numpy as np
import pytest
import torch

import musigma
from musigma import Dataset, TrainConfig, build, fit
from musigma.data import Given
from musigma.evaluation import (
    dci,
    disentanglement,
    factor_score,
    mig,
    modularity,
    mutual_information,
    sap,
)


def grid(*levels, copies=8):
    """Every combination of the values of factors, several times, in random order (N, K)."""
    values = np.stack(np.meshgrid(*map(np.arange, levels), indexing="ij"), -1)
    rows = np.tile(values.reshape(-1, len(levels)), (copies, 1)).astype(np.float64)
    return np.random.default_rng(0).permutation(rows)


V = grid(4, 5, 6)
FACTORS = dict(zip("abc", V.T, strict=True))
CLASSES = {name: values.astype(np.int64) for name, values in FACTORS.items()}
HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2


def test_a_perfect_code():
    """One dimension for each factor, in another order and scale, and two dimensions of noise."""
    noise = np.random.default_rng(1).normal(size=(len(V), 1))
    code = np.concatenate([-3 * V[:, [2]], V[:, [0]] + 7, noise, V[:, [1]] / 5], 1)
    assert mig(code[:, [0, 1, 3]], FACTORS) == pytest.approx(1, abs=1e-9)
    bias = 19 * 4 / (2 * len(V)) / math.log(5)  # of the histogram of noise, relative to an entropy
    assert mig(code, FACTORS) == pytest.approx(1, abs=1.3 * bias)
    assert sap(code, FACTORS) == pytest.approx(1, abs=0.02)
    chance = (1 / 4 + 1 / 5 + 1 / 6) / 3
    assert sap(code, CLASSES) == pytest.approx(1 - chance, abs=0.06)
    found = dci(code, FACTORS)
    assert min(found.values()) > 0.98
    assert factor_score(code, FACTORS, votes=200) == 1
    assert modularity(code[:, [0, 1, 3]], FACTORS) == pytest.approx(1, abs=1e-9)


def test_a_rotated_code():
    """All dimensions know equally much of each of four factors with the same values."""
    v = grid(3, 3, 3, 3, copies=10)
    factors = dict(zip("abcd", v.T, strict=True))
    code = (v - 1) @ HADAMARD
    assert mig(code, factors) == pytest.approx(0, abs=1e-9)
    assert sap(code, factors) == pytest.approx(0, abs=1e-9)
    assert modularity(code, factors) == pytest.approx(0, abs=1e-9)
    found = dci(code, factors)
    assert found["disentanglement"] < 0.1
    assert found["completeness"] < 0.1
    assert found["informativeness"] > 0.95
    assert factor_score(code, factors, votes=300) < 0.45


def test_a_random_code():
    code = np.random.default_rng(2).normal(size=(len(V), 5))
    assert mig(code, FACTORS) < 0.02
    assert sap(code, FACTORS) < 0.02
    assert sap(code, CLASSES) < 0.06
    assert dci(code, FACTORS)["informativeness"] == pytest.approx(0.2, abs=0.08)
    assert factor_score(code, FACTORS, votes=300) == pytest.approx(1 / 3, abs=0.1)


def test_a_code_that_has_each_factor_twice():
    """It is modular, but not complete."""
    code = np.concatenate([V, V**2], 1)
    assert mig(code, FACTORS) == pytest.approx(0, abs=0.05)
    assert modularity(code, FACTORS) == pytest.approx(1, abs=1e-9)
    assert dci(code, FACTORS)["disentanglement"] > 0.98
    assert factor_score(code, FACTORS, votes=200) == 1


def test_mutual_information_of_known_tables():
    x = np.repeat([0.0, 0.0, 1.0, 1.0], [30, 20, 10, 40])
    y = np.repeat([0, 1, 0, 1], [30, 20, 10, 40])
    p = np.array([[0.3, 0.2], [0.1, 0.4]])
    product = p.sum(1, keepdims=True) * p.sum(0)
    found = mutual_information(x[:, None], {"y": y})
    assert found[0, 0] == pytest.approx((p * np.log(p / product)).sum(), abs=1e-12)
    constant = np.zeros((100, 1))
    assert mutual_information(constant, {"y": y})[0, 0] == 0


def test_known_values_of_the_gap_and_of_modularity():
    """A dimension that knows a and b, and one that knows b."""
    v = grid(2, 2, copies=50)
    factors = {"a": v[:, 0], "b": v[:, 1]}
    code = np.stack([2 * v[:, 0] + v[:, 1], v[:, 1]], 1)
    assert mig(code, factors) == pytest.approx((1 + 0) / 2, abs=1e-9)
    assert modularity(code, factors) == pytest.approx((0 + 1) / 2, abs=1e-9)


def test_faults():
    with pytest.raises(ValueError, match=r"codes: expected an array \(N, D\), and factors"):
        mig(V[:, 0], FACTORS)
    with pytest.raises(ValueError, match="expected one value for each of 5 codes; 'a' has shape"):
        mig(V[:5], FACTORS)
    with pytest.raises(ValueError, match="'a' has one value; leave it out"):
        sap(V, {"a": np.zeros(len(V))})
    with pytest.raises(ValueError, match="modularity compares several"):
        modularity(V, {"a": V[:, 0]})


def test_shapes_are_all_combinations_of_their_factors():
    data = musigma.data.load("shapes")
    assert (len(data), data.shape, data.bits) == (6144, (1, 32, 32), 8)
    values = np.stack([given.values for given in data.given.values()], 1)
    assert len(np.unique(values, axis=0)) == 6144
    assert [len(np.unique(column)) for column in values.T] == [3, 4, 8, 8, 8]
    x = data.take(np.arange(6144))
    assert len(np.unique(x.reshape(6144, -1), axis=0)) == 6144
    mass = x.sum((1, 2, 3), dtype=np.float64) / 255
    shape, scale, rotation, left, top = values.T
    for i, area in enumerate([math.pi / 2, 1.4**2 - 0.85 * 0.85, 0.5 * 1.6 * 1.44]):
        for radius in (5, 6, 7, 8):
            some = mass[(shape == i) & (scale == radius)]
            assert some == pytest.approx(area * radius**2, rel=0.02)
    columns = (x * np.arange(32)).sum((1, 2, 3)) / (255 * mass)
    first = (shape == 2) & (scale == 6) & (rotation == 90) & (top == 3)
    assert np.diff(columns[first][np.argsort(left[first])]) == pytest.approx(2, abs=1e-6)
    assert data.spec().context == ()


def tubes():
    """Vectors in which each of two factors moves its own half, strongly."""
    v = grid(4, 4, copies=20)
    random = np.random.default_rng(0)
    x = np.repeat(v - 1.5, 2, axis=1) + 0.05 * random.normal(size=(len(v), 4))
    given = {n: Given(v[:, i].astype(np.float32)) for i, n in enumerate("ab")}
    return Dataset(x.astype(np.float32), given=given)


def test_the_metrics_of_a_model(tmp_path):
    torch.manual_seed(0)
    data = tubes()
    model = build("vae", data.spec(), latents=3, width=16)
    config = TrainConfig(steps=100, batch_size=32, evaluations=1, lr=1e-2, warmup=5)
    run = fit(model, data, data.subset(range(100)), config, tmp_path, device="cpu")
    found = disentanglement(run.model, data, ["a", "b"])

    assert found.keys() == {
        "mig", "sap", "disentanglement", "completeness", "informativeness", "factor_score",
        "modularity", "active",
    }  # fmt: skip
    assert found["informativeness"] > 0.95
    assert found["active"] in (2, 3)
    code = torch.cat(run.model.encode(torch.from_numpy(data.x), mode=True), 1).detach().numpy()
    code = code[:, code.var(0) > 0.05]
    factors = {name: given.values for name, given in data.given.items()}
    assert found["mig"] == pytest.approx(mig(code, factors), abs=1e-6)
    with pytest.raises(ValueError, match="factors: expected factors of the data, a, b; got 'c'"):
        disentanglement(run.model, data, ["a", "c"])


def test_a_collapsed_posterior_has_no_code():
    data = tubes()
    model = build("vae", data.spec(), latents=3, width=16)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    with pytest.raises(ValueError, match="posterior collapse"):
        disentanglement(model, data)
