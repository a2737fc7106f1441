"""Distributions besides the Gaussian, one file for each kind, and the heads that emit them.

A head is a module whose ``forward(given, context)`` returns a distribution with batch shape (B,),
or () if nothing is given. Distributions of levels are distributions of integers 0 .. levels - 1,
so they need no dequantization.
"""

from musigma.distributions.bernoulli import FactorizedBernoulli
from musigma.distributions.beta_binomial import FactorizedBetaBinomial
from musigma.distributions.categorical import FactorizedCategorical
from musigma.distributions.continuous_bernoulli import FactorizedContinuousBernoulli
from musigma.distributions.gaussian import LearnedNormal, OptimalGaussianHead, StandardNormal
from musigma.distributions.likelihood import (
    LIKELIHOODS,
    LikelihoodHead,
    data_of,
    likelihood,
    register_likelihood,
)
from musigma.distributions.logistic_mixture import DiscretizedLogisticMixture
from musigma.distributions.logit_normal import LogitNormal, LogitNormalHead
from musigma.distributions.model_distribution import ModelDistribution
from musigma.distributions.onehot import OneHotHead, OneHotLatents, UniformOneHot
from musigma.distributions.uniform import StandardUniform, UnitUniform

__all__ = [
    "LIKELIHOODS",
    "DiscretizedLogisticMixture",
    "FactorizedBernoulli",
    "FactorizedBetaBinomial",
    "FactorizedCategorical",
    "FactorizedContinuousBernoulli",
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
    "UniformOneHot",
    "UnitUniform",
    "data_of",
    "likelihood",
    "register_likelihood",
]
