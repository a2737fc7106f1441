"""The joint density of the draws of a model, tempered, and moves that leave it as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from musigma import context as contexts
from musigma.context import Context
from musigma.model import Model
from musigma.trace import Recorder

__all__ = ["Joint", "Move", "Point"]


class Point(NamedTuple):
    """Densities at a point, in nats.

    Attributes:
        u: The point, shape (R, D).
        start: log f_0, shape (R,).
        end: log f_1 = log p(x, z), shape (R,).
        log_f: The tempered log density of u, with its gradient; shape (R,).
        gradient: Shape (R, D).
    """

    u: Tensor
    start: Tensor
    end: Tensor
    log_f: Tensor
    gradient: Tensor


class Move(NamedTuple):
    """Where a move ends.

    Attributes:
        u: The point, shape (R, D): the last one if the proposal is rejected.
        chance: The probability of acceptance, shape (R,).
        accepted: Whether the proposal was accepted, shape (R,).
    """

    u: Tensor
    chance: Tensor
    accepted: Tensor


class Joint:
    r"""Densities of all that a model draws while inferring, in unconstrained coordinates u.

    .. math:: f_0 = q(z|x) \text{ or } p(z)\, q(\text{noise}|x), \quad f_1 = p(x, z), \quad
        f_\beta = f_0^{1-\beta} f_1^\beta

    A row is a pair of an example and a chain; the R rows are those of x, each repeated.

    Args:
        model: A model that draws latents or noise.
        x: Data, shape (B, *event).
        context: One row per example, or None.
        chains: How often each example is repeated.
        from_prior: Whether f_0 is the prior.

    Raises:
        ValueError: If the model draws nothing, or something that has no gradient.
    """

    @torch.no_grad()
    def __init__(self, model: Model, x: Tensor, context: Context, chains: int, from_prior: bool):
        self.model, self.chains, self.from_prior = model, chains, from_prior
        self.x, self.context = x.repeat_interleave(chains, 0), contexts.repeat(context, chains)
        self.encodings: dict[nn.Module, tuple[Tensor, Any]] = {}
        record = self._infer()
        self.below, self.shapes = record.below, {s: v.shape[1:] for s, v in record.draws.items()}
        self.into: dict[nn.Module, Any] = {}
        for site, q in record.qs.items():
            try:
                self.into[site] = biject_to(q.support)
            except NotImplementedError:
                raise ValueError(
                    f"annealing: {type(q).__name__} has no gradient in its values, so draws of it "
                    "cannot be annealed; leave it out, and use more draws (k)"
                ) from None
        if not self.into:
            raise ValueError(
                f"annealing: this {type(model).__name__} draws nothing, so there is nothing to "
                "anneal; its log_prob is exact"
            )

    def _infer(self, given: Mapping[nn.Module, Tensor] | None = None) -> Recorder:
        record = Recorder(given=given, encodings=self.encodings)
        self.model.infer(self.x, record, self.context)
        return record

    def flat(self, draws: Mapping[nn.Module, Tensor]) -> Tensor:
        """The point u (R, D) of the values of all draws."""
        return torch.cat([self.into[s].inv(draws[s]).flatten(1) for s in self.shapes], 1)

    def draw(self, prior: bool) -> Tensor:
        """Draws of q, or of the prior and of noise of x; the points u (R, D)."""
        draws = self._infer().draws
        if prior:
            record = Recorder(generating=True, n=len(self.x))
            self.model.generate(record, self.context)
            draws |= {s: v for s, v in record.draws.items() if s not in self.below}
        return self.flat(draws)

    def at(self, u: Tensor, beta: float) -> Point:
        """Densities at points u (R, D), with the gradient of log f_beta."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            given, log_det = {}, torch.zeros_like(u[:, 0])
            parts = u.split([math.prod(shape) for shape in self.shapes.values()], 1)
            for (site, shape), part in zip(self.shapes.items(), parts, strict=True):
                part = part.unflatten(1, shape)
                given[site] = self.into[site](part)
                log_det = log_det + self.into[site].log_abs_det_jacobian(part, given[site])
            record = self._infer(given)
            terms = record.evidence(self.model.latents())
            log_q = torch.stack([q.log_prob(given[s]) for s, q in record.qs.items()]).sum(0)
            end = terms.elbo + log_q
            start = end - terms.log_px if self.from_prior else log_q
            log_f = torch.lerp(start, end, beta) + log_det
            (gradient,) = torch.autograd.grad(log_f.sum(), u)
        return Point(*(t.detach() for t in (u, start, end, log_f, gradient)))

    def move(self, point: Point, beta: float, step: Tensor, leapfrogs: int) -> Move:
        """A move of Hamiltonian Monte Carlo, which leaves f_beta as it is.

        Steps are up to a fifth longer or shorter, so that no path is a closed orbit (Neal, "MCMC
        using Hamiltonian dynamics", 2011, arXiv:1206.1901).

        Args:
            point: Where it starts.
            beta: The temperature.
            step: The step size of each coordinate, shape (R, D).
            leapfrogs: Number of leapfrog steps.
        """
        step = step * (0.8 + 0.4 * torch.rand_like(step[:, :1]))
        momentum, end = torch.randn_like(point.u), point
        before = point.log_f - momentum.square().sum(1) / 2
        for _ in range(leapfrogs):
            momentum = momentum + step / 2 * end.gradient
            end = self.at(end.u + step * momentum, beta)
            momentum = momentum + step / 2 * end.gradient
        change = end.log_f - momentum.square().sum(1) / 2 - before
        chance = change.nan_to_num(-math.inf, 0, -math.inf).exp().clamp(max=1)
        accepted = torch.rand_like(chance) < chance
        return Move(torch.where(accepted[:, None], end.u, point.u), chance, accepted)
