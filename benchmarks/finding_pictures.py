"""A picture for each code of `musigma audit`: what is right beside what is wrong, computed.

    python benchmarks/finding_pictures.py           # all, into docs/figures/findings/CODE.svg
    python benchmarks/finding_pictures.py kl_offset  # only this one

Each function below is named after a code and draws into as many panels as it has arguments. It
computes what it shows from a minimal wrong implementation and from the right one, always in the
same two colors, which like the gray of the axes read on white and on black. Every picture begins
at seed 0, in float64, so the files come out the same each time. A minute or less.
"""

import argparse
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import softplus

from musigma.audit import CODES

TO = Path(__file__).parent.parent / "docs" / "figures" / "findings"

Values = Tensor | Sequence[float]

RIGHT, WRONG, GRAY = "#3b87c8", "#d9652b", "#787f88"
STYLE = {
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": False,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 8,
    "legend.columnspacing": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.labelcolor": GRAY,
    "lines.linewidth": 1.6,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "musigma",
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def render(code: str) -> Figure:
    """The picture of a code, its panels side by side under one legend."""
    torch.manual_seed(0)
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    draw = PICTURES[code]
    panels = figure.subplots(1, len(inspect.signature(draw).parameters), squeeze=False)[0]
    draw(*panels)
    for ax in panels:
        ax.minorticks_off()
    legends = [ax.get_legend_handles_labels() for ax in panels]
    handles = {label: handle for pair in legends for handle, label in zip(*pair, strict=True)}
    fits = sum(len(label) + 6 for label in handles) < 62
    columns = len(handles) if fits else math.ceil(len(handles) / 2)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=columns)
    return figure


def names(ax: Axes, x: str, y: str, **rest) -> None:
    """Name the axes, with their units; `rest` goes to `Axes.set`."""
    ax.set(xlabel=x, ylabel=y, **rest)


def line(ax: Axes, x: Values, y: Values, color: str, label: str, style="-", **rest) -> None:
    """A curve, what is right above the rest; `rest` goes to `Axes.plot`."""
    ax.plot(x, y, style, color=color, label=label, zorder=2 + (color == RIGHT), **rest)


def dots(ax: Axes, x: Values, y: Values, color: str, label: str, marker="o", ms=3.5) -> None:
    line(ax, x, y, color, label, marker, ms=ms, mew=0 if marker == "o" else 1)


def both(ax: Axes, x: Values, right: Values, wrong: Values, *labels: str) -> None:
    """The right and the wrong curve over the same x, with a label each."""
    line(ax, x, right, RIGHT, labels[0])
    line(ax, x, wrong, WRONG, labels[1])


def guide(ax: Axes, y: float) -> None:
    """A thin gray line across the panel."""
    ax.axhline(y, color=GRAY, lw=0.8, ls=":")


def note(ax: Axes, x: float, y: float, text: str, color: str = GRAY, **rest) -> None:
    ax.text(x, y, text, color=color, fontsize=7.5, **rest)


def histogram(ax: Axes, values: Tensor, color: str, label: str, reach: float = 4.0) -> None:
    """A density, from draws, between -reach and reach."""
    heights, edges = torch.histogram(values.flatten(), 48, range=(-reach, reach), density=True)
    ax.stairs(heights, edges, color=color, label=label, lw=1.3, fill=False)


def bell(ax: Axes, label: str, reach: float = 4.0) -> None:
    """The standard normal density, in gray."""
    z = torch.linspace(-reach, reach, 161)
    line(ax, z, torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi), GRAY, label, "--")


def normal_kl(mean: Tensor, sigma: Tensor) -> Tensor:
    """KL[N(mean, sigma^2) || N(0, 1)] of each latent, in nats."""
    return 0.5 * (mean**2 + sigma**2 - 1) - sigma.log()


def log_normal(z: Tensor, mean: Tensor | float = 0.0, log_var: Tensor | float = 0.0) -> Tensor:
    """The logarithm of a normal density, in nats."""
    log_var = torch.as_tensor(log_var)
    return -0.5 * (math.log(2 * math.pi) + log_var + (z - mean) ** 2 / log_var.exp())


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


# --- what is sampled -------------------------------------------------------------------------


