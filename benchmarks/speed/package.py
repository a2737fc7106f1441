"""What the benchmark uses of musigma beyond its public names, at any commit.

`--against COMMIT` runs this benchmark with the package of another commit, where some functions
live elsewhere or have other names. Each is listed here with all its places, the present one first.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Rescale", "compile_blocks", "kept_bytes", "retain_heap", "set_memory_mode"]


def _first(*places: str) -> Any:
    """The first of several MODULE:NAME that exists."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(places)} exists in this package")


retain_heap = _first(
    "musigma.training.hardware:retain_heap", "musigma.training.machine:retain_heap"
)
kept_bytes = _first("musigma.training.hardware:saved_bytes", "musigma.training.machine:kept_bytes")
compile_blocks = _first(
    "musigma.training.hardware:compile_blocks", "musigma.training.machine:compiled"
)
set_memory_mode = _first("musigma.memory:set_memory", "musigma.memory:keep")
Rescale = _first("musigma.layers:Rescale", "musigma.layers:Affine")
