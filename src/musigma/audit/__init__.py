"""Audits of VAEs, flows and densities: what they compute, measured by calling them."""

from musigma.audit.density import audit_density
from musigma.audit.dispatch import audit
from musigma.audit.findings import CODES, AuditError, AuditReport, Finding
from musigma.audit.flow import audit_flow
from musigma.audit.models import audit_model
from musigma.audit.posterior import audit_aggregate
from musigma.audit.terms import audit_bits, audit_importance_bound, audit_log_prob_term
from musigma.audit.vae import audit_vae

__all__ = [
    "CODES",
    "AuditError",
    "AuditReport",
    "Finding",
    "assert_audited",
    "audit",
    "audit_aggregate",
    "audit_bits",
    "audit_density",
    "audit_flow",
    "audit_importance_bound",
    "audit_log_prob_term",
    "audit_model",
    "audit_vae",
]


def assert_audited(obj: object, *, allow: tuple[str, ...] = (), **how: object) -> AuditReport:
    """Fail, with the report, if an audit finds a bug: for tests of your own models.

    Args:
        obj: As for `audit`; or None, and callables by the names of `audit_vae`.
        allow: Codes of findings that are intended.
        how: `example` and `shape`, as for `audit`, or the callables.

    Returns:
        The report.

    Raises:
        AssertionError: If there is a finding of severity "bug" that is not allowed.
        AuditError: As `audit`.

    Example:
        >>> import torch
        >>> sample = lambda mean, s: mean + s.exp() * torch.randn_like(mean)
        >>> assert_audited(None, sample=sample).codes
        ()
    """
    report = audit(how if obj is None else obj, **({} if obj is None else how))  # pyright: ignore
    bad = [f for f in report.findings if f.severity == "bug" and f.code not in allow]
    if bad:
        raise AssertionError(f"{report}")
    return report
