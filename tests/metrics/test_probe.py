from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from histoniche.metrics import svm_probe_f1


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    niche = rng.integers(0, 5, 600)
    annotation = np.array(["tumour", "stroma", "immune", "stroma", "tumour"])[niche]
    noisy = np.where(rng.random(600) < 0.15, "immune", annotation)
    return niche, noisy, annotation


def test_niches_that_determine_the_annotation_score_one(cells):
    niche, _, annotation = cells
    assert svm_probe_f1(niche, annotation) == 1
    assert svm_probe_f1(np.eye(5, dtype=np.float32)[niche], annotation) == 1


def test_equals_the_majority_class_of_each_niche(cells):
    """From one-hot niches a linear machine can do no more than name the majority class of each niche."""
    niche, noisy, _ = cells
    majority = {k: max(set(noisy), key=noisy[niche == k].tolist().count) for k in range(5)}
    predicted = [majority[k] for k in niche]
    assert svm_probe_f1(niche, noisy) == pytest.approx(f1_score(noisy, predicted, average="macro"))


def test_invariant_to_names_and_deterministic(cells):
    niche, noisy, _ = cells
    names = np.array(list("vwxyz"))
    assert svm_probe_f1(names[niche], noisy) == pytest.approx(svm_probe_f1(niche, noisy), abs=1e-9)
    assert svm_probe_f1(niche, noisy, seed=3) == svm_probe_f1(niche, noisy, seed=3)


def test_uninformative_niches_score_low(cells):
    _, noisy, _ = cells
    assert svm_probe_f1(np.random.default_rng(1).integers(0, 5, 600), noisy) < 0.4


def test_blocks_stay_together(cells):
    """A niche that names the block predicts a block that it has seen, but not one that is held out."""
    rng = np.random.default_rng(2)
    block = np.repeat(np.arange(20), 30)
    annotation = rng.integers(0, 2, 20)[block]
    assert svm_probe_f1(block, annotation) == 1
    assert svm_probe_f1(block, annotation, blocks=block) < 0.7


def test_rare_classes_and_bad_input(cells):
    niche, noisy, _ = cells
    rare = noisy.copy()
    rare[0] = "nerve"
    assert 0 < svm_probe_f1(niche, rare) < svm_probe_f1(niche, noisy)
    with pytest.raises(ValueError, match="two are needed"):
        svm_probe_f1(niche, np.full(600, "stroma"))
    with pytest.raises(ValueError, match="same cells"):
        svm_probe_f1(niche[:5], noisy)
    with pytest.raises(ValueError, match="3 blocks"):
        svm_probe_f1(niche, noisy, blocks=np.arange(600) % 3)
    with pytest.raises(ValueError, match="same class"):
        svm_probe_f1([0, 0, 1, 1], [0, 0, 1, 1], blocks=[0, 0, 1, 1], n_splits=2)
