"""The steps of `make demo` that no command does: tables and pictures for sections of its page.

python examples/demo/page.py STEP FOLDER

Each step writes FOLDER/STEP.json, which `musigma report --section` takes, except for `table`,
which writes FOLDER/tumors.csv.
"""

import csv
import io
import json
import lzma
import runpy
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
AUDITED = HERE.parent / "07_audit_sigma.py"


def temperatures(folder: Path) -> None:
    """The same draws of Glow at several temperatures, from FOLDER/temperatures.png."""
    write(
        folder / "temperatures.json",
        "Glow at several temperatures",
        [
            "The same draws, with the standard deviation of every latent multiplied by 0.6, 0.8 "
            "and 1. After a minute and a half of training on 4,250 digits, lower temperatures "
            "give cleaner strokes."
        ],
        pictures={"temperatures.png": "A row for each temperature, a column for each draw"},
    )


def table(folder: Path) -> None:
    """569 breast tumors by 30 measurements of their cells, from the installed scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    with (folder / "tumors.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(data.feature_names)
        writer.writerows(data.data.tolist())


def rows(folder: Path) -> None:
    """The rows of the table that the model finds least likely."""
    with (folder / "tumors.csv").open() as file:
        names, *text = csv.reader(file)
    values = np.array(text, float)
    with (folder / "scores.csv").open() as file:
        nats = np.array([float(row["nats"]) for row in csv.DictReader(file)])
    z = (values - values.mean(0)) / values.std(0)
    odd = []
    for i in np.argsort(-nats)[:6]:
        far = np.argsort(-np.abs(z[i]))[:3]
        unusual = ", ".join(f"{names[j]} {values[i, j]:g} ({z[i, j]:+.1f} sd)" for j in far)
        odd.append([str(i), f"{nats[i]:.1f}", unusual])
    figure = json.loads((folder / "tumors" / "evaluation.json").read_text())
    gaussian = gaussian_nats(folder / "tumors.csv")
    flow = figure["nats"], figure["standard_error_nats"]
    write(
        folder / "rows.json",
        "Unusual rows of a table",
        [
            f"A masked autoregressive flow of {len(values)} breast tumors, described by "
            f"{len(names)} measurements of their cells. On the {figure['n']} held-out rows, "
            "−log p(x) is {:.1f} ± {:.1f} nats by the flow and {:.1f} ± {:.1f} nats by a ".format(
                *flow, *gaussian
            )
            + "Gaussian with full covariance; lower is better.",
            "The rows that the flow finds least likely, and their measurements that are furthest "
            f"from the mean (the mean of all rows is {nats.mean():.1f} nats):",
        ],
        [(["row", "−log p(x), nats", "furthest measurements"], odd)],
    )


def gaussian_nats(path: Path) -> tuple[float, float]:
    """Mean of −log p on the held-out rows, by the Gaussian of the training rows; its error."""
    import musigma

    data = musigma.data.load(path)
    train, held_out = (data.split(part).x.astype(float) for part in ("train", "held-out"))
    mean, scale = train.mean(0), train.std(0)
    z = (held_out - mean) / scale
    covariance = np.corrcoef(train.T)
    distance = (z * np.linalg.solve(covariance, z.T).T).sum(1)
    constant = np.linalg.slogdet(2 * np.pi * covariance)[1] / 2 + np.log(scale).sum()
    nats = distance / 2 + constant
    return nats.mean(), nats.std(ddof=1) / len(nats) ** 0.5


def audit(folder: Path) -> None:
    """The audit of a VAE whose sampler and KL disagree, before and after its repair."""
    sys.argv[1:] = ["800", str(folder / "audit.png")]
    names = runpy.run_path(str(AUDITED), run_name="__main__")
    before, after = names["summary"](names["wrong"]), names["summary"](names["repaired"])
    finding = names["report"].findings[0]
    verdict = names["audit_vae"](sample=names["sample"], kl=names["repaired_kl"]).verdict
    write(
        folder / "audit.json",
        "A VAE whose sampler and KL disagree",
        [
            "x = z + noise, both N(0, 1), so the sigma of the exact posterior is √½ = 0.707. The "
            "sampler of this VAE reads the encoder's second output as log sigma, its KL reads it "
            "as log variance.",
            f"musigma audit finds: {finding.message}.",
            f"Repair: {finding.repair}.",
        ],
        [
            (
                ["model", "audit", "learned sigma", "exact"],
                [
                    [
                        "as written",
                        names["report"].verdict,
                        "{:.3f} ± {:.3f}".format(*before),
                        "0.707",
                    ],
                    ["repaired", verdict, "{:.3f} ± {:.3f}".format(*after), "0.707"],
                ],
            )
        ],
        {"audit.png": "Learned sigma during training (5 seeds), and the posterior of x = 1"},
    )


def compression(folder: Path) -> None:
    """Sizes of the held-out digits: by the models, and by general codecs."""
    from PIL import Image

    import musigma

    x = musigma.data.load("mnist-5k").split("held-out").x
    raw = x.tobytes()

    def png(image: np.ndarray) -> int:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        return len(file.getvalue())

    sizes = {
        "raw pixels": len(raw),
        "PNG, one file per image": sum(png(image) for image in x[:, 0]),
        "PNG, all images in one": png(x.reshape(-1, 28)),
        "xz -9e, all images in one": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
    }
    for path in sorted(folder.glob("compress-*.json")):
        report = json.loads(path.read_text())
        sizes[f"musigma, {path.stem.removeprefix('compress-')}"] = report["data_bytes"]
    write(
        folder / "compression.json",
        "Lossless files",
        [
            f"The {len(x)} held-out digits, which the models have not seen, compressed without "
            "loss; each .mus file was decoded and compared. The sizes do not include the model, "
            "which compresses any number of images."
        ],
        [
            (
                ["file", "bytes", "bits/dim"],
                [[name, n, f"{8 * n / len(raw):.3f}"] for name, n in sizes.items()],
            )
        ],
    )


def write(path, title, text, tables=(), pictures=None) -> None:
    tables = [{"head": head, "rows": rows} for head, rows in tables]
    section = {"title": title, "text": text, "tables": tables, "pictures": pictures or {}}
    path.write_text(json.dumps(section, indent=1))


STEPS = {step.__name__: step for step in (temperatures, table, rows, audit, compression)}

if __name__ == "__main__":
    step, folder = sys.argv[1:]
    STEPS[step](Path(folder))
