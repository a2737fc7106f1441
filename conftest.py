"""What all tests share: modules that are left out, fixed examples, and checked arguments."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings
from torch.distributions import Distribution

# The library that they are for is not installed.
collect_ignore = [f"src/musigma/{name}.py" for name in ("pyod", "sbi") if find_spec(name) is None]

# A test run is repeatable; `pytest --hypothesis-profile random` looks for new examples.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random")
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def alike():
    """Every test begins alike, whichever ran before it.

    Draws are the same. Distributions check their arguments; zuko, which sbi imports, turns that
    off.
    """
    torch.manual_seed(0)
    Distribution.set_default_validate_args(__debug__)


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty working directory with what is in the folder `home` of a module."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
