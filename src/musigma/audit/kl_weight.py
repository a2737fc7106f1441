r"""The weight of the KL in the loss, from the terms of the loss.

A reconstruction term R is compared with the terms of single elements of the data: a sum gives
rho = R / sum of single terms = 1, a mean over N elements 1 / N. The KL is compared with the true
one: kappa = KL / T. The weight of the KL in the loss is kappa / rho: the beta of a beta-VAE. It
may be any constant, but must not depend on the size of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, first, first_form
from musigma.audit.vae_state import VAEAudit

__all__ = ["check_kl_weight"]

ELEMENTS = 64  # that move at once


def check_kl_weight(audit: VAEAudit) -> None:
    """The weight of the KL against the reconstruction, in the terms and in the loss."""
    reconstruction = _reconstruction(audit) if audit.has("recon") else None
    if reconstruction is not None and not reconstruction.finite:
        if audit.has("decode"):
            audit.bug("not_finite", "recon")
        else:
            audit.unchecked.append("recon: it is not finite at the input that was tried")
        return
    weights = _loss_weights(audit) if audit.has("loss") else {}
    if reconstruction is not None and audit.has("kl") and audit.kl_fits:
        _check_balance(audit, reconstruction, weights)
    elif reconstruction is not None:
        audit.unchecked.append("the weight of the KL: the KL itself is wrong or unknown")


# --- the reconstruction -------------------------------------------------------------------------


class Reconstruction:
    """A code's reconstruction term, and its reduction over examples and elements.

    Raises:
        AuditError: If it raises for the given examples and reconstructions.
    """

    def __init__(self, sandbox: Sandbox, recon: Callable[..., Any], x: Tensor, x_hat: Tensor):
        self.sandbox, self.recon = sandbox, recon
        self.x, self.x_hat = x, x_hat
        value = self._raw(x, x_hat)
        per_example = value.shape[:1] == (len(x),) and value.numel() == len(x)
        scalar = value.numel() == 1
        self.kind = "scalar" if scalar else "per example" if per_example else "per element"
        self.finite = bool(value.isfinite().all())

    def _raw(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return self.sandbox.ask_first("recon", self.recon, x.clone(), x_hat.clone())

    def _total(self, x: Tensor, x_hat: Tensor) -> float:
        return float(self._raw(x, x_hat).sum())

    def growth(self) -> dict[int, float] | None:
        """R of identical examples over that of one, by their number; None if it is unreduced.

        It is the change of R when x_hat moves toward the data.
        """
        if self.kind != "scalar" or self.x.numel() != self.x_hat.numel():
            return None

        def step(n: int) -> float:
            x, hat = (t[:1].expand(n, *t.shape[1:]) for t in (self.x, self.x_hat))
            return self._total(x, hat) - self._total(x, _nearer(x, hat))

        try:
            one = step(1)
            return {n: step(n) / one for n in (2, 4, 8)}
        except (AuditError, ZeroDivisionError):
            return None

    def rho(self) -> float | None:
        """R of one example over the sum of the terms of its elements; None if it is unknown.

        Both change when some elements of x_hat move toward the data. If it takes no single
        elements, it is compared with the usual errors.
        """
        x, hat, n = self.x[:1], self.x_hat[:1], self.x[:1].numel()
        if n == 0 or n != hat.numel():
            return None
        flat = [t.flatten() for t in (x, hat, _nearer(x, hat))]
        at = torch.linspace(0, n - 1, min(n, 2 * ELEMENTS)).long()
        groups = [at[i::2] for i in (0, 1) if len(at) > i]
        pieces = [tuple(t[group] for t in flat) for group in groups]
        try:
            whole = self._total(x, hat)
            moved = [flat[1].index_put((group,), flat[2][group]) for group in groups]
            changes = [whole - self._total(x, m.reshape(hat.shape)) for m in moved]
        except AuditError:
            return None
        try:
            single = [self._of_elements(v, a) - self._of_elements(v, b) for v, a, b in pieces]
            return _ratio(changes, single)
        except AuditError:
            pass
        errors = [torch.tensor(_errors(v, a)) - torch.tensor(_errors(v, b)) for v, a, b in pieces]
        for expected in torch.stack(errors, 1).tolist():
            ratio = _ratio(changes, expected) or 0.0
            for rho in (1.0, 0.5, 1 / n, 0.5 / n):
                if abs(ratio / rho - 1) < 1e-3:
                    return 1.0 if rho >= 0.5 else 1 / n
        return None

    def _of_elements(self, x: Tensor, x_hat: Tensor) -> float:
        """The sum of the terms of single elements."""
        one, its_one = (1,) * self.x.ndim, (1,) * self.x_hat.ndim
        pairs = zip(x, x_hat, strict=True)
        return sum(self._total(v.reshape(one), hat.reshape(its_one)) for v, hat in pairs)


def _ratio(changes: list[float], expected: list[float]) -> float | None:
    """The ratio of changes to what is expected, if it is the same for all and not zero."""
    if not all(math.isfinite(e) and abs(e) > 1e-12 for e in expected):
        return None
    ratios = [change / e for change, e in zip(changes, expected, strict=True)]
    return ratios[0] if abs(ratios[0] - ratios[-1]) < 1e-3 * abs(ratios[0]) else None


def _nearer(x: Tensor, x_hat: Tensor) -> Tensor:
    """A reconstruction a quarter of the way nearer to the data."""
    return 0.75 * x_hat + 0.25 * x.reshape(x_hat.shape)


def _errors(x: Tensor, y: Tensor) -> list[float]:
    """The usual reconstruction errors, as sums; NaN where they are not defined."""
    logits = F.binary_cross_entropy_with_logits(y, x, reduction="none")
    entropy = -torch.xlogy(x, y) - torch.xlogy(1 - x, 1 - y)
    return [float(error.sum()) for error in ((y - x) ** 2, (y - x).abs(), logits, entropy)]


def _reconstruction(audit: VAEAudit) -> Reconstruction | None:
    """The term at an x_hat in a shape that it takes; None if there is none, without `decode`."""
    x, recon, x_hat = audit.example, audit.functions["recon"], _x_hat(audit)
    shapes = dict.fromkeys((x_hat.shape, x.shape, x_hat.flatten(1).shape))
    forms = [(x_hat.reshape(shape),) for shape in shapes if math.prod(shape) == x_hat.numel()]
    try:
        return first_form(forms, lambda hat: Reconstruction(audit.sandbox, recon, x, hat))[1]
    except AuditError as error:
        if audit.has("decode"):
            raise
        audit.unchecked.append(
            f"recon: without `decode`, no input that it takes was found ({error})"
        )
        return None


def _x_hat(audit: VAEAudit) -> Tensor:
    """A tensor of the data's shape and range to compare the data with."""
    sandbox, x = audit.sandbox, audit.example
    if audit.has("decode"):
        x_hat = sandbox.to_input(audit.ask("decode", sandbox.to_input(audit.encoded()[0])))
        if x_hat.numel() != x.numel():
            audit.unchecked.append(
                f"decode's answer: shape {tuple(x_hat.shape)}, not that of the example, "
                f"{tuple(x.shape)}"
            )
        return x_hat
    generator = torch.Generator().manual_seed(2)
    u = sandbox.to_input(torch.rand(x.shape, generator=generator, dtype=torch.float64))
    low, high = float(x.min()), float(x.max())
    return 0.1 + 0.8 * u if low >= 0 and high <= 1 else low + (high - low) * u


