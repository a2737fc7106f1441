"""Figures of a model on data: scores of examples, means, ledgers of terms, single inputs.

Every figure comes with its bound (or "exact"), the number of examples, and its standard error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation.annealing import Annealing
from musigma.evaluation.bounds import draws_of, weighed, weights_of
from musigma.evaluation.diagnostics import ACTIVE, reported
from musigma.evaluation.inputs import Progress, batches, check, evaluating
from musigma.model import Model
from musigma.processes import SINGLE_PROCESS, Processes
from musigma.spec import bits_per_dim
from musigma.trace import Recorder, Trace

__all__ = ["bound", "evaluate", "inspect", "ledger", "mean", "score"]


COLUMNS = ("log_px", "rate", "spread", "ess", "acceptance")
"""The columns of tables of scores, beside those of latents, `nats` and `bits_per_dim`."""


def bound(model: Model, k: int | Sequence[int] = 1, annealing: Annealing | None = None) -> str:
    """The kind of a figure of this model: "exact", "elbo", "iwae-K" or "ais-K"."""
    if model.exact:
        return "exact"
    most = draws_of(k)[-1]
    if annealing is not None:
        return f"ais-{most}"
    return "elbo" if most == 1 else f"iwae-{most}"


def score(
    model: Model,
    data: Dataset,
    *,
    k: int | Sequence[int] = 1,
    annealing: Annealing | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, np.ndarray]:
    """The figures of every example, in the order of the data.

    Args:
        model: The model. It is set to evaluation mode during the call.
        data: The examples to score.
        k: Draws per example; more than 1 gives the importance-weighted bound. Several numbers
            give the bounds of each, from the same draws. Memory does not grow with them.
        annealing: How draws are annealed to the posterior, for a tighter bound; by default they
            are draws from q.
        batch_size: Examples per batch.
        seed: Random seed of the draws.
        progress: Called with (done, total).
        processes: The processes that share the work; this one scores its share.

    Returns:
        Columns of length N: `bits_per_dim` and `nats` (-log p or its upper bound); and, from one
        draw, `log_px`, `rate`, and `kl_0`, `kl_1`, ... of each latent, top first, in nats. For a
        mixture, of the members of an ensemble or of several orders of the columns, also `spread`,
        the standard deviation of the nats of one of them. With several draws, `ess`, their
        effective sample size (`weighed`); for several k, `nats_K` and `bits_per_dim_K` of the
        smaller ones; with annealing, `acceptance` (`Chains.figures`). Then whatever the model
        reports by `Trace.figure`, NaN where an example has no such figure.

    Raises:
        ValueError: If the data do not fit the model, k is below 1, or draws cannot be annealed.
    """
    check(model, data)
    ks = draws_of(k)
    columns: dict[str, list[Tensor]] = {}
    shared = batches(
        model, data, batch_size=batch_size, seed=seed, progress=progress, processes=processes
    )
    with torch.no_grad(), evaluating(model):
        for x, context in shared:
            row = _of_mixture(model, x, context) or _of_trace(model, x, context, ks, annealing)
            for name, value in row.items():
                columns.setdefault(name, []).append(torch.as_tensor(value).cpu().double())
    table = {name: torch.cat(columns.pop(name)).numpy() for name in [*columns]}  # one at a time
    if not table:
        return {}  # more processes than batches
    nats = [name for name in table if name.partition("_")[0] == "nats"]
    dims = math.prod(data.shape)
    bits = {f"bits_per_dim{name[4:]}": bits_per_dim(table[name], dims) for name in nats}
    return bits | table


def _of_trace(
    model: Model, x: Tensor, context: Context, ks: Sequence[int], annealing: Annealing | None
) -> dict[str, Any]:
    """The figures of some examples from the terms of one pass, and from further draws."""
    trace = Trace(closed_form=not model.exact)
    evidence = model(x, context, trace=trace)
    more: dict[str, Any] = {}
    if annealing is not None or (ks[-1] > 1 and not model.exact):
        weights = weights_of(model, x, context, annealing)
        bounds, ess = weighed(weights.log_weights(ks[-1]), ks)
        *others, nats = (-bounds).unbind(1)
        more = {f"nats_{k}": column for k, column in zip(ks, others, strict=False)}
        more |= {"ess": ess, **weights.figures()}
    else:  # in float64, so that the rows of the ledger add up to it
        nats = sum(nats.cpu().double() for _, _, nats in trace.entries())
    row = {"nats": nats, "log_px": evidence.log_px, "rate": evidence.rate}
    row |= {f"kl_{i}": column for i, column in enumerate(evidence.kl.unbind(1))}
    return row | more | trace.figures


def _of_mixture(model: Model, x: Tensor, context: Context) -> dict[str, Any]:
    """The figures of some examples under a mixture; none if the model is a single density."""
    each = model.log_prob_each(x, context)
    if each is None:
        return {}
    nats = math.log(each.shape[1]) - each.logsumexp(1)
    return {"nats": nats, "spread": each.std(1), "log_px": 0 * nats, "rate": nats, "kl_0": nats}


def evaluate(
    model: Model,
    data: Dataset,
    *,
    k: int | Sequence[int] = 1,
    annealing: Annealing | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
) -> dict[str, Any]:
    """The mean figure of a data set and its parts, as JSON values; arguments as in `score`.

    Several processes each score their share; all return the figure of the whole, which is the
    same to the bit for any number of processes.

    Returns:
        `bits_per_dim` with its `standard_error`; `nats` per example with `standard_error_nats`;
        `bound`: "exact" (-log p itself), "elbo", "iwae-K" or "ais-K" (upper bounds of it); `n`;
        `log_px`, `rate` and `kl` (per latent, top first) in nats; `non_finite`: the number of
        examples without a finite figure, which are included in all means; for a mixture `spread`,
        with its `standard_error_spread`; with several draws, `ess` and `ess_lowest`, the mean and
        the least effective sample size; for several k, `curve`, with a row for each k, `k` and the
        first four figures, of which the last are the others above; with annealing, `acceptance`;
        and `figures`, if there are any: what the model reports by
        `Trace.figure` (means over the examples that have it), and what its modules report by
        ``figures()``, a dict of numbers, under "module.figure".

    Raises:
        ValueError: If there are no examples, or as `score`.
    """
    how: dict[str, Any] = {"k": k, "annealing": annealing, "seed": seed}
    how |= {"batch_size": batch_size, "progress": progress, "processes": processes}
    return mean(model, scores(model, data, **how), k, annealing)


def scores(
    model: Model, data: Dataset, *, processes: Processes = SINGLE_PROCESS, **how: Any
) -> dict[str, np.ndarray]:
    """What `score` returns for all examples, in each of the processes that share the work.

    Raises:
        ValueError: As `score`, or if there are no examples.
    """
    if len(data) == 0:
        raise ValueError(f"data: {data.name or 'the set'} holds no examples to evaluate")
    return processes.concatenate(score(model, data, processes=processes, **how))


def mean(
    model: Model,
    table: Mapping[str, np.ndarray],
    k: int | Sequence[int] = 1,
    annealing: Annealing | None = None,
) -> dict[str, Any]:
    """The mean figure of examples from their scores, as `evaluate` returns it.

    Args:
        model: The model that scored them.
        table: What `score` returned, at least one row.
        k: Draws per example, as `score` took it.
        annealing: As `score` took it.
    """
    n = len(table["nats"])
    means = {name: float(values.mean()) for name, values in table.items()}

    def error(name: str) -> float | None:
        with np.errstate(invalid="ignore"):  # it is NaN where a value is infinite
            return float(table[name].std(ddof=1) / math.sqrt(n)) if n > 1 else None

    def both_units(of: str = "") -> dict[str, float | None]:
        return {
            "bits_per_dim": means[f"bits_per_dim{of}"],
            "standard_error": error(f"bits_per_dim{of}"),
            "nats": means[f"nats{of}"],
            "standard_error_nats": error(f"nats{of}"),
        }

    figure = {
        **both_units(),
        "bound": bound(model, k, annealing),
        "n": n,
        "log_px": means["log_px"],
        "rate": means["rate"],
        "kl": [mean for name, mean in means.items() if name.startswith("kl_")],
        "non_finite": int((~np.isfinite(table["nats"])).sum()),
    }
    if "spread" in table:
        figure |= {"spread": means["spread"], "standard_error_spread": error("spread")}
    if "ess" in table:
        figure |= {"ess": means["ess"], "ess_lowest": float(table["ess"].min())}
        *fewer, most = draws_of(k)
        curve = [{"k": few, **both_units(f"_{few}")} for few in fewer]
        figure |= {"curve": [*curve, {"k": most, **both_units()}]} if fewer else {}
    figure |= {name: means[name] for name in ("acceptance",) if name in table}
    known = ("nats", "bits_per_dim", "kl_")
    others = [name for name in table if name not in COLUMNS and not name.startswith(known)]
    figures = {name: _mean_of_some(table[name]) for name in others} | reported(model)
    return figure | ({"figures": figures} if figures else {})


def _mean_of_some(values: np.ndarray) -> float | None:
    """The mean of the values that are not NaN; None if all are."""
    some = values[~np.isnan(values)]
    return float(some.mean()) if len(some) else None


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
    dims, names = len(data) * math.prod(data.shape), model.site_names()
    order = list(names)
    return [
        {
            "site": names[site],
            "kind": type(site).__name__,
            "term": term,
            "bits_per_dim": bits_per_dim(nats, dims),
        }
        for (site, term), nats in sorted(sums.items(), key=lambda item: order.index(item[0][0]))
    ]


@torch.no_grad()
def inspect(model: Model, x: Tensor, context: Context = None) -> dict[str, Any]:
    """The distribution of every latent for one input, and its cost.

    Args:
        model: The model. It is set to evaluation mode during the call.
        x: One example, shape (1, *event).
        context: Its context, one row, or None.

    Returns:
        The figures of this example (`nats`, `bits_per_dim`, `bound`), and in `latents` a row for
        each latent, top first, with `site` and `shape`. A latent with a posterior has its `mean`,
        `std`, `variance` and `log_std`; where its prior is known before the draw, `kl_total`, and
        for independent elements with a closed form also `kl` of each, and whether it is `active`
        (above 0.01 nats). A latent of a flow has its `value`, its `nats`, and for a Gaussian prior
        `prior_mean`, `prior_log_std` and the whitened `noise`, as (mean, std, min, max) over the
        elements. Moments that a distribution does not define are left out.

    Raises:
        ValueError: If x is not one example.
    """
    if len(x) != 1:
        raise ValueError(f"x: expected one example, shape (1, ...); got {len(x)} of them")
    names, record = model.site_names(), Recorder(closed_form=not model.exact)
    with evaluating(model):
        evidence = model(x, context, trace=record)
    rows: dict[Any, dict[str, Any]] = {}
    for site, q in record.qs.items():
        if getattr(site, "is_preprocessing", False):
            continue  # noise of dequantization
        row: dict[str, Any] = {"site": names[site], "shape": list(q.event_shape)}
        row |= {name: t[0].tolist() for name, t in _moments(q).items()}
        if site in record.paired:
            row["kl_total"] = float(record.kl[site])
            if (kl := _elementwise_kl(q, record.ps[site])) is not None:
                row |= {"kl": kl.tolist(), "kl_total": float(kl.sum())}
                row["active"] = (kl > ACTIVE).tolist()
        rows[site] = row
    latents = list(model.latents())
    for site in latents:
        if site in record.paired:
            continue
        p, value = record.ps[site], record.values[site]
        row = {"site": names[site], "shape": list(p.event_shape)}
        moments = _moments(p)
        row |= {f"prior_{n}": _summary(moments[n]) for n in ("mean", "log_std") if n in moments}
        row["value"] = _summary(value)
        if hasattr(p, "whiten"):
            row["noise"] = _summary(p.whiten(value))  # pyright: ignore[reportAttributeAccessIssue]
        row["nats"] = float(-p.log_prob(value))
        rows[site] = row
    order = [*(site for site in rows if site not in latents), *latents]
    nats = float(-evidence.elbo)
    return {
        "nats": nats,
        "bits_per_dim": bits_per_dim(nats, x[0].numel()),
        "bound": bound(model),
        "latents": [rows[site] for site in order],
    }


def _moments(dist: Distribution) -> dict[str, Tensor]:
    """The moments that a distribution defines."""
    moments: dict[str, Tensor] = {}
    with contextlib.suppress(NotImplementedError, AttributeError):
        moments["mean"] = dist.mean
        moments["std"], moments["variance"] = dist.stddev, dist.variance
        log_std = getattr(dist, "log_std", None)
        moments["log_std"] = moments["std"].log() if log_std is None else log_std
    return moments


def _elementwise_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """KL of each element in nats; None if elements are dependent or there is no closed form."""
    try:
        return kl_divergence(q.base_dist, p.base_dist)[0]  # pyright: ignore
    except (AttributeError, NotImplementedError):
        return None


def _summary(t: Tensor) -> dict[str, float]:
    return {
        "mean": float(t.mean()),
        "std": float(t.std(correction=0)),
        "min": float(t.min()),
        "max": float(t.max()),
    }
