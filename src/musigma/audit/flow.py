r"""Is this a bijection, and is what it says of the volume true?

A flow's density is :math:`p(x) = p_Z(f(x)) \, |\det \partial f / \partial x|`: it needs an f that
is a function of one example, can be inverted, and whose log-determinant is the one that autograd
finds. Each of these is looked at with the parameters as they are, and with random ones: couplings
that start at zero are the identity, where every sign is right. A fault that random parameters show
must show again with a fifth of the change, or it is taken for the parameters' (a contraction that
no longer is one), and not the code's.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.ground import BAD, COARSE, SAME, Ground, Look, OtherType, apart
from musigma.audit.initialisation import initialisation
from musigma.audit.judging import judge
from musigma.audit.layers import layers
from musigma.audit.maps import log_det_of
from musigma.audit.parameters import injective, moved, negative
from musigma.audit.probes import Guest

__all__ = ["audit_flow"]


def audit_flow(
    forward: Any, inverse: Any = None, example: Tensor | None = None, state: Any = None
) -> AuditReport:
    """Whether a flow is a bijection, and its log-determinant that of its Jacobian.

    Nothing that is handed in is changed. Parameters are moved meanwhile, and modules compute in
    float64 if they can. A log-determinant is compared with autograd's Jacobian: of flows of many
    elements, layer by layer.

    Args:
        forward: ``x -> (z, log_det)``: a function, a module, a `torch.distributions.Transform`, or
            a sequence of layers that each are one of these. log_det in nats: (B,), (B, 1), one
            number for all, or one for each element.
        inverse: ``z -> x`` or ``z -> (x, log_det)``; None: looked for on `forward`.
        example: A batch (B, ...) that the flow is meant for.
        state: The modules whose parameters are moved, and which are saved and loaded; None: those
            that are found behind the callables.

    Returns:
        The report; `details` has condition numbers and errors.

    Raises:
        AuditError: If there is nothing to look at: forward raises, does not end, or returns
            something else; or there is no example.

    Example:
        >>> from musigma.layers import ActNorm
        >>> audit_flow(ActNorm(3), example=torch.randn(8, 3)).verdict
        'correct'
        >>> wrong = lambda x: (2 * x, torch.full((len(x),), math.log(2)))
        >>> audit_flow(wrong, lambda z: z / 2, torch.randn(8, 3)).codes
        ('logdet_mismatch',)
    """
    if not isinstance(example, Tensor):
        raise AuditError("example: a batch that the flow is meant for is needed, shape (B, ...)")
    if example.ndim < 1 or not len(example) or not example[0].numel():
        raise AuditError(f"example: expected a batch (B, ...); got {tuple(example.shape)}")
    if not example.isfinite().all():
        raise AuditError("example: expected finite numbers")
    trouble: AuditError | None = None
    for dtype in (torch.float64, torch.float32):
        with Guest(forward, inverse, state) as guest:
            guest.as_given()
            guest.use(dtype)
            try:
                return _report(Ground(guest, forward, inverse, example, state))
            except OtherType:
                continue
            except AuditError as error:
                if trouble is not None or error.__cause__ is None:
                    raise (trouble or error) from error.__cause__
                trouble = error
    raise trouble or AuditError("forward: it can be called in neither float64 nor float32")


def _report(ground: Ground) -> AuditReport:
    ground.x = ground.rows()
    _first_call(ground)
    if "not_finite" not in ground.findings:
        _purity(ground)
        if not ground.draws:
            initialisation(ground)
            given = _given(ground)
            if ground.guest.trained():
                moved(ground, given)
            else:
                ground.unchecked.append("random parameters: nothing here is trained")
            negative(ground)
            if ground.square:
                injective(ground)
                layers(ground, given)
            _single_precision(ground, given)
        elif ground.map.invertible:
            _undoes(ground)
    ground.assumed += ground.map.notes
    return ground.report()


def _first_call(ground: Ground) -> None:
    ground.before_first = ground.guest.snapshot()
    began = time.process_time()
    try:
        image = ground.map.find_form(ground.x)
    except AuditError:
        if len(ground.example) == len(ground.x):
            raise
        ground.x = ground.example.clone()  # perhaps it takes no other batch size
        image = ground.map.find_form(ground.x)
        ground.assumed.append(f"batches of {len(ground.x)} alone are taken")
    for part in (image.flat, *([image.raw] if isinstance(image.raw, Tensor) else [])):
        if ground.guest.dtype == torch.float64 and part.dtype == torch.float32:
            if part is image.flat:
                raise OtherType
            ground.fine, ground.wrong = COARSE, BAD
            ground.assumed.append("log-determinants come in float32: tolerances are wider")
    ground.each = time.process_time() - began
    d, wanted = image.flat.shape[1], ground.x[0].numel()
    if d != wanted and ground.map.invertible:
        ground.square = False
        ground.unchecked.append(
            f"log-determinant: z has {d} numbers for each example and x {wanted}; what is "
            "factored out has to be returned, as a list of tensors"
        )
    elif d != wanted:
        raise AuditError(
            f"forward: z has {d} numbers for each example and x {wanted}: no bijection; give "
            "everything that is factored out, as a list of tensors"
        )
    if not image.flat.isfinite().all():
        ground.find(
            "not_finite",
            "bug",
            f"{_share(image.flat)} of z are NaN or infinite at the example",
            "find the first layer whose output is not finite, at an input of this range",
            share=float((~image.flat.isfinite()).double().mean()),
        )
    if image.raw is None:
        ground.unchecked.append("log-determinant: forward states none")


def _share(t: Tensor) -> str:
    return f"{float((~t.isfinite()).double().mean()):.0%} of the numbers"


def _purity(ground: Ground) -> None:
    """Deterministic, and one example at a time: in the mode that it was handed in."""
    training = any(m.training for root in ground.guest.modules for m in root.modules())
    *noisy, coupled = _impurity(ground)
    if training and (noisy[0] > SAME or coupled > ground.fine):
        for root in ground.guest.modules:
            root.eval()
        *calm, alone = _impurity(ground)
        ground.turned = True
        ground.assumed.append("handed in training mode; all else is of evaluation mode")
        if noisy[0] > SAME >= calm[0]:
            ground.find(
                "stochastic",
                "warning",
                "in training mode, in which it was handed in, two calls on one input differ "
                f"by {noisy[0]:.2g}; in evaluation mode they do not",
                "call .eval() before likelihoods are compared; without dropout in the "
                "networks of a flow, its training density is that of evaluation too",
                difference=noisy[0],
            )
        if coupled > ground.fine >= max(alone, noisy[0]):
            ground.find(
                "cross_sample",
                "warning",
                "in training mode, in which it was handed in, an example's z moves by "
                f"{coupled:.2g} with the others of its batch; in evaluation mode it does not",
                "batch statistics couple examples: what training calls log p(x) is none; "
                "evaluate with .eval(), or use activation normalisation",
                difference=coupled,
            )
        noisy, coupled = calm, alone
    if noisy[0] > SAME:
        ground.draws = True
        ground.find(
            "stochastic",
            "bug",
            f"two calls on the same input differ by {noisy[0]:.2g}",
            "a bijection draws nothing: move the noise out of it, or count its log-density",
            difference=noisy[0],
        )
        return
    ground.checked.append("two calls on the same input agree")
    if noisy[1] > SAME:
        ground.noisy_log_det = True
    if coupled > ground.fine:
        ground.find(
            "cross_sample",
            "bug",
            f"an example's z moves by {coupled:.2g} when the others of its batch are replaced",
            "compute statistics over the axes of one example, or use stored ones",
            difference=coupled,
        )
    else:
        ground.checked.append("no example's output depends on the others in its batch")


def _impurity(ground: Ground) -> tuple[float, float, float]:
    """`_twice` and `_coupled`, with these parameters and with random ones: the larger of each."""
    own = (*_twice(ground), _coupled(ground))
    if not ground.guest.trained() or ground.slow:
        return own
    back = ground.guest.snapshot()
    ground.step(0.1)
    try:
        other = (*_twice(ground), _coupled(ground))
    except AuditError as error:
        if error.__cause__ is None:
            raise
        return own
    finally:
        back()
    first, second, third = (
        max(a, b) if math.isfinite(b) else a for a, b in zip(own, other, strict=True)
    )
    return first, second, third


def _twice(ground: Ground) -> tuple[float, float]:
    """The largest difference of several calls: of z, and of the log-determinant."""
    began, n = time.process_time(), 2 if ground.slow else 3
    images = [ground.map.forward(ground.x.clone()) for _ in range(n)]
    ground.each = min(ground.each, (time.process_time() - began) / n)  # the first call warms up
    first = images[0]
    z = max(apart(first.flat, other.flat) for other in images[1:])
    if first.raw is None:
        return z, 0.0
    stated = [log_det_of(image.raw, len(ground.x))[0] for image in images]
    return z, max(apart(stated[0], other) for other in stated[1:])


def _coupled(ground: Ground) -> float:
    """How far the first example's z moves when all others are replaced."""
    if len(ground.x) < 2:
        return 0.0
    others = ground.drawn(len(ground.x), 9)
    others[0] = ground.x[0]
    before = ground.map.forward(ground.x.clone()).flat[:1]
    after = ground.map.forward(others.clone()).flat[:1]
    return apart(before, after)


