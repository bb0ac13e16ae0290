"""Running engines behind the backend port: their telemetry up, clocks down to their GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from voltana_ctrl.backends.modelled import ModelledGpus
from voltana_ctrl.checks import F64, Bool, positive
from voltana_ctrl.engines.endpoints import Endpoint
from voltana_ctrl.engines.fpm.reader import FpmCounts, FpmReader
from voltana_ctrl.engines.latency import HalvesPaired
from voltana_ctrl.engines.patience import longest_prefill_s, longest_prompt_tok
from voltana_ctrl.engines.reading import EngineReading
from voltana_ctrl.engines.scrape import Scraper
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.errors import ActuationDenied, BackendError, ConfigError, ShapeError
from voltana_ctrl.ports import Backend, backend_extras
from voltana_ctrl.types import (
    Decision,
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    Slo,
)

__all__ = ["EngineBackend"]

WithoutGpus = Literal["refuse", "ignore"]
#: So many iterations in which no governor named a clock are no start of an engine any more.
_MOST_UNGOVERNED = 40
_UNGOVERNED = (
    "no governor is heard in its engine, so that nobody may set its clock: is the plugin loaded"
    " there, with VOLTANA_CTRL_MODE=act, and does fpm name its address (VOLTANA_CTRL_FPM)? Without"
    " the plugin leave out engine.limits"
)


class EngineBackend:
    """Serving engines as a plant.

    State comes from forward-pass metrics where an engine has them, else from its metrics page,
    both of which are read in threads: :meth:`read` never waits for an engine. Clock, power and
    energy come from `gpus`, to which decisions are passed on; without, from DCGM exporter if
    there is one.

    Where sources differ the fresher kind counts: forward-pass metrics tell of every iteration,
    a page of the moment it was made, and of a long iteration while it runs. An instance is
    alive while something was heard of it within `alive_s`; what its engine said last is kept. A
    vLLM page on which a batch runs and nothing moves is a hang only after the time that its
    profile gives to the longest prefill there may be. Clock and power that are older than 5 s are
    not told: the clock is then taken to be the highest, the power is 0, and `problems` says why.

    Parameters
    ----------
    fleet : FleetSpec
        Fleet that is controlled.
    endpoints : sequence of Endpoint
        The engines, one per instance at most. An instance without one is never alive.
    gpus : Backend, optional
        Hardware of the fleet (:class:`voltana_ctrl.backends.NvmlBackend`) or a model of it
        (:class:`ModelledGpus`); closed together with this.
    without_gpus : {"refuse", "ignore"}
        Where there are no `gpus`, whether `apply` raises or does nothing.
    traffic : Traffic, optional
        What the router counts, where it runs in this process: exact arrivals, and finished
        requests. Without, arrivals follow from the engines, and finished requests from the
        histograms of their pages (:mod:`voltana_ctrl.engines.latency`).
    fpm_addresses : sequence of str
        More addresses of forward-pass metrics, told apart by ``worker_id``.
    dcgm_urls : sequence of str
        Pages of DCGM exporter.
    scrape : bool
        False leaves metrics pages alone.
    scrape_period_s, scrape_limit_s : float
        Seconds from the end of a fetch of a page to the next, and those that a fetch may take.
    pairs : bool
        Whether halves of finished requests are put together here; without, whoever sees the whole
        fleet does.
    alive_s : float
        Seconds of silence after which an instance is not alive.
    now_s : callable
        Returns seconds that never go back, on the clock of the control loop.

    Raises
    ------
    ConfigError
        If endpoints and fleet do not fit, or the extra ``server`` is not installed.

    Examples
    --------
    >>> from voltana_ctrl import Decision, FleetSpec, load_profile
    >>> from voltana_ctrl.backends import ModelledGpus
    >>> from voltana_ctrl.engines import Endpoint
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> engines = [Endpoint(instance=name, kind="vllm", url="http://127.0.0.1:9")
    ...            for name in fleet.ids]
    >>> with EngineBackend(fleet, engines, gpus=ModelledGpus(fleet)) as backend:
    ...     state = backend.read().state
    ...     backend.apply(Decision.highest(fleet))
    >>> state.alive, state.freq_mhz  # nothing listens there
    (array([False, False]), array([1410., 1410.]))
    """

    def __init__(
        self,
        fleet: FleetSpec,
        endpoints: Sequence[Endpoint],
        *,
        gpus: Backend | None = None,
        without_gpus: WithoutGpus = "refuse",
        traffic: Traffic | None = None,
        fpm_addresses: Sequence[str] = (),
        dcgm_urls: Sequence[str] = (),
        scrape: bool = True,
        scrape_period_s: float = 0.5,
        scrape_limit_s: float = 2.0,
        pairs: bool = True,
        alive_s: float = 5.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        positive("EngineBackend.alive_s", alive_s)
        _check_endpoints(fleet, endpoints)
        if without_gpus not in ("refuse", "ignore"):
            raise ConfigError(
                f"EngineBackend.without_gpus: expected 'refuse' or 'ignore', got {without_gpus!r}"
            )
        if gpus is not None and gpus.spec.ids != fleet.ids:
            raise ConfigError(
                f"EngineBackend.gpus: expected the GPUs of {', '.join(fleet.ids)}, got those of"
                f" {', '.join(gpus.spec.ids)}"
            )
        self._fleet = fleet
        self._gpus = gpus
        self._gpu_problems = dict if gpus is None else backend_extras(gpus).problems
        self._without_gpus = without_gpus
        self._traffic = traffic
        self._halves = HalvesPaired() if pairs else None
        self._alive_s = alive_s
        self._now_s = now_s
        self._begin_s = now_s()
        self._closed = False
        self._last = EngineReading.silent(len(fleet), **dict.fromkeys(_KEPT, np.zeros(len(fleet))))
        #: Iterations of engines with a governor of ours inside since one told of a clock.
        self._ungoverned = {
            fleet.ids.index(one.instance): 0 for one in endpoints if one.limits is not None
        }
        self._fpm = FpmReader(fleet, endpoints, addresses=fpm_addresses, now_s=now_s)
        try:
            self._scraper = Scraper(
                fleet,
                endpoints if scrape else (),
                dcgm_urls=dcgm_urls,
                period_s=scrape_period_s,
                limit_s=scrape_limit_s,
                latency=traffic is None,
                now_s=now_s,
            )
        except BaseException:
            self._fpm.close()
            raise

    @property
    def spec(self) -> FleetSpec:
        """The fleet."""
        return self._fleet

    @property
    def fpm_counts(self) -> FpmCounts:
        """Forward-pass messages seen, lost and refused."""
        return self._fpm.counts

    def judged_edges_s(self, slo: Slo) -> dict[str, dict[str, float]]:
        """Longest times that count as kept where finished requests come from histograms.

        A histogram tells a time only up to the edge of its bucket, so that a promise is judged by
        the highest edge at or below it. A request at that edge has kept the promise, one beyond
        has missed it.

        Parameters
        ----------
        slo : Slo
            The promises.

        Returns
        -------
        dict of str to dict of str to float
            By the id of an instance, then ``ttft`` and ``itl``, in seconds. An instance whose page
            has shown no histogram is left out.
        """
        return self._scraper.judged_edges_s(slo)

    def delay_s(self) -> dict[str, float]:
        """Seconds from asking for a clock until it runs, as plugins in engines measured it.

        Returns
        -------
        dict of str to float
            By the id of the instance; those without such a plugin are left out.
        """
        return dict(self._fpm.delay_s)

    def problems(self) -> dict[str, str]:
        """What is wrong with the readings of instances, in words.

        Returns
        -------
        dict of str to str
            By the id of the instance: what its engine has, then what its GPUs have. An instance
            with which nothing is wrong is left out.
        """
        told = dict(self._scraper.problems)
        ungoverned = {
            self._fleet.ids[i]: _UNGOVERNED
            for i, seen in self._ungoverned.items()
            if seen >= _MOST_UNGOVERNED
        }
        for more in (ungoverned, self._gpu_problems()):
            for name, problem in more.items():
                told[name] = f"{told[name]}; {problem}" if name in told else problem
        return told

    def _hear_governors(self, iterations: IterationBatch) -> None:
        """Count iterations since the governor inside an engine named the clock of one."""
        for i in self._ungoverned:
            named = iterations.freq_mhz[iterations.instance == i] > 0.0
            since = int(np.argmax(named[::-1])) if named.any() else named.size
            self._ungoverned[i] = since + (0 if named.any() else self._ungoverned[i])

    def read(self) -> Observation:
        """State of all instances now, and what happened since the last read.

        Returns
        -------
        Observation
            Iterations only of engines with forward-pass metrics, without energy. Finished requests
            are exact with `traffic`; else they come from histograms, and may be halves where
            `pairs` is False.

        Raises
        ------
        BackendError
            If the backend is closed, or its GPUs fail.
        """
        self._check_open("read")
        hardware = None if self._gpus is None else self._gpus.read().state
        t_s = max(0.0, self._now_s())
        passes, iterations = self._fpm.read(t_s)
        page = self._scraper.read(t_s, None if hardware is None else hardware.freq_mhz)
        told = passes.filled_from(page)
        # A page may be fresher than an engine whose forward-pass metrics have stopped.
        stopped = (passes.age_s > self._alive_s) & (page.age_s < passes.age_s)
        # Engines beat as if idle during a long iteration, which their page shows.
        quiet = (passes.running_req + passes.queue_req == 0.0) & (page.age_s <= self._alive_s)
        stopped |= quiet & (page.running_req + page.queue_req > 0.0)
        told = _where(stopped, page.filled_from(passes), told)
        self._last = told.filled_from(self._last)
        age_s, alive = self._ages(told, page, hardware, t_s)
        arrived_req, arrived_tok = np.nan_to_num(told.arrived_req), np.nan_to_num(told.arrived_tok)
        finished = self._scraper.finished()
        if self._halves is not None:
            finished = self._halves.whole(t_s, finished)
        if self._traffic is not None:
            arrived_req, arrived_tok, finished = self._traffic.read()
        last = self._last
        unknown = np.isnan(told.freq_mhz)
        state = FleetState(
            t_s=t_s,
            alive=alive,
            queue_tok=last.queue_tok,
            queue_req=last.queue_req,
            oldest_wait_s=last.oldest_wait_s,
            running_req=last.running_req,
            kv_used_tok=last.kv_used_tok,
            # GPUs that nobody has locked run at their highest clock under load.
            freq_mhz=np.where(unknown, self._fleet.max_mhz, told.freq_mhz),
            power_w=np.nan_to_num(told.power_w),
            energy_j=last.energy_j,
            age_s=age_s,
            arrived_req=arrived_req,
            arrived_tok=arrived_tok,
        ).bounded(self._fleet)
        if hardware is not None:
            state = self._with_hardware(state, hardware)
        # A governor inside the engine has its own clock for every iteration, which the one that is
        # read now says nothing of.
        self._hear_governors(iterations)
        asked, read_mhz = iterations.freq_mhz, state.freq_mhz[iterations.instance]
        iterations = replace(iterations, freq_mhz=np.where(asked > 0.0, asked, read_mhz))
        return Observation(state=state, iterations=iterations, finished=finished)

    def _ages(
        self, told: EngineReading, page: EngineReading, hardware: FleetState | None, t_s: float
    ) -> tuple[F64, Bool]:
        heard = np.isfinite(told.age_s)
        age_s = np.where(heard, told.age_s, t_s - self._begin_s)
        alive = heard & (age_s <= self._alive_s)
        # Where no page tells a long iteration from a dead engine, it may take its time.
        for i in np.flatnonzero(heard & ~alive & np.isinf(page.age_s)):
            last, clock_mhz = self._last, np.nan if hardware is None else hardware.freq_mhz[i]
            prompt_tok = longest_prompt_tok(
                last.queue_tok[i], last.kv_used_tok[i], last.running_req[i]
            )
            busy_s = longest_prefill_s(self._fleet.instances[i], prompt_tok, clock_mhz)
            alive[i] = prompt_tok > 0.0 and age_s[i] <= self._alive_s + busy_s
        return age_s, alive

    def _with_hardware(self, state: FleetState, hardware: FleetState) -> FleetState:
        if isinstance(self._gpus, ModelledGpus):
            self._gpus.take_load(state)
            hardware = self._gpus.read().state
        return replace(
            state,
            alive=state.alive & hardware.alive,
            freq_mhz=hardware.freq_mhz,
            power_w=hardware.power_w,
            energy_j=hardware.energy_j,
            age_s=np.maximum(state.age_s, hardware.age_s),
        )

    def apply(self, decision: Decision) -> None:
        """Pass a decision on to the GPUs.

        Raises
        ------
        ActuationDenied
            If there are no GPUs and that is not to be ignored, or they refuse.
        ShapeError
            If the decision is for another fleet.
        BackendError
            If the backend is closed.
        """
        self._check_open("apply")
        if len(decision) != len(self._fleet):
            raise ShapeError(
                f"EngineBackend.apply: expected {len(self._fleet)} instances, got {len(decision)}"
            )
        if self._gpus is not None:
            self._gpus.apply(decision)
        elif self._without_gpus == "refuse":
            raise ActuationDenied(
                "EngineBackend.apply: no GPUs were given; give gpus=NvmlBackend(...), or"
                " without_gpus='ignore' to decide without acting"
            )

    def _check_open(self, what: str) -> None:
        if self._closed:
            raise BackendError(f"EngineBackend.{what}: the backend is closed; make a new one")

    def close(self) -> None:
        """Stop reading and give the GPUs back; may be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._gpus is not None:
                self._gpus.close()
        finally:
            self._fpm.close()
            self._scraper.close()

    def __enter__(self) -> EngineBackend:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_KEPT = ("queue_req", "queue_tok", "oldest_wait_s", "running_req", "kv_used_tok", "energy_j")


def _where(chosen: Bool, one: EngineReading, other: EngineReading) -> EngineReading:
    return EngineReading(
        **{
            name: np.where(chosen, getattr(one, name), getattr(other, name))
            for name in EngineReading.__slots__
        }
    )


def _check_endpoints(fleet: FleetSpec, endpoints: Sequence[Endpoint]) -> None:
    names = [endpoint.instance for endpoint in endpoints]
    for name in names:
        if name not in fleet.ids:
            raise ConfigError(
                f"EngineBackend.endpoints: expected instances of the fleet"
                f" ({', '.join(fleet.ids)}), got {name!r}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"EngineBackend.endpoints: {name}: expected once, got it twice")


if TYPE_CHECKING:
    _: type[Backend] = EngineBackend
