"""The lowest clock that meets the targets, for one instance or for the whole fleet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from voltana_ctrl.errors import ShapeError
from voltana_ctrl.predict.tables import FleetTables
from voltana_ctrl.types import FleetSpec, Slo
from voltana_ctrl.types._check import F64, positive


class ClockChooser:
    """Governor decisions from tables: EcoFreq's rules, per instance or for a fleet at once.

    A short ladder is searched from below; a long one by bisection, which is the same since
    tables are monotone in the clock.

    Parameters
    ----------
    fleet : FleetSpec
        The instances and their clocks.
    slo : Slo
        Targets.
    tables : FleetTables, optional
        What is believed; the fleet's profiles by default.
    ladder_mhz : sequence of float, optional
        Clocks to choose from, each raised to the next supported one. None: all.
    margin_frac : tuple of float
        Of TTFT and ITL: targets are divided by one plus this.

    Raises
    ------
    ShapeError
        If the tables are not of this fleet.
    ConfigError
        If a margin is not above -1.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> chooser = ClockChooser(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> chooser.fleet_mhz(running_req=[0, 100], kv_used_tok=[0, 40_000], waiting_tok=[2000, 0],
    ...                   oldest_wait_s=[0.1, 0.0])
    array([345., 330.])
    >>> chooser.one_mhz(1, 400, 180_000, 0.0, 0.0)
    945.0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        slo: Slo,
        tables: FleetTables | None = None,
        *,
        ladder_mhz: Sequence[float] | None = None,
        margin_frac: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        from voltana_ctrl._kernels.predict import lowest_clock, lowest_clocks

        self.tables = tables or FleetTables.of(fleet)
        n = len(fleet)
        if len(self.tables) != n:
            raise ShapeError(f"ClockChooser.tables: expected {n} instances, got {len(self.tables)}")
        for name, margin in zip(("ttft", "itl"), margin_frac, strict=True):
            positive(f"ClockChooser.margin_frac of {name}, plus one", 1.0 + margin)
        ladders = [one.clock_rows(ladder_mhz) for one in fleet.instances]
        longest = max(map(len, ladders))
        # Rows that may be chosen, short ladders filled up with their top row.
        self._rungs = np.stack(
            [
                self.tables.table[i, [*rows, *[rows[-1]] * (longest - len(rows))]]
                for i, rows in enumerate(ladders)
            ]
        )
        self._padded = self.tables.padded_req
        targets_s = (slo.ttft_s / (1.0 + margin_frac[0]), slo.itl_s / (1.0 + margin_frac[1]))
        self._limits = np.array([(*targets_s, one.prefill_budget_tok) for one in fleet.instances])
        self._min_mhz, self._max_mhz = fleet.min_mhz, fleet.max_mhz
        self._one, self._many = lowest_clock, lowest_clocks

    def one_mhz(
        self,
        instance: int,
        running_req: float,
        kv_used_tok: float,
        waiting_tok: float,
        oldest_wait_s: float,
    ) -> float:
        """Clock that one instance needs for its next iteration.

        Parameters
        ----------
        instance : int
            Index in the fleet; not checked, this is the fast path.
        running_req, kv_used_tok : float
            Requests that will decode and the KV tokens they hold.
        waiting_tok, oldest_wait_s : float
            Prompt tokens not prefilled yet, and how long the oldest has waited.
        """
        needed_mhz: float = self._one(
            self._rungs, self._padded, self._limits, instance, running_req, kv_used_tok,
            waiting_tok, oldest_wait_s,
        )  # fmt: skip
        return needed_mhz

    def fleet_mhz(
        self,
        *,
        running_req: ArrayLike,
        kv_used_tok: ArrayLike,
        waiting_tok: ArrayLike,
        oldest_wait_s: ArrayLike,
        floor_mhz: ArrayLike | None = None,
        ceiling_mhz: ArrayLike | None = None,
    ) -> F64:
        """Clock that every instance needs for its next iteration.

        Parameters
        ----------
        running_req, kv_used_tok, waiting_tok, oldest_wait_s : array_like, shape (n,)
            As of :meth:`one_mhz`.
        floor_mhz, ceiling_mhz : array_like, shape (n,), optional
            Range that the controller allows; the ceiling wins.

        Returns
        -------
        ndarray, shape (n,)
            Supported clocks, where floor and ceiling are.

        Raises
        ------
        ShapeError
            If an array is not of shape (n,).
        """
        out = np.empty_like(self._max_mhz)
        self._many(
            self._rungs,
            self._padded,
            self._limits,
            self._per_instance("running_req", running_req),
            self._per_instance("kv_used_tok", kv_used_tok),
            self._per_instance("waiting_tok", waiting_tok),
            self._per_instance("oldest_wait_s", oldest_wait_s),
            self._per_instance("floor_mhz", self._min_mhz if floor_mhz is None else floor_mhz),
            self._per_instance(
                "ceiling_mhz", self._max_mhz if ceiling_mhz is None else ceiling_mhz
            ),
            out,
        )
        return out

    def _per_instance(self, name: str, value: ArrayLike) -> F64:
        array = np.ascontiguousarray(value, dtype=np.float64)
        if array.shape != self._max_mhz.shape:
            raise ShapeError(
                f"ClockChooser.{name}: expected shape {self._max_mhz.shape}, got {array.shape}"
            )
        return array
