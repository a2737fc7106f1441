"""What is compressed besides arrays: data sets with names, modes and labels, as they were found.

A model may see less than a file holds: fewer levels, or other sizes. What is compressed is what
comes out again, so data that the model's treatment would change are refused, unless it is what
was asked for; and levels that stand for others, as 0 and 1 for 0 and 255, are put back.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from musigma.coding.archive import Archive
from musigma.coding.batch import Batch
from musigma.coding.errors import DamagedFile
from musigma.data import Dataset, Preprocess
from musigma.files import replacing, sync

__all__ = ["Examples", "check_out", "extract"]

LOSSLESS = (".bmp", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff")
"""Suffixes of files that hold pixels exactly; other names get `.png` behind."""
MODES = ("1", "L", "RGB")
DROPPED = ("P", "LA", "RGBA", "PA")
"""Modes whose colours come out again, but not their palette, or their alpha (it is opaque)."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class Examples:
    """A data set as `musigma.coding.compress` takes it: its slices are batches.

    Args:
        data: The data set, treated as the model's was.
        folder: Where its files lie, if it is a folder of images: their names are kept, and modes.
        labels: Whether labels are kept; a conditional model needs them.
        prepared: Whether what the model sees is what is to be kept; otherwise the data themselves,
            and it is an error if the model sees less.
        seed: Of dynamic binarization.

    Attributes:
        about: What the file's header has to say of them.

    Raises:
        ValueError: If the model sees less than there is, or names cannot be files' everywhere.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        folder: Path | None = None,
        labels: bool = False,
        prepared: bool = False,
        seed: int = 0,
    ):
        if labels and data.labels is None:
            raise ValueError(f"labels: {data.name} has none")
        self.data, self.labels, self.seed = data, labels, seed
        self.names = self.modes = None
        self.about: dict[str, Any] = {}
        if folder is not None and data.ids is not None:
            self.names = list(data.ids)
            check_names(map(written_as, self.names))
            self.modes = [_mode(folder / name, data, prepared) for name in self.names]
        elif data.preprocess.size is not None and not prepared:
            raise ValueError(
                f"data: {data.name} was brought to {data.shape[2]} x {data.shape[1]} pixels as it "
                "was read, and need not come out as it was; give a folder, whose images are "
                "compared, or compress what the model sees (--prepared)"
            )
        if labels:
            self.about["label_names"] = list(data.label_names)
        if prepared:
            self.about["preprocess"] = data.preprocess.to_json()
        elif data.preprocess != Preprocess(size=data.preprocess.size):
            self.about["levels"] = _levels(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> Batch:
        start, stop, _ = rows.indices(len(self))
        x = self.data.take(np.arange(start, stop), seed=self.seed, first=start)
        about: dict[str, Sequence[Any]] = {}
        if self.names is not None and self.modes is not None:
            about = {"modes": self.modes[rows], "names": self.names[rows]}
        if self.labels and self.data.labels is not None:
            about["labels"] = self.data.labels[rows].tolist()
        return Batch(x.astype(np.int64), about)


def _levels(data: Dataset) -> list[int]:
    """The level of the data that each of the model's stands for, if it is one."""
    plain = replace(data, preprocess=Preprocess())
    stands = np.full(256, -1)
    for start in range(0, len(data), 4096):
        rows = np.arange(start, min(start + 4096, len(data)))
        pairs = np.stack([data.take(rows, first=start).ravel(), plain.take(rows).ravel()])
        for level, byte in np.unique(pairs, axis=1).T:
            if stands[level] not in (-1, byte):
                raise ValueError(
                    f"data: {data.name} holds more than the model sees: levels {stands[level]} "
                    f"and {byte} are one to it, so they would not come out again; to compress "
                    "what the model sees, say so (--prepared)"
                )
            stands[level] = byte
    return stands[: 1 << (data.bits or 8)].clip(0).tolist()


def _mode(path: Path, data: Dataset, prepared: bool) -> str:
    from PIL import Image

    with Image.open(path) as image:
        size, mode = image.size[::-1], image.mode
    if not prepared and size != data.shape[1:]:
        raise ValueError(
            f"data: {path.name} is {size[1]} x {size[0]}, and the model sees "
            f"{data.shape[2]} x {data.shape[1]}; train a model of that size, or compress what "
            "this one sees (--prepared)"
        )
    if not prepared and mode not in (*MODES, *DROPPED):
        raise ValueError(
            f"data: {path.name} is of mode {mode}, whose pixels a model sees converted; save it "
            "as RGB, or compress what the model sees (--prepared)"
        )
    return mode if mode in MODES else "L" if data.shape[0] == 1 else "RGB"


# --- out again ---------------------------------------------------------------------------------


def check_out(out: Path) -> str:
    """What a path is to become: `folder`, `.npz` or `.npy`.

    Raises:
        ValueError: If something is there already, or could not be.
    """
    kind = out.suffix if out.suffix in (".npz", ".npy") else "folder"
    if kind == "folder" and out.exists():
        raise ValueError(f"out: {out} exists; name a folder that does not")
    if not out.parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist; create it first")
    return kind


