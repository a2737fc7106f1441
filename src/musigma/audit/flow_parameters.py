"""The flow under other parameters: those of its first batch, random ones, updated ones.

If the answer to other data depends on which batch came first, the first call initializes. It is
then repeated on shifted, unevenly scaled data: a layer whose first output is a shift and a scale
of each channel must have standardized it.

A fault under random parameters must appear again under a fifth of the perturbation; otherwise it
is attributed to the parameters (a contraction that is no longer one) and not to the code.
"""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.bijection import log_det_of
from musigma.audit.findings import AuditError, distance
from musigma.audit.flow_faults import report
from musigma.audit.flow_measurement import EXACT, FlowAudit, Measurement
from musigma.audit.jacobian import by_autograd
from musigma.audit.sandbox import first, forward_hooks

__all__ = [
    "check_determinant_sign",
    "check_initialization",
    "check_negative_determinants",
    "check_random_parameters",
]

SCALES = (0.3, 0.1, 0.03)  # of random parameters: the largest under which z is finite
DRAWS = 300  # of parameters, to look for one under which det J changes its sign

Moments = tuple[Tensor, Tensor]


# --- the first batch ---------------------------------------------------------------------------


def check_initialization(audit: FlowAudit) -> None:
    """Whether the first call initializes anything, and if so, correctly and permanently."""
    if audit.was_training:
        audit.unchecked.append("data-dependent initialization: the flow is in training mode")
    elif audit.sandbox.modules or audit.sandbox.holders:
        restore_after_first = audit.sandbox.snapshot()
        other = audit.draw_examples(len(audit.x), 4)
        second = _z(audit, other)
        audit.restore_first()
        with suppress(AuditError):
            other_first, example_second = _z(audit, other), _z(audit, audit.x)
            restore_after_first()
            example_again = _z(audit, audit.x)
            change = max(distance(second, other_first), distance(example_second, example_again))
            if change > 10 * audit.tolerance and not _has_running_statistics(audit):
                audit.checked.append("the first call initializes from its batch")
                _check_standardization(audit)
                _check_reload(audit)
        restore_after_first()
        audit.flow.forward(audit.x)  # initializes, if nothing has


def _z(audit: FlowAudit, x: Tensor) -> Tensor:
    return audit.flow.latents(x).detach()


def _has_running_statistics(audit: FlowAudit) -> bool:
    """Whether each call changes the answer of the next, which is not initialization."""
    restore = audit.sandbox.snapshot()
    before = _z(audit, audit.x)
    for seed in range(3):
        audit.flow.forward(3 * audit.draw_examples(len(audit.x), 20 + seed))
    after = _z(audit, audit.x)
    restore()
    return distance(before, after) > audit.tolerance


def _check_standardization(audit: FlowAudit) -> None:
    """Check the layers that are a shift and a scale of each channel, on uneven data.

    Once with the other parameters as they are and once at random: networks that start at zero
    hide faults, and a learned gain looks like one. A fault shows both times.
    """
    unperturbed = _standardized(audit, 0.0)
    perturbed = _standardized(audit, 0.3) if unperturbed else {}
    both = [name for name in unperturbed if name in perturbed]
    if not both:
        audit.unchecked.append("data-dependent initialization: no layer shows what it sets")
        return
    audit.checked.append(
        "data-dependent initialization: each channel's mean and std after the first batch, on "
        "shifted and unevenly scaled data"
    )
    for name in both:
        runs = (unperturbed[name], perturbed[name])
        if min(float(torch.cat([mean, std - 1]).abs().max()) for mean, std in runs) < 0.05:
            continue
        mean, std = unperturbed[name]
        common = float(std.median())  # some layers scale all channels to another constant
        alike = float((std / common - 1).abs().max()) < 0.05
        alike &= float(mean.abs().max()) < 0.05 * max(1.0, common)
        audit.find(
            "ddi_wrong",
            "warning" if alike else "bug",
            layer=name,
            mean=mean.abs().max(),
            least=std.min(),
            largest=std.max(),
            means=mean[:16].tolist(),
            stds=std[:16].tolist(),
        )


