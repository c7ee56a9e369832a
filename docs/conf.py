"""Settings of Sphinx, which ``make docs`` runs; the pages are Markdown, read by MyST."""

from __future__ import annotations

import re
from typing import Any

from moe_triton import __version__

project = "moe_triton"
author = copyright = "The moe_triton authors"  # noqa: A001 (Sphinx reads this name)
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "contents"
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Outputs", "params_style")]
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "furo"
html_title = f"moe_triton {version}"
html_copy_source = False
html_extra_path = ["layer.svg", "layer-dark.svg"]  # index.md shows them in HTML of its own


def adapt(*event: Any) -> None:
    """Mark indented text of a docstring as literal, and returns with names as a list of fields."""
    what, lines = event[1], event[-1]
    if what == "property":
        # Napoleon takes a word before a colon for a type.
        lines[0] = re.sub(r"^(\w+): ", r"\1, ", lines[0])
    for i, line in enumerate(lines):
        # "H." and "161002." at the start of a text would begin a list.
        lines[i] = re.sub(r"^(\s+\w+: )((?:[A-Z]{1,2}|\d+)\.)", r"\1\\\2", line)
    for i, line in enumerate(lines[:-1]):
        if line == "Returns:" and re.match(r"    \w+: ", lines[i + 1]):
            lines[i] = "Outputs:"
    marked: list[str] = []
    inside = False
    for before, line in zip(["", *lines], lines, strict=False):
        indented = line.startswith("    ")
        if indented and not inside and not before.strip() and in_text(marked):
            marked += ["::", ""]
        inside = indented or (inside and not line.strip())
        marked.append(line)
    lines[:] = marked


def in_text(lines: list[str]) -> bool:
    """Whether the last unindented line is text, and not the head of a section."""
    heads = [line for line in lines if line.strip() and not line.startswith(" ")]
    return bool(heads) and re.fullmatch(r"[A-Z][a-z]+:", heads[-1]) is None


def setup(app: Any) -> None:
    """Have docstrings adapted before napoleon reads them."""
    app.connect("autodoc-process-docstring", adapt, priority=100)
