"""Figures compared in pairs: records of the same examples, with a test of every difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from musigma.evaluation.records import Record
from musigma.files import number
from musigma.report.page import decimals, figure_text
from musigma.report.sections import Document, Section

__all__ = ["ALLOWED", "Compared", "Paired", "compare", "holm", "paired"]


class Paired(NamedTuple):
    """A mean difference: its standard error, the ends of its interval, and a p-value."""

    mean: float
    standard_error: float
    low: float
    high: float
    p: float


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    r"""The mean of second - first over the same rows, and Student's t test that it is zero.

    .. math:: d_i = b_i - a_i, \quad t = \bar d / s, \quad s^2 = \frac{1}{n (n - 1)}
        \sum_i (d_i - \bar d)^2

    The test is two-sided, with n - 1 degrees of freedom; it rejects at 5 % just where the interval
    leaves out 0. It takes rows as independent and their mean as normal, which holds for n in the
    hundreds. Everything but the mean is NaN for a single row, or if a difference is not finite.

    Args:
        first: Values (n,), n of 1 or more.
        second: Values of the same rows (n,).

    Source: Student, "The probable error of a mean", 1908.

    Example:
        >>> found = paired(np.zeros(4), np.array([0.0, 1.0, 2.0, 5.0]))
        >>> found.mean, round(found.low, 3), round(found.high, 3), round(found.p, 3)
        (2.0, -1.437, 5.437, 0.161)
    """
    from scipy.special import stdtr, stdtrit

    with np.errstate(invalid="ignore"):  # inf - inf
        difference = second - first
        n, mean = len(difference), float(difference.mean())
    if n < 2 or not np.isfinite(mean):
        return Paired(mean, np.nan, np.nan, np.nan, np.nan)
    error = float(difference.std(ddof=1) / np.sqrt(n))
    half = float(stdtrit(n - 1, 0.975)) * error
    p = 2 * float(stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Paired(mean, error, mean - half, mean + half, p)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number: with a true null anywhere, P(any below a) <= a.

    A NaN is no test, and stays one.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p, float)
    order = np.argsort(values)[: int((~np.isnan(values)).sum())]  # NaN come last
    steps = values[order] * np.arange(len(order), 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return values.tolist()


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "none"


def _draws(fields: Mapping[str, Any]) -> str:
    """The number of draws, and how they make a bound."""
    annealing = fields["annealing"]
    more = f", {_words(annealing)}" if annealing else ""
    return f"{fields['k']} ({fields['bound']}{more})"


AXES: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "examples": lambda f: f"{f['n']:,} of digest {f['data']['digest']}",
    "shape": lambda f: "x".join(map(str, f["data"]["shape"])),
    "preprocessing": lambda f: _words(f["data"]["preprocess"]),
    "measure": lambda f: f["measure"],
    "unit": lambda f: f["unit"],
    "split": lambda f: f["split"],
    "context": lambda f: _words(f["context"]),
    "k": lambda f: None if f["bound"] == "exact" else _draws(f),
}
"""What figures must have in common to be compared, as text; None where it does not matter."""

ALLOWED = ("split", "context", "k")
"""The differences that can be allowed."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Figures of the same examples, and the differences of the others to the first.

    Attributes:
        records: At least two, by name.
        differences: Second minus first in the unit of the figures, of all but the first.
        corrected: p-values by Holm's method, for as many tests as there are differences.
        remarks: Sentences about what the figures do not have in common.
    """

    records: Mapping[str, Record]
    differences: Mapping[str, Paired]
    corrected: Mapping[str, float]
    remarks: tuple[str, ...]

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of the first record, which the others share where it matters."""
        return next(iter(self.records.values())).fields

    def __str__(self) -> str:
        return str(self.document)

    @property
    def test(self) -> str:
        """How the differences are tested."""
        holm = "; p (Holm) is, by Holm's method" if len(self.differences) > 1 else ""
        return (
            f"Differences to {next(iter(self.records))} are of the same examples, in pairs: below "
            "0, a figure is lower, which is better. p is that of Student's t test, two-sided. "
            f"Intervals and p are not corrected for the number of comparisons{holm}."
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, for JSON, without the scores of examples."""
        differences: dict[str, dict[str, float]] = {
            name: {**one._asdict(), "holm": self.corrected[name]}
            for name, one in self.differences.items()
        }
        return {
            "unit": self.fields["unit"],
            "records": {name: dict(one.fields) for name, one in self.records.items()},
            "differences": differences,
            "test": self.test,
            "remarks": list(self.remarks),
        }

    @property
    def document(self) -> Document:
        """The figures with their differences, and what each is a figure of."""
        several, data = len(self.differences) > 1, self.fields["data"]
        of = f"{self.fields['n']:,} examples: {self.fields['split']} of {data['source']}."
        head = ["", self.fields["unit"], "kind", f"minus {next(iter(self.records))}", "95 %", "p"]
        rows = [
            [name, figure_text(*r.value), r.fields["bound"]] for name, r in self.records.items()
        ]
        for row in rows:
            cells = self._cells(row[0]) if row[0] in self.differences else [""] * 4
            row += cells[: 3 + several]
        head += ["p (Holm)"] * several
        differences = Section("Differences", [of, self.test], [(head, rows)])
        head = ["", "model", "weights", "dequantization", "context", "data", "split", "version"]
        rows = [[name, *_conditions(r.fields)] for name, r in self.records.items()]
        conditions = Section("Records", self.remarks, [([*head, "date"], rows)])
        title = f"{', '.join(self.records)}: {data['source']}"
        return Document(title, [differences, conditions])

    def _cells(self, name: str) -> list[str]:
        """A difference, its interval and its p-values."""
        one = self.differences[name]
        if not math.isfinite(one.mean):
            return ["not finite", "", "", ""]
        difference = figure_text(one.mean, number(one.standard_error))
        if math.isnan(one.p):
            return [difference, "", "", ""]
        low, high = (f"{end:,.{decimals(one.standard_error)}f}" for end in (one.low, one.high))
        p = [one.p, self.corrected[name]]
        return [
            difference,
            f"{low} to {high}",
            *("< 0.0001" if q < 1e-4 else f"{q:.2g}" for q in p),
        ]


def _conditions(fields: Mapping[str, Any]) -> list[str]:
    """Cells about what a figure is a figure of."""
    weights, average = fields["weights"]["digest"][:8], fields["weights"].get("ema")
    if average is not None:
        weights += ", averaged" if average else ", not averaged"
    return [
        str(fields["model"].get("architecture") or "its own"),
        weights,
        fields["dequantization"] or "none",
        ", ".join(fields["context"]) or "none",
        fields["data"]["source"],
        *(fields[name] for name in ("split", "version", "date")),
    ]


def compare(records: Mapping[str, Record], *, allow: Collection[str] = ()) -> Compared:
    """Compare figures of the same examples, in pairs with the first.

    Exact values and bounds may be mixed, which is remarked on; bounds by different draws may not.

    Args:
        records: At least two, by the name that each has in the result.
        allow: Differences that become remarks instead of errors, of `ALLOWED`.

    Raises:
        ValueError: If the figures are of other examples, preprocessing, measures, units, splits,
            contexts or numbers of draws. The message names all of these differences.

    Example:
        >>> from musigma import Chain, Dataset, Prior, StandardNormal, layers
        >>> from musigma.evaluation import record
        >>> data = Dataset(np.random.default_rng(0).normal(size=(400, 1)).astype(np.float32))
        >>> normal = Prior(StandardNormal((1,)))
        >>> narrow = Chain([layers.Rescale(2.0)], normal)
        >>> found = compare({"normal": record(normal, data), "narrow": record(narrow, data)})
        >>> bool(found.differences["narrow"].low > 0)
        True
    """
    if len(records) < 2:
        raise ValueError(f"records: expected two or more; got {len(records)}")
    if unknown := set(allow) - set(ALLOWED):
        raise ValueError(f"allow: expected {', '.join(ALLOWED)}; got {', '.join(sorted(unknown))}")
    differing: dict[str, str] = {}
    for axis, of in AXES.items():
        values = {name: of(one.fields) for name, one in records.items()}
        known = {name: value for name, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            differing[axis] = "; ".join(f"{value} in {name}" for name, value in known.items())
    if refused := [
        f"\n  {axis}: {listed}" + f" (--allow {axis} compares them)" * (axis in ALLOWED)
        for axis, listed in differing.items()
        if axis not in allow
    ]:
        raise ValueError(f"records: these are figures of different things:{''.join(refused)}")
    (_, first), *others = records.items()
    differences = {name: paired(first.scores, one.scores) for name, one in others}
    corrected = holm([one.p for one in differences.values()])
    remarks = [f"Different, but allowed: {axis}: {text}." for axis, text in differing.items()]
    remarks += _remarks(records)
    return Compared(
        records, differences, dict(zip(differences, corrected, strict=True)), tuple(remarks)
    )


def _remarks(records: Mapping[str, Record]) -> Iterator[str]:
    """What a reader should know of figures that can be compared."""
    bounds = [name for name, one in records.items() if one.fields["bound"] != "exact"]
    if bounds and len(bounds) < len(records):
        yield (
            f"Upper bounds of -log p: {', '.join(bounds)}. The others are exact. A bound below an "
            "exact value shows a better model; a bound above it shows nothing."
        )
    elif bounds:
        yield (
            "All are upper bounds of -log p: a lower one may come from a better model, or from a "
            "tighter bound."
        )
    for name, one in records.items():
        nan, infinite = int(np.isnan(one.nats).sum()), int(np.isinf(one.nats).sum())
        if nan or infinite:
            yield (
                f"{name}: {nan:,} of {len(one.nats):,} scores are NaN and {infinite:,} infinite. "
                "All scores count, so its mean and its differences are not finite."
            )
        if one.fields["data"]["seen"]:
            yield f"{name}: the model was trained on some of these examples, or chosen by them."
