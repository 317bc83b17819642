"""Fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")
os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data: ``HISTONICHE_DATA``, or ``../shared/data`` beside the checkout."""
    given = os.environ.get("HISTONICHE_DATA")
    folder = Path(given) if given else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        reason = f"real data not found at {folder}; set HISTONICHE_DATA"
        if os.environ.get("CI") == "true" and given:
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and stores without a place of their own go to a folder of the test; no progress bars; one kind of device.

    Tests compare bits, and arrays made beside the package, so they run on the CPU unless ``HISTONICHE_TEST_ACCELERATOR`` names
    another device: on a GPU those of such comparisons fail.
    """
    from histoniche import settings

    monkeypatch.setattr(settings, "cache_dir", tmp_path / "cache")
    monkeypatch.setattr(settings, "progress", False)
    monkeypatch.setattr(settings, "accelerator", os.environ.get("HISTONICHE_TEST_ACCELERATOR", "cpu"))
