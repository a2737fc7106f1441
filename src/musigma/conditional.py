"""Conditioning a model on the output of an embedding network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.model import Model
from musigma.trace import Trace

__all__ = ["Conditional"]


class Conditional(Model):
    """A model whose context passes through one embedding network, once per pass.

    Args:
        model: Conditioned on the output of the embedding: (B, F), or a map (B, F, H, W).
        embedding: A network that takes the context: a tensor, or a mapping from names to tensors
            (`musigma.nets.Embedding`). Its `calibrate(context)`, if it has one, is called before
            the model is calibrated.

    Example:
        >>> import musigma
        >>> flow = musigma.build("nsf", (2,), bits=None, depth=1, context=4)
        >>> model = Conditional(flow, nn.Sequential(nn.Linear(7, 4), nn.Tanh()))
        >>> model.log_prob(torch.randn(3, 2), torch.randn(3, 7)).shape
        torch.Size([3])
    """

    def __init__(self, model: Model, embedding: nn.Module):
        super().__init__()
        self.model, self.embedding = model, embedding
        self.exact = model.exact

    def embedded(self, context: Context) -> Tensor:
        """The output of the embedding, on which the inner model is conditioned.

        Raises:
            ValueError: If there is no context.
        """
        if context is None:
            raise ValueError("context: this model is conditional, and needs one row per example")
        return self.embedding(context)

    def given(self, context: Context) -> tuple[Model, Context]:
        """The inner model, and the output of the embedding."""
        return self.model.given(self.embedded(context))

    def log_prob_each(self, x: Tensor, context: Context = None) -> Tensor | None:
        """That of the inner model."""
        return self.model.log_prob_each(x, self.embedded(context))

    @property
    def no_latents(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the inner model."""
        return self.model.no_latents

    def infer(self, x: Tensor, trace: Trace, context: Any = None) -> None:
        """Infer by the inner model."""
        self.model.infer(x, trace, self.embedded(context))

    def generate(self, trace: Trace, context: Any = None) -> Tensor:
        """Generate by the inner model."""
        return self.model.generate(trace, self.embedded(context))

    def variables(self) -> Iterator[nn.Module]:
        """Those of the inner model."""
        return self.model.variables()

    def latents(self) -> Iterator[nn.Module]:
        """Those of the inner model."""
        return self.model.latents()

    def continuous(self) -> Model:
        """The inner model's `continuous()`, with the same embedding."""
        inner = self.model.continuous()
        if inner is self.model:
            return self
        return Conditional(inner, self.embedding).train(self.training)

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Any = None) -> None:
        """Calibrate the embedding, then the inner model."""
        calibrate = getattr(self.embedding, "calibrate", None)
        if calibrate is not None:
            calibrate(context)
        self.model.calibrate(x, self.embedded(context))
