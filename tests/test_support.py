"""Supports: what a file of bounds says, the bijection, and models with no density outside."""

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import biject_to

from musigma import checkpoint
from musigma.cli import main
from musigma.coding.coder import find_grids
from musigma.data import DataError, Dataset, as_support, load
from musigma.layers import Standardize, Unconstrain, standardizer
from musigma.spec import Spec
from musigma.support import Support
from musigma.testing import check_layer
from musigma.training import TrainConfig, fit
from musigma.zoo import build

INF = math.inf
SUPPORTS = {
    "box": Support([0, -3, 10], [1, 5, 1000]),
    "half-lines": Support([0, -INF, 5], [INF, 3, INF]),
    "lines": Support([-INF] * 2, [INF] * 2),
    "simplex": Support([None] * 4, [None] * 4, simplex=[(2, 0, 3, 1)]),
    "two simplices": Support([None] * 5, [None] * 5, simplex=[(0, 3, 2), (4, 1)]),
    "ordered": Support([-INF] * 3, [INF] * 3, ordered=[(1, 0, 2)]),
    "ordered from below": Support([1] * 3, [INF] * 3, ordered=[(2, 0, 1)]),
    "ordered from above": Support([-INF] * 3, [2] * 3, ordered=[(0, 2, 1)]),
    "ordered within": Support([-1] * 3, [2] * 3, ordered=[(0, 2, 1)]),
    "product": Support(
        [0, None, None, 0, 0, None, None, 2],
        [1, None, None, None, None, None, None, 4],
        simplex=[(1, 5, 6)],
        ordered=[(4, 3)],
    ),
}
MAPS = ("probit", "logit")
each_support = pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
each_map = pytest.mark.parametrize("map", MAPS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def moved(support, map="probit"):
    """A layer with random buffers, in float64, and random rows of its variables."""
    layer = Unconstrain(support, map=map).double()
    layer.scale.copy_(torch.randn(len(support)).exp())
    layer.mean.copy_(torch.randn(support.freedom))
    layer.std.copy_(torch.randn(support.freedom).exp())
    y = 1.5 * torch.randn(7, support.freedom, dtype=torch.float64)
    return layer, (y - layer.mean) / layer.std


def inside(support, x):
    """Whether all rows are inside, compared in float64 without the rounding of bounds."""
    x = x.double()
    low, high, *_ = torch.from_numpy(support.limits)
    good = bool(((x >= low) & (x <= high)).all())
    return good and bool(support.inside(x, torch.from_numpy(support.limits)).all())


def uniform(support, n):
    """Rows that are uniform in a bounded support, by other means than its map."""
    x = torch.empty(n, len(support), dtype=torch.float64)
    for elements, low, high, simplex in support.parts:
        members = list(elements)
        if simplex:
            gaps = torch.empty(n, len(members), dtype=torch.float64).exponential_()
            x[:, members] = gaps / gaps.sum(1, keepdim=True)
        else:
            u = torch.rand(n, len(members), dtype=torch.float64)
            x[:, members] = low + (high - low) * u.sort(1).values
    return x


# --- the bijection -----------------------------------------------------------------------------


@each_map
@each_support
def test_decoding_undoes_encoding(support, map):
    layer, y = moved(support, map)
    x, log_det = layer.inverse(y)
    assert inside(support, x)
    again, back = layer(x)
    torch.testing.assert_close(again, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back, -log_det, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.inverse(again)[0], x, rtol=1e-12, atol=1e-12)


@each_map
@each_support
def test_log_det_is_that_of_the_jacobian(support, map):
    layer, y = moved(support, map)
    free = [j for j in range(len(support)) if j not in {g[-1] for g in support.simplex}]

    def elements(row):
        return layer.inverse(row[None])[0][0, free]

    jacobians = torch.stack([torch.autograd.functional.jacobian(elements, row) for row in y])
    expected = torch.linalg.slogdet(jacobians)[1]
    torch.testing.assert_close(layer.inverse(y)[1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, s in SUPPORTS.items() if not s.simplex])
def test_it_obeys_the_laws_of_layers(name):
    layer, y = moved(SUPPORTS[name])
    x = layer.inverse(y[:4])[0]
    check_layer(layer, (len(SUPPORTS[name]),), x=x)


@pytest.mark.parametrize("name", ["box", "simplex", "two simplices", "ordered within"])
def test_uniform_rows_become_standard_normal(name):
    support = SUPPORTS[name]
    x = uniform(support, 20_000)
    y, log_det = Unconstrain(support)(x)
    assert y.mean(0).abs().max() < 0.04
    assert (y.T.cov() - torch.eye(support.freedom)).abs().max() < 0.06
    assert ((y.abs() < 0.6745).double().mean(0) - 0.5).abs().max() < 0.02
    log_normal = torch.distributions.Normal(0, 1).log_prob(y).sum(1)
    volume = sum(
        -math.lgamma(part.freedom + 1)
        + (0 if part.simplex else len(part.elements) * math.log(part.high - part.low))
        for part in support.parts
    )
    torch.testing.assert_close(
        log_normal + log_det, torch.full_like(log_det, -volume), rtol=1e-9, atol=1e-9
    )


@each_map
@each_support
def test_borders_are_inside_and_their_density_is_finite(support, map):
    layer, _ = moved(support, map)
    low, high = (torch.from_numpy(b).clamp(-3, 1500) for b in support.limits[:2])
    rows = torch.stack([low, high])
    for group in support.simplex:
        rows[:, list(group)] = torch.eye(len(group), dtype=torch.float64)[[0, -1]]
    for group in support.ordered:  # ties, and at a border if there is one
        rows[:, list(group)] = rows[:, list(group)[:1]]
    for dtype in (torch.float32, torch.float64):
        layer = layer.to(dtype)
        y, log_det = layer(rows.to(dtype))
        assert y.isfinite().all()
        assert log_det.isfinite().all()
        again, _ = layer.inverse(y)
        torch.testing.assert_close(again.double(), rows, rtol=1e-6, atol=1e-6)


@each_support
def test_far_variables_stay_inside(support):
    layer = Unconstrain(support)
    y = torch.randn(20_000, support.freedom) * torch.tensor([1.0, 5.0, 40.0, 1e4])[:, None, None]
    y[0, 0], y[0, 1] = INF, -INF
    x, _ = layer.inverse(y.flatten(0, 1))
    finite = y.flatten(0, 1).isfinite().all(1)
    assert x.dtype == torch.float32
    assert inside(support, x[finite])
    assert x[finite].isfinite().all()
    x, _ = layer.double().inverse(y.flatten(0, 1).double())
    assert inside(support, x[finite])


def test_float32_draws_are_inside_bounds_that_float32_does_not_have():
    bounds = [(0.1, 0.3), (-0.7, 1 / 3), (1000.1, 1000.4), (1e-30, 3e-30)]
    support = Support(*zip(*bounds, strict=True))
    low, high, low32, high32 = torch.from_numpy(support.limits)
    assert (low32 < low).any()
    assert (high32 > high).any()
    x, _ = Unconstrain(support).inverse(torch.tensor([[-30.0], [0.0], [30.0]]).expand(-1, 4))
    wide = x.double()
    assert ((wide >= low) & (wide <= high) & (wide >= low32) & (wide <= high32)).all()
    y, log_det = Unconstrain(support)(torch.from_numpy(support.limits[2:]).float())
    assert y.isfinite().all()  # a bound, rounded, is the bound
    assert log_det.isfinite().all()


def test_outside_the_density_is_zero():
    layer, y = moved(SUPPORTS["product"])
    x = layer.inverse(y)[0]
    wrong = x.clone()
    wrong[0, 0], wrong[1, 7], wrong[2, 4] = -1e-9, 4.1, 0.1 + x[2, 3]
    wrong[3, 1] += 0.01  # the simplex no longer sums to 1
    wrong[4, 5] = -0.1
    log_det = layer(wrong)[1]
    assert (log_det[:5] == -INF).all()
    torch.testing.assert_close(log_det[5:], layer(x)[1][5:])


def test_a_map_that_does_not_exist():
    with pytest.raises(ValueError, match="map: expected 'probit' or 'logit'; got 'tanh'"):
        Unconstrain(SUPPORTS["box"], map="tanh")


# --- measurement -------------------------------------------------------------------------------


@each_support
def test_variables_are_standardized_over_all_rows(support):
    layer, y = moved(support)
    rows = layer.inverse(torch.randn(3000, support.freedom, dtype=torch.float64))[0].float()
    data = Dataset(rows.numpy()[:2000]).within(support)
    fresh = Unconstrain(support)
    fresh.measure(data)
    y = fresh(torch.from_numpy(data.x))[0].double()
    assert y.mean(0).abs().max() < 1e-4
    assert (y.std(0, correction=0) - 1).abs().max() < 1e-4
    small = data.subset(range(100))
    other = Unconstrain(support)
    other.calibrate(torch.from_numpy(small.x))
    before = other.mean.clone()
    other.calibrate(torch.from_numpy(data.x))
    assert torch.equal(other.mean, before)


def test_units_of_a_half_line_change_nothing_but_the_density():
    rows = np.random.default_rng(0).exponential(size=(500, 2)).astype(np.float32)
    rows[:3, 0] = 0.0  # on the border
    factors = np.array([1e-21, 1e12], np.float32)
    a, b = (Unconstrain(Support([0, 0], [None, None])) for _ in range(2))
    a.measure(Dataset(rows))
    b.measure(Dataset(rows * factors))
    y, log_det = a(torch.from_numpy(rows))
    other, scaled = b(torch.from_numpy(rows * factors))
    torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-4)
    shift = float(np.log(factors.astype(np.float64)).sum())
    torch.testing.assert_close(log_det - shift, scaled, rtol=1e-4, atol=1e-3)


