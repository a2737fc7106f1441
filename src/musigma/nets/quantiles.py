"""Numbers by their distribution in the training data, and a perceptron of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from musigma.context import Context
from musigma.nets.embed import Embedding, embedding, named_parts, refuse
from musigma.spec import Variable

__all__ = ["NormalScores", "Quantiles", "quantile"]


class NormalScores(nn.Module):
    r"""Each feature as the normal quantile of its rank in a batch.

    .. math:: y = \Phi^{-1}(F(x))

    F is the distribution function of the feature in the batch that `calibrate` takes, linear
    between `knots` of its quantiles, and constant beyond the first and the last. A value that is
    as frequent as several quantiles has their mean rank. The result does not depend on the units
    of the feature, nor on any increasing function of it. Until it is calibrated, it is constant.

    Args:
        features: F.
        knots: Number of quantiles.

    Example:
        >>> layer, x = NormalScores(1, knots=3), torch.tensor([[1.0], [10.0], [1000.0]])
        >>> layer.calibrate(x)
        >>> layer(torch.tensor([[1.0], [5.5], [10.0], [1e9]])).flatten()
        tensor([-0.9674, -0.6745,  0.0000,  0.9674])
    """

    at: Tensor

    def __init__(self, features: int, *, knots: int = 64):
        super().__init__()
        self.register_buffer("at", torch.zeros(features, knots))

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Take the quantiles of the rows of x, (B, F)."""
        knots = self.at.shape[1]
        share = (torch.arange(knots, dtype=torch.float64, device=x.device) + 0.5) / knots
        self.at.copy_(torch.quantile(x.double(), share, dim=0).t())

    def forward(self, x: Tensor) -> Tensor:
        """The scores, (B, F)."""
        columns, last = x.t().contiguous(), self.at.shape[1] - 1
        low = torch.searchsorted(self.at, columns)  # knots below
        high = torch.searchsorted(self.at, columns, right=True)  # knots below or equal
        left, right = (low - 1).clamp(min=0), low.clamp(max=last)
        start, end = self.at.gather(1, left), self.at.gather(1, right)
        between = left + ((columns - start) / (end - start).clamp(min=1e-30)).clamp(0, 1)
        rank = torch.where(high > low, 0.5 * (low + high - 1), between.clamp(max=last))
        return torch.special.ndtri((rank + 0.5) / (last + 1)).t()


class Quantiles(nn.Module):
    """Numbers and classes to one vector: as they are, by their ranks, and through a perceptron.

    Numbers are standardized, and beside that mapped to `NormalScores`, so that a few large values
    do not hide how the others differ. Classes are one-hot. A perceptron of all of these is
    concatenated to them.

    Args:
        variables: The variables of the context.
        width: Width of both layers of the perceptron.

    Attributes:
        features: Length of the vector.

    Example:
        >>> embed = Quantiles([Variable("age"), Variable("class", classes=3)], width=16)
        >>> embed.features  # one standardized, three one-hot, one score, and 16
        21
        >>> embed({"age": torch.randn(4, 1), "class": torch.eye(3)[[0, 1, 2, 1]]}).shape
        torch.Size([4, 21])
    """

    calibrated: Tensor

    def __init__(self, variables: Sequence[Variable], *, width: int = 64):
        super().__init__()
        refuse("quantile", variables, ("numbers", "classes"))
        self.variables = tuple(variables)
        self.plain = Embedding(variables)
        self.scores = NormalScores(sum(v.shape[0] for v in self.variables if not v.classes))
        inputs = self.plain.features + len(self.scores.at)
        self.perceptron = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.features = inputs + width
        self.register_buffer("calibrated", torch.tensor(False))

    def _numbers(self, context: Context) -> Tensor:
        parts = named_parts(self.variables, context)
        numbers = [t for v, t in zip(self.variables, parts, strict=True) if not v.classes]
        return torch.cat([t.to(self.scores.at.dtype) for t in numbers], 1)

    @torch.no_grad()
    def calibrate(self, context: Context) -> None:
        """Set mean, standard deviation and quantiles from a batch, once."""
        if bool(self.calibrated):
            return
        self.plain.calibrate(context)
        self.scores.calibrate(self._numbers(context))
        self.calibrated.fill_(True)

    def forward(self, context: Context) -> Tensor:
        """The vector, (B, features).

        Raises:
            ValueError: Naming every variable that is missing, unknown, or of another shape.
        """
        inputs = torch.cat([self.plain(context), self.scores(self._numbers(context))], 1)
        return torch.cat([inputs, self.perceptron(inputs)], 1)

    def extra_repr(self) -> str:
        """Names the variables."""
        return ", ".join(variable.name for variable in self.variables)


@embedding
def quantile(variables: Sequence[Variable], *, width: int = 64) -> Quantiles:
    """Numbers, standardized and by their ranks, and a perceptron of them beside them.

    Args:
        variables: The variables of the context.
        width: Width of the perceptron.
    """
    return Quantiles(variables, width=width)
