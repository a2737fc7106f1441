"""Train pythae's VAE and normflows' Glow for the minutes of `quality.py`, on the same images.

    MUSIGMA_DATA=... python benchmarks/quality_peers.py rate [NAME ...]    # use an idle machine
    MUSIGMA_DATA=... python benchmarks/quality_peers.py run NAME --steps N

Each is trained in a plain loop with the settings of its own examples: pythae's residual networks
for MNIST with 16 latents, batches of 100, and Adam at 1e-3; normflows' Glow with the levels, steps
and width of `musigma train glow`, batches of 128, Adamax at 1e-3 with a weight decay of 1e-5,
uniform noise and no logit. musigma scores the VAE, through a likelihood that reads its logits.
`rate` prints the steps per second; `run` writes the files that `quality.py collect` reads.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from quality import PEERS, RUNS, bounds
from torch import Tensor, nn

import musigma
from benchmarks.speed.glows import multiscale
from benchmarks.speed.harness import peer_module
from musigma import Dataset
from musigma.distributions import StandardNormal, likelihood
from musigma.evaluation import evaluate
from musigma.files import replacing
from musigma.gaussian import Format, GaussianHead
from musigma.model import VAE, Prior


@dataclass
class Peer:
    """A model and how it is trained.

    Attributes:
        model: Its parameters are trained.
        optimizer: With the settings of the peer's examples.
        batch: Examples in a step.
        loss: Images (B, 1, 28, 28) of levels to nats per example.
        score: A part of the data to the figures that `musigma.evaluation.evaluate` returns.
        musigma: Builds a musigma model with the present weights; None: bounds are not measured.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: int
    loss: Callable[[Tensor], Tensor]
    score: Callable[[Dataset], dict]
    musigma: Callable[[], VAE] | None = None


def pythae() -> Peer:
    """Pythae's VAE for binarized digits."""
    models, nets = peer_module("pythae.models"), peer_module("pythae.models.nn.benchmarks.mnist")
    config = models.VAEConfig(input_dim=(1, 28, 28), latent_dim=16, reconstruction_loss="bce")
    model = models.VAE(
        config, nets.Encoder_ResNet_VAE_MNIST(config), nets.Decoder_ResNet_AE_MNIST(config)
    )

    def ours() -> VAE:
        encode, decode = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
        decode.layers[-1][-1] = nn.Identity()  # the likelihood has the sigmoid

        class Encode(nn.Module):
            def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
                emitted = encode(x)
                return torch.cat([emitted.embedding, emitted.log_covariance], 1)

        class Decode(nn.Module):
            def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
                return decode(z).reconstruction

        posterior = GaussianHead(Encode(), event_ndims=1, format=Format(scale="log_var"))
        head = likelihood("bernoulli", (1, 28, 28), lambda _: Decode(), levels=2)
        return VAE(posterior, head, Prior(StandardNormal((16,)))).eval()

    return Peer(
        model,
        torch.optim.Adam(model.parameters(), lr=1e-3),
        batch=100,
        loss=lambda x: model({"data": (torch.rand_like(x) < x / 255).float()}).loss,
        score=lambda data: evaluate(ours(), data),
        musigma=ours,
    )


def normflows() -> Peer:
    """normflows' Glow, of the size of `musigma train glow mnist`."""
    model = multiscale((1, 28, 28), levels=2, depth=8, hidden=128)

    def nats(x: Tensor) -> Tensor:
        dequantized = (x + torch.rand_like(x)) / 256
        return math.log(256) * x[0].numel() + model(dequantized)  # -log p

    @torch.no_grad()
    def score(data: Dataset) -> dict:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = torch.cat([nats(part) for part in images(data).split(250)])
        mean, error = float(found.mean()), float(found.std() / math.sqrt(len(found)))
        bits = math.log(2) * math.prod(data.shape)
        return {
            "nats": mean,
            "standard_error_nats": error,
            "bits_per_dim": mean / bits,
            "standard_error": error / bits,
            "bound": "elbo",
            "n": len(found),
        }

    return Peer(
        model,
        torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5),
        batch=128,
        loss=lambda x: nats(x).mean(),
        score=score,
    )


BUILD = {"pythae": pythae, "normflows": normflows}


def images(data: Dataset) -> Tensor:
    """All images as float32 levels (N, C, H, W)."""
    return torch.from_numpy(np.array(data.x)).float()


def step(peer: Peer, x: Tensor) -> None:
    """Take one step; skipped if the loss is not finite, as in normflows' example."""
    loss = peer.loss(x)
    peer.optimizer.zero_grad()
    if loss.isfinite():
        loss.backward()
        peer.optimizer.step()


def rate(name: str, seconds: float = 30) -> float:
    """Steps per second, with torch's default number of threads."""
    peer = BUILD[PEERS[name][1]]()
    x, steps = torch.randint(0, 256, (peer.batch, 1, 28, 28)).float(), 0
    step(peer, x)
    began = time.perf_counter()
    while time.perf_counter() < began + seconds:
        step(peer, x)
        steps += 1
    return steps / (time.perf_counter() - began)


def run(name: str, steps: int) -> None:
    """Train; score validation images fifteen times, and the test images at the end."""
    torch.manual_seed(0)
    _, kind, source = PEERS[name]
    data = musigma.data.load(source)
    if kind == "pythae":
        treat = musigma.Preprocess(binarize="dynamic")
        seen = musigma.data.load(source, preprocess=treat)
    else:
        seen = data
    train = images(data.split("train"))
    validation, test = seen.split("validation"), seen.split("held-out")
    peer, out = BUILD[kind](), RUNS / name
    out.mkdir(parents=True, exist_ok=True)
    order, rows = torch.randperm(len(train)), []
    for done in range(1, steps + 1):
        which, order = order[: peer.batch], order[peer.batch :]
        step(peer, train[which])
        if len(order) < peer.batch:
            order = torch.randperm(len(train))
        if done % max(1, steps // 15) == 0:
            peer.model.eval()
            found = peer.score(validation)
            peer.model.train()
            rows.append({"kind": "evaluation", "step": done, **found})
            print(time.strftime("%H:%M"), name, done, found["bits_per_dim"], flush=True)
            lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
            with replacing(out / "metrics.jsonl") as path:
                path.write_text(lines)
    peer.model.eval()
    if peer.musigma is not None:
        bounds(name, peer.musigma(), test)
    with replacing(out / "evaluation.json") as path:
        found = {"steps": steps, **peer.score(test)}
        path.write_text(json.dumps(found, indent=2, default=str) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["rate", "run"])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--steps", type=int)
    chosen = parser.parse_args()
    for name in chosen.names or PEERS:
        if chosen.what == "rate" or not chosen.steps:
            found = rate(name)
            budget = round(found * 60 * PEERS[name][0])
            print(f"{name}: {found:.2f} steps/s, {budget:,} in its minutes", flush=True)
        if chosen.what == "run":
            run(name, chosen.steps or budget)
