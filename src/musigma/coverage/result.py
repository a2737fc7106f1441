"""The result of a check of calibration: as text, as plain data, and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from musigma.coverage.judging import LEVELS, PERCENTS, Judgment, Test, judge, tests
from musigma.coverage.local import LOCAL_LEVEL, Local
from musigma.coverage.ranks import Ranks
from musigma.coverage.uniformity import GRID, band
from musigma.evaluation.intervals import Interval, normal
from musigma.report.sections import Document, Section

__all__ = ["LEAST", "Coverage"]

LEAST = 20
"""Pairs, below which nothing is tested."""

DEVIATION = 0.05
"""The deviation of coverage for which the number of pairs is stated."""

PICTURED, WORST = 24, 10
"""Parameters whose ranks are drawn, those with the smallest p-values; pairs that are listed."""


@dataclass(frozen=True, eq=False)
class Coverage:
    """Whether posterior draws are calibrated, by N pairs of true parameters and observations.

    Args:
        ranks: The ranks of the pairs.
        source: What the pairs were read from.
        tolerance: The smallest deviation of coverage that matters. If the pairs are too few to
            find it, the verdict is "cannot tell".
        seed: Random seed of draws, ties and references.
        rows: Number of each pair in its source; by default 0, 1, ...
        notes: Further sentences.
        local: Local tests, if there are any.

    Raises:
        ValueError: If there are fewer than 20 pairs, or tolerance is not between 0 and 1.

    Example:
        >>> from musigma.coverage import Pairs, ranks
        >>> random = np.random.default_rng(0)
        >>> x = random.normal(size=(500, 1))
        >>> theta = x + random.normal(size=(500, 1))
        >>> draws = x[:, None] + 0.7 * random.normal(size=(500, 201, 1))
        >>> found = Coverage(ranks(Pairs(theta, x, draws[:, 0]), [(draws[:, 1:], None)]))
        >>> found.judgment.verdict
        'overconfident'
    """

    ranks: Ranks
    source: str = ""
    tolerance: float = 0.1
    seed: int = 0
    rows: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    local: Local | None = None

    def __post_init__(self):
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected between 0 and 1; got {self.tolerance}")
        if len(self.ranks) < LEAST:
            raise ValueError(
                f"data: {len(self.ranks)} pairs tell nothing; expected {LEAST} or more, and some "
                "hundred to find a deviation of coverage of 0.1"
            )

    @cached_property
    def tests(self) -> tuple[Test, ...]:
        """Every test: the parameters, then the joint ones."""
        return tests(self.ranks)

    @cached_property
    def judgment(self) -> Judgment:
        """The verdict."""
        return judge(self.ranks, self.tests, self.tolerance, self.local)

    @cached_property
    def contraction(self) -> dict[str, float]:
        """Median standard deviation of draws, divided by that of the parameter over all pairs."""
        std = np.ma.masked_invalid(self.ranks.theta).std(0).filled(0)
        ratio = np.median(self.ranks.std, 0) / np.where(std > 0, std, np.nan)
        return dict(zip(self.ranks.names, ratio.tolist(), strict=True))

    @cached_property
    def log_q(self) -> Interval | None:
        """Mean of log q(theta | x) in nats; None without densities."""
        values = self.ranks.log_q
        return None if values is None else normal(values.mean(), values.var() / len(values))

    def worst(self, most: int = WORST) -> list[dict[str, Any]]:
        """The pairs whose true parameters are the least plausible, the first of them the worst.

        Each has `row`, its number; `region`, the mass of the smallest highest-density region that
        holds it, or None; and `parameter`, the one that lies farthest out, by `error` standard
        deviations of its draws.
        """
        r, error = self.ranks, np.abs(self.ranks.error)
        which, region = error.argmax(1), r.region
        far = error.max(1)
        order = np.lexsort((-far, *([] if region is None else [-np.round(region, 3)])))[:most]
        rows = np.arange(len(r)) if self.rows is None else self.rows
        return [
            {
                "row": int(rows[i]),
                "region": None if region is None else float(region[i]),
                "parameter": r.names[which[i]],
                "error": float(r.error[i, which[i]]),
            }
            for i in order
        ]

    def columns(self) -> dict[str, np.ndarray]:
        """The ranks of every pair, as columns of a table with its row."""
        r = self.ranks
        found = {"row": np.arange(len(r)) if self.rows is None else self.rows}
        found |= {f"rank_{name}": u for name, u in zip(r.names, r.parameters.T, strict=True)}
        found |= {} if r.region is None else {"region": r.region}
        found |= {"tarp_random": r.random, "tarp_near": r.near}
        return found | ({} if r.log_q is None else {"log_q": r.log_q})

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, for JSON; an interval is an object of value, low and high."""
        judgment, (low, high) = self.judgment, band(len(self.ranks))
        return {
            "verdict": judgment.verdict,
            "slight": judgment.slight,
            "reasons": list(judgment.reasons),
            "pairs": len(self.ranks),
            "draws": self.ranks.draws,
            "source": self.source,
            "seed": self.seed,
            "tolerance": self.tolerance,
            "detectable": judgment.detectable,
            "pairs_for_0.05": judgment.pairs_for(DEVIATION, len(self.ranks)),
            "log_q": None if self.log_q is None else self.log_q._asdict(),
            "contraction": self.contraction,
            "tests": [_plain(test) for test in self.tests],
            "levels": GRID.tolist(),
            "band": {"low": low.tolist(), "high": high.tolist()},
            "worst": self.worst(),
            "local": None if self.local is None else _arrays(self.local),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return str(self.document)

    def to_html(self) -> str:
        """One page with pictures; without matplotlib, it has none."""
        return self.document.to_html()

    @property
    def document(self) -> Document:
        """The result in sections, which is also written as Markdown and LaTeX."""
        title = f"Calibration of draws{f' on {self.source}' if self.source else ''}"
        footer = (
            "Intervals hold the true value in 95 % of samples. Bands hold the whole curve of "
            "calibrated draws in 95 % of samples. p-values are adjusted for the number of tests: "
            "calibrated draws are called something else in 5 % of samples, and local tests find a "
            "difference in 1 % of them."
        )
        return Document(title, list(self._sections()), footer)

    # -- sections

    def _sections(self) -> Iterator[Section]:
        yield self._verdict()
        yield self._regions()
        yield self._parameters()
        if self.local is not None:
            yield self._local(self.local)
        yield self._pairs()

    def _verdict(self) -> Section:
        judgment, n = self.judgment, len(self.ranks)
        head = f"{'slightly ' if judgment.slight else ''}{judgment.verdict}".capitalize()
        least = min(test.adjusted for test in self.tests)
        lines = list(judgment.reasons) or [
            f"No deviation found in {n:,} pairs (smallest adjusted p = {least:.2g})."
        ]
        region = next((test for test in self.tests if test.kind == "region"), None)
        if region is not None:
            lines.append(
                f"Highest-density regions of {PERCENTS} % hold "
                f"{', '.join(map(str, region.coverage))} of the true parameters."
            )
        needed = judgment.pairs_for(DEVIATION, n)
        lines.append(
            f"{n:,} pairs find a deviation of coverage of {judgment.detectable:.3f} with a "
            f"probability of 80 %; one of {DEVIATION:g} needs about {needed:,} pairs."
        )
        if judgment.verdict == "cannot tell":
            lines.append(
                f"That is too few for a deviation of {self.tolerance:g}: about "
                f"{judgment.pairs_for(self.tolerance, n):,} pairs find it."
            )
        lines.append(self._width())
        if self.log_q is not None:
            lines.append(f"Mean log q(theta | x): {self.log_q} nats.")
        lines.append(
            f"{n:,} pairs{f' of {self.source}' if self.source else ''}, {self.ranks.draws:,} "
            f"draws for each; seed {self.seed}."
        )
        return Section(head, [*lines, *self.notes])

    def _width(self) -> str:
        """How much narrower the draws are than all true parameters together."""
        known = {name: v for name, v in self.contraction.items() if np.isfinite(v)}
        if not known:
            return "The true parameters are constant, so nothing can be learned about them."
        ends = sorted(known, key=lambda name: known[name])
        text = ", ".join(f"{known[name]:.2g} ({name})" for name in dict.fromkeys(ends[::-1]))
        if len(ends) > 4:
            text = f"{known[ends[0]]:.2g} ({ends[0]}) to {known[ends[-1]]:.2g} ({ends[-1]})"
        useless = (
            " They are no narrower, so they say nothing about the parameters, calibrated or not."
            if known[ends[0]] > 0.95
            else ""
        )
        return (
            "Width of the draws, as a share of the standard deviation of the true parameters: "
            f"{text}.{useless}"
        )

    def _regions(self) -> Section:
        from musigma.report import coverage

        joint = [test for test in self.tests if test.kind != "parameter"]
        head = ["regions", *(f"{level:.0%}" for level in LEVELS), "largest deviation", "p"]
        rows = [
            [t.name, *map(str, t.coverage), f"{t.deviation:+.3f}", f"{t.adjusted:.2g}"]
            for t in joint
        ]
        text = [
            "The share of the true parameters that lie in regions of each level. TARP: regions "
            "are balls around a reference, in standardized parameters; references are draws for "
            "other observations, or the true parameters of a similar observation."
        ]
        curves = {test.name: test.curve for test in joint}
        ends = band(len(self.ranks))
        alt = "Share of the true parameters in regions of each level, and its band"
        draw = {alt: lambda path, dark: coverage.levels(GRID, curves, ends, path, dark=dark)}
        return Section("Regions of all parameters together", text, [(head, rows)], draw)

    def _parameters(self) -> Section:
        from musigma.report import coverage

        alone = [test for test in self.tests if test.kind == "parameter"]
        error = self.ranks.error
        means = dict(zip(self.ranks.names, error.mean(0), strict=True))
        head = ["parameter", *(f"{level:.0%}" for level in LEVELS), "bias", "width", "p"]
        rows = [
            [
                t.name,
                *map(str, t.coverage),
                f"{-means[t.name]:+.2f}",
                f"{self.contraction[t.name]:.2g}",
                f"{t.adjusted:.2g}",
            ]
            for t in sorted(alone, key=lambda test: test.p_value)
        ]
        text = [
            "The share of the true values that lie in the central interval of each level. Bias: "
            "mean of the draws minus the truth, in standard deviations of the draws. Width: "
            "median standard deviation of the draws, divided by that of the true values."
        ]
        shown = sorted(alone, key=lambda test: test.p_value)[:PICTURED]
        curves = {t.name: t.curve for t in alone if t in shown}
        off = frozenset(t.name for t in alone if t.found)
        ends = band(len(self.ranks))
        alt = (
            "Ranks of the true values among their draws: distribution function minus that of "
            "uniform ranks. An arch upwards: draws are too high; downwards: too low; up and then "
            "down: too narrow; down and then up: too wide"
        )
        draw = {
            alt: lambda path, dark: coverage.differences(
                GRID, curves, ends, path, off=off, dark=dark
            )
        }
        return Section("Each parameter", text, [(head, rows)], draw)

    def _local(self, local: Local) -> Section:
        text = [
            "Can a classifier tell draws from true parameters, at one observation? It was trained "
            f"on {local.pairs:,} pairs, and is compared with {local.permutations} that were "
            "trained on pairs whose truth and draw are exchanged at random. Statistic: mean "
            f"square of its probability minus 1/2. Found: p of at most {LOCAL_LEVEL:g}, adjusted "
            "for the number of observations."
        ]
        for label, outside in zip(local.labels, local.outside.tolist(), strict=True):
            if outside:
                text.append(
                    f"Observation {label} lies outside the range of the pairs in {outside:,} of "
                    "its values, where the classifier has seen nothing."
                )
        columns = (local.labels, local.statistic, local.chance, local.p_values, local.adjusted)
        rows = [
            [label, f"{t:.2g}", f"{chance:.2g}", f"{p:.2g}", f"{adjusted:.2g}"]
            for label, t, chance, p, adjusted in zip(*columns, strict=True)
        ]
        head = ["observation", "statistic", "by chance", "p alone", "p"]
        return Section("Single observations", text, [(head, rows)])

    def _pairs(self) -> Section:
        rows = [
            [
                f"{pair['row']:,}",
                "" if pair["region"] is None else f"{pair['region']:.1%}",
                pair["parameter"],
                f"{pair['error']:+.2f}",
            ]
            for pair in self.worst()
        ]
        head = ["row (from 0)", "mass of its region", "parameter farthest out"]
        head += ["truth minus mean, in standard deviations"]
        text = [
            "The pairs whose truth is the least plausible to the draws. Mass: of the smallest "
            "highest-density region that holds it."
        ]
        return Section("Pairs", text, [(head, rows)])


def _arrays(value: Any) -> dict[str, Any]:
    """Fields of a result, with arrays as lists."""
    fields = vars(value).items()
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields}


def _plain(test: Test) -> dict[str, Any]:
    """A test as plain data."""
    levels = {f"{level:g}": c._asdict() for level, c in zip(LEVELS, test.coverage, strict=True)}
    return _arrays(test) | {"coverage": levels, "found": test.found}
