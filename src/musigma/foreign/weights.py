"""Reading foreign files safely, and taking tensors out of them one by one, with an account."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ForeignError", "Options", "Weights", "holds", "read"]

NESTED = ("state_dict", "model_state_dict", "graph", "model", "params")
"""Keys under which checkpoints keep their state dict."""

FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.pt",
    "trained.pkg",
    "model.ckpt",
    "model.npz",
)
"""Where a folder keeps its weights, the first that there is."""


class ForeignError(ValueError):
    """A checkpoint that cannot be converted; the message says what differs, and from what."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What some checkpoints do not say of themselves.

    Args:
        size: (height, width) of the images.
        bits: Bits of each element that the model is of; None: as its code has it by default.
        permutation: Of a Glow without 1x1 convolutions: `reverse`, or the order of every step.
        std: Standard deviation of p(x | z), where the original has no likelihood.
        groups: Of group normalisations.
    """

    size: tuple[int, int] | None = None
    bits: int | None = None
    permutation: str | Sequence[Sequence[int]] | None = None
    std: float | None = None
    groups: int | None = None

    def given(self) -> list[str]:
        """The names of those that are not None."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


class Weights:
    """Named tensors that a converter takes out one by one, and what it found amiss.

    A tensor that is missing, of another shape or not finite is noted, and zeros are returned in
    its place, so that `finish` can name all differences at once.

    Args:
        tensors: By name.
        path: Where they come from, for messages.
        config: What was said beside them.
    """

    def __init__(self, tensors: Mapping[str, Tensor], path: Path, config: dict[str, Any]):
        self.tensors, self.path, self.config = dict(tensors), path, config
        self.problems: list[str] = []
        self.left = set(self.tensors)

    def share(self, names: Iterable[str], ignored: Iterable[str]) -> float:
        """The share of the names that match one of `names`, of all but the ignored, 0 to 1."""
        known, besides = _any_of(names), _any_of(ignored)
        asked = [name for name in self.tensors if not besides.fullmatch(name)]
        return sum(bool(known.fullmatch(name)) for name in asked) / max(1, len(asked))

    def strange(self, names: Iterable[str]) -> list[str]:
        """The names that match none of some regular expressions."""
        known = _any_of(names)
        return [name for name in self.tensors if not known.fullmatch(name)]

    def ignore(self, names: Iterable[str]) -> None:
        """Leave names that match one of some regular expressions out of the account."""
        known = _any_of(names)
        self.left = {name for name in self.left if not known.fullmatch(name)}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that stand where a regular expression has its one group, ascending."""
        found = (re.fullmatch(pattern, name) for name in self.tensors)
        return sorted({int(match[1]) for match in found if match})

    def size(self, name: str, axis: int) -> int:
        """How long an axis of a tensor is.

        Raises:
            ForeignError: If there is no such tensor, or no such axis.
        """
        shape = tuple(self.tensors[name].shape) if name in self else ()
        if not -len(shape) <= axis < len(shape):
            got = f"has shape {shape}" if name in self else "is missing"
            raise ForeignError(f"{self.path}: {name} {got}, so the model's size is unknown")
        return shape[axis]

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float64, of the shape that it must have."""
        if name not in self:
            self.problems.append(f"{name} is missing")
            return torch.zeros(shape, dtype=torch.float64)
        self.left.discard(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            self.problems.append(f"{name} has shape {tuple(tensor.shape)} and not {shape}")
            return torch.zeros(shape, dtype=torch.float64)
        tensor = tensor.detach().to("cpu", torch.float64)
        if not bool(tensor.isfinite().all()):
            self.problems.append(f"{name} holds values that are not finite")
        return tensor

    def drop(self, *names: str) -> None:
        """Constants of the original's code, which no model needs."""
        self.left.difference_update(names)

    def refuse(self, reason: str) -> None:
        """Note a difference."""
        self.problems.append(reason)

    def finish(self, kind: str, nearest: str) -> None:
        """Refuse, if anything was amiss or is left.

        Raises:
            ForeignError: With the first five differences.
        """
        wrong = self.problems + [f"{name} is not part of it" for name in sorted(self.left)]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ForeignError(
                f"{self.path}: not a checkpoint of {kind} that can be converted: "
                f"{'; '.join(wrong[:5])}{more}. The nearest known format is {nearest}"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating type among the tensors."""
        own = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        widths = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return next((dtype for dtype in widths if dtype in own), torch.float32)

    def narrowest(self, model: nn.Module) -> torch.dtype:
        """The source's own type, float32 at least, if it holds the model's numbers, or float64."""
        narrow = torch.promote_types(self.dtype, torch.float32)
        return narrow if holds(model.state_dict().values(), narrow) else torch.float64


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{name})" for name in names) or r"(?!)")


def holds(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether a floating type holds all these numbers without rounding."""
    floats = (t for t in tensors if t.is_floating_point())
    return all(bool((t.to(dtype).to(t.dtype) == t).all()) for t in floats)


def read(source: str | Path) -> Weights:
    """The tensors of a file, or of the file that a folder keeps its weights in; JSON beside them.

    Raises:
        ForeignError: If there is none, or it is damaged, or holds more than tensors.
    """
    path = Path(source)
    if not path.exists():
        raise ForeignError(f"{path}: there is no such file or folder")
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ForeignError(f"{path}: holds none of {', '.join(FILES)}; name the file itself")
        path = found[0]
    try:
        tensors = _tensors(path)
    except ForeignError:
        raise
    except pickle.UnpicklingError as error:
        raise ForeignError(
            f"{path}: a pickle that holds more than tensors, or a damaged one, and nothing of it "
            f"is run ({str(error).splitlines()[0][:200]}); save its state_dict alone"
        ) from error
    except Exception as error:  # whatever a parser throws at a damaged file
        reason = (str(error) or "no message").splitlines()[0][:200]
        raise ForeignError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); it may be cut short or "
            "damaged, so copy it again"
        ) from error
    if not tensors:
        raise ForeignError(f"{path}: holds no tensors")
    return Weights(tensors, path, _config(folder))


def _tensors(path: Path) -> dict[str, Tensor]:
    import numpy as np

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name.removesuffix(":0"): archive[name] for name in archive.files}
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
    if not (zipfile.is_zipfile(path) or path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04")):
        raise ForeignError(
            f"{path}: neither .safetensors, nor .npz, nor a file of torch.save; if it was one, it "
            "is cut short or damaged, so copy it again"
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums itself
        if damaged is not None:
            raise ForeignError(f"{path}: {damaged} in it is damaged, so copy it again")
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(state, Mapping) and not _is_state(state):
        inner = [state[key] for key in NESTED if isinstance(state.get(key), Mapping)]
        if not inner:
            raise ForeignError(f"{path}: holds no state dict, but {', '.join(map(str, state))}")
        state = inner[0]
    if not isinstance(state, Mapping):
        raise ForeignError(f"{path}: holds a {type(state).__name__}, and no state dict")
    tensors = {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
    if all(name.startswith("module.") for name in tensors):  # as DataParallel saves them
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    return tensors


def _is_state(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(v, Tensor) for v in state.values())


def _config(folder: Path) -> dict[str, Any]:
    """The JSON files beside the weights, those with an object in them, by name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(value, dict) and path.stat().st_size < 1_000_000:
            found[path.name] = value
    return found