# --- models ------------------------------------------------------------------------------------

ARCHITECTURES = {
    "nsf": {"depth": 2, "hidden": 16},
    "maf": {"depth": 2, "hidden": 16},
    "realnvp": {"depth": 2, "hidden": 16, "bits": None},
    "vae": {"latents": 3, "width": 16, "bits": None},
    "mlp_vae": {"latents": 3, "hidden": 16, "bits": None},
}


def randomized(model, scale=0.3):
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * scale)
    return model.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_have_nothing_outside(name, tmp_path):
    support = SUPPORTS["product"]
    spec = Spec((8,), columns=tuple("abcdefgh"), support=support)
    model = randomized(build(name, spec, **ARCHITECTURES[name]))
    layer = standardizer(model)
    assert isinstance(layer, Unconstrain)
    assert model.spec == spec
    assert "support" not in model.config["options"]
    x = model.sample(2000)
    assert inside(support, x)
    score = model.log_prob if model.exact else model.elbo
    assert score(x).isfinite().all()
    x[0, 0] = 1.5
    assert score(x)[0] == -INF
    checkpoint.save(model, tmp_path / "model.safetensors")
    again, _ = checkpoint.read(tmp_path / "model.safetensors")
    assert again.spec == spec
    torch.manual_seed(1)
    first = model.sample(5)
    torch.manual_seed(1)
    assert torch.equal(again.sample(5), first)


