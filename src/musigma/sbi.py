"""Conditional densities inside sbi, by its protocol of density estimators.

pip install 'musigma[sbi]'

`estimator` gives what `NPE` and `NLE` take as `density_estimator`; `Estimator` wraps a model that
is trained already. (Boelts et al., "sbi reloaded: a toolkit for simulation-based inference
workflows", 2025, arXiv:2411.17337.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from musigma.conditional import Conditional
from musigma.context import Context
from musigma.data import Dataset
from musigma.layers.standardize import standardizers
from musigma.model import Model
from musigma.spec import Spec, Variable
from musigma.support import Support
from musigma.tensors import moments
from musigma.zoo import ARCHITECTURES, build, signature_of, with_numbers

try:
    from sbi.neural_nets.estimators.base import (  # pyright: ignore[reportMissingImports]
        ConditionalDensityEstimator,
    )
except ImportError as error:
    raise ImportError("musigma.sbi needs sbi 0.27 or newer: pip install 'musigma[sbi]'") from error

__all__ = ["Estimator", "estimator", "support_of"]

CALIBRATION = 10_000
"""Most simulations that layers are calibrated on; theta is standardized by all of them."""


class Estimator(ConditionalDensityEstimator):
    r"""A conditional model as a density estimator of sbi.

    .. math:: \mathrm{loss}(\theta, x) = -\log p(\theta | x)

    in nats. The input of the estimator is what the model describes, and its condition is the
    context of the model: the rows of its one variable, of any shape, or the columns of all its
    variables, which are vectors, side by side in the order of `model.spec.context`.

    Args:
        model: An exact model with a `spec` that has a context, for example one that
            `musigma train` or sbi trained: ``Estimator(musigma.load("nsf.safetensors"))``.

    Attributes:
        model: The model, for `musigma.save`.

    Raises:
        TypeError: If the model has no exact density.
        ValueError: If it has no `spec`, no context, or several variables that are not vectors.

    Example:
        >>> spec = Spec((2,), context=(Variable("x", (3,)),))
        >>> net = Estimator(build("nsf", spec, depth=1))
        >>> net.log_prob(torch.randn(7, 5, 2), torch.randn(5, 3)).shape
        torch.Size([7, 5])
        >>> net.sample((7,), torch.randn(5, 3)).shape
        torch.Size([7, 5, 2])
    """

    def __init__(self, model: Model):
        model.require_exact("model")
        spec = model.spec
        if spec is None or not spec.context:
            raise ValueError(
                "model: expected one with a spec that has a context; build it for "
                "Spec(shape, context=(Variable('x', (features,)),)), or set model.spec"
            )
        shapes = [variable.shape for variable in spec.context]
        if len(shapes) > 1 and any(len(shape) != 1 for shape in shapes):
            raise ValueError(
                "model: sbi gives one tensor as condition, so variables of a context must be "
                f"vectors if there are several; got shapes {shapes}"
            )
        condition = shapes[0] if len(shapes) == 1 else (sum(shape[0] for shape in shapes),)
        super().__init__(model, torch.Size(spec.shape), torch.Size(condition))
        self._widths = [shape[0] for shape in shapes] if len(shapes) > 1 else []

    @property
    def model(self) -> Model:
        """The model."""
        return self.net  # pyright: ignore[reportReturnType]

    @property
    def embedding_net(self) -> nn.Module | None:
        """The network that the condition passes first; None if there is none."""
        return getattr(self.net, "embedding", None)

    def log_prob(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        r"""log p(input | condition) in nats, shape (S, B).

        The condition passes the embedding once for each of its rows, for any number of inputs.

        Args:
            input: Shape (S, B, \*input_shape), or (B, \*input_shape) for S = 1.
            condition: Shape (B, \*condition_shape) or (S, B, \*condition_shape). Numbers of
                rows are broadcast.

        Raises:
            ValueError: If the shape of an event is another one.
            RuntimeError: If numbers of rows cannot be broadcast.
        """
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        input, aligned, _rows = self._broadcast_and_align(input, condition)
        if condition.ndim <= len(self.condition_shape) + 1:
            return self.model.as_distribution(self._context(condition)).log_prob(input)
        flat = self.model.log_prob(input.flatten(0, 1), self._context(aligned.flatten(0, 1)))
        return flat.reshape(input.shape[:2])

    def loss(self, input: Tensor, condition: Tensor, **_: Any) -> Tensor:
        """-log p(input | condition) in nats, shape (B,)."""
        self._check_input_shape(input)
        self._check_condition_shape(condition)
        return -self.model.log_prob(input, self._context(condition))

    def sample(self, sample_shape: Any, condition: Tensor, **_: Any) -> Tensor:
        r"""Draws, shape (\*sample_shape, B, \*input_shape), without a gradient."""
        self._check_condition_shape(condition)
        return self.model.as_distribution(self._context(condition)).sample(sample_shape)

    def sample_and_log_prob(
        self, sample_shape: Any, condition: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        r"""Draws, and their log density in nats, (\*sample_shape, B), in one pass."""
        self._check_condition_shape(condition)
        given = self.model.as_distribution(self._context(condition))
        return given.sample_and_log_prob(sample_shape)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        """The latents of inputs, of their shape; numbers of rows are broadcast.

        They are standard normal if the model fits, which sbi's local C2ST of flows tests.

        Raises:
            ValueError: If the latents of the model have another shape.
        """
        batch = torch.broadcast_shapes(
            input.shape[: input.ndim - len(self.input_shape)],
            condition.shape[: condition.ndim - len(self.condition_shape)],
        )
        rows = input.expand(*batch, *self.input_shape).reshape(-1, *self.input_shape)
        given = condition.expand(*batch, *self.condition_shape)
        latents = self.model.encode(rows, self._context(given.flatten(0, len(batch) - 1)))
        if [z.shape for z in latents] != [rows.shape]:
            raise ValueError(
                f"model: expected one latent of shape {tuple(self.input_shape)}; got "
                f"{[tuple(z.shape[1:]) for z in latents]}"
            )
        return latents[0].reshape(*batch, *self.input_shape)

    def _context(self, condition: Tensor) -> Context:
        """Rows of the condition as the model takes them."""
        assert self.model.spec is not None
        if not self._widths:
            return condition
        parts = condition.split(self._widths, 1)
        return {v.name: t for v, t in zip(self.model.spec.context, parts, strict=True)}


def estimator(
    name: str,
    *,
    of: Literal["theta", "x"] = "theta",
    support: Support | Literal["prior"] | None = None,
    prior: Any = None,
    embed: str | None = None,
    embedding_net: nn.Module | None = None,
    ensemble: int = 1,
    **options: Any,
) -> Callable[[Tensor, Tensor], Estimator]:
    r"""A builder of density estimators, for the argument `density_estimator` of sbi's trainers.

    Both sides are standardized inside the model, whose density counts the log-determinant. All
    that is needed later is in the model, so `musigma.save` stores it.

    Args:
        name: An architecture of vectors with an exact density: `nsf` or `maf`, or one of your own.
        of: What the density describes: `theta` given x for `NPE`, or `x` given theta for `NLE`.
        support: Where the density has its mass, all of it: "prior" for where the prior has its
            own, a `Support`, or None for all of space. With the support of the prior no draw is
            rejected, and the correction for leakage of `DirectPosterior` is 1.
        prior: The prior, if its support is to be taken: as sbi takes it, or what
            `sbi.utils.process_prior` returned.
        embed: Embedding of the condition, as `build` takes it; it is saved with the model. None:
            the default of the architecture.
        embedding_net: A network of your own in place of `embed`: it maps standardized conditions
            (B, \*condition_shape) to features (B, F). No file can rebuild it: save
            ``estimator.model.state_dict()``.
        ensemble: Number of models in the mixture.
        **options: Options of the architecture.

    Returns:
        A function of simulations (theta, x), which builds and calibrates an `Estimator`.

    Raises:
        ValueError: If an argument is unknown or does not fit. Options are checked when the
            estimator is built, at the start of training; so is whether all simulations lie in the
            support.

    Example:
        >>> from sbi.utils import BoxUniform
        >>> prior = BoxUniform(torch.zeros(2), torch.ones(2))
        >>> make = estimator("nsf", support="prior", prior=prior, depth=1, hidden=8)

        For a trainer of sbi: ``NPE(prior, density_estimator=make)``. It calls

        >>> theta = prior.sample((100,))
        >>> net = make(theta, theta + torch.randn(100, 2))
        >>> bool(prior.support.check(net.sample((100,), 9 * torch.ones(1, 2))).all())
        True
    """
    if name not in ARCHITECTURES:
        build(name, (1,))  # raises the error that suggests a name
    if of not in ("theta", "x"):
        raise ValueError(f"of: expected 'theta' (NPE) or 'x' (NLE); got {of!r}")
    if support == "prior":
        if of == "x":
            raise ValueError(
                "support: the prior is that of theta, and the density is that of x; give the "
                "Support of x, or leave it out"
            )
        if prior is None:
            raise ValueError('support: "prior" needs the prior (prior=...)')
        support = support_of(prior)
    elif support is not None and not isinstance(support, Support):
        raise ValueError(f'support: expected "prior", a Support or None; got {support!r}')
    elif prior is not None:
        raise ValueError('prior: only its support is used; set support="prior", or leave it out')
    if embed is not None and embedding_net is not None:
        raise ValueError("embedding_net: it replaces embed; leave one of them out")

    def make(theta: Tensor, x: Tensor) -> Estimator:
        given, data = ("x", x) if of == "theta" else ("theta", theta)
        events, chosen = theta if of == "theta" else x, dict(options)
        takes = signature_of(ARCHITECTURES[name])
        if support is not None:
            _check_inside(of, events, support)
        elif "standardize" in takes:
            chosen.setdefault("standardize", True)
        if embed is not None:
            chosen["embed"] = embed
        if ensemble != 1:
            chosen["ensemble"] = ensemble
        context = (Variable(given, data.shape[1:]),)
        spec = Spec(events.shape[1:], context=context, support=support)
        if embedding_net is None:
            model = build(name, spec, **chosen)
        else:
            model = _embedded(name, spec, embedding_net, data, chosen)
        for first in standardizers(model):
            first.measure(Dataset(events.numpy(force=True)))
        model.calibrate(events[:CALIBRATION], data[:CALIBRATION])
        return Estimator(model)

    return make


def support_of(prior: Any) -> Support | None:
    """The support of a prior, exactly; None if that is all of space.

    Args:
        prior: A distribution with a `support` of torch: a box, half-lines, a simplex, or products
            of them, for example sbi's `BoxUniform` and `MultipleIndependent`; or a sequence of
            independent ones.

    Raises:
        ValueError: If it states no support, or another one.

    Example:
        >>> one = torch.ones(1)
        >>> support_of([torch.distributions.Gamma(one, one), torch.distributions.Beta(one, one)])
        Support(low=(0.0, 0.0), high=(inf, 1.0), simplex=(), ordered=())
    """
    found = []
    for each in prior if isinstance(prior, Sequence) else [prior]:
        try:
            constraint = each.support
        except (AttributeError, NotImplementedError):
            constraint = None
        if constraint is None:
            raise ValueError(
                f"support: {type(each).__name__} states none; give the Support (support=...)"
            )
        found.append(_bounds(constraint, math.prod((*each.batch_shape, *each.event_shape))))
    support = _product(found)
    return None if support == _box(-math.inf, math.inf, len(support)) else support


def _product(supports: Sequence[Support]) -> Support:
    """Supports side by side."""
    starts = np.cumsum([0, *map(len, supports)]).tolist()
    groups = {
        rule: tuple(
            tuple(start + j for j in group)
            for start, support in zip(starts, supports, strict=False)
            for group in getattr(support, rule)
        )
        for rule in ("simplex", "ordered")
    }
    low = tuple(value for support in supports for value in support.low)
    high = tuple(value for support in supports for value in support.high)
    return Support(low, high, **groups)


def _box(low: Any, high: Any, size: int) -> Support:
    """A product of intervals, from bounds that are broadcast to so many elements."""
    both = (torch.as_tensor(bound).flatten().expand(size).tolist() for bound in (low, high))
    return Support(*map(tuple, both))


def _next(bound: Any, toward: float) -> Tensor:
    """The float32 after a bound that is excluded."""
    return torch.nextafter(torch.as_tensor(bound, dtype=torch.float32), torch.tensor(toward))


@singledispatch
def _bounds(constraint: Any, size: int) -> Support:
    """The support of so many elements that a constraint of torch describes."""
    declared = getattr(constraint, "support", None)  # of the distribution of a model
    if isinstance(declared, Support):
        return declared
    if (base := getattr(constraint, "base_constraint", None)) is not None:
        return _bounds(base, size)  # of independent elements, or of a mixture
    raise ValueError(
        f"support: no bijection is known for {constraint}; give the Support (support=...), or "
        "leave it out"
    )


@_bounds.register(type(constraints.real))
def _(constraint: Any, size: int) -> Support:
    return _box(-math.inf, math.inf, size)


@_bounds.register(constraints.interval)
@_bounds.register(constraints.half_open_interval)
def _(constraint: Any, size: int) -> Support:
    return _box(constraint.lower_bound, constraint.upper_bound, size)


@_bounds.register(constraints.greater_than_eq)
def _(constraint: Any, size: int) -> Support:
    return _box(constraint.lower_bound, math.inf, size)


@_bounds.register(constraints.greater_than)
def _(constraint: Any, size: int) -> Support:
    return _box(_next(constraint.lower_bound, math.inf), math.inf, size)


@_bounds.register(constraints.less_than)
def _(constraint: Any, size: int) -> Support:
    return _box(-math.inf, _next(constraint.upper_bound, -math.inf), size)


@_bounds.register(type(constraints.simplex))
def _(constraint: Any, size: int) -> Support:
    return Support((0.0,) * size, (1.0,) * size, simplex=(tuple(range(size)),))


@_bounds.register(constraints.cat)
def _(constraint: Any, size: int) -> Support:
    parts = zip(constraint.cseq, constraint.lengths, strict=True)
    return _product([_bounds(part, length) for part, length in parts])


@_bounds.register(constraints.stack)
def _(constraint: Any, size: int) -> Support:
    each = size // len(constraint.cseq)
    return _product([_bounds(part, each) for part in constraint.cseq])


def _check_inside(of: str, events: Tensor, support: Support) -> None:
    """Refuse simulations outside the support, where their density is zero."""
    if events.ndim != 2 or events.shape[1] != len(support):
        raise ValueError(
            f"support: {of} has shape {tuple(events.shape[1:])}, and the support "
            f"{len(support)} elements"
        )
    inside = support.inside(events.double().numpy(force=True))
    if not inside.all():
        row, j = np.argwhere(~inside)[0].tolist()
        raise ValueError(
            f"{of}: {int((~inside).any(1).sum())} of {len(events)} simulations lie outside the "
            f"support; in the first of them element {j} is {float(events[row, j]):g}, expected "
            f"{support.expected(j)}"
        )


class _Standardized(nn.Module):
    """Conditions minus their mean, over their standard deviation: of each element of a vector.

    All elements of an image or a sequence share one mean and one standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, data: Tensor):
        super().__init__()
        mean, std = moments(data if data.ndim == 2 else data.reshape(-1, 1))
        self.register_buffer("mean", mean.to(data.dtype))
        self.register_buffer("std", std.to(data.dtype))

    def forward(self, condition: Tensor) -> Tensor:
        """Standardized conditions, of the shape of `condition`."""
        return (condition - self.mean) / self.std


def _embedded(
    name: str, spec: Spec, net: nn.Module, data: Tensor, options: dict[str, Any]
) -> Conditional:
    """A model whose context passes a network of the user."""
    embedding = nn.Sequential(_Standardized(data), net)
    with torch.no_grad():
        features = embedding(data[:2])
    if features.ndim != 2:
        raise ValueError(
            f"embedding_net: expected features (B, F); got shape {tuple(features.shape)} for "
            f"conditions {tuple(data[:2].shape)}"
        )
    usual = {k: v for k, v in with_numbers(name, spec, options).items() if k != "embed"}
    bare = Spec(spec.shape, support=spec.support)
    inner = build(name, bare, context=features.shape[1], **usual)
    model = Conditional(inner, embedding)
    model.spec = spec
    return model
