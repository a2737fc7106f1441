r"""The audit of a variational autoencoder, given as callables.

It measures what the sampler computes, z = mean + sigma(second) e, by scanning the second tensor;
whether the KL is that of the Gaussian so sampled, by regression; and whether prior, noise, heads
and weights are consistent. It knows nothing of the model but what its callables return.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.heads import check_heads, encoded, varied
from musigma.audit.kl import check_kl
from musigma.audit.kl_weight import check_kl_weight
from musigma.audit.packing import arguments, find_packing
from musigma.audit.sampler import Sampler
from musigma.audit.sampler_checks import (
    check_generation,
    check_mean,
    check_noise,
    check_scale,
    name_scale,
)
from musigma.audit.sandbox import Sandbox, TooSlowError, about_types
from musigma.audit.vae_state import VAEAudit

__all__ = ["audit_vae"]

SIZES = (6, 2, 4, 8, 16, 20, 32, 10, 64, 3, 5, 128, 1)  # of a latent, where nothing gives it


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
    r"""Whether a VAE's KL is the KL of what it samples, and its other parts are consistent.

    Checks run in float64 where the model allows it, each with a false-alarm probability below
    1e-6. The model is restored to the bit.

    Args:
        encode: ``encode(x) -> (mean, second)``, or one packed tensor.
        sample: ``sample(mean, second) -> z``, or ``sample(packed) -> z``.
        kl: ``kl(mean, second[, z])``: a scalar, one number per example or one per dimension.
        recon: ``recon(x, x_hat)``, the reconstruction term of the loss.
        decode: ``decode(z) -> x_hat``.
        generate: ``generate(n) -> z``, draws of the prior.
        example: A batch x; without `encode`, its shape is tried as that of a latent.
        prior: Mean and standard deviation that KL and generation should use.
        kl_uses_sample: Whether the KL takes z as well.
        documented_mean: ``documented_mean(mean, second)``, the documented E[z]; by default the
            mean.
        loss: ``loss(x)``, the whole loss.

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
        "generate": generate, "documented_mean": documented_mean, "loss": loss,
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
    dtype, gradients, first = torch.float64, False, None
    for _ in range(3):
        with Sandbox(*functions.values()) as sandbox, torch.set_grad_enabled(gradients):
            if dtype != torch.float64:
                sandbox.use_dtype(dtype)
            try:
                return _audit(VAEAudit(sandbox, functions, example, prior, kl_uses_sample))
            except AuditError as error:
                first = first or error
                if "does not require grad" in str(error) and not gradients:
                    gradients = True
                elif dtype == torch.float64 and about_types(error):
                    dtype = torch.float32
                else:
                    raise
    raise first or AuditError("audit_vae: it could not be called")


class _Refused(Exception):
    """A callable did not take its trial input."""


def _audit(audit: VAEAudit) -> AuditReport:
    if audit.has("encode"):
        audit.heads = _heads(audit)
    if not audit.has("sample"):
        audit.unchecked.append("what is sampled: there is no `sample`")
    elif _prepare_sampler(audit):
        heads = audit.heads
        if audit.is_matrix and heads is not None:
            heads = varied(audit, heads)
        name_scale(audit, heads)
        check_mean(audit)
        check_noise(audit)
        audit.heads = heads
    if not audit.has("kl"):
        audit.unchecked.append("the KL: there is no `kl`")
    elif audit.scan is not None or audit.matrices is not None:
        check_kl(audit)
    elif audit.has("sample"):
        audit.unchecked.append("the KL: what is sampled is unknown")
    check_scale(audit)
    if audit.has("generate"):
        check_generation(audit)
    else:
        audit.unchecked.append("the prior of generation: there is no `generate`")
    if not audit.has("recon"):
        audit.unchecked.append("the weight of the KL: there is no `recon`")
    if audit.has("encode"):
        check_kl_weight(audit)
        check_heads(audit)
    return audit.build()


def _heads(audit: VAEAudit) -> tuple[Tensor, Tensor]:
    """The encoder's heads for the example; finds out the layout of a packed tensor."""
    value = audit.call("encode", audit.example.clone())
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, Tensor):
        packed = audit.sandbox.as_tensor("encode", value)
        sample = audit.functions.get("sample")
        if sample is not None and arguments(sample) == 1:
            _enable_sampling(audit, lambda: sample(audit.sandbox.to_input(packed)))
            audit.packing = find_packing(audit.sandbox, sample, packed)
            audit.layout = audit.packing.name
            audit.checked.append(f"layout: {audit.layout}, by moving one number at a time")
        else:
            audit.layout = "packed; sample takes two tensors, so what splits it is unknown"
            audit.unchecked.append(f"layout: {audit.layout}")
    mean, second = encoded(audit)
    audit.layout = audit.layout or "two tensors, mean first"
    if not bool(mean.isfinite().all() and second.isfinite().all()):
        audit.bug(
            "not_finite",
            "encode returns NaN or infinity for the given example",
            "find the encoder's first layer that returns NaN",
            finite_share=float(mean.isfinite().double().mean()),
        )
    return mean, second


def _enable_sampling(audit: VAEAudit, call: Callable[[], Any]) -> None:
    """Put a sampler that draws in training mode only into that mode, but not norms and dropout."""
    unchanged = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    with contextlib.suppress(_Refused):
        if _draws(audit, call):
            return
        for root in audit.sandbox.modules:
            for module in root.modules():
                if not isinstance(module, unchanged):
                    module.training = True
        if _draws(audit, call):
            audit.assumed.append("it samples in training mode only, and was audited in that mode")
            return
        for root in audit.sandbox.modules:
            root.eval()


