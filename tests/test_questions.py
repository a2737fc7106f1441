"""What is asked of a density of rows, against exact sums over small tables."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from musigma import questions
from musigma.any_order import AnyOrder, orders_of
from musigma.conditions import Condition, Values, written
from musigma.schema import Column, Schema

LEVELS = ("red", "green", "blue")


def randomized(model: AnyOrder, size: float = 0.5) -> AnyOrder:
    """A model with random weights; it starts with those of independent columns."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def discrete(smoothing: float = 1e-9) -> AnyOrder:
    """A model of a count, a category, a boolean and an ordinal that may be missing."""
    columns = (
        Column("n", "count"),
        Column("color", "category", LEVELS),
        Column("flag", "boolean", ("false", "true")),
        Column("size", "ordinal", ("S", "M", "L"), missing=True),
    )
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(0, k, 400) for k in (5, 3, 2, 3)], 1).astype(float)
    rows[::7, 3] = math.nan
    schema = Schema(columns).measure(rows)
    return randomized(AnyOrder(schema, hidden=24, blocks=1, smoothing=smoothing), 0.3)


def everything() -> torch.Tensor:
    """All rows of the discrete table."""
    return torch.tensor(
        list(itertools.product(range(5), range(3), range(2), [0, 1, 2, math.nan])),
        dtype=torch.float64,
    )


