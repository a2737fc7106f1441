"""Glow of 32x32x3 with 3 levels of K steps: training, sampling, and kept activations."""

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
from torch import Tensor, nn

from benchmarks.speed.harness import Contender, Subject, Unavailable, Workload, peer_module
from benchmarks.speed.ours import contenders, subject, trainable
from benchmarks.speed.package import set_memory_mode
from musigma import Model, build

__all__ = ["CLONES", "WORKLOADS", "images", "model", "multiscale", "ours"]

BATCH, LEVELS, SIDE, LR, TEMPERATURE = 32, 3, 32, 1e-4, 0.7
NATS_PER_BIT = math.log(2) * 3 * SIDE**2
CLONES = "MUSIGMA_PEERS"
"""The environment variable that names a folder of clones, each called OWNER+NAME."""


def images() -> Tensor:
    """Random bytes, scaled to [-0.5, 0.5)."""
    return torch.randint(0, 256, (BATCH, 3, SIDE, SIDE)).float().div(256).sub(0.5)


def model(depth: int, hidden: int, memory: str = "store") -> Model:
    """musigma's model of continuous images, with 1x1 convolutions in LU form."""
    flow = build("glow", (3, SIDE, SIDE), bits=None, levels=LEVELS, depth=depth, hidden=hidden)
    set_memory_mode(flow, memory)
    return flow


def ours(depth: int, hidden: int, *, memory: str = "store", fast: bool = False) -> Subject:
    """musigma."""
    return subject(
        model(depth, hidden, memory),
        images(),
        lr=LR,
        fast=fast,
        draws=BATCH if memory == "store" else None,
        temperature=TEMPERATURE,
        note="LU",
    )


def peer(model: nn.Module, loss_of: Callable[[Tensor], Tensor], sample: Any, note: str) -> Subject:
    """A peer's model in a plain loop, with its own loss in bits per dimension."""
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
        initialize=lambda: loss_of(x),
        parameters=trainable(model.parameters()),
        note=note,
    )


def clone(name: str) -> Path:
    """The clone of a peer that has no package."""
    root = os.environ.get(CLONES)
    if not root:
        raise Unavailable(f"set {CLONES} to a folder that holds a clone named {name}")
    if not (Path(root) / name).is_dir():
        raise Unavailable(f"the folder {CLONES} has no clone named {name}")
    return Path(root) / name


def load(name: str, folder: Path, module: str) -> Any:
    """Import a module of a clone under a package name of its own."""
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(folder)]
    return peer_module(f"{name}.{module}")


def chaiyujin(depth: int, hidden: int) -> Subject:
    """chaiyujin/glow-pytorch: plain 1x1 convolutions."""
    folder = clone("chaiyujin+glow-pytorch") / "glow"
    glow = load("speed_benchmark_chaiyujin", folder, "models")
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
    """rosinality/glow-pytorch: 1x1 convolutions in LU form."""
    source = load("speed_benchmark_rosinality", clone("rosinality+glow-pytorch"), "model")
    source.AffineCoupling.__init__.__defaults__ = (hidden, True)  # Flow does not pass a width
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
    """normflows' Glow of images of any shape: 1x1 convolutions in LU form."""
    nf = peer_module("normflows")
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
    """normflows: 1x1 convolutions in LU form."""
    m = multiscale((3, SIDE, SIDE), LEVELS, depth, hidden)
    return peer(m, lambda x: m.forward_kld(x) / NATS_PER_BIT, lambda: m.sample(BATCH)[0], "LU")


def freia(depth: int, hidden: int) -> Subject:
    """FrEIA's AllInOneBlock: fixed random rotations and a plain coupling network."""
    ff, fm = peer_module("FrEIA.framework"), peer_module("FrEIA.modules")

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


def _glow(hidden: int) -> Workload:
    return Workload(
        f"glow-{hidden}",
        f"Glow 32x32x3, 3 levels of 8 steps, batch {BATCH}, hidden {hidden}; sample draws {BATCH}",
        BATCH,
        ("step", "sample"),
        (
            *contenders(functools.partial(ours, 8, hidden)),
            *_peers(8, hidden),
        ),
        conv=True,
    )


def _memory(depth: int) -> Workload:
    modes = ("checkpoint", "reversible")
    variants = [
        Contender(f"musigma, {mode}", functools.partial(ours, depth, 128, memory=mode), "variant")
        for mode in modes
    ]
    return Workload(
        f"glow-memory-{depth}",
        f"Glow 32x32x3, 3 levels of {depth} steps, batch {BATCH}, hidden 128: memory modes",
        BATCH,
        ("step",),
        (
            Contender("musigma", functools.partial(ours, depth, 128), "ours"),
            *variants,
            *_peers(depth, 128),
        ),
        conv=True,
    )


WORKLOADS = (_glow(128), _glow(512), *(_memory(depth) for depth in (4, 8, 16, 32)))
