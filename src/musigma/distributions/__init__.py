"""Distributions and the heads that emit them, by the values that they describe.

A head is a module whose ``forward(given, context)`` returns a distribution with batch shape (B,),
or () if nothing is given. Distributions of levels are distributions of integers 0 .. levels - 1,
so they need no dequantization.
"""

from musigma.distributions.cells import Binning, multiples
from musigma.distributions.counts import (
    CountHead,
    Counts,
    FactorizedNegativeBinomial,
    FactorizedPoisson,
    ZeroInflated,
    are_counted,
)
from musigma.distributions.gaussian import LearnedNormal, OptimalGaussianHead, StandardNormal
from musigma.distributions.integers import IntegerLogisticMixture, IntegerRead
from musigma.distributions.levels import (
    DiscretizedLogisticMixture,
    FactorizedBernoulli,
    FactorizedBetaBinomial,
    FactorizedCategorical,
)
from musigma.distributions.likelihood import (
    LIKELIHOODS,
    LikelihoodHead,
    data_of,
    likelihood,
    register_likelihood,
)
from musigma.distributions.model_distribution import ModelDistribution
from musigma.distributions.onehot import OneHotHead, OneHotLatents, UniformOneHot
from musigma.distributions.permutations import PlackettLuce
from musigma.distributions.point import PointMass
from musigma.distributions.unit import (
    FactorizedContinuousBernoulli,
    LogitNormal,
    LogitNormalHead,
    StandardUniform,
    UnitUniform,
)

__all__ = [
    "LIKELIHOODS",
    "Binning",
    "CountHead",
    "Counts",
    "DiscretizedLogisticMixture",
    "FactorizedBernoulli",
    "FactorizedBetaBinomial",
    "FactorizedCategorical",
    "FactorizedContinuousBernoulli",
    "FactorizedNegativeBinomial",
    "FactorizedPoisson",
    "IntegerLogisticMixture",
    "IntegerRead",
    "LearnedNormal",
    "LikelihoodHead",
    "LogitNormal",
    "LogitNormalHead",
    "ModelDistribution",
    "OneHotHead",
    "OneHotLatents",
    "OptimalGaussianHead",
    "PlackettLuce",
    "PointMass",
    "StandardNormal",
    "StandardUniform",
    "UniformOneHot",
    "UnitUniform",
    "ZeroInflated",
    "are_counted",
    "data_of",
    "likelihood",
    "multiples",
    "register_likelihood",
]
