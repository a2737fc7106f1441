r"""Audits of figures: bits per dimension and importance-weighted bounds.

Each is a short formula that every codebase writes again, and whose mistakes change a figure
without breaking anything. Each is therefore evaluated where the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
    Outcome,
    Passed,
    Skipped,
    bug,
    name_of,
    warning,
)
from musigma.audit.sandbox import FLOATS, Sandbox, first_form

__all__ = ["audit_bits", "audit_importance_bound"]

STANDARD_ERRORS = 7.0  # exceeded by chance with probability below 1e-11
MISTAKES = {
    "ln 2 (nats, not bits)": math.log(2),
    "1 / ln 2": 1 / math.log(2),
    "the number of channels": 3.0,
    "the sign": -1.0,
}
NAME = "loss_from_neg_elbos"
LAYOUTS = ("(B, K)", "(K, B)")


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
    with Sandbox(bits) as sandbox:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, levels, (24, *shape), generator=generator)
        dtype, ask = _bits_form(sandbox, bits, images)
        single = torch.tensor([float(ask(image[None]).mean()) for image in images])
        eight = images[:1].repeat_interleave(8, 0)
        again, of_eight = (
            torch.tensor([float(ask(x).mean()) for _ in range(12)]) for x in (images[:1], eight)
        )
    found: list[Outcome] = [Assumed(f"images are given as {dtype} from 0 to levels - 1")]
    found += _check_bits(single, again, math.log2(levels))
    if single.isfinite().all():
        found.append(_check_batch(again, of_eight))
    return AuditReport.of(name_of(bits), found)


def _bits_form(
    sandbox: Sandbox, bits: Callable[[Tensor], Any], images: Tensor
) -> tuple[torch.dtype, Callable[[Tensor], Tensor]]:
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
        if finite and not ask(images[:2], dtype).isfinite().all():
            raise AuditError("bits: they are not finite")

    integers = (torch.int64, torch.uint8) if images.max() < 256 else (torch.int64,)
    forms = [(dtype, True) for dtype in (*FLOATS, *integers)]
    (dtype, _), _ = first_form([*forms, (torch.float32, False)], attempt)
    return dtype, lambda x: ask(x, dtype)


def _check_batch(alone: Tensor, of_eight: Tensor) -> Outcome:
    """Compare the figures of one image, again and again, with those of eight copies of it."""
    # the error of a mean of 12 by Student's t with 11 degrees of freedom, at 1e-7
    error = 11.0 * math.hypot(float(alone.std()), float(of_eight.std())) / math.sqrt(12)
    one, eight = float(alone.mean()), float(of_eight.mean())
    if abs(eight - one) > error + 1e-4 * (1 + abs(one)):
        return bug("bpd_batch", alone=one, of_eight=eight)
    return Passed("an image costs the same by itself and in a batch of eight copies")


def _check_bits(single: Tensor, again: Tensor, truth: float) -> Iterator[Outcome]:
    """Compare the figures of 24 images, and several of one, with the entropy."""
    mean, spread, noise = float(single.mean()), float(single.std()), float(again.std())
    yield Facts(details={"bits_per_dim": mean, "entropy": truth})
    if not single.isfinite().all():
        yield bug("not_finite", what="the figure", at="for some uniformly random images")
        return
    uniform = spread < 1e-4 * max(1.0, abs(truth)) and noise < 1e-4
    # the error of 24 draws is Student's t; without any, only rounding is left
    error = STANDARD_ERRORS * 1.6 * spread / math.sqrt(len(single))
    slack = 2e-4 * truth if uniform else 1e-3 * truth + error
    like = [w for w, k in MISTAKES.items() if math.isclose(mean, truth * k, rel_tol=2e-3)]
    hint = f"; they differ by {like[0]}" if like else ""
    figures = {"bits_per_dim": mean, "entropy": truth, "hint": hint}
    if mean < truth - slack:
        yield bug("bpd_below_entropy", **figures)
    elif uniform and mean > truth + slack:
        yield bug("bpd_wrong", **figures)
    elif uniform:
        yield Passed(f"uniform images under the uniform model: {mean:.6g} bits")
    else:
        yield Assumed("the model is not the uniform one: its figures differ by image")
        yield Passed(f"random images cost {mean:.6g} bits, not less than {truth:.6g}")
        yield Skipped(
            "whether a figure above the entropy is right: pass the uniform model in place of the "
            "network"
        )


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
    loss = loss_from_neg_elbos
    generator = torch.Generator().manual_seed(0)
    n = 3.0 * torch.randn(5, 7, generator=generator, dtype=torch.float64) + 4.0
    with Sandbox(loss) as sandbox:

        def attempt(dtype: torch.dtype, layouts: tuple[str, ...]) -> list[_Fit]:
            sandbox.use_dtype(dtype)
            return [fit for layout in layouts for fit in _fits(sandbox, loss, n.to(dtype), layout)]

        forms = product(FLOATS, (LAYOUTS, LAYOUTS[:1], LAYOUTS[1:]))
        (dtype, _), fits = first_form(forms, attempt)
        best = min(fits, key=lambda fit: fit.off_value + fit.off_slope + fit.off_multiple)
        tolerance = 1e-6 if dtype == torch.float64 else 1e-4
        found = [
            Facts(layout=best.layout),
            Assumed(f"the layout is {best.layout}, with {best.way} over the batch"),
            _check_slope(best, tolerance),
            _check_value(best, tolerance),
        ]
        far = (n + 1500.0).to(dtype)  # the nats of images, where exp(-n) underflows
        value = sandbox.ask(NAME, loss, far if best.layout == "(B, K)" else far.T)
        if not value.isfinite().all():
            found.append(warning("not_finite", "bound"))
    return AuditReport.of(name_of(loss), found)


class _Fit(NamedTuple):
    """A loss and its gradient beside the bound's, in one layout and one reduction."""

    layout: str
    way: str
    value: Tensor
    bound: Tensor
    slope: Tensor | None  # (B, K)
    weights: Tensor  # of the bound: its gradient

    @property
    def off_value(self) -> float:
        return float((self.value - self.bound).norm() / (1 + self.bound.norm()))

    @property
    def off_slope(self) -> float:
        slope = 0 * self.weights if self.slope is None else self.slope
        return float((slope - self.weights).norm() / self.weights.norm())

    @property
    def factor(self) -> float:
        """The multiple of the bound's gradient that is nearest to the loss's."""
        slope = 0 * self.weights if self.slope is None else self.slope
        return float((slope * self.weights).sum() / self.weights.square().sum())

    @property
    def off_multiple(self) -> float:
        return self._replace(weights=self.factor * self.weights).off_slope if self.factor else 1.0


