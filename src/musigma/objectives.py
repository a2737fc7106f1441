"""Objectives: functions of one pass through a model, in nats per example, to minimize.

An objective maps an `Evidence`, or a `Recorder` that holds one, to nats of shape (B,); training
minimizes their mean. Terms are summed over all dimensions of an example, so the weight of the KL
does not depend on the size of images, latents or batches. `Evidence.auxiliary` (in nats, already
weighted) is part of each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from musigma.trace import Evidence, Recorder

__all__ = [
    "OBJECTIVES",
    "beta_elbo",
    "elbo",
    "free_bits",
    "iwae",
    "objective",
    "surrogate",
    "terms_of",
]

OBJECTIVES: dict[str, Callable[..., Tensor]] = {}
"""Registered objectives by name; their keyword arguments are their options."""

F = TypeVar("F", bound=Callable[..., Tensor])


def terms_of(record: Evidence | Recorder) -> Evidence:
    """The evidence itself, or that of a recorder.

    Raises:
        ValueError: If the recorder is empty.
    """
    if isinstance(record, Evidence):
        return record
    if record.terms is None:
        raise ValueError("record: it is empty; pass it through a model, model(x, trace=record)")
    return record.terms


def surrogate(nats: Tensor, evidence: Evidence) -> Tensor:
    r"""``nats``, with a gradient that includes the score-function estimator where needed.

    .. math:: \nabla E_q[f] = E_q[\nabla f + (f - b) \nabla \log q]

    with b the mean of f over the other examples of the batch (Mnih & Rezende, 2016,
    arXiv:1602.06725). The value does not change. If every draw is reparameterized, `nats` is
    returned unchanged. `evidence.score` may have several consecutive rows for each entry of `nats`
    (several draws of one example).
    """
    if not evidence.score.requires_grad:
        return nats
    score = evidence.score.reshape(len(nats), -1).sum(1)
    fixed, n = nats.detach(), len(nats)
    baseline = (fixed.sum() - fixed) / (n - 1) if n > 1 else torch.zeros_like(fixed)
    return nats + (fixed - baseline) * (score - score.detach())


def objective(function: F) -> F:
    """Turn a function of an `Evidence` into an objective, and register it.

    The objective also takes a `Recorder`, and applies `surrogate`. Its name on the command line
    (``--objective NAME``) is that of the function, with hyphens for underscores.
    """

    @functools.wraps(function)
    def wrapped(record: Evidence | Recorder, *args: Any, **options: Any) -> Tensor:
        evidence = terms_of(record)
        within = evidence._replace(score=evidence.score.detach())  # an objective may call another
        return surrogate(function(within, *args, **options), evidence)

    wrapped.applies_surrogate = True  # pyright: ignore[reportAttributeAccessIssue]
    OBJECTIVES[function.__name__.replace("_", "-")] = wrapped
    return wrapped  # pyright: ignore[reportReturnType]


@objective
def elbo(evidence: Evidence) -> Tensor:
    """-ELBO; for a flow the negative log-likelihood or an upper bound of it. Nats, (B,).

    Example:
        >>> import torch
        >>> e = Evidence(*(torch.tensor([-2.0]), torch.tensor([[1.0]]), *torch.zeros(2, 1)))
        >>> elbo(e), beta_elbo(e, beta=4.0), free_bits(e, free=1.5)
        (tensor([3.]), tensor([6.]), tensor([3.5000]))
    """
    return -(evidence.elbo + evidence.auxiliary)


@objective
def beta_elbo(evidence: Evidence, beta: float = 1.0) -> Tensor:
    """Distortion + beta · rate (Higgins et al., "beta-VAE", 2017). Nats, (B,).

    The rate is the cost of the latents. This objective is for models with a likelihood: a flow
    has no distortion.
    """
    return beta * evidence.rate - evidence.log_px - evidence.auxiliary


@objective
def free_bits(evidence: Evidence, free: float = 0.0, *, beta: float = 1.0) -> Tensor:
    """`beta_elbo`, where each latent's KL, averaged over the batch, costs at least `free` nats.

    If the mean is not above `free`, the KL of every example is replaced by `free`, so reducing it
    further gains nothing (Kingma et al., "Improving Variational Inference with Inverse
    Autoregressive Flow", 2016, arXiv:1606.04934). The mean is over the examples of `evidence`: in
    training with several processes, or a batch in several parts (`TrainConfig.accumulate`), over
    those of one process and part, so the same batch can have another gradient. Nats, (B,).
    """
    penalized = evidence.kl.mean(0) > free
    kl = torch.where(penalized, evidence.kl, torch.full_like(evidence.kl, free)).sum(1)
    rate = kl + evidence.log_q - evidence.log_det
    return beta * rate - evidence.log_px - evidence.auxiliary


@objective
def iwae(evidence: Evidence, k: int = 1) -> Tensor:
    """-log (1/k) Σ w_i (Burda et al., 2016, arXiv:1509.00519). Nats, (B,).

    Args:
        evidence: The terms of a batch in which every example is repeated k times, without closed
            forms (``model(x.repeat_interleave(k, 0), closed_form=False)``).
        k: Draws per example.
    """
    log_w = evidence.elbo.reshape(-1, k)
    auxiliary = evidence.auxiliary.expand(len(evidence.log_px)).reshape(-1, k)
    return math.log(k) - log_w.logsumexp(1) - auxiliary.mean(1)
