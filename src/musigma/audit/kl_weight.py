"""The terms of the loss against each other: the weight of the KL."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.heads import encoded
from musigma.audit.reduction import Reconstruction, combination
from musigma.audit.sandbox import TooSlowError, first
from musigma.audit.vae_state import VAEAudit

__all__ = ["check_kl_weight"]

Weights = dict[int, tuple[float, float]]
"""By the size of a batch: a and b of loss = a recon + b KL."""


def check_kl_weight(audit: VAEAudit) -> None:
    """The weight of the KL against the reconstruction, in the terms and in the loss."""
    reconstruction = None
    if audit.has("recon"):
        reconstruction = _reconstruction(audit, _x_hat(audit))
        if reconstruction is None:
            return
        if not reconstruction.finite:
            audit.bug(
                "not_finite",
                "recon returns NaN or infinity",
                "check what it takes the logarithm of",
            )
            return
    weights: Weights = {}
    needed = ("sample", "kl", "recon", "decode")
    if audit.has("loss", *needed):
        for batch in (audit.example, torch.cat([audit.example, audit.example])):
            pair = _loss_weights(audit, batch)
            if pair is None:
                break
            weights[len(batch)] = pair
    elif audit.has("loss"):
        missing = [name for name in needed if not audit.has(name)]
        audit.unchecked.append(f"the loss: without {', '.join(missing)}")
    if reconstruction is not None and audit.has("kl") and audit.kl_fits:
        _check_balance(audit, reconstruction, weights)
    elif audit.has("recon"):
        audit.unchecked.append("the weight of the KL: the KL itself is wrong or unknown")


def _reconstruction(audit: VAEAudit, x_hat: Tensor) -> Reconstruction | None:
    """The term at an x_hat in a shape that it takes; None if there is none, without `decode`."""
    x, recon = audit.example, audit.functions["recon"]
    reason: AuditError | None = None
    for shape in dict.fromkeys((x_hat.shape, x.shape, x_hat.flatten(1).shape)):
        if math.prod(shape) == x_hat.numel():
            try:
                return Reconstruction(audit.sandbox, recon, x, x_hat.reshape(shape))
            except TooSlowError:
                raise
            except AuditError as error:
                reason = reason or error
    if audit.has("decode") and reason is not None:
        raise reason
    audit.unchecked.append(f"recon: without `decode`, no input that it takes was found ({reason})")
    return None


def _x_hat(audit: VAEAudit) -> Tensor:
    """A tensor of the data's shape and range to compare the data with."""
    sandbox, x = audit.sandbox, audit.example
    if audit.has("decode"):
        mean, _ = encoded(audit)
        decode = audit.functions["decode"]
        x_hat = sandbox.to_input(sandbox.ask_first("decode", decode, sandbox.to_input(mean)))
        if x_hat.numel() == x.numel():
            return x_hat
        audit.unchecked.append(
            f"decode's answer: shape {tuple(x_hat.shape)}, not that of the example, "
            f"{tuple(x.shape)}"
        )
    generator = torch.Generator().manual_seed(2)
    u = sandbox.to_input(torch.rand(x.shape, generator=generator, dtype=torch.float64))
    low, high = float(x.min()), float(x.max())
    return 0.1 + 0.8 * u if low >= 0 and high <= 1 else low + (high - low) * u


def _loss_weights(audit: VAEAudit, x: Tensor) -> tuple[float, float] | None:
    """a and b of loss = a recon + b KL, with the same noise in both, over several batches."""
    what = "the loss against its terms"
    try:
        losses, recons, kls = torch.tensor(
            [_terms(audit, x, seed) for seed in range(8)], dtype=torch.float64
        ).T
    except AuditError as error:
        audit.unchecked.append(f"{what}: {error}")
        return None
    if float(losses.std()) < 1e-12:
        audit.unchecked.append(f"{what}: it does not vary")
        return None
    tolerance = 1e-4 if audit.sandbox.dtype == torch.float64 else 1e-2
    pair = combination(losses, recons, kls, tolerance)
    if pair is None:
        audit.unchecked.append(f"{what}: it has other terms, or other draws")
        return None
    a, b = pair
    audit.details["loss"] = {"recon_weight": a, "kl_weight": b, "beta": b / a if a else None}
    audit.checked.append(f"loss = {a:.5g} recon + {b:.5g} KL")
    if a and b / a < 0 and audit.kl_slope > 0:
        audit.bug(
            "kl_scale",
            f"the loss rewards the KL: its weight is {b / a:.4g}",
            "add the KL to the reconstruction error",
            beta=b / a,
        )
    return pair


