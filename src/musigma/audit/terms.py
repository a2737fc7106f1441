r"""The audit of a term: is it the log-density of a Gaussian, or of another distribution?

Terms are written again in every codebase, with another reading of the second parameter each:
priors and posteriors of weights, likelihoods with a learned variance, log-densities of latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from musigma.audit.batches import required
from musigma.audit.density import audit_density
from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.sandbox import Sandbox, first_form
from musigma.audit.scales import Curve, name_curve

__all__ = ["audit_log_prob_term", "is_log_prob_term"]

SHARE = 0.01  # of a term's variation: above what a 1e-6 in a logarithm does, below any mistake

MEAN = re.compile(r"mean|mu|loc|^m$", re.IGNORECASE)
SCALE = re.compile(r"log|sig|std|var|scale|rho|^sd$|^s$|lv$|ls$", re.IGNORECASE)
DRAWN = re.compile(r"^(w|z|theta|weights?|samples?|value)$", re.IGNORECASE)
TERM = re.compile(r"log_?(p|q|prob|pdf|dens|norm|gauss)|nll|prior|post|likelihood", re.IGNORECASE)
OTHER = re.compile(
    r"sampl|param|draw|kl|div|elbo|bound|loss|objective|criterion|cod|forward|step|train|flow|vae",
    re.IGNORECASE,
)
LOSS = re.compile(r"nll|neg|loss|minus", re.IGNORECASE)


def is_log_prob_term(fn: Any) -> bool:
    """Whether a function is one for `audit_log_prob_term`, by its name and its arguments' names.

    The arguments are a tensor, a mean and a scale in any order; or a tensor only, if the name of
    the function says that it returns a log-density. Names that say nothing are terms of weights.

    Example:
        >>> def log_posterior(w, mu, rho): ...
        >>> def reparameterize(mu, rho, eps): ...
        >>> is_log_prob_term(log_posterior), is_log_prob_term(reparameterize)
        (True, False)
    """
    names, name = required(fn), getattr(fn, "__name__", "")
    if TERM.search(name):
        return len(names) == 1 or _order(names) is not None
    order = None if OTHER.search(name) else _order(names)
    return order is not None and DRAWN.search(names[order[0]]) is not None


def _order(names: list[str]) -> tuple[int, int, int] | None:
    """The places of (z, mean, scale) among three names; None if they do not tell."""
    means = [i for i, name in enumerate(names) if MEAN.search(name) and not SCALE.search(name)]
    scales = [i for i, name in enumerate(names) if SCALE.search(name)]
    if len(names) != 3 or len(means) != 1 or len(scales) != 1:
        return None
    return 3 - means[0] - scales[0], means[0], scales[0]


def audit_log_prob_term(
    term: Callable[..., Any], sign: Literal[1, -1] | None = None, example: Any = None
) -> AuditReport:
    r"""Whether a term is the log-density of a Gaussian, up to a factor and a constant.

    .. math:: \log N(z; \mu, \sigma) = -\tfrac12 \log 2\pi - \log\sigma
              - \frac{(z - \mu)^2}{2 \sigma^2}

    A term in z is a parabola; its curvature gives :math:`\sigma`, and its peak must be
    :math:`-\log\sigma` plus a constant. So no reading of the second parameter is assumed. A term
    in z that is no parabola is right if its exponential integrates to one, as of a mixture.

    Args:
        term: ``term(z)`` of a fixed density, or ``term(z, mean, second)``, for tensors (B, D); it
            returns a number, or numbers that are summed. Arguments whose names tell may have
            another order: ``term(mu, log_var, x)``.
        sign: 1 if it is a log-density, -1 if it is a loss; by default as its name says.
        example: Arguments of the term, or z, for their shape; by default several are tried.

    Returns:
        The report; `read_as` is how the second parameter is read, `details` has the factor and
        the constant.

    Raises:
        AuditError: If it takes neither one nor three tensors, or `sign` is another.

    Example:
        >>> def term(z, mean, log_var):
        ...     return -0.5 * (log_var + (z - mean) ** 2 / log_var.exp()).sum()
        >>> audit_log_prob_term(term, sign=1).read_as
        'log_var'
        >>> audit_log_prob_term(term, sign=-1).codes
        ('prior_term_sign',)
        >>> def misses_log(w, mu, rho):
        ...     sigma = torch.log1p(rho.exp())
        ...     return (-sigma - (w - mu) ** 2 / (2 * sigma**2)).sum()
        >>> audit_log_prob_term(misses_log).codes
        ('prior_term_mismatch',)
    """
    name = getattr(term, "__name__", "")
    sign = sign if sign is not None else -1 if LOSS.search(name) else 1
    if sign not in (1, -1):
        raise AuditError(f"sign: expected 1 for a log-density, or -1 for a loss; got {sign!r}")
    report, order = ReportBuilder(name_of(term)), _order(required(term))
    shapes: list[tuple[int, ...]] = [(3, 4), (1, 4), (1, 1)]
    if example is not None:
        z = example if isinstance(example, Tensor) else example[order[0] if order else 0]
        shapes = [tuple(z.shape)]
    with Sandbox(term) as sandbox:

        def attempt(dtype: torch.dtype, count: int, shape: tuple[int, ...]) -> _Element:
            sandbox.use_dtype(dtype)
            element = _Element(sandbox, term, order if count == 3 else None, count, shape)
            element(*(0.3, -0.4, 0.8)[:count])
            return element

        forms = product((torch.float64, torch.float32), (3, 1), shapes)
        (_, count, _), element = first_form(list(forms), attempt)
        reach = 6.0 if sandbox.dtype == torch.float64 else 2.0
        b = torch.linspace(-reach, reach, 34).double() if count == 3 else torch.zeros(1)
        fit, read_as = _fit(element, b), None
        if fit is None:
            report.bug("not_finite", what="the term", at="for ordinary arguments")
            return report.build()
        if fit.flip * sign < 0:
            report.bug("prior_term_sign", what="log-density" if sign == 1 else "loss")
        report.details |= {"factor": sign * fit.flip * fit.factor, "constant": fit.constant}
        if not fit.is_parabola:
            _check_integral(report, fit.flip, element)
        elif count == 1:
            report.assumed.append("term(z) is of one fixed Gaussian")
            report.checked.append(f"a parabola in z around {float(fit.center[0]):.5g}")
            _check_parameters(report, element, fit.flip)
        elif fit.center.abs().max() > 1e3 * fit.tolerance:
            report.bug("prior_term_mismatch", "center", off=float(fit.center.abs().max()))
        else:
            read_as = _check_scale(report, fit)
    return report.build(read_as=read_as)


class _Element:
    """A term as a function of one element of its arguments; the other elements stay fixed."""

    OFFSETS = torch.tensor([-3.0, -1.5, -0.4, 0.0, 0.4, 1.5, 3.0], dtype=torch.float64)

    def __init__(
        self,
        sandbox: Sandbox,
        term: Callable[..., Any],
        order: tuple[int, int, int] | None,
        count: int,
        shape: tuple[int, ...],
    ):
        self.sandbox, self.term, self.count = sandbox, term, count
        self.order = order or tuple(range(count))
        generator = torch.Generator().manual_seed(0)
        fixed = 0.3 + torch.rand(count, *shape, generator=generator, dtype=torch.float64)
        self.fixed = fixed.to(sandbox.dtype)

    def of(self, z: Tensor, *rest: Tensor) -> Any:
        """What the term returns for z, mean and second, in its own order."""
        given = (z, *rest)
        return self.term(*(given[self.order.index(i)] for i in range(len(given))))

    def __call__(self, *values: float) -> float:
        """The sum of the term's numbers with z, mean and second at one place."""
        given = self.fixed.clone()
        for tensor, value in zip(given, values, strict=True):
            tensor.view(-1)[-1] = value
        value = self.sandbox.ask("term", self.of, *given)
        if value.numel() > (n := given[0].numel()):
            raise AuditError(
                f"term: given {tuple(given[0].shape)}, expected a number or {n} of them; got "
                f"{tuple(value.shape)}"
            )
        return float(value.sum())

    def around(self, *rest: float) -> Tensor:
        """Its values at `OFFSETS` from the mean; NaN where the term raises or is not finite."""
        center = rest[0] if rest else 0.0
        try:
            y = [self(center + t, *rest) for t in self.OFFSETS.tolist()]
        except AuditError as error:
            if error.__cause__ is None:
                raise
            y = [math.nan] * len(self.OFFSETS)
        return torch.tensor(y, dtype=torch.float64)


