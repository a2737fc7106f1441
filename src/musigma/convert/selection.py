"""Selection of the model's tensors in a file: prefixes of wrappers, averaged and raw weights.

A file may hold a state dict under any key, inside another module (`model.`, `vae.`), with the
segments that `torch.compile` and `DataParallel` add, next to an optimizer or a diffusion model,
and a second time as averages over the training.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from musigma.convert.reading import Contents, ForeignError, Inert, printable
from musigma.convert.weights import Family, Weights, any_of

__all__ = ["select"]

WRAPPERS = ("_orig_mod", "module")
"""Segments that `torch.compile`, `DataParallel` and `AveragedModel` add to names."""

AVERAGED = {"ema", "swa", "avg", "average", "averaged", "averages", "polyak", "shadow"}
"""Words in the names of averaged weights."""

BOOKKEEPING = {"n_averaged", "decay", "num_updates", "initted", "step"}
"""Attributes of classes that average weights."""

LEAST = 0.5
"""The least share of the names that must be a family's."""

DEPTH = 5
"""How many segments a prefix has at most."""

Tensors = dict[str, Tensor | Inert]


def select(
    contents: Contents, families: Mapping[str, Family], family: str | None, weights: str | None
) -> Weights:
    """The tensors of the model in a file, by the names that its own module gives them.

    Args:
        contents: The contents of the file.
        families: The known kinds of checkpoints.
        family: The kind that it is; None for any.
        weights: `raw`, `averaged`, or the prefix of a set of weights; None for the raw ones where
            both are there.

    Raises:
        ForeignError: If the file holds several sets of weights and none is named, or not the one
            that is asked for, or a tensor that is sparse, quantized or larger than its storage.
    """
    tensors, notes = _renamed(contents), contents.notes
    known = families if family is None else {family: families[family]}
    sets = _sets(tensors, known, LEAST if family is None else 0.0)
    used = {prefix + name for prefix, part in sets.items() for name in part}
    lists = _unnamed(tensors, sets)
    others = [n for n in tensors if n not in used and not n.startswith(tuple(lists))]
    if others:
        heads = {".".join(name.split(".")[:2]) for name in others}
        notes.append(f"names: left out tensors that are not part of the model: {_listed(heads)}")
    sets |= lists
    averaged = {prefix for prefix in sets if _is_average(prefix, tensors)}
    raw: list[Tensors] = []
    for prefix in [prefix for prefix in sets if prefix not in averaged]:
        if any(_equal(sets[prefix], other) for other in raw):  # a copy
            del sets[prefix]
        else:
            raw.append(sets[prefix])
    prefix = _choice(contents, sets, averaged, weights)
    chosen = sets[prefix]
    if prefix in averaged and len(raw) == 1 and (missing := raw[0].keys() - chosen.keys()):
        notes.append(f"weights: {_listed(missing)} have no average and are the raw ones")
        chosen = raw[0] | chosen
    if prefix:
        notes.append(f"names: used those under {printable(prefix)!r}, without this prefix")
    plain = {name: _plain(contents, name, t) for name, t in chosen.items()}
    return Weights(plain, contents.path, notes)


def _renamed(contents: Contents) -> Tensors:
    """All tensors, without wrappers, and averages under the names of their raw weights."""
    renamed: Tensors = {}
    for name, tensor in contents.tensors.items():
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if short.endswith("/ExponentialMovingAverage"):  # of TensorFlow
            short = "ExponentialMovingAverage." + short.rpartition("/")[0]
        if short in renamed:
            raise ForeignError(
                f"{contents.path}: two tensors are named {printable(short)} without the wrappers "
                f"{' and '.join(WRAPPERS)}; save the state dict of one model"
            )
        renamed[short] = tensor
    if any(part in WRAPPERS for name in contents.tensors for part in name.split(".")):
        contents.notes.append("names: '_orig_mod.' and 'module.' of wrappers were removed")
    if not any("model_ema." in name for name in renamed):
        return renamed
    dotted = {}  # LitEma of CompVis names its averages without the dots
    for name in renamed:
        parts = name.split(".")
        for i in range(len(parts)):
            dotted.setdefault("".join(parts[i:]), ".".join(parts[i:]))
    return {
        f"{before}{ema}{dotted.get(rest, rest)}": tensor
        for name, tensor in renamed.items()
        for before, ema, rest in [name.rpartition("model_ema.")]
    }


