from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from histoniche import metrics
from histoniche.models._baselines import BaselineResult
from histoniche.neighbors import neighborhood_mean, radius_graph
from histoniche.tl import _evaluate_niches as module
from histoniche.tl._evaluate_niches import evaluate_niches

PROBES = ("histology_leiden", "probe_cell", "probe_neighborhood")


def tissue(seed=0):
    """Four vertical bands are the niches; features know the band, the student is right in 80 % of the cells."""
    rng = np.random.default_rng(seed)
    n = 1200
    xy = rng.uniform(0, 600, (n, 2))
    niche = (xy[:, 0] // 150).astype(int)
    student = np.where(rng.random(n) < 0.8, niche, rng.integers(0, 4, n))
    types = np.array(["a", "b", "c", "d"])[np.where(rng.random(n) < 0.7, niche, rng.integers(0, 4, n))]
    centers = rng.normal(size=(4, 12)) * 0.6
    names = [str(k) for k in range(4)]
    table = ad.AnnData(
        obs=pd.DataFrame(
            {
                "niche_teacher": pd.Categorical.from_codes(niche, names),
                "niche": pd.Categorical.from_codes(student, names),
                "split": pd.Categorical(np.where(xy[:, 1] < 350, "train", np.where(xy[:, 1] < 400, "buffer", "test"))),
                "cell_type": pd.Categorical(types),
                "region": np.where(niche < 2, "left", "right"),
            },
            index=[f"c{i}" for i in range(n)],
        ),
        obsm={"spatial": xy, "X_enc": (centers[niche] + rng.normal(size=(n, 12))).astype(np.float16)},
        uns={
            "histoniche": {
                "distill_niches": {
                    "params": {},
                    "inputs": {"features": "X_enc"},
                    "outputs": ["obs/niche"],
                    "versions": {},
                }
            },
            "niche_neighbors": {"params": {"radius": 40.0}},
        },
    )
    graph = radius_graph(xy, 40.0)
    table.obsp["niche_distances"] = graph.to_csr()
    return table


@pytest.fixture(scope="module")
def done():
    table = tissue()
    assert evaluate_niches(table, cell_type_key="cell_type", annotation_key="region", baselines=PROBES) is None
    return table


def test_figures_are_those_of_the_test_cells(done):
    frame = done.uns["niche_evaluation"]
    assert frame.index.tolist() == ["student", *PROBES, "teacher"]
    assert frame.columns.tolist() == ["ari", "nmi", "jsd", "svm_f1", "n_niches", "effective_niches", "n_cells", "fit_s"]
    test = done.obs[done.obs["split"] == "test"]
    teacher, types = test["niche_teacher"], test["cell_type"]
    for model, key in {"student": "niche", **{name: f"niche_{name}" for name in PROBES}}.items():
        labels = test[key]
        assert frame.loc[model, "ari"] == pytest.approx(metrics.adjusted_rand(teacher, labels))
        assert frame.loc[model, "nmi"] == pytest.approx(metrics.normalized_mutual_info(teacher, labels))
        match = "hungarian" if "leiden" in model else "identity"
        assert frame.loc[model, "jsd"] == pytest.approx(metrics.composition_jsd(teacher, labels, types, match=match))
        assert frame.loc[model, "svm_f1"] == pytest.approx(metrics.svm_probe_f1(labels, test["region"]))
        assert frame.loc[model, "n_niches"] == labels.nunique()
        assert frame.loc[model, "effective_niches"] == pytest.approx(metrics.effective_number(labels))
    assert (frame["n_cells"] == len(test)).all()
    assert np.allclose(frame.loc["teacher", ["ari", "nmi", "jsd", "svm_f1"]].astype(float), [1, 1, 0, 1])
    assert frame.loc["student", "ari"] > 0.4
    assert np.isnan(frame.loc["student", "fit_s"])
    assert (frame.loc[list(PROBES), "fit_s"] > 0).all()


def test_neighbourhood_helps_and_labels_are_on_test_cells_only(done):
    frame = done.uns["niche_evaluation"]
    assert frame.loc["probe_neighborhood", "ari"] > frame.loc["probe_cell", "ari"] > 0.3
    is_test = (done.obs["split"] == "test").to_numpy()
    for name in PROBES:
        column = done.obs[f"niche_{name}"]
        assert column.cat.categories.tolist()[:4] == ["0", "1", "2", "3"]
        assert np.array_equal(column.notna(), is_test)
        assert len(done.uns[f"niche_{name}_colors"]) == len(column.cat.categories)


def test_provenance_and_round_trip(done, tmp_path):
    entry = done.uns["histoniche"]["evaluate_niches"]
    assert entry["inputs"]["features"] == "X_enc"
    assert entry["params"]["fits"]["histology_leiden"]["n_clusters"] >= 1
    done.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(back.uns["niche_evaluation"], done.uns["niche_evaluation"], check_dtype=False)
    done.write_zarr(tmp_path / "a.zarr")
    back = ad.read_zarr(tmp_path / "a.zarr")
    assert back.obs["niche_probe_cell"].cat.categories.tolist() == ["0", "1", "2", "3"]


def test_probes_see_training_cells_only(monkeypatch):
    seen = {}

    def fake(train_x, train_labels, test_x, *, seed):
        seen[train_x.shape[1]] = (train_x, train_labels, test_x)
        return BaselineResult(np.zeros(len(test_x), dtype=int))

    monkeypatch.setattr(module, "linear_probe", fake)
    table = tissue()
    evaluate_niches(table, baselines=("probe_cell", "probe_neighborhood"))
    train, test = (np.flatnonzero(table.obs["split"] == part) for part in ("train", "test"))
    x = table.obsm["X_enc"]
    assert np.array_equal(seen[12][0], x[train])
    assert np.array_equal(seen[12][1], table.obs["niche_teacher"].cat.codes.to_numpy()[train])
    assert np.array_equal(seen[12][2], x[test])
    mean = neighborhood_mean(radius_graph(table.obsm["spatial"], 40.0), x)
    assert np.allclose(seen[24][2], np.concatenate([x[test], mean[test]], axis=1), atol=1e-5)


def test_unsupervised_baselines_never_see_niches(monkeypatch):
    """Only K reaches them, and their clusters are named after the niches they match."""
    seen = {}
    table = tissue()
    truth = table.obs["niche_teacher"].cat.codes.to_numpy()
    table.uns["histoniche"]["nolan"] = {
        "params": {"n_steps": 7},
        "inputs": {},
        "outputs": ["obs/niche_teacher"],
        "versions": {},
    }

    def nolan(features, graph, xy, n_niches, *, radius, train_cells, seed, n_steps):
        seen.update(n_niches=n_niches, radius=radius, train=train_cells, n_steps=n_steps)
        return BaselineResult((truth + 1) % 4)

    def leiden(features, n_clusters, *, seed):
        seen.update(n_leiden=n_clusters, rows=len(features))
        shifted = 5 - truth[table.obs["split"] == "test"]
        shifted[:3] = 9
        return BaselineResult(shifted)

    monkeypatch.setattr(module, "histology_nolan", nolan)
    monkeypatch.setattr(module, "histology_leiden", leiden)
    evaluate_niches(table, baselines=("histology_nolan", "histology_leiden"))
    test = (table.obs["split"] == "test").to_numpy()
    assert seen["n_niches"] == seen["n_leiden"] == 4
    assert (seen["radius"], seen["n_steps"], seen["rows"]) == (40.0, 7, test.sum())
    assert np.array_equal(seen["train"], table.obs["split"] == "train")
    assert table.uns["niche_evaluation"].loc["histology_nolan", "ari"] == 1
    assert (table.obs["niche_histology_nolan"][test].astype(str) == table.obs["niche_teacher"][test].astype(str)).all()
    named = table.obs["niche_histology_leiden"][test].astype(str)
    assert (named[3:] == table.obs["niche_teacher"][test].astype(str)[3:]).all()
    assert set(named[:3]) == {"extra_0"}


def test_copy_and_no_baselines_need_no_features():
    table = tissue()
    del table.obsm["X_enc"], table.obsp["niche_distances"]
    copied = evaluate_niches(table, baselines=(), copy=True)
    assert "niche_evaluation" not in table.uns
    assert copied.uns["niche_evaluation"].index.tolist() == ["student"]
    assert copied.uns["niche_evaluation"].columns.tolist() == [
        "ari",
        "nmi",
        "n_niches",
        "effective_niches",
        "n_cells",
        "fit_s",
    ]


def _drop_test(table):
    table.obs["split"] = pd.Categorical(np.where(table.obs["split"] == "train", "train", "buffer"))


def _drop_train(table):
    table.obs["split"] = "test"


def _unknown_student(table):
    table.uns["histoniche"] = {}


def _missing_niche(table):
    table.obs.loc[table.obs["split"] == "test", "niche"] = np.nan


def _one_region(table):
    table.obs["region"] = "left"


@pytest.mark.parametrize(
    ("change", "options", "error", "match"),
    [
        (lambda t: t.obs.drop(columns="niche", inplace=True), {}, KeyError, "distill_niches"),
        (lambda t: t.obs.drop(columns="niche_teacher", inplace=True), {}, KeyError, "nolan"),
        (lambda t: t.obs.drop(columns="split", inplace=True), {}, KeyError, "spatial_holdout"),
        (_drop_test, {}, ValueError, "no cell of the value 'test'"),
        (_drop_train, {}, ValueError, "no cell of the value 'train'"),
        (_missing_niche, {}, ValueError, r"obs\['niche'\] is missing for .* test cells"),
        (_unknown_student, {}, KeyError, "features_key="),
        (lambda t: t.obsm.pop("X_enc"), {}, KeyError, "X_enc"),
        (lambda t: t.obsp.pop("niche_distances"), {}, KeyError, "spatial_neighbors"),
        (lambda t: None, {"baselines": ("forest",)}, ValueError, "forest"),
        (lambda t: None, {"cell_type_key": "celltype"}, KeyError, "celltype.*cell_type"),
        (_one_region, {"annotation_key": "region"}, ValueError, "needs two"),
    ],
)
def test_bad_input_leaves_the_object_as_it_was(change, options, error, match):
    table = tissue()
    change(table)
    before = set(table.obs), set(table.uns), set(table.uns["histoniche"])
    with pytest.raises(error, match=match):
        evaluate_niches(table, **options)
    assert (set(table.obs), set(table.uns), set(table.uns["histoniche"])) == before


def test_sparse_graph_of_squidpy_is_read(done):
    assert sparse.issparse(done.obsp["niche_distances"])
