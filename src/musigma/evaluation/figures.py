"""What a model makes of data: figures with their account, per-example scores, single inputs.

Every figure says what it is: exact, or which bound; how many examples; and its standard error.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.data import Dataset
from musigma.evaluation.diagnostics import ACTIVE
from musigma.evaluation.inputs import Progress, batches, check, evaluating
from musigma.evaluation.ledger import _account, _cuda, _terms
from musigma.gaussian import DiagonalGaussian
from musigma.model import Model
from musigma.processes import SINGLE_PROCESS, Processes
from musigma.trace import Trace

__all__ = ["bound", "evaluate", "inspect", "score"]


def bound(model: Model, k: int = 1) -> str:
    """What a figure of this model is: "exact", or which bound, "elbo" or "iwae-K"."""
    return "exact" if model.exact else "elbo" if k == 1 else f"iwae-{k}"


def score(
    model: Model,
    data: Dataset,
    *,
    k: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, np.ndarray]:
    """Every example's figures, in the order of the data.

    Args:
        model: It is put into evaluation mode meanwhile.
        data: What to score.
        k: Draws per example: more than one gives the importance-weighted bound.
        batch_size: Examples at a time.
        seed: Of the draws.
        progress: Called with (done, total).
        processes: Who this is, if several share the work: the columns are of its share alone.

    Returns:
        Columns of length N: `bits_per_dim` and `nats` (-log p or its upper bound); and, of one
        draw, `log_px`, `rate`, and `kl_0`, `kl_1`, ... for each latent, in nats.

    Raises:
        ValueError: If the data do not fit, or k is below 1.
    """
    check(model, data)
    if k < 1:
        raise ValueError(f"k: expected 1 or more draws; got {k}")
    columns: dict[str, list[Tensor]] = {}
    with torch.no_grad(), evaluating(model), torch.random.fork_rng(_cuda(model)):
        for x, context in batches(
            model,
            data,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            processes=processes,
        ):
            trace = _account(model, x, context)
            evidence = trace.evidence(model.latents())
            tight = k > 1 and not model.exact
            nats = -model.iwae(x, k, context) if tight else sum(v for _, _, v in _terms(trace))
            row = {"nats": nats, "log_px": evidence.log_px, "rate": evidence.rate}
            row |= {f"kl_{i}": evidence.kl[:, i] for i in range(evidence.kl.shape[1])}
            for name, value in row.items():
                columns.setdefault(name, []).append(torch.as_tensor(value).cpu().double())
    table = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    if not table:
        return {}  # more processes than batches
    dims = math.prod(data.shape)
    return {"bits_per_dim": table["nats"] / (dims * math.log(2)), **table}


def evaluate(
    model: Model,
    data: Dataset,
    *,
    k: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any]:
    """The mean figure of a data set, with its account; JSON-plain. Arguments as `score`.

    Several processes each score their share, and all return the figure of the whole: the same one,
    to the bit, whatever their number.

    Returns:
        `bits_per_dim` with its `standard_error`; `nats` per example with `standard_error_nats`;
        `bound`: "exact" (-log p itself), "elbo" or "iwae-K" (upper bounds of it); `n`; `log_px`,
        `rate` and `kl` (per latent, top first) in nats; `non_finite`: how many examples had no
        finite figure; they are left out of none of the means.
    """
    if len(data) == 0:
        raise ValueError(f"data: {data.name or 'the set'} holds no examples to evaluate")
    table = processes.concatenate(
        score(
            model,
            data,
            k=k,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
            processes=processes,
        )
    )
    n, nats, bits = len(data), table["nats"], table["bits_per_dim"]

    def error(values: np.ndarray) -> float | None:
        with np.errstate(invalid="ignore"):  # of inf it is nan
            return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None

    return {
        "bits_per_dim": float(bits.mean()),
        "standard_error": error(bits),
        "nats": float(nats.mean()),
        "standard_error_nats": error(nats),
        "bound": bound(model, k),
        "n": n,
        "log_px": float(table["log_px"].mean()),
        "rate": float(table["rate"].mean()),
        "kl": [float(v.mean()) for name, v in table.items() if name.startswith("kl_")],
        "non_finite": int((~np.isfinite(nats)).sum()),
    }


@torch.no_grad()
def inspect(model: Model, x: Tensor, context: Tensor | None = None) -> dict[str, Any]:
    """What a model says about one very input: every latent's distribution, and its cost.

    Args:
        model: It is put into evaluation mode meanwhile.
        x: One example, shape (1, ...).
        context: Its context (1, C), or None.

    Returns:
        The figures of this example (`nats`, `bits_per_dim`), and for each latent, top first, a row
        with `site` and `shape`; for a latent with a posterior, its `mean`, `std`, `variance`,
        `log_std` and, unless the prior is a flow, `kl` for each element, and which are `active`
        (KL above 0.01 nats); for a latent of a flow, the `mean` and `log_std` of its prior given
        this input, its `value` and its whitened `noise`, as (mean, std, min, max) over the
        elements.

    Raises:
        ValueError: If x is not one example.
    """
    if len(x) != 1:
        raise ValueError(f"x: expected one example, shape (1, ...); got {len(x)} of them")
    names = {module: name or "model" for name, module in model.named_modules()}
    trace = _Watching(closed_form=not model.exact)
    with evaluating(model):
        model.infer(model.floating(x), trace, context)
    evidence = trace.evidence(model.latents())
    rows = []
    for site in trace.paired:
        q, p = trace.paired[site]
        row: dict[str, Any] = {"site": names[site], "shape": list(q.event_shape)}
        if isinstance(q, DiagonalGaussian):
            row |= {
                "mean": q.mean[0].tolist(),
                "std": q.stddev[0].tolist(),
                "variance": q.variance[0].tolist(),
                "log_std": q.log_std[0].tolist(),
            }
        if isinstance(q, DiagonalGaussian) and isinstance(p, DiagonalGaussian):
            single = DiagonalGaussian(q.mean, q.log_std, 0), DiagonalGaussian(p.mean, p.log_std, 0)
            kl = torch.distributions.kl_divergence(*single)[0]
            row |= {
                "kl": kl.tolist(),
                "kl_total": float(kl.sum()),
                "active": (kl > ACTIVE).tolist(),
            }
        rows.append(row)
    for site, (p, value) in trace.scored.items():
        if site not in set(model.latents()) or not isinstance(p, DiagonalGaussian):
            continue
        rows.append(
            {
                "site": names[site],
                "shape": list(p.event_shape),
                "prior_mean": _summary(p.mean),
                "prior_log_std": _summary(p.log_std),
                "value": _summary(value),
                "noise": _summary(p.whiten(value)),
                "nats": float(-p.log_prob(value)),
            }
        )
    order = [names[site] for site in model.latents()]
    rows.sort(key=lambda row: order.index(row["site"]) if row["site"] in order else -1)
    nats = float(-evidence.elbo)
    return {
        "nats": nats,
        "bits_per_dim": nats / (math.log(2) * x[0].numel()),
        "bound": bound(model),
        "latents": rows,
    }


class _Watching(Trace):
    """A trace that keeps the distributions themselves."""

    def __init__(self, **how: Any):
        super().__init__(**how)
        self.paired: dict[nn.Module, tuple[Any, Any]] = {}
        self.scored: dict[nn.Module, tuple[Any, Tensor]] = {}

    def p(self, site, dist, value=None):
        value = super().p(site, dist, value)
        self.scored[site] = (dist, value)
        return value

    def q(self, site, dist, value=None):
        if isinstance(dist, DiagonalGaussian):
            self.paired[site] = (dist, None)
        return super().q(site, dist, value)

    def latent(self, site, q, p):
        self.paired[site] = (q, p)
        return super().latent(site, q, p)


def _summary(t: Tensor) -> dict[str, float]:
    return {
        "mean": float(t.mean()),
        "std": float(t.std(correction=0)),
        "min": float(t.min()),
        "max": float(t.max()),
    }
