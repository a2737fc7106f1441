"""What the page knows about all of the data: which latents matter, and where examples are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from musigma.data import Dataset
from musigma.evaluation import batches, evaluating
from musigma.explore import answers
from musigma.model import Model

__all__ = ["Survey", "Turns", "spread"]

MOST = 50_000
"""Examples on the map."""

SAMPLE = 512
"""Examples from which the plane and the order of the latents are computed."""

MEMORY = 16_000_000
"""Numbers that the latents of the sample may have."""

TOP = 16
"""Elements of the latents that can be axes and have sliders."""

BATCH = 16
"""Examples of the map that are computed at once, while requests wait."""

QUIET = 0.1
"""Seconds without a request after which work in the background goes on."""

Moments = Callable[[Model, Tensor, Any], tuple[Tensor, Tensor, Tensor]]


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of n numbers from 0, evenly spread.

    >>> spread(9, 3).tolist()
    [0, 4, 8]
    """
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


class Turns:
    """A lock of the model: those who wait for `first` have it before those who wait for `then`."""

    def __init__(self):
        self.condition, self.waiting, self.busy = threading.Condition(), 0, False
        self.served = 0.0  # when the last request was

    @contextmanager
    def first(self) -> Iterator[None]:
        """Hold the lock for a request."""
        with self.condition:
            self.waiting += 1
            self.condition.wait_for(lambda: not self.busy)
            self.waiting, self.busy = self.waiting - 1, True
        yield from self._held()
        self.served = time.monotonic()

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


class Survey:
    """A pass over the data in a thread of its own, which uses the model between requests.

    Args:
        model: The model.
        data: The data.
        turns: Held while the model is in use, for one batch at a time.
        moments: One of `posterior`, `values` and `estimated` of `musigma.explore.answers`.

    Attributes:
        sample: The examples from which `points` (n, D) were computed.
        plane: Their two `components`.
        cost: Mean cost of each element of the latents over them, in nats, (D,).
        top: The elements with the largest cost.
        rows: The examples on the map; those before `done` are there.
        places: Their coordinates on the plane, and the values of `top`, (n, 2 + top).
        scores: Their upper bounds of -log p(x) in nats.
        error: What ended the pass, if it could not be completed.
        known: Whether all but the map is known.
        ready: Set once it is, or there was an error.
    """

    points: Tensor
    plane: tuple[Tensor, Tensor]
    cost: Tensor
    top: list[int]

    def __init__(self, model: Model, data: Dataset, turns: Turns, moments: Moments):
        self.model, self.data, self.turns, self.moments = model, data, turns, moments
        self.rows, self.done, self.error = spread(len(data), MOST), 0, ""
        self.scores = np.full(len(self.rows), np.nan, np.float32)
        self.places = np.empty((0, 2), np.float32)
        self.sample = spread(len(data), SAMPLE)
        self.known, self.ready = False, threading.Event()
        self.thread: threading.Thread | None = None
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

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self._order()
            self.known = True
            self.ready.set()
            self._map()
        except Exception as error:  # the page shows it; requests go on
            self.error = f"{type(error).__name__}: {error}"
            self.ready.set()

    def _order(self) -> None:
        """The latents of a sample, and which of their elements matter."""
        x, context = next(iter(self._in_turn(self.sample[:1])))
        dims = sum(t[0].numel() for t in self.model.encode(x, context, mode=True))
        self.sample = spread(len(self.data), max(2, min(SAMPLE, MEMORY // dims)))
        self.points = answers.centers(self.model, self._in_turn(self.sample))
        costs = []
        for x, context in self._in_turn(self.sample[:: max(1, len(self.sample) // 128)]):
            costs.append(self.moments(self.model, x, context)[2])
        self.cost = torch.cat(costs).mean(0)
        self.top = self.cost.argsort(descending=True)[:TOP].tolist()
        self.plane = answers.components(self.points)
        unit = torch.zeros(len(self.top), self.points.shape[1]).to(self.points)
        unit[range(len(self.top)), self.top] = 1
        self.directions = torch.cat([self.plane[1], unit])

    def _map(self) -> None:
        """The place and the score of every example of the map."""
        self.places = np.zeros((len(self.rows), len(self.directions)), np.float32)
        for x, context in self._in_turn(self.rows, BATCH):
            flat = answers.centers(self.model, [(x, context)])
            part = slice(self.done, self.done + len(x))
            self.places[part] = (flat @ self.directions.T).numpy(force=True)
            self.scores[part] = -self.model.elbo(x, context).numpy(force=True)
            self.done = part.stop

    def _in_turn(self, rows: np.ndarray, batch_size: int = 64) -> Iterator[tuple[Tensor, Any]]:
        """The batches of `musigma.evaluation.batches`, each while it is the survey's turn."""
        stream = batches(self.model, self.data.subset(rows), batch_size=batch_size)
        while True:
            with self.turns.then(), evaluating(self.model):
                if self.stopped.is_set() or (batch := next(stream, None)) is None:
                    return
                yield batch
