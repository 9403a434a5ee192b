"""Configuration of Sphinx. ``python -m bench.docs`` makes the pages and runs Sphinx on them."""

from growkern import __version__

project, author, copyright = "growkern", "The growkern authors", "The growkern authors"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["README.md", "jupyter_execute"]

html_theme, html_title = "furo", f"growkern {__version__}"
html_show_sphinx, html_copy_source = False, False

autodoc_member_order, autodoc_typehints = "bysource", "none"  # signatures have the types
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_custom_sections = [("Preserves", "returns_style")]
napoleon_use_rtype, napoleon_use_ivar = False, True

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
