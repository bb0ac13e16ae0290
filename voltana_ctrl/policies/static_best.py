"""``static-best``: the best setting that stays as it is, searched on requests of other seeds.

What an operator finds by hand with patience: how the machines are arranged, how many of them work,
and one clock per phase. The steady model says which settings could keep the promises and in what
order of power to try them; trial runs decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from voltana_ctrl.checks import F64, I64
from voltana_ctrl.control.curve import Curve, LeastPower
from voltana_ctrl.errors import ConfigError
from voltana_ctrl.policies.parts import Policy, PolicyParts, PolicySetup, Trials, balanced
from voltana_ctrl.types import Decision, FleetSpec, Load, Role, Slo
from voltana_ctrl.types.ladder import row_up

__all__ = ["static_best"]

#: Settings that are tried, at most.
_MOST_TRIALS = 20
#: A power budget may be exceeded in this share of the samples.
_MOST_OVER_FRAC = 1e-3
#: Clocks go up and down by this share of the ladder.
_STEP_FRAC = 0.03
#: A setting that the model puts so far above the best one found is not tried.
_HOPELESS_FRAC = 1.05


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Phase:
    """Who works in a phase, at what clock, and the power that the model expects."""

    members: I64
    freq_mhz: float
    power_w: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Setting:
    """One way to run the machines: a phase of a colocated fleet, two of any other."""

    fleet: FleetSpec
    phases: tuple[_Phase, ...]

    @property
    def power_w(self) -> float:
        """What the model expects it to draw."""
        return sum(phase.power_w for phase in self.phases)

    @property
    def clocks_mhz(self) -> tuple[float, ...]:
        """One per phase."""
        return tuple(phase.freq_mhz for phase in self.phases)

    def moved(self, phase: int, steps: int) -> _Setting:
        """The same with the clock of one phase so many steps up, or down; to the ladder's end."""
        one = self.phases[phase]
        ladder_mhz = _ladder_mhz(self.fleet, one.members)
        at = int(np.searchsorted(ladder_mhz, one.freq_mhz))
        to = at + steps * max(1, round(_STEP_FRAC * len(ladder_mhz)))
        phases = list(self.phases)
        to_mhz = float(ladder_mhz[min(max(to, 0), len(ladder_mhz) - 1)])
        phases[phase] = replace(one, freq_mhz=to_mhz)
        return replace(self, phases=tuple(phases))

    def policy(self) -> Policy:
        """As a run takes it."""
        return Policy(
            name="static-best",
            summary=self.told(),
            source="a setting",
            build=lambda *_: self.parts(),
        )

    def parts(self) -> PolicyParts:
        """Clocks that stay, the others parked; textbook routers."""
        freq_mhz, active = self.fleet.min_mhz.copy(), np.zeros(len(self.fleet), dtype=bool)
        for phase in self.phases:
            active[phase.members] = True
            for i in phase.members:
                clocks_mhz = self.fleet.instances[i].clocks_mhz
                freq_mhz[i] = clocks_mhz[row_up(clocks_mhz, phase.freq_mhz)]
        route_frac = active.astype(np.float64)
        for members in (self.fleet.prefill, self.fleet.decode):
            route_frac[members] /= route_frac[members].sum()
        still = Decision(
            t_s=0.0,
            freq_mhz=freq_mhz,
            freq_max_mhz=freq_mhz,
            route_frac=route_frac,
            active=active,
            price_j_req=np.zeros(len(self.fleet)),
        )
        routers = balanced(self.fleet, ())
        return replace(routers, first=still, governors=None, fleet=self.fleet, choice=self.told())

    def told(self) -> str:
        """What it is, in words."""
        if self.fleet.colocated:
            names: Sequence[str] = ("colocated",)
        else:
            names = ("prefill", "decode")
        return ", ".join(
            f"{len(phase.members)} {name} at {phase.freq_mhz:g} MHz"
            for name, phase in zip(names, self.phases, strict=True)
        )


def static_best(fleet: FleetSpec, slo: Slo, setup: PolicySetup) -> PolicyParts:
    """Search for the least energy per token that keeps the promises on the trial's requests.

    Half of the misses that the promise allows must be left in the worst of the trials, so that
    what is found keeps it with other requests, too. At most 20 settings are tried. Where none of
    them does, everybody runs at the highest clock.

    Parameters
    ----------
    fleet : FleetSpec
        The machines.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.
    setup : PolicySetup
        What is known of the run; its `trials` are needed.

    Raises
    ------
    ConfigError
        If there can be no trials.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, Slo, load_profile
    >>> from voltana_ctrl.policies import PolicySetup
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> static_best(fleet, Slo(ttft_s=0.6, itl_s=0.06), PolicySetup())
    Traceback (most recent call last):
    ...
    voltana_ctrl.errors.ConfigError: policy static-best: it is chosen by trial runs, which only
    the simulator has; run voltana-ctrl compare, and set the clocks that it names
    """
    if setup.trials is None:
        raise ConfigError(
            "policy static-best: it is chosen by trial runs, which only the simulator has; run"
            " voltana-ctrl compare, and set the clocks that it names"
        )
    search = _Search(setup.trials, slo)
    settings = sorted(_settings(fleet, setup.trials.load, slo), key=lambda one: one.power_w)
    for setting in settings:
        if search.spent or setting.power_w > _HOPELESS_FRAC * search.best_w:
            break
        search.around(setting)
    if search.best is not None:
        return search.best.parts()
    both = (fleet.decode,) if fleet.colocated else (fleet.prefill, fleet.decode)
    highest = tuple(
        _Phase(members=members, freq_mhz=float(fleet.max_mhz[members].max()), power_w=0.0)
        for members in both
    )
    return _Setting(fleet=fleet, phases=highest).parts()


