"""PyTorch Geometric: VGAE and ARGVA, as in its examples."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch_geometric.nn import ARGVA, VGAE, GCNConv
from torch_geometric.utils import erdos_renyi_graph

DISTRIBUTION = "torch-geometric"
EXPECTED = {
    "vgae": "warning reduction_imbalance",  # the KL is divided by the number of nodes twice
    "argva": "correct",
}
NODES = 24

Step = Callable[[], torch.Tensor]


class Encoder(torch.nn.Module):
    """VariationalGCNEncoder of examples/autoencoder.py."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GCNConv(10, 16)
        self.conv_mu, self.conv_logstd = GCNConv(16, 8), GCNConv(16, 8)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of each node."""
        x = self.conv1(x, edges).relu()
        return self.conv_mu(x, edges), self.conv_logstd(x, edges)


def _graph() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(NODES, 10), erdos_renyi_graph(NODES, 0.2)


def make_vgae_step() -> Step:
    x, edges = _graph()
    model = VGAE(Encoder()).train()

    def step() -> torch.Tensor:
        z = model.encode(x, edges)
        return model.recon_loss(z, edges) + (1 / NODES) * model.kl_loss()

    return step


def make_argva_step() -> Step:
    x, edges = _graph()
    discriminator = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)
    )
    model = ARGVA(Encoder(), discriminator).train()

    def step() -> torch.Tensor:
        z = model.encode(x, edges)
        loss = model.recon_loss(z, edges) + model.reg_loss(z)
        return loss + (1 / NODES) * model.kl_loss()

    return step
