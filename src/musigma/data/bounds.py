"""Files of bounds: `prior.toml`, the support of the columns of a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from musigma.data.errors import DataError, first_line
from musigma.files import parsed_toml
from musigma.support import Support

__all__ = ["as_support", "read_bounds"]


def read_bounds(path: str | Path) -> dict[str, Any]:
    """What a file of bounds says, before it is compared with any columns.

    Raises:
        DataError: If there is no such file, or it is not TOML.
    """
    where = f"bounds {path}"
    if Path(path).suffix.lower() != ".toml":
        raise DataError(f"{where}: give a .toml file with a table [bounds] of name = [low, high]")
    try:
        return parsed_toml(Path(path).expanduser().read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{where}: {first_line(error)}") from error
    except ValueError as error:
        raise DataError(f"{where}: cannot be read: {first_line(error)}") from error


def bounded_columns(plain: Mapping[str, Any]) -> tuple[str, ...]:
    """All names in the content of a file of bounds, in its order."""

    def names(value: Any) -> Iterator[str]:
        for each in value if isinstance(value, list) else ():
            yield from [each] if isinstance(each, str) else names(each)

    inside = plain.get("bounds", {})
    listed = [*(inside if isinstance(inside, Mapping) else ())]
    for value in (v for key, v in plain.items() if key != "bounds"):
        listed += names(value)
    return tuple(dict.fromkeys(listed))


def as_support(
    bounds: Support | Mapping[str, Any] | str | Path, columns: Sequence[str]
) -> Support:
    """The support of columns: as it is given, or as a file or a dict like one describes it.

    Raises:
        DataError: If the file cannot be read, or does not fit the columns; all faults are named.
    """
    if isinstance(bounds, Support):
        return bounds
    plain = bounds if isinstance(bounds, Mapping) else read_bounds(bounds)
    where = "bounds" if isinstance(bounds, Mapping) else f"bounds {bounds}"
    if not columns:
        raise DataError(f"{where}: the data have no names of columns for bounds to refer to")
    try:
        return Support.parse(plain, columns)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