def sample_mean(ax):
    mean, noise = torch.linspace(-2, 2, 17), (4000, 17)
    dots(ax, mean, (mean + torch.randn(noise)).mean(0), RIGHT, "m + e")
    dots(ax, mean, (0.5 * mean + torch.randn(noise)).mean(0), WRONG, "m / 2 + e")
    dots(ax, mean, (mean + torch.rand(noise)).mean(0), WRONG, "m + torch.rand", "x")
    line(ax, mean, mean, GRAY, "E[z] = m", ":")
    names(ax, "mean m of the encoder", "average of 4000 draws of z")


def sample_scale(ax):
    sigma = torch.logspace(-2, 1, 13)
    drawn = torch.randn(4000, 13) * sigma
    dots(ax, sigma, drawn.std(0), RIGHT, "σ e")
    dots(ax, sigma, (0.1 * drawn).std(0), WRONG, "σ (0.1 e)")
    line(ax, sigma, sigma, GRAY, "sampled = named", ":")
    names(ax, "σ that the KL takes", "σ of 4000 draws", xscale="log", yscale="log")


def noise_not_gaussian(ax):
    bell(ax, "N(0, 1)")
    histogram(ax, torch.randn(40000), RIGHT, "torch.randn")
    histogram(ax, (torch.rand(40000) - 0.5) * 12**0.5, WRONG, "torch.rand, unit variance")
    names(ax, "(z - mean) / σ", "density")


def noise_shared(left, right):
    dots(left, *torch.randn(2, 80), RIGHT, "a draw for each latent")
    dots(right, *torch.randn(80).expand(2, -1), WRONG, "one draw for all latents")
    for ax in (left, right):
        names(ax, "noise of latent 1", "noise of latent 2", xlim=(-4, 4), ylim=(-4, 4))


def heads_tied(ax):
    x, mean, scale = torch.randn(80, 8), torch.randn(8), torch.randn(8)
    dots(ax, x @ mean, softplus(x @ scale), RIGHT, "a layer for each")
    dots(ax, x @ mean, softplus(x @ mean), WRONG, "one layer for both")
    names(ax, "mean", "σ")


def sigma_range_restricted(ax):
    b = torch.linspace(-5, 3, 161)
    right, wrong = (b / 2).exp(), (b.relu() / 2).exp()
    both(ax, b, right, wrong, "σ = exp(b / 2)", "σ = exp(relu(b) / 2)")
    guide(ax, 0.9)
    note(ax, -5, 0.8, "0.9", va="top")
    names(ax, "last layer's output b", "σ", yscale="log")


# --- the KL ----------------------------------------------------------------------------------


def no_gradient(ax):
    paths = []
    for stops in (False, True):
        mean = torch.tensor(-2.0, requires_grad=True)
        path = []
        for _ in range(60):
            path.append(mean.item())
            z = mean + 0.3 * torch.randn(16)
            loss = ((z.detach() if stops else z) - 1).square().mean() + 0 * mean
            (step,) = torch.autograd.grad(loss, mean)
            mean = (mean - 0.05 * step).detach().requires_grad_()
        paths.append(path)
    both(ax, torch.arange(60), *paths, "mean + σ e", "its draw, detached")
    guide(ax, 1)
    names(ax, "steps", "mean m of the encoder")


def inplace(ax):
    std = torch.linspace(0.2, 2, 40)
    eps, kept = torch.randn(40), std.clone()
    dots(ax, kept, std, RIGHT, "std * e")
    std.mul_(eps)
    dots(ax, kept, std, WRONG, "std.mul_(e)", "x")
    names(ax, "std of the encoder", "std that the KL reads")


def kl_mismatch(ax):
    b, mean = torch.linspace(-3, 1.4, 161), torch.tensor(0.0)
    line(ax, b, normal_kl(mean, b.exp()), RIGHT, "what is sampled, σ = exp(b)")
    line(ax, b, normal_kl(mean, (b / 2).exp()), WRONG, "the code, σ = exp(b / 2)")
    names(ax, "second output b", "KL of a latent (nats)")


def heads(n: int = 40) -> tuple[Tensor, Tensor]:
    """Random means and log variances of six latents, and not all equally far from the prior."""
    size = torch.linspace(0.1, 1.5, n)[:, None]
    return size * torch.randn(n, 6), size * torch.randn(n, 6)


