"""What the refit of voltage, decode energy and idle power changed in every headline figure.

    python -m bench.validation refit

One seed, 120 s a run; the same load for both profiles. Some three minutes of one core.
"""

import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.profiles.draws import draw_fleet
from voltana_ctrl.sim.lower_bound import lower_bound_w

#: The reference as first shipped, and as refitted to serving data.
NAMES = {
    "first shipped": "a100-sxm-80gb/llama-3.1-8b-2026-11",
    "refitted": "a100-sxm-80gb/llama-3.1-8b",
}
RATES_REQ_S = (10.0, 20.0, 35.0, 50.0, 65.0, 80.0)
DRAWS = 40
POLICIES = ("static-max", "static-1005", "voltanallm", "pack", "mpc")
SLO = Slo(ttft_s=0.6, itl_s=0.06)
#: VoltanaLLM's figure, Llama panels: 1 - saving of static 1005, from low to high load.
PAPER = "0.64 to 0.70 (LMSYS), 0.64 to 0.72 (ShareGPT)"


def figures(name, rate_req_s):
    """Watts and attainment by policy, and the lower bound."""
    fleet = FleetSpec.parse("2P2D", load_profile(name))
    runs = {
        policy: Run(
            policy=policy, fleet=fleet, slo=SLO, workload="sharegpt", rate_req_s=rate_req_s, seed=1
        )
        for policy in POLICIES
    }
    found = {policy: run.simulate() for policy, run in runs.items()}
    load, _ = runs["mpc"]._requests()
    return found, lower_bound_w(fleet, load, 30.0, 150.0, SLO)


def ratio_band(name, rate_req_s):
    """Static 1005 over static max: 5 to 95 % of draws from the profile's band, 40 s a run."""
    fleet, found = FleetSpec.parse("2P2D", load_profile(name)), []
    for draw in range(DRAWS):
        drawn = draw_fleet(fleet, np.random.default_rng([draw, 7]))
        power_w = [
            Run(
                policy=policy, fleet=drawn, slo=SLO, workload="sharegpt", rate_req_s=rate_req_s,
                seed=0, duration_s=40.0, warmup_s=20.0,
            ).simulate()["mean_power_w"]
            for policy in ("static-1005", "static-max")
        ]  # fmt: skip
        found.append(power_w[0] / power_w[1])
    return "{:.2f} to {:.2f}".format(*np.quantile(found, (0.05, 0.95)))


def tables():
    """Tables of the page by name."""
    headline = [
        "| req/s | profile | static-max W | pack | voltanallm | mpc | mpc below voltanallm"
        " | mpc keeps both | lower bound / mpc |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ratio = [
        "| req/s | static-1005 / static-max, first shipped | refitted | 5 to 95 % | paper |",
        "|---|---|---|---|---|",
    ]
    for rate_req_s in RATES_REQ_S:
        ratios = []
        for label, name in NAMES.items():
            found, bound_w = figures(name, rate_req_s)
            power_w = {policy: each["mean_power_w"] for policy, each in found.items()}
            most_w = power_w["static-max"]
            saved = [
                f"{1.0 - power_w[each] / most_w:.1%}" for each in ("pack", "voltanallm", "mpc")
            ]
            less = f"{1.0 - power_w['mpc'] / power_w['voltanallm']:.1%}"
            headline.append(
                f"| {rate_req_s:g} | {label} | {most_w:.0f} | {' | '.join(saved)} | {less}"
                f" | {found['mpc']['slo_attainment']:.3f} | {bound_w / power_w['mpc']:.2f} |"
            )
            ratios.append(f"{power_w['static-1005'] / most_w:.3f}")
        band = ratio_band(NAMES["refitted"], rate_req_s)
        ratio.append(f"| {rate_req_s:g} | {' | '.join(ratios)} | {band} | {PAPER} |")
    return {"refit-headline": headline, "refit-ratio": ratio}
