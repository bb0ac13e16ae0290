"""Does `mpc` draw less than each other policy, if the fleet is what its profile may be?

    python bench/signs.py [--draws 40] [--rates 10,20,35,50,65,80] [--jobs 2]

Every draw is one fleet from the bands of the reference profile; policies believe the profile.
Prints the table of docs/validation/refit.md: how often each policy keeps the promise, and in how
many of the draws `mpc` draws less per token, of all and of those in which the other keeps it, too.
All figures are simulated. Some twenty minutes of one core.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.profiles.draws import draw_fleet

PROFILE = "a100-sxm-80gb/llama-3.1-8b"
OTHERS = (
    "static-max", "static-1005", "static-best", "threshold", "dualscale", "pack", "ecoserve",
    "voltanallm", "voltanallm-tile", "voltanallm-jsq",
)  # fmt: skip
SLO = Slo(ttft_s=0.6, itl_s=0.06)


def drawn(draw, rate_req_s):
    """Joules per token, and whether the promise is kept, of every policy on one fleet."""
    believed = FleetSpec.parse("2P2D", load_profile(PROFILE))
    fleet = draw_fleet(believed, np.random.default_rng([draw, 7]))
    found = {}
    for policy in (*OTHERS, "mpc"):
        run = Run(
            policy=policy, fleet=fleet, believed=believed, slo=SLO, workload="sharegpt",
            rate_req_s=rate_req_s, seed=0, duration_s=60.0, warmup_s=20.0,
        ).simulate()  # fmt: skip
        kept = min(run["ttft_attainment"], run["itl_attainment"]) >= SLO.attainment
        found[policy] = run["energy_per_token_j"], kept
    return found


def cells(found):
    """One load: draws in which `mpc` keeps the promise, and in which each other draws more.

    Of all draws; of those in which the other keeps the promise, too; and how many these are.
    """
    own_j = np.array([one["mpc"][0] for one in found])
    told = [f"{np.mean([one['mpc'][1] for one in found]):.0%}"]
    for other in OTHERS:
        more = own_j < [one[other][0] for one in found]
        kept = np.array([one[other][1] for one in found])
        of_kept = f"{more[kept].mean():.0%}" if kept.any() else "-"
        told.append(f"{more.mean():.0%}, {of_kept} of {kept.mean():.0%}")
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--rates", default="10,20,35,50,65,80")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    rates = options.rates.split(",")
    with ProcessPoolExecutor(options.jobs) as pool:
        columns = [
            cells(list(pool.map(drawn, range(options.draws), [float(rate)] * options.draws)))
            for rate in rates
        ]
    print(f"| req/s | {' | '.join(rates)} |")
    print("|---" * (len(rates) + 1) + "|")
    for label, row in zip(("`mpc` keeps", *OTHERS), zip(*columns, strict=True), strict=True):
        print(f"| {label} | {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
