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
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from musigma.audit.batches import examples, input_of, member, required
from musigma.audit.callables import KL, audit_callables, find, inverts, vae_parts
from musigma.audit.density import audit_density
from musigma.audit.findings import AuditError, AuditReport, name_of
from musigma.audit.flow import audit_flow
from musigma.audit.models import audit_model
from musigma.audit.sandbox import Sandbox
from musigma.audit.search import Search, Users, accepts_nothing, is_loss, wrapper
from musigma.audit.step import audit_step
from musigma.audit.terms import audit_log_prob_term, is_log_prob_term
from musigma.audit.training_loop import leaves, losses, replaced, run_step
from musigma.audit.vae import audit_vae
from musigma.model import Model

__all__ = ["FoundStep", "NoStepError", "audit", "find_step", "make"]

DIMENSIONS = 8  # of a density that is integrated


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
    return _step_of(make(obj, assumed), example, shape, assumed)


def _step_of(
    obj: Any, example: Any, shape: tuple[int, ...] | None, assumed: list[str]
) -> FoundStep:
    """The step of an object that is made."""
    if _takes_nothing(obj):
        return FoundStep(functools.partial(run_step, obj), assumed, name_of(obj))
    with Search(obj) as search:
        for batch in examples(obj, example, shape):
            for prepared, note in search.prepared(batch):
                if (found := search.look(prepared)) is None:
                    continue
                way, call = found
                if example is None:
                    assumed.append(f"a batch of shape {tuple(batch.shape)} was drawn")
                return FoundStep(call, [*assumed, *note, *way.notes], way.name, way.users)
    raise NoStepError(search.refusal(), wrapper(search), search.failed_losses())


def make(obj: Any, assumed: list[str]) -> Any:
    """An instance of a class, or what a function without arguments makes; else the object.

    A function without arguments that returns a loss is a step, and is returned as it is.

    Raises:
        AuditError: If it fails, or returns neither a loss nor anything that may have one.
    """
    if isinstance(obj, nn.Module):
        return _checked(obj)
    if not inspect.isclass(obj) and not _takes_nothing(obj):
        return obj
    name = name_of(obj)
    if needed := required(obj):
        raise AuditError(
            f"{name}: it needs {', '.join(needed)}; give an instance, or a function without "
            "arguments that makes one"
        )
    undo = (lambda: None) if inspect.isclass(obj) else Sandbox(obj).snapshot()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        try:
            made = run_step(obj)
        except Exception as error:
            raise AuditError(f"{name}(): it raises {type(error).__name__}: {error}") from error
        finally:
            undo()
    if isinstance(made, nn.Module):
        made = _checked(made)
    if not inspect.isclass(obj):
        if is_loss(made):
            assumed.append(f"{name}() is the step")
            return obj
        if made is None or isinstance(made, (Tensor, int, float, str)):
            what = "a tensor" if isinstance(made, Tensor) else repr(made)
            raise AuditError(
                f"{name}(): it returns {what} that requires no gradient; expected a loss, or a "
                "model or a step that it makes"
            )
    assumed.append(
        f"{name}() was called to make the {'step' if _takes_nothing(made) else 'object'}"
    )
    return make(made, assumed) if _takes_nothing(made) else made


def _checked(model: nn.Module) -> nn.Module:
    """A module that has its parameters; of one that is parallel, the module inside.

    Raises:
        AuditError: If it has layers whose parameters do not exist yet.
    """
    if "_modules" not in vars(model):
        raise AuditError(f"{type(model).__name__}: its __init__ does not call super().__init__()")
    lazy = (UninitializedParameter, UninitializedBuffer)
    if any(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())):
        raise AuditError(
            f"{type(model).__name__}: it has lazy layers without parameters; call it on a batch "
            "before the audit"
        )
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, parallel) else model


def _takes_nothing(obj: Any) -> bool:
    """Whether it is a function that can be called without arguments."""
    is_function = inspect.isroutine(obj) or isinstance(obj, functools.partial)
    return is_function and not required(obj) and accepts_nothing(obj)


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
        report = _audited(obj, example, shape, assumed)
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


