"""FrEIA: sequences of its blocks, with the loss of its tutorial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import FrEIA.framework as framework
import FrEIA.modules as blocks
import torch
from torch import nn

DISTRIBUTION = "FrEIA"
EXPECTED = dict.fromkeys(
    ["all_in_one", "glow_coupling", "nice", "gin_coupling", "conditional"], "correct"
)

Step = Callable[[], torch.Tensor]


def _net(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inside, 16), nn.ReLU(), nn.Linear(16, outside))


def _step(block: Any, condition: int = 0, **options: Any) -> Step:
    torch.manual_seed(0)
    flow = framework.SequenceINN(4)
    for _ in range(3):
        given = {"cond": 0, "cond_shape": (condition,)} if condition else {}
        flow.append(block, subnet_constructor=_net, **given, **options)
    flow.train()
    data, conditions = torch.randn(32, 4), torch.randn(32, condition)

    def step() -> torch.Tensor:
        z, log_jac = flow(data, c=[conditions] if condition else None)
        return (0.5 * torch.sum(z**2, 1) - log_jac).mean() / 4

    return step


def make_all_in_one_step() -> Step:
    return _step(blocks.AllInOneBlock, permute_soft=True)


def make_glow_coupling_step() -> Step:
    return _step(blocks.GLOWCouplingBlock)


def make_nice_step() -> Step:
    return _step(blocks.NICECouplingBlock)


def make_gin_coupling_step() -> Step:
    return _step(blocks.GINCouplingBlock)


def make_conditional_step() -> Step:
    return _step(blocks.AllInOneBlock, condition=2)
