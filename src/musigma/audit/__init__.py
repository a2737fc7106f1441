"""Audits of VAEs, flows and densities: what they compute, measured by calling them."""

from musigma.audit.density import audit_density
from musigma.audit.figures import audit_bits, audit_importance_bound
from musigma.audit.findings import CODES, AuditError, AuditReport, Finding, check_codes
from musigma.audit.flow import audit_flow
from musigma.audit.models import audit_model
from musigma.audit.moments import audit_aggregate
from musigma.audit.step import audit_step
from musigma.audit.targets import FoundStep, NoStepError, audit, find_step
from musigma.audit.terms import audit_log_prob_term
from musigma.audit.vae import audit_vae

__all__ = [
    "CODES",
    "AuditError",
    "AuditReport",
    "Finding",
    "FoundStep",
    "NoStepError",
    "assert_audited",
    "audit",
    "audit_aggregate",
    "audit_bits",
    "audit_density",
    "audit_flow",
    "audit_importance_bound",
    "audit_log_prob_term",
    "audit_model",
    "audit_step",
    "audit_vae",
    "find_step",
]


def assert_audited(obj: object, *, allow: tuple[str, ...] = (), **how: object) -> AuditReport:
    """Fail, with the report, if an audit finds a bug or is incomplete: for tests of your models.

    Args:
        obj: As for `audit`; or None, and callables by the names of `audit_vae`.
        allow: Codes of findings that are intended; and "incomplete" to accept that an essential
            part, such as the KL, is not examined.
        how: `example` and `shape`, as for `audit`, or the callables.

    Returns:
        The report.

    Raises:
        AssertionError: If the verdict without what is allowed is "bug" or "incomplete".
        AuditError: As `audit`.
        ValueError: If `allow` has an unknown code.

    Example:
        >>> import torch
        >>> def sample(mean, log_var):
        ...     return mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        >>> def kl(mean, log_var):
        ...     return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum()
        >>> assert_audited(None, sample=sample, kl=kl).codes
        ()
    """
    check_codes(allow)
    report = audit(how if obj is None else obj, **({} if obj is None else how))  # pyright: ignore
    if report.judge(allow) in ("bug", "incomplete"):
        raise AssertionError(f"{report}")
    return report