def _audited(
    obj: Any, example: Any, shape: tuple[int, ...] | None, assumed: list[str]
) -> AuditReport:
    """The audit of the step, and of what no step shows; without a step, of the callables."""
    refused = None
    try:
        step = _step_of(obj, example, shape, [])
    except NoStepError as error:
        step, refused = None, error
    if step is None or step.users == "map":
        if (density := _density(obj, example, shape)) is not None:
            return density
        try:
            report = audit_callables(obj, example, shape)
        except AuditError as error:
            if refused is None:
                raise
            reason = f"{refused.reason}\n  {error}"
            raise NoStepError(reason, refused.wrapper, refused.losses) from error
        losses = [] if refused is None else refused.losses  # what trains is not examined
        missing = tuple(f"the step: {line}" for line in losses)
        return replace(report, missing=(*report.missing, *missing))
    report = audit_step(step.call)
    assumed += [f"the step is {step.name}", *step.assumed]
    if step.users == "terms":
        report = _without_weight(report)
    try:
        return _with_callables(report, obj, step, example, shape)
    except AuditError as error:
        unchecked = (*report.unchecked, f"callables of {name_of(obj)}: {error}")
        return replace(report, unchecked=unchecked)


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


def _with_callables(
    report: AuditReport, obj: Any, step: FoundStep, example: Any, shape: tuple[int, ...] | None
) -> AuditReport:
    """A report of a step, with what callables show and no step does."""
    parts, kl = vae_parts(obj), find(obj, KL)
    if parts is not None:
        if report.missing and "kl" in parts and kl is not None and _adds(step, obj, *kl):
            more = audit_callables(obj, example, shape)
            only = len(report.missing) == 1 and report.missing[0].startswith("the KL")
            return _joined(report, more, examined=only and not more.missing)
        if "generate" in parts:
            more = audit_vae(sample=parts["sample"], generate=parts["generate"])
            return _joined(report, more, examined=False)
        return report
    if report.missing and (density := _density(obj, example, shape)) is not None:
        report = _joined(report, density, examined=not density.missing)
    if inverts(obj):
        report = _joined(report, audit_callables(obj, example, shape), examined=False)
    return report


def _density(obj: Any, example: Any, shape: tuple[int, ...] | None) -> AuditReport | None:
    """Whether `log_prob` is a density, if it has few dimensions and takes x alone."""
    size = tuple(shape or getattr(input_of(example), "shape", ())[1:])
    if not size or (dims := math.prod(size)) > DIMENSIONS:
        return None
    log_prob = member(obj, "log_prob")
    if log_prob is None and isinstance(obj, nn.Module) and accepts_nothing(obj.forward):
        with Sandbox(obj, as_is=True) as sandbox:
            if not isinstance(sandbox.call("forward", obj), Distribution):
                return None

        def log_prob(x: Tensor) -> Tensor:
            return obj().log_prob(x)

    if not callable(log_prob) or len(required(log_prob)) != 1:
        return None
    return audit_density(lambda x: log_prob(x.reshape(-1, *size)), dims)


def _adds(step: FoundStep, obj: Any, name: str, fn: Callable[..., Any]) -> bool:
    """Whether a step calls a function, and its loss grows with what the function returns."""
    returned: list[Tensor] = []

    def spy(*args: Any, **how: Any) -> Any:
        value = fn(*args, **how)
        returned.extend(t for t in leaves(value).values() if t.requires_grad)
        return value

    owner = obj if hasattr(obj, name) else sys.modules[fn.__module__]
    with Sandbox(obj, as_is=True), torch.enable_grad(), replaced(owner, name, spy):
        value = step.call()
    total = sum(t.sum() for t in (losses(value) or leaves(value)).values())
    if not returned or not isinstance(total, Tensor):
        return False
    grads = torch.autograd.grad(total, returned, allow_unused=True)
    return all(grad is not None and bool((grad > 0).all()) for grad in grads)


def _joined(report: AuditReport, more: AuditReport, examined: bool) -> AuditReport:
    """The report of a step with that of callables; what both find is said once.

    `examined`: the callables are what was missing in the step.
    """
    absent = [line for line in more.unchecked if "there is no `" not in line]
    return replace(
        report,
        convention=report.convention or more.convention,
        read_as=report.read_as or more.read_as,
        layout=report.layout or more.layout,
        findings=(*report.findings, *(f for f in more.findings if f.code not in report.codes)),
        checked=(*report.checked, *more.checked),
        unchecked=(*report.unchecked, *absent),
        missing=() if examined else report.missing,
        assumed=(*report.assumed, *more.assumed),
        details={**more.details, **report.details},
    )


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
