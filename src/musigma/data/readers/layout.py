"""The meaning of folder names: parts for training, validation and testing; classes; masks.

The names of parts are recognized in their usual spellings. Files beside folders `train` and
`test` belong to neither, and are left out, as are masks beside images; notes say so.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from musigma.data.errors import printable

Part = str  # "train", "validation" or "test"
Folder = tuple[str, ...]
PREFIX, SUFFIX = "(?:images?|imgs?|public|private|official)?", "(?:sets?|data|images?|imgs?)?"
SPELLINGS: dict[Part, re.Pattern[str]] = {
    part: re.compile(PREFIX + words + SUFFIX)
    for part, words in (
        ("train", "(?:train|training|trn|trainval)"),
        ("validation", "(?:val|valid|validation|validate|dev|devel|development|eval|evaluation)"),
        ("test", "(?:test|testing|tst|holdout|heldout)"),
    )
}
SYSTEM = frozenset({"__macosx", "@eadir", "$recycle.bin", "system volume information"})
BESIDE_TRAIN = re.compile(
    "extra|unlabell?ed|unused|others?|misc|backup|old|samples?|demo|examples?"
)
TRUTH = re.compile("groundtruths?|gts?")
MASKS = re.compile(
    f"{TRUTH.pattern}|(seg|segmentation|label|image|img)?(masks?|labels?|annotations?|annots?)|"
    "segmentations?|segmentation(class|object)|segs?|semantic|targets?|"
    "manuals?|trimaps?|contours?|instances?|depths?|disparity"
)
IMAGES = re.compile("images?|imgs?|jpe?gimages|photos?|pictures?|pics|rgb|inputs?|raw|originals?")
WORDS = re.compile("[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\\W\\d_]+|[0-9]+")
MASK_OF = re.compile("(.+?)[-_ .](masks?|gt|seg|segmentation|groundtruth)", re.IGNORECASE)


def _plain(name: str) -> str:
    """A name without case, punctuation and trailing digits."""
    return re.sub(r"[\W_]", "", name.lower()).rstrip("0123456789")


def _is_called(name: str, pattern: re.Pattern[str]) -> bool:
    """Whether a name, or a word of it, matches a pattern."""
    return any(map(pattern.fullmatch, (_plain(name), *map(str.lower, WORDS.findall(name)))))


@cache
def part_of(name: str) -> Part | None:
    """The part that a folder of this name holds, if it is one of the usual spellings.

    >>> [part_of(name) for name in ("Training", "test_images", "val2017", "dev", "bullet_train")]
    ['train', 'test', 'validation', 'validation', None]
    """
    plain = _plain(name)
    return next((p for p, words in SPELLINGS.items() if words.fullmatch(plain)), None)


def part_of_file(name: str) -> Part | None:
    """The part that a file of a set in several files holds: a word of its name, or a folder.

    >>> names = "train-00000-of-00002.parquet", "cifar_test.tar", "val/01.tar", "x-01.tar"
    >>> [part_of_file(name) for name in names]
    ['train', 'test', 'validation', None]
    """
    *folders, base = name.split("/")
    parts = {part for word in re.split(r"[\W_]+", base.split(".")[0]) if (part := part_of(word))}
    parts = parts or {part for folder in folders if (part := part_of(folder))}
    return parts.pop() if len(parts) == 1 else None


def parts_of_files(names: Sequence[str]) -> dict[str, Part | None]:
    """The part of each file, if some are for training and others are not; empty otherwise."""
    parts = {name: part_of_file(name) for name in names}
    return parts if _are_parts(set(parts.values())) else {}


def _are_parts(parts: set[Part | None]) -> bool:
    return "train" in parts and bool({"test", "validation"} & parts)


def official_masks(parts: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which examples are for testing, and which for validation, by the part of each.

    Without a part for testing, the one for validation is what is held out.
    """
    test, validation = parts == "test", parts == "validation"
    if not test.any():
        return validation, None
    return test, validation if validation.any() else None


