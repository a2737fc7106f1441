"""What is audited: the step that returns a loss, or the callables, found in what a user has.

Codebases write the loss of a model in many places: a function, `training_step(batch, i)`,
`loss(x)`, a `forward` that returns it, or a `forward` whose outputs a `loss_function` takes.
`find_step` tries them in this order, and restores everything after each. What it takes for what is
noted. Where nothing returns a loss, the error ends with a few lines of code that would.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from musigma.audit.batches import bindings, examples, input_of, member, required
from musigma.audit.bijection import FlowAdapter
from musigma.audit.density import audit_density
from musigma.audit.findings import AuditError, AuditReport, name_of
from musigma.audit.flow import audit_flow
from musigma.audit.models import audit_model
from musigma.audit.sandbox import Sandbox, TooSlowError
from musigma.audit.search import (
    Search,
    Users,
    accepts_nothing,
    functions,
    is_loss,
    is_routine,
    methods,
    model_beside,
)
from musigma.audit.step import audit_step
from musigma.audit.terms import audit_log_prob_term, is_log_prob_term
from musigma.audit.training_loop import run_step
from musigma.audit.vae import audit_vae
from musigma.model import Model

__all__ = ["FoundStep", "NoStepError", "audit", "find_step", "make"]

DIMENSIONS = 8  # of a density that is integrated
SECONDS = 60.0  # limit of one call of what may be a step


class NoStepError(AuditError):
    """Nothing in an object returns a loss; the message ends with code that would.

    Args:
        reason: What was tried, and why it returns none.
        wrapper: The code.
        losses: What is named as a loss, and why it is no step.
    """

    def __init__(self, reason: str, wrapper: str, losses: list[str]):
        self.reason, self.wrapper, self.losses = reason, wrapper, losses
        super().__init__(f"{reason}\nWrite the step, and audit it:\n\n{wrapper}")


@dataclass(frozen=True)
class FoundStep:
    """A step that returns a loss.

    Args:
        call: The step: it returns what the user's code returns, for a copy of the batch.
        assumed: What was taken for what.
        name: What it is, such as "VAE.training_step".
        users: What of it is the user's: the "loss"; the "terms" of which the sum is taken here,
            or only the KL; the "map" of a flow, whose loss under a standard normal is taken here.

    Example:
        >>> class Model(nn.Linear):
        ...     def loss(self, x):
        ...         return self(x).square().mean()
        >>> step = find_step(Model(3, 2), torch.ones(4, 3))
        >>> step.name, step.call().requires_grad
        ('Model.loss', True)
    """

    call: Callable[[], Any]
    assumed: list[str]
    name: str
    users: Users = "loss"


def find_step(obj: Any, example: Any = None, *, shape: tuple[int, ...] | None = None) -> FoundStep:
    """The step of an object that returns a loss.

    Args:
        obj: A function, with or without arguments; a class or a factory; a model, or any object
            with a method that returns a loss.
        example: A batch: a tensor, a tuple, a dict, a graph. Each call gets a copy of it.
        shape: Shape of one example, if there is no batch; by default shapes are tried.

    Raises:
        NoStepError: If nothing returns a loss. The message has the reasons, and a wrapper.
        AuditError: If a class or a function without arguments fails.

    Example:
        >>> weight = torch.ones(3, requires_grad=True)
        >>> find_step(lambda: (weight**2).sum()).call().item()
        3.0
    """
    assumed: list[str] = []
    return _step_of(_Subject(make(obj, assumed), example, shape), assumed)


class _Subject(NamedTuple):
    """An object that is made; and a batch, or the shape of one example, if they are known."""

    obj: Any
    example: Any = None
    shape: tuple[int, ...] | None = None


def _step_of(subject: _Subject, assumed: list[str]) -> FoundStep:
    """The step of an object."""
    if _takes_nothing(obj := subject.obj):
        return FoundStep(functools.partial(run_step, obj), assumed, name_of(obj))
    model = model_beside(obj)
    with Sandbox(obj, model, seconds=SECONDS, as_is=True) as sandbox, torch.enable_grad():
        search = Search(obj, sandbox, model)
        for batch in examples(*subject):
            if (found := search.look(batch)) is not None:
                candidate, call = found
                if subject.example is None:
                    assumed.append(f"a batch of shape {tuple(batch.shape)} was drawn")
                assumed += candidate.notes
                return FoundStep(call, assumed, candidate.name, candidate.users)
    raise NoStepError(search.refusal(), search.wrapper(), search.failed_losses())


def make(obj: Any, assumed: list[str]) -> Any:
    """An instance of a class, or what a function without arguments makes; else the object.

    A function without arguments that returns a loss is a step, and is returned as it is.

    Raises:
        AuditError: If it fails, or returns neither a loss nor anything that may have one.
    """
    is_class, name = inspect.isclass(obj), name_of(obj)
    if not is_class and not _takes_nothing(obj):
        return _checked(obj)
    if needed := required(obj):
        raise AuditError(
            f"{name}: it needs {', '.join(needed)}; give an instance, or a function without "
            "arguments that makes one"
        )
    with Sandbox(obj, as_is=True), torch.enable_grad():
        try:
            made = run_step(obj)
        except Exception as error:
            raise AuditError(f"{name}(): it raises {type(error).__name__}: {error}") from error
    if not is_class and is_loss(made):
        assumed.append(f"{name}() is the step")
        return obj
    if made is None or isinstance(made, (Tensor, int, float, str)):
        what = "a tensor" if isinstance(made, Tensor) else repr(made)
        raise AuditError(
            f"{name}(): it returns {what} that requires no gradient; expected a loss, or a "
            "model or a step that it makes"
        )
    is_step = _takes_nothing(made)
    assumed.append(f"{name}() was called to make the {'step' if is_step else 'object'}")
    return make(made, assumed) if is_step else _checked(made)


def _checked(model: Any) -> Any:
    """An object; of a module that is parallel, the module inside.

    Raises:
        AuditError: If it is a module whose parameters do not exist yet.
    """
    if not isinstance(model, nn.Module):
        return model
    name = type(model).__name__
    if "_modules" not in vars(model):
        raise AuditError(f"{name}: its __init__ does not call super().__init__()")
    lazy = (UninitializedParameter, UninitializedBuffer)
    if any(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())):
        raise AuditError(
            f"{name}: it has lazy layers without parameters; call it on a batch before the audit"
        )
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def _takes_nothing(obj: Any) -> bool:
    """Whether it is a function that can be called without arguments."""
    return is_routine(obj) and accepts_nothing(obj)


# --- auditing -----------------------------------------------------------------------------------


def audit(obj: Any, example: Any = None, *, shape: tuple[int, ...] | None = None) -> AuditReport:
    """Audit an object: its training step, or the callables of a VAE, a flow or a density.

    Args:
        obj: A model, a step, a class or a factory without arguments, a flow, a list of its layers,
            a distribution, or a mapping of callables by the argument names of `audit_vae` or
            `audit_flow`.
        example: A batch, as for `find_step`.
        shape: Shape of one example, if there is no batch; by default shapes are tried.

    Returns:
        The report; `assumed` lists what was recognized as what.

    Raises:
        NoStepError: If nothing is recognized; the message has a step to fill in.
        AuditError: If what is recognized fails.

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
    assumed: list[str] = []
    obj = make(obj, assumed)
    if isinstance(obj, Model):
        report = audit_model(obj, example)
    elif isinstance(obj, Distribution):
        dims = obj.event_shape.numel()
        report = audit_density(lambda x: obj.log_prob(x.reshape(-1, *obj.event_shape)), dims)
    elif (term := _term_in(obj)) is not None:
        report = audit_log_prob_term(term, example=example)
    else:
        report = _audited(_Subject(obj, example, shape), assumed)
    subject = report.subject if isinstance(obj, Model) else name_of(obj)
    return replace(report, subject=subject, assumed=(*assumed, *report.assumed))