def kl_offset(ax):
    mean, b = heads()
    true = normal_kl(mean, (b / 2).exp()).sum(1)
    forgets = 0.5 * (mean**2 + b.exp() - b).sum(1)
    dots(ax, true, true, RIGHT, "(m² + σ² - 1) / 2 - log σ")
    dots(ax, true, forgets, WRONG, "(m² + σ²) / 2 - log σ")
    gap = (forgets - true).mean().item()
    ax.annotate("", (9.6, 9.6), (9.6, 9.6 + gap), arrowprops={"arrowstyle": "<->", "color": GRAY})
    note(ax, 9.6, 9, f"{gap:.2f} nats, 6 latents", va="top")
    names(ax, "KL of six latents (nats)", "the code's KL (nats)")


def kl_negative(ax):
    b = torch.linspace(-4, 2, 161)
    true = 0.5 * (b.exp() - 1 - b)
    both(ax, b, true, -true, "(σ² - 1 - b) / 2", "its negative")
    line(ax, b, 0.5 * (b.exp() - 1 + b), WRONG, "(σ² - 1 + b) / 2", "--")
    ax.axhspan(-4, 0, color=WRONG, alpha=0.1, lw=0)
    note(ax, -1, -3.7, "no KL is here")
    names(ax, "log variance b", "KL of a latent (nats)", ylim=(-4, 3))


def kl_constant(ax):
    mean = torch.linspace(-3, 3, 161)
    true = normal_kl(mean, torch.tensor(1.0))
    both(ax, mean, true, true.clamp(0, 0), "KL", "KL, clamped to [0, 0]")
    names(ax, "mean of the posterior", "KL of a latent (nats)")


def kl_capacity(ax):
    mean = torch.linspace(-3, 3, 161)
    true = normal_kl(mean, torch.tensor(1.0))
    both(ax, mean, true, (true - 2).abs(), "KL", "|KL - 2|")
    names(ax, "mean of the posterior", "term of the loss (nats)")


def free_bits(ax):
    mean = torch.linspace(-3, 3, 161)
    true = normal_kl(mean, torch.tensor(1.0))
    both(ax, mean, true, true.clamp(min=1), "KL", "max(KL, 1)")
    names(ax, "mean of the posterior", "term of the loss (nats)")


def prior_mismatch(ax):
    bell(ax, "prior of the KL")
    histogram(ax, torch.randn(40000), RIGHT, "randn(n)")
    histogram(ax, 0.7 * torch.randn(40000), WRONG, "0.7 randn(n)")
    names(ax, "z that generation draws", "density")


def reduction_imbalance(left, right):
    sizes = [2**i for i in range(2, 13, 2)]

    def betas(of_error: Callable, of_kl: Callable) -> list[Tensor]:
        parts = [(torch.randn(n) ** 2, normal_kl(torch.randn(n), torch.rand(n))) for n in sizes]
        return [of_kl(kl) / kl.sum() / (of_error(e) / e.sum()) for e, kl in parts]

    for ax, wrong, what, title in (
        (left, betas(torch.mean, torch.sum), "elements of an image", "mean of the error"),
        (right, betas(torch.sum, torch.mean), "latents", "mean of the KL"),
    ):
        one = betas(torch.sum, torch.sum)
        both(ax, sizes, one, wrong, "both terms summed", "one of them averaged")
        names(ax, what, "β that is trained", xscale="log", yscale="log")
        ax.set_title(title, fontsize=8)


def aggregate_cov(ax):
    means = torch.tensor([[1.5, 0.3], [-1.5, 0.5], [0.0, -0.8]])
    between, within = means.T @ means / 3, 0.36 * torch.eye(2)
    angle = torch.linspace(0, 2 * math.pi, 121)
    circle = 2 * torch.stack([angle.cos(), angle.sin()])

    def ellipse(cov, *look):
        line(ax, *(torch.linalg.cholesky(cov) @ circle), *look)

    dots(ax, *(means[torch.randint(3, (120,))] + 0.6 * torch.randn(120, 2)).T, GRAY, "z")
    ellipse(between + within, RIGHT, "both parts")
    ellipse(between, WRONG, "of the means")
    ellipse(within, WRONG, "of the noise", "--")
    names(ax, "latent 1, with two standard deviations", "latent 2")
    ax.set_aspect("equal", adjustable="datalim")


