"""Speed of conditional splines at their defaults, beside zuko and sbi, in one process.

    python -m benchmarks.sbi_speed

Two workloads, in turns and through public interfaces: the log density of 100,000 pairs (theta, x)
of 5 and 8 numbers, and 10,000 draws given one x. Needs zuko and sbi.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import zuko  # pyright: ignore[reportMissingImports]
from sbi.neural_nets import posterior_nn  # pyright: ignore[reportMissingImports]

from musigma import Spec, Variable, build

PARAMETERS, FEATURES = 5, 8


def contenders(pairs: int, draws: int) -> dict[str, dict[str, Callable[[], object]]]:
    """For each workload, a function of each library."""
    theta, x = torch.randn(pairs, PARAMETERS), torch.randn(pairs, FEATURES)
    one = x[:1]
    ours = build("nsf", Spec((PARAMETERS,), context=(Variable("x", (FEATURES,)),))).eval()
    ours.calibrate(theta[:512], {"x": x[:512]})
    flow = zuko.flows.NSF(PARAMETERS, FEATURES)
    net = posterior_nn("nsf")(theta[:1000], x[:1000])
    return {
        f"log density of {pairs:,} pairs": {
            "musigma": lambda: ours.log_prob(theta, {"x": x}),
            "zuko": lambda: flow(x).log_prob(theta),
            "sbi": lambda: net.log_prob(theta[None], x),
        },
        f"{draws:,} draws given one x": {
            "musigma": lambda: ours.as_distribution({"x": one}).sample((draws,)),
            "zuko": lambda: flow(one).sample((draws,)),
            "sbi": lambda: net.sample((draws,), one),
        },
    }


def main() -> None:
    """Print the median seconds, and the median ratio to musigma in the same turn."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| workload | musigma, s | zuko, s | sbi, s | zuko / musigma | sbi / musigma |")
    print("|---|---|---|---|---|---|")
    with torch.no_grad():
        for name, functions in contenders(options.pairs, options.draws).items():
            seconds: dict[str, list[float]] = {library: [] for library in functions}
            for _ in range(options.turns + 1):
                for library, function in functions.items():
                    start = time.process_time()
                    function()
                    seconds[library].append(time.process_time() - start)
            kept = {library: times[1:] for library, times in seconds.items()}
            ours = kept["musigma"]
            words = [f"{statistics.median(times):.3f}" for times in kept.values()]
            words += [
                f"{statistics.median(t / o for t, o in zip(kept[library], ours, strict=True)):.2f}"
                for library in ("zuko", "sbi")
            ]
            print(f"| {name} | " + " | ".join(words) + " |", flush=True)


if __name__ == "__main__":
    main()
