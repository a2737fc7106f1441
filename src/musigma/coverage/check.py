"""The whole check of a conditional model on pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from musigma.context import Context
from musigma.coverage.drawing import chosen_draws, draws_at, model_ranks
from musigma.coverage.local import Local, local_test
from musigma.coverage.ranks import Pairs
from musigma.coverage.result import LEAST, Coverage
from musigma.data import Dataset
from musigma.evaluation import batch
from musigma.model import Model

__all__ = ["MOST_PAIRS", "check"]

MOST_PAIRS, OBSERVATIONS = 10_000, 8
"""Pairs that are used, and observations that are tested, unless other numbers are given."""


def check(
    model: Model,
    data: Dataset,
    *,
    draws: int | None = None,
    pairs: int = MOST_PAIRS,
    tolerance: float = 0.1,
    local: int = OBSERVATIONS,
    at: Context = None,
    seed: int = 0,
    source: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Coverage:
    """Check whether the draws of a conditional model are calibrated.

    Three kinds of tests, together at a level of 5 %: the rank of each parameter among its draws
    (simulation-based calibration), the coverage of highest-density regions, which is the rank of
    log q (Hermans, Delaunoy, Rozet, Wehenkel, Begy, Louppe, "A trust crisis in simulation-based
    inference? Your posterior approximations can be unfaithful", 2022, arXiv:2110.06581), and of
    regions around references (TARP). In addition, local tests at some observations, together at a
    level of 1 % (`local_test`). `print` shows the result, `to_html` makes a page, `to_dict`
    plain data.

    Args:
        model: A model of vectors of parameters, conditioned on observations. Without an exact
            density there are no highest-density regions.
        data: Pairs that the model was not trained on: parameters as examples, observations as
            their context.
        draws: Number of draws for each pair. By default 1,000; fewer for more than 2,000 pairs.
        pairs: Largest number of pairs; of more, so many are chosen at random.
        tolerance: The smallest deviation of coverage that matters.
        local: Number of pairs, chosen at random, at whose observations draws are tested locally.
        at: Observations at which draws are tested instead, as the model takes them.
        seed: Random seed.
        source: What the pairs are called in the result.
        progress: Called with the number of pairs that are done, and their number.

    Raises:
        ValueError: If there are fewer than 20 pairs; if the model has no context, or data do not
            fit it; or if draws are not finite.

    Example:
        >>> import musigma
        >>> from musigma.data import Given
        >>> x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
        >>> data = musigma.Dataset(x[:, :2], given={"x": Given(x[:, 2:])})
        >>> model = musigma.build("nsf", data.spec(["x"]), depth=1)
        >>> print(check(model, data, draws=50, local=0).judgment.verdict)
        cannot tell
    """
    if pairs < LEAST or (draws is not None and draws < LEAST):
        name, got = ("pairs", pairs) if pairs < LEAST else ("draws", draws)
        raise ValueError(f"{name}: expected {LEAST} or more; got {got}")
    notes = []
    if len(data) > pairs:
        chosen = np.random.default_rng(seed).choice(len(data), pairs, replace=False)
        notes.append(f"The pairs are {pairs:,} of {len(data):,}, chosen at random.")
        data = data.subset(np.sort(chosen))
    if len(data) < LEAST:
        raise ValueError(
            f"data: expected {LEAST} pairs or more, and some hundred to find a deviation of "
            f"coverage of 0.1; got {len(data)}"
        )
    known, found = model_ranks(model, data, draws=draws, seed=seed, progress=progress)
    if found.region is None:
        notes.append("The model has no exact density, so there are no highest-density regions.")
    rows = np.arange(len(data)) if data.rows is None else np.asarray(data.rows)
    tests = _locally(model, data, known, rows, local, at, draws, seed)
    return Coverage(found, source, tolerance, seed, rows, tuple(notes), tests)


def _locally(
    model: Model,
    data: Dataset,
    pairs: Pairs,
    rows: np.ndarray,
    local: int,
    at: Context,
    draws: int | None,
    seed: int,
) -> Local | None:
    """The local tests that are asked for."""
    labels: tuple[str, ...] = ()
    if at is None:
        if local < 1:
            return None
        chosen = np.random.default_rng(seed).permutation(len(data))[:local]
        labels = tuple(f"row {row:,}" for row in rows[chosen])
        at = batch(data, chosen, model)[1]
    x, drawn = draws_at(model, at, draws or chosen_draws(1), seed=seed)
    return local_test(pairs, x, drawn, labels=labels, seed=seed)
