"""Configuration of Sphinx."""

from __future__ import annotations

import os
import sys
from importlib.metadata import metadata
from pathlib import Path

from sphinx.ext.napoleon import NumpyDocstring

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import keys_page  # noqa: E402 - lies beside this file

info = metadata("histoniche")
project = info["Name"]
author = "histoniche developers"
copyright = f"2026, {author}"
release = version = info["Version"]

# The page of keys always says what the code writes; tests/test_docs.py fails when the committed page does not.
_page = HERE / "keys.md"
if not _page.exists() or _page.read_text(encoding="utf-8") != keys_page.render():
    _page.write_text(keys_page.render(), encoding="utf-8")

templates_path = ["_templates"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints", "jupyter_execute"]

# -- API pages: autosummary makes one page per public name of api.md
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
napoleon_use_ivar = True


def _returns_as_prose(self: NumpyDocstring, section: str) -> list[str]:  # noqa: ARG001 - napoleon's signature
    """Returns sections here are sentences and lists of fields, which napoleon would take for names and types."""
    return [*self._format_block(":returns: ", self._dedent(self._consume_to_next_section())), ""]


NumpyDocstring._parse_returns_section = _returns_as_prose

# -- pages and notebooks
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
# Tutorials run in every build, and a cell that fails fails the build. "off" for a quick look at the text.
nb_execution_mode = os.environ.get("HISTONICHE_DOCS_EXECUTE", "force")
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_execution_in_temp = True
nb_merge_streams = True
# Progress bars and libraries' notices on stderr say nothing to a reader.
nb_output_stderr = "remove"

# -- links to other projects need the network: opt in with HISTONICHE_DOCS_INTERSPHINX=1
intersphinx_mapping = (
    {
        "anndata": ("https://anndata.readthedocs.io/en/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "pandas": ("https://pandas.pydata.org/pandas-docs/stable", None),
        "python": ("https://docs.python.org/3", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable", None),
        "spatialdata": ("https://spatialdata.scverse.org/en/stable", None),
        "squidpy": ("https://squidpy.readthedocs.io/en/stable", None),
    }
    if os.environ.get("HISTONICHE_DOCS_INTERSPHINX") == "1"
    else {}
)

html_theme = "sphinx_book_theme"
html_title = project
html_show_sphinx = False
html_theme_options = {
    "path_to_docs": "docs",
    "use_download_button": True,
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
}
pygments_style = "default"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
