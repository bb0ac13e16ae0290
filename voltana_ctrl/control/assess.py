"""What a clock must be at this state, and what it would draw: for all instances at once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from voltana_ctrl.checks import F64, Bool
from voltana_ctrl.laws import decode_s, prefill_s
from voltana_ctrl.types import Belief, FleetSpec, FleetState, Load, Slo
from voltana_ctrl.types.ladder import row_down
from voltana_ctrl.types.packed import instance_types

__all__ = ["Assessment", "Assessor"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Assessment:
    """The fleet at one tick: what it needs and what it may draw, each worked out at most once.

    Parameters
    ----------
    by : Assessor
        The assessor that works it out.
    state : FleetState
        Queues and batches.
    load : Load
        Arrivals and their lengths.
    route_frac : ndarray, shape (n,)
        Share of the arrivals that each instance gets.
    active : ndarray of bool, shape (n,)
        Who may get new work.
    belief : Belief
        Margins, delay and pace of each instance.
    hold_s : float
        Seconds that a clock stays until the next can be asked for.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
    >>> from voltana_ctrl.control.assess import Assessor
    >>> from voltana_ctrl.laws import length_moments
    >>> from voltana_ctrl.types import Belief, Load
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.035), delay_s=0.1)
    >>> now = Assessment(
    ...     by=Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06)), state=FleetState.idle(2), load=load,
    ...     route_frac=np.ones(2), active=np.ones(2, bool), belief=belief)
    >>> now.needed_mhz, now.thrifty_mhz, now.draining_mhz
    (array([345., 210.]), array([1140., 1140.]), array([210., 210.]))
    """

    by: Assessor
    state: FleetState
    load: Load
    route_frac: F64
    active: Bool
    belief: Belief
    hold_s: float = 0.0

    @cached_property
    def needed_mhz(self) -> F64:
        """Lowest clocks that keep the promises; :meth:`Assessor.clocks_mhz`."""
        return self.by.clocks_mhz(
            self.state, self.load, self.route_frac, self.belief, hold_s=self.hold_s
        )

    @cached_property
    def thrifty_mhz(self) -> F64:
        """Clocks of least energy per token; :meth:`Assessor.thrifty_mhz`."""
        return self.by.thrifty_mhz(self.state, self.load)

    @cached_property
    def draining_mhz(self) -> F64:
        """The same of who is parked once it is done; :meth:`Assessor.thrifty_mhz`."""
        return self.by.thrifty_mhz(self.state, self.load, drains=True)

    @cached_property
    def worst_w(self) -> F64:
        """Most that each can draw at each clock; :meth:`Assessor.worst_power_w`."""
        # Who is dead gets no work before it is seen to live.
        return self.by.worst_power_w(self.state, self.load, self.active & self.state.alive)


class Assessor:
    """Answers from the profiles of a fleet.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet, as believed.
    slo : Slo
        Promised TTFT and ITL, and the share of requests that must meet each.

    Examples
    --------
    >>> import numpy as np
    >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
    >>> from voltana_ctrl.laws import length_moments
    >>> from voltana_ctrl.types import Belief, Load
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
    >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
    >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.035), delay_s=0.1)
    >>> assessor.clocks_mhz(FleetState.idle(2), load, np.ones(2), belief)
    array([345., 210.])
    """

    def __init__(self, fleet: FleetSpec, slo: Slo) -> None:
        # Loads Numba, which `import voltana_ctrl` must not.
        from voltana_ctrl.kernels.choose import assess as kernels

        self._kernels = kernels
        self._slo = slo
        tables, padded, kind = instance_types(fleet)
        self._tables: Any = tables
        self._padded, self._kind = padded, kind
        many = fleet.instances
        self._n_clocks = np.array([len(one.clocks_mhz) for one in many], dtype=np.int64)
        self._prefills = np.array([one.role.prefills for one in many], dtype=np.int64)
        self._decodes = np.array([one.role.decodes for one in many], dtype=np.int64)
        self._max_batch = np.array([one.max_batch for one in many], dtype=np.int64)
        self._idle_w = np.array([one.idle_w for one in many], dtype=np.float64)
        self._parked_w = np.array([one.parked_w for one in many], dtype=np.float64)
        self._nothing_w = np.zeros(len(many))
        self._min_mhz, self._max_mhz = fleet.min_mhz, fleet.max_mhz

    def clocks_mhz(
        self,
        state: FleetState,
        load: Load,
        route_frac: F64,
        belief: Belief,
        *,
        hold_s: float = 0.0,
        burst_sd_frac: float = 3.0,
    ) -> F64:
        """Lowest clocks that keep the promises at this state, shape (n,); the highest if none.

        Decode: the iteration is within ITL. Prefill: what is queued, and what arrives until
        the clock runs, is done when the oldest prompt is due; and one that arrives now is, if
        all that comes until then is served at the same clock.

        Parameters
        ----------
        state : FleetState
            Queues and batches.
        load : Load
            Arrivals and their lengths.
        route_frac : ndarray, shape (n,)
            Share of the arrivals.
        belief : Belief
            Margins, delay and pace of each instance.
        hold_s : float
            How long a clock stays until the next can be asked for.
        burst_sd_frac : float
            Standard deviations of arrivals that prefill keeps room for.

        Returns
        -------
        ndarray, shape (n,)
            Supported clocks in MHz.
        """
        lengths = load.lengths
        needed_mhz = np.empty(len(state))
        self._kernels.lowest_clocks(
            self._tables,
            self._padded,
            self._kind,
            self._n_clocks,
            self._prefills,
            self._decodes,
            self._max_batch,
            state.running_req,
            state.kv_used_tok,
            state.queue_tok,
            state.oldest_wait_s,
            route_frac,
            load.arrival_req_s * lengths.prompt_tok,
            lengths.prompt_tok + lengths.prompt_sd_tok**2 / lengths.prompt_tok,
            self._slo.ttft_s,
            belief.prefill_pace_frac,
            belief.decode_pace_frac,
            1.0 + belief.ttft_margin_frac,
            self._slo.itl_s / (1.0 + belief.itl_margin_frac),
            belief.delay_s + hold_s,
            burst_sd_frac,
            needed_mhz,
        )
        return needed_mhz

    def thrifty_mhz(self, state: FleetState, load: Load, *, drains: bool = False) -> F64:
        """Clocks of least energy per token at the present batch: the U-shaped curve's minimum.

        The right floor where clients wait for their answers or the batch is capped, since
        there the clock does set the token rate. Never slower than the ITL promise allows.

        Parameters
        ----------
        state, load
            See :meth:`clocks_mhz`.
        drains : bool
            Count energy above what the instance draws once it is parked: who drains is parked
            the sooner, the faster it is.

        Returns
        -------
        ndarray, shape (n,)
            Supported clocks in MHz.

        Examples
        --------
        >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> from voltana_ctrl.types import Load
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> assessor.thrifty_mhz(FleetState.idle(2), load)
        array([1140., 1140.])
        >>> assessor.thrifty_mhz(FleetState.idle(2), load, drains=True)
        array([210., 210.])
        """
        thrifty_mhz = np.empty(len(state))
        self._kernels.thrifty(
            self._tables, self._padded, self._kind, self._n_clocks, self._decodes,
            self._max_batch, state.running_req, state.kv_used_tok, load.lengths.prompt_tok,
            self._slo.itl_s, self._parked_w if drains else self._nothing_w, thrifty_mhz,
        )  # fmt: skip
        return thrifty_mhz

    def crowded_req(self, state: FleetState, belief: Belief) -> float:
        """Running requests that are too many for the ITL promise even at the highest clocks.

        They cannot move, but what arrives can go elsewhere until they are done.

        Parameters
        ----------
        state : FleetState
            State of the fleet; its batches count.
        belief : Belief
            Pace and highest clock of each instance.

        Returns
        -------
        float
            Requests, summed over the fleet; 0 where every batch keeps the promise.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
        >>> from voltana_ctrl.types import Belief
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.0), delay_s=0.025)
        >>> state = replace(FleetState.idle(2), running_req=[0, 300], kv_used_tok=[0, 1.2e5])
        >>> assessor.crowded_req(state, belief)
        0.0
        >>> state = replace(FleetState.idle(2), running_req=[0, 900], kv_used_tok=[0, 3.6e5])
        >>> round(assessor.crowded_req(state, belief))
        278
        """
        top = self._n_clocks - 1
        for i in np.flatnonzero(belief.able_mhz < self._max_mhz):
            clocks_mhz = self._tables["clock_mhz"][self._kind[i], : self._n_clocks[i]]
            top[i] = row_down(clocks_mhz, belief.able_mhz[i])
        running = np.minimum(state.running_req, self._max_batch).astype(np.int64)
        size_req = self._padded[self._kind, running].astype(np.float64)
        step_s = decode_s(self._tables[self._kind, top], size_req, state.kv_used_tok)
        step_s = step_s * belief.decode_pace_frac
        itl_s = self._slo.itl_s
        crowded = (self._decodes > 0) & state.alive & (running > 0) & (step_s > itl_s)
        return float(np.sum(running[crowded] * (1.0 - itl_s / step_s[crowded])))

    def queued_s(self, state: FleetState, clock_mhz: F64, belief: Belief) -> F64:
        """Time that all prompts that wait take at these clocks, in one iteration, shape (n,).

        They are taken to be equally long.

        Parameters
        ----------
        state : FleetState
            Queues.
        clock_mhz : ndarray, shape (n,)
            Clock of each instance; the next supported one below it counts.
        belief : Belief
            Pace of each instance.

        Returns
        -------
        ndarray, shape (n,)
            Seconds; 0 where nothing waits, or nothing is prefilled.

        Examples
        --------
        >>> from dataclasses import replace
        >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
        >>> from voltana_ctrl.types import Belief
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> belief = Belief.of_profiles(fleet, margin_frac=(0.02, 0.0), delay_s=0.025)
        >>> state = replace(FleetState.idle(2), queue_req=[9, 0], queue_tok=[2000, 0])
        >>> assessor.queued_s(state, fleet.max_mhz, belief).round(3)
        array([0.143, 0.   ])
        """
        known = np.arange(self._tables.shape[1]) < self._n_clocks[:, None]
        below = (self._tables["clock_mhz"][self._kind] <= clock_mhz[:, None]) & known
        at = self._tables[self._kind, np.maximum(below.sum(axis=1) - 1, 0)]
        tok, prompts_req = state.queue_tok, np.maximum(state.queue_req, 1.0)
        batch_s = prefill_s(at, tok, tok * tok / prompts_req, prompts_req)
        waits = (self._prefills > 0) & (tok > 0.0)
        return np.where(waits, belief.prefill_pace_frac * batch_s, 0.0)

    def worst_power_w(self, state: FleetState, load: Load, active: Bool) -> F64:
        """Most that each instance is expected to draw until the next decision, at each clock.

        An instance that has work, or may get some, is taken for busy. One that prefills draws what
        a prompt takes. One that decodes draws what a batch does of 1.03 times the requests that
        run and wait there and eight more, as far as its largest batch allows. One that does both
        draws the larger of the two, with prompts beside decoding. Any other is idle.

        Parameters
        ----------
        state : FleetState
            Queues and batches.
        load : Load
            What arrives; the length of its prompts is what a request has in the KV cache at least.
        active : ndarray of bool, shape (n,)
            Who may get new work.

        Returns
        -------
        ndarray, shape (n, n_clocks)
            Watts. They never fall from one clock to the next; a ladder shorter than the longest
            repeats its last value.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl import FleetSpec, FleetState, Slo, load_profile
        >>> from voltana_ctrl.laws import length_moments
        >>> from voltana_ctrl.types import Load
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> load = Load(arrival_req_s=10.0, lengths=length_moments([240, 240], [200, 200]))
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> assessor.worst_power_w(FleetState.idle(2), load, np.array([True, False]))[:, -1]
        array([400.,  70.])
        """
        power_w = np.empty((len(state), self._tables.shape[1]))
        self._kernels.worst_power(
            self._tables, self._kind, self._n_clocks, self._prefills, self._decodes,
            self._max_batch, self._idle_w, state.running_req, state.queue_req,
            state.kv_used_tok, active, load.lengths.prompt_tok, power_w,
        )  # fmt: skip
        return power_w

    def power_at_w(self, worst_w: F64, clock_mhz: F64) -> F64:
        """Power of each instance at its clock, the next supported one above it, shape (n,).

        Parameters
        ----------
        worst_w : ndarray, shape (n, n_clocks)
            What :meth:`worst_power_w` returned.
        clock_mhz : ndarray, shape (n,)
            Clock of each instance.

        Returns
        -------
        ndarray, shape (n,)
            Watts.
        """
        return self._raised(worst_w, clock_mhz)[1]

    def ceilings_mhz(self, worst_w: F64, wanted_mhz: F64, budget_w: float) -> tuple[F64, bool]:
        """Highest clocks, in proportion to those wanted, that cannot draw more than the budget.

        Parameters
        ----------
        worst_w : ndarray, shape (n, n_clocks)
            What :meth:`worst_power_w` returned.
        wanted_mhz : ndarray, shape (n,)
            Clocks that would be chosen without a budget.
        budget_w : float
            Power that the fleet may draw.

        Returns
        -------
        ceilings : ndarray, shape (n,)
            The lowest clocks where even those may draw more.
        kept : bool
            Whether the budget is certain to be kept.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> worst_w = np.array([one.table["prefill_power_w"] for one in fleet.instances])
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> assessor.ceilings_mhz(worst_w, np.array([1000.0, 500.0]), 400.0)
        (array([945., 465.]), True)
        """

        def at(scale: float) -> tuple[F64, float]:
            clocks = np.empty(len(wanted_mhz))
            total_w = self._kernels.scaled(
                self._tables, self._kind, self._n_clocks, worst_w, wanted_mhz, scale, clocks
            )
            return clocks, total_w

        high = float(np.max(self._max_mhz / wanted_mhz)) * 1.001
        clocks, total_w = at(high)
        if total_w <= budget_w:
            return clocks, True
        low = float(np.min(self._min_mhz / wanted_mhz)) * 0.999
        clocks, total_w = at(low)
        if total_w > budget_w:
            return clocks, False
        for _ in range(30):
            middle = (low * high) ** 0.5
            trial, total_w = at(middle)
            if total_w <= budget_w:
                low, clocks = middle, trial
            else:
                high = middle
        return clocks, True

    def decode_first_mhz(self, worst_w: F64, wanted_mhz: F64, budget_w: float) -> tuple[F64, bool]:
        """Ceilings under a budget: decode has what its batch needs, prefill the rest.

        What runs was promised; what waits is admitted as fast as power is left. The batch, and
        what it needs, then settles where the budget carries it within its latency target,
        whereas equal sharing would fill the batches of a decode side that is too slow for them.

        Of what is left every prefill instance has the same part of its highest clock, whatever
        waits there now: the next burst may go to any of them, and ceilings that follow queues
        are always on the move, while who is to rise waits for who has to fall.

        Parameters
        ----------
        worst_w, wanted_mhz, budget_w
            See :meth:`ceilings_mhz`; clocks wanted by prefill do not count.

        Returns
        -------
        ceilings, kept
            See :meth:`ceilings_mhz`.

        Examples
        --------
        >>> import numpy as np
        >>> from voltana_ctrl import FleetSpec, Slo, load_profile
        >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
        >>> worst_w = np.array([one.table["prefill_power_w"] for one in fleet.instances])
        >>> assessor = Assessor(fleet, Slo(ttft_s=0.6, itl_s=0.06))
        >>> assessor.decode_first_mhz(worst_w, np.array([1000.0, 500.0]), 400.0)
        (array([900., 510.]), True)
        """
        decodes = self._decodes > 0
        wanted_mhz = np.where(decodes, wanted_mhz, self._max_mhz)
        lowest_mhz = np.where(decodes, wanted_mhz, self._min_mhz)
        first_mhz, first_w = self._raised(worst_w, lowest_mhz)
        if first_w.sum() > budget_w:
            # Not even that: decode shares what there is, prefill waits.
            held = np.where(decodes[:, None], worst_w, worst_w[:, :1])
            ceiling, kept = self.ceilings_mhz(held, wanted_mhz, budget_w)
            return np.where(decodes, ceiling, self._min_mhz), kept
        # Decode costs what it needs whatever its ceiling, so prefill shares what is left.
        held = np.where(decodes[:, None], first_w[:, None], worst_w)
        ceiling, _ = self.ceilings_mhz(held, wanted_mhz, budget_w)
        ceiling = np.where(decodes, first_mhz, ceiling)
        # And if even the highest clocks leave something, decode may have that.
        _, drawn_w = self._raised(worst_w, ceiling)
        held = np.where(decodes[:, None], worst_w, drawn_w[:, None])
        more, _ = self.ceilings_mhz(held, wanted_mhz, budget_w)
        raised = np.where(decodes, np.maximum(ceiling, more), ceiling)
        # What is needed was rounded up and the rest down: of unlike clocks both may be too much.
        return (raised if self.power_at_w(worst_w, raised).sum() <= budget_w else ceiling), True

    def _raised(self, worst_w: F64, clock_mhz: F64) -> tuple[F64, F64]:
        """Clocks raised to supported ones, and what each may draw."""
        raised_mhz, power_w = np.empty((2, len(clock_mhz)))
        self._kernels.raised(
            self._tables, self._kind, self._n_clocks, worst_w, clock_mhz, raised_mhz, power_w
        )
        return raised_mhz, power_w
