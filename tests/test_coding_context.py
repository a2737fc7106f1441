"""Files hold the context of their images, of any kind, and need nothing else to be read."""

import io
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from musigma import coding
from musigma.coding import Archive, Batch, DamagedFile, Examples, NumericsDiffer, compress
from musigma.coding.batch import DTYPES, unpacked_side
from musigma.coding.container import Writer
from musigma.coding.errors import Limits
from musigma.coding.reader import Reader
from musigma.data import Dataset, Given
from musigma.spec import Spec, Variable
from musigma.zoo import build

N = 20
VARIABLES = {
    "label": Variable("label", names=("cat", "dog", "owl")),
    "age": Variable("age"),
    "place": Variable("place", shape=(3,)),
    "sex": Variable("sex", classes=2),
    "photo": Variable("photo", shape=(1, 4, 4), levels=256),
}
CONTEXTS = [["label"], ["age"], ["place"], ["sex"], ["photo"], list(VARIABLES)]
MODELS = {
    "vae": ((1, 4, 4), {"net": "mlp", "width": 8, "latents": 3}),
    "glow": ((1, 4, 4), {"levels": 2, "depth": 1, "hidden": 8}),
    "ladder": ((1, 8, 8), {"levels": 2, "latents": 2, "width": 4}),
    "nsf": ((4,), {"depth": 1, "hidden": 8}),
}


def rows(names, n=N, seed=0):
    """Rows of variables: indices of classes, numbers, and images."""
    rng = np.random.default_rng(seed)
    made = {
        "label": rng.integers(0, 3, n),
        "age": rng.normal(0, 2, n).astype(np.float32),
        "place": rng.normal(0, 1, (n, 3)).astype(np.float32),
        "sex": rng.integers(0, 2, n),
        "photo": rng.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8),
    }
    return {name: made[name] for name in names}


