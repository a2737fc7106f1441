"""Wake-sleep: the generative model learns from data, and q from the model's own draws."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from musigma.objectives.base import register, straight, terms_of
from musigma.objectives.parts import latent_draws, log_q
from musigma.trace import Recorder

__all__ = ["reweighted_wake_sleep", "wake_sleep"]


def _data(record: Recorder, name: str) -> tuple[Recorder, Tensor]:
    """The same data and draws as constants, and log q of them (B,)."""
    latent_draws(record, name)  # refuses flows
    draws = {site: z.detach() for site, z in record.draws.items()}
    again = record.again(given=draws)
    return again, log_q(again, draws)


def _sleep(record: Recorder) -> Tensor:
    """-log q of latents from which the model drew data, given these data, (B,)."""
    dream = record.dream()
    draws = {site: z for site, z in dream.draws.items() if site not in record.below}
    return -log_q(record.again(dream.x, given=draws), draws)


def wake_sleep(record: Recorder) -> Tensor:
    r"""-log p(x, z) for z ~ q(z | x), and -log q(z | x) for (x, z) ~ p. Nats, (B,).

    .. math:: -\log p_\theta(x, z) - \log q_\phi(\tilde z | \tilde x), \quad
        z \sim q_\phi(z | x), \quad (\tilde x, \tilde z) \sim p_\theta

    All draws are constants, so they need not be reparameterized, and no score-function estimator
    is used. The sum is no bound: the first term is minimized by the generative model, the second
    by q; parameters that they share follow both. (Hinton, Dayan, Frey, Neal, "The 'wake-sleep'
    algorithm for unsupervised neural networks", 1995.) Three more passes per step.
    """
    again, log_density = _data(record, "wake-sleep")
    wake = terms_of(again).elbo + log_density  # log p(x, z)
    return _sleep(record) - wake - terms_of(record).auxiliary


def reweighted_wake_sleep(
    record: Recorder, *, k: int = 5, phase: Literal["both", "wake", "sleep"] = "both"
) -> Tensor:
    r"""`iwae`, with gradients by reweighted wake-sleep. Nats, (B,).

    .. math:: -\sum_i \tilde w_i \nabla_\theta \log p(x, z_i), \quad
        -\sum_i \tilde w_i \nabla_\phi \log q(z_i | x)

    with normalized weights of k draws, which are constants. The first is the gradient of `iwae`;
    the second is a consistent estimate, in k, of that of KL(p(z | x) || q(z | x)). (Bornschein &
    Bengio, "Reweighted Wake-Sleep", 2015, arXiv:1406.2751.)

    Args:
        record: A pass in which every example is repeated k times.
        k: Draws per example.
        phase: How q learns: from data (`wake`), from draws of the model (`sleep`, as
            `wake_sleep`), or from the mean of both.

    Raises:
        ValueError: For another phase.
    """
    if phase not in ("both", "wake", "sleep"):
        raise ValueError(f"phase: expected 'both', 'wake' or 'sleep'; got {phase!r}")
    again, log_density = _data(record, "reweighted-wake-sleep")
    log_w = terms_of(again).elbo.reshape(-1, k)
    log_density = log_density.reshape(-1, k)
    weights = log_w.detach().softmax(1)
    loss = -(weights * (log_w + log_density)).sum(1)
    by_data = -(weights * log_density).sum(1)
    share = {"wake": 1.0, "both": 0.5, "sleep": 0.0}[phase]
    loss = loss + share * by_data
    if phase != "wake":
        loss = loss + (1 - share) * _sleep(record).reshape(-1, k).mean(1)
    bound = log_w.logsumexp(1) - math.log(k)
    auxiliary = terms_of(record).auxiliary.expand(len(record.x)).reshape(-1, k).mean(1)
    return straight(-bound, loss) - auxiliary


for function in (wake_sleep, reweighted_wake_sleep):  # no score-function estimator
    register(function, applies_surrogate=True, closed_form=False)