def mixed(n: int = 600, smoothing: float = 1e-3) -> tuple[AnyOrder, np.ndarray]:
    """A model of a number, a spike with a tail, a rounded number, a category and a date."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=n)
    spike = np.where(rng.uniform(size=n) < 0.3, 0.0, rng.exponential(size=n))
    price = (10 + first + rng.normal(size=n)).round(1)
    rows = np.stack(
        [first, spike, price, rng.integers(0, 3, n), rng.integers(18_000, 18_100, n)], 1
    )
    rows[::9, 0] = math.nan
    columns = (
        Column("x", missing=True),
        Column("spike"),
        Column("price", step=0.1),
        Column("color", "category", LEVELS),
        Column("day", "date"),
    )
    schema = Schema(columns).measure(rows, 32)
    return randomized(AnyOrder(schema, hidden=24, blocks=1, smoothing=smoothing), 0.1), rows


# --- scores ------------------------------------------------------------------------------------


@torch.no_grad()
def test_conditionals_are_those_of_states():
    model, rows = mixed()
    x, order = torch.tensor(rows[:40]), [3, 0, 4, 2, 1]
    found, seen = model.conditionals(x, order), torch.zeros(40, 5, dtype=torch.bool)
    for j in order:
        states = [model.state(x, seen)] * 5
        torch.testing.assert_close(found[:, j], model.log_values(states, x)[:, j])
        seen[:, j] = True
    states = model.others(x)
    for j in range(5):
        seen[:] = True
        seen[:, j] = False
        torch.testing.assert_close(states[j], model.state(x, seen))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_density_sums_to_one_in_every_order(seed):
    model = discrete()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
    total = questions.score(model, everything(), [order]).mixture
    outside = (1 - 2 / 402) * (1 - 1 / 402) ** 3  # numbers have two ends, unknown levels one
    assert np.exp(total).sum() == pytest.approx(outside, abs=2e-3)


def test_scores_of_several_orders_are_averaged_and_mixed():
    model, rows = mixed()
    orders = questions.orders(model, 3)
    assert orders[0] == list(range(5))
    assert len(orders) == 3
    found = questions.score(model, rows[:9], orders)
    each = np.stack([questions.score(model, rows[:9], [o]).mean for o in orders], 1)
    np.testing.assert_allclose(found.mean, each.mean(1))
    np.testing.assert_allclose(found.mixture, np.log(np.exp(each).mean(1)), rtol=1e-6)
    np.testing.assert_allclose(found.spread, each.std(1, ddof=1))
    assert found.spread.min() > 0
    assert not questions.score(model, rows[:9]).spread.any()


@torch.no_grad()
def test_missing_values_without_a_probability_are_summed_out():
    model = discrete()
    row = torch.tensor([[2.0, math.nan, 1.0, 0.0]], dtype=torch.float64)
    all_colors = row.repeat(3, 1)
    all_colors[:, 1] = torch.arange(3)
    for order in ([0, 2, 3, 1], [3, 0, 2, 1]):  # the color is last, so its sum is exact
        expected = model.log_prob_orders(all_colors, [order]).logsumexp(0)
        inside = math.log(1 - 1 / 402)
        found = model.log_prob_orders(row, [order])
        torch.testing.assert_close(found, expected[None] - inside, atol=1e-4, rtol=0)
    anywhere = model.log_prob_orders(row, [[1, 0, 2, 3], [0, 2, 1, 3], [0, 2, 3, 1]])
    torch.testing.assert_close(anywhere, anywhere[:, :1].expand(-1, 3))


@torch.no_grad()
def test_training_integrates_missing_values_out_too():
    model = discrete()
    x = torch.tensor([[2.0, math.nan, 1.0, 0.0], [0.0, 1.0, 0.0, math.nan]], dtype=torch.float64)
    orders = list(itertools.permutations(range(4)))
    expected = questions.score(model, x, orders).mean
    torch.manual_seed(0)
    found = model.estimate(x.repeat(20_000, 1)).unflatten(0, (-1, 2)).numpy()
    error = found.std(0) / math.sqrt(len(found))
    assert (np.abs(found.mean(0) - expected) < 4 * error).all()
    assert error.max() < 0.05
    nothing = torch.full((1, 4), math.nan, dtype=torch.float64)
    assert math.isfinite(float(model.estimate(nothing)))


def test_rows_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"expected an array \(N, 4\).*got shape \(2, 3\)"):
        questions.score(discrete(), np.zeros((2, 3)))


def test_samples_are_those_of_the_mixture_of_orders():
    model, x = discrete(), everything()
    model.orders = [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]]
    torch.manual_seed(0)
    drawn = model.sample(9000).numpy()
    assert fits(frequencies(drawn, x.numpy()), np.exp(questions.score(model, x).mixture), 9000)


@torch.no_grad()
def test_each_row_has_its_own_temperature():
    model = discrete()
    model.orders = [[0, 1, 2, 3], [3, 2, 1, 0]]
    x = everything()[::7]
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    cold = torch.full((len(x),), 1e-3)
    np.testing.assert_array_equal(
        model.fill(x, seen, temperature=cold), model.fill(x, seen, temperature=0.0)
    )


# --- reasons -----------------------------------------------------------------------------------


def test_surprise_is_minus_the_log_of_exact_conditionals():
    model, x = discrete(), everything()
    found = questions.surprise(model, x)
    p = np.exp(-found).reshape(5, 3, 2, 4, 4)
    for j in range(4):  # each conditional sums to one over its own column
        np.testing.assert_allclose(p[..., j].sum(j), 1 - (1 + (j == 0)) / 402, atol=1e-4)


@torch.no_grad()
def test_the_usual_surprise_is_its_mean_under_the_model():
    model, rows = mixed()
    x = rows[:1].repeat(2000, 0)
    for j in range(5):
        seen = torch.ones(2000, 5, dtype=torch.bool)
        seen[:, j] = False
        torch.manual_seed(j)
        drawn = model.fill(torch.tensor(x), seen, range(5)).numpy()
        assert abs(questions.explain(model, drawn).surprise[:, j].mean()) < 0.1, j


def test_units_cancel():
    model, rows = mixed()
    scaled = rows * [1000, 1, 1, 1, 1]
    columns = model.schema.columns
    schema = Schema((Column("x", missing=True), *columns[1:])).measure(scaled, 32)
    other = AnyOrder(schema, hidden=24, blocks=1).eval()
    other.load_state_dict(model.state_dict())
    a, b = (questions.surprise(m, x) for m, x in ((model, rows), (other, scaled)))
    present = ~np.isnan(rows[:, 0])
    np.testing.assert_allclose((b - a)[present, 0], math.log(1000), atol=1e-3)
    found = [
        questions.explain(m, x, 1) for m, x in ((model, rows[present]), (other, scaled[present]))
    ]
    np.testing.assert_allclose(found[0].surprise, found[1].surprise, atol=1e-3)
    assert found[0].columns == found[1].columns


def test_the_wrong_value_is_named():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(800, 4)).round(2)
    schema = Schema([Column(name, step=0.01) for name in "abcd"]).measure(rows)
    model = AnyOrder(schema, hidden=16).eval()
    rows[:4][np.arange(4), np.arange(4)] = 30.0
    found = questions.explain(model, rows[:4], 1)
    assert found.columns == [[0], [1], [2], [3]]
    for name, (text,) in zip("abcd", found.because, strict=True):
        assert text.startswith(f"{name} = 30.00 (expected -1.")


def test_values_that_training_never_saw_are_named():
    model, rows = mixed()
    strange = rows[1:4].copy()
    strange[0, 3], strange[1, 2], strange[2, 0] = 3, 1e6, math.nan
    found = questions.explain(model, strange, 1)
    assert found.columns[:2] == [[3], [2]]
    assert found.because[0][0].startswith("color = an unknown level (expected ")
    assert found.because[1][0].startswith("price = 1000000.0 (expected ")
    assert np.isfinite(found.surprise).all()
    assert found.surprise[:2].max(1).min() > 3


def test_values_are_written_in_words():
    assert written(Column("c", "category", LEVELS), 1) == "green"
    assert written(Column("c", "category", LEVELS), 3) == "an unknown level"
    assert written(Column("n", "count"), 18823) == "18823"
    assert written(Column("x", step=0.25), 1.5) == "1.50"
    assert written(Column("x"), math.pi * 1e9) == "3.14159e+09"
    assert written(Column("t", "datetime"), 86_399.0) == "1970-01-01T23:59:59"
    assert written(Column("x"), math.nan) == "missing"


# --- conditions --------------------------------------------------------------------------------

TYPED = Schema(
    [
        Column("age", "count"),
        Column("country", "category", ("FR", "DE", "US")),
        Column("ok", "boolean", ("no", "yes")),
        Column("x y", missing=True),
        Column("day", "date"),
        Column("carat", step=0.01),
        Column("size", "ordinal", ("S", "M", "L")),
        Column("code", "category", ("4", "6", "8.5")),
        Column("at", "datetime", step=60.0),
    ]
)


def typed(n: int = 400) -> np.ndarray:
    """Rows of `TYPED`, some of them with missing numbers."""
    rng = np.random.default_rng(0)
    columns = [
        *(rng.integers(17, 90, n), rng.integers(0, 3, n), rng.integers(0, 2, n)),
        *(rng.normal(size=n), rng.integers(19_000, 20_000, n), rng.integers(0, 300, n) / 100),
        *(rng.integers(0, 3, n), rng.integers(0, 3, n), 60.0 * rng.integers(0, 10**6, n)),
    ]
    rows = np.stack(columns, 1).astype(float)
    rows[::5, 3] = math.nan
    return rows


MEASURED = TYPED.measure(typed())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('country == "FR" and age >= 65', lambda r: (r[1] == 0) & (r[0] >= 65)),
        ("18 <= age < 65", lambda r: (r[0] >= 18) & (r[0] < 65)),
        ("70>age>=18.5", lambda r: (r[0] >= 18.5) & (r[0] < 70)),
        (
            "age in (20, 30) or age BETWEEN 40 AND 50",
            lambda r: np.isin(r[0], [20, 30, *range(40, 51)]),
        ),
        ("not (age < 40) and ok", lambda r: (r[0] >= 40) & (r[2] == 1)),
        ("not ok or ok == true", lambda r: r[2] < 2),
        ("`x y` is missing", lambda r: np.isnan(r[3])),
        ("not `x y` is not null", lambda r: np.isnan(r[3])),
        ("not (`x y` > 0.5)", lambda r: r[3] <= 0.5),
        ("`x y` != -1e-3 or `x y` is missing", lambda r: r[3] != -1e-3),
        ("not (`x y` > 0 or `x y` is missing)", lambda r: r[3] <= 0),
        ("day >= '2022-06-01'", lambda r: r[4] >= 19144),
        (f"day == '{np.datetime64(int(typed()[7, 4]), 'D')}'", lambda r: r[4] == r[4, 7]),
        ("at < '1971-01-01T00:00:00+01:00'", lambda r: r[8] < 365 * 86400 - 3600),
        ("0.57 == carat", lambda r: np.rint(r[5] * 100) == 57),
        ("carat > 0.57", lambda r: np.rint(r[5] * 100) > 57),
        ("carat <= 1.005", lambda r: np.rint(r[5] * 100) <= 100),
        ('size > "S" and not size == "L"', lambda r: r[6] == 1),
        ("code in [4.0, '8.5']", lambda r: r[7] != 1),
        ("country not in (\"FR\", 'DE')", lambda r: r[1] == 2),
        ("age not between 20 and 80", lambda r: (r[0] < 20) | (r[0] > 80)),
        ("((age > 20)) and (ok)", lambda r: (r[0] > 20) & (r[2] == 1)),
    ],
)
def test_a_condition_holds_where_it_says(text, expected):
    rows = typed()
    found = Condition.parse(text, MEASURED).holds(rows)
    np.testing.assert_array_equal(found, expected(rows.T))
    assert found.any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('cuntry == "FR"', "no column 'cuntry'; did you mean country?"),
        ('country == "Fr"', "'country' has no level \"Fr\"; did you mean 'FR'?"),
        ('country < "FR"', "is a category, which has no order: use == or in"),
        ('age == "a"', "'age' is a number: expected a number; got \"a\""),
        ("age == true", "expected a number; got true"),
        ("day > 5", 'is a date: expected a text such as "2024-01-31"; got 5'),
        ('day > "January"', "is a date"),
        ("age < 17", "no training value satisfies the condition; they are 17 to 89"),
        ("day > '2030-01-01'", "they are 2022-01-0"),
        ("age > 50 and age < 40", "'age': no value satisfies all that is asked of it"),
        ("`x y` == 0.3", "a single value of a continuous column has no probability"),
        ("age == 20.5", "no value satisfies the condition; they are whole numbers"),
        ("age is missing", "'age': its values are never missing"),
        ("age > 5 or ok", "`or`: joins conditions on different columns (age, ok)"),
        ("not (age > 50 and ok)", "`not` of `and`: joins conditions on different columns"),
        ("age = 50", "has '=' for '=='"),
        ("age > 50 & ok", "has '&' for 'and'"),
        ("country == FR", 'needs quotes ("FR")'),
        ("age == carat", "compares two columns"),
        ("age == missing", "needs 'is missing'"),
        ("age", "needs a comparison for 'age'"),
        ("age >", "needs a value at its end"),
        ("age 5", "needs a comparison"),
        ("(age > 50", "needs ')' at its end"),
        ("age > 50)", "needs 'and' at ')'"),
        ("age in ()", "needs a value at ')'"),
        ("5 < 6", "needs the name of a column at '6'"),
        ('country == "FR', "cannot be read at '\"FR'"),
        ("age == 1e999", "expected a number; got 1e999"),
        ("", "needs the name of a column"),
        ("(" * 60 + "age > 1" + ")" * 60, "more than 50 levels of parentheses"),
        ("ok and " * 20_000 + "ok", "at most 100,000 characters"),
        ("__import__('os').system('ls') and age > 1", "cannot be read|needs"),
    ],
)
def test_a_condition_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match=r"^where:") as caught:
        Condition.parse(text, MEASURED)
    assert any(part in str(caught.value) for part in reason.split("|"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1))
def test_levels_are_any_text(level):
    for text in (level, level + "\n\t"):
        schema = Schema([Column("c", "category", ("other", text))])
        quoted = json.dumps(text, ensure_ascii=False)
        found = Condition.parse(f"c == {quoted}", schema)
        assert found.holds(np.array([[0.0], [1.0]])).tolist() == [False, True]


def test_names_of_columns_are_any_text():
    names = ["a`b", "in", "true", "1", "zip code", "größe", "x.y"]
    schema = Schema([Column(name) for name in names])
    quoted = ["`a``b`", "`in`", "`true`", "`1`", "`zip code`", "größe", "x.y"]
    text = " and ".join(f"{name} > {i}" for i, name in enumerate(quoted))
    assert list(Condition.parse(text, schema).allowed) == list(range(len(names)))


def test_all_faults_of_a_condition_are_named():
    text = 'foo == 1 and country == "ZZ" and size > "XL" and age > 20 and age < 19 and ok is null'
    with pytest.raises(ValueError, match="where:") as caught:
        Condition.parse(text, MEASURED)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6
    for name, line in zip(["foo", "country", "size", "age", "ok"], lines[1:], strict=True):
        assert repr(name) in line


@given(st.text(alphabet="age ok><=!()'\"`,.15andortin[]&\\\n-_xyé", max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        found = Condition.parse(text, MEASURED)
    except ValueError as error:
        assert str(error).startswith("where:")  # noqa: PT017
    else:
        assert found.allowed


@st.composite
def conditions(draw, column: int = -1, depth: int = 3) -> tuple[str, object]:
    """A condition, and a function of a row that says whether it holds: True, False or None."""
    column = draw(st.sampled_from([0, 3])) if column < 0 else column
    name, low = (("age", 15), ("`x y`", -2))[column == 3]
    kind = draw(st.integers(0, 6 if depth else 3))
    if kind < 4:
        value = low + draw(st.integers(0, 8)) * (10 if column == 0 else 0.5)
        if kind == 3:
            return f"{name} is missing", lambda r: bool(np.isnan(r[column]))
        sign = draw(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]))
        return (
            f"{name} {sign} {value}",
            lambda r: None if np.isnan(r[column]) else eval(f"{r[column]} {sign} {value}"),
        )
    if kind == 4:
        text, holds = draw(conditions(column, depth - 1))
        return f"not ({text})", lambda r: None if (v := holds(r)) is None else not v
    (a, f), (b, g) = draw(conditions(column, depth - 1)), draw(conditions(column, depth - 1))
    word, unit = ("and", False) if kind == 5 else ("or", True)

    def joined(r):
        values = [f(r), g(r)]
        return unit if unit in values else None if None in values else not unit

    return f"({a}) {word} ({b})", joined


@settings(deadline=None)
@given(conditions(0), conditions(3))
def test_conditions_have_the_logic_of_missing_values(first, second):
    """Against the three truth values of SQL, applied to every row."""
    (a, f), (b, g) = first, second
    rows = typed(20)
    rows[::7, 0] = math.nan
    unmeasured = Schema([Column("age", "count", missing=True), *TYPED.columns[1:]])
    expected = [f(r) is True and g(r) is True for r in rows]
    try:
        found = Condition.parse(f"({a}) and ({b})", unmeasured).holds(rows)
    except ValueError as error:
        assert "no value satisfies" in str(error)  # noqa: PT017
        assert not any(expected)
    else:
        np.testing.assert_array_equal(found, expected)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4), st.data())
def test_sets_of_values(pairs, data):
    def build(pairs):
        union = Values()
        for low, width in pairs:
            union |= Values(((float(low), float(low + width)),))
        return union

    a = build(pairs)
    b = build(data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=4)))
    x = np.arange(-1, 14, 0.5)
    has = [np.any([(p <= x) & (x <= p + w) for p, w in pairs] or [x < x], axis=0)]
    np.testing.assert_array_equal(a.contains(x), has[0])
    np.testing.assert_array_equal((a & b).contains(x), a.contains(x) & b.contains(x))
    np.testing.assert_array_equal((a | b).contains(x), a.contains(x) | b.contains(x))


# --- samples under conditions ------------------------------------------------------------------


def frequencies(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """How often each of the rows x occurs."""
    place = {tuple(r): i for i, r in enumerate(np.nan_to_num(x, nan=-1).tolist())}
    found = [place[tuple(r)] for r in np.nan_to_num(rows, nan=-1).tolist()]
    return np.bincount(found, minlength=len(x))


def fits(counts: np.ndarray, p: np.ndarray, effective: float) -> bool:
    """Whether counts follow probabilities, by a chi-squared test; rare classes are merged."""
    p, n = p / p.sum(), counts.sum()
    common = p * n > 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * n
    keep = expected > 0
    assert not observed[~keep].any()
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum() * effective / n
    return bool(stats.chi2.sf(statistic, keep.sum() - 1) > 1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "n >= 2",
        'size == "M" and flag',
        'n in (1, 4) and color != "red" and size >= "M"',
        "size is missing and n < 2",
        'not flag and (size is missing or size == "S") and n != 0 and color in ("red", "blue")',
    ],
)
def test_samples_under_a_condition_against_exact_sums(text):
    model, x = discrete(), everything()
    condition = Condition.parse(text, model.schema)
    holds = torch.tensor(condition.holds(x.numpy()))
    torch.manual_seed(0)
    found = questions.sample_where(model, text, 6000)
    assert condition.holds(found.rows).all()
    columns = list(condition.allowed)
    rest = [j for j in range(4) if j not in columns]
    orders = itertools.permutations(columns)
    if len(columns) > 3:
        orders = [[columns[i] for i in o] for o in orders_of(len(columns), 6)]
    each = questions.score(model, x, [[*o, *rest] for o in orders]).each
    each = np.exp(each - np.logaddexp.reduce(each, axis=0))  # of the values inside
    exact = each.mean(1)
    error = max(found.standard_error, 1e-5)
    assert abs(found.probability - exact[holds].sum()) < 4 * error
    if len(columns) == 1:
        assert found.standard_error == 0
        assert found.effective == 6000
        assert "all rows have the same weight" in found.how
    else:
        assert "resampled" in found.how
        assert found.standard_error < 0.1 * found.probability
    worth = found.effective / 2  # resampled rows share the columns of the condition
    assert fits(frequencies(found.rows, x.numpy()), np.where(holds, exact, 0), worth)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "low", "high"), [("0.3 < spike < 1.234", 0.3, 1.234), ("spike >= 0.9", 0.9, 20.0)]
)
def test_a_range_of_a_continuous_column_against_quadrature(text, low, high):
    model, rows = mixed(smoothing=1e-9)
    torch.manual_seed(0)
    found = questions.sample_where(model, text, 4000)
    grid = np.linspace(low, high, 20_001)
    x = torch.tensor(rows[:1].repeat(len(grid), 0))
    x[:, 1] = torch.tensor(grid)
    inside = (grid > rows[:, 1].min()) & (grid < rows[:, 1].max())
    density = np.where(inside, model.conditionals(x, [1, 0, 2, 3, 4])[:, 1].exp().numpy(), 0)
    total = np.trapezoid(density, grid) if hasattr(np, "trapezoid") else np.trapz(density, grid)
    assert found.probability == pytest.approx(total / (1 - 2 / 602), rel=5e-3)
    below = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))) / total
    assert stats.kstest(np.interp(found.rows[:, 1], grid, below), "uniform").pvalue > 1e-4


def test_an_atom_and_missing_values_can_be_asked_for():
    model, _ = mixed()
    for text, p in (("spike == 0", None), ("`x` is missing", None), ("x is not missing", None)):
        found = questions.sample_where(model, text, 200)
        assert Condition.parse(text, model.schema).holds(found.rows).all(), p
        assert 0 < found.probability < 1
    both = [questions.sample_where(model, f"x is {t}missing", 5).probability for t in ("", "not ")]
    assert sum(both) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_all_rows_satisfy_the_condition(data):
    model, rows = MIXED
    parts = []
    for name, j in (("x", 0), ("spike", 1), ("price", 2)):
        if data.draw(st.booleans()):
            a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(rows) - 1)] * 2)))
            low, high = sorted(float(v) for v in np.nan_to_num(rows[[a, b], j]))
            signs = data.draw(st.sampled_from([("<=", "<="), ("<", "<="), ("<=", "<")]))
            parts.append(f"{low!r} {signs[0]} {name} {signs[1]} {high!r}")
    if data.draw(st.booleans()) or not parts:
        parts.append("day not between '2019-05-01' and '2019-05-20'")
    text = " and ".join(parts)
    try:
        condition = Condition.parse(text, model.schema)
    except ValueError as error:
        assert "no value" in str(error) or "no probability" in str(error)  # noqa: PT017
        return
    found = questions.sample_where(model, condition, 50)
    assert found.rows.shape == (50, 5)
    assert condition.holds(found.rows).all()
    assert 0 < found.probability <= 1 + 1e-6
    assert 0 < found.effective <= 50


MIXED = mixed()


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="n: expected 1 or more rows; got 0"):
        questions.sample_where(discrete(), "flag", 0)


# --- missing values ----------------------------------------------------------------------------


@torch.no_grad()
def exact_holes(model: AnyOrder, row: torch.Tensor, order: list[int]) -> np.ndarray:
    """Probabilities of all ways to fill a row of the discrete table, in one order."""
    x = everything()[~everything().isnan().any(1)]
    hole = row.isnan()
    p = torch.where((x == row)[:, ~hole].all(1), 1.0, 0.0).double()
    seen = (~hole).expand_as(x).clone()
    for j in order:
        if hole[j]:
            log = model.logits(model.state(x, seen), j).log_softmax(1)
            log = log[:, : len(model.schema.columns[j].measured)].log_softmax(1)
            p *= log.gather(1, x[:, j, None].long())[:, 0].exp()
            seen[:, j] = True
    return p.numpy()


def test_draws_of_missing_values_against_exact_conditionals():
    model = discrete()
    rows = np.array(
        [
            [2, math.nan, 1, math.nan],
            [math.nan, 1, math.nan, 2],
            [math.nan] * 4,
            [0, 0, 0, 0],
        ]
    )
    torch.manual_seed(0)
    found = questions.impute(model, rows, 3000)
    assert len(found.cells) == 2 + 2 + 4
    filled = np.stack([found.filled(i) for i in range(3000)])
    assert not np.isnan(filled).any()
    np.testing.assert_array_equal(filled[:, 3], rows[[3]].repeat(3000, 0))
    x = everything()[~everything().isnan().any(1)].numpy()
    for i in range(3):
        orders = questions.orders(model, 5)
        p = [exact_holes(model, torch.tensor(rows[i]), list(o)) for o in orders]
        assert fits(frequencies(filled[:, i], x), np.mean(p, 0), 3000)
    summary = found.summary()[0]
    assert (summary["row"], summary["column"]) == (0, "color")
    drawn = filled[:, 0, 1]
    mode = int(np.bincount(drawn.astype(int)).argmax())
    assert summary["mode"] == LEVELS[mode]
    assert summary["share"] == pytest.approx((drawn == mode).mean())
    assert found.center()[0, 1] == mode
    assert found.center()[2, 0] == pytest.approx(filled[:, 2, 0].mean())


def test_summaries_of_numbers_and_dates():
    model, rows = mixed()
    rows = rows[:5].copy()
    rows[0, 4] = rows[1, 2] = math.nan
    found = {s["column"]: s for s in questions.impute(model, rows, 50).summary()}
    assert found["day"]["q05"] <= found["day"]["mean"] <= found["day"]["q95"]
    assert found["day"]["mean"].startswith("2019-")
    price = found["price"]
    assert price["q05"] <= price["q50"] <= price["q95"]
    assert abs(price["mean"] - price["q50"]) < 4 * price["std"]
    assert questions.impute(model, rows[2:4] * 0, 3).draws.shape == (0, 3)


def test_whole_columns_are_completed_as_in_training():
    model = discrete()
    rows = np.full((3000, 4), math.nan)
    rows[:, 0] = 1
    torch.manual_seed(0)
    filled = questions.complete(model, rows, missing=[3])
    x = everything()
    p = np.exp(questions.score(model, x, [[0, 1, 2, 3]]).mean) * (x[:, 0] == 1).numpy()
    assert fits(frequencies(filled, x.numpy()), p, 3000)
    assert np.isnan(filled[:, 3]).any()
    assert not np.isnan(questions.complete(model, rows)).any()


@torch.no_grad()
def test_conditional_densities_given_some_values():
    model, rows = mixed()
    rng = np.random.default_rng(0)
    seen = rng.uniform(size=rows.shape) < 0.5
    found = questions.log_prob_given(model, rows, seen)
    assert not found[seen].any()
    for i in range(3):
        before = np.flatnonzero(seen[i]).tolist()
        for j in np.flatnonzero(~seen[i]).tolist():
            order = [*before, j, *(k for k in range(5) if k not in before and k != j)]
            exact = model.conditionals(torch.tensor(rows[i : i + 1]), order)[0, j]
            assert found[i, j] == pytest.approx(float(exact), abs=1e-4)


def test_a_column_without_values_cannot_be_drawn():
    rows = np.stack([np.arange(50.0), np.full(50, math.nan)], 1)
    schema = Schema([Column("a", "count"), Column("b", missing=True)]).measure(rows)
    model = AnyOrder(schema, hidden=8).eval()
    with pytest.raises(ValueError, match="'b': its values were all missing in training"):
        questions.impute(model, rows[:2], 2)
    assert np.isnan(questions.complete(model, rows[:2], missing=[1])[:, 1]).all()
    with pytest.raises(ValueError, match="n: expected 1 or more draws; got 0"):
        questions.impute(model, rows, 0)


# --- one column --------------------------------------------------------------------------------


def test_the_distribution_of_one_column_against_exact_sums():
    model, x = discrete(), everything()
    p = np.exp(questions.score(model, x, [[3, 2, 0, 1]]).mean)
    p /= p.sum()
    alone = questions.marginal(model, "size")
    exact = [p[(x[:, 3] == k).numpy()].sum() for k in range(3)]
    np.testing.assert_allclose(alone.probabilities, exact, atol=1e-5)
    assert alone.missing == pytest.approx(p[x[:, 3].isnan().numpy()].sum(), abs=1e-5)
    assert alone.probability('size in ("S", "L")') == pytest.approx(exact[0] + exact[2], abs=1e-5)
    assert alone.probability("size is missing") == pytest.approx(alone.missing)
    some = (x[:, 3].isnan() & (x[:, 2] == 1)).numpy()
    found = questions.marginal(model, "n", {"size": None, "flag": True})
    exact = [p[some & (x[:, 0] == k).numpy()].sum() for k in range(5)]
    np.testing.assert_allclose(found.probabilities, np.array(exact) / p[some].sum(), atol=1e-5)
    below = np.cumsum(found.probabilities)
    assert found.quantile(below[1] + 1e-6) == 2
    assert found.quantile(below[1] - 1e-6) == 1


def test_a_rare_condition_has_its_probability_under_the_scored_density():
    model = discrete(smoothing=0.01)
    model.bias.data[4] = -20.0
    found = questions.sample_where(model, "n == 4", 10)
    exact = questions.marginal(model, "n").probability("n == 4")
    assert found.probability == pytest.approx(exact, rel=1e-5)
    assert exact == pytest.approx(0.01 * (model.log_marginal[4].exp().item()), rel=1e-3)


def test_quantiles_and_probabilities_of_a_number_agree():
    model, _ = mixed()
    found = questions.marginal(model, "x", {"color": "red", "day": "2019-06-01", "price": 10.5})
    for q in (0.05, 0.3, 0.77):
        p = found.probability(f"x <= {found.quantile(q)!r}")
        assert p == pytest.approx(q * (1 - found.missing), abs=1e-3)
    day = (np.datetime64("2019-06-01") - np.datetime64("1970-01-01")).astype(int)
    known = torch.tensor([[0, 0, 10.5, LEVELS.index("red"), day]], dtype=torch.float64)
    seen = torch.tensor([[False, False, True, True, True]])
    rows = model.fill(known.repeat(3000, 1), seen.repeat(3000, 1), [0, 1, 2, 3, 4], missing=())
    drawn = rows[:, 0].numpy()
    assert abs((drawn < found.quantile(0.3)).mean() - 0.3) < 0.05


def test_a_distribution_that_cannot_be_asked_for():
    model = discrete()
    with pytest.raises(ValueError, match="'color' has no level \"grene\"; did you mean 'green'"):
        questions.marginal(model, "n", {"color": "grene"})
    with pytest.raises(ValueError, match="given: 'n' is the column that is asked for"):
        questions.marginal(model, "n", {"n": 1})
    with pytest.raises(ValueError, match="expected one of n, color"):
        questions.marginal(model, "m")
    with pytest.raises(ValueError, match="quantile: 'color' is a category"):
        questions.marginal(model, "color").quantile(0.5)
