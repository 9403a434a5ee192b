"""Configuration of Sphinx. ``python -m bench.docs`` makes the pages and runs Sphinx on them."""

import inspect
import re
from typing import Any

from growkern import __version__

project, author, copyright = "growkern", "The growkern authors", "The growkern authors"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md", "jupyter_execute"]

html_theme, html_title = "furo", f"growkern {__version__}"
html_show_sphinx, html_copy_source = False, False

autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_custom_sections = [("Preserves", "returns_style")]
autodoc_typehints_description_target = "documented"
napoleon_use_rtype, napoleon_use_ivar = False, True

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True


def link_papers(
    _app: Any, _what: str, _name: str, _object: object, _options: Any, lines: list[str]
) -> None:
    """Turn ``arXiv:2409.12903`` in a docstring into a link."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(
            r"(?<![`/])arXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line
        )


def signature(_app: Any, what: str, name: str, value: Any, *_: object) -> tuple[str, str] | None:
    """Return the signature of an optimizer, whose ``__new__`` growkern's registry of live optimizers sets."""
    if what != "class" or name != "growkern.optim.AdamW":
        return None
    found = inspect.signature(value.__init__)
    return str(found.replace(parameters=[*found.parameters.values()][1:])), ""


def setup(app: Any) -> None:
    """Connect the links."""
    app.connect("autodoc-process-docstring", link_papers)
    app.connect("autodoc-process-signature", signature)