class _Fit(NamedTuple):
    """A term as parabolas in z, one for each b that was given as its second parameter.

    The peaks of a Gaussian's are -log sigma, and the curvatures -1 / (2 sigma^2): `factor` is the
    slope of peaks over 0.5 log(-2 curvature), and `sigma` what the curvatures alone say.
    """

    b: Tensor
    flip: int  # 1 of a log-density, -1 of a loss
    is_parabola: bool
    center: Tensor  # of each, less the mean that was given
    sigma: Tensor
    peak: Tensor
    factor: float
    constant: float
    unexplained: float  # share of the variation of the peaks
    tolerance: float


def _fit(element: _Element, b: Tensor) -> _Fit | None:
    """The fit of a term at second parameters b (n,), n = 1 if it takes none; None without any."""
    means = 1.3 * torch.sin(2.0 * torch.arange(len(b)))
    given = zip(means.tolist(), b.tolist(), strict=True) if element.count == 3 else [()]
    y = torch.stack([element.around(*rest) for rest in given])
    finite = y.isfinite().all(1)
    if not finite.any():
        return None
    b, y, t = b[finite], y[finite], element.OFFSETS
    design = torch.stack([torch.ones_like(t), t, t**2], 1)
    tolerance = 1e-6 if element.sandbox.dtype == torch.float64 else 2e-3
    coefficients = torch.linalg.lstsq(design, y.T).solution
    height = (y - y.mean(1, keepdim=True)).abs().amax(1) + 1e-9 * tolerance
    rough = (y.T - design @ coefficients).abs().amax(0) / height
    c0, c1, c2 = coefficients
    flip = 1 if float(c2.sign().sum()) <= 0 else -1
    peaks, log_precision = flip * (c0 - c1**2 / (4 * c2)), 0.5 * (2 * c2.abs()).log()
    factor, unexplained = _slope(log_precision, peaks, tolerance)
    of_gaussian = log_precision.mean() - 0.5 * math.log(2 * math.pi * max(factor, 1e-9))
    return _Fit(
        b=b,
        flip=flip,
        is_parabola=bool((rough < 10 * tolerance).all() and (flip * c2 < -1e-9 * height).all()),
        center=-c1 / (2 * c2),
        sigma=(-log_precision).exp(),
        peak=peaks,
        factor=factor,
        constant=float(peaks.mean() - factor * of_gaussian),
        unexplained=unexplained,
        tolerance=10 * tolerance,
    )


