"""Typed columns as normal variables: densities, normalization, units, exact inverses."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from musigma import checkpoint
from musigma.coding.coder import find_grids
from musigma.data import Dataset
from musigma.distributions import StandardNormal
from musigma.layers import Marginals, standardizer
from musigma.model import Chain, Prior
from musigma.schema import Column, Schema
from musigma.spec import Spec, Variable
from musigma.testing import randomized
from musigma.trace import Trace
from musigma.training import TrainConfig, fit
from musigma.zoo import build
from musigma.zoo.vaes.vae import vae

SMALL = {
    "nsf": {"depth": 2, "hidden": 8},
    "maf": {"depth": 2, "hidden": 8},
    "realnvp": {"depth": 2, "hidden": 8},
    "vae": {"latents": 2, "width": 8},
    "mlp_vae": {"latents": 2, "hidden": 8},
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def mixed(n=600, seed=0):
    """Rows of columns of every kind: with an atom, missing values, grids, levels."""
    rng = np.random.default_rng(seed)
    rows = np.stack(
        [
            rng.normal(size=n) ** 3,
            np.where(rng.random(n) < 0.2, 0.0, rng.gamma(2, size=n)),
            np.where(rng.random(n) < 0.2, np.nan, rng.lognormal(size=n)),
            rng.poisson(3, n),
            rng.integers(0, 3, n),
            rng.integers(-4000, 4000, n) / 100,
            rng.binomial(9, 0.4, n) * 5 / 100,
            np.where(rng.random(n) < 0.1, np.nan, rng.integers(20_000, 20_040, n)),
        ],
        1,
    )
    columns = [
        Column("cube"),
        Column("spike"),
        Column("holes", missing=True),
        Column("count", "count"),
        Column("level", "category", ("a", "b", "c")),
        Column("grid", step=0.01),
        Column("rounded", step=0.05, rounded=True),
        Column("day", "date", missing=True),
    ]
    return Schema(columns).measure(rows, 24), rows


def independent(schema):
    """The product of the marginals, as a model."""
    return Chain([Marginals(schema)], Prior(StandardNormal((len(schema),)))).double()


def logarithms_of(column, x):
    """Oracle: log of the density or probability of each value, from scipy's distributions."""
    c, n = column.cells, sum(column.cells.counts) + column.missing * column.cells.missing
    edges, counts = np.array(c.edges), np.array(c.counts) + 0.5
    total = counts.sum() + column.missing * (c.missing + 0.5)
    ends = 1 if column.has_levels else 2
    inside = n / (n + ends) * counts / total
    result = np.full(len(x), np.log(n / (n + ends) * (c.missing + 0.5) / total))
    atoms = np.flatnonzero(np.diff(edges) == 0)
    histogram = stats.rv_histogram(
        (np.delete(inside, atoms), np.delete(edges, atoms)), density=False
    )
    real = histogram.logpdf(x) + np.log(np.delete(inside, atoms).sum())
    unit = math.log(column.grid) if column.is_discrete else 0.0
    result = np.where(np.isnan(x), result, real + unit)
    for k in atoms:
        result = np.where(x == edges[k], np.log(inside[k]), result)
    for side, scale in ((x - edges[-1], c.right), (edges[0] - x, c.left)):
        if column.has_levels:
            tail = np.zeros(len(x))
        elif column.grid:
            ratio = 1 - np.exp(-column.grid / scale)
            tail = stats.geom(ratio).logpmf(np.floor(side / column.grid) + 1)
            tail = tail + unit - math.log(column.grid)
        else:
            tail = stats.expon(scale=scale).logpdf(side)
        result = np.where(side > 0, tail - math.log(n + ends), result)
    return result


