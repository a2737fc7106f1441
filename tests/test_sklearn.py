"""Estimators of scikit-learn: its checks, closed forms, frames, storage, and promised rates."""

import io
import pickle
import signal
import tempfile
import warnings

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from musigma import CheckpointError, anomaly
from musigma.schema import Column, Schema
from musigma.sklearn import FlowDensity, Imputer, OutlierDetector, Synthesizer, VAETransformer

TINY = {
    "steps": 1,
    "options": {"hidden": 8, "blocks": 1, "embedding": 4, "subsets": 1},
    "training": {"evaluations": 1},
}
SMALL = {"steps": 20, "options": {"hidden": 16, "blocks": 1}, "random_state": 0}
LEARNED = {
    "steps": 150,
    "options": {"hidden": 64, "blocks": 1},
    "training": {"lr": 1e-2, "warmup": 20, "ema": 0.98, "evaluations": 2},
    "random_state": 0,
}

FLOW = {"kind": "autoregressive", "depth": 1, "hidden": 8, "hidden_layers": 1}

ESTIMATORS = {
    "density": FlowDensity(**TINY),
    "outliers": OutlierDetector(fpr=0.3, holdout=0.4, **TINY),
    "imputer": Imputer(n_draws=2, **TINY),
    "synthesizer": Synthesizer(**TINY),
    "latents": VAETransformer(**TINY | {"options": {"width": 8}}),
    "flow": FlowDensity("nsf", **TINY | {"options": FLOW}),
}
SKIPPED = {"check_array_api_input": "is for estimators of arrays of other libraries than NumPy"}
EXPECTED = {
    "flow": {
        "check_positive_only_tag_during_fit": "many of its rows share values, of which a flow has "
        "no exact density: it says so, and `table` has one"
    }
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_checks_of_scikit_learn_pass(name):
    expected = EXPECTED.get(name, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            ESTIMATORS[name], expected_failed_checks=expected, on_skip=None, on_fail=None
        )
    odd = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert odd.keys() == SKIPPED.keys() | expected.keys(), odd
    assert len(results) >= 40


def gaussian(n, seed=0):
    """Correlated rows in units of their own, and their exact density."""
    scale = np.diag([1.0, 20.0, 0.3])
    covariance = scale @ [[1, 0.95, -0.6], [0.95, 1, -0.6], [-0.6, -0.6, 1]] @ scale
    law = stats.multivariate_normal([5, -100, 0.0], covariance)
    return law.rvs(n, random_state=seed), law


def people(n, seed=0):
    """A frame with columns of all types, of which one names the rows."""
    random = np.random.default_rng(seed)
    age = random.poisson(40, n)
    frame = pd.DataFrame(
        {
            "key": [f"k{seed}-{i}" for i in range(n)],
            "country": random.choice(["FR", "DE", "IT"], n, p=[0.5, 0.3, 0.2]),
            "size": pd.Categorical.from_codes(
                (age // 10).clip(2, 5) - 2, ["S", "M", "L", "XL"], ordered=True
            ),
            "age": pd.array(age, "Int64"),
            "income": (age * random.lognormal(0, 0.3, n)).round(2),
            "paid": random.random(n) < 0.4,
            "day": pd.Timestamp("2020-01-01")
            + pd.to_timedelta(random.integers(0, 900, n), unit="D"),
        }
    )
    frame.loc[random.random(n) < 0.2, "age"] = pd.NA
    frame.loc[random.random(n) < 0.1, "income"] = np.nan
    return frame


# --- densities -----------------------------------------------------------------------------------


def test_the_density_of_rows_is_learned_in_nats():
    x, law = gaussian(3000)
    new, _ = gaussian(1000, seed=1)
    density = FlowDensity(**LEARNED).fit(x)
    nats = density.score_samples(new)
    assert nats.shape == (1000,)
    assert density.score(new) == nats.mean()
    entropy = -law.logpdf(new).mean()
    marginals = stats.norm.logpdf(new, law.mean, np.sqrt(np.diag(law.cov)))
    independent = -marginals.sum(1).mean()
    assert -nats.mean() - entropy < 0.5 * (independent - entropy)
    assert -nats.mean() - entropy > -0.1


def test_probabilities_of_discrete_rows_add_up_to_the_share_that_is_not_kept_for_unknown_ones():
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "a": random.choice(list("wxyz"), 400),
            "b": random.random(400) < 0.3,
            "c": random.choice(["no", "perhaps", "yes"], 400),
        }
    )
    density = FlowDensity(**SMALL).fit(frame)
    grid = pd.MultiIndex.from_product([list("wxyz"), [False, True], ["no", "perhaps", "yes"]])
    rows = grid.to_frame(index=False, name=list("abc"))
    n = density.schema_.columns[0].measured.rows
    assert np.exp(density.score_samples(rows)).sum() == pytest.approx((1 - 1 / (n + 2)) ** 3)
    strange = rows.assign(a="never seen")
    assert (density.score_samples(strange) < density.score_samples(rows).min()).all()


