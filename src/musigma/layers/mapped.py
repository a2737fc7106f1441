"""Layers that apply a `Map` to elements; they differ in the source of its parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.context import conditioned
from musigma.layers.maps import Affine, Map
from musigma.model import Bijection
from musigma.nets import MLP
from musigma.tensors import at_least_float32, concatenated, split, sum_event

__all__ = ["Autoregressive", "AutoregressiveNet", "Coupling", "Elementwise", "StreamedNet"]

ROWS_CPU, ROWS = 128, 65_536
"""Tokens of a batch that a processor computes in about the time of one: a CPU, and others."""
LEAST_WINDOW = 32
"""With fewer tokens than a sweep takes to be right to the last digit, nothing is gained."""
Apply = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""The `forward` or the `inverse` of a map."""


class MapLayer(Bijection):
    """A bijection that applies a map, with the parameters that `net` emits.

    Both directions are one function: `forward` applies the map's `forward`, and `inverse` its
    `inverse`, with the same parameters.
    """

    net: Any
    map: Map

    def __init__(self, map: Map):
        super().__init__()
        self.map = map
        self.straight_through: bool = getattr(map, "straight_through", False)
        if slow := getattr(map, "slow_inverse", ""):
            self.slow_inverse = ", ".join(filter(None, [self.slow_inverse, slow]))

    @abstractmethod
    def _apply_map(self, apply: Apply, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, where `apply` takes elements and their parameters."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y, log_det)``, by the map's `forward`."""
        return self._apply_map(self.map.forward, x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, by the map's `inverse`."""
        return self._apply_map(self.map.inverse, y, context)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if (share := getattr(self.map, "saturation", None)) is not None:
            yield self.net, share

    def extra_repr(self) -> str:
        """Names the map."""
        return "" if isinstance(self.map, nn.Module) else f"map={self.map}"


class Coupling(MapLayer):
    r"""The first half of the channels, and the context, transform the second half.

    .. math:: y_1 = x_1, \quad y_2 = f(x_2;\ h(x_1)), \quad
        \log|\det| = \sum \log \partial y_2 / \partial x_2

    where f is the map and h the network. With an `Affine` map this is the coupling of Real NVP
    (Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, arXiv:1605.08803) in
    the form (x + t) e^s of Glow (Kingma & Dhariwal, 2018, arXiv:1807.03039); with a `Spline` it is
    that of Durkan et al., "Neural Spline Flows", 2019, arXiv:1906.04032. Both directions cost one
    pass of the network.

    Args:
        net: ``net(x1)`` or ``net(x1, context)``, with x1 the first channels; emits
            ``map.outputs`` channels for each channel of x2.
        map: The map that is applied to each element of x2.
        kept: Number of channels of x1; None: ``C // 2``.

    Example:
        >>> coupling = Coupling(nn.Linear(2, 6))
        >>> x = torch.randn(4, 5)
        >>> y, log_det = coupling(x)
        >>> torch.allclose(coupling.inverse(y)[0], x, atol=1e-5)
        True
    """

    repeated = True

    def __init__(self, net: nn.Module, *, map: Map = Affine(), kept: int | None = None):
        super().__init__(map)
        self.net, self.kept = net, kept

    def sizes(self, channels: int) -> list[int]:
        """The numbers of channels of x1 and of x2."""
        kept = channels // 2 if self.kept is None else self.kept
        return [kept, channels - kept]

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = split(at_least_float32(x), self.sizes(x.shape[1]))
        return x1, x2

    def _apply_map(self, apply: Apply, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(x)
        y2, log_slope = apply(x2, conditioned(self.net, x1, context))
        return concatenated([x1, y2]), sum_event(log_slope, x.ndim - 1)

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)``, by one pass of the network."""
        x = at_least_float32(y).detach().clone().requires_grad_()
        x1, x2 = self._halves(x)
        h = conditioned(self.net, x1, context)
        with torch.no_grad():
            x2.data.copy_(self.map.inverse(x2, h)[0])  # the network has read only x1
        y2, log_slope = self.map.forward(x2, h)
        return x, concatenated([x1, y2]), sum_event(log_slope, x.ndim - 1)


class AutoregressiveNet(Protocol):
    """The protocol of the network of an `Autoregressive` layer, such as `MADE`.

    The *steps* are the elements of a vector (B, D), or the positions of a sequence (B, C, T) or,
    row by row, of an image (B, C, H, W). The outputs of step i depend only on steps 0 .. i - 1 and
    the context.

    Attributes:
        owners: The element of axis 1, 0 .. D - 1 or 0 .. C - 1, to which each output belongs.
        tokens: Number of positions; None, or no such attribute, for vectors.
    """

    owners: Sequence[int]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs (B, len(owners), ...) for x (B, D) or (B, C, ...), in one pass."""
        ...

    def unroll(
        self, fill: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> None:
        """Evaluate step by step: for i = 0, 1, ..., ``x[..., i : i + 1] = fill(i, h_i)``.

        Step i computes h_i, its outputs in the order of `owners`, from what `fill` has returned so
        far, and gives them to `fill`, which returns step i of x. For a vector h_i is (B, outputs)
        and x_i is (B, 1); for a sequence (B, len(owners), 1) and (B, C, 1). The network may cache
        results between steps: hidden units, the state of a recurrent network, the keys and values
        of a causal transformer.

        Args:
            fill: Called once for each step, in order.
            like: A tensor of x's shape, type and device; its values are not read.
            context: As in `__call__`.
        """
        ...


@runtime_checkable
class StreamedNet(Protocol):
    """An `AutoregressiveNet` of sequences that evaluates several positions at once."""

    def stream(
        self, like: Tensor, context: Tensor | None = None
    ) -> Callable[[Tensor, int], Tensor]:
        """A function ``outputs(before, start)`` that caches what it computes.

        It returns the outputs (B, len(owners), w) of the positions start .. start + w - 1. Column
        k of `before` (B, C, w) is the position start + k - 1 of x, or zeros if that is -1. Of the
        positions before those, it uses what the last call that computed them has cached.

        Args:
            like: As in `AutoregressiveNet.unroll`.
            context: As in `AutoregressiveNet.unroll`.
        """
        ...


class Autoregressive(MapLayer):
    r"""Steps 0 .. i - 1, and the context, transform step i.

    .. math:: y_i = f(x_i;\ h_i(x_0, \ldots, x_{i-1})), \quad
        \log|\det| = \sum_i \log \partial y_i / \partial x_i

    where f is the map and h the network. The steps are the elements of a vector, or the positions
    of a sequence (B, C, T) or an image (B, C, H, W). `forward` takes one pass of the network. With
    an `Affine` map and a `MADE` this is a masked autoregressive flow (Papamakarios, Pavlakou,
    Murray, "Masked Autoregressive Flow for Density Estimation", 2017, arXiv:1705.07057); with a
    `Spline` it is an autoregressive neural spline flow (Durkan et al., 2019, arXiv:1906.04032);
    with a `CausalTransformer` it is a block of TarFlow (Zhai et al., 2024, arXiv:2412.06329).

    `inverse` computes one step after another, T in all. If the network is a `StreamedNet`, no
    gradient is needed, and the map has a closed inverse, each pass of the network computes a
    window of steps from the current values of the steps before them. The first step of the window
    is then right, and so is every step that follows only steps which the pass did not change.
    These are final, and the window moves past them. At most T passes are needed. A step that a
    pass changes by 8 units in the last place or less counts as unchanged, so the result is that of
    one step after the other up to rounding.
    (Song, Meng, Liao, Ermon, "Accelerating Feedforward Computation via Parallel Nonlinear Equation
    Solving", 2021, arXiv:2002.03629.)

    Args:
        net: A module that implements `AutoregressiveNet`, built for ``map.owners(...)``.
        map: The map that is applied to each element.
        window: Number of steps that a pass of a `StreamedNet` computes while inverting; 1 for one
            step after another. None: as many as cost about as much as one, by the size of the
            batch; 1 if those are fewer than 32.

    Raises:
        ValueError: If the network's outputs are not in the order in which the map reads them, or
            the window is empty.

    Example:
        >>> from musigma.layers import MADE, Spline
        >>> spline, x = Spline(), torch.randn(4, 5)
        >>> layer = Autoregressive(MADE(spline.owners(5), hidden=[16]), map=spline)
        >>> y, log_det = layer(x)
        >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4)
        True
    """

    slow_inverse = "one step per feature"

    def __init__(self, net: nn.Module, *, map: Map, window: int | None = None):
        super().__init__(map)
        if window is not None and window < 1:
            raise ValueError(f"window: expected 1 or more; got {window}")
        self.net, self.window = net, window
        self.features = max(self.net.owners) + 1
        self.tokens: int | None = getattr(net, "tokens", None)
        if self.tokens is not None:
            self.slow_inverse = self.slow_inverse.replace("feature", "token")
        if list(self.net.owners) != (expected := map.owners(self.features)):
            raise ValueError(
                f"net: {map} reads outputs that belong to the features {expected}; this network's "
                f"belong to {list(self.net.owners)}; build it from map.owners({self.features})"
            )

    def _checked(self, x: Tensor) -> Tensor:
        fits = x.ndim == 2 if self.tokens is None else math.prod(x.shape[2:]) == self.tokens
        if x.ndim < 2 or x.shape[1] != self.features or not fits:
            kind = f"vectors (B, {self.features})"
            if self.tokens is not None:
                kind = f"(B, {self.features}, ...) with {self.tokens} positions"
            raise ValueError(f"x: this layer is for {kind}; got {tuple(x.shape)}")
        return at_least_float32(x)

    def _apply_map(self, apply: Apply, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x = self._checked(x)
        y, log_slope = apply(x, self.net(x, context))
        return y, log_slope.flatten(1).sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(x, log_det)``, one step after the other, or by windows."""
        y = self._checked(y)
        alone = torch.is_grad_enabled() or torch.compiler.is_compiling()
        alone = alone or getattr(self.map, "slow_inverse", "")  # which guesses might not converge
        windows = isinstance(self.net, StreamedNet) and not alone
        invert = self._by_windows if windows else self._step_by_step
        x, log_slope = invert(y.flatten(2) if y.ndim > 2 else y, y, context)
        return x.reshape(y.shape), log_slope.flatten(1).sum(1)

    def _window_for(self, batch: int, device: torch.device) -> int:
        if self.window is not None:
            return self.window
        window = (ROWS_CPU if device.type == "cpu" else ROWS) // batch
        return window if window >= LEAST_WINDOW else 1

    def _step_by_step(
        self, y: Tensor, like: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        steps: list[tuple[Tensor, Tensor]] = []
        ys = y.split(1, -1)

        def fill(i: int, h: Tensor) -> Tensor:
            steps.append(self.map.inverse(ys[i], h))
            return steps[-1][0]

        self.net.unroll(fill, like, context)
        x, log_slope = map(_joined, zip(*steps, strict=True))
        return x, log_slope

    def _by_windows(
        self, y: Tensor, like: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs, start = self.net.stream(like, context), 0
        window = self._window_for(len(y), y.device)
        x = F.pad(_tame(y), (1, 0))  # of the column before the first, and of all columns
        log_slope = torch.empty_like(y)
        while start < y.shape[-1]:
            here = slice(start, start + window)
            h = outputs(x[..., :-1][..., here], start)
            new, log_slope[..., here] = self.map.inverse(y[..., here], h)
            same = _unchanged(new, x[..., 1:][..., here])
            final = 1 + int(same.cumprod(0)[:-1].sum())
            x[..., 1:][..., here] = torch.cat([new[..., :final], _tame(new[..., final:])], -1)
            start += final
        return x[..., 1:], log_slope


def _joined(steps: Sequence[Tensor]) -> Tensor:
    """Steps (B, 1), or (B, C, 1), side by side; vectors batch last, as networks emit them."""
    if steps[0].ndim == 2:
        return torch.cat([*steps]).view(len(steps), len(steps[0])).t()
    return torch.cat([*steps], -1)


def _unchanged(new: Tensor, old: Tensor) -> Tensor:
    """Whether each column (B, C, w) is the same but for rounding, (w,)."""
    limit = 8 * torch.finfo(new.dtype).eps * new.abs().clamp(min=1)
    return ((new - old).abs() <= limit).flatten(0, 1).all(0)


def _tame(guess: Tensor) -> Tensor:
    """A guess in a range in which networks are finite: in attention, 0 times infinity is NaN."""
    limit = torch.finfo(guess.dtype).max ** 0.25
    return guess.nan_to_num(0.0).clamp(-limit, limit)


class Elementwise(MapLayer):
    r"""A map of each element whose parameters are learned constants, or depend on the context.

    .. math:: y_i = f(x_i;\ h_i), \quad \log|\det| = \sum_i \log \partial y_i / \partial x_i

    The parameters h start at zero, where most maps are nearly the identity. If the map of a vector
    can be fitted to data (``map.fitted(x) -> h``, as that of `MixtureGaussianCDF`), `calibrate`
    does so, once.

    Args:
        shape: The event shape, (D,) or (C, H, W), or D. Along an axis of size 1 (but the first)
            all elements share their parameters: (C, 1, 1) is one map for each channel.
        map: The map that is applied to each element.
        context: Number of features of the context. If there are any, a network of one hidden layer
            adds to h what it computes from the context, at first zero.

    Raises:
        ValueError: On a forward pass, if the data do not fit the shape.

    Example:
        >>> from musigma.layers import Spline
        >>> layer = Elementwise(3, map=Spline(bins=4))
        >>> tuple(layer.h.shape), layer(torch.randn(2, 3))[1].shape
        ((33,), torch.Size([2]))
    """

    calibrated: Tensor

    def __init__(self, shape: int | Sequence[int], *, map: Map, context: int = 0):
        super().__init__(map)
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.h = nn.Parameter(torch.zeros(map.outputs * self.shape[0], *self.shape[1:]))
        sizes: Any = {"hidden": [64], "context": context, "zero": True}
        self.net = MLP(0, tuple(self.h.shape), **sizes) if context else None
        if len(self.shape) == 1 and hasattr(map, "fitted"):
            self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Fit the map to x (B, D), if it can be; a second call changes nothing."""
        if hasattr(self, "calibrated") and not bool(self.calibrated):
            self.h.copy_(cast(Any, self.map).fitted(at_least_float32(x)))
            self.calibrated.fill_(True)

    def parameters_for(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """h for every element of x (B, *event), shape (B, outputs · C, ...).

        Raises:
            ValueError: If x does not fit the shape, or there is no context.
        """
        event, (channels, *axes) = tuple(x.shape[1:]), self.shape
        fits = len(event) == len(self.shape) and event[:1] == (channels,)
        if not fits or any(a not in (1, n) for a, n in zip(axes, event[1:], strict=True)):
            raise ValueError(f"x: expected (B, {', '.join(map(str, self.shape))}); got {event}")
        h = self.h if self.net is None else self.h + self.net(x.flatten(1)[:, :0], context)
        return h.expand(len(x), -1, *event[1:])

    def _apply_map(self, apply: Apply, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        y, log_slope = apply(at_least_float32(x), self.parameters_for(x, context))
        return y, sum_event(log_slope, x.ndim - 1)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Any], Tensor]]]:
        """This layer, and a function that returns the share of its scales at a limit."""
        if (share := getattr(self.map, "saturation", None)) is not None:
            yield self, lambda _: share(self.h[None])

    def extra_repr(self) -> str:
        """Names the shape and the map."""
        return f"{self.shape}, map={self.map}"
