"""VAEs of one latent, all right: networks, machinery of torch, and what stands beside the ELBO."""

from __future__ import annotations

import functools
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

from corpus_steps_base import B, Built, D, Encoder, H, L, data, decoder, entry, mlp, vae
from corpus_steps_vae import bce, sse

# --- right: networks and machinery ---------------------------------------------------------------


class Packed(nn.Module):
    """One linear layer emits both heads."""

    def __init__(self, split):
        super().__init__()
        self.split, self.encode, self.decode = split, mlp(D, 2 * L), decoder()

    def step(self, x):
        mu, log_var = self.split(self.encode(x))
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        return bce(self.decode(z), x) - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl


def packed(split):
    net, x = Packed(split), data()
    return Built(lambda: net.step(x), (net, x))


@entry("correct", convention="log_var")
def packed_in_halves():
    return packed(lambda h: h.chunk(2, dim=1))


def heads_after_relus(exponent):
    """Heads end in ReLUs, which are off for some examples wherever they are moved to."""
    net, decode, x = mlp(D, 2 * L), decoder(), data()
    with torch.no_grad():
        net[-1].bias -= 1.0
        net[-1].weight *= 3.0

    def step():
        mu, b = net(x).relu().chunk(2, 1)
        z = mu + (exponent * b).exp() * torch.randn_like(mu)
        return bce(decode(z), x) - 0.5 * (1 + b - mu**2 - b.exp()).sum()

    return Built(step, (net, decode, x))


@entry("warning", "sigma_range_restricted", says="weight 1 beside a Bernoulli likelihood")
def relus_on_both_heads():
    return heads_after_relus(0.5)


@entry("bug", "kl_mismatch")
def relus_on_both_heads_wrong():
    return heads_after_relus(1.0)


@entry("correct")
def beside_an_array_that_is_read_only():
    array = np.ones((B, L))
    array.setflags(write=False)
    built = vae(
        lambda mu, b: mu + (0.5 * b).exp() * torch.randn_like(mu) * torch.tensor(array).float(),
        lambda mu, b: -0.5 * (1 + b - mu**2 - b.exp()).sum(),
        bce,
    )
    return Built(built.step, (*built.objects, array))


@entry("correct", convention="log_var")
def packed_odd_and_even():
    return packed(lambda h: (h[:, ::2], h[:, 1::2]))


@entry("correct")
def packed_and_changed_in_place():
    def split(h):
        out = torch.empty_like(h)
        out[:, :L] = h[:, :L] * 2
        out[:, L:] = h[:, L:]
        out[:, L:].clamp_(-8, 8)
        return out[:, :L], out[:, L:]

    return packed(split)


@entry("correct", convention="log_var")
def batch_norm_and_dropout():
    x = data()
    body = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Dropout(0.3))
    mu_of, log_var_of = nn.Linear(H, L), nn.Linear(H, L)
    decode = nn.Sequential(nn.Linear(L, H), nn.BatchNorm1d(H), nn.ReLU(), nn.Linear(H, D))

    def step():
        h = body(x)
        mu, log_var = mu_of(h), log_var_of(h)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        return bce(decode(z), x) - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (body, mu_of, log_var_of, decode, x))


@entry("correct", convention="log_std")
def sentences():
    tokens = torch.randint(0, 9, (B, 7))
    embed, read, write = nn.Embedding(9, 8), nn.LSTM(8, H, batch_first=True), nn.LSTM(8, H)
    heads, start, out = nn.Linear(H, 2 * L), nn.Linear(L, H), nn.Linear(H, 9)

    def step():
        _, (h, _) = read(embed(tokens))
        mu, log_std = heads(h[-1]).chunk(2, -1)
        z = mu + log_std.exp() * torch.randn_like(mu)  # draw
        h0 = start(z).tanh()[None]
        y, _ = write(embed(tokens[:, :-1]).transpose(0, 1), (h0, torch.zeros_like(h0)))
        nll = F.cross_entropy(out(y).permute(1, 2, 0), tokens[:, 1:], reduction="sum")
        kl = 0.5 * (mu**2 + (2 * log_std).exp() - 1) - log_std  # kl
        return (nll + kl.sum()) / B

    return Built(step, (embed, read, write, heads, start, out, tokens))


@entry("correct", convention="log_var")
def attention():
    x = torch.rand(B, 4, 8)
    encode = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    heads, decode = nn.Linear(32, 2 * L), decoder(32)

    def step():
        mu, log_var = heads(encode(x).flatten(1)).chunk(2, 1)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        recon = sse(decode(z), x.flatten(1))
        return recon - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (encode, heads, decode, x))


@entry("correct", convention="log_var")
def images():
    x = torch.rand(3, 2, 8, 8)
    encode = nn.Sequential(
        nn.Conv2d(2, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1)
    )
    decode = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(8, 2, 4, 2, 1)
    )

    def step():  # the latent is an image of 4 channels
        mu, log_var = encode(x).chunk(2, dim=1)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(dim=(1, 2, 3))  # kl
        return ((decode(z) - x) ** 2).sum(dim=(1, 2, 3)).mean() + kl.mean()

    return Built(step, (encode, decode, x))


