"""Files that were written once are read for ever: by any machine, to the bit."""

from pathlib import Path

import numpy as np
import pytest

import musigma
from musigma import coding

GOLDEN = Path(__file__).parent / "golden" / "compression"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.mus")), ids=lambda p: p.stem)
def test_what_was_written_once_is_read(path):
    """Models with random weights, on draws of themselves, in the first format."""
    with path.open("rb") as file:
        assert coding.summary(file)["images_coded"] == 24  # none of them by xz
        found = coding.decompress(file, trust=True)
    assert (found.levels == np.load(path.with_suffix(".npz"))["x"]).all()


def test_every_kind_of_model_is_there():
    assert {path.stem for path in GOLDEN.glob("*.mus")} == {"glow", "ladder", "nsf", "vae"}


def test_the_same_data_make_the_same_file(tmp_path):
    model = musigma.build("vae", (1, 6, 6), bits=2, latents=3, width=8)
    x = np.random.default_rng(0).integers(0, 4, (40, 1, 6, 6))
    for name in "ab":
        coding.compress(model, x, tmp_path / name, chunk=7, workers=1 + (name == "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