def test_units_of_columns_add_their_logarithms():
    x, _ = gaussian(400)
    units = np.array([1e-9, 1.0, 1e9])
    one = FlowDensity(**SMALL).fit(x).score_samples(x)
    other = FlowDensity(**SMALL).fit(x * units).score_samples(x * units)
    assert other == pytest.approx(one - np.log(units).sum(), abs=1e-3)


def test_a_score_does_not_depend_on_the_other_rows():
    x, _ = gaussian(300)
    density = FlowDensity(**SMALL).fit(x)
    alone = np.concatenate([density.score_samples(x[i : i + 1]) for i in range(0, 300, 17)])
    assert np.array_equal(alone, density.score_samples(x)[::17])


def test_samples_have_the_moments_of_the_rows():
    x, law = gaussian(3000)
    drawn = FlowDensity(**LEARNED).fit(x).sample(4000, random_state=0)
    assert drawn.dtype == np.float64
    assert np.abs((drawn.mean(0) - law.mean) / x.std(0)).max() < 0.1
    assert np.abs(np.corrcoef(drawn.T) - np.corrcoef(x.T)).max() < 0.25


def test_bounds_are_refused_where_a_density_is_promised():
    with pytest.raises(ValueError, match="architecture: expected one with an exact density"):
        FlowDensity("vae", steps=1).fit(gaussian(50)[0])


@pytest.mark.parametrize("architecture", ["nsf", "maf"])
def test_flows_have_the_density_of_their_model(architecture):
    x, _ = gaussian(200)
    density = FlowDensity(architecture, steps=5, options={"depth": 1, "hidden": 8}).fit(x)
    with torch.no_grad():
        exact = density.model_.log_prob(torch.from_numpy(x)).numpy()
    assert density.score_samples(x) == pytest.approx(exact, abs=1e-4)
    assert density.sample(3, random_state=0).shape == (3, 3)


# --- as scikit-learn works -----------------------------------------------------------------------


