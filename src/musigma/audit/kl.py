"""The code's KL against the KL of what is sampled, by regression over a grid of head values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from musigma.audit.divergence import Divergence, Regression, formula, gaussian_kl, regress
from musigma.audit.findings import AuditError
from musigma.audit.scales import READINGS, Reading, crossings
from musigma.audit.vae_state import FullPosterior, Heads, Posterior, VAEAudit

__all__ = ["check_full_kl", "check_kl"]

OFF = 0.02  # residual of the KL, relative to 1 + T, from which it is a bug
SEEN = 2e-3  # residual from which it is a warning
UNFITTED = Regression(math.nan, math.nan, math.inf, 0)


@dataclass
class Comparison:
    """The code's KL F and that of what is sampled, T, at heads (P, D) and (P, E).

    At the first `single` points one latent differs from `base`, where the posterior is nearest to
    the prior; `inside` are points at which sigma is not clamped. Residuals below `tight` are
    rounding or chance.
    """

    divergence: Divergence
    base: Heads
    mean: Tensor
    second: Tensor
    loc: Tensor
    sigma: Tensor
    f: Tensor
    t: Tensor
    inside: Tensor
    single: int
    tight: float = 0.0
    fit: Regression = UNFITTED

    def keep(self, usable: Tensor) -> None:
        """Drop the other points."""
        self.single = int(usable[: self.single].sum())
        for name in ("mean", "second", "loc", "sigma", "f", "t", "inside"):
            setattr(self, name, getattr(self, name)[usable])

    def place(self, i: int) -> str:
        """The position of a point, in words."""
        mean, second = float(self.mean[i, 0]), float(self.second[i, 0])
        return f"at mean {mean:.3g} and second output {second:.3g}"


def check_full_kl(audit: VAEAudit, q: FullPosterior) -> None:
    """The comparison where the second output holds a matrix, at the encoder's heads."""
    s, (means, stds) = q.sampler, audit.prior
    mean, second = (t.flatten(1) for t in q.heads)
    at = (mean[0], second[0], q.loc[0])
    d = Divergence(audit.functions["kl"], s, audit.kl_uses_sample, audit.rows, at)
    whitened = q.factor / stds[:, None]
    z = s.draw(mean, second, 3) if audit.kl_uses_sample else q.loc
    u = torch.linalg.solve(q.factor, (z - q.loc)[..., None])[..., 0]
    v = (z - means) / stds
    trace = 0.0 if audit.kl_uses_sample else (whitened**2).sum((1, 2)) - s.d
    t = 0.5 * ((v**2).sum(1) - (u**2).sum(1) + trace) - torch.linalg.slogdet(whitened)[1]
    f = d.at_draws(mean, second, z) if audit.kl_uses_sample else d.values(mean, second, z, z)
    if len(t) < 4:
        audit.unchecked.append("the KL: a full covariance needs an example of four rows or more")
        return
    fit = regress(f, t)
    audit.kl_slope = fit.slope
    if fit.residual > OFF + 20 * q.error:
        w = fit.worst
        audit.bug(
            "kl_mismatch",
            "the KL is not a multiple of the KL of what is sampled: "
            f"{f[w]:.5g} instead of {t[w]:.5g}",
            "use torch.distributions.MultivariateNormal for both, with one scale_tril",
            kl=f[w],
            expected=t[w],
            residual=fit.residual,
        )
        return
    audit.kl_fits, audit.read_as = True, "full covariance"
    _slope_and_intercept(audit, fit, d, 1e-4 + 10 * q.error)


