"""Schema files: `schema.toml`, and the metadata that SDV writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from musigma.data.columns import Draft
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError, first_line, listing
from musigma.data.summary import column_lines
from musigma.data.tables import text_of
from musigma.files import parsed_toml
from musigma.schema import Kind, Schema

__all__ = ["as_schema", "schema_toml"]

KEYS = {
    "kind": (str, f"one of {', '.join(get_args(Kind))}"),
    "levels": (list, "a list"),
    "missing": (bool, "true or false"),
    "step": ((int, float), "a number above 0"),
    "rounded": (bool, "true or false"),
    "format": (str, 'a format such as "%d.%m.%Y"'),
}
SDTYPES: dict[str, tuple[Kind, ...]] = {  # the kinds of SDV's types; the first that fits
    "numerical": ("count", "continuous"),
    "categorical": ("category",),
    "boolean": ("boolean",),
    "datetime": ("date", "datetime"),
}
HEAD = """\
# The columns of {name}, in the order in which a model has them.
# Lines may be moved, or removed to leave a column out. What a line does not say is taken from the
# data: name = {{}} is a column of which nothing is said. Of a column may be said:
#   kind      continuous, count (whole numbers), ordinal (levels in this order), category, boolean,
#             date or datetime
#   levels    all values of an ordinal, a category or a boolean, as they are written in the data
#   missing   true: missing values have a probability; false: models are conditioned on the rest
#   step      all values of a continuous column are multiples of it
#   rounded   true: a continuous column is scored by probabilities of its steps, not by a density
#   format    how dates are written, as in Python's strptime
"""


def as_schema(
    schema: Schema | Mapping[str, Any] | str | Path | None,
) -> Schema | Mapping[str, Draft] | Literal["infer"] | None:
    """A schema as it is given; or what a file, or a dict like one, says of each column.

    Raises:
        DataError: If there is no such file, or it cannot be read; all faults are named.
    """
    if schema is None or schema == "infer" or isinstance(schema, Schema):
        return schema  # pyright: ignore[reportReturnType]
    if isinstance(schema, Mapping):
        return _drafts(schema, "schema")
    path, where = Path(schema).expanduser(), f"schema {schema}"
    if path.suffix.lower() not in (".toml", ".json"):
        raise DataError(f'{where}: give a .toml file (`musigma schema` writes one), or "infer"')
    try:
        text = path.read_text(encoding="utf-8-sig")
        plain = json.loads(text) if path.suffix.lower() == ".json" else parsed_toml(text)
    except OSError as error:
        raise DataError(f"{where}: {first_line(error)}") from error
    except ValueError as error:
        raise DataError(f"{where}: cannot be read: {first_line(error)}") from error
    if path.suffix.lower() == ".json":
        return _of_sdv(plain, where)
    if not isinstance(plain.get("columns"), Mapping) or len(plain) > 1:
        raise DataError(
            f"{where}: expected one table, [columns]; got {', '.join(plain) or 'none'}"
        )
    return _drafts(plain["columns"], where)


def _drafts(columns: Mapping[str, Any], where: str) -> dict[str, Draft]:
    """What is said of each column, once it is known to make sense."""
    faults: dict[str, str] = {}
    for name, draft in columns.items():
        if not isinstance(draft, Mapping):
            faults[f"column {name!r}"] = f"is {draft!r}: expected {{ kind = ... }}"
            continue
        for key, value in draft.items():
            types, expected = KEYS.get(key, (object, ""))
            fits = isinstance(value, types) and not (types is not bool and value is True)
            if key not in KEYS:
                faults[f"column {name!r}, {key}"] = f"is none of {', '.join(KEYS)}"
            elif (
                not fits
                or (key == "kind" and value not in get_args(Kind))
                or (key == "step" and value <= 0)
                or (key == "format" and "%" not in str(value))
            ):
                faults[f"column {name!r}, {key}"] = f"is {value!r}: expected {expected}"
    if faults:
        what = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        raise DataError(f"{where}: {what}:\n{listing(faults)}")
    if not columns:
        raise DataError(f"{where}: lists no columns; give one at least: age = {{}}")
    return {name: _draft(draft) for name, draft in columns.items()}


def _draft(draft: Mapping[str, Any]) -> Draft:
    kinds = (draft["kind"],) if "kind" in draft else ()
    fields = {key: value for key, value in draft.items() if key != "kind"}
    if "levels" in fields:
        fields["levels"] = tuple(map(text_of, fields["levels"]))
    return Draft(kinds, fields)


def _of_sdv(plain: Any, where: str) -> dict[str, Draft]:
    """The columns of SDV's metadata.json of one table; those of other types are left out."""
    tables = plain.get("tables") if isinstance(plain, Mapping) else None
    if isinstance(tables, Mapping) and len(tables) == 1:
        (plain,) = tables.values()
    columns = plain.get("columns") if isinstance(plain, Mapping) else None
    if not isinstance(columns, Mapping) or not all(
        isinstance(about, Mapping) and "sdtype" in about for about in columns.values()
    ):
        many = f" of one table; got {len(tables)}" if isinstance(tables, Mapping) else ""
        raise DataError(f"{where}: expected the metadata that SDV writes{many}")
    drafts = {}
    for name, about in columns.items():
        kinds = SDTYPES.get(about["sdtype"], ())
        if not kinds or name == plain.get("primary_key"):
            continue
        fields = {}
        if order := about.get("order"):
            kinds, fields = ("ordinal",), {"levels": tuple(map(text_of, order))}
        if form := about.get("datetime_format"):
            fields["format"] = form
        drafts[name] = Draft(kinds, fields)
    return drafts


def schema_toml(dataset: Dataset) -> str:
    """The schema of a data set as the text of a `schema.toml`, with comments.

    What was left out follows as comments.
    """
    assert dataset.schema is not None
    lines = [HEAD.format(name=dataset.name), "[columns]"]
    known = column_lines(dataset)
    for column, line in zip(dataset.schema.columns, known, strict=True):
        about = [f'kind = "{column.kind}"']
        if column.has_levels:
            about.append(f"levels = [{', '.join(map(_quoted, column.levels))}]")
        if column.kind == "continuous" and column.step:
            about += [f"step = {column.step!r}", f"rounded = {str(column.rounded).lower()}"]
        if column.format:
            about.append(f"format = {_quoted(column.format)}")
        if column.missing:
            about.append("missing = true")
        name = (
            column.name if re.fullmatch(r"[A-Za-z0-9_-]+", column.name) else _quoted(column.name)
        )
        lines.append(f"{name} = {{ {', '.join(about)} }}  # {line.partition(', ')[2]}")
    return "\n".join([*lines, "", *(f"# {note}" for note in dataset.notes)]).rstrip() + "\n"


def _quoted(text: str) -> str:
    """A string of TOML."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
