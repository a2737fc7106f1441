"""A VAE whose sampler and KL disagree learns a wrong sigma; the audit names the repair.

The data are x = z + noise with z ~ N(0, 1) and noise ~ N(0, 1), so the exact posterior is
N(x / 2, 1/2): its sigma is sqrt(1/2) = 0.707. The decoder is the true one, N(z, 1); only the
encoder is trained. It emits a mean and s:

    z = mean + exp(s) * eps                           the sampler reads s as log sigma
    KL = -1/2 (1 + s - mean^2 - exp(s))               the KL reads s as log variance

With v = exp(s), the loss is (v^2 + v - log v) / 2 + terms without v, and its minimum is at
2 v^2 + v = 1: the sampler's sigma becomes v = 0.500. Nothing looks wrong while it trains. The
script trains this VAE, audits it, applies the repair, and trains again; then it trains the same
model in musigma, where a `Format` says once what s is.

python examples/07_audit_sigma.py [STEPS [PICTURE.svg]]
"""

import math
import sys

import torch

import musigma
from musigma import VAE, DiagonalGaussian, Format, GaussianHead, Prior, StandardNormal
from musigma.audit import audit_vae

SEEDS = 5
BATCH = 1024
EXACT = math.sqrt(0.5)


def sample(mean, s):
    return mean + s.exp() * torch.randn_like(mean)


def kl(mean, s):
    return -0.5 * (1 + s - mean**2 - s.exp()).sum(-1)


def repaired_kl(mean, s):  # exp(s) becomes exp(2 s), and s becomes 2 s
    return -0.5 * (1 + 2 * s - mean**2 - (2 * s).exp()).sum(-1)


def draw(n):
    return torch.randn(n, 1) + torch.randn(n, 1)


def train(encoder, loss, steps):
    """The encoder's s after every step."""
    optimizer = torch.optim.Adam(encoder.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(draw(BATCH)).mean().backward()
        optimizer.step()
        schedule.step()
        path.append(encoder.bias[1].item())
    return path


def new_encoder(seed):
    torch.manual_seed(seed)
    encoder = torch.nn.Linear(1, 2)
    with torch.no_grad():
        encoder.bias[1] = 0  # sigma begins at 1
    encoder.weight.register_hook(lambda grad: grad * torch.tensor([[1.0], [0.0]]))
    with torch.no_grad():
        encoder.weight[1] = 0  # s is the same for all x, as the exact posterior's is
    return encoder


def by_hand(seed, kl, steps):
    encoder = new_encoder(seed)

    def loss(x):
        mean, s = encoder(x).chunk(2, -1)
        return 0.5 * ((x - sample(mean, s)) ** 2).sum(-1) + kl(mean, s)

    return train(encoder, loss, steps)


def native(seed, steps):
    """The same model in musigma: its head says that the second output is log sigma."""
    encoder = new_encoder(seed)
    head = GaussianHead(encoder, event_ndims=1, format=Format.parse("halves log_std"))
    model = VAE(head, TrueDecoder(), Prior(StandardNormal((1,))))
    return model, train(encoder, lambda x: musigma.objectives.elbo(model(x)), steps)


class TrueDecoder(torch.nn.Module):
    """p(x|z) = N(z, 1)."""

    def forward(self, z, context=None):
        return DiagonalGaussian(z, torch.zeros_like(z), event_ndims=1)


def summary(paths):
    sigmas = torch.tensor([math.exp(path[-1]) for path in paths])
    return sigmas.mean().item(), sigmas.std().item() / math.sqrt(len(paths))


def draw_picture(path, wrong, repaired):
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    gray, red, blue = "#808890", "#d9603b", "#4c8fd6"  # readable on light and on dark pages
    style = {"svg.hashsalt": "musigma", "font.size": 10, "text.color": gray}
    for name in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        style[name] = gray
    with rc_context(style):
        figure = Figure(figsize=(8.4, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        for paths, color in ((wrong, red), (repaired, blue)):
            for one in paths:
                some = range(0, len(one), 4)
                left.plot(some, [math.exp(one[i]) for i in some], color=color, lw=0.9, alpha=0.7)
        left.axhline(EXACT, color=gray, lw=1, ls="--")
        left.text(len(wrong[0]), EXACT + 0.015, "truth: 0.707", ha="right", color=gray)
        left.set(xlabel="training step", ylabel="learned σ", ylim=(0.4, 1.02))
        x = 1.0
        z = torch.linspace(-2, 3, 300)
        exact = torch.distributions.Normal(x / 2, EXACT).log_prob(z).exp()
        right.fill_between(z, exact, color=gray, alpha=0.3, lw=0)
        for paths, color, name in (
            (wrong, red, "before"),
            (repaired, blue, "after the repair"),
        ):
            sigma, _ = summary(paths)
            density = torch.distributions.Normal(x / 2, sigma).log_prob(z).exp()
            right.plot(z, density, color=color, lw=1.8)
            left.text(
                len(paths[0]), sigma - 0.055, f"{name}: {sigma:.3f}", ha="right", color=color
            )
        right.text(-1.95, 0.8, "gray: exact\nposterior of z,\ngiven x = 1", color=gray, va="top")
        right.text(1.15, 0.62, "before", color=red)
        right.text(1.65, 0.24, "after", color=blue)
        right.set(xlabel="z", ylabel="density", ylim=(0, 0.85))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, transparent=True, metadata={"Date": None})


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 800
wrong = [by_hand(seed, kl, steps) for seed in range(SEEDS)]
print("sigma before:    {:.3f} ± {:.3f}, by the closed form 0.500".format(*summary(wrong)))

report = audit_vae(sample=sample, kl=kl)
print(report)

repaired = [by_hand(seed, repaired_kl, steps) for seed in range(SEEDS)]
print("sigma repaired:  {:.3f} ± {:.3f}, exact 0.707".format(*summary(repaired)))
assert audit_vae(sample=sample, kl=repaired_kl).verdict == "correct"

natively = [native(seed, steps) for seed in range(SEEDS)]
model = natively[0][0]
mean, error = summary([path for _, path in natively])
print(f"sigma, musigma:  {mean:.3f} ± {error:.3f}, exact 0.707")

if len(sys.argv) > 2:
    draw_picture(sys.argv[2], wrong, repaired)
