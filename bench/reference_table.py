"""The controller beside VoltanaLLM's rules on the reference scenario, three unseen seeds.

    python bench/reference_table.py [--rates 10,20,35] [--seeds 301,302,303]
        [--profile NAME] [--jitter 0.05]

All figures are simulated; prints the table of docs/layers.md. Every run judges at least 10,000
requests. Takes about a quarter of an hour of one core.
"""

import argparse
import sys

import numpy as np

from voltana_ctrl import compare
from voltana_ctrl.sim.plant import PlantSettings

RULES = ("voltanallm", "voltanallm-tile", "voltanallm-jsq")
OURS = ("cascade", "mpc")
JUDGED_REQ = 10_000


def means(rate_req_s, seeds, profile, settings):
    """Watts, TTFT and ITL attainment, and share of the gap closed, by policy."""
    runs = compare(
        profile=profile,
        rates_req_s=[rate_req_s],
        seeds=seeds,
        duration_s=max(150.0, 1.04 * JUDGED_REQ / rate_req_s),
        policies=[*RULES, *OURS, "bound"],
        settings=settings,
    ).runs
    keys = ("mean_power_w", "ttft_attainment", "itl_attainment", "bound_gap_closed")
    return {
        policy: np.mean(
            [[run[key] or 0.0 for key in keys] for run in runs if run["policy"] == policy], axis=0
        )
        for policy in (*RULES, *OURS)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", default="10,20,35,50,65,80,90,100")
    parser.add_argument("--seeds", default="301,302,303")
    parser.add_argument("--profile", default="a100-sxm-80gb/llama-3.1-8b")
    parser.add_argument("--jitter", type=float, default=0.0, help="spread of iteration times")
    options = parser.parse_args()
    settings = PlantSettings(jitter_sd_frac=options.jitter)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    print("| req/s | best of voltanallm, -tile, -jsq | cascade | mpc | mpc / best | gap closed |")
    print("|---|---|---|---|---|---|", flush=True)
    for rate_req_s in map(float, options.rates.split(",")):
        found = means(rate_req_s, seeds, options.profile, settings)
        best = min((found[rule] for rule in RULES), key=lambda each: each[0])
        told = [
            f"{power_w:.0f}; {100 * ttft:.2f} / {100 * itl:.2f}"
            for power_w, ttft, itl, _ in (best, *(found[policy] for policy in OURS))
        ]
        ratio, closed = found["mpc"][0] / best[0], found["mpc"][3]
        gap = f"{closed:.2f}" if closed > 0.0 else "-"
        print(f"| {rate_req_s:g} | {' | '.join(told)} | {ratio:.3f} | {gap} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
