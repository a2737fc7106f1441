"""Pairs (theta, x): the columns that are modeled, and those that they are conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from musigma.data.errors import named
from musigma.data.raw import Request

__all__ = ["chosen", "matching", "note_left_out"]


def chosen(
    names: Sequence[str], usable: Sequence[int], request: Request
) -> tuple[list[int], list[int]]:
    """The columns that `of` and `given` of a request match, in the order of their patterns.

    Args:
        names: Names of all columns.
        usable: The columns to choose from.
        request: Its patterns. If `columns` is set, it replaces `of`.

    Raises:
        DataError: If a pattern matches nothing or occurs twice, or a column is both modeled and
            given; all faults are named.
    """
    found: dict[str, list[int]] = {"of": [], "given": []}
    faults: list[str] = []
    of = request.of if request.columns is None else ()
    for option, patterns in ("of", of), ("given", request.given):
        for pattern in dict.fromkeys(patterns):
            every = matching(names, pattern)
            matched = [j for j in usable if j in every]
            if not matched:
                known = named([name for name in names if name], 20)
                faults.append(f"no column matches {pattern!r}: give one of {known}")
            found[option] += [j for j in matched if j not in found[option]]
            if request.of and patterns.count(pattern) > 1:
                faults.append(f"{option}: {pattern!r} is given twice")
    if both := [repr(names[j]) for j in found["of"] if j in found["given"]]:
        faults.append(
            f"{named(both, 20)} {'are' if len(both) > 1 else 'is'} both modeled (of) and given: "
            "choose one of the two"
        )
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise request.error(
            faults[0] if len(faults) == 1 else f"columns cannot be chosen so:{lines}"
        )
    return found["of"], found["given"]


def matching(names: Sequence[str], pattern: str) -> list[int]:
    """The names that a pattern matches, or the one that is equal to it.

    >>> matching(["x_1", "x_2", "y"], "x_*"), matching(["x0", "x[0]"], "x[0]")
    ([0, 1], [1])
    """
    equal = [j for j, name in enumerate(names) if name == pattern]
    return equal or [j for j, name in enumerate(names) if name and fnmatchcase(name, pattern)]


def note_left_out(names: Sequence[str], request: Request) -> None:
    """Note the columns that are neither modeled nor given, if there are any."""
    if names:
        listed = named([repr(name) if name else "one without a name" for name in names], 20)
        request.note(f"columns that are neither modeled nor given are left out: {listed}")
