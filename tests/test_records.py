"""Records of figures: what they hold, what they refuse, and how they are compared."""

import contextlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from musigma import Chain, Dataset, Preprocess, Prior, StandardNormal, build, checkpoint, layers
from musigma.cli import main
from musigma.data import Given
from musigma.evaluation import Annealing, Record, compare, evaluate, record
from musigma.evaluation.paired import holm, paired

NORMAL = Prior(StandardNormal((2,)))
X = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)


def scaled(by: float) -> Chain:
    """The density of N(0, 1 / by²)."""
    return Chain([layers.Rescale(by)], NORMAL)


def nats(by: float) -> np.ndarray:
    return np.log(2 * np.pi) - 2 * np.log(by) + by**2 * (X.astype(float) ** 2).sum(1) / 2


def changed(one: Record, **fields) -> Record:
    """A record with other fields; `data` is merged."""
    fields["data"] = {**one.fields["data"], **fields.get("data", {})}
    return Record({**one.fields, **fields}, one.nats)


# --- the paired test -----------------------------------------------------------------------------


def test_paired_of_two_rows_has_a_closed_form():
    """With one degree of freedom t is Cauchy: P(|t| > a) = 1 - (2 / π) arctan a."""
    found = paired(np.array([1.0, 5.0]), np.array([2.0, 9.0]))  # differences of 1 and 4
    assert found.mean == 2.5
    assert found.standard_error == pytest.approx(1.5)
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2.5 / 1.5))
    half = 1.5 * math.tan(0.475 * math.pi)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half))


def test_paired_of_three_rows_has_a_closed_form():
    """With two degrees of freedom P(|t| > a) = 1 - a / sqrt(2 + a²), so t_0.975 = 4.3027."""
    found = paired(np.zeros(3), np.array([1.0, 2.0, 6.0]))
    error = math.sqrt(14 / 6)
    assert (found.mean, found.standard_error) == pytest.approx((3, error))
    t = 3 / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    quantile = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    assert (found.low, found.high) == pytest.approx((3 - quantile * error, 3 + quantile * error))


def test_an_interval_leaves_out_zero_just_where_p_is_below_5_percent():
    draw = np.random.default_rng(2)
    found = [paired(np.zeros(5), draw.normal(1, 1, 5)) for _ in range(200)]
    assert [one.low > 0 or one.high < 0 for one in found] == [one.p < 0.05 for one in found]
    assert len({one.p < 0.05 for one in found}) == 2


def test_differences_without_spread():
    assert paired(np.ones(3), np.ones(3)) == (0, 0, 0, 0, 1)
    assert paired(np.ones(3), np.full(3, 3.0)) == (2, 0, 2, 2, 0)
    one = paired(np.zeros(1), np.ones(1))
    assert (one.mean, math.isnan(one.p), math.isnan(one.low)) == (1, True, True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_difference_that_is_not_finite_is_not_left_out(bad):
    found = paired(np.zeros(3), np.array([0.0, 1.0, bad]))
    assert not math.isfinite(found.mean)
    assert math.isnan(found.p)
    assert math.isnan(found.low)


def test_holm():
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1, 1]
    with_none = holm([0.01, math.nan, 0.04])
    assert math.isnan(with_none[1])
    assert (with_none[0], with_none[2]) == pytest.approx((0.02, 0.04))
    assert holm([]) == []


# --- records -------------------------------------------------------------------------------------


def test_a_record_holds_the_figure_and_its_scores():
    data = Dataset(X, name="folder/rows.npy")
    one = record(scaled(2.0), data, split="held-out", seed=3)
    figure = evaluate(scaled(2.0), data, seed=3)
    assert {name: one.fields[name] for name in figure} == figure
    assert one.nats == pytest.approx(nats(2.0), abs=1e-5)
    assert one.fields["nats"] == one.nats.mean() == one.value[0]
    assert one.value[1] == one.nats.std(ddof=1) / math.sqrt(40)
    assert one.fields["data"]["source"] == "rows.npy"
    assert one.fields["data"]["preprocess"] == {}
    expected = {"measure": "density", "unit": "nats per example", "split": "held-out", "k": 1}
    expected |= {"seed": 3, "dequantization": None, "context": {}, "bound": "exact"}
    assert {name: one.fields[name] for name in expected} == expected


