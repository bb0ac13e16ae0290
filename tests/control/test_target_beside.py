"""Colocated instances in the target layer: prompts between tokens, and who catches up with them."""

import dataclasses

import numpy as np
import pytest

from tests.control.test_target import LENGTHS, PROFILE, SLO, least_power
from voltana_ctrl import FleetSpec
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.kernels.choose import beside
from voltana_ctrl.kernels.choose import target as kernels
from voltana_ctrl.kernels.choose.governor import patience_s

MIXED = FleetSpec.parse("1C", PROFILE).instances[0]


def integrated(least, load, batch):
    """Weight and time made up for of the four parts, by sums over a fine grid of lateness."""
    prompts = least.station(LENGTHS)[-1]
    size, kv_tok = float(least._padded[batch]), batch * LENGTHS.context_tok
    rest = (size, kv_tok, float(batch))

    def run(row, within_s=np.inf):
        return beside.at_row(least.rows, row, *rest, within_s, prompts, load)

    k = beside.beside(least.rows, *rest, prompts, load, 0, 0)[0]
    kept = 1.0 - load * prompts.prompt_s[k]
    time_s = run(k)[1]
    repay, variance = prompts.repay_tok * kept, load * time_s * prompts.prompt_s2[k]
    slack = prompts.aim_s - time_s
    thrifty = prompts.thrifty_k
    most = prompts.aim_s - run(thrifty)[1]
    clocks = least.rows["clock_mhz"]
    patience = patience_s(prompts.aim_s, clocks[k], clocks[thrifty])
    # Steps of the walk are longer than nothing.
    x, dx = np.linspace(0.0, 3.0, 600_001, retstep=True)
    x = np.maximum(0.0, x - 0.5826 * np.sqrt(variance))
    made = np.clip(x / repay, slack, most)
    far = x > repay * most + patience
    made = np.where(far, (x - patience) / repay, made)
    density = np.exp(-2.0 / variance * (np.cumsum(made) - made) * dx)
    parts = [made <= slack, (made > slack) & (made < most), (made == most) & ~far, far]
    weight = np.array([density[part].sum() for part in parts])
    mean_s = [(density * made)[part].sum() / density[part].sum() for part in parts]
    at = [run(k)] + [run(k, kept * max(0.0, prompts.aim_s - each)) for each in mean_s[1:]]
    spent_s = weight @ [each[1] for each in at] / weight.sum()
    power_w = weight @ [each[1] * each[2] for each in at] / weight.sum() / spent_s
    return spent_s, power_w


@pytest.mark.parametrize(("load", "batch"), [(5.0, 45), (8.0, 70), (12.0, 110), (17.0, 165)])
def test_iterations_beside_prompts_against_sums_over_lateness(load, batch):
    least = least_power(MIXED)
    _, _, time_s, power_w, _ = beside.beside(
        least.rows, float(least._padded[batch]), batch * LENGTHS.context_tok, float(batch),
        least.station(LENGTHS)[-1], load, 0, 0,
    )  # fmt: skip
    theirs_s, theirs_w = integrated(least, load, batch)
    # The row nearest to a clock is one of 81.
    assert time_s == pytest.approx(theirs_s, rel=0.01)
    assert power_w == pytest.approx(theirs_w, rel=0.01)


def test_a_floor_leaves_lateness_to_the_governor_but_no_batch_that_does_not_fit():
    """A clock that is raised makes up for time, not for who waits for a place in the batch."""
    loads = np.array([8.0, 12.0])
    roomy = least_power(MIXED)
    alone = least_power(MIXED, governed=False).at(LENGTHS)(loads)
    curve = roomy.at(LENGTHS)(loads)
    lower = 1.0 - PROFILE.clocks_mhz[curve.floor_row] / PROFILE.clocks_mhz[alone.floor_row]
    assert ((lower > 0.01) & (lower < 0.3)).all()
    tight = least_power(dataclasses.replace(MIXED, max_batch=128))
    bound = tight.at(LENGTHS)(loads[-1:])
    assert PROFILE.clocks_mhz[bound.floor_row[0]] > PROFILE.clocks_mhz[curve.floor_row[-1]] + 30.0
    decoded_tok, limit_req, _ = tight._limits(LENGTHS)
    floor_k = int(bound.floor_row[0])
    # Of the batch alone, whatever iterations take.
    over = [
        kernels.station(tight.station(LENGTHS), loads[-1], decoded_tok, limit_req, 1e3, k)[1]
        for k in (int(curve.floor_row[-1]), floor_k)
    ]
    assert over[1] <= 1.0 - SLO.attainment < over[0]


@pytest.mark.parametrize("margin_frac", [-0.015, 0.0, 0.035])
def test_every_load_below_the_most_can_be_served(margin_frac):
    """A floor that draws less and misses more than is allowed is not taken."""
    least = least_power(MIXED)
    least._itl_margin_frac = margin_frac
    power_w = least.at(LENGTHS)(np.linspace(0.5, 18.0, 36)).power_w
    assert np.isfinite(power_w).all()
    assert (np.diff(power_w) > 0.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("load", [12.0, 18.0])
def test_power_of_a_colocated_instance_against_the_simulator(load):
    """Near the thrifty clock too, above which catching up is dear."""
    run = Run(
        policy="cascade", fleet=FleetSpec.parse("1C", PROFILE), slo=SLO, workload="sharegpt",
        rate_req_s=load, seed=1, duration_s=300.0, warmup_s=60.0,
    ).simulate()  # fmt: skip
    law_w = least_power(MIXED).at(LENGTHS)(np.array([load])).power_w[0]
    assert law_w == pytest.approx(run["mean_power_w"], rel=0.05)
    assert run["itl_attainment"] > 0.985
