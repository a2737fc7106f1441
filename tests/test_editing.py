"""Directions, edits and mixtures, against closed forms and by the commands."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import musigma
from musigma.cli import main
from musigma.editing import Direction, _held_out, direction, edit, mix, temperatures
from musigma.layers import ActNorm, InvertibleConv
from musigma.testing import randomized


def linear_flow(d=6):
    """z = W (x + b) · s, which maps means to means."""
    torch.manual_seed(0)
    return randomized(
        musigma.Chain(
            [ActNorm(d), InvertibleConv(d), ActNorm(d)],
            musigma.Prior(musigma.distributions.LearnedNormal((d,))),
        )
    ).float()


def two_classes(n=4000, d=6):
    """Gaussians of equal covariance whose means differ in x0; x1 is correlated with x0."""
    random = np.random.default_rng(0)
    has = random.random(n) < 0.4
    x = random.normal(size=(n, d)).astype(np.float32)
    x[:, 0] += 1.5 * has
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]  # no information beyond x0
    return musigma.Dataset(x), has


def glow(shape=(1, 8, 8), **options):
    torch.manual_seed(1)
    model = musigma.build("glow", shape, levels=2, depth=2, hidden=8, **options)
    model = randomized(model, scale=0.1)
    x = torch.randint(0, 256, (5, 1, 8, 8))
    return model, x


def test_the_mean_difference_of_a_linear_flow():
    flow, (data, has) = linear_flow(), two_classes()
    step = direction(flow, data, has, method="mean", attribute="first")
    kept = ~_held_out(4, has, 0)
    x = torch.from_numpy(data.x)
    moved = edit(flow, x, step, [0.0, 1.0, -1.0])
    assert (moved[:, 0] - x).abs().max() < 1e-4
    # a linear map takes the difference of means to the difference of means
    gap = x[kept & has].mean(0) - x[kept & ~has].mean(0)
    assert (moved[:, 1] - x - gap).abs().max() < 1e-4
    assert (moved[:, 2] - x + gap).abs().max() < 1e-4
    assert gap[1] > 0.8  # the correlated coordinate moves too
    assert step.attribute == "first"
    assert 0.8 < step.auc < 0.9  # Φ(1.5 / √2) = 0.856 for the best


def test_a_probe_ignores_correlated_coordinates():
    flow, (data, has) = linear_flow(), two_classes()
    step = direction(flow, data, has, method="probe")
    x = torch.from_numpy(data.x[:50])
    z, moved = (flow.encode(t, whiten=True)[0] for t in (x, edit(flow, x, step, [1.0])[:, 0]))
    # the optimal weights are the linear discriminant, Σ⁻¹ (difference of means), in z
    along = z - moved
    latents = flow.encode(torch.from_numpy(data.x), whiten=True)[0].double()
    y = torch.from_numpy(has)
    centered = torch.cat([latents[y] - latents[y].mean(0), latents[~y] - latents[~y].mean(0)])
    weights = torch.linalg.solve(centered.T.cov(), latents[y].mean(0) - latents[~y].mean(0))
    cosine = torch.cosine_similarity(along[0].double(), weights, dim=0).abs()
    assert cosine > 0.97
    best = 0.5 * (1 + math.erf(1.5 / 2))
    assert abs(step.auc - best) < 0.04
    mean = direction(flow, data, has, method="mean")
    assert step.auc > mean.auc - 0.01
    # a step of 1 covers the difference of the means along the direction
    covered = (step.latents[0] * mean.latents[0]).sum()
    assert abs(covered / step.latents[0].square().sum() - 1) < 1e-4


def test_examples_are_spread_over_the_data():
    """Class folders are read one after the other, so the first examples are of one class."""
    flow, (data, has) = linear_flow(), two_classes()
    order = np.argsort(has, kind="stable")
    some = direction(flow, data.subset(order), has[order], at_most=600)
    every = direction(flow, data, has)
    assert torch.cosine_similarity(some.latents[0], every.latents[0], dim=0) > 0.95


def test_random_labels_give_a_direction_at_chance_level():
    flow, (data, _) = linear_flow(), two_classes()
    has = np.random.default_rng(5).random(len(data)) < 0.5
    for method in ("mean", "probe"):
        assert abs(direction(flow, data, has, method=method).auc - 0.5) < 0.06


def test_levels_that_are_not_chosen_do_not_change():
    model, x = glow()
    data = musigma.Dataset(torch.randint(0, 256, (40, 1, 8, 8)).byte().numpy())
    has = np.arange(40) % 3 == 0
    for levels, moving in ((None, [0, 1]), ([0], [0]), ([1], [1])):
        step = direction(model, data, has, levels=levels)
        assert [i for i, t in enumerate(step.latents) if bool((t != 0).any())] == moving
        edited = edit(model, x, step, [0.0, 0.7])
        assert (edited[:, 0] == x).all()
        before, after = model.encode(x, mode=True, whiten=True), step.latents
        expected = model.decode(
            [a + 0.7 * b for a, b in zip(before, after, strict=True)], whiten=True
        )
        assert (edited[:, 1] == expected).all()
        assert (edited[:, 1] != x).any()


@pytest.mark.parametrize("name", ["vae", "vae flow", "ladder", "glow"])
def test_every_model_can_be_edited_and_mixed(name):
    torch.manual_seed(0)
    options = {
        "vae": {"latents": 4, "width": 8},
        "vae flow": {"latents": 4, "width": 8, "prior": "flow", "prior_depth": 1},
        "ladder": {"latents": 2, "levels": 2, "width": 8},
        "glow": {"levels": 2, "depth": 1, "hidden": 8},
    }[name]
    model = randomized(musigma.build(name.split()[0], (1, 8, 8), **options), scale=0.1)
    data = musigma.Dataset(torch.randint(0, 256, (30, 1, 8, 8)).byte().numpy())
    step = direction(model, data, np.arange(30) % 2 == 0, method="probe")
    x = torch.randint(0, 256, (3, 1, 8, 8))
    assert edit(model, x, step, [-1, 0, 1]).shape == (3, 3, 1, 8, 8)
    torch.manual_seed(0)
    still = edit(model, x, step, [0.0])[:, 0]
    assert (still == model.reconstruct(x)).all()
    if len(step.latents) > 1:
        mixed = mix(model, x, x, [1])
        assert mixed.shape == (3, 3, 1, 8, 8)
        assert (mixed[range(3), range(3)] == model.reconstruct(x)).all()


def test_a_mixture_takes_each_level_from_its_source():
    model, x = glow()
    other = torch.randint(0, 256, (3, 1, 8, 8))
    mixed = mix(model, x, other, [0])
    assert mixed.shape == (5, 3, 1, 8, 8)
    own = model.encode(x, mode=True, whiten=True)
    style = model.encode(other, mode=True, whiten=True)
    for i in range(5):
        for j in range(3):
            z = [style[0][j : j + 1], own[1][i : i + 1]]
            assert (mixed[i, j] == model.decode(z, whiten=True)[0]).all()


def test_temperatures_share_their_noise():
    model, _ = glow()
    model = model.continuous().double()
    drawn = temperatures(model, 4, [0.0, 0.5, 1.0])
    assert drawn.shape == (3, 4, 1, 8, 8)
    assert (drawn[0] == drawn[0, :1]).all()
    half, whole = (model.encode(drawn[i], whiten=True) for i in (1, 2))
    for a, b in zip(half, whole, strict=True):
        assert (2 * a - b).abs().max() < 1e-6 * b.abs().max()


def test_a_context_conditions_the_result():
    spec = musigma.Spec((1, 8, 8), 256, context=(musigma.Variable("label", names="abc"),))
    model, x = glow(spec)
    one = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3).double()
    data = musigma.Dataset(
        torch.randint(0, 256, (30, 1, 8, 8)).byte().numpy(),
        labels=np.arange(30) % 3,
        label_names=("a", "b", "c"),
    )
    step = direction(model, data, np.arange(30) % 2 == 0)
    assert (edit(model, x, step, [0.0], one)[:, 0] == x).all()
    mixed = mix(model, x, x, [0], one, one.roll(1, 0))
    assert (mixed[range(5), range(5)] != x).any()


# -- files and mistakes


def test_a_direction_file_round_trips(tmp_path):
    step = Direction((torch.randn(4, 2, 2), torch.zeros(2, 4, 4)), "smile", "mean", 0.75)
    step.save(tmp_path / "d.npz")
    again = Direction.load(tmp_path / "d.npz")
    assert (again.attribute, again.method, again.auc) == ("smile", "mean", 0.75)
    assert all((a == b).all() for a, b in zip(again.latents, step.latents, strict=True))
    whole = (tmp_path / "d.npz").read_bytes()
    for cut in (0, 10, len(whole) // 2):
        (tmp_path / "d.npz").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a direction file"):
            Direction.load(tmp_path / "d.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="is not a direction file"):
        Direction.load(tmp_path / "other.npz")
    Direction((torch.full((3,), math.nan),), "", "mean", 0.5).save(tmp_path / "nan.npz")
    with pytest.raises(ValueError, match="not finite"):
        Direction.load(tmp_path / "nan.npz")


def test_constant_latents_have_no_direction():
    model = musigma.build("vae", (1, 8, 8), latents=3, width=8, net="mlp")
    for parameter in model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    data = musigma.Dataset(torch.randint(0, 256, (40, 1, 8, 8)).byte().numpy())
    for method in ("mean", "probe"):
        with pytest.raises(ValueError, match="its latents are the same with and without"):
            direction(model, data, np.arange(40) % 2 == 0, method=method)


@pytest.mark.parametrize("period", [2, 3, 4])
def test_held_out_examples_keep_the_proportion_of_periodic_labels(period):
    has = np.arange(400) % period == 0
    test = _held_out(4, has, 0)
    assert test.sum() == pytest.approx(100, abs=1)
    assert has[test].sum() == has.sum() // 4
    assert has[~test].sum() == has.sum() - has.sum() // 4


def test_invalid_arguments_are_refused_by_name():
    model, x = glow()
    data = musigma.Dataset(np.zeros((8, 1, 8, 8), np.uint8))
    has = np.arange(8) < 4
    for arguments, reason in (
        ({"method": "median"}, "method: expected 'mean' or 'probe'"),
        ({"levels": [2]}, r"levels: expected numbers from 0 \(top\) to 1"),
        ({"levels": []}, r"levels: expected numbers from 0 \(top\) to 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            direction(model, data, has, **arguments)
    with pytest.raises(ValueError, match="has: expected 8 truth values"):
        direction(model, data, has[:3])
    with pytest.raises(ValueError, match="has: expected at least 2 examples"):
        direction(model, data, np.ones(8, bool))
    other = Direction((torch.zeros(3),), "", "mean", 0.5)
    with pytest.raises(ValueError, match="direction: expected latents of shapes"):
        edit(model, x, other, [1.0])
    for levels in ([], [0, 1], [5]):
        with pytest.raises(ValueError, match="levels: expected"):
            mix(model, x, x, levels)


# -- the commands


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Bright and dark images in two folders, and a Glow of them."""
    here = tmp_path_factory.mktemp("editing")
    random = np.random.default_rng(0)
    for i in range(60):
        kind, level = ("bright", 170) if i % 2 else ("dark", 60)
        folder = here / "photos" / kind
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(random.normal(level, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    words = ["--steps", "60", "--evaluations", "1", "--depth", "2", "--hidden", "16"]
    words += ["--levels", "2"]
    photos = str(here / "photos")
    main(["train", "glow", photos, "--out", str(here / "run"), *words])
    main(["train", "glow", photos, "--out", str(here / "known"), "--conditional", *words])
    return here


def test_the_editing_commands(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, data = str(photos / "run"), str(photos / "photos")
    for method in ("mean", "probe"):
        words = ["--positive", "bright", "--negative", "dark", "--method", method]
        main(["direction", run, data, *words, "--out", f"{method}.npz", "--json"])
    assert Direction.load("mean.npz").auc > 0.99  # of the 15 images that it was not made from
    one = str(photos / "photos" / "dark" / "00.png")
    main(["edit", run, one, "--direction", "mean.npz", "--strength", "-1..1:3", "--out", "e.npy"])
    edited = np.load("e.npy")
    assert edited.shape == (1, 3, 3, 8, 8)
    assert (edited[0, 1] == np.asarray(Image.open(one)).transpose(2, 0, 1)).all()
    assert edited[0, 2].mean() > edited[0, 1].mean() + 40
    main(["edit", run, data, "--direction", "probe.npz", "--strength", "-2..2"])
    main(["mix", run, data, "--n", "3", "--levels", "1", "--split", "all"])
    main(["mix", run, data, "--n", "3", "--split", "all", "--out", "m.npy"])
    assert np.load("m.npy").shape == (3, 3, 3, 8, 8)
    main(["sample", run, "--n", "5", "--temperatures", "0,0.5,1", "--out", "t.png"])
    main(["sample", run, "--n", "5", "--temperatures", "0,0.5,1", "--out", "t.npy"])
    rows = np.load("t.npy")
    assert rows.shape == (3, 5, 3, 8, 8)
    assert (rows[0] == rows[0, :1]).all()
    for name in ("edited.png", "mixed.png", "t.png"):
        with Image.open(name) as picture:
            assert picture.width > 50
    capsys.readouterr()


def test_classes_by_name(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, one = str(photos / "known"), str(photos / "photos" / "dark" / "00.png")
    main(["sample", run, "--n", "16", "--label", "bright", "--temperature", "0", "--out", "b.npy"])
    main(["sample", run, "--n", "16", "--label", "1", "--temperature", "0", "--out", "d.npy"])
    assert np.load("b.npy").mean() > np.load("d.npy").mean()
    main(["direction", run, str(photos / "photos"), "--positive", "0", "--out", "d.npz"])
    words = ["edit", run, one, "--direction", "d.npz", "--strength", "0,1"]
    main([*words, "--label", "dark"])
    for label, reason in (("cat", "or one of bright, dark; got 'cat'"), ("2", "expected 0 to 1")):
        with pytest.raises(SystemExit):
            main([*words, "--label", label])
        assert reason in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(words)  # a single image has no class
    assert "no labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["direction", "RUN", "DATA", "--positive", "cat", "--out", "d.npz"], "label: expected 0"),
        (["direction", "RUN", "DATA", "--positive", "0", "--out", "d.png"], "expected a .npz"),
        (
            ["direction", "RUN", "DATA", "--positive", "0", "--levels", "7", "--out", "d.npz"],
            "from 0 (top) to 1",
        ),
        (
            ["direction", "RUN", "DATA", "--positive", "0", "--levels", "a", "--out", "d.npz"],
            "0,1",
        ),
        (["direction", "RUN", "ONE", "--positive", "0", "--out", "d.npz"], "no labels"),
        (["edit", "RUN", "DATA", "--direction", "none.npz"], "there is no file none.npz"),
        (
            ["edit", "RUN", "DATA", "--direction", "x", "--strength", "inf..2"],
            "strength: expected",
        ),
        (
            ["sample", "RUN", "--temperatures", "0,1", "--temperature", "2"],
            "leave one of them",
        ),
        (["edit", "RUN", "DATA", "--direction", "x", "--strength", "a..b"], "strength: expected"),
        (
            ["edit", "RUN", "DATA", "--direction", "x", "--strength", "0..1:1"],
            "strength: expected -2..2, -2..2:9 or -1,0,0.5; got '0..1:1'",
        ),
        (
            ["edit", "RUN", "DATA", "--direction", "x", "--strength", "0..1:2.5"],
            "strength: expected -2..2, -2..2:9 or -1,0,0.5; got '0..1:2.5'",
        ),
        (["edit", "RUN", "DATA", "--direction", "x", "--strength", "nan"], "strength: expected"),
        (["mix", "RUN", "DATA", "--levels", "0,1", "--split", "all"], "fewer than all 2"),
        (["mix", "RUN", "ONE", "--split", "all"], "a mixture needs two"),
        (["sample", "RUN", "--temperatures", "hot"], "temperature: expected"),
        (["sample", "RUN", "--label", "bright"], "not conditioned"),
    ],
)
def test_invalid_options_are_refused(words, reason, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"RUN": photos / "run", "DATA": photos / "photos"}
    names["ONE"] = photos / "photos" / "dark" / "00.png"
    with pytest.raises(SystemExit) as stop:
        main([str(names.get(word, word)) for word in words])
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
