"""Choosing the audit for an object, and finding the callables that it needs.

The same obj has many names in different codebases. What is recognised is listed in
`AuditReport.assumed`; where a guess would decide the verdict, an error says what to give instead.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from musigma.audit.density import audit_density
from musigma.audit.findings import AuditError, AuditReport
from musigma.audit.flow import audit_flow
from musigma.audit.models import audit_model
from musigma.audit.sandbox import Sandbox, first
from musigma.audit.vae import audit_vae
from musigma.model import Model

__all__ = ["audit"]

ENCODE = ("encode", "encoder", "inference", "recognition", "recognition_model")
SAMPLE = (
    "reparameterize", "reparametrize", "reparameterise", "reparametrise", "reparam",
    "reparameterization", "reparametrization", "sample_z", "sample_latent", "sampling", "sampler",
    "sample",
)  # fmt: skip
KL = ("kl", "kl_divergence", "kl_div", "kl_loss", "kld", "kld_loss", "kl_term", "compute_kl",
      "latent_loss")  # fmt: skip
LOSS = ("loss_function", "loss_fn", "vae_loss", "loss", "elbo_loss", "criterion")
DECODE = ("decode", "decoder")
GENERATE = ("sample_prior", "prior_sample", "generate_z", "sample_prior_z")
INVERSE = ("inverse", "reverse", "invert", "inverse_transform", "inv")
SCALE = re.compile(r"log|sig|std|var|scale|second|lv$|ls$", re.IGNORECASE)
MEAN = re.compile(r"mean|mu|loc|^m$", re.IGNORECASE)


def audit(
    obj: Any, *, example: Tensor | None = None, shape: tuple[int, ...] | None = None
) -> AuditReport:
    """Audit an object: a model of this library, or any VAE, flow or density.

    Args:
        obj: A model, a class or a factory without arguments, a flow, a distribution, or a mapping
            of callables by the argument names of `audit_vae` or `audit_flow`.
        example: A batch of its data.
        shape: Shape of one example; by default tried by the first layer.

    Returns:
        The report; `assumed` lists what was recognised as what.

    Raises:
        AuditError: If it is not recognised; the message says which callables to give.

    Example:
        >>> def sample(mean, log_var):
        ...     return mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        >>> def kl(mean, log_var):
        ...     return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        >>> report = audit({"sample": sample, "kl": kl})
        >>> report.verdict, report.convention
        ('correct', 'log_var')
    """
    if isinstance(obj, Mapping):
        return _by_name(dict(obj), example)
    obj, assumed = _made(obj)
    if isinstance(obj, Mapping):
        return _by_name(dict(obj), example)
    if isinstance(obj, Model):
        report = audit_model(obj, example)
    elif (match := _vae_parts(obj)) is not None:
        assumed += match[1]
        report = _audit_vae(obj, match[0], example, shape, assumed)
    elif isinstance(obj, Distribution):
        dims = obj.event_shape.numel()
        report = audit_density(lambda x: obj.log_prob(x.reshape(-1, *obj.event_shape)), dims)
    else:
        x = None
        if isinstance(obj, (list, tuple)) or callable(obj):
            run = _in_a_row(obj)
            x = _accepted_batch(run, _examples(obj, example, shape), assumed)
        if x is None or not _is_flow(obj, x):
            raise AuditError(
                f"{type(obj).__name__}: neither a VAE (methods such as encode, reparameterize "
                "and kl_divergence), nor a flow (forward to z and a log-determinant, or an "
                "inverse), nor a distribution; call audit_vae, audit_flow or audit_density with "
                "its callables"
            )
        report = audit_flow(obj, None, x)
    subject = report.subject if isinstance(obj, Model) else type(obj).__name__
    return replace(report, subject=subject, assumed=(*assumed, *report.assumed))


# --- recognising objects ------------------------------------------------------------------------


def _made(obj: Any) -> tuple[Any, list[str]]:
    """An instance of a class, or the result of a function without arguments."""
    factory = inspect.isclass(obj) or (inspect.isroutine(obj) and not _required(obj))
    if not factory:
        return obj, []
    name = getattr(obj, "__name__", "factory")
    if needed := _required(obj):
        raise AuditError(
            f"{name}: it needs {', '.join(needed)}; give an instance, or a function without "
            "arguments that makes one"
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return obj(), [f"{name}() was called to make the object"]
        except Exception as error:
            raise AuditError(f"{name}(): it raises {type(error).__name__}: {error}") from error


def _parameters(fn: Any) -> list[inspect.Parameter]:
    if isinstance(fn, nn.Module):
        fn = getattr(fn, "call", fn.forward)  # Keras has call
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return []
    bare = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in signature.parameters.values() if p.kind not in bare]


def _required(fn: Any) -> list[str]:
    return [p.name for p in _parameters(fn) if p.default is p.empty]


def _find(obj: Any, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """A callable of an object, or of the module of its class, by one of its names."""
    attributes = {name.lower(): name for name in dir(obj) if not name.startswith("__")}
    for name in names:
        match = getattr(obj, attributes[name], None) if name in attributes else None
        if callable(match):
            return attributes[name], match
    home = sys.modules.get(type(obj).__module__)
    if home is None or type(obj).__module__.split(".")[0] in ("torch", "builtins", "musigma"):
        return None
    there = {name.lower(): name for name in vars(home)}
    for name in names:
        match = getattr(home, there[name]) if name in there else None
        if inspect.isfunction(match):
            return there[name], match
    return None


def _is_flow(obj: Any, x: Tensor) -> bool:
    """Whether it has an inverse, or returns as many numbers as x and a log-determinant."""
    layers = obj if isinstance(obj, (list, tuple)) else [obj]
    if all(isinstance(t, Transform) or _inverts(t) for t in layers):
        return True
    with Sandbox(obj) as sandbox, torch.no_grad():
        sandbox.use_dtype(torch.float32)
        answer = sandbox.call("it", _in_a_row(obj), x.float())
    if not isinstance(answer, (list, tuple)) or len(answer) != 2:
        return False
    z, log_det = answer
    parts = z if isinstance(z, (list, tuple)) else [z]
    sizes = [p.numel() if isinstance(p, Tensor) else 0 for p in (*parts, log_det)]
    return sum(sizes[:-1]) == x.numel() and sizes[-1] in (1, len(x), x.numel())


def _in_a_row(obj: Any) -> Callable[[Tensor], Any]:
    """One callable; for a sequence of layers, their composition."""
    if not isinstance(obj, (list, tuple)):
        return obj

    def run(x: Any) -> Any:
        for layer in obj:
            x = layer(x)
            x = x[0] if isinstance(x, (list, tuple)) else x
        return x

    return run


def _inverts(layer: Any) -> bool:
    return any(callable(getattr(layer, name, None)) for name in INVERSE)


def _vae_parts(obj: Any) -> tuple[dict[str, Any], list[str]] | None:
    """The VAE callables of an object, and what was recognised as what; or None."""
    if isinstance(obj, (Distribution, Transform, list, tuple)) or inspect.isroutine(obj):
        return None
    parts: dict[str, Any] = {}
    assumed: list[str] = []
    if (match := _sampler(obj)) is not None:
        parts["sample"] = match[1]
        assumed.append(f"{match[0]} draws z")
    for part, names in (("encode", ENCODE), ("decode", DECODE), ("generate", GENERATE)):
        if (match := _find(obj, names)) is not None and len(_required(match[1])) == 1:
            parts[part] = match[1]
            assumed.append(f"{match[0]} is {part}")
    if (match := _find(obj, KL)) is not None and len(_required(match[1])) in (2, 3):
        parts["kl"] = _mean_first(match[1])
        parts["kl_uses_sample"] = len(_required(match[1])) == 3
        assumed.append(f"{match[0]} is the KL")
    elif (match := _find(obj, LOSS)) is not None and (kl := _kl_of(match[1])) is not None:
        parts["kl"] = kl
        assumed.append(
            f"the KL is how {match[0]} depends on mean and scale: its constant is unknown and "
            "assumed to be right"
        )
    if "encode" not in parts and (match := _forward_encodes(obj)) is not None:
        parts["encode"] = match
        assumed.append("forward returns (reconstruction, mean, scale)")
    whole = "sample" in parts and ("kl" in parts or "encode" in parts)
    return (parts, assumed) if whole else None


def _sampler(obj: Any) -> tuple[str, Callable[..., Any]] | None:
    """What draws z from (mean, scale): a method, a function, or a layer."""
    layers = {
        name: m
        for name, m in (obj.named_modules() if isinstance(obj, nn.Module) else ())
        if m is not obj and re.search("sampl|reparam", type(m).__name__, re.IGNORECASE)
    }
    for name in SAMPLE:
        match = _find(obj, (name,))
        if match is None or (name == "sample" and len(_required(match[1])) != 2):
            continue
        if len(_required(match[1])) == 2:
            return match[0], _mean_first(match[1])
        if len(_required(match[1])) == 1:
            return match[0], _of_a_list(match[1])
    for name, layer in layers.items():
        needed = _required(layer)
        if len(needed) in (1, 2):
            return name, layer if len(needed) == 2 else _of_a_list(layer)
    return None


def _mean_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (scale, mean, …) as one of (mean, scale, …), by the names of its arguments."""
    names = _required(fn)
    if SCALE.search(names[0]) and MEAN.search(names[1]) and not MEAN.search(names[0]):
        return lambda mean, second, *rest: fn(second, mean, *rest)
    if len(names) == 3 and not (MEAN.search(names[0]) or SCALE.search(names[0])):
        return lambda mean, second, z: fn(z, mean, second)
    return fn


