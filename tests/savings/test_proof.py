"""A known saving is found, none is found where there is none, and weak logs are refused."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cli.test_cli import run
from tests.helpers.fake_gpus import fleet
from voltana_ctrl import ConfigError, ControlLoop, FleetState, Observation, Slo
from voltana_ctrl.backends import Recorder, SimBackend
from voltana_ctrl.control import StaticController
from voltana_ctrl.live.ticklog import TickLog, write_parquet
from voltana_ctrl.savings.blocks import BlockMeter
from voltana_ctrl.savings.evidence import EvidenceRefused
from voltana_ctrl.savings.proof import _paired_interval, estimate_savings, savings_of_log
from voltana_ctrl.savings.switchback import (
    AGE_NOTE,
    BLOCK_NOTE,
    LENGTH_NOTE,
    POLICY_NOTE,
    SwitchbackController,
    at_policy,
)
from voltana_ctrl.sim.workload import make_workload
from voltana_ctrl.types import RequestBatch

SLO = Slo(ttft_s=0.6, itl_s=0.06)
RATE_REQ_S, CLOCK_MHZ, BLOCK_S, PAIRS = 16.0, 1065.0, 60.0, 10


@functools.cache
def known_saving_frac(clock_mhz: float) -> float:
    """Saving of a fixed clock, from two runs of eleven hours on the same requests."""
    j_tok = []
    for mhz in (clock_mhz, 1410.0):
        workload = make_workload("sharegpt", rate_req_s=RATE_REQ_S, duration_s=40_000.0, seed=99)
        plant = SimBackend(fleet(), workload=workload)
        plant.apply(StaticController(fleet(), mhz).decide(plant.read(), None)[0])
        plant.clock.sleep_until_s(100.0)
        before = plant.read()
        plant.clock.sleep_until_s(40_000.0)
        after = plant.read()
        spent_j = (after.state.energy_j - before.state.energy_j).sum()
        j_tok.append(spent_j / after.finished.output_tok.sum())
    return 1.0 - j_tok[0] / j_tok[1]


def switchback(seed, clock_mhz, *observers, rate_req_s=RATE_REQ_S, pairs=PAIRS, block_s=BLOCK_S):
    span_s = 2 * pairs * block_s + 16.0
    workload = make_workload("sharegpt", rate_req_s=rate_req_s, duration_s=span_s + 60, seed=seed)
    controller = SwitchbackController(
        StaticController(fleet(), clock_mhz, period_s=4.0), block_s=block_s, seed=seed
    )
    plant = SimBackend(fleet(), workload=workload, seed=seed)
    with ControlLoop(plant, controller, observers=observers) as loop:
        loop.run(span_s)


def measured(seed, clock_mhz):
    meter = BlockMeter(slo=SLO)
    switchback(seed, clock_mhz, meter)
    return estimate_savings(meter)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "ticks.jsonl"
    with TickLog(path, fleet(), slo=SLO) as ticks:
        switchback(1, CLOCK_MHZ, ticks, pairs=8)
    assert ticks.failure is None
    return path


@pytest.mark.slow
def test_known_saving_is_recovered():
    known = known_saving_frac(CLOCK_MHZ)
    assert known == pytest.approx(0.283, abs=0.005)
    found = [measured(seed, CLOCK_MHZ).saving_frac for seed in range(100)]
    assert sum(known in one for one in found) >= 90
    assert sum(0.283 in one for one in found) >= 90
    # Narrow enough to be of use, and not off to one side.
    assert np.mean([one.high - one.low for one in found]) < 0.08
    values = np.array([one.value for one in found])
    assert abs(values.mean() - known) < 3.0 * values.std() / math.sqrt(len(values))


@pytest.mark.slow
def test_no_saving_is_claimed_where_there_is_none():
    wrong = sum(0.0 not in measured(seed, 1410.0).saving_frac for seed in range(1000, 1050))
    # Five per cent of 50 are 2.5; more than 7 would be chance once in 250.
    assert wrong <= 7


def drifting(seed, *, saving_frac, drift, pairs=12, ticks=5, noise=0.02):
    """A switchback whose power drifts by itself, correlated over hours."""
    rng = np.random.default_rng(seed)
    meter, energy_j, t_s = BlockMeter(washout_s=1.0), np.zeros(2), 0.0
    walk = np.cumsum(rng.normal(0.0, drift, 2 * pairs + 1)) + 3.0 * drift * np.arange(2 * pairs + 1)
    for block in range(2 * pairs + 1):
        policy = at_policy(block, seed)
        power_w = 200.0 * np.exp(walk[block] + rng.normal(0.0, noise))
        power_w *= 1.0 - saving_frac * policy
        for tick in range(ticks):
            notes = {
                BLOCK_NOTE: block, POLICY_NOTE: float(policy),
                LENGTH_NOTE: float(ticks), AGE_NOTE: float(tick),
            }  # fmt: skip
            state = replace(FleetState.idle(2, t_s=t_s), energy_j=energy_j)
            meter.add(Observation(state=state, finished=requests(20)), notes)
            energy_j = energy_j + power_w
            t_s += 1.0
    return estimate_savings(meter)


def requests(n, *, itl_s=0.0, ttft_s=0.1, output_tok=10.0):
    full = functools.partial(np.full, n)
    return RequestBatch(
        request=np.arange(n), request_class=full(0), prompt_tok=full(50.0),
        output_tok=full(output_tok), ttft_s=full(ttft_s), itl_s=full(itl_s),
        prefill_instance=full(0), decode_instance=full(1),
    )  # fmt: skip


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_interval_covers_under_drift(drift):
    covered = sum(
        0.25 in drifting(seed, saving_frac=0.25, drift=drift).saving_frac for seed in range(100)
    )
    # 95 of 100 expected; fewer than 88 would be chance once in 500.
    assert covered >= 88


def test_before_and_after_would_not():
    """What the order is for: the same drift, the policy always second."""
    wrong = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        walk = np.cumsum(rng.normal(0.0, 0.02, 24)) + 0.06 * np.arange(24)
        wrong += 0.0 not in _paired_interval(walk[1::2] - walk[::2])
    assert wrong > 30


@given(st.lists(st.floats(-5.0, 5.0), min_size=2, max_size=30))
def test_interval_is_that_of_the_textbook(values):
    stats = pytest.importorskip("scipy.stats")
    found = _paired_interval(np.array(values))
    if np.std(values) < 1e-9:
        return
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low, abs=1e-9)
    assert found.high == pytest.approx(expected.high, abs=1e-9)


def test_figures_agree_with_each_other(log):
    found = savings_of_log(log, price_kwh=0.3, co2_g_kwh=400.0)
    saving = found.saving_frac
    assert saving.low < saving.value < saving.high
    assert found.pairs == 8
    # The log ends 16 s into the next block, which is only there for the last requests.
    assert found.left_out == 1
    assert found.washout_s == 12.0
    assert found.saved_kwh_day.value == pytest.approx(
        saving.value * found.highest_w * 24.0 / 1000.0
    )
    assert found.saved_cost_day.high == pytest.approx(0.3 * found.saved_kwh_day.high)
    assert found.saved_co2_g_day.low == pytest.approx(400.0 * found.saved_kwh_day.low)
    # Saved in the log: 8 blocks of 48 s of the policy.
    policy_kwh = found.policy_w * 8 * 48.0 / 3.6e6
    assert found.saved_kwh.value == pytest.approx(
        policy_kwh * (1.0 / (1.0 - saving.value) - 1.0), rel=1e-6
    )
    # Judged by the SLO of the log's header.
    assert found.policy_attainment_frac > 0.9
    assert (
        found.attainment_gap_frac.low
        <= found.policy_attainment_frac - found.highest_attainment_frac + 0.01
    )
    text = found.text()
    assert f"{100 * saving.value:.1f} %" in text
    assert "kWh per day" in text


def test_other_slo_judges_otherwise(log):
    strict = savings_of_log(log, slo=Slo(ttft_s=0.6, itl_s=0.019))
    assert strict.policy_attainment_frac < strict.highest_attainment_frac
    assert strict.attainment_gap_frac.high < 0.0


def test_parts_and_parquet_say_the_same(log, tmp_path):
    pytest.importorskip("pyarrow")
    whole = savings_of_log(log)
    header, *lines = log.read_text().splitlines(keepends=True)
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(header + "".join(lines[:80]))
    second.write_text(header + "".join(lines[80:]))
    assert savings_of_log([first, second]) == whole
    write_parquet(log, tmp_path / "c.parquet")
    assert savings_of_log(tmp_path / "c.parquet") == whole


def test_a_log_is_found_by_its_name_or_its_folder(log, tmp_path):
    path = tmp_path / "ticks.jsonl"
    header, *lines = log.read_text().splitlines(keepends=True)
    third = len(lines) // 3
    parts = (lines[:third], lines[third : 2 * third], lines[2 * third :])
    names = ("ticks-000009.jsonl", "ticks-000010.jsonl", "ticks.jsonl")
    for name, part in zip(names, parts, strict=True):
        (tmp_path / name).write_text(header + "".join(part))
    whole = savings_of_log(log)
    for logs in (path, tmp_path, [tmp_path / name for name in names]):
        assert savings_of_log(logs) == whole
    path.rename(tmp_path / "ticks-000011.jsonl")  # as an agent that writes Parquet leaves it
    assert savings_of_log(path) == whole
    assert savings_of_log(tmp_path) == whole
    (tmp_path / "other.jsonl").write_text(header)
    with pytest.raises(ConfigError, match=r"one log, got other\.jsonl, ticks\.jsonl"):
        savings_of_log(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="got none"):
        savings_of_log(empty)
    with pytest.raises(ConfigError, match="cannot be read"):
        savings_of_log(empty / "no-such" / "ticks.jsonl")


def test_energy_of_some_instances(log):
    decode = savings_of_log(log, instances=["decode-0"])
    whole = savings_of_log(log)
    assert decode.highest_w < whole.highest_w
    with pytest.raises(ConfigError, match="no 'decode-7'"):
        savings_of_log(log, instances=["decode-7"])


def rewritten(log, tmp_path, change):
    path = tmp_path / "changed.jsonl"
    header, *lines = log.read_text().splitlines()
    ticks = [json.loads(line) for line in lines]
    kept = [tick for tick in ticks if change(tick) is not False]
    path.write_text("\n".join([header, *map(json.dumps, kept)]) + "\n")
    return path


def refused(name, path):
    with pytest.raises(EvidenceRefused, match=f"^{name}: ") as found:
        savings_of_log(path)
    assert found.value.name == name


def test_log_without_marks_is_refused(log, tmp_path):
    refused("no switchback", rewritten(log, tmp_path, lambda tick: tick["notes"].clear()))


def test_short_log_is_refused(log, tmp_path):
    refused("too few blocks", rewritten(log, tmp_path, lambda tick: tick["notes"][BLOCK_NOTE] < 10))


def test_missing_power_is_refused(log, tmp_path):
    def unplug(tick):
        tick["observation"]["state"]["energy_j"][1] = 0.0

    refused("missing power", rewritten(log, tmp_path, unplug))


def test_no_requests_is_refused(log, tmp_path):
    def silence(tick):
        finished = tick["observation"]["finished"]
        for name in finished:
            finished[name] = []

    refused("no requests", rewritten(log, tmp_path, silence))


def quiet(blocks, asked=False, waits_req=0.0):
    """Nothing is generated in these blocks; nobody asked for anything, unless told otherwise."""

    def change(tick):
        if tick["notes"][BLOCK_NOTE] in blocks:
            finished, state = tick["observation"]["finished"], tick["observation"]["state"]
            for name in finished:
                finished[name] = []
            if not asked:
                state["arrived_req"] = [0.0, 0.0]
                state["queue_req"] = [0.0, 0.0]
                state["running_req"] = [waits_req, 0.0]

    return change


@pytest.mark.parametrize("idle", [4, 5])  # one is of the policy, the other at the highest clock
def test_a_pair_with_an_idle_block_is_left_out_and_said(log, tmp_path, idle):
    found = savings_of_log(rewritten(log, tmp_path, quiet([idle])))
    whole = savings_of_log(log)
    assert (found.pairs, found.idle_pairs, found.left_out) == (7, 1, whole.left_out + 2)
    assert found.saving_frac.value == pytest.approx(whole.saving_frac.value, abs=0.03)
    assert "1 pair among them, in which nobody asked for anything" in found.text()
    assert found.to_dict()["idle_pairs"] == 1
    assert whole.idle_pairs == 0
    assert "nobody asked" not in whole.text()


def test_a_block_that_made_nothing_of_its_requests_is_not_idle(log, tmp_path):
    """Leaving it out would leave out what a policy that stalls did."""
    refused("no requests", rewritten(log, tmp_path, quiet([4, 5], asked=True)))


def test_clients_that_wait_for_a_policy_that_stalls_are_not_idle(log, tmp_path):
    """Who waits for an answer before the next question asks for nothing while it waits."""
    refused("no requests", rewritten(log, tmp_path, quiet([4, 5], waits_req=3.0)))


def test_idle_pairs_leave_too_few(log, tmp_path):
    path = rewritten(log, tmp_path, quiet(range(10, 16)))
    refused("too few blocks", path)
    with pytest.raises(EvidenceRefused, match="in 3 nobody asked for anything in one of the"):
        savings_of_log(path)


def test_unequal_load_is_refused(log, tmp_path):
    def favour(tick):
        if tick["notes"][POLICY_NOTE]:
            finished = tick["observation"]["finished"]
            finished["output_tok"] = [1.3 * tok for tok in finished["output_tok"]]

    refused("unequal load", rewritten(log, tmp_path, favour))


def test_spoiled_blocks_are_left_out(log, tmp_path):
    def restart_counter(tick):
        if tick["notes"][BLOCK_NOTE] >= 3:
            tick["observation"]["state"]["energy_j"][0] -= 1e6

    def lose(tick):
        if tick["notes"][BLOCK_NOTE] == 2:
            tick["observation"]["state"]["age_s"] = [60.0, 60.0]

    for change in (restart_counter, lose):
        found = savings_of_log(rewritten(log, tmp_path, change))
        # A counter that falls in a washout spoils nothing.
        assert found.pairs in (7, 8)
        assert found.saving_frac.value == pytest.approx(
            savings_of_log(log).saving_frac.value, abs=0.03
        )
    assert found.pairs == 7


def test_restart_of_the_controller_keeps_both_runs(tmp_path):
    paths = []
    for number in (1, 2):
        paths.append(tmp_path / f"run{number}.jsonl")
        with Recorder(paths[-1], fleet()) as ticks:
            switchback(number, CLOCK_MHZ, ticks, pairs=4)
    found = savings_of_log(paths)
    assert found.pairs == 8
    with pytest.raises(EvidenceRefused, match="too few blocks"):
        savings_of_log(paths[:1])


def test_washout_longer_than_a_block_is_refused(log):
    with pytest.raises(ConfigError, match="washout_s"):
        savings_of_log(log, washout_s=60.0)


def test_tokens_go_to_the_block_that_made_them():
    """A request that ends in the next block leaves its tokens where they were generated."""
    meter = BlockMeter(washout_s=0.0)
    for t_s in range(31):
        block, age_s = divmod(t_s, 10)
        notes = {
            BLOCK_NOTE: block, POLICY_NOTE: float(at_policy(block, 0)),
            LENGTH_NOTE: 10.0, AGE_NOTE: float(age_s),
        }  # fmt: skip
        state = replace(FleetState.idle(2, t_s=float(t_s)), energy_j=np.full(2, 100.0 * t_s))
        # Ends at 14 s after 8 s of generation: half of it before the border.
        done = requests(1, itl_s=0.1, output_tok=81.0) if t_s == 14 else requests(0)
        meter.add(Observation(state=state, finished=done), notes)
    assert [block.finished_tok for block in meter.blocks[:2]] == pytest.approx([40.5, 40.5])


def test_iterations_tell_tokens_where_requests_do_not(log, tmp_path):
    def only_iterations(tick):
        observation = tick["observation"]
        decoded = sum(observation["finished"]["output_tok"])
        for name in observation["finished"]:
            observation["finished"][name] = []
        for name in observation["iterations"]:
            observation["iterations"][name] = [1]
        observation["iterations"]["batch_req"] = [decoded]

    found = savings_of_log(rewritten(log, tmp_path, only_iterations))
    assert found.saving_frac.value == pytest.approx(savings_of_log(log).saving_frac.value, abs=0.03)
    assert found.policy_attainment_frac is None
    assert "--slo" in found.text()


def test_command_line(log, root):
    done = run("savings", str(log), "--price-kwh", "0.3", "--co2-g-kwh", "400",
               PYTHONPATH=str(root))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("saving ")
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = run("savings", str(log), "--json", PYTHONPATH=str(root))
    assert json.loads(done.stdout)["schema"] == "voltana-ctrl/savings/1"
    done = run("savings", str(log) + ".absent", PYTHONPATH=str(root))
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
