"""Ensembles: the equal mixture of several models that were trained independently."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import Context
from musigma.distributions import ModelDistribution
from musigma.gaussian import EventDistribution, Shape
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Disagreement", "Ensemble"]


class Disagreement(NamedTuple):
    """How much the members of an ensemble differ at some x, in nats, shape (B,).

    Attributes:
        spread: The standard deviation over members of log p_m(x).
        information: What x tells about the member m that it was drawn from, the divergence of
            p(m | x) from the uniform distribution, from 0 to log M. Its mean over draws from the
            ensemble is (1/M) Σ KL(p_m || p), the mean divergence of a member from the mixture.
    """

    spread: Tensor
    information: Tensor


class Ensemble(Model):
    r"""The equal mixture of M densities, which differ by their random initialization.

    .. math:: p(x) = \frac1M \sum_m p_m(x)

    In training mode the log density is the mean of log p_m(x), a lower bound of log p(x): its
    gradient for a member is that of training the member alone, times 1 / M. In evaluation mode it
    is log p(x) itself, so validation chooses the best mixture. (Lakshminarayanan, Pritzel,
    Blundell, "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles", 2017,
    arXiv:1612.01474; for inference from simulators: Hermans et al., "A Trust Crisis In
    Simulation-Based Inference?", 2022, arXiv:2110.06581.)

    Draws are stratified: of n rows, each member draws n / M, rounded up or down, in random order.
    Members have no latents in common, so the ensemble has none.

    Args:
        members: Exact models of the same data.
        separate: Whether the context has an axis of members, (B, M, ...), as `given` returns it.

    Raises:
        ValueError: If there are no members.
        TypeError: If a member is not exact.

    Example:
        >>> import musigma
        >>> model = musigma.build("nsf", (2,), ensemble=3, depth=1, context=4)
        >>> x, log_prob = musigma.testing.randomized(model).float().sample_and_log_prob(
        ...     5, torch.randn(5, 4)
        ... )
        >>> log_prob.shape
        torch.Size([5])
    """

    exact = True
    members: Any  # a ModuleList of models
    no_latents = "the members of an ensemble have no latents in common; use one of them"

    def __init__(self, members: Iterable[Model], *, separate: bool = False):
        super().__init__()
        self.members, self.separate = nn.ModuleList(members), separate
        self.reparameterized: bool | None = None  # once it is known
        if not len(self.members):
            raise ValueError("members: expected one or more models; got none")
        for member in self.members:
            if not member.exact:
                raise TypeError(
                    f"ensemble: expected models with an exact log p(x), such as flows of real "
                    f"numbers; this {type(member).__name__} has only bounds of it"
                )

    def __len__(self) -> int:
        return len(self.members)

    def each(self, context: Context) -> Iterator[tuple[Model, Context]]:
        """Every member, with its context."""
        for m, member in enumerate(self.members):
            own = contexts.apply(lambda t, m=m: t[:, m], context) if self.separate else context
            yield member, own

    def given(self, context: Context) -> tuple[Model, Context]:
        """The ensemble of `given` of all members; embedded contexts get an axis of members."""
        models, rows = zip(*(m.given(c) for m, c in self.each(context)), strict=True)
        if all(m is member for m, member in zip(models, self.members, strict=True)):
            return self, context
        model = Ensemble(models, separate=True).train(self.training)
        return model, contexts.apply(lambda *t: torch.stack(t, 1), *rows)

    def log_prob_each(self, x: Tensor, context: Context = None) -> Tensor:
        """log p_m(x) of each member, nats (B, M)."""
        return torch.stack([m.log_prob(x, c) for m, c in self.each(context)], 1)

    def disagreement(self, x: Tensor, context: Context = None) -> Disagreement:
        """How much members differ at x, in nats; see `Disagreement`.

        If it is large at draws from the ensemble, a member is unlike the others for no other
        reason than its initialization: most often there were too few training examples.
        """
        each = self.log_prob_each(x, context)
        log = each.log_softmax(1)
        information = (log.exp() * (log + math.log(len(self)))).sum(1)
        return Disagreement(each.std(1, correction=0), information)

    def distributions(self, context: Context) -> Iterator[ModelDistribution]:
        """Every member as a distribution, given the first row of a context."""
        for member, rows in self.each(contexts.rows(context, slice(1))):
            yield member.as_distribution(rows)

    # -- a model

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Score x under p."""
        trace.p(self, Mixture(self, context, len(x), x.shape[1:]), x)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Draw x from p."""
        n = trace.n if context is None else contexts.length(context)
        if n is None:
            raise ValueError("n: expected the number of examples to generate; got none")
        event = next(self.distributions(context)).event_shape
        return trace.p(self, Mixture(self, context, n, event))

    def variables(self) -> Iterator[nn.Module]:
        """This module itself."""
        yield self

    latents = variables

    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate every member."""
        for member in self.members:
            member.calibrate(x, context)

    # -- what an ensemble lacks

    def _temperatures(self, temperature: Any, mode: bool) -> Any:
        found = super()._temperatures(temperature, mode)
        if any(not isinstance(t, Tensor) and t == 0.0 for t in found.values()):
            raise ValueError("temperature: an ensemble has no center; take one above 0")
        return found

    def encode(self, *_: Any, **__: Any) -> Any:
        """Raises a TypeError: there are no latents."""
        raise TypeError(f"encode: {self.no_latents} (model.members[0])")

    def decode(self, *_: Any, **__: Any) -> Any:
        """Raises a TypeError: there are no latents."""
        raise TypeError(f"decode: {self.no_latents} (model.members[0])")


class Mixture(EventDistribution):
    """The distribution of n rows under an `Ensemble`."""

    def __init__(self, model: Ensemble, context: Context, n: int, event: Shape):
        self.model, self.context = model, context
        super().__init__([n], event)

    @property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the draws of all members are reparameterized: their weights are constants."""
        if self.model.reparameterized is None:
            each = self.model.distributions(self.context)
            self.model.reparameterized = all(dist.has_rsample for dist in each)
        return self.model.reparameterized

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats, (B,): the mean of the members' if the model is in training mode."""
        each = self.model.log_prob_each(value, self.context)
        return each.mean(1) if self.model.training else each.logsumexp(1) - math.log(each.shape[1])

    def rsample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw rows, the same number from each member, in random order."""
        n, members = self.batch_shape[0], len(self.model)
        which = (torch.arange(n) + torch.randint(members, ())) % members
        order = which[torch.randperm(n)].argsort(stable=True)
        drawn, start = [], 0
        by_member = contexts.rows(self.context, order)
        for (member, rows), k in zip(
            self.model.each(by_member), which.bincount(minlength=members).tolist(), strict=True
        ):
            part = slice(start, start := start + k)
            if not k:
                continue
            rows = contexts.rows(rows, part)
            if torch.is_grad_enabled() and self.has_rsample:
                drawn.append(member.rsample_and_log_prob(k, rows)[0])
            else:
                t = temperature
                if isinstance(t, Tensor) and t.ndim:
                    t = t[order[part]]
                drawn.append(member.sample(k, rows, temperature=t))
        return torch.cat(drawn)[order.argsort()]
