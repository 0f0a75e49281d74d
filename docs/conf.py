"""Sphinx configuration. `make docs` builds the pages; warnings are errors."""

import fxlora

project = "fxlora"
author = "The fxlora authors"
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
