"""The published Glow: Split2d, and what its mean and logs are.

    python examples/06_glow_splits.py [STEPS [PICTURE.png]]

A Glow with the published settings, conditioned on the class, with the classifier term. The
convolution of a split prior emits one tensor. "cross" reads its even channels as the mean and the
odd ones as logs; "split" reads its first and second half. Which is right? Why not two layers?
"""

import sys
import tempfile

import torch
from torch import nn

import musigma
from musigma import Format
from musigma.editing import temperatures
from musigma.testing import randomized

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
picture = sys.argv[2] if len(sys.argv) > 2 else None
PUBLISHED = {
    "levels": 3,
    "depth": 4,
    "hidden": 64,
    "coupling": "affine",
    "permutation": "conv",  # or lu, shuffle, reverse
    "learn_top": True,
}
CROSS = {"format": "cross sigmoid+2", "split_format": "cross log_std"}
HALVES = {"format": "split sigmoid+2", "split_format": "split log_std"}


def heads(model):
    """Every layer whose output a Glow reads as two tensors, with the format."""
    for module in model.modules():
        if isinstance(module, musigma.layers.Coupling):
            yield module.net.leave, module.map.format
        elif isinstance(module, musigma.GaussianHead):
            yield module.net, module.format


# -- cross and split: the same model up to a permutation of the last layer's rows

torch.manual_seed(0)
cross = randomized(musigma.build("published_glow", (3, 16, 16), bits=5, **PUBLISHED, **CROSS))
halves = musigma.build("published_glow", (3, 16, 16), bits=5, **PUBLISHED, **HALVES).double()
halves.load_state_dict(cross.state_dict())
x = torch.rand(4, 3, 16, 16, dtype=torch.float64) - 0.5
with torch.no_grad():
    log_p = cross.continuous().log_prob(x)
    unpermuted = halves.continuous().log_prob(x)
    for (layer, to), (_, read) in zip(heads(halves), heads(cross), strict=True):
        for rows in (layer.conv.weight, layer.conv.bias, layer.logs):
            rows.copy_(read.relayout(rows, to))
    again = halves.continuous().log_prob(x)
    latents = zip(cross.continuous().encode(x), halves.continuous().encode(x), strict=True)
    apart = max((a - b).abs().max().item() for a, b in latents)
print(
    "cross and split, same weights:   difference in log p", (unpermuted - log_p).abs().max().item()
)
print("cross and split, rows permuted:  difference in log p", (again - log_p).abs().max().item())
print("                                 difference in latents", apart)

# -- one layer whose output is split, or two layers

one = nn.Conv2d(6, 12, 3, padding=1).double()
mean_layer, logs_layer = (nn.Conv2d(6, 6, 3, padding=1).double() for _ in range(2))
with torch.no_grad():
    for i, layer in enumerate((mean_layer, logs_layer)):  # even rows, odd rows
        layer.weight.copy_(one.weight[i::2])
        layer.bias.copy_(one.bias[i::2])
h, z = (torch.randn(5, 6, 8, 8, dtype=torch.float64) for _ in range(2))
single = musigma.GaussianHead(one, event_ndims=3, format=Format.parse("cross log_std"))(h)
double = musigma.DiagonalGaussian(mean_layer(h), logs_layer(h), 3)
single.log_prob(z).mean().backward()
double.log_prob(z).mean().backward()
gradients = torch.stack([mean_layer.weight.grad, logs_layer.weight.grad], 1).flatten(0, 1)
print(
    "one layer and two: difference in log p",
    (single.log_prob(z) - double.log_prob(z)).abs().max().item(),
)
print(
    "                   difference in gradients", (gradients - one.weight.grad).abs().max().item()
)

# -- a class-conditional Glow of digits, and what its split priors learn

