r"""The audit of a flow: is it a bijection, and is its log-determinant that of its Jacobian?

A flow's density is :math:`p(x) = p_Z(f(x)) \, |\det \partial f / \partial x|`: f must be a
function of one example, be invertible, and return the log-determinant that autograd finds. Each
of these is checked with the parameters as they are, and with random ones, because couplings that
start at zero are the identity, where every sign is right.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from musigma.audit.bijection import FlowAdapter, called_layers, per_example
from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
    Finding,
    Missing,
    Outcome,
    Passed,
    Skipped,
    bug,
    distance,
    has,
    name_of,
    warning,
)
from musigma.audit.flow_measurement import (
    LOG_DET,
    SINGLE,
    Measurement,
    faults_of,
    judge,
    measure,
)
from musigma.audit.jacobian import Volume, volume
from musigma.audit.sandbox import (
    FLOATS,
    Sandbox,
    TooSlowError,
    about_types,
    first,
    first_form,
    forward_hooks,
)

__all__ = ["audit_flow"]

SECONDS = 8.0  # of CPU time for all checks that can be left out
MOST_WRONG = 0.05  # share of x that the inverse of a dequantization may miss
SAME = 1e-7  # largest difference between two calls on one input
SCALES = (0.3, 0.1, 0.03)  # of random parameters: the largest under which z is finite
DRAWS = 300  # of parameters, to look for one under which det J changes its sign


def audit_flow(
    forward: Any, inverse: Any = None, example: Tensor | None = None, state: Any = None
) -> AuditReport:
    """Whether a flow is a bijection, and its log-determinant that of its Jacobian.

    The arguments do not change: parameters are moved, and then restored. Modules compute in
    float64 if they can. A log-determinant is compared with autograd's Jacobian, layer by layer
    where there are many elements.

    Args:
        forward: ``x -> (z, log_det)``: a function, a module, a `torch.distributions.Transform`, or
            a sequence of layers that each are one of these. log_det in nats, (B,); it may be added
            to an argument, as in ``forward(x, ldj, reverse=False)``.
        inverse: ``z -> x`` or ``z -> (x, log_det)``; None: looked for on `forward`.
        example: A batch (B, ...) of data for the flow.
        state: The modules whose parameters are moved, and which are saved and loaded; None: those
            that the callables use.

    Returns:
        The report; `details` has condition numbers and errors. It is incomplete if the
        log-determinant could not be compared.

    Raises:
        AuditError: If there is no example, or forward raises, does not end, or returns something
            other than (z, log_det).

    Example:
        >>> from musigma.layers import ActNorm
        >>> audit_flow(ActNorm(3), example=torch.randn(8, 3)).verdict
        'correct'
        >>> wrong = lambda x: (2 * x, torch.full((len(x),), math.log(2)))
        >>> audit_flow(wrong, lambda z: z / 2, torch.randn(8, 3)).codes
        ('logdet_mismatch',)
    """
    if not isinstance(example, Tensor):
        raise AuditError("example: give a batch of data for the flow, shape (B, ...)")
    if example.ndim < 1 or not len(example) or not example[0].numel():
        raise AuditError(f"example: expected a batch (B, ...); got {tuple(example.shape)}")
    if not example.isfinite().all():
        raise AuditError("example: expected finite numbers")
    if isinstance(forward, Transform):
        if not forward.bijective:
            raise AuditError("forward: this transform is not bijective, by its own attribute")
        with suppress(NotImplementedError):
            if not forward.domain.check(example).all():
                raise AuditError(f"example: expected the transform's domain, {forward.domain}")

    def attempt(dtype: torch.dtype) -> AuditReport:
        with Sandbox(forward, inverse, state) as sandbox:
            sandbox.restore_modes()
            sandbox.use_dtype(dtype)
            subject = _Subject(sandbox, forward, inverse, example)
            return AuditReport.of(name_of(forward), _check(subject))

    return first_form(itertools.product(FLOATS), attempt)[1]


class _Subject:
    """A flow and the batch that it runs on.

    Attributes:
        tolerance: The error that is rounding.
        was_training: It was in training mode, and is now in evaluation mode.
        estimated: Its log-determinant is an estimate from draws.
        compared: Its log-determinant was compared with that of the Jacobian.
        why_not: Why it was not compared.
        conditions: The condition numbers of layers with their own parameters.
        own: What was measured with its own parameters.
        found: What the checks returned so far.
    """

    own: Measurement

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any, example: Tensor):
        self.sandbox, self.flow = sandbox, FlowAdapter(sandbox, forward, inverse)
        self.example = example.detach().to("cpu", sandbox.dtype)
        # a batch of a size that no other axis has, so that the shape of a log-determinant is clear
        elements = self.example[0].numel()
        sizes = itertools.count(max(3, min(24, 400 // elements)))
        rows = next(n for n in sizes if n not in (elements, *example.shape[1:]))
        drawn = _mixtures(self.example, 2 * rows)
        self.x, self.others = torch.cat([self.example, drawn])[:rows], drawn[rows:]
        self.restore_first = self.restore = sandbox.snapshot()
        self.end = time.process_time() + SECONDS
        self.tolerance = LOG_DET[0] if sandbox.dtype == torch.float64 else SINGLE[0]
        self.was_training = self.estimated = self.compared = False
        self.why_not, self.conditions, self.found = "", dict[str, float](), list[Outcome]()

    def measure(self) -> Measurement:
        """Run the batch through the flow and back."""
        found = measure(self.flow, self.x, self._volume_of_layers)
        pair, draws = found.pair, self.flow.fixed_draws
        if draws and pair and found.error > self.tolerance and (pair[0] - pair[1]).std() > 1e-6:
            self.why_not = "it is not log |det J| at given noise; it may count its density"
            found = found._replace(known=None)
        self.compared |= found.pair is not None
        return found

    def _volume(self, flow: FlowAdapter, x: Tensor) -> Volume | None:
        return volume(flow.latents, x, (self.end - time.process_time()) / 2)

    def _volume_of_layers(self, flow: FlowAdapter, x: Tensor) -> Volume | None:
        """The volume of layers that are called in a row; of other flows, that of the whole."""
        layers, volumes = called_layers(flow, x), list[Volume]()
        inside = [t for layer in layers for t in (layer.x, layer.z)]
        passed = [t.flatten().sort().values for t in (x, *inside, flow.latents(x))]
        if not layers or not all(map(torch.equal, passed[::2], passed[1::2])):
            self.why_not = "there are many elements, and not only layers change them"
            return self._volume(flow, x)
        for layer in layers:
            if (known := self._volume(layer.flow, layer.x)) is None:
                self.why_not = f"there are many elements, and no known structure in {layer.name}"
                return self._volume(flow, x)
            volumes.append(known)
            self.note_condition(layer.name, known)
        log_det = torch.stack([v.log_det for v in volumes]).sum(0)
        return Volume(log_det, log_det * math.nan, log_det * math.nan)

    def note_condition(self, name: str, known: Volume) -> None:
        """Keep the first condition number of a layer: that with its own parameters."""
        condition = float(known.condition.nan_to_num(nan=0.0).max())
        self.conditions.setdefault(name, condition)

    def judge(self, found: Measurement, when: str) -> list[Finding | Passed]:
        """The faults, each of the first layer that has it, and what is right."""
        results = list(judge(found, when, estimated=self.estimated))
        unnamed = {"logdet_mismatch", "inverse_mismatch"} & faults_of(results).keys()
        for layer in called_layers(self.flow, self.x) if unnamed else ():
            layer.flow.invertible &= "inverse_mismatch" in unnamed
            with suppress(AuditError):
                found = measure(layer.flow, layer.x, self._volume)
                for code, fault in faults_of(judge(found, when, layer.name)).items():
                    if code in unnamed and fault.severity == "bug":
                        unnamed.remove(code)
                        named = replace(fault, numbers={**fault.numbers, "layer": layer.name})
                        results = [named if has([r], code) else r for r in results]
        return results

    @torch.no_grad()
    def perturb(self, std: float) -> None:
        """Move the parameters by noise, in training mode, as a training step does.

        Running means and variances, which start at zero and one, move as well. Parameters of
        modules with backward hooks, which may keep them in their range, do not.
        """
        modes = {module: module.training for module in self.sandbox.layers()}
        hooked = [m for m in modes if m._backward_hooks]  # pyright: ignore[reportPrivateUsage]
        kept = [(p, p.clone()) for m in hooked for p in m.parameters(recurse=False)]
        for root in self.sandbox.modules:
            root.train()
        self.sandbox.randomize(std)
        for p, value in kept:
            p.copy_(value)
        for root in self.sandbox.modules:
            root.train(modes[root])
        generator = torch.Generator().manual_seed(1)
        for module, mode in modes.items():
            module.training = mode
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var") and buffer.is_floating_point():
                    noise = std * torch.randn(buffer.shape, generator=generator).to(buffer)
                    buffer.add_(noise) if name == "running_mean" else buffer.mul_(noise.exp())


def _check(on: _Subject) -> Iterator[Outcome]:
    """Call the flow, and check everything that can be checked."""
    on.found += _check_call(on)
    if not has(on.found, "not_finite"):
        is_pure, purity = _check_purity(on)
        on.found += purity
        if is_pure:
            on.found += _check_initialization(on)
            on.restore, on.own = on.sandbox.snapshot(), on.measure()
            for check in (
                _check_own_parameters,
                _check_accumulation,
                _check_random_parameters,
                _check_negative_determinants,
                _check_determinant_sign,
                _check_single_precision,
            ):
                on.found += list(check(on))
                on.restore()
    yield from on.found
    for name, argument in on.flow.changed.items():
        yield warning("inplace", "flow", name=name, argument=argument)
    if not on.compared and not any(code.startswith("logdet") for code in faults_of(on.found)):
        yield Missing("the log-determinant: " + (on.why_not or "it was not compared"))
    if on.conditions:
        yield Facts(details={"conditions": on.conditions})
    yield from map(Assumed, on.flow.notes)


def _mixtures(x: Tensor, n: int) -> Tensor:
    """Mixtures of pairs of examples; noise around them where all are the same."""
    generator = torch.Generator().manual_seed(1)
    if (x == x[:1]).all():
        noise = torch.randn(n, *x.shape[1:], generator=generator).to(x)
        return x[:1] * (1 + 0.1 * noise) if x.any() else noise
    one, other = x[torch.randint(len(x), (2, n), generator=generator)]
    share = torch.rand(n, *(1,) * (x.ndim - 1), generator=generator).to(x)
    return torch.lerp(one, other, 0.2 + 0.6 * share)


def _check_call(on: _Subject) -> Iterator[Outcome]:
    """Call the flow, and look at what it returns."""
    if on.sandbox.dtype == torch.float32:
        yield Assumed("it computes in float32 only: tolerances are wider")
    try:
        image = on.flow.first_call(on.x)
    except AuditError:
        if len(on.example) == len(on.x):
            raise
        rows = len(on.example)
        on.x, on.others = on.example.clone(), _mixtures(on.example, rows)
        image = on.flow.first_call(on.x)
        yield Assumed(f"only batches of {rows} examples are taken")
    if on.sandbox.dtype == torch.float64 and image.flat.dtype == torch.float32:
        raise AuditError("forward: given float64, it returns float32")
    on.why_not = "forward returns none" if image.raw is None else ""
    d, elements = image.flat.shape[1], on.x[0].numel()
    if d != elements:
        sizes = f"z has {d} numbers for each example, and x {elements}"
        whole = "return what is factored out as well, as a list of tensors"
        if not on.flow.invertible:
            raise AuditError(f"forward: {sizes}, so it is not a bijection; {whole}")
        on.why_not = f"{sizes}; {whole}"
    if bad := float((~image.flat.isfinite()).double().mean()):
        yield bug("not_finite", "latents", share=bad)
    if not on.flow.invertible:
        yield Skipped("the inverse: there is none")


# --- a function of one example ------------------------------------------------------------------


def _check_purity(on: _Subject) -> tuple[bool, list[Outcome]]:
    """Whether the flow treats examples separately, and draws nothing, or what can be removed."""
    impure, found = _impurity(on), list[Outcome]()
    if any(m.training for m in on.sandbox.layers()) and any(impure.values()):
        for root in on.sandbox.modules:
            root.eval()
        on.was_training, in_training, impure = True, impure, _impurity(on)
        found.append(Assumed("the flow is in training mode; the other checks use evaluation mode"))
        for code, difference in in_training.items():
            if difference and not impure[code]:
                found.append(warning(code, "training", difference=difference))
                break
    if impure["stochastic"]:
        wrong = _wrong_without_noise(on)
        found += _judge_noise(impure["stochastic"], wrong)
        if wrong is None or wrong > MOST_WRONG:
            whether = ", and there is no inverse that shows whether it is a dequantization"
            on.why_not = "forward draws noise" + whether * (wrong is None)
            return False, found
        on.flow.fixed_draws, on.why_not = True, ""
        on.flow.invertible = False  # off the grid, flooring is no inverse
        found.append(Assumed("forward draws the same noise on each call of the other checks"))
        impure = _impurity(on)
    if impure["cross_sample"]:
        found.append(bug("cross_sample", "bijection", difference=impure["cross_sample"]))
        on.why_not = "an example has no Jacobian of its own"
        return False, found
    found.append(Passed("z of an example does not depend on others, and two calls agree"))
    return True, found


def _impurity(on: _Subject) -> dict[str, float]:
    """How far z differs between calls, and among other examples; zero where it does not.

    The larger differences under these and under random parameters, as zeros hide them.
    """
    limits = {"stochastic": SAME, "cross_sample": on.tolerance}
    impure, restore = dict.fromkeys(limits, 0.0), on.sandbox.snapshot()
    on.estimated = False
    for std in (0.0, 0.1):
        with suppress(AuditError):
            on.perturb(std)
            zs, stated = [], []
            for _ in range(3):
                image = on.flow.forward(on.x)
                zs.append(image.flat.detach())
                stated.append(per_example(image.raw, len(on.x)))
            among = on.flow.latents(torch.cat([on.x[:1], on.others[1:]]))
            off = {
                "stochastic": max(distance(z, zs[0]) for z in zs),
                "cross_sample": distance(among[:1], zs[0][:1]),
            }
            for code, limit in limits.items():
                if limit < off[code] < math.inf:
                    impure[code] = max(impure[code], off[code])
            given = [t for t in stated if t is not None]
            on.estimated |= any(SAME < distance(t, given[0]) < math.inf for t in given)
    restore()
    return impure


def _wrong_without_noise(on: _Subject) -> float | None:
    """The share of x that the inverse does not recover from what a stochastic forward returns.

    It recovers x after a dequantization. None if there is no inverse.
    """
    if not on.flow.invertible and len(on.example.unique()) < on.example.numel():
        return None
    with suppress(AuditError):
        x = on.flow.round_trip(on.x)  # the values that the inverse returns
        off = torch.stack([on.flow.round_trip(x) - x for _ in range(50)])
        return float((off.abs() > on.tolerance).double().mean())
    return 1.0


def _judge_noise(noise: float, wrong: float | None) -> Iterator[Outcome]:
    """Whether a forward that draws noise, of some size, is a dequantization."""
    if wrong is None:
        return
    if wrong > MOST_WRONG:
        yield bug("stochastic", "bijection", difference=noise)
        return
    yield warning("stochastic", "dequantization", difference=noise)
    if wrong > 1e-4:
        yield warning("inverse_mismatch", "grid", share=wrong)


# --- the first batch ----------------------------------------------------------------------------


def _check_initialization(on: _Subject) -> Iterator[Outcome]:
    """Whether layers that the first batch initializes standardize it, and stay initialized.

    These are the modules whose own numbers change in the first call alone. The batch is shifted
    and unevenly scaled, if the flow takes such data.
    """
    if on.was_training or on.x.ndim < 2:
        why = "the flow is in training mode" if on.was_training else "there are no channels"
        yield Skipped(f"data-dependent initialization: {why}")
        return
    channels, *sides = on.x.shape[1:]
    scale, shift = torch.logspace(-0.7, 0.7, channels), torch.linspace(2.0, -3.0, channels)
    scale, shift = (t.reshape(channels, *[1] * len(sides)).to(on.x) for t in (scale, shift))
    restore, calls = on.sandbox.snapshot(), dict[str, tuple[Tensor, Tensor]]()
    for batch in (3 * scale * on.others + shift, on.others):
        on.restore_first()
        with suppress(AuditError):
            calls = _changing_calls(on, batch)
            if all(z.isfinite().all() for _, z in calls.values()):
                break
    again = _changing_calls(on, on.x) if calls else {}
    for name in calls.keys() - again.keys():
        yield Passed(f"the first batch initializes {name}")
        yield from _check_standardized(name, *calls[name])
    if calls.keys() - again.keys():
        yield _check_reload(on)
    restore()
    on.flow.forward(on.x)  # initializes, if nothing has


def _changing_calls(on: _Subject, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the modules whose own numbers change in a call of the flow."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    names = {m: k for root in on.sandbox.modules for k, m in root.named_modules()}

    def numbers_of(module: nn.Module) -> list[Tensor]:
        own = [*module.parameters(False), *module.buffers(False), *vars(module).values()]
        return [t.detach().clone() for t in own if isinstance(t, Tensor)]

    def hook(module: nn.Module, args: tuple, out: Any) -> None:
        z, same = first(out), map(torch.equal, before[module], numbers_of(module))
        if args and isinstance(args[0], Tensor) and isinstance(z, Tensor) and not all(same):
            name = names[module] or type(module).__name__
            calls.setdefault(name, (args[0].detach(), z.detach()))

    before = {module: numbers_of(module) for module in names}
    with forward_hooks(names, hook):
        on.flow.forward(x)
    return calls


def _check_standardized(name: str, x: Tensor, z: Tensor) -> Iterator[Outcome]:
    """Mean and std of z by channel, if z shifts and scales each channel of x."""
    if x.numel() != z.numel() or x.ndim < 2:
        return
    x, z = (t.double().reshape(x.shape).transpose(0, 1).flatten(1) for t in (x, z))
    slope = ((z - z.mean(1, True)) / (x - x.mean(1, True))).median(1, True).values
    if distance(z, slope * (x - x.mean(1, True)) + z.mean(1, True)) > 1e-4:
        return
    mean, stds = z.mean(1), [z.std(1, correction=n) for n in (0, 1)]
    std = min(stds, key=lambda std: float((std - 1).abs().max()))
    least, largest, off = float(std.min()), float(std.max()), float(mean.abs().max())
    if off > 0.05 or least < 0.95 or largest > 1.05:
        # some layers scale all channels to another constant
        alike = largest < 1.1 * least and off < 0.05 * max(1.0, largest)
        finding = warning if alike else bug
        yield finding("ddi_wrong", layer=name, mean=off, least=least, largest=largest)


def _check_reload(on: _Subject) -> Outcome:
    """Save after the first batch, load into a fresh copy, and call that on another batch."""
    modules = [m for m in on.sandbox.modules if m.state_dict()]
    on.restore_first()
    on.flow.forward(on.x)
    saved = copy.deepcopy([m.state_dict() for m in modules])
    expected = on.flow.latents(on.others)
    on.restore_first()
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)
    difference = distance(expected, on.flow.latents(on.others))
    if difference > 10 * on.tolerance:
        return bug("ddi_reinit", difference=difference)
    return Passed("the initialized state survives state_dict")


# --- both directions ----------------------------------------------------------------------------


def _check_own_parameters(on: _Subject) -> Iterator[Outcome]:
    """Judge the measurement with the parameters as they are.

    Raises:
        AuditError: If the inverse is slow, or refuses float64.
    """
    own = on.own
    if (error := own.failure) is not None:
        cause, double = error.__cause__, on.sandbox.dtype == torch.float64
        if isinstance(error, TooSlowError) or (double and cause and about_types(error)):
            raise error
        if isinstance(cause, NotImplementedError):
            yield Skipped("the inverse: it is not implemented")
        elif cause is None:
            yield bug("inverse_mismatch", "shape", reason=str(error))
        else:
            yield bug("inverse_raises", reason=str(error))
        on.flow.invertible = False
    if own.known is not None:
        on.note_condition("the flow", own.known)
        if not own.known.log_det.isfinite().all():
            on.why_not = "J is singular or not finite at the example"
    yield from on.judge(own, "with its own parameters")


def _check_accumulation(on: _Subject) -> Iterator[Outcome]:
    """Whether a forward that takes a log-determinant adds to it."""
    raw, name = on.own.image.raw, on.flow.adds_to
    if name is None or not isinstance(raw, Tensor) or on.own.pair is None:
        return
    before = torch.randn(raw.shape or on.x.shape[:1])
    with suppress(AuditError):
        after = on.flow.forward(on.x, total=before).raw
        fits = isinstance(after, Tensor) and after.shape == before.shape
        if not fits or distance(after - before, raw.expand_as(before)) > 1e-6:
            yield bug("logdet_mismatch", "accumulated", argument=name)


def _check_random_parameters(on: _Subject) -> Iterator[Outcome]:
    """Measure again after an update of the parameters.

    A fault must appear again after a fifth of the update; otherwise it is attributed to the
    parameters (a contraction that is no longer one) and not to the code.
    """
    if not on.sandbox.trainable():
        yield Skipped("random parameters: there are no trainable ones")
        return
    std, found = 0.0, None
    for std in SCALES:
        if (found := _updated(on, std)) is not None:
            break
    if found is None:
        yield Skipped("random parameters: z is not finite under any of them")
        return
    if found.failure is not None:
        yield Skipped(f"inverse under random parameters: {found.failure}")
    when = f"with random parameters (moved by {std:g})"
    results = on.judge(found, when)
    faults = faults_of(results)
    faults.pop("logdet_nan", None)  # a parameter may be out of its range; checked separately
    is_new = "inverse_mismatch" in faults and not has(on.found, "inverse_mismatch")
    if is_new and on.own.back is not None:
        back = on.flow.inverse(on.own.image.tree, on.x)
        if torch.equal(back.tree, on.own.back.tree):
            yield bug("stale_inverse", error=faults.pop("inverse_mismatch").numbers["error"])
            faults.pop("inverse_logdet_mismatch", None)
    if faults and (small := _updated(on, std / 5)) is not None:
        again = faults_of(judge(small, when, estimated=on.estimated))
        faults = {code: fault for code, fault in faults.items() if code in again}
    yield from (r for r in results if isinstance(r, Passed) or r.code in faults)


def _updated(on: _Subject, std: float) -> Measurement | None:
    """Measure after both directions were used and parameters moved; None if z is not finite."""
    on.restore()
    with suppress(AuditError):
        if on.flow.invertible:
            on.flow.round_trip(on.x)  # what is cached now is out of date then
        on.perturb(std)
        z = on.flow.latents(on.x)
        return on.measure() if z.isfinite().all() and z.abs().max() < 1e6 else None
    return None


def _check_negative_determinants(on: _Subject) -> Iterator[Outcome]:
    """Whether the log-determinant is finite where a matrix has a negative determinant."""
    changed = False
    for p in on.sandbox.trainable():
        w = p.detach().double().flatten(1) if p.ndim > 1 else torch.zeros(1, 0)
        if len(w) == w.shape[1] and w.tril(-1).any() and w.triu(1).any():  # not triangular
            p.data[0] *= torch.linalg.det(w).sign().neg()
            changed = True
    if changed and not has(on.found, "logdet_nan"):
        with suppress(AuditError):
            image = on.flow.forward(on.x)
            stated = per_example(image.raw, len(on.x))
            if stated is None or stated.isfinite().all():
                yield Passed("matrices of negative determinant")
            elif image.flat.isfinite().all():
                yield bug("logdet_nan", "negative")


def _check_single_precision(on: _Subject) -> Iterator[Outcome]:
    """The error of a round trip in float32, in which the flow will be used."""
    usable = on.flow.invertible and on.sandbox.dtype == torch.float64
    if not usable or has(on.found, "inverse_mismatch", "inverse_raises"):
        return
    x = on.x.float()
    on.sandbox.use_dtype(torch.float32)
    with suppress(AuditError):
        back = on.flow.round_trip(x)
        error = distance(back, x) if back.isfinite().all() else math.inf
        yield Facts(details={"round_trip_float32": error})
        if error > SINGLE[1]:
            conditions = on.conditions or {"the flow": math.nan}
            layer, condition = max(conditions.items(), key=lambda item: item[1])
            numbers = {"error": error, "layer": layer, "condition": condition}
            yield warning("ill_conditioned", "round_trip", **numbers)


# --- the determinant's sign ---------------------------------------------------------------------


def _check_determinant_sign(on: _Subject) -> Iterator[Outcome]:
    """Whether det J has one sign, over wide ranges of points and parameters.

    Parameters move far only if all are vectors: networks may be bijections by a bound on their
    matrices that an optimizer keeps.
    """
    if on.x[0].numel() > 16 or not on.own.is_square or on.estimated:
        yield Skipped("the sign of det J at many points: too costly, or not defined")
        return
    parameters, generator = on.sandbox.trainable(), torch.Generator().manual_seed(0)
    names = {k.rsplit(".", 1)[-1] for m in on.sandbox.modules for k, _ in m.named_buffers()}
    normalized = names & {"u", "v", "_u", "_v", "weight_u", "weight_v"}  # by a spectral norm
    vectors = all(p.squeeze().ndim <= 1 for p in parameters) and not normalized
    done, varies = 0, False
    for draw in range(1 + DRAWS * bool(parameters and vectors)):
        if time.process_time() > on.end or (draw > 10 and not varies):  # a linear map
            break
        on.restore()
        for p in parameters if draw else ():
            keep, size = torch.rand(2, generator=generator).tolist()
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.data.mul_(keep).add_(noise, alpha=10 ** (2 * size - 1))
        with suppress(AuditError, RuntimeError):
            log_det, sign = _determinants(on, 200 if draw else 1000, generator)
            positive, negative = (int((sign == s).sum()) for s in (1, -1))
            if positive and negative:
                where = ", with parameters that training may reach" if draw else ""
                yield bug("not_injective", positive=positive, negative=negative, parameters=where)
                return
            varies |= bool((log_det - log_det[:1]).abs().gt(1e-9).any())
            done += 1
    if done:
        yield Passed(f"det J has one sign at all points, under {done} draws of parameters")


def _determinants(on: _Subject, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """log |det J| and its sign where they are certain, up to eight standard deviations away.

    Points that are outside of the range of the example count if the inverse recovers them: others
    may be outside of the domain of the flow.
    """
    example = on.example
    spread = (example.std() if example.numel() > 1 else torch.tensor(1.0)).clamp(min=0.3)
    factor = 8 ** torch.rand(n, *(1,) * (example.ndim - 1), generator=generator)
    noise = torch.randn(n, *example.shape[1:], generator=generator)
    x = example.mean(0) + spread * (factor * noise).to(example)
    low, high = example.amin(0), example.amax(0)
    if (low >= 0).all():
        x = x.abs() if (high > 1).any() else torch.rand(x.shape, generator=generator).to(x)
    if on.flow.invertible:
        off = (on.flow.round_trip(x) - x).abs() / (1 + x.abs())
        within = (low <= x) & (x <= high)
        x = x[(off < 1e-3).reshape(n, -1).all(1) | within.reshape(n, -1).all(1)]
    if not len(x):
        raise AuditError("no point is recovered by the inverse")
    known = volume(on.flow.latents, x)
    assert known is not None
    sure = known.log_det.isfinite() & (known.condition < 1e9)
    if sure.any():
        sure &= known.log_det > known.log_det[sure].median() + math.log(0.01)
    return known.log_det[sure], known.sign[sure]
