"""Promises about anomalies hold on exchangeable data, and figures agree with scikit-learn."""

import contextlib
import csv
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from musigma import anomaly, checkpoint, evaluation, questions
from musigma.cli import main
from musigma.data import load
from musigma.evaluation.intervals import average_precision, exact_share
from musigma.schema import Column, Schema

RATES = (0.05, 0.01, 0.001)


def lies_in(count: int, n: int, rate: float, chance: float = 1e-4) -> bool:
    """Whether a count is plausible for a binomial distribution."""
    return chance / 2 < stats.binom.cdf(count, n, rate) and (
        stats.binom.sf(count - 1, n, rate) > chance / 2
    )


# -- conformal p-values


def test_the_promise_holds_over_many_repetitions():
    random, found = np.random.default_rng(0), []
    for _ in range(20_000):
        scores = random.standard_exponential(1000)
        found += anomaly.p_values(scores[:1], scores[1:]).tolist()
    p = np.array(found)
    for rate in RATES:
        assert lies_in(int((p <= rate).sum()), len(p), rate), rate
        assert not lies_in(int((p <= 1.5 * rate).sum()), len(p), rate) or rate == 0.001
    assert p.min() == 0.001
    assert stats.kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [20, 99])
def test_ties_err_on_the_safe_side_and_randomization_is_exact(n):
    random = np.random.default_rng(1)
    plain, randomized = [], []
    for _ in range(4000):
        scores = random.poisson(1.5, n + 1)
        plain += anomaly.p_values(scores[:1], scores[1:]).tolist()
        randomized += anomaly.p_values(scores[:1], scores[1:], random=random).tolist()
    assert np.mean(np.array(plain) <= 0.1) < 0.1 + 3 * math.sqrt(0.09 / 4000)
    assert np.mean(np.array(plain) <= 0.5) < 0.45, "half of the scores are tied"
    assert stats.kstest(randomized, "uniform").pvalue > 1e-3


def test_the_promise_holds_for_a_detector_of_another_library():
    ensemble = pytest.importorskip("sklearn.ensemble")
    random = np.random.default_rng(2)
    x = random.standard_t(3, (3300, 4)) @ random.normal(size=(4, 4))
    forest = ensemble.IsolationForest(n_estimators=10, random_state=0).fit(x[:300])
    scores, count, trials = -forest.score_samples(x[300:]), {rate: 0 for rate in RATES}, 2000
    for _ in range(trials):
        random.shuffle(scores)
        p = anomaly.p_values(scores[:1], scores[1:])
        for rate in RATES:
            count[rate] += int(p[0] <= rate)
    assert all(lies_in(count[rate], trials, rate) for rate in RATES), count
    strange = -forest.score_samples(np.full((5, 4), 99.0))
    assert (anomaly.p_values(strange, scores) < 0.02).all()


def test_a_flag_is_a_score_above_the_threshold():
    random = np.random.default_rng(3)
    for n in (9, 19, 99, 100, 57):
        known = random.integers(0, 30, n).astype(float)
        new = np.append(random.integers(-5, 40, 200), [np.inf, -np.inf])
        p = anomaly.p_values(new, known)
        for rate in [*(k / (n + 1) for k in range(1, n + 1)), 0.29, 0.1, 0.7, 0.999]:
            if rate >= anomaly.smallest_rate(n):
                flag = new > anomaly.threshold(known, rate)
                np.testing.assert_array_equal(flag, p <= rate)


def test_the_rate_of_one_threshold_lies_in_its_interval():
    random, n, m, rate = np.random.default_rng(4), 300, 400, 0.02
    wide, narrow = anomaly.rate_interval(n, rate, m), anomaly.rate_interval(n, rate)
    true, seen = [], []
    for _ in range(3000):
        limit = anomaly.threshold(random.normal(size=n), rate)
        true.append(stats.norm.sf(limit))
        seen.append(random.binomial(m, true[-1]) / m)
    assert abs(np.mean(true) - 6 / 301) < 4 * np.std(true) / math.sqrt(3000)
    assert 0.935 < np.mean([narrow[0] <= share <= narrow[1] for share in true]) < 0.965
    assert 0.945 < np.mean([wide[0] <= share <= wide[1] for share in seen]) < 0.98
    assert np.mean([narrow[0] <= share <= narrow[1] for share in seen]) < 0.9


