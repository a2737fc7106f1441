r"""The audit of a term: is it the log-density of a Gaussian, or of another distribution?

Terms are written again in every codebase, with another reading of the second parameter each:
priors and posteriors of weights, likelihoods with a learned variance, log-densities of latents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from musigma.audit.batches import required
from musigma.audit.density import audit_density
from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
    Missing,
    Outcome,
    Passed,
    bug,
    name_of,
)
from musigma.audit.sandbox import FLOATS, Sandbox, first_form
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
LIKE = {"-sigma": torch.neg, "-sigma^2": lambda s: -(s**2), "1 / sigma": torch.reciprocal}
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
        AuditError: If it takes neither one nor three tensors, has no gradient in z, or `sign` is
            another.

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
    name, names = getattr(term, "__name__", ""), required(term)
    sign = sign if sign is not None else -1 if LOSS.search(name) else 1
    if sign not in (1, -1):
        raise AuditError(f"sign: expected 1 for a log-density, or -1 for a loss; got {sign!r}")
    order = _order(names) or (0, 1, 2)
    counts = (1,) if len(names) == 1 else (3,) if len(names) == 3 else (3, 1)
    with Sandbox(term) as sandbox:
        shapes = [(2, 17), *dict.fromkeys(tuple(t.shape) for t in sandbox.trainable()), (1, 1)]
        if example is not None:
            z = example if isinstance(example, Tensor) else example[order[0]]
            shapes = [tuple(z.shape)]

        def attempt(
            dtype: torch.dtype, count: int, least: float, shape: tuple[int, ...]
        ) -> list[Outcome]:
            sandbox.use_dtype(dtype)
            return list(_check(_Term(sandbox, term, order[:count]), shape, least, sign))

        _, found = first_form(product(FLOATS, counts, (-6.0, 0.1), shapes), attempt)
        return AuditReport.of(name_of(term), found)


class _Term(NamedTuple):
    """A term as a function of (z, mean, second), or of z only."""

    sandbox: Sandbox
    term: Callable[..., Any]
    order: tuple[int, ...]  # the places of these arguments

    def __call__(self, *given: Tensor) -> Any:
        return self.term(*(given[self.order.index(i)] for i in range(len(given))))

    def slope(self, z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of its numbers, its gradient in z, and z, as parts of one graph."""
        z = z.detach().requires_grad_()
        value = self.sandbox.call("term", self, z, *rest)
        if self.sandbox.as_tensor("term", value).numel() > z.numel():
            raise AuditError(
                f"term: given {tuple(z.shape)}, expected a number or {z.numel()} of them; got "
                f"{tuple(value.shape)}"
            )
        if not (isinstance(value, Tensor) and value.requires_grad):
            raise AuditError("term: its value has no gradient in z")
        return value.sum(), _gradient(value, z), z


def _gradient(value: Tensor, *of: Tensor) -> Tensor:
    """The gradient of a sum in a tensor, or in several as one row; zero where there is none."""
    slopes: Any = [torch.zeros_like(t) for t in of]
    if value.requires_grad:
        slopes = torch.autograd.grad(value.sum(), of, create_graph=True, materialize_grads=True)
    return slopes[0] if len(of) == 1 else torch.cat([slope.flatten() for slope in slopes])


def _check(term: _Term, shape: tuple[int, ...], least: float, sign: int) -> Iterator[Outcome]:
    """Whether a term, a log-density or (-1) a loss, is that of a Gaussian or another density.

    The second parameters are from a least one to 6. The curvatures of a Gaussian's parabolas are
    -1 / sigma^2, and its peaks -log sigma. So where parameters move, the peaks move like
    log(-curvature) / 2, times the factor of the term.
    """
    elements, moves, (height, level) = _measure(term, shape, least)
    low, near, far, b, sigma, center, alone, along = elements
    peak, entropy, *others = moves
    of_z = len(term.order) == 1
    tolerance = 1e-6 if term.sandbox.dtype == torch.float64 else 2e-3
    if not len(b):
        yield bug("not_finite", what="the term", at="for ordinary arguments")
        return
    flip = 1 if float(far.sign().sum()) <= 0 else -1  # a log-density falls far from the mean
    if flip * sign < 0:
        yield bug("prior_term_sign", what="log-density" if sign == 1 else "loss")
    peak = flip * peak
    factor = float((peak @ entropy) / (entropy @ entropy)) if entropy.norm() > 1e-9 else 1.0
    of_one = level - 0.5 * math.log(2 * math.pi * max(factor, 1e-9))
    constant = flip * height - factor * of_one
    yield Facts(details={"factor": sign * flip * factor, "constant": constant})

    def same(x: Tensor, y: Tensor) -> bool:
        return bool(((x - y).abs() <= 10 * tolerance * y.abs()).all())

    is_parabola = same(near - low, along) and same(far - near, along)
    is_diagonal = same(alone, along)  # no element depends on another
    unexplained = float((peak - factor * entropy).norm() / (peak.norm() + 1e-6))
    if not (is_parabola and bool((flip * along < 0).all())):
        yield _check_integral(flip, term)
    elif not (is_diagonal or of_z):
        yield Missing("the term: its elements depend on each other")
    elif of_z:
        yield Assumed("term(z) is of one fixed Gaussian")
        yield Passed("a parabola in z")
        if is_diagonal and unexplained > SHARE:
            hint = " when its own parameters move"
            yield bug("prior_term_mismatch", "entropy", share=unexplained, hint=hint)
    elif center.abs().max() > 1e4 * tolerance:
        yield bug("prior_term_mismatch", "center", off=center.abs().max())
    elif unexplained > SHARE:
        likely = zip(LIKE, others, strict=True)
        like = [w for w, t in likely if torch.cosine_similarity(peak, t, 0) > 1 - 1e-6]
        hint = f", but like {like[0]}" if like else ""
        yield bug("prior_term_mismatch", "entropy", share=unexplained, hint=hint)
    else:
        order = b.argsort()
        yield from _check_scale(b[order], sigma[order], factor, unexplained, 10 * tolerance)


