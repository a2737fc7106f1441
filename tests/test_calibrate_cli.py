"""`musigma calibrate`: draws given an observation, checked on pairs."""

import contextlib
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from musigma.cli import main

COLUMNS = ["theta_0", "theta_1", "x_0", "x_1", "x_2"]
WORDS = ("calibrated", "overconfident", "underconfident", "biased", "miscalibrated", "cannot tell")


def table(path: Path, n: int, seed: int, columns=COLUMNS) -> Path:
    random = np.random.default_rng(seed)
    theta = random.normal(size=(n, 2))
    clean = np.stack([theta.sum(1), theta[:, 0] - theta[:, 1], theta[:, 1]], 1)
    rows = np.concatenate([theta, clean + random.normal(size=(n, 3))], 1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows[:, [COLUMNS.index(name) for name in columns]].tolist())
    return path


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([w for word in words for w in str(word).split(" ")])
        except SystemExit as stop:
            return int(stop.code or 0), out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


def answer(*words: object) -> dict:
    code, out, err = call("calibrate", *words, "--json --device cpu")
    assert code == 0, err
    return json.loads(out)


def refused(*words: object) -> str:
    code, out, err = call("calibrate", *words, "--device cpu")
    assert code == 2
    assert not out
    return err


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("calibrate"), Path.cwd()
    os.chdir(folder)
    table(folder / "sims.csv", 1500, 0)
    table(folder / "test.csv", 300, 1)
    quick = "--batch-size 100 --evaluations 1 --evaluate-on 20 --device cpu --json"
    small = f"--depth 2 --hidden 16 {quick}"
    fast = "--standardize --lr 1e-2 --steps 150"
    assert call(f"train nsf sims.csv --given x_* --out run {fast} {small}")[0] == 0
    assert call(f"train nsf sims.csv --out plain {small} --steps 2")[0] == 0
    yield folder
    os.chdir(before)


def test_pairs_of_another_file(here):
    found = answer("run test.csv --draws 200 --local 2 --out page.html --ranks ranks.csv")
    assert found["verdict"] in WORDS
    assert (found["pairs"], found["draws"], found["source"]) == (300, 200, "test.csv")
    assert [test["name"] for test in found["tests"][:2]] == ["theta_0", "theta_1"]
    assert [test["kind"] for test in found["tests"][2:]] == ["region", "random", "near"]
    assert all(0 < test["p_value"] <= test["adjusted"] <= 1 for test in found["tests"])
    region = found["tests"][2]["coverage"]
    assert region["0.5"]["low"] < region["0.5"]["value"] < region["0.95"]["value"]
    # the exact posterior of either parameter
    assert 0.4 < found["contraction"]["theta_0"] < 0.8
    assert len(found["local"]["p_values"]) == 2
    page = Path("page.html").read_text(encoding="utf-8")
    assert found["out"] == "page.html"
    assert "theta_1" in page
    assert "test.csv" in page
    with open("ranks.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300
    u = np.array([float(row["rank_theta_0"]) for row in rows])
    assert np.mean(u <= 0.5) == pytest.approx(found["tests"][0]["curve"][49])
    assert answer("run test.csv --draws 200 --local 2")["tests"] == found["tests"]


def test_the_answer_in_words(here):
    code, out, _ = call("calibrate run test.csv --draws 100 --local 0 --device cpu")
    assert code == 0
    assert out.lower().startswith((*WORDS, "slightly"))
    for text in ("50, 80 and 95 %", "with a probability of 80 %", "Width of the draws", "TARP"):
        assert text in out


def test_training_data_are_used_held_out_and_said_so(here):
    code, out, err = call("calibrate run sims.csv --draws 50 --local 0 --device cpu")
    assert code == 0
    assert "sims.csv is what the model was trained on, so its held-out part is used" in err
    by_default = answer("run --draws 50 --local 0")
    assert by_default["pairs"] == answer("run sims.csv --draws 50 --local 0")["pairs"] < 300
    assert "sims.csv" in out
    for part in ("train", "all"):
        assert "the model was trained on sims.csv" in refused(f"run sims.csv --split {part}")


def test_given_observations(here):
    Path("observed.csv").write_text("x_0,x_1,x_2\n0.3,0.1,-0.2\n90,0,0\n")
    found = answer("run test.csv --draws 100 --at observed.csv")["local"]
    assert found["labels"] == ["0", "1"]
    assert found["outside"] == [0, 1]
    Path("short.csv").write_text("x_0,x_1\n0.3,0.1\n")
    assert "x_2" in refused("run test.csv --draws 100 --at short.csv")


def test_few_pairs_cannot_tell(here):
    found = answer("run test.csv --draws 100 --pairs 40 --local 0")
    assert (found["verdict"], found["pairs"]) == ("cannot tell", 40)
    assert found["detectable"] > found["tolerance"] == 0.1
    assert "40 of 300, chosen at random" in found["notes"][0]


def test_mistakes(here):
    assert "the model is conditioned on nothing" in refused("plain test.csv")
    few = table(Path("few.csv"), 12, 2)
    assert "expected 20 pairs or more" in refused(f"run {few}")
    for missing in ("theta_1", "x_1"):
        columns = [name for name in COLUMNS if name != missing]
        path = table(Path(f"no-{missing}.csv"), 50, 3, columns)
        assert missing in refused(f"run {path}")
    assert "pairs: expected 20 or more; got 5" in refused("run test.csv --pairs 5")
    assert "tolerance" in refused("run test.csv --tolerance 2 --draws 20 --local 0")
    assert "expected a .html, .md or .tex file" in refused("run test.csv --out page.pdf")
    assert not Path("page.pdf").exists()
