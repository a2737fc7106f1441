"""Figures of a model on data: scores, their account, and diagnostics."""

from musigma.evaluation.figures import (
    ACTIVE,
    COLLAPSED,
    SATURATED,
    at_home,
    batch,
    batches,
    bound,
    check,
    context_size,
    evaluate,
    evaluating,
    inspect,
    ledger,
    noise,
    saturation,
    score,
)

__all__ = [
    "ACTIVE",
    "COLLAPSED",
    "SATURATED",
    "at_home",
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
]
