"""The sampling layer of a course, z = mu + exp(sigma / 2) * eps, and the meaning of its loss.

A convolutional VAE with batch norm of 64x64 color images, as courses teach it:

    mu, sigma = Dense(z_dim)(h), Dense(z_dim)(h)       # "sigma" is a LOG VARIANCE
    z = mu + exp(sigma / 2) * eps
    loss = 10000 * mean((x - decoder(z)) ** 2) - 0.5 * sum(1 + sigma - mu ** 2 - exp(sigma))

Questions: Is there one pair of mu and sigma, or one for every image? How does the decoder know
which image a z belongs to? If every image has its own Gaussian, why are new images drawn from
N(0, I)? And what is the factor 10000?

python examples/03_sampling_layer.py [STEPS [PICTURE.png]]

The script draws images of colored shapes; $MUSIGMA_EXAMPLE_IMAGES names a folder of others.
"""

import copy
import math
import os
import sys

import numpy as np
import torch
from torch import nn

import musigma
from musigma import VAE, DiagonalGaussian, Format, GaussianHead, Prior, StandardNormal

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
picture = sys.argv[2] if len(sys.argv) > 2 else None
z_dim, r_loss_factor = 32, 10_000


def shapes(n: int) -> np.ndarray:
    """Discs and squares of uniform random hue, position and size: uint8 (n, 3, 64, 64)."""
    hue, row, column, size, kind = np.random.default_rng(0).random((5, n, 1, 1), np.float32)
    radius = 8 + 8 * size
    down = abs(np.arange(64, dtype=np.float32)[:, None] - radius - (63 - 2 * radius) * row)
    across = abs(np.arange(64, dtype=np.float32) - radius - (63 - 2 * radius) * column)
    distance = np.where(kind < 0.5, np.hypot(down, across), np.maximum(down, across))
    inside = np.clip(radius - distance, 0, 1)
    third = np.arange(3, dtype=np.float32)[:, None, None] / 3
    color = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] - third))
    return np.uint8(255 * (0.15 + (color - 0.15) * inside[:, None]))


if folder := os.environ.get("MUSIGMA_EXAMPLE_IMAGES"):
    data = musigma.data.load(folder, preprocess=musigma.Preprocess(size=64))
else:
    data = musigma.data.Dataset(shapes(3000), name="colored shapes")
train, held_out = (
    torch.from_numpy(data.split(part, fraction=1 / 3).x).float() / 255
    for part in ("train", "held-out")
)
held_out = held_out[:2000]
n, shape, D = len(held_out), data.shape, math.prod(data.shape)
print(f"data: {data.name}; {len(train)} to train on, {n} held out; {steps} steps of 64")