def test_too_few_rows_promise_nothing():
    known = np.arange(98.0)
    with pytest.raises(ValueError, match=r"guaranteed by 98 .* from 0\.01; .* 99 "):
        anomaly.threshold(known, 0.01)
    assert anomaly.threshold(np.arange(99.0), 0.01) == 98
    for rate in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="rate: expected a number between 0 and 1"):
            anomaly.threshold(known, rate)


@pytest.mark.parametrize(
    ("scores", "calibration", "message"),
    [
        ([1.0, math.nan], [0.0], "scores: 1 of 2 scores are NaN"),
        ([1.0], [0.0, math.nan], "calibration: 1 of 2 scores are NaN"),
        ([1.0], [], "calibration: expected one or more scores"),
        ([[1.0]], [0.0], r"scores: expected a vector of scores; got shape \(1, 1\)"),
    ],
)
def test_scores_without_a_rank_are_refused(scores, calibration, message):
    with pytest.raises(ValueError, match=message):
        anomaly.p_values(scores, calibration)


# -- drift


SCHEMA = Schema(
    [
        Column("height"),
        Column("count", "count"),
        Column("color", "category", ("red", "green", "blue")),
        Column("rare", "category", tuple(map(str, range(60)))),
        Column("weight", missing=True),
    ]
)


def rows(random: np.random.Generator, n: int) -> np.ndarray:
    height = random.normal(size=n)
    rare = np.minimum(random.geometric(0.2, n) - 1, 59)
    weight = np.where(random.uniform(size=n) < 0.1, np.nan, height + random.normal(size=n))
    columns = [height, random.poisson(2, n), random.integers(0, 3, n), rare, weight]
    return np.stack(columns, 1).astype(float)


@pytest.mark.slow
def test_nothing_has_drifted_where_nothing_has():
    random, repetitions = np.random.default_rng(5), 300
    found = [
        anomaly.column_drift(rows(random, 150), rows(random, 400), SCHEMA)
        for _ in range(repetitions)
    ]
    assert {(t["column"], t["test"]) for t in found[0]} == {
        ("height", "Kolmogorov-Smirnov"),
        ("count", "chi-squared"),
        ("color", "chi-squared"),
        ("rare", "chi-squared"),
        ("weight", "Kolmogorov-Smirnov"),
        ("weight", "missing"),
    }
    for name, test in {(t["column"], t["test"]) for t in found[0]}:
        p = [
            t["p_value"]
            for each in found
            for t in each
            if (t["column"], t["test"]) == (name, test)
        ]
        assert np.mean(np.array(p) <= 0.1) < 0.1 + 3 * math.sqrt(0.09 / repetitions), (name, test)
        assert np.mean(p) < 0.75, "p-values of one are no test"
    false = sum(each[0]["adjusted"] <= 0.05 for each in found)
    assert false <= stats.binom.ppf(0.999, repetitions, 0.05)


def moved(name: str, x: np.ndarray) -> np.ndarray:
    j, x = SCHEMA.index(name), x.copy()
    some = np.arange(len(x)) % 3 == 0
    new = {"height": x[:, j] * 2, "count": x[:, j] + 2, "color": np.where(some, 1, x[:, j])}
    new |= {"rare": np.where(some, 9, x[:, j]), "weight": np.where(some, np.nan, x[:, j])}
    x[:, j] = new[name]
    return x


@pytest.mark.parametrize("name", SCHEMA.names)
def test_the_column_that_drifts_is_named(name):
    random = np.random.default_rng(6)
    found = anomaly.column_drift(moved(name, rows(random, 300)), rows(random, 900), SCHEMA)
    assert {t["column"] for t in found if t["adjusted"] < 1e-4} == {name}
    assert found[0]["column"] == name
    assert all(set(t) == {"column", "test", "statistic", "p_value", "adjusted"} for t in found)