def check_kl(audit: VAEAudit, q: Posterior) -> None:
    """Compare the code's KL with that of what is sampled, and report which KL it is."""
    s, kl = q.sampler, audit.functions["kl"]
    if audit.swapped and not _is_square_of_mean(audit, q, kl):
        audit.bug(
            "sample_mean",
            "sample takes its second argument as the mean, the KL its first",
            "give sample its arguments in the order (mean, second)",
        )
        audit.unchecked.append("the KL against what is sampled: the arguments are swapped")
        return
    c = _comparison(audit, q, kl)
    d = c.divergence
    audit.details["kl_returns"] = d.kind
    usable = c.f.isfinite() & c.t.isfinite()
    if not usable.all():
        _not_finite(audit, c, usable)
        if int(usable.sum()) < 12:
            audit.unchecked.append("the KL: it is finite at too few points")
            return
        c.keep(usable)
    if d.by_chance:
        audit.assumed.append("the KL is an estimate from its own draws, and was averaged")
    t = c.t[c.inside]
    if float(t.max() - t.min()) < 1e-9:
        audit.unchecked.append("the KL: what is sampled does not depend on the heads")
        return
    c.fit = regress(c.f[c.inside], t)
    if d.copies > 1 and abs(c.fit.slope / d.copies - 1) < 1e-3:
        c.f = c.f / d.copies
        c.fit = regress(c.f[c.inside], t)
    slope, intercept, residual, _ = c.fit
    audit.kl_slope = slope
    slack = 8 * d.error / max(abs(slope), 1e-300)
    c.tight = max(1e-5, 50 * d.rounding, 200 * s.rounding, 1.5 * s.scale_error) + slack
    c.tight += 0.05 if s.mode == "moments" and not q.curve.named else 0.0
    audit.details["kl"] = {"slope": slope, "intercept": intercept, "residual": residual}
    other_noise = False
    if residual <= max(OFF, c.tight) and slope != 0:
        other_noise = _check_fit(audit, q, c)
    elif not _free_bits(audit, c):
        _mismatch(audit, q, c)
    if not other_noise:
        _check_sign(audit, c)
    if not audit.kl_fits or slope < 0:
        _check_minimum(audit, q, c)
    _check_growth(audit, c)


def _is_square_of_mean(audit: VAEAudit, q: Posterior, kl: Callable[..., Any]) -> bool:
    """Whether the KL grows as the square of its mean, as it does if it takes the scale first."""
    one = audit.sandbox.to_input(torch.ones(1, *q.sampler.latent))
    z = (0 * one,) if audit.kl_uses_sample else ()
    try:
        f = [float(audit.sandbox.ask("kl", kl, m * one, one, *z).sum()) for m in range(4)]
    except AuditError:
        return False
    third = f[3] - 3 * f[2] + 3 * f[1] - f[0]
    return abs(third) < 1e-4 * (1 + abs(f[3] - f[2])) and f[3] != f[0]


def _comparison(audit: VAEAudit, q: Posterior, kl: Callable[..., Any]) -> Comparison:
    """Both KLs, with one latent moved at a time, and all at random."""
    s, (means, stds), b = q.sampler, audit.prior, q.b
    std = float(stds[0])
    far = (q.sigma.clamp(min=1e-300) / std).log().abs()
    base = b[far <= far.min() + 1e-12][-1].expand(s.e)  # the positive one of two
    inside = (b.abs() <= 8) & (q.sigma > 0.05 * std) & (q.sigma < 8 * std)
    flat = torch.zeros_like(inside)
    if q.curve.name == "unit variance":
        inside = b.abs() <= 3
    else:
        same = (q.sigma[1:] / q.sigma[:-1].clamp(min=1e-300) - 1).abs() < 1e-9
        flat[1:] |= same
        flat[:-1] |= same
    if int((inside & ~flat).sum()) < 3:
        inside = (b.abs() <= 8) & (q.sigma > 0)
    values = _spread(b[inside & ~flat], 9)

    def rows(latent: int, values: Tensor, offsets: list[float]) -> Heads:
        value, offset = torch.cartesian_prod(values, values.new_tensor(offsets)).T
        mean, second = means.repeat(len(value), 1), base.repeat(len(value), 1)
        mean[:, latent] += offset * stds[latent]
        second[:, latent if s.e == s.d else 0] = value
        return mean, second

    generator = torch.Generator().manual_seed(9)
    which = torch.randint(len(values), (10, s.e), generator=generator)
    random = means + stds * torch.randn(10, s.d, generator=generator, dtype=torch.float64)
    one = rows(0, values, [-2.0, -1.0, -0.3, 0.5, 1.5, 3.0])
    clamped = rows(0, _spread(b[flat & (b.abs() <= 9.5) & (q.sigma > 0)], 3), [0.0, 1.0])
    groups = one, rows(s.d - 1, values[::3], [-1.0, 0.7]), (random, values[which]), clamped
    mean, second = (torch.cat(heads) for heads in zip(*groups, strict=True))
    loc, sigma = q.at(mean, second)
    w = int(second.amin(1).argmax())
    d = Divergence(kl, s, audit.kl_uses_sample, audit.rows, (mean[w], second[w], loc[w]))
    return Comparison(
        d,
        (means[None], base[None]),
        mean,
        second,
        loc,
        sigma,
        d.values(mean, second, loc, sigma),
        gaussian_kl(loc, sigma, audit.prior),
        torch.arange(len(mean)) < len(mean) - len(clamped[0]),
        len(one[0]),
    )


