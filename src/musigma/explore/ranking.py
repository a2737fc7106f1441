"""The data by how strange they are, and the threshold of a false-positive rate."""

from __future__ import annotations

from typing import Any

import numpy as np

from musigma import anomaly
from musigma.explore import answers
from musigma.explore.survey import Survey

__all__ = ["Ranking"]

BINS = 48


class Ranking:
    """Scores of a survey as conformal p-values (`musigma.anomaly`).

    Scores are compared with those of the normal examples of the survey. If it has none, each is
    compared with all others, which is exact if all examples of the data are normal, and flags
    fewer than it could if some are not.

    Args:
        survey: The survey; what is not yet scored is left out.
    """

    def __init__(self, survey: Survey):
        self.survey = survey

    def __call__(self, rate: float, first: int, count: int) -> dict[str, Any]:
        """The strangest examples, and what a false-positive rate flags.

        Args:
            rate: The largest share of normal examples to flag.
            first: How many of the strangest to leave out.
            count: How many to return.
        """
        survey = self.survey
        done, apart = survey.done, survey.normal is not None
        scores = survey.scores[:done]
        known = survey.compared if apart else scores
        answer: dict[str, Any] = {
            "done": done,
            "total": len(survey.rows),
            "error": survey.error,
            "apart": apart,
            "rows": [],
        }
        if not done or known is None:
            return answer
        p = answers.compared(scores, known) if apart else answers.among(scores)
        n = len(known) if apart else len(known) - 1
        order = np.argsort(-scores, kind="stable")
        answer |= {"n": n, "rate": rate}
        try:
            low, high = anomaly.rate_interval(n, rate)
            limit = anomaly.threshold(known, rate) if apart else _least(scores[p <= rate])
            answer |= {"threshold": limit, "between": [low, high]}
        except ValueError as error:
            answer["reason"] = str(error)
        edges = _edges(known, scores)
        answer["histogram"] = {
            "edges": edges.tolist(),
            "data": np.histogram(scores, edges)[0].tolist(),
            "known": np.histogram(known, edges)[0].tolist() if apart else None,
        }
        answer["flagged"] = int((p <= rate).sum())
        answer["rows"] = [
            {"index": int(survey.rows[i]), "score": float(scores[i]), "p": float(p[i])}
            for i in order[first : first + count]
        ]
        return answer


def _least(flagged: np.ndarray) -> float | None:
    """The smallest score that is flagged."""
    return float(flagged.min()) if len(flagged) else None


def _edges(known: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Edges of a histogram of all scores but those that are very far from the others."""
    finite = known[np.isfinite(known)]
    low, middle, end = np.quantile(finite, [0, 0.5, 0.99]) if len(finite) else (0.0, 0.0, 1.0)
    far = end + 3 * (end - middle) + 1e-9
    return np.linspace(low, min(max(scores.max(), end + 1e-9), far), BINS + 1)
