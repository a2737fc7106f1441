"""Flows of any codebase as functions of tensors: x to (z, log-determinant), and back.

Codebases write a bijection in many ways: a module with `inverse` or `reverse`, a keyword that
inverts `forward`, a pair of functions, a `torch.distributions.Transform`, a list of layers; with
latents as one tensor or as one for each scale; with a log-determinant that comes second, first, or
is added to an argument. `FlowAdapter` gives them one interface.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform
from torch.utils._pytree import tree_leaves, tree_map_only

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, first_form, forward_hooks

__all__ = ["FlowAdapter", "Image", "Layer", "called_layers"]

INVERSES = ("inverse", "reverse", "backward", "invert", "inv", "inverse_transform", "_inverse")
FLAGS = ("reverse", "rev", "inverse", "invert", "inv")  # keywords that invert forward
MODES = {"direct": "inverse", "forward": "inverse", "encode": "decode"}
TOTAL = re.compile(r"log_?(abs_?)?det|ldj|ladj|objective")  # an accumulated log-determinant


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _numbers(tree: Any) -> int:
    return sum(t.numel() for t in _tensors(tree))


def flatten(tree: Any) -> Tensor:
    """All numbers of each example, of all tensors of a structure: (B, D)."""
    return torch.cat([t.reshape(len(t), -1) for t in _tensors(tree)], 1)


class Image(NamedTuple):
    """The latents and the log-determinant that a flow returned; None for no log-determinant."""

    tree: Any
    raw: Any

    @property
    def flat(self) -> Tensor:
        """The latents, (B, D)."""
        return flatten(self.tree)

    @property
    def log_det(self) -> Tensor | None:
        """The log-determinant in float64 as one number per example, (B,).

        One number holds for all examples, and several of an example are added. None: there is no
        log-determinant, or its shape, such as (B, B), does not fit the batch.
        """
        if self.raw is None:
            return None
        value, rows = torch.as_tensor(self.raw).detach().double(), len(self.flat)
        if value.numel() == 1:
            return value.reshape(1).expand(rows)
        fits = value.ndim > 0 and len(value) == rows and value.shape != (rows, rows)
        return value.reshape(rows, -1).sum(1) if fits else None


def _read(value: Any, x: Tensor, name: str, notes: list[str]) -> Image:
    """The result of a callable of x, as latents and log-determinant."""
    parts = value if isinstance(value, (tuple, list)) and value else [value]
    z, raw = parts[0], parts[-1] if len(parts) > 1 else None
    if len(parts) == 2 and _numbers(z) != x.numel() == _numbers(raw):
        notes.append(f"{name} returns the log-determinant first")
        z, raw = raw, z
    if len(parts) > 2:
        notes.append(f"{name} returns {len(parts)} values: the first is z, the last the log-det")
    if isinstance(z, (tuple, list)) and _numbers(z) > x.numel():
        whole = [part for part in z if _numbers(part) == x.numel()]
        if whole:
            notes.append(f"{name} returns all intermediate values; the last is z")
            z = whole[-1]
    if not _tensors(z):
        raise AuditError(f"{name}: expected (z, log_det); got {type(value).__name__}")
    for t in _tensors(z):
        if t.ndim == 0 or len(t) != len(x):
            raise AuditError(
                f"{name}: given {tuple(x.shape)}, it returns {tuple(t.shape)}; expected "
                f"{len(x)} examples"
            )
    stated = isinstance(raw, (Tensor, int, float)) and not isinstance(raw, bool)
    return Image(z, raw if stated else None)


def _parameters(call: Any) -> Mapping[str, inspect.Parameter]:
    call = call.func if isinstance(call, partial) else call
    try:
        return inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
    except (TypeError, ValueError):
        return {}


def inverse_of(owner: Any) -> Callable[..., Any] | None:
    """The other direction of a flow: a method, or its forward inverted by a keyword."""
    if isinstance(owner, Transform):
        return partial(_apply_transform, owner.inv)
    for name in INVERSES:
        method = getattr(owner, name, None)
        if callable(method) and not isinstance(method, nn.Module):
            return method
    parameters = _parameters(owner)
    for name in FLAGS:
        if name in parameters and parameters[name].default in (False, True, None):
            return partial(owner, **{name: not parameters[name].default})
    if "mode" in parameters and parameters["mode"].default in MODES:
        return partial(owner, mode=MODES[parameters["mode"].default])
    return None


def _total_of(call: Any) -> tuple[str | None, bool]:
    """The argument to which a callable adds its log-determinant, and whether it must be given."""
    for name, parameter in list(_parameters(call).items())[1:]:
        default = parameter.default
        needed = default is None or default is inspect.Parameter.empty
        starts = isinstance(default, (int, float)) and not isinstance(default, bool)
        if TOTAL.search(name.lower()) and (needed or starts):
            return name, needed
    return None, False


def _of_x_alone(layer: Any) -> Callable[..., Any]:
    """A layer as a callable; a log-determinant that it must be given is zero."""
    call = partial(_apply_transform, layer) if isinstance(layer, Transform) else layer
    name, needed = _total_of(call)
    return (lambda x: call(x, **{str(name): torch.zeros(len(x))})) if needed else call


def _apply_transform(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the sum of the log-determinant, which has an entry for each event."""
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    return y, log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det