def _slope(x: Tensor, y: Tensor, tolerance: float) -> tuple[float, float]:
    """The slope of y over x, 1 if x is constant; the share of y's variation that is not in it."""
    x, y = x - x.mean(), y - y.mean()
    slope = float((x * y).sum() / x.square().sum()) if float(x.norm()) > tolerance else 1.0
    return slope, float((y - slope * x).norm() / (y.norm() + 0.01))


def _check_scale(report: ReportBuilder, fit: _Fit) -> str | None:
    """Whether peaks and curvatures have the same sigma; how it is read."""
    if fit.unexplained > SHARE:
        shapes = {"-sigma": -fit.sigma, "-sigma^2": -(fit.sigma**2), "1 / sigma": 1 / fit.sigma}
        like = [f", but changes like {w}" for w, t in shapes.items() if _linear(fit.peak, t)]
        hint = (*like, "")[0]
        report.bug("prior_term_mismatch", "entropy", share=fit.unexplained, hint=hint)
        return None
    scale = math.sqrt(max(fit.factor, 0.0))
    plain, whole = (name_curve(fit.b, fit.sigma * k, fit.tolerance) for k in (1.0, scale))
    weighted = abs(fit.factor - 1) > SHARE
    if fit.factor < SHARE or (weighted and _is_usual(plain) and not _is_usual(whole)):
        report.bug(
            "prior_term_mismatch", "factor", factor=round(fit.factor, 6) + 0.0, sigma=plain.text
        )
    elif weighted and not whole.named:
        report.missing.append(
            f"the factor of log sigma: it is {fit.factor:.5g} times that of a Gaussian, whose "
            "sigma is an unknown function of the second parameter"
        )
    else:
        report.checked.append(
            f"a multiple of log N: factor {fit.factor:.6g}, sigma is {whole.text}, "
            f"off by {fit.unexplained:.1g}"
        )
        return whole.name if whole.named else None
    return None


