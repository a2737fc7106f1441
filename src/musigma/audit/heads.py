"""The encoder's two heads: what they return, whether they are two, and how far they reach."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from musigma.audit.case import Case
from musigma.audit.findings import AuditError

__all__ = ["check_heads", "encoded", "varied"]

NARROW = 0.9  # a smallest sigma above this share of the prior's is a fault


def encoded(case: Case, encode: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Both heads (B, ...), mean first, as the encoder gives them."""
    value = case.guest.call("encode", encode, x.clone())
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (tuple, list)):
        if len(value) > 2:
            case.assumed.append(
                f"encode returns {len(value)} things: the first two are mean and second"
            )
        mean, second = (case.guest.tensor("encode", part) for part in value[:2])
    else:
        packed = case.guest.tensor("encode", value)
        if case.packing is not None:
            return case.packing.unpack(packed)
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


def varied(case: Case, encode: Any, heads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """These heads, and those of a few sets of random parameters, which are then taken back."""
    undo, pairs = case.guest.snapshot(), [heads]
    for i in range(1, 1 + -(-32 // len(heads[0]))):
        case.guest.randomise(0.7, seed=i)
        with contextlib.suppress(AuditError):
            pair = encoded(case, encode, case.given)
            if all(bool(t.isfinite().all()) for t in pair):
                pairs.append(pair)
    undo()
    mean, second = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return mean, second


def check_heads(case: Case, encode: Any) -> None:
    """The heads under random parameters: are they two, and how far do they reach?"""
    x = case.given
    pairs, sigmas = [], []
    d = case.sampler.d if case.sampler is not None else 1
    for i in range(max(4, -(-40 // d))):
        if i:
            case.guest.randomise(0.3 if i == 1 else 5.0, seed=i)
        try:
            mean, second = encoded(case, encode, x)
        except AuditError:
            if i == 0:
                raise
            break
        if not bool(mean.isfinite().all() and second.isfinite().all()):
            break
        pairs.append((mean, second))
    if not case.guest.modules:
        case.unchecked.append("the heads under random parameters: no module was found")
    else:
        case.checked.append(f"the heads under {len(pairs) - 1} sets of random parameters")
    same = [m.shape == s.shape and m.numel() > 1 for m, s in pairs]
    if all(same) and pairs and case.curve.name != "unit variance":
        m, s = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
        varies = float(m.std()) > 1e-12
        if varies and bool(((m - s).abs() <= 1e-9 * (m.abs() + 1e-12)).all()):
            case.find(
                "heads_tied", "bug", "mean and second output are the same numbers, whatever the "
                "parameters are", "give the scale a layer of its own", compared=m.numel(),
            )  # fmt: skip
        elif varies and _one_function(m, s, d):
            case.find(
                "heads_tied", "bug", "the second output is one monotone function of the mean, "
                "whatever the parameters are", "give the scale a layer of its own",
                compared=m.numel(),
            )  # fmt: skip
    s = case.sampler
    if s is None or case.full or case.scan is None or not case.guest.modules:
        return
    if case.curve.name == "unit variance" or len(pairs) < 4 or (len(pairs) - 1) * d < 36:
        return
    with contextlib.suppress(AuditError):
        for mean, second in pairs[1:]:
            heads = [t.flatten(1)[:8] for t in (mean, second)]
            if case.swapped:
                heads.reverse()
            sigmas.append(s.measure(0 * heads[0], heads[1])[1].abs())
        sigma = torch.cat(sigmas)
        if float(sigma.std()) > 1e-9 and float(sigma.min()) >= NARROW * float(case.prior[1].min()):
            case.find(
                "sigma_range_restricted", "bug",
                "the encoder's second output never gives a standard deviation below "
                f"{float(sigma.min()):.4g}, whatever its parameters are",
                "end the scale's head in a linear layer, without a ReLU or softplus",
                smallest_sigma=float(sigma.min()), compared=sigma.numel(),
            )  # fmt: skip


def _one_function(m: Tensor, s: Tensor, d: int) -> bool:
    """Whether s is a strictly monotone function of m, one for all latents and parameters."""
    order = m.argsort()
    steps = s[order].diff()
    distinct = m[order].diff() > 1e-9 * m.abs().max()
    if d < 2 or int(distinct.sum()) < 60 or float(s.std()) < 1e-12:
        return False
    return bool((steps[distinct] > 0).all() or (steps[distinct] < 0).all())
