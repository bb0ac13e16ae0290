"""Plants behind one port: simulated, replayed, hardware. Loaded when first used."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
