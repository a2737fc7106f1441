"""The ledger of a figure: every term of every layer, in bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from musigma.data import Dataset
from musigma.evaluation.inputs import batches, check, evaluating
from musigma.model import Model
from musigma.spec import bits_per_dim
from musigma.trace import Trace

__all__ = ["bits_per_dim", "ledger"]


@torch.no_grad()
def ledger(
    model: Model, data: Dataset, *, batch_size: int = 64, seed: int = 0
) -> list[dict[str, Any]]:
    """Every term of every layer, in bits per dimension and in the order of inference.

    Returns:
        Rows of `site` (the name of the module), `kind` (its type), `term` ("log_det", "log_q",
        "log_p" or "kl") and `bits_per_dim`, the mean contribution to -log w. They add up to the
        figure of `evaluate` on the same data with the same seed.
    """
    check(model, data)
    sums: dict[tuple[nn.Module, str], float] = {}
    with evaluating(model):
        for x, context in batches(model, data, batch_size=batch_size, seed=seed):
            trace = Trace(closed_form=not model.exact)
            model(x, context, trace=trace)
            for site, term, nats in trace.entries():
                total = float(nats.cpu().double().sum())
                sums[site, term] = sums.get((site, term), 0.0) + total
    dims, order = len(data) * math.prod(data.shape), list(model.modules())
    return [
        {
            "site": model.site_names()[site],
            "kind": type(site).__name__,
            "term": term,
            "bits_per_dim": bits_per_dim(nats, dims),
        }
        for (site, term), nats in sorted(sums.items(), key=lambda item: order.index(item[0][0]))
    ]
