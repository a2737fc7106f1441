"""CPU seconds and memory of audits: a small VAE, and 32 Glow steps on 3x32x32.

python benchmarks/audits.py     # a minute
"""

import resource
import time

import torch
from torch import nn

import musigma
from musigma.audit import audit_flow, audit_model, audit_vae


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


def timed(what: str, run) -> None:
    """Print the CPU seconds of an audit, and the peak memory of the process so far."""
    start = time.process_time()
    report = run()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {report.verdict}, {seconds:.2f} s of CPU, process at {peak:,.0f} MiB")


def main() -> None:
    """Run the audits one after the other."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    timed(
        "a sampler alone", lambda: audit_vae(sample=lambda m, s: m + s.exp() * torch.randn_like(m))
    )
    timed("small VAE", lambda: audit_vae(**small_vae()))
    glow = musigma.build("glow", (3, 32, 32), bits=None, levels=1, depth=32, hidden=32)
    layers = list(glow.layers)  # pyright: ignore
    x = torch.randn(4, 3, 32, 32)
    timed("32 Glow steps on 3x32x32", lambda: audit_flow(layers, example=x))
    timed("the same as a model", lambda: audit_model(glow))


if __name__ == "__main__":
    main()
