"""The textbook VAE: for every observation two vectors, mu and sigma, of independent normals.

    python examples/05_textbook.py [STEPS [PICTURE.png]]

mu and sigma come out of the encoder. Are they the mean and the standard deviation of something: of
the activations, of the batch, of the data? No: they are outputs of functions of one observation's
features. Images of a disc whose place is known show what they are, and how they move in training.
"""

import sys

import torch
from torch import nn

import musigma
from musigma import GaussianHead

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2500
picture = sys.argv[2] if len(sys.argv) > 2 else None
SIDE, HIDDEN, SHOWN = 16, 128, 12


def discs(n, reach, seed):
    """Binary images (n, 1, 16, 16) of a disc, and its place (n, 2): right and down, in pixels."""
    draw = torch.Generator().manual_seed(seed)
    place = (2 * torch.rand(n, 2, generator=draw) - 1) * torch.tensor(reach)
    grid = torch.arange(SIDE) - (SIDE - 1) / 2
    right, down = grid.view(1, 1, -1) - place[:, 0, None, None], grid.view(1, -1, 1)
    far = right**2 + (down - place[:, 1, None, None]) ** 2
    return (far < 3.0**2).float().unsqueeze(1), place


class Features(nn.Module):
    """The encoder's network: hidden features, and two linear functions of them."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, HIDDEN), nn.Tanh())
        self.mu, self.log_sigma = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 2)

    def forward(self, x):
        h = self.hidden(x)
        return self.mu(h), self.log_sigma(h)  # sigma = exp of it: positive, whatever is emitted


def textbook(seed):
    torch.manual_seed(seed)
    decoder = nn.Sequential(
        nn.Linear(2, HIDDEN),
        nn.Tanh(),
        nn.Linear(HIDDEN, SIDE**2),
        nn.Unflatten(1, (1, SIDE, SIDE)),
    )
    return musigma.VAE(
        GaussianHead(Features(), event_ndims=1, format=musigma.Format("two-heads")),
        musigma.likelihood("bernoulli", (1, SIDE, SIDE), lambda channels: decoder, levels=2),
        musigma.Prior(musigma.StandardNormal((2,))),
    )


def train(model, x, beta=1.0, watch=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps + 1):
        if watch:
            watch(step, model)
        batch = x[torch.randint(len(x), (64,))]
        loss = musigma.objectives.beta_elbo(model(batch), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


x, place = discs(2000, (4.5, 4.5), seed=0)
moments = sorted({0, steps // 40, steps // 8, steps})
seen = {}


@torch.no_grad()
def watch(step, model):
    if step in moments:
        q = model.encoder(x[:SHOWN])
        seen[step] = q.mean, q.stddev


model = textbook(seed=0)
train(model, x, watch=watch)
model = model.double().eval().requires_grad_(False)
x = x.double()
q = model.encoder(x)
mu, sigma = q.mean, q.stddev

print("mu and sigma are functions of one observation:")
alone = torch.cat([torch.cat([t.mean, t.stddev], 1) for t in map(model.encoder, x[:50].split(1))])
among = torch.cat([mu, sigma], 1)[:50]
turned = model.encoder(x.flip(0)).mean.flip(0)
print("  of 50 images by themselves and among 2,000: off by", (alone - among).abs().max().item())
print("  in another order:                           off by", (turned - mu).abs().max().item())
h = model.encoder.net.hidden(x)


def r2(a, b):
    """The squared correlation of every column of a with every column of b."""
    return torch.corrcoef(torch.cat([a, b], 1).T)[: a.shape[1], a.shape[1] :] ** 2


statistics = torch.stack([h.mean(1), h.std(1)], 1)
names = ["mu 1", "mu 2", "sigma 1", "sigma 2"]
print("and no statistics of the features (squared correlation over the images):")
for name, row in zip(names, r2(torch.cat([mu, sigma], 1), statistics), strict=True):
    print(f"  {name:<8} with the activations' mean {row[0]:.2f}, with their spread {row[1]:.2f}")
batch = h.std(0).mean()
print(
    f"  spread of an activation over the images {batch:.2f}; sigma {sigma.mean():.3f} on average"
)

print("spread of z over the data, by dimension:   var(mu) + mean(sigma²) = var(z)")
for i in range(2):
    a, b = mu[:, i].var(), sigma[:, i].square().mean()
    print(f"  {i + 1}: {a:.3f} + {b:.3f} = {a + b:.3f}, and the prior has 1")

print(f"{SHOWN} observations in training")
first = seen[0][0]
for step, (mean, std) in seen.items():
    print(
        f"  step {step:>5}: mu {mean.norm(dim=1).mean():.2f} from the origin, "
        f"{(mean - first).norm(dim=1).mean():.2f} from where it began; sigma {std.mean():.3f}"
    )

# -- factors: does a latent stand for one of them?

print("does a latent stand for a factor? R² of both factors by a latent each, the better pairing")
kinds = {"right ±4.5, down ±4.5": (4.5, 4.5), "right ±6.0, down ±2.0": (6.0, 2.0)}
for kind, reach in kinds.items():
    known, factors = discs(2000, reach, seed=1)
    for beta in (1.0, 4.0):
        scores = []
        for seed in range(3):
            other = textbook(seed)
            train(other, known, beta)
            with torch.no_grad():
                table = r2(other.encoder(known).mean, factors)
            paired = max(table[0, 0] + table[1, 1], table[0, 1] + table[1, 0]) / 2
            scores.append(paired.item())
        print(f"  {kind}, beta {beta:g}, three seeds: {'  '.join(f'{s:.2f}' for s in scores)}")
    (a, b), (c, d) = table.tolist()
    print(
        f"    the last: z 1 with right {a:.2f}, down {b:.2f}; z 2 with right {c:.2f}, down {d:.2f}"
    )
if not picture:
    sys.exit()

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Ellipse  # noqa: E402

fig, axes = plt.subplots(1, len(seen) + 1, figsize=(3.1 * (len(seen) + 1), 3.3))
colors = plt.colormaps["twilight"](torch.atan2(*place[:SHOWN].T) / 6.2832 + 0.5)
for ax, (step, (mean, std)) in zip(axes, seen.items(), strict=False):
    ax.add_patch(Ellipse((0, 0), 4, 4, fill=False, ls=":", color="grey"))
    for m, s, color in zip(mean.tolist(), std.tolist(), colors, strict=True):
        ax.add_patch(Ellipse(m, 4 * s[0], 4 * s[1], alpha=0.6, color=color))
    ax.set_xlim(-3, 3)
    ax.set_ylim(-3, 3)
    ax.set_aspect("equal")
    ax.set_title(f"step {step:,}")
    ax.set_xlabel("z 1")
axes[0].set_ylabel("z 2; ellipses of 2 sigma, the prior's dotted")
line = torch.linspace(-2, 2, 9, dtype=torch.float64)
plane = torch.cartesian_prod(line.flip(0), line).flip(1)
grid = model.decoder(plane).mean.reshape(9, 9, SIDE, SIDE).permute(0, 2, 1, 3)
axes[-1].imshow(grid.reshape(9 * SIDE, 9 * SIDE), cmap="gray_r", extent=(-2.25, 2.25, -2.25, 2.25))
axes[-1].set_title("decoded over the plane")
axes[-1].set_xlabel("z 1")
fig.tight_layout()
fig.savefig(picture, dpi=110)
