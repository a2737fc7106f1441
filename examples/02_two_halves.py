"""One encoder with 2 * z_dim outputs: what makes the first half a mean, the second a log std?

A convolutional VAE of binarized digits, as many examples write it:

    encoding = encoder(x)
    z = Normal(encoding[:, :z_dim], encoding[:, z_dim:].exp()).rsample()
    loss = binary_cross_entropy(decoder(z), x) + KL

The network only emits numbers. This script swaps the halves, checks the gradient of each half,
and reads the second half in two ways at once.

python examples/02_two_halves.py [STEPS [PICTURE.png]]

The data are MNIST if $MUSIGMA_DATA contains it, and scikit-learn's 8x8 digits otherwise.
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

folder = Path(os.environ.get("MUSIGMA_DATA", "nowhere"), "mnist")
name = "mnist" if any(folder.glob("train-images*")) else "digits"
data = musigma.data.load(name, preprocess=musigma.Preprocess(binarize="threshold"))
train, held_out = data.split("train"), data.split("held-out")
side = data.shape[1]


def build(format: Format, seed: int = 0) -> VAE:
    """The networks of the example; only the head reads the halves."""
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
    """The bug: samples with std = exp(s), and computes the KL of std = exp(s / 2)."""
    q = model.encoder(x)
    log_px = model.decoder(q.rsample()).log_prob(x)
    kl = kl_divergence(DiagonalGaussian(q.mean, q.log_std / 2, 1), model.prior.head())
    return Evidence(log_px, kl[:, None], *torch.zeros(2, len(x)))


def train_on(model: VAE, evidence_of, seed: int = 0) -> list[float]:
    """Train the model; returns the losses, in nats per image."""
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
    """-ELBO of every held-out image in nats, with the KL in closed form."""
    return torch.from_numpy(musigma.score(model, held_out, batch_size=500)["nats"])


def report(name: str, nats: torch.Tensor) -> None:
    """Print a mean with its standard error over images."""
    print(f"  {name:<54} {nats.mean():8.2f} ± {nats.std() / len(nats) ** 0.5:.2f}")


print(f"data: {name}, {side}x{side}, binarized at 1/2; z_dim {z_dim}, {steps} steps of 64 images")
x = torch.from_numpy(held_out.take(range(64))).float()

# -- plain torch and musigma compute the same loss

mean_first, scale_first = Format(order="mean-first"), Format(order="scale-first")
model = build(mean_first)
torch.manual_seed(1)
encoding = model.encoder.net(x)
q = Normal(encoding[:, :z_dim], encoding[:, z_dim:].exp())
recon = F.binary_cross_entropy_with_logits(model.decoder.net(q.rsample()), x, reduction="sum")
plain = (recon + kl_divergence(q, Normal(0.0, 1.0)).sum()) / len(x)
torch.manual_seed(1)
ours = musigma.objectives.elbo(model(x)).mean()
print("\n1. Plain torch and musigma, with the same weights and noise")
print(f"  {plain:.4f} and {ours:.4f} nats: relative difference {(ours / plain - 1).abs():.0e}")

# -- (a) the loss decides what each half means

print(f"\n2. With the halves swapped: -ELBO of {len(held_out)} held-out images, nats")
swapped, other = build(scale_first), build(mean_first, seed=1)
curves = {"mean first": train_on(model, model), "scale first": train_on(swapped, swapped)}
train_on(other, other, seed=1)
nats, nats_swapped, nats_other = bounds(model), bounds(swapped), bounds(other)
report("mean first", nats)
report("scale first", nats_swapped)
report("difference per image", nats_swapped - nats)
report("for comparison: mean first, seed 1 minus seed 0", nats_other - nats)

print("  trained halves: average (spread over images, root mean square)")
images = torch.from_numpy(held_out.take(range(min(1000, len(held_out))))).float()
with torch.no_grad():
    halves = {"mean first": model.encoder.net(images), "scale first": swapped.encoder.net(images)}
for order, h in halves.items():
    a, b = h.chunk(2, 1)
    texts = (f"{t.mean():5.2f} ({t.var(0).mean().sqrt():.2f})" for t in (a, b))
    print("    {:<12} first half {}, second half {}".format(order, *texts))

moved = copy.deepcopy(model)
last = moved.encoder.net[-1]
weight, bias = mean_first.permute(last.weight.data, last.bias.data, scale_first)
last.weight.data, last.bias.data = weight, bias
moved.encoder.format = scale_first
change = (bounds(moved) - nats).abs().max()
print(f"  largest change after moving the trained rows to the other order: {change:.1e} nats")
moved.encoder.format = mean_first
report("the moved rows read in the old order", bounds(moved))

# -- (b) the gradients of each half

print("\n3. Gradients of the encoder's output against closed forms (64 images, float64)")
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
for name, gradient, closed in (
    ("KL, first half:     mean", of_kl[0], mean),
    ("KL, second half:    std^2 - 1", of_kl[1], std**2 - 1),
    ("recon, first half:  g = d recon / dz", of_recon[0], g),
    ("recon, second half: g * eps * std", of_recon[1], g * eps * std),
):
    error = (gradient - closed).abs().max()
    print(f"  {name:<40} error {error:.0e}, largest value {closed.abs().max():.1f}")


def second_half(eps: torch.Tensor) -> torch.Tensor:
    """Gradient of the reconstruction with respect to the second half, given the noise."""
    recon = -exact.decoder(mean + std * eps).log_prob(x64).sum()
    return torch.autograd.grad(recon, h, retain_graph=True)[0][:, z_dim:].detach()


without_noise = second_half(torch.zeros_like(mean)).abs().max()
average = torch.stack([second_half(torch.randn_like(mean)) for _ in range(50)]).mean()
print(f"  recon, second half, for eps = 0: {without_noise:.0f}")
print(f"  second half, average of 50 draws: recon {average:+.3f}, KL {of_kl[1].mean():+.3f} each")

# -- (c) two readings of the second half

print("\n4. Sampled with exp(s), while the KL reads s as a log variance: -ELBO, nats")
wrong = build(mean_first)
train_on(wrong, lambda x: mixed_readings(wrong, x))
with torch.no_grad():
    batches = musigma.evaluation.batches(wrong, held_out, batch_size=500)
    reported = torch.cat([-mixed_readings(wrong, x).elbo for x, _ in batches])
nats_wrong = bounds(wrong)
report("reported by the loss", reported)
report("true value, for the Gaussian that is sampled", nats_wrong)
report("loss over the model with one reading", nats_wrong - nats)

if picture:
    from matplotlib.figure import Figure

    figure = Figure((10, 3.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    bins = torch.linspace(-5, 5, 80).numpy()
    for ax, (order, h) in zip(axes, halves.items(), strict=False):
        for half, color, t in zip(("first", "second"), ("C0", "C1"), h.chunk(2, 1), strict=True):
            ax.hist(t.flatten().numpy(), bins, density=True, color=color, alpha=0.6, label=half)
        ax.set(title=f"read {order}", xlabel="output of the encoder", ylim=(0, 2))
        ax.legend(title="half", frameon=False)
    axes[0].set_ylabel("density of outputs")
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
