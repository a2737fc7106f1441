"""What is sampled: sigma by its name, the mean, the noise, and the prior of generation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.case import Case
from musigma.audit.findings import AuditError
from musigma.audit.scales import name_curve
from musigma.audit.statistics import correlated, moments_differ, noise_name

__all__ = ["check_generation", "check_mean", "check_noise", "judge_scale", "name_scale"]

_STEPS = [0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 9.5, 12, 14, 16, 18, 22, 26,
          32, 40, 50, 60]  # fmt: skip
NARROW = 0.9  # a smallest sigma above this share of the prior's is a fault


def name_scale(case: Case, heads: Any) -> None:
    """Name sigma as a function of the second tensor."""
    s = case.measured_sampler
    if case.full:
        _covariance(case, heads)
        return
    b = torch.tensor(sorted({sign * x for x in [0.0, *_STEPS] for sign in (-1, 1)}))
    b, sigma = _scan(case, b.double())
    if len(b) < 3:
        case.find(
            "not_finite", "bug", "sample returns NaN or infinity for nearly every second "
            "output", "look at what it does with the second tensor",
        )  # fmt: skip
        return
    pooled = sigma.abs().mean(1) if s.mode != "moments" else sigma.square().mean(1).sqrt()
    turns = bool((sigma[b < 0] < 0).any()) and bool((sigma[b > 0] > 0).any())
    exact = s.mode != "moments"
    error = max(1e-6, 5 * s.rounding) if exact else 6 / math.sqrt(2 * s.averaged(51) * s.d)
    even = ((sigma.abs() - pooled[:, None]) / pooled[:, None].clamp(min=1e-300)).abs().max()
    if exact and float(even) > 100 * error:
        case.details["sigma_by_latent"] = (sigma.abs() / pooled[:, None]).mean(0).tolist()
    if float(pooled.max()) < 1e-12:
        case.find(
            "sample_scale", "bug", "z does not vary: its standard deviation is zero",
            "add sigma times standard normal noise to the mean", sigma=0.0,
        )  # fmt: skip
        return
    case.curve = curve = name_curve(b, pooled, error, s.scale_error)
    case.scan = (b, pooled)
    name = curve.name
    if name == "signed std" and heads is not None:
        second = heads[0 if case.swapped else 1]
        if bool((second > 0).all()) and second.numel() >= 24:
            name = "std"
    if name == "relu" and curve.floor:
        case.details["dead_below_zero"] = True
    case.convention = name
    case.details["convention"] = {
        **curve.to_dict(),
        "name": name,
        "text": curve.text.replace(curve.name, name, 1),
        "turns_noise": turns,
    }
    case.details["noise"] = {"source": s.stream or s.mode}
    case.checked.append(
        f"sigma at {len(b)} values of the second output from {float(b[0]):g} to "
        f"{float(b[-1]):g}: {curve.text.replace(curve.name, name, 1)}"
        + (f", to within {curve.error:.1e}" if curve.sigma is not None else "")
    )
    smallest = float(pooled.min())
    if smallest >= NARROW * float(case.prior[1].min()) and curve.name != "unit variance":
        case.find(
            "sigma_range_restricted", "bug",
            f"no second output from {float(b[0]):g} to {float(b[-1]):g} gives a standard "
            f"deviation below {smallest:.4g}: a posterior can hardly be narrower than the prior",
            "let sigma go to zero: drop what is added to it, or what keeps its logarithm above "
            "zero", smallest_sigma=smallest, prior_std=float(case.prior[1].min()),
        )  # fmt: skip


def _scan(case: Case, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma (n, D) at those b that the sampler takes and answers with numbers."""
    s = case.measured_sampler
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
                    return _scan(case, b)
        except AuditError as error:
            reason = reason or error
            continue
        return part[good], sigma[good]
    raise reason or AuditError("sample: it could not be called")