def inline(forward, *objects):
    """A step whose `forward(x)` gives (mu, log_var, logits)."""
    x = data()

    def step():
        mu, log_var, logits = forward(x)
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl
        return bce(logits.float(), x) + kl.float()

    return Built(step, (*objects, x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = Encoder(), decoder()

    def forward(self, x):
        mu, log_var = self.encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        return mu, log_var, self.decode(z)


@entry("correct")
def autocast():
    net = Plain()

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    return inline(forward, net)


@entry("correct", convention="log_var")
def compiled_eager():
    net = Plain()
    return inline(torch.compile(net, backend="eager"), net)


@entry("correct|incomplete")
def compiled_aot_eager():
    net = Plain()
    return inline(torch.compile(net, backend="aot_eager"), net)


@entry("correct|incomplete")
def scripted():
    encode, decode = Encoder(), decoder()
    with warnings.catch_warnings():  # torch deprecates it
        warnings.simplefilter("ignore")
        fast = torch.jit.trace(encode, data(), check_trace=False)

    def forward(x):
        mu, log_var = fast(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        return mu, log_var, decode(z)

    return inline(forward, encode, decode)


@entry("correct", convention="log_var")
def checkpointed():
    net = Plain()
    return inline(lambda x: checkpoint(net, x, use_reentrant=False), net)


@entry("correct", convention="log_var")
def double():
    net = Plain().double()
    x = data().double()

    def step():
        mu, log_var, logits = net(x)
        return bce(logits, x) - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (net, x))


class Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


@entry("correct|incomplete")
def own_function():
    encode, decode = Encoder(), decoder()

    def forward(x):
        mu, log_var = encode(x)
        z = mu + Exp.apply(0.5 * log_var) * torch.randn_like(mu)  # draw
        return mu, log_var, decode(z)

    return inline(forward, encode, decode)


@entry("correct", convention="log_var")
def generator_of_its_own():
    encode, decode = Encoder(), decoder()
    generator = torch.Generator().manual_seed(3)

    def forward(x):
        mu, log_var = encode(x)
        eps = torch.randn(mu.shape, generator=generator)
        z = mu + (0.5 * log_var).exp() * eps  # draw
        return mu, log_var, decode(z)

    return inline(forward, encode, decode, generator)


# --- right: reconstructions and company ----------------------------------------------------------


@entry("correct", convention="log_var")
def scale_of_the_decoder_learned():
    encode, decode, x = Encoder(), decoder(), data()
    log_sigma = nn.Parameter(torch.randn(()) * 0.3)

    def step():
        mu, log_var = encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        nll = 0.5 * ((x - decode(z)) / log_sigma.exp()) ** 2 + log_sigma
        return nll.sum() - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (encode, decode, log_sigma, x))


@entry("correct", convention="log_var")
def gaussian_decoder():
    encode, decode, x = Encoder(), decoder(2 * D), data()

    def step():
        mu, log_var = encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        m, s = decode(z).chunk(2, 1)
        nll = F.gaussian_nll_loss(m, x, s.exp(), full=True, reduction="sum")
        return (nll - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()) / B  # kl

    return Built(step, (encode, decode, x))


@entry("correct", convention="log_var")
def noise_on_the_input():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_var = encode(x + 0.3 * torch.randn_like(x))
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        return sse(decode(z), x) - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (encode, decode, x))


@entry("correct|incomplete|warning", convention="log_var")
def classifier_beside():
    encode, decode, x = Encoder(), decoder(), data()
    classify, y = nn.Linear(L, 4), torch.arange(B) % 4

    def step():
        mu, log_var = encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        labels = F.cross_entropy(classify(z), y, label_smoothing=0.1, reduction="sum")
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl
        return bce(decode(z), x) + labels + kl

    return Built(step, (encode, decode, classify, x, y))


@entry("correct", convention="log_var")
def features_compared():
    encode, decode, x = Encoder(), decoder(), data()
    features = mlp(D, 9).requires_grad_(False)

    def step():
        mu, log_var = encode(x)
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        recon = sse(features(decode(z)), features(x))
        return recon - 0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl

    return Built(step, (encode, decode, features, x))


@entry("correct|incomplete")
def product_of_experts():
    x, y = data(), data(B, 7)
    first, second, decode_x, decode_y = Encoder(), Encoder(7), decoder(), decoder(7)

    def step():
        (m1, s1), (m2, s2) = first(x), second(y)
        t1, t2 = (-s1).exp(), (-s2).exp()
        precision = 1 + t1 + t2
        mu, log_var = (m1 * t1 + m2 * t2) / precision, -precision.log()
        z = mu + (0.5 * log_var).exp() * torch.randn_like(mu)  # draw
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum()  # kl
        return bce(decode_x(z), x) + bce(decode_y(z), y) + kl

    return Built(step, (first, second, decode_x, decode_y, x, y))


