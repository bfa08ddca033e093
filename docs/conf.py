"""Sphinx builds the documentation by this file.

    pip install -e ".[docs]"
    sphinx-build -W --keep-going docs docs/_build/html

The pages under ``notebooks/`` are made of the scripts in ``examples/``, which the build
executes. The site needs no network: its fonts, scripts and styles are local.
"""

import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

import pconv_jax  # noqa: E402

project = "pconv_jax"
author = "The pconv_jax authors"
copyright = f"2026, {author}"
release = version = pconv_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "api_pages",
    "example_notebooks",
    "offline",
    "settings_table",
]
exclude_patterns = ["photos", "_build", "_ext"]
root_doc = "index"

# Docstrings are Google's, and name other objects in single backticks.
default_role = "py:obj"
nitpicky = True  # Warns of references without a target, except to other packages.
nitpick_ignore_regex = [("py:.*", r"(jax|flax|nnx)\..*")]
# Errors of functions that are not for users. They are ValueErrors and RunErrors.
nitpick_ignore = [("py:exc", "FileContentError"), ("py:exc", "DownloadError")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Docstrings name shapes and ranges.
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "special-members": "__call__"}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # "Variables" otherwise.
napoleon_attr_annotations = False
napoleon_use_rtype = False  # What comes before a colon is not always a type.

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
# The kernel of the notebooks is this Python, whatever others are installed.
nb_kernel_rgx_aliases = {".*": "python3"}

html_theme = "furo"
html_title = f"pconv_jax {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_use_index = html_domain_indices = False  # The API reference is the index.
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
