"""Groups of equal instances, and least-power tables of groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.types import FleetSpec
from voltana_ctrl.types._check import F64, I64


class Node:
    """Least power of a group of instances on its grid, and how each load is split."""

    __slots__ = ("cost_w", "left", "left_at", "right", "right_at", "step")

    def __init__(
        self,
        *,
        step: float,
        cost_w: F64,
        left: Node | None = None,
        right: Node | None = None,
        left_at: I64 | None = None,
        right_at: I64 | None = None,
    ) -> None:
        self.step = step
        self.cost_w = cost_w
        self.left, self.right = left, right
        self.left_at, self.right_at = left_at, right_at

    @property
    def reach(self) -> float:
        """Largest load with a finite cost."""
        able = np.flatnonzero(np.isfinite(self.cost_w))
        return float(able[-1] * self.step) if able.size else 0.0

    def collect(self, at: int, found: list[float]) -> None:
        """Append the loads of all leaves, left to right."""
        if self.left is None or self.right is None:
            found.append(at * self.step)
            return
        if self.left_at is not None and self.right_at is not None:
            self.left.collect(int(self.left_at[at]), found)
            self.right.collect(int(self.right_at[at]), found)


def equal_groups(fleet: FleetSpec, members: I64) -> list[I64]:
    """Members by equal instance (profile, clocks, limits, role)."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i in members:
        one = fleet.instances[int(i)]
        key = (
            id(one.profile),
            one.clocks_mhz.tobytes(),
            one.max_batch,
            one.kv_capacity_tok,
            one.idle_w,
            one.role,
        )
        groups.setdefault(key, []).append(int(i))
    return [np.array(group, dtype=np.int64) for group in groups.values()]
