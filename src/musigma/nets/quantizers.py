"""Quantizers: from the features that an encoder emits to one of finitely many codes, and back.

A quantizer is a module with these members; register a function that builds one with
``QUANTIZERS.register``:

- `features`: D, the number of features of a position; `classes`: K, the number of codes;
  `depth`: the number of codes of one position, which are M for P positions in all.
- ``quantizer(e)``: a `Quantized`, for features e (B, D, P).
- ``vectors(codes)``: features (B, D, P), for codes (B, M).
- ``parts(codes)``: vectors from which ``nearest(parts)`` finds the codes again, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from musigma.named import Registry

__all__ = [
    "QUANTIZERS",
    "FiniteScalarQuantizer",
    "Quantized",
    "ResidualQuantizer",
    "VectorQuantizer",
]


class Quantized(NamedTuple):
    """What a quantizer makes of features."""

    codes: Tensor
    """Whole numbers 0 .. K - 1, (B, M)."""
    features: Tensor
    """What `vectors` of the codes approximate, (B, D, P): gradients pass to it."""
    cost: Tensor
    """What training adds for each example, (B,): the commitment of the encoder to its codes."""


class VectorQuantizer(nn.Module):
    r"""The nearest of K vectors, which are running means of the features nearest to them.

    .. math:: k = \arg\min_k \|e - v_k\|^2, \quad
        n_k \leftarrow \lambda n_k + (1 - \lambda) |S_k|, \quad
        m_k \leftarrow \lambda m_k + (1 - \lambda) \sum_{e \in S_k} e, \quad v_k = m_k / n_k

    with S_k the features of a batch whose code is k. Gradients pass straight through. The cost is
    :math:`\beta \|e - v_k\|^2`, summed over the positions of an example. A vector that is used
    less than a tenth as often as if all were used equally is replaced by a random feature of the
    batch. `after_step` moves the means; `musigma.training.fit` calls it after every optimizer
    step. (van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017,
    arXiv:1711.00937. Replacement: Dhariwal et al., "Jukebox", 2020, arXiv:2005.00341.)

    Args:
        features: D.
        classes: K.
        decay: λ.
        commitment: β.

    Example:
        >>> quantizer = VectorQuantizer(2, 16)
        >>> codes, _, cost = quantizer(torch.randn(3, 2, 5))
        >>> codes.shape, quantizer.vectors(codes).shape, cost.shape
        (torch.Size([3, 5]), torch.Size([3, 2, 5]), torch.Size([3]))
    """

    counts: Tensor
    sums: Tensor
    replaced: Tensor
    straight_through = True
    depth = 1
    RARE = 0.1

    def __init__(
        self, features: int, classes: int, *, decay: float = 0.99, commitment: float = 0.25
    ):
        super().__init__()
        self.features, self.classes = features, classes
        self.decay, self.commitment = decay, commitment
        self.register_buffer("counts", torch.ones(classes))
        self.register_buffer("sums", torch.randn(classes, features) / math.sqrt(features))
        self.register_buffer("replaced", torch.tensor(0))
        self.register_load_state_dict_post_hook(VectorQuantizer.skip_step)
        self.seen: list[tuple[Tensor, Tensor]] = []  # codes and features since the last step

    @property
    def book(self) -> Tensor:
        """The vectors, (K, D)."""
        return self.sums / self.counts[:, None]

    def forward(self, e: Tensor) -> Quantized:
        """The nearest vectors of features (B, D, P)."""
        codes = self.nearest(e)
        if self.training and torch.is_grad_enabled():
            self.seen.append((codes.flatten(), e.detach().mT.flatten(0, 1)))
        cost = (e - self.vectors(codes)).square().flatten(1).sum(1)
        return Quantized(codes.to(e), e, self.commitment * cost)

    def nearest(self, e: Tensor) -> Tensor:
        """The codes of features (B, D, P), int64 (B, P)."""
        rows, book = e.detach().mT, self.book
        distance = book.square().sum(1) - 2 * rows @ book.mT
        return distance.argmin(-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """The vectors of codes (B, P), shape (B, D, P)."""
        return self.book[codes.long()].mT

    parts = vectors

    @torch.no_grad()
    def calibrate(self, e: Tensor) -> None:
        """Begin with random features of a batch (B, D, P) as vectors."""
        rows = e.mT.flatten(0, 1)
        self.sums.copy_(rows[torch.randint(len(rows), (self.classes,), device=e.device)])
        self.counts.fill_(1.0)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the means toward the features seen since the last call."""
        if not self.seen:
            return
        codes, rows = (torch.cat(parts) for parts in zip(*self.seen, strict=True))
        self.skip_step()
        rows = rows.to(self.sums)
        self.counts.lerp_(torch.bincount(codes, minlength=self.classes).to(rows), 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, rows), 1 - self.decay)
        usual = self.counts.mean()
        rare = self.counts < self.RARE * usual
        other = rows[torch.randint(len(rows), (self.classes,), device=rows.device)]
        self.counts.copy_(torch.where(rare, usual, self.counts))
        self.sums.copy_(torch.where(rare[:, None], usual * other, self.sums))
        self.replaced.add_(rare.sum())

    def skip_step(self, *_: object) -> None:
        """Forget the features seen since the last call."""
        self.seen = []

    def figures(self) -> dict[str, float]:
        """The perplexity of the codes over recent batches, and how many vectors were replaced."""
        share = (self.counts / self.counts.sum()).double()
        perplexity = float(torch.special.entr(share).sum().exp())
        return {"perplexity": perplexity, "replaced": float(self.replaced)}

    def extra_repr(self) -> str:
        """Names the numbers of features and of codes."""
        return f"features={self.features}, classes={self.classes}"


