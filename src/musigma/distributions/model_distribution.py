"""An exact model as a `torch.distributions.Distribution`."""

from __future__ import annotations

import sys
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from musigma import context as contexts
from musigma.context import Context
from musigma.gaussian import EventDistribution, Shape
from musigma.spec import Spec
from musigma.trace import Recorder

__all__ = ["ModelDistribution"]


class ModelDistribution(EventDistribution):
    """An exact model as a distribution, with batch shape (), or (B,) for a context of B rows.

    `Model.as_distribution` makes it. Draws of flows are reparameterized: `rsample` and
    `rsample_and_log_prob` carry gradients to the parameters and to the context. Once Pyro is
    imported, it is a distribution of Pyro too: ``pyro.sample("theta", model.as_distribution(x))``.

    Args:
        model: The model.
        context: One row for each distribution of the batch, or None.
        spec: States the shape and the support of events; by default that of the model.

    Example:
        >>> import musigma
        >>> model = musigma.testing.randomized(musigma.build("nsf", (2,), depth=1, context=3))
        >>> posterior = model.as_distribution(torch.randn(5, 3).double())
        >>> x, log_prob = posterior.sample_and_log_prob((100,))
        >>> x.shape, log_prob.shape
        (torch.Size([100, 5, 2]), torch.Size([100, 5]))
    """

    def __new__(cls, *_: Any, **__: Any) -> ModelDistribution:
        """Adds the methods that Pyro expects, once Pyro is imported."""
        pyro = sys.modules.get("pyro.distributions.torch_distribution")
        return object.__new__(cls if pyro is None else _with(cls, pyro.TorchDistributionMixin))

    def __init__(self, model: Any, context: Context, spec: Spec | None = None):
        self.model, self.context, self.spec = model, context, spec or model.spec
        rows = contexts.length(context)
        if self.spec is not None:
            event = self.spec.shape
        else:
            with torch.random.fork_rng():
                event = model.sample(rows or 1, context).shape[1:]
        super().__init__(() if rows is None else (rows,), event)

    @property
    def support(self) -> constraints.Constraint:
        """The support that the spec states; otherwise all real vectors."""
        declared = getattr(self.spec, "support", None)
        return super().support if declared is None else declared.constraint()

    @cached_property
    def has_rsample(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every variable of the model has reparameterized draws."""
        record = Recorder(generating=True, n=1, scoring=False)
        with torch.random.fork_rng(), torch.no_grad():
            self.model.generate(record, contexts.rows(self.context, slice(1)))
        return all(p.has_rsample for p in record.ps.values())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats: ``value.shape`` without the event dimensions, broadcast."""
        batch = value.shape[: value.ndim - len(self.event_shape)]
        batch = torch.broadcast_shapes(batch, self.batch_shape)
        flat = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        return self.model.log_prob(flat, self._contexts(batch)).reshape(batch)

    def sample(self, sample_shape: Shape = (), *, temperature: float | Tensor = 1.0) -> Tensor:
        """Draw, without a gradient; every standard deviation is multiplied by `temperature`."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.repeat_interleave(shape[1:].numel())
        context = self._contexts(shape)
        drawn = self.model.sample(shape.numel(), context, temperature=temperature)
        return drawn.reshape(*shape, *self.event_shape)

    def sample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """Draws, and their log density in nats, in one pass; without gradients."""
        with torch.no_grad():
            return self.rsample_and_log_prob(sample_shape)

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw differentiably.

        Raises:
            NotImplementedError: If not `has_rsample`.
        """
        if not self.has_rsample:
            raise NotImplementedError(
                "rsample: a variable of this model has no reparameterized draws; use sample"
            )
        return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Shape = ()) -> tuple[Tensor, Tensor]:
        """As `sample_and_log_prob`, with gradients where draws are reparameterized."""
        shape = torch.Size((*sample_shape, *self.batch_shape))
        x, log_prob = self.model.rsample_and_log_prob(shape.numel(), self._contexts(shape))
        return x.reshape(*shape, *self.event_shape), log_prob.reshape(shape)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> ModelDistribution:
        """The same distributions with another batch shape, to which the present one broadcasts."""
        new = object.__new__(type(self))
        new.__dict__.update(vars(self))
        EventDistribution.__init__(new, batch_shape, self.event_shape)
        return new

    def _contexts(self, batch: torch.Size) -> Context:
        """One row of context for each of a batch of values."""
        return contexts.apply(
            lambda t: t.expand(*batch, *t.shape[1:]).flatten(0, len(batch) - 1), self.context
        )


@cache
def _with(cls: type, mixin: type) -> type:
    """A class of distributions that has the methods of a mixin too."""
    if issubclass(cls, mixin):
        return cls
    return type(cls.__name__, (cls, mixin), {"__module__": cls.__module__})