def _run_layers(calls: Sequence[Any], x: Any) -> tuple[Any, Any]:
    """Layers in a row; the sum of their log-determinants, if each returns one."""
    total: Any = 0.0
    for call in calls:
        x, raw = _read(call(x), flatten(x), "a layer", [])
        total = None if raw is None or total is None else total + raw
    return x, total


class FlowAdapter:
    """A flow of any codebase; without an `inverse`, it is looked for on `forward`.

    What cannot be called, or returns something else than is expected, raises an `AuditError`.

    Attributes:
        notes: What was assumed about the callables.
        adds_to: The argument to which forward adds its log-determinant; None if there is none.
        invertible: Whether there is an inverse.
        fixed_draws: Whether forward draws the same random numbers on each call.
        estimates: Whether its log-determinant is an estimate, which differs between calls.
        changed: The argument that a callable changed in place, by the callable's name.
    """

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any = None):
        self.sandbox, self.notes, self.takes_list = sandbox, [], False
        self.fixed_draws, self.estimates, self.changed = False, False, dict[str, str]()
        if type(forward) is nn.Sequential or isinstance(forward, (nn.ModuleList, list, tuple)):
            backs = [inverse_of(layer) for layer in reversed(list(forward))]
            if inverse is None and None not in backs:
                inverse = partial(_run_layers, [_of_x_alone(back) for back in backs])
            forward = partial(_run_layers, [_of_x_alone(layer) for layer in forward])
        elif not callable(forward):
            raise AuditError(f"forward: expected a callable; got {type(forward).__name__}")
        elif inverse is None:
            inverse = self._find_inverse(forward)
        self._with_total, self._forward = forward, _of_x_alone(forward)
        self.adds_to, _ = _total_of(forward)
        self.invertible, self._inverse = inverse is not None, _of_x_alone(inverse)

    def _find_inverse(self, forward: Any) -> Callable[..., Any] | None:
        """The other direction of the object that forward belongs to."""
        owner = forward
        if isinstance(forward, types.MethodType) and forward.__name__ == "forward":
            owner = forward.__self__
        elif not isinstance(forward, (nn.Module, Transform)):
            return None
        inverse = inverse_of(owner)
        if inverse is not None and not isinstance(forward, Transform):
            flags = inverse.keywords if isinstance(inverse, partial) else {}
            by = "".join(f" with {k}={v!r}" for k, v in flags.items())
            self.notes.append(f"the inverse is {getattr(inverse, '__name__', 'forward')}{by}")
        return inverse

    def first_call(self, x: Tensor) -> Image:
        """The first output; finds out whether the flow takes x as a tensor or in a list."""

        def attempt(takes_list: bool) -> Image:
            self.takes_list = takes_list
            return self.forward(x, self.notes)

        return first_form([(False,), (True,)], attempt)[1]

    def forward(
        self, x: Tensor, notes: list[str] | None = None, total: Tensor | None = None
    ) -> Image:
        """The flow's output for a copy of x; its log-determinant is added to `total`."""
        if self.fixed_draws:
            self.sandbox.reseed()
        call, copy = self._forward, x.clone()
        if total is not None:
            call = partial(self._with_total, **{str(self.adds_to): total})
        value = self.sandbox.call("forward", call, [copy] if self.takes_list else copy)
        if not torch.equal(copy, x):
            self.changed["forward"] = "x"
        return _read(value, x, "forward", [] if notes is None else notes)

    def latents(self, x: Tensor) -> Tensor:
        """The latents (B, D) for x."""
        return self.forward(x).flat

    def inverse(self, tree: Any, x: Tensor) -> Image:
        """The inverse's x for latents, with the log-determinant that it returns or None."""
        z = tree_map_only(
            Tensor, lambda t: t.detach().clone(), tree
        )  # so that caches by identity fail
        back, raw = image = _read(self.sandbox.call("inverse", self._inverse, z), x, "inverse", [])
        if not torch.allclose(flatten(z), flatten(tree), 0.0, 0.0, equal_nan=True):
            self.changed["inverse"] = "z"
        if image.flat.numel() != x.numel():
            raise AuditError(
                f"inverse: given what forward returned for {tuple(x.shape)}, it returns "
                f"{tuple(image.flat.shape)} numbers"
            )
        passed = raw is None or not torch.as_tensor(raw).any()  # a zero that was given
        return Image(flatten(back).detach().reshape(x.shape), None if passed else raw)

    def round_trip(self, x: Tensor) -> Tensor:
        """What the inverse returns for the latents of x."""
        return self.inverse(self.forward(x).tree, x).tree


