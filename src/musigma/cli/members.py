"""How much the members of an ensemble differ, for commands that draw from one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from musigma.context import Context

LARGE = 0.1
"""Nats: a classifier tells two densities that differ by as much apart with an accuracy of 0.7."""


class Differences:
    """The disagreement of the members of a model over draws from it; nothing if it has none.

    Args:
        model: Any model, or None.
        observed: Its context: a row for each observation, or None.
    """

    def __init__(self, model: Any, observed: Context):
        self.model, self.observed = model, observed
        self.parts: list[Tensor] = []
        self.given: Any = None

    def add(self, x: Tensor, which: Tensor) -> None:
        """Count draws (n, D) for observations of these numbers (n,)."""
        import torch

        from musigma import context as contexts

        if not hasattr(self.model, "disagreement"):
            return
        with torch.no_grad():
            self.given = self.given or self.model.given(self.observed)
            model, rows = self.given
            found = model.disagreement(x, contexts.rows(rows, which))
        self.parts.append(found.information.cpu())

    @property
    def fields(self) -> dict[str, Any]:
        """The entry `disagreement` of a JSON answer, if the model is an ensemble."""
        import torch

        if not self.parts:
            return {}
        nats = torch.cat(self.parts).double()
        error = float(nats.std() / math.sqrt(len(nats))) if len(nats) > 1 else None
        most = math.log(len(self.model))
        return {
            "disagreement": {"nats": float(nats.mean()), "standard_error": error, "most": most}
        }

    @property
    def line(self) -> str:
        """A line for people, which begins with a line break; empty without an ensemble."""
        if not (answer := self.fields.get("disagreement")):
            return ""
        nats, error, most = answer.values()
        error = "" if error is None else f" ± {error:.3f}"
        text = f"\nmembers disagree by {nats:.3f}{error} nats (at most {most:.2f})"
        if nats > LARGE:
            text += ": much; the draws depend on the initial weights, so give more simulations"
        return text
