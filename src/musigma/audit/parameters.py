"""The same flow with other parameters: random ones, updated ones, and those that are hard on it.

A fault that random parameters show must show again with a fifth of the change, or it is taken for
the parameters' (a contraction that no longer is one), and not the code's.
"""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.ground import Ground, Look, apart, detached
from musigma.audit.judging import judge
from musigma.audit.maps import flatten, log_det_of
from musigma.audit.volume import volume

__all__ = ["injective", "moved", "negative"]

WIDE = (1.0, 3.0, 6.0, 3.0, 1.0)  # of the example's spread: 300 points each
SCALES = (0.3, 0.1, 0.03)  # of random parameters: the largest that a flow survives


def moved(ground: Ground, given: Look) -> None:
    """Look again with random parameters, and at whether the inverse follows an update."""
    for std in SCALES:
        ground.before_inverse()
        ground.step(std)
        with suppress(AuditError):
            image = ground.map.forward(ground.x.clone())
            if image.flat.isfinite().all() and float(image.flat.detach().abs().max()) < 1e6:
                break
    else:
        ground.unchecked.append("random parameters: z is not finite with any")
        ground.before_inverse()
        return
    ground.scale = std
    x = ground.some(ground.x)
    look = ground.look(x)
    when = f"with random parameters (moved by {std:g})"
    if look.inverse_error is not None and ground.map.invertible:
        _raises_later(ground, look.inverse_error, given)
        ground.before_inverse()
        return
    if look.nan_log_det and not given.nan_log_det:
        look = Look()  # a parameter may have left its range: `_negative` looks into that
    suspicious = [v for v in (look.round_trip, look.log_det, look.back_sum) if v > ground.fine]
    if suspicious and not ground.noisy_log_det:
        ground.before_inverse()
        ground.step(std / 5)
        small = ground.look(x)
        for name in ("round_trip", "log_det", "back_sum"):
            if getattr(small, name) <= 1e-3 * min(1.0, getattr(look, name)):
                setattr(look, name, math.nan)
    if look.round_trip > ground.fine >= given.round_trip and _stale(ground, std):
        look.round_trip = look.back_sum = math.nan
    elif ground.map.invertible:
        _stale(ground, std)
    judge(ground, look, when)
    ground.before_inverse()


def _raises_later(ground: Ground, error: AuditError, given: Look) -> None:
    if error.__cause__ is None:
        raise error
    ground.unchecked.append(f"inverse with random parameters: {error}")


def _stale(ground: Ground, std: float) -> bool:
    """Whether an inverse that was used before an update knows of the update."""
    x = ground.some(ground.x)
    with suppress(AuditError):
        ground.before_inverse()
        z = detached(ground.map.forward(x.clone()).tree)
        unmoved = flatten(z)
        first, _ = ground.map.inverse(z, x)
        ground.step(std)
        image = ground.map.forward(x.clone())
        if apart(image.flat, unmoved) < 1e-4:
            return False
        late, _ = ground.map.inverse(image.tree, x)
        if apart(late, x) <= 1e-3:
            ground.checked.append("the inverse follows an update of the parameters")
            return False
        late_old, _ = ground.map.inverse(z, x)
        ground.before_inverse()
        ground.step(std)
        image = ground.map.forward(x.clone())
        fresh, _ = ground.map.inverse(image.tree, x)
        if apart(fresh, x) <= 1e-3 or apart(late_old, first) == 0.0:
            ground.find(
                "stale_inverse",
                "bug",
                f"after an update of the parameters the inverse is off by "
                f"{apart(late, x):.3g}: it was computed before, and kept",
                "compute the inverse from the parameters on each call, or drop what is kept "
                "when they change (their ._version tells)",
                error=apart(late, x),
            )
            return True
    return False


def negative(ground: Ground) -> None:
    """Whether the log-determinant survives a matrix of negative determinant."""
    squares = [p for p in ground.guest.trained() if _square(p) and not _triangular(p)]
    if not squares or "logdet_nan" in ground.findings:
        return
    ground.before_inverse()
    for p in squares:
        _turn_over(p)
    with suppress(AuditError):
        image = ground.map.forward(ground.x.clone())
        if image.raw is not None and image.flat.isfinite().all():
            stated, _ = log_det_of(image.raw, len(ground.x))
            if not stated.isfinite().all():
                ground.find(
                    "logdet_nan",
                    "bug",
                    "the log-determinant is NaN or infinite where a matrix has a negative "
                    "determinant, and can be inverted",
                    "take log |det W|: torch.linalg.slogdet(W)[1], not logdet(W) or log(det(W))",
                )
            else:
                ground.checked.append("matrices of negative determinant")
    ground.before_inverse()


