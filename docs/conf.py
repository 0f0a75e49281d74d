"""Sphinx configuration. `make docs` builds the pages; warnings are errors."""

import re
from typing import Any

import fxlora

project = "fxlora"
author = copyright = "The fxlora authors"
release = version = fxlora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
default_role = "code"
html_theme = "furo"
html_title = f"fxlora {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and units
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


# On GitHub, the pages of api/ are tables with one line for each name. Here they also have the
# docstrings, by the directives in a comment, and links from the tables to them.
def _with_docstrings(app: Any, page: str, source: list[str]) -> None:
    if page.startswith("api/"):
        text = re.sub(r"^\| `(fxlora\.\w+)` \|", r"| {py:obj}`\1` |", source[0], flags=re.MULTILINE)
        comment = r"<!-- autodoc\n(.*?)-->"
        source[0] = re.sub(comment, r"```{eval-rst}\n\1```", text, flags=re.DOTALL)


def setup(app: Any) -> None:
    app.connect("source-read", _with_docstrings)
