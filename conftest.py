"""Modules that pytest leaves out, since the library that they are for is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pyod") else ["src/musigma/pyod.py"]
