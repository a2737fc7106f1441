"""Are posterior draws calibrated? Simulation-based calibration, coverage, and local tests."""

from musigma.coverage.check import check
from musigma.coverage.drawing import model_ranks
from musigma.coverage.judging import Judgment, Test
from musigma.coverage.local import Local, local_test
from musigma.coverage.ranks import Pairs, Ranks, ranks
from musigma.coverage.result import Coverage

__all__ = [
    "Coverage",
    "Judgment",
    "Local",
    "Pairs",
    "Ranks",
    "Test",
    "check",
    "local_test",
    "model_ranks",
    "ranks",
]
