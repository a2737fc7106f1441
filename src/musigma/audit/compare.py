r"""The code's KL against the KL of what is sampled.

`check_kl` sets the code's KL against the KL of what the sampler samples; `on_data` sets the terms
of the loss against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from musigma.audit.case import Case
from musigma.audit.divergence import (
    Divergence,
    Regression,
    formula,
    gaussian_kl,
    read,
    regress,
)  # fmt: skip
from musigma.audit.findings import AuditError
from musigma.audit.layouts import arguments

__all__ = ["check_kl"]

OFF = 0.02  # a residual of the KL, relative to 1 + T, that is a fault
SEEN = 2e-3  # and one that is told

HOW = {
    "log_var": "exp(b/2)",
    "log_std": "exp(b)",
    "std": "b",
    "signed std": "|b|",
    "variance": "sqrt(b)",
    "softplus": "softplus(b)",
    "softplus of variance": "sqrt(softplus(b))",
    "elu+1": "elu(b) + 1",
    "log_precision": "exp(-b/2)",
    "precision": "1 / sqrt(b)",
    "square": "b^2",
    "sigmoid": "sigmoid(b)",
    "unit variance": "1",
}
WORDS = {
    "log_var": "log variance",
    "log_std": "log sigma",
    "std": "sigma",
    "signed std": "sigma of either sign",
    "variance": "variance",
    "unit variance": "nothing: sigma is constant",
}


def check_kl(case: Case, kl: Any, heads: Any) -> None:
    """Set the code's KL against that of what is sampled.

    Args:
        case: What is known so far; the sampler among it.
        kl: ``kl(mean, second[, z])``, or of a packed tensor.
        heads: The encoder's heads for the example, or None.
    """
    if case.packing is not None and arguments(kl) == (2 if case.kl_uses_sample else 1):
        kl = case.packing.packed(kl)

    if case.full:
        _full_divergence(case, kl, heads)
        return
    if case.scan is None:
        return
    if case.swapped and not _kl_swapped(case, kl):
        case.find(
            "sample_mean", "bug", "sample takes its second argument for the mean, the KL the "
            "first", "give sample its arguments in the order (mean, second)",
        )  # fmt: skip
        case.unchecked.append("the KL against what is sampled: the arguments are swapped")
        return
    if case.swapped:
        _compare(case, lambda mean, second, *z: kl(second, mean, *z))
    else:
        _compare(case, kl)


def _kl_swapped(case: Case, kl: Any) -> bool:
    """Whether the KL, too, takes the scale first: then it grows as the square of its second."""
    s = case.measured_sampler
    one = case.guest.given(torch.ones(1, *s.latent))
    z = (0 * one,) if case.kl_uses_sample else ()
    try:
        f = [
            float(case.guest.tensor("kl", case.guest.call("kl", kl, one, t * one, *z)).sum())
            for t in (0.0, 1.0, 2.0, 3.0)
        ]
    except AuditError:
        return False
    even = abs((f[3] - f[2]) - (f[2] - f[1]) - ((f[2] - f[1]) - (f[1] - f[0])))
    return even < 1e-4 * (1 + abs(f[3] - f[2])) and f[3] != f[0]


def _full_divergence(case: Case, kl: Any, heads: Any) -> None:
    s = case.measured_sampler
    mean, second = (t.flatten(1) for t in heads)
    loc, factor, error = case.measured
    at = (mean[0], second[0], loc[0])
    d = Divergence(case.guest, kl, s.latent, s.second, case.kl_uses_sample, case.rows, at)
    means, stds = case.prior
    whitened = factor / stds[:, None]
    log_det = torch.linalg.slogdet(whitened)[1]
    if case.kl_uses_sample:
        z = s.draw(mean, second, 3)
        u = torch.linalg.solve(factor, (z - loc)[..., None])[..., 0]
        v = (z - means) / stds
        t = 0.5 * (v**2).sum(1) - 0.5 * (u**2).sum(1) - log_det
        f = d.at_draws(mean, second, z)
    else:
        v = (loc - means) / stds
        t = 0.5 * ((whitened**2).sum((1, 2)) + (v**2).sum(1) - s.d) - log_det
        f = d.values(mean, second, loc, loc)
    if len(t) < 4:
        case.unchecked.append("the KL: a full covariance needs an example of four rows or more")
        return
    fit = regress(f, t)
    case.kl_slope = fit.slope
    if fit.residual > OFF + 20 * error:
        w = fit.worst
        case.find(
            "kl_mismatch", "bug",
            f"the KL is no multiple of that of what is sampled: {float(f[w]):.5g} where it is "
            f"{float(t[w]):.5g}",
            "use torch.distributions.MultivariateNormal for both, with one scale_tril",
            kl=float(f[w]), expected=float(t[w]), residual=fit.residual,
        )  # fmt: skip
        return
    case.kl_fits, case.read_as = True, "full covariance"
    _slope_and_intercept(case, fit, d, 1e-4 + 10 * error)


LOG_2PI = math.log(2 * math.pi)
S = math.sqrt(3) / math.pi  # of a logistic distribution of unit variance

# Entropy and log-density of noise of unit variance.
DENSITIES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "Laplace": (1 + math.log(2) / 2, lambda e: -math.sqrt(2) * e.abs() - math.log(2) / 2),
    "uniform": (math.log(12) / 2, lambda e: torch.full_like(e, -math.log(12) / 2)),
    "logistic": (
        2 + math.log(S),
        lambda e: -e / S - math.log(S) - 2 * torch.nn.functional.softplus(-e / S),
    ),
}


class _Grid:
    """Heads at which the KL is looked at, one latent moved at a time, and all at random."""

    def __init__(self, case: Case):
        s = case.measured_sampler
        b, sigma = case.scanned
        means, stds = case.prior
        std = float(stds[0])
        far = (sigma.clamp(min=1e-300) / std).log().abs()
        self.base_b = float(b[far <= far.min() + 1e-12][-1])  # the positive one of two
        inside = (b.abs() <= 8) & (sigma > 0.05 * std) & (sigma < 8 * std)
        flat = torch.zeros_like(inside)
        if case.curve.name != "unit variance":
            same = (sigma[1:] / sigma[:-1].clamp(min=1e-300) - 1).abs() < 1e-9
            flat[1:] |= same
            flat[:-1] |= same
        else:
            inside = b.abs() <= 3
        if int((inside & ~flat).sum()) < 3:
            inside = (b.abs() <= 8) & (sigma > 0)
        bs = _spread(b[inside & ~flat], 9)
        clipped = _spread(b[flat & (b.abs() <= 9.5) & (sigma > 0)], 3)
        offsets = torch.tensor([-2.0, -1.0, -0.3, 0.5, 1.5, 3.0], dtype=torch.float64)
        base_b = torch.full((s.e,), self.base_b, dtype=torch.float64)
        self.base = means[None], base_b[None]
        rows: list[tuple[Tensor, Tensor, bool]] = []

        def add(i: int, offset: float, value: float, held: bool) -> None:
            m, v = means.clone(), base_b.clone()
            m[i] += offset * stds[i]
            v[i if s.e == s.d else 0] = value
            rows.append((m, v, held))

        for value in bs.tolist():
            for offset in offsets.tolist():
                add(0, offset, value, True)
        self.single = len(rows)
        for value in bs.tolist()[::3]:
            for offset in (-1.0, 0.7):
                add(s.d - 1, offset, value, True)
        generator = torch.Generator().manual_seed(9)
        for _ in range(10):
            which = torch.randint(len(bs), (s.e,), generator=generator)
            m = torch.randn(s.d, generator=generator, dtype=torch.float64)
            rows.append((means + m * stds, bs[which], True))
        for value in clipped.tolist():
            for offset in (0.0, 1.0):
                add(0, offset, value, False)
        self.mean = torch.stack([row[0] for row in rows])
        self.second = torch.stack([row[1] for row in rows])
        self.inside = torch.tensor([row[2] for row in rows])


def _spread(values: Tensor, count: int) -> Tensor:
    if len(values) <= count:
        return values
    return values[torch.linspace(0, len(values) - 1, count).round().long()]


def _compare(case: Case, kl: Callable[..., Any]) -> None:
    """Regress the code's KL on that of what is sampled, and say which KL it is."""
    s = case.measured_sampler
    grid = _Grid(case)
    mean, second = grid.mean, grid.second
    loc, sigma = _sampled(case, mean, second)
    w = int(second.amin(1).argmax())
    at = (mean[w], second[w], loc[w])
    d = Divergence(case.guest, kl, s.latent, s.second, case.kl_uses_sample, case.rows, at)
    case.details["kl_returns"] = d.kind
    f = _values(d, mean, second, loc, sigma)
    t = gaussian_kl(loc, sigma, case.prior)
    usable = f.isfinite() & t.isfinite()
    if not bool(usable.all()):
        if not _not_finite(case, second, f, t, usable):
            return
        grid.inside = grid.inside[usable]
        grid.single = int(usable[: grid.single].sum())
        mean, second, loc, sigma, f, t = (v[usable] for v in (mean, second, loc, sigma, f, t))
    grid.mean, grid.second = mean, second
    if d.by_chance:
        case.assumed.append("the KL is estimated from draws of its own, and was averaged")
    chance = 8 * d.error
    keep = grid.inside
    if float(t[keep].max() - t[keep].min()) < 1e-9:
        case.unchecked.append("the KL: what is sampled does not move with the heads")
        return
    fit = regress(f[keep], t[keep])
    if d.copies > 1 and abs(fit.slope / d.copies - 1) < 1e-3:
        f = f / d.copies
        fit = regress(f[keep], t[keep])
    case.kl_slope = fit.slope
    slack = chance / max(abs(fit.slope), 1e-300)
    tight = max(1e-5, 50 * d.rounding, 200 * s.rounding, 1.5 * s.scale_error) + slack
    tight += 0.05 if s.mode == "moments" and case.curve.sigma is None else 0.0
    case.details["kl"] = {
        "slope": fit.slope, "intercept": fit.intercept, "residual": fit.residual,
    }  # fmt: skip
    if fit.residual <= max(OFF, tight) and fit.slope != 0:
        _fits(case, grid, d, f, t, fit, tight)
    else:
        _mismatch(case, grid, d, f, t, loc, sigma, fit, max(tight, 1e-4))
    if not any(line.startswith("the KL is that of") for line in case.checked):
        _negative(case, grid, f, tight)
    if not case.kl_fits or fit.slope < 0:
        _minimum(case, d, f)
    w = int(f.abs().argmax())
    _growth(case, d, (grid.mean[w], grid.second[w], loc[w]))


