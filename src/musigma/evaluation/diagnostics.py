"""Diagnostics of a model: scales at their limit, and ill-conditioned layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_hook

from musigma.context import Context
from musigma.distributions import FlowHead
from musigma.layer import Bijection, Layer
from musigma.model import Model

__all__ = [
    "ACTIVE",
    "COLLAPSED",
    "ILL_CONDITIONED",
    "SATURATED",
    "conditioning",
    "reported",
    "saturation",
    "slow_directions",
]

ACTIVE = 0.01
"""Nats; an element of a latent that costs less carries no information."""
COLLAPSED = 0.05
"""Nats; a latent that costs less has collapsed to its prior."""
SATURATED = 0.5
"""A larger share of scales at their limit is reported."""
ILL_CONDITIONED = 1e4
"""A larger condition number is reported: decoding loses more than four digits."""


@torch.no_grad()
def saturation(model: Model, x: Tensor, context: Context = None) -> dict[str, float | None]:
    """The share of scales at their limit, for every network that emits scales.

    The method `emitters()` of a module yields pairs of a network and a function from its output to
    the share of saturated scales, and yields nothing if no scale has a limit. The networks are
    observed during one pass of the model.

    Args:
        model: Any model.
        x: Data, shape (B, *event).
        context: One row per example, or None.

    Returns:
        For each module by name, a share from 0 to 1, or None if the module was not examined:
        because it is a layer or a head with networks but without `emitters`, or because the pass
        did not run its network.
    """
    names, heads, examined = model.site_names(), set(), set()
    shares: dict[str, float | None] = {}
    measures: dict[nn.Module, list[tuple[str, Callable[[Any], Tensor]]]] = {}
    for module, name in names.items():
        if hasattr(module, "emitters"):
            examined.update(module.modules())
            emitters = list(module.emitters())  # pyright: ignore[reportCallIssue]
            for net, share in emitters:
                key = name if len(emitters) == 1 else names[net]
                shares[key] = None
                measures.setdefault(net, []).append((key, share))

    def observe(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Distribution):
            heads.add(module)
        for key, share in measures.get(module, ()):
            shares[key] = float(share(output))

    with register_module_forward_hook(observe):
        model(x, context)
    for module in reversed(names):  # children before their parents
        if module in heads or isinstance(module, Layer):
            rest = [m for m in module.modules() if m is not module and m not in examined]
            if any(True for m in rest for _ in m.parameters(recurse=False)):
                shares[names[module]] = None
            examined.update(rest)
    return shares


@torch.no_grad()
def conditioning(model: Model) -> dict[str, float]:
    """The condition number of every layer with a method `condition_number()`."""
    return {
        name: float(module.condition_number())  # pyright: ignore[reportCallIssue]
        for module, name in model.site_names().items()
        if hasattr(module, "condition_number")
    }


def reported(model: Model) -> dict[str, float]:
    """What modules report of themselves, by a method ``figures()``, as "module.figure"."""
    return {
        f"{name}.{figure}": float(value)
        for module, name in model.site_names().items()
        if hasattr(module, "figures")
        for figure, value in module.figures().items()  # pyright: ignore[reportCallIssue]
    }


def slow_directions(model: Model) -> dict[str, list[str]]:
    """Which layers make scoring (data to latents) or sampling (latents to data) slow, and why.

    They are those that state it, by `Bijection.slow_forward` and `Bijection.slow_inverse`, or a
    prior by `slow_inverse`. The flow of a posterior is used for draws only, which take one pass.
    """
    slow: dict[str, list[str]] = {}
    inner: set[nn.Module] = set()
    for module in model.modules():
        if module in inner:
            continue
        if isinstance(module, (Bijection, FlowHead)):
            inner.update(module.modules())
        if isinstance(module, FlowHead):
            continue
        for direction, why in (
            ("scoring", getattr(module, "slow_forward", "")),
            ("sampling", getattr(module, "slow_inverse", "")),
        ):
            sentence = f"{type(module).__name__} takes {why}"
            if why and sentence not in slow.setdefault(direction, []):
                slow[direction].append(sentence)
    return slow
