"""Measurements in a JSON file: a list of rows, each found by some of its values."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from musigma.files import write_json

Row = dict[str, Any]


def rows(path: Path) -> list[Row]:
    """The rows of a file; none if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def has(path: Path, some: Row) -> bool:
    """Whether a row of a file has these values."""
    return any(some.items() <= row.items() for row in rows(path))


def merge(
    path: Path, new: Iterable[Row], by: Sequence[str], order: Callable[[Row], Any] | None = None
) -> None:
    """Add rows to a file. A row replaces one that has the same values of `by`."""
    found = {tuple(row[name] for name in by): row for row in [*rows(path), *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, sorted(found.values(), key=order) if order else [*found.values()])
