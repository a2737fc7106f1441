r"""The audit of a variational autoencoder, given as callables.

It asks what the sampler does, z = mean + sigma(second) e, by scanning the second tensor; whether
the KL is that of the Gaussian so sampled, by regression; and whether prior, noise, heads and
weights are what they should be. Nothing is known of the model but what its callables return.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.balance import on_data
from musigma.audit.case import Case
from musigma.audit.compare import check_kl
from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.heads import check_heads, encoded, varied
from musigma.audit.layouts import arguments, find_packing
from musigma.audit.probes import Guest, TooSlowError, about_types
from musigma.audit.sampled import (
    check_generation,
    check_mean,
    check_noise,
    judge_scale,
    name_scale,
)
from musigma.audit.sampling import Sampler

__all__ = ["audit_vae"]

SIZES = (6, 2, 4, 8, 16, 20, 32, 10, 64, 3, 5, 128, 1)  # of a latent, where nothing tells it


def audit_vae(
    encode: Callable[..., Any] | None = None,
    sample: Callable[..., Any] | None = None,
    kl: Callable[..., Any] | None = None,
    recon: Callable[..., Any] | None = None,
    decode: Callable[..., Any] | None = None,
    generate: Callable[..., Any] | None = None,
    example: Tensor | None = None,
    prior: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    kl_uses_sample: bool = False,
    documented_mean: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
) -> AuditReport:
    r"""What a VAE samples, what its KL is the KL of, and whether the two agree.

    Everything is decided in float64 where the model allows it, at a chance of false alarm below
    1e-6 for each check. The model is afterwards what it was, to the bit.

    Args:
        encode: ``encode(x) -> (mean, second)``, or one packed tensor.
        sample: ``sample(mean, second) -> z``, or ``sample(packed) -> z``.
        kl: ``kl(mean, second[, z])``: a scalar, one number per example or one per dimension.
        recon: ``recon(x, x_hat)``, the reconstruction term of the loss.
        decode: ``decode(z) -> x_hat``.
        generate: ``generate(n) -> z``, draws of the prior.
        example: A batch x; without `encode`, its shape is tried for that of a latent.
        prior: Mean and standard deviation that KL and generation should use.
        kl_uses_sample: Whether the KL takes z too.
        documented_mean: ``documented_mean(mean, second)``: what E[z] is said to be; by default the
            mean itself.
        loss: ``loss(x)``, the whole loss.

    Raises:
        AuditError: If a callable raises, does not end, or returns what it should not.

    Example:
        >>> def sample(mean, second):
        ...     return mean + second.exp() * torch.randn_like(mean)
        >>> def kl(mean, second):
        ...     return -0.5 * (1 + second - mean**2 - second.exp()).sum()
        >>> report = audit_vae(sample=sample, kl=kl)
        >>> report.verdict, report.convention, report.read_as, report.codes
        ('bug', 'log_std', 'log_var', ('kl_mismatch',))
    """
    if sample is None and kl is None and encode is None:
        raise AuditError(
            "audit_vae: expected at least `sample`, or `encode` and `kl`; got neither"
        )
    for name, given in [("encode", encode), ("sample", sample), ("kl", kl), ("recon", recon),
                        ("decode", decode), ("generate", generate), ("loss", loss)]:  # fmt: skip
        if given is not None and not callable(given):
            raise AuditError(f"{name}: expected a callable; got {type(given).__name__}")
    if encode is not None and example is None:
        raise AuditError("example: encode needs one; give a batch x")
    dtype, gradients, first = torch.float64, False, None
    for _ in range(3):
        parts = (encode, sample, kl, recon, decode, generate, documented_mean, loss)
        with Guest(*parts) as guest, torch.set_grad_enabled(gradients):
            if dtype != torch.float64:
                guest.use(dtype)
            case = Case(guest, example, prior, kl_uses_sample, documented_mean)
            try:
                return _run(case, encode, sample, kl, recon, decode, generate, loss)
            except AuditError as error:
                first = first or error
                reason = str(error)
                if "does not require grad" in reason and not gradients:
                    gradients = True
                elif dtype == torch.float64 and about_types(error):
                    dtype = torch.float32
                else:
                    raise
    raise first or AuditError("audit_vae: it could not be called")


class _Refused(Exception):
    """A callable did not take what it was tried with."""


def _run(case: Case, encode, sample, kl, recon, decode, generate, loss) -> AuditReport:
    case.heads = heads = heads_of(case, encode, sample)
    if sample is None:
        case.unchecked.append("what is sampled: there is no `sample`")
    elif prepare(case, heads, sample, kl, decode, generate):
        if case.full and heads is not None:
            heads = varied(case, encode, heads)
        name_scale(case, heads)
        check_mean(case)
        check_noise(case)
    if kl is None:
        case.unchecked.append("the KL: there is no `kl`")
    elif case.sampler is not None and (case.scan is not None or case.matrices is not None):
        check_kl(case, kl, heads)
    elif sample is not None:
        case.unchecked.append("the KL: what is sampled could not be told")
    judge_scale(case, kl is not None)
    if generate is None:
        case.unchecked.append("the prior of generation: there is no `generate`")
    else:
        check_generation(case, generate)
    if recon is None:
        case.unchecked.append("the weight of the KL: there is no `recon`")
    if encode is not None:
        on_data(case, encode, sample, kl, recon, decode, loss)
        check_heads(case, encode)
    return case.report()


def heads_of(case: Case, encode: Any, sample: Any) -> tuple[Tensor, Tensor] | None:
    if encode is None:
        return None
    x = case.given
    value = case.guest.call("encode", encode, x.clone())
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, Tensor):
        packed = case.guest.tensor("encode", value)
        if sample is not None and arguments(sample) == 1:
            _unlock(case, lambda: sample(case.guest.given(packed)))
            case.packing = find_packing(case.guest, sample, packed)
            case.layout = case.packing.name
            case.checked.append(f"layout: {case.layout}, by moving one number at a time")
        else:
            case.layout = "packed; sample takes two tensors, so who splits it is not known"
            case.unchecked.append(f"layout: {case.layout}")
    mean, second = encoded(case, encode, x)
    case.layout = case.layout or "two tensors, mean first"
    if not bool(mean.isfinite().all() and second.isfinite().all()):
        case.find(
            "not_finite", "bug", "encode returns NaN or infinity for the given example",
            "look at the encoder's first layer that returns NaN",
            finite_share=float(mean.isfinite().double().mean()),
        )  # fmt: skip
    return mean, second


def _unlock(case: Case, call: Callable[[], Any]) -> None:
    """Have samplers sample that only do so in training; norms and dropout stay as they are."""
    quiet = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    with contextlib.suppress(_Refused):
        if _draws(case, call):
            return
        for root in case.guest.modules:
            for module in root.modules():
                if not isinstance(module, quiet):
                    module.training = True
        if not _draws(case, call):
            for root in case.guest.modules:
                root.eval()
        else:
            case.assumed.append("it samples in training mode only, and was looked at in that")


def _draws(case: Case, call: Callable[[], Any]) -> bool:
    """Whether two calls differ."""
    answers = []
    for seed in (1, 2):
        case.guest.reseed(seed)
        try:
            z = case.guest.call("sample", call)
            z = z[0] if isinstance(z, (tuple, list)) else z
            answers.append(case.guest.tensor("sample", z))
        except TooSlowError:
            raise
        except AuditError as error:
            raise _Refused from error
    return not torch.equal(*answers)


def _of_latents(t: Tensor, latent: tuple[int, ...]) -> Tensor:
    """A prior's mean or standard deviation for each flat latent."""
    d = math.prod(latent)
    if t.numel() == d:
        return t.reshape(d)
    while t.ndim > len(latent) and len(t) == 1:
        t = t[0]
    return t.expand(latent).reshape(d)


