r"""The reduction of a loss's two terms, which decides the weight of the KL.

A reconstruction term R is compared with the terms of single elements of the data: a sum gives
rho = R / sum of single terms = 1, a mean over N elements 1 / N. The KL is compared with the true
one: kappa = KL / T. The weight of the KL in the loss is kappa / rho. It may be any constant, but
must not depend on the size of batch, latent or data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox

__all__ = ["Reconstruction", "combination"]

ELEMENTS = 1024  # the most that are called one by one


class Reconstruction:
    """A code's reconstruction term, and its reduction over examples and elements.

    Raises:
        AuditError: If it raises for the given examples and reconstructions.
    """

    def __init__(self, sandbox: Sandbox, recon: Callable[..., Any], x: Tensor, x_hat: Tensor):
        self.sandbox, self.recon = sandbox, recon
        self.x, self.x_hat = x, x_hat
        n = len(x)
        value = self._raw(x, x_hat)
        if value.numel() == 1:
            self.kind = "scalar"
        elif value.shape[:1] == (n,) and value.numel() == n:
            self.kind = "per example"
        else:
            self.kind = "per element"
        self.finite = bool(value.isfinite().all())

    def _raw(self, x: Tensor, x_hat: Tensor) -> Tensor:
        return self.sandbox.ask_first("recon", self.recon, x.clone(), x_hat.clone())

    def _total(self, x: Tensor, x_hat: Tensor) -> float:
        return float(self._raw(x, x_hat).sum())

    def growth(self) -> dict[int, float] | None:
        """R of identical examples over that of one, by their number; None if it is unreduced."""
        if self.kind != "scalar":
            return None
        try:
            one = self._step(1)
            return {n: self._step(n) / one for n in (2, 4, 8)}
        except (AuditError, ZeroDivisionError):
            return None

    def _step(self, n: int) -> float:
        """The change of R of n identical examples when x_hat moves towards the data."""
        x, hat = (t[:1].expand(n, *t.shape[1:]) for t in (self.x, self.x_hat))
        return self._total(x, hat) - self._total(x, 0.75 * hat + 0.25 * x.reshape(hat.shape))

    def rho(self, halved: bool = False) -> float | None:
        """R of one example over the sum of its single terms; None if it is unknown.

        Args:
            halved: For half of the data's last axis.
        """
        x, x_hat = self.x[:1], self.x_hat[:1]
        if halved:
            if x.ndim < 2 or x.shape[-1] < 2:
                return None
            x, x_hat = x[..., : x.shape[-1] // 2], x_hat[..., : x_hat.shape[-1] // 2]
            if x.numel() != x_hat.numel():
                return None
        other = 0.75 * x_hat + 0.25 * x.reshape(x_hat.shape)
        if x.numel() > ELEMENTS:
            return None if halved else self._by_form(x, x_hat, other)
        try:
            a, b = self._rho(x, x_hat), self._rho(x, other)
        except AuditError:
            return None if halved else self._by_form(x, x_hat, other)
        if a is None or b is None:
            return None
        return a if abs(a - b) <= 1e-3 * abs(a) else None  # otherwise it is no sum over elements

    def _rho(self, x: Tensor, x_hat: Tensor) -> float | None:
        whole = self._total(x, x_hat)
        flat, hat = x.flatten(), x_hat.flatten()
        shape, its = (1,) * x.ndim, (1,) * x_hat.ndim
        pieces = sum(
            self._total(flat[i].reshape(shape), hat[i].reshape(its)) for i in range(len(flat))
        )
        if not math.isfinite(pieces) or abs(pieces) < 1e-12:
            return None
        return whole / pieces

    def _by_form(self, x: Tensor, *hats: Tensor) -> float | None:
        """Rho by comparison with squared and absolute error and cross-entropy."""
        n, flat = x.numel(), x.flatten()
        values_of_r, forms = [], []
        for hat in hats:
            values_of_r.append(self._total(x, hat))
            y = hat.flatten()
            values = [float(((y - flat) ** 2).sum()), float((y - flat).abs().sum())]
            if float(flat.min()) >= 0 and float(flat.max()) <= 1:
                values.append(float(F.binary_cross_entropy_with_logits(y, flat, reduction="sum")))
                if float(y.min()) > 0 and float(y.max()) < 1:
                    values.append(float(F.binary_cross_entropy(y, flat, reduction="sum")))
            forms.append(values)
        whole = values_of_r[0] - values_of_r[1]
        for first, second in zip(*forms, strict=False):
            for factor in (1.0, 0.5):
                for rho in (1.0, 1 / n):
                    if first != second:
                        ratio = whole / ((first - second) * factor) / rho
                        if abs(ratio - 1) < 1e-5:
                            return rho
        return None


def combination(
    losses: Tensor, recons: Tensor, kls: Tensor, tolerance: float
) -> tuple[float, float] | None:
    """a and b of loss = a recon + b KL over several batches and seeds; None if it does not fit.

    The tolerance of the misfit is relative to the spread of the loss.
    """
    design = torch.stack([recons, kls], 1).double()
    size = design.abs().amax(0)
    if bool((size == 0).any()) or not bool(losses.isfinite().all()):
        return None
    solved = torch.linalg.lstsq(design / size, losses[:, None].double(), driver="gelsd")
    weights = solved.solution[:, 0] / size
    off = float((design @ weights - losses).abs().max())
    return (
        (float(weights[0]), float(weights[1])) if off <= tolerance * float(losses.std()) else None
    )
