"""How OpenMP threads wait for each other, chosen before torch is loaded."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["configure"]

WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"}
"""For libgomp (torch's builds for Linux) and for the runtimes of Intel and LLVM."""

CHOICES = ("OMP_WAIT_POLICY", *WAITING)


def configure(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait at a barrier sleep after a few microseconds.

    By default they spin for milliseconds. Beside another busy process, a spinning thread holds a
    core that the thread it waits for could use, and a training step takes several times as long.

    OpenMP reads its environment once, when torch is loaded; call this before. Nothing changes if
    the user has set any of OMP_WAIT_POLICY, GOMP_SPINCOUNT and KMP_BLOCKTIME.

    Args:
        environment: Changed in place.

    Example:
        >>> variables = {}
        >>> configure(variables)
        >>> sorted(variables)
        ['GOMP_SPINCOUNT', 'KMP_BLOCKTIME']
    """
    if not any(name in environment for name in CHOICES):
        environment.update(WAITING)
