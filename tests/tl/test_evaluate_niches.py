from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from histoniche import metrics
from histoniche._sdata import streamed_features
from histoniche.encoders import FeatureStore
from histoniche.models._baselines import BaselineResult
from histoniche.models._linear_probe import PENALTIES, LinearProbe
from histoniche.neighbors import neighborhood_mean, radius_graph
from histoniche.tl import _baseline_fits as fits
from histoniche.tl._evaluate_niches import evaluate_niches
from histoniche.tl._histology_embedding import _lazy
from histoniche.tl._teacher import learnt_from

PROBES = ("histology_leiden", "probe_cell", "probe_neighborhood", "coordinates_only")
BLOCK = 60.0


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
    options = {"cell_type_key": "cell_type", "annotation_key": "region", "baselines": PROBES}
    assert evaluate_niches(table, **options, block_um=BLOCK, n_boot=60, seed=2) is None
    return table


def with_interval(*names):
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def test_figures_are_those_of_the_test_cells(done):
    frame = done.uns["niche_evaluation"]
    assert frame.index.tolist() == ["student", *PROBES, "teacher"]
    whole = ["svm_f1", "n_niches", "effective_niches", "n_cells"]
    assert frame.columns.tolist() == [
        *with_interval("ari", "nmi", "jsd"), *whole, *with_interval("ari_gain", "nmi_gain"), "fit_s"
    ]  # fmt: skip
    test = done.obs[done.obs["split"] == "test"]
    teacher, types = test["niche_teacher"], test["cell_type"]
    for model, key in {"student": "niche", **{name: f"niche_{name}" for name in PROBES}}.items():
        labels = test[key]
        assert frame.loc[model, "ari"] == pytest.approx(metrics.adjusted_rand(teacher, labels))
        assert frame.loc[model, "nmi"] == pytest.approx(metrics.normalized_mutual_info(teacher, labels))
        match = "hungarian" if "leiden" in model else "identity"
        assert frame.loc[model, "jsd"] == pytest.approx(metrics.composition_jsd(teacher, labels, types, match=match))
        assert frame.loc[model, "svm_f1"] == pytest.approx(metrics.svm_probe_f1(labels, test["region"], seed=2))
        assert frame.loc[model, "n_niches"] == labels.nunique()
        assert frame.loc[model, "effective_niches"] == pytest.approx(metrics.effective_number(labels))
    assert (frame["n_cells"] == len(test)).all()
    assert np.allclose(frame.loc["teacher", ["ari", "nmi", "jsd", "svm_f1"]].astype(float), [1, 1, 0, 1])
    assert frame.loc["student", "ari"] > 0.4
    assert np.isnan(frame.loc["student", "fit_s"])
    assert (frame.loc[list(PROBES), "fit_s"] > 0).all()


