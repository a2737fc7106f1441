r"""The audit of a variational autoencoder, given as callables.

It measures what the sampler computes, z = mean + sigma(second) e, by scanning the second tensor;
whether the KL is that of the Gaussian so sampled, by regression; and whether prior, noise, heads
and weights are consistent. It uses only what the callables return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.kl import check_kl
from musigma.audit.kl_weight import check_kl_weight
from musigma.audit.posterior import (
    check_generation,
    check_heads,
    check_noise,
    check_scale,
    full_posterior,
    measured_posterior,
)
from musigma.audit.sampler import Sampler, find_packing
from musigma.audit.sandbox import Sandbox, arguments, by_float_type, first_form, refusals_ignored
from musigma.audit.vae_state import FullPosterior, Posterior, Prior, VAEAudit, exchanged

__all__ = ["audit_vae"]

ESSENTIAL = {"sample": "what is sampled", "kl": "the KL"}
PARTS = {
    "generate": "the prior of generation",
    "recon": "the weight of the KL",
}
SIZES = (6, 2, 4, 8, 16, 20, 32, 10, 64, 3, 5, 128, 1)  # of a latent, where nothing gives it


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

    Checks run in float64 where the model allows it, each with a false-alarm probability below
    1e-6. The model is restored to the bit.

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
            of torch, or a callable ``log_prob(z)`` that returns (B,); by default N(0, 1).
        flow: ``flow(z) -> (z_K, log_det)``, which transforms what is sampled; the prior is that
            of z_K, and log_det is (B,).
        kl_uses_sample: Whether the KL takes z as well; with a flow it does.
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

    def attempt(dtype: torch.dtype, gradients: bool = False) -> AuditReport:
        with Sandbox(*functions.values(), prior) as sandbox, torch.set_grad_enabled(gradients):
            sandbox.use_dtype(dtype)
            try:
                return _audit(VAEAudit(sandbox, functions, example, prior, kl_uses_sample))
            except AuditError as error:
                if gradients or "does not require grad" not in str(error):
                    raise
        return attempt(dtype, gradients=True)

    return by_float_type(attempt)


def _audit(audit: VAEAudit) -> AuditReport:
    for parts, notes in ((ESSENTIAL, audit.missing), (PARTS, audit.unchecked)):
        notes += [f"{what}: there is no `{name}`" for name, what in parts.items()
                  if not audit.has(name)]  # fmt: skip
    if audit.has("encode"):
        _find_heads(audit)
    posterior = _posterior(audit, _sampler(audit)) if audit.has("sample") else None
    if posterior is not None:
        if audit.has("kl"):
            check_kl(audit, posterior)
        check_scale(audit, posterior)
    elif audit.has("kl", "sample"):
        audit.missing.append("the KL: what is sampled is unknown")
    if audit.has("generate"):
        check_generation(audit)
    if audit.has("encode"):
        check_kl_weight(audit)
        check_heads(audit, posterior)
    return audit.build()


def _find_heads(audit: VAEAudit) -> None:
    """The encoder's heads for the example; finds out the layout of a packed tensor."""
    audit.layout = "two tensors, mean first"
    value = _alone(audit.call("encode", audit.example.clone()))
    sample = audit.functions.get("sample")
    if isinstance(value, Tensor) and (sample is None or arguments(sample) != 1):
        audit.layout = "packed; sample takes two tensors, so what splits it is unknown"
        audit.unchecked.append(f"layout: {audit.layout}")
    elif isinstance(value, Tensor) and sample is not None:
        packed = audit.sandbox.as_tensor("encode", value)
        _enable_sampling(audit, lambda: sample(audit.sandbox.to_input(packed)))
        packing = find_packing(audit.sandbox, sample, packed)
        audit.layout = packing.name
        audit.checked.append(f"layout: {packing.name}, by moving one number at a time")
        encode, kl = audit.functions["encode"], audit.functions.get("kl")
        audit.functions["encode"] = lambda x: packing.unpack(_alone(encode(x)))
        audit.functions["sample"] = packing.packed(sample)
        if kl is not None and arguments(kl) == (2 if audit.kl_uses_sample else 1):
            audit.functions["kl"] = packing.packed(kl)
    mean, second = audit.heads = audit.encoded()
    if not (mean.isfinite().all() and second.isfinite().all()):
        audit.bug("not_finite", "encode", finite_share=mean.isfinite().double().mean())
    elif _is_coupled(audit):
        audit.coupled = True
        audit.assumed.append(
            "the rows of the example are parts of one example, as the nodes of a graph: the "
            "encoder's answer for one depends on the others"
        )


def _is_coupled(audit: VAEAudit) -> bool:
    """Whether the head of the first row changes where all other rows are that row as well."""
    alike = audit.example[:1].expand_as(audit.example)
    answers = []
    for x in (audit.example, audit.example, alike):
        audit.sandbox.reseed()
        answers.append(audit.encoded(x)[0])
    one, again, other = (mean[0] for mean in answers)
    return torch.equal(one, again) and bool((one - other).abs().max() > 1e-3 * answers[0].std())