@pytest.mark.parametrize("architecture", ["nsf", "maf"])
def test_the_density_integrates_to_one_on_a_box(architecture):
    support = Support([-1, 2], [3, 2.5])
    model = build(architecture, (2,), support=support.to_json(), depth=3, hidden=16)
    model = randomized(model.double(), 0.2)
    n = 500  # the trapezoidal rule in t, where u = (1 + tanh(t)) / 2 (Schwartz, 1969)
    t = np.linspace(-12, 12, n)
    weights = (t[1] - t[0]) / (2 * np.cosh(t) ** 2)
    u = np.stack(np.meshgrid(*[1 / (1 + np.exp(-2 * t))] * 2, indexing="ij"), -1).reshape(-1, 2)
    x = torch.from_numpy(u * [4.0, 0.5] + [-1.0, 2.0])
    with torch.no_grad():
        density = model.log_prob(x).exp().numpy().reshape(n, n)
    assert density[150:-150, 150:-150].std() > 0.1 * density[150:-150, 150:-150].mean()
    assert abs(weights @ density @ weights * 2.0 - 1) < 1e-3


@pytest.mark.slow
def test_none_of_ten_million_draws_is_outside():
    support = Support([0.1, 0, -0.7], [0.3, None, 1 / 3])
    model = randomized(build("nsf", (3,), support=support.to_json(), depth=2, hidden=16), 1.0)
    for _ in range(100):
        assert inside(support, model.sample(100_000))


