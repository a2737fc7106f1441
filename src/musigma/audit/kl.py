"""The code's KL against the KL of what is sampled, by regression over a grid of heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from musigma.audit.divergence import (
    Divergence,
    Regression,
    formula,
    gaussian_kl,
    read,
    regress,
)  # fmt: skip
from musigma.audit.findings import AuditError
from musigma.audit.packing import arguments
from musigma.audit.vae_state import VAEAudit

__all__ = ["check_kl"]

OFF = 0.02  # residual of the KL, relative to 1 + T, from which it is a bug
SEEN = 2e-3  # residual from which it is a warning

FORMULAS = {
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


def check_kl(audit: VAEAudit) -> None:
    """Compare the code's KL with that of what is sampled."""
    kl = audit.functions["kl"]
    if audit.packing is not None and arguments(kl) == (2 if audit.kl_uses_sample else 1):
        kl = audit.packing.packed(kl)
    if audit.is_matrix:
        _compare_matrices(audit, kl)
        return
    if audit.scan is None:
        return
    if audit.swapped and not _kl_swapped(audit, kl):
        audit.bug(
            "sample_mean", "sample takes its second argument as the mean, the KL its "
            "first", "give sample its arguments in the order (mean, second)",
        )  # fmt: skip
        audit.unchecked.append("the KL against what is sampled: the arguments are swapped")
        return
    if audit.swapped:
        _compare(audit, lambda mean, second, *z: kl(second, mean, *z))
    else:
        _compare(audit, kl)


def _kl_swapped(audit: VAEAudit, kl: Any) -> bool:
    """Whether the KL also takes the scale first: it grows as the square of its second argument."""
    s = audit.sampler
    one = audit.sandbox.to_input(torch.ones(1, *s.latent))
    z = (0 * one,) if audit.kl_uses_sample else ()
    try:
        f = [
            float(
                audit.sandbox.as_tensor("kl", audit.sandbox.call("kl", kl, one, t * one, *z)).sum()
            )
            for t in (0.0, 1.0, 2.0, 3.0)
        ]
    except AuditError:
        return False
    even = abs((f[3] - f[2]) - (f[2] - f[1]) - ((f[2] - f[1]) - (f[1] - f[0])))
    return even < 1e-4 * (1 + abs(f[3] - f[2])) and f[3] != f[0]


def _compare_matrices(audit: VAEAudit, kl: Callable[..., Any]) -> None:
    """The comparison where the second output holds a matrix, at the encoder's heads."""
    assert audit.heads is not None
    assert audit.matrices is not None
    s = audit.sampler
    mean, second = (t.flatten(1) for t in audit.heads)
    loc, factor, error = audit.matrices
    at = (mean[0], second[0], loc[0])
    d = Divergence(audit.sandbox, kl, s.latent, s.second, audit.kl_uses_sample, audit.rows, at)
    means, stds = audit.prior
    whitened = factor / stds[:, None]
    log_det = torch.linalg.slogdet(whitened)[1]
    if audit.kl_uses_sample:
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
        audit.unchecked.append("the KL: a full covariance needs an example of four rows or more")
        return
    fit = regress(f, t)
    audit.kl_slope = fit.slope
    if fit.residual > OFF + 20 * error:
        w = fit.worst
        audit.bug(
            "kl_mismatch", "the KL is no multiple of that of what is sampled: "
            f"{float(f[w]):.5g} instead of {float(t[w]):.5g}",
            "use torch.distributions.MultivariateNormal for both, with one scale_tril",
            kl=float(f[w]), expected=float(t[w]), residual=fit.residual,
        )  # fmt: skip
        return
    audit.kl_fits, audit.read_as = True, "full covariance"
    _slope_and_intercept(audit, fit, d, 1e-4 + 10 * error)


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
    """Heads at which KLs are compared: one latent moved at a time, and all at random."""

    def __init__(self, audit: VAEAudit):
        s = audit.sampler
        b, sigma = audit.scanned
        means, stds = audit.prior
        std = float(stds[0])
        far = (sigma.clamp(min=1e-300) / std).log().abs()
        self.base_b = float(b[far <= far.min() + 1e-12][-1])  # the positive one of two
        inside = (b.abs() <= 8) & (sigma > 0.05 * std) & (sigma < 8 * std)
        flat = torch.zeros_like(inside)
        if audit.curve.name != "unit variance":
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

        def add(i: int, offset: float, value: float, regular: bool) -> None:
            m, v = means.clone(), base_b.clone()
            m[i] += offset * stds[i]
            v[i if s.e == s.d else 0] = value
            rows.append((m, v, regular))

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


