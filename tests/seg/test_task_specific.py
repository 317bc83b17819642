"""The stages of task-specific distillation: what they make, what is taken up again, what is refused."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from histoniche.seg import Field, Segmenter, task_specific_distill
from histoniche.seg import _task_specific as module
from histoniche.seg.teachers import PromptedTeacher, SemanticTeacher


@pytest.fixture
def options(tiny_teacher: Callable[[], PromptedTeacher]) -> Callable[..., dict[str, Any]]:
    return lambda folder, **more: {
        "teacher": tiny_teacher(), "folder": folder, "channel": "DAPI", "student": "vit-tiny", "pretrained": False,
        "n_synthetic": 0, "patch_px": 64, "tuning": {"n_steps": 4}, "adaptation": {"n_steps": 4},
        "distillation": {"n_steps": 3, "batch_size": 2, "n_views": 2}, "finetuning": {"n_steps": 3, "batch_size": 2},
        "synthesis": {"n_steps": 2, "batch_size": 2, "width": (8, 8), "ddim_steps": 2}, **more,
    }  # fmt: skip


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that are run, as they begin."""
    calls: list[str] = []
    for name in ("tune", "finetune_lora", "synthesize", "distill", "finetune"):
        original = getattr(module, name)

        @functools.wraps(original)
        def noted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls.append(_name)
            return _original(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)
    return calls


def test_four_stages_one_student(
    options: Any, tiny_teacher: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    folder = tmp_path / "run"
    student = task_specific_distill(fields[:2], unlabelled=fields[2:4], **options(folder, n_synthetic=2))
    assert calls == ["tune", "finetune_lora", "synthesize", "distill", "finetune"]
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        "tuned", "teacher", "synthetic", "outputs", "distilled", "student",
    }  # fmt: skip
    distilled = Segmenter.load(folder / "distilled")
    assert distilled.config.training["fields"] == 6  # 2 labelled, 2 unlabelled, 2 synthetic
    assert distilled.config.teacher == {"name": "tiny-lora", "licence": "CC0"}
    assert student.digest == Segmenter.load(folder / "student").digest != distilled.digest
    assert SemanticTeacher.load(folder / "teacher", teacher=tiny_teacher()).adapter is not None
    # Again: everything is found, nothing is trained.
    calls.clear()
    again = task_specific_distill(fields[:2], unlabelled=fields[2:4], **options(folder, n_synthetic=2))
    assert again.digest == student.digest
    assert calls == ["synthesize"]  # which only reads its images


