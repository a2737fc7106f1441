"""All works by their names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from benchmarks.speed import glows, tabular, vaes
from benchmarks.speed.harness import Contender, Work

__all__ = ["QUICK", "WORKS", "find", "select"]

WORKS: dict[str, Work] = {w.name: w for w in (*vaes.WORKS, *glows.WORKS, *tabular.WORKS)}
"""Every work, in the order of the table."""

QUICK = ("mlp-vae", "conv-vae-28", "glow-128", "nsf-c-8", "nsf-ar-8", "maf-8")
"""Those that a laptop does in two minutes."""


def select(names: Sequence[str]) -> list[Work]:
    """Works by name, or by the beginning of several names; all of them for no name.

    Raises:
        ValueError: For a name that none begins with.

    Example:
        >>> [w.name for w in select(["nsf-c"])]
        ['nsf-c-8', 'nsf-c-43']
    """
    for name in names:
        if not any(_begins(work, name) for work in WORKS):
            near = difflib.get_close_matches(name, WORKS, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"work: {hint}known are {', '.join(WORKS)}; got {name!r}")
    return [w for w in WORKS.values() if not names or any(_begins(w.name, n) for n in names)]


def find(work: str, contender: str) -> Contender:
    """One contender of a work."""
    return next(c for c in WORKS[work].contenders if c.name == contender)


def _begins(work: str, name: str) -> bool:
    return work == name or work.startswith(name + "-")
