"""The account of a figure: every term of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from musigma.data import Dataset
from musigma.evaluation.inputs import batches, check, evaluating
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["ledger"]


def _account(model: Model, x: Tensor, context: Tensor | None) -> Trace:
    """The trace of a batch, with closed forms where a bound is all there is."""
    trace = Trace(closed_form=not model.exact)
    model.infer(model.floating(x), trace, context)
    return trace


def _terms(trace: Trace) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(site, term, contribution to -log w) in float64, so that sums of them are the same sums."""
    for term, sign in (("log_det", -1), ("log_q", 1), ("kl", 1), ("log_p", -1)):
        for site, value in getattr(trace, term).items():
            yield site, term, sign * value.cpu().double()


@torch.no_grad()
def ledger(
    model: Model, data: Dataset, *, batch_size: int = 64, seed: int = 0
) -> list[dict[str, Any]]:
    """The account of bits per dimension: every term of every layer, in the order of inference.

    Returns:
        Rows of `site` (the module's name), `kind`, `term` ("log_det", "log_q", "log_p" or "kl")
        and `bits_per_dim`, the mean contribution to -log w. They add up to the figure that
        `evaluate` gives for the same data and seed.
    """
    check(model, data)
    names = {module: name or "model" for name, module in model.named_modules()}
    sums: dict[tuple[nn.Module, str], float] = {}
    with evaluating(model), torch.random.fork_rng(_cuda(model)):
        for x, context in batches(model, data, batch_size=batch_size, seed=seed):
            for site, term, value in _terms(_account(model, x, context)):
                sums[site, term] = sums.get((site, term), 0.0) + float(value.sum())
    order = {module: i for i, module in enumerate(model.modules())}
    unit = len(data) * math.prod(data.shape) * math.log(2)
    return [
        {
            "site": names[site],
            "kind": type(site).__name__,
            "term": term,
            "bits_per_dim": total / unit,
        }
        for (site, term), total in sorted(sums.items(), key=lambda item: order[item[0][0]])
    ]


def _cuda(model: Model) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})
