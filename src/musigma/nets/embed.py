"""The embedding of a context: named numbers, classes and images as one vector."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.nets.conv import ConvEncoder
from musigma.spec import Variable
from musigma.tensors import moments

__all__ = ["Embedding"]


class Embedding(nn.Module):
    """Named variables to one vector (B, features), for `musigma.Conditional`.

    Numbers are standardized, by the statistics that `calibrate` computes. Classes are one-hot.
    Images pass through a `ConvEncoder`. The results are concatenated in the order of `variables`.

    Args:
        variables: The variables of the context.
        width: Number of features of each image.

    Attributes:
        features: Length of the vector.

    Raises:
        ValueError: If a variable is neither a vector nor an image.

    Example:
        >>> embed = Embedding([Variable("age"), Variable("class", classes=3)])
        >>> embed({"age": torch.randn(4, 1), "class": torch.eye(3)[[0, 1, 2, 1]]}).shape
        torch.Size([4, 4])
    """

    calibrated: Tensor

    def __init__(self, variables: Sequence[Variable], *, width: int = 32):
        super().__init__()
        self.variables = tuple(variables)
        self.images = nn.ModuleDict()
        self.features = 0
        for i, variable in enumerate(self.variables):
            numbers = len(variable.shape) == 1
            if not numbers and len(variable.shape) != 3:
                raise ValueError(
                    f"{variable.name}: expected a vector (F,) or an image (C, H, W); got shape "
                    f"{variable.shape}"
                )
            self.features += variable.shape[0] if numbers else width
            if not numbers:
                side = min(variable.shape[1:])
                halvings = max(1, math.ceil(math.log2(max(side, 2) / 7)))
                self.images[str(i)] = ConvEncoder(
                    variable.shape, width, width=16, halvings=halvings
                )
            elif not variable.classes:
                self.register_buffer(f"mean{i}", torch.zeros(variable.shape))
                self.register_buffer(f"std{i}", torch.ones(variable.shape))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, context: Context) -> None:
        """Set mean and standard deviation of the numbers from a batch, once."""
        if bool(self.calibrated):
            return
        for i, (variable, t) in enumerate(zip(self.variables, self.parts(context), strict=True)):
            if not variable.classes and len(variable.shape) == 1:
                mean, std = moments(t)
                self.get_buffer(f"mean{i}").copy_(mean)
                self.get_buffer(f"std{i}").copy_(std)
        self.calibrated.fill_(True)

    def parts(self, context: Context) -> list[Tensor]:
        """The tensor of each variable.

        Raises:
            ValueError: Naming every variable that is missing, unknown, or of another shape.
        """
        if isinstance(context, Tensor) and len(self.variables) == 1:
            context = {self.variables[0].name: context}
        names = ", ".join(variable.name for variable in self.variables)
        if context is None or isinstance(context, Tensor):
            got = "none" if context is None else f"one tensor of shape {tuple(context.shape)}"
            raise ValueError(f"context: expected a mapping with {names}; got {got}")
        known = {variable.name for variable in self.variables}
        wrong = [f"{name!r} is unknown" for name in context if name not in known]
        for variable in self.variables:
            t = context.get(variable.name)
            if t is None:
                wrong.append(f"{variable.name!r} is missing")
            elif tuple(t.shape[1:]) != variable.shape:
                wrong.append(
                    f"{variable.name!r} has shape {tuple(t.shape[1:])} per row, and not "
                    f"{variable.shape}"
                )
        if wrong:
            raise ValueError(f"context: {'; '.join(wrong)}; the model takes {names}")
        return [context[variable.name] for variable in self.variables]

    def forward(self, context: Context) -> Tensor:
        """The vector, (B, features)."""
        parts = []
        for i, (variable, t) in enumerate(zip(self.variables, self.parts(context), strict=True)):
            if len(variable.shape) == 3:
                top = (variable.levels or 2) - 1
                net = self.images[str(i)]
                parts.append(net(2 * t.to(next(net.parameters()).dtype) / top - 1))
            elif variable.classes:
                parts.append(t)
            else:
                parts.append((t - self.get_buffer(f"mean{i}")) / self.get_buffer(f"std{i}"))
        return torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """Names the variables."""
        return ", ".join(variable.name for variable in self.variables)