def _values(d: Divergence, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor) -> Tensor:
    """F at points; NaN at second outputs below zero, if there it raises."""
    try:
        return d.values(mean, second, loc, sigma)
    except AuditError:
        positive = second.amin(1) > 0
        if bool(positive.all()) or not bool(positive.any()):
            raise
        f = torch.full((len(mean),), math.nan, dtype=torch.float64)
        f[positive] = d.values(*(v[positive] for v in (mean, second, loc, sigma)))
        return f


def _sampled(case: Case, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Location and sigma at points: measured, or by the named curve where that is exact."""
    s = case.measured_sampler
    even = "sigma_by_latent" not in case.details
    if s.mode != "known" and case.curve.sigma is not None and even:
        sigma = case.curve.sigma(second).abs().expand_as(mean)
        if "sample_mean" not in case.findings:
            return mean, sigma
        return s.measure(mean, second)[0], sigma
    loc, sigma, _ = s.measure(mean, second)
    return loc, sigma.abs()


def _not_finite(case: Case, second: Tensor, f: Tensor, t: Tensor, usable: Tensor) -> bool:
    """Say what is not finite; whether enough is left to go on with."""
    bad = ~f.isfinite() & t.isfinite()
    if bool(bad.any()):
        negative = bool((second[bad].amin(1) < 0).all()) and bool((second[usable] >= 0).all())
        if (
            negative
            and bool(usable.any())
            and case.convention in ("signed std", "std", "abs of variance")
        ):
            if case.convention == "signed std":
                case.convention = "std"
                case.details["convention"]["name"] = "std"
            if case.heads is not None and bool((case.heads[1] < 0).any()):
                case.find(
                    "not_finite", "bug", "the KL is not finite where the second output is "
                    "negative, as the encoder's is", "let the encoder end in exp or softplus",
                    smallest_second=float(case.heads[1].min()),
                )  # fmt: skip
            else:
                case.assumed.append(
                    "the second output is positive: the KL is not finite below zero"
                )
        else:
            i = int(bad.int().argmax())
            case.find(
                "not_finite", "bug", "the KL is NaN or infinite where what is sampled is not",
                "look at the logarithm and the exponential in the KL",
                second=float(second[i][0]), share=float(bad.double().mean()),
            )  # fmt: skip
    if int(usable.sum()) < 12:
        case.unchecked.append("the KL: it is finite at too few points")
        return False
    return True


def _fits(
    case: Case, grid: _Grid, d: Divergence, f: Tensor, t: Tensor, fit: Regression, tight: float
) -> None:
    case.kl_fits = True
    case.read_as = case.convention
    case.checked.append(
        f"KL = {fit.slope:.6g} T + {fit.intercept:.3g}, with T that of what is sampled: residual "
        f"{fit.residual:.1e} over {int(grid.inside.sum())} points"
    )
    if fit.residual > max(SEEN, tight):
        keep = grid.inside.nonzero().flatten()
        w = int(keep[fit.worst])
        case.find(
            "kl_mismatch", "warning",
            f"the KL is nearly that of what is sampled: {float(f[w]):.5g} where it is "
            f"{float(t[w]):.5g}; a floor or an epsilon stands in one and not in the other",
            "let sampler and KL compute sigma in one place", kl=float(f[w]), expected=float(t[w]),
            residual=fit.residual,
        )  # fmt: skip
    outside = ~grid.inside
    if bool(outside.any()):
        off = ((f - fit.slope * t - fit.intercept) / (abs(fit.slope) * (1 + t)))[outside].abs()
        if float(off.max()) > max(OFF, tight):
            case.find(
                "kl_mismatch", "warning",
                "where the sampler clamps the second output, the KL does not",
                "clamp once, before both", residual=float(off.max()),
                raw_bounds=list(case.curve.raw_bounds),
            )  # fmt: skip
    if not _of_other_noise(case, grid, d, fit):
        _slope_and_intercept(case, fit, d, tight)


def _of_other_noise(case: Case, grid: _Grid, d: Divergence, fit: Regression) -> bool:
    """Whether the noise is not normal, and the KL is that of the noise that it is."""
    family = case.details.get("noise", {}).get("family")
    if family not in DENSITIES or case.full:
        return False
    entropy, log_density = DENSITIES[family]
    if case.kl_uses_sample:
        keep = grid.inside
        mean, second = grid.mean[keep], grid.second[keep]
        loc, sigma = _sampled(case, mean, second)
        z = case.measured_sampler.draw(mean, second, 21)
        means, stds = case.prior
        log_q = (log_density((z - loc) / sigma) - sigma.log()).sum(1)
        log_p = (-0.5 * ((z - means) / stds) ** 2 - stds.log() - LOG_2PI / 2).sum(1)
        mine = regress(d.at_draws(mean, second, z), log_q - log_p)
        right = mine.residual < 0.1 and abs(mine.slope - 1) < 0.05
    else:
        more = case.measured_sampler.d * ((LOG_2PI + 1) / 2 - entropy)
        right = abs(fit.slope - 1) < 0.05 and abs(fit.intercept - more) < 0.2 * more
    if not right:
        return False
    for code in case.findings.keys() & {"noise_not_gaussian", "sample_scale"}:
        case.findings[code] = replace(case.findings[code], severity="warning")
    case.checked.append(f"the KL is that of {family} noise")
    return True


def _slope_and_intercept(case: Case, fit: Regression, d: Divergence, tight: float = 1e-4) -> None:
    """Findings of a KL that is right but for a factor or a constant."""
    level = max(1e-3, 3 * tight)
    if fit.slope < 0:
        case.find(
            "kl_scale", "bug", f"the KL has the wrong sign: it is {fit.slope:.4g} times the KL",
            "negate it", slope=fit.slope,
        )  # fmt: skip
    elif abs(fit.slope - 1) > level:
        latents = case.measured_sampler.d
        mean = latents > 1 and abs(fit.slope * latents - 1) < 1e-3
        case.find(
            "kl_scale", "warning",
            f"the KL is {fit.slope:.6g} times the KL"
            + (f": a mean over {latents} latents in place of the sum" if mean else ""),
            "sum over the latents" if mean else (
                "the factor 1/2 is missing" if abs(fit.slope - 2) < 1e-3
                else f"divide it by {fit.slope:.6g}, or say that this weight is meant"),
            slope=fit.slope,
        )  # fmt: skip
    if abs(fit.intercept) > level * max(abs(fit.slope), 1e-12) and not d.by_chance:
        case.find(
            "kl_offset", "warning",
            f"the KL is too {'large' if fit.intercept > 0 else 'small'} by the constant "
            f"{abs(fit.intercept):.5g}: its gradients are right, its value is not",
            "put the constant back: 0.5 (m^2 + sigma^2 - 1) - log sigma, summed over the latents",
            intercept=fit.intercept, per_latent=fit.intercept / case.measured_sampler.d,
        )  # fmt: skip


def _mismatch(
    case: Case, grid: _Grid, d: Divergence, f: Tensor, t: Tensor, loc: Tensor, sigma: Tensor,
    fit: Regression, tight: float,
) -> None:  # fmt: skip
    keep = grid.inside
    if _free_bits(case, f[: grid.single], t[: grid.single], tight):
        return
    mean, second = grid.mean[keep], grid.second[keep]
    wide = second.expand(-1, mean.shape[1])
    readings = read(
        f[keep], mean, wide, loc[keep], sigma[keep], case.prior, case.kl_uses_sample, tight
    )
    one = slice(0, grid.single)
    written, others = None, 0.0
    if not d.by_chance:
        at = grid.base
        still = float(_values(d, *at, *_sampled(case, *at))[0])
        others = still * (1 - 1 / mean.shape[1]) if math.isfinite(still) else 0.0
        written = formula(f[one] - others, grid.mean[one, 0], grid.second[one, 0])
    w = int((((f - t) / (1 + t)).abs() * keep)[one].argmax())
    numbers: dict[str, Any] = {
        "mean": float(grid.mean[w, 0]), "second": float(grid.second[w, 0]),
        "sampled_sigma": float(sigma[w, 0]), "kl": float(f[w]), "expected": float(t[w]),
        "residual": fit.residual, "formula": written,
    }  # fmt: skip
    name = case.convention
    own = HOW.get(name or "", f"the sampler's sigma ({case.curve.text})")
    if case.curve.noise_scale != 1 or case.curve.floor or case.curve.more:
        own = f"the sampler's sigma ({case.curve.text})"
    message = (
        f"the KL is not that of what is sampled: at mean {numbers['mean']:.3g} and second output "
        f"{numbers['second']:.3g} it is {numbers['kl']:.5g}, and should be "
        f"{numbers['expected']:.5g}"
    )
    repair = f"KL = 0.5 (m^2 + s^2 - 1) - log s with s = {own}, summed over the latents"
    severity, curve = "bug", case.curve
    small = curve.floor < 0.1 * float(case.prior[1].min()) and not curve.more
    small = small and (curve.floor > 0 or curve.bounds != (None, None))
    if readings:
        other, its = readings[0]
        if {other, name} == {"std", "signed std"}:
            other = name or other
        case.read_as = other
        case.kl_slope = its.slope
        if other == name and case.curve.noise_scale != 1:
            k = case.curve.noise_scale
            message += f": the KL leaves the noise's scale {k:.4g} out"
            repair = f"draw eps with standard deviation 1 in the sampler, or use s = {own} in KL"
        elif other == name and its.slope > 0 and small:
            severity = "warning"
            message += f": the KL leaves the sampler's floor or bounds out ({case.curve.text})"
            repair = "let sampler and KL compute sigma in one place"
        else:
            message += (
                f": the sampler treats the second output b as "
                f"{curve.text if other == name else _words(name)}, the KL as {_words(other)}"
            )
            repair = _both(name, other, own)
        if its.slope < 0:
            message += f", and with the wrong sign (factor {its.slope:.4g})"
        numbers |= {"read_as": other, "slope": its.slope, "intercept": its.intercept}
    else:
        case.read_as = "none"
        swapped = _reversed(f[keep], loc[keep], sigma[keep], case.prior, tight)
        if swapped:
            message += ": it is the KL of the prior from the posterior, reversed"
        other = _other_prior(
            f[one] - others, grid.mean[one, 0], grid.second[one], loc[one], sigma[one], tight
        )
        if other:
            case.read_as = name
            message += f": it is the KL to N({other[0]:.4g}, {other[1]:.4g}^2), not to the prior"
            repair = "put the prior's mean and standard deviation into the KL"
            numbers |= {"prior_mean_of_kl": other[0], "prior_std_of_kl": other[1]}
        if written:
            message += f"; the code computes {written} for one latent"
    case.find("kl_mismatch", severity, message, repair, **numbers)


def _other_prior(
    f: Tensor, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor, tight: float
) -> tuple[float, float] | None:
    """Mean and standard deviation of the normal that F of one latent is the KL to."""
    same = (second[:, 0] == second[0, 0]).nonzero().flatten()
    if len(same) < 3:
        return None
    design = torch.stack([mean[same] ** 2, mean[same], torch.ones(len(same))], 1).double()
    a, b, _ = torch.linalg.lstsq(design, f[same, None]).solution[:, 0].tolist()
    if a <= 0:
        return None
    its = round(-b / (2 * a), 9) + 0.0, 1 / math.sqrt(2 * a)
    prior = torch.tensor([its[0]]).double(), torch.tensor([its[1]]).double()
    fit = regress(f, gaussian_kl(loc[:, :1], sigma[:, :1], prior))
    exact = fit.residual < tight and abs(fit.slope - 1) < 1e-3 and abs(fit.intercept) < 1e-2
    return its if exact else None


def _words(name: str | None) -> str:
    return WORDS.get(name or "", name or "something else")


def _both(sampled: str | None, read_as: str, own: str) -> str:
    """The repair of two readings of one tensor."""
    if (sampled, read_as) == ("log_std", "log_var"):
        return (
            "the sampler treats the second output as log sigma, the KL as log variance: replace "
            "exp(b) by exp(2 b) and b by 2 b in the KL, or exp(b) by exp(b/2) in the sampler"
        )
    if (sampled, read_as) == ("log_var", "log_std"):
        return (
            "the sampler treats the second output as log variance, the KL as log sigma: replace "
            "exp(2 b) by exp(b) and 2 b by b in the KL, or exp(b/2) by exp(b) in the sampler"
        )
    theirs = HOW.get(read_as, read_as)
    return (
        f"the sampler computes sigma = {own}, the KL takes sigma = {theirs}: use s = {own} in the "
        f"KL, or s = {theirs} in the sampler"
    )


def _reversed(
    f: Tensor, loc: Tensor, sigma: Tensor, prior: tuple[Tensor, Tensor], tight: float
) -> bool:
    mean, std = prior
    t = (sigma / std).log() + (std**2 + (loc - mean) ** 2) / (2 * sigma**2) - 0.5
    return regress(f, t.sum(-1)).residual < tight


def _free_bits(case: Case, f: Tensor, t: Tensor, tight: float) -> bool:
    """Whether each latent's KL is held above a number, and right above it."""
    above = f > f.min() + 1e-6 * (1 + f.abs().max())
    if not 12 <= int(above.sum()) <= len(f) - 2:
        return False
    fit = regress(f[above], t[above])
    if fit.residual > tight or float(t[~above].max()) > float(t[above].min()) + 1e-6:
        return False
    case.kl_fits, case.read_as, case.kl_slope = True, case.convention, fit.slope
    case.find(
        "kl_mismatch", "warning",
        f"the KL is held at {float(f.min()):.5g} where it is smaller (free bits); right above",
        "report the true KL beside it", held_at=float(f.min()),
    )  # fmt: skip
    return True


def _negative(case: Case, grid: _Grid, f: Tensor, tight: float) -> None:
    """The smallest value of the KL on the grid, if it is below zero."""
    w = int(f.argmin())
    smallest = float(f[w])
    if smallest < -max(1e-6, tight) * (1 + float(f.abs().median())):
        harmless = case.kl_fits and case.kl_slope > 0
        case.find(
            "kl_negative", "warning" if harmless else "bug",
            f"the KL is {smallest:.5g} at mean {float(grid.mean[w, 0]):.3g} and second output "
            f"{float(grid.second[w, 0]):.3g}; a KL is never negative",
            "negate it" if case.kl_slope < 0 else
            "0.5 (m^2 + sigma^2 - 1) - log sigma: look at the signs and the constant",
            kl=smallest, mean=float(grid.mean[w, 0]), second=float(grid.second[w, 0]),
        )  # fmt: skip


def _minimum(case: Case, d: Divergence, f: Tensor) -> None:
    """Where the KL of one latent is smallest, against the prior."""
    if d.by_chance or case.curve.name == "unit variance":
        return
    s = case.measured_sampler
    means, stds = case.prior
    b, sigma = case.scanned
    std = float(stds[0])
    usable = (b.abs() <= 16) & (sigma > 1e-4 * std) & (sigma < 1e4 * std)
    b, sigma = b[usable], sigma[usable]
    if len(b) < 5 or float(sigma.min()) > std or float(sigma.max()) < std:
        return
    at_prior = _crossing(case, b, sigma, std)
    if at_prior is None:
        return

    def along(values: Tensor, offsets: Tensor) -> Tensor:
        m = means.expand(len(values), -1).clone()
        v = torch.full((len(values), s.e), at_prior, dtype=torch.float64)
        m[:, 0] += offsets
        v[:, 0] = values
        loc, scale = _sampled(case, m, v)
        return d.values(m, v, loc, scale)

    def smallest(low: float, high: float) -> float:
        inner = torch.linspace(low, high, 15, dtype=torch.float64)
        for _ in range(3):
            values = along(inner, torch.zeros(15, dtype=torch.float64))
            values = torch.where(values.isfinite(), values, math.inf)
            i = int(values.argmin())
            inner = torch.linspace(
                float(inner[max(0, i - 1)]), float(inner[min(14, i + 1)]), 15, dtype=torch.float64
            )
        return float(inner[7])

    values = along(b, torch.zeros_like(b))
    values = torch.where(values.isfinite(), values, math.inf)
    i = int(values.argmin())
    best = smallest(float(b[max(0, i - 1)]), float(b[min(len(b) - 1, i + 1)]))
    pair = along(torch.tensor([at_prior, best], dtype=torch.float64), torch.zeros(2).double())
    gap = float(pair[0] - pair[1])
    m = means[None].clone()
    v = torch.full((1, s.e), at_prior, dtype=torch.float64)
    v[0, 0] = best
    found = float(_sampled(case, m, v)[1][0, 0])
    scale = max(abs(case.kl_slope), 1e-6) if math.isfinite(case.kl_slope) else 1.0
    if gap > 1e-3 * min(1.0, scale) and abs(math.log(max(found, 1e-300) / std)) > 0.03:
        case.find(
            "kl_min_off_prior", "bug",
            f"the KL is smallest where the sampled standard deviation is {found:.4g}; the prior's "
            f"is {std:.4g}",
            "0.5 (m^2 + s^2 - 1) - log s is smallest at s = 1: look at each factor",
            sigma_at_smallest=found, prior_std=std, second=best, gap=gap,
        )  # fmt: skip
        return
    offsets = torch.linspace(-3, 3, 31, dtype=torch.float64) * std
    values = along(torch.full((31,), at_prior, dtype=torch.float64), offsets)
    i = int(values.argmin())
    if float(values[15] - values[i]) > 1e-3 * min(1.0, scale):
        case.find(
            "kl_min_off_prior", "bug",
            f"the KL is smallest at mean {float(means[0] + offsets[i]):.4g}; the prior's is "
            f"{float(means[0]):.4g}",
            "take the prior's mean from the posterior's in the KL",
            mean_at_smallest=float(means[0] + offsets[i]), prior_mean=float(means[0]),
        )  # fmt: skip


def _crossing(case: Case, b: Tensor, sigma: Tensor, std: float) -> float | None:
    """A b at which the sampled sigma is the prior's."""
    crossed = ((sigma[1:] - std) * (sigma[:-1] - std) <= 0).nonzero()
    if not len(crossed):
        return None
    i = int(crossed[-1])
    share = math.log(std / float(sigma[i])) / max(
        1e-300, abs(math.log(float(sigma[i + 1] / sigma[i])))
    )
    if case.curve.sigma is None:
        return float(b[i] + abs(share) * (b[i + 1] - b[i]))
    fine = torch.linspace(float(b[i]), float(b[i + 1]), 2001, dtype=torch.float64)
    return float(fine[int((case.curve.sigma(fine) / std).log().abs().argmin())])


def _growth(case: Case, d: Divergence, at: tuple[Tensor, Tensor, Tensor]) -> None:
    """How a scalar KL grows with the batch: as a sum or a mean of examples, or not."""
    growth = d.growth(*at)
    case.kl_growth = growth
    case.kl_halved = d.by_latents(*at) if growth is not None or d.copies == 1 else None
    if not growth:
        return
    sums = all(abs(ratio / n - 1) < 1e-3 for n, ratio in growth.items())
    means = all(abs(ratio - 1) < 1e-3 for ratio in growth.values())
    case.details["kl_over_batch"] = "sum" if sums else "mean" if means else "neither"
    if not sums and not means and case.kl_fits:
        case.find(
            "reduction_imbalance", "bug",
            f"of 8 identical examples the KL is {growth[8]:.4g} times that of one: neither a sum "
            "(8) nor a mean (1)", "sum over the latents, and take the mean over the batch once",
            growth=growth[8], examples=8,
        )  # fmt: skip
