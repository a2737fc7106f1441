"""The flow under other parameters: random ones, updated ones, negative determinants, extremes.

A fault under random parameters must appear again under a fifth of the perturbation; otherwise it
is attributed to the parameters (a contraction that is none any more) and not to the code.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_adapter import detached, flatten, log_det_of
from musigma.audit.flow_state import FlowAudit, Measurement
from musigma.audit.volume import by_autograd

__all__ = ["check_determinant_sign", "check_negative_determinants", "check_random_parameters"]

WIDE = (1.0, 3.0, 6.0, 3.0, 1.0)  # multiples of the example's spread, with 300 points each
SCALES = (0.3, 0.1, 0.03)  # of random parameters: the largest under which z is finite


def check_random_parameters(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Measure again under random parameters, and whether the inverse follows an update."""
    if not audit.sandbox.trainable():
        audit.unchecked.append("random parameters: there are no trainable ones")
        return
    std = next((std for std in SCALES if _is_finite(audit, std)), None)
    if std is None:
        audit.unchecked.append("random parameters: z is not finite under any of them")
        audit.restore()
        return
    audit.perturbation = std
    measured = audit.measure()
    if measured.inverse_error is not None and audit.flow.invertible:
        if measured.inverse_error.__cause__ is None:
            raise measured.inverse_error
        audit.unchecked.append(f"inverse under random parameters: {measured.inverse_error}")
        audit.restore()
        return
    if measured.nan_log_det and not unperturbed.nan_log_det:
        measured = Measurement()  # a parameter may be out of its range; checked separately
    errors = {name: getattr(measured, name) for name in ("round_trip", "log_det", "back_sum")}
    wrong = any(error > audit.tolerance for error in errors.values())
    if wrong and not audit.noisy_log_det:
        audit.reset(std / 5)
        small = audit.measure()
        for name, error in errors.items():
            if getattr(small, name) <= 1e-3 * min(1.0, error):
                setattr(measured, name, math.nan)
    stale = audit.flow.invertible and _is_stale(audit, std)
    if stale and measured.round_trip > audit.tolerance >= unperturbed.round_trip:
        measured.round_trip = measured.back_sum = math.nan
    audit.report_errors(measured, f"with random parameters (moved by {std:g})")
    audit.restore()


def _is_finite(audit: FlowAudit, std: float) -> bool:
    """Move the parameters; whether z has numbers of an ordinary size."""
    audit.reset(std)
    with suppress(AuditError):
        z = audit.flow.forward(audit.x).flat.detach()
        return bool(z.isfinite().all() and z.abs().max() < 1e6)
    return False


def _is_stale(audit: FlowAudit, std: float) -> bool:
    """Whether an inverse that was used before an update still has the old parameters."""
    x = audit.few
    with suppress(AuditError):
        audit.restore()
        z = detached(audit.flow.forward(x).tree)
        first, _ = audit.flow.inverse(z, x)
        audit.perturb(std)
        image = audit.flow.forward(x)
        if distance(image.flat, flatten(z)) < 1e-4:
            return False
        late, _ = audit.flow.inverse(image.tree, x)
        error = distance(late, x)
        if error <= 1e-3:
            audit.checked.append("the inverse follows an update of the parameters")
            return False
        late_old, _ = audit.flow.inverse(z, x)
        audit.reset(std)
        fresh, _ = audit.flow.inverse(audit.flow.forward(x).tree, x)
        if distance(fresh, x) <= 1e-3 or distance(late_old, first) == 0.0:
            audit.bug(
                "stale_inverse",
                f"after an update of the parameters the inverse is off by {error:.3g}: it was "
                "computed before the update and cached",
                "compute the inverse from the parameters on each call, or drop the cache when "
                "they change (their ._version tells)",
                error=error,
            )
            return True
    return False


