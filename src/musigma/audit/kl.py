r"""Whether the code's KL is the KL of what is sampled; if not, which KL it is instead.

The code's value F is regressed on the true one, T: see `musigma.audit.divergence`. If there is a
residual, F is not a multiple of T. It may be a function of T that is meant, such as free bits; or
the regression is repeated for every other reading of the second tensor and for single terms.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from musigma.audit.divergence import LOG_2PI, OFF, Comparison, Regression, regress
from musigma.audit.findings import AuditError
from musigma.audit.sandbox import first
from musigma.audit.scales import READINGS, Reading, crossings
from musigma.audit.vae_state import FullPosterior, Heads, Posterior, Prior, VAEAudit, exchanged

__all__ = ["check_kl"]

SEEN = 2e-3  # residual from which it is a warning


def check_kl(audit: VAEAudit, q: Posterior | FullPosterior) -> None:
    """Compare the code's KL with that of what is sampled, and report which KL it is."""
    if audit.prior.flow and not _check_flow(audit, audit.prior.flow):
        audit.missing.append("the KL: the log-determinant of the flow is wrong")
        return
    c = Comparison(audit, q)
    usable = c.f.isfinite() & c.t.isfinite()
    audit.details["kl_returns"] = c.code.kind
    if not usable.all():
        _not_finite(audit, c, usable)
    if int(usable.sum()) < (4 if q.curve is None else 12):
        audit.missing.append(
            f"the KL: there are too few points, {int(usable.sum())} (of a full covariance, the "
            "example gives them)"
        )
        return
    c.keep(usable)
    if c.code.by_chance:
        audit.assumed.append("the KL is an estimate from its own draws, and was averaged")
    if float(c.t[c.at.inside].max() - c.t[c.at.inside].min()) < 1e-9:
        audit.missing.append("the KL: what is sampled does not depend on the heads")
        return
    c.measure(audit, q)
    if audit.swapped and not c.fits and _fits_unswapped(audit, q):
        audit.bug("sample_mean", "swapped")
        audit.unchecked.append("the KL against what is sampled: the arguments are swapped")
        return
    audit.details["kl"] = c.fit._asdict()
    spread = float(c.f.max() - c.f.min())
    if spread < 1e-9 * (1 + float(c.f.abs().max())):
        audit.bug("kl_constant", value=c.f[0])
        return
    if not c.code.alone:
        audit.bug("cross_sample", "kl")
    other_noise = False
    if not c.fits and audit.given_prior is None and audit.prior.flow is None:
        _assume_prior(audit, q, c)
    meant = not (c.fits and c.fit.slope > 0) and _function_of_kl(audit, q, c)
    if c.fits and not meant:
        other_noise = _check_fit(audit, q, c)
    elif not (meant or _of_other_prior(audit, q, c)):
        _mismatch(audit, q, c)
    if not other_noise:
        _check_sign(audit, c)
    if not audit.kl_fits or audit.kl_slope < 0:
        _check_minimum(audit, q, c)
    _check_growth(audit, c)


def _fits_unswapped(audit: VAEAudit, q: Posterior | FullPosterior) -> bool:
    """Whether the KL is right if it takes the mean first, unlike the sampler."""
    kl = audit.functions["kl"]
    audit.functions["kl"] = exchanged(kl)
    try:
        c = Comparison(audit, q)
        c.keep(c.f.isfinite() & c.t.isfinite())
        c.measure(audit, q)
        return c.fits
    except AuditError:
        return False
    finally:
        audit.functions["kl"] = kl