@pytest.mark.parametrize("j", range(8))
def test_densities_are_those_of_scipy(j):
    schema, rows = mixed()
    column = schema.columns[j]
    c = column.cells
    scale = 3 * (column.grid or max(c.left, c.right))
    far = [c.edges[0] - scale / 2, c.edges[-1] + scale / 2, c.edges[-1] + 40.5 * scale]
    x = np.append(rows[:300, j], [3.0] if column.has_levels else column.on_grid(np.array(far)))
    model = independent(Schema([column]))
    for _ in range(3):  # whatever the draw
        nats = model(torch.tensor(x[:, None]), closed_form=False).elbo.numpy()
        np.testing.assert_allclose(nats, logarithms_of(column, x), rtol=0, atol=1e-9)


def test_columns_are_standard_normal():
    schema, rows = mixed(3000)
    y = Marginals(schema).double().infer(torch.tensor(rows), Trace()).numpy()
    for column in y.T:
        assert stats.kstest(column, "norm").pvalue > 1e-4
    fresh = Marginals(schema).double().infer(torch.tensor(mixed(3000, seed=1)[1]), Trace()).numpy()
    for column in fresh.T:
        assert abs(column.mean()) < 0.1
        assert column.std() == pytest.approx(1, abs=0.1)


def everything(schema, nodes, far=8):
    """All rows of a table and their weights: quadrature of densities, enumerated values."""
    values = []
    for column in schema.columns:
        c, own = column.cells, []
        if column.has_levels:
            own = [(k, 1.0) for k in range(len(column.levels) + 1)]
        elif column.grid:
            end = far * max(c.left, c.right)
            grid = np.arange(c.edges[0] - column.grid / 2 - end, c.edges[-1] + end, column.grid)
            weight = 1.0 if column.is_discrete else column.grid
            own = [(x, weight) for x in column.on_grid(grid)]
        else:
            at, w = np.polynomial.legendre.leggauss(nodes)
            ends = [*(c.edges[0] - c.left * t for t in (8, 3, 1)), *c.edges]
            ends += [c.edges[-1] + c.right * t for t in (1, 3, 8)]
            for low, high in itertools.pairwise(ends):
                if high == low:
                    own.append((low, 1.0))
                else:
                    half = (high - low) / 2
                    own += [(low + half + half * a, half * b) for a, b in zip(at, w, strict=True)]
        own += [(math.nan, 1.0)] if column.missing else []
        values.append(own)
    pairs = np.array(list(itertools.product(*values)))
    return torch.tensor(pairs[..., 0]), torch.tensor(pairs[..., 1].prod(1))


@pytest.mark.parametrize("name", ["nsf", "maf"])
def test_a_flow_of_mixed_rows_sums_and_integrates_to_one(name):
    rng = np.random.default_rng(0)
    rows = np.stack(
        [
            np.where(rng.random(300) < 0.3, 0.0, rng.gamma(2, size=300)),
            np.where(rng.random(300) < 0.3, np.nan, rng.binomial(2, 0.4, 300)),
            rng.integers(0, 2, 300),
        ],
        1,
    )
    columns = Column("a"), Column("b", "count", missing=True), Column("c", "boolean", ("n", "y"))
    schema = Schema(columns).measure(rows, 8)
    model = randomized(build(name, Spec((3,), schema=schema), depth=1, hidden=8))
    x, weights = everything(schema, 3)
    draws = 12
    with torch.no_grad():
        log_w = model(x.repeat(draws, 1), closed_form=False).elbo.reshape(draws, -1)
    totals = (log_w.exp() * weights).sum(1)
    assert totals.mean().item() == pytest.approx(
        1, abs=4 * float(totals.std()) / draws**0.5 + 3e-3
    )
    total = (independent(schema)(x, closed_form=False).elbo.exp() * weights).sum()
    assert total.item() == pytest.approx(1, abs=1e-3)
    assert (log_w.exp() * weights).std() > 0  # the flow is not the product of the marginals


def test_a_density_on_a_grid_is_a_probability_per_step():
    schema, _ = mixed()
    column = schema.columns[schema.index("grid")]
    x, _ = everything(Schema([column]), 1, far=20)
    density, mass = (
        independent(Schema([Column(**(vars(column) | {"rounded": rounded}))]))
        for rounded in (False, True)
    )
    nats = density(x, closed_form=False).elbo
    assert not density.exact
    torch.testing.assert_close(nats, mass(x, closed_form=False).elbo - math.log(0.01))
    assert (nats.exp().sum() * 0.01).item() == pytest.approx(1, abs=1e-9)
    between = x + 0.003  # counts as the nearest number
    torch.testing.assert_close(density(between, closed_form=False).elbo, nats)
    torch.testing.assert_close(density.reconstruct(between), x)


