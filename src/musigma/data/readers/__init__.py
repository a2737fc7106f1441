"""Readers: from a file, a folder, a URL or a name to a `Dataset`.

Data that fit into memory are read into it; otherwise arrays are memory-mapped (`cache`), and
images are decoded when they are indexed (`LazyImages`). Folders, archives and shards are all a
`FileSet`, tables are all a `Table`. Pickles are never run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from musigma.data.assembly import assemble
from musigma.data.bounds import as_support
from musigma.data.cache import derived, facts
from musigma.data.dataset import UNTOUCHED, Dataset, Hashes, Preprocess
from musigma.data.errors import DataError, damage, first_line
from musigma.data.pairs import matching
from musigma.data.raw import ARCHIVE, Progress, Request
from musigma.data.readers.arrays import of_array, read_named, read_numpy
from musigma.data.readers.arrow import frame, read_arrow
from musigma.data.readers.delimited import Delimited
from musigma.data.readers.filesets import SHARD, FileSet, expanded, suffix
from musigma.data.readers.h5ad import H5AD, read_h5ad
from musigma.data.readers.idx_cifar import CIFAR, IDX, idx_images
from musigma.data.readers.image_sets import read_files
from musigma.data.readers.images import LazyImages, pillow_kinds, resized
from musigma.data.readers.others import conversion
from musigma.data.readers.parquet import Parquet, read_parquet
from musigma.data.readers.published import BUILT_IN
from musigma.data.readers.remote import fetched, is_url, plain
from musigma.data.schemas import as_schema
from musigma.data.tables import Table
from musigma.files import impostor
from musigma.schema import Schema
from musigma.support import Support

__all__ = ["BUILT_IN", "LazyImages", "identity", "is_url", "load", "plain"]


def load(
    source: Any,
    *,
    preprocess: Preprocess = UNTOUCHED,
    of: str | Iterable[str] = (),
    given: str | Iterable[str] = (),
    columns: Sequence[str] | None = None,
    schema: Schema | Mapping[str, Any] | str | Path | None = None,
    unlabeled: bool = False,
    unseen: Literal["refuse", "probability"] = "refuse",
    missing: Literal["model", "ignore"] = "model",
    partial: bool = False,
    bounds: Support | Mapping[str, Any] | str | Path | None = None,
    channels: int | None = None,
    skip_bad: bool = False,
    allow_constant: bool = False,
    in_memory: bool | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read a data set from a path, a URL, or by its name.

    It reads folders and archives (tar, zip) of images, MNIST's IDX files and CIFAR batches;
    `.npy`, `.npz`, `.csv`, `.tsv` and `.parquet`; `.h5ad`, whose columns are genes, and in which
    ``cells.h5ad/layers/NAME`` is another matrix than X; folders of tar or parquet files, or a
    pattern of them (`shards-{0000..0099}.tar`); all of these by a URL that fsspec knows; the names
    `digits`, `mnist-5k`, `mnist`, `fashion-mnist`, `cifar10`, `shapes` (with known factors),
    `two-moons`, `checkerboard`, `eight-gaussians`, and of tables that other packages ship,
    `shuttle`, `diamonds`, `bikeshare`, `wage` and `randhie`. A name takes precedence over a file
    of the same name, which is written `./mnist`. Published sets are looked for in `$MUSIGMA_DATA`,
    in `/usr/share/datasets` and in the user's cache, and otherwise downloaded into the cache.

    Tables of pandas, polars, Arrow and whatever else hands out its columns in Arrow's format, and
    arrays (N, D), are read from memory; several parquet files are one table. With `of`, an .npz
    file or a mapping may hold arrays of pairs: ``load({"theta": theta, "x": x}, of="theta",
    given="x")`` has the columns theta_0, theta_1, ... and the variable x, a vector (N, F) or
    sequences (N, M, F).

    Args:
        source: A path, a URL or a name; several paths; a table, an array, or columns by name.
        preprocess: How images are preprocessed.
        of: Names or patterns of the columns of a table that are examples (`theta_*`), in the order
            of the patterns. Others are left out, with a note, unless they are given. By default
            all columns that are not given.
        given: Context to read along with the examples: `label` requires labels; names or patterns
            of columns (`x_*`), which are then not part of x; or files with a row for each example
            (`attach`).
        columns: The columns of a table that a model needs, in its order. Others are left out. They
            replace `of`, with which no column is taken as labels unless they are given.
        schema: Types of the columns of a table: "infer", the path of a schema file, or a `Schema`,
            whose columns are found by their names. Rows are then float64, as `musigma.schema`
            describes them, and a column called `label` is data unless it is `given`. None: all
            columns are real numbers, float32.
        unlabeled: Whether labels may be missing: empty cells of a table, or -1 in an .npz file.
            `Dataset.labels` is then -1. Otherwise examples without a label cannot be used.
        unseen: What happens to a category that the schema does not have: it is refused, or it
            becomes one unknown category, to which a model gives a probability.
        missing: Whether missing values have a probability of their own, or are ignored: models
            are conditioned on what is there, and leave out the rest.
        partial: Whether a table may lack columns of a `Schema`; they are then missing in all rows.
        bounds: The set in which rows of real numbers lie: a `Support`, the path of a file of
            bounds, or a dict like one (`Support.parse`). Rows outside are refused.
        channels: 3 makes gray images RGB.
        skip_bad: Leave out images and rows that cannot be used; `Dataset.skipped` names them.
            Columns that cannot be used are left out with a note, if a schema is inferred.
        allow_constant: Accept constant columns: harmless for scoring with a trained model, but
            not for training, where the density of such a column is infinite.
        in_memory: Whether to read examples into memory. By default they are read if they take at
            most a quarter of it (divided by the processes of a `torchrun` on this machine).
            Others stay on disk, and the user's cache stores an index of them. `.npy` files always
            stay there unless this is True; `.npz`, `.csv` and IDX files never do.
        progress: Called with (done, total) as examples are read (for a URL, MiB).

    Raises:
        DataError: If the data cannot be used as they are; the message says what to do.

    >>> data = load("two-moons")
    >>> data.shape, data.bits, sum(len(data.split(p)) for p in ("train", "validation", "held-out"))
    ((2,), None, 20000)
    """
    from musigma.data.attach import attach, is_source

    in_files = isinstance(source, (str, Path))
    if in_files and not str(source).strip():
        raise DataError(f"source is {str(source)!r}: give {UNDERSTOOD}")
    name = plain(source) if in_files and is_url(source) else str(source)
    if not in_files:
        name = "table"
    wanted = [given] if isinstance(given, str) else list(given)
    files = [item for item in wanted if item != "label" and is_source(item)]
    request = Request(
        name,
        size=preprocess.pixels,
        channels=channels,
        columns=None if columns is None else tuple(columns),
        of=(of,) if isinstance(of, str) else tuple(of),
        given=tuple(item for item in wanted if item != "label" and item not in files),
        schema=as_schema(schema),
        label="label" if "label" in wanted else None,
        unlabeled=unlabeled,
        unseen=unseen,
        missing=missing,
        partial=partial,
        allow_constant=allow_constant,
        skip_bad=skip_bad,
        in_memory=in_memory,
        report=progress or (lambda done, total: None),
    )
    try:
        if not in_files:
            data = _read_memory(source, request)
        elif isinstance(source, str) and source in BUILT_IN:
            data = BUILT_IN[source](request)
        else:
            path = fetched(source, request) if is_url(source) else source
            data = _read_path(Path(path).expanduser(), request)
    except OSError as error:
        raise request.error(f"{first_line(error)}: give a path that can be read") from error
    if 0 in data.array.shape and not (data.given and len(data)):
        raise request.error(f"holds no examples (its shape is {data.array.shape})")
    if data.bits is not None:
        data = _images(data, request)
    elif request.given and not data.given:
        raise request.error("given: its columns have no names: give a file of context")
    elif name in BUILT_IN and columns is None and not _are_chosen(data.columns, request):
        raise request.error("of: its columns cannot be chosen: give a table of named columns")
    if in_memory and isinstance(data.array, np.memmap):
        data = replace(data, array=np.array(data.array))
    notes = tuple(dict.fromkeys(request.notes))
    data = replace(data, name=name, preprocess=preprocess, notes=notes)
    if data.bits is not None:
        _check_levels(data)
    if "label" in wanted and data.labels is None:
        raise request.error(
            "given: it has no labels: put images into a folder for each class (dog/1.png), name "
            "a column of a table 'label', or give arrays x and y in an .npz file"
        )
    for file in files:
        data = attach(data, file, allow_constant=allow_constant, skip_bad=skip_bad)
    return data if bounds is None else data.within(as_support(bounds, data.columns))


