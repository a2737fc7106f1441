"""CPU seconds and memory of audits: steps of VAEs and flows, and callables of both.

python benchmarks/audits.py             # two minutes
python benchmarks/audits.py step        # only audits whose name has this word
"""

import itertools
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import musigma
from musigma.audit import AuditReport, audit_flow, audit_model, audit_step, audit_vae


def small_vae() -> dict:
    """The callables of a VAE: an encoder with two heads, a sampler, a KL."""
    enter, mu, log_var = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)

    def encode(x):
        h = enter(x).relu()
        return mu(h), log_var(h)

    return {
        "encode": encode,
        "sample": lambda mean, b: mean + (b / 2).exp() * torch.randn_like(mean),
        "kl": lambda mean, b: 0.5 * (mean**2 + b.exp() - 1 - b).sum(1),
        "example": torch.rand(16, 784),
    }


def step_of(encode: nn.Module, decode: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The step of a VAE with a Bernoulli likelihood, in the mean over the batch."""

    def step() -> Tensor:
        mean, log_var = encode(x).chunk(2, 1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        logits = decode(z)
        recon = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        return (recon + kl) / len(x)

    return step


def small_step() -> Callable[[], Tensor]:
    """784-400-20, as in PyTorch's example, with 128 examples."""
    encode = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
    decode = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))
    return step_of(encode, decode, torch.rand(128, 784))


def convolutional_step() -> Callable[[], Tensor]:
    """64 images 3x64x64, four strided convolutions with batch normalization, 128 latents."""
    down, up = [], []
    for a, b in itertools.pairwise([3, 32, 64, 128, 256]):
        down += [nn.Conv2d(a, b, 4, 2, 1), nn.BatchNorm2d(b), nn.LeakyReLU()]
        up = [nn.ConvTranspose2d(b, a, 4, 2, 1), nn.BatchNorm2d(a), nn.LeakyReLU(), *up]
    encode = nn.Sequential(*down, nn.Flatten(), nn.Linear(4096, 256))
    decode = nn.Sequential(nn.Linear(128, 4096), nn.Unflatten(1, (256, 4, 4)), *up[:-2])
    return step_of(encode, decode, torch.rand(64, 3, 64, 64))


def flow_step(architecture: str, shape: tuple[int, ...], **options: Any) -> Callable[[], Tensor]:
    """The negative log-likelihood of a flow of this library, of 32 examples."""
    model = musigma.build(architecture, shape, bits=None, **options)
    x = torch.randn(32, *shape)
    return lambda: -model(x).elbo.mean()


def timed(what: str, run: Callable[[], AuditReport]) -> None:
    """Print the CPU seconds of an audit, and the peak memory of the process so far."""
    if not all(word in what for word in sys.argv[1:]):
        return
    start = time.process_time()
    report = run()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {report.verdict}, {seconds:.2f} s of CPU, process at {peak:,.0f} MiB")


def main() -> None:
    """Run the audits one after the other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    timed("step of a small VAE", lambda: audit_step(small_step()))
    realnvp = {"depth": 4, "hidden": 32}
    timed("step of RealNVP on 8", lambda: audit_step(flow_step("realnvp", (8,), **realnvp)))
    glow = {"levels": 1, "depth": 2, "hidden": 16}
    timed("step of Glow on 3x8x8", lambda: audit_step(flow_step("glow", (3, 8, 8), **glow)))
    timed("step of a convolutional VAE, 3x64x64", lambda: audit_step(convolutional_step()))
    timed(
        "a sampler alone", lambda: audit_vae(sample=lambda m, s: m + s.exp() * torch.randn_like(m))
    )
    timed("small VAE", lambda: audit_vae(**small_vae()))
    model = musigma.build("glow", (3, 32, 32), bits=None, levels=1, depth=32, hidden=32)
    layers = list(model.layers)  # pyright: ignore
    x = torch.randn(4, 3, 32, 32)
    timed("32 Glow steps on 3x32x32", lambda: audit_flow(layers, example=x))
    timed("the same as a model", lambda: audit_model(model))


if __name__ == "__main__":
    main()