class ResidualQuantizer(nn.Module):
    """Several quantizers in turn, each of what those before it leave over; vectors add up.

    (Zeghidour et al., "SoundStream", 2021, arXiv:2107.03312; Lee et al., "Autoregressive Image
    Generation using Residual Quantization", 2022, arXiv:2203.01941.) Codes (B, depth P) are those
    of all positions by the first quantizer, then by the second, and so on.

    Args:
        features: D.
        classes: K of each.
        depth: Number of quantizers.
        **options: As in `VectorQuantizer`.

    Example:
        >>> quantizer = ResidualQuantizer(2, 16, depth=3)
        >>> quantizer(torch.randn(4, 2, 5)).codes.shape
        torch.Size([4, 15])
    """

    stages: Sequence[VectorQuantizer]  # pyright: ignore[reportIncompatibleVariableOverride]
    straight_through = True

    def __init__(self, features: int, classes: int, *, depth: int = 4, **options: float):
        super().__init__()
        self.features, self.classes, self.depth = features, classes, depth
        stages = (VectorQuantizer(features, classes, **options) for _ in range(depth))
        self.stages = nn.ModuleList(stages)  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, e: Tensor) -> Quantized:
        """The codes of features (B, D, P) by every stage."""
        rest, codes, costs = e, [], []
        for stage in self.stages:
            found = stage(rest)
            rest = rest - stage.vectors(found.codes)
            codes.append(found.codes)
            costs.append(found.cost)
        return Quantized(torch.cat(codes, 1), e, sum(costs))  # pyright: ignore

    def _by_stage(self, codes: Tensor) -> Iterator[tuple[VectorQuantizer, Tensor]]:
        return zip(self.stages, codes.chunk(self.depth, 1), strict=True)

    def vectors(self, codes: Tensor) -> Tensor:
        """The sums of the vectors of codes (B, depth P), shape (B, D, P)."""
        return self.parts(codes).sum(1)

    def parts(self, codes: Tensor) -> Tensor:
        """The vectors of every stage, (B, depth, D, P)."""
        return torch.stack([stage.vectors(part) for stage, part in self._by_stage(codes)], 1)

    def nearest(self, parts: Tensor) -> Tensor:
        """The codes of the vectors of every stage."""
        pairs = zip(self.stages, parts.unbind(1), strict=True)
        return torch.cat([stage.nearest(part) for stage, part in pairs], 1)

    @torch.no_grad()
    def calibrate(self, e: Tensor) -> None:
        """Begin with random features, or random rests of the stages before, as vectors."""
        for stage in self.stages:
            stage.calibrate(e)
            e = e - stage.vectors(stage.nearest(e))


