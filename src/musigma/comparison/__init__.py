"""Synthetic tables beside real ones: two-sample tests, usefulness, marginals, privacy."""

from musigma.comparison.compare import compare, compare_rows
from musigma.comparison.marginals import Marginal, Pairs, associations, marginal, pairs
from musigma.comparison.networks import Classifiers, held_out, vector_c2st
from musigma.comparison.privacy import Privacy, privacy
from musigma.comparison.result import Comparison
from musigma.comparison.two_samples import TwoSamples, c2st
from musigma.comparison.usefulness import Usefulness, usefulness

__all__ = [
    "Classifiers",
    "Comparison",
    "Marginal",
    "Pairs",
    "Privacy",
    "TwoSamples",
    "Usefulness",
    "associations",
    "c2st",
    "compare",
    "compare_rows",
    "held_out",
    "marginal",
    "pairs",
    "privacy",
    "usefulness",
    "vector_c2st",
]
