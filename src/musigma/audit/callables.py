"""The callables of a VAE or a flow, found in an object by names and by what they return.

The same function has different names in different codebases. What was recognized as what is
noted, so that a report can say it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from musigma.audit.batches import examples, input_of, member, required
from musigma.audit.bijection import FlowAdapter
from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.flow import audit_flow
from musigma.audit.sandbox import Sandbox, first_form
from musigma.audit.vae import audit_vae

__all__ = ["KL", "audit_callables", "find", "inverts", "neighbours", "vae_parts"]

ENCODE = ("encode", "encoder", "inference", "recognition", "recognition_model")
SAMPLE = (
    "reparameterize", "reparametrize", "reparameterise", "reparametrise", "reparam",
    "reparameterization", "reparametrization", "sample_z", "sample_latent", "sampling", "sampler",
    "sample",
)  # fmt: skip
KL = ("kl", "kl_divergence", "kl_div", "kl_loss", "kld", "kld_loss", "kl_term", "compute_kl",
      "latent_loss", "loss_kl", "loss_kld")  # fmt: skip
DECODE = ("decode", "decoder")
GENERATE = ("sample_prior", "prior_sample", "generate_z", "sample_prior_z")
INVERSE = ("inverse", "reverse", "invert", "inverse_transform", "inv")
SCALE = re.compile(r"log|sig|std|var|scale|second|lv$|ls$", re.IGNORECASE)
MEAN = re.compile(r"mean|mu|loc|^m$", re.IGNORECASE)


def neighbours(obj: Any) -> dict[str, Any]:
    """The names of the modules that define the class of an object, or a function."""
    classes = [obj] if inspect.isroutine(obj) else type(obj).__mro__
    names: dict[str, Any] = {}
    for cls in reversed(classes):
        module = cls.__module__ or ""
        if module.split(".")[0] not in ("torch", "builtins", "musigma", "keras", "abc", "typing"):
            names |= vars(sys.modules[module]) if module in sys.modules else {}
    return names


def find(obj: Any, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """A callable of an object, or a function beside its class, by one of its names."""
    own = {name.lower(): name for name in dir(obj) if not name.startswith("__")}
    for name in names:
        match = member(obj, own[name]) if name in own else None
        if callable(match):
            return own[name], match
    there = neighbours(obj).items()
    functions = {name.lower(): fn for name, fn in there if inspect.isfunction(fn)}
    return next(((functions[n].__name__, functions[n]) for n in names if n in functions), None)


def audit_callables(obj: Any, example: Any, shape: tuple[int, ...] | None) -> AuditReport:
    """The audit of the callables of a VAE, or of a flow.

    Raises:
        AuditError: If it has neither, or a callable fails.
    """
    assumed: list[str] = []
    if (parts := vae_parts(obj)) is not None:
        assumed += parts.pop("assumed")
        if "encode" in parts:
            parts["example"] = _accepted(obj, parts["encode"], example, shape, assumed)
        report = audit_vae(**parts)
    elif not (callable(obj) or isinstance(obj, (list, tuple))):
        raise AuditError(f"{type(obj).__name__}: it cannot be called")
    else:
        report = audit_flow(obj, None, _accepted(obj, None, example, shape, assumed))
    return replace(report, assumed=(*assumed, *report.assumed))


def inverts(layer: Any) -> bool:
    """Whether a layer has a method that inverts it."""
    return any(callable(getattr(layer, name, None)) for name in INVERSE)


def _accepted(
    obj: Any,
    encode: Callable[..., Any] | None,
    example: Any,
    shape: tuple[int, ...] | None,
    assumed: list[str],
) -> Tensor:
    """The first batch that an encoder takes; without one, that an object maps as a flow does."""
    with Sandbox(obj) as sandbox, torch.no_grad():
        sandbox.use_dtype(torch.float32)

        def attempt(x: Any) -> None:
            if not isinstance(x, Tensor):
                raise AuditError(f"expected a tensor; got {type(x).__name__}")
            undo = sandbox.snapshot()
            try:
                if encode is not None:
                    sandbox.call("encode", encode, x.float())
                else:
                    _check_flow(FlowAdapter(sandbox, obj), x.float())
            finally:
                undo()

        try:
            batches = ((input_of(x),) for x in examples(obj, example, shape))
            (x,), _ = first_form(batches, attempt)
        except AuditError as error:
            if example is not None:
                raise AuditError(f"example: it is not accepted ({error})") from error
            raise AuditError(
                f"example: no shape that was tried is accepted ({error}); give a batch as "
                "`example`, or the `shape` of one example; a function that makes a model must "
                "take no arguments"
            ) from error
    assumed.append(f"an example has the shape {tuple(x.shape[1:])}")
    return x


def _check_flow(flow: FlowAdapter, x: Tensor) -> None:
    """Raise unless there is an inverse, or forward returns z and a log-determinant alone."""
    image = flow.first_call(x)
    raw = torch.as_tensor(() if image.raw is None else image.raw)
    is_pair = not any("values" in note for note in flow.notes)
    fits = image.flat.numel() == x.numel() and raw.numel() in (1, len(x), x.numel())
    if not flow.invertible and not (is_pair and fits):
        raise AuditError("forward: it returns no log-determinant, and there is no inverse")


def vae_parts(obj: Any) -> dict[str, Any] | None:
    """The arguments of `audit_vae`, and what was "assumed"; None if it is not a VAE."""
    if isinstance(obj, (Distribution, Transform, list, tuple)) or inspect.isroutine(obj):
        return None
    parts: dict[str, Any] = {}
    assumed: list[str] = []
    if (match := _sampler(obj)) is not None:
        parts["sample"] = match[1]
        assumed.append(f"{match[0]} draws z")
    for part, names in (("encode", ENCODE), ("decode", DECODE), ("generate", GENERATE)):
        if (match := find(obj, names)) is not None and len(required(match[1])) == 1:
            parts[part] = match[1]
            assumed.append(f"{match[0]} is {part}")
    if (match := find(obj, KL)) is not None and len(required(match[1])) in (2, 3):
        parts["kl"] = _mean_first(match[1])
        parts["kl_uses_sample"] = len(required(match[1])) == 3
        assumed.append(f"{match[0]} is the KL")
    whole = "sample" in parts and ("kl" in parts or "encode" in parts)
    return {**parts, "assumed": assumed} if whole else None


def _sampler(obj: Any) -> tuple[str, Callable[..., Any]] | None:
    """The method, function or layer that draws z from (mean, scale), or from a list of both."""
    modules = obj.named_modules() if isinstance(obj, nn.Module) else ()
    kind = re.compile("sampl|reparam", re.IGNORECASE)
    layers = [(name, m) for name, m in modules if m is not obj and kind.search(type(m).__name__)]
    methods = [match for name in SAMPLE if (match := find(obj, (name,))) is not None]
    for name, fn in [*methods, *layers]:
        needed = len(required(fn))
        if needed == 2:
            return name, _mean_first(fn)
        if needed == 1 and (name.lower() != "sample" or isinstance(fn, nn.Module)):
            return name, lambda mean, second, fn=fn: fn([mean, second])
    return None


def _mean_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (scale, mean, …) as one of (mean, scale, …), by the names of its arguments."""
    names = required(fn)
    if SCALE.search(names[0]) and MEAN.search(names[1]) and not MEAN.search(names[0]):
        return lambda mean, second, *rest: fn(second, mean, *rest)
    if len(names) == 3 and not (MEAN.search(names[0]) or SCALE.search(names[0])):
        return lambda mean, second, z: fn(z, mean, second)
    return fn