def _points(case: Case) -> tuple[Tensor, Tensor]:
    """Heads with every latent at random, within what the sampler takes (P, D), (P, E)."""
    s = case.measured_sampler
    b, sigma = case.scanned
    std = float(case.prior[1].mean())
    usable = (b.abs() <= 6) & (sigma > 0.05 * std) & (sigma < 8 * std)
    usable = usable if bool(usable.any()) else b.abs() <= 2
    values = b[usable]
    generator = torch.Generator().manual_seed(5)
    which = torch.randint(len(values), (12, s.e), generator=generator)
    m = torch.randn(12, s.d, generator=generator, dtype=torch.float64)
    return case.prior[0] + 1.5 * case.prior[1] * m, values[which]


def check_mean(case: Case) -> None:
    """E[z] against the mean head."""
    s = case.measured_sampler
    if case.full or case.scan is None:
        return
    mean, second = _points(case)
    loc, sigma, _ = s.measure(mean, second)
    expected = mean
    if case.documented_mean is not None:
        given = [case.guest.given(t).reshape(12, *shape)
                 for t, shape in ((mean, s.latent), (second, s.second))]  # fmt: skip
        if case.swapped:
            given.reverse()
        value = case.guest.call("documented_mean", case.documented_mean, *given)
        expected = case.guest.tensor("documented_mean", value).reshape(12, -1)
    if s.mode == "frozen":
        case.unchecked.append("the mean of z: the noise is the same at every call")
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
        case.find(
            "sample_mean", "bug",
            f"the mean of z is {float(loc[i, j]):.5g} where "
            + ("the documentation says" if case.documented_mean else "the mean head says")
            + f" {float(expected[i, j]):.5g}",
            "add the noise to the mean itself: z = mean + sigma * eps, with eps of mean zero",
            mean_of_z=float(loc[i, j]), expected=float(expected[i, j]),
            sigma=float(sigma[i, j]), limit=float(limit[i, j]),
        )  # fmt: skip
    else:
        largest = float(((loc - expected).abs() / sigma.abs().clamp(min=1e-300)).max())
        case.checked.append(f"the mean of z is the mean head, to {largest:.1e} sigma")