def _measure(
    term: _Term, shape: tuple[int, ...], least: float
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """The parabolas of each element, slopes of their peaks, and the average peak and log(1/sigma).

    The columns of the first are slopes in z, times a step, at three points; the second parameter;
    sigma by the curvature; the center less the mean; and two second differences.
    """
    of_z = len(term.order) == 1
    n, own = math.prod(shape), term.sandbox.trainable() if of_z else []
    count = 6 if own else 1 if of_z else -(-34 // n)
    generator = torch.Generator().manual_seed(0)
    elements, moves, levels = [], [], []
    for i in range(count):
        if own:
            term.sandbox.randomize(0.5, i)
        b = torch.linspace(least, 6.0, n * count)[i::count].reshape(shape).requires_grad_()
        mean, v = 0.3 + torch.rand(2, *shape, generator=generator)
        mean = mean * (not of_z)
        rest = [] if of_z else [mean, b]
        _, g, z = term.slope(mean, *rest)
        at = [term.slope(mean + k * v, *rest)[1] / 3.5 for k in (-3, 0.5, 4)]
        curvature, along = _gradient(g, z), _gradient(g * v, z)
        center, sigma = (z - g / curvature).detach(), curvature.abs().rsqrt()
        peak, log_precision = term.slope(center, *rest)[0], -sigma.log()
        rows = [*at, b, sigma, center - mean, curvature * v, along]
        table = torch.stack([t.detach().flatten() for t in rows])
        usable = table[:3].isfinite().all(0)
        elements.append(table[:, usable].double())
        if moved := own if of_z else [b]:
            functions = [peak, log_precision, *(like(sigma) for like in LIKE.values())]
            slopes = torch.stack([_gradient(f, *moved).detach().flatten() for f in functions])
            moves.append(slopes if of_z else slopes[:, usable])
        levels.append(torch.stack([peak / n, log_precision.mean()]).detach())
    height, level = torch.stack(levels).mean(0).tolist()
    slopes = torch.cat(moves, 1) if moves else torch.zeros(2 + len(LIKE), 1)
    return torch.cat(elements, 1), slopes.double(), (height, level)


def _check_scale(
    b: Tensor, sigma: Tensor, factor: float, off: float, tolerance: float
) -> Iterator[Outcome]:
    """How the second parameter is read, and whether the factor of log sigma is that of the rest.

    A factor of the whole term divides the sigma of its curvature by its root.
    """
    scale = math.sqrt(max(factor, 0.0))
    plain, whole = (name_curve(b, sigma * k, tolerance) for k in (1.0, scale))
    weighted = abs(factor - 1) > SHARE
    if factor < SHARE or (weighted and _is_usual(plain) and not _is_usual(whole)):
        yield bug("prior_term_mismatch", "factor", factor=round(factor, 6) + 0.0, sigma=plain.text)
    elif weighted and not whole.named:
        yield Missing(
            f"the factor of log sigma: it is {factor:.5g} times that of a Gaussian, whose "
            "sigma is an unknown function of the second parameter"
        )
    else:
        yield Passed(
            f"a multiple of log N: factor {factor:.6g}, sigma is {whole.text}, off by {off:.1g}"
        )
        yield Facts(read_as=whole.name if whole.named else None)


def _is_usual(curve: Curve) -> bool:
    """Whether it is a known reading without a factor."""
    return curve.named and abs(curve.noise_scale - 1) < 1e-4


def _check_integral(flip: int, term: _Term) -> Outcome:
    """Whether exp of a term that is no parabola integrates to one over z."""

    def signed(z: Tensor, rest: tuple[float, ...]) -> Any:
        return flip * term(z, *(torch.full_like(z, value) for value in rest))

    ends = [()] if len(term.order) == 1 else [(-0.7, 0.5), (0.4, 1.0), (1.3, 2.0)]
    values = []
    for rest in ends:
        with suppress(AuditError):
            whole = audit_density(partial(signed, rest=rest), 1)
            values.append(whole.details.get("integral", math.nan))
    integral = max(values, key=lambda value: abs(value - 1), default=math.nan)
    if len(values) == len(ends) and abs(integral - 1) < 5e-3:
        return Passed(f"not a Gaussian's, but exp of it integrates to {integral:.6g}")
    return bug("prior_term_mismatch", integral=integral)