def _spread(values: Tensor, count: int) -> Tensor:
    n = len(values)
    return values[torch.linspace(0, n - 1, min(n, count)).round().long()]


def _not_finite(audit: VAEAudit, c: Comparison, usable: Tensor) -> None:
    """Report where the KL is not finite, but what is sampled is."""
    bad = ~c.f.isfinite() & c.t.isfinite()
    if not bad.any():
        return
    negative = bool((c.second[bad].amin(1) < 0).all()) and bool((c.second[usable] >= 0).all())
    signed = audit.convention in ("signed std", "std", "abs of variance")
    if not (negative and signed and usable.any()):
        i = int(bad.int().argmax())
        audit.bug(
            "not_finite",
            "the KL is NaN or infinite where what is sampled is not",
            "check the logarithm and the exponential in the KL",
            second=c.second[i][0],
            share=bad.double().mean(),
        )
        return
    if audit.convention == "signed std":
        audit.convention = audit.details["convention"]["name"] = "std"
    if audit.heads is not None and (audit.heads[1] < 0).any():
        audit.bug(
            "not_finite",
            "the KL is not finite where the second output is negative, as the encoder's output is",
            "make the encoder end in exp or softplus",
            smallest_second=audit.heads[1].min(),
        )
    else:
        audit.assumed.append("the second output is positive: the KL is not finite below zero")


# --- a KL that fits -----------------------------------------------------------------------------


def _check_fit(audit: VAEAudit, q: Posterior, c: Comparison) -> bool:
    """Report what is left of a KL that fits; whether it is that of other noise."""
    slope, intercept, residual, worst = c.fit
    audit.kl_fits, audit.read_as = True, audit.convention
    audit.checked.append(
        f"KL = {slope:.6g} T + {intercept:.3g}, with T that of what is sampled: residual "
        f"{residual:.1e} over {int(c.inside.sum())} points"
    )
    if residual > max(SEEN, c.tight):
        w = int(c.inside.nonzero()[worst])
        audit.warn(
            "kl_mismatch",
            "the KL is nearly that of what is sampled: "
            f"{c.f[w]:.5g} instead of {c.t[w]:.5g}; only one of the two has a floor",
            "compute sigma for sampler and KL in one place",
            kl=c.f[w],
            expected=c.t[w],
            residual=residual,
        )
    off = ((c.f - slope * c.t - intercept) / (abs(slope) * (1 + c.t))).abs() * ~c.inside
    if off.max() > max(OFF, c.tight):
        audit.warn(
            "kl_mismatch",
            "where the sampler clamps the second output, the KL does not",
            "clamp once, before both",
            residual=off.max(),
            raw_bounds=list(q.curve.raw_bounds),
        )
    if _of_other_noise(audit, q, c):
        return True
    _slope_and_intercept(audit, c.fit, c.divergence, c.tight)
    return False


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


def _of_other_noise(audit: VAEAudit, q: Posterior, c: Comparison) -> bool:
    """Whether the noise is not normal, and the KL is that of the noise that it is."""
    family = audit.details.get("noise", {}).get("family")
    if family not in DENSITIES:
        return False
    entropy, log_density = DENSITIES[family]
    if audit.kl_uses_sample:
        mean, second, loc, sigma = (v[c.inside] for v in (c.mean, c.second, c.loc, c.sigma))
        z = q.sampler.draw(mean, second, 21)
        means, stds = audit.prior
        log_q = (log_density((z - loc) / sigma) - sigma.log()).sum(1)
        log_p = torch.distributions.Normal(means, stds).log_prob(z).sum(1)
        fit = regress(c.divergence.at_draws(mean, second, z), log_q - log_p)
        right = fit.residual < 0.1 and abs(fit.slope - 1) < 0.05
    else:
        more = q.sampler.d * ((LOG_2PI + 1) / 2 - entropy)
        right = abs(c.fit.slope - 1) < 0.05 and abs(c.fit.intercept - more) < 0.2 * more
    if right:
        for code in audit.findings.keys() & {"noise_not_gaussian", "sample_scale"}:
            audit.findings[code] = replace(audit.findings[code], severity="warning")
        audit.checked.append(f"the KL is that of {family} noise")
    return right


