"""What an instance does beside what its profile says: its pace, its delay, its highest clock.

Learnt per instance, and the pace per phase, from the iterations that an engine tells, else from
what the counts of tokens say was done while it was busy. See the compiled twin,
:mod:`voltana_ctrl.kernels.learn.pace`, for the filter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, I64, not_negative
from voltana_ctrl.estimate.predictor import Mixed
from voltana_ctrl.laws import decode_s, prefill_s
from voltana_ctrl.types import Belief, Decision, FleetSpec, FleetState, Observation, Role
from voltana_ctrl.types.ladder import row_nearest
from voltana_ctrl.types.packed import instance_types

__all__ = ["PaceFilter", "PaceMemory"]

_NOTHING: Mapping[str, float] = MappingProxyType({})

_LEARNT = ("known", "asks_s", "asks_k", "lag_miss_frac", "counted_s", "told")
#: Time of busy ticks after which what was done in it is compared with the profile.
_COUNTED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PaceMemory:
    """What was learnt, as plain arrays; replaced at every update.

    Parameters
    ----------
    known : ndarray, shape (n, n_known)
        Paces, their variances, the noise, the highest clock; columns as in the kernel.
    asks_s, asks_k : ndarray, shape (n, n_asks)
        When which clock of the ladder was asked for, the last ones in a ring.
    lag_miss_frac : ndarray, shape (n, n_lags)
        Part of the clocks read that each lag does not explain.
    counted_s : ndarray, shape (n, 3)
        Busy time since counts were last used, and the profile's time, prefill and decode, for what
        was done in it.
    told : ndarray of bool, shape (n,)
        Whose iterations were told.
    believed_s : ndarray, shape (n,)
        Delay of every instance before its readings say more.
    before : FleetState, optional
        State at the last update.

    Examples
    --------
    >>> from voltana_ctrl import load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> PaceFilter(fleet).init().known.shape[0]
    2
    """

    known: Mixed
    asks_s: F64
    asks_k: I64
    lag_miss_frac: F64
    counted_s: F64
    told: Any
    believed_s: F64
    before: FleetState | None = None

    def __post_init__(self) -> None:
        for name in (*_LEARNT, "believed_s"):
            getattr(self, name).flags.writeable = False


class PaceFilter:
    """Learns pace, delay and highest clock of every instance; pure.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    delay_s : float
        From asking for a clock until it runs, as believed before anything was read.

    Raises
    ------
    ConfigError
        If the delay is negative.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, FleetState, IterationBatch, Observation, load_profile
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> decode = fleet.instances[1]
    >>> step_s = float(decode_s(decode.table[-1], 64.0, 25_000.0))
    >>> k = np.ones(50)
    >>> records = IterationBatch(instance=k, t_s=k, wall_s=1.3 * step_s * k, freq_mhz=1410.0 * k,
    ...     batch_req=64 * k, prefill_tok=0 * k, kv_tok=25_000 * k, energy_j=0 * k)
    >>> filter = PaceFilter(fleet)
    >>> memory = filter.update(filter.init(), Observation(state=FleetState.idle(2),
    ...                                                   iterations=records))
    >>> filter.pace_frac(memory).round(1)  # of prefill and decode
    array([[1. , 1. ],
           [1. , 1.3]])
    """

    def __init__(self, fleet: FleetSpec, *, delay_s: float = 0.025) -> None:
        not_negative("PaceFilter.delay_s", delay_s)
        self._fleet = fleet
        self._believed_s = delay_s
        self._max_mhz = fleet.max_mhz
        self._n_clocks = np.array([len(one.clocks_mhz) for one in fleet.instances], dtype=np.int64)
        tables, padded, kind = instance_types(fleet)
        self._tables: Any = tables
        self._padded, self._kind = padded, kind

    def init(self, learnt: Belief | None = None) -> PaceMemory:
        """Nothing seen: every profile is right, or as it was learnt before.

        Parameters
        ----------
        learnt : Belief, optional
            What an earlier run learnt; as certain as one record is.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        n = len(self._fleet)
        known = np.empty((n, kernels.N_KNOWN))
        for one, top_mhz in zip(known, self._max_mhz, strict=True):
            kernels.begin(one, top_mhz)
        if learnt is not None:
            known[:, kernels.PREFILL_PACE_FRAC] = learnt.prefill_pace_frac
            known[:, kernels.DECODE_PACE_FRAC] = learnt.decode_pace_frac
            known[:, [kernels.PREFILL_VAR, kernels.DECODE_VAR]] = 1.0
            known[:, kernels.ABLE_MHZ] = np.minimum(learnt.able_mhz, self._max_mhz)
        return PaceMemory(
            known=known,
            asks_s=np.zeros((n, kernels.N_ASKS)),
            asks_k=np.zeros((n, kernels.N_ASKS), dtype=np.int64),
            lag_miss_frac=np.zeros((n, kernels.N_LAGS)),
            counted_s=np.zeros((n, 3)),
            told=np.zeros(n, dtype=bool),
            believed_s=np.full(n, self._believed_s),
        )

    def update(
        self,
        memory: PaceMemory,
        observation: Observation,
        *,
        prompt_tok: float = 256.0,
        measured_delay_s: Mapping[str, float] = _NOTHING,
    ) -> PaceMemory:
        """Memory after this observation.

        Parameters
        ----------
        memory : PaceMemory
            Of the time before; not changed.
        observation : Observation
            State, and iterations where the engine tells them.
        prompt_tok : float
            Length of a usual prompt: what is said of the iterations' prompts where nothing is
            told.
        measured_delay_s : mapping of str to float
            Delays that machines have measured, by the id of the instance.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        state, ran = observation.state, observation.iterations
        known, asks_s, asks_k, lag_miss_frac, counted_s, told = (
            getattr(memory, name).copy() for name in _LEARNT
        )
        if measured_delay_s:
            believed_s = memory.believed_s.copy()
            for i, name in enumerate(self._fleet.ids):
                believed_s[i] = measured_delay_s.get(name, believed_s[i])
            memory = replace(memory, believed_s=believed_s)
        if len(ran):
            kernels.watch(
                self._tables, self._padded, self._kind, self._n_clocks, prompt_tok, ran.instance,
                ran.t_s, ran.wall_s, ran.freq_mhz, ran.batch_req, ran.prefill_tok,
                ran.prefill_tok2, ran.kv_tok, ran.asked_mhz, known, asks_s, asks_k, lag_miss_frac,
                self.delay_s(memory),
            )  # fmt: skip
            told[ran.instance[(ran.instance >= 0) & (ran.instance < len(told))]] = True
        self._count(memory, observation, known, counted_s, told, prompt_tok)
        return PaceMemory(
            known=known, asks_s=asks_s, asks_k=asks_k, lag_miss_frac=lag_miss_frac,
            counted_s=counted_s, told=told, believed_s=memory.believed_s, before=state,
        )  # fmt: skip

    def _count(
        self,
        memory: PaceMemory,
        observation: Observation,
        known: F64,
        counted_s: F64,
        told: Any,
        prompt_tok: float,
    ) -> None:
        """Learn from what was done in busy ticks, where no iterations are told."""
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        before, state, finished = memory.before, observation.state, observation.finished
        if before is None or state.t_s <= before.t_s or bool(told.all()):
            return
        gone_tok = np.zeros(len(state))
        # The last token of an answer is never read again, so its KV is not written.
        left_tok = finished.prompt_tok + finished.output_tok - 1.0
        here = (finished.decode_instance >= 0) & (finished.decode_instance < len(state))
        np.add.at(gone_tok, finished.decode_instance[here], left_tok[here])
        for i in np.flatnonzero(~told & state.alive):
            one = self._fleet.instances[int(i)]
            rows = one.table
            row = rows[row_nearest(rows["clock_mhz"], (before.freq_mhz[i] + state.freq_mhz[i]) / 2)]
            busy = before.queue_tok[i] > 0.0 and state.queue_tok[i] > 0.0
            prefilled_tok = 0.0
            grown_tok = state.kv_used_tok[i] - before.kv_used_tok[i] + gone_tok[i]
            if one.role.prefills:
                prefilled_tok = state.arrived_tok[i] + before.queue_tok[i] - state.queue_tok[i]
                grown_tok -= prefilled_tok
            else:
                grown_tok += state.queue_tok[i] - before.queue_tok[i] - state.arrived_tok[i]
                busy = False
            n_req = (before.running_req[i] + state.running_req[i]) / 2.0
            decodes = one.role.decodes and min(before.running_req[i], state.running_req[i]) > 0.0
            if not (busy or decodes):
                counted_s[i] = 0.0
                continue
            counted_s[i, 0] += state.t_s - before.t_s
            if prefilled_tok > 0.0:
                per_tok_s = float(
                    prefill_s(row, prompt_tok) - (row["prefill_base_s"] if decodes else 0.0)
                )
                counted_s[i, 1] += prefilled_tok * per_tok_s / prompt_tok
            if decodes and grown_tok > 0.0:
                kv_tok = (before.kv_used_tok[i] + state.kv_used_tok[i]) / 2.0
                size = self._padded[self._kind[i], min(round(n_req), self._padded.shape[1] - 1)]
                counted_s[i, 2] += grown_tok / n_req * float(decode_s(row, float(size), kv_tok))
            if counted_s[i, 0] >= _COUNTED_S:
                expected_s = counted_s[i, 1] + counted_s[i, 2]
                if expected_s > 0.0:
                    part = 1.0 if one.role is Role.PREFILL else 0.0
                    if one.role is Role.COLOCATED:
                        # Counts do not tell its phases apart: they have one pace.
                        part = 0.5
                        known[i, kernels.BOTH_VAR] = known[i, kernels.DECODE_VAR]
                    kernels.learn_pace(known[i], part, counted_s[i, 0] / expected_s)
                counted_s[i] = 0.0

    def asked(self, memory: PaceMemory, decision: Decision, *, governed: bool) -> PaceMemory:
        """Memory after a decision was made, for instances whose iterations tell no asks.

        Parameters
        ----------
        memory : PaceMemory
            Of :meth:`update`, whose state the decision was made on.
        decision : Decision
            What is asked for from now on.
        governed : bool
            Whether governors may ask for more. Then a clock below the floor says that it cannot
            be had, and nothing else is learnt.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        silent = np.flatnonzero(~memory.told)
        state = memory.before
        if silent.size == 0 or state is None:
            return memory
        known, asks_s, asks_k, lag_miss_frac = (
            getattr(memory, name).copy() for name in ("known", "asks_s", "asks_k", "lag_miss_frac")
        )
        delay_s = self.delay_s(memory)
        no_lag = np.zeros(kernels.N_LAGS)
        for i in silent:
            clocks_mhz = self._fleet.instances[int(i)].clocks_mhz
            at = row_nearest(clocks_mhz, state.freq_mhz[i])
            if state.alive[i] and state.age_s[i] <= 0.0 and state.freq_mhz[i] > 0.0:
                kernels.note_reading(
                    known[i], asks_s[i], asks_k[i], no_lag if governed else lag_miss_frac[i],
                    delay_s[i], state.t_s, at, clocks_mhz[at], clocks_mhz[-1],
                )  # fmt: skip
                if governed:
                    known[i, kernels.READINGS] = 0.0
            asked = row_nearest(clocks_mhz, decision.freq_mhz[i])
            kernels.note_ask(known[i], asks_s[i], asks_k[i], state.t_s, asked)
        return PaceMemory(
            known=known, asks_s=asks_s, asks_k=asks_k, lag_miss_frac=lag_miss_frac,
            counted_s=memory.counted_s, told=memory.told, believed_s=memory.believed_s,
            before=state,
        )  # fmt: skip

    def pace_frac(self, memory: PaceMemory) -> F64:
        """Time of an iteration over what the profile says, shape (n, 2): prefill, decode.

        Nearer to 1 than what was seen by one standard deviation, as far as it is uncertain. Where
        it rests on counts, which include the edges of busy time, nobody is said to be faster.

        Parameters
        ----------
        memory : PaceMemory
            Of :meth:`update`.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        seen = memory.known[:, [kernels.PREFILL_PACE_FRAC, kernels.DECODE_PACE_FRAC]]
        variance = memory.known[:, [kernels.PREFILL_VAR, kernels.DECODE_VAR]]
        sd = np.sqrt(variance * memory.known[:, [kernels.NOISE_FRAC2]])
        paced = 1.0 + np.sign(seen - 1.0) * np.maximum(0.0, np.abs(seen - 1.0) - sd)
        least: F64 = np.where(memory.told[:, None], paced, np.maximum(1.0, paced))
        return least

    def noise_frac(self, memory: PaceMemory) -> F64:
        """Standard deviation of an iteration's time about what is expected, shape (n,).

        Parameters
        ----------
        memory : PaceMemory
            Of :meth:`update`.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        noise: F64 = np.sqrt(memory.known[:, kernels.NOISE_FRAC2])
        return noise

    def able_mhz(self, memory: PaceMemory) -> F64:
        """Highest clock that each instance gets when it is asked for, shape (n,).

        Parameters
        ----------
        memory : PaceMemory
            Of :meth:`update`.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        able: F64 = memory.known[:, kernels.ABLE_MHZ].copy()
        return able

    def delay_s(self, memory: PaceMemory) -> F64:
        """From asking for a clock until it runs, shape (n,).

        Parameters
        ----------
        memory : PaceMemory
            Of :meth:`update`.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        delay_s = np.empty(len(memory.known))
        kernels.delays(memory.known, memory.lag_miss_frac, memory.believed_s, delay_s)
        return delay_s
