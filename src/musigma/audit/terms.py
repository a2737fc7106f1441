r"""Audits of figures: bits per dimension, importance-weighted bounds, terms of a Gaussian.

Each is a short formula that every codebase writes anew, and whose mistakes change a figure and
break nothing. So each is evaluated where the answer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.sandbox import Sandbox

__all__ = ["audit_bits", "audit_importance_bound", "audit_log_prob_term"]

EXACT = 1e-5  # relative, in float64: above rounding, below any mistake of a formula
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
    report, shape = ReportBuilder(name_of(bits)), tuple(shape)
    with Sandbox(bits) as sandbox:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, levels, (24, *shape), generator=generator)
        ask = _bits_form(sandbox, bits, images, report)
        single = torch.tensor([float(ask(images[i : i + 1]).mean()) for i in range(24)])
        again = torch.tensor([float(ask(images[:1]).mean()) for _ in range(12)])
        truth, noise = math.log2(levels), float(again.std())
        report.details |= {"bits_per_dim": float(single.mean()), "entropy": truth}
        if not single.isfinite().all():
            report.bug(
                "not_finite",
                "the bits of some uniformly random images are NaN or infinite",
                "give every level a probability above zero",
            )
            return report.build()
        _check_bits(report, single, noise, truth)
        _check_batch(report, ask, images, again)
    return report.build()


def _bits_form(
    sandbox: Sandbox, bits: Callable[[Tensor], Any], images: Tensor, report: ReportBuilder
) -> Callable[[Tensor], Tensor]:
    """`bits` as a function of integers, in the type that it takes."""
    reason: AuditError | None = None
    for dtype in (torch.float64, torch.float32, torch.int64, torch.uint8):
        if dtype == torch.uint8 and int(images.max()) > 255:
            continue
        sandbox.use_dtype(torch.float32 if dtype != torch.float64 else dtype)

        def ask(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            value = sandbox.ask("bits", bits, x.to(dtype))
            if value.numel() not in (1, len(x)):
                raise AuditError(
                    f"bits: given {tuple(x.shape)}, expected ({len(x)},) or one number; got "
                    f"{tuple(value.shape)}"
                )
            return value.reshape(-1)

        try:
            if ask(images[:2]).isfinite().all() or dtype == torch.uint8:
                report.assumed.append(
                    f"images are given as {str(dtype).removeprefix('torch.')} from 0 to levels - 1"
                )
                return ask
        except AuditError as error:
            reason = reason or error
    if reason is not None:
        raise reason
    report.assumed.append("images are given as float32 from 0 to levels - 1")
    sandbox.use_dtype(torch.float32)
    return lambda x: sandbox.ask("bits", bits, x.float()).reshape(-1)


def _check_bits(report: ReportBuilder, single: Tensor, noise: float, truth: float) -> None:
    mean, spread = float(single.mean()), float(single.std())
    error = spread / math.sqrt(len(single))
    uniform = spread < 1e-4 * max(1.0, abs(truth)) and noise < 1e-4
    # the error of 24 draws is Student's t; without any, only rounding is left
    slack = 2e-4 * truth if uniform else 1e-3 * truth + STANDARD_ERRORS * 1.6 * error
    if mean < truth - slack:
        report.bug(
            "bpd_below_entropy",
            f"uniformly random images cost {mean:.6g} bits per dimension by this figure, and hold "
            f"{truth:.6g}: no model can be better{_bits_hint(mean, truth)}",
            "bits/dim = -(log p(y) + log |det|) / (D ln 2), with D log(levels) added for data "
            "that were divided by the levels, and D all elements of an image",
            bits_per_dim=mean,
            entropy=truth,
        )
    elif uniform and mean > truth + slack:
        report.bug(
            "bpd_wrong",
            f"all images have the same figure, {mean:.6g} bits per dimension, and that of the "
            f"uniform model is {truth:.6g}{_bits_hint(mean, truth)}",
            "divide nats by (D ln 2), with D all elements of an image, and count log(levels) once",
            bits_per_dim=mean,
            entropy=truth,
        )
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
    for factor, what in (
        (math.log(2), "ln 2 (nats, not bits)"),
        (1 / math.log(2), "1 / ln 2"),
        (3.0, "the number of channels"),
        (-1.0, "the sign"),
    ):
        if math.isclose(mean, truth * factor, rel_tol=2e-3):
            return f"; they differ by {what}"
    if abs(mean) < 1e-3:
        return "; log2(levels), for the scaling by the levels, is missing"
    return ""


def _check_batch(
    report: ReportBuilder, ask: Callable[[Tensor], Tensor], images: Tensor, again: Tensor
) -> None:
    """One image against eight copies of it."""
    one, noise = float(again.mean()), float(again.std())
    eight = images[:1].expand(8, *images.shape[1:]).contiguous()
    several = torch.stack([ask(eight).mean() for _ in range(12)])
    off = float(several.mean()) - one
    # the error of a mean of 12 by Student's t with 11 degrees of freedom, at 1e-7
    error = 11.0 * math.hypot(noise, float(several.std())) / math.sqrt(12)
    if abs(off) > error + 1e-4 * (1 + abs(one)):
        ratio = float(several.mean()) / one if one else math.nan
        report.bug(
            "bpd_batch",
            f"an image costs {one:.6g} bits per dimension by itself, and "
            f"{float(several.mean()):.6g} in a batch of eight copies (a factor of {ratio:.3g})",
            "sum over the elements of an image, and average over images, nothing else",
            alone=one,
            of_eight=float(several.mean()),
        )
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
    fits: list[_Fit] = []
    reason: AuditError | None = None
    with Sandbox(loss_from_neg_elbos) as sandbox:
        for dtype in (torch.float64, torch.float32):
            sandbox.use_dtype(dtype)
            for layout in ("(B, K)", "(K, B)"):
                try:
                    fits.append(_Fit(sandbox, loss_from_neg_elbos, n.to(dtype), layout))
                except AuditError as error:
                    reason = reason or error
            if fits:
                break
        if not fits:
            raise reason or AuditError("loss_from_neg_elbos: it takes no (B, K)")
        best = min(fits, key=lambda fit: (fit.wrong, fit.proportional, fit.value))
        report.assumed.append(f"the layout is {best.layout}, with {best.way} over the batch")
        _check_bound(report, best)
        _check_range(report, sandbox, loss_from_neg_elbos, best)
    return report.build(layout=best.layout)


class _Fit:
    """The errors of a loss against the bound, in one layout."""

    def __init__(self, sandbox: Sandbox, loss: Callable[[Tensor], Any], n: Tensor, layout: str):
        self.layout, self.dtype = layout, n.dtype
        given = (n if layout == "(B, K)" else n.T).detach().clone().requires_grad_()
        name = "loss_from_neg_elbos"
        value = sandbox.call(name, loss, given)
        if not isinstance(value, Tensor):
            value = sandbox.as_tensor(name, value)
        b, k = n.shape
        if value.numel() not in (1, b):
            raise AuditError(f"{name}: expected a number, or ({b},); got {tuple(value.shape)}")
        each = value.numel() == b
        slope = None
        if value.requires_grad:
            (slope,) = torch.autograd.grad(value.sum(), given, allow_unused=True)
        exact = n.double()
        bound = -(torch.logsumexp(-exact, 1) - math.log(k))
        weights = torch.softmax(-exact, 1)
        self.slope = None if slope is None else slope.double()
        if self.slope is not None and layout == "(K, B)":
            self.slope = self.slope.T
        ways = {"one number each": 1.0} if each else {"the mean": 1 / b, "the sum": 1.0}
        tolerance = 1e-6 if n.dtype == torch.float64 else 1e-4
        options = []
        for way, factor in ways.items():
            wanted = bound if each else bound.sum()[None] * factor
            off_value = float((value.detach().double().reshape(-1) - wanted).abs().max())
            off_value /= 1 + float(wanted.abs().max())
            off_slope, ratio = math.inf, math.nan
            if self.slope is not None:
                truth = weights * factor
                off_slope = float((self.slope - truth).norm() / truth.norm())
                ratio = float((self.slope * truth).sum() / truth.square().sum())
            options.append((off_value, off_slope, ratio, way))
        self.value, self.gradient, self.ratio, self.way = min(options, key=lambda o: o[0] + o[1])
        if all(math.isinf(o[1]) for o in options):
            self.value, self.gradient, self.ratio, self.way = min(options)
        self.wrong = (self.value > tolerance) + (self.gradient > tolerance)
        self.tolerance = tolerance
        self.given = float(value.detach().double().sum())
        self.expected = float(bound.sum() * (1 if each else ways[self.way]))
        self.off_constant = (self.given - self.expected) / (
            b if each or self.way == "the sum" else 1
        )
        self.proportional = math.inf
        if self.slope is not None:
            truth = weights * (1.0 if each else ways[self.way])
            self.proportional = float((self.slope - self.ratio * truth).norm() / truth.norm())


def _check_bound(report: ReportBuilder, fit: _Fit) -> None:
    right = fit.gradient <= fit.tolerance
    if fit.slope is None:
        report.unchecked.append("the gradient: the loss has none")
    elif right:
        report.checked.append(f"gradient against the softmax weights: off by {fit.gradient:.1g}")
    elif fit.proportional <= fit.tolerance and fit.ratio > 0:
        report.warn(
            "iw_gradient",
            f"the gradient is {fit.ratio:.4g} times that of the bound",
            "sum over the draws, average over the batch",
            factor=fit.ratio,
        )
    else:
        negated = fit.slope is not None and float((fit.slope < 0).double().mean()) > 0.3
        report.bug(
            "iw_gradient",
            f"the gradient is {fit.gradient:.2g} of its length from that of the bound"
            + (", and partly has the wrong sign: some draws are made worse" if negated else ""),
            "loss = -(torch.logsumexp(-n, k) - log K), over the axis of the draws; detach weights "
            "that are computed separately",
            distance=fit.gradient,
        )
    if fit.value <= fit.tolerance:
        report.checked.append(f"value against -log mean exp(-n): off by {fit.value:.1g}")
        return
    constant = ""
    for what, size in (("log K", math.log(7)), ("-log K", -math.log(7))):
        if math.isclose(fit.off_constant, size, abs_tol=1e-4):
            constant = f"; it differs by the constant {what}"
    report.find(
        "iw_value",
        "warning" if right or (fit.proportional <= fit.tolerance and fit.ratio > 0) else "bug",
        f"the value is {fit.given:.5g}, and the bound {fit.expected:.5g}{constant}"
        + ("; the gradient is the bound's: it trains, but must not be reported" if right else ""),
        "report -(torch.logsumexp(-n, k) - log K)",
        value=fit.given,
        bound=fit.expected,
    )


def _check_range(
    report: ReportBuilder, sandbox: Sandbox, loss: Callable[[Tensor], Any], fit: _Fit
) -> None:
    """Whether the loss is finite at the nats of images, where exp(-n) underflows."""
    if fit.value > fit.tolerance:
        return
    generator = torch.Generator().manual_seed(1)
    n = (3.0 * torch.randn(5, 7, generator=generator, dtype=torch.float64) + 1500.0).to(fit.dtype)
    with suppress(AuditError):
        value = sandbox.call("loss_from_neg_elbos", loss, n if fit.layout == "(B, K)" else n.T)
        if not bool(torch.as_tensor(value).isfinite().all()):
            report.warn(
                "not_finite",
                "at 1500 nats, which images have, the loss is not finite",
                "torch.logsumexp in place of log(mean(exp()))",
            )
        else:
            report.checked.append("finite at 1500 nats")


# --- terms of a Gaussian -----------------------------------------------------------------------


def audit_log_prob_term(term: Callable[..., Any], sign: Literal[1, -1] = 1) -> AuditReport:
    r"""Whether a term is the log-density of a Gaussian, up to a factor and a constant.

    .. math:: \log N(z; \mu, \sigma) = -\tfrac12 \log 2\pi - \log\sigma
              - \frac{(z - \mu)^2}{2 \sigma^2}

    The term is regressed on it over random arguments; the second parameter is tried as the log
    std, the log variance, the std and the variance.

    Args:
        term: ``term(z)`` of a fixed Gaussian, or ``term(z, mean, second)``, for tensors (B, D); it
            returns a number, or numbers that are summed.
        sign: 1 if it is a log-density, -1 if it is a loss.

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
    """
    if sign not in (1, -1):
        raise AuditError(f"sign: expected 1 for a log-density, or -1 for a loss; got {sign!r}")
    report = ReportBuilder(name_of(term))
    with Sandbox(term) as sandbox:
        count, dtype = 0, torch.float64
        for dtype in (torch.float64, torch.float32):
            sandbox.use_dtype(dtype)
            count = _arguments(sandbox, term, dtype, last=dtype == torch.float32)
            if count:
                break
        fits = _term_fits(sandbox, term, count, dtype)
    if not fits:
        report.bug(
            "not_finite",
            "the term is NaN or infinite for ordinary arguments",
            "log sigma must be finite at every output of the network",
        )
        return report.build()
    best = min(fits, key=lambda fit: fit.residual)
    exact = best.residual <= (EXACT if dtype == torch.float64 else 1e-3)
    if best.reading == "one":
        report.assumed.append("term(z) is of one fixed Gaussian")
    report.details |= {"factor": sign * best.slope, "constant": best.intercept}
    if not exact:
        report.bug(
            "prior_term_mismatch",
            "under no reading it is a multiple of a Gaussian's log-density: "
            f"{best.residual:.0%} of its variation is unexplained"
            + ("" if best.reading == "one" else f" by the best, {best.reading}"),
            "-0.5 log(2 pi) - log_std - 0.5 ((z - mean) / std)^2: check the parentheses",
            residual=best.residual,
        )
    else:
        report.checked.append(
            f"a multiple of log N: factor {best.slope:.6g}, residual {best.residual:.1g}"
        )
    upward = best.towards * sign
    if upward < 0:
        report.bug(
            "prior_term_sign",
            "as a " + ("log-density" if sign == 1 else "loss") + " it rewards distance from the "
            "mean",
            "negate it",
            slope=best.towards,
        )
    reading = None if best.reading == "one" or not exact else best.reading
    return report.build(read_as=reading)


def _arguments(
    sandbox: Sandbox, term: Callable[..., Any], dtype: torch.dtype, *, last: bool
) -> int:
    """How many tensors a term takes, three or one; 0 if neither, unless this is the last try."""
    reason: AuditError | None = None
    for count in (3, 1):
        try:
            sandbox.ask("term", term, *_inputs(1, 1, count, dtype, 0))
            return count
        except AuditError as error:
            if reason is None or "argument" not in str(error.__cause__):
                reason = error
    if reason is not None and last:
        raise reason
    return 0


def _inputs(n: int, d: int, count: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, mean = 1.5 * torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    second = 0.3 + torch.rand(n, d, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (z, mean, second)][:count]


class _TermFit:
    def __init__(self, reading: str, x: Tensor, y: Tensor, towards: float):
        design = torch.stack([x, torch.ones_like(x)], 1)
        solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
        left = y - design @ solution
        variation = (y - y.mean()).norm()
        self.reading, self.towards = reading, towards
        self.slope, self.intercept = float(solution[0]), float(solution[1])
        self.residual = float(left.norm() / variation) if variation > 0 else math.inf


def _term_fits(
    sandbox: Sandbox, term: Callable[..., Any], count: int, dtype: torch.dtype
) -> list[_TermFit]:
    """A regression for each reading, over rows of one and of four dimensions."""
    rows, values = [], []
    for seed in range(48):
        d = 1 if seed < 32 else 4
        given = _inputs(1, d, count, dtype, 100 + seed)
        value = sandbox.ask("term", term, *(t.clone() for t in given))
        if value.numel() > d:
            raise AuditError(
                f"term: given (1, {d}), expected a number or {d} of them; got {tuple(value.shape)}"
            )
        rows.append([t.double() for t in given])
        values.append(value.sum())
    y = torch.stack(values)
    if not y.isfinite().all():
        return []
    towards = _towards(sandbox, term, count, dtype)
    if count == 1:
        return [_one_fit(rows, y, towards)]
    fits = []
    for reading in ("log_std", "log_var", "std", "variance"):
        x = torch.stack([_log_normal(z, m, _log_std(s, reading)).sum() for z, m, s in rows])
        fits.append(_TermFit(reading, x[:32], y[:32], towards))
        whole = _averaged(x, y, fits[-1])
        fits[-1].residual = max(fits[-1].residual, whole)
    return fits


def _averaged(x: Tensor, y: Tensor, fit: _TermFit) -> float:
    """The residual over several dimensions, as a sum or a mean of the terms of each."""
    more = _TermFit(fit.reading, x[32:], y[32:], fit.towards)
    factor = more.slope / fit.slope if fit.slope else math.nan
    fits = any(math.isclose(factor, f, rel_tol=1e-3) for f in (1.0, 0.25))
    return more.residual if fits else max(more.residual, 1.0 if more.residual < 1e-3 else 0.0)


def _one_fit(rows: list[list[Tensor]], y: Tensor, towards: float) -> _TermFit:
    """The regression on z²: every Gaussian around zero is a multiple of it, plus a constant."""
    z = torch.stack([row[0].square().sum() for row in rows])
    fit = _TermFit("one", -0.5 * z[:32], y[:32], towards)
    if fit.residual > EXACT:  # the Gaussian may have another mean
        first = torch.stack([row[0].sum() for row in rows])[:32]
        design = torch.stack([z[:32], first, torch.ones(32, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(design, y[:32, None]).solution[:, 0]
        left = float((y[:32] - design @ solution).norm() / (y[:32] - y[:32].mean()).norm())
        if left < EXACT:
            fit.residual, fit.slope = left, float(-2 * solution[0])
            fit.towards = math.copysign(1.0, -float(solution[0]))
            return fit
    fit.residual = max(fit.residual, _averaged(-0.5 * z, y, fit))
    return fit


def _log_std(second: Tensor, reading: str) -> Tensor:
    return {
        "log_std": second,
        "log_var": 0.5 * second,
        "std": second.abs().log(),
        "variance": 0.5 * second.abs().log(),
    }[reading]


def _log_normal(z: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    return -0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mean) * (-log_std).exp()).square()


def _towards(sandbox: Sandbox, term: Callable[..., Any], count: int, dtype: torch.dtype) -> float:
    """1 if the term falls with the distance from the mean, -1 if it rises."""
    change = 0.0
    for seed in range(8):
        given = _inputs(1, 1, count, dtype, 500 + seed)
        mean = given[1] if count == 3 else torch.zeros_like(given[0])
        ends = [
            float(sandbox.ask("term", term, mean + side * distance, *given[1:]).sum())
            for distance in (0.2, 3.0)
            for side in (1, -1)
        ]
        change += ends[0] + ends[1] - ends[2] - ends[3]
    return math.copysign(1.0, change)