def _fits(
    sandbox: Sandbox, loss: Callable[[Tensor], Any], n: Tensor, layout: str
) -> Iterator[_Fit]:
    """A loss in one layout, as the sum and as the mean over the batch, or as one number each."""
    given = n.clone().requires_grad_()
    value = sandbox.call(NAME, loss, given if layout == "(B, K)" else given.T)
    flat, slope, (b, k) = sandbox.as_tensor(NAME, value).reshape(-1), None, n.shape
    if len(flat) not in (1, b):
        raise AuditError(f"{NAME}: expected a number, or ({b},); got {tuple(value.shape)}")
    if isinstance(value, Tensor) and value.requires_grad:
        (slope,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
    n = n.double()
    each, weights = math.log(k) - torch.logsumexp(-n, 1), torch.softmax(-n, 1)
    ways = {"the mean": 1 / b, "the sum": 1.0} if len(flat) == 1 else {"one number each": 1.0}
    for way, share in ways.items():
        bound = share * each.sum()[None] if len(flat) == 1 else each
        yield _Fit(layout, way, flat, bound, slope, share * weights)


def _is_multiple(fit: _Fit, tolerance: float) -> bool:
    """Whether the gradient is a positive multiple of that of the bound."""
    return fit.off_multiple <= tolerance and fit.factor > 0


def _check_slope(fit: _Fit, tolerance: float) -> Outcome:
    """Compare the gradient with that of the bound."""
    if fit.slope is None:
        return Skipped("the gradient: the loss has none")
    if fit.off_slope <= tolerance:
        return Passed(f"gradient against the softmax weights: off by {fit.off_slope:.1g}")
    if _is_multiple(fit, tolerance):
        return warning("iw_gradient", "factor", factor=fit.factor)
    share = (fit.slope < 0).double().mean()
    return bug("iw_gradient", distance=fit.off_slope, share=share)


def _check_value(fit: _Fit, tolerance: float) -> Outcome:
    """Compare the value with that of the bound."""
    if fit.off_value <= tolerance:
        return Passed(f"value against -log mean exp(-n): off by {fit.off_value:.1g}")
    trains = fit.off_slope <= tolerance
    difference = fit.value.sum() - fit.bound.sum()
    each = float(difference / fit.weights.sum())  # the weights of an example add up to one
    hint = "; it differs by the constant log K" * math.isclose(
        abs(each), math.log(7), abs_tol=1e-4
    )
    hint += "; the gradient is the bound's: it trains, but must not be reported" * trains
    finding = warning if _is_multiple(fit, tolerance) else bug
    return finding("iw_value", value=fit.value.sum(), bound=fit.bound.sum(), hint=hint)