def _term_in(obj: Any) -> Callable[..., Any] | None:
    """A Gaussian log-density of (z, mean, scale), or of all numbers of a tensor together."""
    has_forward = callable(obj) and getattr(type(obj), "forward", None) is not nn.Module.forward
    fn = obj if inspect.isroutine(obj) else None if has_forward else member(obj, "log_prob")
    if fn is None or not is_log_prob_term(fn) or "nll" in name_of(fn):
        return None
    if len(required(fn)) > 1:
        return fn
    with Sandbox(fn, as_is=True) as sandbox, contextlib.suppress(AuditError):
        value = sandbox.call(name_of(fn), fn, torch.ones(5, 3))
        return fn if isinstance(value, Tensor) and value.numel() == 1 else None
    return None


def _audited(subject: _Subject, assumed: list[str]) -> AuditReport:
    """The audit of the step, and of what no step shows; without a step, of the callables."""
    obj, step, refused = subject.obj, None, None
    try:
        step = _step_of(subject, [])
    except NoStepError as error:
        refused = error
    if step is None or step.users == "map":
        try:
            report = _density(subject) or _vae(subject, "kl") or _flow(subject)
        except AuditError as error:
            if refused is None:
                raise
            reason = f"{refused.reason}\n  {error}"
            raise NoStepError(reason, refused.wrapper, refused.losses) from error
        missing = [f"the step: {line}" for line in (refused.losses if refused else ())]
        return replace(report, missing=(*report.missing, *missing))
    report = audit_step(step.call)
    assumed += [f"the step is {step.name}", *step.assumed]
    if step.users == "terms":
        report = _without_weight(report)
    try:
        if (more := _vae(subject, "generate")) is not None:
            return _joined(report, more)
        has_kl = any(functions(obj, "kl")) or any(functions(obj, "encode"))
        if has_kl and _sampler(obj) is not None:
            return report
        if report.missing and (density := _density(subject)) is not None:
            report = _joined(report, density)
            report = report if density.missing else replace(report, missing=())
        if any(methods(obj, "inverse")):
            report = _joined(report, _flow(subject))
    except AuditError as error:
        unchecked = (*report.unchecked, f"callables of {name_of(obj)}: {error}")
        return replace(report, unchecked=unchecked)
    return report


