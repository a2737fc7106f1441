"""The audit of a training step: what the loss that it returns really computes."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.graph import Graph, Origin
from musigma.audit.latents import Latent, find_latents, meetings
from musigma.audit.probes import Prober
from musigma.audit.record import record
from musigma.audit.sandbox import Sandbox
from musigma.audit.step_flow import (
    has_layers_before_its_prior,
    judge_flow,
    judge_posterior_flow,
)
from musigma.audit.step_kl import (
    Divergence,
    data_terms,
    find_divergence,
    sampled_scale,
    terms,
)
from musigma.audit.step_prior import kl_offset, prior_error
from musigma.audit.step_weight import effective_beta, root_of

__all__ = ["audit_step"]

LOSS_KEYS = ("loss", "total_loss", "loss_total", "nelbo", "neg_elbo", "elbo")
PER_LINE = 4  # latents of one line of code that are examined
SECONDS = 300.0


def audit_step(step: Callable[[], Any], *, example: Any = None) -> AuditReport:
    """Audit a training step: one run of it is recorded, and its parts are replayed.

    What is found: where Gaussian noise enters, how the encoder's second output becomes the
    standard deviation, the KL divergence and its weight, the prior; of a flow, z and the
    log-determinant.

    Args:
        step: A callable without arguments that returns a loss: a tensor, or a tuple, a
            dictionary or a dataclass with one. It may call backward() and an optimizer.
        example: The batch that the step uses, by which data are told from constants.

    Returns:
        The report. Its verdict is "incomplete" if the KL, or the log-determinant, was not found.

    Raises:
        AuditError: If `step` is not callable.

    Example:
        >>> encoder, decoder = torch.nn.Linear(6, 4), torch.nn.Linear(2, 6)
        >>> x = torch.randn(5, 6)
        >>> def step():
        ...     mean, log_var = encoder(x).chunk(2, 1)
        ...     z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        ...     kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        ...     return 0.5 * ((decoder(z) - x) ** 2).sum() + kl
        >>> report = audit_step(step)
        >>> report.verdict, report.convention, report.read_as
        ('correct', 'log_var', 'log_var')
    """
    if not callable(step):
        raise AuditError(f"step: expected a callable without arguments; got {type(step).__name__}")
    audit = StepAudit(name_of(step))
    with Sandbox(step, seconds=SECONDS, as_is=True) as sandbox:
        first = _recorded(audit, sandbox, step, seed=0)
        if first is None or (loss := _find_loss(audit, first)) is None:
            return audit.build()
        if not _usable(audit, first, loss):
            return audit.build()
        second = _recorded(audit, sandbox, step, seed=1, quiet=True)
        if second is None or (again := _find_loss(StepAudit(""), second)) is None:
            audit.missing.append("a second run of the step: it failed, or returned no loss")
        else:
            _compare_runs(audit, first, loss, second, again)
        audit.graph, audit.loss = first, loss
        audit.rerun = lambda: _recorded(audit, sandbox, step, seed=0, quiet=True)
        audit.judge()
    return audit.build()


class StepAudit(ReportBuilder):
    """The report of one step under construction.

    Attributes:
        graph: The recorded step.
        loss: The number of the loss.
        convention: The reading of the second output by the sampler.
        read_as: The reading of it by the KL.
    """

    graph: Graph
    loss: int

    def __init__(self, subject: str):
        super().__init__(subject)
        self.convention: str | None = None
        self.read_as: str | None = None
        self.differentiable = True
        self.rerun: Callable[[], Graph | None] | None = None

    def build(self, **more: Any) -> AuditReport:
        """The report, with the convention."""
        return super().build(convention=self.convention, read_as=self.read_as, **more)

    def judge(self) -> None:
        """Examine all latents; of a step without any, the flow."""
        graph, loss = self.graph, self.loss
        latents = find_latents(graph, loss)
        if not latents:
            if not judge_flow(self):
                self.missing.append(_no_latent(graph, loss))
            return
        seen: Counter[str] = Counter()
        for latent in latents:
            seen[latent.where] += 1
            if seen[latent.where] > PER_LINE:
                continue
            _judge_latent(self, latent, latents)
        for where, count in seen.items():
            if count > PER_LINE:
                self.unchecked.append(
                    f"{count - PER_LINE} further draws of {_short(where)}: as the first {PER_LINE}"
                )


# --- running the step ---------------------------------------------------------------------------


def _recorded(
    audit: StepAudit, sandbox: Sandbox, step: Callable[[], Any], seed: int, quiet: bool = False
) -> Graph | None:
    """One recorded run; None, and a line in `missing`, if it fails."""
    undo = sandbox.snapshot()
    try:
        return sandbox.call("step", lambda: record(step, seed=seed, sandbox=sandbox))
    except AuditError as error:
        if not quiet:
            audit.missing.append(f"the loss: {error}{_raised_at(error)}")
        return None
    finally:
        undo()


def _raised_at(error: BaseException) -> str:
    """The user's line that raised the cause of an error, in words."""
    cause, place = error.__cause__, ""
    trace = cause.__traceback__ if cause is not None else None
    here = os.path.dirname(os.path.abspath(__file__))
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if not path.startswith((here, os.path.dirname(torch.__file__))):
            place = f" ({_short(f'{path}:{trace.tb_lineno}')})"
        trace = trace.tb_next
    return place


