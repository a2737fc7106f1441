"""musigma: Gaussian latent-variable models whose numbers are true.

Read `gaussian`, `trace`, `model`, one file of `layers` and one of `zoo`, in that order.
"""

__version__ = "0.1.0"

from musigma import data, layers, nets, objectives
from musigma.checkpoint import CheckpointError, load, save
from musigma.data import DataError, Dataset, Preprocess
from musigma.distributions import (
    Bernoulli,
    BetaBinomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    LearnedNormal,
    LogitNormal,
    OptimalGaussianHead,
    StandardNormal,
    StandardUniform,
    likelihood,
)
from musigma.evaluation import evaluate, inspect, ledger, saturation, score
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.model import (
    VAE,
    Bijection,
    Chain,
    Inverse,
    Ladder,
    LadderBlock,
    Layer,
    Model,
    Prior,
)
from musigma.trace import Evidence, Trace
from musigma.training import TrainConfig, TrainingError, fit
from musigma.zoo import ARCHITECTURES, architecture, build

__all__ = [
    "ARCHITECTURES",
    "VAE",
    "Bernoulli",
    "BetaBinomial",
    "Bijection",
    "Categorical",
    "Chain",
    "CheckpointError",
    "ContinuousBernoulli",
    "DataError",
    "Dataset",
    "DiagonalGaussian",
    "DiscretizedLogisticMixture",
    "Evidence",
    "Format",
    "GaussianHead",
    "Inverse",
    "Ladder",
    "LadderBlock",
    "Layer",
    "LearnedNormal",
    "LogitNormal",
    "Model",
    "OptimalGaussianHead",
    "Preprocess",
    "Prior",
    "StandardNormal",
    "StandardUniform",
    "Trace",
    "TrainConfig",
    "TrainingError",
    "architecture",
    "build",
    "data",
    "evaluate",
    "fit",
    "inspect",
    "layers",
    "ledger",
    "likelihood",
    "load",
    "nets",
    "objectives",
    "saturation",
    "save",
    "score",
]
