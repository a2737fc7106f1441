"""The convolutional autoencoder of latent diffusion, as a VAE."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from musigma.distributions import StandardNormal, StandardUniform
from musigma.gaussian import Format, GaussianHead
from musigma.layers import Dequantize, Rescale
from musigma.model import VAE, Chain, Model, Prior
from musigma.nets.attention import attend
from musigma.zoo import architecture, at_least
from musigma.zoo.parts import image_shape

FORMAT = Format(scale="log_var", bounds=(-15.0, 10.0))
"""Halves; the second is a log variance, clamped to [-30, 20]."""


@architecture
def autoencoder_kl(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    widths: Sequence[int] = (64, 128),
    blocks: int = 1,
    latents: int = 4,
    embedded: int | None = None,
    groups: int = 32,
    attend: Sequence[int] = (),
    attend_middle: bool = True,
    quant: bool = True,
    post_quant: bool = True,
    std: float = 0.1,
) -> Model:
    """The KL autoencoder of latent diffusion (Rombach et al., 2022, arXiv:2112.10752).

    Residual networks between images in [-1, 1] and a grid of latents: the architecture of
    `AutoencoderKL` in diffusers, with its parameter names. The original was trained with
    additional losses and has no likelihood; here p(x | z) is a Gaussian around the decoded image.

    Args:
        shape: (C, H, W), with sides that can be halved ``len(widths) - 1`` times.
        bits: Bits of each element; None for continuous images in [-1, 1].
        widths: Channels at each size, from the full size down.
        blocks: Number of residual blocks at each size (one more in the decoder).
        latents: Channels of the latents inside the encoder and decoder networks.
        embedded: Channels of z, if the 1x1 convolutions change them; None: `latents`.
        groups: Number of groups of the group normalizations.
        attend: Sizes, counted from 0, at which self-attention follows every block.
        attend_middle: Use self-attention between the two blocks of the smallest size.
        quant: Use a 1x1 convolution after the encoder.
        post_quant: Use a 1x1 convolution before the decoder.
        std: Standard deviation of p(x | z), in units of images in [-1, 1].
    """
    channels, height, width = image_shape(shape)
    at_least(1, blocks=blocks, latents=latents, embedded=embedded, groups=groups)
    by = 2 ** (len(widths) - 1)
    if not widths or height % by or width % by:
        raise ValueError(f"widths: {height}x{width} cannot be halved {len(widths) - 1} times")
    if any(w < 1 or w % groups for w in widths):
        raise ValueError(f"groups: {groups} does not divide all of the widths {list(widths)}")
    z = latents if embedded is None else embedded
    if z != latents and not (quant and post_quant):
        raise ValueError("embedded: a number other than `latents` needs quant and post_quant")
    if std <= 0:
        raise ValueError(f"std: expected a positive number; got {std}")
    levels, small = range(len(widths)), widths[-1]

    def stage(level: int, before: int, blocks: int, **resize: bool) -> Stage:
        attentions = blocks if level in attend else 0
        return Stage(before, widths[level], groups, blocks, attentions, **resize)

    down = (stage(i, widths[max(i - 1, 0)], blocks, halve=i < levels[-1]) for i in levels)
    encoder = Network(
        conv_in=nn.Conv2d(channels, widths[0], 3, padding=1),
        down_blocks=nn.Sequential(*down),
        mid_block=Stage(small, small, groups, 2, int(attend_middle)),
        conv_norm_out=norm(groups, small),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(small, 2 * latents, 3, padding=1),
        quant_conv=nn.Identity(),
    )
    up = (stage(i, widths[min(i + 1, levels[-1])], blocks + 1, double=i > 0) for i in levels[::-1])
    decoder = Network(
        post_quant_conv=nn.Identity(),
        conv_in=nn.Conv2d(latents, small, 3, padding=1),
        mid_block=Stage(small, small, groups, 2, int(attend_middle)),
        up_blocks=nn.Sequential(*up),
        conv_norm_out=norm(groups, widths[0]),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[0], channels, 3, padding=1),
    )
    if quant:
        encoder.quant_conv = nn.Conv2d(2 * latents, 2 * z, 1)
    if post_quant:
        decoder.post_quant_conv = nn.Conv2d(z, latents, 1)
    likelihood = GaussianHead(decoder, event_ndims=3, log_std=math.log(std))
    prior = Prior(StandardNormal((z, height // by, width // by)))
    vae = VAE(GaussianHead(encoder, event_ndims=3, format=FORMAT), likelihood, prior)
    if bits is None:
        return vae
    noise = Dequantize(StandardUniform(shape), 2**bits)
    return Chain([noise, Rescale(2 / 2**bits, -1.0)], vae)


class Network(nn.Sequential):
    """Named modules, one after the other, none of which takes a context."""

    def __init__(self, **modules: nn.Module):
        super().__init__(OrderedDict(modules))

    def forward(self, input: Tensor, context: Tensor | None = None) -> Tensor:
        """The output of the last module."""
        return super().forward(input)


class Stage(nn.Module):
    """Residual blocks, the first of which are followed by attention, and a change of size.

    The sides are halved by a convolution with padding at the bottom and the right only, and
    doubled by repeating pixels before a convolution.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        groups: int,
        blocks: int,
        attentions: int,
        *,
        halve: bool = False,
        double: bool = False,
    ):
        super().__init__()
        self.attentions = nn.ModuleList(Attention(width, groups) for _ in range(attentions))
        self.resnets = nn.ModuleList(
            Residual(width if i else inputs, width, groups) for i in range(blocks)
        )
        self.downsamplers, self.upsamplers = nn.Sequential(), nn.Sequential()
        if halve:
            halved = nn.Conv2d(width, width, 3, stride=2)
            self.downsamplers.append(Network(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=halved))
        if double:
            conv = nn.Conv2d(width, width, 3, padding=1)
            self.upsamplers.append(Network(repeat=nn.Upsample(scale_factor=2.0), conv=conv))

    def forward(self, h: Tensor) -> Tensor:
        """The output."""
        for resnet, attention in itertools.zip_longest(self.resnets, self.attentions):
            h = resnet(h) if attention is None else attention(resnet(h))
        return self.upsamplers(self.downsamplers(h))


class Residual(nn.Module):
    """Two normalized 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, width: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = norm(groups, inputs), nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2, self.conv2 = norm(groups, width), nn.Conv2d(width, width, 3, padding=1)
        same = inputs == width
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Self-attention of one head over all pixels, around a shortcut."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = norm(groups, width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        h = attend(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


def norm(groups: int, width: int) -> nn.GroupNorm:
    """Group normalization with the epsilon of these networks."""
    return nn.GroupNorm(groups, width, eps=1e-6)