def test_a_flow_starts_at_the_uniform_distribution():
    support = Support([0, -2], [1, 8])
    model = build("nsf", (2,), support=support.to_json(), permutation="reverse")
    expected = torch.full((50,), -math.log(10))
    torch.testing.assert_close(model.log_prob(uniform(support, 50).float()), expected)


def test_it_replaces_standardization():
    support = SUPPORTS["box"].to_json()
    for standardize in (False, True):
        model = build("nsf", (3,), support=support, standardize=standardize)
        assert not any(isinstance(m, Standardize) for m in model.modules())
    with pytest.raises(ValueError, match="does not go with standardize='quantile'"):
        build("nsf", (3,), support=support, standardize="quantile")
    with pytest.raises(ValueError, match="does not go with typed columns"):
        build("nsf", (3,), support=support, schema=[{"name": c} for c in "abc"])
    with pytest.raises(ValueError, match=r"support: it has 3 elements"):
        build("nsf", (2,), support=support)
    with pytest.raises(ValueError, match=r"support: expected continuous vectors \(D,\); got 8"):
        build("nsf", Spec((3,), levels=256, support=SUPPORTS["box"]))
    with pytest.raises(ValueError, match=r"support: glow takes no bounds; .*nsf.* do"):
        build("glow", Spec((3,), support=SUPPORTS["box"]))
    pair = Spec((2,), support=Support([None] * 2, [None] * 2, simplex=[(0, 1)]))
    assert build("nsf", pair, depth=1).sample(3).sum(1).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="at least 2 elements; got 1"):
        build("realnvp", pair)


def test_models_without_a_support_are_as_before():
    config = build("nsf", (3,)).config
    assert "support" not in config
    assert "support" not in config["options"]


def test_torch_distributions_know_the_bijection():
    for name in ("product", "two simplices", "ordered from above"):
        support = SUPPORTS[name]
        constraint = support.constraint()
        into = biject_to(constraint)
        y = torch.randn(3, 5, support.freedom, dtype=torch.float64)
        x = into(y)
        assert x.shape == (3, 5, len(support)) == into.forward_shape(y.shape)
        assert into.inverse_shape(x.shape) == y.shape
        assert constraint.check(x).all()
        torch.testing.assert_close(into.inv(x), y)
        layer = Unconstrain(support)
        expected = layer.inverse(y.flatten(0, 1))[1].reshape(3, 5)
        torch.testing.assert_close(into.log_abs_det_jacobian(y, x), expected)
        x[0, 0, 0] = -5.0 if name != "ordered from above" else 5.0
        assert constraint.check(x).tolist() == [[False] + [True] * 4, *[[True] * 5] * 2]


# --- files of bounds ---------------------------------------------------------------------------

