"""Training: one loop for any model, any objective, any number of processes."""

from musigma.training.config import TrainConfig
from musigma.training.distributed import join, leave
from musigma.training.loop import Run, TrainingError, check_run, fit
from musigma.training.state import Progress, saved_state

__all__ = [
    "Progress",
    "Run",
    "TrainConfig",
    "TrainingError",
    "check_run",
    "fit",
    "join",
    "leave",
    "saved_state",
]
