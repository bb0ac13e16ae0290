"""Requests that may wait: held, let in, overtaken and judged; nobody is lost."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import Decision, FleetSpec, Slo, load_profile
from voltana_ctrl.errors import ConfigError, ShapeError
from voltana_ctrl.kernels import layout
from voltana_ctrl.sim.faults import Failure
from voltana_ctrl.sim.metrics import run_figures, snapshot
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop, make_workload
from voltana_ctrl.types import Admission, Backlog

A100 = load_profile("a100-sxm-80gb/llama-3.1-8b")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
AT_ONCE = PlantSettings(actuation_s=0.0, settle_s=0.0)
INF = float("inf")


def workload(*rows: tuple[float, int, int, float]) -> Workload:
    """Rows of arrival, prompt, output and patience."""
    arrival_s, prompt_tok, output_tok, patience_s = (
        list(column) for column in zip(*rows, strict=True)
    )
    return Workload(
        name="few", arrival_s=arrival_s, prompt_tok=prompt_tok, output_tok=output_tok,
        patience_s=patience_s, duration_s=max(arrival_s) + 1.0,
    )  # fmt: skip


def plant_of(load: Workload, fleet: str = "1P1D", **more) -> Plant:
    return Plant(FleetSpec.parse(fleet, A100), load, AT_ONCE, **more)


def admit(plant: Plant, rate_req_s: float, due_s: float = 0.0) -> None:
    wish = Decision.highest(plant.fleet, t_s=plant.now_s)
    plant.apply(replace(wish, admission=Admission(rate_req_s=rate_req_s, due_s=due_s)))


def test_at_once_unless_told_otherwise() -> None:
    """Who may wait and is let in at once, alone, is served like anybody."""
    load = make_workload("fixed", rate_req_s=5.0, duration_s=20.0, seed=0)
    served = []
    for each in (load, load.deferred(1.0, 600.0)):
        plant = plant_of(each)
        plant.advance(60.0)
        served.append(plant.requests[["first_s", "done_s", "prefill_at", "decode_at"]].tolist())
    assert served[0] == served[1]


def test_held_until_let_in_at_the_rate_with_the_earliest_deadline_first() -> None:
    plant = plant_of(workload(*((0.1 * k, 50, 20, 900.0 - 100.0 * k) for k in range(6))))
    admit(plant, 0.0)
    plant.advance(5.0)
    backlog = plant.read().backlog
    # The last to come has the earliest deadline.
    assert backlog.deadline_s == pytest.approx([400.5, 500.4, 600.3, 700.2, 800.1, 900.0])
    assert (backlog.arrived_req, backlog.arrived_tok) == (6.0, 300.0)
    assert (backlog.admitted_req, backlog.due_req(650.0)) == (0.0, 3)
    admit(plant, 0.5)
    plant.advance(5.5)
    assert plant.requests["sent_s"][5] == 5.0
    backlog = plant.read().backlog
    assert (len(backlog), backlog.arrived_req, backlog.admitted_req) == (5, 0.0, 1.0)
    plant.advance(8.0)
    # Twice as fast: half of what is left of the wait, and then one a second.
    admit(plant, 1.0)
    plant.advance(60.0)
    assert plant.requests["sent_s"][::-1].tolist() == [5.0, 7.0, 8.5, 9.5, 10.5, 11.5]
    assert (plant.requests["state"] == layout.DONE).all()
    assert len(plant.read().backlog) == 0


def test_let_in_when_due_whatever_the_rate() -> None:
    plant = plant_of(workload((0.0, 50, 20, 100.0), (0.0, 50, 20, 30.0)))
    admit(plant, 0.0, due_s=20.0)
    plant.advance(200.0)
    assert plant.requests["sent_s"].tolist() == [80.0, 10.0]
    assert (plant.requests["state"] == layout.DONE).all()


def test_rate_after_rest_is_one_at_once_and_not_a_burst() -> None:
    plant = plant_of(workload(*((100.0, 50, 20, 900.0) for _ in range(4))))
    admit(plant, 0.25)
    plant.advance(200.0)
    assert plant.requests["sent_s"].tolist() == [100.0, 104.0, 108.0, 112.0]


def test_interactive_requests_pass_those_that_may_wait() -> None:
    """A long queue of work that may wait, and one client: it is behind the running batch only."""
    late = [(0.0, 4000, 20, 900.0) for _ in range(30)]
    alone = plant_of(workload((1.0, 4000, 20, INF)))
    alone.advance(60.0)
    first_s = alone.requests["first_s"][0]
    plant = plant_of(workload(*late, (1.0, 4000, 20, INF)))
    plant.advance(60.0)
    longest_s = np.diff(np.unique(plant.requests["first_s"][:30])).max()  # an iteration of theirs
    assert plant.requests["first_s"][30] < first_s + 2.0 * longest_s
    assert plant.requests["first_s"][:30].max() > 5.0
    # Without the right to wait it is first come, first served.
    fifo = plant_of(replace(plant.workload, patience_s=np.full(31, INF)))
    fifo.advance(60.0)
    assert fifo.requests["first_s"][30] == fifo.requests["first_s"].max()


def test_they_also_pass_at_the_door_of_decode() -> None:
    """One running request fills the batch; the client came last and is taken first."""
    one = FleetSpec.parse("1P1D", A100)
    fleet = FleetSpec((one.instances[0], replace(one.instances[1], max_batch=1)))
    rows = [(0.0, 50, 200, 900.0), (0.1, 50, 20, 900.0), (0.2, 50, 20, 900.0), (0.3, 50, 20, INF)]
    plant = Plant(fleet, workload(*rows), AT_ONCE)
    plant.advance(60.0)
    done_s = plant.requests["done_s"]
    assert done_s[0] < done_s[3] < done_s[1] < done_s[2]


def test_judged_apart() -> None:
    rows = [(0.0, 50, 20, INF), (0.0, 50, 20, 30.0), (0.0, 50, 20, 5.0), (0.0, 50, 10**6, 900.0)]
    plant = plant_of(workload(*rows))
    admit(plant, 0.0, due_s=3.0)
    before = snapshot(plant)
    plant.advance(40.0)
    figures = run_figures(plant, before, snapshot(plant), 40.0, SLO)
    assert figures["ttft_attainment"] == figures["itl_attainment"] == 1.0
    assert figures["ttft_p99_s"] < 0.6
    assert (figures["requests_arrived"], figures["requests_in_flight"]) == (4, 1)
    assert (figures["deferred_arrived"], figures["deferred_completed"]) == (3, 2)
    # The last is held still, and its deadline has not come.
    assert (figures["deferred_dropped"], figures["deadline_missed"]) == (0, 0)
    assert figures["deferred_in_flight"] == 1
    # Nobody may wait: no figures about it.
    plant = plant_of(workload((0.0, 50, 20, INF)))
    before = snapshot(plant)
    plant.advance(40.0)
    figures = run_figures(plant, before, snapshot(plant), 40.0, SLO)
    assert figures["deadline_missed"] is figures["deferred_arrived"] is None


def test_a_missed_deadline_counts_once() -> None:
    plant = plant_of(workload((0.0, 50, 20, 0.01), (0.0, 50, 10**6, 9.0), (0.0, 50, 9, 50.0)))
    before = snapshot(plant)
    plant.advance(40.0)
    figures = run_figures(plant, before, snapshot(plant), 40.0, SLO)
    assert (figures["deferred_dropped"], figures["deadline_missed"]) == (1, 2)


@given(
    rows=st.lists(
        st.tuples(
            st.floats(0.0, 3.0),
            st.integers(1, 300),
            st.integers(1, 40),
            st.sampled_from([INF, INF, 1.0, 8.0, 60.0]),
        ),
        min_size=1,
        max_size=30,
    ),
    steps=st.lists(
        st.tuples(st.floats(0.05, 1.0), st.sampled_from([0.0, 0.5, 3.0, 100.0, INF])), max_size=6
    ),
    fleet=st.sampled_from(["1P1D", "2P2D", "1C", "2C"]),
    fails=st.booleans(),
)
def test_nobody_is_lost_and_nobody_is_let_in_too_early(rows, steps, fleet, fails) -> None:
    spec = FleetSpec.parse(fleet, A100)
    spec = FleetSpec(
        tuple(replace(one, kv_capacity_tok=400, max_batch=4) for one in spec.instances)
    )
    faults = [Failure(instance=spec.ids[-1], from_s=1.0, until_s=1.5)] if fails else []
    plant = Plant(spec, workload(*sorted(rows)), AT_ONCE, faults=faults)
    counts = np.zeros(2)
    for span_s, rate_req_s in [*steps, (400.0, INF)]:
        admit(plant, rate_req_s, due_s=0.5)
        plant.advance(plant.now_s + span_s)
        seen = plant.read().backlog
        counts += seen.arrived_req, seen.admitted_req
        assert counts[0] - counts[1] == len(seen)
        assert (seen.deadline_s > plant.now_s).all()
    state, sent_s = plant.requests["state"], plant.requests["sent_s"]
    assert np.isin(state, (layout.DONE, layout.DROPPED)).all()
    assert (sent_s >= plant.requests["arrival_s"]).all()
    waits = plant.requests["deadline_s"] < 1e299
    assert (sent_s[~waits] == plant.requests["arrival_s"][~waits]).all()
    assert (
        sent_s[waits]
        <= np.maximum(plant.requests["deadline_s"] - 0.5, plant.requests["arrival_s"])[waits] + 1e-9
    ).all()
    for name in ("kv_tok", "prefill_late", "wait_late", "prefill_req", "wait_req", "running_req"):
        assert (plant.instances[name] == 0).all(), name


def test_who_may_wait_is_drawn_by_seed_class_or_given() -> None:
    load = make_workload("sharegpt", rate_req_s=20.0, duration_s=100.0, seed=0)
    some, more = (
        np.isfinite(load.deferred(share, 60.0, seed=3).patience_s) for share in (0.2, 0.5)
    )
    assert 0.15 < some.mean() < 0.25
    assert more[some].all()
    assert not np.array_equal(some, np.isfinite(load.deferred(0.2, 60.0, seed=4).patience_s))
    named = replace(load, request_class=np.arange(len(load)) % 2, class_names=("batch", "chat"))
    waits = np.isfinite(named.deferred("batch", 60.0).patience_s)
    assert np.array_equal(waits, named.request_class == 0)
    # Nobody may leave work behind: it is due by the end, or a grace after it came.
    due = named.deferred("batch", 1800.0).due_within(90.0, 30.0)
    assert (due.arrival_s + due.patience_s)[waits].max() <= 130.0
    assert due.window(50.0).patience_s.size == len(due.window(50.0))
    for which, deadline_s, words in (
        ("mail", 60.0, "batch, chat"), (1.5, 60.0, "from 0 to 1"), (0.5, 0.0, "deadline"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            named.deferred(which, deadline_s)
    with pytest.raises(ConfigError, match="closed loop waits"):
        make_closed_loop("fixed", concurrency=4, requests=9, seed=0).deferred(0.5, 60.0)
    with pytest.raises(ShapeError, match="patience_s"):
        replace(load, patience_s=np.zeros(len(load)))
    with pytest.raises(ShapeError, match="class_names"):
        replace(load, request_class=np.ones(len(load), int), class_names=("one",))
    for bad in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="rate_req_s"):
            Admission(rate_req_s=bad)
    with pytest.raises(ShapeError, match="never fall"):
        Backlog(deadline_s=[2.0, 1.0], prompt_tok=[1.0, 1.0])