PRIOR = """
positive = ["sigma"]
simplex = [["p", "q", "r"]]
ordered = [["t1", "t2"], ["u", "v"]]

[bounds]
theta = [-1, 2.5]
rate = [0, inf]
t1 = [0, 10]
t2 = [0, 10]
"""
COLUMNS = ("sigma", "theta", "p", "q", "r", "t1", "t2", "u", "v", "rate", "free")


def test_a_file_of_bounds(tmp_path):
    file = tmp_path / "prior.toml"
    file.write_text(PRIOR)
    support = as_support(file, COLUMNS)
    assert support == Support(
        [0, -1, 0, 0, 0, 0, 0, -INF, -INF, 0, -INF],
        [INF, 2.5, 1, 1, 1, 10, 10, INF, INF, INF, INF],
        simplex=[(2, 3, 4)],
        ordered=[(5, 6), (7, 8)],
    )
    assert Support.from_json(json.loads(json.dumps(support.to_json()))) == support
    head, _, bounds = PRIOR.partition("[bounds]")
    file.write_text("[bounds]" + bounds + head)  # lists after the table belong to it
    assert as_support(file, COLUMNS) == support


FAULTS = {
    "unknown name": ("[bounds]\nthetta = [0, 1]", "no column 'thetta'; did you mean 'theta'?"),
    "reversed": ("[bounds]\ntheta = [1, 0]", "theta: expected low < high; got [1, 0]"),
    "nan": ("[bounds]\ntheta = [nan, 0]", "theta: expected low < high"),
    "words": ('[bounds]\ntheta = ["a", "b"]', "theta: expected [low, high]; got ['a', 'b']"),
    "three": ("[bounds]\ntheta = [0, 1, 2]", "theta: expected [low, high]; got [0, 1, 2]"),
    "coarse": ("[bounds]\ntheta = [1e9, 1000000100]", "float32 has few values"),
    "huge": ("[bounds]\ntheta = [0, 1e300]", "float32 has no"),
    "key": ("limits = 3", "limits: expected one of bounds, positive, simplex, ordered"),
    "no list": ("positive = 3", "positive: expected a list such as"),
    "no table": ("bounds = 3", "bounds: expected a table"),
    "alone": ('simplex = [["p"]]', "simplex: expected groups of 2 names or more"),
    "flat": ('ordered = ["u", "v"]', "ordered: expected a list such as"),
    "twice": ('simplex = [["p", "p"]]', "simplex p, p: a name is there twice"),
    "overlap": (
        'simplex = [["p", "q"]]\nordered = [["q", "r"]]',
        "'q' is in simplex p, q already",
    ),
    "ordered overlap": (
        'ordered = [["t1", "t2"], ["t2", "u"]]\n[bounds]\nt1=[0,1]\nt2=[0,1]\nu=[0,1]',
        "'t2' is in another group",
    ),
    "bounded simplex": (
        'simplex = [["p", "q"]]\n[bounds]\np = [0, 1]',
        "'p' is in bounds already",
    ),
    "two bounds": (
        'positive = ["theta"]\n[bounds]\ntheta = [0, 1]',
        "'theta' is in bounds already",
    ),
    "unequal": (
        'ordered = [["t1", "t2"]]\n[bounds]\nt1 = [0, 1]',
        "ordered t1, t2: give all of them the same bounds, or none",
    ),
}


@pytest.mark.parametrize(("text", "expected"), FAULTS.values(), ids=FAULTS)
def test_faults_of_a_file_of_bounds(text, expected, tmp_path):
    file = tmp_path / "prior.toml"
    file.write_text(text)
    with pytest.raises(DataError) as error:
        as_support(file, COLUMNS)
    assert expected in str(error.value)
    assert str(error.value).startswith(f"bounds {file}: 1 fault:")


