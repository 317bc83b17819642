"""Outputs of teachers on disk: found by content, resumed, and never wrong in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from histoniche.seg._fields import Field
from histoniche.seg.teachers import CallableTeacher, Output, Prompts, teach
from histoniche.seg.teachers._cache import output_key, teach_hidden


class Counting:
    """A function that counts its calls and may fail at one of them."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        if self.calls == self.fails_at:
            raise RuntimeError("killed")
        self.calls += 1
        return pixels[0] / 3  # no float16


def teacher_of(function: Counting, fingerprint: str = "1", channels: tuple[str, ...] = ("dapi",)) -> CallableTeacher:
    return CallableTeacher(function, channels, name="mine", fingerprint=fingerprint)


def make_fields(n: int = 4) -> list[Field]:
    rng = np.random.default_rng(0)
    return [
        Field(
            f"field{number}", rng.random((2, 8 + number, 9)).astype(np.float32), ("dapi", "membrane"),
            rng.integers(0, 3, size=(8 + number, 9)),
        )
        for number in range(n)
    ]  # fmt: skip


class Asked:
    """A teacher that names its channels and prompts, as those of the SAM family do."""

    name, licence, fingerprint = "asked", "none", "asked 1"

    def __init__(self, kind: str, channels: tuple[str | None, ...] = (None, "dapi", None)) -> None:
        self.prompts, self.channels = Prompts(kind), channels  # type: ignore[arg-type]

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        return Output(np.zeros((2, *item.shape), dtype=np.float32))


class Undeclared:
    """A teacher that does not say what it reads."""

    name, licence, fingerprint = "undeclared", "none", "undeclared 1"

    def __call__(self, item: Field, *, features: bool = False) -> Output:
        return Output(np.zeros((2, *item.shape), dtype=np.float32))


# -------------------------------------------------------------------------------------------------------------- values
def test_what_does_not_lie_in_order_is_read_as_it_was(tmp_path: Path) -> None:
    class Turned:
        """Maps and hidden features whose memory runs another way, as that of channels-last tensors does."""

        name, licence, fingerprint, channels = "turned", "none", "turned 1", ("dapi",)

        def __call__(self, item: Field, *, features: bool = False) -> Output:
            maps = np.moveaxis(np.random.default_rng(0).random((*item.shape, 2), dtype=np.float32), -1, 0)
            hidden = np.random.default_rng(1).random((4, 4, 3), dtype=np.float32).transpose(2, 0, 1)
            return Output(maps, {"block0": hidden} if features else {})

        def hidden(self, item: Field) -> dict[str, np.ndarray]:
            return self(item, features=True).features

    fields, layers = make_fields(1), {"block0": (4, 4)}
    fresh = teach(fields, teacher=Turned())[0]
    for _ in range(2):
        np.testing.assert_array_equal(teach(fields, teacher=Turned(), cache=tmp_path)[0], fresh)
        (found,) = teach_hidden(fields, teacher=Turned(), layers=layers, cache=tmp_path)
        np.testing.assert_array_equal(found["maps"], fresh)
        np.testing.assert_allclose(found["block0"], Turned().hidden(fields[0])["block0"], atol=1e-3)


def test_once_a_field_in_order_and_the_same_from_disk(tmp_path: Path) -> None:
    fields, function = make_fields(), Counting()
    teacher = teacher_of(function)
    fresh = teach(fields, teacher=teacher, cache=tmp_path / "new" / "cache")
    assert function.calls == 4
    again = teach(fields, teacher=teacher, cache=tmp_path / "new" / "cache")
    assert function.calls == 4
    without = teach(fields, teacher=teacher)
    assert function.calls == 8
    for item, a, b, c in zip(fields, fresh, again, without, strict=True):
        assert a.dtype == b.dtype == c.dtype == np.float32
        assert a.shape == (2, *item.shape)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        exact = teacher(item).maps
        np.testing.assert_array_equal(a, exact.astype(np.float16).astype(np.float32))
        np.testing.assert_allclose(a, exact, atol=2e-4)


