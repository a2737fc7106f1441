"""Errors of compressed files, and the limits of what a file may ask for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CodingError",
    "DamagedFile",
    "LimitExceeded",
    "Limits",
    "NumericsDiffer",
    "UnknownVersion",
    "WrongModel",
]


class CodingError(ValueError):
    """Images cannot be compressed or decompressed. `exit_code` is that of the command line."""

    exit_code = 2


class DamagedFile(CodingError):
    """A file, or a part of it, is not as it was written."""

    exit_code = 3


class WrongModel(CodingError):
    """The model is not the one that the file was written with."""

    exit_code = 4


class NumericsDiffer(CodingError):
    """The model computes different numbers here than on the machine that wrote the file."""

    exit_code = 5


class LimitExceeded(CodingError):
    """A file asks for more than `Limits` allow."""

    exit_code = 6


class UnknownVersion(CodingError):
    """The file has a newer format."""

    exit_code = 7


@dataclass(frozen=True)
class Limits:
    """The most that a file may ask for, so that a hostile file cannot exhaust a machine.

    Each limit is checked before anything of that size is read or allocated. A `Writer` keeps them
    too, so that what it writes can be read with the same limits.

    Attributes:
        header: Bytes of the header's JSON.
        depth: Nesting depth of the header's JSON.
        embedded: Bytes of the embedded model.
        chunks: Chunks in a file; a reader takes about 450 bytes for each.
        images: Images in a file; the format holds up to 2^32 - 1.
        chunk_images: Images in a chunk.
        chunk_raw: Bytes of the images of a chunk, decompressed.
        payload: Bytes of the payload of a chunk.
        exceptions: Exceptions in a chunk; each takes 16 bytes.
        side: Bytes of what a chunk holds besides pixels, decompressed.
        total: Bytes of all images of a file, decompressed.
    """

    header: int = 1 << 20
    depth: int = 8
    embedded: int = 1 << 32
    chunks: int = 1 << 18
    images: int = 1 << 31
    chunk_images: int = 65_535
    chunk_raw: int = 1 << 28
    payload: int = (1 << 28) + (1 << 24)
    exceptions: int = 1 << 20
    side: int = 1 << 24
    total: int = 4 << 30

    def hold(self, name: str, value: int, what: str) -> None:
        """Refuse a value above the limit `name`.

        Raises:
            LimitExceeded: If it is.
        """
        if value > getattr(self, name):
            raise LimitExceeded(
                f"{what}: {value:,}, and the limit is {getattr(self, name):,}; if you trust the "
                f"file, raise the limit (Limits({name}=...))"
            )
