"""The source of `launch`, for scripts that start several processes as torchrun does.

The processes are forked, so that they import what they need only once.
"""

LAUNCH = """
import sys
import accelerate, torch, torch._dynamo, torch.distributed.fsdp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def launch(work, *given, restarts=0):
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=restarts, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id="test",
        shutdown_timeout=3,  # seconds that a worker gets whose peers are gone
    )
    elastic_launch(config, work)(*given)
"""
