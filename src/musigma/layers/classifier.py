"""An auxiliary classifier, so that latents represent the class."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from musigma.model import Layer
from musigma.tensors import at_least_float32
from musigma.trace import Trace

__all__ = ["Classifier"]


class Classifier(Layer):
    r"""The identity, with an auxiliary loss: a linear classifier predicts the class from h.

    .. math:: weight \cdot \log q(y | h), \quad q = softmax(W \bar h + b)

    with h averaged over the pixels, and y the context. Training maximizes this term
    (`Evidence.auxiliary`); it is not part of log p(x | y), nor of any figure. (Kingma & Dhariwal,
    "Glow", 2018, arXiv:1807.03039; `weight_y` in OpenAI's code, in bits of a label per bit per
    dimension.)

    Args:
        channels: Channels of h.
        classes: Number of classes: the features of the context.
        labels: `softmax`: each example has one class. `sigmoid`: each has any number of classes.
        weight: Nats of this term for each nat of log p(x).

    Raises:
        ValueError: For other labels.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        labels: Literal["softmax", "sigmoid"] = "softmax",
        weight: float = 1.0,
    ):
        super().__init__()
        if labels not in ("softmax", "sigmoid"):
            raise ValueError(f"labels: expected 'softmax' or 'sigmoid'; got {labels!r}")
        self.linear, self.labels, self.weight = nn.Linear(channels, classes), labels, weight
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def logits(self, h: Tensor) -> Tensor:
        """The logits of the classes, shape (B, classes), for h (B, channels, ...)."""
        return at_least_float32(self.linear(h.reshape(*h.shape[:2], -1).mean(2)))

    def log_q(self, h: Tensor, y: Tensor) -> Tensor:
        """Log q(y | h) in nats, shape (B,)."""
        logits = self.logits(h)
        if self.labels == "softmax":
            return (y * logits.log_softmax(1)).sum(1)
        return (y * logits - F.softplus(logits)).sum(1)

    def infer(self, x: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return the input; record the term if there is a context."""
        if context is not None:
            trace.auxiliary(self, self.weight * self.log_q(x, context))
        return x

    def generate(self, z: Tensor, trace: Trace, context: Tensor | None = None) -> Tensor:
        """Return the input."""
        return z

    def emitters(self) -> tuple[()]:
        """None: logits are not scales."""
        return ()

    def extra_repr(self) -> str:
        """Names the labels and the weight."""
        return f"labels={self.labels!r}, weight={self.weight}"
