"""The batches of an emulated engine are those of the simulated plant."""

import numpy as np
import pytest

from voltana_ctrl import ControlLoop, FleetSpec, load_profile
from voltana_ctrl.backends import SimBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.engines.emulated.batching import Batch, Job
from voltana_ctrl.kernels.law import iteration_cost
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import InstanceSpec, Role

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")


def colocated(**limits):
    return InstanceSpec(id="colocated-0", role=Role.COLOCATED, profile=PROFILE, **limits)


def emulated(instance, work, clock_mhz):
    """TTFT and ITL of a workload on one engine, in a time of its own."""
    row = instance.table[instance.clocks_mhz == clock_mhz][0]
    padded = PROFILE.padded_batch(instance.max_batch)
    batch, times, ends_s, now_s, left = Batch(instance), {}, [0.0], 0.0, 0
    n = len(work.arrival_s)
    while left < n or batch.queue_req or batch.running:
        while left < n and work.arrival_s[left] <= now_s + 1e-12:
            seen = times[left] = []
            job = Job(
                prompt_tok=int(work.prompt_tok[left]), output_tok=int(work.output_tok[left]),
                arrived_s=float(work.arrival_s[left]),
                tell=lambda _, seen=seen: seen.append(ends_s[-1]),
            )  # fmt: skip
            batch.add(job)
            left += 1
        plan = batch.plan()
        if plan.idle:
            now_s = float(work.arrival_s[left])
            continue
        wall_s, _, _ = iteration_cost(
            row, float(padded[plan.batch_req]), float(plan.batch_req), float(plan.kv_tok),
            float(plan.chunk_tok), plan.chunk_tok2, float(plan.begun_req),
        )  # fmt: skip
        now_s += wall_s
        ends_s.append(now_s)
        batch.finish(plan)
    ttft_s = np.array([times[k][0] - work.arrival_s[k] for k in range(n)])
    itl_s = np.array([(times[k][-1] - times[k][0]) / max(1, len(times[k]) - 1) for k in range(n)])
    assert [len(times[k]) for k in range(n)] == work.output_tok.tolist()
    assert batch.kv_tok == 0
    return ttft_s, itl_s


@pytest.mark.parametrize(
    ("limits", "rate_req_s"),
    [
        ({}, 6.0),
        ({"max_batch": 24}, 9.0),  # a queue for the batch
        ({"prefill_budget_tok": 512}, 6.0),  # prompts in parts
        ({"kv_capacity_tok": 9000}, 8.0),  # preemptions
    ],
)
def test_an_engine_answers_when_the_simulated_one_does(limits, rate_req_s):
    instance = colocated(**limits)
    work = make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=25.0, seed=3)
    fleet = FleetSpec((instance,))
    done = []

    class Keep:
        def on_tick(self, record):
            one = record.observation.finished
            done.extend(zip(one.request, one.ttft_s, one.itl_s, strict=True))

    with ControlLoop(
        SimBackend(fleet, workload=work, seed=0), StaticController(fleet, 1005), observers=[Keep()]
    ) as loop:
        loop.run(400.0)
    assert len(done) == len(work.arrival_s) > 100
    theirs = np.array(sorted(done))
    ttft_s, itl_s = emulated(instance, work, 1005.0)
    # The simulated clock needs a moment from the highest to this one, once.
    settled = work.arrival_s > 2.0
    np.testing.assert_allclose(ttft_s[settled], theirs[settled, 1], rtol=0.02, atol=0.01)
    np.testing.assert_allclose(itl_s[settled], theirs[settled, 2], rtol=0.02, atol=1e-3)


def test_a_client_that_leaves_takes_its_memory_with_it():
    batch = Batch(colocated())
    jobs = [Job(prompt_tok=100, output_tok=50, arrived_s=0.0, tell=lambda _: None)
            for _ in range(3)]  # fmt: skip
    for job in jobs:
        batch.add(job)
    batch.finish(batch.plan())
    batch.drop(jobs[1])
    plan = batch.plan()
    assert (plan.batch_req, plan.kv_tok) == (2, 202)


def test_a_prompt_that_was_prefilled_elsewhere_is_decoded_at_once():
    told = []
    batch = Batch(colocated())
    job = Job(prompt_tok=100, output_tok=4, arrived_s=0.0, tell=told.append, moved=True)
    batch.add(job)
    assert batch.queue_tok == 100
    while not (plan := batch.plan()).idle:
        assert plan.chunk_tok == 0
        batch.finish(plan)
    assert told == [2, 3, 4]
