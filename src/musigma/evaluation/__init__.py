"""Figures of a model on data: scores, the ledger, and diagnostics."""

from musigma.evaluation.diagnostics import (
    ACTIVE,
    COLLAPSED,
    ILL_CONDITIONED,
    SATURATED,
    conditioning,
    reported,
    saturation,
    slow_directions,
)
from musigma.evaluation.figures import bound, evaluate, inspect, ledger, mean, score
from musigma.evaluation.inputs import (
    batch,
    batches,
    check,
    evaluating,
    noise,
    tensors,
)
from musigma.spec import bits_per_dim

__all__ = [
    "ACTIVE",
    "COLLAPSED",
    "ILL_CONDITIONED",
    "SATURATED",
    "batch",
    "batches",
    "bits_per_dim",
    "bound",
    "check",
    "conditioning",
    "evaluate",
    "evaluating",
    "inspect",
    "ledger",
    "mean",
    "noise",
    "reported",
    "saturation",
    "score",
    "slow_directions",
    "tensors",
]
