"""iVAE: the body of its `update`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from iVAE.model import iVAE

DISTRIBUTION = "iVAE"
EXPECTED = {"ivae": "bug kl_mismatch"}  # sampled: softplus(s); scored: exp(s / 2)


def make_ivae_step() -> Callable[[], torch.Tensor]:
    torch.manual_seed(0)
    agent = iVAE(1.0, 1.0, 0.0, 0.0, 0.0, 20, 16, 4, 2, 1e-4, torch.device("cpu"))
    counts = torch.poisson(torch.full((16, 20), 3.0))

    def step() -> torch.Tensor:
        _, mean, scale, x, _, _, x2 = agent.nn(counts)
        total, disp = counts.sum(-1).view(-1, 1), torch.exp(agent.nn.decoder.disp)
        likelihood = agent._log_nb(counts, x * total, disp).sum(-1).mean()
        likelihood = likelihood + agent._log_nb(counts, x2 * total, disp).sum(-1).mean()
        zero = torch.zeros_like(mean)
        return agent._normal_kl(mean, scale, zero, zero).sum(-1).mean() - likelihood

    return step
