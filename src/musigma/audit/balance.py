"""The terms of the loss against each other: how much does the KL weigh?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from musigma.audit.case import Case
from musigma.audit.findings import AuditError
from musigma.audit.heads import encoded
from musigma.audit.probes import TooSlowError
from musigma.audit.reduction import Reconstruction, combination

__all__ = ["on_data"]


def on_data(case: Case, encode, sample, kl, recon, decode, loss) -> None:
    """The weight of the KL against the reconstruction, in the terms and in the loss."""
    x = case.given
    reconstruction = None
    if recon is not None:
        x_hat = _x_hat(case, encode, decode, x)
        reconstruction = _reconstruction(case, recon, x, x_hat, decode is not None)
        if reconstruction is None:
            return
        if not reconstruction.finite:
            case.find(
                "not_finite", "bug", "recon returns NaN or infinity",
                "look at what it takes the logarithm of",
            )  # fmt: skip
            return
    weights: dict[int, tuple[float, float]] = {}
    if None not in (loss, recon, kl, decode, sample):
        for batch in (x, torch.cat([x, x])):
            found = _loss(case, encode, sample, kl, recon, decode, loss, batch)
            if found is None:
                break
            weights[len(batch)] = found
    elif loss is not None:
        missing = [n for n, f in (("sample", sample), ("kl", kl), ("recon", recon),
                                  ("decode", decode)) if f is None]  # fmt: skip
        case.unchecked.append(f"the loss: without {', '.join(missing)}")
    if reconstruction is not None and kl is not None and case.kl_fits:
        _balance(case, reconstruction, weights)
    elif recon is not None:
        case.unchecked.append("the weight of the KL: the KL itself is not right, or not known")


def _reconstruction(
    case: Case, recon, x: Tensor, x_hat: Tensor, decoded: bool
) -> Reconstruction | None:
    """The term, with what is compared in a shape that it takes; None if that is only a guess."""
    reason: AuditError | None = None
    for shape in dict.fromkeys((x_hat.shape, x.shape, x_hat.flatten(1).shape)):
        if math.prod(shape) == x_hat.numel():
            try:
                return Reconstruction(case.guest, recon, x, x_hat.reshape(shape))
            except TooSlowError:
                raise
            except AuditError as error:
                reason = reason or error
    if decoded and reason is not None:
        raise reason
    case.unchecked.append(f"recon: without `decode`, nothing that it takes was found ({reason})")
    return None


def _x_hat(case: Case, encode, decode, x: Tensor) -> Tensor:
    """Something of the data's shape and range to compare the data with."""
    guest = case.guest
    if decode is not None:
        mean, _ = encoded(case, encode, x)
        value = guest.call("decode", decode, guest.given(mean))
        value = value[0] if isinstance(value, (tuple, list)) else value
        x_hat = guest.given(guest.tensor("decode", value))
        if x_hat.numel() == x.numel():
            return x_hat
        case.unchecked.append(
            f"decode's answer: shape {tuple(x_hat.shape)}, not that of the example, "
            f"{tuple(x.shape)}"
        )
    generator = torch.Generator().manual_seed(2)
    u = guest.given(torch.rand(x.shape, generator=generator, dtype=torch.float64))
    low, high = float(x.min()), float(x.max())
    if low >= 0 and high <= 1:
        return 0.1 + 0.8 * u
    return low + (high - low) * u


def _loss(
    case: Case, encode, sample, kl, recon, decode, loss, x: Tensor
) -> tuple[float, float] | None:
    """a and b of loss = a recon + b KL, with the same noise in both; under random parameters."""
    guest = case.guest
    try:
        values = [_terms(case, encode, sample, kl, recon, decode, loss, x, s) for s in range(8)]
    except AuditError as error:
        case.unchecked.append(f"the loss against its terms: {error}")
        return None
    losses, recons, kls = (torch.stack(v) for v in zip(*values, strict=True))
    if float(losses.std()) < 1e-12:
        case.unchecked.append("the loss against its terms: it does not vary")
        return None
    found = combination(losses, recons, kls, 1e-4 if guest.dtype == torch.float64 else 1e-2)
    if found is None:
        case.unchecked.append("the loss against its terms: it has others, or draws otherwise")
        return None
    a, b = found
    case.details["loss"] = {"recon_weight": a, "kl_weight": b, "beta": b / a if a else None}
    case.checked.append(f"loss = {a:.5g} recon + {b:.5g} KL")
    if a and b / a < 0 and case.kl_slope > 0:
        case.find(
            "kl_scale", "bug", f"the loss rewards the KL: its weight is {b / a:.4g}",
            "add the KL to the reconstruction error", beta=b / a,
        )  # fmt: skip
    return found


