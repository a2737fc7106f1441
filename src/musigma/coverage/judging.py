"""From ranks to a verdict: tests, their size and direction, and what they mean together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from musigma.anomaly import holm
from musigma.coverage.local import Local
from musigma.coverage.ranks import Ranks
from musigma.coverage.uniformity import GRID, band, curve, detectable, p_value
from musigma.data.errors import named
from musigma.evaluation.intervals import Interval, exact_share, normal

__all__ = ["LEVEL", "LEVELS", "Judgment", "Kind", "Test", "Verdict", "judge"]

Kind = Literal["parameter", "region", "random", "near"]

Verdict = Literal[
    "calibrated", "overconfident", "underconfident", "biased", "miscalibrated", "cannot tell"
]

LEVEL = 0.05
"""A test with a smaller adjusted p-value has found a deviation."""

LEVELS = (0.5, 0.8, 0.95)
"""Levels of the regions whose coverage is stated."""

PERCENTS = f"{', '.join(f'{100 * level:g}' for level in LEVELS[:-1])} and {100 * LEVELS[-1]:g}"
"""The same as text."""

CLEAR, LIKELY = 3.0, 2.0
"""Standard errors from which a deviation is named as a shift, and as a wrong width."""

TITLES: dict[Kind, str] = {
    "region": "highest-density regions",
    "random": "TARP, references at random",
    "near": "TARP, references by similar observations",
}


@dataclass(frozen=True, eq=False)
class Test:
    """One test quantity: whether its ranks are uniform, and how they are not.

    Attributes:
        name: Name of the parameter, or of the test.
        kind: What is ranked: a `parameter`, the density (`region`), or the distance to a
            reference (`random`, `near`).
        p_value: P-value of uniform ranks.
        adjusted: The same, adjusted for the number of tests by Holm's method.
        curve: Share of the ranks up to each point of the grid (99,).
        deviation: Largest difference of the curve from the diagonal, with its sign.
        coverage: Share of the pairs in regions of each of `LEVELS`: highest-density regions,
            central intervals of a parameter, or regions around references.
        shift: How far the mean rank is from 1/2, in standard errors; positive if true values are
            too high among the draws.
        spread: How far ranks are from the middle, in standard errors; positive if the draws are
            too narrow. For `region`, how far regions must reach to hold the truth.
    """

    name: str
    kind: Kind
    p_value: float
    adjusted: float
    curve: np.ndarray
    deviation: float
    coverage: tuple[Interval, ...]
    shift: float
    spread: float

    @property
    def found(self) -> bool:
        """Whether there is a deviation."""
        return self.adjusted <= LEVEL


@dataclass(frozen=True)
class Judgment:
    """What all tests say together.

    Attributes:
        verdict: One of the words of `Verdict`.
        slight: Whether something was found, but no coverage is off by as much as the tolerance.
        reasons: Sentences that say what is wrong; empty if nothing was found.
        detectable: The smallest deviation of coverage that one test of so many pairs finds with a
            probability of 80 %.
        tolerance: The smallest deviation that matters.
    """

    verdict: Verdict
    slight: bool
    reasons: tuple[str, ...]
    detectable: float
    tolerance: float

    def pairs_for(self, deviation: float, pairs: int) -> int:
        """About how many pairs find a deviation as surely, to two digits."""
        needed = pairs * (self.detectable / deviation) ** 2
        unit = 10 ** max(0, int(np.log10(needed)) - 1)
        return int(-(-needed // unit) * unit)


def tests(ranks: Ranks) -> tuple[Test, ...]:
    """All tests of some ranks, with adjusted p-values: the parameters, then the joint ones."""
    quantities: list[tuple[str, Kind, np.ndarray]] = []
    for name, u in zip(ranks.names, ranks.parameters.T, strict=True):
        quantities.append((name, "parameter", u))
    for kind, name in TITLES.items():
        if (u := getattr(ranks, kind)) is not None:
            quantities.append((name, kind, u))
    p = [p_value(u) for _, _, u in quantities]
    return tuple(
        _test(name, kind, u, *ps)
        for (name, kind, u), *ps in zip(quantities, p, holm(p).tolist(), strict=True)
    )


def _test(name: str, kind: Kind, u: np.ndarray, p: float, adjusted: float) -> Test:
    n, found = len(u), curve(u)
    away = found - GRID
    center = np.abs(2 * u - 1)
    error = np.sqrt(1 / (12 * n))
    reach = u if kind == "region" else center
    within = center if kind == "parameter" else u
    return Test(
        name,
        kind,
        p,
        adjusted,
        found,
        float(away[np.abs(away).argmax()]),
        tuple(exact_share(int((within <= level).sum()), n) for level in LEVELS),
        float((u.mean() - 0.5) / error),
        float((reach.mean() - 0.5) / error),
    )


def judge(
    ranks: Ranks, found: Sequence[Test], tolerance: float, local: Local | None = None
) -> Judgment:
    """The verdict of tests of some ranks, and of local tests."""
    n = len(ranks)
    least = detectable(n, LEVEL / len(found))
    wrong = [test for test in found if test.found]
    there = () if local is None else _local_reasons(local)
    if there and not wrong:
        return Judgment("miscalibrated", False, there, least, tolerance)
    if not wrong:
        verdict: Verdict = "calibrated" if least <= tolerance else "cannot tell"
        return Judgment(verdict, False, (), least, tolerance)
    half = float((band(n)[1] - GRID).max())
    slight = all(abs(test.deviation) + half <= tolerance for test in wrong)
    verdict, reasons = _named(ranks, wrong)
    return Judgment(verdict, slight, (*reasons, *there), least, tolerance)


def _p(test: Test) -> str:
    return f"(p = {test.adjusted:.2g})"


def _local_reasons(local: Local) -> tuple[str, ...]:
    """What local tests found, in a sentence."""
    if not local.found:
        return ()
    return (
        f"a classifier tells draws from true parameters at {len(local.found)} of "
        f"{len(local.labels)} observations: {named(local.found)}",
    )


def _named(ranks: Ranks, wrong: Sequence[Test]) -> tuple[Verdict, list[str]]:
    """The word for deviations, and a sentence for each of them."""
    reasons: list[str] = []
    biased, widths = False, set()
    errors = dict(zip(ranks.names, ranks.error.T, strict=True))
    alone = [test for test in wrong if test.kind == "parameter"]
    joint = {test.kind: test for test in wrong if test.kind != "parameter"}
    for test in alone:
        if abs(test.shift) >= max(CLEAR, abs(test.spread)):
            biased = True
            error = errors[test.name]
            size = normal(float(np.abs(error.mean())), error.var() / len(error))
            side = "below" if test.shift > 0 else "above"
            found = (
                f"draws lie {size.value:.2f} ({size.low:.2f} to {size.high:.2f}) of their "
                f"standard deviation {side} the truth"
            )
        elif abs(test.spread) >= LIKELY:
            widths.add(test.spread > 0)
            shares = ", ".join(map(str, test.coverage))
            width = "narrow" if test.spread > 0 else "wide"
            found = f"too {width}; its central intervals of {PERCENTS} % hold {shares}"
        else:
            found = "its distribution has another shape than the posterior's"
        reasons.append(f"{test.name}: {found} {_p(test)}")
    if (region := joint.get("region")) is not None:
        found = "have another shape than the posterior's"
        if abs(region.spread) >= LIKELY:
            widths.add(region.spread > 0)
            found = f"are too {'small' if region.spread > 0 else 'large'}"
        reasons.append(f"regions of highest density {found} {_p(region)}")
    if set(joint) == {"near"} and not alone:
        near = joint["near"]
        closer = near.shift < 0
        found = ": true parameters lie closer to those of similar observations than draws do"
        reasons.append(
            "coverage is right on average over observations, but not given the observation"
            f"{found if closer else ''} {_p(near)}"
        )
    elif joint and not alone:
        reasons.append(
            "no parameter is found to deviate by itself: how they depend on each other may be "
            "wrong, or each by a little"
        )
    if biased:
        return "biased", reasons
    if widths == {True}:
        return "overconfident", reasons
    return ("underconfident" if widths == {False} else "miscalibrated"), reasons
