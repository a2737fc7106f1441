"""One encoder, 2 * z_dim outputs: what makes the first half a mean, the second a log std?

A convolutional VAE of binarised digits, as it stands in many a snippet:

    encoding = encoder(x)
    z = Normal(encoding[:, :z_dim], encoding[:, z_dim:].exp()).rsample()
    loss = binary_cross_entropy(decoder(z), x) + KL

The network just emits numbers. This script swaps the halves, checks the gradients that each half
gets, and reads the halves in two ways at once, and prints what comes of it.

python examples/02_two_halves.py [STEPS [PICTURE.png]]

The data are MNIST where $MUSIGMA_DATA holds it, and scikit-learn's digits of 8x8 otherwise.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

import musigma
from musigma import VAE, DiagonalGaussian, Evidence, Format, GaussianHead, Prior, StandardNormal

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1200
picture = sys.argv[2] if len(sys.argv) > 2 else None
z_dim = 16

own = Path(os.environ.get("MUSIGMA_DATA", "nowhere"), "mnist")
name = "mnist" if any(own.glob("train-images*")) else "digits"
data = musigma.data.load(name, preprocess=musigma.Preprocess(binarize="threshold"))
train, held_out = data.split("train"), data.split("held-out")
side = data.shape[1]


def build(format: Format, seed: int = 0) -> VAE:
    """The snippet's networks; only the head knows which half is which."""
    torch.manual_seed(seed)
    small = side // 4
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32 * small**2, 2 * z_dim)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(z_dim, 32 * small**2), nn.Unflatten(1, (32, small, small)), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU()),
        nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
    )
    likelihood = musigma.distributions.likelihood(
        "bernoulli", data.shape, lambda _: decoder, levels=2
    )
    head = GaussianHead(encoder, event_ndims=1, format=format)
    return VAE(head, likelihood, Prior(StandardNormal((z_dim,))))


def mixed_readings(model: VAE, x: torch.Tensor) -> Evidence:
    """Draws with std = exp(s), and pays the KL of std = exp(s / 2): the bug."""
    q = model.encoder(x)
    log_px = model.decoder(q.rsample()).log_prob(x)
    kl = kl_divergence(DiagonalGaussian(q.mean, q.log_std / 2, 1), model.prior.head())
    return Evidence(log_px, kl[:, None], *torch.zeros(2, len(x)))


