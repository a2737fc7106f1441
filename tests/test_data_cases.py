"""Inputs that people had trouble with elsewhere: each is read right, or refused with its cause."""

import numpy as np
import pytest
import torch

from musigma import build
from musigma.data import Dataset
from musigma.evaluation import evaluate
from musigma.layers import Standardize, standardize
from musigma.training import TrainConfig, fit
from test_data import fails

RNG = np.random.default_rng(5)


# Tables have units -------------------------------------------------------------------------------

ARCHITECTURES = {
    "maf": {"hidden": 16, "depth": 2},
    "nsf": {"hidden": 16, "depth": 2},
    "realnvp": {"depth": 2},
    "vae": {"latents": 2, "width": 16},
    "mlp_vae": {"latents": 2, "hidden": 16},
}


def everyday() -> tuple[np.ndarray, np.ndarray]:
    """A table in years, euros, a ratio, grams and calendar years; and its columns' std."""
    z = np.random.default_rng(0).normal(size=(600, 5))
    z[:, 1] += 0.8 * z[:, 0]
    scale = np.array([12, 9000, 2e-4, 8e3, 8])
    x = np.array([45, 30000, 1e-3, 7e4, 2005]) + scale * z
    return x, x.std(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_units_change_the_nats_by_their_logarithms_alone(name, tmp_path):
    x, std = everyday()
    nats = []
    for i, table in enumerate((x, (x - x.mean(0)) / std)):
        data = Dataset(table.astype(np.float32))
        torch.manual_seed(0)
        model = build(name, data.spec(), standardize=True, **ARCHITECTURES[name])
        parts = data.subset(range(500)), data.subset(range(500, 600))
        run = fit(model, *parts, TrainConfig(steps=15), tmp_path / str(i))
        nats.append(evaluate(run.model, data)["nats"])
    assert nats[0] - nats[1] == pytest.approx(np.log(std).sum(), abs=2e-3)


def test_moments_are_those_of_all_rows_whatever_the_blocks():
    x = (RNG.normal(size=(10_000, 600)) * np.geomspace(1e-3, 1e5, 600) + 1e3).astype(np.float32)
    data = Dataset(x).subset(np.arange(10_000) % 3 > 0)
    mean, std = data.moments()
    wide = data.x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, wide.std(0), rtol=1e-9)
    with fails("holds images, which have no columns"):
        Dataset(np.zeros((2, 1, 2, 2), np.uint8)).moments()


def test_a_column_that_is_constant_where_a_model_trains_is_refused():
    x = RNG.normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = 5
    x[40:, 1] = 6
    data = Dataset(x, name="x.csv", columns=("a", "b", "c"))
    assert (data.moments()[1] > 0).all()
    with fails("x.csv: column 'b' is constant in the 40 rows to train on"):
        data.subset(range(40)).moments()


def test_models_are_standardized_by_all_of_the_training_data(tmp_path):
    x = RNG.normal(5, 3, size=(2000, 2)).astype(np.float32)
    x[:512] += 10  # a first batch that is not like the rest
    data = Dataset(x)
    model = build("nsf", data.spec(), depth=1, hidden=8, standardize=True)
    fit(model, data, data.split("validation"), TrainConfig(steps=1), tmp_path)
    (layer,) = (m for m in model.modules() if isinstance(m, Standardize))
    np.testing.assert_allclose(layer.mean, x.astype(float).mean(0), rtol=1e-6)
    np.testing.assert_allclose(layer.std, x.astype(float).std(0), rtol=1e-6)


def test_standardization_is_set_once_and_only_where_data_enter():
    model = build("maf", (2,), bits=None, depth=1, hidden=8, standardize=True)
    assert standardize(model, [1.0, 2.0], [3.0, 4.0])
    assert not standardize(model, [0.0, 0.0], [1.0, 1.0])
    model.calibrate(torch.randn(64, 2))
    layer = next(m for m in model.modules() if isinstance(m, Standardize))
    assert (layer.mean.tolist(), layer.std.tolist()) == ([1, 2], [3, 4])
    assert not standardize(build("maf", (2,), bits=None, depth=1), [0.0, 0.0], [1.0, 1.0])
    for mean, std, message in (
        ([0.0], [1.0], "expected shape"),
        ([0.0, 0.0], [1.0, 0.0], r"features \[1\]"),
        ([0.0, np.inf], [1.0, np.nan], r"features \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Standardize(2).set(mean, std)
    for shape, bits in (((1, 8, 8), None), ((3,), 8)):
        with pytest.raises(ValueError, match="standardize: expected continuous vectors"):
            build("realnvp", shape, bits=bits, standardize=True)


def test_an_option_of_its_own_changes_no_older_model():
    assert "standardize" not in build("vae", (1, 8, 8), latents=2, width=4).config["options"]
    plain = build("nsf", (2,), bits=None, depth=1, standardize=True).config["options"]
    assert plain["standardize"] is True
