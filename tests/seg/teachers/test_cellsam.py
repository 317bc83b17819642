"""The adapter to CellSAM, with a module in its place that keeps what it was given."""

from __future__ import annotations

import sys
import types
import warnings
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 raised by the fake
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from histoniche.seg._fields import Field
from histoniche.seg._targets import maps_of_labels
from histoniche.seg.teachers import CellSAM, Teacher, TeacherAccessError

TOKEN = "DEEPCELL_ACCESS_TOKEN"


def labels_of(shape: tuple[int, int]) -> np.ndarray:
    labels = np.zeros(shape, dtype=np.int64)
    labels[2:8, 2:7], labels[2:8, 7:12], labels[12:18, 3:9] = 1, 2, 7
    return labels


class FakeCellSAM(types.ModuleType):
    """The functions of the package that are used, as its documentation has them."""

    def __init__(self) -> None:
        super().__init__("cellSAM")
        self.calls: list[dict[str, Any]] = []
        self.loaded: list[tuple[str, str]] = []
        self.cells = True
        self.net = nn.Linear(3, 2)

    def get_model(self, model: str = "cellsam_general", version: str | None = None) -> nn.Module:
        self.loaded.append(("name", model))
        return self.net

    def get_local_model(self, model_path: str) -> nn.Module:
        self.loaded.append(("file", model_path))
        return self.net

    def segment_cellular_image(self, img: np.ndarray, model: nn.Module, **values: Any) -> tuple:
        self.calls.append({"img": img.copy(), "model": model, **values})
        warnings.warn("Low IOU threshold, ignoring mask.", stacklevel=1)
        if not self.cells:
            return np.zeros((3, *img.shape[:2]), dtype=np.int32), None, None
        return labels_of(img.shape[:2]), np.full((1, 4, 2, 2), 3.0), [[2, 2, 7, 8]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCellSAM:
    module = FakeCellSAM()
    monkeypatch.setitem(sys.modules, "cellSAM", module)
    return module


@pytest.fixture
def item() -> Field:
    pixels = np.random.default_rng(0).random((3, 20, 30)).astype(np.float32) * 500
    return Field("field", pixels, ("dapi", "18s", "membrane"))


# --------------------------------------------------------------------------------------------------- what it is given
def test_channels_are_blank_nuclear_membrane(fake: FakeCellSAM, item: Field) -> None:
    CellSAM("dapi", membrane="membrane")(item)
    image = fake.calls[0]["img"]
    assert image.shape == (20, 30, 3)
    assert image.dtype == np.float32
    assert not image[..., 0].any()
    np.testing.assert_array_equal(image[..., 1], item.read(("dapi",))[0])
    np.testing.assert_array_equal(image[..., 2], item.read(("membrane",))[0])


def test_without_a_membrane_that_channel_is_blank_too(fake: FakeCellSAM, item: Field) -> None:
    teacher = CellSAM("18s")
    teacher(item)
    image = fake.calls[0]["img"]
    assert not image[..., [0, 2]].any()
    np.testing.assert_array_equal(image[..., 1], item.read(("18s",))[0])
    assert teacher.channels == ("18s",)


def test_settings_reach_the_package(fake: FakeCellSAM, item: Field) -> None:
    CellSAM("dapi", model="cellsam_extra", bbox_threshold=0.3)(item)
    assert fake.loaded == [("name", "cellsam_extra")]
    call = fake.calls[0]
    assert call["model"] is fake.net
    assert call["bbox_threshold"] == 0.3
    assert call["normalize"] is True
    assert call["device"] == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_local_file_is_read_instead(fake: FakeCellSAM, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    torch.save(fake.net.state_dict(), path)
    teacher = CellSAM("dapi", weights=path)
    assert fake.loaded == [("file", str(path))]
    assert teacher.name == "cellsam mine.pt"
    torch.save({"state_dict": fake.net.state_dict(), "epoch": 3}, path)
    assert CellSAM("dapi", weights=path).name == "cellsam mine.pt"


def test_the_second_copy_of_sam_may_be_left_out(fake: FakeCellSAM, tmp_path: Path) -> None:
    fake.net = nn.ModuleDict({"model": nn.Linear(3, 2), "model_cp": nn.Linear(3, 2)})
    path = tmp_path / "mine.pt"
    weights = fake.net.state_dict()
    torch.save({name: weights[name] for name in ("model.weight", "model.bias")}, path)
    assert CellSAM("dapi", weights=path).name == "cellsam mine.pt"
    torch.save({name: weights[name] for name in ("model.weight", "model.bias", "model_cp.bias")}, path)
    with pytest.raises(TeacherAccessError, match=r"lack 1 of the 4 parameters, such as 'model_cp.weight'"):
        CellSAM("dapi", weights=path)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"other": torch.zeros(2)}, "lack 2 of the 2 parameters, such as 'weight': they belong to another network"),
        ({"weight": torch.zeros(2, 3)}, "lack 1 of the 2 parameters, such as 'bias'"),
        (torch.zeros(3), "are damaged, or none .it holds a Tensor, not tensors by name"),
        ({"state_dict": torch.zeros(3)}, "are damaged, or none .it holds a Tensor"),
    ],
)
def test_weights_of_another_network_are_refused(
    fake: FakeCellSAM, tmp_path: Path, stored: object, message: str
) -> None:
    path = tmp_path / "other.pt"
    torch.save(stored, path)
    with pytest.raises(TeacherAccessError, match=f"other.pt' {message}"):
        CellSAM("dapi", weights=path)


