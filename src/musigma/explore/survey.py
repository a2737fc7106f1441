"""What the page knows about all of the data: latents that matter, places, and scores."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.data import Dataset
from musigma.evaluation import batches, evaluating
from musigma.explore import answers
from musigma.explore.examples import spread
from musigma.model import Model

__all__ = ["Survey", "Turns"]

MOST = 50_000
"""Examples on the map."""

SAMPLE = 512
"""Examples from which the plane and the order of the latents are computed."""

MEMORY = 16_000_000
"""Numbers that the latents of the sample may have."""

TOP = 16
"""Elements of the latents that can be axes and have sliders."""

EMBEDDED = 4000
"""Examples that UMAP maps, which takes about a minute."""

STEPS = 4
"""Principal components along which sliders go."""

CLASSES = 12
"""Largest number of classes between which sliders go."""

BATCH = 65_536
"""Numbers of examples of the map that are computed at once, while requests wait."""

QUIET = 0.1
"""Seconds without a request after which work in the background goes on."""

Moments = Callable[[Model, Tensor, Any], tuple[Tensor, Tensor, Tensor]]
Score = Callable[[Model, Iterable[tuple[Tensor, Any]]], np.ndarray]


class Turns:
    """A lock of the model: those who wait for `first` have it before those who wait for `then`."""

    def __init__(self):
        self.condition, self.waiting, self.busy = threading.Condition(), 0, False
        self.served = 0.0  # when the last request was

    def rest(self, seconds: float) -> None:
        """Leave the model to requests for some time."""
        self.served = time.monotonic() + seconds

    @contextmanager
    def first(self) -> Iterator[None]:
        """Hold the lock for a request."""
        with self.condition:
            self.waiting += 1
            self.condition.wait_for(lambda: not self.busy)
            self.waiting, self.busy = self.waiting - 1, True
        yield from self._held()
        self.rest(0)

    @contextmanager
    def then(self) -> Iterator[None]:
        """Hold the lock for work in the background."""
        with self.condition:
            while self.busy or self.waiting or time.monotonic() < self.served + QUIET:
                self.condition.wait(QUIET)
            self.busy = True
        yield from self._held()

    def _held(self) -> Iterator[None]:
        try:
            yield
        finally:
            with self.condition:
                self.busy = False
                self.condition.notify_all()


class Embedding:
    """Points in two dimensions by UMAP, computed in a thread of its own.

    Args:
        rows: The examples.
        centers: Returns their flat latents (n, D).

    Attributes:
        drawn: Their places (n, 2); None until they are known.
        error: What ended the work, if it could not be completed.
    """

    points: Tensor

    def __init__(self, rows: np.ndarray, centers: Callable[[], Tensor]):
        self.rows, self.centers, self.drawn, self.error = rows, centers, None, ""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.points = self.centers()
            with warnings.catch_warnings():  # of its own libraries
                warnings.simplefilter("ignore")
                self.drawn = answers.embedded(self.points)
        except Exception as error:  # the page shows it
            self.error = f"UMAP: {type(error).__name__}: {error}"

    def known(self) -> Tensor:
        """The places.

        Raises:
            ValueError: If they are not yet known, or cannot be.
        """
        if self.drawn is None:
            raise ValueError(self.error or "axes: UMAP is still being computed")
        return self.drawn


class Survey:
    """A pass over the data in a thread of its own, which uses the model between requests.

    Args:
        model: The model.
        data: The data.
        turns: Held while the model is in use, for one batch at a time.
        moments: One of `posterior`, `values` and `estimated` of `musigma.explore.answers`; None if
            the model has no latents.
        score: How strange the examples of batches are: `musigma.explore.answers.scored`.
        normal: Examples that scores are compared with; by default those of the data.

    Attributes:
        sample: The examples from which `points` (n, D) were computed.
        plane: Their two `components`.
        steps: Their `directions`, (K, D), and `masks` of the classes among them.
        named: Their names.
        cost: Mean cost of each element of the latents over them, in nats, (D,).
        top: The elements with the largest cost.
        rows: The examples on the map; those before `done` are there.
        places: Their coordinates on the plane, and the values of `top`, (n, 2 + top).
        scores: Their scores.
        compared: Scores of the normal examples, once all are known; None if there are none.
        error: What ended the pass, if it could not be completed.
        known: Whether all but the map is known.
        ready: Set once it is, or there was an error.
    """

    points: Tensor
    plane: tuple[Tensor, Tensor]
    steps: Tensor
    named: list[str]
    cost: Tensor
    top: list[int]

    def __init__(
        self,
        model: Model,
        data: Dataset,
        turns: Turns,
        moments: Moments | None,
        score: Score,
        normal: Dataset | None = None,
    ):
        self.model, self.data, self.turns, self.moments = model, data, turns, moments
        self.score, self.normal, self.compared = score, normal, None
        self.rows, self.done, self.error = spread(len(data), MOST), 0, ""
        self.scores = np.full(len(self.rows), np.nan)
        self.places = np.empty((0, 2), np.float32)
        self.sample = spread(len(data), SAMPLE)
        self.known, self.ready = False, threading.Event()
        self.at_once = max(8, min(256, BATCH // math.prod(data.shape)))
        self.thread: threading.Thread | None = None
        self.embedding: Embedding | None = None
        self.beginning, self.stopped = threading.Lock(), threading.Event()

    def start(self) -> None:
        """Begin, unless it has begun."""
        with self.beginning:
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, daemon=True)
                self.thread.start()

    def stop(self) -> None:
        """End after the current batch, and wait for it."""
        self.stopped.set()
        if self.thread is not None:
            self.thread.join()

    def wait(self) -> Survey:
        """Return this, once the order of the latents and the plane are known.

        Raises:
            ValueError: If there was an error.
        """
        self.start()
        self.ready.wait()
        if not self.known:
            raise ValueError(self.error)
        return self

    def embed(self) -> Embedding:
        """The map of UMAP, which is begun when it is first asked for."""
        with self.beginning:
            if self.embedding is None:
                dims = self.points.shape[1]
                rows = spread(len(self.data), max(16, min(EMBEDDED, MEMORY // dims)))
                self.embedding = Embedding(rows, lambda: self._centers(rows))
        return self.embedding

    @torch.no_grad()
    def _centers(self, rows: np.ndarray) -> Tensor:
        return answers.centers(self.model, self._in_turn(self.data.subset(rows)))

    def axes(self, pair: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
        """The middle and the directions of the map: two elements, or by default components."""
        if pair is None:
            return self.plane
        return answers.elements(self.points, pair)

    def columns(self, pair: tuple[int, int] | None) -> list[int]:
        """The columns of `places` that are the coordinates on these axes.

        Raises:
            ValueError: If an element is not one of `top`.
        """
        if pair is None:
            return [0, 1]
        if not set(pair) <= set(self.top) or pair[0] == pair[1]:
            raise ValueError(f"axes: expected two of {self.top}; got {list(pair)}")
        return [2 + self.top.index(i) for i in pair]

    @property
    def classes(self) -> list[int]:
        """The classes with examples in the sample and others, if there are not too many."""
        labels, names = self.data.labels, self.data.label_names
        if labels is None or len(names) > CLASSES:
            return []
        of = labels[self.sample]
        return [k for k in range(len(names)) if 1 < (of == k).sum() < len(of) - 1]

    def masks(self) -> list[np.ndarray]:
        """Which examples of the sample are of each of these classes."""
        labels = self.data.labels
        return [] if labels is None else [labels[self.sample] == k for k in self.classes]

    @torch.no_grad()
    def _run(self) -> None:
        try:
            if self.moments is not None:
                self._order(self.moments)
            self.known = True
            self.ready.set()
            self._map()
            if self.normal is not None:
                self.compared = self._scores(self.normal)
        except Exception as error:  # the page shows it; requests go on
            self.error = f"{type(error).__name__}: {error}"
            self.ready.set()

    def _order(self, moments: Moments) -> None:
        """The latents of a sample, and which of their elements matter."""
        dims = self._centers(self.sample[:1]).shape[1]
        self.sample = spread(len(self.data), max(2, min(SAMPLE, MEMORY // dims)))
        self.points = self._centers(self.sample)
        costs = []
        some = self.sample[:: max(1, len(self.sample) // 128)]
        for x, context in self._in_turn(self.data.subset(some)):
            costs.append(moments(self.model, x, context)[2])
        self.cost = torch.cat(costs).mean(0)
        self.top = self.cost.argsort(descending=True)[:TOP].tolist()
        self.plane = answers.components(self.points)
        self.steps = answers.directions(self.points, self.masks(), STEPS)
        along = len(self.steps) - len(self.classes)
        names = [self.data.label_names[k] for k in self.classes]
        self.named = [f"component {k + 1}" for k in range(along)] + [f"label {n}" for n in names]
        unit = torch.zeros(len(self.top), self.points.shape[1]).to(self.points)
        unit[range(len(self.top)), self.top] = 1
        self.directions = torch.cat([self.plane[1], unit])
        self.places = np.zeros((len(self.rows), len(self.directions)), np.float32)

    def _map(self) -> None:
        """The place and the score of every example of the map."""
        for x, context in self._in_turn(self.data.subset(self.rows), self.at_once):
            part = slice(self.done, self.done + len(x))
            if self.moments is not None:
                flat = answers.centers(self.model, [(x, context)])
                self.places[part] = (flat @ self.directions.T).numpy(force=True)
            self.scores[part] = self.score(self.model, [(x, context)])
            self.done = part.stop

    def _scores(self, data: Dataset) -> np.ndarray:
        return self.score(self.model, self._in_turn(data, self.at_once))

    def _in_turn(self, data: Dataset, batch_size: int = 64) -> Iterator[tuple[Tensor, Any]]:
        """The batches of `musigma.evaluation.batches`, each while it is the survey's turn."""
        stream = batches(self.model, data, batch_size=batch_size)
        while True:
            with self.turns.then(), evaluating(self.model):
                if self.stopped.is_set() or (batch := next(stream, None)) is None:
                    return
                yield batch
