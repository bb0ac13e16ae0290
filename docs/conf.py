"""Sphinx configuration. Warnings are errors: `sphinx-build -W docs docs/_build`."""

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import voltana_ctrl  # noqa: E402  (the checkout, whether installed or not)
from voltana_ctrl.lazy import listed_names  # noqa: E402

project = "voltana-ctrl"
author = "the voltana-ctrl authors"
copyright = author
release = version = voltana_ctrl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings are NumPy style with types in prose ("ndarray, shape (n,)"), which are text, not
# references; units and shapes stand there, so signatures carry no annotations.
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_keyword = False
napoleon_custom_sections = [("Attributes", "params_style")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autosummary_generate = True
autosummary_ignore_module_all = False

# No network: references to other projects stay text.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!voltana_ctrl).*"),
    (r"py:.*", r"voltana_ctrl\.kernels.*"),
]

# Docstring examples run under pytest; here run those written in the pages.
doctest_test_doctest_blocks = ""


def resolve_exported_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> Any:
    """Lead `voltana_ctrl.Name` to the module that documents it."""
    package, _, name = node.get("reftarget", "").rpartition(".")
    home = listed_names("voltana_ctrl").get(name)
    if package != "voltana_ctrl" or home is None:
        return None
    target = f"{home}.{name}"
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve_exported_name)