class Layer(NamedTuple):
    """A layer, as a flow, and a call of it inside a flow."""

    name: str
    flow: FlowAdapter
    x: Tensor  # (B, ...)
    z: Tensor


def called_layers(flow: FlowAdapter, x: Tensor) -> list[Layer]:
    """The innermost modules that return (z, log_det) in a call of a flow, in their order."""
    seen: list[tuple[nn.Module, Layer]] = []
    names = {m: name for root in flow.sandbox.modules for name, m in root.named_modules()}

    def is_total(value: Any) -> bool:  # accumulated before the layer
        return isinstance(value, Tensor) and value.shape in ((), (len(x),))

    def without_total(value: Any) -> Any:
        return torch.zeros_like(value) if is_total(value) else value

    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        pair = isinstance(out, (tuple, list)) and len(out) == 2
        if not pair or not args or not all(isinstance(t, Tensor) for t in (args[0], *out)):
            return
        first, (z, raw), inside = args[0].detach(), out, set(module.modules())
        fits = len(first) == len(x) and z.numel() == first.numel()
        if not fits or raw.numel() not in (1, len(x)) or inside & {m for m, _ in seen} - {module}:
            return  # it is no layer, or its parts were seen
        rest, named = tree_map_only(Tensor, without_total, (args[1:], kwargs))

        def call(of: Any, x: Tensor, **flags: Any) -> Any:
            return of(x, *rest, **(named | flags))

        inverse = inverse_of(module)
        if isinstance(inverse, partial) and inverse.func is module:
            inverse = partial(call, module, **inverse.keywords)
        layer = FlowAdapter(flow.sandbox, partial(call, module), inverse)
        name = f"{names.get(module) or 'flow'} ({type(module).__name__})"
        seen.append((module, Layer(name, layer, first, z.detach())))

    with forward_hooks(names, hook, with_kwargs=True):
        flow.forward(x)
    return [layer for _, layer in seen]