def _terms(case: Case, encode, sample, kl, recon, decode, loss, x: Tensor, seed: int):
    """Loss, reconstruction and KL of a batch that is the example times a number."""
    guest = case.guest
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)]
    if len(x) > 2:
        some = some[:-1].clone() if seed % 2 else some
        some = torch.cat([some, some[:1]]) if seed % 2 else some
    guest.reseed(seed)
    value = guest.call("loss", loss, some.clone())
    if isinstance(value, dict):
        value = value.get("loss", next(iter(value.values())))
    if isinstance(value, (tuple, list)):
        value = value[0]
    total = guest.tensor("loss", value).sum()
    guest.reseed(seed)
    heads = guest.call("encode", encode, some.clone())
    heads = tuple(heads)[:2] if isinstance(heads, (tuple, list)) else (heads,)
    z = guest.call("sample", sample, *(h.clone() for h in heads))
    z = z[0] if isinstance(z, (tuple, list)) else z
    if case.kl_uses_sample:
        k = guest.call("kl", kl, *heads, z)
    else:
        k = guest.call("kl", kl, *heads)
    x_hat = guest.call("decode", decode, z)
    x_hat = x_hat[0] if isinstance(x_hat, (tuple, list)) else x_hat
    try:
        r = guest.call("recon", recon, some.clone(), x_hat)
    except AuditError:
        r = guest.call("recon", recon, some.clone(), x_hat.reshape(some.shape))
    first = [v[0] if isinstance(v, (tuple, list)) else v for v in (r, k)]
    r, k = (guest.tensor(n, v).sum() for n, v in zip(("recon", "kl"), first, strict=True))
    return total, r, k


def _power(growth: dict[int, float] | None) -> float:
    """p, where n examples give n^p times what one gives: 1 for a sum, 0 for a mean."""
    return math.log(max(growth[8], 1e-12)) / math.log(8) if growth else 1.0


def _balance(
    case: Case, reconstruction: Reconstruction, weights: dict[int, tuple[float, float]]
) -> None:
    kl_grows, recon_grows = case.kl_growth, reconstruction.growth()
    if kl_grows and recon_grows and not weights:
        moved = {n: kl_grows[n] / recon_grows[n] for n in kl_grows}
        if any(abs(ratio - 1) > 1e-3 for ratio in moved.values()):
            rho, size = reconstruction.rho(), len(case.given)
            here = (
                case.kl_slope / rho * size ** (_power(kl_grows) - _power(recon_grows))
                if (rho)
                else math.nan
            )  # 1, if the code was written for batches of this size
            case.find(
                "reduction_imbalance", "warning" if abs(here - 1) < 1e-2 else "bug",
                f"the weight of the KL moves with the batch: of 8 examples the KL is "
                f"{kl_grows[8]:.4g} times that of one, the reconstruction {recon_grows[8]:.4g} "
                "times", "reduce both over the batch in one way: sum over an example, then mean",
                kl_growth=kl_grows[8], recon_growth=recon_grows[8],
            )  # fmt: skip
            return
    if case.details.get("kl_returns") == "per dimension" or reconstruction.kind == "per element":
        case.unchecked.append("the weight of the KL: a term is not reduced over an example")
        return
    rho = reconstruction.rho()
    if rho is None:
        case.unchecked.append("the weight of the KL: the reconstruction is no sum of elements")
        return
    power = _power(kl_grows) - _power(recon_grows)
    betas = [
        case.kl_slope / rho * size**power * b / a for size, (a, b) in weights.items() if a
    ] or [case.kl_slope / rho]
    beta = betas[0]
    case.details["beta"] = beta
    if abs(betas[-1] / beta - 1) > 1e-2:
        case.find(
            "reduction_imbalance", "bug",
            f"the weight of the KL in the loss moves with the batch: {beta:.5g} for "
            f"{next(iter(weights))} examples, {betas[-1]:.5g} for {list(weights)[-1]}",
            "reduce both over the batch in one way: sum over an example, then mean",
            beta=beta, beta_of_twice_the_batch=betas[-1],
        )  # fmt: skip
        return
    n = math.prod(case.given.shape[1:])
    d = case.measured_sampler.d
    if abs(beta - 1) < 1e-2:
        case.findings.pop("kl_scale", None)  # that explains it
        case.checked.append("the weight of the KL is 1, over whole examples")
        return
    half = reconstruction.rho(halved=True)
    moves = []
    if (half is not None and abs(half / rho - 1) > 1e-2) or (
        half is None and n > 1 and abs(rho * n - 1) < 1e-3
    ):
        moves.append("data")
    halved = case.kl_halved
    if (halved is not None and d > 1 and abs(halved - 1) < 1e-2) or (
        halved is None and d > 1 and abs(case.kl_slope * d - 1) < 1e-3
    ):
        moves.append("latent")
    if moves:
        case.find(
            "reduction_imbalance", "bug",
            f"the weight of the KL is {beta:.5g} here and moves with the size of the "
            f"{' and the '.join(moves)}: "
            + (f"the reconstruction is a mean over {n} elements" if "data" in moves else "")
            + (" and " if len(moves) > 1 else "")
            + (f"the KL is a mean over {d} latents" if "latent" in moves else ""),
            "sum both over all of an example, and take the mean over the batch only",
            beta=beta, rho=rho, kl_slope=case.kl_slope, elements=n, latents=d,
        )  # fmt: skip
    else:
        case.checked.append(f"the weight of the KL is {beta:.5g}, whatever the sizes")
