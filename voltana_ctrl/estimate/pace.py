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
from voltana_ctrl.types import Belief, Decision, FleetSpec, FleetState, Observation
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
        Instances whose iterations the engine has told.
    believed_s : ndarray, shape (n,)
        Delay of every instance before its readings say more.
    before : FleetState, optional
        State at the last update.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.estimate import PaceFilter
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
        Time from asking for a clock until it runs, as believed before anything was read.

    Raises
    ------
    ConfigError
        If the delay is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, FleetState, IterationBatch, Observation, load_profile
    >>> from voltana_ctrl.laws import decode_s
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
        self._prefills = np.array([one.role.prefills for one in fleet.instances])
        self._decodes = np.array([one.role.decodes for one in fleet.instances])

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
            Memory before this update; not changed.
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
        rows = self._rows_at((before.freq_mhz + state.freq_mhz) / 2.0)
        queued_tok = state.arrived_tok + before.queue_tok - state.queue_tok
        prefilled_tok = np.where(self._prefills, queued_tok, 0.0)
        # What leaves the queue of a decode instance brings its KV tokens along.
        grown_tok = state.kv_used_tok - before.kv_used_tok + gone_tok - queued_tok
        busy = self._prefills & (before.queue_tok > 0.0) & (state.queue_tok > 0.0)
        n_req = (before.running_req + state.running_req) / 2.0
        decodes = self._decodes & (before.running_req > 0.0) & (state.running_req > 0.0)
        watched = ~told & state.alive
        counted_s[watched & ~(busy | decodes)] = 0.0
        watched &= busy | decodes
        counted_s[watched, 0] += state.t_s - before.t_s
        per_tok_s = prefill_s(rows, prompt_tok) - np.where(decodes, rows["prefill_base_s"], 0.0)
        part = watched & (prefilled_tok > 0.0)
        counted_s[part, 1] += (prefilled_tok * per_tok_s / prompt_tok)[part]
        part = watched & decodes & (grown_tok > 0.0)
        kv_tok = (before.kv_used_tok + state.kv_used_tok) / 2.0
        most = self._padded.shape[1] - 1
        size = self._padded[self._kind, np.minimum(np.rint(n_req), most).astype(np.int64)]
        step_s = decode_s(rows, size.astype(np.float64), kv_tok)
        counted_s[part, 2] += grown_tok[part] / n_req[part] * step_s[part]
        for i in np.flatnonzero(watched & (counted_s[:, 0] >= _COUNTED_S)):
            expected_s = counted_s[i, 1] + counted_s[i, 2]
            if expected_s > 0.0:
                weight = 0.0 if self._decodes[i] else 1.0
                if self._prefills[i] and self._decodes[i]:
                    # Counts do not tell its phases apart: they have one pace.
                    weight = 0.5
                    known[i, kernels.BOTH_VAR] = known[i, kernels.DECODE_VAR]
                kernels.learn_pace(known[i], weight, counted_s[i, 0] / expected_s)
            counted_s[i] = 0.0

    def _rows_at(self, clocks_mhz: F64) -> Any:
        """Coefficients of each instance at the clock nearest to this one, shape (n,)."""
        away_mhz = np.abs(self._tables["clock_mhz"][self._kind] - clocks_mhz[:, None])
        return self._tables[self._kind, np.argmin(away_mhz, axis=1)]

    def asked(self, memory: PaceMemory, decision: Decision, *, governed: bool) -> PaceMemory:
        """Memory after a decision was made: which clock was asked of each instance, and when.

        Only for instances whose iterations do not tell what was asked for.

        Parameters
        ----------
        memory : PaceMemory
            What :meth:`update` returned, whose state the decision was made on.
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
        kernels.note_all(
            self._tables, self._kind, self._n_clocks, silent,
            state.alive & (state.age_s <= 0.0) & (state.freq_mhz > 0.0),
            state.t_s, state.freq_mhz, decision.freq_mhz, governed,
            known, asks_s, asks_k, lag_miss_frac, self.delay_s(memory),
        )  # fmt: skip
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
            What :meth:`update` returned.

        Returns
        -------
        ndarray, shape (n, 2)
            1 where the profile is right, 1.2 where an iteration takes 20 % longer.
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
            What :meth:`update` returned.

        Returns
        -------
        ndarray, shape (n,)
            Relative to the expected time.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        noise: F64 = np.sqrt(memory.known[:, kernels.NOISE_FRAC2])
        return noise

    def able_mhz(self, memory: PaceMemory) -> F64:
        """Highest clock that each instance gets when it is asked for, shape (n,).

        Parameters
        ----------
        memory : PaceMemory
            What :meth:`update` returned.

        Returns
        -------
        ndarray, shape (n,)
            MHz.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        able: F64 = memory.known[:, kernels.ABLE_MHZ].copy()
        return able

    def delay_s(self, memory: PaceMemory) -> F64:
        """From asking for a clock until it runs, shape (n,).

        Parameters
        ----------
        memory : PaceMemory
            What :meth:`update` returned.

        Returns
        -------
        ndarray, shape (n,)
            Seconds.
        """
        from voltana_ctrl.kernels.learn import pace as kernels  # loads Numba

        delay_s = np.empty(len(memory.known))
        kernels.delays(memory.known, memory.lag_miss_frac, memory.believed_s, delay_s)
        return delay_s
