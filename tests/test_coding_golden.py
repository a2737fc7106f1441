"""Files of earlier versions are read exactly, on any machine."""

from pathlib import Path

import numpy as np
import pytest

import musigma
from musigma import coding
from musigma.coding import numerics

GOLDEN = Path(__file__).parent / "golden" / "compression"
FILES = sorted(GOLDEN.glob("*.mus"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_of_the_first_format_are_read(path, monkeypatch):
    """Models with random weights, on draws of themselves, with labels if they are conditional."""
    if path.stem.startswith("guarded"):  # written with the same guard: many exceptions
        monkeypatch.setattr(numerics, "GUARD", 2.0**-6)
    content = np.load(path.with_suffix(".npz"))
    with path.open("rb") as file:
        assert coding.summary(file)["images_coded"] == len(content["x"])  # none of them by xz
    batch = coding.decompress(path, trust=True)
    assert (batch.levels == content["x"]).all()
    if "labels" in content:
        assert batch.about["labels"] == content["labels"].tolist()


def test_every_kind_of_model_is_there():
    kinds = {"glow", "ladder", "nsf", "vae", "glow_labels", "maf_labels", "vae_labels"}
    assert {path.stem for path in FILES} == kinds | {"guarded_glow", "guarded_nsf"}


def test_exceptions_belong_to_the_modules_that_they_were_listed_for():
    """The guarded files hold exceptions, so they detect another numbering of modules."""
    for name in ("guarded_glow", "guarded_nsf"):
        with (GOLDEN / f"{name}.mus").open("rb") as file:
            assert len(coding.Archive(file, trust=True).reader.read(0).exceptions) > 10


def test_a_checkpoint_of_the_first_format_reads_its_file():
    """Its configuration now names the classes, so its digest is another one."""
    model = musigma.load(GOLDEN / "vae_labels.safetensors")
    assert [v.names for v in model.spec.context] == [("a", "b", "c")]
    batch = coding.decompress(GOLDEN / "vae_labels.mus", model)
    assert (batch.levels == np.load(GOLDEN / "vae_labels.npz")["x"]).all()
    next(model.parameters()).data[0] += 1
    model.former_digest = None
    with pytest.raises(coding.WrongModel):
        coding.decompress(GOLDEN / "vae_labels.mus", model)


def test_the_same_data_make_the_same_file(tmp_path):
    model = musigma.build("vae", (1, 6, 6), bits=2, latents=3, width=8)
    x = np.random.default_rng(0).integers(0, 4, (40, 1, 6, 6))
    for name in "ab":
        coding.compress(model, x, tmp_path / name, chunk=7, workers=1 + (name == "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
