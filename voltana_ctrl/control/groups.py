"""Groups of equal instances, and least-power tables of groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.types import DEPTHS, FleetSpec

#: Least share of the load of an instance that stays active.
_LEAST_FRAC = 1e-3


class Node:
    """Least power of a group of instances on its grid, and how each load is split."""

    __slots__ = ("cost_w", "left", "left_at", "reach", "right", "right_at", "step")

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
        able = np.flatnonzero(np.isfinite(cost_w))
        #: Largest load with a finite cost.
        self.reach = float(able[-1] * step) if able.size else 0.0

    def children(self, at: int) -> tuple[tuple[Node, int], ...]:
        """Both halves, each with its part of the load at this grid point; none of a leaf."""
        if self.left is None or self.right is None or self.left_at is None or self.right_at is None:
            return ()
        return (self.left, int(self.left_at[at])), (self.right, int(self.right_at[at]))

    def loads(self, at: int) -> list[float]:
        """Loads of all leaves at this grid point, largest first."""
        found: list[float] = []
        # Equal halves with equal parts are one entry, counted: few entries whatever the size.
        level = {(self, at): 1}
        while level:
            below: dict[tuple[Node, int], int] = {}
            for (node, here), times in level.items():
                parts = node.children(here)
                if not parts:
                    found.extend([here * node.step] * times)
                for part in parts:
                    below[part] = below.get(part, 0) + times
            level = below
        return sorted(found, reverse=True)


def joined(left: Node, right: Node, points: int, most_req_s: float) -> Node:
    """Both together: the cheapest split of each load, on a grid up to `most_req_s`."""
    # Loads Numba, which `import voltana_ctrl` must not.
    from voltana_ctrl.kernels.choose.target import min_plus

    step = max(min(left.reach + right.reach, most_req_s) / points, 1e-300)
    cost_w = np.empty(points + 1)
    left_at = np.empty(points + 1, dtype=np.int64)
    right_at = np.empty(points + 1, dtype=np.int64)
    min_plus(left.cost_w, left.step, right.cost_w, right.step, step, cost_w, left_at, right_at)
    return Node(
        step=step, cost_w=cost_w, left=left, right=right, left_at=left_at, right_at=right_at
    )


def many(leaf: Node, size: int, points: int, most_req_s: float) -> Node:
    """`size` equal instances, by halves."""
    known = {1: leaf}

    def of(size: int) -> Node:
        if size not in known:
            known[size] = joined(of(size - size // 2), of(size // 2), points, most_req_s)
        return known[size]

    return of(size)


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
            *(one.rest(depth) for depth in DEPTHS),
            one.role,
        )
        groups.setdefault(key, []).append(int(i))
    return [np.array(group, dtype=np.int64) for group in groups.values()]


def everybody_on(loads_req_s: F64, groups: Sequence[I64], arrival_req_s: float) -> F64:
    """Loads of which everybody in these groups has a part, be it small."""
    on = np.concatenate(list(groups))
    some = loads_req_s.copy()
    some[on] = np.maximum(some[on], _LEAST_FRAC * max(arrival_req_s, 1e-9))
    some *= arrival_req_s / max(some.sum(), 1e-300)
    return some
