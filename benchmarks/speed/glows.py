"""Glow of 32x32x3 at 3 levels of K steps: training, sampling, and what is kept for backward."""

from __future__ import annotations

import functools
import math
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.speed import ours
from benchmarks.speed.harness import Contender, Subject, Unavailable, Work, imported
from torch import Tensor, nn

from musigma.memory import Keep, keep
from musigma.model import Model
from musigma.zoo import build

__all__ = ["CLONES", "WORKS", "images", "model", "multiscale"]

BATCH, LEVELS, SIDE, LR, TEMPERATURE = 32, 3, 32, 1e-4, 0.7
NATS_PER_BIT = math.log(2) * 3 * SIDE**2
CLONES = "MUSIGMA_PEERS"
"""The environment variable that names a folder of clones, each called OWNER+NAME."""


def images() -> Tensor:
    """Random levels, scaled to [-0.5, 0.5)."""
    return torch.randint(0, 256, (BATCH, 3, SIDE, SIDE)).float().div(256).sub(0.5)


def model(depth: int, hidden: int, memory: Keep = "store") -> Model:
    """Ours, of continuous images as all the others, with 1x1 convolutions by their LU factors."""
    flow = build("glow", (3, SIDE, SIDE), bits=None, levels=LEVELS, depth=depth, hidden=hidden)
    keep(flow, memory)
    return flow


def own(depth: int, hidden: int, *, memory: Keep = "store", best: bool = False) -> Subject:
    """Ours."""
    return ours.subject(
        model(depth, hidden, memory),
        images(),
        lr=LR,
        best=best,
        draws=BATCH if memory == "store" else None,
        temperature=TEMPERATURE,
        note="LU",
    )


def peer(model: nn.Module, loss_of: Callable[[Tensor], Tensor], sample: Any, note: str) -> Subject:
    """A peer's model in the plain loop; `loss_of` is its own, in bits per dimension."""
    x = images()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(x).backward()
        optimizer.step()

    return Subject(
        {"step": step, "sample": sample},
        model=model,
        loss=lambda: loss_of(x),
        warm=lambda: loss_of(x),
        parameters=ours.trainable(model.parameters()),
        note=note,
    )


def clone(name: str) -> Path:
    """The folder of a peer that no registry has."""
    root = os.environ.get(CLONES)
    if not root:
        raise Unavailable(f"set {CLONES} to the folder that holds a clone called {name}")
    if not (Path(root) / name).is_dir():
        raise Unavailable(f"{CLONES} names a folder without {name}")
    return Path(root) / name


def load(name: str, folder: Path, module: str) -> Any:
    """A module of a clone's folder, under a package name that meets no other."""
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(folder)]
    return imported(f"{name}.{module}")


def chaiyujin(depth: int, hidden: int) -> Subject:
    """chaiyujin/glow-pytorch: plain 1x1 convolutions."""
    folder = clone("chaiyujin+glow-pytorch") / "glow"
    glow = load("musigma_bench_chaiyujin", folder, "models")
    space = types.SimpleNamespace
    options = space(
        Glow=space(
            image_shape=(SIDE, SIDE, 3),
            hidden_channels=hidden,
            K=depth,
            L=LEVELS,
            actnorm_scale=1.0,
            flow_permutation="invconv",
            flow_coupling="affine",
            LU_decomposed=False,
            learn_top=True,
            y_condition=False,
            y_classes=1,
        ),
        Device=space(glow=["cpu"]),
        Train=space(batch_size=BATCH),
    )
    m = glow.Glow(options)
    return peer(
        m,
        lambda x: m(x)[1].mean(),
        lambda: m(z=None, y_onehot=None, eps_std=TEMPERATURE, reverse=True),
        "plain 1x1",
    )


def rosinality(depth: int, hidden: int) -> Subject:
    """rosinality/glow-pytorch: 1x1 convolutions by their LU factors."""
    source = load("musigma_bench_rosinality", clone("rosinality+glow-pytorch"), "model")
    source.AffineCoupling.__init__.__defaults__ = (hidden, True)  # Flow hands no width on
    m = source.Glow(3, depth, LEVELS, affine=True, conv_lu=True)
    shapes = [(6, 16, 16), (12, 8, 8), (48, 4, 4)]

    def loss(x: Tensor) -> Tensor:
        log_p, log_det, _ = m(x + torch.rand_like(x) / 256)
        return -(log_p + log_det.mean()).mean() / NATS_PER_BIT

    return peer(
        m,
        loss,
        lambda: m.reverse([torch.randn(BATCH, *s) * TEMPERATURE for s in shapes]),
        "LU",
    )


