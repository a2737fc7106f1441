"""Anomalies of the space shuttle (UCI Statlog): scores, and conformal p-values, of detectors.

    python benchmarks/anomalies.py --minutes 5

The data are those that river ships (`musigma.data.load("shuttle")`). Half of the normal rows train
the detectors, three tenths calibrate all of them, and two tenths are scored with all anomalies.
PyOD's detectors are run if it is installed. Rows and calibration rows are scored in one call: ECOD
ranks a row among those that it is given, so p-values are wrong if the calibration rows are ranked
alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from musigma import Dataset, TrainConfig, anomaly, build, data, fit, questions

RATES = (0.05, 0.01, 0.001)
VALIDATION = 1000
"""Rows that choose the best weights, of those to learn from."""
Score = Callable[[np.ndarray], np.ndarray]
Fit = Callable[[np.ndarray], Score]


def parts(seed: int) -> tuple[Dataset, np.ndarray, np.ndarray, np.ndarray]:
    """Rows to learn from, rows that calibrate, rows to score, and which of these are anomalies."""
    found = data.load("shuttle", schema="infer")
    strange = np.asarray(found.labels) == found.label_names.index("anomaly")
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(~strange))
    learn, known, rest = np.split(normal, [len(normal) // 2, len(normal) * 4 // 5])
    scored = np.concatenate([rest, np.flatnonzero(strange)])
    return found.subset(learn), found.subset(known).x, found.subset(scored).x, strange[scored]


def table(learn: Dataset, options: argparse.Namespace) -> dict[str, Score]:
    """The any-order density: one order, several mixed, and its largest surprise."""
    torch.manual_seed(options.seed)
    model = build("table", learn.spec(), hidden=options.hidden)
    config = TrainConfig(
        minutes=None if options.steps else options.minutes,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        evaluations=10,
    )
    validation = np.arange(len(learn)) < VALIDATION
    with TemporaryDirectory() as folder:
        fit(model, learn.subset(~validation), learn.subset(validation), config, folder)
    model.eval()
    return {
        "musigma table, 1 order": lambda x: -questions.score(model, x).mixture,
        "4 orders mixed": lambda x: -questions.score(model, x, questions.orders(model, 4)).mixture,
        "largest surprise": lambda x: questions.explain(model, x, 0).surprise.max(1),
    }


def of_sklearn(seed: int) -> dict[str, Fit]:
    """Detectors of scikit-learn, by name: from rows to a function that scores others."""
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import LocalOutlierFactor

    def scorer(detector: LocalOutlierFactor | IsolationForest) -> Fit:
        return lambda x: (detector.fit(x), lambda rows: -detector.score_samples(rows))[1]

    forest = IsolationForest(random_state=seed)
    return {"LOF": scorer(LocalOutlierFactor(novelty=True)), "IsolationForest": scorer(forest)}


def of_pyod(seed: int) -> dict[str, Fit]:
    """Detectors of PyOD, if it is installed."""
    try:
        from pyod.models.ecod import ECOD
        from pyod.models.vae import VAE
    except ImportError:
        return {}

    def scorer(detector: ECOD | VAE) -> Fit:
        return lambda x: (detector.fit(x), detector.decision_function)[1]

    vae = VAE(epoch_num=20, random_state=seed, verbose=0)
    return {"PyOD ECOD": scorer(ECOD()), "PyOD VAE": scorer(vae)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="musigma alone")
    parser.add_argument("--out", type=Path, help="a .json file")
    options = parser.parse_args()
    learn, known, rows, strange = parts(options.seed)
    trained = learn.x
    both = np.concatenate([rows, known])
    mean, std = trained.mean(0), trained.std(0) + 1e-9
    print(
        f"{len(trained):,} rows to train on, {len(known):,} that calibrate; {len(rows):,} scored, "
        f"{strange.sum():,} of them anomalies"
    )
    detectors = {} if options.alone else {**of_sklearn(options.seed), **of_pyod(options.seed)}
    results = {}

    def report(name: str, seconds: float, score: Score, x: np.ndarray) -> None:
        began = time.process_time()
        scores, calibration = np.split(np.asarray(score(x), np.float64), [len(rows)])
        each = (time.process_time() - began) / len(x) * 1e6
        found = anomaly.detection(scores, strange, calibration=calibration, rates=RATES)
        results[name] = {"fit seconds": seconds, "microseconds a row": each, **found}
        print(
            f"\n{name}: fit {seconds:.0f} s, {each:.0f} us a row; AUROC "
            f"{found['auroc'].value:.5f}, AP {found['average_precision'].value:.4f}"
        )
        for at in found["at"]:
            low, high = at["promised"]
            print(
                f"  at {at['rate']}: recall {at['recall'].value:.4f}, flagged "
                f"{at['flagged'].value:.4f} (expected {low:.4f} to {high:.4f})",
                flush=True,
            )

    for name, make in detectors.items():
        began = time.process_time()
        score = make((trained - mean) / std)
        report(name, time.process_time() - began, score, (both - mean) / std)
    began = time.process_time()
    scores = table(learn, options)
    seconds = time.process_time() - began
    for name, score in scores.items():
        report(name, seconds, score, both)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