def _check_flow(audit: VAEAudit, flow: Callable[..., Any]) -> bool:
    """Whether the flow's log-determinants are right, for examples one by one."""
    prior, generator, d = audit.prior, torch.Generator().manual_seed(6), len(audit.prior.mean)
    z = prior.mean + prior.std * torch.randn(6, d, generator=generator, dtype=torch.float64)
    together, single = prior.pushed(z), [prior.pushed(row[None]) for row in z]
    ends, log_dets = (torch.cat(parts) for parts in zip(*single, strict=True))
    pairs = zip(together, (ends, log_dets), strict=True)
    if not all(torch.allclose(*pair, 1e-3, 1e-3) for pair in pairs):
        audit.bug("cross_sample", "flow")

        def by_row(z: Tensor) -> Heads:
            ends, log_dets = zip(*(flow(row[None])[:2] for row in z), strict=True)
            return torch.cat(ends), torch.stack([t.sum() for t in log_dets])

        prior.flow = by_row
    if d > 256:
        audit.unchecked.append(f"the log-determinant of the flow: {d} latents are too many")
        return True
    jacobian = torch.autograd.functional.jacobian
    rows = audit.sandbox.to_input(z).reshape(-1, 1, *prior.latent)
    with torch.enable_grad():
        run = lambda row: first(flow(row)).flatten()  # noqa: E731
        found = [audit.sandbox.call("flow", jacobian, run, row) for row in rows]
    true = torch.linalg.slogdet(torch.stack([j.reshape(d, d).double() for j in found]))[1]
    off = (true - log_dets).abs() / (1 + true.abs())
    w = int(off.argmax())
    if off[w] > (1e-3 if audit.sandbox.dtype == torch.float64 else 1e-2):
        audit.bug("logdet_mismatch", "posterior_flow", log_det=log_dets[w], expected=true[w])
        return False
    audit.checked.append(f"the log-determinant of the flow, against autograd: {float(off[w]):.1e}")
    return True


def _not_finite(audit: VAEAudit, c: Comparison, usable: Tensor) -> None:
    """Report where the KL is not finite, but what is sampled is."""
    bad = ~c.f.isfinite() & c.t.isfinite()
    if not bad.any():
        return
    second = c.at.second
    negative = bool((second[bad].amin(1) < 0).all()) and bool((second[usable] >= 0).all())
    signed = audit.convention in ("signed std", "std", "abs of variance")
    if not (negative and signed and usable.any()):
        at = second[int(bad.int().argmax())][0]
        audit.bug("not_finite", "kl", second=at, share=bad.double().mean())
        return
    if audit.convention == "signed std":
        audit.convention = audit.details["convention"]["name"] = "std"
    if audit.heads is not None and (audit.heads[1] < 0).any():
        audit.bug("not_finite", "kl_of_negative", smallest_second=audit.heads[1].min())
    else:
        audit.assumed.append("the second output is positive: the KL is not finite below zero")


# --- a KL that fits -----------------------------------------------------------------------------


def _check_fit(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> bool:
    """Report what is left of a KL that fits; whether it is that of other noise."""
    slope, intercept, residual, worst = c.fit
    audit.kl_fits, audit.read_as = True, audit.convention
    audit.checked.append(
        f"KL = {slope:.6g} T + {intercept:.3g}, with T that of what is sampled: residual "
        f"{residual:.1e} over {int(c.at.inside.sum())} points"
    )
    if residual > max(SEEN, c.tight):
        w = int(c.at.inside.nonzero()[worst])
        audit.warn("kl_mismatch", "floor", residual=residual, **c.numbers(w))
    off = ((c.f - slope * c.t - intercept) / (abs(slope) * (1 + c.t))).abs() * ~c.at.inside
    if off.max() > max(OFF, c.tight):
        bounds = list(q.curve.raw_bounds) if q.curve is not None else []
        audit.warn("kl_mismatch", "clamp", residual=off.max(), raw_bounds=bounds)
    if _of_other_noise(audit, q, c):
        return True
    level, latents = max(1e-3, 3 * c.tight), q.sampler.d
    if slope < 0:
        audit.bug("kl_scale", "negative", slope=slope)
    elif abs(slope - 1) > level:
        over = latents > 1 and abs(slope * latents - 1) < 1e-3
        variant = "mean" if over else "half" if abs(slope - 2) < 1e-3 else ""
        audit.warn("kl_scale", variant, slope=slope, latents=latents)
    if abs(intercept) > level * max(abs(slope), 1e-12) and not c.code.by_chance:
        which = "large" if intercept > 0 else "small"
        by, each = abs(intercept), intercept / latents
        audit.warn("kl_offset", which=which, by=by, intercept=intercept, per_latent=each)
    return False


S = math.sqrt(3) / math.pi  # of a logistic distribution of unit variance

# Entropy and log-density of noise of unit variance.
DENSITIES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "Laplace": (1 + math.log(2) / 2, lambda e: -math.sqrt(2) * e.abs() - math.log(2) / 2),
    "uniform": (math.log(12) / 2, lambda e: torch.full_like(e, -math.log(12) / 2)),
    "logistic": (2 + math.log(S), lambda e: -e / S - math.log(S) - 2 * F.softplus(-e / S)),
}


