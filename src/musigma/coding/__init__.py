"""Lossless compression at the rate of a model.

`compress` and `decompress` serve most purposes. An `Archive` is an open file, for reading single
images or damaged files. `register` gives a coding rule to a layer, a map or a distribution of
your own. `Coder` is the trace that codes the data of a model.
"""

from musigma.coding import laws, spatial  # noqa: F401 (spatial registers rules)
from musigma.coding.archive import Archive, Report, compress, decompress, summary
from musigma.coding.batch import Batch
from musigma.coding.codec import Codec, check
from musigma.coding.coder import Coder
from musigma.coding.densities import Quantizer
from musigma.coding.errors import (
    CodingError,
    DamagedFile,
    LimitExceeded,
    Limits,
    NumericsDiffer,
    UnknownVersion,
    WrongModel,
)
from musigma.coding.images import Examples, check_out, extract
from musigma.coding.rules import Increasing, Intervals, MapRule, Rule, register

__all__ = [
    "Archive",
    "Batch",
    "Codec",
    "Coder",
    "CodingError",
    "DamagedFile",
    "Examples",
    "Increasing",
    "Intervals",
    "LimitExceeded",
    "Limits",
    "MapRule",
    "NumericsDiffer",
    "Quantizer",
    "Report",
    "Rule",
    "UnknownVersion",
    "WrongModel",
    "check",
    "check_out",
    "compress",
    "decompress",
    "extract",
    "laws",
    "register",
    "summary",
]
