"""Synthetic data sets: making, resuming, reading, and the guard against copies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from histoniche.seg import Field, read_synthetic, synthesize
from histoniche.seg._copies import turned
from histoniche.seg._diffusion import Diffusion
from histoniche.seg._fields import pixels_digest

QUICK = {"size_px": 16, "n_steps": 3, "batch_size": 2, "width": (8, 16), "ddim_steps": 2, "checkpoint_every": 1}
COPIES = "may be copies"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{COPIES}")


def _fields(n: int = 3, n_channels: int = 1) -> list[Field]:
    made = []
    for seed in range(n):
        image = np.random.default_rng(seed).integers(0, 256, (n_channels, 24, 26), dtype=np.uint8)
        limits = np.tile(np.float32([0, 255]), (n_channels, 1))
        names = tuple("RGBA"[:n_channels])
        made.append(Field(f"real{seed}", image, names, um_per_px=0.5, limits=limits))
    return made


def _make(folder: Path, n_images: int = 2, fields: list[Field] | None = None, **settings: object) -> list[Field]:
    return synthesize(fields or _fields(), folder=folder, n_images=n_images, **{**QUICK, **settings})  # type: ignore[arg-type]


def _record(folder: Path) -> dict:
    return json.loads((folder / "synthetic.json").read_text())


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three images, not to be changed."""
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    _make(folder, 3)
    return folder