# --- bijections ------------------------------------------------------------------------------


def inverse_mismatch(ax):
    x, net, sizes = torch.randn(64, 4), torch.randn(2, 4), torch.linspace(0, 1, 41)
    a, b = x.chunk(2, 1)

    def error(size: Tensor, sign: int) -> float:
        t, s = (a @ (size * net)).chunk(2, 1)
        back = (b + t) * s.exp() * (sign * s).exp() - t
        return (back - b).abs().max().clamp_min(1e-17).item()

    right, wrong = ([error(size, sign) for size in sizes] for sign in (-1, 1))
    both(ax, sizes, right, wrong, "z exp(-s) - t", "z exp(s) - t")
    guide(ax, 1e-3)
    note(ax, 0.55, 4e-4, "limit of the audit", va="top")
    names(ax, "size of the network's weights", "largest |g(f(x)) - x|", yscale="log")


def inverse_raises(left, right):
    kept = [2.0]

    def plain(z):
        return z / 2

    def uses_up(z):
        return z / kept.pop()

    def written_down(z):
        return z.reshape(8, 4) / 2

    for ax, wrong, sizes in ((left, uses_up, 5 * [8]), (right, written_down, [1, 2, 4, 8, 16])):
        for row, inverse in enumerate((plain, wrong)):
            for place, size in enumerate(sizes):
                try:
                    inverse(torch.ones(size, 4))
                    dots(ax, [place], [-row], RIGHT, "returns", ms=6)
                except (IndexError, RuntimeError):
                    dots(ax, [place], [-row], WRONG, "raises", "x", ms=6)
        ax.set(xticks=range(5), xlim=(-0.5, 4.5), ylim=(-1.5, 0.5), yticks=[0, -1])
    left.set(xlabel="call of the inverse", xticklabels=range(1, 6))
    left.set(yticklabels=["right", "used up\nby a call"])
    right.set(xlabel="number of samples", xticklabels=sizes)
    right.set(yticklabels=["right", "batch size\nwritten\ndown"])


def stochastic(ax):
    x = torch.randn(60)
    dots(ax, x + 1, x + 1, RIGHT, "z = x + 1")
    first, second = (x + 1 + 0.4 * torch.randn(60) for _ in range(2))
    dots(ax, first, second, WRONG, "z = x + 1 + noise")
    names(ax, "z of the first call", "z of the second call, same x")


def stale_inverse(ax):
    x, weight = torch.randn(64, 4), torch.eye(4)
    kept, right, wrong = weight.inverse(), [], []
    for _ in range(60):
        for inverse, errors in ((weight.inverse(), right), (kept, wrong)):
            back = x @ weight.T @ inverse.T
            errors.append((back - x).abs().max().clamp_min(1e-17).item())
        weight = weight + 0.005 * torch.randn(4, 4)
    both(ax, torch.arange(60), right, wrong, "inverse of this W", "inverse kept from step 0")
    names(ax, "updates of W", "largest |g(f(x)) - x|", yscale="log")


def logdet_mismatch(ax):
    x = torch.randn(3, 4, 4)
    weights = torch.stack([size * orthogonal(3) for size in torch.linspace(0.6, 1.6, 15)])
    own = torch.linalg.slogdet(weights)[1]
    jacobians = [
        torch.autograd.functional.jacobian(lambda x, w=w: torch.einsum("ij,jhw->ihw", w, x), x)
        for w in weights
    ]
    true = torch.linalg.slogdet(torch.stack(jacobians).reshape(15, 48, 48))[1]
    dots(ax, true, 16 * own, RIGHT, "16 log |det W|")
    dots(ax, true, own, WRONG, "log |det W|")
    dots(ax, true, -16 * own, WRONG, "-16 log |det W|", "x")
    names(ax, "log |det J| of autograd (nats)", "returned (nats)")


def logdet_shape(ax):
    s, sizes = (torch.randn(32, 2) @ torch.randn(2, 2)).tanh() + 0.3, range(1, 33)
    line(ax, sizes, [s[:n].sum(1)[0] for n in sizes], RIGHT, "s.sum(1)")
    line(ax, sizes, [s[:n].sum() for n in sizes], WRONG, "s.sum()")
    names(ax, "examples in the batch", "log-det of example 1 (nats)")


