"""Conditional densities inside sbi, by its protocol of density estimators.

pip install 'musigma[sbi]'

`estimator` gives what `NPE` and `NLE` take as `density_estimator`; `Estimator` wraps a model that
is trained already. (Boelts et al., "sbi reloaded: a toolkit for simulation-based inference
workflows", 2025, arXiv:2411.17337.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from musigma.conditional import Conditional
from musigma.context import Context
from musigma.data import Dataset
from musigma.layers.standardize import standardizer
from musigma.model import Model
from musigma.spec import Spec, Variable
from musigma.tensors import moments
from musigma.zoo import ARCHITECTURES, build, signature_of

try:
    from sbi.neural_nets.estimators.base import (  # pyright: ignore[reportMissingImports]
        ConditionalDensityEstimator,
    )
except ImportError as error:
    raise ImportError("musigma.sbi needs sbi 0.27 or newer: pip install 'musigma[sbi]'") from error

__all__ = ["Estimator", "estimator"]

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
    embed: str = "none",
    embedding_net: nn.Module | None = None,
    ensemble: int = 1,
    **options: Any,
) -> Callable[[Tensor, Tensor], Estimator]:
    r"""A builder of density estimators, for the argument `density_estimator` of sbi's trainers.

    Both sides are standardized inside the model, whose density counts the log-determinant.

    Args:
        name: An architecture of vectors with an exact density: `nsf` or `maf`, or one of your own.
        of: What the density describes: `theta` given x for `NPE`, or `x` given theta for `NLE`.
        embed: Embedding of the condition, by its name in `build`; it is saved with the model.
        embedding_net: A network of your own in place of `embed`: it maps standardized conditions
            (B, \*condition_shape) to features (B, F). No file can rebuild it: save
            ``estimator.model.state_dict()``.
        ensemble: Number of models in the mixture.
        **options: Options of the architecture.

    Returns:
        A function of simulations (theta, x), which builds and calibrates an `Estimator`.

    Raises:
        ValueError: If an argument is unknown or does not fit. Options are checked when the
            estimator is built, at the start of training.

    Example:
        >>> make = estimator("nsf", depth=1, hidden=8)
        >>> net = make(torch.randn(100, 2), torch.randn(100, 5))
        >>> net.input_shape, net.condition_shape, net.model.config["architecture"]
        (torch.Size([2]), torch.Size([5]), 'nsf')

        With sbi's trainer: ``NPE(prior, density_estimator=make)``.
    """
    if name not in ARCHITECTURES:
        build(name, (1,))  # raises the error that suggests a name
    if of not in ("theta", "x"):
        raise ValueError(f"of: expected 'theta' (NPE) or 'x' (NLE); got {of!r}")
    if embed != "none" and embedding_net is not None:
        raise ValueError("embedding_net: it replaces embed; leave one of them out")

    def make(theta: Tensor, x: Tensor) -> Estimator:
        given, data = ("x", x) if of == "theta" else ("theta", theta)
        events, chosen = theta if of == "theta" else x, dict(options)
        takes = signature_of(ARCHITECTURES[name])
        if "standardize" in takes:
            chosen.setdefault("standardize", True)
        if embed != "none":
            chosen["embed"] = embed
        if ensemble != 1:
            chosen["ensemble"] = ensemble
        spec = Spec(events.shape[1:], context=(Variable(given, data.shape[1:]),))
        if embedding_net is None:
            model = build(name, spec, **chosen)
        else:
            model = _embedded(name, spec, embedding_net, data, chosen)
        first = standardizer(model)
        if first is not None:
            first.measure(Dataset(events.numpy(force=True)))
        model.calibrate(events[:CALIBRATION], data[:CALIBRATION])
        return Estimator(model)

    return make


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
        """Of the same shape."""
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
    inner = build(name, spec.shape, context=features.shape[1], **options)
    model = Conditional(inner, embedding)
    model.spec = spec
    return model
