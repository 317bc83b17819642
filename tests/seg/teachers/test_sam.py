"""Teachers of the SAM family, with networks that answer by hand: geometry, batches, colours, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from histoniche.seg._fields import Field
from histoniche.seg._targets import maps_of_labels
from histoniche.seg.teachers import PromptedTeacher, Prompts
from histoniche.seg.teachers._sam import digest, to_rgb

INPUT, LOW = 64, 16


class Painter(PromptedTeacher):
    """Answers a box with that box, and a point with a square around it; keeps what it was shown."""

    def __init__(self, channels=("dapi",), *, iou: float = 0.9, width: float = 8.0, **values) -> None:
        values = {"prompts": Prompts(), "input_px": INPUT, "gamma": 1.0, **values}
        super().__init__(nn.Linear(2, 2), channels, name="painter", licence="none", **values)
        self.seen: list[Tensor] = []
        self.iou, self.width = iou, width

    def encode(self, rgb: Tensor) -> Tensor:
        self.seen.append(rgb)
        return torch.ones(1, 3, 2, 2)

    def decode(self, embedding: Tensor, prompts: Tensor, *, boxes: bool) -> tuple[Tensor, Tensor]:
        if not boxes:
            prompts = torch.cat([prompts - self.width / 2, prompts + self.width / 2], 1)
        low = prompts * LOW / INPUT
        axis = torch.arange(LOW) + 0.5
        x = (axis > low[:, [0]]) & (axis < low[:, [2]])
        y = (axis > low[:, [1]]) & (axis < low[:, [3]])
        masks = torch.where(y[:, :, None] & x[:, None, :], 20.0, -20.0)[:, None]
        iou = torch.full((len(prompts), 1), self.iou)
        # A second, worse answer that fills the image: the better one is to be taken.
        return torch.cat([torch.full_like(masks, 20.0), masks], 1), torch.cat([iou - 0.5, iou], 1)


def field_of(labels: np.ndarray) -> Field:
    pixels = np.random.default_rng(0).random((2, *labels.shape)).astype(np.float32)
    return Field("field", pixels, ("dapi", "membrane"), labels)


def squares(shape: tuple[int, int]) -> np.ndarray:
    """Three objects, on whole pixels of the low-resolution masks at every tested scale."""
    labels = np.zeros(shape, dtype=np.int32)
    labels[8:24, 8:32], labels[24:32, 40:56], labels[0:8, 56:64] = 1, 2, 3
    return labels


# ---------------------------------------------------------------------------------------------------------- colours
def test_channels_become_colours() -> None:
    a, b, c = pixels = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(to_rgb(pixels[:1], ["a"]), [a, a, a])
    np.testing.assert_allclose(to_rgb(pixels[:2], ["a", "b"]), [a, b, (a + b) / 2], rtol=1e-6)
    np.testing.assert_array_equal(to_rgb(pixels, ["a", "b", "c"]), [a, b, c])
    np.testing.assert_array_equal(to_rgb(pixels[:2], [None, "a", "b"]), [np.zeros_like(a), a, b])
    np.testing.assert_array_equal(to_rgb(pixels[:1], ["a", None, None]), [a, np.zeros_like(a), np.zeros_like(a)])


@pytest.mark.parametrize("channels", [[], [None], ["a", "b", "c", "d"]])
def test_channels_that_are_no_colours_are_refused(channels: list) -> None:
    with pytest.raises(ValueError, match="one to three are needed"):
        Painter(channels)


# --------------------------------------------------------------------------------------------------------- geometry
def assert_found(foreground: np.ndarray, labels: np.ndarray, margin: int = 1) -> None:
    """The same but for corners, which interpolation rounds: within ``margin`` px of an edge, and few of them."""
    found, truth = foreground > 0.5, labels > 0
    square = np.ones((2 * margin + 1, 2 * margin + 1), dtype=bool)
    assert found[ndimage.binary_erosion(truth, square, border_value=1)].all()
    assert not found[~ndimage.binary_dilation(truth, square)].any()
    assert np.sum(found & truth) / np.sum(found | truth) > 0.97


@pytest.mark.parametrize("shape", [(64, 64), (32, 64), (40, 64)])
def test_boxes_come_back_where_they_were(shape: tuple[int, int]) -> None:
    labels = squares(shape)
    maps = Painter()(field_of(labels)).maps
    assert maps.shape == (2, *shape)
    assert_found(maps[0], labels)


@pytest.mark.parametrize("factor", [2, 4])
def test_boxes_come_back_from_other_scales(factor: int) -> None:
    small = squares((32, 64))
    labels = np.kron(small, np.ones((factor, factor), dtype=np.int32))
    assert_found(Painter()(field_of(labels)).maps[0], labels, margin=factor)


def test_a_tall_field_is_no_wide_one() -> None:
    labels = squares((32, 64)).T.copy()
    maps = Painter()(field_of(labels)).maps
    assert_found(maps[0], labels)
    # The boundary at the size of the field runs along every object.
    assert maps[1][maps_of_labels(labels)[1] > 0].mean() > 0.5


def test_the_network_sees_a_scaled_image_and_zeros_where_it_is_padded() -> None:
    teacher, item = Painter(("dapi", "membrane"), gamma=0.5), field_of(squares((32, 64)))
    teacher(item)
    rgb = teacher.seen[0]
    assert rgb.shape == (1, 3, INPUT, INPUT)
    dapi, membrane = item.read(("dapi", "membrane"))
    np.testing.assert_allclose(rgb[0, :, :32], np.sqrt([dapi, membrane, (dapi + membrane) / 2]), atol=1e-6)
    assert not rgb[0, :, 32:].any()


def test_padding_comes_after_normalising() -> None:
    class Shifted(Painter):
        def normalise(self, rgb: Tensor) -> Tensor:
            return rgb - 5

    teacher, item = Shifted(), field_of(squares((32, 64)))
    teacher(item)
    np.testing.assert_allclose(teacher.seen[0][0, 0, :32], item.read(("dapi",))[0] - 5, atol=1e-6)
    assert not teacher.seen[0][0, :, 32:].any()


# ---------------------------------------------------------------------------------------------------------- prompts
def test_grid_keeps_one_mask_an_object() -> None:
    item = field_of(np.zeros((64, 64), dtype=np.int32))
    lone = Painter(prompts=Prompts("grid", spacing=64), width=16)(item).maps
    expected = np.zeros((64, 64), dtype=np.int32)
    expected[24:40, 24:40] = 1
    assert_found(lone[0] / 0.9, expected)
    assert lone[0].max() == pytest.approx(0.9, abs=1e-4)  # sigmoid(logit) x predicted IoU


def test_a_grid_drops_masks_that_overlap() -> None:
    """Points 8 px apart, squares of 16 px: each overlaps its neighbours by a third (at the edge 0.4)."""
    item = field_of(np.zeros((64, 64), dtype=np.int32))
    kept = []

    class Counter(Prompts):
        def keep(self, logits: Tensor, iou: Tensor) -> Tensor:
            rows = super().keep(logits, iou)
            kept.append((len(logits), len(rows)))
            return rows

    for overlap in (0.45, 0.3):
        Painter(prompts=Counter("grid", spacing=8, most_overlap=overlap), width=16)(item)
    assert kept[0] == (64, 64)
    assert kept[1][0] == 64
    assert 9 <= kept[1][1] <= 32


def test_a_grid_that_finds_nothing_gives_zeros() -> None:
    item = field_of(np.zeros((48, 64), dtype=np.int32))
    maps = Painter(prompts=Prompts("grid"), iou=0.3)(item).maps
    assert maps.shape == (2, 48, 64)
    assert not maps.any()


def test_a_field_without_objects_gives_zeros() -> None:
    assert not Painter()(field_of(np.zeros((48, 64), dtype=np.int32))).maps.any()


def test_a_detector_asks_as_labels_do() -> None:
    labels = squares((32, 64))
    boxes = np.array([[8, 8, 32, 24], [40, 24, 56, 32], [56, 0, 64, 8]])
    asked = Painter(prompts=Prompts("detector", detector=lambda pixels: boxes, detector_version="1"))
    np.testing.assert_array_equal(asked(field_of(labels).without_labels()).maps, Painter()(field_of(labels)).maps)


@pytest.mark.parametrize("kind", ["boxes", "grid"])
def test_batches_change_nothing(kind: str) -> None:
    item = field_of(squares((40, 64)))
    prompts = Prompts(kind, spacing=6)  # type: ignore[arg-type]
    whole = Painter(prompts=prompts, batch_size=1000)(item).maps
    assert whole.any()
    for size in (1, 2, 7):
        np.testing.assert_array_equal(Painter(prompts=prompts, batch_size=size)(item).maps, whole)


def test_missing_labels_are_an_error() -> None:
    with pytest.raises(ValueError, match="'field' has no labels"):
        Painter()(field_of(squares((32, 64))).without_labels())


# ---------------------------------------------------------------------------------------------- features and weights
def test_features_on_request_only() -> None:
    item = field_of(squares((32, 64)))
    assert Painter()(item).features == {}
    embedding = Painter()(item, features=True).features["embedding"]
    np.testing.assert_array_equal(embedding, np.ones((3, 1, 2)))  # the part that the image fills
    assert embedding.dtype == np.float32


def test_the_network_is_frozen() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    teacher = Painter()
    PromptedTeacher.__init__(teacher, net, ("dapi",), prompts=Prompts(), name="n", licence="l", input_px=INPUT)
    assert not net.training
    assert not any(weight.requires_grad for weight in net.parameters())


def test_fingerprint_follows_all_that_decides() -> None:
    state = nn.Linear(2, 2).state_dict()

    def print_of(**values) -> str:
        teacher = Painter(**values)
        teacher.module.load_state_dict(state)
        teacher._weights = digest(teacher.module)
        return teacher.fingerprint

    same = print_of()
    assert same == print_of() == print_of(batch_size=3)
    others = {print_of(gamma=0.7), print_of(channels=("dapi", None, None)), print_of(prompts=Prompts("grid"))}
    assert len(others | {same}) == 4


def test_digest_follows_every_weight() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    before = digest(net)
    assert before == digest(net)
    assert len(before) == 16
    net[1].running_mean[2] += 1e-3  # a buffer
    assert digest(net) != before
