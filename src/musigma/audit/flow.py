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
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from musigma.audit.bijection import FlowAdapter, called_layers, per_example
from musigma.audit.findings import (
    AuditError,
    AuditReport,
    ReportBuilder,
    Severity,
    distance,
    name_of,
)
from musigma.audit.flow_measurement import (
    LOG_DET,
    SINGLE,
    Fault,
    Measurement,
    faults_of,
    judge,
    measure,
)
from musigma.audit.jacobian import Volume, volume
from musigma.audit.sandbox import (
    Sandbox,
    TooSlowError,
    about_types,
    by_float_type,
    first,
    forward_hooks,
)

__all__ = ["audit_flow"]

SECONDS = 8.0  # of CPU time for all checks that can be left out
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
            return _FlowAudit(sandbox, forward, inverse, example).run()

    # many flows refuse float64 by an assertion without a word about types
    return by_float_type(attempt, lambda error: bool(error.__cause__) or about_types(error))


class _FlowAudit(ReportBuilder):
    """The report of one flow under construction, with the flow and the batch that it runs on."""

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any, example: Tensor):
        super().__init__(name_of(forward))
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
        if sandbox.dtype == torch.float32:
            self.assumed.append("it computes in float32 only: tolerances are wider")
        self.was_training = False  # it was, and is now in evaluation mode
        self.estimated = False  # its log-determinant is
        self.compared = False  # the log-determinant, with the Jacobian's
        self.why_not = ""  # why it was not compared

    def run(self) -> AuditReport:
        """Call the flow, and check everything that can be checked."""
        _call_first(self)
        if "not_finite" not in self.findings and _check_purity(self):
            _check_initialization(self)
            self.restore = self.sandbox.snapshot()
            own = _check_own_parameters(self)
            for check in (
                _check_accumulation,
                _check_random_parameters,
                _check_negative_determinants,
                _check_determinant_sign,
                _check_single_precision,
            ):
                check(self, own)
                self.restore()
        for name, argument in self.flow.changed.items():
            self.warn("inplace", "flow", name=name, argument=argument)
        if not self.compared and not any(code.startswith("logdet") for code in self.findings):
            self.missing.append("the log-determinant: " + (self.why_not or "it was not compared"))
        self.assumed += self.flow.notes
        return self.build()

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
        self.details.setdefault("conditions", {}).setdefault(name, condition)

    def judge(self, found: Measurement) -> list[Fault | str]:
        """The faults, each of the first layer that has it, and lines of what is right."""
        results = list(judge(found, estimated=self.estimated))
        unnamed = {"logdet_mismatch", "inverse_mismatch"} & faults_of(results).keys()
        for layer in called_layers(self.flow, self.x) if unnamed else ():
            layer.flow.invertible &= "inverse_mismatch" in unnamed
            with suppress(AuditError):
                found = measure(layer.flow, layer.x, self._volume)
                for code, fault in faults_of(judge(found, layer.name)).items():
                    if code in unnamed and fault.severity == "bug":
                        unnamed.remove(code)
                        fault.numbers["layer"] = layer.name
                        results = [fault if r[0] == code else r for r in results]
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

    def report(self, results: Iterable[Fault | str], std: float) -> None:
        """Add faults, and lines of what is right, with parameters that were moved by `std`."""
        when = f"with random parameters (moved by {std:g})" if std else "with its own parameters"
        for result in results:
            if isinstance(result, Fault):
                code, severity, variant, numbers = result
                self.find(code, severity, variant, when=when, **numbers)
            else:
                self.checked.append(f"{result}, {when}")


def _mixtures(x: Tensor, n: int) -> Tensor:
    """Mixtures of pairs of examples; noise around them where all are the same."""
    generator = torch.Generator().manual_seed(1)
    if (x == x[:1]).all():
        noise = torch.randn(n, *x.shape[1:], generator=generator).to(x)
        return x[:1] * (1 + 0.1 * noise) if x.any() else noise
    one, other = x[torch.randint(len(x), (2, n), generator=generator)]
    share = torch.rand(n, *(1,) * (x.ndim - 1), generator=generator).to(x)
    return torch.lerp(one, other, 0.2 + 0.6 * share)