def extract(batches: Iterable[tuple[int, Batch]], archive: Archive, out: Path) -> int:
    """Write images as a folder of files, or as an array in a .npz or .npy file; whole, or not.

    Args:
        batches: Of the archive, in their order, each with the number of its first image; all of
            them, or what is left.
        archive: Which they are of.
        out: A folder that does not exist, or a file.

    Returns:
        How many images.

    Raises:
        DamagedFile: If names are not such as `check_names` takes.
        OSError: If something cannot be written.
    """
    kind, count = check_out(out), 0
    if kind != "folder":
        whole, labels = [], []
        for _, batch in batches:
            whole.append(restored(batch.levels, archive.about))
            labels += batch.about.get("labels", [])
        x = np.concatenate(whole) if whole else np.zeros((0, *archive.shape), np.uint8)
        with replacing(out) as draft, draft.open("wb") as file:
            if kind == ".npy":
                np.save(file, x)
            elif labels:
                np.savez_compressed(file, x=x, labels=np.array(labels))
            else:
                np.savez_compressed(file, x=x)
        return len(x)
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    draft.mkdir()
    taken: set[str] = set()
    try:
        for first, batch in batches:
            _write_pictures(batch, archive, draft, taken, first)
            count += len(batch)
        _sync(draft)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return count


def _sync(folder: Path) -> None:
    """Wait until all files are on the disk; one by one would take milliseconds each."""
    if hasattr(os, "sync"):
        os.sync()
    else:
        sync(folder)


def restored(levels: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    """Levels of the data, of the model's.

    Raises:
        DamagedFile: If the header does not say what a level stands for.
    """
    table = about.get("levels")
    if table is None:
        return levels.astype(np.uint8 if levels.max(initial=0) < 256 else np.uint16)
    plain = np.array(table if isinstance(table, list) else [], dtype=object)
    if not all(type(v) is int and 0 <= v < 256 for v in plain) or levels.max() >= len(plain):
        raise DamagedFile("the header does not say what each level stands for")
    return plain.astype(np.uint8)[levels]


def _write_pictures(
    batch: Batch, archive: Archive, folder: Path, taken: set[str], first: int
) -> None:
    from PIL import Image

    x = restored(batch.levels, archive.about)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.dtype != np.uint8:
        raise ValueError(
            f"out: examples of shape {x.shape[1:]} are no pictures; name a .npz or .npy file"
        )
    if "preprocess" in archive.about:  # black to white, whatever the number of levels
        x = (x.astype(np.uint16) * 255 // (2**archive.bits - 1)).astype(np.uint8)
    names = batch.about.get("names") or [f"{first + i:08}.png" for i in range(len(x))]
    modes = batch.about.get("modes") or [("L", "RGB")[x.shape[1] == 3]] * len(x)
    for pixels, name, mode in zip(x, names, modes, strict=True):
        if not isinstance(name, str) or mode not in MODES:
            raise DamagedFile(f"an image of name {name!r} and mode {mode!r} cannot be written")
        target = written_as(name)
        try:
            check_names([target], taken)
        except ValueError as error:
            raise DamagedFile(f"an image cannot be written under its name: {error}") from error
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = mode != "RGB" or pixels.shape[0] == 1
        rows = pixels[0] if grey else np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
        image = Image.fromarray(rows)
        with path.open("xb") as file:
            image = image.convert("1", dither=Image.Dither.NONE) if mode == "1" else image
            image.save(file, _format(path))


def _format(path: Path) -> str:
    kinds = {".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG"}
    return kinds.get(path.suffix.lower(), "PPM")


def written_as(name: str) -> str:
    """The name of the file that an image is written to: its own, if that can hold it exactly."""
    return name if PurePosixPath(name).suffix.lower() in LOSSLESS else name + ".png"


def check_names(names: Iterable[str], taken: set[str] | None = None) -> None:
    """Refuse names that are not those of files below a folder, on every system.

    Raises:
        ValueError: For the first one.
    """
    taken = set() if taken is None else taken
    for name in names:
        parts = name.split("/")
        bad = next((why for part in parts if (why := _unfit(part))), None)
        if bad is None and (len(parts) > 32 or len(name.encode()) > 1024):
            bad = "has more than 32 folders, or 1,024 bytes"
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        ends = [i for i, character in enumerate(key) if character == "/"]
        folders = {key[: i + 1] for i in ends}
        if bad is None and (key in taken or key + "/" in taken):
            bad = "is there twice, on systems to which upper and lower case are one"
        if bad is None and any(folder[:-1] in taken for folder in folders):
            bad = "has another file for a folder"
        if bad:
            raise ValueError(f"names: {name!r} {bad}")
        taken |= {key, *folders}


def _unfit(part: str) -> str | None:
    if part in ("", ".", "..") or "\\" in part or ":" in part:
        return "leads out of its folder"
    if any(unicodedata.category(c).startswith("C") for c in part):
        return "has characters that are none"
    if len(part.encode("utf-8", "surrogatepass")) > 255:
        return "is longer than file systems take"
    if RESERVED.fullmatch(part) or part[-1] in ". ":
        return "is no name on Windows"
    return None
