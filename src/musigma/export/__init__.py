"""A trained model as functions that run without this library: torch.export and ONNX.

`functions_of` prepares them, `write` writes them with a sheet that says what goes in and comes out
(`musigma export RUN`; docs/export.md).
"""

from musigma.export.functions import NAMES, Call, Function, Value, functions_of, traced
from musigma.export.sheet import sheet
from musigma.export.writing import KINDS, save, write

__all__ = [
    "KINDS",
    "NAMES",
    "Call",
    "Function",
    "Value",
    "functions_of",
    "save",
    "sheet",
    "traced",
    "write",
]
