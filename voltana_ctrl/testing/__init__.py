"""What tests of programs that use this library need: strategies, checks and doubles.

Hypothesis strategies for fleets, observations, decisions and workloads; checks that hold a
controller, router or backend of one's own against what the library relies on; a double of
NVML. All loaded when first used; strategies and the checks of controllers and routers need
the extra ``test``.
"""

from voltana_ctrl.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)
