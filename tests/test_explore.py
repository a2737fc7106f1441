"""The page of `musigma explore`: its answers, its Python lines, what it refuses, what it loads."""

import base64
import io
import json
import re
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import musigma
from musigma import questions
from musigma.checkpoint import save
from musigma.cli import main
from musigma.cli.explore import explorer_of
from musigma.cli.options import Common, DataOptions
from musigma.cli.trained import Trained
from musigma.evaluation import inspect
from musigma.explore import Explorer, answers
from musigma.report.figures import pixels
from musigma.spec import Spec, Variable
from musigma.testing import randomized

pytest.importorskip("fastapi", reason="pip install 'musigma[explore]'")

from fastapi.testclient import TestClient

from musigma.explore import server
from musigma.explore.survey import Turns

STATIC = Path(server.__file__).parent / "static"
DIGITS, TABLE = "digits.npz", "table.csv"


def built(kind):
    """A tiny model of a kind, and the data that it is for."""
    torch.manual_seed(0)
    image, label = Spec((1, 8, 8), 256), Variable("label", names=("a", "b"))
    if kind == "vector":
        spec = Spec((3,), columns=("u", "v", "w"))
        return musigma.build("vae", spec, latents=2, width=8), TABLE
    if kind == "image":
        return musigma.build("vae", image, net="mlp", latents=4, width=16), DIGITS
    if kind == "conditional":
        spec = Spec((1, 8, 8), 256, context=(label,))
        return musigma.build("vae", spec, net="mlp", latents=4, width=16), DIGITS
    if kind == "flow-prior":
        spec = Spec((3,), columns=("u", "v", "w"))
        return musigma.build("vae", spec, latents=2, width=8, prior="flow", prior_depth=2), TABLE
    if kind == "ladder":
        return musigma.build("ladder", image, width=8), DIGITS
    return musigma.build("glow", image, levels=2, depth=1, hidden=8), DIGITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (24, 1, 8, 8), np.uint8)
    np.savez(folder / DIGITS, x=x, labels=np.array(["a", "b"] * 12))
    rows = "\n".join(",".join(f"{v:.5f}" for v in row) for row in random.normal(size=(40, 3)))
    (folder / TABLE).write_text(f"u,v,w\n{rows}\n")
    return folder


