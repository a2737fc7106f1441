"""Folders, archives and shards of images: surveyed, then decoded, or left where they are.

Images are walked twice, first for their headers, so that every complaint about sizes and modes
comes before the first pixel is decoded. What folders, or files beside the images, say of labels
is read on the way.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musigma.data import cache
from musigma.data.cache import Record
from musigma.data.readers import lazy
from musigma.data.readers.arrays import as_labels
from musigma.data.readers.base import DataError, Request, Source, allocate, first_line, printable
from musigma.data.readers.cifar import CIFAR, IDX, read_cifar, read_idx
from musigma.data.readers.pictures import Header, complaint, header, pillow_kinds, pixels, quiet
from musigma.data.readers.tables import LABEL_COLUMNS
from musigma.data.readers.walks import Member, Origin, Place, suffix

TRAIN, TEST, VALIDATION = "train", "test", ("val", "valid", "validation")
RULES = "3"  # of what folders and files beside images say: an index that went by others is stale
BESIDE = (".cls", ".json", ".txt")  # what may say a label, the surest first
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
MANY = 10_000  # files, from which a survey is worth a progress bar
MAX_CLASSES = 1000  # texts beside images that are more different than that are captions


def read_files(origin: Origin, request: Request) -> Source:
    """Read IDX files, CIFAR batches or images, whichever a walk comes upon."""
    path = cache.place("index", f"{origin.name}\n{request.size}", ".npz")
    old = None if request.in_memory else cache.read(path)
    current = old if old is not None and old.about == _about(origin, path) else None
    if current and not request.fits(len(current.arrays["hashes"]) * prod(current.info["shape"])):
        return _indexed(origin, request, current)
    survey = _Survey(origin, request, lazy.Found(old))
    idx: dict[str, bytes] = {}
    cifar: dict[str, bytes] = {}
    others: Counter[str] = Counter()
    suffixes = pillow_kinds()[1]
    with quiet():
        for done, member in enumerate(origin.walk(), 1):
            base = member.name.rpartition("/")[2]
            kind = idx if IDX.fullmatch(base) else cifar if CIFAR.fullmatch(base) else None
            if kind is not None:
                with member.open() as file:
                    kind[member.name] = file.read()
            elif (ending := suffix(base)) in suffixes:
                survey.look(member)
            elif origin.archives and ending in BESIDE:
                survey.hear(member, ending)
            else:
                others[printable(ending or base)] += 1
            if len(origin.files) >= MANY and not origin.archives:
                request.report(done, len(origin.files))
    if idx:
        return read_idx(idx, request.where)
    if cifar:
        return read_cifar(cifar, request.where)
    survey.leave_out_unlabelled()
    if not survey.images:
        others["unreadable images"] = len(survey.problems)
        left = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4) if count)
        raise DataError(
            f"{request.where}: holds no images ({left or 'it is empty'}): give images, IDX files "
            "or CIFAR batches"
        )
    return survey.read(path)


def holds_many(name: str) -> bool:
    """Whether a file is one of those that hold many images, an IDX file or a CIFAR batch."""
    base = name.rpartition("/")[2]
    return (IDX.fullmatch(base) or CIFAR.fullmatch(base)) is not None


def _about(origin: Origin, path: Path) -> dict[str, str]:
    return {"source": path.stem, "version": origin.version, "rules": RULES}


class _Image(NamedTuple):
    header: Header
    place: Place | None
    path: str


class _Survey:
    """Images met twice: `look` at their headers, then all pixels are decoded to one shape."""

    def __init__(self, origin: Origin, request: Request, known: lazy.Found):
        self.origin, self.request, self.known = origin, request, known
        self.images: dict[str, _Image] = {}
        self.headers: dict[Header, Header] = {}
        self.texts: dict[str, dict[str, str | None]] = {ending: {} for ending in BESIDE}
        self.unreadable: dict[str, str] = {}
        self.problems: dict[str, str] = {}

    def look(self, member: Member) -> None:
        """Meet an image for the first time."""
        try:
            known = member.place and self.known.header(self.origin, member)
            found = known or header(member.open)
            found = self.headers.setdefault(found, found)  # there are few different ones
            self.images[member.name] = _Image(found, member.place, member.path)
        except Exception as error:
            self.leave_out(member.name, complaint(error), error)

    def hear(self, member: Member, ending: str) -> None:
        """Meet a file that may say the label of the image of the same name."""
        key = _key(member.name)
        with member.open() as file:
            content = file.read(1 << 24)
        try:
            text = _label_in(content, ending)
        except (ValueError, RecursionError) as error:
            self.unreadable[key] = f"{printable(member.name)}: {first_line(error)}"
        else:
            self.texts[ending][key] = text and text[:100]

    def leave_out(self, name: str, problem: str, error: Exception | None = None) -> None:
        """Stop at an unusable image, or go on without it."""
        if not self.request.skip_bad:
            raise DataError(f"{self.request.where}: {printable(name)} {problem}") from error
        self.images.pop(name, None)
        self.problems[name] = problem

    def read(self, path: Path) -> Source:
        """Decode into memory, or make the index at a path."""
        shape = self._shape()
        n_bytes = len(self.images) * prod(shape)
        if self.request.fits(n_bytes):
            return self._decoded(shape)
        for name, image in self.images.items():
            if image.place is None:
                raise DataError(
                    f"{self.request.where}: decodes to {n_bytes / 2**30:.1f} GiB, more than is "
                    f"read into memory, and {printable(name)} lies in a compressed archive, which "
                    "is read from its beginning only: make it a plain .tar (gunzip, unxz), unpack "
                    "it, or pass a smaller --size"
                )
        build = partial(self._index, shape, path)
        record = cache.kept(path, _about(self.origin, path), build, self.request)
        return _indexed(self.origin, self.request, record)

    def _decoded(self, shape: tuple[int, int, int]) -> Source:
        names = sorted(self.images)
        x = allocate((len(names), *shape), self.request.where)
        row = {name: i for i, name in enumerate(names)}
        done = 0
        with quiet():
            for member in self.origin.walk():
                if member.name in row:
                    try:
                        x[row[member.name]] = pixels(member.open, shape[0], self.request.size)
                    except Exception as error:
                        self.leave_out(member.name, complaint(error), error)
                    self.request.report(done := done + 1, len(names))
        if len(self.images) < len(names):
            names = sorted(self.images)
            x = x[[row[name] for name in names]]
        _tell(names, lazy.as_array([self.images[name].header for name in names]), self.request)
        official, labels, label_names = self._labels(names)
        ids, skipped = tuple(map(printable, names)), tuple(map(printable, sorted(self.problems)))
        parts = official.get("official_test"), official.get("official_validation")
        return Source(x, labels, label_names, ids, *parts, skipped=skipped)

    def _index(self, shape: tuple[int, int, int], path: Path, old: Record | None) -> Record:
        """All that `_indexed` needs to know."""
        names = sorted(self.images)
        places = [self.images[name].place for name in names]
        headers = [self.images[name].header for name in names]
        record = lazy.index(self.origin, self.request, names, places, headers, shape, path, old)
        left = list(lazy.Names(record.arrays["names"], record.arrays["name_ends"]))
        official, labels, label_names = self._labels(left)
        record.arrays.update(official)
        if labels is not None:
            record.arrays["labels"] = labels
        record.info["label_names"] = list(label_names)
        first = [[printable(name), text] for name, text in self.problems.items()]
        record.info["problems"] = sorted(first + record.info["problems"])
        return record

    def _shape(self) -> tuple[int, int, int]:
        channels = 3 if any(image.header.color for image in self.images.values()) else 1
        if self.request.size:
            return (channels, *self.request.size)
        names = iter(sorted(self.images))
        first = next(names)
        width, height, *_ = self.images[first].header
        for name in names:
            w, h, *_ = self.images[name].header
            if (w, h) != (width, height):
                raise DataError(
                    f"{self.request.where}: images differ in size: {printable(first)} is {width} "
                    f"x {height}, {printable(name)} is {w} x {h}: pass --size N to bring all to "
                    "N x N"
                )
        return channels, height, width

    def leave_out_unlabelled(self) -> None:
        """Where files beside images say labels, they say one for each."""
        for name in sorted(self.images):
            if reason := self.unreadable.get(_key(name)):
                self.leave_out(
                    name,
                    f"has a label that cannot be read ({reason}): repair it, or pass --skip-bad",
                )
        for ending in BESIDE[:2]:
            texts = self.texts[ending]
            without = [name for name in sorted(self.images) if not texts.get(_key(name))]
            for name in without if len(without) < len(self.images) else ():
                self.leave_out(
                    name,
                    f"has no label in a {ending} file beside it, as others have: add it, or pass "
                    "--skip-bad",
                )

    def _labels(
        self, names: Sequence[str]
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[str, ...]]:
        """Official parts, labels and their names: of files beside images, or folders."""
        official, labels, label_names = _layout([self.images[name].path for name in names])
        for ending in BESIDE:
            texts = [self.texts[ending].get(_key(name)) for name in names]
            said = [text for text in texts if text]
            sure = ending != ".txt" or (labels is None and _are_classes(said))
            if said and len(said) == len(names) and sure:
                y = np.array(said)
                whole = all(map(WHOLE.fullmatch, said))
                return official, *as_labels(
                    y.astype(np.int64) if whole else y, len(y), f"{self.request.where}: {ending}"
                )
        return official, labels, label_names


def _indexed(origin: Origin, request: Request, record: Record) -> Source:
    """The source of an index."""
    problems, arrays = record.info["problems"], record.arrays
    if problems and not request.skip_bad:
        raise DataError(f"{request.where}: {problems[0][0]} {problems[0][1]}")
    names = lazy.Names(arrays["names"], arrays["name_ends"])
    _tell(names, arrays["headers"], request)
    x = lazy.LazyImages(
        request.where,
        origin.root,
        lazy.Names(arrays["files"], arrays["file_ends"]),
        arrays["stamps"],
        names,
        arrays["places"],
        (len(names), *record.info["shape"]),
        request.size,
    )
    return Source(
        x,
        arrays.get("labels"),
        tuple(record.info["label_names"]),
        tuple(map(printable, names)),
        arrays.get("official_test"),
        arrays.get("official_validation"),
        skipped=tuple(name for name, _ in problems),
        hashes=arrays["hashes"],
    )


def _tell(names: Sequence[str], headers: np.ndarray, request: Request) -> None:
    """Note what becomes of images that are not as the others, or more than one."""
    color, several = headers[:, 2:].T.astype(bool)
    for which, what in (
        (~color & color.any(), "grey images are made RGB, as the others are"),
        (several, "of several frames in an image the first is used"),
    ):
        if which.any():
            first = printable(names[int(which.argmax())])
            request.notes.append(
                f"{request.where}: {what}: {which.sum()} of {len(names)}, such as {first}"
            )


def _key(name: str) -> str:
    """What a file shares with those beside it: its name to the first dot, in its folder."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def _label_in(content: bytes, ending: str) -> str | None:
    """The label that a file says: all of it, or what a JSON object names, if it names one."""
    if ending == ".txt":
        return content.decode("utf-8", "replace").strip()
    if ending == ".cls":
        if text := content.decode().strip():
            return text
        raise ValueError("it is empty")
    said: Any = json.loads(content)
    if not isinstance(said, dict):
        return None
    found = next((said[name] for name in ("cls", *LABEL_COLUMNS) if name in said), None)
    return str(found) if isinstance(found, (int, str)) else None


