"""Are posterior draws calibrated? Simulation-based calibration, coverage, and local tests."""

from musigma.coverage.check import check
from musigma.coverage.drawing import model_ranks
from musigma.coverage.judging import Judgment, Test
from musigma.coverage.ranks import Pairs, Ranks, ranks
from musigma.coverage.result import Coverage

__all__ = ["Coverage", "Judgment", "Pairs", "Ranks", "Test", "check", "model_ranks", "ranks"]
