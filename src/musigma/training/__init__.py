"""Training: one loop for any model, any objective, any number of processes."""

from musigma.training.checks import check_run
from musigma.training.config import TrainConfig, conditional_config, given_options
from musigma.training.hardware import join, leave
from musigma.training.loop import Run, fit
from musigma.training.prior import fit_prior
from musigma.training.recovery import TrainingError
from musigma.training.state import Progress, saved_state

__all__ = [
    "Progress",
    "Run",
    "TrainConfig",
    "TrainingError",
    "check_run",
    "conditional_config",
    "fit",
    "fit_prior",
    "given_options",
    "join",
    "leave",
    "saved_state",
]
