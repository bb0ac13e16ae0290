"""Routers."""

from voltana_ctrl.routing.base import CompiledRouter
from voltana_ctrl.routing.baselines import (
    fadr_router,
    least_kv_router,
    least_queue_router,
    random_router,
    round_robin_router,
    share_router,
    shortest_router,
    tile_aware_router,
    tokens_by_batch_router,
    two_choices_router,
)
from voltana_ctrl.routing.priced import PricedRouter

__all__ = [
    "CompiledRouter",
    "PricedRouter",
    "fadr_router",
    "least_kv_router",
    "least_queue_router",
    "random_router",
    "round_robin_router",
    "share_router",
    "shortest_router",
    "tile_aware_router",
    "tokens_by_batch_router",
    "two_choices_router",
]
