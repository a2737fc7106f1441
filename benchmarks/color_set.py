"""Flows of color images at equal processor seconds of training, and the bits that they code.

    MUSIGMA_DATA=... python benchmarks/color_set.py --seconds 600 [--names NAME ...]
    MUSIGMA_DATA=... python benchmarks/compression.py ours cifar10 runs/color-set/NAME --n 500
    python -m tools.tables    # put the figures into docs/figures.md

The images are those of `cifar10-jpeg.tar.xz`, CIFAR-10 read from JPEG files, so their figures
compare with each other only, and with those of general codecs on the same images
(`compression.py general cifar10`). Trains on one thread, with batches of 32, and writes the model
to runs/color-set, and the bits per dimension of the first 1,000 test images to
docs/figures/color-set.json.
"""

import argparse
import json
import os
from pathlib import Path

import stored
import torch
from equal_seconds import train_for

import musigma
from musigma import TrainConfig, build
from musigma.evaluation import evaluate

HERE = Path(__file__).parent
RUNS, OUT = HERE.parent / "runs" / "color-set", HERE.parent / "docs" / "figures" / "color-set.json"
MODELS: dict[str, tuple[str, dict]] = {
    "glow": ("glow", {"depth": 8, "hidden": 64, "alpha": None}),
    "idf": ("idf", {"depth": 4, "hidden": 64}),
    "tarflow": ("tarflow", {"patch": 2, "depth": 4, "width": 96}),
    "jet": ("jet", {}),
}


def measured(name: str, seconds: float) -> dict:
    """Train a model, write it, and measure its bits per dimension."""
    architecture, options = MODELS[name]
    data = musigma.data.load(str(Path(os.environ["MUSIGMA_DATA"]) / "cifar10-jpeg.tar.xz"))
    train, validation, test = (data.split(part) for part in ("train", "validation", "held-out"))
    config = TrainConfig(batch_size=32, lr=2e-3, clip=10.0, evaluations=4, evaluate_on=500)
    model, steps = train_for(
        seconds, lambda: build(architecture, train.spec(), **options), train, validation, config
    )
    folder = RUNS / name
    folder.mkdir(parents=True, exist_ok=True)
    musigma.save(model, folder / "model.safetensors")
    return {
        "name": name,
        "seconds": seconds,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        **evaluate(model, test.subset(range(1000)), batch_size=50),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--names", nargs="*", default=[*MODELS])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.names:
        row = measured(name, chosen.seconds)
        print(json.dumps(row), flush=True)
        stored.merge(OUT, [row], ["name", "seconds"])


if __name__ == "__main__":
    main()