# --- the loss -----------------------------------------------------------------------------------


def _loss_weights(audit: VAEAudit) -> dict[int, tuple[float, float]]:
    """a and b of loss = a recon + b KL, by the size of a batch: that of the example and twice."""
    needed = ("sample", "kl", "recon", "decode")
    if lacking := [name for name in needed if not audit.has(name)]:
        audit.unchecked.append(f"the loss: without {', '.join(lacking)}")
        return {}
    weights = {}
    for batch in (audit.example, torch.cat([audit.example, audit.example])):
        try:
            a, b = weights[len(batch)] = _combination(audit, batch)
        except AuditError as error:
            audit.unchecked.append(f"the loss against its terms: {error}")
            break
        audit.details["loss"] = {"recon_weight": a, "kl_weight": b, "beta": b / a if a else None}
        audit.checked.append(f"loss = {a:.5g} recon + {b:.5g} KL")
        if a and b / a < 0 and audit.kl_slope > 0:
            audit.bug("kl_scale", "rewarded", beta=b / a)
    return weights


def _combination(audit: VAEAudit, x: Tensor) -> tuple[float, float]:
    """a and b of loss = a recon + b KL, with the same noise in both, over several batches.

    If only a KL of the tensors that sample changed in place explains the loss, this is a bug.
    """
    try:
        return _solve(audit, x, False)
    except AuditError:
        if not any(name == "sample" for name, _ in audit.sandbox.changed):
            raise
        weights = _solve(audit, x, True)
        audit.bug("inplace", "kl", name="sample", argument="mean or second")
        return weights