def _undoes(ground: Ground) -> None:
    """Of what draws noise: whether the inverse gives x back all the same."""
    with suppress(AuditError):
        image = ground.map.forward(ground.x.clone())
        back, _ = ground.map.inverse(image.tree, ground.x)
        if apart(back, ground.x) <= ground.fine:
            was = ground.findings.pop("stochastic")
            ground.find(
                "stochastic",
                "warning",
                was.message + "; the inverse gives x back all the same: a surjection, or "
                "dequantisation, whose bound needs the noise's log-density",
                "log p(x) >= log p(z) + log_det - log q(noise | x)",
                **was.numbers,
            )
    ground.unchecked.append("the log-determinant of what draws noise")


def _given(ground: Ground) -> Look:
    ground.before_inverse = ground.guest.snapshot()
    x = ground.some(ground.x)
    look = ground.look(x)
    if look.inverse_error is not None:
        _raises(ground, look.inverse_error)
    judge(ground, look, "with its own parameters")
    if look.volume is not None and look.volume.condition.isfinite().all():
        ground.details["condition"] = float(look.volume.condition.max())
    return look


def _raises(ground: Ground, error: AuditError) -> None:
    cause = error.__cause__
    if isinstance(cause, NotImplementedError):
        ground.map.give_up_inverse()
        ground.unchecked.append("inverse: it is not implemented")
        return
    if ground.guest.dtype == torch.float64 and isinstance(cause, (RuntimeError, TypeError)):
        text = str(cause).lower()
        if "dtype" in text or "double" in text or "float" in text:
            raise OtherType
    if cause is None and "did not end" in str(error):
        raise error
    if cause is None:
        ground.find("inverse_mismatch", "bug", str(error), "return x, of the shape it had")
        ground.map.give_up_inverse()
        return
    ground.find(
        "inverse_raises",
        "bug",
        str(error),
        "the inverse must take what forward returned, in any state, as often as it is asked",
    )
    ground.map.give_up_inverse()