class Layout(NamedTuple):
    """The parts and classes of files by their folders; "" for files that are left out."""

    parts: np.ndarray | None  # of each file; None where there are no parts
    classes: np.ndarray | None  # of each file; None where there are no classes
    unclassed: int  # number of files in no class folder, where others are in one
    left_out: Mapping[int, str]  # why files are not examples, by their indices
    folder: str = ""  # the innermost folder, if all files lie in one


def layout(paths: Sequence[str]) -> Layout:
    """Read the folders of files.

    >>> found = layout(["Train/cat/1.png", "Train/dog/2.png", "test/cat/3.png", "masks/4.png"])
    >>> found.parts.tolist(), found.classes.tolist()
    (['train', 'train', 'test', ''], ['cat', 'dog', 'cat', ''])
    >>> found.left_out
    {3: 'lies in neither train nor test'}
    """
    folders = _apart([tuple(path.split("/")[:-1]) for path in paths])
    out = {
        i: f"lies in {name}, a folder of the operating system"
        for i, folder in enumerate(folders)
        for name in folder
        if name.lower() in SYSTEM
    }
    kept = [i for i in range(len(paths)) if i not in out]
    depths = _part_depths([folders[i] for i in kept])
    parts, inner = {}, {i: folders[i] for i in kept}
    if depths:
        at = {i: depths[folders[i]] for i in kept if folders[i] in depths}
        parts = {i: part_of(folders[i][level]) for i, level in at.items()}
        inner = {i: _without(folders[i], level) for i, level in at.items()}
        names = [part for part in SPELLINGS if part in parts.values()]
        where = "in neither" if len(names) > 1 else "beside"
        out |= {i: f"lies {where} {' nor '.join(names)}" for i in kept if i not in parts}
    masks = _masks(paths, inner)
    out |= masks
    inner = {i: folder for i, folder in inner.items() if i not in masks}
    classes, unclassed = _classes(list(inner.values()))
    classes = dict(zip(inner, classes, strict=False))
    parts = {i: parts[i] for i in inner if i in parts}

    def array(values: Mapping[int, str | None]) -> np.ndarray | None:
        return np.array([values.get(i, "") for i in range(len(paths))]) if values else None

    places = set(inner.values())
    folder = places.pop()[-1:] if len(places) == 1 else ()
    return Layout(array(parts), array(classes), unclassed, out, "".join(folder))


def _without(folder: Folder, level: int) -> Folder:
    """A folder without one of its levels, nor the next if it has the same name (train/train)."""
    again = folder[level : level + 1] == folder[level + 1 : level + 2]
    return folder[:level] + folder[level + 1 + again :]


def _children(folders: Iterable[Folder]) -> dict[Folder, set[str]]:
    """The names of the folders in each folder."""
    children: dict[Folder, set[str]] = defaultdict(set)
    for folder in set(folders):
        for depth, name in enumerate(folder):
            children[folder[:depth]].add(name)
    return children


