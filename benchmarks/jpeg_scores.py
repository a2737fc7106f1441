"""Scores of images on disk: does decoding overlap with the computation of the model?

    MUSIGMA_DATA=... python benchmarks/jpeg_scores.py [--images 20000] [--rounds 3]

Times of `musigma.evaluation.score` for JPEG files of 32x32 pixels (`cifar10-jpeg.tar.xz`): of the
same images in memory (the model alone), of taking their batches (decoding alone), and of both.
The three take turns. `ratio` is the time of both over the larger of the other two.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import musigma
from musigma import build
from musigma.evaluation import score

MODELS = {
    "vae": ("vae", {"width": 16}),
    "vae, default": ("vae", {}),
    "glow": ("glow", {"depth": 2, "hidden": 16}),
}


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(images: musigma.Dataset, chosen: argparse.Namespace) -> None:
    """Print the times of every model."""
    on_disk = images.subset(np.arange(chosen.images))
    everything = np.concatenate([on_disk.take([i]) for i in range(chosen.images)])
    in_memory = replace(on_disk, array=everything, rows=None)
    for name, (architecture, options) in MODELS.items():
        torch.manual_seed(0)
        model = build(architecture, on_disk.spec(), **options).eval()
        runs: dict[str, Callable[[], object]] = {
            "model": lambda model=model: score(model, in_memory),
            "decoding": lambda: [on_disk.take(np.arange(i, i + 64))
                                 for i in range(0, chosen.images - 63, 64)],
            "both": lambda model=model: score(model, on_disk),
        }  # fmt: skip
        found = [{k: seconds(run) for k, run in runs.items()} for _ in range(chosen.rounds)]
        row = {k: round(statistics.median(f[k] for f in found), 2) for k in runs}
        ratios = [f["both"] / max(f["model"], f["decoding"]) for f in found]
        print(json.dumps({"model": name, **row, "ratio": round(statistics.median(ratios), 3)}))


def main() -> None:
    parser = argparse.ArgumentParser(description="How long images on disk take to score.")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    packed = Path(os.environ["MUSIGMA_DATA"]) / "cifar10-jpeg.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "images.tar"
        with lzma.open(packed) as source, plain.open("wb") as target:
            shutil.copyfileobj(source, target)
        measure(musigma.data.load(str(plain), in_memory=False), chosen)


if __name__ == "__main__":
    main()