class _Search:
    """Trial runs, each setting once, and the best that kept the promises."""

    def __init__(self, trials: Trials, slo: Slo) -> None:
        self._trials, self._wanted = trials, (1.0 + slo.attainment) / 2.0
        self._known: dict[str, tuple[tuple[float, ...], float]] = {}
        self.best: _Setting | None = None
        self.best_w = self._best_j = np.inf

    @property
    def spent(self) -> bool:
        return len(self._known) >= _MOST_TRIALS

    def around(self, setting: _Setting) -> None:
        """Up in growing steps until it keeps the promises, then down in shrinking ones."""
        steps = 1
        while not self.spent:
            met = self._try(setting)[0]
            if min(met) >= self._wanted:
                break
            higher = setting
            for phase, share in enumerate(met):
                if share < self._wanted:
                    higher = higher.moved(phase, steps)
            if higher.clocks_mhz == setting.clocks_mhz:
                return
            setting, steps = higher, 2 * steps
        for phase in reversed(range(len(setting.phases))):
            down = steps
            while down and not self.spent:
                lower = setting.moved(phase, -down)
                met, token_j = self._try(lower)
                if min(met) >= self._wanted and token_j < self._try(setting)[1]:
                    setting = lower
                else:
                    down //= 2

    def _try(self, setting: _Setting) -> tuple[tuple[float, ...], float]:
        """Share of requests in time by phase, the worst; energy per token, the mean."""
        key = setting.told()  # who is parked in which role makes no difference
        if key not in self._known:
            runs = self._trials.run(setting.policy())
            met = tuple(
                min(run[f"{part}_attainment"] or 0.0 for run in runs) for part in ("ttft", "itl")
            )
            if any((run["over_budget_frac"] or 0.0) > _MOST_OVER_FRAC for run in runs):
                met = 0.0, 0.0
            if len(setting.phases) == 1:
                met = (min(met),)
            token_j = float(np.mean([run["energy_per_token_j"] or np.inf for run in runs]))
            self._known[key] = met, token_j
            if min(met) >= self._wanted and token_j < self._best_j:
                self.best, self._best_j = setting, token_j
                self.best_w = float(np.mean([run["mean_power_w"] for run in runs]))
        return self._known[key]


def _settings(fleet: FleetSpec, load: Load, slo: Slo) -> Iterator[_Setting]:
    """Settings that the steady model takes for feasible, in every arrangement of the machines."""
    for arranged in _arrangements(fleet):
        if arranged.colocated:
            for phase in _phases(arranged, arranged.decode, load, slo):
                yield _Setting(fleet=arranged, phases=(phase,))
            continue
        options = [
            list(_phases(arranged, members, load, slo))
            for members in (arranged.prefill, arranged.decode)
        ]
        for phases in product(*options):
            yield _Setting(fleet=arranged, phases=phases)


def _arrangements(fleet: FleetSpec) -> Iterator[FleetSpec]:
    """The fleet as it is; and if its machines are equal, every other split into roles."""
    yield fleet
    kinds = {
        (id(one.profile), one.clocks_mhz.tobytes(), one.kv_capacity_tok, one.max_batch, one.idle_w)
        for one in fleet.instances
    }
    if len(kinds) > 1:
        return
    n = len(fleet)
    for prefill in range(n):
        roles = (
            [Role.PREFILL] * prefill + [Role.DECODE] * (n - prefill)
            if prefill
            else [Role.COLOCATED] * n
        )
        if prefill != len(fleet.prefill) or fleet.colocated != (prefill == 0):
            yield fleet.in_roles(roles)


def _phases(fleet: FleetSpec, members: I64, load: Load, slo: Slo) -> Iterator[_Phase]:
    """One to all members at the lowest clock at which the model keeps the promise."""
    curves: dict[tuple[int, bytes], Callable[[F64], Curve]] = {}
    for count in range(1, len(members) + 1):
        share = np.array([load.arrival_req_s / count])
        power_w = sum(fleet.instances[i].parked_w for i in members[count:])
        freq_mhz = 0.0
        for i in members[:count]:
            one = fleet.instances[i]
            key = id(one.profile), one.clocks_mhz.tobytes()
            if key not in curves:
                curves[key] = LeastPower(
                    one, slo, margin_frac=(0.0, 0.0), delay_s=0.0, governed=False
                ).at(load.lengths)
            curve = curves[key](share)
            power_w += float(curve.power_w[0])
            if not np.isfinite(power_w):
                break
            freq_mhz = max(freq_mhz, float(one.clocks_mhz[curve.floor_row[0]]))
        else:
            yield _Phase(members=members[:count], freq_mhz=freq_mhz, power_w=power_w)


def _ladder_mhz(fleet: FleetSpec, members: I64) -> np.ndarray:
    return np.unique(np.concatenate([fleet.instances[i].clocks_mhz for i in members]))
