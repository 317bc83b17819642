"""Stages of a long work, each with its result in a folder, so that it goes on where it stopped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

T = TypeVar("T")


class Stages:
    """A folder with the results of stages, each beside a record of what it was made of.

    Parameters
    ----------
    folder
        The folder, made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            msg = f"folder={str(folder)!r} is a file; a folder is needed."
            raise NotADirectoryError(msg)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        name: str,
        made_of: Mapping[str, Any],
        load: Callable[[Path], T],
        save: Callable[[T, Path], None],
        make: Callable[[Path], T],
    ) -> T:
        """Take a stage's result from the folder, or make it and put it there.

        Parameters
        ----------
        name
            Name of the stage and its directory.
        made_of
            Inputs and settings, which JSON can hold; a result made of others is refused.
        load, save
            Read it from a directory, and write it to one.
        make
            Makes it; takes the file for its state while it is made.
        """
        path, record, state = (self.folder / f"{name}{end}" for end in ("", ".json", ".state"))
        wanted = json.loads(json.dumps(dict(made_of), default=str))
        there = [file for file in (path, state) if file.exists()]
        if there:  # a record alone is of a stage that failed before it had anything to keep
            found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            differs = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            if differs:
                key = differs[0]
                msg = (
                    f"{str(there[0])!r} was made with {key}={_short(found.get(key))}, not {_short(wanted.get(key))}: choose "
                    f"another folder, or delete {', '.join(repr(file.name) for file in there)} and the stages that follow."
                )
                raise ValueError(msg)
            if path.exists():
                return load(path)
        beside = record.with_suffix(".part")
        beside.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        beside.replace(record)  # before the work, so that a state left by other settings is named, not met
        result = make(state)
        save(result, path)
        state.unlink(missing_ok=True)
        return result


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
