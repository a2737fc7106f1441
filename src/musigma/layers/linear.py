"""Learned linear bijections of the channels of vectors (B, C) and of images (B, C, H, W)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from musigma.model import Bijection
from musigma.tensors import at_least_float32

__all__ = ["ActNorm", "InvertibleConv", "Rotation", "reordering", "rotation"]


def positions(x: Tensor) -> int:
    """Number of pixels of an image; 1 for a vector."""
    return math.prod(x.shape[2:])


class ActNorm(Bijection):
    r"""A shift and a scale for each channel, set from a batch by `calibrate`.

    .. math:: y = (x + b) e^{s}, \quad \log|\det| = HW \sum_c s_c

    Before calibration the layer is the identity; after it, each channel of y has mean 0 and
    variance 1 on that batch. A forward pass never calibrates. `calibrated` is part of the state,
    so a reloaded layer is not calibrated again. (Kingma & Dhariwal, "Glow", 2018,
    arXiv:1807.03039.)

    Args:
        channels: C.

    Example:
        >>> norm, x = ActNorm(3), 5 + 2 * torch.randn(512, 3)
        >>> norm.calibrate(x)
        >>> y, log_det = norm(x)
        >>> bool(y.std(0).sub(1).abs().max() < 1e-2), log_det.shape
        (True, torch.Size([512]))
    """

    calibrated: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("calibrated", torch.tensor(False))

    @torch.no_grad()
    def calibrate(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set shift and scale from x; a second call changes nothing."""
        if bool(self.calibrated):
            return
        flat = at_least_float32(x).transpose(0, 1).flatten(1)
        self.bias.copy_(-flat.mean(1))
        self.log_scale.copy_(-(flat.std(1, correction=0) + 1e-6).log())
        self.calibrated.fill_(True)

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (x.ndim - 2))
        return self.bias.reshape(shape), self.log_scale.reshape(shape)

    def _log_det(self, x: Tensor, sign: int = 1) -> Tensor:
        return (sign * positions(x) * self.log_scale.sum()).expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``((x + b) exp(s), log_det)``."""
        bias, log_scale = self._shaped(x)
        return (x + bias) * log_scale.exp(), self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(y exp(-s) - b, -log_det)``."""
        bias, log_scale = self._shaped(y)
        return y * (-log_scale).exp() - bias, self._log_det(y, -1)


def _mix(weight: Tensor, x: Tensor) -> Tensor:
    """``weight @ x`` at every position, in the precision of x, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        if x.ndim == 2:
            return F.linear(x, weight)
        if x.ndim == 4:
            return F.conv2d(x, weight[:, :, None, None])
        return torch.einsum("ij,bj...->bi...", weight, x)


def _inverted(weight: Tensor) -> Tensor:
    """The inverse, computed in float64 if the device supports it."""
    wide = weight.float() if weight.device.type == "mps" else weight.double()
    return torch.linalg.inv(wide).to(weight).contiguous()


def rotation(channels: int) -> Tensor:
    """A random orthogonal matrix, float64 (C, C)."""
    return torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]


def reordering(channels: int) -> Tensor:
    """The matrix of a random permutation of one cycle, float64 (C, C); every channel moves."""
    order = torch.randperm(channels)
    matrix = torch.zeros(channels, channels, dtype=torch.float64)
    matrix[order, order.roll(1)] = 1
    return matrix


class InvertibleConv(Bijection):
    r"""An invertible 1x1 convolution: a learned matrix that mixes the channels.

    .. math:: y_{hw} = W x_{hw}, \quad \log|\det| = HW \log|\det W|

    W is a parameter, or W = P L (U + diag(sign · exp(s))) with a fixed permutation P and sign,
    and learned L, U and s. The determinant of the product is cheap and never zero. Inverses are
    computed in float64 if the device supports it. (Kingma & Dhariwal, "Glow", 2018,
    arXiv:1807.03039.)

    Args:
        channels: C.
        lu: Whether W is given by its factors.
        start: A function of C to the initial W, float64 (C, C): a random rotation, or
            `reordering`.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(
        self, channels: int, *, lu: bool = True, start: Callable[[int], Tensor] = rotation
    ):
        super().__init__()
        matrix, self.lu = start(channels), lu
        if not lu:
            self.weight = nn.Parameter(matrix.to(torch.get_default_dtype()))
            return
        permutation, lower, upper = torch.linalg.lu(matrix)
        diagonal = upper.diagonal()
        dtype = torch.get_default_dtype()
        self.register_buffer("permutation", permutation.to(dtype))
        self.register_buffer("sign", diagonal.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_scale = nn.Parameter(diagonal.abs().log().to(dtype))

    def matrix(self) -> Tensor:
        """W, shape (C, C)."""
        if not self.lu:
            return self.weight
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())
        with torch.autocast(self.sign.device.type, enabled=False):
            return self.permutation @ torch.addmm(upper, self.lower.tril(-1), upper)  # (L + I) U

    @torch.no_grad()
    def condition_number(self) -> float:
        """Largest over smallest singular value of W; NaN if W is not finite.

        Its log10 is the number of digits that decoding loses.
        """
        matrix = self.matrix().double().cpu()
        return float(torch.linalg.cond(matrix)) if matrix.isfinite().all() else math.nan

    def _log_det(self, x: Tensor, sign: int = 1) -> Tensor:
        if self.lu:
            log_det = self.log_scale.sum()
        else:
            log_det = torch.linalg.slogdet(self.weight)[1]
        return (sign * positions(x) * log_det).expand(len(x))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(W x, log_det)``."""
        return _mix(self.matrix(), at_least_float32(x)), self._log_det(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(W⁻¹ y, -log_det)``."""
        return _mix(_inverted(self.matrix()), at_least_float32(y)), self._log_det(y, -1)

    def retrace(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, y, log_det)``; the matrix is computed once."""
        weight = self.matrix()
        x = _mix(_inverted(weight.detach()), at_least_float32(y.detach())).requires_grad_()
        return x, _mix(weight, x), self._log_det(x)


class Rotation(Bijection):
    r"""A learned orthogonal matrix that mixes the channels; it preserves volume.

    .. math:: y = R x, \quad R = H_1 \cdots H_C, \quad
        H_i = I - 2 v_i v_i^\top / \|v_i\|^2, \quad \log|\det| = 0

    The vector of reflection i is zero before element i, where it is 1; C reflections reach every
    rotation, up to signs. The initial R is random. The inverse is the transpose. (Tomczak &
    Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016, arXiv:1611.09630.)

    Args:
        channels: C.

    Example:
        >>> rotation, x = Rotation(3), torch.randn(5, 3)
        >>> torch.allclose(rotation(x)[0].norm(dim=1), x.norm(dim=1))
        True
    """

    def __init__(self, channels: int):
        super().__init__()
        reflections = torch.geqrf(torch.randn(channels, channels, dtype=torch.float64))[0]
        self.vectors = nn.Parameter(reflections.tril(-1).to(torch.get_default_dtype()))

    def matrix(self) -> Tensor:
        """R, shape (C, C)."""
        below = self.vectors.tril(-1)
        return torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(R x, 0)``."""
        x = at_least_float32(x)
        return _mix(self.matrix(), x), x.new_zeros(len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(R^T y, 0)``."""
        y = at_least_float32(y)
        return _mix(self.matrix().t().contiguous(), y), y.new_zeros(len(y))
