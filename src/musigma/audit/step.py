"""The audit of a training step: what the loss that it returns really computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.graph import Graph
from musigma.audit.latents import find_latents, stray_draws
from musigma.audit.runs import Run, Runner, at, short_place
from musigma.audit.sandbox import Sandbox
from musigma.audit.step_flow import judge_dequantization, judge_flow
from musigma.audit.step_latent import judge_latent

__all__ = ["StepAudit", "audit_step", "examine"]

PER_LINE = 32  # latents of one line of code that are examined
SECONDS = 300.0
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
        >>> import torch
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
            live = graph.upstream([loss])
            if others := [v.id for v in graph.draws("other") if v.id in live]:
                lines = ", ".join(dict.fromkeys(short_place(graph.where(i)) for i in others[:3]))
                self.missing.append(
                    f"the KL: z is drawn by another law than the Gaussian ({lines}), as a gamma "
                    "or a categorical distribution, and its divergence is not examined"
                )
            elif not judge_flow(self):
                self.missing.append(_no_latent(graph, loss))
                if graph.hosts:
                    self.warn("host_random", source=" and ".join(graph.hosts))
            return
        lines = Counter(latent.where for latent in latents)
        for where, count in lines.items():
            for latent in [latent for latent in latents if latent.where == where][:PER_LINE]:
                try:
                    judge_latent(self, latent, latents)
                except FAILURES as error:
                    self.missing.append(_failed(f"the KL of z{at(where)}", error))
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
