"""Sources with a URL: fetched into the cache through fsspec, and read from there.

A file is fetched again when its size, ETag, digest or time on the server has changed. Files are
fetched whole or not at all.
"""

from __future__ import annotations

import json
import posixpath
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from musigma.data import cache
from musigma.data.errors import DataError, first_line, missing, printable
from musigma.data.raw import Request
from musigma.data.readers.filesets import expanded
from musigma.files import locked, replacing, write_json

URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)(::|://)")
VERSIONS = (  # the names by which file systems give the version of a file
    *("ETag", "etag", "e_tag", "md5", "md5Hash", "content_md5", "checksum"),
    *("mtime", "Last-Modified", "LastModified", "last_modified", "updated", "modified", "created"),
)
BLOCK = 1 << 22
NOTE_EVERY = 5  # seconds between notes of what has been fetched


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is written as a URL rather than a path.

    >>> is_url("s3://bucket/photos"), is_url("photos"), is_url("C:/photos"), is_url("a::b.npy")
    (True, False, False, False)
    """
    return isinstance(source, str) and "://" in source and URL.match(source) is not None


def plain(url: str) -> str:
    """A URL without user, password and query, which may be secret.

    >>> plain("https://me:word@host/x.npy?token=1")
    'https://host/x.npy'
    """
    if "::" in url:  # a chain of file systems
        return "::".join(map(plain, url.split("::")))
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}" if parts.scheme else url.partition("?")[0]


def fetched(url: str, request: Request) -> str:
    """The local file, folder or pattern to which a URL is fetched.

    Raises:
        DataError: If it does not exist, cannot be reached, or cannot be stored.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise missing(f"{plain(url)}: reading URLs", "fsspec", "remote") from error
    with _translated(url):
        fs, here = url_to_fs(url)
        if _protocol(fs) == "file":
            return here
        paths = [url_to_fs(part)[1] for part in expanded(url)]
        home = cache.place("remote", url)
        whole = len(paths) == 1 and _is_folder(fs, paths[0])
        if whole:
            folder = paths[0].rstrip("/")
            found = fs.find(folder, detail=True)
            paths = {posixpath.relpath(path, folder): path for path in sorted(found)}
        else:
            found, named = {}, [posixpath.basename(urlsplit(path).path) for path in paths]
            if twice := sorted({name for name in named if named.count(name) > 1}):
                raise request.error(
                    f"several files are called {twice[0]}: give a pattern of files with names of "
                    "their own, or their folder"
                )
            paths = {name or "data": path for name, path in zip(named, paths, strict=True)}
        wanted = {name: found.get(path, {}) for name, path in paths.items()}
        for name, info in wanted.items():
            if info.get("size") is None:  # web servers list names only
                wanted[name] = fs.info(paths[name])
        with locked(home.with_suffix(".lock")):
            _fetch(fs, home, paths, wanted, request)
    return str(home if whole or len(wanted) > 1 else home / next(iter(wanted)))


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]


def _is_folder(fs: Any, path: str) -> bool:
    if _protocol(fs) in ("http", "https"):  # which would take any page with links for a folder
        return path.endswith("/")
    return fs.isdir(path)


def _fetch(
    fs: Any, home: Path, paths: dict[str, str], wanted: dict[str, Any], request: Request
) -> None:
    """Bring a folder to the wanted files, in their present versions, and nothing else."""
    for name in [*wanted]:
        if name.startswith(("../", "/")) or any(p.startswith(".") for p in name.split("/")):
            del wanted[name]  # hidden, or not inside
    if not wanted:
        raise request.error("holds no files")
    notes, known = home / ".versions.json", {}
    with suppress(OSError, ValueError):
        known = json.loads(notes.read_text(encoding="utf-8"))
    stale = [name for name in wanted if known.get(name) != _version(home / name, wanted[name])]
    done, total = 0, sum(wanted[name].get("size") or 0 for name in stale)
    noted = time.monotonic()
    try:
        for name in stale:
            for count in _copy(fs, paths[name], home / name, wanted[name].get("size"), request):
                done += count
                request.report(done >> 20, total >> 20)
            known[name] = _version(home / name, wanted[name])
            if time.monotonic() > noted + NOTE_EVERY:  # it lists all of what may be many files
                write_json(notes, known)
                noted = time.monotonic()
    finally:
        if stale and home.is_dir():
            with suppress(OSError):  # they will be fetched again
                write_json(notes, known)
    keep = {notes, *(home / name for name in wanted)}
    for path in home.rglob("*"):
        if path.is_file() and path not in keep:
            path.unlink(missing_ok=True)


def _version(path: Path, info: dict[str, Any]) -> dict[str, Any]:
    """The identity of the version of a remote file and of its local copy."""
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), None)
    here = path.stat().st_size if path.is_file() else None
    return {"size": info.get("size"), "version": version, "here": here}


def _copy(fs: Any, path: str, target: Path, size: int | None, request: Request) -> Iterator[int]:
    """Fetch one file; yields numbers of bytes."""
    done = 0
    with _room(request):
        target.parent.mkdir(parents=True, exist_ok=True)
    with fs.open(path, "rb") as theirs, replacing(target) as draft, draft.open("wb") as file:
        while data := theirs.read(BLOCK):
            with _room(request):
                file.write(data)
                file.flush()
            done += len(data)
            yield len(data)
        if size is not None and done != size:
            raise request.error(
                f"{printable(target.name)} should have {size} bytes, and {done} "
                "arrived: fetch it again"
            )


@contextmanager
def _room(request: Request) -> Iterator[None]:
    """Turn an error of the cache's disk into a `DataError`."""
    try:
        yield
    except OSError as error:
        raise request.error(
            f"cannot be stored in the cache {cache.folder()} "
            f"({first_line(error)}): make room there, or set XDG_CACHE_HOME to "
            "a folder of your own on a larger disk"
        ) from error


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn any exception of a file system into a `DataError`."""
    shown = plain(url)
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        match = URL.match(url)
        package = _package(match[1] if match else "")
        raise DataError(f"{shown}: {first_line(error)}: pip install {package}") from error
    except FileNotFoundError as error:
        because = f" ({_without_secrets(error.__cause__, url)})" if error.__cause__ else ""
        raise DataError(
            f"{shown}: there is no such file or folder, or it cannot be reached{because}"
        ) from None  # the cause contains the whole URL
    except Exception as error:
        raise DataError(
            f"{shown}: cannot be read ({type(error).__name__}: {_without_secrets(error, url)}): "
            "check the URL, the network and your credentials"
        ) from None


def _without_secrets(error: BaseException, url: str) -> str:
    """An error's message without the user, the password and the query of the URL."""
    parts, text = urlsplit(url), first_line(error)
    for secret in filter(None, (parts.query, parts.netloc.rpartition("@")[0])):
        text = text.replace(secret, "...")
    return text


def _package(protocol: str) -> str:
    """The package that a protocol of fsspec needs."""
    from fsspec.registry import known_implementations

    owner = known_implementations.get(protocol, {}).get("class", "fsspec").split(".")[0]
    return owner if owner != "fsspec" else f"'fsspec[{protocol.removesuffix('s')}]'"
