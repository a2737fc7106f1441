"""Figures of a model on data: scores, the ledger, and diagnostics."""

from musigma.evaluation.annealing import Annealing, Chains
from musigma.evaluation.both_sides import Sandwich, gap, sandwich
from musigma.evaluation.bounds import weighed
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
    "Annealing",
    "Chains",
    "Sandwich",
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
    "gap",
    "inspect",
    "ledger",
    "mean",
    "mig",
    "modularity",
    "mutual_information",
    "noise",
    "reported",
    "sandwich",
    "sap",
    "saturation",
    "score",
    "slow_directions",
    "tensors",
    "weighed",
]
