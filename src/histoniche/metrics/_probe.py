"""How much of an annotation the niches hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.metrics import f1_score
from sklearn.svm import LinearSVC

from ._labels import encode

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def svm_probe_f1(
    niches: ArrayLike,
    annotation: ArrayLike,
    *,
    blocks: ArrayLike | None = None,
    n_splits: int = 5,
    seed: int = 0,
) -> float:
    """Macro-F1 of a linear support vector machine that predicts an annotation from the niche.

    Cross-validated; the F1 of every class is computed over the pooled held-out predictions, and their mean is given.

    Parameters
    ----------
    niches
        (n,) niche labels of any kind, which are one-hot encoded, or (n, K) probabilities of niches.
    annotation
        (n,) classes of any kind.
    blocks
        (n,) blocks, for instance tiles of tissue, that stay together in one fold. Without them cells are dealt to
        the folds class by class.
    n_splits
        Number of folds.
    seed
        Seed of the folds and of the solver.

    Returns
    -------
    Between 0 and 1.

    Raises
    ------
    ValueError
        Different lengths, missing labels, fewer than two classes, fewer blocks than folds, a training fold of one class.

    References
    ----------
    Fan et al. 2008, LIBLINEAR, Journal of Machine Learning Research 9, 1871-1874.
    """
    x = _design(niches)
    y, classes = encode(annotation, "annotation")
    if len(x) != len(y):
        msg = f"niches has {len(x)} cells, annotation has {len(y)}: they must be the same cells."
        raise ValueError(msg)
    if len(classes) < 2:
        msg = f"annotation has {len(classes)} class(es): two are needed to predict anything."
        raise ValueError(msg)
    fold = _folds(y, blocks, n_splits, np.random.default_rng(seed))
    predicted = np.full(len(y), -1, dtype=np.int64)
    for k in range(n_splits):
        held_out = fold == k
        if not held_out.any():
            continue
        if len(np.unique(y[~held_out])) < 2:
            msg = f"All cells outside fold {k} have the same class: use fewer folds or smaller blocks."
            raise ValueError(msg)
        svm = LinearSVC(dual=False, random_state=seed).fit(x[~held_out], y[~held_out])
        predicted[held_out] = svm.predict(x[held_out])
    return float(f1_score(y, predicted, labels=np.arange(len(classes)), average="macro", zero_division=0.0))


def _design(niches: ArrayLike) -> np.ndarray:
    # A categorical column keeps its own type: NumPy would turn missing values into text.
    array: Any = niches if hasattr(niches, "dtype") else np.asarray(niches)
    if array.ndim == 2:
        return np.asarray(array, dtype=np.float64)
    codes, values = encode(array, "niches")
    return np.eye(len(values))[codes]


def _folds(y: np.ndarray, blocks: ArrayLike | None, n_splits: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of every cell: blocks are dealt out whole; without blocks, the cells of each class are dealt out evenly."""
    if blocks is not None:
        block, values = encode(blocks, "blocks")
        if len(block) != len(y) or len(values) < n_splits:
            msg = f"blocks has {len(block)} cells in {len(values)} blocks, for {len(y)} cells and {n_splits} folds."
            raise ValueError(msg)
        return (rng.permutation(len(values)) % n_splits)[block]
    order = rng.permutation(len(y))
    order = order[np.argsort(y[order], kind="stable")]
    fold = np.empty(len(y), dtype=np.int64)
    fold[order] = np.arange(len(y)) % n_splits
    return fold