def test_a_record_comes_back_from_its_file(tmp_path):
    one = record(NORMAL, Dataset(X))
    one.nats[:2] = np.nan, np.inf  # as a model may score
    one.write(tmp_path / "a.json")
    again = Record.read(tmp_path / "a.json")
    assert again.fields == one.fields
    np.testing.assert_array_equal(again.nats, one.nats)
    again.write(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_digests_tell_examples_weights_and_models_apart():
    base, others = record(scaled(2.0), Dataset(X)), {}
    others["other rows"] = record(scaled(2.0), Dataset(X + 1))
    others["another order"] = record(scaled(2.0), Dataset(X[::-1].copy()))
    assert all(
        o.fields["data"]["digest"] != base.fields["data"]["digest"] for o in others.values()
    )
    torch.manual_seed(0)
    flows = [build("realnvp", (2,), bits=None, depth=d, hidden=4) for d in (1, 1, 2)]
    a, b, c = (record(flow, Dataset(X)).fields for flow in flows)
    assert a["model"] == b["model"] != c["model"]
    assert len({a["weights"]["digest"], b["weights"]["digest"], c["weights"]["digest"]}) == 3
    assert record(flows[0], Dataset(X)).fields == a


def test_integers_are_probabilities_and_their_dequantization_is_named():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    how: dict = {"bits": 8, "levels": 1, "depth": 1, "hidden": 4}
    for noise in ("uniform", "learned"):
        glow = build("glow", (1, 4, 4), dequantize=noise, **how)
        fields = record(glow, Dataset(pixels)).fields
        assert fields["dequantization"] == f"{noise} noise"
        assert (fields["measure"], fields["unit"], fields["bound"]) == (
            *("probability", "bits/dim", "elbo"),
        )
    vae = build("vae", (1, 4, 4), bits=1, net="mlp", latents=2, width=4)
    black = Dataset(pixels, preprocess=Preprocess(binarize="threshold"))
    k3 = record(vae, black, k=3)
    assert k3.fields["dequantization"] is None
    assert (k3.fields["bound"], k3.fields["k"]) == ("iwae-3", 3)
    assert k3.scores.mean() == pytest.approx(k3.fields["bits_per_dim"])
    assert k3.fields["data"]["preprocess"] == {"size": None, "bits": 8, "binarize": "threshold"}


def test_how_draws_are_annealed_is_recorded():
    vae = build("mlp_vae", (2,), bits=None, latents=1, hidden=4)
    one = record(vae, Dataset(X[:3]), k=(1, 2), annealing=Annealing(steps=2, leapfrogs=1))
    assert (one.fields["bound"], one.fields["k"]) == ("ais-2", 2)
    assert one.fields["annealing"] == {"steps": 2, "leapfrogs": 1, "from_prior": False}
    assert one.fields["curve"][-1]["nats"] == one.fields["nats"]


def test_draws_of_binarization_are_part_of_the_preprocessing():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    vae = build("vae", (1, 4, 4), bits=1, net="mlp", latents=2, width=4)
    data = Dataset(pixels, preprocess=Preprocess(binarize="dynamic"))
    a, b, c = (record(vae, data, seed=s, batch_size=n) for s, n in ((0, 64), (1, 64), (0, 2)))
    for other in (b, c):
        with pytest.raises(ValueError, match=r"preprocessing: .* binarize dynamic, seed 0, batch"):
            compare({"a": a, "b": other})


def test_typed_columns_have_a_measure_of_their_own():
    from musigma.schema import Column, Schema

    rows = np.stack([np.arange(40.0) % 7 / 3, np.arange(40) % 2], 1)
    columns = Column("size"), Column("kind", "category", ("a", "b"))
    schema = Schema(columns).measure(rows)
    data = Dataset(rows, schema=schema)
    model = build("realnvp", data.spec(), depth=1, hidden=4)
    fields = record(model, data).fields
    assert fields["measure"] == "probability of kind, density of the other columns"
    assert fields["dequantization"] == "uniform noise"


def test_context_is_recorded_by_the_content_of_its_variables():
    given = {"age": Given(np.arange(40, dtype=np.float32)), "unused": Given(X[:, 0].copy())}
    data = Dataset(X, given=given, labels=np.arange(40) % 2, label_names=("u", "v"))
    model = build("realnvp", data.spec(("label", "age")), depth=1, hidden=4)
    found = record(model, data).fields["context"]
    assert list(found) == ["label", "age"]
    other = Dataset(X, given=given, labels=1 - np.arange(40) % 2, label_names=("u", "v"))
    again = record(model, other).fields["context"]
    assert again["age"] == found["age"]
    assert again["label"] != found["label"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not a whole JSON file"),
        (lambda text: "[" * 100_000, "not a whole JSON file"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "does not match its digest"),
        (lambda text: text.replace('"scores": "A', '"scores": "B'), "does not match its digest"),
        (lambda text: text.replace("figure/1", "figure/9"), "got 'musigma-figure/9'"),
        (lambda text: '{"nats": 1.0}', "got no record"),
        (lambda text: "[]", "got no record"),
    ],
)
def test_damaged_changed_and_foreign_files_are_refused(tmp_path, change, message):
    one = record(NORMAL, Dataset(X))
    one.nats[0] = 0.0  # so that the scores begin with A
    path = tmp_path / "a.json"
    one.write(path)
    text = path.read_text()
    path.write_text(change(text))
    assert path.read_text() != text
    with pytest.raises(ValueError, match=message):
        Record.read(path)


