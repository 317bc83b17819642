"""A small synthetic tissue, made once."""

from __future__ import annotations

import pytest
from spatialdata import SpatialData

import histoniche as hn

ENCODER = "efficientnet-lite0"
FEATURES = f"X_{ENCODER}"


@pytest.fixture(scope="session")
def raw_tissue() -> SpatialData:
    """Synthetic tissue with a split: read it, never write to it."""
    sdata = hn.datasets.synthetic_tissue(n_cells=900, n_niches=3, n_genes=60, seed=3)
    hn.pp.spatial_holdout(sdata, n_strips=3, test_strip=0, target_neighbors=12, field_of_view=40.0)
    return sdata


@pytest.fixture(scope="session")
def embedded_tissue(raw_tissue: SpatialData) -> SpatialData:
    """The same with graph, molecular and histology embedding, and a teacher: read it, never write to it."""
    sdata = hn.pp.spatial_neighbors(raw_tissue, target_neighbors=12, copy=True)
    hn.tl.molecular_embedding(sdata, method="pca", n_latent=8)
    hn.tl.histology_embedding(sdata, encoder=ENCODER, mode="dense")
    hn.tl.nolan(sdata, n_niches=3, use_rep="X_niche_pca", n_steps=30, batch_size=64)
    return sdata


def copy_of(sdata: SpatialData) -> SpatialData:
    """A copy whose table can be written to."""
    return hn.pp.spatial_holdout(sdata, n_strips=3, test_strip=0, target_neighbors=12, field_of_view=40.0, copy=True)


@pytest.fixture
def tissue(raw_tissue: SpatialData) -> SpatialData:
    """Own copy of the tissue with a split."""
    return copy_of(raw_tissue)


@pytest.fixture
def embedded(embedded_tissue: SpatialData) -> SpatialData:
    """Own copy of the tissue with embeddings and teacher."""
    return copy_of(embedded_tissue)
