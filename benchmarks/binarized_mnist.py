"""The likelihood of VAEs on binarized MNIST, for equal processor seconds of training.

    MUSIGMA_DATA=... python benchmarks/binarized_mnist.py --seconds 300 [--names NAME ...]
    python benchmarks/binarized_mnist.py --merge FILE ...    # add rows measured elsewhere
    python -m tools.tables    # put the figures into docs/figures.md

`dynamic` draws the training images anew at each use; `static` draws them once, so a model can
overfit to them, as to the fixed set of Larochelle, which this is not. Test images are drawn once.
Every model trains for the same processor seconds on one thread. The bound of 1,000 draws is the
ELBO of all 10,000 test images minus the mean gap between both bounds on the first `images` of a
random order; `error` is the standard error of that mean gap. Rows are stored in
docs/figures/binarized-mnist.json; models that it has are not measured again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import stored
import torch
from equal_seconds import train_for

import musigma
from musigma import Preprocess, TrainConfig, build
from musigma.data import Dataset
from musigma.evaluation import score

OUT = Path(__file__).parent.parent / "docs" / "figures" / "binarized-mnist.json"
BY = ("name", "kind", "seconds")
KINDS = ["dynamic", "static"]
K = 1000
MLP = {"net": "mlp", "latents": 50, "width": 200, "blocks": 2}
CONV = {"batch_size": 64, "lr": 3e-3}  # the defaults of musigma train
MODELS: dict[str, tuple[str, dict, dict, int]] = {
    "vae": ("vae", MLP, {}, 2000),
    "iwae-50": ("vae", MLP, {"objective": "iwae k=50", "batch_size": 20}, 2000),
    "vampprior": ("vae", MLP | {"prior": "vamp components=100"}, {}, 2000),
    "iaf": ("vae", MLP | {"posterior": "iaf"}, {}, 2000),
    "ladder": ("ladder", {"width": 24, "latents": 4}, {}, 300),
    "conv": ("vae", {}, CONV, 500),
    "conv-vampprior-bf16": (
        "vae",
        {"prior": "vamp components=64"},
        CONV | {"precision": "bf16"},
        500,
    ),
    "vdvae-small": ("vdvae", {"width": 32, "latents": 8}, {"kl_warmup": 0.4}, 100),
}
"""Architecture, its options, those of training, and images on which the gap is measured."""


def images(kind: str) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test images, binarized."""
    grey = musigma.data.load("mnist")
    draw = np.random.default_rng(0)

    def drawn(part: str) -> Dataset:
        x = grey.split(part).take(range(len(grey.split(part))))
        once = np.where(255 * draw.random(x.shape) < x, 255, 0).astype(np.uint8)
        return Dataset(once, preprocess=Preprocess(binarize="threshold"))

    test = drawn("held-out")
    if kind == "static":
        return drawn("train"), drawn("validation"), test
    data = musigma.data.load("mnist", preprocess=Preprocess(binarize="dynamic"))
    return data.split("train"), data.split("validation"), test


def measured(name: str, kind: str, seconds: float) -> dict:
    """Train a model, and bound its negative log-likelihood of the test images, in nats."""
    architecture, options, training, some = MODELS[name]
    train, validation, test = images(kind)
    config = TrainConfig(**{"batch_size": 100, "lr": 1e-3, "evaluations": 10} | training)
    model, steps = train_for(
        seconds, lambda: build(architecture, train.spec(), **options), train, validation, config
    )
    elbo = score(model, test, batch_size=200)["nats"]
    order = np.random.default_rng(1).permutation(len(test))[:some]
    start = time.process_time()
    gap = elbo[order] - score(model, test.subset(order), k=K, batch_size=1)["nats"]
    return {
        "name": name,
        "kind": kind,
        "seconds": seconds,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "elbo": elbo.mean().item(),
        f"iw-{K}": (elbo.mean() - gap.mean()).item(),
        "images": len(order),
        "error": gap.std(ddof=1).item() / math.sqrt(len(order)),
        "bound_seconds": round(time.process_time() - start, 1),
    }


def order(row: stored.Row) -> tuple[int, int]:
    """The place of a row in the table."""
    return KINDS.index(row["kind"]), [*MODELS].index(row["name"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    names = [name for name in MODELS if not name.startswith("conv")]  # trained for longer
    parser.add_argument("--names", nargs="*", default=names, choices=[*MODELS])
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--merge", nargs="+", type=Path, help="only add the rows of these files")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.merge:
        stored.merge(OUT, (row for file in chosen.merge for row in stored.rows(file)), BY, order)
        return
    for kind in chosen.kinds:
        for name in chosen.names:
            asked = {"name": name, "kind": kind, "seconds": chosen.seconds}
            if stored.has(OUT, asked):
                continue
            row = measured(name, kind, chosen.seconds)
            print(json.dumps(row), flush=True)
            stored.merge(OUT, [row], BY, order)


if __name__ == "__main__":
    main()