def test_a_record_without_what_it_must_hold_is_refused(tmp_path):
    one, path = record(NORMAL, Dataset(X)), tmp_path / "a.json"
    Record({**one.fields, "k": "1", "data": {}, "nats": one.nats[0]}, one.nats).write(path)
    with pytest.raises(ValueError, match=r"without usable k, data\.source, data\.digest"):
        Record.read(path)
    Record(one.fields, one.nats[:-1]).write(path)
    with pytest.raises(ValueError, match="without usable scores"):
        Record.read(path)
    Record({**one.fields, "unit": "hartleys"}, one.nats).write(path)
    with pytest.raises(ValueError, match="without usable unit"):
        Record.read(path)
    with pytest.raises(ValueError, match="there is no such file"):
        Record.read(tmp_path / "none.json")


# --- comparison ----------------------------------------------------------------------------------


def test_differences_are_those_of_the_examples():
    data, scales = Dataset(X), {"one": 1.0, "two": 2.0, "half": 0.5}
    found = compare({name: record(scaled(by), data) for name, by in scales.items()})
    for name in ("two", "half"):
        expected = paired(nats(1.0), nats(scales[name]))
        assert found.differences[name] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert list(found.corrected.values()) == holm([one.p for one in found.differences.values()])
    assert found.remarks == ()
    assert "p (Holm)" in str(found)
    json.dumps(found.to_dict(), allow_nan=False)


def test_images_are_compared_in_bits_per_dimension():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 4, 4), dtype=np.uint8)
    data, how = Dataset(pixels), {"bits": 8, "net": "mlp", "latents": 2, "width": 4}
    a, b = (record(build("vae", (1, 4, 4), **how), data) for _ in range(2))
    found = compare({"a": a, "b": b})
    expected = b.fields["bits_per_dim"] - a.fields["bits_per_dim"]
    assert found.differences["b"].mean == pytest.approx(expected)
    assert any("tighter bound" in line for line in found.remarks)


def test_all_differences_are_named_at_once():
    one = record(NORMAL, Dataset(X))
    data = {"digest": "0" * 32, "shape": [3], "preprocess": {"size": 8}}
    other = {"measure": "probability", "unit": "bits/dim", "split": "all", "context": {"age": "1"}}
    a = changed(one, bound="elbo", split="held-out")
    b = changed(one, bound="iwae-4", k=4, data=data, **other)
    with pytest.raises(ValueError, match="different things") as caught:
        compare({"a": a, "b": b})
    lines = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        *("examples", "shape", "preprocessing", "measure", "unit", "split", "context", "k")
    ]
    with pytest.raises(ValueError, match="different things") as caught:
        compare({"a": a, "b": b}, allow=("split", "context", "k"))
    assert len(str(caught.value).splitlines()) == 6


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("split", {"split": "train"}),
        ("context", {"context": {"age": "1"}}),
        ("k", {"k": 4, "bound": "iwae-4"}),
        ("k", {"bound": "ais-1", "annealing": {"steps": 9}}),
    ],
)
def test_a_difference_may_be_allowed_and_is_then_remarked_on(name, change):
    one = changed(record(NORMAL, Dataset(X)), bound="elbo")
    other = changed(one, **change)
    with pytest.raises(ValueError, match=rf"{name}: .*--allow {name} compares them"):
        compare({"a": one, "b": other})
    found = compare({"a": one, "b": other}, allow=[name])
    assert found.remarks[0].startswith(f"Different, but allowed: {name}: ")
    assert found.differences["b"].mean == 0


def test_bounds_are_compared_with_exact_values_of_which_the_safe_direction_is_named():
    one = record(NORMAL, Dataset(X))
    found = compare({"exact": one, "bound": changed(one, bound="iwae-8", k=8)})
    assert found.remarks[0].startswith("Upper bounds of -log p: bound. The others are exact.")


def test_examples_that_a_model_was_trained_on_are_remarked_on():
    one = record(NORMAL, Dataset(X))
    (line,) = compare({"a": one, "b": changed(one, data={"seen": True})}).remarks
    assert line.startswith("b: the model was trained on some of these examples")


