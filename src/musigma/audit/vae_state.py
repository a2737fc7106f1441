"""The state of one VAE audit: its callables, what is known about them, and the report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder
from musigma.audit.sampler import Sampler
from musigma.audit.sandbox import Sandbox
from musigma.audit.scales import Curve

__all__ = ["FullPosterior", "Posterior", "VAEAudit"]

Heads = tuple[Tensor, Tensor]


class VAEAudit(ReportBuilder):
    """The report of one VAE under construction, with its callables and what is known about them.

    Once the order of arguments and the layout of a packed tensor are known, `functions` holds
    callables of (mean, second), whatever the given ones take.

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
        self.has_example = example is not None
        self.example = torch.empty(0) if example is None else torch.as_tensor(example).detach()
        self.example = self.example.clone()
        if self.example.is_floating_point():
            self.example = self.example.to(sandbox.dtype)
        sandbox.device = self.example.device
        mean, std = (torch.as_tensor(value).detach().clone().double() for value in prior)
        self.prior = mean, std  # of flat latents (D,), once their number is known
        if not (std > 0).all():
            raise AuditError(f"prior: expected a positive standard deviation; got {prior[1]}")
        self.kl_uses_sample = kl_uses_sample
        self.convention: str | None = None
        self.read_as: str | None = None
        self.layout: str | None = None
        self.heads: Heads | None = None  # of the example
        self.latents: int | None = None  # numbers in one z
        self.swapped = False  # the first argument of the given sample is the scale
        self.kl_fits = False  # the KL is a multiple of that of what is sampled, plus a constant
        self.kl_slope = math.nan
        self.kl_growth: dict[int, float] | None = None
        self.kl_halved: float | None = None

    def has(self, *names: str) -> bool:
        """Whether all these callables were given."""
        return all(name in self.functions for name in names)

    def call(self, name: str, *args: Any) -> Any:
        """The result of a callable, as `Sandbox.call`."""
        return self.sandbox.call(name, self.functions[name], *args)

    def ask(self, name: str, *args: Any) -> Tensor:
        """The result of a callable as a tensor, as `Sandbox.ask_first`."""
        return self.sandbox.ask_first(name, self.functions[name], *args)

    def encoded(self, x: Tensor | None = None) -> Heads:
        """Both heads (B, ...) for a batch, by default the example; mean first."""
        return self.heads_of(self.call("encode", (self.example if x is None else x).clone()))

    def heads_of(self, value: Any) -> Heads:
        """Both heads in what `encode` returns."""
        value = tuple(value.values()) if isinstance(value, dict) else value
        value = value if isinstance(value, (tuple, list)) else (value,)
        parts = [self.sandbox.as_tensor("encode", part) for part in value[:2]]
        if len(value) > 2:
            self.assumed.append(
                f"encode returns {len(value)} values: the first two are mean and second"
            )
        if len(parts) == 1:
            if parts[0].ndim < 2 or parts[0].shape[1] % 2:
                raise AuditError(
                    "encode: expected (mean, second), or a packed tensor (B, 2 D, ...); got shape "
                    f"{tuple(parts[0].shape)}"
                )
            parts = parts[0].chunk(2, 1)
        mean, second = parts
        if mean.ndim == 0 or len(mean) != len(second):
            raise AuditError(
                f"encode: expected two batches; got shapes {tuple(mean.shape)} and "
                f"{tuple(second.shape)}"
            )
        return mean, second

    @property
    def rows(self) -> int | None:
        """Examples in the given batch."""
        batch = self.example if self.heads is None else self.heads[0]
        return len(batch) if self.has_example else None

    def build(self, **more: Any) -> AuditReport:
        """The report, with the convention."""
        if self.sandbox.dtype != torch.float64:
            self.assumed.append("float32 throughout, as it does not compute in float64")
        return super().build(
            convention=self.convention, read_as=self.read_as, layout=self.layout, **more
        )


@dataclass
class Posterior:
    """The measured posterior, z = loc + sigma e: the sampler, and sigma by the second output.

    `b` are second outputs (n,), ascending, and `sigma` is measured there; `even` is true if all
    latents have the same, `unbiased` if loc is the mean head.
    """

    sampler: Sampler
    b: Tensor
    sigma: Tensor
    curve: Curve
    even: bool = True
    unbiased: bool = True

    def at(self, mean: Tensor, second: Tensor) -> Heads:
        """Location and sigma (P, D) at points: measured, or by the curve if that is exact."""
        known = self.sampler.mode != "known" and self.curve.named and self.even
        if known and self.unbiased:
            return mean, self.curve.sigma(second).abs().expand_as(mean)
        loc, sigma, _ = self.sampler.measure(mean, second)
        return loc, self.curve.sigma(second).abs().expand_as(mean) if known else sigma.abs()


@dataclass
class FullPosterior:
    """The measured posterior if the second output is a matrix: z = loc + A e, at heads (P, ...).

    `factor` is A (P, D, D), and `error` the relative error of both.
    """

    sampler: Sampler
    heads: Heads
    loc: Tensor
    factor: Tensor
    error: float
