"""What a controller says: clocks, shares, who is active, and whether to believe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from voltana_ctrl.checks import (
    F64,
    Bool,
    fraction,
    freeze_fields,
    frozen_array,
    not_negative,
    positive,
)
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.types.actuators import Limits
from voltana_ctrl.types.backlog import Admission
from voltana_ctrl.types.belief import Belief
from voltana_ctrl.types.fleet import FleetSpec
from voltana_ctrl.types.instance import Role
from voltana_ctrl.types.observation import Observation
from voltana_ctrl.types.rest import DEPTHS, Depth


class Status(Enum):
    """Whether a decision may be applied; the value is the advice.

    Examples
    --------
    >>> Status.INFEASIBLE.value
    'no plan meets the limits: raise the power budget, relax the SLO or add instances'
    """

    OK = "apply it"
    INFEASIBLE = "no plan meets the limits: raise the power budget, relax the SLO or add instances"
    INACCURATE = "the solver stopped before it was sure: raise its iteration limit"
    DEADLINE = "the plan came too late: lengthen the period or shorten the horizon"
    STALE = "readings are too old to plan on: look at the telemetry of the stale instances"
    FAILED = "the controller raised an error: look at the log, which has it in full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Promises to users.

    Parameters
    ----------
    ttft_s : float
        Time to first token that counts as met; at most 600.
    itl_s : float
        Mean inter-token latency of a request that counts as met; at most 5.
    attainment : float
        Fraction of requests that must meet each.

    Raises
    ------
    ConfigError
        If a value is not positive, or so large that it must be milliseconds, or the attainment
        not between 0 and 1.

    Examples
    --------
    >>> Slo(ttft_s=0.6, itl_s=0.06)
    Slo(ttft_s=0.6, itl_s=0.06, attainment=0.99)
    >>> Slo.parse("ttft=0.6,itl=0.06").itl_s
    0.06
    """

    ttft_s: float
    itl_s: float
    attainment: float = 0.99

    def __post_init__(self) -> None:
        positive("Slo.ttft_s", self.ttft_s)
        positive("Slo.itl_s", self.itl_s)
        for name, value_s, most_s in (("ttft", self.ttft_s, 600.0), ("itl", self.itl_s, 5.0)):
            if value_s > most_s:
                raise ConfigError(
                    f"Slo.{name}_s: expected seconds, at most {most_s:g}, got {value_s:g}; if that"
                    f" is milliseconds, say {value_s / 1e3:g}"
                )
        fraction("Slo.attainment", self.attainment)

    @classmethod
    def parse(cls, text: str) -> Slo:
        """SLO from ``ttft=0.6,itl=0.06,attainment=0.99``, in seconds.

        Parameters
        ----------
        text : str
            `ttft` and `itl` must be there; `attainment` is 0.99 if left out.

        Raises
        ------
        ConfigError
            Naming the part that does not fit.

        Examples
        --------
        >>> Slo.parse("ttft=1,itl=0.1,attainment=0.95")
        Slo(ttft_s=1.0, itl_s=0.1, attainment=0.95)
        """
        values = {"attainment": 0.99}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in ("ttft", "itl", "attainment"):
                raise ConfigError(
                    f"slo: expected ttft=SECONDS,itl=SECONDS,attainment=FRACTION, got {part!r}"
                )
            try:
                values[key] = float(value)
            except ValueError:
                raise ConfigError(f"slo: {key}: expected a number, got {value!r}") from None
        missing = sorted({"ttft", "itl"} - set(values))
        if missing:
            raise ConfigError(f"slo: {missing[0]} is missing in {text!r}; add {missing[0]}=SECONDS")
        return cls(ttft_s=values["ttft"], itl_s=values["itl"], attainment=values["attainment"])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """What a controller asks for until its next tick.

    Parameters
    ----------
    t_s : float
        When it was made.
    freq_mhz : ndarray, shape (n,)
        Lowest clock of each instance: its clock where no governor runs, else the floor.
    freq_max_mhz : ndarray, shape (n,)
        Highest clock a governor may choose.
    route_frac : ndarray, shape (n,)
        Share of new work, summing to 1 over each phase; instances not active get 0.
    active : ndarray of bool, shape (n,)
        Whether the instance takes new work; the others drain and idle.
    price_j_req : ndarray, shape (n,)
        Marginal energy of one more request there, which routers compare.
    limits : Limits, optional
        What other actuators (power cap, memory and CPU clock) are set to; what is left out is as it
        was found.
    belief : Belief, optional
        What governors and routers should believe about the instances; without one they keep what
        they believed.
    announced : tuple of (after_s, ceiling_mhz)
        Ceilings, of shape (n,), that follow by themselves so many seconds after the decision, for
        those who outlive the controller.
    depth : tuple of {"parked", "deep_parked", "asleep", "off"}, optional
        How deep each instance sleeps while it is parked and empty; "parked" where it is left out.
        One that has no such sleep takes the next less deep one that it has.
    roles : tuple of Role, optional
        What each instance is to do from now on: it drains first, and takes no new work meanwhile if
        anybody else can. As they are where it is left out.
    admission : Admission, optional
        How fast requests that may wait are let in; at once where it is left out.
    status : Status
        Anything but OK is never applied.

    Raises
    ------
    ShapeError, ConfigError
        If arrays differ in length, hold NaN, or a floor lies above its ceiling.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("2P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> Decision.highest(fleet).route_frac
    array([0.5, 0.5, 0.5, 0.5])
    """

    t_s: float
    freq_mhz: F64
    freq_max_mhz: F64
    route_frac: F64
    active: Bool
    price_j_req: F64
    limits: Limits | None = None
    belief: Belief | None = None
    announced: tuple[tuple[float, F64], ...] = ()
    depth: tuple[Depth, ...] | None = None
    roles: tuple[Role, ...] | None = None
    admission: Admission | None = None
    status: Status = Status.OK

    def __post_init__(self) -> None:
        not_negative("Decision.t_s", self.t_s)
        shape = (np.asarray(self.freq_mhz).size,)
        names = ("freq_mhz", "freq_max_mhz", "route_frac", "price_j_req")
        freeze_fields(self, names, shape)
        freeze_fields(self, ("active",), shape, np.bool_)
        for name in names:
            if not np.isfinite(getattr(self, name)).all():
                raise ShapeError(f"Decision.{name}: expected finite numbers, got NaN or infinity")
        announced = tuple(
            (float(after_s), frozen_array("Decision.announced", ceiling_mhz, shape))
            for after_s, ceiling_mhz in self.announced
        )
        object.__setattr__(self, "announced", announced)
        if self.belief is not None and len(self.belief) != shape[0]:
            raise ShapeError(
                f"Decision.belief: expected one about {shape[0]} instances, got one about"
                f" {len(self.belief)}"
            )
        if self.depth is not None:
            self._check_depth(shape[0])
        if self.roles is not None:
            object.__setattr__(self, "roles", tuple(self.roles))
            if len(self.roles) != shape[0] or not all(isinstance(r, Role) for r in self.roles):
                raise ShapeError(
                    f"Decision.roles: expected a Role of {shape[0]} instances each, got"
                    f" {self.roles!r}"
                )
        if np.any(self.freq_mhz > self.freq_max_mhz):
            raise ConfigError(
                "Decision.freq_mhz: expected the floor at or below the ceiling, got"
                f" {self.freq_mhz} above {self.freq_max_mhz}; lower the floor"
            )
        if np.any(self.route_frac < 0.0):
            raise ConfigError(f"Decision.route_frac: expected shares >= 0, got {self.route_frac}")

    def _check_depth(self, n: int) -> None:
        depth = tuple(self.depth or ())
        if len(depth) != n:
            raise ShapeError(f"Decision.depth: expected one of {n} instances each, got {depth!r}")
        for name in depth:
            if name not in DEPTHS:
                raise ConfigError(
                    f"Decision.depth: expected names out of {', '.join(DEPTHS)}, got {name!r}"
                )
        object.__setattr__(self, "depth", depth)

    def __len__(self) -> int:
        return len(self.freq_mhz)

    @classmethod
    def highest(
        cls,
        fleet: FleetSpec,
        *,
        t_s: float = 0.0,
        floor_mhz: F64 | None = None,
        ceiling_mhz: F64 | None = None,
        status: Status = Status.OK,
    ) -> Decision:
        """Fail-safe: everybody active, equal shares, highest clock (or `floor_mhz` up).

        Parameters
        ----------
        fleet : FleetSpec
            The fleet.
        t_s : float
            When it is made, on the loop's clock.
        floor_mhz, ceiling_mhz : ndarray, shape (n,), optional
            Lowest and highest clocks; the ceiling is the highest supported clock if left out, the
            floor is the ceiling.
        status : Status
            Whether it may be applied.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> Decision.highest(fleet).freq_mhz
        array([1410., 1410.])
        """
        ceiling = fleet.max_mhz if ceiling_mhz is None else ceiling_mhz
        n = len(fleet)
        share = np.zeros(n)
        for members in (fleet.prefill, fleet.decode):
            share[members] = 1.0 / len(members)
        return cls(
            t_s=t_s,
            freq_mhz=ceiling if floor_mhz is None else floor_mhz,
            freq_max_mhz=ceiling,
            route_frac=share,
            active=np.ones(n, bool),
            price_j_req=np.zeros(n),
            status=status,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TickRecord:
    """One turn of the loop, as observers see it.

    Parameters
    ----------
    number : int
        Number of the tick, from 0.
    observation : Observation
        What was read.
    proposed, applied : Decision
        What the controller asked for, and what the guard let through.
    in_force : bool
        Whether the backend carried `applied` out; False where it only watches, or was released.
    interventions : tuple of str
        What the guard changed, in words.
    decide_s, tick_s : float
        Time spent deciding, and in the whole tick.
    missed : int
        Deadlines skipped before this tick.
    notes : mapping of str to float
        Whatever the controller wants seen (margins, solver iterations).

    Examples
    --------
    >>> TickRecord.__dataclass_fields__["missed"].default
    0
    """

    number: int
    observation: Observation
    proposed: Decision
    applied: Decision
    in_force: bool = True
    interventions: tuple[str, ...] = ()
    decide_s: float = 0.0
    tick_s: float = 0.0
    missed: int = 0
    notes: Mapping[str, float] = field(default_factory=dict)
