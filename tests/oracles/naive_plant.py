"""A slow and obvious twin of the compiled plant, written from its rules.

Requests are objects in lists, every token is made one by one, what is in use is counted anew
each time it is asked for, and energy is the sum over all instances at every event. Nothing is
shared with the package but the numbers of the profile, and the values that say what goes wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.oracles.naive_baselines import empty_tok
from voltana_ctrl.sim.faults import ClockClamp, Failure, Slowdown

KEEP_FREE = 0.01  # of the KV cache, at admission


@dataclass
class NaiveRequest:
    number: int
    arrival_s: float
    prompt: int
    output: int
    cached: int = 0
    prefill_at: int | None = None
    decode_at: int | None = None
    made: int = 0  # output tokens so far
    computed: int = 0  # prompt (and recomputed) tokens that have been prefilled
    admitted: bool = False  # holds KV for its prefill
    first_s: float | None = None
    done_s: float | None = None
    dropped: bool = False
    preemptions: int = 0
    retries: int = 0

    @property
    def context(self) -> int:
        return self.prompt + self.made

    @property
    def todo(self) -> int:
        return self.context - self.computed


@dataclass
class NaiveInstance:
    spec: object
    table: list[dict[str, float]]
    clock: int
    want: int
    cap_w: float = float("inf")
    call: tuple[int, float, float] | None = None  # clock, start, end
    settling: list[tuple[float, int]] = field(default_factory=list)
    calls: list[tuple[float, float]] = field(default_factory=list)
    queue: list[NaiveRequest] = field(default_factory=list)  # for prefill
    waiting: list[NaiveRequest] = field(default_factory=list)  # KV arrived, not admitted
    running: list[NaiveRequest] = field(default_factory=list)
    handed: list[NaiveRequest] = field(default_factory=list)  # prefilled here, KV still here
    chunks: list[tuple[NaiveRequest, int]] = field(default_factory=list)
    iterating: bool = False
    start_s: float = 0.0
    end_s: float = 0.0
    wall_s: float = 0.0
    decode_w: float = 0.0
    prefill_w: float = 0.0
    stall_end_s: float = 0.0
    begun: int = 0  # prompts that begin in the present iteration
    run_k: int = 0
    idle_since_s: float | None = 0.0
    kv_in_batch: int = 0
    share: float = 0.0
    active: bool = True
    floor: float = 0.0
    energy: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prefill", "decode", "idle", "transfer"), 0.0)
    )
    iterations: int = 0
    running_req_s: float = 0.0
    most_kv: int = 0
    most_batch: int = 0
    alive: bool = True
    slow: float = 1.0
    clamp_mhz: float = float("inf")
    asleep: bool = False
    wake_end_s: float | None = None
    wakes: int = 0
    lost: int = 0  # tokens made for nothing

    @property
    def kv(self) -> int:
        held = [*self.running, *(r for r in self.queue if r.admitted)]
        return sum(r.context for r in held) + sum(r.prompt for r in self.handed)

    @property
    def waiting_tok(self) -> int:
        return sum(r.todo for r in self.queue) + sum(r.prompt for r in self.waiting)

    @property
    def may_sleep(self) -> bool:
        spec = self.spec
        return spec.asleep_w is not None or spec.wake_s > 0 or spec.wake_j > 0

    @property
    def empty(self) -> bool:
        return not (self.iterating or self.queue or self.waiting or self.running or self.handed)

    @property
    def rest_w(self) -> float:
        """Power without an iteration."""
        if not self.alive:
            return 0.0
        if self.asleep:
            return self.spec.idle_w if self.spec.asleep_w is None else self.spec.asleep_w
        clamped = [row for row in self.table if row["clock_mhz"] <= self.clamp_mhz]
        held = min(self.clock, len(clamped) - 1)
        slower_w = self.table[-1]["idle_w"] - self.table[held]["idle_w"]
        if self.wake_end_s is not None:
            return self.spec.idle_w + self.spec.wake_j / self.spec.wake_s - slower_w
        return self.spec.idle_w - slower_w

    def wake(self, now_s: float) -> None:
        self.asleep = False
        self.wakes += 1
        if self.spec.wake_s > 0:
            self.wake_end_s = now_s + self.spec.wake_s
        else:
            self.energy["idle"] += self.spec.wake_j

    def fits(self, need: int) -> bool:
        if self.kv == 0:
            return True
        return self.kv + need + len(self.running) <= (1 - KEEP_FREE) * self.spec.kv_capacity_tok

    def padded(self, n: int) -> int:
        lower = 0
        for upto, step in self.spec.profile.batch_steps:
            if lower < n <= upto:
                return (n + step - 1) // step * step
            lower = upto
        return n

    def cost(self, k: int) -> tuple[float, float, float]:
        """Seconds, decode joules, prefill joules of the present batch at clock k."""
        row = self.table[k]
        n = len(self.running)
        tok = sum(count for _, count in self.chunks)
        tok2 = sum((r.computed + c) ** 2 - r.computed**2 for r, c in self.chunks)
        decode_s = decode_j = prefill_s = 0.0
        if n:
            decode_s = (
                max(
                    row["decode_floor_s"],
                    max(
                        row["decode_base_s"] + row["decode_req_s"] * self.padded(n),
                        row["decode_roof_base_s"]
                        + row["decode_roof_s"] * self.padded(n)
                        + row["prefill_tok_s"] * empty_tok(row, self.padded(n) + tok),
                    )
                    + row["decode_kv_s"] * self.kv_in_batch,
                )
                + row["decode_host_s"]
            )
            decode_j = (
                decode_s * row["decode_power_w"]
                + row["decode_iter_j"]
                + row["decode_req_j"] * n
                + row["decode_kv_j"] * self.kv_in_batch
                - row["decode_host_s"] * (row["decode_power_w"] - row["idle_w"])
            )
        if tok:
            prefill_s = row["prefill_tok_s"] * tok + row["prefill_tok2_s"] * tok2
            if not n:
                prefill_s += row["prefill_base_s"]
                prefill_s += row["prefill_tok_s"] * empty_tok(row, tok)
        prefill_j = prefill_s * row["prefill_power_w"]
        if n:
            prefill_j += prefill_s * row["prefill_beside_w"]
        host_s = self.begun * row["prefill_req_s"]
        prefill_j += host_s * row["idle_w"]
        return decode_s + prefill_s + host_s, decode_j, prefill_j

    def pace(self) -> float:
        """Length of the whole iteration at the present clock; sets the powers."""
        runs = [k for k, row in enumerate(self.table) if row["clock_mhz"] <= self.clamp_mhz]
        k = min(self.clock, runs[-1])
        while True:
            wall_s, decode_j, prefill_j = self.cost(k)
            if k == 0 or (decode_j + prefill_j) / wall_s <= self.cap_w:
                break
            k -= 1
        self.run_k = k
        self.decode_w, self.prefill_w = decode_j / wall_s, prefill_j / wall_s
        return wall_s * self.slow

    def work(self, now_s: float, left: float) -> None:
        """That much of the iteration is left, and begins once the clock is stable."""
        left_s = left * self.wall_s
        stall_s = max(0.0, self.stall_end_s - now_s)
        self.end_s = now_s + stall_s + left_s
        if stall_s > 0.0:
            drawn_w = self.decode_w + self.prefill_w
            idle_j = stall_s * self.table[self.run_k]["idle_w"]
            part = (drawn_w * left_s + idle_j) / (left_s + stall_s) / drawn_w
            self.decode_w, self.prefill_w = part * self.decode_w, part * self.prefill_w


class NaivePlant:
    """`govern(instance, now_s, twin) -> MHz`, or None where decisions write the clocks."""

    def __init__(
        self,
        fleet,
        workload,
        *,
        actuation_s: float = 0.0,
        settle_s: float = 0.0,
        decode_at_arrival: bool = False,
        govern: Callable[[NaiveInstance, float], float] | None = None,
        idle_call_s: float = float("inf"),
        faults=(),
    ) -> None:
        self.fleet = fleet
        self.faults = faults
        spans_s = {t for fault in faults for t in (fault.from_s, fault.until_s)}
        self.edges_s = sorted(t for t in spans_s if t < float("inf"))
        self.actuation_s, self.settle_s = actuation_s, settle_s
        self.decode_at_arrival = decode_at_arrival
        self.govern = govern
        self.idle_call_s = idle_call_s
        self.now_s = 0.0
        self.instances = []
        for spec in fleet.instances:
            rows = [
                {name: float(row[name]) for name in spec.table.dtype.names} for row in spec.table
            ]
            top = len(rows) - 1
            self.instances.append(NaiveInstance(spec=spec, table=rows, clock=top, want=top))
        self.requests = [
            NaiveRequest(i, float(t), int(p), int(o), int(c))
            for i, (t, p, o, c) in enumerate(
                zip(
                    workload.arrival_s,
                    workload.prompt_tok,
                    workload.output_tok,
                    workload.cached_tok,
                    strict=True,
                )
            )
        ]
        clients = workload.concurrency
        self.closed = clients is not None
        self.coming = self.requests[:clients] if self.closed else list(self.requests)
        self.later = self.requests[clients:] if self.closed else []
        self.moving: list[tuple[float, int, NaiveRequest]] = []
        self.to_route: list[NaiveRequest] = []
        self.to_start: list[int] = []
        self.held: list[NaiveRequest] = []  # nobody lives who could take them
        self.node_free_s = dict.fromkeys((spec.node for spec in fleet.instances), 0.0)
        self.credit = {"prefill": [0.0] * len(fleet), "decode": [0.0] * len(fleet)}
        if self.edges_s[:1] == [0.0]:
            self.strike()

    # -- decisions ------------------------------------------------------------------------

    def apply(self, decision) -> None:
        caps = decision.limits.power_cap_w if decision.limits else None
        for i, one in enumerate(self.instances):
            one.share = float(decision.route_frac[i])
            one.active = bool(decision.active[i])
            one.floor = float(decision.freq_mhz[i])
            cap_w = float("inf") if caps is None else float(caps[i])
            if cap_w != one.cap_w:
                one.cap_w = cap_w
                self.repace(one)
            if one.active and one.asleep:
                one.wake(self.now_s)
        self.settle_down()
        if self.govern is None:
            for one in self.instances:
                self.order_clock(one, one.floor)

    # -- clocks ---------------------------------------------------------------------------

    def order_clock(self, one: NaiveInstance, mhz: float) -> None:
        clocks = [row["clock_mhz"] for row in one.table]
        k = next((k for k, clock in enumerate(clocks) if clock >= mhz), len(clocks) - 1)
        if k == one.want:
            return
        one.want = k
        if self.actuation_s == 0 and self.settle_s == 0:
            self.change_clock(one, k)
        elif one.call is None:
            self.call(one)
        elif one.call[1] > self.now_s:
            one.call = (k, *one.call[1:])

    def call(self, one: NaiveInstance) -> None:
        start = max(self.now_s, self.node_free_s[one.spec.node])
        end = start + self.actuation_s
        self.node_free_s[one.spec.node] = end
        one.call = (one.want, start, end)
        one.calls.append((start, end))

    def call_returned(self, one: NaiveInstance) -> None:
        k = one.call[0]
        one.call = None
        if self.settle_s == 0:
            self.change_clock(one, k)
        else:
            one.settling.append((self.now_s + self.settle_s, k))
        if one.want != k:
            self.call(one)

    def change_clock(self, one: NaiveInstance, k: int) -> None:
        if k == one.clock:
            return
        left = self.left(one)
        one.clock = k
        if one.alive:
            profile = one.spec.profile
            one.energy["idle"] += profile.clock_change_j
            one.stall_end_s = max(one.stall_end_s, self.now_s + profile.clock_stall_s)
        self.repace(one, left)

    def left(self, one: NaiveInstance) -> float:
        """Share of its iteration that is still to be done: time in a stall is none."""
        if not one.iterating:
            return 0.0
        return (one.end_s - max(self.now_s, one.stall_end_s)) / one.wall_s

    def repace(self, one: NaiveInstance, left: float | None = None) -> None:
        if one.iterating:
            left = self.left(one) if left is None else left
            one.wall_s = one.pace()
            one.work(self.now_s, left)

    # -- routing --------------------------------------------------------------------------

    def pick(self, phase: str, need: int) -> int | None:
        members = [int(i) for i in getattr(self.fleet, phase)]
        able = [i for i in members if self.fleet.instances[i].kv_capacity_tok >= need]
        if not able:
            return None
        one = self.instances
        lost = sum(one[i].share for i in members if one[i].active and not one[i].alive)
        able = [i for i in able if one[i].alive] or able
        awake = [i for i in able if not one[i].asleep and one[i].wake_end_s is None]
        stand_in = [i for i in awake if lost > 0 and one[i].alive and not one[i].active]
        for i in stand_in:
            one[i].share = lost / len(stand_in)
        able = [i for i in able if one[i].active or i in stand_in] or able
        awake = [i for i in able if i in awake]
        able = awake or able
        credit = self.credit[phase]
        share = {i: self.instances[i].share for i in able}
        if sum(share.values()) == 0:
            share = dict.fromkeys(able, 1.0)  # nobody decided: evenly
        for i in able:
            credit[i] += share[i]
        chosen = max(able, key=lambda i: (credit[i], -i))
        credit[chosen] -= sum(share.values())
        return chosen

    def reaches(self, phase: str, need: int) -> bool:
        """Whether somebody lives who could hold so much."""
        return any(
            self.instances[i].alive and self.fleet.instances[i].kv_capacity_tok >= need
            for i in getattr(self.fleet, phase)
        )

    def route(self, r: NaiveRequest) -> None:
        whole = r.prompt + r.output
        fleet = self.fleet.instances
        largest = max(fleet[i].kv_capacity_tok for i in self.fleet.decode)
        if r.prefill_at is None:
            first_need = whole if self.fleet.colocated else r.prompt
            if whole > largest or first_need > max(
                fleet[i].kv_capacity_tok for i in self.fleet.prefill
            ):
                r.dropped = True
                self.answered()
                return
            early = self.decode_at_arrival and not self.fleet.colocated
            if not self.reaches("prefill", first_need) or (
                early and not self.reaches("decode", whole)
            ):
                self.held.append(r)
                return
            r.prefill_at = self.pick("prefill", first_need)
            if self.decode_at_arrival and not self.fleet.colocated:
                r.decode_at = self.pick("decode", whole)
            r.computed = r.cached
            self.instances[r.prefill_at].queue.append(r)
            self.start_later(r.prefill_at)
            return
        if r.decode_at is None:
            if not self.reaches("decode", whole):
                self.held.append(r)
                return
            r.decode_at = self.pick("decode", whole)
        source = self.instances[r.prefill_at]
        profile = source.spec.profile
        source.energy["transfer"] += r.prompt * profile.transfer_j_per_tok
        takes_s = (
            profile.link_latency_s + r.prompt * profile.kv_bytes_per_tok / profile.link_bytes_s
        )
        self.moving.append((self.now_s + takes_s, r.number, r))

    def answered(self) -> None:
        """Closed loop: a client that has its answer sends the next request."""
        if self.closed and self.later:
            r = self.later.pop(0)
            r.arrival_s = self.now_s
            self.to_route.append(r)

    # -- iterations -----------------------------------------------------------------------

    def start_later(self, i: int) -> None:
        if not self.instances[i].iterating and i not in self.to_start:
            self.to_start.append(i)

    def form_batch(self, i: int) -> None:
        one = self.instances[i]
        spec = one.spec

        def admitted() -> list[NaiveRequest]:
            return [r for r in one.queue if r.admitted]

        while one.waiting and all(r.admitted for r in one.queue):
            r = one.waiting[0]
            if len(one.running) + len(admitted()) >= spec.max_batch or not one.fits(r.context):
                break
            one.waiting.pop(0)
            one.running.append(r)
            source = self.instances[r.prefill_at]
            source.handed.remove(r)
            if source.queue or (source.may_sleep and not source.active):
                self.start_later(r.prefill_at)
        while len(one.running) > 1 and one.kv + len(one.running) > spec.kv_capacity_tok:
            r = one.running.pop()
            r.preemptions += 1
            r.admitted, r.computed = False, 0
            one.queue.insert(len(admitted()), r)
        if one.running and one.kv + len(one.running) > spec.kv_capacity_tok:
            for r in admitted():
                r.admitted, r.computed = False, 0
        budget = spec.prefill_budget_tok - len(one.running)
        one.chunks = []
        one.begun = 0
        for r in one.queue:
            if budget <= 0 or len(one.chunks) >= spec.max_prefill_req:
                break
            if not r.admitted:
                slots = len(one.running) + len(admitted())
                if slots >= spec.max_batch or not one.fits(r.context):
                    break
                r.admitted = True
                one.begun += 1
            one.chunks.append((r, min(r.todo, budget)))
            budget -= one.chunks[-1][1]

    def start(self, i: int) -> None:
        one = self.instances[i]
        if not one.alive:
            return
        if one.asleep and (one.queue or one.waiting):
            one.wake(self.now_s)
        if one.wake_end_s is not None:
            return
        self.form_batch(i)
        if not one.running and not one.chunks:
            one.idle_since_s = self.now_s
            return
        # The instance goes on before those whose KV it has set free.
        one.kv_in_batch = one.kv
        one.most_kv = max(one.most_kv, one.kv)
        one.most_batch = max(one.most_batch, len(one.running))
        if self.govern is not None:
            self.order_clock(one, self.govern(one, self.now_s))
        one.iterating = True
        one.start_s = self.now_s
        one.wall_s = one.pace()
        one.work(self.now_s, 1.0)

    def end_iteration(self, i: int) -> None:
        one = self.instances[i]
        one.iterating = False
        one.iterations += 1
        finished = []
        for r in one.running:
            r.made += 1
            if r.first_s is None:
                r.first_s = self.now_s
            if r.made == r.output:
                r.done_s = self.now_s
                finished.append(r)
        one.running = [r for r in one.running if r.done_s is None]
        for r, count in one.chunks:
            r.computed += count
            if r.todo:
                continue
            one.queue.remove(r)
            r.admitted = False
            if r.made:
                one.running.append(r)  # was preempted
                continue
            r.made = 1
            streams_here = one.spec.role.decodes or one.spec.profile.first_token == "prefill"
            if r.first_s is None and (streams_here or r.output == 1):
                r.first_s = self.now_s
            if r.output == 1:
                r.done_s = self.now_s
                finished.append(r)
            elif one.spec.role.decodes:
                r.decode_at = i
                one.running.append(r)
            else:
                one.handed.append(r)
                self.to_route.append(r)
        for _ in finished:
            self.answered()
        self.start_later(i)

    # -- what goes wrong ------------------------------------------------------------------

    def strike(self) -> None:
        """An edge of the faults: whatever holds from now on."""
        self.edges_s.pop(0)
        ends = []
        for i, one in enumerate(self.instances):
            mine = [
                fault
                for fault in self.faults
                if fault.instance == one.spec.id and fault.from_s <= self.now_s < fault.until_s
            ]
            if one.alive and any(isinstance(fault, Failure) for fault in mine):
                self.fail(i)
            elif not one.alive and not any(isinstance(fault, Failure) for fault in mine):
                ends.append(i)
            before = one.slow, np.sum(one.spec.clocks_mhz <= one.clamp_mhz)
            one.slow = float(np.prod([f.slow_frac for f in mine if isinstance(f, Slowdown)]))
            one.clamp_mhz = min(
                [f.clamp_mhz for f in mine if isinstance(f, ClockClamp)], default=float("inf")
            )
            if (one.slow, np.sum(one.spec.clocks_mhz <= one.clamp_mhz)) != before:
                self.repace(one)
        for i in ends:
            self.instances[i].alive = True
            self.to_route += self.held
            self.held = []
            self.start_later(i)

    def fail(self, i: int) -> None:
        one = self.instances[i]
        self.to_route += self.held
        self.held = []
        for r in self.requests:
            if r.done_s is not None or r.dropped:
                continue
            lost = r in one.queue or r in one.running or r in one.handed
            if not lost and r.decode_at != i:
                continue
            under_way = [item for item in self.moving if item[2] is r]
            arrived = [d for d in self.instances if r in d.waiting]
            for item in under_way:
                self.moving.remove(item)
            for d in arrived:
                d.waiting.remove(r)
            r.decode_at = None
            if lost:
                one.lost += r.made
                r.made, r.computed, r.admitted, r.prefill_at = 0, 0, False, None
                r.retries += 1
            if (lost or under_way or arrived) and r not in self.to_route:
                self.to_route.append(r)
        one.queue, one.running, one.handed, one.chunks = [], [], [], []
        one.alive, one.iterating, one.asleep = False, False, False
        one.idle_since_s = one.wake_end_s = None

    def settle_down(self) -> None:
        """Whoever is parked and has nothing sleeps."""
        for one in self.instances:
            if one.may_sleep and one.alive and not one.active and one.empty:
                one.asleep = one.asleep or one.wake_end_s is None

    # -- the event loop -------------------------------------------------------------------

    def next_event(self) -> tuple[float, Callable[[], None]] | None:
        """Earliest event; at equal times instances by index, KV arrivals, requests."""
        events: list[tuple[float, Callable[[], None]]] = []
        for i, one in enumerate(self.instances):
            if one.call is not None:
                events.append((one.call[2], lambda one=one: self.call_returned(one)))
            if one.settling:
                t, k = one.settling[0]

                def settle(one: NaiveInstance = one, k: int = k) -> None:
                    one.settling.pop(0)
                    self.change_clock(one, k)

                events.append((t, settle))
            if one.wake_end_s is not None:

                def awake(one: NaiveInstance = one, i: int = i) -> None:
                    one.wake_end_s = None
                    self.start_later(i)

                events.append((one.wake_end_s, awake))
            if one.iterating:
                events.append((one.end_s, lambda i=i: self.end_iteration(i)))
            elif self.govern is not None and one.idle_since_s is not None:

                def ask(one: NaiveInstance = one) -> None:
                    one.idle_since_s = None
                    one.chunks = []
                    self.order_clock(one, self.govern(one, self.now_s))

                events.append((one.idle_since_s + self.idle_call_s, ask))
        if self.moving:
            t, _, r = item = min(self.moving)

            def arrive(item=item, r: NaiveRequest = r) -> None:
                self.moving.remove(item)
                self.instances[r.decode_at].waiting.append(r)
                self.start_later(r.decode_at)

            events.append((t, arrive))
        if self.coming:
            events.append(
                (self.coming[0].arrival_s, lambda: self.to_route.append(self.coming.pop(0)))
            )
        return min(events, key=lambda event: event[0]) if events else None

    def advance(self, until_s: float) -> None:
        while self.edges_s and self.edges_s[0] <= until_s:
            self.run(self.edges_s[0])
            self.strike()
        self.run(until_s)

    def run(self, until_s: float) -> None:
        while True:
            while self.to_route or self.to_start:
                if self.to_route:
                    self.route(self.to_route.pop(0))
                else:
                    self.start_one()
            self.settle_down()
            event = self.next_event()
            if event is None or event[0] > until_s:
                self.pass_time(until_s)
                return
            self.pass_time(event[0])
            event[1]()

    def start_one(self) -> None:
        """Start the instance listed last, then those it has set free, the latest first."""
        i = self.to_start.pop()
        self.start(i)

    def pass_time(self, t_s: float) -> None:
        span_s = t_s - self.now_s
        for one in self.instances:
            one.running_req_s += len(one.running) * span_s
            if one.iterating:
                one.energy["decode"] += one.decode_w * span_s
                one.energy["prefill"] += one.prefill_w * span_s
            else:
                one.energy["idle"] += one.rest_w * span_s
        self.now_s = t_s

    def energies(self) -> np.ndarray:
        """Joules, shape (n, 4): prefill, decode, idle, transfer."""
        return np.array([list(one.energy.values()) for one in self.instances])


def naive_ecofreq(
    one: NaiveInstance,
    ladder_mhz: list[float],
    slo,
    *,
    running: int,
    kv: int,
    waiting_tok: int,
    batch_tok: int,
    oldest_s: float,
) -> float:
    """EcoFreq's rules 3 to 6: a queue means the top; else the lowest clock that is in time."""
    ladder = sorted(ladder_mhz)
    if waiting_tok > batch_tok:
        return ladder[-1]
    if running == 0 and batch_tok == 0:
        return ladder[0]
    for mhz in ladder[:-1]:
        row = next(row for row in one.table if row["clock_mhz"] == mhz)
        decode_s = (
            max(
                row["decode_floor_s"],
                max(
                    row["decode_base_s"] + row["decode_req_s"] * one.padded(running),
                    row["decode_roof_base_s"]
                    + row["decode_roof_s"] * one.padded(running)
                    + row["prefill_tok_s"] * empty_tok(row, one.padded(running)),
                )
                + row["decode_kv_s"] * kv,
            )
            + row["decode_host_s"]
        )
        prefill_s = row["prefill_tok_s"] * batch_tok
        if running and batch_tok:
            takes_s = decode_s + prefill_s
            ok = takes_s <= slo.itl_s and takes_s <= slo.ttft_s - oldest_s
        elif running:
            ok = decode_s <= slo.itl_s
        else:
            launch_s = row["prefill_req_s"] + row["prefill_base_s"]
            prefill_s += row["prefill_tok_s"] * empty_tok(row, batch_tok)
            ok = launch_s + prefill_s <= slo.ttft_s - oldest_s
        if ok:
            return mhz
    return ladder[-1]


def ecofreq_of(ladder_mhz: list[float], slo) -> Callable[[NaiveInstance, float], float]:
    """EcoFreq as the twin's governor."""

    def govern(one: NaiveInstance, now_s: float) -> float:
        head = (one.queue or one.waiting or [None])[0]
        return naive_ecofreq(
            one,
            ladder_mhz,
            slo,
            running=len(one.running),
            kv=one.kv,
            waiting_tok=one.waiting_tok,
            batch_tok=sum(count for _, count in one.chunks),
            oldest_s=0.0 if head is None else now_s - head.arrival_s,
        )

    return govern
