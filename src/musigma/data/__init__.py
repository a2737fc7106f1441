"""Data sets: what is read, how it is treated, and which examples a step sees."""

from musigma.data.dataset import (
    DataError,
    Dataset,
    Part,
    Preprocess,
    Progress,
    batch_indices,
    describe,
    digest,
    identity,
    load,
)

__all__ = [
    "DataError",
    "Dataset",
    "Part",
    "Preprocess",
    "Progress",
    "batch_indices",
    "describe",
    "digest",
    "identity",
    "load",
]