@pytest.fixture
def made(original: Path, tmp_path: Path) -> Path:
    """A copy of the data set."""
    return Path(shutil.copytree(original, tmp_path / "set"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where something is trained."""

    def fit(*_: object, **__: object) -> None:
        pytest.fail("trained again")

    monkeypatch.setattr(Diffusion, "fit", fit)


def _planted(monkeypatch: pytest.MonkeyPatch, images: list[np.ndarray]) -> None:
    def sample(self: Diffusion, numbers: list[int], **_: int) -> Iterator[tuple[int, np.ndarray]]:
        yield from ((number, images[number]) for number in numbers)

    monkeypatch.setattr(Diffusion, "sample", sample)
    monkeypatch.setattr(Diffusion, "fit", lambda *_, **__: None)


def test_fields_are_those_of_the_stored_files(original: Path) -> None:
    found = read_synthetic(original)
    assert [item.name for item in found] == ["synthetic-00000", "synthetic-00001", "synthetic-00002"]
    for number, item in enumerate(found):
        assert item.image.shape == (1, 16, 16)
        assert item.image.dtype == np.uint8
        assert (item.channels, item.labels, item.um_per_px) == (("R",), None, 0.5)
        stored = np.asarray(Image.open(original / "images" / f"{number:05d}.png"))
        np.testing.assert_array_equal(item.image[0], stored)
        np.testing.assert_allclose(item.read(["R"]), item.image / 255, atol=1e-6)
    assert _files(original) == {
        "images/00000.png", "images/00001.png", "images/00002.png", "synthetic.json", "samples.png", "model/config.json",
        "model/diffusion_pytorch_model.safetensors", "model/scheduler_config.json",
    }  # fmt: skip


def test_record_names_where_images_come_from(original: Path) -> None:
    record = _record(original)
    assert record["synthetic"] is True
    assert record["settings"] == {
        "size_px": 16, "channels": ["R"], "um_per_px": 0.5, "n_steps": 3, "batch_size": 2, "lr": 1e-3, "width": [8, 16],
        "ddim_steps": 2, "seed": 0,
    }  # fmt: skip
    assert record["training_fields"] == [{"name": f.name, "sha256": pixels_digest(f.image)} for f in _fields()]
    assert record["packages"]["torch"] == version("torch")
    assert record["weights_sha256"] == Diffusion.load(original / "model").digest
    for entry, item in zip(record["images"], read_synthetic(original), strict=True):
        assert entry["sha256"] == pixels_digest(item.image)
        source = {f.name: f for f in _fields()}[entry["nearest_field"]]
        y, x = entry["nearest_yx"]
        patch = source.image[:, y : y + 16, x : x + 16] / 255
        rms = np.sqrt(np.mean((turned(item.image / 255, entry["symmetry"]) - patch) ** 2))
        assert entry["nearest_rms"] == pytest.approx(rms, rel=1e-5)
        assert entry["ratio"] == pytest.approx(rms / entry["other_rms"], rel=1e-5)
        assert entry["may_be_copy"] == (entry["ratio"] < record["copies"]["real_ratio_at_quantile"])


@pytest.mark.parametrize(("n_channels", "kind"), [(2, "tif"), (3, "png")])
def test_channels_decide_the_kind_of_file(n_channels: int, kind: str, tmp_path: Path) -> None:
    found = _make(tmp_path, 1, _fields(n_channels=n_channels))
    assert found[0].image.shape == (n_channels, 16, 16)
    path = tmp_path / "images" / f"00000.{kind}"
    stored = tifffile.imread(path) if kind == "tif" else np.moveaxis(np.asarray(Image.open(path)), -1, 0)
    np.testing.assert_array_equal(found[0].image, stored)


def test_named_channels_alone_are_made_and_labels_are_never_read(tmp_path: Path) -> None:
    fields = _fields(n_channels=3)
    labels = np.zeros((24, 26), dtype=np.int32)
    labelled = [replace(fields[0], channels=("R", "G", "X"), labels=labels), *fields[1:]]
    object.__setattr__(labelled[0], "labels", "reading this would fail")
    first = _make(tmp_path / "a", 1, labelled, channels=["G"])
    second = _make(tmp_path / "b", 1, [f.without_labels() for f in fields], channels=["G"])
    assert first[0].channels == ("G",)
    np.testing.assert_array_equal(first[0].image, second[0].image)


def test_more_images_are_added_and_fewer_are_the_first(made: Path, no_training: None, tmp_path: Path) -> None:
    before = read_synthetic(made)
    times = {path: path.stat().st_mtime_ns for path in (made / "images").iterdir()}
    more = _make(made, 5)
    assert len(more) == len(_record(made)["images"]) == 5
    for old, new in zip(before, more, strict=False):
        np.testing.assert_array_equal(old.image, new.image)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    fewer = _make(made, 1)
    assert [item.name for item in fewer] == ["synthetic-00000"]
    assert len(read_synthetic(made)) == 5


def test_seed_decides_the_images_and_global_generators_stay(original: Path, tmp_path: Path) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    other = _make(tmp_path / "other", 1, seed=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert not np.array_equal(other[0].image, read_synthetic(original)[0].image)


def test_interrupted_training_and_sampling_end_with_the_same_images(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    save, sample = Diffusion.save, Diffusion.sample

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Diffusion, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _make(folder, 3)
    assert _files(folder) == {"synthetic.json", "training.ckpt"}
    monkeypatch.setattr(Diffusion, "save", save)

    def one(self: Diffusion, numbers: list[int], **settings: int) -> Iterator[tuple[int, np.ndarray]]:
        yield next(iter(sample(self, numbers, **settings)))  # type: ignore[call-overload]
        raise KeyboardInterrupt

    monkeypatch.setattr(Diffusion, "sample", one)
    with pytest.raises(KeyboardInterrupt):
        _make(folder, 3)
    assert "training.ckpt" not in _files(folder)
    with pytest.raises(ValueError, match="making them was interrupted"):
        read_synthetic(folder)
    asked = []

    def rest(self: Diffusion, numbers: list[int], **settings: int) -> Iterator[tuple[int, np.ndarray]]:
        asked.extend(numbers)
        yield from sample(self, numbers, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(Diffusion, "sample", rest)
    for old, new in zip(read_synthetic(original), _make(folder, 3), strict=True):
        np.testing.assert_array_equal(old.image, new.image)
    assert asked == [1, 2]
    assert _record(folder)["images"] == _record(original)["images"]


def test_damaged_and_exchanged_images_are_made_anew(made: Path, no_training: None) -> None:
    before = [item.image for item in read_synthetic(made)]
    first, second = made / "images" / "00000.png", made / "images" / "00001.png"
    first.write_bytes(first.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"00000.png' is damaged"):
        read_synthetic(made)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"00000.png' is missing"):
        read_synthetic(made)
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(second)
    for old, new in zip(before, _make(made, 2), strict=False):
        np.testing.assert_array_equal(old, new.image)
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(second)
    with pytest.raises(ValueError, match=r"00001.png' is not the image that synthetic.json lists"):
        read_synthetic(made)
    Image.fromarray(np.zeros((16, 8), dtype=np.uint8)).save(second)
    with pytest.raises(ValueError, match=r"is \(1, 16, 8\) uint8, not \(1, 16, 16\)"):
        read_synthetic(made)


def test_a_trained_model_is_sampled_from(original: Path, tmp_path: Path, no_training: None) -> None:
    expected = read_synthetic(original)
    by_path = _make(tmp_path / "path", 1, model=original / "model")
    by_object = _make(tmp_path / "object", 1, model=Diffusion.load(original / "model"))
    for found in (by_path, by_object):
        np.testing.assert_array_equal(found[0].image, expected[0].image)
    record = _record(tmp_path / "path")
    assert record["settings"]["model"] == record["weights_sha256"] == _record(original)["weights_sha256"]
    assert "n_steps" not in record["settings"]
    with pytest.raises(ValueError, match=r"1 channels, 16 px.* does not make images of .*size_px=24"):
        _make(tmp_path / "new", 1, model=original / "model", size_px=24)
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        _make(tmp_path / "new", 1, model=tmp_path)


def test_no_images_are_none_and_nothing_is_written(tmp_path: Path, no_training: None) -> None:
    assert _make(tmp_path / "none", 0) == []
    assert not (tmp_path / "none").exists()


# ----------------------------------------------------------------------------------------------------------- copies
def test_planted_copies_are_flagged_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = _fields()
    copy = np.ascontiguousarray(turned(fields[1].image[:, 4:20, 6:22], 1))
    own = np.random.default_rng(9).integers(0, 256, (1, 16, 16), dtype=np.uint8)
    _planted(monkeypatch, [own, copy])
    with pytest.warns(UserWarning, match=r"1 synthetic images \(50%\) may be copies") as caught:
        found = _make(tmp_path, 2, fields)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(found[1].image, copy)
    record = _record(tmp_path)
    assert [entry["may_be_copy"] for entry in record["images"]] == [False, True]
    entry = record["images"][1]
    assert entry["nearest_rms"] == pytest.approx(0, abs=1e-6)
    assert entry["ratio"] == pytest.approx(0, abs=1e-5)
    assert (entry["nearest_field"], entry["nearest_yx"], entry["symmetry"]) == ("real1", [4, 6], 3)
    assert record["copies"]["n_may_be_copies"] == 1
    with pytest.warns(UserWarning, match=COPIES):  # again, though nothing is made
        _make(tmp_path, 2, fields)


def test_few_copies_are_recorded_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    fields = _fields()
    noise = np.random.default_rng(9).integers(0, 256, (24, 1, 16, 16), dtype=np.uint8)
    _planted(monkeypatch, [*noise, fields[0].image[:, :16, :16]])
    _make(tmp_path, 25, fields)
    assert _record(tmp_path)["copies"]["share_may_be_copies"] == 0.04
    assert not [warning for warning in recwarn if COPIES in str(warning.message)]


def test_a_field_too_small_to_compare_with_itself_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _planted(monkeypatch, [np.zeros((1, 16, 16), dtype=np.uint8)])
    with pytest.warns(UserWarning, match="copies cannot be told"):
        _make(tmp_path, 1, _fields(1))
    assert _record(tmp_path)["images"][0]["ratio"] is None


# ---------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n_steps": 4}, r"n_steps=3, not 4"), ({"seed": 2, "ddim_steps": 4}, r"ddim_steps=2, not 4; seed=0, not 2"),
        ({"fields": _fields(2)}, "other training fields"), ({"channels": ["G"]}, r"channels=\['R'\], not \['G'\]"),
    ],
)  # fmt: skip
def test_folders_of_other_images_are_refused(original: Path, settings: dict, text: str) -> None:
    before = _record(original)
    if "channels" in settings:
        settings = {"fields": [replace(f, channels=("G",)) for f in _fields()]}
    with pytest.raises(ValueError, match=rf"made with .*{text}.*Choose another folder"):
        _make(original, **settings)
    assert _record(original) == before


def test_folders_of_something_else_are_refused(tmp_path: Path, made: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for folder in (tmp_path / "notes", tmp_path / "notes" / "a.txt"):
        with pytest.raises(ValueError, match="holds something else"):
            _make(folder)
    with pytest.raises(FileNotFoundError, match="is no synthetic data set"):
        read_synthetic(tmp_path / "notes")
    for text in ("{", "[]", '{"format": 1, "synthetic": true}', '{"format": 9, "synthetic": true}'):
        (made / "synthetic.json").write_text(text)
        with pytest.raises(ValueError, match=r"synthetic.json' is damaged"):
            read_synthetic(made)
        with pytest.raises(ValueError, match=r"synthetic.json' is damaged"):
            _make(made)
    assert len(list((made / "images").iterdir())) == 3


def test_an_exchanged_model_is_refused(made: Path) -> None:
    Diffusion(1, 16, width=(8, 16), seed=7).save(made / "model")
    with pytest.raises(ValueError, match=r"is not the model that synthetic.json lists"):
        _make(made, 4)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"n_images": -1}, ValueError, "n_images=-1 must be 0 to 3000"),
        ({"n_images": 3001}, ValueError, "n_images=3001 must be 0 to 3000"),
        ({"n_images": 2.5}, ValueError, r"n_images=2\.5 must be 0 to 3000, a whole number"),
        ({"n_steps": 0}, ValueError, "n_steps=0"), ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"ddim_steps": 1001}, ValueError, "ddim_steps=1001"), ({"ddim_steps": 300}, ValueError, r"ddim_steps=300 one of \[1, 2, 4,"), ({"seed": -1}, ValueError, "seed=-1"),
        ({"lr": 0.0}, ValueError, r"lr=0\.0"), ({"checkpoint_every": 0}, ValueError, "checkpoint_every=0"),
        ({"size_px": 17}, ValueError, "size_px=17 must be a multiple of 2"),
        ({"size_px": 32}, ValueError, r"Field 'real0' is 24 x 26 px, smaller than size_px=32"),
        ({"channels": []}, ValueError, r"channels=\[\]"), ({"channels": ["R", "R"]}, ValueError, "several different"),
        ({"channels": "Z"}, KeyError, "Field 'real0' has no channel 'Z'"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict, error: type[Exception], text: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=text):
        _make(tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_fields_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    first, second = _fields(2)
    constant = np.zeros((1, 24, 26), dtype=np.uint8)
    cases = [
        ([first, replace(second, channels=("G",))], r"'real1' has the channels \['G'\], field 'real0' has \['R'\]"),
        ([first, replace(second, um_per_px=0.25)], r"'real1' has um/px 0.25, field 'real0' has 0.5"),
        ([first, replace(second, um_per_px=None)], r"'real1' has um/px None"),
        ([first, replace(second, image=constant, limits=None)], "'real1': channel 'R' is constant"),
    ]
    for fields, text in cases:
        with pytest.raises(ValueError, match=text):
            _make(tmp_path / "new", 1, fields)
    with pytest.raises(ValueError, match="no fields"):
        synthesize([], folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()
