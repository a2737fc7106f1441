"""The very deep VAE: a top-down ladder of many latents at every size of the image."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.distributions import data_of
from musigma.gaussian import DiagonalGaussian, Format, GaussianHead
from musigma.ladder import Ladder, LadderBlock
from musigma.memory import recomputed
from musigma.model import Model
from musigma.nets import Scaled, join
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import image_shape
from musigma.zoo.vaes.vae import chosen_likelihood, named_likelihood, over_data


@architecture
def vdvae(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    encoder: str = "auto",
    decoder: str = "auto",
    latents: int = 16,
    width: int = 64,
    bottleneck: float = 0.25,
    likelihood: str = "auto",
    components: int = 10,
    std: str | float = "emitted",
    context: int = 0,
) -> Model:
    """The very deep VAE (Child, 2021, arXiv:2011.10650).

    Sizes are written as in the paper's code, by heights. The paper's model of CIFAR-10 is
    ``--encoder 32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3 --decoder
    1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21 --width 384``. Gradients above a norm are skipped by
    the trainer (``--skip-above``), and every latent has a temperature of its own in `sample`.
    Small models learn sooner with ``--kl-warmup 0.4``.

    Args:
        shape: (C, H, W), at least 2x2.
        bits: Bits of each element; None for continuous images.
        encoder: Blocks from the image up: 16x3, three at height 16; 16d2, one, whose output is
            then averaged over 2x2 pixels. `auto`: two at every height under halving, down to 1.
        decoder: Blocks from the top, each with a latent: 16x3, three at height 16; 16m8, one at
            height 16, which begins with the state of height 8. `auto`: two at every height.
        latents: Channels of each latent.
        width: Channels of the state.
        bottleneck: Channels within the blocks, as a share of the width.
        likelihood: A name that `musigma.likelihood` takes; `auto` is `bernoulli` for
            1 bit, `gaussian` for continuous data, and `logistic-mixture` otherwise.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood: `emitted` by the network, one for each
            `channel` or `pixel`, `optimal` (the root mean squared error), or a number.
        context: Number of features of the context; it conditions encoder, priors and posteriors.
    """
    at_least(1, latents=latents, width=width, components=components)
    _, height, wide = image_shape(shape)
    name = chosen_likelihood(likelihood, bits)
    kind, levels = data_of(name), None if bits is None else 2**bits
    heights = [height]
    while heights[-1] > 1:
        heights.append(math.ceil(heights[-1] / 2))
    if encoder == "auto":
        encoder = ",".join([f"{h}x1,{h}d2" for h in heights[:-1]] + ["1x1"])
    if decoder == "auto":
        pairs = itertools.pairwise(reversed(heights))
        decoder = ",".join(["1x1", *(f"{above}m{below},{above}x1" for below, above in pairs)])
    middle = max(1, round(width * bottleneck))
    up = BottomUp(shape[0], width, middle, list(_parsed("encoder", encoder, "d")), context)
    sizes = up.sizes(height, wide)
    down = list(_parsed("decoder", decoder, "m"))
    if unknown := [h for h, _ in down if h not in sizes] or down[-1][0] != height:
        raise ValueError(
            f"decoder: expected heights of the encoder, {[*sizes]}, and the last one {height}; "
            f"got {unknown if isinstance(unknown, list) else decoder}"
        )
    up.heights = [h for h, _ in down]
    size: Any = {"latents": latents, "width": width, "middle": middle, "context": context}
    rungs = []
    for (h, _), after in itertools.zip_longest(down, down[1:]):
        larger = sizes[after[0]] if after is not None and after[1] is not None else None
        rungs.append(TopDownBlock(size=sizes[h], larger=larger, blocks=len(down), **size))

    def decode(channels: int) -> nn.Module:
        return nn.Conv2d(width, channels, 1)

    head = named_likelihood(name, shape, decode, levels or 2, components, std)
    bottom_up: nn.Module = up
    if levels:
        bottom_up = Scaled(up, levels if kind in ("levels", "counts") else 2)
    model = Ladder(bottom_up, rungs, head, (width, *sizes[down[0][0]]))
    return over_data(model, shape, bits, kind not in ("levels", "counts"))


def _parsed(option: str, text: str, letter: str) -> Iterator[tuple[int, int | None]]:
    """Heights of blocks, each with the number after `letter`, or None."""
    for word in text.split(","):
        match = re.fullmatch(rf"(\d+)([x{letter}])(\d+)", word.strip())
        if match is None or not int(match[1]) * int(match[3]):
            raise ValueError(f"{option}: expected words such as 16x3 or 16{letter}2; got {word!r}")
        if match[2] == "x":
            yield from [(int(match[1]), None)] * int(match[3])
        else:
            yield int(match[1]), int(match[3])


class Bottleneck(nn.Module):
    """Four convolutions after a GELU each, of 1x1, 3x3, 3x3 and 1x1; 1x1 for small maps."""

    recompute = False
    repeated = True

    def __init__(self, inputs: int, middle: int, outputs: int, *, small: bool, scale: float = 1.0):
        super().__init__()
        sizes = (1, 1, 1, 1) if small else (1, 3, 3, 1)
        channels = itertools.pairwise((inputs, middle, middle, middle, outputs))
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, k, padding=k // 2) for (a, b), k in zip(channels, sizes, strict=True)
        )
        with torch.no_grad():
            self.layers[-1].weight.mul_(scale)  # pyright: ignore

    @recomputed
    def forward(self, x: Tensor) -> Tensor:
        """What a residual block adds to its input, (B, outputs, H, W)."""
        for layer in self.layers:
            x = layer(F.gelu(x))
        return x


class Joined(nn.Module):
    """A network of maps, with the context as constant channels."""

    def __init__(self, net: nn.Module, context: int):
        super().__init__()
        self.net, self.context = net, context

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The output of the network."""
        return self.net(join(x, context, self.context))


