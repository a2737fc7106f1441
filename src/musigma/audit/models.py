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
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from musigma import context as contexts
from musigma.audit.findings import (
    AuditError,
    AuditReport,
    Facts,
    Outcome,
    Passed,
    Skipped,
    bug,
    distance,
    name_of,
    warning,
)
from musigma.audit.jacobian import DENSE, Volume, volume
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
    found: list[Outcome] = []
    with Sandbox(model, seconds=SECONDS, as_is=True) as sandbox, torch.no_grad():
        x, context = examples_of(model, data, context)
        few, row = _scored(model, x[:ROWS]), contexts.rows(context, slice(ROWS))
        exact = contexts.apply(Tensor.double, row)
        for candidate, when in (
            (copy.deepcopy(model).double().eval(), "with its own parameters"),
            (randomized(model, scale=0.25), "with random parameters"),
        ):
            laws = _check_laws(candidate, few, exact, when)
            found += sandbox.call("model", lambda laws=laws: list(laws))
        found += _check_levels(model)
        if model.is_flow:
            own = next(o.details["conditions"] for o in found if isinstance(o, Facts))
            found += _check_single_precision(model, few, row, own)
        if data is None:
            found.append(Skipped("the effect of training: no data were given"))
        else:
            with evaluating(model):
                found += _check_training(model, x, context)
    return AuditReport.of(str(model.config.get("architecture", name_of(model))), found)


def examples_of(
    model: Model, data: Tensor | Dataset | None = None, context: Context = None
) -> tuple[Tensor, Context]:
    """Data for a model with their context: up to 512 that are given, or eight that it draws."""
    if isinstance(data, Dataset):
        return batch(data, np.arange(min(len(data), 512)), model)
    if data is not None:
        return model.floating(data), context
    if context is None and model.spec is not None and model.spec.context:
        given = {}
        for v in model.spec.context:
            value = torch.randn(8, *v.shape)
            if v.classes:
                value = torch.eye(v.classes)[torch.arange(8) % v.classes]
            given[v.name] = model.floating(value)
        context = given if isinstance(model, Conditional) else next(iter(given.values()))
    return model.sample(contexts.length(context) or 8, context), context


def _scored(model: Model, x: Tensor) -> Tensor:
    """Rows without missing values that have no probability, which each direction draws anew."""
    if not model.spec or (schema := model.spec.schema) is None:
        return x
    scored = torch.tensor([column.missing for column in schema.columns], device=x.device)
    return torch.where(x.isnan() & ~scored, Binning(schema).random(len(x)).to(x), x)


# --- laws --------------------------------------------------------------------------------------


def _check_laws(model: Model, x: Tensor, context: Context, when: str) -> Iterator[Outcome]:
    """Check every layer at its own input, then the whole model, then each KL, in float64."""
    x, names = model.floating(x.double()), model.site_names()
    inputs: dict[Bijection, tuple[Any, ...]] = {}

    def hook(layer: Bijection, args: tuple[Any, ...], out: Any) -> None:
        inputs.setdefault(layer, args[:2])

    with forward_hooks({m for m in model.modules() if isinstance(m, Bijection)}, hook):
        model.infer(x, Trace(scoring=False), context)
    conditions, errors = dict[str, float](), dict[str, float]()
    for layer, given in inputs.items():
        name, ways, known = names[layer], both_ways_of_layer(layer, *given), _volume(layer, *given)
        conditions[name] = math.nan if known is None else float(known.condition.max())
        errors[name] = _row_distance(ways.again, given[0])
        yield from _check_layer(f"{name} ({type(layer).__name__})", given[0], ways, known, when)
    yield Facts(details={"conditions": conditions, "round_trips": errors})
    up = Recorder()
    model.infer(x, up, context)
    ways = both_ways_of_model(model, x, context)
    faults = list(_check_directions("the model", x, ways, when, 1e-5, 1e-6))
    yield from faults
    if faults:
        return
    layers = f"{len(inputs)} layers, and " if inputs else ""
    yield Passed(f"{layers}the model in both directions, {when}")
    for site in up.paired:
        yield from _check_kl(names[site], up.qs[site], up.ps[site], when)


