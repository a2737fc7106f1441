"""The audit of a training step: what the loss that it returns really computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.graph import Graph
from musigma.audit.latents import Latent, find_latents, holds, meetings, stray_draws
from musigma.audit.probes import Prober, gradient, packing
from musigma.audit.runs import Run, Runner, at, short_place
from musigma.audit.sandbox import Sandbox
from musigma.audit.scales import READINGS
from musigma.audit.step_flow import judge_dequantization, judge_flow
from musigma.audit.step_kl import (
    Divergence,
    data_terms,
    entropy,
    find_divergence,
    sampled_scale,
    terms,
)
from musigma.audit.step_posterior_flow import (
    judge_dequantized_flow,
    judge_posterior_flow,
    layers_before_prior,
)
from musigma.audit.step_prior import kl_offset, log_normalizer, prior_error
from musigma.audit.step_weight import (
    effective_beta,
    mixed_examples,
    reconstruction_slopes,
    root_of,
)

__all__ = ["StepAudit", "audit_step", "examine"]

PER_LINE = 32  # latents of one line of code that are examined
SECONDS = 300.0
SLIPS = tuple(0.5 - 0.5 * math.log(d) - 0.5 / d for d in (0.5, 2.0))  # log sigma times d
NARROW = 0.9  # a smallest sigma above this is a bug, beside a prior of standard deviation 1
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError)  # fmt: skip


def _failed(what: str, error: Exception) -> str:
    return (
        f"{what}: its replay raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    )


def audit_step(step: Callable[[], Any]) -> AuditReport:
    """Audit a training step: one run of it is recorded, and its parts are replayed.

    What is found: where Gaussian noise enters, how the encoder's second output becomes the
    standard deviation, the KL divergence and its weight, the prior; of a flow, z and the
    log-determinant.

    Args:
        step: A callable without arguments that returns a loss: a tensor, or a tuple, a
            dictionary or a dataclass with one. It may call backward() and an optimizer.

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
    with Sandbox(step, seconds=SECONDS, as_is=True) as sandbox:
        return examine(step, sandbox, name_of(step)).build()


def examine(step: Callable[[], Any], sandbox: Sandbox, subject: str) -> StepAudit:
    """The audit of a step, before its report is built; the sandbox restores what it uses."""
    audit = StepAudit(subject)
    audit.runner = Runner(audit, sandbox, step)
    try:
        run = audit.runner.first()
        if run is not None:
            audit.judge(run)
    except FAILURES as error:
        audit.missing.append(_failed("the step", error))
    return audit


class StepAudit(ReportBuilder):
    """The report of one step under construction.

    Attributes:
        graph: The recorded step.
        loss: The number of the loss.
        runner: Runs the step again.
        differentiable: Whether what the step returned requires a gradient.
        convention: The reading of the second output by the sampler.
        read_as: The reading of it by the KL.
        layout: The layout of a packed output.
    """

    graph: Graph
    loss: int
    runner: Runner
    differentiable: bool

    def __init__(self, subject: str):
        super().__init__(subject)
        self.convention: str | None = None
        self.read_as: str | None = None
        self.layout: str | None = None

    def build(self, **more: Any) -> AuditReport:
        """The report, with the convention."""
        return super().build(
            convention=self.convention, read_as=self.read_as, layout=self.layout, **more
        )

    def judge(self, run: Run) -> None:
        """Examine all latents; of a step without any, the flow."""
        self.graph, self.loss, self.differentiable = run.graph, run.loss, run.differentiable
        graph, loss = run.graph, run.loss
        judge_dequantization(self)
        latents = find_latents(graph, loss)
        for draw in stray_draws(graph, loss, latents):
            self.missing.append(
                f"a draw{at(graph.where(draw))}: it is scaled by what depends on parameters, but "
                "is no part of mean + sigma * noise"
            )
        if not latents:
            if not judge_flow(self):
                self.missing.append(_no_latent(graph, loss))
                if graph.hosts:
                    self.warn("host_random", source=" and ".join(graph.hosts))
            return
        seen: Counter[str] = Counter()
        for latent in latents:
            seen[latent.where] += 1
            if seen[latent.where] > PER_LINE:
                continue
            try:
                _judge_latent(self, latent, latents)
            except FAILURES as error:
                self.missing.append(_failed(f"the KL of z{at(latent.where)}", error))
        for where, count in seen.items():
            if count > PER_LINE:
                self.missing.append(
                    f"the KL of {count - PER_LINE} further draws{at(where)}: only the first "
                    f"{PER_LINE} of a line are examined; audit a shorter sequence"
                )