def _is_usual(curve: Curve) -> bool:
    """Whether it is a known reading without a factor."""
    return curve.named and abs(curve.noise_scale - 1) < 1e-4


def _linear(y: Tensor, x: Tensor) -> bool:
    """Whether y is a linear function of x."""
    return abs(float(torch.corrcoef(torch.stack([y, x]))[0, 1])) > 1 - 1e-9


def _check_integral(report: ReportBuilder, flip: int, element: _Element) -> None:
    """Whether exp of a term that is no parabola integrates to one over z."""

    def signed(z: Tensor, rest: Sequence[float]) -> Any:
        return flip * element.of(z, *(torch.full_like(z, value) for value in rest))

    ends = [()] if element.count == 1 else [(-0.7, 0.5), (0.4, 1.0), (1.3, 2.0)]
    values = []
    for rest in ends:
        with suppress(AuditError):
            whole = audit_density(partial(signed, rest=rest), 1)
            values.append(whole.details.get("integral", math.nan))
    integral = max(values, key=lambda value: abs(value - 1), default=math.nan)
    if len(values) == len(ends) and abs(integral - 1) < 5e-3:
        report.checked.append(f"not a Gaussian's, but exp of it integrates to {integral:.6g}")
    else:
        report.bug("prior_term_mismatch", integral=integral)


def _check_parameters(report: ReportBuilder, element: _Element, flip: int) -> None:
    """Whether a fixed Gaussian stays normalized when its own parameters move.

    Its slope in z is linear, which gives each element's curvature and center.
    """
    sandbox, rows = element.sandbox, []
    shapes = {tuple(t.shape) for t in sandbox.trainable() if t.numel() > 1} or {(1, 1)}
    if not sandbox.trainable() or len(shapes) > 1:
        return
    shape, generator = shapes.pop(), torch.Generator().manual_seed(0)
    at = torch.stack(
        [torch.zeros(shape), torch.ones(shape), torch.rand(shape, generator=generator)]
    )
    for seed in range(6):
        sandbox.randomize(0.5, seed)
        slopes = []
        for z in at:
            z.requires_grad_()
            value = sandbox.call("term", element.term, z)
            slopes.append(flip * torch.autograd.grad(value.sum(), z)[0])
        curvature = slopes[0] - slopes[1]
        linear = torch.allclose(slopes[2], slopes[0] - curvature * at[2], 1e-3, 1e-3)
        if not linear or (curvature <= 0).any():
            return
        peak = sandbox.ask("term", element.term, slopes[0] / curvature).sum()
        rows.append((flip * float(peak), 0.5 * float(curvature.log().sum())))
    peaks, log_precisions = torch.tensor(rows, dtype=torch.float64).T
    factor, left = _slope(log_precisions, peaks, 1e-5)
    if left > SHARE:
        hint = " when its own parameters move"
        report.bug("prior_term_mismatch", "entropy", share=left, hint=hint)
    else:
        report.checked.append(f"its own parameters: factor {factor:.5g}, off by {left:.1g}")