def test_pipelines_and_grid_search_choose_by_likelihood():
    x, _ = gaussian(400)
    pipeline = make_pipeline(StandardScaler(), FlowDensity(**LEARNED))
    grid = {"flowdensity__options__hidden": [8, 16], "flowdensity__steps": [1, 60]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(x)
    assert search.best_params_["flowdensity__steps"] == 60
    assert search.best_estimator_[1].model_.config["options"]["hidden"] in (8, 16)
    assert search.score(x) == search.best_estimator_[1].score(
        search.best_estimator_[0].transform(x)
    )


def test_entries_of_options_are_parameters():
    density = FlowDensity(options={"hidden": 8}, steps=3)
    density.set_params(options__blocks=2, training__lr=1e-3)
    assert density.options == {"hidden": 8, "blocks": 2}
    assert density.training == {"lr": 1e-3}
    assert density.get_params()["options__blocks"] == 2
    assert clone(density).get_params() == density.get_params()
    with pytest.raises(ValueError, match="hiden"):
        density.set_params(options__hiden=8).fit(gaussian(50)[0])


def test_the_random_state_decides_everything_and_leaves_other_generators_alone():
    x, _ = gaussian(200)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]
    first, again, other = (FlowDensity(**SMALL | {"random_state": s}).fit(x) for s in (0, 0, 1))
    a, b = first.sample(5, random_state=3), again.sample(5, random_state=3)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, first.sample(5, random_state=4))
    assert np.array_equal(first.score_samples(x), again.score_samples(x))
    assert not np.array_equal(first.score_samples(x), other.score_samples(x))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_training_reports_and_stops_as_asked(capsys):
    x, _ = gaussian(200)
    rows = []
    density = FlowDensity(**SMALL | {"steps": 4}, watch=rows.append).fit(x)
    assert capsys.readouterr().err == ""
    assert sum(row["kind"] == "train" for row in rows) == 4
    evaluations = [row for row in density.history_ if row["kind"] == "evaluation"]
    assert evaluations[-1]["step"] == 4
    FlowDensity(**SMALL, verbose=1).fit(x)
    assert "FlowDensity: evaluation, step 20" in capsys.readouterr().err
    brief = FlowDensity(**SMALL | {"steps": None}, minutes=0.5 / 60).fit(x)
    assert brief.history_[-1]["seconds"] < 5

    def interrupt(row):
        signal.raise_signal(signal.SIGINT)

    stopped = FlowDensity(**SMALL, watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(x)
    with pytest.raises(NotFittedError):
        stopped.score_samples(x)


def test_too_few_rows_and_impossible_shares_are_refused():
    x, _ = gaussian(4)
    with pytest.raises(ValueError, match="2 different rows"):
        FlowDensity(validation_fraction=0.6).fit(x[[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="validation_fraction: expected a number between 0 and 1"):
        FlowDensity(validation_fraction=1.5).fit(x)
    with pytest.raises(ValueError, match="epochs: the budget is already given as steps"):
        FlowDensity(steps=1, epochs=1).fit(gaussian(50)[0])


# --- storage -------------------------------------------------------------------------------------


def test_pickles_hold_plain_data_and_a_checkpoint(tmp_path):
    x, _ = gaussian(200)
    detector = OutlierDetector(fpr=0.1, **SMALL).fit(x)
    joblib.dump(detector, tmp_path / "detector.joblib")
    loaded = joblib.load(tmp_path / "detector.joblib")
    assert np.array_equal(loaded.decision_function(x), detector.decision_function(x))
    assert loaded.get_params() == detector.get_params()
    found = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module, name):
            found.add((module, name))
            return super().find_class(module, name)

    Recording(io.BytesIO(pickle.dumps(detector))).load()
    assert ("musigma.sklearn", "OutlierDetector") in found
    assert {name.partition(".")[0] for name, _ in found} <= {"musigma", "numpy", "copyreg"}


def test_a_changed_byte_of_the_weights_is_noticed():
    density = FlowDensity(**SMALL).fit(gaussian(200)[0])
    state = density.__getstate__()
    weights = bytearray(state["model_"])
    weights[-5] ^= 1
    with pytest.raises(CheckpointError, match="digest"):
        FlowDensity().__setstate__({**state, "model_": bytes(weights)})


def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    density = FlowDensity(**SMALL).fit(gaussian(200)[0])
    pickle.loads(pickle.dumps(density)).sample(3)
    assert list(tmp_path.iterdir()) == []


# --- outliers ------------------------------------------------------------------------------------


def test_outliers_are_the_rows_with_small_p_values():
    x, _ = gaussian(1500)
    detector = OutlierDetector(fpr=0.05, holdout=0.3, **SMALL).fit(x)
    new = np.concatenate(
        [gaussian(2000, seed=1)[0], np.random.default_rng(0).normal(size=(50, 3))]
    )
    p, decision, predicted = (
        detector.p_values(new),
        *(getattr(detector, name)(new) for name in ("decision_function", "predict")),
    )
    assert np.array_equal(predicted == -1, p <= 0.05)
    assert np.array_equal(predicted == -1, decision < 0)
    assert decision == pytest.approx(detector.score_samples(new) - detector.offset_)
    low, high = anomaly.rate_interval(len(detector.calibration_), 0.05, 2000)
    assert low <= (predicted[:2000] == -1).mean() <= high
    assert (predicted[2000:] == -1).all()


def test_a_rate_that_cannot_be_promised_is_refused_before_training():
    with pytest.raises(ValueError, match=r"fpr: 0\.01 cannot be guaranteed by 20"):
        OutlierDetector(fpr=0.01, minutes=10).fit(gaussian(100)[0])


# --- tables --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def synthesizer():
    return Synthesizer(**SMALL).fit(people(600))


def test_samples_have_the_columns_and_types_of_the_frame(synthesizer):
    frame = people(600)
    drawn = synthesizer.sample(300, random_state=0)
    assert drawn.columns.tolist() == frame.columns[1:].tolist()
    assert drawn.dtypes.tolist() == frame.dtypes[1:].tolist()
    assert drawn["size"].cat.categories.tolist() == ["S", "M", "L", "XL"]
    assert set(drawn.country) <= {"FR", "DE", "IT"}
    assert 0.05 < drawn.age.isna().mean() < 0.4
    assert drawn.income.dropna().between(frame.income.min(), frame.income.max()).all()
    assert len(synthesizer.sample(0)) == 0
    assert synthesizer.sample(0).dtypes.tolist() == frame.dtypes[1:].tolist()


@pytest.mark.parametrize("library", ["polars", "pyarrow"])
def test_tables_of_other_libraries_come_back_as_such(library):
    frame = people(300).drop(columns="key")
    table = pl.from_pandas(frame) if library == "polars" else pa.Table.from_pandas(frame)
    synthesizer = Synthesizer(**SMALL | {"steps": 2}).fit(table)
    drawn = synthesizer.sample(20, random_state=0)
    assert type(drawn) is type(table)
    assert (
        drawn.schema == table.schema if library == "polars" else drawn.schema.equals(table.schema)
    )


def test_columns_that_are_left_out_are_noted(synthesizer, capsys):
    (note,) = [row["message"] for row in synthesizer.history_ if row["kind"] == "note"]
    assert "'key'" in note
    Synthesizer(**TINY, verbose=1).fit(people(100))
    assert f"Synthesizer: note: {note}" in capsys.readouterr().err


def test_a_schema_that_is_given_is_used():
    x = np.random.default_rng(0).integers(0, 3, size=(200, 2)).astype(float)
    schema = Schema([Column("a", "count"), Column("b", "category", ("0", "1", "2"))])
    density = FlowDensity(schema=schema, **SMALL | {"steps": 2}).fit(x)
    assert [column.kind for column in density.schema_.columns] == ["count", "category"]
    assert density.score_samples(x).max() < 0
    drawn = density.sample(50, random_state=0)
    assert set(np.unique(drawn)) <= {0, 1, 2}


def test_conditions_hold_in_every_row_and_are_told_by_value_or_as_text(synthesizer):
    by_value = {"country": ["FR", "IT"], "paid": True, "age": None}
    text = "country in ('FR', 'IT') and paid and age is missing"
    one, other = (synthesizer.sample(40, where=w, random_state=0) for w in (by_value, text))
    assert one.equals(other)
    assert one.country.isin(["FR", "IT"]).all()
    assert one.paid.all()
    assert one.age.isna().all()
    late = synthesizer.sample(40, where={"day": pd.Timestamp("2020-02-01")}, random_state=0)
    assert (late.day == pd.Timestamp("2020-02-01")).all()
    with pytest.raises(ValueError, match='has no level "ES"; they are DE, FR, IT'):
        synthesizer.sample(2, where={"country": "ES"})
    with pytest.raises(ValueError, match="only the architecture table takes conditions"):
        Synthesizer("vae", **TINY | {"options": {"width": 8}}).fit(people(100)).sample(
            2, where={"paid": True}
        )


# --- latents -------------------------------------------------------------------------------------


def test_latents_are_the_means_of_posteriors():
    x, _ = gaussian(300)
    vae = VAETransformer(3, steps=5, options={"width": 16}, random_state=0).fit(x)
    z = vae.transform(x)
    with torch.no_grad():
        (mean,) = vae.model_.encode(torch.from_numpy(x), mode=True)
        back = vae.model_.decode([mean])
    assert z == pytest.approx(mean.double().numpy(), abs=1e-5)
    assert vae.inverse_transform(z) == pytest.approx(back.double().numpy(), rel=1e-4, abs=1e-4)
    assert np.array_equal(vae.transform(x[:7]), z[:7])
    with pytest.raises(ValueError, match="X: expected 3 latents for each row; got 2"):
        vae.inverse_transform(z[:, :2])


def test_latents_of_a_frame_have_names_and_lead_back_to_a_frame():
    frame = people(200).set_index("key")
    vae = VAETransformer(2, steps=5, options={"width": 16}, random_state=0)
    z = vae.set_output(transform="pandas").fit_transform(frame)
    assert z.columns.tolist() == ["vaetransformer0", "vaetransformer1"]
    assert z.index.equals(frame.index)
    back = vae.inverse_transform(z)
    assert back.dtypes.tolist() == frame.dtypes.tolist()
    assert back.index.equals(frame.index)
    assert set(back.country) <= set(frame.country)


# --- missing values ------------------------------------------------------------------------------


def test_missing_values_are_drawn_given_the_others():
    x, law = gaussian(3000)
    holes = x.copy()
    holes[::2, 0] = np.nan
    imputer = Imputer(**LEARNED).fit(holes)
    filled = imputer.transform(holes)
    seen = ~np.isnan(holes)
    assert np.array_equal(filled[seen], holes[seen])
    exact = np.linalg.inv(law.cov)[0, 0] ** -0.5  # standard deviation of x0 given the others
    error = np.sqrt(np.mean((filled[::2, 0] - x[::2, 0]) ** 2))
    assert error < exact + 0.4 * (x[:, 0].std() - exact)
    draws = np.stack([rows[::2, 0] for rows in imputer.sample(holes, 8, random_state=0)])
    assert exact < draws.std(0).mean() < 0.9 * x[:, 0].std()
    assert draws.ravel().std() > filled[::2, 0].std()


def test_means_of_draws_are_on_the_grid_of_a_column_of_an_array():
    random = np.random.default_rng(0)
    x = np.stack([random.poisson(4, 300), random.normal(size=300)], 1).astype(float)
    x[::4, 0] = np.nan
    schema = Schema((Column("n", "count", missing=True), Column("x")))
    filled = Imputer(schema=schema, **SMALL).fit(x).transform(x)
    assert np.array_equal(filled[:, 0], np.rint(filled[:, 0]))
    assert np.array_equal(filled[:, 1], x[:, 1])


def test_an_imputed_frame_keeps_everything_that_is_there():
    frame = people(400).set_index("key", drop=False)
    imputer = Imputer(strategy="draw", **SMALL).fit(frame)
    filled = imputer.transform(frame)
    assert filled.drop(columns="key").notna().all(axis=None)
    assert filled.dtypes.tolist() == frame.dtypes.tolist()
    assert filled.index.equals(frame.index)
    assert filled.where(frame.notna()).equals(frame)
    assert list(imputer.get_feature_names_out()) == frame.columns.tolist()
    assert imputer.transform(frame).equals(filled)
    with pytest.raises(ValueError, match="strategy: expected 'mean' or 'draw'"):
        Imputer(strategy="median").fit(frame)
