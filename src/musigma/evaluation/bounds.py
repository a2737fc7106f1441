"""Bounds of log p(x) from importance weights, in memory that does not grow with their number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.evaluation.annealing import Annealing, Chains
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Draws", "Weighed", "Weights", "draws_of", "weighed", "weights_of"]


class Weights(Protocol):
    """Importance weights of the latents of some examples: of `Draws` from q, or of `Chains`."""

    def log_weights(self, k: int) -> Iterator[Tensor]:
        """log w of k draws for each example, in nats: parts (B, m) whose m add up to k."""
        ...

    def reverse(self, draws: Mapping[nn.Module, Tensor]) -> Tensor:
        """log w (B,) of draws of the posterior, in nats."""
        ...

    def figures(self) -> dict[str, Tensor]:
        """Numbers (B,) that say how the weights were made."""
        ...


class Draws:
    """The weights of independent draws from q.

    Args:
        model: A model that is not exact.
        x: Data, shape (B, *event).
        context: One row per example, or None.
    """

    def __init__(self, model: Model, x: Tensor, context: Context = None):
        self.model, self.x, self.context = model, model.floating(x), context

    def log_weights(self, k: int) -> Iterator[Tensor]:
        """As `Model.log_weights`."""
        return self.model.log_weights(self.x, k, self.context)

    def reverse(self, draws: Mapping[nn.Module, Tensor]) -> Tensor:
        """log w of given draws, in nats, shape (B,)."""
        return self.model(self.x, self.context, trace=Trace(given=draws)).elbo

    def figures(self) -> dict[str, Tensor]:
        """None."""
        return {}


def weights_of(
    model: Model, x: Tensor, context: Context = None, annealing: Annealing | None = None
) -> Weights:
    """The weights of draws from q, or of draws that are annealed to the posterior."""
    if annealing is None:
        return Draws(model, x, context)
    return Chains(model, x, context, annealing)


class Weighed(NamedTuple):
    """What log-weights say of log p(x).

    Attributes:
        bounds: L_k of each k, in nats, shape (B, len(ks)).
        ess: The effective sample size of all draws, from 1 to their number, shape (B,).
    """

    bounds: Tensor
    ess: Tensor


def weighed(parts: Iterable[Tensor], ks: Sequence[int]) -> Weighed:
    r"""Lower bounds of log p(x) for several numbers of draws, from the same draws.

    .. math:: L_k = E \log \tfrac1k \sum_{i \le k} w_i \le \log p(x), \quad
        \mathrm{ESS} = (\sum_i w_i)^2 / \sum_i w_i^2

    L_k is the mean over as many disjoint groups of k draws as there are, so it rises with k up to
    the error of the draws. Sources: Burda, Grosse, Salakhutdinov, "Importance Weighted
    Autoencoders", 2016, arXiv:1509.00519; Kong, "A note on importance sampling using standardized
    weights", 1992.

    Args:
        parts: log w of some draws each, in nats, shapes (B, m), as of `Model.log_weights`.
        ks: Numbers of draws, none larger than the number of all.

    Example:
        >>> bounds, ess = weighed([torch.tensor([[0.0, -1.0]]), torch.tensor([[0.5]])], [1, 3])
        >>> bounds, ess
        (tensor([[-0.1667,  0.0055]], dtype=torch.float64), tensor([2.3614], dtype=torch.float64))
    """
    groups = [_Groups(k) for k in ks]
    total, squares = torch.tensor(-torch.inf), torch.tensor(-torch.inf)
    for part in parts:
        log_w = part.detach().double()
        for each in groups:
            each.add(log_w)
        total = torch.logaddexp(total.to(log_w), log_w.logsumexp(1))
        squares = torch.logaddexp(squares.to(log_w), (2 * log_w).logsumexp(1))
    return Weighed(torch.stack([each.mean() for each in groups], 1), (2 * total - squares).exp())


class _Groups:
    """The mean of log (1/k) Σ w over groups of k draws, which are added a few at a time."""

    def __init__(self, k: int):
        self.k, self.filled, self.full = k, 0, 0
        self.open, self.sum = torch.zeros(()), torch.zeros(())

    def add(self, log_w: Tensor) -> None:
        """Add draws (B, m): to the open group, then to groups of their own."""
        if self.filled:
            first, log_w = log_w.tensor_split([self.k - self.filled], 1)
            self.open = torch.logaddexp(self.open, first.logsumexp(1))
            self.filled += first.shape[1]
            if self.filled == self.k:
                self._close(self.open[:, None])
                self.filled = 0
        groups = log_w.shape[1] // self.k
        whole, rest = log_w.tensor_split([groups * self.k], 1)
        if groups:
            self._close(whole.unflatten(1, (groups, self.k)).logsumexp(2))
        if rest.shape[1]:
            self.open, self.filled = rest.logsumexp(1), rest.shape[1]

    def _close(self, sums: Tensor) -> None:
        self.sum, self.full = self.sum + sums.sum(1), self.full + sums.shape[1]

    def mean(self) -> Tensor:
        """The mean of the groups that are full."""
        return self.sum / self.full - math.log(self.k)


def draws_of(k: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of draws in rising order.

    Raises:
        ValueError: If there are none, or one is below 1.
    """
    ks = tuple(sorted({k} if isinstance(k, int) else set(k)))
    if not ks or ks[0] < 1:
        raise ValueError(f"k: expected 1 or more draws; got {ks[0] if ks else 'none'}")
    return ks
