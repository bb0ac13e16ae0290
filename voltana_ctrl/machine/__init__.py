"""What stands on this machine: its engines and GPUs, what they draw, and a fleet file of them."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
