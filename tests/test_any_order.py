"""The any-order density of typed rows: normalized in every order, unbiased, exact in samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from musigma import checkpoint
from musigma.any_order import AnyOrder, orders_of
from musigma.distributions import Binning
from musigma.schema import Column, Schema
from musigma.spec import Spec
from musigma.zoo import build


def randomized(model, seed=0):
    """A model whose factors depend on what is seen."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


def small_schema(seed=0):
    """A category, an ordinal with missing values, a count and a boolean, all with few values."""
    rng = np.random.default_rng(seed)
    n = 300
    rows = np.stack(
        [
            rng.integers(0, 3, n),
            np.where(rng.random(n) < 0.2, np.nan, rng.integers(0, 4, n)),
            rng.poisson(1.5, n),
            rng.integers(0, 2, n),
        ],
        1,
    ).astype(np.float64)
    columns = [
        Column("color", "category", ("red", "green", "blue")),
        Column("size", "ordinal", ("s", "m", "l", "xl"), missing=True),
        Column("visits", "count"),
        Column("paid", "boolean", ("no", "yes")),
    ]
    return Schema(tuple(columns)).measure(rows), rows


def mixed_schema(seed=0):
    """Continuous columns with a spike, with a grid, with missing values, and heavy tails."""
    rng = np.random.default_rng(seed)
    n = 2000
    rows = np.stack(
        [
            np.where(rng.random(n) < 0.3, 0.0, rng.gamma(2.0, 1.0, n)),
            rng.normal(5, 2, n).round(1),
            np.where(rng.random(n) < 0.1, np.nan, rng.standard_cauchy(n)),
            rng.integers(0, 3, n),
        ],
        1,
    )
    columns = [
        Column("rain"),
        Column("length", step=0.1),
        Column("ratio", missing=True),
        Column("kind", "category", ("a", "b", "c")),
    ]
    return Schema(tuple(columns)).measure(rows), rows


numbers = st.one_of(
    st.floats(-1e6, 1e6, allow_subnormal=False), st.integers(-3, 3).map(float), st.just(math.nan)
)


@given(st.lists(numbers, min_size=1, max_size=400), st.sampled_from([None, 1.0, 0.01]))
@settings(max_examples=60, deadline=None)
def test_every_training_value_is_in_the_cell_that_counts_it(values, step):
    x = np.array(values)
    x = np.append(np.rint(x / step) * step if step else x, 0.25 if step is None else 1.0)
    column = Column("x", step=step, missing=bool(np.isnan(x).any())).measure(x, 20)
    cells, binning = column.cells, Binning(Schema((column,)))
    code = binning.locate(torch.tensor(x[:, None]))[:, 0]
    counts = np.bincount(code.numpy(), minlength=binning.sizes[0])
    assert counts.tolist() == [*cells.counts, *([cells.missing] if column.missing else [])]
    assert (np.diff(cells.edges) >= 0).all()
    rank = binning.rank(torch.tensor(x[:, None]), code[:, None])[:, 0].numpy()
    order = np.argsort(x[~np.isnan(x)], kind="stable")
    assert (np.diff(rank[~np.isnan(x)][order]) >= -1e-6).all()


def test_cells_resolve_the_tails():
    x = np.random.default_rng(0).standard_cauchy(20_000)
    cells = Column("x").measure(x, 64).cells
    assert max(cells.counts) <= 1.1 * len(x) / 64
    assert cells.counts[0] <= 5
    assert cells.counts[-1] <= 5