def _single_precision(ground: Ground, given: Look) -> None:
    """Whether float32, in which it will be used, leaves anything of x after a round trip."""
    usable = ground.map.invertible and ground.guest.dtype == torch.float64
    if not usable or "inverse_mismatch" in ground.findings or "inverse_raises" in ground.findings:
        return
    ground.before_inverse()
    ground.guest.use(torch.float32)
    x = ground.some(ground.x).float()
    try:
        with suppress(AuditError):
            image = ground.map.forward(x.clone())
            back, _ = ground.map.inverse(image.tree, x)
            off = apart(back, x) if back.isfinite().all() else math.inf
            ground.details["round_trip_float32"] = off
            if off > BAD:
                worst = max(
                    ground.details.get("conditions", {}).items(),
                    key=lambda item: item[1],
                    default=("the flow", ground.details.get("condition", math.nan)),
                )
                ground.find(
                    "ill_conditioned",
                    "warning",
                    f"in float32 a round trip is off by {off:.2g}, in float64 it is not; the "
                    f"largest condition number is {worst[1]:.2g}, of {worst[0]}",
                    "decode in float64, or bound the scales and the matrices' singular values",
                    error=off,
                    condition=worst[1],
                )
    finally:
        ground.guest.use(torch.float64)
        ground.before_inverse()
