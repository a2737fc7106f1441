"""Speed of training, sampling and scoring, against peers or against another commit.

    python -m benchmarks.speed --help

Results are ratios between contenders that take turns, with their spread, and exact counts. Only
counts are gates in the tests; times are not.
"""
