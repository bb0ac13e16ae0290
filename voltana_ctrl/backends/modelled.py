"""GPUs that exist on paper: clocks as decided, power as the profile predicts for the load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.errors import BackendError, ShapeError
from voltana_ctrl.estimate import FleetTables, predict_decode, predict_prefill
from voltana_ctrl.ports import Backend
from voltana_ctrl.types import Decision, FleetSpec, FleetState, Observation

__all__ = ["ModelledGpus"]


class ModelledGpus:
    """GPUs on paper, which draw what the profile predicts: for advice, and tests without GPUs.

    Engines under it do not slow down with the clock; only power and energy are modelled, at
    the load that :meth:`take_load` was told last.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, whose profiles predict power.
    now_s : callable
        Returns seconds that never go back.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> gpus = ModelledGpus(fleet)
    >>> gpus.apply(Decision.highest(fleet, floor_mhz=[1005.0, 705.0]))
    >>> gpus.read().state.freq_mhz
    array([1005.,  705.])
    """

    def __init__(self, fleet: FleetSpec, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._fleet = fleet
        self._now_s = now_s
        self._freq_mhz: F64 = np.array(fleet.max_mhz)
        self._idle_w = np.array([instance.idle_w for instance in fleet.instances])
        self._power_w: F64 = self._idle_w.copy()
        self._tables: FleetTables | None = None
        self._energy_j = np.zeros(len(fleet))
        self._t_s = now_s()
        self._closed = False

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    def take_load(self, state: FleetState) -> None:
        """Draw what this load draws from now on.

        Parameters
        ----------
        state : FleetState
            Queues, running requests and KV tokens of every instance; all else is left alone.
        """
        self._advance()
        if self._tables is None:
            self._tables = FleetTables.of(self._fleet)
        tables, power_w = self._tables, self._idle_w.copy()
        for i, instance in enumerate(self._fleet.instances):
            mhz = self._freq_mhz[i]
            if state.running_req[i] > 0.0 and instance.role.decodes:
                load = (state.running_req[i], state.kv_used_tok[i])
                power_w[i] = predict_decode(tables, i, mhz, *load).power_w
            elif state.queue_tok[i] > 0.0 and instance.role.prefills:
                tok = min(state.queue_tok[i], instance.prefill_budget_tok)
                power_w[i] = predict_prefill(tables, i, mhz, tok).power_w
        self._power_w = power_w

    def _advance(self) -> None:
        t_s = self._now_s()
        self._energy_j += self._power_w * max(0.0, t_s - self._t_s)
        self._t_s = t_s

    def read(self) -> Observation:
        """Clock, power and energy now; everything else is told as idle.

        Raises
        ------
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("ModelledGpus.read: it is closed; make a new one")
        self._advance()
        state = replace(
            FleetState.idle(len(self._fleet), t_s=max(0.0, self._t_s)),
            freq_mhz=self._freq_mhz,
            power_w=self._power_w,
            energy_j=self._energy_j,
        )
        return Observation(state=state)

    def apply(self, decision: Decision) -> None:
        """Take the clocks of a decision.

        Raises
        ------
        ShapeError
            If it is for another fleet.
        BackendError
            If it is closed.
        """
        if self._closed:
            raise BackendError("ModelledGpus.apply: it is closed; make a new one")
        if len(decision) != len(self._fleet):
            raise ShapeError(
                f"ModelledGpus.apply: expected {len(self._fleet)} instances, got {len(decision)}"
            )
        self._advance()
        self._freq_mhz = np.array(decision.freq_mhz)

    def close(self) -> None:
        """End it; may be called twice."""
        self._closed = True


if TYPE_CHECKING:
    _: type[Backend] = ModelledGpus