def test_all_faults_are_named_at_once(tmp_path):
    file = tmp_path / "prior.toml"
    file.write_text('positive = ["x", "sigma"]\n[bounds]\nrate = [3, 2]\ny = [0, 1]\n')
    with pytest.raises(DataError, match="3 faults:") as error:
        as_support(file, COLUMNS)
    assert all(word in str(error.value) for word in ("'x'", "'y'", "rate: expected low < high"))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.toml").write_text("a = [")
    for name, expected in (("bad.toml", "cannot be read"), ("none.toml", "No such file")):
        with pytest.raises(DataError, match=expected):
            as_support(tmp_path / name, COLUMNS)
    with pytest.raises(DataError, match=r"give a \.toml file"):
        as_support(tmp_path / "prior.csv", COLUMNS)
    with pytest.raises(DataError, match="have no names of columns"):
        as_support({"bounds": {}}, ())


def test_faults_of_a_support():
    with pytest.raises(ValueError, match="element 1: expected low < high") as error:
        Support([0, 2, 0], [1, 1, 1], simplex=[(0,)], ordered=[(1, 2)])
    assert "groups of 2 or more" in str(error.value)
    assert "different bounds" in str(error.value)
    with pytest.raises(ValueError, match=r"there are 2 elements; got \[2\]"):
        Support([0, 0], [1, 1], ordered=[(0, 2)])
    with pytest.raises(ValueError, match="high: expected 2 values; got 1"):
        Support([0, 0], [1])
    with pytest.raises(ValueError, match="support: it has 2 elements"):
        Spec((3,), support=Support([0, 0], [1, 1]))


# --- data --------------------------------------------------------------------------------------


def table(n=300):
    rng = np.random.default_rng(0)
    shares = rng.dirichlet([1, 2, 3], n)
    times = np.sort(rng.uniform(0, 10, (n, 2)), 1)
    columns = [rng.uniform(-1, 2.5, n), *shares.T, *times.T, rng.normal(size=n)]
    names = ("theta", "p", "q", "r", "t1", "t2", "x")
    return {name: c.astype(np.float32) for name, c in zip(names, columns, strict=True)}


BOUNDS = {
    "bounds": {"theta": [-1, 2.5], "t1": [0, 10], "t2": [0, 10]},
    "simplex": [["p", "q", "r"]],
    "ordered": [["t1", "t2"]],
}


def test_rows_outside_are_refused_by_column_and_row():
    good = table()
    data = load(good, given="x", bounds=BOUNDS)
    assert data.spec(["x"]).support == as_support(BOUNDS, data.columns) == data.support
    assert data.split("train").support == data.support
    bad = {name: c.copy() for name, c in good.items()}
    bad["theta"][[7, 20, 21, 22]] = [-1.25, 3, 3, 3]
    bad["q"][3] += 0.25
    bad["t1"][9] = bad["t2"][9] + 1
    with pytest.raises(DataError) as error:
        load(bad, given="x", bounds=BOUNDS)
    text = str(error.value)
    assert "6 of 300 rows are outside the bounds" in text
    assert (
        "column 'theta' is to be in [-1, 2.5]; row 7 (from 0): -1.25, row 20 (from 0): 3.0, "
        "row 21 (from 0): 3.0 and 1 more" in text
    )
    sums = (
        "column 'p' is to be at least 0, and the sum of p, q, r 1; row 3 (from 0): the sum is 1.2"
    )
    assert sums in text
    assert "column 't2' is to be in [0, 10] and at least t1; row 9 (from 0)" in text
    some = Dataset(np.stack(list(bad.values()), 1)).subset([5, 7])
    with pytest.raises(DataError, match=r"1 of 2 rows .*\n  column 0 .*; row 7 \(from 0\): -1.25"):
        some.within(Support([-1, *[None] * 6], [None] * 7))


def test_bounds_of_other_data():
    with pytest.raises(DataError, match="have no names of columns"):
        load(np.random.default_rng(0).normal(size=(50, 2)), bounds=BOUNDS)
    with pytest.raises(DataError, match="bounds: they are of 2 columns of real numbers"):
        Dataset(np.zeros((4, 1, 2, 2), np.uint8)).within(Support([0, 0], [1, 1]))


def test_training_measures_the_map_and_stays_inside(tmp_path):
    data = load(table(), given="x", bounds=BOUNDS)
    model = build("nsf", data.spec(["x"]), depth=1, hidden=8)
    done = fit(
        model, data.split("train"), data.split("validation"), TrainConfig(steps=3), tmp_path
    )
    layer = standardizer(done.model)
    assert layer.calibrated
    assert layer.mean.abs().max() > 0.01
    context = torch.zeros(1000, 1)
    x = done.model.sample(1000, context)
    assert inside(data.support, x)
    torch.testing.assert_close(x[:, 1:4].sum(1), torch.ones(1000))


def lines(columns):
    """A table as the text of a .csv file."""
    rows = zip(*columns.values(), strict=True)
    return "\n".join([",".join(columns), *(",".join(map(str, r)) for r in rows), ""])


def test_training_refuses_rows_outside_a_given_support(tmp_path):
    rows = torch.rand(60, 2).numpy()
    model = build("nsf", (2,), support=Support([0, 0], [1, 1]).to_json(), depth=1, hidden=8)
    rows[7, 1] = 1.25
    for train, validation in ((rows, rows[:5]), (rows[:5], rows)):
        with pytest.raises(DataError, match=r"1 of 60 rows .*\n.* column 1 .*row 7 .*: 1.25"):
            fit(model, Dataset(train), Dataset(validation), TrainConfig(steps=1), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_coding_refuses_it_by_name():
    model = build("nsf", (2,), support=Support([0, 0], [1, 1]).to_json(), depth=1, hidden=8)
    with pytest.raises(ValueError, match="Unconstrain has no coding rule"):
        find_grids(model, torch.rand(3, 2), None, [])


def test_on_the_command_line(tmp_path, capsys):
    rows, prior, run = tmp_path / "sims.csv", tmp_path / "prior.toml", tmp_path / "run"
    columns = table()
    rows.write_text(lines(columns))
    prior.write_text(
        'simplex = [["p", "q", "r"]]\nordered = [["t1", "t2"]]\n'
        "[bounds]\ntheta = [-1, 2.5]\nt1 = [0, 10]\nt2 = [0, 10]\n"
    )
    words = ["train", "nsf", str(rows), "--given", "x", "--bounds", str(prior), "--out", str(run)]
    words += ["--steps", "3", "--depth", "1", "--hidden", "8", "--json", "--device", "cpu"]
    main(words)
    capsys.readouterr()
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["support"]["ordered"] == [[4, 5]]
    assert config["data"]["bounds"]["simplex"] == [["p", "q", "r"]]
    prior.write_text("[bounds]\ntheta = [0, 2.5]\n")
    words[words.index(str(run))] = str(tmp_path / "other")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "column 'theta' is to be in [0, 2.5]" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    for other, expected in (
        (["glow"], "bounds: glow takes none"),
        (["nsf", "--schema", "infer"], "bounds: they are for plain numbers"),
    ):
        with pytest.raises(SystemExit):
            main([words[0], *other, *words[2:]])
        assert expected in capsys.readouterr().err
    columns["theta"][4] = 3.0
    rows.write_text(lines(columns))
    main(["score", str(run), str(rows), "--out", str(tmp_path / "scores.csv"), "--json"])
    assert json.loads(capsys.readouterr().out)["outside"] == 1
    scores = np.genfromtxt(tmp_path / "scores.csv", delimiter=",", names=True)["nats"]
    assert np.flatnonzero(np.isinf(scores)).tolist() == [4]
    main(["evaluate", str(run), str(rows), "--split", "all"])
    assert "1 of 300 rows are outside the bounds of the model" in capsys.readouterr().err