def _call_first(audit: _FlowAudit) -> None:
    """Call the flow, and note what it returns."""
    try:
        image = audit.flow.first_call(audit.x)
    except AuditError:
        if len(audit.example) == len(audit.x):
            raise
        rows = len(audit.example)
        audit.x, audit.others = audit.example.clone(), _mixtures(audit.example, rows)
        image = audit.flow.first_call(audit.x)
        audit.assumed.append(f"only batches of {rows} examples are taken")
    if audit.sandbox.dtype == torch.float64 and image.flat.dtype == torch.float32:
        raise AuditError("forward: given float64, it returns float32")
    audit.why_not = "forward returns none" if image.raw is None else ""
    d, elements = image.flat.shape[1], audit.x[0].numel()
    if d != elements:
        sizes = f"z has {d} numbers for each example, and x {elements}"
        whole = "return what is factored out as well, as a list of tensors"
        if not audit.flow.invertible:
            raise AuditError(f"forward: {sizes}, so it is not a bijection; {whole}")
        audit.why_not = f"{sizes}; {whole}"
    if bad := float((~image.flat.isfinite()).double().mean()):
        audit.bug("not_finite", "latents", share=bad)
    if not audit.flow.invertible:
        audit.unchecked.append("the inverse: there is none")


# --- a function of one example ------------------------------------------------------------------


def _check_purity(audit: _FlowAudit) -> bool:
    """Whether the flow treats examples separately, and draws nothing, or what can be removed."""
    impure = _impurity(audit)
    if any(m.training for m in audit.sandbox.layers()) and any(impure.values()):
        for root in audit.sandbox.modules:
            root.eval()
        audit.was_training, in_training, impure = True, impure, _impurity(audit)
        audit.assumed.append("the flow is in training mode; the other checks use evaluation mode")
        for code, difference in in_training.items():
            if difference and not impure[code]:
                audit.warn(code, "training", difference=difference)
                break
    if impure["stochastic"]:
        if not _removes_noise(audit, impure["stochastic"]):
            return False
        audit.flow.fixed_draws = True
        audit.assumed.append("forward draws the same noise on each call of the other checks")
        impure = _impurity(audit)
    if impure["cross_sample"]:
        audit.bug("cross_sample", "bijection", difference=impure["cross_sample"])
        audit.why_not = "an example has no Jacobian of its own"
        return False
    audit.checked.append("z of an example does not depend on others, and two calls agree")
    return True


def _impurity(audit: _FlowAudit) -> dict[str, float]:
    """How far z differs between calls, and among other examples; zero where it does not.

    The larger differences under these and under random parameters, as zeros hide them.
    """
    limits = {"stochastic": SAME, "cross_sample": audit.tolerance}
    impure, restore = dict.fromkeys(limits, 0.0), audit.sandbox.snapshot()
    audit.estimated = False
    for std in (0.0, 0.1):
        with suppress(AuditError):
            audit.perturb(std)
            zs, stated = [], []
            for _ in range(3):
                image = audit.flow.forward(audit.x)
                zs.append(image.flat.detach())
                stated.append(per_example(image.raw, len(audit.x)))
            among = audit.flow.latents(torch.cat([audit.x[:1], audit.others[1:]]))
            off = {
                "stochastic": max(distance(z, zs[0]) for z in zs),
                "cross_sample": distance(among[:1], zs[0][:1]),
            }
            for code, limit in limits.items():
                if limit < off[code] < math.inf:
                    impure[code] = max(impure[code], off[code])
            given = [t for t in stated if t is not None]
            audit.estimated |= any(SAME < distance(t, given[0]) < math.inf for t in given)
    restore()
    return impure


