"""The sections of the page of `make demo` show the content of their files."""

import csv
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from musigma import data, report

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "examples" / "demo" / "page.py"


def test_the_unusual_rows_are_those_with_the_most_nats(tmp_path):
    pytest.importorskip("sklearn")
    steps = runpy.run_path(str(PAGE))["STEPS"]
    steps["table"](tmp_path)
    table = data.load(tmp_path / "tumors.csv")
    assert (len(table), table.shape) == (569, (30,))
    nats = np.random.default_rng(0).normal(size=len(table))
    nats[[7, 500]] = 90, 80
    with (tmp_path / "scores.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "nats"])
        writer.writerows(enumerate(nats.tolist()))
    (tmp_path / "tumors").mkdir()
    figure = {"nats": -34.8, "standard_error_nats": 3.1, "n": 54}
    (tmp_path / "tumors" / "evaluation.json").write_text(json.dumps(figure))
    steps["rows"](tmp_path)
    section = json.loads((tmp_path / "rows.json").read_text())
    assert [row[:2] for row in section["tables"][0]["rows"][:2]] == [
        ["7", "90.0"],
        ["500", "80.0"],
    ]
    assert "-34.8 ± 3.1 nats by the flow" in section["text"][0]
    (tmp_path / "tumors" / "config.json").write_text("{}")
    page = report.write(
        tmp_path / "page.html", [tmp_path / "tumors"], sections=[tmp_path / "rows.json"]
    )
    assert "<td>500</td><td>80.0</td>" in page.read_text()


def test_the_reference_is_the_gaussian_of_the_training_rows(tmp_path):
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4)) @ random.normal(size=(4, 4)) + 3
    np.savetxt(tmp_path / "x.csv", x, delimiter=",", header="a,b,c,d", comments="")
    mean, error = runpy.run_path(str(PAGE))["gaussian_nats"](tmp_path / "x.csv")
    table = data.load(tmp_path / "x.csv")
    train, held_out = (table.split(part).x.astype(float) for part in ("train", "held-out"))
    reference = multivariate_normal(train.mean(0), np.cov(train.T, bias=True))
    nats = -reference.logpdf(held_out)
    assert mean == pytest.approx(nats.mean(), rel=1e-9)
    assert error == pytest.approx(nats.std(ddof=1) / len(nats) ** 0.5, rel=1e-9)


def test_the_makefile_runs_every_step_and_shows_every_section():
    text = (ROOT / "Makefile").read_text()
    steps = runpy.run_path(str(PAGE))["STEPS"]
    assert set(re.findall(r"page\.py (\w+) demo", text)) == set(steps)
    assert set(re.findall(r"--section demo/(\w+)\.json", text)) == set(steps) - {"table"}
