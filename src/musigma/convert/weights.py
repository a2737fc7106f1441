"""Reading foreign files safely, and taking tensors out of them one by one, with an account."""

from __future__ import annotations

import json
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ForeignError", "Options", "Weights", "holds", "is_count", "read", "read_json", "shown"]

NESTED = ("state_dict", "model_state_dict", "graph", "model", "params")
"""Keys under which checkpoints keep their state dict."""

FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.pt",
    "trained.pkg",
    "model.ckpt",
    "model.npz",
)
"""Where a folder keeps its weights, the first that there is."""

FIRST_STAGE = "first_stage_model."
"""What stands before the names of an autoencoder inside a diffusion model's checkpoint."""

LARGEST_SIDE = 16_384


class ForeignError(ValueError):
    """A checkpoint that cannot be converted; the message says what differs, and from what."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What some checkpoints do not say of themselves.

    Args:
        size: (height, width) of the images.
        bits: Bits of each element that the model is of; None: as its code has it by default.
        permutation: Of a Glow without 1x1 convolutions: `reverse`, or the order of every step.
        labels: Of a Glow's classifier: `softmax` for one each, `sigmoid` for several.
        std: Standard deviation of p(x | z), where the original has no likelihood.
        groups: Of group normalisations.

    Raises:
        ValueError: For a value that is out of range.
    """

    size: tuple[int, int] | None = None
    bits: int | None = None
    permutation: str | Sequence[Sequence[int]] | None = None
    labels: str | None = None
    std: float | None = None
    groups: int | None = None

    def __post_init__(self):
        for side in self.size or ():
            if not 1 <= side <= LARGEST_SIDE:
                raise ValueError(f"size: expected 1 to {LARGEST_SIDE:,}; got {side}")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise ValueError(f"bits: expected 1 to 8; got {self.bits}")
        if self.labels not in (None, "softmax", "sigmoid"):
            raise ValueError(f"labels: expected 'softmax' or 'sigmoid'; got {self.labels!r}")
        if self.std is not None and not 0 < self.std < math.inf:
            raise ValueError(f"std: expected a positive number; got {self.std}")
        if self.groups is not None and self.groups < 1:
            raise ValueError(f"groups: expected 1 or more; got {self.groups}")

    def given(self) -> list[str]:
        """The names of those that are not None."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


class Weights:
    """Named tensors that a converter takes out one by one, and what it found amiss.

    A tensor that is missing, of another shape or type, or not finite is noted, and zeros are
    returned in its place, so that `finish` can name all differences at once. It is called before a
    model is built, so that no claim of a file is believed that its tensors do not bear out.

    Args:
        tensors: By name.
        path: Where they come from, for messages.

    Attributes:
        kind: What they are taken for.
        nearest: The known format that they are most like.
    """

    kind = nearest = ""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path):
        self.tensors, self.path = dict(tensors), path
        self.elements = sum(t.numel() for t in self.tensors.values())
        self.problems: list[str] = []
        self.left = set(self.tensors)

    def beside(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file beside the weights; None if there is none."""
        return read_json(self.path.parent / name)

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

    def any(self, prefix: str) -> bool:
        """Whether there is a tensor whose name begins so."""
        return any(name.startswith(prefix) for name in self.tensors)

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that stand where a regular expression has its one group, ascending."""
        found = (re.fullmatch(pattern, name) for name in self.tensors)
        return sorted({int(match[1]) for match in found if match and len(match[1]) < 7})

    def size(self, name: str, axis: int) -> int:
        """How long an axis of a tensor is.

        Raises:
            ForeignError: If there is no such tensor, no such axis, or nothing along it.
        """
        shape = tuple(self.tensors[name].shape) if name in self else ()
        if not (-len(shape) <= axis < len(shape) and shape[axis]):
            got = f"has shape {shape}" if name in self else "is missing"
            raise ForeignError(f"{self.path}: {name} {got}, so the model's size is unknown")
        return shape[axis]

    def take(self, name: str, *shape: int, whole: bool = False) -> Tensor:
        """A tensor in float64, of the shape that it must have; `whole` numbers where these are.

        Raises:
            ForeignError: If a tensor of that shape could not be in the file at all.
        """
        if math.prod(shape) > self.elements:
            self.refuse(f"{name} should have shape {shape}, which is more than the file holds")
            self.finish()
        nothing = torch.zeros((), dtype=torch.float64).expand(shape)
        if name not in self:
            self.refuse(f"{name} is missing")
            return nothing
        self.left.discard(name)
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape:
            self.refuse(f"{name} has shape {tuple(tensor.shape)} and not {shape}")
            return nothing
        if tensor.is_complex() or tensor.is_floating_point() == whole:
            kind = str(tensor.dtype).removeprefix("torch.")
            self.refuse(f"{name} is {kind} and no {'whole' if whole else 'floating'} numbers")
            return nothing
        tensor = tensor.detach().double()
        if not bool(tensor.isfinite().all()):
            self.refuse(f"{name} holds values that are not finite")
        return tensor

    def drop(self, *names: str) -> None:
        """Constants of the original's code, which no model needs."""
        self.left.difference_update(names)

    def refuse(self, reason: str) -> None:
        """Note a difference."""
        self.problems.append(reason)

    def finish(self) -> None:
        """Refuse, if anything was amiss or is left.

        Raises:
            ForeignError: With the first five differences.
        """
        wrong = self.problems + [f"{name} is not part of it" for name in sorted(self.left)]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ForeignError(
                f"{self.path}: not a checkpoint of {self.kind} that can be converted: "
                f"{'; '.join(map(shown, wrong[:5]))}{more}. The nearest known format is "
                f"{self.nearest}"
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


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file of at most 1 MB; None if there is no such file, or no object.

    Raises:
        ForeignError: If it is no JSON.
    """
    try:
        if path.stat().st_size > 1_000_000:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise ForeignError(f"{path}: is no JSON that can be read ({error})") from error
    return value if isinstance(value, dict) else None


def is_count(value: Any) -> bool:
    """Whether a value of a settings file is a whole number that may be a size."""
    return type(value) is int and 1 <= value <= LARGEST_SIDE


def shown(text: str) -> str:
    """Text of a file as it may be printed."""
    return "".join(c if c.isprintable() else "?" for c in text)[:300]


def holds(tensors: Iterable[Tensor], dtype: torch.dtype) -> bool:
    """Whether a floating type holds all these numbers without rounding."""
    floats = (t for t in tensors if t.is_floating_point())
    return all(bool((t.to(dtype).to(t.dtype) == t).all()) for t in floats)


def read(source: str | Path) -> Weights:
    """The tensors of a file, or of the file that a folder keeps its weights in.

    Of a diffusion model's checkpoint they are those of its first stage, the autoencoder.

    Raises:
        ForeignError: If there is none, or it is damaged, or holds more than tensors.
    """
    path = Path(source)
    if not path.exists():
        raise ForeignError(f"{path}: there is no such file or folder")
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            if (path / "vae" / "config.json").is_file():
                raise ForeignError(f"{path}: a pipeline of diffusers; name its folder vae")
            raise ForeignError(f"{path}: holds none of {', '.join(FILES)}; name the file itself")
        path = found[0]
    if not path.is_file():
        raise ForeignError(f"{path}: is neither a file nor a folder")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = _tensors(path)
    except ForeignError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise ForeignError(
            f"{path}: a damaged pickle, or one that holds more than tensors{what}, and nothing of "
            "it is run; save the state_dict alone"
        ) from error
    except Exception as error:  # whatever a parser throws at a damaged file
        reason = shown((str(error) or "no message").splitlines()[0])
        raise ForeignError(
            f"{path}: cannot be read ({type(error).__name__}: {reason}); it may be damaged or cut "
            "short, or hold something else than tensors"
        ) from error
    if not tensors:
        raise ForeignError(f"{path}: holds no tensors")
    for name, t in tensors.items():
        _check_plain(path, name, t)
    for prefix in ("module.", FIRST_STAGE):  # as DataParallel saves them; the first stage alone
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if own and (len(own) == len(tensors) or "encoder.conv_in.weight" in own):
            tensors = own
    return Weights(tensors, path)


def _check_plain(path: Path, name: str, t: Tensor) -> None:
    plain = t.layout == torch.strided and t.device.type == "cpu"
    plain = plain and not (t.is_quantized or t.is_nested)
    if plain and t.numel() * t.element_size() <= t.untyped_storage().nbytes():
        return
    raise ForeignError(f"{path}: {shown(name)} is no plain tensor with all of its elements")


def _tensors(path: Path) -> dict[str, Tensor]:
    import numpy as np

    if path.name.endswith(".index.json"):
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = sorted({str(name) for name in index["weight_map"].values()})
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in shards):
            raise ForeignError(f"{path}: names shards that are not .safetensors files beside it")
        parts = [_tensors(path.parent / name) for name in shards]
        return {name: t for part in parts for name, t in part.items()}
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(2)
        if path.suffix == ".npz" or start not in (b"\x80\x02", b"\x80\x04"):
            raise ForeignError(
                f"{path}: neither .safetensors, nor .npz, nor a file of torch.save; if it was "
                "one, it is cut short or damaged, so copy it again"
            )
        return _state(path)
    with zipfile.ZipFile(path) as archive:
        if sum(i.file_size for i in archive.infolist()) > 3e7 + 30 * path.stat().st_size:
            raise ForeignError(f"{path}: claims to hold far more than it does")
        damaged = archive.testzip()  # torch does not look at the checksums itself
    if damaged is not None:
        raise ForeignError(f"{path}: {shown(damaged)} in it is damaged, so copy it again")
    if path.suffix != ".npz":
        return _state(path)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    if len({name.removesuffix(":0") for name in arrays}) < len(arrays):
        raise ForeignError(f"{path}: holds two arrays of one name, with and without ':0'")
    return {
        name.removesuffix(":0"): torch.from_numpy(np.ascontiguousarray(a).reshape(a.shape))
        for name, a in arrays.items()
    }


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if "musigma" in (file.metadata() or {}):
            raise ForeignError(f"{path}: is a checkpoint of musigma's already")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of torch.save, a few levels down at most."""
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    for _ in range(4):
        if not isinstance(state, Mapping):
            raise ForeignError(f"{path}: holds one {type(state).__name__}, and no state dict")
        if any(isinstance(v, Tensor) for v in state.values()):
            return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
        inner = [state[key] for key in NESTED if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = inner[0]
    raise ForeignError(f"{path}: holds no state dict under any of {', '.join(NESTED)}")
