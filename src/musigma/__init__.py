"""musigma: Gaussian latent-variable models whose numbers are true.

Read `gaussian`, `trace`, `model`, one file of `layers` and one of `zoo`, in that order.

Names are imported when they are first used, so `import musigma` alone does not import PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
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

_EXPORTS = {
    "checkpoint": "CheckpointError load save",
    "data": "DataError Dataset Preprocess",
    "distributions": """
        Bernoulli BetaBinomial Categorical ContinuousBernoulli DiscretizedLogisticMixture
        LearnedNormal LogitNormal OptimalGaussianHead StandardNormal StandardUniform likelihood
    """,
    "evaluation": "evaluate inspect ledger saturation score",
    "gaussian": "DiagonalGaussian Format GaussianHead",
    "model": "VAE Bijection Chain Inverse Ladder LadderBlock Layer Model Prior",
    "trace": "Evidence Trace",
    "training": "TrainConfig TrainingError fit",
    "zoo": "ARCHITECTURES architecture build",
}  # the imports above, for __getattr__; tests/test_architecture.py compares them
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

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


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of this package, on first use (PEP 562)."""
    if module := _MODULE_OF.get(name):
        value = getattr(import_module(f"musigma.{module}"), name)
    elif not name.startswith("_") and find_spec(f"musigma.{name}"):
        value = import_module(f"musigma.{name}")
    else:
        raise AttributeError(f"module 'musigma' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
