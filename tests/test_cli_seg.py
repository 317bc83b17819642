"""Commands of segmentation: what they read, pass on, write and refuse."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

import histoniche as hn
from histoniche import _cli_seg, cli
from histoniche.seg import Field, Segmenter, SegmenterConfig
from histoniche.seg._tiled import tiled_maps

ENCODER = "mobilenetv3_small_050"


def picture(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def labels_of(size: int) -> np.ndarray:
    labels = np.zeros((size, size), dtype=np.uint8)
    labels[4:20, 4:20], labels[4:20, 20:30], labels[40:60, 30:50] = 1, 2, 3
    return labels


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Two labelled images and one without labels in a folder, two in another."""
    for name in "abc":
        save(tmp_path / f"task/images/{name}.png", picture(ord(name), 64, 64, 3))
    for name in "ab":
        save(tmp_path / f"task/labels/{name}.png", labels_of(64))
    for name in "xy":
        save(tmp_path / f"more/{name}.png", picture(ord(name), 80, 64, 3))
    return tmp_path / "task"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the heavy functions are called with."""
    found: dict[str, Any] = {}

    def distilled(labelled: list[Field], **options: Any) -> str:
        found["labelled"], found["options"] = labelled, options
        return "the student"

    def exported(model: Any, path: Path, **options: Any) -> Path:
        found["onnx"] = (model, path, options)
        return path

    def segmenter(config: SegmenterConfig, **options: Any) -> None:
        found["student"] = (config, options)

    def teacher(name: str):
        return lambda channels, **options: SimpleNamespace(name=name, channels=list(channels), options=options)

    monkeypatch.setattr(hn.seg, "task_specific_distill", distilled)
    monkeypatch.setattr(hn.seg, "export_onnx", exported)
    monkeypatch.setattr(hn.seg, "Segmenter", segmenter)
    monkeypatch.setattr(hn.seg.teachers, "LiteMedSAM", teacher("litemedsam"))
    monkeypatch.setattr(hn.seg.teachers, "SAM", teacher("sam"))
    return found


# ----------------------------------------------------------------------------------------------------------- distill
def test_distill_with_defaults(task: Path, tmp_path: Path, calls: dict[str, Any], capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["seg", "distill", str(task), str(out), "--patch-px", "64"]) == 0
    assert [item.name for item in calls["labelled"]] == ["a", "b"]
    assert np.array_equal(calls["labelled"][0].labels, labels_of(64))
    assert calls["labelled"][0].um_per_px is None
    options = calls["options"]
    assert [item.name for item in options.pop("unlabelled")] == ["c"]
    teacher = options.pop("teacher")
    assert (teacher.name, teacher.channels) == ("litemedsam", ["red", "green", "blue"])
    assert options == {
        "folder": out, "held_out": [], "channel": ["red", "green", "blue"], "student": "vit-tiny", "pretrained": True,
        "n_synthetic": 0, "patch_px": 64, "adaptation": None, "distillation": None, "finetuning": None, "seed": 0,
    }  # fmt: skip
    config, start = calls["student"]
    assert (config.encoder, config.channels, start) == (
        "vit-tiny", ["red", "green", "blue"], {"pretrained": True, "weights": None},
    )  # fmt: skip
    assert "onnx" not in calls
    said = capsys.readouterr().out
    assert "2 labelled and 1 unlabelled images, channels red, green, blue; teacher litemedsam" in said
    assert f"student: {out / 'student'}\n" in said
    assert f"next: histoniche seg predict {out / 'student'} IMAGES OUTPUT\n" in said


def test_distill_passes_its_options(task: Path, tmp_path: Path, calls: dict[str, Any], capsys) -> None:
    save(tmp_path / "test/t.png", picture(9, 64, 64, 3))
    (tmp_path / "w.safetensors").touch()
    command = ["seg", "distill", str(task / "images"), str(tmp_path / "out"), "--labels", str(task / "labels")]
    command += ["--unlabelled", str(tmp_path / "more"), "--held-out", str(tmp_path / "test"), "--mask", "--onnx"]
    command += ["--channels", "r", "g", "b", "--um-per-px", "0.5", "--student", "resnet18"]
    command += ["--student-weights", str(tmp_path / "w.safetensors"), "--teacher", "vit_l"]
    command += ["--teacher-weights", str(tmp_path / "sam"), "--n-synthetic", "250", "--patch-px", "32"]
    assert cli.main([*command, "--steps", "40", "--teacher-steps", "0", "--seed", "3"]) == 0
    options = calls["options"]
    assert [item.name for item in options["unlabelled"]] == ["c", "x", "y"]
    assert [item.name for item in options["held_out"]] == ["t"]
    every = [*calls["labelled"], *options["unlabelled"], *options["held_out"]]
    assert {(item.channels, item.um_per_px) for item in every} == {(("r", "g", "b"), 0.5)}
    assert np.array_equal(calls["labelled"][1].labels, labels_of(64) > 0), "a mask of one class"
    assert (options["teacher"].name, options["teacher"].options) == (
        "sam", {"model": "vit_l", "weights": tmp_path / "sam"},
    )  # fmt: skip
    assert (options["n_synthetic"], options["patch_px"], options["seed"], options["student"]) == (
        250,
        32,
        3,
        "resnet18",
    )
    assert options["adaptation"] == {"n_steps": 0}
    assert options["distillation"] == {"n_steps": 40, "weights": str(tmp_path / "w.safetensors")}
    assert options["finetuning"] == {"n_steps": 40}
    assert calls["onnx"] == ("the student", tmp_path / "out/student.onnx", {"size": None})
    assert "IMAGES OUTPUT --mask --um-per-px 0.5\n" in capsys.readouterr().out


def test_distill_of_one_channel_from_random_weights(tmp_path: Path, calls: dict[str, Any]) -> None:
    save(tmp_path / "flat/a.png", picture(0, 64, 64))
    save(tmp_path / "flat/labels/a.png", labels_of(64))
    command = ["seg", "distill", str(tmp_path / "flat"), str(tmp_path / "out"), "--patch-px", "64", "--no-pretrained"]
    assert cli.main([*command, "--onnx"]) == 0
    assert calls["options"]["channel"] == ["image"]
    assert calls["options"]["pretrained"] is calls["student"][1]["pretrained"] is False
    assert calls["onnx"][2] == {"size": 64}, "a ViT is bound to one size"


def test_an_interrupted_distillation_goes_on_and_other_folders_are_left(
    task: Path, tmp_path: Path, calls, capsys
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    command = ["seg", "distill", str(task), str(out), "--patch-px", "64"]
    assert cli.main(command) == 2
    assert "holds something else" in capsys.readouterr().err
    (out / "tuned.json").touch()
    (out / "distilled").mkdir()
    assert cli.main(command) == 0
    assert "labelled" in calls
    assert "student" not in calls, "its weights are there already"


def test_distill_refuses_before_any_work(task: Path, tmp_path: Path, calls, capsys) -> None:
    def error(*options: str, images: Path = task, out: Path = tmp_path / "out") -> str:
        assert cli.main(["seg", "distill", str(images), str(out), *options]) == 2
        return capsys.readouterr().err

    assert "smaller than --patch-px 128: lower it" in error()
    assert "exclude each other" in error("--no-pretrained", "--student-weights", "w.pth")
    assert "--teacher-weights are those of SAM" in error("--teacher-weights", "sam")
    assert "no folder " + str(tmp_path / "more" / "labels") in error(images=tmp_path / "more")
    assert "no folder " + str(tmp_path / "absent") in error(out=tmp_path / "absent" / "out")
    assert "c: no image of this name" in error("--labels", str(task / "images"), images=tmp_path / "more")
    assert "no axis is that of the 2 channel" in error("--channels", "r", "g")
    (tmp_path / "empty").mkdir()
    assert "nothing is labelled" in error("--labels", str(tmp_path / "empty"))
    assert not calls
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_had_are_known_before_the_teacher_learns(
    task: Path, tmp_path: Path, calls, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(hn.seg, "Segmenter", Segmenter)
    command = ["seg", "distill", str(task), str(tmp_path / "out"), "--patch-px", "64", "--student", ENCODER]
    assert cli.main([*command, "--student-weights", str(tmp_path / "none.pth")]) == 2
    assert "is no file" in capsys.readouterr().err
    assert "labelled" not in calls


# ----------------------------------------------------------------------------------------------- predict and evaluate
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student that never learnt, with a threshold that makes it find something."""
    config = SegmenterConfig(
        ENCODER, ["red", "green", "blue"], decoder_channels=[8] * 5, threshold=0.5, min_area=1, smoothing=0.0
    )
    student = Segmenter(config, seed=1)
    maps = student.predict_maps(picture(ord("x"), 1, 3, 80, 64).astype(np.float32) / 255)
    student.config.threshold = float(np.quantile(maps[0, 0], 0.7))
    path = tmp_path_factory.mktemp("student") / "student"
    student.save(path)
    return path


