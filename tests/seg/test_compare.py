"""The grid of ways to make a student with few labels."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from histoniche.seg import Field, Segmenter, SegmenterConfig, compare, metrics
from histoniche.seg import _compare as module
from histoniche.seg._compare import drawn, measure_mask
from histoniche.seg._task_specific import FOURTH_STAGE

SHORT: dict[str, Any] = {"n_steps": 2, "batch_size": 2}


@pytest.fixture
def run(tiny_teacher: Any) -> Callable[..., pd.DataFrame]:
    def compared(fields: list[Field], folder: Path, **more: Any) -> pd.DataFrame:
        options = {
        "test": fields[4:], "teacher": tiny_teacher(), "folder": folder, "n_labelled": (1, 2), "seeds": (0,), "channel": "DAPI",
            "patch_px": 64, "tuning": {"n_steps": 2}, "adaptation": SHORT, "pretraining": {**SHORT, "n_views": 1},
        "finetuning": SHORT, **more,
        }  # fmt: skip
        return compare(fields[:4], **options)

    return compared


def noted_last_trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Labels and options of the last trainings, as they begin."""
    trained: list[dict[str, Any]] = []
    finetune = module.finetune

    @functools.wraps(finetune)
    def noted(labelled: Any, **kwargs: Any) -> Segmenter:
        trained.append({"labels": [item.name for item in labelled], **kwargs})
        return finetune(labelled, **kwargs)

    monkeypatch.setattr(module, "finetune", noted)
    return trained


