"""The textbook VAE: two vectors per observation, mu and sigma, of independent normals.

    h = features(x),  mu = A h + a,  sigma = exp(B h + b),  z ~ N(mu, diag(sigma²))

Questions: Are mu and sigma the mean and standard deviation of something, of the layer's
activations, of the batch or of the data? How do they become a belief about an observation? Does
each latent correspond to one factor of the data?

python examples/05_textbook.py [STEPS [PICTURE.png]]

The script draws the data: noisy 16x16 images of a blob of known position and brightness.
"""

import sys

import torch
from torch import nn

import musigma
from musigma import Format, GaussianHead

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
picture = sys.argv[2] if len(sys.argv) > 2 else None
SIDE, HIDDEN, SHOWN = 16, 128, 12
SQUARE, RECTANGLE = (4.5, 4.5), (5.5, 3.5)


def photograph(place, brightness, seed):
    """Binary images (n, 1, 16, 16), with more lit pixels near the position of a brighter blob."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    right, down = axis - place[:, :1, None], axis[:, None] - place[:, 1:, None]
    lit = 0.02 + 0.96 * brightness[:, None, None] * (-(right**2 + down**2) / 8).exp()
    return torch.bernoulli(lit, generator=torch.Generator().manual_seed(seed)).unsqueeze(1)


def blobs(n, reach, seed):
    """Images, positions (n, 2) in pixels right and down of the center, and brightnesses (n,)."""
    draw = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed))
    place, brightness = (2 * draw[:, :2] - 1) * torch.tensor(reach), 0.5 + 0.5 * draw[:, 2]
    return photograph(place, brightness, seed), place, brightness


class Encoder(nn.Module):
    """Features of an observation and two linear functions of them."""

    def __init__(self):
        super().__init__()
        first, second = nn.Linear(SIDE**2, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.features = nn.Sequential(nn.Flatten(), first, nn.Tanh(), second, nn.Tanh())
        self.mean, self.scale = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 2)

    def forward(self, x):
        h = self.features(x)
        return self.mean(h), self.scale(h)


def textbook(seed, scale="log_std"):
    """The model; `scale` names the function that makes sigma positive."""
    torch.manual_seed(seed)
    widths = [nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    decoder = nn.Sequential(*widths, nn.Linear(HIDDEN, SIDE**2), nn.Unflatten(1, (1, SIDE, SIDE)))
    return musigma.VAE(
        GaussianHead(Encoder(), event_ndims=1, format=Format("two-heads", scale=scale)),
        musigma.likelihood("bernoulli", (1, SIDE, SIDE), lambda channels: decoder, levels=2),
        musigma.Prior(musigma.StandardNormal((2,))),
    )


def train(model, x, beta=1.0, moments=()):
    """Train; returns mu and sigma of the first observations after the steps in `moments`."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(1)  # the same noise for all models
    seen = {}
    for step in range(steps + 1):
        if step in moments:
            with torch.no_grad():
                q = model.encoder(x[:SHOWN])
            seen[step] = q.mean, q.stddev
        if step < steps:
            batch = x[musigma.data.batch_indices(len(x), 64, seed=0, step=step)]
            loss = musigma.objectives.beta_elbo(model(batch), beta).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    return seen


def correlated(a, b):
    """Squared correlations of the columns of a (n, i) and b (n, j), of shape (i, j)."""
    return torch.corrcoef(torch.cat([a, b], 1).T)[: a.shape[1], a.shape[1] :] ** 2


def explained(a, b):
    """R² of the linear regression of each column of b on all columns of a."""
    a, b = a - a.mean(0), b - b.mean(0)
    return 1 - (b - a @ torch.linalg.lstsq(a, b).solution).var(0) / b.var(0)


x, place, brightness = blobs(2000, SQUARE, seed=0)
new = blobs(2000, SQUARE, seed=1)[0]
model, softplus = textbook(0), textbook(0, "softplus")
seen = train(model, x, moments={0, steps // 50, steps // 10, steps})
train(softplus, x)
q = model.encoder(x)
mu, sigma = q.mean, q.stddev

# -- the mean and standard deviation of what?


def in_batch_with(others):
    """mu and sigma of the first observation in a batch with others."""
    q = model.encoder(torch.cat([x[:1], others]))
    return torch.stack([q.mean[0], q.stddev[0]])


usual = in_batch_with(x[1:64])
batches = [x[64:127], x[1:64].flip(0), 100 * x[1:64], x[:1].expand(63, -1, -1, -1)]
difference = max((in_batch_with(others) - usual).abs().max().item() for others in batches)
single = (in_batch_with(x[:0]) - usual).abs().max().item()
print(f"""1. mu and sigma of an observation depend on that observation only
  in a batch with 63 others, reversed, times 100, with 63 copies of itself: difference {difference}
  in a batch of one: {single:.0e}, the rounding of another matrix product""")

net = model.encoder.net
h = net.features(x)
permuted = h[:, torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(0))]
statistics, after = (torch.stack([t.mean(1), t.std(1)], 1) for t in (h, permuted))
moved = (net.mean(permuted) - mu).abs().mean()
unchanged = (after - statistics).abs().max()
common = correlated(torch.cat([mu, sigma], 1), statistics)
first = ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mu[0], sigma[0], strict=True))
print(f"""2. They are not statistics of the activations h
  observation 0: mean and std of h {h[0].mean():.3f}, {h[0].std():.3f}; mu ± sigma {first}
  after permuting h, its mean and std change by {unchanged:.0e}, mu by {moved:.2f}
  over all images, mu shares at most {common[:2, 0].max():.2f} of its variance with the mean of h,
  and sigma {common[2:, 1].max():.2f} with the std of h
  sigma = exp: -ELBO {-model.elbo(new).mean():.2f} nats on new images; \
sigma = softplus: {-softplus.elbo(new).mean():.2f}""")

