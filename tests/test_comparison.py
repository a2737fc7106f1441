"""Comparisons of tables find what they should, and nothing else: closed forms, planted faults."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp, norm, spearmanr

from musigma.cli import main
from musigma.comparison import (
    associations,
    c2st,
    compare,
    compare_rows,
    marginal,
    pairs,
    privacy,
    usefulness,
)
from musigma.comparison.privacy import Space
from musigma.comparison.usefulness import figures, heavy_tailed
from musigma.data import DataError
from musigma.schema import Column, Schema

pd = pytest.importorskip("pandas")
pytest.importorskip("sklearn")

NUMBERS = Schema(tuple(Column(name) for name in "abcd"))
TYPED = Schema(
    (
        Column("a", missing=True),
        Column("b", "category", ("u", "v", "w")),
        Column("c", "count"),
    )
)


def typed(random, n, shift=0.0):
    """Rows with a missing number, a category and a heavy-tailed count, all dependent."""
    a = random.normal(size=n) + shift
    b = (a + random.normal(size=n) > 0) + (random.random(n) > 0.8)
    c = np.rint(np.exp(a + 0.3 * random.normal(size=n) + 3)) + 1
    rows = np.stack([a, b.astype(float), c], 1)
    rows[random.random(n) < 0.1, 0] = np.nan
    return rows


# --- can they be told apart ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repeats", "least"), [(8, 14), pytest.param(100, 182, marks=pytest.mark.slow)]
)
def test_the_interval_of_one_distribution_covers_chance(repeats, least):
    random, covered, small = np.random.default_rng(0), 0, 0
    for seed in range(repeats):
        found = c2st(*random.normal(size=(2, 200, 4)), NUMBERS, seed=seed)
        covered += found.auc.low <= 0.5 <= found.auc.high
        covered += found.accuracy.low <= 0.5 <= found.accuracy.high
        small += found.p_value < 0.05
    assert covered >= least
    assert small <= max(2, 0.08 * repeats)


@pytest.mark.parametrize("distance", [1.0, 2.0])
def test_the_auc_of_shifted_gaussians_is_near_its_closed_form(distance):
    random, truth = np.random.default_rng(1), norm.cdf(distance / np.sqrt(2))
    x, y = random.normal(size=(2, 1200, 4))
    found = c2st(x, y + distance / 2, NUMBERS, shuffle=True)  # in 4 columns: 2 (d / 2) = d
    assert found.auc.low <= truth  # no classifier is better on average
    assert found.auc.value > truth - 0.05
    assert found.p_value < 1e-6
    assert min(found.columns.values()) > 0.01


def test_shuffling_names_the_column_that_differs():
    random = np.random.default_rng(2)
    x, y = random.normal(size=(2, 400, 4))
    y[:, 2] *= 3
    found = c2st(x, y, NUMBERS, shuffle=True)
    first, second, *_ = found.columns.items()
    assert first[0] == "c"
    assert first[1] > 0.1 > second[1]


def test_a_category_with_many_levels_is_no_obstacle():
    random = np.random.default_rng(3)
    schema = Schema((Column("city", "category", tuple(map(str, range(2000)))),))
    x, y = random.geometric(0.01, size=(2, 500, 1)).clip(max=1999).astype(float)
    found = c2st(x, y, schema)
    assert found.auc.low < 0.5 < found.auc.high
    assert c2st(x, np.where(y < 40, 1999, y), schema).auc.low > 0.55


# --- usefulness ----------------------------------------------------------------------------------


def test_good_synthetic_rows_are_as_useful_and_bad_ones_are_not():
    random = np.random.default_rng(4)
    good, train, test = (typed(random, 500) for _ in range(3))
    bad = np.stack([random.permutation(column) for column in good.T], 1)
    for target, measures in (("c", ["R2 of the logarithm"]), ("b", ["accuracy", "AUC"])):
        for rows, is_good in ((good, True), (bad, False)):
            scores = usefulness(rows, train, test, TYPED, target)
            assert [one.measure for one in scores] == measures
            for one in scores:
                assert one.train_rows == 500
                if is_good:
                    assert one.difference.low < 0.03
                    assert one.difference.high > -0.03
                else:
                    assert one.difference.high < 0


def test_the_interval_of_r2_agrees_with_the_bootstrap():
    random = np.random.default_rng(5)
    x = random.normal(size=(3, 400, 2))
    x[..., 1] = x[..., 0] + 0.5 * random.normal(size=(3, 400))
    (found,) = usefulness(*x, Schema((Column("x"), Column("y"))), "y")
    from musigma.comparison.boosting import regressor

    fitted = regressor(Schema((Column("x"),)), 0).fit(x[1][:, :1], x[1][:, 1])
    truth, errors = x[2][:, 1], x[2][:, 1] - fitted.predict(x[2][:, :1])
    draws = random.integers(0, 400, (2000, 400))
    values = 1 - (errors**2)[draws].mean(1) / truth[draws].var(1)
    assert found.real.value == pytest.approx(1 - (errors**2).mean() / truth.var(), abs=0.02)
    ends = np.quantile(values, [0.025, 0.975])
    assert found.real.high - found.real.low == pytest.approx(np.diff(ends)[0], rel=0.15)


def test_the_interval_of_the_auc_of_classes_agrees_with_the_bootstrap():
    """Also where some classes are recognized better than others, so their frequencies matter."""
    random = np.random.default_rng(6)
    truth = random.choice(3, 600, p=[0.45, 0.45, 0.1])
    scores = random.normal(size=(600, 3)) + np.diag([4.0, 0.2, 1.0])[truth]
    _, (_, _, terms) = figures(scores, truth)
    values = []
    for at in random.integers(0, 600, (400, 600)):
        values.append(figures(scores[at], truth[at])[1][1])
    assert terms.mean() == pytest.approx(0, abs=1e-12)
    assert np.sqrt(terms.var() / 600) == pytest.approx(np.std(values), rel=0.1)


def test_numbers_are_logged_only_if_that_helps():
    random = np.random.default_rng(6)
    normal = random.normal(size=4000)
    assert heavy_tailed(np.exp(normal))
    assert not heavy_tailed(np.exp(normal) - 1)
    assert not heavy_tailed(normal + 10)
    assert not heavy_tailed(np.ones(100))


# --- columns and pairs ---------------------------------------------------------------------------


def test_the_distance_of_numbers_is_that_of_kolmogorov_and_smirnov():
    random = np.random.default_rng(7)
    x, y = random.normal(size=300).round(1), random.normal(0.3, 1, 200).round(1)
    found = marginal(np.append(x, np.nan), y, Column("a", step=0.1))
    assert found.distance == pytest.approx(ks_2samp(x, y).statistic)
    assert found.missing_real == pytest.approx(1 / 301)
    assert found.off_grid == 0
    assert marginal(x, y + 0.05, Column("a", step=0.1)).off_grid == 1
    assert marginal(x, x + 100, Column("a")).outside == 1
    assert sum(found.real) == pytest.approx(1)
    assert sum(found.synthetic) == pytest.approx(1)


def test_the_distance_that_chance_makes_is_its_mean():
    random = np.random.default_rng(8)
    p, level = [0.5, 0.3, 0.15, 0.05], Column("a", "category", tuple("stuv"))
    numbers, levels = [], []
    for _ in range(150):
        numbers.append(marginal(random.normal(size=80), random.normal(size=120), Column("a")))
        drawn = (random.choice(4, n, p=p).astype(float) for n in (80, 120))
        levels.append(marginal(*drawn, level))
    for found in (numbers, levels):
        mean = np.mean([one.distance for one in found])
        assert mean == pytest.approx(np.mean([one.chance for one in found]), rel=0.1)


def test_levels_that_are_invented_or_lost_are_named():
    column = Column("city", "category", ("Bonn", "Köln", "Ulm", "Atlantis"))
    real, synthetic = np.array([0.0, 0, 1, 2]), np.array([0.0, 3, 3, 1])
    found = marginal(real, synthetic, column)
    assert found.invented == {"Atlantis": 2}
    assert found.lost == {"Ulm": 1}
    assert found.outside == 0.5
    assert found.distance == pytest.approx(0.5)
    assert marginal(real, synthetic, column, np.array([3.0])).invented == {}


def test_associations_agree_with_other_formulas():
    random = np.random.default_rng(9)
    rows = typed(random, 3000)
    found = associations(rows, TYPED)
    present = ~np.isnan(rows[:, 0])
    theirs = spearmanr(rows[present, 0], rows[present, 2]).statistic
    assert found[0, 2] == pytest.approx(theirs)
    assert (found == found.T).all()
    both = Schema((Column("x", "category", tuple("abc")), Column("y", "category", tuple("abc"))))
    x = random.integers(0, 3, 4000).astype(float)
    y = np.where(random.random(4000) < 0.5, x, random.integers(0, 3, 4000))
    v = associations(np.stack([x, y], 1), both)[0, 1]  # P(x, y) = 1/18 + [x = y] / 6: V = 1/2
    assert v == pytest.approx(0.5, abs=0.03)
    assert associations(np.stack([x, random.permutation(x)], 1), both)[0, 1] < 0.03


def test_pairs_that_lost_their_dependence_come_first():
    random = np.random.default_rng(10)
    real, synthetic = (typed(random, 1500) for _ in range(2))
    assert pairs(real, synthetic, TYPED).mean < 0.05
    synthetic[:, 2] = random.permutation(synthetic[:, 2])
    found = pairs(real, synthetic, TYPED)
    assert found.worst(1)[0][:2] == ("a", "c")
    assert found.mean > 5 * found.chance


# --- privacy -------------------------------------------------------------------------------------


def test_distances_are_those_of_a_plain_loop():
    random = np.random.default_rng(11)
    rows, base = typed(random, 40), typed(random, 60)
    space = Space(base, TYPED)
    present = base[~np.isnan(base[:, 0]), 0]

    def rank(x, known):
        return np.interp(x, *_midranks(known)) * np.sqrt(12)

    squares = np.zeros((40, 60))
    u, v = (np.isnan(x[:, :1]) for x in (rows, base))
    a = cdist(rank(rows[:, :1], present), rank(base[:, :1], present), "sqeuclidean")
    squares += np.where(u | v.T, 2.0 * (u != v.T), a)
    squares += 2.0 * (rows[:, 1:2] != base[:, 1])
    squares += cdist(rank(rows[:, 2:], base[:, 2]), rank(base[:, 2:], base[:, 2]), "sqeuclidean")
    np.testing.assert_allclose(
        space.nearest(rows, base), np.sqrt(squares.min(1)), atol=0.02 * np.sqrt(12)
    )
    assert (space.nearest(base, base) == 0).all()


def _midranks(known):
    values, times = np.unique(known, return_counts=True)
    return values, (np.cumsum(times) - times / 2) / len(known) - 0.5


def test_a_synthesizer_without_a_leak_is_not_accused():
    random = np.random.default_rng(12)
    train, held_out, synthetic = (typed(random, 600) for _ in range(3))
    found = privacy(held_out, synthetic, TYPED, train)
    assert found.membership.low < 0.5 < found.membership.high
    assert found.closer.low < 0.5 < found.closer.high
    for name, value in found.percentiles.items():
        assert value.low < int(name) / 100 < value.high
    assert found.reference == "held-out rows"


def test_a_leaky_synthesizer_is_caught_and_its_copies_are_counted():
    random = np.random.default_rng(13)
    train, held_out, synthetic = (typed(random, 600) for _ in range(3))
    synthetic[:200] = train[random.permutation(600)[:200]]
    found = privacy(held_out, synthetic, TYPED, train)
    assert found.copies.low < 1 / 3 < found.copies.high + found.chance_copies.high
    assert found.chance_copies.high < 0.07
    assert found.membership.low > 0.55
    assert found.percentiles["5"].low > 0.2
    near = np.where(np.isnan(train), np.nan, train)
    near[:, 0] += 1e-4 * random.normal(size=600)  # copies that are not exact
    found = privacy(held_out, near, TYPED, train)
    assert found.copies.value < 0.2
    assert found.membership.low > 0.7
    assert found.closer.low > 0.7


def test_without_training_rows_membership_is_not_told_and_copies_are_still_found():
    random = np.random.default_rng(14)
    real, fresh = typed(random, 800), typed(random, 800)
    found = privacy(real, real[:400], TYPED)
    assert found.membership is None
    assert "needs the training rows" in found.why
    assert found.copies.low > 0.4
    assert privacy(real, fresh, TYPED).copies.high < 0.05


def test_real_rows_that_are_training_rows_are_no_held_out_rows():
    random = np.random.default_rng(15)
    train, synthetic = typed(random, 400), typed(random, 400)
    found = privacy(train, synthetic, TYPED, train)
    assert found.membership is None
    assert re.search(r"\d+% of the real rows are training rows", found.why)
    assert found.closer.low < 0.5 < found.closer.high


def test_a_table_whose_rows_repeat_is_no_leak():
    random = np.random.default_rng(16)
    schema = Schema((Column("a", "boolean", ("no", "yes")), Column("b", "count")))
    train, held_out, synthetic = random.integers(0, 2, (3, 300, 2)).astype(float)
    found = privacy(held_out, synthetic, schema, train)
    assert found.copies.value == found.chance_copies.value == 1
    assert found.membership.value == 0.5
    for name, value in found.percentiles.items():
        assert value.value == pytest.approx(int(name) / 100)


# --- the whole -----------------------------------------------------------------------------------


def frame(random, n):
    rows = typed(random, n)
    return pd.DataFrame(
        {
            "a": rows[:, 0].round(2),
            "b": np.array(["u", "v", "w"])[rows[:, 1].astype(int)],
            "c": rows[:, 2].astype(int),
            "when": pd.Timestamp("2020-01-01") + pd.to_timedelta(random.integers(0, 99, n), "D"),
        }
    )


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """Three files: real, synthetic with faults, and training rows."""
    random = np.random.default_rng(17)
    monkeypatch.chdir(tmp_path)
    held_out, synthetic, train = frame(random, 240), frame(random, 200), frame(random, 300)
    train.loc[0, "b"] = "rare"
    synthetic.loc[0, "b"] = "rare"
    synthetic.loc[:6, "b"] = ["rare", "zebra", "zebra", "u", "u", "yak", "zebra"]
    synthetic["c"] = synthetic["c"] + np.where(np.arange(200) < 20, 0.5, 0.0)
    synthetic["note"] = 1.5
    synthetic = synthetic[["note", "when", "c", "b", "a"]]
    held_out.to_csv("held-out.csv", index=False)
    train.to_csv("train.csv", index=False)
    synthetic.to_parquet("synthetic.parquet")
    return tmp_path


def test_the_commands_of_the_page(tables, capsys):
    page = (Path(__file__).parent.parent / "docs" / "synthetic.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    for command in block.replace("--target income", "--target c").splitlines():
        more = ["--target", "b"] if "--json" in command else []
        main([*command.split()[1:], *more])
    out = capsys.readouterr().out
    text, _, plain = out.partition("\n{\n")
    assert "No membership test: it needs the training rows" not in text
    html = Path("report.html").read_text(encoding="utf-8")
    assert html.count("<img") == 5
    assert "zebra" in html
    found = json.loads("{" + plain)
    assert found["rows"] == {"real": 240, "synthetic": 200}
    assert found["privacy"]["membership"] is None
    assert found["c2st"]["baseline"]["rows"] == 120
    assert len(found["privacy"]["distance_percentiles"]["synthetic"]) == 101
    assert set(found["c2st"]["auc"]) == {"value", "low", "high"}
    assert [one["column"] for one in found["marginals"]] == ["a", "b", "c", "when"]
    scored = [(one["column"], one["measure"]) for one in found["usefulness"]["scores"]]
    assert scored == [("b", "accuracy"), ("b", "AUC")]


def test_differences_are_named_all_at_once(tables):
    steps = []
    found = compare(
        "held-out.csv",
        "synthetic.parquet",
        "train.csv",
        target="c",
        progress=lambda done, total, note="": steps.append((done, total)),
    )
    text = "\n".join(found.differences)
    assert "Columns of synthetic only, which are left out: 'note'" in text
    assert "c: count in the real table, continuous in synthetic by itself" in text
    assert "c: 10.00% of the synthetic values are no multiples of 1" in text
    assert "b: 4 synthetic rows have levels that no real row has: 'yak', 'zebra'" in text
    (b,) = (one for one in found.marginals if one.column == "b")
    assert b.invented == {"yak": 1, "zebra": 3}  # `rare` is a level of the training rows
    assert found.names == {
        "real": "held-out.csv",
        "synthetic": "synthetic.parquet",
        "train": "train.csv",
    }
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


def test_every_column_is_a_target_and_copies_show():
    rows = typed(np.random.default_rng(18), 240)
    rows[::4, 0] = np.nan
    again = compare_rows(rows, rows, TYPED, seed=3)
    assert {one.column for one in again.usefulness} == {"b", "c"}
    assert list(again.skipped) == ["a"]
    assert "has a value in" in again.skipped["a"]
    assert again.c2st.auc.high < 0.5  # copies of real rows
    assert again.privacy.copies.value > 0.4
    assert "copies of rows of the other" in str(again)


def test_columns_that_are_constant_or_missing_are_no_obstacle():
    random = np.random.default_rng(20)
    kinds = {"a": "continuous", "k": "continuous", "n": "count", "b": "category"}
    schema = Schema(
        tuple(
            Column(name, kind, levels=("u", "v") if name == "b" else (), missing=True)
            for name, kind in kinds.items()
        )
    )
    real = np.full((200, 4), np.nan)
    real[:, 0], real[:, 1], real[:, 3] = random.normal(size=200), 1, random.random(200) > 0.5
    synthetic = np.full((100, 4), np.nan)
    synthetic[:, 1], synthetic[:, 2] = 1, random.integers(0, 9, 100)
    found = compare_rows(real, synthetic, schema)
    assert found.c2st.auc.value == 1
    assert list(found.skipped) == ["a", "k", "n", "b"]
    assert [one.distance for one in found.marginals] == [1, 0, 1, 1]
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["short.csv", "short.csv"], "real: expected at least 200 rows; got 150.*\n.*synthetic"),
        (["held-out.csv", "synthetic.parquet", "--target", "z"], "target: expected one of a, b"),
        (["held-out.csv", "lacks.csv"], "has no column 'a', 'b', which the schema has"),
        (["held-out.csv", "text.csv"], "column 'c'.*none"),
        (
            ["held-out.csv", "synthetic.parquet", "--out", "report.pdf"],
            r"expected a \.html, \.md or",
        ),
        (["held-out.csv", "synthetic.parquet", "--rows", "0"], "rows: expected 1 or more"),
        (["nowhere.csv", "synthetic.parquet"], "no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused(tables, capsys, words, message):
    table = pd.read_csv("held-out.csv")
    table[:150].to_csv("short.csv", index=False)
    table[:99].to_csv("shorter.csv", index=False)
    table[["c", "when"]].to_csv("lacks.csv", index=False)
    table["c"] = ["none so far", *table["c"][1:]]
    table.to_csv("text.csv", index=False)
    if words[0] == "short.csv":
        words = ["short.csv", "shorter.csv"]
    with pytest.raises(SystemExit) as end:
        main(["compare", *words])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(message, err, re.DOTALL), err
    assert not list(Path().glob("*.html"))


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(DataError, match=r"needs scikit-learn: pip install 'musigma\[data\]'"):
        c2st(*np.random.default_rng(0).normal(size=(2, 200, 4)), NUMBERS)


def test_the_copula_of_the_benchmark_keeps_marginals_and_rank_correlations(tmp_path):
    from benchmarks.synthetic import fit

    random = np.random.default_rng(19)
    x = random.normal(size=800)
    table = {"x": x, "y": np.exp(x + random.normal(size=800)), "z": random.choice(["u", "v"], 800)}
    pd.DataFrame(table).to_csv(tmp_path / "train.csv", index=False)
    seconds = fit("copula", str(tmp_path / "train.csv"), str(tmp_path / "out.csv"), 1, 800, 0)
    assert set(seconds) == {"fit", "sample"}
    found = compare(tmp_path / "train.csv", tmp_path / "out.csv", target="y")
    assert not found.differences
    assert all(one.distance < 2.5 * one.chance for one in found.marginals)
    assert abs(found.pairs.real[0, 1]) > 0.6
    assert found.pairs.mean < 0.05
