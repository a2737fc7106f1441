"""Figures of a model on data: scores, their account, and diagnostics."""

from musigma.evaluation.diagnostics import ACTIVE, COLLAPSED, SATURATED, saturation
from musigma.evaluation.figures import bound, evaluate, inspect, score
from musigma.evaluation.inputs import (
    batch,
    batches,
    check,
    context_size,
    evaluating,
    noise,
    tensors,
)
from musigma.evaluation.ledger import ledger

__all__ = [
    "ACTIVE",
    "COLLAPSED",
    "SATURATED",
    "batch",
    "batches",
    "bound",
    "check",
    "context_size",
    "evaluate",
    "evaluating",
    "inspect",
    "ledger",
    "noise",
    "saturation",
    "score",
    "tensors",
]
