"""scvi-tools: its models of counts and proteins, as `TrainingPlan` calls their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata
import mudata
import numpy as np
import scvi
import torch

DISTRIBUTION = "scvi-tools"
EXPECTED = {
    "scvi": "correct",
    "scvi_latent_library": "correct",
    "scvi_logistic_normal": "correct",
    "linear_scvi": "correct",
    "autozi": "correct",
    "scanvi": "correct",
    "totalvi": "correct",
    "peakvi": "bug",  # the reconstruction of the batch is added once for each cell
    "poissonvi": "correct",
    "multivi": "correct",
    "velovi": "correct",
    "sysvi": "correct",
    "sysvi_vamp": "correct",  # its prior is a proper density, but not the one documented
    "cytovi": "correct",
    "contrastivevi": "correct",
    "scar": "correct",
    "mrvi": "correct",
    "mrvi_posterior": "bug kl_mismatch",  # no entropy of eps,
    "methylvi": "correct",
}
CELLS, GENES = 120, 20

Step = Callable[[], torch.Tensor]


def _cells(**layers: Any) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    cells = anndata.AnnData(rng.poisson(3.0, (CELLS, GENES)).astype(np.float32))
    cells.obs["batch"] = rng.choice(["one", "two"], CELLS)
    cells.obs["label"] = rng.choice(["a", "b", "unknown"], CELLS)
    cells.obs["sample"] = rng.choice(["s", "t", "u"], CELLS)
    for name, layer in layers.items():
        cells.layers[name] = layer
    return cells


def _step(model: Any, kl_weight: float | None = 1.0, **options: Any) -> Step:
    """The module's loss of a batch, after any warm-up of the weight of the KL."""
    model.module.train()
    for layer in model.module.modules():  # without dropout
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    batch = next(iter(model._make_data_loader(model.adata, batch_size=16, shuffle=False)))
    loss_options = options if kl_weight is None else {"kl_weight": kl_weight} | options

    def step() -> torch.Tensor:
        return model.module(batch, loss_kwargs=loss_options)[-1].loss

    return step


def _fresh(kind: Any, cells: Any, setup: dict[str, Any], **options: Any) -> Any:
    scvi.settings.seed = 0
    kind.setup_anndata(cells, **setup)
    return kind(cells, **options)


def make_scvi_step() -> Step:
    return _step(
        _fresh(scvi.model.SCVI, _cells(), {"batch_key": "batch"}, n_hidden=16, n_latent=4)
    )


def make_scvi_latent_library_step() -> Step:
    model = _fresh(
        scvi.model.SCVI, _cells(), {}, n_hidden=16, n_latent=4, use_observed_lib_size=False
    )
    return _step(model)


def make_scvi_logistic_normal_step() -> Step:
    model = _fresh(
        scvi.model.SCVI, _cells(), {}, n_hidden=16, n_latent=4, latent_distribution="ln"
    )
    return _step(model)


def make_linear_scvi_step() -> Step:
    return _step(_fresh(scvi.model.LinearSCVI, _cells(), {}, n_hidden=16, n_latent=4))


def make_autozi_step() -> Step:
    model = _fresh(scvi.model.AUTOZI, _cells(), {}, n_hidden=16, n_latent=4)
    return _step(model, n_obs=CELLS)


def make_scanvi_step() -> Step:
    setup = {"labels_key": "label", "unlabeled_category": "unknown"}
    return _step(_fresh(scvi.model.SCANVI, _cells(), setup, n_hidden=16, n_latent=4))


def make_totalvi_step() -> Step:
    cells = _cells()
    cells.obsm["protein"] = np.random.default_rng(1).poisson(5.0, (CELLS, 6)).astype(np.float32)
    setup = {"protein_expression_obsm_key": "protein"}
    model = _fresh(
        scvi.model.TOTALVI,
        cells,
        setup,
        n_latent=4,
        empirical_protein_background_prior=False,
    )
    return _step(model)


def make_peakvi_step() -> Step:
    cells = _cells()
    cells.X = (cells.X > 2).astype(np.float32)
    return _step(_fresh(scvi.model.PEAKVI, cells, {}, n_hidden=16, n_latent=4))


def make_poissonvi_step() -> Step:
    return _step(_fresh(scvi.external.POISSONVI, _cells(), {}, n_hidden=16, n_latent=4))


def make_multivi_step() -> Step:
    rng = np.random.default_rng(1)
    peaks = anndata.AnnData((rng.random((CELLS, 16)) > 0.7).astype(np.float32))
    both = mudata.MuData({"rna": _cells(), "atac": peaks})
    scvi.settings.seed = 0
    scvi.model.MULTIVI.setup_mudata(both, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    return _step(scvi.model.MULTIVI(both, n_hidden=16, n_latent=4))


def make_velovi_step() -> Step:
    rng = np.random.default_rng(1)
    spliced = rng.gamma(2.0, 1.0, (CELLS, GENES)).astype(np.float32)
    cells = _cells(spliced=spliced, unspliced=0.5 * spliced)
    setup = {"spliced_layer": "spliced", "unspliced_layer": "unspliced"}
    return _step(_fresh(scvi.external.VELOVI, cells, setup, n_hidden=16, n_latent=4))


def _sysvi(prior: str) -> Step:
    cells = _cells()
    cells.X = np.log1p(cells.X)
    setup = {"batch_key": "batch"}
    return _step(_fresh(scvi.external.SysVI, cells, setup, prior=prior, n_hidden=16, n_latent=4))


def make_sysvi_step() -> Step:
    return _sysvi("standard_normal")


def make_sysvi_vamp_step() -> Step:
    return _sysvi("vamp")


def make_cytovi_step() -> Step:
    cells = _cells()
    cells.X = np.random.default_rng(1).uniform(0, 1, (CELLS, GENES)).astype(np.float32)
    cells.layers["scaled"] = cells.X
    setup = {"layer": "scaled"}
    return _step(_fresh(scvi.external.CYTOVI, cells, setup, n_hidden=16, n_latent=4))


def make_contrastivevi_step() -> Step:
    model = _fresh(
        scvi.external.ContrastiveVI,
        _cells(),
        {},
        n_hidden=16,
        n_background_latent=3,
        n_salient_latent=3,
    )
    model.module.train()
    loader = model._make_data_loader(model.adata, batch_size=16)
    batch = next(iter(loader))
    both = {"background": batch, "target": batch}
    return lambda: model.module(both, loss_kwargs={"kl_weight": 1.0})[-1].loss


def make_scar_step() -> Step:
    return _step(_fresh(scvi.external.SCAR, _cells(), {}, n_hidden=16, n_latent=4))


def make_mrvi_step() -> Step:
    setup = {"sample_key": "sample", "batch_key": "batch", "backend": "torch"}
    return _step(_fresh(scvi.external.MRVI, _cells(), setup))


def make_mrvi_posterior_step() -> Step:
    setup = {"sample_key": "sample", "batch_key": "batch", "backend": "torch"}
    return _step(_fresh(scvi.external.MRVI, _cells(), setup, qz_kwargs={"use_map": False}))
