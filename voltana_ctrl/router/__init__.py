"""The router: an OpenAI-compatible proxy in front of the engines of a fleet."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