def logdet_nan(ax):
    turn, dets = orthogonal(3), torch.linspace(-2, 2, 200)
    turn = turn * torch.linalg.det(turn)
    weights = torch.stack([turn @ torch.diag(torch.tensor([1.0, 1.0, d])) for d in dets])
    line(ax, dets, torch.linalg.slogdet(weights)[1], RIGHT, "slogdet(W)[1]")
    line(ax, dets, torch.logdet(weights), WRONG, "logdet(W)", lw=5, alpha=0.5)
    ax.axvspan(-2, 0, color=WRONG, alpha=0.1, lw=0)
    note(ax, -1, -3.5, "NaN", WRONG, ha="center")
    names(ax, "det W", "log-determinant (nats)")


def inverse_logdet_sign(ax):
    x, net = torch.randn(40, 2), torch.randn(2, 2)
    forward = (x @ net).tanh().sum(1)
    dots(ax, forward, -forward, RIGHT, "-s.sum(1)")
    dots(ax, forward, forward, WRONG, "s.sum(1)")
    ends = torch.stack([forward.min(), forward.max()])
    line(ax, ends, -ends, GRAY, "they cancel", ":")
    names(ax, "log-det of forward (nats)", "log-det of the inverse (nats)")


def inverse_logdet_mismatch(ax):
    x = torch.linspace(-2, 2, 161)
    z, forward = x.sinh(), x.cosh().log()
    line(ax, x, forward - z.asinh().cosh().log(), RIGHT, "slope taken at x")
    line(ax, x, forward - z.cosh().log(), WRONG, "slope taken at z")
    names(ax, "x, of z = sinh x", "sum of both log-dets (nats)")


def cross_sample(ax):
    others, shifts = torch.randn(15), torch.linspace(-3, 3, 61)
    batches = [torch.cat([torch.ones(1), others + shift]) for shift in shifts]
    line(ax, shifts, [((x - 0.2) / 1.1)[0] for x in batches], RIGHT, "running statistics")
    wrong = [((x - x.mean()) / x.std())[0] for x in batches]
    line(ax, shifts, wrong, WRONG, "statistics of the batch")
    names(ax, "shift of the 15 other examples", "z of the example")


def not_injective(left, right):
    x, free = torch.linspace(-3, 3, 161), torch.tensor(-2.5)
    kept = softplus(free) - 1
    for u, color, label in ((kept, RIGHT, "u kept above -1"), (free, WRONG, "u = -2.5")):
        line(left, x, x + u * x.tanh(), color, label)
        line(right, x, 1 + (1 - x.tanh() ** 2) * u, color, label)
    guide(right, 0)
    names(left, "x", "z = x + u tanh x")
    names(right, "x", "det J")


def ddi_wrong(left, right):
    x = 2 * torch.randn(6) + torch.linspace(0.4, 2.5, 6) * torch.randn(128, 6)
    centered = x - x.mean(0)
    for z, color, label, marker in (
        (x, GRAY, "first batch", "o"),
        (centered / x.std(0), RIGHT, "/ std", "o"),
        (centered / x.var(0), WRONG, "/ variance", "x"),
    ):
        dots(left, range(1, 7), z.mean(0), color, label, marker)
        dots(right, range(1, 7), z.std(0), color, label, marker)
    guide(left, 0)
    guide(right, 1)
    names(left, "channel", "mean")
    names(right, "channel", "standard deviation", ylim=0)


def ddi_reinit(ax):
    sigma = torch.linspace(0.5, 2, 8)
    test = 1 + sigma * torch.randn(2000, 8)

    def curve(reloads: tuple[int, ...]) -> list[float]:
        torch.manual_seed(1)
        figures = []
        parameters = [torch.zeros(8, requires_grad=True) for _ in range(2)]
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        for step in range(151):
            mean, log_std = parameters
            batch = 1 + sigma * torch.randn(12, 8)
            if step == 0 or step in reloads:
                mean.data, log_std.data = batch.mean(0), batch.std(0).log()
            figures.append(-log_normal(test, mean, 2 * log_std).mean().item())
            optimizer.zero_grad()
            (-log_normal(batch, mean, 2 * log_std).mean()).backward()
            optimizer.step()
        return figures

    both(ax, torch.arange(151), curve(()), curve((50, 100)), "flag saved", "flag lost")
    names(ax, "training step, reloaded at 50 and 100", "held out (nats per dim)")


