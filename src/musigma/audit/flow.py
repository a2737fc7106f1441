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

from musigma.audit.findings import AuditError, AuditReport, distance
from musigma.audit.flow_adapter import log_det_of
from musigma.audit.flow_parameters import (
    check_determinant_sign,
    check_initialization,
    check_negative_determinants,
    check_random_parameters,
)
from musigma.audit.flow_state import (
    BUG_32,
    SAME,
    TOLERANCE_32,
    FlowAudit,
    Measurement,
)
from musigma.audit.layerwise import check_layers
from musigma.audit.sandbox import Sandbox, TooSlowError, about_types, by_float_type

__all__ = ["audit_flow"]


def audit_flow(
    forward: Any, inverse: Any = None, example: Tensor | None = None, state: Any = None
) -> AuditReport:
    """Whether a flow is a bijection, and its log-determinant that of its Jacobian.

    The arguments do not change: parameters are moved, and then restored. Modules compute in
    float64 if they can. A log-determinant is compared with autograd's Jacobian, layer by layer
    where there are many elements.

    Args:
        forward: ``x -> (z, log_det)``: a function, a module, a `torch.distributions.Transform`, or
            a sequence of layers that each are one of these. log_det in nats: (B,), (B, 1), one
            number for all, or one for each element.
        inverse: ``z -> x`` or ``z -> (x, log_det)``; None: looked for on `forward`.
        example: A batch (B, ...) of data for the flow.
        state: The modules whose parameters are moved, and which are saved and loaded; None: those
            that the callables use.

    Returns:
        The report; `details` has condition numbers and errors.

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

    def attempt(dtype: torch.dtype) -> AuditReport:
        with Sandbox(forward, inverse, state) as sandbox:
            sandbox.restore_modes()
            sandbox.use_dtype(dtype)
            return _audit(FlowAudit(sandbox, forward, inverse, example, state))

    # many flows refuse float64 by an assertion without a word about types
    return by_float_type(attempt, lambda error: bool(error.__cause__) or about_types(error))


def _audit(audit: FlowAudit) -> AuditReport:
    _call_first(audit)
    if "not_finite" not in audit.findings:
        _check_purity(audit)
        if not audit.is_stochastic:
            check_initialization(audit)
            unperturbed = _check_unperturbed(audit)
            checks = [check_random_parameters, check_negative_determinants]
            checks += [check_determinant_sign, check_layers] if audit.square else []
            for check in [*checks, _check_single_precision]:
                check(audit, unperturbed)
                audit.restore()
        elif audit.flow.invertible:
            _check_surjection(audit)
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
            audit.tolerance, audit.bug_error = TOLERANCE_32, BUG_32
            audit.assumed.append("log-determinants come in float32: tolerances are wider")
    d, elements = image.flat.shape[1], audit.x[0].numel()
    if d != elements:
        sizes = f"z has {d} numbers for each example, and x {elements}"
        if not audit.flow.invertible:
            raise AuditError(
                f"forward: {sizes}, so it is not a bijection; return everything that is factored "
                "out, as a list of tensors"
            )
        audit.square = False
        audit.unchecked.append(
            f"log-determinant: {sizes}; return what is factored out as well, as a list of tensors"
        )
    bad = float((~image.flat.isfinite()).double().mean())
    if bad:
        audit.bug(
            "not_finite",
            f"{bad:.0%} of the numbers of z are NaN or infinite at the example",
            "find the first layer whose output is not finite, at an input of this range",
            share=bad,
        )
    if image.raw is None:
        audit.unchecked.append("log-determinant: forward returns none")


def _check_purity(audit: FlowAudit) -> None:
    """Whether the flow is deterministic and treats examples separately, in its present mode."""
    training = any(m.training for root in audit.sandbox.modules for m in root.modules())
    noise, log_det_noise, coupling = _impurity(audit)
    if training and (noise > SAME or coupling > audit.tolerance):
        for root in audit.sandbox.modules:
            root.eval()
        given_noise, given_coupling = noise, coupling
        noise, log_det_noise, coupling = _impurity(audit)
        audit.was_training = True
        audit.assumed.append("the flow is in training mode; the other checks use evaluation mode")
        if given_noise > SAME >= noise:
            audit.warn(
                "stochastic",
                "in training mode, the present mode of the flow, two calls on one input differ by "
                f"{given_noise:.2g}; in evaluation mode they do not",
                "call .eval() before likelihoods are compared; without dropout in the networks of "
                "a flow, its training density is that of evaluation too",
                difference=given_noise,
            )
        if given_coupling > audit.tolerance >= max(coupling, given_noise):
            audit.warn(
                "cross_sample",
                "in training mode, the present mode of the flow, an example's z changes by "
                f"{given_coupling:.2g} with the other examples of its batch; in evaluation mode "
                "it does not",
                "batch statistics couple examples, so log p(x) in training mode is not a density; "
                "evaluate with .eval(), or use activation normalization",
                difference=given_coupling,
            )
    if noise > SAME:
        audit.is_stochastic = True
        audit.bug(
            "stochastic",
            f"two calls on the same input differ by {noise:.2g}",
            "a bijection draws nothing: move the noise out of it, or count its log-density",
            difference=noise,
        )
        return
    audit.checked.append("two calls on the same input agree")
    audit.noisy_log_det = log_det_noise > SAME
    if coupling > audit.tolerance:
        audit.bug(
            "cross_sample",
            f"an example's z changes by {coupling:.2g} when the others of its batch are replaced",
            "compute statistics over the axes of one example, or use stored ones",
            difference=coupling,
        )
    else:
        audit.checked.append("no example's output depends on the others in its batch")


def _impurity(audit: FlowAudit) -> tuple[float, ...]:
    """`_differences`, the larger of each under these and under random parameters."""
    differences = _differences(audit)
    if not audit.sandbox.trainable() or audit.slow:
        return differences
    restore = audit.sandbox.snapshot()
    audit.perturb(0.1)
    try:
        pairs = zip(differences, _differences(audit), strict=True)
        return tuple(max(a, b) if math.isfinite(b) else a for a, b in pairs)
    except AuditError as error:
        if error.__cause__ is None:
            raise
        return differences
    finally:
        restore()


def _differences(audit: FlowAudit) -> tuple[float, ...]:
    """How far z and the log-determinant differ between calls, and z among other examples."""
    began, n = time.process_time(), 2 if audit.slow else 3
    images = [audit.flow.forward(audit.x) for _ in range(n)]
    seconds = (time.process_time() - began) / n  # the first call warms up
    audit.seconds_per_call = min(audit.seconds_per_call, seconds)
    stated = [
        log_det_of(0.0 if image.raw is None else image.raw, len(audit.x))[0] for image in images
    ]
    others = audit.draw_examples(len(audit.x), 9)
    others[0] = audit.x[0]
    return (
        max(distance(images[0].flat, other.flat) for other in images[1:]),
        max(distance(stated[0], other) for other in stated[1:]),
        distance(audit.flow.forward(others).flat[:1], images[0].flat[:1]),
    )


def _check_surjection(audit: FlowAudit) -> None:
    """Whether the inverse of a stochastic forward recovers x all the same."""
    with suppress(AuditError):
        image = audit.flow.forward(audit.x)
        back, _ = audit.flow.inverse(image.tree, audit.x)
        if distance(back, audit.x) <= audit.tolerance:
            bug = audit.findings.pop("stochastic")
            audit.warn(
                "stochastic",
                f"{bug.message}; the inverse recovers x all the same: a surjection, or "
                "dequantization, whose bound needs the noise's log-density",
                "log p(x) >= log p(z) + log_det - log q(noise | x)",
                **bug.numbers,
            )
    audit.unchecked.append("the log-determinant of a stochastic forward")


def _check_unperturbed(audit: FlowAudit) -> Measurement:
    audit.restore = audit.sandbox.snapshot()
    measured = audit.measure()
    if measured.inverse_error is not None:
        _report_raising_inverse(audit, measured.inverse_error)
    audit.report_errors(measured, "with its own parameters")
    if measured.volume is not None and measured.volume.condition.isfinite().all():
        audit.details["condition"] = float(measured.volume.condition.max())
    return measured


def _report_raising_inverse(audit: FlowAudit, error: AuditError) -> None:
    cause, double = error.__cause__, audit.sandbox.dtype == torch.float64
    if isinstance(error, TooSlowError) or (double and cause is not None and about_types(error)):
        raise error
    if isinstance(cause, NotImplementedError):
        audit.unchecked.append("inverse: it is not implemented")
    elif cause is None:
        audit.bug("inverse_mismatch", str(error), "return x, in the shape that it had")
    else:
        audit.bug(
            "inverse_raises",
            str(error),
            "the inverse must accept the output of forward, in any state, on every call",
        )
    audit.flow.invertible = False


def _check_single_precision(audit: FlowAudit, _unperturbed: Measurement) -> None:
    """The error of a round trip in float32, in which the flow will be used."""
    usable = audit.flow.invertible and audit.sandbox.dtype == torch.float64
    if not usable or {"inverse_mismatch", "inverse_raises"} & audit.findings.keys():
        return
    x = audit.few.float()
    audit.sandbox.use_dtype(torch.float32)
    with suppress(AuditError):
        image = audit.flow.forward(x)
        back, _ = audit.flow.inverse(image.tree, x)
        error = distance(back, x) if back.isfinite().all() else math.inf
        audit.details["round_trip_float32"] = error
        if error > BUG_32:
            whole = {"the flow": audit.details.get("condition", math.nan)}
            conditions = audit.details.get("conditions", whole)
            worst = max(conditions, key=conditions.__getitem__)
            audit.warn(
                "ill_conditioned",
                f"a round trip is off by {error:.2g} in float32, and right in float64; the "
                f"largest condition number is {conditions[worst]:.2g}, of {worst}",
                "decode in float64, or bound the scales and the matrices' singular values",
                error=error,
                condition=conditions[worst],
            )
