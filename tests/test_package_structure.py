"""The contract of the public functions and the layout of the package, checked on whatever the rooms export."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from histoniche import _keys

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "histoniche"
TESTS = ROOT / "tests"
# Rooms of functions whose first argument is the data (io: the path, or the data to which something is added).
FUNCTION_ROOMS = ("io", "pp", "tl", "pl")
# Rooms whose functions write to the table, and so return None or a copy.
WRITING_ROOMS = ("pp", "tl")
# Functions that add an element (an image) to the SpatialData object instead of writing to its table.
ADDS_ELEMENT = {"pp.virtual_he"}
ENGINES = ("neighbors", "encoders", "models", "metrics", "seg")
# What hn.seg reads from and writes to SpatialData; all else in it is an engine.
SEG_ROOMS = ("seg", "seg.teachers", "seg.metrics")
SEG_SDATA = {SRC / "seg" / name for name in ("_sdata_fields.py", "_segment.py")}
ENGINE_BANS = {"anndata", "spatialdata", "spatialdata_io", "scanpy", "squidpy"}
# Only the room that fits baselines may import this copyleft package.
IGRAPH_HOME = SRC / "models" / "_baselines.py"
WRITTEN = re.compile(r"(obs|obsm|obsp|uns|images|shapes|tables)\[")
HEAVY = ("torch", "spatialdata", "anndata", "scanpy", "squidpy", "scvi", "timm", "dask", "matplotlib", "pandas")


class Public(NamedTuple):
    """A public function and the name under which users call it."""

    room: str
    name: str
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.room}.{self.name}"


def _exports(room: str) -> list[str]:
    module = importlib.import_module(f"histoniche.{room}")
    return list(getattr(module, "__all__", []))


def _public(rooms: tuple[str, ...]) -> list[Public]:
    found = []
    for room in rooms:
        module = importlib.import_module(f"histoniche.{room}")
        for name in _exports(room):
            value = getattr(module, name)
            if inspect.isfunction(value):
                found.append(Public(room, name, value))
    return found


FUNCTIONS = _public(FUNCTION_ROOMS)
WRITERS = [f for f in FUNCTIONS if f.room in WRITING_ROOMS]
DOCUMENTED = _public((*FUNCTION_ROOMS, "datasets", "encoders", "metrics", "models", *SEG_ROOMS))
MIRRORED = [*FUNCTIONS, *_public(SEG_ROOMS)]


def _sections(docstring: str) -> dict[str, str]:
    """Split a numpydoc docstring at its underlined headings; the summary is the section ''."""
    parts = re.split(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", inspect.cleandoc(docstring) + "\n", flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def _documented_parameters(section: str) -> set[str]:
    names = set()
    for line in section.splitlines():
        if line and not line[0].isspace():
            names.update(name.strip().lstrip("*") for name in line.split(" : ")[0].split(","))
    return names


def _imports(path: Path) -> set[str]:
    """Top-level packages that a file imports at run time or in its type-checking block."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def _files(*rooms: str) -> list[Path]:
    roots = [SRC / room for room in rooms] if rooms else [SRC]
    return sorted(path for root in roots for path in root.rglob("*.py"))


def _relative(path: Path) -> str:
    return path.relative_to(SRC).as_posix()


# ------------------------------------------------------------------------------------------------ public functions
@pytest.mark.parametrize("room", [*FUNCTION_ROOMS, "datasets", "encoders", "metrics", "models", *SEG_ROOMS])
def test_room_exports_what_it_names(room: str) -> None:
    names = _exports(room)
    assert names, f"histoniche.{room} names nothing in __all__"
    assert len(names) == len(set(names))
    module = importlib.import_module(f"histoniche.{room}")
    for name in names:
        assert not name.startswith("_")
        assert getattr(module, name) is not None
    assert len(inspect.getdoc(module) or "") > 10, f"histoniche.{room} has no docstring"


