"""From errors, as numbers, to findings."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from musigma.audit.ground import Ground, Look
from musigma.audit.maps import log_det_of

__all__ = ["explained", "judge"]


def judge(ground: Ground, look: Look, when: str) -> None:
    """Turn what a look showed into findings, or into lines of what was checked."""
    if not look.finite:
        return
    for name, off in (
        ("log-determinant against autograd", look.log_det),
        ("round trip", look.round_trip),
        ("log-determinants of both directions", look.back_sum),
    ):
        if off <= ground.fine:
            ground.checked.append(f"{name}, {when}: off by {off:.1g}")
    if look.nan_log_det:
        ground.find(
            "logdet_nan",
            "bug",
            f"the log-determinant is NaN or infinite {when}, where z is finite",
            "take log |det|: torch.linalg.slogdet(W)[1], and abs() before log",
        )
    if ground.map.invertible:
        _judge_inverse(ground, look, when)
    if look.stated is None or look.nan_log_det:
        return
    _judge_shape(ground, look)
    if math.isnan(look.log_det):
        return
    if ground.noisy_log_det:
        _judge_estimate(ground, look)
    elif look.log_det > ground.fine and "logdet_shape" not in ground.findings:
        _mismatch(ground, look, when)


def _judge_inverse(ground: Ground, look: Look, when: str) -> None:
    if look.round_trip > ground.fine:
        bad = look.round_trip > ground.wrong
        ground.find(
            "inverse_mismatch",
            "bug" if bad else "warning",
            f"inverse(forward(x)) differs from x by {look.round_trip:.3g} {when}",
            "return what is split off, and take it back: drawing it anew is sampling"
            if not ground.square
            else "invert forward's operations one by one, in the opposite order, with the same "
            "constants"
            if bad
            else "the inverse is approximate, or lacks a constant of forward (an eps)",
            error=look.round_trip,
        )
    tolerance = ground.fine
    if look.back_sum > tolerance and not ground.noisy_log_det:
        if look.back_same <= tolerance:
            ground.find(
                "inverse_logdet_sign",
                "bug",
                "the inverse returns the log-determinant of forward, with the same sign",
                "return the negative: log |det dx/dz| = -log |det dz/dx|",
                difference=look.back_sum,
            )
        else:
            ground.find(
                "inverse_logdet_mismatch",
                "bug" if look.back_sum > ground.wrong else "warning",
                f"the log-determinants of both directions add up to {look.back_sum:.3g}, "
                "not to zero",
                "return minus what forward returns at the same x",
                difference=look.back_sum,
            )


def _judge_shape(ground: Ground, look: Look) -> None:
    if look.kind in ("example", "literal") or look.stated is None or look.truth is None:
        return
    truth, stated = look.truth, look.stated
    scale = 1 + 0.01 * float(truth.abs().max())
    if look.kind == "elements":
        if look.log_det <= ground.fine and not ground.map.elementwise:
            ground.find(
                "logdet_shape",
                "warning",
                "the log-determinant has several numbers for each example; their sum is right",
                "sum over all axes but the first: log_det.flatten(1).sum(1)",
            )
        return
    if look.kind == "number" and float((stated - truth).abs().max()) <= ground.wrong * scale:
        if look.log_det <= ground.fine:
            ground.find(
                "logdet_shape",
                "warning",
                "the log-determinant is one number for the whole batch; it is right for each",
                "expand it to one number per example: log_det.expand(len(x))",
            )
        return
    ways = {"the sum": truth.sum(), "the mean": truth.mean()}
    for way, value in ways.items():
        if float((stated[0] - value).abs()) <= 1e-4 * (1 + abs(float(value))):
            if len(truth) < 2:
                continue
            ground.find(
                "logdet_shape",
                "bug",
                f"the log-determinant is one number: {way} over the batch",
                "sum over all axes but the first: log_det.flatten(1).sum(1)",
                stated=float(stated[0]),
                per_example=truth.tolist(),
            )
            return
    if look.kind == "other":
        ground.find(
            "logdet_shape",
            "bug",
            "the log-determinant has a shape that belongs to no batch",
            "return one number per example, shape (B,)",
        )


def _mismatch(ground: Ground, look: Look, when: str) -> None:
    stated, truth = look.stated, look.truth
    if stated is None or truth is None:
        return
    hint, repair = explained(stated, truth, ground.x)
    ground.find(
        "logdet_mismatch",
        "bug" if look.log_det > ground.wrong else "warning",
        f"forward states {float(stated[0]):.6g} nats, and log |det J| is "
        f"{float(truth[0]):.6g} {when}{hint}",
        repair,
        stated=stated[:4].tolist(),
        log_det=truth[:4].tolist(),
        error=look.log_det,
    )


def _judge_estimate(ground: Ground, look: Look) -> None:
    """A log-determinant that is drawn: whether it is right on average."""
    truth = look.truth
    if truth is None:
        return
    x = ground.some(ground.x)
    draws = torch.stack(
        [log_det_of(ground.map.forward(x.clone()).raw, len(x))[0] for _ in range(200)]
    )
    mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    off = (mean - truth).abs()
    spread = float(draws.std(0).mean())
    if spread > 1e-3:
        ground.find(
            "stochastic",
            "warning",
            f"the log-determinant is an estimate: its standard deviation is {spread:.2g} nats",
            "average several draws when likelihoods are reported",
            std=spread,
        )
    else:
        ground.checked.append(f"the log-determinant is an estimate to {spread:.1g} nats")
    if bool((off > 8 * error + 0.05 * (1 + truth.abs())).any()):
        ground.find(
            "logdet_mismatch",
            "bug",
            f"on average the estimate is {float(mean[0]):.4g} nats, and log |det J| is "
            f"{float(truth[0]):.4g}",
            "the estimator is biased: more terms, or an unbiased number of them",
            stated=mean[:4].tolist(),
            log_det=truth[:4].tolist(),
        )


def explained(stated: Tensor, truth: Tensor, x: Tensor) -> tuple[str, str]:
    """What a wrong log-determinant looks like, and what to do."""

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= 1e-5 * (1 + float(b.abs().max()))

    if near(stated, -truth):
        return ": it has the wrong sign", "turn its sign round"
    if len(truth) > 1 and near(stated, truth.sum().expand_as(truth)):
        return ": it is summed over the batch", "sum over all axes but the first"
    if near(stated, torch.zeros_like(stated)):
        return ": none is stated", "add the logarithms of the slopes of what forward does"
    factors: Iterator[tuple[float, str]] = iter(())
    if x.ndim > 2:
        pixels, channels = x[0, 0].numel(), x.shape[1]
        sides = {f"{s}": s for s in x.shape[2:]}
        factors = iter(
            [(pixels, "the number of pixels"), (channels, "the number of channels")]
            + [(s, f"a side of {name}") for name, s in sides.items()]
        )
    for factor, what in [*factors, (x[0].numel(), "the number of elements"), (2, "two")]:
        if near(stated * factor, truth):
            return f": a factor of {factor:g} ({what}) is missing", f"multiply it by {factor:g}"
        if near(stated, truth * factor):
            return f": a factor of {factor:g} ({what}) is too much", f"divide it by {factor:g}"
    return "", "sum the logarithms of the absolute slopes, of this very forward, over all elements"
