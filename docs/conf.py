"""Settings of the reference site: `make docs`."""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import public

import dbojax

offline = importlib.util.find_spec("sphinx-mathjax-offline")
MATHJAX = Path(offline.origin).parent / "static/mathjax/tex-svg.js"

project = "dbojax"
author = "The dbojax authors"
version = release = dbojax.__version__
language = "en_GB"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "rendering",
]
exclude_patterns = ["_build"]
default_role = "py:obj"
nitpicky = True
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    name: f"{module}.{name}" if package == public.ROOT else name
    for (package, name), module in public.types().items()
}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Fields", "params_style")]

html_theme = "furo"
html_title = f"dbojax {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["static", str(MATHJAX)]
mathjax_path = MATHJAX.name  # draws its letters itself: no fonts, no network
html_css_files = ["site.css"]
