"""Checkpoints: loading restores what was saved, and refuses damaged files."""

import json
import os
import pickle
import re
import struct

import pytest
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import nn

from musigma import checkpoint, zoo
from musigma.checkpoint import CheckpointError
from musigma.distributions import StandardNormal
from musigma.gaussian import GaussianHead
from musigma.layers import ActNorm
from musigma.model import VAE, Chain, Prior
from musigma.nets import MLP
from musigma.zoo import architecture, build
from musigma.zoo.flows.glow import to_format_1

IMAGES = {
    "vae": {"net": "mlp", "width": 8, "latents": 3},
    "vae conv": {"net": "conv", "width": 4, "latents": 3, "bits": 5},
    "vae flow prior": {"net": "mlp", "width": 8, "latents": 4, "prior": "flow", "prior_depth": 1},
    "vae gaussian": {"net": "mlp", "width": 8, "likelihood": "gaussian", "std": "optimal"},
    "vae binary": {"net": "mlp", "width": 8, "bits": 1},
    "ladder": {"levels": 2, "latents": 2, "width": 4},
    "realnvp": {"levels": 1, "depth": 1, "hidden": 4},
    "glow": {"levels": 2, "depth": 1, "hidden": 4, "dequantize": "learned"},
    "glow conv": {"levels": 1, "depth": 1, "hidden": 4, "permutation": "conv", "context": 3},
    "glow shuffled": {"levels": 1, "depth": 2, "hidden": 4, "permutation": "shuffle"},
}
SMALL = {"net": "mlp", "width": 2, "latents": 2, "likelihood": "bernoulli", "bits": 1}


