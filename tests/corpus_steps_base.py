"""What the corpus of training steps is made of: its entries, and small networks.

A builder returns `Built`: the step, and every object whose state the step can reach. The lines
that hold the mathematics end in a mark, such as ``# kl``, which `mutations` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

B, D, L, H = 6, 12, 5, 16  # examples, data dimensions, latents, hidden units: no two are equal


@dataclass(frozen=True)
class Built:
    """A training step.

    Args:
        step: Returns the loss, without arguments.
        objects: Modules, optimizers, generators and containers that the step reads or changes.
        target: What `audit(target, batch)` gets, where the step belongs to an object.
        batch: The batch of the target.
    """

    step: Callable[[], Any]
    objects: tuple[Any, ...] = ()
    target: Any = None
    batch: Any = None


@dataclass(frozen=True)
class Entry:
    """A step, and what the audit may say of it.

    Args:
        build: Makes the step with random parameters.
        verdicts: The right verdict first; then those that are true too. "refused" is an
            `AuditError`.
        codes: Findings that must be there; "a|b" asks for one of the two.
        convention: How the sampler reads the second tensor; None if it is not compared.
        beta: The effective weights of the KL, of which the report must give one.
        says: A pattern that the printed report or the error must contain.
        needs: A package without which the entry is skipped.
    """

    build: Callable[[], Built]
    verdicts: tuple[str, ...]
    codes: tuple[str, ...]
    convention: str | None
    beta: tuple[float, ...]
    says: str | None
    needs: str | None


ENTRIES: dict[str, Entry] = {}


def entry(verdict, *codes, convention=None, beta=(), says=None, needs=None):
    """Register a builder under its name: ``"correct|incomplete"`` has the right verdict first."""

    def register(build):
        if build.__name__ in ENTRIES:
            raise ValueError(f"two steps are called {build.__name__}")
        ENTRIES[build.__name__] = Entry(
            build, tuple(verdict.split("|")), codes, convention, beta, says, needs
        )
        return build

    return register


# --- networks ------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """An MLP with two heads."""

    def __init__(self, d=D, latents=L):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(d, H), nn.Tanh())
        self.mu, self.second = nn.Linear(H, latents), nn.Linear(H, latents)

    def forward(self, x):
        h = self.body(x)
        return self.mu(h), self.second(h)


def decoder(d=D, latents=L):
    return nn.Sequential(nn.Linear(latents, H), nn.ReLU(), nn.Linear(H, d))


def mlp(d, out, hidden=H):
    return nn.Sequential(nn.Linear(d, hidden), nn.Tanh(), nn.Linear(hidden, out))


def data(n=B, d=D):
    return torch.rand(n, d)


def vae(read, kl, recon, *, d=D, latents=L):
    """The step of a VAE: `read` draws z from the two heads, `kl` and `recon` are terms."""
    encode, decode, x = Encoder(d, latents), decoder(d, latents), data(d=d)

    def step():
        mu, b = encode(x)
        return recon(decode(read(mu, b)), x) + kl(mu, b)

    return Built(step, (encode, decode, x))
