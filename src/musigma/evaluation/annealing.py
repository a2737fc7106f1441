"""Annealed importance sampling of the latents of a model, in both directions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.evaluation.joint import Joint, Move, Point
from musigma.model import Model

__all__ = ["Annealing", "Chains"]

ACCEPTED, LEAST_ACCEPTED = 0.8, 0.1
"""The share of moves that step sizes are adapted to, and the least that chains may accept."""
LEAST_MOVED = 1e-4
"""The least mean square move, in units of the scale of moves."""
FIRST, GAIN, WARMUP = 0.5, 0.3, 20
"""The first step size; how fast its logarithm adapts; moves before the first temperature."""
ADAPTING = 4
"""Most chains of each example that adapt step sizes."""
SCALING = 16
"""Draws of each example whose standard deviation is the scale of moves."""


@dataclass(frozen=True)
class Annealing:
    r"""How draws of the latents are annealed to the posterior.

    .. math:: f_\beta(z) = q(z|x)^{1-\beta}\, p(x, z)^\beta, \quad
        \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log\frac{f_1(z_{t-1})}{f_0(z_{t-1})}

    with z_0 ~ f_0, and z_t from z_{t-1} by a move of Hamiltonian Monte Carlo that leaves f at β_t
    as it is. Then E w = p(x), so log (1/k) Σ w_i of k chains is a lower bound of log p(x) on
    average. With one step it is `Model.iwae`. (Neal, "Annealed importance sampling", 2001; of
    VAEs, Wu, Burda, Salakhutdinov, Grosse, "On the Quantitative Analysis of Decoder-Based
    Generative Models", 2017, arXiv:1611.04273.)

    Attributes:
        steps: Number of steps T of the temperature β from 0 to 1, small at both ends.
        leapfrogs: Leapfrog steps of each move: evaluations of a gradient.
        from_prior: Start at p(z) instead of q(z | x), so that the encoder only scales the moves.

    Raises:
        ValueError: If there are no steps.
    """

    steps: int = 200
    leapfrogs: int = 5
    from_prior: bool = False

    def __post_init__(self):
        for name in ("steps", "leapfrogs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more; got {getattr(self, name)}")

    @property
    def betas(self) -> list[float]:
        """The temperatures β_0 = 0, ..., β_T = 1: a sigmoid from -4 to 4."""
        raw = torch.linspace(-4, 4, self.steps + 1, dtype=torch.float64).sigmoid()
        return ((raw - raw[0]) / (raw[-1] - raw[0])).tolist()


class Chains:
    """Annealed chains of the latents of some examples, with fixed step sizes.

    Step sizes are adapted for each example and temperature by chains that are then discarded, so
    the moves of the chains that count do not depend on their past. Moves are scaled by the
    standard deviation of draws. Latents in an interval are moved in unconstrained coordinates.

    Args:
        model: A model that draws latents or noise while inferring, in evaluation mode.
        x: Data, shape (B, *event).
        context: One row per example, or None.
        annealing: How the chains are annealed.
        at_once: Number of (example, chain) pairs per pass; at least one chain of each example.

    Raises:
        ValueError: If the model draws nothing, or something that has no gradient (classes, points
            of a curved space).

    Example:
        >>> import musigma
        >>> model = musigma.build("mlp_vae", (4,), bits=None, latents=2, hidden=8)
        >>> chains = Chains(model, torch.randn(3, 4), annealing=Annealing(steps=5))
        >>> [tuple(log_w.shape) for log_w in chains.log_weights(2)]
        [(3, 2)]
        >>> chains.figures()["acceptance"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        context: Context = None,
        annealing: Annealing | None = None,
        *,
        at_once: int = 256,
    ):
        self.model, self.x, self.context = model, model.floating(x), context
        self.annealing = annealing or Annealing()
        self.betas, self.most = self.annealing.betas, max(1, at_once // len(x))
        self._tallies = torch.zeros(3, len(x), device=x.device)

    def figures(self) -> dict[str, Tensor]:
        """`acceptance`: the share of accepted moves, near 0.8, (B,); NaN if there are none."""
        moves, accepted, _ = self._tallies
        return {"acceptance": accepted / moves}

    @torch.no_grad()
    def log_weights(self, k: int) -> Iterator[Tensor]:
        """log w of k chains for each example, in nats: parts (B, m) whose m add up to k.

        Raises:
            ValueError: If k is below 1, or the chains of an example do not move.
        """
        if k < 1:
            raise ValueError(f"k: expected 1 or more draws; got {k}")
        for start in range(0, k, self.most):
            joint = self._joint(min(self.most, k - start))
            first = joint.draw(self.annealing.from_prior)
            yield self._annealed(joint, first, range(1, len(self.betas)), 0)

    @torch.no_grad()
    def tempered(self, k: int) -> Iterator[tuple[float, Tensor, Tensor]]:
        """What k chains for each example say of the densities on their way; errors as above.

        Yields:
            For β_1, ..., β_T: β; log ∫ f_β (B,) in nats, a lower bound on average; and the mean of
            log (f_1 / f_0) under f_β (B,), which is that of log p(x | z) if f_0 is the prior.
        """
        parts = []
        for start in range(0, k, self.most):
            joint = self._joint(min(self.most, k - start))
            first, order = joint.draw(self.annealing.from_prior), range(1, len(self.betas))
            rows = [
                (w, point.end - point.start) for w, point in self._path(joint, first, order, 0)
            ]
            log_w, ratio = (torch.stack(each, 1).double() for each in zip(*rows, strict=True))
            log_w, ratio = (t.reshape(len(self.x), -1, len(order)) for t in (log_w, ratio))
            parts.append((log_w.logsumexp(1), (log_w.softmax(1) * ratio).sum(1)))
        sums, means = (torch.stack(each, 2) for each in zip(*parts, strict=True))
        total, mean = sums.logsumexp(2) - math.log(k), (sums.softmax(2) * means).sum(2)
        yield from zip(self.betas[1:], total.unbind(1), mean.unbind(1), strict=True)

    @torch.no_grad()
    def reverse(self, draws: Mapping[nn.Module, Tensor]) -> Tensor:
        """log w of one chain for each example that starts at a draw of its posterior, (B,).

        It is the weight of a chain that ends there. E 1/w = 1/p(x), so log w is an upper bound of
        log p(x) on average, in nats.

        Args:
            draws: `Recorder.draws` of the pass of latents to data that made x.

        Raises:
            ValueError: If the chains of an example do not move.
        """
        joint = self._joint(1)
        return self._annealed(joint, joint.flat(draws), range(len(self.betas) - 1, 0, -1), 1)[:, 0]

    def _joint(self, chains: int) -> Joint:
        return Joint(self.model, self.x, self.context, chains, self.annealing.from_prior)

    def _annealed(self, joint: Joint, u: Tensor, order: range, back: int) -> Tensor:
        """log w (B, m) of paths from u, at β_0 and up, or at β_T and down (`back` is 1)."""
        *_, (log_w, _) = self._path(joint, u, order, back)
        return log_w.reshape(len(self.x), joint.chains)

    def _path(
        self, joint: Joint, u: Tensor, order: range, back: int
    ) -> Iterator[tuple[Tensor, Point]]:
        """After each step: log w (R,), and the point before the move, which it weighs."""
        log_w = torch.zeros(len(u), dtype=torch.float64, device=u.device)
        sizes = self._sizes if len(order) > 1 else []
        for t in order:
            to = t - back
            point = joint.at(u, self.betas[to])
            rise = self.betas[t] - self.betas[t - 1]
            log_w = log_w + rise * (point.end.double() - point.start.double())
            yield log_w, point
            if t != order[-1]:
                move = self._move(joint, point, to, sizes[to])
                self._count(u, move, to)
                u = move.u
        self._check()

    # -- moves

    def _move(self, joint: Joint, point: Point, t: int, size: Tensor) -> Move:
        step = (size[:, None] * self._scale(t)).repeat_interleave(joint.chains, 0)
        return joint.move(point, self.betas[t], step, self.annealing.leapfrogs)

    def _scale(self, t: int) -> Tensor:
        """The scale of moves at a temperature, (B, D): as if log f were quadratic at both ends."""
        start, end = (std**-2 for std in self._stds)
        return torch.lerp(start, end, self.betas[t]).rsqrt()

    @cached_property
    def _stds(self) -> tuple[Tensor, Tensor]:
        """The standard deviations (B, D) of draws of f_0, and of q."""
        joint = self._joint(min(self.most, SCALING))

        def std(prior: bool) -> Tensor:
            passes = range(-(-SCALING // joint.chains))
            u = [joint.draw(prior).unflatten(0, (len(self.x), -1)) for _ in passes]
            return torch.cat(u, 1).std(1).clamp(min=torch.finfo(u[0].dtype).eps)

        posterior = std(False)
        return std(True) if self.annealing.from_prior else posterior, posterior

    @cached_property
    def _sizes(self) -> list[Tensor]:
        """The step size of each example (B,) at each temperature, in units of the scale."""
        joint, size = self._joint(min(self.most, ADAPTING)), self.x.new_full((len(self.x),), FIRST)
        u, sizes = joint.draw(self.annealing.from_prior), []
        for t in [*[0] * WARMUP, *range(1, len(self.betas) - 1)]:
            move = self._move(joint, joint.at(u, self.betas[t]), t, size)
            u, chance = move.u, move.chance.reshape(len(size), -1).mean(1)
            size = size * (GAIN * (chance - ACCEPTED)).exp()
            sizes.append(size)
        return sizes[WARMUP - 1 :]

    def _count(self, before: Tensor, move: Move, t: int) -> None:
        """Add the moves of some chains to the tallies."""
        far = (move.u - before).unflatten(0, (len(self.x), -1)) / self._scale(t)[:, None]
        accepted = move.accepted.reshape(far.shape[:2]).to(far)
        each = torch.ones_like(accepted), accepted, far.square().mean(2)
        self._tallies += torch.stack([tally.sum(1) for tally in each])

    def _check(self) -> None:
        """Refuse chains that do not move."""
        moves, accepted, moved = self._tallies
        unlucky = moves / 2 - 2 * moves.sqrt()  # fewer are rarely accepted by chance
        still = accepted < torch.minimum(LEAST_ACCEPTED * moves, unlucky)
        stuck = still | (moved < LEAST_MOVED * accepted)
        if stuck.any():
            share, square = (float((tally / moves).min()) for tally in (accepted, moved))
            raise ValueError(
                f"annealing: the chains of {int(stuck.sum())} of {len(stuck)} examples do not "
                f"move: they accept as little as {share:.1%} of their moves, with a mean square "
                f"of {square:.1e}, so their weights say nothing of p(x); use more steps, or do "
                "not anneal"
            )