def test_scores_that_are_not_finite_are_counted_and_not_averaged_away():
    x = X.copy()
    x[3:5] = 1e30  # whose squares are infinite in float32
    data = Dataset(x)
    a, b = record(NORMAL, data), record(scaled(0.5), data)
    b.nats[7] = np.nan
    assert a.fields["non_finite"] == 2
    assert a.value == (None, None)
    found = compare({"a": a, "b": b})
    assert found.remarks[0].startswith("a: 0 of 40 scores are NaN and 2 infinite.")
    assert found.remarks[1].startswith("b: 1 of 40 scores are NaN and 2 infinite.")
    assert str(found).count("not finite") >= 3
    json.loads(json.dumps(found.to_dict()["records"], allow_nan=False))


def test_fewer_than_two_records_or_unknown_differences_are_refused():
    one = record(NORMAL, Dataset(X))
    with pytest.raises(ValueError, match="expected two or more; got 1"):
        compare({"a": one})
    with pytest.raises(ValueError, match="allow: expected split, context, k; got examples"):
        compare({"a": one, "b": one}, allow=["examples"])


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two flows and a VAE of rows that they were not trained on."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    torch.manual_seed(0)
    how: dict = {"bits": None, "hidden": 4, "depth": 1}
    weights = {"ema": 0.99, "step": 7, "validation": True}
    for name in ("a", "b"):
        model = build("realnvp", (2,), **how)
        checkpoint.save(model, f"{name}.safetensors", extra={"weights": weights})
    checkpoint.save(build("vae", (2,), bits=None, net="mlp", width=4), "vae.safetensors")
    return tmp_path


def call(capsys, *words: str, code: int = 0) -> str:
    """Run a command; what it printed on standard output, or on standard error if it fails."""
    with contextlib.nullcontext() if code == 0 else pytest.raises(SystemExit) as stop:
        main([*words])
    assert code == (stop.value.code if stop else 0)
    out, err = capsys.readouterr()
    return err if code else out


def test_records_are_written_and_compared(models, capsys):
    for name in ("a", "b"):
        out = f"{name}.json"
        text = call(capsys, "evaluate", f"{name}.safetensors", "x.npy", "--out", out)
        assert text.splitlines()[-1] == f"record: {out}"
    words = "evaluate vae.safetensors x.npy --k 3 --out c.json --json"
    answer = json.loads(call(capsys, *words.split()))
    one = Record.read("c.json")
    assert {name: answer[name] for name in one.fields} == one.fields
    assert (answer["out"], answer["run"], answer["k"]) == ("c.json", "vae.safetensors", 3)
    assert "ema" not in one.fields["weights"]
    assert Record.read("a.json").fields["weights"]["step"] == 7
    found = json.loads(call(capsys, "compare", "a.json", "b.json", "c.json", "--json"))
    assert list(found["differences"]) == ["b", "c"]
    expected = paired(Record.read("a.json").nats, Record.read("b.json").nats)
    assert found["differences"]["b"]["mean"] == expected.mean
    text = call(capsys, "compare", "a.json", "b.json")
    assert "40 examples: all of x.npy." in text
    assert "averaged" in text
    for suffix, sign in ((".md", "±"), (".html", "±"), (".tex", r"$\pm$")):
        call(capsys, "compare", "a.json", "b.json", "--out", f"t{suffix}")
        assert sign in Path(f"t{suffix}").read_text(encoding="utf-8")


def test_one_command_compares_records_or_tables_and_not_both(models, capsys):
    call(capsys, "evaluate", "a.safetensors", "x.npy", "--out", "a.json")
    Path("old").mkdir()
    Path("old/evaluation.json").write_text('{"nats": 1.0, "bound": "exact"}')
    faults = {
        ("a.json", "x.npy"): "sources: a.json: expected other records .*; got x.npy",
        ("x.npy",): "sources: expected a real and a synthetic table, or two or more records",
        ("a.json",): "records: expected two or more; got 1",
        ("a.json", "a.json", "--rows", "9"): "rows: for tables alone",
        ("x.npy", "x.npy", "--allow", "k"): "allow: for records alone",
        ("a.json", "old"): r"old/evaluation\.json: expected a record .* got no record",
        ("a.json", "a.json", "--out", "t.pdf"): r"out: expected a \.html, \.md or \.tex file",
    }
    for words, message in faults.items():
        assert re.search(message, call(capsys, "compare", *words, code=2)), words
    text = call(capsys, "evaluate", "a.safetensors", "x.npy", "--out", "a.csv", code=2)
    assert "expected a .json file" in text
