"""What a score compares an example with: a model, its training data, and other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from musigma import evaluation
from musigma.data import Dataset
from musigma.model import Model
from musigma.named import Registry

__all__ = ["DETECTORS", "Detector", "Reference"]


class Detector(Protocol):
    """A score of examples, as a function."""

    def __call__(self, reference: Reference, data: Dataset, **options: Any) -> np.ndarray:
        """The score of each example, the strangest highest, float64 (N,).

        It must not depend on the other examples, or p-values would not hold.

        Raises:
            ValueError: If the model, the data or the reference cannot serve it.
        """
        ...


DETECTORS = Registry("by", "reference, data")
"""Every score by name. `DETECTORS.register` adds a `Detector` whose options are keyword-only."""


def _no_progress(title: str) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True, eq=False)
class Reference:
    """What a score compares an example with.

    Scores that several detectors need (-log p of the training rows, for instance) are computed
    once.

    Args:
        model: The model.
        train: Training data, or a function that returns them, on which statistics are fitted.
        background: A second model of data of the same kind, trained on perturbed ones.
        members: Further models of the same data, trained like `model` from other seeds.
        k: Draws per example of a bound of log p.
        batch_size: Examples per batch.
        seed: Random seed of all draws.
        progress: A function of a title to a context in which progress is shown, by a function of
            (done, total).

    Example:
        >>> from musigma.distributions import StandardNormal
        >>> from musigma.model import Prior
        >>> x = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
        >>> reference = Reference(Prior(StandardNormal((3,))), train=Dataset(x))
        >>> scores = DETECTORS["typicality"](reference, Dataset(x[:2]))
        >>> scores.shape, bool((scores >= 0).all())
        ((2,), True)
    """

    model: Model
    train: Dataset | Callable[[], Dataset] | None = None
    background: Model | None = None
    members: Sequence[Model] = ()
    k: int = 1
    batch_size: int = 64
    seed: int = 0
    progress: Callable[[str], AbstractContextManager[Any]] = _no_progress
    _known: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def batches(self, data: Dataset, title: str) -> Iterator[tuple[Tensor, Any]]:
        """All examples in order with their context, as `musigma.evaluation.batches` draws them.

        The model is in evaluation mode meanwhile.

        Raises:
            ValueError: If the data do not fit the model.
        """
        evaluation.check(self.model, data)
        how: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed}
        with self.progress(title) as progress, evaluation.evaluating(self.model):
            yield from evaluation.batches(self.model, data, progress=progress, **how)

    def nats(self, data: Dataset, model: Model | None = None, title: str = "") -> np.ndarray:
        """-log p of each example under a model, or its bound, float64 (N,).

        Args:
            data: The examples.
            model: By default the model of the reference.
            title: What is shown while they are scored.
        """
        model = model or self.model

        def scored() -> np.ndarray:
            how: dict[str, Any] = {"batch_size": self.batch_size, "seed": self.seed, "k": self.k}
            with self.progress(title or "scoring") as progress:
                return evaluation.score(model, data, progress=progress, **how)["nats"]

        return self.once(scored, "nats", model, data)

    def once(self, compute: Callable[[], Any], *key: Any) -> Any:
        """What `compute` returned for this key first; its parts are compared by identity."""
        where = tuple(part if isinstance(part, str) else id(part) for part in key)
        if where not in self._known:
            self._known[where] = compute(), key  # keys are kept, so that identities are not reused
        return self._known[where][0]

    def training(self, name: str) -> Dataset:
        """The training data, for a detector of this name.

        Raises:
            ValueError: If there are none.
        """
        if self.train is None:
            raise ValueError(
                f"{name}: it is fitted on training data, and there are none (Reference.train)"
            )
        found = self.once(self.train, "train") if callable(self.train) else self.train
        if not len(found):
            raise ValueError(f"{name}: expected training data; they hold no example")
        return found