def test_a_category_of_rare_levels_drifts_too():
    """Of 60 levels, 80 rows hold each less than twice; a batch of one level is no such draw."""
    random = np.random.default_rng(2)
    schema = Schema([Column("city", "category", tuple(map(str, range(60))))])
    reference = random.integers(0, 60, (3000, 1)).astype(float)
    (found,) = anomaly.column_drift(np.zeros((80, 1)), reference, schema)
    assert found["p_value"] < 1e-3
    p = [
        anomaly.column_drift(random.integers(0, 60, (80, 1)) + 0.0, reference, schema)
        for _ in range(30)
    ]
    assert sum(tests[0]["p_value"] < 0.05 for tests in p) <= 5


def test_levels_that_the_schema_lacks_are_a_drift():
    random = np.random.default_rng(12)
    batch, reference = rows(random, 300), rows(random, 900)
    batch[:9, 2] = 3
    found = anomaly.column_drift(batch, reference, SCHEMA)
    unseen = next(t for t in found if t["test"] == "unseen")
    assert (unseen["column"], unseen["statistic"]) == ("color", 0.03)
    assert unseen["p_value"] == pytest.approx(math.comb(300, 9) / math.comb(1200, 9), rel=1e-9), (
        "of all ways to place nine rows among 1,200"
    )
    assert unseen["adjusted"] < 0.01


def test_scores_that_are_too_ordinary_have_drifted_too():
    random = np.random.default_rng(7)
    known = random.normal(size=500)
    p = [anomaly.score_drift(random.normal(size=80), random.normal(size=300)) for _ in range(300)]
    assert stats.kstest([each["p_value"] for each in p], "uniform").pvalue > 1e-3
    for scale in (0.4, 2.5):
        assert anomaly.score_drift(scale * random.normal(size=300), known)["p_value"] < 1e-6
    theirs = stats.ks_2samp(known[:90], known[90:])
    ours = anomaly.score_drift(known[:90], known[90:])
    assert (ours["statistic"], ours["p_value"]) == pytest.approx(tuple(theirs))


def test_holm_is_the_closed_test_of_bonferroni():
    random = np.random.default_rng(8)
    for n in (1, 2, 5):
        p = random.uniform(size=n) ** 3
        closed = [
            max(
                min(1, len(s) * p[list(s)].min())
                for size in range(1, n + 1)
                for s in itertools.combinations(range(n), size)
                if i in s
            )
            for i in range(n)
        ]
        np.testing.assert_allclose(anomaly.holm(p), closed)


def test_rows_of_other_columns_are_refused():
    with pytest.raises(ValueError, match=r"reference: expected rows of 2 columns; got shape \(4,"):
        anomaly.column_drift(np.ones((3, 2)), np.ones((4, 3)), ["a", "b"])
    with pytest.raises(ValueError, match="rows: expected rows of 2 columns"):
        anomaly.column_drift(np.ones((0, 2)), np.ones((4, 2)), ["a", "b"])


# -- figures on labeled rows


def test_figures_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(9)
    for strange, normal in ((1, 1), (4, 30), (50, 20), (300, 2000)):
        label = np.repeat([True, False], [strange, normal])
        for digits in (0, 1, 9):
            scores = (random.normal(size=len(label)) + label).round(digits)
            found = anomaly.detection(scores, label)
            for name, theirs in (
                ("auroc", metrics.roc_auc_score),
                ("average_precision", metrics.average_precision_score),
            ):
                assert found[name].value == pytest.approx(theirs(label, scores), abs=1e-12)
                assert found[name].low - 1e-12 <= found[name].value <= found[name].high + 1e-12
    assert (found["normal"], found["anomalies"], "at" in found) == (2000, 300, False)
    assert exact_share(3, 40)[1:] == pytest.approx(tuple(stats.binomtest(3, 40).proportion_ci()))


