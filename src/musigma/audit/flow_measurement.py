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
from torch.utils._pytree import tree_map_only

from musigma.audit.bijection import FlowAdapter, Image, log_det_of
from musigma.audit.findings import AuditError, ReportBuilder, distance, name_of
from musigma.audit.jacobian import DENSE, Volume, by_differences, volume
from musigma.audit.sandbox import Sandbox

__all__ = ["EXACT", "LIMITS_32", "FlowAudit", "Measurement", "log_det_error"]

SECONDS = 8.0  # of CPU time for all checks that can be left out
ROWS = (5, 6, 7, 9, 11)  # batch sizes: the first that is no other axis's
FEW = (2, 3, 4, 5)  # the same, where there are many elements
EXACT = 1e-8  # the largest error of a formula's inverse in float64
# The error of a log-determinant from which on there is a finding, and from which on it is a bug.
LIMITS, LIMITS_32 = (3e-4, 1e-3), (2e-3, 2e-2)
# Why right code is not exact.
ITERATES = "it iterates"
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
    iterates: bool = False
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
        self.tolerance, self.bug_error = LIMITS
        if sandbox.dtype == torch.float32:
            self.tolerance, self.bug_error = LIMITS_32
            self.assumed.append("it computes in float32 only: tolerances are wider")
        self.noisy_log_det = False
        self.was_training = False  # it was, and is now in evaluation mode
        self.seconds_per_call = 0.0
        self.perturbation = 0.0  # scale of the random parameters; zero until there are any
        self.square = True  # z has as many numbers as x
        self.compared = False  # the log-determinant, with the Jacobian's
        self.why_not = ""  # why it was not compared

    def when(self, std: float) -> str:
        """The parameters, in the words of a message."""
        return f"with random parameters (moved by {std:g})" if std else "with its own parameters"

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

    def reset(self, std: float = 0.0, seed: int = 1) -> None:
        """Restore the parameters, and `perturb` them."""
        self.restore()
        self.perturb(std, seed)

    @torch.no_grad()
    def perturb(self, std: float, seed: int = 1) -> None:
        """Move the parameters by noise, in training mode, as a training step does.

        Running means and variances, which start at zero and one, move as well. Parameters of
        modules with backward hooks, which may keep them in their range, do not.
        """
        if not std:
            return
        modes = {module: module.training for module in self.sandbox.layers()}
        hooked = [m for m in modes if m._backward_hooks]  # pyright: ignore[reportPrivateUsage]
        kept = [(p, p.clone()) for m in hooked for p in m.parameters(recurse=False)]
        for root in self.sandbox.modules:
            root.train()
        self.sandbox.randomize(std, seed)
        for p, value in kept:
            p.copy_(value)
        for root in self.sandbox.modules:
            root.train(modes[root])
        generator = torch.Generator().manual_seed(seed)
        for module, mode in modes.items():
            module.training = mode
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var") and buffer.is_floating_point():
                    noise = std * torch.randn(buffer.shape, generator=generator).to(buffer)
                    buffer.add_(noise) if name == "running_mean" else buffer.mul_(noise.exp())

    # -- one pass

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
        x, d, stated = self.few, self.few[0].numel(), measured.stated
        if not self.square or (d > DENSE and self.seconds_per_call > 0.03):
            return  # `flow_layers` looks at the layers
        try:
            known = volume(self.flow.latents, x)
        except (RuntimeError, AuditError):
            known = by_differences(self.flow.latents, x) if d <= 64 else None
        measured.volume = known
        if known is None or stated is None or measured.nan_log_det:
            return
        measured.truth = known.log_det
        if not known.log_det.isfinite().all():
            self.why_not = "J is singular or not finite at the example"
            return

        def error(truth: Tensor) -> float:
            other = measured.kind == "other"
            return distance(stated, truth.sum()) if other else log_det_error(stated, truth)

        measured.log_det = error(known.log_det)
        if measured.log_det <= self.tolerance:
            return
        if d <= 128 and self.sandbox.dtype == torch.float64:
            with suppress(AuditError, RuntimeError):  # autograd may have been cut off somewhere
                other = by_differences(self.flow.latents, x).log_det
                if distance(other, known.log_det) > 1e-4:
                    measured.truth, measured.volume = other, None
                    measured.log_det = 0.0 if error(other) < 1e-5 else error(other)
        measured.iterates = self._operations(self.flow.latents, x).most_uses >= 8

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
        if self.seconds_per_call < 0.01:
            with suppress(AuditError):  # it may take no other batch size
                x = self.draw_examples(40, 13)
                image = self.flow.forward(x)
                if image.flat.isfinite().all():
                    back, _ = self.flow.inverse(image.tree, x)
                    self._measure_round_trip(measured, image, back, x)
        if raw is None or measured.stated is None or measured.nan_log_det:
            return
        inverse, _ = log_det_of(raw, len(self.few))
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
            near, _ = self.flow.inverse(tree_map_only(Tensor, moved, image.tree), x)
            if near.isfinite().all():
                return 0.1 * distance(near, back)
        return 0.0

    def _explain(self, image: Image, error: float, x: Tensor) -> str:
        """Why an inverse that is right may have an error; "" if nothing explains it."""
        ahead = self._operations(self.flow.forward, x)
        behind = self._operations(self.flow.inverse, image.tree, x)
        if self.sandbox.dtype == torch.float32 or ahead.single or behind.single:
            return SINGLE
        fewer, more = sorted((ahead, behind), key=lambda operations: operations.count)
        converges = more.reads > fewer.reads and more.most_uses > fewer.most_uses
        if converges or more.most_uses >= 8 or more.count > 4 * fewer.count + 20:
            return ITERATES
        restore, errors = self.sandbox.snapshot(), []
        with suppress(AuditError):
            for _ in range(2):
                errors.append(self.flow.round_trip(x) - x)
                self._round_constants()
        restore()
        return ROUNDED if len(errors) == 2 and error < 10 * distance(*errors) else ""

    def _operations(self, call: Callable[..., Any], *args: Any) -> _Operations:
        with _Operations(self.sandbox.trainable()) as operations, suppress(AuditError):
            call(*args)
        return operations

    @torch.no_grad()
    def _round_constants(self) -> None:
        """Move every stored tensor as rounding to float32 does."""
        layers, generator = self.sandbox.layers(), torch.Generator().manual_seed(0)
        tensors = [t for m in layers for t in (*m.buffers(False), *m.parameters(False))]
        tensors += [t for owner in (*layers, *self.sandbox.holders) for t in vars(owner).values()]
        for t in tensors:
            if isinstance(t, Tensor) and t.is_floating_point() and t.is_leaf:
                eps = torch.finfo(torch.float32).eps
                t.mul_(1 + eps * torch.randn(t.shape, generator=generator).to(t))


class _Operations(TorchDispatchMode):
    """Counts the operations of a call: all, those that read a number, those of each parameter.

    `single` is whether any of them has 32 bits or less.
    """

    def __init__(self, parameters: list[Tensor]):
        super().__init__()
        self.count, self.reads, self.single = 0, 0, False
        self.uses = Counter[int]()
        self.ids = {id(p) for p in parameters}

    @property
    def most_uses(self) -> int:
        """How many operations use the parameter that is used most."""
        return max(self.uses.values(), default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        self.uses.update(id(a) for a in args if id(a) in self.ids)
        short = (torch.float32, torch.float16, torch.bfloat16)
        self.single |= any(isinstance(t, Tensor) and t.dtype in short for t in (*args, out))
        return out
