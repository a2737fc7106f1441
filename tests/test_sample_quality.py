"""The quality of samples: textbook implementations, closed forms, and planted copies."""

import contextlib
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import kstest, mannwhitneyu

from musigma.cli import main
from musigma.evaluation import (
    frechet_distance,
    frechet_limit,
    kernel_distance,
    memorization,
    nearest,
    prdc,
    sample_quality,
)
from musigma.evaluation.samples import _discrepancy, _influenced

SHARES = ("precision", "recall", "density", "coverage")


def pair(n, m, features, seed=0, shift=0.3, scale=1.2):
    """Correlated real rows, and generated rows of another mean and covariance."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(features, features)) / np.sqrt(features)
    return random.normal(size=(n, features)) @ mix, (
        scale * random.normal(size=(m, features)) + shift
    )


# --- against textbook implementations ------------------------------------------------------------


@pytest.mark.parametrize("features", [1, 2, 30])
def test_the_frechet_distance_is_that_of_a_matrix_square_root(features):
    x, y = pair(300, 200, features)
    s, t = (np.atleast_2d(np.cov(rows.T)) for rows in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert _influenced(x, y)[0] == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_kernel_distance_is_the_unbiased_estimate():
    x, y = pair(12, 9, 4)

    def kernel(u, v):
        return (sum(a * b for a, b in zip(u, v, strict=True)) / len(u) + 1) ** 3

    within = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within += np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert _discrepancy(x, y) == pytest.approx(within - 2 * between, rel=1e-12)


def test_the_kernel_distance_is_the_mean_of_disjoint_blocks():
    x, y = pair(230, 120, 4)
    random = np.random.default_rng(7)
    blocks = [np.array_split(random.permutation(rows), 3) for rows in (x, y)]
    values = [_discrepancy(a, b) for a, b in zip(*blocks, strict=True)]
    found = kernel_distance(x, y, blocks=3, seed=7)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    half = 4.302652729911275 * np.std(values, ddof=1) / np.sqrt(3)  # Student's t, 2 degrees
    assert found.high - found.value == pytest.approx(half, rel=1e-9)


def textbook(real, generated, k):
    """Precision, recall, density and coverage by scikit-learn's neighbors."""
    neighbors = pytest.importorskip("sklearn.neighbors").NearestNeighbors
    radii = [
        neighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors()[0][:, -1]
        for rows in (real, generated)
    ]
    d = cdist(real, generated)
    in_real, in_generated = d <= radii[0][:, None], d <= radii[1]
    return np.array(
        [
            in_real.any(0).mean(),
            in_generated.any(1).mean(),
            in_real.sum() / k / len(generated),
            in_real.any(1).mean(),
        ]
    )


@pytest.mark.parametrize("k", [1, 5])
def test_precision_recall_density_and_coverage_are_those_of_a_textbook(k):
    x, y = pair(310, 220, 6)
    found = prdc(x, y, k=k, seed=3)
    assert [found[name].value for name in SHARES] == pytest.approx(textbook(x, y, k), rel=1e-12)
    random = np.random.default_rng(3)
    groups = [random.permutation(len(rows)) % 10 for rows in (x, y)]
    without = [textbook(x[groups[0] != g], y[groups[1] != g], k) for g in range(10)]
    half = 2.2621571627409915 * np.sqrt(9 * np.var(without, axis=0))  # Student's t, 9 degrees
    assert found["density"].high == pytest.approx(found["density"].value + half[2], rel=1e-9)
    assert found["recall"].low == pytest.approx(found["recall"].value - half[1], rel=1e-9)