def small_model(name: str, dtype=torch.float32):
    """A small model in which every parameter differs from its initial value."""
    torch.manual_seed(1)
    model = build(name.split()[0], (1, 8, 8), **IMAGES[name])
    x = torch.randint(0, 2, (6, 1, 8, 8))
    context = nn.functional.one_hot(torch.arange(6) % 3, 3).float() if "conv" in name else None
    model.calibrate(x, context if model.config["options"]["context"] else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model.to(dtype).eval()


def figures(model):
    """Everything that depends on weights, with fixed noise."""
    torch.manual_seed(2)
    dtype = next(model.parameters()).dtype
    classes = model.config["options"]["context"]
    context = torch.eye(3, dtype=dtype) if classes else None
    x = torch.randint(0, 2, (3, 1, 8, 8))
    evidence = model(x, context)
    return [*evidence, *model.encode(x, context, mode=True), model.sample(3, context)]


@pytest.fixture
def file(tmp_path):
    """The checkpoint of a small model."""
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    checkpoint.save(build("vae", (1, 2, 2), **SMALL), path, extra={"lr": 1e-05, "who": "é"})
    return path


def split(content: bytes) -> tuple[dict, bytes]:
    """The JSON of a safetensors header, and the rest of the file."""
    (n,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def joined(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + rest


def forge(path, change) -> None:
    """Rewrite a checkpoint with another header and the matching digest."""
    with safetensors.safe_open(path, framework="pt") as old:
        header = json.loads(old.metadata()["musigma"])
        tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
    del header["digest"]
    change(header, tensors)
    header["digest"] = checkpoint.digest(header, tensors)
    text = json.dumps(header, sort_keys=True)
    safetensors.save_file(tensors, path, metadata={"musigma": text})


def refused(path, message: str = "safetensors"):
    """Assert that loading raises a `CheckpointError` of one line that names the file."""
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


# -- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", IMAGES)
def test_round_trip_is_exact(tmp_path, name, dtype):
    model = small_model(name, dtype)
    checkpoint.save(model, tmp_path / "a.safetensors", extra={"note": ["ü", 1.5, None]})
    loaded, extra = checkpoint.read(tmp_path / "a.safetensors")
    assert extra == {"note": ["ü", 1.5, None]}
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype, key
        assert torch.equal(loaded.state_dict()[key], value), key
    for one, other in zip(figures(model), figures(loaded), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["vae", "glow", "ladder"])
def test_two_saves_are_the_same_bytes(tmp_path, name):
    model = small_model(name)
    checkpoint.save(model, tmp_path / "a.safetensors", extra={"b": 1, "a": 2})
    checkpoint.save(model, tmp_path / "b.safetensors", extra={"a": 2, "b": 1})
    checkpoint.save(checkpoint.load(tmp_path / "a.safetensors"), tmp_path / "c.safetensors")
    checkpoint.save(model, tmp_path / "d.safetensors")
    a, b, c, d = ((tmp_path / f"{n}.safetensors").read_bytes() for n in "abcd")
    assert a == b
    assert c == d


def test_vectors_and_continuous_data(tmp_path):
    model = build("realnvp", (5,), bits=None, depth=2, hidden=8).eval()
    checkpoint.save(model, tmp_path / "a.safetensors")
    x = torch.randn(4, 5)
    assert torch.equal(checkpoint.load(tmp_path / "a.safetensors").log_prob(x), model.log_prob(x))


def test_memory_formats_do_not_change_the_file(tmp_path):
    model = small_model("vae conv")
    checkpoint.save(model, tmp_path / "a.safetensors")
    model.to(memory_format=torch.channels_last)
    checkpoint.save(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_extra_may_have_any_keys_that_json_can_write(tmp_path):
    model = small_model("vae")
    checkpoint.save(model, tmp_path / "a.safetensors", extra={"t": {2: (1, 2), 10: 1e-300}})
    assert checkpoint.read(tmp_path / "a.safetensors")[1] == {"t": {"2": [1, 2], "10": 1e-300}}


def test_loading_does_not_change_the_random_state(file):
    model = checkpoint.load(file)
    torch.manual_seed(3)
    first = model.sample(4)
    torch.manual_seed(3)
    assert torch.equal(first, model.sample(4))


def test_saving_a_model_composed_by_hand_is_refused(tmp_path):
    chain = Chain([ActNorm(2)], Prior(StandardNormal((2,))))
    with pytest.raises(ValueError, match=r"composed by hand.*architecture"):
        checkpoint.save(chain, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# -- complete or not at all


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, file, error):
    before = file.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(type(error)):
        checkpoint.save(small_model("vae"), file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_an_error_of_safetensors_becomes_an_os_error(monkeypatch, file):
    def full(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"model\.safetensors: cannot be written .*No space left"):
        checkpoint.save(small_model("vae"), file)


def test_a_save_replaces_the_file_and_leaves_no_other(file):
    model = small_model("vae")
    checkpoint.save(model, file)
    assert checkpoint.load(file).config == model.config
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(os.name == "nt", reason="rights are others there")
def test_a_checkpoint_has_the_usual_permissions(file):
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode


def test_saving_to_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        checkpoint.save(small_model("vae"), tmp_path / "none" / "a.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        checkpoint.save(small_model("vae"), tmp_path)


# -- damage


def test_a_truncated_file_is_refused(file):
    content = file.read_bytes()
    lengths = {0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content), 23)}
    for n in sorted(lengths):
        file.write_bytes(content[:n])
        refused(file, "cut short or damaged")


def test_trailing_bytes_are_refused(file):
    for more in (b"\0", b" ", b"x" * 1000):
        content = file.read_bytes()
        file.write_bytes(content + more)
        refused(file)
        file.write_bytes(content)


def test_every_changed_byte_of_the_header_is_refused(file):
    content = file.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    blanks = {9, 32}  # in JSON they mean the same
    for at in range(8 + n):
        was = content[at]
        for now in {was ^ 1, was ^ 0x20, *blanks} - {was}:
            file.write_bytes(content[:at] + bytes([now]) + content[at + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.verified(file)


def test_padding_other_than_spaces_is_refused(file):
    content = file.read_bytes()
    header, rest = split(content)
    for n in range(64):  # one of the lengths needs padding
        header["__metadata__"] = {**header["__metadata__"], "filler": "x" * n}
        changed = bytearray(joined(header, rest))
        end = 8 + struct.unpack("<Q", changed[:8])[0]
        if changed[end - 1 : end] == b" ":
            file.write_bytes(changed)
            checkpoint.load(file)
            for blank in b"\t\n\r":
                changed[end - 1] = blank
                file.write_bytes(changed)
                refused(file, "changed or damaged")
            return
    raise AssertionError("no padding")


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("1e-05", "1E-05"),
        (r"\\u00e9", r"\\u00E9"),
        ("musigma/2", "musigma/3"),
        (r"\"vae\"", r"\"vaf\""),
    ],
)
def test_an_equivalent_or_valid_header_with_other_bytes_is_refused(file, was, now):
    content = file.read_bytes()
    assert content.count(was.encode()) == 1
    file.write_bytes(content.replace(was.encode(), now.encode()))
    refused(file, "changed or damaged")


def test_every_changed_byte_of_the_tensors_is_refused(file):
    content = file.read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    for at in range(8 + n, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        refused(file, "changed or damaged")


def test_exchanged_tensors_are_refused(file):
    header, rest = split(file.read_bytes())
    names = [n for n, t in header.items() if n != "__metadata__"]
    a, b = next(
        (a, b) for a in names for b in names if a != b and header[a]["shape"] == header[b]["shape"]
    )
    header[a], header[b] = header[b], header[a]
    file.write_bytes(joined(header, rest))
    refused(file, "changed or damaged")


# -- other files


def test_weights_that_do_not_fit_are_listed_up_to_five(file):
    def lose(header, tensors):
        for name in list(tensors)[:7]:
            del tensors[name]

    forge(file, lose)
    message = refused(file, "do not fit its configuration")
    assert len(re.findall(r"is missing", message)) == 5
    assert re.search(r"and 2 more\Z", message)


def test_each_kind_of_mismatch_is_reported(file):
    def change(header, tensors):
        tensors["surplus"] = tensors.pop("encoder.net.net.layers.0.bias")
        tensors["decoder.net.layers.0.bias"] = torch.zeros(3)

    forge(file, change)
    message = refused(file)
    assert "encoder.net.net.layers.0.bias is missing" in message
    assert "surplus is not part of the model" in message
    assert "decoder.net.layers.0.bias has shape (3,) and not (2,)" in message


def test_a_newer_format_is_refused_with_advice(file):
    def newer(header, tensors):
        header |= {"format": "musigma/3", "version": "7.1"}

    forge(file, newer)
    refused(file, r"format musigma/3 by musigma 7\.1, .*upgrade musigma")


def test_a_migration_is_applied(monkeypatch, file):
    def older(header, tensors):
        header["format"] = "musigma/0"
        header["config"]["options"]["breadth"] = header["config"]["options"].pop("width")

    def migrate(config, extra, tensors):
        options = dict(config["options"])
        options["width"] = options.pop("breadth")
        return {**config, "options": options}, extra, tensors

    forge(file, older)
    refused(file, "format musigma/0")
    monkeypatch.setitem(checkpoint.MIGRATIONS, "musigma/0", ("musigma/1", migrate))
    assert checkpoint.load(file).config["options"]["width"] == 2


OF_PUBLISHED_CODE = {"edge": True, "top_each": "pixel", "split_format": "halves log_std"}


@pytest.mark.parametrize(
    ("changed", "architecture"),
    [({}, "glow"), (OF_PUBLISHED_CODE, "published_glow"), ({"low": 0.0}, "published_glow")],
)
def test_a_glow_of_format_1_becomes_one_of_two_architectures(changed, architecture, tmp_path):
    """In format 1, `glow` also had the options of `published_glow`."""
    options = {"bits": 3, "levels": 2, "depth": 1, "hidden": 4, "dequantize": "uniform"}
    options |= {"alpha": None, "permutation": "conv", "format": "interleaved softclip"}
    wanted = build(architecture, (1, 8, 8), **options, **changed)
    old = to_format_1(wanted.config)
    assert old["architecture"] == "glow"
    assert old["options"].keys() > {"split_format", "classifier", "conditioned"}
    header = {"format": "musigma/1", "version": "0.1.0", "config": old, "extra": {}}
    checkpoint.write(tmp_path / "old.safetensors", header, wanted.state_dict())
    model = checkpoint.load(tmp_path / "old.safetensors")
    wanted.eval()
    assert {**model.config["options"], **changed}.items() >= options.items()
    assert model.config["architecture"] == architecture
    x = torch.randint(0, 8, (3, 1, 8, 8))
    for one, other in zip(model.encode(x, mode=True), wanted.encode(x, mode=True), strict=True):
        assert torch.equal(one, other)
    assert to_format_1(model.config) == old


def test_safetensors_of_other_libraries_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
        refused(path, "not one that musigma wrote")


@pytest.mark.parametrize("text", ["", "null", "[1]", '"x"', "3", "{}", "{", '{"digest": 3}'])
def test_unknown_metadata_is_refused(tmp_path, text):
    path = tmp_path / "other.safetensors"
    safetensors.save_file({"weight": torch.zeros(3)}, path, metadata={"musigma": text})
    refused(path, "does not match its digest")


def test_an_unknown_architecture_is_refused_with_advice(monkeypatch, tmp_path):
    path = tmp_path / "mine.safetensors"

    def homemade(shape, *, bits: int | None = None, hidden: int = 4):
        """A VAE of vectors."""
        encoder = GaussianHead(MLP(shape[0], 4, hidden=[hidden]), event_ndims=1)
        decoder = GaussianHead(MLP(2, 2 * shape[0], hidden=[hidden]), event_ndims=1)
        return VAE(encoder, decoder, Prior(StandardNormal((2,))))

    monkeypatch.setattr(zoo, "ARCHITECTURES", dict(zoo.ARCHITECTURES))
    monkeypatch.setattr(checkpoint, "ARCHITECTURES", zoo.ARCHITECTURES)
    builder = architecture(homemade)
    checkpoint.save(builder((3,), hidden=5), path)
    assert checkpoint.load(path).config["options"]["hidden"] == 5
    del zoo.ARCHITECTURES["homemade"]
    refused(path, r"'homemade', which is not in the zoo.*--plugin FILE\.py:homemade")


def test_an_invalid_configuration_is_refused(file):
    def change(header, tensors):
        header["config"]["options"]["breadth"] = 3

    forge(file, change)
    refused(file, "does not build a vae: breadth: vae has no such option")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pickle_is_refused_and_not_opened(tmp_path, kind, suffix):
    path, sprung = tmp_path / f"model{suffix}", tmp_path / "sprung"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({"weight": Trap(sprung)}, path, _use_new_zipfile_serialization=kind == "torch")
    refused(path, "not a whole safetensors file")
    assert not sprung.exists()


def test_paths_that_are_not_files_are_refused(tmp_path):
    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "no such file")
    (tmp_path / "empty.safetensors").touch()
    refused(tmp_path / "empty.safetensors", "cut short")


def test_paths_may_be_strings(tmp_path):
    path = str(tmp_path / "a.safetensors")
    checkpoint.save(small_model("vae"), path)
    assert checkpoint.load(path).config["architecture"] == "vae"
