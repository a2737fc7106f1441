"""Models as codecs, other arithmetic, and whole files, also damaged and hostile ones."""

import dataclasses
import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from musigma import checkpoint
from musigma.coding import (
    Archive,
    Batch,
    Codec,
    CodingError,
    DamagedFile,
    LimitExceeded,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
    codec,
    compress,
    decompress,
    numerics,
)
from musigma.coding.coder import latent_grids
from musigma.coding.container import BITS_BACK, PACKED, RECORDS, Writer
from musigma.coding.densities import Quantizer, law_of
from musigma.coding.reader import Reader
from musigma.coding.stack import ONE, Exhausted, Stack
from musigma.distributions import (
    DiscretizedLogisticMixture,
    FactorizedBernoulli,
    FactorizedCategorical,
    StandardNormal,
)
from musigma.layers import Dequantize
from musigma.layers.maps import Spline
from musigma.model import Chain, Prior
from musigma.zoo import build

MLP = {"net": "mlp", "width": 8, "latents": 4}
FLOW = {"levels": 2, "depth": 1, "hidden": 8}
MODELS = {
    "vae-bernoulli": ("vae", (1, 4, 4), {"bits": 1, **MLP}),
    "vae-conv": ("vae", (3, 8, 8), {"net": "conv", "width": 4, "latents": 4}),
    "vae-logistic": ("vae", (1, 4, 4), {"likelihood": "logistic", **MLP}),
    "vae-categorical": ("vae", (1, 4, 4), {"bits": 3, "likelihood": "categorical", **MLP}),
    "vae-gaussian": ("vae", (1, 4, 4), {"likelihood": "gaussian", **MLP}),
    "vae-optimal": ("vae", (1, 4, 4), {"likelihood": "gaussian", "std": "optimal", **MLP}),
    "vae-flow": ("vae", (1, 4, 4), {"bits": 1, "prior": "flow", "prior_depth": 2, **MLP}),
    "vae-conditional": ("vae", (1, 4, 4), {"bits": 1, "context": 3, **MLP}),
    "ladder": ("ladder", (1, 8, 8), {"levels": 2, "latents": 2, "width": 4}),
    "glow": ("glow", (1, 4, 4), FLOW),
    "glow-additive": ("glow", (3, 4, 4), {"alpha": None, "coupling": "additive", **FLOW}),
    "glow-conv": ("glow", (3, 4, 4), {"permutation": "conv", **FLOW}),
    "glow-learned": (
        "glow", (1, 4, 4), {"dequantize": "learned", "permutation": "shuffle", **FLOW},
    ),
    "glow-conditional": ("glow", (1, 4, 4), {"permutation": "reverse", "context": 3, **FLOW}),
    "glow-classifier": (
        "published_glow", (1, 4, 4),
        {"conditioned": "top", "classifier": "softmax", "context": 3, **FLOW},
    ),
    "glow-16": ("glow", (1, 4, 4), {"bits": 16, **FLOW}),
    "realnvp": ("realnvp", (1, 8, 8), {"depth": 1, "hidden": 4, "levels": 2}),
    "realnvp-vectors": ("realnvp", (4,), {"bits": 5, "depth": 2, "hidden": 8}),
    "maf": ("maf", (4,), {"bits": 5, "depth": 2, "hidden": 8}),
    "maf-wide": ("maf", (16,), {"bits": 8, "depth": 3, "hidden": 128}),
    "nsf": ("nsf", (4,), {"bits": 5, "depth": 2, "hidden": 8}),
    "nsf-autoregressive": (
        "nsf", (4,), {"bits": 5, "depth": 1, "hidden": 8, "kind": "autoregressive"},
    ),
    "mlp_vae": ("mlp_vae", (1, 4, 4), {"bits": 1, "hidden": 8, "latents": 3}),
}  # fmt: skip


def made(name, n=16, noise=0.1):
    """A model with random weights, images, and context rows."""
    torch.manual_seed(0)
    arch, shape, options = MODELS[name]
    model = build(arch, shape, **options).eval()
    levels, classes = 2 ** options.get("bits", 8), options.get("context", 0)
    x = np.random.default_rng(0).integers(0, levels, (n, *shape))
    context = torch.eye(classes)[torch.arange(n) % classes] if classes else None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn(p.shape))
    model.calibrate(torch.from_numpy(x).float(), context)
    return model, x, context


