"""Data sets as `compress` takes them, and decompressed images as files.

A model may see less than the data hold: fewer levels, or another size. Data that the model's
preprocessing would change are refused, because they could not be restored exactly, unless the
preprocessed data are to be kept. Levels that stand for others (0 and 1 for 0 and 255) are
converted back.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from musigma.coding.archive import Archive
from musigma.coding.batch import Batch, joined
from musigma.coding.errors import DamagedFile
from musigma.data import Dataset, Preprocess
from musigma.evaluation.inputs import column
from musigma.files import replacing, replacing_folder
from musigma.spec import Variable

__all__ = ["Examples", "check_out", "extract"]

LOSSLESS = (".bmp", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff")
"""Suffixes of files that hold pixels exactly; `.png` is appended to other names."""
MODES = ("1", "L", "RGB")
DROPPED = ("P", "LA", "RGBA", "PA")
"""Modes whose colors are kept, but not the palette or the (opaque) alpha channel."""
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class Examples:
    """A data set as `compress` takes it: its slices are batches.

    Args:
        data: The data set, with the preprocessing of the model.
        context: The variables of the model's context (`model.spec.context`); they are kept.
        folder: The folder of the files, for a data set of images; their names and modes are kept.
        labels: Whether labels are kept, even if the model is not conditioned on them.
        prepared: Whether to keep what the model sees; otherwise the data themselves are kept, and
            a model that sees less is an error.
        seed: Random seed of dynamic binarization.

    Attributes:
        about: The entries of the file's header about them.

    Raises:
        ValueError: If the model sees less than the data hold, if a part of its context is
            missing, or if names could not be those of files on every system.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        context: Sequence[Variable] = (),
        folder: Path | None = None,
        labels: bool = False,
        prepared: bool = False,
        seed: int = 0,
    ):
        known = {variable.name: variable for variable in data.variables}
        kept = {variable.name: variable for variable in context}
        if labels and "label" not in kept:
            kept["label"] = known.get("label", Variable("label"))
        if missing := sorted(set(kept) - set(known)):
            raise ValueError(f"data: {data.name} has no {', '.join(missing)}")
        self.data, self.kept, self.seed = data, kept, seed
        self.names: list[str] = []
        self.modes: list[str] = []
        self.about: dict[str, Any] = {}
        if folder is not None and data.ids is not None:
            self.names = list(data.ids)
            check_names(map(written_as, self.names))
            self.modes = [_mode(folder / name, data, prepared) for name in self.names]
        elif data.preprocess.size is not None and not prepared:
            raise ValueError(
                f"data: {data.name} was resized to {data.shape[2]} x {data.shape[1]} pixels as it "
                "was read; give a folder, whose images are compared, or keep what the model sees "
                "(--prepared)"
            )
        names = {name: list(v.names or known[name].names) for name, v in kept.items()}
        if "label" in names:
            self.about["label_names"] = names.pop("label")
        if any(names.values()):
            self.about["given_names"] = {name: found for name, found in names.items() if found}
        if prepared:
            self.about["preprocess"] = data.preprocess.to_json()
        elif data.preprocess != Preprocess(size=data.preprocess.size):
            self.about["levels"] = _levels(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: slice) -> Batch:
        start, stop, _ = rows.indices(len(self))
        indices = np.arange(start, stop)
        x = self.data.take(indices, seed=self.seed, first=start)
        about: dict[str, Sequence[Any]] = {}
        if self.names:
            about = {"modes": self.modes[rows], "names": self.names[rows]}
        given = {name: column(v, self.data, indices) for name, v in self.kept.items()}
        if "label" in given:
            about["labels"] = given.pop("label").tolist()
        return Batch(x, about, given)


def _levels(data: Dataset) -> list[int]:
    """The level of the data for each level that the model sees, if there is only one."""
    plain = replace(data, preprocess=Preprocess())
    stands = np.full(256, -1)
    for start in range(0, len(data), 4096):
        rows = np.arange(start, min(start + 4096, len(data)))
        pairs = np.stack([data.take(rows, first=start).ravel(), plain.take(rows).ravel()])
        for level, byte in np.unique(pairs, axis=1).T:
            if stands[level] not in (-1, byte):
                raise ValueError(
                    f"data: {data.name} holds more than the model sees: levels {stands[level]} "
                    f"and {byte} are the same to it and could not be restored; to keep what "
                    "the model sees, use --prepared"
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
            f"{data.shape[2]} x {data.shape[1]}; train a model of that size, or keep what this "
            "one sees (--prepared)"
        )
    if not prepared and mode not in (*MODES, *DROPPED):
        raise ValueError(
            f"data: {path.name} has mode {mode}, whose pixels the model sees converted; save it "
            "as RGB, or keep what the model sees (--prepared)"
        )
    return mode if mode in MODES else "L" if data.shape[0] == 1 else "RGB"


# --- decompressed ------------------------------------------------------------------------------


def check_out(out: Path) -> str:
    """The kind of output that a path names: `folder`, `.npz` or `.npy`.

    Raises:
        ValueError: If the folder exists, or its parent does not.
    """
    kind = out.suffix if out.suffix in (".npz", ".npy") else "folder"
    if kind == "folder" and out.exists():
        raise ValueError(f"out: {out} exists; name a folder that does not")
    if not out.parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist; create it first")
    return kind