class FiniteScalarQuantizer(nn.Module):
    r"""Each feature rounded to one of a few levels; a code is a combination of levels.

    .. math:: y_d = h_d \tanh(e_d + s_d) - o_d, \quad v_d = round(y_d) / \lfloor L_d / 2 \rfloor

    with h, s and o such that there are L_d levels. There is no codebook, hence no commitment and
    no code that dies. (Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE
    Made Simple", 2023, arXiv:2309.15505.)

    Args:
        levels: L, the number of levels of each feature, 2 or more.

    Raises:
        ValueError: If a number of levels is below 2.

    Example:
        >>> quantizer = FiniteScalarQuantizer([3, 5])
        >>> e = torch.tensor([[[-9.0], [9.0]]])
        >>> quantizer.classes, quantizer(e).codes, quantizer.vectors(torch.tensor([[12]]))
        (15, tensor([[12.]]), tensor([[[-1.],
                 [ 1.]]]))
    """

    levels: Tensor
    steps: Tensor
    straight_through = True
    depth = 1

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"levels: expected numbers from 2; got {list(levels)}")
        self.features, self.classes = len(levels), math.prod(levels)
        self.register_buffer("levels", torch.tensor(levels)[:, None], persistent=False)
        steps = (self.levels // 2).to(torch.get_default_dtype())  # from 0 to 1, and to -1
        self.register_buffer("steps", steps, persistent=False)

    @property
    def _basis(self) -> Tensor:
        below = self.levels[:-1].cumprod(0)
        return torch.cat([torch.ones_like(self.levels[:1]), below])

    def _bounded(self, e: Tensor) -> Tensor:
        """Numbers that are rounded to -floor(L / 2) .. floor((L - 1) / 2)."""
        half = (self.levels - 1).to(e) / 2 + 1e-3
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(e)
        return half * (e + torch.atanh(offset / half)).tanh() - offset

    def forward(self, e: Tensor) -> Quantized:
        """The codes of features (B, D, P)."""
        bounded = self._bounded(e)
        codes = ((bounded.detach().round() + self.steps) * self._basis).sum(1)
        return Quantized(codes, bounded / self.steps, e.new_zeros(len(e)))

    def vectors(self, codes: Tensor) -> Tensor:
        """The levels of codes (B, P), from -1 to 1, (B, D, P)."""
        digits = codes.long()[:, None] // self._basis % self.levels
        return (digits - self.steps) / self.steps

    parts = vectors

    def nearest(self, parts: Tensor) -> Tensor:
        """The codes of the nearest levels."""
        digits = (parts * self.steps).round() + self.steps
        digits = torch.minimum(digits.clamp(min=0), self.levels - 1)
        return (digits * self._basis).sum(1).long()


QUANTIZERS = Registry("quantizer", "features")
"""Quantizers by name, as functions of the number of features."""


def vq(
    features: int, *, classes: int = 256, decay: float = 0.99, commitment: float = 0.25
) -> nn.Module:
    """A `VectorQuantizer`."""
    return VectorQuantizer(features, classes, decay=decay, commitment=commitment)


def residual(
    features: int,
    *,
    classes: int = 256,
    depth: int = 4,
    decay: float = 0.99,
    commitment: float = 0.25,
) -> nn.Module:
    """A `ResidualQuantizer`."""
    return ResidualQuantizer(features, classes, depth=depth, decay=decay, commitment=commitment)


def fsq(features: int, *, levels: str = "8,5,5") -> nn.Module:
    """A `FiniteScalarQuantizer`, whose number of features is that of its levels."""
    return FiniteScalarQuantizer([int(n) for n in str(levels).split(",")])


for build in (vq, residual, fsq):
    QUANTIZERS.register(build)
