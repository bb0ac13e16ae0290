"""The one veto between what a controller asks for and what is applied."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, positive
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    LimitRanges,
    Limits,
    Observation,
    Role,
    Status,
)
from voltana_ctrl.types.fleet import KV_FULL_FRAC
from voltana_ctrl.types.ladder import row_down, row_up

__all__ = ["Guard"]


class Guard:
    """Makes every decision safe to apply; pure and idempotent.

    Order of precedence: supported clock, then the power ceiling, then the SLO, then energy.
    A ceiling is rounded down to a supported clock, or up to the lowest if it is below that, and may
    fall at once. A floor is rounded up to a supported clock and falls no faster than the slew,
    but never lies above the ceiling.

    A decision is replaced if its status is not OK, or if the readings of all instances are older
    than `stale_s`. The decision applied last stands in until it is `hold_s` old, after that the
    highest clocks with equal shares. No stand-in passes the ceiling that held last, nor the one of
    the decision that it replaces.

    Dead, parked and full instances get no new work while another of their phase is left. In a
    phase where nobody may work, everybody who lives must. Roles that cannot be had are left out.

    Parameters
    ----------
    spec : FleetSpec
        The fleet.
    slew_mhz_s : float
        How many MHz a floor may fall per second; the default is too much to bind.
    stale_s : float
        Age of readings; where those of all instances are older, the decision is replaced.
    hold_s : float
        How long the last decision stands in for one that may not be applied.
    kv_full_frac : float
        An instance this full gets no new work while others are left.
    ranges : LimitRanges, optional
        What other actuators may be set to: a cap below the lowest is raised to it, a memory
        clock to the next one there is, and what cannot be set is left as it was found. Without,
        limits pass, and the backend refuses what it does not support.

    Raises
    ------
    ConfigError
        If a setting is not positive.
    ShapeError
        If `ranges` are of another fleet.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, FleetState, Guard, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> wish = Decision.highest(fleet, floor_mhz=[1001.0, 222.0])
    >>> Guard(fleet).shield(wish, Observation(state=FleetState.idle(2)), None).freq_mhz
    array([1005.,  225.])
    """

    def __init__(
        self,
        spec: FleetSpec,
        *,
        slew_mhz_s: float = 1e9,
        stale_s: float = 2.0,
        hold_s: float = 1.0,
        kv_full_frac: float = KV_FULL_FRAC,
        ranges: LimitRanges | None = None,
    ) -> None:
        positive("Guard.slew_mhz_s", slew_mhz_s)
        positive("Guard.stale_s", stale_s)
        positive("Guard.hold_s", hold_s)
        positive("Guard.kv_full_frac", kv_full_frac)
        if ranges is not None and len(ranges.mem_clocks_mhz) != len(spec):
            raise ShapeError(
                f"Guard.ranges: expected {len(spec)} instances, got {len(ranges.mem_clocks_mhz)}"
            )
        self.spec = spec
        self.ranges = ranges
        self.slew_mhz_s = slew_mhz_s
        self.stale_s = stale_s
        self.hold_s = hold_s
        self.kv_full_frac = kv_full_frac
        self._phases = (np.array(spec.prefill), np.array(spec.decode))
        self._kv_capacity_tok = spec.kv_capacity_tok
        self._clocks_mhz = [instance.clocks_mhz for instance in spec.instances]

    def shield(
        self, proposed: Decision, observation: Observation, last: Decision | None
    ) -> Decision:
        """Decision that may be applied.

        Parameters
        ----------
        proposed : Decision
            What the controller asks for.
        observation : Observation
            What it was made on.
        last : Decision, optional
            The decision that was applied last; None at the first tick.

        Returns
        -------
        Decision
            The proposed one, made safe. If a stand-in replaces it, its status says why
            (``STALE``, ``FAILED``, ...); a decision that is held keeps its own `t_s`.
        """
        state = observation.state
        status = proposed.status
        if status is Status.OK and np.all(state.age_s > self.stale_s):
            status = Status.STALE
        base = proposed if status is Status.OK else self._stand_in(proposed, state, last)
        ceiling_mhz = self._ceilings(base.freq_max_mhz)
        floor_mhz = self._floors(base.freq_mhz, ceiling_mhz, state, last)
        roles = self._roles(base)
        route_frac, active = self._shares(base, state, roles or observation.roles)
        return replace(
            base,
            freq_mhz=floor_mhz,
            freq_max_mhz=ceiling_mhz,
            route_frac=route_frac,
            active=active,
            roles=roles,
            limits=base.limits if self.ranges is None else self.ranges.held(base.limits),
            status=status,
            # One that is held keeps its time, or it would be held for ever.
            t_s=base.t_s,
        )

    def changes(self, proposed: Decision, applied: Decision) -> tuple[str, ...]:
        """What :meth:`shield` changed, in words; empty if nothing that matters.

        That a clock was rounded to a supported one does not.
        """
        said = []
        if proposed.status is not applied.status or applied.status is not Status.OK:
            said.append(f"replaced: {applied.status.name.lower()}")
        elif np.any(applied.freq_mhz > self._ceilings_up(proposed.freq_mhz)):
            said.append("floor held by slew")
        if proposed.roles != applied.roles:
            said.append("roles")
        if not np.array_equal(proposed.active, applied.active):
            said.append("active set")
        if np.any(np.abs(proposed.route_frac - applied.route_frac) > 1e-6):
            said.append("shares")
        if self.ranges is not None and not _same(proposed.limits, applied.limits):
            said.append("limits")
        return tuple(said)

    def _stand_in(self, proposed: Decision, state: FleetState, last: Decision | None) -> Decision:
        # A ceiling that has just been lowered holds even where the rest cannot be believed:
        # better slow than a tripped breaker.
        ceiling_mhz = proposed.freq_max_mhz
        if last is not None:
            ceiling_mhz = np.minimum(ceiling_mhz, last.freq_max_mhz)
            if 0.0 <= state.t_s - last.t_s <= self.hold_s:
                floor_mhz = np.minimum(last.freq_mhz, ceiling_mhz)
                return replace(last, freq_mhz=floor_mhz, freq_max_mhz=ceiling_mhz)
        return Decision.highest(self.spec, t_s=proposed.t_s, ceiling_mhz=ceiling_mhz)

    def _ceilings(self, wanted_mhz: F64) -> F64:
        """Highest supported clock at or below each; the lowest there is if none."""
        return np.array(
            [
                clocks[row_down(clocks, wanted)]
                for clocks, wanted in zip(self._clocks_mhz, wanted_mhz, strict=True)
            ]
        )

    def _ceilings_up(self, wanted_mhz: F64) -> F64:
        """Lowest supported clock at or above each; the highest there is if none."""
        return np.array(
            [
                clocks[row_up(clocks, wanted)]
                for clocks, wanted in zip(self._clocks_mhz, wanted_mhz, strict=True)
            ]
        )

    def _floors(
        self, wanted_mhz: F64, ceiling_mhz: F64, state: FleetState, last: Decision | None
    ) -> F64:
        if last is not None:
            span_s = max(0.0, state.t_s - last.t_s)
            wanted_mhz = np.maximum(wanted_mhz, last.freq_mhz - self.slew_mhz_s * span_s)
        return np.minimum(self._ceilings_up(wanted_mhz), ceiling_mhz)

    def _roles(self, base: Decision) -> tuple[Role, ...] | None:
        """Roles that everybody can have and that leave nobody out; else as they are."""
        try:
            self.spec.check_roles(base.roles or [one.role for one in self.spec.instances])
        except ConfigError:
            return None
        return base.roles

    def _members(self, roles: tuple[Role, ...] | None) -> tuple[I64, I64]:
        """Who prefills and who decodes."""
        if roles is None:
            return self._phases
        prefill = np.flatnonzero([role.prefills for role in roles])
        return prefill, np.flatnonzero([role.decodes for role in roles])

    def _shares(
        self, base: Decision, state: FleetState, roles: tuple[Role, ...] | None
    ) -> tuple[F64, Bool]:
        """Shares on the simplex of each phase; none to the dead, the parked and the full."""
        active = base.active & state.alive
        route_frac = np.zeros(len(active))
        full = state.kv_used_tok > self.kv_full_frac * self._kv_capacity_tok
        for members in self._members(roles):
            if not active[members].any():
                # Nobody of this phase may work: everybody who lives must.
                active[members] = state.alive[members] if state.alive[members].any() else True
            for able in (active & ~full, active):
                share = np.where(able[members], base.route_frac[members], 0.0)
                if share.sum() <= 0.0:
                    share = able[members].astype(float)
                if share.sum() > 0.0:
                    break
            route_frac[members] = share / share.sum()
        return route_frac, active


def _same(first: Limits | None, second: Limits | None) -> bool:
    """Whether two decisions set other actuators alike; infinity sets nothing."""
    for name in ("mem_mhz", "power_cap_w", "cpu_mhz"):
        wanted, applied = (getattr(each, name, None) for each in (first, second))
        nothing = np.inf
        if not np.all(
            (nothing if wanted is None else wanted) == (nothing if applied is None else applied)
        ):
            return False
    return True
