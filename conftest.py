"""Modules that pytest leaves out, since the library that they are for is not installed."""

from importlib.util import find_spec

import pytest
from torch.distributions import Distribution

collect_ignore = [f"src/musigma/{name}.py" for name in ("pyod", "sbi") if find_spec(name) is None]


@pytest.fixture(autouse=True)
def validated():
    """Distributions check their arguments, as usual; zuko, which sbi imports, turns that off."""
    Distribution.set_default_validate_args(__debug__)
