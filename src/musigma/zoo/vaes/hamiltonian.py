"""Posteriors by Hamiltonian dynamics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from musigma import context as contexts
from musigma.context import conditioned
from musigma.distributions import POSTERIORS, StandardNormal
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.model import VAE, Bijection, Model, Prior
from musigma.trace import Trace

__all__ = ["HamiltonianHead", "HamiltonianVAE", "Leapfrog"]


class Potential:
    """The gradient of U(z) = -log p(x | z) - log p(z), for given data."""

    def __init__(self, model: VAE, x: Tensor, context: Any):
        self.model, self.x, self.context = model, x, context

    def __getitem__(self, rows: Any) -> Potential:
        return Potential(self.model, self.x[rows], contexts.rows(self.context, rows))

    def gradient(self, z: Tensor) -> Tensor:
        """∇U(z), (B, D), itself differentiable if gradients are enabled."""
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            p = conditioned(self.model.decoder, z, self.context)
            log_p = p.log_prob(self.x) + self.model.prior.log_prob(z, self.context)
            return -torch.autograd.grad(log_p.sum(), z, create_graph=create_graph)[0]


class Leapfrog(Bijection):
    r"""Steps of the leapfrog integrator on (z, ρ), each followed by a cooling of the momentum ρ.

    .. math:: \tilde\rho = \rho - \tfrac\epsilon2 \nabla U(z), \quad z' = z + \epsilon\tilde\rho,
        \quad \rho' = \sqrt{\beta_{k-1}/\beta_k}\,(\tilde\rho - \tfrac\epsilon2 \nabla U(z'))

    with :math:`\beta_k^{-1/2} = \beta_0^{-1/2} + (1 - \beta_0^{-1/2})\, k^2/K^2`. A step of the
    integrator keeps the volume, so log |det| is D/2 · log β_0.

    Args:
        size: D.
        steps: K.
        step_size: The initial ε; one for each dimension is learned.
        beta: The initial β_0, between 0 and 1, which is learned.
    """

    def __init__(self, size: int, steps: int, step_size: float, beta: float):
        super().__init__()
        self.steps = steps
        self.log_step = nn.Parameter(torch.full((size,), math.log(step_size)))
        self.logit_beta = nn.Parameter(torch.tensor(math.log(beta / (1 - beta))))

    def coolings(self) -> list[Tensor]:
        """The factor of the momentum after each step; their product is sqrt(β_0)."""
        hot = self.logit_beta.sigmoid().rsqrt()
        roots = [hot + (1 - hot) * (k / self.steps) ** 2 for k in range(self.steps + 1)]
        return [after / before for before, after in itertools.pairwise(roots)]

    def _log_det(self, pair: Tensor) -> Tensor:
        size = self.log_step.numel()
        return (0.5 * size * self.logit_beta.sigmoid().log()).expand(len(pair))

    def forward(self, x: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """(z_0, ρ_0) to (z_K, ρ_K), for a `Potential` as context."""
        (z, rho), step = x.chunk(2, 1), self.log_step.exp()
        for cooling in self.coolings():
            rho = rho - 0.5 * step * context.gradient(z)
            z = z + step * rho
            rho = cooling * (rho - 0.5 * step * context.gradient(z))
        return torch.cat([z, rho], 1), self._log_det(x)

    def inverse(self, y: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """(z_K, ρ_K) to (z_0, ρ_0)."""
        (z, rho), step = y.chunk(2, 1), self.log_step.exp()
        for cooling in reversed(self.coolings()):
            rho = rho / cooling + 0.5 * step * context.gradient(z)
            z = z - step * rho
            rho = rho + 0.5 * step * context.gradient(z)
        return torch.cat([z, rho], 1), -self._log_det(y)


class HamiltonianVAE(VAE):
    r"""A VAE whose posterior is a Gaussian that follows the dynamics of -log p(x, z).

    .. math:: \log w = \log p(x, z_K) + \log N(\rho_K; 0, I) + \tfrac D2\log\beta_0
        - \log q(z_0|x) - \log N(\rho_0; 0, I/\beta_0)

    The latents are z and the momentum ρ, on which the decoder does not depend. (Caterini, Doucet,
    Sejdinovic, "Hamiltonian Variational Auto-Encoder", 2018, arXiv:1805.11328.)

    Args:
        encoder: A `HamiltonianHead`.
        decoder: As in `VAE`.
        prior: A `Prior`.

    Raises:
        ValueError: For another prior.
    """

    def __init__(self, encoder: Any, decoder: nn.Module, prior: Model):
        if not isinstance(prior, Prior):
            raise ValueError(
                "prior: the posterior 'hamiltonian' takes the second derivative of log p(z), and "
                f"one distribution, such as 'normal' or 'mixture'; got a {type(prior).__name__}"
            )
        super().__init__(encoder, decoder, prior)
        self.momentum = Prior(StandardNormal((encoder.size,)))

    @property
    def leapfrog(self) -> Leapfrog:
        """The dynamics."""
        return self.encoder.leapfrog  # pyright: ignore[reportReturnType]

    def _hot(self, like: Tensor) -> DiagonalGaussian:
        """N(0, I/β_0)."""
        log_std = -0.5 * self.leapfrog.logit_beta.sigmoid().log()
        return DiagonalGaussian(torch.zeros_like(like), log_std.expand_as(like), 1)

    def _moved(self, pair: Tensor, trace: Trace, x: Tensor, context: Any) -> tuple[Tensor, ...]:
        """z and ρ at the other end of the dynamics."""
        force: Any = Potential(self, x, context)
        return trace.bijection(self.leapfrog, pair, force).chunk(2, 1)

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """z_0 ~ q and ρ_0, the dynamics, then p(x | z_K), p(z_K) and p(ρ_K)."""
        z = trace.q(self, conditioned(self.encoder, x, context))
        rho = trace.q(self.momentum, self._hot(z))
        z, rho = self._moved(torch.cat([z, rho], 1), trace, x, context)
        trace.p(self, conditioned(self.decoder, z, context), x)
        self.prior.infer(z, trace, context)
        self.momentum.infer(rho, trace)

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """z ~ p(z) and ρ ~ N(0, I), then x ~ p(x | z)."""
        z, rho = self.prior.generate(trace, context), self.momentum.generate(trace)
        x = trace.p(self, conditioned(self.decoder, z, context))
        if trace.scoring:
            z, rho = self._moved(torch.cat([z, rho], 1), trace, x, context)
            trace.q(self, conditioned(self.encoder, x, context), z)
            trace.q(self.momentum, self._hot(z), rho)
        return x

    def variables(self):
        """Those of the prior, the momentum, and the observation."""
        yield from self.latents()
        yield self

    def latents(self):
        """Those of the prior, and the momentum."""
        yield from self.prior.variables()
        yield self.momentum


class HamiltonianHead(GaussianHead):
    """The Gaussian in which the dynamics begin, and the dynamics; a `HamiltonianVAE` runs them."""

    model = HamiltonianVAE

    def __init__(self, net: nn.Module, size: int, format: Format, leapfrog: Leapfrog):
        super().__init__(net, event_ndims=1, format=format)
        self.size, self.leapfrog = size, leapfrog


@POSTERIORS.register
def hamiltonian(
    size: int,
    net: Callable[[int], nn.Module],
    format: Format,
    *,
    steps: int = 3,
    step_size: float = 0.05,
    beta: float = 0.5,
) -> HamiltonianHead:
    """A diagonal Gaussian that `steps` leapfrog steps move toward the posterior, with cooling."""
    return HamiltonianHead(net(2 * size), size, format, Leapfrog(size, steps, step_size, beta))
