"""Data sets: how they are read and split, and which examples a step sees."""

from musigma.data.attach import attach, given_rows
from musigma.data.bounds import as_support, bounded_columns, read_bounds
from musigma.data.columns import decode
from musigma.data.dataset import Dataset, Given, Preprocess, digest
from musigma.data.errors import DataError
from musigma.data.ranges import column_ranges, fingerprints, outside, ranges, shifted
from musigma.data.raw import Progress
from musigma.data.readers import identity, load
from musigma.data.sampling import Part, batch_indices
from musigma.data.schemas import schema_toml
from musigma.data.summary import describe, summary

__all__ = [
    "DataError",
    "Dataset",
    "Given",
    "Part",
    "Preprocess",
    "Progress",
    "as_support",
    "attach",
    "batch_indices",
    "bounded_columns",
    "column_ranges",
    "decode",
    "describe",
    "digest",
    "fingerprints",
    "given_rows",
    "identity",
    "load",
    "outside",
    "ranges",
    "read_bounds",
    "schema_toml",
    "shifted",
    "summary",
]