data = musigma.data.load("digits")
torch.manual_seed(0)
model = musigma.build(
    "published_glow",
    data.spec(["label"]),  # conditioned on the class, which shifts the top prior
    classifier="softmax",
    classifier_weight=10.0,
    **PUBLISHED,
    **CROSS,
)
held_out = data.split("held-out")
x = torch.from_numpy(held_out.take(range(len(held_out)))).float()
y = nn.functional.one_hot(torch.from_numpy(held_out.labels), len(data.label_names)).float()


@torch.no_grad()
def split_priors(model):
    """The distribution of every split prior for held-out images, and a summary of it."""
    splits = [layer for layer in model.layers if isinstance(layer, musigma.layers.Split)]
    seen, trace = {}, musigma.Trace(temperature=0.0)
    hooks = [
        split.prior.register_forward_hook(lambda head, _, dist: seen.update({head: dist}))
        for split in splits
    ]
    model.infer(x, trace, y)
    for hook in hooks:
        hook.remove()
    for split in splits:
        dist, z = seen[split.prior], trace.values[split]
        standard = musigma.DiagonalGaussian(torch.zeros_like(z), torch.zeros_like(z), 3)
        gain = (dist.log_prob(z) - standard.log_prob(z)).mean() / z[0].numel()
        yield (
            dist,
            {
                "mean: average size": dist.mean.abs().mean(),
                "mean: spread over images": dist.mean.std(0).mean(),
                "logs: average": dist.log_std.mean(),
                "logs: spread over images": dist.log_std.std(0).mean(),
                "nats per dimension over N(0, 1)": gain,
            },
        )


before = [facts for _, facts in split_priors(model)]
with tempfile.TemporaryDirectory() as folder:
    run = musigma.fit(
        model,
        data.split("train"),
        data.split("validation"),
        musigma.TrainConfig(steps=steps, batch_size=64),
        folder,
        device="cpu",
    )
model = run.model
after = list(split_priors(model))

for i, (was, (dist, facts)) in enumerate(zip(before, after, strict=True)):
    shape = "x".join(map(str, dist.event_shape))
    print(
        f"\nsplit prior {i + 1} ({shape}), held-out digits    before   after {run.steps:,} steps"
    )
    for name in facts:
        print(f"  {name:<36}{was[name].item():>10.4f}{facts[name].item():>10.4f}")
print()

figure = musigma.evaluate(model, held_out)
top = model.encode(x, y, mode=True)[0]
classifier = model.layers[-1]
right = (classifier.logits(top).argmax(1) == y.argmax(1)).float().mean().item()
print(f"held-out: {figure['bits_per_dim']:.3f} bits/dim ({figure['bound']}), given the class;")
print(f"the classifier on the top latent is correct for {right:.1%} of them")

classes = torch.eye(len(data.label_names))
torch.manual_seed(1)
rows = temperatures(model, len(classes), [0.0, 0.5, 0.7, 1.0], classes)
if not picture:
    sys.exit()

import matplotlib.pyplot as plt  # noqa: E402

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[3, 2])
tiles = nn.functional.pad(rows[:, :, 0], (1, 1, 1, 1))
sheet = torch.cat([torch.cat(list(row), 1) for row in tiles])
left.imshow(sheet, cmap="gray_r", vmin=0, vmax=2**data.bits - 1)
side = tiles.shape[-1]
left.set_yticks([side * (i + 0.5) for i in range(4)], ["0", "0.5", "0.7", "1"])
left.set_xticks([side * (i + 0.5) for i in range(10)], data.label_names)
left.set_ylabel("temperature (eps_std)")
left.set_xlabel("class")
left.set_title("the same noise at four temperatures")
prior = after[0][0]
right.hist(prior.mean.flatten().numpy(), 80, alpha=0.6, label="mean", density=True)
right.hist(prior.log_std.flatten().numpy(), 80, alpha=0.6, label="logs = log_std", density=True)
right.axvline(0, color="black", lw=1, label="both, before training")
right.set_title("the first split prior, trained, on held-out digits")
right.set_xlabel("value")
right.legend(frameon=False)
fig.tight_layout()
fig.savefig(picture, dpi=110)
