"""The plant against queueing theory: closed forms that know nothing of its event loop.

The workloads here are Poisson by construction, and profiles are without padding where the
closed form has none.
"""

import dataclasses

import numpy as np
import pytest
from scipy.stats import nbinom

from tests.oracles.queueing import decode_stationary, mg1_wait_s
from voltana_ctrl import Decision, FleetSpec, load_profile
from voltana_ctrl.laws import length_moments
from voltana_ctrl.sim.plant import Plant, PlantSettings
from voltana_ctrl.sim.workload import Workload, make_closed_loop
from voltana_ctrl.types import InstanceSpec, Role

REFERENCE = load_profile("a100-sxm-80gb/llama-3.1-8b-2026-11")


def poisson(rate_req_s, prompt, output, seed) -> Workload:
    rng = np.random.default_rng([seed, 7])
    arrival_s = rng.exponential(1.0 / rate_req_s, prompt.size).cumsum()
    return Workload(
        name="poisson",
        arrival_s=arrival_s,
        prompt_tok=prompt,
        output_tok=output,
        duration_s=float(arrival_s[-1]),
    )


def lognormal_tok(rng, n, median, sigma, low, high):
    return np.clip(rng.lognormal(np.log(median), sigma, n), low, high).round().astype(np.int64)


# ---- prefill: one at a time ---------------------------------------------------------------


@pytest.mark.parametrize("lengths", ["fixed", "sharegpt"])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.8])
def test_prefill_one_at_a_time_waits_as_pollaczek_and_khinchine_say(lengths, rho) -> None:
    n = 300_000 if rho < 0.8 else 1_200_000
    rng = np.random.default_rng(11)
    prompt = np.full(n, 500) if lengths == "fixed" else lognormal_tok(rng, n, 120, 1.2, 4, 3000)
    row = REFERENCE.table[-1]
    service_s = row["prefill_base_s"] + row["prefill_tok_s"] * prompt
    rate_req_s = rho / service_s.mean()
    fleet = FleetSpec(
        tuple(
            dataclasses.replace(one, max_prefill_req=1)
            for one in FleetSpec.parse("1P1D", REFERENCE).instances
        )
    )
    workload = poisson(rate_req_s, prompt, np.ones(n, dtype=np.int64), 5)  # ends with prefill
    plant = Plant(fleet, workload)
    plant.advance(workload.duration_s + 1000.0)
    rows = plant.requests
    wait_s = (rows["first_s"] - rows["arrival_s"] - service_s).mean()
    expected_s = rate_req_s * np.mean(service_s**2) / (2 * (1 - rho))
    assert wait_s == pytest.approx(expected_s, rel=0.02)
    assert mg1_wait_s(rate_req_s, service_s.mean(), service_s.std()) == pytest.approx(expected_s)
    # Utilisation, and the power that follows from it.
    span_s = plant.now_s
    busy_frac = plant.instances["busy_s"][0] / span_s
    assert busy_frac == pytest.approx(service_s.sum() / span_s, rel=1e-9)
    energy_j = plant.state().energy_j[0]
    assert energy_j == pytest.approx(
        span_s * (60.0 + busy_frac * (row["prefill_power_w"] - 60.0)), rel=1e-9
    )


# ---- decode: processor sharing ------------------------------------------------------------


def plain_decode() -> FleetSpec:
    """One decode instance without padding, fed at once: Poisson at the engine's door."""
    quick = REFERENCE.table.copy()
    quick["prefill_base_s"], quick["prefill_tok_s"] = 1e-9, 0.0
    feed = dataclasses.replace(REFERENCE, table=quick, link_bytes_s=1e18, link_latency_s=0.0)
    plain = dataclasses.replace(REFERENCE, batch_steps=())
    return FleetSpec(
        (
            InstanceSpec(id="p", role=Role.PREFILL, profile=feed, kv_capacity_tok=10**9),
            InstanceSpec(
                id="d", role=Role.DECODE, profile=plain, max_batch=4000, kv_capacity_tok=10**9
            ),
        )
    )


@dataclasses.dataclass
class Batches:
    """Time that each batch size was held, from the iterations; empty times are size 0."""

    held_s: np.ndarray
    power_w: float
    running_req: float

    @classmethod
    def of(cls, workload: Workload, freq_mhz: float, warmup_s: float) -> "Batches":
        plant = Plant(plain_decode(), workload, PlantSettings(log_iterations=300_000))
        plant.apply(Decision.highest(plant.fleet, floor_mhz=np.array([1410.0, freq_mhz])))
        plant.advance(warmup_s)
        plant.read()
        before = plant.instances[1].copy()
        energy_j = plant.state().energy_j[1]
        held_s = np.zeros(4001)
        end_s = workload.duration_s
        for t_s in np.linspace(warmup_s, end_s, 2 + int((end_s - warmup_s) / 800))[1:]:
            plant.advance(float(t_s))
            rows = plant.read().iterations
            mine = rows.instance == 1
            held_s += np.bincount(rows.batch_req[mine].astype(int), rows.wall_s[mine], 4001)
        span_s = end_s - warmup_s
        held_s[0] = span_s - held_s.sum()
        state = plant.state()
        assert plant.instances["preemptions"].sum() == 0
        running_req_s = plant.instances[1]["running_req_s"] - before["running_req_s"]
        return cls(held_s, (state.energy_j[1] - energy_j) / span_s, running_req_s / span_s)