def test_missing_values_without_a_probability_are_integrated_out():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 2))
    rows[:30, 1] = np.nan
    schema = Schema([Column("a"), Column("b")]).measure(rows, 8)
    model = randomized(build("nsf", Spec((2,), schema=schema), depth=2, hidden=8))
    assert not model.exact
    x, weights = everything(Schema(schema.columns[1:]), 8)
    a = torch.tensor([0.3, -1.2]).double()
    known = torch.cartesian_prod(a, x[:, 0])
    with torch.no_grad():
        p = model(known, closed_form=False).elbo.exp().reshape(2, -1) @ weights
        hole = torch.stack([a, torch.full_like(a, math.nan)], 1)
        bound = model.iwae(hole, 20_000, at_once=20_000).exp()
    torch.testing.assert_close(bound, p, rtol=0.05, atol=0)


def test_a_bijection_refuses_missing_values():
    layer = Marginals(Schema([Column("a")]).measure(np.random.default_rng(0).normal(size=(50, 1))))
    assert layer.exact
    with pytest.raises(ValueError, match="a value is missing"):
        layer.infer(torch.tensor([[math.nan]]).double(), Trace())


def test_log_det_is_that_of_autograd():
    rows = np.random.default_rng(0).standard_cauchy((200, 3))
    layer = Marginals(Schema([Column(c) for c in "abc"]).measure(rows, 16)).double()
    x = torch.tensor(np.append(rows[:20], [[1e3, -1e3, 1e5], [1e8, -1e6, 0.1]], 0))
    _, log_det = layer(x)
    for row, truth in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: layer(r[None])[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(truth.item(), abs=1e-6)


# -- inverses

KINDS = ["continuous", "spike", "count", "category", "0.01", "0.25", "3.0", "1e-7"]
some = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)


@given(some, st.integers(0, 99), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_decoding_restores_rows_bit_for_bit(names, seed, holes, single):
    rng, columns, rows = np.random.default_rng(seed), [], []
    for name in names:
        step = None if name in ("continuous", "spike", "count", "category") else float(name)
        kind = name if name in ("count", "category") else "continuous"
        levels = tuple("abcdefg") if name == "category" else ()
        column = Column(name + str(len(columns)), kind, levels, missing=holes, step=step)
        x = rng.standard_t(2, 200) * (20 * (step or 1.0))
        x = np.where(rng.random(200) < 0.3, 0.0, x) if name == "spike" else x
        x = np.clip(np.rint(abs(x)), 0, 6 if levels else 1e9) if kind != "continuous" else x
        x = np.where(rng.random(200) < 0.2, np.nan, column.on_grid(x)) if holes else x
        columns.append(column)
        rows.append(column.on_grid(x))
    x = torch.tensor(np.stack(rows, 1))
    schema = Schema(columns).measure(x.numpy(), 16)
    beyond = x[:3].numpy().T
    beyond = [c.on_grid(b + 1e4 * (c.grid or 1)) for c, b in zip(columns, beyond, strict=True)]
    beyond = torch.tensor(np.stack(beyond, 1))
    levels = torch.tensor([c.has_levels for c in columns])
    x = torch.cat([x, torch.where(levels, 7.0, beyond)])
    layer = Marginals(schema).to(torch.float32 if single else torch.float64)
    y = layer.infer(x, Trace(temperature=0.0))
    assert y.dtype == (torch.float32 if single else torch.float64)
    again = layer.generate(y, Trace(generating=True))
    assert again.dtype == torch.float64
    for j, column in enumerate(schema.columns):
        known = ~x[:, j].isnan()
        assert torch.equal(again[:, j].isnan(), ~known)
        if column.grid:
            assert torch.equal(again[known, j], x[known, j])
        else:  # as exactly as y is stored
            spikes = known & (x[:, j] == 0) & (names[j] == "spike")
            assert (again[spikes, j] == 0).all()
            error = (again - x)[known, j].abs() / x[known, j].abs().clamp(min=1)
            assert error.max() < (2e-4 if single else 1e-9)


@pytest.mark.parametrize("name", ["nsf", "maf", "realnvp"])
@torch.no_grad()
def test_flows_restore_typed_rows(name):
    schema, rows = mixed()
    model = build(name, Spec((8,), schema=schema), **SMALL[name]).eval()
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.1)
    x = torch.tensor(rows[:100])
    again = model.decode(model.encode(x, mode=True))
    discrete = [j for j, c in enumerate(schema.columns) if c.grid]
    np.testing.assert_array_equal(again[:, discrete], x[:, discrete])
    np.testing.assert_array_equal(again.isnan(), x.isnan())
    assert torch.equal(again[:, 1] == 0, x[:, 1] == 0)
    torch.testing.assert_close(again, x, rtol=2e-4, atol=2e-4, equal_nan=True)


