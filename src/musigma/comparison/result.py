"""The result of a comparison: as text, as plain data, and as a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from musigma.comparison.marginals import Marginal, Pairs
from musigma.comparison.privacy import Privacy
from musigma.comparison.two_samples import TwoSamples
from musigma.comparison.usefulness import Usefulness
from musigma.evaluation.intervals import plain
from musigma.report.sections import Document, Section

__all__ = ["Comparison"]

PICTURED = 24
"""Columns whose marginals are drawn, those with the largest distances."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """A synthetic table beside a real one.

    Attributes:
        names: What `real`, `synthetic` and `train` were read from.
        rows: Their numbers of rows.
        seed: Random seed of everything that is drawn.
        columns: The columns that were compared, and their kinds.
        differences: Sentences about names, types, units and levels that differ.
        notes: Sentences about how the tables were read.
        c2st: The classifier two-sample test of synthetic against real rows.
        baseline: That of one half of the real rows against the other.
        usefulness: Train-synthetic-test-real, for each target and measure.
        split: Which real rows are trained on, and which are tested on.
        skipped: Columns that are no targets, with the reasons.
        marginals: Every column.
        pairs: Every pair of columns.
        privacy: Nearest records and membership.
    """

    names: dict[str, str]
    rows: dict[str, int]
    seed: int
    columns: dict[str, str]
    differences: tuple[str, ...]
    notes: tuple[str, ...]
    c2st: TwoSamples
    baseline: TwoSamples
    usefulness: list[Usefulness]
    split: str
    skipped: dict[str, str]
    marginals: list[Marginal]
    pairs: Pairs
    privacy: Privacy

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain data, for JSON; an interval is an object of value, low and high."""
        pairs, privacy = self.pairs, plain(self.privacy)
        distances = privacy.pop("distances")
        names = ("column", "other", "real", "synthetic")
        return {
            "names": self.names,
            "rows": self.rows,
            "seed": self.seed,
            "columns": self.columns,
            "differences": list(self.differences),
            "notes": list(self.notes),
            "c2st": plain(self.c2st) | {"baseline": plain(self.baseline)},
            "usefulness": {
                "split": self.split,
                "scores": [plain(one) for one in self.usefulness],
                "skipped": self.skipped,
            },
            "marginals": [plain(one) for one in self.marginals],
            "pairs": {
                "rows": pairs.rows,
                "columns": list(pairs.names),
                "mean_difference": pairs.mean,
                "chance": pairs.chance,
                "worst": [dict(zip(names, pair, strict=True)) for pair in pairs.worst()],
                "real": pairs.real.tolist(),
                "synthetic": pairs.synthetic.tolist(),
            },
            "privacy": privacy
            | {
                "distance_percentiles": {
                    name: np.percentile(d, range(101)).tolist() for name, d in distances.items()
                }
            },
        }

    def __str__(self) -> str:
        return str(self.document)

    def to_html(self) -> str:
        """One page with pictures; without matplotlib, it has none."""
        return self.document.to_html()

    @property
    def document(self) -> Document:
        """The result in sections, which is also written as Markdown and LaTeX."""
        title = f"{self.names['synthetic']} beside {self.names['real']}"
        footer = (
            "Intervals hold the true value in 95 % of samples. Chance: the value that two samples "
            "of the same distribution have on average."
        )
        return Document(title, list(self._sections()), footer)

    def _sections(self) -> Iterator[Section]:
        yield self._about()
        yield self._told_apart()
        yield self._useful()
        yield self._columns()
        yield self._pairs()
        yield self._private()

    def _about(self) -> Section:
        rows = [
            f"{name}: {self.rows[name]:,} rows of {source}" for name, source in self.names.items()
        ]
        kinds = ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())
        text = [*rows, f"{len(self.columns)} columns: {kinds}; seed {self.seed}"]
        differences = [f"Differs: {each}" for each in self.differences]
        return Section("Tables", [*text, *differences, *self.notes])

    def _told_apart(self) -> Section:
        from musigma.report import tables

        test, base = self.c2st, self.baseline
        bars = {"synthetic against real": test.auc, "real against real": base.auc}
        text = [
            f"AUC {test.auc}, accuracy {test.accuracy}, p = {test.p_value:.2g}: gradient boosting "
            f"tells synthetic from real rows; 0.5 is chance, 1 is always. {test.rows:,} rows of "
            f"each, {test.folds} folds.",
            f"Real against real: AUC {base.auc}, accuracy {base.accuracy}; {base.rows:,} rows of "
            "each.",
        ]
        if test.auc.high < 0.5:
            text.append(
                "Below 0.5, rows of one table are copies of rows of the other: see privacy."
            )
        shares = [[name, f"{fall:.3f}"] for name, fall in test.columns.items()][:10]
        head = ["column", "part in the AUC (its fall if the column is shuffled)"]
        return Section(
            "Can they be told apart?",
            text,
            [(head, shares)] if shares else [],
            {
                "AUC of the classifier two-sample test": lambda path, dark: tables.intervals(
                    bars,
                    path,
                    title="AUC; 0.5: they cannot be told apart",
                    reference=0.5,
                    limits=(0.45, 1.0),
                    dark=dark,
                )
            },
        )

    def _useful(self) -> Section:
        from musigma.report import tables

        rows = [
            [u.column, u.measure, u.synthetic, u.real, u.difference, u.train_rows, u.test_rows]
            for u in self.usefulness
        ]
        head = ["target", "measure", "trained on synthetic", "trained on real", "difference"]
        head += ["rows", "test rows"]
        bars = {}
        for u in self.usefulness[:12]:
            bars[f"{u.column}, {u.measure}: synthetic"] = u.synthetic
            bars[f"{u.column}, {u.measure}: real"] = u.real
        text = [
            "Gradient boosting predicts each target from all other columns, trained on synthetic "
            f"rows and on as many real ones, tested on real rows ({self.split}). Intervals hold "
            "over draws of the test rows."
        ]
        text += [f"No target: {name}: {reason}" for name, reason in self.skipped.items()]
        draw = {
            "Trained on synthetic and on real rows, tested on real rows": lambda path, dark: (
                tables.intervals(bars, path, title="higher is better", dark=dark)
            )
        }
        return Section(
            "Are they as useful?",
            text,
            [(head, _texts(rows))] if rows else [],
            draw if bars else {},
        )

    def _columns(self) -> Section:
        from musigma.report import tables

        order = sorted(self.marginals, key=lambda one: -one.distance)
        rows = [
            [
                m.column,
                m.kind,
                f"{m.distance:.3f}",
                f"{m.chance:.3f}",
                f"{m.missing_real:.1%} / {m.missing_synthetic:.1%}",
                f"{m.outside:.2%}",
                f"{m.off_grid:.2%}",
                _levels(m.invented),
                _levels(m.lost),
            ]
            for m in order
        ]
        head = ["column", "kind", "distance", "chance", "missing real / synthetic"]
        head += ["outside the real range", "off the real grid", "levels invented", "lost"]
        text = [
            "Distance: Kolmogorov-Smirnov for numbers, total variation for levels; from 0 to 1."
        ]
        caption = "Real rows filled, synthetic rows as lines or on the right"
        if len(order) > PICTURED:
            caption += f"; the {PICTURED} columns with the largest distances"
        return Section(
            "Columns",
            text,
            [(head, rows)],
            {caption: lambda path, dark: tables.marginals(order[:PICTURED], path, dark=dark)},
        )

    def _pairs(self) -> Section:
        from musigma.report import tables

        pairs = self.pairs
        rows = [
            [f"{a} and {b}", f"{real:+.3f}", f"{synthetic:+.3f}", f"{synthetic - real:+.3f}"]
            for a, b, real, synthetic in pairs.worst()
        ]
        text = [
            f"Mean absolute difference of associations {pairs.mean:.4f}; {pairs.chance:.4f} "
            f"between halves of the real rows. {pairs.rows:,} rows of each. Spearman's rank "
            "correlation, Cramér's V for two categories, the correlation ratio for a category and "
            "a number."
        ]
        panels = {
            "real": pairs.real,
            "synthetic": pairs.synthetic,
            "synthetic − real": pairs.synthetic - pairs.real,
        }
        draw = {
            "Associations of pairs of columns": lambda path, dark: tables.matrices(
                pairs.names, panels, path, dark=dark
            )
        }
        table = [(["pair", "real", "synthetic", "difference"], rows)] if rows else []
        return Section("Pairs of columns", text, table, draw if rows else {})

    def _private(self) -> Section:
        from musigma.report import tables

        p = self.privacy
        rows = [
            ["synthetic rows that are copies of a training row", p.copies, "below"],
            ["held-out rows that are", p.chance_copies, ""],
            ["P(synthetic closer to its nearest training row than held-out)", p.closer, "0.5"],
        ]
        rows += [
            [f"synthetic rows closer than percentile {name} of held-out", value, f"{int(name)} %"]
            for name, value in p.percentiles.items()
        ]
        if p.membership:
            rows.append(["AUC of membership by distance to synthetic", p.membership, "0.5"])
        counts = ", ".join(f"{n:,} {name} rows" for name, n in p.rows.items())
        text = [
            f"Distances to the nearest training row, of synthetic rows and of {p.reference}: "
            f"{counts}."
        ]
        if p.why:
            text.append(f"No membership test: {p.why}.")
        return Section(
            "Are they private?",
            text,
            [(["figure", "value", "if nothing leaks"], _texts(rows))],
            {
                "Distance to the nearest training row": lambda path, dark: tables.cumulative(
                    p.distances,
                    path,
                    title="share of rows up to a distance",
                    x="distance to the nearest training row",
                    dark=dark,
                )
            },
        )


def _texts(rows: list[list[Any]]) -> list[list[str]]:
    return [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in rows]


def _levels(levels: dict[str, int]) -> str:
    names = [f"{name} ({count:,})" for name, count in list(levels.items())[:3]]
    return ", ".join(names) + (f" and {len(levels) - 3} more" if len(levels) > 3 else "")
