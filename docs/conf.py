"""How the site is built of these pages: `make docs`."""

from __future__ import annotations

from tracker.schema.distribution import __version__

project = "tracker"
author = "the authors of tracker"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md", "data"]
html_theme = "furo"
html_title = "tracker"
html_static_path: list[str] = []
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
nitpicky = False
