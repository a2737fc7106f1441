"""Distributions besides the Gaussian, and the heads that emit them."""

from musigma.distributions.heads import (
    CONTINUOUS,
    LearnedNormal,
    LikelihoodHead,
    LogitNormalHead,
    OptimalGaussianHead,
    StandardNormal,
    StandardUniform,
    likelihood,
)
from musigma.distributions.levels import (
    Bernoulli,
    BetaBinomial,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogisticMixture,
    LogitNormal,
    ModelDistribution,
    Uniform,
)
from musigma.distributions.onehot import OneHotHead, OneHotLatents, UniformOneHot

__all__ = [
    "CONTINUOUS",
    "Bernoulli",
    "BetaBinomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogisticMixture",
    "LearnedNormal",
    "LikelihoodHead",
    "LogitNormal",
    "LogitNormalHead",
    "ModelDistribution",
    "OneHotHead",
    "OneHotLatents",
    "OptimalGaussianHead",
    "StandardNormal",
    "StandardUniform",
    "Uniform",
    "UniformOneHot",
    "likelihood",
]