print("3. They are not the moments of all z: Var[z] = Var[mu] + E[sigma²], and the prior has 1")
for i, (a, b) in enumerate(zip(mu.var(0), sigma.square().mean(0), strict=True), 1):
    print(f"  z {i}: {a:.3f} + {b:.3f} = {a + b:.3f}")

print("4. sigma is the uncertainty of z given one image: 500 new images of each of 20 blobs")
again = place[:20].repeat_interleave(500, 0)
for light in (0.5, 0.75, 1.0):
    q = model.encoder(photograph(again, torch.full((len(again),), light), seed=2))
    spread = q.mean.unflatten(0, (20, 500)).var(1).mean().sqrt()
    typical = q.variance.mean().sqrt()
    print(f"  brightness {light:.2f}: spread of mu for one blob {spread:.3f}, sigma {typical:.3f}")

print(
    f"5. {SHOWN} observations in training: average distance that mu has moved, and average sigma"
)
for step, (mean, std) in seen.items():
    moved = (mean - seen[0][0]).norm(dim=1).mean()
    print(f"  step {step:>5}: {moved:.2f}, {std.mean():.3f}")

# -- does a latent correspond to a factor of the data?

print("""6. Factors: position to the right and down; new images, three seeds
  aligned: average squared correlation of each factor with a latent of its own (better pairing)
  linear: average R² of each factor regressed on both latents, invariant to rotation""")


def report(name, models, beta):
    """Print a line about models that differ in their seed."""
    posteriors = [m.encoder(held_out) for m in models]
    tables = [correlated(q.mean, factors) for q in posteriors]
    aligned = [max(t.trace(), t.flip(0).trace()) / 2 for t in tables]
    linear = [explained(q.mean, factors).mean() for q in posteriors]
    used = [(q.stddev.mean(0) < 0.9).sum() for q in posteriors]
    evidence = [m(held_out, closed_form=True) for m in models]
    loss = [musigma.objectives.beta_elbo(e, beta).mean() for e in evidence]
    print(
        f"  {name:<20} aligned {' '.join(f'{v:.2f}' for v in aligned)}"
        f"   linear {' '.join(f'{v:.2f}' for v in linear)}"
        f"   latents in use {' '.join(f'{v}' for v in used)}"
        f"   loss {' '.join(f'{v:.1f}' for v in loss)}"
    )


for reach in (SQUARE, RECTANGLE):
    known = blobs(2000, reach, seed=0)[0]
    held_out, factors, _ = blobs(2000, reach, seed=1)
    print(f" right ±{reach[0]} pixels, down ±{reach[1]}")
    models = [textbook(seed) for seed in range(3)]
    for name, beta in (("beta 1", 1.0), ("beta 4, continued", 4.0)):
        for each in models:
            train(each.requires_grad_(True), known, beta)
        report(name, models, beta)
    models = [textbook(seed) for seed in range(3)]
    for each in models:
        train(each, known, beta)
    report("beta 4, from scratch", models, beta)

if picture:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse

    figure = Figure((11, 3.1), dpi=110, layout="constrained")
    *planes, last = figure.subplots(1, len(seen) + 1)
    for ax, (step, (mean, std)) in zip(planes, seen.items(), strict=True):
        ax.add_patch(Ellipse((0, 0), 4, 4, fill=False, ls=":", color="0.3"))
        for m, s, light in zip(mean.tolist(), std.tolist(), brightness.tolist(), strict=False):
            color = colormaps["viridis"](2 * light - 1)
            ax.add_patch(Ellipse(m, 4 * s[0], 4 * s[1], fc=(*color[:3], 0.35), ec=color))
        ax.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", title=f"step {step:,}")
        ax.set(xlabel="z 1", xticks=(-2, 0, 2), yticks=(-2, 0, 2) if step == 0 else ())
    planes[0].set_ylabel("z 2")
    line = torch.linspace(-1.8, 1.8, 5)
    grid = torch.cartesian_prod(line.flip(0), line).flip(1)
    decoded = model.decoder(grid).mean.reshape(5, 5, SIDE, SIDE).permute(0, 2, 1, 3)
    extent = (-2.25, 2.25, -2.25, 2.25)
    last.imshow(decoded.reshape(5 * SIDE, 5 * SIDE), cmap="gray_r", extent=extent)
    last.set(title="decoded over the plane", xlabel="z 1", xticks=(-2, 0, 2), yticks=())
    for edge in (-1.35, -0.45, 0.45, 1.35):
        last.axhline(edge, color="0.75", lw=0.6)
        last.axvline(edge, color="0.75", lw=0.6)
    figure.suptitle(
        "mu and sigma of 12 images as ellipses of 2 sigma: yellow for bright blobs, violet for "
        "faint ones, dotted for the prior",
        fontsize=10,
    )
    figure.savefig(picture, metadata={"Software": None})
