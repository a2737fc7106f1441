"""Distributions and the heads that emit them, by the values that they describe.

A head is a module whose ``forward(given, context)`` returns a distribution with batch shape (B,),
or () if nothing is given. Distributions of levels are distributions of integers 0 .. levels - 1,
so they need no dequantization.
"""

from musigma.distributions.autoregressive import AutoregressiveOneHot, AutoregressivePrior
from musigma.distributions.cells import Binning, multiples
from musigma.distributions.codes import AutoregressiveCodes
from musigma.distributions.counts import (
    CountHead,
    Counts,
    FactorizedNegativeBinomial,
    FactorizedPoisson,
    ZeroInflated,
    are_counted,
)
from musigma.distributions.flowed import Flowed, FlowHead
from musigma.distributions.full import FullGaussian, LowRankGaussian
from musigma.distributions.gamma import (
    FactorizedBeta,
    FactorizedGamma,
    StandardBeta,
    StandardGamma,
)
from musigma.distributions.gaussian import LearnedNormal, OptimalGaussianHead, StandardNormal
from musigma.distributions.hyperbolic import HyperbolicNormal, StandardHyperbolic
from musigma.distributions.integers import IntegerLogisticHead, IntegerLogisticMixture
from musigma.distributions.latents import POSTERIORS, PRIORS, Latents, PosteriorHead
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
from musigma.distributions.mixture import GaussianMixture, Mixture
from musigma.distributions.model_distribution import ModelDistribution
from musigma.distributions.onehot import OneHotHead, OneHotLatents, UniformOneHot
from musigma.distributions.permutations import PlackettLuce
from musigma.distributions.point import DeterministicHead, PointMass
from musigma.distributions.product import Product, ProductHead
from musigma.distributions.sphere import SphereUniform, UniformOnSphere, VonMisesFisher
from musigma.distributions.unit import (
    FactorizedContinuousBernoulli,
    LogitNormal,
    LogitNormalHead,
    Squashed,
    StandardUniform,
    UnitUniform,
)
from musigma.distributions.vamp import VampPrior

__all__ = [
    "LIKELIHOODS",
    "POSTERIORS",
    "PRIORS",
    "AutoregressiveCodes",
    "AutoregressiveOneHot",
    "AutoregressivePrior",
    "Binning",
    "CountHead",
    "Counts",
    "DeterministicHead",
    "DiscretizedLogisticMixture",
    "FactorizedBernoulli",
    "FactorizedBeta",
    "FactorizedBetaBinomial",
    "FactorizedCategorical",
    "FactorizedContinuousBernoulli",
    "FactorizedGamma",
    "FactorizedNegativeBinomial",
    "FactorizedPoisson",
    "FlowHead",
    "Flowed",
    "FullGaussian",
    "GaussianMixture",
    "HyperbolicNormal",
    "IntegerLogisticHead",
    "IntegerLogisticMixture",
    "Latents",
    "LearnedNormal",
    "LikelihoodHead",
    "LogitNormal",
    "LogitNormalHead",
    "LowRankGaussian",
    "Mixture",
    "ModelDistribution",
    "OneHotHead",
    "OneHotLatents",
    "OptimalGaussianHead",
    "PlackettLuce",
    "PointMass",
    "PosteriorHead",
    "Product",
    "ProductHead",
    "SphereUniform",
    "Squashed",
    "StandardBeta",
    "StandardGamma",
    "StandardHyperbolic",
    "StandardNormal",
    "StandardUniform",
    "UniformOnSphere",
    "UniformOneHot",
    "UnitUniform",
    "VampPrior",
    "VonMisesFisher",
    "ZeroInflated",
    "are_counted",
    "data_of",
    "likelihood",
    "multiples",
    "register_likelihood",
]