def _removes_noise(audit: _FlowAudit, noise: float) -> bool:
    """Whether the inverse recovers x from what a stochastic forward returns: dequantization."""
    audit.why_not, wrong = "forward draws noise", 1.0
    if not audit.flow.invertible and len(audit.example.unique()) < audit.example.numel():
        audit.why_not += ", and there is no inverse that shows whether it is a dequantization"
        return False
    with suppress(AuditError):
        x = audit.flow.round_trip(audit.x)  # the values that the inverse returns
        off = torch.stack([audit.flow.round_trip(x) - x for _ in range(50)])
        wrong = float((off.abs() > audit.tolerance).double().mean())
    if wrong > 0.05:
        audit.bug("stochastic", "bijection", difference=noise)
        return False
    audit.warn("stochastic", "dequantization", difference=noise)
    if wrong > 1e-4:
        audit.warn("inverse_mismatch", "grid", share=wrong)
    audit.flow.invertible, audit.why_not = False, ""  # off the grid, flooring is no inverse
    return True


# --- the first batch ----------------------------------------------------------------------------


def _check_initialization(audit: _FlowAudit) -> None:
    """Whether layers that the first batch initializes standardize it, and stay initialized.

    These are the modules whose own numbers change in the first call alone. The batch is shifted
    and unevenly scaled, if the flow takes such data.
    """
    if audit.was_training or audit.x.ndim < 2:
        why = "the flow is in training mode" if audit.was_training else "there are no channels"
        audit.unchecked.append(f"data-dependent initialization: {why}")
        return
    channels, *sides = audit.x.shape[1:]
    scale, shift = torch.logspace(-0.7, 0.7, channels), torch.linspace(2.0, -3.0, channels)
    scale, shift = (t.reshape(channels, *[1] * len(sides)).to(audit.x) for t in (scale, shift))
    restore, calls = audit.sandbox.snapshot(), dict[str, tuple[Tensor, Tensor]]()
    for batch in (3 * scale * audit.others + shift, audit.others):
        audit.restore_first()
        with suppress(AuditError):
            calls = _changing_calls(audit, batch)
            if all(z.isfinite().all() for _, z in calls.values()):
                break
    again = _changing_calls(audit, audit.x) if calls else {}
    for name in calls.keys() - again.keys():
        audit.checked.append(f"the first batch initializes {name}")
        _check_standardized(audit, name, *calls[name])
    if calls.keys() - again.keys():
        _check_reload(audit)
    restore()
    audit.flow.forward(audit.x)  # initializes, if nothing has


