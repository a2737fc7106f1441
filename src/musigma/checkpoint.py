"""Checkpoints: a model as one safetensors file, with its configuration in the header.

The header's metadata holds the version of the format, the configuration of the architecture,
values that the caller adds (for example, how data were prepared), and a digest of the header and
of every tensor. A file with a changed byte is refused. Nothing is ever unpickled, and a file never
causes code to be imported: the caller must register an architecture that is not in the zoo.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from musigma import __version__
from musigma.files import replacing, usual_rights
from musigma.model import Model
from musigma.zoo import ARCHITECTURES, SPECIFIED, build, spec_of
from musigma.zoo.flows.glow import from_format_1

__all__ = [
    "CheckpointError",
    "digest",
    "load",
    "padded",
    "read",
    "rebuild",
    "save",
    "verified",
    "write",
]

FORMAT = "musigma/2"

Contents = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]  # config, extra, tensors


def _from_1(config: dict[str, Any], extra: dict[str, Any], tensors: dict[str, Tensor]) -> Contents:
    """Migrate format 1, in which the only context was class labels and fewer networks took it.

    The other networks now have additional input channels, whose weights are zero for these files.
    Some options of `glow` have moved to `published_glow`.
    """
    config = from_format_1(config)
    classes = config["options"].get("context") or 0
    if classes and "context" not in config:
        described = extra.get("data")
        labels = described.get("label_names") if isinstance(described, Mapping) else None
        if isinstance(labels, Sequence) and len(labels) == classes:
            variable = {"name": "label", "classes": classes, "names": list(labels)}
            config = {**config, "context": [variable]}
    return config, extra, tensors


MIGRATIONS: dict[str, tuple[str, Callable[..., Contents]]] = {"musigma/1": (FORMAT, _from_1)}
"""For each earlier format, the next format and the function that converts contents to it."""


class CheckpointError(ValueError):
    """A file cannot be loaded as a checkpoint."""


def save(model: Model, path: str | Path, *, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model from the zoo as one file, completely or not at all.

    Args:
        model: Built by an `architecture`.
        path: The file to write or replace.
        extra: Additional JSON values for the header, which `read` returns.

    Raises:
        ValueError: If the model was composed by hand, so no configuration rebuilds it.
        OSError: If the file cannot be written; an existing file does not change.
    """
    require_config(model)
    header = {
        "format": FORMAT,
        "version": __version__,
        "config": dict(model.config),
        "extra": dict(extra or {}),
    }
    write(path, header, model.state_dict())


def require_config(model: Model) -> None:
    """Refuse a model that has no configuration, so that a file could not rebuild it.

    Raises:
        ValueError: If it was composed by hand.
    """
    if not model.config:
        raise ValueError(
            "model: this one was composed by hand, so a checkpoint could not rebuild it; "
            "decorate its builder with @musigma.architecture, or save model.state_dict() instead"
        )


def write(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, a header of JSON values, and a digest of both, completely or not at all.

    Raises:
        OSError: If the file cannot be written; an existing file does not change.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    plain = json.loads(json.dumps(header))  # as a reader gets it: string keys, lists for tuples
    plain["digest"] = digest(plain, tensors)
    metadata = {"musigma": json.dumps(plain, sort_keys=True)}  # one key: several have no order
    with replacing(path) as draft, usual_rights(draft):
        try:
            save_file(tensors, draft, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def load(path: str | Path) -> Model:
    """The model in a checkpoint, in evaluation mode on the CPU.

    Raises:
        CheckpointError: If the file is missing, damaged or of another format, or if its weights do
            not fit its configuration.
    """
    return read(path)[0]


def read(path: str | Path) -> tuple[Model, dict[str, Any]]:
    """The model in a checkpoint, and the `extra` values that were saved with it.

    Raises:
        CheckpointError: As `load`.
    """
    path = Path(path)
    header, tensors = verified(path)
    config, extra, version = header["config"], header["extra"], header["format"]
    while version != FORMAT:
        if version not in MIGRATIONS:
            raise CheckpointError(
                f"{path}: written in format {version} by musigma {header['version']}, and this "
                f"is musigma {__version__}, which reads {FORMAT}; upgrade musigma"
            )
        version, migrate = MIGRATIONS[version]
        config, extra, tensors = migrate(config, extra, tensors)
    name = config["architecture"]
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: holds the architecture {name!r}, which is not in the zoo; if you trust the "
            f"file that defines it, give it (--plugin FILE.py:{name})"
        )
    try:
        model = rebuild(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its configuration does not build a {name}: {error}"
        ) from error
    if header["format"] == "musigma/1" and config["options"].get("context"):
        model.former_digest = digest(header["config"], tensors)
        tensors = padded(model, tensors)
    _fill(model, tensors, path)
    return model.eval(), extra


def rebuild(config: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Model:
    """The model of a config, with random weights.

    Args:
        config: As `Model.config`, of any format.
        extra: The values saved with it, which hold the class names in format 1.
    """
    config, _, _ = _from_1(dict(config), dict(extra or {}), {})
    spec = spec_of(config)
    stored = spec if any(name in config for name in SPECIFIED) else config["shape"]
    return build(config["architecture"], stored, **config["options"])


def padded(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name_of: Callable[[str], str] = lambda key: key,
) -> dict[str, Tensor]:
    """Tensors of format 1, with zeros for the input channels of a context they did not take.

    Args:
        model: The model, as it is built now.
        tensors: Weights, or what belongs to them.
        name_of: From a key to the name of the weight.
    """
    options = getattr(model, "config", {}).get("options", {})
    features, wanted = options.get("context") or 0, model.state_dict()
    result = dict(tensors)
    for key, t in tensors.items():
        like = wanted.get(name_of(key))
        if features and like is not None and t.ndim > 1 and like.shape[1] - t.shape[1] == features:
            room = t.new_zeros(t.shape[0], features, *t.shape[2:])
            result[key] = torch.cat([t, room], 1)
    return result


def verified(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file that `write` wrote.

    Raises:
        CheckpointError: If the file is missing, damaged, or was not written by `write`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a checkpoint is a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it may be cut short or damaged, "
            "so copy it again; another library's checkpoint is read by `musigma convert`"
        ) from error
    if "musigma" not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file, but not one that musigma wrote; `musigma convert` reads "
            "those of some other libraries"
        )
    try:
        header = json.loads(metadata["musigma"])  # the same for 1E-5 and 1e-05, hence `same`
        same = json.dumps(header, sort_keys=True) == metadata["musigma"]
        stored = header.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        header, same, stored = {}, False, None
    if not same or not _padded_by_spaces(path) or stored != digest(header, tensors):
        raise CheckpointError(
            f"{path}: its content does not match its digest, so it was changed or damaged after "
            "it was written; copy it again"
        )
    return header, tensors


def _padded_by_spaces(path: Path) -> bool:
    """Whether only spaces follow the header's JSON; JSON would allow any whitespace."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return header.rstrip(b" ").endswith(b"}")


def _fill(model: Model, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in given]
    wrong += [f"{name} is not part of the model" for name in given if name not in wanted]
    wrong += [
        f"{name} has shape {given[name]} and not {shape}"
        for name, shape in wanted.items()
        if given.get(name, shape) != shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{path}: its weights do not fit its configuration: {'; '.join(wrong[:5])}{more}"
        )
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(dict(tensors))


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A 128-bit hash of a header and of every tensor's name, type, shape and bytes, as hex."""
    state = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name].detach().cpu()
        state.update(f"{name}\0{t.dtype}\0{tuple(t.shape)}\0".encode())
        state.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
