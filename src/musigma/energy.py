"""Training by an unnormalized density, without data; evidence and weights of the draws.

The target is known up to its normalization: log p̃(x) = -energy(x) + const, as of a posterior, of
molecules, or of a field on a lattice. A flow q is trained by the reverse Kullback-Leibler
divergence,

    KL(q || p) = log Z - E_q[log p̃(x) - log q(x)],    Z = ∫ p̃(x) dx,

whose expectation `EvidenceBound` computes from draws of q. It is a model like any other, so `fit`
trains it. Afterwards `weigh` corrects what is left, by importance weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma import context as contexts
from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation import batch
from musigma.layers import Unconstrain, standardizers
from musigma.model import Model
from musigma.posterior import evaluation_mode
from musigma.spec import Spec
from musigma.tensors import at_least_float32
from musigma.trace import Trace
from musigma.training import Run, TrainConfig, fit

__all__ = [
    "EvidenceBound",
    "LogDensity",
    "Weighted",
    "check_density",
    "fit_energy",
    "start_rows",
    "weigh",
]

LogDensity = Callable[..., Tensor]
"""``log_density(x)``, or ``log_density(x, context)`` for a conditional flow: log p̃, nats, (B,)."""

CHECKED = 256
"""Number of draws with which a density is checked before training."""


class EvidenceBound(Model):
    r"""A flow and an unnormalized density, as a model whose ELBO is a lower bound of log Z.

    .. math:: \log w = \log\tilde p(x) - \log q(x), \quad x \sim q, \quad E_q[\log w] \le \log Z

    Training it minimizes KL(q || p). Of the examples that it is given only the number and the
    context are used: each stands for one draw of the flow. Its parameters and its state are those
    of the flow, and so is a checkpoint of it.

    Args:
        flow: An exact model with reparameterized draws.
        log_density: The log of the unnormalized density, in nats. It is not part of the model: if
            it has parameters, they are not trained.

    Raises:
        TypeError: If the flow is not `exact`.

    Example:
        >>> import musigma
        >>> bound = EvidenceBound(
        ...     musigma.build("nsf", (2,), depth=1), lambda x: -x.square().sum(1) / 2
        ... )
        >>> bound(torch.zeros(500, 2)).elbo.mean() <= math.log(2 * math.pi) + 1e-4
        tensor(True)
    """

    log_density: LogDensity

    def __init__(self, flow: Model, log_density: LogDensity):
        super().__init__()
        flow.require_exact("energy")
        self.flow, self.config, self.spec = flow, flow.config, flow.spec
        object.__setattr__(self, "log_density", log_density)  # not a part, even if it is a module

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Draw from the flow, and score the draws by both densities."""
        draws = _Draws(self.flow, context, len(x))
        value = trace.q(self.flow, draws)
        log_p = at_least_float32(_evaluated(self.log_density, value, context))
        trace.p(self, _Known(log_p), value)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Generate by the flow."""
        return self.flow.generate(trace, context)

    def variables(self) -> Iterator[nn.Module]:
        """This module itself."""
        yield self

    def latents(self) -> Iterator[nn.Module]:
        """None."""
        return iter(())

    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate the flow."""
        self.flow.calibrate(x, context)

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """That of the flow."""
        return self.flow.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """Load the state of the flow."""
        return self.flow.load_state_dict(state_dict, *args, **options)