def all_rows(schema):
    """Every row of a table whose columns have few values, and their unknown levels."""
    values = []
    for column in schema.columns:
        inside = (np.array(column.cells.edges[:-1]) + np.array(column.cells.edges[1:])) / 2
        values.append([*inside, *([np.nan] if column.missing else [])])
    return torch.tensor(list(itertools.product(*values)), dtype=torch.float64)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_probabilities_sum_to_one_in_every_order(order):
    schema, _ = small_schema()
    model = randomized(AnyOrder(schema, hidden=32, blocks=2))
    rows = all_rows(schema)
    inside = model.log_prob_orders(rows, [order])[:, 0].double().logsumexp(0).exp()
    outside = 1 / (300 + 2)  # at both ends of the count, and of unknown levels
    assert inside.item() == pytest.approx((1 - outside) ** 3 * (1 - 2 * outside), abs=1e-5)


def test_values_outside_have_the_probability_that_is_stated():
    schema, _ = small_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    known = torch.tensor([[1.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    unknown = known.clone()
    unknown[0, 0] = 3.0
    far = known.repeat(400, 1)
    top = schema.columns[2].cells.edges[-1] + 0.5
    far[:, 2] = top + torch.arange(400)
    assert model.conditionals(unknown, range(4))[0, 0].exp().item() == pytest.approx(1 / 302)
    total = model.conditionals(far, range(4))[:, 2].double().exp().sum().item()
    assert total == pytest.approx(1 / 302, rel=1e-4)


@pytest.mark.parametrize("missing", [True, False])
def test_all_rows_have_a_probability_of_one(missing):
    """Also in a column of levels, with unknown ones, and in one without a training value."""
    rows = np.stack([np.arange(40) % 3, np.full(40, np.nan)], 1)
    columns = Column("kind", "category", ("a", "b", "c")), Column("n", "count", missing=missing)
    model = randomized(AnyOrder(Schema(columns).measure(rows), hidden=16))
    numbers = [*range(-60, 60), *([math.nan] if missing else [])]
    every = torch.tensor(list(itertools.product(range(4), numbers)), dtype=torch.float64)
    total = model.log_prob_orders(every, [[0, 1], [1, 0]]).double().exp().sum(0)
    assert total.tolist() == pytest.approx([1, 1], abs=1e-5)
    assert model.estimate(torch.tensor(rows)).isfinite().all()
    assert model.sample(5)[:, 1].isnan().all()


def test_a_temperature_may_be_zero_in_some_rows():
    schema, _ = mixed_schema()
    model = randomized(AnyOrder(schema, hidden=16))
    heat = torch.tensor([0.0, 1.0]).repeat(50)
    x = model.fill(
        torch.zeros(100, 4).double(), torch.zeros(100, 4).bool(), range(4), temperature=heat
    )
    assert len(x[::2].unique(dim=0)) == 1
    assert len(x[1::2].unique(dim=0)) == 50


def test_the_largest_value_is_in_the_last_cell_however_large_it_is():
    x = np.append(np.random.default_rng(0).normal(size=400) * 1e-6, [-1e14, 1e14])[:, None]
    binning = Binning(Schema([Column("a")]).measure(x))
    assert binning.locate(torch.tensor(x)).min() == 0


def test_a_frequent_value_on_a_grid_has_a_cell_of_its_own():
    rng = np.random.default_rng(0)
    x = np.where(rng.random(20_000) < 0.3, 2.0, np.exp(rng.normal(size=20_000)).round(2))
    column = Column("carat", step=0.01).measure(x)
    binning = Binning(Schema([column]))
    code = int(binning.locate(torch.tensor([[2.0]], dtype=torch.float64)))
    assert column.cells.counts[code] == (x == 2.0).sum()
    assert len(column.cells) < 160


def test_the_density_of_a_continuous_column_integrates_to_one():
    schema, rows = mixed_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    for j, spikes in ((0, [0.0]), (1, []), (2, [])):
        cells = schema.columns[j].cells
        low, high = cells.edges[0] - 60 * cells.left, cells.edges[-1] + 60 * cells.right
        ends = np.unique([low, *cells.edges, high])
        tails = [np.linspace(low, cells.edges[0], 4001), np.linspace(cells.edges[-1], high, 4001)]
        ends = np.unique(np.concatenate([ends, *tails]))
        middle, width = (ends[1:] + ends[:-1]) / 2, np.diff(ends)
        x = torch.tensor(rows[:1]).repeat(len(middle), 1)
        x[:, j] = torch.tensor(middle)
        density = model.conditionals(x, [3, *(i for i in range(3) if i != j), j])[:, j].detach()
        total = (density.double().exp().numpy() * width).sum()
        points = torch.tensor(rows[:1]).repeat(len(spikes) + schema.columns[j].missing, 1)
        points[:, j] = torch.tensor([*spikes, *([math.nan] if schema.columns[j].missing else [])])
        if len(points):
            order = [3, *(i for i in range(3) if i != j), j]
            total += model.conditionals(points, order)[:, j].double().exp().sum().item()
        assert total == pytest.approx(1, abs=2e-3), schema.columns[j].name


def test_a_spike_is_a_probability_and_not_a_density():
    schema, rows = mixed_schema()
    cells = schema.columns[0].cells
    twice = [a for a, b in itertools.pairwise(cells.edges) if a == b]
    assert twice == [0.0]
    marginal = AnyOrder(schema).eval()  # without training, each column has its marginal
    x = torch.tensor(rows[:1])
    x[0, 0] = 0.0
    share = (rows[:, 0] == 0).mean()
    assert marginal.conditionals(x, range(4))[0, 0].exp().item() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("subsets", [1, 3])
def test_the_training_estimate_is_unbiased(subsets):
    schema, rows = small_schema()
    model = randomized(AnyOrder(schema, hidden=32, subsets=subsets))
    x = torch.tensor(rows[:3])
    orders = list(itertools.permutations(range(4)))
    exact = model.log_prob_orders(x, orders).mean(1)
    draws = 3000
    estimates = model.estimate(x.repeat_interleave(draws, 0)).reshape(3, draws)
    error = estimates.std(1) / math.sqrt(draws)
    assert (abs(estimates.mean(1) - exact) < 4 * error).all()


def test_conditionals_are_those_of_the_masked_network():
    schema, rows = mixed_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    x = torch.tensor(rows[:20])
    order, code = [2, 0, 3, 1], model.binning.locate(x)
    together = model.conditionals(x, order)
    for k, j in enumerate(order):
        seen = torch.zeros(len(x), 4, dtype=torch.bool)
        seen[:, order[:k]] = True
        log = model.log_cells(model.state(x, seen), j).gather(1, code[:, [j]].clamp(min=0))[:, 0]
        alone = log + model.log_inside[j] + model.binning.log_density(x, code)[:, j]
        assert torch.allclose(alone, together[:, j], atol=1e-4)


def test_samples_have_the_probabilities_of_the_model():
    schema, _ = small_schema()
    model = randomized(AnyOrder(schema, hidden=32, smoothing=1e-6))
    torch.manual_seed(1)
    rows, x = all_rows(schema), model.sample(20_000)
    p = model.log_prob(rows).detach().double().exp()
    p = (p / p.sum()).numpy()
    key = {tuple(np.nan_to_num(r, nan=-1)): i for i, r in enumerate(rows.numpy())}
    index = [key[tuple(np.nan_to_num(r, nan=-1))] for r in x.numpy()]
    seen = np.bincount(index, minlength=len(rows))
    often = p * len(x) >= 5
    observed = [*seen[often], seen[~often].sum()]
    expected = np.array([*p[often], p[~often].sum()]) * len(x)
    assert stats.chisquare(observed, expected * sum(observed) / expected.sum()).pvalue > 1e-4


def test_samples_lie_on_the_grid_and_in_the_range():
    schema, rows = mixed_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    x = model.sample(500).numpy()
    assert np.allclose(x[:, 1] * 10, np.rint(x[:, 1] * 10))
    low, high = np.nanmin(rows, 0), np.nanmax(rows, 0)
    assert (np.isnan(x) | ((x >= low) & (x <= high))).all()
    assert np.isnan(x[:, 2]).any()
    assert not np.isnan(x[:, [0, 1, 3]]).any()
    assert (x[:, 0] == 0).any()


def test_a_mixture_of_orders_is_the_mean_of_their_densities():
    schema, rows = small_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    x = torch.tensor(rows[:9])
    model.orders = orders_of(4, 5)
    each = model.log_prob_orders(x, model.orders)
    assert torch.allclose(model.log_prob(x), each.exp().mean(1).log(), atol=1e-5)


def test_temperature_zero_takes_the_most_probable_cells():
    schema, _ = small_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    x = model.sample(4, temperature=0)
    cold = model.sample(200, temperature=0.05)
    assert (torch.nan_to_num(x) == torch.nan_to_num(x[0])).all()
    same = (torch.nan_to_num(cold) == torch.nan_to_num(x[0])).all(1).float().mean()
    warm = model.sample(200, temperature=1.0)
    assert same > (torch.nan_to_num(warm) == torch.nan_to_num(x[0])).all(1).float().mean()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_units_only_add_a_constant(scale):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(3, 1, 800), rng.gamma(2, 1, 800)], 1)
    plain = Schema((Column("a"), Column("b"))).measure(rows)
    scaled = Schema((Column("a"), Column("b"))).measure(rows * [scale, 1])
    torch.manual_seed(0)
    first = randomized(AnyOrder(plain, hidden=32))
    second = AnyOrder(scaled, hidden=32).eval()
    second.load_state_dict(first.state_dict())
    x = torch.tensor(rng.normal(2, 3, (200, 2)))
    y = x * torch.tensor([scale, 1.0])
    difference = first.log_prob(x) - second.log_prob(y)
    assert torch.allclose(difference, torch.tensor(math.log(scale)), atol=1e-3)


def test_ten_thousand_categories():
    rng = np.random.default_rng(0)
    words = tuple(f"w{i}" for i in range(10_000))
    rows = np.stack([rng.integers(0, 10_000, 5000), rng.normal(size=5000)], 1)
    schema = Schema((Column("word", "category", words), Column("x"))).measure(rows)
    model = AnyOrder(schema, hidden=16, embedding=4)
    assert sum(p.numel() for p in model.parameters()) < 10_000 * (16 + 1 + 4) + 20_000
    model.log_prob(torch.tensor(rows[:8])).sum().backward()
    assert model.eval().sample(8).shape == (8, 2)


def test_a_context_changes_the_density():
    schema, rows = small_schema()
    model = randomized(AnyOrder(schema, hidden=32, context=3))
    x, context = torch.tensor(rows[:6]), torch.randn(6, 3)
    assert not torch.allclose(model.log_prob(x, context), model.log_prob(x, context + 1))
    assert model.sample(6, context).shape == (6, 4)


def test_a_file_holds_the_model_with_its_schema(tmp_path):
    schema, rows = mixed_schema()
    model = build("table", Spec((4,), schema=schema), hidden=32, orders=3)
    randomized(model)
    checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors")
    x = torch.tensor(rows[:50])
    assert again.spec.schema == schema
    assert torch.equal(again.log_prob(x), model.log_prob(x))


def test_half_precision_keeps_the_cells(tmp_path):
    schema, rows = mixed_schema()
    model = randomized(AnyOrder(schema, hidden=32))
    half, x = AnyOrder(schema, hidden=32), torch.tensor(rows[:50])
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16).eval()
    assert torch.equal(half.binning.locate(x), Binning(schema).locate(x))


def test_without_a_schema_it_says_what_to_do():
    with pytest.raises(ValueError, match="read the data with a schema"):
        build("table", (3,))
    schema, _ = small_schema()
    with pytest.raises(ValueError, match=r"takes no typed columns; .*table"):
        build("glow", Spec((4,), schema=schema))