def _of_a_list(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A layer that takes one list of mean and scale."""
    return lambda mean, second: fn([mean, second])


def _kl_of(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """The part of ``loss(x_hat, x, mean, scale[, z])``, in any order, that depends on the two."""
    names = _required(loss)
    scales = [n for n in names if SCALE.search(n)]
    means = [n for n in names if MEAN.search(n) and n not in scales]
    others = [n for n in names if n not in (*scales, *means)]
    if len(scales) != 1 or len(means) != 1 or len(others) not in (2, 3):
        return None

    def value(mean: Tensor, second: Tensor) -> Tensor:
        fixed = mean.new_full((len(mean), 3), 0.5)
        given = {means[0]: mean, scales[0]: second, **dict.fromkeys(others, fixed)}
        answer = loss(*(given[n] for n in names))
        answer = first(answer)
        return next(iter(answer.values())) if isinstance(answer, dict) else answer

    least: dict[tuple[int, ...], Tensor] = {}

    def kl(mean: Tensor, second: Tensor) -> Tensor:
        shape = tuple(mean.shape)
        if shape not in least:  # a KL is zero where the posterior is the prior
            zero = torch.zeros_like(mean)
            tries = torch.linspace(-4, 4, 801).tolist()
            rows = torch.stack([value(zero, zero + s).sum() for s in tries])
            least[shape] = rows[rows.isfinite()].min()
        return value(mean, second).sum() - least[shape]

    return kl


def _forward_encodes(obj: Any) -> Callable[[Tensor], Any] | None:
    if not isinstance(obj, nn.Module) or len(_required(obj)) != 1:
        return None

    def encode(x: Tensor) -> Any:
        answer = obj(x)
        if isinstance(answer, (tuple, list)) and len(answer) >= 3:
            return answer[1], answer[2]
        raise AuditError("forward: expected (reconstruction, mean, scale)")

    return encode


# --- examples -----------------------------------------------------------------------------------


def _examples(obj: Any, example: Tensor | None, shape: tuple[int, ...] | None) -> Iterator[Tensor]:
    """Batches that an object may take."""
    generator = torch.Generator().manual_seed(0)

    def batch(*event: int) -> Tensor:
        return torch.rand(4, *event, generator=generator, dtype=torch.float64)

    if example is not None:
        yield example
        return
    if shape is not None:
        yield batch(*shape)
        return
    given = getattr(obj, "example", getattr(obj, "example_input", None))
    if isinstance(given, Tensor):
        yield given
        return
    modules = obj.modules() if isinstance(obj, nn.Module) else ()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layer = next((m for m in modules if isinstance(m, kinds)), None)
    for event in [*_events(layer), (6,), (4, 8, 8), (3, 8, 8), (12, 4, 4)]:
        yield batch(*event)


def _events(layer: nn.Module | None) -> Iterator[tuple[int, ...]]:
    """Shapes that a network with this first layer may take; couplings give it half."""
    if isinstance(layer, nn.Linear):
        n = layer.in_features
        yield (n,)
        for channels in (1, 3):
            side = math.isqrt(n // channels)
            if channels * side * side == n and side > 3:
                yield channels, side, side
        yield (2 * n,)
        yield (2 * n + 1,)
    elif isinstance(layer, nn.Conv1d):
        yield layer.in_channels, 32
    elif isinstance(layer, nn.Conv2d):
        for channels in (layer.in_channels, 2 * layer.in_channels, layer.in_channels // 2):
            for side in (28, 32, 64, 16, 8) if channels else ():
                yield channels, side, side


def _accepted_batch(obj: Any, candidates: Iterator[Tensor], assumed: list[str]) -> Tensor:
    tried = []
    with Sandbox(obj) as sandbox, torch.no_grad():
        sandbox.use_dtype(torch.float32)
        for x in candidates:
            undo = sandbox.snapshot()
            try:
                sandbox.call("it", obj, x.float())
            except (AuditError, TypeError) as error:
                tried.append(f"{tuple(x.shape)}: {error}")
                continue
            finally:
                undo()
            assumed.append(f"an example has the shape {tuple(x.shape[1:])}")
            return x
    raise AuditError(
        f"example: none of the shapes that were tried is taken ({tried[-1] if tried else 'none'});"
        " give a batch as `example`, or the `shape` of one example; a function that makes a model "
        "must take no arguments"
    )


def _audit_vae(
    obj: Any,
    parts: dict[str, Any],
    example: Tensor | None,
    shape: tuple[int, ...] | None,
    assumed: list[str],
) -> AuditReport:
    encode = parts.pop("encode", None)
    if encode is not None:
        x = _accepted_batch(encode, _examples(obj, example, shape), assumed)
        parts |= {"encode": _pair(encode, assumed), "example": x}
    return audit_vae(**parts)


def _pair(encode: Callable[..., Any], assumed: list[str]) -> Callable[[Tensor], Any]:
    """An encoder's mean and scale, without what else it returns."""

    def both(x: Tensor) -> Any:
        answer = encode(x)
        if isinstance(answer, (tuple, list)) and len(answer) > 2:
            return answer[0], answer[1]  # a third is z
        return answer

    return both


def _by_name(parts: dict[str, Any], example: Tensor | None) -> AuditReport:
    """The audit with the arguments in a mapping."""
    if example is not None:
        parts.setdefault("example", example)
    for check in (audit_flow, audit_vae):
        known = set(inspect.signature(check).parameters)
        if set(parts) <= known and ({"forward", "sample", "kl", "encode"} & set(parts)):
            return check(**parts)
    raise AuditError(
        f"{', '.join(parts) or 'nothing'}: expected arguments of audit_vae (encode, sample, kl, "
        "…) or of audit_flow (forward, inverse, …)"
    )
