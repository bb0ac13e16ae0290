"""Routers."""

from voltana_ctrl.routing.base import CompiledRouter
from voltana_ctrl.routing.baselines import (
    fadr_router,
    least_queue_router,
    random_router,
    share_router,
    shortest_router,
    tile_aware_router,
)

__all__ = [
    "CompiledRouter",
    "fadr_router",
    "least_queue_router",
    "random_router",
    "share_router",
    "shortest_router",
    "tile_aware_router",
]