def _are_classes(texts: Sequence[str]) -> bool:
    """Whether texts come back often enough not to be captions."""
    return len(set(texts)) <= min(MAX_CLASSES, len(texts) // 2)


def _layout(
    paths: Sequence[str],
) -> tuple[dict[str, np.ndarray], np.ndarray | None, tuple[str, ...]]:
    """What the folders say: the official parts, the labels and their names.

    What is set aside in `val`, and not in `test`, is validation data; without a `test` it is what
    is held out.

    >>> _layout(["a/train/cat/1.png", "a/train/dog/2.png", "a/test/cat/3.png"])
    ({'official_test': array([False, False,  True])}, array([0, 1, 0]), ('cat', 'dog'))
    """
    folders = [path.split("/")[:-1] for path in paths]
    shared = next(
        (i for i, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1),
        min(map(len, folders), default=0),
    )
    folders = [folder[shared:] for folder in folders]
    tops = [folder[0] if folder else "" for folder in folders]
    official = {}
    if {TRAIN} < set(tops) <= {TRAIN, TEST, *VALIDATION}:
        train, test = (np.array([top == part for top in tops]) for part in (TRAIN, TEST))
        official["official_test"] = test if test.any() else ~train
        if test.any() and not (train | test).all():
            official["official_validation"] = ~(train | test)
        folders = [folder[1:] for folder in folders]
    classes = [printable(folder[0]) if folder else "" for folder in folders]
    label_names = tuple(sorted(set(classes)))
    if "" in label_names or len(label_names) < 2:
        return official, None, ()
    number = {name: i for i, name in enumerate(label_names)}
    return official, np.array([number[name] for name in classes], np.int64), label_names
