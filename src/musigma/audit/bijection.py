"""Flows of any codebase as functions of tensors: x to (z, log-determinant), and back.

Codebases write a bijection in many ways: a module with `inverse` or `reverse`, a keyword that
inverts `forward`, a pair of functions, a `torch.distributions.Transform`, a list of layers; with
latents as one tensor or as one for each scale; with a log-determinant that comes second, first, or
is added to an argument. `FlowAdapter` gives them one interface.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from musigma.audit.findings import AuditError
from musigma.audit.sandbox import Sandbox, first_form
from musigma.model import Bijection, Chain

__all__ = [
    "FLAGS", "FlowAdapter", "Image", "detached", "flatten", "inverse_of", "log_det_of",
    "map_tensors", "read", "total_of",
]  # fmt: skip

INVERSES = ("inverse", "reverse", "backward", "invert", "inv", "inverse_transform", "_inverse")
FLAGS = ("reverse", "rev", "inverse", "invert", "inv")  # keywords that invert forward
MODES = {"direct": "inverse", "forward": "inverse", "encode": "decode"}
TOTAL = re.compile(r"log_?(abs_?)?det|ldj|ladj|objective")  # an accumulated log-determinant


def map_tensors(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """A structure of tuples, lists and dictionaries with a function of each of its tensors."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(fn, part) for part in tree)
    return {k: map_tensors(fn, v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _leaves(tree: Any) -> list[Tensor]:
    leaves: list[Tensor] = []
    map_tensors(leaves.append, tree)
    return leaves


def _numbers(tree: Any) -> int:
    return sum(leaf.numel() for leaf in _leaves(tree))


def flatten(tree: Any) -> Tensor:
    """All numbers of each example, of all tensors of a structure: (B, D)."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in _leaves(tree)], 1)


def detached(tree: Any) -> Any:
    """A copy of a structure of tensors, without gradients."""
    return map_tensors(lambda t: t.detach().clone(), tree)


class Image(NamedTuple):
    """The latents and the log-determinant that a flow returned; None for no log-determinant."""

    tree: Any
    raw: Any

    @property
    def flat(self) -> Tensor:
        """The latents, (B, D)."""
        return flatten(self.tree)


def log_det_of(raw: Any, rows: int) -> tuple[Tensor, str]:
    """A log-determinant as numbers (B,), and what it was.

    Returns:
        The numbers in float64, and "example": (B,); "column": (B, 1); "number": a tensor of one
        for all; "literal": a Python number; "outer": (B, B), of which the diagonal is taken;
        "elements": many for each example, here summed; "other": anything else, here summed.
    """
    value = torch.as_tensor(raw).detach().double()
    if not isinstance(raw, Tensor):
        return value.expand(rows), "literal"
    if value.ndim and len(value) == value.numel() == rows:
        return value.reshape(rows), "example" if value.ndim == 1 else "column"
    if value.numel() == 1:
        return value.reshape(1).expand(rows), "number"
    if value.shape == (rows, rows):
        return value.diagonal(), "outer"
    if value.ndim > 1 and len(value) == rows:
        return value.reshape(rows, -1).sum(1), "elements"
    return value.sum().expand(rows), "other"


def read(value: Any, x: Tensor, name: str, notes: list[str] | None = None) -> Image:
    """The result of a callable, as latents and log-determinant."""
    notes = [] if notes is None else notes
    if isinstance(value, Tensor):
        return Image(value, None)
    if isinstance(value, dict):
        plain = {key: str(key).lower().replace("_", "").replace(" ", "") for key in value}
        known = ("ldj", "ladj", "logjac")
        dets = [key for key, text in plain.items() if "det" in text or text in known]
        rest = [key for key in value if key not in dets]
        if rest:
            return Image(value[rest[0]], value[dets[0]] if dets else None)
    if not isinstance(value, (tuple, list)) or not value:
        raise AuditError(f"{name}: expected (z, log_det); got {type(value).__name__}")
    z, raw = value[0], value[-1] if len(value) > 1 else None
    if len(value) == 2 and _numbers(z) != x.numel() == _numbers(raw):
        notes.append(f"{name} returns the log-determinant first")
        return Image(raw, z)
    if len(value) > 2:
        notes.append(f"{name} returns {len(value)} values: the first is z, the last the log-det")
    if isinstance(z, (tuple, list)) and _numbers(z) > x.numel():
        parts = [part for part in z if _numbers(part) == x.numel()]
        if parts:
            notes.append(f"{name} returns all intermediate values; the last is z")
            z = parts[-1]
    if not _leaves(z):
        raise AuditError(f"{name}: expected (z, log_det); the first is {type(z).__name__}")
    if isinstance(raw, (tuple, list)) and len(raw) == 1:
        raw = raw[0]
    stated = isinstance(raw, (Tensor, int, float)) and not isinstance(raw, bool)
    return Image(z, raw if stated else None)


def _parameters(call: Any) -> Mapping[str, inspect.Parameter]:
    call = call.func if isinstance(call, functools.partial) else call
    try:
        return inspect.signature(call.forward if isinstance(call, nn.Module) else call).parameters
    except (TypeError, ValueError):
        return {}


def inverse_of(owner: Any) -> Callable[..., Any] | None:
    """The other direction of a flow: a method, or its forward inverted by a keyword."""
    if isinstance(owner, Transform):
        return functools.partial(_apply_transform, owner.inv)
    for name in INVERSES:
        method = getattr(owner, name, None)
        if callable(method) and not isinstance(method, nn.Module):
            return method
    parameters = _parameters(owner)
    for name in FLAGS:
        if name in parameters and parameters[name].default in (False, True, None):
            return functools.partial(owner, **{name: not parameters[name].default})
    if "mode" in parameters and parameters["mode"].default in MODES:
        return functools.partial(owner, mode=MODES[parameters["mode"].default])
    return None


def total_of(call: Any) -> tuple[str, bool] | None:
    """The argument to which a callable adds its log-determinant, and whether it must be given."""
    for name, parameter in list(_parameters(call).items())[1:]:
        default = parameter.default
        needed = default is None or default is inspect.Parameter.empty
        starts = isinstance(default, (int, float)) and not isinstance(default, bool)
        if TOTAL.search(name.lower()) and (needed or starts):
            return name, needed
    return None


class FlowAdapter:
    """A flow of any codebase; without an `inverse`, it is looked for on `forward`.

    Attributes:
        notes: What was assumed about the callables.
        adds_to: The argument to which forward adds its log-determinant; None if there is none.
        fixed_draws: Whether forward draws the same random numbers on each call.
        changed: The callables that changed their argument in place: "forward", "inverse".

    Raises:
        AuditError: If `forward` is not callable.
    """

    def __init__(self, sandbox: Sandbox, forward: Any, inverse: Any = None):
        self.sandbox, self.notes, self.takes_list = sandbox, [], False
        self.fixed_draws, self.changed = False, dict[str, str]()
        if isinstance(forward, Chain):
            if not all(isinstance(layer, Bijection) for layer in forward.layers):
                raise AuditError(
                    "forward: this chain draws or factors out variables; use audit_model for "
                    "whole models"
                )
            forward = list(forward.layers)
        if type(forward) is nn.Sequential or isinstance(forward, (nn.ModuleList, list, tuple)):
            backs = [inverse_of(layer) for layer in reversed(list(forward))]
            if inverse is None and None not in backs:
                inverse = functools.partial(_run_layers, [_started(back) for back in backs])
            calls = [_started(_call_of(layer)) for layer in forward]
            forward = functools.partial(_run_layers, calls)
        elif not callable(forward):
            raise AuditError(f"forward: expected a callable; got {type(forward).__name__}")
        elif inverse is None:
            owner: Any = forward
            if isinstance(forward, types.MethodType) and forward.__name__ == "forward":
                owner = forward.__self__
            if isinstance(owner, (nn.Module, Transform)) or owner is not forward:
                inverse = inverse_of(owner)
            if inverse is not None and not isinstance(forward, Transform):
                self.notes.append(f"the inverse is {_name(inverse)}")
            flags = inverse.keywords if isinstance(inverse, functools.partial) else {}
            if False in flags.values():  # forward was the inverted direction
                forward = inverse
                inverse = functools.partial(owner, **dict.fromkeys(flags, True))
        self._forward = _call_of(forward)
        self.adds_to = (total_of(self._forward) or (None,))[0]
        self._start = _started(self._forward)
        self.invertible = inverse is not None
        self._inverse = _started(inverse)

    def forward(
        self, x: Tensor, notes: list[str] | None = None, total: Tensor | None = None
    ) -> Image:
        """The flow's output for a copy of x; its log-determinant is added to `total`.

        Raises:
            AuditError: If it raises, or returns something other than (z, log_det).
        """
        if self.fixed_draws:
            self.sandbox.reseed()
        call, copy = self._start, x.clone()
        if total is not None and self.adds_to:
            call = functools.partial(self._forward, **{self.adds_to: total})
        value = self.sandbox.call("forward", call, [copy] if self.takes_list else copy)
        if not torch.equal(copy, x):
            self.changed["forward"] = "x"
        return _check_rows(read(value, x, "forward", notes), x, "forward")

    def first_call(self, x: Tensor) -> Image:
        """The first output; finds out whether the flow takes x as a tensor or in a list.

        Raises:
            AuditError: If it takes neither.
        """

        def attempt(takes_list: bool) -> Image:
            self.takes_list = takes_list
            return self.forward(x, self.notes)

        return first_form([(False,), (True,)], attempt)[1]

    def inverse(self, tree: Any, x: Tensor) -> tuple[Tensor, Any]:
        """The inverse's x for latents, with the log-determinant that it returns or None.

        Raises:
            AuditError: If it raises, or returns something other than an x of the given shape.
        """
        z = detached(tree)  # a copy, so that caches keyed by the tensor do not help
        image = read(self.sandbox.call("inverse", self._inverse, z), x, "inverse")
        if not torch.allclose(flatten(z), flatten(tree), 0.0, 0.0, equal_nan=True):
            self.changed["inverse"] = "z"
        flat = _check_rows(image, x, "inverse").flat
        if flat.numel() != x.numel():
            raise AuditError(
                f"inverse: given what forward returned for {tuple(x.shape)}, it returns "
                f"{tuple(flat.shape)} numbers"
            )
        raw = image.raw
        if raw is not None and not torch.as_tensor(raw).any():
            raw = None  # the zero that was given is passed through
        return flat.detach().reshape(x.shape), raw


def _check_rows(image: Image, x: Tensor, name: str) -> Image:
    for part in _leaves(image.tree):
        if part.ndim == 0 or len(part) != len(x):
            raise AuditError(
                f"{name}: given {tuple(x.shape)}, it returns {tuple(part.shape)}; expected "
                f"{len(x)} examples"
            )
    return image


def _name(call: Any) -> str:
    if isinstance(call, functools.partial):
        return f"forward with {', '.join(f'{k}={v!r}' for k, v in call.keywords.items())}"
    return getattr(call, "__name__", type(call).__name__)


def _started(call: Any) -> Any:
    """A callable of x alone: one that must be given a log-determinant is given zeros."""
    name, needed = total_of(call) or ("", False)
    return (lambda x: call(x, **{name: torch.zeros(len(x))})) if needed else call


def _call_of(layer: Any) -> Callable[..., Any]:
    is_transform = isinstance(layer, Transform)
    return functools.partial(_apply_transform, layer) if is_transform else layer


def _apply_transform(transform: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the sum of the log-determinant, which has an entry for each event."""
    y = transform(x)
    log_det = transform.log_abs_det_jacobian(x, y)
    return y, log_det.flatten(1).sum(1) if log_det.ndim > 1 else log_det


def _run_layers(calls: Sequence[Any], x: Any) -> tuple[Any, Any]:
    """Layers in a row; the sum of their log-determinants, if each returns one."""
    total: Any = 0.0
    for call in calls:
        image = read(call(x), flatten(x), "a layer")
        x = image.tree
        if image.raw is None or total is None:
            total = None
            continue
        try:
            total = total + image.raw
        except RuntimeError:  # shapes that cannot be added are judged as no shape of a batch
            total = torch.cat([total.flatten(), image.raw.flatten()])
    return x, total
