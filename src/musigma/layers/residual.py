"""Residual bijections: x plus a contraction of x, alone or as a step of a differential equation.

For y = x + g(x), log |det dy/dx| is that of I + J, where J is the Jacobian of g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.model import Bijection
from musigma.solvers import ConvergenceError, fixed_point
from musigma.tensors import at_least_float32

__all__ = ["Residual"]

Function = Callable[[Tensor], Tensor]

EXACT_FEATURES = 16
"""Up to this number of features, training computes Jacobians, too."""


class Residual(Bijection):
    r"""x plus a contraction of x: the layer of residual flows.

    .. math:: y = x + g(x), \quad \log|\det| = \log|\det(I + J_g(x))|
        = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J_g(x)^k

    In evaluation the log-determinant is exact: it comes from the Jacobian, which takes D passes of
    the network in one batch. In training it is exact up to `exact` features. With more, it is an
    unbiased estimate by a random number of terms, and so is its gradient; the loss that training
    logs is then an estimate, and no figure of evaluation is. `inverse` iterates to a fixed point.

    (Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible Residual Networks", 2019,
    arXiv:1811.00995; Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative
    Modeling", 2019, arXiv:1906.02735.)

    Args:
        net: g: ``net(x)`` or ``net(x, context)``, (B, D) to (B, D), a contraction of x, such as
            `musigma.nets.LipschitzMLP`. If it has a method `given`, ``net.given(context)`` is the
            function of x, prepared once per pass.
        exact: Largest number of features whose log-determinant is exact in training, too.

    Raises:
        ConvergenceError: If the iteration does not converge, or a determinant is not positive,
            because g is no contraction.

    Example:
        >>> from musigma.nets import LipschitzMLP
        >>> layer, x = Residual(LipschitzMLP(3, 3)), torch.randn(4, 3)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    repeated = True
    slow_forward = "one Jacobian of the network"
    slow_inverse = "iteration to a fixed point, and one Jacobian of the network"

    def __init__(self, net: nn.Module, *, exact: int = EXACT_FEATURES):
        super().__init__()
        self.net, self.exact_features = net, exact

    def _function(self, context: Tensor | None) -> Function:
        if hasattr(self.net, "given"):
            return self.net.given(context)  # pyright: ignore[reportCallIssue]
        return lambda x: conditioned(self.net, x, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x + g(x), log_det)``."""
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            estimate = self.training and x.shape[1] > self.exact_features
            return step_forward(self._function(context), x, estimate=estimate)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, by iteration."""
        with torch.autocast(y.device.type, enabled=False):
            y = at_least_float32(y)
            estimate = self.training and y.shape[1] > self.exact_features
            return step_inverse(self._function(context), y, estimate=estimate)

    def extra_repr(self) -> str:
        """Names the limit."""
        return f"exact={self.exact_features}"


# --- one step y = x + g(x) ----------------------------------------------------------------------


def step_forward(g: Function, x: Tensor, *, estimate: bool = False) -> tuple[Tensor, Tensor]:
    """``(x + g(x), log_det)``; the log-determinant is an unbiased estimate if wanted."""
    if estimate:
        further = int(torch.empty(()).geometric_(0.5))
        return estimated(g, x, torch.randint_like(x, 2) * 2 - 1, further)
    change, jacobian = with_jacobian(g, x)
    sign, log_det = torch.linalg.slogdet(_plus_identity(jacobian))
    if not torch.compiler.is_compiling() and bool((sign <= 0).any()):
        raise ConvergenceError(
            "x: the map is not invertible here, because its Jacobian has a determinant of 0 or "
            "less; bound the Lipschitz constant of the network, or take more steps"
        )
    return x + change, log_det


def step_inverse(
    g: Function, y: Tensor, *, guess: Function | None = None, estimate: bool = False
) -> tuple[Tensor, Tensor]:
    """``(x, log_det)`` with x + g(x) = y.

    It iterates t ← t + y - f(x), where f(x) = x + g(x) and x = guess(t): with an approximate
    inverse of f as `guess` few steps are enough, and without one the contraction must be g's. The
    gradients are those of the implicit function.
    """
    guess = guess or (lambda t: t)
    with torch.no_grad():

        def corrected(t: Tensor) -> Tensor:
            x = guess(t)
            return t + (y - x - g(x))

        x = guess(fixed_point(corrected, y.detach()))
    if torch.is_grad_enabled():
        x = x.detach()
        change, jacobian = with_jacobian(g, x)
        error = x + change - y
        x = x - torch.linalg.solve(_plus_identity(jacobian).detach(), error[:, :, None])[:, :, 0]
    return x, -step_forward(g, x, estimate=estimate)[1]


def with_jacobian(g: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(g(x), J)`` with the Jacobians (B, D, D), whose rows are computed in one batch."""
    change, product = torch.func.vjp(g, x)  # pyright: ignore[reportAssignmentType]
    rows = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None].expand(-1, *x.shape)
    return change, torch.func.vmap(product, out_dims=1)(rows)[0]


def _plus_identity(jacobian: Tensor) -> Tensor:
    return jacobian + torch.eye(jacobian.shape[1], dtype=jacobian.dtype, device=jacobian.device)


def estimated(g: Function, x: Tensor, noise: Tensor, further: int) -> tuple[Tensor, Tensor]:
    """As `step_forward`, by 2 terms of the series and `further` ones, a geometric number >= 1.

    The series is multiplied by a random vector of signs for each example. Term k is divided by
    the probability that it is computed, so the expectation is that of all terms, and that of the
    gradient is the gradient of all terms.
    """
    wanted = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad and wanted else x.detach().requires_grad_()
        change, row, log_det = g(x), noise, torch.zeros_like(x[:, 0])
        for k in range(1, 3 + further):
            (row,) = torch.autograd.grad(change, x, row, create_graph=True)
            weight = -((-1) ** k) / k * 2.0 ** max(0, k - 3)
            log_det = log_det + weight * (row * noise).sum(1)
    y = x + change
    return (y, log_det) if wanted else (y.detach(), log_det.detach())
