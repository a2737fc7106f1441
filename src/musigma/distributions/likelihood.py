"""Likelihoods by name: the head of a decoder, p(x | z)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.distributions import Distribution

from musigma.context import conditioned
from musigma.tensors import at_least_float32

__all__ = ["LIKELIHOODS", "LikelihoodHead", "data_of", "likelihood", "register_likelihood"]

Data = Literal["levels", "unit", "real", "counts"]
B = TypeVar("B", bound=Callable[..., nn.Module])


class Entry(NamedTuple):
    """A registered likelihood."""

    build: Callable[..., nn.Module]
    data: Data


LIKELIHOODS: dict[str, Entry] = {}
"""Every registered likelihood, by name."""


def register_likelihood(name: str, *, data: Data) -> Callable[[B], B]:
    """Register a function that builds the head of a decoder, as a likelihood of this name.

    The function is called as ``build(shape, net, ...)``, with the event shape, a function that
    builds a network for a number of output channels, and those of the options `levels`,
    `components`, `std` and `dispersion` of `likelihood` that are among its parameters.

    Args:
        name: The name.
        data: The data that it scores: integer `levels`; values in [0, 1], `unit`; `real` numbers,
            which include values in [0, 1]; or `counts`, 0, 1, 2, ... without a largest one.

    Raises:
        ValueError: If the library has a likelihood of this name.

    Example:
        >>> from torch.distributions import Independent, Laplace
        >>> @register_likelihood("laplace", data="real")
        ... def laplace(shape, net):
        ...     return LikelihoodHead(net(shape[0]), lambda h: Independent(Laplace(h, 1.0), 1))
        >>> likelihood("laplace", (3,), lambda c: nn.Linear(2, c))(Tensor(5, 2)).event_shape
        torch.Size([3])
        >>> del LIKELIHOODS["laplace"]
    """

    def register(build: B) -> B:
        known = LIKELIHOODS.get(name)
        if known and known.build.__module__.startswith("musigma."):
            raise ValueError(f"name: the library has a likelihood {name!r}; choose another name")
        LIKELIHOODS[name] = Entry(build, data)
        return build

    return register


def _entry(name: str) -> Entry:
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood: expected one of {', '.join(LIKELIHOODS)}; got {name!r}")
    return LIKELIHOODS[name]


def data_of(name: str) -> Data:
    """The data that a likelihood scores, as `register_likelihood` names them.

    Raises:
        ValueError: For an unknown name.
    """
    return _entry(name).data


def likelihood(
    name: str,
    shape: Sequence[int],
    net: Callable[[int], nn.Module],
    *,
    levels: int = 256,
    components: int = 10,
    std: Literal["emitted", "channel", "pixel", "optimal"] | float = "emitted",
    dispersion: Literal["feature", "emitted"] = "feature",
) -> nn.Module:
    """The head of a decoder: p(x | z), by name.

    Args:
        name: For integer levels: `bernoulli` (levels 0 and 1), `categorical` (a probability for
            each level), `logistic`, `logistic-mixture` or `beta-binomial`. Densities of values
            scaled to [0, 1]: `continuous-bernoulli` or `gaussian`. For counts: `poisson`, `nb`
            (negative binomial) or `zinb` (the same, zero-inflated). `register_likelihood` adds
            others.
        shape: The event shape, (C, H, W) or (D,).
        net: Builds a network with a given number of output channels.
        levels: Number of levels of the data.
        components: Components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian`: `emitted` for every pixel by the network, a
            learned parameter for each `channel` or each `pixel`, `optimal` (see
            `OptimalGaussianHead`), or a number.
        dispersion: Inverse dispersion of `nb` and `zinb`: a learned parameter for each `feature`,
            or `emitted` by the network for each feature of each example.

    Raises:
        ValueError: For an unknown name, std or dispersion, or a Bernoulli for data with more than
            two levels.

    Example:
        >>> import torch
        >>> head = likelihood("logistic", (3, 4, 4), lambda c: nn.Conv2d(8, c, 1), levels=256)
        >>> head(torch.randn(2, 8, 4, 4)).log_prob(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2])
    """
    build = _entry(name).build
    options: dict[str, Any] = {
        "levels": levels,
        "components": components,
        "std": std,
        "dispersion": dispersion,
    }
    named = inspect.signature(build).parameters
    return build(shape, net, **{k: v for k, v in options.items() if k in named})


class LikelihoodHead(nn.Module):
    """A network whose output, in float32 or better, is read as a distribution of x.

    Args:
        net: ``net(given)`` or ``net(given, context)``.
        read: ``read(h, **options)`` is the distribution for the network's output h. Optionally,
            ``read.saturation(h)`` is the share of its scales that are at a limit.
        **options: Keyword arguments of `read`.
    """

    def __init__(self, net: nn.Module, read: Callable[..., Distribution], **options: Any):
        super().__init__()
        self.net, self.read, self.options = net, read, options

    def forward(self, given: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x | given)."""
        return self.read(at_least_float32(conditioned(self.net, given, context)), **self.options)

    def emitters(self) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """The network, and a function from its output to the share of scales at a limit."""
        if (share := getattr(self.read, "saturation", None)) is not None:
            yield self.net, share

    def extra_repr(self) -> str:
        """Names how the output is read."""
        options = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([getattr(self.read, "__qualname__", str(self.read)), *options])
