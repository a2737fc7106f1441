"""Objectives by name in several processes: all end with the same weights and the same critic."""

import os
import subprocess
import sys

import pytest

from launched import LAUNCH
from musigma import checkpoint

EACH = f"""
from pathlib import Path
import numpy as np
import torch
from musigma.data import Dataset
from musigma.processes import current_processes
from musigma.training import TrainConfig, fit, join, leave
from musigma.zoo import build
{LAUNCH}

points = Dataset(np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32))

def each(out, texts):
    processes = join("cpu")
    alike = []
    for i, text in enumerate(texts):
        torch.manual_seed(0)
        model = build("vae", (5,), bits=None, latents=3, width=8)
        shard = text.endswith(" shard")
        config = TrainConfig(
            steps=4, batch_size=15, evaluations=1, objective=text.removesuffix(" shard"),
            accumulate=2 if shard else 1, shard=shard,
        )
        run = fit(model, points, points, config, out / str(i), device="cpu")
        weights = torch.cat([p.flatten() for p in run.model.parameters()]).tolist()
        first, second = processes.gather(weights)
        assert first == second, text
        assert run.skipped == 0, text
    leave()

launch(each, Path(sys.argv[1]), sys.argv[2:])
"""
TEXTS = (
    "dreg k=3",
    "piwae k=2 m=2",
    "wake-sleep",
    "beta-tc",
    "factor-vae width=8",
    "adversarial width=8 + dip-i",
    "factor-vae width=8 shard",
    "wae-mmd shard",
    "wake-sleep shard",
)


@pytest.mark.slow
def test_processes_end_with_the_same_weights(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", EACH, tmp_path, *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr
    for i, text in enumerate(TEXTS):
        _, tensors = checkpoint.verified(tmp_path / str(i) / "state.safetensors")
        critics = [name for name in tensors if name.startswith("objective/")]
        assert bool(critics) == ("factor" in text or "adversarial" in text)
