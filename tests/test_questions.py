"""What is asked of a density of rows, against exact sums over small tables."""

import itertools
import math

import numpy as np
import pytest
import torch

from musigma import questions
from musigma.any_order import AnyOrder
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


def mixed(n: int = 600) -> tuple[AnyOrder, np.ndarray]:
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
    return randomized(AnyOrder(schema, hidden=24, blocks=1), 0.3), rows


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
    outside = math.prod(1 - 2 / 402 if j < 4 else 1 for j in range(4))
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
        inside = math.log(1 - 2 / 402)
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


# --- reasons -----------------------------------------------------------------------------------


def test_surprise_is_minus_the_log_of_exact_conditionals():
    model, x = discrete(), everything()
    found = questions.surprise(model, x)
    p = np.exp(-found).reshape(5, 3, 2, 4, 4)
    for j in range(4):  # each conditional sums to one over its own column
        np.testing.assert_allclose(p[..., j].sum(j), 1 - 2 / 402, atol=2e-3)


@torch.no_grad()
def test_the_usual_surprise_is_its_mean_under_the_model():
    model, rows = mixed()
    x = rows[:1].repeat(4000, 0)
    for j in range(5):
        seen = torch.ones(4000, 5, dtype=torch.bool)
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


def test_values_are_written_in_words():
    written = questions.written
    assert written(Column("c", "category", LEVELS), 1) == "green"
    assert written(Column("c", "category", LEVELS), 3) == "an unknown level"
    assert written(Column("n", "count"), 18823) == "18823"
    assert written(Column("x", step=0.25), 1.5) == "1.50"
    assert written(Column("x"), math.pi * 1e9) == "3.14159e+09"
    assert written(Column("t", "datetime"), 86_399.0) == "1970-01-01T23:59:59"
    assert written(Column("x"), math.nan) == "missing"
