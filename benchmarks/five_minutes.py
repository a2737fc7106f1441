"""Train every architecture for five minutes on MNIST and Fashion-MNIST; collect the test figures.

    MUSIGMA_DATA=... python benchmarks/five_minutes.py run     # an hour; use an idle machine
    python benchmarks/five_minutes.py collect     # JSON and curves into docs/; prints a table

`run` calls the command line with its defaults, one run at a time; finished runs are skipped. Test
figures are bounds from one draw on the 10,000 official test images, with the best weights on
validation data (a twentieth of the training images, held out from training).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RUNS, DOCS = HERE.parent / "runs" / "five-minutes", HERE.parent / "docs"

ARCHITECTURES = {
    "vae": ["vae"],
    "vae with a flow prior": ["vae", "--prior", "flow"],
    "ladder": ["ladder"],
    "realnvp": ["realnvp"],
    "glow": ["glow"],
}
DATA = ("mnist", "fashion-mnist")


def folder(data: str, name: str) -> Path:
    return RUNS / f"{data}-{name.replace(' ', '-')}"


def run(minutes: float) -> None:
    """Train the models that are not trained yet."""
    for name, words in ARCHITECTURES.items():
        for data in DATA:
            out = folder(data, name)
            if (out / "evaluation.json").exists():
                continue
            command = [sys.executable, "-m", "musigma", "train", *words, data, "--out", str(out)]
            command += ["--minutes", str(minutes), "--overwrite", "--device", "cpu"]
            print(time.strftime("%H:%M"), *command[2:], flush=True)
            subprocess.run(command, check=True)


def collect() -> None:
    """Write the figures and the curves; print the table."""
    import platform

    import torch

    from musigma.report import figures

    rows = []
    for data in DATA:
        curves = {}
        for name in ARCHITECTURES:
            out = folder(data, name)
            if not (out / "evaluation.json").exists():
                print("missing:", out)
                continue
            figure = json.loads((out / "evaluation.json").read_text())
            metrics = [json.loads(s) for s in (out / "metrics.jsonl").read_text().splitlines()]
            steps = [m for m in metrics if m["kind"] == "train"]
            curves[name] = metrics
            rows.append(
                {
                    "data": data,
                    "architecture": name,
                    "bits_per_dim": round(figure["bits_per_dim"], 4),
                    "standard_error": round(figure["standard_error"], 4),
                    "nats": round(figure["nats"], 2),
                    "bound": figure["bound"],
                    "n": figure["n"],
                    "steps": steps[-1]["step"],
                    "seconds": round(steps[-1]["seconds"], 1),
                    "skipped": sum(m["kind"] == "skipped" for m in metrics),
                }
            )
        figures.comparison(
            {
                name: [(seconds_at(m, row["step"]), row["bits_per_dim"]) for row in evaluations(m)]
                for name, m in curves.items()
            },
            DOCS / "figures" / f"five-minutes-{data}.png",
            title=f"{data}: validation, bits per dimension",
        )
    about = {"torch": torch.__version__, "cores": 2, "machine": platform.machine()}
    text = json.dumps({"about": about, "runs": rows}, indent=2) + "\n"
    (DOCS / "figures" / "five-minutes.json").write_text(text)
    lines = ["| data | architecture | bits/dim (test) | steps |", "|---|---|---|---|"]
    lines += [
        f"| {r['data']} | {r['architecture']} | {r['bits_per_dim']:.3f} ± "
        f"{r['standard_error']:.3f} | {r['steps']:,} |"
        for r in rows
    ]
    print("\n".join(lines))


def evaluations(metrics: list[dict]) -> list[dict]:
    return [m for m in metrics if m["kind"] == "evaluation"]


def seconds_at(metrics: list[dict], step: int) -> float:
    return max(m["seconds"] for m in metrics if m["kind"] == "train" and m["step"] <= step)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "collect"])
    parser.add_argument("--minutes", type=float, default=5.0)
    chosen = parser.parse_args()
    run(chosen.minutes) if chosen.what == "run" else collect()
