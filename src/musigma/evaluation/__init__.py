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
from musigma.evaluation.disentanglement import (
    DCI,
    dci,
    disentanglement,
    factor_score,
    mig,
    modularity,
    mutual_information,
    sap,
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
    "DCI",
    "ILL_CONDITIONED",
    "SATURATED",
    "batch",
    "batches",
    "bits_per_dim",
    "bound",
    "check",
    "conditioning",
    "dci",
    "disentanglement",
    "evaluate",
    "evaluating",
    "factor_score",
    "inspect",
    "ledger",
    "mean",
    "mig",
    "modularity",
    "mutual_information",
    "noise",
    "reported",
    "sap",
    "saturation",
    "score",
    "slow_directions",
    "tensors",
]
