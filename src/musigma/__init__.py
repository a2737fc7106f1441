"""musigma: VAEs and normalizing flows with exact figures.

To learn the library, read `gaussian`, `trace`, `model`, one file of `layers` and one of `zoo`, in
that order.

Names are imported on first use, so `import musigma` itself does not import PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from musigma import data, distributions, layers, nets, objectives
    from musigma.checkpoint import CheckpointError, load, save
    from musigma.conditional import Conditional
    from musigma.data import DataError, Dataset, Preprocess
    from musigma.distributions import (
        OptimalGaussianHead,
        StandardNormal,
        StandardUniform,
        likelihood,
    )
    from musigma.evaluation import evaluate, inspect, ledger, saturation, score
    from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
    from musigma.ladder import Ladder, LadderBlock
    from musigma.model import VAE, Bijection, Chain, Inverse, Layer, Model, Prior
    from musigma.scorer import Scorer
    from musigma.spec import Spec, Variable
    from musigma.trace import Evidence, Recorder, Trace
    from musigma.training import TrainConfig, TrainingError, fit
    from musigma.zoo import architecture, build

_EXPORTS = {
    "checkpoint": "CheckpointError load save",
    "conditional": "Conditional",
    "data": "DataError Dataset Preprocess",
    "distributions": "OptimalGaussianHead StandardNormal StandardUniform likelihood",
    "evaluation": "evaluate inspect ledger saturation score",
    "gaussian": "DiagonalGaussian Format GaussianHead",
    "ladder": "Ladder LadderBlock",
    "model": "VAE Bijection Chain Inverse Layer Model Prior",
    "scorer": "Scorer",
    "spec": "Spec Variable",
    "trace": "Evidence Recorder Trace",
    "training": "TrainConfig TrainingError fit",
    "zoo": "architecture build",
}  # must list the imports above; tests/test_architecture.py compares them
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = [
    "VAE",
    "Bijection",
    "Chain",
    "CheckpointError",
    "Conditional",
    "DataError",
    "Dataset",
    "DiagonalGaussian",
    "Evidence",
    "Format",
    "GaussianHead",
    "Inverse",
    "Ladder",
    "LadderBlock",
    "Layer",
    "Model",
    "OptimalGaussianHead",
    "Preprocess",
    "Prior",
    "Recorder",
    "Scorer",
    "Spec",
    "StandardNormal",
    "StandardUniform",
    "Trace",
    "TrainConfig",
    "TrainingError",
    "Variable",
    "architecture",
    "build",
    "data",
    "distributions",
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