def _compare(audit: VAEAudit, kl: Callable[..., Any]) -> None:
    """Regress the code's KL on that of what is sampled, and report which KL it is."""
    s = audit.sampler
    grid = _Grid(audit)
    mean, second = grid.mean, grid.second
    loc, sigma = _sampled(audit, mean, second)
    w = int(second.amin(1).argmax())
    at = (mean[w], second[w], loc[w])
    d = Divergence(audit.sandbox, kl, s.latent, s.second, audit.kl_uses_sample, audit.rows, at)
    audit.details["kl_returns"] = d.kind
    f = _values(d, mean, second, loc, sigma)
    t = gaussian_kl(loc, sigma, audit.prior)
    usable = f.isfinite() & t.isfinite()
    if not bool(usable.all()):
        if not _not_finite(audit, second, f, t, usable):
            return
        grid.inside = grid.inside[usable]
        grid.single = int(usable[: grid.single].sum())
        mean, second, loc, sigma, f, t = (v[usable] for v in (mean, second, loc, sigma, f, t))
    grid.mean, grid.second = mean, second
    if d.by_chance:
        audit.assumed.append("the KL is an estimate from its own draws, and was averaged")
    chance = 8 * d.error
    inside = grid.inside
    if float(t[inside].max() - t[inside].min()) < 1e-9:
        audit.unchecked.append("the KL: what is sampled does not depend on the heads")
        return
    fit = regress(f[inside], t[inside])
    if d.copies > 1 and abs(fit.slope / d.copies - 1) < 1e-3:
        f = f / d.copies
        fit = regress(f[inside], t[inside])
    audit.kl_slope = fit.slope
    slack = chance / max(abs(fit.slope), 1e-300)
    tight = max(1e-5, 50 * d.rounding, 200 * s.rounding, 1.5 * s.scale_error) + slack
    tight += 0.05 if s.mode == "moments" and audit.curve.sigma is None else 0.0
    audit.details["kl"] = {
        "slope": fit.slope, "intercept": fit.intercept, "residual": fit.residual,
    }  # fmt: skip
    if fit.residual <= max(OFF, tight) and fit.slope != 0:
        _fits(audit, grid, d, f, t, fit, tight)
    else:
        _mismatch(audit, grid, d, f, t, loc, sigma, fit, max(tight, 1e-4))
    if not any(line.startswith("the KL is that of") for line in audit.checked):
        _negative(audit, grid, f, tight)
    if not audit.kl_fits or fit.slope < 0:
        _minimum(audit, d, f)
    w = int(f.abs().argmax())
    _growth(audit, d, (grid.mean[w], grid.second[w], loc[w]))


def _values(d: Divergence, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor) -> Tensor:
    """F at points; NaN at negative second outputs, if it raises there."""
    try:
        return d.values(mean, second, loc, sigma)
    except AuditError:
        positive = second.amin(1) > 0
        if bool(positive.all()) or not bool(positive.any()):
            raise
        f = torch.full((len(mean),), math.nan, dtype=torch.float64)
        f[positive] = d.values(*(v[positive] for v in (mean, second, loc, sigma)))
        return f


