"""Choosing the audit for an object, and finding the callables that it needs.

The same function has different names in different codebases. `AuditReport.assumed` lists
what was recognized; if a guess would decide the verdict, an error says what to give instead.
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
from musigma.audit.sandbox import Sandbox, first, first_form
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
        The report; `assumed` lists what was recognized as what.

    Raises:
        AuditError: If it is not recognized; the message says which callables to give.

    Example:
        >>> def sample(mean, log_var):
        ...     return mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        >>> def kl(mean, log_var):
        ...     return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        >>> report = audit({"sample": sample, "kl": kl})
        >>> report.verdict, report.convention
        ('correct', 'log_var')
    """
    assumed: list[str] = []
    if not isinstance(obj, Mapping):
        obj = _made(obj, assumed)
    if isinstance(obj, Mapping):
        return _by_name(dict(obj), example)
    if isinstance(obj, Model):
        report = audit_model(obj, example)
    elif (parts := _vae_parts(obj)) is not None:
        assumed += parts.pop("assumed")
        if "encode" in parts:
            examples = _examples(obj, example, shape)
            parts["example"] = _accepted_batch(parts["encode"], examples, assumed)
        report = audit_vae(**parts)
    elif isinstance(obj, Distribution):
        dims = obj.event_shape.numel()
        report = audit_density(lambda x: obj.log_prob(x.reshape(-1, *obj.event_shape)), dims)
    else:

        def in_a_row(x: Any) -> Any:
            for layer in obj:
                x = first(layer(x))
            return x

        x, run = None, in_a_row if isinstance(obj, (list, tuple)) else obj
        if callable(run):
            x = _accepted_batch(run, _examples(obj, example, shape), assumed)
        if x is None or not _is_flow(obj, run, x):
            raise AuditError(
                f"{type(obj).__name__}: neither a VAE (methods such as encode, reparameterize "
                "and kl_divergence), nor a flow (forward to z and a log-determinant, or an "
                "inverse), nor a distribution; call audit_vae, audit_flow or audit_density with "
                "its callables"
            )
        report = audit_flow(obj, None, x)
    subject = report.subject if isinstance(obj, Model) else type(obj).__name__
    return replace(report, subject=subject, assumed=(*assumed, *report.assumed))


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


# --- recognizing objects ------------------------------------------------------------------------


def _made(obj: Any, assumed: list[str]) -> Any:
    """An instance of a class, or the result of a function without arguments."""
    needed = _required(obj)
    if not inspect.isclass(obj) and (needed or not inspect.isroutine(obj)):
        return obj
    name = getattr(obj, "__name__", "factory")
    if needed:
        raise AuditError(
            f"{name}: it needs {', '.join(needed)}; give an instance, or a function without "
            "arguments that makes one"
        )
    assumed.append(f"{name}() was called to make the object")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return obj()
        except Exception as error:
            raise AuditError(f"{name}(): it raises {type(error).__name__}: {error}") from error


def _required(fn: Any) -> list[str]:
    """The names of the arguments that a callable needs."""
    if isinstance(fn, nn.Module):
        fn = getattr(fn, "call", fn.forward)  # Keras has call
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return []
    bare = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.kind not in bare and p.default is p.empty]


def _find(obj: Any, names: tuple[str, ...]) -> tuple[str, Any] | None:
    """A callable of an object, or of the module of its class, by one of its names."""
    own = {name.lower(): name for name in dir(obj) if not name.startswith("__")}
    for name in names:
        match = getattr(obj, own[name], None) if name in own else None
        if callable(match):
            return own[name], match
    module = type(obj).__module__
    if module.split(".")[0] in ("torch", "builtins", "musigma"):
        return None
    there = vars(sys.modules[module]) if module in sys.modules else {}
    functions = {name.lower(): fn for name, fn in there.items() if inspect.isfunction(fn)}
    return next(((functions[n].__name__, functions[n]) for n in names if n in functions), None)


def _is_flow(obj: Any, run: Callable[[Tensor], Any], x: Tensor) -> bool:
    """Whether it has an inverse, or returns as many numbers as x and a log-determinant."""
    layers = obj if isinstance(obj, (list, tuple)) else [obj]
    if all(isinstance(t, Transform) or _inverts(t) for t in layers):
        return True
    with Sandbox(obj) as sandbox, torch.no_grad():
        sandbox.use_dtype(torch.float32)
        answer = sandbox.call("it", run, x.float())
    if not isinstance(answer, (list, tuple)) or len(answer) != 2:
        return False
    z, log_det = answer
    parts = z if isinstance(z, (list, tuple)) else [z]
    sizes = [p.numel() if isinstance(p, Tensor) else 0 for p in (*parts, log_det)]
    return sum(sizes[:-1]) == x.numel() and sizes[-1] in (1, len(x), x.numel())


def _inverts(layer: Any) -> bool:
    return any(callable(getattr(layer, name, None)) for name in INVERSE)


