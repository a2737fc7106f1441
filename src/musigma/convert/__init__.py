"""Other libraries' checkpoints as musigma models, verified against the original code.

`convert` reads a file or a folder, recognizes it by the names of its parameters, and builds the
model that computes the same numbers; `export` writes one back where the other library can
represent it. Nothing in a file is ever run. `from_flow` converts flows of zuko, nflows and
normflows from the objects themselves. If a format cannot represent
a model, or a file lacks something, a `ForeignError` names the parameter. Options that a file does
not determine must be given, or have a default that a note names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from musigma.convert import autoencoder_kl, glows, mlp_vae
from musigma.convert.flows import from_flow
from musigma.convert.reading import ForeignError, printable, read
from musigma.convert.selection import select
from musigma.convert.weights import Family, Options, Weights
from musigma.model import Model

__all__ = [
    "FAMILIES",
    "Converted",
    "Family",
    "ForeignError",
    "Options",
    "convert",
    "export",
    "from_flow",
]


class Converted(NamedTuple):
    """The result of `convert`.

    Attributes:
        model: In evaluation mode, on the CPU.
        family: The kind of checkpoint that it was.
        about: JSON values that a checkpoint should keep of the source: for `export`, and for
            preparing data as the model was trained on them. `about["foreign"]["notes"]` is
            `notes`.
    """

    model: Model
    family: str
    about: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        """Lines that say what was read, left out and assumed."""
        return self.about["foreign"]["notes"]


FAMILIES: dict[str, Family] = {
    "chaiyujin": glows.CHAIYUJIN,
    "rosinality": glows.ROSINALITY,
    "openai-glow": glows.OPENAI,
    "diffusers": autoencoder_kl.DIFFUSERS,
    "compvis": autoencoder_kl.COMPVIS,
    "bits-back": mlp_vae.BITS_BACK,
    "pytorch-examples": mlp_vae.PYTORCH_EXAMPLES,
    "pythae": mlp_vae.PYTHAE,
}
"""Every known kind of checkpoint by its name."""


def convert(
    source: str | Path,
    *,
    family: str | None = None,
    options: Options | None = None,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
) -> Converted:
    """The musigma model that computes what a foreign checkpoint computes.

    Args:
        source: A file, or a folder that one was saved into.
        family: A key of `FAMILIES`; None: recognized by the names of the parameters.
        options: What the file does not determine; each family takes some of them.
        weights: `raw` or `averaged` where the file holds both, or the prefix of one of several
            sets of weights; None: the raw ones.
        dtype: Type of the result. None: that of the source if it holds every converted number
            without rounding, otherwise float64 (where an activation norm was folded into a
            convolution, say).

    Raises:
        ForeignError: If the file cannot be read, is of no known kind, fits two kinds that read
            the same parameters differently, holds several sets of weights of which none is named,
            or its parameters differ from those of its kind: the first five differences, and the
            nearest known format.
        ValueError: For an unknown family, or an option that the family does not take.

    Example:
        >>> convert("nothing.pt")
        Traceback (most recent call last):
        ...
        musigma.convert.reading.ForeignError: nothing.pt: there is no such file or folder
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"from: expected one of {', '.join(FAMILIES)}; got {family!r}")
    options = options or Options()
    found = select(read(source), FAMILIES, family, weights)
    shares = {name: found.share(known) for name, known in FAMILIES.items()}
    nearest = max(shares, key=lambda name: shares[name])

    def share(name: str) -> str:
        return f"{name} ({FAMILIES[name].what}), which knows {shares[name]:.0%} of the names"

    name = family or _family(source, found, shares, share(nearest), options)
    known = FAMILIES[name]
    nearest = name if shares[name] == shares[nearest] else nearest
    near = share(nearest)
    for option in options.given():
        if option not in known.asks:
            raise ValueError(f"{option}: does not apply to a checkpoint of {name}; leave it out")
    found.kind, found.nearest = f"{name} ({known.what})", near
    found.ignore(known.ignored)
    try:
        model = known.build(found, options)
    except ForeignError as error:
        unknown = found.unknown(known)
        if "nearest known format" in str(error) or (name == nearest and not unknown):
            raise
        others = "".join(f"; {printable(other)} is not part of it" for other in unknown[:4])
        raise ForeignError(f"{error}{others}. The nearest known format is {near}") from error
    about = {
        "foreign": {
            "family": name,
            "source": Path(source).name,
            "config": found.beside("config.json") if name == "diffusers" else None,
            "dtype": str(found.dtype).removeprefix("torch."),
            "notes": found.notes,
        },
        "data": {"preprocess": _preprocess(model)},
    }
    return Converted(model.to(dtype or found.narrowest(model)).eval(), name, about)


def _family(
    source: str | Path, found: Weights, shares: dict[str, float], near: str, options: Options
) -> str:
    """The family that knows most of the names; of two with the same names, that of the format."""
    best = max(shares.values())
    if best < 0.5:
        some = printable(", ".join(list(found.tensors)[:5]))
        held = (
            f"{len(found.tensors)} tensors, the first are {some}"
            if some
            else "no tensors of a model"
        )
        hint = f"; the nearest known format is {near}" if best else ""
        raise ForeignError(
            f"{source}: not a known kind of checkpoint; it holds {held}{hint}. Known kinds: "
            f"{', '.join(FAMILIES)} (--from selects one)"
        )
    names = [name for name, share in shares.items() if share == best]
    fitting = [name for name in names if FAMILIES[name].format == options.format] or names
    if len(fitting) == 1:
        return fitting[0]
    readings = " or ".join(f"--format {FAMILIES[n].format} ({FAMILIES[n].what})" for n in fitting)
    raise ForeignError(
        f"format: {source} has the parameter names of {' and of '.join(fitting)}, which read the "
        f"scale of q(z | x) differently; give {readings}"
    )


def _preprocess(model: Model) -> dict[str, Any]:
    """How images are prepared for this model."""
    bits, shape = model.config["options"]["bits"], model.config["shape"]
    size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else None
    if bits == 1:  # cross-entropy with gray values is the mean over such draws
        return {"size": size, "binarize": "dynamic"}
    return {"size": size, "bits": bits or 8}


def export(model: Model, about: dict[str, Any], out: str | Path, *, family: str) -> None:
    """Write a model as another library's checkpoint: the inverse of `convert`.

    Args:
        model: One that the family can represent; for `diffusers` an `autoencoder_kl`.
        about: The `about` that `convert` returned, or an empty dictionary.
        out: The folder to write.
        family: `diffusers`.

    Raises:
        ValueError: If the family is another, or cannot represent the model: the option is named.
        OSError: If it cannot be written; what was there before stays.
    """
    if family != "diffusers":
        raise ValueError(f"to: the only format that can be written is 'diffusers'; got {family!r}")
    autoencoder_kl.to_diffusers(model, about.get("foreign", {}), Path(out))
