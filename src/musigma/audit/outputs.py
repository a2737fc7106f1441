"""Losses that take what `forward` returns: where they are, and which argument takes which output.

Names decide: those of the parameters, and those in the return statement of `forward`. Where names
say nothing, the order does.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from musigma.audit.batches import (
    constant,
    input_of,
    is_input,
    is_target,
    keywords_of,
    member,
    named_parts,
    required,
    signature_of,
)
from musigma.audit.callables import neighbours
from musigma.audit.training_loop import leaves, of_users

__all__ = ["LOSS", "TERM", "Picks", "is_answer", "loss_functions", "matches", "named_outputs"]

LOSS = re.compile(r"loss|elbo|criterion|objective|^nll", re.IGNORECASE)
TERM = re.compile(
    r"kl|rec|bce|mse|mmd|adv|disc|perc|gan|valid|test|eval|track|metric|weight|hist|name",
    re.IGNORECASE,
)
ROLES = {
    "reconstruction": r"rec|hat$|^out|pred|decod|^x_$|tilde|logits|^xr|^gen",
    "scale": r"log|sig|std|var|scale|lv$|ls$",
    "mean": r"mean|mu|loc|^m$",
    "z": r"^z|latent|^code|sample",
}


UNNAMED = "output {}"


class Picks(NamedTuple):
    """Which output, or which part of the batch, each argument of a function takes.

    `of(value, batch)` makes the arguments of what forward returned.
    """

    text: str
    of: Callable[[Any, Any], tuple[list[Any], dict[str, Any]]]


def loss_functions(obj: Any) -> Iterator[tuple[str, Any]]:
    """Methods, functions and modules beside the class of an object that are named as losses."""
    there = neighbours(obj)
    for name in dir(obj):
        fn = member(obj, name) if _is_loss_name(name) else None
        if callable(fn) and not type(fn).__module__.startswith("torch."):
            yield name, fn
    for name, thing in there.items():
        if _is_loss_name(name) and inspect.isfunction(thing) and signature_of(thing):
            yield name, thing
        own = isinstance(thing, type) and issubclass(thing, nn.Module) and of_users(thing)
        if own and LOSS.search(name) and not required(thing):
            yield name, thing()


def _is_loss_name(name: str) -> bool:
    is_loss = LOSS.search(name) is not None and TERM.search(name) is None
    return is_loss and not name.startswith("__")


def named_outputs(value: Any, fn: Any, alone: str) -> dict[str, Tensor]:
    """The tensors that a function returned, by the names in its return statement.

    Args:
        value: What it returned.
        fn: The function, or the module whose forward it is.
        alone: The name of a single tensor.
    """
    found = leaves(value)
    if list(found) == [""]:
        return {alone: found[""]}
    if not isinstance(value, (tuple, list)) or hasattr(value, "_fields"):
        return found
    told = _returned(fn)
    told = told if len(told) == len(value) else [""] * len(value)

    def name(key: str) -> str:
        place, dot, rest = key.partition(".")
        own = told[int(place)]
        own = own if own and told.count(own) == 1 else UNNAMED.format(int(place) + 1)
        return f"{own}{dot}{rest}"

    return {name(key): tensor for key, tensor in found.items()}


def _returned(fn: Any) -> list[str]:
    """The names in the last return statement of a function; "" for other expressions."""
    fn = getattr(fn, "call", fn.forward) if isinstance(fn, nn.Module) else fn
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return []
    returns = [n.value for n in ast.walk(tree) if isinstance(n, ast.Return)]
    tuples = [value.elts for value in returns if isinstance(value, (ast.Tuple, ast.List))]

    def name(node: ast.expr) -> str:
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word):
                return word
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=word)):
                return word if _role(word) else ""
        return ""

    return [name(node) for node in tuples[-1]] if tuples else []


def _role(name: str) -> str:
    if re.match(UNNAMED.format(r"\d"), name):
        return ""
    return next((r for r, words in ROLES.items() if re.search(words, name, re.I)), "")


def is_answer(name: str) -> bool:
    """Whether an output may be a reconstruction, by its name."""
    return _role(name) in ("", "reconstruction")


def matches(fn: Any, outputs: Mapping[str, Tensor], batch: Any) -> Iterator[Picks]:
    """The ways to give outputs, and parts of the batch, to a function; the likeliest first.

    Args:
        fn: The function; its parameters' names decide.
        outputs: What forward returned, by `named_outputs`.
        batch: The batch.
    """
    order, parts = list(outputs), named_parts(batch)
    fixed: dict[str, float] = dict.fromkeys(keywords_of(fn), 1.0)
    for name in [*required(fn), *fixed]:
        value = constant(name, batch)
        if value is not None and name not in outputs and name not in parts:
            fixed[name] = value
    open_ = [name for name in required(fn) if name not in fixed]
    constants = [f"{name}={value:g}" for name, value in fixed.items()]

    def made(sources: list[tuple[str, str]]) -> Picks:
        """Sources are (parameter, output's name or "the data" or ...)."""

        def of(value: Any, batch: Any) -> tuple[list[Any], dict[str, Any]]:
            found = dict(zip(order, leaves(value).values(), strict=True))
            known = {"the data": input_of(batch), "the outputs": value, "the batch": batch}
            known = named_parts(batch) | known | found
            return [known[at] for _, at in sources], dict(fixed)

        return Picks(", ".join([*(f"{p}={at}" if p else at for p, at in sources), *constants]), of)

    if not open_:
        spread = any(p.kind is p.VAR_POSITIONAL for p in signature_of(fn))
        yield made([("", name) for name in order] if spread else [])
        return
    if (named := _by_name(open_, outputs, batch)) is not None:
        yield made(named)
    if len(open_) == len(order) > 1:
        yield made(list(zip(open_, order, strict=True)))
    if len(open_) == len(order) + 1 > 2 and named is None:
        first = ["the data", order[0]] if is_input(open_[0]) else [order[0], "the data"]
        yield made(list(zip(open_, [*first, *order[1:]], strict=False)))
    if len(open_) <= 2:
        at = ["the outputs"]
        if len(open_) == 2:
            x = "the batch" if open_[0] == "batch" or open_[1] == "batch" else "the data"
            at = [x, "the outputs"] if is_input(open_[0]) else ["the outputs", x]
        yield made(list(zip(open_, at, strict=True)))


def _is_edges(name: str, part: Any) -> bool:
    pairs = isinstance(part, Tensor) and not part.is_floating_point() and part.ndim == 2
    return "edge" in name or (pairs and len(part) == 2)


def _by_name(
    names: list[str], outputs: Mapping[str, Tensor], batch: Any
) -> list[tuple[str, str]] | None:
    """Which output each parameter takes, by their names; None if one is left."""
    parts, x = named_parts(batch), input_of(batch)
    left, taken = dict(outputs), dict[str, str]()

    def take(name: str, at: str) -> None:
        taken[name] = at
        left.pop(at, None)

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    for name in names:
        if (at := next((o for o in left if plain(o) == plain(name)), None)) is not None:
            take(name, at)
    for name in names:
        if name not in taken and (role := _role(name)) and not is_input(name):
            at = next((o for o in left if _role(o) == role and o not in parts), None)
            if at is not None:
                take(name, at)
    same = [o for o, t in left.items() if isinstance(x, Tensor) and t.numel() == x.numel()]
    answers = [name for name in names if _role(name) == "reconstruction"]
    answers = answers or [name for name in names if is_target(name) and any(map(is_input, names))]
    if len(answers) == 1 and answers[0] not in taken and (same or left):
        take(answers[0], (same or list(left))[0])
    for name in names:
        if name in taken:
            continue
        edges = next((p for p, t in parts.items() if "edge" in name and _is_edges(p, t)), None)
        if name in parts and not isinstance(batch, Tensor):
            take(name, name)
        elif edges is not None:
            take(name, edges)
        elif is_input(name) or (is_target(name) and not any(map(is_input, names))):
            take(name, "the data")
        elif is_target(name) and len(parts) > 1:
            take(name, list(parts)[1])
    open_ = [name for name in names if name not in taken]
    if open_ and len(open_) == len(left):
        taken |= dict(zip(open_, left, strict=True))
    return [(name, taken[name]) for name in names] if set(names) == set(taken) else None
