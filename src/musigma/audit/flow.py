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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from musigma.audit.bijection import FlowAdapter
from musigma.audit.findings import (
    Assumed,
    AuditError,
    AuditReport,
    Facts,
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
from musigma.audit.jacobian import volume
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
        with Sandbox(forward, inverse, state, as_is=True) as sandbox:
            sandbox.use_dtype(dtype)
            flow = FlowAdapter(sandbox, forward, inverse)
            x = example.detach().to("cpu", dtype)
            return AuditReport.of(name_of(forward), _check(flow, x))

    return first_form(((dtype,) for dtype in FLOATS), attempt)[1]


@dataclass(frozen=True)
class _Subject:
    """A flow and the batches that it runs on.

    Args:
        flow: The flow.
        example: The data that were given.
        x: A batch (B, ...) like them.
        others: Another one.
        restore: Restores the state before the first call.
        end: The CPU time of the process at which checks that can be left out end.
    """

    flow: FlowAdapter
    example: Tensor
    x: Tensor
    others: Tensor
    restore: Callable[[], None]
    end: float

    @property
    def sandbox(self) -> Sandbox:
        """What the flow runs in."""
        return self.flow.sandbox

    @property
    def tolerance(self) -> float:
        """The error that is rounding."""
        return LOG_DET[0] if self.sandbox.dtype == torch.float64 else SINGLE[0]


def _check(flow: FlowAdapter, example: Tensor) -> Iterator[Outcome]:
    """Check everything that can be checked."""
    found, on = _first_call(flow, example)
    for check in (_check_initialization, _check_purity):
        if not _is_over(found):
            found += check(on)
    if not _is_over(found):
        restore, own = on.sandbox.snapshot(), measure(flow, on.x, on.end)
        found += _check_own_parameters(on, own)
        for check in (
            _check_accumulation,
            _check_random_parameters,
            _check_negative_determinants,
            _check_determinant_sign,
            _check_single_precision,
        ):
            restore()
            found += list(check(on, own, set(faults_of(found))))
    yield from found
    for name, argument in flow.changed.items():
        yield warning("inplace", "flow", name=name, argument=argument)
    yield from map(Assumed, flow.notes)


def _is_over(found: list[Outcome]) -> bool:
    """Whether there is no log-determinant to compare."""
    return any(isinstance(o, Missing) for o in found)


def _missing(why: str) -> Missing:
    return Missing(f"the log-determinant: {why}")


def _mixtures(x: Tensor, n: int) -> Tensor:
    """Mixtures of pairs of examples; noise around them where all are the same."""
    generator = torch.Generator().manual_seed(1)
    if (x == x[:1]).all():
        noise = torch.randn(n, *x.shape[1:], generator=generator).to(x)
        return x[:1] * (1 + 0.1 * noise) if x.any() else noise
    one, other = x[torch.randint(len(x), (2, n), generator=generator)]
    share = torch.rand(n, *(1,) * (x.ndim - 1), generator=generator).to(x)
    return torch.lerp(one, other, 0.2 + 0.6 * share)


def _first_call(flow: FlowAdapter, example: Tensor) -> tuple[list[Outcome], _Subject]:
    """Call the flow, and look at what it returns; and the batches that it takes."""
    found, restore, end = list[Outcome](), flow.sandbox.snapshot(), time.process_time() + SECONDS
    double = flow.sandbox.dtype == torch.float64
    if not double:
        found.append(Assumed("it computes in float32 only: tolerances are wider"))
    # a batch of a size that no other axis has, so that the shape of a log-determinant is clear
    elements = example[0].numel()
    sizes = itertools.count(max(3, min(24, 400 // elements)))
    rows = next(n for n in sizes if n not in (elements, *example.shape[1:]))
    drawn = _mixtures(example, 2 * rows)
    x, others = torch.cat([example, drawn])[:rows], drawn[rows:]
    try:
        image = flow.first_call(x)
    except AuditError:
        if len(example) == rows:
            raise
        x, others = example, _mixtures(example, len(example))
        image = flow.first_call(x)
        found.append(Assumed(f"only batches of {len(x)} examples are taken"))
    if double and image.flat.dtype == torch.float32:
        raise AuditError("forward: given float64, it returns float32")
    if image.flat.shape[1] != elements and not flow.invertible:
        raise AuditError(
            f"forward: z has {image.flat.shape[1]} numbers for each example, and x {elements}, so "
            "it is not a bijection; return what is factored out as well, as a list of tensors"
        )
    if bad := float((~image.flat.isfinite()).double().mean()):
        found += [bug("not_finite", "latents", share=bad), _missing("z is not finite")]
    if not flow.invertible:
        found.append(Skipped("the inverse: there is none"))
    return found, _Subject(flow, example, x, others, restore, end)


@torch.no_grad()
def _perturb(sandbox: Sandbox, std: float) -> None:
    """Move the parameters by noise, in training mode, as a training step does.

    Running means and variances, which start at zero and one, move as well. Parameters of modules
    with backward hooks, which may keep them in their range, do not.
    """
    modes = {module: module.training for module in sandbox.layers()}
    hooked = [m for m in modes if m._backward_hooks]  # pyright: ignore[reportPrivateUsage]
    kept = [(p, p.clone()) for m in hooked for p in m.parameters(recurse=False)]
    for root in sandbox.modules:
        root.train()
    sandbox.randomize(std)
    for p, value in kept:
        p.copy_(value)
    for root in sandbox.modules:
        root.train(modes[root])  # a flow may drop what it caches
    generator = torch.Generator().manual_seed(1)
    for module, mode in modes.items():
        module.training = mode
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("running_mean", "running_var"):
                noise = std * torch.randn(buffer.shape, generator=generator).to(buffer)
                buffer.add_(noise) if name == "running_mean" else buffer.mul_(noise.exp())


# --- the first batch ----------------------------------------------------------------------------


def _check_initialization(on: _Subject) -> Iterator[Outcome]:
    """Whether layers that the first batch initializes standardize it, and stay initialized.

    These are the modules whose own numbers change in the first call alone. The batch is shifted
    and unevenly scaled, if the flow takes such data.
    """
    channels, *sides = on.x.shape[1:] or (1,)
    scale, shift = torch.logspace(-0.7, 0.7, channels), torch.linspace(2.0, -3.0, channels)
    scale, shift = (t.reshape(channels, *[1] * len(sides)).to(on.x) for t in (scale, shift))
    restore, calls = on.sandbox.snapshot(), dict[str, tuple[Tensor, Tensor]]()
    for batch in (3 * scale * on.others + shift, on.others):
        on.restore()
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

    def latents() -> Tensor:
        on.sandbox.reseed()
        return on.flow.latents(on.others)

    on.restore()
    on.flow.forward(on.x)
    saved = copy.deepcopy([m.state_dict() for m in modules])
    expected = latents()
    on.restore()
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)
    difference = distance(expected, latents())
    if difference > 10 * on.tolerance:
        return bug("ddi_reinit", difference=difference)
    return Passed("the initialized state survives state_dict")


# --- a function of one example ------------------------------------------------------------------


def _check_purity(on: _Subject) -> Iterator[Outcome]:
    """Whether the flow treats examples separately, and draws nothing, or what can be removed."""
    flow, impure = on.flow, _impurity(on)
    if impure and any(m.training for m in on.sandbox.layers()):
        for root in on.sandbox.modules:
            root.eval()
        in_training, impure = impure, _impurity(on)
        yield Assumed("the flow is in training mode; the other checks use evaluation mode")
        for code in [code for code in in_training if code not in impure][:1]:
            yield warning(code, "training", difference=in_training[code])
    if "stochastic" in impure:
        wrong = _wrong_without_noise(on)
        if wrong is None:
            why = "and there is no inverse that shows whether it is a dequantization"
            yield _missing(f"forward draws noise, {why}")
            return
        if wrong > MOST_WRONG:
            yield bug("stochastic", "bijection", difference=impure["stochastic"])
            yield _missing("forward draws noise")
            return
        yield warning("stochastic", "dequantization", difference=impure["stochastic"])
        if wrong > 1e-4:
            yield warning("inverse_mismatch", "grid", share=wrong)
        flow.fixed_draws, flow.invertible = True, False  # off the grid, flooring is no inverse
        yield Assumed("forward draws the same noise on each call of the other checks")
        impure = _impurity(on)
    if "cross_sample" in impure:
        yield bug("cross_sample", "bijection", difference=impure["cross_sample"])
        yield _missing("an example has no Jacobian of its own")
        return
    yield Passed("z of an example does not depend on others, and two calls agree")


def _impurity(on: _Subject) -> dict[str, float]:
    """How far z differs between calls, and among other examples, where it does.

    The larger differences under these and under random parameters, as zeros hide them.
    """
    flow, impure, restore = on.flow, dict[str, float](), on.sandbox.snapshot()
    flow.estimates = False
    for std in (0.0, 0.1):
        with suppress(AuditError):
            _perturb(on.sandbox, std)
            images = [flow.forward(on.x) for _ in range(3)]
            among = flow.latents(torch.cat([on.x[:1], on.others[1:]]))
            z = images[0].flat
            for code, limit, off in (
                ("stochastic", SAME, max(distance(image.flat, z) for image in images)),
                ("cross_sample", on.tolerance, distance(among[:1], z[:1])),
            ):
                if limit < off < math.inf:
                    impure[code] = max(impure.get(code, 0.0), off)
            given = [t for image in images if (t := image.log_det) is not None]
            flow.estimates |= any(SAME < distance(t, given[0]) < math.inf for t in given)
    restore()
    return impure


def _wrong_without_noise(on: _Subject) -> float | None:
    """The share of x that the inverse does not recover from what a stochastic forward returns.

    It recovers x after a dequantization. None if there is no inverse, and the data are levels.
    """
    if not on.flow.invertible and len(on.example.unique()) < on.example.numel():
        return None
    with suppress(AuditError):
        x = on.flow.round_trip(on.x)  # the values that the inverse returns
        off = torch.stack([on.flow.round_trip(x) - x for _ in range(50)])
        return float((off.abs() > on.tolerance).double().mean())
    return 1.0


# --- both directions ----------------------------------------------------------------------------


def _check_own_parameters(on: _Subject, own: Measurement) -> Iterator[Outcome]:
    """Judge the measurement with the parameters as they are.

    Raises:
        AuditError: If the inverse is slow, or refuses float64.
    """
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
    judged = judge(own, "with its own parameters")
    yield from judged
    if own.pair is None and not has(judged, "logdet_shape", "logdet_nan"):
        yield _missing(own.unknown)
    yield Facts(details={"conditions": own.conditions} if own.conditions else {})


def _check_accumulation(on: _Subject, own: Measurement, codes: set[str]) -> Iterator[Outcome]:
    """Whether a forward that takes a log-determinant adds to it."""
    raw, name = own.image.raw, on.flow.adds_to
    if name is None or not isinstance(raw, Tensor) or own.pair is None:
        return
    before = torch.randn(raw.shape or on.x.shape[:1])
    with suppress(AuditError):
        after = on.flow.forward(on.x, total=before).raw
        fits = isinstance(after, Tensor) and after.shape == before.shape
        if not fits or distance(after - before, raw.expand_as(before)) > 1e-6:
            yield bug("logdet_mismatch", "accumulated", argument=name)


def _check_random_parameters(on: _Subject, own: Measurement, codes: set[str]) -> Iterator[Outcome]:
    """Measure again after an update of the parameters.

    A fault must appear again after a fifth of the update; otherwise it is attributed to the
    parameters (a contraction that is no longer one) and not to the code.
    """
    if not on.sandbox.trainable():
        yield Skipped("random parameters: there are no trainable ones")
        return
    restore = on.sandbox.snapshot()

    def updated(std: float) -> Measurement | None:
        """Measured after both directions were used and parameters moved; None if z is large."""
        restore()
        with suppress(AuditError):
            if on.flow.invertible:
                on.flow.round_trip(on.x)  # what is cached now is out of date then
            _perturb(on.sandbox, std)
            z = on.flow.latents(on.x)
            if z.isfinite().all() and z.abs().max() < 1e6:
                return measure(on.flow, on.x, on.end)
        return None

    found = ((std, m) for std in SCALES if (m := updated(std)) is not None)
    std, found = next(found, (0.0, None))
    if found is None:
        yield Skipped("random parameters: z is not finite under any of them")
        return
    if found.failure is not None:
        yield Skipped(f"inverse under random parameters: {found.failure}")
    when = f"with random parameters (moved by {std:g})"
    results = judge(found, when)
    faults = faults_of(results)
    faults.pop("logdet_nan", None)  # a parameter may be out of its range; checked separately
    if "inverse_mismatch" in faults.keys() - codes and own.back is not None:
        back = on.flow.inverse(own.image.tree, on.x)
        if torch.equal(back.tree, own.back.tree):
            yield bug("stale_inverse", error=faults.pop("inverse_mismatch").numbers["error"])
            faults.pop("inverse_logdet_mismatch", None)
    if faults and (small := updated(std / 5)) is not None:
        again = faults_of(judge(small, when))
        faults = {code: fault for code, fault in faults.items() if code in again}
    yield from (o for o in results if isinstance(o, Passed) or o.code in faults)


def _check_negative_determinants(
    on: _Subject, own: Measurement, codes: set[str]
) -> Iterator[Outcome]:
    """Whether the log-determinant is finite where a matrix has a negative determinant."""
    changed = False
    for p in on.sandbox.trainable():
        w = p.detach().double().flatten(1) if p.ndim > 1 else torch.zeros(1, 0)
        if len(w) == w.shape[1] and w.tril(-1).any() and w.triu(1).any():  # not triangular
            p.data[0] *= torch.linalg.det(w).sign().neg()
            changed = True
    if changed and "logdet_nan" not in codes:
        with suppress(AuditError):
            image = on.flow.forward(on.x)
            if image.log_det is None or image.log_det.isfinite().all():
                yield Passed("matrices of negative determinant")
            elif image.flat.isfinite().all():
                yield bug("logdet_nan", "negative")


def _check_single_precision(on: _Subject, own: Measurement, codes: set[str]) -> Iterator[Outcome]:
    """The error of a round trip in float32, in which the flow will be used."""
    usable = on.flow.invertible and on.sandbox.dtype == torch.float64
    if not usable or codes & {"inverse_mismatch", "inverse_raises"}:
        return
    x = on.x.float()
    on.sandbox.use_dtype(torch.float32)
    with suppress(AuditError):
        back = on.flow.round_trip(x)
        error = distance(back, x) if back.isfinite().all() else math.inf
        yield Facts(details={"round_trip_float32": error})
        if error > SINGLE[1]:
            conditions = own.conditions or {"the flow": math.nan}
            layer, condition = max(conditions.items(), key=lambda item: item[1])
            numbers = {"error": error, "layer": layer, "condition": condition}
            yield warning("ill_conditioned", "round_trip", **numbers)


def _check_determinant_sign(on: _Subject, own: Measurement, codes: set[str]) -> Iterator[Outcome]:
    """Whether det J has one sign, over wide ranges of points and parameters.

    Parameters move far only if all are vectors: networks may be bijections by a bound on their
    matrices that an optimizer keeps.
    """
    if on.x[0].numel() > 16 or not own.is_square or on.flow.estimates:
        yield Skipped("the sign of det J at many points: too costly, or not defined")
        return
    parameters, generator = on.sandbox.trainable(), torch.Generator().manual_seed(0)
    names = {k.rsplit(".", 1)[-1] for m in on.sandbox.modules for k, _ in m.named_buffers()}
    normalized = names & {"u", "v", "_u", "_v", "weight_u", "weight_v"}  # by a spectral norm
    vectors = all(p.squeeze().ndim <= 1 for p in parameters) and not normalized
    restore, done, varies = on.sandbox.snapshot(), 0, False
    for draw in range(1 + DRAWS * bool(parameters and vectors)):
        if time.process_time() > on.end or (draw > 10 and not varies):  # a linear map
            break
        restore()
        for p in parameters if draw else ():
            keep, size = torch.rand(2, generator=generator).tolist()
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.data.mul_(keep).add_(noise, alpha=10 ** (2 * size - 1))
        with suppress(AuditError, RuntimeError):
            known = volume(on.flow.latents, _far_points(on, 200 if draw else 1000, generator))
            assert known is not None  # as there are few elements
            positive, negative = known.signs()
            if positive and negative:
                where = ", with parameters that training may reach" if draw else ""
                yield bug("not_injective", positive=positive, negative=negative, parameters=where)
                return
            varies |= bool((known.log_det - known.log_det[:1]).abs().gt(1e-9).any())
            done += 1
    if done:
        yield Passed(f"det J has one sign at all points, under {done} draws of parameters")


def _far_points(on: _Subject, n: int, generator: torch.Generator) -> Tensor:
    """Points of the flow's domain, up to eight standard deviations away from the example.

    Those outside of the range of the example count if the inverse recovers them: others may be
    outside of the domain.
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
    return x