# --- densities and figures -------------------------------------------------------------------


def log_prob_shape(ax):
    sizes = [2, 4, 8, 16, 32, 64]
    x = torch.randn(64, 2)
    base, log_det = log_normal(2 * x).sum(1, keepdim=True), 2 * math.log(2.0) + 0.5 * x[:, 0]
    right = [float((base[:n, 0] + log_det[:n])[0]) for n in sizes]
    wrong = [(base[:n] + log_det[:n])[0] for n in sizes]
    for n, row in zip(sizes, wrong, strict=True):
        dots(ax, [n] * n, row, WRONG, "(N, 1) + (N,)" if n == 2 else "", "x")
    dots(ax, sizes, right, RIGHT, "(N,) + (N,)")
    ax.set_xscale("log", base=2)
    names(ax, "points N", "log p of the first point")


def not_normalised(ax):
    radius = torch.linspace(0, 5, 201)
    square = -0.5 * radius**2

    def integral(log_prob: Tensor) -> Tensor:
        rings = 2 * math.pi * radius * log_prob.exp()
        return torch.cat([torch.zeros(1), torch.cumulative_trapezoid(rings, radius)])

    right, wrong = integral(square - math.log(2 * math.pi)), integral(square)
    both(ax, radius, right, wrong, "-|x|²/2 - log 2π", "-|x|²/2")
    guide(ax, 1)
    note(ax, 5, wrong[-1] - 0.2, f"2π = {wrong[-1]:.2f}", WRONG, ha="right", va="top")
    names(ax, "radius, in two dimensions", "integral of exp(log_prob)")


def uniform_bits(levels: Tensor, scale: Tensor, counted: bool) -> Tensor:
    """Bits/dim of y = scale (x + u) under the uniform density on its range."""
    nats = (scale * levels).log()
    return (nats - scale.log() if counted else nats) / math.log(2)


def bpd_below_entropy(ax):
    bits = torch.arange(1, 9.0)
    levels = 2**bits
    entropy = -(torch.ones(8) / levels).log2()
    ax.fill_between(bits, entropy, -0.5, color=GRAY, alpha=0.15, lw=0)
    line(ax, bits, entropy, GRAY, "entropy", ":")
    dots(ax, bits, uniform_bits(levels, 1 / levels, True), RIGHT, "units counted")
    dots(ax, bits, uniform_bits(levels, 1 / levels, False), WRONG, "y = (x + u) / L not counted")
    note(ax, 6, 2.2, "no model is here", ha="center")
    names(ax, "log₂ of the levels L", "bits/dim of random images", ylim=-0.5)


def bpd_wrong(ax):
    channels = torch.tensor([1.0, 2, 3, 4, 6])
    bits = channels * 16 * 8.0
    dots(ax, channels, bits / (channels * 16), RIGHT, "/ (C H W)")
    dots(ax, channels, bits / 16, WRONG, "/ (H W)")
    dots(ax, channels, bits / (3 * 16), WRONG, "/ (3 H W)", "x")
    guide(ax, 8)
    names(ax, "channels C", "bits/dim, 256 even levels", ylim=0)


def bpd_batch(ax):
    sizes = [2**i for i in range(6)]
    images = [torch.full((n, 48), 8.0) for n in sizes]
    dots(ax, sizes, [bits.sum(1).mean() / 48 for bits in images], RIGHT, "mean")
    dots(ax, sizes, [bits.sum() / 48 for bits in images], WRONG, "sum of images")
    dots(ax, sizes, [bits.sum() / 8 / 48 for bits in images], WRONG, "sum / 8", "x")
    guide(ax, 8)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    names(ax, "images in the batch", "bits/dim, 256 even levels")


def bound(n: Tensor) -> Tensor:
    """The negative importance-weighted bound of negative log weights (B, K), in nats."""
    return -(torch.logsumexp(-n, 1) - math.log(n.shape[1]))


def surrogate(n: Tensor) -> Tensor:
    """What has the bound's gradient if its weights are detached, in nats."""
    return (torch.softmax(-n, 1) * n).sum(1)


