"""Tables of pandas, polars and Arrow: the library of a table, and Arrow tables as one of those."""

from __future__ import annotations

from typing import Any

__all__ = ["Kind", "as_kind", "kind_of", "replaced"]

Kind = tuple[str, bytes]
"""The library of a table, and what pandas keeps of types that Arrow does not have."""


def kind_of(table: Any) -> Kind | None:
    """The kind of a table; None for whatever is none: an array, a list, a series.

    >>> import pandas as pd
    >>> kind_of(pd.DataFrame({"a": [1]}))[0], kind_of([[1]])
    ('pandas', None)
    """
    library = type(table).__module__.partition(".")[0]
    if library == "pandas" and hasattr(table, "columns"):
        import pyarrow

        types = pyarrow.Schema.from_pandas(table.iloc[:0], preserve_index=False)
        return library, types.metadata[b"pandas"]
    if library == "pyarrow" and hasattr(table, "schema"):
        return library, b""
    return (library, b"") if library == "polars" and hasattr(table, "columns") else None


def as_kind(table: Any, kind: Kind, like: Any = None) -> Any:
    """An Arrow table as a table of a kind.

    Args:
        table: A `pyarrow.Table`.
        kind: What `kind_of` returned.
        like: A frame of pandas, whose index it gets if it is one too; anything else is ignored.

    >>> import pandas as pd, pyarrow as pa
    >>> frame = pd.DataFrame({"a": pd.array([1, None], "Int64")}, index=["x", "y"])
    >>> as_kind(pa.table({"a": [3, None]}), kind_of(frame), frame).loc["x"].a
    np.int64(3)
    """
    library, metadata = kind
    if library == "pandas":
        frame = table.replace_schema_metadata({b"pandas": metadata}).to_pandas()
        same = type(like) is type(frame)
        return frame.set_axis(like.index, axis=0) if same else frame
    if library == "polars":
        import polars

        return polars.from_arrow(table)
    return table


def replaced(table: Any, name: str, where: Any, values: Any) -> Any:
    """A table with other values in some rows of a column; nothing else changes.

    Args:
        table: A table of any kind.
        name: The column.
        where: Mask of the rows, an array (N,).
        values: The new values of all rows, a `pyarrow.ChunkedArray` (N,).
    """
    import pyarrow as pa
    import pyarrow.compute as compute_

    compute: Any = compute_  # its functions are made when it is imported

    kind = kind_of(table)
    assert kind is not None
    if kind[0] == "pandas":
        new = as_kind(pa.table({name: values}), kind, table)[name]
        return table.assign(**{name: table[name].where(~where, new)})
    if kind[0] == "polars":
        import polars

        new = polars.when(polars.Series(where)).then(polars.Series(values))
        return table.with_columns(new.otherwise(polars.col(name)).alias(name))
    old, mask = table[name], pa.array(where)
    if pa.types.is_dictionary(old.type):  # whose levels keep their order
        words = old.cast(old.type.value_type)
        known = values.chunk(0).dictionary if values.num_chunks else words.unique()
        levels = pa.concat_arrays([known.cast(words.type), words.drop_null().unique()]).unique()
        places = (compute.index_in(v.cast(words.type), value_set=levels) for v in (values, words))
        codes = compute.if_else(mask, *places).combine_chunks().cast(old.type.index_type)
        new = pa.DictionaryArray.from_arrays(codes, levels, ordered=old.type.ordered)
    else:
        new = compute.if_else(mask, values.cast(old.type), old)
    return table.set_column(table.column_names.index(name), table.field(name), new)
