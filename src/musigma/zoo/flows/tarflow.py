"""TarFlow: autoregressive transforms of the patches of images, by causal transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from musigma.distributions import StandardNormal
from musigma.gaussian import Format
from musigma.layers import ActNorm, Affine, Autoregressive, Flip, Squeeze
from musigma.model import VAE, Chain, Layer, Prior
from musigma.nets import CausalTransformer
from musigma.zoo import architecture, at_least
from musigma.zoo.flows.glow import dequantization
from musigma.zoo.noise import noisy
from musigma.zoo.parts import data_layers, patches


@architecture
def tarflow(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    patch: int = 4,
    depth: int = 4,
    width: int = 128,
    heads: int = 4,
    blocks: int = 2,
    format: str = "halves softclip",
    noise: Literal["uniform", "learned", "gaussian"] = "uniform",
    noise_std: float = 0.05,
    alpha: float | None = None,
    context: int = 0,
) -> Chain | VAE:
    """TarFlow (Zhai et al., 2024, arXiv:2412.06329).

    Each transform is an affine map of every patch, given the patches before it; the order is
    reversed from one transform to the next. Densities take one pass. Samples take up to one pass
    for each patch and transform; `Autoregressive` computes several patches in each where that is
    faster. An activation normalization of the patches comes first, and scales are bounded; the
    first patch is transformed too, by learned constants, or given the context.

    With `noise` uniform or learned, the model is a flow of dequantized data, and its figures bound
    the code length of the data. With gaussian, the flow is of data with Gaussian noise, as the
    paper's models that draw the best samples, and the figures are those of `musigma.zoo.noise`:
    they bound the code length of the data too, and are larger by what the noise costs.
    `musigma.zoo.noise.denoised` draws samples without the noise.

    Args:
        shape: (C, H, W), with sides that `patch` divides.
        bits: Bits of each element; None for continuous images.
        patch: Side of a patch.
        depth: Number of transforms.
        width: Width of the transformers.
        heads: Number of heads of their attention, a divisor of the width.
        blocks: Number of blocks of each transformer.
        format: How each transform reads its network's output, as `Format.parse` takes it. The
            paper's is "halves log_std", which is not bounded.
        noise: Noise that is added to the data: `uniform`, to levels; `learned`, to levels, as in
            glow; or `gaussian`.
        noise_std: Standard deviation of Gaussian noise, where levels run from -1 to 1.
        alpha: Margin of a logit that maps [0, 1] to the real line before all other layers, for
            data with bits; None for no logit, as in the paper.
        context: Number of features of the context; it conditions the transforms.
    """
    at_least(1, depth=depth, width=width, heads=heads, blocks=blocks)
    features, rows, columns = patches(shape, patch)
    layers: list[Layer] = []
    if noise != "gaussian":
        dequantize = dequantization(shape, bits, noise, width, context)
        layers = data_layers(shape, bits, alpha, low=-0.5, noise=dequantize)
    elif alpha is not None:
        raise ValueError("alpha: noise is gaussian, and a logit takes no value outside of [0, 1]")
    layers += [Squeeze(patch), ActNorm(features)]
    affine = Affine(Format.parse(format))
    for _ in range(depth):
        net = CausalTransformer(
            affine.owners(features),
            rows * columns,
            width=width,
            heads=heads,
            blocks=blocks,
            context=context,
            zero=True,
        )
        layers += [Autoregressive(net, map=affine), Flip()]
    flow = Chain(layers[:-1], Prior(StandardNormal((features, rows, columns))))
    if noise != "gaussian":
        return flow
    return noisy(flow, shape, None if bits is None else 2**bits, noise_std)
