"""Energy-optimal, SLO-bound control of disaggregated LLM serving.

Clocks, routing and the set of active instances are chosen so that time to first token (TTFT)
and inter-token latency (ITL) stay within their objectives at the least power.

Every name below is imported when it is first used, so that ``import voltana_ctrl`` inside a
serving engine costs next to nothing.

Examples
--------
>>> import voltana_ctrl
>>> slo = voltana_ctrl.Slo(ttft_s=0.6, itl_s=0.06)
>>> slo.attainment
0.99
"""

import logging

from voltana_ctrl.lazy import lazy_names
from voltana_ctrl.moved import find_moved

__version__ = "0.1.0.dev0"

__getattr__, __dir__, __all__ = lazy_names(__name__)

# The host owns logging; without a handler of its own the library stays silent.
logging.getLogger(__name__).addHandler(logging.NullHandler())

find_moved()
