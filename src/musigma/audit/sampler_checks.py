"""Checks of what is sampled: sigma by its name, the mean, the noise, the prior of generation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError
from musigma.audit.heads import NARROW
from musigma.audit.scales import name_curve
from musigma.audit.statistics import correlated, moments_differ, noise_name
from musigma.audit.vae_state import VAEAudit

__all__ = ["check_generation", "check_mean", "check_noise", "check_scale", "name_scale"]

Heads = tuple[Tensor, Tensor]

_STEPS = [0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 9.5, 12, 14, 16, 18, 22, 26,
          32, 40, 50, 60]  # fmt: skip


def name_scale(audit: VAEAudit, heads: Heads | None) -> None:
    """Name sigma as a function of the second tensor."""
    s = audit.sampler
    if audit.is_matrix and heads is not None:
        _check_covariance(audit, heads)
        return
    b = torch.tensor(sorted({sign * x for x in [0.0, *_STEPS] for sign in (-1, 1)}))
    b, sigma = _scan(audit, b.double())
    if len(b) < 3:
        audit.bug(
            "not_finite", "sample returns NaN or infinity for nearly every second "
            "output", "check what it does with the second tensor",
        )  # fmt: skip
        return
    pooled = sigma.abs().mean(1) if s.mode != "moments" else sigma.square().mean(1).sqrt()
    negates = bool((sigma[b < 0] < 0).any()) and bool((sigma[b > 0] > 0).any())
    exact = s.mode != "moments"
    error = max(1e-6, 5 * s.rounding) if exact else 6 / math.sqrt(2 * s.averaged(51) * s.d)
    even = ((sigma.abs() - pooled[:, None]) / pooled[:, None].clamp(min=1e-300)).abs().max()
    if exact and float(even) > 100 * error:
        audit.details["sigma_by_latent"] = (sigma.abs() / pooled[:, None]).mean(0).tolist()
    if float(pooled.max()) < 1e-12:
        audit.bug(
            "sample_scale", "z does not vary: its standard deviation is zero",
            "add sigma times standard normal noise to the mean", sigma=0.0,
        )  # fmt: skip
        return
    audit.curve = curve = name_curve(b, pooled, error, s.scale_error)
    audit.scan = (b, pooled)
    name = curve.name
    if name == "signed std" and heads is not None:
        second = heads[0 if audit.swapped else 1]
        if bool((second > 0).all()) and second.numel() >= 24:
            name = "std"
    if name == "relu" and curve.floor:
        audit.details["dead_below_zero"] = True
    audit.convention = name
    audit.details["convention"] = {
        **curve.to_dict(),
        "name": name,
        "text": curve.text.replace(curve.name, name, 1),
        "turns_noise": negates,
    }
    audit.details["noise"] = {"source": s.stream or s.mode}
    audit.checked.append(
        f"sigma at {len(b)} values of the second output from {float(b[0]):g} to "
        f"{float(b[-1]):g}: {curve.text.replace(curve.name, name, 1)}"
        + (f", to within {curve.error:.1e}" if curve.sigma is not None else "")
    )
    smallest = float(pooled.min())
    if smallest >= NARROW * float(audit.prior[1].min()) and curve.name != "unit variance":
        audit.bug(
            "sigma_range_restricted",
            f"no second output from {float(b[0]):g} to {float(b[-1]):g} gives a standard "
            f"deviation below {smallest:.4g}: a posterior can hardly be narrower than the prior",
            "let sigma reach zero: drop what is added to it, or bounds its logarithm from below",
            smallest_sigma=smallest, prior_std=float(audit.prior[1].min()),
        )  # fmt: skip


def _scan(audit: VAEAudit, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma (n, D) at those b for which the sampler returns numbers."""
    s = audit.sampler
    reason: AuditError | None = None
    for part in (b, b[b >= 0], b[b > 0], b[(b >= 0.05) & (b <= 12)], b[b.abs() <= 8], b[b < 0]):
        try:
            second = part[:, None].expand(-1, s.e)
            loc, sigma, off = s.measure(torch.zeros(len(part), s.d), second)
            good = (sigma.isfinite() & loc.isfinite()).all(1)
            if s.mode not in ("moments", "frozen") and bool(good.any()):
                limit = max(1e-5, 50 * s.rounding)
                if float(off[good & (sigma.abs().amax(1) > 0)].max()) > limit:
                    s.mode = "moments"
                    return _scan(audit, b)
        except AuditError as error:
            reason = reason or error
            continue
        return part[good], sigma[good]
    raise reason or AuditError("sample: it could not be called")


def _points(audit: VAEAudit) -> tuple[Tensor, Tensor]:
    """Random heads within the range that the sampler takes, (P, D) and (P, E)."""
    s = audit.sampler
    b, sigma = audit.scanned
    std = float(audit.prior[1].mean())
    usable = (b.abs() <= 6) & (sigma > 0.05 * std) & (sigma < 8 * std)
    usable = usable if bool(usable.any()) else b.abs() <= 2
    values = b[usable]
    generator = torch.Generator().manual_seed(5)
    which = torch.randint(len(values), (12, s.e), generator=generator)
    m = torch.randn(12, s.d, generator=generator, dtype=torch.float64)
    return audit.prior[0] + 1.5 * audit.prior[1] * m, values[which]


