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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma import context as contexts
from musigma.audit.findings import (
    AuditError,
    AuditReport,
    Facts,
    Finding,
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
            laws = _Laws(candidate, exact, when)
            found += sandbox.call("model", lambda laws=laws: list(laws.check(few)))
        found += _check_levels(model)
        if model.is_flow:
            found += _check_single_precision(model, few, row, _conditions(found))
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


class _LayerPass(NamedTuple):
    """A layer at its input, in both directions, with the log-determinant of its Jacobian."""

    name: str
    what: str
    x: Tensor
    ways: BothWays
    known: Volume | None

    @classmethod
    def of(cls, name: str, layer: Bijection, x: Tensor, context: Tensor | None) -> _LayerPass:
        """Run a layer."""
        ways, known = both_ways_of_layer(layer, x, context), None
        rows = slice(0, len(x) if x[0].numel() <= DENSE else 1)
        row = None if context is None else context[rows]
        with torch.enable_grad(), suppress(RuntimeError):
            known = volume(lambda t: layer(t, row)[0].flatten(1), x[rows])
        return cls(name, f"{name} ({type(layer).__name__})", x, ways, known)

    @property
    def condition(self) -> float:
        """The largest condition number of the Jacobian; NaN if it is not known."""
        return math.nan if self.known is None else float(self.known.condition.max())

    @property
    def error(self) -> float:
        """How far the inverse is from x."""
        return _row_distance(self.ways.again, self.x)


class _Laws:
    """The laws of a model in float64 with one set of parameters."""

    def __init__(self, model: Model, context: Context, when: str):
        self.model, self.context, self.when = model, context, when

    def check(self, x: Tensor) -> Iterator[Outcome]:
        """Check every layer at its own input, then the whole model, then each KL."""
        model = self.model
        x, names = model.floating(x.double()), model.site_names()
        seen: dict[Any, tuple[Tensor, Tensor | None]] = {}

        def hook(layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen.setdefault(layer, (args[0].detach(), args[1] if len(args) > 1 else None))

        with forward_hooks({m for m in model.modules() if isinstance(m, Bijection)}, hook):
            model.infer(x, Trace(scoring=False), self.context)
        layers = [_LayerPass.of(names[layer], layer, *given) for layer, given in seen.items()]
        if "own" in self.when:
            conditions = {layer.name: layer.condition for layer in layers}
            again = {layer.name: layer.error for layer in layers}
            yield Facts(details={"conditions": conditions, "round_trips": again})
        for layer in layers:
            yield from self.check_layer(layer)
        up = Recorder()
        model.infer(x, up, self.context)
        ways = both_ways_of_model(model, x, self.context)
        if (fault := self.fault("the model", ways, x, 1e-5, 1e-6)) is not None:
            yield fault
            return
        yield Passed(f"{len(seen)} layers, and infer and generate of the model, {self.when}")
        for site in up.paired:
            yield from self.check_kl(names[site], up.qs[site], up.ps[site])

    def fault(
        self, what: str, ways: BothWays, x: Tensor, error: float, nats: float
    ) -> Finding | None:
        """None if data come back up to an error, and both directions give the same nats."""
        said: dict[str, Any] = {"what": what, "when": self.when}
        off = _row_distance(ways.again, x)
        if not ways.forward.isfinite().all():
            what = f"log w or a log-determinant of {what}"
            return bug("not_finite", what=what, at=self.when)
        if off > error:
            finding = bug if off > 1e-3 or what == "the model" else warning
            return finding("inverse_mismatch", "model", error=off, **said)
        if distance(ways.backward, ways.forward) > nats:
            said |= {"forward": ways.forward[0], "backward": ways.backward[0]}
            return bug("inverse_logdet_mismatch", "model", **said)
        return None

    def check_layer(self, layer: _LayerPass) -> Iterator[Outcome]:
        """Check the log-determinant of a layer by autograd, and its inverse."""
        what, known, condition = layer.what, layer.known, layer.condition
        if known is None:
            yield Skipped(f"the log-determinant of {what}: {layer.x[0].numel()} elements")
        else:
            stated = layer.ways.forward[: len(known.log_det)]
            wrong = float(((stated - known.log_det) / (1 + known.log_det.abs())).abs().max())
            if wrong > TOLERANCE * max(1.0, math.sqrt(condition) if condition > 0 else 1.0):
                nats = [t[:1].tolist() for t in (stated, known.log_det)]
                yield bug("logdet_mismatch", what=what, when=self.when, stated=nats[0],
                          log_det=nats[1])  # fmt: skip
        rounding = ROUNDING * (condition if math.isfinite(condition) else 1e6)
        fault = self.fault(what, layer.ways, layer.x, rounding + TOLERANCE, rounding + 1e-6)
        if fault is not None:
            yield fault

    def check_kl(self, name: str, q: Distribution, p: Distribution) -> Iterator[Outcome]:
        """Check a closed-form KL against the mean of log q - log p over draws."""
        closed, draws = closed_kl(q, p), []
        if closed is None:
            yield Passed(f"the KL of {name} has no closed form, and is sampled")
            return
        for _ in range(40):
            z = q.sample(torch.Size([100]))
            draws.append(q.log_prob(z) - p.log_prob(z))
        terms = torch.cat(draws)
        mean, error = terms.mean(0), terms.std(0) / math.sqrt(len(terms))
        limit = 1.3 * STANDARD_ERRORS * error + 1e-9 * (1 + closed.abs())
        if ((mean - closed).abs() > limit).any() or (closed < -1e-9).any():
            yield bug("kl_mismatch", "model", name=name, when=self.when, formula=closed[0],
                      draws=mean[0], error=error[0])  # fmt: skip
        yield Passed(f"the KL of {name} against {len(terms)} draws, {self.when}")


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


def _conditions(found: Iterable[Outcome]) -> dict[str, float]:
    """The condition numbers of layers, as far as they are known."""
    facts = (o.details.get("conditions", {}) for o in found if isinstance(o, Facts))
    return {k: v for conditions in facts for k, v in conditions.items() if math.isfinite(v)}


def _check_single_precision(
    model: Model, x: Tensor, context: Context, conditions: dict[str, float]
) -> Iterator[Outcome]:
    """The error of encoding and decoding in float32."""
    single = copy.deepcopy(model).float().eval()
    ways = both_ways_of_model(single, x.float(), contexts.apply(Tensor.float, context))
    error = _row_distance(ways.again, x)
    yield Facts(details={"round_trip_float32": error})
    if error > LOST:
        known = conditions or {"?": math.nan}
        layer = max(known, key=known.__getitem__)
        yield warning("ill_conditioned", "round_trip", error=error, condition=known[layer],
                      layer=layer)  # fmt: skip
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
        if site in trace.paired and isinstance(q, DiagonalGaussian):
            units = (DiagonalGaussian(dist.mean, dist.log_std, 0) for dist in (q, p))
            nats = kl_divergence(*units).mean(0).flatten().double()
            carried[name] = nats[:256].tolist()
            yield from _check_nats(name, nats)
        noise = p.whiten(trace.values[site]).flatten(1).double()
        if len(noise) >= 32 and site not in trace.paired:
            yield from _check_calibration(name, noise)
        elif len(noise) >= 32 and not p.batch_shape:
            yield from _check_aggregate(name, noise)
    if carried:
        yield Facts(details={"nats": carried})
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
    mean, var = noise.mean(0), noise.var(0)
    least, most = 0.5 * (1 - min(0.9, 1.5 * error)), 2 * (1 + 1.5 * error)
    far = int(((mean.abs() > 0.5 + error) | (var > most) | (var < least)).sum())
    if far:
        yield warning("aggregate_prior", name=name, far=far, units=len(mean),
                      mean=mean.abs().max(), least=var.min(), most=var.max())  # fmt: skip


def _check_calibration(name: str, noise: Tensor) -> Iterator[Outcome]:
    """Whether the whitened latents of data have the moments of noise."""
    means = noise.mean(1), noise.square().mean(1)  # of one example: independent of the others
    errors = [STANDARD_ERRORS * float(m.std()) / math.sqrt(len(noise)) for m in means]
    mean, scale = (float(m.mean()) for m in means)
    if abs(mean) > 0.25 + errors[0] or abs(scale - 1) > 0.25 + errors[1]:
        yield warning("miscalibrated", name=name, mean=mean, mean_square=scale)
