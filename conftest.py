"""Modules that pytest leaves out, since the library that they are for is not installed."""

from importlib.util import find_spec

collect_ignore = [f"src/musigma/{name}.py" for name in ("pyod", "sbi") if find_spec(name) is None]
