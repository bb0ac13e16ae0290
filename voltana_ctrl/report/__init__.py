"""Reports of a comparison: a table on the terminal, figures, one self-contained page."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
