"""Schema files: `schema.toml`, and the metadata of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from musigma.data.errors import DataError
from musigma.schema import Schema

__all__ = ["as_schema"]


def as_schema(
    schema: Schema | Mapping[str, Any] | str | Path | None,
) -> Schema | Mapping[str, Any] | Literal["infer"] | None:
    """A schema as it is given; or what a file says of each column, by its name."""
    if schema is None or schema == "infer" or isinstance(schema, (Schema, Mapping)):
        return schema  # pyright: ignore[reportReturnType]
    raise DataError("not yet")