def _changing_calls(audit: _FlowAudit, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of the modules whose own numbers change in a call of the flow."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    names = {m: k for root in audit.sandbox.modules for k, m in root.named_modules()}

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
        audit.flow.forward(x)
    return calls


def _check_standardized(audit: _FlowAudit, name: str, x: Tensor, z: Tensor) -> None:
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
        severity: Severity = "warning" if alike else "bug"
        audit.find("ddi_wrong", severity, layer=name, mean=off, least=least, largest=largest)


def _check_reload(audit: _FlowAudit) -> None:
    """Save after the first batch, load into a fresh copy, and call that on another batch."""
    modules = [m for m in audit.sandbox.modules if m.state_dict()]
    audit.restore_first()
    audit.flow.forward(audit.x)
    saved, expected = (
        copy.deepcopy([m.state_dict() for m in modules]),
        audit.flow.latents(audit.others),
    )
    audit.restore_first()
    for module, state in zip(modules, saved, strict=True):
        module.load_state_dict(state)
    difference = distance(expected, audit.flow.latents(audit.others))
    if difference > 10 * audit.tolerance:
        audit.bug("ddi_reinit", difference=difference)
    else:
        audit.checked.append("the initialized state survives state_dict")


# --- both directions ----------------------------------------------------------------------------


def _check_own_parameters(audit: _FlowAudit) -> Measurement:
    """Measure with the parameters as they are.

    Raises:
        AuditError: If the inverse is slow, or refuses float64.
    """
    own = audit.measure()
    if (error := own.failure) is not None:
        cause, double = error.__cause__, audit.sandbox.dtype == torch.float64
        if isinstance(error, TooSlowError) or (double and cause and about_types(error)):
            raise error
        if isinstance(cause, NotImplementedError):
            audit.unchecked.append("the inverse: it is not implemented")
        elif cause is None:
            audit.bug("inverse_mismatch", "shape", reason=str(error))
        else:
            audit.bug("inverse_raises", reason=str(error))
        audit.flow.invertible = False
    if own.known is not None:
        audit.note_condition("the flow", own.known)
        if not own.known.log_det.isfinite().all():
            audit.why_not = "J is singular or not finite at the example"
    audit.report(audit.judge(own), 0.0)
    return own


def _check_accumulation(audit: _FlowAudit, own: Measurement) -> None:
    """Whether a forward that takes a log-determinant adds to it."""
    raw, name = own.image.raw, audit.flow.adds_to
    if name is None or not isinstance(raw, Tensor) or own.pair is None:
        return
    before = torch.randn(raw.shape or audit.x.shape[:1])
    with suppress(AuditError):
        after = audit.flow.forward(audit.x, total=before).raw
        fits = isinstance(after, Tensor) and after.shape == before.shape
        if not fits or distance(after - before, raw.expand_as(before)) > 1e-6:
            audit.bug("logdet_mismatch", "accumulated", argument=name)


def _check_random_parameters(audit: _FlowAudit, own: Measurement) -> None:
    """Measure again after an update of the parameters.

    A fault must appear again after a fifth of the update; otherwise it is attributed to the
    parameters (a contraction that is no longer one) and not to the code.
    """
    if not audit.sandbox.trainable():
        audit.unchecked.append("random parameters: there are no trainable ones")
        return
    std, found = 0.0, None
    for std in SCALES:
        if (found := _updated(audit, std)) is not None:
            break
    if found is None:
        audit.unchecked.append("random parameters: z is not finite under any of them")
        return
    if found.failure is not None:
        audit.unchecked.append(f"inverse under random parameters: {found.failure}")
    results = audit.judge(found)
    faults = faults_of(results)
    faults.pop("logdet_nan", None)  # a parameter may be out of its range; checked separately
    new = faults.keys() - audit.findings.keys()
    if "inverse_mismatch" in new and own.back is not None:
        back = audit.flow.inverse(own.image.tree, audit.x)
        if torch.equal(back.tree, own.back.tree):
            audit.bug("stale_inverse", error=faults.pop("inverse_mismatch").numbers["error"])
            faults.pop("inverse_logdet_mismatch", None)
    if faults and (small := _updated(audit, std / 5)) is not None:
        again = faults_of(judge(small, estimated=audit.estimated))
        faults = {code: fault for code, fault in faults.items() if code in again}
    audit.report([r for r in results if isinstance(r, str) or r in faults.values()], std)


def _updated(audit: _FlowAudit, std: float) -> Measurement | None:
    """Measure after both directions were used and parameters moved; None if z is not finite."""
    audit.restore()
    with suppress(AuditError):
        if audit.flow.invertible:
            audit.flow.round_trip(audit.x)  # what is cached now is out of date then
        audit.perturb(std)
        z = audit.flow.latents(audit.x)
        return audit.measure() if z.isfinite().all() and z.abs().max() < 1e6 else None
    return None


def _check_negative_determinants(audit: _FlowAudit, _own: Measurement) -> None:
    """Whether the log-determinant is finite where a matrix has a negative determinant."""
    changed = False
    for p in audit.sandbox.trainable():
        w = p.detach().double().flatten(1) if p.ndim > 1 else torch.zeros(1, 0)
        if len(w) == w.shape[1] and w.tril(-1).any() and w.triu(1).any():  # not triangular
            p.data[0] *= torch.linalg.det(w).sign().neg()
            changed = True
    if changed and "logdet_nan" not in audit.findings:
        with suppress(AuditError):
            image = audit.flow.forward(audit.x)
            stated = per_example(image.raw, len(audit.x))
            if stated is None or stated.isfinite().all():
                audit.checked.append("matrices of negative determinant")
            elif image.flat.isfinite().all():
                audit.bug("logdet_nan", "negative")


def _check_single_precision(audit: _FlowAudit, _own: Measurement) -> None:
    """The error of a round trip in float32, in which the flow will be used."""
    usable = audit.flow.invertible and audit.sandbox.dtype == torch.float64
    if not usable or {"inverse_mismatch", "inverse_raises"} & audit.findings.keys():
        return
    x = audit.x.float()
    audit.sandbox.use_dtype(torch.float32)
    with suppress(AuditError):
        back = audit.flow.round_trip(x)
        error = distance(back, x) if back.isfinite().all() else math.inf
        audit.details["round_trip_float32"] = error
        if error > SINGLE[1]:
            conditions = audit.details.get("conditions", {"the flow": math.nan})
            layer, condition = max(conditions.items(), key=lambda item: item[1])
            numbers = {"error": error, "layer": layer, "condition": condition}
            audit.warn("ill_conditioned", "round_trip", **numbers)


# --- the determinant's sign ---------------------------------------------------------------------


def _check_determinant_sign(audit: _FlowAudit, own: Measurement) -> None:
    """Whether det J has one sign, over wide ranges of points and parameters.

    Parameters move far only if all are vectors: networks may be bijections by a bound on their
    matrices that an optimizer keeps.
    """
    if audit.x[0].numel() > 16 or not own.is_square or audit.estimated:
        audit.unchecked.append("the sign of det J at many points: too costly, or not defined")
        return
    parameters, generator = audit.sandbox.trainable(), torch.Generator().manual_seed(0)
    names = {k.rsplit(".", 1)[-1] for m in audit.sandbox.modules for k, _ in m.named_buffers()}
    normalized = names & {"u", "v", "_u", "_v", "weight_u", "weight_v"}  # by a spectral norm
    vectors = all(p.squeeze().ndim <= 1 for p in parameters) and not normalized
    done, varies = 0, False
    for draw in range(1 + DRAWS * bool(parameters and vectors)):
        if time.process_time() > audit.end or (draw > 10 and not varies):  # a linear map
            break
        audit.restore()
        for p in parameters if draw else ():
            keep, size = torch.rand(2, generator=generator).tolist()
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.data.mul_(keep).add_(noise, alpha=10 ** (2 * size - 1))
        with suppress(AuditError, RuntimeError):
            log_det, sign = _determinants(audit, 200 if draw else 1000, generator)
            positive, negative = (int((sign == s).sum()) for s in (1, -1))
            if positive and negative:
                where = ", with parameters that training may reach" if draw else ""
                audit.bug("not_injective", positive=positive, negative=negative, parameters=where)
                return
            varies |= bool((log_det - log_det[:1]).abs().gt(1e-9).any())
            done += 1
    if done:
        audit.checked.append(f"det J has one sign at all points, under {done} draws of parameters")


def _determinants(audit: _FlowAudit, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """log |det J| and its sign where they are certain, up to eight standard deviations away.

    Points that are outside of the range of the example count if the inverse recovers them: others
    may be outside of the domain of the flow.
    """
    example = audit.example
    spread = (example.std() if example.numel() > 1 else torch.tensor(1.0)).clamp(min=0.3)
    factor = 8 ** torch.rand(n, *(1,) * (example.ndim - 1), generator=generator)
    noise = torch.randn(n, *example.shape[1:], generator=generator)
    x = example.mean(0) + spread * (factor * noise).to(example)
    low, high = example.amin(0), example.amax(0)
    if (low >= 0).all():
        x = x.abs() if (high > 1).any() else torch.rand(x.shape, generator=generator).to(x)
    if audit.flow.invertible:
        off = (audit.flow.round_trip(x) - x).abs() / (1 + x.abs())
        within = (low <= x) & (x <= high)
        x = x[(off < 1e-3).reshape(n, -1).all(1) | within.reshape(n, -1).all(1)]
    if not len(x):
        raise AuditError("no point is recovered by the inverse")
    known = volume(audit.flow.latents, x)
    assert known is not None
    sure = known.log_det.isfinite() & (known.condition < 1e9)
    if sure.any():
        sure &= known.log_det > known.log_det[sure].median() + math.log(0.01)
    return known.log_det[sure], known.sign[sure]
