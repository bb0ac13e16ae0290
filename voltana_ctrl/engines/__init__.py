"""Adapters to serving engines: what they tell, and what runs inside them."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