def multiscale(shape: tuple[int, int, int], levels: int, depth: int, hidden: int) -> Any:
    """normflows' Glow of any images: 1x1 convolutions by their LU factors."""
    nf = imported("normflows")
    channels, height, width = shape
    bases, merges, flows = [], [], []
    for i in range(levels):
        blocks = [
            nf.flows.GlowBlock(
                channels * 2 ** (levels + 1 - i), hidden, split_mode="channel", scale=True
            )
            for _ in range(depth)
        ]
        flows.append([*blocks, nf.flows.Squeeze()])
        scale = 2 ** (levels - i)
        if i > 0:
            merges.append(nf.flows.Merge())
        factor = scale if i > 0 else 2 * scale
        bases.append(
            nf.distributions.GlowBase((channels * factor, height // scale, width // scale))
        )
    return nf.MultiscaleFlow(bases, flows, merges, class_cond=False)


def normflows(depth: int, hidden: int) -> Subject:
    """That of the images here."""
    m = multiscale((3, SIDE, SIDE), LEVELS, depth, hidden)
    return peer(m, lambda x: m.forward_kld(x) / NATS_PER_BIT, lambda: m.sample(BATCH)[0], "LU")


def freia(depth: int, hidden: int) -> Subject:
    """FrEIA's AllInOneBlock: fixed random rotations, and the plain coupling network."""
    ff, fm = imported("FrEIA.framework"), imported("FrEIA.modules")

    def net(inputs: int, outputs: int) -> nn.Module:
        last = nn.Conv2d(hidden, outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        return nn.Sequential(
            nn.Conv2d(inputs, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            last,
        )

    node = ff.InputNode(3, SIDE, SIDE)
    nodes, shapes, channels, side = [node], [], 3, SIDE
    for level in range(LEVELS):
        node = ff.Node(node, fm.IRevNetDownsampling, {})
        nodes.append(node)
        channels, side = 4 * channels, side // 2
        for _ in range(depth):
            node = ff.Node(
                node, fm.AllInOneBlock, {"subnet_constructor": net, "permute_soft": True}
            )
            nodes.append(node)
        if level < LEVELS - 1:
            sizes = (channels // 2, channels // 2)
            split = ff.Node(node, fm.Split, {"section_sizes": sizes, "dim": 0})
            nodes += [split, ff.OutputNode(split.out1)]
            shapes.append((channels // 2, side, side))
            node, channels = split.out0, channels // 2
    nodes.append(ff.OutputNode(node))
    shapes.append((channels, side, side))
    m = ff.GraphINN(nodes)

    def loss(x: Tensor) -> Tensor:
        z, log_det = m(x)
        squares = sum(0.5 * v.square().flatten(1).sum(1) for v in z)
        return (squares - log_det).mean() / NATS_PER_BIT

    return peer(
        m,
        loss,
        lambda: m([torch.randn(BATCH, *s) * TEMPERATURE for s in shapes], rev=True),
        "fixed rotations, no split priors",
    )


def _peers(depth: int, hidden: int) -> tuple[Contender, ...]:
    return (
        Contender("chaiyujin", functools.partial(chaiyujin, depth, hidden)),
        Contender("rosinality", functools.partial(rosinality, depth, hidden)),
        Contender("normflows", functools.partial(normflows, depth, hidden), needs=("normflows",)),
        Contender("FrEIA", functools.partial(freia, depth, hidden), needs=("FrEIA",)),
    )


def _glow(hidden: int) -> Work:
    return Work(
        f"glow-{hidden}",
        f"Glow 32x32x3, 3 levels of 8 steps, batch {BATCH}, hidden {hidden}; sample draws {BATCH}",
        BATCH,
        ("step", "sample"),
        (
            Contender("musigma", functools.partial(own, 8, hidden), "ours"),
            Contender(
                "musigma, best", functools.partial(own, 8, hidden, best=True), "best", apart={}
            ),
            *_peers(8, hidden),
        ),
        conv=True,
    )


def _memory(depth: int) -> Work:
    modes: tuple[Keep, ...] = ("checkpoint", "reversible")
    variants = [
        Contender(f"musigma, {mode}", functools.partial(own, depth, 128, memory=mode), "variant")
        for mode in modes
    ]
    return Work(
        f"glow-memory-{depth}",
        f"Glow 32x32x3, 3 levels of {depth} steps, batch {BATCH}, hidden 128: memory modes",
        BATCH,
        ("step",),
        (
            Contender("musigma", functools.partial(own, depth, 128), "ours"),
            *variants,
            *_peers(depth, 128),
        ),
        conv=True,
    )


WORKS = (_glow(128), _glow(512), *(_memory(depth) for depth in (4, 8, 16, 32)))