# --- latents ------------------------------------------------------------------------------------


def _no_latent(graph: Graph, loss: int) -> str:
    live = graph.upstream([loss])
    draws = [v for v in graph.draws("gaussian", "random") if v.id in live]
    if not draws:
        return (
            "the KL: the loss depends on no random draw, and is not the likelihood of a flow: an "
            "autoencoder, or a VAE in evaluation mode"
        )
    lines = ", ".join(dict.fromkeys(short_place(graph.where(v.id)) for v in draws[:3]))
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
    if curve is not None:
        audit.details.setdefault("convention", curve.to_dict())
    if not latent.diagonal:
        name = "full covariance"
    audit.convention = audit.convention or name
    audit.layout = audit.layout or packing(graph, latent)
    place = at(latent.where)
    shape = graph[latent.z].shape
    text = curve.text if curve is not None and curve.named else "a function without a name"
    audit.checked.append(
        f"z of shape {tuple(shape)}{place}: mean + sigma * noise, with sigma = {text}"
        if latent.diagonal
        else f"z of shape {tuple(shape)}{place}: mean + L noise, a full or low-rank covariance"
    )
    if latent.shared:
        audit.bug("noise_shared", "step", where=latent.where, noise=tuple(latent.noise_shape),
                  shape=tuple(shape))  # fmt: skip
    if curve is not None and curve.name != "unit variance" and curve.smallest >= NARROW:
        audit.bug("sigma_range_restricted", where=latent.where, smallest=curve.smallest)
    if found.kind == "kl" and _tied(graph, latent):
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
    if layers_before_prior(audit.graph, latent, latents, audit.loss):
        if not judge_posterior_flow(audit, latent, latents, d):
            audit.missing.append(
                f"the prior of z{at(latent.where)}: the loss depends on z by layers, but not by "
                "what is compared with data; this is not the log-determinant of a flow that is "
                "understood"
            )
        return
    how = "by draws" if d.by_draws else "in closed form"
    if d.importance and (fault := mixed_examples(audit.graph, latents, audit.loss)) is not None:
        audit.missing.append(
            f"the importance weights{at(fault)}: their log-sum-exp is over the examples as well"
        )
    bound = ", in the log weights of an importance-weighted bound" if d.importance else ""
    means, stds = fit.prior
    prior = "N(0, 1)"
    offset = kl_offset(audit.graph, latent, audit.loss, d)
    if not fit.is_standard:
        steady = (
            bool(means.numel())
            and float(means.max() - means.min()) < 1e-6
            and float(stds.max() - stds.min()) < 1e-6
        )
        if steady:
            prior = f"N({float(means[0]):.4g}, {float(stds[0]):.4g}^2)"
            slip = min(abs(float(stds[0]) ** 2 - r) for r in (2.0, 0.5)) < 1e-6
            if slip and abs(float(means[0])) < 1e-6 and (offset is None or abs(offset) > 1e-3):
                audit.bug("kl_mismatch", "step factor", where=d.where, std=float(stds[0]),
                          variance=float(stds[0]) ** 2)  # fmt: skip
                return
        else:
            prior = "a Gaussian whose mean and scale vary: a learned or conditional prior"
            if offset is not None and min(abs(offset - slip) for slip in SLIPS) < 1e-5:
                audit.bug("kl_mismatch", "step logarithm", where=d.where)
                return
    error = prior_error(audit.graph, latent, audit.loss, d)
    if not fit.is_standard and error is not None:
        if error.size > 1e-3 and error.of_width:
            audit.bug("kl_mismatch", "step width", where=d.where)
            return
        if error.size > 1e-3:
            audit.missing.append(
                f"the prior of the KL{at(d.where)}: when its own mean and scale are moved, the "
                f"loss is off by {error.size:.2g} of the change of a KL: the prior may be a "
                "mixture, or be used elsewhere too"
            )
            return
        prior += ", in which the loss is that KL as well"
    audit.checked.append(f"KL ({how}) of what is sampled to {prior}{at(d.where)}{bound}")
    if d.by_draws and not d.importance and error is None:
        _normalized(audit, latent, d, gaussian=True)
    way = _way(audit.graph, latent, d, audit.loss)
    if offset is not None and abs(offset) > 1e-3 and "abs" in way:
        audit.warn("kl_capacity", "step", where=d.where)
    elif offset is not None and abs(offset) > 1e-3:
        audit.warn("kl_offset", "step", where=d.where, offset=offset)
    if d.muted:
        audit.warn("reduction_imbalance", "step muted", where=d.where, beta=0.0)
        return
    _weigh(audit, latent, latents, d)


