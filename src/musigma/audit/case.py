"""What is known so far of the VAE that is audited, and what is to be said of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, Notes
from musigma.audit.layouts import Packing
from musigma.audit.probes import Guest
from musigma.audit.sampling import Sampler
from musigma.audit.scales import Curve

__all__ = ["Case"]


def _number(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value).detach().clone().double()


class Case(Notes):
    """One audit's notes.

    Args:
        guest: That calls everything.
        example: A batch, or None.
        prior: Mean and standard deviation, as they were given.
        kl_uses_sample: Whether the KL takes z.
        documented_mean: What E[z] is said to be, or None.

    Raises:
        AuditError: If the prior's standard deviation is not positive.
    """

    def __init__(
        self,
        guest: Guest,
        example: Tensor | None,
        prior: tuple[float | Tensor, float | Tensor],
        kl_uses_sample: bool,
        documented_mean: Callable[..., Any] | None,
    ):
        super().__init__("VAE")
        self.guest = guest
        self.example = None if example is None else torch.as_tensor(example).detach().clone()
        if self.example is not None and self.example.is_floating_point():
            self.example = self.example.to(guest.dtype)
        if self.example is not None:
            guest.device = self.example.device
        mean, std = prior
        self.given_prior: tuple[Tensor, Tensor] = (_number(mean), _number(std))
        if not bool((self.given_prior[1] > 0).all()):
            raise AuditError(f"prior: expected a positive standard deviation; got {std}")
        self.kl_uses_sample = kl_uses_sample
        self.documented_mean = documented_mean
        self.convention: str | None = None
        self.read_as: str | None = None
        self.layout: str | None = None
        self.curve = Curve("unnamed")
        self.sampler: Sampler | None = None
        self.kl_fits = False  # a multiple of that of what is sampled, up to a constant
        self.kl_slope = math.nan
        self.packing: Packing | None = None
        self.swapped = False  # the first argument of sample is the scale
        self.full = False  # the second tensor holds a matrix
        self.rows: int | None = None  # examples in the given batch
        self.heads: tuple[Tensor, Tensor] | None = None
        self.scan: tuple[Tensor, Tensor] | None = None  # second outputs, and sigma there
        self.matrices: tuple[Tensor, Tensor, float] | None = None  # loc, factor, error
        self.prior = self.given_prior  # of flat latents, once their number is known
        self.kl_growth: dict[int, float] | None = None
        self.kl_halved: float | None = None

    def report(self, **more: Any) -> AuditReport:
        """All that was noted, with the convention."""
        if self.guest.dtype != torch.float64:
            self.assumed.append("float32 throughout, as it does not compute in float64")
        return super().report(
            convention=self.convention, read_as=self.read_as, layout=self.layout, **more
        )

    @property
    def measured_sampler(self) -> Sampler:
        """The sampler.

        Raises:
            AuditError: If there is none.
        """
        if self.sampler is None:
            raise AuditError("sample: there is none")
        return self.sampler

    @property
    def scanned(self) -> tuple[Tensor, Tensor]:
        """Second outputs, ascending, and the standard deviation of z there.

        Raises:
            AuditError: If there was no scan.
        """
        if self.scan is None:
            raise AuditError("sample: it was not scanned")
        return self.scan

    @property
    def measured(self) -> tuple[Tensor, Tensor, float]:
        """Location, factor of the covariance and error, where the second output is a matrix.

        Raises:
            AuditError: If it is none.
        """
        if self.matrices is None:
            raise AuditError("sample: no matrix was measured")
        return self.matrices

    @property
    def given(self) -> Tensor:
        """The example.

        Raises:
            AuditError: If there is none.
        """
        if self.example is None:
            raise AuditError("example: there is none")
        return self.example
