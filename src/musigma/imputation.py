"""Missing values, filled by a VAE that is trained on the others."""

from __future__ import annotations

import torch
from torch import Tensor

from musigma import context as contexts
from musigma.context import Context
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["impute"]


@torch.no_grad()
def impute(
    model: Model, x: Tensor, k: int = 1000, context: Context = None, *, at_once: int = 20_000
) -> Tensor:
    r"""The mean of missing values given the observed ones, by importance sampling.

    .. math:: E[x_m | x_o] \approx \sum_i \frac{w_i}{\sum_j w_j} E[x_m | z_i], \quad
        z_i \sim q(z | x_o), \quad w_i = p(x_o, z_i) / q(z_i | x_o)

    The error vanishes as k grows. (Mattei & Frellsen, "MIWAE: Deep Generative Modelling and
    Imputation of Incomplete Data Sets", 2019, arXiv:1812.02633.)

    Args:
        model: A model that takes NaN, such as `musigma.build("miwae", (D,))`.
        x: Rows (B, D), NaN where a value is missing.
        k: Draws of z for each row.
        context: One row per example, or None.
        at_once: Number of draws per pass.

    Returns:
        x, with the missing values filled.

    Raises:
        ValueError: If k is below 1.

    Example:
        >>> import musigma
        >>> model = musigma.build("miwae", (3,), latents=2, width=8)
        >>> x = torch.tensor([[0.5, torch.nan, 1.0]])
        >>> filled = impute(model, x, k=10)
        >>> bool(filled.isnan().any()), bool(filled[0, 2] == 1)
        (False, True)
    """
    if k < 1:
        raise ValueError(f"k: expected 1 or more draws; got {k}")
    filled, sites = [], list(model.latents())
    for rows, given in contexts.in_parts(model.floating(x), context, max(1, at_once // k)):
        given, trace = contexts.repeat(given, k), Trace()
        model.infer(rows.repeat_interleave(k, 0), trace, given)
        log_w = trace.evidence(sites).elbo.reshape(len(rows), k)
        mean = model.decode([trace.values[site] for site in sites], given, mode=True)
        weighed = torch.einsum("bk,bkd->bd", log_w.softmax(1).to(mean), mean.unflatten(0, (-1, k)))
        filled.append(torch.where(rows.isnan(), weighed.to(rows), rows))
    return torch.cat(filled)