def check_negative_determinants(audit: FlowAudit) -> None:
    """Whether the log-determinant is finite where a matrix has a negative determinant."""
    matrices = [p for p in audit.sandbox.trainable() if _is_matrix(p)]
    if not matrices or "logdet_nan" in audit.findings:
        return
    audit.restore()
    for p in matrices:
        _make_determinant_negative(p)
    with suppress(AuditError):
        image = audit.flow.forward(audit.x)
        if image.raw is not None and image.flat.isfinite().all():
            stated, _ = log_det_of(image.raw, len(audit.x))
            if stated.isfinite().all():
                audit.checked.append("matrices of negative determinant")
            else:
                audit.bug(
                    "logdet_nan",
                    "the log-determinant is NaN or infinite where a matrix is invertible and has "
                    "a negative determinant",
                    "take log |det W|: torch.linalg.slogdet(W)[1], not logdet(W) or log(det(W))",
                )
    audit.restore()


def check_determinant_sign(audit: FlowAudit) -> None:
    """Whether det J has one sign, over wide ranges of points and parameters."""
    if audit.x[0].numel() > 16:
        audit.unchecked.append("the sign of det J at many points: there are too many elements")
        return
    if "cross_sample" in audit.findings or audit.noisy_log_det:
        return
    parameters = audit.sandbox.trainable()
    buffers = [name for root in audit.sandbox.modules for name, _ in root.named_buffers()]
    spectral = ("u", "v", "_u", "_v", "weight_u", "weight_v")  # buffers of spectral norms
    free = parameters and not any(name.rsplit(".", 1)[-1] in spectral for name in buffers)
    moves = [1.5, 2.0] * 8 if free and all(p.squeeze().ndim <= 1 for p in parameters) else []
    for seed, std in enumerate([0.0, *moves]):
        audit.reset(std, 30 + seed)
        try:
            positive, negative = _determinant_signs(audit, (2.0,) if std else WIDE)
        except (AuditError, RuntimeError):
            return
        if positive and negative:
            audit.bug(
                "not_injective",
                f"det J is positive at {positive} points and negative at {negative}"
                + (", with parameters that training may reach" if std else ""),
                "constrain the parameters so that f stays monotone (planar flow: w'u >= -1, "
                "by u + (softplus(w'u) - 1 - w'u) w / |w|^2)",
                positive=positive,
                negative=negative,
            )
            break
    else:
        audit.checked.append("det J has the same sign at all points tried")
    audit.restore()


def _determinant_signs(audit: FlowAudit, factors: tuple[float, ...]) -> tuple[int, int]:
    """At how many points det J is surely positive, and negative."""
    example = audit.example
    spread = (example.std() if example.numel() > 1 else torch.tensor(1.0)).clamp(min=0.3)
    generator = torch.Generator().manual_seed(2)
    shape = (300 if audit.seconds_per_call < 0.01 else 60, *example.shape[1:])
    positive = negative = 0
    for factor in factors:
        if audit.time_left() < 0:
            break
        if ((example >= 0) & (example <= 1)).all():
            x = torch.rand(shape, generator=generator).to(audit.x)
        else:
            noise = torch.randn(shape, generator=generator).to(audit.x)
            x = example.mean(0) + factor * spread * noise
        log_det, sign, condition = by_autograd(audit.flat, x)
        sure = sign[log_det.isfinite() & (condition < 1e9)]
        positive += int((sure > 0).sum())
        negative += int((sure < 0).sum())
    return positive, negative


def _is_matrix(p: Tensor) -> bool:
    """Whether a parameter is a square matrix, and not triangular."""
    if p.ndim < 2 or p.shape[1] < 2 or p.numel() != len(p) ** 2 or len(p) != p.shape[1]:
        return False
    matrix = p.detach().reshape(len(p), -1)
    return bool(matrix.tril(-1).any() and matrix.triu(1).any())


@torch.no_grad()
def _make_determinant_negative(p: Tensor) -> None:
    """Flip the sign of a matrix's determinant by one off-diagonal entry.

    det(W + c e_i e_j') = det W (1 + c V_ji), with V the inverse of W: -det W at c = -2 / V_ji.
    """
    matrix = p.detach().reshape(len(p), -1).double().clone()
    if torch.linalg.det(matrix) < 0:
        return
    inverse = torch.linalg.pinv(matrix).T.clone()
    inverse.fill_diagonal_(0.0)
    at = divmod(int(inverse.abs().argmax()), len(p))
    if inverse[at] != 0:
        matrix[at] -= 2 / inverse[at]
        p.copy_(matrix.reshape(p.shape).to(p))