def _short(where: str) -> str:
    return where.rsplit(os.sep, 1)[-1] if where else "an unknown line"


def _at(where: str) -> str:
    return f" ({_short(where)})" if where else ""


# --- the loss -----------------------------------------------------------------------------------


def _leaves(result: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The entries of what a step returns, with their names."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        result = dict(zip(result._fields, result, strict=True))  # pyright: ignore
    if isinstance(result, Mapping):
        for key, value in result.items():
            yield from _leaves(value, str(key))
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _leaves(value, name)
    elif isinstance(result, Tensor) or not hasattr(result, "__dict__"):
        yield name, result
    else:
        for key, value in vars(result).items():
            if isinstance(value, Tensor):
                yield key, value


def _find_loss(audit: StepAudit, graph: Graph) -> int | None:
    """The number of the loss; None, and a line in `missing`, if there is none."""
    if graph.backward_calls:
        called = list(dict.fromkeys(graph.backward_calls))
        if len(called) > 1:
            audit.assumed.append(
                f"the step calls backward() on {len(called)} losses: their sum is audited"
            )
        return _sum(graph, called)
    entries = list(_leaves(graph.result))
    audit.differentiable = any(t.requires_grad for _, t in entries if isinstance(t, Tensor))
    found = [(name, graph.returned(t)) for name, t in entries if isinstance(t, Tensor)]
    known = [(name, i) for name, i in found if i is not None and graph[i].floating]
    scalars = [(n, i) for n, i in known if graph[i].numel == 1 and graph[i].origin]
    names = {name.lower(): i for name, i in scalars}
    for key in LOSS_KEYS:
        if key in names:
            return _scalar(graph, names[key])
    scalars = list({i: n for n, i in scalars})
    if len(scalars) > 1:
        above = {i: len(graph.upstream([i]).intersection(scalars)) - 1 for i in scalars}
        top = max(scalars, key=lambda i: above[i])
        if above[top]:
            audit.assumed.append(
                f"of {len(scalars)} scalars that the step returns, the loss is the one that is "
                "computed from the others"
            )
            return _scalar(graph, top)
        audit.assumed.append(
            f"the step returns {len(scalars)} scalars, and none is computed from the others: "
            "their sum is audited; return what you call backward() on"
        )
        return _sum(graph, scalars)
    if scalars:
        return _scalar(graph, scalars[0])
    vectors = [i for _, i in known if graph[i].origin & Origin.PARAMETERS]
    column = [i for i in vectors if graph[i].numel == (graph[i].shape or (0,))[0]]
    if len(column) == 1 and len(known) == 1:
        shape = tuple(graph[vectors[0]].shape)
        audit.assumed.append(f"the step returns a loss of shape {shape}: its mean is audited")
        return graph.add(lambda t: t.double().mean(), vectors, "mean").id
    audit.missing.append(f"the loss: {_no_loss(graph, entries)}")
    return None


def _no_loss(graph: Graph, entries: list[tuple[str, Any]]) -> str:
    numbers = [v for _, v in entries if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers:
        return (
            "the step returns a Python number, as .item() makes it; return the tensor on which "
            "you call backward()"
        )
    tensors = [v for _, v in entries if isinstance(v, Tensor)]
    if not tensors:
        kind = type(graph.result).__name__
        return f"the step returns {kind}; return the tensor on which you call backward()"
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
    if any(t.numel() == 1 for t in tensors):
        return "the scalar that the step returns does not depend on any parameter"
    return f"the step returns tensors of shapes {shapes}, and no scalar"


def _sum(graph: Graph, ids: list[int]) -> int:
    if len(ids) == 1:
        return _scalar(graph, ids[0])
    return graph.add(lambda *ts: sum(t.double().sum() for t in ts), ids, "add").id  # pyright: ignore


def _scalar(graph: Graph, i: int) -> int:
    return i if graph[i].numel == 1 else graph.add(lambda t: t.double().sum(), [i], "sum").id


def _usable(audit: StepAudit, graph: Graph, loss: int) -> bool:
    """Whether the loss is finite, is computed from parameters, and is replayed correctly."""
    value = graph.get(loss)
    if not graph[loss].origin & Origin.PARAMETERS:
        audit.missing.append("the loss: it does not depend on any parameter")
        return False
    if not value.isfinite().all():
        audit.bug("not_finite", "step", where=(where := _first_not_finite(graph, loss)),
                  line=_short(where))  # fmt: skip
        audit.missing.append(f"the loss: it is {float(value)}{_at(where)}")
        return False
    if not audit.differentiable:
        audit.missing.append(
            "the gradient: nothing in the loss requires one; the step runs under no_grad(), or "
            "on detached tensors"
        )
    for note in dict.fromkeys(graph.notes):
        audit.missing.append(note)
    return True


def _first_not_finite(graph: Graph, loss: int) -> str:
    live = graph.upstream([loss])
    for v in graph.values:
        made = v.id in live and v.node is not None and v.floating
        if made and not graph.get(v.id).isfinite().all():
            return graph.where(v.id)
    return graph.where(loss)


def _compare_runs(audit: StepAudit, a: Graph, loss: int, b: Graph, again: int) -> None:
    """Note if a second run, under another seed, is not the first with other draws."""
    live = a.upstream([loss])
    names = [[n.name for n in g.nodes] for g in (a, b)]
    if names[0] != names[1]:
        i = next((k for k, (x, y) in enumerate(zip(*names, strict=False)) if x != y), -1)
        audit.missing.append(
            "the step as one graph: its operations differ between two runs, from "
            f"{_short(a.nodes[i].where)} on: it branches on its draws; it was audited as it ran"
        )
        return
    draws = {v.id: b.get(b[v.id].id) for v in a.draws() if v.floating}
    if any(b[i].kind != a[i].kind or b[i].shape != a[i].shape for i in draws):
        audit.missing.append("the step as one graph: its draws differ in shape between two runs")
        return
    fixed = [i for i, t in draws.items() if i in live and t.numel() > 1]
    fixed = [i for i in fixed if torch.equal(a.get(i), draws[i])]
    if fixed:
        audit.missing.append(
            f"the noise: a draw{_at(a.where(fixed[0]))} is the same in two runs under different "
            "seeds; draw it without a fixed seed"
        )
    value, other = a.value(draws, loss), b.get(again)
    if float((value - other).abs()) <= 1e-9 * (1 + float(other.abs())):
        return
    for node, twin in zip(a.nodes, b.nodes, strict=True):
        if not live.intersection(node.outs):
            continue
        for x, y in zip(node.flat, twin.flat, strict=True):
            if isinstance(x, float) and isinstance(y, float) and x != y:
                audit.missing.append(
                    f"a number that is computed outside torch, or by .item(), is {x:.6g} in one "
                    f"run and {y:.6g} in the next{_at(node.where)}; its gradient is lost"
                )
                return
    for v, w in zip(a.values, b.values, strict=True):
        outside = v.node is None and v.id in live and v.kind in ("data", "constant", "opaque")
        if not outside or v.leaf is None or w.leaf is None:
            continue
        if not torch.equal(v.leaf, w.leaf):
            where = a.where(v.id)
            audit.missing.append(
                "a tensor that no operation of torch made differs between two runs"
                f"{_at(where)}: random numbers of NumPy or Python; draw noise with torch"
            )
            audit.warn("host_random", where=where, source=_short(where))
            return
    audit.missing.append("the step as one graph: a replay differs from a second run")


# --- latents ------------------------------------------------------------------------------------


def _no_latent(graph: Graph, loss: int) -> str:
    live = graph.upstream([loss])
    draws = [v for v in graph.draws("gaussian", "random") if v.id in live]
    if not draws:
        return (
            "the KL: the loss depends on no random draw, and is not the likelihood of a flow: an "
            "autoencoder, or a VAE in evaluation mode"
        )
    lines = ", ".join(dict.fromkeys(_short(graph.where(v.id)) for v in draws[:3]))
    return (
        f"the KL: no draw of the step ({lines}) is Gaussian noise in mean + sigma * noise, with "
        "a mean that depends on parameters"
    )


def _judge_latent(audit: StepAudit, latent: Latent, latents: list[Latent]) -> None:
    """Examine the posterior, the KL and the gradients of one latent."""
    graph, loss = audit.graph, audit.loss
    found = find_divergence(graph, latent, latents, loss)
    curve = sampled_scale(graph, latent, found.heads) or sampled_scale(graph, latent)
    name = curve.name if curve is not None and curve.named else None
    audit.convention = audit.convention or name
    at = _at(latent.where)
    shape = graph[latent.z].shape
    text = curve.text if curve is not None and curve.named else "a function without a name"
    audit.checked.append(
        f"z of shape {tuple(shape)}{at}: mean + sigma * noise, with sigma = {text}"
        if latent.diagonal
        else f"z of shape {tuple(shape)}{at}: mean + L noise, with a full or low-rank covariance"
    )
    if latent.shared:
        audit.bug("noise_shared", "step", where=latent.where, noise=tuple(latent.noise_shape),
                  shape=tuple(shape))  # fmt: skip
    if _tied(graph, latent):
        audit.bug("heads_tied", "step", where=latent.where)
    {
        "kl": _kl,
        "function of the kl": _function,
        "constant": _constant,
        "absent": _absent,
        "other prior": _other_prior,
        "wrong": _wrong,
        "negative": _negative,
        "unknown": _unknown,
    }[found.kind](audit, latent, latents, found, name)
    _gradient(audit, latent, latents, found)


def _kl(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    fit = d.fit
    if fit is None:
        return
    if latent.uniform:
        audit.bug("noise_not_gaussian", "step", where=latent.where)
        return
    audit.read_as = audit.read_as or name
    if has_layers_before_its_prior(audit.graph, latent, latents, audit.loss, d):
        if not judge_posterior_flow(audit, latent, latents, d):
            audit.missing.append(
                f"the prior of z{_at(latent.where)}: the loss depends on z by layers, but not by "
                "what is compared with data; this is not the log-determinant of a flow that is "
                "understood"
            )
        return
    how = "by draws" if d.by_draws else "in closed form"
    bound = ", in the log weights of an importance-weighted bound" if d.importance else ""
    means, stds = fit.prior
    prior = "N(0, 1)"
    if not fit.is_standard:
        steady = float(means.max() - means.min()) < 1e-6 and float(stds.max() - stds.min()) < 1e-6
        if steady:
            prior = f"N({float(means[0]):.4g}, {float(stds[0]):.4g}^2)"
            if abs(float(means[0])) < 1e-6 and not d.by_draws:
                ratio = float(stds[0]) ** 2
                if min(abs(ratio - r) for r in (2.0, 0.5)) < 1e-6:
                    audit.bug("kl_mismatch", "step factor", where=d.where, std=float(stds[0]),
                              variance=ratio)  # fmt: skip
                    return
        else:
            prior = "a Gaussian whose mean and scale vary: a learned or conditional prior"
    if not fit.is_standard:
        error = prior_error(audit.graph, latent, audit.loss, d)
        if error is not None and error > 1e-3:
            audit.missing.append(
                f"the prior of the KL{_at(d.where)}: when its own mean and scale are moved, the "
                f"loss is off by {error:.2g} of the change of a KL: log p is forgotten, say, or "
                "the prior is a mixture"
            )
            return
        if error is not None:
            prior += ", in which the loss is that KL as well"
    audit.checked.append(f"KL ({how}) of what is sampled to {prior}{_at(d.where)}{bound}")
    offset = kl_offset(audit.graph, latent, audit.loss, d)
    if offset is not None and abs(offset) > 1e-3:
        audit.warn("kl_offset", "step", where=d.where, offset=offset)
    if d.muted:
        audit.warn("reduction_imbalance", "step muted", where=d.where, beta=0.0)
        return
    _weigh(audit, latent, latents, d)


def _weigh(audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence) -> None:
    """Compare the weight of the KL with that of the reconstruction."""
    graph = audit.graph
    if d.importance or all(graph[i].kind == "parameter" for i in latent.heads):
        return  # a bound of another form; weights of a Bayesian network
    beta = effective_beta(graph, latents, latent, audit.loss, d.weight)
    if beta is None:
        audit.unchecked.append(
            f"the weight of the KL{_at(d.where)}: the reconstruction is no known likelihood; the "
            f"KL of one latent has the weight {d.weight:.4g}"
        )
        return
    audit.details.setdefault("beta", beta.value)
    if (
        not beta.is_one
        and not audit.missing
        and (half := _half_batch(audit, latent, latents)) is not None
    ):
        n, m, other = half
        if abs(other - beta.value) > 0.01 * beta.value:
            audit.bug("reduction_imbalance", "step batch", where=d.where, beta=beta.value,
                      n=n, m=m, half=other)  # fmt: skip
            return
    if beta.is_one:
        audit.checked.append(f"the KL has the weight {beta.value:.4g} beside {beta.against}")
    else:
        audit.warn("reduction_imbalance", "step", where=d.where, beta=beta.value,
                   against=beta.against, explained=beta.explained)  # fmt: skip


def _half_batch(
    audit: StepAudit, latent: Latent, latents: list[Latent]
) -> tuple[int, int, float] | None:
    """The examples of the step, half of them, and the effective beta of a run with these.

    None if the step does not run with half a batch.
    """
    graph = audit.graph
    met = meetings(graph, latents, audit.loss)
    shape = graph[root_of(graph, met[0][2])].shape if met else ()
    rows = shape[0] if shape else 0
    tensors = [
        v.source
        for v in graph.values
        if v.kind == "data" and v.source is not None and v.shape[:1] == (rows,)
    ]
    if rows < 2 or not tensors or audit.rerun is None:
        return None
    whole = [(t, t.data) for t in tensors]
    try:
        for t in tensors:
            t.data = t.data[: rows // 2]
        again = audit.rerun()
    finally:
        for t, data in whole:
            t.data = data
    if again is None or (loss := _find_loss(StepAudit(""), again)) is None:
        return None
    others = find_latents(again, loss)
    place = latents.index(latent)
    if len(others) != len(latents):
        return None
    d = find_divergence(again, others[place], others, loss)
    beta = effective_beta(again, others, others[place], loss, d.weight)
    return None if beta is None else (rows, rows // 2, beta.value)


def _function(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.read_as = audit.read_as or name
    if d.form == "capacity":
        audit.warn("kl_capacity", "step", where=d.where)
    elif d.form == "free bits":
        audit.warn("free_bits", "step", where=d.where)
    else:
        audit.warn("kl_capacity", "function", where=d.where)
    audit.checked.append(f"the loss depends on the posterior by its KL to N(0, 1){_at(d.where)}")


def _constant(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.bug("kl_constant", "step", where=d.where)


def _absent(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.missing.append(
        f"the KL: the loss depends on mean and sigma of z{_at(latent.where)} only by what is "
        "decoded from z"
    )


def _other_prior(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.read_as = audit.read_as or name
    audit.checked.append(f"log q(z) in the loss is that of what is sampled{_at(d.where)}")
    if judge_posterior_flow(audit, latent, latents, d):
        return
    audit.unchecked.append(
        "the prior: a function of z that is not Gaussian; whether it is normalized is not checked"
    )


def _wrong(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    if judge_posterior_flow(audit, latent, latents, d):
        return
    audit.read_as = d.read_as
    fit = d.fit
    if d.read_as is not None:
        audit.bug("kl_mismatch", "step reading", where=d.where, sampled=name or "unnamed",
                  read=d.read_as)  # fmt: skip
    elif fit is not None and fit.residual < 1e-3 and fit.mean.numel() and fit.scale.numel():
        a, c, e = (float(t.nanmedian()) for t in (fit.mean[0], fit.scale[0], fit.scale[1]))
        audit.bug("kl_mismatch", "step coefficients", where=d.where, a=a, c=c, d=e)
    else:
        off = fit.residual if fit is not None else math.nan
        audit.bug("kl_mismatch", "step", where=d.where, residual=off)


def _negative(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    beta = effective_beta(audit.graph, latents, latent, audit.loss, d.weight)
    if beta is not None and beta.negated:
        audit.assumed.append("the step returns a bound to be maximized: its negative is audited")
        audit.checked.append(f"KL of what is sampled to N(0, 1){_at(d.where)}")
        audit.read_as = audit.read_as or name
        return
    audit.bug("kl_negative", "step", where=d.where, weight=d.weight)


def _unknown(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    if judge_posterior_flow(audit, latent, latents, d):
        return
    audit.missing.append(f"the KL of z{_at(latent.where)}: {d.form}")


def _tied(graph: Graph, latent: Latent) -> bool:
    """Whether the heads of mean and sigma hold the same numbers."""
    heads = [graph.get(i) for i in latent.heads]
    flat = [h.reshape(-1) for h in heads]
    same = any(
        a.numel() == b.numel() and a.numel() > 1 and torch.equal(a, b) and bool((a != a[0]).any())
        for k, a in enumerate(flat)
        for b in flat[:k]
    )
    if same or not latent.diagonal:
        return same
    prober = Prober(graph, latent)
    if not prober.usable or len(latent.heads) > 1:
        return False
    moments = torch.stack(prober.moments, 1)
    means, scales = ((moments[k].abs() > 1e-14).any(0) for k in (1, 3))
    return bool(scales.any()) and bool((means & scales)[scales].all())


def _gradient(audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence) -> None:
    """Whether the gradients of the decoder and of the KL reach the heads."""
    graph, loss = audit.graph, audit.loss
    if not audit.differentiable:
        return
    prober = Prober(graph, latent)
    if not prober.usable:
        return
    heads = dict(zip(("mean", "standard deviation"), prober.movers, strict=True))
    everything = graph.connected([loss])
    data = set(data_terms(graph, latents, loss))
    by_z = graph.connected([latent.z]) if latent.z in everything else set()
    by_score = by_z | graph.connected(everything.intersection(data))
    lost = [name for name, ids in heads.items() if ids and not by_score.intersection(ids)]
    used = graph.downstream([latent.z]) & graph.upstream([loss])
    if lost and len(used) > 1:
        audit.bug("no_gradient", where=latent.where, head=" and the ".join(lost))
    after = graph.downstream([latent.z, *latent.heads], stop=d.held)
    own = terms(graph, loss, {latent.z, *latent.heads})
    own = [t for t in own if t in after and t not in d.held]
    if own and d.kind in ("kl", "function of the kl", "other prior"):
        reached = graph.connected(everything.intersection(own))
        reached |= by_z if latent.z in reached else set()
        lost = [name for name, ids in heads.items() if ids and not reached.intersection(ids)]
        if lost:
            audit.bug("no_gradient", "kl", where=d.where, head=" and the ".join(lost))
