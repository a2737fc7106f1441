"""Objectives: functions of one pass through a model, in nats per example, to minimize.

An objective maps an `Evidence`, or a `Recorder` that holds one, to nats of shape (B,); training
minimizes their mean. Terms are summed over all dimensions of an example, so the weight of the KL
does not depend on the size of images, latents or batches. `Evidence.auxiliary` (in nats, already
weighted) is part of each of them.
"""

from musigma.objectives.base import OBJECTIVES, objective, register, surrogate, terms_of
from musigma.objectives.bounds import ciwae, dreg, elbo, iwae, miwae, piwae, renyi, stl
from musigma.objectives.choosing import Chosen, Sum
from musigma.objectives.divergences import info_vae, mmd, sliced_wasserstein, swae, wae_mmd
from musigma.objectives.pictures import FEATURES, Adversarial, Perceptual, equivariance, features
from musigma.objectives.rate import beta_elbo, capacity, free_bits
from musigma.objectives.total_correlation import FactorVAE, aggregate, beta_tc, dip_i, dip_ii
from musigma.objectives.wake_sleep import reweighted_wake_sleep, wake_sleep

__all__ = [
    "FEATURES",
    "OBJECTIVES",
    "Adversarial",
    "Chosen",
    "FactorVAE",
    "Perceptual",
    "Sum",
    "aggregate",
    "beta_elbo",
    "beta_tc",
    "capacity",
    "ciwae",
    "dip_i",
    "dip_ii",
    "dreg",
    "elbo",
    "equivariance",
    "features",
    "free_bits",
    "info_vae",
    "iwae",
    "miwae",
    "mmd",
    "objective",
    "piwae",
    "register",
    "renyi",
    "reweighted_wake_sleep",
    "sliced_wasserstein",
    "stl",
    "surrogate",
    "swae",
    "terms_of",
    "wae_mmd",
    "wake_sleep",
]