def _of_other_noise(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> bool:
    """Whether the noise is not normal, and the KL is that of the noise that it is."""
    family = audit.details.get("noise", {}).get("family")
    if family not in DENSITIES or q.curve is None:
        return False
    entropy, log_density = DENSITIES[family]
    if c.code.given > 2:
        at = c.at[c.at.inside]
        z = q.sampler.draw(at.mean, at.second, 21)
        log_q = (log_density((z - at.loc) / at.scale) - at.scale.log()).sum(1)
        fit = regress(c.code.at_draws(at.mean, at.second, z), log_q - audit.prior.log_prob(z))
        right = fit.residual < 0.1 and abs(fit.slope - 1) < 0.05
    else:
        more = q.sampler.d * ((LOG_2PI + 1) / 2 - entropy)
        right = abs(c.fit.slope - 1) < 0.05 and abs(c.fit.intercept - more) < 0.2 * more
    if right:
        for code in audit.findings.keys() & {"noise_not_gaussian", "sample_scale"}:
            audit.findings[code] = replace(audit.findings[code], severity="warning")
        audit.checked.append(f"the KL is that of {family} noise")
    return right


# --- a KL of something else ---------------------------------------------------------------------


def _function_of_kl(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> bool:
    """Whether F is a known function of T that is meant: |T - C|, or T within bounds."""
    found = _capacity(q, c) or _bounded(c)
    if found is None:
        return False
    code, numbers = found
    audit.kl_fits, audit.read_as, audit.kl_slope = True, audit.convention, numbers["slope"]
    variant = {"kl_constant": "capped", "kl_capacity": numbers.pop("variant", "")}.get(code, "")
    audit.warn(code, variant, **numbers)
    return True


def _capacity(q: Posterior | FullPosterior, c: Comparison) -> tuple[str, dict[str, Any]] | None:
    """The target C and the slope of F = slope |T - C|, with C in the range of T or above it."""
    candidates = [(-c.fit.slope, -c.fit.intercept / (c.fit.slope or 1.0))]
    for share in (0.5, 0.2, 0.1):
        top = c.t >= c.t.quantile(1 - share)
        upper = regress(c.f[top], c.t[top])
        candidates.append((upper.slope, -upper.intercept / (upper.slope or 1.0)))
    for slope, target in candidates:
        if not (slope > 0 and target > max(0.01, float(c.t.min()))):
            continue
        off = (c.f / slope - (c.t - target).abs()) / (1 + c.t)
        if off.abs().max() > max(1e-3, c.tight):
            continue
        if (c.t > target).any() or _beyond(q, c, slope, target):
            return "kl_capacity", {"capacity": target, "slope": slope}
    design = torch.stack([c.t**2, c.t, torch.ones_like(c.t)], 1) / (1 + c.t[:, None]) ** 2
    target_f = c.f / (1 + c.t) ** 2
    a, b, k = torch.linalg.lstsq(design, target_f[:, None], driver="gelsd").solution[:, 0].tolist()
    off = (design @ design.new_tensor([a, b, k]) - target_f).abs().max()
    if a > 0 and b < -0.02 * a and off < 1e-6 * a and abs(k - b * b / (4 * a)) < 1e-3 * (1 + k):
        return "kl_capacity", {"capacity": -b / (2 * a), "slope": a, "variant": "squared"}
    return None


def _beyond(q: Posterior | FullPosterior, c: Comparison, slope: float, target: float) -> bool:
    """Whether F = slope (T - C) where T is above C, if no point so far is."""
    if q.curve is None:
        return False
    far = c.at[torch.arange(len(c.t)) == int(c.at.inside.int().argmax())]
    mean = far.mean + c.prior.std * (6 + 2 * (target / far.mean.shape[1]) ** 0.5)
    far = q.points_at(mean, far.second)
    t, f = float(c.true(far)[0]), float(c.code.values(far, c.e)[0])
    return t > target and abs(f / slope - (t - target)) < 0.01 * t


def _bounded(c: Comparison) -> tuple[str, dict[str, Any]] | None:
    """Where one latent moves, whether F stays at a number on one side, and is right elsewhere."""
    f, t = c.f[: c.at.single], c.t[: c.at.single]
    if not len(f):
        return None
    for code, end, sign in (("free_bits", f.min(), 1), ("kl_constant", f.max(), -1)):
        moves = (f - end).abs() > 1e-6 * (1 + f.abs().max())
        if not 12 <= int(moves.sum()) <= len(f) - 2:
            continue
        fit = regress(f[moves], t[moves])
        early = float((sign * t[~moves]).max()) <= float((sign * t[moves]).min()) + 1e-6
        if fit.residual <= max(c.tight, 1e-4) and early:
            return code, {"held_at": float(end) - fit.intercept, "slope": fit.slope}
    return None


def _of_other_prior(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> bool:
    """Report a KL that is right for another prior than the given one, or one that is not given."""
    w = int(((c.f - c.t).abs() / (1 + c.t) * c.at.inside).argmax())
    numbers: dict[str, Any] = {"residual": c.fit.residual, **c.numbers(w)}
    given = audit.given_prior is not None or audit.prior.flow is not None
    if prior := _prior_of_kl(audit, q, c):
        numbers |= {"prior_mean_of_kl": prior.mean[0], "prior_std_of_kl": prior.std[0]}
        audit.bug("kl_mismatch", "prior", **numbers)
    elif not _of_unknown_density(c):
        return False
    elif given:
        audit.bug("kl_mismatch", "other_density", **numbers)
    else:
        audit.prior_known = False
        audit.missing.append(
            "the prior: the KL is right for some density of z, but not for N(0, 1); give it as "
            "`prior`, and a flow of the posterior as `flow`"
        )
    audit.read_as, audit.kl_fits, audit.kl_slope = audit.convention, not given, 1.0
    return True


def _assume_prior(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> None:
    """Where no prior was given, take that of the KL, to be compared with that of generation."""
    if prior := _prior_of_kl(audit, q, c):
        audit.prior = c.prior = prior
        c.t = c.true()
        c.measure(audit, q)
        mean, std = float(prior.mean[0]), float(prior.std[0])
        what = f"N({mean:.4g}, {std:.4g}^2)" if prior.even else "normal, with moments by latent"
        audit.assumed.append(f"the prior is that of the KL: {what}")
        if not audit.has("generate"):
            audit.missing.append(
                f"the prior: that of the KL is {what}, not N(0, 1); if it is meant, give `prior`"
            )


def _prior_of_kl(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> Prior | None:
    """The normal prior to which F is a multiple of the KL, from the curvature of F in each mean.

    The multiple is the coefficient of -log sigma in F where one latent moves.
    """
    d = q.sampler.d
    if q.curve is None or c.at.base is None or c.code.by_chance or not q.unbiased or d > 256:
        return None
    m, s, f = c.at.loc[: c.at.single, 0], c.at.scale[: c.at.single, 0], c.f[: c.at.single]
    design = torch.stack([-s.log(), s**2, m**2, m, torch.ones_like(m)], 1)
    slope = torch.linalg.lstsq(design, f[:, None], driver="gelsd").solution[0]
    step = torch.diag(c.prior.std)
    mean = c.at.base[0] + torch.cat([0 * step[:1], step, -step])
    at = q.points_at(mean, c.at.base[1].expand(len(mean), -1))
    center, up, down = c.code.values(at, c.e).split([1, d, d])
    curvature = (up + down - 2 * center) / c.prior.std**2 / slope
    if not (slope > 0 and (curvature > 0).all()):
        return None
    there = c.at.base[0][0] - (up - down) / 2 / c.prior.std / curvature / slope
    moments = (there * 1e9).round() / 1e9, curvature.rsqrt()
    prior = Prior(moments, q.sampler.latent, audit.sandbox)
    fit = regress(c.f[c.at.inside], c.true(prior=prior)[c.at.inside])
    exact = abs(fit.slope / slope - 1) < 1e-3 and abs(fit.intercept / slope) < 1e-2
    return prior if exact and fit.residual < max(c.tight, 1e-4) else None


def _of_unknown_density(c: Comparison) -> bool:
    """Whether a KL of draws is log q(z) less a function of z: right for a prior yet to be given.

    It then depends on the heads, at the same z, only by log q.
    """
    if c.code.given == 2 or c.at.scale.ndim > 2:
        return False
    at = c.at[c.at.inside]
    z, rest = at.draws(c.e[:1])[0], []
    for here in (at, at[torch.arange(len(z)).flip(0)]):
        log_q = -(0.5 * ((z - here.loc) / here.scale) ** 2 + here.scale.log()).sum(1)
        rest.append(c.code.at_draws(here.mean, here.second, z) - log_q)
    off = (rest[0] - rest[1]).abs() / (1 + rest[0].abs() + rest[1].abs())
    return bool(off.max() <= max(c.tight, 1e-5))


def _mismatch(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> None:
    """Report which KL it computes instead of the KL of what is sampled."""
    one, tight = slice(0, c.at.single), max(c.tight, 1e-4)
    if q.curve is None or c.at.base is None:
        w = c.fit.worst
        audit.read_as = None
        audit.bug("kl_mismatch", "full", residual=c.fit.residual, **c.numbers(w))
        return
    curve, name, k = q.curve, audit.convention or "", q.curve.noise_scale
    written, others = None, 0.0
    if not c.code.by_chance:
        still = float(c.code.values(q.points_at(*c.at.base), c.e)[0])
        if math.isfinite(still):  # the share of the latents that do not move
            others = still * (1 - 1 / q.sampler.d)
        written = formula(c.f[one] - others, c.at.mean[one, 0], c.at.second[one, 0])
    w = int((((c.f - c.t) / (1 + c.t)).abs() * c.at.inside)[one].argmax())
    plain = name in READINGS and k == 1 and not curve.floor and not curve.more
    sampled = READINGS[name].formula if plain else f"the sampler's sigma ({curve.text})"
    numbers: dict[str, Any] = {
        **c.numbers(w),
        "sampled_sigma": float(c.at.scale[w, 0]),
        "residual": c.fit.residual,
        "formula": written,
        "sampled": sampled,
    }
    if reading := _reading_of(audit, c, tight):
        other, fit = reading
        other = name if {other, name} == {"std", "signed std"} else other
        audit.read_as, audit.kl_slope = other, fit.slope
        numbers |= {"read_as": other, "slope": fit.slope, "intercept": fit.intercept}
        numbers["curve"] = curve.text
        numbers["sign"] = ", and with the wrong sign" if fit.slope < 0 else ""
        small = curve.floor < 0.1 * float(audit.prior.std.min()) and not curve.more
        if other == name and k != 1:
            audit.bug("kl_mismatch", "noise_scale", noise_scale=k, **numbers)
        elif other == name and fit.slope > 0 and small and not curve.plain:
            audit.warn("kl_mismatch", "bounds", **numbers)
        elif other == name:
            audit.bug("kl_mismatch", "parameters", **numbers)
        else:
            unknown = Reading(torch.clone, other)
            a, b = READINGS.get(name, unknown), READINGS.get(other, unknown)
            numbers |= {f"sampler_{key}": value for key, value in a._asdict().items()}
            numbers |= {f"kl_{key}": value for key, value in b._asdict().items()}
            del numbers["sampler_sigma"], numbers["kl_sigma"]
            numbers["sampler_words"] = a.words or name or "something else"
            numbers["kl_words"] = b.words or other
            variant = "variance" if a.variance and b.variance else "reading"
            audit.bug("kl_mismatch", variant, **numbers)
        return
    audit.read_as = "none"
    numbers["written"] = f"; for one latent the code computes {written}" if written else ""
    if audit.prior.normal:
        there, prior = Normal(c.at.loc, c.at.scale), Normal(audit.prior.mean, audit.prior.std)
        reverse = kl_divergence(prior, there).sum(-1)
        if regress(c.f[c.at.inside], reverse[c.at.inside]).residual < tight:
            audit.bug("kl_mismatch", "reversed", **numbers)
            return
    audit.bug("kl_mismatch", **numbers)


def _reading_of(audit: VAEAudit, c: Comparison, tight: float) -> tuple[str, Regression] | None:
    """The reading of the second tensor that explains F best, if any does.

    If the KL takes z, F is an average over draws, and so depends on what is sampled as well.
    """
    at, fits = c.at[c.at.inside], []
    for name, reading in READINGS.items():
        s = reading.sigma(at.second.expand_as(at.mean))
        if not (s.isfinite() & (s > 0)).all():
            continue
        read = replace(at, loc=at.mean, scale=s)
        if c.code.given == 2:
            t = c.true(read)
        else:
            z = at.draws(c.e)
            log_q = Normal(at.mean, s).log_prob(z).sum(-1)
            t = (log_q - audit.prior.log_prob(z)).mean(0)
        fit = regress(c.f[c.at.inside], t)
        lacks_a_term = name == "unit variance" and abs(fit.intercept) > 1e-3
        if fit.residual <= tight and not lacks_a_term:
            fits.append((name, fit))
    return min(fits, key=lambda e: (abs(e[1].slope - 1) > 1e-3, e[1].residual), default=None)


_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp(b)": torch.exp,
    "exp(2b)": lambda b: (2 * b).exp(),
    "exp(b/2)": lambda b: (b / 2).exp(),
    "b^2": torch.square,
    "exp(-b)": lambda b: (-b).exp(),
    "exp(4b)": lambda b: (4 * b).exp(),
    "b^4": lambda b: b**4,
    "softplus(b)^2": lambda b: F.softplus(b) ** 2,
    "softplus(b)": F.softplus,
    "b": torch.clone,
    "log|b|": lambda b: b.abs().log(),
    "log softplus(b)": lambda b: F.softplus(b).log(),
}


def formula(f: Tensor, mean: Tensor, second: Tensor) -> str | None:
    """F (P,) of one latent as a formula in m and b (P,); None if it is not a sum of known terms.

    Example:
        >>> m, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).double()
        >>> formula(0.5 * (m**2 + b.exp() - b - 1), m, b)
        '0.5 m^2 + 0.5 exp(b) - 0.5 b - 0.5'
    """
    reach = float((f - f.mean()).abs().max())
    columns = {name: term(second) for name, term in _TERMS.items()}
    finite = [name for name, column in columns.items() if column.isfinite().all()]
    for pair in itertools.combinations(finite, 2):
        names = ["m^2", "m", *pair, ""]
        given = [mean**2, mean, *(columns[name] for name in pair), torch.ones_like(mean)]
        design = torch.stack(given, 1)
        size = design.abs().amax(0).clamp(min=1e-300)
        solved = torch.linalg.lstsq(design / size, f[:, None], driver="gelsd", rcond=1e-12)
        weights = solved.solution[:, 0]
        if (design / size @ weights - f).abs().max() > 1e-6 * reach:
            continue
        terms = ""
        for name, c in zip(names, (weights / size).tolist(), strict=True):
            if abs(c) >= 1e-6:
                number = "" if abs(abs(c) - 1) < 1e-6 and name else f"{abs(c):.4g}"
                terms += f" {'-' if c < 0 else '+'} " + " ".join(filter(None, (number, name)))
        return terms.strip().removeprefix("+ ")
    return None


# --- its value, minimum and reduction -----------------------------------------------------------


def _check_sign(audit: VAEAudit, c: Comparison) -> None:
    """Report a negative KL."""
    w = int(c.f.argmin())
    if float(c.f[w]) >= -max(1e-6, c.tight) * (1 + float(c.f.abs().median())):
        return
    harmless = audit.kl_fits and audit.kl_slope > 0
    if harmless and c.code.given > 2 and not (c.prior.normal and c.fits):
        return  # an average of few draws
    variant = "sign" if audit.kl_slope < 0 else ""
    audit.find("kl_negative", "warning" if harmless else "bug", variant, **c.numbers(w))


def _check_minimum(audit: VAEAudit, q: Posterior | FullPosterior, c: Comparison) -> None:
    """Whether the KL of one latent is smallest where the posterior is the prior."""
    prior, mean, std = audit.prior, float(audit.prior.mean[0]), float(audit.prior.std[0])
    if q.curve is None or q.curve.name == "unit variance" or c.code.by_chance or not prior.normal:
        return
    usable = (q.b.abs() <= 16) & (q.sigma > 1e-4 * std) & (q.sigma < 1e4 * std)
    b, sigma = q.b[usable], q.sigma[usable]
    if len(b) < 5 or sigma.min() > std or sigma.max() < std:
        return
    if not (found := crossings(q.curve.sigma, b, std)):
        return

    def along(values: Tensor, offsets: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """F and sigma where one latent has these second outputs and means."""
        m = prior.mean.repeat(len(values), 1)
        v = torch.full((len(values), q.sampler.e), found[-1], dtype=torch.float64)
        m[:, 0] += offsets
        v[:, 0] = values
        at = q.points_at(m, v)
        return c.code.values(at, c.e).nan_to_num(math.inf), at.scale[:, 0]

    near = torch.linspace(found[-1] - 3, found[-1] + 3, 121, dtype=torch.float64)
    near = near[(near >= b[0]) & (near <= b[-1])]
    tried = torch.cat([b.new_tensor(found[-1:]), b, near])
    least = tried[along(tried)[0].argmin()]
    around = torch.linspace(-0.05, 0.05, 101, dtype=torch.float64)
    f, s = along(torch.cat([tried[:1], (least + around).clamp(b[0], b[-1])]))
    i = int(f.argmin())
    level = 1e-3
    if math.isfinite(audit.kl_slope):
        level *= min(1.0, max(abs(audit.kl_slope), 1e-6))
    if f[0] - f[i] > level and abs(math.log(max(float(s[i]), 1e-300) / std)) > 0.03:
        audit.bug("kl_min_off_prior", gap=f[0] - f[i], sigma_at_smallest=s[i], prior_std=std)
        return
    offsets = torch.linspace(-3, 3, 31, dtype=torch.float64) * std
    f, _ = along(torch.full_like(offsets, found[-1]), offsets)
    i = int(f.argmin())
    if f[15] - f[i] > level:
        at = mean + float(offsets[i])
        audit.bug("kl_min_off_prior", "mean", mean_at_smallest=at, prior_mean=mean)


def _check_growth(audit: VAEAudit, c: Comparison) -> None:
    """How a scalar KL grows with the batch: as a sum, a mean, or neither."""
    w = int(c.f.abs().argmax())
    audit.kl_growth = growth = c.code.growth(c.at.mean[w], c.at.second[w], c.at.loc[w])
    if not growth:
        return
    sums = all(abs(ratio / n - 1) < 1e-3 for n, ratio in growth.items())
    means = all(abs(ratio - 1) < 1e-3 for ratio in growth.values())
    kind = audit.details["kl_over_batch"] = "sum" if sums else "mean" if means else "neither"
    if kind != "neither" or not audit.kl_fits:
        return
    powers = [math.log(max(ratio, 1e-12)) / math.log(n) for n, ratio in growth.items()]
    if max(powers) - min(powers) > 0.01:
        audit.bug("cross_sample", "kl")
    else:
        severity = "warning" if audit.coupled else "bug"
        audit.find("reduction_imbalance", severity, "growth", growth=growth[8], examples=8)