def _terms(audit: VAEAudit, x: Tensor, seed: int) -> tuple[float, float, float]:
    """Loss, reconstruction and KL of a batch drawn from x."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batch = x[order.to(x.device)]
    if len(x) > 2 and seed % 2:
        batch = torch.cat([batch[:-1], batch[:1]])
    audit.sandbox.reseed(seed)
    loss = audit.call("loss", batch.clone())
    if isinstance(loss, dict):
        loss = loss.get("loss", next(iter(loss.values())))
    audit.sandbox.reseed(seed)
    heads = audit.call("encode", batch.clone())
    heads = tuple(heads)[:2] if isinstance(heads, (tuple, list)) else (heads,)
    z = first(audit.call("sample", *(head.clone() for head in heads)))
    kl = audit.call("kl", *heads, *([z] if audit.kl_uses_sample else []))
    x_hat = first(audit.call("decode", z))
    try:
        recon = audit.call("recon", batch.clone(), x_hat)
    except AuditError:
        recon = audit.call("recon", batch.clone(), x_hat.reshape(batch.shape))
    loss, recon, kl = (
        float(audit.sandbox.as_tensor(name, first(value)).sum())
        for name, value in (("loss", loss), ("recon", recon), ("kl", kl))
    )
    return loss, recon, kl


def _power(growth: dict[int, float] | None) -> float:
    """p, where n examples give n^p times what one gives: 1 for a sum, 0 for a mean."""
    return math.log(max(growth[8], 1e-12)) / math.log(8) if growth else 1.0


def _check_balance(audit: VAEAudit, reconstruction: Reconstruction, weights: Weights) -> None:
    """Whether the weight of the KL stays the same when batch, latent or data change their size."""
    same_reduction = "reduce both over the batch alike: sum over an example, then take the mean"
    kl_grows, recon_grows = audit.kl_growth, reconstruction.growth()
    power = _power(kl_grows) - _power(recon_grows)
    alike = True
    if kl_grows and recon_grows and not weights:
        alike = all(abs(kl_grows[n] / recon_grows[n] - 1) <= 1e-3 for n in kl_grows)
    if kl_grows and recon_grows and not alike:
        rho, size = reconstruction.rho(), len(audit.example)
        here = audit.kl_slope / rho * size**power if rho else math.nan
        audit.find(  # a weight of 1 here: the code was written for batches of this size
            "reduction_imbalance",
            "warning" if abs(here - 1) < 1e-2 else "bug",
            "the weight of the KL changes with the batch: for 8 examples the KL is "
            f"{kl_grows[8]:.4g} times that of one, the reconstruction {recon_grows[8]:.4g} times",
            same_reduction,
            kl_growth=kl_grows[8],
            recon_growth=recon_grows[8],
        )
        return
    if audit.details.get("kl_returns") == "per dimension" or reconstruction.kind == "per element":
        audit.unchecked.append("the weight of the KL: a term is not reduced over an example")
        return
    rho = reconstruction.rho()
    if rho is None:
        audit.unchecked.append("the weight of the KL: the reconstruction is no sum of elements")
        return
    betas = [
        audit.kl_slope / rho * size**power * b / a for size, (a, b) in weights.items() if a
    ] or [audit.kl_slope / rho]
    beta = betas[0]
    audit.details["beta"] = beta
    if abs(betas[-1] / beta - 1) > 1e-2:
        audit.bug(
            "reduction_imbalance",
            f"the weight of the KL in the loss changes with the batch: {beta:.5g} for "
            f"{next(iter(weights))} examples, {betas[-1]:.5g} for {list(weights)[-1]}",
            same_reduction,
            beta=beta,
            beta_of_twice_the_batch=betas[-1],
        )
        return
    n, d = math.prod(audit.example.shape[1:]), audit.sampler.d
    if abs(beta - 1) < 1e-2:
        audit.findings.pop("kl_scale", None)  # the reduction explains it
        audit.checked.append("the weight of the KL is 1, over whole examples")
        return
    half, kl_half = reconstruction.rho(halved=True), audit.kl_halved
    data_mean = abs(half / rho - 1) > 1e-2 if half is not None else abs(rho * n - 1) < 1e-3
    latent_mean = (
        abs(kl_half - 1) < 1e-2 if kl_half is not None else abs(audit.kl_slope * d - 1) < 1e-3
    )
    means = {}
    if data_mean and (half is not None or n > 1):
        means["data"] = f"the reconstruction is a mean over {n} elements"
    if latent_mean and d > 1:
        means["latent"] = f"the KL is a mean over {d} latents"
    if means:
        audit.bug(
            "reduction_imbalance",
            f"the weight of the KL is {beta:.5g} here and changes with the size of the "
            f"{' and the '.join(means)}: {' and '.join(means.values())}",
            "sum both over all of an example, and take the mean over the batch only",
            beta=beta,
            rho=rho,
            kl_slope=audit.kl_slope,
            elements=n,
            latents=d,
        )
    else:
        audit.checked.append(f"the weight of the KL is {beta:.5g}, whatever the sizes")
