"""What a model makes of data: figures with their account, per-example scores, single inputs.

Every figure says what it is: exact, or which bound; how many examples; and its standard error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from musigma.data import Dataset
from musigma.distributions import LikelihoodHead
from musigma.gaussian import DiagonalGaussian, GaussianHead, channels_last
from musigma.layers import Coupling
from musigma.model import Model
from musigma.processes import ALONE, Processes
from musigma.trace import Trace

__all__ = [
    "batch",
    "batches",
    "check",
    "evaluate",
    "inspect",
    "ledger",
    "noise",
    "saturation",
    "score",
]

Progress = Callable[[int, int], None]

ACTIVE = 0.01
"""Nats: a unit that costs less carries nothing."""
COLLAPSED = 0.05
"""Nats: a latent that costs less has collapsed to its prior."""
SATURATED = 0.5
"""The share of scales at their limit from which that is worth a word."""


def check(model: Model, data: Dataset) -> None:
    """Refuse data that a model from the zoo was not built for.

    Raises:
        ValueError: If shapes or bits differ, or labels are needed that the data lack.
    """
    shape, bits = model.config.get("shape"), model.config.get("options", {}).get("bits", data.bits)
    if shape is not None and list(data.shape) != list(shape):
        hint = ""
        if len(data.shape) == len(shape) == 3:
            if data.shape[0] != shape[0]:
                names = {1: "grey", 3: "colour"}
                kinds = [names.get(c, f"{c}-channel") for c in (shape[0], data.shape[0])]
                hint = f"; the model is for {kinds[0]} images, and these are {kinds[1]}"
            else:
                size = shape[1] if shape[1] == shape[2] else f"{shape[1]}x{shape[2]}"
                hint = f"; --size {size} resizes the images"
        raise ValueError(
            f"data: the model takes examples of shape {tuple(shape)}, and {data.name or 'these'} "
            f"have {tuple(data.shape)}{hint}"
        )
    if bits != data.bits:
        wanted, got = (
            "continuous values" if b is None else f"{b}-bit levels" for b in (bits, data.bits)
        )
        raise ValueError(
            f"data: the model takes {wanted}, and {data.name or 'these data'} hold {got}"
        )
    classes = context_size(model)
    if classes and (data.labels is None or len(data.label_names) != classes):
        raise ValueError(
            f"data: the model is conditioned on {classes} classes, and {data.name or 'this'} "
            f"have {len(data.label_names) if data.labels is not None else 'no labels'}"
        )


def bound(model: Model, k: int = 1) -> str:
    """What a figure of this model is: "exact", or which bound, "elbo" or "iwae-K"."""
    return "exact" if model.exact else "elbo" if k == 1 else f"iwae-{k}"


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The model in evaluation mode, and then in the mode it was in."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def context_size(model: Model) -> int:
    """How many classes a model from the zoo is conditioned on; 0: none."""
    return int(model.config.get("options", {}).get("context", 0))


def batch(
    data: Dataset, indices: np.ndarray, model: Model, *, seed: int = 0, step: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Examples and their context (one-hot labels, if the model wants any), where the model is."""
    labels = None if data.labels is None else data.labels[indices]
    return at_home(data.take(indices, seed=seed, step=step), labels, model)


def at_home(
    x: np.ndarray, labels: np.ndarray | None, model: Model
) -> tuple[Tensor, Tensor | None]:
    """Examples and context for a model, on its device and in its type; levels travel as bytes."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    home = next(t for t in tensors if t.is_floating_point())
    examples = channels_last(torch.from_numpy(x).to(home.device).to(home.dtype))
    if not (classes := context_size(model)):
        return examples, None
    assert labels is not None  # `check` has seen to it
    given = torch.from_numpy(labels).to(home.device)
    return examples, nn.functional.one_hot(given, classes).to(home)


def noise(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generator for a step, as a function of the seed and of these."""
    number = ((seed * 1_000_003 + step) * 4_099 + rank) % 2**63
    torch.default_generator.manual_seed(number)  # manual_seed wakes all other devices, each time
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


def batches(
    model: Model,
    data: Dataset,
    *,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All examples in order, or one process's share of these batches.

    Binarization, and torch's generator while a batch is worked on, are functions of the seed and
    the number of the batch: what is drawn does not depend on who draws it.
    """
    starts = range(0, len(data), batch_size)
    for i in range(len(starts))[processes.share(len(starts))]:
        indices = np.arange(starts[i], min(starts[i] + batch_size, len(data)))
        examples = batch(data, indices, model, seed=seed, step=i)
        noise(seed, i)
        yield examples
        if progress:
            progress(int(indices[-1]) + 1, len(data))


def score(
    model: Model,
    data: Dataset,
    *,
    k: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = ALONE,
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


def evaluate(
    model: Model,
    data: Dataset,
    *,
    k: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes = ALONE,
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
    table = processes.joined(
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


@torch.no_grad()
def saturation(model: Model, x: Tensor, context: Tensor | None = None) -> dict[str, float]:
    """For every network whose output a `Format` reads, the share of scales at their limit."""
    shares: dict[str, float] = {}

    def watch(name: str, reader: Any):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            read = reader.scales(output) if isinstance(reader, LikelihoodHead) else output
            shares[name] = float(reader.format.saturation(read))

        return hook

    hooks = []
    for name, module in model.named_modules():
        emits = (
            (isinstance(module, GaussianHead) and module.emitted)
            or (isinstance(module, Coupling) and module.kind == "affine")
            or (isinstance(module, LikelihoodHead) and module.name.startswith("logistic"))
        )
        if emits:
            hooks.append(module.net.register_forward_hook(watch(name, module)))  # pyright: ignore
    try:
        model(x, context)
    finally:
        for hook in hooks:
            hook.remove()
    return shares


def _cuda(model: Model) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.is_cuda})
