"""The documentation says what the code does: pages are complete, names in examples exist, notebooks are clean."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pytest

import histoniche as hn
from histoniche import _keys

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
API_ROOMS = sorted({*hn.__all__, "seg.teachers", "seg.metrics"} - {"settings"})


def _code(path: Path) -> str:
    """The Python of a notebook, or of the python blocks of a page; parts that do not parse alone fail the test."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return "\n".join("".join(cell["source"]) for cell in cells)
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(inspect.cleandoc("\n" + block) for _, block in blocks)


def _calls(code: str) -> list[tuple[str, ast.Call | None]]:
    """Names like ``hn.tl.nolan`` in the code, with the call where it is one."""
    tree = ast.parse(code)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id == "hn":
                found.append((".".join(reversed(parts)), calls.get(id(node))))
    return found


def _resolve(name: str) -> object:
    value: object = hn
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_examples_use_names_and_parameters_that_exist(path: Path) -> None:
    for name, call in _calls(_code(path)):
        if name == "tl.something":  # the worked example of a new function
            continue
        value = _resolve(name)
        if (
            call is None
            or not callable(value)
            or any(isinstance(a, ast.Constant) and a.value is ... for a in call.args)
        ):
            continue
        options = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
        inspect.signature(value).bind(*call.args, **options)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_names_in_the_text_exist(path: Path) -> None:
    for name in set(re.findall(r"`hn\.([A-Za-z_.0-9]+[A-Za-z_0-9])", path.read_text(encoding="utf-8"))) - {
        "tl.something"
    }:
        assert _resolve(name) is not None


def test_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert 'pip install ".[demo]" && histoniche demo' in lines
    assert 'pip install -e ".[test]" && pytest' in lines


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_local_links_and_pictures_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_page_of_keys_is_what_the_code_writes() -> None:
    spec = importlib.util.spec_from_file_location("keys_page", DOCS / "keys_page.py")
    assert spec is not None
    assert spec.loader is not None
    keys_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keys_page)
    page = (DOCS / "keys.md").read_text(encoding="utf-8")
    assert page == keys_page.render(), "docs/keys.md is stale: run `python docs/conf.py`"
    for key in _keys.KEYS:
        assert re.search(rf"^\| `{key.slot}` \| `{re.escape(key.name)}` \|", page, flags=re.MULTILINE)


@pytest.mark.parametrize("room", API_ROOMS)
def test_api_page_lists_every_public_name(room: str) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(rf"^    {re.escape(room)}\.(\w+)$", page, flags=re.MULTILINE))
    module = importlib.import_module(f"histoniche.{room}")
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    assert listed == public, f"missing {sorted(public - listed)}, gone {sorted(listed - public)}"


def test_there_is_a_tutorial() -> None:
    names = ["distill_niches.ipynb", "distill_segmentation.ipynb", "few_labels.ipynb"]
    assert [path.name for path in NOTEBOOKS] == names
    assert (DOCS / "tutorials").resolve() == (ROOT / "tutorials").resolve()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_changelog_names_the_next_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in text or f"## {hn.__version__}" in text