def _slope_and_intercept(audit: VAEAudit, fit: Regression, d: Divergence, tight: float) -> None:
    """Report a KL that is right up to a factor or a constant."""
    level, latents = max(1e-3, 3 * tight), d.sampler.d
    if fit.slope < 0:
        audit.bug(
            "kl_scale",
            f"the KL has the wrong sign: it is {fit.slope:.4g} times the KL",
            "negate it",
            slope=fit.slope,
        )
    elif abs(fit.slope - 1) > level:
        text = f"the KL is {fit.slope:.6g} times the KL"
        repair = f"divide it by {fit.slope:.6g}, or document that this weight is intended"
        if latents > 1 and abs(fit.slope * latents - 1) < 1e-3:
            text += f": a mean over {latents} latents in place of the sum"
            repair = "sum over the latents"
        elif abs(fit.slope - 2) < 1e-3:
            repair = "the factor 1/2 is missing"
        audit.warn("kl_scale", text, repair, slope=fit.slope)
    if abs(fit.intercept) > level * max(abs(fit.slope), 1e-12) and not d.by_chance:
        audit.warn(
            "kl_offset",
            f"the KL is too {'large' if fit.intercept > 0 else 'small'} by the "
            f"constant {abs(fit.intercept):.5g}: its gradients are right, its value is not",
            "put the constant back: 0.5 (m^2 + sigma^2 - 1) - log sigma, summed over the latents",
            intercept=fit.intercept,
            per_latent=fit.intercept / latents,
        )


# --- a KL of something else ---------------------------------------------------------------------


def _free_bits(audit: VAEAudit, c: Comparison) -> bool:
    """Whether each latent's KL is raised to a number where it is smaller, and else right."""
    f, t = c.f[: c.single], c.t[: c.single]
    above = f > f.min() + 1e-6 * (1 + f.abs().max())
    if not 12 <= int(above.sum()) <= len(f) - 2:
        return False
    fit = regress(f[above], t[above])
    raised_late = float(t[~above].max()) > float(t[above].min()) + 1e-6
    if fit.residual > max(c.tight, 1e-4) or raised_late:
        return False
    audit.kl_fits, audit.read_as, audit.kl_slope = True, audit.convention, fit.slope
    audit.warn(
        "kl_mismatch",
        f"the KL is raised to {f.min():.5g} where it is smaller (free "
        "bits), and right where it is larger",
        "report the true KL beside it",
        held_at=f.min(),
    )
    return True


def _mismatch(audit: VAEAudit, q: Posterior, c: Comparison) -> None:
    """Report which KL it computes instead of the KL of what is sampled."""
    curve, name, k = q.curve, audit.convention or "", q.curve.noise_scale
    tight, one = max(c.tight, 1e-4), slice(0, c.single)
    written, others = None, 0.0
    if not c.divergence.by_chance:
        still = float(c.divergence.values(*c.base, *q.at(*c.base))[0])
        if math.isfinite(still):  # the share of the latents that do not move
            others = still * (1 - 1 / q.sampler.d)
        written = formula(c.f[one] - others, c.mean[one, 0], c.second[one, 0])
    w = int((((c.f - c.t) / (1 + c.t)).abs() * c.inside)[one].argmax())
    numbers: dict[str, Any] = {
        "mean": float(c.mean[w, 0]),
        "second": float(c.second[w, 0]),
        "sampled_sigma": float(c.sigma[w, 0]),
        "kl": float(c.f[w]),
        "expected": float(c.t[w]),
        "residual": c.fit.residual,
        "formula": written,
    }
    plain = name in READINGS and k == 1 and not curve.floor and not curve.more
    sampled = READINGS[name].formula if plain else f"the sampler's sigma ({curve.text})"
    severity = "bug"
    text = (
        f"the KL is not that of what is sampled: {c.place(w)} it is {numbers['kl']:.5g}, and "
        f"should be {numbers['expected']:.5g}"
    )
    repair = f"KL = 0.5 (m^2 + s^2 - 1) - log s with s = {sampled}, summed over the latents"
    if reading := _reading_of(audit, c, tight):
        other, fit = reading
        other = name if {other, name} == {"std", "signed std"} else other
        audit.read_as, audit.kl_slope = other, fit.slope
        small = curve.floor < 0.1 * float(audit.prior[1].min()) and not curve.more
        if other == name and k != 1:
            text += f": the KL ignores the noise's scale {k:.4g}"
            repair = (
                f"draw eps with standard deviation 1 in the sampler, or use s = {sampled} in KL"
            )
        elif other == name and fit.slope > 0 and small and not curve.plain:
            severity = "warning"
            text += f": the KL ignores the sampler's floor or bounds ({curve.text})"
            repair = "compute sigma for sampler and KL in one place"
        else:
            words = curve.text if other == name else _words(name)
            text += (
                f": the sampler treats the second output b as {words}, the KL as {_words(other)}"
            )
            if other != name:
                repair = _repair_of_readings(name, other, sampled)
        if fit.slope < 0:
            text += f", and with the wrong sign (factor {fit.slope:.4g})"
        numbers |= {"read_as": other, "slope": fit.slope, "intercept": fit.intercept}
    else:
        audit.read_as = "none"
        reversed_kl = gaussian_kl(*audit.prior, (c.loc, c.sigma))
        if regress(c.f[c.inside], reversed_kl[c.inside]).residual < tight:
            text += ": it is the reversed KL, of the prior from the posterior"
        if other := _other_prior(c, c.f[one] - others, tight):
            audit.read_as = audit.convention
            text += f": it is the KL to N({other[0]:.4g}, {other[1]:.4g}^2), not to the prior"
            repair = "put the prior's mean and standard deviation into the KL"
            numbers |= {"prior_mean_of_kl": other[0], "prior_std_of_kl": other[1]}
        if written:
            text += f"; for one latent the code computes {written}"
    audit.find("kl_mismatch", severity, text, repair, **numbers)