def _vae_parts(obj: Any) -> dict[str, Any] | None:
    """The arguments of `audit_vae`, and what was "assumed"; None if it is not a VAE."""
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
    if "encode" not in parts and isinstance(obj, nn.Module) and len(_required(obj)) == 1:
        parts["encode"] = _heads_of_forward(obj)
        assumed.append("forward returns (reconstruction, mean, scale)")
    whole = "sample" in parts and ("kl" in parts or "encode" in parts)
    return {**parts, "assumed": assumed} if whole else None


def _heads_of_forward(obj: nn.Module) -> Callable[[Tensor], Any]:
    def encode(x: Tensor) -> Any:
        answer = obj(x)
        if isinstance(answer, (tuple, list)) and len(answer) >= 3:
            return answer[1], answer[2]
        raise AuditError("forward: expected (reconstruction, mean, scale)")

    return encode


def _sampler(obj: Any) -> tuple[str, Callable[..., Any]] | None:
    """The method, function or layer that draws z from (mean, scale), or from a list of both."""
    modules = obj.named_modules() if isinstance(obj, nn.Module) else ()
    kind = re.compile("sampl|reparam", re.IGNORECASE)
    layers = [(name, m) for name, m in modules if m is not obj and kind.search(type(m).__name__)]
    methods = [match for name in SAMPLE if (match := _find(obj, (name,))) is not None]
    for name, fn in [*methods, *layers]:
        needed = len(_required(fn))
        if needed == 2:
            return name, _mean_first(fn)
        if needed == 1 and (name.lower() != "sample" or isinstance(fn, nn.Module)):
            return name, lambda mean, second, fn=fn: fn([mean, second])
    return None


def _mean_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (scale, mean, …) as one of (mean, scale, …), by the names of its arguments."""
    names = _required(fn)
    if SCALE.search(names[0]) and MEAN.search(names[1]) and not MEAN.search(names[0]):
        return lambda mean, second, *rest: fn(second, mean, *rest)
    if len(names) == 3 and not (MEAN.search(names[0]) or SCALE.search(names[0])):
        return lambda mean, second, z: fn(z, mean, second)
    return fn


def _kl_of(loss: Callable[..., Any]) -> Callable[..., Any] | None:
    """The part of ``loss(x_hat, x, mean, scale[, z])``, in any order, that depends on the two."""
    names = _required(loss)
    scales = [n for n in names if SCALE.search(n)]
    means = [n for n in names if MEAN.search(n) and n not in scales]
    if len(scales) != 1 or len(means) != 1 or len(names) not in (4, 5):
        return None

    def value(mean: Tensor, second: Tensor) -> Tensor:
        given = dict.fromkeys(names, mean.new_full((len(mean), 3), 0.5))
        given |= {means[0]: mean, scales[0]: second}
        answer = first(loss(*given.values()))
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


# --- examples -----------------------------------------------------------------------------------


def _examples(obj: Any, example: Tensor | None, shape: tuple[int, ...] | None) -> Iterator[Tensor]:
    """Batches that an object may take."""
    given = getattr(obj, "example", getattr(obj, "example_input", None))
    if example is not None:
        yield example
    elif shape is None and isinstance(given, Tensor):
        yield given
    else:
        generator = torch.Generator().manual_seed(0)
        for event in [shape] if shape is not None else _events(obj):
            yield torch.rand(4, *event, generator=generator, dtype=torch.float64)


def _events(obj: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that a network may take, by its first layer, to which couplings give half."""
    modules = obj.modules() if isinstance(obj, nn.Module) else ()
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    layer = next((m for m in modules if isinstance(m, kinds)), None)
    if isinstance(layer, nn.Linear):
        n = layer.in_features
        sides = [(channels, math.isqrt(n // channels)) for channels in (1, 3)]
        images = [(c, side, side) for c, side in sides if c * side * side == n and side > 3]
        yield from [(n,), *images, (2 * n,), (2 * n + 1,)]
    elif isinstance(layer, nn.Conv1d):
        yield layer.in_channels, 32
    elif isinstance(layer, nn.Conv2d):
        for channels in (layer.in_channels, 2 * layer.in_channels, layer.in_channels // 2):
            for side in (28, 32, 64, 16, 8) if channels else ():
                yield channels, side, side
    yield from [(6,), (4, 8, 8), (3, 8, 8), (12, 4, 4)]


def _accepted_batch(fn: Any, candidates: Iterator[Tensor], assumed: list[str]) -> Tensor:
    """The first batch that a callable takes."""
    with Sandbox(fn) as sandbox, torch.no_grad():
        sandbox.use_dtype(torch.float32)

        def attempt(x: Tensor) -> None:
            undo = sandbox.snapshot()
            try:
                sandbox.call("it", fn, x.float())
            finally:
                undo()

        try:
            (x,), _ = first_form(((x,) for x in candidates), attempt)
        except AuditError as error:
            raise AuditError(
                f"example: no shape that was tried is accepted ({error}); give a batch as "
                "`example`, or the `shape` of one example; a function that makes a model must "
                "take no arguments"
            ) from error
    assumed.append(f"an example has the shape {tuple(x.shape[1:])}")
    return x
