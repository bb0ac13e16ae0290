"""What the planner plans for: instances, or groups of like instances where there are too many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.laws import batch_j, decode_tangent
from voltana_ctrl.types import PROFILE_DTYPE, FleetSpec, InstanceSpec, Role

__all__ = ["Slots"]

#: Beyond so many instances the plan is made for groups of like instances.
_MAX_SLOTS = 64
#: Facets of the power of a prefill instance against its rate.
_FACETS = 5


class Slots:
    """Instances of one phase, or groups of like ones where there are too many.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    members : ndarray of int
        Instances of the phase.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("99P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> len(Slots(fleet, fleet.prefill)), len(Slots(fleet, fleet.decode))
    (3, 1)
    """

    def __init__(self, fleet: FleetSpec, members: I64) -> None:
        self._fleet = fleet
        self._members = np.asarray(members)
        kinds: dict[tuple[int, bytes, float], list[int]] = {}
        for i in members:
            kinds.setdefault(_kind(fleet.instances[int(i)]), []).append(int(i))
        self._grouped = len(members) > _MAX_SLOTS // 2
        # Per kind when grouped: parked, active with less than the median to do, with more.
        self._kinds = [np.array(kind) for kind in kinds.values()]
        self._places = [np.flatnonzero(np.isin(self._members, kind)) for kind in self._kinds]
        first = (
            [kind[0] for kind in self._kinds for _ in range(3)] if self._grouped else list(members)
        )
        self.specs = [fleet.instances[int(i)] for i in first]
        self.idle_w = np.array([one.idle_w for one in self.specs])
        self._which = np.zeros(len(members), dtype=np.int64)
        self.assign(np.ones(len(fleet), bool), np.zeros(len(fleet)))
        distinct: dict[tuple[int, bytes, float], list[int]] = {}
        for slot, one in enumerate(self.specs):
            distinct.setdefault(_kind(one), []).append(slot)
        # Per ladder: its slots, clocks, and coefficients as numbers.
        self._ladders = [
            (np.array(slots), self.specs[slots[0]].clocks_mhz, _numbers(self.specs[slots[0]]))
            for slots in distinct.values()
        ]
        low = np.array([one.clocks_mhz[0] for one in self.specs])
        high = np.array([one.clocks_mhz[-1] for one in self.specs])
        #: Lowest and highest clock per slot.
        self.clock_ghz = low / 1000.0, high / 1000.0
        if self.specs[0].role is Role.PREFILL:
            self._rates()

    def __len__(self) -> int:
        return len(self.specs)

    def assign(self, active: Any, work: F64) -> None:
        """Sort instances into slots."""
        if not self._grouped:
            self._which = np.arange(len(self._members))
        else:
            for g, (kind, places) in enumerate(zip(self._kinds, self._places, strict=True)):
                on = np.asarray(active)[kind]
                middle = np.median(work[kind][on]) if on.any() else 0.0
                slot = 3 * g + np.where(on, 1 + (work[kind] > middle), 0)
                self._which[places] = slot
        self.size = np.bincount(self._which, minlength=len(self.specs)).astype(np.float64)

    def mean(self, values: Any) -> F64:
        """Mean over the instances of each slot; 0 where it has none."""
        picked = np.asarray(values, dtype=np.float64)[self._members]
        if not self._grouped:
            return picked
        sums = np.bincount(self._which, weights=picked, minlength=len(self.specs))
        mean: F64 = sums / np.maximum(self.size, 1.0)
        return mean

    def spread(self, values: F64) -> F64:
        """Each instance of this phase gets the value of its slot; others 0."""
        out = np.zeros(len(self._fleet))
        out[self._members] = values[self._which]
        return out

    def shares(self, flows: F64) -> F64:
        """Share of each instance in what is sent over the horizon."""
        sent = np.maximum(flows.sum(axis=0), 0.0)
        total = float(self.size @ sent)
        if total <= 0.0:
            return np.zeros(len(self._fleet))
        share = sent / total
        return self.spread(np.where(share > 1e-4, share, 0.0))

    def rows(self, clock_mhz: F64) -> tuple[Any, Any]:
        """Coefficients at these clocks and their change per MHz."""
        rows = np.empty((len(self), self._ladders[0][2].shape[1]))
        slopes = np.empty_like(rows)
        for slots, ladder, table in self._ladders:
            at = clock_mhz[slots]
            above = np.maximum(np.searchsorted(ladder, at, side="right"), 1)
            above = np.minimum(above, len(ladder) - 1)
            below = np.maximum(above - 1, 0)
            span = np.maximum(ladder[above] - ladder[below], 1.0)
            part = np.minimum(np.maximum((at - ladder[below]) / span, 0.0), 1.0)
            rise = table[above] - table[below]
            rows[slots] = table[below] + part[:, None] * rise
            slopes[slots] = rise / span[:, None]
        return rows.view(PROFILE_DTYPE)[:, 0], slopes.view(PROFILE_DTYPE)[:, 0]

    def power(self, rows: Any, clock_mhz: F64, n: F64, lengths: Any) -> tuple[F64, F64, F64]:
        """Power of a decode slot and its slopes in n [W/req] and clock [W/GHz].

        `rows` are the coefficients at the clocks.
        """

        def at(rows: Any, batch: F64) -> F64:
            kv = batch * lengths.context_tok
            line, _ = decode_tangent(rows, rows, batch)
            step_s = line["decode_base_s"] + line["decode_req_s"] * batch + line["decode_kv_s"] * kv
            drawn: F64 = rows["decode_power_w"] + batch_j(rows, batch, kv) / step_s
            return drawn

        here = at(rows, n)
        low, high = self.clock_ghz
        up = np.minimum(clock_mhz + 15.0, 1000.0 * high)
        down = np.maximum(clock_mhz - 15.0, 1000.0 * low)
        rise_w = at(self.rows(up)[0], n) - at(self.rows(down)[0], n)
        by_f = 1000.0 * rise_w / np.maximum(up - down, 1.0)
        by_n = (at(rows, n * 1.01) - here) / (0.01 * n)
        return by_n, by_f, here

    # Prefill: rate and power

    def _rates(self) -> None:
        curves = [_rate_curve(one) for one in self.specs]
        self.rate_min = np.array([rate[0] for rate, _ in curves])
        self.rate_max = np.array([rate[-1] for rate, _ in curves])
        facets = [
            _lower_facets(np.concatenate([[0.0], rate]), np.concatenate([[one.idle_w], power]))
            for one, (rate, power) in zip(self.specs, curves, strict=True)
        ]
        self.facets: Sequence[tuple[F64, F64]] = [
            (
                np.array([facet[row][0] for facet in facets]),
                np.array([facet[row][1] for facet in facets]),
            )
            for row in range(_FACETS)
        ]
        self._curves = curves

    def rate_at(self, clock_mhz: F64) -> F64:
        """Thousand prompt tokens per second at these clocks."""
        return np.array(
            [
                np.interp(clock, one.clocks_mhz, rate)
                for clock, one, (rate, _) in zip(clock_mhz, self.specs, self._curves, strict=True)
            ]
        )

    def clock_of(self, rate_ktok_s: F64) -> F64:
        """Lowest clock with this rate."""
        return np.array(
            [
                one.clocks_mhz[min(int(np.searchsorted(rate, wanted - 1e-9)), len(rate) - 1)]
                for wanted, one, (rate, _) in zip(
                    rate_ktok_s, self.specs, self._curves, strict=True
                )
            ]
        )


def _kind(one: InstanceSpec) -> tuple[int, bytes, float]:
    return id(one.profile), one.clocks_mhz.tobytes(), one.idle_w


def _numbers(one: InstanceSpec) -> F64:
    """Coefficients as plain numbers, shape (n_clocks, n_columns)."""
    rows = np.ascontiguousarray(one.table)
    return rows.view(np.float64).reshape(len(rows), -1)


def _rate_curve(one: Any) -> tuple[F64, F64]:
    """Rate of full batches [ktok/s] and busy power per clock, rates not falling."""
    budget_tok = min(one.prefill_budget_tok, 2048)
    table = one.table
    time_s = table["prefill_base_s"] + table["prefill_tok_s"] * budget_tok
    rate = np.maximum.accumulate(budget_tok / time_s / 1e3)
    return rate, np.asarray(table["prefill_power_w"])


def _lower_facets(x: F64, y: F64) -> list[tuple[float, float]]:
    """Facets (slope, intercept) of the lower convex hull, `_FACETS` of them."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) >= (y[i] - y[a]) * (x[b] - x[a]):
                hull.pop()
            else:
                break
        if not hull or x[i] > x[hull[-1]]:
            hull.append(i)
    slopes = [((y[b] - y[a]) / (x[b] - x[a]), a) for a, b in pairwise(hull)]
    facets = [(float(slope), float(y[a] - slope * x[a])) for slope, a in slopes]
    # Tangents of a convex curve: leaving some out only lowers the bound.
    chosen = np.linspace(0, len(facets) - 1, _FACETS).round().astype(int)
    return [facets[k] for k in chosen]