def test_an_interrupted_stage_goes_on(
    options: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = task_specific_distill(fields[:2], **options(tmp_path / "whole"))
    from histoniche.seg import _fit

    original, seen = _fit.training_patch, []

    def failing(*args: Any) -> Tensor:
        seen.append(1)
        if len(seen) > 3:
            msg = "killed"
            raise RuntimeError(msg)
        return original(*args)

    folder = tmp_path / "stopped"
    short = {"n_steps": 3, "batch_size": 2, "checkpoint_every": 1}
    monkeypatch.setattr(_fit, "training_patch", failing)  # in the last stage alone: views are not drawn by it
    with pytest.raises(RuntimeError, match="killed"):
        task_specific_distill(fields[:2], **options(folder, finetuning=short))
    assert (folder / "distilled").exists()
    assert not (folder / "student").exists()
    monkeypatch.setattr(_fit, "training_patch", original)
    calls = counted(monkeypatch)
    resumed = task_specific_distill(fields[:2], **options(folder, finetuning=short))
    assert calls == ["finetune"]
    assert resumed.digest == whole.digest
    assert not list(folder.glob("*.state"))


def test_without_lora(options: Any, fields: list[Field], tmp_path: Path) -> None:
    task_specific_distill(fields[:2], **options(tmp_path, adaptation={"n_steps": 0}))
    assert not (tmp_path / "teacher").exists()
    assert Segmenter.load(tmp_path / "distilled").config.teacher["name"] == "tiny-tuned"
    assert json.loads((tmp_path / "student.json").read_text())["lr"] == module.FOURTH_STAGE["lr"]


def test_a_folder_of_another_run_is_refused(options: Any, fields: list[Field], tmp_path: Path) -> None:
    task_specific_distill(fields[:2], **options(tmp_path))
    digest = Segmenter.load(tmp_path / "student").digest
    with pytest.raises(ValueError, match=r"'.*tuned' was made with fields=.* choose another folder"):
        task_specific_distill(fields[1:3], **options(tmp_path))
    with pytest.raises(ValueError, match=r"'.*teacher' was made with n_steps=4, not 5"):
        task_specific_distill(fields[:2], **options(tmp_path, adaptation={"n_steps": 5}))
    with pytest.raises(ValueError, match=r"'.*student' was made with n_steps=3, not 4"):
        task_specific_distill(fields[:2], **options(tmp_path, finetuning={"n_steps": 4, "batch_size": 2}))
    assert Segmenter.load(tmp_path / "student").digest == digest
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        task_specific_distill(fields[:2], **options(tmp_path / "file"))
    with pytest.raises(ValueError, match="no labelled fields"):
        task_specific_distill([], **options(tmp_path / "run"))


def test_held_out_images_are_refused(options: Any, fields: list[Field], tmp_path: Path) -> None:
    renamed = replace(fields[1], name="new", labels=None, image=fields[1].image.astype(np.float64))
    short = {"n_steps": 3, "batch_size": 2}
    for given in (
        {"held_out": [renamed]}, {"unlabelled": [renamed], "held_out": [fields[1]]},
        {"held_out": [fields[4]], "finetuning": {**short, "validation": [fields[4]]}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="has the pixels of the held-out field"):
            task_specific_distill(fields[:2], **options(tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channel": None}, r"channels \['DAPI', 'membrane'\]"), ({"channel": "CD3"}, "no channel 'CD3'"),
        ({"patch_px": 50}, "patch_px=50"), ({"patch_px": 128}, "smaller than a patch"), ({"student": "nope"}, "nope"),
        ({"n_synthetic": 4000}, "n_synthetic=4000 must be 0 to 3000"),
        ({"finetuning": {"n_stepz": 3}}, r"finetuning has the option 'n_stepz': those of finetune are \['channel'"),
        ({"distillation": {"cache": "here"}}, "distillation has the option 'cache'"),
        ({"adaptation": {"targets": "nope"}}, "targets='nope' match no linear layer"),
        ({"adaptation": {"rank": 0}}, "rank=0"), ({"n_synthetic": 2, "synthesis": {"ddim_steps": 7}}, "ddim_steps=7"),
        ({"distillation": {"n_steps": 0}}, "n_steps=0"), ({"distillation": {"n_views": 0}}, "n_views=0"),
        ({"distillation": {"layers": {9: "block0"}}}, r"layers=\{9: 'block0'\}: the student has the layers 0 to 3"),
        ({"distillation": {"layers": {0: "block9"}}}, "has no hidden features 'block9'"), ({"finetuning": {"lr": -1.0}}, "lr=-1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_found_before_the_teacher_works(
    options: Any,
    fields: list[Field],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    message: str,
) -> None:
    calls = counted(monkeypatch)
    with pytest.raises((ValueError, KeyError), match=message):
        task_specific_distill(fields[:2], **options(tmp_path, **given))
    one_class = replace(fields[2], labels=np.zeros_like(fields[2].labels))
    with pytest.raises(ValueError, match=r"'nuclei2': its labels have one class only"):
        task_specific_distill([fields[0], one_class], **options(tmp_path))
    coarse = replace(fields[2], um_per_px=1.0)
    with pytest.raises(ValueError, match="field 'nuclei2' has 1 um/px"):
        task_specific_distill(fields[:2], unlabelled=[coarse], **options(tmp_path))
    assert calls == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["peft", "diffusers"])
def test_missing_packages_are_found_before_the_teacher_works(
    options: Any, fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    calls = counted(monkeypatch)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs the package {package}"):
        task_specific_distill(fields[:2], **options(tmp_path, n_synthetic=2))
    assert calls == []
    assert not list(tmp_path.iterdir())


def test_what_was_made_of_other_fields_is_not_taken(options: Any, fields: list[Field], tmp_path: Path) -> None:
    short = {"n_steps": 3, "batch_size": 2}
    task_specific_distill(fields[:1], **options(tmp_path, finetuning={**short, "validation": fields[4:5]}))
    finer = [replace(fields[0], um_per_px=0.25)]
    with pytest.raises(ValueError, match=r"tuned' was made with fields="):
        task_specific_distill(finer, **options(tmp_path))
    turned = replace(fields[4], labels=np.roll(fields[4].labels, 3))
    with pytest.raises(ValueError, match=r"student' was made with validation="):
        task_specific_distill(fields[:1], **options(tmp_path, finetuning={**short, "validation": [turned]}))


def test_images_of_different_sizes_and_bit_depths(options: Any, fields: list[Field], tmp_path: Path) -> None:
    wide = replace(
        fields[2], name="wide", image=np.tile(fields[2].image.astype(np.uint16) * 200, (1, 1, 2)), labels=None
    )  # fmt: skip
    real = replace(fields[3], name="real", image=fields[3].image / 255.0, labels=None)
    student = task_specific_distill(fields[:1], unlabelled=[wide, real], **options(tmp_path))
    assert Segmenter.load(tmp_path / "distilled").config.training["fields"] == 3
    brighter = replace(fields[4], image=fields[4].image.astype(np.uint16) * 200)
    np.testing.assert_allclose(student.predict_field(brighter), student.predict_field(fields[4]), atol=1e-4)
