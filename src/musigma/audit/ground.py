"""What the checks of one flow stand on: its callables, a batch, and looks at what they return."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from musigma.audit.findings import AuditError, Notes, name_of
from musigma.audit.maps import Image, Map, log_det_of
from musigma.audit.probes import Guest
from musigma.audit.volume import DENSE, Volume, differences, volume

__all__ = ["Ground", "Look", "OtherType", "apart", "detached", "move_statistics"]

SECONDS = 8.0  # of CPU that the checks may take together, beyond those that cannot be left out
ROWS = (5, 6, 7, 9, 11)  # in a batch: the first that no axis has
FEW = (2, 3, 4, 5)  # the same, where there are many elements
# Errors up to which all is well, and from which it is a bug. What iterates (an inverse by fixed
# point or bisection, an ODE) stops at 1e-5 or so and is none; mistakes are a thousand times that.
FINE, WRONG = 3e-4, 1e-3
SAME = 1e-7  # of two calls on one input
COARSE, BAD = 2e-3, 2e-2  # the same in float32


class OtherType(Exception):
    """What is looked at works in float32 alone."""


class Look:
    """What one pass shows: errors as numbers, nan where there is nothing to compare."""

    def __init__(self):
        self.finite = True
        self.nan_log_det = False
        self.round_trip = math.nan
        self.inverse_error: AuditError | None = None
        self.log_det = math.nan  # error against the volume
        self.stated: Tensor | None = None
        self.truth: Tensor | None = None
        self.back_sum = math.nan  # |inverse log_det + log_det|
        self.back_same = math.nan  # |inverse log_det - log_det|
        self.volume: Volume | None = None
        self.kind = "example"


class Ground(Notes):
    """What the checks of one flow stand on: its callables, its batch, and what was found."""

    def __init__(self, guest: Guest, forward: Any, inverse: Any, example: Tensor, state: Any):
        super().__init__(name_of(forward))
        self.guest, self.state = guest, state
        self.map = Map(guest, forward, inverse)
        self.example = example.detach().to("cpu", guest.dtype)
        self.x = self.example  # the batch that is looked at
        self.before_first: Callable[[], None] = guest.snapshot()
        self.before_inverse: Callable[[], None] = self.before_first
        self.began = time.process_time()
        single = guest.dtype == torch.float32
        self.fine, self.wrong = (COARSE, BAD) if single else (FINE, WRONG)
        if single:
            self.assumed.append("it computes in float32 alone: tolerances are wider")
        self.noisy_log_det = False
        self.turned = False  # from training mode to that of evaluation
        self.each = 0.0  # seconds of a forward pass
        self.scale = 0.0  # of the random parameters; zero while there are none
        self.draws = False
        self.square = True  # as many numbers come out as go in

    @property
    def slow(self) -> bool:
        """Whether a forward pass takes so long that not every one can be afforded."""
        return self.each > 0.15

    def time_left(self) -> float:
        """Seconds of CPU."""
        return SECONDS - (time.process_time() - self.began)

    def rows(self) -> Tensor:
        """A batch of a size that no other axis has, within the hull of the example."""
        sizes = ROWS if self.example[0].numel() <= 512 else FEW
        wanted = next((n for n in sizes if n not in self.example.shape[1:]), sizes[0])
        return self.drawn(wanted, 1, keep=True)

    def drawn(self, n: int, seed: int, *, keep: bool = False) -> Tensor:
        """Examples: given ones as far as they go, and mixtures of pairs of them."""
        have, generator = self.example, torch.Generator().manual_seed(seed)
        if len(have) == 1 or bool((have == have[:1]).all()):
            noise = torch.randn(n, *have.shape[1:], generator=generator).to(have)
            inside = bool((have > 0).all() and (have < 1).all())
            if inside:  # perhaps of the unit interval
                return (
                    have[:1] * noise.sigmoid()
                    if not keep
                    else torch.cat([have[:1], have[:1] * noise.sigmoid()[1:]])
                )
            return have[:1] + noise
        if keep and len(have) >= n:
            return have[:n].clone()
        pick = torch.randint(len(have), (2, n), generator=generator)
        share = torch.rand(n, *(1,) * (have.ndim - 1), generator=generator).to(have)
        mixed = torch.lerp(have[pick[0]], have[pick[1]], 0.2 + 0.6 * share)
        return torch.cat([have, mixed])[:n] if keep else mixed

    def some(self, x: Tensor) -> Tensor:
        """Fewer examples where there are many elements."""
        n = len(x) if x[0].numel() <= 64 else 2
        if n < len(x) and not any("alone are taken" in note for note in self.assumed):
            try:
                self.map.forward(x[:n].clone())
            except AuditError:
                return x
            return x[:n]
        return x

    def step(self, std: float, seed: int = 1) -> None:
        """Move the parameters as a training step does: in training mode, and then back."""
        modes = [(m, m.training) for root in self.guest.modules for m in root.modules()]
        for root in self.guest.modules:
            root.train()
        self.guest.randomise(std, seed)
        for module, mode in modes:
            module.train(mode) if module in self.guest.modules else None
        for module, mode in modes:
            module.training = mode
        move_statistics(self.guest.modules, std, seed)

    def function(self) -> Callable[[Tensor], Tensor]:
        """The flow as `volume` takes it."""
        return lambda x: self.map.forward(x).flat

    def look(self, x: Tensor) -> Look:
        """One pass in both directions, with all errors as numbers."""
        look = Look()
        image = self.map.forward(x.clone())
        look.finite = bool(image.flat.isfinite().all())
        if not look.finite:
            return look
        self.look_at_volume(look, image, x)
        if self.map.invertible:
            self.look_back(look, image, x)
        return look

    def look_at_volume(self, look: Look, image: Image, x: Tensor) -> None:
        """The log-determinant that is stated, against the Jacobian's."""
        if image.raw is not None:
            look.stated, look.kind = log_det_of(image.raw, len(x))
            look.nan_log_det = not bool(look.stated.isfinite().all())
        if not self.square or (x[0].numel() > DENSE and self.each > 0.03):
            return  # `_layers` will look at the parts
        try:
            look.volume = volume(self.function(), x)
        except (RuntimeError, AuditError):
            if x[0].numel() <= 64:
                whole = differences(self.function(), x)
                sign, log_det = torch.linalg.slogdet(whole)
                look.volume = Volume(
                    log_det, sign, torch.full_like(sign, torch.nan), "differences"
                )
        if look.volume is None or look.stated is None or look.nan_log_det:
            return
        look.truth = look.volume.log_det
        if not look.truth.isfinite().all():
            return
        look.log_det = self.off(look)
        if look.log_det > self.fine and x[0].numel() <= 128 and self.guest.dtype == torch.float64:
            with suppress(AuditError, RuntimeError):  # autograd may have been cut off somewhere
                look_again = torch.linalg.slogdet(differences(self.function(), x))[1]
                if apart(look_again, look.truth) > 1e-4:
                    look.truth = look_again
                    look.volume = None
                    off = self.off(look)
                    look.log_det = 0.0 if off < 1e-5 else off

    def off(self, look: Look) -> float:
        """By how much the stated log-determinant is wrong, in nats; large ones in per cent."""
        stated, truth = look.stated, look.truth
        if stated is None or truth is None:
            return math.nan
        if look.kind == "other":
            return float((stated - truth.sum()).abs().max())
        return float(((stated - truth).abs() / (1 + 0.01 * truth.abs())).max())

    def look_back(self, look: Look, image: Image, x: Tensor) -> None:
        """The inverse, twice, after forward was called with other data; and its log-det."""
        with suppress(AuditError):  # so that nothing which forward leaves behind can help
            self.map.forward(self.drawn(len(x), 11))
        try:
            back, raw = self.map.inverse(image.tree, x)
            self.map.inverse(image.tree, x)
        except AuditError as error:
            look.inverse_error = error
            return
        look.round_trip = self.returned(image, back, x)
        if self.each < 0.01 and len(x) < 40:
            with suppress(AuditError):  # it may take no other batch size
                more = self.drawn(40, 13)
                image = self.map.forward(more.clone())
                if image.flat.isfinite().all():
                    back = self.map.inverse(image.tree, more)[0]
                    look.round_trip = max(look.round_trip, self.returned(image, back, more))
        if raw is None or look.stated is None or look.nan_log_det:
            return
        own, _ = log_det_of(raw, len(x))
        size = 1 + 0.01 * look.stated.abs()
        sums, same = (own + look.stated).abs() / size, (own - look.stated).abs() / size
        if look.truth is not None and look.kind != "other":
            truths = (own + look.truth).abs() / size
            if float(truths.max()) < float(sums.max()):
                sums, same = truths, (own - look.truth).abs() / size
        look.back_sum, look.back_same = float(sums.max()), float(same.max())
        if not math.isfinite(look.back_sum):
            look.back_sum = look.back_same = math.inf

    def returned(self, image: Image, back: Tensor, x: Tensor) -> float:
        """How far x is from what came back, or 0 where rounding explains it."""
        if not back.isfinite().all():
            return math.inf
        off = apart(back, x)
        return 0.0 if off > self.fine and off < self.excused(image, back, x) else off

    def excused(self, image: Image, back: Tensor, x: Tensor) -> float:
        """The error that rounding explains: what a change in the last digits makes of x."""
        eps = torch.finfo(self.guest.dtype).eps
        generator = torch.Generator().manual_seed(0)
        step = 1e4 * eps

        def moved(tree: Any) -> Any:
            if isinstance(tree, Tensor):
                noise = torch.randn(tree.shape, generator=generator).to(tree)
                return tree.detach() * (1 + step * noise) + step * noise
            if isinstance(tree, (tuple, list)):
                return type(tree)(moved(part) for part in tree)
            return {k: moved(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

        with suppress(AuditError):
            near, _ = self.map.inverse(moved(image.tree), x)
            if near.isfinite().all():
                return 0.1 * apart(near, back)  # a thousand roundings, of the ten thousand
        return 0.0


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative where the values are above one."""
    a, b = a.detach().double(), b.detach().double()
    off = float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0
    return math.inf if math.isnan(off) else off


def detached(tree: Any) -> Any:
    """A structure of tensors, copied."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, (tuple, list)):
        return type(tree)(detached(part) for part in tree)
    return {k: detached(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@torch.no_grad()
def move_statistics(modules: list[nn.Module], std: float, seed: int) -> None:
    """Give running means and variances other values: fresh ones are zero and one."""
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