def test_intervals_are_those_of_the_bootstrap_and_gains_are_paired(done):
    frame = done.uns["niche_evaluation"]
    test = done.obs[done.obs["split"] == "test"]
    xy = done.obsm["spatial"][done.obs["split"] == "test"]
    teacher, types = np.asarray(test["niche_teacher"]), np.asarray(test["cell_type"])
    boot = {"block_um": BLOCK, "n_boot": 60, "seed": 2}

    def figures(key):
        labels = np.asarray(test[key])
        match = "hungarian" if "leiden" in key else "identity"
        return {
            "ari": lambda rows: metrics.adjusted_rand(teacher[rows], labels[rows]),
            "nmi": lambda rows: metrics.normalized_mutual_info(teacher[rows], labels[rows]),
            "jsd": lambda rows: metrics.composition_jsd(teacher[rows], labels[rows], types[rows], match=match),
        }

    student = figures("niche")
    for model, key in (("student", "niche"), ("histology_leiden", "niche_histology_leiden")):
        for name, statistic in figures(key).items():
            expected = metrics.block_bootstrap(xy, statistic, **boot)
            found = frame.loc[model, [f"{name}_low", f"{name}_high"]].astype(float)
            assert np.allclose(found, [expected.low, expected.high])
            assert found.iloc[0] < frame.loc[model, name] < found.iloc[1]
    for name in ("ari", "nmi"):
        theirs = figures("niche_probe_cell")[name]
        gain = metrics.block_bootstrap(xy, lambda rows, n=name, t=theirs: student[n](rows) - t(rows), **boot)
        found = frame.loc["probe_cell", [f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"]].astype(float)
        assert np.allclose(found, [gain.estimate, gain.low, gain.high])
        assert frame.loc[["student", "teacher"], f"{name}_gain"].isna().all()
    params = done.uns["histoniche"]["evaluate_niches"]["params"]
    assert (params["block_um"], params["n_boot"]) == (BLOCK, 60)
    assert params["n_blocks"] == metrics.spatial_blocks(xy, BLOCK).max() + 1


def test_side_of_the_blocks():
    """Eight radii by default; without a graph, and without a second block, it says what to pass."""
    table = tissue()
    with pytest.warns(UserWarning, match="2 blocks only.*smaller block_um"):
        evaluate_niches(table, baselines=(), n_boot=5)
    assert table.uns["histoniche"]["evaluate_niches"]["params"]["block_um"] == 320
    table.uns["niche_neighbors"]["params"]["radius"] = 100.0
    with pytest.warns(UserWarning, match="one block of 800 um.*block_um"):
        evaluate_niches(table, baselines=(), n_boot=5)
    assert table.uns["niche_evaluation"].columns.tolist()[:2] == ["ari", "nmi"]
    with pytest.raises(ValueError, match="one block with block_um=900"):
        evaluate_niches(table, baselines=(), block_um=900.0)
    del table.uns["niche_neighbors"]
    with pytest.raises(ValueError, match=r"block_um=.*spatial_neighbors.*n_boot=0"):
        evaluate_niches(table, baselines=())


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
    assert entry["params"]["fits"]["probe_cell"]["penalty"] in PENALTIES
    assert entry["params"]["fits"]["histology_leiden"]["n_clusters"] >= 1
    done.write_h5ad(tmp_path / "a.h5ad")
    back = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(back.uns["niche_evaluation"], done.uns["niche_evaluation"], check_dtype=False)
    done.write_zarr(tmp_path / "a.zarr")
    back = ad.read_zarr(tmp_path / "a.zarr")
    assert back.obs["niche_probe_cell"].cat.categories.tolist() == ["0", "1", "2", "3"]


def test_probes_see_training_cells_only(monkeypatch):
    seen = {}

    def fake(data, labels, *, held_out):
        d = data.z.shape[1]
        seen[d] = (data.z * data.std + data.mean, labels, held_out)
        return LinearProbe(np.zeros((d, 2), np.float32), np.zeros(2, np.float32), np.arange(2))

    monkeypatch.setattr(fits, "fit_linear_probe", fake)
    table = tissue()
    evaluate_niches(table, baselines=("probe_cell", "probe_neighborhood"), n_boot=0)
    train = np.flatnonzero(table.obs["split"] == "train")
    x = table.obsm["X_enc"]
    mean = neighborhood_mean(radius_graph(table.obsm["spatial"], 40.0), x)
    assert np.allclose(seen[12][0], x[train], atol=1e-4)
    assert np.allclose(seen[24][0], np.concatenate([x[train], mean[train]], axis=1), atol=1e-4)
    for d in (12, 24):
        assert np.array_equal(seen[d][1], table.obs["niche_teacher"].cat.codes.to_numpy()[train])
        # Two of eight bands along x choose the penalty.
        held, along = seen[d][2], table.obsm["spatial"][train, 0]
        assert held.mean() == pytest.approx(0.25, abs=0.01)
        band = np.argsort(np.argsort(along)) * 8 // len(train)
        assert np.array_equal(held, np.isin(band, [2, 5]))


def test_features_on_disk_are_read_from_their_store(tmp_path):
    table = tissue()
    evaluate_niches(table, baselines=PROBES, n_boot=0)
    half = table.obsm["X_enc"]
    blocks = [np.arange(start, min(start + 500, 1200)) for start in range(0, 1200, 500)]
    store = FeatureStore.create(tmp_path / "x.zarr", blocks, 12, {"encoder": "test"}, "print")
    for number, rows in enumerate(blocks):
        store.write(number, half[rows])
    streamed = tissue()
    streamed.obsm["X_enc"] = _lazy(store)
    streamed.uns["histoniche"]["histology_embedding"] = {
        "params": {"store": str(tmp_path / "x.zarr"), "lazy_name": streamed.obsm["X_enc"].name},
        "inputs": {},
        "outputs": ["obsm/X_enc"],
        "versions": {},
    }
    assert isinstance(streamed_features(streamed, "X_enc"), FeatureStore)
    evaluate_niches(streamed, baselines=PROBES, n_boot=0)
    figures = ["ari", "nmi", "n_niches"]
    pd.testing.assert_frame_equal(streamed.uns["niche_evaluation"][figures], table.uns["niche_evaluation"][figures])
    for name in PROBES:
        assert (streamed.obs[f"niche_{name}"].dropna() == table.obs[f"niche_{name}"].dropna()).all()


def test_no_baseline_sees_the_teacher_on_the_test_cells():
    """Other niches of test and buffer cells, the same niches of the training cells: the same predictions."""
    changed = tissue()
    elsewhere = (changed.obs["split"] != "train").to_numpy()
    codes = changed.obs["niche_teacher"].cat.codes.to_numpy().copy()
    codes[elsewhere] = np.random.default_rng(3).integers(0, 4, elsewhere.sum())
    changed.obs["niche_teacher"] = pd.Categorical.from_codes(codes, ["0", "1", "2", "3"])
    trained = ("probe_cell", "probe_neighborhood", "coordinates_only")
    table = tissue()
    for t in (table, changed):
        evaluate_niches(t, baselines=trained, n_boot=0)
    for name in trained:
        assert (table.obs[f"niche_{name}"].dropna() == changed.obs[f"niche_{name}"].dropna()).all()
        assert abs(changed.uns["niche_evaluation"].loc[name, "ari"]) < 0.03


def test_coordinates_know_bands_but_not_scattered_niches():
    table = tissue()
    scattered = table.copy()
    order = np.random.default_rng(0).permutation(table.n_obs)
    scattered.obs["niche_teacher"] = table.obs["niche_teacher"].to_numpy()[order]
    for t in (table, scattered):
        evaluate_niches(t, baselines=("coordinates_only",), n_boot=0)
    assert table.uns["niche_evaluation"].loc["coordinates_only", "ari"] > 0.7
    assert abs(scattered.uns["niche_evaluation"].loc["coordinates_only", "ari"]) < 0.05


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

    def leiden(features, n_clusters, *, cells, seed):
        seen.update(n_leiden=n_clusters, rows=len(cells))
        shifted = 5 - truth[table.obs["split"] == "test"]
        shifted[:3] = 9
        return BaselineResult(shifted)

    monkeypatch.setattr(fits, "histology_nolan", nolan)
    monkeypatch.setattr(fits, "histology_leiden", leiden)
    evaluate_niches(table, baselines=("histology_nolan", "histology_leiden"), n_boot=0)
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
    copied = evaluate_niches(table, baselines=(), n_boot=0, copy=True)
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
        evaluate_niches(table, **{"block_um": BLOCK, **options})
    assert (set(table.obs), set(table.uns), set(table.uns["histoniche"])) == before


def test_sparse_graph_of_squidpy_is_read(done):
    assert sparse.issparse(done.obsp["niche_distances"])


def distilled():
    """The tissue with a record of what its student was distilled with."""
    table = tissue()
    table.obsm["niche_logits_teacher"] = np.eye(4, dtype=np.float32)[table.obs["niche_teacher"].cat.codes]
    entry = table.uns["histoniche"]["distill_niches"]
    entry["params"] = learnt_from(table, "split", "niche_logits_teacher")
    entry["inputs"] |= {"teacher": "niche_logits_teacher", "split_key": "split"}
    return table


def changes(table):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate_niches(table, baselines=(), n_boot=0, seed=np.int64(0))
    return [str(w.message).split(" is not what")[0] for w in caught if "was distilled with" in str(w.message)]


def test_changes_since_distillation_are_told(tmp_path):
    table = distilled()
    table.write_h5ad(tmp_path / "a.h5ad")
    order = np.random.default_rng(0).permutation(table.n_obs)
    for same in (table, ad.read_h5ad(tmp_path / "a.h5ad"), table[order].copy(), table[order[:500]].copy()):
        assert changes(same) == []
    other = table.copy()
    other.obs["split"] = other.obs["split"].cat.rename_categories({"train": "test", "test": "train"})
    assert changes(other) == ["obs['split']"]
    other = table.copy()
    other.obsm["niche_logits_teacher"] = other.obsm["niche_logits_teacher"][:, ::-1].copy()
    assert changes(other) == ["obsm['niche_logits_teacher']"]
    del table.uns["histoniche"]["distill_niches"]["params"]["split_digest"]  # distilled without a split
    assert changes(table) == ["obs['split']"]