def _read_memory(source: Any, request: Request) -> Dataset:
    """Arrays and frames; or several files."""
    if isinstance(source, (list, tuple)) and source and isinstance(source[0], (str, Path)):
        return _read_shards([Path(part).expanduser() for part in source], request)
    if isinstance(source, np.ndarray) and source.dtype.kind not in "OVSU":
        return of_array(source, request)
    if request.of and isinstance(source, Mapping):
        arrays = {str(name): values for name, values in source.items()}
        if any(getattr(values, "ndim", 1) > 1 for values in arrays.values()):
            return read_named({name: np.asarray(v) for name, v in arrays.items()}, request)
    return assemble(frame(source, request), request)


def _images(data: Dataset, request: Request) -> Dataset:
    """Images of the requested size, in color if that is requested."""
    if request.of:
        raise request.error(
            f"of: {request.of[0]!r} names columns, and these are images, which have none: leave "
            "it out"
        )
    if request.given:
        raise request.error(
            f"given: {request.given[0]!r} is not a file, and these are images, "
            "which have no columns: give 'label', or a file with a row for each image"
        )
    x, size = data.array, request.size
    if isinstance(x, np.ndarray):
        if size and x.shape[2:] != size:
            make, what = partial(resized, x, size, request), "x".join(map(str, size))
            x = derived(x, f"size {what}", (*x.shape[:2], *size), np.uint8, make, request)
        data = replace(data, array=x, hashes=Hashes(x, facts(x, request).get("hashes")))
    if request.channels == 3 and x.shape[1] == 1:
        request.note("gray images are made RGB, as the model's are")
        shape = (len(x), 3, *x.shape[2:])
        lazy = isinstance(x, LazyImages)
        x = replace(x, shape=shape) if lazy else np.broadcast_to(x, shape)
        data = replace(data, array=x)
    return data