def check_noise(case: Case) -> None:
    """Whether the noise is independent and standard normal."""
    s = case.measured_sampler
    shared = "draw noise of the mean's shape at every call: eps = torch.randn_like(mean)"
    if s.mode == "frozen":
        case.find(
            "noise_shared", "bug", "every call of sample draws the same noise",
            "seed once, outside sample", calls=2, different=0,
        )  # fmt: skip
        return
    if s.mode == "known" and s.stream.startswith("torch, one"):
        what = "dimensions" if "dimensions" in s.stream else "examples"
        case.find(
            "noise_shared", "bug", f"one draw of noise serves all {what}", shared,
            correlation=1.0,
        )  # fmt: skip
        return
    if s.mode == "known":
        case.checked.append(f"the noise is standard normal and independent: {s.stream}")
        return
    n = s.many()
    e = s._reference(n, 77)
    e = (e - e.mean(0)) / e.std(0).clamp(min=1e-300) if len(e) > 500 else e
    if not case.full:
        if _rows_shared(case, e, shared):
            return
        largest, limit = correlated(e)
        if abs(largest) > limit:
            case.find(
                "noise_shared", "bug",
                f"the noise of two dimensions has correlation {largest:.3g}", shared,
                correlation=largest, limit=limit,
            )  # fmt: skip
            e = e[:, :1]
    said = case.documented_mean is not None and not case.findings  # E[z] is as they say
    name, numbers = noise_name(e[: max(1, 200_000 // e.shape[1])])
    case.details["noise"] = {"source": s.stream or s.mode, "family": name, **numbers}
    if name != "normal":
        case.find(
            "noise_not_gaussian", "warning" if said else "bug",
            f"the injected noise is not normal but {name}: excess kurtosis "
            f"{numbers['excess_kurtosis']:.3g}, skewness {numbers['skewness']:.3g}",
            "draw it by torch.randn_like(mean)", family=name, **numbers,
        )  # fmt: skip
    else:
        case.checked.append(
            f"the noise is normal: distance {numbers['distance']:.1e} from Phi, limit "
            f"{numbers['limit']:.1e}"
        )


def _rows_shared(case: Case, e: Tensor, repair: str) -> bool:
    """Whether examples share their noise: all the same, or one with the next."""
    if e.shape[0] > 3 and bool((e[:8] == e[0]).all()):
        case.find("noise_shared", "bug", "one draw of noise serves all examples", repair,
                  correlation=1.0)  # fmt: skip
        return True
    half = len(e) // 2
    for lag in (1, half):
        pair = torch.stack([e[:-lag].flatten(), e[lag:].flatten()], 1)
        r, limit = correlated(pair)
        if abs(r) > limit:
            case.find(
                "noise_shared", "warning" if r < 0 else "bug",
                f"the noise of examples {lag} apart has correlation {r:.3g}", repair,
                correlation=r, limit=limit,
            )  # fmt: skip
            return False
    return False


def _covariance(case: Case, heads: Any) -> None:
    """Samplers whose second tensor holds a matrix: the covariance, at the encoder's heads."""
    s = case.measured_sampler
    mean, second = (t.flatten(1) for t in heads)
    loc, factor, error = s.measure_full(mean, second)
    case.convention = "full covariance"
    case.matrices = (loc, factor, error)
    covariance = factor @ factor.transpose(1, 2)
    diagonal = float(
        (covariance - torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))).abs().max()
    )
    case.details["convention"] = {
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
                case.details["convention"]["text"] = f"full covariance: {words}"
    limit = 0.002 + 6 * error
    if float((loc - mean).abs().max()) > limit * float(covariance.max().sqrt()) + 1e-5:
        case.find(
            "sample_mean", "bug", "the mean of z is not the mean head",
            "add the noise to the mean itself", off=float((loc - mean).abs().max()),
        )  # fmt: skip
    case.checked.append("the covariance of z at the encoder's heads")


def _cholesky(lower: Tensor, diagonal: Tensor) -> Tensor:
    factor = lower.tril(-1) + torch.diag_embed(diagonal)
    return factor @ factor.mT


def judge_scale(case: Case, has_kl: bool) -> None:
    """A sigma that follows no reading: at fault, unless the KL knows of it."""
    curve = case.curve
    if case.sampler is None or case.full or case.scan is None:
        return
    scaled = abs(curve.noise_scale - 1) > 0.03
    named = curve.sigma is not None and not curve.name.startswith("exp(")
    if (named and not scaled) or (has_kl and case.kl_fits):
        return
    if not named and has_kl and case.kl_slope != case.kl_slope:
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
    b, sigma = case.scanned
    at = int((b - 1).abs().argmin())
    case.find(
        "sample_scale", severity, text, repair, noise_scale=curve.noise_scale,
        at=float(b[at]), sigma=float(sigma[at]),
    )  # fmt: skip


def check_generation(case: Case, generate: Any) -> None:
    """The moments of ``generate(n)`` against those of the prior."""
    d = case.sampler.d if case.sampler is not None else None
    n = 20_000 if d is None or d <= 64 else 2000
    few = case.guest.tensor("generate", case.guest.call("generate", generate, 8))
    if few.ndim < 2 or len(few) != 8 or (d is not None and few[0].numel() != d):
        case.unchecked.append(
            f"the prior of generation: generate(8) returns shape {tuple(few.shape)}, not "
            "draws of the latent"
        )
        return
    case.guest.reseed(11)
    z = case.guest.tensor("generate", case.guest.call("generate", generate, n))
    z = z.flatten(1)
    if not bool(z.isfinite().all()):
        case.find("not_finite", "bug", "generate returns NaN or infinity",
                  "draw from the prior: mean + std * torch.randn")  # fmt: skip
        return
    mean, std = case.prior if case.sampler is not None else (
        t.flatten().expand(z.shape[1]) for t in case.given_prior)  # fmt: skip
    off = moments_differ(z, mean, std)
    if off:
        case.find(
            "prior_mismatch", "bug",
            f"generation draws z with mean {off['mean']:.4g} and standard deviation "
            f"{off['std']:.4g}; the prior of the KL has {off['expected_mean']:.4g} and "
            f"{off['expected_std']:.4g}",
            "draw z from the prior that the KL is taken to", **off,
        )  # fmt: skip
    else:
        case.checked.append(f"generation: mean and standard deviation of the prior, {n} draws")
