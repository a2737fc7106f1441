"""What is asked of a posterior p(theta | x): its mode, and proposals for further simulations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musigma import context as contexts
from musigma.context import Context
from musigma.layers import Unconstrain, standardizers
from musigma.model import Model
from musigma.support import Support

__all__ = ["Mode", "Proposal", "evaluation_mode", "mode", "truncated"]

NEAR = 0.1
"""Distance, in standard deviations of the draws, within which restarts have found one mode."""
FIRST_STEP = 0.1
"""The learning rate with which the search for a mode begins, in the same unit."""
AT_ONCE = 2**16
"""Number of rows that are drawn or scored together."""
FEWEST = 10
"""Number of draws below the threshold of a truncated proposal."""


class Mode(NamedTuple):
    """The mode of a density for each row of its context.

    Attributes:
        theta: Where the density is largest, (B, D).
        log_prob: The log density there, nats (B,).
        agree: Number of restarts that ended there, within a tenth of the standard deviation of
            the draws, (B,). One of many is a sign of several modes or of a rough density.
        restarts: Number of restarts.
    """

    theta: Tensor
    log_prob: Tensor
    agree: Tensor
    restarts: int


def mode(
    model: Model, context: Context = None, *, restarts: int = 20, n: int = 1000, steps: int = 200
) -> Mode:
    r"""Maximize the density for each row of a context, by gradients from the best of many draws.

    .. math:: \hat\theta = \arg\max_\theta \log p(\theta | x)

    The draws are divided into as many groups as there are restarts, and the best of each group is
    improved by Adam, in coordinates in which the draws have unit covariance; the learning rate
    falls to zero. For a model with a support these are coordinates without bounds, but what is
    maximized is the density of theta, so the mode may lie next to a border. No result is worse
    than the best draw.

    Args:
        model: An exact model of vectors.
        context: One row for each density, or None.
        restarts: Number of restarts for each row.
        n: Number of draws for each row.
        steps: Number of steps of each restart.

    Raises:
        TypeError: If the model is not exact, or its rows are typed and have no gradient.
        ValueError: If there are fewer draws than restarts, or the data are not vectors.

    Example:
        >>> import musigma
        >>> model = musigma.build("maf", (2,), depth=1, hidden=8, context=3)
        >>> found = mode(musigma.testing.randomized(model), torch.randn(4, 3).double(), n=200)
        >>> found.theta.shape, found.log_prob.shape
        (torch.Size([4, 2]), torch.Size([4]))
    """
    model.require_exact("mode")
    if model.spec is not None and model.spec.schema is not None:
        raise TypeError("mode: typed columns have no gradient; train without a schema")
    if not 1 <= restarts <= n or steps < 0:
        raise ValueError(
            f"n: expected at least as many draws as restarts, at least one; got {n} draws, "
            f"{restarts} restarts and {steps} steps"
        )
    with evaluation_mode(model):
        inner, rows = model.given(context)
        count = contexts.length(rows) or 1
        size = max(1, AT_ONCE // n)
        parts = [
            _modes(inner, contexts.rows(rows, slice(at, at + size)), restarts, n, steps)
            for at in range(0, count, size)
        ]
    theta, log_prob, agree = map(torch.cat, zip(*parts, strict=True))
    return Mode(theta, log_prob, agree, restarts)


@contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Evaluation mode, in which the density of an ensemble is that of its draws."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _modes(
    model: Model, rows: Context, restarts: int, n: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """theta, log density and agreement for a few rows."""
    count = contexts.length(rows) or 1
    repeated = contexts.repeat(rows, n)
    theta, log_prob = model.sample_and_log_prob(count * n, repeated)
    if theta.ndim != 2:
        raise ValueError(f"mode: expected a model of vectors; got events {tuple(theta.shape[1:])}")
    free = _free(model)
    with torch.no_grad():
        u = theta if free is None else free(theta)[0]
    u, log_prob = u.unflatten(0, (count, n)), log_prob.view(count, n)
    center, scale = u.mean(1, keepdim=True), _scale(u)
    groups = n - n % restarts
    by_group = log_prob[:, :groups].unflatten(1, (-1, restarts))  # (B, draws of a group, groups)
    first = by_group.argmax(1) * restarts + torch.arange(restarts, device=theta.device)
    best_draw = log_prob.argmax(1)
    first[:, 0] = torch.where(best_draw < groups, first[:, 0], best_draw)
    start = u.gather(1, first[..., None].expand(-1, -1, u.shape[2]))
    white = torch.linalg.solve_triangular(scale, (start - center).mT, upper=False).mT
    context = contexts.repeat(rows, restarts)

    def at(white: Tensor) -> tuple[Tensor, Tensor]:
        u = (center + white @ scale.mT).flatten(0, 1)
        theta = u if free is None else free.inverse(u)[0]
        return theta, model.log_prob(theta, context)

    picked = first.flatten() + n * torch.arange(count, device=theta.device).repeat_interleave(
        restarts
    )
    best = theta[picked], log_prob.flatten()[picked], white.flatten(0, 1)
    white = white.clone().requires_grad_()
    optimizer = torch.optim.Adam([white], FIRST_STEP, betas=(0.8, 0.95))
    for step in range(steps + 1):
        with torch.enable_grad():
            theta, log_prob = at(white)
            (gradient,) = torch.autograd.grad(-log_prob.sum(), white)
        better = (log_prob > best[1]).detach()  # false where it is not finite
        new = theta.detach(), log_prob.detach(), white.detach().flatten(0, 1)
        best = tuple(
            torch.where(better.reshape(-1, *(1,) * (old.ndim - 1)), now, old)
            for now, old in zip(new, best, strict=True)
        )
        white.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.param_groups[0]["lr"] = FIRST_STEP * (1 - step / (steps + 1)) ** 2
        optimizer.step()
    theta, log_prob, white = (t.unflatten(0, (count, restarts)) for t in best)
    chosen = log_prob.argmax(1)
    each = torch.arange(count, device=theta.device)
    distance = (white - white[each, chosen][:, None]).norm(dim=2)
    agree = (distance < NEAR).sum(1)
    return theta[each, chosen], log_prob[each, chosen], agree


def _free(model: Model) -> Unconstrain | None:
    """The layer that maps the support of a model to all of space, if it has one."""
    first = next(iter(standardizers(model)), None)
    return first if isinstance(first, Unconstrain) else None


def _scale(u: Tensor) -> Tensor:
    """The Cholesky factor of the covariance of draws (B, n, D), (B, D, D)."""
    centered = (u - u.mean(1, keepdim=True)).double()
    covariance = centered.mT @ centered / max(1, u.shape[1] - 1)
    variance = covariance.diagonal(dim1=1, dim2=2)
    floor = torch.diag_embed(1e-6 * variance + 1e-12)
    return torch.linalg.cholesky(covariance + floor).to(u.dtype)


# --- proposals for further simulations --------------------------------------------------------


class Proposal(NamedTuple):
    """Parameters for further simulations.

    Attributes:
        theta: Draws from the prior, restricted to the region, (n, D).
        threshold: The least log density of the region, nats.
        share: The share of the prior's mass in the region.
        acceptance: The share of candidates that were accepted.
        candidates: Where they came from: `prior`, or `posterior`.
    """

    theta: Tensor
    threshold: float
    share: float
    acceptance: float
    candidates: str


def truncated(
    model: Model,
    context: Context,
    prior: Support | Callable[[int], Tensor],
    n: int,
    *,
    epsilon: float = 1e-4,
    most: int = 10_000_000,
) -> Proposal:
    r"""Draw from the prior where the posterior of one observation has its mass.

    .. math:: \{\theta : q(\theta | x_o) > \tau\}, \quad
        P_{\theta \sim q(\cdot | x_o)}(q(\theta | x_o) < \tau) = \epsilon

    Simulations at these parameters are worth more for this observation than those over the whole
    prior. Within the region the proposal is the prior, so the posterior at x_o is learned from
    them by the usual loss, without a correction (Deistler, Goncalves, Macke, "Truncated proposals
    for scalable and hassle-free simulation-based inference", 2022, arXiv:2210.04815). The result
    is valid for this observation alone.

    Candidates from the prior are accepted inside the region. If the prior is uniform on a
    `Support` and that would accept fewer, candidates are drawn from the posterior, and accepted
    with probability τ / q: also exactly, where the paper resamples.

    Args:
        model: An exact model of theta given x.
        context: The observation, one row.
        prior: A `Support` with bounds on all sides, on which the prior is uniform; or a function
            of n that returns draws from the prior, (n, D). It may return fewer rows once it has
            no more.
        n: Number of draws.
        epsilon: Share of the posterior's mass that lies outside the region.
        most: Number of candidates after which the search ends.

    Raises:
        TypeError: If the model is not exact.
        ValueError: If the context is not one row, the prior is not bounded, or candidates are
            exhausted; the message says how many were accepted.

    Example:
        >>> import musigma
        >>> box = Support([-20, -20], [20, 20])
        >>> model = musigma.build("maf", (2,), depth=1, hidden=8, context=3)
        >>> found = truncated(model, torch.randn(1, 3), box, 100, epsilon=0.01)
        >>> found.theta.shape, found.share < 0.05
        (torch.Size([100, 2]), True)
    """
    model.require_exact("truncated")
    if (rows := contexts.length(context)) != 1:
        raise ValueError(
            f"context: a truncated proposal is for one observation, one row; got {rows or 0}"
        )
    if not 0 < epsilon < 1 or n < 1:
        raise ValueError(f"epsilon, n: expected 0 < epsilon < 1 and n > 0; got {epsilon}, {n}")
    with evaluation_mode(model):
        dist = model.as_distribution(context)
        size = math.ceil(FEWEST / epsilon)
        drawn = torch.cat([q for _, q in _draws(dist, size)])
        threshold = float(drawn.kthvalue(min(size, max(1, round(size * epsilon)))).values)
        uniform = _Uniform(prior, drawn) if isinstance(prior, Support) else None
        draw = uniform or prior
        by_posterior = uniform is not None and threshold + uniform.log_volume > 0
        theta: list[Tensor] = []
        tried = accepted = 0
        while accepted < n and tried < most:
            size = min(AT_ONCE, most - tried, max(1024, 2 * n))
            if uniform is not None and by_posterior:
                x, q = next(_draws(dist, size))
                chosen = (q > threshold) & (torch.rand_like(q).log() < threshold - q)
                chosen &= uniform.inside(x)
            else:
                x = draw(size).to(drawn)  # pyright: ignore[reportCallIssue]
                if not len(x):
                    break
                with torch.no_grad():
                    chosen = dist.log_prob(x[:, None])[:, 0] > threshold
            theta.append(x[chosen])
            tried, accepted = tried + len(x), accepted + int(chosen.sum())
    rate = accepted / max(1, tried)
    if accepted < n:
        raise ValueError(
            f"n: expected {n:,} draws, but of {tried:,} candidates from the prior only "
            f"{accepted:,} lie in the region, a share of {rate:.2g}; give the bounds of a uniform "
            "prior, whose candidates come from the posterior, more draws from the prior, or a "
            "smaller n"
        )
    share, candidates = rate, "prior"
    if uniform is not None and by_posterior:
        share, candidates = rate * math.exp(-threshold - uniform.log_volume), "posterior"
    return Proposal(torch.cat(theta)[:n], threshold, share, rate, candidates)


def _draws(dist: Any, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """n draws from a distribution with one row of context, and their log density, in parts."""
    for at in range(0, n, AT_ONCE):
        x, q = dist.sample_and_log_prob((min(AT_ONCE, n - at),))
        yield x[:, 0], q[:, 0]


class _Uniform:
    """The uniform distribution on a bounded support.

    Raises:
        ValueError: If it is not bounded on all sides.
    """

    def __init__(self, support: Support, like: Tensor):
        wide = [j for part in support.parts for j in part.elements if not _bounded(part)]
        if wide:
            raise ValueError(
                f"prior: elements {sorted(wide)} have no bounds on both sides, so no prior is "
                "uniform there; give draws from the prior"
            )
        self.support, self.like, self.layer = support, like, Unconstrain(support).to(like.device)

    def __call__(self, n: int) -> Tensor:
        """Draws (n, D): `Unconstrain` makes uniform rows standard normal."""
        return self.layer.inverse(self.like.new_empty(n, self.support.freedom).normal_())[0]

    def inside(self, x: Tensor) -> Tensor:
        """Whether rows lie in the support, (n,)."""
        return torch.as_tensor(self.support.inside(x.double().cpu().numpy())).all(1).to(x.device)

    @property
    def log_volume(self) -> float:
        """Log volume of the support, nats: minus the log density of a uniform row."""
        u = torch.zeros(1, self.support.freedom, dtype=torch.float64, device=self.like.device)
        return float(self.layer.inverse(u)[1]) + 0.5 * u.shape[1] * math.log(2 * math.pi)


def _bounded(part: Any) -> bool:
    return part.simplex or (math.isfinite(part.low) and math.isfinite(part.high))