def _solve(audit: VAEAudit, x: Tensor, shared: bool) -> tuple[float, float]:
    rows = [_terms(audit, x, seed, shared) for seed in range(8)]
    terms = torch.tensor(rows, dtype=torch.float64)
    losses, design = terms[:, 0], terms[:, 1:]
    spread, size = float(losses.std()), design.abs().amax(0)
    if spread < 1e-12:
        raise AuditError("it does not vary")
    if (size > 0).all() and losses.isfinite().all():
        solved = torch.linalg.lstsq(design / size, losses[:, None], driver="gelsd").solution
        weights = solved[:, 0] / size
        tolerance = 1e-4 if audit.sandbox.dtype == torch.float64 else 1e-2
        if (design @ weights - losses).abs().max() <= tolerance * spread:
            return float(weights[0]), float(weights[1])
    raise AuditError("it has other terms, or other draws")


def _terms(audit: VAEAudit, x: Tensor, seed: int, shared: bool) -> list[float]:
    """Loss, reconstruction and KL of a batch drawn from x.

    If `shared`, sample and KL are given the same tensors, so that changes in place are seen.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    batch = x[order.to(x.device)]
    if len(x) > 2 and seed % 2:
        batch = torch.cat([batch[:-1], batch[:1]])
    audit.sandbox.reseed(seed)
    loss = audit.call("loss", batch.clone())
    if isinstance(loss, dict):
        loss = loss.get("loss", next(iter(loss.values())))
    audit.sandbox.reseed(seed)
    heads = [audit.sandbox.to_input(head) for head in audit.encoded(batch)]
    z = first(audit.call("sample", *(head if shared else head.clone() for head in heads)))
    more = (z, *audit.call("flow", z)[:2]) if audit.has("flow") else (z,)
    kl = audit.call("kl", *heads, *more[: audit.kl_arguments - 2])
    x_hat = first(audit.call("decode", more[1] if len(more) > 1 else z))
    forms = [(x_hat,)]
    if x_hat.numel() == batch.numel():
        forms.append((x_hat.reshape(batch.shape),))
    _, recon = first_form(forms, lambda hat: audit.call("recon", batch.clone(), hat))
    named = (("loss", loss), ("recon", recon), ("kl", kl))
    return [float(audit.sandbox.as_tensor(name, first(value)).sum()) for name, value in named]


# --- the balance --------------------------------------------------------------------------------


def _power(growth: dict[int, float] | None) -> float:
    """p, where n examples give n^p times what one gives: 1 for a sum, 0 for a mean."""
    return math.log(max(growth[8], 1e-12)) / math.log(8) if growth else 1.0


def _check_balance(
    audit: VAEAudit, reconstruction: Reconstruction, weights: dict[int, tuple[float, float]]
) -> None:
    """Whether the weight of the KL is constant when the batch changes its size, and is 1."""
    if audit.coupled:
        audit.unchecked.append("the weight of the KL: the rows of the example are not independent")
        return
    kl, recon = audit.kl_growth, reconstruction.growth()
    power = _power(kl) - _power(recon)
    rho, size = reconstruction.rho(), len(audit.example)
    if kl and recon and not weights and any(abs(kl[n] / recon[n] - 1) > 1e-3 for n in kl):
        here = audit.kl_slope / rho * size**power if rho else math.nan
        # A weight of 1 here: the code was written for batches of this size.
        severity = "warning" if abs(here - 1) < 1e-2 else "bug"
        growths: dict[str, Any] = {"kl_growth": kl[8], "recon_growth": recon[8]}
        audit.find("reduction_imbalance", severity, "batch", **growths)
        return
    if audit.details.get("kl_returns") == "per dimension" or reconstruction.kind == "per element":
        audit.unchecked.append("the weight of the KL: a term is not reduced over an example")
        return
    if rho is None:
        audit.unchecked.append("the weight of the KL: the reconstruction is not a sum of elements")
        return
    betas = [
        audit.kl_slope / rho * size**power * b / a for size, (a, b) in weights.items() if a
    ] or [audit.kl_slope / rho]
    beta = audit.details["beta"] = betas[0]
    if abs(betas[-1] / beta - 1) > 1e-2:
        examples = next(iter(weights))
        audit.bug("reduction_imbalance", "loss", beta=beta, other=betas[-1], examples=examples)
    elif abs(beta - 1) < 1e-2:
        audit.findings.pop("kl_scale", None)  # the reduction explains it
        audit.checked.append("the weight of the KL is 1, over whole examples")
    elif beta > 0:
        n, d = math.prod(audit.example.shape[1:]), audit.latents or 1
        reasons = []
        if n > 1 and abs(rho * n - 1) < 1e-3:
            reasons.append(f": the reconstruction is a mean over {n} elements")
        if d > 1 and abs(audit.kl_slope * d - 1) < 1e-3:
            reasons.append(f": the KL is a mean over {d} latents")
        why = " and".join(reasons).replace(" and:", " and")
        numbers: dict[str, Any] = {"beta": beta, "rho": rho, "kl_slope": audit.kl_slope}
        audit.warn("reduction_imbalance", **numbers, why=why, elements=n, latents=d)