def _without_weight(report: AuditReport) -> AuditReport:
    """A report on a sum that is not the user's: weight and sign of the KL are not judged."""
    codes = ("reduction_imbalance", "kl_negative")
    unjudged = "weight and sign of the KL: how it is added to the rest is not known"
    return replace(
        report,
        findings=tuple(f for f in report.findings if f.code not in codes),
        checked=tuple(line for line in report.checked if "the weight" not in line),
        unchecked=(*report.unchecked, unjudged),
    )


def _joined(report: AuditReport, more: AuditReport) -> AuditReport:
    """The report of a step with that of callables; what both find is said once."""
    absent = [line for line in more.unchecked if "there is no `" not in line]
    return replace(
        report,
        convention=report.convention or more.convention,
        read_as=report.read_as or more.read_as,
        layout=report.layout or more.layout,
        findings=(*report.findings, *(f for f in more.findings if f.code not in report.codes)),
        checked=(*report.checked, *more.checked),
        unchecked=(*report.unchecked, *absent),
        assumed=(*report.assumed, *more.assumed),
        details={**more.details, **report.details},
    )


def _density(subject: _Subject) -> AuditReport | None:
    """Whether `log_prob` is a density, if it has few dimensions and takes x alone."""
    size = tuple(subject.shape or getattr(input_of(subject.example), "shape", ())[1:])
    dims, log_prob = math.prod(size), member(subject.obj, "log_prob")
    if not size or dims > DIMENSIONS or not callable(log_prob) or len(required(log_prob)) != 1:
        return None
    return audit_density(lambda x: log_prob(x.reshape(-1, *size)), dims)


