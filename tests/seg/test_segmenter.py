"""A student: saved, loaded, and what it predicts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from histoniche.seg import Field, Segmenter, SegmenterConfig
from histoniche.seg._segmenter import check_scale

ENCODER = "mobilenetv3_small_050"


def make(**options: object) -> Segmenter:
    seed = int(options.pop("seed", 0))  # type: ignore[call-overload]
    return Segmenter(
        SegmenterConfig(ENCODER, ["DAPI"], decoder_channels=[8] * 5, **options), pretrained=False, seed=seed
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def student() -> Segmenter:
    return make(um_per_px=0.5)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


# -------------------------------------------------------------------------------------------------------- directory
def test_saved_and_loaded_is_bit_identical(student: Segmenter, tmp_path: Path) -> None:
    student.save(tmp_path / "model")
    again = Segmenter.load(tmp_path / "model")
    assert again.config == student.config
    assert again.digest == student.digest
    np.testing.assert_array_equal(again.predict_maps(pixels(2, 1, 64, 96)), student.predict_maps(pixels(2, 1, 64, 96)))
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_every_setting_survives(tmp_path: Path) -> None:
    model = make(
        um_per_px=0.2125, threshold=0.4, min_depth=2.0, smoothing=2.0, min_area=30,
        teacher={"name": "SAM", "licence": "Apache-2.0"}, training={"steps": 10, "dice": 0.8},
    )  # fmt: skip
    model.save(tmp_path / "model")
    assert Segmenter.load(str(tmp_path / "model")).config == model.config


def test_a_model_is_replaced_only_when_asked(student: Segmenter, tmp_path: Path) -> None:
    student.save(tmp_path / "model")
    other = make(seed=1)
    with pytest.raises(FileExistsError, match="holds a model already"):
        other.save(tmp_path / "model")
    assert Segmenter.load(tmp_path / "model").digest == student.digest
    other.save(tmp_path / "model", overwrite=True)
    assert Segmenter.load(tmp_path / "model").digest == other.digest != student.digest


def test_other_folders_are_never_replaced(student: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no model directory"):
        student.save(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_and_broken_files(student: Segmenter, tmp_path: Path, name: str) -> None:
    student.save(tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(b"\x00broken")
    with pytest.raises(ValueError, match="damaged and cannot be read"):
        Segmenter.load(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        Segmenter.load(tmp_path / "model")


def test_tampered_weights(student: Segmenter, tmp_path: Path) -> None:
    student.save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("conv_stem.weight"))
    weights[name] = weights[name] + 1
    save_file(weights, file)
    with pytest.raises(ValueError, match="do not belong together"):
        Segmenter.load(tmp_path / "model")
    del weights[name]
    save_file(weights, file)
    with pytest.raises(ValueError, match="configuration does not fit its weights"):
        Segmenter.load(tmp_path / "model")


def test_other_encoder_missing_field_and_wrong_class(student: Segmenter, tmp_path: Path) -> None:
    student.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"encoder": "resnet10t"}, "does not fit its weights"),
        ({"class": "NicheStudent"}, "holds a 'NicheStudent', not a 'Segmenter'"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=message):
            Segmenter.load(tmp_path / "model")
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "stretch"}))
    with pytest.raises(ValueError, match=r"does not fit its weights .*stretch"):
        Segmenter.load(tmp_path / "model")


WRONG = [
    ("encoder", 3, "a name"), ("encoder", "", "a name"), ("channels", [1], "a list of one name or more"),
    ("channels", [], "a list of one name"), ("channels", ["a", "a"], "each once"), ("channels", "DAPI", "a list of one name"),
    ("um_per_px", -1, "positive, or None"), ("um_per_px", "x", "positive"), ("um_per_px", float("inf"), "positive"),
    ("stretch", [99, 1], "two percentiles that rise"), ("stretch", None, "two percentiles"), ("stretch", [1, 101], "0 to 100"),
    ("decoder_channels", [8.5] * 5, "whole numbers"), ("decoder_channels", [0] * 5, "from 1"),
    ("outputs", ["boundary", "foreground"], r"\['foreground', 'boundary'\] is needed"), ("threshold", 7, "from 0 to 1"),
    ("threshold", "abc", "a number from 0 to 1"), ("threshold", float("nan"), "from 0 to 1"), ("threshold", True, "a number"),
    ("min_depth", -1, "a number from 0"), ("smoothing", None, "a number from 0"), ("min_area", 1.5, "a whole number"),
    ("min_area", -1, "from 0"), ("teacher", {"name": "SAM"}, "'licence' among them"), ("teacher", "SAM", "a dict of texts"),
    ("training", [], "a dict"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "needed"), WRONG)
def test_wrong_values_of_a_configuration_are_named(name: str, value: object, needed: str) -> None:
    values = {"encoder": ENCODER, "channels": ["DAPI"], name: value}
    with pytest.raises(ValueError, match=rf"{name}={re.escape(repr(value))}; .*{needed}"):
        SegmenterConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value, _ in WRONG if value == value])
def test_wrong_values_in_a_directory_are_damage(student: Segmenter, tmp_path: Path, name: str, value: object) -> None:
    student.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ValueError, match=rf"Model directory .*model' is damaged: .*{name}="):
        Segmenter.load(tmp_path / "model")


def test_decoders_of_another_depth_are_damage(student: Segmenter, tmp_path: Path) -> None:
    student.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder_channels": [8] * 3}))
    with pytest.raises(ValueError, match=r"Model directory .*model' is damaged"):
        Segmenter.load(tmp_path / "model")


def test_numbers_of_numpy_and_tuples_are_fine() -> None:
    config = SegmenterConfig(
        ENCODER,
        ("DAPI",),
        np.float64(0.5),
        (np.float32(1), 99),
        (np.int64(8),) * 5,
        threshold=np.float64(0.4),  # type: ignore[arg-type]
    )
    assert config.channels == ["DAPI"]
    assert config.stretch == [1, 99]
    assert config.decoder_channels == [8] * 5
    assert config.threshold == 0.4


def test_card_says_licence_resolution_and_training(tmp_path: Path) -> None:
    teacher = {"name": "CellSAM", "licence": "non-commercial"}
    model = make(um_per_px=0.2125, teacher=teacher, training={"steps": 700})
    model.save(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "teacher: CellSAM; its licence, **non-commercial**" in card
    assert "`DAPI`" in card
    assert "0.2125 um/px" in card
    assert "steps: 700" in card
    assert "Not recorded" not in card
    assert "percentiles 1 and 99.8" in card
    assert "teacher" not in make().card()
    assert (
        "foreground above 0.35, seeds 2 px deep, at least 9 px"
        in make(threshold=0.35, min_depth=2.0, min_area=9).card()
    )
    assert "resolution: unknown" in make().card()


# ------------------------------------------------------------------------------------------------------- prediction
@pytest.mark.parametrize("shape", [(64, 64), (33, 70), (100, 31), (5, 3), (1, 1)])
def test_maps_of_any_size(student: Segmenter, shape: tuple[int, int]) -> None:
    maps = student.predict_maps(pixels(2, 1, *shape))
    assert maps.shape == (2, 2, *shape)
    assert maps.dtype == np.float32
    assert ((maps > 0) & (maps < 1)).all()


def test_padding_is_cut_off(student: Segmenter) -> None:
    image = pixels(1, 1, 50, 60)
    rows, columns = np.arange(64), np.arange(64)
    rows, columns = np.where(rows < 50, rows, 98 - rows), np.where(columns < 60, columns, 118 - columns)
    mirrored = image[..., rows[:, None], columns[None]]
    np.testing.assert_allclose(student.predict_maps(image), student.predict_maps(mirrored)[..., :50, :60], atol=1e-6)


def test_images_of_a_batch_are_independent(student: Segmenter) -> None:
    images = pixels(3, 1, 64, 64)
    one_by_one = np.concatenate([student.predict_maps(image[None]) for image in images])
    np.testing.assert_allclose(student.predict_maps(images), one_by_one, atol=1e-5)


def test_seed_decides_the_weights_and_leaves_global_generators() -> None:
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, second, third = make(seed=3), make(seed=3), make(seed=4)
    first.predict_maps(pixels(1, 1, 32, 32))
    assert first.digest == second.digest != third.digest
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


def test_predict_stretches_the_channel_and_makes_objects(student: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def threshold(self: Segmenter, images: np.ndarray) -> np.ndarray:
        seen.append(images)
        return np.concatenate([images > 0.5, np.zeros_like(images)], axis=1).astype(np.float32)

    monkeypatch.setattr(Segmenter, "predict_maps", threshold)
    plane = np.full((60, 60), 100, dtype=np.uint16)
    plane[10:20, 10:20] = plane[40:52, 30:42] = 900
    field = Field("a", np.stack([np.zeros_like(plane), plane]), ("18S", "DAPI"), um_per_px=0.5)
    labels = student.predict(field)
    assert set(np.unique(seen[0])) == {0.0, 1.0}
    assert labels.dtype == np.int32
    assert sorted(np.bincount(labels.ravel())[1:]) == [100, 144]
    with pytest.raises(KeyError, match="no channel 'DAPI'"):
        student.predict(Field("b", plane[None], ("CD3",), um_per_px=0.5))
    with pytest.raises(ValueError, match="constant"):
        student.predict(Field("b", np.zeros((1, 9, 9)), ("DAPI",), um_per_px=0.5))
    with pytest.raises(ValueError, match=r"field 'b' has 0.2 um/px"):
        student.predict(Field("b", plane[None], ("DAPI",), um_per_px=0.2))


def test_instances_use_the_configuration() -> None:
    maps = np.zeros((2, 30, 30), dtype=np.float32)
    maps[0, 5:10, 5:10], maps[0, 15:25, 15:25] = 0.45, 0.9
    assert make().instances(maps).max() == 1
    assert make(threshold=0.4).instances(maps).max() == 2
    assert make(threshold=0.4, min_area=26).instances(maps).max() == 1


def test_repr_and_parameters(student: Segmenter) -> None:
    assert student.n_parameters == sum(p.numel() for p in student.module.parameters())
    assert (
        repr(student)
        == f"Segmenter({ENCODER!r}, channels=[DAPI], 0.5 um/px, {student.n_parameters / 1e6:.1f} M parameters)"
    )
    assert "unknown um/px" in repr(make())


# ------------------------------------------------------------------------------------------------------------ scale
def test_scales_that_go_together() -> None:
    check_scale(None, None, "x")
    check_scale(0.5, 0.5, "x")
    check_scale(0.5, 0.75, "x")
    check_scale(0.75, 0.5, "x")


@pytest.mark.parametrize(("expected", "found"), [(0.5, 1.0), (1.0, 0.5)])
def test_scales_too_far_apart(expected: float, found: float) -> None:
    with pytest.raises(
        ValueError, match=rf"x has {found:g} um/px, .* trained at {expected:g}: 2.00 times apart, more than 1.5"
    ):
        check_scale(expected, found, "x")
    check_scale(expected, found, "x", most=2.0)


@pytest.mark.parametrize(("expected", "found"), [(None, 0.5), (0.5, None)])
def test_scales_of_which_one_is_unknown(expected: float | None, found: float | None) -> None:
    with pytest.raises(ValueError, match=rf"x has um/px {found}, .* trained at {expected}.* Give um_per_px"):
        check_scale(expected, found, "x")
