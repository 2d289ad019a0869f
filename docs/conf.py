"""How Sphinx builds the documentation: ``python -m sphinx -W -b html docs site``."""

import mmdet_lors

project = "mmdet_lors"
author = "the authors of mmdet_lors"
version = release = mmdet_lors.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "forward, training"}
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"mmdet_lors {version}"
# One prompt or none: what is copied can be pasted into a terminal.
copybutton_exclude = ".linenos, .gp"
