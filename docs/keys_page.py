"""Renders the page of keys from ``histoniche._keys``; ``conf.py`` calls it, and a test compares its result to ``keys.md``."""

from __future__ import annotations

from histoniche import _keys

_HEADER = """\
# Keys

% Written by docs/keys_page.py from histoniche._keys: edit those, not this page.

Everything the package writes to a table. A new result goes to a new key here before it is used anywhere.
Names keep to letters, digits, `_`, `-` and `.`, which is what SpatialData can store.

Every object is in the coordinate system `"{um}"`: one unit is one micrometre, and every image has an affine to it.
Labels of niches are the strings `"0"` to `"K-1"`; all K categories are kept, also those without a cell, so that a niche has
the same label and colour on every slide. Colours lie in `uns["<key>_colors"]`, in the order of the categories.

| slot | key | content | written by |
|---|---|---|---|
"""

_FOOTER = """
## Provenance

`uns["histoniche"]` has one entry per step, named after the public function that ran:

| field | content |
|---|---|
| `params` | the parameters of the call, the seed among them; those left at `None` are omitted |
| `inputs` | names of the fields, images and encoder weights that were read |
| `outputs` | the fields that were written, as `slot/key` |
| `versions` | of this package and of those that compute |
"""


def render() -> str:
    """Markdown text of the page."""
    rows = [
        f"| `{key.slot}` | `{key.name}` | {_code(key.content)} | {_writers(key.written_by)} |\n" for key in _keys.KEYS
    ]
    return _HEADER.format(um=_keys.UM) + "".join(rows) + _FOOTER


def _code(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def _writers(text: str) -> str:
    names = [name.strip() for name in text.split(",")]
    return ", ".join(f"{{func}}`~histoniche.{name}`" if "." in name else name for name in names)
