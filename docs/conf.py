"""Sphinx: the pages beside this file, and the docstrings of every public name (``api/``)."""

import inspect
import re
from typing import Any

from docutils import nodes

import natgrad_jax

project = "natgrad_jax"
author = "The natgrad_jax developers"
version = release = natgrad_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "natgrad_jax"
html_static_path = ["static"]
html_css_files = ["site.css"]

myst_heading_anchors = 3  # links to a page's sections, as README has them
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Scalar written out fills a line; the docstrings say what is taken


def files_of_the_repository(app: Any, page: str, source: list[str]) -> None:
    """Links from guides to Markdown outside ``docs/`` are right there; here they offer the file."""
    if "/" not in page:
        link = r"\[([^\]]+)\]\((\.\./[\w/]+\.md)\)"
        source[0] = re.sub(link, r"{download}`\1 <\2>`", source[0])


def without_field_numbers(app: Any, what: str, name: str, x: Any, skip: bool, options: Any) -> Any:
    """A NamedTuple's fields are told in its docstring; "Alias for field number 0" tells nothing."""
    return True if inspect.isdatadescriptor(x) and not isinstance(x, property) else None


def arguments_on_one_line(
    app: Any, what: str, name: str, x: Any, options: Any, lines: list[str]
) -> None:
    """Before napoleon: it takes one line for the names of arguments, and ``*`` for emphasis."""
    names = r"^( +(?:\w+, )*\w+),\n +((?:\w+, )*\w+: )"
    text = re.sub(names, r"\1, \2", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r", \*(?=\w+[:,])", r", \\*", text)
    lines[:] = text.replace("(log |ψ|)", "(``log |ψ|``)").split("\n")  # |ψ| would be replaced


# Docstrings have formulas in Unicode, readable by help(); the site sets them as mathematics.
MATHEMATICS = re.compile("[Α-ωϵ√∇∂Σ⊗≈‖½⟨∘ⁱⁿ⁰¹²³⁴-⁹⁺⁻ᵀ₀-₉₋ₐ-ₜᵢ-ᵪ\u0304\u0302]")


def formulas(app: Any, document: nodes.document) -> None:
    """Literals with mathematical letters get a class of their own, for ``static/site.css``."""
    is_literal = lambda node: isinstance(node, nodes.literal | nodes.literal_block)
    for node in document.findall(is_literal):
        text, language = node.astext(), node.get("language", "default")
        if MATHEMATICS.search(text) and language == "default" and ">>>" not in text:
            node["classes"].append("formula")
            if isinstance(node, nodes.literal_block):
                node["language"] = "text"


def without_deprecated(
    app: Any, what: str, name: str, x: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    return signature and re.sub(r", \w+=deprecated", "", signature), returns


def setup(app: Any) -> None:
    app.connect("doctree-read", formulas)
    app.connect("source-read", files_of_the_repository)
    app.connect("autodoc-skip-member", without_field_numbers)
    app.connect("autodoc-process-docstring", arguments_on_one_line, priority=100)
    app.connect("autodoc-process-signature", without_deprecated)
