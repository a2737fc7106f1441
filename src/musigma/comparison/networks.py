"""Classifiers of vectors, many trained at once, and the two-sample test that they give."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Classifiers", "held_out", "vector_c2st"]


class Classifiers:
    r"""M multilayer perceptrons that are trained at the same time, each on rows of its own.

    Each layer of all networks is one batched matrix product, which takes a fraction of the time
    of M products. The networks minimize the mean cross-entropy by Adam; the learning rate rises
    over the first 5 % of the steps, and falls to zero as a cosine.

    There may be fewer data sets than networks: with S sets, M / S consecutive networks read each
    one. S may differ between vectors and labels, for many labelings of the same vectors.

    Args:
        networks: M.
        features: D.
        hidden: Width of each hidden layer; a ReLU follows each.
        seed: Random seed of the initial weights and of the order of the rows.

    Example:
        >>> label = torch.arange(400) % 2
        >>> x = torch.randn(3, 400, 2) + 4 * label[:, None]
        >>> networks = Classifiers(3, 2, hidden=[16])
        >>> networks.fit(x, label, epochs=20, batch_size=40)
        >>> ((networks.probabilities(x) > 0.5) == label).float().mean(1) > 0.9
        tensor([True, True, True])
    """

    def __init__(
        self, networks: int, features: int, *, hidden: Sequence[int] = (64, 64), seed: int = 0
    ):
        self.networks, self.features = networks, features
        self.random = torch.Generator().manual_seed(seed)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for a, b in itertools.pairwise([features, *hidden, 1]):
            limit = math.sqrt(6 / (a + b))
            weight, bias = (
                limit * (2 * torch.rand(networks, rows, b, generator=self.random) - 1)
                for rows in (a, 1)
            )
            self.layers.append((weight, bias))

    def fit(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        rows: Tensor | None = None,
        epochs: int = 100,
        batch_size: int = 200,
        lr: float = 5e-3,
    ) -> None:
        """Train all networks.

        Args:
            x: Vectors (S, N, D), or (N, D).
            labels: 0 or 1, (S, N), or (N,).
            rows: Numbers of the rows that train each network, (M, n); by default all.
            epochs: Passes over the rows.
            batch_size: Rows of each network in a step.
            lr: Peak of the learning rate.

        Raises:
            ValueError: If the shapes do not fit each other or the networks.
        """
        x, labels = x.expand(1, -1, -1) if x.ndim == 2 else x, torch.atleast_2d(labels).float()
        vectors, answers = (self._sets(name, t) for name, t in (("x", x), ("labels", labels)))
        if x.shape[2] != self.features or labels.shape[1] != x.shape[1]:
            raise ValueError(
                f"x, labels: expected (S, N, {self.features}) and (S, N); got {tuple(x.shape)} "
                f"and {tuple(labels.shape)}"
            )
        if rows is None:
            rows = torch.arange(x.shape[1]).expand(self.networks, -1)
        n = rows.shape[1]
        batch_size = min(batch_size, n)
        per_epoch = n // batch_size
        steps, order = epochs * per_epoch, torch.arange(n)
        parameters = [t.requires_grad_() for layer in self.layers for t in layer]
        optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
        for step in range(steps):
            start = step % per_epoch * batch_size
            if not start:
                order = torch.randperm(n, generator=self.random)
            batch = rows[:, order[start : start + batch_size]]
            nats = F.binary_cross_entropy_with_logits(
                self.logits(x[vectors, batch]), labels[answers, batch], reduction="sum"
            )
            share = (step + 1) / steps
            fall = 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 20 * share) * fall
            optimizer.zero_grad()
            (nats / batch_size).backward()
            optimizer.step()
        for t in parameters:
            t.requires_grad_(False)

    def _sets(self, name: str, t: Tensor) -> Tensor:
        """The data set that each network reads, (M, 1)."""
        if self.networks % len(t):
            raise ValueError(
                f"{name}: expected a number of sets that divides the {self.networks} networks; "
                f"got {len(t)}"
            )
        return (torch.arange(self.networks) * len(t) // self.networks)[:, None]

    def select(self, networks: slice) -> Classifiers:
        """Some of the networks, which share their weights with these."""
        some = copy.copy(self)
        some.layers = [(weight[networks], bias[networks]) for weight, bias in self.layers]
        some.networks = len(some.layers[0][0])
        return some

    def logits(self, x: Tensor) -> Tensor:
        """log P(1 | x) / P(0 | x) of each network, (M, N), for x (M, N, D) or (N, D)."""
        h = x.expand(self.networks, -1, -1)
        for weight, bias in self.layers[:-1]:
            h = F.relu(torch.baddbmm(bias, h, weight))
        weight, bias = self.layers[-1]
        return torch.baddbmm(bias, h, weight)[..., 0]

    def probabilities(self, x: Tensor) -> Tensor:
        """P(1 | x) of each network, (M, N), for x (M, N, D) or (N, D)."""
        return self.logits(x).sigmoid()


def held_out(
    x: Tensor,
    labels: Tensor,
    *,
    folds: int = 5,
    hidden: Sequence[int] = (64, 64),
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """P(1 | x) of every row of S data sets, by networks that were trained on the other folds.

    All S times K networks are trained at the same time.

    Args:
        x: Vectors (S, N, D), or (N, D).
        labels: 0 or 1, (S, N), or (N,). The numbers of sets of vectors and of labels may differ
            if one of them is 1.
        folds: Number K of folds; their sizes differ by at most one row.
        hidden: Width of each hidden layer.
        seed: Random seed of the folds, the weights and the order of rows.
        **options: Further arguments of `Classifiers.fit`.

    Returns:
        Probabilities (S, N).
    """
    x, labels = x.expand(1, -1, -1) if x.ndim == 2 else x, torch.atleast_2d(labels)
    sets, n = max(len(x), len(labels)), x.shape[1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split(folds)
    others = [torch.cat([*parts[:k], *parts[k + 1 :]]) for k in range(folds)]
    least = min(map(len, others))
    rows = torch.stack([numbers[:least] for numbers in others]).repeat(sets, 1)
    networks = Classifiers(sets * folds, x.shape[2], hidden=hidden, seed=seed)
    networks.fit(x, labels, rows=rows, **options)
    found = torch.empty(sets, n)
    x = x.expand(sets, -1, -1)
    for k, part in enumerate(parts):
        found[:, part] = networks.select(slice(k, None, folds)).probabilities(x[:, part])
    return found


def vector_c2st(
    first: Tensor,
    second: Tensor,
    *,
    folds: int = 5,
    epochs: int = 200,
    seed: int = 0,
) -> Tensor:
    """Classifier two-sample test of vectors: can a small network tell two samples apart?

    The accuracy of networks of two hidden layers of 10 D units on rows of the folds that they were
    not trained on: 0.5 is perfect, 1 means that the samples do not overlap. It is the C2ST of the
    benchmark sbibm, which trains scikit-learn's `MLPClassifier` for each fold.

    Args:
        first: Vectors (N, D), or S samples of them (S, N, D). Both samples are standardized by
            the mean and the standard deviation of each feature of this one.
        second: Vectors (N, D), or (S, N, D).
        folds: Number of folds of the cross-validation.
        epochs: Passes over the rows.
        seed: Random seed.

    Returns:
        The accuracy of each of the S tests, (S,); a scalar for vectors (N, D).

    Raises:
        ValueError: If shapes differ, or values are not finite.

    Sources: Lopez-Paz & Oquab, "Revisiting classifier two-sample tests", 2017, arXiv:1610.06545;
    Lueckmann, Boelts, Greenberg, Goncalves & Macke, "Benchmarking simulation-based inference",
    2021, arXiv:2101.04653.

    Example:
        >>> x, y = torch.randn(2, 500, 2)
        >>> bool(vector_c2st(x, y) < 0.6 < vector_c2st(x, y + 2))
        True
    """
    if first.shape != second.shape or first.ndim not in (2, 3):
        raise ValueError(
            "first, second: expected two samples of one shape, (N, D) or (S, N, D); got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    mean, std = first.mean(-2, keepdim=True), first.std(-2, keepdim=True)
    x = torch.cat([(first - mean) / std, (second - mean) / std], -2).float()
    if not x.isfinite().all():
        raise ValueError(
            "first, second: some values are not finite, or all of a feature are equal"
        )
    n, d = first.shape[-2:]
    labels = torch.arange(2).repeat_interleave(n)
    found = held_out(x, labels, folds=folds, hidden=(10 * d, 10 * d), seed=seed, epochs=epochs)
    right = ((found > 0.5) == labels).double().mean(1)
    return right if first.ndim == 3 else right[0]
