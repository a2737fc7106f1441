"""Priors that are fitted after training, to the latents of the data."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from musigma.checkpoint import rebuild, require_config
from musigma.context import Context
from musigma.data import Dataset
from musigma.evaluation import batch, batches, check, evaluating
from musigma.model import VAE, Model
from musigma.trace import Recorder

__all__ = ["fit_prior"]


def fit_prior(
    model: Model,
    data: Dataset,
    prior: str,
    *,
    steps: int = 2000,
    batch_size: int = 512,
    lr: float = 2e-3,
    seed: int = 0,
) -> Model:
    r"""A copy of a VAE whose prior is another one, fitted to its latents; all else is unchanged.

    .. math:: \max_p\ E_{x \sim data}\ E_{q(z|x)} \log p(z)

    which maximizes the ELBO over the prior. A mixture is fitted by expectation-maximization to one
    draw of z for each example, and other priors by gradients. What is returned has a configuration
    of its own: it is saved, sampled, scored and compressed as any other model. (Dai & Wipf,
    "Diagnosing and Enhancing VAE Models", 2019, arXiv:1903.05789; Ghosh et al., "From Variational
    to Deterministic Autoencoders", 2020, arXiv:1903.12436.)

    Args:
        model: A VAE of the zoo, built by an architecture with the option `prior`.
        data: Its training data.
        prior: The new prior, as the option takes it: 'mixture components=10', or 'nsf depth=3'.
        steps: Number of steps, for priors that are fitted by gradients.
        batch_size: Number of latents in each step.
        lr: Learning rate of Adam, which falls to zero.
        seed: Random seed.

    Raises:
        ValueError: If the model is no VAE whose prior can be replaced, or the data do not fit it.
    """
    require_config(model)
    options = dict(model.config["options"])
    if "prior" not in options or _vae(model) is None:
        raise ValueError(
            f"model: {model.config['architecture']} has no option `prior`; expected a VAE such as "
            "vae"
        )
    check(model, data)
    torch.manual_seed(seed)
    new = rebuild({**model.config, "options": {**options, "prior": prior}})
    new.to(next(model.parameters())).eval()
    vae = _vae(new)
    assert vae is not None
    own = new.site_names()[vae.prior] + "."
    kept = {name: t for name, t in model.state_dict().items() if not name.startswith(own)}
    new.load_state_dict({k: t for k, t in new.state_dict().items() if k.startswith(own)} | kept)
    rows = np.random.default_rng(seed)
    first = batch(data, rows.permutation(len(data))[:512], new, seed=seed)
    with torch.no_grad(), evaluating(model):
        if (fitted := getattr(getattr(vae.prior, "head", None), "fit", None)) is not None:
            parts = batches(model, data, batch_size=batch_size, seed=seed)
            fitted(torch.cat([_latents(model, *part) for part in parts]))
            return new
    new.calibrate(*first)
    parameters = list(vae.prior.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    trained = {id(p) for p in parameters}
    for p in new.parameters():
        p.requires_grad_(id(p) in trained)
    for step in range(steps if parameters else 0):
        chosen = rows.integers(len(data), size=min(batch_size, len(data)))
        loss = -new(*batch(data, chosen, new, seed=seed, step=step)).elbo.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return new.requires_grad_(True)


def _vae(model: Model) -> VAE | None:
    return next((m for m in model.modules() if isinstance(m, VAE)), None)


def _latents(model: Model, x: Tensor, context: Context) -> Tensor:
    """A draw of the z that the prior of the VAE scores, for each example."""
    vae, record = _vae(model), Recorder(scoring=False)
    assert vae is not None
    model.infer(model.floating(x), record, context)
    z = record.values.get(vae.prior)
    return record.qs[vae].sample() if z is None else z