def _alone(value: Any) -> Any:
    """The only entry of a tuple or a list; anything else as it is."""
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _enable_sampling(audit: VAEAudit, call: Callable[[], Any]) -> None:
    """Put a sampler that draws in training mode only into that mode, but not norms and dropout."""
    unchanged = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)

    def draws() -> bool:
        answers = []
        for seed in (1, 2):
            audit.sandbox.reseed(seed)
            answers.append(audit.sandbox.ask_first("sample", call))
        return not torch.equal(*answers)

    with refusals_ignored():  # of this trial input
        if draws():
            return
        for module in audit.sandbox.layers():
            module.training |= not isinstance(module, unchanged)
        if draws():
            audit.assumed.append("it samples in training mode only, and was audited in that mode")
            return
        for root in audit.sandbox.modules:
            root.eval()


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
    inputs = {"decode": 1, "kl": 0 if audit.has("flow") else 2 + audit.kl_uses_sample}

    def accepted(shape: tuple[int, ...]) -> int:
        one = audit.sandbox.to_input(torch.ones(3, *shape))
        count = 0
        for name, n in inputs.items():
            if audit.has(name) and n:
                with refusals_ignored():
                    audit.sandbox.reseed(1)
                    audit.call(name, *(one.clone() for _ in range(n)))
                    count += 1
        return count

    return sorted(dict.fromkeys(shapes), key=accepted, reverse=True)


def _sampler(audit: VAEAudit) -> Sampler:
    """The sampler, by the shape of the latent, the noise, and the order of its arguments."""
    sample = audit.functions["sample"]
    reference = None
    if audit.heads is None:
        shapes = [(shape, shape) for shape in _latent_shapes(audit)]
    else:
        mean, second = audit.heads
        shapes = [(tuple(mean.shape[1:]), tuple(second.shape[1:]))]
        if second[0].numel() not in (1, mean[0].numel()):
            reference = second[0].flatten()

    def attempt(latent: tuple[int, ...], second: tuple[int, ...]) -> Sampler:
        mean = audit.sandbox.to_input(torch.zeros(audit.rows or 3, *latent))
        b = torch.ones(second) if reference is None else reference.reshape(second)
        b = audit.sandbox.to_input(b).expand(len(mean), *second)
        _enable_sampling(audit, lambda: sample(mean.clone(), b.clone()))
        return Sampler(audit.sandbox, sample, latent, second, audit.rows, reference)

    s = first_form(shapes, attempt)[1]
    audit.latents = s.d
    if audit.heads is None:
        audit.assumed.append(f"a latent of shape {s.latent}")
    audit.assumed += s.notes
    flow = audit.functions.get("flow")
    audit.prior = Prior(audit.given_prior, s.latent, audit.sandbox, flow)
    return s


def _posterior(audit: VAEAudit, s: Sampler) -> Posterior | FullPosterior | None:
    """Measure and check what is sampled; None if nothing is known about it."""
    if not s.reference_draw(3, 0).isfinite().all():
        audit.bug("not_finite", "sample")
        return None
    if s.still:
        audit.bug("sample_scale", "no_noise", sigma=0.0)
        audit.convention = "no noise"
        return None
    if s.is_matrix and audit.heads is not None:
        posterior = full_posterior(audit, s, audit.heads)
    else:
        s = _mean_first(audit, s)
        posterior = measured_posterior(audit, s)
    check_noise(audit, s)
    return posterior


def _mean_first(audit: VAEAudit, s: Sampler) -> Sampler:
    """The sampler with the mean first; if its first argument is the scale, all are exchanged."""
    if s.e != s.d or s.mode == "moments":
        return s
    m = torch.linspace(0.3, 0.9, 5)[:, None].expand(5, s.d).contiguous()
    b = torch.linspace(0.8, 1.4, 5).flip(0)[:, None].expand(5, s.d).contiguous()
    loc, _, misfit = s.measure(m, b)
    near = 1e-3 + 3 * s.scale_error
    at_b = float((loc - b).abs().max()) < near < float((loc - m).abs().max())
    if not at_b or (misfit >= 1e-3).any():
        return s
    audit.swapped, audit.layout = True, "two tensors, scale first"
    for name in audit.functions.keys() & {"sample", "kl", "documented_mean"}:
        audit.functions[name] = exchanged(audit.functions[name])
    if audit.heads is not None:
        encode = audit.functions["encode"]
        audit.functions["encode"] = lambda x: audit.heads_of(encode(x))[::-1]
        audit.heads = audit.heads[1], audit.heads[0]
    return Sampler(audit.sandbox, audit.functions["sample"], s.second, s.latent, s.rows)
