"""Flows of a kind of their own: solved, of padded or normalized batches, given other data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from corpus_steps_base import B, Built, D, Encoder, L, decoder, entry, mlp
from corpus_steps_deep import Autoregressive, Coupling, draw, log_normal, log_prior
from corpus_steps_flow import Mixing, density, standard, whole
from corpus_steps_vae import bce

# --- continuous flows ----------------------------------------------------------------------------


def trace(f, z, noise=None):
    """The trace of df/dz: exact, or estimated with noise."""
    if noise is not None:
        (product,) = torch.autograd.grad(f, z, noise, create_graph=True)
        return (product * noise).sum(1)  # logdet
    columns = [torch.autograd.grad(f[:, i].sum(), z, create_graph=True)[0] for i in range(D)]
    return sum(c[:, i] for i, c in enumerate(columns))  # logdet


def continuous(draw_noise, log_prob=whole, *, midpoint=True, steps=6):
    """dz/dt = field(z), from the data at 1 to z at 0."""
    field, data = mlp(D, D), torch.randn(B, D)

    def step():
        z, total, noise = data.clone().requires_grad_(), 0.0, draw_noise()
        for _ in range(steps):
            f = field(z)
            if midpoint:
                middle = z - f / (2 * steps)
                f = field(middle)
                total = total - trace(f, middle, noise) / steps  # logdet
            else:
                total = total - trace(f, z, noise) / steps  # logdet
            z = z - f / steps
        return -log_prob(z, total).mean()

    return Built(step, (field, data))


@entry("correct")
def continuous_flow():
    return continuous(lambda: None)


@entry("correct")
def continuous_flow_of_first_order():
    return continuous(lambda: None, midpoint=False, steps=8)


@entry("correct")
def continuous_flow_by_an_estimated_trace():
    return continuous(lambda: torch.randn(B, D))


@entry("correct")
def continuous_flow_by_random_signs():
    return continuous(lambda: torch.randint(0, 2, (B, D)) * 2.0 - 1)


@entry("bug", "logdet_mismatch")
def continuous_flow_with_the_sign_of_its_trace():
    return continuous(lambda: None, lambda z, total: standard(z) - total)


@entry("bug", "logdet_mismatch")
def continuous_flow_with_the_sign_of_its_estimated_trace():
    return continuous(lambda: torch.randn(B, D), lambda z, total: standard(z) - total)


@entry("bug", "logdet_mismatch")
def continuous_flow_without_its_trace():
    return continuous(lambda: None, lambda z, total: standard(z) + 0 * total)


# --- masks, batches and other data ---------------------------------------------------------------


class Frames(nn.Module):
    """A coupling of channels (B, C, T) with masked frames, after an activation norm."""

    def __init__(self, channels, padded=False):
        super().__init__()
        self.log_scale = nn.Parameter(0.3 * torch.randn(channels, 1))
        self.net = nn.Conv1d(channels // 2, channels, 3, padding=1)
        self.padded = padded

    def forward(self, x, mask):
        a, b = (x * mask * self.log_scale.exp()).chunk(2, 1)
        s, t = self.net(a).chunk(2, 1)
        frames = mask.shape[-1] if self.padded else mask.sum((1, 2))
        logdet = self.log_scale.sum() * frames + (s.tanh() * mask).sum((1, 2))  # logdet
        return torch.cat([(b * s.tanh().exp() + t) * mask, a], 1), logdet


def padded_sequences(padded=False):
    """Speech of several lengths, with a prior that is given by a text."""
    flows, prior = nn.ModuleList([Frames(4, padded), Frames(4)]), nn.Conv1d(3, 8, 1)
    mask = (torch.arange(6) < torch.tensor([6, 5, 3])[:, None])[:, None].float()
    x, text = torch.randn(3, 4, 6) * mask, torch.randn(3, 3, 6)

    def step():
        z, total = x, 0.0
        for flow in flows:
            z, logdet = flow(z, mask)
            total = total + logdet  # logdet
        mean, log_std = (prior(text) * mask).chunk(2, 1)
        log_p = -log_std - 0.5 * ((z - mean) / log_std.exp()) ** 2  # prior
        return -(log_p.sum() + total.sum()) / (4 * mask.sum())

    return Built(step, (flows, prior, mask, x, text))


@entry("correct")
def flow_of_padded_sequences():
    return padded_sequences()


@entry("bug|incomplete", "logdet_mismatch")
def flow_of_padded_sequences_with_the_volume_of_the_padding():
    return padded_sequences(padded=True)


class Normalizing(Coupling):
    """Its network normalizes the batch, so that each example depends on all others."""

    def __init__(self, dim):
        super().__init__(dim)
        self.net = nn.Sequential(nn.BatchNorm1d(dim // 2), self.net)


class Forgetting(Normalizing):
    def forward(self, x):
        return super().forward(x)[0], torch.zeros(len(x))


@entry("correct")
def flow_that_normalizes_the_batch_in_its_networks():
    return density([Normalizing(D), Normalizing(D), Normalizing(D)])


@entry("bug", "logdet_mismatch")
def flow_that_normalizes_the_batch_without_a_logdet():
    return density([Normalizing(D), Forgetting(D), Normalizing(D)])


@entry("correct")
def flow_with_weight_decay_in_the_loss():
    built = density([Coupling(D), Coupling(D)])
    flows = built.objects[0]

    def step():
        return built.step() + 1e-2 * sum(p.square().sum() for p in flows.parameters())

    return Built(step, built.objects)


def given(log_prob=whole, pixels=True):
    """A flow of images that is given labels."""
    mixing, net, y = Mixing(4, pixels), nn.Conv2d(2, 4, 1), torch.randn(3, 4, 1, 1)
    x = torch.randn(3, 4, 3, 3)

    def step():
        z, total = mixing(x)
        a, b = z.chunk(2, 1)
        s, t = (net(a) + y).chunk(2, 1)
        total = total + s.tanh().flatten(1).sum(1)  # logdet
        return -log_prob(torch.cat([b * s.tanh().exp() + t, a], 1), total).mean()

    return Built(step, (mixing, net, x, y))


@entry("correct")
def flow_given_labels():
    return given()


@entry("bug", "logdet_mismatch")
def flow_given_labels_with_the_sign_of_its_logdet():
    return given(lambda z, logdet: standard(z) - logdet)


@entry("bug", "logdet_mismatch")
def flow_given_labels_whose_mixing_forgets_the_pixels():
    return given(pixels=False)


# --- flows on the posterior ----------------------------------------------------------------------


def amortised(sign):
    """Planar maps whose vectors the encoder gives (van den Berg et al.)."""
    encode, vectors, decode, x = Encoder(), nn.Linear(D, 2 * L), decoder(), torch.rand(B, D)

    def step():
        mu, log_std = encode(x)
        z0 = draw(mu, log_std)
        w, u = vectors(x).chunk(2, 1)
        wu = (w * u).sum(1, keepdim=True)
        u = u + (F.softplus(wu) - 1 - wu) * w / w.square().sum(1, keepdim=True)
        t = (w * z0).sum(1, keepdim=True).tanh()
        z, total = z0 + u * t, (1 + (1 - t**2) * (w * u).sum(1, keepdim=True)).log().sum(1)
        log_p = (-0.5 * z * z).sum(1)  # prior
        kl = log_normal(z0, mu, log_std).sum(1) + sign * total - log_p  # kl
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, vectors, decode, x))


@entry("correct|warning")  # without the constant of the prior
def amortised_planar_posterior():
    return amortised(-1)


@entry("bug", "logdet_mismatch")
def amortised_planar_posterior_with_the_sign_of_its_logdet():
    return amortised(1)


class Given(Autoregressive):
    def __init__(self):
        super().__init__()
        self.context = nn.Linear(L, L, bias=False)

    def forward(self, z, context):
        gate = torch.sigmoid(F.linear(z, self.gate.weight * self.mask) + self.context(context))
        return (gate * z).flip(-1), gate.log().sum(-1)  # logdet


def one_layer_of_three_heads(sign):
    """Mean, width and the context of the flow are thirds of one output."""
    encode, flow, decode, x = nn.Linear(D, 3 * L), Given(), decoder(), torch.rand(B, D)

    def step():
        mu, log_std, context = encode(x).chunk(3, 1)
        z0 = draw(mu, log_std)
        z, total = flow(z0, context)
        kl = log_normal(z0, mu, log_std).sum(1) + sign * total - log_prior(z)  # kl
        return (bce(decode(z), x) + kl.sum()) / B

    return Built(step, (encode, flow, decode, x))


@entry("correct")
def flow_posterior_whose_context_is_a_third_head():
    return one_layer_of_three_heads(-1)


@entry("bug", "logdet_mismatch")
def flow_posterior_with_a_third_head_and_the_sign_of_its_logdet():
    return one_layer_of_three_heads(1)


def speech(scales):
    """As in VITS: a flow to a prior that a text gives, and a decoder of a random crop of z."""
    encode, prior, out = nn.Conv1d(5, 8, 1), nn.Conv1d(3, 8, 1), nn.Conv1d(4, 5, 3, padding=1)
    net, x, text = nn.Conv1d(2, 4, 3, padding=1), torch.randn(3, 5, 9), torch.randn(3, 3, 9)

    def step():
        mu, log_std = encode(x).chunk(2, 1)
        z = draw(mu, log_std)
        a, b = z.chunk(2, 1)
        s, t = net(a).chunk(2, 1)
        zp = torch.cat([a, b * (s * scales).exp() + t], 1)
        mean, log_width = prior(text).chunk(2, 1)
        kl = log_width - log_std - 0.5 + 0.5 * ((zp - mean) / log_width.exp()) ** 2  # kl
        begins = (torch.rand(3) * 6).long().tolist()
        crops = [torch.stack([v[i, :, k : k + 4] for i, k in enumerate(begins)]) for v in (z, x)]
        return F.l1_loss(out(crops[0]), crops[1], reduction="sum") / 3 + kl.sum() / 3

    return Built(step, (encode, prior, out, net, x, text))


@entry("correct|warning")
def speech_with_a_flow_that_keeps_volume():
    return speech(0.0)


@entry("bug", "logdet_mismatch")
def speech_with_a_flow_whose_logdet_is_forgotten():
    return speech(1.0)