def coder(name, kind="exact", n=16, noise=0.1):
    model, x, context = made(name, n, noise)
    latents = latent_grids(model, torch.from_numpy(x), context)
    return Codec(model, numerics=kind, latents=latents), x, context


# -- every architecture


@pytest.mark.parametrize("kind", ["exact", "pinned"])
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_a_codec(name, kind):
    codec_, x, context = coder(name, kind)
    coded = codec_.pack(x, context, b"salt")
    assert sum(coded.schedule) == len(x)
    assert (codec_.unpack(coded, x.shape[1:], context, b"salt") == x).all()
    with pytest.raises(NumericsDiffer):
        codec_.unpack(coded, x.shape[1:], context, b"other")


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_images_is_that_of_the_model(name):
    codec_, x, context = coder(name, n=64, noise=0.03)  # outliers cost less than by the model
    coded = codec_.pack(x, context, b"")
    model = codec_.model.float()
    with torch.no_grad():
        given = torch.from_numpy(x), context
        draws = torch.stack([-model(*given, closed_form=False).elbo for _ in range(24)])
    draws = draws.double() / math.log(2)
    spread = draws.var(0).sum().sqrt()
    error = 5 * spread.item() * math.sqrt(1 + 1 / 24) + 64  # up to two words of padding
    assert abs(coded.bits - draws.mean(0).sum().item()) < error + 2e-3 * x.size


class Bill:
    """A stack that adds up the cost of what is pushed, in bits."""

    def __init__(self):
        self.bits = 0.0

    def push_bits(self, bits, ones):
        share = np.where(np.asarray(bits).astype(bool), ones, ONE - ones) / ONE
        self.bits -= np.log2(share).sum()

    def push(self, values, sizes):
        self.bits += np.log2(sizes).sum()


