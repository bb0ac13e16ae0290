"""The plant: a fleet simulated event by event at the resolution of engine iterations.

Compiled governors and routers run inside the kernel; Python ones are asked through the same
kernel, which returns for each question and goes on with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from voltana_ctrl.control.base import CompiledGovernor
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.kernels import layout
from voltana_ctrl.kernels.choose.base import GOVERNOR_SIGNATURE, N_MEMORY, hold_floor
from voltana_ctrl.kernels.plant import advance
from voltana_ctrl.kernels.plant import faults as fault_kernels
from voltana_ctrl.kernels.plant.events import touch
from voltana_ctrl.kernels.plant.functions import resolved
from voltana_ctrl.kernels.plant.late import order_admission
from voltana_ctrl.kernels.plant.rest import order_rest
from voltana_ctrl.kernels.plant.roles import order_role
from voltana_ctrl.kernels.plant.state import Believed, Fleet
from voltana_ctrl.kernels.route.base import ROUTER_SIGNATURE, by_share
from voltana_ctrl.ports import Governor, Router, believe_of
from voltana_ctrl.routing.base import CompiledRouter
from voltana_ctrl.sim.faults import Fault, FaultSchedule
from voltana_ctrl.sim.records import NEVER, starting_instances, starting_requests, tell_depth
from voltana_ctrl.sim.settings import PlantSettings
from voltana_ctrl.sim.waiting import Waiting
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.types import (
    DEPTHS,
    Admission,
    Belief,
    Decision,
    Depth,
    FleetSpec,
    FleetState,
    IterationBatch,
    Observation,
    Request,
    RequestBatch,
    Role,
)
from voltana_ctrl.types.packed import instance_types

__all__ = ["Plant", "PlantSettings"]


_ROLES = (Role.PREFILL, Role.DECODE)
#: What routers see of an instance and only decisions change.
_SHOWN = {
    layout.VIEW_ROUTE_FRAC: "route_frac",
    layout.VIEW_TYPE: "type",
    layout.VIEW_KV_CAPACITY_TOK: "kv_capacity_tok",
    layout.VIEW_PREFILL_PACE_FRAC: "prefill_pace_frac",
    layout.VIEW_DECODE_PACE_FRAC: "decode_pace_frac",
    layout.VIEW_ABLE_MHZ: "able_mhz",
}


class Plant:
    """A simulated fleet under a workload.

    Parameters
    ----------
    fleet : FleetSpec
        The fleet that is simulated.
    workload : Workload
        The requests that arrive.
    settings : PlantSettings, optional
        Delays of clock sets, noise, and how routers see the fleet; the defaults if left out.
    governors : sequence of Governor, optional
        One per instance; all compiled with one kernel, or all Python. Without, decisions
        write the clocks.
    prefill_router, decode_router : Router, optional
        Who picks instances; the shares of the latest decision by default.
    believed : FleetSpec, optional
        What compiled governors and routers believe about the fleet; the truth by default.
        A governor with tables of its own, from the start or replaced since (``governor.rows``,
        ``padded``, ``params``), speaks for its instance from the next decision on.
    judged_s : tuple of float, optional
        Requests that arrive in ``[from, until)`` are judged; all by default.
    faults : sequence of Fault
        What goes wrong and when, see :mod:`voltana_ctrl.sim.faults`.
    seed : int
        Seed of random routing and noise.

    Raises
    ------
    ConfigError
        If governors or faults do not match the fleet.

    Examples
    --------
    >>> from voltana_ctrl import FleetSpec, load_profile
    >>> from voltana_ctrl.sim.workload import make_workload
    >>> fleet = FleetSpec.parse("1P1D", load_profile("a100-sxm-80gb/llama-3.1-8b"))
    >>> plant = Plant(fleet, make_workload("sharegpt", rate_req_s=2.0, duration_s=20.0, seed=0))
    >>> plant.advance(10.0)
    >>> plant.now_s, bool(plant.read().state.energy_j.sum() > 10 * 2 * 60)
    (10.0, True)
    """

    def __init__(
        self,
        fleet: FleetSpec,
        workload: Workload,
        settings: PlantSettings | None = None,
        *,
        governors: Sequence[Governor] | None = None,
        prefill_router: Router | None = None,
        decode_router: Router | None = None,
        believed: FleetSpec | None = None,
        judged_s: tuple[float, float] = (0.0, np.inf),
        faults: Sequence[Fault] = (),
        seed: int = 0,
    ) -> None:
        self.fleet = fleet
        self.workload = workload
        self.settings = settings or PlantSettings()
        n = len(fleet)
        self._tables, self._padded, kind = instance_types(fleet)
        self.instances = starting_instances(fleet, kind)
        self._depths: tuple[Depth, ...] = (DEPTHS[0],) * n
        self.requests = starting_requests(workload)
        self.instances["alternates"] = self.settings.alternates
        self._waiting = Waiting(self.requests)
        self._sim = np.zeros(1, dtype=layout.SIM_DTYPE)
        self._noise = np.random.default_rng([seed, 1])
        self._start_sim(judged_s, seed)
        largest = int(workload.output_tok.max(initial=1)) + 2
        ring = 1 << max(1, int(largest).bit_length())
        leaves = 1 << max(0, (n - 1).bit_length())
        requests = max(1, len(workload))
        self._tree = np.full(2 * leaves, NEVER)
        nodes = {node: k for k, node in enumerate(dict.fromkeys(i.node for i in fleet.instances))}
        self.instances["node"] = [nodes[i.node] for i in fleet.instances]
        self._pending_s = np.zeros((n, layout.PENDING))
        seen = np.zeros((n, layout.SEEN), dtype=layout.SEEN_DTYPE)
        seen["freq_mhz"] = fleet.max_mhz[:, None]
        self._done = np.zeros(requests, dtype=np.int64)
        self._log = np.zeros(self.settings.log_iterations, dtype=layout.ITERATION_DTYPE)
        self._governors = governors
        self._believers = [believe_of(one) for one in governors or ()]
        self._belief: Belief | None = None
        self._governed_role = self.instances["role"].copy()
        self._hosted = False
        governor, params, memory = self._take_governors(governors)
        self._routers: dict[int, Router] = {}
        prefill, decode = (
            self._take_router(name, router)
            for name, router in (("prefill", prefill_router), ("decode", decode_router))
        )
        believed_tables, believed_padded, _ = instance_types(believed or fleet)
        self._arrays = Fleet(
            sims=self._sim,
            inst=self.instances,
            req=self.requests,
            tables=self._tables,
            padded=self._padded,
            finish=np.full((n, ring), -1, dtype=np.int64),
            pending_s=self._pending_s,
            pending_k=np.zeros((n, layout.PENDING), dtype=np.int64),
            node_free_s=np.zeros(len(nodes)),
            tree=self._tree,
            moving_s=np.zeros(requests),
            moving_r=np.zeros(requests, dtype=np.int64),
            seen=seen,
            shown=np.zeros((layout.N_VIEW, n)),
            prefill=np.array(fleet.may_prefill),
            decode=np.array(fleet.may_decode),
            starts=np.zeros(n + 1, dtype=np.int64),
            done=self._done,
            log=self._log,
        )
        self._believed = Believed(
            tables=believed_tables,
            padded=believed_padded,
            governor_params=params,
            governor_memory=memory,
            prefill_params=prefill[1],
            prefill_memory=prefill[2],
            decode_params=decode[1],
            decode_memory=decode[2],
        )
        kernels = (governor, prefill[0], decode[0])
        self._answers_itself = kernels == (hold_floor, by_share, by_share)
        signatures = (GOVERNOR_SIGNATURE, ROUTER_SIGNATURE, ROUTER_SIGNATURE)
        self._functions = tuple(map(resolved, kernels, signatures))
        self._told: list[tuple[Any, ...]] = []
        self._take_beliefs()
        self._show()
        for i in range(n):
            touch(self.instances, self._pending_s, self._tree, i)
        self._read_done = 0
        self._read_logged = 0
        self._advance_hosted: Any = None
        self._faults = FaultSchedule(fleet, faults)
        self._struck = 0
        if self._faults.edges_s[:1] == (0.0,):
            self._strike()

    def _start_sim(self, judged_s: tuple[float, float], seed: int) -> None:
        sim = self._sim
        settings = self.settings
        sim["n_requests"] = sim["n_arrivals"] = len(self.workload)
        for name in ("route_head", "route_tail", "held_head", "held_tail"):
            sim[name] = -1
        # Any odd start will do; the multiplier spreads neighbouring seeds over the state.
        sim["rng"] = (2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64
        sim["actuation_s"] = settings.actuation_s
        sim["settle_s"] = settings.settle_s
        sim["jitter_sd_frac"] = settings.jitter_sd_frac
        sim["view_age_s"] = settings.view_age_s
        sim["decode_at_arrival"] = settings.decode_at_arrival
        sim["apart"] = not self.fleet.colocated
        sim["late_head"] = sim["late_tail"] = -1
        self._admission = Admission()
        order_admission(sim, NEVER, self._admission.due_s)
        sim["judge_from_s"], sim["judge_until_s"] = judged_s
        concurrency = self.workload.concurrency
        if concurrency is not None:
            sim["closed_loop"] = 1
            sim["n_arrivals"] = sim["next_release"] = min(concurrency, len(self.workload))
            self.requests["arrival_s"][concurrency:] = NEVER
        arrival_s = self.requests["arrival_s"]
        judged = (arrival_s >= judged_s[0]) & (arrival_s < min(judged_s[1], NEVER))
        sim["n_judged"] = sim["n_judged_left"] = judged.sum()

    def _take_governors(self, governors: Sequence[Governor] | None) -> tuple[Any, Any, Any]:
        n = len(self.fleet)
        if governors is None:
            return hold_floor, np.zeros((n, 1)), np.zeros((n, N_MEMORY))
        if len(governors) != n:
            raise ConfigError(
                f"Plant.governors: expected one per instance, {n}, got {len(governors)}"
            )
        compiled = [one for one in governors if isinstance(one, CompiledGovernor)]
        if len(compiled) == n and len({id(one.kernel) for one in compiled}) == 1:
            self.instances["governed"] = 1
            self.instances["idle_call_s"] = [one.idle_call_s for one in compiled]
            params = np.zeros((n, max(1, *(one.params.size for one in compiled))))
            for i, one in enumerate(compiled):
                params[i, : one.params.size] = one.params
            return compiled[0].kernel, params, np.zeros((n, N_MEMORY))
        self.instances["governed"] = 2
        self._hosted = True
        return hold_floor, np.zeros((n, 1)), np.zeros((n, N_MEMORY))

    def _take_beliefs(self) -> None:
        """Copy what governors believe: tables of their own, and all that was replaced since."""
        if self.instances["governed"][0] != 1:
            return
        compiled = [one for one in self._governors or () if isinstance(one, CompiledGovernor)]
        now = [(one.rows, one.padded, one.params) for one in compiled]
        if self._told:
            before = list(zip(now, self._told, strict=True))
            changed = [
                i
                for i, (new, old) in enumerate(before)
                if new[0] is not old[0] or new[1] is not old[1]
            ]
            for i, (new, old) in enumerate(before):
                if new[2] is not old[2]:
                    self._believed.governor_params[i, : new[2].size] = new[2]
        else:
            tables = [instance.table for instance in self.fleet.instances]
            changed = [i for i, one in enumerate(now) if not np.array_equal(one[0], tables[i])]
        self._told = now
        if not changed:
            return
        kind = self.instances["type"].copy()
        if not np.array_equal(kind, np.arange(len(kind))):
            # From here on every instance is of a type of its own.
            self.instances["type"] = np.arange(len(kind))
            self._tables, self._padded = self._tables[kind], self._padded[kind]
            self._arrays = self._arrays._replace(tables=self._tables, padded=self._padded)
            self._believed = self._believed._replace(
                tables=self._believed.tables[kind], padded=self._believed.padded[kind]
            )
        believed, sizes = self._believed.tables, self._believed.padded
        for i in changed:
            rows, padded, _ = now[i]
            believed[i, : len(rows)] = rows
            believed[i, len(rows) :] = rows[-1]
            sizes[i, : len(padded)] = padded

    def _take_router(self, phase: str, router: Router | None) -> tuple[Any, Any, Any]:
        none = np.zeros(1), np.zeros(len(self.fleet))
        if router is None:
            return by_share, *none
        if isinstance(router, CompiledRouter):
            params = router.params if router.params.size else np.zeros(1)
            return router.kernel, params, np.zeros(len(self.fleet))
        self._sim[f"hosted_{phase}"] = 1
        self._hosted = True
        self._routers[layout.ASK_PREFILL if phase == "prefill" else layout.ASK_DECODE] = router
        return by_share, *none

    @property
    def now_s(self) -> float:
        """Simulated time in seconds."""
        return float(self._sim[0]["now_s"])

    @property
    def roles(self) -> tuple[Role, ...]:
        """Role of each instance: the one that it has, or is about to have."""
        if self.fleet.colocated:
            return (Role.COLOCATED,) * len(self.fleet)
        return tuple(_ROLES[role] for role in self.instances["role"])

    @property
    def judged(self) -> tuple[int, int]:
        """How many requests are judged, and how many of them are not done yet."""
        return int(self._sim[0]["n_judged"]), int(self._sim[0]["n_judged_left"])

    def advance(self, until_s: float, *, stop_when_judged: bool = False) -> None:
        """Run until `until_s`, or until every judged request is done.

        Parameters
        ----------
        until_s : float
            Simulated time to stop at; earlier than now does nothing.
        stop_when_judged : bool
            Return as soon as no judged request is left.
        """
        if until_s < self.now_s:
            return
        self._sim["stop_when_judged"] = stop_when_judged
        edges_s = self._faults.edges_s
        while self._struck < len(edges_s) and edges_s[self._struck] <= until_s:
            if self._run(edges_s[self._struck]) == layout.JUDGED:
                return
            self._strike()
        self._run(until_s)

    def _strike(self) -> None:
        """Bring every instance into the state that the next edge of the faults leaves it in."""
        alive, slow_frac, clamp_k = self._faults.at(self._faults.edges_s[self._struck])
        self._struck += 1
        inst, state = self.instances, self._arrays
        for i in np.flatnonzero((inst["alive"] == 1) & ~alive):
            fault_kernels.fail(state, i)
        for i in np.flatnonzero((inst["alive"] == 0) & alive):
            fault_kernels.recover(state, i)
        for i in np.flatnonzero((inst["slow_frac"] != slow_frac) | (inst["clamp_k"] != clamp_k)):
            fault_kernels.hinder(state, i, slow_frac[i], clamp_k[i])

    def _run(self, until_s: float) -> int:
        """Run the kernel until `until_s`, and answer what it asks."""
        if not self._hosted:
            return int(advance.advance(self._arrays, self._believed, *self._functions, until_s))
        run = self._hosted_kernel()
        sim, governors = self._sim[0], self._governors
        functions = () if run is not advance.advance else self._functions
        while (code := run(self._arrays, self._believed, *functions, until_s)) > layout.JUDGED:
            asked = int(sim["ask_index"])
            if code == layout.ASK_GOVERNOR and governors is not None:
                sim["answer_mhz"] = self._ask_governor(governors[asked], asked)
            else:
                sim["answer_instance"] = self._ask_router(code, asked)
            sim["answered"] = 1
        return int(code)

    def _hosted_kernel(self) -> Any:
        """Entry without function arguments, unless a compiled router needs them."""
        if not self._answers_itself:
            return advance.advance
        if self._advance_hosted is None:
            from voltana_ctrl.kernels.plant.hosted import advance_by_share

            self._advance_hosted = advance_by_share
        return self._advance_hosted

    def _ask_governor(self, governor: Governor, i: int) -> float:
        one = self.instances[i]
        head = one["prefill_head"] if one["prefill_head"] >= 0 else one["wait_head"]
        oldest_s = self.now_s - self.requests[head]["sent_s"] if head >= 0 else 0.0
        # What an engine knows besides, and only compiled governors ask for.
        known: dict[str, float] = {}
        if isinstance(governor, CompiledGovernor):
            known = {"batch_tok": float(one["chunk_tok"]), "t_s": self.now_s}
        return governor.step(
            float(one["batch_req"]),
            float(one["kv_tok"]),
            float(one["prefill_tok"] + one["wait_tok"]),
            float(oldest_s),
            float(one["floor_mhz"]),
            float(one["ceiling_mhz"]),
            **known,
        )

    def _ask_router(self, phase: int, r: int) -> int:
        row = self.requests[r]
        request = Request(
            prompt_tok=int(row["prompt_tok"]),
            id=r,
            cached_tok=int(row["cached_tok"]),
            request_class=int(row["request_class"]),
        )
        chosen = self._routers[phase].route(request, self.state())
        works = "prefills" if phase == layout.ASK_PREFILL else "decodes"
        members = np.flatnonzero(self.instances[works])
        if chosen not in members:
            raise ConfigError(
                f"{type(self._routers[phase]).__name__}.route: expected one of the instances"
                f" {members.tolist()}, got {chosen!r}"
            )
        return int(chosen)

    def apply(self, decision: Decision) -> None:
        """Carry out a decision: clocks or their range, shares, active set, roles, power caps, ...

        Without a power cap in the decision there is none but that of the profile. Memory and CPU
        clocks change nothing here.

        Raises
        ------
        ShapeError
            If it was made for another number of instances.
        ConfigError
            If it asks for roles that its instances cannot have.
        """
        inst = self.instances
        if len(decision) != len(inst):
            raise ShapeError(
                f"Plant.apply: expected a decision for {len(inst)} instances, got one for"
                f" {len(decision)}"
            )
        self._order_roles(decision)
        self._tell(decision.belief)
        self._take_beliefs()
        advance.settle_accounts(self._arrays)
        inst["floor_mhz"] = decision.freq_mhz
        inst["ceiling_mhz"] = decision.freq_max_mhz
        inst["route_frac"] = decision.route_frac
        inst["active"] = decision.active
        self._show()
        limits = decision.limits
        caps_w = None if limits is None else limits.power_cap_w
        # Without a cap it is as found, which the profile holds already.
        caps_w = np.full(len(inst), np.inf) if caps_w is None else caps_w
        for capped in np.flatnonzero(inst["power_cap_w"] != caps_w):
            advance.order_cap(self._arrays, int(capped), float(caps_w[capped]))
        self._admit(decision.admission or Admission())
        self._tell_depths(decision)
        for sleeper in np.flatnonzero(inst["sleeps"] | inst["asleep"]):
            order_rest(self._sim, inst, self._tables, self._pending_s, self._tree, sleeper)
        for router in self._routers.values():
            router.update(decision)
        if self._governors is not None:
            return
        for i, freq_mhz in enumerate(decision.freq_mhz):
            advance.order_clock(self._arrays, i, float(freq_mhz))

    def _admit(self, admission: Admission) -> None:
        if admission != self._admission:
            self._admission = admission
            order_admission(self._sim, min(admission.rate_req_s, NEVER), admission.due_s)

    def _order_roles(self, decision: Decision) -> None:
        """Tell who is to change its role, and governors which one their instance has by now."""
        inst = self.instances
        if decision.roles is not None:
            self.fleet.check_roles(decision.roles)
            for i, role in enumerate(decision.roles):
                wanted = int(role is Role.DECODE)
                if inst["want_role"][i] != wanted:
                    state = (self._sim, inst, self.requests, self._tables)
                    order_role(*state, self._pending_s, self._tree, i, wanted)
        for i in np.flatnonzero(inst["role"] != self._governed_role).tolist():
            self._governed_role[i] = inst["role"][i]
            take_role = getattr(self._governors[i] if self._governors else None, "take_role", None)
            if take_role is not None:
                take_role(_ROLES[inst["role"][i]])

    def _tell_depths(self, decision: Decision) -> None:
        depths = decision.depth or (DEPTHS[0],) * len(self.instances)
        if depths == self._depths:
            return
        self._depths = depths
        for one, spec, depth in zip(self.instances, self.fleet.instances, depths, strict=True):
            tell_depth(one, spec, depth)

    def _tell(self, belief: Belief | None) -> None:
        """Hand what is believed to governors, and to routers as part of what they see."""
        if belief is None or belief is self._belief:
            return
        self._belief = belief
        for i, believe in enumerate(self._believers):
            if believe is not None:
                believe(belief, i)
        for name in ("prefill_pace_frac", "decode_pace_frac", "able_mhz"):
            self.instances[name] = getattr(belief, name)

    def _show(self) -> None:
        """Let routers see what does not change between two decisions."""
        inst, shown = self.instances, self._arrays.shown
        for field, name in _SHOWN.items():
            shown[field] = inst[name]

    def state(self) -> FleetState:
        """State of every instance now; counts of arrivals since the last :meth:`read`."""
        advance.settle_accounts(self._arrays)
        inst, now_s = self.instances, self.now_s
        head = np.where(inst["prefill_head"] >= 0, inst["prefill_head"], inst["wait_head"])
        waits = head >= 0
        oldest_s = np.zeros(len(inst))
        oldest_s[waits] = now_s - self.requests["sent_s"][head[waits]]
        iterates = inst["iterating"] == 1
        power_w = np.where(iterates, inst["power_w"], self._resting_w())
        if self.settings.power_noise_sd_w > 0.0:
            noise_w = self._noise.normal(0.0, self.settings.power_noise_sd_w, len(inst))
            power_w = np.maximum(power_w + noise_w, 0.0)
        clock_k = np.where(iterates, inst["run_k"], np.minimum(inst["clock_k"], inst["clamp_k"]))
        return FleetState(
            t_s=now_s,
            alive=inst["alive"] == 1,
            queue_tok=inst["prefill_tok"] + inst["wait_tok"],
            queue_req=inst["prefill_req"] + inst["wait_req"],
            oldest_wait_s=oldest_s,
            running_req=inst["running_req"],
            kv_used_tok=inst["kv_tok"],
            freq_mhz=self._tables["clock_mhz"][inst["type"], clock_k],
            power_w=power_w,
            energy_j=inst["prefill_j"] + inst["decode_j"] + inst["idle_j"] + inst["transfer_j"],
            age_s=np.zeros(len(inst)),
            arrived_req=inst["arrived_req"],
            arrived_tok=inst["arrived_tok"],
        )

    def _ready_s(self) -> Any:
        """Time until each instance works, were it woken now."""
        inst = self.instances
        under_way_s = np.where(inst["wake_end_s"] < NEVER, inst["wake_end_s"] - self.now_s, 0.0)
        return under_way_s + np.where(inst["asleep"] == 1, inst["slept_wake_s"], 0.0)

    def _resting_w(self) -> Any:
        """Power of instances without an iteration, as the kernel accounts for it."""
        inst, idle_w = self.instances, self._tables["idle_w"]
        at_w = idle_w[inst["type"], np.minimum(inst["clock_k"], inst["clamp_k"])]
        awake = (inst["asleep"] == 0) & (inst["alive"] == 1)
        top_w = idle_w[inst["type"], inst["n_clocks"] - 1]
        return inst["rest_w"] + np.where(awake, at_w - top_w, 0.0)

    def read(self) -> Observation:
        """State now, and what happened since the last read."""
        state = self.state()
        self.instances["arrived_req"] = 0
        self.instances["arrived_tok"] = 0
        return Observation(
            state=state,
            iterations=self._new_iterations(),
            finished=self._new_finished(),
            ready_s=self._ready_s(),
            roles=self.roles,
            backlog=self._waiting.read(int(self._sim[0]["next_arrival"])),
        )

    def _new_iterations(self) -> IterationBatch:
        logged = int(self._sim[0]["n_logged"])
        size = len(self._log)
        first = max(self._read_logged, logged - size)
        self._read_logged = logged
        if first == logged:
            return IterationBatch.empty()
        rows = self._log[np.arange(first, logged) % size]
        return IterationBatch(**{name: rows[name] for name in layout.ITERATION_DTYPE.names or ()})

    def _new_finished(self) -> RequestBatch:
        n_done = int(self._sim[0]["n_done"])
        which = self._done[self._read_done : n_done]
        self._read_done = n_done
        if which.size == 0:
            return RequestBatch.empty()
        rows = self.requests[which]
        return RequestBatch(
            request=which,
            request_class=rows["request_class"],
            prompt_tok=rows["prompt_tok"],
            output_tok=rows["output_tok"],
            # From when it was let in: nobody else knows when it came.
            ttft_s=rows["first_s"] - rows["sent_s"],
            itl_s=(rows["done_s"] - rows["first_s"]) / np.maximum(rows["output_tok"] - 1, 1),
            prefill_instance=rows["prefill_at"],
            decode_instance=rows["decode_at"],
            deferred=(rows["deadline_s"] < NEVER).astype(np.int64),
        )