def injective(ground: Ground) -> None:
    """Whether det J keeps its sign, over wide points and wide parameters."""
    d = ground.x[0].numel()
    if d > 16 or "cross_sample" in ground.findings or ground.noisy_log_det:
        if d > 16:
            ground.unchecked.append("the sign of det J over many points: too many elements")
        return
    constrained = any(
        name.rsplit(".", 1)[-1] in ("u", "v", "_u", "_v", "weight_u", "weight_v")
        for root in ground.guest.modules
        for name, _ in root.named_buffers()
    )
    vectors = all(p.squeeze().ndim <= 1 for p in ground.guest.trained())
    tries = [0.0] + ([1.5, 2.0] * 8 if vectors and not constrained else [])
    for seed, std in enumerate(tries):
        if not (std == 0.0 or ground.guest.trained()):
            break
        ground.before_inverse()
        if std:
            ground.step(std, 30 + seed)
        signs = _signs(ground, WIDE if std == 0 else (2.0,))
        if signs is None:
            return
        if signs[0] and signs[1]:
            ground.find(
                "not_injective",
                "bug",
                f"det J is positive at {signs[0]} points and negative at {signs[1]}"
                + ("" if std == 0 else ", with parameters that training may reach"),
                "constrain the parameters so that f stays monotone (planar flow: w'u >= -1, "
                "by u + (softplus(w'u) - 1 - w'u) w / |w|^2)",
                positive=signs[0],
                negative=signs[1],
            )
            break
    else:
        ground.checked.append("the sign of det J is the same at all points tried")
    ground.before_inverse()


def _signs(ground: Ground, factors: tuple[float, ...]) -> tuple[int, int] | None:
    """How often det J is positive, and negative, for certain; None if it cannot be had."""
    centre = ground.example.mean(0, keepdim=True)
    spread = ground.example.std() if ground.example.numel() > 1 else torch.tensor(1.0)
    spread = spread.clamp(min=0.3)
    generator = torch.Generator().manual_seed(2)
    n, positive, negative = 300 if ground.each < 0.01 else 60, 0, 0
    inside = bool((ground.example >= 0).all() and (ground.example <= 1).all())
    for factor in factors:
        if inside:
            x = torch.rand(n, *ground.x.shape[1:], generator=generator).to(ground.x)
        else:
            noise = torch.randn(n, *ground.x.shape[1:], generator=generator).to(ground.x)
            x = centre + factor * spread * noise
        if ground.time_left() < 0:
            break
        try:
            found = volume(ground.function(), x)
        except (AuditError, RuntimeError):
            return None
        if found is None:
            return None
        sure = found.log_det.isfinite() & (found.condition < 1e9)
        positive += int((found.sign[sure] > 0).sum())
        negative += int((found.sign[sure] < 0).sum())
    return positive, negative


def _square(p: Tensor) -> bool:
    return p.ndim >= 2 and p.shape[0] == p.shape[1] > 1 and p.numel() == p.shape[0] ** 2


def _triangular(p: Tensor) -> bool:
    matrix = p.detach().reshape(len(p), -1)
    return not (matrix.tril(-1).any() and matrix.triu(1).any())


@torch.no_grad()
def _turn_over(p: Tensor) -> None:
    """Make a matrix's determinant negative, and leave its diagonal as it is.

    det(W + c e_i e_j') = det W (1 + c V_ji) with V the inverse of W: at c = -2 / V_ji it turns.
    """
    matrix = p.detach().reshape(len(p), -1).double().clone()
    if torch.linalg.det(matrix) < 0:
        return
    back = torch.linalg.pinv(matrix).T.clone()
    back.fill_diagonal_(0.0)
    at = divmod(int(back.abs().argmax()), len(p))
    if back[at] != 0:
        matrix[at] -= 2 / back[at]
        p.copy_(matrix.reshape(p.shape).to(p))