def test_damaged_weights_are_explained(fake: FakeCellSAM, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save(fake.net.state_dict(), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no weights at all"):
        path.write_bytes(content)
        with pytest.raises(TeacherAccessError, match=r"cut.pt' are damaged, or none \(.+\).*users.deepcell.org"):
            CellSAM("dapi", weights=path)
    assert fake.loaded == []


@pytest.mark.parametrize("kind", [RuntimeError, EOFError, UnpicklingError])
def test_damaged_weights_of_the_package_are_explained(fake: FakeCellSAM, kind: type[Exception]) -> None:
    def cut(model: str) -> nn.Module:
        raise kind("PytorchStreamReader failed")

    fake.get_model = cut  # type: ignore[method-assign]
    message = r"'cellsam_general' are damaged \(PytorchStreamReader failed\): delete them.*kept in ~/.deepcell/models"
    with pytest.raises(TeacherAccessError, match=message):
        CellSAM("dapi")


# ------------------------------------------------------------------------------------------------------ what it gives
def test_labels_become_maps(fake: FakeCellSAM, item: Field) -> None:
    teacher = CellSAM("dapi")
    output = teacher(item)
    np.testing.assert_array_equal(output.maps, maps_of_labels(labels_of((20, 30))))
    assert output.features == {}
    features = teacher(item, features=True).features["embedding"]
    np.testing.assert_array_equal(features, np.full((4, 2, 2), 3.0))
    assert features.dtype == np.float32


def test_it_is_a_frozen_teacher_with_its_licence(fake: FakeCellSAM) -> None:
    teacher = CellSAM("dapi")
    assert isinstance(teacher, Teacher)
    assert "non-commercial" in teacher.licence
    assert not any(weight.requires_grad for weight in fake.net.parameters())
    assert not fake.net.training


def test_fingerprint_follows_weights_channels_and_threshold(fake: FakeCellSAM) -> None:
    first = CellSAM("dapi").fingerprint
    assert CellSAM("dapi").fingerprint == first
    others = {
        CellSAM("18s").fingerprint,
        CellSAM("dapi", membrane="18s").fingerprint,
        CellSAM("dapi", bbox_threshold=0.2).fingerprint,
    }
    fake.net = nn.Linear(3, 2)
    others.add(CellSAM("dapi").fingerprint)
    assert len(others | {first}) == 5


def test_no_cell_gives_zeros_and_no_features(fake: FakeCellSAM, item: Field) -> None:
    fake.cells = False
    teacher = CellSAM("dapi")
    maps = teacher(item).maps
    assert maps.shape == (2, 20, 30)
    assert not maps.any()
    with pytest.raises(ValueError, match="no cell in field 'field', and then gives no features"):
        teacher(item, features=True)


def test_no_cell_also_where_the_package_fails_of_it(fake: FakeCellSAM, item: Field) -> None:
    def fails(*args: Any, **values: Any) -> tuple:
        none: Any = None
        return none.ndim

    fake.segment_cellular_image = fails  # type: ignore[method-assign]
    assert not CellSAM("dapi")(item).maps.any()

    def broken(*args: Any, **values: Any) -> tuple:
        raise AttributeError("module 'torch' has no attribute 'moon'")

    fake.segment_cellular_image = broken  # type: ignore[method-assign]
    with pytest.raises(AttributeError, match="moon"):
        CellSAM("dapi")(item)


def test_its_warnings_of_doubtful_cells_are_not_passed_on(fake: FakeCellSAM, item: Field) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CellSAM("dapi")(item)


def test_labels_of_another_shape_are_refused(fake: FakeCellSAM, item: Field) -> None:
    fake.segment_cellular_image = lambda *args, **values: (np.zeros((3, 3)), np.ones(1), [])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"labels of the shape \(3, 3\) for field 'field' of \(20, 30\)"):
        CellSAM("dapi")(item)


# ------------------------------------------------------------------------------------------------------------- access
def test_a_missing_package_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cellSAM", None)
    message = r"needs the package cellSAM.*pip install git\+https://github.com/vanvalenlab/cellSAM.*" + TOKEN
    with pytest.raises(ImportError, match=message + ".*non-commercial"):
        CellSAM("dapi")


def test_a_missing_token_is_explained(fake: FakeCellSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)

    def refuse(model: str) -> nn.Module:
        raise ValueError(f"\n{TOKEN} not found.\nPlease set your access token")

    fake.get_model = refuse  # type: ignore[method-assign]
    message = rf"'cellsam_general' cannot be had \({TOKEN} not found.; {TOKEN} is not set\).*users.deepcell.org"
    with pytest.raises(TeacherAccessError, match=message + ".*non-commercial"):
        CellSAM("dapi")


def test_a_refused_token_is_not_shown(fake: FakeCellSAM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "geheim123")

    def refuse(model: str) -> nn.Module:
        raise ValueError("\n\nAPI token geheim123 is not valid.")

    fake.get_model = refuse  # type: ignore[method-assign]
    with pytest.raises(TeacherAccessError, match=rf"API token \*\*\* is not valid.; {TOKEN} is set") as caught:
        CellSAM("dapi")
    assert "geheim123" not in str(caught.value)


def test_no_network_is_explained(fake: FakeCellSAM) -> None:
    def refuse(model: str) -> nn.Module:
        raise ConnectionError("Name or service not known")

    fake.get_model = refuse  # type: ignore[method-assign]
    with pytest.raises(TeacherAccessError, match=r"Name or service not known.*kept in ~/.deepcell/models"):
        CellSAM("dapi")


def test_a_missing_file_is_named(fake: FakeCellSAM, tmp_path: Path) -> None:
    with pytest.raises(TeacherAccessError, match=r"nowhere.pt' do not exist"):
        CellSAM("dapi", weights=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_threshold_outside_0_to_1_is_refused(fake: FakeCellSAM, value: float) -> None:
    with pytest.raises(ValueError, match=f"bbox_threshold={value} must lie in 0 to 1"):
        CellSAM("dapi", bbox_threshold=value)
