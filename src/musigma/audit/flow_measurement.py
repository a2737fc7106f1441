"""What a flow audit measures: errors of both directions, at a batch and under given parameters."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from musigma.audit.bijection import FlowAdapter, Image, log_det_of, map_tensors
from musigma.audit.findings import AuditError, ReportBuilder, distance, name_of
from musigma.audit.sandbox import Sandbox
from musigma.audit.volume import DENSE, Volume, by_differences, volume

__all__ = [
    "BUG", "BUG_32", "EXACT", "ITERATES", "ROUNDED", "SAME", "SINGLE", "TOLERANCE",
    "TOLERANCE_32", "FlowAudit", "Measurement", "log_det_error",
]  # fmt: skip

SECONDS = 8.0  # of CPU time for all checks that can be left out
ROWS = (5, 6, 7, 9, 11)  # batch sizes: the first that is no other axis's
FEW = (2, 3, 4, 5)  # the same, where there are many elements
# Errors up to the first are correct, and from the second on a bug. Iterative inverses (fixed
# points, bisection, ODEs) stop at about 1e-5; mistakes are a thousand times larger.
TOLERANCE, BUG = 3e-4, 1e-3
TOLERANCE_32, BUG_32 = 2e-3, 2e-2  # the same in float32
EXACT = 1e-8  # the largest error of an inverse that computes a formula in float64
SAME = 1e-7  # largest difference between two calls on one input
# Why the inverse of right code is not exact.
ITERATES = "the inverse iterates"
SINGLE = "it computes in single precision"
ROUNDED = "stored constants are rounded to single precision"


@dataclass
class Measurement:
    """Errors of one pass in both directions; NaN where there is nothing to compare.

    `round_trip` is zero where rounding explains it; `why` is what else explains that it is not
    zero, or "". `log_det` is the error against the Jacobian; `back_sum` and `back_same` are the
    sum and the difference of both directions' log-determinants; `kind` is that of `log_det_of`.
    """

    round_trip: float = math.nan
    why: str = ""
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
        self.square = True  # z has as many numbers as x
        self.compared = False  # the log-determinant, with the Jacobian's
        self.why_not = ""  # why it was not compared

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
        modes = {m: m.training for m in self.sandbox.layers()}
        for module in self.sandbox.modules:
            module.train()
        self.sandbox.randomize(std, seed)
        for module in self.sandbox.modules:
            module.train(modes[module])
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
            return  # `flow_layers` looks at the layers
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
        self._measure_round_trip(measured, image, back, x)
        if self.seconds_per_call < 0.01 and len(x) < 40:
            with suppress(AuditError):  # it may take no other batch size
                more = self.draw_examples(40, 13)
                many = self.flow.forward(more)
                if many.flat.isfinite().all():
                    back_again, _ = self.flow.inverse(many.tree, more)
                    self._measure_round_trip(measured, many, back_again, more)
        if raw is None or measured.stated is None or measured.nan_log_det:
            return
        inverse, _ = log_det_of(raw, len(x))
        expected = [measured.stated]
        if measured.truth is not None and measured.kind != "other":
            expected.append(measured.truth)
        nearest = min(expected, key=lambda log_det: log_det_error(-inverse, log_det))
        measured.back_sum = log_det_error(-inverse, nearest)
        measured.back_same = log_det_error(inverse, nearest)

    def _measure_round_trip(
        self, measured: Measurement, image: Image, back: Tensor, x: Tensor
    ) -> None:
        """The distance of x from its round trip, if it is the largest, and what explains it."""
        off = distance(back, x) if back.isfinite().all() else math.inf
        if EXACT < off < self._rounding_error(image, back, x):
            off = 0.0
        if not off <= measured.round_trip:  # which may be NaN
            measured.round_trip = off
            measured.why = self._explain(image, off, x) if EXACT < off < 1 else ""

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

    def _explain(self, image: Image, error: float, x: Tensor) -> str:
        """Why an inverse that is right may have an error; "" if nothing explains it."""
        ahead, behind = (_Operations(self.sandbox.trainable()) for _ in range(2))
        with suppress(AuditError):
            with ahead:
                self.flow.forward(x)
            with behind:
                self.flow.inverse(image.tree, x)
        if self.sandbox.dtype == torch.float32 or ahead.single or behind.single:
            return SINGLE
        uses = max([*ahead.uses.values(), *behind.uses.values(), 0])
        if uses >= 8 or behind.count > 4 * ahead.count + 20:
            return ITERATES
        restore, explained = self.sandbox.snapshot(), 0.0
        with suppress(AuditError):
            errors = []
            for _ in range(2):
                errors.append(self.flow.inverse(self.flow.forward(x).tree, x)[0] - x)
                self._round_constants()
            explained = 10 * distance(*errors)
        restore()
        return ROUNDED if error < explained else ""

    @torch.no_grad()
    def _round_constants(self) -> None:
        """Move every stored tensor but the parameters as rounding to float32 does."""
        generator = torch.Generator().manual_seed(0)
        tensors = [b for m in self.sandbox.layers() for b in m.buffers(recurse=False)]
        owners = [*self.sandbox.layers(), *self.sandbox.holders]
        tensors += [t for owner in owners for t in vars(owner).values() if isinstance(t, Tensor)]
        for t in tensors:
            if t.is_floating_point() and not t.requires_grad:
                eps = torch.finfo(torch.float32).eps
                t.mul_(1 + eps * torch.randn(t.shape, generator=generator).to(t))


class _Operations(TorchDispatchMode):
    """Counts operations, how many use each parameter, and whether any has less than 64 bits."""

    def __init__(self, parameters: list[Tensor]):
        super().__init__()
        self.count, self.single = 0, False
        self.uses = Counter[int]()
        self.ids = {id(p) for p in parameters}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.uses.update(id(a) for a in args if id(a) in self.ids)
        tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
        self.single |= any(t.dtype in (torch.float32, torch.float16) for t in tensors)
        return out
