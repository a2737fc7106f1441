"""Bounds of log p(x) from both sides, on examples that a model simulates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from musigma.context import Context, rows
from musigma.data import Dataset
from musigma.evaluation.annealing import Annealing
from musigma.evaluation.bounds import weights_of
from musigma.evaluation.inputs import Progress, batches, check, evaluating
from musigma.model import Model
from musigma.processes import SINGLE_PROCESS, Processes
from musigma.trace import Recorder

__all__ = ["Sandwich", "gap", "sandwich"]


class Sandwich(NamedTuple):
    """Bounds of log p(x) from both sides, in nats, of examples that a model simulated.

    Attributes:
        x: The examples, shape (n, *event).
        low: A number whose mean is at most log p(x), shape (n,).
        high: A number whose mean is at least log p(x), shape (n,).
        figures: Numbers (n,) that say how the weights were made (`Weights.figures`).
    """

    x: Tensor
    low: Tensor
    high: Tensor
    figures: dict[str, Tensor]


@torch.no_grad()
def sandwich(
    model: Model,
    n: int,
    context: Context = None,
    *,
    k: int = 1,
    annealing: Annealing | None = None,
) -> Sandwich:
    r"""Simulate examples, and bound their log p(x) from both sides.

    .. math:: E_{z_1 .. z_k \sim q} \log \tfrac1k \sum_i w_i \le \log p(x)
        \le E_{z_1 \sim p(z|x),\ z_2 .. z_k \sim q} \log \tfrac1k \sum_i w_i

    The latents from which the model made x are an exact draw from its posterior, so the second
    mean can be estimated, too. With annealed draws, the chain of z_1 runs backwards. Both sides
    share z_2, ..., z_k. (Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using
    bidirectional Monte Carlo", 2015, arXiv:1511.02543; for several draws, Brekelmans et al.,
    "Improving Mutual Information Estimation with Annealed and Energy-Based Bounds", 2022,
    arXiv:2303.06992.)

    Args:
        model: A model that is not exact, in evaluation mode.
        n: Number of examples. Those that had to be clamped to the levels of the data are left out.
        context: n rows, or None.
        k: Draws per example.
        annealing: How draws are annealed to the posterior; by default they are draws from q.

    Raises:
        ValueError: If k is below 1, the draws cannot be annealed, or the chains do not move.

    Example:
        >>> import musigma
        >>> model = musigma.testing.randomized(musigma.build("mlp_vae", (4,), bits=None, hidden=8))
        >>> both = sandwich(model, 200, k=10)
        >>> bool(both.low.mean() < both.high.mean())
        True
    """
    record = Recorder(generating=True, n=n)
    x, draws = model.generate(record, context), record.draws
    kept = torch.ones(n, dtype=torch.bool, device=x.device)
    for site, q in record.qs.items():
        kept &= True if q.support is None else q.support.check(draws[site])
    if not kept.any():
        raise ValueError(
            f"n: all of {n} examples that the model made were clamped to the levels of the data, "
            "so their noise says nothing of p(x); train the model further"
        )
    x, context, draws = x[kept], rows(context, kept), {s: v[kept] for s, v in draws.items()}
    weights = weights_of(model, x, context, annealing)
    others = torch.full((len(x),), -torch.inf, dtype=torch.float64, device=x.device)
    for part in weights.log_weights(k - 1) if k > 1 else ():
        others = torch.logaddexp(others, part.double().logsumexp(1))
    (last,) = weights.log_weights(1)
    ends = last[:, 0], weights.reverse(draws)
    low, high = (torch.logaddexp(others, end.double()) - math.log(k) for end in ends)
    return Sandwich(x, low, high, weights.figures())


def gap(
    model: Model,
    data: Dataset,
    *,
    k: int = 1,
    annealing: Annealing | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any]:
    """How far a bound is from log p(x), on as many examples that the model simulates as data has.

    The gap holds for data like those that the model simulates: for real data, it is that of the
    bound if the model describes them.

    Args:
        model: A model that is not exact. It is set to evaluation mode during the call.
        data: Determines the number of examples, and their context.
        k: Draws per example.
        annealing: As in `sandwich`.
        batch_size: Examples per batch.
        seed: Random seed of the examples and the draws.
        progress: Called with (done, total).
        processes: The processes that share the work.

    Returns:
        In nats, as JSON values: the mean `low` and `high` of log p(x) and their difference, `gap`,
        each with its `standard_error_...`; `n`; and the means of `Weights.figures`.

    Raises:
        TypeError: If the model is exact.
        ValueError: As `sandwich`; or if the data do not fit the model.
    """
    check(model, data)
    if model.exact:
        raise TypeError(f"gap: log p(x) of this {type(model).__name__} is exact, without a gap")
    columns: dict[str, list[Tensor]] = {}
    options: dict[str, Any] = {"seed": seed, "progress": progress, "processes": processes}
    with evaluating(model):
        for x, context in batches(model, data, batch_size=batch_size, **options):
            found = sandwich(model, len(x), context, k=k, annealing=annealing)
            row = {"low": found.low, "high": found.high, "gap": found.high - found.low}
            for name, values in (row | found.figures).items():
                columns.setdefault(name, []).append(values.cpu().double())
    share = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    return averages(processes.concatenate(share))


def averages(table: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The means of the columns (n,) that `gap` collects, with standard errors, and n."""
    n = len(table["gap"])
    figure: dict[str, Any] = {name: float(values.mean()) for name, values in table.items()}
    for name in ("low", "high", "gap"):
        error = float(table[name].std(ddof=1) / math.sqrt(n)) if n > 1 else None
        figure[f"standard_error_{name}"] = error
    return {**figure, "n": n}
