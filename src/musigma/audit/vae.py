r"""The audit of a variational autoencoder that is given as callables.

The callables are put together to a training step, z = sample(encode(x)), loss = reconstruction +
KL, which `audit_step` examines. What no step shows is compared besides: the prior of the KL with
the given one and with that of generation.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
    Failed,
    Finding,
    Missing,
    Outcome,
    Passed,
    Skipped,
    bug,
    distance,
    has,
    warning,
)
from musigma.audit.jacobian import volume
from musigma.audit.latents import find_latents
from musigma.audit.moments import moments_differ
from musigma.audit.probes import Prober
from musigma.audit.runs import Runner
from musigma.audit.sandbox import Sandbox
from musigma.audit.step import examine
from musigma.audit.step_kl import UNKNOWN, Fit, View
from musigma.audit.vae_step import Moments, Parts, Prior

__all__ = ["audit_vae"]

ARGUMENTS = {"sample": ("mean", "second"), "kl": ("mean", "second", "z"), "decode": ("z",),
             "encode": ("x",), "recon": ("x", "x_hat")}  # fmt: skip
DRAWS = 20_000  # of generation
LARGEST = 64  # numbers in a latent, up to which matrices are compared


def audit_vae(
    encode: Callable[..., Any] | None = None,
    sample: Callable[..., Any] | None = None,
    kl: Callable[..., Any] | None = None,
    recon: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    generate: Callable[..., Any] | None = None,
    example: Tensor | None = None,
    prior: tuple[float | Tensor, float | Tensor] | Callable[..., Any] | Any = None,
    flow: Callable[..., Any] | None = None,
    kl_uses_sample: bool = False,
    documented_mean: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> AuditReport:
    r"""Whether a VAE's KL is the KL of what it samples, and its other parts are consistent.

    The model is restored to the bit.

    Args:
        encode: ``encode(x) -> (mean, second)``, or one packed tensor.
        sample: ``sample(mean, second) -> z``, or ``sample(packed) -> z``.
        kl: ``kl(mean, second[, z])``: a scalar, one number per example or one per dimension. With
            a flow, it takes z from `sample`, and may take z_K and log_det as well. Without `kl`
            the verdict is at best "incomplete".
        recon: ``recon(x, x_hat)``, the reconstruction term of the loss.
        decode: ``decode(z) -> x_hat``.
        generate: ``generate(n) -> z``, draws of the prior.
        example: A batch x; without `encode`, its shape is tried as that of a latent.
        prior: What KL and generation should use: a mean and a standard deviation, a distribution
            of torch, or a callable ``log_prob(z)`` that returns (B,); by default that of the KL.
        flow: ``flow(z) -> (z_K, log_det)``, which transforms what is sampled; the prior is that
            of z_K, and log_det is (B,).
        kl_uses_sample: Whether the KL takes z as well; with a flow it does.
        documented_mean: ``documented_mean(mean, second)``, the documented E[z].
        loss: ``loss(x)``, the whole loss; it is then examined in place of its terms.

    Raises:
        AuditError: If a callable raises, does not end, or returns something unexpected.

    Example:
        >>> def sample(mean, second):
        ...     return mean + second.exp() * torch.randn_like(mean)
        >>> def kl(mean, second):
        ...     return -0.5 * (1 + second - mean**2 - second.exp()).sum()
        >>> report = audit_vae(sample=sample, kl=kl)
        >>> report.verdict, report.convention, report.read_as, report.codes
        ('bug', 'log_std', 'log_var', ('kl_mismatch',))
    """
    functions = {
        "encode": encode, "sample": sample, "kl": kl, "recon": recon, "decode": decode,
        "generate": generate, "flow": flow, "documented_mean": documented_mean, "loss": loss,
    }  # fmt: skip
    if sample is None and kl is None and encode is None:
        raise AuditError(
            "audit_vae: expected at least `sample`, or `encode` and `kl`; got neither"
        )
    for name, fn in functions.items():
        if fn is not None and not callable(fn):
            raise AuditError(f"{name}: expected a callable; got {type(fn).__name__}")
    if encode is not None and example is None:
        raise AuditError("example: encode needs one; give a batch x")
    given = {name: fn for name, fn in functions.items() if fn is not None}
    with Sandbox(*given.values(), prior, as_is=True) as sandbox, torch.enable_grad():
        parts = Parts(sandbox, given, example, prior, kl_uses_sample)
        return AuditReport.of("VAE", _check(parts))


def _check(parts: Parts) -> Iterator[Outcome]:
    if not parts.has("sample"):
        yield Missing("what is sampled: there is no `sample`")
        return
    noisy = _enable_sampling(parts)
    found = _check_step(parts)
    if not noisy:
        found.append(_fixed_noise(parts))
    if parts.has("kl"):
        found, prior = _compare_prior(found, parts)
        yield from (*found, *_check_batch(parts))
    else:
        prior = (parts.prior or Prior(None, parts.latent)).moments
        yield from _without(found, Missing)
        yield Missing("the KL: there is no `kl`")
    if parts.has("documented_mean"):
        yield _check_mean(parts)
    if parts.has("generate"):
        yield _check_generation(parts, prior)
    else:
        yield Skipped("the prior of generation: there is no `generate`")
    for name, i in sorted(parts.sandbox.changed):
        if i < len(ARGUMENTS.get(name, ())):
            yield warning("inplace", name=name, argument=ARGUMENTS[name][i])
    yield from map(Assumed, parts.notes)


def _check_step(parts: Parts) -> list[Outcome]:
    """What is found in the loss; where it is not enough, in a step that is made of its terms."""
    failed: list[Outcome] = []
    if parts.has("loss"):
        found = list(examine(parts.loss, parts.sandbox))
        failed = [Missing(f"the loss: {o.line}") for o in found if isinstance(o, Missing)]
        if not failed:
            return found
    found = [*examine(parts.step, parts.sandbox), *failed]
    with torch.no_grad():
        z = parts.z(parts.heads())
        recon, given = parts.answer(z)
        kl = parts.divergence(parts.heads(), z) if parts.has("kl") else recon
    alike = (kl.ndim == 0) == (recon.ndim == 0)
    if not given:
        found.append(Skipped("the weight of the KL: there is no `recon`"))
    elif not alike:
        found.append(Skipped("the weight of the KL: one term is not reduced over the batch"))
    known = alike if given else parts.power is not None
    if parts.has("kl") and not given and parts.power not in (0.0, 1.0, None):
        growth = 8.0**parts.power
        found.append(warning("reduction_imbalance", "growth", growth=growth, examples=8))
    return found if known else _without(found, "reduction_imbalance")


def _without(outcomes: Iterable[Outcome], what: str | type[Outcome]) -> list[Outcome]:
    """Outcomes without the findings of a code, or without those of a type."""
    if isinstance(what, str):
        return [o for o in outcomes if not (isinstance(o, Finding) and o.code == what)]
    return [o for o in outcomes if not isinstance(o, what)]


def _enable_sampling(parts: Parts) -> bool:
    """Whether the sampler draws; one that does so in training mode only is put into that mode."""
    unchanged = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)

    def draws() -> bool:
        answers = []
        for seed in (1, 2):
            parts.sandbox.reseed(seed)
            with torch.no_grad():
                answers.append(parts.z(parts.heads()))
        return not torch.equal(*answers)

    if draws():
        return True
    layers = [m for m in parts.sandbox.layers() if not isinstance(m, unchanged)]
    modes = [m.training for m in layers]
    for module in layers:
        module.training = True
    if draws():
        parts.notes.append("it samples in training mode only, and is audited in that mode")
        return True
    for module, mode in zip(layers, modes, strict=True):
        module.training = mode
    return False


def _fixed_noise(parts: Parts) -> Finding:
    """The bug of a sampler that returns the same at every call: no noise, or always the same."""
    with torch.no_grad():
        alike = tuple(t.detach()[:1].expand_as(t) for t in parts.heads())
        z = parts.z(alike)
    if (z == z[:1]).all():
        return bug("sample_scale", "no_noise", sigma=0.0)
    return bug("noise_shared", "calls", calls=2, different=0)


# --- the prior ----------------------------------------------------------------------------------


def _is_of_prior(o: Outcome) -> bool:
    """Whether a line says that the prior, or the KL to it, is not a known one."""
    about = ("the KL of z", "the prior of")
    return isinstance(o, Missing) and not isinstance(o, Failed) and o.line.startswith(about)


def _compare_prior(found: list[Outcome], parts: Parts) -> tuple[list[Outcome], Moments | None]:
    """What was found, in the light of the given prior; and the moments of that of the KL."""
    fit, weight = _measure(parts)
    if fit.size == 0:
        return [*found, bug("kl_constant")], None
    if parts.prior is None:
        return found, _moments(fit, parts) if fit.is_kl else None
    prior, d = parts.prior, math.prod(parts.latent)
    flow = list(_check_flow(parts))
    found = [*found, *flow]
    if has(flow, "logdet_mismatch"):
        return found, prior.moments
    by_draws = parts.kl_uses_sample or parts.has("flow")
    full = not (by_draws or prior.is_product)
    if full and (d > LARGEST or not _is_quadratic(prior, parts.latent)):
        if fit.is_kl:  # to a Gaussian, which the given prior is not
            return [*found, bug("kl_mismatch", "prior")], prior.moments
        why = Missing("the prior of the KL: a closed form to this prior is not compared")
        return [*_without(found, "kl_mismatch"), why], prior.moments
    of_one = len(parts.target) ** ((1.0 if parts.power is None else parts.power) - 1)
    fit, _ = _measure(parts, of_one if math.isnan(weight) else weight, full)
    if fit.is_kl and fit.is_standard:
        convention = next((o.convention for o in found if isinstance(o, Facts)), None)
        found = [
            Facts(read_as=convention),
            *(o for o in _without(found, "kl_mismatch") if not _is_of_prior(o)),
            Passed("the KL is that to the given prior"),
        ]  # fmt: skip
    elif not has(found, "kl_mismatch"):
        found.append(bug("kl_mismatch", "prior"))
    return found, prior.moments


def _measure(parts: Parts, weight: float = 0.0, full: bool = False) -> tuple[Fit, float]:
    """The coefficients of the KL alone, and its weight; NaN where it is not known.

    With a weight, the given prior is replaced by N(0, 1). `full`: averages are exact for terms in
    which the latents are multiplied with each other.
    """
    step = functools.partial(parts.kl_to_normal, weight)
    run = Runner(parts.sandbox, step).again()
    latents = find_latents(run.graph, run.loss) if run is not None else []
    if run is None or len(latents) != 1:
        return UNKNOWN, math.nan
    latent = replace(latents[0], diagonal=False) if full else latents[0]
    view = View(Prober(run.graph, latent), run.loss, {})
    if view.fit.is_kl or view.probes is None or view.log_q is None:
        return view.fit, view.fit.weight if view.fit.is_kl else math.nan
    return view.fit, view.log_q.weight


def _moments(fit: Fit, parts: Parts) -> Moments | None:
    """The moments of a Gaussian prior, if it is the same for all examples."""
    d, found = math.prod(parts.latent), []
    for t in fit.prior:
        rows = t.reshape(-1, d) if t.numel() % d == 0 else t[:, None]
        if not t.numel() or not (rows - rows[:1]).abs().max() < 1e-4:
            return None
        found.append(rows[0].expand(d))
    return found


def _is_quadratic(prior: Prior, latent: tuple[int, ...]) -> bool:
    """Whether a log-density is of second degree, by its third differences."""
    generator = torch.Generator().manual_seed(4)
    z, step = torch.randn(2, 16, *latent, generator=generator, dtype=torch.float64)
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        a, b, c, d = (prior.log_prob(z + k * step) for k in range(4))
        return bool((d - 3 * c + 3 * b - a).abs().max() < 1e-4 * d.abs().max())
    return False


def _check_flow(parts: Parts) -> Iterator[Outcome]:
    """Whether the flow's log-determinants are those of autograd's Jacobian."""
    if not parts.has("flow") or math.prod(parts.latent) > LARGEST:
        return
    z = torch.randn(4, *parts.latent, generator=torch.Generator().manual_seed(6))
    stated = parts.pushed(z)[1].detach().expand(4)
    known = volume(lambda z: parts.pushed(z)[0].flatten(1), z)
    assert known is not None  # as there are few elements
    off = (known.log_det - stated).abs() / (1 + known.log_det.abs())
    w = int(off.argmax())
    if off[w] > 1e-3:
        true = known.log_det[w]
        yield bug("logdet_mismatch", "posterior_flow", log_det=stated[w], expected=true)
    else:
        yield Passed(f"the log-determinant of the flow, against autograd: {float(off[w]):.1e}")


# --- other checks -------------------------------------------------------------------------------


@torch.no_grad()
def _check_batch(parts: Parts) -> Iterator[Outcome]:
    """Whether the KL of an example depends on the others in its batch."""
    heads = parts.heads()
    z = parts.z(heads)
    parts.sandbox.reseed()
    kl = parts.divergence(heads, z)
    if kl.ndim == 0 or len(kl) != len(z) or len(z) < 3:
        return

    def others(t: Tensor) -> Tensor:
        return torch.cat([t[:1], t[1:2].expand_as(t[1:])])

    parts.sandbox.reseed()
    again = parts.divergence(tuple(others(t) for t in heads), others(z))
    if distance(again[:1], kl[:1]) > 1e-4:
        yield bug("cross_sample", "kl")


@torch.no_grad()
def _check_mean(parts: Parts) -> Outcome:
    """E[z] of many draws against the documented mean."""
    heads = parts.heads()
    z = torch.stack([parts.z(heads) for _ in range(1000)]).double()
    expected = parts.call("documented_mean", *heads).reshape(z.shape[1:])
    off = (z.mean(0) - expected).abs() / (z.std(0) / math.sqrt(len(z))).clamp(min=1e-9)
    if off.max() > 7:
        at = off.flatten().argmax()
        mean, documented = z.mean(0).flatten()[at], expected.flatten()[at]
        return bug("sample_mean", mean_of_z=mean, expected=documented)
    return Passed(f"the mean of z is the documented one, over {len(z)} draws")


def _check_generation(parts: Parts, moments: Moments | None) -> Outcome:
    """The moments of ``generate(n)`` against those of the prior."""
    few = parts.call("generate", 8)
    if not isinstance(few, Tensor) or few.ndim < 2 or few[0].numel() != math.prod(parts.latent):
        shape = tuple(getattr(few, "shape", ()))
        return Skipped(
            f"the prior of generation: generate(8) returns shape {shape}, not draws of the latent"
        )
    if moments is None:
        return Skipped("the prior of generation: the moments of the prior are not known")
    n = DRAWS if few[0].numel() <= 64 else DRAWS // 10
    parts.sandbox.reseed(11)
    z = parts.call("generate", n).detach().flatten(1).double()
    if not z.isfinite().all():
        return bug("not_finite", "generate")
    if off := moments_differ(z, moments[0].double(), moments[1].double()):
        return bug("prior_mismatch", **off)
    return Passed(f"generation: mean and standard deviation of the prior, {n} draws")
