"""`--by`, `--background`, `--members` and `--maps` of `score` and `evaluate`."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from musigma import anomaly, checkpoint, detectors
from musigma.cli import main
from musigma.data import load

QUICK = "--evaluations 1 --evaluate-on 20 --batch-size 64 --steps 20 --out"


def call(*words: object) -> None:
    main([word for some in words for word in str(some).split(" ")])


def images(n: int, seed: int, strange: bool = False) -> np.ndarray:
    """Smooth gray images, or noise."""
    random = np.random.default_rng(seed)
    base = random.integers(0, 160, (n, 1, 1, 1)) + random.integers(0, 30, (n, 1, 8, 8))
    return (random.integers(0, 256, (n, 1, 8, 8)) if strange else base).astype(np.uint8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """VAEs of images and one of perturbed ones, a flow of images, and a flow of a table."""
    home = tmp_path_factory.mktemp("home")
    np.savez(home / "known.npz", x=images(900, 0))
    np.savez(home / "new.npz", x=np.concatenate([images(60, 1), images(20, 2, strange=True)]))
    labels = np.repeat([0, 1], [60, 20])
    np.savez(home / "labeled.npz", x=np.load(home / "new.npz")["x"], y=labels)
    rows = np.random.default_rng(0).normal(size=(400, 2))
    np.savetxt(home / "rows.csv", rows, "%.6f", ",", header="a,b", comments="")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        vae = "train mlp_vae known.npz --hidden 16 --latents 2 --lr 0.01"
        call(vae, QUICK, "run")
        call(vae, "--seed 1", QUICK, "second")
        call(vae, "--perturb 0.2", QUICK, "background")
        call("train glow known.npz --depth 1 --hidden 8 --dequantize uniform", QUICK, "flow")
        call("train nsf rows.csv --depth 1 --hidden 8", QUICK, "table")
    return home


@pytest.fixture
def answer(capsys):
    """A function that runs a command and returns its JSON."""

    def run(*words: object):
        capsys.readouterr()
        main([*(w for some in words[:1] for w in str(some).split(" ")), *words[1:], "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def cells(path: str) -> dict[str, list[str]]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


ALL = "nats, typicality, complexity, likelihood-ratio, ensemble, waic, mahalanobis, dose"


def test_every_score_has_a_column_a_p_value_and_a_flag(here, answer):
    by = f"{ALL}, likelihood-regret steps=3"
    found = answer(
        "score run new.npz --background background --members second --fpr 0.05 --out s.csv",
        *("--by", by),
    )
    table = cells("s.csv")
    labels = [text.strip().replace("-", "_") for text in by.split(",")]
    assert list(found["scores"]) == labels
    assert "p_value" not in table
    known = load("known.npz").split("held-out")
    assert found["calibration"]["n"] == len(known)
    for label in labels:
        scores = np.array(table[label], float)
        p = np.array(table[f"p_value_{label}"], float)
        one = found["scores"][label]
        assert one["mean"] == pytest.approx(scores.mean())
        assert one["nan"] == 0
        flag = np.array(table[f"flag_{label}"]) == "true"
        assert (flag == (scores > one["threshold"])).all()
        assert (flag == (p <= 0.05)).all()
        assert flag.sum() == one["flagged"]
    train = load("known.npz").split("train")
    reference = detectors.Reference(checkpoint.load("run/model.safetensors"), train=train)
    score = detectors.typicality(reference, load("new.npz"))
    np.testing.assert_allclose(np.array(table["typicality"], float), score, rtol=1e-6)
    calibration = detectors.typicality(reference, known)
    expected = anomaly.p_values(score, calibration)
    np.testing.assert_allclose(np.array(table["p_value_typicality"], float), expected)


def test_one_score_without_calibration(here, answer, capsys):
    found = answer("score run new.npz --out s.csv", "--by", "complexity codecs=png")
    assert list(found["scores"]) == ["complexity codecs=png"]
    assert "calibration" not in found
    assert "complexity codecs=png" in cells("s.csv")
    assert answer("score run new.npz --out s.csv")["nan"] == 0
    capsys.readouterr()
    main(["score", "run", "new.npz", "--out", "s.csv", "--by", "typicality"])
    assert re.search(r"\ntypicality: [\d.]+ to [\d.]+, mean [\d.]+\n", capsys.readouterr().out)


def test_a_batch_is_tested_by_each_score(here, answer):
    found = answer("score run new.npz --drift", "--by", "nats,typicality,complexity")["drift"]
    tests = [found[name]["p_value"] for name in ("nats", "typicality", "complexity")]
    assert found["p_value"] == pytest.approx(min(1, 3 * min(tests)))
    assert found["typicality"]["p_value"] >= 0.001
    assert found["p_value"] < 0.05, "a quarter is noise"


def test_labeled_rows_by_each_score(here, answer, capsys):
    words = "evaluate run labeled.npz --labels label --background background --fpr 0.05"
    found = answer(words, "--by", "nats,typicality,likelihood-ratio,mahalanobis")
    assert list(found["scores"]) == ["nats", "typicality", "likelihood_ratio", "mahalanobis"]
    for one in found["scores"].values():
        assert 0 <= one["detection"]["auroc"]["value"] <= 1
        assert one["detection"]["at"][0]["rate"] == 0.05
    plain = answer(words.replace(" --background background", ""))
    assert plain["detection"] == found["scores"]["nats"]["detection"]
    main([*words.split(" "), "--by", "typicality"])
    assert "typicality: AUROC" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("run", "-log p(pixel | latents) in nats"),
        ("run --background background", "minus the same of the background model"),
        ("flow", "4 x 4 patch replaced by the mean around it"),
    ],
)
def test_maps_are_pictures_of_the_strangest(here, answer, words, what):
    run, *more = words.split(" ")
    found = answer(" ".join(["score", run, "new.npz --maps maps", *more]))
    assert what in found["maps"]["what"]
    index = found["maps"]["index"]
    assert len(index) == 16
    nats = answer(f"score {run} new.npz --out s.csv") and np.array(cells("s.csv")["nats"], float)
    assert sorted(nats[index]) == sorted(np.sort(nats)[-16:])
    for i in index:
        with Image.open(f"maps/{i:06}.png") as picture:
            assert picture.height > 1.8 * picture.width
    with np.load("maps/maps.npz") as saved:
        assert saved["index"].tolist() == index
        assert saved["nats"].shape == (16, 8, 8)
        assert np.isfinite(saved["nats"]).all()


def test_nan_is_counted_and_flagged(here, answer, capsys):
    Path("mine.py").write_text(
        "import numpy as np\nfrom musigma.detectors import DETECTORS\n\n\n"
        "@DETECTORS.register\ndef half_nan(reference, data):\n"
        "    nats = reference.nats(data)\n"
        "    return np.where((len(data) == 80) & (np.arange(len(data)) < 5), np.nan, nats)\n"
    )
    try:
        words = "score run new.npz --fpr 0.05 --out s.csv --plugin mine.py:half_nan"
        found = answer(words, "--by", "half_nan")
        one = found["scores"]["half_nan"]
        assert (one["nan"], one["mean"]) == (5, None)
        table = cells("s.csv")
        assert table["flag_half_nan"][:5] == ["true"] * 5
        assert [value in ("nan", "") for value in table["half_nan"][:6]] == [True] * 5 + [False]
        capsys.readouterr()
        main([*words.split(" "), "--by", "half_nan"])
        out, err = capsys.readouterr()
        assert "5 of 80 scores (half_nan) are NaN; they count as the strangest" in err
        assert "half_nan: nan to nan, mean nan, 5 NaN" in out
    finally:
        del detectors.DETECTORS["half_nan"]


FAULTS = {
    "unknown": ("score run new.npz --out s.csv --by strangeness", "by: .*known are .*typicality"),
    "twice": ("score run new.npz --out s.csv --by nats,nats", "by: expected each score once"),
    "option": ("score run new.npz --out s.csv --by regret=3", "by: .*known are"),
    "ratio": ("score run new.npz --out s.csv --by likelihood-ratio", "give it as background"),
    "alone": ("score run new.npz --out s.csv --by waic", "waic: it compares several models"),
    "no posterior": (
        "score flow new.npz --out s.csv --by likelihood-regret",
        "likelihood_regret: expected a model with one latent .*: none",
    ),
    "no image": ("score table rows.csv --out s.csv --by complexity", "expected images of integer"),
    "no picture": ("score table rows.csv --maps maps", "maps: they show images"),
    "file": ("score run new.npz --maps new.npz", "maps: expected a folder .* it is a file"),
    "no folder": ("score run new.npz --maps no/maps", "maps: .* there is no folder no"),
    "no run": (
        "score run new.npz --out s.csv --by nats --background none",
        "background: RUN: there is no run folder",
    ),
    "other data": (
        "score run new.npz --out s.csv --by waic --members table",
        r"members: expected a model of the same kind of data, shape \(1, 8, 8\)",
    ),
    "for nothing": (
        "score run new.npz --out s.csv --members second",
        r"members: it is for scores of anomalies; name some \(--by\)",
    ),
    "no labels": (
        "evaluate run new.npz --by typicality",
        "by: for labeled data alone; give --labels",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_said_and_nothing_is_written(here, capsys, name):
    words, message = FAULTS[name]
    before = set(here.iterdir())
    with pytest.raises(SystemExit) as exit_:
        call(words)
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert set(here.iterdir()) == before


def test_a_background_of_plain_images_is_noted(here, capsys):
    call("score run new.npz --out s.csv --by likelihood-ratio --background second")
    assert "second was trained on images that were not perturbed" in capsys.readouterr().err


def test_scores_of_anomalies_need_one_process(here, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ("--by typicality --out s.csv", "--maps maps"):
        with pytest.raises(SystemExit):
            call("score run new.npz", words)
        assert "needs all examples in one process, and there are 2" in capsys.readouterr().err