def read(path: Path) -> np.ndarray:
    return tifffile.imread(path)


def test_predict_writes_the_objects_of_the_student(task: Path, tmp_path: Path, model: Path, capsys) -> None:
    out = tmp_path / "found"
    assert cli.main(["seg", "predict", str(model), str(tmp_path / "more"), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["x.tif", "y.tif"]
    student, total = Segmenter.load(model), 0
    for name in "xy":
        image = picture(ord(name), 80, 64, 3).transpose(2, 0, 1)
        expected = student.predict(Field(name, image, ("red", "green", "blue")))
        assert expected.max() > 1
        total += expected.max()
        assert read(out / f"{name}.tif").dtype == np.uint16
        assert np.array_equal(read(out / f"{name}.tif"), expected)
    assert f"wrote 2 label images with {total} objects to {out}" in capsys.readouterr().out

    masks = tmp_path / "masks"
    masks.mkdir()
    assert cli.main(["seg", "predict", str(model), str(task), str(masks), "--mask"]) == 0
    assert sorted(path.name for path in masks.iterdir()) == ["a.tif", "b.tif", "c.tif"]
    image = picture(ord("a"), 64, 64, 3).transpose(2, 0, 1)
    maps = student.predict_field(Field("a", image, ("red", "green", "blue")))
    assert read(masks / "a.tif").dtype == np.uint8
    assert np.array_equal(read(masks / "a.tif"), (maps[0] > student.config.threshold) * np.uint8(255))


def test_large_images_are_predicted_in_tiles(model: Path, monkeypatch) -> None:
    monkeypatch.setattr(_cli_seg, "_TILE", 96)
    monkeypatch.setattr(_cli_seg, "_OVERLAP", 32)
    student = Segmenter.load(model)
    item = Field("large", picture(0, 3, 70, 200), ("red", "green", "blue"))
    maps = _cli_seg._maps(student, item)
    expected = tiled_maps(
        item.read(item.channels), student.predict_maps, tile=96, overlap=32, batch_size=1
    ).compute(scheduler="synchronous")  # fmt: skip
    assert maps.shape == (2, 70, 200)
    assert np.array_equal(maps, expected)
    assert not np.allclose(maps, student.predict_field(item))
    student.config.um_per_px = 0.5
    with pytest.raises(ValueError, match="image 'large' has um/px None"):
        _cli_seg._maps(student, item)


def test_predict_overwrites_nothing_and_leaves_no_half_file(
    task: Path, tmp_path: Path, model: Path, capsys, monkeypatch
) -> None:
    command = ["seg", "predict", str(model), str(tmp_path / "more"), str(tmp_path / "found")]
    (tmp_path / "found").mkdir()
    (tmp_path / "found/kept").write_text("kept")
    assert cli.main(command) == 2
    assert "not empty" in capsys.readouterr().err
    (tmp_path / "found/kept").unlink()

    def broken(path: Path, *args: Any, **kwargs: Any) -> None:
        Path(path).write_text("half")
        msg = "disk full"
        raise OSError(msg)

    with monkeypatch.context() as patched:
        patched.setattr(tifffile, "imwrite", broken)
        assert cli.main(command) == 2
    assert "disk full" in capsys.readouterr().err
    assert not list((tmp_path / "found").iterdir())

    assert cli.main(["seg", "predict", str(tmp_path / "none"), str(task), str(tmp_path / "found")]) == 2
    assert "no model folder" in capsys.readouterr().err
    assert cli.main([*command, "--um-per-px", "0.5"]) == 2
    assert "trained at None" in capsys.readouterr().err
    save(tmp_path / "grey/g.png", picture(0, 64, 64))
    assert cli.main(["seg", "predict", str(model), str(tmp_path / "grey"), str(tmp_path / "found")]) == 2
    assert "no axis is that of the 3 channel" in capsys.readouterr().err


def test_predict_that_fails_leaves_nothing_and_then_works(tmp_path: Path, model: Path, capsys) -> None:
    for name in "ab":
        save(tmp_path / f"set/{name}.png", picture(ord(name), 64, 64, 3))
    save(tmp_path / "set/c.png", np.full((64, 64, 3), 9, dtype=np.uint8))
    out = tmp_path / "found"
    command = ["seg", "predict", str(model), str(tmp_path / "set"), str(out)]
    assert cli.main(command) == 2
    assert "'c': channel 'red' is constant" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    (tmp_path / "set/c.png").unlink()
    assert cli.main(command) == 0
    assert sorted(path.name for path in out.iterdir()) == ["a.tif", "b.tif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "set"]


def test_predict_looks_at_the_scale_of_all_images_first(
    task: Path, tmp_path: Path, model: Path, capsys, monkeypatch
) -> None:
    def predicted(*args: Any) -> np.ndarray:
        raise AssertionError

    monkeypatch.setattr(_cli_seg, "_maps", predicted)
    command = ["seg", "predict", str(model), str(task), str(tmp_path / "found"), "--um-per-px", "0.5"]
    assert cli.main(command) == 2
    assert "image 'a' has um/px 0.5, the student was trained at None" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()


def test_predict_into_the_folder_where_one_is(tmp_path: Path, model: Path, monkeypatch) -> None:
    save(tmp_path / "set/a.png", picture(1, 64, 64, 3))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["seg", "predict", str(model), str(tmp_path / "set"), "."]) == 0
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a.tif"]


def test_numbers_of_objects_that_need_32_bits(tmp_path: Path) -> None:
    labels = np.arange(300 * 300, dtype=np.int32).reshape(300, 300)
    _cli_seg._write_labels(labels, tmp_path / "a.tif")
    assert read(tmp_path / "a.tif").dtype == np.uint32
    assert np.array_equal(read(tmp_path / "a.tif"), labels)


def test_evaluate_prints_and_writes_the_table(task: Path, tmp_path: Path, capsys) -> None:
    found = tmp_path / "found"
    for name in "ab":
        save(found / f"{name}.png", labels_of(64) * (name == "a"))
    command = ["seg", "evaluate", str(found), str(task / "labels"), "--csv", str(tmp_path / "table.csv")]
    assert cli.main([*command, "--um-per-px", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "mean of 2 images: dice 0.500, hausdorff95" in said
    assert " um, boundary_f" in said
    assert said.rstrip().endswith(f"nothing found in 1\nwrote {tmp_path / 'table.csv'}")
    table = pd.read_csv(tmp_path / "table.csv", index_col="image")
    pairs = [(labels_of(64), labels_of(64)), (labels_of(64) * 0, labels_of(64))]
    expected = hn.seg.metrics.evaluate(pairs, names=["a", "b"], um_per_px=0.5)
    pd.testing.assert_frame_equal(table, expected)
    assert list(expected["ap50"]) == [1, 0]
    for name in expected:
        assert str(name) in said

    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err


def test_evaluate_masks(task: Path, tmp_path: Path, capsys) -> None:
    for name in "ab":
        save(tmp_path / f"true/{name}.png", (labels_of(64) > 0) * np.uint8(255))
    command = ["seg", "evaluate", str(task / "labels"), str(tmp_path / "true")]
    assert cli.main(command) == 2
    assert "(--mask) measures masks" in capsys.readouterr().err
    assert cli.main([*command, "--mask"]) == 0
    said = capsys.readouterr().out
    assert "mean of 2 images: dice 1.000, hausdorff95 0.000 px, boundary_f 1.000; nothing found in 0" in said
    assert "ap50" not in said


def test_predictions_can_be_evaluated(tmp_path: Path, model: Path, capsys) -> None:
    for name in "pq":
        save(tmp_path / f"set/images/{name}.png", picture(ord(name), 64, 64, 3))
        save(tmp_path / f"set/labels/{name}.png", labels_of(64))
    out = str(tmp_path / "found")
    assert cli.main(["seg", "predict", str(model), str(tmp_path / "set"), out, "--quiet"]) == 0
    assert cli.main(["seg", "evaluate", out, str(tmp_path / "set" / "labels"), "--csv", str(tmp_path / "t.csv")]) == 0
    assert "mean of 2 images" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "t.csv", index_col="image")
    assert list(table.index) == ["p", "q"]
    assert (table["n_true"] == 3).all()
    assert (table["n_predicted"] > 0).all()


def test_commands_are_listed(capsys) -> None:
    for command, words in (([], ["seg"]), (["seg"], ["distill", "predict", "evaluate"])):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, "--help"])
        assert end.value.code == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)
    with pytest.raises(SystemExit) as end:
        cli.main(["seg"])
    assert end.value.code == 2
