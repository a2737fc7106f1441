"""The state of one VAE audit: its callables, what is known of them, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder
from musigma.audit.packing import Packing
from musigma.audit.sampler import Sampler
from musigma.audit.sandbox import Sandbox
from musigma.audit.scales import Curve

__all__ = ["VAEAudit"]

T = TypeVar("T")


class VAEAudit(ReportBuilder):
    """The report of one VAE while it is built, with its callables and what is known of them.

    Raises:
        AuditError: If the prior's standard deviation is not positive.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        functions: Mapping[str, Callable[..., Any] | None],
        example: Tensor | None,
        prior: tuple[float | Tensor, float | Tensor],
        kl_uses_sample: bool,
    ):
        super().__init__("VAE")
        self.sandbox = sandbox
        self.functions = {name: fn for name, fn in functions.items() if fn is not None}
        if example is not None:
            example = torch.as_tensor(example).detach().clone()
            example = example.to(sandbox.dtype) if example.is_floating_point() else example
            sandbox.device = example.device
        self._example = example
        mean, std = (torch.as_tensor(value).detach().clone().double() for value in prior)
        self.given_prior: tuple[Tensor, Tensor] = (mean, std)
        if not bool((std > 0).all()):
            raise AuditError(f"prior: expected a positive standard deviation; got {prior[1]}")
        self.kl_uses_sample = kl_uses_sample
        self.convention: str | None = None
        self.read_as: str | None = None
        self.layout: str | None = None
        self.curve = Curve("unnamed")
        self._sampler: Sampler | None = None
        self.kl_fits = False  # the KL is a multiple of that of what is sampled, plus a constant
        self.kl_slope = math.nan
        self.packing: Packing | None = None
        self.swapped = False  # the first argument of sample is the scale
        self.is_matrix = False  # the second tensor holds a matrix
        self.rows: int | None = None  # examples in the given batch
        self.heads: tuple[Tensor, Tensor] | None = None
        self.scan: tuple[Tensor, Tensor] | None = None  # second outputs, ascending; sigma there
        self.matrices: tuple[Tensor, Tensor, float] | None = None  # location, factor, error
        self.prior = self.given_prior  # of flat latents, once their number is known
        self.kl_growth: dict[int, float] | None = None
        self.kl_halved: float | None = None

    def has(self, *names: str) -> bool:
        """Whether all these callables were given."""
        return all(name in self.functions for name in names)

    def call(self, name: str, *args: Any) -> Any:
        """What a callable returns, as `Sandbox.call`."""
        return self.sandbox.call(name, self.functions[name], *args)

    def ask(self, name: str, *args: Any) -> Tensor:
        """What a callable returns as a tensor, as `Sandbox.ask`."""
        return self.sandbox.ask(name, self.functions[name], *args)

    def build(self, **more: Any) -> AuditReport:
        """The report, with the convention."""
        if self.sandbox.dtype != torch.float64:
            self.assumed.append("float32 throughout, as it does not compute in float64")
        return super().build(
            convention=self.convention, read_as=self.read_as, layout=self.layout, **more
        )

    @property
    def has_sampler(self) -> bool:
        """Whether the sampler could be called."""
        return self._sampler is not None

    @property
    def sampler(self) -> Sampler:
        """The sampler, measured."""
        return _known(self._sampler, "sample: it could not be called")

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler

    @property
    def scanned(self) -> tuple[Tensor, Tensor]:
        """Second outputs, ascending, and the standard deviation of z there."""
        return _known(self.scan, "sample: it was not scanned")

    @property
    def has_example(self) -> bool:
        """Whether an example was given."""
        return self._example is not None

    @property
    def example(self) -> Tensor:
        """The example."""
        return _known(self._example, "example: there is none")


def _known(value: T | None, problem: str) -> T:
    if value is None:
        raise AuditError(problem)
    return value