def _apart(folders: Sequence[Folder]) -> list[Folder]:
    """Folders whose names hold a part and more, where others differ in the part, as two folders.

    >>> _apart([("x_train",), ("x_test",)]), _apart([("train_cat",), ("test_cat",), ("test_dog",)])
    ([('train',), ('test',)], [('train', 'cat'), ('test', 'cat'), ('test', 'dog')])
    >>> _apart([("bullet_train",), ("crash_test",)])
    [('bullet_train',), ('crash_test',)]
    """
    apart: dict[Folder, Folder] = {}
    for parent, names in _children(folders).items():
        found: dict[str, tuple[str, list[re.Match[str]]]] = {}  # parts, and the other words
        for name in names if not _hold_parts(names) else ():
            words = list(WORDS.finditer(name))
            at = [i for i, word in enumerate(words) if part_of(word[0])]
            if len(at) == 1:
                before, after = words[: at[0]], words[at[0] + 1 :]
                counts = all(word[0].isdigit() for word in before)  # 01_train
                found[name] = words[at[0]][0], after if counts else before + after
        rests = {name: tuple(word[0] for word in rest) for name, (_, rest) in found.items()}
        parts: dict[Folder, set[Part | None]] = defaultdict(set)
        for name, (part, _) in found.items():
            parts[rests[name]].add(part_of(part))
        if not any(map(_are_parts, parts.values())):
            continue
        shared = len(posixpath.commonprefix(list(parts)))
        for name, (part, rest) in found.items():
            own = rest[shared:] if len(parts) > 1 else []
            inner = name[own[0].start() : own[-1].end()].replace(part, "") if own else ""
            apart[(*parent, name)] = (part, inner) if inner else (part,)
    if not apart:
        return list(folders)
    return [
        tuple(
            new
            for depth, name in enumerate(folder)
            if not (depth and name == folder[depth - 1] and folder[:depth] in apart)
            for new in apart.get(folder[: depth + 1], (name,))
        )
        for folder in folders
    ]


def _part_depths(folders: Sequence[Folder]) -> dict[Folder, int]:
    """The level at which a folder is, or is inside, a part; empty where there are no parts.

    A folder holds parts if it has one for training and one for something else; or one for
    training, and otherwise only what is known not to be a class.
    """
    unique = set(folders)
    holders = {parent for parent, names in _children(unique).items() if _hold_parts(names)}
    if not holders:
        return {}
    depth = min(map(len, holders))
    level = {folder[:depth] for folder in unique if len(folder) >= depth}
    if len(holders & level) < len(level) / 2:
        return {}  # a class that happens to have such folders inside
    found = {}
    for folder in unique:
        at = next((at for at in range(len(folder)) if folder[:at] in holders), None)
        if at is not None and part_of(folder[at]):
            found[folder] = at
    return found


def _hold_parts(names: set[str]) -> bool:
    parts = {part_of(name) for name in names}
    if _are_parts(parts):
        return True
    rest = [_plain(name) for name in names if not part_of(name)]
    beside = all(BESIDE_TRAIN.fullmatch(name) or MASKS.fullmatch(name) for name in rest)
    return "train" in parts and bool(rest) and beside


def _masks(paths: Sequence[str], folders: Mapping[int, Folder]) -> dict[int, str]:
    """Files that are masks of others: in a folder beside that of the images, or by their name."""
    masks = set()
    for parent, names in _children(folders.values()).items():
        usual = {name for name in names if _is_called(name, MASKS)}
        images = any(_is_called(name, IMAGES) for name in names - usual)
        for name in names:
            sure = TRUTH.fullmatch(_plain(name)) and len(names) > 1
            if sure or (images and name in usual):
                masks.add((*parent, name))
    out = {}
    split = {i: paths[i].rpartition("/") for i in folders}
    stems = {(place, base.split(".")[0]) for place, _, base in split.values()}
    for i, folder in folders.items():
        place, _, base = split[i]
        match = MASK_OF.fullmatch(base.split(".")[0])
        above = [name for at, name in enumerate(folder) if folder[: at + 1] in masks]
        if above:
            out[i] = f"lies in {above[0]}, a folder of masks"
        elif match and (place, match[1]) in stems:
            out[i] = "is a mask by its name, beside its image"
    return out


def _classes(folders: Sequence[Folder]) -> tuple[list[str], int]:
    """The class of each file: the first folder in which they differ; or how many have none."""
    shared = next(
        (i for i, level in enumerate(zip(*folders, strict=False)) if len(set(level)) > 1),
        min(map(len, folders), default=0),
    )
    names = [printable(folder[shared]) if len(folder) > shared else "" for folder in folders]
    if len(set(names)) < 2:
        return [], 0
    return ([], names.count("")) if "" in names else (names, 0)
