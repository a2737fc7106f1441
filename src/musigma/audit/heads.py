"""The encoder's two heads: what they return, whether they are two, and their range."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from musigma.audit.findings import AuditError
from musigma.audit.vae_state import VAEAudit

__all__ = ["check_heads", "encoded", "varied"]

NARROW = 0.9  # a smallest sigma above this share of the prior's is a bug


def encoded(audit: VAEAudit) -> tuple[Tensor, Tensor]:
    """Both heads (B, ...) for the example, mean first."""
    value = audit.call("encode", audit.example.clone())
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (tuple, list)):
        if len(value) > 2:
            audit.assumed.append(
                f"encode returns {len(value)} values: the first two are mean and second"
            )
        mean, second = (audit.sandbox.as_tensor("encode", part) for part in value[:2])
    else:
        packed = audit.sandbox.as_tensor("encode", value)
        if audit.packing is not None:
            return audit.packing.unpack(packed)
        if packed.ndim < 2 or packed.shape[1] % 2:
            raise AuditError(
                "encode: expected (mean, second), or a packed tensor (B, 2 D, ...); got shape "
                f"{tuple(packed.shape)}"
            )
        mean, second = packed.chunk(2, 1)
    if mean.ndim == 0 or len(mean) != len(second):
        raise AuditError(
            f"encode: expected two batches; got shapes {tuple(mean.shape)} and "
            f"{tuple(second.shape)}"
        )
    return mean, second


def _is_finite(heads: tuple[Tensor, Tensor]) -> bool:
    return all(bool(head.isfinite().all()) for head in heads)


def varied(audit: VAEAudit, heads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """These heads, and those under a few sets of random parameters."""
    restore, pairs = audit.sandbox.snapshot(), [heads]
    for i in range(1, 1 + -(-32 // len(heads[0]))):
        audit.sandbox.randomise(0.7, seed=i)
        with contextlib.suppress(AuditError):
            pair = encoded(audit)
            if _is_finite(pair):
                pairs.append(pair)
    restore()
    mean, second = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return mean, second


def check_heads(audit: VAEAudit) -> None:
    """Whether the heads are two, and how far they reach, under random parameters."""
    pairs = []
    d = audit.sampler.d if audit.has_sampler else 1
    for i in range(max(4, -(-40 // d))):
        if i:
            audit.sandbox.randomise(0.3 if i == 1 else 5.0, seed=i)
        try:
            pair = encoded(audit)
        except AuditError:
            if i == 0:
                raise
            break
        if not _is_finite(pair):
            break
        pairs.append(pair)
    if audit.sandbox.modules:
        audit.checked.append(f"the heads under {len(pairs) - 1} sets of random parameters")
    else:
        audit.unchecked.append("the heads under random parameters: no module was found")
    constant = audit.curve.name == "unit variance"
    same = [m.shape == s.shape and m.numel() > 1 for m, s in pairs]
    if all(same) and pairs and not constant:
        m, s = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
        what = None
        if float(m.std()) > 1e-12:
            if bool(((m - s).abs() <= 1e-9 * (m.abs() + 1e-12)).all()):
                what = "mean and second output are the same numbers"
            elif _is_one_function(m, s, d):
                what = "the second output is one monotone function of the mean"
        if what:
            audit.bug(
                "heads_tied",
                f"{what}, whatever the parameters are",
                "give the scale a layer of its own",
                compared=m.numel(),
            )
    if audit.is_matrix or audit.scan is None or not audit.sandbox.modules or constant:
        return
    if len(pairs) < 4 or (len(pairs) - 1) * d < 36:
        return
    with contextlib.suppress(AuditError):
        sigmas = []
        for mean, second in pairs[1:]:
            heads = [t.flatten(1)[:8] for t in (mean, second)]
            if audit.swapped:
                heads.reverse()
            sigmas.append(audit.sampler.measure(0 * heads[0], heads[1])[1].abs())
        sigma = torch.cat(sigmas)
        smallest = float(sigma.min())
        if float(sigma.std()) > 1e-9 and smallest >= NARROW * float(audit.prior[1].min()):
            audit.bug(
                "sigma_range_restricted",
                "the encoder's second output never gives a standard deviation below "
                f"{smallest:.4g}, whatever its parameters are",
                "end the scale's head in a linear layer, without a ReLU or softplus",
                smallest_sigma=smallest,
                compared=sigma.numel(),
            )


def _is_one_function(m: Tensor, s: Tensor, d: int) -> bool:
    """Whether s is one strictly monotone function of m, for all latents and parameters."""
    order = m.argsort()
    steps = s[order].diff()
    distinct = m[order].diff() > 1e-9 * m.abs().max()
    if d < 2 or int(distinct.sum()) < 60 or float(s.std()) < 1e-12:
        return False
    return bool((steps[distinct] > 0).all() or (steps[distinct] < 0).all())
