r"""A model of this library: does it keep its own laws, and what has training made of it?

A model here states every term of :math:`\log w` itself, so an audit can ask for each: the
log-determinant of each layer against autograd, each closed-form KL against draws, infer against
generate, the units of the data against :math:`\log_2` of their levels; with the parameters as they
are, and with random ones. Of data it tells whether what training left is healthy: latents that
carry nothing, scales at their limits, an aggregate posterior that is not the prior.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, kl_divergence

from musigma.audit.findings import AuditError, AuditReport, ReportBuilder, name_of
from musigma.audit.volume import DENSE, volume
from musigma.data import Dataset
from musigma.distributions import StandardUniform
from musigma.evaluation import (
    ACTIVE,
    COLLAPSED,
    SATURATED,
    batch,
    bits_per_dim,
    context_size,
    evaluating,
    saturation,
)
from musigma.gaussian import DiagonalGaussian
from musigma.layers import Dequantize, Rescale
from musigma.model import Bijection, Chain, Model
from musigma.testing import randomized
from musigma.trace import Trace

__all__ = ["audit_model"]

TOLERANCE = 1e-7  # errors of float64 in a whole model, relative
LOST = 2e-2  # error of a round trip in float32 from which it is worth a word
SURE = 7.0  # standard errors
ROWS = 3


def audit_model(
    model: Model, data: Tensor | Dataset | None = None, context: Tensor | None = None
) -> AuditReport:
    """Whether a model keeps its laws, and, of data, what training has made of it.

    The model is not changed: copies in float64 are looked at.

    Args:
        model: A model of this library.
        data: What it was trained for: (B, *event), or a `Dataset`; None: the laws alone.
        context: One row for each example, where the model wants any; a `Dataset` brings its own.

    Returns:
        The report; `details` has each layer's condition and round trip, and the nats of each unit.

    Raises:
        AuditError: If the model is none of this library's, or there is nothing to feed it with.

    Example:
        >>> from musigma import build
        >>> audit_model(build("realnvp", (4,), bits=None, depth=2, hidden=8)).verdict
        'correct'
    """
    if not isinstance(model, Model):
        raise AuditError(f"model: expected a model of musigma; got {type(model).__name__}")
    report = ReportBuilder(name_of(model))
    report.subject = str(model.config.get("architecture", type(model).__name__))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        x, given = _examples(model, data, context)
        for exact, when in (
            (copy.deepcopy(model).double().eval(), "with its own parameters"),
            (randomized(model, scale=0.25), "with random parameters"),
        ):
            few = x[:ROWS].double()
            row = None if given is None else given[:ROWS].double()
            try:
                _laws(report, exact, few, row, when)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                text = (str(error).splitlines() or ["-"])[0]
                raise AuditError(
                    f"model: given {tuple(few.shape)}, it raises {type(error).__name__}: {text}"
                ) from error
        _units(report, model, x[:ROWS], given)
        _single(report, model, x[:ROWS], None if given is None else given[:ROWS])
        if data is None:
            report.unchecked.append("what training made of it: no data were given")
        else:
            with evaluating(model):
                _trained(report, model, x, given)
    return report.build()


def _examples(
    model: Model, data: Tensor | Dataset | None, context: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if isinstance(data, Dataset):
        return batch(data, np.arange(min(len(data), 512)), model)
    if data is not None:
        return model.floating(data), context
    classes = context_size(model)
    if classes and context is None:
        context = nn.functional.one_hot(torch.arange(8) % classes, classes)
        context = model.floating(context)
    shape, options = model.config.get("shape"), model.config.get("options", {})
    if shape is None:
        return model.sample(8 if context is None else len(context), context), context
    rows = 8 if context is None else len(context)
    if (bits := options.get("bits")) is not None:
        return model.floating(torch.randint(0, 2**bits, (rows, *shape))), context
    return torch.randn(rows, *shape), context


# --- laws --------------------------------------------------------------------------------------


class _Pairs(Trace):
    """A trace that keeps what was drawn from what."""

    def __init__(self, **how: Any):
        super().__init__(**how)
        self.pairs: dict[nn.Module, tuple[Distribution, Distribution]] = {}
        self.scored: dict[nn.Module, tuple[Distribution, Tensor]] = {}

    def p(self, site: nn.Module, dist: Distribution, value: Tensor | None = None) -> Tensor:
        value = super().p(site, dist, value)
        self.scored[site] = dist, value
        return value

    def latent(self, site: nn.Module, q: Distribution, p: Distribution) -> Tensor:
        self.pairs[site] = q, p
        return super().latent(site, q, p)


def _laws(
    report: ReportBuilder, model: Model, x: Tensor, context: Tensor | None, when: str
) -> None:
    seen = _visited(model, x, context)
    for name, (layer, given, row) in seen.items():
        _bijection(report, name, layer, given, row, when)
    if seen:
        report.checked.append(f"{len(seen)} layers, inverses and log-determinants, {when}")
    up = _Pairs()
    model.infer(model.floating(x), up, context)
    log_w = up.evidence(model.latents()).elbo
    if not log_w.isfinite().all():
        report.bug(
            "not_finite",
            f"log w is {float(log_w[~log_w.isfinite()][0])} {when}",
            "musigma info RUN --ledger shows the term that is not finite",
        )
        return
    down = Trace(generating=True, n=len(x), given=up.values)
    again = model.generate(down, context)
    off = _apart(again, x)
    if off > 1e-5:
        report.bug(
            "inverse_mismatch",
            f"generate, given all that infer found, differs from x by {off:.2g} {when}",
            "every layer's generate has to mirror its infer; musigma.testing.check_layer tells "
            "which one does not",
            error=off,
        )
        return
    other = down.evidence(model.latents()).elbo
    if _apart(other, log_w) > 1e-6:
        report.bug(
            "inverse_logdet_mismatch",
            f"infer states log w = {float(log_w[0]):.8g}, and generate {float(other[0]):.8g} for "
            f"the same values, {when}",
            "what one direction draws the other has to score",
            infer=log_w.tolist(),
            generate=other.tolist(),
        )
    else:
        report.checked.append(f"infer and generate state the same log w, {when}")
    _closed_forms(report, model, up, when)


Seen = dict[str, tuple[Bijection, Tensor, Tensor | None]]


def _visited(model: Model, x: Tensor, context: Tensor | None) -> Seen:
    """What each bijection is given while data go up."""
    seen: Seen = {}
    hooks = []

    def keep(name: str, layer: Bijection):
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            seen.setdefault(name, (layer, args[0].detach(), args[1] if len(args) > 1 else None))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Bijection):
            hooks.append(module.register_forward_hook(keep(name, module)))
    try:
        model.infer(model.floating(x), Trace(scoring=False), context)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _bijection(
    report: ReportBuilder,
    name: str,
    layer: Bijection,
    x: Tensor,
    context: Tensor | None,
    when: str,
) -> None:
    label = f"{name} ({type(layer).__name__})"
    z, log_det = layer(x, context)
    if not (z.isfinite().all() and log_det.isfinite().all()):
        code = "not_finite" if not z.isfinite().all() else "logdet_nan"
        report.bug(
            code,
            f"{label} returns what is not finite, {when}",
            "go back to the last good checkpoint, and train on with smaller steps",
            layer=name,
        )
        return
    back, other = layer.inverse(z, context)
    condition, off = math.nan, _apart(back, x)
    rows = slice(0, len(x)) if x[0].numel() <= DENSE else slice(0, 1)
    row = None if context is None else context[rows]
    with torch.enable_grad(), suppress(RuntimeError):
        found = volume(lambda t: layer(t, row)[0].flatten(1), x[rows])
        if found is None:
            report.unchecked.append(f"the log-determinant of {label}: {x[0].numel()} elements")
        else:
            condition = float(found.condition.max())
            wrong = float(
                ((log_det[rows] - found.log_det).abs() / (1 + found.log_det.abs())).max()
            )
            if wrong > TOLERANCE * max(1.0, math.sqrt(condition) if condition > 0 else 1.0):
                report.bug(
                    "logdet_mismatch",
                    f"{label} states {float(log_det[0]):.8g} nats, and log |det J| is "
                    f"{float(found.log_det[0]):.8g}, {when}",
                    "musigma.testing.check_layer checks a layer alone",
                    layer=name,
                    error=wrong,
                )
    if "own" in when:
        report.details.setdefault("conditions", {})[name] = condition
        report.details.setdefault("round_trips", {})[name] = off
    worst = condition if math.isfinite(condition) else 1e6
    if off > 1e3 * 2.2e-16 * worst + TOLERANCE:
        report.find(
            "inverse_mismatch",
            "bug" if off > 1e-3 else "warning",
            f"{label}: the inverse of forward differs from x by {off:.2g}, {when}",
            "musigma.testing.check_layer checks a layer alone",
            layer=name,
            error=off,
        )
    elif _apart(-other, log_det) > 1e-6 + 1e3 * 2.2e-16 * worst:
        same = _apart(other, log_det) < 1e-6
        report.bug(
            "inverse_logdet_sign" if same else "inverse_logdet_mismatch",
            f"{label}: both directions' log-determinants do not cancel, {when}",
            "return the log |det| of each direction's own map",
            layer=name,
            both=[float(log_det[0]), float(other[0])],
        )


def _closed_forms(report: ReportBuilder, model: Model, trace: _Pairs, when: str) -> None:
    """Each KL by its formula against the mean of log q - log p over draws."""
    names = {module: name or "model" for name, module in model.named_modules()}
    for site, (q, p) in trace.pairs.items():
        closed = kl_divergence(q, p)
        total, squares, n = torch.zeros_like(closed), torch.zeros_like(closed), 4000
        for _ in range(n // 100):
            z = q.sample(torch.Size([100]))
            term = q.log_prob(z) - p.log_prob(z)
            total, squares = total + term.sum(0), squares + term.square().sum(0)
        mean = total / n
        error = ((squares / n - mean.square()).clamp(min=0) / n).sqrt()
        off = (mean - closed).abs()
        if bool((off > 1.3 * SURE * error + 1e-9 * (1 + closed.abs())).any()):
            report.bug(
                "kl_mismatch",
                f"the KL of {names[site]} is {float(closed[0]):.6g} nats by its formula, and "
                f"{float(mean[0]):.6g} ± {float(error[0]):.2g} over draws, {when}",
                "register the right KL for this pair of families",
                formula=closed.tolist(),
                draws=mean.tolist(),
            )
        if bool((closed < -1e-9).any()):
            report.bug(
                "kl_negative",
                f"the KL of {names[site]} is below zero, {when}",
                "no KL is: look for a sign, or a term that is missing from its formula",
                least=float(closed.min()),
            )
        report.checked.append(f"the KL of {names[site]} against {n} draws, {when}")


def _units(report: ReportBuilder, model: Model, x: Tensor, context: Tensor | None) -> None:
    """Whether the uniform model of these units costs log2 of the levels."""
    if not isinstance(model, Chain):
        return
    leading = list(
        takewhile(lambda layer: getattr(layer, "is_preprocessing", False), model.layers)
    )
    dequantizers = [layer for layer in leading if isinstance(layer, Dequantize)]
    if not dequantizers:
        return
    (first,) = dequantizers[:1]
    bits = model.config.get("options", {}).get("bits")
    elements, levels = x[0].numel(), first.levels
    if bits is not None and levels != 2**bits:
        report.bug(
            "dequantisation",
            f"data of {bits} bits are dequantised as {levels} levels",
            "Dequantize(noise, 2**bits)",
        )
    uniform = isinstance(first.noise, StandardUniform)
    trace = Trace()
    exact = copy.deepcopy(nn.ModuleList(leading)).double()
    images = torch.randint(0, levels, (len(x), *x.shape[1:])).double()
    y, width = images, float(levels)
    for layer in exact:
        y = layer.infer(y, trace, None if uniform else _as(context, len(x)))  # pyright: ignore
        if isinstance(layer, Rescale):
            width *= abs(layer.scale)
    log_det = sum(trace.log_det.values(), torch.zeros(()))
    log_q = sum(trace.log_q.values(), torch.zeros(()))
    if not uniform:
        report.checked.append(f"dequantisation: learned noise over {levels} levels")
        return
    nats = elements * math.log(width) - (log_det - log_q)
    figure = float(bits_per_dim(torch.as_tensor(nats), elements).max())
    if abs(figure - math.log2(levels)) > 1e-6:
        report.bug(
            "dequantisation",
            f"uniform images cost {figure:.6g} bits per dimension under the uniform model, and "
            f"hold {math.log2(levels):.6g}",
            "count the log-determinant of every change of units",
            bits_per_dim=figure,
        )
    else:
        report.checked.append(f"uniform images under the uniform model: {figure:.6g} bits/dim")


def _as(context: Tensor | None, rows: int) -> Tensor | None:
    return None if context is None else context[:rows].double()


def _single(report: ReportBuilder, model: Model, x: Tensor, context: Tensor | None) -> None:
    """What float32 leaves of x after encoding and decoding, where that should be all of it."""
    if set(model.latents()) != set(model.variables()):
        return
    single = copy.deepcopy(model).float().eval()
    given = None if context is None else context.float()
    latents = single.encode(x.float(), given, mode=True)
    off = _apart(single.decode(latents, given), x)
    report.details["round_trip_float32"] = off
    if off > LOST:
        conditions = report.details.get("conditions", {})
        finite = {k: v for k, v in conditions.items() if math.isfinite(v)}
        worst = max(finite, key=lambda name: finite[name], default="?")
        report.warn(
            "ill_conditioned",
            f"decode(encode(x)) is off by {off:.2g} in float32; the largest condition number is "
            f"{finite.get(worst, math.nan):.2g}, of {worst}",
            "decode in float64; train with a smaller --lr, or a format with narrower bounds",
            error=off,
        )
    else:
        report.checked.append(f"decode(encode(x)) in float32: off by {off:.1g}")


# --- what training made of it ------------------------------------------------------------------


def _trained(report: ReportBuilder, model: Model, x: Tensor, context: Tensor | None) -> None:
    names = {module: name or "model" for name, module in model.named_modules()}
    for name, share in saturation(model, x, context).items():
        if share is None:
            report.unchecked.append(
                f"the scales of {name}: it has no emitters() that the pass ran"
            )
        elif share > SATURATED:
            report.warn(
                "saturated_units",
                f"{share:.0%} of the scales of {name} have run into their limit",
                "a wider format, or a smaller --lr",
                share=share,
            )
    trace = _Pairs(closed_form=True)
    model.infer(model.floating(x), trace, context)
    for site, (q, p) in trace.pairs.items():
        _carried(report, names[site], q, p)
        _aggregate(report, names[site], trace.values[site], p)
    for site, value, dist in _flow_latents(model, trace):
        _calibrated(report, names[site], dist.whiten(value))
    report.checked.append(f"what {len(x)} examples make of the latents")


def _carried(report: ReportBuilder, name: str, q: Distribution, p: Distribution) -> None:
    """Nats of each unit of a latent, on average over the data."""
    if not isinstance(q, DiagonalGaussian) or not isinstance(p, DiagonalGaussian):
        return
    each = kl_divergence(
        DiagonalGaussian(q.mean, q.log_std, 0), DiagonalGaussian(p.mean, p.log_std, 0)
    )
    nats = each.mean(0).flatten().double()
    report.details.setdefault("nats", {})[name] = nats[:256].tolist()
    dead, total = int((nats < ACTIVE).sum()), float(nats.sum())
    if total < COLLAPSED:
        report.warn(
            "posterior_collapse",
            f"the latent of {name} carries {total:.3g} nats: its posterior is its prior",
            "--free-bits or --kl-warmup keep latents open",
            nats=total,
        )
    elif dead:
        report.warn(
            "dead_units",
            f"{dead} of {len(nats)} units of {name} carry less than {ACTIVE} nats",
            "fewer latents, or --free-bits",
            dead=dead,
            units=len(nats),
        )


def _aggregate(report: ReportBuilder, name: str, z: Tensor, p: Distribution) -> None:
    """Moments of the aggregate posterior, in units of the prior's."""
    if not isinstance(p, DiagonalGaussian) or p.batch_shape or len(z) < 32:
        return
    noise = p.whiten(z).flatten(1).double()
    error = 1 / math.sqrt(len(noise))
    mean, var = noise.mean(0), noise.var(0)
    far = (
        (mean.abs() > 0.5 + SURE * error)
        | (var > 2 * (1 + SURE * error * 1.5))
        | (var < 0.5 * (1 - min(0.9, SURE * error * 1.5)))
    )
    if far.any():
        worst = int(mean.abs().argmax())
        report.warn(
            "aggregate_prior",
            f"{int(far.sum())} of {len(mean)} units of {name} have another mean or variance over "
            f"the data than under the prior: means up to {float(mean[worst].abs()):.2g} of its "
            f"standard deviations, variances {float(var.min()):.2g} to {float(var.max()):.2g} of "
            "its own",
            "samples from the prior will look unlike data: a learned prior, or a larger --beta",
            units=int(far.sum()),
            means=mean[:64].tolist(),
            variances=var[:64].tolist(),
        )


