"""The contract of teachers, and functions as teachers."""

from __future__ import annotations

import numpy as np
import pytest

from histoniche.seg._fields import Field
from histoniche.seg.teachers import CallableTeacher, Output, Teacher
from histoniche.seg.teachers._protocol import check_output


def make_field(shape: tuple[int, int] = (9, 11)) -> Field:
    pixels = np.random.default_rng(0).random((2, *shape)).astype(np.float32)
    return Field("field", pixels, ("dapi", "membrane"))


def first(pixels: np.ndarray) -> np.ndarray:
    return pixels[0]


def teacher_of(function, channels: tuple[str, ...] = ("dapi",)) -> CallableTeacher:
    return CallableTeacher(function, channels, name="mine", fingerprint="1")


def test_the_function_sees_the_named_channels_in_order() -> None:
    item, seen = make_field(), []

    def record(pixels: np.ndarray) -> np.ndarray:
        seen.append(pixels)
        return pixels * 0.5

    output = teacher_of(record, ("membrane", "dapi"))(item)
    np.testing.assert_array_equal(seen[0], item.read(("membrane", "dapi")))
    np.testing.assert_array_equal(output.maps, seen[0] * 0.5)
    assert output.maps.dtype == np.float32
    assert output.features == {}


def test_one_map_gets_the_boundary_of_its_foreground() -> None:
    def square(pixels: np.ndarray) -> np.ndarray:
        mask = np.zeros(pixels.shape[1:])
        mask[3:6, 3:6] = 0.8
        return mask

    maps = teacher_of(square)(make_field()).maps
    expected = np.zeros((9, 11))
    expected[2:7, 2:7] = 0.8
    expected[4, 4] = 0
    np.testing.assert_allclose(maps[1], expected, rtol=1e-6)
    assert maps[0, 4, 4] == np.float32(0.8)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p: np.zeros((3, 3)), r"maps of the shape \(2, 3, 3\) for field 'field'; \(2, 9, 11\) is needed"),
        (lambda p: np.zeros((3, *p.shape[1:])), r"shape \(3, 9, 11\)"),
        (lambda p: p[0] * 2, "outside 0 to 1 for field 'field'"),
        (lambda p: p[0] - 1, "outside 0 to 1"),
        (lambda p: np.full(p.shape[1:], np.nan), "outside 0 to 1"),
    ],
)
def test_what_is_no_probability_is_refused(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_of(function)(make_field())


def test_a_function_has_no_features() -> None:
    with pytest.raises(ValueError, match="'mine' is a function, which has no hidden features"):
        teacher_of(first)(make_field(), features=True)


def test_an_unknown_channel_is_named() -> None:
    with pytest.raises(KeyError, match="no channel 'actin'"):
        teacher_of(first, ("actin",))(make_field())


def test_fingerprint_names_what_decides_the_output() -> None:
    prints = {
        CallableTeacher(first, channels, name=name, fingerprint=given).fingerprint
        for channels in (("a",), ("a", "b"), ("b", "a"))
        for name in ("x", "y")
        for given in ("1", "2")
    }
    assert len(prints) == 12
    assert teacher_of(first).fingerprint == teacher_of(first).fingerprint


def test_functions_meet_the_protocol_and_other_things_do_not() -> None:
    assert isinstance(teacher_of(first), Teacher)
    assert not isinstance(first, Teacher)


def test_check_output_keeps_features() -> None:
    item = make_field()
    features = {"embedding": np.ones((4, 2, 2))}
    checked = check_output(Output(np.zeros((2, 9, 11), dtype=np.float64), features), item, "mine")
    assert checked.features is features
    assert checked.maps.dtype == np.float32
