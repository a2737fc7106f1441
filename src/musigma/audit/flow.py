r"""The audit of a flow: is it a bijection, and is its log-determinant that of its Jacobian?

A flow's density is :math:`p(x) = p_Z(f(x)) \, |\det \partial f / \partial x|`: f must be a
function of one example, be invertible, and return the log-determinant that autograd finds. Each
of these is checked with the parameters as they are, and with random ones, because couplings that
start at zero are the identity, where every sign is right.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from musigma.audit.bijection import log_det_of
from musigma.audit.findings import AuditError, AuditReport, distance
from musigma.audit.flow_faults import report, report_raising_inverse
from musigma.audit.flow_layers import check_layers
from musigma.audit.flow_measurement import LIMITS_32, FlowAudit, Measurement
from musigma.audit.flow_parameters import (
    check_determinant_sign,
    check_initialization,
    check_negative_determinants,
    check_random_parameters,
)
from musigma.audit.sandbox import Sandbox, about_types, by_float_type

__all__ = ["audit_flow"]

SAME = 1e-7  # largest difference between two calls on one input


def audit_flow(
    forward: Any, inverse: Any = None, example: Tensor | None = None, state: Any = None
) -> AuditReport:
    """Whether a flow is a bijection, and its log-determinant that of its Jacobian.

    The arguments do not change: parameters are moved, and then restored. Modules compute in
    float64 if they can. A log-determinant is compared with autograd's Jacobian, layer by layer
    where there are many elements.

    Args:
        forward: ``x -> (z, log_det)``: a function, a module, a `torch.distributions.Transform`, or
            a sequence of layers that each are one of these. log_det in nats, (B,); it may be added
            to an argument, as in ``forward(x, ldj, reverse=False)``.
        inverse: ``z -> x`` or ``z -> (x, log_det)``; None: looked for on `forward`.
        example: A batch (B, ...) of data for the flow.
        state: The modules whose parameters are moved, and which are saved and loaded; None: those
            that the callables use.

    Returns:
        The report; `details` has condition numbers and errors. It is incomplete if the
        log-determinant could not be compared.

    Raises:
        AuditError: If there is no example, or forward raises, does not end, or returns something
            other than (z, log_det).

    Example:
        >>> from musigma.layers import ActNorm
        >>> audit_flow(ActNorm(3), example=torch.randn(8, 3)).verdict
        'correct'
        >>> wrong = lambda x: (2 * x, torch.full((len(x),), math.log(2)))
        >>> audit_flow(wrong, lambda z: z / 2, torch.randn(8, 3)).codes
        ('logdet_mismatch',)
    """
    if not isinstance(example, Tensor):
        raise AuditError("example: give a batch of data for the flow, shape (B, ...)")
    if example.ndim < 1 or not len(example) or not example[0].numel():
        raise AuditError(f"example: expected a batch (B, ...); got {tuple(example.shape)}")
    if not example.isfinite().all():
        raise AuditError("example: expected finite numbers")
    if isinstance(forward, Transform):
        if not forward.bijective:
            raise AuditError("forward: this transform is not bijective, by its own attribute")
        with suppress(NotImplementedError):
            if not forward.domain.check(example).all():
                raise AuditError(f"example: expected the transform's domain, {forward.domain}")

    def attempt(dtype: torch.dtype) -> AuditReport:
        with Sandbox(forward, inverse, state) as sandbox:
            sandbox.restore_modes()
            sandbox.use_dtype(dtype)
            return _audit(FlowAudit(sandbox, forward, inverse, example, state))

    # many flows refuse float64 by an assertion without a word about types
    return by_float_type(attempt, lambda error: bool(error.__cause__) or about_types(error))


def _audit(audit: FlowAudit) -> AuditReport:
    _call_first(audit)
    if "not_finite" not in audit.findings and _check_purity(audit):
        check_initialization(audit)
        unperturbed = _check_unperturbed(audit)
        checks = [_check_accumulation, check_random_parameters, check_negative_determinants]
        checks += [check_determinant_sign, check_layers] if audit.square else []
        for check in [*checks, _check_single_precision]:
            check(audit, unperturbed)
            audit.restore()
    for name, argument in audit.flow.changed.items():
        audit.warn("inplace", "flow", name=name, argument=argument)
    if not audit.compared and not any(code.startswith("logdet") for code in audit.findings):
        audit.missing.append("the log-determinant: " + (audit.why_not or "it was not compared"))
    audit.assumed += audit.flow.notes
    return audit.build()


def _call_first(audit: FlowAudit) -> None:
    began = time.process_time()
    try:
        image = audit.flow.first_call(audit.x)
    except AuditError:
        if len(audit.example) == len(audit.x):
            raise
        audit.x = audit.example.clone()  # it may take no other batch size
        image = audit.flow.first_call(audit.x)
        audit.assumed.append(f"only batches of {len(audit.x)} examples are taken")
    audit.seconds_per_call = time.process_time() - began
    if audit.sandbox.dtype == torch.float64:
        if image.flat.dtype == torch.float32:
            raise AuditError("forward: given float64, it returns float32")
        if isinstance(image.raw, Tensor) and image.raw.dtype == torch.float32:
            audit.tolerance, audit.bug_error = LIMITS_32
            audit.assumed.append("log-determinants come in float32: tolerances are wider")
    d, elements = image.flat.shape[1], audit.x[0].numel()
    audit.why_not = "forward returns none" if image.raw is None else ""
    if d != elements:
        sizes = f"z has {d} numbers for each example, and x {elements}"
        if not audit.flow.invertible:
            raise AuditError(
                f"forward: {sizes}, so it is not a bijection; return everything that is factored "
                "out, as a list of tensors"
            )
        audit.square = False
        audit.why_not = f"{sizes}; return what is factored out as well, as a list of tensors"
    bad = float((~image.flat.isfinite()).double().mean())
    if bad:
        audit.bug("not_finite", "latents", share=bad)
    if not audit.flow.invertible:
        audit.unchecked.append("the inverse: there is none")


# --- a function of one example ------------------------------------------------------------------


def _check_purity(audit: FlowAudit) -> bool:
    """Whether the flow treats examples separately, and draws nothing, or what can be removed."""
    training = any(m.training for m in audit.sandbox.layers())
    noise, log_det_noise, coupling = _impurity(audit)
    if training and (noise > SAME or coupling > audit.tolerance):
        for root in audit.sandbox.modules:
            root.eval()
        given_noise, given_coupling = noise, coupling
        noise, log_det_noise, coupling = _impurity(audit)
        audit.was_training = True
        audit.assumed.append("the flow is in training mode; the other checks use evaluation mode")
        if given_noise > SAME >= noise:
            audit.warn("stochastic", "training", difference=given_noise)
        if given_coupling > audit.tolerance >= max(coupling, given_noise):
            audit.warn("cross_sample", "training", difference=given_coupling)
    if noise > SAME:
        if not _removes_noise(audit, noise):
            audit.bug("stochastic", "bijection", difference=noise)
            audit.why_not = "forward draws noise"
            return False
        audit.flow.fixed_draws = True
        audit.assumed.append("forward draws the same noise on each call of the other checks")
        _, log_det_noise, coupling = _impurity(audit)
    else:
        audit.checked.append("two calls on the same input agree")
    audit.noisy_log_det = log_det_noise > SAME
    if coupling > audit.tolerance:
        audit.bug("cross_sample", "bijection", difference=coupling)
    else:
        audit.checked.append("no example's output depends on the others in its batch")
    return True


def _impurity(audit: FlowAudit) -> tuple[float, ...]:
    """How far z and the log-determinant differ between calls, and z among other examples.

    The larger difference under these and under random parameters.
    """
    largest = _differences(audit)
    if audit.sandbox.trainable() and not audit.slow:
        restore = audit.sandbox.snapshot()
        audit.perturb(0.1)
        with suppress(AuditError):
            pairs = zip(largest, _differences(audit), strict=True)
            largest = tuple(max(a, b) if math.isfinite(b) else a for a, b in pairs)
        restore()
    return largest


def _differences(audit: FlowAudit) -> tuple[float, ...]:
    began, n, rows = time.process_time(), 2 if audit.slow else 3, len(audit.x)
    images = [audit.flow.forward(audit.x) for _ in range(n)]
    seconds = (time.process_time() - began) / n  # the first call warms up
    audit.seconds_per_call = min(audit.seconds_per_call, seconds)
    stated = [log_det_of(0.0 if i.raw is None else i.raw, rows)[0] for i in images]
    others = audit.draw_examples(rows, 9)
    others[0] = audit.x[0]
    return (
        max(distance(images[0].flat, other.flat) for other in images[1:]),
        max(distance(stated[0], other) for other in stated[1:]),
        distance(audit.flow.latents(others)[:1], images[0].flat[:1]),
    )


def _removes_noise(audit: FlowAudit, noise: float) -> bool:
    """Whether x can be recovered from what a stochastic forward returns: dequantization.

    Its inverse floors; or else, neighboring levels have images that fill disjoint intervals.
    """
    n, wrong = 50 if audit.seconds_per_call < 0.01 else 5, 1.0
    with suppress(AuditError):
        x = audit.x
        if audit.flow.invertible:
            back = audit.flow.round_trip(x)
            if distance(back, x) > audit.tolerance:
                x = back  # the given x was not among the values that the inverse returns
            off = torch.stack([audit.flow.round_trip(x) - x for _ in range(n)])
            wrong = float((off.abs() > audit.tolerance).double().mean())
        elif (step := _step(audit.example)) > 0:
            x = audit.example[: len(x)].clamp(max=audit.example.max() - step)
            pair = (x, x + step)
            z, above = (torch.stack([audit.flow.latents(v) for _ in range(n)]) for v in pair)
            filled = (z.amax(0) - z.amin(0)) / (above.mean(0) - z.mean(0))
            wrong = float(((z.amax(0) > above.amin(0)) | (filled < 0.8)).double().mean())
    if wrong > 0.05:
        return False
    audit.warn("stochastic", "dequantization", difference=noise)
    if wrong > 1e-4:
        audit.warn("inverse_mismatch", "grid", share=wrong)
    elif audit.flow.invertible:
        audit.checked.append(f"the inverse removes the noise of forward, in {n} draws")
    audit.flow.invertible = False  # off the grid, flooring is no inverse
    return True


def _step(x: Tensor) -> float:
    """The distance of the levels of quantized data; zero if they are not quantized."""
    levels = x.unique()
    steps = levels.diff() / levels.diff().min() if len(levels) > 1 else levels
    quantized = len(levels) > 1 and distance(steps, steps.round()) < 0.02
    return float(levels.diff().min()) if quantized else 0.0


# --- both directions ----------------------------------------------------------------------------


def _check_unperturbed(audit: FlowAudit) -> Measurement:
    audit.restore = audit.sandbox.snapshot()
    measured = audit.measure()
    if measured.inverse_error is not None:
        report_raising_inverse(audit, measured.inverse_error)
    report(audit, measured, audit.when(0.0))
    if measured.volume is not None and measured.volume.condition.isfinite().all():
        audit.details["condition"] = float(measured.volume.condition.max())
    return measured


def _check_accumulation(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Whether a forward that takes a log-determinant adds to it."""
    raw = audit.flow.forward(audit.x).raw
    if audit.flow.adds_to is None or not isinstance(raw, Tensor) or unperturbed.nan_log_det:
        return
    before = torch.randn(raw.shape or audit.x.shape[:1])
    with suppress(AuditError):
        after = audit.flow.forward(audit.x, total=before).raw
        fits = isinstance(after, Tensor) and after.shape == before.shape
        if fits and distance(after - before, raw.expand_as(before)) < 1e-6:
            audit.checked.append(f"the log-determinant is added to {audit.flow.adds_to}")
        else:
            audit.bug("logdet_mismatch", "accumulated", argument=audit.flow.adds_to)


def _check_single_precision(audit: FlowAudit, _unperturbed: Measurement) -> None:
    """The error of a round trip in float32, in which the flow will be used."""
    usable = audit.flow.invertible and audit.sandbox.dtype == torch.float64
    if not usable or {"inverse_mismatch", "inverse_raises"} & audit.findings.keys():
        return
    x = audit.few.float()
    audit.sandbox.use_dtype(torch.float32)
    with suppress(AuditError):
        back = audit.flow.round_trip(x)
        error = distance(back, x) if back.isfinite().all() else math.inf
        audit.details["round_trip_float32"] = error
        if error > 0.02:
            whole = {"the flow": audit.details.get("condition", math.nan)}
            worst, condition = max(
                audit.details.get("conditions", whole).items(), key=lambda item: item[1]
            )
            audit.warn(
                "ill_conditioned", "round_trip", error=error, layer=worst, condition=condition
            )
