"""A score of models with a posterior: what its encoder loses on one example."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import Context
from musigma.data import Dataset
from musigma.detectors.reference import DETECTORS, Reference
from musigma.evaluation import noise
from musigma.gaussian import DiagonalGaussian
from musigma.model import Model
from musigma.tensors import frozen
from musigma.trace import Recorder, Trace

__all__ = ["likelihood_regret"]


@DETECTORS.register
def likelihood_regret(
    reference: Reference, data: Dataset, *, steps: int = 100, lr: float = 0.05, draws: int = 16
) -> np.ndarray:
    r"""How much the ELBO of one example rises if its posterior is optimized for it, in nats.

    .. math:: \max_{\mu, \sigma} \mathrm{ELBO}(x; N(\mu, \sigma^2)) - \mathrm{ELBO}(x; q(z | x))

    The encoder serves examples like those of the training, so it loses more on others. The maximum
    is found by a bounded number of steps of Adam from the encoder's posterior, whose learning rate
    falls to zero. Both terms are then estimated from the same noise, in pairs of a draw and its
    reflection at the mean. The result is not below 0, since the encoder's posterior is one of
    those that are compared. (Xiao, Yan, Amit, "Likelihood Regret:
    An Out-of-Distribution Detection Score For Variational Auto-encoder", 2020, arXiv:2003.02977.)

    Args:
        reference: A model with one latent, whose posterior is a diagonal Gaussian.
        data: The examples.
        steps: Steps for each example: passes with a gradient, through all but the encoder.
        lr: The learning rate of the first step, for the mean and for log_std.
        draws: Number of draws from each posterior, in pairs.

    Raises:
        ValueError: If the model has no such posterior, or an option is not positive.
    """
    if steps < 1 or draws < 1 or not lr > 0:
        raise ValueError(
            f"likelihood_regret: expected steps and draws of 1 or more, and a positive lr; got "
            f"{steps}, {draws} and {lr}"
        )
    parts = [
        _regret(reference.model, x, context, steps, lr, draws, reference.seed).cpu()
        for x, context in reference.batches(data, "optimizing posteriors")
    ]
    return torch.cat(parts).double().numpy()


def _regret(
    model: Model, x: Tensor, context: Context, steps: int, lr: float, draws: int, seed: int
) -> Tensor:
    """The regret of a batch, (B,)."""
    with frozen(model.parameters()):
        encodings: dict[nn.Module, Any] = {}  # the encoder runs once
        with torch.no_grad():
            q = _posterior(model, x, context, encodings)
        mean, log_std = (t.detach().clone().requires_grad_() for t in (q.mean, q.log_std))

        def elbo(mean: Tensor, log_std: Tensor, white: Tensor | None = None) -> Tensor:
            own = DiagonalGaussian(mean, log_std, q.event_ndims)
            return model(x, context, trace=_Own(own, white, encodings)).elbo

        optimizer = torch.optim.Adam([mean, log_std], lr)
        for step in range(steps):
            with torch.enable_grad():
                gradients = torch.autograd.grad(-elbo(mean, log_std).sum(), [mean, log_std])
            mean.grad, log_std.grad = (g.nan_to_num(0.0, 0.0, 0.0) for g in gradients)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        with torch.no_grad():
            pairs = math.ceil(draws / 2)
            for pair in range(pairs):
                white = torch.randn_like(mean)
                for own, sign in (((mean, log_std), 0.5), ((q.mean, q.log_std), -0.5)):
                    for reflected in (white, -white):
                        noise(seed, pair)  # that of dequantization is the same in all four
                        total += sign * elbo(*own, reflected).double()
    return (total / pairs).clamp(min=0)


def _posterior(
    model: Model, x: Tensor, context: Context, encodings: dict[nn.Module, Any]
) -> DiagonalGaussian:
    """The posterior of the only latent, if it is a diagonal Gaussian."""
    record = Recorder(encodings=encodings)
    model(x, context, trace=record)
    found = [q for site, q in record.qs.items() if not _is_noise(site)]
    if len(found) != 1 or not isinstance(found[0], DiagonalGaussian):
        kinds = ", ".join(type(q).__name__ for q in found) or "none"
        raise ValueError(
            "likelihood_regret: expected a model with one latent whose posterior is a diagonal "
            f"Gaussian, such as `vae`; the posteriors of this one are: {kinds}"
        )
    return found[0]


def _is_noise(site: nn.Module) -> bool:
    """Whether a draw is noise of dequantization."""
    return bool(getattr(site, "is_preprocessing", False))


class _Own(Trace):
    """A pass in which the latent is drawn from a given posterior, by noise that may be given."""

    def __init__(
        self, own: DiagonalGaussian, white: Tensor | None, encodings: dict[nn.Module, Any]
    ):
        super().__init__(closed_form=True, encodings=encodings)
        self.own, self.drawn = own, None if white is None else own.unwhiten(white)

    def q(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        """As `Trace.q`."""
        if _is_noise(site):
            return super().q(site, dist, value)
        return super().q(self._given(site), self.own, value)

    def latent(self, site: nn.Module, q: Distribution, p: Distribution) -> Tensor:
        """As `Trace.latent`."""
        return super().latent(self._given(site), self.own, p)

    def _given(self, site: nn.Module) -> nn.Module:
        """The site, whose value is given if the noise is."""
        if self.drawn is not None:
            self.given = {site: self.drawn}
        return site
