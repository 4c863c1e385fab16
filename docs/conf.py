"""How `make docs` makes pages of this folder, and of what it links to outside of it."""

import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

project = "coadapt"
author = "The coadapt authors"
version = release = installed("coadapt")

# The source is the whole project, so that a link from here to a result or an example
# is the same on disk and on a page.
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/**",
    "benchmarks/results/*.md",
    "examples/*/README.md",
    "packages/*/README.md",
]
suppress_warnings = ["toc.not_included"]  # those are linked to where they are spoken of

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

# Docstrings are read as they stand in the sources, where `one pair of backticks` is
# code: a link, if it is a name here.
default_role = "py:obj"
smartquotes = False  # quotes in them are those of Python
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


# Notebooks are kept without outputs and run here, again only where cells have changed.
nb_execution_mode = "cache"
nb_execution_cache_path = str(Path(__file__).parent.parent / "build" / "notebooks")
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = "remove"  # what libraries say about this machine

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "coadapt"
html_show_sphinx = False
html_show_copyright = False


def link_pages(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """`docs/combining.md` in a docstring becomes a link."""
    lines[:] = [
        re.sub(r"`?docs/(\w+)\.md`?", r":doc:`/docs/\1`", line) for line in lines
    ]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", link_pages)