def valid(schema, x):
    """Whether rows are in the range, on the grid and among the levels of their columns."""
    for column, values in zip(schema.columns, x.numpy().T, strict=True):
        known = values[~np.isnan(values)]
        assert column.missing or len(known) == len(values)
        assert (known == column.on_grid(known)).all()
        low, high = (0, len(column.levels) - 1) if column.has_levels else (column.low, column.high)
        assert (known >= low).all()
        assert (known <= high).all()


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_samples_are_rows_of_the_table(name):
    schema, rows = mixed()
    model = randomized(build(name, Spec((8,), schema=schema), **SMALL[name]), scale=2.0).float()
    x = torch.tensor(rows[:40])
    for temperature in (0.0, 0.7, 1.0, 3.0):
        sampled = model.sample(500, temperature=temperature)
        assert sampled.dtype == torch.float64
        valid(schema, sampled)
    if "vae" in name:
        valid(schema, model.reconstruct(x))
    assert model.interpolate(x[:20], x[20:], 5).shape == (20, 5, 8)


@torch.no_grad()
def test_paths_between_rows_are_rows():
    schema, rows = mixed()
    model = randomized(build("nsf", Spec((8,), schema=schema), **SMALL["nsf"]))
    x = torch.tensor(rows[:60])
    path = model.interpolate(x[:30], x[30:], 6)
    np.testing.assert_array_equal(path[:, 0, 3:], x[:30, 3:])
    np.testing.assert_array_equal(path[:, -1, 3:], x[30:, 3:])
    inner = path.flatten(0, 1)
    for column, values in zip(schema.columns, inner.numpy().T, strict=True):
        known = values[~np.isnan(values)]
        assert (known == column.on_grid(known)).all()
        assert not column.has_levels or set(known) <= {0.0, 1.0, 2.0, 3.0}


# -- tails and units


@torch.no_grad()
def test_scores_far_outside_are_finite_and_fall():
    schema, rows = mixed()
    model = randomized(build("nsf", Spec((8,), schema=schema), **SMALL["nsf"])).float()
    whole = rows[~np.isnan(rows).any(1)][:1]
    for j, column in enumerate(schema.columns):
        if column.has_levels:
            continue
        scale = np.nanstd(rows[:, j])
        distances = column.on_grid(scale * np.array([0, 1e1, 1e2, 1e4, 1e6, 1e12]))
        x = torch.tensor(whole).repeat(12, 1)
        x[:, j] += torch.tensor(np.append(distances, -distances))
        y = model.layers[0].infer(x, Trace(temperature=0.0))
        assert y.isfinite().all()
        assert (y[:6, j].diff() > 0).all()
        assert (y[6:, j].diff() < 0).all()
        nats = model(x, closed_form=False).elbo
        assert nats.isfinite().all()
        assert (nats[2:6].diff() < 0).all()
        assert (nats[8:].diff() < 0).all()
    worst = torch.full((2, 8), 1e300, dtype=torch.float64)
    worst[1] = -math.inf
    assert model(worst, closed_form=False).elbo.isfinite().all()