def test_one_cell_is_a_rank_sum_test():
    random = np.random.default_rng(0)
    train = random.normal(size=(150, 3))
    held_out, new = random.normal(size=(140, 3)), np.round(random.normal(size=(160, 3)), 1)
    far, near = (cdist(rows, train).min(1) for rows in (held_out, new))
    found = memorization(train, held_out, new, cells=1)
    expected = mannwhitneyu(near, far, alternative="less", use_continuity=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.distances == pytest.approx(near, rel=1e-9)
    assert (found.neighbors == cdist(new, train).argmin(1)).all()
    tied = memorization(np.tile(train, (2, 1)) * 0, held_out * 0 + 1, new * 0 + 1, cells=1)
    assert (tied.statistic, tied.p_value) == (0, 0.5)


@pytest.mark.parametrize("same", [False, True])
def test_nearest_neighbors_in_blocks(same, monkeypatch):
    monkeypatch.setattr("musigma.evaluation.neighbors.BLOCK", 70)
    x = np.random.default_rng(0).normal(size=(33, 3))
    y = x if same else np.random.default_rng(1).normal(size=(20, 3))
    d = cdist(x, y) + (np.diag(np.full(33, np.inf)) if same else 0)
    distances, which = nearest(x, y, 4, same=same)
    assert distances == pytest.approx(np.sort(d, 1)[:, :4])
    assert (which == np.argsort(d, 1)[:, :4]).all()


# --- closed forms --------------------------------------------------------------------------------


def test_the_frechet_distance_of_two_gaussians():
    random = np.random.default_rng(0)
    x = random.normal(size=(500, 4))
    x = (x - x.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T  # exact moments
    std, mean = np.array([0.5, 1, 2, 3]), np.array([1, 0, -2, 0.5])
    expected = (mean**2).sum() + ((std - 1) ** 2).sum()
    assert frechet_distance(x, x * std + mean) == pytest.approx(expected, rel=1e-10)
    flat = np.where(np.arange(4) < 2, std, 0)  # a singular covariance
    expected = ((flat - std) ** 2).sum()
    assert frechet_distance(x * std, x * flat) == pytest.approx(expected, rel=1e-10)


def test_the_frechet_distance_of_fewer_rows_than_features():
    x = np.random.default_rng(0).normal(size=(120, 300))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, 2 * x) == pytest.approx(
        (x.mean(0) ** 2).sum() + x.var(0, ddof=1).sum(), rel=1e-9
    )


def test_the_variance_of_the_frechet_distance_is_that_of_a_jackknife():
    x, y = pair(150, 130, 3)
    parts = 0.0
    for rows, other in ((x, y), (y, x)):
        without = [frechet_distance(np.delete(rows, i, 0), other) for i in range(len(rows))]
        parts += (len(rows) - 1) * np.var(without)
    assert _influenced(x, y)[1] == pytest.approx(parts, rel=0.1)


def test_equal_sets():
    x = np.random.default_rng(0).normal(size=(200, 4))
    found = sample_quality(x, x[::-1])
    for name in ("precision", "recall", "coverage"):
        value, low, high = getattr(found, name)
        assert (value, high) == (1, 1)
        assert low < 1
    assert found.density.value == pytest.approx(6 / 5)  # a ball holds itself, and 5 neighbors
    assert found.frechet == pytest.approx(0, abs=1e-9)
    assert found.frechet_limit.high < 0  # the sets are not independent, so nothing is in excess


def test_sets_far_apart():
    x, y = np.random.default_rng(0).normal(size=(2, 200, 4))
    found = prdc(x, y + 100)
    for name in SHARES:
        assert found[name].value == found[name].low == 0
    assert 0 < found["precision"].high < 0.03


def test_points_on_the_surface_of_a_ball_belong_to_it():
    """Rounding makes the squared distances of equal pairs of grid points differ."""
    x = np.stack(np.meshgrid(*[np.arange(12.0)] * 2), -1).reshape(-1, 2) + 1e4 / 3
    found = prdc(x, x, k=1)
    interior, edge, corner = 100 * 5, 40 * 4, 4 * 3
    assert found["density"].value == pytest.approx((interior + edge + corner) / 144)


def test_density_and_coverage_of_one_distribution_have_their_means():
    random, found = np.random.default_rng(0), []
    n, m, k = 100, 150, 2
    for seed in range(40):
        one = prdc(random.normal(size=(n, 3)), random.normal(size=(m, 3)), k=k, seed=seed)
        found.append([one["density"].value, one["coverage"].value])
    error = np.std(found, 0) / np.sqrt(40)
    coverage = 1 - (n - 1) * (n - 2) / ((n + m - 1) * (n + m - 2))
    assert abs(np.mean(found, 0) - [1, coverage]) == pytest.approx(0, abs=3.5 * error.max())
    assert (abs(np.mean(found, 0) - [1, coverage]) < 3.5 * error).all()


def test_the_kernel_distance_of_one_distribution_is_zero_on_average():
    random = np.random.default_rng(1)
    found = [kernel_distance(*random.normal(size=(2, 100, 5)), seed=i).value for i in range(100)]
    assert abs(np.mean(found)) < 3.5 * np.std(found) / 10
    x, y = random.normal(size=(2, 100, 5))
    assert kernel_distance(x, y + 0.5).low > 0


def test_the_extrapolated_frechet_distance_is_unbiased():
    random, truth = np.random.default_rng(2), 10 * 0.3**2
    found, plain = [], []
    for seed in range(30):
        x, y = random.normal(size=(2, 120, 10))
        plain.append(frechet_distance(x, y + 0.3))
        found.append(frechet_limit(x, y + 0.3, seed=seed).value)
    assert np.mean(plain) > 1.5 * truth
    assert abs(np.mean(found) - truth) < 3.5 * np.std(found) / np.sqrt(30)


# --- copies --------------------------------------------------------------------------------------


def test_copies_are_found_and_a_poor_fit_is_no_copy():
    random = np.random.default_rng(0)
    train, held_out, new = random.normal(size=(3, 500, 4))
    assert memorization(train, held_out, new).p_value > 0.05
    some = np.where(np.arange(500)[:, None] < 150, train + 0.01 * new, new)
    found = memorization(train, held_out, some)
    assert found.p_value < 1e-4
    assert found.nearer.low > 0.5
    assert found.statistic < -1
    assert memorization(train, held_out, 2 * new).p_value > 0.999


def test_cells_compare_like_with_like():
    """Samples that prefer a dense region are nearer to training rows, and no copies."""
    random = np.random.default_rng(1)
    sizes = {"train": 200, "held_out": 200, "generated": 380}
    dense = {name: 0.1 * random.normal(size=(n, 2)) for name, n in sizes.items()}
    sizes["generated"] = 20
    wide = {name: 5 * random.normal(size=(n, 2)) + 50 for name, n in sizes.items()}
    sets = {name: np.concatenate([dense[name], wide[name]]) for name in sizes}
    assert memorization(**sets, cells=1).p_value < 1e-6
    assert memorization(**sets, cells=4).p_value > 0.05


@pytest.mark.slow
def test_p_values_without_copies_are_uniform():
    random, found = np.random.default_rng(2), []
    for seed in range(600):
        train, held_out, new = random.normal(size=(3, 300, 3)) ** 3
        found.append(memorization(train, held_out, new, seed=seed).p_value)
    assert kstest(found, "uniform").pvalue > 0.01
    assert 0.03 < np.mean(np.array(found) < 0.05) < 0.075


# --- intervals -----------------------------------------------------------------------------------


def kernel_mean(features, a, s, b, t):
    """E (x'y / F + 1)^3 of independent x from N(a, s^2 I) and y from N(b, t^2 I)."""
    of_mean = a**2 + s**2 / features, a**3 + 3 * a * s**2 / features
    of_square = a**2 + s**2
    of_both = a**3 + 3 * a * s**2 + (features - 1) * a * of_square
    second = b**2 * of_mean[0] + t**2 * of_square / features
    third = b**3 * of_mean[1] + 3 * b * t**2 * of_both / features**2
    return 1 + 3 * a * b + 3 * second + third


def test_the_mean_of_the_kernel():
    x, y = np.random.default_rng(0).normal(size=(2, 100_000, 3)) * [[[2]], [[0.5]]] + [
        [[1]],
        [[2]],
    ]
    drawn = ((x * y).sum(1) / 3 + 1) ** 3
    error = drawn.std() / np.sqrt(len(drawn))
    assert abs(drawn.mean() - kernel_mean(3, 1, 2, 2, 0.5)) < 4 * error


def shares_that_hold(features, shift, scale, repeats=200):
    """How often each interval holds the truth.

    Shares depend on the numbers of rows; their truth is the mean of all repeats.
    """
    random = np.random.default_rng(3)
    found = {name: [] for name in ("limit", "kernel", *SHARES)}
    for seed in range(repeats):
        x, y = random.normal(size=(2, 400, features))
        y = scale * y + shift
        found["limit"].append(frechet_limit(x, y, seed=seed))
        found["kernel"].append(kernel_distance(x, y, seed=seed))
        for name, interval in prdc(x, y, seed=seed).items():
            found[name].append(interval)
    table = {name: np.array(intervals).T for name, intervals in found.items()}
    truth = {name: values[0].mean() for name, values in table.items()}
    truth["limit"] = features * (shift**2 + (scale - 1) ** 2)
    one, other = (0, 1), (shift, scale)
    within = kernel_mean(features, *one, *one) + kernel_mean(features, *other, *other)
    truth["kernel"] = within - 2 * kernel_mean(features, *one, *other)
    return {n: ((v[1] <= truth[n]) & (truth[n] <= v[2])).mean() for n, v in table.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("features", "shift", "scale"), [(2, 0, 1), (8, 0.3, 1.2), (64, 0, 1)])
def test_intervals_hold_the_truth(features, shift, scale):
    held = shares_that_hold(features, shift, scale)
    assert min(held.values()) > 0.91, held  # 0.95, less 2.6 standard errors of 200 repeats


# --- what is refused -----------------------------------------------------------------------------


def test_features_that_cannot_be_used():
    x = np.random.default_rng(0).normal(size=(120, 3))
    with pytest.raises(
        ValueError, match="generated: expected as many features as real has, 3; got 2"
    ):
        sample_quality(x, x[:, :2])
    with pytest.raises(ValueError, match="real: expected at least 100 rows; got 99"):
        prdc(x[:99], x)
    with pytest.raises(ValueError, match=r"real: expected features of shape \(n, F\)"):
        kernel_distance(x[0], x)
    bad = np.where(np.arange(120)[:, None] % 50 == 7, np.nan, x)
    faults = "real: .* 3 of 120 rows are not, the first of them row 7 .*\ngenerated: .* got 50"
    with pytest.raises(ValueError, match=faults):
        frechet_distance(bad, x[:50])
    with pytest.raises(ValueError, match="held_out: expected as many features as train has"):
        memorization(x, x[:, :1], x)


def test_numbers_that_cannot_be_used():
    x = np.random.default_rng(0).normal(size=(120, 60))
    for k in (0, 25):
        with pytest.raises(ValueError, match=f"k: expected 1 to 24, a fifth of the rows; got {k}"):
            prdc(x, x, k=k)
    for blocks in (1, 61):
        with pytest.raises(ValueError, match=f"blocks: expected 2 to 60.*got {blocks}"):
            kernel_distance(x, x, blocks=blocks)
    with pytest.raises(ValueError, match="splits: expected 2 or more"):
        frechet_limit(x, x, splits=1)
    with pytest.raises(ValueError, match="cells: expected 1 to 120"):
        memorization(x, x, x, cells=0)
    with pytest.raises(ValueError, match=r"more than 2 F \+ 1 = 121 rows in each; got 120"):
        frechet_limit(x, x)
    found = sample_quality(x, x)
    assert found.frechet_limit is None
    assert "120 rows with 60 features" in found.warnings[0]
    assert found.to_dict()["frechet_limit"] is None


# --- the command ---------------------------------------------------------------------------------


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([w for word in words for w in str(word).split(" ")] + ["--device", "cpu"])
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def answer(*words: object) -> dict:
    code, out, err = call("quality", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def refused(*words: object) -> str:
    code, out, err = call("quality", *words)
    assert code == 2
    assert not out
    return err


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("quality"), Path.cwd()
    os.chdir(folder)
    random = np.random.default_rng(0)
    for name, n in (("rows", 1400), ("other", 150)):
        with open(f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow("abc")
            writer.writerows((random.normal(size=(n, 3)) * [1, 10, 0.1]).tolist())
    labels = np.arange(1300) % 2
    pixels = (
        random.normal(size=(1300, 1, 8, 8)) * 20 + np.array([60, 180])[labels, None, None, None]
    )
    np.savez("other.npz", x=pixels[:150].astype(np.uint8), labels=labels[:150])
    np.savez("pictures.npz", x=pixels.clip(0, 255).astype(np.uint8), labels=labels)
    Path("mine.py").write_text(
        "def moments(x):\n"
        "    assert 0 <= x.min() and x.max() <= 1\n"
        "    return __import__('torch').stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)\n"
        "def first(x):\n    return x[:, 0]\n"
        "number = 3\n"
    )
    quick = "--steps 3 --batch-size 64 --evaluations 1 --evaluate-on 20 --json"
    for words in (
        f"nsf rows.csv --standardize --out flow --depth 1 --hidden 8 {quick}",
        f"vae pictures.npz --conditional --out vae --net mlp --width 16 {quick}",
    ):
        code, _, err = call("train", words)
        assert code == 0, err
    yield folder
    os.chdir(before)


def test_samples_of_a_table(here):
    found = answer("flow --n 200")
    assert found["data"] == f"the held-out part of {here}/rows.csv"
    samples, training = found["samples"], found["training"]
    assert (samples["generated"], samples["features"]) == (200, 3)
    assert samples["real"] == training["real"] > 100
    assert training["kernel"]["low"] < 0 < training["kernel"]["high"]
    assert training["coverage"]["value"] > 0.85
    assert found["memorization"]["training"] == 1000  # 5 n of them
    assert 0 <= found["memorization"]["p_value"] <= 1
    assert answer("flow --n 200") == found
    assert answer("flow --n 200 --seed 1") != found


def test_samples_of_a_table_in_words(here):
    code, out, err = call("quality flow --n 150 --out page.html")
    assert code == 0, err
    for text in ("150 samples beside", "the 3 columns, standardized", "training examples", "C_T"):
        assert text in out
    page = Path("page.html").read_text(encoding="utf-8")
    assert "kernel distance (KID)" in page
    code, out, err = call("quality flow other.csv --n 150")
    assert code == 0, err
    assert "150 samples beside 150 examples: other.csv" in out
    assert "Copies were not looked for" in out


def test_samples_of_images(here):
    found = answer("vae --n 120 --features mine.py:moments --out near.png")
    assert found["samples"]["features"] == 2
    assert found["out"] == "near.png"
    with Image.open("near.png") as picture:
        assert picture.size == (8 * (56 + 2) - 2, 4 * 56 + 2 * 2 + 12)  # two lines of 8 pairs
    code, out, err = call("quality vae --n 120 --out page.html")
    assert code == 0, err
    assert "64 pixels. Their distances say little" in out
    assert "the Fréchet distance depends mostly on the number of rows" in out
    assert "data:image/png" in Path("page.html").read_text(encoding="utf-8")


def test_the_commands_of_the_page(here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(here)
    Path("features.py").write_text((here / "mine.py").read_text())
    text = (Path(__file__).parent.parent / "docs" / "sample-quality.md").read_text()
    for command in text.split("```sh\n")[1].split("```")[0].splitlines():
        code, _, err = call(*command.replace("runs/flow", "runs/flow --n 200").split()[1:])
        assert code == 0, err
    assert Path("quality.html").stat().st_size > 1000


def test_what_the_command_refuses(here):
    assert "n: expected 100 or more samples; got 99" in refused("flow --n 99")
    assert "split: the model was trained on" in refused("flow --split train")
    assert "out: expected a .html, .md or .tex file" in refused("flow --out near.png")
    assert "out: the picture shows training examples" in refused("vae other.npz --out near.png")
    assert "mine.py defines no 'nothing'" in refused("flow --features mine.py:nothing")
    assert "features: expected a function; mine.py:number is 3" in refused(
        "flow --features mine.py:number"
    )
    assert "mine.py:first returned (" in refused("flow --n 100 --features mine.py:first")
    assert "at least 100 held-out examples" in refused("flow --split validation")
