"""Pairs (theta, x): the columns that are modeled, and those that they are conditioned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from musigma.data.dataset import Given
from musigma.data.errors import listing, named
from musigma.data.raw import Request
from musigma.data.tables import Table

__all__ = [
    "chosen",
    "constant",
    "leave_out",
    "matching",
    "note_left_out",
    "unusable_cells",
    "varying",
]


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
        raise request.error(faults[0] if len(faults) == 1 else f"columns cannot be chosen:{lines}")
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


def unusable_cells(table: Table, j: int, rows: np.ndarray, values: np.ndarray | None) -> str:
    """Why some cells of a column cannot be used, with their number for each reason.

    Args:
        table: The table.
        j: The column.
        rows: Numbers of the rows of these cells.
        values: The cells, if they are numbers (R,) or lists (R, M, F).
    """
    counts: dict[str, int] = {}
    if values is None:
        counts["missing"] = len(rows)
    elif values.ndim > 1:
        empty = np.isnan(values).reshape(len(values), -1).all(1)
        infinite = np.isinf(values).reshape(len(values), -1).any(1)
        counts["missing or empty"] = int(empty.sum())
        counts["not finite somewhere"] = int((infinite | ~empty).sum())
    else:
        text = np.isin(rows, list(table.not_numbers(j)))
        counts["NaN or missing"] = int((np.isnan(values) & ~text).sum())
        counts["infinite or too large"] = int((~np.isnan(values) & ~text).sum())
        counts["not a number"] = int(text.sum())
    found = [f"{what} in {n:,} row{'s' * (n > 1)}" for what, n in counts.items() if n]
    first = "the first of them " if len(rows) > 1 else ""
    return f"is {' and '.join(found)}, {first}{table.row_called(int(rows[0]))}"


def leave_out(faults: Mapping[str, str], bad: int, total: int, request: Request) -> None:
    """Note rows that cannot be used, with the faults of each column, if they may be left out.

    Raises:
        DataError: If they may not, or no other row is there.
    """
    if not bad:
        return
    if not request.skip_bad:
        raise request.error(
            f"{bad:,} of {total:,} rows cannot be used; repair them, or pass --skip-bad to leave "
            f"them out:\n{listing(faults)}"
        )
    if bad == total:
        raise request.error(f"no row can be used:\n{listing(faults)}")
    reasons = named([f"{name} {reason}" for name, reason in faults.items()], 20)
    request.note(f"{bad:,} of {total:,} rows left out: {reasons}")


def constant(given: Given) -> list[int] | None:
    """The features of a variable that are the same in all examples; None if there are none.

    >>> constant(Given(np.array([[1, 2], [1, 3]], np.float32)))
    [0]
    """
    values = given.values
    if values.dtype == np.uint8 or len(values) < 2:
        return None
    features = np.asarray(values).reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    if values.ndim == 3:
        features = features[~np.isnan(features).all(1)]
    same = np.flatnonzero((features == features[:1]).all(0)).tolist()
    return same or None


def varying(
    given: Mapping[str, Given], request: Request
) -> tuple[dict[str, Given], dict[str, str]]:
    """The variables to keep, and the faults of those that are constant.

    Constant variables have no faults if they are allowed; they are left out, with a note, if what
    cannot be used may be.
    """
    left, faults = dict(given), {}
    for name, variable in given.items() if not request.allow_constant else ():
        if (features := constant(variable)) is None:
            continue
        width = variable.values.shape[-1] if variable.values.ndim > 1 else 1
        which = (
            f" in columns {named(list(map(str, features)))}" if variable.values.ndim > 1 else ""
        )
        fault = f"is constant{which}, so it carries no information"
        if not request.skip_bad:
            faults[name] = f"{fault}: drop it, or pass --skip-bad to leave it out"
        elif len(features) == width:
            del left[name]
            request.note(f"{name} {fault}, and is left out")
        else:
            request.note(f"{name} {fault} there")
    return left, faults