def _are_chosen(names: Sequence[str], request: Request) -> bool:
    """Whether columns are those that are asked for, which sets of points ignore."""
    asked = {j for pattern in request.of for j in matching(names, pattern)}
    return not request.of or len(asked) == len(names) > 0


def _check_levels(data: Dataset) -> None:
    """Refuse images whose levels were reduced already: reducing them again would leave black."""
    bits, high = data.preprocess.levels_bits, 0
    for example in data.array if bits < 8 and len(data) > 1 else ():
        high = max(high, int(example.max()))
        if high >= 2**bits:
            return
    if high:
        raise DataError(
            f"{data.name}: levels run from 0 to {high} only, and {bits} bits are cut from levels "
            f"0..255: multiply them by {255 // (2**bits - 1)}, or keep 8 bits"
        )


def identity(source: str | Path) -> str:
    """The identity of a source: its name, its URL without the query, or its resolved path.

    >>> identity("digits")
    'digits'
    >>> identity("a/../b.npy") == str(Path("b.npy").resolve())
    True
    """
    if isinstance(source, str) and source in BUILT_IN:
        return source
    if is_url(source):
        return plain(source)
    return str(Path(source).expanduser().resolve())


def _read_path(path: Path, request: Request) -> Dataset:
    name, where = path.name.lower(), request.where
    if path.is_dir():
        return _read_folder(path, request)
    if H5AD.fullmatch(str(path)):
        with damage(where):
            return read_h5ad(path, request)
    if not path.exists():
        shards = [Path(part) for part in expanded(str(path))]
        if len(shards) > 1:
            return _read_shards(shards, request)
        near = difflib.get_close_matches(name, BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise request.error(f"no such file, folder or built-in set: {hint}give {UNDERSTOOD}")
    if ARCHIVE.fullmatch(name):
        return read_files(FileSet.of_files([path], archives=True), request)
    ending = path.suffix.lower()
    if ending == ".gz" and TABLES.get(Path(path.stem).suffix.lower()) is Delimited:
        ending = Path(path.stem).suffix.lower()
    with path.open("rb") as file:
        start = file.read(512)
    hint = "the URL of a folder ends with /; " if where.startswith(("http:", "https:")) else ""
    if reason := impostor(start):
        raise request.error(f"{reason}; {hint}".removesuffix("; "))
    if ending in READERS:
        with damage(where):
            return READERS[ending](path, request)
    if ending in pillow_kinds()[1] or CIFAR.fullmatch(path.name):
        return read_files(FileSet.of_files([path]), request)
    if how := conversion(path.name):
        raise request.error(how)
    if start[:2] in (b"\x00\x00", b"\x1f\x8b"):  # the magic of IDX, and of gzip around it
        return Dataset(idx_images(path.read_bytes(), where))
    raise request.error(f"its format is unknown: {hint}give {UNDERSTOOD}")


def _read_folder(path: Path, request: Request) -> Dataset:
    """A folder of images; or, where it has none, of tar shards or parts of a table."""
    files = FileSet.of_folder(path)
    kinds = {suffix(file.name) for file in files.files}
    bases = {file.name.rpartition("/")[2] for file in files.files}
    if not (
        kinds & pillow_kinds()[1] or any(IDX.fullmatch(b) or CIFAR.fullmatch(b) for b in bases)
    ):
        if any(SHARD.fullmatch(file.name) for file in files.files):
            return read_files(files.shards(), request)
        if ".parquet" in kinds:
            parts = [file.name for file in files.files if suffix(file.name) == ".parquet"]
            return read_parquet([path / part for part in parts], request)
    return read_files(files, request)


def _read_shards(paths: list[Path], request: Request) -> Dataset:
    """The files that a pattern matches."""
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise request.error(
            f"{len(missing)} of {len(paths)} files do not exist, such as "
            f"{missing[0]}: give a range of existing files"
        )
    if all(SHARD.fullmatch(path.name) for path in paths):
        return read_files(FileSet.of_files(paths, archives=True), request)
    if all(path.suffix.lower() == ".parquet" for path in paths):
        return read_parquet(paths, request)
    raise request.error("matches files that are not all .tar, or all .parquet")


def _read_table(table: Callable[[Path, Request], Table], path: Path, request: Request) -> Dataset:
    return assemble(table(path, request), request)


TABLES: dict[str, Callable[[Path, Request], Table]] = {
    ".csv": Delimited,
    ".tsv": Delimited,
    **dict.fromkeys((".tab", ".txt", ".dat", ".data"), Delimited),
    ".parquet": lambda path, request: Parquet([path], request),
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
READERS: dict[str, Callable[[Path, Request], Dataset]] = {
    ".npy": read_numpy,
    ".npz": read_numpy,
    **{kind: partial(_read_table, table) for kind, table in TABLES.items()},
}
UNDERSTOOD = (
    "a folder or archive (.tar, .tar.gz, .tar.xz, .zip) of images, IDX files or CIFAR batches; "
    "shards, as a folder or shards-{0000..0099}.tar; a file .npy, .npz, .csv, .tsv, .txt, "
    ".parquet, .arrow, .feather, .h5ad or "
    f"IDX; a URL; or one of {', '.join(BUILT_IN)}"
)