def _shapes(case: Case, kl: Any, decode: Any, generate: Any) -> list[tuple[int, ...]]:
    """Shapes that a latent may have, where no encoder tells: likely ones first."""
    shapes = [] if case.example is None else [tuple(case.example.shape[1:])]
    shapes += [(n,) for n in SIZES] + [(4, 2, 3)]
    if generate is not None:
        with contextlib.suppress(AuditError):
            case.guest.reseed(1)
            z = case.guest.tensor("generate", case.guest.call("generate", generate, 3))
            if z.ndim > 1 and len(z) == 3:
                shapes.insert(0, tuple(z.shape[1:]))

    def refused(shape: tuple[int, ...]) -> int:
        one = case.guest.given(torch.ones(3, *shape))
        count = 0
        for name, fn, n in (("decode", decode, 1), ("kl", kl, 3 if case.kl_uses_sample else 2)):
            if fn is not None:
                try:
                    case.guest.reseed(1)
                    case.guest.call(name, fn, *(one.clone() for _ in range(n)))
                except TooSlowError:
                    raise
                except AuditError:
                    count += 1
        return count

    return sorted(dict.fromkeys(shapes), key=refused)


def prepare(case: Case, heads: Any, sample: Any, kl: Any, decode: Any, generate: Any) -> bool:
    """Find out how the sampler is called, and what noise it draws; whether it samples at all."""
    if case.packing is not None:
        sample = case.packing.packed(sample)
    rows = None if case.example is None else len(case.example)
    case.rows = rows
    reference = None
    if heads is not None:
        latent, second = heads[0].shape[1:], heads[1].shape[1:]
        d, e = math.prod(latent), math.prod(second)
        case.full = e not in (d, 1)
        if case.full:
            reference = heads[1][0].flatten()
        shapes = [(tuple(latent), tuple(second))]
        case.rows = rows = len(heads[0])
    else:
        case.full = False
        shapes = [(s, s) for s in _shapes(case, kl, decode, generate)]
    reason: AuditError | None = None
    for latent, second in shapes:
        at = case.guest.given(torch.zeros(rows or 3, *latent))
        b = case.guest.given(torch.ones(len(at), *second))
        b = b if reference is None else reference.to(b).reshape(second).expand_as(b)
        _unlock(case, lambda at=at, b=b: sample(at.clone(), b.clone()))
        try:
            case.sampler = Sampler(case.guest, sample, latent, second, rows, reference)
            break
        except TooSlowError:
            raise
        except AuditError as error:
            reason = reason or error
    if case.sampler is None:
        raise reason or AuditError("sample: it could not be called")
    if heads is None:
        case.assumed.append(f"a latent of shape {case.sampler.latent}")
    case.assumed.extend(case.sampler.notes)
    d = case.sampler.d
    try:
        mean, std = (_of_latents(t, case.sampler.latent) for t in case.given_prior)
        case.prior = (mean, std)
    except RuntimeError:
        raise AuditError(
            f"prior: expected numbers or tensors of shape {case.sampler.latent}; got "
            f"{[tuple(t.shape) for t in case.given_prior]}"
        ) from None
    if not bool(case.sampler._reference(3, 0).isfinite().all()):
        case.find(
            "not_finite", "bug", "sample returns NaN or infinity for a mean of 0 and a second "
            "output of 1", "look at what it does with the second tensor",
        )  # fmt: skip
        return False
    if case.sampler.still:
        case.find(
            "sample_scale", "bug", "sample draws nothing: z is the mean whatever the second "
            "output is", "add sigma times standard normal noise to the mean", sigma=0.0,
        )  # fmt: skip
        case.convention = "no noise"
        return False
    if not case.full:
        _swap(case, sample)
    return True


def _swap(case: Case, sample: Any) -> None:
    """Whether the second argument is the mean, and the first the scale."""
    s = case.measured_sampler
    if s.e != s.d or s.mode == "moments":
        return
    m = torch.linspace(0.3, 0.9, 5)[:, None].expand(5, s.d).contiguous()
    b = torch.linspace(0.8, 1.4, 5).flip(0)[:, None].expand(5, s.d).contiguous()
    loc, _, off = s.measure(m, b)
    near = 1e-3 + 3 * s.scale_error
    if float((loc - b).abs().max()) < near < float((loc - m).abs().max()) and bool(
        (off < 1e-3).all()
    ):
        turned = Sampler(case.guest, lambda m, b: sample(b, m), s.second, s.latent, s.rows, None)
        case.sampler, case.swapped = turned, True
        case.layout = "two tensors, scale first"