def nats_after(name, rows, columns, steps=8, **options):
    """Nats of rows after a few steps of training on them."""
    torch.manual_seed(0)
    spec = Spec((3,)) if columns is None else Spec((3,), schema=Schema(columns).measure(rows))
    model = build(name, spec, **SMALL[name], **options)
    if columns is None:
        rows = rows.astype(np.float32)
        standardizer(model).measure(Dataset(rows))
    x = torch.tensor(rows)
    model.calibrate(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        (-model(x).elbo.mean()).backward()
        optimizer.step()
    torch.manual_seed(0)
    return model(x).elbo.detach().double()


@pytest.mark.parametrize("kind", ["schema", "quantile", "moments"])
@pytest.mark.parametrize("name", SMALL)
def test_units_only_add_their_logarithms(name, kind):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.gamma(1, size=200), rng.normal(size=200), rng.lognormal(size=200)], 1)
    if kind == "schema":  # factors that are not powers of two, shifts, another step
        scales, shifts = np.array([1e12, 1e-12, 1e3]), np.array([3e12, 0.0, -1e4])
        rows[:, 2] = np.rint(rows[:, 2] * 100) / 100
        columns = [Column("a"), Column("b"), Column("c", step=0.01)]
        others = [*columns[:2], Column("c", step=10.0)]
        scaled = rows * scales + shifts
        scaled[:, 2] = np.rint(scaled[:, 2] / 10) * 10
        options = {}
    else:  # float32 rounds other factors, and Adam amplifies the rounding of small gradients
        scales = 2.0 ** np.array([40, -40, 10])
        columns, others, scaled = None, None, rows * scales
        options = {"standardize": kind == "moments" or kind}
    nats = nats_after(name, rows, columns, **options)
    other = nats_after(name, scaled, others, **options)
    assert (other + np.log(scales).sum() - nats).abs().max() < 1e-3


# -- as parts of models


