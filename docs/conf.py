"""Sphinx's settings for the web edition. `make site` calls it on a tree that course_utils/tools/site.py assembles."""

import sys
from pathlib import Path

from course_utils.tools import badges, site

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "Squeeze & Speed Up"
extensions = ["myst_nb", "sphinx.ext.autodoc", "course"]
html_title = project
html_copyright = html_show_copyright = html_show_sphinx = False
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_copy_source = html_use_index = html_domain_indices = False
html_math_renderer = "mathml"  # written at build time: nothing to load, and screen readers know it

html_theme_options = {
    "repository_url": badges.setting().address,
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],  # there is a search field in the sidebar
    "max_navbar_depth": 1,
    "show_toc_level": 2,
}

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_render_markdown_format = "myst"  # an output's tables are tables
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 4
myst_substitutions = site.parts()

add_module_names = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings say more
autodoc_inherit_docstrings = False
