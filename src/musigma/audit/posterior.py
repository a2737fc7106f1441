"""Checks of what is sampled: sigma by its name, mean, noise, the encoder's heads, generation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder
from musigma.audit.sampler import Sampler
from musigma.audit.sandbox import Sandbox, by_float_type, first_form
from musigma.audit.scales import name_curve
from musigma.audit.statistics import correlated, covariance_differs, moments_differ, noise_name
from musigma.audit.vae_state import FullPosterior, Heads, Posterior, Prior, VAEAudit

__all__ = [
    "audit_aggregate",
    "check_generation",
    "check_heads",
    "check_noise",
    "check_scale",
    "full_posterior",
    "measured_posterior",
]

NARROW = 0.9  # a smallest sigma above this share of the prior's is a bug

_STEPS = [0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 9.5, 12, 14, 16, 18, 22, 26,
          32, 40, 50, 60]  # fmt: skip


def measured_posterior(audit: VAEAudit, s: Sampler) -> Posterior | None:
    """Measure sigma, and name it as a function of the second tensor; None if there is none."""
    steps = torch.tensor([*(-x for x in reversed(_STEPS)), 0.0, *_STEPS], dtype=torch.float64)
    b, sigma = _scan(s, steps)
    if len(b) < 3:
        audit.bug("not_finite", "sample_nearly")
        return None
    exact = s.mode != "moments"
    pooled = sigma.abs().mean(1) if exact else sigma.square().mean(1).sqrt()
    if pooled.max() < 1e-12:
        audit.bug("sample_scale", "still", sigma=0.0)
        return None
    error = max(1e-6, 5 * s.rounding) if exact else 6 / math.sqrt(2 * s.averaged(51) * s.d)
    off = (sigma.abs() - pooled[:, None]) / pooled[:, None].clamp(min=1e-300)
    q = Posterior(s, b, pooled, name_curve(b, pooled, error, s.scale_error))
    if exact and off.abs().max() > 100 * error:
        q.even = False
        audit.details["sigma_by_latent"] = (1 + off).mean(0).tolist()
    curve, name = q.curve, q.curve.name
    if name == "signed std" and audit.heads is not None:
        seconds = [audit.heads[1]]
        if audit.sandbox.modules:
            seconds += [heads[1] for heads in audit.random_heads((0.3, 0.7, 0.7))]
        second = torch.cat(seconds)
        name = "std" if (second > 0).all() and second.numel() >= 24 else name
    if name == "relu" and curve.floor:
        audit.details["dead_below_zero"] = True
    audit.convention, text = name, curve.text.replace(curve.name, name, 1)
    turns = bool((sigma[b < 0] < 0).any() and (sigma[b > 0] > 0).any())
    named = {"name": name, "text": text, "turns_noise": turns}
    audit.details["convention"] = curve.to_dict() | named
    audit.details["noise"] = {"source": s.stream or s.mode}
    ends = f"from {b[0]:g} to {b[-1]:g}"
    audit.checked.append(
        f"sigma at {len(b)} values of the second output {ends}: {text}"
        + (f", to within {curve.error:.1e}" if curve.named else "")
    )
    smallest, std = float(pooled.min()), float(audit.prior.std.min())
    if smallest >= NARROW * std and name != "unit variance":
        audit.bug("sigma_range_restricted", ends=ends, smallest_sigma=smallest, prior_std=std)
    _check_mean(audit, q)
    return q


def _scan(s: Sampler, b: Tensor) -> tuple[Tensor, Tensor]:
    """The values b for which the sampler returns numbers, and sigma (n, D) at each."""

    def attempt(part: Tensor) -> tuple[Tensor, Tensor]:
        second = part[:, None].expand(-1, s.e)
        loc, sigma, off = s.measure(torch.zeros(len(part), s.d), second)
        good = (sigma.isfinite() & loc.isfinite()).all(1)
        moved = off[good & (sigma.abs().amax(1) > 0)]
        straight = bool((moved <= max(1e-5, 50 * s.rounding)).all())
        if s.mode not in ("moments", "frozen") and not straight:
            s.mode = "moments"
            return _scan(s, b)
        return part[good], sigma[good]

    middle = (b >= 0.05) & (b <= 12)
    parts = (b, b[b >= 0], b[b > 0], b[middle], b[b.abs() <= 8], b[b < 0])
    return first_form(((part,) for part in parts), attempt)[1]


def _check_mean(audit: VAEAudit, q: Posterior) -> None:
    """E[z] against the mean head, at random heads within the range that the sampler takes."""
    s, prior = q.sampler, audit.prior
    if s.mode == "frozen":
        audit.unchecked.append("the mean of z: the noise is the same at every call")
        return
    std = float(prior.std.mean())
    usable = (q.b.abs() <= 6) & (q.sigma > 0.05 * std) & (q.sigma < 8 * std)
    values = q.b[usable if usable.any() else q.b.abs() <= 2]
    generator = torch.Generator().manual_seed(5)
    second = values[torch.randint(len(values), (12, s.e), generator=generator)]
    m = torch.randn(12, s.d, generator=generator, dtype=torch.float64)
    mean = prior.mean + 1.5 * prior.std * m
    loc, sigma, _ = s.measure(mean, second)
    expected, source = mean, "the mean head"
    if audit.has("documented_mean"):
        given = ((mean, s.latent), (second, s.second))
        given = [audit.sandbox.to_input(t).reshape(12, *shape) for t, shape in given]
        expected = audit.ask("documented_mean", *given).reshape(12, -1)
        source = "the documentation"
    chance = {
        "known": 0.0,
        "relative": 1.2 * s.scale_error,
        "moments": 6 / math.sqrt(s.averaged(12)),
    }[s.mode]
    limit = (0.002 + chance) * sigma.abs() + max(1e-6, 50 * s.rounding) * (1 + mean.abs())
    excess = (loc - expected).abs() / limit
    if (excess <= 1).all():
        largest = float(((loc - expected).abs() / sigma.abs().clamp(min=1e-300)).max())
        audit.checked.append(f"the mean of z is {source}, to {largest:.1e} sigma")
        return
    at = divmod(int(excess.nan_to_num(1e9).argmax()), s.d)
    q.unbiased = False
    numbers: dict[str, Any] = {"mean_of_z": loc[at], "expected": expected[at], "sigma": sigma[at]}
    audit.bug("sample_mean", source=source, **numbers, limit=limit[at])


def check_noise(audit: VAEAudit, s: Sampler) -> None:
    """Whether the noise is independent and standard normal."""
    if s.mode == "frozen":
        audit.bug("noise_shared", "calls", calls=2, different=0)
        return
    if s.mode == "known" and s.stream.startswith("torch, one"):
        what = "dimensions" if "dimensions" in s.stream else "examples"
        audit.bug("noise_shared", what=what, correlation=1.0)
        return
    if s.mode == "known":
        audit.checked.append(f"the noise is standard normal and independent: {s.stream}")
        return
    e = s.reference_draw(s.many(), 77)
    e = (e - e.mean(0)) / e.std(0).clamp(min=1e-300) if len(e) > 500 else e
    if not s.is_matrix:
        if len(e) > 3 and (e[:8] == e[0]).all():
            audit.bug("noise_shared", what="examples", correlation=1.0)
            return
        for lag in (1, len(e) // 2):
            r, limit = correlated(torch.stack([e[:-lag].flatten(), e[lag:].flatten()], 1))
            if abs(r) > limit:
                severity, what = "warning" if r < 0 else "bug", f"examples {lag} apart"
                audit.find(
                    "noise_shared", severity, "correlated", what=what, correlation=r, limit=limit
                )
                break
        r, limit = correlated(e)
        if abs(r) > limit:
            what = "two dimensions"
            audit.bug("noise_shared", "correlated", what=what, correlation=r, limit=limit)
            e = e[:, :1]
    documented = audit.has("documented_mean") and not audit.findings  # E[z] is as documented
    name, numbers = noise_name(e[: max(1, 200_000 // e.shape[1])])
    audit.details["noise"] = {"source": s.stream or s.mode, "family": name, **numbers}
    if name != "normal":
        severity = "warning" if documented else "bug"
        audit.find("noise_not_gaussian", severity, family=name, **numbers)
    else:
        audit.checked.append(
            f"the noise is normal: distance {numbers['distance']:.1e} from Phi, limit "
            f"{numbers['limit']:.1e}"
        )


def full_posterior(audit: VAEAudit, s: Sampler, heads: Heads) -> FullPosterior:
    """Measure and check the covariance at heads (P, ...) whose second tensor is a matrix.

    The heads are also those under a few sets of random parameters.
    """
    pairs = [heads, *audit.random_heads([0.7] * -(-32 // len(heads[0])))]
    mean, second = (torch.cat(p) for p in zip(*pairs, strict=True))
    loc, factor, error = s.measure_full(mean.flatten(1), second.flatten(1))
    covariance = factor @ factor.mT
    off_diagonal = covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    text = audit.convention = "full covariance"
    if s.second == (s.d, s.d):
        below, diagonal = second.tril(-1), second.diagonal(dim1=1, dim2=2)
        factors = {"": diagonal, ", its diagonal by exp": diagonal.exp(),
                   ", its diagonal by softplus": softplus(diagonal)}  # fmt: skip
        lower = {words: below + torch.diag_embed(values) for words, values in factors.items()}
        forms = {f"Cholesky factor{words}": t @ t.mT for words, t in lower.items()}
        for words, form in {**forms, "covariance": second}.items():
            if (form - covariance).abs().max() < 0.05 * error + 1e-5:
                text = f"full covariance: the second output is the {words}"
    audit.details["convention"] = {
        "name": "full covariance",
        "text": text,
        "bounds": [None, None],
        "floor": 0.0,
        "noise_scale": 1.0,
        "largest_off_diagonal": float(off_diagonal.abs().max()),
    }
    off = (loc - mean.flatten(1)).abs()
    if off.max() > (0.002 + 6 * error) * float(covariance.max().sqrt()) + 1e-5:
        audit.bug("sample_mean", "full", off=off.max())
    audit.checked.append("the covariance of z at the encoder's heads")
    return FullPosterior(s, (mean, second), loc, factor, error)


def check_scale(audit: VAEAudit, q: Posterior | FullPosterior) -> None:
    """Report a sigma that follows no reading, unless the KL has the same."""
    if q.curve is None:
        return
    curve, has_kl = q.curve, audit.has("kl")
    k, named = curve.noise_scale, curve.named and not curve.name.startswith("exp(")
    if (named and abs(k - 1) <= 0.03) or (has_kl and audit.kl_fits):
        return
    if not named and has_kl and math.isnan(audit.kl_slope):
        return
    at = int((q.b - 1).abs().argmin())
    numbers: dict[str, Any] = {"noise_scale": k, "at": q.b[at], "sigma": q.sigma[at]}
    variant = "factor" if named else ""
    words = {"reading": curve.name, "curve": curve.text}
    audit.find("sample_scale", "bug" if has_kl else "warning", variant, **words, **numbers)


def check_generation(audit: VAEAudit) -> None:
    """The moments of ``generate(n)`` against those of the prior."""
    d = audit.latents
    few = audit.ask("generate", 8)
    if few.ndim < 2 or len(few) != 8 or (d is not None and few[0].numel() != d):
        audit.unchecked.append(
            f"the prior of generation: generate(8) returns shape {tuple(few.shape)}, not "
            "draws of the latent"
        )
        return
    prior = audit.prior if d else Prior(audit.given_prior, few.shape[1:], audit.sandbox)
    n = 20_000 if d is None or d <= 64 else 2000
    audit.sandbox.reseed(11)
    z = audit.ask("generate", n).flatten(1)
    if not z.isfinite().all():
        audit.bug("not_finite", "generate")
    elif not prior.known:
        audit.unchecked.append("the prior of generation: the moments of `prior` are not known")
    elif off := moments_differ(z, prior.mean, prior.std):
        audit.bug("prior_mismatch", **off)
    else:
        audit.checked.append(f"generation: mean and standard deviation of the prior, {n} draws")


# --- the encoder's heads ------------------------------------------------------------------------


def check_heads(audit: VAEAudit, q: Posterior | FullPosterior | None) -> None:
    """Whether the two heads differ, and the range that they reach, under random parameters."""
    d = audit.latents or 1
    count = max(4, -(-40 // d)) - 1
    pairs = [audit.encoded(), *audit.random_heads([0.3, *[5.0] * (count - 1)])]
    if audit.sandbox.modules:
        audit.checked.append(f"the heads under {len(pairs) - 1} sets of random parameters")
    else:
        audit.unchecked.append("the heads under random parameters: no module was found")
    if q is not None and q.curve is not None and q.curve.name == "unit variance":
        return
    if pairs and all(m.shape == s.shape and m.numel() > 1 for m, s in pairs):
        m, s = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
        same = bool(((m - s).abs() <= 1e-9 * (m.abs() + 1e-12)).all())
        if m.std() > 1e-12 and (same or _is_one_function(m, s, d)):
            audit.bug("heads_tied", "same" if same else "", compared=m.numel())
    enough = len(pairs) >= 4 and (len(pairs) - 1) * d >= 36
    if q is None or q.curve is None or not audit.sandbox.modules or not enough:
        return
    with contextlib.suppress(AuditError):
        heads = [[head.flatten(1)[:8] for head in pair] for pair in pairs[1:]]
        sigma = torch.cat([q.sampler.measure(0 * mean, second)[1].abs() for mean, second in heads])
        smallest = float(sigma.min())
        if sigma.std() > 1e-9 and smallest >= NARROW * float(audit.prior.std.min()):
            numbers: dict[str, Any] = {"smallest_sigma": smallest, "compared": sigma.numel()}
            audit.bug("sigma_range_restricted", "encoder", **numbers)


def _is_one_function(m: Tensor, s: Tensor, d: int) -> bool:
    """Whether s is one strictly monotone function of m, for all latents and parameters."""
    order = m.argsort()
    steps = s[order].diff()
    distinct = m[order].diff() > 1e-9 * m.abs().max()
    if d < 2 or int(distinct.sum()) < 60 or s.std() < 1e-12:
        return False
    return bool((steps[distinct] > 0).all() or (steps[distinct] < 0).all())


# --- the aggregate posterior ---------------------------------------------------------------------


DRAWS = 40_000


def audit_aggregate(
    covariance: Tensor | Callable[[], Tensor], sample: Tensor | Callable[[int], Tensor]
) -> AuditReport:
    r"""Whether a claimed covariance of the aggregate posterior is that of its draws.

    By the law of total variance, with encoder mean mu(x) and variance S(x),

        Cov[z] = E[S(x)] + Cov[mu(x)].

    Args:
        covariance: The claimed matrix (D, D), or a callable that returns it.
        sample: ``sample(n)``: draws of the aggregate posterior (n, D); or the draws themselves.

    Raises:
        AuditError: If shapes do not fit, or a callable raises.

    Example:
        >>> torch.manual_seed(0) and None
        >>> report = audit_aggregate(torch.eye(2), lambda n: 2 * torch.randn(n, 2))
        >>> report.verdict, report.codes
        ('bug', ('aggregate_cov',))
    """

    def called(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with Sandbox(covariance, sample) as sandbox, torch.no_grad():
            sandbox.use_dtype(dtype)
            given = (("covariance", covariance, ()), ("sample", sample, (DRAWS,)))
            values = [
                (name, sandbox.call(name, t, *args) if callable(t) else t)
                for name, t, args in given
            ]
            claimed, z = (sandbox.as_tensor(name, value) for name, value in values)
            return claimed, z

    claimed, z = by_float_type(called)
    z = z.flatten(1) if z.ndim > 1 else z[:, None]
    d = z.shape[1]
    if claimed.ndim == 1 and len(claimed) == d:
        claimed = torch.diag(claimed)
    if claimed.shape != (d, d):
        raise AuditError(
            f"covariance: expected shape ({d}, {d}), as sample returns {d} numbers a draw; got "
            f"{tuple(claimed.shape)}"
        )
    report = ReportBuilder("aggregate posterior")
    if not (z.isfinite().all() and claimed.isfinite().all()):
        report.bug("not_finite", "aggregate")
        return report.build()
    excess = min(covariance_differs(half, claimed)[0] for half in z.tensor_split(2))
    sampled = covariance_differs(z, claimed)[1]
    scale = (sampled.diag()[:, None] * sampled.diag()[None]).sqrt()
    off, n = float(((sampled - claimed).abs() / scale.clamp(min=1e-300)).max()), len(z)
    report.checked.append(f"covariance of {n} draws: off by at most {off:.3g}, as a correlation")
    if excess > 1:
        both: Any = {"sampled": sampled.tolist(), "claimed": claimed.tolist()}
        report.bug("aggregate_cov", draws=n, off=off, over_limit=excess, **both)
    return report.build()
