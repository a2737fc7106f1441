"""The state of one flow audit: the flow, a batch, and measurements of both directions."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError, ReportBuilder, distance, name_of
from musigma.audit.flow_adapter import FlowAdapter, Image, log_det_of, map_tensors
from musigma.audit.sandbox import Sandbox
from musigma.audit.volume import DENSE, Volume, differences, volume

__all__ = ["Float32Only", "FlowAudit", "Measurement", "move_statistics"]

SECONDS = 8.0  # of CPU time for all checks that can be left out
ROWS = (5, 6, 7, 9, 11)  # batch sizes: the first that is no other axis's
FEW = (2, 3, 4, 5)  # the same, where there are many elements
# Errors up to the first are correct, and from the second on a bug. Iterative inverses (fixed
# points, bisection, ODEs) stop at about 1e-5; mistakes are a thousand times larger.
TOLERANCE, BUG = 3e-4, 1e-3
TOLERANCE_32, BUG_32 = 2e-3, 2e-2  # the same in float32
SAME = 1e-7  # largest difference between two calls on one input


class Float32Only(Exception):
    """The flow works in float32 only."""


@dataclass
class Measurement:
    """Errors of one pass in both directions; NaN where there is nothing to compare.

    `log_det` is the error against the Jacobian; `back_sum` and `back_same` are the sum and the
    difference of both directions' log-determinants; `kind` is that of `log_det_of`.
    """

    finite: bool = True
    nan_log_det: bool = False
    round_trip: float = math.nan
    inverse_error: AuditError | None = None
    log_det: float = math.nan
    stated: Tensor | None = None
    truth: Tensor | None = None
    back_sum: float = math.nan
    back_same: float = math.nan
    volume: Volume | None = None
    kind: str = "example"


class FlowAudit(ReportBuilder):
    """The report of one flow while it is built, with the flow and the batch that it is run on."""

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any, example: Tensor, state: Any):
        super().__init__(name_of(forward))
        self.sandbox, self.state = sandbox, state
        self.flow = FlowAdapter(sandbox, forward, inverse)
        self.example = example.detach().to("cpu", sandbox.dtype)
        self.x = self.example
        self.restore_first: Callable[[], None] = sandbox.snapshot()
        self.restore: Callable[[], None] = self.restore_first
        self.began = time.process_time()
        single = sandbox.dtype == torch.float32
        self.tolerance, self.bug_error = (TOLERANCE_32, BUG_32) if single else (TOLERANCE, BUG)
        if single:
            self.assumed.append("it computes in float32 only: tolerances are wider")
        self.noisy_log_det = False
        self.was_training = False  # handed in so, and put into evaluation mode
        self.seconds_per_call = 0.0
        self.perturbation = 0.0  # scale of the random parameters; zero until there are any
        self.is_stochastic = False
        self.square = True  # z has as many numbers as x

    @property
    def slow(self) -> bool:
        """Whether a forward pass is too slow for every check."""
        return self.seconds_per_call > 0.15

    def time_left(self) -> float:
        """Seconds of CPU time."""
        return SECONDS - (time.process_time() - self.began)

    def rows(self) -> Tensor:
        """A batch of a size that no other axis has, within the hull of the example."""
        sizes = ROWS if self.example[0].numel() <= 512 else FEW
        wanted = next((n for n in sizes if n not in self.example.shape[1:]), sizes[0])
        return self.draw_examples(wanted, 1, keep=True)

    def draw_examples(self, n: int, seed: int, *, keep: bool = False) -> Tensor:
        """Mixtures of pairs of examples; with `keep`, after the given examples."""
        have, generator = self.example, torch.Generator().manual_seed(seed)
        if len(have) == 1 or bool((have == have[:1]).all()):
            noise = torch.randn(n, *have.shape[1:], generator=generator).to(have)
            if not bool((have > 0).all() and (have < 1).all()):
                return have[:1] + noise
            drawn = have[:1] * noise.sigmoid()  # data that may be in the unit interval stay there
            return torch.cat([have[:1], drawn[1:]]) if keep else drawn
        if keep and len(have) >= n:
            return have[:n].clone()
        pick = torch.randint(len(have), (2, n), generator=generator)
        share = torch.rand(n, *(1,) * (have.ndim - 1), generator=generator).to(have)
        mixed = torch.lerp(have[pick[0]], have[pick[1]], 0.2 + 0.6 * share)
        return torch.cat([have, mixed])[:n] if keep else mixed

    def few(self, x: Tensor) -> Tensor:
        """Fewer examples where there are many elements."""
        n = len(x) if x[0].numel() <= 64 else 2
        if n < len(x) and not any(note.startswith("only batches of") for note in self.assumed):
            try:
                self.flow.forward(x[:n].clone())
            except AuditError:
                return x
            return x[:n]
        return x

    def perturb(self, std: float, seed: int = 1) -> None:
        """Move the parameters by noise, in training mode, as a training step does."""
        modes = [(m, m.training) for root in self.sandbox.modules for m in root.modules()]
        for root in self.sandbox.modules:
            root.train()
        self.sandbox.randomise(std, seed)
        for module, mode in modes:
            module.train(mode) if module in self.sandbox.modules else None
        for module, mode in modes:
            module.training = mode
        move_statistics(self.sandbox.modules, std, seed)

    def flat(self, x: Tensor) -> Tensor:
        """The latents (B, D): the function that `volume` takes."""
        return self.flow.forward(x).flat

    def measure(self, x: Tensor) -> Measurement:
        """Errors of one pass in both directions."""
        measured = Measurement()
        image = self.flow.forward(x.clone())
        measured.finite = bool(image.flat.isfinite().all())
        if not measured.finite:
            return measured
        self._measure_log_det(measured, image, x)
        if self.flow.invertible:
            self._measure_inverse(measured, image, x)
        return measured

    def _measure_log_det(self, measured: Measurement, image: Image, x: Tensor) -> None:
        """The stated log-determinant against the Jacobian's."""
        if image.raw is not None:
            measured.stated, measured.kind = log_det_of(image.raw, len(x))
            measured.nan_log_det = not bool(measured.stated.isfinite().all())
        if not self.square or (x[0].numel() > DENSE and self.seconds_per_call > 0.03):
            return  # `layerwise` looks at the layers
        try:
            measured.volume = volume(self.flat, x)
        except (RuntimeError, AuditError):
            if x[0].numel() <= 64:
                whole = differences(self.flat, x)
                sign, log_det = torch.linalg.slogdet(whole)
                measured.volume = Volume(log_det, sign, torch.full_like(sign, torch.nan))
        if measured.volume is None or measured.stated is None or measured.nan_log_det:
            return
        measured.truth = measured.volume.log_det
        if not measured.truth.isfinite().all():
            return
        measured.log_det = self._log_det_error(measured)
        if (
            measured.log_det > self.tolerance
            and x[0].numel() <= 128
            and self.sandbox.dtype == torch.float64
        ):
            with suppress(AuditError, RuntimeError):  # autograd may have been cut off somewhere
                by_differences = torch.linalg.slogdet(differences(self.flat, x))[1]
                if distance(by_differences, measured.truth) > 1e-4:
                    measured.truth = by_differences
                    measured.volume = None
                    off = self._log_det_error(measured)
                    measured.log_det = 0.0 if off < 1e-5 else off

    def _log_det_error(self, measured: Measurement) -> float:
        """Error of the stated log-determinant in nats; in per cent where it is large."""
        stated, truth = measured.stated, measured.truth
        if stated is None or truth is None:
            return math.nan
        if measured.kind == "other":
            return float((stated - truth.sum()).abs().max())
        return float(((stated - truth).abs() / (1 + 0.01 * truth.abs())).max())

    def _measure_inverse(self, measured: Measurement, image: Image, x: Tensor) -> None:
        """The inverse, called twice after forward was called with other data; and its log-det."""
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
                image = self.flow.forward(more.clone())
                if image.flat.isfinite().all():
                    back = self.flow.inverse(image.tree, more)[0]
                    measured.round_trip = max(
                        measured.round_trip, self._round_trip_error(image, back, more)
                    )
        if raw is None or measured.stated is None or measured.nan_log_det:
            return
        inverse, _ = log_det_of(raw, len(x))
        size = 1 + 0.01 * measured.stated.abs()
        sums = (inverse + measured.stated).abs() / size
        same = (inverse - measured.stated).abs() / size
        if measured.truth is not None and measured.kind != "other":
            truths = (inverse + measured.truth).abs() / size
            if float(truths.max()) < float(sums.max()):
                sums, same = truths, (inverse - measured.truth).abs() / size
        measured.back_sum, measured.back_same = float(sums.max()), float(same.max())
        if not math.isfinite(measured.back_sum):
            measured.back_sum = measured.back_same = math.inf

    def _round_trip_error(self, image: Image, back: Tensor, x: Tensor) -> float:
        """The distance of x from its round trip, or 0 where rounding explains it."""
        if not back.isfinite().all():
            return math.inf
        off = distance(back, x)
        return 0.0 if off > self.tolerance and off < self._rounding_error(image, back, x) else off

    def _rounding_error(self, image: Image, back: Tensor, x: Tensor) -> float:
        """The error that rounding explains: how far changes in the last digits of z move x."""
        eps = torch.finfo(self.sandbox.dtype).eps
        generator = torch.Generator().manual_seed(0)
        step = 1e4 * eps

        def moved(t: Tensor) -> Tensor:
            noise = torch.randn(t.shape, generator=generator).to(t)
            return t.detach() * (1 + step * noise) + step * noise

        with suppress(AuditError):
            near, _ = self.flow.inverse(map_tensors(moved, image.tree), x)
            if near.isfinite().all():
                return 0.1 * distance(
                    near, back
                )  # of a thousand roundings, where z moved by ten thousand
        return 0.0


@torch.no_grad()
def move_statistics(modules: list[nn.Module], std: float, seed: int) -> None:
    """Move running means and variances, which start at zero and one."""
    generator = torch.Generator().manual_seed(seed)
    for root in modules:
        for name, buffer in root.named_buffers():
            last = name.rsplit(".", 1)[-1]
            if last in ("running_mean", "running_var") and buffer.is_floating_point():
                noise = std * torch.randn(buffer.shape, generator=generator).to(buffer)
                if last == "running_mean":
                    buffer.add_(noise)
                else:
                    buffer.mul_(noise.exp())