def _vae(subject: _Subject, what: str) -> AuditReport | None:
    """The audit of what draws z in an object, with its KL, or with what generates z."""
    obj = subject.obj
    sampler, takes = _sampler(obj), (2, 3) if what == "kl" else (1,)
    fns = [(name, fn) for name, fn in functions(obj, what) if len(required(fn)) in takes]
    if sampler is None or not fns:
        return None
    (draws, sample), (name, fn) = sampler, fns[0]
    assumed = [f"{draws} draws z", f"{name} is the KL" if what == "kl" else f"{name} generates z"]
    parts: dict[str, Any] = {"generate": fn}
    if what == "kl":
        parts = {"kl": _mean_first(fn), "kl_uses_sample": len(required(fn)) == 3}
        encoders = [pair for pair in functions(obj, "encode") if len(required(pair[1])) == 1]
        if encoders:
            name, encode = encoders[0]
            x = _accepted(subject, lambda sandbox, x: sandbox.call(name, encode, x))
            parts |= {"encode": encode, "example": x}
            assumed.append(f"{name} is the encoder")
    report = audit_vae(sample=sample, **parts)
    return replace(report, assumed=(*assumed, *report.assumed))


def _sampler(obj: Any) -> tuple[str, Callable[..., Any]] | None:
    """The method, function or layer that draws z from (mean, scale), or from a list of both."""
    if isinstance(obj, (Distribution, Transform, list, tuple)) or is_routine(obj):
        return None
    modules = obj.named_modules() if isinstance(obj, nn.Module) else ()
    kind = re.compile("sampl|reparam", re.IGNORECASE)
    layers = [(name, m) for name, m in modules if m is not obj and kind.search(type(m).__name__)]
    for name, fn in [*functions(obj, "sample"), *layers]:
        needed = len(required(fn))
        if needed == 2:
            return name, _mean_first(fn)
        if needed == 1 and (name.lower() != "sample" or isinstance(fn, nn.Module)):
            return name, lambda mean, second, fn=fn: fn([mean, second])
    return None


def _mean_first(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function of mean and scale, and maybe of z after them, in any order, as one in this."""
    count = len(required(fn))
    names = ("z", "mean", "scale")[3 - count :]
    bound = next(bindings(fn, None, dict.fromkeys(names, torch.zeros(1))))
    if count == 2:
        return lambda mean, second: bound(None, {"mean": mean, "scale": second})
    return lambda mean, second, z: bound(None, {"mean": mean, "scale": second, "z": z})


def _flow(subject: _Subject) -> AuditReport:
    """The audit of a flow, on the first batch that it maps."""
    obj = subject.obj
    if not (callable(obj) or isinstance(obj, (list, tuple))):
        raise AuditError(f"{type(obj).__name__}: it cannot be called")
    x = _accepted(subject, lambda sandbox, x: _maps(FlowAdapter(sandbox, obj), x))
    report = audit_flow(obj, None, x)
    assumed = f"an example has the shape {tuple(x.shape[1:])}"
    return replace(report, assumed=(assumed, *report.assumed))


def _maps(flow: FlowAdapter, x: Tensor) -> None:
    """Raise unless there is an inverse, or forward returns z and a log-determinant alone."""
    image = flow.first_call(x)
    raw = torch.as_tensor(() if image.raw is None else image.raw)
    is_pair = not any("values" in note for note in flow.notes)
    fits = image.flat.numel() == x.numel() and raw.numel() in (1, len(x), x.numel())
    if not flow.invertible and not (is_pair and fits):
        raise AuditError("forward: it returns no log-determinant, and there is no inverse")


def _accepted(subject: _Subject, attempt: Callable[[Sandbox, Tensor], Any]) -> Tensor:
    """The first batch with which an attempt does not fail."""
    errors: list[AuditError] = []
    for x in map(input_of, examples(*subject)):
        try:
            if not isinstance(x, Tensor):
                raise AuditError(f"expected a tensor; got {type(x).__name__}")
            with Sandbox(subject.obj) as sandbox, torch.no_grad():
                sandbox.use_dtype(torch.float32)
                attempt(sandbox, x.float())
            return x
        except TooSlowError:
            raise
        except AuditError as error:
            errors.append(error)
    if subject.example is not None:
        raise AuditError(f"example: it is not accepted ({errors[0]})") from errors[0]
    raise AuditError(
        f"example: no shape that was tried is accepted ({errors[0]}); give a batch as `example`, "
        "or the `shape` of one example; a function that makes a model must take no arguments"
    ) from errors[0]


def _by_name(parts: dict[str, Any], example: Any) -> AuditReport:
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
