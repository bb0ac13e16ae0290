"""How far clocks may come down on a fleet that runs: step by step, and up again where users suffer.

A policy that is right about its engines may lower a clock at once. Whether it is right is not known
before it has acted, so every instance begins at its highest clock, and what it may run at comes
down one step per settled observation. Ceilings of a power budget, and clocks that a policy fixes
(floor and ceiling alike), hold from the start. It returns to the highest, with the reason in the
log,

- where requests have missed their promise for a while more often than chance allows, and go on
  doing so (a burst that is over is no reason), and
- where the engine does not take the time that its profile says: such a profile must be fitted anew
  before anything is lowered on its word.

An instance whose iterations are told is at its highest clock until enough of them were compared
with its profile; it comes down only where the two agree.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, Bool, positive
from voltana_ctrl.control.base import Controller
from voltana_ctrl.laws import decode_s, prefill_s
from voltana_ctrl.ports import controller_extras
from voltana_ctrl.types import Decision, IterationBatch, Observation, RequestBatch, Slo

__all__ = ["Descent", "DescentMemory"]

_log = logging.getLogger(__name__)

#: Steps from the highest clock to the lowest.
_STEPS = 20
#: Times in promises of TTFT: between two steps, how long misses must last, and what is remembered.
_SETTLE_TTFT, _LASTING_TTFT, _MEMORY_TTFT = 0.5, 10.0, 50.0
#: Standard deviations, and requests, by which misses must exceed what was promised.
_BEYOND_SD, _LEAST_MISSED = 3.0, 3.0
#: The same of those after a burst, which were looked at for a reason.
_GOES_ON_SD = 2.0
#: Readings older than this settle nothing.
_FRESH_S = 2.0
_DECODE, _PREFILL = 0, 1
_PHASES = ("decode", "prefill")
#: Iterations of decode and of prefill, which are rarer, after which a profile is held to what it
#: says, and how many are remembered.
_JUDGED, _REMEMBERED = np.array([[40], [15]]), 100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DescentMemory:
    """How far each instance has come down, and what speaks against it.

    Parameters
    ----------
    inner : object
        Memory of the policy.
    lid_mhz : ndarray, shape (n,)
        Clock below which nothing is asked for yet.
    stepped_s : ndarray, shape (n,)
        Time of its last step; after a return, the time from which it may come down again.
    judged_req, missed_req : ndarray, shape (2, n)
        Requests that finished and those of them that missed, TTFT and ITL, forgetting the old.
    missing_s : ndarray, shape (n,)
        Since when misses are more than chance allows; infinite where they are not.
    since_req, since_missed_req : ndarray, shape (2, n)
        Requests that were served later than half of the time that misses must last after that,
        and those of them that missed.
    passes, log_pace_frac : ndarray, shape (2, n)
        Iterations compared with the profile, decode and prefill, and the mean logarithm of their
        ratio.
    strange : ndarray of bool, shape (2, n)
        Where the profile is not believed, decode and prefill; once it is not, only when it is right
        to within half the band again.
    clock_mhz : ndarray, shape (n,)
        Clock of the latest iteration; 0 before the first.
    returned : ndarray, shape (n,)
        How often it returned to the highest clock.
    t_s : float
        Time of the last decision in seconds.
    """

    inner: Any
    lid_mhz: F64
    stepped_s: F64
    judged_req: F64
    missed_req: F64
    missing_s: F64
    since_req: F64
    since_missed_req: F64
    passes: I64
    log_pace_frac: F64
    strange: Bool
    clock_mhz: F64
    returned: I64
    t_s: float = -np.inf

    @property
    def pace_frac(self) -> F64:
        """Time of an iteration over what the profile says, (2, n); 1 until enough were seen."""
        return np.where(self.passes >= _JUDGED, np.exp(self.log_pace_frac), 1.0)


class Descent(Controller):
    """A policy whose clocks come down step by step, and go up again where it is wrong.

    Parameters
    ----------
    inner : Controller
        The policy.
    slo : Slo
        Promises on TTFT and ITL. The time between two steps is half the TTFT.
    band_frac : float
        Factor less 1 by which iterations may take longer or shorter than the profile says, on
        average, before it is not believed: 0.2 is from 1/1.2 to 1.2 times its time.
    budgeted : bool
        Whether there is a power budget. Its ceilings hold, and so does a fixed clock; those below
        which a governor chooses come down with the clock.

    Raises
    ------
    ConfigError
        If the band is not positive.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
    >>> from voltana_ctrl.live.governed import fleet_policy
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> slo = Slo(ttft_s=0.6, itl_s=0.06)
    >>> descent = Descent(fleet_policy(fleet, slo, "mpc"), slo)
    >>> memory = descent.init()
    >>> for k in range(40):
    ...     seen = Observation(state=FleetState.idle(2, t_s=0.5 * k))
    ...     decision, memory = descent.decide(seen, memory)
    ...     if k in (0, 5, 39):
    ...         print(decision.freq_mhz)
    [1410. 1410.]
    [1110. 1110.]
    [210. 210.]
    """

    def __init__(
        self, inner: Controller, slo: Slo, *, band_frac: float = 0.2, budgeted: bool = False
    ) -> None:
        super().__init__(inner.fleet, period_s=inner.period_s)
        positive("Descent.band_frac", band_frac)
        self.inner, self.slo, self.band_frac = inner, slo, band_frac
        self.budgeted = budgeted
        self._inner_notes = controller_extras(inner).notes
        self._step_mhz = (self.fleet.max_mhz - self.fleet.min_mhz) / _STEPS
        self._decodes = np.array([one.role.decodes for one in self.fleet.instances])
        self._padded = [one.profile.padded_batch(one.max_batch) for one in self.fleet.instances]
        self._latest: tuple[DescentMemory, F64] | None = None

    def init(self) -> DescentMemory:
        """Memory before the first decision: everybody at the highest clock."""
        n = len(self.fleet)
        return DescentMemory(
            inner=self.inner.init(),
            lid_mhz=self.fleet.max_mhz,
            stepped_s=np.full(n, -np.inf),
            judged_req=np.zeros((2, n)),
            missed_req=np.zeros((2, n)),
            missing_s=np.full(n, np.inf),
            since_req=np.zeros((2, n)),
            since_missed_req=np.zeros((2, n)),
            passes=np.zeros((2, n), np.int64),
            log_pace_frac=np.zeros((2, n)),
            strange=np.zeros((2, n), bool),
            clock_mhz=np.zeros(n),
            returned=np.zeros(n, np.int64),
        )

    def notes(self, memory: DescentMemory) -> Mapping[str, float]:
        """Where the descent stands, beside what the policy notes.

        Parameters
        ----------
        memory : DescentMemory
            What the latest decision returned.

        Returns
        -------
        mapping of str to float
            ``descending``, instances that are not allowed their lowest clock yet;
            ``returned_to_highest``, returns of all instances so far; ``profile_not_believed`` and
            ``profile_not_compared_yet``, instances that stay at the highest clock for that.
        """
        return {
            **self._inner_notes(memory.inner),
            "descending": float(np.sum(memory.lid_mhz > self.fleet.min_mhz)),
            "returned_to_highest": float(memory.returned.sum()),
            "profile_not_believed": float(np.sum(memory.strange.any(axis=0))),
            "profile_not_compared_yet": float(np.sum(self._unproven(memory))),
        }

    def reasons(self) -> dict[str, str]:
        """What kept instances from the clocks of the policy at the latest decision, in words.

        Returns
        -------
        dict of str to str
            By the id of the instance; those that run as the policy says are left out.
        """
        if self._latest is None:
            return {}
        memory, wanted_mhz = self._latest
        told, unproven = {}, self._unproven(memory)
        for i, name in enumerate(self.fleet.ids):
            wait_s = memory.stepped_s[i] - memory.t_s
            if memory.strange[:, i].any():
                phase = int(np.argmax(memory.strange[:, i]))
                told[name] = (
                    f"its {_PHASES[phase]} iterations take {memory.pace_frac[phase, i]:.2f} times"
                    " what its profile says: it stays at its highest clock until it has a profile"
                    " that is right (`voltana-ctrl profile`, then `fit`)"
                )
            elif unproven[i]:
                phase = _DECODE if self._decodes[i] else _PREFILL
                told[name] = (
                    f"its profile is compared with its engine first, {memory.passes[phase, i]} of"
                    f" {_JUDGED[phase, 0]} {_PHASES[phase]} iterations so far, at its highest clock"
                )
            elif memory.lid_mhz[i] <= wanted_mhz[i]:
                continue
            elif np.isfinite(wait_s) and wait_s > 0.0:
                told[name] = (
                    "requests missed their promise, or its profile was wrong: it is back at its"
                    f" highest clock, and comes down again step by step in {wait_s:.0f} s"
                )
            elif np.isfinite(memory.missing_s[i]):
                told[name] = (
                    "its requests miss their promise more often than agreed: it comes no lower than"
                    f" {memory.lid_mhz[i]:.0f} MHz for now"
                )
            else:
                told[name] = (
                    "it comes down step by step from its highest clock, to"
                    f" {memory.lid_mhz[i]:.0f} MHz so far"
                )
        return told

    def _decide(
        self, observation: Observation, memory: DescentMemory
    ) -> tuple[Decision, DescentMemory]:
        decision, inner = self.inner.decide(observation, memory.inner)
        memory = self._judged(observation.finished, observation.state.t_s, memory)
        before = memory.strange
        memory = self._compared(observation.iterations, memory)
        now = memory.strange
        for phase, i in np.argwhere(now & ~before):
            _log.warning("voltana-ctrl: %s", self._disbelief(int(phase), int(i), memory))
        for i in np.flatnonzero(before.any(axis=0) & ~now.any(axis=0)):
            _log.warning(
                "voltana-ctrl: %s: its iterations take the time that its profile says again: its"
                " clock comes down step by step", self.fleet.ids[i],
            )  # fmt: skip
        memory = self._moved(observation, replace(memory, inner=inner))
        most_mhz = decision.freq_max_mhz
        if not self.budgeted:
            # Where no governor chooses, the policy's clock is fixed, and holds from the start.
            chooses = decision.freq_mhz < most_mhz
            most_mhz = np.where(chooses, np.maximum(most_mhz, memory.lid_mhz), most_mhz)
        lid_mhz = np.minimum(memory.lid_mhz, most_mhz)
        self._latest = memory, decision.freq_mhz
        clocks_mhz = np.maximum(decision.freq_mhz, lid_mhz)
        return replace(decision, freq_mhz=clocks_mhz, freq_max_mhz=most_mhz), memory

    def _judged(self, done: RequestBatch, t_s: float, memory: DescentMemory) -> DescentMemory:
        """Count who missed, where; and since when that is more than chance allows."""
        keep = 1.0
        if np.isfinite(memory.t_s):
            keep = float(np.exp(-max(0.0, t_s - memory.t_s) / (_MEMORY_TTFT * self.slo.ttft_s)))
        # A request is told when it is done. What it waited for was earlier: by its answer for
        # the first token, by half of it for the others.
        answer_s = done.itl_s * np.maximum(done.output_tok - 1.0, 0.0)
        later_s = memory.missing_s + 0.5 * _LASTING_TTFT * self.slo.ttft_s
        new, new_missed, later, later_missed = np.zeros((4, *memory.judged_req.shape))
        for row, (told_s, promised_s, where, ago_s) in enumerate(
            (
                (done.ttft_s, self.slo.ttft_s, done.prefill_instance, answer_s),
                (done.itl_s, self.slo.itl_s, done.decode_instance, 0.5 * answer_s),
            )
        ):
            known = where >= 0
            at, missed_it = where[known], (told_s > promised_s)[known].astype(float)
            # A burst may go on for a while after it was noticed.
            counts = (t_s - ago_s[known] >= later_s[at]).astype(float)
            np.add.at(new[row], at, 1.0)
            np.add.at(new_missed[row], at, missed_it)
            np.add.at(later[row], at, counts)
            np.add.at(later_missed[row], at, counts * missed_it)
        judged = keep * memory.judged_req + new
        missed = keep * memory.missed_req + new_missed
        allowed = (1.0 - self.slo.attainment) * judged
        beyond = allowed + _BEYOND_SD * np.sqrt(np.maximum(allowed, 1.0)) + _LEAST_MISSED
        missing = (missed > beyond).any(axis=0)
        return replace(
            memory,
            judged_req=judged,
            missed_req=missed,
            missing_s=np.where(missing, np.minimum(memory.missing_s, t_s), np.inf),
            since_req=np.where(missing, memory.since_req + later, 0.0),
            since_missed_req=np.where(missing, memory.since_missed_req + later_missed, 0.0),
            t_s=t_s,
        )

    def _compared(self, done: IterationBatch, memory: DescentMemory) -> DescentMemory:
        """Hold the profile against iterations of one phase, at a clock that did not change."""
        chosen = (done.wall_s > 0.0) & (done.freq_mhz > 0.0) & (done.instance >= 0)
        chosen &= done.instance < len(self.fleet)
        if not chosen.any():
            return memory
        passes, log_pace_frac = memory.passes.copy(), memory.log_pace_frac.copy()
        clock_mhz = memory.clock_mhz.copy()
        for i in np.unique(done.instance[chosen]):
            mine = np.flatnonzero(chosen & (done.instance == i))
            clocks = done.freq_mhz[mine]
            same = clocks == np.append(clock_mhz[i], clocks[:-1])
            clock_mhz[i] = clocks[-1]
            decodes = (done.batch_req[mine] > 0.0) & (done.prefill_tok[mine] == 0.0)
            prefills = (done.batch_req[mine] == 0.0) & (done.prefill_tok[mine] > 0.0)
            for phase, ours in ((_DECODE, decodes), (_PREFILL, prefills)):
                rows = mine[same & ours]
                if not rows.size:
                    continue
                least_s, most_s = self._expected_s(int(i), phase, done, rows)
                wall_s = done.wall_s[rows]
                # The middle one: an iteration that something held up is no witness.
                ratio = float(np.median(np.log(wall_s / np.clip(wall_s, least_s, most_s))))
                before, new = min(passes[phase, i], _REMEMBERED), rows.size
                log_pace_frac[phase, i] += (ratio - log_pace_frac[phase, i]) * new / (before + new)
                passes[phase, i] += new
        # Two bounds, so that a pace between them does not go to and fro.
        off, outer = np.abs(log_pace_frac), np.log1p(self.band_frac)
        inner = np.log1p(0.5 * self.band_frac)
        strange = (passes >= _JUDGED) & (off > np.where(memory.strange, inner, outer))
        return replace(
            memory, passes=passes, log_pace_frac=log_pace_frac, strange=strange,
            clock_mhz=clock_mhz,
        )  # fmt: skip

    def _expected_s(self, i: int, phase: int, done: IterationBatch, rows: I64) -> tuple[F64, F64]:
        """Shortest and longest time that the profile gives to these iterations."""
        one = self.fleet.instances[i]
        at = np.searchsorted(one.clocks_mhz, done.freq_mhz[rows]).clip(max=len(one.clocks_mhz) - 1)
        table, kv_tok = one.table[at], done.kv_tok[rows]
        if phase == _DECODE:
            req = np.minimum(done.batch_req[rows], one.max_batch)
            step_s = decode_s(table, req, kv_tok, self._padded[i][req.astype(np.int64)])
            return step_s, step_s
        # How the tokens are spread over prompts is not told: over many short ones, or all in one
        # behind the KV that it read.
        tok = done.prefill_tok[rows]
        return prefill_s(table, tok, 0.0 * tok), prefill_s(table, tok, tok * (tok + 2.0 * kv_tok))

    def _unproven(self, memory: DescentMemory) -> Bool:
        """Whose iterations are told, and too few of them were compared to go by the profile."""
        judged: Bool = memory.passes >= _JUDGED
        enough: Bool = np.where(self._decodes, judged[_DECODE], judged[_PREFILL])
        return (memory.clock_mhz > 0.0) & ~enough

    def _moved(self, observation: Observation, memory: DescentMemory) -> DescentMemory:
        """Lower what has settled, and raise what must."""
        state, slo, t_s = observation.state, self.slo, observation.state.t_s
        strange, unproven = memory.strange.any(axis=0), self._unproven(memory)
        # What is remembered may all be of one burst: it must have gone on after that.
        allowed = (1.0 - slo.attainment) * memory.since_req
        goes_on = memory.since_missed_req > allowed + _GOES_ON_SD * np.sqrt(
            np.maximum(allowed, 1.0)
        )
        lasting = (t_s - memory.missing_s >= _LASTING_TTFT * slo.ttft_s) & goes_on.any(axis=0)
        highest_mhz = self.fleet.max_mhz
        back = (lasting | strange | unproven) & (memory.lid_mhz < highest_mhz)
        for i in np.flatnonzero(back & lasting):
            _log.warning("voltana-ctrl: %s", self._reason(int(i), memory))
        settled = state.alive & (state.age_s <= _FRESH_S) & ~np.isfinite(memory.missing_s)
        settled &= ~strange & ~unproven & (t_s - memory.stepped_s >= _SETTLE_TTFT * slo.ttft_s)
        # The first tick only looks.
        begun = np.isfinite(memory.stepped_s)
        lid_mhz = np.where(
            settled & begun, np.maximum(memory.lid_mhz - self._step_mhz, self.fleet.min_mhz),
            memory.lid_mhz,
        )  # fmt: skip
        wait_s = _LASTING_TTFT * slo.ttft_s
        stepped_s = np.where(settled | ~begun, t_s, memory.stepped_s)
        # What was missed at the lower clock is paid for; what comes is judged anew.
        forget = np.where(back & lasting, 0.0, 1.0)
        return replace(
            memory,
            lid_mhz=np.where(back, highest_mhz, lid_mhz),
            # Who was only unproven comes down as soon as it is proven.
            stepped_s=np.where(back & (lasting | strange), t_s + wait_s, stepped_s),
            judged_req=memory.judged_req * forget,
            missed_req=memory.missed_req * forget,
            missing_s=np.where(back & lasting, np.inf, memory.missing_s),
            returned=memory.returned + (back & (lasting | strange)),
        )

    def _disbelief(self, phase: int, i: int, memory: DescentMemory) -> str:
        what, pace = _PHASES[phase], memory.pace_frac[phase, i]
        return (
            f"{self.fleet.ids[i]}: its {what} iterations take {pace:.2f}"
            f" times what the profile {self.fleet.instances[i].profile.name} says: it stays at its"
            " highest clock; measure it with `voltana-ctrl profile`, and fit a profile with"
            " `voltana-ctrl fit`"
        )

    def _reason(self, i: int, memory: DescentMemory) -> str:
        missed, judged = memory.missed_req[:, i], memory.judged_req[:, i]
        told = ", ".join(
            f"{which} of {missed[row]:.0f} of {judged[row]:.0f}"
            for row, which in enumerate(("TTFT", "ITL"))
            if missed[row] > 0.0
        )
        return (
            f"{self.fleet.ids[i]}: back to the highest clock: requests miss their promise ({told})"
        )
