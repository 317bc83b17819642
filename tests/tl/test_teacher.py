"""What a student learns of the teacher that a table holds, and the names of its niches."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from spatialdata import SpatialData

import histoniche as hn
from histoniche._sdata import need_graph, open_target
from histoniche.models import NicheStudent
from histoniche.models._predict import consensus
from histoniche.tl._teacher import learnt_key, teacher_names

QUICK = {"n_niches": 3, "encoder": "efficientnet-lite0", "mode": "dense", "n_steps": 40, "batch_size": 64, "width": 32}
LABELS, DISCS = "niche_logits_teacher", "niche_logits_teacher_disc"


def with_teacher(names: list[str], codes: np.ndarray, recorded: list[str] | None) -> ad.AnnData:
    adata = ad.AnnData(np.ones((len(codes), 1), dtype=np.float32))
    params = {} if recorded is None else {"niches": recorded}
    target = open_target(adata, table_key=None, copy=False)
    logits = np.eye(3, dtype=np.float32)[codes]
    target.write("nolan", params=params, obsm={"niche_logits_teacher": logits})
    adata.obs["niche_teacher"] = pd.Categorical.from_codes(codes, names)
    return adata


def test_names_stay_with_the_logits() -> None:
    adata = with_teacher(["0", "1", "2"], np.array([0, 1, 2, 2]), ["0", "1", "2"])
    part = adata[[0, 2, 3]].copy()
    assert list(part.obs["niche_teacher"].cat.categories) == ["0", "2"]
    assert teacher_names(part, 3) == ["0", "1", "2"]
    renamed = with_teacher(["stroma", "islet", "duct"], np.array([0, 1, 2]), ["0", "1", "2"])
    assert teacher_names(renamed, 3) == ["stroma", "islet", "duct"]
    assert teacher_names(with_teacher(["a", "b", "c"], np.array([0, 1, 2]), None), 3) == ["a", "b", "c"]


def test_student_of_a_subset_keeps_the_names(embedded: SpatialData) -> None:
    adata = embedded["table"][(embedded["table"].obs["niche_teacher"] != "1").to_numpy()].copy()
    assert list(adata.obs["niche_teacher"].cat.categories) == ["0", "2"]
    hn.tl.distill_niches(adata, **{**QUICK, "n_steps": 5})
    assert list(adata.obs["niche"].cat.categories) == ["0", "1", "2"]
    np.testing.assert_array_equal(adata.obs["niche"].cat.codes, adata.obsm["niche_logits"].argmax(1))
    assert NicheStudent.load(adata.uns["niche_model"]).config.niches == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("spoilt", "error", "message"),
    [
        ("missing", KeyError, "obs\\['niche_teacher'\\], the niches of obsm\\['niche_logits_teacher'\\], is missing"),
        ("text", TypeError, "not categorical, so the order of the niches is unknown"),
        ("unrecorded", ValueError, "has 2 categories, \\['0', '2'\\], for the 3 columns .*set_categories"),
    ],
)
def test_teacher_without_its_names(embedded: SpatialData, spoilt: str, error: type[Exception], message: str) -> None:
    adata = embedded["table"].copy()
    if spoilt == "missing":
        del adata.obs["niche_teacher"]
    elif spoilt == "text":
        adata.obs["niche_teacher"] = np.asarray(adata.obs["niche_teacher"].astype(str), dtype=object)
    else:
        del adata.uns["histoniche"]["nolan"]
        adata = adata[(adata.obs["niche_teacher"] != "1").to_numpy()].copy()
    with pytest.raises(error, match=message):
        hn.tl.distill_niches(adata, **QUICK)
    assert "niche" not in adata.obs


# ------------------------------------------------------------------------------------------------------------- discs
def test_labels_are_the_mean_over_the_discs(embedded: SpatialData) -> None:
    table = embedded["table"]
    graph, _ = need_graph(table)
    np.testing.assert_allclose(consensus(graph, table.obsm[DISCS]), table.obsm[LABELS], atol=1e-5)
    assert learnt_key(table, graph, np.ones(table.n_obs, dtype=bool)) == DISCS


def test_the_student_learns_the_discs(embedded: SpatialData) -> None:
    usual = hn.tl.distill_niches(embedded, copy=True, **{**QUICK, "n_steps": 5})["table"]
    assert usual.uns["histoniche"]["distill_niches"]["inputs"]["taught"] == DISCS
    table = embedded["table"]
    table.obsm[DISCS] = table.obsm[DISCS] * 1.5
    hn.tl.distill_niches(embedded, **{**QUICK, "n_steps": 5})
    assert not np.array_equal(table.obsm["niche_logits"], usual.obsm["niche_logits"])


def test_logits_of_the_users_own_teach_as_they_are(embedded: SpatialData, recwarn: pytest.WarningsRecorder) -> None:
    table = embedded["table"]
    table.obsm[LABELS] = np.eye(3, dtype=np.float32)[table.obs["niche_teacher"].cat.codes] * 9
    del table.obsm[DISCS], table.uns["histoniche"]["nolan"]
    hn.tl.distill_niches(embedded, **{**QUICK, "n_steps": 5})
    assert not any("mean over discs" in str(warning.message) for warning in recwarn)
    assert table.uns["histoniche"]["distill_niches"]["inputs"]["taught"] == LABELS


def test_a_teacher_without_its_discs(embedded: SpatialData) -> None:
    del embedded["table"].obsm[DISCS]
    with pytest.warns(UserWarning, match="mean over discs already, and is smoother than its teacher"):
        hn.tl.distill_niches(embedded, **{**QUICK, "n_steps": 5})


@pytest.mark.parametrize("spoilt", ["order", "width"])
def test_discs_of_another_teacher(embedded: SpatialData, spoilt: str) -> None:
    table = embedded["table"]
    discs = table.obsm[DISCS]
    table.obsm[DISCS] = discs[:, [1, 2, 0]] if spoilt == "order" else discs[:, :2]
    what = "agrees with it in .*% of the training cells" if spoilt == "order" else "has 2 niches, not 3"
    with pytest.raises(ValueError, match=f"is not what obsm.*{what}.*or delete obsm"):
        hn.tl.distill_niches(embedded, **QUICK)
    assert "niche" not in table.obs


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_discs_of_some_of_the_cells_pass(embedded: SpatialData, share: float) -> None:
    table = embedded["table"]
    rows = np.random.default_rng(0).random(table.n_obs) < share
    some = table[rows].copy()
    assert learnt_key(some, need_graph(some)[0], np.ones(some.n_obs, dtype=bool)) == DISCS


def test_a_teacher_without_consensus(embedded: SpatialData) -> None:
    hn.tl.nolan(embedded, n_niches=3, use_rep="X_niche_pca", consensus=False, n_steps=3, batch_size=32)
    table = embedded["table"]
    np.testing.assert_array_equal(table.obsm[DISCS], table.obsm[LABELS])
    assert learnt_key(table, need_graph(table)[0], np.ones(table.n_obs, dtype=bool)) == DISCS