def _reading_of(audit: VAEAudit, c: Comparison, tight: float) -> tuple[str, Regression] | None:
    """The reading of the second tensor that explains F best, if any does.

    If the KL takes z, F is an average over draws, and so depends on what is sampled as well.
    """
    f, mean, second, loc, sigma = (v[c.inside] for v in (c.f, c.mean, c.second, c.loc, c.sigma))
    prior = audit.prior
    fits = []
    for name, reading in READINGS.items():
        s = reading.sigma(second.expand_as(mean))
        if not (s.isfinite() & (s > 0)).all():
            continue
        if audit.kl_uses_sample:  # E log q of a Gaussian with the reading's sigma, not E log p
            cross = (sigma**2 + (loc - mean) ** 2) / (2 * s**2) + s.log() - 0.5
            t = gaussian_kl(loc, sigma, prior) + (sigma.log() - cross).sum(-1)
        else:
            t = gaussian_kl(mean, s, prior)
        fit = regress(f, t)
        lacks_a_term = name == "unit variance" and abs(fit.intercept) > 1e-3
        if fit.residual <= tight and not lacks_a_term:
            fits.append((name, fit))
    return min(fits, key=lambda e: (abs(e[1].slope - 1) > 1e-3, e[1].residual), default=None)


def _words(name: str) -> str:
    return (READINGS[name].words if name in READINGS else "") or name or "something else"


def _repair_of_readings(name: str, other: str, sampled: str) -> str:
    """The repair where sampler and KL read one tensor differently."""
    unknown = Reading(torch.clone, other)
    a, b = READINGS.get(name, unknown), READINGS.get(other, unknown)
    if a.variance and b.variance:
        return (
            f"the sampler treats the second output as {a.words}, the KL as {b.words}: replace "
            f"{b.variance} by {a.variance} and {b.log_variance} by {a.log_variance} in the KL, or "
            f"{a.formula} by {b.formula} in the sampler"
        )
    return (
        f"the sampler computes sigma = {sampled}, the KL takes sigma = {b.formula}: use s = "
        f"{sampled} in the KL, or s = {b.formula} in the sampler"
    )


def _other_prior(c: Comparison, f: Tensor, tight: float) -> tuple[float, float] | None:
    """Mean and std of the normal distribution to which F of one latent is the KL."""
    one = slice(0, c.single)
    mean, second = c.mean[one, 0], c.second[one, 0]
    same = second == second[0]
    if int(same.sum()) < 3:
        return None
    design = torch.stack([mean**2, mean, torch.ones_like(mean)], 1)[same]
    a, b, _ = torch.linalg.lstsq(design, f[same, None]).solution[:, 0].tolist()
    if a <= 0:
        return None
    center, std = round(-b / (2 * a), 9) + 0.0, 1 / math.sqrt(2 * a)
    prior = f.new_tensor([center]), f.new_tensor([std])
    fit = regress(f, gaussian_kl(c.loc[one, :1], c.sigma[one, :1], prior))
    exact = fit.residual < tight and abs(fit.slope - 1) < 1e-3 and abs(fit.intercept) < 1e-2
    return (center, std) if exact else None


# --- its value, minimum and reduction -----------------------------------------------------------


