"""Steps of flows: the negative log-likelihood of data."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    SigmoidTransform,
    TransformedDistribution,
)

from corpus_steps_base import B, Built, D, H, entry, mlp
from corpus_steps_deep import Coupling, Planar

LOG_2PI = math.log(2 * math.pi)


def standard(z):
    return -0.5 * (z**2 + LOG_2PI).flatten(1).sum(1)  # prior


def whole(z, logdet):
    """log p of each example: the prior at z, and the log-det."""
    return standard(z) + logdet  # logdet


def density(flows, log_prob=whole, *, reduce=torch.mean, x=None, d=D):
    """`log_prob(z, logdet)` of all flows after each other."""
    flows = nn.ModuleList(flows)
    x = torch.randn(B, d) if x is None else x

    def step():
        z, total = x, torch.zeros(len(x))
        for flow in flows:
            z, logdet = flow(z)
            total = total + logdet  # logdet
        return -reduce(log_prob(z, total))

    return Built(step, (flows, x))


def couplings(log_prob=whole, **more):
    return density([Coupling(D), Coupling(D), Coupling(D)], log_prob, **more)


# --- right ---------------------------------------------------------------------------------------


@entry("correct")
def real_nvp():
    return couplings()


@entry("correct")
def real_nvp_summed_over_the_batch():
    return couplings(reduce=torch.sum)


@entry("correct|warning")
def real_nvp_without_the_constant_of_the_prior():
    return couplings(lambda z, logdet: logdet - 0.5 * z.square().sum(1))  # logdet


@entry("correct")
def real_nvp_by_distributions():
    prior = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
    return couplings(lambda z, logdet: prior.log_prob(z) + logdet)  # logdet


class Slope(nn.Module):
    """A leaky ReLU: its log-det has no gradient, as the signs of z jump."""

    def __init__(self, counted=1):
        super().__init__()
        self.counted = counted

    def forward(self, z):
        logdet = self.counted * math.log(0.3) * (z < 0).sum(1)  # logdet
        return F.leaky_relu(z, 0.3), logdet


@entry("correct")
def couplings_around_leaky_relus():
    return density([Coupling(D), Slope(), Coupling(D), Slope(), Coupling(D)])


@entry("bug", "logdet_mismatch")
def couplings_around_leaky_relus_of_which_one_is_not_counted():
    return density([Coupling(D), Slope(), Coupling(D), Slope(counted=0), Coupling(D)])


def additive_couplings(log_prior):
    """Additive couplings, and a scale for each dimension at the end."""
    nets, x = nn.ModuleList([mlp(D // 2, D // 2) for _ in range(3)]), torch.rand(B, D)
    log_scale = nn.Parameter(0.3 * torch.randn(D))

    def step():
        a, b = x[:, ::2], x[:, 1::2]
        for net in nets:
            a, b = b + net(a), a
        z = torch.cat([a, b], 1) * log_scale.exp()
        log_p = log_prior(z).sum(1)
        return -(log_p + log_scale.sum()).mean()  # logdet

    return Built(step, (nets, log_scale, x))


@entry("correct")
def nice():
    return additive_couplings(lambda z: -F.softplus(z) - F.softplus(-z))  # prior


@entry("bug", "logdet_mismatch")
def nice_with_one_tail_of_its_prior():
    return additive_couplings(lambda z: -F.softplus(z))


@entry("incomplete")
def nice_with_half_its_prior():
    return additive_couplings(lambda z: -0.5 * (F.softplus(z) + F.softplus(-z)))


def learned(log_width):
    prior = nn.ParameterDict({"mean": torch.randn(D), "log_std": 0.5 * torch.randn(D)})

    def log_prob(z, logdet):
        e = (z - prior["mean"]) / prior["log_std"].exp()
        return -0.5 * (e**2 + LOG_2PI).sum(1) - log_width * prior["log_std"].sum() + logdet

    built = couplings(log_prob)
    return Built(built.step, (*built.objects, prior))


@entry("correct")
def real_nvp_with_a_learned_prior():
    return learned(1)


class Masked(nn.Module):
    """A masked autoregressive step, x -> (x - shift(x_<)) e^-s(x_<)."""

    def __init__(self, dim=D, masked=True):
        super().__init__()
        order = torch.arange(dim)
        hidden = torch.arange(H) % (dim - 1)
        self.register_buffer("into", (hidden[:, None] >= order).float())
        self.register_buffer("out", (order[:, None] > hidden).float().repeat(2, 1))
        if not masked:
            self.into, self.out = torch.ones_like(self.into), torch.ones_like(self.out)
        self.first, self.second = nn.Linear(dim, H), nn.Linear(H, 2 * dim)

    def forward(self, x):
        h = torch.tanh(F.linear(x, self.first.weight * self.into, self.first.bias))
        heads = F.linear(h, self.second.weight * self.out, self.second.bias)
        shift, log_scale = heads.chunk(2, -1)
        logdet = -log_scale.sum(-1)  # logdet
        return ((x - shift) * (-log_scale).exp()).flip(-1), logdet


@entry("correct")
def masked_autoregressive():
    return density([Masked(), Masked()])


@entry("correct|incomplete")
def planar_density():
    return density([Planar(D), Planar(D), Planar(D)])


class Radial(nn.Module):
    """Points move away from a learned center, which is taken off first, and added last."""

    def __init__(self):
        super().__init__()
        self.center = nn.Parameter(torch.randn(D))
        self.offset, self.size = nn.Parameter(torch.zeros(())), nn.Parameter(torch.randn(()))

    def forward(self, x):
        away = x - self.center
        r, alpha, beta = away.norm(dim=1), self.offset.exp(), self.size.exp()
        scale, slope = 1 + beta / (alpha + r), 1 + alpha * beta / (alpha + r) ** 2
        logdet = (x.shape[1] - 1) * scale.log() + slope.log()  # logdet
        return self.center + away * scale[:, None], logdet


@entry("correct")
def around_a_learned_center():
    return density([Radial()])


class ActNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(channels, 1, 1))
        self.log_scale = nn.Parameter(0.3 * torch.randn(channels, 1, 1))

    def forward(self, x):
        pixels = x.shape[2] * x.shape[3]
        logdet = pixels * self.log_scale.sum()  # logdet
        return (x + self.bias) * self.log_scale.exp(), logdet


class Mixing(nn.Module):
    """The 1x1 convolution."""

    def __init__(self, channels, pixels=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels) / math.sqrt(channels))
        self.pixels = pixels

    def forward(self, x):
        pixels = x.shape[2] * x.shape[3] if self.pixels else 1
        logdet = torch.linalg.slogdet(self.weight)[1] * pixels  # logdet
        return F.conv2d(x, self.weight[:, :, None, None]), logdet


class ImageCoupling(nn.Module):
    def __init__(self, channels):
        super().__init__()
        half = channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(half, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 3, padding=1)
        )

    def forward(self, x):
        a, b = x.chunk(2, 1)
        shift, scale = self.net(a).chunk(2, 1)
        scale = torch.sigmoid(scale + 2)
        logdet = scale.log().flatten(1).sum(1)  # logdet
        return torch.cat([a, (b + shift) * scale], 1), logdet


def glow(pixels=True):
    layers = [f for _ in range(2) for f in (ActNorm(4), Mixing(4, pixels), ImageCoupling(4))]
    return density(layers, x=torch.rand(3, 4, 3, 3))


@entry("correct")
def glow_of_two_steps():
    return glow()


@entry("correct|incomplete")
def glow_of_two_scales():
    """Half the channels leave after the first step, to a prior that depends on the rest."""
    first = nn.ModuleList([ActNorm(4), Mixing(4), ImageCoupling(4)])
    second = nn.ModuleList([ActNorm(2), Mixing(2), ImageCoupling(2)])
    prior, x = nn.Conv2d(2, 4, 3, padding=1), torch.rand(3, 4, 3, 3)

    def step():
        z, total = x, 0.0
        for layer in first:
            z, logdet = layer(z)
            total = total + logdet  # logdet
        z, leaves = z.chunk(2, 1)
        mean, log_std = prior(z).chunk(2, 1)
        total = total + Normal(mean, log_std.exp()).log_prob(leaves).flatten(1).sum(1)
        for layer in second:
            z, logdet = layer(z)
            total = total + logdet  # logdet
        return -(total + standard(z)).mean()

    return Built(step, (first, second, prior, x))


@entry("correct|incomplete")
def conditional_flow():
    y = torch.randn(B, 2)

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(D // 2 + 2, D)

        def forward(self, x):
            a, b = x.chunk(2, -1)
            s, t = self.net(torch.cat([a, y], -1)).chunk(2, -1)
            logdet = s.tanh().sum(-1)  # logdet
            return torch.cat([b * s.tanh().exp() + t, a], -1), logdet

    built = density([Given(), Given()])
    return Built(built.step, (*built.objects, y))


def bits(noise_scale=1 / 256, constant=True, squeeze=True, draw=None):
    """Bits per dimension of pixels in 0, ..., 255, through a logit."""
    draw = draw or (lambda: torch.rand(B, D) * noise_scale)
    pixels = torch.randint(0, 256, (B, D)).float()
    flows, alpha = nn.ModuleList([Coupling(D), Coupling(D)]), 0.05

    def step():
        x = pixels / 256 + draw()
        p = alpha + (1 - 2 * alpha) * x
        z = p.log() - (-p).log1p()
        total = -(p.log() + (-p).log1p()).sum(1)  # logdet
        total = total + D * math.log(1 - 2 * alpha) * squeeze
        for flow in flows:
            z, logdet = flow(z)
            total = total + logdet  # logdet
        nats = -whole(z, total) + D * math.log(256) * constant
        return (nats / (D * math.log(2))).mean()

    return Built(step, (flows, pixels))


@entry("correct|warning")
def bits_per_dimension():
    return bits()


@entry("correct|warning")
def dequantised_by_noise_with_bounds():
    return bits(draw=lambda: torch.zeros(B, D).uniform_(0, 1 / 256))


@entry("correct|incomplete")
def flow_through_distributions():
    loc, log_scale = nn.Parameter(torch.randn(D)), nn.Parameter(0.3 * torch.randn(D))
    x = 0.1 + 0.8 * torch.rand(B, D)

    def step():
        base = Independent(Normal(torch.zeros(D), torch.ones(D)), 1)
        transforms = [AffineTransform(loc, log_scale.exp(), event_dim=0), SigmoidTransform()]
        return -TransformedDistribution(base, transforms).log_prob(x).mean()

    return Built(step, (loc, log_scale, x))


class Density(nn.Module):
    """A flow with `log_prob`, as in most libraries."""

    def __init__(self):
        super().__init__()
        self.flows = nn.ModuleList([Coupling(D), Coupling(D)])

    def log_prob(self, x):
        total = 0.0
        for flow in self.flows:
            x, logdet = flow(x)
            total = total + logdet  # logdet
        return standard(x) + total

    def forward(self, x):
        return self.log_prob(x)


@entry("correct")
def module_with_log_prob():
    net, x = Density(), torch.randn(B, D)
    return Built(lambda: -net.log_prob(x).mean(), (net, x), net, x)


@entry("correct|incomplete", needs="zuko")
def neural_spline_flow():
    import zuko

    flow = zuko.flows.NSF(5, transforms=2, hidden_features=(16,))
    x = torch.randn(B, 5)
    return Built(lambda: -flow().log_prob(x).mean(), (flow, x))


@entry("correct|incomplete", needs="nflows")
def flow_of_nflows():
    from nflows import distributions, flows, transforms

    flow = flows.Flow(
        transforms.CompositeTransform(
            [
                transforms.MaskedAffineAutoregressiveTransform(5, 16),
                transforms.ReversePermutation(5),
                transforms.MaskedAffineAutoregressiveTransform(5, 16),
            ]
        ),
        distributions.StandardNormal([5]),
    )
    x = torch.randn(B, 5)
    return Built(lambda: -flow.log_prob(x).mean(), (flow, x))


@entry("correct|incomplete")
def flow_and_a_discrete_column():
    flows, classify = nn.ModuleList([Coupling(D), Coupling(D)]), mlp(D, 3)
    x, y = torch.randn(B, D), torch.arange(B) % 3

    def step():
        z, total = x, 0.0
        for flow in flows:
            z, logdet = flow(z)
            total = total + logdet  # logdet
        return F.cross_entropy(classify(x), y) - whole(z, total).mean()

    return Built(step, (flows, classify, x, y))


@entry("correct|incomplete")
def optimizer_step_of_a_flow():
    flows, x = nn.ModuleList([Coupling(D), Coupling(D)]), torch.randn(B, D)
    optimizer = torch.optim.Adam(flows.parameters())

    def step():
        z, total = x, 0.0
        for flow in flows:
            z, logdet = flow(z)
            total = total + logdet
        loss = -whole(z, total).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Built(step, (flows, optimizer, x))


# --- wrong ---------------------------------------------------------------------------------------


@entry("bug", "logdet_mismatch")
def logdet_with_the_wrong_sign():
    return couplings(lambda z, logdet: standard(z) - logdet)


@entry("bug", "logdet_mismatch")
def logdet_missing():
    return couplings(lambda z, logdet: standard(z))


@entry("bug|warning")  # or a prior of another width, up to a constant
def logdet_averaged_over_dimensions():
    return couplings(lambda z, logdet: standard(z) + logdet / D)


@entry("bug|warning")
def prior_averaged_over_dimensions():
    return couplings(lambda z, logdet: standard(z) / D + logdet)


class WithoutScale(Coupling):
    def forward(self, x):
        return super().forward(x)[0], torch.zeros(len(x))


@entry("bug", "logdet_mismatch")
def logdet_without_one_coupling():
    return density([Coupling(D), WithoutScale(D), Coupling(D)])


class Unbounded(nn.Module):
    """The transform bounds s; the log-det takes it raw."""

    def __init__(self):
        super().__init__()
        self.net = mlp(D // 2, D)

    def forward(self, x):
        a, b = x.chunk(2, -1)
        s, t = self.net(a).chunk(2, -1)
        return torch.cat([b * s.tanh().exp() + t, a], -1), s.sum(-1)


@entry("bug", "logdet_mismatch")
def logdet_of_the_raw_scale():
    return density([Unbounded(), Unbounded()])


@entry("bug", "logdet_mismatch")
def mixing_without_the_number_of_pixels():
    return glow(pixels=False)


@entry("bug", "logdet_mismatch|cross_sample")
def logdets_of_the_whole_batch():
    return couplings(lambda z, logdet: standard(z) + logdet.sum())


@entry("bug", "logdet_mismatch")
def not_autoregressive():
    return density([Masked(masked=False), Masked(masked=False)])


@entry("bug", "logdet_mismatch|no_gradient")
def logdet_detached():
    return couplings(lambda z, logdet: standard(z) + logdet.detach())


@entry("bug|incomplete")  # no prior is seen at z
def prior_at_the_data():
    x = torch.randn(B, D)
    return couplings(lambda z, logdet: standard(x) + logdet, x=x)


@entry("bug|warning")
def prior_without_its_half():
    return couplings(lambda z, logdet: logdet - (z.square() + LOG_2PI / 2).sum(1))


@entry("bug|warning|incomplete")
def learned_prior_without_its_width():
    return learned(0)


@entry("bug|warning|incomplete")
def learned_prior_with_its_width_twice():
    return learned(2)


@entry("bug|warning|incomplete", "dequantisation|bpd_wrong|kl_offset")
def bits_without_the_256():
    return bits(constant=False)


@entry("bug|warning|incomplete", "dequantisation|bpd_wrong|kl_offset")
def dequantised_by_too_little():
    return bits(noise_scale=0.1 / 256)


@entry("bug", "dequantisation")
def dequantised_by_too_little_with_bounds():
    return bits(draw=lambda: torch.zeros(B, D).uniform_(0, 0.1 / 256))


@entry("bug|warning|incomplete", "dequantisation|bpd_wrong|logdet_mismatch|cross_sample")
def dequantised_by_too_much():
    return bits(noise_scale=1 / 25.6)


class PlanarAtTheOutput(Planar):
    def forward(self, z):
        y, _ = super().forward(z)
        return y, super().forward(y)[1]


@entry("bug", "logdet_mismatch")
def around_a_learned_center_in_one_dimension():
    class Line(Radial):
        def forward(self, x):
            away = x - self.center
            r, alpha, beta = away.norm(dim=1), self.offset.exp(), self.size.exp()
            return super().forward(x)[0], (1 + alpha * beta / (alpha + r) ** 2).log()

    return density([Line()])


@entry("bug", "logdet_mismatch")
def planar_logdet_at_its_output():
    return density([PlanarAtTheOutput(D), Planar(D)])


class Free(nn.Module):
    """A planar layer without its constraint."""

    def __init__(self, size, offset=0.0):
        super().__init__()
        self.w, self.u = (nn.Parameter(size * torch.randn(D)) for _ in range(2))
        self.b, self.offset = nn.Parameter(torch.zeros(())), offset

    def free(self):
        return self.u

    def forward(self, z):
        u = self.free()
        t = torch.tanh(z @ self.w + self.b)
        slope = (1 + (1 - t**2) * (self.w @ u)).abs()
        return z + t[:, None] * u, torch.log(slope + self.offset)


class Bound(Free):
    """With it."""

    def free(self):
        product = self.w @ self.u
        return self.u + (F.softplus(product) - 1 - product) * self.w / self.w.square().sum()


@entry("bug|warning|incomplete", "not_injective|logdet_mismatch")
def planar_without_its_constraint():
    layer = Free(1.0)
    with torch.no_grad():
        layer.u.copy_(-3 * layer.w / layer.w.square().sum())
    return density([layer])


@entry("bug", "not_injective")
def planar_without_its_constraint_near_the_identity():
    return density([Free(0.05), Free(0.05)])


@entry("correct")
def planar_with_a_small_number_in_its_logarithm():
    return density([Bound(0.4, 1e-4) for _ in range(3)])


# --- statistics of the batch ---------------------------------------------------------------------


class Standardized(nn.Module):
    """By statistics of the batch, which get a gradient in z, in the log-det, in both or none."""

    def __init__(self, in_z, in_logdet):
        super().__init__()
        self.in_z, self.in_logdet = in_z, in_logdet

    def forward(self, z):
        mean, var = z.mean(0), z.var(0) + 1e-5
        m, v = (mean, var) if self.in_z else (mean.detach(), var.detach())
        logdet = -0.5 * (var if self.in_logdet else var.detach()).log().sum()
        return (z - m) / v.sqrt(), logdet.expand(len(z))


def standardized(in_z, in_logdet):
    return density([Coupling(D), Standardized(in_z, in_logdet), Coupling(D)], x=torch.randn(40, D))


@entry("correct")
def constant_statistics_of_the_batch():
    return standardized(False, False)


@entry("bug", "no_gradient")
def statistics_of_the_batch_that_are_detached_in_the_logdet():
    return standardized(True, False)


# --- from noise to a density that is given -------------------------------------------------------


def from_noise(flows, sign=1):
    """KL(q || p) to p of an energy, by draws of q."""
    flows = nn.ModuleList(flows)

    def step():
        x = z = torch.randn(B, D)
        total = torch.zeros(B)
        for flow in flows:
            z, logdet = flow(z)
            total = total + logdet  # logdet
        energy = ((z.norm(dim=1) - 2) / 0.4) ** 2 / 2 - torch.log(z[:, 0].square() + 0.1)
        return (standard(x) - sign * total + energy).mean()

    return Built(step, (flows,))


@entry("correct")
def flow_from_noise():
    return from_noise([Bound(0.4), Coupling(D)])


@entry("bug", "logdet_mismatch")
def flow_from_noise_with_the_wrong_sign():
    return from_noise([Coupling(D)], -1)


@entry("bug", "not_injective")
def flow_from_noise_that_may_fold():
    return from_noise([Free(0.01), Free(0.01)])
