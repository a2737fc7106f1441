"""The state of one flow audit: the flow, a batch, measurements of both directions, findings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from musigma.audit.findings import AuditError, ReportBuilder, Severity, distance, name_of
from musigma.audit.flow_adapter import FlowAdapter, Image, log_det_of, map_tensors
from musigma.audit.sandbox import Sandbox
from musigma.audit.volume import DENSE, Volume, by_differences, volume

__all__ = ["FlowAudit", "Measurement", "log_det_error"]

SECONDS = 8.0  # of CPU time for all checks that can be left out
ROWS = (5, 6, 7, 9, 11)  # batch sizes: the first that is no other axis's
FEW = (2, 3, 4, 5)  # the same, where there are many elements
# Errors up to the first are correct, and from the second on a bug. Iterative inverses (fixed
# points, bisection, ODEs) stop at about 1e-5; mistakes are a thousand times larger.
TOLERANCE, BUG = 3e-4, 1e-3
TOLERANCE_32, BUG_32 = 2e-3, 2e-2  # the same in float32
SAME = 1e-7  # largest difference between two calls on one input


@dataclass
class Measurement:
    """Errors of one pass in both directions; NaN where there is nothing to compare.

    `log_det` is the error against the Jacobian; `back_sum` and `back_same` are the sum and the
    difference of both directions' log-determinants; `kind` is that of `log_det_of`.
    """

    round_trip: float = math.nan
    inverse_error: AuditError | None = None
    log_det: float = math.nan
    stated: Tensor | None = None
    truth: Tensor | None = None
    back_sum: float = math.nan
    back_same: float = math.nan
    volume: Volume | None = None
    kind: str = "example"

    @property
    def nan_log_det(self) -> bool:
        """Whether a log-determinant is returned that is not finite."""
        return self.stated is not None and not bool(self.stated.isfinite().all())


def log_det_error(stated: Tensor, truth: Tensor) -> float:
    """The error of a log-determinant in nats; in percent where it is large."""
    off = float(((stated - truth).abs() / (1 + 0.01 * truth.abs())).max())
    return off if math.isfinite(off) else math.inf


class FlowAudit(ReportBuilder):
    """The report of one flow under construction, with the flow and the batch that it runs on."""

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any, example: Tensor, state: Any):
        super().__init__(name_of(forward))
        self.sandbox, self.state = sandbox, state
        self.flow = FlowAdapter(sandbox, forward, inverse)
        self.example = example.detach().to("cpu", sandbox.dtype)
        # a batch of a size that no other axis has, within the hull of the example
        sizes = ROWS if self.example[0].numel() <= 512 else FEW
        rows = next((n for n in sizes if n not in example.shape[1:]), sizes[0])
        self.x = self.draw_examples(rows, 1, keep=True)
        self.restore_first: Callable[[], None] = sandbox.snapshot()
        self.restore: Callable[[], None] = self.restore_first
        self.began = time.process_time()
        single = sandbox.dtype == torch.float32
        self.tolerance, self.bug_error = (TOLERANCE_32, BUG_32) if single else (TOLERANCE, BUG)
        if single:
            self.assumed.append("it computes in float32 only: tolerances are wider")
        self.noisy_log_det = False
        self.was_training = False  # it was, and is now in evaluation mode
        self.seconds_per_call = 0.0
        self.perturbation = 0.0  # scale of the random parameters; zero until there are any
        self.is_stochastic = False
        self.square = True  # z has as many numbers as x

    @property
    def slow(self) -> bool:
        """Whether a forward pass is too slow for every check."""
        return self.seconds_per_call > 0.15

    @cached_property
    def few(self) -> Tensor:
        """Fewer examples where there are many elements, if the flow takes them."""
        if self.x[0].numel() > 64:
            with suppress(AuditError):
                self.flow.forward(self.x[:2])
                return self.x[:2]
        return self.x

    def time_left(self) -> float:
        """Seconds of CPU time."""
        return SECONDS - (time.process_time() - self.began)

    def draw_examples(self, n: int, seed: int, *, keep: bool = False) -> Tensor:
        """Mixtures of pairs of examples; with `keep`, after the given examples."""
        have, generator = self.example, torch.Generator().manual_seed(seed)
        if (have == have[:1]).all():
            noise = torch.randn(n, *have.shape[1:], generator=generator).to(have)
            if not ((have > 0) & (have < 1)).all():
                return have[:1] + noise
            drawn = have[:1] * noise.sigmoid()  # data that may be in the unit interval stay there
            return torch.cat([have[:1], drawn[1:]]) if keep else drawn
        first, second = have[torch.randint(len(have), (2, n), generator=generator)]
        share = torch.rand(n, *(1,) * (have.ndim - 1), generator=generator).to(have)
        mixed = torch.lerp(first, second, 0.2 + 0.6 * share)
        return torch.cat([have, mixed])[:n] if keep else mixed

    @torch.no_grad()
    def perturb(self, std: float, seed: int = 1) -> None:
        """Move the parameters by noise, in training mode, as a training step does.

        Running means and variances, which start at zero and one, move as well.
        """
        roots = self.sandbox.modules
        modes = {m: m.training for root in roots for m in root.modules()}
        for root in roots:
            root.train()
        self.sandbox.randomize(std, seed)
        for root in roots:
            root.train(modes[root])
        generator = torch.Generator().manual_seed(seed)
        for module, mode in modes.items():
            module.training = mode
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var") and buffer.is_floating_point():
                    noise = std * torch.randn(buffer.shape, generator=generator).to(buffer)
                    buffer.add_(noise) if name == "running_mean" else buffer.mul_(noise.exp())

    def reset(self, std: float = 0.0, seed: int = 1) -> None:
        """Restore the parameters, and move them if the scale is not zero."""
        self.restore()
        if std:
            self.perturb(std, seed)

    def flat(self, x: Tensor) -> Tensor:
        """The latents (B, D): the function that `volume` takes."""
        return self.flow.forward(x).flat

    def measure(self) -> Measurement:
        """Errors of one pass of a few examples in both directions; none if z is not finite."""
        measured, image = Measurement(), self.flow.forward(self.few)
        if image.flat.isfinite().all():
            if image.raw is not None:
                measured.stated, measured.kind = log_det_of(image.raw, len(self.few))
            self._measure_log_det(measured)
            if self.flow.invertible:
                self._measure_inverse(measured, image)
        return measured

    def _measure_log_det(self, measured: Measurement) -> None:
        """The returned log-determinant against the Jacobian's."""
        x, d = self.few, self.few[0].numel()
        if not self.square or (d > DENSE and self.seconds_per_call > 0.03):
            return  # `layerwise` looks at the layers
        try:
            measured.volume = volume(self.flat, x)
        except (RuntimeError, AuditError):
            measured.volume = by_differences(self.flat, x) if d <= 64 else None
        stated = measured.stated
        if measured.volume is None or stated is None or measured.nan_log_det:
            return
        measured.truth = measured.volume.log_det
        if not measured.truth.isfinite().all():
            return

        def error(truth: Tensor) -> float:
            if measured.kind == "other":
                return float((stated - truth.sum()).abs().max())
            return log_det_error(stated, truth)

        measured.log_det = error(measured.truth)
        if measured.log_det > self.tolerance and d <= 128 and self.sandbox.dtype == torch.float64:
            with suppress(AuditError, RuntimeError):  # autograd may have been cut off somewhere
                other = by_differences(self.flat, x).log_det
                if distance(other, measured.truth) > 1e-4:
                    measured.truth, measured.volume = other, None
                    measured.log_det = 0.0 if error(other) < 1e-5 else error(other)

    def _measure_inverse(self, measured: Measurement, image: Image) -> None:
        """The inverse, called twice after forward was called with other data; and its log-det."""
        x = self.few
        with suppress(AuditError):  # so that values cached by forward do not help
            self.flow.forward(self.draw_examples(len(x), 11))
        try:
            back, raw = self.flow.inverse(image.tree, x)
            self.flow.inverse(image.tree, x)
        except AuditError as error:
            measured.inverse_error = error
            return
        measured.round_trip = self._round_trip_error(image, back, x)
        if self.seconds_per_call < 0.01 and len(x) < 40:
            with suppress(AuditError):  # it may take no other batch size
                more = self.draw_examples(40, 13)
                image = self.flow.forward(more)
                if image.flat.isfinite().all():
                    back = self.flow.inverse(image.tree, more)[0]
                    error = self._round_trip_error(image, back, more)
                    measured.round_trip = max(measured.round_trip, error)
        if raw is None or measured.stated is None or measured.nan_log_det:
            return
        inverse, _ = log_det_of(raw, len(x))
        expected = [measured.stated]
        if measured.truth is not None and measured.kind != "other":
            expected.append(measured.truth)
        nearest = min(expected, key=lambda log_det: log_det_error(-inverse, log_det))
        measured.back_sum = log_det_error(-inverse, nearest)
        measured.back_same = log_det_error(inverse, nearest)

    def _round_trip_error(self, image: Image, back: Tensor, x: Tensor) -> float:
        """The distance of x from its round trip, or 0 where rounding explains it."""
        if not back.isfinite().all():
            return math.inf
        off = distance(back, x)
        return 0.0 if off > self.tolerance and off < self._rounding_error(image, back, x) else off

    def _rounding_error(self, image: Image, back: Tensor, x: Tensor) -> float:
        """The error that a thousand roundings of z explain: a tenth of that of ten thousand."""
        step = 1e4 * torch.finfo(self.sandbox.dtype).eps
        generator = torch.Generator().manual_seed(0)

        def moved(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=generator).to(t)
            return t.detach() * (1 + step * noise) + step * noise

        with suppress(AuditError):
            near, _ = self.flow.inverse(map_tensors(moved, image.tree), x)
            if near.isfinite().all():
                return 0.1 * distance(near, back)
        return 0.0

    # -- from measured errors to findings

    def severity(self, error: float) -> Severity:
        """Small errors may be those of an approximation."""
        return "bug" if error > self.bug_error else "warning"

    def report_errors(self, measured: Measurement, when: str) -> None:
        """Add a finding for every error, and a line for everything that is right."""
        for name, error in (
            ("log-determinant against autograd", measured.log_det),
            ("round trip", measured.round_trip),
            ("log-determinants of both directions", measured.back_sum),
        ):
            if error <= self.tolerance:
                self.checked.append(f"{name}, {when}: off by {error:.1g}")
        if measured.nan_log_det:
            self.bug(
                "logdet_nan",
                f"the log-determinant is NaN or infinite {when}, where z is finite",
                "take log |det|: torch.linalg.slogdet(W)[1], and abs() before log",
            )
        if self.flow.invertible:
            self._report_inverse(measured, when)
        stated, truth = measured.stated, measured.truth
        if stated is None or truth is None:
            return
        self._report_shape(measured, stated, truth)
        if self.noisy_log_det and not math.isnan(measured.log_det):
            self._report_estimate(truth)
        elif measured.log_det > self.tolerance and "logdet_shape" not in self.findings:
            self.report_log_det("forward", self.x, stated, truth, measured.log_det, f" {when}")

    def report_log_det(
        self,
        what: str,
        x: Tensor,
        stated: Tensor,
        truth: Tensor,
        error: float,
        when: str,
        **numbers: Any,
    ) -> None:
        """Add a finding for a wrong log-determinant, with its likely mistake."""
        hint, repair = _explain(stated, truth, x)
        self.find(
            "logdet_mismatch",
            self.severity(error),
            f"{what} returns {float(stated[0]):.6g} nats, and log |det J| is "
            f"{float(truth[0]):.6g}{when}{hint}",
            repair,
            **numbers,
            stated=stated[:4].tolist(),
            log_det=truth[:4].tolist(),
            error=error,
        )

    def _report_inverse(self, measured: Measurement, when: str) -> None:
        if measured.round_trip > self.tolerance:
            repair = "the inverse is approximate, or lacks a constant of forward (an eps)"
            if measured.round_trip > self.bug_error:
                repair = "invert forward's operations in reverse order, with the same constants"
            if not self.square:
                repair = "return what is split off, and take it back: drawing it again is sampling"
            self.find(
                "inverse_mismatch",
                self.severity(measured.round_trip),
                f"inverse(forward(x)) differs from x by {measured.round_trip:.3g} {when}",
                repair,
                error=measured.round_trip,
            )
        if not measured.back_sum > self.tolerance or self.noisy_log_det:
            return
        if measured.back_same <= self.tolerance:
            self.bug(
                "inverse_logdet_sign",
                "the inverse returns the log-determinant of forward, with the same sign",
                "return the negative: log |det dx/dz| = -log |det dz/dx|",
                difference=measured.back_sum,
            )
        else:
            self.find(
                "inverse_logdet_mismatch",
                self.severity(measured.back_sum),
                f"the log-determinants of both directions add up to {measured.back_sum:.3g}, not "
                "zero",
                "return the negative of what forward returns at the same x",
                difference=measured.back_sum,
            )

    def _report_shape(self, measured: Measurement, stated: Tensor, truth: Tensor) -> None:
        kind, right = measured.kind, measured.log_det <= self.tolerance
        by_example = "sum over all axes but the first: log_det.flatten(1).sum(1)"
        if kind == "elements" and right and not self.flow.elementwise:
            self.warn(
                "logdet_shape",
                "the log-determinant has several numbers for each example; their sum is right",
                by_example,
            )
        if kind not in ("number", "other"):
            return
        scale = 1 + 0.01 * float(truth.abs().max())
        one, total, mean = float(stated[0]), float(truth.sum()), float(truth.mean())
        if kind == "number" and float((truth - one).abs().max()) <= self.bug_error * scale:
            if right:
                self.warn(
                    "logdet_shape",
                    "the log-determinant is one number for the whole batch; it is right for each "
                    "example",
                    "expand it to one number per example: log_det.expand(len(x))",
                )
            return
        for reduction, value in {"sum": total, "mean": mean}.items():
            if len(truth) > 1 and abs(one - value) <= 1e-4 * (1 + abs(value)):
                self.bug(
                    "logdet_shape",
                    f"the log-determinant is one number: the {reduction} over the batch",
                    by_example,
                    stated=one,
                    per_example=truth.tolist(),
                )
                return
        if kind == "other":
            self.bug(
                "logdet_shape",
                "the log-determinant has a shape that does not fit the batch",
                "return one number per example, shape (B,)",
            )

    def _report_estimate(self, truth: Tensor) -> None:
        """A log-determinant that is estimated from draws: whether it is right on average."""
        images = [self.flow.forward(self.few) for _ in range(200)]
        draws = torch.stack([log_det_of(image.raw, len(self.few))[0] for image in images])
        mean, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
        spread = float(draws.std(0).mean())
        if spread > 1e-3:
            self.warn(
                "stochastic",
                f"the log-determinant is an estimate with a standard deviation of {spread:.2g} "
                "nats",
                "average several draws when likelihoods are reported",
                std=spread,
            )
        else:
            self.checked.append(f"the log-determinant is an estimate, to {spread:.1g} nats")
        if ((mean - truth).abs() > 8 * error + 0.05 * (1 + truth.abs())).any():
            self.bug(
                "logdet_mismatch",
                f"the estimate is {float(mean[0]):.4g} nats on average, and log |det J| is "
                f"{float(truth[0]):.4g}",
                "the estimator is biased: use more terms, or an unbiased number of them",
                stated=mean[:4].tolist(),
                log_det=truth[:4].tolist(),
            )


def _explain(stated: Tensor, truth: Tensor, x: Tensor) -> tuple[str, str]:
    """The likely mistake in a wrong log-determinant, and its repair."""

    def near(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= 1e-5 * (1 + float(b.abs().max()))

    if near(stated, -truth):
        return ": it has the wrong sign", "negate it"
    if len(truth) > 1 and near(stated, truth.sum().expand_as(truth)):
        return ": it is summed over the batch", "sum over all axes but the first"
    if near(stated, torch.zeros_like(stated)):
        return ": it is always zero", "add the logarithms of the slopes of what forward does"
    factors = {"the number of elements": x[0].numel(), "two": 2}
    if x.ndim > 2:
        image = {"the number of pixels": x[0, 0].numel(), "the number of channels": x.shape[1]}
        factors = image | {f"a side of {side}": side for side in x.shape[2:]} | factors
    for what, factor in factors.items():
        if near(stated * factor, truth):
            return f": a factor of {factor:g} ({what}) is missing", f"multiply it by {factor:g}"
        if near(stated, truth * factor):
            return f": a factor of {factor:g} ({what}) is too much", f"divide it by {factor:g}"
    return "", "sum the logarithms of the absolute slopes of this forward over all elements"