def _sampled(audit: VAEAudit, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Location and sigma at points: measured, or by the named curve where that is exact."""
    s = audit.sampler
    even = "sigma_by_latent" not in audit.details
    if s.mode != "known" and audit.curve.sigma is not None and even:
        sigma = audit.curve.sigma(second).abs().expand_as(mean)
        if "sample_mean" not in audit.findings:
            return mean, sigma
        return s.measure(mean, second)[0], sigma
    loc, sigma, _ = s.measure(mean, second)
    return loc, sigma.abs()


def _not_finite(audit: VAEAudit, second: Tensor, f: Tensor, t: Tensor, usable: Tensor) -> bool:
    """Report what is not finite; whether enough points are left."""
    bad = ~f.isfinite() & t.isfinite()
    if bool(bad.any()):
        negative = bool((second[bad].amin(1) < 0).all()) and bool((second[usable] >= 0).all())
        if (
            negative
            and bool(usable.any())
            and audit.convention in ("signed std", "std", "abs of variance")
        ):
            if audit.convention == "signed std":
                audit.convention = "std"
                audit.details["convention"]["name"] = "std"
            if audit.heads is not None and bool((audit.heads[1] < 0).any()):
                audit.bug(
                    "not_finite", "the KL is not finite where the second output is "
                    "negative, as the encoder's is", "let the encoder end in exp or softplus",
                    smallest_second=float(audit.heads[1].min()),
                )  # fmt: skip
            else:
                audit.assumed.append(
                    "the second output is positive: the KL is not finite below zero"
                )
        else:
            i = int(bad.int().argmax())
            audit.bug(
                "not_finite", "the KL is NaN or infinite where what is sampled is not",
                "check the logarithm and the exponential in the KL",
                second=float(second[i][0]), share=float(bad.double().mean()),
            )  # fmt: skip
    if int(usable.sum()) < 12:
        audit.unchecked.append("the KL: it is finite at too few points")
        return False
    return True


def _fits(
    audit: VAEAudit,
    grid: _Grid,
    d: Divergence,
    f: Tensor,
    t: Tensor,
    fit: Regression,
    tight: float,
) -> None:
    audit.kl_fits = True
    audit.read_as = audit.convention
    audit.checked.append(
        f"KL = {fit.slope:.6g} T + {fit.intercept:.3g}, with T that of what is sampled: residual "
        f"{fit.residual:.1e} over {int(grid.inside.sum())} points"
    )
    if fit.residual > max(SEEN, tight):
        inside = grid.inside.nonzero().flatten()
        w = int(inside[fit.worst])
        audit.warn(
            "kl_mismatch", "the KL is nearly that of what is sampled: "
            f"{float(f[w]):.5g} instead of {float(t[w]):.5g}; only one of the two has a floor",
            "compute sigma for sampler and KL in one place", kl=float(f[w]), expected=float(t[w]),
            residual=fit.residual,
        )  # fmt: skip
    outside = ~grid.inside
    if bool(outside.any()):
        off = ((f - fit.slope * t - fit.intercept) / (abs(fit.slope) * (1 + t)))[outside].abs()
        if float(off.max()) > max(OFF, tight):
            audit.warn(
                "kl_mismatch", "where the sampler clamps the second output, the KL does not",
                "clamp once, before both", residual=float(off.max()),
                raw_bounds=list(audit.curve.raw_bounds),
            )  # fmt: skip
    if not _of_other_noise(audit, grid, d, fit):
        _slope_and_intercept(audit, fit, d, tight)


def _of_other_noise(audit: VAEAudit, grid: _Grid, d: Divergence, fit: Regression) -> bool:
    """Whether the noise is not normal, and the KL is that of the noise that it is."""
    family = audit.details.get("noise", {}).get("family")
    if family not in DENSITIES or audit.is_matrix:
        return False
    entropy, log_density = DENSITIES[family]
    if audit.kl_uses_sample:
        inside = grid.inside
        mean, second = grid.mean[inside], grid.second[inside]
        loc, sigma = _sampled(audit, mean, second)
        z = audit.sampler.draw(mean, second, 21)
        means, stds = audit.prior
        log_q = (log_density((z - loc) / sigma) - sigma.log()).sum(1)
        log_p = (-0.5 * ((z - means) / stds) ** 2 - stds.log() - LOG_2PI / 2).sum(1)
        shifted = regress(d.at_draws(mean, second, z), log_q - log_p)
        right = shifted.residual < 0.1 and abs(shifted.slope - 1) < 0.05
    else:
        more = audit.sampler.d * ((LOG_2PI + 1) / 2 - entropy)
        right = abs(fit.slope - 1) < 0.05 and abs(fit.intercept - more) < 0.2 * more
    if not right:
        return False
    for code in audit.findings.keys() & {"noise_not_gaussian", "sample_scale"}:
        audit.findings[code] = replace(audit.findings[code], severity="warning")
    audit.checked.append(f"the KL is that of {family} noise")
    return True


def _slope_and_intercept(
    audit: VAEAudit, fit: Regression, d: Divergence, tight: float = 1e-4
) -> None:
    """Report a KL that is right up to a factor or a constant."""
    level = max(1e-3, 3 * tight)
    if fit.slope < 0:
        audit.bug(
            "kl_scale", f"the KL has the wrong sign: it is {fit.slope:.4g} times the KL",
            "negate it", slope=fit.slope,
        )  # fmt: skip
    elif abs(fit.slope - 1) > level:
        latents = audit.sampler.d
        mean = latents > 1 and abs(fit.slope * latents - 1) < 1e-3
        audit.warn(
            "kl_scale", f"the KL is {fit.slope:.6g} times the KL"
            + (f": a mean over {latents} latents in place of the sum" if mean else ""),
            "sum over the latents" if mean else (
                "the factor 1/2 is missing" if abs(fit.slope - 2) < 1e-3
                else f"divide it by {fit.slope:.6g}, or say that this weight is meant"),
            slope=fit.slope,
        )  # fmt: skip
    if abs(fit.intercept) > level * max(abs(fit.slope), 1e-12) and not d.by_chance:
        audit.warn(
            "kl_offset", f"the KL is too {'large' if fit.intercept > 0 else 'small'} by the "
            f"constant {abs(fit.intercept):.5g}: its gradients are right, its value is not",
            "put the constant back: 0.5 (m^2 + sigma^2 - 1) - log sigma, summed over the latents",
            intercept=fit.intercept, per_latent=fit.intercept / audit.sampler.d,
        )  # fmt: skip


def _mismatch(
    audit: VAEAudit, grid: _Grid, d: Divergence, f: Tensor, t: Tensor, loc: Tensor, sigma: Tensor,
    fit: Regression, tight: float,
) -> None:  # fmt: skip
    inside = grid.inside
    if _free_bits(audit, f[: grid.single], t[: grid.single], tight):
        return
    mean, second = grid.mean[inside], grid.second[inside]
    wide = second.expand(-1, mean.shape[1])
    readings = read(
        f[inside], mean, wide, loc[inside], sigma[inside], audit.prior, audit.kl_uses_sample, tight
    )
    one = slice(0, grid.single)
    written, others = None, 0.0
    if not d.by_chance:
        at = grid.base
        still = float(_values(d, *at, *_sampled(audit, *at))[0])
        others = still * (1 - 1 / mean.shape[1]) if math.isfinite(still) else 0.0
        written = formula(f[one] - others, grid.mean[one, 0], grid.second[one, 0])
    w = int((((f - t) / (1 + t)).abs() * inside)[one].argmax())
    numbers: dict[str, Any] = {
        "mean": float(grid.mean[w, 0]), "second": float(grid.second[w, 0]),
        "sampled_sigma": float(sigma[w, 0]), "kl": float(f[w]), "expected": float(t[w]),
        "residual": fit.residual, "formula": written,
    }  # fmt: skip
    name = audit.convention
    sampled = FORMULAS.get(name or "", f"the sampler's sigma ({audit.curve.text})")
    if audit.curve.noise_scale != 1 or audit.curve.floor or audit.curve.more:
        sampled = f"the sampler's sigma ({audit.curve.text})"
    message = (
        f"the KL is not that of what is sampled: at mean {numbers['mean']:.3g} and second output "
        f"{numbers['second']:.3g} it is {numbers['kl']:.5g}, and should be "
        f"{numbers['expected']:.5g}"
    )
    repair = f"KL = 0.5 (m^2 + s^2 - 1) - log s with s = {sampled}, summed over the latents"
    severity, curve = "bug", audit.curve
    small = curve.floor < 0.1 * float(audit.prior[1].min()) and not curve.more
    small = small and (curve.floor > 0 or curve.bounds != (None, None))
    if readings:
        other, fit = readings[0]
        if {other, name} == {"std", "signed std"}:
            other = name or other
        audit.read_as = other
        audit.kl_slope = fit.slope
        if other == name and audit.curve.noise_scale != 1:
            k = audit.curve.noise_scale
            message += f": the KL ignores the noise's scale {k:.4g}"
            repair = (
                f"draw eps with standard deviation 1 in the sampler, or use s = {sampled} in KL"
            )
        elif other == name and fit.slope > 0 and small:
            severity = "warning"
            message += f": the KL ignores the sampler's floor or bounds ({curve.text})"
            repair = "compute sigma for sampler and KL in one place"
        else:
            message += (
                f": the sampler treats the second output b as "
                f"{curve.text if other == name else _words(name)}, the KL as {_words(other)}"
            )
            repair = _repair_of_readings(name, other, sampled)
        if fit.slope < 0:
            message += f", and with the wrong sign (factor {fit.slope:.4g})"
        numbers |= {"read_as": other, "slope": fit.slope, "intercept": fit.intercept}
    else:
        audit.read_as = "none"
        swapped = _reversed(f[inside], loc[inside], sigma[inside], audit.prior, tight)
        if swapped:
            message += ": it is the reversed KL, of the prior from the posterior"
        other = _other_prior(
            f[one] - others, grid.mean[one, 0], grid.second[one], loc[one], sigma[one], tight
        )
        if other:
            audit.read_as = name
            message += f": it is the KL to N({other[0]:.4g}, {other[1]:.4g}^2), not to the prior"
            repair = "put the prior's mean and standard deviation into the KL"
            numbers |= {"prior_mean_of_kl": other[0], "prior_std_of_kl": other[1]}
        if written:
            message += f"; for one latent the code computes {written}"
    audit.find("kl_mismatch", severity, message, repair, **numbers)


def _other_prior(
    f: Tensor, mean: Tensor, second: Tensor, loc: Tensor, sigma: Tensor, tight: float
) -> tuple[float, float] | None:
    """Mean and std of the normal distribution to which F of one latent is the KL."""
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


def _repair_of_readings(sampled_as: str | None, read_as: str, sampled: str) -> str:
    """The repair where sampler and KL read one tensor differently."""
    if (sampled_as, read_as) == ("log_std", "log_var"):
        return (
            "the sampler treats the second output as log sigma, the KL as log variance: replace "
            "exp(b) by exp(2 b) and b by 2 b in the KL, or exp(b) by exp(b/2) in the sampler"
        )
    if (sampled_as, read_as) == ("log_var", "log_std"):
        return (
            "the sampler treats the second output as log variance, the KL as log sigma: replace "
            "exp(2 b) by exp(b) and 2 b by b in the KL, or exp(b/2) by exp(b) in the sampler"
        )
    other = FORMULAS.get(read_as, read_as)
    return (
        f"the sampler computes sigma = {sampled}, the KL takes sigma = {other}: use s = {sampled} "
        f"in the KL, or s = {other} in the sampler"
    )


def _reversed(
    f: Tensor, loc: Tensor, sigma: Tensor, prior: tuple[Tensor, Tensor], tight: float
) -> bool:
    mean, std = prior
    t = (sigma / std).log() + (std**2 + (loc - mean) ** 2) / (2 * sigma**2) - 0.5
    return regress(f, t.sum(-1)).residual < tight


def _free_bits(audit: VAEAudit, f: Tensor, t: Tensor, tight: float) -> bool:
    """Whether each latent's KL is raised to a number where it is smaller, and else right."""
    above = f > f.min() + 1e-6 * (1 + f.abs().max())
    if not 12 <= int(above.sum()) <= len(f) - 2:
        return False
    fit = regress(f[above], t[above])
    if fit.residual > tight or float(t[~above].max()) > float(t[above].min()) + 1e-6:
        return False
    audit.kl_fits, audit.read_as, audit.kl_slope = True, audit.convention, fit.slope
    audit.warn(
        "kl_mismatch", f"the KL is raised to {float(f.min()):.5g} where it is smaller (free "
        "bits), and right where it is larger", "report the true KL beside it",
        held_at=float(f.min()),
    )  # fmt: skip
    return True


def _negative(audit: VAEAudit, grid: _Grid, f: Tensor, tight: float) -> None:
    """Report a negative KL."""
    w = int(f.argmin())
    smallest = float(f[w])
    if smallest < -max(1e-6, tight) * (1 + float(f.abs().median())):
        harmless = audit.kl_fits and audit.kl_slope > 0
        audit.find(
            "kl_negative", "warning" if harmless else "bug",
            f"the KL is {smallest:.5g} at mean {float(grid.mean[w, 0]):.3g} and second output "
            f"{float(grid.second[w, 0]):.3g}; a KL is never negative",
            "negate it" if audit.kl_slope < 0 else
            "0.5 (m^2 + sigma^2 - 1) - log sigma: check the signs and the constant",
            kl=smallest, mean=float(grid.mean[w, 0]), second=float(grid.second[w, 0]),
        )  # fmt: skip


def _minimum(audit: VAEAudit, d: Divergence, f: Tensor) -> None:
    """Whether the KL of one latent is smallest where the posterior is the prior."""
    if d.by_chance or audit.curve.name == "unit variance":
        return
    s = audit.sampler
    means, stds = audit.prior
    b, sigma = audit.scanned
    std = float(stds[0])
    usable = (b.abs() <= 16) & (sigma > 1e-4 * std) & (sigma < 1e4 * std)
    b, sigma = b[usable], sigma[usable]
    if len(b) < 5 or float(sigma.min()) > std or float(sigma.max()) < std:
        return
    at_prior = _crossing(audit, b, sigma, std)
    if at_prior is None:
        return

    def along(values: Tensor, offsets: Tensor) -> Tensor:
        m = means.expand(len(values), -1).clone()
        v = torch.full((len(values), s.e), at_prior, dtype=torch.float64)
        m[:, 0] += offsets
        v[:, 0] = values
        loc, scale = _sampled(audit, m, v)
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
    smallest_std = float(_sampled(audit, m, v)[1][0, 0])
    scale = max(abs(audit.kl_slope), 1e-6) if math.isfinite(audit.kl_slope) else 1.0
    if gap > 1e-3 * min(1.0, scale) and abs(math.log(max(smallest_std, 1e-300) / std)) > 0.03:
        audit.bug(
            "kl_min_off_prior", "the KL is smallest where the sampled standard deviation is "
            f"{smallest_std:.4g}; the prior's is {std:.4g}",
            "0.5 (m^2 + s^2 - 1) - log s is smallest at s = 1: check each factor",
            sigma_at_smallest=smallest_std, prior_std=std, second=best, gap=gap,
        )  # fmt: skip
        return
    offsets = torch.linspace(-3, 3, 31, dtype=torch.float64) * std
    values = along(torch.full((31,), at_prior, dtype=torch.float64), offsets)
    i = int(values.argmin())
    if float(values[15] - values[i]) > 1e-3 * min(1.0, scale):
        audit.bug(
            "kl_min_off_prior", f"the KL is smallest at mean {float(means[0] + offsets[i]):.4g}; "
            f"the prior's is {float(means[0]):.4g}",
            "take the prior's mean from the posterior's in the KL",
            mean_at_smallest=float(means[0] + offsets[i]), prior_mean=float(means[0]),
        )  # fmt: skip


def _crossing(audit: VAEAudit, b: Tensor, sigma: Tensor, std: float) -> float | None:
    """A second output b at which the sampled sigma is the prior's."""
    crossed = ((sigma[1:] - std) * (sigma[:-1] - std) <= 0).nonzero()
    if not len(crossed):
        return None
    i = int(crossed[-1])
    share = math.log(std / float(sigma[i])) / max(
        1e-300, abs(math.log(float(sigma[i + 1] / sigma[i])))
    )
    if audit.curve.sigma is None:
        return float(b[i] + abs(share) * (b[i + 1] - b[i]))
    fine = torch.linspace(float(b[i]), float(b[i + 1]), 2001, dtype=torch.float64)
    return float(fine[int((audit.curve.sigma(fine) / std).log().abs().argmin())])


def _growth(audit: VAEAudit, d: Divergence, at: tuple[Tensor, Tensor, Tensor]) -> None:
    """How a scalar KL grows with the batch: as a sum, a mean, or neither."""
    growth = d.growth(*at)
    audit.kl_growth = growth
    audit.kl_halved = d.by_latents(*at) if growth is not None or d.copies == 1 else None
    if not growth:
        return
    sums = all(abs(ratio / n - 1) < 1e-3 for n, ratio in growth.items())
    means = all(abs(ratio - 1) < 1e-3 for ratio in growth.values())
    audit.details["kl_over_batch"] = "sum" if sums else "mean" if means else "neither"
    if not sums and not means and audit.kl_fits:
        audit.bug(
            "reduction_imbalance", f"for 8 identical examples the KL is {growth[8]:.4g} times "
            "that of one: neither a sum (8) nor a mean (1)",
            "sum over the latents, and take the mean over the batch once",
            growth=growth[8], examples=8,
        )  # fmt: skip
