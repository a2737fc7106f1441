"""Pairs and draws of a conditional model, in parts of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from musigma import context as contexts
from musigma.coverage.ranks import Pairs, Part, Ranks, ranks
from musigma.data import Dataset
from musigma.evaluation import batches, check, evaluating, noise
from musigma.model import Model

__all__ = ["chosen_draws", "draw_parts", "draws_at", "model_pairs", "model_ranks"]

ROWS = 2**15
"""Draws that are made at once."""

MOST_DRAWS, LEAST_DRAWS, ALL_DRAWS = 1_000, 200, 2_000_000
"""Draws of a pair, and of all pairs together, unless they are given."""


def chosen_draws(pairs: int) -> int:
    """The number of draws for each of so many pairs: 1,000, or fewer for more than 2,000 pairs.

    Ranks are uniform for any number of draws; more of them show smaller deviations in the tails.

    >>> chosen_draws(500), chosen_draws(5000), chosen_draws(100_000)
    (1000, 400, 200)
    """
    return int(np.clip(ALL_DRAWS // max(pairs, 1), LEAST_DRAWS, MOST_DRAWS))


def model_ranks(
    model: Model,
    data: Dataset,
    *,
    draws: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Pairs, Ranks]:
    """The ranks of the parameters of a data set among draws of a model given their context.

    Args:
        model: A conditional model of vectors. If it is not `exact`, there are no densities.
        data: The pairs: parameters as examples, observations as their context.
        draws: Number of draws for each pair; by default `chosen_draws`.
        seed: Random seed.
        progress: Called with the number of pairs that are done, and their number.

    Raises:
        ValueError: If the model has no context, or models images; if data do not fit it; if there
            are no pairs; or if draws are not finite.
    """
    pairs = model_pairs(model, data, seed=seed)
    parts = draw_parts(model, data, draws or chosen_draws(len(data)), seed=seed)
    return pairs, ranks(pairs, parts, seed=seed, progress=progress)


def model_pairs(model: Model, data: Dataset, *, seed: int = 0) -> Pairs:
    """Pairs of a data set with one draw, and the density of a model where it is exact."""
    spec = model.spec
    if spec is None or not spec.context:
        raise ValueError(
            "model: it is conditioned on nothing, so it has no posterior; give one that was built "
            "with a context"
        )
    if len(spec.shape) != 1:
        raise ValueError(
            f"model: expected one of vectors of parameters; its examples have shape {spec.shape}"
        )
    check(model, data)
    if not len(data):
        raise ValueError("data: there are no pairs")
    found: dict[str, list[np.ndarray]] = {"theta": [], "x": [], "first": [], "log_q": []}
    with evaluating(model), torch.no_grad():
        for theta, context in batches(model, data, batch_size=1024, seed=seed):
            found["theta"].append(theta.numpy(force=True))
            found["x"].append(_flat(context))
            found["first"].append(_finite(model, model.sample(len(theta), context)))
            if model.exact:
                found["log_q"].append(model.log_prob(theta, context).numpy(force=True))
    joined: dict[str, Any] = {k: np.concatenate(v) if v else None for k, v in found.items()}
    return Pairs(**joined, names=spec.columns)


def draw_parts(model: Model, data: Dataset, draws: int, *, seed: int = 0) -> Iterator[Part]:
    """Draws (B, L, D) of a model for some pairs at a time, with log q (B, L) where it is exact.

    Args:
        model: The model.
        data: The pairs.
        draws: L.
        seed: Random seed.
    """
    size = max(1, ROWS // draws)
    with evaluating(model), torch.no_grad():
        for i, (theta, context) in enumerate(batches(model, data, batch_size=size, seed=seed)):
            noise(seed + 1, i)  # other draws than those of `model_pairs`
            yield _draws(model, len(theta), context, draws)


def draws_at(
    model: Model, context: Any, draws: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Observations (O, F) as numbers, and draws (O, L, D) of a model at each of them.

    Args:
        model: The model.
        context: The observations, as the model takes them.
        draws: L.
        seed: Random seed.
    """
    found = []
    with evaluating(model), torch.no_grad():
        for i in range(contexts.length(context) or 0):
            noise(seed + 2, i)
            found.append(_draws(model, 1, contexts.rows(context, slice(i, i + 1)), draws)[0])
    return _flat(context), np.concatenate(found)


def _draws(model: Model, n: int, context: Any, draws: int) -> Part:
    """Draws for each of n rows of a context, and their densities."""
    if not model.exact:
        drawn = model.sample(n * draws, contexts.repeat(context, draws))
        return _finite(model, drawn.reshape(n, draws, -1)), None
    drawn, log_q = model.as_distribution(context).sample_and_log_prob((draws,))  # pyright: ignore
    return _finite(model, drawn.transpose(0, 1)), log_q.T.numpy(force=True)


def _finite(model: Model, draws: torch.Tensor) -> np.ndarray:
    """Draws as an array. NaN is a missing value where columns are typed, otherwise an error."""
    typed = model.spec is not None and model.spec.schema is not None
    wrong = (draws.isinf() if typed else ~draws.isfinite()).any(-1)
    if bad := int(wrong.sum()):
        raise ValueError(f"draws: {bad:,} of {wrong.numel():,} draws of the model are not finite")
    return draws.numpy(force=True)


def _flat(context: Any) -> np.ndarray:
    """A context as one row of numbers for each example."""
    tensors = [context] if isinstance(context, torch.Tensor) else [*context.values()]
    return np.concatenate([t.reshape(len(t), -1).numpy(force=True) for t in tensors], 1)