def test_recall_and_flags_are_shares_at_the_promised_rate():
    random = np.random.default_rng(10)
    scores, label = random.normal(size=5000), np.arange(5000) % 10 == 0
    scores[label] += 3
    known = random.normal(size=4000)
    found = anomaly.detection(scores, label, calibration=known, rates=(0.05, 0.01))
    for rate, at in zip((0.05, 0.01), found["at"], strict=True):
        flag = anomaly.p_values(scores, known) <= rate
        assert at["recall"].value == flag[label].mean()
        assert at["flagged"].value == flag[~label].mean()
        assert at["recall"].low < stats.norm.sf(stats.norm.isf(rate) - 3) < at["recall"].high
        assert at["promised"][0] <= at["flagged"].value <= at["promised"][1]
        assert at["promised"][0] < rate < at["promised"][1]


def test_the_interval_of_average_precision_covers_it():
    random = np.random.default_rng(11)
    large = average_precision(
        random.normal(1.5, 1, 200_000), random.normal(size=400_000), resamples=2
    ).value
    covered = 0
    for i in range(100):
        found = average_precision(
            random.normal(1.5, 1, 100), random.normal(size=200), resamples=150, seed=i
        )
        covered += found.low <= large <= found.high
    assert 0.88 < covered / 100 < 0.99


def test_labels_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="anomaly: expected rows of both kinds; 0 of 3 rows"):
        anomaly.detection([1.0, 2.0, 3.0], np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"anomaly: expected bool of shape \(3,\); got int64"):
        anomaly.detection([1.0, 2.0, 3.0], np.array([0, 1, 1]))


# -- commands


def people(random: np.random.Generator, n: int, strange: float = 0.0, **labels: object) -> str:
    """A table of two dependent columns, and whether each row is strange."""
    odd = (random.uniform(size=n) < strange).astype(int)
    height = random.normal(170, 9, n)
    weight = height - 100 + random.normal(0, 5, n) + 60 * odd
    lines = ["height,weight" + "".join(f",{name}" for name in labels)]
    for a, b, i in zip(height, weight, odd, strict=True):
        lines.append(f"{a:.6f},{b:.6f}" + "".join(f",{words[i]}" for words in labels.values()))
    return "\n".join(lines) + "\n"