def _sets(tensors: Tensors, families: Mapping[str, Family], least: float) -> dict[str, Tensors]:
    """The sets of weights by their prefixes: those of which a family knows most of the names."""
    cuts = []  # every name as a prefix and the rest, and whether the rest is an average
    for name in tensors:
        parts = name.split(".")
        for depth in range(min(DEPTH, len(parts))):
            prefix, rest = "".join(f"{p}." for p in parts[:depth]), ".".join(parts[depth:])
            cuts.append((prefix, rest, bool(_words(rest) & AVERAGED)))
    found: dict[str, int] = {}
    for family in families.values():
        known, ignored = any_of(family.names), any_of(family.ignored)
        counts, asked = Counter[str](), Counter[str]()
        for prefix, rest, average in cuts:
            counts[prefix] += bool(known.fullmatch(rest))
            asked[prefix] += not (average or ignored.fullmatch(rest))
        for prefix, count in counts.items():
            if count and count >= least * asked[prefix]:
                found[prefix] = max(count, found.get(prefix, 0))
    best = max(found.values(), default=0)
    prefixes = [prefix for prefix, count in found.items() if 2 * count > best] or [""]
    sets: dict[str, Tensors] = {prefix: {} for prefix in prefixes}
    for name, tensor in tensors.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        rest = name.removeprefix(prefix or "")
        if prefix is not None and not _words(rest) & AVERAGED:
            sets[prefix][rest] = tensor
    for prefix in sets:
        if _is_average(prefix, tensors):
            sets[prefix] = {n: t for n, t in sets[prefix].items() if n not in BOOKKEEPING}
    return sets


def _unnamed(tensors: Tensors, sets: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Averages in a list, in the order of a set of weights whose shapes they have."""
    lists: dict[str, list[Tensor | Inert]] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last.isdecimal() and _words(prefix) & AVERAGED:
            lists.setdefault(f"{prefix}.", []).append(tensor)
    shapes = lambda some: [tuple(t.shape) for t in some if isinstance(t, Tensor)]  # noqa: E731
    return {
        prefix: dict(zip(named, averages, strict=True))
        for prefix, averages in lists.items()
        for named in sets.values()
        if shapes(averages) == shapes(named.values())
    }


def _words(text: str) -> set[str]:
    """The lower-case words of a name in camel case or with underscores."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)
    pairs = zip(["", *words], words, strict=False)
    return {word.lower() for before, word in pairs if before.lower() not in ("non", "no")}


def _is_average(prefix: str, tensors: Mapping[str, Any]) -> bool:
    """Whether weights are averages: by their prefix, or by what stands beside them."""
    lightning = any(name.startswith("current_model_state.") for name in tensors)
    words = _words(prefix)
    return (
        bool(words & AVERAGED and not words & {"raw", "online"})
        or f"{prefix}n_averaged" in tensors
        or (lightning and prefix.startswith("state_dict."))
    )


def _equal(a: Tensors, b: Tensors) -> bool:
    """Whether two sets hold the same tensors."""
    return a.keys() == b.keys() and all(
        isinstance(x, Tensor) and isinstance(y, Tensor) and torch.equal(x, y)
        for x, y in ((a[name], b[name]) for name in a)
    )


def _choice(
    contents: Contents, sets: Mapping[str, Tensors], averaged: set[str], weights: str | None
) -> str:
    """The prefix of the set of weights that is asked for; notes what else there is."""
    kinds = {prefix: "averaged" if prefix in averaged else "raw" for prefix in sets}
    label = {p: printable(p.removesuffix(".")) or "(no prefix)" for p in sets}
    wanted = weights or ("raw" if "raw" in kinds.values() else "averaged")
    fitting = [p for p in sets if wanted in (kinds[p], label[p], p)]
    listed = ", ".join(f"{label[p]} ({kinds[p]})" for p in sets)
    if not fitting:
        raise ForeignError(
            f"weights: {contents.path} holds no weights {wanted!r}; it holds {listed}"
        )
    if len(fitting) > 1:
        raise ForeignError(
            f"weights: {contents.path} holds several sets of weights: {listed}; name one "
            f"(--weights {label[fitting[0]]})"
        )
    prefix = fitting[0]
    others = [f"{label[p]} ({kinds[p]})" for p in sets if p != prefix]
    if others:
        contents.notes.append(
            f"weights: took the {kinds[prefix]} ones, {label[prefix]}; the file also holds "
            f"{', '.join(others)} (--weights raw, averaged, or one of these names)"
        )
    elif prefix in averaged:
        contents.notes.append("weights: these are averages; the file holds no raw ones")
    return prefix


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return printable(", ".join(names[:4])) + (f" and {len(names) - 4} more" if names[4:] else "")


def _plain(contents: Contents, name: str, t: Tensor | Inert) -> Tensor:
    if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu":
        whole = t.numel() * t.element_size() <= t.untyped_storage().nbytes()
        if whole and not (t.is_quantized or t.is_nested):
            return t
    raise ForeignError(
        f"{contents.path}: {printable(name)} is not a plain tensor with all of its elements"
    )