class TwoDense(nn.Module):
    """Two parallel layers: mu, and what the course calls sigma."""

    def __init__(self, inputs: int):
        super().__init__()
        self.mu, self.sigma = nn.Linear(inputs, z_dim), nn.Linear(inputs, z_dim)

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of tensors that the head reads."""
        return self.mu(h), self.sigma(h)


def build(std: float) -> VAE:
    """The networks of the course, and a Gaussian likelihood with a fixed std."""

    def block(conv: nn.Module) -> nn.Module:
        return nn.Sequential(conv, nn.LeakyReLU(), nn.BatchNorm2d(conv.out_channels))

    torch.manual_seed(0)
    widths = ((shape[0], 16), (16, 32), (32, 32), (32, 32))
    downs = [block(nn.Conv2d(i, o, 3, 2, 1)) for i, o in widths]
    encoder = nn.Sequential(*downs, nn.Flatten(), TwoDense(512))
    ups = [block(nn.ConvTranspose2d(o, i, 4, 2, 1)) for i, o in widths[:0:-1]]
    start = (nn.Linear(z_dim, 512), nn.Unflatten(1, (32, 4, 4)))
    last = nn.ConvTranspose2d(16, shape[0], 4, 2, 1)
    decoder = nn.Sequential(*start, *ups, last, nn.Sigmoid())
    return VAE(
        GaussianHead(encoder, event_ndims=1, format=Format.parse("two-heads log_var")),
        musigma.distributions.likelihood("gaussian", shape, lambda _: decoder, std=std),
        Prior(StandardNormal((z_dim,))),
    )


@torch.no_grad()
def bound(model: VAE) -> str:
    """-ELBO of the held-out images, of a density over [0, 1], which may be negative."""
    torch.manual_seed(0)
    nats = -torch.cat([model(x).elbo for x in held_out.split(64)])
    return f"-ELBO {nats.mean():.1f} ± {nats.std() / n**0.5:.1f} nats per held-out image"


std = math.sqrt(D / (2 * r_loss_factor))
model = build(std)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for step in range(steps):
    x = train[musigma.data.batch_indices(len(train), 64, seed=0, step=step)]
    loss = musigma.objectives.elbo(model(x)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.eval()

# -- 1. the factor is the standard deviation of a Gaussian likelihood

exact, x = copy.deepcopy(model).double(), held_out[:64].double()
torch.manual_seed(1)
ours = musigma.objectives.elbo(exact(x)).mean()
torch.manual_seed(1)
mu, sigma = exact.encoder.net(x)
z = mu + (sigma / 2).exp() * torch.randn_like(mu)
r_loss = r_loss_factor * (x - exact.decoder.net(z)).square().mean((1, 2, 3))
kl_loss = -0.5 * (1 + sigma - mu.square() - sigma.exp()).sum(1)
course = (r_loss + kl_loss).mean()
constant = D * (math.log(std) + 0.5 * math.log(2 * math.pi))
total = course + constant

with torch.no_grad():
    emitted = [model.encoder.net(x) for x in held_out.split(64)]
    mean, log_std = model.encoder.format.split([torch.cat(t) for t in zip(*emitted, strict=True)])
    q, stds = DiagonalGaussian(mean, log_std, 1), log_std.exp()
    z = q.rsample()
    decoded = torch.cat([model.decode([some]) for some in z.split(64)])
mse, mse_other = ((decoded - x).square().mean().item() for x in (held_out, held_out.roll(1, 0)))
tighter = copy.deepcopy(model)
tighter.decoder.log_std = math.log(mse) / 2
print(f"""
1. The factor {r_loss_factor} is a Gaussian likelihood of std sqrt(D / (2 factor)) = {std:.3f}
  loss of the course + constant, 64 images:  {course:.4f} + {constant:.4f} = {total:.4f}
  -ELBO by musigma, same noise:  {ours:.4f}, relative error {abs(total / ours - 1):.0e}
  the trained model:  {bound(model)}
  its error is a std of {mse**0.5:.3f}, a factor of {D / (2 * mse):,.0f}; with that std,
  the same weights have  {bound(tighter)}""")

# -- 2. batch norm depends on the mode

print("\n2. Batch norm: mu of one image in batches with two different sets of 63 others")
for mode in ("train", "eval"):
    again = copy.deepcopy(model).train(mode == "train")
    with torch.no_grad():
        two = [torch.cat([held_out[:1], others]) for others in held_out[1:127].chunk(2)]
        a, b = (again.encoder(x).mean[0] for x in two)
    print(f"  {mode + '()':<8} difference {(a - b).abs().max():.3f}; {bound(again)}")

# -- 3. every image has its own mean and std

kl = (0.5 * (stds.square() + mean.square() - 1) - log_std).mean(0)
order = kl.argsort(descending=True).tolist()
grid = torch.linspace(-8, 8, 1601)[:, None]
normal = DiagonalGaussian(torch.zeros(1), torch.zeros(1), 1).log_prob(grid)
each = (DiagonalGaussian(mean[:, d], log_std[:, d], 0) for d in range(z_dim))
log_q = torch.stack([g.log_prob(grid).logsumexp(1) - math.log(n) for g in each])  # of all images
gap = (log_q.exp() * (log_q - normal)).sum(1) * 0.01  # KL(q(z_d) || p), on the grid
print(f"\n3. Every image has its own mean and std: {n} held-out images; the last three in nats")
print("  dimension   mean: spread   std: average, spread      KL = I(x; z_d) + KL(q(z_d) || p)")
for d in order[:10]:
    row = d, mean[:, d].std(), stds[:, d].mean(), stds[:, d].std(), kl[d], kl[d] - gap[d], gap[d]
    print("  {:9} {:14.3f} {:14.3f}, {:.3f} {:14.3f} = {:.3f} + {:.3f}".format(*row))
few, unused = (kl < 0.1).sum(), (kl < 0.01).sum()
print(
    f"  all {z_dim}: KL {kl.sum():.2f}; {few} below 0.1, of which {unused} are unused, below 0.01"
)

# -- 4. a z belongs to its image

joint = torch.cat([q.log_prob(some[:, None]) for some in z.split(32)])  # log q(z_i | x_j)
right = (joint.argmax(1) == torch.arange(n)).float().mean()
print(f"""
4. A z belongs to its image
  guessing the image of a z among {n}: right for {right:.1%} (by chance {1 / n:.2%})
  squared error per pixel to its own image {mse:.4f}, to another {mse_other:.4f}
  I(x; z) estimated from N images is at most log N, so these are lower bounds:""")
for m in (n // 16, n // 4, n):
    ratio = joint.diagonal()[:m] - joint[:m, :m].logsumexp(1) + math.log(m)
    known, error = ratio.mean(), ratio.std() / m**0.5
    print(f"  N = {m:4}: {known:.2f} ± {error:.2f} nats, of log N = {math.log(m):.2f}")

# -- 5. the aggregate posterior

center, cov = mean.double().mean(0), mean.double().T.cov(correction=0)
cov += stds.double().square().mean(0).diag()
moments = 0.5 * (cov.trace() + center.square().sum() - z_dim - cov.logdet())
spans = [f"{t.min():.2f} to {t.max():.2f}" for t in (center, cov.diag(), cov - cov.diag().diag())]
print("\n5. The aggregate posterior q(z) against N(0, I)")
print("  means {}; variances {}; covariances {}".format(*spans))
print("  KL(q(z|x) || p) = I(x; z) + KL(q(z) || p), in nats:", end=" ")
print(f"{kl.sum():.2f} = {known:.2f} + {kl.sum() - known:.2f}, with N = {n}")
print(f"  with more images, the last term falls to at least {moments:.2f}, that of its moments")

if picture:
    from matplotlib.figure import Figure

    figure, eight = Figure((10, 4.4), dpi=110, layout="constrained"), order[:8]
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    left.suptitle("images, their decoded means, and mean ± 2 std of z", fontsize=11)
    left.supxlabel("the eight dimensions with the largest KL", fontsize=10)
    above, below = right.subplots(2, 1, sharex=True)
    for i, column in enumerate(left.subplots(3, 5, height_ratios=(1, 1, 1.5)).T):
        with torch.no_grad():
            pair = held_out[i], model.decode([mean[i : i + 1]])[0]
        for ax, image in zip(column, pair, strict=False):
            ax.imshow(image.permute(1, 2, 0), cmap="gray")
            ax.axis("off")
        column[2].errorbar(range(8), mean[i, eight], 2 * stds[i, eight], fmt=".", color=f"C{i}")
        column[2].set(ylim=(-3.5, 3.5), xticks=[], yticks=[] if i else (-2, 0, 2))
        density = DiagonalGaussian(mean[i, eight[:1]], log_std[i, eight[:1]], 1).log_prob(grid)
        above.fill_between(grid[:, 0], density.exp(), color=f"C{i}", alpha=0.5)
    above.set_title("q(z|x) of these five, in the first of the eight dimensions", fontsize=11)
    below.fill_between(grid[:, 0], log_q[eight[0]].exp(), color="0.75", label=f"all {n} images")
    below.plot(grid[:, 0], normal.exp(), "k--", lw=1.2, label="N(0, 1)")
    below.legend(frameon=False, fontsize=9, loc="upper right")
    above.set_ylabel("density")
    below.set(xlim=(-4, 4), ylim=(0, 0.5), xlabel="z", ylabel="density")
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
    right.align_ylabels()
    figure.savefig(picture, metadata={"Software": None})
    print(f"\nwritten: {picture}")