def train_on(model: VAE, evidence_of, seed: int = 0) -> list[float]:
    """The usual loop; returns the losses, in nats per image."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(seed)
    losses = []
    for step in range(steps):
        indices = musigma.data.batch_indices(len(train), 64, seed=seed, step=step)
        evidence = evidence_of(torch.from_numpy(train.take(indices)).float())
        loss = musigma.objectives.elbo(evidence).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def bounds(model: VAE) -> torch.Tensor:
    """-ELBO of every held-out image in nats, closed-form KL."""
    return torch.from_numpy(musigma.score(model, held_out, batch_size=500)["nats"])


def report(what: str, nats: torch.Tensor) -> None:
    """A mean with its standard error over images."""
    print(f"  {what:<54} {nats.mean():8.2f} ± {nats.std() / len(nats) ** 0.5:.2f}")


print(f"data: {name}, {side}x{side}, binarised at half; z_dim {z_dim}, {steps} steps of 64 images")
x = torch.from_numpy(held_out.take(range(64))).float()

# -- the snippet and the library compute the same loss

mean_first, scale_first = Format(order="mean-first"), Format(order="scale-first")
model = build(mean_first)
torch.manual_seed(1)
encoding = model.encoder.net(x)
q = Normal(encoding[:, :z_dim], encoding[:, z_dim:].exp())
recon = F.binary_cross_entropy_with_logits(model.decoder.net(q.rsample()), x, reduction="sum")
snippet = (recon + kl_divergence(q, Normal(0.0, 1.0)).sum()) / len(x)
torch.manual_seed(1)
ours = musigma.objectives.elbo(model(x)).mean()
print("\n1. The snippet in plain torch, and musigma, from the same weights and noise")
print(f"  {snippet:.4f} and {ours:.4f} nats: {(ours / snippet - 1).abs():.0e} apart, relative")

# -- (a) the loss decides which half is which

print(f"\n2. The halves swapped: -ELBO of {len(held_out)} held-out images, nats")
swapped, other = build(scale_first), build(mean_first, seed=1)
curves = {"mean first": train_on(model, model), "scale first": train_on(swapped, swapped)}
train_on(other, other, seed=1)
nats, nats_swapped, nats_other = bounds(model), bounds(swapped), bounds(other)
report("mean first", nats)
report("scale first", nats_swapped)
report("difference, image by image", nats_swapped - nats)
report("for scale: mean first, another seed, minus the first", nats_other - nats)

print("  what the halves came to hold: average (spread over images, root mean square)")
images = torch.from_numpy(held_out.take(range(min(1000, len(held_out))))).float()
with torch.no_grad():
    halves = {"mean first": model.encoder.net(images), "scale first": swapped.encoder.net(images)}
for order, h in halves.items():
    a, b = h.chunk(2, 1)
    said = (f"{t.mean():5.2f} ({t.var(0).mean().sqrt():.2f})" for t in (a, b))
    print("    {:<12} first half {}, second half {}".format(order, *said))

moved = copy.deepcopy(model)
last = moved.encoder.net[-1]
weight, bias = mean_first.permute(last.weight.data, last.bias.data, scale_first)
last.weight.data, last.bias.data = weight, bias
moved.encoder.format = scale_first
off = (bounds(moved) - nats).abs().max()
print(f"  the trained model's rows moved to the other order: {off:.1e} nats apart at most")
moved.encoder.format = mean_first
report("and the same rows, read in the old order", bounds(moved))

# -- (b) the gradients of each half

print("\n3. Gradients on the encoder's output, against closed forms (64 images, float64)")
exact, x64 = copy.deepcopy(model).double(), x.double()
h = exact.encoder.net(x64).detach().requires_grad_()
mean, log_std = mean_first.split(h)
q = DiagonalGaussian(mean, log_std, 1)
eps = torch.randn(mean.shape, dtype=mean.dtype)
z = q.unwhiten(eps)
recon = -exact.decoder(z).log_prob(x64).sum()
kl = kl_divergence(q, exact.prior.head()).sum()
(g,) = torch.autograd.grad(recon, z, retain_graph=True)
of_recon = torch.autograd.grad(recon, h, retain_graph=True)[0].chunk(2, 1)
of_kl = torch.autograd.grad(kl, h, retain_graph=True)[0].chunk(2, 1)
std = log_std.exp()
for what, found, closed in (
    ("KL, first half:     mean", of_kl[0], mean),
    ("KL, second half:    std^2 - 1", of_kl[1], std**2 - 1),
    ("recon, first half:  g = d recon / dz", of_recon[0], g),
    ("recon, second half: g * eps * std", of_recon[1], g * eps * std),
):
    print(f"  {what:<40} off by {(found - closed).abs().max():.0e} of {closed.abs().max():.1f}")


def second_half(eps: torch.Tensor) -> torch.Tensor:
    """The gradient of the reconstruction on the second half, given the noise."""
    recon = -exact.decoder(mean + std * eps).log_prob(x64).sum()
    return torch.autograd.grad(recon, h, retain_graph=True)[0][:, z_dim:].detach()


quiet = second_half(torch.zeros_like(mean)).abs().max()
push = torch.stack([second_half(torch.randn_like(mean)) for _ in range(50)]).mean()
print(f"  recon, second half, where eps = 0: {quiet:.0f}")
print(
    f"  second half, average of 50 draws: recon {push:+.3f}, KL {of_kl[1].mean():+.3f} per output"
)

# -- (c) two readings at once

print("\n4. Drawn with exp(s), while the KL reads s as a log variance: -ELBO, nats")
wrong = build(mean_first)
train_on(wrong, lambda x: mixed_readings(wrong, x))
with torch.no_grad():
    batches = musigma.evaluation.batches(wrong, held_out, batch_size=500)
    claimed = torch.cat([-mixed_readings(wrong, x).elbo for x, _ in batches])
nats_wrong = bounds(wrong)
report("what its loss says", claimed)
report("what is true of it, by the Gaussian that it draws from", nats_wrong)
report("worse than the model with one reading by", nats_wrong - nats)

if picture:
    from matplotlib.figure import Figure

    figure = Figure((10, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    bins = torch.linspace(-5, 5, 80).numpy()
    for ax, (order, h) in zip(axes, halves.items(), strict=False):
        for half, color, t in zip(("first", "second"), ("C0", "C1"), h.chunk(2, 1), strict=True):
            ax.hist(t.flatten().numpy(), bins, density=True, color=color, alpha=0.6, label=half)
        ax.set(title=f"read {order}", xlabel="what the encoder emits", ylim=(0, 2))
        ax.legend(title="half", frameon=False)
    axes[0].set_ylabel("share of outputs, per unit")
    for (order, losses), color in zip(curves.items(), ("C2", "C3"), strict=True):
        smooth = torch.tensor(losses).unfold(0, max(1, steps // 50), 1).mean(1)
        axes[2].plot(smooth, label=order, color=color, lw=1.2)
    axes[2].set(title="training, smoothed", xlabel="step", ylabel="-ELBO, nats per image")
    axes[2].set_ylim(smooth.min() - 2, smooth.min() + 60)
    axes[2].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Software": None})
    print(f"\nwritten: {picture}")
