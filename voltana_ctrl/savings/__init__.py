"""Proof of savings: alternating blocks of policy and highest clock, and what they show."""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
