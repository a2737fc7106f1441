"""Atomic files, locks, values for JSON, and files that are not what their names say."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "LOCK",
    "check_folder",
    "finite",
    "impostor",
    "is_draft",
    "lock_run",
    "locked",
    "number",
    "parsed_toml",
    "replacing",
    "replacing_folder",
    "row_of",
    "sync",
    "usual_rights",
    "write_json",
]


LOCK = ".lock"


@contextlib.contextmanager
def locked(path: Path, *, busy: str | None = None) -> Iterator[bool]:
    """Hold an exclusive lock on a file until the end of the block, or of the process.

    The lock is the operating system's, so a process that is killed leaves none behind. The file
    stays.

    Args:
        path: The lock file. It is created if needed, with its folder.
        busy: Error message if another process holds the lock; by default wait for it.

    Yields:
        True; False if nothing is locked, because the file cannot be created or the file system
        has no locks.

    Raises:
        ValueError: With the text `busy`.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        raise ValueError(busy) from None
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def lock_run(folder: Path) -> contextlib.AbstractContextManager[bool]:
    """Reserve a run folder for this process until the end of the block, or of the process.

    Raises:
        ValueError: If another process trains in it.
    """
    lock = folder / LOCK
    busy = (
        f"out: another process is training in {folder}; wait for it, or name another folder (if "
        f"it ran on a machine that no longer exists, delete {lock})"
    )
    return locked(lock, busy=busy)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`: synced and renamed to it on success, removed on failure.

    Raises:
        ValueError: If the folder of `path` does not exist, or `path` is one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as draft:
        ...         _ = draft.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"path: {path} is a folder; name a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        sync(draft)
        draft.replace(path)
        _sync_one(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def check_folder(path: Path, mark: str = "", name: str = "path") -> None:
    """Refuse a path that `replacing_folder` refuses.

    Args:
        path: The folder.
        mark: Name of a file by which a folder that may be replaced is known.
        name: What the message calls the path.

    Raises:
        ValueError: If the folder that holds `path` does not exist, `path` is a file, or it is a
            folder that holds files, but no `mark`.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{name}: there is no folder {path.parent}; create it first")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{name}: {path} is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (mark and (path / mark).is_file()):
        why = f"is no folder of an earlier export (it has no {mark})" if mark else "holds files"
        raise ValueError(f"{name}: {path} {why}, and would be replaced as a whole; name another")


@contextlib.contextmanager
def replacing_folder(path: str | Path, mark: str = "") -> Iterator[Path]:
    """A new folder beside `path`: it takes its place on success, and is removed on failure.

    A folder that is there is replaced with all that it holds, if it is empty or has a `mark`.

    Args:
        path: The folder.
        mark: Name of a file by which a folder that may be replaced is known.

    Raises:
        ValueError: If `check_folder` refuses the path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing_folder(Path(folder) / "a") as draft:
        ...         _ = (draft / "b.txt").write_text("whole")
        ...     os.listdir(folder), os.listdir(Path(folder) / "a")
        (['a'], ['b.txt'])
    """
    path = Path(path)
    check_folder(path, mark)
    names = path.name, f"{path.name}.old"
    draft, before = (path.with_name(f".{name}.{os.getpid()}.tmp") for name in names)
    draft.mkdir()
    try:
        yield draft
        if hasattr(os, "sync"):  # file by file would take milliseconds each
            os.sync()
        else:
            sync(draft)
        if path.exists():
            path.rename(before)
        draft.rename(path)
    finally:
        if before.exists() and not path.exists():
            before.rename(path)
        for folder in (draft, before):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def usual_rights(path: Path) -> Iterator[None]:
    """Give a file that is written in the block the permissions of any new file.

    Libraries that write a temporary file and rename it make it readable only by its owner.
    """
    path.touch()
    rights = path.stat().st_mode
    yield
    with contextlib.suppress(OSError):  # file systems without permissions
        path.chmod(rights)


def is_draft(path: Path) -> bool:
    """Whether a path is a temporary file, as `replacing` and safetensors name them.

    >>> [is_draft(Path(name)) for name in (".a.txt.12.tmp", ".tmpq2Xy7B", ".a", "a.tmp")]
    [True, True, False, False]
    """
    return bool(re.fullmatch(r"\..+\.\d+\.tmp|\.tmp\w{6}", path.name))


def sync(path: Path) -> None:
    """Wait until a file, or a folder with its content, is on the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finite(value: Any) -> Any:
    """A value for JSON, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file by `replacing`; see `finite`."""
    with replacing(path) as draft:
        draft.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")


def parsed_toml(text: str) -> dict[str, Any]:
    """The content of a TOML file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    return tomllib.loads(text)


def number(value: Any) -> float | None:
    """A value from JSON as a float; None if it is not a finite number."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def row_of(line: str | bytes) -> dict[str, Any] | None:
    """Parse a line of ``metrics.jsonl``; None if it is incomplete or not a row.

    >>> row_of('{"kind": "train", "step": 3}'), row_of('{"kind": "tra')
    ({'kind': 'train', 'step': 3}, None)
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(row, dict) and isinstance(row.get("kind"), str)
    return row if whole and isinstance(row.get("step"), int) else None


def impostor(start: bytes) -> str | None:
    """What a file is by its first bytes, where it is none of those that are read.

    >>> impostor(b"<!DOCTYPE html><html>")
    'is a web page or XML: fetch it again'
    """
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:60].lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "is a web page or XML: fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS to the file: run git lfs pull"
    return None
