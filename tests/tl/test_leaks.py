"""Nothing of the test cells reaches a model, and without a signal there is no score."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from histoniche import _keys
from histoniche.models import NicheStudent, StudentConfig
from histoniche.neighbors import NeighborGraph
from histoniche.pp import spatial_holdout, spatial_neighbors
from histoniche.tl import distill_niches, evaluate_niches, molecular_embedding, nolan

RADIUS = 30.0
TRAINED = ("probe_cell", "probe_neighborhood", "coordinates_only")


@pytest.fixture(scope="module")
def slide():
    """Patches of three niches of unequal size, which genes and image features know; a wide buffer.

    Unequal, so that the best answer without a signal is one niche for all cells. Between niches of equal size chance
    decides, the image decides with it, and a map that follows the image is never independent of the niches.
    """
    rng = np.random.default_rng(0)
    n = 1500
    xy = rng.uniform(0, 1, (n, 2)) * [500, 1000]
    square = (xy // 125).astype(int)
    niche = np.array([0, 1, 0, 2, 0])[(square[:, 0] + 2 * square[:, 1]) % 5]
    counts = rng.poisson(np.exp(rng.normal(size=(3, 30)))[niche] * 3).astype(np.float32)
    features = rng.normal(size=(3, 10))[niche] * 0.8 + rng.normal(size=(n, 10))
    table = ad.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]))
    table.obsm["spatial"], table.obsm["X_image"] = xy, features.astype(np.float32)
    spatial_holdout(table, field_of_view=10.0, radius=RADIUS, buffer=4 * RADIUS)
    spatial_neighbors(table, radius=RADIUS)
    return table


def teach(slide):
    """The whole way from counts to the student, and the baselines that are trained on niches."""
    table = slide.copy()
    molecular_embedding(table, method="pca", n_latent=5)
    nolan(table, n_niches=3, use_rep="X_niche_pca", n_steps=20, batch_size=64)
    learn(table)
    return table


def learn(table):
    distill_niches(
        table, n_niches=3, features_key="X_image", use_rep="X_niche_pca", width=16, depth=1, n_steps=60, batch_size=128,
        lr=5e-3,
    )  # fmt: skip
    evaluate_niches(table, baselines=TRAINED, block_um=60.0, n_boot=50)


@pytest.fixture(scope="module")
def taught(slide, tmp_path_factory):
    from histoniche import settings

    before, settings.cache_dir = settings.cache_dir, tmp_path_factory.mktemp("cache")
    yield teach(slide)
    settings.cache_dir = before


def same_predictions(a, b):
    assert np.array_equal(a.obsm[str(_keys.LOGITS)], b.obsm[str(_keys.LOGITS)])
    for name in TRAINED:
        assert np.array_equal(a.obs[f"niche_{name}"].cat.codes, b.obs[f"niche_{name}"].cat.codes)


def test_the_signal_is_there(taught):
    frame = taught.uns["niche_evaluation"]
    assert frame.loc["student", "ari"] > 0.5
    assert frame.loc["probe_neighborhood", "ari"] > 0.5


def test_students_of_shuffled_niches_score_zero(taught):
    """The real student, evaluated against the niches as they are, after it learnt those of other training cells."""
    table = taught.copy()
    train = np.flatnonzero(table.obs["split"] == "train")
    order = np.random.default_rng(1).permutation(train)
    logits = table.obsm["niche_logits_teacher"].copy()
    niches = table.obs["niche_teacher"].cat.codes.to_numpy().copy()
    logits[train], niches[train] = logits[order], niches[order]
    table.obsm["niche_logits_teacher"] = logits
    with pytest.raises(ValueError, match="is not what obsm\\['niche_logits_teacher'\\] was made of"):
        learn(table)
    table.obsm["niche_logits_teacher_disc"][train] = table.obsm["niche_logits_teacher_disc"][order]
    table.obs["niche_teacher"] = pd.Categorical.from_codes(niches, table.obs["niche_teacher"].cat.categories)
    learn(table)
    frame = table.uns["niche_evaluation"]
    for model in ("student", *TRAINED):
        assert abs(frame.loc[model, "ari"]) < 0.05, model
        assert frame.loc[model, "nmi"] < 0.05, model


def test_niches_of_test_and_buffer_cells_do_not_matter(taught):
    """With other labels, logits and molecules of the teacher there, the student's weights and logits are the same bits."""
    table = taught.copy()
    elsewhere = np.flatnonzero(table.obs["split"] != "train")
    rng = np.random.default_rng(2)
    logits = table.obsm["niche_logits_teacher"].copy()
    logits[elsewhere] = rng.normal(size=(len(elsewhere), 3)) * 5
    table.obsm["niche_logits_teacher"] = logits
    table.obs["niche_teacher"] = pd.Categorical(logits.argmax(1).astype(str), ["0", "1", "2"])
    table.X[elsewhere] = rng.poisson(5, (len(elsewhere), 30))
    table.obsm["X_niche_pca"][elsewhere] = 9
    learn(table)
    same_predictions(table, taught)
    weights = [t.uns["histoniche"]["distill_niches"]["params"]["weights_sha256"] for t in (table, taught)]
    assert weights[0] == weights[1]


def test_molecules_beyond_the_reach_of_training_do_not_matter(slide, taught):
    """From counts to student: test cells, and buffer cells more than two radii from every training cell.

    Nearer buffer cells are neighbours of training cells, or of their neighbours, and belong to what the teacher sees.
    """
    table = slide.copy()
    xy = table.obsm["spatial"]
    train = (table.obs["split"] == "train").to_numpy()
    gap = np.sqrt(((xy[:, None] - xy[train][None]) ** 2).sum(-1)).min(1)
    far = gap > 2 * RADIUS
    assert far[table.obs["split"] == "test"].all()
    assert far[table.obs["split"] == "buffer"].any()
    table.X[far] = np.random.default_rng(3).poisson(5, (far.sum(), 30))
    table = teach(table)
    assert not np.array_equal(table.obsm["niche_logits_teacher"][far], taught.obsm["niche_logits_teacher"][far])
    assert np.array_equal(table.obsm["niche_logits_teacher"][train], taught.obsm["niche_logits_teacher"][train])
    same_predictions(table, taught)


def test_histology_of_test_cells_does_not_reach_the_student(slide, taught):
    """The engine alone: other features of the test cells, the same weights."""
    graph = NeighborGraph.from_csr(slide.obsp["niche_distances"])
    xy, train = slide.obsm["spatial"], (slide.obs["split"] == "train").to_numpy()
    test = (slide.obs["split"] == "test").to_numpy()
    digests = []
    for value in (None, 7.0):
        x = slide.obsm["X_image"].copy()
        if value is not None:
            x[test] = value
        student = NicheStudent(StudentConfig(n_features=10, n_niches=3, radius=RADIUS, width=16, depth=1))
        teacher = taught.obsm["niche_logits_teacher"]
        student.fit(x, graph, xy, teacher, train_cells=train, n_steps=10, batch_size=64)
        digests.append(student.digest)
    assert digests[0] == digests[1]