def iw_gradient(ax):
    def worst(n):
        return (torch.softmax(n, 1).detach() * n).sum(1)

    costs, losses = torch.tensor([[0.0, 0.7, 1.5, 2.5, 4.0]]), (bound, surrogate, worst)
    labels = ("the bound", "Σ w n, not detached", "w of +n")
    for i, (loss, label) in enumerate(zip(losses, labels, strict=True)):
        n = costs.clone().requires_grad_()
        loss(n).sum().backward()
        at, color = [k + 0.27 * (i - 1) for k in range(5)], WRONG if i else RIGHT
        fill = color if i < 2 else "none"
        ax.bar(at, n.grad[0].tolist(), 0.24, facecolor=fill, edgecolor=color, label=label)
    ax.axhline(0, color=GRAY, lw=0.7)
    names(ax, "n, negative log weight of a draw (nats)", "∂ loss / ∂ n", xticks=range(5))
    ax.set_xticklabels([f"{n:.1f}" for n in costs[0]])


def iw_value(ax):
    draws = [2**i for i in range(8)]
    batches = [100 + 2 * torch.randn(4000, k) for k in draws]
    line(ax, draws, [bound(n).mean() for n in batches], RIGHT, "the bound")
    line(ax, draws, [surrogate(n).mean() for n in batches], WRONG, "Σ w n")
    line(ax, draws, [-torch.logsumexp(-n, 1).mean() for n in batches], WRONG, "no log K", "--")
    ax.set_xscale("log", base=2)
    names(ax, "draws K", "loss, mean of 4000 (nats)")


def prior_term_mismatch(ax):
    b, error = torch.linspace(-3, 3, 161), torch.tensor(1.2)
    right = -log_normal(error, 0.0, b) - 0.5 * math.log(2 * math.pi)
    wrong = 0.5 * (b + error**2) / b.exp()
    both(ax, b, right, wrong, "(b + r² / exp(b)) / 2", "(b + r²) / exp(b) / 2")
    ax.plot(b[right.argmin()], right.min(), "o", color=RIGHT, ms=5)
    names(ax, "log variance b, at a residual r = 1.2", "loss (nats)", ylim=(-3, 4))


def prior_term_sign(ax):
    z = torch.linspace(-3, 3, 161)
    both(ax, z, log_normal(z), -log_normal(z), "log N(z; 0, 1)", "-log N(z; 0, 1)")
    names(ax, "z", "term to be raised (nats)")


# --- after training --------------------------------------------------------------------------


def linear_vae(latents: int, noise: float, steps: int = 400) -> list[Tensor]:
    """The KL of each latent after each step, of a linear VAE on data of three directions."""
    turn = orthogonal(8)
    x = torch.randn(256, 8) * torch.tensor([2.0, 1.5, 1.0] + 5 * [0.1]) @ turn
    encoder, decoder = (0.3 * torch.randn(8, latents) for _ in range(2))
    parameters = [encoder, decoder, torch.zeros(latents)]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=0.03)
    kls = []
    for _ in range(steps):
        mean, sigma = x @ encoder, parameters[2].exp()
        error = ((x - mean @ decoder.T) ** 2).sum(1) + (decoder**2 @ sigma**2).sum()
        kl = normal_kl(mean, sigma).mean(0)
        optimizer.zero_grad()
        (error.mean() / (2 * noise**2) + kl.sum()).backward()
        optimizer.step()
        kls.append(kl.detach())
    return kls


def posterior_collapse(ax):
    right, wrong = ([kl.sum() for kl in linear_vae(2, noise)] for noise in (0.5, 4.0))
    both(ax, range(400), right, wrong, "decoder noise 0.5", "decoder noise 4: z does not pay")
    guide(ax, 0.05)
    names(ax, "training step", "KL of the latent (nats)", yscale="log", ylim=1e-5)


def dead_units(ax):
    kl = linear_vae(8, 0.5)[-1].sort(descending=True).values.tolist()
    for i, each in enumerate(kl, 1):
        color, label = (WRONG, "dead") if each < 0.01 else (RIGHT, "carries something")
        ax.bar(i, each, color=color, label=label)
    guide(ax, 0.01)
    names(ax, "unit of the latent", "KL, mean over data (nats)", yscale="log", ylim=1e-5)


