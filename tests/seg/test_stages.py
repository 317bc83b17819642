"""Stages in a folder: what is taken from it, what is refused, what a failure leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from histoniche.seg._stages import Stages


def save(text: str, path: Path) -> None:
    path.mkdir()
    (path / "a").write_text(text)


def load(path: Path) -> str:
    return (path / "a").read_text()


def fail(_: Path) -> str:
    raise RuntimeError


def fail_midway(state: Path) -> str:
    state.write_text("half")
    raise RuntimeError


def test_a_result_is_made_once(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "run")
    assert stages.run("one", {"x": 1}, load, save, lambda _: "made") == "made"
    assert stages.run("one", {"x": 1}, load, save, fail) == "made"
    with pytest.raises(ValueError, match=r"one' was made with x=1, not 2: .* delete 'one' and the stages that follow"):
        stages.run("one", {"x": 2}, load, save, fail)


def test_a_stage_that_began_with_wrong_settings_can_be_corrected(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    with pytest.raises(RuntimeError):
        stages.run("one", {"x": 1}, load, save, fail)
    assert stages.run("one", {"x": 2}, load, save, lambda _: "made") == "made"


def test_the_state_of_other_settings_is_refused_and_goes_with_the_result(tmp_path: Path) -> None:
    stages = Stages(tmp_path)
    with pytest.raises(RuntimeError):
        stages.run("one", {"x": 1}, load, save, fail_midway)
    with pytest.raises(ValueError, match=r"one.state' was made with x=1, not 2: .* delete 'one.state'"):
        stages.run("one", {"x": 2}, load, save, fail)

    def full(text: str, path: Path) -> None:
        raise OSError

    with pytest.raises(OSError):
        stages.run("one", {"x": 1}, load, full, lambda state: state.read_text())
    assert stages.run("one", {"x": 1}, load, save, lambda state: state.read_text()) == "half"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.json"]


def test_a_result_without_a_record_is_not_trusted(tmp_path: Path) -> None:
    save("other", tmp_path / "one")
    with pytest.raises(ValueError, match="was made with x=null, not 1"):
        Stages(tmp_path).run("one", {"x": 1}, load, save, fail)
