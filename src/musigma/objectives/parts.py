"""What objectives read from a recorder, and the models that each of them refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, kl_divergence

from musigma.gaussian import DiagonalGaussian
from musigma.objectives.base import terms_of
from musigma.trace import Recorder

__all__ = [
    "Latent",
    "Observation",
    "elements",
    "kl_of_dimensions",
    "latent",
    "latent_draws",
    "log_q",
    "observation",
    "prior_draws",
    "reparameterized",
]


class Latent(NamedTuple):
    """The one latent of a model: its posterior, a draw (B, *event), and log p of the draw (B,)."""

    site: nn.Module
    q: Distribution
    z: Tensor
    log_p: Tensor


class Observation(NamedTuple):
    """The data as the likelihood sees them, and its mean given the latents: the reconstruction."""

    site: nn.Module
    x: Tensor
    mean: Tensor


def _sites(record: Recorder, name: str) -> list[nn.Module]:
    """The sites whose q depends on the data through an encoder: not dequantization noise."""
    sites = [site for site in record.draws if site not in record.below]
    if record.model.is_flow or not sites:
        raise ValueError(
            f"objective: {name} is for models with a posterior and a likelihood; a "
            f"{type(record.model).__name__} without them has none"
        )
    return sites


def latent(record: Recorder, name: str) -> Latent:
    """The latent of a model that has one.

    Raises:
        ValueError: If the model is a flow, or has several latents, whose posteriors are given the
            draws of others; `name` is that of the objective.
    """
    sites = _sites(record, name)
    if len(sites) > 1:
        raise ValueError(
            f"objective: {name} is for models with one latent, whose posterior is given the data "
            f"alone; this one draws {len(sites)}"
        )
    site = sites[0]
    q, z = record.qs[site], record.draws[site]
    if site in record.paired:
        return Latent(site, q, z, record.ps[site].log_prob(z))
    rate = terms_of(record).rate  # of the draw, because the prior is a model of its own
    return Latent(site, q, z, q.log_prob(z) - rate)


def latent_draws(record: Recorder, name: str) -> Tensor:
    """The draws of all latents from q, as one vector for each example (B, D).

    Raises:
        ValueError: If the model is a flow.
    """
    return torch.cat([record.draws[site].flatten(1) for site in _sites(record, name)], 1)


def prior_draws(record: Recorder, name: str) -> Tensor:
    """As many draws of all latents from the model, given the same context, (B, D).

    They have no gradient, so a learned prior does not follow the objective.
    """
    sites, n = _sites(record, name), len(record.x)
    if sites != record.paired or len(sites) > 1:
        dream = record.dream()
        return torch.cat([dream.draws[site].flatten(1) for site in sites], 1)
    p = record.ps[sites[0]]
    with torch.no_grad():
        return p.sample(() if p.batch_shape else (n,)).flatten(1)


def observation(record: Recorder, name: str) -> Observation:
    """The data as the likelihood sees them, and its mean, which has a gradient.

    A likelihood with an attribute `location` gives it instead of its mean.

    Raises:
        ValueError: If there is no likelihood, or its mean has no gradient.
    """
    _sites(record, name)
    latents = set(record.model.latents())
    site = next(s for s in reversed(list(record.ps)) if s not in latents)
    dist: Any = record.ps[site]
    try:
        mean = dist.location if hasattr(dist, "location") else dist.mean
    except NotImplementedError:
        mean = None
    if mean is None or (torch.is_grad_enabled() and not mean.requires_grad):
        raise ValueError(
            f"objective: {name} needs a likelihood whose mean has a gradient; that of "
            f"{type(dist).__name__} has none"
        )
    return Observation(site, record.values[site], mean)


def log_q(record: Recorder, draws: Mapping[nn.Module, Tensor]) -> Tensor:
    """log q of draws, over all sites, (B,)."""
    return torch.stack([record.qs[site].log_prob(z) for site, z in draws.items()]).sum(0)


def reparameterized(record: Recorder, name: str) -> dict[nn.Module, Tensor]:
    """The draws of q at all sites.

    Raises:
        ValueError: If there are none, or one is not reparameterized.
    """
    _sites(record, name)
    for q in record.qs.values():
        if not q.has_rsample:
            raise ValueError(
                f"objective: {name} needs reparameterized draws; those of {type(q).__name__} are "
                "not: use iwae, or a relaxed posterior"
            )
    return dict(record.draws)


# --- factorized distributions ------------------------------------------------------------------


def elements(dist: Distribution, name: str) -> Distribution:
    """The distributions of the elements of an event, which are independent: scalar events.

    Raises:
        ValueError: If the elements are not known to be independent.
    """
    while isinstance(dist, (Independent, DiagonalGaussian)) and dist.event_shape:
        dist = dist.base_dist
    if dist.event_shape:
        raise ValueError(
            f"objective: {name} needs latents whose dimensions are independent given the data; "
            f"those of {type(dist).__name__} are not known to be"
        )
    return dist


def kl_of_dimensions(record: Recorder, name: str) -> Tensor:
    """The KL divergence of every dimension of every latent from its prior, nats (B, D).

    In closed form if the pass was, and there is one; otherwise that of the draw.

    Raises:
        ValueError: If q and p of a latent were not given together, or do not factorize.
    """
    sites = _sites(record, name)
    if sites != record.paired:
        raise ValueError(
            f"objective: {name} needs a prior that factorizes over dimensions; that of this model "
            "is a model of its own"
        )

    def columns() -> Iterator[Tensor]:
        for site in sites:
            q, p = (elements(dist, name) for dist in (record.qs[site], record.ps[site]))
            if site in record.closed:
                yield kl_divergence(q, p).flatten(1)
            else:
                z = record.draws[site]
                yield (q.log_prob(z) - p.log_prob(z)).flatten(1)

    return torch.cat([*columns()], 1)