@pytest.fixture(scope="module")
def clients(folder):
    """Clients of the page of each kind of model, made when they are first asked for."""
    made = {}

    def client(kind):
        if kind not in made:
            model, source = built(kind)
            run = folder / kind
            run.mkdir(exist_ok=True)
            randomized(model)
            save(model, run / "model.safetensors")
            rows = [{"kind": "train", "step": i, "bits_per_dim": 9.0 - i} for i in range(3)]
            rows.append({"kind": "warning", "step": 3, "message": "one latent has collapsed"})
            (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            given = () if kind != "conditional" else ("label",)
            explorer = explorer_of(
                Trained(str(run), Common(device="cpu")),
                str(folder / source),
                DataOptions(given=given),
            )
            app = server.application(explorer)
            explorer.survey.wait()
            explorer.survey.thread.join()  # models of several pages share torch's random state
            made[kind] = TestClient(app, base_url="http://127.0.0.1").__enter__(), explorer
        return made[kind]

    yield client
    for client_, _ in made.values():
        client_.__exit__(None, None, None)


KINDS = ["vector", "image", "conditional", "flow-prior", "ladder", "flow"]


def got(client, path, **parameters):
    response = client.get(f"/api/{path}", params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def same(shown, x):
    """Whether what is shown is these examples."""
    if "images" in shown:
        levels = pixels(x)
        raw = [np.frombuffer(base64.b64decode(image), np.uint8) for image in shown["images"]]
        # where a mean lies between two levels, they may be rounded differently
        return np.abs(np.stack(raw).astype(int) - levels.reshape(len(levels), -1)).max() <= 1
    cells = [[float(cell) for cell in row] for row in shown["rows"]]
    return np.allclose(cells, x.numpy(), rtol=1e-3, atol=1e-3)


def run(program, folder, monkeypatch):
    """The names that a program defines."""
    monkeypatch.chdir(folder)
    names = {}
    before = torch.is_grad_enabled()
    try:
        exec(compile(program, "page", "exec"), names)
    finally:
        torch.set_grad_enabled(before)
    return names


# --- answers, and the lines that make the same ---------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_one_input_and_its_lines(kind, clients, folder, monkeypatch):
    client, _ = clients(kind)
    answer = got(client, "one", index=3, seed=5, count=3, temperature=0.5, set="1:1.5")
    names = run(answer["python"], folder, monkeypatch)
    assert same(answer["input"], names["x"])
    assert same(answer["reconstruction"], names["again"])
    assert same(answer["draws"], names["y"])
    latents = answer["latents"]
    assert [row["cost"] for row in latents] == sorted((r["cost"] for r in latents), reverse=True)
    for row in latents:
        i = row["place"]
        for name in ("mean", "std", "cost"):
            assert row[name] == pytest.approx(float(names[name][0, i]), abs=1e-5)
        if i != 1:  # which is set after it was drawn
            drawn = torch.cat([t.flatten(1) for t in names["z"]], 1)[:, i]
            assert row["draws"] == pytest.approx(drawn.tolist(), abs=1e-4)


def test_the_posterior_is_that_of_inspect(clients):
    client, explorer = clients("image")
    answer = got(client, "one", index=2)
    x, context = musigma.evaluation.batch(explorer.examples.data, np.array([2]), explorer.model)
    (latent,) = inspect(explorer.model, x, context)["latents"]
    for row in answer["latents"]:
        i = row["place"]
        assert row["mean"] == pytest.approx(latent["mean"][i], abs=1e-5)
        assert row["std"] == pytest.approx(latent["std"][i], abs=1e-5)
        assert row["cost"] == pytest.approx(latent["kl"][i], abs=1e-5)
    assert answer["cost"] == pytest.approx(latent["kl_total"], abs=1e-4)


def test_how_a_posterior_is_described(clients):
    kinds = {kind: got(clients(kind)[0], "about")["moments"] for kind in KINDS}
    assert kinds == {
        "vector": "posterior",
        "image": "posterior",
        "conditional": "posterior",
        "flow-prior": "estimated",
        "ladder": "posterior",
        "flow": "values",
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["prior", "example"])
def test_traversals_and_their_lines(kind, start, clients, folder, monkeypatch):
    client, explorer = clients(kind)
    answer = got(client, "decode", index=1, start=start, set="0:2,1:-1", along=0)
    before = got(client, "decode", index=1, start=start, along=0)
    names = run(answer["python"], folder, monkeypatch)
    assert same(answer["strip"], names["y"])
    z = run(answer["python"].split("\nplace =")[0], folder, monkeypatch)["z"]
    with torch.no_grad():
        y = explorer.model.decode(z, names["context"], whiten=True)
    assert same(answer["picture"], y)
    assert answer["picture"] != before["picture"]
    order = got(client, "order")
    assert order["total"] == pytest.approx(float(explorer.survey.cost.sum()), rel=1e-6)
    again = got(client, "decode", index=1, start=start, set="0:2,1:-1")["values"]
    for i, value in ((0, 2.0), (1, -1.0)):
        assert again.get(str(i), value) == pytest.approx(value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_and_its_lines(kind, clients, folder, monkeypatch):
    client, explorer = clients(kind)
    top = explorer.survey.top
    for axes in ("components", f"{top[1]},{top[0]}"):
        answer = got(client, "map", axes=axes, color="score")
        assert answer["done"] == answer["total"] == len(answer["x"]) == len(explorer.examples.data)
        assert not answer["error"]
        place = got(client, "hover", index=answer["index"][4], axes=axes)["place"]
        assert place == pytest.approx([answer["x"][4], answer["y"][4]], abs=2e-4)
        decoded = got(client, "at", axes=axes, places="0.5,-1;1,0.25")
        assert same(decoded["pictures"], run(decoded["python"], folder, monkeypatch)["y"])
    rest = got(client, "map", first=answer["total"] - 3)
    assert len(rest["x"]) == 3


def test_a_point_of_the_map_is_the_example_there_if_the_plane_holds_all_latents(clients):
    client, _ = clients("vector")
    place = got(client, "hover", index=7)["place"]
    there = got(client, "at", places=",".join(map(str, place)))["pictures"]
    known = got(client, "one", index=7)["reconstruction"]
    np.testing.assert_allclose(
        [float(cell) for cell in there["rows"][0]],
        [float(cell) for cell in known["rows"][0]],
        rtol=2e-3, atol=2e-3,
    )  # fmt: skip


def test_the_ellipse_is_the_covariance_of_draws(clients):
    client, explorer = clients("image")
    covariance = np.array(got(client, "hover", index=3)["covariance"])
    x, context, _ = explorer.examples[server.Choice(3)]
    torch.manual_seed(0)
    with torch.no_grad():
        draws = explorer.model.encode(x.repeat_interleave(4000, 0), context, whiten=True)[0]
    _, directions = explorer.survey.axes(None)
    np.testing.assert_allclose(np.cov((draws @ directions.T).numpy().T), covariance, rtol=0.1,
                               atol=0.02 * covariance.max())  # fmt: skip
    assert got(clients("flow")[0], "hover", index=3)["covariance"] is None


@pytest.mark.parametrize("kind", ["ladder", "flow"])
def test_levels_and_their_lines(kind, clients, folder, monkeypatch):
    client, explorer = clients(kind)
    answer = got(client, "levels", index=2, level=1, seed=3, count=2, temperature=0.7)
    names = run(answer["python"], folder, monkeypatch)
    assert same(answer["redrawn"], names["y"])
    assert [row["shape"] for row in answer["levels"]] == [list(s) for s in explorer.shapes]
    for row, mean in zip(answer["levels"], names["mean"], strict=True):
        shown = mean[0, :12].detach()
        assert (row["mean"]["low"], row["mean"]["high"]) == pytest.approx(
            (float(shown.min()), float(shown.max())), abs=1e-5
        )
    if kind == "flow":  # at temperature 1 with its own noise, a level would stay as it is
        kept = explorer.model.encode(names["y"], None, mode=True, whiten=True)
        wanted = explorer.model.encode(names["x"], None, mode=True, whiten=True)
        assert kept[0].shape == (2, *wanted[0].shape[1:])


def test_how_a_format_reads_an_output(clients):
    client, _ = clients("vector")
    for text in ("interleaved scale-first log_var", "two-heads softplus", "per-feature tanh"):
        answer = got(client, "head", format=text, numbers="1,2,-3,0.5,0,-1")
        names = {}
        exec(answer["python"], names)
        for name in ("mean", "log_std"):
            assert answer[name] == pytest.approx(names[name][0].tolist())
    answer = got(client, "head", format="interleaved scale-first log_var", numbers="1,2,3,4,5,6")
    assert answer["mean"] == [2, 4, 6]
    assert answer["log_std"] == [0.5, 1.5, 2.5]
    assert (answer["mean_from"], answer["scale_from"]) == ([1, 3, 5], [0, 2, 4])


def test_what_a_misread_scale_does(clients):
    client, _ = clients("vector")
    right = got(client, "mismatch", sampler="log_var", kl="log_var", noise=1)
    assert right["chosen"] == right["best"]
    assert right["std"][right["chosen"]] == pytest.approx(0.5**0.5, abs=0.01)
    exact = 0.5 * np.log(4 * np.pi)  # -log p of x = 0, which is of N(0, 2)
    assert min(right["bound"]) == pytest.approx(exact, abs=1e-3)
    wrong = got(client, "mismatch", sampler="log_std", kl="log_var", noise=1)
    assert wrong["std"][wrong["chosen"]] == pytest.approx(0.5, abs=0.01)  # as in the README
    assert wrong["loss"][wrong["chosen"]] < min(wrong["bound"])  # better than any model can be
    names = {}
    exec(wrong["python"], names)
    assert wrong["loss"] == pytest.approx(names["loss"].tolist())


def test_training_and_its_lines(clients, folder, monkeypatch):
    client, _ = clients("vector")
    answer = got(client, "training")
    assert answer["train"] == [[0, 9.0], [1, 8.0], [2, 7.0]]
    assert answer["warnings"][0]["message"] == "one latent has collapsed"
    with (folder / "vector" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "bits_per_dim": 5.0}\n')
    answer = got(client, "training")
    assert answer["train"][-1] == [4, 5.0]
    summary = run(answer["python"], folder, monkeypatch)["summary"]
    assert [list(point) for point in summary["train"]] == answer["train"]


def test_the_class_of_an_example_can_be_another(clients, folder, monkeypatch):
    client, _ = clients("conditional")
    own, other = (got(client, "one", index=0, label=label) for label in (0, 1))
    assert own["reconstruction"] == got(client, "one", index=0)["reconstruction"]
    assert own["reconstruction"] != other["reconstruction"]
    names = run(other["python"], folder, monkeypatch)
    assert names["context"].tolist() == [[0.0, 1.0]]
    assert same(other["reconstruction"], names["again"])


def test_a_move_waits_for_its_directions_and_leaves_them_the_model():
    model, data = flow_of_two(0.3)
    explorer = Explorer(model, data)  # whose survey has not begun
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(explorer.decode, server.Choice(), "prior", "", None, "0:1")
        try:
            assert asked.result(timeout=10)["picture"]["rows"]
        finally:
            explorer.survey.ready.set()  # or the pool would wait for ever


def test_a_single_example_has_a_page_without_a_map():
    model, data = built("image")[0], musigma.data.load("digits").subset([0])
    explorer = Explorer(randomized(model), data)
    explorer.survey.wait()
    moved = explorer.decode(server.Choice(), "example", "", None, "0:1")
    assert moved["picture"] == explorer.decode(server.Choice(), "example", "", None)["picture"]
    with pytest.raises(ValueError, match="two examples and two latent numbers; there are 1 and 4"):
        explorer.at(server.Choice(), "components", [[0.0, 0.0]])


# --- rows, planes, directions, anomalies ---------------------------------------------------------


def rows(n=300):
    """Rows of five columns that depend on each other, as text."""
    random = np.random.default_rng(0)
    age = random.integers(18, 80, n)
    sex = random.choice(["f", "m"], n)
    size = np.where(sex == "m", 1.8, 1.65) + 0.05 * random.normal(size=n)
    days = np.datetime64("2020-01-01") + random.integers(0, 99, n)
    paid = np.where(random.uniform(size=n) < 0.4, 0, random.gamma(2, 30, n)).round(2)
    lines = zip(age, sex, size.round(4), days, paid, strict=True)
    return "age,sex,size,day,paid\n" + "\n".join(",".join(map(str, line)) for line in lines)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A client of the page of a density of typed columns, and its folder."""
    folder = tmp_path_factory.mktemp("table")
    (folder / "people.csv").write_text(rows())
    data = musigma.data.load(folder / "people.csv", schema="infer")
    torch.manual_seed(0)
    model = randomized(musigma.build("table", data.spec(), hidden=16))
    save(model, folder / "model.safetensors", extra={"data": {"source": "people.csv"}})
    trained = Trained(str(folder / "model.safetensors"), Common(device="cpu"))
    explorer = explorer_of(trained, str(folder / "people.csv"), DataOptions(split="all"))
    with TestClient(server.application(explorer), base_url="http://localhost") as client:
        explorer.survey.wait().thread.join()
        yield client, explorer, folder


def test_conditionals_are_those_of_the_model(table, monkeypatch):
    client, explorer, folder = table
    answer = got(client, "columns", index=3)
    assert answer["how"] == "conditional"
    x, _, _ = explorer.examples[server.Choice(3)]
    row = dict(zip(explorer.examples.columns, explorer.examples.shown(x)["rows"][0], strict=True))
    inner = explorer.model
    for column in answer["columns"]:
        name = column["name"]
        given = {k: v if k in ("sex", "day") else float(v) for k, v in row.items() if k != name}
        exact = questions.marginal(inner, name, given)
        for value, p in column["masses"]:
            where = f"{name} == {value!r}" if name == "sex" else f"{name} == {value}"
            inside = 1 - (1 if name == "sex" else 2) / (exact.column.measured.rows + 2)
            assert p == pytest.approx(exact.probability(where) * inside, rel=1e-4, abs=1e-7)
        if curve := column["curve"]:
            inside = 1 - 2 / (exact.column.measured.rows + 2)
            x, p = np.array(curve["x"]), np.array(curve["p"])
            parts = p.sum() if curve["bars"] else (p[::2] * (x[1::2] - x[::2])).sum()
            total = parts + sum(q for _, q in column["masses"])
            assert total == pytest.approx(inside, rel=1e-4)  # the rest is outside all cells
    names = run(answer["python"], folder, monkeypatch)
    first = answer["columns"][0]
    assert first["name"] == "age"
    wanted = names["log_p"][: len(first["curve"]["p"]) // 2].exp().repeat_interleave(2)
    assert first["curve"]["p"] == pytest.approx(wanted.tolist(), rel=1e-6)


def test_a_model_without_latents_has_a_page(table, monkeypatch):
    client, explorer, folder = table
    about = got(client, "about")
    assert (about["dims"], about["moments"], about["conditionals"]) == (0, "", "conditional")
    answer = got(client, "one", index=5)
    assert answer["latents"] == []
    names = run(answer["python"], folder, monkeypatch)
    assert answer["nats"] == pytest.approx(float(names["nats"]))
    for path in ("order", "map", "hover", "at?places=0,1", "decode", "levels"):
        response = client.get(f"/api/{path}")
        assert response.status_code == 400
        assert "no latents" in response.json()["message"]
    assert got(client, "anomalies")["done"] == len(explorer.examples.data)


def flow_of_two(correlation):
    """A flow whose density is a known Gaussian, and data of it."""
    spec = Spec((2,), columns=("u", "v"))
    model = musigma.build("maf", spec, hidden=8, depth=1)
    scale = torch.linalg.cholesky(torch.tensor([[1.0, correlation], [correlation, 1.0]]))
    random = np.random.default_rng(0)
    x = (random.normal(size=(400, 2)) @ scale.numpy().T).astype(np.float32)
    return model, musigma.data.Dataset(x, columns=("u", "v"))


def test_a_slice_of_a_density_is_its_conditional():
    model, data = flow_of_two(0.0)
    randomized(model)
    explorer = Explorer(model, data)
    answer = explorer.conditionals(server.Choice(2))
    assert answer["how"] == "slice"
    x, _, _ = explorer.examples[server.Choice(2)]
    for j, column in enumerate(answer["columns"]):
        curve = column["curve"]
        values = np.linspace(curve["x"][0], curve["x"][-1], 4000)
        many = x.repeat(len(values), 1)
        many[:, j] = torch.from_numpy(values).float()
        with torch.no_grad():
            p = model.log_prob(many).double().exp().numpy()
        p /= np.trapezoid(p, values) if hasattr(np, "trapezoid") else np.trapz(p, values)
        wanted = np.interp(curve["x"], values, p)
        np.testing.assert_allclose(curve["p"], wanted, atol=0.03 * p.max())
        assert 0 <= column["less"] <= 1


def test_a_slice_of_a_bound_says_so(clients):
    client, _ = clients("vector")
    answer = got(client, "columns", index=1)
    assert answer["how"] == "bound"
    for column in answer["columns"]:
        curve = column["curve"]
        width = curve["x"][1] - curve["x"][0]
        assert sum(curve["p"]) * width == pytest.approx(1)


def test_a_plane_holds_data_density_and_draws():
    model, data = flow_of_two(0.6)
    randomized(model)
    explorer = Explorer(model, data)
    answer = explorer.plane(server.Choice())
    left, right, low, high = answer["box"]
    side = answer["side"]
    grid = np.array(answer["log_p"]).reshape(side, side)
    point = torch.tensor([[left + 5 / (side - 1) * (right - left),
                           low + 40 / (side - 1) * (high - low)]])  # fmt: skip
    with torch.no_grad():
        assert grid[40, 5] == pytest.approx(float(model.log_prob(point)), abs=1e-3)
    assert np.shape(answer["data"]) == (400, 2)
    assert np.shape(answer["samples"]) == (1000, 2)
    assert explorer.one(server.Choice(1), 0, 3, 1.0, "")["input"]["points"] == [
        pytest.approx(data.x[1].tolist())
    ]


@pytest.mark.parametrize("kind", ["image", "flow-prior"])
def test_directions_and_their_lines(kind, clients, folder, monkeypatch):
    client, explorer = clients(kind)
    named = got(client, "order")["directions"]
    along = ["component 1", "component 2", "component 3", "component 4"][
        : explorer.survey.points.shape[1]
    ]
    assert named == [*along, *(["label a", "label b"] if kind == "image" else [])]
    answer = got(client, "decode", index=1, start="example", move="0:2,1:-1", set="0:1", along=1)
    names = run(answer["python"], folder, monkeypatch)
    assert same(answer["strip"], names["y"])
    values = got(client, "decode", index=1, start="example", move="0:2,1:-1")["values"]
    before = got(client, "decode", index=1, start="example")["values"]
    step = 2 * explorer.survey.steps[0] - explorer.survey.steps[1]
    for place, value in values.items():
        assert value - before[place] == pytest.approx(float(step[int(place)]), abs=1e-4)


def test_a_step_along_a_component_is_its_standard_deviation(clients):
    _, explorer = clients("image")
    points, steps = explorer.survey.points, explorer.survey.steps
    unit = steps[:4] / steps[:4].norm(dim=1, keepdim=True)
    torch.testing.assert_close((points @ unit.T).std(0), steps[:4].norm(dim=1))
    has = explorer.examples.data.labels[explorer.survey.sample] == 0
    torch.testing.assert_close(steps[4], points[has].mean(0) - points[~has].mean(0))


@pytest.mark.parametrize("kind", ["image", "vector", "flow"])
def test_anomalies_and_their_lines(kind, clients, folder, monkeypatch):
    client, explorer = clients(kind)
    answer = got(client, "anomalies", rate=0.2, count=5)
    n = len(explorer.examples.data)
    assert answer["done"] == answer["total"] == n
    assert answer["n"] == n - 1
    scores = [row["score"] for row in answer["rows"]]
    assert scores == sorted(scores, reverse=True)
    names = run(answer["python"], folder, monkeypatch)
    assert scores == pytest.approx(np.sort(names["scores"])[::-1][:5].tolist(), rel=1e-5)
    assert [row["p"] for row in answer["rows"]] == pytest.approx(np.sort(names["p"])[:5].tolist())
    assert answer["rows"][0]["p"] == pytest.approx(1 / n)
    assert answer["flagged"] == int((names["p"] <= 0.2).sum()) == int(0.2 * n)
    assert (
        answer["threshold"] == pytest.approx(np.sort(scores)[::-1][: int(0.2 * n)].min()) or n > 25
    )
    low, high = answer["between"]
    assert low < 0.2 < high
    assert same(answer["shown"], explorer.examples.batch([r["index"] for r in answer["rows"]])[0])
    if kind == "vector":
        assert "maps" not in answer
    else:  # the same scale for all
        low, high = names["nats"].min(), names["nats"].max()
        gray = (255 * (names["nats"] - low) / (high - low)).round()
        drawn = [np.frombuffer(base64.b64decode(i), np.uint8) for i in answer["maps"]["images"]]
        np.testing.assert_allclose(np.stack(drawn), gray.reshape(5, -1), atol=1)
    small = got(client, "anomalies", rate=1e-4)
    assert "cannot be guaranteed" in small["reason"]
    assert small["flagged"] == 0


def test_two_columns_with_missing_values_are_rows_of_a_table(tmp_path):
    lines = [f"{i % 7}.25,{'' if i % 5 == 0 else i / 10}" for i in range(60)]
    (tmp_path / "two.csv").write_text("u,v\n" + "\n".join(lines))
    data = musigma.data.load(tmp_path / "two.csv", schema="infer")
    explorer = Explorer(musigma.build("table", data.spec(), hidden=8), data)
    assert not explorer.about()["flat"]
    answer = explorer.one(server.Choice(0), 0, 3, 1.0, "")
    assert answer["input"]["rows"] == [["0.25", ""]] == [answer["cells"]]


def test_scores_are_compared_with_those_of_normal_examples():
    torch.manual_seed(0)
    model, data = flow_of_two(0.3)
    odd = musigma.data.Dataset(np.append(data.x[:20], [[9.0, -9.0]], 0).astype(np.float32))
    explorer = Explorer(model, odd, normal=data.subset(range(20, 400)))
    explorer.survey.start()
    explorer.survey.thread.join()
    answer = explorer.anomalies(0.01, 0, 3)
    assert (answer["apart"], answer["n"], answer["flagged"]) == (True, 380, 1)
    assert answer["rows"][0]["index"] == 20
    assert answer["rows"][0]["p"] == pytest.approx(1 / 381)
    assert answer["rows"][0]["score"] > answer["threshold"] > answer["rows"][1]["score"]
    assert sum(answer["histogram"]["known"]) > 370


def test_a_score_that_is_no_number_is_the_strangest():
    model, data = flow_of_two(0.0)
    explorer = Explorer(model, data)
    survey = explorer.survey
    survey.scores[:5] = [1.0, np.inf, 2.0, 3.0, 0.0]
    survey.done = 5
    survey.start = lambda: None
    answer = explorer.anomalies(0.25, 0, 2)
    assert [row["index"] for row in answer["rows"]] == [1, 3]
    assert sum(answer["histogram"]["data"]) == 4


@pytest.mark.parametrize("color", ["column u", "score", ""])
def test_a_map_is_colored_by_columns(color, clients):
    client, explorer = clients("vector")
    answer = got(client, "map", color=color)
    wanted = explorer.survey.scores if color != "column u" else explorer.examples.data.x[:, 0]
    assert answer["color"] == pytest.approx(wanted.tolist())


def test_a_map_is_colored_by_levels(table):
    _, explorer, _ = table
    values, names = explorer.examples.color("column sex", np.arange(6))
    assert names == ["f", "m"]
    assert set(values.tolist()) <= {0.0, 1.0}


class Halves:
    """Stands for `umap.UMAP`: the first two coordinates, halved."""

    def __init__(self, **options):
        assert options == {"random_state": 0, "n_jobs": 1}

    def fit_transform(self, points):
        return points[:, :2] / 2


def test_a_map_by_umap(clients, folder, monkeypatch):
    client, explorer = clients("image")
    module = types.ModuleType("umap")
    module.UMAP = Halves
    monkeypatch.setitem(sys.modules, "umap", module)
    monkeypatch.setattr(explorer.survey, "embedding", None)
    first = got(client, "map", axes="umap")
    assert first["total"] == 24
    explorer.survey.embedding.thread.join()
    answer = got(client, "map", axes="umap", color="score")
    assert answer["done"] == 24
    centers = explorer.survey.points  # of all examples, which are fewer than the sample
    np.testing.assert_allclose(answer["x"], centers[:, 0] / 2, atol=1e-4)
    np.testing.assert_allclose(answer["color"], explorer.survey.scores)
    hover = got(client, "hover", axes="umap", index=3)
    assert hover["place"] == pytest.approx((centers[3, :2] / 2).tolist())
    place = ",".join(map(str, hover["place"]))
    decoded = got(client, "at", axes="umap", places=f"{place};0,0")
    names = run(decoded["python"], folder, monkeypatch)
    assert same(decoded["pictures"], names["y"])
    torch.testing.assert_close(names["flat"][0], centers[3], rtol=1e-3, atol=1e-3)


def test_an_example_that_was_not_scored_has_no_color(monkeypatch):
    monkeypatch.setattr("musigma.explore.survey.MOST", 50)
    monkeypatch.setattr("musigma.explore.survey.EMBEDDED", 30)
    module = types.ModuleType("umap")
    module.UMAP = Halves
    monkeypatch.setitem(sys.modules, "umap", module)
    model, data = flow_of_two(0.3)
    explorer = Explorer(randomized(model), data.subset(range(100)))
    survey = explorer.survey
    survey.wait().thread.join()
    survey.embed().thread.join()
    answer = explorer.map("umap", "score", 0)
    scores = dict(zip(survey.rows.tolist(), survey.scores.tolist(), strict=True))
    colors = dict(zip(answer["index"], answer["color"], strict=True))
    assert {i: c for i, c in colors.items() if not np.isnan(c)} == {
        i: scores[i] for i in colors if i in scores
    }
    assert 10 < np.isnan(list(colors.values())).sum() < 20


def test_umap_that_fails_is_a_message(clients, monkeypatch):
    client, explorer = clients("image")
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(explorer.survey, "embedding", None)
    got(client, "map", axes="umap")
    explorer.survey.embedding.thread.join()
    assert got(client, "map", axes="umap")["error"].startswith("UMAP: ModuleNotFoundError")
    response = client.get("/api/at?axes=umap&places=0,0")
    assert response.status_code == 400
    assert "UMAP" in response.json()["message"]


# --- uploads -------------------------------------------------------------------------------------


def png(size=(20, 12), mode="RGB", color=(200, 30, 90), kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, color).save(file, kind)
    return file.getvalue()


def test_an_image_is_uploaded_and_its_lines_read_it(clients, folder, monkeypatch):
    client, _ = clients("image")
    random = np.random.default_rng(1)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (21, 30, 3), np.uint8)).save(file, "PNG")
    content = file.getvalue()
    key = client.post("/api/upload", params={"name": "../mine.png"}, content=content).json()
    answer = got(client, "one", upload=key["upload"])
    (folder / "mine.png").write_bytes(content)
    names = run(answer["python"], folder, monkeypatch)
    assert same(answer["input"], names["x"])
    assert same(answer["reconstruction"], names["again"])
    assert answer["input"]["width"] == answer["input"]["height"] == 8


def bomb():
    """A small PNG file of 30,000 x 30,000 pixels."""
    content = bytearray(png((8, 8), "L", 0))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello, this is no image", "of no known format"),
        (b"<!doctype html><p>", "is a web page"),
        (png()[:60], "not a readable image"),
        (bomb(), "pixels"),
        (png((6000, 6000), "L", 0), "36,000,000 pixels"),
        (png(mode="RGBA", color=(1, 2, 3, 4)), "transparent"),
        (png(mode="I;16", color=3), "16-bit"),
        (b"", "empty"),
        (b"0" * (server.BYTES + 1), "more than 20,000,000 bytes"),
    ],
    ids=["text", "html", "cut", "bomb", "large", "transparent", "16-bit", "empty", "bytes"],
)
def test_bad_uploads_are_refused(content, reason, clients):
    client, _ = clients("image")
    response = client.post("/api/upload", params={"name": "a.png"}, content=content)
    assert 400 <= response.status_code < 500
    assert reason in response.json()["message"]
    assert got(client, "one")["index"] == 0  # the server lives on


def test_a_page_of_another_site_uploads_nothing(clients):
    client, _ = clients("image")
    response = client.post("/api/upload", content=png(), headers={"Origin": "https://evil.test"})
    assert response.status_code == 403
    assert "another site" in response.json()["message"]
    own = client.post("/api/upload", content=png(), headers={"Origin": "http://127.0.0.1"})
    assert own.status_code == 200


def test_rows_are_typed(clients, folder, monkeypatch):
    client, _ = clients("vector")
    key = client.post("/api/row", content=json.dumps(["0.5", "-1", "2e-1"])).json()["upload"]
    answer = got(client, "one", upload=key)
    assert answer["input"]["rows"] == [["0.5", "-1", "0.2"]]
    assert same(answer["reconstruction"], run(answer["python"], folder, monkeypatch)["again"])
    bad = [
        (["1", "2"], "expected 3"),
        (["1", "2", "x"], "w: expected a finite number"),
        (["1", "2", "nan"], "finite"),
        ("1", "JSON list"),
        ([1, 2, 3], "JSON list"),
    ]
    for cells, reason in bad:
        response = client.post("/api/row", content=json.dumps(cells))
        assert response.status_code == 400
        assert reason in response.json()["message"]
    assert client.post("/api/upload", content=png()).status_code == 400


def test_the_cells_of_a_row_are_the_row():
    model, _ = built("vector")
    x = np.array([[123456.7, 0.12345678, -1e-9], [1, 2, 3]], np.float32)
    explorer = Explorer(model, musigma.data.Dataset(x, columns=("u", "v", "w")))
    cells = explorer.one(server.Choice(0), 0, 3, 1.0, "")["cells"]
    key = explorer.examples.row(cells)["upload"]
    assert explorer.examples[server.Choice(0, key)][0].tolist() == x[:1].tolist()


def test_an_upload_that_is_repeated_is_kept_as_the_newest(clients, monkeypatch):
    monkeypatch.setattr("musigma.explore.examples.UPLOADS", 2)
    _, explorer = clients("vector")
    rows = (["1", "1", "1"], ["2", "2", "2"], ["1", "1", "1"], ["3", "3", "3"])
    keys = [explorer.examples.row(row)["upload"] for row in rows]
    assert list(explorer.examples.uploads) == [keys[0], keys[3]]


def test_rows_of_typed_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{20 + i % 30},{'fm'[i % 2]},{1.5 + i % 7 / 10}" for i in range(60)]
    Path("people.csv").write_text("age,sex,height\n" + "\n".join(lines))
    data = musigma.data.load("people.csv", schema="infer")
    model = musigma.build("vae", data.spec(), latents=2, width=8)
    save(model, "model.safetensors", extra={"data": {"source": "people.csv"}})
    trained = Trained("model.safetensors", Common(device="cpu"))
    explorer = explorer_of(trained, None, DataOptions(split="all"))
    with TestClient(server.application(explorer), base_url="http://localhost") as client:
        key = client.post("/api/row", content=json.dumps(["41", "f", "1.7"])).json()["upload"]
        answer = got(client, "one", upload=key)
        assert answer["input"]["rows"][0][:2] == ["41", "f"]
        assert got(client, "about")["columns"] == ["age", "sex", "height"]
        names = run(answer["python"], tmp_path, monkeypatch)
        assert answer["cost"] == pytest.approx(float(names["cost"].sum()), abs=1e-5)
        assert client.post("/api/row", content=json.dumps(["x", "f", "1"])).status_code == 400
        assert "not a run folder" in client.get("/api/training").json()["message"]


# --- what is refused, and what never fails -------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("one?index=24", "index: expected 0 to 23; got 24"),
        ("one?index=-1", "index: expected 0 to 23"),
        ("one?index=x", "index: input should be a valid integer"),
        ("one?seed=-1", "seed: expected 0"),
        ("one?count=0", "expected 1 to 64"),
        ("one?count=100000", "expected 1 to 64"),
        ("one?temperature=nan", "temperature"),
        ("one?set=9:1", "latent: expected 0 to 3; got 9"),
        ("one?set=0:x", "set: expected"),
        ("one?set=0:inf", "set: expected"),
        ("one?upload=../../etc/passwd", "upload it again"),
        ("one?label=1", "label: expected"),
        ("decode?start=here", "start: expected"),
        ("decode?along=99", "latent: expected"),
        ("map?axes=0,0", "axes: expected two"),
        ("map?axes=a", "axes: expected 'components'"),
        ("map?color=red", "color: expected one of score, label"),
        ("columns", "columns: the examples of this model are not rows"),
        ("plane", "not two numbers"),
        ("anomalies?count=0", "first, count: expected"),
        ("anomalies?first=-1", "first, count: expected"),
        ("decode?move=99:1", "move: expected directions 0 to"),
        ("decode?move=0:x", "move: expected"),
        ("at?places=1", "pairs of numbers"),
        ("at?places=1,x", "expected numbers"),
        ("at?places=1,1e99", "below 1e6"),
        ("at?places=nan,1", "below 1e6"),
        ("at", "places: field required"),
        ("levels", "vectors, not images"),
        ("head?format=halfs&numbers=1,2,3,4,5,6", "did you mean 'halves'"),
        ("head?format=halves&numbers=1", "expected 6"),
        ("mismatch?sampler=log_std&kl=nothing", "unknown word"),
        ("mismatch?sampler=log_std&kl=log_var&noise=0", "noise: expected"),
        ("nothing", "not found"),
        ("upload", "not found"),
    ],
)
def test_bad_requests_are_messages(path, reason, clients):
    client, _ = clients("image")
    response = client.get(f"/api/{path}")
    assert 400 <= response.status_code < 500
    assert reason in response.json()["message"].replace("Not Found", "not found")


def test_no_request_gets_a_server_error(clients):
    client, _ = clients("image")
    paths = ["/api/one?index=99999999999999999999999", "/api/one?seed=" + "9" * 400, "/%00",
             "/..%2f..%2fpyproject.toml", "/static/../server.py", "/api/../server.py", "//",
             "/api/map?first=-99999999999", "/api/at?places=" + ";" * 9999]  # fmt: skip
    for path in paths:
        assert client.get(path).status_code < 500, path
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
        assert client.request(method, "/api/about").status_code < 500


def test_a_fault_of_the_model_is_a_message(clients, monkeypatch):
    client, _ = clients("image")

    def fail(*args, **kwargs):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(answers, "draws", fail)
    response = client.get("/api/one")
    assert response.status_code == 400
    assert response.json()["message"] == "ZeroDivisionError: by zero"
    monkeypatch.undo()
    assert got(client, "one")["index"] == 0


def test_parallel_requests_get_the_answers_of_single_ones(clients):
    client, _ = clients("image")
    asked = [{"index": i % 5, "seed": i, "count": 2} for i in range(12)]
    alone = [got(client, "one", **a) for a in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda a: got(client, "one", **a), asked)) == alone


def test_decoding_an_image_of_64_pixels_takes_less_than_50_ms():
    data = musigma.data.Dataset(np.arange(3 * 64 * 64).reshape(1, 3, 64, 64).astype(np.uint8))
    explorer = Explorer(musigma.build("vae", data.shape), data)
    seconds = []
    for i in range(6):
        start = time.process_time()  # other processes may use the cores
        explorer.decode(server.Choice(), "prior", f"0:{i}", None)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def test_answers_leave_the_random_state_and_the_mode_alone(clients):
    client, explorer = clients("image")
    explorer.model.train()
    before = torch.random.get_rng_state()
    got(client, "one", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert explorer.model.training
    explorer.model.eval()


def test_a_deleted_model_is_a_notice(folder, clients):
    client, explorer = clients("image")
    assert got(client, "one")["notice"] == ""
    path = folder / "image" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    try:
        assert "was deleted since this page was started" in got(client, "one")["notice"]
        path.write_bytes(content + b" ")
        assert "has changed" in got(client, "one")["notice"]
    finally:
        path.write_bytes(content)
        explorer.stamp = explorer._stamp()


# --- the page itself -----------------------------------------------------------------------------


def test_the_page_loads_nothing_from_other_hosts(clients):
    client, _ = clients("image")
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert page.headers["referrer-policy"] == "no-referrer"
    files = [path for path in STATIC.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".html", ".css", ".js", ".svg"}
    for path in files:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|(src|href)=\"/|url\(|@import", text), path
        name = path.relative_to(STATIC)
        assert client.get(f"/{name}").status_code == 200
        lines = text.splitlines()
        assert len(lines) <= 350
        assert max(map(len, lines)) <= 200, path
        for target in re.findall(r'from "(\.[^"]+)"', text):
            assert (path.parent / target).is_file(), (path, target)


def test_only_this_machine_is_answered_and_others_need_the_token(clients):
    _, explorer = clients("image")
    local = TestClient(server.application(explorer), base_url="http://evil.test")
    assert local.get("/api/about").status_code == 400
    outside = TestClient(server.application(explorer, "secret", local=False))
    for path in ("/", "/api/about", "/secre/", "/secret2/api/about"):
        assert outside.get(path).status_code == 404
    assert outside.get("/secret/api/about").status_code == 200
    assert "musigma explore" in outside.get("/secret/").text
    assert outside.get("/secret/api/one?index=99").status_code == 400
    assert outside.get("/secret/app.js").headers["content-security-policy"]


def test_hosts_and_tokens(monkeypatch):
    started, said = [], []
    monkeypatch.setattr(server, "application", lambda *a: started.append(a))
    monkeypatch.setattr(server.uvicorn, "Config", lambda *a, **k: None)
    monkeypatch.setattr(server.uvicorn, "Server", lambda config: _Idle())
    explorer = types.SimpleNamespace(turns=Turns())
    server.serve(explorer, "127.0.0.1", 0, said.append)
    server.serve(explorer, "0.0.0.0", 0, said.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", said[0])
    token = re.fullmatch(r"http://0\.0\.0\.0:\d+/([\w-]{20,})/", said[1])
    assert started == [(explorer, "", True), (explorer, token[1], False)]
    assert explorer.turns.served > time.monotonic()  # the survey begins after the first page
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ValueError, match=r"cannot listen on 127\.0\.0\.1:.*another --port"):
            server.serve(explorer, "127.0.0.1", busy.getsockname()[1], said.append)


class _Idle:
    def run(self, sockets):
        assert sockets[0].fileno() > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "no run folder"),
        (["RUN", "--port", "99999"], "port: expected 0 to 65535"),
        (["RUN"], "give --data"),
        (["RUN", "--data", "none.npz"], "none.npz"),
    ],
)
def test_bad_options_are_refused(words, reason, folder, clients, capsys):
    clients("image")
    with pytest.raises(SystemExit) as end:
        main(["explore", *(str(folder / "image") if w == "RUN" else w for w in words)])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_without_fastapi_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "musigma.explore.server", None)
    monkeypatch.delattr("musigma.explore.server")
    with pytest.raises(SystemExit):
        main(["explore", "run"])
    assert "pip install 'musigma[explore]'" in capsys.readouterr().err


def test_requests_go_before_the_survey():
    turns, order = Turns(), []
    with turns.first():
        waiting = [
            threading.Thread(target=_take, args=(turns.then, order, "survey")),
            threading.Thread(target=_take, args=(turns.first, order, "request")),
        ]
        waiting[0].start()
        waiting[1].start()
        while turns.waiting < 1:
            pass
    for thread in waiting:
        thread.join()
    assert order == ["request", "survey"]


def _take(turn, order, name):
    with turn():
        order.append(name)