class _Known(Distribution):
    """What has a log density that is known already, (B,)."""

    support = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __init__(self, log_prob: Tensor):
        self.log_probs = log_prob
        super().__init__(log_prob.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_probs


class _Draws(_Known):
    """Draws of a flow, which are scored in the pass that draws them."""

    has_rsample = True

    def __init__(self, flow: Model, context: Context, n: int):
        self.value, log_prob = flow.rsample_and_log_prob(n, context)
        super().__init__(log_prob)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.value


def _evaluated(log_density: LogDensity, x: Tensor, context: Context) -> Tensor:
    """The log density of draws, (B,).

    Raises:
        ValueError: If it has another shape.
    """
    log_p = log_density(x) if context is None else log_density(x, context)
    if not isinstance(log_p, Tensor) or log_p.shape != (len(x),):
        got = f"shape {tuple(log_p.shape)}" if isinstance(log_p, Tensor) else type(log_p).__name__
        raise ValueError(
            f"energy: the log density of {len(x)} draws {tuple(x.shape)} should be a tensor of "
            f"shape ({len(x)},), the nats of each; got {got}"
        )
    return log_p


def fit_energy(
    flow: Model,
    log_density: LogDensity,
    config: TrainConfig,
    out: str | Path,
    *,
    start: Dataset | None = None,
    **options: Any,
) -> Run:
    """Train a flow on an unnormalized density, and write a run folder as `fit` does.

    The figures of the run are those of `EvidenceBound`: `nats` is an upper bound of -log Z. The
    reverse KL divergence is large where q has mass and p has none, but small where q lacks a mode
    of p, so a flow may learn some of several modes; nothing in its own draws shows it.

    Args:
        flow: An exact model of the zoo.
        log_density: As in `EvidenceBound`, differentiable with respect to x.
        config: As in `fit`. An example is one draw.
        out: Run folder.
        start: Rows about where the density has its mass, such as draws from a prior, by which
            layers are calibrated; by default `start_rows`. A conditional flow needs them with the
            contexts over which KL(q || p) is averaged.
        **options: Further arguments of `fit`.

    Returns:
        The run; its model is the flow.

    Raises:
        TypeError: If the flow is not `exact`.
        ValueError: If the log density of draws of the untrained flow is not finite, has another
            shape than (B,), or has no gradient; or as in `fit`.
        TrainingError: As in `fit`.
    """
    if start is None:
        start = start_rows(flow.spec or Spec(()))
    bound = EvidenceBound(flow, log_density)
    check_density(bound, start)
    few = max(1, len(start) // 10)
    train, validation = start.subset(range(few, len(start))), start.subset(range(few))
    run = fit(bound, train, validation, config, out, **options)
    assert isinstance(run.model, EvidenceBound)
    return replace(run, model=run.model.flow)


def start_rows(spec: Spec, n: int = 4096) -> Dataset:
    """Rows by which a flow is calibrated if no others are given: standard normal.

    With a support, they are normal in the coordinates in which it is unbounded.

    Raises:
        ValueError: If the flow is conditional, or not of vectors of real numbers.
    """
    if len(spec.shape) != 1 or spec.levels is not None or spec.schema is not None:
        raise ValueError(f"energy: expected a flow of vectors of real numbers; got {spec}")
    if spec.context:
        raise ValueError(
            "start: a conditional flow needs rows with the contexts that it is trained for"
        )
    free = spec.dims if spec.support is None else spec.support.freedom
    rows = torch.randn(n, free, generator=torch.Generator().manual_seed(0))
    if spec.support is not None:
        rows, _ = Unconstrain(spec.support).inverse(rows)
    return Dataset(
        rows.numpy().astype(np.float32),
        name="standard normal rows",
        columns=spec.columns,
        support=spec.support,
    )


@torch.random.fork_rng(devices=[])
def check_density(bound: EvidenceBound, start: Dataset) -> None:
    """Check a log density on draws of a flow that is calibrated, but not trained.

    Raises:
        ValueError: If it is not finite, has another shape than (B,), or has no gradient.
    """
    flow = copy.deepcopy(bound.flow)
    for units in standardizers(flow):
        if not bool(units.calibrated):
            units.measure(start)
    x, context = batch(start, np.arange(min(CHECKED, len(start))), flow)
    flow.calibrate(x, context)
    with torch.no_grad():
        draws = flow.sample(len(x), context)
    draws.requires_grad_()
    with torch.enable_grad():
        log_p = _evaluated(bound.log_density, draws, context)
    bad = ~log_p.isfinite()
    if bool(bad.any()):
        row = ", ".join(f"{v:.4g}" for v in draws[bad][0].tolist()[:8])
        raise ValueError(
            f"energy: the log density is {log_p[bad][0].item()} for {int(bad.sum())} of "
            f"{len(x)} draws of the untrained flow, for example at ({row}); it must be finite "
            "wherever the flow has mass: give the bounds of x (--bounds), or rows near its mass"
        )
    if not log_p.requires_grad:
        raise ValueError(
            "energy: the log density has no gradient with respect to x; compute it by torch, "
            "without detach or torch.no_grad"
        )


class Weighted(NamedTuple):
    r"""Draws of a flow with importance weights for an unnormalized density.

    Attributes:
        x: The draws, (n, \*event).
        log_weights: log p̃(x) - log q(x), nats (n,).
        log_evidence: The estimate of log Z, the log of the mean weight, in nats. The mean weight
            is unbiased.
        log_evidence_error: Its standard error, to first order.
        ess: The effective sample size, :math:`(\sum w)^2 / \sum w^2`, from 1 to n.
        ess_error: Its standard error, to first order. It is itself too small if the weights have
            a heavy tail.
        largest: The share of the largest weight in the sum of all. Near 1, the estimates are
            those of one draw.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: float
    log_evidence_error: float
    ess: float
    ess_error: float
    largest: float

    def mean(self, values: Tensor) -> Tensor:
        """The self-normalized estimate of the expectation under p of values (n, ...) at x."""
        weights = self.log_weights.double().softmax(0)
        return torch.einsum("n,n...->...", weights, values.double())


def weigh(
    flow: Model,
    log_density: LogDensity,
    n: int,
    context: Context = None,
    *,
    at_once: int = 8192,
) -> Weighted:
    r"""Draw from a flow, and weigh the draws by an unnormalized density.

    .. math:: w_i = \tilde p(x_i) / q(x_i), \quad \hat Z = \frac1n \sum_i w_i

    Where p has mass and the flow has none, no draw shows it: then all figures are those of a part
    of p. Draws with log weight -inf (outside the support of p) count with weight zero.

    Args:
        flow: An exact model, however it was trained.
        log_density: As in `EvidenceBound`. It needs no gradient.
        n: Number of draws.
        context: One row, or None.
        at_once: Number of draws per pass.

    Raises:
        TypeError: If the flow is not `exact`.
        ValueError: If a weight is NaN or infinite, or all are zero.

    Example:
        >>> import musigma
        >>> flow = musigma.build("nsf", (2,), depth=1)
        >>> weighted = weigh(flow, lambda x: -x.square().sum(1) / 2, 1000)
        >>> abs(weighted.log_evidence - math.log(2 * math.pi)) < 1e-3
        True
    """
    parts, log_weights = [], []
    with evaluation_mode(flow), torch.no_grad():
        for at in range(0, n, at_once):
            size = min(at_once, n - at)
            rows = contexts.repeat(context, size)
            x, log_q = flow.sample_and_log_prob(size, rows)
            parts.append(x)
            log_weights.append(_evaluated(log_density, x, rows) - log_q)
    log_w = torch.cat(log_weights).double().cpu()
    if bool((log_w.isnan() | (log_w == math.inf)).any()) or bool((log_w == -math.inf).all()):
        raise ValueError(
            f"energy: the weights of {n:,} draws are "
            + ("all zero" if bool((log_w == -math.inf).all()) else "not finite")
            + "; look at the log density at draws of the flow"
        )
    w = (log_w - log_w.max()).exp().numpy()
    mean, square = w.mean(), (w**2).mean()
    ess = mean**2 / square
    influence = 2 * ess * (w / mean - 1) - ess * (w**2 / square - 1)  # of each draw on ESS / n
    return Weighted(
        torch.cat(parts),
        log_w,
        log_evidence=float(np.log(mean) + log_w.max().item()),
        log_evidence_error=float(w.std(ddof=1) / mean / math.sqrt(n)) if n > 1 else math.inf,
        ess=float(n * ess),
        ess_error=float(math.sqrt(n) * influence.std(ddof=1)) if n > 1 else math.inf,
        largest=float(w.max() / w.sum()),
    )
