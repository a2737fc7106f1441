"""The page of a model without a server: a browser shows the numbers of Python."""

import base64
import json
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import musigma
from musigma.checkpoint import save
from musigma.cli import main
from musigma.data import Dataset
from musigma.explore import Explorer, answers, standalone
from musigma.explore.examples import Choice
from musigma.export.draws import Draws
from musigma.schema import Column, Schema
from musigma.spec import Spec, Variable
from musigma.testing import randomized
from tests.test_explore_browser import Visit
from tests.test_explore_browser import browser as browser  # a fixture

STATIC, BROWSER = standalone.HERE / "static", standalone.HERE / "browser"


def built(kind):
    """A small model, and data of its kind."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    label = Variable("label", names=("a", "b"))
    if kind == "vector":
        model = musigma.build("vae", Spec((2,), columns=("u", "v")), latents=3, width=8)
        data = Dataset(random.normal(size=(60, 2)).astype(np.float32), columns=("u", "v"))
    else:
        x = random.integers(0, 256, (60, 1, 8, 8), np.uint8)
        data = Dataset(x, labels=np.arange(60) % 2, label_names=("a", "b"))
        if kind == "glow":
            spec = Spec((1, 8, 8), 256)
            model = musigma.build("glow", spec, levels=1, depth=1, hidden=8)
        else:
            spec = Spec((1, 8, 8), 256, context=(label,))
            model = musigma.build("vae", spec, net="mlp", latents=4, width=16)
    return randomized(model).float().eval(), data


def near(got, wanted):
    return np.allclose(got, wanted, rtol=1e-4, atol=1e-4)


def alike(got, wanted):
    """Whether two sets of examples are shown alike: pixels may be rounded differently."""
    if "rows" in wanted:
        cells = [np.array(each["rows"], float) for each in (got, wanted)]
        return np.allclose(*cells, rtol=2e-3, atol=1e-4)
    levels = [
        np.array([list(base64.b64decode(image)) for image in each["images"]])
        for each in (got, wanted)
    ]
    return levels[0].shape == levels[1].shape and np.abs(levels[0] - levels[1]).max() <= 1


@pytest.fixture
def served(tmp_path):
    """The address of a folder that any static server could serve."""
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "page"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "vector", "glow"])
def test_a_browser_shows_the_numbers_of_python(kind, tmp_path, served, browser):
    pytest.importorskip("onnxruntime", reason="pip install 'musigma[export]'")
    model, data = built(kind)
    explorer = Explorer(model, data)
    try:
        about = standalone.write(explorer, tmp_path / "page")
    except ValueError as error:
        if "cannot be downloaded" in str(error):
            pytest.skip(str(error))
        raise
    assert about["examples"] == 60
    visit = Visit(browser, served, tmp_path)
    visit.page.set_default_timeout(120_000)
    for name in standalone.VIEWS:
        visit.open(name)
        getattr(visit, name)()
    views = visit.page.query_selector_all("nav a")
    assert [link.get_attribute("data-view") for link in views] == standalone.VIEWS
    visit.until("document.querySelector('#error').hidden")
    compare(visit.page, served, explorer, kind)
    visit.page.close()
    assert visit.faults == []


def compare(page, url, explorer, kind):
    """Ask the page and Python the same."""

    def ask(name, **parameters):
        return page.evaluate(
            "([url, name, parameters]) =>"
            " import(`${url}api.js`).then((module) => module.ask(name, parameters))",
            [url, name, parameters],
        )

    label = {"label": 1} if kind == "image" else {}
    of, model = Choice(3, "", label.get("label")), explorer.model
    got = ask("one", index=3, seed=2, temperature=0.7, set="0:1.5", **label)
    wanted = explorer.one(of, seed=2, count=8, temperature=0.7, changes="0:1.5")
    assert got["bound"] == wanted["bound"]
    assert near(got["cost"], wanted["cost"])
    by_place = {latent["place"]: latent for latent in got["latents"]}
    for latent in wanted["latents"]:
        for name in ("mean", "std", "cost"):
            assert near(by_place[latent["place"]][name], latent[name]), name
    for name in ("input", "reconstruction", "follows"):
        assert alike(got[name], wanted[name]), name

    # the draws and the bound, of the noise of the page
    known = json.loads(
        page.evaluate(
            "(url) => fetch(`${url}musigma.json`).then((response) => response.text())", url
        )
    )
    inputs = known["inputs"]["look"]
    noise = page.evaluate(
        "([url, inputs]) => import(`${url}source.js`).then((module) => Object.fromEntries("
        "Object.entries(module.noise(inputs, 8, 3)).map(([k, v]) => [k, [...v]])))",
        [url, inputs],
    )
    given = [
        torch.tensor(noise[value["name"]]).reshape(8, *value["shape"])
        for value in inputs
        if value["law"]
    ]
    x, context, _ = explorer.examples[of]
    many = x.repeat(8, *[1] * (x.ndim - 1)), None if context is None else context.repeat(8, 1)
    with torch.no_grad(), Draws(given):
        drawn = model.encode(*many, whiten=True)
        nats = -model(*many).elbo
        center = model.encode(x, context, mode=True, whiten=True)
        z = [a + 0.7 * (b - a) for a, b in zip(center, drawn, strict=True)]
        y = answers.decoded(model, z, context, explorer.places.changes("0:1.5"))
    assert near(got["nats"], float(nats[0]))
    assert alike(got["draws"], explorer.examples.shown(y))

    for start in ("prior", "example"):
        given = {"start": start, "set": "1:-2", "move": "0:1.5", "along": 2}
        if kind == "glow":
            given |= {"set": "5:-2"}
        got = ask("decode", index=3, **label, **given)
        wanted = explorer.decode(of, start, given["set"], 2, moves="0:1.5")
        assert alike(got["picture"], wanted["picture"])
        assert alike(got["strip"], wanted["strip"])
        assert all(near(got["values"][k], v) for k, v in wanted["values"].items())
    pair = ",".join(map(str, explorer.survey.top[:2]))
    for axes in ("components", pair):
        got, wanted = ask("hover", index=5, axes=axes), explorer.hover(Choice(5), axes)
        assert near(got["place"], wanted["place"])
        assert got["covariance"] == wanted["covariance"] is None or near(
            got["covariance"], wanted["covariance"]
        )
        got = ask("map", axes=axes, color="score")
        wanted = explorer.map(axes, "score", 0)
        assert got["axes"] == wanted["axes"]
        assert all(near(got[name], wanted[name]) for name in ("x", "y", "index", "color"))
        places = [[0.5, -0.25], [1.0, 2.0]]
        text = ";".join(",".join(map(str, place)) for place in places)
        got = ask("at", index=3, axes=axes, places=text, **label)
        assert alike(got["pictures"], explorer.at(of, axes, places)["pictures"])


# --- what the folder holds -----------------------------------------------------------------------


def test_every_question_of_the_views_has_an_answer():
    text = (BROWSER / "source.js").read_text(encoding="utf-8")
    known = re.search(r"const questions = \{(.*?)\n\};", text, re.DOTALL)[1]
    answered = set(re.findall(r"(\w+)(?=[:,])", known)) | {"decode"}
    for view in standalone.VIEWS:
        asked = re.findall(r'page\.ask\("(\w+)"', (STATIC / f"views/{view}.js").read_text())
        assert set(asked) - {"columns"} <= answered, view
    assert not re.search(r"https?:", text)


def test_the_index_says_what_is_in_the_folder_and_asks_no_other_host():
    model, data = built("vector")
    text = (STATIC / "index.html").read_text(encoding="utf-8")
    page = standalone._index(text, Explorer(model, data))
    assert "60 examples of the data are files beside it" in page
    assert "it was opened as a file" in page
    assert "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'" in page


def test_models_that_the_page_cannot_show_are_refused(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 2))
    schema = Schema((Column("u"), Column("v"))).measure(rows)
    model = musigma.build("vae", Spec((2,), schema=schema), latents=2, width=4).double()
    explorer = Explorer(model, Dataset(rows, schema=schema))
    with pytest.raises(ValueError, match="cannot show") as error:
        standalone.write(explorer, tmp_path / "page")
    assert all(text in str(error.value) for text in ("columns have types", "not float32"))
    plain, data = built("vector")
    with pytest.raises(ValueError, match="two examples or more"):
        standalone.write(Explorer(plain, data.subset([0])), tmp_path / "page")
    with pytest.raises(ValueError, match="npm pack onnxruntime-web"):
        standalone.write(Explorer(plain, data), tmp_path / "page", tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_of_other_kinds_are_refused(tmp_path, capsys):
    model, _ = built("vector")
    save(model, tmp_path / "model.safetensors")
    start = ["export", str(tmp_path / "model.safetensors")]
    for words, text in (
        (["--static", str(tmp_path / "page"), "--function", "decoder"], "function: --static"),
        (["--torch-export", str(tmp_path / "a"), "--data", "x.csv"], "data: it is for --static"),
        (["--onnx", str(tmp_path / "a"), "--examples", "9"], "examples: it is for --static"),
        (["--static", str(tmp_path / "page")], "give --data"),
    ):
        with pytest.raises(SystemExit):
            main([*start, *words])
        assert text in capsys.readouterr().err
