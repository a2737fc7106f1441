r"""The audit of a model of this library: its laws, and the effect of training.

A model reports every term of :math:`\log w` itself, so an audit can check each: the
log-determinant of each layer against autograd, each closed-form KL against draws, infer against
generate, the preprocessing against :math:`\log_2` of the levels; with the parameters as they are,
and with random ones. Given data, it reports latents that carry nothing, scales at their limits,
and an aggregate posterior that is not the prior.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from itertools import takewhile
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma import context as contexts
from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, distance, name_of
from musigma.audit.jacobian import DENSE, volume
from musigma.audit.sandbox import forward_hooks
from musigma.conditional import Conditional
from musigma.context import Context
from musigma.data import Dataset
from musigma.distributions import Binning, StandardUniform
from musigma.evaluation import (
    ACTIVE,
    COLLAPSED,
    SATURATED,
    batch,
    bits_per_dim,
    evaluating,
    saturation,
)
from musigma.gaussian import DiagonalGaussian
from musigma.layers import Dequantize, Rescale
from musigma.model import Bijection, Chain, Layer, Model
from musigma.testing import both_ways_of_layer, both_ways_of_model, randomized
from musigma.trace import Recorder, Trace

__all__ = ["audit_model", "examples_of"]

TOLERANCE = 1e-7  # relative errors of float64 in a whole model
LOST = 2e-2  # error of a round trip in float32 from which it is reported
STANDARD_ERRORS = 7.0
ROWS = 3
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
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        x, context = examples_of(model, data, context)
        few, row = _scored(model, x[:ROWS]), contexts.rows(context, slice(ROWS))
        for exact, when in (
            (copy.deepcopy(model).double().eval(), "with its own parameters"),
            (randomized(model, scale=0.25), "with random parameters"),
        ):
            try:
                _check_laws(report, exact, few, contexts.apply(Tensor.double, row), when)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                text = (str(error).splitlines() or ["-"])[0]
                raise AuditError(
                    f"model: given {tuple(few.shape)}, it raises {type(error).__name__}: {text}"
                ) from error
        _check_preprocessing(report, model, few, row)
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
    """Data for a model with their context: up to 512 that are given, or eight that it takes."""
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
    rows = contexts.length(context) or 8
    if spec is None:
        return model.sample(rows, context), context
    if spec.schema is not None:
        return Binning(spec.schema).random(rows), context
    if spec.levels is None:
        return torch.randn(rows, *spec.shape), context
    levels = torch.as_tensor(spec.levels).reshape(-1, *(1,) * (len(spec.shape) - 1))
    return model.floating((torch.rand(rows, *spec.shape) * levels).floor()), context


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


def _check_laws(
    report: ReportBuilder, model: Model, x: Tensor, context: Context, when: str
) -> None:
    x = model.floating(x.double())
    names = model.site_names()
    seen: dict[Any, tuple[Tensor, Tensor | None]] = {}

    def hook(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        h, *rest = args
        seen.setdefault(layer, (h.detach(), rest[0] if rest else None))

    with forward_hooks({m for m in model.modules() if isinstance(m, Bijection)}, hook):
        model.infer(x, Trace(scoring=False), context)
    for layer, (h, row) in seen.items():
        _check_bijection(report, names[layer], layer, h, row, when)
    if seen:
        report.checked.append(f"{len(seen)} layers, inverses and log-determinants, {when}")
    up = Recorder()
    model.infer(x, up, context)
    log_w = up.evidence(model.latents()).elbo
    if not log_w.isfinite().all():
        worst = float(log_w[~log_w.isfinite()][0])
        report.bug("not_finite", "model", value=worst, when=when)
        return
    again, forward, backward = both_ways_of_model(model, x, context)
    error = _row_distance(again, x)
    if error > 1e-5:
        report.bug("inverse_mismatch", "model", error=error, when=when)
        return
    if distance(backward, forward) > 1e-6:
        report.bug(
            "inverse_logdet_mismatch", "model",
            when=when, infer=float(forward[0]), generate=float(backward[0]),
        )  # fmt: skip
    else:
        report.checked.append(f"infer and generate give the same log w, {when}")
    for site in up.paired:
        _check_closed_form(report, names[site], up.qs[site], up.ps[site], when)


def _row_distance(again: Tensor, x: Tensor) -> float:
    """The distance of rows in which the same values are missing; infinite if others are."""
    same = torch.equal(again.isnan(), x.isnan())
    return distance(again.nan_to_num(), x.nan_to_num()) if same else math.inf


def _check_bijection(
    report: ReportBuilder,
    name: str,
    layer: Bijection,
    x: Tensor,
    context: Tensor | None,
    when: str,
) -> None:
    said: dict[str, Any] = {
        "what": f"{name} ({type(layer).__name__})",
        "layer": name,
        "when": when,
    }
    z, log_det = layer(x, context)
    if not (z.isfinite().all() and log_det.isfinite().all()):
        report.bug("logdet_nan" if z.isfinite().all() else "not_finite", "model layer", **said)
        return
    again, _, backward = both_ways_of_layer(layer, x, context)
    condition, error = math.nan, _row_distance(again, x)
    rows = slice(0, len(x) if x[0].numel() <= DENSE else 1)
    row = None if context is None else context[rows]
    with torch.enable_grad(), suppress(RuntimeError):
        known = volume(lambda t: layer(t, row)[0].flatten(1), x[rows])
        if known is None:
            what = f"{said['what']}: {x[0].numel()} elements"
            report.unchecked.append(f"the log-determinant of {what}")
        else:
            condition, truth = float(known.condition.max()), known.log_det
            wrong = float(((log_det[rows] - truth).abs() / (1 + truth.abs())).max())
            if wrong > TOLERANCE * max(1.0, math.sqrt(condition) if condition > 0 else 1.0):
                stated, true = log_det[:1].tolist(), truth[:1].tolist()
                report.bug("logdet_mismatch", "model", **said, stated=stated, log_det=true)
    if "own" in when:
        report.details.setdefault("conditions", {})[name] = condition
        report.details.setdefault("round_trips", {})[name] = error
    rounding = ROUNDING * (condition if math.isfinite(condition) else 1e6)
    if error > rounding + TOLERANCE:
        severity = "bug" if error > 1e-3 else "warning"
        report.find("inverse_mismatch", severity, "model layer", **said, error=error)
    elif distance(backward, log_det) > 1e-6 + rounding:
        same = distance(-backward, log_det) < 1e-6
        code = "inverse_logdet_sign" if same else "inverse_logdet_mismatch"
        said["both"] = [float(log_det[0]), -float(backward[0])]
        report.bug(code, "model layer", **said)


def _check_closed_form(
    report: ReportBuilder, name: str, q: Distribution, p: Distribution, when: str
) -> None:
    """A closed-form KL against the mean of log q - log p over draws."""
    closed, draws = kl_divergence(q, p), []
    for _ in range(40):
        z = q.sample(torch.Size([100]))
        draws.append(q.log_prob(z) - p.log_prob(z))
    terms = torch.cat(draws)
    mean, error = terms.mean(0), terms.std(0) / math.sqrt(len(terms))
    limit = 1.3 * STANDARD_ERRORS * error + 1e-9 * (1 + closed.abs())
    if ((mean - closed).abs() > limit).any():
        report.bug(
            "kl_mismatch", "model",
            name=name, when=when, formula=closed[0], draws=mean[0], error=error[0],
        )  # fmt: skip
    if (closed < -1e-9).any():
        report.bug("kl_negative", "model", name=name, when=when, least=closed.min())
    report.checked.append(f"the KL of {name} against {len(terms)} draws, {when}")


def _check_preprocessing(report: ReportBuilder, model: Model, x: Tensor, context: Context) -> None:
    """Whether uniform images cost log2 of the levels under the uniform model."""
    if isinstance(model, Conditional):
        model = model.model
    layers = model.layers if isinstance(model, Chain) else []
    leading = list(takewhile(lambda layer: cast(Layer, layer).is_preprocessing, layers))
    dequantize = next((layer for layer in leading if isinstance(layer, Dequantize)), None)
    if dequantize is None:
        return
    bits, levels = model.config.get("options", {}).get("bits"), dequantize.levels
    if bits is not None and levels != 2**bits:
        report.bug("dequantisation", "levels", bits=bits, levels=levels)
    if not isinstance(dequantize.noise, StandardUniform):
        report.checked.append(f"dequantization: learned noise over {levels} levels")
        return
    trace, width = Trace(), float(levels)
    y = torch.randint(0, levels, x.shape).double()
    for layer in copy.deepcopy(nn.ModuleList(leading)).double():
        y = cast(Layer, layer).infer(y, trace)
        if isinstance(layer, Rescale):
            width *= abs(layer.scale)
    nats = x[0].numel() * math.log(width)  # of the uniform density on the rescaled levels
    nats = nats - sum(trace.log_det.values()) + sum(trace.log_q.values())
    figure = float(bits_per_dim(torch.as_tensor(nats), x[0].numel()).max())
    if abs(figure - math.log2(levels)) > 1e-6:
        report.bug("dequantisation", bits_per_dim=figure, entropy=math.log2(levels))
    else:
        report.checked.append(f"uniform images under the uniform model: {figure:.6g} bits/dim")


def _check_single_precision(
    report: ReportBuilder, model: Model, x: Tensor, context: Context
) -> None:
    """The error of encoding and decoding in float32, for flows."""
    if not model.is_flow:
        return
    single = copy.deepcopy(model).float().eval()
    context = contexts.apply(Tensor.float, context)
    latents = single.encode(x.float(), context, mode=True)
    error = _row_distance(single.decode(latents, context), x)
    report.details["round_trip_float32"] = error
    if error > LOST:
        conditions = report.details.get("conditions", {})
        known = {k: v for k, v in conditions.items() if math.isfinite(v)} or {"?": math.nan}
        worst = max(known, key=known.__getitem__)
        report.warn("ill_conditioned", error=error, condition=known[worst], layer=worst)
    else:
        report.checked.append(f"decode(encode(x)) in float32: off by {error:.1g}")


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
    latents = set(model.latents())
    for site, p in trace.ps.items():
        if site not in latents or not isinstance(p, DiagonalGaussian):
            continue
        noise, q = p.whiten(trace.values[site]).flatten(1).double(), trace.qs.get(site)
        if site in trace.paired and isinstance(q, DiagonalGaussian):
            units = (DiagonalGaussian(dist.mean, dist.log_std, 0) for dist in (q, p))
            nats = kl_divergence(*units).mean(0).flatten().double()
            report.details.setdefault("nats", {})[names[site]] = nats[:256].tolist()
            _check_nats(report, names[site], nats)
        if len(noise) < 32:
            continue
        if site not in trace.paired:
            _check_calibration(report, names[site], noise)
        elif not p.batch_shape:
            _check_aggregate(report, names[site], noise)
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