def extract(batches: Iterable[tuple[int, Batch]], archive: Archive, out: Path) -> int:
    """Write images as files in a folder, or as one .npz or .npy file, completely or not at all.

    A .npz file holds the images as `x`, `labels`, and each other variable as `given_NAME`.

    Args:
        batches: Batches of the archive, in order, each with the number of its first image.
        archive: The archive.
        out: A folder that does not exist, or a file.

    Returns:
        Number of images.

    Raises:
        DamagedFile: If `check_names` refuses a name.
        OSError: If something cannot be written.
    """
    kind, count = check_out(out), 0
    if kind != "folder":
        empty = Batch(np.zeros((0, *archive.shape), np.int64))
        batch = joined([part for _, part in batches] or [empty])
        arrays = {f"given_{name}": rows for name, rows in batch.given.items()}
        arrays["x"] = restored(batch.levels, archive.about)
        if "labels" in batch.about:
            arrays["labels"] = np.array(batch.about["labels"])
        with replacing(out) as draft, draft.open("wb") as file:
            if kind == ".npy":
                np.save(file, arrays["x"])
            else:
                np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        return len(batch)
    taken: set[str] = set()
    with replacing_folder(out) as draft:
        for first, batch in batches:
            _write_images(batch, archive, draft, taken, first)
            count += len(batch)
    return count


def restored(levels: np.ndarray, about: Mapping[str, Any]) -> np.ndarray:
    """Levels of the data, from those of the model.

    Raises:
        DamagedFile: If the header does not say what each level stands for.
    """
    table = about.get("levels")
    if table is None:
        return levels.astype(np.uint8 if levels.max(initial=0) < 256 else np.uint16)
    plain = np.array(table if isinstance(table, list) else [], dtype=object)
    bytes_only = all(type(v) is int and 0 <= v < 256 for v in plain)
    if not bytes_only or levels.max(initial=-1) >= len(plain):
        raise DamagedFile("the header does not say what each level stands for")
    return plain.astype(np.uint8)[levels]


def _write_images(
    batch: Batch, archive: Archive, folder: Path, taken: set[str], first: int
) -> None:
    from PIL import Image

    x = restored(batch.levels, archive.about)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.dtype != np.uint8:
        raise ValueError(
            f"out: examples of shape {x.shape[1:]} are not images; name a .npz or .npy file"
        )
    if "preprocess" in archive.about:  # black to white, whatever the number of levels
        x = (x.astype(np.uint16) * 255 // (2**archive.bits - 1)).astype(np.uint8)
    names = batch.about.get("names") or [f"{first + i:08}.png" for i in range(len(x))]
    modes = batch.about.get("modes") or [("L", "RGB")[x.shape[1] == 3]] * len(x)
    for pixels, name, mode in zip(x, names, modes, strict=True):
        if not isinstance(name, str) or mode not in MODES:
            raise DamagedFile(f"an image with name {name!r} and mode {mode!r} cannot be written")
        target = written_as(name)
        try:
            check_names([target], taken)
        except ValueError as error:
            raise DamagedFile(f"an image cannot be written under its name: {error}") from error
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = mode != "RGB" or pixels.shape[0] == 1
        image = Image.fromarray(pixels[0] if grey else np.moveaxis(pixels, 0, -1))
        with path.open("xb") as file:
            image = image.convert("1", dither=Image.Dither.NONE) if mode == "1" else image
            image.save(file)  # in the format of its suffix


def written_as(name: str) -> str:
    """The name under which an image is written: its own, if that format holds it exactly."""
    return name if PurePosixPath(name).suffix.lower() in LOSSLESS else name + ".png"


def check_names(names: Iterable[str], taken: set[str] | None = None) -> None:
    """Refuse names that cannot be those of files below a folder on every system.

    Args:
        names: Names, with / between folders.
        taken: Names that are in use; the new ones are added.

    Raises:
        ValueError: For the first such name.
    """
    taken = set() if taken is None else taken
    for name in names:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        folders = {key[: i + 1] for i, character in enumerate(key) if character == "/"}
        bad = next(filter(None, map(_unfit, name.split("/"))), None)
        if bad is None and (len(folders) > 31 or len(name.encode()) > 1024):
            bad = "has more than 32 folders, or more than 1,024 bytes"
        elif key in taken or key + "/" in taken:
            bad = bad or "occurs twice on systems that ignore upper and lower case"
        elif any(folder[:-1] in taken for folder in folders):
            bad = bad or "names a file as a folder"
        if bad:
            raise ValueError(f"names: {name!r} {bad}")
        taken |= {key, *folders}


def _unfit(part: str) -> str | None:
    """Why a file or a folder cannot have this name."""
    if part in ("", ".", "..") or "\\" in part or ":" in part:
        return "leads out of the folder"
    if any(unicodedata.category(c).startswith("C") for c in part):
        return "has control characters"
    if len(part.encode("utf-8", "surrogatepass")) > 255:
        return "is longer than file systems allow"
    if RESERVED.fullmatch(part) or part[-1] in ". ":
        return "is not a valid name on Windows"
    return None
