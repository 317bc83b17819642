"""Which fields are the same, and which show the same image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from histoniche.seg import Field
from histoniche.seg._identity import check_disjoint, content_hashes, fields_in, fingerprints


def test_fingerprints_follow_all_but_the_name(fields: list[Field]) -> None:
    item = fields[0]
    (same,) = fingerprints([item])
    assert fingerprints([replace(item, name="new")]) == [same]
    others = [
        replace(item, image=np.flip(item.image, 1)), replace(item, labels=np.roll(item.labels, 1)), replace(item, um_per_px=0.6),
        replace(item, channels=("a", "b")), replace(item, labels=None), replace(item, limits=np.array([[0, 9], [0, 9]])),
        replace(item, region=item.labels > 0),
    ]  # fmt: skip
    assert len({same, *fingerprints(others)}) == 8


def test_an_image_is_known_in_other_clothes(fields: list[Field]) -> None:
    item = fields[1]
    deep = item.image.astype(np.uint16) * 257
    alike = [
        replace(item, name="new", labels=None), replace(item, image=deep), replace(item, image=item.image / 255.0),
        Field("one", item.image[1:], ("membrane",)),
    ]  # fmt: skip
    for other in alike:
        with pytest.raises(ValueError, match=r"Field '.*' has the pixels of the held-out field 'nuclei1'"):
            check_disjoint([fields[0], other], [fields[2], item])
    check_disjoint(fields[:2], fields[2:])
    changed = np.array(item.image)
    changed[:, 40, 40] = 255
    check_disjoint([replace(item, image=changed)], [item])


def test_an_empty_channel_identifies_nothing() -> None:
    rng = np.random.default_rng(0)
    a, b = (Field(name, np.stack([rng.random((8, 8)), np.zeros((8, 8))]), ("x", "y")) for name in "ab")
    assert len(content_hashes(a)) == 1
    check_disjoint([a], [b])


def test_fields_among_options(fields: list[Field]) -> None:
    assert fields_in({"n_steps": 3, "validation": fields[:2], "terms": ("hidden",)}) == fields[:2]