def _way(graph: Graph, latent: Latent, d: Divergence, loss: int) -> set[str]:
    """The names of the operations between the heads and the loss, but by the decoder."""
    way = graph.downstream([latent.z, *d.heads], stop=d.held) & graph.upstream([loss], stop=d.held)
    return {n.name for n in graph.nodes if way.intersection(n.outs)}


def _weigh(audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence) -> None:
    """Compare the weight of the KL with that of the reconstruction."""
    graph = audit.graph
    if d.importance or all(graph[i].kind == "parameter" for i in latent.heads):
        return  # a bound of another form; weights of a Bayesian network
    if latent.z not in graph.connected([audit.loss]):
        return  # no reconstruction, but its score
    beta = effective_beta(graph, latents, latent, audit.loss, d.weight)
    if beta is not None and beta.opposed:
        audit.bug("kl_negative", "step reconstruction", where=d.where)
        return
    if (beta is None or not beta.is_one) and not audit.missing:
        half = _half_batch(audit, latent, latents, d.weight)
        if half is not None and abs(half[2] - 1) > 0.01:
            n, m, times = half
            audit.bug("reduction_imbalance", "step batch", where=d.where, n=n, m=m, times=times)
            return
    if beta is None:
        audit.unchecked.append(
            f"the weight of the KL{at(d.where)}: the reconstruction is no known likelihood; the "
            f"KL of one latent has the weight {d.weight:.4g}"
        )
        return
    audit.details.setdefault("beta", beta.value)
    if beta.is_one:
        audit.checked.append(f"the KL has the weight {beta.text}")
    else:
        audit.warn("reduction_imbalance", "step", where=d.where, beta=beta.value,
                   text=beta.text, explained=beta.explained)  # fmt: skip