def _volume(layer: Bijection, x: Tensor, context: Tensor | None = None) -> Volume | None:
    """The log-determinant by autograd; of one row if there are many elements."""
    rows = slice(None if x[0].numel() <= DENSE else 1)
    row = contexts.rows(context, rows)
    with torch.enable_grad(), suppress(RuntimeError):
        return volume(lambda t: layer(t, row)[0].flatten(1), x[rows])
    return None


def _check_layer(
    what: str, x: Tensor, ways: BothWays, known: Volume | None, when: str
) -> Iterator[Outcome]:
    """Check the log-determinant of a layer by autograd, and its inverse."""
    condition = math.nan
    if known is None:
        yield Skipped(f"the log-determinant of {what}: {x[0].numel()} elements")
    else:
        condition = float(known.condition.max())
        stated = ways.forward[: len(known.log_det)]
        wrong = float(((stated - known.log_det) / (1 + known.log_det.abs())).abs().max())
        if wrong > TOLERANCE * max(1.0, math.sqrt(condition) if condition > 0 else 1.0):
            given, true = stated[:1].tolist(), known.log_det[:1].tolist()
            yield bug("logdet_mismatch", what=what, when=when, stated=given, log_det=true)
    rounding = ROUNDING * (condition if math.isfinite(condition) else 1e6)
    yield from _check_directions(what, x, ways, when, rounding + TOLERANCE, rounding + 1e-6)


def _check_directions(
    what: str, x: Tensor, ways: BothWays, when: str, error: float, nats: float
) -> Iterator[Outcome]:
    """Check that data come back up to an error, and that both directions give the same nats."""
    off = _row_distance(ways.again, x)
    if not ways.forward.isfinite().all():
        yield bug("not_finite", what=f"log w or a log-determinant of {what}", at=when)
    elif off > error:
        finding = bug if off > 1e-3 or what == "the model" else warning
        yield finding("inverse_mismatch", "model", error=off, what=what, when=when)
    elif distance(ways.backward, ways.forward) > nats:
        said: dict[str, Any] = {"forward": ways.forward[0], "backward": ways.backward[0]}
        yield bug("inverse_logdet_mismatch", "model", what=what, when=when, **said)


def _check_kl(name: str, q: Distribution, p: Distribution, when: str) -> Iterator[Outcome]:
    """Check a closed-form KL against the mean of log q - log p over draws."""
    if (closed := closed_kl(q, p)) is None:
        yield Passed(f"the KL of {name} has no closed form, and is sampled")
        return
    draws = (q.sample(torch.Size([100])) for _ in range(40))
    terms = torch.cat([q.log_prob(z) - p.log_prob(z) for z in draws])
    mean, error = terms.mean(0), terms.std(0) / math.sqrt(len(terms))
    limit = 1.3 * STANDARD_ERRORS * error + 1e-9 * (1 + closed.abs())
    if ((mean - closed).abs() > limit).any() or (closed < -1e-9).any():
        found: dict[str, Any] = {"formula": closed[0], "draws": mean[0], "error": error[0]}
        yield bug("kl_mismatch", "model", name=name, when=when, **found)
    yield Passed(f"the KL of {name} against {len(terms)} draws, {when}")


def _row_distance(again: Tensor, x: Tensor) -> float:
    """The distance of rows in which the same values are missing; infinite if others are."""
    same = torch.equal(again.isnan(), x.isnan())
    return distance(again.nan_to_num(), x.nan_to_num()) if same else math.inf


def _check_levels(model: Model) -> Iterator[Outcome]:
    """Whether data are dequantized with as many levels as they have."""
    bits = model.config.get("options", {}).get("bits")
    for layer in model.modules():
        if bits is not None and isinstance(layer, Dequantize) and layer.levels != 2**bits:
            yield bug("dequantisation", "levels", bits=bits, levels=layer.levels)