def test_order_follows_the_fields(tmp_path: Path) -> None:
    fields, teacher = make_fields(), teacher_of(Counting())
    forward = teach(fields, teacher=teacher, cache=tmp_path)
    backward = teach(fields[::-1], teacher=teacher, cache=tmp_path)
    for a, b in zip(forward, backward[::-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert teach([], teacher=teacher, cache=tmp_path) == []


def test_one_half_precision_file_a_field_that_says_whose_it_is(tmp_path: Path) -> None:
    fields, teacher = make_fields(), teacher_of(Counting())
    teach(fields, teacher=teacher, cache=tmp_path)
    names = {f"{output_key(item, teacher)}.safetensors" for item in fields}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(len(name.split(".")[0]) == 32 for name in names)
    with safe_open(tmp_path / f"{output_key(fields[2], teacher)}.safetensors", framework="numpy") as file:
        assert file.get_tensor("maps").dtype == np.float16
        notes = file.metadata()
    assert notes["teacher"] == "mine"
    assert notes["field"] == "field2"


# -------------------------------------------------------------------------------------------------------------- resume
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    fields = make_fields()
    with pytest.raises(RuntimeError, match="killed"):
        teach(fields, teacher=teacher_of(Counting(fails_at=2)), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    function = Counting()
    resumed = teach(fields, teacher=teacher_of(function), cache=tmp_path)
    assert function.calls == 2
    for a, b in zip(resumed, teach(fields, teacher=teacher_of(Counting())), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        teach(make_fields(1), teacher=teacher_of(Counting()), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------- keys
def test_names_do_not_matter_but_pixels_and_fingerprint_do() -> None:
    item, teacher = make_fields(1)[0], teacher_of(Counting())
    key = output_key(item, teacher)
    assert output_key(replace(item, name="other"), teacher) == key
    assert output_key(item.without_labels(), teacher) == key
    assert output_key(item, teacher_of(Counting(), fingerprint="2")) != key
    changed = item.image.copy()
    changed[0, 3, 3] = 1 - changed[0, 3, 3]
    assert output_key(replace(item, image=changed), teacher) != key
    unseen = item.image.copy()
    unseen[1] = 1 - unseen[1]
    assert output_key(replace(item, image=unseen), teacher) == key
    assert output_key(replace(item, limits=np.array([[0, 2], [0, 2]], dtype=np.float32)), teacher) != key


def test_the_shape_counts() -> None:
    pixels = np.random.default_rng(0).random((1, 6, 8)).astype(np.float32)
    limits = np.array([[0, 1]], dtype=np.float32)
    a, b = (Field("a", pixels.reshape(1, *shape), ("dapi",), limits=limits) for shape in ((6, 8), (8, 6)))
    teacher = teacher_of(Counting())
    assert a.read(("dapi",)).tobytes() == b.read(("dapi",)).tobytes()
    assert output_key(a, teacher) != output_key(b, teacher)


def test_labels_count_where_prompts_are_their_boxes() -> None:
    item = make_fields(1)[0]
    changed = replace(item, labels=np.roll(item.labels, 1, axis=0))
    assert output_key(item, Asked("boxes")) != output_key(changed, Asked("boxes"))
    assert output_key(item, Asked("grid")) == output_key(changed, Asked("grid"))
    assert output_key(item, Asked("grid")) == output_key(item.without_labels(), Asked("grid"))


def test_channels_without_a_name_are_skipped_and_order_counts() -> None:
    item = make_fields(1)[0]
    assert output_key(item, Asked("grid", (None, "dapi", None))) == output_key(item, Asked("grid", ("dapi",)))
    assert output_key(item, Asked("grid", ("dapi", "membrane"))) != output_key(
        item, Asked("grid", ("membrane", "dapi"))
    )


def test_of_a_teacher_that_does_not_say_what_it_reads_everything_counts() -> None:
    item, teacher = make_fields(1)[0], Undeclared()
    key = output_key(item, teacher)
    unseen = item.image.copy()
    unseen[1, 0, 0] = 1 - unseen[1, 0, 0]
    others = [
        replace(item, image=unseen),
        replace(item, labels=np.roll(item.labels, 1, axis=0)),
        replace(item, channels=("membrane", "dapi")),
        replace(item, um_per_px=0.5),
        replace(item, limits=np.array([[0, 1], [0, 3]], dtype=np.float32)),
    ]
    assert len({key, *(output_key(other, teacher) for other in others)}) == 6
    assert output_key(replace(item, name="other"), teacher) == key
    # A channel that it may never look at may be constant.
    empty = item.image.copy()
    empty[1] = 0
    assert output_key(replace(item, image=empty), teacher) != key


# --------------------------------------------------------------------------------------------------------------- damage
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "other shape", "other type", "other name"])
def test_a_damaged_file_is_named_and_not_replaced(tmp_path: Path, damage: str) -> None:
    item, function = make_fields(1)[0], Counting()
    teacher = teacher_of(function)
    (whole,) = teach([item], teacher=teacher, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    maps = np.zeros((2, *item.shape), dtype=np.float16)
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "other shape":
        save_file({"maps": maps[:, :-1]}, path)
    elif damage == "other type":
        save_file({"maps": maps.astype(np.float32)}, path)
    else:
        save_file({"other": maps}, path)
    left = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{path.name}' of field 'field0' is damaged .*: delete this file"):
        teach([item], teacher=teacher, cache=tmp_path)
    assert path.read_bytes() == left
    assert function.calls == 1
    path.unlink()
    np.testing.assert_array_equal(teach([item], teacher=teacher, cache=tmp_path)[0], whole)
    assert function.calls == 2


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file' is a file; a folder is needed"):
        teach(make_fields(1), teacher=teacher_of(Counting()), cache=tmp_path / "file")


def test_what_is_no_probability_is_not_kept(tmp_path: Path) -> None:
    class Wrong(Undeclared):
        def __call__(self, item: Field, *, features: bool = False) -> Output:
            return Output(np.full((2, *item.shape), 2, dtype=np.float32))

    with pytest.raises(ValueError, match="'undeclared' gave values outside 0 to 1"):
        teach(make_fields(1), teacher=Wrong(), cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_a_teacher_needs_are_asked_for_by_the_teacher(tmp_path: Path) -> None:
    class Boxes(Asked):
        def __call__(self, item: Field, *, features: bool = False) -> Output:
            self.prompts.boxes(item, item.read(("dapi",)))
            return super().__call__(item)

    with pytest.raises(ValueError, match=r"'field0' has no labels.*Prompts\('grid'\)"):
        teach([make_fields(1)[0].without_labels()], teacher=Boxes("boxes"), cache=tmp_path)
