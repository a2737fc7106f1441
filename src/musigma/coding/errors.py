"""What can go wrong with a compressed file, and what such a file may ask for."""

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
    """Images cannot be compressed or decompressed; `exit_code` is what the command line ends with.

    The message says why, and what to do.
    """

    exit_code = 2


class DamagedFile(CodingError):
    """A file, or a part of it, is not as it was written."""

    exit_code = 3


class WrongModel(CodingError):
    """The model at hand is not the one that a file was written with."""

    exit_code = 4


class NumericsDiffer(CodingError):
    """The model computes other numbers here than where the file was written."""

    exit_code = 5


class LimitExceeded(CodingError):
    """A file asks for more than `Limits` grant."""

    exit_code = 6


class UnknownVersion(CodingError):
    """A file was written in a later format."""

    exit_code = 7


@dataclass(frozen=True)
class Limits:
    """What a file may ask for at most, so that a hostile one cannot exhaust a machine.

    All are checked before anything of that size is read or allocated. A `Writer` holds to them
    too, so what it writes can be read with the same limits.

    Attributes:
        header: Bytes of the header's JSON.
        depth: Levels of objects and lists in the header.
        embedded: Bytes of the embedded model.
        chunks: Chunks of a file; a reader takes about 450 bytes for each.
        images: Images of a file; no more than 2^32 - 1 fit the format.
        chunk_images: Images of a chunk.
        chunk_raw: Bytes of a chunk's images once they are decompressed.
        payload: Bytes of a chunk's payload.
        exceptions: Exceptions of a chunk; each takes 16 bytes.
        side: Bytes of what a chunk keeps beside pixels, once inflated.
        total: Bytes of all images of a file once they are decompressed.
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
        """Refuse a value that is greater than the limit of that name.

        Raises:
            LimitExceeded: If it is.
        """
        if value > getattr(self, name):
            raise LimitExceeded(
                f"{what}: {value:,}, and the limit is {getattr(self, name):,}; if you trust the "
                f"file, allow more (Limits({name}=...))"
            )