def two_latents(draw):
    x, style, content, decode = data(), Encoder(), Encoder(latents=3), decoder(latents=L + 3)

    def step():
        (m1, log_var), (m2, log_std) = style(x), content(x)
        z1 = draw(m1, log_var)
        z2 = m2 + log_std.exp() * torch.randn_like(m2)  # draw
        kl1 = -0.5 * (1 + log_var - m1**2 - log_var.exp()).sum()  # kl
        kl2 = (0.5 * (m2**2 + (2 * log_std).exp() - 1) - log_std).sum()  # kl
        return (bce(decode(torch.cat([z1, z2], 1)), x) + kl1 + kl2) / B

    return Built(step, (style, content, decode, x))


@entry("correct")
def two_latents_side_by_side():
    return two_latents(lambda m, b: m + (0.5 * b).exp() * torch.randn_like(m))  # draw


@entry("incomplete")
def two_latents_of_which_one_is_its_mean():
    return two_latents(lambda m, b: m)


@entry("correct|incomplete|warning")
def sticking_the_landing():  # log q without its score: the gradient is right in expectation
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_std = encode(x)
        z = Normal(mu, log_std.exp()).rsample()
        log_q = Normal(mu.detach(), log_std.exp().detach()).log_prob(z)
        return (bce(decode(z), x) + (log_q - Normal(0.0, 1.0).log_prob(z)).sum()) / B

    return Built(step, (encode, decode, x))


@entry("incomplete|warning|correct")
def gradient_by_its_score():
    encode, decode, x = Encoder(), decoder(), data()

    def step():
        mu, log_std = encode(x)
        q = Normal(mu, log_std.exp())
        z = q.sample()
        recon = F.binary_cross_entropy_with_logits(decode(z), x, reduction="none").sum(1)
        score = q.log_prob(z).sum(1) * (recon - recon.mean()).detach()
        return (recon + score + kl_divergence(q, Normal(0.0, 1.0)).sum(1)).mean()

    return Built(step, (encode, decode, x))


@entry("correct|warning")
def bayes_by_backprop():
    x, y = torch.randn(B, 4), torch.randn(B, 1)
    w = nn.ParameterDict({"mu": torch.randn(5, 4), "rho": torch.randn(5, 4) - 1})
    out = nn.ParameterDict({"mu": torch.randn(1, 5), "rho": torch.randn(1, 5) - 1})

    def weights(p):
        std = F.softplus(p["rho"])
        kl = 0.5 * (p["mu"] ** 2 + std**2 - 1) - std.log()  # kl
        w = p["mu"] + std * torch.randn_like(std)  # draw
        return w, kl.sum()

    def step():  # 10 batches an epoch
        (a, kl_a), (b, kl_b) = weights(w), weights(out)
        nll = 0.5 * ((x @ a.T).tanh() @ b.T - y).square().sum()
        return nll + (kl_a + kl_b) / 10

    return Built(step, (w, out, x, y))


@entry("correct")
def constants_that_the_first_run_computes():
    encode, decode, x = Encoder(), decoder(), data()

    @functools.cache
    def sizes():
        return torch.linspace(0.5, 1.5, L).square().sqrt()

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)
        return sse(decode(z * sizes()), x) + (mu**2 + b.exp() - 1 - b).sum()

    return Built(step, (encode, decode, x))


@entry("correct|warning")
def bayes_by_backprop_with_a_mixture_of_scales():
    x, y = torch.randn(B, 4), torch.randn(B, 1)
    layers = [nn.ParameterDict({"mu": torch.randn(n, m), "rho": torch.randn(n, m) - 3})
              for n, m in ((5, 4), (6, 5), (1, 6))]  # fmt: skip

    def step():
        h, kl = x, 0.0
        for p in layers:
            q = Normal(p["mu"], F.softplus(p["rho"]))
            w = q.rsample()
            narrow, wide = (Normal(0.0, s).log_prob(w).exp() for s in (0.05, 1.0))
            kl = kl + (q.log_prob(w) - (0.25 * narrow + 0.75 * wide).log()).sum()
            h = (h @ w.T).tanh()
        return 0.5 * (h - y).square().sum() + kl / 10

    return Built(step, (layers, x, y))


# --- graphs --------------------------------------------------------------------------------------


def edges_of_a_graph(weight):
    """Probabilities of the edges, and of as many pairs that are drawn."""
    encode, x, edges = Encoder(), data(), torch.randint(0, B, (2, 20))

    def step():
        mu, b = encode(x)
        z = mu + (0.5 * b).exp() * torch.randn_like(mu)
        drawn = torch.randint(0, B, edges.shape)
        p, q = ((z[i] * z[j]).sum(1).sigmoid() for i, j in (edges, drawn))
        nll = -torch.log(p + 1e-15).sum() - torch.log(1 - q + 1e-15).sum()
        return nll + weight * 0.5 * (mu**2 + b.exp() - 1 - b).sum()

    return Built(step, (encode, x, edges))


@entry("correct")
def edges_that_are_drawn():
    return edges_of_a_graph(1.0)


@entry("warning", "reduction_imbalance", beta=(0.05,))
def edges_that_are_drawn_beside_a_small_kl():
    return edges_of_a_graph(0.05)
