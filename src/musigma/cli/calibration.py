"""What commands know of normal and strange rows: rows that calibrate, labels, and drift."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from musigma.cli.detection import Scores
from musigma.cli.options import DataOptions, numbers
from musigma.cli.screen import count
from musigma.cli.trained import Trained

if TYPE_CHECKING:
    import numpy as np

    from musigma.data import Dataset
    from musigma.evaluation.intervals import Interval

RATES = (0.05, 0.01, 0.001)
"""False-positive rates that are evaluated if none is given, as far as they can be promised."""
USUAL = ("1", "true", "yes", "anomaly", "outlier")
"""The one of two labels that is the anomaly if none is given."""
LEVEL = 0.05
"""A column with a smaller adjusted p-value has drifted."""


def false_positive_rates(text: str) -> tuple[float, ...]:
    """The rates that a text such as 0.01,0.001 lists."""
    rates = numbers(text, "fpr", "rates such as 0.01,0.001", kind=float)
    if bad := [rate for rate in rates if not 0 < rate < 1]:
        raise ValueError(f"fpr: expected a rate between 0 and 1, such as 0.01; got {bad[0]:g}")
    return rates


# --- rows that calibrate -------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Rows that the model was not trained on, and what they are.

    Attributes:
        rows: The rows.
        what: The part and the source, as text.
        scores: Their scores by name, computed as those of all other rows; none until `scored`.
    """

    rows: Dataset
    what: str
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        trained: Trained,
        source: str | None,
        options: DataOptions,
        rates: Sequence[float] = (),
        half: bool = False,
    ) -> Calibration:
        """Rows of a file; by default those of the training data that were held out.

        Args:
            trained: The run.
            source: The file; or None.
            options: How to read it.
            rates: The false-positive rates to promise.
            half: Leave every other row out, by a hash of its content.

        Raises:
            ValueError: If the rows cannot be read, or are too few for a rate.
        """
        import numpy as np

        from musigma import anomaly

        origin = source or trained.about_data.get("source")
        if origin is None:
            raise ValueError(
                "calibrate: the checkpoint does not say what it was trained on; give normal rows "
                "that it was not trained on (--calibrate FILE)"
            )
        try:
            found = trained.data(origin, dataclasses.replace(options, split=None))
        except (ValueError, OSError) as error:
            where = "" if source else "the training data cannot be read; give --calibrate FILE. "
            raise ValueError(f"calibrate: {where}{error}") from error
        what = f"{trained.part} of {origin}"
        if half:
            found, what = found.subset(calibrates(found)), f"half of {what}"
        kept = anomaly.calibration_rows(found.content(), rates)
        if len(kept) < len(found):
            what = f"{len(kept):,} of {len(found):,}, {what}"
            found = found.subset(kept)
        calibration = cls(found, what)
        for rate in rates:
            if reason := calibration.refusal(rate):
                raise ValueError(f"fpr: {reason}")
        if (distinct := len(np.unique(found.content()))) < len(found) / 2:
            trained.screen.note(
                f"only {distinct:,} of {len(found):,} calibration rows differ; equal rows are "
                "held out together, so false-positive rates are less certain than is stated"
            )
        return calibration

    def scored(self, scores: Scores) -> Calibration:
        """The same rows with their scores.

        Raises:
            ValueError: If one is NaN.
        """
        import numpy as np

        found = scores(self.rows)
        for label, values in found.items():
            if bad := int(np.isnan(values).sum()):
                raise ValueError(
                    f"calibrate: {bad:,} of {len(values):,} scores ({label}) of {self.what} are "
                    "NaN, so nothing can be compared with them; choose another score (--by), or "
                    "train the model again"
                )
        return dataclasses.replace(self, scores=found)

    def refusal(self, rate: float) -> str:
        """Why so many rows cannot promise a false-positive rate; empty if they can."""
        from musigma import anomaly

        try:
            anomaly.rate_interval(len(self.rows), rate)
        except ValueError as error:
            return f"{str(error).removeprefix('rate: ')} (these are {self.what}; --calibrate FILE)"
        return ""

    def __str__(self) -> str:
        return f"{count(len(self.rows), 'calibration row')} ({self.what})"

    @property
    def fields(self) -> dict[str, Any]:
        """An entry of a JSON answer."""
        return {"calibration": {"rows": self.what, "n": len(self.rows)}}


def calibrates(found: Dataset) -> np.ndarray:
    """Mask of the half of some rows that calibrates when the other half is evaluated."""
    import numpy as np

    return found.content() & np.uint64(1) == 1


