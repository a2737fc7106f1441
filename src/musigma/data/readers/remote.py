"""Sources with a URL: fetched into the cache through fsspec, and read from there.

A file is fetched again when the other side says that it has changed: another size, ETag, digest
or time. What is fetched is whole, or not there.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from musigma.data import cache
from musigma.data.readers.base import DataError, Request, first_line, missing, printable
from musigma.data.readers.walks import expanded
from musigma.files import locked, replacing, write_json

URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)(::|://)")
VERSIONS = (  # what file systems call that by which versions of a file are told apart
    *("ETag", "etag", "e_tag", "md5", "md5Hash", "content_md5", "checksum"),
    *("mtime", "Last-Modified", "LastModified", "last_modified", "updated", "modified", "created"),
)
BLOCK = 1 << 22


def is_url(source: object) -> TypeGuard[str]:
    """Whether a source is written as a URL, and not as a path.

    >>> is_url("s3://bucket/photos"), is_url("photos"), is_url("C:/photos"), is_url("a::b.npy")
    (True, False, False, False)
    """
    return isinstance(source, str) and "://" in source and URL.match(source) is not None


def plain(url: str) -> str:
    """A URL without what is secret or passing: user, password, query.

    >>> plain("https://me:word@host/x.npy?token=1")
    'https://host/x.npy'
    """
    if "::" in url:  # a chain of file systems
        return "::".join(map(plain, url.split("::")))
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}" if parts.scheme else url.partition("?")[0]


def fetched(url: str, request: Request) -> str:
    """The local file, folder or pattern that holds what is behind a URL.

    Raises:
        DataError: If it is not there, cannot be reached, or cannot be kept.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise missing(f"{plain(url)}: reading URLs", "fsspec", "remote") from error
    with _explained(url):
        fs, here = url_to_fs(url)
        if _protocol(fs) == "file":
            return here
        paths = [url_to_fs(one)[1] for one in expanded(url)]
        home = cache.place("remote", url)
        folder = paths[0].rstrip("/") if _is_folder(fs, paths) else None
        if folder is None:
            wanted = {_base(path): fs.info(path) for path in paths}
        else:
            listed = fs.find(folder, detail=True)
            paths = sorted(listed)
            wanted = {posixpath.relpath(path, folder): listed[path] for path in paths}
            for name, path in zip(wanted, paths, strict=True):
                if wanted[name].get("size") is None:  # the list of a web server has names only
                    wanted[name] = fs.info(path)
        with locked(home.with_suffix(".lock")):
            _fetch(fs, home, dict(zip(wanted, paths, strict=True)), wanted, request)
    return str(home if folder is not None or len(wanted) > 1 else home / next(iter(wanted)))


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]


def _is_folder(fs: Any, paths: list[str]) -> bool:
    if len(paths) > 1:
        return False
    if _protocol(fs) in ("http", "https"):  # where any page with links would be one
        return paths[0].endswith("/")
    return fs.isdir(paths[0])


def _base(path: str) -> str:
    return posixpath.basename(urlsplit(path).path) or "data"


def _fetch(
    fs: Any, home: Path, paths: dict[str, str], wanted: dict[str, Any], request: Request
) -> None:
    """Make a folder hold the wanted files, in their present versions, and nothing else."""
    for name in [*wanted]:
        if name.startswith(("../", "/")) or any(p.startswith(".") for p in name.split("/")):
            del wanted[name]  # hidden, or not inside
    if not wanted:
        raise DataError(f"{request.where}: holds no files")
    stale = {name: info for name, info in wanted.items() if not _is_current(home / name, info)}
    done, total = 0, sum(info.get("size") or 0 for info in stale.values())
    for name, info in stale.items():
        for count in _copy(fs, paths[name], home / name, info.get("size"), request):
            done += count
            request.report(done >> 20, total >> 20)
        write_json(_note(home / name), _version(home / name, info))
    keep = {home / name for name in wanted}
    for path in home.rglob("*"):
        if path.is_file() and path not in keep and path not in map(_note, keep):
            path.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.json")


def _version(path: Path, info: dict[str, Any]) -> dict[str, Any]:
    said = next((str(info[key]) for key in VERSIONS if info.get(key)), None)
    return {"size": info.get("size"), "version": said, "here": path.stat().st_size}


def _is_current(path: Path, info: dict[str, Any]) -> bool:
    try:
        return json.loads(_note(path).read_text(encoding="utf-8")) == _version(path, info)
    except (OSError, ValueError):
        return False


def _copy(fs: Any, path: str, target: Path, size: int | None, request: Request) -> Iterator[int]:
    """Fetch one file; yields how many bytes came."""
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
            raise DataError(
                f"{request.where}: {printable(target.name)} should have {size} bytes, and {done} "
                "came: fetch it again"
            )


@contextmanager
def _room(request: Request) -> Iterator[None]:
    """What the cache's disk says, as a complaint about it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{request.where}: cannot be kept in the cache {cache.folder()} "
            f"({error.strerror or first_line(error)}): make room there, or set XDG_CACHE_HOME to "
            "a folder of yours on a larger disk"
        ) from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Whatever a file system throws, as a `DataError`; each has errors of its own."""
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
        ) from None  # what it was raised from names the whole URL
    except Exception as error:
        raise DataError(
            f"{shown}: cannot be read ({type(error).__name__}: {_without_secrets(error, url)}): "
            "check the URL, the network and your credentials"
        ) from None


def _without_secrets(error: BaseException, url: str) -> str:
    """What an error says, without the user, the password and the query of the URL."""
    parts, text = urlsplit(url), first_line(error)
    for secret in filter(None, (parts.query, parts.netloc.rpartition("@")[0])):
        text = text.replace(secret, "...")
    return text


def _package(protocol: str) -> str:
    """What to install for a protocol that fsspec knows."""
    from fsspec.registry import known_implementations

    owner = known_implementations.get(protocol, {}).get("class", "fsspec").split(".")[0]
    return owner if owner != "fsspec" else f"'fsspec[{protocol.removesuffix('s')}]'"