def _check_sign(audit: VAEAudit, c: Comparison) -> None:
    """Report a negative KL."""
    w = int(c.f.argmin())
    smallest = float(c.f[w])
    if smallest >= -max(1e-6, c.tight) * (1 + float(c.f.abs().median())):
        return
    harmless = audit.kl_fits and audit.kl_slope > 0
    audit.find(
        "kl_negative",
        "warning" if harmless else "bug",
        f"the KL is {smallest:.5g} {c.place(w)}; a KL is never negative",
        "negate it"
        if audit.kl_slope < 0
        else "0.5 (m^2 + sigma^2 - 1) - log sigma: check the signs and the constant",
        kl=smallest,
        mean=c.mean[w, 0],
        second=c.second[w, 0],
    )


def _check_minimum(audit: VAEAudit, q: Posterior, c: Comparison) -> None:
    """Whether the KL of one latent is smallest where the posterior is the prior."""
    if c.divergence.by_chance or q.curve.name == "unit variance":
        return
    mean, std = (float(t[0]) for t in audit.prior)
    usable = (q.b.abs() <= 16) & (q.sigma > 1e-4 * std) & (q.sigma < 1e4 * std)
    b, sigma = q.b[usable], q.sigma[usable]
    if len(b) < 5 or sigma.min() > std or sigma.max() < std:
        return
    found = crossings(q.curve.sigma, b, std)
    if not found:
        return
    at_prior = found[-1]

    def along(values: Tensor, offsets: Tensor | float = 0.0) -> Heads:
        """F and sigma where one latent has these second outputs and means."""
        m = audit.prior[0].repeat(len(values), 1)
        v = torch.full((len(values), q.sampler.e), at_prior, dtype=torch.float64)
        m[:, 0] += offsets
        v[:, 0] = values
        loc, sigma = q.at(m, v)
        return c.divergence.values(m, v, loc, sigma).nan_to_num(math.inf), sigma[:, 0]

    fine, best = b, at_prior
    for _ in range(5):
        i = int(along(fine)[0].argmin())
        ends = fine[max(0, i - 1)], fine[min(len(fine) - 1, i + 1)]
        best = float(fine[i])
        fine = torch.linspace(float(ends[0]), float(ends[1]), 15, dtype=torch.float64)
    f, s = along(b.new_tensor([at_prior, best]))
    gap, smallest_std = float(f[0] - f[1]), float(s[1])
    level = 1e-3
    if math.isfinite(audit.kl_slope):
        level *= min(1.0, max(abs(audit.kl_slope), 1e-6))
    if gap > level and abs(math.log(max(smallest_std, 1e-300) / std)) > 0.03:
        audit.bug(
            "kl_min_off_prior",
            "the KL is smallest where the sampled standard deviation is "
            f"{smallest_std:.4g}; the prior's is {std:.4g}",
            "0.5 (m^2 + s^2 - 1) - log s is smallest at s = 1: check each factor",
            sigma_at_smallest=smallest_std,
            prior_std=std,
            second=best,
            gap=gap,
        )
        return
    offsets = torch.linspace(-3, 3, 31, dtype=torch.float64) * std
    f, _ = along(torch.full_like(offsets, at_prior), offsets)
    i = int(f.argmin())
    if f[15] - f[i] > level:
        at = mean + float(offsets[i])
        audit.bug(
            "kl_min_off_prior",
            f"the KL is smallest at mean {at:.4g}; the prior's is {mean:.4g}",
            "take the prior's mean from the posterior's in the KL",
            mean_at_smallest=at,
            prior_mean=mean,
        )


def _check_growth(audit: VAEAudit, c: Comparison) -> None:
    """How a scalar KL grows with the batch: as a sum, a mean, or neither."""
    d, w = c.divergence, int(c.f.abs().argmax())
    at = c.mean[w], c.second[w], c.loc[w]
    audit.kl_growth = growth = d.growth(*at)
    audit.kl_halved = d.by_latents(*at) if growth is not None or d.copies == 1 else None
    if not growth:
        return
    sums = all(abs(ratio / n - 1) < 1e-3 for n, ratio in growth.items())
    means = all(abs(ratio - 1) < 1e-3 for ratio in growth.values())
    kind = audit.details["kl_over_batch"] = "sum" if sums else "mean" if means else "neither"
    if kind == "neither" and audit.kl_fits:
        audit.bug(
            "reduction_imbalance",
            f"for 8 identical examples the KL is {growth[8]:.4g} times "
            "that of one: neither a sum (8) nor a mean (1)",
            "sum over the latents, and take the mean over the batch once",
            growth=growth[8],
            examples=8,
        )