def likelihoods():
    torch.manual_seed(0)
    scale = torch.full((2, 3, 3, 4, 4), -3.5)
    weights, means = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 3, 4, 4) - 0.5
    shifts = 0.3 * torch.randn(2, 3, 3, 4, 4)
    yield DiscretizedLogisticMixture(weights, means, scale, 256, shifts)
    yield DiscretizedLogisticMixture(weights, means, scale, 32, None)
    yield FactorizedCategorical(3 * torch.randn(2, 8, 3, 4, 4))
    yield FactorizedBernoulli(3 * torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("dist", list(likelihoods()), ids=["rgb", "gray", "any", "bits"])
def test_a_likelihood_costs_its_log_mass(dist):
    for _ in range(5):
        x = dist.sample()
        bill = Bill()
        law_of(dist, Quantizer(numerics.Rounding(), 0, 2, False)).push(bill, x.long().numpy())
        ideal = -dist.log_prob(x).sum().item() / math.log(2)
        assert bill.bits == pytest.approx(ideal, rel=2e-3)


def test_feature_by_feature_in_both_directions():
    """In float32, one pass over all features would round differently."""
    codec_, x, _ = coder("maf-wide", "pinned", n=64, noise=0.3)
    assert (codec_.unpack(codec_.pack(x, None, b""), x.shape[1:], None, b"") == x).all()


def test_values_beyond_float64_overflow():
    codec_ = coder("glow")[0]
    at_work = codec_._coder(Stack(np.ones(9, np.uint32)), 1)
    held = at_work._tensor(np.array([2**53 - 1, -(2**53) + 1]), 3)
    assert (held.numpy() * 8).tolist() == [2**53 - 1, -(2**53) + 1]
    with pytest.raises(OverflowError, match="larger than float64"):
        at_work._tensor(np.array([2**53 + 1]), 3)


def test_coding_and_decoding_a_batch_leaves_the_stack_unchanged():
    codec_, x, context = coder("glow")
    s = Stack(np.random.default_rng(0).integers(1, 1 << 32, 9999, dtype=np.uint32), foreign=True)
    before = s.words(foreign=True)
    with codec_._at_work():
        listed = codec_._push(s, x, context)
        back = codec_._coder(s, len(x), listed)
        assert (codec_.model.generate(back, None).numpy() == x).all()
    assert (s.words(foreign=True) == before).all()


def test_models_that_cannot_code_are_refused():
    with pytest.raises(ValueError, match="latents: expected 1 grids; got 0"):
        Codec(made("vae-bernoulli")[0], numerics="exact", latents=[])
    with pytest.raises(ValueError, match="numerics: expected exact or pinned"):
        Codec(made("glow")[0], numerics="fast", latents=[])
    beta = build("vae", (1, 4, 4), bits=3, likelihood="beta-binomial", **MLP)
    x = np.zeros((2, 1, 4, 4), np.int64)
    with pytest.raises(ValueError, match="FactorizedBetaBinomial has no coding rule"):
        compress(beta, x, io.BytesIO())
    with pytest.raises(ValueError, match="composed by hand"):
        compress(Chain([Dequantize(nn.Identity())], Prior(StandardNormal((4,)))), x, io.BytesIO())
    with pytest.raises(ValueError, match="data are continuous"):
        compress(build("realnvp", (2,), bits=None), x, io.BytesIO())


# -- the schedule, the seed, and an image that is too large


def test_batches_grow_and_only_the_first_image_pays():
    codec_, x, _ = coder("glow", n=400)
    coded = codec_.pack(x, None, b"")
    assert sum(coded.schedule) == 400
    assert coded.schedule[0] == 1
    assert max(coded.schedule) <= codec.BATCH
    assert coded.schedule[10] > 3 * coded.schedule[0]
    alone = codec_.pack(x[:1], None, b"")
    assert coded.seed < 1.5 * alone.seed
    for first in range(0, 400, 100):
        assert (
            coded.words.tolist() != codec_.pack(x[first : first + 100], None, b"").words.tolist()
        )


def test_an_underestimated_number_of_initial_bits_is_raised(monkeypatch):
    codec_, x, _ = coder("vae-gaussian")
    monkeypatch.setattr(Codec, "_need", lambda *_: 1.0)
    coded = codec_.pack(x, None, b"")
    assert (codec_.unpack(coded, x.shape[1:], None, b"") == x).all()


def test_an_image_that_needs_too_many_initial_bits(monkeypatch):
    codec_, x, _ = coder("vae-gaussian")
    monkeypatch.setattr(codec, "SEED", 8)
    monkeypatch.setattr(codec, "PROBE", 8)
    with pytest.raises(CodingError, match="use smaller images"):
        codec_.pack(x, None, b"")
    monkeypatch.setattr(codec, "SEED", 9999)
    coded = codec_.pack(x, None, b"")  # after several probes
    assert (codec_.unpack(coded, x.shape[1:], None, b"") == x).all()


def test_too_few_bits_are_reported_as_other_numerics(monkeypatch):
    codec_, x, _ = coder("vae-bernoulli")
    coded = codec_.pack(x, None, b"")
    short = dataclasses.replace(coded, words=coded.words[-2:])
    with pytest.raises(NumericsDiffer, match="no bits left"):
        codec_.unpack(short, x.shape[1:], None, b"")
    with pytest.raises(Exhausted):
        Stack(np.ones(2, np.uint32)).pop(np.full(9, 1 << 20))


# -- other arithmetic


def one_by_one(f):
    return lambda x, *a, **k: torch.cat([f(x[i : i + 1], *a, **k) for i in range(len(x))])


def channels_last(f):
    def g(x, *a, **k):
        x = x.to(memory_format=torch.channels_last) if x.ndim == 4 else x.t().contiguous().t()
        return f(x, *a, **k)

    return g


def by_numpy(f):
    def g(x, weight, bias=None, *a, **k):
        if x.ndim != 2 or a or k:
            return f(x, weight, bias, *a, **k)
        y = np.einsum("bi,oi->bo", x.numpy(), weight.numpy(), optimize=False)
        return torch.from_numpy(y) if bias is None else torch.from_numpy(y) + bias

    return g


def noisy(size):
    def wrap(f):
        return lambda *a, **k: (y := f(*a, **k)) * (1 + size * torch.randn_like(y))

    return wrap


def networks(monkeypatch, change):
    for name in ("linear", "conv2d"):
        old = getattr(nn.functional, name)
        monkeypatch.setattr(nn.functional, name, change(old))


def native(monkeypatch):
    def passed(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(numerics.Kernels, "__torch_function__", passed)


def threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)  # restored by `_at_work`
    torch.set_num_threads(2)


CHANGES = {
    "one by one": lambda m: networks(m, one_by_one),
    "channels last": lambda m: networks(m, channels_last),
    "numpy": lambda m: networks(m, by_numpy),
    "torch's kernels": native,
    "two threads": threads,
    "mkldnn off": lambda m: m.setattr(torch.backends.mkldnn, "enabled", False),
    "noise of 1e-15": lambda m: networks(m, noisy(1e-15)),
}
TRIED = ["vae-conv", "vae-flow", "ladder", "glow", "realnvp"]


def configurations():
    for name in TRIED:
        for change in CHANGES:
            first = name in ("vae-conv", "glow") or change == "one by one"
            # threads of OpenMP do not outlive a fork, which other tests of this process may make
            quick = first and change != "two threads"
            yield pytest.param(name, change, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("name", "change"), list(configurations()))
def test_exact_numerics_decode_under_any_configuration(name, change, monkeypatch):
    codec_, x, context = coder(name)
    coded = codec_.pack(x, context, b"")
    CHANGES[change](monkeypatch)
    assert (codec_.unpack(coded, x.shape[1:], context, b"") == x).all()


def test_float32_fails_under_other_configurations_and_is_caught(monkeypatch):
    """So the test above can fail; and wrong images are never returned."""
    caught = 0
    packed = []
    for name in TRIED:
        codec_, x, context = coder(name, "pinned")
        packed.append((codec_, x, context, codec_.pack(x, context, b"")))
    changes = {name: CHANGES[name] for name in ("one by one", "channels last", "numpy")}
    changes["rounding"] = lambda m: networks(m, noisy(1e-7))  # of float32, on any machine
    for change in changes.values():
        with monkeypatch.context() as m:
            change(m)
            for codec_, x, context, coded in packed:
                try:
                    assert (codec_.unpack(coded, x.shape[1:], context, b"") == x).all()
                except NumericsDiffer:
                    caught += 1
    assert caught >= 3


@pytest.mark.parametrize("name", ["vae-conv", "glow", "ladder", "maf"])
def test_exceptions_are_listed_and_looked_up(name, monkeypatch):
    monkeypatch.setattr(numerics, "GUARD", 0.05)
    codec_, x, context = coder(name)
    coded = codec_.pack(x, context, b"")
    assert sum(map(len, coded.listed)) > 10
    assert (codec_.unpack(coded, x.shape[1:], context, b"") == x).all()
    networks(monkeypatch, noisy(1e-7))  # less than half the guard, but enough to round differently
    assert (codec_.unpack(coded, x.shape[1:], context, b"") == x).all()


def test_a_missing_or_wrong_exception_is_detected(monkeypatch):
    monkeypatch.setattr(numerics, "GUARD", 0.05)
    codec_, x, context = coder("vae-conv", n=12)
    coded = codec_.pack(x, context, b"")
    seen = set()
    for batch, listed in enumerate(coded.listed):
        for key in list(listed)[::199]:
            for change in ("deleted", "turned"):
                entries = [dict(entry) for entry in coded.listed]
                if change == "deleted":
                    del entries[batch][key]
                else:
                    entries[batch][key] = not entries[batch][key]
                other = dataclasses.replace(coded, listed=entries)
                try:
                    assert (codec_.unpack(other, x.shape[1:], context, b"") == x).all()
                    seen.add((change, "right"))
                except NumericsDiffer:
                    seen.add((change, "refused"))
    assert {("deleted", "refused"), ("turned", "refused")} <= seen


@pytest.mark.parametrize("size", [1e-12, 1e-5, 1e-2])
@pytest.mark.parametrize("name", ["vae-conv", "glow", "ladder"])
def test_inexact_networks_decode_exactly_or_are_refused(name, size, monkeypatch):
    codec_, x, context = coder(name)
    coded = codec_.pack(x, context, b"")
    networks(monkeypatch, noisy(size))
    torch.manual_seed(0)
    try:
        assert (codec_.unpack(coded, x.shape[1:], context, b"") == x).all()
        assert size < 1e-3
    except NumericsDiffer:
        assert size > 1e-7


def test_a_map_too_steep_for_its_grid_is_an_overflow():
    """An empty interval: neither a division by zero, nor a wrong image."""
    from musigma.coding.rules import CouplingRule
    from musigma.layers import Coupling

    class Steep(nn.Module):
        def forward(self, x, context=None):
            out = torch.zeros(len(x), Spline().outputs, dtype=x.dtype)
            out[:, 3] = 30.0
            return out

    s = Stack(np.random.default_rng(0).integers(1, 1 << 32, 999, dtype=np.uint32), foreign=True)
    grid = 6
    layer = Coupling(Steep(), map=Spline())
    working = CouplingRule(
        layer, s, numerics.Rounding(), (grid, grid),
        lambda w, g: torch.from_numpy(np.ldexp(w.astype(float), -g)), None,
    )  # fmt: skip
    y = np.stack([np.zeros(640, int), np.arange(-320, 320)], 1)
    with pytest.raises(OverflowError):
        working.down(y)


# -- whole files

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz_coding.py"
spec = importlib.util.spec_from_file_location("fuzz_coding_files", FUZZ)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


def written(model, source, **options):
    file = io.BytesIO()
    compress(model, source, file, workers=1, **options)
    return file.getvalue()


def opened(data, model=None, **options):
    return Archive(io.BytesIO(data), model, workers=1, **options)


def again(data, header=None, chunk=None, model=None):
    """The file with a changed header or changed chunks."""
    reader, file = Reader(io.BytesIO(data)), io.BytesIO()
    model = model or (reader.model() if reader.model_size else None)
    with Writer(file, {**reader.header, **(header or {})}, model) as writer:
        for part in reader:
            writer.write(dataclasses.replace(part, **(chunk or {})))
    return file.getvalue()


@pytest.fixture(scope="module")
def small():
    model, x, _ = made("vae-bernoulli", n=24)
    return model, x, written(model, x, chunk=12)


def test_files_are_read_whole_and_by_image(small):
    model, x, data = small
    assert (decompress(io.BytesIO(data), model).levels == x).all()
    archive = opened(data, model)
    assert len(archive) == 24
    assert (archive.one(13).levels == x[13:14]).all()
    for index in (24, -1):
        with pytest.raises(IndexError, match="the file has 24"):
            archive.one(index)


@pytest.mark.parametrize("n", [1, 2])
def test_small_files(small, n):
    model, x, _ = small
    assert (decompress(io.BytesIO(written(model, x[:n])), model).levels == x[:n]).all()
    with pytest.raises(ValueError, match="no images"):
        written(model, x[:0])


def test_workers_change_nothing(small):
    model, x, _ = small
    file = io.BytesIO()
    torch.manual_seed(5)
    compress(model, x, file, chunk=5, workers=3)
    torch.manual_seed(5)
    assert file.getvalue() == written(model, x, chunk=5)


@pytest.mark.parametrize("name", ["vae-bernoulli", "glow"])
def test_a_flipped_byte_never_gives_wrong_images(name):
    model = made(name)[0]
    x = model.sample(8).numpy().astype(np.int64)
    data = written(model, x)
    archive = opened(data, model)
    entry = archive.reader.entries[0]
    assert entry.kind == BITS_BACK
    rng, refused = np.random.default_rng(0), 0
    for place in rng.choice(np.arange(entry.offset + 64, entry.end), 24, replace=False):
        broken = bytearray(data)
        broken[place] ^= 1 << rng.integers(8)
        broken = fuzz.repair(broken)
        try:
            archive.reader = Reader(io.BytesIO(broken))
            assert (archive.chunk(0).levels == x).all()
        except (NumericsDiffer, DamagedFile, LimitExceeded):
            refused += 1
    assert refused >= 23


def test_words_that_change_places(small):
    model, _, data = small
    chunk = Reader(io.BytesIO(data)).read(0)
    for i, j in ((0, 1), (1, 2), (3, -1)):
        words = np.frombuffer(chunk.payload, "<u4").copy()
        words[[i, j]] = words[[j, i]]
        other = again(data, chunk={"payload": words.tobytes()})
        with pytest.raises((NumericsDiffer, DamagedFile)):
            opened(other, model).chunk(0)
    for payload in (b"", chunk.payload[:-1], chunk.payload + b"\1\0\0\0", chunk.payload[:8]):
        with pytest.raises((NumericsDiffer, DamagedFile)):
            opened(again(data, chunk={"payload": payload}), model).chunk(0)


HEADERS = {
    "no shape": ({"shape": []}, DamagedFile),
    "another shape": ({"shape": [1, 4, 5]}, DamagedFile),
    "huge shape": ({"shape": [1 << 20, 1 << 20]}, DamagedFile),
    "another bits": ({"bits": 2}, DamagedFile),
    "17 bits": ({"bits": 17}, DamagedFile),
    "bits true": ({"bits": True}, DamagedFile),
    "no grid": ({"latents": []}, DamagedFile),
    "more grids": ({"latents": [3, 3]}, DamagedFile),
    "another grid": ({"latents": [4]}, NumericsDiffer),
    "a grid too fine": ({"latents": [5000]}, DamagedFile),
    "a grid of text": ({"latents": ["3"]}, DamagedFile),
    "no model": ({"model": {}}, DamagedFile),
    "another digest": ({"model": {"architecture": "vae", "digest": "0"}}, WrongModel),
    "later numerics": ({"numerics": "integer"}, UnknownVersion),
    "another coder": ({"coder": "rans"}, UnknownVersion),
    "another machine": ({"machine": {"torch": "1.0"}}, NumericsDiffer),
    "another print": ({"fingerprint": "0"}, NumericsDiffer),
    "about": ({"about": []}, DamagedFile),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_were_edited(small, what):
    model, _, data = small
    change, kind = HEADERS[what]
    with pytest.raises(kind):
        opened(again(data, change), model)


CHUNKS = {
    "raw": ({"raw": 1}, DamagedFile, "declares 1 bytes"),
    "raw kind": ({"kind": 0, "schedule": ()}, UnknownVersion, "raw; upgrade"),
    "records": ({"kind": RECORDS}, UnknownVersion, "one record per image"),
    "no json": ({"side": b"{"}, DamagedFile, "made an error"),
    "deep": ({"side": b"[" * 100_000}, DamagedFile, "made an error"),
    "list": ({"side": b"[]"}, DamagedFile, "missing"),
    "few names": ({"side": b'{"names":["a"]}'}, DamagedFile, "missing"),
    "text": ({"side": b'{"names":"abcdefghijkl"}'}, DamagedFile, "missing"),
    "labels": (
        {"side": b'{"labels":%s}' % json.dumps(["1"] * 12).encode()},
        DamagedFile,
        "integers",
    ),
    "far labels": (
        {"side": b'{"labels":[%s]}' % b",".join([b"9" * 99] * 12)},
        DamagedFile,
        "integers",
    ),
    "salt": (
        {"side": json.dumps({"labels": [0] * 12}).encode()},
        NumericsDiffer,
        "are not the images",
    ),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_chunks_that_were_edited(small, what):
    model, _, data = small
    change, kind, said = CHUNKS[what]
    with pytest.raises(kind, match=said):
        opened(again(data, chunk=change), model).chunk(0)


def test_the_right_the_wrong_and_the_embedded_model(small, tmp_path):
    model, x, data = small
    other = made("vae-bernoulli", noise=0.2)[0]
    with pytest.raises(WrongModel, match="another model"):
        opened(data, other)
    with pytest.raises(WrongModel, match="holds no model"):
        opened(data)
    within = written(model, x, embed=True)
    with pytest.raises(CodingError, match="--trust"):
        opened(within)
    assert (decompress(io.BytesIO(within), trust=True).levels == x).all()
    assert (decompress(io.BytesIO(within), model).levels == x).all()
    with pytest.raises(DamagedFile, match="cannot be built"):
        opened(again(within, model=b"no model"), trust=True)
    checkpoint.save(other, tmp_path / "other.safetensors")
    exchanged = again(within, model=(tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(WrongModel, match="not the model that the header names"):
        opened(exchanged, trust=True)


def test_limits(small):
    model, x, data = small
    with pytest.raises(LimitExceeded, match="bytes, decompressed"):
        opened(data, model, limits=Limits(total=100))
    with pytest.raises(LimitExceeded):
        opened(data, model, limits=Limits(chunk_images=5))
    with pytest.raises(ValueError, match="chunk: expected 1 to"):
        written(model, x, chunk=1 << 20)


@pytest.mark.parametrize("name", ["glow", "vae-bernoulli", "glow-16"])
def test_data_that_the_model_codes_badly_are_packed_by_xz(name):
    model, x, _ = made(name, n=30)
    with torch.no_grad():  # a bad model
        for p in model.parameters():
            p.add_(1.0)
    data = written(model, np.zeros_like(x))
    assert {entry.kind for entry in opened(data, model).reader.entries} == {PACKED}
    assert not decompress(io.BytesIO(data), model).levels.any()
    for bad in (b"", b"xz", Reader(io.BytesIO(data)).read(0).payload[:-9]):
        with pytest.raises(DamagedFile):
            opened(again(data, chunk={"payload": bad}), model).chunk(0)


def test_overflow_is_packed_by_xz_and_parameters_that_are_not_finite_are_refused():
    model, x, _ = made("glow", n=20)
    far = next(p for n, p in model.named_parameters() if n.endswith("log_scale"))
    far.data[:] = 19.0
    data = written(model, x)
    assert (decompress(io.BytesIO(data), model).levels == x).all()
    far.data[0] = math.nan
    with pytest.raises(CodingError, match="not finite"):
        written(model, x)
    model, x, _ = made("vae-bernoulli", n=20)
    next(model.parameters()).data[0] = math.nan
    with pytest.raises(CodingError, match="not finite"):
        written(model, x)


def test_an_empty_archive(small):
    model, _, data = small
    reader, file = Reader(io.BytesIO(data)), io.BytesIO()
    with Writer(file, reader.header):
        pass
    assert decompress(file, model).levels.shape == (0, 1, 4, 4)


def test_lost_chunks(small):
    model, x, data = small
    entry = opened(data, model).reader.entries[1]
    broken = bytearray(data)
    broken[entry.end - 3] ^= 1
    archive = opened(bytes(broken), model)
    assert (archive.chunk(0).levels == x[:12]).all()
    with pytest.raises(DamagedFile, match="chunk 1"):
        list(archive)
    cut = opened(data[: entry.offset + 10], model)
    assert (cut.chunk(0).levels == x[:12]).all()
    with pytest.raises(DamagedFile, match="missing"):
        list(cut)
    broken[entry.offset + 5] ^= 1
    with pytest.raises(DamagedFile, match="lost"):
        opened(bytes(broken), model).one(13)


@pytest.mark.parametrize("name", ["vae-conditional", "glow-conditional"])
def test_labels_of_conditional_models(name):
    model, _, context = made(name, n=12)
    x = model.sample(12, context).numpy().astype(np.int64)
    labels = context.argmax(1).tolist()
    named = fuzz.Named(Batch(x, {"labels": labels}))
    data = written(model, named)
    found = decompress(io.BytesIO(data), model)
    assert (found.levels == x).all()
    assert found.about["labels"] == labels
    for wrong in ([1] * 12, [7] * 12):
        side = json.dumps({"labels": wrong}).encode()
        with pytest.raises((NumericsDiffer, DamagedFile)):
            opened(again(data, chunk={"side": side}), model).chunk(0)
    with pytest.raises(ValueError, match="context: the model is conditioned on it"):
        written(model, x)


def test_verification_refuses_wrong_images(small, tmp_path, monkeypatch):
    model, x, _ = small
    path = tmp_path / "x.mus"
    path.write_bytes(b"old")
    monkeypatch.setattr(Archive, "_decoded", lambda self, chunk: Batch(x[:1]))
    with pytest.raises(NumericsDiffer, match="please report"):
        compress(model, x, path, workers=1)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    totals = []
    monkeypatch.setattr(Limits, "hold", lambda self, *_: totals.append(self.total))
    assert compress(model, x, path, workers=1).verified
    assert max(totals) > 1 << 50  # no limit for a file that was just written


def test_a_full_disk_leaves_the_old_file(small, tmp_path, monkeypatch):
    model, x, _ = small

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() > 300:
                raise OSError(28, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space"):
        compress(model, x, Full(), workers=1)
    monkeypatch.setattr(Writer, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    (tmp_path / "x.mus").write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        compress(model, x, tmp_path / "x.mus", workers=1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.mus"]
    assert (tmp_path / "x.mus").read_bytes() == b"old"
