"""Figures of a model on data: scores, the ledger, diagnostics, and the quality of samples."""

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
from musigma.evaluation.figures import bound, evaluate, inspect, ledger, score
from musigma.evaluation.inputs import (
    batch,
    batches,
    check,
    evaluating,
    noise,
    tensors,
)
from musigma.evaluation.memorization import Memorization, memorization
from musigma.evaluation.neighbors import nearest, prdc
from musigma.evaluation.paired import compare
from musigma.evaluation.rate_distortion import rate_distortion
from musigma.evaluation.records import Record, record
from musigma.evaluation.samples import (
    SampleQuality,
    frechet_distance,
    frechet_limit,
    kernel_distance,
    sample_quality,
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
    "Memorization",
    "Record",
    "SampleQuality",
    "Sandwich",
    "batch",
    "batches",
    "bits_per_dim",
    "bound",
    "check",
    "compare",
    "conditioning",
    "dci",
    "disentanglement",
    "evaluate",
    "evaluating",
    "factor_score",
    "frechet_distance",
    "frechet_limit",
    "gap",
    "inspect",
    "kernel_distance",
    "ledger",
    "memorization",
    "mig",
    "modularity",
    "mutual_information",
    "nearest",
    "noise",
    "prdc",
    "rate_distortion",
    "record",
    "reported",
    "sample_quality",
    "sandwich",
    "sap",
    "saturation",
    "score",
    "slow_directions",
    "tensors",
    "weighed",
]