def model_of(names, arch="vae", seed=0):
    torch.manual_seed(seed)
    shape, options = MODELS[arch]
    context = tuple(VARIABLES[name] for name in names)
    model = build(arch, Spec(shape, levels=8, context=context), **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model, np.random.default_rng(seed).integers(0, 8, (N, *shape))


def opened(data, model=None, **options):
    return Archive(io.BytesIO(data), model, workers=1, **options)


def written(model, x, **options):
    file = io.BytesIO()
    compress(model, x, file, workers=1, **options)
    return file.getvalue()


def same(batch, names):
    expected = rows(names)
    if "label" in expected:
        assert batch.about["labels"] == expected.pop("label").tolist()
    assert set(batch.given) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(batch.given[name], values, strict=True)


def pairs():
    for names in CONTEXTS:
        yield "vae", names
    for arch in ("glow", "ladder", "nsf"):
        yield arch, list(VARIABLES)


@pytest.mark.parametrize(("arch", "names"), list(pairs()))
def test_context_of_every_kind_is_stored_and_used(arch, names):
    model, x = model_of(names, arch)
    coding.check(model)
    data = written(model, x, given=rows(names), chunk=9)
    batch = coding.decompress(io.BytesIO(data), model, workers=1)
    assert (batch.levels == x).all()
    same(batch, names)
    codec, archive = opened(data, model).codec, opened(data, model)
    coded = codec.pack(x, coding.batch.context_of(model, batch), b"")
    assert (
        codec.unpack(coded, x.shape[1:], coding.batch.context_of(model, batch), b"") == x
    ).all()
    one = archive.one(13)
    assert (one.levels == x[13:14]).all()
    assert all((one.given[name] == batch.given[name][13:14]).all() for name in batch.given)


@pytest.mark.parametrize("names", CONTEXTS[1:])
def test_a_changed_context_does_not_decode(names):
    model, x = model_of(names)
    data = written(model, x, given=rows(names))
    reader = Reader(io.BytesIO(data))
    assert reader.arrays
    changed = {n: v for n, v in rows(names, seed=1).items() if n != "label"}
    about = {"labels": rows(["label"])["label"].tolist()} if "label" in names else {}
    file = io.BytesIO()
    with Writer(file, reader.header, arrays=True) as writer:
        chunk = reader.read(0)
        writer.write(coding.container.Chunk(
            index=0, first=0, count=N, kind=chunk.kind, raw=chunk.raw, schedule=chunk.schedule,
            exceptions=chunk.exceptions, side=Batch(x, about, changed).side, payload=chunk.payload,
        ))  # fmt: skip
    with pytest.raises((NumericsDiffer, DamagedFile)):
        opened(file.getvalue(), model).chunk(0)


def test_an_informative_context_makes_images_cheaper():
    """The image is a function of the class, so a wrong class is expensive."""
    torch.manual_seed(0)
    model = build(
        "vae", Spec((1, 4, 4), levels=2, context=(VARIABLES["sex"],)), net="mlp", width=32
    )
    sex = torch.arange(64) % 2
    x = (sex.view(-1, 1, 1, 1) == torch.arange(16).view(1, 1, 4, 4) % 2).float()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    onehot = torch.eye(2)[sex]
    for _ in range(60):
        optimizer.zero_grad()
        (-model.elbo(x, onehot).mean()).backward()
        optimizer.step()
    model.eval()
    right = coding.batch.with_context(model, x.numpy().astype(np.int64), sex.numpy())
    latents = coding.coder.latent_grids(model, x, onehot)
    codec = coding.Codec(model, numerics="exact", latents=latents)
    levels = right.levels
    true = codec.pack(levels, coding.batch.context_of(model, right), b"").bits
    false = codec.pack(levels, torch.eye(2)[1 - sex], b"").bits
    assert true < 0.5 * false


@pytest.mark.parametrize("arch", ["vae", "glow"])
def test_rows_of_a_single_variable_and_one_hot_rows(arch):
    model, x = model_of(["sex"], arch)
    sex = rows(["sex"])["sex"]
    as_indices = written(model, x, given={"sex": sex})
    assert written(model, x, given=sex) == as_indices
    assert written(model, x, given=torch.eye(2)[torch.from_numpy(sex)]) == as_indices
    vector = build("vae", (1, 4, 4), bits=3, context=2, net="mlp", width=8).eval()
    given_ = np.random.default_rng(0).normal(size=(N, 2)).astype(np.float32)
    data = written(vector, x, given=given_)
    assert (coding.decompress(io.BytesIO(data), vector).given["context"] == given_).all()


def test_files_without_arrays_have_the_first_format():
    model, x = model_of(["label"])
    reader = Reader(io.BytesIO(written(model, x, given=rows(["label"]))))
    assert not reader.arrays
    assert json.loads(reader.read(0).side) == {"labels": rows(["label"])["label"].tolist()}


FAULTS = {
    "nothing": (["age", "sex"], None, r"age: the model is conditioned on it \(shape \(1,\)"),
    "one of two": (["age", "sex"], {"age": 0}, r"sex: the model is conditioned on it \(2 classes"),
    "an array for two": (
        ["age", "sex"],
        np.zeros(N),
        "conditioned on 'age', 'sex'; give a mapping",
    ),
    "an array for none": ([], np.zeros(N), "conditioned on nothing"),
    "unknown": (["age"], {"age": 0, "sex": 0}, "given: the model is not conditioned on sex"),
    "few rows": (["age"], np.zeros(3, np.float32), "'age' has 3 rows for 20 examples"),
    "another shape": (["place"], np.zeros((N, 2), np.float32), r"place: .* got shape \(20, 2\)"),
    "another class": (["sex"], np.full(N, 2), "sex: expected 0 to 1; got 2 to 2"),
    "no class": (["sex"], np.zeros(N, np.float32), "sex: expected an integer for each example"),
    "not one-hot": (["sex"], np.ones((N, 2)), "'sex' must hold indices of classes, or one-hot"),
    "another type": (["age"], np.zeros(N, np.float16), "'age' is float16; expected uint8"),
    "text": (["age"], np.array(["a"] * N), "'age' is <U1; expected uint8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_context_are_named(fault, tmp_path):
    names, context, message = FAULTS[fault]
    model, x = model_of(names)
    if isinstance(context, dict):
        context = rows(list(context))
    with pytest.raises(ValueError, match=message):
        compress(model, x, tmp_path / "x.mus", given=context)
    assert not list(tmp_path.iterdir())


def test_chunks_are_small_enough_for_a_large_context(monkeypatch):
    monkeypatch.setattr(coding.archive, "Limits", lambda: Limits(side=200))
    model, x = model_of(["photo"])
    data = written(model, x, given=rows(["photo"]))
    assert [entry.count for entry in Reader(io.BytesIO(data)).entries] == [5] * 4
    same(coding.decompress(io.BytesIO(data), model), ["photo"])
    with pytest.raises(ValueError, match="chunk: expected 1 to 6 images; got 7"):
        written(model, x, given=rows(["photo"]), chunk=7)


def test_batches_carry_their_own_context():
    model, x = model_of(["age"])
    source = Batch(x, {}, rows(["age"]))
    with pytest.raises(ValueError, match=r"a Batch carries its own \(Batch.given\)"):
        written(model, source, given=rows(["age"]))
    assert written(model, source) == written(model, x, given=rows(["age"]))


# -- the bytes

ROWS = arrays.array_shapes(min_dims=1, max_dims=3, max_side=4)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 5),
    kinds=st.lists(st.tuples(st.sampled_from(DTYPES), ROWS), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_arrays_are_stored_exactly(n, kinds, seed):
    rng = np.random.default_rng(seed)
    made = {
        f"v{i}": rng.integers(0, 256, (n, *shape, np.dtype(kind).itemsize), np.uint8)
        .view(kind)
        .reshape(n, *shape)
        for i, (kind, shape) in enumerate(kinds)
    }
    batch = Batch(np.zeros((n, 1)), {"labels": list(range(n))}, made)
    about, back = unpacked_side(batch.side, n)
    assert about == {"labels": list(range(n))}
    for name, array in made.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


SIDE = Batch(np.zeros((2, 1)), {}, {"age": np.ones(2, np.float32)}).side


def side_of(listed, tail=b"", about=None):
    text = json.dumps({"about": about or {}, "given": listed}).encode()
    return b"\x01" + struct.pack("<I", len(text)) + text + tail


HOSTILE = {
    "short": SIDE[:-1],
    "long": SIDE + b"\0",
    "cut within the text": SIDE[:9],
    "cut within the length": SIDE[:3],
    "text of no end": b"\x01" + b"\xff" * 4 + SIDE[5:],
    "another type": side_of([["a", "<f2", []]], bytes(4)),
    "an object": side_of([["a", "|O", []]], bytes(16)),
    "a type that is none": side_of([["a", [], []]], bytes(16)),
    "negative": side_of([["a", "|u1", [-1]]], bytes(2)),
    "huge": side_of([["a", "|u1", [1 << 62]]], bytes(2)),
    "huge and empty": side_of([["a", "|u1", [0, 1 << 62, 1 << 62]]]),
    "a fraction": side_of([["a", "|u1", ["x"]]], bytes(2)),
    "not a list": side_of(7),
    "no rows": side_of([["a"]]),
    "about": side_of([["a", "|u1", []]], bytes(2), [1]),
    "deep": b"\x01" + struct.pack("<I", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_invalid_sides_are_damage(what):
    with pytest.raises(ValueError, match=r"."):
        unpacked_side(HOSTILE[what], 2)
    model, x = model_of(["age"])
    reader = Reader(io.BytesIO(written(model, x[:2], given=rows(["age"], 2))))
    file, chunk = io.BytesIO(), reader.read(0)
    fields = ("index", "first", "count", "kind", "raw", "schedule", "exceptions", "payload")
    with Writer(file, reader.header, arrays=True) as writer:
        parts = {name: getattr(chunk, name) for name in fields}
        writer.write(coding.container.Chunk(**parts, side=HOSTILE[what]))
    with pytest.raises(DamagedFile, match="made an error"):
        opened(file.getvalue(), model).chunk(0)


# -- data sets


def dataset(names, **options):
    values = rows(["label", *VARIABLES])
    x = np.random.default_rng(0).integers(0, 256, (N, 1, 4, 4)).astype(np.uint8)
    classes = {"sex": ("f", "m")}
    return Dataset(
        x,
        labels=values["label"],
        label_names=("cat", "dog", "owl"),
        given={n: Given(values[n], classes.get(n, ())) for n in names if n != "label"},
        **options,
    )


@pytest.mark.parametrize("names", CONTEXTS)
def test_data_sets_provide_the_context(names, tmp_path):
    torch.manual_seed(0)
    data = dataset(VARIABLES)
    model = build("vae", data.spec(names), net="mlp", width=8, latents=2).eval()
    examples = Examples(data, context=model.spec.context)
    file = io.BytesIO()
    compress(model, examples, file, about=examples.about, workers=1)
    archive = Archive(file, model, workers=1)
    same(coding.decompress(file, model), names)
    expected = {"label_names": ["cat", "dog", "owl"]} if "label" in names else {}
    expected |= {"given_names": {"sex": ["f", "m"]}} if "sex" in names else {}
    assert archive.about == expected
    coding.extract([(0, archive.chunk(0))], archive, tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")
    assert (found["x"] == data.take(np.arange(N))).all()
    for name in set(names) - {"label"}:
        assert (found[f"given_{name}"] == rows([name])[name]).all()


def test_classes_are_matched_by_name():
    """A subset may lack classes, and number the others differently."""
    torch.manual_seed(0)
    model = build("vae", dataset(["sex"]).spec(["label"]), net="mlp", width=8, latents=2).eval()
    some = dataset([]).subset(rows(["label"])["label"] > 0)
    part = Dataset(some.x, labels=some.labels - 1, label_names=("dog", "owl"))
    files = []
    for data in (some, part):
        examples, file = Examples(data, context=model.spec.context), io.BytesIO()
        compress(model, examples, file, about=examples.about, workers=1)
        files.append(file.getvalue())
    assert files[0] == files[1]


def test_a_data_set_that_lacks_a_variable_is_refused():
    with pytest.raises(ValueError, match=r"has no age"):
        Examples(dataset(["sex"]), context=(VARIABLES["age"], VARIABLES["sex"]))
    with pytest.raises(ValueError, match=r"has no label"):
        Examples(Dataset(dataset([]).array), labels=True)
