"""Lossless compression: every bit that a model reports, as a file.

`compress` and `decompress` are all that most need; an `Archive` is a file that was opened, to read
one image of it, or what damage has left. `Coder` is the trace by which any model codes.
"""

from musigma.coding.archive import Archive, decompress, summary
from musigma.coding.batch import Batch
from musigma.coding.codec import Codec, check
from musigma.coding.coder import Coder
from musigma.coding.compression import Report, compress
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    LimitExceeded,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.pictures import Examples, check_out, extract

__all__ = [
    "Archive",
    "Batch",
    "Codec",
    "Coder",
    "CodingError",
    "DamagedFile",
    "Examples",
    "LimitExceeded",
    "Limits",
    "NumericsDiffer",
    "Report",
    "UnknownVersion",
    "WrongModel",
    "check",
    "check_out",
    "compress",
    "decompress",
    "extract",
    "summary",
]
