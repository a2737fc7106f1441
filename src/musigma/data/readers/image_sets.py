"""Folders, archives and shards of images: surveyed, then decoded, or left on disk.

Images are walked twice, first for their headers, so that sizes and modes are known before the
first pixel is decoded. Labels come from the names of folders, or from files beside the images.
All images that cannot be used are found before an error names them.

Images that stay on disk have an *index*: for each its place, its header, its label, and a hash of
its pixels. To build it every image is decoded once, so broken images are found before training
starts, and `split` reads nothing more. An index that is out of date is rebuilt; entries of images
that have not changed are taken from the old one.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from musigma.data import cache
from musigma.data.cache import Record
from musigma.data.dataset import Dataset, Hashes
from musigma.data.errors import (
    DataError,
    all_faults,
    counted,
    first_line,
    listing,
    named,
    printable,
)
from musigma.data.raw import Request, allocate, as_labels, content_hashes
from musigma.data.readers.filesets import FileSet, Member, Place, suffix
from musigma.data.readers.idx_cifar import CIFAR, IDX, read_cifar, read_idx
from musigma.data.readers.images import (
    Header,
    LazyImages,
    Names,
    fault,
    header,
    pillow_kinds,
    pixels,
    quiet,
)
from musigma.data.readers.layout import layout, official_masks
from musigma.data.readers.others import conversion
from musigma.data.tables import LABEL_NAMES

RULES = "6"  # version of how folders and files beside images are read; older indices are stale
BESIDE = (".cls", ".json", ".txt")  # suffixes of label files, the most reliable first
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
MANY = 10_000  # files from which surveying them shows progress
WORTH_STORING = 1000  # images from which an interrupted index is stored
UNFINISHED = {"unfinished": True}
NO_SUFFIX = "without a suffix"
NO_IMAGE = "no image can be used:\n"
MAX_CLASSES = 1000  # more different texts than this are captions, as are texts that hardly repeat


def read_files(files: FileSet, request: Request) -> Dataset:
    """Read IDX files, CIFAR batches or images, whichever the walk meets."""
    path = cache.place("index", f"{files.name}\n{request.size}", ".npz")
    old = None if request.in_memory else cache.read(path)
    current = old if old is not None and old.about == _version(files, path) else None
    if current and not request.fits(len(current.arrays["hashes"]) * prod(current.info["shape"])):
        return _indexed(files, request, current)
    survey = _Survey(files, request, old)
    whole: dict[re.Pattern[str], dict[str, bytes]] = {IDX: {}, CIFAR: {}}
    suffixes = pillow_kinds()[1]
    with quiet():
        for done, member in enumerate(files.walk(), 1):
            base = member.name.rpartition("/")[2]
            if kind := next((kind for kind in whole if kind.fullmatch(base)), None):
                with member.open() as file:
                    whole[kind][member.name] = file.read()
            elif (ending := suffix(base)) in suffixes:
                survey.add_image(member)
            elif files.archives and ending in BESIDE:
                survey.add_label_file(member, ending)
            else:
                inner = suffix(base.removesuffix(ending)) if ending == ".gz" else ""
                survey.others[printable(inner + ending) or NO_SUFFIX] += 1
            if len(files.files) >= MANY and not files.archives:
                request.report(done, len(files.files))
    for kind, read in ((IDX, read_idx), (CIFAR, read_cifar)):
        if whole[kind]:
            return read(whole[kind], request.where)
    return survey.read(path)


def _version(files: FileSet, path: Path) -> dict[str, str]:
    return {"source": path.stem, "version": files.version, "rules": RULES}


class _Image(NamedTuple):
    header: Header
    place: Place | None
    key: int  # identifies the image in its present version


def _key_of(files: FileSet, member: Member) -> int:
    if member.place is None:
        return 0
    text = f"{files.files[member.place.file][1:]} {member.place[1:]} ".encode()
    return int.from_bytes(blake2b(text + os.fsencode(member.name), digest_size=8).digest(), "big")


class _Survey:
    """The images of a file set: headers first, then the pixels of all, in one shape."""

    def __init__(self, files: FileSet, request: Request, old: Record | None):
        self.files, self.request = files, request
        self.old: dict[int, tuple[Header, int]] = {}  # from an earlier index, by keys
        self.old_shape: Any = None
        if old is not None and old.arrays["headers"].shape[1:] == (len(Header._fields),):
            headers = map(Header._make, old.arrays["headers"].tolist())
            entries = zip(headers, old.arrays["hashes"].tolist(), strict=True)
            self.old = dict(zip(old.arrays["keys"].tolist(), entries, strict=True))
            self.old_shape = old.info["shape"]
        self.images: dict[str, _Image] = {}
        self.paths: dict[str, str] = {}  # of all images, by their names
        self.headers: dict[Header, Header] = {}
        self.texts: dict[str, dict[str, str | None]] = {ending: {} for ending in BESIDE}
        self.unreadable: dict[str, str] = {}
        self.faults: dict[str, str] = {}
        self.others: Counter[str] = Counter()
        self.notes: list[str] = []

    def add_image(self, member: Member) -> None:
        """Read an image's header."""
        self.paths[member.name] = member.path
        try:
            key = _key_of(self.files, member)
            found = self.old[key][0] if key in self.old else header(member.open)
            found = self.headers.setdefault(found, found)  # there are few different ones
            self.images[member.name] = _Image(found, member.place, key)
        except Exception as error:
            self.faults[member.name] = fault(error, member.open)

    def add_label_file(self, member: Member, ending: str) -> None:
        """Read a file that may hold the label of the image of the same name."""
        key = _key(member.name)
        with member.open() as file:
            content = file.read(1 << 24)
        try:
            text = _label_in(content, ending)
        except (ValueError, RecursionError) as error:
            self.unreadable[key] = f"{printable(member.name)}: {first_line(error)}"
        else:
            self.texts[ending][key] = text and text[:100]

    def leave_out(self, name: str, reason: str) -> None:
        """Record why an image cannot be used."""
        self.images.pop(name, None)
        self.faults[name] = reason

    def read(self, path: Path) -> Dataset:
        """Decode into memory, or make the index at a path."""
        self._leave_out_others()
        self._leave_out_unlabeled()
        if not self.images:
            raise self._nothing()
        shape = self._shape()
        n_bytes = len(self.images) * prod(shape)
        if self.request.fits(n_bytes):
            return self._decoded(shape)
        for name, image in self.images.items():
            if image.place is None:
                raise self.request.error(
                    f"decodes to {n_bytes / 2**30:.1f} GiB, more than is "
                    f"read into memory, and {printable(name)} lies in a compressed archive, which "
                    "can only be read from its beginning: make it a plain .tar (gunzip, unxz), "
                    "unpack it, or pass a smaller --size"
                )
        build = partial(self._index, shape, path)
        record = cache.cached(path, _version(self.files, path), build, self.request)
        return _indexed(self.files, self.request, record)

    def _leave_out_others(self) -> None:
        """Leave out files that are not examples: masks, and files beside the parts."""
        names = sorted(self.paths)
        by_reason: dict[str, list[str]] = {}
        for i, reason in layout([self.paths[name] for name in names]).left_out.items():
            by_reason.setdefault(reason, []).append(names[i])
            for about in (self.images, self.faults, self.paths):
                about.pop(names[i], None)
        for reason, left in by_reason.items():
            many = f"{len(left)} images are left out: each"
            images = many if len(left) > 1 else "1 image is left out: it"
            self.notes.append(f"{images} {reason} ({named(left, 2)})")
        if self.files.links:
            self.notes.append(f"links to folders are not followed: {named(self.files.links)}")
        if self.paths and self.others:
            self.notes.append(f"files that are not images are left out: {counted(self.others)}")

    def _nothing(self) -> DataError:
        """The error for a source without images."""
        advice = "give images, IDX files or CIFAR batches"
        if self.faults:
            return self.request.error(NO_IMAGE + listing(dict(self._faults())))
        if set(self.others) & {".csv", ".npy", ".npz", ".tsv"}:
            advice = "give one of the files itself, or join them in one"
        elif set(self.others) & {".zip", ".tar", ".tgz"}:
            advice = "unpack the archives, or give one of them"
        elif how := next(filter(None, map(conversion, self.others)), None):
            advice = how
        elif NO_SUFFIX in self.others:
            advice += "; names of images end with their format, such as .png"
        found = "; ".join(self.notes) or counted(self.others) or "it is empty"
        return self.request.error(f"holds no images ({found}): {advice}")

    def _faults(self) -> list[tuple[str, str]]:
        return [(printable(name), self.faults[name]) for name in sorted(self.faults)]

    def _decoded(self, shape: tuple[int, int, int]) -> Dataset:
        names = sorted(self.images)
        x = allocate((len(names), *shape), self.request.where)
        row = {name: i for i, name in enumerate(names)}
        done = 0
        with quiet():
            for member in self.files.walk():
                if member.name in row:
                    try:
                        x[row[member.name]] = pixels(member.open, shape[0], self.request.size)
                    except Exception as error:
                        self.leave_out(member.name, fault(error, member.open))
                    self.request.report(done := done + 1, len(names))
        if len(self.images) < len(names):
            names = sorted(self.images)
            x = x[[row[name] for name in names]]
        return _dataset(self.request, x, names, *self._about(names))

    def _index(self, shape: tuple[int, int, int], path: Path) -> Record:
        """Decode every image once; if this is interrupted, what is known by then is stored."""
        names = sorted(self.images)
        images = [self.images[name] for name in names]
        files = Names.of(file.name for file in self.files.files)
        stamps = np.array([file[1:] for file in self.files.files], np.int64).reshape(-1, 2)
        common = {"files": files.text, "file_ends": files.ends, "stamps": stamps}
        each = {
            "places": np.array([image.place for image in images], np.int64).reshape(-1, 4),
            "headers": np.array([image.header for image in images], np.int64),
            "keys": np.array([image.key for image in images], np.uint64),
            "hashes": np.zeros(len(images), np.uint64),
        }
        old = self.old if self.old_shape == list(shape) else {}
        known = np.array([image.key in old for image in images])
        each["hashes"][known] = [old[i.key][1] for i in images if i.key in old]

        def record(rows: np.ndarray, about: dict[str, Any]) -> Record:
            kept = Names.of(names[row] for row in rows.tolist())
            arrays = {name: array[rows] for name, array in each.items()}
            arrays |= {"names": kept.text, "name_ends": kept.ends, **common}
            return Record(about, {"shape": list(shape)}, arrays)

        everything = record(np.arange(len(names)), {}).arrays
        x = LazyImages.of(self.request, self.files.root, everything, shape)

        def hashed(row: int) -> int | str:
            try:
                return int(content_hashes([x.decode(row)], 1)[0])
            except Exception as error:
                return fault(error, lambda: io.BytesIO(x.content(row)[0]))

        todo = np.flatnonzero(~known)
        todo = todo[np.lexsort(x.places[todo, 1::-1].T)].tolist()  # as they lie in the files
        done = len(names) - len(todo)
        try:
            with quiet(), ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
                for start in range(0, len(todo), 256):
                    block = todo[start : start + 256]
                    for row, result in zip(block, pool.map(hashed, block), strict=True):
                        if isinstance(result, int):
                            each["hashes"][row], known[row] = result, True
                        else:
                            self.leave_out(names[row], result)
                        self.request.report(done := done + 1, len(names))
        except BaseException:
            if known.sum() >= WORTH_STORING:
                cache.store(path, record(np.flatnonzero(known), UNFINISHED), self.request)
            raise
        found = record(np.flatnonzero(known), {})
        info, arrays = self._about(sorted(self.images))
        return Record({}, found.info | info, found.arrays | arrays)

    def _about(self, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The information that `_dataset` needs besides the pixels."""
        found = layout([self.paths[name] for name in names])
        labels, label_names = self._labels(names, found.classes)
        if found.unclassed:
            self.notes.append(
                f"there are no labels: {found.unclassed} of {len(names)} images lie in no class "
                "folder"
            )
        if labels is None and found.folder and not found.unclassed:
            label_names = (printable(found.folder),)  # the only class, where one is asked for
        test, validation = (None, None) if found.parts is None else official_masks(found.parts)
        arrays = {"labels": labels, "official_test": test, "official_validation": validation}
        headers = [self.images[name].header for name in names]
        arrays["headers"] = np.array(headers, np.int64).reshape(-1, len(Header._fields))
        info = {"label_names": list(label_names), "notes": self.notes, "total": len(self.paths)}
        given = {name: array for name, array in arrays.items() if array is not None}
        return info | {"faults": self._faults()}, given

    def _shape(self) -> tuple[int, int, int]:
        channels = 3 if any(image.header.color for image in self.images.values()) else 1
        if self.request.size:
            return (channels, *self.request.size)
        sizes: dict[tuple[int, int], list[str]] = {}
        for name in sorted(self.images):
            sizes.setdefault(self.images[name].header[:2], []).append(name)
        if len(sizes) == 1:
            ((width, height),) = sizes
            return channels, height, width
        common = sorted(sizes, key=lambda size: -len(sizes[size]))
        several = ", ".join(
            f"{len(sizes[w, h])} of {w} x {h} (such as {printable(sizes[w, h][0])})"
            for w, h in common[:5]
        )
        more = f" and {len(common) - 5} more sizes" if len(common) > 5 else ""
        also = ""
        if not self.request.skip_bad and len(self.images) <= MANY:
            self._find_faults(channels)
        if self.faults and not self.request.skip_bad:
            also = "\nbesides, " + all_faults(dict(self._faults()), "images", len(self.paths))
        raise self.request.error(
            f"images differ in size, width x height: {several}{more}: pass "
            f"--size N to resize all to N x N{also}"
        )

    def _find_faults(self, channels: int) -> None:
        """Decode every image, to record which cannot be used."""
        with quiet():
            for member in self.files.walk():
                if member.name in self.images:
                    try:
                        pixels(member.open, channels, None)
                    except Exception as error:
                        self.leave_out(member.name, fault(error, member.open))

    def _leave_out_unlabeled(self) -> None:
        """If files beside images hold labels, require one for each image."""
        for name in sorted(self.images):
            if reason := self.unreadable.get(_key(name)):
                self.leave_out(name, f"has a label that cannot be read ({reason}): repair it")
        for ending in BESIDE[:2]:
            texts = self.texts[ending]
            without = [name for name in sorted(self.images) if not texts.get(_key(name))]
            for name in without if len(without) < len(self.images) else ():
                self.leave_out(
                    name, f"has no label in a {ending} file beside it, as others have: add it"
                )

    def _labels(
        self, names: Sequence[str], classes: np.ndarray | None
    ) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """The labels in files beside images, or else the classes of folders."""
        for ending in BESIDE:
            texts = [self.texts[ending].get(_key(name)) for name in names]
            present = [text for text in texts if text]
            few = len(set(present)) <= min(MAX_CLASSES, len(present) // 2)
            reliable = ending != ".txt" or (classes is None and few)
            if present and len(present) == len(names) and reliable:
                y = np.array(present)
                y = y.astype(np.int64) if all(map(WHOLE.fullmatch, present)) else y
                return as_labels(y, len(y), self.request.where)
        return (None, ()) if classes is None else as_labels(classes, len(names), "")


def _indexed(files: FileSet, request: Request, record: Record) -> Dataset:
    """The data of an index."""
    x = LazyImages.of(request, files.root, record.arrays, record.info["shape"])
    return _dataset(request, x, x.names, record.info, record.arrays)


def _dataset(
    request: Request,
    x: Any,
    names: Sequence[str],
    info: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Dataset:
    """Images with their labels and parts; what was left out, and what is converted, is noted."""
    faults = dict(info["faults"])
    if not len(names):
        raise request.error(NO_IMAGE + listing(faults))
    request.refuse(faults, "images", info["total"])
    for text in info["notes"]:
        request.note(text)
    color, several = arrays["headers"][:, 2:].T.astype(bool)
    for which, what in (
        (~color & color.any(), "gray images are made RGB, as the others are"),
        (several, "only the first of several frames is used"),
    ):
        if which.any():
            first = printable(names[int(which.argmax())])
            request.note(f"{what}: {which.sum()} of {len(names)}, such as {first}")
    labels, label_names = arrays.get("labels"), tuple(info["label_names"])
    if labels is None and label_names:
        asked = request.label is not None and request.allow_constant
        labels, label_names = (
            (np.zeros(len(names), np.int64), label_names) if asked else (None, ())
        )
    return Dataset(
        x,
        labels=labels,
        label_names=label_names,
        ids=tuple(map(printable, names)),
        official_test=arrays.get("official_test"),
        official_validation=arrays.get("official_validation"),
        skipped=faults,
        hashes=Hashes(x, arrays.get("hashes")),
    )


def _key(name: str) -> str:
    """The key that a file shares with its label: the folder, and the name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def _label_in(content: bytes, ending: str) -> str | None:
    """The label in a file: all of it, or an entry of a JSON object, if there is one."""
    if ending == ".txt":
        return content.decode("utf-8", "replace").strip()
    if ending == ".cls":
        if text := content.decode().strip():
            return text
        raise ValueError("it is empty")
    entries: Any = json.loads(content)
    if not isinstance(entries, dict):
        return None
    found = next((entries[name] for name in ("cls", *LABEL_NAMES) if name in entries), None)
    return str(found) if isinstance(found, (int, str)) else None