def saturated_units(ax):
    def bounded(raw):
        return 5 * (raw / 5).tanh()

    raw, moving, stuck = torch.linspace(-25, 15, 161), torch.randn(24) - 1, torch.randn(24) - 20
    line(ax, raw, bounded(raw), GRAY, "5 tanh(raw / 5)")
    dots(ax, moving, bounded(moving), RIGHT, "can move")
    dots(ax, stuck, bounded(stuck), WRONG, "saturated")
    names(ax, "raw output of the scale's head", "log σ")


def aggregate_prior(ax):
    z = 0.9 * torch.randn(40000) + 0.44 * torch.randn(40000)
    bell(ax, "prior", 6)
    histogram(ax, z, RIGHT, "q(z), as trained for", 6)
    histogram(ax, z + 3, WRONG, "q(z), shifted", 6)
    names(ax, "z of all data", "density")


def ill_conditioned(ax):
    x, conditions = torch.randn(16, 4), torch.logspace(0, 7, 22)
    scales = [torch.tensor([1.0, 1.0, 1.0, 1 / condition]) for condition in conditions]
    weights = torch.stack([orthogonal(4) @ scale.diag() @ orthogonal(4) for scale in scales])
    for w, color, label in ((weights, RIGHT, "float64"), (weights.float(), WRONG, "float32")):
        back = torch.linalg.solve(w, w @ x.T.to(w)).double()
        rounding = torch.finfo(w.dtype).eps * conditions
        line(ax, conditions, rounding, GRAY, "κ times rounding", ":")
        dots(ax, conditions, (back - x.T).abs().amax((1, 2)), color, label)
    names(ax, "condition number κ", "largest |g(f(x)) - x|", xscale="log", yscale="log")


def miscalibrated(ax):
    x = 1 + 1.6 * torch.randn(40000)
    bell(ax, "N(0, 1)", 6)
    histogram(ax, (x - x[:512].mean()) / x[:512].std(), RIGHT, "calibrated", 6)
    histogram(ax, x, WRONG, "not calibrated", 6)
    names(ax, "whitened latents of the data", "density")


def dequantisation(ax):
    scales, levels = torch.logspace(-4, 0, 9, base=2), torch.tensor(8.0)
    dots(ax, scales, uniform_bits(levels, scales, True), RIGHT, "log a counted")
    dots(ax, scales, uniform_bits(levels, scales, False), WRONG, "not counted")
    dots(ax, scales, uniform_bits(2 * levels, scales, True), WRONG, "taken for 16 levels", "x")
    guide(ax, 3)
    ax.set_xscale("log", base=2)
    names(ax, "a, of y = a (x + u)", "bits/dim, 8 even levels")


# --- what could not be checked -------------------------------------------------------------


def not_finite(ax):
    sizes = torch.linspace(0, 1500, 301)
    n = sizes[:, None] + torch.randn(8)
    naive = -torch.exp(-n).mean(1).log()
    finite = naive.where(naive.isfinite(), torch.nan)
    line(ax, sizes, bound(n), RIGHT, "logsumexp")
    line(ax, sizes, finite, WRONG, "log of mean of exp", lw=5, alpha=0.5)
    ax.axvspan(sizes[finite.isfinite()].max(), 1500, color=WRONG, alpha=0.1, lw=0)
    note(ax, 1120, 150, "infinite", WRONG, ha="center")
    names(ax, "size of the figures n (nats)", "-log mean exp(-n) (nats)")


def host_random(left, right):
    host = np.random.default_rng(0)
    draws = [], []
    for _ in range(2):
        torch.manual_seed(1)
        draws[0].append(torch.randn(60))
        draws[1].append(torch.from_numpy(host.standard_normal(60)))
    dots(left, *draws[0], RIGHT, "torch.randn")
    dots(right, *draws[1], WRONG, "numpy.random")
    for ax in (left, right):
        names(ax, "e of the first run", "e of the second run, same seed")


PICTURES: dict[str, Callable[..., None]] = {code: globals()[code] for code in CODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("codes", nargs="*", metavar="CODE", help="only these; else all")
    chosen = parser.parse_args().codes or PICTURES
    TO.mkdir(parents=True, exist_ok=True)
    torch.set_default_dtype(torch.float64)
    with matplotlib.rc_context(STYLE):
        for code in chosen:
            about = {"Title": CODES[code].title, "Date": None, "Creator": None}
            render(code).savefig(TO / f"{code}.svg", metadata=about)


if __name__ == "__main__":
    main()
