"""Views of fields, and what a student's hidden layers are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from histoniche._random import isolated_rng
from histoniche.seg import Field, distill, maps_of_labels
from histoniche.seg._alignment import align, views
from histoniche.seg._fit import Stacks
from histoniche.seg._segmenter import Segmenter, SegmenterConfig
from histoniche.seg.teachers import Output

SMALL: dict[str, Any] = {"channel": "DAPI", "pretrained": False, "batch_size": 4, "patch_px": 64}


class Hidden:
    """A teacher whose hidden features are fixed projections of pixels, averaged over cells of 4 px."""

    name, licence, fingerprint, channels = "hidden", "CC0", "1", ("DAPI", "membrane")
    asked_for_maps = 0

    def __init__(self) -> None:
        with isolated_rng(0):
            self.layers = [nn.Conv2d(2, 5 + k, 4, stride=4) for k in range(4)]

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    @torch.inference_mode()
    def hidden(self, item: Field) -> dict[str, np.ndarray]:
        pixels = torch.from_numpy(item.read(self.channels))[None]
        return {f"block{k}": layer(pixels)[0].numpy() for k, layer in enumerate(self.layers)}

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        self.asked_for_maps += 1
        foreground = item.read(["DAPI"])[0]
        return Output(np.stack([foreground, 1 - foreground]), self.hidden(item) if features else {})


def vit(n_channels: int = 1) -> Segmenter:
    return Segmenter(SegmenterConfig("vit-tiny", ["DAPI", "membrane"][:n_channels]), pretrained=False)


def asked(fields: list[Field], teacher: Any, **options: Any) -> Any:
    settings = {"layers": None, "maps": True, "n_views": 2, "patch_px": 64, "cache": None, "seed": 0, **options}
    return align(settings.pop("student", vit()), fields, teacher, **settings)


# ------------------------------------------------------------------------------------------------------------ views
def test_views_are_drawn_by_seed_field_and_number(fields: list[Field]) -> None:
    first = views(fields[:2], channels=["membrane", "DAPI"], n_views=3, patch_px=32, seed=0)
    again = views(fields[:1], channels=["membrane", "DAPI"], n_views=2, patch_px=32, seed=0)
    other = views(fields[:1], channels=["membrane", "DAPI"], n_views=1, patch_px=32, seed=1)
    assert [item.name for item in first][:4] == ["nuclei0:0", "nuclei0:1", "nuclei0:2", "nuclei1:0"]
    assert first[0].channels == ("membrane", "DAPI")
    for one, same in zip(first, again, strict=False):
        np.testing.assert_array_equal(one.image, same.image)
    assert not np.array_equal(first[0].image, other[0].image)
    np.testing.assert_array_equal(first[0].read(["DAPI"])[0], first[0].image[1])  # not stretched again
    assert 0 <= min(item.image.min() for item in first) < max(item.image.max() for item in first) <= 1


def test_hidden_features_turn_with_the_pixels(fields: list[Field]) -> None:
    # A "feature" that is the pixel itself, at the same grid, must stay the pixel, whatever the augmentation, light apart.
    stack = np.concatenate([fields[0].read(["DAPI"]), maps_of_labels(fields[0].read_labels())])
    stacks = Stacks(["DAPI"], fields[:2], [stack[1:]], [[stack[1:]]])
    seen = set()
    for seed in range(40):
        patch, hidden = stacks.patch(0, 96, np.random.default_rng(seed))
        np.testing.assert_array_equal(patch[1:], hidden)
        seen.add(hidden.tobytes())
    assert len(seen) == 8  # quarter turns, mirrored or not
    patch, nothing = stacks.patch(1, 64, np.random.default_rng(0))  # a field with labels
    assert patch.shape == (3, 64, 64)
    assert not nothing.any()


# -------------------------------------------------------------------------------------------------------- alignment
def test_layers_are_paired_evenly_and_averaged_to_the_students_grid(fields: list[Field]) -> None:
    teacher = Hidden()
    cut, maps, hidden, alignment = asked(fields[:1], teacher)
    assert alignment.layers == [0, 1, 2, 3]
    assert [layer.shape for layer in hidden[0]] == [(5, 4, 4), (6, 4, 4), (7, 4, 4), (8, 4, 4)]
    assert cut[0].channels == ("DAPI", "membrane")
    whole = teacher.hidden(cut[1])["block2"]
    expected = np.array(
        [[whole[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean((1, 2)) for x in range(4)] for y in range(4)]
    )
    np.testing.assert_allclose(hidden[1][2], expected.transpose(2, 0, 1), atol=2e-3)
    np.testing.assert_allclose(maps[1][0], cut[1].image[0], atol=1e-3)


def test_of_a_unet_the_coarsest_layers_are_compared(fields: list[Field]) -> None:
    student = Segmenter(SegmenterConfig("resnet10t", ["DAPI"]), pretrained=False)
    _, _, hidden, alignment = asked(fields[:1], Hidden(), student=student, maps=False)
    assert alignment.layers == [0, 1, 2]
    assert [layer.shape for layer in hidden[0]] == [(5, 8, 8), (7, 4, 4), (8, 2, 2)]


def test_layers_can_be_chosen(fields: list[Field]) -> None:
    _, _, hidden, alignment = asked(fields[:1], Hidden(), layers={3: "block0"})
    assert alignment.layers == [3]
    assert [layer.shape for layer in hidden[0]] == [(5, 4, 4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({4: "block0"}, "the student has the layers 0 to 3"),
        ({}, "the student has the layers 0 to 3"),
        ({0: "block1", 1: "block1"}, "each for another of the teacher's"),
        ({0: "block9"}, r"no hidden features 'block9'; it has \['block0'"),
    ],
)
def test_layers_that_do_not_exist(fields: list[Field], layers: dict[int, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        asked(fields[:1], Hidden(), layers=layers)


def test_grids_that_do_not_match(fields: list[Field]) -> None:
    class Coarse(Hidden):
        def hidden(self, item: Field) -> dict[str, np.ndarray]:
            return {name: maps[:, :6, :6] for name, maps in super().hidden(item).items()}

    with pytest.raises(ValueError, match=r"grid 4 x 4 does not match that of 'block0' of teacher 'hidden', 6 x 6"):
        asked(fields[:1], Coarse())


def test_a_teacher_without_hidden_features(fields: list[Field]) -> None:
    class Plain:
        name, licence, fingerprint = "plain", "CC0", "1"

    with pytest.raises(ValueError, match="'plain' has 0 blocks with hidden features for 4 layers"):
        asked(fields[:1], Plain())
    with pytest.raises(ValueError, match="'plain' has no hidden features to align with"):
        asked(fields[:1], Plain(), layers={0: "block0"})


# ---------------------------------------------------------------------------------------------------- distillation
def test_task_agnostic_distillation_asks_for_no_maps_and_comes_closer(fields: list[Field]) -> None:
    teacher = Hidden()
    model = distill(fields[:2], teacher=teacher, student="vit-tiny", terms=("hidden",), n_steps=20, lr=2e-3, **SMALL)
    assert teacher.asked_for_maps == 0
    assert set(model.history) == {"loss", "hidden", "s hidden"}
    assert np.mean(model.history["hidden"][-3:]) < 0.6 * model.history["hidden"][0]
    start = Segmenter(model.config, pretrained=False, seed=0).module.state_dict()
    moved = {name for name, tensor in model.module.named_parameters() if not torch.equal(tensor, start[name])}
    assert any(name.startswith("encoder") for name in moved)
    assert not any(name.startswith("segmentation_head") for name in moved)  # nothing taught the decoder


def test_same_seed_same_student_with_labels_beside(fields: list[Field]) -> None:
    options = {**SMALL, "student": "vit-tiny", "n_steps": 3, "terms": ("probability", "hidden", "supervised")}
    one, two = (distill(fields[:2], teacher=Hidden(), labelled=fields[2:3], **options) for _ in range(2))
    assert one.digest == two.digest
    assert one.history == two.history
    assert {"probability", "hidden", "supervised", "s hidden"} < set(one.history)
    assert one.config.training["fields"] == 2


def test_the_state_of_other_layers_is_refused(fields: list[Field], tmp_path: Path) -> None:
    options = {**SMALL, "student": "vit-tiny", "n_steps": 2, "terms": ("hidden",), "checkpoint": tmp_path / "state"}
    distill(fields[:2], teacher=Hidden(), layers={0: "block3"}, checkpoint_every=1, **options)
    with pytest.raises(ValueError, match="belongs to another training"):
        distill(fields[:2], teacher=Hidden(), layers={3: "block3"}, checkpoint_every=1, **options)