def check_mean(audit: VAEAudit) -> None:
    """E[z] against the mean head."""
    s = audit.sampler
    if audit.is_matrix or audit.scan is None:
        return
    mean, second = _points(audit)
    loc, sigma, _ = s.measure(mean, second)
    expected = mean
    if audit.has("documented_mean"):
        given = [audit.sandbox.to_input(t).reshape(12, *shape)
                 for t, shape in ((mean, s.latent), (second, s.second))]  # fmt: skip
        if audit.swapped:
            given.reverse()
        expected = audit.ask("documented_mean", *given).reshape(12, -1)
    if s.mode == "frozen":
        audit.unchecked.append("the mean of z: the noise is the same at every call")
        return
    chance = {
        "known": 0.0,
        "relative": 1.2 * s.scale_error,
        "moments": 6 / math.sqrt(s.averaged(12)),
    }[s.mode]
    limit = (0.002 + chance) * sigma.abs() + max(1e-6, 50 * s.rounding) * (1 + mean.abs())
    excess = (loc - expected).abs() / limit
    if not bool((excess <= 1).all()):
        i, j = divmod(int(excess.nan_to_num(1e9).argmax()), s.d)
        audit.bug(
            "sample_mean", f"the mean of z is {float(loc[i, j]):.5g} where "
            + ("the documentation says" if audit.has("documented_mean") else "the mean head says")
            + f" {float(expected[i, j]):.5g}",
            "add the noise to the mean itself: z = mean + sigma * eps, with eps of mean zero",
            mean_of_z=float(loc[i, j]), expected=float(expected[i, j]),
            sigma=float(sigma[i, j]), limit=float(limit[i, j]),
        )  # fmt: skip
    else:
        largest = float(((loc - expected).abs() / sigma.abs().clamp(min=1e-300)).max())
        audit.checked.append(f"the mean of z is the mean head, to {largest:.1e} sigma")