class BottomUp(nn.Module):
    """Residual blocks from the image up, and the last map of the height of each latent."""

    def __init__(self, channels: int, width: int, middle: int, blocks, context: int):
        super().__init__()
        self.enter = Joined(nn.Conv2d(channels + context, width, 3, padding=1), context)
        self.down, self.heights = [down for _, down in blocks], list[int]()
        scale = math.sqrt(1 / len(blocks))
        self.blocks = nn.ModuleList(
            Bottleneck(width, middle, width, small=h < 3, scale=scale) for h, _ in blocks
        )
        self.expected = [h for h, _ in blocks]

    def sizes(self, height: int, wide: int) -> dict[int, tuple[int, int]]:
        """The sizes of the maps by their heights.

        Raises:
            ValueError: If a block is written for another height than its input has.
        """
        found = {height: (height, wide)}
        for expected, down in zip(self.expected, self.down, strict=True):
            if expected != height:
                raise ValueError(
                    f"encoder: at height {height}, the next block is for {expected}; a block that "
                    f"divides the height ends in d: {height}d2"
                )
            if down:
                height, wide = math.ceil(height / down), math.ceil(wide / down)
                found[height] = height, wide
        return found

    def forward(self, x: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """One map for each latent, top first."""
        h = self.enter(x, context)
        found = {h.shape[2]: h}
        for block, down in zip(self.blocks, self.down, strict=True):
            h = h + block(h)
            if down:
                h = F.avg_pool2d(h, down, ceil_mode=True)
            found[h.shape[2]] = h
        return [found[height] for height in self.heights]


class TopDownBlock(LadderBlock):
    """One latent: the network of its prior also adds to the state."""

    def __init__(
        self,
        latents: int,
        width: int,
        middle: int,
        context: int,
        size: tuple[int, int],
        larger: tuple[int, int] | None,
        blocks: int,
    ):
        small, scale = size[0] < 3, math.sqrt(1 / blocks)
        net = Bottleneck(width + context, middle, 2 * latents + width, small=small, scale=0.0)
        q = Bottleneck(2 * width + context, middle, 2 * latents, small=small)
        posterior = GaussianHead(Joined(q, context), event_ndims=3)
        merge = Merge(latents, width, middle, larger, small=small, scale=scale)
        super().__init__(Joined(net, context), posterior, merge)
        self.latents = latents

    def propose(self, state: Tensor, context: Any = None) -> tuple[DiagonalGaussian, Tensor]:
        """p(z | state), and the state with what the network adds."""
        h = self.prior(state, context)
        mean, log_std = Format().split(h[:, : 2 * self.latents])
        return DiagonalGaussian(mean, log_std, 3), state + h[:, 2 * self.latents :]


class Merge(nn.Module):
    """Add z to the state, a residual block, and enlarge the map for a larger next latent."""

    def __init__(
        self, latents: int, width: int, middle: int, larger, *, small: bool, scale: float
    ):
        super().__init__()
        self.enter, self.larger = nn.Conv2d(latents, width, 1), larger
        self.block = Bottleneck(width, middle, width, small=small, scale=scale)
        self.start = nn.Parameter(torch.zeros(width, *larger)) if larger else None
        with torch.no_grad():
            self.enter.weight.mul_(scale)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        state = state + self.enter(z)
        state = state + self.block(state)
        if self.start is None:
            return state
        return self.start + F.interpolate(state, self.larger, mode="nearest")