def test_half_precision_keeps_the_edges():
    schema, rows = mixed()
    model = build("nsf", Spec((8,), schema=schema), **SMALL["nsf"])
    layer, x = model.layers[0], torch.tensor(rows[:50])
    y = layer.infer(x, Trace(temperature=0.0))
    model.to(torch.bfloat16)
    assert layer.infer(x, Trace(temperature=0.0)).dtype == torch.bfloat16
    assert torch.equal(model.float().layers[0].infer(x, Trace(temperature=0.0)), y)
    warp = Marginals(3)
    warp.calibrate(torch.randn(100, 3))
    before = warp(x[:, 3:6])
    for a, b in zip(before, warp.bfloat16().float()(x[:, 3:6]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["schema", "quantile"])
def test_checkpoints_restore_it(tmp_path, kind):
    schema, rows = mixed()
    if kind == "schema":
        model, x = build("nsf", Spec((8,), schema=schema), **SMALL["nsf"]), torch.tensor(rows[:20])
    else:
        model, x = build("nsf", (3,), standardize=kind, **SMALL["nsf"]), torch.randn(20, 3)
        assert "schema" not in model.config
    model.calibrate(x)
    checkpoint.save(model, tmp_path / "m.safetensors")
    again = checkpoint.load(tmp_path / "m.safetensors")
    assert again.spec == model.spec
    assert json.loads(json.dumps(again.config)) == json.loads(json.dumps(model.config))
    for a, b in zip(model.encode(x, mode=True), again.encode(x, mode=True), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.reconstruct(x).nan_to_num(), again.reconstruct(x).nan_to_num())


def test_runs_resume_in_the_same_bytes(tmp_path):
    _, rows = mixed()
    columns = tuple(Column(**(vars(c) | {"cells": None})) for c in mixed()[0].columns)
    data = Dataset(rows, schema=Schema(columns))
    train, validation = data.split("train"), data.split("validation")
    plain = Dataset(np.random.default_rng(0).lognormal(size=(300, 3)).astype("f4"))
    for part, (of, spec, options) in {
        "typed": (train, data.spec(), {}),
        "plain": (plain, plain.spec(), {"standardize": "quantile"}),
    }.items():
        ends = []
        for stops in ([6], [3, 6]):
            torch.manual_seed(0)
            model = build("nsf", spec, **SMALL["nsf"], **options)
            out = tmp_path / f"{part}{len(stops)}"
            config = TrainConfig(steps=6, batch_size=32)
            for k, stop in enumerate(stops):
                checked = validation if part == "typed" else plain
                fit(model, of, checked, config, out, resume=k > 0, stop=lambda n, s=stop: n >= s)
            ends.append((out / "last.safetensors").read_bytes())
        assert ends[0] == ends[1]
        if part == "plain":
            warp = standardizer(model)
            assert isinstance(warp, Marginals)
            cells = warp.tables.binning.schema.columns
            assert [c.measured.rows for c in cells] == [300] * 3


def test_a_quantile_warp_is_a_bijection_without_atoms():
    x = torch.tensor(np.random.default_rng(0).integers(1, 40, (500, 2)) ** 2 / 7).float()
    layer = Marginals(2)
    assert torch.equal(layer.infer(x, Trace()), x)  # not measured yet
    layer.calibrate(x)
    assert layer.exact
    assert standardizer(build("vae", (2,), bits=None, standardize="quantile")).exact
    y, log_det = layer(x)
    again, back = layer.inverse(y)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(back, -log_det)
    assert stats.kstest(y[:, 0].unique().numpy(), "norm").statistic < 0.1
    layer.calibrate(100 * x)  # once
    assert torch.equal(layer(x)[0], y)


def test_heavy_tails_gain_from_it():
    rows = np.random.default_rng(0).lognormal(sigma=1.5, size=(2000, 2)).astype(np.float32)
    nats = {}
    for kind in (True, "quantile"):
        model = build("nsf", (2,), standardize=kind, norm=False, depth=1, hidden=4)
        standardizer(model).measure(Dataset(rows[:1500]))
        nats[kind] = float(model.log_prob(torch.tensor(rows[1500:])).detach().mean())
    assert nats["quantile"] > nats[True] + 1


def test_a_context_conditions_typed_rows():
    schema, rows = mixed()
    spec = Spec((8,), schema=schema, context=(Variable("age"),))
    model = randomized(build("nsf", spec, **SMALL["nsf"]))
    x, age = torch.tensor(rows[:6]), torch.randn(6, 1).double()
    torch.manual_seed(0)
    a = model.elbo(x, age)
    torch.manual_seed(0)
    assert (a != model.elbo(x, age + 1)).all()
    valid(schema, model.sample(6, age))


def test_coding_refuses_it_by_name():
    schema, rows = mixed()
    for model, x in (
        (build("nsf", Spec((8,), schema=schema), **SMALL["nsf"]), torch.tensor(rows[:2])),
        (build("nsf", (3,), standardize="quantile", **SMALL["nsf"]), torch.randn(2, 3)),
    ):
        with pytest.raises(ValueError, match="Marginals has no coding rule"):
            find_grids(model, x, None, [])


def test_what_does_not_fit_is_refused():
    schema, _ = mixed()
    plain = schema.to_json()
    with pytest.raises(ValueError, match="schema: expected continuous vectors"):
        vae.__wrapped__((1, 8, 8), bits=None, schema=plain[:1])
    with pytest.raises(ValueError, match="does not have 8"):
        build("nsf", (3,), schema=plain)
    with pytest.raises(ValueError, match="standardize: expected True, False or 'quantile'"):
        build("nsf", (3,), standardize="ranks")
    with pytest.raises(ValueError, match="has no cells"):
        build("maf", (1,), schema=[{"name": "a"}])
    model = build("vae", (8,), schema=plain, latents=2, width=8)
    assert model.spec.schema == schema
    assert "schema" not in model.config["options"]
