"""How the site is built: `make docs`, warnings as errors, no request off the site."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # modules are imported for their docstrings

project = "FedP²EFT"
copyright = "the fedp2eft authors; Apache-2.0"
version = release = version_of("fedp2eft")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "generated",
    "docstrings",
    "checks",
]
suppress_warnings = [
    "ref.python",  # a type's short name that two modules have
]
exclude_patterns = ["_ext", "_static"]
highlight_language = "none"

myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_digits = False
myst_dmath_allow_space = False
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Run config", "params_style")]
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "FedP²EFT"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