def mean_variance_q99(held_s):
    share = held_s / held_s.sum()
    sizes = np.arange(share.size)
    mean = share @ sizes
    q99 = int(np.searchsorted(share.cumsum(), 0.99))
    return mean, share @ (sizes - mean) ** 2, q99


def negative_binomial(row, rate_req_s, prompt, output):
    lengths = length_moments(prompt, output)
    growth_s = row["decode_req_s"] + row["decode_kv_s"] * lengths.context_tok
    rho = rate_req_s * (lengths.output_tok - 1) * growth_s
    return nbinom(row["decode_base_s"] / growth_s + 1, 1 - rho), rho


def shapes(kind: str, n: int, seed: int):
    """Output lengths of mean 101; prompts of 50."""
    rng = np.random.default_rng([seed, 3])
    if kind == "fixed":
        output = np.full(n, 101)
    elif kind == "geometric":
        output = 1 + rng.geometric(1 / 100, n)
    else:  # one long among ten
        output = np.where(rng.random(n) < 0.1, 551, 51)
    return np.full(n, 50), output.astype(np.int64)


def decode_run(kind: str, seconds: float, seed: int, rate_req_s: float = 60.0, k: int = -1):
    prompt, output = shapes(kind, int(rate_req_s * seconds), seed)
    workload = poisson(rate_req_s, prompt, output, seed)
    row = REFERENCE.table[k]
    found = Batches.of(workload, float(row["clock_mhz"]), 100.0)
    return found, negative_binomial(row, rate_req_s, prompt, output), (prompt, output)


def test_mean_decode_batch_is_that_of_the_negative_binomial() -> None:
    found, (expected, rho), (prompt, output) = decode_run("fixed", 2500.0, 1)
    assert 0.3 < rho < 0.5
    mean, _, _ = mean_variance_q99(found.held_s)
    assert mean == pytest.approx(expected.mean(), rel=0.02)
    # Time-averaged in two ways that share no code, and power from the closed form.
    assert found.running_req == pytest.approx(mean, rel=1e-3)
    lengths = length_moments(prompt, output)
    at = decode_stationary(
        REFERENCE.table[-1], 60.0, 101.0, lengths.context_tok, np.arange(1500), 60.0
    )
    assert found.power_w == pytest.approx(at.power_w, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seconds"), [("fixed", 10_000), ("geometric", 12_000),
                                               ("one-long-among-ten", 16_000)])  # fmt: skip
def test_decode_batch_is_negative_binomial_whatever_the_lengths(kind, seconds) -> None:
    held_s = np.zeros(4001)
    means, variances, quantiles = [], [], []
    for seed in range(5):
        found, (expected, _), _ = decode_run(kind, float(seconds), seed)
        held_s += found.held_s
        means.append(expected.mean())
        variances.append(expected.var())
        quantiles.append(expected.ppf(0.99))
    mean, variance, q99 = mean_variance_q99(held_s)
    print(
        f"{kind}: mean {mean:.1f} ({np.mean(means):.1f}), variance {variance:.1f}"
        f" ({np.mean(variances):.1f}), q99 {q99} ({np.mean(quantiles):.1f})"
    )
    assert mean == pytest.approx(np.mean(means), rel=0.02)
    assert variance == pytest.approx(np.mean(variances), rel=0.02)
    assert q99 == pytest.approx(np.mean(quantiles), rel=0.02)


# ---- Little's law -------------------------------------------------------------------------


@pytest.mark.parametrize("fleet", ["2P2D", "3C"])
def test_closed_loop_obeys_little(fleet: str) -> None:
    clients = 40
    plant = Plant(
        FleetSpec.parse(fleet, REFERENCE), make_closed_loop("sharegpt", clients, 20_000, seed=2)
    )
    plant.advance(1000.0)
    done = plant.requests[(plant.requests["done_s"] > 0)]
    response_s = (done["done_s"] - done["arrival_s"]).mean()
    throughput_req_s = done.size / plant.now_s
    assert done.size > 5000
    assert throughput_req_s * response_s == pytest.approx(clients, rel=0.02)
