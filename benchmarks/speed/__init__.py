"""The project's own benchmark: training, sampling and scoring, against the peers that are here.

Times are ratios between contenders that took turns in one process (or in processes that took
turns), with their spread; what can be counted is counted. Nothing here is a gate: see
`benchmarks.speed.counts` for what tests hold on to.

    >>> from benchmarks.speed import Plan, run, select
    >>> plan = Plan(seconds=0.02, rounds=2, whats=("step",), peers=("plain",), memory=False)
    >>> *_, result = run(select(["mlp-vae"]), plan)
    >>> sorted(result["works"]["mlp-vae"]["whats"]["step"]["faster"])
    ['musigma']
"""

from benchmarks.speed.harness import Contender, Subject, Unavailable, Work
from benchmarks.speed.run import Plan, run
from benchmarks.speed.tables import markdown
from benchmarks.speed.works import QUICK, WORKS, select

__all__ = [
    "QUICK",
    "WORKS",
    "Contender",
    "Plan",
    "Subject",
    "Unavailable",
    "Work",
    "markdown",
    "run",
    "select",
]
