"""Findings, each with a code, and the report that holds them.

``docs/findings`` has a page for every code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from musigma.files import finite
from musigma.report.html import render, short

__all__ = [
    "CODES",
    "AuditError",
    "AuditReport",
    "Finding",
    "ReportBuilder",
    "Severity",
    "distance",
    "name_of",
]

Severity = Literal["bug", "warning"]
Verdict = Literal["correct", "warning", "bug"]

CODES = {
    # what is sampled
    "sample_mean": "the mean of z is not the encoder's mean",
    "sample_scale": "the standard deviation of z is not a known function of the second output",
    "noise_not_gaussian": "the injected noise is not standard normal",
    "noise_shared": "dimensions, examples or calls share one draw of noise",
    "heads_tied": "mean and scale come from the same numbers",
    "sigma_range_restricted": "standard deviations below 0.9 cannot be reached",
    # the KL
    "kl_mismatch": "the KL is not the KL of what is sampled",
    "kl_offset": "the KL is right up to an additive constant",
    "kl_scale": "the KL is right up to a constant factor",
    "kl_negative": "the KL is below zero",
    "kl_min_off_prior": "the KL is smallest where the posterior is not the prior",
    "prior_mismatch": "generation and KL use different priors",
    "reduction_imbalance": "the weight of the KL depends on batch, latent or data size",
    # bijections
    "inverse_mismatch": "the inverse does not recover the input of forward",
    "inverse_raises": "the inverse raises an error",
    "stochastic": "two calls on the same input differ",
    "stale_inverse": "the inverse uses old parameters after an update",
    "logdet_mismatch": "the log-determinant is not log |det J|",
    "logdet_shape": "the log-determinant is not one number per example",
    "logdet_nan": "the log-determinant is not a number where the layer is invertible",
    "inverse_logdet_sign": "the inverse returns the log-determinant with the wrong sign",
    "inverse_logdet_mismatch": "the inverse's log-determinant is wrong",
    "cross_sample": "an example's output depends on the others in its batch",
    "not_injective": "the determinant changes sign, so this is not a bijection",
    "ddi_wrong": "data-dependent initialization does not standardize its output",
    "ddi_reinit": "a reloaded layer initializes itself again",
    # densities and figures
    "not_normalised": "the density does not integrate to one",
    "bpd_below_entropy": "the reported bits are below the entropy of the data",
    "bpd_wrong": "the bits per dimension of the uniform model are wrong",
    "bpd_batch": "bits per dimension depend on the batch size",
    "iw_gradient": "the gradient is not that of the importance-weighted bound",
    "iw_value": "the value is not that of the importance-weighted bound",
    "prior_term_mismatch": "the term is not a multiple of a Gaussian's log-density",
    "prior_term_sign": "the term rewards distance from the mean",
    "aggregate_cov": "the claimed covariance is not that of the draws",
    # after training
    "posterior_collapse": "a latent carries no information",
    "dead_units": "some units of a latent carry no information",
    "saturated_units": "scales are at the limit of their format",
    "aggregate_prior": "the aggregate posterior is not the prior",
    "ill_conditioned": "inverting a layer loses digits",
    "miscalibrated": "whitened latents of the data are not standard normal",
    "dequantisation": "dequantization and scaling are accounted for incorrectly",
    # what could not be checked
    "not_finite": "a callable returns NaN or infinity",
}


class AuditError(ValueError):
    """An object cannot be audited: which callable, what it did, and what was expected."""


@dataclass(frozen=True)
class Finding:
    """One fault, or one thing to check.

    Args:
        code: One of `CODES`.
        severity: "bug": a figure or a sample is wrong; "warning": it may be intended.
        message: What is wrong.
        numbers: The numbers that show it.
        repair: What to do.

    Raises:
        ValueError: If the code is unknown, or there is no repair.
    """

    code: str
    severity: Severity
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    repair: str = ""

    def __post_init__(self):
        if self.code not in CODES:
            raise ValueError(f"code: {self.code!r} is none of musigma.audit.CODES")
        if not self.repair:
            raise ValueError(f"repair: a finding of {self.code} needs one")


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    Args:
        subject: The name of the audited object.
        convention: How the sampler reads the second tensor: "log_std", "log_var", "std", …
        read_as: How the KL reads it; None without a KL.
        layout: The layout of a packed tensor; None without one.
        findings: What is wrong, bugs first.
        checked: A line for each check, with its numbers.
        unchecked: What could not be checked, and why.
        assumed: What was assumed about the object.
        details: Further numbers: bounds, floors, factors, conditions by layer.

    Raises:
        AuditError: If there is no finding and nothing was checked, so that there is no verdict.
    """

    subject: str
    convention: str | None = None
    read_as: str | None = None
    layout: str | None = None
    findings: tuple[Finding, ...] = ()
    checked: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        order = sorted(self.findings, key=lambda finding: finding.severity != "bug")
        object.__setattr__(self, "findings", tuple(order))
        if not self.findings and not self.checked:
            reasons = "; ".join(self.unchecked) or "there was nothing to check"
            raise AuditError(f"{self.subject}: nothing could be checked: {reasons}")

    @property
    def verdict(self) -> Verdict:
        """A "bug" if anything is one; a "warning" if there is a finding; else "correct"."""
        severities = {finding.severity for finding in self.findings}
        return "bug" if "bug" in severities else "warning" if severities else "correct"

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings."""
        return tuple(finding.code for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return finite({"verdict": self.verdict, **asdict(self)})

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """The report as plain text."""
        lines = [f"{self.subject}: {self.verdict}", *(f"  {a}: {b}" for a, b in self._facts())]
        for finding in self.findings:
            lines += ["", f"{finding.severity} {finding.code}: {finding.message}"]
            numbers = [f"{name} {short(value)}" for name, value in finding.numbers.items()]
            lines += [f"  {', '.join(numbers)}"] if numbers else []
            lines += [f"  repair: {finding.repair}"]
        for title, what in self._lists():
            lines += ["", f"{title}:", *(f"  {line}" for line in what)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """The report as a self-contained HTML page."""
        return render(
            "audit.html.jinja",
            title=f"Audit of {self.subject}",
            report=self,
            codes=CODES,
            facts=self._facts(),
            lists=self._lists(),
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = {
            "the sampler reads the second output as": self.convention,
            "the KL reads it as": self.read_as,
            "layout": self.layout,
        }
        return [(name, value) for name, value in facts.items() if value]

    def _lists(self) -> list[tuple[str, tuple[str, ...]]]:
        lists = {
            "checked": self.checked,
            "could not be checked": self.unchecked,
            "assumed": self.assumed,
        }
        return [(title, what) for title, what in lists.items() if what]


class ReportBuilder:
    """Collects findings and notes, from which `build` makes the report.

    Attributes:
        subject: The name of the audited object.
    """

    def __init__(self, subject: str):
        self.subject = subject
        self.findings: dict[str, Finding] = {}
        self.checked: list[str] = []
        self.unchecked: list[str] = []
        self.assumed: list[str] = []
        self.details: dict[str, Any] = {}

    def find(
        self, code: str, severity: Severity, message: str, repair: str, **numbers: Any
    ) -> None:
        """Add a finding, unless there is one of its code that is no less severe.

        Tensors among the numbers hold one each.
        """
        numbers = {n: v.item() if isinstance(v, Tensor) else v for n, v in numbers.items()}
        known = self.findings.get(code)
        if known is None or (known.severity == "warning" and severity == "bug"):
            self.findings[code] = Finding(code, severity, message, numbers, repair)

    def bug(self, code: str, message: str, repair: str, **numbers: Any) -> None:
        """Add a finding of severity "bug"."""
        self.find(code, "bug", message, repair, **numbers)

    def warn(self, code: str, message: str, repair: str, **numbers: Any) -> None:
        """Add a finding of severity "warning"."""
        self.find(code, "warning", message, repair, **numbers)

    def build(self, **more: Any) -> AuditReport:
        """The report of everything that was collected."""
        return AuditReport(
            subject=self.subject,
            findings=tuple(self.findings.values()),
            checked=tuple(self.checked),
            unchecked=tuple(self.unchecked),
            assumed=tuple(dict.fromkeys(self.assumed)),
            details=self.details,
            **more,
        )


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where the values are above one."""
    a, b = a.detach().double(), b.detach().double()
    off = float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0
    return math.inf if math.isnan(off) else off


def name_of(thing: Any) -> str:
    """The name of a callable, or of an object's class."""
    return getattr(thing, "__qualname__", None) or type(thing).__name__