def shop(random: np.random.Generator, n: int, tenth: str | None = None) -> str:
    """A table of a count, a category, and a number that may be missing; every tenth row is odd."""
    lines = ["age,country,spend"]
    for i in range(n):
        age, country = random.integers(18, 90), ("FR", "DE")[random.integers(2)]
        spend = "" if random.uniform() < 0.1 else f"{random.lognormal(3 + age / 50, 0.3):.2f}"
        if tenth is not None and i % 10 == 3:
            country, spend = tenth, "999.99"
        lines.append(f"{age},{country},{spend}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A flow of a table, and a VAE of images, as their commands make them."""
    home, random = tmp_path_factory.mktemp("home"), np.random.default_rng(0)
    (home / "known.csv").write_text(people(random, 3000))
    (home / "clean.csv").write_text(people(random, 1500))
    (home / "new.csv").write_text(people(random, 700, 0.1))
    (home / "labeled.csv").write_text(people(random, 700, 0.1, fraud=(0, 1), kind=("a", "b")))
    levels = random.integers(0, 90, (400, 1, 4, 4)) + random.integers(0, 160, (400, 1, 1, 1))
    np.savez(home / "images.npz", x=levels.astype(np.uint8), y=np.arange(400) % 2)
    quick = "--evaluations 1 --evaluate-on 50 --batch-size 64 --out"
    with inside(home):
        call("train nsf known.csv --steps 60 --depth 2 --hidden 16 --lr 0.01", quick, "run")
        (home / "shop.csv").write_text(shop(random, 900))
        (home / "orders.csv").write_text(shop(random, 300, "FR"))
        (home / "abroad.csv").write_text(shop(random, 120, "XX"))
        call("train table shop.csv --steps 40 --hidden 16 --blocks 1 --lr 0.01", quick, "table")
        call("train mlp_vae images.npz --steps 20 --hidden 8 --latents 2", quick, "vae")
    return home


@contextlib.contextmanager
def inside(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def call(*words: object) -> None:
    main([word for some in words for word in str(some).split(" ")])


@pytest.fixture
def answer(capsys):
    """A function that runs a command and returns its JSON."""

    def run(*words: object):
        capsys.readouterr()
        call(*words, "--json")
        return json.loads(capsys.readouterr().out)

    return run


def cells(path: str) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def nats(run: str, source: str, part: str = "all") -> np.ndarray:
    model = checkpoint.load(f"{run}/model.safetensors")
    data = load(source, columns=model.spec.columns or None)
    return evaluation.score(model, data.split(part))["nats"]


@pytest.mark.parametrize(
    ("run", "source", "origin"),
    [("run", "new.csv", "known.csv"), ("vae", "images.npz", "images.npz")],
)
def test_score_flags_by_the_held_out_rows(here, answer, run, source, origin):
    known = nats(run, origin, "held-out")
    found = answer("score", run, source, "--fpr 0.05 --out s.csv")
    table = cells("s.csv")
    names = ["nats", "p_value", "flag"]
    assert [name for name in table if name in names] == names
    p = np.array(table["p_value"], float)
    np.testing.assert_allclose(p, anomaly.p_values(np.array(table["nats"], float), known))
    assert table["flag"] == ["true" if each <= 0.05 else "false" for each in p]
    assert (found["flagged"], found["n"]) == (table["flag"].count("true"), len(p))
    assert found["threshold"] == pytest.approx(anomaly.threshold(known, 0.05))
    assert found["rate_interval"] == list(anomaly.rate_interval(len(known), 0.05))
    assert found["calibration"]["n"] == len(known)
    assert found["calibration"]["rows"] == f"held-out of {(here / origin).resolve()}"
    if run == "run":
        assert 0.08 < found["flagged"] / found["n"] < 0.2


def test_flags_are_booleans_in_parquet_and_the_calibration_is_printed(here, capsys):
    pa = pytest.importorskip("pyarrow.parquet")
    call("score run new.csv --fpr 0.002 --calibrate clean.csv --out s.parquet")
    table = pa.read_table("s.parquet")
    assert str(table.schema.field("flag").type) == "bool"
    p = anomaly.p_values(nats("run", "new.csv"), nats("run", "clean.csv"))
    np.testing.assert_allclose(table["p_value"].to_numpy(), p)
    text = capsys.readouterr().out
    assert "by 1,500 calibration rows (all of clean.csv)" in text
    assert f"{(p <= 0.002).sum()} of 700 examples flagged" in text
    call("score run new.csv --calibrate clean.csv --out s.csv")
    assert "flag" not in cells("s.csv")
    assert "p_value" in cells("s.csv")


def test_shards_have_the_p_values_of_the_whole(here, monkeypatch):
    words = "score vae images.npz --fpr 0.1 --out s.csv"
    call(words)
    whole, parts = cells("s.csv"), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        call(words)
        parts.append(cells(f"s-{rank:05}-of-00003.csv"))
    assert {name: [v for part in parts for v in part[name]] for name in whole} == whole
    assert len(set(whole["p_value"])) > 20


def test_drift_is_a_test_of_the_batch(here, answer, capsys):
    found = answer("score run clean.csv --drift")
    assert found["drift"]["p_value"] > 1e-3
    assert (found["drift"]["drifted"], found["n"]) == ([], 1500)
    lines = ["height,weight", *(f"{170 + i % 10},{70 + i % 10}" for i in range(200))]
    Path("moved.csv").write_text("\n".join(lines))
    found = answer("score run moved.csv --drift --out s.csv")
    assert found["drift"]["p_value"] < 1e-6
    assert set(found["drift"]["drifted"]) == {"height", "weight"}
    assert len(found["drift"]["columns"]) == 2
    capsys.readouterr()
    call("score run moved.csv --drift")
    assert "height: Kolmogorov-Smirnov" in capsys.readouterr().out
    assert answer("score vae images.npz --split train --calibrate images.npz --fpr .1 --out s.csv")


def test_evaluate_with_labels(here, answer, capsys):
    metrics = pytest.importorskip("sklearn.metrics")
    known = nats("run", "known.csv", "held-out")
    found = answer("evaluate run labeled.csv --labels fraud --fpr 0.05,0.01")
    table = load("labeled.csv", given=["fraud", "kind"])
    label = table.given["fraud"].values.astype(bool)
    scores = nats("run", "labeled.csv")
    detection = found["detection"]
    assert found["anomaly"] == "fraud = 1"
    assert detection["auroc"]["value"] == pytest.approx(metrics.roc_auc_score(label, scores))
    assert detection["average_precision"]["value"] == pytest.approx(
        metrics.average_precision_score(label, scores)
    )
    assert [at["rate"] for at in detection["at"]] == [0.05, 0.01]
    flag = anomaly.p_values(scores, known) <= 0.01
    assert detection["at"][1]["recall"]["value"] == pytest.approx(flag[label].mean())
    assert detection["at"][1]["flagged"]["value"] == pytest.approx(flag[~label].mean())
    assert found["nats"] == pytest.approx(scores.mean())
    Path("y.csv").write_text("odd\n" + "".join(f"{'xy'[i]}\n" for i in label.astype(int)))
    for words in ("--labels kind --anomaly b", "--labels y.csv --anomaly y"):
        again = answer(f"evaluate run labeled.csv {words} --fpr 0.05,0.01")["detection"]
        assert again == detection
    capsys.readouterr()
    call("evaluate run labeled.csv --labels fraud")
    out, err = capsys.readouterr()
    assert f"anomalies: fraud = 1, {label.sum()} of 700 rows" in out
    assert "at 1.00%" in out
    assert "fpr: 0.001 cannot be guaranteed" in err


def test_labels_in_a_typed_table(here, answer):
    lines = Path("orders.csv").read_text().splitlines()
    label = [i % 10 == 3 for i in range(300)]
    lines = [f"{line},{mark}" for line, mark in zip(lines, ["label", *label], strict=True)]
    Path("label.csv").write_text("\n".join(lines))
    Path("fraud.csv").write_text("\n".join(lines).replace("label", "fraud"))
    found = answer("evaluate table label.csv --labels label --fpr 0.05 --orders 2")
    assert found["anomaly"] == "label = True"
    assert (found["detection"]["normal"], found["detection"]["anomalies"]) == (270, 30)
    assert found["detection"]["auroc"]["value"] > 0.95
    again = answer("evaluate table fraud.csv --labels fraud --fpr 0.05 --orders 2")
    assert again["detection"] == found["detection"]


def test_rows_that_calibrate_are_not_evaluated(here, answer, capsys):
    data = load("images.npz").split("held-out")
    found = answer("evaluate vae images.npz --labels label --anomaly 1 --fpr 0.3")
    n = found["detection"]["normal"] + found["detection"]["anomalies"]
    assert n == found["n"]
    assert n + found["calibration"]["n"] == len(data)
    assert found["calibration"]["rows"].startswith("half of held-out of ")
    assert min(n, found["calibration"]["n"]) > len(data) / 4
    call("evaluate vae images.npz --labels label --anomaly 1 --fpr 0.3")
    assert "calibration rows are anomalies, so fewer rows are flagged" in capsys.readouterr().err


def test_a_table_says_why(here, answer, capsys):
    found = answer("score table orders.csv --fpr 0.05 --explain 2 --out s.csv")
    table = cells("s.csv")
    assert list(table) == ["index", "nats", "p_value", "flag", "because"]
    assert [bool(text) for text in table["because"]] == [f == "true" for f in table["flag"]]
    odd = [i % 10 == 3 for i in range(300)]
    assert all(table["flag"][i] == "true" for i in range(300) if odd[i])
    assert all("spend = 999.99 (expected" in table["because"][i] for i in range(300) if odd[i])
    assert max(text.count(";") for text in table["because"]) == 1
    assert {"nats", "highest", "lowest"} < set(found)
    assert "bits_per_dim" not in found
    call("score table orders.csv --explain 1 --out s.csv")
    assert "p_value" not in cells("s.csv")
    assert sum(map(bool, cells("s.csv")["because"])) > 200, "most rows are, in something, unusual"
    one = np.array(cells("s.csv")["nats"], float)
    found = answer("score table orders.csv --orders 3 --out s.csv")
    model = checkpoint.load("table/model.safetensors").eval()
    data = load("orders.csv", schema=model.spec.schema)
    expected = questions.score(model, data.x, questions.orders(model, 3))
    table = {name: np.array(cells("s.csv")[name], float) for name in ("nats", "spread")}
    np.testing.assert_allclose(table["nats"], -expected.mixture, rtol=1e-5)
    np.testing.assert_allclose(table["spread"], expected.spread, atol=1e-4)
    assert found["spread"] == pytest.approx(expected.spread.mean(), rel=1e-3)
    assert 0.001 < np.abs(table["nats"] - one).max() < 5
    assert answer("evaluate table orders.csv --orders 3")["nats"] == pytest.approx(found["nats"])


def test_categories_that_training_lacked(here, answer, capsys):
    call("score table abroad.csv --fpr 0.02 --explain 3 --out s.csv")
    table = cells("s.csv")
    assert table["flag"].count("true") < 20
    for i in range(3, 120, 10):
        assert table["flag"][i] == "true"
        assert "country = an unknown level (expected" in table["because"][i]
    found = answer("score table abroad.csv --drift")["drift"]
    assert set(found["drifted"]) >= {"country"}
    assert {t["test"] for t in found["columns"] if t["column"] == "country"} == {
        "unseen",
        "chi-squared",
    }
    with pytest.raises(SystemExit):
        call("score table abroad.csv --unseen refuse --out t.csv")
    assert "column 'country' is 'XX'" in capsys.readouterr().err
    assert not Path("t.csv").exists()


FAULTS = {
    "too few": (
        "score run new.csv --fpr 0.001",
        "0.001 cannot be guaranteed by .* 999 or more rows",
    ),
    "rate": ("score run new.csv --fpr 1.5", "fpr: expected a rate between 0 and 1"),
    "no file": ("score run new.csv --fpr 0.1 --calibrate none.csv", "calibrate: .*none.csv"),
    "explain": ("score run new.csv --explain 2", "explain: only models of `musigma train table`"),
    "orders": ("score run new.csv --orders 2", "orders: only models of `musigma train table`"),
    "none": ("score run new.csv --explain -1", "explain: expected 1 or more"),
    "seen": ("score run known.csv --drift", "drift: known.csv is what the model was trained on"),
    "no labels": ("evaluate run new.csv --labels fraud", "new.csv: no column matches 'fraud'"),
    "no label": ("evaluate run new.csv --labels label", "labels: new.csv has no labels"),
    "column": (
        "evaluate run new.csv --labels height",
        "labels: 'height' is a column of the model",
    ),
    "which": ("evaluate run labeled.csv --labels kind", r"'a' \(\d+\), 'b' \(\d+\); say which"),
    "unknown": ("evaluate run labeled.csv --labels kind --anomaly c", "anomaly: .* got 'c'"),
    "alone": ("evaluate run labeled.csv --fpr 0.1", "fpr: for labeled data alone"),
    "rates": ("evaluate run labeled.csv --labels fraud --fpr x", "fpr: expected rates such as"),
    "few": ("evaluate run labeled.csv --labels fraud --fpr 0.001", "0.001 cannot be guaranteed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said_and_nothing_is_written(here, capsys, name):
    words, message = FAULTS[name]
    out = "" if words.startswith("evaluate") or "--drift" in words else " --out s.csv"
    before = set(here.iterdir())
    with pytest.raises(SystemExit) as exit_:
        call(words + out)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert set(here.iterdir()) == before


def test_a_run_whose_data_are_gone_names_the_option(here, capsys, monkeypatch):
    (here / "other").mkdir()
    (here / "other" / "gone.csv").write_text(people(np.random.default_rng(1), 200))
    call("train nsf other/gone.csv --steps 2 --depth 1 --hidden 8 --evaluations 1 --out gone")
    (here / "other" / "gone.csv").unlink()
    with pytest.raises(SystemExit):
        call("score gone new.csv --fpr 0.1 --out s.csv")
    assert "give --calibrate FILE" in capsys.readouterr().err
    call("score gone new.csv --fpr 0.1 --calibrate clean.csv --out s.csv")