def _check_single_precision(
    model: Model, x: Tensor, context: Context, conditions: dict[str, float]
) -> Iterator[Outcome]:
    """The error of encoding and decoding in float32."""
    single = copy.deepcopy(model).float().eval()
    ways = both_ways_of_model(single, x.float(), contexts.apply(Tensor.float, context))
    error = _row_distance(ways.again, x)
    yield Facts(details={"round_trip_float32": error})
    if error > LOST:
        known = {k: v for k, v in conditions.items() if math.isfinite(v)} or {"?": math.nan}
        layer, condition = max(known.items(), key=lambda entry: entry[1])
        found: dict[str, Any] = {"error": error, "condition": condition, "layer": layer}
        yield warning("ill_conditioned", "round_trip", **found)
    else:
        yield Passed(f"the round trip of x in float32: off by {error:.1g}")


# --- the effect of training --------------------------------------------------------------------


def _check_training(model: Model, x: Tensor, context: Context) -> Iterator[Outcome]:
    names = model.site_names()
    for name, share in saturation(model, x, context).items():
        if share is None:
            yield Skipped(f"the scales of {name}: it has no emitters() that the pass ran")
        elif share > SATURATED:
            yield warning("saturated_units", name=name, share=share)
    trace, carried = Recorder(closed_form=True), dict[str, list[float]]()
    model.infer(model.floating(x), trace, context)
    for site in model.latents():
        p, q, name = trace.ps.get(site), trace.qs.get(site), names[site]
        if not isinstance(p, DiagonalGaussian):
            continue
        is_paired = site in trace.paired
        if is_paired and isinstance(q, DiagonalGaussian):
            units = (DiagonalGaussian(dist.mean, dist.log_std, 0) for dist in (q, p))
            nats = kl_divergence(*units).mean(0).flatten().double()
            carried[name] = nats[:256].tolist()
            yield from _check_nats(name, nats)
        noise = p.whiten(trace.values[site]).flatten(1).double()
        if len(noise) >= 32 and not (is_paired and p.batch_shape):
            yield from (_check_aggregate if is_paired else _check_calibration)(name, noise)
    yield Facts(details={"nats": carried} if carried else {})
    yield Passed(f"the latents of {len(x)} examples")


def _check_nats(name: str, nats: Tensor) -> Iterator[Outcome]:
    """Whether a latent, and each of its units, carries anything on average over the data."""
    dead, total = int((nats < ACTIVE).sum()), float(nats.sum())
    if total < COLLAPSED:
        yield warning("posterior_collapse", name=name, nats=total)
    elif dead:
        yield warning("dead_units", name=name, dead=dead, units=len(nats), active=ACTIVE)


def _check_aggregate(name: str, noise: Tensor) -> Iterator[Outcome]:
    """The moments of the aggregate posterior, in units of the prior's."""
    error = STANDARD_ERRORS / math.sqrt(len(noise))
    mean, var = noise.mean(0).abs(), noise.var(0)
    least, most = 0.5 * (1 - min(0.9, 1.5 * error)), 2 * (1 + 1.5 * error)
    if far := int(((mean > 0.5 + error) | (var > most) | (var < least)).sum()):
        numbers: dict[str, Any] = {"mean": mean.max(), "least": var.min(), "most": var.max()}
        yield warning("aggregate_prior", name=name, far=far, units=len(mean), **numbers)


def _check_calibration(name: str, noise: Tensor) -> Iterator[Outcome]:
    """Whether the whitened latents of data have the moments of noise."""
    means = noise.mean(1), noise.square().mean(1)  # of one example: independent of the others
    errors = [STANDARD_ERRORS * float(m.std()) / math.sqrt(len(noise)) for m in means]
    mean, scale = (float(m.mean()) for m in means)
    if abs(mean) > 0.25 + errors[0] or abs(scale - 1) > 0.25 + errors[1]:
        yield warning("miscalibrated", name=name, mean=mean, mean_square=scale)
