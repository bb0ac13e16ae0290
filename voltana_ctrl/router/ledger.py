"""What a router knows of the fleet by itself: requests in flight, failures, and their energy."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from voltana_ctrl.checks import F64
from voltana_ctrl.engines.traffic import FinishedRequest, Traffic
from voltana_ctrl.router.policy import StateSource
from voltana_ctrl.types import FleetSpec, FleetState

__all__ = ["Flight", "InFlight"]

#: Telemetry older than this says nothing about load.
_FRESH_S = 2.0
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 15.0


@dataclass(slots=True, kw_only=True, eq=False)
class Flight:
    """One request on its way; filled in as it goes.

    Parameters
    ----------
    id : str
        Id that client and engines are told.
    prompt_tok : int
        Tokens of the prompt, estimated where it is text.
    begin_s : float
        When it came, in seconds on the clock of :class:`InFlight`; so are all times here.
    prefill, decode : int
        Indices of the instances that it is or was at; -1 before.
    first_s, last_s : float
        Time of the first and of the latest token; NaN before. Where tokens do not show one by
        one, the first is that of the end of its prefill.
    output_tok : int
        Tokens so far.
    cached_tok : int or None
        Prompt tokens that the prefill engine found in its prefix cache; None where the answer
        to the client is what tells.
    batch_req, kv_tok : float
        Mean requests, and tokens in the KV cache, at its decode instance meanwhile; once it has
        left that.
    idle_j : float
        Its share, in joules, of what instances drew that had nothing to do meanwhile; once it has
        ended.
    give_up : callable, optional
        Called with an instance that is gone: it is sent to another while it has no token, and
        ended otherwise.

    Examples
    --------
    >>> Flight(id="a", prompt_tok=12, begin_s=0.0).decode
    -1
    """

    id: str
    prompt_tok: int
    begin_s: float
    prefill: int = -1
    decode: int = -1
    first_s: float = math.nan
    last_s: float = math.nan
    output_tok: int = 0
    cached_tok: int | None = None
    batch_req: float = 1.0
    kv_tok: float = 0.0
    idle_j: float = 0.0
    give_up: Callable[[int], None] | None = None
    _idle_mark_j: float = field(default=0.0, init=False)
    _held_tok: int = field(default=0, init=False)
    _queued_tok: int = field(default=0, init=False)
    _marks: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0), init=False)


class InFlight:
    """Counts what was sent where, and who failed; gives it as a FleetState.

    Where telemetry is fed, the larger of its count and ours is taken: ours knows of what was
    sent since the last reading, telemetry knows of other routers' requests.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet.
    source : StateSource, optional
        Telemetry, or the control loop.
    traffic : Traffic, optional
        Told what was sent where, for telemetry in this process.
    clock : callable, optional
        Returns seconds that never go back; monotonic time if left out.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> fleet = FleetSpec.parse("1P2D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> counts = InFlight(fleet)
    >>> flight = counts.begin("a", prompt_tok=100)
    >>> counts.enter_prefill(flight, 0)
    >>> counts.state().queue_tok
    array([100.,   0.,   0.])
    >>> counts.leave_prefill(flight)
    >>> counts.enter_decode(flight, 2)
    >>> counts.token(flight)
    >>> counts.state().running_req, counts.state().kv_used_tok
    (array([0., 0., 1.]), array([  0.,   0., 101.]))
    >>> counts.end(flight)
    >>> counts.total_req
    0
    """

    def __init__(
        self,
        fleet: FleetSpec,
        source: StateSource | None = None,
        *,
        traffic: Traffic | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        n = len(fleet)
        self.fleet = fleet
        self.source = source
        self.traffic = traffic
        self.total_req = 0
        self._finished_req = 0
        self.clock = clock
        self._unknown = FleetState.idle(n)
        self._told, self._told_s = self._unknown, clock()
        self._queue_req, self._queue_tok = [0] * n, [0] * n
        self._running_req, self._kv_tok = [0] * n, [0] * n
        self._flights: set[Flight] = set()
        self._waiting: list[OrderedDict[int, float]] = [OrderedDict() for _ in range(n)]
        self._down_until_s, self._failures = [0.0] * n, [0] * n
        self._heard_s = [-math.inf] * n
        # Power of the instances without a request, shared by the requests there are.
        self._idle_w = [float(one.idle_w) for one in fleet.instances]
        self._resting_w = sum(self._idle_w)
        self._idle_share_j, self._shared_s = 0.0, clock()
        # Integrals over time of 1, the batch and its KV tokens; and when they were taken.
        self._integrals = [[0.0, 0.0, 0.0] for _ in range(n)]
        self._taken_s = [clock()] * n

    def begin(self, request_id: str, *, prompt_tok: int) -> Flight:
        """Count a request that came.

        Parameters
        ----------
        request_id : str
            Id that client and engines are told.
        prompt_tok : int
            Tokens of its prompt, estimated where it is text.

        Returns
        -------
        Flight
            To be handed to all other methods, and to :meth:`end` at last.
        """
        self._share_idle()
        self.total_req += 1
        flight = Flight(id=request_id, prompt_tok=max(1, prompt_tok), begin_s=self.clock())
        flight._idle_mark_j = self._idle_share_j
        self._flights.add(flight)
        return flight

    def enter_prefill(self, flight: Flight, instance: int) -> None:
        """Count a request as waiting or being prefilled at an instance, by its index."""
        flight.prefill = instance
        self._wake(instance)
        self._queue_req[instance] += 1
        flight._queued_tok = flight.prompt_tok
        self._queue_tok[instance] += flight._queued_tok
        self._waiting[instance][id(flight)] = self.clock()
        if self.traffic is not None:
            self.traffic.routed(instance, prompt_tok=flight.prompt_tok)

    def leave_prefill(self, flight: Flight) -> None:
        """Count a request as prefilled; `flight.prefill` stays."""
        i = flight.prefill
        if math.isnan(flight.first_s):
            flight.first_s = self.clock()
        if i >= 0 and self._waiting[i].pop(id(flight), None) is not None:
            self._queue_req[i] -= 1
            self._queue_tok[i] -= flight._queued_tok
            self._rest(i)

    def enter_decode(self, flight: Flight, instance: int) -> None:
        """Count a request as generating at an instance from the moment it is sent there."""
        self._wake(instance)
        self._advance(instance)
        flight.decode = instance
        flight._held_tok = flight.prompt_tok
        self._running_req[instance] += 1
        self._kv_tok[instance] += flight.prompt_tok
        if self.traffic is not None and instance != flight.prefill:
            self.traffic.routed(instance, prompt_tok=flight.prompt_tok)
        one = self._integrals[instance]
        flight._marks = (one[0], one[1], one[2])

    def token(self, flight: Flight, tok: int = 1) -> None:
        """Count tokens of a request that came just now."""
        flight.last_s = self.clock()
        if flight.output_tok == 0:
            flight.first_s = flight.last_s
        if flight.decode >= 0:
            self._heard_s[flight.decode] = flight.last_s
        flight.output_tok += tok
        if flight._held_tok:
            flight._held_tok += tok
            self._kv_tok[flight.decode] += tok

    def made(self, flight: Flight, *, prompt_tok: int | None, output_tok: int | None) -> None:
        """Take the engine's own count of tokens.

        Parameters
        ----------
        flight : Flight
            The request.
        prompt_tok, output_tok : int or None
            As the engine says; None where it does not.
        """
        if prompt_tok is not None:
            flight.prompt_tok = max(1, prompt_tok)
        if output_tok is not None:
            flight.output_tok = output_tok
        if math.isnan(flight.last_s):
            flight.last_s = self.clock()

    def leave_decode(self, flight: Flight) -> None:
        """Count a request as gone from its decode instance; `flight.decode` stays."""
        if not flight._held_tok:
            return
        j = flight.decode
        self._advance(j)
        self._running_req[j] -= 1
        self._kv_tok[j] -= flight._held_tok
        flight._held_tok = 0
        self._rest(j)
        span = [now - then for now, then in zip(self._integrals[j], flight._marks, strict=True)]
        if span[0] > 0.0:
            flight.batch_req = max(1.0, span[1] / span[0])
            flight.kv_tok = span[2] / span[0]

    def retract(self, flight: Flight) -> None:
        """Forget where a request was: it will be sent anew, elsewhere."""
        self.leave_prefill(flight)
        self.leave_decode(flight)
        flight.prefill = flight.decode = -1
        flight.cached_tok = None

    def end(self, flight: Flight) -> None:
        """Count a request as gone, however it ended; once per :meth:`begin`."""
        self.leave_prefill(flight)
        self.leave_decode(flight)
        self._share_idle()
        flight.idle_j = self._idle_share_j - flight._idle_mark_j
        self.total_req -= 1
        self._flights.discard(flight)

    def ended_well(self, flight: Flight) -> None:
        """Tell telemetry of a request that was answered to its end."""
        if self.traffic is None:
            return
        self._finished_req += 1
        further_tok = flight.output_tok - 1
        self.traffic.finished(
            FinishedRequest(
                request=self._finished_req,
                request_class=0,
                prompt_tok=flight.prompt_tok,
                output_tok=flight.output_tok,
                ttft_s=max(0.0, flight.first_s - flight.begin_s),
                itl_s=(flight.last_s - flight.first_s) / further_tok if further_tok > 0 else 0.0,
                prefill_instance=flight.prefill,
                decode_instance=flight.decode,
            )
        )

    def failed(self, instance: int, *, at_least_s: float = 0.0) -> None:
        """Pass over an instance for a while: 1 s, doubling up to 15 s while it fails.

        Parameters
        ----------
        instance : int
            Index of the instance in the fleet.
        at_least_s : float
            Seconds that it is passed over at least, where it is asked again no sooner.
        """
        self._failures[instance] += 1
        doublings = min(self._failures[instance] - 1, 10)
        rest_s = max(min(_FIRST_REST_S * 2.0**doublings, _LONGEST_REST_S), at_least_s)
        self._down_until_s[instance] = self.clock() + rest_s

    def abandon(self, instance: int) -> None:
        """Have what waits there for its first token sent to another, and what has one ended.

        Parameters
        ----------
        instance : int
            Index of an instance that is gone without a word: nothing else ends the waiting.
        """
        for flight in tuple(self._flights):
            is_there = id(flight) in self._waiting[instance]
            is_there = is_there or (flight.decode == instance and flight._held_tok > 0)
            if is_there and flight.give_up is not None:
                flight.give_up(instance)

    def succeeded(self, instance: int) -> None:
        """Note that an instance answered: it is not passed over any more."""
        self._failures[instance] = 0
        self._down_until_s[instance] = 0.0
        self._heard_s[instance] = self.clock()

    def failures(self, instance: int) -> int:
        """How often an instance failed since it last answered."""
        return self._failures[instance]

    def heard_s(self, instance: int) -> float:
        """Time at which an instance last answered or sent a token; minus infinity before."""
        return self._heard_s[instance]

    def is_down(self, instance: int) -> bool:
        """Whether an instance is passed over now, since it failed, see :meth:`failed`."""
        return self._failures[instance] > 0 and self.clock() < self._down_until_s[instance]

    def in_flight_req(self, instance: int) -> int:
        """Requests that were sent to an instance from here and have not ended there."""
        return self._queue_req[instance] + self._running_req[instance]

    def own(self, *, arrived_req: F64, arrived_tok: F64) -> FleetState:
        """State by our own requests alone, as told to a controller; from any thread.

        Parameters
        ----------
        arrived_req, arrived_tok : ndarray, shape (n,)
            Requests, and tokens of their prompts, sent to each instance since the last time.

        Returns
        -------
        FleetState
            Clocks, power and energy of it mean nothing.
        """
        now_s = self.clock()
        waits = []
        for waiting in self._waiting:
            with suppress(StopIteration, RuntimeError):  # it changed meanwhile
                waits.append(now_s - next(iter(waiting.values())))
                continue
            waits.append(0.0)
        return replace(
            FleetState.idle(len(self.fleet), t_s=now_s),
            queue_tok=np.array(self._queue_tok, float),
            queue_req=np.array(self._queue_req, float),
            oldest_wait_s=np.array(waits),
            running_req=np.array(self._running_req, float),
            kv_used_tok=np.array(self._kv_tok, float),
            arrived_req=arrived_req,
            arrived_tok=arrived_tok,
        )

    def state(self) -> FleetState:
        """State of the fleet now, as far as it is known here.

        Returns
        -------
        FleetState
            Loads are the larger of our count and of telemetry that is at most 2 s old. An instance
            that is passed over is not alive.
        """
        now_s = self.clock()
        n = len(self.fleet)
        told = None if self.source is None else self.source.state
        known = self._unknown if told is None or len(told) != n else told
        if known is not self._told:
            self._told, self._told_s = known, now_s
        # A source that has stopped gives the same state for ever.
        age_s = known.age_s + (now_s - self._told_s)
        fresh = age_s <= _FRESH_S if known is told else np.zeros(n, dtype=bool)
        up = np.array([not self.is_down(i) for i in range(n)])

        def most(ours: list[int], theirs: F64) -> F64:
            larger: F64 = np.maximum(ours, np.where(fresh, theirs, 0.0))
            return larger

        return FleetState(
            t_s=now_s,
            alive=up & np.where(fresh, known.alive, True),
            queue_tok=most(self._queue_tok, known.queue_tok),
            queue_req=most(self._queue_req, known.queue_req),
            oldest_wait_s=np.array(
                [now_s - next(iter(w.values())) if w else 0.0 for w in self._waiting]
            ),
            running_req=most(self._running_req, known.running_req),
            kv_used_tok=most(self._kv_tok, known.kv_used_tok),
            freq_mhz=known.freq_mhz,
            power_w=known.power_w,
            energy_j=known.energy_j,
            age_s=np.where(fresh, age_s, 0.0),
            arrived_req=known.arrived_req,
            arrived_tok=known.arrived_tok,
        )

    def _share_idle(self) -> None:
        now_s = self.clock()
        if self.total_req:
            self._idle_share_j += self._resting_w * (now_s - self._shared_s) / self.total_req
        self._shared_s = now_s

    def _wake(self, instance: int) -> None:
        if not self.in_flight_req(instance):
            self._share_idle()
            self._resting_w -= self._idle_w[instance]

    def _rest(self, instance: int) -> None:
        if not self.in_flight_req(instance):
            self._share_idle()
            self._resting_w += self._idle_w[instance]

    def _advance(self, instance: int) -> None:
        now_s = self.clock()
        span_s = now_s - self._taken_s[instance]
        self._taken_s[instance] = now_s
        sums = self._integrals[instance]
        sums[0] += span_s
        sums[1] += span_s * self._running_req[instance]
        sums[2] += span_s * self._kv_tok[instance]
