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
from musigma.data.given import Given

__all__ = [
    "DataError",
    "Dataset",
    "Given",
    "Part",
    "Preprocess",
    "Progress",
    "batch_indices",
    "describe",
    "digest",
    "identity",
    "load",
]