def _draws(audit: VAEAudit, call: Callable[[], Any]) -> bool:
    """Whether two calls differ."""
    answers = []
    for seed in (1, 2):
        audit.sandbox.reseed(seed)
        try:
            answers.append(audit.sandbox.ask_first("sample", call))
        except TooSlowError:
            raise
        except AuditError as error:
            raise _Refused from error
    return not torch.equal(*answers)


def _per_latent(t: Tensor, latent: tuple[int, ...]) -> Tensor:
    """A prior's mean or standard deviation for each flat latent."""
    d = math.prod(latent)
    if t.numel() == d:
        return t.reshape(d)
    while t.ndim > len(latent) and len(t) == 1:
        t = t[0]
    return t.expand(latent).reshape(d)


def _latent_shapes(audit: VAEAudit) -> list[tuple[int, ...]]:
    """Shapes that a latent may have, likely ones first, where there is no encoder."""
    shapes = [tuple(audit.example.shape[1:])] if audit.has_example else []
    shapes += [(n,) for n in SIZES] + [(4, 2, 3)]
    if audit.has("generate"):
        with contextlib.suppress(AuditError):
            audit.sandbox.reseed(1)
            z = audit.ask("generate", 3)
            if z.ndim > 1 and len(z) == 3:
                shapes.insert(0, tuple(z.shape[1:]))

    def refusals(shape: tuple[int, ...]) -> int:
        one = audit.sandbox.to_input(torch.ones(3, *shape))
        count = 0
        for name, n in (("decode", 1), ("kl", 3 if audit.kl_uses_sample else 2)):
            if audit.has(name):
                try:
                    audit.sandbox.reseed(1)
                    audit.call(name, *(one.clone() for _ in range(n)))
                except TooSlowError:
                    raise
                except AuditError:
                    count += 1
        return count

    return sorted(dict.fromkeys(shapes), key=refusals)


def _prepare_sampler(audit: VAEAudit) -> bool:
    """Find out how the sampler is called, and what noise it draws; whether it draws at all."""
    sample = audit.functions["sample"]
    if audit.packing is not None:
        sample = audit.packing.packed(sample)
    audit.rows = len(audit.example) if audit.has_example else None
    reference = None
    if audit.heads is not None:
        mean, second = audit.heads
        latent, shape = tuple(mean.shape[1:]), tuple(second.shape[1:])
        audit.is_matrix = math.prod(shape) not in (math.prod(latent), 1)
        reference = second[0].flatten() if audit.is_matrix else None
        shapes = [(latent, shape)]
        audit.rows = len(mean)
    else:
        shapes = [(shape, shape) for shape in _latent_shapes(audit)]
    reason: AuditError | None = None
    for latent, second in shapes:
        mean = audit.sandbox.to_input(torch.zeros(audit.rows or 3, *latent))
        b = audit.sandbox.to_input(torch.ones(len(mean), *second))
        b = b if reference is None else reference.to(b).reshape(second).expand_as(b)
        _enable_sampling(audit, lambda mean=mean, b=b: sample(mean.clone(), b.clone()))
        try:
            audit.sampler = Sampler(audit.sandbox, sample, latent, second, audit.rows, reference)
            break
        except TooSlowError:
            raise
        except AuditError as error:
            reason = reason or error
    if not audit.has_sampler:
        raise reason or AuditError("sample: it could not be called")
    latent = audit.sampler.latent
    if audit.heads is None:
        audit.assumed.append(f"a latent of shape {latent}")
    audit.assumed.extend(audit.sampler.notes)
    try:
        mean, std = (_per_latent(t, latent) for t in audit.given_prior)
        audit.prior = (mean, std)
    except RuntimeError:
        raise AuditError(
            f"prior: expected numbers or tensors of shape {latent}; got "
            f"{[tuple(t.shape) for t in audit.given_prior]}"
        ) from None
    if not bool(audit.sampler.reference_draw(3, 0).isfinite().all()):
        audit.bug(
            "not_finite",
            "sample returns NaN or infinity for a mean of 0 and a second output of 1",
            "check what it does with the second tensor",
        )
        return False
    if audit.sampler.still:
        audit.bug(
            "sample_scale",
            "sample draws nothing: z is the mean whatever the second output is",
            "add sigma times standard normal noise to the mean",
            sigma=0.0,
        )
        audit.convention = "no noise"
        return False
    if not audit.is_matrix:
        _check_order(audit, sample)
    return True


def _check_order(audit: VAEAudit, sample: Callable[..., Any]) -> None:
    """Whether the second argument is the mean, and the first the scale."""
    s = audit.sampler
    if s.e != s.d or s.mode == "moments":
        return
    m = torch.linspace(0.3, 0.9, 5)[:, None].expand(5, s.d).contiguous()
    b = torch.linspace(0.8, 1.4, 5).flip(0)[:, None].expand(5, s.d).contiguous()
    loc, _, misfit = s.measure(m, b)
    near = 1e-3 + 3 * s.scale_error
    if float((loc - b).abs().max()) < near < float((loc - m).abs().max()) and bool(
        (misfit < 1e-3).all()
    ):
        audit.sampler = Sampler(
            audit.sandbox, lambda m, b: sample(b, m), s.second, s.latent, s.rows
        )
        audit.swapped = True
        audit.layout = "two tensors, scale first"
