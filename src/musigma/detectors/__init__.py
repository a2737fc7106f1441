"""Anomaly scores of examples, and maps of images: detectors, each a function of a model and data.

A detector is called as ``detector(reference, data, **options)``, where a `Reference` holds the
model and what the score compares with: training data, a background model, further models. It
returns a score for each example, the strangest highest. `DETECTORS` has all of them by name, and
`musigma.anomaly` turns scores of any of them into p-values, flags and figures.
"""

from musigma.detectors.complexity import CODECS, complexity
from musigma.detectors.density import (
    batch_typicality,
    ensemble,
    likelihood_ratio,
    nats,
    typicality,
    waic,
)
from musigma.detectors.maps import Maps, colored, maps
from musigma.detectors.reference import DETECTORS, Detector, Reference
from musigma.detectors.regret import likelihood_regret
from musigma.detectors.terms import dose, mahalanobis, terms

__all__ = [
    "CODECS",
    "DETECTORS",
    "Detector",
    "Maps",
    "Reference",
    "batch_typicality",
    "colored",
    "complexity",
    "dose",
    "ensemble",
    "likelihood_ratio",
    "likelihood_regret",
    "mahalanobis",
    "maps",
    "nats",
    "terms",
    "typicality",
    "waic",
]
