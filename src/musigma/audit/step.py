"""The audit of a training step: what the loss that it returns really computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from musigma.audit.findings import (
    AuditError,
    AuditReport,
    Failed,
    Missing,
    Outcome,
    name_of,
    warning,
)
from musigma.audit.graph import Graph, Kind
from musigma.audit.latents import find_latents, stray_draws
from musigma.audit.probes import Prober
from musigma.audit.runs import Run, Runner, at, short_place, unexamined
from musigma.audit.sandbox import Sandbox
from musigma.audit.step_flow import (
    check_dequantization,
    check_flow,
    check_flow_of_noise,
)
from musigma.audit.step_kl import penalized_heads
from musigma.audit.step_latent import Subject, check_latent

__all__ = ["audit_step", "examine"]

PER_LINE = 32  # latents of one line of code that are examined
SECONDS = 300.0
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError)  # fmt: skip


def _failed(what: str, error: Exception) -> Failed:
    reason = " ".join(str(error).split())[:200]
    return Failed(f"{what}: its replay raises {type(error).__name__}: {reason}")


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
        return AuditReport.of(name_of(step), examine(step, sandbox))


def examine(step: Callable[[], Any], sandbox: Sandbox) -> Iterator[Outcome]:
    """What is found in a step; the sandbox restores what it uses."""
    try:
        runner = Runner(sandbox, step)
        run, notes = runner.first()
        yield from notes
        if run is not None:
            is_sure = not any(isinstance(note, Missing) for note in notes)
            yield from _check(run, runner, is_sure)
    except FAILURES as error:
        yield _failed("the step", error)


def _check(run: Run, runner: Runner, is_sure: bool) -> Iterator[Outcome]:
    """Examine all latents; of a step without any, the flow."""
    graph, loss = run.graph, run.loss
    yield from check_dequantization(graph, loss)
    latents = find_latents(graph, loss)
    for draw in stray_draws(graph, loss, latents):
        why = "it is scaled by what depends on parameters, but is no part of mean + sigma * noise"
        yield unexamined("a draw", graph.where(draw), why)
    if not latents:
        yield from _without_latent(graph, loss)
    elif heads := penalized_heads(graph, loss, latents):
        lines = ", ".join(dict.fromkeys(short_place(graph.where(i)) for i in heads))
        why = "it reaches the loss by terms of its own, and no draw: is a z to be sampled with it?"
        yield unexamined("an output of a layer", lines, why)
    for where, count in Counter(latent.where for latent in latents).items():
        for latent in [latent for latent in latents if latent.where == where][:PER_LINE]:
            try:
                prober = Prober(graph, latent)
                on = Subject(prober, latents, run, runner, is_sure)
                yield from check_latent(on)
            except FAILURES as error:
                yield _failed(f"the KL of z{at(where)}", error)
        if count > PER_LINE:
            yield unexamined(
                f"the KL of {count - PER_LINE} further draws", where, f"only the first {PER_LINE} "
                "of a line are examined; audit a shorter sequence",
            )  # fmt: skip


def _lines_of_draws(graph: Graph, loss: int, *kinds: Kind) -> str:
    """The first lines with draws that a loss depends on; "" if there are none."""
    live = graph.upstream([loss])
    draws = [v.id for v in graph.draws(*kinds) if v.id in live]
    return ", ".join(dict.fromkeys(short_place(graph.where(i)) for i in draws[:3]))


def _without_latent(graph: Graph, loss: int) -> Iterator[Outcome]:
    """Examine a step that draws no Gaussian latent: as that of a flow, if it is one."""
    others = _lines_of_draws(graph, loss, "other")
    if not others and (found := check_flow(graph, loss) or check_flow_of_noise(graph, loss)):
        yield from found
        return
    if others:
        why = (
            f"z is drawn by another law than the Gaussian ({others}), as a gamma or a "
            "categorical distribution, and its divergence is not examined"
        )
    elif lines := _lines_of_draws(graph, loss, "gaussian", "random"):
        why = (
            f"no draw of the step ({lines}) is Gaussian noise in mean + sigma * noise, with "
            "a mean that depends on parameters; nor is this the likelihood of a flow"
        )
    else:
        why = (
            "the loss depends on no random draw, and is not the likelihood of a flow: an "
            "autoencoder, or a VAE in evaluation mode"
        )
    yield Missing(f"the KL: {why}")
    if graph.hosts and not others:
        yield warning("host_random", source=" and ".join(graph.hosts))