@pytest.mark.parametrize("public", FUNCTIONS, ids=str)
def test_data_first_rest_keyword_only(public: Public) -> None:
    parameters = list(inspect.signature(public.function).parameters.values())
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # predict_niches takes the model beside the data: both are what it works on.
    allowed = {"tl.predict_niches": 2, "io.attach_image": 2}.get(str(public), 1)
    assert 1 <= len(positional) <= allowed, positional
    first = {"io": {"path", "sdata", "data"}, "pl": {"data", "sdata", "history"}}.get(public.room, {"data", "sdata"})
    assert positional[0] in first
    assert not [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, f"{parameter.name} has no type"
    assert inspect.signature(public.function).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("public", WRITERS, ids=str)
def test_writers_offer_copy_and_table_key(public: Public) -> None:
    signature = inspect.signature(public.function)
    assert "None" in str(signature.return_annotation), signature.return_annotation
    assert "copy" in signature.parameters
    assert signature.parameters["copy"].default is False
    if str(public) not in ADDS_ELEMENT:
        assert signature.parameters["table_key"].default is None


@pytest.mark.parametrize("public", DOCUMENTED, ids=str)
def test_docstring_documents_every_parameter(public: Public) -> None:
    sections = _sections(public.function.__doc__ or "")
    assert sections[""].strip(), "no summary"
    names = set(inspect.signature(public.function).parameters)
    documented = _documented_parameters(sections.get("Parameters", ""))
    assert documented == names, f"missing {sorted(names - documented)}, unknown {sorted(documented - names)}"
    assert sections.get("Returns", sections.get("Yields", "")).strip(), "no Returns section"


@pytest.mark.parametrize("public", WRITERS, ids=str)
def test_docstring_names_written_fields_and_errors(public: Public) -> None:
    sections = _sections(public.function.__doc__ or "")
    assert WRITTEN.search(sections["Returns"]), "Returns names no field that is written, such as obs['niche']"
    assert sections.get("Raises", "").strip(), "no Raises section"


@pytest.mark.parametrize("public", MIRRORED, ids=str)
def test_defined_in_a_private_module_with_mirrored_tests(public: Public) -> None:
    path = Path(inspect.unwrap(public.function).__code__.co_filename).resolve()
    assert path.is_relative_to(SRC)
    assert path.name.startswith("_")
    assert path.name != "__init__.py"
    mirror = TESTS / path.parent.relative_to(SRC) / f"test{path.name}"
    assert mirror.is_file(), f"{mirror.relative_to(ROOT)} is missing"
    assert public.name in mirror.read_text(encoding="utf-8"), f"{mirror.relative_to(ROOT)} never calls {public.name}"


# ----------------------------------------------------------------------------------------------------------- layout
def test_keys_are_unique_and_described() -> None:
    slots = [(key.slot, key.name) for key in _keys.KEYS]
    assert len(slots) == len(set(slots))
    for key in _keys.KEYS:
        assert key.content
        assert key.written_by
        assert re.fullmatch(r"[A-Za-z0-9_.{}-]+", key.name), f"SpatialData cannot store the name {key.name!r}"


def test_written_by_names_public_functions() -> None:
    known = {str(public) for public in FUNCTIONS}
    for key in _keys.KEYS:
        writers = [name.strip() for name in key.written_by.split(",") if "." in name]
        assert not set(writers) - known, f"{key.name}: {set(writers) - known} is not public"


@pytest.mark.parametrize("path", [path for path in _files(*ENGINES) if path not in SEG_SDATA], ids=_relative)
def test_engines_know_no_anndata(path: Path) -> None:
    assert not _imports(path) & ENGINE_BANS


@pytest.mark.parametrize("path", _files(), ids=_relative)
def test_source_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    imports = _imports(path)
    assert not imports & {"pickle", "dill", "joblib", "cloudpickle"}
    if path != IGRAPH_HOME:
        assert "igraph" not in imports
    tree = ast.parse(text)
    asserts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"assert at lines {asserts}: users need errors"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("weights_only", "allow_pickle"):
            safe = node.arg == "weights_only"
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is safe, f"{node.arg} at line {node.value.lineno}"
    assert len(text.splitlines()) <= 500


@pytest.mark.parametrize("path", _files(), ids=_relative)
def test_functions_stay_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            length = (node.end_lineno or node.lineno) - node.lineno + 1 - len((docstring or "").splitlines())
            assert length <= 70, f"{node.name} at line {node.lineno} has {length} lines of code"


# ----------------------------------------------------------------------------------------------------------- import
def test_import_is_light_and_fast() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import histoniche as hn; took = time.perf_counter() - start; "
        f"print(took, *[name for name in {HEAVY!r} if name in sys.modules]); assert 'tl' in dir(hn)"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        took, *loaded = done.stdout.split()
        assert not loaded, f"`import histoniche` loads {loaded}"
        times.append(float(took))
    assert min(times) < 1, f"`import histoniche` takes {min(times):.2f} s"


def test_rooms_are_reached_by_attribute() -> None:
    code = "import histoniche as hn; print(*[type(getattr(hn, name)).__name__ for name in hn.__all__])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"module", "Settings"}


def test_unknown_attribute_is_an_attribute_error() -> None:
    import histoniche as hn

    with pytest.raises(AttributeError, match="no_such_room"):
        _ = hn.no_such_room
