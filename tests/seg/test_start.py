"""What a training begins with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from histoniche.seg import Field, Segmenter, finetune
from histoniche.seg._start import check_fields, check_schedule, middle, start_student

GOOD: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "patience": 1, "checkpoint_every": 1, "seed": 0}


@pytest.mark.parametrize(
    "given",
    [
        {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"patience": 0}, {"checkpoint_every": 0}, {"seed": -1},
        {"n_views": 0}, {"labelled_share": -1.0}, {"labelled_share": 7.0}, {"labelled_share": float("nan")},
    ],
)  # fmt: skip
def test_settings_out_of_range(given: dict[str, float]) -> None:
    check_schedule(**GOOD)
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        check_schedule(**{**GOOD, **given})


def test_an_image_that_cannot_be_learnt_is_found_at_once(fields: list[Field]) -> None:
    flat = replace(fields[1], image=np.stack([np.full((96, 96), 7, np.uint8), fields[1].image[1]]))
    settings = {"patch_px": 64, "n_steps": 1, "batch_size": 2}
    with pytest.raises(ValueError, match=r"'nuclei1': channel 'DAPI' is constant"):
        check_fields([fields[0], flat], [], [], "DAPI", **settings)
    assert check_fields([fields[0], flat], [], [], "membrane", **settings) == ["membrane"]


def test_a_student_keeps_the_licences_of_all_its_teachers() -> None:
    student: str | Segmenter = "mobilenetv3-small"
    taught = [
        {"name": "a", "licence": "non-commercial"},
        None,
        {"name": "b", "licence": "MIT"},
        {"name": "b", "licence": "MIT"},
    ]
    for teacher in taught:
        student = start_student(student, ["DAPI"], 0.5, pretrained=False, weights=None, seed=0, teacher=teacher)
    assert isinstance(student, Segmenter)
    assert student.config.teacher == {"name": "a; b", "licence": "non-commercial; MIT"}
    assert "non-commercial; MIT" in student.card()


def test_the_middle_of_what_is_too_large_to_be_seen_at_once(fields: list[Field]) -> None:
    assert middle(fields[0]).shape == (96, 96)
    wide = Field("wide", np.zeros((1, 1100, 40), np.uint8), ("DAPI",))
    assert middle(wide).shape == (1024, 40)
    assert middle(wide).name == "wide[38:1062,0:40]"


def test_early_stopping_looks_at_the_middle_alone(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    from histoniche.seg import _start

    monkeypatch.setattr(_start, "_JUDGED_PX", 64)
    seen: list[tuple[int, ...]] = []
    predict = Segmenter.predict_maps

    def noted(self: Segmenter, pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels.shape)
        return predict(self, pixels)

    monkeypatch.setattr(Segmenter, "predict_maps", noted)
    options = {"student": "mobilenetv3-small", "pretrained": False, "channel": "DAPI", "patch_px": 64, "batch_size": 2}
    finetune(fields[:1], validation=fields[1:2], n_steps=2, **options)
    assert set(seen) == {(1, 1, 64, 64)}
