"""Distillation and training on labels: what is learnt, what decides the result, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histoniche.seg import Field, Segmenter, _distill, distill, finetune, maps_of_labels, metrics
from histoniche.seg.teachers import CallableTeacher, Output

SMALL: dict[str, Any] = {
    "channel": "DAPI", "student": "mobilenetv3_small_050", "pretrained": False, "batch_size": 4, "patch_px": 64,
    "lr": 1e-2,
}  # fmt: skip
LEARNER: dict[str, Any] = {**SMALL, "student": "resnet10t"}
"""Learns in 40 steps, whatever the threads and the seed."""


class Knowing:
    """A teacher that knows the labels."""

    name, licence, fingerprint = "knowing", "CC0", "1"

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        return Output(maps_of_labels(item.read_labels()))


def _same(first: Segmenter, second: Segmenter) -> bool:
    return first.digest == second.digest and first.history == second.history


def _dice(model: Segmenter, fields: list[Field]) -> float:
    return float(np.mean([metrics.dice(model.predict(item), item.read_labels()) for item in fields]))


def test_a_student_learns_from_a_teacher_without_labels(fields: list[Field]) -> None:
    model = distill(fields[:4], teacher=Knowing(), n_steps=40, **LEARNER)
    assert model.config.teacher == {"name": "knowing", "licence": "CC0"}
    assert set(model.history) == {"loss", "probability", "boundary", "s probability", "s boundary"}
    assert model.history["probability"][-1] < 0.3 * model.history["probability"][0]
    assert model.history["s probability"][-1] < -0.5  # the weights are learnt
    assert _dice(model, fields[4:]) > 0.8


def test_labels_alone(fields: list[Field]) -> None:
    model = finetune(fields[:4], n_steps=40, **LEARNER)
    assert model.config.teacher == {}
    assert _dice(model, fields[4:]) > 0.8


def test_same_seed_same_student_and_no_global_state(fields: list[Field]) -> None:
    state = torch.get_rng_state()
    one, two, other = (
        distill(fields[:2], teacher=Knowing(), labelled=fields[2:4], n_steps=4, seed=seed, **SMALL)
        for seed in (3, 3, 4)
    )
    assert _same(one, two)
    assert one.digest != other.digest
    assert torch.equal(torch.get_rng_state(), state)


def test_terms_can_be_switched(fields: list[Field]) -> None:
    model = distill(
        fields[:2], teacher=Knowing(), labelled=fields[2:3], terms=("supervised", "probability"), uncertainty=False,
        n_steps=2, **SMALL,
    )  # fmt: skip
    assert set(model.history) == {"loss", "probability", "supervised"}
    np.testing.assert_allclose(
        model.history["loss"], np.add(model.history["probability"], model.history["supervised"]), rtol=1e-5
    )


@pytest.mark.parametrize("matching", ["kl", "kl_dice"])
def test_maps_can_be_matched_otherwise(fields: list[Field], tmp_path: Path, matching: str) -> None:
    options = {"teacher": Knowing(), "checkpoint": tmp_path / "state.pt", "checkpoint_every": 2, **LEARNER}
    model = distill(fields[:4], matching=matching, n_steps=40, **options)
    assert model.config.training["matching"] == matching
    assert model.history["probability"][-1] < 0.5 * model.history["probability"][0]
    assert _dice(model, fields[4:]) > 0.8
    with pytest.raises(ValueError, match="belongs to another training"):
        distill(fields[:4], matching="mse", n_steps=40, **options)


def test_unknown_matching_is_told_before_the_teacher_is_asked(fields: list[Field]) -> None:
    class Asked(Knowing):
        def __call__(self, item: Field, *, features: bool = False) -> Output:
            raise AssertionError

    with pytest.raises(ValueError, match="matching='l1': choose one of"):
        distill(fields[:2], teacher=Asked(), matching="l1", n_steps=1, **SMALL)  # type: ignore[arg-type]


def test_hard_pseudo_labels(fields: list[Field]) -> None:
    half = CallableTeacher(lambda pixels: np.full(pixels.shape[1:], 0.4), ["DAPI"], name="half", fingerprint="1")
    soft = distill(fields[:2], teacher=half, terms=("probability",), n_steps=1, **SMALL)
    hard = distill(fields[:2], teacher=half, terms=("probability",), hard=True, n_steps=1, **SMALL)
    assert soft.config.training["hard"] is False
    assert soft.history["probability"] != hard.history["probability"]


def test_interrupted_distillation_goes_on_bit_for_bit(
    fields: list[Field], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"labelled": fields[3:4], "validation": fields[4:5], "patience": 99}
    arguments = {"teacher": Knowing(), **shown, "n_steps": 12, **SMALL}
    whole = distill(fields[:3], **arguments)
    path = tmp_path / "state.pt"
    from histoniche.seg import _fit

    original, calls = _fit.training_patch, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4 * 9:
            msg = "killed"
            raise RuntimeError(msg)
        return original(*args)

    monkeypatch.setattr(_fit, "training_patch", failing)
    with pytest.raises(RuntimeError, match="killed"):
        distill(fields[:3], checkpoint=path, checkpoint_every=3, **arguments)
    assert path.exists()
    monkeypatch.setattr(_fit, "training_patch", original)
    resumed = distill(fields[:3], checkpoint=path, checkpoint_every=3, **arguments)
    assert _same(whole, resumed)
    path.unlink()  # it stays until the student is safe
    calls.clear()
    monkeypatch.setattr(_fit, "training_patch", failing)
    with pytest.raises(RuntimeError, match="killed"):
        distill(fields[:3], checkpoint=path, checkpoint_every=3, **arguments)
    monkeypatch.setattr(_fit, "training_patch", original)
    with pytest.raises(ValueError, match="belongs to another training"):
        distill(fields[:3], checkpoint=path, checkpoint_every=3, **{**arguments, "validation": fields[5:6]})


def test_another_distillations_checkpoint_is_refused(fields: list[Field], tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    from histoniche.models._checkpoint import Checkpoint

    Checkpoint(path, "other").save(1, torch.nn.Linear(1, 1), {})
    with pytest.raises(ValueError, match="belongs to another training"):
        finetune(fields[:1], checkpoint=path, n_steps=2, **SMALL)


def test_the_threshold_is_chosen_on_labels(fields: list[Field], monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, validation = fields[2:4], fields[4:]
    judged: list[int] = []

    def choose(model: Segmenter, given: list[Field]) -> float:
        assert isinstance(model, Segmenter)
        judged.append(len(given))
        return 0.35

    monkeypatch.setattr(_distill, "best_threshold", choose)
    model = distill(fields[:2], teacher=Knowing(), labelled=labelled[:1], n_steps=2, **SMALL)
    assert (model.config.threshold, judged) == (0.35, [1])
    finetune(labelled, validation=validation, n_steps=2, **SMALL)
    assert judged == [1, len(validation)]
    # Nothing to choose on; and a student's own training fields say nothing, nor does the threshold of its beginning.
    assert distill(fields[:2], teacher=Knowing(), n_steps=2, **SMALL).config.threshold == 0.5
    assert finetune(labelled, n_steps=2, **{**SMALL, "student": model}).config.threshold == 0.5
    assert len(judged) == 2


def test_early_stopping_returns_the_best_step(fields: list[Field]) -> None:
    wrong = replace(fields[5], labels=(fields[5].read_labels() == 0).astype(np.int32))
    model = finetune(fields[:2], validation=[wrong], patience=2, n_steps=60, **LEARNER)
    # The validation labels are turned upside down: the better the student, the worse it looks, so it stops soon.
    assert len(model.history["loss"]) < 60
    looks = model.history["validation"]
    assert len(looks) == len(model.history["loss"]) // 3  # 5 % of 60 steps
    assert len(looks) - 1 - int(np.argmin(looks)) == 2  # the patience


def test_a_student_can_be_trained_on_and_stays_as_it_was(fields: list[Field]) -> None:
    first = finetune(fields[:2], n_steps=2, **SMALL)
    before = first.digest
    options = {**SMALL, "student": first}
    second = finetune(fields[2:4], n_steps=2, **options)
    assert first.digest == before != second.digest
    with pytest.raises(ValueError, match=r"channel=\['membrane'\], but the student was trained on \['DAPI'\]"):
        finetune(fields[:2], n_steps=2, **{**options, "channel": "membrane"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"channel": "GFP"}, KeyError, r"has no channel 'GFP'; it has \['DAPI', 'membrane'\]"),
        ({"channel": None}, ValueError, "name the student's with channel="),
        ({"patch_px": 50}, ValueError, "patch_px=50 must be a multiple of 32"),
        ({"patch_px": 128}, ValueError, "96 x 96 px, smaller than a patch"),
        ({"n_steps": 0}, ValueError, "n_steps=0 at least 1"),
        ({"batch_size": 1}, ValueError, "batch_size=1 at least 2"),
        ({"student": "no_such_net"}, ValueError, "encoder='no_such_net' is unknown"),
    ],
)
def test_bad_settings(fields: list[Field], change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        finetune(fields[:2], **{"n_steps": 1, **SMALL, **change})


def test_bad_fields(fields: list[Field]) -> None:
    good, options = fields[0], {"n_steps": 1, **SMALL}
    for labels, which in ((np.zeros((96, 96), np.int32), "no"), (np.ones((96, 96), np.int32), "all")):
        with pytest.raises(ValueError, match=rf"'nuclei0': its labels have one class only \({which} foreground\)"):
            finetune([replace(good, labels=labels)], **options)
    with pytest.raises(ValueError, match="'nuclei0' has no labels"):
        finetune([good.without_labels()], **options)
    with pytest.raises(ValueError, match="was given no fields"):
        finetune([], **options)
    with pytest.raises(ValueError, match="nothing to segment"):
        distill([], teacher=Knowing(), **options)
    with pytest.raises(
        ValueError, match=r"field 'coarse' has 1 um/px, the student was trained at 0.5: 2.00 times apart"
    ):
        finetune([good, replace(fields[1], um_per_px=1.0, name="coarse")], **options)
    flat = replace(good, image=np.full_like(good.image, 255))
    with pytest.raises(ValueError, match=r"channel 'DAPI' is constant .*empty or saturated"):
        finetune([flat], **options)


def test_a_student_sees_several_channels_in_order(fields: list[Field]) -> None:
    options = {**SMALL, "channel": ["membrane", "DAPI"]}
    model = finetune(fields[:2], n_steps=2, **options)
    assert model.config.channels == ["membrane", "DAPI"]
    maps = model.predict_field(fields[3])
    np.testing.assert_array_equal(maps, model.predict_maps(fields[3].read(["membrane", "DAPI"])[None])[0])
    swapped = model.predict_maps(fields[3].read(["DAPI", "membrane"])[None])[0]
    assert not np.allclose(maps, swapped)
    with pytest.raises(ValueError, match="several different ones"):
        finetune(fields[:2], n_steps=2, **{**SMALL, "channel": ["DAPI", "DAPI"]})


def test_labels_that_no_term_learns_take_no_place_in_a_batch(fields: list[Field]) -> None:
    unseen = {"terms": ("probability", "boundary"), "n_steps": 3, **SMALL}
    alone = distill(fields[:2], teacher=Knowing(), **unseen)
    judged = distill(fields[:2], teacher=Knowing(), labelled=fields[2:4], **unseen)
    for name, tensor in alone.module.state_dict().items():
        assert torch.equal(tensor, judged.module.state_dict()[name]), name


def test_a_student_is_trained_on_and_measured_as_its_configuration_says(fields: list[Field]) -> None:
    model = finetune(fields[:2], n_steps=2, **SMALL)
    again = distill(fields[:2], teacher=Knowing(), n_steps=2, **{**SMALL, "student": model})
    assert again.config.training["supervised steps"] == again.config.training["steps"] == 2
    item = fields[4]
    low, high = np.percentile(item.image[0], (0, 50))
    limits = np.tile([low, high], (len(item.channels), 1)).astype(np.float32)
    expected = model.predict_field(replace(item, limits=limits))
    model.config.stretch = [0, 50]
    np.testing.assert_allclose(model.predict_field(item), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"percentiles \[0, 50\], training those between \[1.0, 99.8\]"):
        finetune(fields[:2], n_steps=2, **{**SMALL, "student": model})


def test_what_is_no_field_no_teacher_no_term(fields: list[Field]) -> None:
    for given, message in (
        (fields[0], r"fields is a single field: pass a list of them, \[nuclei0\]"), (["a"], "must be a list of hn.seg.Field, and holds str"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=message):
            distill(given, teacher=Knowing(), n_steps=1, **SMALL)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=message):
            finetune(given, n_steps=1, **SMALL)  # type: ignore[arg-type]
    for teacher in (None, "vit_b", lambda _: None):
        with pytest.raises(TypeError, match=r"is no teacher: pass one of hn\.seg\.teachers"):
            distill(fields[:1], teacher=teacher, n_steps=1, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"terms=\['supervised'\] learn from labelled fields alone"):
        distill(fields[:1], teacher=Knowing(), terms="supervised", n_steps=1, **SMALL)
    with pytest.raises(TypeError, match="A Segmenter, or the folder of one, is needed, not Linear"):
        Segmenter.load(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"encoder 'mixer_b16_224' gives no maps that a decoder could read"):
        finetune(fields[:1], n_steps=1, **{**SMALL, "student": "mixer_b16_224"})
