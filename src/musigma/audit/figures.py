r"""Audits of figures: bits per dimension and importance-weighted bounds.

Each is a short formula that every codebase writes again, and whose mistakes change a figure
without breaking anything. Each is therefore evaluated where the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.sandbox import Sandbox, first_form

__all__ = ["audit_bits", "audit_importance_bound"]

STANDARD_ERRORS = 7.0  # exceeded by chance with probability below 1e-11


# --- bits per dimension ------------------------------------------------------------------------


def audit_bits(
    bits: Callable[[Tensor], Any], levels: int = 256, shape: Sequence[int] = (3, 32, 32)
) -> AuditReport:
    r"""Whether a figure called bits per dimension is one.

    Images whose elements are drawn uniformly from L levels hold :math:`\log_2 L` bits per element.
    That is their cost under the uniform model; under any other model they cost more on average
    (Gibbs' inequality). The model is the uniform one if all images have the same figure.

    Args:
        bits: Images (B, \*shape), of integers from 0 to levels - 1, to bits per dimension, (B,) or
            their mean. The integers come as floats, or as int64 or uint8 if floats are refused.
        levels: L.
        shape: Shape of an image.

    Returns:
        The report.

    Raises:
        AuditError: If `bits` takes none of these types, or returns something else.

    Example:
        >>> def bits(x):  # of the uniform density on [0, 1), of x / 256 with its noise
        ...     nats = torch.zeros(len(x)) - x[0].numel() * math.log(256)
        ...     return -nats / (x[0].numel() * math.log(2))
        >>> audit_bits(bits, 256, (1, 8, 8)).verdict
        'correct'
        >>> audit_bits(lambda x: 0 * bits(x), 256, (1, 8, 8)).codes
        ('bpd_below_entropy',)
    """
    if levels < 2:
        raise AuditError(f"levels: expected 2 or more; got {levels}")
    report = ReportBuilder(name_of(bits))
    with Sandbox(bits) as sandbox:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, levels, (24, *shape), generator=generator)
        ask = _bits_form(sandbox, bits, images, report)
        single = torch.tensor([float(ask(image[None]).mean()) for image in images])
        again = torch.tensor([float(ask(images[:1]).mean()) for _ in range(12)])
        report.details |= {"bits_per_dim": float(single.mean()), "entropy": math.log2(levels)}
        if not single.isfinite().all():
            report.bug("not_finite", "bits")
            return report.build()
        _check_bits(report, single, float(again.std()), math.log2(levels))
        _check_batch(report, ask, images, again)
    return report.build()


def _bits_form(
    sandbox: Sandbox, bits: Callable[[Tensor], Any], images: Tensor, report: ReportBuilder
) -> Callable[[Tensor], Tensor]:
    """`bits` as a function of integers, in the first type for which it is finite."""

    def ask(x: Tensor, dtype: torch.dtype) -> Tensor:
        value = sandbox.ask("bits", bits, x.to(dtype))
        if value.numel() not in (1, len(x)):
            raise AuditError(
                f"bits: given {tuple(x.shape)}, expected ({len(x)},) or one number; got "
                f"{tuple(value.shape)}"
            )
        return value.reshape(-1)

    def attempt(dtype: torch.dtype, finite: bool) -> None:
        sandbox.use_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
        if finite > bool(ask(images[:2], dtype).isfinite().all()):
            raise AuditError("bits: they are not finite")

    integers = (torch.int64, torch.uint8) if images.max() < 256 else (torch.int64,)
    forms = [(dtype, True) for dtype in (torch.float64, torch.float32, *integers)]
    (dtype, _), _ = first_form([*forms, (torch.float32, False)], attempt)
    name = str(dtype).removeprefix("torch.")
    report.assumed.append(f"images are given as {name} from 0 to levels - 1")
    return lambda x: ask(x, dtype)


def _check_bits(report: ReportBuilder, single: Tensor, noise: float, truth: float) -> None:
    mean, spread = float(single.mean()), float(single.std())
    uniform = spread < 1e-4 * max(1.0, abs(truth)) and noise < 1e-4
    # the error of 24 draws is Student's t; without any, only rounding is left
    error = STANDARD_ERRORS * 1.6 * spread / math.sqrt(len(single))
    slack = 2e-4 * truth if uniform else 1e-3 * truth + error
    figures = {"bits_per_dim": mean, "entropy": truth, "hint": _bits_hint(mean, truth)}
    if mean < truth - slack:
        report.bug("bpd_below_entropy", **figures)
    elif uniform and mean > truth + slack:
        report.bug("bpd_wrong", **figures)
    elif uniform:
        report.checked.append(f"uniform images under the uniform model: {mean:.6g} bits")
    else:
        report.assumed.append("the model is not the uniform one: its figures differ by image")
        report.checked.append(
            f"uniformly random images cost {mean:.6g} bits, not less than {truth:.6g}"
        )
        report.unchecked.append(
            "whether a figure above the entropy is right: pass the uniform model in place of the "
            "network"
        )


def _bits_hint(mean: float, truth: float) -> str:
    factors = {
        "ln 2 (nats, not bits)": math.log(2),
        "1 / ln 2": 1 / math.log(2),
        "the number of channels": 3.0,
        "the sign": -1.0,
    }
    for what, factor in factors.items():
        if math.isclose(mean, truth * factor, rel_tol=2e-3):
            return f"; they differ by {what}"
    return "; log2(levels), for the scaling by the levels, is missing" * (abs(mean) < 1e-3)


def _check_batch(
    report: ReportBuilder, ask: Callable[[Tensor], Tensor], images: Tensor, again: Tensor
) -> None:
    """One image against eight copies of it."""
    several = torch.stack([ask(images[:1].repeat_interleave(8, 0)).mean() for _ in range(12)])
    alone, of_eight = float(again.mean()), float(several.mean())
    # the error of a mean of 12 by Student's t with 11 degrees of freedom, at 1e-7
    error = 11.0 * math.hypot(float(again.std()), float(several.std())) / math.sqrt(12)
    if abs(of_eight - alone) > error + 1e-4 * (1 + abs(alone)):
        ratio = of_eight / alone if alone else math.nan
        report.bug("bpd_batch", alone=alone, of_eight=of_eight, ratio=ratio)
    else:
        report.checked.append("an image costs the same by itself and in a batch of eight copies")


# --- importance-weighted bounds ----------------------------------------------------------------


def audit_importance_bound(loss_from_neg_elbos: Callable[[Tensor], Any]) -> AuditReport:
    r"""Whether a loss is the importance-weighted bound, by its value and by its gradient.

    .. math:: L = -\log \frac1K \sum_k e^{-n_k}, \quad
              \frac{\partial L}{\partial n_k} = \frac{e^{-n_k}}{\sum_j e^{-n_j}}

    for the negative log weights n (each -log w, the negative ELBO of one draw). A loss with this
    gradient and another value trains like the bound, but must not be reported as one.

    Args:
        loss_from_neg_elbos: n of shape (B, K), or (K, B), in nats, to the loss: a number, the sum
            or the mean over the batch, or one number per example. Both shapes are tried.

    Returns:
        The report; `layout` is "(B, K)" or "(K, B)".

    Raises:
        AuditError: If it takes neither, or returns something else.

    Example:
        >>> bound = lambda n: -(torch.logsumexp(-n, 1) - math.log(n.shape[1])).mean()
        >>> audit_importance_bound(bound).layout
        '(B, K)'
        >>> audit_importance_bound(lambda n: n.mean()).codes
        ('iw_gradient', 'iw_value')
    """
    report = ReportBuilder(name_of(loss_from_neg_elbos))
    generator = torch.Generator().manual_seed(0)
    n = 3.0 * torch.randn(5, 7, generator=generator, dtype=torch.float64) + 4.0
    with Sandbox(loss_from_neg_elbos) as sandbox:

        def attempt(dtype: torch.dtype) -> list[_Fit]:
            sandbox.use_dtype(dtype)
            layouts = [("(B, K)",), ("(K, B)",)]
            fit = partial(_bound_fits, sandbox, loss_from_neg_elbos, n.to(dtype))
            (taken,), fits = first_form(layouts, fit)
            with suppress(AuditError):
                fits += fit("(K, B)") if taken == "(B, K)" else []
            return fits

        _, fits = first_form([(torch.float64,), (torch.float32,)], attempt)
        best = min(fits, key=lambda fit: fit.rank)
        report.assumed.append(f"the layout is {best.layout}, with {best.way} over the batch")
        _check_bound(report, best)
        if best.has_value:
            _check_range(report, sandbox, loss_from_neg_elbos, best)
    return report.build(layout=best.layout)


class _Fit:
    """The errors of a loss as the importance-weighted bound, in one layout and one reduction.

    `value` has one number for each example or for all, `slope` (B, K) is its gradient: NaN if
    there is none; both are `share` times those of the sum over the batch.
    """

    def __init__(
        self, layout: str, way: str, share: float, n: Tensor, value: Tensor, slope: Tensor
    ):
        self.layout, self.way, self.dtype = layout, way, n.dtype
        weights = share * torch.softmax(-n.double(), 1)
        bound = math.log(n.shape[1]) - torch.logsumexp(-n.double(), 1)
        bound = bound if len(value) == len(n) else share * bound.sum()[None]
        self.given, self.expected = float(value.sum()), float(bound.sum())
        self.off_each = (self.given - self.expected) / (share * len(n))
        self.off_value = float((value - bound).abs().max() / (1 + bound.abs().max()))
        self.off_slope = float((slope - weights).norm() / weights.norm())
        self.factor = float((slope * weights).sum() / weights.square().sum())
        off_multiple = float((slope - self.factor * weights).norm() / weights.norm())
        tolerance = 1e-6 if n.dtype == torch.float64 else 1e-4
        self.has_value, self.has_slope = self.off_value <= tolerance, self.off_slope <= tolerance
        self.has_multiple = off_multiple <= tolerance and self.factor > 0
        self.negative = float((slope < 0).double().mean())  # share of slopes below zero
        errors = self.off_value + (0.0 if math.isnan(self.off_slope) else self.off_slope)
        self.rank = (-self.has_value - self.has_slope, -self.has_multiple, errors)


def _bound_fits(
    sandbox: Sandbox, loss: Callable[[Tensor], Any], n: Tensor, layout: str
) -> list[_Fit]:
    """A loss in one layout, as the sum and as the mean over the batch."""
    name, b = "loss_from_neg_elbos", len(n)
    given = n.detach().clone().requires_grad_()
    value = sandbox.call(name, loss, given if layout == "(B, K)" else given.T)
    if not isinstance(value, Tensor):
        value = sandbox.as_tensor(name, value)
    if value.numel() not in (1, b):
        raise AuditError(f"{name}: expected a number, or ({b},); got {tuple(value.shape)}")
    slope = None
    if value.requires_grad:
        (slope,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
    slope = torch.full_like(n, torch.nan) if slope is None else slope
    value, slope = value.detach().double().reshape(-1), slope.double()
    ways = {"one number each": 1.0} if len(value) == b else {"the mean": 1 / b, "the sum": 1.0}
    return [_Fit(layout, way, share, n, value, slope) for way, share in ways.items()]


def _check_bound(report: ReportBuilder, fit: _Fit) -> None:
    if math.isnan(fit.off_slope):
        report.unchecked.append("the gradient: the loss has none")
    elif fit.has_slope:
        report.checked.append(f"gradient against the softmax weights: off by {fit.off_slope:.1g}")
    elif fit.has_multiple:
        report.warn("iw_gradient", "factor", factor=fit.factor)
    else:
        wrong = ", and partly has the wrong sign: some draws are made worse"
        signs = wrong * (fit.negative > 0.3)
        report.bug("iw_gradient", distance=fit.off_slope, signs=signs)
    if fit.has_value:
        report.checked.append(f"value against -log mean exp(-n): off by {fit.off_value:.1g}")
        return
    constants = {"log K": math.log(7), "-log K": -math.log(7)}
    hints = [
        f"; it differs by the constant {what}"
        for what, size in constants.items()
        if math.isclose(fit.off_each, size, abs_tol=1e-4)
    ]
    if fit.has_slope:
        hints.append("; the gradient is the bound's: it trains, but must not be reported")
    report.find(
        "iw_value",
        "warning" if fit.has_slope or fit.has_multiple else "bug",
        value=fit.given,
        bound=fit.expected,
        hint="".join(hints),
    )


def _check_range(
    report: ReportBuilder, sandbox: Sandbox, loss: Callable[[Tensor], Any], fit: _Fit
) -> None:
    """Whether the loss is finite at the nats of images, where exp(-n) underflows."""
    generator = torch.Generator().manual_seed(1)
    n = (3.0 * torch.randn(5, 7, generator=generator, dtype=torch.float64) + 1500.0).to(fit.dtype)
    with suppress(AuditError):
        value = sandbox.call("loss_from_neg_elbos", loss, n if fit.layout == "(B, K)" else n.T)
        if torch.as_tensor(value).isfinite().all():
            report.checked.append("finite at 1500 nats")
        else:
            report.warn("not_finite", "bound")
