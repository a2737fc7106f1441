"""The semi-supervised VAE: of examples of which some have a label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.distributions import OneHotLatents
from musigma.model import VAE, Model, Prior
from musigma.nets import MLP, ConvEncoder, Scaled
from musigma.trace import Trace
from musigma.zoo import architecture, at_least
from musigma.zoo.vaes.two_stage import recomposed
from musigma.zoo.vaes.vae import vae


@architecture
def m2(
    shape: Sequence[int],
    *,
    bits: int | None = 8,
    net: Literal["auto", "mlp", "conv"] = "auto",
    latents: int = 32,
    width: int | None = None,
    blocks: int = 1,
    weight: float = 100.0,
    likelihood: str = "auto",
    components: int = 5,
    std: str | float = "emitted",
    standardize: Literal["quantile"] | bool = False,
    context: int = 0,
) -> Model:
    """Model M2 of Kingma, Mohamed, Rezende, Welling, 2014, arXiv:1406.5298.

    Labels may be missing: empty cells of the column `label`, -1 in an .npz file, or rows of zeros
    in place of one-hot rows. Evaluations report the accuracy of the classifier on examples that
    have one. See `SemiSupervisedVAE`.

    Args:
        shape: (C, H, W) of any size, or (D,).
        bits: Bits of each element; None for continuous data.
        net: As in `vae`, and so are the next three.
        latents: Dimensions of z.
        width: Width of the networks.
        blocks: Hidden layers, or residual blocks at each size.
        weight: Weight of log q(y | x) of examples with a label, in nats.
        likelihood: As in `vae`.
        components: Number of components of a `logistic-mixture`.
        std: Standard deviation of a `gaussian` likelihood, as in `vae`.
        standardize: As in `vae`.
        context: Number of classes (``--given label``).
    """
    at_least(1, latents=latents)
    if context < 2:
        raise ValueError(f"context: expected 2 or more classes (--given label); got {context}")
    size: Any = {"net": net, "latents": latents, "width": width, "blocks": blocks}
    scored: Any = {"likelihood": likelihood, "components": components, "std": std}
    scored |= {"bits": bits, "standardize": standardize, "context": context}
    model = vae(shape, prior="normal", **size, **scored)
    conv = net == "conv" or (net == "auto" and len(shape) == 3 and min(shape[1:]) >= 8)
    classifier: nn.Module
    if conv:
        classifier = ConvEncoder(shape, context, width=width or 48, halvings=2, blocks=blocks)
    else:
        inputs = torch.Size(shape).numel()
        classifier = MLP(inputs, context, hidden=[width or 400] * max(1, blocks))
    if bits is not None:
        classifier = Scaled(classifier, 2**bits)
    return recomposed(
        model, lambda m: SemiSupervisedVAE(classifier, m.encoder, m.decoder, m.prior, weight)
    )


m2.partly_labeled = True  # pyright: ignore[reportFunctionMemberAccess]

CERTAIN = 1e4
"""Logits of classes that a label excludes are lower by this: their probability is 0."""


class Classes(nn.Module):
    """The distribution of y: the label if there is one, and uniform otherwise."""

    def forward(self, context: Tensor) -> OneHotLatents:
        """The distribution, for one-hot rows, or rows of zeros, (B, C)."""
        return OneHotLatents(CERTAIN * context[:, None])


class SemiSupervisedVAE(VAE):
    r"""y ~ uniform or known, z ~ p(z), x ~ p(x | y, z), with q(y | x) and q(z | x, y).

    The context is y, or a row of zeros where it is not known. The bound of an example without a
    label is the exact expectation over the classes,

    .. math:: \log p(x) \ge \sum_y q(y|x) (E_q[\log p(x|y,z)] - KL(q(z|x,y) \| p(z)))
        - KL(q(y|x) \| p(y))

    and that of an example with a label is one of log p(x | y), the term of this y. Training adds
    weight · log q(y | x) for each label (`Evidence.auxiliary`). (Kingma, Mohamed, Rezende,
    Welling, "Semi-Supervised Learning with Deep Generative Models", 2014, arXiv:1406.5298.)

    Args:
        classifier: From x to logits (B, C).
        encoder: A head of z, given x and y.
        decoder: A head of x, given z and y.
        prior: p(z).
        weight: Nats.
    """

    partly_labeled = True
    classes: Any
    prior: Any

    def __init__(
        self,
        classifier: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Model,
        weight: float,
    ):
        super().__init__(encoder, decoder, prior)
        self.classifier, self.classes, self.weight = classifier, Prior(Classes()), weight

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """y ~ q(y | x) and z ~ q(z | x, y); then p(x | y, z)."""
        logits, q, p = self._classified(x, context)
        y = trace.latent(self.classes, q, p)[:, 0]
        z = trace.latent(self.prior, self.encoder(x, y), self.prior.head())
        trace.p(self, self.decoder(z, y), x)
        known, label = context.sum(1) > 0, context.argmax(1)
        log_q = -F.cross_entropy(logits, label, reduction="none")
        trace.auxiliary(self.classifier, self.weight * torch.where(known, log_q, 0.0))
        right = (logits.argmax(1) == label).to(log_q)
        trace.figure("accuracy", torch.where(known, right, torch.nan))

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """y, the one that is known or a draw, and z; then x ~ p(x | y, z)."""
        self._check(context)
        y = trace.p(self.classes, self.classes.head(context))
        z = self.prior.generate(trace)
        x = trace.p(self, self.decoder(z, y[:, 0]))
        if trace.scoring:
            trace.q(self.prior, self.encoder(x, y[:, 0]), z)
            trace.q(self.classes, self._classified(x, context)[1], y)
        return x

    def _classified(self, x: Tensor, context: Any) -> tuple[Tensor, OneHotLatents, OneHotLatents]:
        """The logits of the classifier, q(y | x), which is the label where it is known, and p."""
        self._check(context)
        logits = self.classifier(x)
        known = context.sum(1, keepdim=True) > 0
        q = torch.where(known, CERTAIN * context, logits)
        return logits, OneHotLatents(q[:, None], gradient="enumerate"), self.classes.head(context)

    @staticmethod
    def _check(context: Any) -> None:
        if context is None:
            raise ValueError("context: expected labels, one-hot rows or rows of zeros; got none")

    def predict(self, x: Tensor) -> Tensor:
        """q(y | x), (B, C)."""
        return self.classifier(x).softmax(1)

    def latents(self) -> Iterator[nn.Module]:
        """y, then z."""
        yield from (self.classes, self.prior)

    def variables(self) -> Iterator[nn.Module]:
        """y, z, and the observation."""
        yield from (*self.latents(), self)

    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Nothing: the prior of z is N(0, I)."""
