r"""The audit of a model of this library: its laws, and the effect of training.

A model reports every term of :math:`\log w` itself, so an audit can check each: the
log-determinant of each layer against autograd, each closed-form KL against draws, and infer
against generate; with the parameters as they are, and with random ones. Given data, it reports
latents that carry nothing, scales at their limits, and an aggregate posterior that is not the
prior.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma import context as contexts
from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, distance, name_of
from musigma.audit.jacobian import DENSE, volume
from musigma.audit.sandbox import Sandbox, forward_hooks
from musigma.conditional import Conditional
from musigma.context import Context
from musigma.data import Dataset
from musigma.distributions import Binning
from musigma.evaluation import ACTIVE, COLLAPSED, SATURATED, batch, evaluating, saturation
from musigma.gaussian import DiagonalGaussian
from musigma.layers import Dequantize
from musigma.model import Bijection, Model
from musigma.testing import BothWays, both_ways_of_layer, both_ways_of_model, randomized
from musigma.trace import Recorder, Trace, closed_kl

__all__ = ["audit_model", "examples_of"]

TOLERANCE = 1e-7  # relative errors of float64 in a whole model
LOST = 2e-2  # error of a round trip in float32 from which it is reported
STANDARD_ERRORS = 7.0
ROWS = 3
SECONDS = 600.0  # of the checks with one set of parameters
ROUNDING = 1e3 * 2.2e-16  # a thousand roundings in float64, by the condition number


def audit_model(
    model: Model, data: Tensor | Dataset | None = None, context: Context = None
) -> AuditReport:
    """Whether a model obeys its laws, and, given data, the effect of training.

    The model is not changed: copies in float64 are checked.

    Args:
        model: A model of this library.
        data: Data as in its training: (B, *event), or a `Dataset`; None: only check the laws.
        context: One row for each example, if the model is conditional; a `Dataset` brings its own.

    Returns:
        The report; `details` has each layer's condition and round trip, and the nats of each unit.

    Raises:
        AuditError: If the model is not one of this library, or does not take the data.

    Example:
        >>> from musigma import build
        >>> audit_model(build("realnvp", (4,), bits=None, depth=2, hidden=8)).verdict
        'correct'
    """
    if not isinstance(model, Model):
        raise AuditError(f"model: expected a model of musigma; got {type(model).__name__}")
    report = ReportBuilder(str(model.config.get("architecture", name_of(model))))
    with Sandbox(model, seconds=SECONDS, as_is=True) as sandbox, torch.no_grad():
        x, context = examples_of(model, data, context)
        few, row = _scored(model, x[:ROWS]), contexts.rows(context, slice(ROWS))
        exact = contexts.apply(Tensor.double, row)
        for candidate, when in (
            (copy.deepcopy(model).double().eval(), "with its own parameters"),
            (randomized(model, scale=0.25), "with random parameters"),
        ):
            laws = _Laws(report, candidate, exact, when)
            sandbox.call("model", laws.check, few)
        _check_levels(report, model)
        _check_single_precision(report, model, few, row)
        if data is None:
            report.unchecked.append("the effect of training: no data were given")
        else:
            with evaluating(model):
                _check_training(report, model, x, context)
    return report.build()


def examples_of(
    model: Model, data: Tensor | Dataset | None = None, context: Context = None
) -> tuple[Tensor, Context]:
    """Data for a model with their context: up to 512 that are given, or eight that it draws."""
    if isinstance(data, Dataset):
        return batch(data, np.arange(min(len(data), 512)), model)
    if data is not None:
        return model.floating(data), context
    spec = model.spec
    if context is None and spec is not None and spec.context:
        given = {}
        for variable in spec.context:
            value = torch.randn(8, *variable.shape)
            if variable.classes:
                classes = torch.arange(8) % variable.classes
                value = nn.functional.one_hot(classes, variable.classes)
            given[variable.name] = model.floating(value)
        context = given if isinstance(model, Conditional) else next(iter(given.values()))
    return model.sample(contexts.length(context) or 8, context), context


def _scored(model: Model, x: Tensor) -> Tensor:
    """Rows without missing values that have no probability, which each direction draws anew."""
    schema = model.spec.schema if model.spec else None
    if schema is None:
        return x
    drawn = x.isnan() & ~torch.tensor(
        [column.missing for column in schema.columns], device=x.device
    )
    return torch.where(drawn, Binning(schema).random(len(x)).to(x), x)


# --- laws --------------------------------------------------------------------------------------


class _Laws:
    """The laws of a model in float64 with one set of parameters."""

    def __init__(self, report: ReportBuilder, model: Model, context: Context, when: str):
        self.report, self.model, self.context, self.when = report, model, context, when

    def check(self, x: Tensor) -> None:
        """Check every layer at its own input, then the whole model, then each KL."""
        model, report = self.model, self.report
        x, names = model.floating(x.double()), model.site_names()
        seen: dict[Any, tuple[Tensor, Tensor | None]] = {}

        def hook(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen.setdefault(layer, (args[0].detach(), args[1] if len(args) > 1 else None))

        with forward_hooks({m for m in model.modules() if isinstance(m, Bijection)}, hook):
            model.infer(x, Trace(scoring=False), self.context)
        for layer, (h, row) in seen.items():
            self.check_layer(names[layer], layer, h, row)
        up = Recorder()
        model.infer(x, up, self.context)
        ways = both_ways_of_model(model, x, self.context)
        if self.agree("the model", ways, x, 1e-5, 1e-6):
            report.checked.append(
                f"{len(seen)} layers, and infer and generate of the model, {self.when}"
            )
            for site in up.paired:
                self.check_kl(names[site], up.qs[site], up.ps[site])

    def agree(self, what: str, ways: BothWays, x: Tensor, error: float, nats: float) -> bool:
        """Whether the data come back up to an error, and both directions give the same nats."""
        said: dict[str, Any] = {"what": what, "when": self.when}
        infinite = ways.forward[~ways.forward.isfinite()]
        off = _row_distance(ways.again, x)
        if len(infinite):
            self.report.bug(
                "not_finite", what=f"log w or a log-determinant of {what}", at=self.when
            )
        elif off > error:
            severity = "bug" if off > 1e-3 or what == "the model" else "warning"
            self.report.find("inverse_mismatch", severity, "model", error=off, **said)
        elif distance(ways.backward, ways.forward) > nats:
            said |= {"forward": ways.forward[0], "backward": ways.backward[0]}
            self.report.bug("inverse_logdet_mismatch", "model", **said)
        else:
            return True
        return False

    def check_layer(self, name: str, layer: Bijection, x: Tensor, context: Tensor | None) -> None:
        """Check the log-determinant of a layer by autograd, and its inverse."""
        report, what = self.report, f"{name} ({type(layer).__name__})"
        ways, condition = both_ways_of_layer(layer, x, context), math.nan
        rows = slice(0, len(x) if x[0].numel() <= DENSE else 1)
        row = None if context is None else context[rows]
        with torch.enable_grad(), suppress(RuntimeError):
            known = volume(lambda t: layer(t, row)[0].flatten(1), x[rows])
            if known is None:
                report.unchecked.append(f"the log-determinant of {what}: {x[0].numel()} elements")
            else:
                condition, stated = float(known.condition.max()), ways.forward[rows]
                wrong = float(((stated - known.log_det) / (1 + known.log_det.abs())).abs().max())
                if wrong > TOLERANCE * max(1.0, math.sqrt(condition) if condition > 0 else 1.0):
                    nats = [t[:1].tolist() for t in (stated, known.log_det)]
                    report.bug(
                        "logdet_mismatch",
                        what=what,
                        when=self.when,
                        stated=nats[0],
                        log_det=nats[1],
                    )
        if "own" in self.when:
            report.details.setdefault("conditions", {})[name] = condition
            report.details.setdefault("round_trips", {})[name] = _row_distance(ways.again, x)
        rounding = ROUNDING * (condition if math.isfinite(condition) else 1e6)
        self.agree(what, ways, x, rounding + TOLERANCE, rounding + 1e-6)

    def check_kl(self, name: str, q: Distribution, p: Distribution) -> None:
        """Check a closed-form KL against the mean of log q - log p over draws."""
        closed, draws = closed_kl(q, p), []
        if closed is None:
            self.report.checked.append(f"the KL of {name} has no closed form, and is sampled")
            return
        for _ in range(40):
            z = q.sample(torch.Size([100]))
            draws.append(q.log_prob(z) - p.log_prob(z))
        terms = torch.cat(draws)
        mean, error = terms.mean(0), terms.std(0) / math.sqrt(len(terms))
        limit = 1.3 * STANDARD_ERRORS * error + 1e-9 * (1 + closed.abs())
        if ((mean - closed).abs() > limit).any() or (closed < -1e-9).any():
            self.report.bug(
                "kl_mismatch", "model",
                name=name, when=self.when, formula=closed[0], draws=mean[0], error=error[0],
            )  # fmt: skip
        self.report.checked.append(f"the KL of {name} against {len(terms)} draws, {self.when}")


def _row_distance(again: Tensor, x: Tensor) -> float:
    """The distance of rows in which the same values are missing; infinite if others are."""
    same = torch.equal(again.isnan(), x.isnan())
    return distance(again.nan_to_num(), x.nan_to_num()) if same else math.inf


def _check_levels(report: ReportBuilder, model: Model) -> None:
    """Whether data are dequantized with as many levels as they have."""
    bits = model.config.get("options", {}).get("bits")
    for layer in model.modules():
        if bits is not None and isinstance(layer, Dequantize) and layer.levels != 2**bits:
            report.bug("dequantisation", "levels", bits=bits, levels=layer.levels)


def _check_single_precision(
    report: ReportBuilder, model: Model, x: Tensor, context: Context
) -> None:
    """The error of encoding and decoding in float32, for flows."""
    if not model.is_flow:
        return
    single = copy.deepcopy(model).float().eval()
    ways = both_ways_of_model(single, x.float(), contexts.apply(Tensor.float, context))
    error = _row_distance(ways.again, x)
    report.details["round_trip_float32"] = error
    if error > LOST:
        conditions = report.details.get("conditions", {})
        known = {k: v for k, v in conditions.items() if math.isfinite(v)} or {"?": math.nan}
        worst = max(known, key=known.__getitem__)
        report.warn(
            "ill_conditioned", "round_trip", error=error, condition=known[worst], layer=worst
        )
    else:
        report.checked.append(f"the round trip of x in float32: off by {error:.1g}")


# --- the effect of training --------------------------------------------------------------------


def _check_training(report: ReportBuilder, model: Model, x: Tensor, context: Context) -> None:
    names = model.site_names()
    for name, share in saturation(model, x, context).items():
        if share is None:
            report.unchecked.append(
                f"the scales of {name}: it has no emitters() that the pass ran"
            )
        elif share > SATURATED:
            report.warn("saturated_units", name=name, share=share)
    trace = Recorder(closed_form=True)
    model.infer(model.floating(x), trace, context)
    for site in model.latents():
        p, q, name = trace.ps.get(site), trace.qs.get(site), names[site]
        if not isinstance(p, DiagonalGaussian):
            continue
        if site in trace.paired and isinstance(q, DiagonalGaussian):
            units = (DiagonalGaussian(dist.mean, dist.log_std, 0) for dist in (q, p))
            nats = kl_divergence(*units).mean(0).flatten().double()
            report.details.setdefault("nats", {})[name] = nats[:256].tolist()
            _check_nats(report, name, nats)
        noise = p.whiten(trace.values[site]).flatten(1).double()
        if len(noise) >= 32 and site not in trace.paired:
            _check_calibration(report, name, noise)
        elif len(noise) >= 32 and not p.batch_shape:
            _check_aggregate(report, name, noise)
    report.checked.append(f"the latents of {len(x)} examples")


def _check_nats(report: ReportBuilder, name: str, nats: Tensor) -> None:
    """Whether a latent, and each of its units, carries anything on average over the data."""
    dead, total = int((nats < ACTIVE).sum()), float(nats.sum())
    if total < COLLAPSED:
        report.warn("posterior_collapse", name=name, nats=total)
    elif dead:
        report.warn("dead_units", name=name, dead=dead, units=len(nats), active=ACTIVE)


def _check_aggregate(report: ReportBuilder, name: str, noise: Tensor) -> None:
    """The moments of the aggregate posterior, in units of the prior's."""
    error = STANDARD_ERRORS / math.sqrt(len(noise))
    mean, var = noise.mean(0), noise.var(0)
    least, most = 0.5 * (1 - min(0.9, 1.5 * error)), 2 * (1 + 1.5 * error)
    far = int(((mean.abs() > 0.5 + error) | (var > most) | (var < least)).sum())
    if far:
        report.warn(
            "aggregate_prior",
            name=name, far=far, units=len(mean), mean=mean.abs().max(), least=var.min(),
            most=var.max(),
        )  # fmt: skip


def _check_calibration(report: ReportBuilder, name: str, noise: Tensor) -> None:
    """Whether the whitened latents of data have the moments of noise."""
    means = noise.mean(1), noise.square().mean(1)  # of one example: independent of the others
    errors = [STANDARD_ERRORS * float(m.std()) / math.sqrt(len(noise)) for m in means]
    mean, scale = (float(m.mean()) for m in means)
    if abs(mean) > 0.25 + errors[0] or abs(scale - 1) > 0.25 + errors[1]:
        report.warn("miscalibrated", name=name, mean=mean, mean_square=scale)