# --- labels --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labeled:
    """Rows that are known to be normal, or not.

    Attributes:
        rows: The rows.
        anomaly: Whether each is an anomaly, bool (B,).
        what: The label of anomalies, as text.
    """

    rows: Dataset
    anomaly: np.ndarray
    what: str

    @classmethod
    def read(
        cls,
        trained: Trained,
        source: str,
        options: DataOptions,
        labels: str,
        anomalies: Sequence[str] = (),
    ) -> Labeled:
        """Rows with labels that are a column, `label`, or a file with a row for each example.

        Raises:
            ValueError: If there are no such labels, or it is unclear which are anomalies.
        """
        import numpy as np

        from musigma.data.attach import attach, is_source

        if labels in trained.spec.columns:
            raise ValueError(
                f"labels: {labels!r} is a column of the model, whose scores would know the "
                "answer; train without it"
            )
        beside = is_source(labels)
        everything = dataclasses.replace(options, split="all")
        column = None if beside or labels == "label" else labels
        typed = trained.spec.schema is not None  # whose labels are read where they are wanted
        wanted = "label" if typed and labels == "label" else column
        found = trained.data(source, everything, column=wanted)
        if beside:
            known = set(found.given)
            found = attach(found, labels, allow_constant=True)
            added = [name for name in found.given if name not in known]
            if len(added) != 1:
                raise ValueError(
                    f"labels: expected a file of one column; {labels} has {', '.join(added)}"
                )
            column = added[0]
        chosen = _anomalous(Counter(_labels(found, column).tolist()), anomalies)
        trained.part = options.split or ("held-out" if trained.seen else "all")
        rows = found.split(trained.part)
        which = np.isin(_labels(rows, column), chosen)
        return cls(rows, which, f"{column or 'label'} = {', '.join(chosen)}")

    def subset(self, mask: np.ndarray) -> Labeled:
        """Some of the rows."""
        return dataclasses.replace(self, rows=self.rows.subset(mask), anomaly=self.anomaly[mask])


def _labels(found: Dataset, column: str | None) -> np.ndarray:
    """The label of each row as text, from a variable, or from the labels of the data."""
    import numpy as np

    if column is None:
        if found.labels is None:
            raise ValueError(f"labels: {found.name} has no labels; name a column, or a file")
        return np.array([*found.label_names, ""])[found.labels]
    given = found.given[column]
    if given.values.ndim > 1:
        raise ValueError(f"labels: expected one label for each row; {column} has several")
    if given.names:
        return np.array([*given.names, ""])[given.values]
    return np.array([f"{value:g}" for value in given.values])


def _anomalous(counts: Counter[str], asked: Sequence[str]) -> list[str]:
    """The labels of anomalies, among labels and their numbers.

    >>> _anomalous(Counter({"0": 90, "1": 10}), ())
    ['1']
    >>> _anomalous(Counter({"a": 90, "b": 5, "c": 5}), ["b", "c"])
    ['b', 'c']
    """
    known = ", ".join(f"{label!r} ({n:,})" for label, n in sorted(counts.items())[:20])
    if asked:
        if missing := [label for label in asked if label not in counts]:
            raise ValueError(
                f"anomaly: expected labels among {known}; got {', '.join(map(repr, missing))}"
            )
        return list(asked)
    usual = [label for label in counts if label.lower() in USUAL]
    if len(counts) > 2 or len(usual) != 1:
        raise ValueError(
            f"anomaly: the labels are {known}; say which are anomalies (--anomaly LABEL)"
        )
    return usual


def detection_lines(
    found: Mapping[str, dict[str, Any]], labeled: Labeled, by: Calibration, named: bool
) -> list[str]:
    """What `anomaly.detection` returned for each score, for people."""
    lines = []
    for label, one in found.items():
        total = one["normal"] + one["anomalies"]
        lines += [
            f"{label}: " * named + f"AUROC {_text(one['auroc'])}, average precision "
            f"{_text(one['average_precision'])}; anomalies: {labeled.what}, "
            f"{one['anomalies']:,} of {count(total, 'row')}",
            *(
                f"at {at['rate']:.2%}: {_text(at['recall'], '.2%')} of anomalies flagged, and "
                f"{_text(at['flagged'], '.2%')} of normal rows; expected from so many calibration "
                f"rows: {at['promised'][0]:.2%} to {at['promised'][1]:.2%}"
                for at in one.get("at", ())
            ),
        ]
    return [*lines, f"thresholds by {by}"]


def _text(figure: Interval, form: str = ".4f") -> str:
    """A figure with the ends of its interval.

    >>> from musigma.evaluation.intervals import Interval
    >>> _text(Interval(0.5, 0.4, 0.6), ".1%")
    '50.0% (40.0% to 60.0%)'
    """
    value, low, high = (format(end, form) for end in figure)
    return f"{value} ({low} to {high})"


# --- drift ---------------------------------------------------------------------------------------


def drift_of(
    trained: Trained, found: Dataset, by_score: Mapping[str, Any], calibration: Calibration
) -> tuple[dict[str, Any], list[str]]:
    """Whether data differ from calibration rows in their scores, or a table in its columns.

    Args:
        trained: The run.
        found: The data.
        by_score: The test of each score (`Scores.drift`).
        calibration: Rows to compare with.

    Returns:
        Fields: `p_value` of all together (the smallest, times their number), the tests, and the
        names of the columns that have drifted; and lines for people.
    """
    from musigma import anomaly

    tests = []
    if not trained.is_image:
        names = trained.spec.columns or [f"x{j}" for j in range(trained.shape[0])]
        columns = trained.spec.schema or names
        tests = anomaly.column_drift(found.x, calibration.rows.x, columns)
    parts = {name: test["p_value"] for name, test in by_score.items()}
    if tests:
        parts["columns"] = tests[0]["adjusted"]
    p = min(1.0, len(parts) * min(parts.values()))
    drifted = [test for test in tests if test["adjusted"] <= LEVEL]
    both = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    lines = [f"drift: p = {p:.3g} ({both}), against {calibration}"]
    lines += [
        f"  {t['column']}: {t['test']} {t['statistic']:.3g}, p = {t['adjusted']:.3g}"
        for t in drifted
    ]
    if tests and not drifted:
        lines.append(f"  no column has drifted (p <= {LEVEL:g}, adjusted for their number)")
    names = list(dict.fromkeys(test["column"] for test in drifted))
    return {"p_value": p, **by_score, "drifted": names, "columns": tests}, lines
