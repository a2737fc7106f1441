"""Other people's checkpoints as musigma models, proved against the originals' own code.

`convert` reads a file or a folder, says what it is, and builds the model that computes the same
numbers; `export` writes one back where the other side can represent it. Pickles are read with
torch's `weights_only` alone, so nothing in a file is ever run. What a format cannot represent, and
what a file lacks, is a `ForeignError` that names the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from musigma.convert import autoencoder_kl, chaiyujin, mlp_vae, openai_glow, rosinality
from musigma.convert.weights import ForeignError, Options, Weights, read, shown
from musigma.model import Model

__all__ = ["FAMILIES", "Converted", "Family", "ForeignError", "Options", "convert", "export"]


class Converted(NamedTuple):
    """What `convert` returns.

    Attributes:
        model: In evaluation mode, on the CPU.
        family: Whose checkpoint it was.
        about: What a checkpoint should keep of the source, as JSON values: for `export`, and for
            bringing data to the form that the model was trained on.
    """

    model: Model
    family: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A known kind of checkpoint.

    Attributes:
        what: In a line, for people.
        names: Regular expressions of its parameters' names.
        ignored: Of names that may be there beside them, and are no part of the model.
        build: Weights and options to the model, in float64, once `Weights.finish` has passed.
        asks: The options that it understands.
    """

    what: str
    names: tuple[str, ...]
    build: Callable[[Weights, Options], Model]
    asks: tuple[str, ...]
    ignored: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "chaiyujin": Family(
        "chaiyujin/glow-pytorch, a Glow",
        chaiyujin.NAMES,
        chaiyujin.build,
        ("permutation", "labels", "bits"),
    ),
    "rosinality": Family(
        "rosinality/glow-pytorch, a Glow", rosinality.NAMES, rosinality.build, ("size", "bits")
    ),
    "openai-glow": Family(
        "openai/glow, its variables as .npz",
        openai_glow.NAMES,
        openai_glow.build,
        ("size", "bits"),
        openai_glow.IGNORED,
    ),
    "diffusers": Family(
        "diffusers AutoencoderKL, a folder with config.json",
        autoencoder_kl.DIFFUSERS,
        autoencoder_kl.from_diffusers,
        ("size", "bits", "std"),
    ),
    "compvis": Family(
        "a KL autoencoder of CompVis/latent-diffusion, or inside Stable Diffusion",
        autoencoder_kl.COMPVIS,
        autoencoder_kl.from_compvis,
        ("size", "bits", "std", "groups"),
        autoencoder_kl.COMPVIS_IGNORED,
    ),
    "bits-back": Family(
        "a torch VAE of bits-back/bits-back", mlp_vae.BITS_BACK, mlp_vae.from_bits_back, ()
    ),
    "pythae": Family(
        "a pythae VAE or BetaVAE folder", mlp_vae.PYTHAE, mlp_vae.from_pythae, ("bits",)
    ),
}
"""Every known kind of checkpoint by its name."""


def convert(
    source: str | Path,
    *,
    family: str | None = None,
    options: Options | None = None,
    dtype: torch.dtype | None = None,
) -> Converted:
    """The musigma model that computes what a foreign checkpoint computes.

    Args:
        source: A file, or a folder that one was saved into.
        family: A key of `FAMILIES`; None: found by the names of the parameters.
        options: What the file does not say; each family asks for some.
        dtype: Of the result. None: that of the source where it holds every converted number
            without rounding, and float64 elsewhere (where an activation norm was folded into a
            convolution, say).

    Raises:
        ForeignError: If the file cannot be read, is of no known kind, or holds other parameters
            than its kind calls for: the first five differences, and the nearest known format.
        ValueError: For an unknown family, or an option that the family does not ask for.

    Example:
        >>> convert("nothing.pt")
        Traceback (most recent call last):
        ...
        musigma.convert.weights.ForeignError: nothing.pt: there is no such file or folder
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(f"from: expected one of {', '.join(FAMILIES)}; got {family!r}")
    weights, options = read(source), options or Options()
    shares = {n: weights.share(known.names, known.ignored) for n, known in FAMILIES.items()}
    nearest = max(shares, key=lambda name: shares[name])
    near = f"{nearest} ({FAMILIES[nearest].what}), which knows {shares[nearest]:.0%} of the names"
    if family is None and shares[nearest] < 0.5:
        some = shown(", ".join(list(weights.tensors)[:5]))
        hint = f"; the nearest known format is {near}" if shares[nearest] else ""
        raise ForeignError(
            f"{source}: of no known kind; it holds {len(weights.tensors)} tensors, the first are "
            f"{some}{hint}. Known are {', '.join(FAMILIES)} (--from forces one)"
        )
    name = family or nearest
    known = FAMILIES[name]
    for option in options.given():
        if option not in known.asks:
            raise ValueError(f"{option}: a checkpoint of {name} leaves no such choice")
    weights.kind, weights.nearest = f"{name} ({known.what})", near
    weights.ignore(known.ignored)
    try:
        model = known.build(weights, options)
    except ForeignError as error:
        strange = weights.strange((*known.names, *known.ignored))
        if "nearest known format" in str(error) or (name == nearest and not strange):
            raise
        others = "".join(f"; {shown(other)} is not part of it" for other in strange[:4])
        raise ForeignError(f"{error}{others}. The nearest known format is {near}") from error
    target = dtype or weights.narrowest(model)
    about = {
        "foreign": {
            "family": name,
            "source": Path(source).name,
            "config": weights.beside("config.json") if name == "diffusers" else None,
            "dtype": str(weights.dtype).removeprefix("torch."),
        },
        "data": {"preprocess": _preprocess(model)},
    }
    return Converted(model.to(target).eval(), name, about)


def _preprocess(model: Model) -> dict[str, Any]:
    """How images are to be treated for this model."""
    bits, shape = model.config["options"]["bits"], model.config["shape"]
    size = shape[1] if len(shape) == 3 and shape[1] == shape[2] else None
    if bits == 1:  # drawn by the grey value: what cross-entropy with greys is the mean of
        return {"size": size, "binarize": "dynamic"}
    return {"size": size, "bits": bits or 8}


def export(model: Model, about: dict[str, Any], out: str | Path, *, family: str) -> None:
    """Write a model as another library's checkpoint: the inverse of `convert`.

    Args:
        model: One that the family can represent; for `diffusers` an `autoencoder_kl`.
        about: What `convert` said of it, or an empty dictionary.
        out: The folder to write.
        family: `diffusers`.

    Raises:
        ValueError: If the family is another, or cannot represent the model: the option is named.
        OSError: If it cannot be written; what was there before stays.
    """
    if family != "diffusers":
        raise ValueError(f"to: the one format that can be written is 'diffusers'; got {family!r}")
    autoencoder_kl.to_diffusers(model, about.get("foreign", {}), Path(out))
