"""Sampling from a TarFlow by windows, against one token after another.

    musigma train tarflow IMAGES --patch 2 --width 64 --heads 2 --minutes 10 --out RUN
    python benchmarks/tarflow.py RUN --batch 1 4 --windows 16 64 256

Every transform of the trained model is inverted for the same latents, by windows of each size and
token by token, in turn, several times. Reported are the passes of the networks and the median CPU
time, both also relative to token by token, and the largest difference from the inverse in float64,
relative to numbers above one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import musigma
from musigma.layers import Autoregressive
from musigma.model import Model


class Counter:
    """Counts the passes of a `StreamedNet`, as its method `stream`."""

    def __init__(self, layer: Autoregressive):
        self.passes, self.stream = 0, layer.net.stream
        layer.net.stream = self

    def __call__(self, like: Tensor, context: Tensor | None = None):
        """The function that the network returns, counted."""
        outputs = self.stream(like, context)

        def counted(before: Tensor, start: int) -> Tensor:
            self.passes += 1
            return outputs(before, start)

        return counted


def transforms(model: Model) -> list[Autoregressive]:
    """The autoregressive layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, Autoregressive)]


@torch.no_grad()  # with gradients, layers are inverted token by token
def main() -> None:
    """Print one JSON object for each size of the batch and window."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run of tarflow, without a context")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--windows", type=int, nargs="+", default=[16, 32, 64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, exact = (musigma.load(options.run).continuous() for _ in range(2))
    exact.double()
    for layer in transforms(exact):
        layer.window = 1
    layers = transforms(model)
    counters = [Counter(layer) for layer in layers]
    shape = model.encode(model.sample(1))[0].shape[1:]
    for batch in options.batch:
        torch.manual_seed(batch)
        z = torch.randn(batch, *shape)
        truth = exact.decode((z.double(),))
        seconds: dict[int | None, list[float]] = {}
        results: dict[int | None, tuple[int, float]] = {}
        for _ in range(options.repeats):
            for window in [1, *options.windows, None]:
                for layer, counter in zip(layers, counters, strict=True):
                    layer.window, counter.passes = window, 0
                start = time.process_time()
                x = model.decode((z,))
                seconds.setdefault(window, []).append(time.process_time() - start)
                error = ((x - truth).abs() / truth.abs().clamp(min=1)).max()
                results[window] = sum(c.passes for c in counters), float(error)
        single = statistics.median(seconds[1])
        for window, (passes, error) in results.items():
            median = statistics.median(seconds[window])
            row = {
                "batch": batch,
                "window": window or "default",
                "passes": passes,
                "fewer passes": round(results[1][0] / passes, 2),
                "milliseconds": round(1e3 * median, 1),
                "faster": round(single / median, 2),
                "error": error,
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