def test_every_way_at_every_number_of_labels(
    run: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = noted_last_trainings(monkeypatch)
    frame = run(fields, tmp_path)
    assert list(frame.columns) == ["arm", "n_labelled", "seed", "dice", "hausdorff95", "missed"]
    assert len(frame) == 10
    assert set(frame["arm"]) == {"scratch", "mae", "mocov3", "task_agnostic_kd", "ts_kd"}
    assert frame["dice"].between(0, 1).all()
    # The labels and the last training are the same for all ways.
    for n in (1, 2):
        some = [call for call in trained if len(call["labels"]) == n]
        assert len(some) == 5
        assert (
            len({json.dumps([call["labels"], call["n_steps"], call["batch_size"], call["seed"]]) for call in some}) == 1
        )
    # A pretraining that does not depend on labels is made once.
    assert {path.name for path in tmp_path.iterdir() if (path / "pretrained").exists()} == {
        "mae-0", "mocov3-0", "task_agnostic_kd-0",
    }  # fmt: skip
    starts = {call["student"].digest for call in trained if isinstance(call["student"], Segmenter)}
    assert len(starts) == 5  # three of those, and one of ts_kd for each number of labels
    trained.clear()
    pd.testing.assert_frame_equal(run(fields, tmp_path), frame)
    assert not trained
    with pytest.raises(ValueError, match=r"was made with .*n_steps"):
        run(fields, tmp_path, finetuning={"n_steps": 3, "batch_size": 2})


def test_single_ways_may_have_a_last_training_of_their_own(
    run: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = noted_last_trainings(monkeypatch)
    options = {"arms": ("scratch", "mae"), "n_labelled": [1], "finetuning": {**SHORT, "lr": 1e-3}}
    run(fields, tmp_path / "own", **options, finetuning_of={"mae": {"lr": 3e-4}})
    assert [call["lr"] for call in trained] == [1e-3, 3e-4]
    trained.clear()
    run(fields, tmp_path / "usual", n_labelled=[1], arms=["ts_kd"])
    run(fields, tmp_path / "given", n_labelled=[1], arms=["ts_kd"], finetuning={**SHORT, "lr": 2e-3})
    assert [call["lr"] for call in trained] == [FOURTH_STAGE["lr"], 2e-3]
    with pytest.raises(ValueError, match="was made with finetuning="):
        run(fields, tmp_path / "own", **options)


def test_imagenet_weights_are_a_way(
    run: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = noted_last_trainings(monkeypatch)
    frame = run(fields, tmp_path, arms=["imagenet", "scratch"], n_labelled=[1], student="efficientnet-lite0")
    assert frame["arm"].tolist() == ["imagenet", "scratch"]
    assert [(call["student"], call["pretrained"]) for call in trained] == [
        ("efficientnet-lite0", True), ("efficientnet-lite0", False),
    ]  # fmt: skip
    assert (
        Segmenter.load(tmp_path / "imagenet-1-0" / "student").digest
        != Segmenter.load(tmp_path / "scratch-1-0" / "student").digest
    )


def test_labels_are_nested_and_drawn_by_the_seed(fields: list[Field]) -> None:
    names = [[item.name for item in drawn(fields, n, 5)] for n in (1, 3, 6)]
    assert names[1][:1] == names[0]
    assert names[2][:3] == names[1]
    assert sorted(names[2]) == sorted(item.name for item in fields)
    assert len({drawn(fields, 1, seed)[0].name for seed in range(20)}) > 2


def test_only_the_annotated_part_is_measured(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    item = fields[0]
    truth = item.read_labels() > 0
    found = truth.copy()
    found[:, 48:] = ~truth[:, 48:]
    monkeypatch.setattr(Segmenter, "predict_field", lambda _, __: np.stack([found, found]).astype(np.float32))
    student = Segmenter(SegmenterConfig("mobilenetv3_small_050", ["DAPI"], decoder_channels=[8] * 5), pretrained=False)
    region = np.zeros(truth.shape, dtype=bool)
    region[:, :48] = True
    inside = measure_mask(student, [replace(item, region=region)])
    assert inside == {"dice": 1.0, "hausdorff95": 0.0, "missed": 0.0}
    both = measure_mask(student, [item, replace(item, region=region)])
    assert both["dice"] == pytest.approx((metrics.dice(found, truth) + 1) / 2)
    assert both["hausdorff95"] == pytest.approx(metrics.hausdorff95(found, truth, um_per_px=0.5) / 2)
    monkeypatch.setattr(Segmenter, "predict_field", lambda _, __: np.zeros((2, *truth.shape), dtype=np.float32))
    assert measure_mask(student, [item])["missed"] == 1.0


def test_bad_input(run: Any, fields: list[Field], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"arms=\['best'\]"):
        run(fields, tmp_path, arms=["best"])
    with pytest.raises(ValueError, match=r"n_labelled=\[5\] must lie between 1 and the number of fields, 4"):
        run(fields, tmp_path, n_labelled=[5])
    with pytest.raises(ValueError, match="0 test fields"):
        run(fields, tmp_path, test=[])
    with pytest.raises(ValueError, match="has the pixels of the held-out field 'nuclei4'"):
        run(fields, tmp_path, synthetic=[replace(fields[4], name="copy")])
    for given in (
        {"finetuning": {**SHORT, "validation": fields[4:]}},
        {"finetuning_of": {"mae": {"validation": fields[4:]}}},
    ):
        with pytest.raises(ValueError, match="has the pixels of the held-out field 'nuclei4'"):
            run(fields, tmp_path, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_labelled": ()}, r"n_labelled=\[\]"), ({"seeds": ()}, r"seeds=\[\]: at least one"),
        ({"pretraining": {"mask_ratio": 0.5}}, "pretraining has the option 'mask_ratio': those of distill"),
        ({"pretraining": {"layers": {0: "block0"}}}, "pretraining has the option 'layers': those of pretrain"),
        ({"finetuning": {"n_stepz": 1}}, "finetuning has the option 'n_stepz'"), ({"patch_px": 50}, "patch_px=50"),
        ({"finetuning_of": {"mae": {"n_stepz": 1}}}, r"finetuning_of\['mae'\] has the option 'n_stepz'"),
        ({"finetuning_of": {"best": {}}}, r"finetuning_of=\['best'\]"),
        ({"finetuning": {"pretrained": True}}, "finetuning has the option 'pretrained', which is the same for all ways"),
        ({"finetuning_of": {"mae": {"weights": "x"}}}, "mae has the option 'weights', which is the same for all ways"),
        ({"pretraining": {"seed": 3}}, "pretraining has the option 'seed'"),
    ],
)  # fmt: skip
def test_bad_settings_are_found_before_anything_is_trained(
    run: Any, fields: list[Field], tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(fields, tmp_path, **given)
    for place in (1, 5):  # one to train on, one to measure on
        bare = [item.without_labels() if row == place else item for row, item in enumerate(fields)]
        with pytest.raises(ValueError, match=f"'nuclei{place}' has no labels"):
            run(bare, tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_ways_pretrain_alike_by_default(
    run: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []
    for name in ("distill", "pretrain"):
        function = getattr(module, name)

        @functools.wraps(function)
        def short(fields: Any, *, _function: Any = function, _name: str = name, **kwargs: Any) -> Segmenter:
            seen.append((_name, kwargs["n_steps"], kwargs["batch_size"]))
            return _function(fields, **{**kwargs, "n_steps": 1, "batch_size": 2})

        monkeypatch.setattr(module, name, short)
    run(fields, tmp_path, pretraining=None, n_labelled=[1])
    assert sorted(seen) == [("distill", 1000, 8), ("distill", 1000, 8), ("pretrain", 1000, 8), ("pretrain", 1000, 8)]
