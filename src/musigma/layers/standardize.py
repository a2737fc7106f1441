"""Standardization of the columns of a table inside the model, with its log-determinant."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from musigma.layer import Bijection
from musigma.layers.marginals import Rows
from musigma.tensors import at_least_float32, moments

__all__ = ["Standardize", "standardizer", "standardizers"]


class Standardize(Bijection):
    r"""A fixed shift and scale for each feature of a vector, taken from the data.

    .. math:: y_d = (x_d - \mu_d) / \sigma_d, \quad \log|\det| = -\sum_d \log \sigma_d

    As the first layer of a model it makes training independent of the units of the data: a change
    of units only adds the sum of the logarithms of the factors to the nats. Mean and standard
    deviation are buffers: they are saved with the model and never trained. Until `set` or
    `calibrate` is called, the layer is the identity.

    Args:
        features: D.

    Example:
        >>> layer, x = Standardize(2), torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> layer.calibrate(x)
        >>> layer(x)
        (tensor([[-1., -1.],
                [ 1.,  1.]]), tensor([-2.3026, -2.3026]))
    """

    mean: Tensor
    std: Tensor
    calibrated: Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def set(self, mean: Any, std: Any) -> None:
        """Set μ and σ, arrays or tensors of shape (D,).

        Raises:
            ValueError: If a shape differs, a mean is not finite, or a σ is not positive.
        """
        mean, std = (torch.as_tensor(value, dtype=torch.float64).cpu() for value in (mean, std))
        if not mean.shape == std.shape == self.mean.shape:
            raise ValueError(
                f"mean, std: expected shape {tuple(self.mean.shape)}; got {tuple(mean.shape)} and "
                f"{tuple(std.shape)}"
            )
        bad = ~(mean.isfinite() & std.isfinite() & (std > 0))
        if bad.any():
            raise ValueError(
                f"std: expected finite means and positive standard deviations; got {mean[bad]} "
                f"and {std[bad]} for features {bad.nonzero().flatten().tolist()}"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.calibrated.fill_(True)

    def measure(self, data: Rows) -> None:
        """Set μ and σ to those of all rows of a `Dataset`."""
        self.set(*data.moments())

    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set μ and σ from a batch, once; σ is 1 for a feature that is constant in it."""
        if bool(self.calibrated):
            return
        self.set(*moments(x))

    def _log_det(self, x: Tensor) -> Tensor:
        return -self.std.log().sum().expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((x - μ) / σ, log_det)``."""
        x = at_least_float32(x)
        return (x - self.mean) / self.std, self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(σ y + μ, -log_det)``."""
        y = at_least_float32(y)
        return y * self.std + self.mean, -self._log_det(y)

    def extra_repr(self) -> str:
        """Names the number of features."""
        return str(len(self.mean))


class Measured(Protocol):
    """A first layer that is measured on all training rows: any that has these two members."""

    @property
    def calibrated(self) -> Any:
        """Whether it has been measured."""
        ...

    def measure(self, data: Rows) -> None:
        """Measure it on all rows of a `Dataset`."""
        ...


def standardizer(model: nn.Module) -> Measured | None:
    """The layer that the data of a model pass first, if it is measured on them; None otherwise."""
    first: Any = model
    while first is not None:
        if hasattr(first, "measure"):
            return None if getattr(first, "typed", False) else first  # a schema is measured
        layers = getattr(first, "layers", None)
        first = layers[0] if layers else getattr(first, "model", None)  # of a `Conditional`
    return None


def standardizers(model: nn.Module) -> list[Measured]:
    """The `standardizer` of a model, or of every member of an ensemble."""
    inner: Any = model
    while not hasattr(inner, "members") and isinstance(inner, nn.Module):
        inner = getattr(inner, "model", None)  # of a `Conditional`
    found = [standardizer(member) for member in getattr(inner, "members", [model])]
    return [layer for layer in found if layer is not None]
