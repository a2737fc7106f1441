"""Continuous normalizing flows, as the steps that compute them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.layers.residual import EXACT_FEATURES, step_forward, step_inverse
from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["NeuralODE"]


class NeuralODE(Bijection):
    r"""The solution of a differential equation, by a fixed number of Runge-Kutta steps.

    .. math:: \frac{dx}{dt} = f(x, t), \quad x(0) = x, \quad x(1) \approx y

    The bijection is the composition of the steps of the classical method of fourth order, each of
    which is an invertible map x + g(x), and not the exact solution, which no solver computes. Its
    log-determinant is the sum of those of the steps, and its inverse solves every step, so the
    density is exactly that of the map that samples, at any number of steps: it integrates to one,
    and there is no tolerance. With more steps the map approaches the solution of the equation; its
    error is of the order steps⁻⁴.

    In evaluation log-determinants come from the Jacobian of each step, which takes D passes of the
    network in one batch. In training they do up to `exact` features; with more they are unbiased
    estimates (`Residual`), where FFJORD estimates the trace of f.

    (Chen, Rubanova, Bettencourt, Duvenaud, "Neural Ordinary Differential Equations", 2018,
    arXiv:1806.07366; Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud, "FFJORD: Free-form
    Continuous Dynamics for Scalable Reversible Generative Models", 2019, arXiv:1810.01367.)

    Args:
        net: f: ``net(x_and_t)`` or ``net(x_and_t, context)``, (B, D + 1) to (B, D); the last
            feature of its input is the time.
        steps: Number of steps.
        exact: Largest number of features whose log-determinant is exact in training, too.

    Raises:
        ValueError: If there is no step.
        ConvergenceError: If f changes so fast that a step is not invertible; take more steps.

    Example:
        >>> from musigma.nets import MLP
        >>> layer, x = NeuralODE(MLP(4, 3, hidden=[16])), torch.randn(5, 3)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    repeated = True
    slow_forward = "four Jacobians of the network per step"
    slow_inverse = "an iteration and four Jacobians of the network per step"

    def __init__(self, net: nn.Module, *, steps: int = 8, exact: int = EXACT_FEATURES):
        super().__init__()
        if steps < 1:
            raise ValueError(f"steps: expected 1 or more; got {steps}")
        self.net, self.steps, self.exact_features = net, steps, exact

    def _change(self, x: Tensor, start: float, duration: float, context: Tensor | None) -> Tensor:
        """What a step adds to x; backwards in time if the duration is negative."""

        def slope(x: Tensor, t: float) -> Tensor:
            return conditioned(self.net, torch.cat([x, torch.full_like(x[:, :1], t)], 1), context)

        middle = start + duration / 2
        k1 = slope(x, start)
        k2 = slope(x + duration / 2 * k1, middle)
        k3 = slope(x + duration / 2 * k2, middle)
        k4 = slope(x + duration * k3, start + duration)
        return duration / 6 * (k1 + 2 * (k2 + k3) + k4)

    def _estimates(self, x: Tensor) -> bool:
        return self.training and x.shape[1] > self.exact_features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            total, estimate = torch.zeros_like(x[:, 0]), self._estimates(x)
            for i in range(self.steps):
                step = partial(self._step, start=i / self.steps, context=context)
                x, log_det = step_forward(step, x, estimate=estimate)
                total = total + log_det
        return x, total

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``; each step starts from the same step backwards in time."""
        with torch.autocast(y.device.type, enabled=False):
            x = at_least_float32(y)
            total, estimate = torch.zeros_like(x[:, 0]), self._estimates(x)
            for i in reversed(range(self.steps)):
                step = partial(self._step, start=i / self.steps, context=context)
                back = partial(self._back, end=(i + 1) / self.steps, context=context)
                x, log_det = step_inverse(step, x, guess=back, estimate=estimate)
                total = total + log_det
        return x, total

    def _step(self, x: Tensor, start: float, context: Tensor | None) -> Tensor:
        return self._change(x, start, 1 / self.steps, context)

    def _back(self, y: Tensor, end: float, context: Tensor | None) -> Tensor:
        return y + self._change(y, end, -1 / self.steps, context)

    def extra_repr(self) -> str:
        """Names the steps."""
        return f"steps={self.steps}, exact={self.exact_features}"
