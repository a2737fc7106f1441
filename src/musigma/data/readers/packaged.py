"""Tables that other packages ship, read from where they are installed, without importing them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from musigma.data.assembly import assemble
from musigma.data.dataset import Dataset
from musigma.data.errors import DataError
from musigma.data.raw import Request
from musigma.data.readers.delimited import Delimited


@dataclass(frozen=True)
class _Packaged:
    """The file of a table, and the oldest version of the package that is known to have it."""

    package: str
    version: str
    file: str
    label: str | None = None  # a column that is labels, not data
    label_names: Sequence[str] = ()
    without: Sequence[str] = ()  # columns that are constant


PACKAGED = {
    "shuttle": _Packaged(
        *("river", "0.26", "datasets/shuttle.csv.gz"), "anomaly", ("normal", "anomaly")
    ),
    "diamonds": _Packaged("plotnine", "0.15", "data/diamonds.csv"),
    "bikeshare": _Packaged("ISLP", "0.4", "data/Bikeshare.csv"),
    "wage": _Packaged("ISLP", "0.4", "data/Wage.csv", without=("region",)),
    "randhie": _Packaged("statsmodels", "0.14", "datasets/randhie/randhie.csv"),
}


def installed(package: str, file: str) -> Path | None:
    """Where an installed package, which is not imported, would have a file."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], file)


def packaged(name: str, request: Request) -> Dataset:
    """A table by its name.

    Raises:
        DataError: If its package is not installed, or lacks the file.
    """
    known = PACKAGED[name]
    path = installed(known.package, known.file)
    if path is None or not path.is_file():
        reason = "is not installed" if path is None else f"has no {known.file}"
        raise DataError(
            f"{name}: ships with the package {known.package}, which {reason}: pip install "
            f"'{known.package}>={known.version}'"
        )
    table = Delimited(path, request)
    table.drop(known.without)
    for column in known.without:
        request.note(f"column {column!r} is constant, and is left out")
    data = assemble(table, replace(request, label=known.label or request.label))
    names = tuple(known.label_names) or data.label_names
    return data if data.labels is None else replace(data, label_names=names)
