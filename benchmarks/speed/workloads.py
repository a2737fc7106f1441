"""All workloads, by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from benchmarks.speed import glows, tabular, vaes
from benchmarks.speed.harness import Contender, Workload

__all__ = ["QUICK", "WORKLOADS", "find", "select"]

WORKLOADS: dict[str, Workload] = {
    w.name: w for w in (*vaes.WORKLOADS, *glows.WORKLOADS, *tabular.WORKLOADS)
}
"""In the order of the table."""

QUICK = ("mlp-vae", "conv-vae-28", "glow-128", "nsf-c-8", "nsf-ar-8", "maf-8")
"""Workloads of `--quick`: two minutes on a laptop."""


def select(names: Sequence[str]) -> list[Workload]:
    """Workloads by name or by prefix; all of them if no name is given.

    Raises:
        ValueError: If a name matches no workload.

    Example:
        >>> [w.name for w in select(["nsf-c"])]
        ['nsf-c-8', 'nsf-c-43']
    """
    for name in names:
        if not any(_matches(workload, name) for workload in WORKLOADS):
            near = difflib.get_close_matches(name, WORKLOADS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(WORKLOADS)
            raise ValueError(f"workload: expected one of {known}; got {name!r}{hint}")
    return [w for w in WORKLOADS.values() if not names or any(_matches(w.name, n) for n in names)]


def find(workload: str, contender: str) -> Contender:
    """One contender of a workload."""
    return next(c for c in WORKLOADS[workload].contenders if c.name == contender)


def _matches(workload: str, name: str) -> bool:
    return workload == name or workload.startswith(name + "-")