def _half_batch(
    audit: StepAudit, latent: Latent, latents: list[Latent], weight: float
) -> tuple[int, int, float] | None:
    """The examples of the step, half of them, and what their beta is multiplied with.

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
    if any(t.layout != torch.strided for t in tensors):
        return None
    before = reconstruction_slopes(graph, latents, audit.loss)
    if rows < 2 or not tensors or not any(before) or any(t.requires_grad for t in tensors):
        return None
    whole = [(t, t.data) for t in tensors]
    try:
        for t in tensors:
            t.data = t.data[: rows // 2]
        again = audit.runner.again()
    finally:
        for t, data in whole:
            t.data = data
    if again is None:
        return None
    others = find_latents(again.graph, again.loss)
    place = latents.index(latent)
    if len(others) != len(latents):
        return None
    d = find_divergence(again.graph, others[place], others, again.loss)
    after = reconstruction_slopes(again.graph, others, again.loss)
    if len(after) != len(before) or d.kind != "kl":
        return None
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a and b]
    times = [(d.weight / weight) / (b / a) for a, b in pairs]
    if not times or max(times) > 1.01 * min(times):
        return None  # several terms, reduced in different ways
    powers = [(rows // 2 / rows) ** k for k in (-2, -1, 1, 2)]
    if min(abs(times[0] / p - 1) for p in (1.0, *powers)) > 0.01:
        return None  # not by the number of examples
    return rows, rows // 2, times[0]


def _function(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.read_as = audit.read_as or name
    if d.form == "capacity":
        audit.warn("kl_capacity", "step", where=d.where)
    elif d.form == "capped":
        audit.bug("kl_constant", "step above", where=d.where)
    elif d.form == "free bits":
        audit.warn("free_bits", "step", where=d.where)
    else:
        audit.warn("kl_capacity", "function", where=d.where)
    audit.checked.append(f"the loss depends on the posterior by its KL to N(0, 1){at(d.where)}")


def _constant(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.bug("kl_constant", "step", where=d.where)


def _absent(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.missing.append(
        f"the KL: the loss depends on mean and sigma of z{at(latent.where)} only by what is "
        "decoded from z"
    )


def _other_prior(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    audit.read_as = audit.read_as or name
    audit.checked.append(f"log q(z) in the loss is that of what is sampled{at(d.where)}")
    if judge_posterior_flow(audit, latent, latents, d) or judge_dequantized_flow(audit, latent, d):
        return
    if not _normalized(audit, latent, d):
        audit.missing.append(
            f"the prior of z{at(latent.where)}: a function of z that is neither Gaussian, nor a "
            "product over latents, nor a mixture that is understood"
        )


def _normalized(audit: StepAudit, latent: Latent, d: Divergence, gaussian: bool = False) -> bool:
    """Examine the prior of a KL by draws; False if that cannot be done."""
    graph, loss = audit.graph, audit.loss
    log_q = entropy(Prober(graph, latent), loss, d.held)
    if log_q is None:
        return False
    found = log_normalizer(graph, latent, loss, d, log_q[1])
    if found is None:
        return False
    if math.isinf(found) and gaussian:
        return False
    if math.isinf(found):
        audit.bug("kl_mismatch", "step improper", where=d.where)
    elif abs(found) > 1e-3:
        audit.warn("kl_offset", "step prior", where=d.where, offset=found)
    else:
        audit.checked.append(f"the prior of z{at(latent.where)} integrates to one")
    return True


def _wrong(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    if judge_posterior_flow(audit, latent, latents, d):
        return
    audit.read_as = d.read_as
    fit = d.fit
    curve = sampled_scale(audit.graph, latent)
    if d.read_as is not None and d.read_as == name and curve is not None and curve.is_bounded:
        audit.warn("kl_mismatch", "bounds", where=d.where, curve=curve.text)
    elif d.read_as is not None and d.read_as == name:
        audit.bug("kl_mismatch", "step noise", where=d.where, read=d.read_as,
                  sampled=curve.text if curve is not None else "another function")  # fmt: skip
    elif d.read_as is not None:
        _report_readings(audit, d, name or "unnamed")
    elif fit is not None and fit.residual < 1e-3 and fit.mean.numel() and fit.scale.numel():
        a, c, e = (float(t.nanmedian()) for t in (fit.mean[0], fit.scale[0], fit.scale[1]))
        audit.bug("kl_mismatch", "step coefficients", where=d.where, a=a, c=c, d=e)
    else:
        off = fit.residual if fit is not None else math.nan
        audit.bug("kl_mismatch", "step", where=d.where, residual=off)


def _report_readings(audit: StepAudit, d: Divergence, sampled: str) -> None:
    """Report a KL that reads the second output otherwise than the sampler does."""
    a, b = READINGS.get(sampled), READINGS.get(d.read_as or "")
    if a is None or b is None or not (a.variance and b.variance):
        audit.bug("kl_mismatch", "step reading", where=d.where, sampled=sampled, read=d.read_as)
        return
    words = {f"sampler_{key}": value for key, value in a._asdict().items() if key != "sigma"}
    words |= {f"kl_{key}": value for key, value in b._asdict().items() if key != "sigma"}
    words |= {"read_as": d.read_as}
    audit.bug("kl_mismatch", "step variance", where=d.where, **words)


def _negative(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    beta = effective_beta(audit.graph, latents, latent, audit.loss, d.weight)
    if beta is not None and beta.negated:
        audit.assumed.append("the step returns a bound to be maximized: its negative is audited")
        audit.checked.append(f"KL of what is sampled to N(0, 1){at(d.where)}")
        audit.read_as = audit.read_as or name
        return
    audit.bug("kl_negative", "step", where=d.where, weight=d.weight)


def _unknown(
    audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence, name: str | None
) -> None:
    if judge_posterior_flow(audit, latent, latents, d):
        return
    audit.missing.append(f"the KL of z{at(latent.where)}: {d.form}")


def _tied(graph: Graph, latent: Latent) -> bool:
    """Whether the heads of mean and sigma hold the same numbers."""
    prober = Prober(graph, latent)
    if not latent.diagonal or not prober.usable:
        return False
    movers = prober.movers
    if all(len(ids) == 1 for ids in movers) and movers[0] != movers[1]:
        a, b = (graph.get(ids[0]).reshape(-1) for ids in movers)
        return a.numel() == b.numel() > 1 and torch.equal(a, b) and bool((a != a[0]).any())
    place = prober.places[0]
    mean, sigma = (t.reshape(-1) for t in latent.moments(graph, {**prober.fixed, **place}))
    chosen = torch.randperm(mean.numel(), generator=torch.Generator().manual_seed(43))[:6]
    for k in chosen.tolist():
        rows = [gradient(t[k], place) for t in (mean, sigma.abs().log())]
        sizes = [row.norm() for row in rows]
        if min(sizes) < 1e-12 or float(abs(rows[0] @ rows[1])) < 0.999999 * float(
            sizes[0] * sizes[1]
        ):
            return False
    return True


def _gradient(audit: StepAudit, latent: Latent, latents: list[Latent], d: Divergence) -> None:
    """Whether the gradients of the decoder and of the KL reach the heads."""
    graph, loss = audit.graph, audit.loss
    if not audit.differentiable:
        return
    prober = Prober(graph, latent)
    if not prober.usable:
        return
    names = ("mean", "standard deviation")
    moves = (torch.stack(prober.moments, 1).abs() > 1e-14).any(1)
    entries = dict(zip(names, (moves[1], moves[2] | moves[3]), strict=True))
    order = torch.linspace(0.5, 1.5, graph[latent.z].numel, dtype=torch.float64)
    stopped = prober.stopped(latent.z, {}, lambda z: (order * z.reshape(-1)).sum())
    data = graph.connected([loss])
    decoded = graph.downstream(holds(graph, latent))
    scored = data.intersection(data_terms(graph, latents, loss)).intersection(decoded)
    scored = {t for t in scored if not graph.connected([t]).intersection(holds(graph, latent))}
    by_score = graph.connected(scored, stop=[latent.z])
    used = len(graph.downstream([latent.z]) & graph.upstream([loss])) > 1
    if latent.z not in data:
        stopped |= True
    lost = [name for name, at in entries.items() if (at & stopped).any()]
    if lost and used and not by_score.intersection(latent.heads):
        audit.bug("no_gradient", where=latent.where, head=" and the ".join(lost))
    elif latent.z in data and d.kind in ("kl", "function of the kl") and not d.importance:
        stopped = prober.stopped(loss, d.held, torch.sum, d.by_draws)
        lost = [name for name, at in entries.items() if (at & stopped).any()]
        if lost and len(latents) == 1:
            audit.bug("no_gradient", "kl", where=d.where, head=" and the ".join(lost))
        elif lost:
            audit.missing.append(
                f"the gradient of the KL{at(d.where)}: it does not reach the "
                f"{' and the '.join(lost)} of z; a stop that is meant, or a fault"
            )
    elif d.importance or d.kind == "other prior":
        after = graph.downstream([latent.z, *latent.heads], stop=d.held)
        own = terms(graph, loss, {latent.z, *latent.heads})
        joined = graph.connected([loss], stop=own)
        own = [t for t in own if t in after and t not in d.held]
        if own and not joined.intersection(own):
            audit.bug("no_gradient", "kl", where=d.where, head="mean and the standard deviation")