def check_noise(audit: VAEAudit) -> None:
    """Whether the noise is independent and standard normal."""
    s = audit.sampler
    shared = "draw noise of the mean's shape at every call: eps = torch.randn_like(mean)"
    if s.mode == "frozen":
        audit.bug(
            "noise_shared", "every call of sample draws the same noise",
            "seed once, outside sample", calls=2, different=0,
        )  # fmt: skip
        return
    if s.mode == "known" and s.stream.startswith("torch, one"):
        what = "dimensions" if "dimensions" in s.stream else "examples"
        audit.bug(
            "noise_shared", f"one draw of noise serves all {what}", shared,
            correlation=1.0,
        )  # fmt: skip
        return
    if s.mode == "known":
        audit.checked.append(f"the noise is standard normal and independent: {s.stream}")
        return
    n = s.many()
    e = s.reference_draw(n, 77)
    e = (e - e.mean(0)) / e.std(0).clamp(min=1e-300) if len(e) > 500 else e
    if not audit.is_matrix:
        if _rows_shared(audit, e, shared):
            return
        largest, limit = correlated(e)
        if abs(largest) > limit:
            audit.bug(
                "noise_shared", f"the noise of two dimensions has correlation {largest:.3g}",
                shared,
                correlation=largest, limit=limit,
            )  # fmt: skip
            e = e[:, :1]
    documented = audit.has("documented_mean") and not audit.findings  # E[z] is as documented
    name, numbers = noise_name(e[: max(1, 200_000 // e.shape[1])])
    audit.details["noise"] = {"source": s.stream or s.mode, "family": name, **numbers}
    if name != "normal":
        audit.find(
            "noise_not_gaussian", "warning" if documented else "bug",
            f"the injected noise is not normal but {name}: excess kurtosis "
            f"{numbers['excess_kurtosis']:.3g}, skewness {numbers['skewness']:.3g}",
            "draw it by torch.randn_like(mean)", family=name, **numbers,
        )  # fmt: skip
    else:
        audit.checked.append(
            f"the noise is normal: distance {numbers['distance']:.1e} from Phi, limit "
            f"{numbers['limit']:.1e}"
        )


def _rows_shared(audit: VAEAudit, e: Tensor, repair: str) -> bool:
    """Whether examples share their noise: all the same, or one with the next."""
    if e.shape[0] > 3 and bool((e[:8] == e[0]).all()):
        audit.bug("noise_shared", "one draw of noise serves all examples", repair,
                  correlation=1.0)  # fmt: skip
        return True
    half = len(e) // 2
    for lag in (1, half):
        pair = torch.stack([e[:-lag].flatten(), e[lag:].flatten()], 1)
        r, limit = correlated(pair)
        if abs(r) > limit:
            audit.find(
                "noise_shared", "warning" if r < 0 else "bug",
                f"the noise of examples {lag} apart has correlation {r:.3g}", repair,
                correlation=r, limit=limit,
            )  # fmt: skip
            return False
    return False


def _check_covariance(audit: VAEAudit, heads: Heads) -> None:
    """The covariance at the encoder's heads, where the second tensor holds a matrix."""
    s = audit.sampler
    mean, second = (t.flatten(1) for t in heads)
    loc, factor, error = s.measure_full(mean, second)
    audit.convention = "full covariance"
    audit.matrices = (loc, factor, error)
    covariance = factor @ factor.transpose(1, 2)
    diagonal = float(
        (covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))).abs().max()
    )
    audit.details["convention"] = {
        "name": "full covariance", "text": "full covariance", "bounds": [None, None],
        "floor": 0.0, "noise_scale": 1.0, "largest_off_diagonal": diagonal,
    }  # fmt: skip
    if s.second == (s.d, s.d):
        m = heads[1]
        lower = m.tril()
        diag = m.diagonal(dim1=1, dim2=2)
        forms = {
            "the second output is the Cholesky factor": lower @ lower.mT,
            "the second output is the covariance": m,
            "the second output is the Cholesky factor, its diagonal by exp": _cholesky(
                lower, diag.exp()
            ),
            "the second output is the Cholesky factor, its diagonal by softplus": _cholesky(
                lower, nn.functional.softplus(diag)
            ),
        }
        for words, form in forms.items():
            if float((form - covariance).abs().max()) < 0.05 * error + 1e-5:
                audit.details["convention"]["text"] = f"full covariance: {words}"
    limit = 0.002 + 6 * error
    if float((loc - mean).abs().max()) > limit * float(covariance.max().sqrt()) + 1e-5:
        audit.bug(
            "sample_mean", "the mean of z is not the mean head",
            "add the noise to the mean itself", off=float((loc - mean).abs().max()),
        )  # fmt: skip
    audit.checked.append("the covariance of z at the encoder's heads")


def _cholesky(lower: Tensor, diagonal: Tensor) -> Tensor:
    factor = lower.tril(-1) + torch.diag_embed(diagonal)
    return factor @ factor.mT


def check_scale(audit: VAEAudit) -> None:
    """Report a sigma that follows no reading, unless the KL has the same."""
    curve, has_kl = audit.curve, audit.has("kl")
    if audit.is_matrix or audit.scan is None:
        return
    scaled = abs(curve.noise_scale - 1) > 0.03
    named = curve.sigma is not None and not curve.name.startswith("exp(")
    if (named and not scaled) or (has_kl and audit.kl_fits):
        return
    if not named and has_kl and math.isnan(audit.kl_slope):
        return
    severity = "bug" if has_kl else "warning"
    if not named:
        text = (
            f"the standard deviation of z follows no reading of the second output ({curve.text})"
        )
        repair = "make it exp(b/2), exp(b) or softplus(b), and say which"
    else:
        k = curve.noise_scale
        text = f"the noise is {k:.5g} times what the reading {curve.name} says"
        repair = f"draw eps with a standard deviation of 1, not {k:.4g}, or put {k:.4g} into sigma"
    b, sigma = audit.scanned
    at = int((b - 1).abs().argmin())
    audit.find(
        "sample_scale", severity, text, repair, noise_scale=curve.noise_scale,
        at=float(b[at]), sigma=float(sigma[at]),
    )  # fmt: skip


def check_generation(audit: VAEAudit) -> None:
    """The moments of ``generate(n)`` against those of the prior."""
    d = audit.sampler.d if audit.has_sampler else None
    n = 20_000 if d is None or d <= 64 else 2000
    few = audit.ask("generate", 8)
    if few.ndim < 2 or len(few) != 8 or (d is not None and few[0].numel() != d):
        audit.unchecked.append(
            f"the prior of generation: generate(8) returns shape {tuple(few.shape)}, not "
            "draws of the latent"
        )
        return
    audit.sandbox.reseed(11)
    z = audit.ask("generate", n).flatten(1)
    if not bool(z.isfinite().all()):
        audit.bug("not_finite", "generate returns NaN or infinity",
                  "draw from the prior: mean + std * torch.randn")  # fmt: skip
        return
    mean, std = audit.prior if audit.has_sampler else (
        t.flatten().expand(z.shape[1]) for t in audit.given_prior)  # fmt: skip
    off = moments_differ(z, mean, std)
    if off:
        audit.bug(
            "prior_mismatch",
            f"generation draws z with mean {off['mean']:.4g} and standard deviation "
            f"{off['std']:.4g}; the prior of the KL has {off['expected_mean']:.4g} and "
            f"{off['expected_std']:.4g}",
            "draw z from the prior that the KL is taken to", **off,
        )  # fmt: skip
    else:
        audit.checked.append(f"generation: mean and standard deviation of the prior, {n} draws")