def _flow_latents(
    model: Model, trace: _Pairs
) -> Iterator[tuple[nn.Module, Tensor, DiagonalGaussian]]:
    latents = set(model.latents())
    for site, (dist, value) in trace.scored.items():
        if site in latents and isinstance(dist, DiagonalGaussian):
            yield site, value, dist


def _calibrated(report: ReportBuilder, name: str, noise: Tensor) -> None:
    """Whether the whitened latents of data have the moments of noise."""
    flat = noise.flatten(1).double()
    if len(flat) < 32:
        return
    each = flat.square().mean(1)  # of one example: independent of the others
    error = float(each.std()) / math.sqrt(len(each))
    scale, mean = float(each.mean()), float(flat.mean())
    off_mean = SURE * float(flat.mean(1).std()) / math.sqrt(len(flat))
    wide = abs(scale - 1) > 0.25 + SURE * error
    if wide or abs(mean) > 0.25 + off_mean:
        report.warn(
            "miscalibrated",
            f"whitened latents of {name} have mean {mean:.3g} and mean square {scale:.3g} over "
            "the data, and noise has 0 and 1",
            "train longer; on data unlike the training data this is what novelty looks like",
            mean=mean,
            mean_square=scale,
        )


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    off = float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0
    return math.inf if math.isnan(off) else off
