"""Files of every released format load, and say what they said: golden files, kept for ever."""

from pathlib import Path

import numpy as np
import pytest
import torch

from musigma import checkpoint

GOLDEN = Path(__file__).parent / "golden" / "formats"
MODELS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_format_1(name):
    """Format 1: latents, decoded data and nats are what they were when the file was written."""
    model, extra = checkpoint.read(GOLDEN / f"{name}.safetensors")
    assert extra == {"note": "made by format musigma/1"}
    expected = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / f"{name}.npz").items()}
    x, context = expected["x"], expected.get("context")
    latents = model.encode(x, context, mode=True)
    for i, z in enumerate(latents):
        torch.testing.assert_close(z, expected[f"latent_{i}"], rtol=1e-4, atol=1e-4)
    decoded = model.decode(latents, context)
    torch.testing.assert_close(decoded, expected["decoded"], rtol=1e-4, atol=1e-3)
    torch.manual_seed(0)
    torch.testing.assert_close(model.elbo(x, context), expected["nats"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_format_1_are_saved_in_the_present_format(name, tmp_path):
    model = checkpoint.load(GOLDEN / f"{name}.safetensors")
    checkpoint.save(model, tmp_path / "again.safetensors")
    again = checkpoint.load(tmp_path / "again.safetensors")
    assert again.spec == model.spec
    state = again.state_dict()
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
