r"""Audits of figures: bits per dimension and importance-weighted bounds.

Each is a short formula that every codebase writes again, and whose mistakes change a figure
without breaking anything. Each is therefore evaluated where the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, levels, (24, *shape), generator=generator)
    with Sandbox(bits) as sandbox:

        def ask(x: Tensor, dtype: torch.dtype) -> Tensor:
            value = sandbox.ask("bits", bits, x.to(dtype))
            if value.numel() not in (1, len(x)):
                raise AuditError(
                    f"bits: given {tuple(x.shape)}, expected ({len(x)},) or one number; got "
                    f"{tuple(value.shape)}"
                )
            return value.mean()

        def attempt(dtype: torch.dtype, finite: bool) -> None:
            sandbox.use_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
            if not ask(images[:2], dtype).isfinite() and finite:
                raise AuditError("bits: they are not finite")

        integers = (torch.int64, torch.uint8)[: 2 if levels <= 256 else 1]
        forms = [*((dtype, True) for dtype in (*FLOATS, *integers)), (torch.float32, False)]
        (dtype, _), _ = first_form(forms, attempt)
        single = torch.stack([ask(image[None], dtype) for image in images])
        again, of_eight = (
            torch.stack([ask(images[:1].repeat_interleave(n, 0), dtype) for _ in range(12)])
            for n in (1, 8)
        )
    given = Assumed(f"images are given as {dtype} from 0 to levels - 1")
    found = _check_bits(single, again, of_eight, math.log2(levels))
    return AuditReport.of(name_of(bits), [given, *found])


def _check_bits(
    single: Tensor, again: Tensor, of_eight: Tensor, truth: float
) -> Iterator[Outcome]:
    """Compare the figures of 24 images with the entropy, and those of one image with each other.

    The one image is asked for again and again, by itself and in batches of eight copies.
    """
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
    # the error of a mean of 12 by Student's t with 11 degrees of freedom, at 1e-7
    error = 11.0 * math.hypot(noise, float(of_eight.std())) / math.sqrt(12)
    one, eight = float(again.mean()), float(of_eight.mean())
    if abs(eight - one) > error + 1e-4 * (1 + abs(one)):
        yield bug("bpd_batch", alone=one, of_eight=eight)
    else:
        yield Passed("an image costs the same by itself and in a batch of eight copies")


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

        def attempt(dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
            sandbox.use_dtype(dtype)
            given = n.to(dtype, copy=True).requires_grad_()
            value = sandbox.call(NAME, loss, given)
            flat = sandbox.as_tensor(NAME, value).reshape(-1)
            if len(flat) not in (1, *n.shape):
                raise AuditError(
                    f"{NAME}: given {tuple(n.shape)}, expected a number, or one per example; got "
                    f"{tuple(value.shape)}"
                )
            if not (isinstance(value, Tensor) and value.requires_grad):
                return flat, None
            (slope,) = torch.autograd.grad(value.sum(), given, materialize_grads=True)
            return flat, slope.double()

        (dtype,), (value, slope) = first_form(((dtype,) for dtype in FLOATS), attempt)
        far = sandbox.ask(NAME, loss, (n + 1500.0).to(dtype))  # where exp(-n) underflows
    fits = (_Fit(value, n * 0 if slope is None else slope, *bound) for bound in _bounds(n, value))
    best = min(fits, key=lambda fit: fit.off_value + fit.off_slope + fit.off_multiple)
    found = [
        Facts(layout=best.layout),
        Assumed(f"the layout is {best.layout}, with {best.way} over the batch"),
        *_check_bound(best, slope is not None, 1e-6 if dtype == torch.float64 else 1e-4),
    ]
    if not far.isfinite().all():
        found.append(warning("not_finite", "bound"))
    return AuditReport.of(name_of(loss), found)


def _bounds(n: Tensor, value: Tensor) -> Iterator[tuple[str, str, int, Tensor, Tensor]]:
    """The layouts and reductions that a loss may have: the number of draws, bound and gradient."""
    for layout, dim in (("(B, K)", 1), ("(K, B)", 0)):
        k, b = n.shape[dim], n.shape[1 - dim]
        each, weights = math.log(k) - torch.logsumexp(-n, dim), torch.softmax(-n, dim)
        if len(value) == b:
            yield layout, "one number each", k, each, weights
        elif len(value) == 1:
            yield layout, "the mean", k, each.mean(0, True), weights / b
            yield layout, "the sum", k, each.sum(0, True), weights


class _Fit(NamedTuple):
    """A loss and its gradient, beside the bound's in one layout and one reduction."""

    value: Tensor
    slope: Tensor
    layout: str
    way: str
    draws: int
    bound: Tensor
    weights: Tensor  # the gradient of the bound

    @property
    def off_value(self) -> float:
        return float((self.value - self.bound).norm() / (1 + self.bound.norm()))

    @property
    def off_slope(self) -> float:
        return float((self.slope - self.weights).norm() / self.weights.norm())

    @property
    def factor(self) -> float:
        """The multiple of the bound's gradient that is nearest to the loss's."""
        return float((self.slope * self.weights).sum() / self.weights.square().sum())

    @property
    def off_multiple(self) -> float:
        return self._replace(weights=self.factor * self.weights).off_slope if self.factor else 1.0


def _check_bound(fit: _Fit, has_slope: bool, tolerance: float) -> Iterator[Outcome]:
    """Compare the gradient and the value with those of the bound."""
    trains = fit.off_slope <= tolerance
    is_multiple = fit.off_multiple <= tolerance and fit.factor > 0
    if not has_slope:
        yield Skipped("the gradient: the loss has none")
    elif trains:
        yield Passed(f"gradient against the softmax weights: off by {fit.off_slope:.1g}")
    elif is_multiple:
        yield warning("iw_gradient", "factor", factor=fit.factor)
    else:
        share = (fit.slope < 0).double().mean()
        yield bug("iw_gradient", distance=fit.off_slope, share=share)
    if fit.off_value <= tolerance:
        yield Passed(f"value against -log mean exp(-n): off by {fit.off_value:.1g}")
        return
    # the weights of an example add up to one
    each = float((fit.value - fit.bound).sum() / fit.weights.sum())
    of_draws = math.isclose(abs(each), math.log(fit.draws), abs_tol=1e-4)
    hint = "; it differs by the constant log K" * of_draws
    hint += "; the gradient is the bound's: it trains, but must not be reported" * trains
    finding = warning if is_multiple else bug
    yield finding("iw_value", value=fit.value.sum(), bound=fit.bound.sum(), hint=hint)
