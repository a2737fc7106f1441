"""Pictures of a run: samples, reconstructions, interpolations, and columns of a table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from musigma import data
from musigma.cli.trained import Trained
from musigma.evaluation import batch
from musigma.report import figures
from musigma.schema import Schema

if TYPE_CHECKING:
    import numpy as np

ROWS_DRAWN, COLUMNS_DRAWN = 2000, 24  # of a table


def draw(trained: Trained, held_out: data.Dataset, folder: Path) -> list[str]:
    """Samples, reconstructions and interpolations as pictures, where they can be drawn."""
    import numpy as np

    model, typed = trained.model, trained.spec.schema is not None
    folder.mkdir(exist_ok=True)
    x, context = batch(held_out, np.arange(min(16, len(held_out))), model)
    some = np.random.default_rng(0).permutation(len(held_out))[:ROWS_DRAWN]
    some = some if typed else np.arange(64) % len(held_out)
    if trained.needs_given or (typed and trained.spec.context):  # the context of examples
        by = batch(held_out, some, model)[1]
    else:
        by = trained.context(len(some))
    if typed:
        samples = model.sample(len(some), by).numpy(force=True)
        return _draw_table(samples, held_out.take(some), trained, folder)
    samples = model.sample(64, by, mode=True)
    paths = [folder / f"{name}.png" for name in ("samples", "reconstructions", "interpolations")]
    if not trained.is_image:
        if trained.shape != (2,):
            return []
        figures.points(samples, paths[0], reference=held_out.x[:2000])
        return [str(paths[0])]
    trained.write(samples, paths[0])
    trained.reconstruct(x, context, paths[1])
    if len(x) > 1:
        trained.interpolate(x, context, paths[2])
    return [str(path) for path in paths[: 3 if len(x) > 1 else 2]]


def _draw_table(
    samples: np.ndarray, real: np.ndarray, trained: Trained, folder: Path
) -> list[str]:
    """Columns of samples over those of held-out rows, and the associations of their pairs."""
    from musigma.comparison import marginal, pairs
    from musigma.report import tables

    schema = trained.spec.schema
    assert schema is not None
    schema = Schema(schema.columns[:COLUMNS_DRAWN])
    paths = folder / "marginals.png", folder / "associations.png"
    shown = [marginal(real[:, j], samples[:, j], c) for j, c in enumerate(schema.columns)]
    tables.marginals(shown, paths[0])
    if len(schema) < 2:
        return [str(paths[0])]
    found = pairs(real, samples, schema)
    panels = {"held-out rows": found.real, "samples": found.synthetic}
    tables.matrices(found.names, panels, paths[1])
    return [str(path) for path in paths]