def _standardized(audit: FlowAudit, noise: float) -> dict[str, Moments]:
    """Mean and std by channel of every first output that shifts and scales its input."""
    channels, *sides = audit.example.shape[1:]
    n = max(16, 512 // math.prod(sides))
    spread = torch.logspace(-0.7, 0.7, channels) if channels > 1 else torch.tensor([3.0])
    draws = torch.randn(n, *sides, channels, generator=torch.Generator().manual_seed(3))
    uneven = (draws * spread + torch.linspace(2.0, -3.0, channels)).movedim(-1, 1).contiguous()
    names = {m: k for root in audit.sandbox.modules for k, m in root.named_modules()}
    for x in (uneven.to(audit.example), audit.draw_examples(n, 5)):
        audit.restore_first()
        audit.perturb(noise)
        calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def hook(module: nn.Module, args: tuple, out: Any, calls: dict = calls) -> None:
            z = first(out)
            if args and isinstance(args[0], Tensor) and isinstance(z, Tensor):
                calls.setdefault(module, (args[0].detach(), z.detach()))

        before = {m: _numbers_of(m) for m in names}
        try:
            with forward_hooks(names, hook):
                z = _z(audit, x)
        except AuditError:
            continue
        if z.isfinite().all():
            initialized = [m for m in calls if not torch.equal(before[m], _numbers_of(m))]
            pairs = [(names[m] or type(m).__name__, *calls[m]) for m in initialized]
            pairs = pairs or [("forward", x, z)]
            found = {name: moments for name, *pair in pairs if (moments := _moments(*pair))}
            if found:
                return found
    return {}


def _numbers_of(module: nn.Module) -> Tensor:
    """Copies of the numbers that a module itself holds, in a row."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    tensors += [t for t in vars(module).values() if isinstance(t, Tensor)]
    parts = [t.detach().double().flatten() for t in tensors if t.is_floating_point()]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def _moments(x: Tensor, z: Tensor) -> Moments | None:
    """Mean and std of z by channel, if z shifts and scales each channel of x; else None."""
    if x.numel() != z.numel() or x.ndim < 2 or x.numel() < 512 * x.shape[1]:
        return None
    z = z.double().reshape(x.shape).transpose(0, 1).flatten(1)
    x = x.double().transpose(0, 1).flatten(1)
    centered, out = x - x.mean(1, keepdim=True), z - z.mean(1, keepdim=True)
    slope = (centered * out).mean(1) / centered.square().mean(1)
    left = (out - slope[:, None] * centered).abs().amax()
    if not left <= 1e-4 * out.abs().amax().clamp(min=1e-12):  # NaN where a channel is constant
        return None
    unchanged = (slope - 1).abs().max() < 1e-6 and (z.mean(1) - x.mean(1)).abs().max() < 1e-6
    return None if unchanged else (z.mean(1), z.std(1, correction=0))


def _check_reload(audit: FlowAudit) -> None:
    """Save after the first batch, load into a fresh copy, and call that on another batch."""
    modules = [m for m in audit.sandbox.modules if m.state_dict()]
    if isinstance(audit.state, nn.Module):
        modules = [audit.state]
    if not modules:
        audit.unchecked.append("saving and loading: no module has the state")
        return
    audit.restore_first()
    audit.flow.forward(audit.x)
    saved = [copy.deepcopy(m.state_dict()) for m in modules]
    other = 0.5 * audit.x + 0.5 * audit.draw_examples(len(audit.x), 6)
    expected = _z(audit, other)
    audit.restore_first()
    try:
        for module, state in zip(modules, saved, strict=True):
            module.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        audit.unchecked.append(f"loading a saved state: {str(error).splitlines()[0][:120]}")
        return
    difference = distance(expected, _z(audit, other))
    if difference > 10 * audit.tolerance:
        audit.bug("ddi_reinit", difference=difference)
    else:
        audit.checked.append("the initialized state survives state_dict")


# --- random and updated parameters -------------------------------------------------------------


def check_random_parameters(audit: FlowAudit, unperturbed: Measurement) -> None:
    """Measure again under random parameters, and whether the inverse follows an update."""
    if not audit.sandbox.trainable():
        audit.unchecked.append("random parameters: there are no trainable ones")
        return
    std = next((std for std in SCALES if _is_finite(audit, std)), None)
    if std is None:
        audit.unchecked.append("random parameters: z is not finite under any of them")
        return
    audit.perturbation = std
    measured = audit.measure()
    if measured.inverse_error is not None and audit.flow.invertible:
        if measured.inverse_error.__cause__ is None:
            raise measured.inverse_error
        audit.unchecked.append(f"inverse under random parameters: {measured.inverse_error}")
        return
    if measured.nan_log_det and not unperturbed.nan_log_det:
        measured = Measurement()  # a parameter may be out of its range; checked separately
    limits = {"round_trip": EXACT, "log_det": audit.tolerance, "back_sum": audit.tolerance}
    errors = {name: getattr(measured, name) for name in limits}
    if any(errors[n] > limits[n] for n in limits) and not audit.noisy_log_det:
        audit.reset(std / 5)
        small = audit.measure()
        for name, error in errors.items():
            if getattr(small, name) <= 1e-3 * min(1.0, error):
                setattr(measured, name, math.nan)
    stale = audit.flow.invertible and _is_stale(audit, std)
    if stale and measured.round_trip > audit.tolerance >= unperturbed.round_trip:
        measured.round_trip = measured.back_sum = math.nan
    report(audit, measured, audit.when(std))


def _is_finite(audit: FlowAudit, std: float) -> bool:
    """Move the parameters; whether z has numbers of an ordinary size."""
    audit.reset(std)
    with suppress(AuditError):
        z = _z(audit, audit.x)
        return bool(z.isfinite().all() and z.abs().max() < 1e6)
    return False


def _is_stale(audit: FlowAudit, std: float) -> bool:
    """Whether an inverse that was used before an update still has the old parameters."""
    x = audit.few
    with suppress(AuditError):
        audit.restore()
        old = audit.flow.forward(x)
        early, _ = audit.flow.inverse(old.tree, x)
        audit.perturb(std)
        new = audit.flow.forward(x)
        if distance(new.flat, old.flat) < 1e-4:
            return False
        late, _ = audit.flow.inverse(new.tree, x)
        error = distance(late, x)
        if error <= 1e-3:
            audit.checked.append("the inverse follows an update of the parameters")
            return False
        late_old, _ = audit.flow.inverse(old.tree, x)
        audit.reset(std)
        fresh = audit.flow.round_trip(x)
        if distance(fresh, x) <= 1e-3 or distance(late_old, early) == 0.0:
            audit.bug("stale_inverse", error=error)
            return True
    return False


# --- the determinant's sign ---------------------------------------------------------------------


def check_negative_determinants(audit: FlowAudit, _unperturbed: Measurement) -> None:
    """Whether the log-determinant is finite where a matrix has a negative determinant."""
    matrices = [_make_negative(p) for p in audit.sandbox.trainable() if p.ndim > 1]
    if not any(matrices) or "logdet_nan" in audit.findings:
        return
    with suppress(AuditError):
        image = audit.flow.forward(audit.x)
        if image.raw is not None and image.flat.isfinite().all():
            stated, _ = log_det_of(image.raw, len(audit.x))
            if stated.isfinite().all():
                audit.checked.append("matrices of negative determinant")
            else:
                audit.bug("logdet_nan", "negative")


@torch.no_grad()
def _make_negative(p: Tensor) -> bool:
    """Make the determinant of a square matrix negative; False if it is triangular or no matrix.

    One off-diagonal entry changes: det(W + c e_i e_j') = det W (1 + c V_ji), V the inverse of W.
    """
    w = p.detach().double().flatten(1).clone()
    if w.shape != (len(p), len(p)) or not (w.tril(-1).any() and w.triu(1).any()):
        return False
    v = torch.linalg.pinv(w).T.fill_diagonal_(0.0)
    at = divmod(int(v.abs().argmax()), len(p))
    if torch.linalg.det(w) > 0 and v[at] != 0:
        w[at] -= 2 / v[at]
        p.copy_(w.reshape(p.shape))
    return True


def check_determinant_sign(audit: FlowAudit, _unperturbed: Measurement) -> None:
    """Whether det J has one sign, over wide ranges of points and parameters.

    Parameters move far only if all are vectors: networks may be bijections by a bound on their
    matrices that an optimizer keeps.
    """
    if audit.x[0].numel() > 16:
        audit.unchecked.append("the sign of det J at many points: there are too many elements")
        return
    if "cross_sample" in audit.findings or audit.noisy_log_det:
        return
    parameters = audit.sandbox.trainable()
    vectors = all(p.squeeze().ndim <= 1 for p in parameters)
    draws = DRAWS if parameters and vectors and not _is_normalized(audit) else 0
    n, done, varies = 1500 if audit.seconds_per_call < 0.01 else 300, 0, False
    for draw in range(1 + draws):
        if audit.time_left() < 0 or (draw > 10 and not varies):  # a linear map
            break
        audit.restore()
        if draw:
            _scatter(parameters, draw)
        with suppress(AuditError, RuntimeError):
            log_det, sign = _determinants(audit, 200 if draw else n, draw)
            positive, negative = (int((sign == s).sum()) for s in (1, -1))
            if positive and negative:
                where = ", with parameters that training may reach" if draw else ""
                audit.bug("not_injective", positive=positive, negative=negative, parameters=where)
                return
            varies |= bool((log_det - log_det[:1]).abs().gt(1e-9).any())
            done += 1
    if done:
        times = f", under {done} draws of the parameters" if draws else ""
        audit.checked.append(f"det J has the same sign at all points tried{times}")


def _is_normalized(audit: FlowAudit) -> bool:
    """Whether a module keeps the vectors of a spectral norm."""
    names = {k.rsplit(".", 1)[-1] for m in audit.sandbox.modules for k, _ in m.named_buffers()}
    return bool(names & {"u", "v", "_u", "_v", "weight_u", "weight_v"})


@torch.no_grad()
def _scatter(parameters: list[Tensor], seed: int) -> None:
    """Shrink every parameter and add noise, each on a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        keep, size = torch.rand(2, generator=generator).tolist()
        noise = torch.randn(p.shape, generator=generator).to(p)
        p.mul_(keep).add_(noise, alpha=10 ** (2 * size - 1))


def _determinants(audit: FlowAudit, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """log |det J| and its sign where they are certain, up to eight standard deviations away.

    Points that are outside of the range of the example count if the inverse recovers them: others
    may be outside of the domain of the flow.
    """
    example, generator = audit.example, torch.Generator().manual_seed(seed)
    spread = (example.std() if example.numel() > 1 else torch.tensor(1.0)).clamp(min=0.3)
    factor = 8 ** torch.rand(n, *(1,) * (example.ndim - 1), generator=generator)
    noise = torch.randn(n, *example.shape[1:], generator=generator)
    x = example.mean(0) + spread * (factor * noise).to(example)
    low, high = example.amin(0), example.amax(0)
    if (low >= 0).all():
        x = x.abs() if (high > 1).any() else torch.rand(x.shape, generator=generator).to(x)
    if audit.flow.invertible:
        back = audit.flow.round_trip(x)
        off = ((back - x).abs() / (1 + x.abs())).flatten(1).amax(1)
        within = ((low <= x) & (x <= high)).flatten(1).all(1)
        x = x[(off < 1e-3) | within]
    log_det, sign, condition = by_autograd(audit.flow.latents, x)
    sure = log_det.isfinite() & (condition < 1e9)
    if sure.any():
        sure &= log_det > log_det[sure].median() + math.log(0.01)
    return log_det[sure], sign[sure]
